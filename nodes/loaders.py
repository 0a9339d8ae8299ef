"""Loaders: files and folders to MODEL, CLIP and VAE."""

from pathlib import Path

import torch
from comfy_api.latest import io, ui

from ..krea2_model.checkpoints.identify import TEXT_ENCODER, TRANSFORMER, VAE
from ..krea2_model.tools.convert import QUANTISATIONS
from . import inputs, model_files
from .forecasts import FORECAST, numbers
from .managed.clip import load_clip
from .managed.model import load_model
from .managed.vae import load_vae
from .pairing import check_pair, find_fitting

DTYPES = ("auto", "bf16", "fp16", "fp32")
# Choices of dtype that quantise at loading: the names of file formats to those of `convert`.
QUANTISED = {"fp8_scaled" if name == "fp8" else name: name for name in QUANTISATIONS}

# Choices of implementation: True for ComfyUI's own.
IMPLEMENTATIONS = {"this pack": False, "ComfyUI's own": True}

_MODEL_TIP = (
    "A Krea 2 transformer (models/diffusion_models), an all-in-one file (models/checkpoints) "
    "or a diffusers folder (models/diffusers). Raw or Turbo is detected from the file."
)
_ENCODER_TIP = "The Qwen3-VL-4B text encoder (models/text_encoders), for example qwen3vl_4b_bf16."
_VAE_TIP = "The Qwen-Image VAE (models/vae), for example qwen_image_vae."
_AUTO_TIP = ' "auto" uses the one in the model file if there is one, otherwise the first that fits.'


_MODEL_DTYPE = io.Combo.Input(
    "dtype",
    options=[*DTYPES, "fp8_e4m3fn", *QUANTISED],
    default="auto",
    advanced=True,
    tooltip=(
        "Data type of the transformer's weights in memory; auto follows the file and ComfyUI's "
        "flags. fp8_scaled, int8 and int8_convrot quantise a 16-bit file while loading: half the "
        "memory and 8-bit maths where the GPU supports it, at a small loss. Norms and modulation "
        "tables stay float32, and quantised files stay as they are."
    ),
)


def _transformer_input(name: str):
    return io.Combo.Input(
        name,
        options=model_files.list_models(TRANSFORMER),
        tooltip=_MODEL_TIP,
        extra_dict={inputs.SETTINGS: model_files.settings_of_models(), FORECAST: numbers()},
    )


def _dtype_input(tooltip: str):
    return io.Combo.Input(
        "dtype", options=list(DTYPES), default="auto", tooltip=tooltip, advanced=True
    )


_IMPLEMENTATION = io.Combo.Input(
    "implementation",
    options=list(IMPLEMENTATIONS),
    default=next(iter(IMPLEMENTATIONS)),
    optional=True,
    advanced=True,
    tooltip=(
        "The code that runs the transformer. This pack's is faster and works with other packs' "
        "nodes. Choose ComfyUI's own for a node that needs ComfyUI's model class; prompt weights, "
        "reference strengths and Krea 2 Negative (NAG) have no effect there."
    ),
)


def _load_transformer(path, dtype: str, implementation: str):
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}."
        )
    by_core = IMPLEMENTATIONS[implementation]
    if dtype in QUANTISED:
        return load_model(path, None, QUANTISED[dtype], by_core)
    return load_model(path, _dtype(dtype, *QUANTISED), None, by_core)


def _dtype(name: str, *others: str):
    dtypes = {
        "auto": None,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "fp8_e4m3fn": torch.float8_e4m3fn,
    }
    if name not in dtypes:
        raise ValueError(f"dtype is {name!r}; expected one of {', '.join([*dtypes, *others])}.")
    return dtypes[name]


def _check(part: str, name: str | None):
    """True, or the error for a chosen name; a linked one is not known yet."""
    return name in (None, model_files.AUTO) or model_files.problem(
        model_files.find_model, part, name
    )


def _fingerprint(part: str, name: str | None):
    """Fingerprint of the file of a chosen name; None for a linked one, not known yet."""
    return None if name is None else model_files.fingerprint(model_files.find_model(part, name))


class K2Loader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Loader",
            display_name="Load Krea 2",
            category="Krea 2",
            description="Loads all of Krea 2: transformer, text encoder and VAE.",
            search_aliases=inputs.aliases("turbo, raw, qwen, checkpoint"),
            inputs=[
                _transformer_input("model"),
                io.Combo.Input(
                    "text_encoder",
                    options=[model_files.AUTO, *model_files.list_models(TEXT_ENCODER)],
                    default=model_files.AUTO,
                    tooltip=_ENCODER_TIP + _AUTO_TIP,
                ),
                io.Combo.Input(
                    "vae",
                    options=[model_files.AUTO, *model_files.list_models(VAE)],
                    default=model_files.AUTO,
                    tooltip=_VAE_TIP + _AUTO_TIP,
                ),
                _MODEL_DTYPE,
                _IMPLEMENTATION,
            ],
            outputs=[
                io.Model.Output(tooltip="The transformer."),
                io.Clip.Output(tooltip="The text encoder."),
                io.Vae.Output(tooltip="The VAE."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model=None, text_encoder=None, vae=None):
        names = {"model": model, "text_encoder": text_encoder, "vae": vae}
        for part, (field, name) in zip(
            (TRANSFORMER, TEXT_ENCODER, VAE), names.items(), strict=True
        ):
            message = _check(part, name)
            if message is not True:
                # ComfyUI repeats the message for each of the three.
                return f"{field}: {message}"
        return True

    @classmethod
    def fingerprint_inputs(cls, model=None, text_encoder=None, vae=None, **others):
        if None in (model, text_encoder, vae):
            return None
        return model_files.fingerprint(*_find_parts(model, text_encoder, vae))

    @classmethod
    def execute(
        cls,
        model,
        text_encoder=model_files.AUTO,
        vae=model_files.AUTO,
        dtype="auto",
        implementation=next(iter(IMPLEMENTATIONS)),  # noqa: B008 - a constant
    ):
        transformer, encoder, decoder = _find_parts(model, text_encoder, vae)
        check_pair(transformer, encoder)
        chosen = [
            f"{title}: {path.name}"
            for title, name, path in (
                ("text encoder", text_encoder, encoder),
                ("VAE", vae, decoder),
            )
            if name == model_files.AUTO and path != transformer and model not in model_files.NANOS
        ]
        return io.NodeOutput(
            _load_transformer(transformer, dtype, implementation),
            load_clip(encoder),
            load_vae(decoder),
            ui=ui.PreviewText("\n".join(chosen)) if chosen else None,
        )


def _find_parts(model: str, text_encoder: str, vae: str) -> list[Path]:
    """Paths of transformer, text encoder and VAE; "auto" takes what fits the transformer."""
    transformer = model_files.find_model(TRANSFORMER, model)
    others = (
        find_fitting(part, transformer)
        if name == model_files.AUTO
        else model_files.find_model(part, name)
        for part, name in ((TEXT_ENCODER, text_encoder), (VAE, vae))
    )
    return [transformer, *others]


class K2ModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2ModelLoader",
            display_name="Load Krea 2 Model",
            category="Krea 2",
            description="Loads a Krea 2 transformer, Raw or Turbo.",
            search_aliases=inputs.aliases("turbo, raw, unet, diffusion model"),
            inputs=[
                _transformer_input("file"),
                _MODEL_DTYPE,
                _IMPLEMENTATION,
            ],
            outputs=[io.Model.Output(tooltip="The transformer.")],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        return _check(TRANSFORMER, file)

    @classmethod
    def fingerprint_inputs(cls, file=None, **others):
        return _fingerprint(TRANSFORMER, file)

    @classmethod
    def execute(cls, file, dtype="auto", implementation=next(iter(IMPLEMENTATIONS))):  # noqa: B008
        path = model_files.find_model(TRANSFORMER, file)
        return io.NodeOutput(_load_transformer(path, dtype, implementation))


class K2TextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2TextEncoderLoader",
            display_name="Load Krea 2 Text Encoder",
            category="Krea 2",
            description=(
                "Loads the Qwen3-VL-4B text encoder as a CLIP, without the parts that Krea 2 does "
                "not use."
            ),
            search_aliases=inputs.aliases("qwen, qwen3, clip"),
            inputs=[
                io.Combo.Input(
                    "file", options=model_files.list_models(TEXT_ENCODER), tooltip=_ENCODER_TIP
                ),
                _dtype_input("Data type of the weights in memory; activations are always float32."),
            ],
            outputs=[io.Clip.Output(tooltip="The text encoder.")],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        return _check(TEXT_ENCODER, file)

    @classmethod
    def fingerprint_inputs(cls, file=None, **others):
        return _fingerprint(TEXT_ENCODER, file)

    @classmethod
    def execute(cls, file, dtype="auto"):
        return io.NodeOutput(load_clip(model_files.find_model(TEXT_ENCODER, file), _dtype(dtype)))


class K2VAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2VAELoader",
            display_name="Load Krea 2 VAE",
            category="Krea 2",
            description="Loads the Qwen-Image VAE for single images, without its video parts.",
            search_aliases=inputs.aliases("qwen, wan"),
            inputs=[
                io.Combo.Input("file", options=model_files.list_models(VAE), tooltip=_VAE_TIP),
                _dtype_input(
                    "Data type the VAE runs in. auto follows the device and ComfyUI's flags."
                ),
            ],
            outputs=[io.Vae.Output(tooltip="The VAE.")],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        return _check(VAE, file)

    @classmethod
    def fingerprint_inputs(cls, file=None, **others):
        return _fingerprint(VAE, file)

    @classmethod
    def execute(cls, file, dtype="auto"):
        return io.NodeOutput(load_vae(model_files.find_model(VAE, file), _dtype(dtype)))
