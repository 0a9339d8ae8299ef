"""Key layouts of the transformer: official, diffusers, and the module's own names.

The module's names are the official ones, with each bare parameter moved into a leaf module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..config import TransformerConfig

Shape = tuple[int, ...]

# A tensor every Krea 2 transformer has and nothing else does, in either layout.
OFFICIAL_MARKER = "txtfusion.projector.weight"
DIFFUSERS_MARKER = "text_fusion.projector.weight"

# (diffusers, official), applied to whole dotted parts of a name, in this order.
_DIFFUSERS_TO_OFFICIAL = (
    ("img_in", "first"),
    ("time_embed.linear_1", "tmlp.0"),
    ("time_embed.linear_2", "tmlp.2"),
    ("time_mod_proj", "tproj.1"),
    ("txt_in.norm.weight", "txtmlp.0.scale"),
    ("txt_in.linear_1", "txtmlp.1"),
    ("txt_in.linear_2", "txtmlp.3"),
    ("text_fusion", "txtfusion"),
    ("transformer_blocks", "blocks"),
    ("final_layer.norm.weight", "last.norm.scale"),
    ("final_layer.scale_shift_table", "last.modulation.lin"),
    ("final_layer", "last"),
    ("scale_shift_table", "mod.lin"),
    ("norm1.weight", "prenorm.scale"),
    ("norm2.weight", "postnorm.scale"),
    ("attn.to_q", "attn.wq"),
    ("attn.to_k", "attn.wk"),
    ("attn.to_v", "attn.wv"),
    ("attn.to_gate", "attn.gate"),
    ("attn.to_out.0", "attn.wo"),
    ("attn.norm_q.weight", "attn.qknorm.qnorm.scale"),
    ("attn.norm_k.weight", "attn.qknorm.knorm.scale"),
    ("ff", "mlp"),
)


# 18 times the released model's; building more would take minutes.
_MOST_BLOCKS = 512


def _translate(name: str, pairs) -> str:
    dotted = f".{name}."
    for old, new in pairs:
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]


def diffusers_to_official(name: str) -> str:
    """`transformer_blocks.0.attn.to_q.weight` -> `blocks.0.attn.wq.weight`; others unchanged."""
    return _translate(name, _DIFFUSERS_TO_OFFICIAL)


def official_to_diffusers(name: str) -> str:
    """The inverse of `diffusers_to_official` for the keys of a transformer."""
    pairs = [(official, diffusers) for diffusers, official in _DIFFUSERS_TO_OFFICIAL]
    # `last` also names the parts that have rows of their own; those rows come first already.
    return _translate(name, pairs)


def official_to_module(name: str) -> str:
    """`blocks.0.mod.lin` -> `blocks.0.mod.lin.weight`; names of layers are the same in both."""
    return f"{name}.weight" if name.endswith((".scale", ".lin")) else name


def module_to_official(name: str) -> str:
    """The inverse of `official_to_module`."""
    return re.sub(r"\.(scale|lin)\.weight$", r".\1", name)


def is_norm_or_table(name: str) -> bool:
    """True for the name (module's or official) of a norm scale or modulation table."""
    return module_to_official(name).endswith((".scale", ".lin"))


def infer_transformer_config(shapes: Mapping[str, Shape], **fixed) -> TransformerConfig:
    """Sizes of a transformer from the shapes of its tensors, by official name.

    `fixed` gives what tensors cannot tell (rope_theta, norm_eps, axes_dims_rope), where a
    configuration file does. Raises ValueError naming the tensor that is missing or misshapen.
    """

    def shape(name: str) -> Shape:
        if name not in shapes:
            raise ValueError(f"the tensor {name!r} is missing")
        dimensions = 1 if name.endswith(".scale") else 2
        if len(shapes[name]) != dimensions or not all(shapes[name]):
            raise ValueError(f"{name} is {shapes[name]}; expected {dimensions} sizes above 0")
        return shapes[name]

    def count(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"(\d{1,9})\.")
        numbers = {int(m[1]) for n in shapes if (m := pattern.match(n))}
        if len(numbers) > _MOST_BLOCKS:
            raise ValueError(f"{prefix}N goes up to {max(numbers)}; expected {_MOST_BLOCKS} blocks")
        if numbers != set(range(len(numbers))):
            raise ValueError(f"{prefix}N has gaps: it has the numbers {sorted(numbers)[:40]}")
        return len(numbers)

    def heads(block: str) -> tuple[int, int, int]:
        (head_dim,) = shape(f"{block}.attn.qknorm.qnorm.scale")
        query, key = shape(f"{block}.attn.wq.weight")[0], shape(f"{block}.attn.wk.weight")[0]
        if query % head_dim or key % head_dim:
            raise ValueError(f"{block}.attn has {query} and {key} rows for heads of {head_dim}")
        return head_dim, query // head_dim, key // head_dim

    head_dim, num_heads, kv_heads = heads("blocks.0")
    hidden, channels = head_dim * num_heads, shape("last.linear.weight")[0]
    if shape("first.weight")[0] != hidden:
        # Stored in rows of another length, for example: its columns would tell nonsense.
        raise ValueError(f"first.weight is {shapes['first.weight']}; expected {(hidden, channels)}")
    text_block = "txtfusion.layerwise_blocks.0"
    _, text_heads, text_kv_heads = heads(text_block)
    unit = head_dim // 16
    sizes = {
        "in_channels": shape("first.weight")[1],
        "out_channels": shape("last.linear.weight")[0],
        "num_layers": count("blocks."),
        "attention_head_dim": head_dim,
        "num_attention_heads": num_heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": shape("blocks.0.mlp.gate.weight")[0],
        "timestep_embed_dim": shape("tmlp.0.weight")[1],
        "text_hidden_dim": shape(f"{text_block}.prenorm.scale")[0],
        "num_text_layers": shape(OFFICIAL_MARKER)[1],
        "text_num_attention_heads": text_heads,
        "text_num_key_value_heads": text_kv_heads,
        "text_intermediate_size": shape(f"{text_block}.mlp.gate.weight")[0],
        "num_layerwise_text_blocks": count("txtfusion.layerwise_blocks."),
        "num_refiner_text_blocks": count("txtfusion.refiner_blocks."),
        # The official rule: rows and columns get six pairs of every sixteen, time the rest.
        "axes_dims_rope": (head_dim - 12 * unit, 6 * unit, 6 * unit),
    }
    axes = fixed.get("axes_dims_rope", sizes["axes_dims_rope"])
    if sum(axes) != head_dim:
        raise ValueError(f"axes_dims_rope {axes} do not add up to heads of {head_dim}")
    return TransformerConfig(**{**sizes, **fixed})
