"""The settings of each command: sections as in a TOML file, with a command line over them.

Nothing here imports torch, so that a wrong setting is refused at once.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from krea2_model.checks import is_number, is_whole
from krea2_model.lora.names import DIFFUSERS

from .data.pairs import Pairs
from .data.prompts import Prompts
from .settings.checks import check, expected_one_of
from .settings.methods import Distil, Prefer, Reward, Slider, Stages
from .settings.sections import (
    COLUMNS,
    EDITS,
    FULL,
    ROWS,
    Adapter,
    Data,
    Memory,
    Model,
    Output,
    Prior,
    Ranks,
    Samples,
    Steps,
    Validation,
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The sections that every command has. Raises ValueError for a wrong value, naming it."""

    model: Model
    output: Output
    adapter: Adapter = field(default_factory=Adapter)
    training: Steps = field(default_factory=Steps)
    memory: Memory = field(default_factory=Memory)
    samples: Samples = field(default_factory=Samples)
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self):
        if self.ranks.tensor > 1:
            ok = self.adapter.method == FULL
            expected = "1 for an adapter: tensor parallelism is for a model that is trained whole"
            check(ok, "ranks.tensor", self.ranks.tensor, expected)
        output = self.output.path
        is_folder = output is not None and output.is_dir()
        check(not is_folder, "output.path", output, "a file, and this is a folder")
        style = self.output.key_style
        read = ROWS if style == DIFFUSERS else COLUMNS
        if self.adapter.magnitude is None:
            object.__setattr__(self, "adapter", replace(self.adapter, magnitude=read))
        if self.adapter.method == "dora":
            check(
                self.adapter.magnitude == read, "adapter.magnitude", self.adapter.magnitude,
                f"{read}, or none: readers of output.key_style {style} take lengths for those",
            )  # fmt: skip

    def _refuse_full(self, why: str) -> None:
        """Raise ValueError where the whole model would be trained."""
        ok = self.adapter.method != FULL
        check(ok, "adapter.method", FULL, f"lora, dora or lokr: {why}")

    def as_table(self) -> dict[str, dict[str, Any]]:
        """The settings as TOML and JSON hold them, those that are not set left out."""
        return {
            section: {name: _plain(value) for name, value in values.items() if value is not None}
            for section, values in asdict(self).items()
        }

    def check_shares(self, shares: int) -> None:
        """Raise ValueError where so many processes cannot share out the work of a step."""
        check(
            self.training.accumulate % shares == 0,
            "training.accumulate", self.training.accumulate,
            f"a multiple of {shares}: a step's batches are shared out among the processes",
        )  # fmt: skip
        whole = shares > 1 and self.adapter.method == FULL
        check(
            not (whole and self.training.optimiser == "adamw8bit"),
            "training.optimiser", self.training.optimiser,
            "adamw or muon: bitsandbytes takes no weights that lie on several processes",
        )  # fmt: skip

    @property
    def side(self) -> int | None:
        """Side of a square of the area of the largest pictures; None is the model's own size."""
        return None

    @property
    def batches(self) -> list[tuple[int | None, int]]:
        """Of each stage of the run, that side and the pictures that are computed at once."""
        return [(self.side, self.training.batch)]

    @property
    def cache(self) -> Path:
        """Folder of encoded pictures and prompts."""
        return self.output.run_folder / "cache"

    @property
    def references(self) -> str:
        """How references are shown, of `EDITS`."""
        return EDITS[0]

    @property
    def adapter_sets(self) -> int:
        """Sets of adapters that are trained beside the model."""
        return 1

    @property
    def teacher(self) -> str | None:
        """The model that one which begins as a Turbo learns from; None where a Raw is trained."""
        return None

    @classmethod
    def sections(cls) -> dict[str, type]:
        """The kind of each section by its name."""
        return get_type_hints(cls)


@dataclass(frozen=True, kw_only=True)
class PicturesConfig(RunConfig):
    """The sections of commands that learn from pictures with captions."""

    data: Data

    @property
    def cache(self) -> Path:
        return self.data.cache or super().cache

    @property
    def references(self) -> str:
        return self.data.references


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PicturesConfig):
    """All settings of `krea2 train`."""

    validation: Validation = field(default_factory=Validation)
    prior: Prior = field(default_factory=Prior)

    @property
    def side(self) -> int | None:
        return max(self.data.resolution)


@dataclass(frozen=True, kw_only=True)
class DistilConfig(RunConfig):
    """All settings of `krea2 distil`."""

    prompts: Prompts
    distil: Distil = field(default_factory=Distil)

    def __post_init__(self):
        super().__post_init__()
        self._refuse_full("student, teacher and fake model are adapters on one base")
        check(
            self.samples.turbo is None, "samples.turbo", self.samples.turbo,
            "none: a few-step LoRA makes a Turbo of Raw, and is not for Turbo",
        )  # fmt: skip

    @property
    def side(self) -> int | None:
        return self.prompts.size

    @property
    def adapter_sets(self) -> int:
        return 2

    @property
    def teacher(self) -> str | None:
        return self.distil.teacher


@dataclass(frozen=True, kw_only=True)
class PreferConfig(RunConfig):
    """All settings of `krea2 prefer`."""

    pairs: Pairs
    prefer: Prefer = field(default_factory=Prefer)

    def __post_init__(self):
        super().__post_init__()
        self._refuse_full("the reference is the model without adapters")

    @property
    def side(self) -> int | None:
        return self.pairs.resolution

    @property
    def batches(self) -> list[tuple[int | None, int]]:
        return [(self.side, 2 * self.training.batch)]

    @property
    def cache(self) -> Path:
        return self.pairs.cache or super().cache


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(PicturesConfig):
    """All settings of `krea2 pretrain`: resolution and steps are those of its stages."""

    stages: Stages

    def __post_init__(self):
        # Everything is trained, in as many steps as the stages have together.
        object.__setattr__(self, "adapter", replace(self.adapter, method=FULL))
        object.__setattr__(self, "training", replace(self.training, steps=sum(self.stages.steps)))
        super().__post_init__()

    @property
    def batches(self) -> list[tuple[int | None, int]]:
        sides, draws = self.stages.resolution, self.stages.draws
        pictures = self.stages.batch or [self.training.batch] * len(sides)
        return [(side, draws * batch) for side, batch in zip(sides, pictures, strict=True)]


@dataclass(frozen=True, kw_only=True)
class RewardConfig(RunConfig):
    """All settings of `krea2 reward`."""

    prompts: Prompts
    reward: Reward

    def __post_init__(self):
        super().__post_init__()
        self._refuse_full("the reference is the model without its adapter")
        check(
            self.training.accumulate == 1, "training.accumulate", self.training.accumulate,
            "1: a step trains on all pictures of its groups, training.batch at once",
        )  # fmt: skip

    def check_shares(self, shares: int) -> None:
        check(
            self.reward.groups % shares == 0, "reward.groups", self.reward.groups,
            f"a multiple of {shares}: a step's groups are shared out among the processes",
        )  # fmt: skip

    @property
    def side(self) -> int | None:
        return self.prompts.size


@dataclass(frozen=True, kw_only=True)
class SliderConfig(RunConfig):
    """All settings of `krea2 slider`."""

    prompts: Prompts
    slider: Slider

    def __post_init__(self):
        super().__post_init__()
        self._refuse_full("a slider is an adapter at a strength")

    @property
    def side(self) -> int | None:
        return self.prompts.size


KINDS: dict[str, type[RunConfig]] = {
    "train": TrainConfig,
    "distil": DistilConfig,
    "prefer": PreferConfig,
    "pretrain": PretrainConfig,
    "reward": RewardConfig,
    "slider": SliderConfig,
}

Config = TypeVar("Config", bound=RunConfig)


def read_config(
    path: Path | None,
    settings: Mapping[str, Any] | None = None,
    kind: type[Config] = TrainConfig,  # type: ignore[assignment]
) -> Config:
    """Settings of a TOML file, or none, with those of a command line over them.

    settings: by "section.name". kind: of which command. Paths in a file are relative to its folder.
    Raises ValueError for what cannot be read, a section or name that there is not, and values of
    another kind.
    """
    sections = kind.sections()
    tables = {} if path is None else _read_toml(path, sections)
    for name, value in (settings or {}).items():
        section, _, entry = name.partition(".")
        tables.setdefault(section, {})[entry] = value
    # Names before values: a wrong name explains a value that seems not to be set.
    for name, table in tables.items():
        _check_names(sections[name], name, table)
    parts = {name: _section(sections[name], name, tables.get(name, {})) for name in sections}
    return kind(**parts)


def _read_toml(path: Path, sections: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not there; expected a TOML file of settings.") from error
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as TOML: {error}.") from error
    for name, table in tables.items():
        if name not in sections or not isinstance(table, dict):
            raise ValueError(f"{path.name} has {name}; {expected_one_of(name, sections)}")
        kinds = get_type_hints(sections[name])
        for entry, value in table.items():
            if entry in kinds and Path in get_args(kinds[entry]) and isinstance(value, str):
                table[entry] = path.parent / value
        if relative_to := getattr(sections[name], "relative_to", None):
            relative_to(table, path.parent)
    return tables


def _check_names(kind: type, name: str, table: Mapping[str, Any]) -> None:
    known = [entry.name for entry in fields(kind)]
    for entry in table:
        if entry not in known:
            raise ValueError(f"There is no setting {name}.{entry}; {expected_one_of(entry, known)}")


def _section(kind: type, name: str, table: Mapping[str, Any]) -> Any:
    kinds = get_type_hints(kind)
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
