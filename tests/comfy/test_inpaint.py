"""Inpainting: what the prompt does inside of a mask, and that nothing happens outside."""

import numpy as np
import pytest
import torch
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

from nano_training.judge import read_thing, read_two
from nano_training.scenes import Scene, Thing, draw
from parity import assert_close, relative_error

COLOURS = [
    ("red", "blue", "green"), ("yellow", "purple", "red"), ("green", "black", "orange"),
    ("cyan", "red", "yellow"), ("pink", "green", "blue"), ("orange", "blue", "purple"),
]  # fmt: skip


@pytest.fixture(scope="module")
def nano(run):
    return run("K2Loader", model="krea2-nano (built in)")


@pytest.fixture(scope="module")
def paint(run, nano):
    model, clip, vae = nano

    def call(latent, prompt, **options):
        texts = run("K2TextEncode", clip=clip, prompt=prompt, negative="")
        samples = run("K2Sampler", model=model, positive=texts[0], negative=texts[1],
                      latent=latent, **options)[0]  # fmt: skip
        return run("K2VAEDecode", samples=samples, vae=vae)[0]

    return call


@pytest.fixture
def tiny_vae(models, run):
    return run("K2VAELoader", file="qwen_image_vae_tiny.safetensors")[0]


def picture(left, right=None, width=128, height=128, background="white"):
    things = (Thing("circle", left, "left"), Thing("square", right, "right")) if right else (
        Thing("circle", left),
    )  # fmt: skip
    return torch.from_numpy(draw(Scene(things, background), width, height))[None]


def eight_bit(image):
    return (image * 255).round().to(torch.uint8)


# krea2-nano follows the prompt in 12 of these 12; what was there before is in none.
@pytest.mark.parametrize("options", [{"soft": False, "grow": 0}, {"grow": 0, "feather": 8}])
def test_inside_the_prompt_is_followed_and_outside_nothing_changes(run, nano, paint, options):
    """The right one of two things becomes a star in another colour."""
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 66:] = 1
    right = 0
    for seed, (kept, before, after) in enumerate(COLOURS):
        original = picture(kept, before)
        latent, used = run("K2Inpaint", vae=nano[2], image=original, mask=mask, **options)
        prompt = f"a {kept} circle on the left and a {after} star on the right"
        painted = paint(latent, prompt, seed=seed)
        result = run("K2Composite", original=original, painted=painted, mask=used, feather=4)[0]
        outside = used == 0
        assert torch.equal(result[outside], original[outside])
        change = (eight_bit(result).int() - eight_bit(original).int()).abs()
        assert change[outside].max() == 0 and change[~outside].max() > 50
        first, second = read_two(result[0].numpy(), side_by_side=True)
        assert (first.colour, first.shape) == (kept, "circle")
        assert second is None or second.colour != before
        right += second is not None and (second.colour, second.shape) == (after, "star")
    assert right >= 5


def test_defaults_and_any_size(run, nano, paint):
    """125 x 122 px: continued to 128 x 128 for the model, and cut again."""
    original = picture("red", "blue", 125, 122)
    mask = torch.zeros(1, 122, 125)
    mask[:, 25:98, 73:] = 1
    latent, used = run("K2Inpaint", vae=nano[2], image=original, mask=mask)
    assert latent["samples"].shape == (1, 16, 1, 16, 16)
    assert used.shape == (1, 122, 125) and used[:, :, :57].eq(0).all()
    painted = paint(latent, "a red circle on the left and a green star on the right", seed=2)
    result = run("K2Composite", original=original, painted=painted, mask=used)[0]
    assert torch.equal(result[used == 0], original[used == 0])
    assert read_two(result[0].numpy(), side_by_side=True)[1].colour == "green"


def test_outpaint_keeps_the_original_to_the_bit(run, nano, paint):
    for seed, (kept, _, new) in enumerate(COLOURS[:3]):
        original = picture(kept, width=80, height=96)
        for feather in (0, 8):
            larger, mask = run("K2Outpaint", image=original, right=72, feather=feather)
            assert larger.shape == (1, 96, 160, 3)
            latent, used = run("K2Inpaint", vae=nano[2], image=larger, mask=mask, grow=0, feather=0)
            prompt = f"a {kept} circle on the left and a {new} star on the right"
            painted = paint(latent, prompt, seed=seed)
            result = run(
                "K2Composite", original=larger, painted=painted, mask=used, feather=feather // 2
            )[0]
            kept_width = 80 - feather
            assert torch.equal(result[:, :, :kept_width], original[:, :, :kept_width])
            first, second = read_two(result[0].numpy(), side_by_side=True)
            assert (first.colour, second.colour) == (kept, new)


def test_outpaint_by_default_changes_24_pixels_of_the_original(run, tiny_vae):
    original = torch.rand(1, 64, 64, 3)
    larger, mask = run("K2Outpaint", image=original)
    _, used = run("K2Inpaint", vae=tiny_vae, image=larger, mask=mask)
    painted = torch.rand(larger.shape)
    result = run("K2Composite", original=larger, painted=painted, mask=used)[0]
    assert result.shape == (1, 64, 320, 3)
    changed = (result[:, :, :64] != original).any(dim=-1).any(dim=-2)[0]
    assert changed.tolist() == [False] * 40 + [True] * 24
    assert torch.equal(result[:, :, 64:], painted[:, :, 64:]), "and nothing of what went on shows"


def test_a_crop_is_painted_and_put_back(run, nano, paint):
    """A small part of a large image; the model sees that part alone, at 128 px."""
    original = picture("red", width=512, height=384)
    mask = torch.zeros(1, 384, 512)
    mask[:, 20:100, 400:480] = 1
    part, part_mask, stitch = run(
        "K2CropForInpaint", image=original, mask=mask, megapixels=128**2 / 1024**2
    )
    assert part.shape == (1, 128, 128, 3)
    latent, used = run("K2Inpaint", vae=nano[2], image=part, mask=part_mask, grow=0, soft=False)
    painted = paint(latent, "a blue star", seed=1)
    result = run("K2Stitch", stitch=stitch, painted=painted, feather=2)[0]
    assert torch.equal(result[mask == 0], original[mask == 0])
    found = read_thing(result[0, :120, 380:500].numpy())
    assert (found.colour, found.shape) == ("blue", "star")
    # With the sampler's mask it is the part that counts, grown or not.
    by_used = run("K2Stitch", stitch=stitch, painted=painted, mask=used, feather=2)[0]
    assert (by_used - result).abs().mean() < 1e-3


def test_a_soft_mask_does_what_denoise_does(run, turbo, conditioning):
    """All of it masked by 0.5, in eight steps: the four steps of denoise 0.5."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(1, 16, 1, 16, 24, generator=generator)
    inputs = {"model": turbo, "positive": conditioning(6, 1), "seed": 5, "preset": "custom",
              "guidance": 0.0}  # fmt: skip
    half = {"samples": image, "noise_mask": torch.full((1, 1, 1, 16, 24), 0.5),
            "krea2_soft_mask": True}  # fmt: skip
    masked = run("K2Sampler", latent=half, steps=8, **inputs)[0]["samples"]
    whole = {"samples": image}
    by_denoise = run("K2Sampler", latent=whole, steps=4, denoise=0.5, **inputs)[0]["samples"]
    assert_close(masked, by_denoise, 1e-5, "a mask of 0.5 against denoise 0.5")
    # And relative to denoise: half of 0.8.
    masked = run("K2Sampler", latent=half, steps=8, denoise=0.8, **inputs)[0]["samples"]
    by_denoise = run("K2Sampler", latent=whole, steps=4, denoise=0.4, **inputs)[0]["samples"]
    assert_close(masked, by_denoise, 1e-5, "a mask of 0.5 in denoise 0.8 against denoise 0.4")


def test_a_soft_mask_lies_between_nothing_and_all(run, nano, paint):
    """In pictures: masked by 0, 0.3, 0.45 and 1."""
    original = picture("red", "blue")
    changes = []
    for value in (0.3, 0.45, 1.0):
        mask = torch.full((1, 128, 128), value)
        latent, used = run("K2Inpaint", vae=nano[2], image=original, mask=mask, grow=0, feather=0)
        painted = paint(latent, "a green star on a yellow background", seed=1)
        result = run("K2Composite", original=original, painted=painted, mask=used)[0]
        changes.append((result - original).abs().mean().item())
    assert 3 * changes[0] < changes[1] and 1.3 * changes[1] < changes[2]


def random_masks(*shape):
    """None lies at a step of eight, where rounding would decide."""
    generator = torch.Generator().manual_seed(9)
    return torch.rand(*shape, generator=generator).mul(8).floor().add(0.5).div(8)


@pytest.mark.parametrize("batch", [1, 3])
def test_cores_differential_diffusion_agrees_where_it_counts_in_sigma(
    run, pack, turbo, conditioning, batch
):
    """Core compares a mask with sigma, ours with the time before the shift."""
    image = torch.randn(batch, 16, 1, 16, 24, generator=torch.Generator().manual_seed(3))
    mask = random_masks(batch, 1, 1, 16, 24)
    text = conditioning(6, 1)
    latent = {"samples": image, "noise_mask": mask, "krea2_soft_mask": True}
    ours = run("K2Sampler", model=turbo, positive=text, latent=latent, seed=5)[0]["samples"]
    model = run("K2ModelSampling", model=turbo, width=192, height=128)[0]
    (model,) = DifferentialDiffusion.execute(model).result
    shift_time = pack("krea2_model.schedule").shift_time
    in_sigma = mask.clone().apply_(lambda time: shift_time(time, 1.15))

    def stock(noise_mask):
        return run(
            "KSampler", model=model, seed=5, steps=8, cfg=1.0, positive=text, negative=text,
            sampler_name="euler", scheduler="simple", denoise=1.0,
            latent_image={"samples": image, "noise_mask": noise_mask},
        )[0]["samples"]  # fmt: skip

    assert_close(stock(in_sigma), ours, 1e-4, "core's Differential Diffusion, its mask in sigma")
    assert relative_error(stock(mask), ours) > 1e-2, "the same mask is another to core"
    # On our sampler, core's node has its way.
    (patched,) = DifferentialDiffusion.execute(turbo).result
    latent["noise_mask"] = in_sigma
    core = run("K2Sampler", model=patched, positive=text, latent=latent, seed=5)[0]["samples"]
    assert_close(core, ours, 1e-4, "Differential Diffusion on Krea 2 Sampler")


@pytest.mark.parametrize("made", ["hard", "soft", "by core"])
def test_each_image_of_a_batch_has_its_own_mask(run, turbo, tiny_vae, conditioning, made):
    """Also by core's Set Latent Noise Mask, whose masks core's samplers take for frames of one."""
    images, masks = torch.rand(2, 64, 64, 3), torch.zeros(2, 64, 64)
    masks[0, :32] = 1
    masks[1, :, 40:] = 1
    if made == "by core":
        latent = run("K2VAEEncode", pixels=images, vae=tiny_vae)[0]
        (latent,) = run("SetLatentNoiseMask", samples=latent, mask=masks)
        cells = masks[:, ::8, ::8]
    else:
        latent, _ = run(
            "K2Inpaint",
            vae=tiny_vae,
            image=images,
            mask=masks,
            grow=0,
            feather=0,
            soft=made == "soft",
        )
        cells = latent["noise_mask"][:, 0, 0]
    assert torch.equal(cells, masks[:, ::8, ::8])
    before = latent["samples"]
    after = run("K2Sampler", model=turbo, positive=conditioning(4, 1), latent=latent)[0]["samples"]
    kept = (cells == 0)[:, None, None].expand_as(before)
    assert torch.allclose(after[kept], before[kept], atol=1e-5)
    assert (after - before)[~kept].abs().min() > 0 and (after - before)[~kept].std() > 0.1
    stock = run(
        "KSampler", model=turbo, seed=0, steps=8, cfg=1.0, positive=conditioning(4, 1),
        negative=conditioning(4, 1), sampler_name="euler", scheduler="simple", denoise=1.0,
        latent_image=latent,
    )[0]["samples"]  # fmt: skip
    if made == "by core":
        assert (stock - before)[kept].std() > 0.1
    else:
        assert_close(stock, after, 1e-4, "a batch of masks on KSampler")


def test_many_seeds_of_one_inpainting(run, turbo, tiny_vae, conditioning):
    """Core's Repeat Latent Batch keeps mask and softness."""
    image, mask = torch.rand(1, 32, 32, 3), torch.zeros(1, 32, 32)
    mask[:, :16] = 1
    latent, used = run("K2Inpaint", vae=tiny_vae, image=image, mask=mask, grow=0, feather=0)
    (latent,) = run("RepeatLatentBatch", samples=latent, amount=3)
    samples = run("K2Sampler", model=turbo, positive=conditioning(4, 1), latent=latent)[0]
    painted = run("K2VAEDecode", samples=samples, vae=tiny_vae)[0]
    result = run("K2Composite", original=image, painted=painted, mask=used, feather=0)[0]
    assert result.shape == (3, 32, 32, 3) and not torch.equal(result[0], result[1])
    assert torch.equal(result[:, 16:], image[:, 16:].expand(3, -1, -1, -1))


@pytest.mark.parametrize("fill", ["original", "grey", "surroundings"])
def test_fill_is_what_is_encoded(run, tiny_vae, fill):
    image, mask = torch.rand(1, 32, 32, 3), torch.zeros(1, 32, 32)
    mask[:, :, :16] = 1
    options = {"vae": tiny_vae, "mask": mask, "grow": 0, "feather": 0, "fill": fill}
    latent, _ = run("K2Inpaint", image=image, **options)
    other = torch.cat([torch.rand(1, 32, 16, 3), image[:, :, 16:]], dim=2)
    same = torch.equal(run("K2Inpaint", image=other, **options)[0]["samples"], latent["samples"])
    assert same == (fill != "original")


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 40, 24, 4), (1, 40, 24, 1), (2, 40, 24, 3)])
def test_odd_images(run, models, tiny_vae, shape):
    """One pixel, alpha, grey and a batch; our VAE and core's, which takes a batch for a film."""
    mask = torch.ones(1, *shape[1:3])
    core = run("VAELoader", vae_name="qwen_image_vae_tiny.safetensors")[0]
    image = torch.rand(shape)
    ours, theirs = (
        run("K2Inpaint", vae=vae, image=image, mask=mask)[0]["samples"] for vae in (tiny_vae, core)
    )
    assert len(ours) == len(image) and ours.shape[-2] % 2 == ours.shape[-1] % 2 == 0
    assert_close(ours, theirs, 1e-4, f"K2Inpaint {shape} with core's VAE")


def test_what_cannot_be_inpainted_is_named(run, tiny_vae, turbo, raw, conditioning):
    image = torch.rand(1, 64, 96, 3)
    with pytest.raises(ValueError, match="The mask is empty"):
        run("K2Inpaint", vae=tiny_vae, image=image, mask=torch.zeros(1, 64, 96))
    with pytest.raises(ValueError, match="mask is 64"):
        run("K2Inpaint", vae=tiny_vae, image=image, mask=torch.ones(1, 64, 64))
    with pytest.raises(ValueError, match="vae is empty"):
        run("K2Inpaint", vae=None, image=image, mask=torch.ones(1, 64, 96))
    with pytest.raises(ValueError, match="painted image is 96"):
        run("K2Composite", original=image, painted=torch.rand(1, 96, 96, 3),
            mask=torch.ones(1, 64, 96))  # fmt: skip
    with pytest.raises(ValueError, match="left, top, right"):
        run("K2Outpaint", image=image, right=0)
    latent, _ = run("K2Inpaint", vae=tiny_vae, image=image, mask=torch.ones(1, 64, 96))
    with pytest.raises(ValueError, match="The latent has a mask"):
        run("K2TwoStage", raw=raw, turbo=turbo, positive=conditioning(4, 1),
            negative=conditioning(4, 1), latent=latent)  # fmt: skip


def test_inverted_and_full_masks(run, tiny_vae):
    image, mask = torch.rand(1, 64, 64, 3), torch.zeros(1, 64, 64)
    mask[:, 16:32, 16:32] = 1
    options = {"vae": tiny_vae, "image": image, "grow": 0, "feather": 0}
    there = run("K2Inpaint", mask=mask, **options)[0]["noise_mask"]
    elsewhere = run("K2Inpaint", mask=1 - mask, **options)[0]["noise_mask"]
    assert torch.equal(there + elsewhere, torch.ones_like(there))
    everything, used = run("K2Inpaint", mask=torch.ones(1, 64, 64), **options)
    assert everything["noise_mask"].all() and used.all()
    painted = torch.rand(1, 64, 64, 3)
    assert np.array_equal(
        run("K2Composite", original=image, painted=painted, mask=used)[0], painted
    )
