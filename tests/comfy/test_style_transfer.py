"""Style pictures in a graph: samplers, passes, memory, and what is refused."""

import comfy.model_management
import pytest
import torch

from parity import assert_close, relative_error
from samples import image

SHORT = {"preset": "custom", "steps": 3, "guidance": 0.0, "seed": 5}


@pytest.fixture(scope="module")
def nano(run):
    """MODEL, CLIP, VAE, positive, negative and latent of krea2-nano Turbo."""
    model, clip, vae = run("K2Loader", model="krea2-nano (built in)")
    positive, negative = run("K2TextEncode", clip=clip, prompt="a red star", negative="blue")[:2]
    latent = run("K2EmptyLatent", aspect="custom", width=96, height=64)[0]
    return model, clip, vae, positive, negative, latent


@pytest.fixture(scope="module")
def styled(run, nano):
    def add(model=None, **options):
        given = {"vae": nano[2], "image": image(32, 48, 1), "end": 1.0}
        return run("K2StyleTransfer", model=model or nano[0], **given | options)[0]

    return add


@pytest.fixture(scope="module")
def sample(run, nano):
    def sample(model, **options):
        given = {"positive": nano[3], "negative": nano[4], "latent": nano[5]}
        return run("K2Sampler", model=model, **given | SHORT | options)[0]["samples"]

    return sample


@pytest.fixture
def calls(nano, monkeypatch):
    """Image tokens of each call of the transformer; a hook would count as another's change."""
    found, network = [], type(nano[0].model.diffusion_model)
    patches = network._patches

    def count(self, latents, dtype):
        result = patches(self, latents, dtype)
        found.append(result.shape[1])
        return result

    monkeypatch.setattr(network, "_patches", count)
    return found


STYLE, IMAGE = 6, 24  # tokens of a style picture and of the image


def test_off_is_bit_exact(nano, styled, sample):
    plain = sample(nano[0])
    for off in ({"strength": 0.0}, {"start": 0.5, "end": 0.5}):
        assert torch.equal(sample(styled(**off)), plain)
    assert relative_error(sample(styled()), plain) > 0.05
    assert torch.equal(sample(nano[0]), plain), "the model itself stays as it is"


def test_passes_of_a_run_and_of_the_next(nano, styled, sample, calls):
    """An inversion of 4 calls and one pass a step; the next run inverts no more."""
    model = styled()
    first = sample(model, guidance=2.0)
    assert calls.count(STYLE) == 4 + 3
    calls.clear()
    assert torch.equal(sample(model, guidance=2.0), first)
    assert calls.count(STYLE) == 3
    calls.clear()
    sample(model, guidance=2.0, steps=4)
    assert calls.count(STYLE) == 5 + 4, "other sigmas"
    calls.clear()
    # Another node's patch may change a pass of the style, so no run shares its inversion.
    patched = model.clone()
    patched.set_model_attn1_patch(lambda q, k, v, **_: {"q": q, "k": k, "v": v})
    assert_close(sample(patched, guidance=2.0), first, 1e-4, "an idle patch")
    assert calls.count(STYLE) == 4 + 3


def test_where_others_change_the_model_no_run_shares_an_inversion(nano, styled, sample, calls):
    """And the picture is the same."""
    model = styled()
    first = sample(model, guidance=2.0)
    calls.clear()
    hook = nano[0].model.diffusion_model.first.register_forward_hook(lambda *_: None)
    found = sample(model, guidance=2.0)
    hook.remove()
    assert calls.count(STYLE) == 4 + 3
    assert_close(found, first, 1e-4, "with an idle hook")


def test_the_negative_has_no_style(nano, styled, sample):
    """So guidance pushes away from the picture without the style."""
    model, empty = styled(), styled(strength=0.0)
    both = sample(model, guidance=2.0)
    alone = sample(model)
    assert relative_error(both, alone) > 0.05
    names = {"positive": nano[4], "negative": nano[3]}
    assert relative_error(sample(model, guidance=2.0, **names), both) > 0.05
    # One text for both: without a style guidance would change nothing.
    same = {"negative": nano[3]}
    assert_close(sample(empty, guidance=2.0, **same), sample(empty), 1e-4, "no style")
    assert relative_error(sample(model, guidance=2.0, **same), alone) > 0.05


def test_a_lora_behind_the_node_changes_the_inversion(run, styled, sample, calls):
    model = styled()
    sample(model)
    calls.clear()
    inputs = {"lora": "krea2-nano notebook (built in)", "strength": 0.5}
    with_lora = run("K2LoraLoader", model=model, **inputs)[0]
    found = sample(with_lora)
    assert calls.count(STYLE) == 4 + 3
    before = styled(run("K2LoraLoader", model=styled(strength=0.0), **inputs)[0])
    assert torch.equal(sample(before), found)


def test_without_a_clip_the_style_has_no_text(nano, styled, sample):
    empty = sample(styled(clip=nano[1]))
    named = sample(styled(clip=nano[1], style_prompt="a blue ring"))
    without = sample(styled())
    for one, other in ((empty, named), (empty, without), (named, without)):
        assert relative_error(one, other) > 1e-3


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "uni_pc", "lcm"])
def test_any_sampler_of_comfyui(run, nano, styled, sampler):
    """Also those that evaluate between two sigmas, or noise the latents again."""
    samples = run(
        "KSampler", model=styled(), positive=nano[3], negative=nano[4], latent_image=nano[5],
        seed=5, steps=3, cfg=1.0, sampler_name=sampler, scheduler="simple", denoise=1.0,
    )[0]["samples"]  # fmt: skip
    assert samples.isfinite().all()


def test_step_skipping_skips_the_style_too(run, styled, sample, calls):
    model = run("K2Approximate", model=styled(), evaluate="every 2nd step")[0]
    sample(model, steps=6)
    assert calls.count(IMAGE) < 6
    assert calls.count(STYLE) == 7 + calls.count(IMAGE)


def test_a_run_from_a_start_image_inverts_no_further_than_it(run, styled, sample, calls):
    latent = run("K2EmptyLatent", aspect="custom", width=96, height=64)[0]
    sample(styled(), latent=latent, denoise=0.4)
    assert calls.count(STYLE) == 4 + 3
    calls.clear()
    sample(styled(start=0.5, end=0.9), steps=4)
    assert calls.count(STYLE) == 3 + 2, "steps at 1 and 0.75 are outside, at 0.5 and 0.25 inside"


def test_a_cancelled_run_leaves_nothing_behind(nano, styled, sample):
    model = styled()
    whole = sample(styled())
    seen = []

    def cancel(*arguments):
        seen.append(1)
        if len(seen) > 2:
            raise InterruptedError

    hook = nano[0].model.diffusion_model.blocks[1].register_forward_hook(cancel)
    with pytest.raises(InterruptedError):
        sample(model)
    hook.remove()
    assert torch.equal(sample(model), whole)


def test_keys_and_values_are_counted_in_memory(nano, styled, pack):
    model = styled(image=image(320, 320, 1))
    shape = [1, 16, 1, 8, 8]
    base = nano[0].model
    # As ComfyUI does when a run of a clone begins.
    base.current_patcher = nano[0]
    plain = base.memory_required(shape)
    base.current_patcher = model
    config = base.diffusion_model.config
    numbers = 2 * 400 * config.num_layers * config.num_key_value_heads * config.attention_head_dim
    assert base.memory_required(shape) - plain > numbers * 4


def test_the_mask_has_the_image_s_shape(styled, sample):
    mask = torch.zeros(1, 64, 96)
    mask[:, :, :48] = 1
    left, right = (sample(styled(mask=part)) for part in (mask, 1 - mask))
    assert relative_error(left, right) > 1e-2
    with pytest.raises(ValueError, match="mask is 64 x 64 px, for an image of 96 x 64 px"):
        sample(styled(mask=torch.ones(1, 64, 64)))


def test_pictures_by_weight(styled, sample):
    two = {"image": image(32, 48, 1), "image_2": image(64, 32, 2)}
    first, second = (sample(styled(image=two[name])) for name in two)
    assert torch.equal(sample(styled(**two, weights="1, 0")), first)
    assert torch.equal(sample(styled(**two, weights="0, 5")), second)
    assert relative_error(sample(styled(**two)), first) > 1e-2
    batch = torch.cat((image(32, 48, 1), image(32, 48, 2)))
    pair = styled(image=image(32, 48, 1), image_2=image(32, 48, 2), weights="2, 1")
    assert torch.equal(sample(styled(image=batch, weights="2, 1")), sample(pair))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"weights": "1, 2"}, "1 style picture"),
        ({"weights": "much"}, "weights is 'much'; expected numbers"),
        ({"weights": "0"}, "one of them above 0"),
        ({"image": torch.zeros(1, 8, 8, 3)}, "8 x 8 px; expected at least 16 px"),
        ({"image": torch.zeros(9, 32, 32, 3)}, "There are 9 style pictures; expected 1 to 8"),
        ({"image": torch.zeros(32, 32)}, "The image is"),
        ({"mask": torch.zeros(1, 64, 96)}, "mask is empty"),
        ({"mask": torch.ones(2, 64, 96)}, "mask holds 2 masks; expected one"),
        ({"style_prompt": "oil"}, "clip is not connected"),
        ({"strength": 11.0}, "strength is 11"),
        ({"key_scale": 3.0}, "key_scale is 3"),
        ({"start": 0.8, "end": 0.2}, "start 0.8 and end 0.2"),
        ({"megapixels": 0.0}, "megapixels is 0"),
        ({"vae": None}, "vae is empty"),
    ],
)
def test_bad_inputs_are_refused_before_anything_is_encoded(
    nano, styled, monkeypatch, options, words
):
    def encode(*_):
        raise AssertionError("nothing is encoded")

    monkeypatch.setattr(type(nano[2]), "encode", encode)
    with pytest.raises(ValueError, match=words):
        styled(**options)


def test_other_models_are_refused(run, styled, pack):
    with pytest.raises(ValueError, match="style pictures already"):
        styled(model=styled())
    core = run("K2Loader", model="krea2-nano (built in)", implementation="ComfyUI's own")[0]
    with pytest.raises(ValueError, match="ComfyUI's own implementation of Krea 2, where style"):
        styled(model=core)

    class Flux:
        pass

    class Other:
        model = Flux()

    with pytest.raises(ValueError, match="The model is Flux; expected Krea 2"):
        styled(model=Other())


def test_a_call_without_the_sigmas_of_a_run_is_refused(nano, styled):
    model = styled()
    inner = model.model
    comfy.model_management.load_models_gpu([model])
    inner.current_patcher = model
    conds = inner.extra_conds(
        cross_attn=nano[3][0][0], noise=torch.zeros(1, 16, 1, 8, 12), device=model.load_device
    )
    run = {name: cond.cond for name, cond in conds.items() if name != "c_crossattn"}
    with pytest.raises(ValueError, match="needs the sigmas of the run"):
        inner.diffusion_model(
            torch.zeros(1, 16, 1, 8, 12), torch.ones(1), conds["c_crossattn"].cond,
            transformer_options=model.model_options["transformer_options"], **run,
        )  # fmt: skip
