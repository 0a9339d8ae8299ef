"""The forecast of a training run, against counted runs at full width on tensors without content."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from krea2_model import Krea2Transformer, TransformerConfig
from krea2_model.checkpoints.quantised_layers import QuantisedLinear
from krea2_model.config import VAEConfig
from krea2_model.memory.machine import GB
from krea2_model.nn.kernels import norm_and_rotate
from krea2_model.transformer.backend import Backend
from krea2_model.vae.model import QwenImageVAE
from krea2_training.commands import run_command
from krea2_training.config import KINDS, read_config
from krea2_training.encoded import encoded_bytes, read_encoded
from krea2_training.forecast import (
    RESERVE,
    TEXT_TOKENS,
    Forecast,
    forecast,
    run_memory,
    shortage,
    training_memory,
)
from krea2_training.settings.sections import Adapter, Memory, Steps
from krea2_training.weights.adapters import add_adapters
from krea2_training.weights.base import TrainingBackend, base_state, freeze_base, stored_as
from live_bytes import LiveBytes

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 4


class Flash(TrainingBackend):
    """With the attention of a GPU, which holds no scores; a meta tensor's own would."""

    def attend(self, query, key, value, norm, rope, mask, query_slice=None):
        query, key = norm_and_rotate(query, key, norm, rope, query_slice)
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, False, False)[0].transpose(1, 2).flatten(2)


class FlashAllHeld(Flash):
    run_blocks = Backend.run_blocks


@pytest.mark.parametrize(
    "method, base, side, held, targets",
    [("lora", "bf16", 1024, False, "blocks"), ("lora", "4bit", 512, False, "blocks"),
     ("dora", "fp8", 1024, False, "blocks"), ("lokr", "bf16", 512, False, "blocks"),
     ("lora", "bf16", 512, True, "blocks"), ("lora", "bf16", 512, False, "blocks+text"),
     ("dora", "bf16", 512, False, "blocks+text"), ("lokr", "bf16", 512, False, "blocks+text")],
)  # fmt: skip
def test_the_forecast_bounds_a_counted_step(method, base, side, held, targets):
    config = TransformerConfig(num_layers=LAYERS)
    adapter = Adapter(method=method, targets=targets)
    memory = Memory(base=base, checkpointing=not held)
    told = training_memory(config, adapter=adapter, memory=memory, training=Steps(), side=side)
    model = Krea2Transformer(config, device="meta", dtype=torch.bfloat16)
    freeze_base(model, memory, torch.device("meta"))
    with torch.device("meta"):
        add_adapters(model, adapter)
        latents = torch.empty(1, 16, side // 8, side // 8)
        taps = torch.empty(1, TEXT_TOKENS, 12, config.text_hidden_dim, dtype=torch.bfloat16)
        time = torch.empty(1)
    tensors = [*model.parameters(), *model.buffers()]
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = sum(t.nbytes for t in tensors) - trained
    backend = FlashAllHeld() if held else Flash()
    with LiveBytes("meta") as counted:
        with torch.set_grad_enabled("text" in targets):
            text = model.fuse_text(taps)
        model(latents, time, text, backend=backend).float().square().mean().backward()
    assert trained == told.trained
    assert frozen <= told.frozen * 1.01 and told.frozen < 1.4 * frozen
    peak = counted.peak + frozen + trained
    estimate = told.total - told.optimiser - RESERVE
    assert peak <= estimate < 1.5 * peak, (peak / 1e9, estimate / 1e9)


def test_the_forecast_bounds_a_counted_step_of_full_fine_tuning():
    """With tensors of a CPU without content, since autocast has none for meta; step included."""
    config, side, adapter = TransformerConfig(num_layers=2), 512, Adapter(method="full")
    told = training_memory(config, adapter=adapter, memory=Memory(), training=Steps(), side=side)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Krea2Transformer(config, dtype=torch.float32).requires_grad_(True)
        optimiser = torch.optim.AdamW(model.parameters(), foreach=True)
        latents = torch.empty(1, 16, side // 8, side // 8)
        taps, time = torch.empty(1, TEXT_TOKENS, 12, config.text_hidden_dim), torch.empty(1)
        weights = sum(p.nbytes for p in model.parameters())
        with LiveBytes() as counted:
            with torch.autocast("cpu", torch.bfloat16):
                text = model.fuse_text(taps)
                velocity = model(latents, time, text, backend=Flash()).float()
            velocity.square().mean().backward()
            backward = counted.peak
            optimiser.step()
    assert weights == told.trained
    assert backward <= told.gradients + told.activations
    peak = weights + counted.peak
    estimate = told.total - RESERVE
    assert peak <= 1.001 * estimate < 1.5 * peak, (peak / 1e9, estimate / 1e9)


@pytest.mark.parametrize("side", [512, 1024])
def test_rollouts_hold_the_vae_beside_what_is_trained(side):
    """Its weights, and what it decodes a picture with, at full width."""
    vae = QwenImageVAE(VAEConfig(), device="meta", dtype=torch.bfloat16)
    config = TransformerConfig(num_layers=2)
    options = {"adapter": Adapter(rank=4), "memory": Memory(), "training": Steps(), "side": side}
    alone, told = (training_memory(config, **options, vae=one) for one in (None, vae))
    latents = torch.empty(1, 16, side // 8, side // 8, device="meta")
    with torch.no_grad(), LiveBytes("meta") as counted:
        vae.decode(latents)
    weights = sum(t.nbytes for t in vae.state_dict().values())
    assert told.vae == weights and alone.vae == 0 and "VAE" not in str(alone)
    assert counted.peak <= told.activations < max(1.5 * counted.peak, 1.1 * alone.activations)
    assert told.total >= alone.total + weights
    assert f"VAE         {weights / GB:8.2f} GB" in str(told)


def memory_of(kind, output, **settings):
    """The forecast of a command's run of a narrow model on a GPU."""
    shared = {"model.transformer": "nano", "output.path": output, "memory.dtype": "bf16"}
    config = read_config(None, {**shared, **settings}, KINDS[kind])
    sizes, device = TransformerConfig(num_layers=1), torch.device("cuda")
    return run_memory(config, sizes, side=128, stored_bits=16, device=device)


def test_each_command_is_counted_at_its_largest(tmp_path):
    output, prompts = tmp_path / "x.safetensors", tmp_path / "prompts.jsonl"
    data = {"data.path": tmp_path, "data.resolution": [512, 768]}
    train = memory_of("train", output, **data, **{"training.batch": 2})
    assert train.size == "768 px, batch 2"
    pairs = {"pairs.path": tmp_path, "pairs.resolution": 768}
    prefer = memory_of("prefer", output, **pairs)
    assert prefer.activations == train.activations, "both pictures of a pair at once"
    stages = {"data.path": tmp_path, "stages.resolution": [256, 512], "stages.steps": [1, 1]}
    assert memory_of("pretrain", output, **stages, **{"stages.batch": [64, 2]}).size.startswith(
        "256"
    )
    assert memory_of("pretrain", output, **stages).size.startswith("512")
    prompts.write_text(json.dumps({"prompt": "a", "width": 1536, "height": 1024}))
    scored = {"prompts.path": prompts, "prompts.size": 64, "reward.rewards": ["a:b"]}
    reward = memory_of("reward", output, **scored, **{"reward.groups": 1})
    assert reward.size == "1254 px, batch 1" and reward.vae > 0


def test_a_teacher_is_a_second_frozen_model(tmp_path):
    (prompts := tmp_path / "prompts.txt").write_text("a red circle\n")
    settings = {"prompts.path": prompts, "prompts.size": 512}
    alone = memory_of("distil", tmp_path / "x.safetensors", **settings)
    taught = memory_of("distil", tmp_path / "x.safetensors", **settings, **{"distil.teacher": "x"})
    assert taught.frozen == 2 * alone.frozen and taught.activations == alone.activations


@pytest.mark.parametrize("command", ["train", "slider", "without words"])
def test_what_stays_in_main_memory_is_bounded(tmp_path, command):
    """All that a run has encoded, and no more of it than memory.keep."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, size in (("a", (64, 64)), ("b", (64, 96)), ("a.mask", (64, 64))):
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
    for name, text in (("a", "a red square"), ("b", "a wall\n---\na tall red wall")):
        if command != "without words":
            (folder / f"{name}.txt").write_text(text)
    data = {"data.path": folder, "data.resolution": [64, 96], "data.caption": ""}
    own = {"train": data, "without words": data,
           "slider": {"prompts.path": folder, "prompts.size": 64, "slider.positive": "big",
                      "slider.negative": "small"}}[command]  # fmt: skip
    config = read_config(None, {
        "model.transformer": "nano", "output.path": tmp_path / "x.safetensors", "adapter.rank": 2,
        "training.steps": 1, "memory.device": "cpu", **own
    }, KINDS["slider" if command == "slider" else "train"])  # fmt: skip
    run_command(config, lambda *_: None)
    files = (tmp_path / "x" / "cache").rglob("*.safetensors")
    made = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    state = base_state(config)
    told = encoded_bytes(read_encoded(config, state), config, state.config, 4)
    # Without words all tokens are those of the template, which are known.
    assert made <= told < (8 if command != "without words" else 1.001) * made
    small = replace(config, memory=replace(config.memory, keep=0.0))
    assert "memory.keep" not in forecast(small)


def test_the_forecast_says_what_stays_in_main_memory():
    parts = (0,) * 6
    told = str(Forecast(*parts, size="64 px, batch 1", kept=round(0.5 * GB)))
    assert "up to 0.50 GB of main memory for what steps have read (memory.keep)" in told
    assert "main memory" not in str(Forecast(*parts, size="64 px, batch 1"))


def test_references_are_counted(tmp_path):
    """Each is a picture more in the sequence."""
    folder, output = tmp_path / "edits", tmp_path / "x.safetensors"
    folder.mkdir()
    settings = {"data.path": folder, "data.resolution": [1024]}
    for name in ("cat", "cat.ref1", "dog"):
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
    for name in ("cat", "dog"):
        (folder / f"{name}.txt").write_text(name)
    one = memory_of("train", output, **settings)
    Image.new("RGB", (64, 64)).save(folder / "cat.ref2.png")
    two = memory_of("train", output, **settings)
    for file in folder.glob("*.ref*"):
        file.unlink()
    plain = memory_of("train", output, **settings)
    step = one.activations - plain.activations
    assert step > 0.8 * plain.activations
    assert two.activations - one.activations == pytest.approx(step, rel=1e-3)


@pytest.mark.parametrize("base, bits", [("bf16", 16), ("fp8", 8.01), ("4bit", 4.5)])
def test_a_loaded_model_that_will_not_fit_is_told(tmp_path, monkeypatch, base, bits):
    """By what its blocks are stored in."""
    model, device = Krea2Transformer(TransformerConfig(num_layers=1), device="meta"), "meta"
    for block in model.blocks if base != "bf16" else ():
        for path, layer in list(block.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                parent, _, name = path.rpartition(".")
                stored = stored_as(layer, base)
                block.get_submodule(parent)._modules[name] = QuantisedLinear(
                    stored, None, torch.bfloat16
                )
    settings = {"data.path": tmp_path, "model.transformer": "nano", "memory.dtype": "bf16",
                "output.path": tmp_path / "x.safetensors"}  # fmt: skip
    config = read_config(None, settings)
    model = model.bfloat16() if base == "bf16" else model
    told = run_memory(
        config, model.config, side=1024, stored_bits=bits, device=torch.device("cuda")
    )
    for free, expected in ((told.total - 10**8, True), (told.total + 10**8, False), (None, False)):
        monkeypatch.setattr("krea2_training.forecast.free_device_bytes", lambda _, free=free: free)
        found = shortage(config, model, torch.device(device))
        assert found.startswith(f"The run needs about {told.total / GB:.1f} GB") is expected
        assert bool(found) is expected


def test_the_pages_have_their_tables():
    sys.path.append(str(ROOT / "benchmarks"))
    try:
        from training_memory import ranks_table, tables
    finally:
        sys.path.pop()
    for name, lines in (("training", tables()), ("many_gpus", ranks_table())):
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert "\n".join(lines) in page
