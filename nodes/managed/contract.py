"""Our transformer under the contract of ComfyUI's own Krea 2 (`comfy.ldm.krea2.model`).

Other packs check for core's classes, read their attributes, call blocks and attention by
themselves, replace `forward` of a part, or rebuild the whole forward pass. So each layer here is a
subclass of core's that is built as ours. Called in our own way (with a `Backend`), it runs our
code. Called in core's way (with `transformer_options`), it runs core's function on our weights, as
others may have replaced it: nothing that they hold is overwritten.
"""

from functools import partial
from typing import Any
from weakref import ref

import comfy.ldm.krea2.model as core
import torch
from comfy.ldm.flux.layers import EmbedND
from torch import nn

from ...krea2_model.nn import kernels
from ...krea2_model.transformer import blocks as ours
from ...krea2_model.transformer.backend import Backend
from ...krea2_model.transformer.model import Krea2Transformer
from .shared_inputs import share_input

# Key of a function that gives a call's backend, mostly a weak reference, in transformer_options.
BACKEND = "krea2_backend"

_INIT: Any = vars(nn.Module)["__init__"]
_PACK = __name__.rpartition(".nodes.")[0]

# The functions of these are called on our weights where somebody replaced them.
_CLASSES = (
    core.Attention, core.SingleStreamBlock, core.SwiGLU,
    core.TextFusionBlock, core.TextFusionTransformer,
)  # fmt: skip


def is_replaced(cls: type, method: str = "forward") -> bool:
    """True if another pack has replaced a method of a class of core's."""
    function = getattr(cls, method)
    if function.__module__ != cls.__module__:
        return True
    # A decorator may have given it the old one's name and module.
    code = getattr(function, "__code__", None)
    return code is None or code.co_filename != vars(cls)["__init__"].__code__.co_filename


def _built_as_ours(cls: type) -> Any:
    """A class of core's as a base: its type and its methods, none of its weights."""
    return type(cls.__name__, (cls,), {"__init__": _INIT})


_Attention: Any = _built_as_ours(core.Attention)
_SwiGLU: Any = _built_as_ours(core.SwiGLU)
_TextFusionBlock: Any = _built_as_ours(core.TextFusionBlock)
_TextFusionTransformer: Any = _built_as_ours(core.TextFusionTransformer)
_SingleStreamBlock: Any = _built_as_ours(core.SingleStreamBlock)
_SingleStreamDiT: Any = _built_as_ours(core.SingleStreamDiT)


class Attention(ours.GatedAttention, _Attention):
    share_input = staticmethod(share_input)

    @property
    def kvheads(self) -> int:
        return self.kv_heads

    @property
    def headdim(self) -> int:
        return self.head_dim

    def forward(
        self,
        x,
        freqs=None,
        mask=None,
        transformer_options={},  # noqa: B006
        query_slice=None,
        norm=None,
    ):
        if isinstance(transformer_options, Backend):
            return super().forward(x, freqs, mask, transformer_options, query_slice, norm)
        backend = transformer_options.get(BACKEND, _nobody)()
        if backend is None or is_replaced(core.Attention):
            return core.Attention.forward(
                self, x, freqs, mask, transformer_options=transformer_options
            )
        # By others, in a run of ours: text weights, a negative and references count here too.
        with kernels.keeping_inputs():
            return super().forward(x, freqs, mask, backend)


class SwiGLU(ours.SwiGLU, _SwiGLU):
    share_input = staticmethod(share_input)

    def forward(self, x):
        return core.SwiGLU.forward(self, x) if is_replaced(core.SwiGLU) else super().forward(x)


class TextFusionBlock(ours.TextFusionBlock, _TextFusionBlock):
    attention_class = Attention
    mlp_class = SwiGLU

    def forward(self, x, mask=None, transformer_options={}):  # noqa: B006
        if isinstance(transformer_options, Backend):
            return super().forward(x, mask, transformer_options)
        return core.TextFusionBlock.forward(
            self, x, mask=mask, transformer_options=transformer_options
        )


class TextFusion(ours.TextFusion, _TextFusionTransformer):
    block_class = TextFusionBlock

    def forward(self, x, mask=None, transformer_options={}):  # noqa: B006
        if isinstance(transformer_options, Backend):
            return super().forward(x, mask, transformer_options)
        return core.TextFusionTransformer.forward(
            self, x, mask=mask, transformer_options=transformer_options
        )


class Block(ours.SingleStreamBlock, _SingleStreamBlock):
    attention_class = Attention
    mlp_class = SwiGLU

    def forward(
        self,
        x,
        vec,
        freqs,
        mask=None,
        timestep_zero_index=None,
        transformer_options={},  # noqa: B006
        query_slice=None,
        modulation=None,
    ):
        if isinstance(transformer_options, Backend):
            conditions = (x, vec, freqs, mask, timestep_zero_index)
            return super().forward(*conditions, transformer_options, query_slice, modulation)
        # Older versions of core have no argument for references.
        split = {} if timestep_zero_index is None else {"timestep_zero_index": timestep_zero_index}
        return core.SingleStreamBlock.forward(
            self, x, vec, freqs, mask, **split, transformer_options=transformer_options
        )


class Transformer(Krea2Transformer, _SingleStreamDiT):
    """With the attributes that core's has; `forward` is for the subclass."""

    block_class = Block
    text_fusion_class = TextFusion

    def __init__(self, config, layers, device=None, dtype=None):
        super().__init__(config, layers, device=device, dtype=dtype)
        self.dtype = dtype
        self.patch, self.channels = config.patch_size, config.latent_channels
        self.tdim, self.heads = config.timestep_embed_dim, config.num_attention_heads
        self.txtdim, self.txtlayers = config.text_hidden_dim, config.num_text_layers
        self.default_ref_method = None
        self.pe_embedder = EmbedND(
            config.attention_head_dim, int(config.rope_theta), list(config.axes_dims_rope)
        )
        self._types = frozenset(type(module) for module in self.modules())

    @torch.compiler.disable
    def is_touched(self, part: nn.Module | None = None) -> bool:
        """True if others replaced a module of this model, or of a part of it, or hook into it."""
        part = self if part is None else part
        # A compiled block is still ours.
        part = getattr(part, "_orig_mod", part)
        return is_touched(part, self._types) or any(map(is_replaced, _CLASSES))

    def _fuse(self, taps, mask, backend):
        if not self.is_touched(self.txtfusion):
            return super()._fuse(taps, mask, backend)
        keys = None if mask is None else mask[:, None, None, :]
        fused = self.txtfusion(taps, mask=keys, transformer_options=backend.options)
        return self.txtmlp(fused)


def has_foreign_forward() -> bool:
    """True if another pack has replaced the forward pass of core's transformer."""
    return is_replaced(core.SingleStreamDiT, "_forward")


def foreign_forward(transformer: Transformer, *inputs, **conditions):
    """That forward pass, on our weights."""
    return core.SingleStreamDiT._forward(transformer, *inputs, **conditions)


def is_touched(module: nn.Module, types: frozenset[type]) -> bool:
    """True if others replaced a module in this one, or hook into it.

    types: of all modules in it as it was built.
    """
    # Called at each step for every block, so an untouched module is passed quickly.
    left = [module]
    while left:
        part = left.pop()
        own = part.__dict__
        if type(part) not in types:
            return True
        if "forward" in own and not _is_own(own["forward"], part):
            return True
        for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"]):
            if hooks and not all(map(_is_ours, hooks.values())):
                return True
        if own["_modules"]:
            left += own["_modules"].values()
    return False


def _is_own(forward, module: nn.Module) -> bool:
    """True for the module's own method: ComfyUI restores it as an attribute."""
    return getattr(forward, "__func__", None) is type(module).forward


def _is_ours(function) -> bool:
    return (getattr(function, "__module__", None) or "").startswith(f"{_PACK}.")


def _nobody() -> None:
    """In the place of a weak reference to a backend."""


def announce(backend: Backend, options: dict) -> None:
    """Let parts that others call with these options find the backend of the call.

    With gradients the options hold it: a checkpointed part is computed again in the backward pass,
    when the call is over.
    """
    options[BACKEND] = partial(_same, backend) if torch.is_grad_enabled() else ref(backend)


def _same(backend: Backend) -> Backend:
    return backend
