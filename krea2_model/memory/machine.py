"""Free memory of this machine's devices."""

from __future__ import annotations

import torch

GB = 10**9


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
