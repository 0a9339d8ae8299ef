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


def images_at_once(model, width: int, height: int, limit: int) -> int:
    """Images of a size that one run of a MODEL has memory for, beside its weights; 1 at least."""
    management = comfy.model_management
    room = management.get_total_memory(model.load_device) - model.model_size()
    room -= management.minimum_inference_memory()
    count = 1
    while count < limit:
        shape = [count + 1, 16, 1, height // 8, width // 8]
        if model.model.memory_required(shape) > room:
            break
        count += 1
    return count
