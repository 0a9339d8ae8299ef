"""The device of a launch."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def current(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device the current one, on which Triton launches."""
    on_gpu = tensor.device.type == "cuda"
    return torch.cuda.device(tensor.device) if on_gpu else contextlib.nullcontext()
