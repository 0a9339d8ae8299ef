"""The recipe that refines nano's Turbo: its prompts, and a step of it."""

import pytest
import torch

from krea2_model import Krea2Pipeline, nano
from krea2_training.data.regional import PromptBatches
from nano_training import refine_turbo
from nano_training.scenes import held_out_prompts


@pytest.fixture(scope="module")
def rows():
    return refine_turbo.prompts()


def test_prompts_are_scenes_words_and_regions(rows):
    texts = [row["prompt"] for row in rows if "regions" not in row]
    assert len(texts) == len(set(texts)) == 1500
    assert not {prompt for prompt, _ in held_out_prompts()} & set(texts)
    assert 150 < sum(len(text.split()) <= 2 for text in texts) < 220
    assert len(rows) == 2000 and rows == refine_turbo.prompts(), "the same each time"
    for row in rows:
        things = [region["prompt"].split()[-2:] for region in row.get("regions", ())]
        assert len(things) == len({colour for colour, _ in things}), "of different colours"
        area = sum(width * height for *_, width, height in map(box_of, row.get("regions", ())))
        assert not things or 0.48 <= area <= 1.01


def box_of(region):
    return region["box"]


def test_rows_with_regions_share_layouts(rows):
    """Else a batch would hold one row again and again."""
    groups = [len(alike) for alike in PromptBatches(rows)._alike.values()]
    assert len(groups) <= 1 + refine_turbo.LAYOUTS and min(groups) >= 4


def test_a_part_of_what_is_learned_is_merged(tmp_path, monkeypatch):
    few = [{"prompt": "red"}, {"prompt": "a blue star"}]
    monkeypatch.setattr(refine_turbo, "prompts", lambda: few)
    before = Krea2Pipeline.nano()
    found = refine_turbo.refine_turbo(tmp_path, steps=1)
    assert (found.variant, found.preset.steps, found.preset.size) == ("turbo", 8, 128)
    whole = Krea2Pipeline.nano()
    (lora,) = tmp_path.glob("refine_*/refined.safetensors")
    whole.load_lora(lora)
    names = [n for n, p in whole.transformer.named_parameters()
             if not torch.equal(p, before.transformer.get_parameter(n))]  # fmt: skip
    assert names and all(name.startswith("blocks.") for name in names)
    for name in names:
        plain, all_of_it, part = (
            model.get_parameter(name).float()
            for model in (before.transformer, whole.transformer, found)
        )
        expected = refine_turbo.STRENGTH * (all_of_it - plain)
        assert (part - plain - expected).norm() < 0.02 * (all_of_it - plain).norm(), name
    assert nano.TRANSFORMERS["turbo"].is_file()
