"""Regions of a run in Python: arguments, texts, places and LoRAs; as JSON and as a picture."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from krea2_model import Krea2Pipeline, NegativeGuidance, Region, Regions, nano
from krea2_model.checkpoints.identify import CheckpointError
from krea2_model.features.region_list import read_regions
from krea2_model.features.region_places import place_of
from krea2_model.images.region_picture import COLOURS, draw_regions
from krea2_model.images.region_shapes import RegionShape, RegionShapes

LEFT, RIGHT, WHOLE = (0, 0, 0.5, 1), (0.5, 0, 0.5, 1), (0, 0, 1, 1)
OPTIONS = {"height": 64, "width": 64, "steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def pipeline(tokenizer_folder):
    return Krea2Pipeline.nano()


@pytest.fixture(scope="module")
def paint(pipeline):
    def paint(prompt="a blue background", **options):
        return pipeline(prompt, **OPTIONS | options)[0]

    return paint


def test_places_in_words():
    for box, words in (
        (LEFT, "on the left"),
        ((0, 0.5, 1, 0.5), "at the bottom"),
        ((0.6, 0, 0.4, 0.4), "in the top right"),
        ((0.25, 0.25, 0.5, 0.5), ""),
        ("background", "in the background"),
    ):
        assert place_of(RegionShape.of(box)) == words
    mask = torch.zeros(40, 60)
    mask[5:15, 40:60] = 1
    assert place_of(RegionShape.of(mask=mask)) == "in the top right"


def test_places_go_to_the_prompts_that_are_asked_for():
    entries = [
        Region("a fox.", LEFT),
        Region(loras=[(nano.LORA, 1)], box=(0.4, 0, 0.2, 1)),
        Region("(a wolf:1.2)", RIGHT),
    ]
    for options, whole, prompts in (
        ({}, "A wood.", [FOX, None, WOLF]),
        ({"places": False}, "A wood.", ["a fox.", None, "(a wolf:1.2)"]),
        ({"in_prompt": True}, f"A wood, {FOX}, {WOLF}", [FOX, None, WOLF]),
    ):
        regions = Regions(entries, **options)
        assert (regions.whole(["A wood."]), regions.prompts()) == ([whole], prompts)


FOX, WOLF = "a fox on the left", "(a wolf:1.2) on the right"


def test_one_region_over_the_whole_image_is_a_prompt_of_its_own(paint):
    """Where the prompt counts for nothing; an empty window and strength 0 are no region."""
    region = Region("a red circle", WHOLE)
    options = {"text_factor": 0, "places": False}
    found = paint("a purple star on the left", regions=Regions([region], **options))
    assert np.abs(found - paint("a red circle")).max() < 1e-3
    for change in ({"start": 1}, {"strength": 0}):
        off = Regions([dataclasses.replace(region, **change)], **options)
        assert np.array_equal(paint(regions=off), paint())


def test_weights_and_images_count_in_regions(paint):
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    region = Region("a (red:1.4) circle", LEFT)
    plain, weighted = paint(regions=region), paint(regions=region, prompt_weights=True)
    seen = paint(regions=dataclasses.replace(region, images=[image]))
    for one, other in ((plain, weighted), (plain, seen), (weighted, seen)):
        assert np.abs(one - other).max() > 0.005


def test_a_batch_has_the_same_regions(pipeline):
    """Prompts of other lengths, which are padded, with guidance and a negative by attention."""
    regions = [Region("a red circle", LEFT), Region("a green star on the right", RIGHT)]
    options = OPTIONS | {"regions": regions, "output_type": "latent", "guidance": 1.5}
    options["negative_guidance"] = NegativeGuidance()
    prompts = ["white", "a yellow background, and a drawing of nothing else"]
    both = pipeline(prompts, ["", "pink"], seed=[3, 4], **options)
    for number, (prompt, negative) in enumerate(zip(prompts, ["", "pink"], strict=True)):
        one = pipeline(prompt, negative, seed=3 + number, **options)
        torch.testing.assert_close(both[number], one[0], atol=2e-4, rtol=2e-4)


def test_a_region_of_loras_alone(pipeline):
    """The rest of the picture stays within 2 of 255; strength 0 is the picture without regions."""
    prompt = "a red circle on the left and a green square on the right"

    def paint(*loras):
        regions = [Region(box=LEFT, loras=[(nano.LORA, scale)]) for scale in loras]
        return pipeline(prompt, regions=regions or None, output_type="np")[0]

    plain = paint()
    change = 255 * np.abs(paint(1.0) - plain).mean(axis=(0, 2))
    assert change[:56].mean() > 10 and change[72:].mean() < 2
    assert np.array_equal(paint(0.0), plain)


def test_a_lora_whose_weights_no_token_has_is_refused_or_said(pipeline, tmp_path):
    shapes = pipeline._loras[0].shapes
    norm, layer = "blocks.0.prenorm.scale", "blocks.0.attn.wq"
    width = shapes[f"{norm}.weight"][0]
    difference = {f"diffusion_model.{norm}.diff": 0.1 * torch.ones(width)}
    save_file(difference, tmp_path / "norms.safetensors")
    region = Region("a red circle", LEFT, loras=[(tmp_path / "norms.safetensors", 1.0)])
    with pytest.raises(CheckpointError, match="all tokens at once .blocks.0.prenorm"):
        pipeline("white", regions=region, **OPTIONS)
    out, features = shapes[f"{layer}.weight"]
    factors = {"lora_A": torch.ones(2, features), "lora_B": torch.ones(out, 2)}
    matrices = {f"diffusion_model.{layer}.{n}.weight": part for n, part in factors.items()}
    save_file(difference | matrices, tmp_path / "both.safetensors")
    region = dataclasses.replace(region, loras=[(tmp_path / "both.safetensors", 0.5)])
    (report,) = Regions([region]).prepared(shapes, (4, 4)).reports
    assert report.startswith("Region 1: both.safetensors")
    assert "not used in a region: blocks.0.prenorm.scale.weight" in report


def test_the_picture_of_regions():
    """Each region in its colour; for the canvas of the page all but rectangles."""
    mask = torch.zeros(32, 64)
    mask[:, 48:] = 1
    shapes = RegionShapes(
        [RegionShape.of("background"), RegionShape.of(LEFT), RegionShape.of(mask=mask)]
    )
    found = draw_regions(shapes, 128, 64)
    assert found.picture.shape == (1, 256, 512, 3)
    assert found.areas == pytest.approx([0.25, 0.5, 0.25])
    places = {0: (20, 300), 1: (20, 100), 2: (20, 500)}
    for number, (row, column) in places.items():
        colour = (255 * found.picture[0, row, column]).round().int().tolist()
        assert tuple(colour) == COLOURS[number]
    # Numbers are white.
    assert (found.picture == 1).all(dim=-1)[:, :, :256].any()
    below = draw_regions(shapes, 128, 64, torch.ones(1, 8, 16, 3), boxes=False).picture
    assert (below[0, :, :240] == 1).all() and (below[0, 20, 500] < 1).any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Regions([]), "There are no regions; expected 1 to 8"),
        (lambda: Regions([Region("a", LEFT)] * 9), "There are 9 regions"),
        (lambda: Regions([Region("a", (0.5, 0, 0.6, 1))]), "Region 1's box lies outside"),
        (lambda: Regions([Region("a", (0, 0, 0, 1))]), "box is empty"),
        (lambda: Regions([Region("a", LEFT), Region("a")]), "Region 2 has neither a box nor"),
        (lambda: Regions([Region("a", "background")] * 2), "are the background"),
        (lambda: Regions([Region("a", LEFT, soft=2)]), "Region 1's soft edge is 2"),
        (lambda: Regions([Region("a", LEFT)], soft=None), "soft is None"),
        (lambda: Region("a", LEFT, strength=11), "strength is 11"),
        (lambda: Region("a", LEFT, start=0.7, end=0.3), "start 0.7 and end 0.3"),
        (lambda: Region(3, LEFT), "region's prompt"),
        (lambda: Region(" ", LEFT), "A region has no prompt"),
        (lambda: Region("", LEFT, images=["a.png"], loras=[("a", 1)]), "images but no prompt"),
        (lambda: Region("a", LEFT, loras=["file"]), "expected a pair"),
        (lambda: Region("a", LEFT, loras="file"), "expected pairs"),
        (lambda: Region("a", LEFT, loras=[("file", 101)]), "scale 101; expected -100"),
        (lambda: Regions([Region("a", LEFT)], separate=1.5), "separate is 1.5"),
        (lambda: Regions([Region("a", LEFT)], text_factor=-1), "factor in regions is -1"),
        (lambda: Regions(["a fox"]), "entry of regions"),
        (lambda: Regions.read([{"prompt": "a"}, {"box": LEFT}]), "Region 2 has no prompt"),
    ],
)
def test_bad_regions_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        ([Region("x", mask=np.ones((10, 90)))], "Region 1's mask is 90 x 10 px and the image 64"),
        ([Region("x", LEFT), Region("y", WHOLE)], "Region 1 lies below others"),
        ([Region("x", LEFT, loras=[("nowhere.safetensors", 1)])], "nowhere.safetensors"),
        ([Region("x", LEFT, images=["nowhere.png"])], "nowhere.png"),
    ],
)
def test_regions_of_no_use_are_refused_before_anything_is_encoded(
    pipeline, monkeypatch, regions, words
):
    def encode(*args, **options):
        pytest.fail("a prompt was encoded")

    monkeypatch.setattr(pipeline, "encode_prompt", encode)
    with pytest.raises(ValueError, match=words):
        pipeline("white", regions=regions, **OPTIONS)


def test_regions_as_text():
    entries = [
        {"prompt": "a knight", "box": [0, 0.2, 0.5, 0.8], "strength": 1.2, "soft": 0.1},
        {"prompt": "a dragon", "mask": "d.png", "images": ["a.png"], "start": 0, "end": 0.5},
        {"box": "background", "loras": [["b.safetensors", 0.5]]},
    ]
    found, options = read_regions(json.dumps(entries))
    assert options == {} and found[:2] == entries[:2]
    assert found[2]["loras"] == [("b.safetensors", 0.5)]
    whole = {"regions": entries, "separate": 0.5, "places": False}
    assert read_regions(json.dumps(whole)) == (found, {"separate": 0.5, "places": False})
    numbers = [{"prompt": "x", "mask": 2, "images": [1, 3]}]
    assert read_regions(json.dumps(numbers), by_number=True) == (numbers, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no regions"),
        ("[{]", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("7", "regions is 7; expected a JSON list"),
        ('{"regions": 7}', "regions is 7"),
        ('{"regions": [], "colour": 1}', "has 'colour'; expected only text_factor"),
        ("[7]", "Region 1 is 7"),
        ('[{"promt": "x"}]', "Region 1 has 'promt'; expected only prompt, box"),
        ('[{"prompt": 7}]', "Region 1 has prompt 7; expected a text"),
        ('[{"box": [0, 0, 1]}]', r"box \[0, 0, 1\]; expected four fractions"),
        ('[{"strength": "1"}]', 'strength "1"; expected a number'),
        ('[{"mask": 1}]', "mask 1; expected the name of a picture"),
        ('[{"loras": [["a"]]}]', "expected a list of .file, strength."),
        (json.dumps([{"prompt": "x"}] * 9), "9 regions"),
        (7, "regions is 7; expected a list as JSON"),
    ],
)
def test_bad_texts_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        read_regions(text)
