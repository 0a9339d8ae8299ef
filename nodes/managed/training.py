"""Training of `krea2_training` on ComfyUI's MODEL, CLIP and VAE.

Pictures and captions are encoded by the managed CLIP and VAE. The steps run on a plain transformer
that shares the MODEL's weights and never writes to them: frozen matrices are read where they are,
or copied to the device, and what needs gradients around them is copied.
"""

import hashlib
import logging
from typing import Any

import comfy.ldm.wan.vae
import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.text_encoders.krea2
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor

from ...krea2_model.checkpoints.quantised import FLOAT8, layer_settings
from ...krea2_model.checkpoints.quantised_weight import INT8
from ...krea2_model.checkpoints.transformer_keys import module_to_official
from ...krea2_model.transformer.model import Krea2Transformer
from .encode import count_tokens, encode_prompts
from .gguf import is_gguf
from .lora import known_preset
from .svdquant import file_name
from .training_package import training
from .vae import Krea2VAE

# Numbers of a tensor that its hash reads.
_SAMPLES = 64


def check_parts(model, clip, vae) -> None:
    """Raise ValueError unless the three are Krea 2's and belong together."""
    inner = model.model
    if not isinstance(inner, comfy.model_base.Krea2):
        raise ValueError(
            f"model is a {type(inner).__name__}; expected a Krea 2 MODEL, from Load Krea 2. Other "
            "models are trained by ComfyUI's own Train LoRA."
        )
    encoder = clip.cond_stage_model
    if not isinstance(encoder, comfy.text_encoders.krea2.Krea2TEModel):
        raise ValueError(
            f"clip is a {type(encoder).__name__}; expected Krea 2's text encoder, Qwen3-VL-4B, "
            "from Load Krea 2."
        )
    width, expected = _width_of(encoder), inner.diffusion_model.txtdim
    if width not in (None, expected):
        raise ValueError(
            f"clip is a text encoder of width {width}; this model needs {expected}. Connect the "
            "one that belongs to it (Qwen3-VL-4B for Krea 2, krea2-nano's own for krea2-nano)."
        )
    network = vae.first_stage_model
    if not isinstance(vae, Krea2VAE) and not (
        isinstance(network, comfy.ldm.wan.vae.WanVAE) and vae.latent_channels == 16
    ):
        raise ValueError(
            f"vae is a {type(network).__name__}; expected the Qwen-Image VAE, from Load Krea 2."
        )


def _width_of(encoder) -> int | None:
    """Width of a text encoder of ours; core's has but one."""
    return getattr(getattr(encoder, "config", None), "hidden_size", None)


def is_turbo(model) -> bool:
    preset = known_preset(model)
    return preset is not None and preset.guidance == 0


def settings_of_device() -> dict[str, str]:
    """Device and dtype of the calculation, as settings of a run."""
    device = comfy.model_management.get_torch_device()
    is_cpu = comfy.model_management.is_device_cpu(device)
    return {"memory.device": str(device), "memory.dtype": "fp32" if is_cpu else "bf16"}


def parts_of(model, clip, vae, dtype: torch.dtype):
    """MODEL, CLIP and VAE as the parts of a session; all of them leave the device."""
    _unload()
    tensors = _file_tensors(model, dtype)
    named = {n: t[0] if isinstance(t, tuple) else t for n, t in tensors.items()}
    variant = "turbo" if is_turbo(model) else "raw"
    base = training().weights.base.base_of_tensors(tensors, dtype, variant)
    return training().session.Parts(base, ManagedEncoders(model, clip, vae), _hash_of(named))


def _file_tensors(model, dtype: torch.dtype) -> dict[str, Any]:
    """A MODEL's weights as a file has them, patches applied.

    The blocks' matrices are those of the MODEL. Others are copies: autograd saves them, and cannot
    where ComfyUI made them, in inference mode.
    """
    transformer = model.model.diffusion_model
    tensors = dict(transformer.state_dict())
    unknown = {
        layer
        for layer, settings in layer_settings(tensors).items()
        if settings.get("format") not in (*FLOAT8, INT8)
    }
    patched = {
        key.removeprefix("diffusion_model.").removesuffix(".weight")
        for key in model.patches
        if key.endswith(".weight")
    }
    if unknown - patched:
        logging.info(
            "Krea 2 training holds %d layers in %s: their format has no gradients.",
            len(unknown - patched),
            dtype,
        )
    for layer in unknown | patched:
        plain = _plain_weight(model, f"diffusion_model.{layer}.weight", dtype)
        for name in [n for n in tensors if n.rpartition(".")[0] == layer]:
            if not name.endswith(".bias"):
                del tensors[name]
        tensors[f"{layer}.weight"] = plain
    for key in model.patches:
        name = key.removeprefix("diffusion_model.")
        if name.endswith(".bias") and name in tensors:
            tensors[name] = _plain_weight(model, key, dtype)
    by_us = isinstance(transformer, Krea2Transformer)
    return {
        module_to_official(file_name(name)) if by_us else name: _own(name, tensor)
        for name, tensor in tensors.items()
    }


def _own(name: str, tensor) -> Any:
    if is_gguf(tensor):
        return tensor._qdata, tensor._params.format, tuple(tensor._params.orig_shape)
    is_matrix_of_block = name.startswith("blocks.") and tensor.ndim == 2
    return tensor if is_matrix_of_block else tensor.detach().clone()


def _plain_weight(model, key: str, dtype: torch.dtype) -> torch.Tensor:
    """A weight in main memory, dequantised and with the MODEL's patches."""
    weight = comfy.utils.get_attr(model.model, key)
    weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    weight = weight.detach()
    if key in model.patches:
        exact = weight.to(model.load_device, torch.float32, copy=True)
        exact = comfy.lora.calculate_weight(model.patches[key], exact, key)
        # Norms, tables and biases keep the dtype that they are stored in.
        return exact.to("cpu", dtype if weight.ndim == 2 else weight.dtype)
    return weight.to("cpu", dtype)


class ManagedEncoders:
    """A managed CLIP and VAE as the encoders of a session, with the methods of its `Encoders`.

    Raises ComfyUI's exception where the run is interrupted.
    """

    def __init__(self, model, clip, vae):
        self.model, self._clip, self._vae = model.model, clip, vae
        self._names: dict[str, str] = {}

    def check(self, sizes) -> None:
        """`check_parts` has."""

    def count_tokens(self, text: str) -> int:
        return count_tokens(self._clip, text)

    def text(self):
        return self._clip

    def vae(self):
        return self._vae

    @torch.inference_mode()
    def taps(self, encoder, prompt: str, images=(), labels: bool = True) -> torch.Tensor:
        """Taps (L, T, D) of a prompt; images: none, the node's references are not read."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        transformer = self.model.diffusion_model
        states = encode_prompts(encoder, [prompt], weighted=False)[0][0]
        taps, width = transformer.txtlayers, transformer.txtdim
        if states.shape[-1] != taps * width:
            raise ValueError(
                f"clip gives {states.shape[-1]} features a token; this model needs {taps} x {width}"
                f" = {taps * width}. Connect the text encoder that belongs to it."
            )
        return states[0].unflatten(-1, (taps, width))

    @torch.inference_mode()
    def latents(self, vae, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised latents (16, h, w) of a picture (3, H, W) in [0, 1]."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        latents = self.model.process_latent_in(vae.encode(pixels.movedim(0, -1)[None]))
        return latents[0, :, 0] if latents.ndim == 5 else latents[0]

    def release(self) -> None:
        _unload()

    def name(self, part: str) -> str:
        if part not in self._names:
            patcher = self._clip.patcher if part == "text" else self._vae.patcher
            tensors = {
                name: getattr(tensor, "_qdata", tensor)
                for name, tensor in patcher.model.state_dict().items()
            }
            patches = str(patcher.patches_uuid) if patcher.patches else ""
            self._names[part] = _hash_of(tensors) + patches
        return self._names[part]


@torch.inference_mode()
def _unload() -> None:
    """Have ComfyUI take all models off the device, in the mode in which it put them there.

    Moved in another mode, its quantised weights could not be loaded again.
    """
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def _hash_of(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of names, shapes, and numbers spread over each tensor."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu().contiguous()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(some.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
