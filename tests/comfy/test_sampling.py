"""Our MODEL and samplers beside core's, in float32 on small random checkpoints."""

import inspect

import comfy.ldm.krea2.model
import comfy.model_management
import comfy.samplers
import pytest
import torch

from parity import assert_close, relative_error

KSAMPLER = {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
CORE_TAKES_REFERENCES = (
    "ref_latents" in inspect.signature(comfy.ldm.krea2.model.SingleStreamDiT.forward).parameters
)


def stock_sample(run, model, latent, positive, negative, cfg, steps=8, seed=5, **options):
    return run(
        "KSampler",
        model=model,
        seed=seed,
        steps=steps,
        cfg=cfg,
        positive=positive,
        negative=negative,
        latent_image=latent,
        **{**KSAMPLER, **options},
    )[0]["samples"]


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_our_model_with_stock_ksampler_equals_core(
    run, turbo, core_turbo, conditioning, latent, cfg
):
    texts = conditioning(9, 1), conditioning(5, 2)
    ours = stock_sample(run, turbo, latent, *texts, cfg)
    core = stock_sample(run, core_turbo, latent, *texts, cfg)
    assert ours.shape == (1, 16, 1, 16, 24)
    assert_close(ours, core, 1e-4, f"KSampler at cfg {cfg}, our model against core's")


def test_our_model_equals_core_in_one_step(turbo, core_turbo, conditioning):
    """The models themselves, closer than a whole run can be compared."""
    x, sigma = torch.randn(2, 16, 1, 8, 12), torch.tensor([0.7, 0.2])
    context = conditioning(7, 3, batch=2)[0][0]
    outputs = []
    for patcher in (turbo, core_turbo):
        model = patcher.model.diffusion_model
        outputs.append(model(x, sigma, context))
    assert_close(*outputs, 1e-5, "transformer against core's Krea 2")


@pytest.mark.skipif(
    not CORE_TAKES_REFERENCES,
    reason="nothing to compare with: core's Krea 2 takes no reference latents in this ComfyUI",
)
@pytest.mark.parametrize("method", ["index_timestep_zero", "index"])
def test_reference_latents_equal_core(turbo, core_turbo, conditioning, method):
    comfy.model_management.load_models_gpu([turbo, core_turbo], force_full_load=True)
    parts = torch.randn(1, 16, 1, 8, 12), torch.tensor([0.6]), conditioning(7, 3)[0][0]
    x, sigma, context = (part.to(turbo.load_device) for part in parts)
    references = [torch.randn(1, 16, 1, 4, 6).to(x), torch.randn(1, 16, 1, 8, 4).to(x)]
    ours, core = (
        patcher.model.diffusion_model(
            x, sigma, context, ref_latents=references, ref_latents_method=method
        )
        for patcher in (turbo, core_turbo)
    )
    assert_close(ours, core, 1e-5, f"reference latents by {method} against core's")


@pytest.mark.parametrize("method", ["index_timestep_zero", "index", None])
def test_reference_latents_of_the_conditioning(run, pack, turbo, conditioning, latent, method):
    """Whatever core's own Krea 2 makes of them. Without a method core would leave them out."""
    samples = latent["samples"]
    references = [
        torch.randn(1, 16, 1, side, 8, generator=torch.Generator().manual_seed(side))
        for side in (6, 10)
    ]
    options = {"reference_latents": references}
    if method is not None:
        options["reference_latents_method"] = method
    text = conditioning(9, 1, **options)
    one_step = {"preset": "custom", "steps": 1, "guidance": 0.0, "seed": 5}
    found = run("K2Sampler", model=turbo, positive=text, latent=latent, **one_step)[0]["samples"]

    model, device = turbo.model, turbo.load_device
    transformer = model.diffusion_model
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(5))
    velocity = pack("krea2_model").Krea2Transformer.forward(
        transformer,
        noise[:, :, 0].to(device),
        torch.ones(1, device=device),
        transformer.fuse_text(text[0][0].to(device).unflatten(-1, (12, 160))),
        references=[model.process_latent_in(r)[:, :, 0].to(device) for r in references],
        reference_method=method or "index_timestep_zero",
    )
    expected = model.process_latent_out(noise - velocity.cpu().unsqueeze(2))
    assert_close(found, expected, 1e-5, f"a step with reference latents by {method}")


def test_our_sampler_on_turbo_equals_stock_simple(run, turbo, conditioning, latent):
    text = conditioning(9, 1)
    ours = run("K2Sampler", model=turbo, positive=text, latent=latent, seed=5)[0]["samples"]
    stock = stock_sample(run, turbo, latent, text, text, 1.0)
    assert_close(ours, stock, 1e-4, "K2Sampler on Turbo against KSampler euler/simple")


@pytest.mark.parametrize("sampler", ["dpm_2", "heun", "dpmpp_2m", "uni_pc"])
def test_other_samplers_equal_stock(run, turbo, conditioning, latent, sampler):
    text = conditioning(9, 1)
    ours = run("K2Sampler", model=turbo, positive=text, latent=latent, seed=5, sampler=sampler)[0][
        "samples"
    ]
    # KSampler takes one sigma less for some of these; ours is evenly spaced where its table is not.
    stock = stock_sample(run, turbo, latent, text, text, 1.0, sampler_name=sampler)
    assert relative_error(ours, stock) < 2e-2


def official(pack, model, latent, texts, guidance, steps, seed=5):
    """The same run without ComfyUI: krea2_model's schedule, guidance and Euler loop."""
    sampling, schedule = pack("krea2_model.sampling"), pack("krea2_model.schedule")
    transformer = model.model.diffusion_model
    native = type(transformer).__mro__[1]

    class Native:
        compute_dtype = torch.float32

        def __call__(self, latents, timestep, text, mask=None):
            return native.forward(transformer, latents, timestep, text, mask)

    device = model.load_device
    taps = [t[0][0].to(device).unflatten(-1, (12, 160)) for t in texts]
    fused = [transformer.fuse_text(text) for text in taps]
    samples = latent["samples"]
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(seed))
    tokens = samples.shape[-2] * samples.shape[-1] // 4
    sigmas = schedule.sigma_schedule(steps, schedule.shift_mu(tokens))
    noise = noise[:, :, 0].to(device)
    run = sampling.denoise(Native(), noise, *fused, sigmas=sigmas, guidance=guidance)
    *_, (_, latents, _) = run
    return model.model.process_latent_out(latents.cpu().unsqueeze(2))


def test_our_sampler_on_raw_follows_the_official_schedule_where_core_does_not(
    run, pack, raw, conditioning, latent
):
    texts = conditioning(9, 1), conditioning(5, 2)
    ours = run("K2Sampler", model=raw, positive=texts[0], negative=texts[1], latent=latent, seed=5)[
        0
    ]["samples"]
    expected = official(pack, raw, latent, texts, guidance=4.5, steps=28)
    assert_close(ours, expected, 1e-4, "K2Sampler on Raw against the official schedule")
    core = stock_sample(run, raw, latent, *texts, cfg=5.5, steps=28)
    assert relative_error(core, expected) > 1e-2


def test_shift_for_stock_samplers_gives_the_official_schedule(run, pack, raw, conditioning, latent):
    texts = conditioning(9, 1), conditioning(5, 2)
    width, height = latent["samples"].shape[-1] * 8, latent["samples"].shape[-2] * 8
    model = run("K2ModelSampling", model=raw, width=width, height=height)[0]
    # 20 divides the 10000 entries that scheduler simple picks from.
    stock = stock_sample(run, model, latent, *texts, cfg=3.0, steps=20)
    expected = official(pack, raw, latent, texts, guidance=2.0, steps=20)
    assert_close(stock, expected, 1e-4, "K2ModelSampling + KSampler against the official schedule")


def test_sampler_custom_advanced_takes_our_sigmas(run, raw, conditioning, latent):
    texts = conditioning(9, 1), conditioning(5, 2)
    sigmas = run("K2Sigmas", model=raw, latent=latent, preset="custom", steps=6)[0]
    noise = run("RandomNoise", noise_seed=5)[0]
    guider = run("CFGGuider", model=raw, positive=texts[0], negative=texts[1], cfg=3.0)[0]
    sampler = run("KSamplerSelect", sampler_name="euler")[0]
    stock = run(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guider,
        sampler=sampler,
        sigmas=sigmas,
        latent_image=latent,
    )[0]["samples"]
    ours = run(
        "K2Sampler",
        model=raw,
        positive=texts[0],
        negative=texts[1],
        latent=latent,
        seed=5,
        preset="custom",
        steps=6,
        guidance=2.0,
    )[0]["samples"]
    assert_close(ours, stock, 1e-5, "K2Sampler against SamplerCustomAdvanced with K2Sigmas")


def test_denoise_starts_at_the_exact_sigma(run, turbo, conditioning, latent, monkeypatch):
    seen = []
    original = comfy.samplers.CFGGuider.sample

    def spy(self, noise, latent_image, sampler, sigmas, *args, **kwargs):
        seen.append(sigmas)
        return original(self, noise, latent_image, sampler, sigmas, *args, **kwargs)

    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", spy)
    image = {"samples": torch.randn(1, 16, 1, 16, 24)}
    options = {"positive": conditioning(4, 1), "latent": image, "seed": 1}
    partly = run("K2Sampler", model=turbo, denoise=0.3, **options)[0]["samples"]
    fully = run("K2Sampler", model=turbo, denoise=1.0, **options)[0]["samples"]
    shift = torch.tensor(1.15).exp()
    assert len(seen[0]) == 9
    assert seen[0][0] == pytest.approx((shift / (shift + 1 / 0.3 - 1)).item(), abs=1e-6)
    assert relative_error(partly, image["samples"]) < relative_error(fully, image["samples"])


def test_presets(run, pack, raw, turbo, latent):
    steps = {
        (model, preset): len(run("K2Sigmas", model=patcher, latent=latent, preset=preset)[0]) - 1
        for model, patcher in (("raw", raw), ("turbo", turbo))
        for preset in ("auto", "raw", "turbo")
    }
    assert steps[("raw", "auto")] == steps[("turbo", "raw")] == 28
    assert steps[("turbo", "auto")] == steps[("raw", "turbo")] == 8


def test_auto_without_a_known_variant_says_what_to_choose(run, core_turbo, latent):
    with pytest.raises(ValueError, match="does not say .* Choose raw or turbo"):
        run("K2Sigmas", model=core_turbo, latent=latent)
    assert len(run("K2Sigmas", model=core_turbo, latent=latent, preset="turbo")[0]) == 9


def test_guidance_without_negative_says_what_to_connect(run, raw, conditioning, latent):
    with pytest.raises(ValueError, match="Connect the negative output of Krea 2"):
        run("K2Sampler", model=raw, positive=conditioning(4, 1), latent=latent)


def test_odd_latents_are_sampled_at_their_size(run, turbo, conditioning):
    odd = {"samples": torch.zeros(2, 16, 1, 7, 9)}
    samples = run("K2Sampler", model=turbo, positive=conditioning(4, 1), latent=odd)[0]["samples"]
    assert samples.shape == (2, 16, 1, 7, 9) and torch.isfinite(samples).all()


def test_stock_empty_latent_works(run, turbo, conditioning):
    empty = run("EmptyLatentImage", width=64, height=64)[0]
    samples = run("K2Sampler", model=turbo, positive=conditioning(4, 1), latent=empty)[0]["samples"]
    assert samples.shape == (1, 16, 1, 8, 8)


def test_latents_of_another_model_are_refused(run, turbo, conditioning):
    foreign = {"samples": torch.randn(1, 4, 8, 8)}
    with pytest.raises(ValueError, match=r"shape \(1, 4, 8, 8\).*Use Krea 2 Size"):
        run("K2Sampler", model=turbo, positive=conditioning(4, 1), latent=foreign)


def test_conditioning_of_another_encoder_is_refused(run, turbo, latent):
    foreign = [[torch.randn(1, 7, 2560), {}]]
    with pytest.raises(ValueError, match="2560 features a token.*12 x 160"):
        run("K2Sampler", model=turbo, positive=foreign, latent=latent)


def test_model_of_another_family_is_refused(run, turbo, conditioning, latent):
    class Flux:
        pass

    class Patcher:
        model = Flux()

    with pytest.raises(ValueError, match="The model is Flux; expected Krea 2"):
        run("K2Sampler", model=Patcher(), positive=conditioning(4, 1), latent=latent)


def test_nan_stops_at_its_step(run, turbo, conditioning, latent):
    model = turbo.clone()
    calls = []

    def broken(apply_model, args):
        calls.append(1)
        return apply_model(args["input"], args["timestep"], **args["c"]) * (
            float("nan") if len(calls) == 3 else 1.0
        )

    model.set_model_unet_function_wrapper(broken)
    with pytest.raises(ValueError, match=r"NaN or infinite at step 3 of 8 \(torch.float32\)"):
        run("K2Sampler", model=model, positive=conditioning(4, 1), latent=latent)


def test_a_mask_gives_each_image_of_a_batch_its_own_text(run, turbo, conditioning):
    """Texts of 3 and 8 tokens, padded with what must not be seen, against each alone."""
    short, long = conditioning(3, 1)[0][0], conditioning(8, 2)[0][0]
    padding = torch.full((1, 5, 12 * 160), 3.0)
    batch = torch.cat((torch.cat((short, padding), dim=1), long))
    mask = torch.tensor([[1] * 3 + [0] * 5, [1] * 8])
    together = [[batch, {"attention_mask": mask}]]
    latents = {"samples": torch.zeros(2, 16, 1, 8, 8)}
    both = run("K2Sampler", model=turbo, positive=together, latent=latents, seed=5)[0]["samples"]
    for index, text in enumerate((short, long)):
        alone = run("K2Sampler", model=turbo, positive=[[text, {}]], latent=latents, seed=5)[0][
            "samples"
        ]
        assert_close(both[index], alone[index], 1e-5, f"image {index} of a masked batch")


def per_step(executor, *args, **kwargs):
    """A wrapper of somebody else's, which may look at the encoder's states at each step."""
    return executor(*args, **kwargs)


def test_text_is_fused_once_a_conditioning_and_run(
    run, raw, conditioning, latent, monkeypatch, calls_of
):
    """And at every step where somebody may change states or weights between steps: the same."""
    inputs = {"positive": conditioning(6, 1), "negative": conditioning(4, 2), "latent": latent,
              "preset": "custom", "steps": 3, "guidance": 2.0, "seed": 5}  # fmt: skip
    calls = calls_of(raw.model.diffusion_model.txtfusion)
    once = run("K2Sampler", model=raw, **inputs)[0]["samples"]
    assert len(calls) == 2
    run("K2Sampler", model=raw, **inputs)
    assert len(calls) == 4, "anew in the next run, whose LoRAs may be others"
    wrapped = raw.clone()
    wrapped.add_wrapper("diffusion_model", per_step)
    calls.clear()
    each = run("K2Sampler", model=wrapped, **inputs)[0]["samples"]
    assert len(calls) == 6
    assert_close(once, each, 1e-5, "text fused once and at each step")


def test_fused_text_follows_the_weights(run, raw, conditioning, latent):
    """A patch on the fusion changes the next run, and is gone with it."""
    inputs = {"positive": conditioning(6, 1), "latent": latent, "preset": "custom", "steps": 2,
              "guidance": 0.0}  # fmt: skip

    def sample(model):
        return run("K2Sampler", model=model, **inputs)[0]["samples"]

    before = sample(raw)
    key = "diffusion_model.txtfusion.projector.weight"
    patched = raw.clone()
    patched.add_patches({key: ("diff", (torch.full((1, 12), 0.5),))})
    wrapped = patched.clone()
    wrapped.add_wrapper("diffusion_model", per_step)
    after = sample(patched)
    assert not torch.allclose(after, before)
    assert_close(after, sample(wrapped), 1e-5, "patched fusion, once and at each step")
    assert torch.equal(sample(raw), before)


def test_hooks_of_a_conditioning_change_its_fusion(run, raw, conditioning, latent, monkeypatch):
    """Weights that a hook changes are those its text is fused with."""
    import comfy.hooks

    key = "diffusion_model.txtfusion.projector.weight"
    hooks = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    hooks.add(hook)
    hook.weights = {key: ("diff", (torch.full((1, 12), 0.5),))}
    hook.need_weight_init = False
    inputs = {"latent": latent, "preset": "custom", "steps": 2, "guidance": 0.0}
    hooked = [[cond, {**extra, "hooks": hooks}] for cond, extra in conditioning(6, 1)]
    found = run("K2Sampler", model=raw, positive=hooked, **inputs)[0]["samples"]
    patched = raw.clone()
    patched.add_patches({key: ("diff", (torch.full((1, 12), 0.5),))})
    expected = run("K2Sampler", model=patched, positive=conditioning(6, 1), **inputs)[0]["samples"]
    assert_close(found, expected, 1e-5, "a hook on the fusion")


@pytest.mark.parametrize("batch", [1, 2])
def test_texts_of_different_length_share_a_call(
    run, raw, conditioning, monkeypatch, pack, batch, calls_of
):
    """Small images: weights are read once a step, and the image is what two calls give."""
    latent = {"samples": torch.zeros(batch, 16, 1, 16, 24)}
    inputs = {"positive": conditioning(9, 1), "negative": conditioning(4, 2), "latent": latent,
              "preset": "custom", "steps": 3, "guidance": 2.0, "seed": 5}  # fmt: skip
    calls = calls_of(raw.model.diffusion_model.blocks[0])
    shared = run("K2Sampler", model=raw, **inputs)[0]["samples"]
    assert calls == [2 * batch] * 3
    calls.clear()
    monkeypatch.setattr(pack("nodes.managed.model"), "SMALL_IMAGE", 0)
    apart = run("K2Sampler", model=raw, **inputs)[0]["samples"]
    assert calls == [batch] * 6
    assert_close(shared, apart, 1e-5, "texts in one call and in two")


def test_calls_are_shared_where_weights_stream(
    run, raw, conditioning, monkeypatch, pack, latent, calls_of
):
    monkeypatch.setattr(pack("nodes.managed.model"), "SMALL_IMAGE", 0)
    inputs = {"positive": conditioning(9, 1), "negative": conditioning(4, 2), "latent": latent,
              "preset": "custom", "steps": 2, "guidance": 2.0, "seed": 5}  # fmt: skip
    apart = run("K2Sampler", model=raw, **inputs)[0]["samples"]
    calls = calls_of(raw.model.diffusion_model.blocks[0])
    monkeypatch.setattr(type(raw), "loaded_size", lambda self: self.model_size() // 2)
    shared = run("K2Sampler", model=raw, **inputs)[0]["samples"]
    assert calls == [2, 2]
    assert_close(shared, apart, 1e-5, "weights that stream")
    monkeypatch.undo()


@pytest.mark.parametrize("gigabytes, shared", [(1000, False), (0, True)])
def test_dynamic_vram_streams_what_does_not_fit(raw, monkeypatch, pack, latent, gigabytes, shared):
    """It says that nothing is loaded before weights are used."""
    import comfy.model_management

    model = pack("nodes.managed.model")
    monkeypatch.setattr(model, "SMALL_IMAGE", 0)
    monkeypatch.setattr(type(raw), "loaded_size", lambda self: 0)
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda _: gigabytes * 10**9)
    inner = raw.model
    monkeypatch.setattr(inner, "current_patcher", raw)
    assert inner._may_share_calls(latent["samples"]), "the plain patcher streams"
    monkeypatch.setattr(type(raw), "is_dynamic", lambda self: True)
    assert inner._may_share_calls(latent["samples"]) == shared


def test_calls_are_not_shared_where_patches_look_at_attention(
    run, raw, conditioning, latent, calls_of
):
    inputs = {"positive": conditioning(9, 1), "negative": conditioning(4, 2), "latent": latent,
              "preset": "custom", "steps": 2, "guidance": 2.0, "seed": 5}  # fmt: skip
    calls = calls_of(raw.model.diffusion_model.blocks[0])
    patched = raw.clone()
    patched.set_model_attn1_output_patch(lambda out, extra_options: out)
    run("K2Sampler", model=patched, **inputs)
    assert calls == [1] * 4


def shown(pack, **inputs):
    return pack("nodes.sampling").K2Sampler.execute(**inputs).ui.as_dict()["text"][0]


@pytest.mark.parametrize("preset, advice", [
    ("auto", r"\(preset auto: raw\).*or choose preset custom with guidance 0\.$"),
    ("raw", r"\(preset raw\).*or choose preset custom with guidance 0\.$"),
    ("custom", r"\(preset custom\).*or choose guidance 0\.$"),
])  # fmt: skip
def test_no_negative_names_the_widget_that_counts(run, raw, conditioning, latent, preset, advice):
    with pytest.raises(ValueError, match=advice):
        run("K2Sampler", model=raw, positive=conditioning(6, 1), latent=latent, preset=preset)


def test_a_negative_that_does_nothing_is_said(run, pack, turbo, raw, conditioning, latent):
    inputs = {"positive": conditioning(9, 1), "latent": latent}
    said = "not used: negative, at guidance 0"
    assert said in shown(pack, model=turbo, negative=conditioning(9, 2), **inputs)
    # Five tokens are an empty text, which every prompt node gives.
    assert "not used" not in shown(pack, model=turbo, negative=conditioning(5, 2), **inputs)
    assert "not used" not in shown(pack, model=turbo, **inputs)
    custom = {"preset": "custom", "steps": 1}
    with_guidance = {"negative": conditioning(9, 2), "guidance": 1.0} | custom
    assert "not used" not in shown(pack, model=raw, **with_guidance, **inputs)
    none = with_guidance | {"guidance": 0.0}
    assert said in shown(pack, model=raw, **none, **inputs)
    inside = run("K2NegativeGuidance", model=turbo, negative=conditioning(9, 2))[0]
    assert "not used" not in shown(pack, model=inside, negative=conditioning(9, 2), **inputs)
    off = run("K2NegativeGuidance", model=turbo, negative=conditioning(9, 2), strength=0.0)[0]
    assert said in shown(pack, model=off, negative=conditioning(9, 2), **inputs)


@pytest.fixture(scope="module")
def nano(run):
    """krea2-nano, and a prompt for it."""
    model, clip, _ = run("K2Loader", model="krea2-nano (built in)")
    return model, run("K2TextEncode", clip=clip, prompt="a red circle")[0]


@pytest.mark.parametrize("width, height, known", [
    (128, 128, True), (160, 96, True), (96, 160, True), (128, 112, True),
    (256, 256, False), (64, 64, False), (192, 96, False), (512, 512, False), (256, 64, False),
])  # fmt: skip
def test_nano_says_where_it_does_not_know_a_size(nano, pack, caplog, width, height, known):
    model, text = nano
    latent = {"samples": torch.zeros(1, 16, 1, height // 8, width // 8)}
    report = shown(pack, model=model, positive=text, latent=latent, preset="custom", steps=1,
                   guidance=0.0)  # fmt: skip
    assert ("trained at 128 x 128 px" not in report) == known
    assert ("far from the 128 x 128" not in caplog.text) == known
    assert max(map(len, report.splitlines())) < 40
