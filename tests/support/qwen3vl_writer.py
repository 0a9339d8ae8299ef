"""transformers' Qwen3-VL that writes, small and random.

With the layers and the vocabulary of the released one, so that the real tokenizer fits.
"""

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

TEXT = {
    "vocab_size": 151936,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 36,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5_000_000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def random_model(tied: bool = True) -> Qwen3VLForConditionalGeneration:
    """tied: the head is the embedding table, as in Qwen3-VL-4B."""
    torch.manual_seed(3)
    config = Qwen3VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=tied)
    config.text_config.tie_word_embeddings = tied
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embed_tokens" in name or "lm_head" in name:
                # Small, or what a token adds to the stream would make it its own successor.
                parameter.normal_(std=0.02)
            elif parameter.ndim > 1:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
    return model
