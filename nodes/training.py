"""Training of a LoRA on the MODEL that is wired in."""

import logging
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui

from . import inputs
from .latents import given_vae
from .managed.memory import advise
from .managed.training import check_parts, is_turbo, parts_of, settings_of_device
from .managed.training_package import training
from .model_files import fingerprint
from .training_files import (
    find_output,
    find_picture_folder,
    list_picture_folders,
    relative_name,
)
from .training_run import (
    FROM_INPUT,
    METHODS,
    Watch,
    check_name,
    config_of,
    examples_of,
    in_inputs,
)

# Of krea2_training.settings, which is not imported at start; tests/comfy/test_training.py compares.
TARGETS = ("blocks", "attention", "mlp", "blocks+text")
OPTIMISERS = ("adamw", "adamw8bit", "muon")
BASES = ("as-is", "bf16", "fp8", "int8", "4bit")

_MAX_SEED = 2**32 - 1
_REMEDY = (
    "Choose base 4bit or fp8, offload, a lower resolution, batch 1 or a lower rank. The run goes "
    "on from its last state."
)


class K2TrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2TrainLora",
            display_name="Krea 2 Train LoRA",
            category="Krea 2",
            description=(
                "Trains a LoRA, DoRA or LoKr on Krea 2 from a folder of captioned pictures, shows "
                "the loss while it learns, and saves the file to output/loras. Cancelling saves "
                "what was learned; the next run goes on from there. Train on Raw, use on Turbo."
            ),
            search_aliases=inputs.aliases("train, training, fine-tune, finetune, dora, lokr"),
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="Krea 2 Raw. Its LoRAs are part of the base."),
                io.Clip.Input("clip", tooltip="The text encoder, for the captions."),
                io.Vae.Input("vae", tooltip="The VAE, for the pictures."),
                io.Combo.Input(
                    "folder",
                    options=[FROM_INPUT, *list_picture_folders()],
                    default=FROM_INPUT,
                    tooltip=(
                        "A folder of pictures in ComfyUI's input folder, each with its caption "
                        "beside it: cat.png and cat.txt."
                    ),
                ),
                io.String.Input(
                    "name",
                    default="my_style",
                    tooltip=(
                        "Name of the file in output/loras. A run of the same name is resumed."
                    ),
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip=(
                        "lora is what every program reads; dora trains the lengths of columns too; "
                        "lokr needs fewer numbers."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=1,
                    max=1024,
                    tooltip="Rank of the LoRA: higher learns more detail and makes a larger file.",
                ),
                io.Int.Input(
                    "steps",
                    default=1500,
                    min=1,
                    max=1_000_000,
                    tooltip="Number of training steps, including those of a run that is resumed.",
                ),
                io.Int.Input("batch", default=1, min=1, max=256, tooltip="Pictures in each step."),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="Learning rate; 1e-4 to 3e-4 is usual, 3 to 10 times that for lokr.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=2048,
                    step=16,
                    tooltip=(
                        "Pictures are resized to the area of a square of this side, in their own "
                        "shape."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=_MAX_SEED,
                    control_after_generate=False,
                    tooltip="Seed of the initial weights, of noise, times and order of pictures.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="Words put before every caption, to call the LoRA by.",
                ),
                io.String.Input(
                    "caption",
                    default="",
                    advanced=True,
                    tooltip="Caption of pictures that have none; empty refuses such pictures.",
                ),
                io.Float.Input(
                    "caption_dropout",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of captions left out, which keeps guidance working.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=4096.0,
                    step=0.5,
                    advanced=True,
                    tooltip="Scale of the LoRA is alpha / rank; 0 takes the rank, for scale 1.",
                ),
                io.Combo.Input(
                    "targets",
                    options=list(TARGETS),
                    default=TARGETS[0],
                    advanced=True,
                    tooltip=(
                        "Layers that are trained: all of the blocks, their attention, their MLPs, "
                        "or the text fusion too."
                    ),
                ),
                io.Combo.Input(
                    "optimiser",
                    options=list(OPTIMISERS),
                    default=OPTIMISERS[0],
                    advanced=True,
                    tooltip="adamw8bit needs bitsandbytes; muon is for higher learning rates.",
                ),
                io.Combo.Input(
                    "base",
                    options=list(BASES),
                    default=BASES[0],
                    advanced=True,
                    tooltip=(
                        "Format of the frozen weights while training: as the model is loaded, or "
                        "quantised for less memory. The MODEL itself stays as it is."
                    ),
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    advanced=True,
                    tooltip="Compute activations again in the backward pass: far less memory.",
                ),
                io.Boolean.Input(
                    "offload",
                    default=False,
                    advanced=True,
                    tooltip="Keep the blocks in main memory and copy one at a time to the GPU.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    tooltip=(
                        "Go on where the last run of this name ended. Off begins anew and replaces "
                        "that run."
                    ),
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures in place of a folder: a batch, or a list of any sizes.",
                ),
                io.String.Input(
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip=(
                        "Captions of images: a list, or one per line; a single one is for all."
                    ),
                ),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output(
                    display_name="lora",
                    tooltip="The LoRA, for ComfyUI's Load LoRA Model and Save LoRA Weights.",
                ),
                io.Custom("LOSS_MAP").Output(
                    display_name="loss",
                    tooltip="The loss of each step, for ComfyUI's Plot Loss Graph.",
                ),
                io.Image.Output(display_name="curve", tooltip="The curve of the loss."),
                io.String.Output(
                    display_name="file",
                    tooltip="Name of the file, as Load Krea 2 LoRA lists it after a refresh.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, folder=None, name=None, steps=None, rank=None, batch=None, learning_rate=None,
        resolution=None, caption_dropout=None, alpha=None, seed=None,
    ):  # fmt: skip
        folder, name = _only(folder), _only(name)
        numbers = {
            "steps": steps, "rank": rank, "batch": batch, "learning_rate": learning_rate,
            "resolution": resolution, "caption_dropout": caption_dropout, "alpha": alpha,
            "seed": seed,
        }  # fmt: skip

        def check():
            if folder not in (None, FROM_INPUT):
                find_picture_folder(folder)
            if name is not None:
                find_output(name)

        return inputs.verdict(cls, check, **{n: _only(value) for n, value in numbers.items()})

    @classmethod
    def fingerprint_inputs(cls, folder=None, **others):
        folder = _only(folder)
        return None if folder in (None, FROM_INPUT) else fingerprint(find_picture_folder(folder))

    @classmethod
    def execute(cls, model, clip, vae, images=None, captions=None, **widgets):
        schema = cls.define_schema()
        values: dict[str, Any] = {e.id: getattr(e, "default", None) for e in schema.inputs}
        values |= {name: _only(value) for name, value in widgets.items()}
        # The folder is looked up below: it may be newer than the list of choices.
        inputs.check_limits(cls, **values | {"folder": None})
        model, clip, vae = model[0], clip[0], given_vae(vae[0])
        check_parts(model, clip, vae)
        result, run_folder = find_output(values["name"])
        with torch.inference_mode(False), in_inputs():
            config = config_of(values, result, run_folder)
            examples = examples_of(values["folder"], images, captions, config.data)
            check_name(values["resume"], result, run_folder)
            notes = []
            if is_turbo(model):
                logging.warning("Krea 2 Train LoRA: the model %s", training().session.ON_TURBO)
                notes.append("on Turbo: train on Raw instead")
            watch = Watch(run_folder, values["steps"])
            is_fp32 = settings_of_device()["memory.dtype"] == "fp32"

            def parts():
                made = parts_of(model, clip, vae, torch.float32 if is_fp32 else torch.bfloat16)
                device = comfy.model_management.get_torch_device()
                notes.append(training().forecast.shortage(config, made.model, device))
                return made

            with advise("Training", _REMEDY):
                training().train.train(
                    config,
                    watch.on_step,
                    on_encoding=watch.on_encoding,
                    parts=parts,
                    examples=examples,
                )
        comfy.model_management.soft_empty_cache()
        if watch.interrupted is not None:
            # With its file written, the run ends as ComfyUI expects of a cancelled one.
            raise watch.interrupted
        lora = comfy.utils.load_torch_file(str(result), safe_load=True)
        curve = watch.picture()
        notes = [f"step {watch.losses[-1][0]} of {values['steps']}", *notes, relative_name(result)]
        text = "\n".join(filter(None, notes))
        shown = ui.PreviewImage(curve, cls=cls).as_dict() | {"text": (text,)}
        losses = {"loss": [loss for _, loss in watch.losses]}
        return io.NodeOutput(lora, losses, curve, relative_name(result), ui=shown)


def _only(value):
    """The value of a widget, which comes as a list of one."""
    return value[0] if isinstance(value, (list, tuple)) and value else value
