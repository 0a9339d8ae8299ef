"""Weights in prompts and negatives without guidance, through ComfyUI."""

import comfy.ldm.modules.attention as attention
import comfy.model_management
import pytest
import torch

from parity import assert_close, relative_error

NANO = "krea2-nano (built in)"
KEY = "krea2_token_weights"
SETTINGS = {"preset": "custom", "steps": 4, "guidance": 0.0, "shift": "fixed", "seed": 5}


@pytest.fixture(scope="module")
def nano(run):
    return run("K2Loader", model=NANO)


@pytest.fixture(scope="module")
def encode(run, nano):
    def call(prompt, **options):
        return run("K2TextEncode", clip=nano[1], prompt=prompt, **options)[0]

    return call


@pytest.fixture(scope="module")
def sample(run, nano):
    """Latents of nano Turbo in 4 steps, by our sampler."""

    def call(positive, model=None, batch=1, **options):
        latent = run("K2EmptyLatent", aspect="custom", width=128, height=128, batch=batch)[0]
        (result,) = run("K2Sampler", model=model or nano[0], positive=positive, latent=latent,
                        **SETTINGS | options)  # fmt: skip
        return result["samples"]

    return call


def weighted(tokens, weights, conditioning, seed=1, **extra):
    whole = torch.ones(1, tokens)
    for index, weight in weights.items():
        whole[0, index] = weight
    return conditioning(tokens, seed, **{KEY: whole}, **extra)


def in_krea2_model(pack, patcher, positive, negative=None, settings=None):
    """The same run by krea2_model's own loop: latents as the sampler gives them."""
    sampling, schedule = pack("krea2_model.sampling"), pack("krea2_model.schedule")
    states = pack("krea2_model.transformer.text_attention").TextStates
    transformer = patcher.model.diffusion_model
    plain = pack("krea2_model.transformer.model").Krea2Transformer

    def text(conditioning):
        if conditioning is None:
            return None
        taps = conditioning[0][0].unflatten(-1, (12, -1))
        return states(transformer.fuse_text(taps), None, conditioning[0][1].get(KEY))

    velocity = lambda *args, **hooks: plain.forward(transformer, *args, **hooks)  # noqa: E731
    velocity.compute_dtype = transformer.compute_dtype
    noise = torch.randn((1, 16, 1, 16, 16), generator=torch.manual_seed(SETTINGS["seed"]))
    *_, (_, latents, _) = sampling.denoise(
        velocity, noise[:, :, 0], text(positive), text(negative),
        sigmas=schedule.sigma_schedule(SETTINGS["steps"], 1.15), guidance=0.0,
        negative_guidance=settings,
    )  # fmt: skip
    return patcher.model.process_latent_out(latents[:, :, None])


def test_prompts_without_marks_are_what_they_were(encode):
    plain = encode("a red circle, (bright) on white", weights=False)
    for options in ({}, {"weights": True}):
        ((states, extra),) = encode("a red circle, (bright) on white", **options)
        assert torch.equal(states, plain[0][0]) and KEY not in extra
    ((states, extra),) = encode("a (red:1) circle, (bright) on white")
    assert torch.equal(states, plain[0][0]) and KEY not in extra


def test_marks_become_weights_beside_the_clean_sentence(encode):
    ((states, extra),) = encode("a (red:1.5) circle on (plain white:-1)")
    assert torch.equal(states, encode("a red circle on plain white")[0][0])
    assert extra[KEY].tolist() == [[1.0, 1.5, 1.0, 1.0, -1.0, -1.0] + [1.0] * 5]


def test_off_marks_are_text(encode, run, nano):
    prompt = r"a (red:1.5) \(circle\)"
    ((states, extra),) = encode(prompt, weights=False)
    whole = nano[1].encode_from_tokens_scheduled(nano[1].tokenize(prompt))
    assert KEY not in extra and torch.equal(states, whole[0][0])


def test_cut_prompts_lose_the_weights_of_what_was_cut(encode):
    ((states, extra),) = encode("a (red:1.5) circle on (white:0)", max_tokens=3)
    assert states.shape[1] == 8 and extra[KEY].tolist() == [[1.0, 1.5] + [1.0] * 6]
    ((_, extra),) = encode("a red circle on (white:0)", max_tokens=3)
    assert KEY not in extra


def test_a_number_out_of_range_is_refused(encode):
    with pytest.raises(ValueError, match=r"weight 30 in '\(fox:30\)'"):
        encode("a (fox:30)")


def test_weights_equal_krea2_model(pack, nano, encode, sample):
    positive = encode("a (red:1.5) circle on a (white:0) background")
    found = sample(positive)
    expected = in_krea2_model(pack, nano[0], positive)
    assert_close(found, expected, 1e-4, "weights, here and in krea2_model")
    assert relative_error(found, sample(encode("a red circle on a white background"))) > 1e-2


def test_weights_on_stock_samplers(run, nano, encode, sample):
    positive = encode("a (red:1.5) circle on a (white:0) background")
    model = run("K2ModelSampling", model=nano[0], width=128, height=128)[0]
    latent = run("K2EmptyLatent", aspect="custom", width=128, height=128)[0]
    (stock,) = run("KSampler", model=model, seed=5, steps=4, cfg=1.0, sampler_name="euler",
                   scheduler="simple", positive=positive, negative=encode(""),
                   latent_image=latent)  # fmt: skip
    assert_close(stock["samples"], sample(positive), 1e-5, "KSampler with weights")


@pytest.mark.parametrize(
    "function", ["attention_basic", "attention_pytorch", "attention_split", "attention_sub_quad"]
)
def test_every_attention_function_gives_the_same(encode, sample, run, nano, monkeypatch, function):
    """Weights are values, so they need no mask of any of them; a negative is two calls."""
    positive = encode("a (red:1.5) circle on a (white:0) background")
    model = run("K2NegativeGuidance", model=nano[0], negative=encode("(red:2)"), end=1.0)[0]
    expected = sample(positive, model)
    masks = []

    def chosen(*args, mask=None, **options):
        masks.append(mask)
        return getattr(attention, function)(*args, mask=mask, **options)

    monkeypatch.setattr(attention, "optimized_attention", chosen)
    assert_close(sample(positive, model), expected, 1e-4, function)
    assert masks and all(mask is None for mask in masks)


def test_weights_and_guidance(run, raw, conditioning, latent):
    """Weighted and plain texts take calls of their own; each is as it would be alone."""
    positive = weighted(6, {2: 1.5, 3: -1.0}, conditioning)
    negative = weighted(4, {1: 2.0}, conditioning, seed=2)
    options = {"latent": latent, "preset": "custom", "steps": 2, "seed": 3, "guidance": 2.0}
    found = {}
    for name, pair in {"both": (positive, negative), "one": (positive, conditioning(4, 2)),
                       "none": (conditioning(6, 1), conditioning(4, 2))}.items():  # fmt: skip
        (result,) = run("K2Sampler", model=raw, positive=pair[0], negative=pair[1], **options)
        found[name] = result["samples"]
    assert relative_error(found["both"], found["one"]) > 1e-4
    assert relative_error(found["one"], found["none"]) > 1e-4


@pytest.mark.parametrize("joined", ["one after the other", "in a batch"])
def test_texts_of_different_length_with_weights(run, turbo, conditioning, latent, joined):
    """Combined, or a text an image: what each gives is what it gives alone."""
    first, second = weighted(6, {2: 1.5}, conditioning), weighted(4, {1: 0.0}, conditioning, seed=2)
    options = {"preset": "custom", "steps": 1, "guidance": 0.0, "seed": 3, "model": turbo}

    def sample(positive, **more):
        return run("K2Sampler", positive=positive, **options | more)[0]["samples"]

    if joined == "in a batch":
        pad = torch.nn.functional.pad
        states = torch.cat((first[0][0], pad(second[0][0], (0, 0, 0, 2))))
        extra = {KEY: torch.cat((first[0][1][KEY], pad(second[0][1][KEY], (0, 2), value=1.0))),
                 "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}  # fmt: skip
        noisy = {"samples": torch.zeros(2, 16, 1, 16, 24), "batch_index": [0, 0]}
        found = sample([[states, extra]], latent=noisy)
        for item, alone in enumerate((first, second)):
            assert_close(found[item : item + 1], sample(alone, latent=latent), 1e-5, joined)
    else:
        found = sample(run("ConditioningCombine", conditioning_1=first, conditioning_2=second)[0],
                       latent=latent)  # fmt: skip
        expected = (sample(first, latent=latent) + sample(second, latent=latent)) / 2
        assert_close(found, expected, 1e-5, joined)


def test_core_s_nodes_keep_the_weights_of_the_first(run, turbo, conditioning, latent):
    first, other = weighted(6, {2: 1.5}, conditioning), conditioning(9, 2)
    average = run("ConditioningAverage", conditioning_to=first, conditioning_from=other,
                  conditioning_to_strength=1.0)[0]  # fmt: skip
    joined = run("ConditioningConcat", conditioning_to=first, conditioning_from=other)[0]

    def sample(positive):
        return run("K2Sampler", model=turbo, positive=positive, latent=latent, preset="custom",
                   steps=1, guidance=0.0, seed=3)[0]["samples"]  # fmt: skip

    assert torch.equal(sample(average), sample(first))
    longer = [[joined[0][0], {KEY: torch.nn.functional.pad(first[0][1][KEY], (0, 9), value=1.0)}]]
    assert torch.equal(sample(joined), sample(longer))


def test_core_s_clip_takes_weights_too(run, models, pack):
    """The sentence goes to core's encoder, the weights are those that our CLIP makes."""
    clip = pack("nodes.managed.encode")

    class Core:
        tokenizer = None

        def tokenize(self, text, **options):
            self.text = text
            return {}

        def encode_from_tokens_scheduled(self, tokens):
            return [[torch.zeros(1, 8, 4), {"pooled_output": None}]]

    core = Core()
    ((_, extra),) = clip.encode_prompts(core, ["a (red:1.5) circle"], weighted=True)
    assert core.text == "a red circle" and extra[KEY].tolist() == [[1.0, 1.5] + [1.0] * 6]


def test_combined_prompts_with_a_negative(run, turbo, conditioning, latent):
    """Texts of different length share calls only where there is no negative."""
    first, second = conditioning(6, 1), conditioning(4, 2)
    model = run("K2NegativeGuidance", model=turbo, negative=conditioning(5, 3))[0]

    def sample(positive):
        return run("K2Sampler", model=model, positive=positive, latent=latent, preset="custom",
                   steps=1, guidance=0.0, seed=3)[0]["samples"]  # fmt: skip

    expected = (sample(first) + sample(second)) / 2
    assert_close(sample(first + second), expected, 1e-5, "two prompts and a negative")


def test_memory_counts_the_negative_s_tokens(turbo):
    def required(**shapes):
        return turbo.model.memory_required((1, 16, 1, 16, 16), shapes)

    text, negative = {"c_crossattn": [(1, 6, 256)]}, {"negative_text": [(1, 9, 256)]}
    assert required(**text, **negative) == required(c_crossattn=[(1, 15, 256)]) > required(**text)


@pytest.mark.parametrize("off", [{"strength": 0.0}, {"blend": 0.0}, {"start": 0.5, "end": 0.5}])
def test_a_negative_that_is_off_is_exactly_as_before(run, nano, encode, sample, off):
    positive = encode("a red circle")
    model = run("K2NegativeGuidance", model=nano[0], negative=encode("a star"), **off)[0]
    assert torch.equal(sample(positive, model), sample(positive))


@pytest.mark.parametrize("end", [0.5, 1.0])
def test_negative_guidance_equals_krea2_model(run, pack, nano, encode, sample, end):
    positive, negative = encode("a (red:1.2) circle"), encode("a small (blue:2) star on black")
    model = run("K2NegativeGuidance", model=nano[0], negative=negative, end=end)[0]
    found = sample(positive, model)
    settings = pack("krea2_model").NegativeGuidance(end=end)
    expected = in_krea2_model(pack, nano[0], positive, negative, settings)
    assert_close(found, expected, 1e-4, "negative guidance, here and in krea2_model")
    assert relative_error(found, sample(positive)) > 1e-3
    assert torch.equal(sample(positive, model), found), "a second run"


def test_stock_samplers_and_batches_take_the_negative(run, nano, encode, sample):
    positive, negative = encode("a red circle"), encode("a small blue star on black")
    model = run("K2NegativeGuidance", model=nano[0], negative=negative)[0]
    whole = sample(positive, model, batch=2)
    shifted = run("K2ModelSampling", model=model, width=128, height=128)[0]
    latent = run("K2EmptyLatent", aspect="custom", width=128, height=128, batch=2)[0]
    (stock,) = run("KSampler", model=shifted, seed=5, steps=4, cfg=1.0, sampler_name="euler",
                   scheduler="simple", positive=positive, negative=encode(""),
                   latent_image=latent)  # fmt: skip
    assert_close(stock["samples"], whole, 1e-5, "KSampler with a negative")
    assert_close(whole[:1], sample(positive, model), 1e-4, "in a batch and alone")


def test_the_negative_s_text_is_fused_once_a_run(run, nano, encode, sample, calls_of):
    calls = calls_of(nano[0].model.diffusion_model.txtfusion)
    model = run("K2NegativeGuidance", model=nano[0], negative=encode("a star"))[0]
    sample(encode("a red circle"), model)
    assert len(calls) == 2


def test_guidance_leaves_the_unconditional_alone(run, pack, raw, conditioning):
    """With guidance the node acts on the positive; Raw's own negative is as it was."""
    positive, negative, against = conditioning(6, 1), conditioning(4, 2), conditioning(5, 3)
    latent = {"samples": torch.zeros(1, 16, 1, 16, 16)}
    model = run("K2NegativeGuidance", model=raw, negative=against, end=1.0)[0]
    options = {"latent": latent, "preset": "custom", "steps": 1, "seed": 3}

    def sample(patcher, guidance):
        (result,) = run("K2Sampler", model=patcher, positive=positive, negative=negative,
                        guidance=guidance, **options)  # fmt: skip
        return result["samples"]

    conditional, guided = sample(model, 0.0), sample(model, 2.0)
    (alone,) = run("K2Sampler", model=raw, positive=negative, guidance=0.0, **options)
    expected = conditional + 2.0 * (conditional - alone["samples"])
    assert_close(guided, expected, 1e-5, "only the positive is led")


def test_partly_loaded_models_and_loras(run, nano, encode, sample):
    """A LoRA changes the negative's text too, and offloading changes nothing."""
    (patched,) = run("K2LoraLoader", model=nano[0], lora="krea2-nano notebook (built in)",
                     strength=1.0)[:1]  # fmt: skip
    positive, negative = encode("a (red:1.2) circle"), encode("a small blue star on black")
    model = run("K2NegativeGuidance", model=patched, negative=negative)[0]
    expected = sample(positive, model)
    other = run("K2NegativeGuidance", model=nano[0], negative=negative)[0]
    assert relative_error(expected, sample(positive, other)) > 1e-2
    comfy.model_management.unload_all_models()
    model.load(torch.device("cpu"), lowvram_model_memory=model.model_size() // 3)
    assert model.model.model_lowvram
    assert_close(sample(positive, model), expected, 1e-4, "partly loaded")
    model.detach()


def test_patches_see_the_image_where_it_is(run, nano, encode, sample):
    """Others' patches on attention: a negative's tokens stand in front, and img_slice says so."""
    seen, positive = [], encode("a red circle")
    tokens, image = positive[0][0].shape[1], 64

    def patch(out, options):
        seen.append((out.shape[1], tuple(options["img_slice"])))
        return out

    negative = encode("a small blue star on black")
    front = negative[0][0].shape[1]
    model = run("K2NegativeGuidance", model=nano[0], negative=negative)[0]
    expected = sample(positive, model)
    model.set_model_attn1_output_patch(patch)
    assert_close(sample(positive, model), expected, 1e-5, "all queries in the last block")
    assert set(seen) == {
        (front + tokens + image, (front + tokens, front + tokens + image)),
        (tokens + image, (tokens, tokens + image)),
    }


def test_the_negative_is_one_conditioning(run, turbo, conditioning):
    both = conditioning(6, 1) + conditioning(4, 2)
    with pytest.raises(ValueError, match="negative has 2"):
        run("K2NegativeGuidance", model=turbo, negative=both)
    with pytest.raises(ValueError, match="limit is 0.5"):
        run("K2NegativeGuidance", model=turbo, negative=conditioning(4, 2), limit=0.5)
