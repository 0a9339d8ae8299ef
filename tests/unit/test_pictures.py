"""Pictures of every kind that Pillow opens, from memory and from files."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from krea2_model.images.pictures import pixels_of, reference_pixels

RAMP = np.linspace(0, 1, 96, dtype=np.float32)[None].repeat(64, axis=0)


def saved(image, path, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_of_grey_keep_their_range(tmp_path, dtype, suffix):
    values = (RAMP * 65535).round().astype(dtype)
    image = Image.fromarray(values) if dtype == "<u2" else Image.frombytes(
        "I;16B", (96, 64), values.tobytes()
    )  # fmt: skip
    expected = torch.from_numpy(RAMP).expand(3, -1, -1)
    assert torch.allclose(pixels_of(image, "picture"), expected, atol=1e-4)
    if dtype == "<u2":
        path = saved(image, tmp_path / f"ramp.{suffix}")
        for given in (path, Image.open(path)):
            assert torch.allclose(pixels_of(given, "picture"), expected, atol=1e-4)


def test_16_bits_of_grey_with_a_transparent_value(tmp_path):
    values = np.full((4, 6), 1000, np.uint16)
    values[:, :2] = 0
    path = saved(Image.fromarray(values), tmp_path / "grey.png", transparency=0)
    assert Image.open(path).info["transparency"] == 0
    pixels = pixels_of(path, "picture")
    assert pixels[:, :, :2].eq(1).all() and torch.allclose(
        pixels[:, :, 2:], torch.tensor(1e3 / 65535)
    )


def test_floating_point_numbers_are_right_or_refused():
    assert torch.allclose(pixels_of(Image.fromarray(RAMP), "picture")[0], torch.from_numpy(RAMP))
    for values in (RAMP * 255, RAMP - 2, RAMP * 1e30):
        with pytest.raises(ValueError, match=r"picture has values from .* \(mode F\); expected 0"):
            pixels_of(Image.fromarray(values), "picture")
    for values in (RAMP * np.nan, RAMP + np.inf):
        with pytest.raises(ValueError, match="picture has NaN or infinite values"):
            pixels_of(Image.fromarray(values), "picture")
    for tensor in (torch.full((3, 4, 4), 200.0), torch.randn(3, 40, 40), torch.full((3, 2, 2), 7)):
        with pytest.raises(ValueError, match="picture has values from"):
            pixels_of(tensor, "picture")


def test_32_bit_integers_are_refused(tmp_path):
    image = Image.fromarray((RAMP * 2**31 * 0.99).astype(np.int32))
    for given in (image, saved(image, tmp_path / "ramp.tiff")):
        with pytest.raises(ValueError, match="picture.* holds 32-bit integers.*8 or 16 bits"):
            pixels_of(given, "picture")


def test_bytes_in_a_tensor():
    values = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    assert pixels_of(values, "picture").flatten().tolist() == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_as_its_exif_says(tmp_path, orientation):
    """Whichever way the camera was held: red above blue, 96 x 64."""
    upright = Image.new("RGB", (96, 64), "blue")
    upright.paste("red", (0, 0, 96, 32))
    undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(undone[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x112] = orientation
    path = saved(stored, tmp_path / "photo.png", exif=exif)
    pixels = pixels_of(path, "picture")
    assert pixels.shape == (3, 64, 96)
    assert pixels[:, :32].mean((1, 2)).tolist() == [1, 0, 0]
    assert pixels[:, 32:].mean((1, 2)).tolist() == [0, 0, 1]


COLOUR = (200, 100, 50)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV", "RGBa", "RGBX"])
def test_colours_of_every_mode(mode):
    image = Image.new("RGB", (5, 4), COLOUR)
    image = image.convert("RGBA").convert(mode) if mode == "RGBa" else image.convert(mode)
    found = (pixels_of(image, "picture") * 255).amax((1, 2)).tolist()
    assert found == pytest.approx(COLOUR, abs=4)


@pytest.mark.parametrize("mode", ["L", "LA", "La", "PA", "1"])
def test_greys_of_every_mode(mode):
    image = Image.new("L", (5, 4), 255 if mode == "1" else 100)
    image = image.convert("LA").convert(mode) if mode in ("La", "PA") else image.convert(mode)
    value = 1.0 if mode == "1" else 100 / 255
    assert torch.allclose(pixels_of(image, "picture"), torch.tensor(value), atol=0.01)


def test_transparency_of_every_kind_is_white(tmp_path):
    rgba = Image.new("RGBA", (6, 4), (255, 0, 0, 255))
    rgba.paste((0, 0, 0, 0), (0, 0, 3, 4))
    palette = rgba.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    black = palette.getpixel((0, 0))
    files = {
        "rgba.png": (rgba, {}),
        "grey.png": (rgba.convert("LA"), {}),
        "palette.png": (palette, {"transparency": black}),
        "palette.gif": (palette, {"transparency": black}),
        "lossless.webp": (rgba, {"lossless": True}),
        "colour.png": (rgba.convert("RGB"), {"transparency": (0, 0, 0)}),
    }
    for name, (image, options) in files.items():
        pixels = pixels_of(saved(image, tmp_path / name, **options), "picture")
        assert pixels[:, :, :3].eq(1).all() and pixels[1, :, 3:].max() < 0.5, name
    for image in (rgba.convert("RGBa"), rgba.convert("LA")):
        assert pixels_of(image, "picture")[:, :, :3].eq(1).all()


def claimed_png(width, height):
    """A PNG of a few bytes that says how large it is."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + (chunk(b"IEND", b""))
    )


@pytest.mark.parametrize("limit", [None, Image.MAX_IMAGE_PIXELS])
def test_a_picture_that_claims_to_be_huge_is_refused(tmp_path, monkeypatch, limit):
    """Also where a program took Pillow's own limit away."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    path = tmp_path / "huge.png"
    path.write_bytes(claimed_png(100_000, 100_000))
    with pytest.raises(ValueError, match="picture .*huge.png is too large: .*Make it smaller"):
        pixels_of(path, "picture")


def test_what_is_no_picture_is_refused(tmp_path):
    whole = saved(Image.effect_noise((64, 64), 90), tmp_path / "whole.png").read_bytes()
    files = {
        "text.png": b"not a picture",
        "empty.png": b"",
        "cut.png": whole[: len(whole) // 2],
        "head.png": whole[:30],
        "bent.png": whole[:60] + b"\xff" * 200 + whole[260:],
        "cut.jpg": saved(Image.effect_noise((64, 64), 90), tmp_path / "a.jpg").read_bytes()[:900],
        "cut.gif": saved(Image.effect_noise((64, 64), 90), tmp_path / "a.gif").read_bytes()[:900],
        "cut.webp": saved(Image.effect_noise((64, 64), 90), tmp_path / "a.webp").read_bytes()[:900],
        "cut.tiff": saved(Image.effect_noise((64, 64), 90), tmp_path / "a.tiff").read_bytes()[:900],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"^picture.*{name}.* cannot be read"):
            pixels_of(tmp_path / name, "picture")
    with pytest.raises(ValueError, match="which is not there"):
        pixels_of(tmp_path / "none.png", "picture")
    with pytest.raises(ValueError, match="a folder; expected a picture in it"):
        pixels_of(tmp_path, "picture")
    shapes = (4, 4), (3, 0, 4), (5, 4, 3)
    for given in (None, 5, "fox.png", [1], *map(torch.zeros, shapes)):
        with pytest.raises(ValueError, match="^picture "):
            pixels_of(given, "picture")


@pytest.mark.parametrize("width, height", [(300, 200), (201, 333), (1024, 100), (2000, 1500)])
def test_a_reference_is_cut_and_not_stretched(width, height):
    """A disc stays as wide as high."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    away = ((rows - height / 2) ** 2 + (columns - width / 2) ** 2).sqrt()
    disc = (away < min(width, height) * 0.4).float().expand(3, -1, -1)
    made = reference_pixels(disc, 0.05)
    assert made.shape[1] % 16 == made.shape[2] % 16 == 0
    assert made.shape[1] * made.shape[2] <= max(0.05 * 1024**2, 16 * made.shape[2])
    inside = made[0] > 0.5
    across, down = inside.any(dim=0).sum().item(), inside.any(dim=1).sum().item()
    assert abs(across - down) <= 1
