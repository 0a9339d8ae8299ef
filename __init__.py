"""Krea 2 Kit: Krea 2 for ComfyUI, with an implementation of its own that also runs without it."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI, which imports this folder as a package."""
    from .nodes import Krea2Extension

    return Krea2Extension()
