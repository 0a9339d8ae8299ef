"""The function of each command, by the kind of its settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .config import (
    DistilConfig,
    PreferConfig,
    PretrainConfig,
    RewardConfig,
    RunConfig,
    SliderConfig,
    TrainConfig,
)
from .distil import distil
from .prefer import prefer
from .pretrain import pretrain
from .reward import reward
from .session import OnStep
from .slider import slider
from .train import train

_COMMANDS: dict[type[RunConfig], Callable[..., Path]] = {
    TrainConfig: train,
    DistilConfig: distil,
    PreferConfig: prefer,
    PretrainConfig: pretrain,
    RewardConfig: reward,
    SliderConfig: slider,
}


def run_command(config: RunConfig, on_step: OnStep, *, quiet: bool = False) -> Path:
    """Run the command that the settings are of; returns the file of the result.

    quiet: no bars while pictures and texts are encoded.
    """
    return _COMMANDS[type(config)](config, on_step, quiet=quiet)
