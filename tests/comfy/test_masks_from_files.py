"""Masks as ComfyUI's own nodes give them: the same picture and hole in many files, one result."""

import numpy as np
import pytest
import torch
from comfy_extras.nodes_mask import GrowMask, InvertMask
from PIL import Image

# Of `hole`: what Krea 2 Inpaint with feather 4 is to paint, in cells of 8 x 8 pixels.
SHARE = "21%"


def hole(width=128, height=128):
    """A picture with a hole, (H, W, 4) in 8 bits: a disc of 50 pixels that is transparent."""
    rows, columns = np.mgrid[:height, :width]
    inside = (rows - height // 2) ** 2 + (columns - width // 2) ** 2 < 25**2
    pixels = np.full((height, width, 4), (230, 200, 40, 255), np.uint8)
    pixels[:, : width // 3, :3] = (30, 60, 200)
    pixels[inside, 3] = 0
    return Image.fromarray(pixels), inside


def grey_alpha(image):
    return image.convert("LA")


FILES = {
    "hole.png": lambda image, path: image.save(path),
    "hole.webp": lambda image, path: image.save(path, lossless=True, exact=True),
    "hole_lossy.webp": lambda image, path: image.save(path, quality=90, exact=True),
    "hole.gif": lambda image, path: image.save(path),
    "hole_grey_alpha.png": lambda image, path: grey_alpha(image).save(path),
    "hole_palette.png": lambda image, path: image.convert("P").save(path),
}


@pytest.fixture(scope="module")
def folder(base):
    image, _ = hole()
    for name, write in FILES.items():
        write(image, base / "input" / name)
    # A mask as a picture of its own: white where it is painted, as JPEG with its ringing.
    mask = Image.fromarray(255 - np.asarray(image.getchannel("A")))
    mask.save(base / "input" / "mask.jpg", quality=60)
    mask.resize((384, 384), Image.Resampling.LANCZOS).save(base / "input" / "mask_large.png")
    return base / "input"


@pytest.fixture(scope="module")
def nano(run):
    return run("K2Loader", model="krea2-nano (built in)")


@pytest.fixture(scope="module")
def inpaint(run, pack, nano):
    """Through Inpaint, Sampler, decode and Composite: report, original, result, latent."""
    node = pack("nodes.inpaint").K2Inpaint
    texts = run("K2TextEncode", clip=nano[1], prompt="a red star on a white background")

    def call(image, mask, **options):
        options = {"grow": 0, "feather": 4} | options
        output = node.execute(vae=nano[2], image=image, mask=mask, **options)
        latent, used = output.result
        samples = run("K2Sampler", model=nano[0], positive=texts[0], negative=texts[1],
                      latent=latent, seed=1)[0]  # fmt: skip
        painted = run("K2VAEDecode", samples=samples, vae=nano[2])[0]
        result = run("K2Composite", original=image, painted=painted, mask=used)[0]
        return output.ui.as_dict()["text"][0], result, latent

    return call


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_hole_is_that_hole(run, inpaint, folder, name):
    image, mask = run("LoadImage", image=name)
    report, result, latent = inpaint(image, mask)
    assert f"{SHARE} to repaint" in report
    _, inside = hole()
    # The feather reaches 4 pixels beyond.
    near = GrowMask.execute(torch.from_numpy(inside)[None].float(), 6, True).result[0][0] > 0
    changed = (result - image).abs().amax(dim=-1)[0] > 0
    assert not changed[~near].any() and changed[torch.from_numpy(inside)].float().mean() > 0.9
    assert latent["noise_mask"].unique()[0] == 0


def masks(run):
    """Name, and a mask of the same hole, of further nodes that make them."""
    _, webp = run("LoadImage", image="hole.webp")
    _, grey = run("LoadImage", image="hole_grey_alpha.png")
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(webp.shape, generator=generator) * 0.03
    yield (
        "Load Image (as Mask), alpha",
        run("LoadImageMask", image="hole_grey_alpha.png", channel="alpha")[0],
    )
    yield "a JPEG by its red", run("LoadImageMask", image="mask.jpg", channel="red")[0]
    yield (
        "three times as large, with ringing",
        run("LoadImageMask", image="mask_large.png", channel="red")[0],
    )
    yield "inverted twice", InvertMask.execute(InvertMask.execute(grey).result[0]).result[0]
    yield "grown by nothing", GrowMask.execute(webp, 0, True).result[0]
    yield "a matte with a floor of noise", (webp.round() + noise * (1 - 2 * webp.round())).abs()
    yield "half precision", grey.half()


def test_every_source_of_a_mask_is_that_mask(run, inpaint, folder):
    image, plain = run("LoadImage", image="hole.png")
    _, expected, _ = inpaint(image, plain)
    for name, mask in masks(run):
        report, result, _ = inpaint(image, mask)
        share = int(report.split("%")[0].split()[-1])
        assert abs(share - int(SHARE[:-1])) <= 2, name
        # A scaled edge may lie a pixel beside the other.
        assert (result != expected).any(dim=-1).float().mean() < 0.15, name
        far = (result != image).any(dim=-1)[0]
        far[128 // 2 - 34 : 128 // 2 + 34, 128 // 2 - 34 : 128 // 2 + 34] = False
        assert not far.any(), name


def test_a_crop_lies_around_the_hole(run, pack, folder):
    for name in FILES:
        image, mask = run("LoadImage", image=name)
        _, _, stitch = run("K2CropForInpaint", image=image, mask=mask, megapixels=0.0)
        assert stitch.boxes[0].width <= 80, name


@pytest.mark.parametrize("size", [(128, 128), (96, 64), (64, 160), (77, 200)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_nobody_painted_a_mask(run, folder, models, size, mode, suffix):
    """Of every shape and file: Load Image gives 64 x 64 zeros, or 4.58e-5, or 0.0039."""
    Image.new("RGB", size, (90, 30, 200)).convert(mode).save(folder / f"opaque.{suffix}")
    image, mask = run("LoadImage", image=f"opaque.{suffix}")
    vae = run("K2VAELoader", file="qwen_image_vae_tiny.safetensors")[0]
    painted = torch.rand(image.shape)
    for node, inputs in (
        ("K2Inpaint", {"vae": vae, "image": image}),
        ("K2CropForInpaint", {"image": image}),
        ("K2Composite", {"original": image, "painted": painted}),
    ):
        with pytest.raises(ValueError, match="^The mask is empty"):
            run(node, mask=mask, **inputs)
    # Where a mask is optional, there is none.
    _, fitted, _, _ = run("K2FitImage", image=image, mask=mask, megapixels=0.0)
    assert not fitted.any()


def test_a_latent_of_which_nothing_is_painted(run, turbo, conditioning, latent):
    text = conditioning(6, 1)
    for value in (0.0, 4.58e-5, 1 / 255):
        masked = latent | {"noise_mask": torch.full((1, 64, 64), value)}
        with pytest.raises(ValueError, match="The mask is empty"):
            run("K2Sampler", model=turbo, positive=text, latent=masked)


def test_a_stitch_of_which_nothing_is_painted(run):
    image, mask = torch.rand(1, 96, 96, 3), torch.zeros(1, 96, 96)
    mask[:, 40:60, 40:60] = 1
    part, _, stitch = run("K2CropForInpaint", image=image, mask=mask)
    with pytest.raises(ValueError, match="The mask is empty"):
        run("K2Stitch", stitch=stitch, painted=part, mask=torch.zeros(1, 64, 64))


def test_soft_is_off_and_the_mask_faint(run, models):
    vae = run("K2VAELoader", file="qwen_image_vae_tiny.safetensors")[0]
    with pytest.raises(
        ValueError, match=r"masked by half or more \(at most 0.40\), and soft is off"
    ):
        run("K2Inpaint", vae=vae, image=torch.rand(1, 64, 64, 3), mask=torch.full((1, 64, 64), 0.4),
            soft=False)  # fmt: skip
