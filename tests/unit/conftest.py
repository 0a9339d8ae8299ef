"""The real Qwen tokenizer, which no test may do without and which is not copied here."""

import os
from pathlib import Path

import pytest

import longest_first


def pytest_collection_modifyitems(items):
    longest_first.sort(items, longest_first.UNIT)


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    root = os.environ.get("COMFYUI_PATH")
    if not root:
        pytest.fail("Set COMFYUI_PATH to a ComfyUI folder: its Qwen tokenizer is needed.")
    folder = Path(root, "comfy", "text_encoders", "qwen25_tokenizer")
    if not (folder / "vocab.json").is_file():
        pytest.fail(f"COMFYUI_PATH is {root}, where {folder} has no Qwen tokenizer.")
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A models folder with small random checkpoints."""
    import tiny_checkpoints

    folder = tmp_path_factory.mktemp("models")
    tiny_checkpoints.write_models(folder)
    return folder


@pytest.fixture(scope="session")
def turbo(models) -> Path:
    return models / "diffusion_models" / "krea2_tiny_turbo.safetensors"


@pytest.fixture(scope="session")
def tensors():
    """A small transformer's tensors by their names in files."""
    import tiny_checkpoints

    return tiny_checkpoints.transformer_tensors()


@pytest.fixture(scope="session")
def reference_transformer():
    """diffusers' transformer, small and random."""
    from diffusers_reference import diffusers_transformer

    return diffusers_transformer()


@pytest.fixture(scope="session")
def qwen3vl():
    """transformers' Qwen3-VL, small and random."""
    from qwen3vl_reference import qwen3vl

    return qwen3vl()


@pytest.fixture(scope="session")
def diffusers_pipeline(tokenizer_folder):
    """diffusers' own Krea2Pipeline with small random parts, in float32."""
    import torch
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        Krea2Pipeline,
        Krea2Transformer2DModel,
    )
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLModel

    from qwen3vl_writer import TEXT

    torch.manual_seed(0)
    transformer = Krea2Transformer2DModel(
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        timestep_embed_dim=64,
        text_hidden_dim=64,
        text_num_attention_heads=8,
        text_num_key_value_heads=8,
        text_intermediate_size=128,
        axes_dims_rope=(8, 12, 12),
    )
    text_config = TEXT | {"intermediate_size": 128}
    vision_config = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(text_config=text_config, vision_config=vision_config)
    text_encoder = Qwen3VLModel(config).eval()
    vae = AutoencoderKLQwenImage(base_dim=16)
    for part in (transformer, text_encoder, vae):
        for name, parameter in part.named_parameters():
            if "norm" in name or "gamma" in name or "table" in name:
                # Fresh models have these at 0 or 1, which would hide mistakes in them.
                parameter.data += 0.2 * torch.randn_like(parameter)
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=6400,
        ),
        vae=vae.eval(),
        text_encoder=text_encoder,
        tokenizer=AutoTokenizer.from_pretrained(str(tokenizer_folder)),
        transformer=transformer.eval(),
    )


@pytest.fixture(scope="session")
def diffusers_folder(diffusers_pipeline, tmp_path_factory) -> Path:
    """The same pipeline as diffusers saves it, with a sharded transformer."""
    folder = tmp_path_factory.mktemp("diffusers")
    diffusers_pipeline.save_pretrained(folder)
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    diffusers_pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="1MB")
    return folder


@pytest.fixture(scope="session")
def nano_pipelines():
    """krea2-nano by variant, each loaded on first use."""
    return {}


@pytest.fixture
def nano_once(monkeypatch, nano_pipelines):
    """Commands share one loaded krea2-nano a variant."""
    import torch

    from krea2_model import nano
    from krea2_model.pipeline.pipeline import Krea2Pipeline

    load = Krea2Pipeline.from_files

    def load_once(transformer, *files, **options):
        if transformer not in nano_pipelines:
            files = (nano.text_encoder_file(), nano.VAE)
            nano_pipelines[transformer] = load(transformer, *files, dtype=torch.float32)
        nano_pipelines[transformer].unload_lora()
        return nano_pipelines[transformer]

    monkeypatch.setattr(Krea2Pipeline, "from_files", load_once)


@pytest.fixture
def krea2(capsys):
    """Run a command line, quietly: the files it prints, or its error where it ends in `code`."""
    from krea2_model.cli.main import main

    def run(*words, code=0):
        found = main([*map(str, words), "--quiet"])
        out, error = capsys.readouterr()
        assert found == code, error
        return [Path(line) for line in out.splitlines()] if code == 0 else error

    return run
