"""States of a run on disk: weights, averages and optimisers, as safetensors, without pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from krea2_model.replacing import replacing

_WEIGHT, _AVERAGE, _OPTIMISER = "weight", "average", "optimiser"


def save_state(
    path: Path,
    step: int,
    weights: Mapping[str, Tensor],
    averages: Mapping[str, Tensor],
    optimisers: Sequence[torch.optim.Optimizer],
    extra: Mapping[str, Any],
) -> None:
    """Write a state whole or not at all; the one before stays until this one is complete.

    extra: JSON values, such as a fingerprint of the settings.
    """
    tensors = {f"{_WEIGHT}.{n}": t for n, t in weights.items()}
    tensors |= {f"{_AVERAGE}.{n}": t for n, t in averages.items()}
    numbers: dict[str, Any] = {}
    for index, optimiser in enumerate(optimisers):
        for parameter, state in optimiser.state_dict()["state"].items():
            for name, value in state.items():
                key = f"{_OPTIMISER}.{index}.{parameter}.{name}"
                if isinstance(value, Tensor):
                    tensors[key] = value
                else:
                    numbers[key] = value
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    metadata = {"step": step, "numbers": numbers, "extra": dict(extra)}
    with replacing(path) as partial:
        save_file(tensors, partial, {"state": json.dumps(metadata)})


def read_state_header(path: Path) -> tuple[int, dict[str, Any]]:
    """The step and the extra values of a state. Raises ValueError for a damaged file."""
    metadata = _metadata(path)
    return int(metadata["step"]), metadata["extra"]


@torch.no_grad()
def load_state(
    path: Path,
    weights: Mapping[str, Tensor],
    averages: dict[str, Tensor],
    optimisers: Sequence[torch.optim.Optimizer],
) -> int:
    """Fill weights, averages and optimisers from a state; returns its step.

    Raises ValueError for a damaged file, or one of a run that trained other weights.
    """
    metadata = _metadata(path)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        expected = {f"{_WEIGHT}.{n}" for n in weights} | {f"{_AVERAGE}.{n}" for n in averages}
        found = {name for name in names if not name.startswith(_OPTIMISER)}
        if expected != found:
            other = sorted(expected ^ found)
            raise ValueError(
                f"{path} is a state of another run: {len(other)} weights differ, such as "
                f"{other[0]}. Choose another output.folder, or remove that one."
            )
        for name, tensor in weights.items():
            tensor.copy_(file.get_tensor(f"{_WEIGHT}.{name}"))
        for name in averages:
            averages[name].copy_(file.get_tensor(f"{_AVERAGE}.{name}"))
        for index, optimiser in enumerate(optimisers):
            state: dict[int, dict[str, Any]] = {}
            prefix = f"{_OPTIMISER}.{index}."
            for key in names | metadata["numbers"].keys():
                if key.startswith(prefix):
                    parameter, _, name = key.removeprefix(prefix).partition(".")
                    value = metadata["numbers"].get(key)
                    value = file.get_tensor(key) if key in names else value
                    state.setdefault(int(parameter), {})[name] = value
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": state, "param_groups": groups})
    return int(metadata["step"])


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["state"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as the state of a run ({error}). Remove it to begin anew."
        ) from error
