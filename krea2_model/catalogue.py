"""Files of the released Krea 2 to download: names, folders of ComfyUI, sizes and addresses.

The tables of README.md and docs/models.md are these; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_COMFY = "https://huggingface.co/Comfy-Org/Krea-2/resolve/main"

TURBO, RAW = "turbo", "raw"
# Sizes of graphics cards in GB that have a row of their own, the largest first.
CARDS = (24, 16, 12, 8)


@dataclass(frozen=True)
class ModelFile:
    """A file, or a page with several to choose from.

    name: of the file, or what to look for on the page. folder: in ComfyUI's models folder.
    pattern: of the names of files that a page offers; empty where this is one file.
    size: in GB as the tables give it.
    cards: the sizes of cards that it is for, the best choice for a card first in the table.
    """

    name: str
    folder: str
    size: str
    url: str
    cards: tuple[int, ...]
    variant: str | None = None
    note: str = ""
    pattern: str = ""

    @property
    def is_page(self) -> bool:
        return bool(self.pattern)


TRANSFORMERS = (
    ModelFile(
        "GGUF Q5_K or Q6_K", "diffusion_models", "8.9 to 10.6 GB",
        "https://huggingface.co/Abiray/Krea-2-Turbo-GGUF", (12,), TURBO, pattern="*[Kk]rea*2*.gguf",
    ),
    ModelFile(
        "GGUF Q3_K or Q4_K", "diffusion_models", "6.0 to 7.5 GB",
        "https://huggingface.co/Abiray/Krea-2-Turbo-GGUF", (8,), TURBO, pattern="*[Kk]rea*2*.gguf",
    ),
    *(
        ModelFile(
            f"krea2_{variant}_fp8_scaled.safetensors", "diffusion_models", "13.1 GB",
            f"{_COMFY}/diffusion_models/krea2_{variant}_fp8_scaled.safetensors", (24, 16, 12),
            variant,
        )
        for variant in (TURBO, RAW)
    ),
    *(
        ModelFile(
            f"krea2_{variant}_bf16.safetensors", "diffusion_models", "26.3 GB",
            f"{_COMFY}/diffusion_models/krea2_{variant}_bf16.safetensors", (24,), variant,
        )
        for variant in (TURBO, RAW)
    ),
    ModelFile(
        "int8_convrot", "diffusion_models", "13.2 GB",
        "https://huggingface.co/ahmed22xa/Krea2-INT8-ConvRot-Native", (16,),
        pattern="*int8_convrot*.safetensors",
    ),
    ModelFile(
        "krea2_turbo_nvfp4.safetensors", "diffusion_models", "7.7 GB",
        f"{_COMFY}/diffusion_models/krea2_turbo_nvfp4.safetensors", (8,), TURBO,
        "for RTX 50, in ComfyUI only",
    ),
)  # fmt: skip
TEXT_ENCODERS = (
    ModelFile(
        "qwen3vl_4b_bf16.safetensors", "text_encoders", "8.9 GB",
        f"{_COMFY}/text_encoders/qwen3vl_4b_bf16.safetensors", (24,),
    ),
    ModelFile(
        "qwen3vl_4b_fp8_scaled.safetensors", "text_encoders", "about 5.2 GB",
        f"{_COMFY}/text_encoders/qwen3vl_4b_fp8_scaled.safetensors", (16, 12, 8),
    ),
)  # fmt: skip
VAES = (
    ModelFile(
        "qwen_image_vae.safetensors", "vae", "254 MB", f"{_COMFY}/vae/qwen_image_vae.safetensors",
        CARDS,
    ),
)  # fmt: skip
PARTS = {"transformer": TRANSFORMERS, "text_encoder": TEXT_ENCODERS, "vae": VAES}
FILES = (*TRANSFORMERS, *TEXT_ENCODERS, *VAES)


def card_for(gigabytes: float) -> int:
    """The row of the tables for so much memory; a card of 24 GB has a little less to give."""
    return next((card for card in CARDS if gigabytes >= 0.9 * card), CARDS[-1])


def files_for(card: int, variant: str) -> dict[str, list[ModelFile]]:
    """Files for a card by the option that names them, the first choice first."""
    transformers = [f for f in TRANSFORMERS if card in f.cards and f.variant in (variant, None)]
    if not transformers:  # of Raw on a small card: what is offloaded
        transformers = [f for f in TRANSFORMERS if f.variant == variant][:1]
    return {
        "transformer": transformers,
        "text_encoder": [f for f in TEXT_ENCODERS if card in f.cards],
        "vae": list(VAES),
    }


def files_in(models: Path, part: str, variant: str) -> list[Path]:
    """Files of a part that are in ComfyUI's models folder, by the names of these tables."""
    found: list[Path] = []
    for file in PARTS[part]:
        if file.variant in (variant, None) and (models / file.folder).is_dir():
            found += sorted((models / file.folder).glob(file.pattern or file.name))
    return list(dict.fromkeys(found))
