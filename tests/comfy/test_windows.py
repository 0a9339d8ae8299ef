"""start and end mean one thing: parts of the schedule's time, in the graph and in Python alike."""

import pytest
import torch

STEPS = 20

# denoise, start, end, and the steps in between: a run at denoise d begins at 1 - d.
WINDOWS = [
    (1.0, 0.0, 0.5, range(0, 10)), (0.6, 0.0, 0.5, range(0, 4)), (0.6, 0.5, 1.0, range(4, 20)),
    (0.6, 0.0, 0.3, range(0)), (1.0, 0.25, 0.75, range(5, 15)), (0.3, 0.7, 0.85, range(0, 10)),
]  # fmt: skip


@pytest.fixture
def calls(raw, calls_of):
    """Length of the sequence times images of each call of the first block."""
    block = raw.model.diffusion_model.blocks[0]
    return calls_of(block, lambda hidden: hidden.shape[0] * hidden.shape[1])


def steps_of(sizes):
    """Numbers of the steps whose call is larger than the smallest."""
    assert len(sizes) == STEPS
    smallest = min(sizes)
    return [step for step, size in enumerate(sizes) if size > smallest]


def in_graph(run, pack, raw, texts, kind, start, end, denoise):
    positive, negative = texts
    model, guidance = raw, 0.0
    if kind == "reference":
        references = pack("krea2_model.transformer.references")
        settings = references.ReferenceSettings(start=start, end=end)
        extra = {
            "reference_latents": [torch.zeros(1, 16, 1, 8, 8)],
            "reference_latents_method": "index", "krea2_references": [settings],
        }  # fmt: skip
        positive = [[positive[0][0], extra]]
    elif kind == "negative":
        model = run("K2NegativeGuidance", model=raw, negative=negative, start=start, end=end)[0]
    else:
        model, guidance = run("K2GuidanceSchedule", model=raw, start=start, end=end)[0], 2.0
    latent = {"samples": torch.rand(1, 16, 1, 16, 16)}
    run("K2Sampler", model=model, positive=positive, negative=negative, latent=latent,
        denoise=denoise, preset="custom", steps=STEPS, guidance=guidance)  # fmt: skip


def in_python(pack, raw, texts, kind, start, end, denoise):
    transformer, sampling = raw.model.diffusion_model, pack("krea2_model.sampling")
    schedule = pack("krea2_model.schedule")
    plain = pack("krea2_model.transformer.model").Krea2Transformer

    def network(*args, **options):
        return plain.forward(transformer, *args, **options)

    network.compute_dtype = transformer.compute_dtype
    options: dict = {"guidance": 0.0}
    if kind == "reference":
        references = pack("krea2_model.transformer.references")
        settings = references.ReferenceSettings(start=start, end=end)
        options["references"] = [references.Reference(torch.zeros(1, 16, 8, 8), settings)]
        options["reference_method"] = "index"
    elif kind == "negative":
        settings = pack("krea2_model.transformer.text_attention").NegativeGuidance
        options["negative_guidance"] = settings(start=start, end=end)
    else:
        changing = pack("krea2_model.guidance").GuidanceSchedule(start, end)
        options |= {"guidance": 2.0, "guidance_schedule": changing}
    fused = [transformer.fuse_text(text[0][0].unflatten(-1, (12, 160))) for text in texts]
    sigmas = schedule.sigma_schedule(STEPS, schedule.shift_mu(64), denoise)
    for _ in sampling.denoise(network, torch.rand(1, 16, 16, 16), *fused, sigmas=sigmas, **options):
        pass


@pytest.mark.parametrize("kind", ["reference", "negative", "guidance"])
@pytest.mark.parametrize("denoise, start, end, expected", WINDOWS)
@pytest.mark.parametrize("where", ["graph", "Python"])
def test_one_window(
    run, pack, raw, conditioning, calls, kind, denoise, start, end, expected, where
):
    texts = conditioning(6, 1), conditioning(6, 2)
    if where == "graph":
        in_graph(run, pack, raw, texts, kind, start, end, denoise)
    else:
        in_python(pack, raw, texts, kind, start, end, denoise)
    sizes = calls
    if where == "Python" and kind == "guidance":  # a call for each of two texts
        count, position = [], 0
        assert len(sizes) == STEPS + len(expected)
        for step in range(STEPS):
            texts_of_step = 2 if step in expected else 1
            count.append(sum(sizes[position : position + texts_of_step]))
            position += texts_of_step
        sizes = count
    assert steps_of(sizes) == list(expected)


def test_python_s_schedule_is_comfyui_s(pack, raw):
    schedule, shifted = pack("krea2_model.schedule"), pack("nodes.sampler_run").shifted
    for mu in (0.58, 1.15, 2.2):
        core = shifted(raw, mu).get_model_object("model_sampling").percent_to_sigma
        ours = schedule.schedule_of(schedule.sigma_schedule(12, mu, 0.4))
        for part in (0.0, 0.1, 0.37, 0.5, 0.99, 1.0):
            assert ours(part) == pytest.approx(core(part), abs=1e-6)


def test_workflows_with_sigmas_keep_their_steps(run, pack, raw, conditioning, calls):
    """The first ones of Krea 2 Guidance Schedule: they fall, and the node says how it read them."""
    node = pack("nodes.schedules").K2GuidanceSchedule
    output = node.execute(model=raw, start=1.0, end=0.5)
    assert "read as sigmas: 1 to 0.5" in output.ui.as_dict()["text"][0]
    assert node.execute(model=raw, start=0.0, end=0.5).ui is None
    assert node.validate_inputs(start=1.0, end=0.5) is True
    run("K2Sampler", model=output.result[0], positive=conditioning(6, 1), seed=1, preset="custom",
        negative=conditioning(6, 2), latent={"samples": torch.zeros(1, 16, 1, 16, 16)},
        steps=STEPS, guidance=2.0)  # fmt: skip
    schedule = pack("krea2_model.schedule")
    sigmas = schedule.sigma_schedule(STEPS, schedule.shift_mu(64))
    assert steps_of(calls) == [step for step in range(STEPS) if sigmas[step] >= 0.5]
