"""Images in a prompt: their places in the text, and the positions of their tokens.

Each image is a block `<|vision_start|><|image_pad|><|vision_end|>` in the user's turn, in front of
the text. The one pad stands for all tokens of the image. LoRAs for style and editing of the
ai-toolkit family were trained with `Picture 1: ` in front of the first block, and so on, with
nothing between the last block and the text. A role stands before its block too: attention is
causal, so an image's tokens know only what is written before them.

Qwen3-VL counts positions on three axes (time, row, column). Text moves on all three at once. The
tokens of an image share one time and differ in row and column; text goes on behind the larger of
the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import by_count, check_type, counted, is_number
from ..images.resize import on_white
from .prompt_weights import MAX_WEIGHT
from .vision import resize_for_tower

IMAGE_PAD = 151655
IMAGE_PAD_TEXT = "<|image_pad|>"
IMAGE_BLOCK = f"<|vision_start|>{IMAGE_PAD_TEXT}<|vision_end|>"

MAX_IMAGES = 8

# As many pixels as a square of this side, what those LoRAs were trained with.
MAX_SIDE = 384

# Pixels that a token of an image covers along one side.
TOKEN_SIDE = 32

# Rows and columns of an image's tokens.
Grid = tuple[int, int]


@dataclass(frozen=True)
class PromptImage:
    """An image that a prompt holds.

    pixels: (3, H, W) or, with alpha, (4, H, W), in [0, 1].
    role: what it is there for, such as "the style"; empty for nothing said.
    strength: how much its tokens count in the transformer, as a weight of words: 1 changes
        nothing, 0 leaves the image out of the prompt.

    Raises ValueError for another shape, a role that holds an image's token, and a strength beyond
    `MAX_WEIGHT` either way.
    """

    pixels: Tensor
    role: str = ""
    strength: float = 1.0

    def __post_init__(self):
        check_type("The image", self.pixels, Tensor, "a tensor (3, height, width) in [0, 1]")
        if self.pixels.ndim != 3 or self.pixels.shape[0] not in (3, 4) or 0 in self.pixels.shape:
            raise ValueError(
                f"The image has shape {tuple(self.pixels.shape)}; expected (3, height, width), or "
                "4 channels with alpha."
            )
        if not (is_number(self.strength) and abs(self.strength) <= MAX_WEIGHT):  # NaN too
            raise ValueError(
                f"The strength of an image is {self.strength!r}; expected -{MAX_WEIGHT:.0f} to "
                f"{MAX_WEIGHT:.0f}: 1 for as it is, 0 for not at all."
            )
        if "\n" in self.role.strip() or "<|" in self.role:
            raise ValueError(
                f"The role of an image is {self.role!r}; expected a few words on one line, such "
                "as 'the style', without chat markers."
            )

    def resized(self, max_side: int) -> PromptImage:
        """The image at the size that the vision tower reads, on white where it is transparent."""
        return replace(self, pixels=resize_for_tower(on_white(self.pixels), max_side))


def read_strengths(text: str, count: int) -> list[float]:
    """Strengths of `count` images from numbers with commas, spaces or lines between; 1 without.

    Raises ValueError for what is no number, and for more numbers than images where there are any.
    """
    words = text.replace(",", " ").split()
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise ValueError(
            f"strengths is {text!r}; expected numbers such as '1, 0.5', one per image."
        ) from error
    return _one_each("strengths", numbers, count, 1.0)


def read_roles(text: str, count: int) -> list[str]:
    """Roles of `count` images, a line each; lines may be empty. Raises as `read_strengths`."""
    return _one_each("roles", [line.strip() for line in text.rstrip().splitlines()], count, "")


def _one_each(name: str, values: list, count: int, usual) -> list:
    if count and len(values) > count:
        raise ValueError(
            f"{name} has {len(values)} entries for {counted(count, 'image')}; expected at most one "
            "each. Take the others out."
        )
    return [*values[:count], *[usual] * (count - len(values))]


def nonzero_images(images: Iterable[PromptImage]) -> list[PromptImage]:
    """Images of a strength other than 0. Raises ValueError for more than `MAX_IMAGES`."""
    result = [image for image in images if image.strength != 0]
    if len(result) > MAX_IMAGES:
        raise ValueError(
            f"There are {len(result)} images in the prompt; expected at most {MAX_IMAGES}. Leave "
            "some out."
        )
    return result


def image_text(roles: Sequence[str], labels: bool) -> str:
    """The text before a prompt for images with these roles; empty for none.

    labels: number them, `Picture 1: `. A role follows the number in brackets, or stands alone.
    """
    text = ""
    for number, role in enumerate(map(str.strip, roles), start=1):
        label = f"Picture {number}" if labels else ""
        words = f"{label} ({role})" if label and role else label or role
        text += f"{words}: {IMAGE_BLOCK}" if words else IMAGE_BLOCK
    return text


def check_no_pads(prompt: str) -> None:
    """Refuse a prompt that names the image token itself, where images are placed for it."""
    if IMAGE_PAD_TEXT in prompt:
        raise ValueError(
            f"The prompt holds {IMAGE_PAD_TEXT}, which stands for an image; expected text. Take "
            "it out: images are placed in front of the text."
        )


def expand_image_tokens(tokens: Sequence[int], grids: Sequence[Grid]) -> list[int]:
    """Token ids in which each pad is repeated for all tokens of its image.

    Raises ValueError unless there are as many pads as images.
    """
    pads = sum(token == IMAGE_PAD for token in tokens)
    if pads != len(grids):
        raise ValueError(
            f"The prompt has places for {counted(pads, 'image')} ({IMAGE_PAD_TEXT}) and "
            f"{counted(len(grids), 'image')} {by_count(len(grids), 'is', 'are')} given; expected "
            "as many of each."
        )
    left, result = iter(grids), []
    for token in tokens:
        result += [token] * math.prod(next(left)) if token == IMAGE_PAD else [token]
    return result


def grid_of(pixels: Tensor) -> Grid:
    """The grid of an image (3, H, W) in a size that the vision tower takes."""
    return pixels.shape[1] // TOKEN_SIDE, pixels.shape[2] // TOKEN_SIDE


def image_weights(
    tokens: Sequence[int], grids: Sequence[Grid], images: Sequence[PromptImage]
) -> list[float]:
    """Weights of tokens that hold one pad an image: its strength for each of its tokens, else 1."""
    left, weights = iter(zip(grids, images, strict=True)), []
    for token in tokens:
        if token == IMAGE_PAD:
            grid, image = next(left)
            weights += [image.strength] * math.prod(grid)
        else:
            weights.append(1.0)
    return weights


def axis_positions(tokens: Sequence[int], grids: Sequence[Grid]) -> Tensor:
    """Positions (3, L) of tokens in time, row and column, as transformers' `get_rope_index`.

    tokens: with a pad for every token of the images, whose grids are given in their order.
    Raises ValueError where pads and grids do not fit.
    """
    parts, start, index, left = [], 0, 0, list(grids)
    while index < len(tokens):
        end = index
        while end < len(tokens) and tokens[end] != IMAGE_PAD:
            end += 1
        parts.append(torch.arange(start, start + end - index).expand(3, -1))
        start, index = start + end - index, end
        if index == len(tokens):
            break
        if not left:
            raise ValueError("There are more image tokens in the prompt than the images have.")
        rows, columns = left.pop(0)
        count = rows * columns
        if any(token != IMAGE_PAD for token in tokens[index : index + count]) or (
            index + count > len(tokens)
        ):
            raise ValueError(
                f"An image of {rows} x {columns} tokens has fewer places in the prompt; expected "
                f"{count}, next to each other."
            )
        grid = torch.stack(
            torch.meshgrid(
                torch.zeros(1, dtype=torch.long),
                torch.arange(rows),
                torch.arange(columns),
                indexing="ij",
            )
        )
        parts.append(start + grid.flatten(1))
        start, index = start + max(rows, columns), index + count
    if left:
        raise ValueError(
            f"{len(left)} of {counted(len(grids), 'image')} {by_count(len(left), 'has', 'have')} "
            "no tokens in the prompt."
        )
    return torch.cat(parts, dim=1)


def sheet(images: Sequence[Tensor], margin: float = 0.5) -> Tensor:
    """Images (3, H, W) of any sizes as one batch (N, 3, H, W), grey to the right and below."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    return torch.stack(
        [
            F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]), value=margin)
            for image in images
        ]
    )
