"""Several styles of a library at once, each with a weight, as arguments of a run.

Words become part of the prompt: as they are at weight 1, else with the weight as a prompt weight,
`(words:0.7)`. LoRAs act at their strength times the weight. Pictures share one style transfer by
their weights; its strength is that of the styles together, and no more than the strongest has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import is_number
from .style_library import (
    MAX_PICTURES,
    MAX_WEIGHT,
    PLACE,
    SETTINGS,
    SavedStyle,
    StyleError,
    StyleLibrary,
)

# What separates words of a style from the prompt, where they hold no place for it.
_JOINT, _LOOSE = ", ", ".,; "


@dataclass(frozen=True)
class MixedStyle:
    """Styles and their weights, in the order in which their words are added."""

    styles: tuple[tuple[SavedStyle, float], ...]

    @classmethod
    def of(cls, chosen: Any, library: StyleLibrary | None = None) -> MixedStyle:
        """Styles by name and weight, `{name: weight}` or a list of pairs; mixed ones as they are.

        Raises StyleError for none, for one that is not there, and for a weight out of range.
        """
        if isinstance(chosen, MixedStyle):
            return chosen
        if isinstance(chosen, str):
            chosen = read_choice(chosen)
        pairs = _pairs(chosen)
        if not pairs:
            raise StyleError(
                "No style is chosen; expected one or more, each with a weight, such as Ink wash: "
                "0.7."
            )
        library = library or StyleLibrary()
        names: set[str] = set()
        for name, weight in pairs:
            if not (is_number(weight) and 0 <= weight <= MAX_WEIGHT):
                raise StyleError(
                    f"The weight of style {name} is {weight!r}; expected 0 (off) to {MAX_WEIGHT:g}."
                )
            if name in names:
                raise StyleError(f"Style {name} is chosen twice; give it once, with one weight.")
            names.add(name)
        mixed = cls(tuple((library.get(name), weight) for name, weight in pairs))
        if len(mixed.pictures()) > MAX_PICTURES:
            together = ", ".join(name for name, _ in pairs)
            raise StyleError(
                f"{together} have {len(mixed.pictures())} pictures together; expected at most "
                f"{MAX_PICTURES}. Choose fewer styles with pictures."
            )
        return mixed

    @property
    def active(self) -> list[tuple[SavedStyle, float]]:
        return [(style, weight) for style, weight in self.styles if weight > 0]

    @property
    def uses_weights(self) -> bool:
        """True where words need prompt weights."""
        return any(weight != 1 and style.words.strip() for style, weight in self.active)

    def prompt(self, prompt: str) -> str:
        """A prompt with the words of all styles."""
        for style, weight in self.active:
            prompt = _add(prompt, style.words.strip(), weight)
        return prompt

    def negative(self, negative: str) -> str:
        for style, _ in self.active:
            negative = _add(negative, style.negative.strip(), 1)
        return negative

    def loras(self) -> list[tuple[SavedStyle, str, float]]:
        """The style, file and strength of each LoRA."""
        return [
            (style, file, strength * weight)
            for style, weight in self.active
            for file, strength in style.loras
            if strength != 0
        ]

    def pictures(self) -> list[tuple[Path, float]]:
        """The file and weight of each picture. Raises StyleError for one that is not there."""
        return [
            (path, weight * share)
            for style, weight in self.active
            for path, (_, share) in zip(style.picture_paths(), style.pictures, strict=True)
            if share > 0
        ]

    @property
    def picture_strength(self) -> float:
        """Of the style transfer of all pictures."""
        own = [(style.picture_strength, weight) for style, weight in self.active if style.pictures]
        total = sum(strength * weight for strength, weight in own)
        return min(total, max((strength * max(1, weight) for strength, weight in own), default=0.0))

    def setting(self, name: str) -> Any:
        """The value of a setting that the first style with one suggests, else None."""
        return next((s.settings[name] for s, _ in self.active if name in s.settings), None)

    def as_one(self, name: str, more: int = 0, strength: float = 0.0) -> SavedStyle:
        """A style that is all of them at their weights, to be saved with `pictures`.

        more: so many pictures of weight 1 behind them, whose style is to act with this strength.
        """
        values = {key: self.setting(key) for key in SETTINGS}
        settings = {key: value for key, value in values.items() if value is not None}
        strengths = [self.picture_strength] if self.pictures() else []
        strengths += [strength] if more else []
        words = self.prompt(PLACE)
        if words == PLACE or words.startswith(PLACE + _JOINT):  # where they go without it
            words = words.removeprefix(PLACE).lstrip(_LOOSE)
        return SavedStyle(
            name,
            words=words,
            negative=self.negative(""),
            pictures=(
                *((path.name, weight) for path, weight in self.pictures()),
                *((f"{number}.png", 1.0) for number in range(more)),
            ),
            picture_strength=max(strengths, default=1.0),
            loras=tuple((_place_of(each, file), scale) for each, file, scale in self.loras()),
            settings=settings,
        )

    def report(self) -> str:
        """The styles and what each adds, a line each."""
        lines = []
        for style, weight in self.styles:
            state = style.summary() if weight > 0 else "off"
            lines.append(f"{style.name} {weight:g}: {state}")
        return "\n".join(lines)


def _place_of(style: SavedStyle, file: str) -> str:
    """A LoRA by its whole path where it lies beside the style, else by its name."""
    beside = Path(style.folder or "") / file
    return str(beside.absolute()) if style.folder is not None and beside.is_file() else file


def _pairs(chosen: Any) -> list[tuple[str, float]]:
    found = chosen.items() if isinstance(chosen, Mapping) else chosen
    pairs = list(found) if isinstance(found, Iterable) else [found]
    for pair in pairs:
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not (is_pair and isinstance(pair[0], str)):
            raise StyleError(
                f"styles has {pair!r:.80}; expected names and weights, such as {{'Ink wash': 0.7}}."
            )
    return pairs


def read_choice(text: str) -> list[tuple[str, float]]:
    """Styles of a text: a line each, `Ink wash: 0.7`, or a JSON object of names and weights.

    A line without a number has weight 1. Raises StyleError for JSON that is none.
    """
    text = text.strip()
    if text.startswith(("{", "[")):
        try:
            found = json.loads(text)
            pairs = list(found.items()) if isinstance(found, dict) else [tuple(p) for p in found]
            if not all(len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
                raise ValueError("no pairs")
        except (ValueError, TypeError, RecursionError) as error:
            raise StyleError(
                f"styles is {text[:80]!r}; expected lines such as Ink wash: 0.7, or a JSON object "
                "of names and weights."
            ) from error
        return pairs
    lines = (line.strip() for line in text.splitlines())
    return [_read_line(line) for line in lines if line]


def _read_line(line: str) -> tuple[str, float]:
    name, colon, weight = line.rpartition(":")
    if not colon:
        return line, 1.0
    try:
        return name.strip(), float(weight)
    except ValueError:
        raise StyleError(
            f"styles has the line {line[:80]!r}; expected a name and a number, such as Ink wash: "
            "0.7."
        ) from None


def _add(prompt: str, words: str, weight: float) -> str:
    """A prompt with words behind it, or around it."""
    if not words:
        return prompt
    if PLACE not in words:
        prompt = prompt.rstrip(_LOOSE)
        return _JOINT.join(filter(None, (prompt, _weighted(words, weight))))
    before, after = (_weighted(side, weight) for side in words.split(PLACE))
    return f"{before}{prompt.rstrip(_LOOSE) if after else prompt}{after}"


def _weighted(words: str, weight: float) -> str:
    """Words with a prompt weight; what stands at their ends alone stays outside of the brackets."""
    middle = words.strip(_LOOSE)
    if weight == 1 or not middle:
        return words
    start = words.index(middle)
    before, after = words[:start], words[start + len(middle) :]
    if not _is_balanced(middle):  # its brackets would end those of the weight
        middle = escaped(middle)
    return f"{before}({middle}:{weight:g}){after}"


def _is_balanced(words: str) -> bool:
    depth = 0
    for found in re.findall(r"\\.|[()]", words):
        depth += {"(": 1, ")": -1}.get(found, 0)
        if depth < 0:
            return False
    return depth == 0


def escaped(prompt: str) -> str:
    """A prompt whose brackets stay brackets where prompt weights are read."""
    return re.sub(r"\\?[()]", lambda found: "\\" + found[0][-1], prompt)
