"""Prompt to image without ComfyUI."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import nano
from .arguments import asked_sides, negative_list, not_whole, prompt_list, start_noise
from .checkpoints.text_encoder import load_text_encoder
from .checkpoints.transformer import load_transformer
from .checkpoints.vae import load_vae
from .config import RAW, Preset
from .guidance import ALWAYS, GuidanceSchedule
from .images.pictures import OUTPUT_TYPES, Picture, as_reference, fit, pixels_of, to_output
from .images.sizes import is_far
from .lora.files import LoraReport, read_lora, read_lora_file
from .lora.updates import LoraStack
from .memory.activations import TEXT_TOKENS, activations, token_count
from .memory.offload import offload_parts
from .memory.plan import ENCODER, NONE, TRANSFORMER, VAE, check_offload
from .prompt_taps import PromptTaps, encode_prompts, given_taps, resized_prompt_image
from .sampling import check_guidance, check_sigmas, shift_mu, sigma_schedule
from .sampling import denoise as denoising_steps
from .text.encoder import Qwen3VLTextEncoder
from .text.expander import Expansion, OnText, PromptExpander
from .text.prompt_images import MAX_SIDE, PromptImage, grid_of, kept_images
from .transformer.model import Krea2Transformer
from .transformer.references import TIME_ZERO, Reference
from .transformer.shared_calls import pays_to_share
from .transformer.text_attention import NegativeGuidance
from .vae.model import QwenImageVAE

logger = logging.getLogger(__name__)

Callback = Callable[[int, Tensor, Tensor], None]


class Krea2Pipeline:
    """The three parts of Krea 2 and the way from a prompt to images.

    Each part runs on the device and in the dtype of its own weights; with `offload` they lie in
    main memory and are on `device` only while they run, see `from_files`. Raises ValueError where
    the text encoder is not the one the transformer was trained with.
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
        wanted = (transformer.config.num_text_layers, transformer.config.text_hidden_dim)
        given = (len(text_encoder.config.tap_layers), text_encoder.config.hidden_size)
        if wanted != given:
            raise ValueError(
                f"The text encoder gives {given[0]} layers of width {given[1]}; this transformer "
                f"needs {wanted[0]} of width {wanted[1]}. Use the encoder that belongs to it "
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
        device = _device(transformer) if device is None else device
        self._offload = offload_parts(transformer, text_encoder, vae, device, offload, max_memory)
        self._loras = LoraStack(transformer), LoraStack(text_encoder)
        self._expander: PromptExpander | None = None

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        offload: str | None = None,
        max_memory: float | None = None,
        keep_quantised: bool = True,
    ) -> Krea2Pipeline:
        """Load a diffusers folder (model_index.json, transformer/, text_encoder/, vae/, ...).

        Options are those of `from_files`.
        """
        return cls.from_files(
            path, path, path, device=device, dtype=dtype, offload=offload, max_memory=max_memory,
            keep_quantised=keep_quantised,
        )  # fmt: skip

    @classmethod
    def from_files(
        cls,
        transformer: str | Path,
        text_encoder: str | Path,
        vae: str | Path,
        tokenizer: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        offload: str | None = None,
        max_memory: float | None = None,
        keep_quantised: bool = True,
    ) -> Krea2Pipeline:
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
    def nano(
        cls,
        variant: str = "turbo",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
        offload: str | None = None,
        max_memory: float | None = None,
    ) -> Krea2Pipeline:
        """The built-in krea2-nano, "turbo" or "raw"; see `krea2_model.nano`."""
        if variant not in nano.VARIANTS:
            raise ValueError(f"variant is {variant!r}; expected one of {nano.VARIANTS}.")
        return cls.from_files(
            nano.TRANSFORMERS[variant], nano.TEXT_ENCODER, nano.VAE,
            device=device, dtype=dtype, offload=offload, max_memory=max_memory,
        )  # fmt: skip

    def load_lora(self, path: str | Path, scale: float = 1.0) -> LoraReport:
        """Merge a LoRA file of any trainer into the weights, on top of those loaded before.

        scale: how much of it; may be negative. Returns what matched. Raises CheckpointError where
        the file is not a LoRA, fits nothing or holds no numbers, and ValueError where it makes a
        weight infinite; the weights are then as they were.
        """
        return self.load_loras([(path, scale)])[0]

    def load_loras(self, loras: Sequence[tuple[str | Path, float]]) -> list[LoraReport]:
        """`load_lora` for several files and their scales, which makes each weight only once."""
        if not loras:
            return []
        self._offload.before_change("load_lora")
        shapes, text_shapes = (stack.shapes for stack in self._loras)
        updates, text_updates, reports = [], [], []
        for path, scale in loras:
            tensors, metadata = read_lora_file(Path(path))
            own, text_own, report = read_lora(
                tensors, shapes, Path(path).name, text_shapes, metadata
            )
            updates.append((own, scale))
            text_updates.append((text_own, scale))
            reports.append(report)
        before = self._loras[0].add(*updates)
        try:
            self._loras[1].add(*text_updates)
        except BaseException:
            self._loras[0].restore(before)
            raise
        for report in reports:
            if not report.is_complete:
                logger.warning("%s", report)
        return reports

    def unload_lora(self) -> None:
        """Take all LoRAs out; the weights are the ones that were loaded, to the bit."""
        self._offload.before_change("unload_lora")
        for stack in self._loras:
            stack.clear()

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

    @property
    def preset(self) -> Preset:
        """Sampling defaults of the loaded checkpoint; Raw's where it does not say what it is."""
        return self.transformer.preset or RAW

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        num_images: int = 1,
        seed: int | Sequence[int] = 0,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        sigmas: Sequence[float] | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        callback: Callback | None = None,
        evaluate_every: int = 1,
        guidance_schedule: GuidanceSchedule = ALWAYS,
        prompt_weights: bool = False,
        negative_guidance: NegativeGuidance | None = None,
        tap_weights: Sequence[float] | None = None,
        images: Sequence[PromptImage | Picture] | None = None,
        image_labels: bool = True,
        max_image_side: int = MAX_SIDE,
        start_image: Picture | None = None,
        denoise: float = 1.0,
        references: Sequence[Reference | Picture] | None = None,
        reference_method: str = TIME_ZERO,
        cache_references: bool = False,
        max_reference_megapixels: float = 1.0,
    ):
        """Make images.

        prompt: one or several; each gives `num_images` images, in order.
        negative_prompt: what guidance leads away from, one for all or one a prompt; None is the
            empty prompt.
        height, width: pixels, rounded up to multiples of 16; None is the size the checkpoint is
            made for, 1024.
        steps, guidance: None takes the checkpoint's preset. guidance is in Krea's convention,
            `v = cond + guidance * (cond - uncond)`, 0 to 100; ComfyUI's cfg is guidance + 1.
        seed: an int from 0 to 2**64 - 1 (image i uses seed + i) or one an image.
        latents: noise to start from, (B, 16, height / 8, width / 8), instead of seeds; gives the
            size where height and width are left at their defaults.
        prompt_embeds, negative_prompt_embeds: taps (B, L, 12, text width) instead of prompts,
            with masks (B, L) bool or None where all tokens are real.
        sigmas: final (shifted) values that end in 0, instead of steps.
        max_sequence_length: cuts prompts; 512 is the official length, None never cuts.
        output_type: "pil": a list of images; "np": (B, H, W, 3) float32 in [0, 1]; "pt":
            (B, 3, H, W) in [0, 1]; "latent": (B, 16, h, w), normalised.
        callback: called as `callback(step, latents, predicted)` after each step.
        evaluate_every: 2 or more leaves the model out of later steps: faster and not exact.
        guidance_schedule: in which part of the schedule guidance counts, and how much.
        prompt_weights: read `(word:1.3)` in prompts as weights, see `prompt_weights`; off, prompts
            reach the model as they are written.
        negative_guidance: leads away from the negative prompt also at guidance 0 (Turbo), by
            normalised attention guidance.
        tap_weights: 12 weights of the encoder's layers in the prompt; see `taps`.
        images: up to eight that the text encoder sees in front of every prompt, not of negatives:
            PIL images, paths, tensors (3 or 4, H, W) in [0, 1], or `PromptImage` with role and
            strength.
            The vision tower is read from the encoder's file on first use.
        image_labels: number them, `Picture 1: `, as LoRAs that read images were trained.
        max_image_side: those with more pixels than a square of this side are made smaller.
        start_image: a picture to change; cropped to height and width, its own size where both are
            None. denoise: how much, from above 0 to 1, where nothing of it is left; the time before
            the shift from which on the image is painted.
        references: pictures for the transformer to look at, or `Reference` with latents of its own;
            reference_method, cache_references: see `sampling.denoise`. Larger ones are shrunk to
            max_reference_megapixels, in units of 1024 x 1024 pixels.

        Raises ValueError that names the argument, what was expected and the remedy.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; expected one of {OUTPUT_TYPES}.")
        if not_whole(num_images) or num_images < 1:
            raise ValueError(f"num_images is {num_images!r}; expected a whole number from 1 up.")
        prompts = prompt_list(prompt, prompt_embeds)
        count = len(prompts) if prompts is not None else len(prompt_embeds)  # type: ignore[arg-type]
        batch = count * num_images

        # Before anything is computed, since a picture may be none.
        seen = [resized_prompt_image(image, max_image_side) for image in images or ()]
        if seen and prompts is None:
            raise ValueError("images stand in front of a prompt; with prompt_embeds give none.")
        looked_at = [_reference(each, max_reference_megapixels) for each in references or ()]
        start = None
        if start_image is not None:
            start = fit(pixels_of(start_image, "start_image"), *asked_sides(width, height))
            height, width = start.shape[1:]
        elif denoise != 1 and sigmas is None:
            raise ValueError(f"denoise is {denoise} without an image to change: give start_image.")
        channels, downscale = self.transformer.config.latent_channels, self.vae.config.downscale
        shape = (batch, channels, downscale)
        noise = start_noise(latents, shape, (height, width), self.preset.size, seed)
        self._warn_of_size(*(downscale * side for side in noise.shape[-2:]))
        guidance = check_guidance(self.preset.guidance if guidance is None else guidance)
        if sigmas is None:
            mu = self.preset.mu
            mu = shift_mu(token_count(noise)) if mu is None else mu
            sigmas = sigma_schedule(self.preset.steps if steps is None else steps, mu, denoise)
        else:
            sigmas = check_sigmas(sigmas)
        if negative_guidance is not None and negative_guidance.is_off:
            negative_guidance = None
        positive = None if prompt_embeds is None else given_taps(prompt_embeds, prompt_embeds_mask)
        negative, negatives = None, None
        if guidance > 0 or negative_guidance is not None:
            negatives = negative_list(negative_prompt, negative_prompt_embeds, count)
            if negative_prompt_embeds is not None:
                negative = given_taps(negative_prompt_embeds, negative_prompt_embeds_mask)
        may_share = self._prepare(noise, positive, seen, looked_at, guidance > 0)
        if prompts is not None or negatives is not None:
            tower = [self.text_encoder.unmoved_vision_tower()] if kept_images(seen) else []
            with self._offload.use(ENCODER, *tower):
                encode = functools.partial(
                    encode_prompts, self.text_encoder,
                    max_sequence_length=max_sequence_length, weighted=prompt_weights,
                )  # fmt: skip
                if prompts is not None:
                    positive = encode(prompts, images=kept_images(seen), labels=image_labels)
                if negatives is not None:
                    negative = encode(negatives)
        assert positive is not None  # of prompts or of embeddings
        with self._offload.use(VAE) if start is not None or looked_at else nullcontext():
            if start is not None:
                noise = torch.lerp(self.encode(start[None]).to(noise), noise, sigmas[0])
            beside = [self._encoded(each) for each in looked_at]
        with self._offload.use(TRANSFORMER):
            noise = noise.to(_device(self.transformer))
            texts = [positive.weighed(tap_weights).fused(self.transformer, num_images)]
            if negative is not None:
                texts.append(negative.fused(self.transformer, batch // len(negative.taps)))
            tokens = len(noise) * token_count(noise)
            lengths = [text.states.shape[1] for text in texts]
            result = noise
            for step, current, predicted in denoising_steps(
                self.transformer,
                noise,
                *texts,
                sigmas=sigmas,
                guidance=guidance,
                evaluate_every=evaluate_every,
                guidance_schedule=guidance_schedule,
                negative_guidance=negative_guidance,
                references=[each.to(noise) for each in beside],
                reference_method=reference_method,
                cache_references=cache_references,
                share_calls=may_share and pays_to_share(tokens, lengths, self._offload.streams),
            ):
                result = current
                if callback is not None:
                    callback(step, current, predicted)
        if output_type == "latent":
            return result
        return to_output(self.decode(result), output_type)

    def _warn_of_size(self, height: int, width: int) -> None:
        size = self.preset.size
        if is_far(width, height, size):
            logger.warning(
                "%d x %d px is far from the %d x %d this checkpoint was trained at; expect "
                "repeated or broken shapes.",
                width, height, size, size,
            )  # fmt: skip

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to latents (B, 16, H / 8, W / 8), normalised."""
        with self._offload.use(VAE):
            weight = next(self.vae.parameters())
            return self.vae.encode(images.to(weight) * 2 - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 16, h, w) to images (B, 3, H, W) in [-1, 1], in tiles if memory runs out."""
        with self._offload.use(VAE):
            latents = latents.to(_device(self.vae))
            try:
                return self.vae.decode(latents)
            except torch.OutOfMemoryError:
                logger.warning("Decoding ran out of memory; decoding in tiles instead.")
            return self.vae.decode_tiled(latents)

    def _encoded(self, prepared: Reference | Tensor) -> Reference:
        """A reference, of pixels (3, H, W) or with latents of its own."""
        if isinstance(prepared, Reference):
            return prepared
        return Reference(self.encode(prepared[None]))

    def _prepare(
        self,
        noise: Tensor,
        positive: PromptTaps | None,
        images: Sequence[PromptImage],
        references: Sequence[Reference | Tensor],
        guided: bool,
    ) -> bool:
        """Plan where the parts are during a run; whether both texts may share a call in it."""
        text = TEXT_TOKENS if positive is None else positive.taps.shape[1]
        text += sum(math.prod(grid_of(image.pixels)) for image in images)
        beside = [(r.latents, 1) if isinstance(r, Reference) else (r, self.vae.config.downscale)
                  for r in references]  # fmt: skip
        one, both = (
            activations(
                self.transformer, self.text_encoder, self.vae,
                batch=calls * len(noise),
                image=token_count(noise),
                text=text,
                references=sum(token_count(each, scale) for each, scale in beside),
            )
            for calls in (1, 2)
        )  # fmt: skip
        shares = guided and self._offload.has_room(both, instead_of=one)
        self._offload.prepare(both if shares else one)
        return shares


def _reference(given: Reference | Picture, megapixels: float) -> Reference | Tensor:
    """A reference with latents of its own, or the pixels (3, H, W) of one."""
    if isinstance(given, Reference):
        return given
    return as_reference(pixels_of(given, "an entry of references"), megapixels)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
