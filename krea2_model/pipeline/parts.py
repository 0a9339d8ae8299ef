"""The parts of a pipeline: files, devices, LoRAs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn

from .. import nano
from ..checkpoints.quantised_layers import quantisation_of
from ..checkpoints.text_encoder import load_text_encoder
from ..checkpoints.transformer import load_transformer
from ..checkpoints.vae import load_vae
from ..checks import as_path, check_type, is_number
from ..config import RAW, Preset
from ..diffusers_names import AnswersDiffusersMethods, accept_diffusers_names
from ..images.pictures import Picture, pixels_of
from ..lora.edit_family import EditFamily
from ..lora.few_steps import FULL_STRENGTH, few_step_preset
from ..lora.files import LoraReport, read_lora, read_lora_file
from ..lora.updates import LoraStack
from ..memory.device_weights import bytes_of
from ..memory.machine import GB
from ..memory.offload import offload_parts
from ..memory.plan import ENCODER, NONE, check_offload
from ..text.describer import CREATIVITY, DESCRIBED_SIDE, Describer, check_lengths
from ..text.encoder import Qwen3VLTextEncoder
from ..text.expander import Expansion, PromptExpander
from ..text.writer import OnText
from ..transformer.model import Krea2Transformer
from ..vae.model import QwenImageVAE

logger = logging.getLogger(__name__)


class LoadedParts(AnswersDiffusersMethods):
    """The three parts of Krea 2: loading, LoRAs, and writing with the text encoder.

    device, offload, max_memory: see `from_files`.

    Raises ValueError for a text encoder or a VAE of another model than the transformer.
    """

    def __init__(
        self,
        transformer: Krea2Transformer,
        text_encoder: Qwen3VLTextEncoder,
        vae: QwenImageVAE,
        *,
        device: str | torch.device | None = None,
        offload: str | None = None,
        max_memory: float | None = None,
    ):
        for name, part, kind in (
            ("transformer", transformer, Krea2Transformer),
            ("text_encoder", text_encoder, Qwen3VLTextEncoder),
            ("vae", vae, QwenImageVAE),
        ):
            check_type(name, part, kind, f"a {kind.__name__}; from_files loads files")
        expected = (transformer.config.num_text_layers, transformer.config.text_hidden_dim)
        taps = (len(text_encoder.config.tap_layers), text_encoder.config.hidden_size)
        if taps != expected:
            raise ValueError(
                f"The text encoder gives {taps[0]} layers of width {taps[1]}; this transformer "
                f"needs {expected[0]} of width {expected[1]}. Use the encoder that belongs to it "
                "(Qwen3-VL-4B for the released Krea 2)."
            )
        if vae.config.z_dim != transformer.config.latent_channels:
            raise ValueError(
                f"The VAE has {vae.config.z_dim} latent channels; this transformer needs "
                f"{transformer.config.latent_channels}. Use the VAE that belongs to it "
                "(Qwen-Image's for the released Krea 2)."
            )
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.vae = vae
        device = device_of(transformer) if device is None else device
        self._offload = offload_parts(transformer, text_encoder, vae, device, offload, max_memory)
        self._loras = LoraStack(transformer), LoraStack(text_encoder)
        self._lora_names: list[str] = []
        # Of the loaded LoRAs, where their files tell one.
        self.edit_families: list[EditFamily] = []
        self._few_steps: list[int] = []
        self._expander: PromptExpander | None = None
        self._describer: Describer | None = None

    def __repr__(self) -> str:
        transformer, encoder, vae = self.transformer, self.text_encoder, self.vae
        mu = "by size" if self.preset.mu is None else f"{self.preset.mu:g}"
        lines = {
            "transformer": f"{transformer.variant or 'variant unknown'}, "
            f"{transformer.config.num_layers} blocks of width {transformer.config.hidden_size}, "
            f"{_weights(transformer)}",
            "text_encoder": f"{encoder.config.num_hidden_layers} layers of width "
            f"{encoder.config.hidden_size}, {_weights(encoder)}",
            "vae": f"{vae.config.z_dim} channels, {_weights(vae)}",
            "preset": f"{self.preset.steps} steps, guidance {self.preset.guidance:g}, mu {mu}, "
            f"{self.preset.size} px",
            "device": f"{self._offload.device}, offload {self._offload.mode}",
            "loras": ", ".join(self._lora_names) or "none",
        }
        entries = "\n".join(f"  {name}: {text}" for name, text in lines.items())
        return f"{type(self).__name__}(\n{entries}\n)"

    @classmethod
    @accept_diffusers_names
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | str | None = None,
        offload: str | None = None,
        max_memory: float | None = None,
        keep_quantised: bool = True,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a diffusers folder, an all-in-one file, or a repository of the Hugging Face hub.

        path: a folder or file; where there is none of this name, a repository such as
            "krea/Krea-2-Turbo", whose folder is fetched into the hub's cache first.
        revision, cache_dir, token, local_files_only: of a repository, see `fetch_folder`.

        Other options are those of `from_files`.
        """
        folder = as_path(path)
        if not folder.exists():
            # Only this, and only here, reaches the network: ComfyUI's nodes never import it.
            from ..hub import fetch_folder

            folder = fetch_folder(
                str(path),
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
            )
        return cls.from_folder(
            folder,
            device=device,
            dtype=dtype,
            offload=offload,
            max_memory=max_memory,
            keep_quantised=keep_quantised,
        )

    @classmethod
    @accept_diffusers_names
    def from_folder(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        offload: str | None = None,
        max_memory: float | None = None,
        keep_quantised: bool = True,
    ) -> Self:
        """Load a diffusers folder (model_index.json, transformer/, text_encoder/, vae/, ...).

        Options are those of `from_files`.
        """
        return cls.from_files(
            path,
            path,
            path,
            device=device,
            dtype=dtype,
            offload=offload,
            max_memory=max_memory,
            keep_quantised=keep_quantised,
        )

    @classmethod
    @accept_diffusers_names
    def from_files(
        cls,
        transformer: str | Path,
        text_encoder: str | Path,
        vae: str | Path,
        tokenizer: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        offload: str | None = None,
        max_memory: float | None = None,
        keep_quantised: bool = True,
    ) -> Self:
        """Load each part from a file or folder; an all-in-one file may be named three times.

        device: where to calculate; "auto" is the machine's accelerator, or else the CPU.
        offload: "none" keeps all parts on the device, "parts" lets them take turns, "blocks"
            streams what does not fit, "auto" chooses by free memory before each run and says so in
            the log. None is "auto" where device is or max_memory is given, else "none".
        max_memory: of the device, in GB (10^9 bytes); None for all that is free.
        keep_quantised: hold quantised files as they are, each layer made plain while it calculates;
            False makes them plain at once, which is faster and takes two to four times the memory.
        """
        found, offload = check_offload(device, offload, max_memory)
        keep_quantised = keep_quantised and found.type != "mps"  # which knows no 8-bit floats
        options: dict[str, Any] = {"device": found if offload == NONE else "cpu", "dtype": dtype}
        return cls(
            load_transformer(transformer, **options, keep_quantised=keep_quantised),
            load_text_encoder(
                text_encoder, tokenizer=tokenizer, **options, keep_quantised=keep_quantised
            ),
            load_vae(vae, **options),
            device=found,
            offload=offload,
            max_memory=max_memory,
        )

    @classmethod
    @accept_diffusers_names
    def nano(
        cls,
        variant: str = "turbo",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = torch.float32,
        offload: str | None = None,
        max_memory: float | None = None,
    ) -> Self:
        """The built-in krea2-nano, "turbo" or "raw"; see `krea2_model.nano`."""
        if variant not in nano.VARIANTS:
            raise ValueError(f"variant is {variant!r}; expected one of {nano.VARIANTS}.")
        return cls.from_files(
            nano.TRANSFORMERS[variant],
            nano.text_encoder_file(),
            nano.VAE,
            device=device,
            dtype=dtype,
            offload=offload,
            max_memory=max_memory,
        )

    def load_lora(self, path: str | Path, scale: float = 1.0) -> LoraReport:
        """Merge a LoRA file of any trainer into the weights, on top of those loaded before.

        scale: how much of it; may be negative. Returns what matched. Raises CheckpointError where
        the file is not a LoRA, fits nothing or holds no numbers, and ValueError where it makes a
        weight infinite; the weights are then as they were.
        """
        return self.load_loras([(path, scale)])[0]

    def load_loras(self, loras: Sequence[tuple[str | Path, float]]) -> list[LoraReport]:
        """`load_lora` for several files and their scales, which merges each weight only once."""
        files = _lora_files(loras)
        if not files:
            return []
        self._offload.before_change("load_lora")
        shapes, text_shapes = (stack.shapes for stack in self._loras)
        updates, text_updates, reports = [], [], []
        for file, scale in files:
            tensors, metadata = read_lora_file(file)
            of_transformer, of_encoder, report = read_lora(
                tensors, shapes, file.name, text_shapes, metadata
            )
            updates.append((of_transformer, scale))
            text_updates.append((of_encoder, scale))
            reports.append(report)
        previous = self._loras[0].add(*updates)
        try:
            self._loras[1].add(*text_updates)
        except BaseException:
            self._loras[0].restore(previous)
            raise
        for report in reports:
            if not report.is_complete:
                logger.warning("%s", report)
        self.edit_families += [
            report.edit
            for report, (_, scale) in zip(reports, files, strict=True)
            if report.edit is not None and scale != 0
        ]
        self._few_steps += [
            report.steps
            for report, (_, scale) in zip(reports, files, strict=True)
            if report.steps is not None and scale >= FULL_STRENGTH
        ]
        self._lora_names += [f"{file.name} at {scale:g}" for file, scale in files]
        return reports

    @contextmanager
    def loras_for_now(self, loras: Sequence[tuple[str | Path, float]]) -> Iterator[None]:
        """`load_loras` for a while; at the end the weights are what they were, to the bit."""
        if not loras:
            yield
            return
        loaded = [list(each) for each in (self._lora_names, self.edit_families, self._few_steps)]
        before = [{n: list(u) for n, u in stack.updates.items()} for stack in self._loras]
        self.load_loras(loras)
        try:
            yield
        finally:
            self._offload.before_change("unload_lora")
            for stack, updates in zip(self._loras, before, strict=True):
                stack.restore({name: updates.get(name, []) for name in list(stack.updates)})
            self._lora_names, self.edit_families, self._few_steps = loaded  # type: ignore

    def unload_lora(self) -> None:
        """Remove all LoRAs; the weights are those of the files again, to the bit."""
        self._offload.before_change("unload_lora")
        for stack in self._loras:
            stack.clear()
        self._lora_names.clear()
        self.edit_families.clear()
        self._few_steps.clear()

    def expand(self, prompt: str, on_text: OnText | None = None, **options) -> list[Expansion]:
        """Write dense captions for a short prompt with the text encoder's language model.

        on_text: called after each token with the text so far.
        options: creativity, length, seed, variants, style, language; see `expander.expand`.

        The layer that only writing needs is read from the encoder's file on the first call. Raises
        ValueError where the encoder cannot write, as krea2-nano's.
        """
        if self._expander is None:
            self._offload.before_change("expand")
            self._expander = PromptExpander(self.text_encoder)
        with self._offload.use(ENCODER, self._expander.tail):
            expansions = self._expander(prompt, on_text, **options)
        for expansion in expansions:
            if note := expansion.note():
                logger.warning("%s", note)
        return expansions

    def describe(
        self,
        images: Picture | Sequence[Picture],
        length: str = "long",
        on_text: OnText | None = None,
        *,
        creativity: float = CREATIVITY,
        seed: int = 0,
        max_side: int = DESCRIBED_SIDE,
    ) -> list[str]:
        """Write a caption of each picture with the text encoder's language model.

        images: one or several: PIL images, paths, tensors (3 or 4, H, W) or arrays.
        length: one of `describer.CAPTION_LENGTHS`: "long", "medium", "short" or "style".
        on_text: called after each token with the text so far.
        creativity: 0 (the most likely words) to 1. seed: of each caption.
        max_side: pictures with more pixels than a square of this side are made smaller.

        The vision tower and the layer that only writing needs are read from the encoder's file on
        the first call. Raises ValueError where the encoder cannot write or see, as krea2-nano's.
        """
        check_lengths([length])
        several = images if isinstance(images, (list, tuple)) else [cast(Picture, images)]
        pixels = [pixels_of(picture, "an entry of images") for picture in several]
        if self._describer is None:
            self._offload.before_change("describe")
            self._describer = Describer(self.text_encoder)
        options: dict[str, Any] = {"creativity": creativity, "seed": seed, "max_side": max_side}
        with self._offload.use(ENCODER, *self._describer.parts):
            return [self._describer(one, [length], on_text, **options)[0] for one in pixels]

    @property
    def preset(self) -> Preset:
        """Sampling defaults: of a few-step LoRA, or else of the checkpoint.

        Raw's where the checkpoint does not say what it is.
        """
        if self._few_steps:
            return few_step_preset(min(self._few_steps), self.transformer.preset)
        return self.transformer.preset or RAW


def _lora_files(loras: Sequence[tuple[str | Path, float]]) -> list[tuple[Path, float]]:
    """Paths and scales. Raises ValueError for what is not a list of pairs."""
    entries = [] if isinstance(loras, (str, PathLike)) else list(loras)
    if (not entries and loras) or not all(
        isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) == 2
        for entry in entries
    ):
        raise ValueError(f"loras is {loras!r}; expected a list of (path, scale).")
    for _, scale in entries:
        if not is_number(scale):
            raise ValueError(f"The LoRA's scale is {scale!r}; expected a finite number.")
    return [(nano.lora_file(as_path(path, "A LoRA's path")), scale) for path, scale in entries]


def _weights(module: nn.Module) -> str:
    """The size in memory and the format of a module's weights, for a person."""
    size, form = bytes_of([module]), quantisation_of(module)
    shown = f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / 10**6:.0f} MB"
    return f"{shown} in {form or str(next(module.parameters()).dtype).removeprefix('torch.')}"


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's weights."""
    return next(module.parameters()).device
