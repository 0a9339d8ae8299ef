"""krea2-nano at 2, 3 and 4 times its side: in one, with scaled positions, in two stages.

    python benchmarks/nano_large.py [--count 40] [--sheet large.png]

Held-out prompts, read back by the judge of the training: the share of pictures that show what the
prompt says, and of those with as many things as it names, not more and not fewer.
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

from krea2_model import Krea2Pipeline, RotaryScaling, Upscale  # noqa: E402
from krea2_model.images.contact_sheet import contact_sheet  # noqa: E402
from nano_training.judge import background_colour, judge  # noqa: E402
from nano_training.scenes import Scene, held_out_prompts  # noqa: E402

SIDE = 128
# Smaller marks than this share of the picture are no thing.
SMALLEST = 0.004


def exam(count: int) -> list[tuple[str, Scene]]:
    """Prompts about one thing and about two, half and half."""
    prompts = held_out_prompts()
    return prompts[: count // 2] + prompts[-(count - count // 2) :]


def things(picture: np.ndarray) -> int:
    """Number of connected things in a picture (H, W, 3) in [0, 1]."""
    contrast = np.abs(picture - background_colour(picture)).max(axis=2)
    parts, found = label(contrast > 0.25)
    sizes = np.bincount(parts.ravel(), minlength=found + 1)[1:]
    return int((sizes > SMALLEST * parts.size).sum())


def score(pictures: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """Shares in percent: all that the prompt says, and as many things as it names."""
    right = [all(judge(p, s).values()) for p, s in zip(pictures, scenes, strict=True)]
    alone = [things(p) == len(s.things) for p, s in zip(pictures, scenes, strict=True)]
    return {"right": 100 * float(np.mean(right)), "not doubled": 100 * float(np.mean(alone))}


def ways(scale: int) -> dict[str, dict]:
    """Arguments of the pipeline by the way a large picture is made."""
    whole = {"height": scale * SIDE, "width": scale * SIDE}
    if scale == 1:
        return {"its own size": whole}
    return {
        "in one": whole,
        "in one, yarn and DyPE": {**whole, "rotary": RotaryScaling(SIDE)},
        "in one, ntk and DyPE": {**whole, "rotary": RotaryScaling(SIDE, "ntk")},
        "two stages": {"upscale": Upscale(float(scale))},
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
            shown += [pictures[0], pictures[-1]]
            captions += [f"{scale * SIDE} px, {name}"] * 2
    if options.sheet:
        sheet = contact_sheet(shown, captions, columns=4, cell=256)
        Image.fromarray((sheet * 255).astype(np.uint8)).save(options.sheet)


if __name__ == "__main__":
    main()
