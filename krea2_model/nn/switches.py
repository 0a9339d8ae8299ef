"""Kernels that only a measurement on a GPU can judge, one switch each.

`KREA2_KERNELS=gguf,swiglu` in the environment turns these on and the others off, `none` all off.
In Python `switched` does the same for a while: tests and benchmarks compare with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

VARIABLE = "KREA2_KERNELS"

SWITCHES = {
    "gguf": "GGUF blocks to values by one Triton kernel, bit for bit the same",
    "swiglu": "SwiGLU by one Triton kernel, rounded once instead of twice",
    "gate": "the sigmoid gate of attention by one Triton kernel, rounded once instead of twice",
    "cudnn": "attention by cuDNN on the cards and lengths where it is faster",
    "quantise_once": "one quantised input for all layers that read it, bit for bit the same",
}

# The switches that are on without the environment variable: what benchmarks/gpu/GPU.md found worth
# it. The two others make their own operation 1.6 to 3.7 times as fast, and a step 1 % at most.
DEFAULT: frozenset[str] = frozenset({"gguf", "cudnn", "quantise_once"})


def parse(text: str) -> frozenset[str]:
    """Names between commas, or `none`. Raises ValueError for a name that is no switch."""
    return _checked(name.strip() for name in text.split(",") if name.strip() not in ("", "none"))


def _checked(names: Iterable[str]) -> frozenset[str]:
    names = frozenset(names)
    for name in sorted(names - SWITCHES.keys()):
        raise ValueError(
            f"{name!r} is no switch of a kernel; expected {', '.join(SWITCHES)} with commas "
            f"between them, or none. Correct {VARIABLE} in the environment."
        )
    return names


@contextmanager
def switched(*names: str) -> Iterator[None]:
    """Within it these switches are on, and the others off, in all threads."""
    global active
    before, active = active, _checked(names)
    try:
        yield
    finally:
        active = before


# The switches that are on. Read in every layer of every step, so it is no function.
active = parse(os.environ[VARIABLE]) if os.environ.get(VARIABLE, "").strip() else DEFAULT
