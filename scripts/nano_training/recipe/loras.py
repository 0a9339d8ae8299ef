"""The two LoRAs on Raw: outlines on ruled paper, and colours taken from reference images."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from torch import Tensor

from krea2_model.transformer.model import Krea2Transformer
from krea2_training.engine.rates import Rates

from ..loop import Stage
from ..train_lora import RANK, add_lora, lora_tensors
from ..train_reference import EMPHASIS
from ..train_reference import RANK as REFERENCE_RANK
from .drawn import Artists
from .plan import Plan
from .pool import EncodedPool, ReferenceBatch
from .transformer import TOKENS, flow_loss

STEPS_A_CHUNK = 8  # of references, before the next is encoded


def train_lora(
    folder: Path, pool: EncodedPool, raw: Krea2Transformer, rates: Rates, plan: Plan
) -> dict[str, Tensor]:
    """Train the notebook's style; `raw` is changed in place. Returns the LoRA's tensors."""
    torch.manual_seed(3)
    model, trained = add_lora(raw, RANK)
    optimiser = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    stage = Stage("lora", folder, model, [optimiser], rates, decay=0.98)

    def loss_of_step(step: int) -> Tensor:
        random = Random(f"lora {step}")
        batch = pool.batch(plan.lora_captions * TOKENS, random)
        return flow_loss(model, batch, random, plan.draws)

    stage.train(loss_of_step)
    return lora_tensors(stage)


def train_reference(
    folder: Path,
    artists: Artists,
    pool: EncodedPool,
    raw: Krea2Transformer,
    rates: Rates,
    plan: Plan,
) -> dict[str, Tensor]:
    """Train the reference LoRA; `raw` is changed in place. Returns the LoRA's tensors."""
    torch.manual_seed(4)
    model, trained = add_lora(raw, REFERENCE_RANK)
    optimiser = torch.optim.Muon(trained, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    stage = Stage("reference", folder, model, [optimiser], rates, decay=0.98)
    chunks: list[ReferenceBatch] = []

    def loss_of_step(step: int) -> Tensor:
        # A few chunks at a time, so that batches of several sizes take turns.
        fresh = artists.take("references", wait=not chunks) if step % STEPS_A_CHUNK == 0 else None
        if fresh is not None:
            chunks.append(ReferenceBatch(fresh, pool.encoder, pool.vae))
            del chunks[:-24]
        random = Random(f"reference {step}")
        batch, references = random.choice(chunks).batch(plan.reference_captions, random)
        emphasis = EMPHASIS * rates.factor(step)
        return flow_loss(model, batch, random, plan.draws, emphasis, references)

    stage.train(loss_of_step)
    return lora_tensors(stage)
