"""The images of a batch sampled one by one, each with its own seed, text, references and mask.

Many of ComfyUI's samplers draw noise during the run, from one seed and in the shape of the batch,
and one chooses its steps by the whole batch. An image then depends on the others. Sampled alone it
is the image that its seed gives alone, with every sampler.
"""

from collections.abc import Sequence

import torch

from .managed.conditions import NEGATIVE_GUIDANCE
from .managed.tile_prompts import tile_prompts_of, with_tile_prompts

# Samplers that neither draw noise nor read the batch as a whole: their images are sampled together.
# Unknown ones, of other packs or later versions, are sampled one by one.
SIDE_BY_SIDE = frozenset({
    "euler", "euler_cfg_pp", "heun", "heunpp2", "exp_heun_2_x0", "dpm_2", "lms", "dpm_fast",
    "dpmpp_2m", "dpmpp_2m_cfg_pp", "ipndm", "ipndm_v", "deis", "res_multistep",
    "res_multistep_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp", "uni_pc",
    "uni_pc_bh2",
})  # fmt: skip


def rows(value, numbers: Sequence[int]):
    """Rows of a tensor (B, ...), or of each of a list of them, for some images of a batch.

    As ComfyUI repeats rows over a batch, from the first where there are fewer. Values without rows,
    or with one for all, stay unchanged.
    """
    if isinstance(value, torch.Tensor):
        if value.ndim < 2 or len(value) < 2:
            return value
        return value[[number % len(value) for number in numbers]]
    if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
        return type(value)(rows(v, numbers) for v in value)
    return value


def row(value, index: int):
    """As `rows`, for one image."""
    return rows(value, [index])


def rows_of(conditioning, numbers: Sequence[int]):
    """The CONDITIONING of some images of a batch."""
    return [
        [rows(states, numbers), {name: rows(value, numbers) for name, value in extra.items()}]
        for states, extra in conditioning
    ]


def conditioning_of(conditioning, index: int):
    """The CONDITIONING of one image of a batch."""
    return None if conditioning is None else rows_of(conditioning, [index])


def latent_of(latent: dict, index: int) -> dict:
    """A latent with the mask of one image."""
    mask = latent.get("noise_mask")
    if mask is None or mask.ndim < 3:
        return latent
    return {**latent, "noise_mask": row(mask, index)}


def model_of(model, index: int):
    """The model for one image, with its row of the negative of NAG and its picture of tiles."""
    prompts = tile_prompts_of(model)
    if prompts is not None:
        model = with_tile_prompts(model, prompts.of_image(index))
    chosen = model.model_options.get("transformer_options", {}).get(NEGATIVE_GUIDANCE)
    if chosen is None or len(chosen[1]) < 2:
        return model
    settings, *negative = chosen
    model = model.clone()
    (image_negative,) = conditioning_of([negative], index)
    model.model_options["transformer_options"][NEGATIVE_GUIDANCE] = (settings, *image_negative)
    return model
