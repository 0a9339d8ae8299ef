"""Edits: families of LoRAs, their recipes, and runs by them."""

import json

import pytest
import torch

from krea2_model import Edit, Krea2Pipeline, PromptImages, Reference, References, ReferenceSettings
from krea2_model.config import RAW, TURBO
from krea2_model.features.edits import (
    OUTPAINTING,
    PERSON,
    RECIPES,
    REMOVAL,
    TASKS,
    edit_size,
    fit_into,
    plan_edit,
    recipe_for,
)
from krea2_model.lora.edit_family import (
    AI_TOOLKIT,
    IDENTITY,
    REFERENCES_ONLY,
    family_header,
    read_family,
)
from krea2_model.text.vision import resize_for_tower, resize_to_longest
from parity import assert_close
from samples import image

SOFTWARE = json.dumps({"name": "ai-toolkit", "version": "0.9"})


def picture(width, height, seed=1):
    return image(height, width, seed)[0].movedim(-1, 0)


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("krea2_identity_edit_v1_2.safetensors", {}, (IDENTITY, False, True)),
        ("Krea2-Edit.safetensors", {}, (IDENTITY, False, True)),
        ("x.safetensors", {"ss_output_name": "krea_2_edit"}, (IDENTITY, False, True)),
        ("x.safetensors", {"ss_base_model_version": "krea2_edit"}, (IDENTITY, False, True)),
        ("x.safetensors", {"config": json.dumps([{"model": {"arch": "krea2_edit"}}])},
         (IDENTITY, False, True)),
        ("krea2_style_reference.safetensors", {}, (AI_TOOLKIT, False, True)),
        ("x.safetensors", {"config": json.dumps({"model_kwargs": {"edit": True}})},
         (AI_TOOLKIT, False, True)),
        ("krea2_edit.safetensors",
         {"config": json.dumps({"model_kwargs": {"edit": True, "kv_cache": True}})},
         (AI_TOOLKIT, True, True)),
        ("remove.safetensors", {"software": SOFTWARE}, (AI_TOOLKIT, False, False)),
        ("krea2_nano_reference_lora.safetensors", {}, (REFERENCES_ONLY, False, True)),
        *(("x.safetensors", family_header(family, cache), (family, cache, True))
          for family, cache in ((IDENTITY, False), (AI_TOOLKIT, False), (AI_TOOLKIT, True),
                                (REFERENCES_ONLY, False))),
        ("krea2_editorial_photo.safetensors", {"format": "pt"}, None),
        ("style.safetensors", {"x": "{" * 5000, "y": '{"model_kwargs": [1]}'}, None),
    ],
)  # fmt: skip
def test_header_or_name_tell_the_family(name, metadata, expected):
    found = read_family(name, metadata)
    shown = None if found is None else (found.name, found.cache, found.is_edit)
    assert shown == expected


def test_auto_takes_the_surest_sign():
    guess = read_family("a", {"software": SOFTWARE})
    named, other = (read_family(name) for name in ("identity_edit", "style_reference"))
    recipe, reason = recipe_for("auto", [guess, named])
    assert recipe == RECIPES[IDENTITY] and reason == "family identity (by its name)"
    assert recipe_for("auto", [guess])[0] == RECIPES[AI_TOOLKIT]
    cached = read_family("a", {"x": '{"model_kwargs": {"edit": true, "kv_cache": true}}'})
    assert recipe_for("auto", [cached])[0].cache
    assert recipe_for(AI_TOOLKIT, [named]) == (RECIPES[AI_TOOLKIT], "family ai-toolkit (chosen)")
    for loras, words in (([], "none of the LoRAs"), ([named, other], "different families")):
        with pytest.raises(ValueError, match=words):
            recipe_for("auto", loras)
    with pytest.raises(ValueError, match="'kontext'; expected auto, identity"):
        recipe_for("kontext")
    for family in ("auto", IDENTITY):
        with pytest.raises(ValueError, match="need the time 0"):
            recipe_for(family, [named], cache=True)


@pytest.mark.parametrize(
    ("given", "target", "size", "offset"),
    [
        # width x height of the picture and of the image; of the reference; rows, columns.
        ((512, 512), (1024, 1024), (1024, 1024), (0, 0)),
        ((1000, 700), (1024, 704), (1024, 704), (0, 0)),  # 2 % off: cropped to the image
        ((512, 512), (1024, 1536), (1024, 1024), (16, 0)),
        ((512, 512), (1024, 1040 + 512), (1024, 1024), (16.5, 0)),
        ((1920, 1080), (1024, 1024), (1024, 576), (14, 0)),
        ((1000, 1333), (1024, 1024), (768, 1024), (0, 8)),
        ((1000, 1330), (1024, 1024), (768, 1024), (0, 8)),  # 769.9: cropped to whole tokens
        ((1000, 1360), (1024, 1024), (752, 1024), (0, 8.5)),
        ((6000, 40), (256, 256), (256, 16), (7.5, 0)),
    ],
)
def test_a_picture_in_the_middle_of_the_image(given, target, size, offset):
    """By the geometry that identity LoRAs were trained with."""
    pixels, found = fit_into(picture(*given), *target)
    assert (pixels.shape[2], pixels.shape[1]) == size
    assert found == offset
    for start, side, whole in zip(found, size[::-1], target[::-1], strict=True):
        assert 2 * start + side // 16 == whole // 16, "as much before as after"


def test_content_lies_where_its_positions_say():
    """A bright column at 30 % of the picture is at 30 % of the part that it covers."""
    wide = torch.zeros(3, 300, 1000)
    wide[:, :, 300:320] = 1.0
    pixels, _ = fit_into(wide, 512, 512)
    brightest = pixels.mean(dim=(0, 1)).argmax().item()
    assert abs(brightest / pixels.shape[2] - 0.31) < 0.01


def test_what_the_text_encoder_reads():
    pictures = [picture(1600, 900), picture(300, 200)]

    def sizes(family, **options):
        plan = plan_edit(pictures, RECIPES[family], 1024, 576, **options)
        return [tuple(one.pixels.shape[:0:-1]) for one in plan.prompt_images]

    # Longest side 768, and never enlarged; an area of 384 x 384.
    assert sizes(IDENTITY) == [(768, 448), (288, 192)]
    assert sizes(IDENTITY, task=PERSON) == [(1024, 576), (288, 192)]
    assert sizes(IDENTITY, task=PERSON, encoder_side=512) == [(512, 288), (288, 192)]
    small = [resize_for_tower(each, 384) for each in pictures]
    assert sizes(AI_TOOLKIT) == [tuple(each.shape[:0:-1]) for each in small]
    assert sizes(REFERENCES_ONLY) == []
    assert torch.equal(
        resize_to_longest(pictures[1][:, :192, :288], 768), pictures[1][:, :192, :288]
    )
    with pytest.raises(ValueError, match="encoder_side is 20"):
        sizes(IDENTITY, encoder_side=20)


def test_references_of_each_family():
    pictures = [picture(640, 480), picture(2000, 2000)]
    mask = torch.zeros(1, 512, 512)
    mask[:, :256] = 1
    plan = plan_edit(pictures, RECIPES[IDENTITY], 512, 512, boost=(1.0, 2.0), boost_mask=mask)
    shown = [(tuple(pixels.shape[1:]), s.offset, s.boost) for pixels, s in plan.references]
    assert shown == [((384, 512), (4.0, 0.0), 1.0), ((512, 512), (0.0, 0.0), 2.0)]
    shares = plan.references[1][1].boost_mask.shares(2, 2)
    assert shares.tolist() == [1, 1, 0, 0] and plan.references[0][1].boost_mask is None
    plan = plan_edit(pictures, RECIPES[AI_TOOLKIT], 512, 512)
    shown = [(tuple(pixels.shape[1:]), s.offset) for pixels, s in plan.references]
    assert shown == [((480, 640), (0.0, 0.0)), ((1024, 1024), (0.0, 0.0))]


def test_size_of_an_edit():
    assert edit_size(picture(1000, 700)) == (992, 688)
    width, height = edit_size(picture(3000, 2000))
    assert 1.9 < width * height / 1024**2 <= 2.0
    assert edit_size(picture(300, 200), 1.0) == (1248, 832)


def test_tasks_give_raw_what_they_need():
    removal = TASKS[REMOVAL].preset(RAW)
    assert (removal.steps, removal.guidance, removal.mu) == (20, 2.0, None)
    assert TASKS[REMOVAL].preset(TURBO) is None and TASKS[REMOVAL].lacks_guidance(TURBO)
    assert TASKS[PERSON].preset(RAW) is None and not TASKS[PERSON].lacks_guidance(TURBO)
    assert TASKS[OUTPAINTING].sampler == "euler"


@pytest.fixture(scope="module")
def nano(tokenizer_folder):
    return {variant: Krea2Pipeline.nano(variant) for variant in ("raw", "turbo")}


PROMPT = "a red circle"
QUICK = {"seed": 3, "output_type": "pt"}


def by_hand(pipeline, pictures, family, size, guidance):
    """The same run from its parts: prompt and negative with images, references, the loop."""
    width, height = size
    images, references = None, []
    if family != REFERENCES_ONLY:
        resized = resize_for_tower if family == AI_TOOLKIT else resize_to_longest
        side = 384 if family == AI_TOOLKIT else 768
        shown = [resized(each, side) for each in pictures]
        images = PromptImages(shown, labels=family == AI_TOOLKIT, max_side=2048)
    for each in pictures:
        offset = (0.0, 0.0)
        if family == IDENTITY:
            each, offset = fit_into(each, width, height)
        latents = pipeline.encode(each[None])
        references.append(Reference(latents, ReferenceSettings(offset=offset)))
    method = "index" if family == IDENTITY else "index_timestep_zero"
    positive, negative = (pipeline.encode_prompt(text, images=images) for text in (PROMPT, ""))
    latents = pipeline.prepare_latents(height=height, width=width, seed=3)
    result = pipeline.denoise(
        latents, positive, negative if guidance else None, guidance=guidance,
        sigmas=pipeline.schedule(latents, 2), references=References(references, method=method),
    )  # fmt: skip
    return pipeline.decode(result)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("family", RECIPES)
def test_an_edit_is_its_parts(nano, family, guidance):
    pictures, size = [picture(96, 64), picture(64, 64, 2)], (96, 96)
    options = {"guidance": guidance, "steps": 2, "width": 96, "height": 96, **QUICK}
    found = nano["raw"](PROMPT, edit=Edit(pictures, family), **options)
    expected = by_hand(nano["raw"], pictures, family, size, guidance)
    assert_close(found, expected, 1e-4, f"an edit by {family}")


def test_a_removal_takes_its_steps_and_guidance(nano):
    seen = []

    def count(step, latents, predicted):
        seen.append(step)

    removal = Edit(picture(64, 64), REFERENCES_ONLY, task=REMOVAL)
    found = nano["raw"](PROMPT, edit=removal, callback=count, **QUICK)
    assert len(seen) == 20 and tuple(found.shape[2:]) == (64, 64)
    options = {"steps": 20, "guidance": 2.0, **QUICK}
    plain = Edit(picture(64, 64), REFERENCES_ONLY)
    assert torch.equal(found, nano["raw"](PROMPT, edit=plain, **options))


def test_what_should_be_known_is_said(nano, caplog):
    removal = Edit(picture(64, 64), REFERENCES_ONLY, task=REMOVAL)
    nano["turbo"](PROMPT, edit=removal, steps=1, **QUICK)
    assert "needs guidance (2 in 20 steps on Raw)" in caplog.text
    _, notes = Edit(picture(64, 64), REFERENCES_ONLY).plan(2048, 1552, [], RAW)
    assert notes == ["The edit has 2048 x 1552 px; above 2 megapixels subjects may double."]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"edit": []}, "There are 0 pictures"),
        ({"edit": [picture(32, 32)] * 3}, "There are 3 pictures"),
        ({"edit": 5}, "an image of edit is int"),
        ({"edit": picture(32, 32)}, "family is auto, but none"),
        ({"edit": Edit(picture(32, 32), "kontext")}, "'kontext'"),
        ({"edit": Edit(picture(32, 32), IDENTITY, cache=True)}, "need the time 0"),
        ({"edit": Edit(picture(32, 32), IDENTITY, task="dance")}, "task is 'dance'"),
        ({"edit": Edit(picture(32, 32), IDENTITY, boost=(1, 2))}, "boost is"),
        ({"edit": Edit(picture(32, 32), IDENTITY, boost=-1)}, "boost is -1"),
        ({"edit": Edit(picture(32, 32), IDENTITY, boost_mask=torch.ones(9, 40))}, "same size"),
        ({"edit": Edit(picture(32, 32), IDENTITY, boost_mask=torch.zeros(32, 32))}, "is empty"),
        ({"edit": Edit(picture(32, 32), IDENTITY, task=OUTPAINTING)}, "nothing to add"),
        ({"edit": Edit(picture(32, 32), IDENTITY), "images": picture(32, 32)}, "leave images out"),
        ({"edit": Edit(picture(32, 32), IDENTITY), "references": picture(32, 32)}, "references"),
    ],
)
def test_bad_edits_are_refused(nano, options, words, monkeypatch):
    monkeypatch.setattr(nano["turbo"], "encode_prompt", lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(ValueError, match=words):
        nano["turbo"](PROMPT, **options)
