"""Guidance along a run and runs of two checkpoints, beside krea2_model and in pictures."""

import numpy as np
import pytest
import torch

from nano_training.judge import judge
from nano_training.scenes import held_out_prompts
from parity import assert_close, relative_error


@pytest.fixture
def inputs(conditioning, latent):
    return {"positive": conditioning(6, 1), "negative": conditioning(6, 2), "latent": latent,
            "preset": "custom", "steps": 8, "guidance": 2.0, "seed": 5}  # fmt: skip


def sampled(run, model, **inputs):
    return run("K2Sampler", model=model, **inputs)[0]["samples"]


@pytest.fixture
def images_a_call(raw, calls_of):
    """How many images each call of the model has: two where the negative is along."""
    return calls_of(raw.model.diffusion_model.blocks[0])


def test_the_defaults_change_nothing(run, raw, inputs):
    scheduled = run("K2GuidanceSchedule", model=raw)[0]
    assert torch.equal(sampled(run, scheduled, **inputs), sampled(run, raw, **inputs))


def test_an_interval_does_without_the_negative_outside(run, raw, inputs, images_a_call):
    scheduled = run("K2GuidanceSchedule", model=raw, end=0.5)[0]
    part = sampled(run, scheduled, **inputs)
    assert images_a_call == [2] * 4 + [1] * 4
    whole = sampled(run, raw, **inputs)
    none = sampled(run, raw, **{**inputs, "guidance": 0.0})
    assert relative_error(part, whole) > 1e-3 and relative_error(part, none) > 1e-3
    nowhere = run("K2GuidanceSchedule", model=raw, start=0.4, end=0.4)[0]
    assert torch.equal(sampled(run, nowhere, **inputs), none)
    # The guider has its own guidance back: the next run of the plain model is as before.
    assert torch.equal(sampled(run, raw, **inputs), whole)


@pytest.mark.parametrize("options", [
    {"start": 0.2, "end": 0.8, "ramp": "falling"}, {"ramp": "hill", "rescale": 0.5},
    {"rescale": 1.0}, {"start": 0.1, "end": 0.6, "ramp": "rising"},
])  # fmt: skip
def test_it_is_what_krea2_model_does(run, raw, inputs, pack, options):
    scheduled = run("K2GuidanceSchedule", model=raw, **options)[0]
    found = sampled(run, scheduled, **inputs)
    sampling, schedule = pack("krea2_model.sampling"), pack("krea2_model.schedule")
    transformer = raw.model.diffusion_model
    texts = [transformer.fuse_text(inputs[name][0][0].unflatten(-1, (12, 160)))
             for name in ("positive", "negative")]  # fmt: skip
    plain = pack("krea2_model.transformer.model").Krea2Transformer
    velocity = lambda *args: plain.forward(transformer, *args)  # noqa: E731
    velocity.compute_dtype = transformer.compute_dtype
    noise = torch.randn((1, 16, 1, 16, 24), generator=torch.manual_seed(5))[:, :, 0]
    *_, (_, expected, _) = sampling.denoise(
        velocity, noise, *texts, sigmas=schedule.sigma_schedule(8, schedule.shift_mu(96)),
        guidance=2.0, guidance_schedule=pack("krea2_model.guidance").GuidanceSchedule(**options),
    )  # fmt: skip
    latents = raw.model.process_latent_in(found)[:, :, 0]
    assert_close(latents, expected, 1e-4, f"{options}, here and in krea2_model")


def test_stock_samplers_and_skipped_steps_go_along(run, raw, inputs, images_a_call):
    model = run("K2GuidanceSchedule", model=raw, end=0.5)[0]
    model = run("K2Approximate", model=model, evaluate="every 2nd step")[0]
    run("KSampler", model=model, seed=1, steps=10, cfg=3.0, sampler_name="euler",
        scheduler="simple", positive=inputs["positive"], negative=inputs["negative"],
        latent_image=inputs["latent"])  # fmt: skip
    assert len(images_a_call) == 6 and {1, 2} == set(images_a_call)


@pytest.mark.parametrize("options, message", [
    ({"rescale": 2.0}, "rescale is 2.0"), ({"start": 7.0}, "start 7.0"),
    ({"end": -1.0}, "end -1.0"),
])  # fmt: skip
def test_bad_settings_are_refused_before_a_run(pack, options, message):
    node = pack("nodes.schedules").K2GuidanceSchedule
    assert message in node.validate_inputs(**options)
    assert node.validate_inputs(start=0.5) is True


def test_two_stages(run, raw, turbo, conditioning, latent, monkeypatch):
    """Raw's calls with guidance, then Turbo's without, on one path of sigmas and no new noise."""
    seen = []
    for name, model in (("raw", raw), ("turbo", turbo)):
        forward = model.model.diffusion_model._forward

        def call(x, timesteps, *args, forward=forward, name=name, **options):
            seen.append((name, round(timesteps[0].item(), 4), len(x)))
            return forward(x, timesteps, *args, **options)

        monkeypatch.setattr(model.model.diffusion_model, "_forward", call)
    texts = {"positive": conditioning(6, 1), "negative": conditioning(6, 2)}
    found = run("K2TwoStage", raw=raw, turbo=turbo, latent=latent, seed=5, raw_steps=10, **texts)[0]
    assert set(found) == {"samples"} and torch.isfinite(found["samples"]).all()
    grid = run("K2Sigmas", model=turbo, latent=latent)[0].tolist()
    mine = [entry for entry in seen if entry[0] == "turbo"]
    assert [sigma for _, sigma, _ in mine] == [round(sigma, 4) for sigma in grid[3:-1]]
    assert {size for *_, size in mine} == {1}
    first = [entry for entry in seen if entry[0] == "raw"]
    assert seen == first + mine and {size for *_, size in first} == {2}
    assert first[0][1] == 1.0 and first[-1][1] > grid[3]


def test_two_stages_are_those_of_krea2_model(run, raw, turbo, conditioning, latent, pack):
    texts = {"positive": conditioning(6, 1), "negative": conditioning(6, 2)}
    found = run("K2TwoStage", raw=raw, turbo=turbo, latent=latent, seed=5, guidance=2.0, **texts)[0]
    sampling, schedule = pack("krea2_model.sampling"), pack("krea2_model.schedule")
    plain = pack("krea2_model.transformer.model").Krea2Transformer
    calls, fused = [], []
    for model in (raw, turbo):
        transformer = model.model.diffusion_model
        call = lambda *args, t=transformer: plain.forward(t, *args)  # noqa: E731
        call.compute_dtype = transformer.compute_dtype
        calls.append(call)
        fused.append([transformer.fuse_text(text[0][0].unflatten(-1, (12, 160)))
                      for text in texts.values()])  # fmt: skip
    sigmas = schedule.two_stage_sigmas(28, schedule.shift_mu(96), 8, 1.15, 5)
    noise = torch.randn((1, 16, 1, 16, 24), generator=torch.manual_seed(5))[:, :, 0]
    first, second = sigmas
    *_, (_, begun, _) = sampling.denoise(
        calls[0], noise, *fused[0], sigmas=first, guidance=2.0, partial=True
    )
    *_, (_, expected, _) = sampling.denoise(
        calls[1], begun, fused[1][0], sigmas=second, guidance=0.0
    )
    latents = turbo.model.process_latent_in(found["samples"])[:, :, 0]
    assert_close(latents, expected, 1e-4, "two stages, here and in krea2_model")


def test_two_stages_refuse_what_they_cannot_do(run, raw, turbo, conditioning, latent):
    texts = {"positive": conditioning(6, 1), "negative": conditioning(6, 2)}
    with pytest.raises(ValueError, match="raw is a Turbo"):
        run("K2TwoStage", raw=turbo, turbo=turbo, latent=latent, **texts)
    with pytest.raises(ValueError, match="turbo is a Raw"):
        run("K2TwoStage", raw=raw, turbo=raw, latent=latent, **texts)
    masked = {**latent, "noise_mask": torch.ones(1, 1, 8, 8)}
    with pytest.raises(ValueError, match="has a mask"):
        run("K2TwoStage", raw=raw, turbo=turbo, latent=masked, **texts)
    with pytest.raises(ValueError, match="turbo_last is 8"):
        run("K2TwoStage", raw=raw, turbo=turbo, latent=latent, turbo_last=8, **texts)


def test_half_of_the_negative_s_passes_paint_as_well(run, calls_of):
    """On krea2-nano Raw, read back: guidance in the middle, everywhere and nowhere."""
    model, clip, vae = run("K2Loader", model="krea2-nano Raw (built in)")
    exam = held_out_prompts()[:8]
    positive, negative, count, _ = run(
        "K2PromptBatch", clip=clip, prompts="\n".join(prompt for prompt, _ in exam)
    )
    latent = run("K2EmptyLatent", aspect="custom", width=128, height=128, batch=count)[0]
    images = calls_of(model.model.diffusion_model.blocks[0])

    def right(model, **options):
        images.clear()
        options = {"preset": "custom", "steps": 10, "guidance": 3.5} | options
        samples = run("K2Sampler", model=model, positive=positive, negative=negative, latent=latent,
                      seeds="one an image", **options)[0]  # fmt: skip
        pictures = run("K2VAEDecode", samples=samples, vae=vae)[0].numpy()
        verdicts = [judge(p, scene) for p, (_, scene) in zip(pictures, exam, strict=True)]
        return np.mean([verdict["shape"] for verdict in verdicts]), sum(images) / count

    middle, passes = right(run("K2GuidanceSchedule", model=model, start=0.25, end=0.75)[0])
    whole, all_passes = right(model)
    none, _ = right(model, guidance=0.0)
    assert (passes, all_passes) == (10 + 5, 20)
    assert middle >= whole - 0.07 and middle > none


def test_two_stages_say_where_nano_does_not_know_a_size(pack, run, caplog):
    raw, clip, _ = run("K2Loader", model="krea2-nano Raw (built in)")
    turbo = run("K2ModelLoader", file="krea2-nano (built in)")[0]
    positive, negative = run("K2TextEncode", clip=clip, prompt="a red circle")
    node = pack("nodes.schedules").K2TwoStage
    for side, known in ((16, True), (32, False)):
        caplog.clear()
        output = node.execute(raw=raw, turbo=turbo, positive=positive, negative=negative,
                              latent={"samples": torch.zeros(1, 16, 1, side, side)},
                              turbo_last=1, raw_steps=2)  # fmt: skip
        assert (output.ui is None) == known
        assert ("far from the 128 x 128" not in caplog.text) == known
