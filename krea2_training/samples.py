"""Pictures on the way: the same prompts and seeds every so many steps, on Raw and on Turbo."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from krea2_model import Krea2Transformer, denoise, load_transformer, sigma_schedule
from krea2_model.config import RAW, TURBO, Preset
from krea2_model.images.contact_sheet import contact_sheet
from krea2_model.images.output_files import to_picture
from krea2_model.memory.machine import empty_cache
from krea2_model.schedule import resolve_mu
from krea2_model.transformer.patches import token_count

from .config import RunConfig
from .data.cache import Cache
from .engine.world import ALONE, World, is_sharded
from .settings.sections import FULL
from .weights.adapters import adapters_of, add_adapters
from .weights.base import checkpoint_file, freeze_base


class Sampler:
    """Makes the samples of a run. `prompts` have to be in the cache before the first.

    All processes of a world paint, since the model may be sharded over them; the first one saves.
    """

    def __init__(self, config: RunConfig, cache: Cache, device: torch.device, world: World = ALONE):
        self.config, self.settings, self.cache, self.world = config, config.samples, cache, world
        self.folder, self.device = config.output.run_folder / "samples", device
        self.prompts = self.settings.prompts if self.settings.every else ()
        # Steps and guidance of the pictures, where they are not the checkpoint's.
        self.preset: Preset | None = None

    def is_due(self, step: int, steps: int) -> bool:
        return bool(self.prompts) and (step % self.settings.every == 0 or step == steps)

    def sample(self, model: Krea2Transformer, step: int, values: Mapping[str, Tensor]) -> None:
        """Paint the prompts with the values as weights: a sheet, and a picture of each."""
        latents, captions = [], []
        with holding(model, values):
            for number, prompt in enumerate(self.prompts):
                latents.append(self._latents(model, number))
                captions.append(f"{(self.preset or model.preset or RAW).name}: {prompt}")
        with self.world.together():
            if self.world.is_first:
                self._finish(model, step, values, latents, captions)

    def _finish(
        self,
        model: Krea2Transformer,
        step: int,
        values: Mapping[str, Tensor],
        latents: list[Tensor],
        captions: list[str],
    ) -> None:
        """Add Turbo's pictures, decode all and save them."""
        if self.settings.turbo and self.config.adapter.method != FULL:
            alone = self.world.count == 1
            if alone:
                model.to("cpu")  # A card seldom holds both.
            turbo = self._turbo(values)
            for number, prompt in enumerate(self.prompts):
                latents.append(self._latents(turbo, number))
                captions.append(f"turbo: {prompt}")
            del turbo
            empty_cache(self.device)
            if alone:
                model.to(self.device)
        pictures = self._decoded(latents)
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"step{step:06}"
        for index, picture in enumerate(pictures, start=1):
            to_picture(picture).save(self.folder / f"{name}_{index:02}.png")
        sheet = contact_sheet(list(pictures), captions, columns=len(self.prompts))
        to_picture(sheet).save(self.folder / f"{name}.png")

    @torch.no_grad()
    def _latents(self, model: Krea2Transformer, number: int) -> Tensor:
        preset = self.preset or model.preset or RAW
        side = self.settings.size or preset.size
        is_turbo = preset.guidance == 0
        guidance = self.settings.guidance
        guidance = preset.guidance if guidance is None or is_turbo else guidance
        steps = preset.steps if self.settings.steps is None or is_turbo else self.settings.steps
        generator = torch.Generator().manual_seed(self.settings.seed + number)
        noise = torch.randn(1, 16, side // 8, side // 8, generator=generator).to(self.device)
        empty, positive = (
            self.cache.prompt(text).fuse(model) for text in ("", self.prompts[number])
        )
        sigmas = sigma_schedule(steps, resolve_mu(preset, token_count(noise)))
        # Tables of all blocks are not read ahead where they are sharded.
        negative = empty if guidance else None
        painter: Any = model if self.world.count == 1 else functools.partial(model)
        steps_made = denoise(painter, noise, positive, negative, sigmas=sigmas, guidance=guidance)
        return list(steps_made)[-1][1]

    def _turbo(self, values: Mapping[str, Tensor]) -> Krea2Transformer:
        """A Turbo checkpoint with the adapters that are being trained."""
        file = checkpoint_file(self.settings.turbo, "turbo")
        turbo = load_transformer(file, dtype=self.cache.encoders.dtype, keep_quantised=True)
        turbo.preset = turbo.preset or TURBO
        freeze_base(turbo, self.config.memory, self.device)
        add_adapters(turbo, self.config.adapter)
        for name, adapter in adapters_of(turbo).items():
            for own, parameter in adapter.named_parameters(recurse=False):
                parameter.data.copy_(values[f"{name}.{own}"])
        return turbo.to(self.device)

    def _decoded(self, latents: list[Tensor]) -> np.ndarray:
        """Pictures (N, H, W, 3) in [0, 1]."""
        vae = self.cache.encoders.vae()
        with torch.no_grad():
            images = [vae.decode(one)[0] / 2 + 0.5 for one in latents]
        del vae
        empty_cache(self.device)
        return torch.stack(images).float().clamp(0, 1).movedim(1, -1).cpu().numpy()


@contextmanager
def holding(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A model with other values of its trained parameters, in evaluation mode, for a while."""
    parameters = {n: p for n, p in model.named_parameters() if n in values}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        own = {name: _exchange(parameter, values[name]) for name, parameter in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                _exchange(parameter, own[name])
        model.train(was_training)


def _exchange(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Give a parameter another value; returns the one that it had."""
    if not is_sharded(parameter):
        own, parameter.data = parameter.data, value
        return own
    # FSDP gathers from the memory that a sharded parameter began with.
    own = parameter.detach().clone()
    parameter.copy_(value)
    return own
