"""Guidance beyond that of the sampler."""

from comfy_api.latest import io

from ..krea2_model.transformer.text_attention import NegativeGuidance
from . import inputs
from .managed.conditions import NEGATIVE_GUIDANCE
from .sampler_run import check_ours


class K2NegativeGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2NegativeGuidance",
            display_name="Krea 2 Negative (NAG)",
            category="Krea 2",
            description=(
                "Gives Turbo (guidance 0) a negative prompt by normalised attention guidance "
                "(NAG), without a second pass of the model."
            ),
            search_aliases=inputs.aliases(
                "nag, negative, negative without guidance, turbo, normalized attention guidance"
            ),
            inputs=[
                io.Model.Input("model", tooltip="Krea 2 from a Krea 2 loader, usually Turbo."),
                io.Conditioning.Input(
                    "negative", tooltip="The encoded negative prompt, from Krea 2 Prompt."
                ),
                io.Float.Input(
                    "strength",
                    default=4.0,
                    min=0.0,
                    max=50.0,
                    step=0.5,
                    tooltip=(
                        "NAG scale: how strongly the image is pushed away from the negative "
                        "prompt; 0 is off."
                    ),
                ),
                io.Float.Input(
                    "blend",
                    default=0.25,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=(
                        "NAG alpha: share of the guided result in the attention output. Raise it "
                        "when more strength changes nothing."
                    ),
                ),
                inputs.window(
                    "start",
                    0.0,
                    "Start percent of the schedule (0 to 1): NAG begins here. A run at denoise "
                    "0.6 begins at 0.4.",
                ),
                inputs.window(
                    "end",
                    0.75,
                    "End percent of the schedule (0 to 1): NAG stops here, and later steps "
                    "cost nothing extra. Image content is settled early.",
                ),
                io.Float.Input(
                    "limit",
                    default=2.5,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    advanced=True,
                    tooltip=(
                        "NAG tau: maximum size of the guided attention output relative to the "
                        "output without NAG."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with NAG.")],
        )

    @classmethod
    def execute(cls, model, negative, strength=4.0, blend=0.25, start=0.0, end=0.75, limit=2.5):
        check_ours(model, "where this negative has no effect")
        settings = NegativeGuidance(strength, limit, blend, start, end)
        if len(negative) != 1:
            raise ValueError(
                f"negative has {len(negative)} parts; expected one. Write all of it in one Krea 2 "
                "Prompt instead of combining several."
            )
        model = model.clone()
        if not settings.is_off:
            options = model.model_options["transformer_options"]
            options[NEGATIVE_GUIDANCE] = (settings, *negative[0])
        return io.NodeOutput(model)
