"""Style mixes as CONDITIONING."""

import math

import torch

from ...krea2_model.images.resize import resize_and_crop
from ...krea2_model.text.prompt_images import IMAGE_PAD, PromptImage, grid_of, image_text
from ...krea2_model.text.style_mix import mix_styles
from ...krea2_model.text.vision import resize_for_tower
from .conditions import TOKEN_WEIGHTS, weights_of
from .encode import encode_with_images


def same_size(images: list[torch.Tensor], max_side: int) -> list[torch.Tensor]:
    """Images (3, H, W) in one size that the vision tower takes, cropped to the first's shape."""
    first = resize_for_tower(images[0], max_side)
    height, width = first.shape[1:]
    result = [first]
    for image in images[1:]:
        batch = image.movedim(0, -1)[None]
        cut = resize_and_crop(batch, batch[..., 0], width, height, "crop")[0]
        result.append(cut[0].movedim(-1, 0).contiguous())
    return result


def encode_style_mix(
    clip,
    prompt: str,
    plain,
    images: list[torch.Tensor],
    shares: list[float],
    *,
    strength: float,
    suppression: float,
    labels: bool,
    weighted: bool,
):
    """A prompt in the mixed style of images (3, H, W) of one size, see `text.style_mix`.

    prompt: without leading line breaks, which after an image would be tokens of their own.
    plain: the same prompt as CONDITIONING, without images.
    The images' own tokens have the strength as their weight in attention.
    """
    with_image = [
        encode_with_images(clip, prompt, [PromptImage(image)], labels=labels, weighted=weighted)
        for image in images
    ]
    front = clip.tokenizer.tokenizer.front(image_text([""], labels))
    start = front.index(IMAGE_PAD)
    image_slice = slice(start, start + math.prod(grid_of(images[0])))
    result = []
    for (text, extra), *others in zip(plain, *with_image, strict=True):
        mixed = mix_styles(
            text, [states for states, _ in others], image_slice, shares, strength, suppression
        )
        weights = torch.ones(1, mixed.shape[1])
        if (text_weights := weights_of(extra, text)) is not None:
            weights[:, -text.shape[1] :] = text_weights
        weights[:, image_slice] = strength
        options = {name: value for name, value in extra.items() if name != TOKEN_WEIGHTS}
        if bool((weights != 1).any()):
            options[TOKEN_WEIGHTS] = weights
        result.append([mixed, options])
    return result
