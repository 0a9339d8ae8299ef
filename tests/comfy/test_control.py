"""Control LoRAs in a graph: our node, core's Apply ControlNet, and what each refuses."""

import comfy.controlnet
import numpy as np
import pytest
import torch
from comfy_extras.nodes_canny import Canny
from safetensors.torch import load_file, save_file

from nano_training.outlines import outline_exam
from parity import assert_close, relative_error

NANO = "krea2-nano outlines (built in)"
SHORT = {"preset": "custom", "steps": 2, "guidance": 0.0, "seed": 5}


@pytest.fixture(scope="module")
def nano(run):
    """MODEL, CLIP, VAE, positive, negative and latent of krea2-nano Turbo."""
    model, clip, vae = run("K2Loader", model="krea2-nano (built in)")
    positive, negative = run("K2TextEncode", clip=clip, prompt="a red star", negative="blue")[:2]
    latent = run("K2EmptyLatent", aspect="custom", width=96, height=64)[0]
    return model, clip, vae, positive, negative, latent


@pytest.fixture(scope="module")
def outlines():
    image = torch.zeros(1, 64, 96, 3)
    image[:, 16:48, 30:32] = image[:, 16:48, 60:62] = image[:, 16:18, 30:62] = 1
    image[:, 46:48, 30:62] = 1
    return image


@pytest.fixture(scope="module")
def sample(run, nano):
    def sample(positive, negative=None, model=None, **options):
        return run(
            "K2Sampler", model=model or nano[0], positive=positive, negative=negative,
            latent=nano[5], **SHORT | options,
        )[0]["samples"]  # fmt: skip

    return sample


@pytest.fixture(scope="module")
def controlled(run, nano, outlines):
    def add(**options):
        _, _, vae, positive, negative, _ = nano
        given = {"positive": positive, "negative": negative, "vae": vae, "image": outlines}
        return run("K2ControlLora", control=NANO, **given | options)

    return add


def test_core_s_apply_node_gives_the_same(run, nano, outlines, controlled, sample):
    """Strength, start and end mean the same there, and a chain too."""
    _, _, vae, positive, negative, _ = nano
    plain = sample(positive)
    for options in ({}, {"strength": 0.5}, {"start": 0.3}, {"end": 0.3}):
        ours = controlled(**options)
        names = {"start": "start_percent", "end": "end_percent"}
        core = run(
            "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=ours[2],
            image=outlines, vae=vae,
            **{"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
            | {names.get(key, key): value for key, value in options.items()},
        )  # fmt: skip
        found = sample(ours[0])
        assert torch.equal(found, sample(core[0])), options
        assert relative_error(found, plain) > 1e-3, options
    assert isinstance(ours[2], comfy.controlnet.ControlBase)
    twice = controlled(positive=controlled(strength=0.6)[0], strength=0.4)[0]
    assert_close(sample(twice), sample(controlled()[0]), 1e-2, "two thirds")
    # Opposites cancel out.
    off = controlled(positive=controlled(strength=1.0)[0], strength=-1.0)[0]
    assert_close(sample(off), plain, 1e-4, "opposites")


def test_off_is_bit_exact_and_guidance_takes_both_texts(nano, controlled, sample):
    _, _, _, positive, negative, _ = nano
    assert torch.equal(sample(controlled(strength=0.0)[0]), sample(positive))
    assert torch.equal(sample(controlled(start=0.5, end=0.5)[0]), sample(positive))
    positive_too, negative_too = controlled()[:2]
    both = sample(positive_too, negative_too, guidance=2.0)
    assert relative_error(both, sample(positive_too, negative, guidance=2.0)) > 1e-3
    assert positive_too[0][1]["control"] is negative_too[0][1]["control"]


def test_a_mask_counts(nano, controlled, sample):
    """White everywhere is no mask; tokens' shares are tested without ComfyUI."""
    mask = torch.ones(1, 64, 96)
    whole, plain = sample(controlled()[0]), sample(nano[3])
    assert_close(sample(controlled(mask=mask)[0]), whole, 1e-4, "white")
    mask[:, :, 48:] = 0
    left, right = (sample(controlled(mask=part)[0]) for part in (mask, 1 - mask))
    for one, other in ((left, right), (left, whole), (left, plain), (right, plain)):
        assert relative_error(one, other) > 1e-2


def test_a_batch_of_control_images_and_other_sizes(run, nano, controlled, outlines, sample):
    latent = run("K2EmptyLatent", aspect="custom", width=96, height=64, batch=2)[0]
    images = torch.cat((outlines, outlines.flip(2)))
    both = run(
        "K2Sampler", model=nano[0], positive=controlled(image=images)[0], latent=latent, **SHORT
    )
    one = sample(controlled(image=outlines)[0])
    assert_close(both[0]["samples"][:1], one, 1e-4, "the first")
    other = run(
        "K2Sampler", model=nano[0], positive=controlled(image=outlines)[0], latent=latent, **SHORT
    )[0]["samples"][1:]
    assert relative_error(both[0]["samples"][1:], other) > 1e-3
    # Another size than the latent's is resized.
    larger = torch.nn.functional.interpolate(outlines.movedim(-1, 1), scale_factor=2)
    assert_close(sample(controlled(image=larger.movedim(1, -1))[0]), one, 0.2, "twice the size")


@pytest.mark.parametrize("dtype", ["fp8_scaled", "int8_convrot", "bf16"])
def test_quantised_weights_stay_as_they_are(run, nano, controlled, sample, dtype):
    model = run("K2ModelLoader", file="krea2-nano (built in)", dtype=dtype)[0]
    found, plain = sample(controlled()[0], model=model), sample(nano[3], model=model)
    whole, none = sample(controlled()[0]), sample(nano[3])
    assert relative_error(found, whole) < 0.5 * relative_error(none, whole)
    assert relative_error(plain, none) < 0.5 * relative_error(none, whole)


def test_a_cancelled_run_leaves_nothing_behind(nano, controlled, sample):
    model, control = nano[0], controlled()[0]
    whole = sample(control)

    def cancel(*arguments):
        raise InterruptedError

    hook = model.model.diffusion_model.blocks[1].register_forward_hook(cancel)
    with pytest.raises(InterruptedError):
        sample(control)
    hook.remove()
    hooks = [len(each._forward_hooks) for each in model.model.diffusion_model.modules()]
    assert not any(hooks) and torch.equal(sample(control), whole)


def test_refusals(run, nano, controlled, outlines, sample, models):
    _, _, vae, positive, _, _ = nano

    def error(**options):
        with pytest.raises(ValueError) as caught:
            controlled(**options)
        return str(caught.value)

    assert "1 x 1 px" in error(image=outlines[:, :1, :1])
    assert "64 x 96 px" in error(mask=torch.ones(1, 96, 64))
    assert "empty" in error(mask=torch.zeros(1, 64, 96))
    assert "vae is empty" in error(vae=None)
    assert "positive is not" in error(positive=None)
    assert "image is not" in error(image=None)
    assert "form is 'depth'" in error(form="depth")
    assert "widens" in error(form="reference tokens (time 0)")
    with pytest.raises(ValueError, match="VAE"):
        run(
            "ControlNetApplyAdvanced", positive=positive, negative=positive,
            control_net=controlled()[2], image=outlines, strength=1.0, start_percent=0.0,
            end_percent=1.0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="plain LoRA|no control LoRA"):
        _with_file(run, models, "style.safetensors", {"blocks.0.attn.wq.lora_A.weight": (2, 8)})


def _with_file(run, models, name, shapes):
    path = models / "loras" / name
    path.parent.mkdir(exist_ok=True)
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    return run("K2ControlLora", control=name)


def test_refused_models(run, pack, nano, controlled, sample, turbo, conditioning, latent):
    control = controlled()[0]
    # krea2-nano's control LoRA on a model of another width.
    text = conditioning(9, 1)
    text = [[states, extra | {"control": control[0][1]["control"]}] for states, extra in text]
    with pytest.raises(ValueError, match="another model"):
        run("K2Sampler", model=turbo, positive=text, latent=latent, **SHORT)
    core = run("K2ModelLoader", file="krea2-nano (built in)", implementation="ComfyUI's own")[0]
    with pytest.raises(ValueError, match="ComfyUI's own implementation"):
        sample(control, model=core)


def test_reference_tokens(run, pack, nano, controlled, outlines, models, sample):
    """The image becomes a reference, and the LoRA acts as a merged one would."""
    loras = models / "loras"
    loras.mkdir(exist_ok=True)
    tensors = load_file(pack("krea2_model").nano.REFERENCE_LORA)
    save_file(tensors, loras / "pose_controlnet.safetensors")
    model, _, vae, positive, negative, _ = nano
    image = {"vae": vae, "image": outlines}
    found = run(
        "K2ControlLora", control="pose_controlnet.safetensors", positive=positive, strength=0.8,
        **image,
    )  # fmt: skip
    assert "reference tokens" in found[3]
    merged = run("K2LoraLoader", model=model, lora="pose_controlnet.safetensors", strength=0.8)[0]
    expected = run("K2Reference", positive=positive, **image)[0]
    assert_close(sample(found[0]), sample(expected, model=merged), 1e-3, "merged")
    with pytest.raises(ValueError, match="mask"):
        run(
            "K2ControlLora", control="pose_controlnet.safetensors", positive=positive,
            mask=torch.ones(1, 64, 96), **image,
        )  # fmt: skip
    with pytest.raises(ValueError, match="Krea 2 Control LoRA itself"):
        applied = run(
            "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=found[2],
            strength=1.0, start_percent=0.0, end_percent=1.0, **image,
        )  # fmt: skip
        sample(applied[0])


def test_the_lora_loader_names_the_right_node(run, nano, models, pack):
    path = pack("krea2_model").nano.CONTROL_LORA
    loras = models / "loras"
    loras.mkdir(exist_ok=True)
    save_file(load_file(path), loras / "outlines.safetensors")
    with pytest.raises(ValueError, match="Krea 2 Control LoRA"):
        run("K2LoraLoader", model=nano[0], lora="outlines.safetensors")
    text = run("K2Inspect", file="loras/outlines.safetensors")[0]
    assert "a control LoRA" in text and "width 256, 128 channels" in text


def test_the_nano_lora_s_outlines_are_those_of_core_s_canny_node():
    for case in outline_exam(3):
        drawing = torch.from_numpy(case.drawn.drawing())[None].float()
        (edges,) = Canny.execute(drawing, 0.1, 0.2).args
        assert np.array_equal(edges[0].numpy() > 0, case.drawn.outlines() > 0)
