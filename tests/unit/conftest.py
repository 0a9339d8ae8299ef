"""The real Qwen tokenizer, which no test may do without and which is not copied here."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    root = os.environ.get("COMFYUI_PATH")
    if not root:
        pytest.fail("Set COMFYUI_PATH to a ComfyUI folder: its Qwen tokenizer is needed.")
    folder = Path(root, "comfy", "text_encoders", "qwen25_tokenizer")
    if not (folder / "vocab.json").is_file():
        pytest.fail(f"COMFYUI_PATH is {root}, where {folder} has no Qwen tokenizer.")
    return folder
