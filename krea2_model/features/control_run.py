"""Control images in a run: settings, and what they add to the input layer's output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import is_number
from ..guidance import ALL_STEPS, NEVER, SigmaAt, StepWindow, check_window, unshifted
from ..lora.control_files import MAX_STRENGTH
from ..lora.in_run import ShareAt
from ..transformer.patches import grid_size, patchify
from .tiles import Tile


@dataclass(frozen=True)
class ControlSettings:
    """Use of one control LoRA.

    strength: 1 is as trained, 0 leaves it out. start, end: fractions of the schedule's time between
    which it acts, see `guidance`.

    Raises ValueError for values out of range.
    """

    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if not (is_number(self.strength) and abs(self.strength) <= MAX_STRENGTH):
            raise ValueError(
                f"A control's strength is {self.strength!r}; expected 0 (off) to {MAX_STRENGTH:g}, "
                "1 as trained."
            )
        check_window("A control", self.start, self.end)

    @property
    def is_off(self) -> bool:
        return self.strength == 0 or self.start == self.end

    def window(self, sigma_at: SigmaAt = unshifted) -> StepWindow:
        """The steps of a schedule in which it acts."""
        return NEVER if self.is_off else StepWindow.between(self.start, self.end, sigma_at)


@dataclass(frozen=True, eq=False)
class RunControl:
    """Control channels of a run.

    projection: (width, channels), see `ControlLora`. latents: (B or 1, C, h, w) of the control
    image at the size of the image, normalised. share_at: where it acts; None is everywhere.
    """

    projection: Tensor
    latents: Tensor
    strength: float = 1.0
    window: StepWindow = ALL_STEPS
    share_at: ShareAt | None = None
    # Nothing of it changes with the step: by device and dtype.
    _added: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    def acts_at(self, sigma: float) -> bool:
        """True in a step that begins at a sigma."""
        return self.strength != 0 and self.window.contains(sigma)

    def added(self, like: Tensor, tile: Tile | None = None) -> Tensor:
        """Addition (B or 1, I, width) to the embedded tokens of the image, or of a tile of it."""
        key = like.device, like.dtype
        if tile is not None:
            return self._project(*key, tile)
        if key not in self._added:
            self._added[key] = self._project(*key)
        return self._added[key]

    def _project(self, device: torch.device, dtype: torch.dtype, tile: Tile | None = None):
        patch = math.isqrt(self.projection.shape[1] // self.latents.shape[1])
        grid = grid_size(self.latents, patch)
        latents = self.latents if tile is None else tile.cut(self.latents)
        bottom, right = -latents.shape[-2] % patch, -latents.shape[-1] % patch
        padded = F.pad(latents.to(device, dtype), (0, right, 0, bottom), mode="replicate")
        projection = self.projection.to(device, dtype)
        added = self.strength * F.linear(patchify(padded, patch), projection)
        if self.share_at is None:
            return added
        share = self.share_at(*grid)
        share = share if tile is None else tile.cut_tokens(share, grid)
        return added * share.to(device, dtype)[:, None]


@contextmanager
def live_controls(
    model: nn.Module, controls: Sequence[RunControl], tiles: Sequence[Tile] = ()
) -> Iterator[None]:
    """Within it, the input layer of a transformer adds the control images to the image's tokens.

    tiles: of the image, whose sequences are then those of the call, tile by tile; none for all of
        the image.
    """
    if not controls:
        yield
        return
    handle = model.get_submodule("first").register_forward_hook(_AddControls(controls, tiles))
    try:
        yield
    finally:
        handle.remove()


class _AddControls:
    """A hook that adds to the first tokens, which are the image's; references follow.

    A class, so that a host can tell whose hook it is.
    """

    def __init__(self, controls: Sequence[RunControl], tiles: Sequence[Tile]):
        self._controls, self._tiles = controls, tiles

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for control in self._controls:
            added = self._added(control, output)
            tokens = added.shape[1]
            if tokens == output.shape[1]:
                output = output + added
            else:
                image = output[:, :tokens] + added
                output = torch.cat((image, output[:, tokens:]), dim=1)
        return output

    def _added(self, control: RunControl, output: Tensor) -> Tensor:
        """Additions (B or 1, I, width) to the image's tokens of all sequences of the call."""
        if len(self._tiles) < 2:
            added = control.added(output, *self._tiles)
            return added.repeat(len(output) // len(added), 1, 1) if len(added) > 1 else added
        of_tiles = [control.added(output, tile) for tile in self._tiles]
        times = len(output) // len(of_tiles) // len(of_tiles[0])
        return torch.cat([added.repeat(times, 1, 1) for added in of_tiles])
