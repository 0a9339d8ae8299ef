"""What fuzz.py changes: for each kind of file, a function that writes one and says how to read it.

A case is `make(sources, dice) -> (bytes of the file, read)`; `read()` gives the bytes that were
loaded, or raises.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from krea2_model import CheckpointError, load_transformer, load_vae
from krea2_model.checkpoints.checkpoint import open_checkpoint, read_shapes
from krea2_model.checkpoints.identify import TEXT_ENCODER
from krea2_model.checkpoints.loading import assign
from krea2_model.checkpoints.quantised import dequantise
from krea2_model.checkpoints.text_encoder import read_text_encoder
from krea2_model.lora.files import read_lora, read_lora_file
from krea2_model.lora.updates import LoraStack
from krea2_model.text.encoder import Qwen3VLTextEncoder
from krea2_model.tools.describe import describe

from .fuzz_sources import Sources, dumps, mutate, text_tensor

Read = Callable[[], int]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8,
           torch.int64, torch.uint8, torch.bool, torch.float64)  # fmt: skip


def _load_encoder(path: Path) -> Qwen3VLTextEncoder:
    """Without a tokenizer, which is not the file's and takes seconds."""
    checkpoint = open_checkpoint(path, "text_encoder")
    state = read_text_encoder(checkpoint)
    tensors = dequantise(state.tensors, checkpoint.path.name)
    encoder = Qwen3VLTextEncoder(state.config, device="meta")
    return assign(encoder, tensors, checkpoint.path, TEXT_ENCODER)


def _size_of(module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def _loading(path: Path, load=load_transformer) -> Read:
    def read() -> int:
        # As lists and Inspect do, whose refusals the loader has to repeat.
        for ask in (read_shapes, describe):
            with contextlib.suppress(CheckpointError):
                ask(path)
        return _size_of(load(path))

    return read


def header(sources: Sources, dice: random.Random) -> tuple[int, Read]:
    """The JSON header of a safetensors file."""
    tensors, load = dice.choice((
        (sources.transformer, load_transformer), (sources.vae, load_vae),
        (sources.quantised, load_transformer),
    ))  # fmt: skip
    path = sources.safetensors(tensors, {"krea2.steps": "8", "krea2.variant": "turbo"})
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    text = dumps(mutate(json.loads(content[8:end]), dice)).encode("utf-8", "surrogatepass")
    length = len(text) if dice.random() < 0.95 else dice.choice((0, 1, 2**31, 2**63, len(text) + 9))
    path.write_bytes(struct.pack("<Q", length) + text + content[end:])
    return path.stat().st_size, _loading(path, load)


def descriptor(sources: Sources, dice: random.Random) -> tuple[int, Read]:
    """Names, shapes and dtypes of tensors, in a file that is whole."""
    source, load = dice.choice((
        (sources.transformer, load_transformer), (sources.vae, load_vae),
        (sources.encoder, _load_encoder), (sources.quantised, load_transformer),
    ))  # fmt: skip
    tensors = dict(source)
    for _ in range(dice.choice((1, 1, 2, 10))):
        name = dice.choice(list(tensors))
        tensor = tensors.pop(name)
        how = dice.randrange(7)
        if how == 0:
            continue
        if how == 1:
            name = dice.choice(list(source)) + dice.choice(
                ("", ".weight", "_scale", ".comfy_quant")
            )
        elif how == 2:
            name = name.replace(".0.", f".{dice.choice((1, 2, 40, 10**6, 10**30))}.", 1)
        elif how == 3:
            tensor = _reshaped(tensor, dice)
        elif how == 4:
            tensor = tensor.to(dice.choice(_DTYPES))
        elif how == 5:
            tensor = torch.full_like(tensor.float(), dice.choice((float("nan"), float("inf"), 0.0)))
        else:
            name = dice.choice(("_orig_mod.", "model.diffusion_model.", "x.", "")) + name
        tensors[name] = tensor
    path = sources.safetensors(tensors)
    return path.stat().st_size, _loading(path, load)


def _reshaped(tensor: torch.Tensor, dice: random.Random) -> torch.Tensor:
    sides = list(tensor.shape)
    how = dice.randrange(6)
    if how == 0 and tensor.ndim > 1:
        return tensor.transpose(0, 1).contiguous()
    if how == 1:
        return tensor.flatten()
    if how == 2:
        return tensor.unsqueeze(dice.randrange(tensor.ndim + 1)).contiguous()
    if how == 3:
        return torch.zeros(dice.choice(((), (0,), (1,), (1, 1), (0, 5), (2, 3, 4, 5, 6))))
    if sides:
        place = dice.randrange(len(sides))
        sides[place] = dice.choice((0, 1, sides[place] + 1, sides[place] * 2, 3))
    return torch.zeros(sides, dtype=tensor.dtype)


def quantisation(sources: Sources, dice: random.Random) -> tuple[int, Read]:
    """Settings and scales of quantised layers, as tensors or in the header."""
    tensors = dict(sources.quantised)
    names = [n for n in tensors if n.endswith(".comfy_quant")]
    settings = {n: json.loads(bytes(tensors[n].tolist())) for n in names}
    metadata = {}
    if dice.random() < 0.5:
        layers = {n.removesuffix(".comfy_quant"): value for n, value in settings.items()}
        text = dumps(mutate({"layers": layers}, dice))
        metadata = {"_quantization_metadata": text.encode("ascii", "replace").decode()}
        for name in names:
            del tensors[name]
    else:
        name = dice.choice(names)
        tensors[name] = text_tensor(dumps(mutate(settings[name], dice)))
    if dice.random() < 0.6:
        layer = dice.choice(names).removesuffix(".comfy_quant")
        suffix = dice.choice((".weight_scale", ".weight_scale", ".input_scale", ".weight_scale_2",
                              ".pre_quant_scale", ".svdq_l1", ".svdq_l2"))  # fmt: skip
        shape = dice.choice(((), (1,), (64,), (64, 1), (2, 2), (0,), (128,), (64, 4), (4, 64)))
        value = dice.choice((0.0, -1.0, 1.0, 1e-30, 1e30, float("nan"), float("inf")))
        tensors[layer + suffix] = torch.full(shape, value).to(dice.choice(_DTYPES[:5]))
    path = sources.safetensors(tensors, metadata)
    return path.stat().st_size, _loading(path)


# ggml's numbers of a few formats, and some that are none.
_TYPES = (0, 1, 2, 3, 6, 8, 10, 12, 14, 15, 16, 20, 23, 24, 28, 30, 34, 35, 39, 99, 2**31)


def gguf_values(sources: Sources, dice: random.Random) -> tuple[int, Read]:
    """Values, tensors and counts of a GGUF header."""
    values = [
        ("general.architecture", 8, _text("krea2")),
        ("general.alignment", 4, struct.pack("<I", 32)),
        ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 3) + _text("a") * 3),
        ("comfy.gguf.orig_shape.first.weight", 9, struct.pack("<IQii", 5, 2, 64, 64)),
    ]
    tensors = [(n, 0, tuple(reversed(t.shape)), t.float().numpy().tobytes())
               for n, t in sources.transformer.items()]  # fmt: skip
    for _ in range(dice.choice((1, 1, 2, 4))):
        if dice.random() < 0.5:
            place = dice.randrange(len(values))
            key, kind, content = values[place]
            how = dice.randrange(4)
            if how == 0:
                kind = dice.choice((*range(13), 13, 2**31))
            elif how == 1:
                content = dice.randbytes(dice.randrange(40))
            elif how == 2:
                count = dice.choice((0, 1, 2, 9, 1000, 2**40, 2**63))
                inner = dice.choice((0, 4, 5, 6, 8, 9, 12, 77))
                kind, content = 9, struct.pack("<IQ", inner, count) + dice.randbytes(32)
            else:
                key = dice.choice(("general.alignment", "comfy.gguf.orig_shape.last.linear.weight",
                                   "x" * 100, "general.alignment"))  # fmt: skip
            values[place] = (key, kind, content)
        else:
            place = dice.randrange(len(tensors))
            name, kind, sides, data = tensors[place]
            how = dice.randrange(4)
            if how == 0:
                kind = dice.choice(_TYPES)
            elif how == 1:
                sides = tuple(dice.choice((0, 1, side, side * 2, 2**40, 2**63)) for side in sides)
            elif how == 2:
                sides = sides[: dice.randrange(3)] + (1,) * dice.randrange(9)
            else:
                name = dice.choice((tensors[0][0], "", "\x00", "blocks.99999.attn.wq.weight"))
            tensors[place] = (name, kind, sides, data)
    path = sources.path(".gguf")
    content = _gguf(values, tensors, dice)
    if dice.random() < 0.1:
        content = content[: dice.randrange(len(content))]
    path.write_bytes(content)
    return len(content), _loading(path)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _gguf(values: list, tensors: list, dice: random.Random) -> bytes:
    counts = [len(tensors), len(values)]
    if dice.random() < 0.1:
        counts[dice.randrange(2)] = dice.choice((0, 1, 2**20, 2**40, 2**63))
    head = b"GGUF" + struct.pack("<IQQ", dice.choice((3, 3, 3, 3, 2, 1, 3 << 24)), *counts)
    for key, kind, content in values:
        head += _text(key) + struct.pack("<I", kind) + content
    data = b""
    for name, kind, sides, content in tensors:
        data += b"\0" * (-len(data) % 32)
        offset = len(data) if dice.random() < 0.999 else dice.choice((1, 2**40, 2**63))
        head += _text(name) + struct.pack("<I", len(sides))
        head += struct.pack(f"<{len(sides)}Q", *sides) + struct.pack("<IQ", kind, offset)
        data += content
    return head + b"\0" * (-len(head) % 32) + data


_INDEX = {
    "_class_name": "Krea2Pipeline", "is_distilled": True,
    "text_encoder_select_layers": [2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35],
}  # fmt: skip
_CONFIGS = {
    "transformer": {"norm_eps": 1e-5, "rope_theta": 1000.0, "axes_dims_rope": [8, 12, 12]},
    "text_encoder": {
        "text_config": {
            "rms_norm_eps": 1e-6,
            "rope_theta": 5e6,
            "rope_parameters": {"rope_theta": 5e6, "mrope_section": [6, 5, 5]},
            "rope_scaling": {"mrope_section": [6, 5, 5]},
        },
        "vision_config": {"num_heads": 4, "deepstack_visual_indexes": [0]},
    },
    "vae": {"z_dim": 16, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16},
}
_LOADERS = {
    "transformer": load_transformer, "text_encoder": _load_encoder, "vae": load_vae,
}  # fmt: skip


def folder_json(sources: Sources, dice: random.Random) -> tuple[int, Read]:
    """Configurations, indexes of shards and the index of a diffusers folder."""
    root = sources.pipeline
    part = dice.choice(list(_CONFIGS))
    index, config = dict(_INDEX), _CONFIGS[part]
    shards = {"weight_map": {"first.weight": "model.safetensors"}}
    files = {"index": root / "model_index.json", "config": root / part / "config.json"}
    shard_index = root / part / "model.safetensors.index.json"
    shard_index.unlink(missing_ok=True)
    which = dice.choice(("index", "config", "config", "shards"))
    texts = {"index": dumps(index), "config": dumps(config)}
    if which == "shards":
        shard_index.write_text(dumps(mutate(shards, dice)), encoding="utf-8")
    else:
        texts[which] = dumps(mutate(index if which == "index" else config, dice))
    for name, path in files.items():
        path.write_bytes(texts[name].encode("utf-8", "surrogatepass"))
    size = (root / part / "model.safetensors").stat().st_size
    load = _LOADERS[part]

    def read() -> int:
        loaded = _size_of(load(root))
        describe(root)
        return loaded

    return size + sum(len(text) for text in texts.values()), read


_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"),
          ("lora_A.style.weight", "lora_B.style.weight"))  # fmt: skip
_PREFIXES = (
    "diffusion_model.",
    "transformer.",
    "base_model.model.",
    "_orig_mod.",
    "lora_unet_",
    "",
)
_PARTS = ("alpha", "dora_scale", "lora_magnitude_vector", "lokr_w1", "lokr_w2", "lokr_w1_a",
          "lokr_w1_b", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "oft_blocks", "rescale",
          "a1.weight", "a2.weight", "b1.weight", "b2.weight", "diff", "diff_b", "set_weight",
          "lora_mid.weight", "reshape_weight", "lora_A.weight_scale")  # fmt: skip
_SETTINGS = {
    "transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": False,
    "transformer.rank_pattern": {"to_q": 4}, "transformer.alpha_pattern": {"attn.to_q": 2},
}  # fmt: skip


def lora_tensors(sources: Sources, dice: random.Random) -> tuple[int, Read]:
    """Tensors, names and settings of a LoRA, merged into a model and taken out again."""
    tensors: dict[str, torch.Tensor] = {}
    layers = [n.removesuffix(".weight") for n, s in sources.shapes.items() if len(s) == 2]
    for layer in dice.sample(layers, 3):
        rows, columns = sources.shapes[f"{layer}.weight"]
        name = dice.choice(_PREFIXES)
        name += layer.replace(".", "_") if name == "lora_unet_" else layer
        down, up = dice.choice(_PAIRS)
        tensors[f"{name}.{down}"] = 0.1 * torch.ones(4, columns)
        tensors[f"{name}.{up}"] = 0.1 * torch.ones(rows, 4)
        for _ in range(dice.choice((0, 1, 1, 3))):
            sides = (rows, columns, 4, 1, 8, rows // 8, columns // 8)
            shape = [dice.choice(sides) for _ in range(dice.choice((0, 1, 2, 2, 2, 3, 4)))]
            value = dice.choice((0.0, 0.1, 1.0, float("nan"), float("inf"), 1e30, 1e38))
            if torch.Size(shape).numel() < 2**20:
                tensors[f"{name}.{dice.choice(_PARTS)}"] = torch.full(shape, value)
    for _ in range(dice.choice((0, 1, 1, 3))):
        name = dice.choice(list(tensors))
        tensor = tensors.pop(name)
        how = dice.randrange(5)
        if how == 0:
            continue
        if how == 1:
            tensor = _reshaped(tensor, dice)
        elif how == 2:
            tensor = tensor.to(dice.choice(_DTYPES))
        elif how == 3:
            tensor = tensor.float() * dice.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
        else:
            name = dice.choice(_PREFIXES) + name
        tensors[name] = tensor
    metadata = {}
    if dice.random() < 0.4:
        text = dumps(mutate(_SETTINGS, dice))
        metadata = {"lora_adapter_metadata": text.encode("ascii", "replace").decode()}
    path = sources.safetensors(tensors, metadata)
    before = {n: w.data for n, w in sources.model.named_parameters()}
    strength = dice.choice((1.0, 0.5, -2.0, 0.0, 1e30))

    def read() -> int:
        stack = LoraStack(sources.model)
        try:
            found, found_metadata = read_lora_file(path)
            updates, _, report = read_lora(found, sources.shapes, path.name, None, found_metadata)
            str(report)
            stack.add((updates, strength))
            finite = all(bool(w.isfinite().all()) for w in sources.model.parameters())
            assert finite, "a weight is not finite"
            stack.clear()
        finally:
            same = all(w.data is before[n] or torch.equal(w, before[n])
                       for n, w in sources.model.named_parameters())  # fmt: skip
            assert same, "the weights are not what they were"
        return 4 * sum(weight.nbytes for weight in before.values())

    return path.stat().st_size, read


def damaged(sources: Sources, dice: random.Random) -> tuple[int, Read]:
    """Bytes changed, taken out and doubled, anywhere in a file's first part."""
    path = sources.safetensors(dice.choice((sources.transformer, sources.quantised)))
    if dice.random() < 0.3:
        tensors = [(n, 0, tuple(reversed(t.shape)), t.float().numpy().tobytes())
                   for n, t in sources.transformer.items()]  # fmt: skip
        path.write_bytes(_gguf([("general.architecture", 8, _text("krea2"))], tensors, dice))
    content = bytearray(path.read_bytes())
    if dice.random() < 0.2:
        # Numbers of tensors: whatever they are, they are some.
        for place in (dice.randrange(len(content) // 2, len(content)) for _ in range(20)):
            content[place] = dice.randrange(256)
    else:
        _damage(content, dice)
    path.write_bytes(content)
    return len(content), _loading(path)


def _damage(content: bytearray, dice: random.Random) -> None:
    for _ in range(dice.choice((1, 1, 3, 20))):
        # What was cut off leaves less to change, and in the end nothing.
        place = dice.randrange(min(6000, len(content)) or 1)
        how = dice.randrange(10)
        if how == 0:
            del content[dice.randrange(len(content) + 1) :]
        elif how < 3:
            del content[place : place + dice.randrange(1, 9)]
        elif how < 5:
            content[place:place] = content[place : place + dice.randrange(1, 9)]
        elif content:
            content[place] = dice.randrange(256)


CASES: dict[str, Callable[[Sources, random.Random], tuple[int, Read]]] = {
    "safetensors headers": header,
    "tensor descriptors": descriptor,
    "quantisation settings": quantisation,
    "GGUF values": gguf_values,
    "JSON of folders": folder_json,
    "LoRA tensors": lora_tensors,
    "damaged bytes": damaged,
}
