"""A process of the check: ComfyUI with the pack, and the sections that share it.

    python -P -m benchmarks.gpu.worker --sections machine step --ends TIME ...

The runner starts it. A section that raises, or passes its time limit, is recorded with its error,
and the next one begins.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from .results import DONE, FAILED, SKIPPED, Results
from .sections import BY_NAME, LEAST_S, Section, flags_of

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

import in_process  # noqa: E402


class TimeLimit(BaseException):
    """A section took too long. No Exception, so that nothing on the way handles it."""


class Worker:
    """Handed to each section: sizes, models, where rows go, and how long it still has."""

    def __init__(self, out: Path, base: Path, tiny: bool):
        self.results, self.base, self.tiny = Results(out), base, tiny
        self.section: Section | None = None
        self.ends = time.time()

    def name_card(self) -> None:
        """Name the card of this run; numbers of another one are dropped, they do not mix."""
        import torch

        card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
        content = self.results.content
        if content["run"].get("card", card) != card:
            content["sections"] = {}
        content["run"]["card"] = card
        self.results.write()

    def row(self, **values: Any) -> None:
        """Record a row of the running section, at once."""
        assert self.section is not None
        self.results.add(self.section.name, values)
        print(self.section.name, values, flush=True)

    def attempt(self, what: str, function, **labels: Any) -> Any:
        """Call `function`; where it fails, record that in a row, and return None."""
        try:
            return function()
        except Exception as error:
            traceback.print_exc()
            self.row(**labels, what=what, passed=False, error=message_of(error))
            return None

    @property
    def seconds_left(self) -> float:
        return self.ends - time.time()

    @functools.cached_property
    def device(self):
        import comfy.model_management

        return comfy.model_management.get_torch_device()

    @functools.cached_property
    def sizes(self):
        from .weights import FULL, TINY

        return TINY if self.tiny else FULL

    @functools.cached_property
    def models(self):
        """The models that are compared; they share one set of weights."""
        from .models import Models

        return Models(self.sizes, self.device, self.base)

    @property
    def ceilings(self):
        """The rates that section "machine" measured, in this run or one before it."""
        from .rooflines import ceilings_from

        return ceilings_from(self.results.rows("machine"))

    def run(self, section: Section, ends: float) -> None:
        import torch

        self.section = section
        started = time.time()
        if ends - started < LEAST_S:
            self.results.end(section.name, SKIPPED, error="no time was left")
            return
        seconds = min(section.seconds, ends - started)
        self.ends = started + seconds
        self.results.begin(section.name)
        signal.signal(signal.SIGALRM, _out_of_time)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        state, error = DONE, ""
        try:
            module = importlib.import_module(f".{section.module}", __package__)
            with torch.inference_mode():
                getattr(module, f"run_{section.name}")(self)
        except TimeLimit:
            state, error = FAILED, f"It took more than its {seconds:.0f} s."
        except Exception as problem:
            traceback.print_exc()
            state, error = FAILED, message_of(problem)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.results.end(section.name, state, time.time() - started, error)
        if is_beyond_repair(error):
            # Of no use to the sections that follow, which get a process of their own.
            sys.exit(1)


def _out_of_time(*_):
    raise TimeLimit


def message_of(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__}: {str(error)[:600]} ({Path(where.filename).name}:{where.lineno})"
    )


def is_beyond_repair(error: str) -> bool:
    """True for an error that leaves CUDA unusable in its process."""
    signs = ("illegal memory access", "device-side assert", "unspecified launch failure",
             "misaligned address")  # fmt: skip
    return any(sign in error for sign in signs)


def start_comfyui(base: Path, *flags: str) -> None:
    """ComfyUI as its main.py sets it up: its allocator, and dynamic VRAM unless a flag forbids.

    Before torch is imported, as there: both have to be there first.
    """
    arguments = sys.argv
    # ComfyUI reads its flags once; `in_process.start` comes too late for its own.
    sys.argv = ["main.py", *flags, "--base-directory", str(base), "--disable-api-nodes"]
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.cli_args import args, enables_dynamic_vram

    sys.argv = arguments
    dynamic = enables_dynamic_vram()
    if dynamic:
        import comfy_aimdo.control

        comfy_aimdo.control.init(
            simple_vram_headroom=args.reserve_vram and int(args.reserve_vram * 1024**3),
            nvml_pressure=not args.disable_nvml_pressure,
        )
    if not args.cpu:
        import cuda_malloc  # noqa: F401 - sets the environment variable of torch's allocator
    in_process.start(base, *flags)
    if dynamic:
        turn_on_dynamic_vram(args.vram_headroom)


def turn_on_dynamic_vram(headroom: float) -> None:
    import comfy.memory_management
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy_aimdo.control

    # It logs every allocation until it is told not to.
    comfy_aimdo.control.set_log_info()
    devices = management.get_all_torch_devices()
    if comfy_aimdo.control.init_devices((d.index, int(headroom * 1024**3)) for d in devices):
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sections", nargs="+", choices=BY_NAME, required=True)
    parser.add_argument("--ends", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="krea2-gpu-") as folder:
        base = Path(folder)
        start_comfyui(base, *flags_of(BY_NAME[options.sections[0]], options.tiny))
        with contextlib.suppress(Exception):  # sections that need it will say what is wrong
            importlib.import_module(".models", __package__)
        # What was imported never becomes garbage, and looking through it takes half a second.
        gc.freeze()
        worker = Worker(options.out, base, options.tiny)
        worker.name_card()
        for name in options.sections:
            worker.run(BY_NAME[name], options.ends)


if __name__ == "__main__":
    main()
