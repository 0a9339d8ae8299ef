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
                "Applies a LoRA to Krea 2, from any trainer and on any quantisation, and reports "
                "which parts match. Chain several nodes to combine LoRAs, each with its own "
                "strength."
            ),
            search_aliases=inputs.aliases("lora, lokr, loha, dora, lycoris"),
            inputs=[
                io.Model.Input("model", tooltip="The transformer."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder, for the few LoRAs that also change it.",
                ),
                io.Combo.Input(
                    "lora",
                    options=model_files.list_loras(),
                    extra_dict={inputs.SETTINGS: model_files.settings_of_loras()},
                    tooltip=(
                        "A file in models/loras, or one of the LoRAs that come with krea2-nano."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    tooltip=(
                        "LoRA weight of the transformer: 1 is as trained, 0 is off, negative "
                        "values reverse the effect."
                    ),
                ),
                io.Float.Input(
                    "clip_strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    advanced=True,
                    tooltip="LoRA weight of the text encoder, if the file changes it.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The transformer with the LoRA applied."),
                io.Clip.Output(tooltip="The text encoder with the LoRA applied."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The kind of LoRA and which layers match.",
                ),
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
