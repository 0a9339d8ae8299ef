"""Checks of everything that a run needs, before any weight is read."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpoints.identify import read_header
from ..checkpoints.pairing import check_parts
from ..checkpoints.text_encoder import find_tokenizer
from ..config import PRESETS
from ..features.edits import AUTO, MAX_PICTURES, Edit
from ..features.inpainting import Canvas, Inpaint
from ..features.regions import Regions
from ..features.styles import StyleTransfer, check_pictures
from ..features.upscaling import Upscale
from ..guidance import GuidanceSchedule
from ..images.output_files import check_outputs, image_format, numbered
from ..images.pictures import pixels_of
from ..images.sizes import round_size
from ..lora.edit_family import FAMILIES, likeliest, read_family
from ..memory.plan import check_offload
from ..schedule import check_sigmas, sigma_schedule
from ..text.prompt_images import MAX_IMAGES
from ..text.prompt_weights import parse_weights
from ..text.tokenizer import MAX_TOKENS, Krea2Tokenizer
from ..text.wildcards import file_wildcard, fill_in
from ..transformer.text_attention import NegativeGuidance
from .controls import check_controls, mask_paths
from .errors import UsageError, goes_with
from .model_files import Weights, find_file, find_loras, find_weights
from .picture_options import picture_defaults
from .progress import Console
from .regions import regions_of
from .styling import styled

_FEWEST = PRESETS["turbo"].steps
_GUIDANCE = ("guidance_start", "guidance_end", "guidance_ramp", "guidance_rescale")
_NAG = ("nag_scale", "nag_blend", "nag_limit", "nag_start", "nag_end")

# Options that say how another one acts, by that one.
_BESIDE = {
    "upscale": ("upscale_sigma", "upscale_see_tiles", "upscale_tile_prompt"),
    "blend": ("blend_share",),
    "mask": ("mask_grow", "mask_feather", "mask_hard", "mask_fill"),
    "reference": ("reference_method",),
    "edit": ("edit_family", "edit_task", "edit_boost"),
    "control": ("control_strength", "control_start", "control_end", "control_mask"),
    "style_image": ("style_strength", "style_start", "style_end"),
}


def _check_beside(args: Namespace) -> None:
    """Refuse options that would do nothing, since what they are for is not there."""
    default = picture_defaults()
    for main, others in _BESIDE.items():
        if getattr(args, main) != default[main]:
            continue
        for name in others:
            if getattr(args, name) != default[name]:
                option, needed = (f"--{one.replace('_', '-')}" for one in (name, main))
                raise goes_with(option, needed)


def check_folders(args: Namespace, rows: Iterable[Namespace]) -> None:
    """Refuse folders to look in where none of a run's pictures looks there.

    rows: the options of the pictures; they share the folders of `args`.
    """
    if args.style_folder is not None and not any(row.style for row in rows):
        raise goes_with("--style-folder", "--style")
    folder = args.wildcard_folder
    if folder is None:
        return
    if not args.wildcards:
        raise UsageError(
            f"--wildcard-folder is {folder}, but no wildcards are drawn: with --no-wildcards they "
            "are text, and a picture that is made again has its words already. Leave "
            "--wildcard-folder out, or give another prompt."
        )
    if not folder.is_dir():
        raise UsageError(
            f"--wildcard-folder is {folder}, which is no folder; expected one with a .txt file for "
            "each wildcard, such as colour.txt for __colour__."
        )


def check_machine(args: Namespace) -> Weights:
    """The weights of a run, whose files fit each other, and a device that is there."""
    weights = find_weights(args)
    check_parts(weights.transformer, weights.text_encoder, weights.vae)
    check_offload(args.device, args.offload, args.max_memory)
    _check_lengths(args, find_tokenizer(weights.text_encoder, weights.tokenizer))
    return weights


def _check_lengths(args: Namespace, tokenizer: Path) -> None:
    """Refuse texts that the text encoder would refuse once it is loaded."""
    for name in ("prompt", "negative", "blend"):
        text = getattr(args, name, None) or ""
        if len(text.encode(errors="replace")) > MAX_TOKENS:  # else it has no more tokens than that
            Krea2Tokenizer(tokenizer).tokenize(text, getattr(args, "max_sequence_length", None))


def check_picture(args: Namespace) -> list[tuple[Path, float]]:
    """Check the options of one picture against each other, and its input files.

    Returns its LoRA files. Raises UsageError, CheckpointError or ValueError.
    """
    args = styled(args)
    check_text(args)
    GuidanceSchedule(args.guidance_start, args.guidance_end)
    nag_settings(args)
    if args.upscale is not None and args.mask is not None:
        raise UsageError(
            "--upscale and --mask do not go together: the rest of the picture would change. Paint "
            "first, then upscale the result."
        )
    _check_beside(args)
    if args.denoise == 0 and (args.upscale is None or args.start_image is None):
        raise UsageError(
            "--denoise 0 changes nothing; it goes with --start-image and --upscale, to make a "
            "picture larger."
        )
    if args.start_image is None and args.denoise != 1:
        raise UsageError(
            f"--denoise is {args.denoise:g} without a picture to change; give --start-image."
        )
    if args.mask is not None and args.start_image is None:
        raise UsageError("--mask is the part of a picture to paint; give --start-image.")
    if args.mask is not None and (args.width, args.height) != (None, None):
        raise UsageError("With --mask a picture keeps its size; leave --width and --height out.")
    if args.start_image is not None and (args.width is None) != (args.height is None):
        raise UsageError("Give both --width and --height with --start-image, or neither.")
    check_edit(args)
    _check_numbers(args)
    _check_weights(args, regions_of(args))
    pictures = find_input_pictures(args)
    check_controls(args, pictures["control_image"], pictures["control_mask"])
    loras = find_loras(args)
    if args.edit and args.edit_family == AUTO:
        _check_family([path for path, scale in loras if scale])
    return loras


def check_edit(args: Namespace) -> None:
    """Check the pictures to edit against the options that an edit sets by itself."""
    if len(args.edit) > MAX_PICTURES:
        raise UsageError(
            f"There are {len(args.edit)} pictures of --edit; expected one, or two with a subject."
        )
    for option in ("reference", "image") if args.edit else ():
        if getattr(args, option):
            raise UsageError(
                f"--edit gives its pictures to the model itself; leave --{option} out."
            )


def _check_family(loras: list[Path]) -> None:
    """Refuse an edit whose LoRAs do not tell how they were trained."""
    families = [read_family(path.name, read_header(path).metadata) for path in loras]
    known = [family for family in families if family is not None]
    if likeliest(known) is None:
        reason = "the LoRAs are of different families" if known else "no --lora tells its family"
        raise UsageError(
            f"--edit needs to know how its LoRA was trained: --edit-family is auto, but {reason}. "
            f"Give an edit LoRA with --lora FILE, or choose --edit-family: {', '.join(FAMILIES)}."
        )


def _check_numbers(args: Namespace) -> None:
    """Refuse values that a run would refuse once its weights are loaded."""
    if args.layer_weights is not None and not any(args.layer_weights):
        raise UsageError("--layer-weights are all 0; expected one at least that is not.")
    if len(args.image) > MAX_IMAGES:
        raise UsageError(
            f"There are {len(args.image)} pictures of --image; expected at most {MAX_IMAGES}."
        )
    if args.upscale is not None and None not in (args.width, args.height):
        sides = [round_size(name, getattr(args, name)) for name in ("width", "height")]
        Upscale(args.upscale).size(*sides)
    if args.mu is not None and args.denoise > 0:
        steps = _FEWEST if args.steps is None else args.steps
        try:
            check_sigmas(sigma_schedule(steps, args.mu, args.denoise))
        except ValueError as error:
            raise UsageError(
                f"--mu is {args.mu:g}, at which steps of a run have the same noise; expected a "
                f"value nearer to 0, such as {PRESETS['turbo'].mu} (Turbo)."
            ) from error


def _check_weights(args: Namespace, regions: Regions | None) -> None:
    """Refuse prompt weights that the text encoder would refuse."""
    if not args.weights:
        return
    own = [] if regions is None else [region.prompt for region in regions.regions]
    for text in (args.prompt, args.negative, args.blend, *args.upscale_tile_prompt, *own):
        parse_weights(text or "")


def check_text(args: Namespace) -> None:
    if not args.prompt.strip() and args.regions is None:
        raise UsageError("The prompt is empty; expected words for what the picture shows.")
    if args.blend is not None and not args.blend.strip():
        raise UsageError("--blend is empty; expected another prompt, or leave it out.")
    if args.wildcards:
        fill_in(args.prompt, args.seed, args.wildcard_folder)


def nag_settings(args: Namespace) -> dict[str, float] | None:
    """Settings of normalised attention guidance, or None where it is off."""
    chosen = {name.removeprefix("nag_"): getattr(args, name) for name in _NAG}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if not args.nag and not chosen:
        return None
    usual = NegativeGuidance()
    start, end = chosen.get("start", usual.start), chosen.get("end", usual.end)
    if chosen.keys() & {"start", "end"} and start >= end:
        raise UsageError(
            f"--nag-start is {start:g} and --nag-end {end:g}, so that it would never act; expected "
            "a start below the end."
        )
    return chosen


def find_input_pictures(args: Namespace) -> dict[str, Any]:
    """Pixels of the pictures that options name. Raises ValueError for what is no picture."""

    def read(option: str, path: Path):
        found = path
        if not path.exists():
            beside = getattr(args, "beside", ())
            # Reading it says that it is not there.
            with contextlib.suppress(UsageError):
                found = find_file(option, path, None, beside)
        return pixels_of(found, f"--{option.replace('_', '-')}")

    start, mask = (
        None if path is None else read(option, path)
        for option, path in (("start_image", args.start_image), ("mask", args.mask))
    )
    inpaint = None
    if start is not None and mask is not None:
        inpaint = Inpaint(
            mask, args.mask_grow, args.mask_feather, not args.mask_hard, args.mask_fill
        )
        Canvas(start, inpaint)  # says what is wrong with the two
    edit = None
    if args.edit:
        pictures = [read("edit", path) for path in args.edit]
        edit = Edit(pictures, args.edit_family, args.edit_task, args.edit_boost)
    return {
        "start_image": start,
        "inpaint": inpaint,
        "references": [read("reference", path) for path in args.reference],
        "images": [read("image", path) for path in args.image],
        "edit": edit,
        "control_image": [read("control_image", path) for path in args.control_image],
        "control_mask": [
            None if path is None else read("control_mask", path) for path in mask_paths(args)
        ],
        "style": style_of(args, [read("style_image", path) for path in args.style_image]),
    }


def style_of(args: Namespace, pictures: list) -> StyleTransfer | None:
    """The style pictures of a run, None without any. Raises ValueError for unusable ones."""
    if not pictures:
        return None
    check_pictures(pictures)
    weights = getattr(args, "style_weights", None)
    times = (args.style_start, args.style_end)
    return StyleTransfer(pictures, args.style_strength, *times, weights)


def check_output(args: Namespace) -> None:
    """Check the names that the pictures of `args` would be written to."""
    is_odd = args.output.exists() and not args.output.is_file()
    if not is_odd:
        image_format(args.output)  # in the name that was typed
    check_outputs([args.output] if is_odd else numbered(args.output, args.images, args.force))


def check_folder(path: Path) -> None:
    """Check that a folder can take files; it need not be there yet."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"--output is {path}, which is a file; expected a folder.")
    check_outputs([path / "picture.png"])


def note_unused(args: Namespace, guidance: float, console: Console) -> None:
    """Say what has no effect: a negative prompt, a window of guidance, a name of wildcards."""
    default = picture_defaults()
    own = [name for name in _GUIDANCE if getattr(args, name) != default[name]]
    if own and guidance == 0:
        option = f"--{own[0].replace('_', '-')}"
        console.note(f"note: {option} has no effect at guidance 0; add --guidance")
    if args.wildcards and args.wildcard_folder is None and (found := file_wildcard(args.prompt)):
        console.note(
            f"note: {found} stays in the prompt as text; --wildcard-folder draws from files"
        )
    if args.negative and guidance == 0 and nag_settings(args) is None:
        console.note(
            "note: --negative has no effect at guidance 0; add --nag (Turbo) or --guidance"
        )
