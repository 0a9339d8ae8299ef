"""The pictures of Krea 2 Grid: in ComfyUI's output folder, on the page, and on one sheet."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from PIL import Image

from ..krea2_model.images.grid_sheet import Place, grid_sheet, small_copy
from ..krea2_model.images.output_files import save_image
from . import grid_axes
from .grid_axes import Axis
from .training_files import name_parts

logger = logging.getLogger(__name__)

# Of the page: the message that tells of cells as they are made, and the key of the node's output
# that tells of all (web/js/grid.js).
EVENT, KEY = "krea2kit.grid", "k2_grid"


def check_prefix(prefix: str) -> None:
    """Raise ValueError for a prefix that leads out of the output folder."""
    if not isinstance(prefix, str):
        raise ValueError(f"filename_prefix is {prefix!r}; expected a name such as grids/fox.")
    name_parts(prefix, "filename_prefix", "ComfyUI's output folder")


class GridFiles:
    """Writes the pictures of a grid as they are made, and tells the page of them.

    node: its id on the page, for messages. Files are NAME_00001_001.png and so on by the number of
    the cell, and NAME_00001_sheet.png; another grid of the same prefix has the next number.
    """

    def __init__(self, prefix: str, axes: Sequence[Axis], node: str | None):
        check_prefix(prefix)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory()
        )
        self._folder, self._subfolder = Path(folder), subfolder
        self._stem = f"{name}_{counter:05}"
        self._axes, self._node = axes, node
        self._small: dict[Place, Image.Image] = {}
        self._labels = {axis.letter: axis.labels for axis in axes}
        self.state: dict[str, Any] = {
            "labels": {letter: list(labels) for letter, labels in self._labels.items()},
            "cells": [],
            "count": np.prod(grid_axes.counts_of(axes)).item(),
            "current": None,
            "note": "",
        }

    @property
    def made(self) -> int:
        return len(self._small)

    @property
    def place(self) -> str:
        """The folder of the files and their common name, for the report."""
        return Path("output", self._subfolder, self._stem).as_posix() + "_*.png"

    def begin(self, place: Place) -> None:
        """Tell the page which cell is painted."""
        self.state["current"] = list(place)
        self._tell()

    def add(self, place: Place, number: int, image: torch.Tensor, texts: Mapping[str, str]) -> None:
        """Write the picture (H, W, 3) of a cell with its texts."""
        # In ComfyUI's own rounding, so that Save Image of the same latents writes the same.
        pixels = np.clip(255.0 * image.cpu().float().numpy(), 0, 255).astype(np.uint8)
        picture = Image.fromarray(pixels)
        file = self._save(picture, f"{self._stem}_{number:03}.png", texts)
        self._small[place] = small_copy(picture, *grid_axes.counts_of(self._axes))
        self.state["cells"].append({"place": list(place), "file": file})
        self.state["current"] = None
        self._tell()

    def finish(self, texts: Mapping[str, str], note: str = "") -> Image.Image | None:
        """Write the sheet of what is made, and tell the page; None where there is nothing."""
        self.state |= {"current": None, "note": note}
        if not self._small:
            self._tell()
            return None
        labels = [self._labels.get(letter, ("",)) for letter in grid_axes.LETTERS]
        sheet = grid_sheet(self._small, *labels)
        self.state["sheet"] = self._save(sheet, f"{self._stem}_sheet.png", texts)
        self._tell()
        return sheet

    def _save(self, picture: Image.Image, name: str, texts: Mapping[str, str]) -> dict[str, str]:
        save_image(picture, self._folder / name, {} if args.disable_metadata else texts)
        return {"filename": name, "subfolder": self._subfolder, "type": "output"}

    def _tell(self) -> None:
        # The server is there in a ComfyUI that serves a page, and nowhere else.
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if server is not None and self._node is not None and server.client_id is not None:
            message = {"node": self._node, "state": self.state}
            server.send_sync(EVENT, message, server.client_id)


def sheet_texts(prompt: Any, workflow: Mapping[str, Any] | None) -> dict[str, str]:
    """The texts of a sheet: the whole graph, as ComfyUI's Save Image keeps it."""
    texts = {} if prompt is None else {"prompt": json.dumps(prompt)}
    return texts | {name: json.dumps(value) for name, value in (workflow or {}).items()}
