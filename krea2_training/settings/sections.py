"""The sections of settings that the commands share, as in a TOML file, checked when they are made.

Nothing here imports torch, so that a wrong setting is refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from krea2_model.lora.names import KEY_STYLES, TARGETS

from .checks import check, check_side, check_sides, choice

FULL = "full"
METHODS = ("lora", "dora", "lokr", FULL)
OPTIMISERS = ("adamw", "adamw8bit", "muon")
BASES = ("as-is", "bf16", "fp8", "int8", "4bit")
COLUMNS, ROWS = "columns", "rows"
EDITS = ("references", "identity", "ai-toolkit")
NANO = "nano"
MAX_REFERENCES = 2


@dataclass(frozen=True)
class Data:
    """Pictures and captions.

    path: a folder of pictures with captions beside them, or a .jsonl, .csv or .parquet table.
    caption: for pictures without one; "" trains them without a prompt.
    trigger: words put before every caption.
    resolution: side of a square of the area that pictures are resized to, or several.
    caption_dropout: share of captions that are replaced by the empty prompt, which guidance needs.
    repeats: how often a picture comes in an epoch.
    references: how pictures named .ref1 and .ref2 are shown, as a family of edit LoRAs.
    cache: folder of the encoded pictures and captions; None is "cache" in the run's folder.
    """

    path: Path | None = None
    caption: str | None = None
    trigger: str = ""
    resolution: tuple[int, ...] = (1024,)
    caption_dropout: float = 0.05
    repeats: int = 1
    references: str = EDITS[0]
    cache: Path | None = None

    def __post_init__(self):
        check(self.path is not None, "data.path", self.path, "a folder of pictures or a table")
        check_sides("data.resolution", self.resolution)
        check(
            0 <= self.caption_dropout <= 1, "data.caption_dropout", self.caption_dropout, "0 to 1"
        )
        check(1 <= self.repeats <= 10_000, "data.repeats", self.repeats, "1 to 10000")
        choice("data.references", self.references, EDITS)


@dataclass(frozen=True)
class Validation:
    """Pictures that are not trained on, whose loss shows when a run learns by heart.

    path: a folder or table of them. share: of the pictures of data.path that are held out instead.
    every: steps between measurements. draws: times and noises of each picture, always the same.
    """

    path: Path | None = None
    share: float = 0.0
    every: int = 100
    draws: int = 4

    def __post_init__(self):
        check(0 <= self.share <= 0.5, "validation.share", self.share, "0 to 0.5")
        both = self.path is not None and self.share > 0
        check(not both, "validation.share", self.share, "0 beside validation.path")
        check(1 <= self.every <= 10**7, "validation.every", self.every, "1 or more")
        check(1 <= self.draws <= 1024, "validation.draws", self.draws, "1 to 1024")


@dataclass(frozen=True)
class Prior:
    """Pictures of what a model knows already and is to keep, learned beside the others.

    path: a folder or table of them. caption: for those without one; they have no trigger.
    weight: of their loss. Each batch has as many of them as of the others.
    """

    path: Path | None = None
    caption: str | None = None
    weight: float = 1.0

    def __post_init__(self):
        check(0 < self.weight <= 100, "prior.weight", self.weight, "more than 0, at most 100")


@dataclass(frozen=True)
class Model:
    """Files of the model that is trained; `transformer` may be "nano" or hold all three."""

    transformer: str | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    tokenizer: Path | None = None

    def __post_init__(self):
        expected = "a Raw checkpoint (file or folder), or nano"
        check(bool(self.transformer), "model.transformer", self.transformer, expected)


@dataclass(frozen=True)
class Adapter:
    """What is trained: an adapter beside the frozen model, or (method "full") the model itself.

    alpha: None is the rank, so that the scale is 1.
    factor: of LoKr, the size of its small Kronecker factor.
    magnitude: of DoRA, what has a length of its own: "columns" or "rows" of the weight. None is
        what readers of output.key_style expect: rows for diffusers, columns for the others.
    start: a LoRA's file that the adapter begins as; None begins at zero.
    """

    method: str = "lora"
    rank: int = 32
    alpha: float | None = None
    targets: str = TARGETS[0]
    factor: int = 16
    magnitude: str | None = None
    start: Path | None = None

    def __post_init__(self):
        whole = self.start is not None and self.method == FULL
        check(
            not whole, "adapter.start", self.start,
            f"none with adapter.method {FULL}, which trains no adapter",
        )  # fmt: skip
        if self.magnitude is not None:
            choice("adapter.magnitude", self.magnitude, (COLUMNS, ROWS))
        choice("adapter.method", self.method, METHODS)
        choice("adapter.targets", self.targets, TARGETS)
        check(1 <= self.rank <= 4096, "adapter.rank", self.rank, "1 to 4096")
        check(2 <= self.factor <= 1024, "adapter.factor", self.factor, "2 to 1024")
        alpha = self.alpha
        check(alpha is None or alpha > 0, "adapter.alpha", alpha, "more than 0, or none")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class Steps:
    """The steps of a run and the optimiser.

    steps: optimiser steps, of `accumulate` batches each.
    warmup: steps in which the learning rate rises; decay: share of the steps in which it falls.
    average: decay of an exponential moving average of the weights, which is then what is saved;
        0 saves the weights themselves.
    shift: exponent mu of the times' shift; None is that of the picture's size, as Raw samples.
    spread: standard deviation of the logit-normal times before the shift.
    """

    steps: int = 1500
    batch: int = 1
    accumulate: int = 1
    learning_rate: float = 1e-4
    optimiser: str = OPTIMISERS[0]
    weight_decay: float = 0.01
    warmup: int = 50
    decay: float = 0.2
    clip: float = 1.0
    average: float = 0.0
    shift: float | None = None
    spread: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, low, high in (
            ("steps", 1, 10**7), ("batch", 1, 4096), ("accumulate", 1, 4096), ("clip", 0, 10**6),
            ("seed", 0, 2**32 - 1), ("warmup", 0, 10**7), ("decay", 0, 1), ("spread", 0.01, 10),
            ("weight_decay", 0, 10), ("average", 0, 0.99999), ("learning_rate", 1e-9, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            check(low <= value <= high, f"training.{name}", value, f"{low:g} to {high:g}")
        shift = self.shift
        check(shift is None or abs(shift) <= 100, "training.shift", shift, "-100 to 100")
        choice("training.optimiser", self.optimiser, OPTIMISERS)


@dataclass(frozen=True)
class Memory:
    """How the frozen model is held.

    base: format of the blocks' matrices; "as-is" is the file's own.
    checkpointing: compute a block's activations again in the backward pass instead of holding them.
    offload: blocks' matrices stay in main memory and come to the device one at a time.
    dtype: of the calculation.
    keep: gigabytes of encoded pictures and captions that stay in main memory once a step has read
        them, in each process; 0 reads the files each time.
    """

    device: str = "auto"
    dtype: str | None = None
    base: str = BASES[0]
    checkpointing: bool = True
    offload: bool = False
    keep: float = 1.0

    def __post_init__(self):
        choice("memory.base", self.base, BASES)
        check(
            self.dtype in (None, "bf16", "fp32"), "memory.dtype", self.dtype, "bf16 or fp32"
        )  # fmt: skip
        check(0 <= self.keep <= 10_000, "memory.keep", self.keep, "0 to 10000")


@dataclass(frozen=True)
class Ranks:
    """How a run that torchrun has started uses its processes; alone it has none of this.

    shard: the weights lie in parts over all processes, and are gathered a block at a time; False
        gives each process all of a frozen model. A model that is trained whole is always sharded.
    tensor: processes that compute each block together, a part of its heads and hidden units each.
    copies: of the sharded weights, each in parts over as many processes as the others; one a
        machine keeps the gathering of weights within it.
    """

    shard: bool = True
    tensor: int = 1
    copies: int = 1

    def __post_init__(self):
        check(1 <= self.tensor <= 64, "ranks.tensor", self.tensor, "1 to 64")
        check(1 <= self.copies <= 10_000, "ranks.copies", self.copies, "1 to 10000")


@dataclass(frozen=True)
class Samples:
    """Pictures on the way.

    every: steps between them; 0 makes none. turbo: a Turbo checkpoint (or "nano") that is given the
    adapter for a second picture of each prompt.
    """

    prompts: tuple[str, ...] = ()
    every: int = 250
    size: int | None = None
    steps: int | None = None
    guidance: float | None = None
    turbo: str | None = None
    seed: int = 0

    def __post_init__(self):
        check(0 <= self.every <= 10**7, "samples.every", self.every, "0 or more")
        if self.size is not None:
            check_side("samples.size", self.size)
        steps, guidance = self.steps, self.guidance
        check(steps is None or 1 <= steps <= 10_000, "samples.steps", steps, "1 to 10000")
        ok = guidance is None or 0 <= guidance <= 100
        check(ok, "samples.guidance", guidance, "0 to 100")


@dataclass(frozen=True)
class Output:
    """What is written.

    path: the file of the result. folder: states, samples and logs of the run; None is the result's
    name without its ending. save_every: steps between states that a run resumes from. keep: how
    many results on the way are kept beside the last.
    """

    path: Path | None = None
    folder: Path | None = None
    key_style: str = KEY_STYLES[0]
    save_every: int = 250
    keep: int = 4

    def __post_init__(self):
        check(
            self.path is not None and self.path.suffix == ".safetensors",
            "output.path", self.path, "a name that ends in .safetensors",
        )  # fmt: skip
        choice("output.key_style", self.key_style, KEY_STYLES)
        check(self.save_every >= 1, "output.save_every", self.save_every, "1 or more")
        check(self.keep >= 0, "output.keep", self.keep, "0 or more")

    @property
    def run_folder(self) -> Path:
        assert self.path is not None
        return self.path.with_suffix("") if self.folder is None else self.folder
