"""Control images as arguments of a run: a control LoRA, its image, and where and when it acts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from .. import nano
from ..checkpoints.transformer_keys import Shape
from ..checks import as_path, check_finite, check_type
from ..guidance import SigmaAt
from ..images.masks import mask_for
from ..images.pictures import Picture, fit, pixels_of, reference_pixels
from ..images.resize import resize_and_crop
from ..lora.control import AUTO, ControlLora, read_control_lora
from ..lora.control_files import CHANNELS, REFERENCES
from ..lora.in_run import RunLora, ShareAt
from ..transformer.references import REFERENCE_METHODS, TIME_ZERO, Reference, ReferenceSettings
from .control_run import ControlSettings, RunControl
from .inpainting import mask_pixels
from .run_features import ControlPair, RunFeatures

# A token covers so many pixels a side: smaller pictures hold nothing to follow.
SMALLEST = 16

# The largest area of a control image that is a reference, in units of 1024 x 1024 pixels.
REFERENCE_MEGAPIXELS = 1.0


@dataclass(frozen=True)
class Control:
    """A control image of a run.

    lora: the control LoRA's file, "krea2_nano_control_lora.safetensors" for krea2-nano's own, or a
        `ControlLora` of the transformer.
    image: what to follow, as the LoRA was trained: outlines, depth, a pose; cropped to the size of
        the picture.
    strength, start, end: see `ControlSettings`.
    mask: where it acts, white, in a picture of the image's size; None is everywhere. Only with
        control channels.
    form: "auto", "control channels" or "reference tokens", see `lora.control`.
    method: of reference tokens, see `Krea2Transformer`.

    Raises ValueError for values out of range.
    """

    lora: str | Path | ControlLora
    image: Picture
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Picture | None = None
    form: str = AUTO
    method: str = TIME_ZERO

    def __post_init__(self):
        self.settings  # noqa: B018 - checks the numbers
        if self.method not in REFERENCE_METHODS:
            raise ValueError(
                f"A control's method is {self.method!r}; expected one of {REFERENCE_METHODS}."
            )

    @property
    def settings(self) -> ControlSettings:
        return ControlSettings(self.strength, self.start, self.end)

    def prepared(self, shapes: Mapping[str, Shape]) -> tuple[PreparedControl, Tensor]:
        """The control for a transformer with weights of these shapes, and its pixels (3, H, W).

        Raises CheckpointError for a file that does not fit, and ValueError for a picture or a mask
        that cannot be used.
        """
        pixels = pixels_of(self.image, "A control's image")
        mask = None if self.mask is None else mask_pixels(self.mask, "A control's mask")
        mask = check_images(pixels, mask)
        lora = self.lora
        if not isinstance(lora, ControlLora):
            lora = read_control_lora(built_in(as_path(lora, "A control's lora")), shapes, self.form)
        check_mask(lora.name, lora.form, mask is not None)
        return PreparedControl(lora, self.settings, mask, self.method), pixels


@dataclass(frozen=True)
class PreparedControl:
    """A control whose file is read. mask: (H, W) of the size of its image, or None."""

    lora: ControlLora
    settings: ControlSettings
    mask: Tensor | None = None
    method: str = TIME_ZERO

    @property
    def is_reference(self) -> bool:
        return self.lora.form == REFERENCES

    def resized(self, pixels: Tensor, width: int, height: int) -> Tensor:
        """The control image (3, H', W') that the VAE encodes for a picture of this size."""
        if self.is_reference:
            return reference_pixels(pixels, REFERENCE_MEGAPIXELS)
        return fit(pixels, width, height)

    def reference(self, latents: Tensor) -> Reference:
        """The control image as a reference."""
        settings = self.settings
        return Reference(latents, ReferenceSettings(start=settings.start, end=settings.end))

    def in_run(self, latents: Tensor | None, sigma_at: SigmaAt) -> ControlPair:
        """The control in a run.

        latents: (B or 1, C, h, w) of the control image, normalised; of a reference not needed.
        """
        strength, window = self.settings.strength, self.settings.window(sigma_at)
        live = self.lora.live.for_run()
        share_at = None if self.mask is None else share_of(self.mask)
        lora = RunLora(live, strength, window, share_at, on_references=self.is_reference)
        if self.lora.projection is None or latents is None:
            return None, lora
        control = RunControl(self.lora.projection, latents, strength, window, share_at)
        return control, (lora if live.names else None)


@dataclass(frozen=True)
class Controls:
    """The controls of a run, without those that are off; pixels: (3, H, W) of each one's image.

    Raises ValueError where those with reference tokens differ in their method.
    """

    controls: Sequence[PreparedControl] = ()
    pixels: Sequence[Tensor] = ()

    @classmethod
    def of(
        cls, controls: Control | Iterable[Control] | None, shapes: Mapping[str, Shape]
    ) -> Controls:
        if controls is None:
            return cls()
        entries = [controls] if isinstance(controls, Control) else list(controls)
        for entry in entries:
            check_type("control", entry, Control, "a Control, or a list of them")
        prepared = [entry.prepared(shapes) for entry in entries]
        active = [(own, pixels) for own, pixels in prepared if not own.settings.is_off]
        return cls([own for own, _ in active], [pixels for _, pixels in active])

    def images(self, width: int, height: int) -> list[Tensor]:
        """The images (3, H', W') to encode for a picture of this size, one a control."""
        pairs = zip(self.controls, self.pixels, strict=True)
        return [control.resized(pixels, width, height) for control, pixels in pairs]

    def method(self, others: str | None) -> str:
        """The method of all references of a run. others: that of its other references, or None."""
        methods = {control.method for control in self.controls if control.is_reference}
        methods |= set() if others is None else {others}
        if len(methods) > 1:
            raise ValueError(
                f"The references of a run differ in their method: {' and '.join(sorted(methods))}. "
                "Choose one for all of them, those of controls too."
            )
        return next(iter(methods), TIME_ZERO)

    def seen_as_references(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Of one image a control, those that are references."""
        pairs = zip(self.controls, images, strict=True)
        return [image for control, image in pairs if control.is_reference]

    def references_of(self, latents: Sequence[Tensor]) -> list[Reference]:
        """Of one latent a control, the references."""
        pairs = zip(self.controls, latents, strict=True)
        return [control.reference(latent) for control, latent in pairs if control.is_reference]

    def features(self, latents: Sequence[Tensor], sigma_at: SigmaAt) -> RunFeatures:
        """The controls in a run, with one latent for each."""
        pairs = zip(self.controls, latents, strict=True)
        parts = tuple(control.in_run(latent, sigma_at) for control, latent in pairs)
        return RunFeatures().with_controls(parts)


NO_CONTROLS = Controls()


def check_images(pixels: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask (H, W) of a control image (3, H, W) at its size, None for everywhere.

    Raises ValueError for an image or a mask that cannot be used.
    """
    check_finite(pixels, "The control image")
    height, width = pixels.shape[-2:]
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"The control image is {width} x {height} px; expected at least {SMALLEST} px a side. "
            "Give the outlines, depth or pose of a whole picture."
        )
    if mask is None:
        return None
    mask = mask_for(mask, pixels.movedim(0, -1)[None])
    if not mask.any():
        raise ValueError(
            "The control's mask is empty, so the control would act nowhere. Paint it white where "
            "the control image counts, or leave the mask out for everywhere."
        )
    return mask[0]


def check_mask(name: str, form: str, has_mask: bool) -> None:
    """Raise ValueError for a mask with a control LoRA whose image is a reference."""
    if has_mask and form != CHANNELS:
        raise ValueError(
            f"{name} takes its control image as a reference, to which a mask cannot be "
            "applied. Leave the mask out."
        )


def share_of(mask: Tensor) -> ShareAt:
    """Shares of image tokens by a mask (H, W), cropped to the picture as its image is."""

    def share_at(rows: int, columns: int) -> Tensor:
        width, height = columns * SMALLEST, rows * SMALLEST
        shares = mask[None].float()
        _, cropped = resize_and_crop(shares[..., None], shares, width, height, "crop")
        return F.avg_pool2d(cropped[None], SMALLEST).flatten()

    return share_at


def built_in(path: Path) -> Path:
    """A control LoRA's path, or krea2-nano's own by its name alone."""
    return nano.CONTROL_LORA if not path.exists() and str(path) == nano.CONTROL_LORA.name else path
