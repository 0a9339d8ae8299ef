"""fp8_scaled files through ComfyUI's own quantised layers, and beside core."""

import json

import comfy.model_management
import pytest
import torch
from safetensors.torch import load_file, save_file

from parity import assert_close, relative_error


def fp8_scaled(tensors, style, part="blocks."):
    """The matrices of the blocks in float8 with a scale each, in either metadata style."""
    quantised, layers = {}, {}
    for name, tensor in tensors.items():
        if not (part in name and name.endswith(".weight") and tensor.ndim == 2):
            quantised[name] = tensor
            continue
        scale = tensor.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
        layer = name.removesuffix(".weight")
        quantised[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        quantised[f"{layer}.weight_scale"] = scale
        layers[layer] = {"format": "float8_e4m3fn"}
    if style == "header":
        return quantised, {"_quantization_metadata": json.dumps({"layers": layers})}
    for layer, settings in layers.items():
        raw = json.dumps(settings).encode()
        quantised[f"{layer}.comfy_quant"] = torch.tensor(list(raw), dtype=torch.uint8)
    return quantised, {}


@pytest.mark.parametrize("style", ["header", "tensors"])
def test_fp8_scaled_files(run, models, turbo, conditioning, style):
    folder = models / "diffusion_models"
    tensors = load_file(folder / "krea2_tiny_turbo.safetensors")
    quantised, metadata = fp8_scaled(tensors, style)
    name = f"krea2_turbo_fp8_scaled_{style}.safetensors"
    save_file(quantised, folder / name, metadata)
    ours = run("K2ModelLoader", file=name)[0]
    core = run("UNETLoader", unet_name=name, weight_dtype="default")[0]
    weight = ours.model.diffusion_model.blocks[0].attn.wq.weight
    assert weight._qdata.dtype == torch.float8_e4m3fn, "kept in 8 bits"
    results = []
    for patcher in (ours, core, turbo):
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        x = torch.randn(1, 16, 1, 8, 12, generator=torch.Generator().manual_seed(0))
        x = x.to(patcher.model.get_dtype_inference())
        context = conditioning(6, 1)[0][0].to(x.dtype)
        model = patcher.model.diffusion_model
        results.append(model(x, torch.tensor([0.6]), context).float())
    assert_close(results[0], results[1], 1e-5, f"fp8_scaled ({style}) against core")
    assert relative_error(results[0], results[2]) < 0.3


@pytest.mark.parametrize("style", ["header", "tensors"])
def test_fp8_scaled_text_encoders(run, models, style):
    folder = models / "text_encoders"
    tensors = load_file(folder / "qwen3vl_tiny.safetensors")
    quantised, metadata = fp8_scaled(tensors, style, part="model.layers.")
    name = f"qwen3vl_fp8_scaled_{style}.safetensors"
    save_file(quantised, folder / name, metadata)
    full, scaled = (
        run("K2TextEncoderLoader", file=file)[0] for file in ("qwen3vl_tiny.safetensors", name)
    )
    weight = scaled.cond_stage_model.encoder.layers[3].mlp.up_proj.weight
    assert weight._qdata.dtype == torch.float8_e4m3fn, "kept in 8 bits"
    # What the quantised layers should give: the encoder with its matrices rounded to 8 bits.
    rounded = {
        key: quantised[key].float() * quantised[key.replace(".weight", ".weight_scale")]
        for key in quantised
        if quantised[key].dtype == torch.float8_e4m3fn
    }
    save_file({**tensors, **rounded}, folder / f"rounded_{style}.safetensors")
    expected = run("K2TextEncoderLoader", file=f"rounded_{style}.safetensors")[0]
    ours, reference, plain = (
        c.encode_from_tokens(c.tokenize("a fox")) for c in (scaled, expected, full)
    )
    assert_close(ours, reference, 1e-4, f"fp8_scaled encoder ({style}) against its rounded weights")
    assert not torch.allclose(ours, plain)
