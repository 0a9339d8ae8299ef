"""krea2-nano at 2, 3 and 4 times its side: in one, with scaled positions, in two stages.

    python benchmarks/nano_large.py [--count 40] [--sheet large.png]

Held-out prompts, read back by the judge of the training. Shares of pictures in percent:

- right: all that the prompt says;
- not doubled: no more things than it names;
- complete: no fewer, which also counts things that faded into the background or broke in parts.

Of tiles also the mean step across their seams in the last step of the run, in 255ths above that of
other columns and rows.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import label

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from krea2_model import Krea2Pipeline, Preset, RotaryScaling, SparseAttention, Upscale  # noqa: E402
from krea2_model.features.tiles import tiles_at  # noqa: E402
from krea2_model.images.contact_sheet import contact_sheet  # noqa: E402
from nano_training.judge import background_colour, judge, seam_step  # noqa: E402
from nano_training.scenes import Scene, held_out_prompts  # noqa: E402

SIDE = 128
# Smaller marks than this share of the picture are no thing.
SMALLEST = 0.004
# Difference from the background, in the channel that differs most, from which on a pixel is a
# thing's: half of that of orange on yellow, the closest colours.
CONTRAST = 0.15


def exam(count: int) -> list[tuple[str, Scene]]:
    """Prompts about one thing and about two, half and half."""
    prompts = held_out_prompts()
    return prompts[: count // 2] + prompts[-(count - count // 2) :]


def things(picture: np.ndarray) -> int:
    """Number of connected things in a picture (H, W, 3) in [0, 1]."""
    contrast = np.abs(picture - background_colour(picture)).max(axis=2)
    parts, found = label(contrast > CONTRAST)
    sizes = np.bincount(parts.ravel(), minlength=found + 1)[1:]
    return int((sizes > SMALLEST * parts.size).sum())


def score(pictures: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """Shares in percent, see the top."""
    pairs = list(zip(pictures, scenes, strict=True))
    right = [all(judge(picture, scene).values()) for picture, scene in pairs]
    more = np.array([things(picture) - len(scene.things) for picture, scene in pairs])
    shares = {"right": right, "not doubled": more <= 0, "complete": more >= 0}
    return {name: 100 * float(np.mean(share)) for name, share in shares.items()}


def seams(pictures: np.ndarray, upscale: Upscale, preset: Preset) -> float | None:
    """The mean of `seam_step` for pictures of a second stage; None without tiles."""
    height, width = pictures.shape[1:3]
    settings = upscale.tiles(width, height, preset)
    if settings is None:
        return None
    last = upscale.sigmas(width, height, preset)[-2]
    tiles = [tile for tile, _ in tiles_at((height // 16, width // 16), settings, last)]
    columns, rows = (
        sorted({16 * edge for span in spans for edge in span} - {0, side})
        for spans, side in (([t.columns for t in tiles], width), ([t.rows for t in tiles], height))
    )
    return float(np.mean([seam_step(picture, columns, rows) for picture in pictures]))


def ways(scale: int) -> dict[str, dict]:
    """Arguments of the pipeline by the way a large picture is made."""
    whole = {"height": scale * SIDE, "width": scale * SIDE}
    if scale == 1:
        return {"its own size": whole}
    return {
        "in one": whole,
        "in one, yarn and DyPE": {**whole, "rotary": RotaryScaling(SIDE)},
        "in one, yarn and DyPE, sparse": {
            **whole,
            "rotary": RotaryScaling(SIDE),
            # The window has the same share of the side of training as with the defaults.
            "sparse": SparseAttention(block=2, stride=2),
        },
        "in one, ntk and DyPE": {**whole, "rotary": RotaryScaling(SIDE, "ntk")},
        "two stages": {"upscale": Upscale(float(scale), batch=8)},
    }


def paint(pipeline: Krea2Pipeline, prompts: list[str], **options) -> np.ndarray:
    pictures = [
        pipeline([prompt], seed=number, output_type="np", **options)
        for number, prompt in enumerate(prompts)
    ]
    return np.concatenate(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40, help="number of prompts (default: 40)")
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--sheet", type=Path, help="also write the first pictures of each way")
    options = parser.parse_args()
    logging.getLogger("krea2_model").setLevel(logging.ERROR)
    pipeline = Krea2Pipeline.nano()
    prompts, scenes = zip(*exam(options.count), strict=True)
    shown: list[np.ndarray] = []
    captions: list[str] = []
    for scale in options.scales:
        for name, arguments in ways(scale).items():
            pictures = paint(pipeline, list(prompts), **arguments)
            found = score(pictures, list(scenes))
            print(
                f"{scale * SIDE} px, {name}: "
                + ", ".join(f"{part} {share:.1f} %" for part, share in found.items()),
                flush=True,
            )
            if isinstance(upscale := arguments.get("upscale"), Upscale):
                step = seams(pictures, upscale, pipeline.preset)
                if step is not None:
                    print(f"    seams: {step:+.2f} of 255", flush=True)
            shown += [pictures[0], pictures[-1]]
            captions += [f"{scale * SIDE} px, {name}"] * 2
    if options.sheet:
        sheet = contact_sheet(shown, captions, columns=4, cell=256)
        Image.fromarray((sheet * 255).astype(np.uint8)).save(options.sheet)


if __name__ == "__main__":
    main()
