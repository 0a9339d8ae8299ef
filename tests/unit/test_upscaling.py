"""The second stage: sizes, schedule, tiles, and what is refused."""

import pytest
import torch

from krea2_model.config import RAW, TURBO
from krea2_model.features.upscaling import Upscale, check_stages, enlarge_latents
from krea2_model.schedule import resolve_mu, shift_time


def test_sizes_are_whole_tokens():
    assert Upscale(2.0).size(1024, 768) == (2048, 1536)
    assert Upscale(1.5).size(1000, 700) == (1504, 1056)
    with pytest.raises(ValueError, match="at most 16384 a side. Lower the scale"):
        Upscale(8.0).size(4096, 4096)
    with pytest.raises(ValueError, match="expected a larger image"):
        Upscale(1.01).size(64, 64)


def test_auto_takes_tiles_beyond_what_the_checkpoint_paints():
    assert Upscale(2.0).tiles(2048, 2048, TURBO) is None
    assert Upscale(2.0).tiles(2064, 2048, TURBO).size == 1024
    assert Upscale(2.0, parts="tiles", tile=512).tiles(1024, 1024, TURBO).size == 512
    assert Upscale(4.0, parts="whole").tiles(4096, 4096, TURBO) is None


@pytest.mark.parametrize("preset", [RAW, TURBO])
def test_the_run_begins_at_its_sigma_at_every_size(preset):
    for width, height in ((2048, 2048), (4096, 2048)):
        sigmas = Upscale(2.0, sigma=0.4).sigmas(width, height, preset)
        assert sigmas[0] == pytest.approx(0.4) and sigmas[-1] == 0
        # As dense as the preset's schedule, and 4 steps at least.
        mu = Upscale(2.0).mu(width, height, preset)
        mean = shift_time(1 / preset.steps, mu)
        assert len(sigmas) - 1 == 4 or sigmas[-2] <= mean


def test_the_shift_is_that_of_what_the_model_sees():
    assert Upscale(2.0).mu(2048, 2048, RAW) == resolve_mu(RAW, 128 * 128)
    assert Upscale(4.0).mu(4096, 4096, RAW) == resolve_mu(RAW, 64 * 64)


def test_latents_keep_their_frame_axis_and_layout():
    row = torch.linspace(0, 1, 8).expand(2, 3, 1, 6, 8)
    larger = enlarge_latents(row, 128, 96)
    assert larger.shape == (2, 3, 1, 12, 16)
    torch.testing.assert_close(larger[0, 0, 0, 5, 7:9].mean(), row[0, 0, 0, 0].mean())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 1}, "scale is 1; expected above 1"),
        ({"scale": 9.0}, "to 8"),
        ({"sigma": 0}, "sigma is 0; expected above 0"),
        ({"sigma": 1.5}, "sigma is 1.5"),
        ({"method": "magic"}, "method is 'magic'; expected one of pixels, latent"),
        ({"parts": "half"}, "parts is 'half'"),
        ({"steps": 0.5}, "steps is 0.5"),
        ({"tile": 40}, "size is 40"),
        ({"overlap": 0.51}, "overlap of tiles is 0.51"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Upscale(**options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((Upscale(), None, None, ("image", 1, "mask")), "upscale and inpaint do not go together"),
        ((None, None, None, ("image", 0, None)), "denoise is 0, which changes nothing"),
        ((Upscale(), None, None, (None, 0, None)), "it needs start_image and upscale"),
        ((None, 512, None, (None, 1, None)), "tiles"),
        ((None, None, "yarn", (None, 1, None)), "rotary"),
    ],
)
def test_stages_that_do_not_go_together_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        check_stages(*arguments)
