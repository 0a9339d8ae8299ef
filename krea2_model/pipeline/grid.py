"""Pictures of all combinations of a pipeline's arguments, on one labelled sheet."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..checks import check_type
from ..images.grid_sheet import Place, check_counts, grid_sheet, small_copy
from .grid_axes import paint_order
from .pipeline import Krea2Pipeline

LORAS = "loras"
# Arguments that a grid sets itself, or that are not of the picture.
_OTHERS = ("self", "num_images", "output_type", "callback", "progress")
_LETTERS = ("x", "y", "z")


class PictureGrid:
    """Pictures of a pipeline for each value of one to three arguments against each other.

    axes: arguments of a call of the pipeline and their values: the first goes to the right on the
        sheet, the second down, the third has a block for each value. `loras` is one too: lists of
        files and their scales, as `load_loras` takes them; they are unloaded at the end.
    options: arguments of all pictures.

    images: the pictures that are made, by column, row and block, from 0. Each is that of
        `pipeline(...)` with its arguments, to the pixel.

    Raises ValueError for what is no argument, an axis that is an option too, no values, and more
    pictures than a sheet shows. What a value itself may be, a call of the pipeline says.
    """

    def __init__(self, pipeline: Krea2Pipeline, axes: Mapping[str, Sequence[Any]], **options: Any):
        check_type("pipeline", pipeline, Krea2Pipeline, "a Krea2Pipeline")
        check_type("axes", axes, Mapping, 'arguments and their values, as in {"seed": [1, 2]}')
        known = inspect.signature(Krea2Pipeline.__call__).parameters
        names = [*(name for name in known if name not in _OTHERS), LORAS]
        if not 1 <= len(axes) <= len(_LETTERS):
            raise ValueError(f"axes has {len(axes)} arguments; expected one to three.")
        for name, values in axes.items():
            if name not in names:
                raise ValueError(f"axes has {name!r}; expected of {', '.join(names)}.")
            if name in options:
                raise ValueError(f"{name} is an axis and an option; leave one of them out.")
            if isinstance(values, str) or not len(values):
                raise ValueError(f"{name} is {values!r}; expected a list of values.")
        for name in options:
            if name in ("num_images", "output_type", LORAS):
                raise ValueError(
                    f"{name} is no option of a grid: each cell has one PIL image, and LoRAs of all "
                    "cells are loaded before, with load_loras."
                )
        counts = [len(values) for values in axes.values()]
        self._counts: Place = (*counts, *[1] * (len(_LETTERS) - len(counts)))  # type: ignore
        check_counts(*self._counts)
        if LORAS in axes and pipeline._lora_names:
            raise ValueError(
                "loras is an axis, and the pipeline has LoRAs loaded; call unload_lora() first, "
                "and name them in the values of the axis."
            )
        self._pipeline, self._options = pipeline, options
        self._axes = {name: list(values) for name, values in axes.items()}
        self.images: dict[Place, Image.Image] = {}

    def paint(self) -> Iterator[tuple[Place, Image.Image]]:
        """Make the pictures that are not there, and give each with its place as it is made.

        LoRAs change least often and prompts next, and each prompt is encoded once. After a stop it
        goes on with the rest.
        """
        names = list(self._axes)
        slow = [name for name in (LORAS, "prompt", "negative_prompt") if name in self._axes]
        places = paint_order(self._counts, [names.index(name) for name in slow])
        with self._pipeline.keep_texts(), self._unloaded():
            loaded: Any = []
            for place in places:
                if place in self.images:
                    continue
                # Without an axis there is one column, row or block.
                chosen = zip(names, place, strict=False)
                arguments = {name: self._axes[name][index] for name, index in chosen}
                loras = arguments.pop(LORAS, [])
                if loras != loaded:
                    self._pipeline.unload_lora()
                    loaded = []
                    self._pipeline.load_loras(loras)
                    loaded = loras
                found = self._pipeline(**self._options, **arguments)
                assert isinstance(found, list), "output_type is pil"
                self.images[place] = found[0]
                yield place, found[0]

    @contextmanager
    def _unloaded(self) -> Iterator[None]:
        """Unload the LoRAs of an axis at the end."""
        try:
            yield
        finally:
            if LORAS in self._axes:
                self._pipeline.unload_lora()

    def sheet(self) -> Image.Image:
        """The pictures that are made, at most 512 pixels large; other places are blank.

        Raises ValueError where there is none.
        """
        images = self.images.items()
        small = {place: small_copy(image, *self._counts) for place, image in images}
        return grid_sheet(small, *(_labels(name, values) for name, values in self._axes.items()))


def _labels(name: str, values: Sequence[Any]) -> list[str]:
    """The sheet's label of each value, with numbers where several would be the same."""
    labels = [f"{name}: {_label(name, value, n)}" for n, value in enumerate(values, 1)]
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({number})" for number, label in enumerate(labels, 1)]
    return labels


def _label(name: str, value: Any, number: int) -> str:
    """A value in words, or its number where it has none that are short."""
    if name == LORAS:
        return "; ".join(f"{Path(file).stem}:{scale:g}" for file, scale in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, (str, int)):
        return str(value)
    return Path(value).stem if isinstance(value, Path) else str(number)
