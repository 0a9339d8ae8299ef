"""Does krea2-nano paint what the prompt says? Pictures of held-out prompts, read back and counted.

    python benchmarks/nano_accuracy.py [--variants raw] [--guidance 0 3.5]
    python benchmarks/nano_accuracy.py --variants raw --guidance 3.5 --window 0.25 0.75
    python benchmarks/nano_accuracy.py --sheet nano.png     # only the 5 x 5 contact sheet

Prompts name combinations of colour and shape (and background) that training never showed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from krea2_model import GuidanceSchedule, Krea2Pipeline, nano  # noqa: E402
from krea2_model.images.contact_sheet import contact_sheet  # noqa: E402
from nano_training.judge import judge  # noqa: E402
from nano_training.scenes import Scene, held_out_prompts  # noqa: E402

BATCH = 20


def paint(pipeline: Krea2Pipeline, prompts: list[str], **options) -> np.ndarray:
    """A picture a prompt, (N, H, W, 3) in [0, 1]; the n-th from seed n."""
    pictures = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        seeds = list(range(start, start + len(part)))
        pictures.append(pipeline(part, seed=seeds, output_type="np", **options))
    return np.concatenate(pictures)


def score(pictures: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """The share of pictures that get each part right, in percent."""
    results = defaultdict(list)
    for picture, scene in zip(pictures, scenes, strict=True):
        for part, right in judge(picture, scene).items():
            results[part].append(right)
    return {part: 100 * float(np.mean(rights)) for part, rights in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(nano.VARIANTS), choices=nano.VARIANTS)
    parser.add_argument("--guidance", nargs="+", type=float, help="of Raw (default: 0 and 3.5)")
    parser.add_argument(
        "--window", nargs=2, type=float, default=(0.0, 1.0), metavar=("START", "END"),
        help="parts of the schedule's time between which guidance counts"
    )  # fmt: skip
    parser.add_argument("--sheet", type=Path, help="write the contact sheet here, and stop")
    options = parser.parse_args()
    exam = held_out_prompts()
    prompts, scenes = [prompt for prompt, _ in exam], [scene for _, scene in exam]
    if options.sheet:
        chosen = [*range(0, 80, 5), *range(80, 116, 4)]
        pipeline = Krea2Pipeline.nano()
        sheet = contact_sheet(paint(pipeline, [prompts[i] for i in chosen]), columns=5)
        Image.fromarray((sheet * 255).round().astype(np.uint8)).save(options.sheet)
        return
    schedule = GuidanceSchedule(*options.window)
    for variant in options.variants:
        pipeline = Krea2Pipeline.nano(variant)
        for guidance in (options.guidance or (0.0, 3.5)) if variant == "raw" else (0.0,):
            started = time.monotonic()
            pictures = paint(pipeline, prompts, guidance=guidance, guidance_schedule=schedule)
            scores = score(pictures, scenes)
            line = ", ".join(f"{part} {value:.0f} %" for part, value in scores.items())
            seconds = time.monotonic() - started
            print(f"{variant}, guidance {guidance}: {line} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
