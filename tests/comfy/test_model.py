"""MODEL under ComfyUI's management: patches on every weight, merges, saving, offload, compile."""

from types import SimpleNamespace

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.quant_ops
import comfy.utils
import pytest
import torch
from safetensors.torch import load_file, save_file

from live_bytes import LiveBytes
from parity import assert_close, relative_error

SIGMA = torch.tensor([0.6])


def velocity(patcher, conditioning, load=True):
    """One call of the patched model."""
    if load:
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    x = torch.randn(1, 16, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    options = patcher.model_options["transformer_options"]
    inputs = [part.to(patcher.load_device) for part in (x, SIGMA, conditioning(6, 1)[0][0])]
    return patcher.model.diffusion_model(*inputs, transformer_options=options).cpu()


def full_difference(patcher, seed=0):
    """A LoRA file of full differences on every weight of the model, by official names."""
    generator = torch.Generator().manual_seed(seed)
    keys, lora = {}, {}
    for key, weight in patcher.model.diffusion_model.state_dict().items():
        # `.weight` and `.bias` differ in ending only: "diff" and "diff_b".
        official = key.removesuffix(".weight")
        name = official if key.endswith(".weight") else key.removesuffix(".bias")
        suffix = ".diff" if key.endswith(".weight") else ".diff_b"
        difference = torch.randn(weight.shape, generator=generator) * 0.1
        keys[f"diffusion_model.{key}"] = difference
        lora[f"diffusion_model.{name}{suffix}"] = difference
    return keys, lora


def save_lora(base, name, lora):
    folder = base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in lora.items()}, folder / name)
    return name


def test_stock_lora_reaches_every_weight(run, base, turbo, conditioning):
    before = velocity(turbo, conditioning)
    original = {k: v.clone() for k, v in turbo.model.state_dict().items()}
    differences, lora = full_difference(turbo)
    name = save_lora(base, "full.safetensors", lora)
    patched = run("LoraLoaderModelOnly", model=turbo, lora_name=name, strength_model=0.5)[0]
    assert set(patched.patches) == set(differences)
    assert any(".scale." in key for key in differences)
    assert any(".lin." in key for key in differences)
    after = velocity(patched, conditioning)
    assert relative_error(after, before) > 1e-2
    weights = patched.model.state_dict()
    for key, difference in differences.items():
        expected = original[key].cpu() + 0.5 * difference
        assert_close(weights[key], expected, 1e-6, key)
    # And it comes off again.
    assert torch.equal(velocity(turbo, conditioning), before)


def test_stock_lora_by_matrices_and_every_prefix(run, base, turbo, conditioning):
    """Low rank on one matrix, under the names core maps for its own Krea 2."""
    down, up = torch.randn(4, 256), torch.randn(256, 4)
    key = "diffusion_model.blocks.1.attn.wq.weight"
    original = turbo.model.state_dict()[key].clone()
    for number, name in enumerate(
        (
            "diffusion_model.blocks.1.attn.wq",
            "transformer.transformer_blocks.1.attn.to_q",
            "lycoris_transformer_blocks_1_attn_to_q",
        )
    ):
        lora = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        file = save_lora(base, f"low_rank_{number}.safetensors", lora)
        patched = run("LoraLoaderModelOnly", model=turbo, lora_name=file, strength_model=1.0)[0]
        velocity(patched, conditioning)
        assert_close(patched.model.state_dict()[key], original.cpu() + up @ down, 1e-5, name)


def test_a_lora_hook_on_conditioning_equals_the_lora(run, base, turbo, conditioning, latent):
    """Hooks patch weights in the middle of sampling, norm scales and tables too."""
    import comfy.hooks
    import comfy_extras.nodes_hooks

    _, lora = full_difference(turbo)
    name = save_lora(base, "hook.safetensors", lora)
    text = conditioning(6, 1)
    options = {"latent": latent, "seed": 2}
    patched = run("LoraLoaderModelOnly", model=turbo, lora_name=name, strength_model=0.5)[0]
    expected = run("K2Sampler", model=patched, positive=text, **options)[0]["samples"]
    create = comfy_extras.nodes_hooks.CreateHookLora()
    hooks = create.create_hook(name, strength_model=0.5, strength_clip=0.0)[0]
    hooked = comfy.hooks.set_hooks_for_conditioning(text, hooks)
    value = run("K2Sampler", model=turbo, positive=hooked, **options)[0]["samples"]
    assert_close(value, expected, 1e-5, "LoRA by hook against the LoRA")


def test_inpainting_keeps_what_is_masked(run, turbo, conditioning):
    image = torch.randn(1, 16, 1, 8, 8)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1.0
    latent = {"samples": image, "noise_mask": mask}
    result = run("K2Sampler", model=turbo, positive=conditioning(4, 1), latent=latent)[0]
    assert_close(result["samples"][..., 5:], image[..., 5:], 1e-4, "what the mask protects")
    assert relative_error(result["samples"][..., :4], image[..., :4]) > 0.1
    assert "noise_mask" in result


def test_dynamic_vram_patches_every_weight(turbo, dynamic_patcher):
    """The load path of NVIDIA's default patcher, which ignores bare parameters."""
    cpu = torch.device("cpu")
    patcher = dynamic_patcher(turbo.model)
    differences, _ = full_difference(patcher)
    original = {k: v.clone() for k, v in turbo.model.state_dict().items()}
    added = patcher.add_patches({k: ("diff", (d,)) for k, d in differences.items()}, 1.0)
    assert set(added) == set(differences)
    patcher.load(cpu)
    for key in differences:
        module, parameter = key.rpartition(".")[::2]
        module = comfy.utils.get_attr(patcher.model, module)
        attached = getattr(module, f"{parameter}_lowvram_function", None) is not None
        changed = not torch.equal(getattr(module, parameter), original[key])
        assert attached or changed, f"{key} is not patched"
    patcher.restore_loaded_backups()


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_merge_of_two_of_ours(run, raw, turbo, conditioning, ratio):
    first = {k: v.clone() for k, v in raw.model.state_dict().items()}
    second = {k: v.clone() for k, v in turbo.model.state_dict().items()}
    merged = run("ModelMergeSimple", model1=raw, model2=turbo, ratio=ratio)[0]
    velocity(merged, conditioning)
    weights = merged.model.state_dict()
    for key in first:
        expected = ratio * first[key].cpu() + (1 - ratio) * second[key].cpu()
        assert_close(weights[key], expected, 1e-6, key)


@pytest.mark.parametrize("ours_first", [True, False])
def test_merge_with_a_model_of_core(
    run, raw, core_raw, turbo, core_turbo, conditioning, ours_first
):
    """Every weight takes part, under either name, whoever comes first."""
    first, second = (raw, core_turbo) if ours_first else (core_raw, turbo)
    merged = run("ModelMergeSimple", model1=first, model2=second, ratio=0.5)[0]
    reference = run("ModelMergeSimple", model1=raw, model2=turbo, ratio=0.5)[0]
    expected = velocity(reference, conditioning)
    assert_close(velocity(merged, conditioning), expected, 1e-5, "merge with a model of core")


def test_clones_keep_both_names(turbo, monkeypatch):
    """Also the clone that core makes of its plain class where a model must not be dynamic."""
    official, key = "diffusion_model.blocks.0.mod.lin", "diffusion_model.blocks.0.mod.lin.weight"
    patch = ("diff", (torch.ones(6 * 256),))
    assert turbo.clone().add_patches({official: patch}) == [key]
    monkeypatch.setattr(type(turbo), "is_dynamic", lambda self: True)
    plain = turbo.clone(disable_dynamic=True)
    assert plain.model is not turbo.model and not isinstance(plain, type(turbo))
    assert plain.add_patches({official: patch}) == [key]


def test_unknown_patch_keys_are_logged(turbo, caplog):
    turbo.clone().add_patches({"diffusion_model.blocks.99.mod.lin": ("diff", (torch.ones(1),))})
    assert "nothing to patch at diffusion_model.blocks.99.mod.lin" in caplog.text


def test_saved_model_loads_in_core_and_here(run, base, turbo, models, conditioning):
    expected = velocity(turbo, conditioning)
    run("ModelSave", model=turbo, filename_prefix="saved/turbo")
    (saved,) = (base / "output" / "saved").glob("turbo*.safetensors")
    tensors = load_file(saved)
    prefix = "model.diffusion_model."
    original = load_file(models / "diffusion_models" / "krea2_tiny_turbo.safetensors")
    assert {name.removeprefix(prefix) for name in tensors} == set(original)
    saved.rename(models / "diffusion_models" / "resaved_turbo.safetensors")
    ours = run("K2ModelLoader", file="resaved_turbo.safetensors")[0]
    core = run("UNETLoader", unet_name="resaved_turbo.safetensors", weight_dtype="default")[0]
    assert torch.equal(velocity(ours, conditioning), expected)
    assert_close(velocity(core, conditioning), expected, 1e-5, "saved file in core")


@pytest.mark.parametrize("with_lora", [False, True])
def test_partial_load_gives_the_same_image(turbo, conditioning, with_lora):
    patcher = turbo.clone()
    if with_lora:
        differences, _ = full_difference(patcher)
        patcher.add_patches({k: ("diff", (d,)) for k, d in differences.items()}, 0.3)
    expected = velocity(patcher, conditioning)
    patcher.detach()
    patcher.load(patcher.load_device, lowvram_model_memory=patcher.model_size() // 3)
    cast = [m for m in patcher.model.modules() if getattr(m, "comfy_cast_weights", False)]
    assert patcher.model.model_lowvram and len(cast) > 10
    if with_lora:
        assert patcher.model.lowvram_patch_counter > 0
    partial = velocity(patcher, conditioning, load=False)
    assert_close(partial, expected, 1e-6, f"partial load, lora {with_lora}")
    patcher.detach()


def test_unload_and_reload(turbo, conditioning):
    expected = velocity(turbo, conditioning)
    comfy.model_management.unload_all_models()
    assert torch.equal(velocity(turbo, conditioning), expected)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn"])
def test_stored_dtypes(run, turbo, models, conditioning, dtype):
    """Other storage changes the result a little; norms and tables stay float32."""
    model = run("K2ModelLoader", file="krea2_tiny_turbo.safetensors", dtype=dtype)[0]
    for key, weight in model.model.diffusion_model.state_dict().items():
        leaf = key.endswith((".scale.weight", ".lin.weight"))
        assert (weight.dtype == torch.float32) == leaf, key
    compute = model.model.get_dtype_inference()
    x = torch.randn(1, 16, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    x, context = (p.to(model.load_device, compute) for p in (x, conditioning(6, 1)[0][0]))
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    value = model.model.diffusion_model(x, SIGMA.to(x.device), context).cpu()
    limit = 0.5 if dtype.startswith("fp8") else 0.05
    assert relative_error(value.float(), velocity(turbo, conditioning)) < limit


def test_attention_and_block_patches(turbo, conditioning):
    """Patches see what core's Krea 2 shows them, and may replace whole blocks."""
    expected = velocity(turbo, conditioning)
    seen = []

    def attention(q, k, v, pe=None, attn_mask=None, extra_options=None):
        seen.append(("attn1", extra_options["block_index"], extra_options["img_slice"]))
        assert q.shape == (1, 2, 30, 128) and k.shape == (1, 1, 30, 128)
        return {"q": q, "k": k, "v": v, "pe": pe}

    def output(out, extra_options):
        seen.append(("output", extra_options["block_index"], tuple(out.shape)))
        return out

    def block(args, extra):
        seen.append(("block", args["transformer_options"]["total_blocks"]))
        return extra["original_block"](args)

    def post_input(args):
        seen.append(("post_input", tuple(args["img"].shape), tuple(args["img_ids"].shape)))
        return args

    model = turbo.clone()
    model.set_model_attn1_patch(attention)
    model.set_model_attn1_output_patch(output)
    model.set_model_patch(post_input, "post_input")
    model.set_model_patch_replace(block, "dit", "single_block", 1)
    # Without patches the last block asks for image tokens alone, so sums may be ordered otherwise.
    assert_close(velocity(model, conditioning), expected, 1e-6, "patches that change nothing")
    assert seen == [
        ("post_input", (1, 24, 256), (1, 24, 3)),
        ("attn1", 0, [6, 30]),
        ("output", 0, (1, 30, 256)),
        ("block", 2),
        ("attn1", 1, [6, 30]),
        ("output", 1, (1, 30, 256)),
    ]


def test_a_patch_that_changes_queries_changes_the_image(turbo, conditioning):
    model = turbo.clone()
    model.set_model_attn1_patch(lambda q, k, v, **_: {"q": q * 0, "k": k, "v": v})
    assert relative_error(velocity(model, conditioning), velocity(turbo, conditioning)) > 1e-3


def test_attention_override_is_used(turbo, conditioning):
    calls = []

    def override(function, *args, **kwargs):
        calls.append(function)
        return function(*args, **kwargs)

    model = turbo.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    # It gets keys and values for every head, which some processors add up in another order.
    found, expected = velocity(model, conditioning), velocity(turbo, conditioning)
    assert_close(found, expected, 1e-6, "with an override against without")
    # Two layerwise, two refiner and two transformer blocks.
    assert len(calls) == 6


def test_diffusion_model_wrappers_are_called(turbo, conditioning):
    import comfy.patcher_extension as extension

    calls = []

    def wrapper(execute, x, timesteps, context, attention_mask=None, ref_latents=None, *rest, **kw):
        calls.append(context.shape)
        return execute(x, timesteps, context, attention_mask, ref_latents, *rest, **kw)

    model = turbo.clone()
    model.add_wrapper(extension.WrappersMP.DIFFUSION_MODEL, wrapper)
    model.model_options["transformer_options"]["wrappers"] = model.wrappers
    velocity(model, conditioning)
    assert calls == [(1, 6, 12 * 160)]


def test_video_latents_are_refused(turbo, conditioning):
    with pytest.raises(ValueError, match="3 frames .* single images"):
        turbo.model.diffusion_model(torch.zeros(1, 16, 3, 8, 8), SIGMA, conditioning(4, 1)[0][0])


@pytest.fixture
def attention_of_gpus(monkeypatch):
    """What is compiled for a GPU: on a CPU, ComfyUI's attention asks for free memory, and to trace
    that takes most of a minute."""
    attention = comfy.ldm.modules.attention
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)


def test_torch_compile(run, turbo, conditioning, latent, attention_of_gpus):
    """By core's wrapper, traced whole; the GPU check compiles for real."""
    import comfy_api.torch_helpers

    expected = run("K2Sampler", model=turbo, positive=conditioning(4, 1), latent=latent)[0]
    compiled = turbo.clone()
    comfy_api.torch_helpers.set_torch_compile_wrapper(compiled, backend="eager")
    value = run("K2Sampler", model=compiled, positive=conditioning(4, 1), latent=latent)[0]
    assert_close(value["samples"], expected["samples"], 1e-4, "torch.compile")


def test_compile_by_block(run, pack, raw, conditioning, monkeypatch, attention_of_gpus):
    """One compilation for all blocks, sizes and lengths of text, and the same image."""
    from torch._dynamo.utils import counters

    speed = pack("nodes.speed")
    wrap = speed.set_torch_compile_wrapper

    def traced(model, backend, options=None, **others):
        assert backend == "inductor" and options
        # The same tracing without a C++ compiler, which not every machine has.
        wrap(model, backend="eager", **others)

    monkeypatch.setattr(speed, "set_torch_compile_wrapper", traced)
    torch._dynamo.reset()
    counters.clear()
    compiled = run("K2Compile", model=raw)[0]
    graphs = []
    for height, width, tokens in ((8, 12, 5), (16, 10, 9), (12, 12, 17)):
        inputs = {"positive": conditioning(tokens, 1), "negative": conditioning(tokens + 2, 2),
                  "latent": {"samples": torch.zeros(1, 16, 1, height, width)},
                  "preset": "custom", "steps": 1, "guidance": 2.0}  # fmt: skip
        found = run("K2Sampler", model=compiled, **inputs)[0]["samples"]
        expected = run("K2Sampler", model=raw, **inputs)[0]["samples"]
        assert_close(found, expected, 1e-4, "compiled by block")
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1:] == graphs[:1] * 2, graphs


def test_easycache_of_comfyui(run, raw, conditioning, latent):
    """Core's feature caching takes our model; at a threshold of 0 it changes nothing."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    inputs = {"positive": conditioning(5, 1), "negative": conditioning(3, 2), "latent": latent,
              "preset": "custom", "steps": 6, "guidance": 2.0}  # fmt: skip
    expected = run("K2Sampler", model=raw, **inputs)[0]["samples"]
    for threshold, limit in ((0.0, 1e-4), (3.0, 2.0)):
        cached = EasyCacheNode.execute(raw, threshold, 0.15, 0.95, False).result[0]
        found = run("K2Sampler", model=cached, **inputs)[0]["samples"]
        error = relative_error(found, expected)
        assert torch.isfinite(found).all() and error < limit
    assert error > 1e-4, "steps were skipped"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_follow_the_dtype_of_the_run(run, models, conditioning, dtype):
    """ComfyUI may change it after loading, by a node or a device that cannot do otherwise."""
    stored = run("K2ModelLoader", file="krea2_tiny_turbo.safetensors", dtype="fp16")[0]
    model, seen = stored.model.diffusion_model, []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    context = conditioning(4, 1)[0][0].to(dtype)
    velocity = model(torch.randn(1, 16, 1, 8, 8, dtype=dtype), SIGMA, context)
    assert seen == [dtype] and velocity.dtype == dtype


def test_memory_estimate_grows_with_tokens(turbo):
    small = turbo.model.memory_required([1, 16, 1, 64, 64])
    large = turbo.model.memory_required([1, 16, 1, 128, 128], {"c_crossattn": [(1, 64, 1920)]})
    per_token = (3 * 256 + 2 * 768) * 4 * 1.15
    assert large - small == pytest.approx((3 * 1024 + 64) * per_token)


def test_memory_estimate_counts_what_the_released_model_takes(turbo, pack, monkeypatch):
    """On meta, with a GPU's kernels, which make no copies."""
    config = pack("krea2_model.config").TransformerConfig()
    transformer = pack("krea2_model.transformer.model").Krea2Transformer(
        config, device="meta", dtype=torch.bfloat16
    )
    backend = pack("krea2_model.transformer.backend").Backend

    class Fused(backend):
        def attend(self, query, key, value, norm, rope, mask, query_slice=None):
            return query.transpose(1, 2).flatten(2).clone()

        def modulated_norm(self, hidden, scale, shift, eps):
            return torch.empty_like(hidden)

    monkeypatch.setattr(transformer, "_rope_for", lambda *arguments: torch.empty(0, device="meta"))
    monkeypatch.setattr(turbo.model.diffusion_model, "config", config)
    monkeypatch.setattr(turbo.model, "get_dtype_inference", lambda: torch.bfloat16)
    text = torch.empty(1, 128, config.hidden_size, device="meta", dtype=torch.bfloat16)
    for side in (128, 256):
        latents = torch.empty(1, 16, side, side, device="meta")
        with LiveBytes("meta") as live:
            transformer(latents, torch.empty(1, device="meta"), text, backend=Fused())
        shapes = {"c_crossattn": [(1, 128, config.hidden_size)]}
        estimate = turbo.model.memory_required([1, 16, side, side], shapes) - 0.45 * 1024**3
        assert 1.2 * live.peak <= estimate < 1.4 * live.peak, side


def test_memory_estimate_of_gguf_counts_its_numbers(turbo, pack, monkeypatch):
    gguf, managed = pack("krea2_model.checkpoints.gguf"), pack("nodes.managed.gguf")
    for name, form in gguf.FORMATS.items():
        blocks = torch.zeros(128, 8 * form.block_bytes, dtype=torch.uint8)
        with LiveBytes() as live:
            gguf.dequantise(blocks, name, (128, 8 * form.block_values)).to(torch.bfloat16)
        assert live.peak <= managed.BYTES_A_VALUE * 128 * 8 * form.block_values, name
    plain = turbo.model.memory_required([1, 16, 64, 64])
    monkeypatch.setattr(
        turbo.model.model_config, "custom_operations", managed.GGUFOperations, raising=False
    )
    more = turbo.model.memory_required([1, 16, 64, 64]) - plain
    assert more == 256 * 768 * managed.BYTES_A_VALUE


@pytest.mark.skipif(
    not hasattr(comfy.quant_ops.ck, "rms_adaln"),
    reason="nothing to run: the comfy-kitchen of this ComfyUI has no fused norm (rms_adaln)",
)
def test_kernels_of_comfyui_give_the_same_image(turbo, conditioning, pack, monkeypatch):
    """The path of a GPU with ComfyUI's fused kernels, run by their plain forms."""
    backend = pack("nodes.managed.backend")
    expected = velocity(turbo, conditioning)
    calls = []
    monkeypatch.setattr(backend, "_has_kernels", lambda tensor: calls.append(tensor) or True)
    assert_close(velocity(turbo, conditioning), expected, 1e-5, "fused kernels")
    assert len(calls) >= 4


@pytest.mark.parametrize("missing", ["rms_adaln", "rms_rope_"])
def test_kernels_that_an_older_comfyui_lacks_are_not_called(pack, monkeypatch, missing):
    """On a GPU, where some of them are there, our own take their place."""
    backend, kernels = pack("nodes.managed.backend"), comfy.quant_ops.ck
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(kernels.registry, "is_available", lambda name: True)
    for name in ("rms_adaln", "rms_rope_"):
        monkeypatch.setattr(kernels, name, lambda *args: None, raising=False)
    assert backend._has_kernels(on_gpu)
    monkeypatch.delattr(kernels, missing)
    assert not backend._has_kernels(on_gpu)


def test_patches_may_keep_what_they_saw(turbo, conditioning):
    """Caches of blocks and of attention rely on it: nothing they hold changes afterwards."""
    kept = []

    def keep(tensor):
        kept.append((tensor, tensor.clone()))
        return tensor

    def block(args, extra):
        keep(args["img"])
        return {"img": keep(extra["original_block"](args)["img"])}

    def override(attention, *args, **kwargs):
        return keep(attention(*args, **kwargs))

    model = turbo.clone()
    expected = velocity(turbo, conditioning)
    model.set_model_patch_replace(block, "dit", "single_block", 0)
    model.set_model_attn1_output_patch(lambda out, options: keep(out))
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    assert_close(velocity(model, conditioning), expected, 1e-6, "patches that keep tensors")
    assert len(kept) >= 6
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)


def test_a_replaced_block_may_run_twice(turbo, conditioning):
    """Blocks work in place; what a patch passes on stays as it is."""
    expected = velocity(turbo, conditioning)

    def twice(args, extra):
        before = args["img"].clone()
        first = extra["original_block"](args)["img"]
        assert torch.equal(args["img"], before)
        assert torch.equal(extra["original_block"](args)["img"], first)
        return {"img": first}

    model = turbo.clone()
    model.set_model_patch_replace(twice, "dit", "single_block", 0)
    assert_close(velocity(model, conditioning), expected, 1e-6, "a block run twice")
