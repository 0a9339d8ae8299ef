"""Options of the training commands, each a setting of the TOML file it may be given instead."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .values import number, whole

_TRAIN = """\
SOURCE is a folder of pictures with captions beside them (cat.png, cat.txt), a table (.jsonl, .csv,
.parquet), or a .toml file of settings; options on the command line replace those of the file. Train
on Raw; the LoRA runs on Turbo too. A run that was stopped goes on when the command is given again.

  krea2 train photos --model krea2_raw_bf16.safetensors --text-encoder qwen3vl_4b.safetensors
      --vae qwen_image_vae.safetensors --output my_style.safetensors
  krea2 train photos --model nano --resolution 128 --output nano_style.safetensors
"""

_DISTIL = """\
Makes a Turbo of a Raw checkpoint, your fine-tune for example: the result is a LoRA for few steps
without guidance, which the preset "auto" recognises. SOURCE is a text file with a prompt a line, a
table with a column prompt, a folder of pictures with captions, or a .toml file of settings. Prompts
like those that the LoRA is to be used with teach it best; no pictures are needed.

  krea2 distil prompts.txt --model my_raw.safetensors --text-encoder qwen3vl_4b.safetensors
      --vae qwen_image_vae.safetensors --for-steps 8 --output my_turbo_lora.safetensors
"""

_PREFER = """\
Teaches a model which of two pictures of a prompt is preferred. SOURCE is a folder of
NAME.better.png and NAME.worse.png with NAME.txt, a table with columns prompt, chosen and rejected,
or a .toml file of settings. `krea2 pick FOLDER` makes such a table of pictures by clicks. Pairs of
which at least one picture is the model's own teach best.

  krea2 pick renders
  krea2 prefer renders/picks.jsonl --model krea2_raw_bf16.safetensors --output better.safetensors
      --text-encoder qwen3vl_4b.safetensors --vae qwen_image_vae.safetensors
"""

_PRETRAIN = """\
Trains a transformer from nothing, in stages of rising resolution. SOURCE is a folder of pictures
with captions, a table, or a .toml file of settings. The model names a checkpoint whose sizes are
taken, and none of its weights.

  krea2 pretrain pictures --model nano --resolution 64 128 --stage-steps 2000 1000
      --stage-batch 32 16 --optimiser muon --learning-rate 3e-3 --output raw.safetensors
"""

_REWARD = """\
Learns from scores of the pictures that the model itself paints, in groups of one prompt and without
guidance (GRPO on the flow). SOURCE is a text file with a prompt a line, a table with a column
prompt, whose other columns the rewards are given too, a folder of pictures with captions, or a
.toml file of settings. A reward is a Python function, FILE.py:NAME, that takes pictures (N, H, W,
3) in [0, 1] and their rows and returns N scores, or the address of a server: docs/training.md. The
function is run: name none that you do not trust, and look for it in .toml files of others.

  krea2 reward prompts.txt --reward score.py:score --model krea2_raw_bf16.safetensors
      --text-encoder qwen3vl_4b.safetensors --vae qwen_image_vae.safetensors
      --size 512 --batch 8 --output my_reward.safetensors
"""

_SLIDER = """\
Trains a LoRA whose strength moves pictures between two wordings of a prompt, from the negative one
below 0 to the positive one above, without pictures. SOURCE is a text file with a prompt a line that
says neither, a table with a column prompt, a folder of pictures with captions, or a .toml file of
settings. The words follow each prompt, or it stands at {} in them.

  krea2 slider people.txt --positive "very old" --negative "very young" --output age.safetensors
      --model krea2_raw_bf16.safetensors --text-encoder qwen3vl_4b.safetensors
      --vae qwen_image_vae.safetensors --size 512 --steps 500
"""

_FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}
_COUNT: dict[str, Any] = {"type": whole(1), "metavar": "N"}

# The words of an option, its setting, and what argparse takes.
_Group = list[tuple[str, str, dict[str, Any]]]

# Groups of options that all commands have, and of one command.
_SHARED: dict[str, _Group] = {
    "model": [
        ("--model", "model.transformer",
         {"metavar": "NAME", "help": "a Raw checkpoint, a diffusers folder, or nano"}),
        ("--text-encoder", "model.text_encoder", {**_FILE, "help": "a Qwen3-VL file or folder"}),
        ("--vae", "model.vae", {**_FILE, "help": "a Qwen-Image VAE file or folder"}),
        ("--tokenizer", "model.tokenizer", {"type": Path, "metavar": "FOLDER"}),
    ],
    "adapter": [
        ("--method", "adapter.method",
         {"choices": ("lora", "dora", "lokr", "full"), "help": "default: lora; full trains all"}),
        ("--rank", "adapter.rank", {**_COUNT, "help": "default: 32"}),
        ("--alpha", "adapter.alpha",
         {"type": number(0, above=True), "metavar": "X", "help": "default: the rank"}),
        ("--targets", "adapter.targets",
         {"choices": ("blocks", "attention", "mlp", "blocks+text"),
          "help": "default: blocks; blocks+text adds the text fusion"}),
        ("--start", "adapter.start",
         {**_FILE, "help": "a LoRA to begin with, of this rank or a lower one; default: zero"}),
    ],
    "steps": [
        ("--steps", "training.steps", {**_COUNT, "help": "default: 1500"}),
        ("--batch", "training.batch", {**_COUNT, "help": "pictures in a step; default: 1"}),
        ("--accumulate", "training.accumulate",
         {**_COUNT, "help": "batches in a step; default: 1"}),
        ("--learning-rate", "training.learning_rate",
         {"type": number(0, 1, above=True), "metavar": "X", "help": "default: 1e-4"}),
        ("--optimiser", "training.optimiser", {"choices": ("adamw", "adamw8bit", "muon")}),
        ("--seed", "training.seed", {"type": whole(0, 2**32 - 1), "metavar": "N"}),
    ],
    "samples": [
        ("--sample", "samples.prompts",
         {"action": "append", "metavar": "PROMPT", "help": "painted on the way; may be repeated"}),
        ("--sample-every", "samples.every",
         {"type": whole(0), "metavar": "N", "help": "steps between them; default: 250"}),
        ("--sample-turbo", "samples.turbo",
         {"metavar": "FILE", "help": "a Turbo checkpoint to paint them with as well, or nano"}),
    ],
    "memory": [
        ("--base", "memory.base",
         {"choices": ("as-is", "bf16", "fp8", "int8", "4bit"),
          "help": "how the frozen blocks are held; default: as the file has them"}),
        ("--offload", "memory.offload",
         {"action": "store_true", "default": None, "help": "frozen blocks stay in main memory"}),
        ("--device", "memory.device", {"metavar": "NAME", "help": "default: auto"}),
        ("--dtype", "memory.dtype", {"choices": ("bf16", "fp32")}),
    ],
    "output": [
        ("--output", "output.path", {**_FILE, "help": "the .safetensors file of the result"}),
        ("--folder", "output.folder",
         {"type": Path, "metavar": "FOLDER",
          "help": "of the run; default: the output's name without its ending"}),
        ("--key-style", "output.key_style",
         {"choices": ("ai-toolkit", "kohya", "diffusers"), "help": "default: ai-toolkit"}),
        ("--save-every", "output.save_every", {**_COUNT, "help": "steps; default: 250"}),
    ],
}  # fmt: skip


_PICTURES: dict[str, _Group] = {
    "pictures": [
        ("--caption", "data.caption",
         {"metavar": "TEXT", "help": "for pictures without one of their own"}),
        ("--trigger", "data.trigger", {"metavar": "WORDS", "help": "put before every caption"}),
        ("--resolution", "data.resolution",
         {"type": whole(64, 4096), "nargs": "+", "metavar": "PX",
          "help": "side of a square of the pictures' area; several train at each; default: 1024"}),
        ("--references", "data.references",
         {"choices": ("references", "identity", "ai-toolkit"),
          "help": "the family of edit LoRAs, where pictures have .ref1 and .ref2"}),
    ],
}  # fmt: skip


_WATCHED: dict[str, _Group] = {
    **_PICTURES,
    "validation": [
        ("--validation", "validation.path",
         {"type": Path, "metavar": "FOLDER",
          "help": "of pictures that are not trained on, whose loss is logged"}),
        ("--validation-share", "validation.share",
         {"type": number(0, 0.5), "metavar": "X", "help": "of SOURCE that is held out instead"}),
        ("--validation-every", "validation.every",
         {**_COUNT, "help": "steps between measurements; default: 100"}),
    ],
    "prior preservation": [
        ("--prior", "prior.path",
         {"type": Path, "metavar": "FOLDER",
          "help": "of pictures of what the model is to keep, learned beside the others"}),
        ("--prior-caption", "prior.caption",
         {"metavar": "TEXT", "help": "for those without one of their own"}),
        ("--prior-weight", "prior.weight",
         {"type": number(0, 100, above=True), "metavar": "X",
          "help": "of their loss; default: 1"}),
    ],
}  # fmt: skip


_PROMPTS: _Group = [
    ("--size", "prompts.size",
     {"type": whole(64, 4096), "metavar": "PX",
      "help": "side of a square of the pictures' area; default: the model's"}),
    ("--aspects", "prompts.aspects",
     {"nargs": "+", "metavar": "W:H",
      "help": "width to height of the pictures, of which one is drawn each time; default: 1:1, or "
      "seven from 9:16 to 16:9 (distil)"}),
]  # fmt: skip

_DISTILLING: dict[str, _Group] = {
    "distillation": [
        ("--for-steps", "distil.steps",
         {"type": whole(1, 16), "nargs": "+", "metavar": "N",
          "help": "steps of the LoRA's sampling, several in turn; default: 8"}),
        ("--guidance", "distil.guidance",
         {"type": number(0, 100), "metavar": "X", "help": "of the teacher; default: the model's"}),
        ("--teacher", "distil.teacher",
         {"metavar": "FILE",
          "help": "the Raw that is distilled, where --model is its Turbo, from which the student "
          "begins; default: --model"}),
        ("--fake-updates", "distil.fake_updates",
         {**_COUNT, "help": "of the model that follows the student; default: 4"}),
        *_PROMPTS,
    ],
}  # fmt: skip


_PREFERRING: dict[str, _Group] = {
    "preference": [
        ("--beta", "prefer.beta",
         {"type": number(0, 1e6, above=True), "metavar": "X",
          "help": "how strongly a pair counts; default: 1000"}),
        ("--hold", "prefer.hold",
         {"type": number(0, 1000), "metavar": "X",
          "help": "how strongly the winner's likelihood is held; 0 is plain DPO; default: 1"}),
        ("--resolution", "pairs.resolution",
         {"type": whole(64, 4096), "metavar": "PX",
          "help": "side of a square of the pictures' area; default: 1024"}),
    ],
}  # fmt: skip


_STAGES: dict[str, _Group] = {
    "stages": [
        ("--resolution", "stages.resolution",
         {"type": whole(64, 4096), "nargs": "+", "metavar": "PX",
          "help": "side of a square of the pictures' area, of each; default: 256 512 1024"}),
        ("--stage-steps", "stages.steps",
         {"type": whole(1), "nargs": "+", "metavar": "N", "help": "steps of each"}),
        ("--stage-batch", "stages.batch",
         {"type": whole(1), "nargs": "+", "metavar": "N", "help": "default: --batch for all"}),
        ("--stage-rate", "stages.rate",
         {"type": number(0), "nargs": "+", "metavar": "X",
          "help": "factors on the learning rate; default: 1 for all"}),
    ],
    "pictures": [
        option for option in _PICTURES["pictures"] if option[1] in ("data.caption", "data.trigger")
    ],
}  # fmt: skip


_REWARDING: dict[str, _Group] = {
    "rewards": [
        ("--reward", "reward.rewards",
         {"action": "append", "metavar": "NAME",
          "help": "FILE.py:NAME, MODULE:NAME or http://...; may be repeated"}),
        ("--weights", "reward.weights",
         {"type": number(-1000, 1000), "nargs": "+", "metavar": "X",
          "help": "of the rewards, in their order; default: 1 each"}),
        ("--group-size", "reward.group_size",
         {"type": whole(2), "metavar": "N", "help": "pictures of a prompt; default: 8"}),
        ("--groups", "reward.groups",
         {**_COUNT, "help": "of a step, each of one prompt; default: 4"}),
        ("--rollout-steps", "reward.rollout_steps",
         {"type": whole(2, 100), "metavar": "N", "help": "of the sampling; default: 8"}),
        ("--random-steps", "reward.random_steps",
         {**_COUNT, "help": "of these, that draw noise and are trained; default: 3"}),
        ("--noise", "reward.noise",
         {"type": number(0.01, 10), "metavar": "X", "help": "its level; default: 0.7"}),
        ("--updates", "reward.updates",
         {**_COUNT, "help": "of the weights for each step's pictures; default: 1"}),
        ("--kl", "reward.kl",
         {"type": number(0), "metavar": "X",
          "help": "weight of the divergence from the model without adapter; default: 0.01"}),
        *_PROMPTS,
    ],
}  # fmt: skip


_SLIDING: dict[str, _Group] = {
    "slider": [
        ("--positive", "slider.positive",
         {"metavar": "WORDS", "help": "of strengths above 0"}),
        ("--negative", "slider.negative",
         {"metavar": "WORDS", "help": "of strengths below 0"}),
        ("--slider-scale", "slider.scale",
         {"type": number(0, 100, above=True), "metavar": "X",
          "help": "how far strength 1 goes, in differences of the two; default: 1"}),
        *(option for option in _PROMPTS if option[1] == "prompts.size"),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """source: the setting that the first argument is, where it is no .toml file; and its help.

    without: settings, or sections of them, of the shared options that a command has not.
    """

    source: str
    help: str
    epilog: str
    options: dict[str, _Group]
    without: tuple[str, ...] = ()

    @property
    def groups(self) -> dict[str, _Group]:
        shared = {
            title: [one for one in group if not one[1].startswith(self.without)]
            for title, group in _SHARED.items()
        }
        return {**self.options, **{title: group for title, group in shared.items() if group}}


_PICTURE_SOURCE = "a folder, table or .toml file"

TRAINING: dict[str, Command] = {
    "train": Command("data.path", _PICTURE_SOURCE, _TRAIN, _WATCHED),
    "pretrain": Command(
        "data.path",
        _PICTURE_SOURCE,
        _PRETRAIN,
        _STAGES,
        without=("adapter", "training.steps", "output.key_style", "samples.turbo", "memory.base"),
    ),
    "distil": Command(
        "prompts.path", "a file of prompts, or .toml", _DISTIL, _DISTILLING, ("samples.turbo",)
    ),
    "prefer": Command("pairs.path", "a folder or table of pairs, or .toml", _PREFER, _PREFERRING),
    "reward": Command(
        "prompts.path",
        "a file of prompts, or .toml",
        _REWARD,
        _REWARDING,
        without=("training.accumulate",),
    ),
    "slider": Command("prompts.path", "a file of prompts, or .toml", _SLIDER, _SLIDING),
}


def add_training_options(parser: argparse.ArgumentParser, name: str) -> None:
    command = TRAINING[name]
    parser.usage = f"krea2 {name} SOURCE [options]"
    parser.epilog = command.epilog
    parser.add_argument("source", type=Path, metavar="SOURCE", help=command.help)
    parser.add_argument(
        "--dry-run", action="store_true", help="say what the run needs, and train nothing"
    )
    for title, options in command.groups.items():
        group = parser.add_argument_group(title)
        for words, setting, how in options:
            group.add_argument(words, dest=setting, **how)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options on the command line, by the settings' names."""
    groups = TRAINING[args.command].groups.values()
    names = [setting for options in groups for _, setting, _ in options]
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def option_of(command: str, setting: str) -> str | None:
    """A command's option or argument for a setting, for messages."""
    if setting == TRAINING[command].source:
        return "SOURCE"
    for options in TRAINING[command].groups.values():
        for words, name, _ in options:
            if name == setting:
                return words
    return None
