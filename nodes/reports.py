"""Texts on the nodes after a run: tokens of a prompt, and the settings that were used.

Lines stay under 40 characters, for which web/js/node_text.js need not widen a node.
"""

from collections.abc import Sequence

from ..krea2_model.checks import counted
from ..krea2_model.config import Preset
from ..krea2_model.features.edits import EditTask
from ..krea2_model.features.tiles import TileSettings
from ..krea2_model.images.areas import Area
from ..krea2_model.images.sizes import image_tokens
from ..krea2_model.text.prompt_images import PromptImage
from ..krea2_model.text.tokenizer import PROMPT_BUDGET, SUFFIX_TOKENS


def prompt_report(name: str, conditioning, images: int = 0) -> str:
    """Number of encoded tokens of a text, counted on the CONDITIONING of any CLIP.

    images: tokens of images among them, for which there is `image_report`.
    """
    tokens = max(0, conditioning[0][0].shape[1] - SUFFIX_TOKENS - images)
    count = f"{name}: {counted(tokens, 'token')} of {PROMPT_BUDGET}"
    return count if tokens <= PROMPT_BUDGET else f"{count},\nmore than the model was trained on"


def image_report(number: int, image: PromptImage) -> str:
    """The size at which the encoder saw an image, and its tokens: one for 32 x 32 px."""
    if image.strength == 0:
        return f"image {number}: left out, strength 0"
    height, width = image.pixels.shape[1:]
    return f"image {number}: {width} x {height} px, {counted(height * width // 32**2, 'token')}"


def sampling_report(choice: str, settings: Preset, mu: float, sigmas, guided: bool = True) -> str:
    """Preset, steps, shift, guidance and start; `choice` is the value of the preset input."""
    name = settings.name if choice == settings.name else f"{choice}: {settings.name}"
    lines = [f"{name}, {counted(settings.steps, 'step')}, {shift_report(mu)}"]
    if guided:
        lines.append(guidance_report(settings.guidance))
    if sigmas[0] < 1:
        lines.append(f"starts at sigma {sigmas[0]:.3f}")
    return "\n".join(lines)


def settings_report(preset: Preset) -> str:
    """Sampling defaults as the sampler shows them before a run, when the size is not known."""
    shift = "mu by size" if preset.mu is None else shift_report(preset.mu)
    return f"{preset.name}, {preset.steps} steps, {shift}\n{guidance_report(preset.guidance)}"


def guidance_report(guidance: float) -> str:
    return f"guidance {guidance:g} (cfg {guidance + 1:g})"


def shift_report(mu: float) -> str:
    return f"mu {mu:.4g}"


def size_report(width: int, height: int, tokens: int, images: int = 1) -> str:
    batch = f"{images} images, each " if images > 1 else ""
    return f"{batch}{width} x {height} px, {counted(tokens, 'token')}"


def detail_report(areas: Sequence[Area], groups: Sequence[Sequence[Area]]) -> str:
    """The areas of a detailer, their sizes and runs."""
    count, runs = len(areas), len(groups)
    lines = [f"{counted(count, 'area')} in {counted(runs, 'run')}"]
    for area in areas[:8]:
        box = area.box
        size = f"{box.width} x {box.height} to {area.width} x {area.height} px"
        lines.append(f"{area.number + 1}: {size}{', reduced' * area.is_reduced}")
    if count > 8:
        lines.append(f"and {count - 8} more")
    return "\n".join(lines)


def far_size_report(size: int) -> str:
    """For an image of another size than the `size` x `size` a checkpoint was trained at."""
    return f"trained at {size} x {size} px:\nexpect repeated or broken shapes"


def unused_negative_report(negative) -> str:
    """For a negative at guidance 0, where it has no effect; empty for the empty prompt."""
    if all(states.shape[1] <= SUFFIX_TOKENS for states, _ in negative):
        return ""
    return "not used: negative, at guidance 0\n(use Krea 2 Negative (NAG))"


def unknown_report(unknown: list[str]) -> str:
    """For features without effect on ComfyUI's own implementation of the model."""
    return "\n".join(
        [*(f"not used: {each}" for each in unknown), "(by ComfyUI's own implementation)"]
    )


def reference_report(width: int, height: int, strength: float) -> str:
    """One reference: its encoded size, and the tokens it adds to each step."""
    tokens = image_tokens(width, height)
    count = f"{tokens} tokens" if strength > 0 else "left out"
    return f"reference: {width} x {height} px, {count}"


def style_report(sizes: list[tuple[int, int]]) -> str:
    """Encoded width and height of style pictures, and the tokens of their passes at each step."""
    return "\n".join(
        f"style: {width} x {height} px, {image_tokens(width, height)} tokens"
        for width, height in sizes
    )


def edit_report(source: str) -> str:
    """The family of an edit, and where it is from: "family identity (by its name)"."""
    head, _, sign = source.partition(" (")
    return source if len(source) < 40 else f"{head}\n({sign}"


def task_report(name: str, task: EditTask, settings: Preset | None, base: Preset | None):
    """Lines on what a task needs: given, or to be set by hand."""
    if settings is not None:
        yield f"{name}: {settings.steps} steps, guidance {settings.guidance:g}\n(by preset auto)"
    elif task.lacks_guidance(base):
        yield f"{name} needs Raw at guidance {task.guidance:g},\n{task.steps} steps"
    elif task.guidance is not None:
        yield f"{name} needs guidance {task.guidance:g},\n{task.steps} steps"
    if task.sampler is not None:
        yield f"{name} needs sampler {task.sampler}"


def control_report(name: str, form: str, settings, image) -> str:
    """The form of a control LoRA and its use."""
    lines = [f"{name}: a control LoRA with {form}"]
    if image is None:
        lines.append("no image: control_net is for an Apply ControlNet node")
    elif settings.is_off:
        lines.append("off: strength is 0, or start equals end")
    else:
        where = f"from {settings.start:g} to {settings.end:g} of the schedule"
        lines.append(f"strength {settings.strength:g}, {where}")
    return "\n".join(lines)


def upscale_report(
    preset: Preset,
    steps: int,
    mu: float,
    sigma: float,
    width: int,
    height: int,
    tiles: TileSettings | None,
) -> str:
    """Size, schedule and tiles of the second stage."""
    lines = [
        f"{preset.name}, {counted(steps, 'step')} from sigma {sigma:g}",
        shift_report(mu),
        size_report(width, height, image_tokens(width, height)),
    ]
    if tiles is not None:
        lines.append(f"in tiles of {tiles.size} px")
    return "\n".join(lines)


def unused_report(settings: Preset, inputs: Preset, default: Preset) -> str:
    """Values of the inputs that were changed and had no effect; empty where there are none."""
    values = [
        f"{field} {getattr(inputs, field):g}"
        for field in ("steps", "guidance")
        if getattr(inputs, field) not in (getattr(settings, field), getattr(default, field))
    ]
    return f"not used: {', '.join(values)}\n(needs preset custom)" if values else ""


def region_report(name: str, area: float, conditioning) -> str:
    """A region's share of the image, and the tokens that it adds to each step."""
    if conditioning is None:
        return f"{name}: {area:.0%} of the image, no prompt"
    return f"{name}: {area:.0%} of the image, {counted(conditioning[0][0].shape[1], 'token')}"
