"""Control LoRAs as ComfyUI's CONTROL_NET, for its own nodes and the sampler's calls.

A conditioning carries it under "control", as core's Apply ControlNet puts it there. Before a run
the sampler calls `pre_run` with the model, and at each call of the model `get_control`, whose
result our transformer reads from its argument `control`.
"""

import copy
from pathlib import Path

import comfy.controlnet
import comfy.model_base
import comfy.model_management
import comfy.utils
import torch

from ...krea2_model.checks import check_finite
from ...krea2_model.config import TransformerConfig
from ...krea2_model.features.control_run import ControlSettings
from ...krea2_model.features.controls import PreparedControl, check_images, check_mask
from ...krea2_model.features.run_features import ControlPair, RunFeatures
from ...krea2_model.lora.control import AUTO, ControlLora, read_control_lora
from ...krea2_model.lora.control_files import CHANNELS, REFERENCES
from ...krea2_model.transformer.model import Krea2Transformer

# Key of the controls of a call in what `get_control` returns, beside core's.
CONTROLS = "krea2"
_CORE_KEYS = ("input", "middle", "output")


class ControlFile:
    """A control LoRA file, read for each kind of transformer once."""

    def __init__(self, path: Path, form: str = AUTO):
        self.path, self.form = path, form
        self._loras: dict[TransformerConfig, ControlLora] = {}

    def of(self, model: comfy.model_base.BaseModel) -> ControlLora:
        """The control LoRA for a model. Raises ValueError for a model that cannot take it."""
        transformer = getattr(model, "diffusion_model", None)
        if not isinstance(model, comfy.model_base.Krea2):
            raise ValueError(
                f"The model is a {type(model).__name__}; {self.path.name} is a control LoRA for "
                "Krea 2. Use a MODEL from Load Krea 2."
            )
        if not isinstance(transformer, Krea2Transformer):
            raise ValueError(
                "The model runs ComfyUI's own implementation of Krea 2, where a control LoRA has "
                "no effect. Load it with Load Krea 2, implementation this pack."
            )
        config = transformer.config
        if config not in self._loras:
            bare = Krea2Transformer(config, device="meta")
            shapes = {name: tuple(weight.shape) for name, weight in bare.named_parameters()}
            self._loras[config] = read_control_lora(self.path, shapes, self.form)
        return self._loras[config]


class Krea2Control(comfy.controlnet.ControlBase):
    """A control LoRA with its image, for the sampler.

    mask: (H, W) of the image's size, where it acts; None is everywhere. With reference tokens the
    image is among the references of the conditioning, and this is the LoRA alone.
    """

    def __init__(self, file: ControlFile, mask: torch.Tensor | None = None):
        super().__init__()
        self.file, self.mask = file, mask
        self._lora: ControlLora | None = None
        self._model: comfy.model_base.BaseModel | None = None
        # Of the sizes of this run: what takes part in it.
        self._pairs: dict[tuple, ControlPair] = {}

    def copy(self):
        other = Krea2Control(self.file, self.mask)
        self.copy_to(other)
        return other

    def deepclone_multigpu(self, load_device, autoregister=False):
        other = copy.copy(self)
        other._pairs, other.multigpu_clones = {}, {}
        if autoregister:
            self.multigpu_clones[load_device] = other
        return other

    def set_cond_hint(
        self,
        cond_hint,
        strength=1.0,
        timestep_percent_range=(0.0, 1.0),
        vae=None,
        extra_concat=(),
    ):
        super().set_cond_hint(cond_hint, strength, timestep_percent_range, None, list(extra_concat))
        self.vae = vae
        self.mask = check_images(cond_hint[0], self.mask)
        check_finite(cond_hint, "The control image")
        ControlSettings(strength, *timestep_percent_range)
        if vae is None:
            raise ValueError(
                "A Krea 2 control LoRA reads its image through the VAE, and none is connected. "
                "Connect the Krea 2 VAE to vae."
            )
        return self

    def beside_reference(self, settings: ControlSettings) -> "Krea2Control":
        """For a conditioning that has the control image as a reference."""
        self.strength = settings.strength
        self.timestep_percent_range = (settings.start, settings.end)
        return self

    @property
    def chain(self) -> list["Krea2Control"]:
        """This control and those before it. Raises ValueError for another kind among them."""
        earlier = self.previous_controlnet
        if earlier is None:
            return [self]
        if not isinstance(earlier, Krea2Control):
            raise ValueError(
                f"A {type(earlier).__name__} comes before a Krea 2 control LoRA; no ControlNet of "
                "another kind works with Krea 2. Remove it."
            )
        return [*earlier.chain, self]

    def pre_run(self, model, percent_to_timestep_function):
        assert len(self.chain) > 0  # raises for foreign ones
        super().pre_run(model, percent_to_timestep_function)
        self._model, self._pairs = model, {}
        self._lora = self.file.of(model)
        check_mask(self._lora.name, self._lora.form, self.mask is not None)
        if self._lora.form == REFERENCES and self.cond_hint_original is not None:
            raise ValueError(
                f"{self.file.path.name} takes its control image as a reference. Connect image and "
                "vae to Krea 2 Control LoRA itself, in place of an Apply ControlNet node."
            )

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        pairs = []
        if self.previous_controlnet is not None:
            earlier = self.previous_controlnet.get_control(
                x_noisy, t, cond, batched_number, transformer_options
            )
            pairs += earlier[CONTROLS]
        pairs.append(self._pair(x_noisy, batched_number))
        return {**{key: [] for key in _CORE_KEYS}, CONTROLS: pairs}

    def _pair(self, noisy, batched_number: int) -> ControlPair:
        per_call = noisy.shape[0] // batched_number
        key = (*noisy.shape[-2:], per_call, noisy.device)
        if key not in self._pairs:
            assert self._lora is not None and self._model is not None  # by pre_run
            settings = ControlSettings(self.strength, *self.timestep_percent_range)
            control, latents = PreparedControl(self._lora, settings, self.mask), None
            if self._lora.form == CHANNELS:
                height, width = (8 * side for side in noisy.shape[-2:])
                latents = self._encoded(control, width, height, per_call)
            sigma_at = self._model.model_sampling.percent_to_sigma
            self._pairs[key] = control.in_run(latents, sigma_at)
        return self._pairs[key]

    def _encoded(self, control, width: int, height: int, per_call: int) -> torch.Tensor:
        """Latents (B or 1, C, h, w) of the images; B is the number of those of a call."""
        images = [
            control.resized(three_channels(own), width, height) for own in self.cond_hint_original
        ]
        loaded = comfy.model_management.loaded_models(only_currently_used=True)
        latents = [self.vae.encode(image[None].movedim(1, -1)) for image in images]
        comfy.model_management.load_models_gpu(loaded)
        assert self._model is not None  # by pre_run
        latents = self._model.process_latent_in(torch.cat(latents))
        latents = latents[:, :, 0] if latents.ndim == 5 else latents
        if len(latents) == 1:
            return latents
        return comfy.utils.repeat_to_batch_size(latents, per_call)

    def cleanup(self):
        super().cleanup()
        self._pairs, self._model = {}, None

    def inference_memory_requirements(self, dtype):
        earlier = super().inference_memory_requirements(dtype)
        return earlier + self.file.path.stat().st_size


def add_control(conditionings: list, control: Krea2Control) -> list:
    """CONDITIONINGs, or None, with a control added to those that they have.

    Parts with the same earlier control share one, so that they may share a call of the model.
    """
    added: dict = {}
    results: list = []
    for conditioning in conditionings:
        result: list = []
        for states, extra in conditioning or ():
            earlier = extra.get("control")
            if earlier not in added:
                added[earlier] = control.copy().set_previous_controlnet(earlier)
            options = {"control": added[earlier], "control_apply_to_uncond": False}
            result.append([states, extra | options])
        results.append(None if conditioning is None else result)
    return results


def three_channels(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (3, H, W) in [0, 1] of an image (C, H, W)."""
    pixels = pixels.float().clamp(0, 1)
    return pixels.expand(3, -1, -1) if pixels.shape[0] == 1 else pixels[:3]


def controls_of(conditioning: dict) -> list[Krea2Control]:
    """The control LoRAs of a conditioning's options; none where ControlNets are of another kind."""
    control = conditioning.get("control")
    return control.chain if isinstance(control, Krea2Control) else []


def changes_text(conditioning: dict, model) -> bool:
    """True if a control LoRA of a conditioning changes the fusion of texts, so step by step."""
    return any(control.file.of(model).live.changes_text for control in controls_of(conditioning))


def with_controls(features: RunFeatures, control) -> RunFeatures:
    """Features of a call with its controls, from the model's argument `control`."""
    pairs = control.get(CONTROLS, ()) if isinstance(control, dict) else ()
    return features.with_controls(tuple(pairs)) if pairs else features
