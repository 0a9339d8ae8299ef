"""The images of a batch sampled one by one, each with its own seed, text, references and mask.

Many of ComfyUI's samplers draw noise as they go, from one seed and in the shape of the batch, and
one chooses its steps by the whole batch. An image then depends on those beside it. Sampled alone it
is the one that its seed makes alone, with every sampler that there is or will be.
"""

import torch

from .managed.conditions import NEGATIVE_GUIDANCE

# Samplers that neither draw noise nor look at the batch as a whole: their images go together. What
# is not known here, of other packs or later versions, goes one by one.
SIDE_BY_SIDE = frozenset({
    "euler", "euler_cfg_pp", "heun", "heunpp2", "exp_heun_2_x0", "dpm_2", "lms", "dpm_fast",
    "dpmpp_2m", "dpmpp_2m_cfg_pp", "ipndm", "ipndm_v", "deis", "res_multistep",
    "res_multistep_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp", "uni_pc",
    "uni_pc_bh2",
})  # fmt: skip


def row(value, index: int):
    """Of a tensor (B, ...), or of each of a list of them, the row that an image of a batch gets.

    As ComfyUI spreads rows over a batch: from the first again where there are fewer. What has no
    rows, or one for all, stays as it is.
    """
    if isinstance(value, torch.Tensor):
        if value.ndim < 2 or len(value) < 2:
            return value
        at = index % len(value)
        return value[at : at + 1]
    if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
        return type(value)(row(v, index) for v in value)
    return value


def conditioning_of(conditioning, index: int):
    """The CONDITIONING of one image of a batch."""
    if conditioning is None:
        return None
    return [
        [row(states, index), {name: row(value, index) for name, value in extra.items()}]
        for states, extra in conditioning
    ]


def latent_of(latent: dict, index: int) -> dict:
    """The entries of a latent as one image of it needs them: its mask."""
    mask = latent.get("noise_mask")
    if mask is None or mask.ndim < 3:
        return latent
    return {**latent, "noise_mask": row(mask, index)}


def model_of(model, index: int):
    """The model for one image: its row of a negative that stands in for guidance."""
    chosen = model.model_options.get("transformer_options", {}).get(NEGATIVE_GUIDANCE)
    if chosen is None or len(chosen[1]) < 2:
        return model
    settings, *negative = chosen
    model = model.clone()
    (mine,) = conditioning_of([negative], index)
    model.model_options["transformer_options"][NEGATIVE_GUIDANCE] = (settings, *mine)
    return model
