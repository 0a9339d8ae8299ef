"""The argument and method names of diffusers' pipelines: translated, or answered with ours."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# The same thing under another name.
ALIASES = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "num_images_per_prompt": "num_images",
    "image": "start_image",
    "mask_image": "inpaint",
    "torch_dtype": "dtype",
}
# Not the same thing: the remedy.
ANSWERS = {
    "strength": "give denoise=, the share of the schedule to run; all steps are taken within it",
    "generator": "give seed=7, or seed=[1, 2] with one seed per image; noise is drawn on the CPU, "
    "so a seed gives the same image on every device. Noise of your own goes to latents",
    "callback_on_step_end": "give callback=function; it is called as function(step, latents, "
    "predicted)",
    "callback_on_step_end_tensor_inputs": "callback gets the latents and those of the predicted "
    "image",
    "return_dict": "the images themselves are returned: pipeline(prompt)[0] is the first",
    "attention_kwargs": "references=, negative_guidance= and prompt_weights= change attention",
    "true_cfg_scale": "give guidance=; 0 is off, and true_cfg_scale - 1 is the same strength",
    "eta": "sampling is deterministic",
    "device_map": 'give device="auto", and offload= for where weights wait',
    "variant": "the files of a folder are taken as they are; name a file with from_files",
    "use_safetensors": "only safetensors and GGUF files are read",
    "low_cpu_mem_usage": "weights are always mapped from the file",
    "quantization_config": "load a quantised file: fp8, int8, nvfp4 or GGUF",
    "custom_pipeline": "only Krea 2 is loaded",
    "trust_remote_code": "no code of a repository is ever run",
    "safety_checker": "there is none",
    "scheduler": "give sigmas=, or steps=",
}
METHODS = {
    "to": "name device and dtype when you load, as in from_pretrained(path, device='cuda', "
    "dtype='bfloat16') or nano(device='cuda')",
    "enable_model_cpu_offload": "load with offload='parts'",
    "enable_sequential_cpu_offload": "load with offload='blocks'",
    "enable_group_offload": "load with offload='blocks'",
    "enable_vae_tiling": "decode() uses tiles by itself where memory runs out",
    "enable_vae_slicing": "decode() takes one image at a time",
    "enable_attention_slicing": "torch's fused attention needs no slices",
    "enable_xformers_memory_efficient_attention": "torch's fused attention is used",
    "set_progress_bar_config": "give progress=True to a call",
    "load_lora_weights": "use load_lora(path, scale)",
    "set_adapters": "use load_loras([(path, scale), ...])",
    "unload_lora_weights": "use unload_lora()",
    "fuse_lora": "LoRAs are merged when they are loaded",
    "save_pretrained": "use save_transformer(pipeline.transformer, path), or krea2 convert",
    "from_single_file": "use from_pretrained, which takes files too, or from_files",
}


def accept_diffusers_names(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function take diffusers' names for its arguments.

    Raises TypeError for an argument that it does not have, with the nearest name or the remedy.
    """
    names = list(inspect.signature(function).parameters)
    takes_others = any(
        p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()
    )

    @functools.wraps(function)
    def translated(*args: P.args, **options: P.kwargs) -> R:
        given: dict[str, Any] = {}
        for name, value in options.items():
            new = name if name in names else ALIASES.get(name, name)
            if new not in names and not (takes_others and name not in ANSWERS):
                raise TypeError(_answer(function.__name__, name, names))
            if new in given or new in names[: len(args)]:
                raise TypeError(f"{name} and {new} are one argument; give {new} alone.")
            given[new] = value
        return function(*args, **given)  # type: ignore[arg-type]

    return translated


def _answer(function: str, name: str, names: list[str]) -> str:
    caller = "Krea2Pipeline" if function == "__call__" else function
    if name in ANSWERS:
        return f"{caller} has no argument {name}: {ANSWERS[name]}."
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(names[1:])}."
    return f"{caller} has no argument {name}; {hint}"


class AnswersDiffusersMethods:
    """Says what to use instead of the methods that diffusers' pipelines have."""

    def __getattr__(self, name: str) -> Any:
        kind = type(self).__name__
        if name in METHODS:
            raise AttributeError(f"{kind} has no method {name}: {METHODS[name]}.")
        near = [] if name.startswith("_") else difflib.get_close_matches(name, dir(type(self)), 1)
        raise AttributeError(
            f"{kind} has no attribute {name}{f'; did you mean {near[0]}?' if near else '.'}"
        )
