"""Make nano's Raw from nothing by `krea2 pretrain`, and give it nano's exam, in one run.

    python scripts/pretrain_nano.py --limit 9000     # two hours on two cores of a CPU
    python scripts/pretrain_nano.py --batch 128 --seconds 110     # minutes of a GPU
    python scripts/pretrain_nano.py --toy            # all of it in a minute or two of a CPU

Writes nano_raw.safetensors, pretrain.json (times, losses, percentages), sheet.png, loss.png and
log.txt to the output, by default $OUT. Training is interrupted when the limit is near, and the
last result on the way is examined instead. Settings: scripts/nano_training/pretrain_nano.toml.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

CONFIG = ROOT / "scripts" / "nano_training" / "pretrain_nano.toml"
FILES = ("nano_raw.safetensors", "pretrain.json", "sheet.png", "loss.png", "log.txt")
EXAM_SECONDS = 20  # of a GPU, that the limit leaves for the exam
STOP_SECONDS = 15  # in which an interrupted run ends its step and writes its files
SHOWN = 24  # pictures of the sheet
MEASURED = 20  # steps of each stage that show how long one takes


class Pretraining:
    """A run of all parts. Numbers are in the output as soon as they are known."""

    def __init__(self, options: argparse.Namespace, work: Path):
        self.options, self.output, self.work = options, options.output, work
        self.output.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        self.numbers: dict[str, Any] = {"seconds": {}}
        self.config = work / CONFIG.name
        self.log = self.output / "log.txt"
        self.log.unlink(missing_ok=True)

    def run(self) -> None:
        options = self.options
        table = settings(options)
        self.config.write_text(as_toml(table), encoding="utf-8")
        self.add("settings", table)
        script = ROOT / "scripts" / "nano_training"
        with self.part("folder"):
            self.call(
                script / "write_folder.py", self.work / "pictures",
                "--pictures", options.pictures, "--captions", options.captions,
                "--workers", options.workers, "--masks",
            )  # fmt: skip
        with self.part("text encoder"):  # made once, before processes would do it at once
            self.call("-c", "from krea2_model import nano; nano.text_encoder_file()")
        with self.part("cache"):
            self.call(script / "fill_cache.py", self.config, "--processes", options.processes)
        if options.seconds:
            with self.part("measuring"):
                table = self.fitted(table)
        with self.part("training"):
            threading.Thread(target=import_exam, daemon=True).start()
            left = options.limit - (time.monotonic() - self.started) - EXAM_SECONDS
            words = ("-m", "krea2_model", "pretrain", self.config, "--quiet")
            self.add("interrupted", self.call(*words, seconds=max(1.0, left)))
        self.collect(table["stages"]["steps"])
        if options.exam and (self.output / FILES[0]).is_file():
            with self.part("exam"):
                self.exam()

    def call(self, *words: object, seconds: float | None = None) -> bool:
        """Run Python with some words; True if it had to be interrupted after so many seconds."""
        command = [sys.executable, *map(str, words)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        environment.setdefault("OMP_NUM_THREADS", "2")
        with self.log.open("a", encoding="utf-8") as log:
            child = subprocess.Popen(
                command, cwd=self.work, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGINT)
                try:
                    child.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
                return True
        if child.returncode:
            raise SystemExit(f"{command} ended with {child.returncode}; {self.log} says why.")
        return False

    def fitted(self, table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The settings with as many steps as the seconds have; writes them.

        A run of a few steps of each stage shows how long one takes.
        """
        count = len(table["stages"]["steps"])
        few = {**table["stages"], "steps": [MEASURED] * count}
        probe = self.work / "probe.toml"
        path = {"path": "probe.safetensors", "keep": 0}
        probe.write_text(as_toml({**table, "stages": few, "output": path}), encoding="utf-8")
        self.call("-m", "krea2_model", "pretrain", probe, "--quiet")
        measured = log_summary(read_log(self.work / "probe"), few["steps"])
        self.add("measured", measured)
        per_step = [stage["seconds a step"] for stage in measured]
        whole = sum(
            steps * seconds
            for steps, seconds in zip(table["stages"]["steps"], per_step, strict=True)
        )
        self.options.scale *= self.options.seconds / whole
        table = settings(self.options)
        self.config.write_text(as_toml(table), encoding="utf-8")
        self.add("settings", table)
        return table

    def collect(self, steps: list[int]) -> None:
        """The newest result, the curve, and numbers of the training's log."""
        folder = self.work / "nano_raw"
        results = [*sorted(folder.glob("nano_raw_step*.safetensors")), self.work / FILES[0]]
        results = [file for file in results if file.is_file()]
        if results:
            shutil.copyfile(results[-1], self.output / FILES[0])
            self.add("result", results[-1].name)
        if (folder / "loss.png").is_file():
            shutil.copyfile(folder / "loss.png", self.output / "loss.png")
        self.add("steps", log_summary(read_log(folder), steps))

    def exam(self) -> None:
        """Pictures of prompts whose scenes training never showed, read back."""
        import numpy as np
        import torch
        from PIL import Image

        from krea2_model import Krea2Pipeline, load_text_encoder, load_transformer, load_vae, nano
        from krea2_model.images.contact_sheet import contact_sheet
        from nano_training.judge import judge
        from nano_training.loop import DEVICE
        from nano_training.recipe.exam import mean_scores, paint
        from nano_training.scenes import held_out_prompts

        machine = {"device": DEVICE, "dtype": torch.float32}
        pipeline = Krea2Pipeline(
            load_transformer(self.output / FILES[0], **machine),
            load_text_encoder(nano.text_encoder_file(), **machine),
            load_vae(nano.VAE, **machine),
            device=DEVICE,
            offload="none",
        )
        ones, twos = held_out_prompts()[:80], held_out_prompts()[80:]
        part = self.options.exam // 3
        exam = (ones[: self.options.exam - part] + twos[:part]) or ones[:1]
        pictures = paint(
            pipeline, [prompt for prompt, _ in exam], 128,
            steps=self.options.exam_steps, guidance=3.5,
        )  # fmt: skip
        scenes = [scene for _, scene in exam]
        verdicts = [judge(*pair) for pair in zip(pictures, scenes, strict=True)]
        everything = round(100 * float(np.mean([all(v.values()) for v in verdicts])), 1)
        self.add("exam", {"prompts": len(exam), "all": everything, **mean_scores(verdicts)})
        shown = list(pictures[:: max(1, len(pictures) // SHOWN)])[:SHOWN]
        sheet = (contact_sheet(shown, columns=6) * 255).round().astype(np.uint8)
        Image.fromarray(sheet).save(self.output / "sheet.png")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the run."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = self.numbers["seconds"]
            seconds[name] = round(time.monotonic() - started, 1)
            seconds["all"] = round(time.monotonic() - self.started, 1)
            print(f"{name}: {seconds[name]} s", flush=True)
            self.add("seconds", seconds)

    def add(self, name: str, value: Any) -> None:
        self.numbers[name] = value
        partial = self.work / "pretrain.json"
        partial.write_text(json.dumps(self.numbers, indent=1), encoding="utf-8")
        shutil.move(partial, self.output / "pretrain.json")


def import_exam() -> None:
    """Import what the exam needs, in seconds that training hides."""
    import nano_training.recipe.exam  # noqa: F401


def settings(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings of the file at the scale of a run."""
    with CONFIG.open("rb") as file:
        table = tomllib.load(file)
    stages, training = table["stages"], table["training"]
    table["data"]["cache"] = "cache"  # which several runs share
    stages["steps"] = [max(1, round(options.scale * steps)) for steps in stages["steps"]]
    if options.batch:
        stages["batch"] = [options.batch] * len(stages["steps"])
    training["warmup"] = min(training["warmup"], sum(stages["steps"]) // 10)
    return table


def as_toml(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Sections of numbers, texts, booleans and lists of those."""
    lines = []
    for section, values in table.items():
        lines.append(f"[{section}]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; none where it has made no step."""
    file = folder / "log.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def log_summary(records: list[dict[str, Any]], steps: list[int]) -> list[dict[str, Any]]:
    """Of each stage: steps made, median seconds of one, and the mean loss of its last fifty."""
    found, begin = [], 0
    for count in steps:
        own = [one for one in records if begin < one["step"] <= begin + count]
        begin += count
        if own:
            seconds = sorted(one["seconds"] for one in own)
            losses = [one["loss"] for one in own[-50:]]
            found.append({
                "steps": len(own),
                "seconds a step": seconds[len(seconds) // 2],
                "seconds": round(sum(seconds), 1),
                "loss": round(sum(losses) / len(losses), 4),
            })  # fmt: skip
    return found


def memory_folder(needed: int) -> str | None:
    """A folder in main memory that has so many bytes, for files that are soon read; or None."""
    folder = Path("/dev/shm")
    if folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > needed:
        return str(folder)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    output = Path(os.environ.get("OUT") or ROOT / ".local" / "pretrain_nano")
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--work", type=Path, help="folder of pictures, cache and states; kept")
    parser.add_argument("--pictures", type=int, default=12000)
    parser.add_argument("--captions", type=int, default=2, help="of each picture")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps")
    parser.add_argument(
        "--seconds", type=float, help="of all steps, instead of --scale; measures a few first"
    )
    parser.add_argument("--batch", type=int, help="of all stages, instead of the settings'")
    parser.add_argument("--limit", type=float, default=170.0, help="seconds of the whole run")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="that draw")
    parser.add_argument("--processes", type=int, default=8, help="that encode")
    parser.add_argument("--exam", type=int, default=120, help="prompts; 0 is none")
    parser.add_argument("--exam-steps", type=int, default=28)
    parser.add_argument("--toy", action="store_true", help="everything at toy scale")
    options = parser.parse_args()
    if options.toy:
        toy = {
            "pictures": 200, "scale": 0.0065, "batch": 8, "limit": 600.0, "processes": 2,
            "workers": 2, "exam": 6, "exam_steps": 4, "seconds": None,
        }  # fmt: skip
        vars(options).update(toy)
    options.output = options.output.resolve()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
        Pretraining(options, options.work.resolve()).run()
        return
    needed = 500_000 * options.pictures * options.captions
    with tempfile.TemporaryDirectory(dir=memory_folder(needed)) as work:
        Pretraining(options, Path(work)).run()


if __name__ == "__main__":
    main()
