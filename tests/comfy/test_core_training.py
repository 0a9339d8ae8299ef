"""ComfyUI's own training nodes on our MODEL, CLIP and VAE; its LoRA in our loader and core's."""

import math

import pytest
import torch
from PIL import Image

from parity import assert_close, relative_error


@pytest.fixture(scope="module")
def folder(base):
    """Two pictures of different shape with captions, in ComfyUI's input folder."""
    folder = base / "input" / "core_training"
    folder.mkdir(exist_ok=True)
    for index, (colour, size) in enumerate((("red", (64, 64)), ("blue", (96, 64)))):
        Image.new("RGB", size, colour).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {colour} wall")
    return folder.name


def train(model, latents, positive, **settings):
    import comfy_extras.nodes_train as training

    inputs = {each.id: [getattr(each, "default", None)]
              for each in training.TrainLoraNode.define_schema().inputs}  # fmt: skip
    settings = {"steps": 2, "rank": 2, "training_dtype": "fp32", "lora_dtype": "fp32", **settings}
    inputs |= {name: [value] for name, value in settings.items() if name in inputs}
    torch.manual_seed(0)
    lora, loss, _ = training.TrainLoraNode.execute(
        **inputs | {"model": [model], "latents": latents, "positive": positive}
    ).result
    return lora, loss["loss"]


def test_from_a_folder_to_a_lora_in_every_loader(run, base, models, folder, velocity):
    import comfy_extras.nodes_dataset as dataset
    import comfy_extras.nodes_train as training

    model = run("K2ModelLoader", file="krea2_tiny_raw.safetensors")[0]
    clip = run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")[0]
    vae = run("K2VAELoader", file="qwen_image_vae_tiny.safetensors")[0]
    images, texts = dataset.LoadImageTextDataSetFromFolderNode.execute(folder).result
    latents, positive = dataset.MakeTrainingDataset.execute(images, [vae], [clip], texts).result
    buckets = dataset.ResolutionBucket.execute(latents, positive).result
    before = velocity(model)
    lora, losses = train(model, *buckets, bucket_mode=True, learning_rate=1e-2)
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    ups = {name for name, tensor in lora.items() if name.endswith("lora_up.weight")}
    assert len(ups) > 8 * 2
    assert all(lora[name].abs().sum() > 0 for name in ups), "a gradient reaches each of them"
    assert torch.equal(velocity(model), before), "the MODEL stays as it was"

    training.SaveLoRA.execute(lora, "loras/core_trained")
    (file,) = (base / "output" / "loras").glob("core_trained*.safetensors")
    (models / "loras").mkdir(exist_ok=True)
    file.rename(models / "loras" / file.name)
    wired = training.LoraModelLoader.execute(model, lora, 1.0).result[0]
    expected = velocity(wired)
    wired.detach()
    assert relative_error(expected, before) > 1e-3
    ours, _, report = run("K2LoraLoader", model=model, lora=file.name, strength=1.0)
    assert "left out" not in report
    assert_close(velocity(ours), expected, 1e-4, "our loader on our model")
    ours.detach()
    core = run("UNETLoader", unet_name="krea2_tiny_raw.safetensors", weight_dtype="default")[0]
    core = run("LoraLoaderModelOnly", model=core, lora_name=file.name, strength_model=1.0)[0]
    assert_close(velocity(core), expected, 1e-4, "core's loader on core's model")


def test_checkpointing_at_any_depth_gives_one_loss(raw, conditioning):
    """Parts are computed again after the call that they belong to is over."""
    pictures = torch.randn(2, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = [
        train(raw, [{"samples": pictures}], [conditioning(6, 1)], checkpoint_depth=depth)[1]
        for depth in (1, 2, 3, 4)
    ]
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("dtype", ["fp8_scaled", "int8"])
def test_quantised_weights_are_trained_beside(run, models, conditioning, dtype):
    model = run("K2ModelLoader", file="krea2_tiny_raw.safetensors", dtype=dtype)[0]
    pictures = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    lora, losses = train(
        model, [{"samples": pictures}], [conditioning(6, 1)], training_dtype="none",
        bypass_mode=True,
    )  # fmt: skip
    assert all(math.isfinite(loss) for loss in losses)
    assert lora["diffusion_model.blocks.0.attn.wq.lora_up.weight"].abs().sum() > 0
