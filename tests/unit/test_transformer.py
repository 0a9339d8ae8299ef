"""The transformer against diffusers' Krea2Transformer2DModel, in float32 on random weights."""

import pytest
import torch
from diffusers import Krea2Transformer2DModel

from diffusers_reference import (
    TINY,
    diffusers_arguments,
    load_from,
    run_reference,
)
from krea2_model.checkpoints.transformer_keys import (
    diffusers_to_official,
    infer_transformer_config,
    module_to_official,
    official_to_diffusers,
    official_to_module,
)
from krea2_model.config import TransformerConfig
from krea2_model.transformer.model import Krea2Transformer
from parity import assert_close, relative_error


@pytest.fixture(scope="module")
def transformer(reference_transformer):
    model = Krea2Transformer(TINY)
    load_from(model, reference_transformer)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(8, 8), (6, 14), (20, 4)])
def test_equals_diffusers(reference_transformer, transformer, height, width):
    latents, taps = torch.randn(1, 16, height, width), torch.randn(1, 7, 12, 80)
    timestep = torch.tensor([0.37])
    velocity = transformer(latents, timestep, transformer.fuse_text(taps))
    expected = run_reference(reference_transformer, latents, timestep, taps)
    assert_close(velocity, expected, 1e-5, f"transformer {height}x{width} against diffusers")


@torch.no_grad()
def test_batch_with_masks_equals_diffusers(reference_transformer, transformer):
    """Two texts of different length, padded in the middle as the official layout pads."""
    latents, taps = torch.randn(2, 16, 6, 10), torch.randn(2, 9, 12, 80)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 3:6] = False
    timestep = torch.tensor([0.9, 0.2])
    velocity = transformer(latents, timestep, transformer.fuse_text(taps, mask), mask)
    expected = run_reference(reference_transformer, latents, timestep, taps, mask)
    assert_close(velocity, expected, 1e-5, "transformer, masked batch, against diffusers")


@torch.no_grad()
def test_masked_tokens_do_not_matter(transformer):
    latents, taps = torch.randn(1, 16, 4, 4), torch.randn(1, 6, 12, 80)
    timestep = torch.tensor([0.5])
    mask = torch.tensor([[True, True, False, False, True, True]])
    padded = transformer(latents, timestep, transformer.fuse_text(taps, mask), mask)
    unpadded = transformer(latents, timestep, transformer.fuse_text(taps[mask][None]))
    assert_close(padded, unpadded, 1e-5, "padded against unpadded text")


@torch.no_grad()
def test_odd_latents_are_padded_by_repetition(transformer):
    """The opposite edge must not leak in: only the nearest row and column are repeated."""
    latents = torch.randn(1, 16, 5, 7)
    text, timestep = transformer.fuse_text(torch.randn(1, 4, 12, 80)), torch.tensor([0.5])
    repeated = torch.cat((latents, latents[:, :, -1:]), dim=2)
    repeated = torch.cat((repeated, repeated[..., -1:]), dim=3)
    velocity = transformer(latents, timestep, text)
    assert velocity.shape == latents.shape
    assert torch.equal(velocity, transformer(repeated, timestep, text)[..., :5, :7])


@torch.no_grad()
def test_references_change_only_through_attention(transformer):
    latents, reference = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 6, 4)
    text, timestep = transformer.fuse_text(torch.randn(1, 4, 12, 80)), torch.tensor([0.5])
    alone = transformer(latents, timestep, text)
    by_method = [
        transformer(latents, timestep, text, references=[reference], reference_method=method)
        for method in ("index_timestep_zero", "index")
    ]
    assert all(velocity.shape == latents.shape for velocity in by_method)
    assert relative_error(by_method[0], alone) > 1e-3
    assert relative_error(by_method[0], by_method[1]) > 1e-3
    # At time zero both methods modulate the reference alike.
    zero = torch.zeros(1)
    first, second = (
        transformer(latents, zero, text, references=[reference], reference_method=method)
        for method in ("index_timestep_zero", "index")
    )
    assert relative_error(first, second) < 1e-5


@torch.no_grad()
def test_bfloat16_is_no_further_from_float32_than_diffusers(reference_transformer, transformer):
    latents, taps = torch.randn(2, 16, 16, 16), torch.randn(2, 12, 12, 80)
    timestep = torch.tensor([0.8, 0.3])
    expected = run_reference(reference_transformer, latents, timestep, taps)

    theirs = Krea2Transformer2DModel(**diffusers_arguments(TINY)).eval()
    theirs.load_state_dict(reference_transformer.state_dict())
    for name, parameter in theirs.named_parameters():
        if not any(f"{norm}.weight" in name for norm in theirs._keep_in_fp32_modules):
            parameter.data = parameter.data.to(torch.bfloat16)
    ours = Krea2Transformer(TINY).eval()
    load_from(ours, reference_transformer)
    for name, parameter in ours.named_parameters():
        if not module_to_official(name).endswith((".scale", ".lin")):
            parameter.data = parameter.data.to(torch.bfloat16)

    cast = (latents.bfloat16(), timestep, taps.bfloat16())
    error_theirs = (run_reference(theirs, *cast).float() - expected).pow(2).mean()
    error_ours = (ours(latents, timestep, ours.fuse_text(taps)).float() - expected).pow(2).mean()
    assert 0 < error_ours <= error_theirs


def test_gradients_reach_every_weight(reference_transformer):
    model = Krea2Transformer(TINY)
    load_from(model, reference_transformer)
    text = model.fuse_text(torch.randn(1, 3, 12, 80))
    model(torch.randn(1, 16, 4, 4), torch.tensor([0.4]), text).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_training_works_after_inference_mode(reference_transformer):
    """What a run leaves behind must not be an inference tensor."""
    model = Krea2Transformer(TINY)
    load_from(model, reference_transformer)
    latents, taps = torch.randn(1, 16, 4, 4), torch.randn(1, 3, 12, 80)
    with torch.inference_mode():
        model(latents, torch.tensor([0.4]), model.fuse_text(taps))
    text = model.fuse_text(taps)
    model(latents, torch.tensor([0.4]), text).square().mean().backward()
    assert model.blocks[0].attn.wq.weight.grad is not None


@torch.no_grad()
def test_rotary_tables_are_made_once_a_text_length(transformer, monkeypatch):
    import krea2_model.transformer.model as module

    made, rope_table = [], module.rope_table
    monkeypatch.setattr(module, "rope_table", lambda *a: made.append(1) or rope_table(*a))
    latents, timestep = torch.randn(1, 16, 4, 10), torch.tensor([0.4])
    texts = [transformer.fuse_text(torch.randn(1, length, 12, 80)) for length in (5, 2)]
    for _ in range(3):
        for text in texts:
            transformer(latents, timestep, text)
    assert len(made) == 2


def test_full_size_keys_translate_both_ways():
    with torch.device("meta"):
        theirs = Krea2Transformer2DModel().state_dict()
        ours = Krea2Transformer(TransformerConfig()).state_dict()
    officials = {name: diffusers_to_official(name) for name in theirs}
    assert {official_to_module(name) for name in officials.values()} == set(ours)
    assert all(official_to_diffusers(off) == name for name, off in officials.items())
    assert all(module_to_official(official_to_module(n)) == n for n in officials.values())
    assert sum(t.numel() for t in ours.values()) == 12_820_073_036


@pytest.mark.parametrize("config", [TINY, TransformerConfig()])
def test_sizes_are_read_off_tensors(config):
    with torch.device("meta"):
        state = Krea2Transformer(config).state_dict()
    shapes = {module_to_official(name): tuple(t.shape) for name, t in state.items()}
    assert infer_transformer_config(shapes) == config


@pytest.mark.parametrize("shape", [(1, 8, 4, 4), (16, 4, 4), (1, 16, 1, 4, 4)])
def test_wrong_latents_are_refused(transformer, shape):
    text = transformer.fuse_text(torch.randn(1, 3, 12, 80))
    with pytest.raises(ValueError, match="Latents have shape .* needs"):
        transformer(torch.randn(shape), torch.tensor([0.5]), text)


@pytest.mark.parametrize("shape", [(1, 3, 80), (1, 3, 12, 64), (1, 3, 11, 80)])
def test_wrong_taps_are_refused(transformer, shape):
    with pytest.raises(ValueError, match="12 tapped layers .* width 80"):
        transformer.fuse_text(torch.randn(shape))
