"""krea2-nano with its control LoRA: things where the outlines are, in the colours of the prompt."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from exam_cases import some
from krea2_model import Control, Krea2Pipeline, nano
from krea2_model.features.control_run import ControlSettings
from krea2_model.features.controls import PreparedControl
from krea2_model.features.prompt_embeds import StepTexts
from krea2_model.features.run_features import RunFeatures
from krea2_model.lora.control import read_control_lora
from krea2_model.sampling import denoise
from krea2_model.schedule import schedule_of
from nano_training.judge import background_colour, is_colour, read_thing
from nano_training.outlines import outline_exam, overlap


@pytest.fixture(scope="module")
def turbo(tokenizer_folder) -> Krea2Pipeline:
    return Krea2Pipeline.nano()


def paint_cases(pipeline, cases) -> np.ndarray:
    """Pictures of cases in one batch, each with outlines of its own; the n-th from seed n."""
    shown = torch.from_numpy(np.stack([case.drawn.outlines() for case in cases]))
    outlines = pipeline.encode(shown.movedim(-1, 1))
    noise = pipeline.prepare_latents(len(cases), seed=list(range(len(cases))))
    sigmas = pipeline.schedule(noise)
    shapes = {n: tuple(weight.shape) for n, weight in pipeline.transformer.named_parameters()}
    control = PreparedControl(read_control_lora(nano.CONTROL_LORA, shapes), ControlSettings())
    sigma_at = schedule_of(sigmas, pipeline.preset)
    features = RunFeatures().with_controls((control.in_run(outlines, sigma_at),))
    embeds = pipeline.encode_prompt([case.prompt for case in cases])
    text = StepTexts(embeds, pipeline.transformer, 1, features)
    options = {"sigmas": sigmas, "guidance": 0.0, "features": features}
    *_, (_, latents, _) = denoise(pipeline.transformer, noise, text, **options)
    return pipeline.decode(latents).movedim(1, -1).numpy()


def test_things_are_where_the_outlines_are_in_the_colours_of_the_prompt(turbo):
    """40 places and sizes that no prompt names, in combinations that training never shows."""
    cases = some(outline_exam())
    pictures = paint_cases(turbo, cases)
    overlaps, colours, backgrounds, shapes = [], [], [], []
    for picture, case in zip(pictures, cases, strict=True):
        background, thing = background_colour(picture), read_thing(picture)
        wanted = case.drawn.scene.things[0]
        overlaps.append(overlap(picture, case.drawn, background))
        backgrounds.append(is_colour(background, case.drawn.scene.background))
        colours.append(thing is not None and is_colour(thing.rgb, wanted.colour))
        shapes.append(thing is not None and thing.shape == wanted.shape)
    assert np.mean(overlaps) >= 0.85
    assert np.quantile(overlaps, 0.1) >= 0.8
    assert np.mean(colours) >= 0.9 and np.mean(backgrounds) >= 0.9 and np.mean(shapes) >= 0.9


def test_without_it_the_prompt_alone_misses_the_place(turbo):
    """And at strength 0 the picture is the one without control, to the bit."""
    cases = outline_exam()[:6]
    prompts = [case.prompt for case in cases]
    options = {"seed": list(range(6)), "output_type": "np"}
    plain = turbo(prompts, **options)
    found = [
        overlap(picture, case.drawn, background_colour(picture))
        for picture, case in zip(plain, cases, strict=True)
    ]
    assert np.mean(found) < 0.6
    outlines = torch.from_numpy(cases[0].drawn.outlines()).movedim(-1, 0)
    control = Control(nano.CONTROL_LORA.name, outlines)
    one = {"seed": 0, "output_type": "np"}
    off = turbo(prompts[0], control=dataclasses.replace(control, strength=0.0), **one)
    assert np.array_equal(off, turbo(prompts[0], **one))
    followed = turbo(prompts[0], control=[control], **one)
    # The same by the stages of a run.
    noise = turbo.prepare_latents(seed=0)
    text, sigmas = turbo.encode_prompt(prompts[0]), turbo.schedule(noise)
    stages = turbo.decode(turbo.denoise(noise, text, sigmas=sigmas, control=control))
    assert np.array_equal(stages[0].movedim(0, -1).numpy(), followed[0])
    assert overlap(followed[0], cases[0].drawn, background_colour(followed[0])) > 0.8
