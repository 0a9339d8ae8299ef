"""Options of a picture, which generate, render and again share, in groups by topic."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from ..guidance import RAMPS
from ..images.sizes import MAX_SCALE, MAX_SIZE
from ..lora.control_files import MAX_STRENGTH
from ..schedule import MAX_GUIDANCE, MAX_MU, MAX_SEED, MAX_STEPS
from .choices import EDIT_FAMILIES, EDIT_TASKS, FILLS, REFERENCE_METHODS
from .values import lora, number, numbers, style, variation, whole

# Options that decide how a picture looks, and are kept in its file. Those after it do not.
PICTURE = (
    "model", "transformer", "text_encoder", "vae", "tokenizer", "lora", "dtype",
    "prompt", "negative", "weights", "layer_weights", "max_sequence_length",
    "width", "height", "steps", "seed", "mu", "evaluate_every",
    "guidance", "guidance_start", "guidance_end", "guidance_ramp", "guidance_rescale",
    "nag", "nag_scale", "nag_blend", "nag_limit", "nag_start", "nag_end",
    "start_image", "denoise", "mask", "mask_grow", "mask_feather", "mask_hard", "mask_fill",
    "upscale", "upscale_sigma", "upscale_see_tiles", "upscale_tile_prompt", "sparse_above",
    "reference", "reference_method", "image",
    "edit", "edit_family", "edit_task", "edit_boost",
    "control", "control_image", "control_strength", "control_start", "control_end",
    "control_mask",
    "style_image", "style_strength", "style_start", "style_end",
    "regions",
    "vary", "blend", "blend_share", "style",
)  # fmt: skip
# Of these, files: a picture keeps their names without folders.
FILES = ("model", "transformer", "text_encoder", "vae", "tokenizer", "lora", "control")
PICTURES = (
    *("start_image", "mask", "reference", "image", "edit"),
    *("control_image", "control_mask", "style_image"),
)
# Options that may be repeated.
REPEATED = (
    *("lora", "reference", "image", "edit", "style_image"),
    *("control", "control_image", "control_strength", "control_start", "control_end"),
    "control_mask",
    "vary",
    "style",
    "upscale_tile_prompt",
)
WEIGHTS = ("model", "transformer", "text_encoder", "vae", "tokenizer")


@cache
def picture_defaults() -> dict[str, Any]:
    """Defaults of the options of a picture, by name."""
    parser = argparse.ArgumentParser()
    add_picture_options(parser)
    return vars(parser.parse_args([]))


def add_picture_options(
    parser: argparse.ArgumentParser, images: int = 1, each: str = "each with the next seed"
) -> None:
    """images, each: the default of --images, and what tells the pictures apart."""
    files = parser.add_argument_group("model files")
    files.add_argument(
        "--model", metavar="NAME",
        help="a diffusers folder or an all-in-one file; or nano or nano-raw, small and built in",
    )  # fmt: skip
    for name, what in (
        ("transformer", "a transformer file or folder"),
        ("text-encoder", "a Qwen3-VL file or folder"),
        ("vae", "a Qwen-Image VAE file or folder"),
    ):
        files.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    files.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="a folder with the Qwen tokenizer"
    )
    files.add_argument(
        "--lora", type=lora, action="append", default=[], metavar="FILE[:SCALE]",
        help="a LoRA of any trainer; repeat it for several",
    )  # fmt: skip
    files.add_argument(
        "--models", type=Path, metavar="FOLDER",
        help="ComfyUI's models folder, where these files are looked for by name, and taken from if "
        "none is named; default: that of COMFYUI_PATH",
    )  # fmt: skip

    picture = parser.add_argument_group("picture")
    side, seed = whole(1, MAX_SIZE), whole(0, MAX_SEED)
    picture.add_argument(
        "--width", type=side, metavar="PX", help="default: the checkpoint's, 1024 (nano 128)"
    )
    picture.add_argument("--height", type=side, metavar="PX", help="likewise")
    picture.add_argument(
        "--steps", type=whole(1, MAX_STEPS), metavar="N", help="default: the checkpoint's"
    )
    picture.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="of the first picture; default: 0"
    )
    picture.add_argument(
        "--images", type=whole(1, 100_000), default=images, metavar="N",
        help=f"how many, {each}; default: {images}",
    )  # fmt: skip
    picture.add_argument(
        "--vary", type=variation, action="append", default=[], metavar="SEED:STRENGTH",
        help="move the noise towards that of another seed, from 0 to 1; repeat it to move on",
    )  # fmt: skip

    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--negative", default="", metavar="TEXT",
        help="what not to show; needs guidance above 0 (Raw), or --nag (Turbo)",
    )  # fmt: skip
    prompt.add_argument("--blend", metavar="TEXT", help="another prompt, to blend the prompt with")
    prompt.add_argument(
        "--blend-share", type=number(0, 1), default=0.5, metavar="X",
        help="its share, from 0 (none) to 1 (it alone); default: 0.5",
    )  # fmt: skip
    prompt.add_argument(
        "--no-weights", dest="weights", action="store_false",
        help="(word:1.3) is text; default: a weight",
    )  # fmt: skip
    prompt.add_argument(
        "--no-wildcards", dest="wildcards", action="store_false",
        help="{red|blue} and __colour__ are text; default: one is drawn by the seed",
    )  # fmt: skip
    prompt.add_argument(
        "--wildcard-folder", type=Path, metavar="FOLDER",
        help="colour.txt there has the choices of __colour__, a line each",
    )  # fmt: skip
    prompt.add_argument(
        "--max-sequence-length", type=whole(6), metavar="N", help="cut the prompt; 512 is official"
    )
    prompt.add_argument(
        "--layer-weights", type=numbers(12), metavar="W,W,...",
        help="12 weights of the text encoder's layers",
    )  # fmt: skip

    guidance = parser.add_argument_group("guidance")
    share = number(0, 1)
    guidance.add_argument(
        "--guidance", type=number(0, MAX_GUIDANCE), metavar="X",
        help="Krea's convention, 0 is off, ComfyUI's cfg - 1; default: the checkpoint's",
    )  # fmt: skip
    guidance.add_argument(
        "--guidance-start", type=share, default=0.0, metavar="X",
        help="begin at this share of the run; default: 0",
    )  # fmt: skip
    guidance.add_argument(
        "--guidance-end", type=share, default=1.0, metavar="X", help="and stop here; default: 1"
    )
    guidance.add_argument(
        "--guidance-ramp", choices=tuple(RAMPS), default="constant", help="default: constant"
    )
    guidance.add_argument(
        "--guidance-rescale", type=share, default=0.0, metavar="X",
        help="take back contrast, 0 to 1; default: 0",
    )  # fmt: skip
    guidance.add_argument(
        "--nag", action="store_true", help="negative for Turbo: normalised attention guidance"
    )
    guidance.add_argument(
        "--nag-scale", type=number(0), metavar="X", help="its strength; default: 4"
    )
    guidance.add_argument("--nag-blend", type=share, metavar="X", help="its share; default: 0.25")
    guidance.add_argument("--nag-limit", type=number(1), metavar="X", help="default: 2.5")
    guidance.add_argument(
        "--nag-start", type=share, metavar="X", help="share of the run; default: 0"
    )
    guidance.add_argument("--nag-end", type=share, metavar="X", help="likewise; default: 0.75")

    inputs = parser.add_argument_group("pictures as input")
    inputs.add_argument(
        "--start-image", type=Path, metavar="FILE", help="a picture to change, see --denoise"
    )
    inputs.add_argument(
        "--denoise", type=number(0, 1), default=1.0, metavar="X",
        help="how much to change it; 1 is all of it, 0 nothing, see --upscale",
    )  # fmt: skip
    inputs.add_argument(
        "--mask", type=Path, metavar="FILE",
        help="paint only the white part of the start picture, of the same size; grey changes less",
    )  # fmt: skip
    pixels = whole(0, 1024)
    inputs.add_argument(
        "--mask-grow", type=pixels, default=8, metavar="PX", help="make it larger; default: 8"
    )
    inputs.add_argument(
        "--mask-feather", type=pixels, default=8, metavar="PX",
        help="fade the change out over so many pixels beyond; default: 8",
    )  # fmt: skip
    inputs.add_argument(
        "--mask-hard", action="store_true", help="a place is painted or not, by half"
    )
    inputs.add_argument(
        "--mask-fill", choices=FILLS, default=FILLS[0],
        help="what is under the mask at the start; grey or surroundings to remove things",
    )  # fmt: skip
    inputs.add_argument(
        "--reference", type=Path, action="append", default=[], metavar="FILE",
        help="a picture to look at, for LoRAs that take references; repeat it for several",
    )  # fmt: skip
    inputs.add_argument(
        "--reference-method", choices=REFERENCE_METHODS, default=REFERENCE_METHODS[0],
        metavar="NAME", help="index_timestep_zero (default), or index for identity LoRAs",
    )  # fmt: skip
    inputs.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE",
        help="a picture in the prompt, for LoRAs that read pictures; repeat it for several",
    )  # fmt: skip

    inputs.add_argument(
        "--edit", type=Path, action="append", default=[], metavar="FILE",
        help="a picture to edit as the prompt says, with an edit LoRA; a second one is a subject "
        "to put into it",
    )  # fmt: skip
    inputs.add_argument(
        "--edit-family", choices=("auto", *EDIT_FAMILIES), default="auto", metavar="NAME",
        help="how the LoRA was trained: identity, ai-toolkit or references-only; default: auto, "
        "by its file",
    )  # fmt: skip
    inputs.add_argument(
        "--edit-task", choices=EDIT_TASKS, default=EDIT_TASKS[0], metavar="NAME",
        help="edit (default), removal, outpainting or person: settings that it needs",
    )  # fmt: skip
    inputs.add_argument(
        "--edit-boost", type=number(0, 1000), default=1.0, metavar="X",
        help="factor on attention to the pictures, above 1 keeps more of them; default: 1",
    )  # fmt: skip

    large = parser.add_argument_group("large pictures")
    large.add_argument(
        "--upscale", type=number(1, MAX_SCALE, above=True), metavar="X",
        help="make the picture X times larger in a second stage, in tiles where it is more than "
        "the checkpoint paints well; with --start-image FILE --denoise 0, a picture that exists",
    )  # fmt: skip
    large.add_argument(
        "--upscale-sigma", type=number(0, 1, above=True), default=0.3, metavar="X",
        help="its noise: 0.3 keeps shapes, 0.6 changes them; default: 0.3",
    )  # fmt: skip
    large.add_argument(
        "--upscale-see-tiles", action="store_true",
        help="the text encoder reads each tile's part of the picture beside the prompt",
    )  # fmt: skip
    large.add_argument(
        "--upscale-tile-prompt", action="append", default=[], metavar="TEXT",
        help="a tile's own text in place of the prompt; repeat it for each tile, from the top "
        "left row by row",
    )  # fmt: skip
    large.add_argument(
        "--sparse-above", type=number(0, 1), metavar="SIGMA",
        help="in steps above this sigma a token sees its neighbourhood and a coarse view of the "
        "picture: faster beyond 2048 px, and not exact; 0.6 for example",
    )  # fmt: skip

    control = parser.add_argument_group("control")
    control.add_argument(
        "--control", type=Path, action="append", default=[], metavar="FILE",
        help="a control LoRA; krea2_nano_control_lora.safetensors is that of nano, for outlines; "
        "repeat it for several, with the other options as often, or once for all of them",
    )  # fmt: skip
    control.add_argument(
        "--control-image", type=Path, action="append", default=[], metavar="FILE",
        help="what the picture follows, as the LoRA was trained: outlines, depth, a pose",
    )  # fmt: skip
    control.add_argument(
        "--control-strength", type=number(-MAX_STRENGTH, MAX_STRENGTH), action="append",
        default=[], metavar="X", help="0 is off; default: 1, as trained",
    )  # fmt: skip
    control.add_argument(
        "--control-start", type=share, action="append", default=[], metavar="X",
        help="begin at this share of the run; default: 0",
    )  # fmt: skip
    control.add_argument(
        "--control-end", type=share, action="append", default=[], metavar="X",
        help="and stop here; default: 1",
    )  # fmt: skip
    control.add_argument(
        "--control-mask", type=Path, action="append", default=[], metavar="FILE",
        help="where it acts, white, of the size of its picture; none, of several: everywhere; "
        "default: everywhere",
    )  # fmt: skip

    styles = parser.add_argument_group("style")
    styles.add_argument(
        "--style", type=style, action="append", default=[], metavar="NAME[:WEIGHT]",
        help="a style of the library (krea2 styles); repeat it for several at once",
    )  # fmt: skip
    styles.add_argument(
        "--style-folder", type=Path, metavar="FOLDER",
        help="the library; default: KREA2_STYLES, or that of the user",
    )  # fmt: skip
    styles.add_argument(
        "--style-image", type=Path, action="append", default=[], metavar="FILE",
        help="a picture whose style to take over, without a LoRA; repeat it for several",
    )  # fmt: skip
    styles.add_argument(
        "--style-strength", type=number(0, 10), default=1.0, metavar="X",
        help="0 is off; default: 1, and with guidance (Raw) try 0.4",
    )  # fmt: skip
    styles.add_argument(
        "--style-start", type=share, default=0.0, metavar="X",
        help="begin at this share of the run; default: 0",
    )  # fmt: skip
    styles.add_argument(
        "--style-end", type=share, default=0.8, metavar="X",
        help="and stop here; default: 0.8",
    )  # fmt: skip

    places = parser.add_argument_group("regions")
    places.add_argument(
        "--regions", metavar="FILE",
        help="prompts and LoRAs for parts of the picture: a JSON file, or the JSON itself, such as "
        '[{"prompt": "a red fox", "box": [0, 0, 0.5, 1]}] for the left half',
    )  # fmt: skip

    speed = parser.add_argument_group("schedule")
    speed.add_argument(
        "--mu", type=number(-MAX_MU, MAX_MU), metavar="X",
        help="time shift; default: the checkpoint's (Turbo 1.15, Raw by size)",
    )  # fmt: skip
    speed.add_argument(
        "--evaluate-every", type=whole(1, MAX_STEPS), default=1, metavar="N",
        help="2: later steps in turns without the model, faster and not exact",
    )  # fmt: skip


def add_run_options(
    parser: argparse.ArgumentParser,
    output: Path = Path("krea2.png"),
    help_text: str = "a .png, .jpg or .webp file; default: krea2.png, or krea2-2.png if it exists",
    read: Callable[[str], Path | str] = Path,
) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output", "-o", type=read, default=output, metavar="FILE", help=help_text)
    group.add_argument("--force", action="store_true", help="replace files that exist")
    group.add_argument(
        "--no-metadata", dest="metadata", action="store_false",
        help="keep prompt and settings out of the file",
    )  # fmt: skip
