"""Style of images without their content: a weighted average of prompts with one image each.

A prompt is encoded alone, and once with each image in front. An image changes the states of the
words after it, since attention is causal; these differences are averaged by the images' shares and
added to the plain prompt, scaled by the strength:
`C = C_text + strength * sum(share_i * (C_i - C_text))`. The tokens of the images themselves are
averaged too. That blurs the content of single images, unlike a prompt with all images in a row;
suppression goes further, to one mean for all tokens of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# A higher strength only distorts.
MAX_STRENGTH = 3.0


def shares_of(weights: Sequence[float]) -> list[float]:
    """Weights of images as shares of 1. Raises ValueError unless one is above and none below 0."""
    total = math.fsum(weights)
    if not all(math.isfinite(w) and w >= 0 for w in weights) or total <= 0:
        raise ValueError(
            f"The weights of the images are {list(weights)}; expected numbers of 0 or more, one of "
            "them above 0."
        )
    return [weight / total for weight in weights]


def mix_styles(
    text: Tensor,
    with_image: Sequence[Tensor],
    images: slice,
    shares: Sequence[float],
    strength: float = 1.0,
    suppression: float = 0.0,
) -> Tensor:
    """The weighted mix of conditionings.

    text: (B, L, D), of the prompt alone.
    with_image: (B, F + L, D), of the prompt with one image each, in F tokens before the words.
    images: the tokens of the image.
    shares: of the images, see `shares_of`.
    strength: 0 is `text` itself, 1 the average, above 1 beyond it.
    suppression: 0 keeps the images' averaged tokens, 1 replaces each by the mean of all.

    Returns (B, F + L, D), at strength 0 `text`. Image tokens are not scaled by the strength; the
    caller weighs them in attention (`text_attention`).
    Raises ValueError for values out of range and for prompts of different layout.
    """
    if not 0 <= strength <= MAX_STRENGTH:
        raise ValueError(f"strength is {strength}; expected 0 (off) to {MAX_STRENGTH:g}.")
    if not 0 <= suppression <= 1:
        raise ValueError(f"suppression is {suppression}; expected 0 (off) to 1.")
    shapes = {tuple(states.shape) for states in with_image}
    if len(shapes) != 1 or len(with_image) != len(shares) or with_image[0].shape[1] < text.shape[1]:
        raise ValueError(
            f"The prompts behind images have shapes {sorted(shapes)} for {len(shares)} shares and "
            f"a text of {tuple(text.shape)}; expected one shape with more tokens than the text."
        )
    if strength == 0:
        return text
    # In float64, so that the mean of equal images is that image to the last bit of float32.
    average = sum(share * states.double() for share, states in zip(shares, with_image, strict=True))
    assert isinstance(average, Tensor)
    front, words = average.tensor_split([with_image[0].shape[1] - text.shape[1]], dim=1)
    words = torch.lerp(text.double(), words, strength)
    image_tokens = front[:, images]
    mean = image_tokens.mean(dim=1, keepdim=True)
    front = torch.cat(
        (
            front[:, : images.start],
            torch.lerp(image_tokens, mean.expand_as(image_tokens), suppression),
            front[:, images.stop :],
        ),
        dim=1,
    )
    return torch.cat((front, words), dim=1).to(text.dtype)
