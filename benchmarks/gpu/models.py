"""Ours, core's and diffusers' models over one set of weights, and the calls that are compared."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from diffusers import AutoencoderKLQwenImage, Krea2Transformer2DModel
from diffusers.pipelines.krea2 import Krea2Pipeline
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import in_process
from krea2_model.transformer.model import patchify, unpatchify

from . import weights

# The file name tells the variant.
NAME = Path("krea2_turbo_random.safetensors")
# Compute capabilities on which torch tries cuDNN's attention first.
PREFER_CUDNN = ((9, 0), (10, 0))


@contextlib.contextmanager
def sharing_storage(device) -> Iterator[None]:
    """Models that are built here take tensors as their weights instead of copying them.

    As they do under dynamic VRAM. Built on the CPU, where what is never written takes no memory.
    """
    base, management = comfy.model_base.BaseModel, comfy.model_management
    load, offload_device = base.load_model_weights, management.unet_offload_device

    def take(self, tensors, prefix="", assign=False):
        return load(self, tensors, prefix, assign=True)

    base.load_model_weights = take
    management.unet_offload_device = lambda: torch.device("cpu")
    try:
        yield
    finally:
        base.load_model_weights, management.unet_offload_device = load, offload_device


def as_checkpoint(tensors: dict[str, Any], name: Path = NAME):
    """Tensors in memory as the pack's loaders take them."""
    return in_process.pack_module("krea2_model.checkpoints.checkpoint").Checkpoint(
        name, dict(tensors)
    )


def our_model(tensors: dict[str, Any], device, dtype=None, name: Path = NAME):
    """A MODEL of ours, all of it on the device."""
    load = in_process.pack_module("nodes.managed.model").load_model
    # Blocks of a GGUF file belong to the pack's own class.
    gguf = in_process.pack_module("krea2_model.checkpoints.gguf").GGUFTensor
    tensors = {
        key: gguf(t.data, t.format, t.shape) if isinstance(t, weights.GGUFTensor) else t
        for key, t in tensors.items()
    }
    with sharing_storage(device):
        patcher = load(as_checkpoint(tensors, name), dtype)
    return resident(patcher, device)


def core_model(tensors: dict[str, Tensor], device, **options):
    with sharing_storage(device):
        patcher = comfy.sd.load_diffusion_model_state_dict(dict(tensors), options)
    return resident(patcher, device)


def resident(patcher, device):
    patcher.offload_device = device
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    return patcher


def diffusers_model(config, tensors: dict[str, Tensor]):
    with torch.device("meta"):
        model = Krea2Transformer2DModel(**weights.diffusers_arguments(config))
    model.load_state_dict(weights.for_diffusers(model, tensors), strict=True, assign=True)
    return model.eval().requires_grad_(False)


def diffusers_vae(config, tensors: dict[str, Tensor]):
    keys = in_process.pack_module("krea2_model.checkpoints.vae_keys")
    with torch.device("meta"):
        model = AutoencoderKLQwenImage(base_dim=config.base_dim, z_dim=config.z_dim)
    state = {theirs: tensors[ours] for ours, theirs in keys.vae_key_map(config).items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


class Inputs:
    """Arguments of a call of the transformer, the same numbers for all."""

    def __init__(
        self, config, pixels: int, text: int, device, dtype, batch: int = 1, seed: int = 5
    ):
        generator = torch.Generator(device).manual_seed(seed)
        side, width = pixels // 8, config.num_text_layers * config.text_hidden_dim

        def random(*shape):
            return torch.randn(shape, device=device, generator=generator).to(dtype)

        self.latents = random(batch, config.latent_channels, side, side)
        self.context = random(batch, text, width)
        self.time = torch.full((batch,), 0.6, device=device)
        self.config, self.text, self.side = config, text, side


def our_call(patcher, inputs: Inputs) -> Callable[[], Tensor]:
    """A step as a sampler makes it, the text fused before the run."""
    inner = patcher.model.diffusion_model
    text = our_fusion(patcher, inputs)()
    latents = inputs.latents[:, :, None]
    return lambda: inner(latents, inputs.time, text, transformer_options={})[:, :, 0]


def our_fusion(patcher, inputs: Inputs) -> Callable[[], Tensor]:
    backend = in_process.pack_module("nodes.managed.backend").ComfyBackend({})
    inner = patcher.model.diffusion_model
    return lambda: inner.fuse_context(inputs.context, None, backend)


def core_call(patcher, inputs: Inputs) -> Callable[[], Tensor]:
    """A step of core's, which fuses the text in each."""
    inner, latents = patcher.model.diffusion_model, inputs.latents[:, :, None]
    return lambda: inner(latents, inputs.time, inputs.context, transformer_options={})[:, :, 0]


def core_fusion(patcher, inputs: Inputs) -> Callable[[], Tensor]:
    inner = patcher.model.diffusion_model
    return lambda: inner.txtmlp(inner.txtfusion(inner._unpack_context(inputs.context)))


def diffusers_call(model, inputs: Inputs) -> Callable[[], Tensor]:
    config, rows = inputs.config, -(-inputs.side // 2)
    taps = inputs.context.unflatten(-1, (config.num_text_layers, config.text_hidden_dim))
    device = inputs.latents.device
    positions = Krea2Pipeline.prepare_position_ids(inputs.text, rows, rows, device)
    patches = patchify(inputs.latents, config.patch_size)

    def call() -> Tensor:
        with attention_of_its_own(device):
            tokens = model(patches, taps, inputs.time, positions).sample
        return unpatchify(tokens, rows, rows, config.patch_size)

    return call


def attention_of_its_own(device: torch.device):
    """Torch's order of backends as a process has it in which nobody sets one.

    Torch moves cuDNN to the front on a Hopper with the first call, which ComfyUI undoes.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) not in PREFER_CUDNN:
        return contextlib.nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
             SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # fmt: skip
    return sdpa_kernel(order, set_priority=True)


class Models:
    """The transformers in the released sizes over one set of weights on the device."""

    def __init__(self, sizes: weights.Sizes, device, base: Path):
        self.sizes, self.device, self.base = sizes, device, base
        self.config = sizes.transformer
        self._by_form: dict[str, dict[str, Any]] = {}

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        return weights.transformer_tensors(self.config, self.device, self.dtype)

    def tensors_in(self, form: str) -> dict[str, Any]:
        """By official names: "bf16", a quantisation of convert.py, or a format of GGUF."""
        if form == "bf16":
            return self.tensors
        if form in weights.FORMATS:
            return weights.gguf_tensors(self.config, form, self.device)
        quantise = in_process.pack_module("krea2_model.tools.convert").quantise_blocks
        return quantise(self.tensors, form, self.device, self.device)

    def in_form(self, form: str) -> dict[str, Any]:
        """MODELs by who made them, in one form at a time beside bf16."""
        if form not in self._by_form:
            self._by_form = {k: v for k, v in self._by_form.items() if k == "bf16"}
            tensors = self.tensors_in(form)
            models = {"ours": our_model(tensors, self.device)}
            if form not in weights.FORMATS:
                models["core"] = core_model(tensors, self.device)
            self._by_form[form] = models
        return self._by_form[form]

    @functools.cached_property
    def diffusers(self):
        return diffusers_model(self.config, self.tensors)

    @functools.cached_property
    def reference(self):
        """Core's modules in float32 over the same weights, each cast as it is used."""
        return core_model(
            self.tensors, self.device, dtype=self.dtype, custom_operations=comfy.ops.manual_cast
        )

    def inputs(self, pixels: int, text: int, dtype=None, batch: int = 1) -> Inputs:
        dtype = dtype or self.dtype
        return Inputs(self.config, pixels, text, self.device, dtype, batch)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """Of weights and activations, as ComfyUI chooses it for bf16 files: float32 on a CPU."""
        supported = [torch.bfloat16, torch.float16, torch.float32]
        return comfy.model_management.unet_dtype(
            device=self.device, supported_dtypes=supported, weight_dtype=torch.bfloat16
        )

    def calls(self, form: str, inputs: Inputs, diffusers: bool = True) -> dict[str, Callable]:
        """A step of each who has this form, by name."""
        models = self.in_form(form)
        calls = {"ours": our_call(models["ours"], inputs)}
        if "core" in models:
            calls["core"] = core_call(models["core"], inputs)
        if diffusers and form == "bf16":
            calls["diffusers"] = diffusers_call(self.diffusers, inputs)
        return calls


def our_vae(tensors: dict[str, Tensor], dtype):
    load = in_process.pack_module("nodes.managed.vae").load_vae
    return load(as_checkpoint(tensors, Path("qwen_image_vae.safetensors")), dtype)


def core_vae(tensors: dict[str, Tensor], dtype):
    return comfy.sd.VAE(sd=dict(tensors), dtype=dtype)


def our_clip(tensors: dict[str, Tensor]):
    load = in_process.pack_module("nodes.managed.clip").load_clip
    return load(as_checkpoint(tensors, Path("qwen3vl_4b_random.safetensors")))


def core_clip(tensors: dict[str, Tensor], config, dtype):
    """Core's own encoder; its sizes are those of the released model unless they are replaced."""
    import comfy.text_encoders.krea2 as krea2

    if config != weights.FULL.encoder:
        shrink_core_encoder(config)
    target = comfy.supported_models_base.ClipTarget(krea2.Krea2Tokenizer, krea2.te())
    return comfy.sd.CLIP(
        target, state_dict=[dict(tensors)], parameters=1, model_options={"dtype": dtype}
    )


def shrink_core_encoder(config) -> None:
    import comfy.text_encoders.qwen3vl as qwen

    class Small(qwen.Qwen3VL_4BConfig):
        def __init__(self, **options):
            super().__init__(**options)
            for name in ("hidden_size", "intermediate_size", "num_attention_heads",
                         "num_key_value_heads", "head_dim"):  # fmt: skip
                setattr(self, name, getattr(config, name))
            self.rope_dims = config.rotary_sections

    qwen.QWEN3VL_CONFIGS["qwen3vl_4b"] = Small
    vision = in_process.pack_module("krea2_model.nano").VISION_CONFIG
    qwen.QWEN3VL_VISION["qwen3vl_4b"] = {**vars(vision), "out_hidden_size": config.hidden_size}
    qwen.QWEN3VL_VISION_COMMON = {}


def encode(clip, text: str) -> Tensor:
    """A text's conditioning, really encoded: ours would remember it."""
    getattr(clip.cond_stage_model, "encodings", {}).clear()
    return clip.encode_from_tokens(clip.tokenize(text))
