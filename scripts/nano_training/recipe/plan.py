"""Sizes and times of a run: on a GPU in minutes, at toy scale on a CPU, in seconds for tests.

**Sizes of the models.** They stay as they are: 7.3 million parameters in six blocks for each of
Raw and Turbo (14.6 MB each in bfloat16), 3.6 million for the VAE (7.2 MB), 1.6 MB of LoRAs: 38 MB
of the 45. Seven blocks would be 41.5 MB, eight 45.1 MB. Turbo as a LoRA of rank 64 on a Raw of ten
blocks would fit too (21 + 7 + 7 + 2 MB), yet Turbo would be no checkpoint that ComfyUI loads by
itself. Nor are blocks what eight minutes lack: the time buys about twice the samples of the first
models, of four times their size. And on the two cores of somebody who tries it, a picture of 256 px
takes four times as long as one of 128 px already.

**What the time buys.** By torch's FLOP counter, a training sample of 256 px takes 12 GFLOP in the
transformer (forward 3.1, and 0.8 to fuse 40 tokens; two draws share the fusion) and 36 in the VAE;
encoding one takes 4.3 in the VAE and 1.1 in the text encoder; distilling one takes 170. An H100
may reach 30 TFLOP/s in the transformer's small matrices and 10 in the VAE's 16 to 64 channels
(estimates, not measured). Then the shares of 8 minutes below are for the VAE 1,900 million pixels
(the first one saw 525 million), for Raw 650,000 samples (319,000 of a quarter of the size), for
Turbo 13,000 (2,160), and for both LoRAs about the steps that they had.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

# Shares of the time. Encoding the pool is part of raw's; "exam" is what is left for the end.
SHARES = {
    "vae": 0.21,
    "raw": 0.43,
    "turbo": 0.16,
    "lora": 0.03,
    "reference": 0.07,
    "exam": 0.1,
}
STAGES = tuple(SHARES)


@dataclass(frozen=True)
class Plan:
    """Numbers of a run; the defaults are those of a GPU with 16 CPU cores.

    Pictures come in chunks of `chunk`, each of one size; a chunk of 256 landscapes takes about
    2.5 s to draw on a core, 50 MB as pixels until it is encoded, and 48 MB of the GPU's memory as
    latents and taps: 11 GB for all.
    """

    chunk: int = 256
    practice_chunks: int = 24  # of shapes, for the VAE alone
    scene_chunks: int = 60
    landscape_chunks: int = 160
    first_chunks: int = 40  # before Raw's first step
    notebook_chunks: int = 8
    reference_chunks: int = 150
    reference_chunk: int = 96
    captions: int = 128  # of a batch at 256 px; smaller pictures come in larger batches
    draws: int = 2  # of noise for each caption
    turbo_captions: int = 48
    lora_captions: int = 48
    reference_captions: int = 32
    vae_pixels: int = 2**18  # of a batch: 64 crops of 64 px or 4 pictures of 256 px
    unseen: int = 32  # pictures of each kind and size on which the VAE is measured
    exam_scenes: int = 120
    exam_landscapes: int = 64
    exam_references: int = 40
    raw_steps: int = 28
    save_every: float = 45.0
    most_steps: dict[str, int] = field(default_factory=dict)

    def steps_of(self, stage: str) -> int:
        return self.most_steps.get(stage, 10**9)


# Everything once, with what two cores do in about two minutes.
TOY = Plan(
    chunk=12,
    practice_chunks=2,
    scene_chunks=2,
    landscape_chunks=3,
    first_chunks=2,
    notebook_chunks=1,
    reference_chunks=3,
    reference_chunk=6,
    captions=3,
    turbo_captions=1,
    lora_captions=2,
    reference_captions=2,
    vae_pixels=2**14,
    unseen=1,
    exam_scenes=4,
    exam_landscapes=2,
    exam_references=2,
    raw_steps=4,
    most_steps={"vae": 40, "raw": 12, "turbo": 2, "lora": 4, "reference": 4},
)
# A step or two of everything, for the tests.
TINY = Plan(
    chunk=4,
    practice_chunks=1,
    scene_chunks=1,
    landscape_chunks=1,
    first_chunks=1,
    notebook_chunks=1,
    reference_chunks=1,
    reference_chunk=2,
    captions=1,
    draws=1,
    turbo_captions=1,
    lora_captions=1,
    reference_captions=1,
    vae_pixels=2**12,
    unseen=1,
    exam_scenes=1,
    exam_landscapes=0,
    exam_references=1,
    raw_steps=1,
    most_steps=dict.fromkeys(STAGES, 1),
)


class Clock:
    """The time of a run, shared among the stages that are still to come.

    A stage that ends early leaves its time to the others; time lost at the start is taken from all.
    """

    def __init__(self, seconds: float, stages: tuple[str, ...] = STAGES):
        self.end = time.monotonic() + seconds
        self.stages = list(stages)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def seconds_of(self, stage: str) -> float:
        """Seconds for a stage that begins now."""
        later = self.stages[self.stages.index(stage) :]
        return max(0.0, self.left) * SHARES[stage] / sum(SHARES[name] for name in later)
