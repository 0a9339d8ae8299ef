"""The demo: a picture from a prompt, by the example workflow in a headless ComfyUI.

`demo.sh` sets everything up and calls this.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

from headless import ROOT, ComfyServer, JobError, OnProgress, ServerError

WORKFLOWS = ROOT / "tests" / "workflows"
NANO = "krea2-nano (built in)"
PROMPT = "a red circle left of a blue square on a yellow background"
MODEL_FOLDERS = {
    "diffusion_models": ("diffusion_models", "unet"),
    "text_encoders": ("text_encoders", "clip"),
    "vae": ("vae",),
    "loras": ("loras",),
    "checkpoints": ("checkpoints",),
    "diffusers": ("diffusers",),
}


def models_config(folder: Path, file: Path) -> Path:
    """Write the extra_model_paths file that adds a folder in the layout of ComfyUI's models."""
    paths = {
        key: "\n".join(str(folder / name) for name in names) for key, names in MODEL_FOLDERS.items()
    }
    # JSON is YAML, with the quoting that any path survives.
    file.write_text(json.dumps({"krea2_kit": paths}, ensure_ascii=False), encoding="utf-8")
    return file


def text_to_image(options: argparse.Namespace, model: str) -> dict:
    """The example workflow with the model and the command line's choices put in."""
    nano = "built in" in model
    name = "krea2_nano_first_image" if nano else "krea2_turbo_text_to_image"
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    nodes = {node["class_type"]: node["inputs"] for node in graph.values()}
    nodes["K2Loader"].update(model=model, text_encoder="auto", vae="auto")
    nodes["K2TextEncode"]["prompt"] = options.prompt
    size = 128 if nano else 1024
    nodes["K2EmptyLatent"].update(
        aspect="custom", width=options.width or size, height=options.height or size
    )
    nodes["K2Sampler"]["seed"] = options.seed
    if options.steps is not None:
        # Preset custom takes guidance from the node; Turbo has none.
        distilled = model == NANO or "turbo" in model.lower()
        guidance = 0.0 if distilled else 3.5 if nano else 4.5
        nodes["K2Sampler"].update(preset="custom", steps=options.steps, guidance=guidance)
    return graph


def pick_model(offered: list[str]) -> str:
    """The first Turbo file, else the first that is not built in."""
    own = [name for name in offered if "built in" not in name]
    if not own:
        raise JobError(
            ["No Krea 2 transformer in diffusion_models, checkpoints or diffusers of --models."]
        )
    return next((name for name in own if "turbo" in name.lower()), own[0])


def next_output() -> Path:
    """The first free number in .local/output."""
    folder = ROOT / ".local" / "output"
    names = (folder / f"krea2_{number}.png" for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def progress_printer(graph: dict) -> OnProgress:
    """Prints a line for each node and each step."""

    def show(node: str, step: int, total: int) -> None:
        name = graph.get(node, {}).get("class_type", node)
        say(f"  {name}: {step} of {total}" if total else f"  {name}")

    return show


def generate(options: argparse.Namespace) -> Path:
    """Make the picture that the command line asks for; its file."""
    started = time.monotonic()
    options.base.mkdir(parents=True, exist_ok=True)
    extra_args = []
    if options.models:
        config = models_config(options.models.resolve(), options.base / "extra_model_paths.yaml")
        extra_args += ["--extra-model-paths-config", str(config.resolve())]
    else:
        say(
            "No weights were named (--models), so the built-in krea2-nano paints. It knows flat "
            'shapes in colours, such as "a small yellow star above a purple ring".'
        )
    if options.cpu:
        extra_args.append("--cpu")
    packs = {"comfyui-krea2-kit": ROOT}
    say("Starting ComfyUI ...")
    with ComfyServer(options.comfyui, options.base, packs=packs, extra_args=extra_args) as server:
        if not server.object_info("K2Loader"):
            raise ServerError(f"ComfyUI did not load the pack. Its log:\n{server.log_tail(60)}")
        say(f"  ready after {time.monotonic() - started:.0f} s")
        offered = server.options("K2Loader", "model")
        model = options.model or (pick_model(offered) if options.models else NANO)
        say(f'{model}: "{options.prompt}"')
        graph = text_to_image(options, model)
        outputs = server.wait(server.post(graph), progress_printer(graph))
        picture = (options.output or next_output()).resolve()
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(server.images(outputs)[0])
    say(f"Done in {time.monotonic() - started:.0f} s.")
    say("To open this ComfyUI as a page, at http://127.0.0.1:8188:")
    say("  " + shlex.join(page_command(options, extra_args)))
    return picture


def page_command(options: argparse.Namespace, extra_args: list[str]) -> list[str]:
    """The command line that starts the same ComfyUI for a browser."""
    main, base = Path(options.comfyui) / "main.py", str(options.base.resolve())
    return [sys.executable, str(main), "--base-directory", base, *extra_args]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo.sh",
        description="Makes a picture from a prompt with Krea 2 in a headless ComfyUI, and prints "
        "the path of the PNG. Without --models the built-in krea2-nano paints: flat shapes in "
        "colours, 128 px.",
        epilog="environment: COMFYUI_PATH names a ComfyUI to use (nothing is written there; by "
        "default 0.30.0 is fetched), PYTHON the Python (3.11 or later) to set up with.",
    )
    option = parser.add_argument
    option("prompt", nargs="?", default=PROMPT, help="what to show")
    option("--models", type=Path, help="a folder of trained weights, laid out as ComfyUI's models")
    option("--model", help="the transformer, as Load Krea 2 lists it (default: the first Turbo)")
    option("--output", type=Path, help="the PNG (default: the next .local/output/krea2_<n>.png)")
    option("--width", type=int, help="pixels (default: 1024, or 128 without --models)")
    option("--height", type=int, help="pixels, likewise")
    option("--steps", type=int, help="steps (default: what the checkpoint was made for)")
    option("--seed", type=int, default=0, help="the noise to start from")
    option("--cpu", action="store_true", help="use the CPU even beside a GPU")
    # What demo.sh adds.
    hidden = argparse.SUPPRESS
    option("--check", action="store_true", help=hidden)
    option("--base", type=Path, default=ROOT / ".local" / "base", help=hidden)
    option("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help=hidden)
    options = parser.parse_args()
    if options.models and not options.models.is_dir():
        parser.error(f"--models {options.models}: there is no such folder")
    if options.output and options.output.suffix.lower() != ".png":
        parser.error(f"--output {options.output}: expected a name that ends in .png")
    if not options.check and not options.comfyui:
        parser.error("COMFYUI_PATH is not set; demo.sh finds one")
    return options


def main() -> None:
    options = parse_arguments()
    if options.check:
        return
    # Set even where they are ignored, as for a background job: the server has to be stopped.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        print(generate(options))
    except (JobError, ServerError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
