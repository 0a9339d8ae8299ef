"""A LoRA of the difference between two transformers, by the singular values of each layer's.

The best approximation of a matrix by one of a lower rank keeps its largest singular values (Eckart
and Young, 1936). One layer of each file is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.identify import TRANSFORMER, CheckpointError
from ..checkpoints.loading import check_tensors
from ..checkpoints.quantised import BESIDE, quantised_weights
from ..checkpoints.transformer import STEPS_KEY, read_transformer
from ..checkpoints.transformer_keys import is_norm_or_table
from ..checks import as_path, is_number, is_whole
from ..config import TURBO
from ..devices import find_device, find_dtype
from ..lora.few_steps import MAX_STEPS
from ..lora.names import DIFFUSERS, KEY_STYLES, TARGETS, is_target, layer_in_files
from ..replacing import replacing

ALL = "all"
EXTRACTED = (ALL, *TARGETS)
_MOST = 4096  # the highest rank
# Matrices with a larger smaller side get their largest singular values by iteration.
_EXACT = 1024
_ITERATIONS, _SPARE = 6, 32
_EXTRACT_KEY = "krea2.extract"
_SHARES = ("held", "beyond_rank", "other_layers", "vectors")


@dataclass
class Extraction:
    """The file of a LoRA, and where the squared difference of two transformers is, in shares of it.

    held: in the LoRA. beyond_rank: in the same layers, beyond the rank. other_layers: in matrices
    that the targets leave out. vectors: in norms, tables and biases, which no LoRA reaches.
    differences: True if the file has the vectors' differences beside the LoRA. ranks: by layer.
    """

    path: Path
    held: float = 0.0
    beyond_rank: float = 0.0
    other_layers: float = 0.0
    vectors: float = 0.0
    differences: bool = False
    ranks: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        least, most = min(self.ranks.values()), max(self.ranks.values())
        rank = f"rank {most}" if least == most else f"ranks {least} to {most}"
        stored = ", stored as they are" if self.differences else ", which a LoRA does not reach"
        rest = [
            f"{_percent(share)} {where}"
            for share, where in (
                (self.beyond_rank, "beyond the rank"),
                (self.other_layers, "in layers that were left out"),
                (self.vectors, f"in norms, tables and biases{stored}"),
            )
            if share > 0
        ]
        return (
            f"{self.path.name} holds {_percent(self.held)} of the squared difference in {rank} of "
            f"{len(self.ranks)} layers" + "".join(f"; {words}" for words in rest)
        )


def extract_lora(
    fine_tune: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    rank: int = 64,
    keep: float | None = None,
    targets: str = ALL,
    key_style: str = KEY_STYLES[0],
    differences: bool = False,
    dtype: torch.dtype | str = torch.bfloat16,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Write the difference of two transformers of the same sizes as a LoRA.

    fine_tune, base: files or diffusers folders; quantised ones count by their values. The LoRA on
        the base is near the fine-tune. Of a Turbo from a Raw it is a few-step LoRA, whose
        metadata says so.
    rank: the most of each layer. keep: share of a layer's squared difference, above 0 and at most
        1, that is enough: its rank is then the lowest one that holds it.
    targets: "all" linear layers, or those of a group that adapters are trained beside: "blocks",
        "attention", "mlp", "blocks+text".
    key_style: "ai-toolkit", "kohya" or "diffusers". differences: store what norms, tables and
        biases differ by too, as `.diff` and `.diff_b`, which ComfyUI reads and diffusers does not.
    dtype: of the matrices. device: for the calculation, which is in float32.
    progress: called with the weights done so far and in all.
    Returns the file with the shares of what it holds. Raises ValueError for files that do not
    belong together, are the same or hold the same, before anything is written.
    """
    output = as_path(output, "output")
    _check_settings(output, rank, keep, targets, key_style, differences)
    kind, device = find_dtype(dtype), find_device(device)
    own, other = _paths(as_path(fine_tune, "fine_tune"), as_path(base, "base"), output)
    tuned, plain = _Values(own), _Values(other)
    tuned.check_same(plain)
    tensors: dict[str, Tensor] = {}
    found = Extraction(output)
    for number, name in enumerate(tuned.shapes, 1):
        difference = tuned.read(name, device) - plain.read(name, device)
        size = float(difference.square().sum(dtype=torch.float64))
        if not size < float("inf"):
            raise CheckpointError(
                f"{name} holds NaN or infinity in {own.name} or {other.name}. Use another file."
            )
        layer, is_weight = name.removesuffix(".weight"), name.endswith(".weight")
        if not is_weight or difference.ndim != 2 or is_norm_or_table(name):
            found.vectors += size
            if size and differences:
                tensors |= _as_difference(name, difference)
                found.differences = True
        elif size and (targets == ALL or is_target(layer, targets)):
            up, down, part = _low_rank(difference, rank, keep)
            tensors |= _as_lora(layer, up.to(kind), down.to(kind), key_style)
            found.ranks[layer] = len(down)
            found.held += part
            found.beyond_rank += max(0.0, size - part)
        else:
            found.other_layers += size
        if progress is not None:
            progress(number, len(tuned.shapes))
    total = sum(getattr(found, name) for name in _SHARES)
    if not found.ranks:
        same = "differ in no layer of these targets" if total else "hold the same values"
        raise CheckpointError(
            f"{own.name} and {other.name} {same} ({targets}): there is nothing to extract."
        )
    for name in _SHARES:
        setattr(found, name, getattr(found, name) / total)
    settings = {"fine_tune": own.name, "base": other.name, "rank": rank, "keep": keep,
                "targets": targets, "held": round(found.held, 6)}  # fmt: skip
    metadata = {
        "format": "pt",
        "modelspec.architecture": "krea2/lora",
        "ss_base_model_version": "krea2",
        "ss_network_dim": str(max(found.ranks.values())),
        "ss_network_alpha": str(max(found.ranks.values())),
        _EXTRACT_KEY: json.dumps(settings),
        **_few_steps(tuned, plain),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as partial:
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, partial, metadata)
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


class _Values:
    """A transformer's weights by the module's names, read and made plain one at a time."""

    def __init__(self, path: Path):
        self.state = read_transformer(open_checkpoint(path, "transformer"))
        self.path, stored = path, self.state.tensors
        self._quantised = quantised_weights(stored, path.name)
        self._plain = {
            name: tensor
            for name, tensor in stored.items()
            if name not in self._quantised and not name.endswith(BESIDE)
        }
        module = self.state.build(device="meta")
        self.shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
        hollow = {
            name: torch.empty(weight.shape, device="meta")
            for name, weight in self._quantised.items()
        }
        check_tensors(self.shapes, {**self._plain, **hollow}, path, TRANSFORMER)

    def check_same(self, other: _Values) -> None:
        """Raise CheckpointError for a model of other sizes."""
        mine, theirs = self.state.config, other.state.config
        different = [f.name for f in fields(mine)
                     if getattr(mine, f.name) != getattr(theirs, f.name)]  # fmt: skip
        if different:
            name = different[0]
            raise CheckpointError(
                f"{self.path.name} and {other.path.name} are of different sizes: {name} is "
                f"{getattr(mine, name)} and {getattr(theirs, name)}; expected a model and what it "
                "was trained from."
            )

    def read(self, name: str, device: torch.device) -> Tensor:
        """A weight in float32."""
        if name in self._quantised:
            return self._quantised[name].dequantise(torch.float32).to(device)
        return self._plain[name].to(device).float()


def _check_settings(
    output: Path, rank: int, keep: float | None, targets: str, key_style: str, differences: bool
) -> None:
    if output.suffix != ".safetensors":
        raise ValueError(f"output is {output}; expected a name that ends in .safetensors.")
    if output.is_dir():
        raise ValueError(f"output is {output}, a folder; expected the name of a file.")
    if not is_whole(rank) or not 1 <= rank <= _MOST:
        raise ValueError(f"rank is {rank!r}; expected a whole number from 1 to {_MOST}.")
    if keep is not None and not (is_number(keep) and 0 < keep <= 1):
        raise ValueError(f"keep is {keep!r}; expected a share above 0, at most 1, or None.")
    for name, value, known in (
        ("targets", targets, EXTRACTED), ("key_style", key_style, KEY_STYLES),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}.")
    if differences and key_style == DIFFUSERS:
        raise ValueError(
            "differences are for ComfyUI and this package: diffusers reads none. Choose the "
            "key_style ai-toolkit or kohya, or leave them out."
        )


def _paths(fine_tune: Path, base: Path, output: Path) -> tuple[Path, Path]:
    if fine_tune.exists() and base.exists() and fine_tune.samefile(base):
        raise ValueError(f"{fine_tune} is both the fine-tune and the base; name two files.")
    for path in (fine_tune, base):
        if output.exists() and path.exists() and output.samefile(path):
            raise ValueError(f"{output} is one of the two files; name another output.")
        if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"{output} lies in {path}, one of the two models; name another output."
            )
    return fine_tune, base


def _as_lora(layer: str, up: Tensor, down: Tensor, key_style: str) -> dict[str, Tensor]:
    name = layer_in_files(layer, key_style)
    if key_style != "kohya":
        return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    alpha = torch.tensor(float(len(down)))
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}


def _as_difference(name: str, difference: Tensor) -> dict[str, Tensor]:
    # Bare parameters have no name of kohya's in ComfyUI.
    layer, _, part = name.rpartition(".")
    ending = "diff_b" if part == "bias" else "diff"
    return {f"{layer_in_files(layer, KEY_STYLES[0])}.{ending}": difference}


def _few_steps(tuned: _Values, plain: _Values) -> dict[str, str]:
    """Metadata by which what makes a Turbo of a Raw is known as a few-step LoRA."""
    preset, variants = tuned.state.preset, (tuned.state.variant, plain.state.variant)
    is_distilled = variants[0] == TURBO.name != variants[1]
    steps = TURBO.steps if preset is None else preset.steps
    return {STEPS_KEY: str(steps)} if is_distilled and steps <= MAX_STEPS else {}


def _low_rank(matrix: Tensor, rank: int, keep: float | None) -> tuple[Tensor, Tensor, float]:
    """(outputs, r) and (r, inputs), whose product is the nearest, and the square that it holds."""
    left, values, right = largest_singular(matrix, min(rank, *matrix.shape))
    squares = values.double().square()
    # Beyond this they are rounding of float32.
    noise = max(matrix.shape) * torch.finfo(torch.float32).eps * values[0]
    count = max(1, int((values > noise).sum()))
    if keep is not None:
        enough = keep * float(matrix.square().sum(dtype=torch.float64)) * (1 - 1e-6)
        count = min(count, 1 + int((squares.cumsum(0) < enough).sum()))
    roots = values[:count].sqrt()
    up, down = left[:, :count] * roots, roots[:, None] * right[:count]
    return up, down, float(squares[:count].sum())


def largest_singular(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix (M, N), with vectors (M, count) and (count, N).

    Those of large matrices are found in a space of a few more dimensions, by orthogonal iteration
    from random vectors (Halko and others, 2011, arXiv 0909.4061), always the same ones.
    """
    smaller, size = min(matrix.shape), count + _SPARE
    if smaller <= _EXACT or 4 * size >= smaller:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :count], values[:count], right[:count]
    generator = torch.Generator().manual_seed(0)
    space = torch.randn(matrix.shape[1], size, generator=generator).to(matrix.device)
    space = torch.linalg.qr(matrix @ space)[0]
    for _ in range(_ITERATIONS):
        space = torch.linalg.qr(matrix.mT @ space)[0]
        space = torch.linalg.qr(matrix @ space)[0]
    left, values, right = torch.linalg.svd(space.mT @ matrix, full_matrices=False)
    return (space @ left)[:, :count], values[:count], right[:count]
