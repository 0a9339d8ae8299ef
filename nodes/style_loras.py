"""Krea's nine style LoRAs by name: file, strength and trigger words together.

The words and strengths are those that Krea and ComfyUI publish with the files
(https://huggingface.co/Comfy-Org/Krea-2).
"""

import logging
from pathlib import Path

from comfy_api.latest import io, ui

from ..krea2_model.checkpoints.identify import CheckpointError
from . import inputs, model_files
from .managed.lora import apply_lora
from .model_files import NANO_NOTEBOOK_LORA

# Trigger words by name of the file; all are recommended at strength 1.
TRIGGERS = {
    "krea2_darkbrush": "monochrome ink wash style",
    "krea2_dotmatrix": "monochrome stippling style",
    "krea2_kidsdrawing": "naive expressive sketch style",
    "krea2_neondrip": "textured abstract style",
    "krea2_rainywindow": "rainy window style",
    "krea2_retroanime": "purple retro anime style",
    "krea2_softwatercolor": "art deco watercolor style",
    "krea2_sunsetblur": "ethereal motion blur style",
    "krea2_vintagetarot": "vintage tarot style",
}
NONE = "none"
_ADDRESS = "https://huggingface.co/Comfy-Org/Krea-2/resolve/main/loras/{}.safetensors"


class K2StyleLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2StyleLora",
            display_name="Krea 2 Style LoRA",
            category="Krea 2",
            description=(
                "Applies one of Krea's nine style LoRAs and adds its trigger words to the prompt: "
                "choose a style, and file, strength and words follow."
            ),
            search_aliases=inputs.aliases("style, lora, trigger words, watercolor, anime"),
            inputs=[
                io.Model.Input("model", tooltip="The transformer."),
                inputs.prompt("What the image should show, without words for the style."),
                io.Combo.Input(
                    "style",
                    options=[NONE, *TRIGGERS, NANO_NOTEBOOK_LORA],
                    default=next(iter(TRIGGERS)),
                    tooltip=(
                        "The LoRA, a file of this name in models/loras. none changes nothing; the "
                        "last one is krea2-nano's, for krea2-nano only."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    tooltip="LoRA weight; 1 is what Krea recommends for all nine.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The transformer with the LoRA applied."),
                io.String.Output(
                    "prompt",
                    display_name="prompt",
                    tooltip="The prompt with the trigger words at its end, for Krea 2 Prompt.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, style=None):
        return style is None or model_files.problem(find_style, style)

    @classmethod
    def fingerprint_inputs(cls, style=None, **others):
        path = None if style is None else find_style(style)
        return None if path is None else model_files.fingerprint(path)

    @classmethod
    def execute(cls, model, prompt, style=next(iter(TRIGGERS)), strength=1.0):  # noqa: B008
        path = find_style(style)
        if path is None:
            return io.NodeOutput(model, prompt, ui=ui.PreviewText("no style"))
        model, _, report = apply_lora(model, None, path, strength, 0.0)
        log = logging.info if report.is_complete else logging.warning
        log("Krea 2 LoRA: %s", report)
        trigger = TRIGGERS.get(style, "")
        text = with_trigger(prompt, trigger)
        lines = [f"adds: {trigger}" if trigger else "no trigger words"]
        return io.NodeOutput(model, text, ui=ui.PreviewText("\n".join([*lines, str(report)])))


def find_style(style: str) -> Path | None:
    """The LoRA file of a style; None for the choice none.

    Raises CheckpointError for an unknown style, and for a file that is not here or broken.
    """
    model_files.check_text(style)
    if style == NONE:
        return None
    if style == NANO_NOTEBOOK_LORA:
        return model_files.find_lora(style)
    if style not in TRIGGERS:
        raise CheckpointError(
            f"style is {style!r}; expected {NONE}, {', '.join(TRIGGERS)} or {NANO_NOTEBOOK_LORA}. "
            "Use Load Krea 2 LoRA for other files."
        )
    name = f"{style}.safetensors"
    files = {Path(each.replace("\\", "/")).name: each for each in model_files.list_loras()}
    if name not in files:
        raise CheckpointError(
            f"There is no {name} in models/loras. Download it from {_ADDRESS.format(style)}, put "
            "it there and refresh, or choose none."
        )
    return model_files.find_lora(files[name])


def with_trigger(prompt: str, trigger: str) -> str:
    """The prompt with the trigger words at its end, unless it has them already."""
    prompt = prompt.strip()
    if not trigger or trigger.lower() in prompt.lower():
        return prompt
    return f"{prompt.rstrip('.,; ')}, {trigger}" if prompt else trigger
