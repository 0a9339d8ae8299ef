"""Style mixes as CONDITIONING."""

import torch

from ...krea2_model.images.resize import resize_and_crop
from ...krea2_model.text.prompt_images import PromptImage
from ...krea2_model.text.style_mix import mix_styles
from ...krea2_model.text.vision import resize_for_tower
from .conditions import TOKEN_WEIGHTS, weights_of
from .encode import encode_with_images, layout_with_images


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

    prompt: without line breaks in front, which behind an image would be tokens of their own.
    plain: the same prompt as CONDITIONING, without images.
    The images' own tokens count in attention by the strength, like words with a weight.
    """
    options = {"labels": labels, "weighted": weighted}
    encoded = [encode_with_images(clip, prompt, [PromptImage(i)], **options) for i in images]
    # All images have one size, so their tokens have one place.
    layout = layout_with_images(clip, prompt, [PromptImage(images[0])], **options)
    (image_tokens,) = layout.image_slices
    result = []
    for (text, extra), *with_image in zip(plain, *encoded, strict=True):
        states = [states for states, _ in with_image]
        mixed = mix_styles(text, states, image_tokens, shares, strength, suppression)
        weights = torch.ones(1, mixed.shape[1])
        if (text_weights := weights_of(extra, text)) is not None:
            weights[:, -text.shape[1] :] = text_weights
        weights[:, image_tokens] = strength
        extra = {name: value for name, value in extra.items() if name != TOKEN_WEIGHTS}
        if bool((weights != 1).any()):
            extra[TOKEN_WEIGHTS] = weights
        result.append([mixed, extra])
    return result
