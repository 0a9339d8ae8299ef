"""The cells of Krea 2 Grid one after the other, each a run of Krea 2 Sampler."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..krea2_model.checkpoints.identify import TRANSFORMER, CheckpointError
from ..krea2_model.checkpoints.pairing import text_width, wrong_pair
from ..krea2_model.config import Preset
from ..krea2_model.images.grid_sheet import Place
from ..krea2_model.lora.few_steps import FULL_STRENGTH
from ..krea2_model.pipeline.grid_axes import paint_order
from . import grid_axes, model_files
from .file_kinds import preset_of_file
from .grid_axes import Axis
from .inputs import AUTO, FIXED
from .layer_weights import LAYERS, K2TapWeights
from .managed.core_model import is_core
from .managed.lora import apply_lora
from .managed.model import load_model
from .prepared_run import Run, prepare
from .prompts import encode
from .sampler_run import check_mask, preset_of, start_of
from .style_library import mixed_styles, styled


@dataclass(frozen=True)
class Base:
    """Settings of all cells unless an axis has others."""

    prompt: str
    negative: str
    preset: str
    seed: int
    steps: int
    guidance: float
    denoise: float
    sampler: str
    shift: str
    mu: float
    lora: str


@dataclass(frozen=True)
class Cell:
    """A cell. number: from 1, row by row and block by block. None is the preset's or the node's.

    loras: of the axes, names and strengths. size: width and height. styles: as Krea 2 Styles takes
    them, "" for none.
    """

    place: Place
    number: int
    labels: tuple[str, ...]
    prompt: str
    negative: str
    seed: int
    steps: int | None
    guidance: float | None
    denoise: float
    sampler: str
    mu: float | None
    size: tuple[int, int] | None
    loras: tuple[tuple[str, float], ...]
    weights: tuple[float, ...] | None
    checkpoint: str | None
    styles: str = ""

    @property
    def model(self):
        """The values that change the MODEL."""
        return self.checkpoint, self.loras, self.styles

    @cached_property
    def texts(self) -> tuple[str, str]:
        """Prompt and negative prompt with the words of styles, whose files are read once."""
        if not self.styles:
            return self.prompt, self.negative
        mixed = mixed_styles(self.styles)
        return mixed.prompt(self.prompt.strip()), mixed.negative(self.negative)


def cells_of(axes: Sequence[Axis], base: Base) -> list[Cell]:
    """The cells in the order in which they are painted: the MODEL changes least often."""
    counts = grid_axes.counts_of(axes)
    by_kind = {axis.kind: grid_axes.LETTERS.index(axis.letter) for axis in axes}
    slow = [by_kind[kind] for kind in grid_axes.SLOW if kind in by_kind]
    return [_cell(axes, base, place, counts) for place in paint_order(counts, slow)]


def _cell(axes: Sequence[Axis], base: Base, place: Place, counts: Place) -> Cell:
    values = grid_axes.values_at(axes, place)
    loras = values.get(grid_axes.LORA)
    strength = values.get(grid_axes.LORA_STRENGTH)
    if loras is None:
        loras = ((base.lora, 1.0),) if base.lora != grid_axes.NONE else ()
    if strength is not None:
        loras = tuple((name, strength) for name, _ in loras)
    at = [(axis, grid_axes.LETTERS.index(axis.letter)) for axis in axes]
    return Cell(
        place=place,
        number=1 + place[0] + counts[0] * (place[1] + counts[1] * place[2]),
        labels=tuple(axis.labels[place[index]] for axis, index in at),
        prompt=grid_axes.prompt_at(values, base.prompt),
        negative=values.get(grid_axes.NEGATIVE, base.negative),
        seed=values.get(grid_axes.SEED, base.seed),
        steps=values.get(grid_axes.STEPS),
        guidance=values.get(grid_axes.GUIDANCE),
        denoise=values.get(grid_axes.DENOISE, base.denoise),
        sampler=values.get(grid_axes.SAMPLER, base.sampler),
        mu=values.get(grid_axes.MU),
        size=values.get(grid_axes.SIZE),
        loras=loras,
        weights=values.get(grid_axes.LAYER_WEIGHTS),
        checkpoint=values.get(grid_axes.CHECKPOINT),
        styles=values.get(grid_axes.STYLE, ""),
    )


class Painter:
    """Makes cells: one MODEL at a time, every different text encoded once."""

    def __init__(self, model, clip, vae, latent, base: Base):
        check_mask(latent)
        if len(latent["samples"]) != 1:
            raise ValueError(
                f"The latent has {len(latent['samples'])} images; a cell has one. Set batch of "
                "Krea 2 Size to 1, and make seeds an axis."
            )
        self._wired, self._clip, self._vae = model, clip, vae
        self._latent, self._base = latent, base
        self._key: Any = None
        self._made: tuple[Any, Any] = (None, None)
        self._texts: dict[Any, Any] = {}

    def check(self, cells: Sequence[Cell]) -> list[int]:
        """The steps of the cells, as far as they are known now; nothing is sampled.

        Raises ValueError for files and a latent that do not fit.
        """
        start_of(self._wired, self._latent)
        has_image = bool(self._latent["samples"].any()) or "noise_mask" in self._latent
        if has_image and any(cell.size for cell in cells):
            raise ValueError(
                "An axis is size, and the latent is an image, which has its own. Connect Krea 2 "
                "Size, or vary something else."
            )
        strengths: dict[str, float] = {}
        for name, strength in (pair for cell in cells for pair in cell.loras):
            strengths[name] = max(strengths.get(name, 0.0), strength, key=abs)
        fast = {}
        for name, strength in strengths.items():
            path = model_files.find_lora(name)
            _, _, report = apply_lora(self._wired, self._clip, path, strength, strength)
            fast[name] = report.steps
        presets = {}
        for checkpoint in dict.fromkeys(cell.checkpoint for cell in cells):
            if checkpoint is not None:
                path = model_files.find_model(TRANSFORMER, checkpoint)
                self._check_checkpoint(path)
                presets[checkpoint] = preset_of_file(path)
        return [self._steps(cell, fast, presets) for cell in cells]

    def _steps(self, cell: Cell, fast: Mapping[str, int | None], presets: Mapping[str, Any]) -> int:
        base = self._base
        if base.preset == AUTO:
            few = [fast[name] for name, strength in cell.loras if strength >= FULL_STRENGTH]
            own = [steps for steps in few if steps is not None]
            if cell.checkpoint is not None and not own:
                preset = presets[cell.checkpoint]
                if preset is None:
                    raise ValueError(
                        f"{cell.checkpoint} does not say whether it is Raw or Turbo, which preset "
                        "auto needs. Choose raw, turbo or custom as preset."
                    )
                own = [preset.steps]
            if own:
                return cell.steps or own[-1]
        return settings_of(self._wired, cell, base).steps

    def _check_checkpoint(self, path: Path) -> None:
        wired = self._wired
        if wired.patches or wired.object_patches or _options(wired):
            raise ValueError(
                "An axis is checkpoint, and the model has a LoRA or another change, which the "
                "checkpoints would not have. Connect the loader itself; LoRAs may be lora or an "
                "axis."
            )
        if not is_core(wired):
            width = text_width(model_files.shapes_of_part(path, TRANSFORMER))
            known = wired.model.diffusion_model.config.text_hidden_dim
            if None not in (width, known) and width != known:
                raise CheckpointError(wrong_pair(Path("clip"), known, path, width))

    def sample(self, cell: Cell, ahead: Sequence[Cell], **progress) -> tuple[Run, torch.Tensor]:
        """The run of a cell and its latents. ahead: the cells from this one on.

        progress: `total` and `before` of `sampler_run.sample`.
        """
        model, clip = self._parts(cell)
        # The texts of all cells with this MODEL, while the text encoder is on the device.
        for other in ahead:
            if other.model != cell.model:
                break
            for text in other.texts:
                self._encode(clip, text)
        positive, negative = (self._encode(clip, text) for text in cell.texts)
        if cell.weights is not None:
            layers = dict(zip(_LAYER_INPUTS, cell.weights, strict=True))
            (positive,) = K2TapWeights.execute(positive, **layers).result
        run = self._run(model, cell)
        return run, run.sample(positive, negative, cell.seed, **progress)

    def _parts(self, cell: Cell):
        """MODEL and CLIP of a cell."""
        if self._key != cell.model:
            # The last one goes before the next one is loaded.
            self._key, self._made = None, (None, None)
            model, clip = self._wired, self._clip
            if cell.checkpoint is not None:
                model = load_model(model_files.find_model(TRANSFORMER, cell.checkpoint))
            for name, strength in cell.loras:
                path = model_files.find_lora(name)
                model, clip, _ = apply_lora(model, clip, path, strength, strength)
            if cell.styles:
                model, clip, _ = styled(model, clip, self._vae, mixed_styles(cell.styles))
            self._key, self._made = cell.model, (model, clip)
        return self._made

    def _encode(self, clip, text: str):
        # A LoRA of the transformer alone leaves the text encoder's patches as they are.
        key = (clip.patcher.patches_uuid, text)
        if key not in self._texts:
            self._texts[key] = encode(clip, [text])
        return self._texts[key]

    def _run(self, model, cell: Cell) -> Run:
        base, latent = self._base, self._latent
        settings = settings_of(model, cell, base)
        if cell.size is not None:
            width, height = cell.size
            samples = latent["samples"].new_zeros(1, 16, 1, height // 8, width // 8)
            latent = {"samples": samples}
        shift, mu = (base.shift, base.mu) if cell.mu is None else (FIXED, cell.mu)
        return prepare(model, latent, settings, cell.denoise, cell.sampler, shift, mu)


_LAYER_INPUTS = [f"layer_{layer}" for layer in LAYERS]


def settings_of(model, cell: Cell, base: Base) -> Preset:
    """The preset of a cell, with the steps and the guidance of its axes."""
    settings = preset_of(model, base.preset, base.steps, base.guidance)
    changes: dict[str, Any] = {"steps": cell.steps, "guidance": cell.guidance}
    return replace(settings, **{n: value for n, value in changes.items() if value is not None})


def _options(model) -> bool:
    """True if a MODEL has options of other nodes."""
    options = dict(model.model_options)
    return bool(options.pop("transformer_options", {})) or bool(options)
