"""Pictures by a pipeline that is loaded once: the options of one picture to a call of it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..arguments import PromptImages, References
from ..guidance import GuidanceSchedule
from ..memory.forecast import Forecast
from ..pipeline import Krea2Pipeline
from ..schedule import sigma_schedule
from ..text.prompt_tokens import tokenize_prompt
from ..transformer.text_attention import NegativeGuidance
from .checks import find_input_pictures, nag_settings, note_unused
from .model_files import Weights, find_loras
from .progress import Console


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

    def paint(self, args: Namespace, title: str) -> Picture:
        """One picture; `args.prompt` is used as it is."""
        self._use_loras(find_loras(args))
        preset = self._pipeline.preset
        steps = preset.steps if args.steps is None else args.steps
        guidance = preset.guidance if args.guidance is None else args.guidance
        note_unused(args, guidance, self._console)
        options = self._options(args, steps, guidance)
        with self._console.bar(steps, f"{title}: reading the prompt", unit="step") as bar:

            def step_done(step, latents, predicted) -> None:
                bar.set_description(
                    f"{title}: {'decoding' if step == steps else 'sampling'}", False
                )
                bar.update()

            images = self._pipeline(args.prompt, args.negative, callback=step_done, **options)
            assert isinstance(images, list), "output_type is pil"
            image = images[0]
            bar.set_description(title)
        width, height = image.size
        results = {"width": width, "height": height, "steps": steps, "guidance": guidance}
        return Picture(image, results)

    def forecast(self, args: Namespace) -> Forecast:
        """What a picture will take."""
        self._use_loras(find_loras(args))
        inputs = find_input_pictures(args)
        width, height, start = args.width, args.height, inputs["start_image"]
        if start is not None and width is None:
            height, width = start.shape[1:]
        references = References(inputs["references"]).prepared()
        sizes = [
            (image.shape[2], image.shape[1]) for image in references if isinstance(image, Tensor)
        ]
        prompt = tokenize_prompt(
            self._pipeline.text_encoder.get_tokenizer(),
            args.prompt,
            images=PromptImages(inputs["images"]).prepared(),
            weighted=args.weights,
            max_sequence_length=args.max_sequence_length,
        )
        return self._pipeline.forecast(
            width,
            height,
            steps=args.steps,
            guidance=args.guidance,
            references=sizes,
            text_tokens=len(prompt.weight_row),
        )

    def _options(self, args: Namespace, steps: int, guidance: float) -> dict[str, Any]:
        pictures = find_input_pictures(args)
        references = References(pictures.pop("references"), method=args.reference_method)
        nag = nag_settings(args)
        return {
            **pictures,
            "references": references,
            "denoise": args.denoise,
            "width": args.width,
            "height": args.height,
            "steps": steps,
            "guidance": guidance,
            "seed": args.seed,
            "max_sequence_length": args.max_sequence_length,
            "prompt_weights": args.weights,
            "layer_weights": args.layer_weights,
            "negative_guidance": None if nag is None else NegativeGuidance(**nag),
            "guidance_schedule": GuidanceSchedule(
                args.guidance_start, args.guidance_end, args.guidance_ramp, args.guidance_rescale
            ),
            "evaluate_every": args.evaluate_every,
            "sigmas": None if args.mu is None else sigma_schedule(steps, args.mu, args.denoise),
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
