"""Errors of the command line, in the words of its options."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches

# Exit codes: a command line or a file that is wrong, a run that failed, a run that was stopped.
WRONG, FAILED, STOPPED = 2, 1, 130

MEMORY_ADVICE = (
    "Try --offload blocks, a smaller --max-memory, fewer pixels (--width, --height), or a smaller "
    "model file (krea2 models)."
)

# Arguments of the library that have options of another name.
_OPTIONS = {
    "num_images": "--images",
    "negative_prompt": "--negative",
    "quantise": "--quantise",
    "scale": "--nag-scale",
    "limit": "--nag-limit",
    "blend": "--nag-blend",
    "ramp": "--guidance-ramp",
    "rescale": "--guidance-rescale",
}
_ARGUMENT = re.compile(r"^([a-z][a-z_]+)(?= is )")


class UsageError(ValueError):
    """A command line that is wrong: what was typed, what was expected, what to do."""


def goes_with(option: str, needed: str) -> UsageError:
    """The error for an option that would do nothing without another."""
    return UsageError(f"{option} goes with {needed}; add it, or leave {option} out.")


class Failure(RuntimeError):
    """A run that could not be completed, with the remedy."""


def in_options(message: str, names: Iterable[str] = ()) -> str:
    """A message of the library that begins with an argument's name, with the option's instead.

    names: the options that there are, as `args` has them.
    """

    def option(match: re.Match) -> str:
        name = match[1]
        if name in _OPTIONS:
            return _OPTIONS[name]
        return f"--{name.replace('_', '-')}" if name in names else name

    return _ARGUMENT.sub(option, message)


def suggestion(word: str, words: Iterable[str], cutoff: float = 0.7) -> str:
    """` Did you mean this?`, or nothing where no word is close."""
    close = get_close_matches(word, list(words), 1, cutoff)
    return f" Did you mean {close[0]}?" if close else ""


def explain(error: BaseException, names: Iterable[str] = ()) -> tuple[str, int] | None:
    """The line and the exit code for an error that a user can cause; None for any other."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped", STOPPED
    if isinstance(error, UsageError):
        return str(error), WRONG
    if isinstance(error, Failure):
        return str(error), FAILED
    if is_out_of_memory(error):
        return f"Memory ran out. {MEMORY_ADVICE}", FAILED
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        place = f" while writing {error.filename}" if error.filename else ""
        return f"The disk is full{place}. Make room, or choose a place on another disk.", FAILED
    if isinstance(error, (ValueError, OSError)):
        return in_options(_line(error), names), WRONG
    if isinstance(error, RuntimeError) and re.search(r"\b(CUDA|HIP|XPU|MPS)\b", str(error)):
        return f"The device failed: {_line(error)}. Try --device cpu, or restart it.", FAILED
    if isinstance(error, ImportError) and error.name:
        return f"The Python package {error.name} is missing: pip install {error.name}", FAILED
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """True for Python's and torch's errors of memory, of any device."""
    torch = sys.modules.get("torch")
    kinds = (MemoryError, *((torch.OutOfMemoryError,) if torch is not None else ()))
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
