"""CLIP beside core's Krea 2 text encoder, whose sizes are patched to the small checkpoint's."""

import comfy.model_management
import pytest
import torch
from safetensors.torch import load_file, save_file

from in_process import NODES
from live_bytes import LiveBytes
from parity import assert_close

PROMPTS = [
    "a fox in the snow",
    "",
    "\u72d0\u72f8\u5728\u96ea\u5730\u91cc \U0001f98a",
    "x" * 300,
    "two\nlines ",
]


@pytest.fixture
def clip(models, run):
    return run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_clip_text_encode_equals_core(run, clip, core_clip, prompt):
    (ours, extra), (core, core_extra) = (
        run("CLIPTextEncode", clip=c, text=prompt)[0][0] for c in (clip, core_clip)
    )
    assert clip.tokenize(prompt) == core_clip.tokenize(prompt)
    assert_close(ours, core, 1e-5, f"CLIPTextEncode of {prompt[:12]!r} against core")
    assert "attention_mask" not in extra and "attention_mask" not in core_extra


def test_prompt_counts_the_tokens_of_either_clip(clip, core_clip):
    for each in (clip, core_clip):
        report = NODES["K2TextEncode"].execute(clip=each, prompt="a fox", negative="fox").ui
        assert report.as_dict()["text"] == ("prompt: 2 tokens of 507\nnegative: 1 token of 507",)


def test_backslashes_reach_the_tokenizer(clip, core_clip):
    """Core takes them for escaped prompt weights and drops them, which changes the text."""
    decoded = [c.decode([t for t, _ in c.tokenize(r"a \(fox\)")["qwen3vl_4b"][0]]) for c in
               (clip, core_clip)]  # fmt: skip
    assert r"a \(fox\)" in decoded[0] and "a (fox)" in decoded[1]


def test_chats_pass_unwrapped_as_in_core(clip, core_clip):
    chat = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na fox<|im_end|>\n"
    tokens = clip.tokenize(chat)
    assert tokens == core_clip.tokenize(chat)
    ours, core = (c.encode_from_tokens(c.tokenize(chat)) for c in (clip, core_clip))
    assert_close(ours, core, 1e-5, "a chat of its own, against core")
    wrapped = clip.tokenize(chat, always_wrap=True)
    assert len(wrapped["qwen3vl_4b"][0]) == len(tokens["qwen3vl_4b"][0]) + 34 + 5


def test_a_leading_line_break_keeps_the_official_cut(clip):
    """It merges with the template's own, so what is kept has to be counted, not searched."""
    tokens = clip.tokenize("\n\na fox")["qwen3vl_4b"][0]
    conditioning = clip.encode_from_tokens({"qwen3vl_4b": [tokens]})
    assert conditioning.shape[1] == len(tokens) - 34


def test_each_conditioning_feeds_the_other_model(run, clip, core_clip, turbo, core_turbo, latent):
    samples = {}
    for name, encoder in (("ours", clip), ("core", core_clip)):
        text = run("CLIPTextEncode", clip=encoder, text="a fox in the snow")[0]
        for family, model in (("ours", turbo), ("core", core_turbo)):
            result = run(
                "K2Sampler", model=model, positive=text, latent=latent, preset="turbo", seed=3
            )
            samples[name, family] = result[0]["samples"]
    reference = samples["core", "core"]
    for pair, value in samples.items():
        assert_close(value, reference, 1e-4, f"encoder and model of {pair}")


def test_krea_prompt_node(run, clip):
    positive, negative = run("K2TextEncode", clip=clip, prompt="a fox", negative="")
    for conditioning, text in ((positive, "a fox"), (negative, "")):
        expected = run("CLIPTextEncode", clip=clip, text=text)[0]
        assert torch.equal(conditioning[0][0], expected[0][0])
    # The empty prompt is what is left of the template.
    assert negative[0][0].shape == (1, 5, 12 * 160)


def test_krea_prompt_node_always_wraps(run, clip):
    chat = "<|im_start|>user\nhi"
    wrapped = run("K2TextEncode", clip=clip, prompt=chat)[0][0][0]
    assert wrapped.shape[1] == len(clip.tokenize(chat)["qwen3vl_4b"][0]) + 5


def test_krea_prompt_node_takes_core_clip(run, clip, core_clip):
    ours, core = (run("K2TextEncode", clip=c, prompt="a fox")[0][0][0] for c in (clip, core_clip))
    assert_close(ours, core, 1e-5, "K2TextEncode on core's CLIP")


def test_five_thousand_words_with_a_warning_or_cut(run, clip, caplog):
    prompt = "fox " * 5000
    tokens = clip.tokenize(prompt)["qwen3vl_4b"][0]
    assert len(tokens) > 5000
    assert "trained on up to 507" in caplog.text
    cut = run("K2TextEncode", clip=clip, prompt=prompt, official_length=True)[0][0][0]
    assert cut.shape[1] == 512


def test_a_text_that_would_take_hours_is_refused_before_it_is_encoded(run, clip, core_clip):
    prompt = "abcdefghij" * 20_000
    for each in (clip, core_clip):
        with pytest.raises(ValueError, match="tokens; expected at most 10000"):
            run("K2TextEncode", clip=each, prompt="a fox", negative=prompt)
    with pytest.raises(ValueError, match="tokens; expected at most 10000"):
        run("CLIPTextEncode", clip=clip, text=prompt)


def test_a_list_of_texts_gives_each_image_its_own(run, clip, turbo):
    texts = ["a fox", "a much longer description of a badger in the rain"]
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(texts))
    conditioning, extra = encoded[0]
    alone = [clip.encode_from_tokens(clip.tokenize(text)) for text in texts]
    assert extra["attention_mask"].sum(dim=1).tolist() == [a.shape[1] for a in alone]
    for row, text in zip(conditioning, alone, strict=True):
        assert torch.equal(row[: text.shape[1]], text[0])
        assert (row[text.shape[1] :] == 0).all()
    latents = {"samples": torch.zeros(2, 16, 1, 8, 8)}
    together = run("K2Sampler", model=turbo, positive=encoded, latent=latents, seed=2)[0]
    for index, text in enumerate(alone):
        one = run("K2Sampler", model=turbo, positive=[[text, {}]], latent=latents, seed=2)[0]
        assert_close(
            together["samples"][index], one["samples"][index], 1e-5, f"text {index} of a list"
        )


def test_partial_load_encodes_alike(clip):
    tokens = clip.tokenize("a fox")
    expected = clip.encode_from_tokens(tokens)
    clip.patcher.detach()
    clip.patcher.load(torch.device("cpu"), lowvram_model_memory=clip.patcher.model_size() // 3)
    model = clip.cond_stage_model
    assert any(getattr(m, "comfy_cast_weights", False) for m in model.modules())
    partial = model.encode_token_weights(tokens)[0]
    assert_close(partial, expected, 1e-6, "partially loaded encoder")
    clip.patcher.detach()


def test_only_the_layers_text_needs_are_held(clip):
    names = set(clip.cond_stage_model.state_dict())
    assert "qwen3vl_4b.transformer.model.layers.34.mlp.up_proj.weight" in names
    assert not any(part in name for name in names for part in ("layers.35.", "visual", "lm_head"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_stored_dtypes_keep_float32_activations(run, models, clip, dtype):
    """Only the weights are rounded: the same as rounded weights in a float32 model."""
    folder, half = models / "text_encoders", {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    tensors = load_file(folder / "qwen3vl_tiny.safetensors")
    rounded = {name: tensor.to(half).float() for name, tensor in tensors.items()}
    save_file(rounded, folder / f"rounded_{dtype}.safetensors")
    stored = run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors", dtype=dtype)[0]
    expected = run("K2TextEncoderLoader", file=f"rounded_{dtype}.safetensors")[0]
    assert stored.cond_stage_model.encoder.embed_tokens.weight.dtype == half
    ours, reference, full = (
        c.encode_from_tokens(c.tokenize("a fox")) for c in (stored, expected, clip)
    )
    assert_close(ours, reference, 1e-5, f"text encoder stored as {dtype}")
    assert not torch.allclose(ours, full)


def test_a_template_of_another_node_replaces_ours(clip, core_clip):
    template = "<|im_start|>user\n{}<|im_end|>\n"
    ours, core = (
        c.tokenize("a fox", llama_template=template, images=[]) for c in (clip, core_clip)
    )
    assert ours == core


def test_saved_encoder_loads_again(run, base, models, clip):
    expected = clip.encode_from_tokens(clip.tokenize("a fox"))
    run("CLIPSave", clip=clip, filename_prefix="saved_clip/encoder")
    (saved,) = (base / "output" / "saved_clip").rglob("*.safetensors")
    saved.rename(models / "text_encoders" / "resaved_encoder.safetensors")
    again = run("K2TextEncoderLoader", file="resaved_encoder.safetensors")[0]
    assert torch.equal(again.encode_from_tokens(again.tokenize("a fox")), expected)


def test_stock_lora_patches_the_encoder(clip):
    key = "qwen3vl_4b.transformer.model.layers.3.mlp.up_proj.weight"
    import comfy.lora

    aliases = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    assert aliases["text_encoders.qwen3vl_4b.transformer.model.layers.3.mlp.up_proj"] == key
    patched = clip.clone()
    difference = torch.randn(320, 160)
    assert patched.add_patches({key: ("diff", (difference,))}, 0.5) == [key]
    tokens = clip.tokenize("a fox")
    before = clip.encode_from_tokens(tokens)
    assert not torch.allclose(patched.encode_from_tokens(tokens), before)
    assert torch.equal(clip.encode_from_tokens(tokens), before)


def test_encodings_are_kept_by_content(pack, clip, monkeypatch):
    """The same tokens and patches: no second run of the encoder, and a result of one's own."""
    encoder, calls = clip.cond_stage_model.encoder, []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda tokens: calls.append(1) or forward(tokens))

    def encode(text, who=clip):
        return who.encode_from_tokens(who.tokenize(text))

    first = encode("a heron at dawn")
    before = first.clone()
    first.zero_()
    assert torch.equal(encode("a heron at dawn", clip.clone()), before) and len(calls) == 1
    encode("a heron at dusk")
    assert len(calls) == 2
    key = "qwen3vl_4b.transformer.model.layers.3.mlp.up_proj.weight"
    patched = clip.clone()
    shape = encoder.layers[3].mlp.up_proj.weight.shape
    assert patched.add_patches({key: ("diff", (torch.full(shape, 0.1),))}, 1.0) == [key]
    assert not torch.allclose(encode("a heron at dawn", patched), before)
    assert len(calls) == 3
    monkeypatch.setattr(pack("nodes.managed.clip"), "KEPT_ENCODINGS", 6)
    for number in range(8):
        encode(f"heron number {number}")
    kept = clip.cond_stage_model.encodings
    assert len(kept) == 6
    # Images make them large: then fewer are kept, and none that is larger than all may be.
    size = next(iter(kept.values())).nbytes
    for most, count in ((5 * size, 4), (1, 0)):
        monkeypatch.setattr(pack("nodes.managed.clip"), "KEPT_BYTES", most)
        encode(f"a heron in {count} words more or less")
        assert len(kept) == count


def test_of_a_batch_each_different_prompt_is_encoded_once(pack, clip, monkeypatch):
    calls, encode_row = [], type(clip.cond_stage_model.section).encode_row

    def counting(self, row):
        calls.append(row)
        return encode_row(self, row)

    monkeypatch.setattr(type(clip.cond_stage_model.section), "encode_row", counting)
    prompts = ["a fox", "an owl at night", "a fox", "a heron in the reeds of a lake"]
    tokens = clip.tokenize([prompt for prompt in prompts for _ in range(3)], always_wrap=True)
    clip.cond_stage_model.encodings.clear()
    batch = clip.encode_from_tokens(tokens, return_dict=True)
    assert len(calls) == 3
    # Without what is remembered, as under hooks, too.
    clip.load_model(tokens)
    states, _, extra = clip.cond_stage_model.encode_token_weights(tokens)
    assert len(calls) == 6
    assert torch.equal(states, batch["cond"])
    assert torch.equal(extra["attention_mask"], batch["attention_mask"])
    lengths = batch["attention_mask"].sum(dim=1)
    for row, prompt in enumerate(prompts):
        alone = clip.encode_from_tokens(clip.tokenize(prompt, always_wrap=True))
        assert torch.equal(batch["cond"][3 * row, : lengths[3 * row]], alone[0])
        assert not batch["cond"][3 * row, lengths[3 * row] :].any()
    # One line of many changed: one row is encoded.
    before = len(calls)
    clip.encode_from_tokens(clip.tokenize(["a fox", "an owl at noon"], always_wrap=True))
    assert len(calls) == before + 1


def test_a_long_prompt_in_blocks_equals_core(pack, clip, core_clip, monkeypatch):
    """Blocks begin at 2,049 tokens; here at 65."""
    monkeypatch.setattr(pack("krea2_model.text.decoder"), "MASK_ELEMENTS", 0)
    prompt = "fox, " * 150
    ours, core = (c.encode_from_tokens(c.tokenize(prompt)) for c in (clip, core_clip))
    assert ours.shape[1] > 300
    assert_close(ours, core, 1e-5, "a prompt in blocks against core")


def test_the_estimate_counts_what_a_long_prompt_takes(clip):
    tokens = clip.tokenize("fox, " * 1050)
    length = len(tokens["qwen3vl_4b"][0])
    estimate = clip.cond_stage_model.memory_estimation_function(tokens)
    clip.load_model(tokens)
    with LiveBytes() as live:
        clip.cond_stage_model.encode_token_weights(tokens)
    assert length > 2049 and live.peak <= estimate < 4 * live.peak


def test_an_encode_is_cancelled_between_layers(clip):
    layers, ran = clip.cond_stage_model.encoder.layers, []

    def cancel(layer, *_):
        ran.append(layer)
        if len(ran) == 3:
            comfy.model_management.interrupt_current_processing()

    hooks = [layer.register_forward_hook(cancel) for layer in layers]
    tokens = clip.tokenize("a fox that nobody encoded yet")
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            clip.encode_from_tokens(tokens)
        assert len(ran) == 3
        assert torch.isfinite(clip.encode_from_tokens(tokens)).all()
        assert len(ran) == 3 + len(layers)
    finally:
        comfy.model_management.interrupt_current_processing(False)
        for hook in hooks:
            hook.remove()


def test_attention_of_the_encoder_is_cancelled_within_a_layer(pack):
    """Layers of newer ComfyUIs ask for a cancel too, but not between the blocks of one."""
    attend, heads = pack("nodes.managed.backend").encoder_attention(), torch.randn(1, 2, 4, 8)
    expected = attend(heads, heads, heads)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        attend(heads, heads, heads)
    assert torch.equal(attend(heads, heads, heads), expected)
