"""Neighbours of a picture, and walks between two."""

from comfy_api.latest import io, ui

from ..krea2_model.features.variations import STRENGTH, frame_shares
from ..krea2_model.schedule import MAX_SEED
from . import inputs
from .inputs import check_limits, verdict
from .managed.noise import NeighbourNoise, WalkNoise

MAX_FRAMES = 4096
# end_seed of a walk that keeps its noise.
SAME = -1


class K2Vary(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Vary",
            display_name="Krea 2 Vary",
            category="Krea 2",
            description=(
                "Noise for neighbours of a picture: a seed's noise, moved towards that of other "
                "seeds. A batch gives as many neighbours of one picture."
            ),
            search_aliases=inputs.aliases(
                "variation, variations, subseed, variation seed, slerp, noise, similar"
            ),
            inputs=[
                # Without a control that draws another picture for the next run.
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=False,  # else the page adds one to this name
                    tooltip="Seed of the picture to vary.",
                ),
                inputs.seed(
                    "Seed to move towards: image i of a batch uses variation_seed + i.",
                    "variation_seed",
                ),
                io.Float.Input(
                    "strength",
                    default=STRENGTH,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=False,
                    tooltip="How far to go: 0 is the picture, 1 that of the variation seed.",
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=MAX_FRAMES,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Number of the first image, from 0, to make one neighbour of a batch again "
                        "by itself."
                    ),
                ),
                io.Noise.Input(
                    "noise",
                    optional=True,
                    tooltip=(
                        "Noise to vary in place of seed, of another Krea 2 Vary for example: "
                        "neighbours of a neighbour. Its first image is taken."
                    ),
                ),
            ],
            outputs=[
                io.Noise.Output(
                    display_name="noise",
                    tooltip="For Krea 2 Sampler and SamplerCustomAdvanced, with any batch.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, strength=None, index=None):
        return verdict(cls, lambda: None, strength=strength, index=index)

    @classmethod
    def execute(cls, seed, variation_seed, strength=STRENGTH, index=0, noise=None):
        check_limits(cls, seed=seed, variation_seed=variation_seed, strength=strength, index=index)
        return io.NodeOutput(NeighbourNoise(seed, variation_seed + index, strength, noise))


class K2Walk(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Walk",
            display_name="Krea 2 Walk",
            category="Krea 2",
            description=(
                "Frames of a way between two prompts, two seeds, or both: lists of conditionings "
                "and noise. Krea 2 Sampler then makes one frame after the other."
            ),
            search_aliases=inputs.aliases(
                "walk, interpolate, interpolation, morph, blend, slerp, travel, animation, frames"
            ),
            inputs=[
                io.Conditioning.Input("start", tooltip="The prompt of the first frame."),
                io.Conditioning.Input(
                    "end",
                    optional=True,
                    tooltip="The prompt of the last frame; without it the prompt stays.",
                ),
                io.Int.Input(
                    "frames",
                    default=12,
                    min=2,
                    max=MAX_FRAMES,
                    tooltip="Number of frames, the first and the last among them.",
                ),
                inputs.seed("Seed of the first frame."),
                io.Int.Input(
                    "end_seed",
                    default=SAME,
                    min=SAME,
                    max=MAX_SEED,
                    tooltip="Seed of the last frame; -1 keeps the noise of seed in all frames.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive",
                    is_output_list=True,
                    tooltip="The blended prompts, one a frame, for positive of Krea 2 Sampler.",
                ),
                io.Noise.Output(
                    display_name="noise",
                    is_output_list=True,
                    tooltip="The noise of each frame, for noise of Krea 2 Sampler.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, frames=None, end_seed=None):
        return verdict(cls, lambda: None, frames=frames, end_seed=end_seed)

    @classmethod
    def execute(cls, start, end=None, frames=12, seed=0, end_seed=SAME):
        check_limits(cls, frames=frames, seed=seed, end_seed=end_seed)
        if end is None and end_seed == SAME:
            raise ValueError(
                "There is nothing to walk to: end is not connected and end_seed is -1. Connect a "
                "second prompt, or set end_seed."
            )
        shares = frame_shares(frames)
        positive = [start if end is None else blended(start, end, share) for share in shares]
        last = seed if end_seed == SAME else end_seed
        noise = [WalkNoise(seed, last, share) for share in shares]
        walks = ["prompts"] * (end is not None) + [f"seeds {seed} to {last}"] * (last != seed)
        report = f"{frames} frames: {', '.join(walks) or 'one seed'}"
        return io.NodeOutput(positive, noise, ui=ui.PreviewText(report))


def blended(start, end, share: float):
    """CONDITIONING whose predictions ComfyUI averages: 0 is start and 1 is end, as they are."""
    if share in (0, 1):
        return end if share else start
    return [
        [states, {**extra, "strength": extra.get("strength", 1.0) * part}]
        for conditioning, part in ((start, 1 - share), (end, share))
        for states, extra in conditioning
    ]
