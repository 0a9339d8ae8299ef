"""krea2-nano with its reference LoRA: the layout of the prompt in a reference's colours."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

from krea2_model import Krea2Pipeline, References, nano
from krea2_model.transformer.references import Reference
from nano_training.judge import background_colour, judge, read_thing
from nano_training.references import (
    coloured,
    layout,
    mean_palette,
    reference_exam,
)
from nano_training.scenes import (
    COLOURS,
    Scene,
    Thing,
    caption,
    draw,
    held_out_prompts,
    random_scene,
    rgb,
)


@pytest.fixture(scope="module")
def turbo(tokenizer_folder) -> Krea2Pipeline:
    pipeline = Krea2Pipeline.nano()
    report = pipeline.load_lora(nano.REFERENCE_LORA)
    assert not report.unmatched and report.ranks == (16,)
    return pipeline


def latents(pipeline, references) -> list[Reference]:
    """References for a batch: of each as many pictures as are painted."""
    pictures = (torch.from_numpy(np.stack(shown)).movedim(-1, 1) for shown in references)
    return [Reference(pipeline.encode(batch)) for batch in pictures]


def paint_cases(pipeline, cases, look: bool = True, cache: bool = False) -> np.ndarray:
    """Pictures of cases, the n-th from seed n; without `look` there are no references."""
    shown = [[draw(case.reference) for case in cases]] if look else []
    references = References(latents(pipeline, shown), cache=cache)
    options = {"seed": list(range(len(cases))), "output_type": "np"}
    return pipeline([case.prompt for case in cases], references=references, **options)


def share(verdicts, *parts: str) -> float:
    return float(np.mean([all(verdict[part] for part in parts) for verdict in verdicts]))


def verdicts(pictures, cases) -> list[dict[str, bool]]:
    return [judge(picture, case.scene) for picture, case in zip(pictures, cases, strict=True)]


def test_layout_of_the_prompt_in_the_colours_of_the_reference(turbo):
    cases = reference_exam()[:12]
    pictures = paint_cases(turbo, cases)
    found = verdicts(pictures, cases)
    assert share(found, "colour", "shape", "place") >= 0.8
    assert share(found, "background") >= 0.9
    # The prompts do not say it.
    guessed = verdicts(paint_cases(turbo, cases[:8], look=False), cases[:8])
    assert share(guessed, "colour") <= 0.25
    assert share(guessed, "background") <= 0.4
    # References that see themselves alone: other pictures, in mostly the same colours.
    cached = paint_cases(turbo, cases[:6], cache=True)
    assert share(verdicts(cached, cases[:6]), "background") >= 0.8
    assert 0.01 < np.abs(cached - pictures[:6]).mean() * 255 < 3


def test_colours_that_have_no_name(turbo):
    """They are leant towards rather than met: nano itself knows ten colours."""
    cases = reference_exam(8, named=False)
    pictures = paint_cases(turbo, cases)
    found = verdicts(pictures, cases)
    assert share(found, "shape", "place") >= 0.7
    assert share(found, "background") >= 0.85
    read = [(read_thing(picture), case) for picture, case in zip(pictures, cases, strict=True)]
    read = [(thing, case) for thing, case in read if thing is not None]
    assert len(read) >= 7
    shown = np.stack([thing.rgb for thing, _ in read])
    wanted = np.stack([rgb(case.scene.things[0].colour) for _, case in read])
    distances = np.linalg.norm(shown[:, None] - wanted[None], axis=2)
    own, others = np.diag(distances), np.median(distances, axis=1)
    assert np.mean(own < others) >= 0.8
    assert np.median(own) < 0.3


def test_prompts_without_a_reference_are_painted_as_before(turbo):
    prompts, scenes = zip(*held_out_prompts()[:8], strict=True)
    pictures = turbo(list(prompts), seed=list(range(8)), output_type="np")
    found = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    for part in ("background", "colour", "shape", "place"):
        assert share(found, part) >= 0.85, part


def test_two_references_meet_in_the_middle(turbo):
    """Two pictures of one thing and background alone, then both: the colours lie between."""
    random = Random("two references")
    count = 5
    palettes = [random.sample(list(COLOURS), 4) for _ in range(count)]
    shown = [
        [draw(Scene((Thing(shape, p[first], "top left"),), p[first + 1])) for p in palettes]
        for shape, first in (("star", 0), ("ring", 2))
    ]
    prompts = ["a large circle"] * count
    seeds = list(range(count))

    def backgrounds(*references) -> np.ndarray:
        given = latents(turbo, references)
        pictures = turbo(prompts, seed=seeds, output_type="np", references=given)
        return np.stack([background_colour(picture) for picture in pictures])

    one, other, both = backgrounds(shown[0]), backgrounds(shown[1]), backgrounds(*shown)
    apart = np.linalg.norm(one - other, axis=1)
    for alone in (one, other):
        assert np.mean(np.linalg.norm(both - alone, axis=1) < 0.85 * apart) >= 0.75


def test_exam_asks_for_what_only_the_reference_says():
    cases = [*reference_exam(), *reference_exam(named=False)]
    words = {*COLOURS, "violet", "jet", "background", "wall"}
    for case in cases:
        assert not words & set(case.prompt.lower().replace(",", " ").replace(".", " ").split())
        (asked,) = case.scene.things
        assert case.scene.is_held_out and case.scene.background == case.reference.background
        for shown in case.reference.things:
            assert asked.colour == shown.colour
            assert asked.shape != shown.shape and asked.place != shown.place
        assert read_thing(draw(case.scene)) is not None
    named = [case.scene.things[0].colour in COLOURS for case in cases]
    assert named == [True] * 40 + [False] * 40


def test_open_colours_are_filled_and_not_spoken_of():
    random = Random(0)
    for _ in range(200):
        scene = random_scene(random)
        text = caption(layout(scene), random, brief=0).lower()
        assert not any(colour in text for colour in (*COLOURS, "violet", "background", "wall"))
        assert coloured(scene, ("red", "blue")) == scene
        whole = coloured(layout(scene), ("red", "blue"))
        assert whole.background == "blue" and {t.colour for t in whole.things} == {"red"}
    assert mean_palette([("red", "blue")] * 2) == ("red", "blue")
    assert mean_palette([("#000000", "#102030"), ("#ffffff", "#304050")]) == ("#808080", "#203040")
    assert np.array_equal(rgb("#ff0080"), np.array((255, 0, 128), dtype=np.float32) / 255)
