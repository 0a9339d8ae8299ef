"""Wildcards: `{red|dark blue|green}` stands for one of its words, drawn by a seed.

Choices may be nested, up to `MAX_DEPTH` deep, and may be empty; `\\{`, `\\|` and `\\}` are the
characters themselves. `__colour__` stands for a line of the file colour.txt, where a folder of such
files is named.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

# Braces inside each other; nobody writes as many, and each level copies what is inside.
MAX_DEPTH = 64

_TOKEN = re.compile(r"\\[{|}]|[{|}]")


_FILE = re.compile(r"__([A-Za-z0-9][\w\-]*(?:/[A-Za-z0-9][\w\-]*)*?)__")
# Files that name files; more is a circle.
_MAX_FILES = 16


def fill_in(prompt: str, seed: int, folder: Path | None = None) -> str:
    """The prompt with each wildcard replaced by one of its choices; the same seed draws the same.

    folder: text files with choices, a line each; a line may hold wildcards too.
    Raises ValueError where braces do not pair or are nested deeper than `MAX_DEPTH`, and where a
    file is not there, is empty or names itself.
    """
    draw = random.Random(f"{seed}")
    if folder is not None:
        prompt = _from_files(prompt, Path(folder), draw)
    text, end = _sequence(prompt, 0, draw, depth=0)
    if end != len(prompt):
        raise _unpaired(prompt, end)
    return text


def file_wildcard(prompt: str) -> str | None:
    """The first wildcard of a prompt that a file would be for, such as `__colour__`."""
    found = _FILE.search(prompt)
    return None if found is None else found[0]


def _from_files(prompt: str, folder: Path, draw: random.Random) -> str:
    lines: dict[str, list[str]] = {}

    def choose(match: re.Match) -> str:
        name = match[1]
        if name not in lines:
            lines[name] = _lines(folder / f"{name}.txt", match[0])
        return draw.choice(lines[name])

    for _ in range(_MAX_FILES):
        prompt, count = _FILE.subn(choose, prompt)
        if not count:
            return prompt
    raise ValueError(
        f"The wildcards in {folder} name each other more than {_MAX_FILES} deep; expected files "
        "that do not name themselves."
    )


def _lines(path: Path, wildcard: str) -> list[str]:
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The wildcard {wildcard} needs {path}, which cannot be read. Make that file, with a "
            "choice a line."
        ) from error
    found = [line for line in found if line and not line.startswith("#")]
    if not found:
        raise ValueError(
            f"The wildcard {wildcard} needs a choice a line in {path}, which is empty."
        )
    return found


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
