"""The nano reference LoRA: the layout of the prompt in the colours of other pictures.

Learned on Raw; Turbo takes it as well. Pictures are drawn and encoded as training goes, each in
colours of its own; captions are encoded once.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from krea2_model.text.encoder import Qwen3VLTextEncoder
from krea2_model.transformer.model import Krea2Transformer
from krea2_model.vae.model import QwenImageVAE
from krea2_training.engine.rates import Rates

from .examples import (
    LENGTH_STEP,
    Batch,
    encode_captions,
    encode_pictures,
    texts_of,
    where_things_are,
)
from .loop import DEVICE, Stage
from .references import (
    Palette,
    can_be_told_apart,
    coloured,
    layout,
    mean_palette,
    random_palette,
    random_reference,
)
from .scenes import PICTURE_SIZES, Scene, caption, draw, random_scene
from .train_lora import add_lora, lora_tensors
from .train_raw import flow_loss

logger = logging.getLogger(__name__)

RANK = 16
STEPS = 1300
CAPTIONS = 12  # a batch
EMPHASIS = 1.6  # on noise and things at first; colours are open only while there is mostly noise
TEXTS = 3000

PLAIN = 0.15  # share of captions that come without a reference, and with all colours
STATED = 0.12  # of the others, share that state a colour in spite of it
EMPTY = 0.1  # share of captions that are dropped
TWO = 0.2  # share of batches with two references; in half of them each has its own palette
WHITE = 0.5  # share of white backgrounds at first, on which things are easy to find


class ReferenceExamples:
    """Encoded captions of layouts, and batches of pictures in the colours of references."""

    def __init__(self, folder: Path, encoder: Qwen3VLTextEncoder, vae: QwenImageVAE):
        self.vae = vae.to(DEVICE)
        encoder = encoder.to(DEVICE)
        self.empty = encoder.encode([""])[0][0].bfloat16().cpu()
        random = Random("references")
        asked = [_random_layout(random) for _ in range(TEXTS)]
        captions = [caption(scene, random, brief=0) for scene, _ in asked]
        path = folder / "reference_captions.pt"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            torch.save(encode_captions(encoder, captions), partial)
            partial.replace(path)
        self.groups: dict[tuple, list[tuple[Scene, Tensor]]] = defaultdict(list)
        for (scene, plain), taps in zip(asked, torch.load(path, weights_only=True), strict=True):
            self.groups[plain, -(-len(taps) // LENGTH_STEP)].append((scene, taps))

    def batch(self, size: int, random: Random, easy: float = 0.0) -> tuple[Batch, list[Tensor]]:
        """Captions of similar length, pictures of one size, and none, one or two references each.

        easy: how much of the share of white backgrounds there is, from 0 to 1.
        References are latents (size, 16, h_i, w_i).
        """
        keys = list(self.groups)
        key = random.choices(keys, weights=[len(self.groups[key]) for key in keys])[0]
        plain, _ = key
        count = 0 if plain else 2 if random.random() < TWO else 1
        chosen = random.choices(self.groups[key], k=size)
        texts, scenes, shown = [], [], []
        for asked, taps in chosen:
            scene, references = _pictures(asked, count, random, easy)
            # A colour that only the caption says is not to be guessed in spite of a reference.
            dropped = random.random() < EMPTY and (plain or _is_open(asked))
            texts.append(self.empty if dropped else taps)
            scenes.append(scene)
            shown.append(references)
        width, height = _random_size(random)
        pictures = [draw(scene, width, height, random) for scene in scenes]
        things = torch.stack([where_things_are(picture) for picture in pictures]).float()
        latents = encode_pictures(self.vae, pictures)
        references = []
        for column in zip(*shown, strict=True):
            width, height = _random_size(random)
            drawn = [draw(scene, width, height, random) for scene in column]
            references.append(encode_pictures(self.vae, drawn))
        return Batch(latents, things.to(DEVICE), *texts_of(texts)), references


def train_reference(
    folder: Path, examples: ReferenceExamples, raw: Krea2Transformer, steps: int = STEPS
) -> dict[str, Tensor]:
    """Train, or go on training; returns the LoRA's tensors. `raw` is changed in place."""
    torch.manual_seed(4)
    model, trained = add_lora(raw, RANK)
    optimiser = torch.optim.Muon(trained, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    rates = Rates(steps, warmup=30, decay=0.6)
    stage = Stage("reference", folder, model, [optimiser], rates, decay=0.98)

    def loss_of_step(step: int) -> Tensor:
        random = Random(f"reference {step}")
        factor = rates.factor(step)
        batch, references = examples.batch(CAPTIONS, random, easy=factor)
        return flow_loss(model, batch, random, EMPHASIS * factor, references)

    stage.train(loss_of_step)
    return lora_tensors(stage)


def _random_layout(random: Random) -> tuple[Scene, bool]:
    """A scene that mostly leaves colours open, and whether it is a plain one for no reference."""
    scene = random_scene(random)
    if random.random() < PLAIN:
        return scene, True
    if random.random() >= STATED:
        return layout(scene), False
    # White may go without saying; with a reference, that has to mean the reference's background.
    whole = random.random() < 0.5 and scene.background != "white"
    return layout(scene, things=False, background=not whole), False


def _is_open(scene: Scene) -> bool:
    return not scene.background and not any(thing.colour for thing in scene.things)


def _pictures(asked: Scene, count: int, random: Random, easy: float) -> tuple[Scene, list[Scene]]:
    """The scene to paint, and `count` others that show the colours it leaves open."""
    if count == 0:
        return asked, []
    while True:
        palettes: list[Palette] = [random_palette(random, white=easy * WHITE)] * count
        if count > 1 and random.random() < 0.5:
            palettes = [random_palette(random, white=easy * WHITE) for _ in range(count)]
        scene = coloured(asked, mean_palette(palettes))
        if can_be_told_apart(scene) and not scene.is_held_out:
            break
    return scene, [random_reference(palette, random) for palette in palettes]


def _random_size(random: Random) -> tuple[int, int]:
    return random.choices(list(PICTURE_SIZES), weights=list(PICTURE_SIZES.values()))[0]
