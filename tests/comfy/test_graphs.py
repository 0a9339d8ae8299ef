"""The blocks as a CUDA graph, with a stand-in for the recording that runs them once more."""

import pytest
import torch

from parity import assert_close


class Recorder:
    """Records as CUDA does: results and inputs lie where they lay, and a replay makes them anew."""

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def __call__(self, function, inputs):
        self.recorded += 1
        out = torch.full_like(function(*inputs), float("nan"))  # what is recorded is not run

        def replay():
            self.replayed += 1
            out.copy_(function(*inputs))

        return replay, out


@pytest.fixture
def recorder(pack, monkeypatch):
    recorder = Recorder()
    graphs = pack("nodes.managed.graphs").BlockGraphs
    monkeypatch.setattr(graphs.__init__, "__defaults__", (recorder,))
    return recorder


@pytest.fixture
def graphed(pack, run):
    """A MODEL whose blocks are to be recorded: as Compile Krea 2 makes it, on a CPU."""

    def call(model):
        model = model.clone()
        own, model.load_device = model.load_device, torch.device("cuda")
        try:
            model = run("K2Compile", model=model, mode="CUDA graph")[0]
        finally:
            model.load_device = own
        return model

    return call


def sample(run, model, conditioning, latent, **options):
    settings = {"preset": "custom", "steps": 5, "guidance": 2.0, "seed": 1} | options
    return run("K2Sampler", model=model, positive=conditioning(6, 1), negative=conditioning(4, 2),
               latent=latent, **settings)[0]["samples"]  # fmt: skip


def test_a_run_is_recorded_at_its_second_step(run, raw, graphed, recorder, conditioning, latent):
    expected = sample(run, raw, conditioning, latent)
    model = graphed(raw)
    # Without one, positive and negative of a small image share a call.
    assert_close(sample(run, model, conditioning, latent), expected, 1e-5, "a graph")
    # Positive and negative have other lengths, and so a graph each.
    assert (recorder.recorded, recorder.replayed) == (2, 2 * 4)
    assert torch.equal(sample(run, model, conditioning, latent, guidance=0.0, seed=2),
                       sample(run, raw, conditioning, latent, guidance=0.0, seed=2))  # fmt: skip
    assert (recorder.recorded, recorder.replayed) == (3, 3 * 4), "anew in the next run"
    assert torch.equal(sample(run, raw, conditioning, latent), expected)
    assert recorder.recorded == 3, "the model itself is as it was"


def test_a_lora_counts(run, raw, graphed, recorder, conditioning, latent):
    model = graphed(raw)
    patched = raw.clone()
    weight = raw.model.diffusion_model.blocks[0].mlp.down.weight
    key = "diffusion_model.blocks.0.mlp.down.weight"
    patched.add_patches({key: ("diff", (torch.full(weight.shape, 0.02),))}, 1.0)
    before = sample(run, model, conditioning, latent)
    found = sample(run, graphed(patched), conditioning, latent)
    assert_close(found, sample(run, patched, conditioning, latent), 1e-5, "a graph with a LoRA")
    assert not torch.allclose(found, before, atol=1e-3) and recorder.replayed == 2 * 2 * 4


@pytest.mark.parametrize("what", ["patch", "replacement", "streaming", "negative"])
def test_what_may_change_from_step_to_step_is_not_recorded(
    run, raw, graphed, recorder, conditioning, latent, monkeypatch, what
):
    model = raw
    if what == "patch":
        model = raw.clone()
        model.set_model_patch(lambda out, options: out * 1.01, "attn1_output_patch")
    elif what == "replacement":
        model = raw.clone()
        model.set_model_patch_replace(
            lambda args, extra: extra["original_block"](args), "dit", "single_block", 1
        )
    elif what == "streaming":
        monkeypatch.setattr(type(raw), "loaded_size", lambda self: self.model_size() // 2)
    else:
        model = run("K2NegativeGuidance", model=raw, negative=conditioning(3, 5))[0]
    found = sample(run, graphed(model), conditioning, latent, guidance=0.0)
    assert_close(found, sample(run, model, conditioning, latent, guidance=0.0), 1e-6, what)
    assert recorder.recorded == 0


def test_a_graph_that_cannot_be_made_is_said_once(
    run, pack, raw, graphed, conditioning, latent, monkeypatch, caplog
):
    def fails(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    module = pack("nodes.managed.graphs")
    monkeypatch.setattr(module.BlockGraphs.__init__, "__defaults__", (fails,))
    found = sample(run, graphed(raw), conditioning, latent)
    assert_close(found, sample(run, raw, conditioning, latent), 1e-5, "without a graph")
    assert caplog.text.count("could not be recorded") == 1
    assert "not permitted when stream is capturing) and run without" in caplog.text


def test_memory_of_a_graph_is_counted(raw, graphed):
    model = graphed(raw)
    plain = raw.model.memory_required([1, 16, 64, 64])
    raw.model.current_patcher = model
    try:
        more = raw.model.memory_required([1, 16, 64, 64]) - plain
    finally:
        raw.model.current_patcher = None
    assert more == pytest.approx(plain - 0.45 * 1024**3)


def test_a_graph_without_cuda_is_refused(run, raw):
    with pytest.raises(ValueError, match=r"needs a GPU"):
        run("K2Compile", model=raw, mode="CUDA graph")
    with pytest.raises(ValueError, match="mode is 'fast'"):
        run("K2Compile", model=raw, mode="fast")
