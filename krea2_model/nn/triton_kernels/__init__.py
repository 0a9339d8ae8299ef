"""Kernels in Triton for what torch does in several passes over memory.

Each computes what the plain torch code beside its caller computes, which stays the reference and
runs everywhere else. Triton comes with torch for CUDA on Linux; it is imported when a switch of
`switches.py` first wants it, and where it is missing that switch changes nothing. The kernels have
no gradients.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

# Triton supports NVIDIA cards from here on (Ampere).
LEAST_CAPABILITY = (8, 0)

# True while the kernels are in Triton's interpreter, which runs them on a CPU, for tests.
INTERPRETED = False


def takes(*tensors: Tensor) -> bool:
    """True if the kernels run on these tensors: contiguous, on one device with Triton."""
    device = tensors[0].device
    if not all(tensor.device == device and tensor.is_contiguous() for tensor in tensors):
        return False
    return INTERPRETED or (device.type == "cuda" and _works_on(device))


@functools.cache
def _works_on(device: torch.device) -> bool:
    """Tried once a device: Triton also needs a C compiler, which not every machine has."""
    if not torch.version.cuda or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return False
    try:
        from .gates import gated

        gated(*torch.ones(2, 1, device=device), silu=True)
    except ImportError:
        return False
    except Exception as error:
        logging.warning("Triton does not work here, so plain torch runs instead: %s", error)
        return False
    return True
