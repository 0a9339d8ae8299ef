"""Large pictures of krea2-nano: a second stage in tiles shows no seams."""

from benchmarks.nano_large import seams
from krea2_model import Krea2Pipeline, Upscale
from nano_training.judge import seam_step


def test_tiles_leave_no_seams(tokenizer_folder):
    """The step across the tiles' borders is that of the rest of the picture, within 1 of 255."""
    pipeline, upscale = Krea2Pipeline.nano(), Upscale(2)
    prompts = ["a red circle on a white background", "a blue star and a green square on yellow"]
    pictures = pipeline(prompts, seed=[1, 2], upscale=upscale, output_type="np")
    assert pictures.shape[1:3] == (256, 256)
    found = seams(pictures, upscale, pipeline.preset)
    assert found is not None and found < 1
    # Two tiles of other colours have a seam that this finds.
    pictures[:, :, 128:] += 8 / 255
    assert seam_step(pictures[0], [128], []) > 5
