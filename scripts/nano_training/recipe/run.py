"""The run: all stages in one go, within a time, from nothing to files, sheets and exams."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from krea2_model import load_text_encoder, load_transformer, load_vae, nano
from krea2_model.nano.preview import FILE as PREVIEW
from krea2_training.engine.loop import LOG

from ..files import write_lora, write_transformer, write_vae
from ..landscapes.words import landscape_prompts
from ..loop import DEVICE, TimedRates, Timer
from ..scenes import held_out_prompts
from .drawn import Artists, draw_chunk
from .exam import paint, pipeline_of, run_exams
from .loras import train_lora, train_reference
from .plan import Clock, Plan
from .pool import EncodedPool, Pixels
from .preview import fit_preview, write_preview
from .report import Report
from .transformer import KINDS, train_raw, train_turbo
from .vae import train_vae, vae_report

logger = logging.getLogger(__name__)

# In the order of their drawing. The VAE sees some of the pictures that the others see.
VAE_QUEUES = ("practice", "vae landscapes", "vae scenes")
VAE_SHARE = 0.2
POOL_SECONDS = 0.05  # of the time that is left, at most to wait for the first chunks of the pool
FILES = {
    "vae": nano.VAE.name,
    "raw": nano.TRANSFORMERS["raw"].name,
    "turbo": nano.TRANSFORMERS["turbo"].name,
    "lora": nano.LORA.name,
    "reference": nano.REFERENCE_LORA.name,
    "preview": PREVIEW.name,
}


class RecipeRun:
    """A run of the recipe. `folder` holds states, so that a run that was stopped can go on."""

    def __init__(self, output: Path, folder: Path, plan: Plan, seconds: float, workers: int):
        self.output, self.folder, self.plan = output, folder, plan
        self.clock = Clock(seconds)
        self.report = Report(output)
        self.failed: list[str] = []  # stages without which the others went on
        folder.mkdir(parents=True, exist_ok=True)
        self.artists = Artists(folder / "pictures", workers)
        self.request_pictures()

    def request_pictures(self) -> None:
        """Ask for all pictures, first those that are needed first."""
        plan, ask = self.plan, self.artists.request
        ask("practice", plan.practice_chunks, plan.chunk)
        for kind, chunks in (("landscapes", plan.landscape_chunks), ("scenes", plan.scene_chunks)):
            ask(kind, max(1, round(VAE_SHARE * chunks)), plan.chunk, f"vae {kind}")
        ask("scenes", plan.scene_chunks, plan.chunk)
        ask("landscapes", plan.landscape_chunks, plan.chunk)
        ask("notebook", plan.notebook_chunks, plan.chunk)
        ask("references", plan.reference_chunks, plan.reference_chunk)

    def run(self) -> None:
        """All stages. Files are in the output folder as soon as they can be used.

        `failed` names the stages that failed while the others went on.
        """
        torch.backends.cudnn.benchmark = True  # The VAE sees few shapes, each of them often.
        # The text encoder's file is made on first use, in seconds that the VAE's steps can hide.
        making = threading.Thread(target=nano.text_encoder_file, daemon=True)
        making.start()
        try:
            self.report.add("device", _device_name())
            self.stage("vae", self.vae)
            making.join()
            pool = self.encoded_pool()
            self.stage("raw", lambda: self.raw(pool))
            self.stage("raw samples", lambda: self.samples("raw"), needed=False)
            self.stage("turbo", lambda: self.turbo(pool))
            self.stage("turbo samples", lambda: self.samples("turbo"), needed=False)
            self.stage("lora", lambda: self.lora(pool), needed=False)
            self.stage("reference", lambda: self.reference(pool), needed=False)
            self.stage("exam", self.exam, needed=False)
        finally:
            self.artists.close()
        shutil.rmtree(self.artists.folder, ignore_errors=True)

    def stage(self, name: str, function: Callable[[], None], needed: bool = True) -> None:
        """Run a stage and report it. Where others do not need it, its errors are reported too."""
        started = time.monotonic()
        try:
            function()
        except Exception as error:
            if needed:
                raise
            logger.exception("%s failed; the other stages go on", name)
            self.failed.append(name)
            self.report.add(f"{name} error", str(error))
        self.report.add_losses(name, self.folder / name / LOG)
        self.report.add(f"{name} seconds", round(time.monotonic() - started, 1))
        if DEVICE.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 1e9
            self.report.add(f"{name} peak memory (GB)", round(peak, 1))
            torch.cuda.reset_peak_memory_stats()

    def rates(self, stage: str, warmup: int, decay: float) -> TimedRates:
        seconds, steps = self.clock.seconds_of(stage), self.plan.steps_of(stage)
        logger.info("%s: %.0f s", stage, seconds)
        return TimedRates(steps, warmup, decay, timer=Timer(seconds))

    def vae(self) -> None:
        pixels = Pixels()

        def refill(step: int) -> None:
            for queue in VAE_QUEUES if step % 8 == 0 else ():
                # The first step waits: there has to be one chunk of each.
                if (
                    chunk := self.artists.take(queue, wait=step == 0 or not pixels.chunks)
                ) is not None:
                    pixels.add(chunk)

        vae = train_vae(self.folder, pixels, refill, self.rates("vae", 100, 0.5), self.plan)
        write_vae(vae, self.output / FILES["vae"])
        vae = load_vae(self.output / FILES["vae"], dtype=torch.float32, device=DEVICE)
        # Pictures that no training chunk holds.
        unseen = [draw_chunk(kind, -1 - i, self.plan.unseen) for i in range(3) for kind in KINDS]
        images = {
            f"{chunk.kind} {chunk.pictures.shape[2]} x {chunk.pictures.shape[1]} ({i})": (
                torch.from_numpy(chunk.pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
            )
            for i, chunk in enumerate(unseen)
        }
        self.report.add("vae quality", vae_report(vae, images))
        write_preview(fit_preview(vae, unseen), self.output / FILES["preview"])
        shown = [chunk for chunk in unseen if chunk.kind == "landscapes"][:1] + unseen[:1]
        for chunk in shown:
            first = torch.from_numpy(chunk.pictures[:8])
            with torch.no_grad():
                sent = first.permute(0, 3, 1, 2).float().to(DEVICE) / 127.5 - 1
                decoded = vae.decode(vae.encode(sent)).clamp(-1, 1) / 2 + 0.5
            decoded = decoded.movedim(1, -1).cpu().numpy()
            self.report.add_sheet([*(first.numpy() / 255).astype(np.float32), *decoded])

    def encoded_pool(self) -> EncodedPool:
        """The first part of the pool; it grows while Raw trains."""
        started = time.monotonic()
        encoder = load_text_encoder(nano.text_encoder_file(), dtype=torch.float32)
        vae = load_vae(self.output / FILES["vae"], dtype=torch.float32)
        pool = EncodedPool(self.artists, encoder, vae)
        most = self.clock.left * POOL_SECONDS
        for _ in range(self.plan.first_chunks):
            waited = time.monotonic() - started
            if not pool.grow(KINDS, wait=not pool.size or waited < most) or waited > 2 * most:
                break
        seconds = time.monotonic() - started
        self.report.add("pool", {"first pictures": pool.size, "seconds": round(seconds, 1)})
        return pool

    def raw(self, pool: EncodedPool) -> None:
        def write(model):
            write_transformer(model, self.output / FILES["raw"])

        model = train_raw(self.folder, pool, self.rates("raw", 100, 0.3), self.plan, write)
        write(model)
        self.report.add("pictures of raw", pool.size)

    def turbo(self, pool: EncodedPool) -> None:
        def write(model):
            write_transformer(model, self.output / FILES["turbo"])

        rates = self.rates("turbo", 20, 0.5)
        model = train_turbo(self.folder, pool, self.load_raw(), rates, self.plan, write)
        write(model)

    def lora(self, pool: EncodedPool) -> None:
        own = EncodedPool(self.artists, pool.encoder, pool.vae)
        while own.grow(("notebook",), wait=True):
            pass
        rates = self.rates("lora", 30, 0.3)
        tensors = train_lora(self.folder, own, self.load_raw(), rates, self.plan)
        write_lora(tensors, self.output / FILES["lora"])

    def reference(self, pool: EncodedPool) -> None:
        raw, rates = self.load_raw(), self.rates("reference", 30, 0.6)
        tensors = train_reference(self.folder, self.artists, pool, raw, rates, self.plan)
        write_lora(tensors, self.output / FILES["reference"])

    def exam(self) -> None:
        self.artists.cancel()
        self.report.add("exams", run_exams(self.output, self.artists, self.plan, self.clock))

    def load_raw(self):
        return load_transformer(self.output / FILES["raw"], dtype=torch.float32)

    def samples(self, variant: str) -> None:
        """A sheet of landscapes and scenes from prompts of the exams."""
        if not self.plan.exam_landscapes:
            return
        pipeline = pipeline_of(self.output, variant)
        count = 24 if self.plan.exam_landscapes > 24 else self.plan.exam_landscapes
        prompts = [prompt for prompt, _ in landscape_prompts(count)]
        prompts += [prompt for prompt, _ in held_out_prompts()[: max(1, count // 3)]]
        options = {"steps": self.plan.raw_steps} if variant == "raw" else {}
        self.report.add_sheet(list(paint(pipeline, prompts, 256, **options)))


def install(output: Path) -> list[Path]:
    """Copy the files of a finished run over those that ship. Returns their places.

    Raises ValueError where a file is missing, before any is copied.
    """
    missing = [name for name in FILES.values() if not (output / name).is_file()]
    if missing:
        raise ValueError(
            f"{output} has no {', '.join(missing)}; expected all {len(FILES)} files of a finished "
            "run. Run the recipe to its end first."
        )
    return [Path(shutil.copy2(output / name, nano.FOLDER / name)) for name in FILES.values()]


def _device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else DEVICE.type
