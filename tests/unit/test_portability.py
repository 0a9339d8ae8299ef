"""Every kind of device: nothing in the pack that only CUDA has. ruff knows what only Linux has."""

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_checkpoints
from krea2_model.nn.attention import rope_table
from krea2_model.text.encoder import Qwen3VLTextEncoder
from krea2_model.transformer.model import Krea2Transformer
from krea2_model.vae.model import QwenImageVAE

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("nodes/**/*.py"))

# ComfyUI's device functions choose; these name one.
DEVICE_CALLS = {"cuda", "xpu", "mps", "autocast", "empty_cache", "current_device", "set_device"}
DEVICES = {"cuda", "xpu", "mps", "hip", "npu", "mlu", "directml", "privateuseone"}


def calls(tree):
    """Each call with the last part of what is called: `path.open(...)` is "open"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            yield (
                node,
                function.attr
                if isinstance(function, ast.Attribute)
                else getattr(function, "id", ""),
            )


def device_faults(tree):
    """Lines that choose a device instead of asking ComfyUI for it, or want what not all have."""
    for call, name in calls(tree):
        if name in DEVICE_CALLS:
            yield call.lineno, f"calls {name}"
        chosen = [k.value for k in call.keywords if k.arg == "device"]
        for argument in (*chosen, *(call.args if name in ("to", "device") else ())):
            value = argument.value if isinstance(argument, ast.Constant) else None
            if str(value).partition(":")[0] in DEVICES:
                yield call.lineno, f"chooses {value!r}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("float64", "double", "complex128"):
            yield node.lineno, node.attr


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_chooses_a_device(source):
    assert not list(device_faults(ast.parse((ROOT / source).read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "line",
    ["x.{cuda}()", "x.to('{cuda}')", "torch.zeros(2, device='{cuda}:1')", "torch.device('mps')",
     "torch.{cuda}.empty_cache()", "torch.{autocast}('{cuda}')", "x.double()",
     "x.to(torch.float64)"],
)  # fmt: skip
def test_the_walk_finds_devices_and_doubles(line):
    """Filled in here, since linters of node packs search tests for the calls too."""
    assert list(device_faults(ast.parse(line.format(cuda="cuda", autocast="autocast"))))


class NoDoubles(TorchDispatchMode):
    """A device like Apple's, played by meta: no float64 and no complex numbers on it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                wide = (torch.float64, torch.complex64, torch.complex128)
                assert tensor.dtype not in wide, f"{function} gives {tensor.dtype} on the device"
        return result


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr("krea2_model.nn.kernels._has_complex_numbers", lambda device: False)
    with NoDoubles(), torch.inference_mode():
        yield torch.device("meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformer_without_float64(device, dtype):
    config = tiny_checkpoints.TRANSFORMER
    model = Krea2Transformer(config, device=device, dtype=dtype)
    taps = torch.empty(
        2, 7, config.num_text_layers, config.text_hidden_dim, device=device, dtype=dtype
    )
    latents = torch.empty(2, 16, 8, 12, device=device, dtype=dtype)
    time = torch.empty(2, device=device)
    velocity = model(latents, time, model.fuse_text(taps), references=[latents])
    assert velocity.shape == latents.shape


def test_text_encoder_without_float64(device):
    config = tiny_checkpoints.TEXT_ENCODER
    encoder = Qwen3VLTextEncoder(config, device=device)
    taps = encoder(torch.zeros(1, 9, dtype=torch.long, device=device))
    assert taps.shape == (1, 9, len(config.tap_layers), config.hidden_size)


def test_vae_without_float64(device):
    vae = QwenImageVAE(tiny_checkpoints.VAE, device=device)
    latents = vae.encode(torch.empty(1, 3, 64, 96, device=device))
    assert latents.shape == (1, 16, 8, 12)
    assert vae.decode(latents).shape == (1, 3, 64, 96)


def test_the_stand_in_device_refuses_float64():
    positions = torch.zeros(1, 3, 3, device="meta")
    with NoDoubles():
        rope_table(torch.zeros(1, 3, 3), (8, 12, 12), 1e3).to("meta")
        with pytest.raises(AssertionError, match="float64 on the device"):
            positions.double()


def test_python_files_can_be_read_in_windows_encoding():
    """Tools that open a file without naming an encoding get cp1252 there."""
    files = [
        path
        for folder in ("krea2_model", "nodes", "scripts", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 100
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            bad = [c for c in line if not _is_cp1252(c)]
            assert not bad, f"{path.relative_to(ROOT)}:{number}: write {bad[0]!a} as an escape"


def _is_cp1252(character: str) -> bool:
    try:
        character.encode("cp1252")
    except UnicodeEncodeError:
        return False
    return True
