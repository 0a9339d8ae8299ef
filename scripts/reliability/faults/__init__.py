"""A custom node for tests: the next calls of a part of a model run out of memory."""

import torch


class K2TestOutOfMemory:
    CATEGORY = "Krea 2 tests"
    FUNCTION = "arm"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - ComfyUI's name
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "vae": ("VAE",),
                "part": (["transformer", "text encoder", "VAE decoder", "VAE encoder"],),
                "times": ("INT", {"default": 1, "min": 1}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **inputs):  # noqa: N802
        return float("nan")  # Armed anew in each run.

    def arm(self, model, clip, vae, part, times):
        module = {
            "transformer": lambda: model.model.diffusion_model.blocks[1],
            "text encoder": lambda: clip.cond_stage_model.encoder.layers[3],
            "VAE decoder": lambda: vae.first_stage_model.decoder,
            "VAE encoder": lambda: vae.first_stage_model.encoder,
        }[part]()
        left = times

        def fail(*_):
            nonlocal left
            left -= 1
            if left == 0:
                hook.remove()
            raise torch.cuda.OutOfMemoryError("Allocation on device, as a test wants it")

        hook = module.register_forward_pre_hook(fail)
        return model, clip, vae


NODE_CLASS_MAPPINGS = {"K2TestOutOfMemory": K2TestOutOfMemory}
