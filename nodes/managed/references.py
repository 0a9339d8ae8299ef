"""References of a conditioning on their way to the model.

CONDITIONING holds latents and method where core's Krea 2 looks for them, and beside them what only
ours knows: settings of each, and whether they see themselves alone.
"""

import logging
import math
from typing import NamedTuple
from weakref import WeakValueDictionary

import comfy.conds
import torch

from ...krea2_model.guidance import in_window
from ...krea2_model.transformer.references import (
    SHARED_TIME,
    TIME_ZERO,
    Reference,
    ReferenceKVCache,
)

# Core's keys.
LATENTS, METHOD = "reference_latents", "reference_latents_method"
# Settings of each of the latents, {} where it has none; and whether they are kept apart.
SETTINGS, APART = "krea2_references", "krea2_references_apart"


class ReferenceCaches:
    """What is kept of references during a run, for all conditionings with the same ones."""

    def __init__(self, latents):
        self._latents = latents  # They are told apart by identity, so they have to live as long.
        self._recorded: dict[tuple, ReferenceKVCache] = {}

    def recorded(self, key: tuple, record) -> ReferenceKVCache:
        """What `record()` made of those that are there, made once."""
        if key not in self._recorded:
            self._recorded[key] = record()
        return self._recorded[key]


# Freed with the last conditioning of the run.
_KEPT: WeakValueDictionary[tuple, ReferenceCaches] = WeakValueDictionary()


class Place(NamedTuple):
    """Index and strength of a reference, and the sigmas between which it is there."""

    index: int
    strength: float
    first: float
    last: float


class Plan(NamedTuple):
    """What a run does with references: where each is, how they are modulated, what is kept."""

    places: tuple[Place, ...]
    method: str
    kept: ReferenceCaches | None = None

    def references_at(self, time: float, latents: list[torch.Tensor]) -> list[Reference]:
        """Those that a call at a time looks at; latents (B, C, h, w) of each."""
        return [
            Reference(latent, place.index, place.strength)
            for place, latent in zip(self.places, latents, strict=True)
            if place.strength > 0 and in_window(time, place.first, place.last)
        ]


class PlanCondition(comfy.conds.CONDConstant):
    """A plan; its size are the tokens that are kept."""

    def __init__(self, cond: Plan, tokens: int = 0):
        super().__init__(cond)
        self.tokens = tokens

    def _copy_with(self, cond):
        return type(self)(cond, self.tokens)

    def size(self):
        return [self.tokens]


def plan_for(latents, method: str | None) -> Plan:
    """The plan for a caller that names nothing but latents and perhaps a method."""
    places = [Place(number, 1.0, math.inf, -1.0) for number in range(1, len(latents) + 1)]
    return Plan(tuple(places), known_method(method))


def tokens_of(latents: torch.Tensor) -> int:
    """Tokens of latents (..., h, w)."""
    return -(-latents.shape[-2] // 2) * -(-latents.shape[-1] // 2)


def known_method(method: str | None) -> str:
    """One of `REFERENCE_METHODS`: as in core, what is not time zero shares the step's time."""
    return TIME_ZERO if method in (None, TIME_ZERO) else SHARED_TIME


def reference_conditions(model, conditioning: dict) -> dict:
    """The model's conditions for the references of a conditioning, `{}` without any."""
    given = conditioning.get(LATENTS)
    if not given:
        return {}
    method = conditioning.get(METHOD)
    if method is None:
        logging.warning(
            "Krea 2: the reference latents come without a method and count as finished images "
            "(%s). Krea 2 Reference, or Edit Model Reference Method, chooses another.", TIME_ZERO,
        )  # fmt: skip
        method = TIME_ZERO
    settings = list(conditioning.get(SETTINGS, ()))[: len(given)]
    settings += [{}] * (len(given) - len(settings))
    sigma_of = model.model_sampling.percent_to_sigma
    places = []
    for number, options in enumerate(settings, 1):
        known = Reference(given[0], **{"index": number, **options})
        first, last = (float(sigma_of(part)) for part in (known.start, known.end))
        places.append(Place(known.index, known.strength, first, last))
    plan, tokens = Plan(tuple(places), known_method(method)), 0
    if conditioning.get(APART):
        if plan.method != TIME_ZERO:
            raise ValueError(
                f"References are kept apart by the method {method!r}; expected {TIME_ZERO!r}, "
                "since otherwise they change with every step. Choose it in Krea 2 Reference, or "
                "switch apart off."
            )
        key = (id(model), *map(id, given), *places)
        plan = plan._replace(kept=_KEPT.setdefault(key, ReferenceCaches(given)))
        tokens = sum(map(tokens_of, given))
    return {
        "ref_latents": comfy.conds.CONDList([model.process_latent_in(latent) for latent in given]),
        # As core gives it, for what wraps the model; the plan is what counts here.
        "ref_latents_method": comfy.conds.CONDConstant(plan.method),
        "reference_plan": PlanCondition(plan, tokens),
    }


def add_references(conditioning, latents, settings: dict, method: str, apart: bool):
    """A CONDITIONING with references behind those that it has.

    Raises ValueError where those are modulated by another method, or kept otherwise.
    """
    result = []
    for states, extra in conditioning:
        given = list(extra.get(LATENTS, ()))
        if given:
            for name, now, then in (
                ("family", method, known_method(extra.get(METHOD))),
                ("apart", apart, bool(extra.get(APART))),
            ):
                if now != then:
                    raise ValueError(
                        f"The references of a conditioning differ in {name}: {then!r}, then "
                        f"{now!r}. Choose one for all of them."
                    )
        known = list(extra.get(SETTINGS, ()))
        known += [{}] * (len(given) - len(known))
        added = {
            LATENTS: given + list(latents),
            METHOD: method,
            SETTINGS: known + [dict(settings) for _ in latents],
            APART: apart,
        }
        result.append([states, extra | added])
    return result
