"""A run of training on the node: its settings, its pictures, and its progress."""

import io as bytes_io
import re
import time
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from PIL import Image

from ..krea2_model.checks import check_finite, counted, there_are
from .managed.training import settings_of_device
from .managed.training_package import training
from .training_files import find_cache, find_picture_folder, relative_name

METHODS = ("lora", "dora", "lokr")
FROM_INPUT = "the images input"
# Steps in which the learning rate rises. Part of what a resumed run shares, so not a share of them.
_WARMUP = 10
_FOR_ALL = "caption, one for all of them"
_SECONDS_BETWEEN_PREVIEWS = 2.0
# A setting's name in messages of krea2_training, for that of the input.
_SECTION = re.compile(r"\b(?:data|adapter|training|memory|output|model)\.(?=[a-z])")
_RENAMED = {"output.folder": "name", "output.path": "name"}


class Watch:
    """Progress of a run on the node, with the curve of the loss as its preview."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        self.bar = comfy.utils.ProgressBar(steps)
        self.interrupted: BaseException | None = None
        self._losses: list[tuple[int, float]] | None = None
        self._shown = 0.0

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Steps and losses, those before a resumed run too."""
        if self._losses is None:
            records = training().engine.watch.read_log(self.folder)
            self._losses = [(record["step"], record["loss"]) for record in records]
        return self._losses

    def on_encoding(self, made: int, of: int) -> None:
        self.bar.update_absolute(made, of)

    def on_step(self, step: int, record: dict[str, Any]) -> None:
        if not self._losses or self._losses[-1][0] < step - 1:
            self._losses = None
        elif self._losses[-1][0] < step:
            self._losses.append((step, record["loss"]))
        preview = None
        if step == self.steps or time.monotonic() - self._shown > _SECONDS_BETWEEN_PREVIEWS:
            preview = ("JPEG", self._draw(), 512)
            self._shown = time.monotonic()
        try:
            # The server's progress bar raises it too.
            self.bar.update_absolute(step, self.steps, preview)
            comfy.model_management.throw_exception_if_processing_interrupted()
        except comfy.model_management.InterruptProcessingException as error:
            self.interrupted = error
            raise training().engine.world.StopTraining from error

    def picture(self) -> torch.Tensor:
        """The curve as an IMAGE (1, H, W, 3)."""
        return torch.from_numpy(np.array(self._draw()))[None] / 255

    def _draw(self) -> Image.Image:
        return training().engine.curve.draw_curves({"loss": self.losses}, self.steps)


def config_of(values: dict[str, Any], result: Path, run_folder: Path):
    """The settings of a run. Raises ValueError for those that cannot be."""
    settings = {
        "data.path": Path("pictures"),
        "data.caption": values["caption"] or None,
        "data.trigger": values["trigger"],
        "data.resolution": [values["resolution"]],
        "data.caption_dropout": values["caption_dropout"],
        "data.cache": find_cache(),
        "model.transformer": "the MODEL",
        "adapter.method": values["method"],
        "adapter.rank": values["rank"],
        "adapter.alpha": values["alpha"] or None,
        "adapter.targets": values["targets"],
        "training.steps": values["steps"],
        "training.batch": values["batch"],
        "training.learning_rate": values["learning_rate"],
        "training.optimiser": values["optimiser"],
        "training.seed": values["seed"],
        "training.warmup": _WARMUP,
        "memory.base": values["base"],
        "memory.checkpointing": values["checkpointing"],
        "memory.offload": values["offload"],
        **settings_of_device(),
        "samples.every": 0,
        "output.path": result,
        "output.folder": run_folder,
    }
    if values["folder"] != FROM_INPUT:
        settings["data.path"] = find_picture_folder(values["folder"])
    if values["method"] not in METHODS:
        raise ValueError(f"method is {values['method']!r}; expected one of {', '.join(METHODS)}.")
    return training().config.read_config(None, settings)


def examples_of(folder: str, images, captions, data) -> list:
    """The pictures and captions of a run; of a folder, or of the inputs."""
    training_data = training().data.examples
    pictures = [image for batch in images or () for image in batch]
    if folder != FROM_INPUT:
        if pictures:
            raise ValueError(
                f"folder is {folder!r}, and images are connected too; expected one of them. "
                f"Disconnect images, or choose {FROM_INPUT!r} as folder."
            )
        return training_data.read_examples(data, _FOR_ALL)
    if not pictures:
        raise ValueError(
            f"folder is {FROM_INPUT!r}, but no images are connected. Choose a folder of pictures "
            "in ComfyUI's input folder, or connect images and captions."
        )
    for number, picture in enumerate(pictures, start=1):
        check_finite(picture, f"Image {number}")
    texts = _texts(captions, len(pictures))
    if data.caption is None and not all(texts):
        raise ValueError(
            f"{texts.count('')} of {counted(len(texts), 'image')} without a caption. Connect "
            f"captions, one per image, or set {_FOR_ALL}."
        )
    own = [
        training_data.Example(f"image {number}", _png(image), (text,) if text else ())
        for number, (image, text) in enumerate(zip(pictures, texts, strict=True), start=1)
    ]
    return training_data.captioned(own, data)


def _texts(captions, count: int) -> list[str]:
    """A caption, which may be empty, for each of so many images."""
    texts = [text.strip() for text in captions or ("",)]
    if len(texts) == 1 and count > 1:
        lines = [line.strip() for line in texts[0].splitlines()]
        texts = texts * count if len(lines) < 2 else lines
    if len(texts) != count:
        raise ValueError(
            f"{there_are(count, 'image')} and {counted(len(texts), 'caption')}; expected as many "
            "captions as images, or one for all."
        )
    return texts


def _png(image: torch.Tensor) -> bytes:
    """A picture (H, W, C) in [0, 1] as the content of a file."""
    pixels = (image[..., :3].cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    content = bytes_io.BytesIO()
    Image.fromarray(pixels.numpy()).save(content, "PNG", compress_level=1)
    return content.getvalue()


def check_name(resume: bool, result: Path, run_folder: Path) -> None:
    """Begin anew if told to. Raises ValueError for a name that another file has."""
    loop = training().engine.loop
    has_run = (run_folder / loop.STATE).is_file() or (run_folder / loop.LOG).is_file()
    if result.exists() and not has_run:
        raise ValueError(
            f"There is a {relative_name(result)} in output/loras, of no run that could be resumed. "
            "Choose another name, or move that file away."
        )
    if not resume:
        loop.forget(run_folder)


class in_inputs:
    """Names the node's inputs in errors of settings."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if not isinstance(error, ValueError):
            return False
        message = str(error)
        for setting, name in _RENAMED.items():
            message = message.replace(setting, name)
        renamed = _SECTION.sub("", message)
        if renamed == str(error):
            return False
        raise ValueError(renamed) from error
