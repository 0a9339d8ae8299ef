"""`styles=` of a pipeline's call: styles of a library become its other arguments, for that call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from .. import nano
from ..features.regions import Regions
from ..features.style_library import StyleError
from ..features.style_mixing import MixedStyle, escaped
from ..features.styles import StyleTransfer
from ..features.tiles import TileSettings
from ..features.upscaling import Upscale
from ..features.variations import PromptBlend
from .parts import LoadedParts

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", TileSettings, Upscale)

_SUGGESTED = ("steps", "guidance", "height", "width")
# Arguments that say how large the picture is.
_SIZES = ("height", "width", "start_image", "latents", "edit")


def accept_styles(function: Callable[P, R]) -> Callable[P, R]:
    """Let a call of a pipeline take `styles`: names and weights, or a `MixedStyle`.

    Raises StyleError for styles that cannot be used with the other arguments.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def styled(*args: P.args, **options: P.kwargs) -> R:
        call = signature.bind(*args, **options).arguments
        pipeline, chosen = call.pop("self"), call.pop("styles", None)
        if chosen is None:
            return function(*args, **options)
        assert isinstance(pipeline, LoadedParts)
        mixed = MixedStyle.of(chosen)
        arguments = _arguments(mixed, call)
        with _loras_of(pipeline, mixed):
            return function(pipeline, **arguments)  # type: ignore[call-arg,arg-type]

    return styled


def _arguments(mixed: MixedStyle, call: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call with the styles in them."""
    prompt, negative = call.get("prompt"), call.get("negative_prompt")
    if prompt is None:
        raise StyleError("styles add words to a prompt; give prompt, no embeddings.")
    is_weighted = call.get("prompt_weights", False)
    # Weights are read in all texts of a call: brackets of the caller's own stay brackets.
    own = escaped if mixed.uses_weights and not is_weighted else str

    def with_style(text: str) -> str:
        return mixed.prompt(own(text))

    found = {
        **call,
        "prompt": _each(with_style, prompt),
        "negative_prompt": _each(lambda text: mixed.negative(own(text)), negative or ""),
        "prompt_weights": is_weighted or mixed.uses_weights,
    }
    if (regions := Regions.of(call.get("regions"))) is not None:
        found["regions"] = with_texts(regions, own)
    if isinstance(tiles := call.get("tiles"), TileSettings):
        found["tiles"] = _with_tile_texts(tiles, own)
    if isinstance(upscale := call.get("upscale"), Upscale):
        found["upscale"] = _with_tile_texts(upscale, own)
    if isinstance(blend := call.get("blend"), PromptBlend):  # else the call refuses it
        found["blend"] = replace(blend, prompt=with_style(blend.prompt))
    has_size = any(call.get(name) is not None for name in _SIZES)
    for name in _SUGGESTED:
        value = mixed.setting(name)
        is_free = not has_size if name in _SIZES else call.get(name) is None
        if is_free and value is not None:
            found[name] = value
    if pictures := mixed.pictures():
        if call.get("style") is not None:
            raise StyleError(
                "style gives pictures, and so do styles; give one of them, or save the pictures as "
                "a style of the library."
            )
        found["style"] = StyleTransfer(
            [path for path, _ in pictures],
            mixed.picture_strength,
            weights=[weight for _, weight in pictures],
        )
    return found


def with_texts(regions: Regions, change: Callable[[str], str]) -> Regions:
    """Regions with their prompts changed."""
    each = [replace(region, prompt=change(region.prompt)) for region in regions.regions]
    return replace(regions, regions=each)


def _with_tile_texts(parts: T, change: Callable[[str], str]) -> T:
    """Tiles, or a second stage, with the prompts of single tiles changed."""
    prompts = parts.prompts
    if prompts is None or prompts.texts is None:
        return parts
    return replace(parts, prompts=replace(prompts, texts=[change(text) for text in prompts.texts]))


def _each(change: Callable[[str], str], texts: Any) -> Any:
    if isinstance(texts, str):
        return change(texts)
    is_list = isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
    return [change(text) for text in texts] if is_list else texts


@contextmanager
def _loras_of(pipeline: LoadedParts, mixed: MixedStyle) -> Iterator[None]:
    """The LoRAs of styles on top of those that are loaded, meanwhile."""
    files = [(find_lora(style.name, style.folder, file), s) for style, file, s in mixed.loras()]
    with pipeline.loras_for_now(files):
        yield


def find_lora(style: str, folder: Path | None, file: str) -> Path:
    """The LoRA of a style: in its folder, one of krea2-nano's, or a path from here."""
    places = [Path(folder or "") / file, nano.lora_file(Path(file))]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise StyleError(
            f"Style {style} needs the LoRA {file}, which is not there; expected the file in "
            f"{folder}. Put it there, or load it yourself and leave the style out."
        )
    return found
