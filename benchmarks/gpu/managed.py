"""Sections "dynamic" and "static": ComfyUI's memory management as users have it.

On blocks of the released size, 12 of the 28: most of the time goes to bringing them to main memory.
The same picture whole, with VRAM capped, with a LoRA on every weight, after another model, after a
cancelled job and after one that ran out of memory; VRAM and main memory are back afterwards. Caps
are real: an allocation holds the rest of the card.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.memory_management
import comfy.model_management as management
import comfy.model_prefetch
import comfy.patcher_extension
import comfy_aimdo.model_vbar
import torch
from safetensors.torch import save_file
from torch import Tensor

import in_process

from . import measure, models, weights
from .images import conditioning, our_run

# The model has 12 GB.
BLOCKS, CAPS_GB = 12, (6, 4, 8)
STEPS = 3
# Of latents after a run. Partly loaded is the same arithmetic on the same weights, but a LoRA is
# rounded into a weight where it is whole and added on use where it is streamed.
LIMIT, LORA_LIMIT = 1e-2, 5e-2
# What may stay: contexts and workspaces of CUDA's libraries, Python's own.
VRAM_SLACK_GB, HOST_SLACK_GB = 1.0, 2.0
RAW_BLOCKS = 8


def run_dynamic(worker) -> None:
    Managed(worker).run()


def run_static(worker) -> None:
    Managed(worker).run()


class Managed:
    def __init__(self, worker):
        self.worker, self.pixels = worker, worker.sizes.small_image
        self.is_dynamic = bool(comfy.memory_management.aimdo_enabled)
        text = worker.sizes.steps[0][1]
        self.texts = (conditioning(worker, text, 1), conditioning(worker, text, 2))
        self.caps = CAPS_GB[:1] if worker.tiny else CAPS_GB
        config = worker.sizes.transformer
        self.config = replace(config, num_layers=min(BLOCKS, config.num_layers))
        # Of the model whole, once that is measured.
        self.step_s = 0.0

    def run(self) -> None:
        worker, is_dynamic = self.worker, self.is_dynamic
        wanted = worker.section.name == "dynamic" and worker.device.type == "cuda"
        worker.row(what="how", dynamic=is_dynamic, passed=is_dynamic == wanted,
                   vram_state=management.vram_state.name,
                   pinned_limit_gb=management.MAX_PINNED_MEMORY / measure.GB)  # fmt: skip
        before = measure.free_bytes()
        started = time.time()
        self.model = self.load(self.config, "krea2_turbo_random.safetensors")
        worker.row(what="loaded", seconds=time.time() - started)
        self.expected = self.timed("whole", lambda: self.picture(self.model))
        host = self.after_unloading()
        for what, check in (
            ("LoRA, whole", self.lora_whole),
            *((f"capped at {cap} GB", lambda c=cap: self.capped(c)) for cap in self.caps),
            ("another model in between", self.switch),
            ("after a cancelled job", self.cancel),
            ("after running out of memory", self.out_of_memory),
        ):
            worker.attempt(what, check)
        management.unload_all_models()
        self.worker.row(what="afterwards", **self.left_behind(before, host))

    def load(self, config, name: str):
        """A MODEL over weights in main memory, as a file would be mapped."""
        made = weights.transformer_tensors(config, self.worker.device, torch.bfloat16)
        dtype = self.worker.models.dtype
        tensors = {key: made.pop(key).to("cpu", dtype) for key in list(made)}
        measure.free_bytes()
        load = in_process.pack_module("nodes.managed.model").load_model
        with models.sharing_storage(self.worker.device):
            patcher = load(models.as_checkpoint(tensors, Path(name)))
        patcher.cached_patcher_init = None  # it would hold the tensors a second time
        return patcher

    def picture(self, model) -> Tensor:
        """Latents of a run, and what ComfyUI's executor does after each node."""
        try:
            return our_run(self.worker, model, self.pixels, STEPS, 0.0, self.texts)()
        finally:
            if self.is_dynamic:
                management.reset_cast_buffers()
                comfy.model_prefetch.cleanup_prefetch_queues()
                comfy_aimdo.model_vbar.vbars_reset_watermark_limits()

    def timed(self, what: str, make: Callable[[], Tensor], limit: float = LIMIT, **more: Any):
        """A run twice: the first has to load, the second is timed and compared."""
        first = measure.milliseconds(make) / 1e3
        results: list[Tensor] = []
        peak = measure.peak_bytes(lambda: results.append(make()))
        repeats = 1 if self.worker.tiny else 2
        seconds = min(measure.milliseconds(make) / 1e3 for _ in range(repeats))
        expected = more.pop("expected", None)
        row = {"what": what, "first_s": first, "step_s": seconds / STEPS,
               "peak_gb": peak / measure.GB, "loaded_gb": loaded_gb(),
               "card_free_gb": card_free_gb(), **more}  # fmt: skip
        self.step_s = self.step_s or row["step_s"]
        if expected is not None:
            error = measure.error_of(results[0], expected)
            row |= {"error": error, "limit": limit, "passed": error <= limit}
        self.worker.row(**row)
        return results[0]

    def lora_whole(self) -> None:
        """Every weight has a part in it: low rank for matrices, differences for the others."""
        folder = self.worker.base / "models" / "loras"
        folder.mkdir(exist_ok=True)
        shapes = weights.Krea2Transformer(self.config, device="meta")
        generator = torch.Generator().manual_seed(8)
        lora = {}
        for module_name, meta in shapes.state_dict().items():
            key = f"diffusion_model.{weights.module_to_official(module_name)}"
            layer, is_weight = key.removesuffix(".weight"), key.endswith(".weight")
            if is_weight and meta.ndim == 2:
                rows, columns = meta.shape
                down = torch.randn(2, columns, generator=generator) * columns**-0.5
                lora[f"{layer}.lora_A.weight"] = down
                lora[f"{layer}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) * 0.1
            else:
                bias = key.endswith(".bias")
                name = f"{key.removesuffix('.bias')}.diff_b" if bias else f"{key}.diff"
                lora[name] = 0.05 * torch.randn(meta.shape, generator=generator)
        save_file(lora, folder / "everywhere.safetensors")
        self.patched = in_process.run_node(
            "K2LoraLoader", model=self.model, lora="everywhere.safetensors", strength=1.0
        )[0]
        every = len(self.patched.patches) == len(shapes.state_dict())
        self.expected_lora = self.timed(
            "LoRA, whole",
            lambda: self.picture(self.patched),
            patches=len(self.patched.patches),
            reaches_all=every,
        )
        change = measure.error_of(self.expected_lora, self.expected)
        self.worker.row(what="LoRA changes the picture", change=change,
                        passed=every and change > 0.05)  # fmt: skip

    def capped(self, cap_gb: float) -> None:
        with self.only(cap_gb):
            name = f"capped at {cap_gb} GB"
            self.timed(name, lambda: self.picture(self.model), expected=self.expected,
                       floor_s=self.floor_s(cap_gb))  # fmt: skip
            if cap_gb == CAPS_GB[0] or self.worker.seconds_left > 40:
                self.timed(f"LoRA, {name}", lambda: self.picture(self.patched), LORA_LIMIT,
                           expected=self.expected_lora)  # fmt: skip

    def floor_s(self, cap_gb: float) -> float | None:
        """A step at the least: the whole model's, or bringing what the card has no room for."""
        rate = self.worker.ceilings.pinned_bytes_a_ms
        if not rate:
            return None
        beyond = max(0.0, self.model.model_size() - cap_gb * measure.GB)
        return max(self.step_s, beyond / rate / 1e3)

    @contextlib.contextmanager
    def only(self, cap_gb: float) -> Iterator[None]:
        """So much VRAM and no more, for models and work together."""
        management.unload_all_models()
        ballast = None
        if measure.has_gpu():
            rest = measure.free_bytes() - int(cap_gb * measure.GB)
            ballast = torch.empty(max(rest, 0), dtype=torch.uint8, device=self.worker.device)
        try:
            yield
        finally:
            management.unload_all_models()
            del ballast
            measure.free_bytes()

    def switch(self) -> None:
        """Raw of fewer blocks in between, so that main memory holds both."""
        config = replace(self.config, num_layers=min(RAW_BLOCKS, self.config.num_layers))
        raw = self.load(config, "krea2_raw_random.safetensors")
        finite = bool(torch.isfinite(self.picture(raw)).all())
        error = measure.error_of(self.picture(self.model), self.expected)
        del raw
        self.worker.row(what="another model in between", error=error, limit=LIMIT,
                        passed=finite and error <= LIMIT)  # fmt: skip

    def cancel(self) -> None:
        """Interrupted at the second step, as the page's button does."""

        def interrupt(count: int) -> None:
            if count == 2:
                management.interrupt_current_processing()

        self.survives("after a cancelled job", interrupt, management.InterruptProcessingException)

    def out_of_memory(self) -> None:
        """In the middle of a step, by an allocation that no card has room for."""

        def allocate(count: int) -> None:
            if count == 2:
                if not measure.has_gpu():
                    raise management.OOM_EXCEPTION("tried without a GPU")
                size = 2 * torch.cuda.get_device_properties(0).total_memory
                torch.empty(size, dtype=torch.uint8, device=self.worker.device)

        self.survives("after running out of memory", allocate, management.OOM_EXCEPTION)

    def survives(self, what: str, disturb: Callable[[int], None], expected: type) -> None:
        model, count = self.model.clone(), 0

        def wrapper(executor, *arguments, **options):
            nonlocal count
            count += 1
            disturb(count)
            return executor(*arguments, **options)

        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        model.add_wrapper_with_key(kind, "gpu_check", wrapper)
        raised = False
        try:
            self.picture(model)
        except expected:
            raised = True
        finally:
            management.interrupt_current_processing(False)
        del model
        gc.collect()
        if expected is management.OOM_EXCEPTION:  # as ComfyUI's executor does
            management.unload_all_models()
            management.soft_empty_cache()
        error = measure.error_of(self.picture(self.model), self.expected)
        self.worker.row(what=what, raised=raised, error=error, limit=LIMIT,
                        passed=raised and error <= LIMIT)  # fmt: skip

    def after_unloading(self) -> int:
        management.unload_all_models()
        management.soft_empty_cache()
        return measure.host_bytes()

    def left_behind(self, free_before: int, host_before: int) -> dict[str, Any]:
        """With the model unloaded but still there, as between two jobs."""
        host = self.after_unloading()
        vram = (free_before - measure.free_bytes()) / measure.GB
        grown = (host - host_before) / measure.GB
        fits = vram <= VRAM_SLACK_GB and grown <= HOST_SLACK_GB
        return {"vram_gb": vram, "host_gb": grown, "passed": fits}


def card_free_gb() -> float | None:
    return torch.cuda.mem_get_info()[0] / measure.GB if measure.has_gpu() else None


def loaded_gb() -> float:
    loaded = [entry.model.loaded_size() for entry in management.current_loaded_models]
    return sum(loaded) / measure.GB
