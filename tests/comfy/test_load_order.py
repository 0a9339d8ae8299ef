"""Weights that a run reads once: last to the device, first from it, and read once indeed."""

import sys

import comfy.hooks
import comfy.samplers
import pytest
import torch

from parity import assert_close

ONCE = ("txtfusion", "txtmlp", "tmlp", "tproj")
CPU = torch.device("cpu")


def is_once(name):
    return name.removeprefix("diffusion_model.").startswith(ONCE)


def layers(patcher):
    """Modules with weights by name, and whether ComfyUI has them on the device."""
    return {
        name: getattr(module, "comfy_patched_weights", False)
        for name, module in patcher.model.named_modules()
        if getattr(module, "weight", None) is not None
    }


def test_blocks_come_before_them(raw):
    """Whatever their size: the largest layer of all is the time projection."""
    patcher = raw.clone()
    sizes = {name: weight.nbytes for name, weight in patcher.model.state_dict().items()}
    blocks = sum(size for name, size in sizes.items() if not is_once(name))
    # ComfyUI keeps room for the largest layer that stays outside.
    patcher.load(CPU, lowvram_model_memory=blocks + 2 * max(sizes.values()))
    assert patcher.model.model_lowvram
    outside = [name for name, there in layers(patcher).items() if not there]
    assert outside and all(is_once(name) for name in outside), outside
    patcher.detach()


def test_they_go_first(raw):
    patcher = raw.clone()
    patcher.load(CPU, full_load=True)
    freed = patcher.partially_unload(CPU, 1000)
    loaded = layers(patcher)
    gone = [name for name, there in loaded.items() if not there]
    assert freed > 1000 and gone
    assert all(is_once(name) for name in gone), gone
    patcher.detach()


def test_dynamic_vram_gives_them_the_last_priority(raw):
    entries = raw._load_list(for_dynamic=True)
    entries.sort()
    once = [is_once(entry[-3]) for entry in entries]
    assert once == sorted(once) and True in once and False in once


@pytest.fixture
def streaming(raw, calls_of, monkeypatch):
    """A Raw whose weights do not fit, and the list of its calls of the time projection."""
    calls = calls_of(raw.model.diffusion_model.tproj)
    monkeypatch.setattr(type(raw), "loaded_size", lambda self: self.model_size() // 2)
    return raw, calls


def sample(run, model, conditioning, latent, sampler="euler", **extra):
    guider = comfy.samplers.CFGGuider(model)
    positive = [[cond, {**known, **extra}] for cond, known in conditioning(6, 1)]
    guider.set_conds(positive, conditioning(4, 2))
    guider.set_cfg(3.0)
    sigmas = run("K2Sigmas", model=model, latent=latent, preset="custom", steps=4)[0]
    noise = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(0))
    sampler = comfy.samplers.sampler_object(sampler)
    return guider.sample(noise, latent["samples"], sampler, sigmas, seed=0)


def test_a_schedule_is_embedded_in_one_batch_where_weights_stream(
    run, streaming, conditioning, latent, monkeypatch
):
    model, calls = streaming
    together = sample(run, model, conditioning, latent)
    assert calls == [5], "four sigmas and 0"
    sample(run, model, conditioning, latent)
    assert calls == [5, 5], "anew in the next run, whose LoRAs may be others"
    calls.clear()
    monkeypatch.setattr(type(model), "loaded_size", lambda self: self.model_size())
    apart = sample(run, model, conditioning, latent)
    assert len(calls) >= 4 and set(calls) <= {1, 2}
    assert_close(together, apart, 1e-5, "time embeddings together and each alone")


def test_modulation_is_read_once_a_run_and_block(run, pack, raw, conditioning, latent, monkeypatch):
    """By both conditionings together, and anew where a LoRA on it came or went."""
    leaf = pack("nodes.managed.layers").CastLeaf
    reads, read = [], leaf._read
    monkeypatch.setattr(
        leaf, "_read", lambda self, *given: reads.append(self) or read(self, *given)
    )
    blocks = raw.model.diffusion_model.blocks
    leaves = [part for part in blocks.modules() if isinstance(part, leaf)]
    assert len(leaves) == 5 * len(blocks)

    def sampled(model):
        reads.clear()
        result = sample(run, model, conditioning, latent)
        assert [sum(part is one for one in reads) for part in leaves] == [1] * len(leaves)
        return result

    before = sampled(raw)
    patched = raw.clone()
    key = "diffusion_model.blocks.1.mod.lin.weight"
    shape = raw.model.diffusion_model.blocks[1].mod.lin.weight.shape
    patched.add_patches({key: ("diff", (torch.full(shape, 0.3),))}, 1.0)
    changed = sampled(patched)
    assert not torch.allclose(changed, before, atol=1e-3)
    assert torch.equal(sampled(raw), before)
    # Each block by itself, as where others may change weights from step to step.
    monkeypatch.setattr(type(raw.model), "_may_fuse_now", lambda self, conditioning: False)
    assert_close(sample(run, patched, conditioning, latent), changed, 1e-6, "in every block")
    assert len(reads) > 4 * len(leaves)


def calls_a_block(model, kind: str) -> float:
    """Calls of Python functions that a block of a class named `kind` takes in one step."""
    inside, calls, blocks = None, 0, 0

    def profile(frame, event, argument):
        nonlocal inside, calls, blocks
        is_forward = event == "call" and frame.f_code.co_name == "forward"
        if is_forward and inside is None and type(frame.f_locals.get("self")).__name__ == kind:
            inside, blocks = frame, blocks + 1
        calls += event == "call" and inside is not None
        if event == "return" and inside is frame:
            inside = None

    sys.setprofile(profile)
    try:
        model()
    finally:
        sys.setprofile(None)
    return calls / blocks


def test_a_block_takes_no_more_calls_of_python_than_core_s(run, pack, raw):
    """What a GPU waits for where a step is short."""
    options = {"file": "krea2_tiny_raw.safetensors", "implementation": "ComfyUI's own"}
    core = run("K2ModelLoader", **options)[0]
    config, kept = raw.model.diffusion_model.config, pack("nodes.managed.run_cache").RunCache()
    taps = torch.randn(1, 6, config.num_text_layers * config.text_hidden_dim)
    text = torch.randn(1, 6, config.hidden_size)
    latents, time = torch.randn(1, 16, 1, 8, 8), torch.tensor([0.5])
    counts = {}
    for name, patcher, context, extra in (
        ("Block", raw, text, {"run_cache": kept}), ("SingleStreamBlock", core, taps, {})
    ):  # fmt: skip
        patcher.load(CPU, full_load=True)

        def step(model=patcher.model.diffusion_model, context=context, extra=extra):
            model(latents, time, context, transformer_options={}, **extra)

        step()
        counts[name] = calls_a_block(step, name)
    assert counts["Block"] < counts["SingleStreamBlock"], counts


def test_times_between_those_of_the_schedule(run, streaming, conditioning, latent, monkeypatch):
    model, calls = streaming
    found = sample(run, model, conditioning, latent, "dpm_2")
    assert calls[0] == 5 and len(calls) > 1
    monkeypatch.setattr(type(model), "loaded_size", lambda self: self.model_size())
    expected = sample(run, model, conditioning, latent, "dpm_2")
    assert_close(found, expected, 1e-5, "a sampler with steps in between")


def test_reference_latents_use_time_zero_of_the_table(
    run, streaming, conditioning, latent, monkeypatch
):
    model, calls = streaming
    extra = {
        "reference_latents": [torch.ones(1, 16, 1, 8, 8)],
        "reference_latents_method": "index_timestep_zero",
    }
    found = sample(run, model, conditioning, latent, **extra)
    assert calls == [5]
    monkeypatch.setattr(type(model), "loaded_size", lambda self: self.model_size())
    expected = sample(run, model, conditioning, latent, **extra)
    assert_close(found, expected, 1e-5, "references at time 0")


def test_a_hook_on_the_time_projection_counts_for_its_conditioning(
    run, streaming, conditioning, latent, monkeypatch
):
    """Weights change from call to call within a step there."""
    model, calls = streaming
    weight = model.model.diffusion_model.tproj[1].weight
    hooks = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    hooks.add(hook)
    hook.weights = {"diffusion_model.tproj.1.weight": ("diff", (torch.full(weight.shape, 0.02),))}
    hook.need_weight_init = False
    found = sample(run, model, conditioning, latent, hooks=hooks)
    monkeypatch.setattr(type(model), "loaded_size", lambda self: self.model_size())
    expected = sample(run, model, conditioning, latent, hooks=hooks)
    assert_close(found, expected, 1e-5, "a hook where weights stream and where not")
    assert not torch.allclose(expected, sample(run, model, conditioning, latent), atol=1e-3)
