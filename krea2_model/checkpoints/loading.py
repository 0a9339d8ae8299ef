"""Load one part of Krea 2: its module on the meta device, and a file's tensors as its weights.

A path is a safetensors or GGUF file (a part alone, with or without a prefix, or all-in-one) or a
diffusers folder (the pipeline's or one part's, sharded or not); a `Checkpoint` of tensors in
memory stands for one too. Each part has a `read_...` that gives its `PartState`, and `load_part`
makes the module of it. Tensors are mapped from the file and become weights without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..config import Preset
from ..devices import find_device, find_dtype
from ..nn.layers import TorchLayers
from .identify import WHERE, CheckpointError
from .quantised import dequantise, is_quantised, refuse_integers
from .quantised_layers import put_quantised_layers, stored_names
from .transformer_keys import is_norm_or_table

# The dtype that quantised weights are calculated in, unless the caller chooses.
PLAIN = torch.bfloat16

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class PartState:
    """A part of a checkpoint: its weights by module name, and how its module is built.

    kind: as `identify` names it, for messages.
    build: makes the module; takes `layers`, `device` and `dtype`.
    dtype: of the matrices, unless the caller chooses.
    variant, preset: of a transformer; the preset holds its sampling defaults.
    """

    path: Path
    kind: str
    config: Any
    tensors: dict[str, Any]
    build: Callable[..., Any]
    dtype: torch.dtype
    variant: str | None = None
    preset: Preset | None = None

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype that most weights are stored in; some files keep a few matrices in another."""
        return most_common_dtype(self.tensors)


def load_part(
    state: PartState,
    device="cpu",
    dtype: torch.dtype | str | None = None,
    layers=None,
    keep_quantised: bool = False,
):
    """Build a part's module with its weights, strictly and in evaluation mode.

    device: "auto" is the machine's accelerator, or else the CPU.
    dtype: of matrices and biases, None takes the state's. Norm scales and tables of a transformer
        keep the precision they are stored in.
    keep_quantised: let linear layers hold what a quantised file holds, see `quantised_layers`.
        Ignored where layers are given, and for a file that is quantised in a small part only
        (most of it is in another dtype than `PLAIN`).
    Raises CheckpointError as `assign` does.
    """
    device, dtype = find_device(device), find_dtype(dtype)
    module = state.build(layers=layers or TorchLayers, device="meta")
    dtype, plain_dtype = dtype or state.dtype, dtype or PLAIN
    name = state.path.name
    if keep_quantised and layers is None and dtype == plain_dtype:
        tensors = put_quantised_layers(module, state.tensors, name, dtype)
    else:
        tensors = dequantise(state.tensors, name, plain_dtype)
    quantised = stored_names(module)
    for key, tensor in tensors.items():
        if key in quantised:
            continue
        if not is_norm_or_table(key):
            tensors[key] = tensor.to(dtype)
        elif tensor.element_size() < 2:
            tensors[key] = tensor.float()
    return assign(module, tensors, state.path, state.kind, device)


def stored_dtype(tensor: Any) -> torch.dtype:
    """A weight's dtype; `PLAIN` where it is quantised or missing."""
    return PLAIN if tensor is None or is_quantised(tensor) else tensor.dtype


def most_common_dtype(
    tensors: Mapping[str, Any], of_quantised: torch.dtype | None = None
) -> torch.dtype:
    """The dtype that most numbers have.

    of_quantised: the dtype that quantised weights count as. Without it they count as stored, and
        blocks of a GGUF file not at all.
    """
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if of_quantised is not None and is_quantised(tensor):
            sizes[of_quantised] = sizes.get(of_quantised, 0) + tensor.numel()
        elif isinstance(tensor, Tensor):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def assign(
    module: Module, tensors: dict[str, Tensor], path: Path, kind: str, device="cpu"
) -> Module:
    """Make tensors a meta module's weights, strictly and without a copy, in evaluation mode.

    Raises CheckpointError naming missing, surplus and misshapen tensors, and any vector (norm,
    table, bias) that holds NaN or infinity.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_tensors(shapes, tensors, path, kind, stored_names(module))
    # Before: a host's tensors may be of inference mode, which take no gradients.
    module.requires_grad_(False).load_state_dict(tensors, strict=True, assign=True)
    return module.eval().to(device)


def check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    path: Path,
    kind: str,
    quantised: Collection[str] = (),
) -> None:
    """Raise CheckpointError unless `tensors` have the expected shapes and finite vectors.

    quantised: names of tensors that may be integers.
    """
    missing = sorted(expected.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - expected.keys())
    misshapen = [
        f"{name} is {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems = [
        f"{len(names)} {word} (such as {', '.join(names[:3])})"
        for word, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen))
        if names
    ]
    if problems:
        _raise_unusable(path, kind, f"its tensors do not fit: {'; '.join(problems)}")
    refuse_integers({n: t for n, t in tensors.items() if n not in quantised}, path.name)
    for name, tensor in tensors.items():
        vector = tensor.ndim == 1 and tensor.is_floating_point() and tensor.element_size() > 1
        if vector and not torch.isfinite(tensor).all():
            _raise_unusable(path, kind, f"{name} holds NaN or infinity")


@contextmanager
def explain_bad_shapes(path: Path, kind: str) -> Iterator[None]:
    """Turn errors of inferring sizes from tensors' shapes into CheckpointErrors.

    A file may hold any shapes, and the arithmetic on them fails in as many ways.
    """
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        _raise_unusable(path, kind, str(error))
    except (IndexError, KeyError, TypeError, ZeroDivisionError, OverflowError, RuntimeError):
        _raise_unusable(path, kind, "its tensors have shapes that do not belong together")


def _raise_unusable(path: Path, kind: str, problem: str) -> NoReturn:
    raise CheckpointError(
        f"{path.name} cannot be used as {kind}: {problem.rstrip('.')}. "
        f"Download it again, for example {WHERE[kind]}."
    )
