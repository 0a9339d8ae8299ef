"""LoRA: updates of krea2_model as ComfyUI patches, for any base and any way of loading."""

from pathlib import Path

import comfy.model_base
import comfy.utils
import comfy.weight_adapter
import torch
from comfy.quant_ops import QuantizedTensor

from ...krea2_model.checkpoints.identify import CheckpointError
from ...krea2_model.checkpoints.transformer_keys import official_to_module
from ...krea2_model.config import Preset
from ...krea2_model.lora.few_steps import FULL_STRENGTH, few_step_preset
from ...krea2_model.lora.files import read_lora, read_lora_file
from ...krea2_model.lora.updates import Update
from ...krea2_model.transformer.model import Krea2Transformer

# In the options of a MODEL: the sampling defaults that a few-step LoRA gives it.
PRESET = "krea2_preset"
# And the families of its edit LoRAs, a tuple of `EditFamily`.
EDIT_FAMILIES = "krea2_edit_families"


def checkpoint_preset(model) -> Preset | None:
    """Sampling defaults of a MODEL's checkpoint."""
    return getattr(model.model, "preset", None)


def known_preset(model) -> Preset | None:
    """Sampling defaults of a MODEL: of its few-step LoRA, or else of its checkpoint."""
    return model.model_options.get(PRESET) or checkpoint_preset(model)


class LoraPatch(comfy.weight_adapter.WeightAdapterBase):
    """One `Update`. ComfyUI copies it by constructing it from `loaded_keys` and moved `weights`.

    `weights` are the update, the norm it may need, and its matrices again, on any device.
    """

    name = "krea2"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def of(cls, update: Update, fused_norm: torch.Tensor | None = None):
        return cls(set(), (update, fused_norm, *update.parts.values()))

    def calculate_weight(
        self,
        weight,
        key,
        strength,
        strength_model,
        offset,
        function,
        intermediate_dtype=torch.float32,
        original_weight=None,
    ):
        update, fused_norm, *tensors = self.weights
        update = update.with_parts(dict(zip(update.parts, tensors, strict=True)))
        if fused_norm is not None:
            fused_norm = fused_norm.to(weight.device)
        changed = update.apply(weight, strength, fused_norm)
        # In float32 throughout, and rounded once, to the caller's dtype.
        weight.copy_(function(changed))
        return weight


def apply_lora(model, clip, path: Path, strength: float, clip_strength: float):
    """Patch clones of a MODEL and, where it is not None, a CLIP with a LoRA file.

    Returns the clones and the LoraReport. Raises CheckpointError where the file is not a LoRA or
    fits nothing, and ValueError where MODEL is not a Krea 2.
    """
    names = _weight_names(model)
    text_names = {} if clip is None else _text_weight_names(clip)
    tensors, metadata = read_lora_file(path)
    updates, text_updates, report = read_lora(
        tensors,
        {name: shape for name, (_, shape) in names.items()},
        path.name,
        {name: shape for name, (_, shape) in text_names.items()},
        metadata,
    )
    model = model.clone()
    _add(model, updates, names, strength, path.name)
    if report.steps is not None and strength >= FULL_STRENGTH:
        model.model_options[PRESET] = few_step_preset(report.steps, checkpoint_preset(model))
    if report.edit is not None and strength != 0:
        earlier = model.model_options.get(EDIT_FAMILIES, ())
        model.model_options[EDIT_FAMILIES] = (*earlier, report.edit)
    if clip is not None:
        clip = clip.clone()
        _add(clip.patcher, text_updates, text_names, clip_strength, path.name)
    return model, clip, report


def _add(patcher, updates: dict[str, list[Update]], names, strength: float, name: str) -> None:
    for update in (one for several in updates.values() for one in several):
        norm = None
        if update.needs_fused_weights:
            norm = update.fused_norm(
                {weight: _weight(patcher, names[weight][0]) for weight in update.fused}
            )
        key = names[update.weight][0]
        _check_result(update, patcher, key, strength, norm, name)
        patcher.add_patches({key: LoraPatch.of(update, norm)}, strength)


def _check_result(update: Update, patcher, key: str, strength: float, norm, name: str) -> None:
    """Refuse an update that makes a weight infinite, before it is a patch.

    Calculated only where it may: float16 ends at 65504, and no sound LoRA comes near.
    """
    dtype = comfy.utils.get_attr(patcher.model, key).dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        dtype = torch.bfloat16
    if update.largest_change * abs(strength) < torch.finfo(dtype).max / 2:
        return
    changed = update.apply(_weight(patcher, key), strength, norm)
    if not bool(torch.isfinite(changed.to(dtype)).all()):
        raise CheckpointError(
            f"{name} at strength {strength:g} makes {update.weight} infinite in {dtype}. Lower the "
            "strength, load the model as bf16, or choose another LoRA."
        )


def _weight(patcher, key: str) -> torch.Tensor:
    weight = comfy.utils.get_attr(patcher.model, key)
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


def _weight_names(model) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our name of each weight of a Krea 2: the patcher's key, and the shape."""
    if not isinstance(model.model, comfy.model_base.Krea2):
        raise ValueError(
            f"model is a {type(model.model).__name__}; expected a Krea 2 MODEL, from Load Krea 2 "
            "or ComfyUI's Load Diffusion Model. Other models take ComfyUI's own LoRA nodes."
        )
    transformer = model.model.diffusion_model
    if isinstance(transformer, Krea2Transformer):
        bare = Krea2Transformer(transformer.config, device="meta")
        shapes = {name: tuple(tensor.shape) for name, tensor in bare.state_dict().items()}
        return {name: (f"diffusion_model.{name}", shape) for name, shape in shapes.items()}
    # Core's own: official names, norm scales and tables as bare parameters.
    return {
        official_to_module(name): (f"diffusion_model.{name}", tuple(parameter.shape))
        for name, parameter in transformer.named_parameters()
    }


def transformer_shapes(model) -> dict[str, tuple[int, ...]]:
    """Shapes of a Krea 2's weights by our names."""
    return {name: shape for name, (_, shape) in _weight_names(model).items()}


def _text_weight_names(clip) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The name of each weight of the language tower: the patcher's key, and the shape."""
    names = {}
    for key, parameter in clip.patcher.model.named_parameters():
        _, separator, name = key.partition(".transformer.model.")
        if separator:
            names[name.removeprefix("language_model.")] = (key, tuple(parameter.shape))
    return names
