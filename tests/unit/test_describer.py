"""Captions of pictures: what is asked for, and what is written beside transformers."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from answers import Writer
from krea2_model import Krea2Pipeline, load_text_encoder
from krea2_model.cli.main import main
from krea2_model.text import describer
from krea2_model.text.describer import (
    CAPTION_LENGTHS,
    SYSTEM_PROMPT,
    CaptionLength,
    Describer,
    describe,
)
from krea2_model.text.expander import chat, sampling_for
from krea2_model.text.generation import STOP_TOKENS
from krea2_model.text.prompt_images import IMAGE_BLOCK, IMAGE_PAD
from krea2_model.text.tokenizer import Krea2Tokenizer
from krea2_training.data.examples import read_examples
from krea2_training.settings.sections import Data
from qwen3vl_writer import random_model
from samples import picture


def test_the_picture_stands_in_the_user_s_turn():
    writer = Writer("A fox\n\nin snow.")
    assert describe(writer, ["medium"], seed=7, creativity=0) == ["A fox in snow."]
    length = CAPTION_LENGTHS["medium"]
    expected = (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{IMAGE_BLOCK}"
        f"{length.ask}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert writer.calls == [(expected, sampling_for(0), length.tokens, 7)]


def test_shorter_captions_are_written_from_the_long_one():
    """Whatever the order; the look is not."""
    writer = Writer("A long one.", "Short.", "Ink.")
    assert describe(writer, ["short", "style", "long"]) == ["Short.", "Ink.", "A long one."]
    asks = [ask for ask, *_ in writer.calls]
    assert ["A caption of this picture: A long one." in ask for ask in asks] == [False, True, False]
    for name, ask in zip(("long", "short", "style"), asks, strict=True):
        assert CAPTION_LENGTHS[name].ask in ask


def test_an_empty_answer_is_tried_again_and_then_refused():
    writer = Writer("<think>hm", "A fox.")
    assert describe(writer, seed=2**64 - 1) == ["A fox."]
    assert [seed for *_, seed in writer.calls] == [2**64 - 1, 15]
    with pytest.raises(ValueError, match="wrote nothing"):
        describe(Writer(""))


def test_what_is_cut_ends_with_a_sentence():
    assert describe(Writer("A fox. It is in the", ended=False)) == ["A fox."]
    assert max(length.tokens for length in CAPTION_LENGTHS.values()) < 507


@pytest.mark.parametrize(
    "lengths, options, message",
    [
        (["huge"], {}, "length is 'huge'; expected one of long, medium, short, style"),
        ([], {}, "length is empty; expected one of long"),
        (["long"], {"creativity": 2}, "creativity is 2; expected 0"),
    ],
)
def test_bad_settings_are_named(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        describe(Writer("A fox."), lengths, **options)


@pytest.fixture
def brief(monkeypatch):
    """Random weights write noise at any length."""
    for name, length in CAPTION_LENGTHS.items():
        monkeypatch.setitem(CAPTION_LENGTHS, name, CaptionLength(f"{name}.", 12, length.rewrites))
    monkeypatch.setattr(describer, "SYSTEM_PROMPT", "Describe.")


@pytest.fixture(scope="module")
def reference():
    return random_model()


@pytest.fixture(scope="module")
def loaded(reference, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    reference.save_pretrained(folder)
    return Describer(load_text_encoder(folder, tokenizer=tokenizer_folder))


@torch.no_grad()
def transformers_greedy(reference, tokenizer, pixels, text, count):
    """What transformers writes behind a chat that shows a picture (3, H, W)."""
    processor = Qwen2VLImageProcessor(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_rescale=False, do_resize=False
    )
    inputs = processor(images=pixels, return_tensors="pt")
    tokens = []
    for token in tokenizer.tokenize_raw(text):
        count_here = pixels.shape[1] * pixels.shape[2] // 32**2 if token == IMAGE_PAD else 1
        tokens += [token] * count_here
    ids = torch.tensor([tokens])
    out = reference.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == IMAGE_PAD).int(),
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"],
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=list(STOP_TOKENS),
        pad_token_id=STOP_TOKENS[1],
    )
    return tokenizer.decode(out[0, len(tokens) :].tolist())


@pytest.mark.parametrize("height, width", [(64, 96), (224, 160)])
def test_greedy_is_transformers_word_for_word(
    reference, loaded, tokenizer_folder, monkeypatch, height, width
):
    """The chat itself, with its whole system prompt; only the end comes sooner."""
    monkeypatch.setitem(CAPTION_LENGTHS, "long", CaptionLength(CAPTION_LENGTHS["long"].ask, 20))
    tokenizer, seen = Krea2Tokenizer(tokenizer_folder), []
    text = chat(IMAGE_BLOCK + CAPTION_LENGTHS["long"].ask, SYSTEM_PROMPT)
    ours = []
    for seed in (0, 1):
        pixels = picture(height, width, seed)
        expected = transformers_greedy(reference, tokenizer, pixels, text, 20)
        seen.clear()
        loaded(pixels, ["long"], seen.append, creativity=0)
        assert seen[19] == expected and len(set(expected.split())) > 3
        ours.append(expected)
    assert ours[0] != ours[1], "another picture, another text"


def test_a_seed_makes_the_caption_and_large_pictures_are_made_smaller(loaded, brief):
    large = picture(128, 192)

    def write(seed, **options):
        return loaded(large, ["long", "style"], creativity=1, seed=seed, **options)

    first = write(1)
    assert len(first) == 2 and all(first) and first[0] != first[1]
    assert write(1) == first != write(2)
    assert write(1, max_side=64) != first
    assert write(1, max_side=256) == first


@pytest.fixture
def pipeline(models, tokenizer_folder, turbo):
    encoder = models / "text_encoders/qwen3vl_tiny.safetensors"
    vae = models / "vae/qwen_image_vae_tiny.safetensors"
    return Krea2Pipeline.from_files(turbo, encoder, vae, tokenizer_folder)


def test_the_pipeline_describes_with_its_own_encoder(pipeline, brief, tmp_path):
    """Each picture as it would be alone, from any kind of picture, and offloaded alike."""
    Image.new("RGB", (64, 96), "teal").save(tmp_path / "teal.png")
    images = [picture(64, 96), tmp_path / "teal.png"]
    before = [weight.data_ptr() for weight in pipeline.text_encoder.parameters()]
    both = pipeline.describe(images, "short", seed=3)
    assert len(both) == 2 and both[0] != both[1]
    assert pipeline.describe(images[1], "short", seed=3) == both[1:]
    assert pipeline.describe(Image.open(images[1]), "short", seed=3) == both[1:]
    assert [weight.data_ptr() for weight in pipeline.text_encoder.parameters()] == before
    parts = (pipeline.transformer, pipeline.text_encoder, pipeline.vae)
    for mode in ("parts", "blocks"):
        assert Krea2Pipeline(*parts, offload=mode).describe(images, "short", seed=3) == both
    with pytest.raises(ValueError, match="length is 'huge'"):
        pipeline.describe("nowhere.png", "huge")
    with pytest.raises(ValueError, match=r"nowhere.png, which is not there"):
        pipeline.describe("nowhere.png")


@pytest.mark.parametrize(
    "left_out, message",
    [
        (".35.", "cannot write text: it lacks layer 35"),
        ("visual.", "has no vision tower"),
        (".24.", "layer 24 is missing"),
    ],
)
def test_a_file_without_all_of_it_is_refused(
    models, tokenizer_folder, tmp_path, capsys, left_out, message
):
    tensors = load_file(models / "text_encoders/qwen3vl_tiny.safetensors")
    file = tmp_path / "cut.safetensors"
    save_file({name: one for name, one in tensors.items() if left_out not in name}, file)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    words = ["describe", str(tmp_path / "a.png"), "--text-encoder", str(file)]
    assert main([*words, "--tokenizer", str(tokenizer_folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and "qwen3vl_4b_bf16.safetensors" in error


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    Image.effect_noise((96, 64), 90).save(folder / "a.png")
    Image.effect_noise((64, 96), 90).convert("RGB").save(folder / "more" / "b.jpg")
    Image.new("L", (64, 96)).save(folder / "more" / "b.mask.png")
    return folder


@pytest.fixture
def run(models, tokenizer_folder):
    encoder = models / "text_encoders/qwen3vl_tiny.safetensors"
    files = ["--text-encoder", str(encoder), "--tokenizer", str(tokenizer_folder)]
    return lambda *words: main(["describe", *map(str, words), *files, "--dtype", "fp32"])


def test_captions_are_printed_or_written_for_training(run, photos, brief, capsys):
    options = ("--length", "short", "long", "--seed", 5)
    assert run(photos, *options) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and not list(photos.rglob("*.txt"))
    assert run(photos, *options, "--write") == 0
    assert capsys.readouterr().out.splitlines() == [
        str(photos / "a.txt"), str(photos / "more" / "b.txt")
    ]  # fmt: skip
    captions = [list(example.captions) for example in read_examples(Data(photos))]
    assert captions == [printed[:2], printed[2:]]


def test_pictures_with_a_caption_are_left(run, photos, brief, capsys):
    (photos / "a.txt").write_text("mine")
    assert run(photos, "--write") == 0
    out, error = capsys.readouterr()
    assert out.splitlines() == [str(photos / "more" / "b.txt")]
    assert "1 of 2 pictures with a caption, which is left." in error
    assert (photos / "a.txt").read_text() == "mine"
    assert run(photos, "--write", "--text-encoder", "nowhere.safetensors") == 0, "nothing to do"
    assert run(photos / "a.png", "--write", "--force") == 0
    assert (photos / "a.txt").read_text(encoding="utf-8") not in ("mine", "")


def test_force_without_write_is_refused(run, photos, capsys):
    assert run(photos, "--force", "--text-encoder", "nowhere.safetensors") == 2
    assert "--force goes with --write; add it, or leave --force out." in capsys.readouterr().err


def test_a_broken_picture_keeps_no_other_from_its_caption(run, photos, brief, capsys):
    (photos / "a.png").write_text("no picture")
    assert run(photos, "--write") == 2
    out, error = capsys.readouterr()
    assert out.splitlines() == [str(photos / "more" / "b.txt")]
    assert "a.png" in error and "1 of 2 pictures cannot be read." in error


def test_what_cannot_be_used_is_refused(run, photos, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    (photos / "a.txt").write_text("a text")
    Image.new("RGB", (64, 64)).save(photos / "a.webp")
    for words, expected in (
        ([photos / "c.png"], "is not there; expected a picture, or a folder of pictures"),
        ([photos / "a.txt"], "is no picture; expected"),
        ([empty], "There are no pictures in"),
        ([photos, "--write"], "would have one caption file, a.txt"),
        ([photos, "--max-side", "8"], "--max-side is 8; expected a whole number from 32"),
        ([photos, "--length", "huge"], "--length is huge; expected one of long"),
    ):
        assert run(*words) == 2, words
        assert expected in capsys.readouterr().err
    assert main(["describe", str(photos)]) == 2
    assert "Name the weights: --model or --text-encoder." in capsys.readouterr().err
    assert main(["describe", str(photos), "--model", "nano"]) == 2
    assert "krea2-nano's text encoder is random and cannot write" in capsys.readouterr().err
