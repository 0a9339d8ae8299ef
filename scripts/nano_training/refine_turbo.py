"""nano Turbo refined by `krea2 distil`: trajectory distribution matching, Raw for its teacher.

The student begins as the Turbo that regression on trajectories made (`train_turbo`). What it learns
follows prompts better, in four steps too; but the more of it, the less the LoRAs that were trained
on Raw act as before. So a part of it is merged: the one that is best on prompts of validation.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from krea2_model import Krea2Pipeline, nano
from krea2_model.config import TURBO
from krea2_model.transformer.model import Krea2Transformer
from krea2_training.config import DistilConfig, read_config
from krea2_training.distil import distil

from .scenes import COLOURS, SHAPES, caption, held_out_prompts, random_scene, with_article

STEPS = 500
STRENGTH = 0.35
CAPTIONS, REGIONAL, LAYOUTS = 1500, 500, 40
# Wordings of a prompt that names a colour or a shape alone.
OF_COLOUR = ("{}", "{}.", "{},", "{}!", "({})", "all {}", "only {}", "just {}", "{} colour",
             "the colour {}", "plain {}", "{} background", "{} picture")  # fmt: skip
OF_SHAPE = ("{}", "{}.", "a {}", "one {}")

Box = tuple[float, float, float, float]
Row = dict[str, Any]


def prompts() -> list[Row]:
    """Rows of a table: captions of scenes, prompts of a word or two, and prompts with regions."""
    random = Random("prompts of distillation")
    exam = {prompt for prompt, _ in held_out_prompts()}
    texts: dict[str, None] = {}
    for name in (*COLOURS, "violet"):
        for form in (name, name.capitalize(), name.upper()):
            texts[form] = None
        texts |= dict.fromkeys(wording.format(name) for wording in OF_COLOUR)
    for name in SHAPES:
        texts[name.capitalize()] = None
        texts |= dict.fromkeys(wording.format(name) for wording in OF_SHAPE)
    while len(texts) < CAPTIONS:
        text = caption(random_scene(random), random, brief=0.05)
        if text not in exam:
            texts[text] = None
    rows: list[Row] = [{"prompt": text} for text in texts]
    layouts = [random_layout(random) for _ in range(LAYOUTS)]
    seen = set()
    while len(seen) < REGIONAL:
        row = regional(random, random.choice(layouts))
        if (key := json.dumps(row)) not in seen:
            seen.add(key)
            rows.append(row)
    random.shuffle(rows)
    return rows


def random_layout(random: Random) -> list[Box]:
    """Two or three boxes that cover the picture, or most of it."""
    x, y = random.choice((0.5, 0.5, 0.4, 0.6)), random.choice((0.5, 0.5, 0.4, 0.6))
    left, right, top, bottom = (0, 0, x, 1), (x, 0, 1 - x, 1), (0, 0, 1, y), (0, y, 1, 1 - y)
    corners = {(row, column): (column * x, row * y, (1 - x) if column else x, (1 - y) if row else y)
               for row in (0, 1) for column in (0, 1)}  # fmt: skip
    nw, ne, sw, se = (corners[key] for key in ((0, 0), (0, 1), (1, 0), (1, 1)))
    found = random.choice((
        (left, right), (top, bottom), (nw, se), (ne, sw), (nw, ne, (0.25, y, 0.5, 1 - y)),
        (sw, se, (0.25, 0, 0.5, y)), (nw, ne, se), (nw, sw, se), (nw, sw, right), (left, ne, se),
    ))  # fmt: skip
    return [tuple(round(side, 2) for side in box) for box in found]  # type: ignore[misc]


def regional(random: Random, boxes: list[Box]) -> Row:
    """A thing of another colour and shape in each box, mostly without a prompt of the whole."""
    named = [name for name in COLOURS if name not in ("white", "black")]
    colours, shapes = random.sample(named, len(boxes)), random.sample(list(SHAPES), len(boxes))
    things = [f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True)]
    regions = [
        {"prompt": random.choice((with_article(thing),) * 2 + (thing,)), "box": list(box)}
        for thing, box in zip(things, boxes, strict=True)
    ]
    whole = random.choice(("", "", "", f"a {random.choice(list(COLOURS))} background"))
    return {"prompt": whole, "regions": regions}


def refine_turbo(folder: Path, steps: int = STEPS) -> Krea2Transformer:
    """nano's Turbo as its file has it, with a part of what it learns from nano's Raw."""
    # Of this Turbo: another one begins anew.
    file = nano.TRANSFORMERS["turbo"]
    folder = folder / f"refine_{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "prompts.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in prompts()), encoding="utf-8")
    config = read_config(None, {
        "prompts.path": table, "prompts.size": 128,
        "model.transformer": str(file), "model.vae": str(nano.VAE),
        "model.text_encoder": str(nano.text_encoder_file()), "distil.teacher": "nano",
        "distil.steps": [4, 8], "distil.guidance": 3.5, "distil.fake_updates": 2,
        "distil.dropout": 0.06, "adapter.rank": 64, "training.steps": steps, "training.batch": 8,
        "training.learning_rate": 2e-4, "training.warmup": 30, "training.decay": 0.6,
        "training.weight_decay": 0.0, "training.average": 0.98, "memory.dtype": "bf16",
        "memory.checkpointing": False, "samples.every": 0,
        "output.path": folder / "refined.safetensors",
    }, DistilConfig)  # fmt: skip
    pipeline = Krea2Pipeline.nano()
    pipeline.load_lora(distil(config), STRENGTH)
    transformer = pipeline.transformer
    transformer.variant, transformer.preset = TURBO.name, replace(TURBO, size=128)
    return transformer
