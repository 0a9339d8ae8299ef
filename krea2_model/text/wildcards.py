"""Wildcards: `{red|dark blue|green}` stands for one of its words, drawn by a seed.

Choices may be nested, up to `MAX_DEPTH` deep, and may be empty; `\\{`, `\\|` and `\\}` are the
characters themselves.
"""

from __future__ import annotations

import random
import re

# Braces inside each other; nobody writes as many, and each level copies what is inside.
MAX_DEPTH = 64

_TOKEN = re.compile(r"\\[{|}]|[{|}]")


def fill_in(prompt: str, seed: int) -> str:
    """The prompt with each wildcard replaced by one of its choices; the same seed draws the same.

    Raises ValueError where braces do not pair or are nested deeper than `MAX_DEPTH`.
    """
    text, end = _sequence(prompt, 0, random.Random(f"{seed}"), depth=0)
    if end != len(prompt):
        raise _unpaired(prompt, end)
    return text


def _sequence(prompt: str, start: int, draw: random.Random, depth: int) -> tuple[str, int]:
    """Text from `start` up to a `|` or `}` that is not its own, and where that is."""
    parts, at = [], start
    while token := _TOKEN.search(prompt, at):
        mark = token[0]
        parts.append(prompt[at : token.start()])
        if len(mark) == 2:
            parts.append(mark[1])
        elif mark == "{":
            choice, at = _choices(prompt, token.end(), draw, depth + 1)
            parts.append(choice)
            continue
        elif depth:
            return "".join(parts), token.start()
        elif mark == "}":
            raise _unpaired(prompt, token.start())
        else:
            parts.append(mark)  # a bar outside of braces is a bar
        at = token.end()
    return "".join([*parts, prompt[at:]]), len(prompt)


def _choices(prompt: str, start: int, draw: random.Random, depth: int) -> tuple[str, int]:
    """One of the choices that begin at `start`, and where the text goes on after the brace."""
    if depth > MAX_DEPTH:
        raise ValueError(
            f"The brace at position {start - 1} of the prompt is nested {depth} deep; expected at "
            f"most {MAX_DEPTH}. Take wildcards out of others, or write \\{{ and \\}} for braces as "
            "such."
        )
    choices, at = [], start
    while True:
        choice, at = _sequence(prompt, at, draw, depth)
        choices.append(choice)
        if at == len(prompt):
            raise _unpaired(prompt, start - 1)
        if prompt[at] == "}":
            return draw.choice(choices), at + 1
        at += 1


def _unpaired(prompt: str, at: int) -> ValueError:
    return ValueError(
        f"The brace at position {at} of the prompt has no partner: ...{prompt[at : at + 30]!r}. "
        "Wildcards look like {red|blue}; write \\{ and \\} for braces as such."
    )
