"""Pictures by a pipeline that is loaded once: the options of one picture to a call of it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..features.arguments import PromptImages, ReferencePicture, References
from ..features.tiles import TilePrompts
from ..features.upscaling import Upscale
from ..features.variations import PromptBlend, Variation
from ..guidance import GuidanceSchedule
from ..images.pictures import fit
from ..memory.forecast import Forecast
from ..pipeline.pipeline import Krea2Pipeline
from ..schedule import sigma_schedule
from ..text.prompt_tokens import tokenize_prompt
from ..transformer.sparse_attention import SparseAttention
from ..transformer.text_attention import NegativeGuidance
from .checks import find_input_pictures, nag_settings, note_unused
from .controls import controls_of
from .model_files import Weights, find_loras
from .progress import Console
from .regions import regions_of
from .styling import styled


@dataclass
class Picture:
    """An image and the values that the run has found: size, steps and guidance."""

    image: Image.Image
    results: dict[str, Any]


class Painter:
    """Loads the weights that `args` name, once."""

    def __init__(self, args: Namespace, weights: Weights, console: Console):
        import torch

        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        # The small model costs nothing in full precision, and looks the same everywhere.
        default = torch.float32 if weights.built_in else None
        self._console = console
        self._loras: list[tuple[Path, float]] = []
        with console.stage("loading the model"):
            self._pipeline = Krea2Pipeline.from_files(
                weights.transformer,
                weights.text_encoder,
                weights.vae,
                weights.tokenizer,
                dtype=dtypes.get(args.dtype, default),
                device=args.device,
                offload=args.offload,
                max_memory=args.max_memory,
            )

    def keep_texts(self, count: int) -> AbstractContextManager[None]:
        """Meanwhile prompts that come again are encoded once."""
        return self._pipeline.keep_texts(count)

    def paint(self, args: Namespace, title: str) -> Picture:
        """One picture; `args.prompt` is used as it is."""
        return self.paint_together([args], title)[0]

    def paint_together(
        self,
        rows: Sequence[Namespace],
        title: str,
        on_step: Callable[[], None] | None = None,
        embeddings: Mapping[str, Tensor] | None = None,
    ) -> list[Picture]:
        """Pictures in one call; their options differ in prompt, negative and seed alone.

        on_step: called after each step; what it raises ends the call. embeddings: of the prompts
        and negatives, as arguments of the pipeline, which then does not encode them.
        """
        rows = [styled(row) for row in rows]
        args = rows[0]
        self._use_loras(find_loras(args))
        preset = self._pipeline.preset
        pictures = find_input_pictures(args)
        steps, guidance = args.steps, args.guidance
        if (edit := pictures["edit"]) is not None:
            steps, guidance = edit.settings(preset, steps, guidance)
        steps = preset.steps if steps is None else steps
        guidance = preset.guidance if guidance is None else guidance
        note_unused(args, guidance, self._console)
        options = self._options(args, pictures, steps, guidance)
        with self._console.bar(steps, f"{title}: reading the prompt", unit="step") as bar:
            sides: list[int] = []  # of the first stage, which a later run asks for

            def step_done(step, latents, predicted) -> None:
                sides[:] = sides or [8 * side for side in latents.shape[-2:]]
                bar.set_description(
                    f"{title}: {'decoding' if step == steps else 'sampling'}", False
                )
                bar.update()
                if on_step is not None:
                    on_step()

            texts: dict[str, Any] = dict(embeddings or {}) or {
                "prompt": [row.prompt for row in rows],
                "negative_prompt": [row.negative for row in rows],
            }
            images = self._pipeline(
                **texts,
                seed=[row.seed for row in rows],
                # A whole number would be another seed for each of the rows.
                vary=[Variation([seed] * len(rows), strength) for seed, strength in args.vary],
                callback=step_done,
                **options,
            )
            assert isinstance(images, list), "output_type is pil"
            bar.set_description(title)
        width, height = images[0].size
        if args.upscale is not None and args.denoise > 0:
            height, width = sides
        elif args.upscale is not None:
            height, width = fit(options["start_image"], args.width, args.height).shape[1:]
        results = {"width": width, "height": height, "steps": steps, "guidance": guidance}
        return [Picture(image, results) for image in images]

    def expand(self, prompt: str, variants: int, seed: int) -> list[str]:
        """Captions that the text encoder writes for a prompt; ValueError where it cannot."""
        with self._console.stage("writing prompts"):
            found = self._pipeline.expand(prompt, variants=variants, seed=seed)
        return [expansion.text for expansion in found]

    def takes_edits(self, args: Namespace) -> bool:
        """True where a LoRA of the options is for edits."""
        self._use_loras(find_loras(styled(args)))
        return bool(self._pipeline.edit_families)

    def forecast(self, args: Namespace) -> Forecast:
        """The forecast of a picture."""
        args = styled(args)
        self._use_loras(find_loras(args))
        pipeline, pictures = self._pipeline, find_input_pictures(args)
        width, height, start = args.width, args.height, pictures["start_image"]
        steps, guidance, edit = args.steps, args.guidance, pictures["edit"]
        images = PromptImages(pictures["images"]).prepared()
        references = References(pictures["references"]).prepared()
        if start is not None and width is None:
            height, width = start.shape[1:]
        if edit is not None:
            steps, guidance = edit.settings(pipeline.preset, steps, guidance)
            if width is None and height is None:
                width, height = edit.size()
            plan, _ = edit.plan(width, height, pipeline.edit_families, pipeline.preset)
            images = plan.prompt_images
            references = [ReferencePicture(*each) for each in plan.references]
        prompt = tokenize_prompt(
            pipeline.text_encoder.get_tokenizer(),
            args.prompt,
            images=images,
            weighted=args.weights,
            max_sequence_length=args.max_sequence_length,
        )
        return pipeline.forecast(
            width,
            height,
            steps=steps,
            guidance=guidance,
            references=[
                (r.pixels.shape[2], r.pixels.shape[1])
                for r in references
                if isinstance(r, ReferencePicture)
            ],
            text_tokens=len(prompt.weight_row),
            control=controls_of(args, pictures["control_image"], pictures["control_mask"]),
            upscale=_upscale_of(args),
            style=pictures["style"],
            denoise=args.denoise,
            sparse=_sparse_of(args),
            blend=_blend_of(args),
        )

    def _options(
        self, args: Namespace, pictures: dict[str, Any], steps: int, guidance: float
    ) -> dict[str, Any]:
        references = References(pictures.pop("references"), method=args.reference_method)
        shown = [pictures.pop(name) for name in ("control_image", "control_mask")]
        nag, control = nag_settings(args), controls_of(args, *shown)
        sigmas = None
        if args.mu is not None and args.denoise > 0:
            sigmas = sigma_schedule(steps, args.mu, args.denoise)
        return {
            **pictures,
            "references": references,
            "control": control,
            "denoise": args.denoise,
            "width": args.width,
            "height": args.height,
            "steps": steps,
            "guidance": guidance,
            "max_sequence_length": args.max_sequence_length,
            "prompt_weights": args.weights,
            "layer_weights": args.layer_weights,
            "negative_guidance": None if nag is None else NegativeGuidance(**nag),
            "guidance_schedule": GuidanceSchedule(
                args.guidance_start, args.guidance_end, args.guidance_ramp, args.guidance_rescale
            ),
            "evaluate_every": args.evaluate_every,
            "sigmas": sigmas,
            "upscale": _upscale_of(args),
            "sparse": _sparse_of(args),
            "regions": regions_of(args),
            "blend": _blend_of(args),
        }

    def _use_loras(self, loras: list[tuple[Path, float]]) -> None:
        if loras == self._loras:
            return
        if self._loras:
            self._pipeline.unload_lora()
            self._loras = []
        for report in self._pipeline.load_loras(loras):
            self._console.note(str(report))
        self._loras = loras


def _sparse_of(args: Namespace) -> SparseAttention | None:
    return None if args.sparse_above is None else SparseAttention(args.sparse_above)


def _blend_of(args: Namespace) -> PromptBlend | None:
    return None if args.blend is None else PromptBlend(args.blend, args.blend_share)


def _upscale_of(args: Namespace) -> Upscale | None:
    """The second stage that options ask for."""
    if args.upscale is None:
        return None
    sees, texts = args.upscale_see_tiles, args.upscale_tile_prompt or None
    prompts = TilePrompts(sees, texts) if sees or texts else None
    return Upscale(args.upscale, args.upscale_sigma, prompts=prompts)
