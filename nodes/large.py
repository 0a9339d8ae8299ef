"""Images larger than a checkpoint paints in one: tiles, rotary scaling, sparse attention."""

from comfy_api.latest import io

from ..krea2_model.config import RAW
from ..krea2_model.features.tiles import MAX_BATCH, TileSettings
from ..krea2_model.images.resize import colours
from ..krea2_model.images.sizes import MULTIPLE
from ..krea2_model.transformer.rotary_scaling import METHODS as ROTARY_METHODS
from ..krea2_model.transformer.rotary_scaling import RotaryScaling
from ..krea2_model.transformer.sparse_attention import SparseAttention
from . import inputs
from .inputs import check_limits, verdict
from .managed.diffusion_model import ROTARY, SPARSE, TILES
from .managed.tile_prompts import ModelTilePrompts, texts_of_prompt, with_tile_prompts
from .sampler_run import check_ours
from .tile_prompts import (
    SEEN_PROMPT,
    WHOLE_PROMPT,
    chosen_prompts,
    clip_input,
    tile_prompt_inputs,
)


def overlap_input():
    return io.Float.Input(
        "overlap",
        default=0.25,
        min=0.0,
        max=0.5,
        step=0.05,
        advanced=True,
        tooltip="Least overlap of neighbouring tiles, as a share of a tile.",
    )


def tile_input(advanced: bool = False):
    return io.Int.Input(
        "tile",
        default=0,
        min=0,
        max=4096,
        step=MULTIPLE,
        advanced=advanced,
        tooltip="Side of a tile in pixels; 0 is the size that the checkpoint was trained at.",
    )


def batch_input():
    return io.Int.Input(
        "batch",
        default=1,
        min=0,
        max=MAX_BATCH,
        advanced=True,
        optional=True,
        tooltip=(
            "Tiles in one call of the model: the same picture in the memory of so many. 0 is as "
            "many as fit, up to 8. With regions, masks of controls or style pictures tiles go one "
            "by one."
        ),
    )


class K2TiledSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2TiledSampling",
            display_name="Krea 2 Tiled Sampling",
            category="Krea 2",
            description=(
                "Lets any sampler denoise a large image in tiles that are fused at every step, in "
                "the memory of one tile. Best for an image that exists already (denoise below 1): "
                "from pure noise each tile would paint the whole prompt."
            ),
            search_aliases=inputs.aliases(
                "tiled diffusion, multidiffusion, mixture of diffusers, large, 4k, 8k, low vram"
            ),
            inputs=[
                io.Model.Input("model", tooltip="Krea 2 from a Krea 2 loader."),
                tile_input(),
                overlap_input(),
                io.Boolean.Input(
                    "move",
                    default=True,
                    advanced=True,
                    tooltip="Move the inner tiles at every step, so that no place is always an "
                    "edge.",
                ),
                io.Boolean.Input(
                    "true_places",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Count rotary positions (RoPE) from the image's corner instead of each "
                        "tile's own. Beyond the size of training this draws lines at the edges."
                    ),
                ),
                batch_input(),
                io.Boolean.Input(
                    "cut_references",
                    default=False,
                    advanced=True,
                    optional=True,
                    tooltip=(
                        "Each tile sees its own part of reference images, as for an edit of the "
                        "whole image; off: all of them."
                    ),
                ),
                clip_input(),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "The picture that is sampled, whose parts the text encoder sees; resized "
                        "to the run's size where it differs."
                    ),
                ),
                *tile_prompt_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The model, which denoises in tiles.")],
        )

    @classmethod
    def validate_inputs(cls, tile=None, overlap=None, batch=None):
        def check():
            share, count = 0.25 if overlap is None else overlap, 1 if batch is None else batch
            TileSettings(tile or 1024, share, batch=count)

        return verdict(cls, check, tile=tile, overlap=overlap, batch=batch)

    @classmethod
    def execute(
        cls,
        model,
        tile=0,
        overlap=0.25,
        move=True,
        true_places=False,
        batch=1,
        cut_references=False,
        clip=None,
        image=None,
        tile_prompt=WHOLE_PROMPT,
        prompt="",
    ):
        check_ours(model, "which has no tiles")
        numbers = {"tile": tile, "overlap": overlap, "batch": batch}
        check_limits(cls, tile_prompt=tile_prompt, prompt=prompt, **numbers)
        prompts = chosen_prompts(clip, tile_prompt, prompt)
        side = tile or _size_of(model)
        settings = TileSettings(side, overlap, move, true_places, batch, cut_references, prompts)
        if prompts is None:
            return io.NodeOutput(in_tiles(model, settings))
        pictures = None
        if prompts.see_picture:
            if image is None:
                raise ValueError(
                    f"tile_prompt is {SEEN_PROMPT!r}, and there is no picture. Connect the one "
                    f"that is sampled to image, or choose {WHOLE_PROMPT!r}."
                )
            pictures = colours(image)
        own = ModelTilePrompts(clip, settings, pictures, texts_of_prompt(prompt))
        return io.NodeOutput(in_tiles(model, settings, own))


class K2RotaryScaling(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2RotaryScaling",
            display_name="Krea 2 Rotary Scaling",
            category="Krea 2",
            description=(
                "Stretches rotary positions (RoPE) of images larger than those of training, "
                "against double subjects. Not needed up to the size that the checkpoint was "
                "trained at, where it changes nothing."
            ),
            search_aliases=inputs.aliases("rope, ntk, yarn, dype, large, 4k, double subjects"),
            inputs=[
                io.Model.Input("model", tooltip="Krea 2 from a Krea 2 loader."),
                io.Combo.Input(
                    "method",
                    options=list(ROTARY_METHODS),
                    default="yarn",
                    tooltip=(
                        "ntk raises the base of all frequencies; yarn stretches the long waves "
                        "and leaves the short ones, which hold detail."
                    ),
                ),
                io.Boolean.Input(
                    "dynamic",
                    default=True,
                    tooltip=(
                        "DyPE: stretch most at high noise, where the layout is decided, and not "
                        "at all at the end."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=2.0,
                    min=0.05,
                    max=4.0,
                    step=0.05,
                    tooltip=(
                        "Exponent of the stretch: 1 maps the image's side to that of training; "
                        "dynamic starts at it and falls, so 2 is usual there."
                    ),
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=8192,
                    step=MULTIPLE,
                    advanced=True,
                    tooltip=(
                        "Side in pixels up to which nothing changes; 0 is the size that the "
                        "checkpoint was trained at."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the scaling.")],
        )

    @classmethod
    def validate_inputs(cls, strength=None, size=None):
        def check():
            RotaryScaling(size or 1024, strength=2.0 if strength is None else strength)

        return verdict(cls, check, strength=strength, size=size)

    @classmethod
    def execute(cls, model, method="yarn", dynamic=True, strength=2.0, size=0):
        check_ours(model, "which has no scaled rotary positions")
        check_limits(cls, method=method, strength=strength, size=size)
        scaling = RotaryScaling(size or _size_of(model), method, dynamic, strength)
        return io.NodeOutput(with_options(model, {ROTARY: scaling}))


class K2SparseAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2SparseAttention",
            display_name="Krea 2 Sparse Attention",
            category="Krea 2",
            description=(
                "In steps of high noise a token of a large image sees its neighbourhood and a "
                "coarse view of the rest: faster beyond 2048 px, and not exact. Images of up to "
                "two blocks a side stay as they are."
            ),
            search_aliases=inputs.aliases(
                "sparse attention, neighbourhood attention, window, local attention, faster, 4k"
            ),
            inputs=[
                io.Model.Input("model", tooltip="Krea 2 from a Krea 2 loader."),
                io.Float.Input(
                    "above",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Sigma above which a step is sparse; steps at or below it are exact. 1 is "
                        "off, 0 makes all steps sparse."
                    ),
                ),
                io.Int.Input(
                    "block",
                    default=16,
                    min=2,
                    max=64,
                    advanced=True,
                    tooltip="Side of a block in tokens of 16 pixels.",
                ),
                io.Int.Input(
                    "reach",
                    default=1,
                    min=0,
                    max=8,
                    advanced=True,
                    tooltip="Blocks around its own that a token sees, to each side.",
                ),
                io.Int.Input(
                    "stride",
                    default=4,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Distance of the rows and columns that are seen from everywhere.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with sparse attention.")],
        )

    @classmethod
    def validate_inputs(cls, above=None, block=None, reach=None, stride=None):
        values = {"above": above, "block": block, "reach": reach, "stride": stride}

        def check():
            SparseAttention(**{name: value for name, value in values.items() if value is not None})

        return verdict(cls, check, **values)

    @classmethod
    def execute(cls, model, above=0.6, block=16, reach=1, stride=4):
        check_ours(model, "which has no sparse attention")
        check_limits(cls, above=above, block=block, reach=reach, stride=stride)
        settings = SparseAttention(above, block, reach, stride)
        return io.NodeOutput(with_options(model, {SPARSE: settings}))


def _size_of(model) -> int:
    """The side in pixels of the squares that a MODEL was trained at."""
    return (getattr(model.model, "preset", None) or RAW).size


def in_tiles(model, settings: TileSettings, prompts: ModelTilePrompts | None = None):
    """A clone of a MODEL in these tiles, with prompts of theirs, in place of those that it has."""
    return with_options(with_tile_prompts(model, prompts), {TILES: settings})


def with_options(model, options: dict):
    clone = model.clone()
    clone.model_options["transformer_options"].update(options)
    return clone
