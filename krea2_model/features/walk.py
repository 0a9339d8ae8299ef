"""A walk: the frames of a way from one picture to another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..checks import check_type
from ..schedule import check_seed
from .variations import PromptBlend, Variation, frame_shares

_OWN = ("vary", "blend", "num_images", "latents", "prompt_embeds")


class Pipeline(Protocol):
    """The methods of `Krea2Pipeline` that a walk calls."""

    def __call__(self, prompt: str, **options: Any) -> Any: ...

    def keep_texts(self, count: int) -> AbstractContextManager[None]: ...


def walk(
    self: Pipeline,
    prompt: str,
    to_prompt: str | None = None,
    *,
    frames: int = 12,
    seed: int = 0,
    to_seed: int | None = None,
    **options,
) -> Iterator[Any]:
    """Frames of a way between two prompts, two seeds, or both; each is given as it is made.

    The first is `pipeline(prompt, seed=seed)` and the last `pipeline(to_prompt, seed=to_seed)`, to
    the bit; None keeps that of the first. Shares between them rise in equal steps, see
    `variations`. frames: how many, both ends counted.
    options: other arguments of a call, for all frames.

    Raises ValueError at once for what is wrong with the walk itself.
    """
    check_type("prompt", prompt, str, "a text")
    shares = frame_shares(frames)
    check_seed(seed)
    if to_prompt is None and to_seed is None:
        raise ValueError("There is nothing to walk to: give to_prompt, to_seed or both.")
    for name in _OWN:
        if name in options:
            raise ValueError(f"{name} is no option of a walk, which sets it for each frame.")
    walk_options(to_prompt, to_seed, 1.0)  # checks both

    def images() -> Iterator[Any]:
        with self.keep_texts(4):
            for share in shares:
                step = walk_options(to_prompt, to_seed, share)
                yield self(prompt, seed=seed, **options, **step)[0]

    return images()


def walk_options(to_prompt: str | None, to_seed: int | None, share: float) -> dict[str, Any]:
    """Arguments of a call for the frame at a share of a walk."""
    options: dict[str, Any] = {}
    if to_prompt is not None:
        options["blend"] = PromptBlend(to_prompt, share)
    if to_seed is not None:
        options["vary"] = Variation(to_seed, share)
    return options
