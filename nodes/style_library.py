"""A library of styles: words, pictures and LoRAs by name, several at once with weights."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..krea2_model import nano
from ..krea2_model.checkpoints.identify import CheckpointError
from ..krea2_model.features.style_library import (
    MAX_LORA_STRENGTH,
    SETTINGS,
    SavedStyle,
    StyleError,
    StyleLibrary,
)
from ..krea2_model.features.style_mixing import MixedStyle, read_choice
from ..krea2_model.images.pictures import pixels_of
from . import inputs, model_files
from .inputs import check_limits, verdict
from .managed.lora import apply_lora
from .prompts import check_clip, encode
from .style_loras import NONE
from .styles import K2StyleTransfer

# Below ComfyUI's user folder; files of models are in folders of their own.
FOLDER = "krea2_styles"
MAX_PICTURE_STRENGTH = 10.0
_NANO_LORAS = {path.name: path for path in (nano.LORA, nano.REFERENCE_LORA)}


def user_library() -> StyleLibrary:
    return StyleLibrary(Path(folder_paths.get_user_directory()) / FOLDER)


class K2Styles(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Styles",
            display_name="Krea 2 Styles",
            category="Krea 2",
            description=(
                "Encodes a prompt in styles of your library, picked by their thumbnails, each with "
                "a weight: their words, LoRAs and style pictures are added."
            ),
            search_aliases=inputs.aliases(
                "style, styles, style library, preset, moodboard, prompt styles, style selector"
            ),
            inputs=[
                inputs.MODEL,
                inputs.CLIP,
                inputs.prompt("What the image should show, without words for the style."),
                io.String.Input(
                    "styles",
                    multiline=True,
                    default="",
                    tooltip=(
                        "The styles, a line each: name and weight, such as Ink wash: 0.7. The "
                        "thumbnails write it."
                    ),
                ),
                inputs.negative_prompt(),
                io.Vae.Input(
                    "vae", optional=True, tooltip="The Krea 2 VAE, for styles that have pictures."
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the styles' LoRAs and pictures."),
                io.Conditioning.Output(
                    display_name="positive", tooltip="The encoded prompt with the styles' words."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The encoded negative prompt, with theirs."
                ),
                io.String.Output(
                    display_name="report", tooltip="What each style adds, and what it suggests."
                ),
                io.String.Output(
                    display_name="prompt", tooltip="The prompt with the styles' words, as text."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, styles=None):
        return verdict(cls, lambda: None if styles is None else mixed_styles(styles))

    @classmethod
    def fingerprint_inputs(cls, styles=None, **others):
        try:
            chosen = mixed_styles(styles).styles
        except (StyleError, AttributeError):
            return None
        return model_files.fingerprint(*(s.folder for s, _ in chosen if s.folder is not None))

    @classmethod
    def execute(cls, model, clip, prompt, styles="", negative="", vae=None):
        check_clip(clip)
        check_limits(cls, prompt=prompt, styles=styles, negative=negative)
        mixed = mixed_styles(styles)
        model, clip, found = styled(model, clip, vae, mixed)
        text = mixed.prompt(prompt.strip())
        positive = encode(clip, [text])
        encoded_negative = encode(clip, [mixed.negative(negative)])
        report = [mixed.report(), *found]
        values = {name: mixed.setting(name) for name in SETTINGS}
        if suggested := [f"{name} {v:g}" for name, v in values.items() if v is not None]:
            report.append(f"suggested: {', '.join(suggested)}")
        lines = "\n".join(report)
        outputs = (model, positive, encoded_negative, lines, text)
        return io.NodeOutput(*outputs, ui=ui.PreviewText(lines))


class K2SaveStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2SaveStyle",
            display_name="Save a Krea 2 Style",
            category="Krea 2",
            description=(
                "Saves words, pictures, a LoRA and other styles under a name, for Krea 2 Styles. "
                "Several styles with weights make a moodboard."
            ),
            search_aliases=inputs.aliases("style, save style, style library, preset, moodboard"),
            is_output_node=True,
            inputs=[
                io.String.Input("name", default="My style", tooltip="The name of the style."),
                io.String.Input(
                    "words",
                    multiline=True,
                    default="",
                    tooltip=(
                        "Words that are added behind prompts; the help page says how to put them "
                        "around a prompt."
                    ),
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures whose style is taken over, as a batch of at most eight.",
                ),
                io.Float.Input(
                    "picture_strength",
                    default=1.0,
                    min=0.0,
                    max=MAX_PICTURE_STRENGTH,
                    step=0.05,
                    optional=True,
                    tooltip="How strongly their style acts; try 0.4 with guidance (Raw).",
                ),
                io.Combo.Input(
                    "lora",
                    options=[NONE, *model_files.list_loras()],
                    default=NONE,
                    optional=True,
                    tooltip="A LoRA of models/loras that belongs to the style.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-MAX_LORA_STRENGTH,
                    max=MAX_LORA_STRENGTH,
                    step=0.05,
                    optional=True,
                    tooltip="LoRA weight, at weight 1 of the style.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Words that are added to negative prompts.",
                ),
                io.String.Input(
                    "styles",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip=(
                        "Styles that this one contains, a line each: name and weight. They are "
                        "copied, so that it stays as it is."
                    ),
                ),
                io.Image.Input(
                    "thumbnail",
                    optional=True,
                    tooltip="The picture to show for it; without one, the first of images.",
                ),
                io.Boolean.Input(
                    "replace",
                    default=False,
                    optional=True,
                    tooltip="Replace a style of this name, instead of refusing.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="style", tooltip="The style's name, for styles of Krea 2 Styles."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, lora=None, picture_strength=None, lora_strength=None):
        strengths = {"picture_strength": picture_strength, "lora_strength": lora_strength}
        if (
            lora not in (None, NONE)
            and (found := model_files.problem(_lora_file, lora)) is not True
        ):
            return found
        return verdict(cls, lambda: None, **strengths)

    @classmethod
    def execute(
        cls,
        name="My style",
        words="",
        images=None,
        picture_strength=1.0,
        lora=NONE,
        lora_strength=1.0,
        negative="",
        styles="",
        thumbnail=None,
        replace=False,
    ):
        texts = {"name": name, "words": words, "negative": negative, "styles": styles}
        check_limits(cls, picture_strength=picture_strength, lora_strength=lora_strength, **texts)
        library, chosen = user_library(), read_choice(styles)
        mixed = MixedStyle.of(chosen, library).styles if chosen else ()
        loras = () if lora == NONE else ((_kept_name(lora), lora_strength),)
        name = name.strip()
        if words.strip() or negative.strip() or loras:
            mixed = (*mixed, (SavedStyle(name, words, negative, loras=loras), 1.0))
        pictures = [] if images is None else _pictures(images, "images")
        together = MixedStyle(mixed)
        style = together.as_one(name, len(pictures), picture_strength)
        files = [*(path for path, _ in together.pictures()), *pictures]
        shown = None if thumbnail is None else _pictures(thumbnail, "thumbnail")[0]
        saved = library.save(style, files, shown, replace)
        return io.NodeOutput(saved.name, ui=ui.PreviewText(f"{saved.name}: {saved.summary()}"))


def _pictures(images, name: str):
    """The images of a batch as (3, H, W). Raises ValueError that names the one without pixels, or
    with values that are no colours."""
    if len(images) == 0:
        raise ValueError(f"{name} has no image; expected one or more. Connect another, or none.")
    numbered = enumerate(images, 1)
    return [pixels_of(each.cpu().movedim(-1, 0), f"Image {n} of {name}") for n, each in numbered]


def find_style_lora(style: SavedStyle, file: str) -> Path:
    """The LoRA of a style: in its folder, one of krea2-nano's, or a name in models/loras."""
    own = Path(style.folder or "") / file
    if style.folder is not None and own.is_file():
        return own
    try:
        return _NANO_LORAS.get(file) or model_files.find_lora(file)
    except CheckpointError as error:
        raise StyleError(f"Style {style.name} needs a LoRA. {error}") from error


def mixed_styles(styles: str) -> MixedStyle:
    """The styles of a text. Raises StyleError for none, unknown ones and bad weights."""
    chosen = read_choice(styles)
    if not chosen:
        raise StyleError(
            "No style is chosen; click one on the node, or write lines such as Ink wash: 0.7. "
            "Without a style use Krea 2 Prompt."
        )
    mixed = MixedStyle.of(chosen, user_library())
    for style, file, _ in mixed.loras():
        find_style_lora(style, file)
    return mixed


def styled(model, clip, vae, mixed: MixedStyle):
    """A MODEL and CLIP with the LoRAs and pictures of styles, and the LoRAs' reports."""
    pictures = mixed.pictures()
    if pictures and vae is None:
        names = ", ".join(style.name for style, _ in mixed.active if style.pictures)
        raise ValueError(
            f"{names} has pictures, whose style needs the VAE to be read. Connect vae, or choose "
            "styles without pictures."
        )
    loras = [(find_style_lora(style, file), s) for style, file, s in mixed.loras()]
    reports = []
    for path, strength in loras:
        model, clip, found = apply_lora(model, clip, path, strength, strength)
        reports.append(str(found))
    if pictures:
        model = _with_pictures(model, clip, vae, pictures, mixed.picture_strength)
    return model, clip, reports


def _with_pictures(model, clip, vae, pictures: list[tuple[Path, float]], strength: float):
    """The model with the style of pictures, by Krea 2 Style Transfer."""
    images = [pixels_of(path, "a picture of a style").movedim(0, -1)[None] for path, _ in pictures]
    names = ["image", *(f"image_{number}" for number in range(2, len(images) + 1))]
    weights = ", ".join(repr(weight) for _, weight in pictures)
    shown = dict(zip(names, images, strict=True))
    options = {"clip": clip, "strength": strength, "weights": weights, **shown}
    return K2StyleTransfer.execute(model, vae, **options).args[0]


def _lora_file(lora: str) -> Path:
    return model_files.find_lora(lora)


def _kept_name(lora: str) -> str:
    """The name of a LoRA that a style keeps."""
    path = _lora_file(lora)
    return path.name if path.name in _NANO_LORAS and path == _NANO_LORAS[path.name] else lora
