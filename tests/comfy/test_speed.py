"""What is faster at a price: off by itself, and what it says it is."""

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.quant_ops
import pytest
import torch

from parity import assert_close, relative_error


@pytest.fixture
def inputs(conditioning, latent):
    return {"positive": conditioning(6, 1), "negative": conditioning(4, 2), "latent": latent,
            "preset": "custom", "steps": 10, "guidance": 2.0, "seed": 5}  # fmt: skip


@pytest.fixture
def calls(raw, calls_of):
    return calls_of(raw.model.diffusion_model.blocks[0])


def test_nothing_changes_until_it_is_chosen(run, raw, inputs):
    exact = run("K2Sampler", model=raw, **inputs)[0]["samples"]
    model = run("K2Approximate", model=raw)[0]
    assert torch.equal(run("K2Sampler", model=model, **inputs)[0]["samples"], exact)


@pytest.mark.parametrize(
    "choice, every, asked", [("every 2nd step", 2, 6), ("every 3rd step", 3, 5)]
)
def test_later_steps_do_without_the_model(run, raw, inputs, calls, pack, choice, every, asked):
    """As krea2_model itself does it, in each run anew, and only on this clone."""
    model = run("K2Approximate", model=raw, evaluate=choice)[0]
    found = run("K2Sampler", model=model, **inputs)[0]["samples"]
    assert len(calls) == asked, "positive and negative share calls here"
    again = run("K2Sampler", model=model, **inputs)[0]["samples"]
    assert torch.equal(found, again) and len(calls) == 2 * asked
    calls.clear()
    exact = run("K2Sampler", model=raw, **inputs)[0]["samples"]
    assert len(calls) == 10 and relative_error(found, exact) > 1e-4

    sampling, schedule = pack("krea2_model.sampling"), pack("krea2_model.schedule")
    transformer = raw.model.diffusion_model
    texts = [transformer.fuse_text(inputs[name][0][0].unflatten(-1, (12, 160)))
             for name in ("positive", "negative")]  # fmt: skip
    noise = torch.randn((1, 16, 1, 16, 24), generator=torch.manual_seed(5))[:, :, 0]
    sigmas = schedule.sigma_schedule(10, schedule.shift_mu(96))
    plain = pack("krea2_model.transformer.model").Krea2Transformer
    velocity = lambda *args: plain.forward(transformer, *args)  # noqa: E731
    velocity.compute_dtype = transformer.compute_dtype
    *_, (_, expected, _) = sampling.denoise(
        velocity, noise, *texts, sigmas=sigmas, guidance=2.0, evaluate_every=every
    )
    latents = raw.model.process_latent_in(found)[:, :, 0]
    assert_close(latents, expected, 1e-4, f"{choice}, here and in krea2_model")


def test_samplers_of_higher_order_stay_finite(run, raw, inputs):
    model = run("K2Approximate", model=raw, evaluate="every 2nd step")[0]
    exact = run("K2Sampler", model=raw, sampler="heun", **inputs)[0]["samples"]
    found = run("K2Sampler", model=model, sampler="heun", **inputs)[0]["samples"]
    assert torch.isfinite(found).all() and relative_error(found, exact) < 0.5


def test_stock_samplers_take_it_too(run, raw, inputs, calls):
    model = run("K2Approximate", model=raw, evaluate="every 2nd step")[0]
    run("KSampler", model=model, seed=1, steps=10, cfg=3.0, sampler_name="euler",
        scheduler="simple", positive=inputs["positive"], negative=inputs["negative"],
        latent_image=inputs["latent"])  # fmt: skip
    assert len(calls) == 6


def test_attention_in_8_bits_needs_its_package(run, raw, monkeypatch):
    attention = comfy.ldm.modules.attention
    monkeypatch.setattr(attention, "SAGE_ATTENTION_IS_AVAILABLE", False)
    with pytest.raises(ValueError, match="needs a package .* Install sageattention"):
        run("K2Approximate", model=raw, attention="8 bits (SageAttention)")


def test_attention_in_8_bits_is_that_of_comfyui(run, raw, inputs, monkeypatch):
    attention, seen = comfy.ldm.modules.attention, []
    exact = run("K2Sampler", model=raw, **inputs)[0]["samples"]

    def sage(q, k, v, heads, **options):
        seen.append(q.shape)
        return attention.attention_pytorch(q, k, v, heads, **options)

    monkeypatch.setattr(attention, "SAGE_ATTENTION_IS_AVAILABLE", True)
    monkeypatch.setattr(attention, "attention_sage", sage, raising=False)
    model = run("K2Approximate", model=raw, attention="8 bits (SageAttention)")[0]
    found = run("K2Sampler", model=model, **inputs)[0]["samples"]
    assert seen
    assert_close(found, exact, 1e-5, "the same function by another way")


@pytest.mark.parametrize("name", ["evaluate", "attention"])
def test_bad_choices_are_named(run, raw, name):
    with pytest.raises(ValueError, match=f"{name} is 'fast'"):
        run("K2Approximate", model=raw, **{name: "fast"})


@pytest.mark.parametrize("dtype, quantise", [("fp8_scaled", "fp8"), ("int8", "int8"),
                                             ("int8_convrot", "int8_convrot")])  # fmt: skip
def test_quantised_as_it_loads_is_what_a_converted_file_holds(
    run, turbo, models, velocity, pack, dtype, quantise
):
    name = "krea2_tiny_turbo.safetensors"
    stored = pack("krea2_model.tools.convert").STORED_FORMATS[quantise]
    if stored not in comfy.quant_ops.QUANT_ALGOS:
        with pytest.raises(ValueError, match=f"dtype {quantise} makes layers in .*Update ComfyUI"):
            run("K2ModelLoader", file=name, dtype=dtype)
        return
    loaded = run("K2ModelLoader", file=name, dtype=dtype)[0]
    folder = models / "diffusion_models"
    file = folder / f"converted_{quantise}_turbo.safetensors"
    pack("krea2_model.tools.convert").convert(folder / name, file, quantise)
    converted = run("K2ModelLoader", file=file.name)[0]
    assert loaded.model_size() == converted.model_size() < 0.7 * turbo.model_size()
    found = velocity(loaded)
    weights, expected = (m.model.diffusion_model.state_dict() for m in (loaded, converted))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key].float(), expected[key].float()) for key in weights)
    # A last digit flips a step of int8's 8-bit activations.
    limit = 1e-5 if quantise == "fp8" else 1e-2
    assert_close(found, velocity(converted), limit, f"{dtype} as it loads and from a file")
    assert 0 < relative_error(found, velocity(turbo)) < 0.2
    # Another loader of the same object, as core's compile and multi-GPU nodes ask for.
    loader, arguments = loaded.cached_patcher_init
    assert_close(velocity(loader(*arguments, disable_dynamic=True)), found, limit, "loaded again")
    # A quantised file stays as it is.
    again = run("K2ModelLoader", file=file.name, dtype="int8")[0]
    assert_close(velocity(again), found, limit, "a file that is quantised already")
    file.unlink()


def test_a_dtype_without_layers_for_it_is_refused(run, turbo, monkeypatch):
    monkeypatch.delitem(comfy.quant_ops.QUANT_ALGOS, "float8_e4m3fn")
    with pytest.raises(ValueError, match="dtype fp8"):
        run("K2ModelLoader", file="krea2_tiny_turbo.safetensors", dtype="fp8_scaled")


def test_unknown_dtypes_are_named(run, turbo):
    with pytest.raises(ValueError, match="dtype is 'q4'.*fp8_scaled"):
        run("K2ModelLoader", file="krea2_tiny_turbo.safetensors", dtype="q4")


def test_prompts_are_cut_where_asked(run, models):
    clip = run("K2TextEncoderLoader", file="krea2-nano (built in)")[0]
    prompt = "a small green star above a purple ring on white"

    def tokens(**options):
        return [c[0][0].shape[1] for c in run("K2TextEncode", clip=clip, prompt=prompt,
                                              negative="", **options)]  # fmt: skip

    whole, empty = tokens()
    assert tokens(max_tokens=4) == [9, empty]
    assert tokens(max_tokens=400) == [whole, empty] == tokens(max_tokens=4000, official_length=True)
    with pytest.raises(ValueError, match="max_tokens is -1"):
        tokens(max_tokens=-1)
