"""LoRA files to changed MODEL and CLIP."""

import logging

from comfy_api.latest import io, ui

from . import inputs, model_files
from .managed.lora import apply_lora


class K2LoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2LoraLoader",
            display_name="Load Krea 2 LoRA",
            category="Krea 2",
            description=(
                "Applies a LoRA of any trainer to Krea 2, on any quantisation, and reports what of "
                "it fits. Chain several, each with its own strength."
            ),
            search_aliases=inputs.aliases("lora, lokr, loha, dora, lycoris"),
            inputs=[
                io.Model.Input("model", tooltip="The transformer."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder, for LoRAs that change it too (few do).",
                ),
                io.Combo.Input(
                    "lora",
                    options=model_files.list_loras(),
                    tooltip="A file of models/loras, or one that krea2-nano brings.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    tooltip="How much of it; 0 is none, below 0 the opposite.",
                ),
                io.Float.Input(
                    "clip_strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    advanced=True,
                    tooltip="The strength of its part for the text encoder, where it has one.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The transformer with the LoRA."),
                io.Clip.Output(tooltip="The text encoder, with the LoRA's part for it."),
                io.String.Output("report", display_name="report", tooltip="What matched."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora=None):
        return lora is None or model_files.problem(model_files.find_lora, lora)

    @classmethod
    def fingerprint_inputs(cls, lora=None, **others):
        return None if lora is None else model_files.fingerprint(model_files.find_lora(lora))

    @classmethod
    def execute(cls, model, lora, strength=1.0, clip=None, clip_strength=1.0):
        path = model_files.find_lora(lora)
        model, clip, report = apply_lora(model, clip, path, strength, clip_strength)
        log = logging.info if report.is_complete else logging.warning
        log("Krea 2 LoRA: %s", report)
        return io.NodeOutput(model, clip, str(report), ui=ui.PreviewText(str(report)))
