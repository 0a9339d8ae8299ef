"""Alpha of a LoRA: where it comes from, and what settings beside the tensors say.

A LoRA's matrices are multiplied by alpha / rank (`Update.scale`). kohya, musubi-tuner, OneTrainer
and LyCORIS write alpha as a tensor per layer, which files.py reads first; ai-toolkit makes alpha
equal to the rank and writes nothing, so without any alpha the scale is 1. The rest is read here,
in this order, with alpha / sqrt(rank) for rank-stabilised ones:

- `lora_adapter_metadata`: the adapter's configuration as JSON, from diffusers with the part's name
  before each key (`transformer.r`), from SimpleTuner and `save_lora_adapter` without;
- `adapter_config.json` beside an `adapter_model.safetensors`, as PEFT saves a folder;
- `lora_alpha` as an entry of the header itself;
- `ss_network_alpha` of kohya's header, for kohya's names alone: musubi-tuner's conversion to PEFT
  names multiplies alpha into the matrices and leaves the header as it was.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoints.identify import CheckpointError

ADAPTER_METADATA = "lora_adapter_metadata"
ADAPTER_CONFIG = "adapter_config.json"

# PEFT's own, where a configuration leaves them out.
_DEFAULT_ALPHA = 8.0
# Patterns that are more than names are tried one after the other on each layer.
_MOST_EXPRESSIONS, _LONGEST_EXPRESSION = 64, 200


class Patterns:
    """PEFT's `rank_pattern` or `alpha_pattern`: a number for each layer whose name ends so.

    Keys are regular expressions that match a name's end, from a dot on; the first that does counts.
    """

    def __init__(self, values: Mapping[str, float], what: str):
        self._values = list(values.values())
        self._names: dict[str, int] = {}
        self._expressions: list[tuple[int, re.Pattern]] = []
        for place, key in enumerate(values):
            if re.fullmatch(r"[\w.-]+", name := key.replace("\\.", ".")):
                self._names.setdefault(name, place)
            else:
                self._expressions.append((place, _compiled(key, what)))
        if len(self._expressions) > _MOST_EXPRESSIONS:
            raise CheckpointError(
                f"{what} holds {len(self._expressions)} regular expressions; expected names of "
                f"layers, or {_MOST_EXPRESSIONS} expressions at most."
            )

    def get(self, name: str) -> float | None:
        """The number of a layer by its dotted name, or None."""
        pieces = name.split(".")
        ends = (".".join(pieces[start:]) for start in range(len(pieces)))
        places = [self._names[end] for end in ends if end in self._names]
        places += [place for place, pattern in self._expressions if pattern.match(name)]
        return self._values[min(places)] if places else None


def _compiled(key: str, what: str) -> re.Pattern:
    # Repeated groups are what makes an expression run for ever on a name that nearly matches.
    repeated = re.search(r"\)[*+?{]", key) or len(re.findall(r"[*+{]", key)) > 3
    if len(key) <= _LONGEST_EXPRESSION and not repeated:
        try:
            return re.compile(rf"(.*\.)?({key})$")
        except re.error:
            pass
    raise CheckpointError(
        f"{what} has the entry {key[:60]!r}; expected the name of a layer or a simple regular "
        "expression. Save the LoRA again, or remove the header."
    )


@dataclass(frozen=True)
class HeaderScale:
    """Alpha, as a header gives it, for the layers whose names its trainer had.

    alpha: of LoRA; factored_alpha: of LoKr and LoHa, which PEFT names otherwise.
    rank: where the matrices do not tell.
    kohya_names: counts for `lora_down` and `lora_up` alone.
    """

    source: str
    alpha: float
    factored_alpha: float
    rank: float | None = None
    alpha_pattern: Patterns = field(default_factory=lambda: Patterns({}, ""))
    rank_pattern: Patterns = field(default_factory=lambda: Patterns({}, ""))
    rank_stabilised: bool = False
    kohya_names: bool = False

    def scale(self, kind: str, rank: int | None, names: Sequence[str]) -> float | None:
        """The scale of one layer's update, or None if the header does not give it.

        rank: of the matrices, None where they have none. names: the layer's, in several spellings.
        """
        if kind not in ("lora", "lokr", "loha"):
            return None
        alpha = self.alpha if kind == "lora" else self.factored_alpha
        alpha = _first(self.alpha_pattern, names, alpha)
        width = _first(self.rank_pattern, names, self.rank) if rank is None else rank
        if not width:
            return None
        stabilised = self.rank_stabilised and kind == "lora"
        return alpha / (math.sqrt(width) if stabilised else width)


def _first(patterns: Patterns, names: Sequence[str], default: Any) -> Any:
    values = (patterns.get(name) for name in names)
    return next((value for value in values if value is not None), default)


def read_header_scale(
    metadata: Mapping[str, str], name: str, part: str = "transformer"
) -> HeaderScale | None:
    """Settings of a file's header for one part of the model, or None where it has none.

    part: "transformer" or "text_encoder". Raises CheckpointError, naming the file, for settings
    that cannot be read: guessing a scale would change every picture.
    """
    for key, place in (
        (ADAPTER_METADATA, f"{ADAPTER_METADATA} in the header"),
        (ADAPTER_CONFIG, f"{ADAPTER_CONFIG} beside the file"),
    ):
        if key in metadata:
            settings = _part_of(_json(metadata[key], f"{name}: {place}"), part)
            if settings:
                return _from_peft(settings, place, f"{name}: {place}")
    if "lora_alpha" in metadata:
        return _from_peft(
            {"lora_alpha": metadata["lora_alpha"], "use_rslora": metadata.get("use_rslora")},
            "lora_alpha in the header",
            f"{name}: its header",
        )
    return _from_kohya(metadata) if part == "transformer" else None


def _json(text: Any, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is {type(value).__name__}; expected an object.")
    return value


def _part_of(settings: dict[str, Any], part: str) -> dict[str, Any]:
    """The settings of one part: under its name, before its name, or all where none is named."""
    if isinstance(settings.get(part), dict):
        return settings[part]
    prefixed = {k[len(part) + 1 :]: v for k, v in settings.items() if k.startswith(f"{part}.")}
    if prefixed or any(re.match(r"(transformer|text_encoder\w*|unet)(\.|$)", k) for k in settings):
        return prefixed
    return settings if part == "transformer" else {}


def _from_peft(settings: Mapping[str, Any], source: str, what: str) -> HeaderScale:
    def number(key: str, default: float | None) -> float | None:
        value = settings.get(key)
        return default if value is None else _number(value, f"{what} has {key}")

    def patterns(key: str) -> Patterns:
        value = settings.get(key) or {}
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{what} has {key} {str(value)[:60]!r}; expected numbers by names of layers."
            )
        numbers = {k: _number(v, f"{what} has {key} {k[:60]!r}") for k, v in value.items()}
        return Patterns(numbers, f"{what}: {key}")

    alpha = number("lora_alpha", _DEFAULT_ALPHA)
    stabilised = settings.get("use_rslora")
    return HeaderScale(
        source,
        alpha=alpha,  # type: ignore[arg-type]
        factored_alpha=number("alpha", alpha),  # type: ignore[arg-type]
        rank=number("r", None),
        alpha_pattern=patterns("alpha_pattern"),
        rank_pattern=patterns("rank_pattern"),
        rank_stabilised=stabilised in (True, "true", "True", "1"),
    )


def _from_kohya(metadata: Mapping[str, str]) -> HeaderScale | None:
    try:
        alpha = float(metadata["ss_network_alpha"])
    except (KeyError, ValueError, TypeError):
        # "None" and "Dynamic" are written too; there the tensors tell.
        return None
    if not math.isfinite(alpha):
        return None
    return HeaderScale(
        "ss_network_alpha in the header",
        alpha=alpha,
        factored_alpha=alpha,
        rank_stabilised='"rs_lora": "True"' in str(metadata.get("ss_network_args", "")),
        kohya_names=True,
    )


def _number(value: Any, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise CheckpointError(f"{what} {str(value)[:60]!r}; expected a number.")
    return number
