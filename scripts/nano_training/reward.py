"""The judge as a reward of `krea2 reward`, and prompts to learn from.

    python scripts/nano_training/reward.py prompts.jsonl
    krea2 reward prompts.jsonl --reward scripts/nano_training/reward.py:score --model nano ...

The prompts are those that Raw gets wrong without guidance. None is of the exam's combinations.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from krea2_model import Krea2Pipeline  # noqa: E402
from nano_training.judge import judge, shape_margins  # noqa: E402
from nano_training.scenes import Scene, Thing, caption, random_scene  # noqa: E402

DRAWN = 640
STEPS = 8


def score(pictures: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of each picture the share of parts that are right, and how clearly the shapes are.

    The latter is how much better the wanted shape fits than any other, so that of two right
    pictures the better one is told.
    """
    scores = []
    for picture, row in zip(pictures, rows, strict=True):
        scene = scene_of(row["scene"])
        scores.append(float(np.mean([*judge(picture, scene).values()])))
        scores[-1] += float(np.mean(shape_margins(picture, scene)))
    return scores


def scene_of(table: Mapping[str, Any]) -> Scene:
    """A scene from its form in JSON."""
    return Scene(tuple(Thing(**thing) for thing in table["things"]), table["background"])


def drawn_prompts() -> Iterator[tuple[str, Scene]]:
    """Prompts of scenes that are not held out, each once."""
    random, seen = Random("reward prompts"), set()
    while True:
        scene = random_scene(random)
        text = caption(scene, random, brief=0)
        if text not in seen:
            seen.add(text)
            yield text, scene


def main() -> None:
    """Write the prompts that Raw gets wrong without guidance, of those that are drawn."""
    path, pipeline, batch = Path(sys.argv[1]), Krea2Pipeline.nano("raw"), 16
    drawn = list(islice(drawn_prompts(), DRAWN))
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, DRAWN, batch):
            part = drawn[start : start + batch]
            pictures = pipeline(
                [prompt for prompt, _ in part],
                steps=STEPS, guidance=0, seed=start, output_type="np",
            )  # fmt: skip
            for picture, (prompt, scene) in zip(pictures, part, strict=True):
                if not all(judge(picture, scene).values()):
                    row = {"prompt": prompt, "scene": asdict(scene)}
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
