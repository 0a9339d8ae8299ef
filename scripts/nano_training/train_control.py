"""The nano control LoRA: pictures that follow outlines.

Learned on Raw; Turbo takes it as well. A control image enters through an input layer of its own,
whose output is added to that of the transformer's for the same token, and a LoRA beside the blocks
learns what to do with it. Pairs of picture and outlines are encoded once.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from krea2_model.text.encoder import Qwen3VLTextEncoder
from krea2_model.transformer.model import Krea2Transformer, patchify
from krea2_model.vae.model import QwenImageVAE
from krea2_training.engine.rates import Rates
from krea2_training.samples import holding
from krea2_training.weights.adapters import adapters_of

from .examples import (
    LENGTH_STEP,
    Batch,
    encode_captions,
    encode_pictures,
    texts_of,
    where_things_are,
)
from .loop import DEVICE, Stage
from .outlines import Drawn, random_drawn, words_of
from .scenes import PICTURE_SIZES
from .train_lora import add_lora
from .train_raw import DRAWS, flow_loss

logger = logging.getLogger(__name__)

RANK = 16
STEPS = 900
CAPTIONS = 12  # a batch
PAIRS = 1600
EMPHASIS = 1.3  # on noise and things at first; where things are is settled early in a run
STATED = 0.15  # share of captions that name the place
EMPTY = 0.1  # share of captions that are dropped
NO_CONTROL = 0.05  # share of batches without outlines, that is an empty control image

Pair = tuple[Tensor, Tensor, Tensor, Tensor]  # latents, outlines' latents, where things are, taps


class OutlineExamples:
    """Pictures, their outlines and captions, encoded once and kept on disk."""

    def __init__(self, folder: Path, encoder: Qwen3VLTextEncoder, vae: QwenImageVAE):
        encoder = encoder.to(DEVICE)
        self.empty = encoder.encode([""])[0][0].bfloat16().cpu()
        path = folder / "outlines.pt"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            torch.save(_encoded_pairs(encoder, vae.to(DEVICE)), partial)
            partial.replace(path)
        self.groups: dict[tuple, list[Pair]] = defaultdict(list)
        for pair in torch.load(path, weights_only=True):
            latents, _, _, taps = pair
            self.groups[latents.shape[-2:], -(-len(taps) // LENGTH_STEP)].append(pair)

    def batch(self, size: int, random: Random) -> tuple[Batch, Tensor]:
        """Examples of one picture size and of similar length, and latents of their outlines."""
        groups = list(self.groups.values())
        group = random.choices(groups, weights=[len(group) for group in groups])[0]
        chosen = random.choices(group, k=size)
        latents, outlines, things = (
            torch.stack([pair[part] for pair in chosen]).float().to(DEVICE) for part in range(3)
        )
        taps = [self.empty if random.random() < EMPTY else pair[3] for pair in chosen]
        return Batch(latents, things, *texts_of(taps)), outlines


class ControlledInput(nn.Module):
    """A frozen input layer, and one for control tokens beside it, which begins at 0."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.control = nn.Linear(layer.in_features, layer.out_features, bias=False)
        nn.init.zeros_(self.control.weight)
        self.tokens: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def forward(self, patches: Tensor) -> Tensor:
        image = self.layer(patches)
        return image if self.tokens is None else image + self.control(self.tokens)


def train_control(
    folder: Path, examples: OutlineExamples, raw: Krea2Transformer, steps: int = STEPS
) -> dict[str, Tensor]:
    """Train, or go on training; returns the control LoRA's tensors. `raw` is changed in place."""
    torch.manual_seed(5)
    model, trained = add_lora(raw, RANK)
    model.first = ControlledInput(model.first)
    trained.append(model.first.control.weight)
    optimiser = torch.optim.Muon(trained, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    rates = Rates(steps, warmup=30, decay=0.6)
    stage = Stage("control", folder, model, [optimiser], rates, decay=0.98)

    def loss_of_step(step: int) -> Tensor:
        random = Random(f"control {step}")
        batch, outlines = examples.batch(CAPTIONS, random)
        tokens = patchify(outlines, model.config.patch_size).repeat_interleave(DRAWS, 0)
        model.first.tokens = None if random.random() < NO_CONTROL else tokens
        return flow_loss(model, batch, random, EMPHASIS * rates.factor(step))

    stage.train(loss_of_step)
    with holding(model, stage.values()):
        return control_tensors(model)


def control_tensors(model: Krea2Transformer) -> dict[str, Tensor]:
    """The file's tensors: the whole widened input layer, and A and B of each matrix.

    As control LoRAs for Krea 2 are written: columns of the image first, then those of the control
    image; without alpha, so the scale is 1.
    """
    first = model.first
    assert isinstance(first, ControlledInput)
    widened = torch.cat((first.weight, first.control.weight), dim=1)
    tensors = {"first.weight": widened, "first.bias": first.layer.bias}
    for name, adapter in adapters_of(model).items():
        parts = adapter.tensors()
        tensors |= {f"{name}.A": parts["down"], f"{name}.B": parts["up"]}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _encoded_pairs(encoder: Qwen3VLTextEncoder, vae: QwenImageVAE) -> list[Pair]:
    random = Random("outlines")
    sizes = random.choices(list(PICTURE_SIZES), weights=PICTURE_SIZES.values(), k=PAIRS)
    drawn = [random_drawn(random, *size) for size in sizes]
    taps = encode_captions(encoder, [words_of(one, random, STATED) for one in drawn])
    pairs: list[Pair] = []
    for size in PICTURE_SIZES:
        places = [place for place, own in enumerate(sizes) if own == size]
        for start in range(0, len(places), 16):
            part = places[start : start + 16]
            pairs += _encoded([drawn[i] for i in part], [taps[i] for i in part], vae)
    return pairs


def _encoded(drawn: list[Drawn], taps: list[Tensor], vae: QwenImageVAE) -> list[Pair]:
    pictures = [one.picture() for one in drawn]
    latents = encode_pictures(vae, pictures).half().cpu()
    outlines = encode_pictures(vae, [one.outlines() for one in drawn]).half().cpu()
    things = [where_things_are(picture) for picture in pictures]
    rows = zip(latents, outlines, things, taps, strict=True)
    return [tuple(part.clone() for part in row) for row in rows]  # type: ignore[misc]
