"""Families of edit LoRAs: how one was trained decides how its pictures have to be given to it.

- identity: identity-edit LoRAs (krea2edit). References share the step's time and are fitted into
  the image; the text encoder reads the pictures without labels.
- ai-toolkit: its edit LoRAs and style_reference. References are finished images (time 0) of their
  own size; the text encoder reads small copies, with labels.
- references-only: references at time 0 that the text encoder does not read.

The weights do not tell them apart. The header or the name does, or else the user.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IDENTITY, AI_TOOLKIT, REFERENCES_ONLY = "identity", "ai-toolkit", "references-only"
FAMILIES = (IDENTITY, AI_TOOLKIT, REFERENCES_ONLY)

# How much a sign says: a trainer's settings, a name, the trainer alone.
_SETTINGS, _NAME, _TRAINER = 3, 2, 1

_NAMES = (
    (IDENTITY, re.compile(r"identity[-_ ]?edit|krea[-_ ]?2?[-_ ]?edit(?![a-z])")),
    (AI_TOOLKIT, re.compile(r"style[-_ ]?reference|ostris")),
    (REFERENCES_ONLY, re.compile(r"krea2_nano_reference")),
)
# This package's own sign, where trainers have none.
FAMILY_KEY = "krea2.edit"
_NAME_KEYS = ("ss_output_name", "name", "modelspec.title")
# Longer texts in a header are captions and the like.
_LONGEST = 1_000_000


@dataclass(frozen=True)
class EditFamily:
    """The family of a file, and the sign that it was told by.

    certainty: 1 where only the trainer is known, which makes other LoRAs too. cache: trained with
    references that attend only to themselves.
    """

    name: str
    sign: str
    certainty: int
    cache: bool = False

    @property
    def is_edit(self) -> bool:
        """True if the file is an edit LoRA beyond a guess."""
        return self.certainty > _TRAINER

    def __str__(self) -> str:
        cached = ", with cached references" if self.cache else ""
        return f"family {self.name}{cached} (by {self.sign})"


def read_family(name: str, metadata: Mapping[str, str] | None = None) -> EditFamily | None:
    """The family of an edit LoRA by its file's header and name; None where nothing tells."""
    metadata = metadata or {}
    if (named := metadata.get(FAMILY_KEY)) in FAMILIES:
        return EditFamily(named, f"{FAMILY_KEY} in its header", _SETTINGS)
    settings = list(_settings(dict(metadata)))
    for key, value in settings:
        if key in ("arch", "ss_base_model_version") and value == "krea2_edit":
            return EditFamily(IDENTITY, f"{key} in its header", _SETTINGS)
        if key == "model_kwargs" and isinstance(value, dict) and value.get("edit") is True:
            sign = "model_kwargs in its header"
            return EditFamily(AI_TOOLKIT, sign, _SETTINGS, value.get("kv_cache") is True)
    titles = [("its name", name), *((key, metadata.get(key, "")) for key in _NAME_KEYS)]
    for family, pattern in _NAMES:
        for where, title in titles:
            if pattern.search(title.lower()):
                return EditFamily(family, where, _NAME)
    if any(key == "software" and "ai-toolkit" in str(value) for key, value in settings):
        return EditFamily(AI_TOOLKIT, "software in its header, a guess", _TRAINER)
    return None


def family_header(family: str, cache: bool = False) -> dict[str, str]:
    """What the header of an edit LoRA says of its family, as the family's own trainer does.

    cache: trained with references that attend only to themselves.
    """
    if family == IDENTITY:
        return {"ss_base_model_version": "krea2_edit"}
    if family == AI_TOOLKIT:
        kwargs = {"edit": True, **({"kv_cache": True} if cache else {})}
        return {"training_info": json.dumps({"model_kwargs": kwargs})}
    return {FAMILY_KEY: family}


def likeliest(families: Sequence[EditFamily]) -> EditFamily | None:
    """The family of several LoRAs together: that of the surest sign.

    None where there is none, or equal signs tell of different families.
    """
    top = max((family.certainty for family in families), default=0)
    surest = [family for family in families if family.certainty == top]
    ways = {(family.name, family.cache) for family in surest}
    return surest[0] if len(ways) == 1 else None


def _settings(value: Any, depth: int = 8) -> Iterator[tuple[str, Any]]:
    """Keys and values of settings within settings, of which headers hold some as JSON."""
    if depth == 0:
        return
    if isinstance(value, str) and value[:1] in ("{", "[") and len(value) <= _LONGEST:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _settings(inner, depth - 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _settings(inner, depth - 1)
