"""Sampling of tokens: from logits to the next one, and on until the text ends.

The order is that of transformers' `generate`: repetition (and presence) penalty, temperature,
top-k, top-p, min-p. Penalties count what was written, not the prompt: a caption has to repeat its
prompt's words. `generate` is a generator, so progress, cancel and showing the text as it grows
belong to the caller.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .language_model import KeyValueCache, LanguageModel

# <|im_end|>, which ends a turn, and <|endoftext|>.
STOP_TOKENS = (151645, 151643)

# Seeds are as torch and ComfyUI take them: below 2**64.
SEEDS = 2**64


@dataclass(frozen=True)
class Sampling:
    """Settings by which the next token is sampled; the defaults take the most likely one.

    temperature: divides the logits; 0 takes the most likely token.
    top_k: only so many of the most likely; 0 for all.
    top_p: only the most likely that together have this probability.
    min_p: only those with this share of the most likely one's probability.
    repetition_penalty: divides positive logits of tokens that were written, multiplies negative.
    presence_penalty: is taken from the logits of tokens that were written.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0

    def __post_init__(self):
        for name, allowed, expected in (
            ("temperature", self.temperature >= 0, "0 (most likely) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 <= self.top_p <= 1, "0 to 1 (all)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (all) to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0; 1 is none"),
        ):
            if not allowed:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected}.")

    def candidates(self, logits: Tensor, written: Collection[int] = ()) -> tuple[Tensor, Tensor]:
        """Tokens that may follow and their probabilities, from logits (V,)."""
        scores = self._penalised(logits.float(), written)
        tokens = torch.arange(len(scores), device=scores.device)
        if self.temperature == 0:
            best = scores.argmax(keepdim=True)
            return best, torch.ones_like(best, dtype=torch.float32)
        scores = scores / self.temperature
        if 0 < self.top_k < len(scores):
            # As many as tie with the last of them.
            tokens = (scores >= scores.topk(self.top_k).values[-1]).nonzero()[:, 0]
        if self.top_p < 1:
            ordered, order = scores[tokens].sort()
            in_top_p = ordered.softmax(dim=0).cumsum(dim=0) > 1 - self.top_p
            in_top_p[-1] = True
            tokens = tokens[order[in_top_p]]
        if self.min_p > 0:
            probabilities = scores[tokens].softmax(dim=0)
            tokens = tokens[probabilities >= self.min_p * probabilities.max()]
        return tokens, scores[tokens].softmax(dim=0)

    def choose(self, logits: Tensor, written: Collection[int], generator: torch.Generator) -> int:
        """The next token. Raises ValueError where logits are not finite."""
        if not torch.isfinite(logits).all():
            raise ValueError(
                "The language model gave NaN or infinity instead of a word. Load the text encoder "
                "with dtype bf16 or fp32; if it is that already, the file is damaged."
            )
        # On the CPU, so that a seed means the same on every device.
        tokens, probabilities = self.candidates(logits.cpu(), written)
        if len(tokens) == 1:
            return int(tokens)
        return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])

    def _penalised(self, logits: Tensor, written: Collection[int]) -> Tensor:
        if not written or (self.repetition_penalty, self.presence_penalty) == (1, 0):
            return logits
        tokens = torch.tensor(sorted(set(written)), device=logits.device)
        scores = logits[tokens]
        penalty = self.repetition_penalty
        scores = torch.where(scores < 0, scores * penalty, scores / penalty)
        return logits.index_copy(0, tokens, scores - self.presence_penalty)


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    sampling: Sampling | None = None,
    *,
    max_tokens: int,
    seed: int = 0,
    stop: Collection[int] = STOP_TOKENS,
) -> Iterator[int]:
    """Yield the tokens that follow a prompt's, up to and with one of `stop`.

    sampling: None takes the most likely token each time.
    seed: of this text; the same on every device as far as its logits are.

    Raises ValueError for a prompt without tokens or with some that the model does not know.
    """
    sampling = sampling or Sampling()
    if not prompt:
        raise ValueError("The prompt has no tokens; expected at least one to continue from.")
    if max(prompt) >= model.config.vocab_size:
        # On a GPU the lookup would fail later, and take the process's CUDA context with it.
        raise ValueError(
            f"The tokenizer makes token {max(prompt)}, but the language model knows "
            f"{model.config.vocab_size}. Use the tokenizer of this model."
        )
    generator = torch.Generator().manual_seed(seed % SEEDS)
    cache = KeyValueCache()
    written: list[int] = []
    tokens = list(prompt)
    for _ in range(max_tokens):
        token = sampling.choose(model(tokens, cache), written, generator)
        written.append(token)
        yield token
        if token in stop:
            return
        tokens = [token]
