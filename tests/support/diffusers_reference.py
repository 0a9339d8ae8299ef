"""diffusers' transformer beside ours: the same sizes, the same weights, the same call."""

import torch
from diffusers import Krea2Transformer2DModel
from diffusers.pipelines.krea2 import Krea2Pipeline as DiffusersPipeline

from krea2_model.checkpoints.transformer_keys import diffusers_to_official, official_to_module
from krea2_model.config import TransformerConfig
from krea2_model.transformer.model import Krea2Transformer, grid_size, patchify, unpatchify

TINY = TransformerConfig(
    num_layers=3,
    attention_head_dim=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=256,
    timestep_embed_dim=64,
    text_hidden_dim=80,
    text_num_attention_heads=10,
    text_num_key_value_heads=5,
    text_intermediate_size=128,
    axes_dims_rope=(8, 12, 12),
)


def random_transformer(config: TransformerConfig) -> Krea2Transformer:
    """A transformer of random weights, norms among them, without gradients."""
    generator = torch.Generator().manual_seed(0)
    model = Krea2Transformer(config).requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def diffusers_arguments(config: TransformerConfig) -> dict:
    fields = {**config.__dict__}
    for ours in ("out_channels", "patch_size"):
        fields.pop(ours)
    return fields


def diffusers_transformer(config: TransformerConfig = TINY):
    """A random one; diffusers starts norms and tables at zero, which would hide mistakes there."""
    torch.manual_seed(0)
    model = Krea2Transformer2DModel(**diffusers_arguments(config)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.3 if parameter.ndim == 1 or "table" in name else 0.08)
    return model


def load_from(model, reference):
    state = {}
    for name, tensor in reference.state_dict().items():
        official = diffusers_to_official(name)
        state[official_to_module(official)] = (
            tensor.flatten() if official.endswith(".mod.lin") else tensor
        )
    model.load_state_dict({k: v.clone() for k, v in state.items()}, strict=True)


def run_reference(reference, latents, timestep, taps, mask=None):
    rows, columns = grid_size(latents, 2)
    positions = DiffusersPipeline.prepare_position_ids(taps.shape[1], rows, columns, "cpu")
    velocity = reference(
        patchify(latents, 2), taps, timestep, positions, encoder_attention_mask=mask
    ).sample
    return unpatchify(velocity, rows, columns, 2)
