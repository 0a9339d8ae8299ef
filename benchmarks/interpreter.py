"""The Triton kernels of the pack on a CPU, in Triton's interpreter: for tests, not for speed."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

VARIABLE = "TRITON_INTERPRET"


@contextlib.contextmanager
def interpreted(package: ModuleType) -> Iterator[None]:
    """Within it the kernels of `triton_kernels` (the package as it was imported) are interpreted.

    Triton reads its variable where a kernel is declared. So the modules of kernels are imported
    anew, and the variable is back before anything else, torch's compiler say, may read it.
    """
    # Whole and first: functions of Triton's own are declared as they are imported too.
    importlib.import_module("triton.experimental.gluon")
    names = [f"{package.__name__}.{name}" for name in ("gates", "gguf")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before
    package.INTERPRETED = True
    try:
        with rounding_bfloat16():
            yield
    finally:
        package.INTERPRETED = False
        for name in names:
            del sys.modules[name]
        sys.modules.update(others)


@contextlib.contextmanager
def rounding_bfloat16() -> Iterator[None]:
    """The interpreter cuts bfloat16 off, where a GPU rounds to the nearest."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        return torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = rounded
    try:
        yield
    finally:
        interpreter._convert_float = convert
