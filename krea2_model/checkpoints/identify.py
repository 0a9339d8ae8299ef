"""The kind of a file, from its first bytes and the names of its tensors.

Loaders refuse a wrong file by it, and lists of files leave it out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from .transformer_keys import DIFFUSERS_MARKER, OFFICIAL_MARKER

TRANSFORMER = "a Krea 2 transformer"
TEXT_ENCODER = "a Qwen3-VL text encoder"
VAE = "a Qwen-Image VAE"
LORA = "a LoRA"
CONTROL_LORA = "a control LoRA"

# Examples of the right file, for error messages.
WHERE = {
    TRANSFORMER: "krea2_turbo_bf16.safetensors (models/diffusion_models)",
    TEXT_ENCODER: "qwen3vl_4b_bf16.safetensors (models/text_encoders)",
    VAE: "qwen_image_vae.safetensors (models/vae)",
}

# The longest header that is parsed, many times any model's: 90 MB take seconds and 2 GB.
_MAX_HEADER = 25_000_000

_LONGEST_MESSAGE = 1500


class CheckpointError(ValueError):
    """A file is not of the expected kind or damaged; the message names the remedy.

    Names from files may be of any length and hold anything: a long message loses its middle, and
    characters that cannot be printed are escaped.
    """

    def __init__(self, message: str):
        text = message.encode("utf-8", "backslashreplace").decode()
        if len(text) > _LONGEST_MESSAGE:
            text = f"{text[: _LONGEST_MESSAGE - 300]} ... {text[-250:]}"
        super().__init__(text)


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such file or folder."""


class Header(NamedTuple):
    """The header of a safetensors file: dtype name and shape a tensor, and free metadata."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in self.tensors.items()}


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file, without its tensors.

    Raises CheckpointError for a file of another format, a truncated one or one whose header is
    broken, and CheckpointNotFoundError where there is none.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointNotFoundError(f"{path} is a folder; expected a .safetensors file in it.")
    if not path.is_file():
        raise CheckpointNotFoundError(f"There is no file {path}. Check the name and the folder.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
    # A length may begin with any byte, those of other formats too, but JSON follows it.
    if start[8:] != b"{" and (foreign := _foreign_format(start)):
        raise CheckpointError(
            f"{path.name} is {foreign}; expected a safetensors file. "
            "Download or export the model as .safetensors."
        )
    if start[8:] != b"{" or length > _MAX_HEADER or 8 + length > size:
        raise CheckpointError(
            f"{path.name} is not a whole safetensors file ({size:,} bytes, header length "
            f"{length:,}): it is truncated or of another format. Download it again."
        )
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
            return Header(tensors, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} is incomplete or damaged: its {size:,} bytes do not fit its header "
            f"({error}). Download it again."
        ) from error


def _foreign_format(start: bytes) -> str | None:
    if start[:4] == b"GGUF":
        return "a GGUF file"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "a PyTorch pickle, which can run code when loaded and is refused"
    if start[:7] == b"version":
        return "a Git LFS pointer instead of the file itself (run `git lfs pull`)"
    if start.lstrip()[:1] == b"<":
        return "a web page (the download needs a login or a licence to be accepted)"
    if not start:
        return "empty"
    return None


def identify(names: Iterable[str]) -> str:
    """The kind of a file with tensors of these names, as a noun phrase."""
    names = list(names)
    kinds = [kind for kind, matches in _KINDS if matches(names)]
    if not names:
        return "a file without tensors"
    return " with ".join(kinds[:3]) if kinds else "a file of unknown kind"


def _ends(*endings: str):
    return lambda names: any(name.endswith(endings) for name in names)


def _has(*parts: str):
    return lambda names: any(part in name for name in names for part in parts)


def _all(*tests):
    return lambda names: all(test(names) for test in tests)


def _any(*tests):
    return lambda names: any(test(names) for test in tests)


def _not(test):
    return lambda names: not test(names)


_is_adapter = _any(
    _has(".lora_", ".lora.", "lora_unet_", "lora_transformer_", ".lokr_", ".hada_", "lycoris_"),
    _ends(".dora_scale", ".diff", ".diff_b", ".set_weight"),
)
# Beside a LoRA the whole input layer, which a plain one leaves alone.
_is_control_lora = _any(
    _all(_ends("blocks.0.attn.wq.A"), _ends("blocks.0.attn.wq.B")),
    _all(
        _is_adapter,
        _ends("first.weight", "img_in.weight"),
        _not(_ends(OFFICIAL_MARKER, DIFFUSERS_MARKER)),
    ),
)
_is_wan_2_2_vae = _has("decoder.upsamples.0.upsamples.")
_is_wan_vae = _all(_has("decoder.middle.0.residual."), _not(_is_wan_2_2_vae))
_is_language = _ends("embed_tokens.weight", "layers.0.input_layernorm.weight")
_has_qk_norm = _ends("layers.0.self_attn.q_norm.weight")

_KINDS = (
    (CONTROL_LORA, _is_control_lora),
    (LORA, _all(_is_adapter, _not(_is_control_lora))),
    (TRANSFORMER, _all(_ends(OFFICIAL_MARKER, DIFFUSERS_MARKER), _not(_is_adapter))),
    (TEXT_ENCODER, _all(_is_language, _has_qk_norm)),
    ("a Qwen2.5-VL or Llama text encoder (no q/k norm)", _all(_is_language, _not(_has_qk_norm))),
    ("a T5 text encoder", _ends("encoder.block.0.layer.0.SelfAttention.q.weight")),
    ("a CLIP text encoder", _has("text_model.encoder.layers.0.")),
    (VAE, _is_wan_vae),
    ("a Wan 2.2 VAE", _is_wan_2_2_vae),
    (VAE, _has("decoder.mid_block.resnets.0.norm1.gamma")),
    ("a Stable Diffusion or Flux VAE", _has("decoder.up.0.block.0.", "decoder.conv_norm_out.")),
    ("a Flux transformer", _all(_has("double_blocks.0."), _not(_is_adapter))),
    ("a Stable Diffusion 3 transformer", _has("joint_blocks.0.")),
    ("a Stable Diffusion UNet", _has("input_blocks.0.0.", "down_blocks.0.resnets.0.")),
    ("a Qwen-Image transformer", _has("transformer_blocks.0.attn.add_q_proj")),
    ("a Wan or Z-Image transformer", _has("blocks.0.cross_attn.", "noise_refiner.0.")),
)  # fmt: skip
