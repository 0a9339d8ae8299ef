"""Merges of fine-tunes, tensor by tensor: averages over a run, weighted sums, task arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from krea2_model.checkpoints.checkpoint import Checkpoint, open_checkpoint
from krea2_model.checkpoints.identify import CheckpointError
from krea2_model.checkpoints.quantised import is_quantised
from krea2_model.checkpoints.storage import Entry, write_safetensors
from krea2_model.checkpoints.transformer import preset_metadata, read_transformer
from krea2_model.checkpoints.transformer_keys import module_to_official
from krea2_model.checks import counted


def merge(
    models: Sequence[tuple[Path, float]],
    output: Path,
    base: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Merge transformers, or adapters, into a file; returns it.

    models: files and their weights. Without a base the weights are normalised: equal ones give the
        average of checkpoints. With a base it is task arithmetic: `base + sum(w * (model - base))`.
    progress: called with the bytes written so far and in all.

    Calculated in float32, one tensor at a time, and stored in the first file's dtypes. Adapters
    of one rank are averaged matrix by matrix, which is right for the checkpoints of one run alone:
    the average of products is not the product of averages.
    Raises ValueError for files that do not fit together, before anything is written.
    """
    if not models:
        raise ValueError("There is nothing to merge; expected at least one file.")
    if output.suffix != ".safetensors":
        raise ValueError(f"The output is {output}; expected a name that ends in .safetensors.")
    paths = [path for path, _ in models] + ([] if base is None else [base])
    for path in paths:
        if output.exists() and path.exists() and output.samefile(path):
            raise ValueError(f"{output} is one of the files that are merged; name another output.")
    weights = [weight for _, weight in models]
    if base is None:
        total = sum(weights)
        if abs(total) < 1e-6:
            raise ValueError(
                f"The weights {weights} sum to {total:g}, and are normalised to 1; expected a sum "
                "above 0. Name a base to add differences instead."
            )
        weights = [weight / total for weight in weights]
    parts = [_tensors(path) for path in paths]
    first, metadata = parts[0]
    for path, (tensors, _) in zip(paths[1:], parts[1:], strict=True):
        _check_same(paths[0], first, path, tensors)
    own = [tensors for tensors, _ in (parts if base is None else parts[:-1])]
    origin = None if base is None else parts[-1][0]

    def entry(name: str) -> Entry:
        def make() -> Tensor:
            start = torch.zeros(()) if origin is None else origin[name].float()
            result = start.clone()
            for weight, tensors in zip(weights, own, strict=True):
                result = result + weight * (tensors[name].float() - start)
            return result.to(first[name].dtype)

        return Entry(name, first[name].dtype, tuple(first[name].shape), make)

    output.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(output, [entry(name) for name in first], metadata, progress)
    return output


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A transformer's tensors by official names, or an adapter's by its own; and its metadata."""
    checkpoint = open_checkpoint(path, "transformer")
    if _is_adapter(checkpoint):
        tensors = dict(checkpoint.tensors)
        metadata = dict(checkpoint.metadata)
    else:
        state = read_transformer(checkpoint)
        tensors = {module_to_official(name): tensor for name, tensor in state.tensors.items()}
        metadata = {"format": "pt", **preset_metadata(state.variant, state.preset)}
    for name, tensor in tensors.items():
        if is_quantised(tensor) or not tensor.is_floating_point():
            raise ValueError(
                f"{path.name} holds {name} quantised; merges are of 16-bit files. Merge those, and "
                "quantise the result with krea2 convert."
            )
    return tensors, metadata


def _is_adapter(checkpoint: Checkpoint) -> bool:
    return any("lora_" in name or "lokr_" in name for name in checkpoint.tensors)


def _check_same(
    first: Path, expected: Mapping[str, Tensor], path: Path, tensors: Mapping[str, Tensor]
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    others = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    different = sorted(n for n in shapes.keys() | others.keys() if shapes.get(n) != others.get(n))
    if different:
        name = different[0]
        raise CheckpointError(
            f"{path.name} and {first.name} differ in {counted(len(different), 'tensor')}, such as "
            f"{name} ({others.get(name, 'none')} and {shapes.get(name, 'none')}); expected the "
            "same model."
        )
