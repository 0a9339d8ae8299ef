"""The sections of settings of single commands, beside those that they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krea2_model.checks import counted

from .checks import check, check_sides

MAX_STEPS = 16  # of a few-step LoRA


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
        check_sides("stages.resolution", self.resolution)
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
