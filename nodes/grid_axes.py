"""The axes of Krea 2 Grid: what they vary, and their values, a line each."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..krea2_model.checkpoints.identify import TRANSFORMER
from ..krea2_model.images.grid_sheet import check_counts
from ..krea2_model.images.sizes import MAX_SIZE, MULTIPLE
from ..krea2_model.pipeline.grid_axes import file_label, number_range, replace_parts
from . import inputs, model_files
from .layer_weights import LAYERS
from .style_library import mixed_styles

NONE = "none"
PROMPT, PART, NEGATIVE = "prompt", "prompt part", "negative"
SEED, STEPS, GUIDANCE, MU, DENOISE = "seed", "steps", "guidance", "mu", "denoise"
SAMPLER, SIZE, LAYER_WEIGHTS = "sampler", "size", "layer weights"
LORA, LORA_STRENGTH, CHECKPOINT, STYLE = "lora", "lora strength", "checkpoint", "style"
# Of these, those that change the MODEL, the slowest first.
SLOW = (CHECKPOINT, STYLE, LORA, LORA_STRENGTH)
LETTERS = ("x", "y", "z")
MAX_STRENGTH = 100.0

# A line that is the empty text.
_EMPTY = '""'
_SIZE = re.compile(r"(\d{1,5})\s*[x\u00d7]\s*(\d{1,5})", re.IGNORECASE)


@dataclass(frozen=True)
class Axis:
    """letter: x, y or z. part: what of the prompt is replaced, for PART. labels: of the sheet."""

    letter: str
    kind: str
    values: tuple[Any, ...]
    labels: tuple[str, ...]
    part: str = ""


def read_axes(chosen: Sequence[tuple[str, str]], prompt: str, lora: str, most: int) -> list[Axis]:
    """The axes of a node.

    chosen: kind and text of x, y and z. prompt: without an axis of prompts. lora: the LoRA whose
    strength an axis may be. most: cells.
    Raises ValueError that names the axis, and the line where a value is wrong.
    """
    axes = [
        _read_axis(letter, kind, text)
        for letter, (kind, text) in zip(LETTERS, chosen, strict=True)
        if kind != NONE
    ]
    if not axes:
        raise ValueError("x_axis is none; expected at least one axis. Choose what it varies.")
    for number, axis in enumerate(axes):
        for other in axes[:number]:
            if (axis.kind, axis.part) == (other.kind, other.part):
                raise ValueError(
                    f"{other.letter}_axis and {axis.letter}_axis are both {axis.part or axis.kind}"
                    "; expected each once. Put the values of both on one."
                )
    count = math.prod(len(axis.values) for axis in axes)
    if count > most:
        sizes = " x ".join(f"{len(axis.values)} of {axis.kind}" for axis in axes)
        raise ValueError(
            f"The grid has {count} cells, {sizes}; expected at most {most}. Take fewer values, or "
            "raise max_cells."
        )
    check_counts(*counts_of(axes))
    _check_parts(axes, prompt)
    kinds = {axis.kind: axis for axis in axes}
    if LORA_STRENGTH in kinds:
        loras = kinds[LORA].values if LORA in kinds else [lora != NONE]
        if not any(loras):
            raise ValueError(
                f"{kinds[LORA_STRENGTH].letter}_axis is {LORA_STRENGTH} without a LoRA. Choose one "
                "as lora, or an axis of LoRAs."
            )
    return axes


def counts_of(axes: Sequence[Axis]) -> tuple[int, int, int]:
    """Columns, rows and blocks."""
    counts = {axis.letter: len(axis.values) for axis in axes}
    return counts.get("x", 1), counts.get("y", 1), counts.get("z", 1)


def values_at(axes: Sequence[Axis], place: tuple[int, int, int]) -> dict[str, Any]:
    """Values by kind at a place; those of PART are a dict of what they replace."""
    values: dict[str, Any] = {}
    for axis in axes:
        value = axis.values[place[LETTERS.index(axis.letter)]]
        if axis.kind == PART:
            values[PART] = values.get(PART, {}) | {axis.part: value}
        else:
            values[axis.kind] = value
    return values


def prompt_at(values: dict[str, Any], prompt: str) -> str:
    """The prompt of a cell, of the node's prompt."""
    return replace_parts(values.get(PROMPT, prompt), values.get(PART, {}))


def _read_axis(letter: str, kind: str, text: str) -> Axis:
    if not isinstance(text, str):
        raise ValueError(f"{letter}_values is {text!r}; expected a text with a value a line.")
    if kind not in KINDS:
        raise ValueError(f"{letter}_axis is {kind!r}; expected one of {', '.join(AXES)}.")
    values, labels = [], []
    part, name = "", f"{letter}_values"
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line:
            continue
        try:
            for value, label in KINDS[kind](line):
                part = part or (str(value) if kind == PART else "")
                values.append(value)
                labels.append(f"{part if kind == PART else kind}: {label}")
        except (ValueError, OSError) as error:
            # A comma list of numbers is what other packs take.
            hint = " Write each value on a line of its own." if "," in line else ""
            raise ValueError(f"{name}, line {number}, is {line[:200]!r}: {error}{hint}") from error
        if kind == PART and not part:
            raise ValueError(f"{name}, line {number}, is empty; expected a part of the prompt.")
    if not values:
        raise ValueError(f"{name} is empty; expected values of {kind}, a line each.")
    value, count = Counter(map(repr, values)).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{name} has {value} twice; expected each value once.")
    if len(set(labels)) < len(labels):  # files of one name in several folders
        labels = [f"{label} ({number})" for number, label in enumerate(labels, 1)]
    return Axis(letter, kind, tuple(values), tuple(labels), part)


def _check_parts(axes: Sequence[Axis], prompt: str) -> None:
    prompts = next((axis.values for axis in axes if axis.kind == PROMPT), (prompt,))
    for axis in axes:
        for each in prompts if axis.kind == PART else ():
            if axis.part not in each:
                raise ValueError(
                    f"{axis.letter}_values begins with {axis.part!r:.200}, which is not in the "
                    f"prompt {each!r:.200}; expected a part of it in the same letters, then what "
                    "takes its place, a line each."
                )


# Readers of a line, by kind: pairs of values and labels. A ValueError is the end of a sentence.
Values = Iterator[tuple[Any, str]]


def _text(line: str) -> Values:
    yield ("", "(nothing)") if line == _EMPTY else (line, line)


def _numbers(entry, is_whole: bool = False) -> Callable[[str], Values]:
    """Reader of the numbers that an input with limits takes, and of ranges."""
    low, high = entry.min, entry.max

    def read(line: str) -> Values:
        for text in number_range(line) or [line]:
            try:
                value = int(text) if is_whole else float(text)
            except ValueError:
                value = math.nan
            if not low <= value <= high:
                kind = "whole number" if is_whole else "number"
                example = "1-4" if is_whole else "1-4:0.5"
                raise ValueError(
                    f"expected a {kind} from {low:g} to {high:g}, or a range such as {example}."
                )
            yield value, f"{value}" if is_whole else f"{value:g}"

    return read


def _sampler(line: str) -> Values:
    if line not in inputs.SAMPLER.options:
        raise ValueError("expected one of ComfyUI's samplers, such as euler.")
    yield line, line


def _size(line: str) -> Values:
    found = _SIZE.fullmatch(line)
    sides = [int(side) for side in found.groups()] if found else []
    if not sides or not all(MULTIPLE <= side <= MAX_SIZE and not side % MULTIPLE for side in sides):
        raise ValueError(
            f"expected width x height in multiples of {MULTIPLE} px, such as 1024 x 768."
        )
    yield tuple(sides), " x ".join(map(str, sides))


def _lora(line: str) -> Values:
    """FILE, FILE:STRENGTH, several with ; between them, or none."""
    if line == NONE:
        yield (), NONE
        return
    loras, labels = [], []
    for text in (part.strip() for part in line.split(";")):
        name, colon, number = text.rpartition(":")
        try:
            strength = float(number) if colon else 1.0
        except ValueError:
            name, colon, strength = text, "", 1.0
        name = name.strip() if colon else text
        if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:
            raise ValueError(
                f"expected a strength from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g} after the colon."
            )
        model_files.find_lora(name)
        loras.append((name, strength))
        labels.append(f"{file_label(name)}:{strength:g}" if colon else file_label(name))
    yield tuple(loras), "; ".join(labels)


def _strength(line: str) -> Values:
    class Limits:
        min, max = -MAX_STRENGTH, MAX_STRENGTH

    yield from _numbers(Limits)(line)


def _layer_weights(line: str) -> Values:
    """Twelve numbers, or some layers: 35=4, 2=0."""
    expected = (
        f"expected {len(LAYERS)} numbers from 0 to 8 with commas between them, or some layers, "
        f"such as 35=4, 2=0; layers are {', '.join(map(str, LAYERS))}."
    )
    weights = dict.fromkeys(LAYERS, 1.0)
    parts = [part.strip() for part in line.split(",")]
    try:
        if "=" in line:
            pairs = [part.split("=") for part in parts]
            named = {int(layer): float(weight) for layer, weight in pairs}
        else:
            named = dict(zip(LAYERS, map(float, parts), strict=True))
    except ValueError:
        raise ValueError(expected) from None
    if not named.keys() <= weights.keys() or not all(0 <= w <= 8 for w in named.values()):
        raise ValueError(expected)
    weights |= named
    if not any(weights.values()):
        raise ValueError("expected weights that are not all 0.")
    yield tuple(weights.values()), line


def _checkpoint(line: str) -> Values:
    model_files.find_model(TRANSFORMER, line)
    yield line, file_label(line)


def _style(line: str) -> Values:
    """NAME, NAME:WEIGHT, several with ; between them, or none; what Krea 2 Styles takes."""
    if line == NONE:
        yield "", NONE
        return
    mixed = mixed_styles("\n".join(line.split(";")))
    named = [(style.name, weight) for style, weight in mixed.styles]
    text = "\n".join(f"{name}: {weight:g}" for name, weight in named)
    yield text, "; ".join(name if weight == 1 else f"{name} {weight:g}" for name, weight in named)


KINDS: dict[str, Callable[[str], Values]] = {
    PROMPT: _text,
    PART: _text,
    NEGATIVE: _text,
    SEED: _numbers(inputs.seed(""), True),
    STEPS: _numbers(inputs.STEPS, True),
    GUIDANCE: _numbers(inputs.GUIDANCE),
    MU: _numbers(inputs.MU),
    DENOISE: _numbers(inputs.DENOISE),
    SAMPLER: _sampler,
    SIZE: _size,
    LORA: _lora,
    LORA_STRENGTH: _strength,
    LAYER_WEIGHTS: _layer_weights,
    CHECKPOINT: _checkpoint,
    STYLE: _style,
}
AXES = (NONE, *KINDS)
