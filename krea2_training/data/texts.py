"""Texts that a text encoder refuses, found and named before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from krea2_model.checks import counted
from krea2_model.text.tokenizer import MAX_TOKENS, PROMPT_BUDGET

from ..settings.methods import Slider
from ..settings.sections import Samples
from .encoders import Encoders
from .examples import Example, some_of
from .prompts import COLUMN, Row

# Of a prompt, in a wording.
PLACE = "{}"
# A text, after words that say where it stands.
Named = tuple[str, str]


def check_texts(texts: Iterable[Named], samples: Samples, encoders: Encoders) -> None:
    """Raise ValueError, naming them, for texts and samples' prompts that cannot be encoded.

    Only what may be too long is read by the tokenizer: a token has at least a byte.
    """
    prompts = samples.prompts if samples.every else ()
    shown = [(f"samples.prompts, number {n}", text) for n, text in enumerate(prompts, start=1)]
    long: dict[str, int] = {}
    for where, text in dict.fromkeys((*texts, *shown)):
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where[0].upper()}{where[1:]} has half a character "
                f"(\\u{ord(text[error.start]):04x}, at position {error.start}); expected whole "
                "ones. Write it uncut."
            ) from error
        if size > MAX_TOKENS and (tokens := encoders.count_tokens(text)) > MAX_TOKENS:
            long.setdefault(where, tokens)
    if long:
        named = some_of([f"{where} ({tokens:,})" for where, tokens in long.items()])
        raise ValueError(
            f"{counted(len(long), 'text')} of more than {MAX_TOKENS:,} tokens: {named}. Shorten "
            f"what is too long; the model was trained on up to {PROMPT_BUDGET} tokens."
        )


def captions_of(examples: Iterable[Example]) -> list[Named]:
    """The captions of pictures."""
    return [(f"the caption of {one.name}", text) for one in examples for text in one.captions]


def worded(wording: str, prompt: str) -> str:
    """A wording with the prompt at its place, or after the prompt."""
    return wording.replace(PLACE, prompt) if PLACE in wording else f"{prompt}, {wording}"


def worded_prompts(rows: Sequence[Row], path: Path, slider: Slider) -> list[Named]:
    """The prompts of a slider: as they are, and in both of its wordings."""
    texts = prompts_of(rows, path)
    return [(where, worded(one, text)) for one in wordings_of(slider) for where, text in texts]


def wordings_of(slider: Slider) -> tuple[str, str, str]:
    """The wordings of a slider's prompts: the prompt alone, positive and negative."""
    return PLACE, slider.positive, slider.negative


def prompts_of(rows: Sequence[Row], path: Path) -> list[Named]:
    """The prompts of a file."""
    return [(f"prompt {n} of {path.name}", row[COLUMN]) for n, row in enumerate(rows, start=1)]
