"""transformers' Qwen3-VL, small and random, with the released one's layers and vocabulary."""

import torch
from transformers import Qwen3VLConfig, Qwen3VLModel

from krea2_model.config import TextEncoderConfig

SMALL = TextEncoderConfig(
    hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32
)
VISION = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 1,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}


def qwen3vl() -> Qwen3VLModel:
    torch.manual_seed(0)
    text = {
        "vocab_size": SMALL.vocab_size,
        "hidden_size": SMALL.hidden_size,
        "intermediate_size": SMALL.intermediate_size,
        "num_hidden_layers": SMALL.num_hidden_layers,
        "num_attention_heads": SMALL.num_attention_heads,
        "num_key_value_heads": SMALL.num_key_value_heads,
        "head_dim": SMALL.head_dim,
        "rms_norm_eps": SMALL.rms_norm_eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": SMALL.rope_theta,
            "mrope_section": list(SMALL.rotary_sections),
            "mrope_interleaved": True,
        },
    }
    model = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=VISION)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            elif "embed_tokens" in name:
                parameter.normal_()
            elif name.endswith("bias") or "pos_embed" in name:
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.requires_grad_(False)
