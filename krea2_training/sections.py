"""The sections of settings that the commands share, as in a TOML file, checked when they are made.

Nothing here imports torch, so that a wrong setting is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from krea2_model.checks import counted
from krea2_model.images.sizes import MULTIPLE
from krea2_model.lora.names import KEY_STYLES, TARGETS

FULL = "full"
METHODS = ("lora", "dora", "lokr", FULL)
OPTIMISERS = ("adamw", "adamw8bit", "muon")
BASES = ("as-is", "bf16", "fp8", "int8", "4bit")
COLUMNS, ROWS = "columns", "rows"
EDITS = ("references", "identity", "ai-toolkit")
NANO = "nano"
MAX_REFERENCES = 2
MAX_STEPS = 16  # of a few-step LoRA


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
        _check_sides("data.resolution", self.resolution)
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


@dataclass(frozen=True)
class Stages:
    """Stages of pretraining, one after the other: an entry of each list is of one stage.

    resolution: side of a square of the pictures' area. steps: of the optimiser. batch: pictures in
    a step; none is training.batch for all. shift: exponent mu of the times' shift; none is that of
    the pictures' size. rate: factor on the learning rate; none is 1. mask: how far pictures' masks
    weigh the loss, from 0, not at all, to 1; none is 1.
    draws: of noise for each picture of a batch, whose caption is fused once for all of them.
    """

    resolution: tuple[int, ...] = (256, 512, 1024)
    steps: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    shift: tuple[float, ...] = ()
    rate: tuple[float, ...] = ()
    mask: tuple[float, ...] = ()
    draws: int = 1

    def __post_init__(self):
        count = len(self.resolution)
        _check_sides("stages.resolution", self.resolution)
        for name, low, high in (
            ("steps", 1, 10**7),
            ("batch", 1, 4096),
            ("shift", -100, 100),
            ("rate", 0, 100),
            ("mask", 0, 1),
        ):
            values = getattr(self, name)
            ok = len(values) == count or (not values and name != "steps")
            expected = f"{counted(count, 'number')}, one for each stage of stages.resolution"
            check(ok, f"stages.{name}", list(values), expected)
            ok = all(low <= value <= high for value in values)
            check(ok, f"stages.{name}", list(values), f"numbers from {low} to {high}")
        check(1 <= self.draws <= 4096, "stages.draws", self.draws, "1 to 4096")


@dataclass(frozen=True)
class Distil:
    """A LoRA for few steps without guidance.

    steps: of its sampling; several train for each in turn, and the largest is what it asks for.
    mu: of its schedule's shift. guidance: of the teacher; None is the checkpoint's own.
    fake_updates: of the model that follows the student, before each of the student's.
    dropout: share of prompts that are replaced by the empty one, which pictures of regions and
    images without words are painted with.
    teacher: file of the Raw that is distilled where `model.transformer` is a few-step checkpoint,
        from which the student begins; None is the model itself. "nano" is the built-in one.
    """

    steps: tuple[int, ...] = (8,)
    mu: float = 1.15
    guidance: float | None = None
    fake_updates: int = 4
    dropout: float = 0.05
    teacher: str | None = None

    def __post_init__(self):
        steps = self.steps
        ok = len(steps) > 0 and all(1 <= count <= MAX_STEPS for count in steps)
        check(ok, "distil.steps", list(steps), f"1 to {MAX_STEPS}")
        check(abs(self.mu) <= 100, "distil.mu", self.mu, "-100 to 100")
        guidance = self.guidance
        check(
            guidance is None or 0 <= guidance <= 100, "distil.guidance", guidance, "0 to 100"
        )  # fmt: skip
        check(1 <= self.fake_updates <= 100, "distil.fake_updates", self.fake_updates, "1 to 100")
        check(0 <= self.dropout <= 1, "distil.dropout", self.dropout, "0 to 1")


@dataclass(frozen=True)
class Prefer:
    """beta: how strongly a pair's margin counts. hold: weight of the winner's own likelihood.

    hold 0 is plain DPO, which drifts.
    """

    beta: float = 1000.0
    hold: float = 1.0

    def __post_init__(self):
        check(0 < self.beta <= 1e6, "prefer.beta", self.beta, "more than 0, at most 1e6")
        check(0 <= self.hold <= 1000, "prefer.hold", self.hold, "0 to 1000")


@dataclass(frozen=True)
class Slider:
    """A LoRA whose strength moves pictures from a negative wording of prompts to a positive one.

    positive, negative: words after each prompt, or a wording with {} for it.
    scale: how far strength 1 goes, in differences of the two. steps: of the pictures on whose way
    it is trained.
    """

    positive: str = ""
    negative: str = ""
    scale: float = 1.0
    steps: int = 8

    def __post_init__(self):
        for name in ("positive", "negative"):
            words = getattr(self, name)
            check(bool(words.strip()), f"slider.{name}", repr(words), 'words, such as "very old"')
        differs = self.positive != self.negative
        check(differs, "slider.negative", repr(self.negative), "other words than slider.positive")
        check(0 < self.scale <= 100, "slider.scale", self.scale, "more than 0, at most 100")
        check(1 <= self.steps <= 100, "slider.steps", self.steps, "1 to 100")


@dataclass(frozen=True)
class Reward:
    """Learning from scores of the model's own pictures, painted without guidance.

    rewards: each a `file.py:function`, a `package.module:function` or the address of a server.
    weights: of the rewards, in their order; none are all 1.
    group_size: pictures of a prompt, which are compared. groups: of a step, each of one prompt.
    rollout_steps: of the pictures' sampling. random_steps: how many of them draw noise, and are
    trained; which ones changes with each step of the run.
    noise: level of that noise, the paper's a.
    updates: of the weights for each step's pictures, which share its groups.
    clip: most that a step's likelihood may change in them, as a share; 0 is no limit.
    kl: weight of the divergence from the model without the adapter.
    spread: standard deviation of a group's scores up to which they are taken as equal.
    rest: how many times a prompt without differences is passed over when its turn comes.
    """

    rewards: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    group_size: int = 8
    groups: int = 4
    rollout_steps: int = 8
    random_steps: int = 3
    noise: float = 0.7
    updates: int = 1
    clip: float = 1e-3
    kl: float = 0.01
    spread: float = 1e-4
    rest: int = 2

    def __post_init__(self):
        expected = "file.py:function, package.module:function or an address"
        check(len(self.rewards) > 0, "reward.rewards", "not set", expected)
        twice = len(set(self.rewards)) < len(self.rewards)
        check(not twice, "reward.rewards", list(self.rewards), "each reward once")
        weights = self.weights
        right = len(weights) in (0, len(self.rewards)) and all(0 < abs(w) <= 1000 for w in weights)
        check(
            right, "reward.weights", list(weights),
            f"{counted(len(self.rewards), 'number')} other than 0, one for each reward",
        )  # fmt: skip
        for name, low, high in (
            ("group_size", 2, 1024), ("groups", 1, 4096), ("rollout_steps", 2, 100),
            ("noise", 0.01, 10), ("updates", 1, 4096), ("clip", 0, 1), ("kl", 0, 1000),
            ("spread", 0, 10**6), ("rest", 0, 10**6),
        ):  # fmt: skip
            value = getattr(self, name)
            check(low <= value <= high, f"reward.{name}", value, f"{low:g} to {high:g}")
        most = self.rollout_steps - 1
        check(
            1 <= self.random_steps <= most, "reward.random_steps", self.random_steps,
            f"1 to {most}: all of reward.rollout_steps but the last, which adds no noise",
        )  # fmt: skip
        check(
            self.updates <= self.groups, "reward.updates", self.updates,
            f"at most reward.groups, {self.groups}",
        )  # fmt: skip

    @staticmethod
    def relative_to(table: dict[str, Any], folder: Path) -> None:
        """Make paths of a TOML file's section relative to its folder."""
        rewards = table.get("rewards", ())
        names = [rewards] if isinstance(rewards, str) else rewards
        if not all(isinstance(name, str) for name in names):
            return  # refused later
        is_file = (name.rpartition(":")[0].endswith(".py") for name in names)
        table["rewards"] = [
            str(folder / name) if is_path else name
            for name, is_path in zip(names, is_file, strict=True)
        ]


def expected_one_of(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), 1, 0.6)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"expected one of {', '.join(known)}.{hint}"


def check(is_right: bool, name: str, value: Any, expected: str) -> None:
    if not is_right:
        given = "not set" if value is None else f"{value}"
        raise ValueError(f"{name} is {given}; expected {expected}.")


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; {expected_one_of(value, choices)}")


def check_side(name: str, side: int) -> None:
    """Raise ValueError for a side, in pixels, that pictures are not trained at."""
    check(_is_side(side), name, side, f"a multiple of {MULTIPLE} from 64 to 4096")


def _check_sides(name: str, sides: tuple[int, ...]) -> None:
    ok = len(sides) > 0 and all(map(_is_side, sides))
    check(ok, name, list(sides), f"multiples of {MULTIPLE} from 64 to 4096")


def _is_side(side: int) -> bool:
    return 64 <= side <= 4096 and side % MULTIPLE == 0
