"""Files of every quantisation through our loaders: kept small, right, patchable, beside core."""

import functools

import comfy.model_management
import gguf
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor, get_layout_class
from safetensors.torch import load_file, save_file

import formats
from parity import assert_close, relative_error

# The dtype in memory, and how far an image's velocity may be from that of the numbers in the file
# (activations are quantised in some formats).
FORMATS = {
    "fp8, settings as tensors": (torch.float8_e4m3fn, 0.1),
    "fp8, settings in the header": (torch.float8_e4m3fn, 0.1),
    "fp8, old marker": (torch.float8_e4m3fn, 0.1),
    "fp8, old marker, full": (torch.float8_e4m3fn, 1e-2),
    "int8, a scale a row": (torch.int8, 0.1),
    "int8, one scale": (torch.int8, 0.1),
    "int8 convrot": (torch.int8, 0.1),
    "nvfp4": (torch.uint8, 0.5),
    "mxfp8": (torch.float8_e4m3fn, 0.2),
    "convrot_w4a4": (torch.int8, 1.0),
    "convrot_w4a4, branches": (torch.int8, 0.5),
}


def algorithm(name):
    """What ComfyUI calls a format."""
    if name.startswith("fp8"):
        return "float8_e4m3fn"
    return "int8_tensorwise" if name.startswith("int8") else name.partition(",")[0]


# What this ComfyUI has no layers for is refused, which a test of its own shows.
FORMATS = {name: found for name, found in FORMATS.items() if algorithm(name) in QUANT_ALGOS}
needs_branches = pytest.mark.skipif(
    "convrot_w4a4, branches" not in FORMATS,
    reason="nothing to load: this ComfyUI has no layers for convrot_w4a4, so it is refused",
)
GGUF = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
        "MXFP4", "TQ2_0")  # fmt: skip


# One for each way of naming layers: beside the weight, in the metadata, by a marker, branches.
PREFIXED = ("fp8, settings as tensors", "fp8, settings in the header", "fp8, old marker",
            "nvfp4", "convrot_w4a4, branches")  # fmt: skip


@pytest.fixture(scope="module")
def tensors(models):
    return load_file(models / "diffusion_models" / "krea2_tiny_turbo.safetensors")


@pytest.fixture(scope="module")
def write(models):
    """Write a file into models/diffusion_models; the numbers in it beside its name."""
    paths = set()

    def call(tensors, name, prefix=""):
        file = f"krea2_turbo_{prefix}{name.replace(' ', '_').replace(',', '')}"
        folder = models / "diffusion_models"
        tensors = {prefix + n: t for n, t in tensors.items()}
        if name in GGUF:
            path = folder / f"{file}.gguf"
            values = formats.gguf_file(tensors, path, name)
        else:
            path = folder / f"{file}.safetensors"
            stored, values, metadata = formats.WRITERS[name](tensors)
            save_file(stored, path, metadata)
        plain = folder / f"{file}_values.safetensors"
        save_file({n: t.float().contiguous() for n, t in values.items()}, plain)
        paths.update((path, plain))
        return path.name, plain.name

    yield call
    for path in paths:
        path.unlink()


@pytest.fixture(scope="module")
def written(write, tensors):
    """The small model's file by format, and the file of its numbers; each is written once."""
    return functools.cache(lambda name, prefix="": write(tensors, name, prefix))


@pytest.mark.parametrize(
    "name, prefix",
    [*((name, "") for name in FORMATS),
     *((name, "model.diffusion_model.") for name in PREFIXED if name in FORMATS)],
)  # fmt: skip
def test_quantised_files(run, velocity, written, name, prefix):
    dtype, limit = FORMATS[name]
    file, plain = written(name, prefix)
    ours = run("K2ModelLoader", file=file)[0]
    weight = ours.model.diffusion_model.blocks[0].attn.wq.weight
    assert weight._qdata.dtype == dtype, "kept as it is stored"
    found = velocity(ours)
    expected = velocity(run("K2ModelLoader", file=plain)[0])
    assert relative_error(found, expected) < limit
    if not prefix and "branches" not in name:  # which core leaves out
        core = run("UNETLoader", unet_name=file, weight_dtype="default")[0]
        stored = core.model.diffusion_model.blocks[0].attn.wq.weight
        assert torch.equal(weight.dequantize(), stored.dequantize())
        # Activations are rounded to 8 bits, and on some processors a last digit flips a step.
        close = 5e-2 if "int8" in name or "convrot" in name else 1e-5
        assert_close(found, velocity(core), close, f"{name} against core")


@pytest.mark.parametrize("form", ["int8_tensorwise", "convrot_w4a4", "mxfp8", "tomorrow's"])
def test_formats_that_this_comfyui_lacks_are_refused(run, tensors, write, monkeypatch, form):
    """As 0.26 lacks int8; a newer one is made to."""
    monkeypatch.delitem(QUANT_ALGOS, form, raising=False)

    def claiming(tensors):
        stored, values, _ = formats.int8(tensors)
        settings = formats.settings_tensor({"format": form})
        stored |= {n: settings.clone() for n in stored if n.endswith(".comfy_quant")}
        return stored, values, {}

    monkeypatch.setitem(formats.WRITERS, "lacking", claiming)
    file, _ = write(tensors, "lacking")
    with pytest.raises(ValueError, match=rf"{file} has a layer in {form} \(blocks\.0.*Update"):
        run("K2ModelLoader", file=file)


def test_smoothing_that_this_comfyui_leaves_out_is_refused(run, tensors, write, monkeypatch):
    """pre_quant_scale: without it the layer would run and paint something else."""
    known = QUANT_ALGOS["nvfp4"]["parameters"] - {"pre_quant_scale"}
    monkeypatch.setitem(QUANT_ALGOS, "nvfp4", QUANT_ALGOS["nvfp4"] | {"parameters": known})

    def smoothed(tensors):
        stored, values, metadata = formats.by_comfyui("nvfp4")(tensors)
        stored["blocks.0.attn.wq.pre_quant_scale"] = torch.ones(256)
        return stored, values, metadata

    monkeypatch.setitem(formats.WRITERS, "smoothed", smoothed)
    file, _ = write(tensors, "smoothed")
    with pytest.raises(
        ValueError, match=r"a pre_quant_scale beside .* nvfp4 \(blocks\.0\.attn\.wq"
    ):
        run("K2ModelLoader", file=file)


def test_embeddings_that_this_comfyui_does_not_look_up_are_refused(run, models):
    """In four bits no ComfyUI does, in int8 older ones do not; they would load, and be noise."""
    folder = models / "text_encoders"
    tensors = load_file(folder / "qwen3vl_tiny.safetensors")
    embedding = "model.embed_tokens.weight"
    stored, values, _ = formats.int8({f"blocks.{embedding}": tensors[embedding]})
    path, plain = folder / "int8.safetensors", folder / "int8_values.safetensors"
    save_file({**tensors, embedding: values[f"blocks.{embedding}"]}, plain)
    tensors |= {name.removeprefix("blocks."): tensor for name, tensor in stored.items()}
    save_file(tensors, path)
    int8 = QUANT_ALGOS.get("int8_tensorwise", {}).get("comfy_tensor_layout")
    try:
        if int8 and hasattr(get_layout_class(int8), "dequantize_embedding"):
            found, expected = (
                clip.encode_from_tokens(clip.tokenize("a fox"))
                for clip in (
                    run("K2TextEncoderLoader", file=file.name)[0] for file in (path, plain)
                )
            )
            assert_close(found, expected, 1e-4, "an embedding in int8 against its numbers")
        else:
            with pytest.raises(ValueError, match=r"in int8_tensorwise \(embed_tokens\).*Update"):
                run("K2TextEncoderLoader", file=path.name)
        tensors["model.embed_tokens.comfy_quant"] = formats.settings_tensor({"format": "nvfp4"})
        save_file(tensors, path)
        with pytest.raises(ValueError, match=r"embedding in nvfp4 \(embed_tokens\).*Update"):
            run("K2TextEncoderLoader", file=path.name)
    finally:
        path.unlink()
        plain.unlink()


@pytest.mark.parametrize("name", GGUF)
def test_gguf_files(run, velocity, written, name):
    file, plain = written(name)
    ours = run("K2ModelLoader", file=file)[0]
    weight = ours.model.diffusion_model.blocks[0].attn.wq.weight
    assert weight._qdata.dtype == torch.uint8 and weight.shape == (256, 256)
    expected = velocity(run("K2ModelLoader", file=plain)[0])
    assert_close(velocity(ours), expected, 1e-5, name)
    held = sum(w._qdata.nbytes for w in ours.model.diffusion_model.parameters()
               if isinstance(w, QuantizedTensor))  # fmt: skip
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    count = sum(w.numel() for w in ours.model.diffusion_model.parameters()
                if isinstance(w, QuantizedTensor))  # fmt: skip
    assert held == count // block * size


@needs_branches
def test_low_rank_branches(run, models, written, velocity):
    """A layer's answer is its quantised weight's plus the branch's; saving keeps both."""
    import folder_paths
    from comfy_extras.nodes_model_merging import save_checkpoint

    file, _ = written("convrot_w4a4, branches")
    stored = load_file(models / "diffusion_models" / file)
    patcher = run("K2ModelLoader", file=file)[0]
    expected = velocity(patcher)
    layer = patcher.model.diffusion_model.blocks[0].mlp.down
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    x = x.to(layer.weight.device)
    up, down = (stored[f"blocks.0.mlp.down.svdq_l{n}"].to(x) for n in (1, 2))
    without = torch.nn.functional.linear(x, layer.weight)
    assert_close(layer(x), without + x @ down.T @ up.T, 1e-6, "a layer with its branch")
    keys = {key for *_, key, _, _ in patcher._load_list()}
    assert "diffusion_model.blocks.0.mlp.down" in keys, "still a leaf that ComfyUI offloads"

    save_checkpoint(patcher, filename_prefix="saved", output_dir=str(models / "x"))
    (saved,) = (models / "x").glob("saved*.safetensors")
    target = models / "diffusion_models" / "saved.safetensors"
    saved.replace(target)
    folder_paths.filename_list_cache.clear()
    again = run("K2ModelLoader", file="saved.safetensors")[0]
    kept = {n.removeprefix("model.diffusion_model."): t for n, t in load_file(target).items()}
    assert kept.keys() == stored.keys()
    assert all(torch.equal(kept[name], stored[name]) for name in stored)
    assert_close(velocity(again), expected, 1e-5, "saved and loaded")
    target.unlink()


@needs_branches
@pytest.mark.parametrize("damage", ["no up", "no weight", "narrow"])
def test_broken_branches_are_refused(run, models, written, damage):
    file, _ = written("convrot_w4a4, branches")
    stored = load_file(models / "diffusion_models" / file)
    path = models / "diffusion_models" / "broken_branches.safetensors"
    if damage == "no up":
        del stored["blocks.0.attn.wq.svdq_l1"]
    elif damage == "no weight":
        stored["blocks.0.attn.other.svdq_l1"] = stored["blocks.0.attn.wq.svdq_l1"].clone()
    else:
        narrow = stored["blocks.0.attn.wq.svdq_l2"][:, :-1]
        stored["blocks.0.attn.wq.svdq_l2"] = narrow.contiguous()
    save_file(stored, path)
    try:
        with pytest.raises(ValueError, match=r"low-rank branch .*blocks\.0\.attn"):
            run("K2ModelLoader", file=path.name)
    finally:
        path.unlink()


@pytest.fixture
def lora(models):
    """A LoRA on a block's query and its table, in a file; the changes to the weights beside it."""
    generator = torch.Generator().manual_seed(5)
    down = torch.randn(4, 256, generator=generator) * 0.2
    up = torch.randn(256, 4, generator=generator)
    table = torch.randn(6 * 256, generator=generator) * 0.1
    tensors = {
        "diffusion_model.blocks.0.attn.wq.lora_A.weight": down,
        "diffusion_model.blocks.0.attn.wq.lora_B.weight": up,
        "diffusion_model.blocks.0.mod.lin.diff": table,
    }
    folder = models / "loras"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "format_test.safetensors")
    return "format_test.safetensors", {
        "blocks.0.attn.wq.weight": up @ down,
        "blocks.0.mod.lin": table,
    }


@pytest.mark.parametrize("name", [*FORMATS, *GGUF])
def test_lora_on_every_quantisation(run, models, velocity, written, lora, name):
    """Loaded whole and in parts, the LoRA is there, and away again without it."""
    file, plain = written(name)
    lora_name, changes = lora
    numbers = load_file(models / "diffusion_models" / plain)
    changed = {n: t + 0.8 * changes[n] if n in changes else t for n, t in numbers.items()}
    save_file(changed, models / "diffusion_models" / "changed.safetensors")
    expected = velocity(run("K2ModelLoader", file="changed.safetensors")[0])
    # What the LoRA changes is what it changes in the numbers; four-bit activations add noise.
    effect = expected - velocity(run("K2ModelLoader", file=plain)[0])
    ours = run("K2ModelLoader", file=file)[0]
    before = velocity(ours)

    def check(found):
        limit = 1e-5 if name in GGUF else FORMATS[name][1]
        assert relative_error(found, expected) < limit
        likeness = torch.cosine_similarity((found - before).flatten(), effect.flatten(), dim=0)
        assert likeness > (0.3 if "w4a4" in name else 0.9)

    patched = run("K2LoraLoader", model=ours, lora=lora_name, strength=0.8)[0]
    check(velocity(patched))
    patched.detach()
    assert torch.equal(velocity(ours), before)

    comfy.model_management.unload_all_models()
    patched.load(torch.device("cpu"), lowvram_model_memory=patched.model_size() // 2)
    assert patched.model.model_lowvram
    check(velocity(patched, as_loaded=True))
    patched.detach()
    assert torch.equal(velocity(ours), before)


@pytest.mark.parametrize("name", ["Q4_K", "float32"])
def test_plain_loras_on_weights_that_are_not_merged_are_branches(
    run, pack, models, velocity, written, lora, monkeypatch, name
):
    """Ours and core's, two on one layer, in blocks and streamed; other kinds change the weight."""
    patch_class = comfy.model_patcher.LowVramPatch
    calls, call = [], patch_class.__call__
    monkeypatch.setattr(
        patch_class, "__call__", lambda self, w: calls.append(self) or call(self, w)
    )
    folder, file = models / "loras", "krea2_tiny_turbo.safetensors"
    if name in GGUF:
        file, _ = written(name)
    generator = torch.Generator().manual_seed(6)
    pairs = {
        f"diffusion_model.blocks.0.{layer}.lora_{part}.weight": torch.randn(
            shape, generator=generator
        )
        for layer in ("attn.wq", "attn.wo")
        for part, shape in (("A", (3, 256)), ("B", (256, 3)))
    }
    alpha = {f"diffusion_model.blocks.0.attn.{n}.alpha": torch.tensor(2.0) for n in ("wq", "wo")}
    save_file(pairs | alpha, folder / "branches.safetensors")
    difference = torch.randn(256, 256, generator=generator) * 0.1
    save_file({"diffusion_model.blocks.0.attn.wq.diff": difference}, folder / "whole.safetensors")
    ours = run("K2ModelLoader", file=file)[0]
    patched = run("K2LoraLoader", model=ours, lora=lora[0], strength=0.8)[0]
    patched = run("LoraLoaderModelOnly", model=patched, lora_name="branches.safetensors",
                  strength_model=-0.3)[0]  # fmt: skip
    more = run("K2LoraLoader", model=patched, lora="whole.safetensors")[0]
    memory = pack("nodes.managed.low_rank").branch_bytes
    assert memory(patched.patches, 4) == 4 * (4 * 512 + 2 * 3 * 512)

    def found(patcher):
        comfy.model_management.unload_all_models()
        if name not in GGUF:
            patcher.load(torch.device("cpu"), lowvram_model_memory=1)
            assert patcher.model.model_lowvram
        calls.clear()
        result = velocity(patcher, as_loaded=name not in GGUF)
        changed = {patch.key for patch in calls}
        if name not in GGUF:
            patcher.detach()
        return result, changed

    for patcher, weights in ((patched, set()), (more, {"wq"})):
        branched, changed = found(patcher)
        matrices = {key.split(".")[-2] for key in changed} - {"lin"}
        assert matrices == weights
        monkeypatch.setattr(pack("nodes.managed.low_rank"), "branches_of", lambda patch: None)
        by_weight, changed = found(patcher)
        monkeypatch.undo()
        monkeypatch.setattr(
            patch_class, "__call__", lambda self, w: calls.append(self) or call(self, w)
        )
        assert {"wq", "wo"} <= {key.split(".")[-2] for key in changed}
        assert_close(branched, by_weight, 1e-5, f"branches beside {name}")
    assert not torch.allclose(branched, velocity(ours), atol=1e-3)


@pytest.mark.parametrize("style", ["header", "tensors"])
def test_fp8_scaled_text_encoders(run, models, style):
    folder = models / "text_encoders"
    tensors = load_file(folder / "qwen3vl_tiny.safetensors")
    stored, values, metadata = formats.float8(tensors, style, part="model.layers.")
    save_file(stored, folder / f"scaled_{style}.safetensors", metadata)
    numbers = {name: value.float().contiguous() for name, value in values.items()}
    save_file(numbers, folder / f"rounded_{style}.safetensors")
    full, scaled, expected = (
        run("K2TextEncoderLoader", file=f"{file}.safetensors")[0]
        for file in ("qwen3vl_tiny", f"scaled_{style}", f"rounded_{style}")
    )
    weight = scaled.cond_stage_model.encoder.layers[3].mlp.up_proj.weight
    assert weight._qdata.dtype == torch.float8_e4m3fn, "kept in 8 bits"
    ours, reference, plain = (
        c.encode_from_tokens(c.tokenize("a fox")) for c in (scaled, expected, full)
    )
    assert_close(ours, reference, 1e-4, f"fp8_scaled encoder ({style}) against its numbers")
    assert not torch.allclose(ours, plain)
    for file in (f"scaled_{style}", f"rounded_{style}"):
        (folder / f"{file}.safetensors").unlink()


def test_gguf_text_encoders(run, models):
    folder = models / "text_encoders"
    tensors = load_file(folder / "qwen3vl_tiny.safetensors")
    values = formats.gguf_file(tensors, folder / "tiny.gguf", "Q8_0", part="model.")
    save_file({n: v.float().contiguous() for n, v in values.items()}, folder / "gguf.safetensors")
    ours, reference = (
        run("K2TextEncoderLoader", file=file)[0] for file in ("tiny.gguf", "gguf.safetensors")
    )
    encoder = ours.cond_stage_model.encoder
    assert encoder.embed_tokens.weight._qdata.dtype == torch.uint8, "kept in blocks"
    assert encoder.layers[3].mlp.up_proj.weight._qdata.dtype == torch.uint8
    found, expected = (c.encode_from_tokens(c.tokenize("a fox")) for c in (ours, reference))
    assert_close(found, expected, 1e-5, "GGUF encoder against its numbers")
    for file in ("tiny.gguf", "gguf.safetensors"):
        (folder / file).unlink()  # or "auto" would find it for other models


def test_a_saved_model_has_official_names_that_core_reads(run, models, velocity, written):
    """ModelSave of a GGUF file gives numbers; of an 8-bit one, what it was."""
    import folder_paths

    names = ("Q4_K", "fp8, settings as tensors", "int8 convrot")
    for name in (name for name in names if name in GGUF or name in FORMATS):
        file, _ = written(name)
        ours = run("K2ModelLoader", file=file)[0]
        expected = velocity(ours)
        import comfy_extras.nodes_model_merging as merging

        merging.save_checkpoint(ours, filename_prefix="saved", output_dir=str(models / "x"))
        (saved,) = (models / "x").glob("saved*.safetensors")
        target = models / "diffusion_models" / "saved.safetensors"
        saved.replace(target)
        folder_paths.filename_list_cache.clear()
        core = run("UNETLoader", unet_name="saved.safetensors", weight_dtype="default")[0]
        limit = 1e-5 if name.startswith("fp8") else 1e-2
        assert_close(velocity(core), expected, limit, f"{name} saved, by core")
        target.unlink()


def test_a_compiler_leaves_blocks_to_the_kernel(pack, monkeypatch):
    """As one operator, which it calls with the blocks themselves; same numbers."""
    operations, module = pack("nodes.managed.gguf"), pack("krea2_model.checkpoints.gguf")
    # A CPU is taken for a device of the kernels, and its numbers are torch's.
    monkeypatch.setattr(pack("krea2_model.nn.triton_kernels"), "INTERPRETED", True)
    monkeypatch.setattr(pack("krea2_model.nn.triton_kernels"), "takes", lambda *tensors: False)
    read, values = [], module._dequantise_blocks

    def recorded(data, name, dtype):
        read.append((type(data), name))
        return values(data, name, dtype)

    monkeypatch.setattr(module, "_dequantise_blocks", recorded)
    data = torch.randint(100, (4, 144), dtype=torch.uint8)
    layer = operations.GGUFOperations.Linear(256, 4, bias=False, dtype=torch.float32)
    stored = operations.wrap(module.GGUFTensor(data, "Q4_K", (4, 256)), torch.float32)
    layer.weight = torch.nn.Parameter(stored, requires_grad=False)
    hidden = torch.randn(2, 256)
    switched = pack("krea2_model.nn.switches").switched
    with torch.inference_mode(False), torch.no_grad():
        with switched():
            expected = layer(hidden)
        with switched("gguf"):
            compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
            assert torch.equal(compiled(hidden), expected)
    assert read == [(torch.Tensor, "Q4_K")]
