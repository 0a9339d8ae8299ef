"""The command line: `python -m krea2_model "a fox in the snow" --model FOLDER`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from . import nano
from .checkpoints.text_encoder import load_text_encoder
from .checks import find_device
from .images.output_files import check_outputs, numbered, save_image
from .images.pictures import pixels_of
from .memory.offload import offload_encoder
from .memory.plan import AUTO, ENCODER, NONE, OFFLOADS, check_offload
from .pipeline import Krea2Pipeline
from .schedule import check_guidance, check_seed
from .text.expander import LENGTHS, PromptExpander
from .tools.convert import PARTS, QUANTISATIONS, convert
from .tools.describe import describe
from .tools.self_check import check

# Names that --model takes instead of a path; a folder of that name is ./nano.
NANO = {"nano": nano.TRANSFORMERS["turbo"], "nano-raw": nano.TRANSFORMERS["raw"]}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m krea2_model",
        description="Krea 2 from the command line. A first word that is no command is the prompt.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="make images from a prompt")
    generate.add_argument("prompt")
    files = generate.add_argument_group("model files")
    files.add_argument(
        "--model",
        help="a diffusers folder or an all-in-one file; or nano or nano-raw, small and built in",
    )
    files.add_argument("--transformer", type=Path, help="a transformer file or folder")
    files.add_argument("--text-encoder", type=Path, help="a Qwen3-VL file or folder")
    files.add_argument("--vae", type=Path, help="a Qwen-Image VAE file or folder")
    files.add_argument("--tokenizer", type=Path, help="a folder with the Qwen tokenizer")
    files.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="a LoRA of any trainer, several by repeating",
    )
    image = generate.add_argument_group("image")
    image.add_argument(
        "--output", type=Path, default=Path("krea2.png"), help="a .png, .jpg or .webp file"
    )
    image.add_argument("--width", type=int, help="default: the checkpoint's, 1024 (nano 128)")
    image.add_argument("--height", type=int, help="likewise")
    image.add_argument("--negative", default="", help="what guidance steers away from")
    image.add_argument("--steps", type=int, help="default: the checkpoint's")
    image.add_argument("--guidance", type=float, help="Krea's convention; ComfyUI's cfg - 1")
    image.add_argument("--images", type=int, default=1, help="how many")
    image.add_argument("--seed", type=int, default=0, help="of the first image")
    image.add_argument("--max-sequence-length", type=int, help="cut the prompt; 512 is official")
    image.add_argument(
        "--evaluate-every", type=int, default=1, help="2: later steps in turns without the model"
    )
    image.add_argument(
        "--start-image", type=Path, metavar="FILE", help="an image to change, see --denoise"
    )
    image.add_argument(
        "--denoise", type=float, default=1.0, help="how much to change it; 1 is all of it"
    )
    image.add_argument(
        "--reference", type=Path, action="append", default=[], metavar="FILE",
        help="an image to look at, for LoRAs that take references; several by repeating",
    )  # fmt: skip
    image.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE",
        help="an image in the prompt, for LoRAs that read images; several by repeating",
    )  # fmt: skip
    _add_machine(generate)
    expand = commands.add_parser("expand", help="make a dense caption of a short prompt")
    expand.add_argument("prompt")
    files = expand.add_argument_group("model files")
    files.add_argument("--model", help="a diffusers folder or an all-in-one file")
    files.add_argument("--text-encoder", type=Path, help="a Qwen3-VL file or folder")
    files.add_argument("--tokenizer", type=Path, help="a folder with the Qwen tokenizer")
    caption = expand.add_argument_group("caption")
    caption.add_argument(
        "--creativity", type=float, default=0.5, help="0 (the most likely words) to 1; default 0.5"
    )
    caption.add_argument("--length", choices=LENGTHS, default="medium", help="default: medium")
    caption.add_argument("--seed", type=int, default=0, help="of the first variant")
    caption.add_argument("--variants", type=int, default=1, help="how many, a line each")
    caption.add_argument("--style", default="", help="words for the look")
    caption.add_argument("--language", default="", help="default: the prompt's")
    _add_machine(expand)
    inspect = commands.add_parser("inspect", help="say what a file or folder is")
    inspect.add_argument("files", nargs="+", type=Path)
    checking = commands.add_parser(
        "check", help="say what this machine has and what is wrong, for a bug report"
    )
    checking.add_argument(
        "models", nargs="?", type=Path, help="ComfyUI's models folder, to look through its files"
    )
    convert = commands.add_parser("convert", help="make one file of a folder, or the other way")
    convert.add_argument("source", type=Path, help="a model file or a diffusers folder")
    convert.add_argument("target", type=Path, help="a .safetensors file, or a folder to make")
    convert.add_argument("--part", choices=PARTS, help="only this part (default: all there are)")
    convert.add_argument(
        "--quantise", choices=QUANTISATIONS, help="the transformer's blocks in 8 bits"
    )
    return parser


def _default_device() -> str:
    """The machine's accelerator, whoever made it, or else the CPU."""
    return find_device("auto").type


def _add_machine(command: argparse.ArgumentParser) -> None:
    machine = command.add_argument_group("machine")
    machine.add_argument("--device", default=_default_device(), help="default: %(default)s")
    machine.add_argument(
        "--offload", choices=OFFLOADS, default=AUTO,
        help="none: all weights stay on the device; parts: text encoder, transformer and VAE take "
        "turns; blocks: what does not fit streams; default: %(default)s, by free memory",
    )  # fmt: skip
    machine.add_argument(
        "--max-memory", type=float, metavar="GB", help="of the device; default: all that is free"
    )
    machine.add_argument("--dtype", choices=DTYPES, help="default: the files'; fp32 for nano")


def generate(args: argparse.Namespace) -> list[Path]:
    """Make the images that `args` ask for; returns the files written."""
    defaults = (args.model,) * 3
    if args.model in NANO:
        defaults = NANO[args.model], nano.text_encoder_file(), nano.VAE
    transformer, text_encoder, vae = (
        part or default
        for part, default in zip(
            (args.transformer, args.text_encoder, args.vae), defaults, strict=True
        )
    )
    if None in (transformer, text_encoder, vae):
        raise ValueError(
            "Name the weights: --model (nano is small and built in), or --transformer, "
            "--text-encoder and --vae."
        )
    # Before the weights, which take minutes: bad numbers, names that cannot be written to and files
    # that are no pictures.
    if args.images < 1:
        raise ValueError(f"images is {args.images}; expected a whole number from 1 up.")
    paths = numbered(args.output, args.images)
    check_outputs(paths)
    check_seed(args.seed)
    if args.guidance is not None:
        check_guidance(args.guidance)
    images = [pixels_of(path, "--image") for path in args.image]
    start_image = pixels_of(args.start_image, "--start-image") if args.start_image else None
    references = [pixels_of(path, "--reference") for path in args.reference]
    # The small model costs nothing in full precision, and looks the same everywhere.
    default_dtype = torch.float32 if args.model in NANO else None
    pipeline = Krea2Pipeline.from_files(
        transformer,
        text_encoder,
        vae,
        args.tokenizer,
        dtype=DTYPES.get(args.dtype, default_dtype),
        device=args.device,
        offload=args.offload,
        max_memory=args.max_memory,
    )
    for report in pipeline.load_loras([_lora_and_scale(lora) for lora in args.lora]):
        print(report, file=sys.stderr)
    steps = pipeline.preset.steps if args.steps is None else args.steps
    with tqdm(total=steps, unit="step", desc=args.output.name) as bar:
        results = pipeline(
            args.prompt,
            args.negative,
            height=args.height,
            width=args.width,
            steps=steps,
            guidance=args.guidance,
            num_images=args.images,
            seed=args.seed,
            max_sequence_length=args.max_sequence_length,
            evaluate_every=args.evaluate_every,
            images=images,
            start_image=start_image,
            denoise=args.denoise,
            references=references,
            callback=lambda step, latents, predicted: bar.update(),
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for image, path in zip(results, paths, strict=True):
        save_image(image, path)
    return paths


def expand(args: argparse.Namespace) -> Iterable[str]:
    """Captions for a prompt, a line each; what one lacks is said on stderr."""
    path = args.text_encoder or (nano.text_encoder_file() if args.model in NANO else args.model)
    if path is None:
        raise ValueError("Name the weights: --model or --text-encoder.")
    device, offload = check_offload(args.device, args.offload, args.max_memory)
    encoder = load_text_encoder(
        path,
        device=device if offload == NONE else "cpu",
        dtype=DTYPES.get(args.dtype),
        tokenizer=args.tokenizer,
        keep_quantised=True,
    )
    expander = PromptExpander(encoder)
    places = offload_encoder(encoder, device, offload, args.max_memory)
    with places.use(ENCODER, expander.tail), tqdm(unit="token", desc="writing") as bar:
        expansions = expander(
            args.prompt,
            lambda text: bar.update(),
            creativity=args.creativity,
            length=args.length,
            seed=args.seed,
            variants=args.variants,
            style=args.style,
            language=args.language,
        )
    for expansion in expansions:
        if note := expansion.note():
            print(note, file=sys.stderr)
    return [expansion.text for expansion in expansions]


def _lora_and_scale(text: str) -> tuple[Path, float]:
    """`style.safetensors:0.8`; what follows the last colon counts where it is a number."""
    name, colon, scale = text.rpartition(":")
    try:
        return (Path(name), float(scale)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


COMMANDS: dict[str, Callable[[argparse.Namespace], Iterable[object]]] = {
    "generate": generate,
    "expand": expand,
    "inspect": lambda args: (describe(path) for path in args.files),
    "check": lambda args: [check(args.models)],
    "convert": lambda args: convert(args.source, args.target, args.quantise, args.part),
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    if arguments and arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["generate", *arguments]
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    try:
        for line in COMMANDS[args.command](args):
            print(line)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
