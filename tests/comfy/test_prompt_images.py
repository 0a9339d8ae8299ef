"""Images in prompts through a real ComfyUI, beside core's Krea 2 encoder with the same weights."""

import comfy.model_management
import comfy.text_encoders.qwen3vl
import numpy as np
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from safetensors.torch import load_file, save_file

import formats
import tiny_checkpoints
from in_process import NODES
from parity import assert_close, relative_error
from samples import image

ENCODER = "qwen3vl_tiny.safetensors"
WIDTH = tiny_checkpoints.TEXT_ENCODER.hidden_size
BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"
WEIGHTS = "krea2_token_weights"
# Where an image's tokens stand behind `Picture 1: <|vision_start|>`.
FIRST = 6


@pytest.fixture(scope="module")
def loaded(models, run):
    return run("K2TextEncoderLoader", file=ENCODER)[0]


@pytest.fixture
def clip(loaded):
    """With no memory of earlier tests' encodings."""
    loaded.cond_stage_model.encodings.clear()
    return loaded


@pytest.fixture
def encode(run, clip):
    """The node's positive: states, and what travels beside them."""

    def call(prompt="a fox", who=clip, **inputs):
        return run("K2TextEncodeImages", clip=who, prompt=prompt, **inputs)[0][0]

    return call


def taps(states):
    return states.unflatten(-1, (12, WIDTH))


def krea_chat(pack, text):
    tokenizer = pack("krea2_model.text.tokenizer")
    return tokenizer.TEMPLATE_PREFIX + text + tokenizer.TEMPLATE_SUFFIX


@pytest.mark.parametrize("text, sizes", [
    (f"{BLOCK}a fox", [(64, 96)]),
    (f"Picture 1: {BLOCK} and {BLOCK} in the snow", [(96, 64), (64, 64)]),
])  # fmt: skip
def test_equals_core_but_for_tap_2_at_images(clip, core_clip, pack, text, sizes):
    """Core taps a layer after its DeepStack features are added, transformers before."""
    if "forward" not in vars(comfy.text_encoders.qwen3vl.Qwen3VL):
        pytest.skip("This ComfyUI encodes images without their positions and DeepStack features.")
    images = [image(*size, seed=index) for index, size in enumerate(sizes)]
    chat = krea_chat(pack, text)
    ours, core, trained = (
        taps(c.encode_from_tokens(c.tokenize(chat, images=images, **options)))[0]
        for c, options in ((clip, {}), (core_clip, {}), (clip, {"as_trained": True}))
    )
    assert_close(ours, core, 1e-5, "for other packs' nodes, as core")
    tokens = pack("krea2_model.text.tokenizer").Krea2Tokenizer(clip.tokenizer.tokenizer.folder)
    ids = tokens.tokenize_raw(chat)[34:]
    counts = iter(height * width // 32**2 for height, width in sizes)
    pads = [t == 151655 for t in ids for _ in range(next(counts) if t == 151655 else 1)]
    pads = torch.tensor(pads)
    assert len(pads) == len(trained)
    assert_close(trained[:, 1:], core[:, 1:], 1e-5, "taps 5 to 35")
    assert_close(trained[~pads, 0], core[~pads, 0], 1e-5, "tap 2 of text")
    assert relative_error(trained[pads, 0], core[pads, 0]) > 1e-2
    tower = clip.cond_stage_model.vision.patcher.model
    added = torch.cat([tower(picture[0].movedim(-1, 0)).deepstack[1] for picture in images])
    assert_close(trained[pads, 0] + added, core[pads, 0], 1e-5, "tap 2 with its layer's features")


def test_the_node_writes_the_layout_of_loras(encode, clip, pack):
    chat = krea_chat(pack, f"Picture 1: {BLOCK}Picture 2 (the style): {BLOCK}a fox")
    images = [image(64, 96, 1), image(32, 32, 2)]
    seen = {"as_trained": True}
    expected = clip.encode_from_tokens(clip.tokenize(chat, images=images, **seen))
    found = encode(image_1=images[0], image_2=images[1], roles="\nthe style")[0]
    assert torch.equal(found, expected)
    bare = encode(image_3=images[0], labels=False)[0]
    chat = krea_chat(pack, f"{BLOCK}a fox")
    expected = clip.encode_from_tokens(clip.tokenize(chat, images=images[:1], **seen))
    assert torch.equal(bare, expected)


def test_core_nodes_that_pass_images_work(clip, pack):
    """Their images stand in front of the text, under Krea's template or their own."""
    picture = image(64, 64)
    chat = krea_chat(pack, f"{BLOCK}a fox")
    expected = clip.tokenize(chat, images=[picture])["qwen3vl_4b"][0]
    found = clip.tokenize("a fox", images=[picture])["qwen3vl_4b"][0]
    assert [t for t, _ in found if isinstance(t, int)] == [
        t for t, _ in expected if isinstance(t, int)
    ]
    template = "<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    theirs = clip.tokenize(f"Picture 1: {BLOCK}go", images=[picture], llama_template=template)
    expected = clip.tokenize(template.format(f"Picture 1: {BLOCK}go"), images=[picture])
    assert len(theirs["qwen3vl_4b"][0]) == len(expected["qwen3vl_4b"][0])
    assert torch.equal(clip.encode_from_tokens(theirs), clip.encode_from_tokens(expected))
    batch = clip.tokenize("a fox", images=image(64, 64, batch=2))["qwen3vl_4b"][0]
    assert sum(isinstance(token, dict) for token, _ in batch) == 2


def test_without_images_it_is_the_plain_prompt(run, clip):
    prompt = "a (red:1.3) fox"
    found = run("K2TextEncodeImages", clip=clip, prompt=prompt, negative="blue", strengths="1, 2")
    expected = run("K2TextEncode", clip=clip, prompt=prompt, negative="blue")
    for one, other in zip(found[:2], expected, strict=True):
        assert torch.equal(one[0][0], other[0][0])
        assert torch.equal(one[0][1].get(WEIGHTS, one[0][0]), other[0][1].get(WEIGHTS, one[0][0]))
    assert isinstance(found[2], ExecutionBlocker)


def test_the_tower_is_loaded_for_an_image_and_not_before(run, models):
    clip = run("K2TextEncoderLoader", file=ENCODER)[0]
    run("K2TextEncodeImages", clip=clip, prompt="a fox", image_1=image(), strengths="0")
    assert clip.cond_stage_model.vision.patcher is None
    run("K2TextEncodeImages", clip=clip, prompt="a fox", image_1=image())
    tower = clip.cond_stage_model.vision.patcher
    held = [each.model for each in comfy.model_management.current_loaded_models]
    assert tower in held and clip.patcher in held
    names = set(clip.cond_stage_model.state_dict())
    assert not any("visual" in name or "vision" in name for name in names)
    assert clip.clone().cond_stage_model.vision.patcher is tower


def test_strength_0_leaves_out_and_1_changes_nothing(encode):
    one, two = image(seed=1), image(64, 64, seed=2)
    plain, extra = encode(image_1=one, image_2=two)
    same, same_extra = encode(image_1=one, image_2=two, strengths="1 1.0")
    assert torch.equal(plain, same)
    assert WEIGHTS not in extra and WEIGHTS not in same_extra
    left, left_extra = encode(image_1=one, image_2=two, strengths="0")
    assert torch.equal(left, encode(image_1=two)[0]) and WEIGHTS not in left_extra
    none = encode(image_1=one, image_2=two, strengths="0, 0")[0]
    assert torch.equal(none, encode()[0])


def test_strengths_are_weights_of_the_images_tokens(encode):
    """Beside those of words, which stand behind the images."""
    plain, _ = encode("a red fox", image_1=image(64, 96), image_2=image(32, 64))
    states, extra = encode(
        "a (red:1.4) fox", image_1=image(64, 96), image_2=image(32, 64), strengths="0.5, 2"
    )
    assert torch.equal(states, plain)
    weights = extra[WEIGHTS][0]
    second = FIRST + 6 + 1 + FIRST
    assert weights.shape == states.shape[1:2]
    assert weights[FIRST : FIRST + 6].tolist() == [0.5] * 6
    assert weights[second : second + 2].tolist() == [2.0] * 2
    assert weights[second + 2 : second + 6].tolist() == pytest.approx([1, 1, 1.4, 1])
    assert (weights != 1).sum() == 6 + 2 + 1


def test_strength_reaches_the_picture(run, encode, turbo, latent):
    """Through the transformer: 1 is as none given, to the bit; others differ, more with more."""

    def paint(**inputs):
        positive = [list(encode(image_1=image(), **inputs))]
        sampled = run("K2Sampler", model=turbo, positive=positive, latent=latent, seed=3)
        return sampled[0]["samples"]

    plain = paint()
    assert torch.equal(paint(strengths="1"), plain)
    little, much = ((paint(strengths=s) - plain).norm() for s in ("1.2", "2"))
    assert 0 < little < much


def test_encodings_are_kept_by_pixels(encode, clip, monkeypatch):
    encoder, calls = clip.cond_stage_model.encoder, []
    forward = encoder.forward
    monkeypatch.setattr(
        encoder, "forward", lambda *a, **k: calls.append("images" in k) or forward(*a, **k)
    )
    picture = image(seed=5)
    first = encode(image_1=picture)[0]
    assert calls == [True, False]  # the second is the negative
    assert torch.equal(encode(image_1=picture.clone())[0], first) and len(calls) == 2
    picture[0, 0, 0, 0] = 1 - picture[0, 0, 0, 0]
    assert not torch.equal(encode(image_1=picture)[0], first) and len(calls) == 3
    # The same numbers in another order of rows and columns.
    encode(image_1=picture.reshape(1, 96, 64, 3))
    encode(image_1=picture, labels=False)
    assert len(calls) == 5


@pytest.mark.parametrize("size, options, seen", [
    ((1, 1), {}, (32, 32)),
    ((40, 50), {}, (32, 64)),
    ((64, 96), {}, (64, 96)),
    ((3000, 2000), {}, (448, 320)),
    ((3000, 2000), {"max_side": 64}, (64, 64)),
])  # fmt: skip
def test_sizes_that_are_seen(run, clip, size, options, seen):
    outputs = run("K2TextEncodeImages", clip=clip, prompt="", image_1=image(*size), **options)
    assert tuple(outputs[2].shape) == (1, *seen, 3)
    assert outputs[0][0][0].shape[1] == FIRST + seen[0] * seen[1] // 32**2 + 1 + 5


def test_seen_is_what_the_encoder_saw_on_grey(run, clip):
    batch, other = image(32, 64, batch=2), image(64, 32, seed=4)
    seen = run("K2TextEncodeImages", clip=clip, prompt="", image_2=batch, image_5=other)[2]
    assert seen.shape == (3, 64, 64, 3)
    assert torch.equal(seen[1, :32], batch[1]) and torch.equal(seen[2, :, :32], other[0])
    assert (seen[:2, 32:] == 0.5).all() and (seen[2, :, 32:] == 0.5).all()


def test_transparency_shows_white(encode):
    picture = image(64, 64, channels=4)
    alpha = picture[..., 3:]
    white = picture[..., :3] * alpha + (1 - alpha)
    assert torch.equal(encode(image_1=picture)[0], encode(image_1=white)[0])
    assert not torch.equal(encode(image_1=picture[..., :3])[0], encode(image_1=white)[0])


def test_tokens_are_reported(clip):
    report = NODES["K2TextEncodeImages"].execute(
        clip=clip, prompt="a fox", negative="blue", image_1=image(64, 96), image_2=image(32, 32),
        strengths="1, 0",
    ).ui  # fmt: skip
    assert report.as_dict()["text"] == (
        "prompt: 9 tokens of 507\n"
        "image 1: 96 x 64 px, 6 tokens\n"
        "image 2: left out, strength 0\n"
        "negative: 1 token of 507",
    )


def test_only_the_text_is_cut(encode):
    whole = encode("fox " * 600, image_1=image())[0]
    cut = encode("fox " * 600, image_1=image(), official_length=True)[0]
    short, extra = encode("fox (badger:2) fox", image_1=image(), max_tokens=1, strengths="2")
    assert whole.shape[1] > FIRST + 6 + 1 + 600
    assert cut.shape[1] == FIRST + 6 + 1 + 512
    assert short.shape[1] == FIRST + 6 + 1 + 1 + 5 == extra[WEIGHTS].shape[1]
    assert (extra[WEIGHTS] != 1).sum() == 6


@pytest.mark.parametrize("inputs, message", [
    ({"image_1": image(32, 32, batch=9)}, "9 images in the prompt; expected at most 8"),
    ({"image_1": image(2, 1000)}, "1000 x 2 px; expected one side at most 200 times"),
    ({"image_1": torch.zeros(64, 64, 3)}, "is .64, 64, 3.; expected .1 or more, height, width"),
    ({"image_1": image(), "strengths": "1, x"}, "strengths is '1, x'; expected numbers"),
    ({"image_1": image(), "strengths": "1, 1"}, "strengths has 2 entries for 1 image;"),
    ({"image_1": image(), "strengths": "nan"}, "strength of an image is nan; expected -10 to 10"),
    ({"image_1": image(), "roles": "one\ntwo"}, "roles has 2 entries for 1 image;"),
    ({"image_1": image(), "prompt": "a <|image_pad|>"}, "stands for an image; expected text"),
    ({"image_1": image(), "max_side": 16}, "max_side is 16; expected 32 to 2048"),
    ({"image_1": image(), "max_tokens": -1}, "max_tokens is -1; expected 0"),
    ({"clip": None}, "holds no text encoder"),
])  # fmt: skip
def test_bad_input_is_named(run, clip, inputs, message):
    with pytest.raises(ValueError, match=message):
        run("K2TextEncodeImages", **{"clip": clip, "prompt": "a fox"} | inputs)


def test_images_without_a_place_are_named(clip):
    with pytest.raises(ValueError, match="places for 1 image .* and 2 images are given"):
        clip.tokenize(f"{BLOCK}a fox", images=[image(), image()])
    with pytest.raises(ValueError, match="places for 0 images"):
        clip.tokenize("a fox", image=image(), skip_template=True)


def test_another_clip_is_refused(run, core_clip):
    with pytest.raises(ValueError, match="clip is not from a Krea 2"):
        run("K2TextEncodeImages", clip=core_clip, prompt="a fox", image_1=image())


def test_a_file_without_a_vision_tower_is_named(run, models):
    folder = models / "text_encoders"
    tensors = {n: t for n, t in load_file(folder / ENCODER).items() if "visual." not in n}
    save_file(tensors, folder / "blind.safetensors")
    clip = run("K2TextEncoderLoader", file="blind.safetensors")[0]
    run("K2TextEncodeImages", clip=clip, prompt="a fox")
    with pytest.raises(ValueError, match="blind.safetensors has no vision tower.*GGUF"):
        run("K2TextEncodeImages", clip=clip, prompt="a fox", image_1=image())
    (folder / "blind.safetensors").unlink()


def test_saved_encoders_keep_the_tower(run, base, models, encode):
    expected = encode(image_1=image())[0]
    clip = run("K2TextEncoderLoader", file=ENCODER)[0]
    run("CLIPSave", clip=clip, filename_prefix="saved_seeing/encoder")
    (saved,) = (base / "output" / "saved_seeing").rglob("*.safetensors")
    assert load_file(saved)["qwen3vl_4b.transformer.visual.patch_embed.proj.weight"].ndim == 5
    target = models / "text_encoders" / "saved_seeing.safetensors"
    saved.rename(target)
    again = run("K2TextEncoderLoader", file=target.name)[0]
    assert torch.equal(encode(who=again, image_1=image())[0], expected)
    target.unlink()


def test_a_partly_loaded_tower_sees_alike(run, encode, clip):
    expected = encode(image_1=image())[0]
    tower = clip.cond_stage_model.vision.patcher
    tower.detach()
    tower.load(torch.device("cpu"), lowvram_model_memory=tower.model_size() // 3)
    row = clip.tokenize("a fox", images=[image()], labels=True, as_trained=True)
    found = clip.cond_stage_model.encode_token_weights(row)[0]
    assert_close(found, expected, 1e-6, "a partly loaded tower")
    tower.detach()


def test_dynamic_vram_loads_the_tower(run, encode, dynamic_patcher):
    """NVIDIA's default patcher takes it as any model."""
    clip = run("K2TextEncoderLoader", file=ENCODER)[0]
    expected = encode(who=clip, image_1=image())[0]
    vision = clip.cond_stage_model.vision
    vision.patcher = dynamic_patcher(vision.patcher.model)
    vision.patcher.load(torch.device("cpu"))
    row = clip.tokenize("a fox", images=[image()], labels=True, as_trained=True)
    assert torch.equal(clip.cond_stage_model.encode_token_weights(row)[0], expected)


def test_an_encoder_in_gguf_is_named(run, models, encode):
    """llama.cpp puts the tower into a file of its own."""
    folder = models / "text_encoders"
    tensors = load_file(folder / ENCODER)
    text = {name: tensor for name, tensor in tensors.items() if "visual." not in name}
    formats.gguf_file(text, folder / "blind.gguf", "Q8_0", part="model.layers.")
    clip = run("K2TextEncoderLoader", file="blind.gguf")[0]
    encode(who=clip)
    with pytest.raises(ValueError, match="blind.gguf has no vision tower.*GGUF files keep it"):
        encode(who=clip, image_1=image())
    (folder / "blind.gguf").unlink()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_stored_dtypes_round_the_weights_alone(run, models, encode, dtype):
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    folder, name = models / "text_encoders", f"seeing_{dtype}.safetensors"
    tensors = load_file(folder / ENCODER)
    save_file({n: tensor.to(half).float() for n, tensor in tensors.items()}, folder / name)
    stored = run("K2TextEncoderLoader", file=ENCODER, dtype=dtype)[0]
    rounded = run("K2TextEncoderLoader", file=name)[0]
    found, expected = (encode(who=c, image_1=image())[0] for c in (stored, rounded))
    assert stored.cond_stage_model.vision.patcher.model.merger.norm.weight.dtype == half
    assert_close(found, expected, 1e-5, f"encoder and tower stored as {dtype}")
    (folder / name).unlink()


@pytest.mark.parametrize("style", ["tensors", "header", "marker"])
def test_towers_in_8_bits(run, models, encode, style):
    """fp8_scaled, its embedding of positions too, beside a file of the numbers that stand in it."""
    folder, names = models / "text_encoders", ("seeing_fp8.safetensors", "seeing_fp8_plain.sft")
    tensors = load_file(folder / ENCODER)
    stored, values, metadata = formats.float8(tensors, style, part="visual.")
    save_file(stored, folder / names[0], metadata)
    save_file({name: tensor.contiguous() for name, tensor in values.items()}, folder / names[1])
    clips = [run("K2TextEncoderLoader", file=name)[0] for name in names]
    found, expected = (encode(who=clip, image_1=image())[0] for clip in clips)
    assert_close(found, expected, 1e-4, f"a vision tower in fp8, {style}")
    for name in names:
        (folder / name).unlink()


def test_generate_text_sees_what_core_sees(clip, core_clip):
    """Greedily, a token at a time behind an image; the tiny model writes nonsense, but the same."""
    picture, options = image(64, 96), {"do_sample": False, "max_length": 6}
    written = []
    for each in (clip, core_clip):
        tokens = each.tokenize("what is it", image=picture, min_length=1, thinking=False)
        written.append(each.generate(tokens, **options))
    assert list(written[0]) == list(written[1])
    other = clip.tokenize("what is it", image=1 - picture, min_length=1, thinking=False)
    assert list(clip.generate(other, **options)) != list(written[0])


def test_nano_sees(run):
    """The built-in encoder: another picture is another conditioning, at the images' tokens."""
    clip = run("K2TextEncoderLoader", file="krea2-nano (built in)")[0]
    red, blue = (
        run("K2TextEncodeImages", clip=clip, prompt="a star", image_1=flat(colour))[0][0][0]
        for colour in ((1, 0, 0), (0, 0, 1))
    )
    assert red.shape == blue.shape and red.shape[1] == FIRST + 16 + 1 + 2 + 5
    assert not torch.allclose(red[:, FIRST : FIRST + 16], blue[:, FIRST : FIRST + 16], atol=0.1)
    assert np.isfinite(red.numpy()).all()


def flat(colour):
    return torch.tensor(colour, dtype=torch.float32).expand(1, 128, 128, 3)


def test_core_cuts_into_images_where_no_template_is_given(clip, core_clip):
    """As docs/why.md says: its chat for images has no system turn, and is cut where the second
    turn would begin if an image were one token. Here that leaves two of eight tokens of the image.
    """
    picture = image(64, 128)
    ours, core = (
        c.encode_from_tokens(c.tokenize("a fox", images=[picture])) for c in (clip, core_clip)
    )
    assert core.shape[1] == 2 + 1 + 2 + 5
    assert ours.shape[1] == 1 + 8 + 1 + 2 + 5
