"""Settings of a training run: sections as in a TOML file, checked when they are made.

Nothing here imports torch, so that a wrong setting is refused at once.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from krea2_model.checks import is_number, is_whole
from krea2_model.images.sizes import MULTIPLE

METHODS = ("lora", "dora", "lokr", "full")
TARGETS = ("blocks", "attention", "mlp", "blocks+text")
OPTIMISERS = ("adamw", "adamw8bit", "muon")
BASES = ("as-is", "bf16", "fp8", "int8", "4bit")
KEY_STYLES = ("ai-toolkit", "kohya", "diffusers")
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
        _check(self.path is not None, "data.path", self.path, "a folder of pictures or a table")
        sides = self.resolution
        _check(
            len(sides) > 0 and all(64 <= side <= 4096 and side % MULTIPLE == 0 for side in sides),
            "data.resolution", list(sides), f"multiples of {MULTIPLE} from 64 to 4096",
        )  # fmt: skip
        _check(
            0 <= self.caption_dropout <= 1, "data.caption_dropout", self.caption_dropout, "0 to 1"
        )
        _check(1 <= self.repeats <= 10_000, "data.repeats", self.repeats, "1 to 10000")
        _choice("data.references", self.references, EDITS)


@dataclass(frozen=True)
class Model:
    """Files of the model that is trained; `transformer` may be "nano" or hold all three."""

    transformer: str | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    tokenizer: Path | None = None

    def __post_init__(self):
        expected = "a Raw checkpoint (file or folder), or nano"
        _check(bool(self.transformer), "model.transformer", self.transformer, expected)


@dataclass(frozen=True)
class Adapter:
    """What is trained: an adapter beside the frozen model, or (method "full") the model itself.

    alpha: None is the rank, so that the scale is 1.
    factor: of LoKr, the size of its small Kronecker factor.
    """

    method: str = "lora"
    rank: int = 32
    alpha: float | None = None
    targets: str = TARGETS[0]
    factor: int = 16

    def __post_init__(self):
        _choice("adapter.method", self.method, METHODS)
        _choice("adapter.targets", self.targets, TARGETS)
        _check(1 <= self.rank <= 4096, "adapter.rank", self.rank, "1 to 4096")
        _check(2 <= self.factor <= 1024, "adapter.factor", self.factor, "2 to 1024")
        alpha = self.alpha
        _check(alpha is None or alpha > 0, "adapter.alpha", alpha, "more than 0, or none")

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
            _check(low <= value <= high, f"training.{name}", value, f"{low:g} to {high:g}")
        shift = self.shift
        _check(shift is None or abs(shift) <= 100, "training.shift", shift, "-100 to 100")
        _choice("training.optimiser", self.optimiser, OPTIMISERS)


@dataclass(frozen=True)
class Memory:
    """How the frozen model is held.

    base: format of the blocks' matrices; "as-is" is the file's own.
    checkpointing: compute a block's activations again in the backward pass instead of holding them.
    offload: blocks' matrices stay in main memory and come to the device one at a time.
    dtype: of the calculation.
    """

    device: str = "auto"
    dtype: str | None = None
    base: str = BASES[0]
    checkpointing: bool = True
    offload: bool = False

    def __post_init__(self):
        _choice("memory.base", self.base, BASES)
        _check(
            self.dtype in (None, "bf16", "fp32"), "memory.dtype", self.dtype, "bf16 or fp32"
        )  # fmt: skip


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
        _check(0 <= self.every <= 10**7, "samples.every", self.every, "0 or more")
        size = self.size
        ok = size is None or (64 <= size <= 4096 and size % MULTIPLE == 0)
        _check(ok, "samples.size", size, f"a multiple of {MULTIPLE} from 64 to 4096")


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
        _check(
            self.path is not None and self.path.suffix == ".safetensors",
            "output.path", self.path, "a name that ends in .safetensors",
        )  # fmt: skip
        _choice("output.key_style", self.key_style, KEY_STYLES)
        _check(self.save_every >= 1, "output.save_every", self.save_every, "1 or more")
        _check(self.keep >= 0, "output.keep", self.keep, "0 or more")

    @property
    def run_folder(self) -> Path:
        assert self.path is not None
        return self.path.with_suffix("") if self.folder is None else self.folder


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. Raises ValueError for a value that cannot be right, naming it."""

    data: Data
    model: Model
    output: Output
    adapter: Adapter = field(default_factory=Adapter)
    training: Steps = field(default_factory=Steps)
    memory: Memory = field(default_factory=Memory)
    samples: Samples = field(default_factory=Samples)

    def as_table(self) -> dict[str, dict[str, Any]]:
        """The settings as TOML and JSON hold them, those that are not set left out."""
        return {
            section: {name: _plain(value) for name, value in values.items() if value is not None}
            for section, values in asdict(self).items()
        }


SECTIONS: dict[str, type] = {
    name: kind for name, kind in get_type_hints(TrainConfig).items() if isinstance(kind, type)
}


def read_config(path: Path | None, settings: Mapping[str, Any] | None = None) -> TrainConfig:
    """Settings of a TOML file, or none, with those of a command line over them.

    settings: by "section.name". Paths in a file are relative to its folder. Raises ValueError for
    what cannot be read, a section or name that there is not, and values of another kind.
    """
    tables = {} if path is None else _read_toml(path)
    for name, value in (settings or {}).items():
        section, _, entry = name.partition(".")
        tables.setdefault(section, {})[entry] = value
    parts = {name: _section(name, tables.get(name, {})) for name in SECTIONS}
    return TrainConfig(**parts)


def _read_toml(path: Path) -> dict[str, dict[str, Any]]:
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not there; expected a TOML file of settings.") from error
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as TOML: {error}.") from error
    for name, table in tables.items():
        if name not in SECTIONS or not isinstance(table, dict):
            raise ValueError(f"{path.name} has {name}; {_expected(name, SECTIONS)}")
        kinds = get_type_hints(SECTIONS[name])
        for entry, value in table.items():
            if entry in kinds and Path in get_args(kinds[entry]) and isinstance(value, str):
                table[entry] = path.parent / value
    return tables


def _section(name: str, table: Mapping[str, Any]) -> Any:
    kind = SECTIONS[name]
    known = [entry.name for entry in fields(kind)]
    kinds = get_type_hints(kind)
    for entry in table:
        if entry not in known:
            raise ValueError(f"There is no setting {name}.{entry}; {_expected(entry, known)}")
    return kind(**{k: _value(f"{name}.{k}", v, kinds[k]) for k, v in table.items()})


def _value(name: str, value: Any, kind: Any) -> Any:
    """A value as a setting's kind has it: a path, a tuple, a number; ValueError for others."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return None
    if any(get_origin(one) is tuple for one in kinds):
        inner = get_args(next(one for one in kinds if get_origin(one) is tuple))[0]
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_value(name, one, inner) for one in values)
    if bool in kinds and isinstance(value, bool):
        return value
    if Path in kinds and isinstance(value, (str, Path)):
        return Path(value)
    if str in kinds and isinstance(value, str):
        return value
    if int in kinds and is_whole(value):
        return int(value)
    if float in kinds and is_number(value):
        return float(value)
    words = {
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "a path",
        bool: "true or false",
    }
    expected = " or ".join(words[one] for one in kinds if one in words)
    raise ValueError(f"{name} is {value!r}; expected {expected}.")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _expected(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), 1, 0.6)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"expected one of {', '.join(known)}.{hint}"


def _check(is_right: bool, name: str, value: Any, expected: str) -> None:
    if not is_right:
        given = "not set" if value is None else f"{value}"
        raise ValueError(f"{name} is {given}; expected {expected}.")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; {_expected(value, choices)}")
