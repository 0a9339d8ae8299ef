"""States of a run on disk: weights, averages and optimisers, as safetensors, without pickles."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from krea2_model.checks import by_count, counted
from krea2_model.replacing import replacing

from .sharding import fill

_WEIGHT, _AVERAGE, _OPTIMISER = "weight", "average", "optimiser"
# Between the names of nested values, as bitsandbytes has them.
_WITHIN = "/"


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
    tensors = named_tensors(weights, averages, optimisers)
    tensors = _apart({n: t.detach().cpu().contiguous() for n, t in tensors.items()})
    metadata = {"step": step, "numbers": optimiser_numbers(optimisers), "extra": dict(extra)}
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
        tensors = named_tensors(weights, averages, ())
        foreign_state(path, set(tensors), names)
        for name, tensor in tensors.items():
            fill(tensor, file.get_tensor(name))
        states = {name: file.get_tensor(name) for name in names - tensors.keys()}
    put_optimiser_states(optimisers, states, metadata["numbers"])
    return int(metadata["step"])


def named_tensors(
    weights: Mapping[str, Tensor],
    averages: Mapping[str, Tensor],
    optimisers: Sequence[torch.optim.Optimizer],
) -> dict[str, Tensor]:
    """All tensors of a state by their names in files."""
    tensors = {f"{_WEIGHT}.{n}": t.detach() for n, t in weights.items()}
    tensors |= {f"{_AVERAGE}.{n}": t for n, t in averages.items()}
    return tensors | {n: v for n, v in _optimiser_values(optimisers) if isinstance(v, Tensor)}


def optimiser_numbers(optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """The values of optimisers that are no tensors, by the names of a state."""
    return {n: v for n, v in _optimiser_values(optimisers) if not isinstance(v, Tensor)}


def put_optimiser_states(
    optimisers: Sequence[torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Give optimisers the tensors and numbers of a state."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for key, value in {**numbers, **tensors}.items():
        if key.startswith(_OPTIMISER):
            _, of, parameter, entry = key.split(".", 3)
            found.setdefault((int(of), int(parameter)), {})[entry] = value
    for index, optimiser in enumerate(optimisers):
        states = {
            number: _nested({n: _as_parameter(v, parameter) for n, v in state.items()})
            for number, parameter in enumerate(parameters_of(optimiser))
            if (state := found.get((index, number)))
        }
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": states, "param_groups": groups})


def parameters_of(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """An optimiser's parameters by the numbers that its state has for them."""
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def foreign_state(path: Path, expected: set[str], stored: set[str]) -> None:
    """Raise ValueError where a state has other weights than a run."""
    other = sorted(expected ^ {name for name in stored if not name.startswith(_OPTIMISER)})
    if other:
        raise ValueError(
            f"{path} is a state of another run: {counted(len(other), 'weight')} "
            f"{by_count(len(other), 'differs', 'differ')}, such as {other[0]}. Choose another "
            "output.folder, or remove that one."
        )


def _optimiser_values(optimisers: Sequence[torch.optim.Optimizer]):
    for index, optimiser in enumerate(optimisers):
        for parameter, state in optimiser.state_dict()["state"].items():
            for name, value in _flat(state):
                yield f"{_OPTIMISER}.{index}.{parameter}.{name}", value


def _flat(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """An optimiser's values of a parameter, by joined names where they are nested."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}{_WITHIN}{inner}", own) for inner, own in _flat(value))
        else:
            yield name, value


def _nested(state: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `_flat` as they were."""
    result: dict[str, Any] = {}
    for name, value in state.items():
        part, (*outer, last) = result, name.split(_WITHIN)
        for one in outer:
            part = part.setdefault(one, {})
        part[last] = value
    return result


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with a storage each, as safetensors needs them: tables may be shared."""
    known: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if place in known else tensor
        known.add(place)
    return result


def _as_parameter(value: Any, parameter: Tensor) -> Any:
    """A value of a file, sharded as its parameter is where it is of its shape."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    if type(value) is type(parameter.data):
        return value
    result = torch.zeros_like(parameter, dtype=value.dtype)
    fill(result, value)
    return result


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["state"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as the state of a run ({error}). Remove it to begin anew."
        ) from error
