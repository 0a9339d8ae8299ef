"""Rewards: functions of a user's own, or servers, that give pictures scores.

    def score(pictures, rows):
        return pictures.mean(axis=(1, 2, 3))

pictures (N, H, W, 3) float32 in [0, 1]; rows: a dict for each, with "prompt" and what else its row
of the table has (a rubric, for example). Returns N numbers, of which more is better.

A server takes the same by POST, as JSON: {"images": [a PNG in base64, ...], "rows": [...]}, and
answers {"scores": [...]}.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import logging
import math
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from krea2_model.checks import counted
from krea2_model.images.output_files import to_picture

from .data.prompts import Row

logger = logging.getLogger(__name__)

# Scores (N,) of pictures (N, H, W, 3) and their rows.
Function = Callable[[np.ndarray, Sequence[Row]], Any]

ADDRESSES = ("http://", "https://")
_TIMEOUT = 300  # seconds, of an answer
_TRIES = 4
_WAIT = 2  # seconds before the second try, and twice as many before each other
_SHOWN = 200  # characters of a server's answer in a message


class _ServerError(Exception):
    """The rest of a sentence that begins with the server's name."""


class Reward:
    """A reward by its name: `file.py:function`, `package.module:function`, or an address.

    Raises ValueError for one that is not there.
    """

    def __init__(self, name: str):
        self.name = name if name.startswith(ADDRESSES) else Path(name).name
        self._score = _server(name) if name.startswith(ADDRESSES) else _function(name)

    def __call__(self, pictures: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
        """Scores (N,), float64. Raises ValueError for an answer that is no N finite numbers."""
        try:
            answer = self._score(pictures, rows)
        except _ServerError as error:
            raise ValueError(f"The reward {self.name} {error}") from error
        except Exception as error:
            raise ValueError(f"The reward {self.name} failed: {error!r}.") from error
        expected = f"a finite number for each of {counted(len(rows), 'picture')}"
        try:
            scores = np.asarray(answer, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The reward {self.name} gave {_start(answer)}; expected {expected}."
            ) from error
        if scores.shape != (len(rows),):
            raise ValueError(
                f"The reward {self.name} gave scores of shape {scores.shape}; expected {expected}."
            )
        wrong = [index for index, score in enumerate(scores) if not math.isfinite(score)]
        if wrong:
            row = rows[wrong[0]]
            raise ValueError(
                f"The reward {self.name} gave {scores[wrong[0]]} for a picture of "
                f"{row['prompt']!r}; expected {expected}."
            )
        return scores


def _function(name: str) -> Function:
    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        raise ValueError(
            f"reward.rewards has {name!r}; expected file.py:function, package.module:function, or "
            "an address that begins with http:// or https://."
        )
    module = _module(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        known = ", ".join(n for n, v in vars(module).items() if callable(v) and n[0] != "_")
        raise ValueError(f"{place} has no function {attribute}; it has {known or 'none'}.")
    return function


def _module(place: str) -> ModuleType:
    """A Python file, or a module by its name, which is run."""
    if place in sys.modules:
        return sys.modules[place]
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise ValueError(
            f"reward.rewards has {place}, which is not there; expected a Python file. Check the "
            "name and the folder."
        )
    # Under a name of its own: score.py may be a module's name too.
    name = f"krea2_reward_{Path(place).stem}" if is_file else place
    try:
        if is_file:
            spec = importlib.util.spec_from_file_location(name, place)
        else:
            spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(f"No module named {name}; or is it a file.py?")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"The reward's {place} cannot be loaded: {error!r}.") from error
    return module


def _server(address: str) -> Function:
    def score(pictures: np.ndarray, rows: Sequence[Row]) -> Any:
        question = {"images": [_png(picture) for picture in pictures], "rows": list(rows)}
        try:
            body = json.dumps(question).encode()
        except TypeError as error:
            raise _ServerError(f"cannot be sent a row of the prompts as JSON: {error}.") from error
        answer = _post(address, body)
        try:
            return json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError) as error:
            said = _start(answer.decode(errors="replace"))
            raise _ServerError(f'answered {said}; expected {{"scores": [...]}}.') from error

    return score


def _post(address: str, body: bytes) -> bytes:
    """A server's answer. Tries again where it is busy or out of reach, and not where it refuses."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, body, headers)  # noqa: S310 - http or https
    for left in reversed(range(_TRIES)):
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:  # noqa: S310
                return answer.read()
        except urllib.error.HTTPError as error:
            said = f"{error.code} {error.reason}: {_start(error.read().decode(errors='replace'))}"
            if error.code < 500 and error.code != 429:
                raise _ServerError(f"refused the pictures: {said}.") from error
        except OSError as error:
            said = str(getattr(error, "reason", error))
        if left:
            wait = _WAIT * 2 ** (_TRIES - 1 - left)
            logger.warning("%s: %s. Trying again in %d s.", address, said, wait)
            time.sleep(wait)
    raise _ServerError(
        f"did not answer in {_TRIES} tries: {said}. Start the server, and then the command again, "
        "which goes on from the last state."
    )


def _png(picture: np.ndarray) -> str:
    stored = io.BytesIO()
    to_picture(picture).save(stored, "PNG")
    return base64.b64encode(stored.getvalue()).decode()


def _start(value: Any) -> str:
    return repr(value)[:_SHOWN]
