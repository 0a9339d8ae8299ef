"""Devices of this machine and how much of their memory is free."""

from __future__ import annotations

import torch

GB = 10**9


def find_device(device: str | torch.device) -> torch.device:
    """A device by its name; "auto" is the machine's accelerator, or else the CPU.

    Raises ValueError for names of no device, and for CUDA where there is none.
    """
    if device == "auto":
        return _accelerator()
    try:
        result = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device is {device!r}; expected 'auto', 'cpu', 'cuda', 'cuda:1', 'mps' or 'xpu'."
        ) from error
    if result.type == "cuda" and (result.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {device!r}, and torch finds {torch.cuda.device_count()} CUDA devices here; "
            "use 'auto' or 'cpu', or install torch for CUDA."
        )
    return result


def _accelerator() -> torch.device:
    accelerator = getattr(torch, "accelerator", None)  # torch has it since 2.6
    if accelerator is not None:
        device = accelerator.current_accelerator() if accelerator.is_available() else None
        # A machine may have one that models cannot run on.
        return device if device is not None and device.type != "meta" else torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def free_device_bytes(device: torch.device) -> int | None:
    """Free memory of a device, torch's cache included; None where it is main memory."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    module = getattr(torch, device.type, None)
    get_info = getattr(module, "mem_get_info", None)
    return None if get_info is None else get_info(device)[0]


def empty_cache(device: torch.device) -> None:
    """Return a device's memory that torch's allocator caches."""
    module = getattr(torch, device.type, None)
    empty = getattr(module, "empty_cache", None)
    if empty is not None:
        empty()


def free_host_bytes() -> int:
    """Main memory that may be taken without others being moved to disk.

    0 where psutil, which ComfyUI brings, is not there to tell.
    """
    try:
        import psutil
    except ImportError:
        return 0
    return psutil.virtual_memory().available
