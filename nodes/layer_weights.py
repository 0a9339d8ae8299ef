"""Weights of the encoder layers (taps) that a prompt is made of."""

from comfy_api.latest import io

from ..krea2_model.text.layer_weights import weigh_taps
from . import inputs

# The layers of the text encoder that Krea 2 reads, in order.
LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)


class K2TapWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2TapWeights",
            display_name="Krea 2 Layer Mix",
            category="Krea 2",
            description=(
                "Sets the weights of the twelve text encoder layers that Krea 2 reads; each token "
                "keeps its norm. With equal weights the prompt is unchanged."
            ),
            search_aliases=inputs.aliases("taps, layers, rebalance, hidden states"),
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="An encoded prompt."),
                *(
                    io.Float.Input(
                        f"layer_{layer}",
                        default=1.0,
                        min=0.0,
                        max=8.0,
                        step=0.05,
                        tooltip="Weight of this layer relative to the others; 0 leaves it out.",
                    )
                    for layer in LAYERS
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="The prompt with these layer weights.")],
        )

    @classmethod
    def execute(cls, conditioning, **layers):
        weights = [layers.get(f"layer_{layer}", 1.0) for layer in LAYERS]
        mixed = []
        for states, extra in conditioning:
            if states.shape[-1] % len(LAYERS):
                raise ValueError(
                    f"The conditioning has {states.shape[-1]} features a token; expected "
                    f"{len(LAYERS)} layers of one width (30720 for Krea 2). Connect a prompt of "
                    "Krea 2 Prompt."
                )
            taps = states.unflatten(-1, (len(LAYERS), -1))
            mixed.append([weigh_taps(taps, weights).flatten(2), extra])
        return io.NodeOutput(mixed)
