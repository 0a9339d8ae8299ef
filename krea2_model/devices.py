"""Devices and dtypes by their names."""

from __future__ import annotations

import torch

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
}


def find_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype to calculate in, by its name too; None stays None.

    Raises ValueError for what is none of floating-point numbers of 16 bits or more.
    """
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype.removeprefix("torch."), dtype)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(
            f"dtype is {dtype!r}; expected torch.bfloat16, torch.float16 or torch.float32, one of "
            "their names, or None for the file's own."
        )
    return dtype  # type: ignore[return-value]


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
