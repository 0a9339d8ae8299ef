"""The exams: what the files that a run wrote paint from prompts that training never showed.

Scenes at 128 and 256 px, landscapes at 256 px, the two LoRAs on Turbo. Pictures come from the
pipeline that users have, and are read back by image analysis on all cores.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from krea2_model import (
    Krea2Pipeline,
    References,
    load_text_encoder,
    load_transformer,
    load_vae,
    nano,
)
from krea2_model.text.encoder import Qwen3VLTextEncoder
from krea2_model.transformer.references import Reference

from ..judge import background_colour, judge
from ..landscapes.judge import judge_landscape
from ..landscapes.scene import Landscape
from ..landscapes.words import landscape_prompts
from ..loop import DEVICE
from ..references import reference_exam
from ..scenes import draw, held_out_prompts, ruled_paper
from .drawn import Artists
from .plan import Clock, Plan

logger = logging.getLogger(__name__)

BATCH = 32
SECONDS = 6  # without which an exam is not begun
Scores = dict[str, float]


def pipeline_of(folder: Path, variant: str, lora: Path | None = None) -> Krea2Pipeline:
    """The pipeline of the files that a run wrote into a folder."""
    options = {"device": DEVICE, "dtype": torch.float32}
    pipeline = Krea2Pipeline(
        load_transformer(folder / nano.TRANSFORMERS[variant].name, **options),
        _text_encoder(),
        load_vae(folder / nano.VAE.name, **options),
        device=DEVICE,
        offload="none",
    )
    if lora is not None:
        pipeline.load_lora(folder / lora.name)
    return pipeline


@cache
def _text_encoder() -> Qwen3VLTextEncoder:
    """The text encoder on the device, which all pipelines share."""
    return load_text_encoder(nano.text_encoder_file(), device=DEVICE, dtype=torch.float32)


def paint(pipeline: Krea2Pipeline, prompts: list[str], side: int, **options) -> np.ndarray:
    """A picture (side, side, 3) in [0, 1] for each prompt; the n-th is from seed n."""
    pictures = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        seeds = list(range(start, start + len(part)))
        size = {"height": side, "width": side}
        pictures.append(pipeline(part, seed=seeds, output_type="np", **size, **options))
    return np.concatenate(pictures)


def run_exams(folder: Path, artists: Artists, plan: Plan, clock: Clock) -> dict[str, Scores]:
    """Shares of right pictures in percent by exam and part; what there is no time for is missing.

    Exams that need a file that has not been written are missing too.
    """
    results: dict[str, Scores] = {}
    for variant in ("turbo", "raw"):
        if not (folder / nano.TRANSFORMERS[variant].name).is_file():
            continue
        pipeline = pipeline_of(folder, variant)
        options = {"steps": plan.raw_steps} if variant == "raw" else {}
        for side in (128, 256):
            name = f"{variant}, scenes at {side} px"
            exam = lambda: _scenes(pipeline, artists, plan, side, options)  # noqa: B023, E731
            _run(results, name, exam, clock)
        landscapes = lambda: _landscapes(pipeline, artists, plan, options)  # noqa: B023, E731
        _run(results, f"{variant}, landscapes at 256 px", landscapes, clock)
    if (folder / nano.TRANSFORMERS["turbo"].name).is_file():
        if (folder / nano.LORA.name).is_file():
            _run(results, "notebook LoRA", lambda: _notebook(folder, plan), clock)
        if (folder / nano.REFERENCE_LORA.name).is_file():
            _run(results, "reference LoRA", lambda: _references(folder, plan), clock)
    return results


def _run(results: dict[str, Scores], name: str, exam: Callable[[], Scores], clock: Clock) -> None:
    if clock.left < SECONDS:
        logger.warning("No time is left for the exam: %s.", name)
        return
    if scores := exam():
        results[name] = scores
        logger.info("%s: %s", name, scores)


def _scenes(pipeline, artists: Artists, plan: Plan, side: int, options: dict) -> Scores:
    # One and two things in turns, so that few prompts hold both.
    exam = held_out_prompts()[: plan.exam_scenes * 2 // 3 or 1]
    exam += held_out_prompts()[80 : 80 + plan.exam_scenes // 3]
    pictures = paint(pipeline, [prompt for prompt, _ in exam], side, **options)
    return mean_scores(artists.map(judge, list(pictures), [scene for _, scene in exam]))


def _landscapes(pipeline, artists: Artists, plan: Plan, options: dict) -> Scores:
    if not plan.exam_landscapes:
        return {}
    exam = landscape_prompts(plan.exam_landscapes)
    pictures = paint(pipeline, [prompt for prompt, _ in exam], 256, **options)
    scenes: list[Landscape] = [scene for _, scene in exam]
    verdicts = artists.map(judge_landscape, list(pictures), scenes)
    return mean_scores([_by_kind(verdict) for verdict in verdicts])


def _by_kind(verdict: dict[str, bool]) -> dict[str, bool]:
    """The verdict, and whether all of it is right."""
    return verdict | {"all": all(verdict.values())}


def _notebook(folder: Path, plan: Plan) -> Scores:
    """The share of pictures on the paper of the style."""
    prompts = [prompt for prompt, _ in held_out_prompts()[: plan.exam_references]]
    pictures = paint(pipeline_of(folder, "turbo", nano.LORA), prompts, 128)
    paper = background_colour(ruled_paper(128, 128))
    close = [np.abs(background_colour(picture) - paper).max() < 0.1 for picture in pictures]
    return {"paper": round(100 * float(np.mean(close)), 1)}


def _references(folder: Path, plan: Plan) -> Scores:
    cases = reference_exam(plan.exam_references)
    pipeline = pipeline_of(folder, "turbo", nano.REFERENCE_LORA)
    pictures = []
    for start in range(0, len(cases), BATCH):
        part = cases[start : start + BATCH]
        shown = np.stack([draw(case.reference) for case in part])
        latents = pipeline.encode(torch.from_numpy(shown).movedim(-1, 1))
        pictures.append(
            pipeline(
                [case.prompt for case in part],
                references=References([Reference(latents)]),
                seed=list(range(start, start + len(part))),
                output_type="np",
                height=128,
                width=128,
            )
        )
    verdicts = [
        judge(p, case.scene) for p, case in zip(np.concatenate(pictures), cases, strict=True)
    ]
    return mean_scores(verdicts)


def mean_scores(verdicts: list[dict[str, bool]]) -> Scores:
    """The share of right answers to each question, in percent."""
    answers = defaultdict(list)
    for verdict in verdicts:
        for part, right in verdict.items():
            answers[part].append(right)
    return {part: round(100 * float(np.mean(rights)), 1) for part, rights in answers.items()}
