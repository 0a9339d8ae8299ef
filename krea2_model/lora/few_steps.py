"""Few-step LoRAs: adapters that let a checkpoint finish in fewer steps, without guidance.

Distilled from Turbo (3 or 4 steps) or made of the difference between Turbo and Raw (8 steps). Their
weights do not tell them from a style, so the file's metadata or its name does. They run on Turbo's
schedule, whichever checkpoint they are on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..checkpoints.transformer import STEPS_KEY
from ..config import RAW, TURBO, Preset

MAX_STEPS = 16

# Below this strength a checkpoint is between its own schedule and that of the LoRA.
FULL_STRENGTH = 0.8

# "4step", "3-step", "8_steps"; not the "step 3000" or "4_steps500" of a training's snapshots.
_COUNT = re.compile(r"(?<![\d.])(\d{1,2})[-_ ]?steps?(?![a-z\d]|[-_ ]?\d)")
_DISTILLED = re.compile(r"distil|turbo|lightning|hyper|fast|accel|tdm|dmd|lcm")
# The difference between the two checkpoints, under the name by which it is shared.
_TURBO_OF_RAW = re.compile(r"krea[-_ ]?2[-_ ]turbo[-_ ](distil\w*[-_ ])?lora")


def read_steps(name: str, metadata: Mapping[str, str] | None = None) -> int | None:
    """The number of steps a LoRA is made for, by its file's metadata or name; None for others."""
    stated = (metadata or {}).get(STEPS_KEY, "")
    if stated.isdecimal() and 1 <= int(stated) <= MAX_STEPS:
        return int(stated)
    name = name.lower()
    count = _COUNT.search(name)
    if count and 1 <= int(count[1]) <= MAX_STEPS and _DISTILLED.search(name):
        return int(count[1])
    return TURBO.steps if _TURBO_OF_RAW.search(name) else None


def few_step_preset(steps: int, base: Preset | None) -> Preset:
    """The sampling defaults of a checkpoint with a LoRA for so many steps."""
    return Preset("few-step LoRA", steps, 0.0, TURBO.mu, (base or RAW).size)
