"""MODEL by ComfyUI's own implementation of Krea 2, from every file that ours is loaded from.

For packs that need more of core's model than ours gives them (`contract`). Features of ours have no
effect there: `unknown_to` names them.
"""

from pathlib import Path

import comfy.ldm.krea2.model
import comfy.model_base
import comfy.model_management
import comfy.model_patcher

from ...krea2_model.checkpoints.identify import CheckpointError
from ...krea2_model.config import Preset, TransformerConfig
from ...krea2_model.transformer.model import Krea2Transformer
from .conditions import TOKEN_WEIGHTS
from .gguf import GGUFPatcher
from .references import CACHED, SETTINGS
from .regions import REGIONS

# Number of blocks that core builds of each of text fusion's two kinds.
_FUSION_BLOCKS = 2


class CoreModel(comfy.model_base.Krea2):
    """ComfyUI's model object as core builds it; `preset` as ours has it."""

    preset: Preset | None = None


def core_unet_config(config: TransformerConfig, path: Path) -> dict:
    """Sizes as core's constructor takes them.

    Raises CheckpointError for sizes that core's Krea 2 cannot have: it derives the widths of its
    MLPs, and its rotary axes, from others.
    """
    head, sixteenths = config.attention_head_dim, config.attention_head_dim // 16
    axes = (head - 12 * sixteenths, 6 * sixteenths, 6 * sixteenths)
    multipliers = {
        part: next((m for m in range(1, 17) if _mlp_width(width, m) == inner), None)
        for part, width, inner in (
            ("blocks", config.hidden_size, config.intermediate_size),
            ("text", config.text_hidden_dim, config.text_intermediate_size),
        )
    }
    depths = (config.num_layerwise_text_blocks, config.num_refiner_text_blocks)
    if (
        len(set(multipliers.values())) != 1
        or None in multipliers.values()
        or axes != tuple(config.axes_dims_rope)
        or depths != (_FUSION_BLOCKS, _FUSION_BLOCKS)
    ):
        raise CheckpointError(
            f"{path.name} has MLPs of width {config.intermediate_size} and "
            f"{config.text_intermediate_size}, rotary axes {tuple(config.axes_dims_rope)} and "
            f"{depths[0]} and {depths[1]} blocks of text fusion, which ComfyUI's own Krea 2 cannot "
            "have. Choose the implementation of this pack."
        )
    return {
        "image_model": "krea2",
        "features": config.hidden_size,
        "tdim": config.timestep_embed_dim,
        "txtdim": config.text_hidden_dim,
        "heads": config.num_attention_heads,
        "kvheads": config.num_key_value_heads,
        "multiplier": multipliers["blocks"],
        "layers": config.num_layers,
        "patch": config.patch_size,
        "channels": config.latent_channels,
        "theta": config.rope_theta,
        "txtlayers": config.num_text_layers,
        "txtheads": config.text_num_attention_heads,
        "txtkvheads": config.text_num_key_value_heads,
    }


def _mlp_width(width: int, multiplier: int) -> int:
    return -(-int(2 * width / 3) * multiplier // 128) * 128


def core_patcher_class(load_device, disable_dynamic: bool, is_gguf: bool):
    base = comfy.model_patcher.CoreModelPatcher
    if disable_dynamic or is_gguf or comfy.model_management.is_device_cpu(load_device):
        base = comfy.model_patcher.ModelPatcher
    return type("BlockPatcher", (GGUFPatcher, base), {}) if is_gguf else base


def is_core(model) -> bool:
    """True if a MODEL of Krea 2 runs ComfyUI's own implementation."""
    return not isinstance(model.model.diffusion_model, Krea2Transformer)


def unknown_to(model, *conditionings) -> list[str]:
    """Names of the features in conditionings that have no effect on a MODEL; none on ours."""
    if not is_core(model):
        return []
    extras = [extra for conditioning in conditionings for _, extra in conditioning or ()]
    features = []
    if any(TOKEN_WEIGHTS in extra for extra in extras):
        features.append("prompt weights")
    settings = [each for extra in extras for each in extra.get(SETTINGS, ())]
    if any((each.strength, each.start, each.end) != (1.0, 0.0, 1.0) for each in settings):
        features.append("strength, start and end of references")
    if any(each.boost != 1 for each in settings):
        features.append("boost of references")
    if any(any(each.offset) for each in settings):
        features.append("place of references beside the image")
    if any(extra.get(CACHED) for extra in extras):
        features.append("cached references")
    if any(REGIONS in extra for extra in extras):
        features.append("regions")
    return features
