"""Devices of this machine and how much of their memory is free."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

GB = 10**9


def find_device(device: str | torch.device) -> torch.device:
    """A device by its name; "auto" is the machine's accelerator, or else the CPU.

    Raises ValueError for names of no device, and for CUDA where there is none.
    """
    if device == "auto":
        return _accelerator()
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device is {device!r}; expected 'auto', 'cpu', 'cuda', 'cuda:1', 'mps' or 'xpu'."
        ) from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {device!r}, and torch finds {torch.cuda.device_count()} CUDA devices here; "
            "use 'auto' or 'cpu', or install torch for CUDA."
        )
    return found


def _accelerator() -> torch.device:
    accelerator = getattr(torch, "accelerator", None)  # torch has it since 2.6
    if accelerator is not None:
        found = accelerator.current_accelerator() if accelerator.is_available() else None
        # A machine may have one that models cannot run on.
        return found if found is not None and found.type != "meta" else torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def free_device_bytes(device: torch.device) -> int | None:
    """Memory of a device that nobody uses, torch's own reserve included; None where it is main
    memory."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    module = getattr(torch, device.type, None)
    get_info = getattr(module, "mem_get_info", None)
    return None if get_info is None else get_info(device)[0]


def give_back(device: torch.device) -> None:
    """Let others have what torch keeps of a device's memory for later."""
    module = getattr(torch, device.type, None)
    empty = getattr(module, "empty_cache", None)
    if empty is not None:
        empty()


def free_host_bytes() -> int:
    """Main memory that a program may still take without others being moved to disk."""
    found = [free for free in (_free_of_system(), _free_of_container()) if free is not None]
    return max(0, min(found, default=0))


def _free_of_system() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return _free_of_windows()
    try:
        # What is free in between is not told; a half is a guess on the safe side.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError, AttributeError):
        return None


def _free_of_windows() -> int | None:
    class Status(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", *"abcde")),
        ]

    status = Status()
    status.length = ctypes.sizeof(Status)
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
    return int(status.free) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None


def _free_of_container() -> int | None:
    """Below the limit of a control group, where there is one."""
    group = Path("/sys/fs/cgroup")
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return None
