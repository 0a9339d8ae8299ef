"""A real ComfyUI in this process, on the CPU, with the pack and small checkpoints.

Needs ComfyUI on PYTHONPATH and the repository root off it (see scripts/test.sh). On a GPU, without
--cpu: KREA2_COMFY_FLAGS="--force-fp32 ..." (see scripts/gpu_tests.sh).
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BASE = Path(tempfile.mkdtemp(prefix="krea2-comfy-"))
atexit.register(shutil.rmtree, BASE, ignore_errors=True)
sys.path += [str(ROOT / "tests" / "support"), str(ROOT / "scripts")]

import in_process  # noqa: E402
import longest_first  # noqa: E402

in_process.start(BASE, *os.environ.get("KREA2_COMFY_FLAGS", "--cpu").split())
COMFYUI = Path(sys.modules["folder_paths"].__file__).parent


def pytest_collection_modifyitems(items):
    longest_first.sort(items, longest_first.COMFY)


@pytest.fixture(scope="session")
def base():
    return BASE


@pytest.fixture(scope="session")
def models():
    """ComfyUI's models folder with small float32 checkpoints, Raw and Turbo."""
    import tiny_checkpoints

    tiny_checkpoints.write_models(BASE / "models", dtype=torch.float32)
    return BASE / "models"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server of its own, with the pack as installed from the registry."""
    from archive import copy_archive
    from headless import ComfyServer

    packs = {"comfyui-krea2-kit": copy_archive(tmp_path_factory.mktemp("archive"))}
    base = tmp_path_factory.mktemp("server")
    with ComfyServer(COMFYUI, base, packs=packs, extra_args=["--cpu"]) as running:
        yield running


@pytest.fixture(autouse=True)
def _inference_mode():
    """ComfyUI executes nodes in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def run():
    """Call one of our nodes, or one of core's, as the executor would: `run("K2Sampler", ...)`."""
    return in_process.run_node


@pytest.fixture(scope="session")
def pack():
    """The pack's modules by path: `pack("nodes.managed.model")`."""
    return in_process.pack_module


@pytest.fixture
def turbo(models, run):
    return run("K2ModelLoader", file="krea2_tiny_turbo.safetensors")[0]


@pytest.fixture
def raw(models, run):
    return run("K2ModelLoader", file="krea2_tiny_raw.safetensors")[0]


@pytest.fixture
def core_turbo(models, run):
    return run("UNETLoader", unet_name="krea2_tiny_turbo.safetensors", weight_dtype="default")[0]


@pytest.fixture
def core_raw(models, run):
    return run("UNETLoader", unet_name="krea2_tiny_raw.safetensors", weight_dtype="default")[0]


@pytest.fixture(scope="session")
def core_tokenizer():
    """Core's own tokenizer, which takes a second to make."""
    import comfy.text_encoders.krea2

    return comfy.text_encoders.krea2.Krea2Tokenizer()


@pytest.fixture
def core_clip(models, core_tokenizer, monkeypatch):
    """Core's own encoder. It hard-codes the sizes of the released model, so those are swapped."""
    import dataclasses

    import comfy.text_encoders.krea2
    import comfy.text_encoders.qwen3vl as core_qwen
    from safetensors.torch import load_file

    import tiny_checkpoints

    config = tiny_checkpoints.TEXT_ENCODER

    @dataclasses.dataclass
    class Small(core_qwen.Qwen3VL_4BConfig):
        hidden_size: int = config.hidden_size
        intermediate_size: int = config.intermediate_size
        num_attention_heads: int = config.num_attention_heads
        num_key_value_heads: int = config.num_key_value_heads
        head_dim = config.head_dim
        rope_dims = (8, 6, 6)

    monkeypatch.setitem(core_qwen.QWEN3VL_CONFIGS, "qwen3vl_4b", Small)
    tower = dataclasses.asdict(tiny_checkpoints.VISION)
    monkeypatch.setitem(core_qwen.QWEN3VL_VISION, "qwen3vl_4b", tower)
    monkeypatch.setattr(core_qwen, "QWEN3VL_VISION_COMMON", {})
    state = load_file(models / "text_encoders" / "qwen3vl_tiny.safetensors")
    target = comfy.supported_models_base.ClipTarget(
        lambda **_: core_tokenizer, comfy.text_encoders.krea2.te()
    )
    return comfy.sd.CLIP(
        target, state_dict=[state], parameters=1, model_options={"dtype": torch.float32}
    )


def random_conditioning(tokens, seed, batch=1, **extra):
    """Conditioning in core's format: (B, L, 12 * width)."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(batch, tokens, 12 * 160, generator=generator), extra]]


@pytest.fixture(scope="session")
def conditioning():
    return random_conditioning


@pytest.fixture
def latent():
    return {"samples": torch.zeros(1, 16, 1, 16, 24)}


@pytest.fixture
def calls_of(monkeypatch):
    """The lengths, or else measures, of what a module is called with, from here on.

    Recorded in its class, since a `forward` of its own would make it somebody else's.
    """

    def record(module, measure=len):
        cls, calls = type(module), []
        forward = cls.forward

        def recorded(self, first, *args, **kwargs):
            if self is module:
                calls.append(measure(first))
            return forward(self, first, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", recorded)
        return calls

    return record


@pytest.fixture
def dynamic_patcher(monkeypatch):
    """NVIDIA's default patcher around a model, on the CPU, with stand-ins for pinned memory."""
    import comfy.model_management
    import comfy.model_patcher

    class HostBuffer:
        def __init__(self, *sizes):
            pass

    dynamic = comfy.model_patcher.ModelPatcherDynamic
    monkeypatch.setattr(dynamic, "__new__", lambda cls, *args, **kwargs: object.__new__(cls))
    monkeypatch.setattr(comfy.model_patcher.comfy_aimdo.host_buffer, "HostBuffer", HostBuffer)
    monkeypatch.setattr(dynamic, "partially_unload_ram", lambda *args, **kwargs: 0)
    monkeypatch.setattr(comfy.model_management, "pinned_hostbuf_size", lambda size: size)
    cpu = torch.device("cpu")
    return lambda model: dynamic(model, cpu, cpu)


@pytest.fixture
def velocity():
    """The transformer's answer to a fixed input, in float32: `velocity(patcher)`.

    as_loaded: leave weights where they are, where otherwise all are loaded first.
    """
    import comfy.model_management

    def call(patcher, as_loaded=False):
        if not as_loaded:
            comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        x = torch.randn(1, 16, 1, 8, 12, generator=torch.Generator().manual_seed(0))
        x = x.to(patcher.load_device, patcher.model.get_dtype_inference())
        context = random_conditioning(6, 1)[0][0].to(x)
        time = torch.tensor([0.6], device=x.device)
        return patcher.model.diffusion_model(x, time, context).float().cpu()

    return call
