"""Reference images: our node, core's nodes, and both on our model and on core's."""

import gc
import inspect

import comfy.ldm.krea2.model
import comfy.model_management
import pytest
import torch

from parity import assert_close, relative_error

CORE_TAKES_REFERENCES = (
    "ref_latents" in inspect.signature(comfy.ldm.krea2.model.SingleStreamDiT.forward).parameters
)
FAMILIES = {
    "index_timestep_zero": "edit and style LoRAs (time 0)",
    "index": "identity LoRAs (shared time)",
}
ONE_STEP = {"preset": "custom", "steps": 1, "guidance": 0.0, "seed": 5}


@pytest.fixture
def vae(models, run):
    return run("K2VAELoader", file="qwen_image_vae_tiny.safetensors")[0]


@pytest.fixture(scope="module")
def image():
    """Two pictures in one batch, 80 x 48 px."""
    return torch.rand(2, 48, 80, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sampled(run, turbo, latent):
    """A run of our sampler with a positive conditioning, on Turbo."""

    def sample(positive, model=turbo, at=latent, **options):
        options = {**ONE_STEP, **options}
        return run("K2Sampler", model=model, positive=positive, latent=at, **options)[0]["samples"]

    return sample


@pytest.fixture
def referenced(run, conditioning, vae, image):
    def add(positive=None, **options):
        options = {"positive": positive or conditioning(9, 1), "vae": vae, "image": image} | options
        return run("K2Reference", **options)[0]

    return add


def core_s(run, positive, latents, method):
    """The same references by core's own nodes."""
    for latent in latents:
        positive = run("ReferenceLatent", conditioning=positive, latent={"samples": latent})[0]
    if method is not None:
        node = "FluxKontextMultiReferenceLatentMethod"
        positive = run(node, conditioning=positive, reference_latents_method=method)[0]
    return positive


@pytest.mark.parametrize("method", FAMILIES)
def test_equals_core_s_nodes(run, referenced, conditioning, sampled, vae, image, method):
    """And each image of a batch is a reference."""
    ours = referenced(family=FAMILIES[method])
    latents = [vae.encode(picture[None]) for picture in image]
    core = core_s(run, conditioning(9, 1), latents, method)
    assert torch.equal(sampled(ours), sampled(core))
    assert relative_error(sampled(ours), sampled(conditioning(9, 1))) > 1e-3


@pytest.mark.skipif(
    not CORE_TAKES_REFERENCES,
    reason="nothing to compare with: core's Krea 2 takes no reference latents in this ComfyUI",
)
@pytest.mark.parametrize("method", FAMILIES)
def test_whole_runs_equal_core(
    run, turbo, core_turbo, referenced, conditioning, latent, image, method
):
    """Eight steps of the stock sampler with guidance, on our model and on core's."""
    positive, negative = (
        referenced(conditioning(9, seed), family=FAMILIES[method]) for seed in (1, 2)
    )
    settings = {"seed": 5, "steps": 8, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}
    settings |= {"positive": positive, "negative": negative, "latent_image": latent, "denoise": 1.0}
    ours, core = (
        run("KSampler", model=model, **settings)[0]["samples"] for model in (turbo, core_turbo)
    )
    assert_close(ours, core, 1e-4, f"references by {method}, whole runs")


def test_latents_without_a_method_are_time_zero_and_say_so(
    run, conditioning, sampled, vae, image, caplog
):
    latents = [vae.encode(picture[None]) for picture in image]
    bare = sampled(core_s(run, conditioning(9, 1), latents, None))
    assert "index_timestep_zero" in caplog.text
    assert torch.equal(bare, sampled(core_s(run, conditioning(9, 1), latents, [*FAMILIES][0])))


def test_strength(run, referenced, conditioning, sampled):
    none = sampled(conditioning(9, 1))
    assert torch.equal(sampled(referenced(strength=0.0)), none)
    errors = [relative_error(sampled(referenced(strength=s)), none) for s in (0.2, 1.0, 5.0)]
    assert errors == sorted(errors) and errors[0] > 1e-4
    # Twice the same picture at one place is one picture twice as strong.
    single = referenced(strength=2.0, index=1)
    double = referenced(referenced(index=1), index=1)
    assert_close(sampled(single), sampled(double), 1e-5, "strength 2 against two references")


def test_settings_belong_to_their_reference(run, referenced, conditioning, sampled, vae, image):
    """Behind a reference of core's, ours has its own strength, and core's has none."""
    core = core_s(run, conditioning(9, 1), [vae.encode(image[:1])], "index_timestep_zero")
    mixed = referenced(core, image=image[1:], strength=0.0)
    assert torch.equal(sampled(mixed), sampled(core))
    behind = core_s(run, referenced(image=image[:1], strength=0.0), [vae.encode(image[1:])], None)
    placed = referenced(image=image[1:], index=2)
    assert torch.equal(sampled(behind), sampled(placed))


def test_start_and_end(referenced, conditioning, sampled, pack):
    """A window of the steps: half of the run with, half without."""
    steps = {"steps": 4}
    whole, none = sampled(referenced(), **steps), sampled(conditioning(9, 1), **steps)
    assert torch.equal(sampled(referenced(start=0.0, end=0.0), **steps), none)
    assert torch.equal(sampled(referenced(start=0.0, end=1.0), **steps), whole)
    early, late = (sampled(referenced(**w), **steps) for w in ({"end": 0.5}, {"start": 0.5}))
    for part in (early, late):
        assert 1e-4 < relative_error(part, none) < relative_error(whole, none)


def test_guidance_gives_it_to_the_negative(run, turbo, conditioning, vae, image, latent):
    """Both texts get it, and may or may not share a call."""
    positive, negative = conditioning(9, 1), conditioning(6, 2)
    given = run("K2Reference", positive=positive, negative=negative, vae=vae, image=image)
    options = {**ONE_STEP, "guidance": 3.0, "model": turbo, "latent": latent}
    found = run("K2Sampler", positive=given[0], negative=given[1], **options)[0]["samples"]
    options["guidance"] = 0.0
    with_text, without = (
        run("K2Sampler", positive=text, **options)[0]["samples"] for text in given[:2]
    )
    assert_close(found, with_text + 3.0 * (with_text - without), 1e-4, "guided with references")


def test_strength_where_texts_share_a_call(run, turbo, conditioning, vae, image, monkeypatch):
    """Texts of different length are padded in front, which moves what the strength is added to."""
    latent = {"samples": torch.zeros(1, 16, 1, 8, 8)}
    texts = conditioning(9, 1), conditioning(5, 2)
    options = {"vae": vae, "image": image, "strength": 3.0}
    given = run("K2Reference", positive=texts[0], negative=texts[1], **options)
    options = {**ONE_STEP, "guidance": 2.0, "model": turbo, "latent": latent}
    shared = run("K2Sampler", positive=given[0], negative=given[1], **options)[0]["samples"]
    monkeypatch.setattr(type(turbo.model), "_may_share_calls", lambda self, noise: False)
    alone = run("K2Sampler", positive=given[0], negative=given[1], **options)[0]["samples"]
    assert_close(shared, alone, 1e-5, "strength in a shared call")


def test_batches(sampled, referenced, turbo):
    """Every image of a batch sees the references."""
    batch = {"samples": torch.zeros(2, 16, 1, 8, 8)}
    both = sampled(referenced(), at=batch, seeds="one an image")
    for index, seed in enumerate((5, 6)):
        alone = sampled(referenced(), at={"samples": batch["samples"][:1]}, seed=seed)
        assert_close(both[index : index + 1], alone, 1e-5, f"image {index} of a batch")


def test_offloaded(sampled, referenced, turbo, dynamic_patcher, monkeypatch):
    expected = sampled(referenced(strength=2.0))
    comfy.model_management.unload_all_models()
    size = turbo.model_size() // 2
    monkeypatch.setattr(turbo, "model_size", lambda: 2 * turbo.loaded_size() + size)
    monkeypatch.setattr(type(turbo.model), "_streams", lambda self: True)
    assert_close(sampled(referenced(strength=2.0)), expected, 1e-5, "streamed weights")
    apart = sampled(referenced(apart=True), steps=2)
    monkeypatch.undo()
    assert_close(sampled(referenced(apart=True), steps=2), apart, 1e-5, "streamed, apart")


def test_apart(pack, run, turbo, sampled, referenced, conditioning, latent):
    """A run equals krea2_model's own, whose oracle is a mask; what was kept is freed after it."""
    positive = referenced(apart=True, strength=0.5)
    found = sampled(positive, steps=3)
    model = turbo.model
    pictures = [model.process_latent_in(t)[:, :, 0] for t in positive[0][1]["reference_latents"]]
    references = pack("krea2_model.transformer.references")
    settings = references.ReferenceSettings(strength=0.5)
    transformer = model.diffusion_model
    noise = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(5))
    sampling, schedule = pack("krea2_model.sampling"), pack("krea2_model.schedule")
    turbo_mu = pack("krea2_model").TURBO.mu
    fused = transformer.fuse_text(positive[0][0].unflatten(-1, (12, 160)))

    class Native:
        compute_dtype = torch.float32
        cache_references = staticmethod(transformer.cache_references)

        def __call__(self, *args, **kwargs):
            return pack("krea2_model").Krea2Transformer.forward(transformer, *args, **kwargs)

    *_, (_, expected, _) = sampling.denoise(
        Native(),
        noise[:, :, 0],
        fused,
        sigmas=schedule.sigma_schedule(3, turbo_mu),
        guidance=0.0,
        references=[references.Reference(p, settings) for p in pictures],
        cache_references=True,
    )
    assert_close(
        model.process_latent_in(found)[:, :, 0], expected, 1e-4, "apart against krea2_model"
    )
    gc.collect()
    assert not pack("nodes.managed.references")._CACHES


def test_apart_at_strength_0(sampled, referenced, conditioning):
    assert torch.equal(sampled(referenced(apart=True, strength=0.0)), sampled(conditioning(9, 1)))


def test_apart_with_a_reference_for_each_image(run, sampled, referenced, image):
    """A batched reference latent has one picture for each image of the batch."""
    batch = {"samples": torch.zeros(2, 16, 1, 8, 8)}
    alone = [referenced(image=picture[None], apart=True) for picture in image]
    states, extra = alone[0][0]
    latents = torch.cat([each[0][1]["reference_latents"][0] for each in alone])
    both = [[states, extra | {"reference_latents": [latents]}]]
    found = sampled(both, at=batch, seeds="one an image")
    for index, positive in enumerate(alone):
        one = {"samples": batch["samples"][:1]}
        expected = sampled(positive, at=one, seed=5 + index)
        assert_close(found[index : index + 1], expected, 1e-5, f"reference of image {index}")


def test_references_beyond_memory_say_what_helps(sampled, referenced, turbo, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(turbo.model.diffusion_model.first, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError, match="smaller images or references"):
        sampled(referenced())


def test_what_is_kept_counts_as_memory(turbo, referenced):
    model = turbo.model
    plain, apart = (
        model.memory_required(
            [1, 16, 16, 24],
            {"ref_latents": [[1, 16, 60]], **({"reference_plan": [[60]]} if kept else {})},
        )
        for kept in (False, True)
    )
    config = model.diffusion_model.config
    values = 2 * config.num_layers * config.num_key_value_heads * config.attention_head_dim
    assert apart - plain == pytest.approx(60 * values * 4 * 1.15)


@pytest.mark.parametrize(
    "fit, size",
    [("keep its shape", (48, 80)), ("crop to the latent", (128, 192)),
     ("stretch to the latent", (128, 192))],
)  # fmt: skip
def test_fit(referenced, latent, fit, size):
    made = referenced(fit=fit, latent=latent)[0][1]["reference_latents"]
    assert [t.shape[-2:] for t in made] == [(size[0] // 8, size[1] // 8)] * 2


def test_large_images_get_smaller_and_small_ones_stay(referenced):
    def side(image, **options):
        made = referenced(image=image, **options)[0][1]["reference_latents"][0]
        return tuple(8 * n for n in made.shape[-2:])

    assert side(torch.rand(1, 600, 900, 3), megapixels=0.1) == (256, 384)
    assert side(torch.rand(1, 1, 1, 3)) == (16, 16)
    assert side(torch.rand(1, 100, 40, 3)) == (96, 32)


def test_transparent_is_white(referenced):
    clear = torch.zeros(1, 32, 32, 4)
    made, white = (
        referenced(image=image)[0][1]["reference_latents"][0]
        for image in (clear, torch.ones(1, 32, 32, 3))
    )
    assert torch.equal(made, white)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image": torch.zeros(0, 8, 8, 3)}, "1 or more"),
        ({"fit": "crop to the latent"}, "latent is not connected"),
        ({"fit": "wide"}, "expected one of"),
        ({"family": "none"}, "expected one of"),
        ({"strength": -1.0}, "strength is -1"),
        ({"start": 0.7, "end": 0.2}, "start <= end"),
        ({"megapixels": 0.0}, "megapixels is 0"),
        ({"family": FAMILIES["index"], "apart": True}, "apart caches"),
        ({"vae": None}, "vae is empty"),
    ],
)
def test_bad_input(referenced, options, message):
    with pytest.raises(ValueError, match=message):
        referenced(**options)


def test_references_of_one_conditioning_agree(referenced):
    with pytest.raises(ValueError, match="differ in family"):
        referenced(referenced(), family=FAMILIES["index"])
    with pytest.raises(ValueError, match="differ in apart"):
        referenced(referenced(), apart=True)


def test_the_method_changed_behind_apart(run, sampled, referenced):
    node = "FluxKontextMultiReferenceLatentMethod"
    changed = run(node, conditioning=referenced(apart=True), reference_latents_method="index")[0]
    with pytest.raises(ValueError, match="apart"):
        sampled(changed)


@pytest.fixture(scope="module")
def nano(run, pack):
    """MODEL, CLIP and VAE of krea2-nano, and the pipeline."""
    parts = run("K2Loader", model="krea2-nano (built in)")
    return *parts, pack("krea2_model").Krea2Pipeline.nano()


@pytest.mark.parametrize("size", [(300, 200), (201, 333), (90, 40)])
@pytest.mark.parametrize("channels", [3, 4])
def test_one_photo_is_the_same_reference_everywhere(
    run, pack, nano, conditioning, monkeypatch, size, channels
):
    """In Python, by Krea 2 Reference and by Krea 2 Style Mix: the same pixels, the same latents."""
    model, clip, vae, pipeline = nano
    photo = torch.rand(1, size[1] // 10 + 1, size[0] // 10 + 1, channels)
    photo = photo.repeat_interleave(10, 1).repeat_interleave(10, 2)[:, : size[1], : size[0]]
    by_node = run(
        "K2Reference", positive=conditioning(4, 1), vae=vae, image=photo, megapixels=0.03
    )[0][0][1]["reference_latents"][0]
    mix = {"clip": clip, "vae": vae, "image_1": photo, "preset": "custom", "through": "references"}
    by_mix = run("K2StyleMix", prompt="a star", megapixels=0.03, **mix)[0][0][1]
    assert torch.equal(by_node, by_mix["reference_latents"][0])
    # With the pipeline's own way from a picture to a reference.
    made, krea2_model = [], pack("krea2_model")
    encode = pipeline.encode
    monkeypatch.setattr(pipeline, "encode", lambda pixels: made.append(encode(pixels)) or made[-1])
    references = krea2_model.References([photo[0].movedim(-1, 0)], max_megapixels=0.03)
    pipeline("a star", steps=1, references=references, output_type="latent")
    latents = made[0][:, :, None]
    raw = model.model.process_latent_out(latents)
    assert_close(by_node, raw, 1e-4, "a reference in the graph and in Python")
