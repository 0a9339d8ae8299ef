"""Prompts to embeddings on workers of their own, for cards that do not hold all parts at once."""

from __future__ import annotations

from argparse import Namespace
from functools import lru_cache
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load, save
from torch import Tensor

from krea2_model.checkpoints.text_encoder import load_text_encoder
from krea2_model.cli.checks import check_machine
from krea2_model.cli.model_files import take_from_models
from krea2_model.devices import find_device
from krea2_model.features.prompt_embeds import PromptEmbeds, encode_prompts

from .plan import ENCODED_JOB, RowOptions

# Options with which prompts are not what is encoded, or not by these weights.
_OTHERS = ("lora", "image", "edit", "regions", "style_image", "style")
_KEPT = 64


class JobEncoder:
    """Adds the embeddings of prompts to jobs (`plan.JOB` to `plan.ENCODED_JOB`).

    Jobs whose prompts need more than the text encoder alone, or are wrong, have none: the worker
    that paints them encodes them itself.
    """

    def __init__(self, args: Namespace):
        take_from_models(args)
        weights = check_machine(args)
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        self._options = RowOptions(args)
        self._encoder = load_text_encoder(
            weights.text_encoder,
            tokenizer=weights.tokenizer,
            device=find_device(args.device),
            dtype=dtypes.get(args.dtype, torch.float32 if weights.built_in else None),
            keep_quantised=True,
        )
        self._encode = lru_cache(_KEPT)(self._encode_text)

    def __call__(self, block: pa.Table) -> pa.Table:
        encoded = [self._encoded(job) for job in block.to_pylist()]
        column = pa.array(encoded, ENCODED_JOB.field("encoded").type)
        return block.append_column("encoded", column)

    def _encoded(self, job: dict[str, Any]) -> bytes | None:
        try:
            args = self._options.of_job(job)
            if any(getattr(args, name) for name in _OTHERS):
                return None
            options = (args.weights, args.max_sequence_length)
            positive = self._encode(args.prompt, *options)
            negative = self._encode(args.negative, *options)
        except Exception:  # the painter says what is wrong with the row
            return None
        if any(text.weights is not None for text in (positive, negative)):
            return None
        return save({"positive": positive.taps.cpu(), "negative": negative.taps.cpu()})

    @torch.no_grad()
    def _encode_text(self, text: str, weighted: bool, length: int | None) -> PromptEmbeds:
        return encode_prompts(self._encoder, [text], weighted=weighted, max_sequence_length=length)


def embeddings_of(jobs: list[dict[str, Any]]) -> dict[str, Tensor] | None:
    """Embeddings (B, L, 12, D) of jobs by arguments of the pipeline.

    None where one has none, or where lengths differ.
    """
    encoded = [job.get("encoded") for job in jobs]
    found = [load(data) for data in encoded if data]
    if len(found) < len(jobs):
        return None
    texts = {}
    for name in ("positive", "negative"):
        parts = [one[name] for one in found]
        if len({part.shape for part in parts}) > 1:
            return None
        texts[name] = torch.cat(parts)
    return {"prompt_embeds": texts["positive"], "negative_prompt_embeds": texts["negative"]}
