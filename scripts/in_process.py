"""ComfyUI with the pack in this process, without its server: for tests and benchmarks.

ComfyUI has to be on PYTHONPATH and the repository root off sys.path, since both have a `nodes`.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = "krea2_kit"
FOLDERS = ("models", "custom_nodes", "user", "output", "input", "temp")

# The pack's node classes by id, once `start` was called.
NODES: dict = {}


def start(base: Path, *flags: str) -> None:
    """Set ComfyUI up with `base` for its folders and these command line flags (default --cpu).

    Once a process: ComfyUI keeps its settings in modules.
    """
    for folder in FOLDERS:
        (base / folder).mkdir(exist_ok=True)
    arguments, sys.argv = sys.argv, [
        "main.py", *(flags or ("--cpu",)), "--base-directory", str(base), "--disable-api-nodes"
    ]  # fmt: skip
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401 - reads sys.argv, now
    import folder_paths

    import nodes  # noqa: F401 - ComfyUI's; imported before anything can shadow it

    sys.argv = arguments
    # main.py is what sets this from the flag.
    folder_paths.set_output_directory(str(base / "output"))
    # As ComfyUI imports it: a package under a name of its own.
    spec = importlib.util.spec_from_file_location(
        PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = pack
    spec.loader.exec_module(pack)
    extension = asyncio.run(pack.comfy_entrypoint())
    NODES.update({n.GET_SCHEMA().node_id: n for n in asyncio.run(extension.get_node_list())})


def pack_module(name: str):
    """One of the pack's modules by its path: `pack_module("nodes.managed.model")`."""
    return importlib.import_module(f"{PACK}.{name}")


def run_node(node_id: str, **inputs):
    """Call a node of ours or of ComfyUI's as its executor would; its outputs."""
    if node_id in NODES:
        return NODES[node_id].execute(**inputs).result
    import nodes

    node = nodes.NODE_CLASS_MAPPINGS.get(node_id) or _extra_node(node_id)
    if hasattr(node, "define_schema"):
        return node.execute(**inputs).result
    return getattr(node(), node.FUNCTION)(**inputs)


def _extra_node(node_id: str):
    """A node of comfy_extras, which only a starting server imports."""
    import comfy_extras.nodes_custom_sampler as custom
    import comfy_extras.nodes_edit_model as editing
    import comfy_extras.nodes_flux as flux
    import comfy_extras.nodes_model_merging as merging
    import comfy_extras.nodes_torch_compile as compiling

    for module in (custom, editing, flux, merging, compiling):
        if node_id in getattr(module, "NODE_CLASS_MAPPINGS", {}):
            return module.NODE_CLASS_MAPPINGS[node_id]
        if hasattr(module, node_id):
            return getattr(module, node_id)
    raise KeyError(node_id)
