"""Out of memory: ComfyUI's own exception, with the cause and a remedy in its message."""

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management


@contextmanager
def advise(what: str, remedy: str) -> Iterator[None]:
    """Say in an out-of-memory error what ran out of memory, and the remedy.

    It stays the exception that ComfyUI frees all models for.
    """
    management = comfy.model_management
    try:
        yield
    except Exception as error:
        management.raise_non_oom(error)
        raise management.OOM_EXCEPTION(f"{what} ran out of memory. {remedy} ({error})") from error
