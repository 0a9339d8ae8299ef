"""States of a run whose weights are sharded, by torch.distributed.checkpoint.

A state is a folder of safetensors, one of each process, and `state.json`, which is written last: a
folder without it is not complete. Any number of processes reads it, one too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krea2_model.replacing import replacing

from .states import (
    foreign_state,
    named_tensors,
    optimiser_numbers,
    parameters_of,
    put_optimiser_states,
)
from .world import World

_PREFIX, _HEADER = "state_step", "state.json"


def save_sharded(
    folder: Path,
    world: World,
    step: int,
    weights: Mapping[str, Tensor],
    averages: Mapping[str, Tensor],
    optimisers: Sequence[torch.optim.Optimizer],
    extra: Mapping[str, Any],
) -> None:
    """Write a state beside the one before, which is removed once this one is complete."""
    import torch.distributed.checkpoint as dcp

    own = folder / f"{_PREFIX}{step:08}"
    with world.together():
        if world.is_first:
            shutil.rmtree(own, ignore_errors=True)  # of a run that ended while it was written
            own.mkdir(parents=True)
    tensors = named_tensors(weights, averages, optimisers)
    writer = dcp.HuggingFaceStorageWriter(str(own), save_distributed=True)
    dcp.save(tensors, storage_writer=writer)  # its last step is a collective one
    with world.together():
        if world.is_first:
            header = {"step": step, "numbers": optimiser_numbers(optimisers), "extra": dict(extra)}
            with replacing(own / _HEADER) as partial:
                partial.write_text(json.dumps(header), encoding="utf-8")
            for old in _folders(folder):
                if old != own:
                    shutil.rmtree(old)


def newest_state(folder: Path) -> Path | None:
    """The last complete state in a run's folder, None where there is none."""
    complete = [state for state in _folders(folder) if (state / _HEADER).is_file()]
    return complete[-1] if complete else None


def forget_sharded(folder: Path) -> None:
    """Remove the states of a run's folder."""
    for state in _folders(folder):
        shutil.rmtree(state)


def read_sharded_header(state: Path) -> tuple[int, dict[str, Any]]:
    """The step and the extra values of a state. Raises ValueError for a damaged one."""
    header = _header(state)
    return int(header["step"]), header["extra"]


@torch.no_grad()
def load_sharded(
    state: Path,
    world: World,
    weights: Mapping[str, Tensor],
    averages: dict[str, Tensor],
    optimisers: Sequence[torch.optim.Optimizer],
) -> int:
    """Fill weights, averages and optimisers, sharded or not, from a state; returns its step.

    Raises ValueError for a damaged state, or one of a run that trained other weights.
    """
    import torch.distributed.checkpoint as dcp

    header, reader = _header(state), dcp.HuggingFaceStorageReader(str(state))
    try:
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise _damaged(state, error) from error
    tensors = named_tensors(weights, averages, ())
    foreign_state(state, set(tensors), set(stored))
    # Optimisers have no tensors yet: each is as its parameter, or of another shape and whole.
    parameters = [parameters_of(optimiser) for optimiser in optimisers]
    for name, entry in stored.items():
        if name not in tensors:
            _, number, parameter, _ = name.split(".", 3)
            like, size = parameters[int(number)][int(parameter)], entry.size
            dtype = entry.properties.dtype
            is_like = size == like.shape
            tensors[name] = (
                torch.zeros_like(like, dtype=dtype) if is_like else torch.zeros(size, dtype=dtype)
            )
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=world.count == 1)
    except Exception as error:
        raise _damaged(state, error) from error
    put_optimiser_states(optimisers, tensors, header["numbers"])
    return int(header["step"])


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def _header(state: Path) -> dict[str, Any]:
    try:
        return json.loads((state / _HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(state, error) from error


def _damaged(state: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{state} cannot be read as the state of a run ({error}). Remove it to begin anew."
    )
