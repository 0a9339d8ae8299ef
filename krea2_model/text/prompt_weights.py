r"""Weights in prompts: `a (red:1.4) circle` to the sentence and what each of its tokens weighs.

`(words:number)` weighs words, `\(` and `\)` are brackets of the text, and all else stays as it is
written: brackets without a number, a number that belongs to a ratio or a time of day ("(16:9)"),
and brackets that have no partner. Weights inside each other multiply, up to `MAX_WEIGHT`.

The text encoder reads the sentence without the marks, once. What a weight does is in
text_attention.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise

# Above 2 shapes come apart (measured on krea2-nano); far beyond, a number is a slip of the pen.
MAX_WEIGHT = 10.0

_BRACKET = re.compile(r"\\[()]|[()]")
# The number behind a colon. Any text matches in one way only, so that a long one fails at once.
_NUMBER = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*")
_DIGITS = re.compile(r"\d+")

# Characters of a prompt that an error quotes.
_QUOTED = 60


@dataclass(frozen=True)
class WeightedPrompt:
    """A sentence without marks, and the weight of each of its characters."""

    text: str
    weights: tuple[float, ...]

    @property
    def is_weighted(self) -> bool:
        return any(weight != 1 for weight in self.weights)

    def parts(self) -> list[tuple[str, float]]:
        """The words that have a weight other than 1, and their weights, in order."""
        runs = groupby(zip(self.text, self.weights, strict=True), key=lambda pair: pair[1])
        parts = [("".join(c for c, _ in run).strip(), weight) for weight, run in runs]
        return [(words, weight) for words, weight in parts if words and weight != 1]


def parse_weights(prompt: str) -> WeightedPrompt:
    """Read the marks of a prompt, in time that grows with its length, however deep they nest.

    Raises ValueError for weights beyond `MAX_WEIGHT` either way, alone or multiplied.
    """
    # A bracket that turns out to be a mark becomes "", so that places stay as they are.
    characters: list[str] = []
    opened: list[tuple[int, int]] = []  # in `characters`, and behind the bracket in the prompt
    marks: dict[int, float] = {}  # where one begins, and its weight
    ends: dict[int, int] = {}  # how many end in front of a place
    position = 0
    for bracket in _BRACKET.finditer(prompt):
        start, position = position, bracket.end()
        between = prompt[start : bracket.start()]
        if bracket[0] == ")" and opened:
            first, inside = opened.pop()
            words, number = _split_number(between)
            # Other brackets inside are text, or marks around some.
            if number is not None and (start != inside or words.strip()):
                marks[first] = _weight(number, prompt[inside - 1 : position])
                characters[first] = ""
                characters += words
                ends[len(characters)] = ends.get(len(characters), 0) + 1
                continue
        characters += between
        if bracket[0] == "(":
            opened.append((len(characters), position))
        characters.append(bracket[0][-1])
    characters += prompt[position:]
    return WeightedPrompt("".join(characters), tuple(_character_weights(characters, marks, ends)))


def _split_number(text: str) -> tuple[str, str | None]:
    """The end of a bracket's inside as its words and the number behind their colon, if any."""
    words, colon, behind = text.rpartition(":")
    number = _NUMBER.fullmatch(behind) if colon else None
    is_ratio = _DIGITS.fullmatch(words[-1:]) and _DIGITS.fullmatch(behind.rstrip())
    if number is None or is_ratio:
        return text, None
    return words.rstrip(), number[1]


def _character_weights(
    characters: list[str], marks: dict[int, float], ends: dict[int, int]
) -> Iterator[float]:
    """The weight of each character that is left, by all marks around it."""
    weights = [1.0]
    for place, character in enumerate(characters):
        if place in ends:
            del weights[-ends[place] :]
        if place in marks:
            weights.append(weights[-1] * marks[place])
            if abs(weights[-1]) > MAX_WEIGHT:
                words = "".join(characters[place : place + _QUOTED]).strip()
                raise ValueError(
                    f"The weights around {words!r} multiply to {weights[-1]:g}; expected "
                    f"-{MAX_WEIGHT:.0f} to {MAX_WEIGHT:.0f}. Lower one of them."
                )
        elif character:
            yield weights[-1]


def weigh_again(text: str, parts: Sequence[tuple[str, float]]) -> tuple[str, list[str]]:
    """Apply weights to the same words of another text; also returns the words it lacks.

    Each of `WeightedPrompt.parts` is marked where it occurs first, as whole words and in any case.
    """
    marks: list[tuple[int, int, float]] = []
    lost: list[str] = []
    edged, marked = _with_edges(text), bytearray(len(text))
    searched: dict[str, int] = {}  # words, and up to where their places are marked
    for words, weight in parts:
        pattern = _with_edges(words)
        first = _find_unmarked(edged, pattern, marked, searched.get(pattern, 0))
        searched[pattern] = len(text) if first is None else first + len(words)
        if first is None:
            lost.append(words)
        else:
            last = first + len(words)
            marked[first:last] = b"\1" * len(words)
            marks.append((first, last, weight))
    pieces, position = [], 0
    for first, last, weight in sorted(marks):
        pieces += [text[position:first], f"({text[first:last]}:{weight:g})"]
        position = last
    return "".join([*pieces, text[position:]]), lost


def _with_edges(text: str) -> str:
    """A text without its case, and between any two characters which of them belong to words.

    So whole words are found by `str.find`, as the same characters with the same around them.
    """
    inside = [False, *(character.isalnum() or character == "_" for character in text), False]
    edges = [chr(left + 2 * right) for left, right in pairwise(inside)]
    # Character by character, since some have two in the other case and places have to stay.
    folded = (c if len(c.casefold()) > 1 else c.casefold() for c in text)
    return "".join(chain.from_iterable(zip(edges, [*folded, ""], strict=True)))


def _find_unmarked(edged: str, pattern: str, taken: bytearray, start: int) -> int | None:
    """The first place of `pattern` from `start` on that overlaps no marked words, or None."""
    length = len(pattern) // 2
    while (at := edged.find(pattern, 2 * start)) >= 0:
        start = at // 2
        occupied = taken.rfind(1, start, start + length)
        if at % 2 == 0 and occupied < 0:
            return start
        start = max(start, occupied) + 1
    return None


def plain_prompt(prompt: str) -> WeightedPrompt:
    """A prompt whose brackets are text."""
    return WeightedPrompt(prompt, (1.0,) * len(prompt))


def token_weights(prompt: WeightedPrompt, spans: Sequence[tuple[int, int]]) -> list[float]:
    """Weights of tokens by the characters they stand for, see `Krea2Tokenizer.spans`.

    A token weighs as its characters do, spaces left out; their mean where they differ.
    """
    return [_mean_weight(prompt, span) for span in spans]


def _mean_weight(prompt: WeightedPrompt, span: tuple[int, int]) -> float:
    weights = [
        prompt.weights[index] for index in range(*span) if not prompt.text[index].isspace()
    ] or [1.0]
    return weights[0] if len(set(weights)) == 1 else sum(weights) / len(weights)


def _weight(number: str, mark: str) -> float:
    weight = float(number)
    if abs(weight) > MAX_WEIGHT:
        raise ValueError(
            f"The prompt has the weight {_cut(number)} in {_cut(mark)!r}; expected "
            f"-{MAX_WEIGHT:.0f} to {MAX_WEIGHT:.0f}. If it is no weight, write \\( and \\) for the "
            "brackets."
        )
    return weight


def _cut(text: str) -> str:
    """A text as an error quotes it: its beginning and its end where it is long."""
    half = _QUOTED // 2
    return text if len(text) <= _QUOTED else f"{text[:half]}...{text[-half:]}"
