"""Regions as text: JSON of a file for the command line, and of Krea 2 Regions' canvas.

    [
      {"prompt": "a ruined castle", "box": "background", "end": 0.6},
      {"prompt": "a knight in red", "box": [0, 0.2, 0.5, 0.8]},
      {"prompt": "a dragon", "mask": "dragon.png", "soft": 0.1, "strength": 1.2,
       "loras": [["dragon.safetensors", 0.8]]}
    ]

Entries are arguments of `regions.Region`; all but a prompt and a box or a mask may be left out. A
file may also be an object with the list as "regions" beside options of `regions.Regions`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..checks import is_number, is_whole
from ..images.region_shapes import check_count

# Options of `regions.Regions` that a file may hold.
_OPTIONS = ("text_factor", "separate", "places", "soft", "in_prompt")
EXAMPLE = (
    '[{"prompt": "a red fox", "box": [0, 0, 0.5, 1]}, '
    '{"prompt": "a blue owl", "box": [0.5, 0, 0.5, 1]}]'
)
# Characters of a value in an error.
_LONGEST = 60

# The words for what an entry has to be, and a test of it.
_Check = tuple[str, Callable[[Any], bool]]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_box(value: Any) -> bool:
    return _is_text(value) or (_is_list(is_number)(value) and len(value) == 4)


def _is_lora(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and _is_text(value[0]) and is_number(value[1])


def _is_count(value: Any) -> bool:
    return is_whole(value) and value >= 1


_NUMBER: _Check = ("a number", is_number)
_ENTRIES: dict[str, _Check] = {
    "prompt": ("a text", _is_text),
    "box": ('four fractions of the image, [left, top, width, height], or "background"', _is_box),
    "strength": _NUMBER,
    "start": _NUMBER,
    "end": _NUMBER,
    "soft": _NUMBER,
    "loras": (
        'a list of [file, strength], such as [["style.safetensors", 0.8]]',
        _is_list(_is_lora),
    ),
}
_OF_FILES: dict[str, _Check] = {
    "mask": ("the name of a picture", _is_text),
    "images": ("a list of names of pictures", _is_list(_is_text)),
}
_OF_INPUTS: dict[str, _Check] = {
    "mask": ("the number of a mask, from 1", _is_count),
    "images": ("a list of numbers of images, from 1", _is_list(_is_count)),
}


def read_regions(
    text: str, *, by_number: bool = False
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Arguments of each `regions.Region` and options of `regions.Regions`, from JSON.

    by_number: masks and images are numbers of a node's inputs, from 1, and there are no options;
        else names of files.

    Raises ValueError that names the region and the entry.
    """
    if not isinstance(text, str):
        raise ValueError(f"regions is {text!r}; expected a list as JSON: {EXAMPLE}.")
    try:
        found = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"regions cannot be read ({error}); expected {EXAMPLE}.") from error
    options: dict[str, Any] = {}
    if isinstance(found, dict) and not by_number:
        options = dict(found)
        found = options.pop("regions", None)
        _check_names("The object with regions", options, _OPTIONS)
    if not isinstance(found, list):
        raise ValueError(f"regions is {_shown(found)}; expected a JSON list such as {EXAMPLE}.")
    check_count(len(found))
    entries = _ENTRIES | (_OF_INPUTS if by_number else _OF_FILES)
    return [_region(entry, n, entries) for n, entry in enumerate(found, start=1)], options


def _region(entry: Any, number: int, entries: Mapping[str, _Check]) -> dict[str, Any]:
    name = f"Region {number}"
    if not isinstance(entry, dict):
        raise ValueError(f'{name} is {_shown(entry)}; expected {{"prompt": ..., "box": ...}}.')
    _check_names(name, entry, entries)
    for key, value in entry.items():
        expected, check = entries[key]
        if not check(value):
            raise ValueError(f"{name} has {key} {_shown(value)}; expected {expected}.")
    arguments = dict(entry)
    if "loras" in arguments:
        arguments["loras"] = [(file, strength) for file, strength in arguments["loras"]]
    return arguments


def _check_names(where: str, entries: Mapping, known: Mapping | Sequence[str]) -> None:
    for name in entries:
        if name not in known:
            raise ValueError(f"{where} has {name!r}; expected only {', '.join(known)}.")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
