"""Images in prompts beside transformers' Qwen3-VL, in float32 with random weights.

Where tokens stand, how positions count through images, and DeepStack; the tower itself is in
test_vision.py.
"""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import formats
from krea2_model import Krea2Pipeline
from krea2_model.checkpoints.identify import CheckpointError
from krea2_model.checkpoints.text_encoder import load_text_encoder, load_vision_tower
from krea2_model.cli.main import main
from krea2_model.config import TextEncoderConfig
from krea2_model.features.arguments import PromptImages
from krea2_model.features.prompt_embeds import encode_prompts
from krea2_model.images.resize import on_white
from krea2_model.text.decoder import rotation_table
from krea2_model.text.encoder import text_encoder_keys
from krea2_model.text.prompt_images import (
    IMAGE_PAD,
    PromptImage,
    axis_positions,
    expand_image_tokens,
    image_text,
    read_roles,
    read_strengths,
    sheet,
)
from krea2_model.text.prompt_tokens import tokenize_prompt
from krea2_model.text.tokenizer import PREFIX_TOKENS, Krea2Tokenizer
from krea2_model.text.vision import resize_for_tower, vision_keys
from parity import assert_close, relative_error, same_weights
from qwen3vl_reference import SMALL
from samples import picture


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Krea2Tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def folder(qwen3vl, tmp_path_factory):
    """The reference as transformers saves it."""
    folder = tmp_path_factory.mktemp("qwen3vl")
    qwen3vl.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder, tokenizer_folder):
    return load_text_encoder(folder, tokenizer=tokenizer_folder)


@torch.no_grad()
def theirs(qwen3vl, rows, pictures, mask=None):
    """Taps (B, L, 12, D) of transformers for rows of tokens and the pictures of all of them."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_rescale=False, do_resize=False
    )
    inputs = [processor(images=pixels, return_tensors="pt") for pixels in pictures]
    tokens = torch.tensor(rows)
    out = qwen3vl(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens) if mask is None else mask.long(),
        mm_token_type_ids=(tokens == IMAGE_PAD).int(),
        pixel_values=torch.cat([part["pixel_values"] for part in inputs]),
        image_grid_thw=torch.cat([part["image_grid_thw"] for part in inputs]),
        output_hidden_states=True,
    )
    qwen3vl.rope_deltas = None
    return torch.stack([out.hidden_states[tap] for tap in SMALL.tap_layers], dim=2)


def tokens_of(tokenizer, text, pictures):
    grids = [(p.shape[1] // 32, p.shape[2] // 32) for p in pictures]
    return expand_image_tokens(tokenizer.tokenize_raw(text), grids)


def assert_taps_close(taps, expected, what):
    for slot, tap in enumerate(SMALL.tap_layers):
        assert_close(taps[..., slot, :], expected[..., slot, :], 1e-5, f"{what}, tap {tap}")


BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize("text, sizes", [
    (f"{BLOCK}a fox", [(64, 96)]),
    (f"one {BLOCK} two {BLOCK}{BLOCK} and a fox in the snow", [(96, 64), (32, 32), (64, 160)]),
    (f"a fox like{BLOCK}", [(128, 32)]),
], ids=["one", "several between texts", "last"])  # fmt: skip
def test_taps_equal_transformers(qwen3vl, encoder, tokenizer, text, sizes):
    pictures = [picture(*size, seed=index) for index, size in enumerate(sizes)]
    row = tokens_of(tokenizer, text, pictures)
    tower = encoder.vision_tower()
    with torch.no_grad():
        taps = encoder(torch.tensor([row]), images=[tower(pixels) for pixels in pictures])
    assert_taps_close(taps, theirs(qwen3vl, [row], pictures), text[:12])


def test_a_padded_batch_equals_transformers(qwen3vl, encoder, tokenizer):
    first, second, third = picture(64, 64, 1), picture(96, 32, 2), picture(32, 128, 3)
    rows = [
        tokens_of(tokenizer, f"{BLOCK}a fox and {BLOCK} a badger", [first, second]),
        tokens_of(tokenizer, f"so {BLOCK}", [third]),
        tokens_of(tokenizer, "text alone", []),
    ]
    longest = max(map(len, rows))
    mask = torch.tensor([[False] * (longest - len(r)) + [True] * len(r) for r in rows])
    rows = [[151643] * (longest - len(row)) + row for row in rows]
    tower = encoder.vision_tower()
    with torch.no_grad():
        images = [tower(pixels) for pixels in (first, second, third)]
        taps = encoder(torch.tensor(rows), mask, images)
    expected = theirs(qwen3vl, rows, [first, second, third], mask)
    assert_taps_close(taps[mask], expected[mask], "a batch, padded on the left")


def test_the_deepstack_addition_comes_after_the_tap(encoder, tokenizer, qwen3vl):
    """Of the taps only 2 shows which: tapped after the addition, as ComfyUI does, it differs."""
    pixels = picture(64, 64)
    row = tokens_of(tokenizer, f"{BLOCK}a fox", [pixels])
    image = encoder.vision_tower()(pixels)
    tokens = torch.tensor([row])
    pads = tokens[0] == IMAGE_PAD
    expected = theirs(qwen3vl, [row], [pixels])[0, :, 0]
    with torch.no_grad():
        taps = encoder(tokens, images=[image])[0, :, 0]
        after = taps.clone()
        after[pads] += image.deepstack[1]
    assert_close(taps, expected, 1e-5, "tap 2")
    assert relative_error(after, expected) > 1e-2
    assert relative_error(after[~pads], expected[~pads]) < 1e-5


@pytest.mark.parametrize(
    "head_dim, sections", [(128, (24, 20, 20)), (40, (8, 6, 6)), (16, (4, 2, 2))]
)
def test_rotary_sections(head_dim, sections):
    assert replace(SMALL, head_dim=head_dim).rotary_sections == sections


def test_rotary_sections_of_a_folder_are_its_own(folder, tmp_path, tokenizer_folder, encoder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"]["mrope_section"] = [12, 2, 2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    other = load_text_encoder(tmp_path, tokenizer=tokenizer_folder)
    assert other.config.rotary_sections == (12, 2, 2)
    assert encoder.config.mrope_section is None
    image = [[PromptImage(picture(64, 96))]]
    taps, other_taps = (e.encode(["a fox"], images=image)[0] for e in (encoder, other))
    assert not torch.allclose(taps, other_taps)
    assert torch.equal(encoder.encode(["a fox"])[0], other.encode(["a fox"])[0])


def test_text_alone_rotates_as_on_one_axis():
    config = TextEncoderConfig()
    exponents = torch.arange(0, 128, 2, dtype=torch.float32) / 128
    angles = torch.arange(600.0)[:, None] * (1.0 / config.rope_theta**exponents)
    expected = torch.stack((angles.cos(), angles.sin()))
    assert torch.equal(rotation_table(600, config, torch.device("cpu")), expected)


def test_positions_go_on_behind_the_larger_side():
    tokens = [1, 2, *[IMAGE_PAD] * 6, 3, 4]
    assert axis_positions(tokens, [(2, 3)]).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


@pytest.mark.parametrize("tokens, grids, message", [
    ([1, IMAGE_PAD, 2], [(2, 1)], "2 x 1 tokens has fewer places"),
    ([1, IMAGE_PAD], [], "more image tokens"),
    ([1, 2], [(1, 1)], "1 of 1 image has no tokens"),
])  # fmt: skip
def test_pads_that_do_not_fit_are_named(tokens, grids, message):
    with pytest.raises(ValueError, match=message):
        axis_positions(tokens, grids)


def test_layout_of_a_prompt(tokenizer):
    """As the LoRAs that read images were trained: `Picture 1: `, the block, and so on, the text."""
    assert image_text(["", ""], labels=True) == f"Picture 1: {BLOCK}Picture 2: {BLOCK}"
    assert image_text(["the style", ""], labels=True) == (
        f"Picture 1 (the style): {BLOCK}Picture 2: {BLOCK}"
    )
    assert image_text([" the style "], labels=False) == f"the style: {BLOCK}"
    assert image_text([""], labels=False) == BLOCK
    assert image_text([], labels=True) == ""
    ids = tokenizer.tokenize("a fox", before=image_text([""], labels=False))
    assert ids[PREFIX_TOKENS : PREFIX_TOKENS + 3] == [151652, IMAGE_PAD, 151653]
    assert ids[:PREFIX_TOKENS] + ids[PREFIX_TOKENS + 3 :] == tokenizer.tokenize("a fox")


def test_the_limit_counts_the_text_alone(tokenizer, caplog):
    before = image_text(["the style"], labels=True)
    ids = tokenizer.tokenize("fox " * 20, 10, before)
    front = tokenizer.front(before)
    assert ids[PREFIX_TOKENS : PREFIX_TOKENS + len(front)] == front
    assert len(ids) == PREFIX_TOKENS + len(front) + 10
    assert len(tokenizer.spans("fox " * 20, 10, before)) == 10


def test_encode_places_images(encoder, tokenizer):
    images = [PromptImage(picture(70, 100)), PromptImage(picture(1, 1), role="the style")]
    taps, mask = encoder.encode(["a fox"], images=[images])
    before = image_text(["", "the style"], labels=True)
    ids = expand_image_tokens(tokenizer.tokenize("a fox", before=before), [(2, 3), (1, 1)])
    seen = [encoder.vision_tower()(resize_for_tower(image.pixels)) for image in images]
    with torch.no_grad():
        assert torch.equal(taps, encoder(torch.tensor([ids]), images=seen)[:, PREFIX_TOKENS:])
    assert mask is None
    unlabelled = encoder.encode(["a fox"], images=[images[:1]], labels=False)[0]
    assert unlabelled.shape[1] == 6 + 2 + 2 + 5


def test_a_batch_of_prompts_with_and_without_images(encoder):
    images = [[PromptImage(picture(64, 64))], []]
    taps, mask = encoder.encode(["a fox", "a badger"], images=images)
    first = encoder.encode(["a fox"], images=images[:1])[0]
    second = encoder.encode(["a badger"])[0]
    assert torch.equal(taps[0, mask[0]], first[0]) and torch.equal(taps[1, mask[1]], second[0])


def test_strength_zero_is_no_image(encoder):
    images = [PromptImage(picture(64, 64, 1), strength=0), PromptImage(picture(64, 32, 2))]
    with_both = encoder.encode(["a fox"], images=[images])[0]
    assert torch.equal(with_both, encoder.encode(["a fox"], images=[images[1:]])[0])
    nothing = encoder.encode(["a fox"], images=[images[:1]])[0]
    assert torch.equal(nothing, encoder.encode(["a fox"])[0])


def test_weights_of_images_and_words(tokenizer):
    images = [PromptImage(picture(64, 32), strength=0.5), PromptImage(picture(32, 32))]
    options = {"labels": False, "weighted": True}
    tokens = tokenize_prompt(tokenizer, "a (fox:1.3)", images=images, **options)
    front = [1, 0.5, 0.5, 1, 1, 1, 1]
    assert tokens.weights == pytest.approx((*front, 1, 1.3, 1, 1, 1, 1, 1))
    assert tokens.grids == [(2, 1), (1, 1)]
    assert tokens.image_slices == [slice(1, 3), slice(5, 6)]
    pads = [tokens.expanded_ids[PREFIX_TOKENS:][part] for part in tokens.image_slices]
    assert pads == [[IMAGE_PAD] * 2, [IMAGE_PAD]]
    plain = tokenize_prompt(tokenizer, "a fox", images=images[1:], **options)
    assert plain.weights is None and plain.image_slices == [slice(1, 2)]


def test_alpha_shows_white_and_sheets_are_padded():
    pixels = torch.stack([torch.full((2, 2), value) for value in (0.2, 0.4, 0.6, 0.5)])
    assert torch.allclose(on_white(pixels)[:, 0, 0], torch.tensor([0.6, 0.7, 0.8]))
    assert on_white(pixels[:3]) is not None and torch.equal(on_white(pixels[:3]), pixels[:3])
    padded = sheet([torch.zeros(3, 2, 4), torch.ones(3, 3, 2)])
    assert padded.shape == (2, 3, 3, 4)
    assert padded[1, 0].tolist() == [[1, 1, 0.5, 0.5]] * 3


@pytest.mark.parametrize("options, message", [
    ({"pixels": torch.zeros(2, 8, 8)}, "shape .2, 8, 8.; expected .3"),
    ({"pixels": torch.zeros(3, 0, 8)}, "shape .3, 0, 8."),
    ({"strength": 11.0}, "strength of an image is 11.0; expected -10 to 10"),
    ({"strength": float("nan")}, "strength of an image is nan"),
    ({"role": "two\nlines"}, "expected a few words on one line"),
    ({"role": "<|im_end|>"}, "without chat markers"),
])  # fmt: skip
def test_bad_images_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PromptImage(**{"pixels": torch.zeros(3, 8, 8)} | options)


def test_prompts_that_do_not_fit_their_images_are_named(encoder):
    image = PromptImage(picture(32, 32))
    with pytest.raises(ValueError, match="9 images"):
        encoder.encode(["a fox"], images=[[image] * 9])
    with pytest.raises(ValueError, match="images has 1"):
        encoder.encode(["a fox", "a badger"], images=[[image]])
    with pytest.raises(ValueError, match="stands for an image"):
        encoder.encode(["a <|image_pad|>"], images=[[image]])
    with pytest.raises(ValueError, match="places for 0 images .* and 1 image is given"):
        expand_image_tokens([1, 2], [(1, 1)])


def test_the_tower_is_neither_held_nor_saved_with_the_encoder(folder, tokenizer_folder):
    encoder = load_text_encoder(folder, tokenizer=tokenizer_folder)
    names = set(encoder.state_dict())
    encoder.encode(["a fox"])
    assert not encoder._tower
    encoder.encode(["a fox"], images=[[PromptImage(picture(32, 32))]])
    assert set(encoder.state_dict()) == names
    assert encoder.vision_tower() is encoder.vision_tower()


def test_a_file_without_a_vision_tower_is_named(qwen3vl, tmp_path, tokenizer_folder):
    state = qwen3vl.state_dict()
    path = tmp_path / "text_only.safetensors"
    save_file({name: state[name].contiguous() for name in text_encoder_keys(state)}, path)
    encoder = load_text_encoder(path, tokenizer=tokenizer_folder)
    encoder.encode(["a fox"])
    with pytest.raises(CheckpointError, match="text_only.safetensors has no vision tower.*GGUF"):
        encoder.encode(["a fox"], images=[[PromptImage(picture(32, 32))]])
    encoder.load_tower = None
    with pytest.raises(ValueError, match="was not loaded"):
        encoder.vision_tower()


def test_a_tower_in_8_bits(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    stored, values, _ = formats.float8(tensors, part="visual.")
    save_file(stored, tmp_path / "fp8.safetensors")
    save_file(values, tmp_path / "plain.safetensors")
    found, expected = (
        load_vision_tower(tmp_path / f"{name}.safetensors", dtype=torch.float32)
        for name in ("fp8", "plain")
    )
    assert same_weights(found, expected)


def test_a_damaged_or_foreign_tower_is_named(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    name = next(n for n in vision_keys(state) if n.endswith("blocks.2.norm1.weight"))
    path = tmp_path / "cut.safetensors"
    save_file({n: t for n, t in state.items() if n != name}, path)
    with pytest.raises(CheckpointError, match="1 missing"):
        load_vision_tower(path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_heads"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    path.unlink()
    with pytest.raises(CheckpointError, match="num_heads 48"):
        load_vision_tower(tmp_path)


@pytest.fixture(scope="module")
def pipeline(tokenizer_folder):
    return Krea2Pipeline.nano()


def paint(pipeline, prompt="a (red:1.2) star", **options):
    size = {"height": 32, "width": 32, "steps": 2, "output_type": "latent"}
    return pipeline(prompt, prompt_weights=True, **size | options)


def test_the_pipeline_takes_images_of_any_kind(pipeline):
    pixels = (picture(40, 70) * 255).round() / 255
    array = (pixels * 255).round().byte().movedim(0, -1).numpy()
    made = [
        paint(pipeline, images=[image])
        for image in (Image.fromarray(array), pixels, PromptImage(pixels, strength=1.0))
    ]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    plain = paint(pipeline)
    assert not torch.equal(made[0], plain)
    assert torch.equal(paint(pipeline, images=[PromptImage(pixels, strength=0)]), plain)
    assert torch.equal(paint(pipeline, images=[]), plain)
    for other in ({"labels": False}, {"max_side": 32}):
        changed = paint(pipeline, images=PromptImages([pixels], **other))
        assert not torch.equal(changed, made[0])


def test_strengths_in_the_pipeline_weigh_images(pipeline):
    pixels = picture(64, 64)
    one, two = (
        paint(pipeline, images=[PromptImage(pixels, strength=strength)]) for strength in (1.3, 2.0)
    )
    plain = paint(pipeline, images=[pixels])
    assert 0 < (one - plain).norm() < (two - plain).norm()
    weights = encode_prompts(
        pipeline.text_encoder, ["a fox", "a (badger:2)"], weighted=True,
        images=[PromptImage(pixels, strength=0.5)], labels=False,
    ).weights  # fmt: skip
    assert weights[:, 1:5].tolist() == [[0.5] * 4] * 2
    assert weights[0, 5:].tolist() == [1] * (weights.shape[1] - 5)
    assert (weights[1, 5:] == 2).sum() == weights.shape[1] - 5 - 2 - 5


@pytest.mark.parametrize("options, message", [
    ({"images": ["fox.png"]}, "an entry of images is fox.png, which is not there"),
    ({"images": [torch.zeros(3, 0, 4)]}, "shape .3, 0, 4."),
    ({"images": [torch.zeros(3, 8, 8)] * 9}, "9 images in the prompt"),
    ({"images": [torch.zeros(3, 8, 8)], "prompt": None,
      "prompt_embeds": torch.zeros(1, 5, 12, 160)}, "with prompt_embeds give none"),
])  # fmt: skip
def test_the_pipeline_names_bad_images(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        paint(pipeline, **options)


def test_the_command_line_takes_images(tokenizer_folder, tmp_path):
    Image.new("RGBA", (40, 40), (255, 0, 0, 128)).save(tmp_path / "red.png")
    start = ["a star", "--model", "nano", "--width", "32", "--height", "32", "--steps", "1"]
    for name, images in (("plain.png", []), ("seen.png", ["--image", str(tmp_path / "red.png")])):
        assert main([*start, *images, "--output", str(tmp_path / name)]) == 0
    plain, seen = (Image.open(tmp_path / name).tobytes() for name in ("plain.png", "seen.png"))
    assert plain != seen


@pytest.mark.parametrize("text, count, expected", [
    ("", 2, [1, 1]), ("0.5", 2, [0.5, 1]), ("1, 0 ", 2, [1, 0]), ("2\n-1", 2, [2, -1]),
    ("1, 2", 0, []),
])  # fmt: skip
def test_strengths_are_read(text, count, expected):
    assert read_strengths(text, count) == expected


def test_roles_are_read():
    assert read_roles("the style\n\n the pose \n\n", 3) == ["the style", "", "the pose"]
    assert read_roles("", 2) == ["", ""]
    with pytest.raises(ValueError, match="roles has 2"):
        read_roles("a\nb", 1)
