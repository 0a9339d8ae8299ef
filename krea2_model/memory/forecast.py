"""What a run will take, before it starts: tokens, calls of the model, operations and memory.

Operations are the multiplications and additions of matrix products, two each, as
`torch.utils.flop_counter` counts them; norms and the like are under 1 % at full width. Memory is an
upper bound, see `activations`. tests/unit/test_forecast.py counts both.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import counted
from ..config import TransformerConfig
from .machine import GB
from .plan import NONE, Plan


def call_operations(
    config: TransformerConfig, image: int, text: int, references: int = 0, batch: int = 1
) -> int:
    """Floating-point operations of one call of the transformer, its text fused before.

    image, text, references: tokens of each of `batch` sequences.
    """
    width, tokens = config.hidden_size, image + text + references
    keys = 2 * width * config.num_key_value_heads * config.attention_head_dim
    queries = 3 * width**2 + 3 * width * config.intermediate_size  # with gate, output and MLP
    # Of the last block only the image is used.
    asking = (config.num_layers - 1) * tokens + image
    products = config.num_layers * tokens * keys + asking * queries
    products += 2 * asking * tokens * width  # scores and their values
    products += (image + references) * config.in_channels * width
    products += image * width * config.out_channels
    times = 2 if references else 1
    products += times * width * (config.timestep_embed_dim + 7 * width)
    return 2 * batch * products


def pair_operations(config: TransformerConfig, pairs: int, batch: int = 1) -> int:
    """Operations of attention to so many pairs of query and key in all blocks of a call."""
    return 2 * batch * config.num_layers * 2 * pairs * config.hidden_size


def style_operations(
    config: TransformerConfig, image: int, styles: int, blocks: int, batch: int = 1
) -> int:
    """Operations that attention to style pictures adds to a call in which they act.

    image: tokens of each of `batch` sequences. styles: of all style pictures. blocks: in which the
    pictures act.
    """
    return 2 * batch * blocks * 2 * image * styles * config.hidden_size


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    width, height: of the image in pixels. image, text, references: tokens of a sequence.
    styles: tokens of the style pictures. style_calls: of `calls`, those for their own passes.
    tiles: calls of the model for one text and step, more than 1 for an image in tiles.
    calls: of the model in the whole run. step_operations, operations: of a step (one in
    which style pictures and sparse attention act) and of the run.
    peak: bytes on the device at most, with the plan of the pipeline. free: bytes that it has; None
        where the device's memory is main memory.
    second: of the second stage of a run with `upscale`.
    """

    width: int
    height: int
    batch: int
    image: int
    text: int
    references: int
    steps: int
    tiles: int
    calls: int
    step_operations: int
    operations: int
    peak: int
    free: int | None
    plan: Plan
    activations: dict[str, int]
    second: Forecast | None = None
    styles: int = 0
    style_calls: int = 0

    @property
    def fits(self) -> bool:
        return not self.plan.lacking

    @property
    def warning(self) -> str:
        """Where the run will not fit: by how much, and what to change. Empty where it fits."""
        if self.fits:
            return ""
        changes = []
        if self.batch > 1:
            changes.append("make one image at a time")
        if self.tiles == 1 and self.image > 4096:
            changes.append("choose a smaller size, or tiles")
        if self.references:
            changes.append("reduce the references")
        if self.styles:
            changes.append("give fewer or smaller style pictures")
        if self.plan.mode == NONE:
            changes.append("let parts move (offload auto)")
        changes.append("load quantised files (fp8, GGUF)")
        remedy = ", or ".join(changes)
        return (
            f"The run needs about {self.plan.lacking / GB:.1f} GB more than the device has: "
            f"{remedy}."
        )

    def __str__(self) -> str:
        images = f"{self.batch} images of " if self.batch > 1 else ""
        tokens = [f"{self.image} of the image", f"{self.text} of text"]
        if self.references:
            tokens.append(f"{self.references} of references")
        if self.styles:
            tokens.append(f"{self.styles} of style pictures")
        own = f", {self.style_calls} of them of style pictures" if self.style_calls else ""
        tiles = f" in {self.tiles} tiles" if self.tiles > 1 else ""
        free = "" if self.free is None else f" of {self.free / GB:.1f} GB free"
        lines = [
            f"{images}{self.width} x {self.height} px{tiles}",
            f"tokens: {', '.join(tokens)}",
            f"calls: {self.calls} in {counted(self.steps, 'step')}{own}",
            f"operations: {_short(self.step_operations)} a step, {_short(self.operations)} in all",
            f"memory: at most {self.peak / GB:.1f} GB{free}; {self.plan.text}",
        ]
        if self.warning:
            lines.append(f"warning: {self.warning}")
        if self.second is not None:
            lines.append(f"then {self.second}")
        return "\n".join(lines)


def _short(count: float) -> str:
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e9:.3g} GFLOP"
