"""References of a CONDITIONING.

CONDITIONING holds latents and method where core's Krea 2 looks for them, and beside them what only
ours knows: the settings of each reference, and whether their keys and values are cached.
"""

import logging
from weakref import WeakValueDictionary

from ...krea2_model.guidance import ALL_STEPS
from ...krea2_model.transformer.references import (
    SHARED_TIME,
    TIME_ZERO,
    ReferenceCaches,
    ReferencePlan,
    ReferenceSettings,
)

# Core's keys.
LATENTS, METHOD = "reference_latents", "reference_latents_method"
# `ReferenceSettings` of each of the latents; and whether references are cached.
SETTINGS, CACHED = "krea2_references", "krea2_references_apart"

# Freed with the last conditioning of the run.
_CACHES: WeakValueDictionary[tuple, ReferenceCaches] = WeakValueDictionary()


def default_plan(count: int, method: str | None) -> ReferencePlan:
    """The plan for a caller that passes latents and perhaps a method, nothing else."""
    settings = tuple(ReferenceSettings(index) for index in range(1, count + 1))
    return ReferencePlan(settings, (ALL_STEPS,) * count, known_method(method))


def reference_plan(model, conditioning: dict) -> ReferencePlan | None:
    """The plan for the references of a conditioning, None without any."""
    latents = conditioning.get(LATENTS)
    if not latents:
        return None
    method = conditioning.get(METHOD)
    if method is None:
        logging.warning(
            "Krea 2: the reference latents come without a method and are modulated as finished "
            "images (%s). Krea 2 Reference, or Edit Model Reference Method, chooses another.",
            TIME_ZERO,
        )
    settings = _settings(conditioning, len(latents))
    caches = None
    if conditioning.get(CACHED):
        key = (id(model), *map(id, latents), *settings)
        caches = _CACHES.setdefault(key, ReferenceCaches(latents))
    sigma_at = model.model_sampling.percent_to_sigma
    return ReferencePlan.of(settings, sigma_at, known_method(method), caches)


def known_method(method: str | None) -> str:
    """One of `REFERENCE_METHODS`: as in core, any but time zero shares the step's time."""
    return TIME_ZERO if method in (None, TIME_ZERO) else SHARED_TIME


def add_references(
    conditioning, latents, settings: ReferenceSettings, method: str, cached: bool = False
):
    """A CONDITIONING with references added to those that it has.

    Raises ValueError where those have another method, or are cached and these are not.
    """
    result = []
    for states, extra in conditioning:
        earlier = list(extra.get(LATENTS, ()))
        if earlier:
            for name, new, old in (
                ("family", method, known_method(extra.get(METHOD))),
                ("apart", cached, bool(extra.get(CACHED))),
            ):
                if new != old:
                    raise ValueError(
                        f"The references of a conditioning differ in {name}: {old!r}, then "
                        f"{new!r}. Choose one for all of them."
                    )
        added = {
            LATENTS: earlier + list(latents),
            METHOD: method,
            SETTINGS: _settings(extra, len(earlier)) + [settings] * len(latents),
            CACHED: cached,
        }
        result.append([states, extra | added])
    return result


def _settings(conditioning: dict, count: int) -> list[ReferenceSettings]:
    """Settings of `count` references; defaults for those that another node added."""
    settings = list(conditioning.get(SETTINGS, ()))[:count]
    return settings + [ReferenceSettings()] * (count - len(settings))
