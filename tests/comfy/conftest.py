"""A real ComfyUI in this process, on the CPU, with the pack and small checkpoints.

Needs ComfyUI on PYTHONPATH and the repository root off it (see scripts/test.sh).
"""

import asyncio
import atexit
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BASE = Path(tempfile.mkdtemp(prefix="krea2-comfy-"))
atexit.register(shutil.rmtree, BASE, ignore_errors=True)
sys.path += [str(ROOT / "tests"), str(ROOT / "scripts")]

for folder in ("models", "custom_nodes", "user", "output", "input", "temp"):
    (BASE / folder).mkdir()
sys.argv = ["main.py", "--cpu", "--base-directory", str(BASE), "--disable-api-nodes"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import folder_paths  # noqa: E402

import nodes  # noqa: E402 - ComfyUI's; imported before anything can shadow it

PACK = "krea2_kit"


def load_pack():
    """Import the pack as ComfyUI does: a package under a name of its own."""
    spec = importlib.util.spec_from_file_location(
        PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
    return module


# main.py is what sets this from the flag.
folder_paths.set_output_directory(str(BASE / "output"))
extension = asyncio.run(load_pack().comfy_entrypoint())
NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


@pytest.fixture(scope="session")
def base():
    return BASE


@pytest.fixture(scope="session")
def models():
    """ComfyUI's models folder with small float32 checkpoints, Raw and Turbo."""
    import tiny_checkpoints

    tiny_checkpoints.write_models(BASE / "models", dtype=torch.float32)
    return BASE / "models"


@pytest.fixture(autouse=True)
def _inference_mode():
    """ComfyUI executes nodes in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def run():
    """Call one of our nodes, or one of core's, as the executor would: `run("K2Sampler", ...)`."""

    def call(node_id, **inputs):
        if node_id in NODES:
            return NODES[node_id].execute(**inputs).result
        node = nodes.NODE_CLASS_MAPPINGS.get(node_id) or core_node(node_id)
        if hasattr(node, "define_schema"):
            return node.execute(**inputs).result
        return getattr(node(), node.FUNCTION)(**inputs)

    return call


def core_node(node_id):
    """A node of comfy_extras, which only a starting server imports."""
    import comfy_extras.nodes_custom_sampler as custom
    import comfy_extras.nodes_model_merging as merging
    import comfy_extras.nodes_torch_compile as compiling

    for module in (custom, merging, compiling):
        if node_id in getattr(module, "NODE_CLASS_MAPPINGS", {}):
            return module.NODE_CLASS_MAPPINGS[node_id]
        if hasattr(module, node_id):
            return getattr(module, node_id)
    raise KeyError(node_id)


@pytest.fixture(scope="session")
def pack():
    """The pack's modules by path: `pack("nodes.managed.model")`."""
    return lambda name: importlib.import_module(f"{PACK}.{name}")


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
    """The transformer's answer to a fixed input, in float32: `velocity(patcher)`."""
    import comfy.model_management

    def call(patcher, **load):
        comfy.model_management.load_models_gpu([patcher], force_full_load=not load, **load)
        x = torch.randn(1, 16, 1, 8, 12, generator=torch.Generator().manual_seed(0))
        x = x.to(patcher.model.get_dtype_inference())
        context = random_conditioning(6, 1)[0][0].to(x.dtype)
        return patcher.model.diffusion_model(x, torch.tensor([0.6]), context).float()

    return call
