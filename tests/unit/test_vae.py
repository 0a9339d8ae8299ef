"""The 2D VAE against diffusers' 3D one, with random weights at small sizes."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage

from krea2_model.checkpoints.vae_keys import (
    infer_vae_config,
    restore_temporal,
    slice_temporal,
    temporal_shapes,
    vae_key_map,
)
from krea2_model.config import VAEConfig
from krea2_model.vae import model as vae_module
from krea2_model.vae.model import (
    QwenImageVAE,
    attend_in_chunks,
    encoder_reach,
    reach,
    tiled_bytes,
)
from krea2_model.vae.tiling import plan_tiles
from live_bytes import LiveBytes

SMALL = VAEConfig(base_dim=16)
# Fewer levels, one block a level, other multiples: nothing of the layout is a constant.
SHALLOW = VAEConfig(base_dim=8, dim_mult=(1, 2, 3), num_res_blocks=1)
CONFIGS = [VAEConfig(), SMALL, SHALLOW]


def reference_vae(config: VAEConfig, seed: int = 0):
    """diffusers' VAE with random weights, gains around 1 and images mostly inside [-1, 1]."""
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKLQwenImage(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=[False] + [True] * (len(config.dim_mult) - 2),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            else:  # every temporal slice is as large as the last, so a wrong one shows
                fan_in = (
                    parameter[0, :, -1:].numel() if parameter.ndim == 5 else parameter[0].numel()
                )
                parameter.normal_(0.0, fan_in**-0.5)
        model.decoder.conv_out.weight.mul_(0.3)
        # Sharp attention, so that the test sees which pixel attends to which.
        for part in (model.encoder, model.decoder):
            part.mid_block.attentions[0].to_qkv.weight.mul_(2.0)
    return model.eval().requires_grad_(False)


def original_names(model, config: VAEConfig) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {original: state[name] for original, name in vae_key_map(config).items()}


def our_vae(model, config: VAEConfig) -> QwenImageVAE:
    vae = QwenImageVAE(config, device="meta")
    state = slice_temporal(original_names(model, config), config)
    vae.load_state_dict(state, strict=True, assign=True)
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def reference():
    return reference_vae(SMALL)


@pytest.fixture(scope="module")
def vae(reference) -> QwenImageVAE:
    return our_vae(reference, SMALL)


def statistics(config: VAEConfig):
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    return mean, torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)


def reference_encode(model, images, config=SMALL):
    mean, std = statistics(config)
    latents = model.encode(images[:, :, None]).latent_dist.mode()
    return ((latents - mean) / std)[:, :, 0]


def reference_decode(model, latents, config=SMALL):
    mean, std = statistics(config)
    dtype = model.post_quant_conv.weight.dtype
    return model.decode((latents[:, :, None] * std + mean).to(dtype)).sample[:, :, 0]


def relative_error(found, expected) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def images_of(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.manual_seed(1)) * 2 - 1


def latents_of(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 16, height, width, generator=torch.manual_seed(2))


# Parity


@pytest.mark.parametrize("size", [(1, 64, 64), (2, 40, 72)])
def test_encode_equals_diffusers(reference, vae, size):
    images = images_of(*size)
    found = vae.encode(images)
    assert found.dtype is torch.float32 and found.is_contiguous()
    assert relative_error(found, reference_encode(reference, images)) < 1e-5


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 5, 9)])
def test_decode_equals_diffusers(reference, vae, size):
    latents = latents_of(*size)
    expected = reference_decode(reference, latents)
    assert (expected.abs() < 1).float().mean() > 0.9, "a clamped reference would hide errors"
    found = vae.decode(latents)
    assert found.dtype is torch.float32 and found.is_contiguous()
    assert relative_error(found, expected) < 1e-5


def test_other_depths_equal_diffusers():
    model = reference_vae(SHALLOW)
    vae = our_vae(model, SHALLOW)
    images, latents = images_of(1, 24, 32), latents_of(1, 6, 8)
    assert relative_error(vae.encode(images), reference_encode(model, images, SHALLOW)) < 1e-5
    assert relative_error(vae.decode(latents), reference_decode(model, latents, SHALLOW)) < 1e-5


def test_unnormalised_latents_are_the_networks_own(reference, vae):
    images, latents = images_of(1, 32, 32), latents_of(1, 4, 4)
    expected = reference.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]
    assert relative_error(vae.encode_unnormalised(images), expected) < 1e-5
    expected = reference.decode(latents[:, :, None]).sample[:, :, 0]
    assert relative_error(vae.decode_unnormalised(latents), expected) < 1e-5
    assert relative_error(vae.denormalise(vae.normalise(latents)), latents) < 1e-6


def test_decode_clamps_as_diffusers_does(reference, vae):
    latents = latents_of(1, 4, 4)
    with torch.no_grad():
        scale = 20.0
        reference.decoder.conv_out.weight.mul_(scale)
        vae.decoder.head[2].weight.mul_(scale)
        found, expected = vae.decode(latents), reference_decode(reference, latents)
        reference.decoder.conv_out.weight.div_(scale)
        vae.decoder.head[2].weight.div_(scale)
    assert found.abs().max() == 1 and relative_error(found, expected) < 1e-4


def test_bf16_is_as_close_to_fp32_as_diffusers_is(reference, vae):
    latents, images = latents_of(1, 8, 8), images_of(1, 64, 64)
    reference16 = reference_vae(SMALL).to(torch.bfloat16)
    vae16 = our_vae(reference16, SMALL)
    assert vae16.conv1.weight.dtype is torch.bfloat16
    # Both are compared with fp32 maths on the same rounded weights.
    exact = our_vae(reference16, SMALL).float()
    expected = exact.decode(latents)
    theirs = (reference_decode(reference16, latents).float() - expected).square().mean().sqrt()
    ours = (vae16.decode(latents) - expected).square().mean().sqrt()
    assert 0 < ours <= 1.2 * theirs
    expected = exact.encode(images)
    theirs = reference_encode(reference16, images.to(torch.bfloat16)) - expected
    ours = vae16.encode(images) - expected
    assert ours.square().mean() <= 1.2**2 * theirs.square().mean()


def test_gradients_equal_diffusers(reference, vae):
    images, latents = images_of(1, 16, 24), latents_of(1, 2, 3)
    for ours, theirs, source in (
        (vae.encode, reference_encode, images),
        (vae.decode, reference_decode, latents),
    ):
        leaf, other = source.clone().requires_grad_(), source.clone().requires_grad_()
        result = ours(leaf)
        weight = torch.randn_like(result)
        (result * weight).sum().backward()
        (theirs(reference, other) * weight).sum().backward()
        assert relative_error(leaf.grad, other.grad) < 1e-4


def test_weight_gradients_reach_every_parameter(vae):
    trained = QwenImageVAE(SMALL)
    trained.load_state_dict(vae.state_dict())
    latents = trained.encode(images_of(1, 16, 16))
    trained.decode(latents).square().mean().backward()
    missing = [name for name, p in trained.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


# Attention


def test_chunked_attention_equals_whole_and_stays_in_its_budget(monkeypatch):
    query, key, value = torch.randn(3, 1, 1, 77, 24, generator=torch.manual_seed(3)).unbind()
    expected = F.scaled_dot_product_attention(query, key, value)
    rows = []
    whole = F.scaled_dot_product_attention

    def spy(query, key, value):
        rows.append(query.shape[2])
        return whole(query, key, value)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    torch.testing.assert_close(attend_in_chunks(query, key, value, 4 * 77 * 10), expected)
    assert rows == [10] * 7 + [7]
    rows.clear()
    attend_in_chunks(query, key, value, 1)
    assert rows == [1] * 77


def test_a_device_without_a_fused_kernel_gets_the_same_images(vae, monkeypatch):
    latents = latents_of(1, 6, 7)
    expected = vae.decode(latents)
    monkeypatch.setattr(vae_module, "has_fused_attention", lambda *_: False)
    monkeypatch.setattr(vae_module, "MAX_SCORE_BYTES", 4 * 42 * 5)
    assert relative_error(vae.decode(latents), expected) < 1e-5


def test_a_batch_runs_one_image_at_a_time_in_channels_last(vae):
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
        for module in vae.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    vae.decode(vae.encode(images_of(2, 32, 32)))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 * len(hooks)
    for tensors in seen:
        assert all(t.shape[0] == 1 for t in tensors)
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    assert all(
        p.is_contiguous(memory_format=torch.channels_last) for p in vae.parameters() if p.ndim == 4
    )


# Tiles


@pytest.mark.parametrize(
    "size, tile, overlap", [(10, 4, 1), (13, 8, 2), (9, 8, 0), (16, 4, 0), (17, 6, 5), (5, 8, 2)]
)
def test_tiles_cover_the_axis(size, tile, overlap):
    spans = plan_tiles(size, tile, overlap)
    assert spans[0][0] == 0 and spans[-1][1] == size
    assert all(stop - start == min(tile, size) for start, stop in spans)
    for (_, stop), (start, _) in zip(spans, spans[1:], strict=False):
        assert stop - start >= overlap


@pytest.mark.parametrize("tile", [64, 1024])
def test_one_tile_equals_plain_bit_for_bit(vae, tile):
    latents, images = latents_of(2, 8, 6), images_of(2, 48, 64)
    assert torch.equal(vae.decode_tiled(latents, tile), vae.decode(latents))
    assert torch.equal(vae.encode_tiled(images, tile), vae.encode(images))


@pytest.mark.parametrize(
    "config, tile", [(SMALL, 64), (SHALLOW, 8), (replace(SHALLOW, upscale=2), 40)]
)
def test_decoding_in_tiles_has_no_seams(config, tile):
    """Random weights, sharp attention: far under 2 of 255, in any tile, with the true margin."""
    torch.manual_seed(0)
    vae = QwenImageVAE(config).eval().requires_grad_(False)
    steps, latents = [], latents_of(1, 5 * reach(config) // 2, 11)
    tiled = vae.decode_tiled(
        latents, tile // 8 * config.downscale, lambda *step: steps.append(step)
    )
    assert [done for done, _ in steps] == list(range(1, steps[0][1] + 1)) and len(steps) > 2
    error = (tiled - vae.decode(latents)).abs().max()
    assert error < 1e-4


@pytest.mark.parametrize("config, tile", [(SMALL, 64), (SHALLOW, 8)])
def test_encoding_in_tiles_is_exact(config, tile):
    """As decoding. Of two images, which are larger than margin and tile."""
    torch.manual_seed(0)
    vae = QwenImageVAE(config).eval().requires_grad_(False)
    cell, steps = config.downscale, []
    images = images_of(2, 3 * encoder_reach(config) * cell, 9 * cell)
    tiled = vae.encode_tiled(images, tile // 8 * cell, lambda *step: steps.append(step))
    assert [done for done, _ in steps] == list(range(1, steps[0][1] + 1)) and len(steps) > 4
    expected = vae.encode(images)
    assert tiled.dtype is torch.float32
    assert (tiled - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("config", [SMALL, SHALLOW, VAEConfig(base_dim=8, num_res_blocks=3)])
def test_the_margin_is_what_the_convolutions_reach(config):
    """A cell behind it changes nothing, one at its end does; no bias hides it."""
    torch.manual_seed(0)
    decoder = QwenImageVAE(config).decoder.eval().requires_grad_(False).double()
    far, channels = reach(config), config.base_dim * config.dim_mult[-1]
    hidden = torch.randn(1, channels, 3, 2 * far + 3, dtype=torch.float64)
    expected = decoder.enlarge(hidden)
    # The pixels of one cell in the middle, with the margin to one side changed beyond and within.
    own = slice((far + 1) * config.downscale, (far + 2) * config.downscale)
    for distance, is_seen in ((far + 1, False), (far, True)):
        changed = hidden.clone()
        changed[..., far + 1 - distance] += 5
        is_same = torch.equal(decoder.enlarge(changed)[..., own], expected[..., own])
        assert is_same != is_seen


@pytest.mark.parametrize("config", [SMALL, SHALLOW, VAEConfig(base_dim=8, num_res_blocks=3)])
def test_the_encoder_s_margin_is_what_its_convolutions_reach(config):
    torch.manual_seed(0)
    encoder = QwenImageVAE(config).encoder.eval().requires_grad_(False).double()
    far, cell = encoder_reach(config), config.downscale
    images = torch.randn(1, 3, 2 * cell, (2 * far + 3) * cell, dtype=torch.float64)
    expected, own = encoder.reduce(images), far + 1
    for side in (-1, 1):
        seen = []
        for distance in (far + 1, far):
            changed = images.clone()
            first = (own + side * distance) * cell
            changed[..., first : first + cell] += 5
            seen.append(not torch.equal(encoder.reduce(changed)[..., own], expected[..., own]))
        # To the left a convolution of stride 2 reaches less.
        assert not seen[0] and (seen[1] or side == -1)


def test_tiles_to_8192_px_keep_their_bound(monkeypatch):
    """Counted on tensors without content, in bfloat16 at the released sizes."""
    monkeypatch.setattr(vae_module, "has_fused_attention", lambda *heads: True)
    monkeypatch.setattr(
        vae_module.F, "scaled_dot_product_attention", lambda query, *rest: torch.empty_like(query)
    )
    options = {"device": "meta", "dtype": torch.bfloat16}
    vae = QwenImageVAE(VAEConfig(), **options).to(memory_format=torch.channels_last)
    for side, gigabytes in ((2048, 2.6), (8192, 6.6)):
        latents = torch.empty(1, 16, side // 8, side // 8, device="meta")
        with torch.no_grad(), LiveBytes("meta") as counted:
            vae.decode_tiled(latents)
        image = 3 * 4 * side**2  # may be elsewhere
        bound = tiled_bytes(vae.config, latents.shape[2:], 1024, 2, 8.5)
        assert counted.peak - image <= bound <= gigabytes * 1e9
        assert bound < 1.3 * (counted.peak - image)
        # Of encoding, a strip: its tiles are those of the whole image.
        images = torch.empty(1, 3, side, 2048, device="meta")
        with torch.no_grad(), LiveBytes("meta") as counted:
            vae.encode_tiled(images)
        assert counted.peak <= tiled_bytes(vae.config, (side // 8, 256), 1024, 2, 8.5)


def test_gradients_flow_through_tiles(vae):
    latents = latents_of(1, 5, 4).requires_grad_()
    vae.decode_tiled(latents, 24).sum().backward()
    assert latents.grad.isfinite().all() and (latents.grad != 0).all()
    images = images_of(1, 40, 32).requires_grad_()
    vae.encode_tiled(images, 24).sum().backward()
    assert images.grad.isfinite().all() and (images.grad != 0).any()


@pytest.mark.parametrize("tile", [0, 60, -64])
def test_tile_sizes_are_checked(vae, tile):
    for method, source in (
        (vae.encode_tiled, images_of(1, 32, 32)),
        (vae.decode_tiled, latents_of(1, 4, 4)),
    ):
        with pytest.raises(ValueError, match=f"tile {tile} .* multiple of 8"):
            method(source, tile)


# Errors


def test_wrong_shapes_are_refused(vae):
    with pytest.raises(ValueError, match=r"\(1, 16, 1, 4, 4\), expected \(B, 16, .*frame axis"):
        vae.decode(torch.zeros(1, 16, 1, 4, 4))
    for method in (vae.decode, vae.decode_unnormalised, vae.decode_tiled, vae.normalise):
        with pytest.raises(ValueError, match=r"latents .*\(1, 4, 4, 4\), expected \(B, 16"):
            method(torch.zeros(1, 4, 4, 4))
    for method in (vae.encode, vae.encode_unnormalised, vae.encode_tiled):
        with pytest.raises(ValueError, match=r"images .*\(3, 16, 16\), expected \(B, 3"):
            method(torch.zeros(3, 16, 16))
        with pytest.raises(ValueError, match="30x16 pixels.*multiples of 8.*to 24x16"):
            method(torch.zeros(1, 3, 16, 30))
    with pytest.raises(ValueError, match="torch.uint8"):
        vae.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_statistics_must_match_the_latent_channels():
    with pytest.raises(ValueError, match="16 values.*each of the 4 latent channels"):
        QwenImageVAE(replace(SMALL, z_dim=4), device="meta")


# Keys


@pytest.mark.parametrize("config", CONFIGS)
def test_key_map_covers_diffusers_and_our_module(config):
    with torch.device("meta"):
        model = diffusers.AutoencoderKLQwenImage(
            base_dim=config.base_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=[False] + [True] * (len(config.dim_mult) - 2),
        )
    keys = vae_key_map(config)
    assert set(keys.values()) == set(model.state_dict())
    assert len(set(keys.values())) == len(keys)
    ours = {name for name in keys if ".time_conv." not in name}
    assert ours == set(QwenImageVAE(config, device="meta").state_dict())


@pytest.mark.parametrize("config", [SMALL, VAEConfig()])
def test_shapes_with_time_axes_are_those_of_diffusers(config):
    with torch.device("meta"):
        theirs = AutoencoderKLQwenImage(base_dim=config.base_dim).state_dict()
    keys = vae_key_map(config)
    ours = {keys[name]: shape for name, shape in temporal_shapes(config).items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def test_restoring_time_axes_is_the_inverse_of_slicing(vae):
    state = vae.state_dict()
    whole = restore_temporal(state, vae.config)
    assert {name: tuple(t.shape) for name, t in whole.items()} == temporal_shapes(vae.config)
    again = slice_temporal(whole, vae.config)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_the_released_vae_has_194_keys():
    keys = vae_key_map(VAEConfig())
    assert len(keys) == 194
    # Spot checks of names that files in circulation have.
    assert (
        keys["encoder.downsamples.5.time_conv.weight"] == "encoder.down_blocks.5.time_conv.weight"
    )
    assert (
        keys["decoder.upsamples.4.shortcut.bias"]
        == "decoder.up_blocks.1.resnets.0.conv_shortcut.bias"
    )
    assert keys["conv1.weight"] == "quant_conv.weight"


@pytest.mark.parametrize("config", CONFIGS)
def test_sizes_are_read_from_either_layout(config):
    with torch.device("meta"):
        state = diffusers.AutoencoderKLQwenImage(
            base_dim=config.base_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=[False] + [True] * (len(config.dim_mult) - 2),
        ).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert infer_vae_config(shapes) == config
    original = {name: state[other] for name, other in vae_key_map(config).items()}
    assert infer_vae_config({name: tuple(t.shape) for name, t in original.items()}) == config
    sliced = slice_temporal(original, config)
    assert infer_vae_config({name: tuple(t.shape) for name, t in sliced.items()}) == config
    again = slice_temporal(sliced, config)
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in sliced.items()}


def test_other_models_are_refused_by_what_differs():
    shapes = {name: tuple(t.shape) for name, t in QwenImageVAE(SMALL).state_dict().items()}
    with pytest.raises(ValueError, match="encoder.conv1.weight is missing"):
        infer_vae_config({"decoder.conv_in.weight": (512, 16, 3, 3)})
    with pytest.raises(ValueError, match="downsamples.7.residual.6.bias is missing"):
        infer_vae_config(
            {
                name: s
                for name, s in shapes.items()
                if name != "encoder.downsamples.7.residual.6.bias"
            }
        )
    with pytest.raises(ValueError, match=r"decoder.head.2.bias has shape \(3,\), expected \(12,\)"):
        infer_vae_config(shapes | {"decoder.head.2.weight": (12, 16, 3, 3)})
    with pytest.raises(ValueError, match="decoder gives 5 channels; expected 3, or 12"):
        infer_vae_config(shapes | {"decoder.head.2.weight": (5, 16, 3, 3)})
    with pytest.raises(ValueError, match="encoder.extra is unknown"):
        infer_vae_config(shapes | {"encoder.extra": (1,)})
    with pytest.raises(ValueError, match=r"\[2, 1, 2, 2\] residual blocks"):
        gone = "encoder.downsamples.4.residual.2.weight"
        moved = {
            name.replace("samples.5.resample", "samples.4.resample"): s
            for name, s in shapes.items()
        }
        moved = {
            name.replace("samples.6.", "samples.5."): s for name, s in moved.items() if name != gone
        }
        for index in range(7, 11):
            moved = {
                name.replace(f"downsamples.{index}.", f"downsamples.{index - 1}."): s
                for name, s in moved.items()
            }
        infer_vae_config(moved)
    with pytest.raises(ValueError, match="surplus is no tensor"):
        slice_temporal({"surplus": torch.zeros(1)}, SMALL)


def test_slicing_takes_the_last_slice_as_a_copy_in_its_dtype():
    kernel = torch.randn(16, 3, 3, 3, 3).to(torch.bfloat16)
    gamma = torch.randn(16, 1, 1, 1)
    sliced = slice_temporal(
        {"encoder.conv1.weight": kernel, "encoder.downsamples.0.residual.0.gamma": gamma}, SMALL
    )
    weight = sliced["encoder.conv1.weight"]
    assert weight.dtype is torch.bfloat16 and torch.equal(weight, kernel[:, :, 2])
    assert weight.untyped_storage().nbytes() == weight.numel() * 2
    assert sliced["encoder.downsamples.0.residual.0.gamma"].shape == (16,)
