r"""Weights in prompts: `a (red:1.4) circle` to the sentence and what each of its tokens weighs.

`(words:number)` weighs words, `\(` and `\)` are brackets of the text, and all else stays as it is
written: brackets without a number, a number that belongs to a ratio or a time of day ("(16:9)"),
and brackets that have no partner. Weights inside each other multiply.

The text encoder reads the sentence without the marks, once. What a weight does is in
text_attention.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from .tokenizer import Krea2Tokenizer

# Above 2 shapes come apart (measured on krea2-nano); far beyond, a number is a slip of the pen.
MAX_WEIGHT = 10.0

_BRACKET = re.compile(r"\\[()]|[()]")
_NUMBER = re.compile(r"\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")
_RATIO = re.compile(r"\d:\d+$")


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
    """Read the marks of a prompt.

    Raises ValueError for a weight beyond `MAX_WEIGHT` either way.
    """
    text: list[str] = []
    weights: list[float] = []
    opened: list[tuple[int, int]] = []  # in the text, and behind the bracket in the prompt

    def add(characters: str) -> None:
        text.extend(characters)
        weights.extend([1.0] * len(characters))

    position = 0
    for bracket in _BRACKET.finditer(prompt):
        add(prompt[position : bracket.start()])
        position = bracket.end()
        if bracket[0] == "(":
            opened.append((len(text), position))
        elif bracket[0] == ")" and opened:
            first, inside = opened.pop()
            number = _NUMBER.search(prompt, inside, bracket.start())
            if number and not _RATIO.search(prompt, inside, bracket.start()):
                end = len(text) - len(number[0])
                if "".join(text[first + 1 : end]).strip():
                    weight = _weight(number[1], prompt[inside - 1 : position])
                    text[first:] = text[first + 1 : end]
                    weights[first:] = [weight * old for old in weights[first + 1 : end]]
                    continue
        add(bracket[0][-1])
    add(prompt[position:])
    return WeightedPrompt("".join(text), tuple(weights))


def weigh_again(text: str, parts: Sequence[tuple[str, float]]) -> tuple[str, list[str]]:
    """Another text on the same with the weights of its words, and the words it does not have.

    Each of `WeightedPrompt.parts` is marked where it occurs first, as whole words and in any case.
    """
    found: list[tuple[int, int, float]] = []
    lost: list[str] = []
    for words, weight in parts:
        pattern = rf"(?<!\w){re.escape(words)}(?!\w)"
        matches = re.finditer(pattern, text, re.IGNORECASE)
        free = (m for m in matches if all(m.end() <= a or m.start() >= b for a, b, _ in found))
        if match := next(free, None):
            found.append((*match.span(), weight))
        else:
            lost.append(words)
    for first, last, weight in sorted(found, reverse=True):
        text = f"{text[:first]}({text[first:last]}:{weight:g}){text[last:]}"
    return text, lost


def plain_prompt(prompt: str) -> WeightedPrompt:
    """A prompt whose brackets are text."""
    return WeightedPrompt(prompt, (1.0,) * len(prompt))


def token_weights(
    prompts: Sequence[WeightedPrompt],
    tokenizer: Krea2Tokenizer,
    max_sequence_length: int | None = None,
    before: str = "",
    front: Sequence[float] = (),
) -> Tensor | None:
    """Weights (B, L) of the kept tokens of sentences, 1 for padding; None where all are 1.

    before: what stands in front of each sentence, see `Krea2Tokenizer.tokenize`; its tokens weigh
        `front`, those of images included (`prompt_images.image_weights`).
    """
    rows = [
        [*front]
        + [_of_token(prompt, s) for s in tokenizer.spans(prompt.text, max_sequence_length, before)]
        for prompt in prompts
    ]
    if all(weight == 1 for row in rows for weight in row):
        return None
    longest = max(map(len, rows))
    return torch.tensor([row + [1.0] * (longest - len(row)) for row in rows])


def _of_token(prompt: WeightedPrompt, span: tuple[int, int]) -> float:
    """The weight of a token's characters, spaces left out; their mean where they differ."""
    found = [
        prompt.weights[index] for index in range(*span) if not prompt.text[index].isspace()
    ] or [1.0]
    return found[0] if len(set(found)) == 1 else sum(found) / len(found)


def _weight(number: str, mark: str) -> float:
    weight = float(number)
    if abs(weight) > MAX_WEIGHT:
        raise ValueError(
            f"The prompt has the weight {number} in {mark!r}; expected -{MAX_WEIGHT:.0f} to "
            f"{MAX_WEIGHT:.0f}. If it is no weight, write \\( and \\) for the brackets."
        )
    return weight
