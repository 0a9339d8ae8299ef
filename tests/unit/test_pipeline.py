"""The whole way from prompt to image beside diffusers' Krea2Pipeline, and every argument."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from krea2_model import Krea2Pipeline, PictureGrid
from krea2_model.checkpoints.transformer import save_transformer
from krea2_model.config import RAW, TURBO
from krea2_model.features.arguments import References
from krea2_model.images.pictures import fit
from krea2_model.images.sizes import is_far
from krea2_model.schedule import shift_mu, sigma_schedule
from krea2_model.transformer.model import patchify
from krea2_model.transformer.references import Reference, ReferenceSettings
from parity import assert_close, relative_error
from samples import picture

SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def pipeline(diffusers_folder):
    return Krea2Pipeline.from_folder(diffusers_folder)


def start(batch=1, seed=0):
    return torch.randn(batch, 16, 8, 12, generator=torch.Generator().manual_seed(seed))


def run_reference(diffusers_pipeline, prompt, latents, **options):
    diffusers_pipeline.set_progress_bar_config(disable=True)
    options = {"output_type": "pt", "max_sequence_length": 64, **SIZE, **options}
    return diffusers_pipeline(prompt, latents=patchify(latents, 2), **options).images


@pytest.mark.parametrize("guidance", [0.0, 3.5])
def test_equals_diffusers(pipeline, diffusers_pipeline, guidance):
    prompts, negative = ["a fox in the snow", "two badgers"], "rain"
    latents = start(batch=2)
    theirs = run_reference(
        diffusers_pipeline,
        prompts,
        latents,
        negative_prompt=negative,
        guidance_scale=guidance,
        num_inference_steps=6,
    )
    ours = pipeline(
        prompts, negative, latents=latents, guidance=guidance, steps=6, output_type="pt", **SIZE
    )
    assert_close(ours, theirs, 1e-4, f"pipeline at guidance {guidance} against diffusers")


def test_latents_equal_diffusers(pipeline, diffusers_pipeline):
    latents = start()
    theirs = run_reference(
        diffusers_pipeline, "a fox", latents, guidance_scale=3.5, output_type="latent"
    )
    ours = pipeline("a fox", latents=latents, guidance=3.5, output_type="latent", **SIZE)
    assert ours.shape == (1, 16, 8, 12)
    assert_close(patchify(ours, 2), theirs, 1e-4, "latents after 28 steps against diffusers")


def test_custom_sigmas_equal_diffusers(pipeline, diffusers_pipeline):
    """diffusers takes them before the shift and without the final 0; here they are final."""
    unshifted, latents = [1.0, 0.7, 0.25], start()
    theirs = run_reference(
        diffusers_pipeline, "a fox", latents, guidance_scale=0.0, sigmas=unshifted
    )
    shift = np.exp(shift_mu(4 * 6))
    final = [shift / (shift + 1 / sigma - 1) for sigma in unshifted] + [0.0]
    ours = pipeline("a fox", latents=latents, guidance=0, sigmas=final, output_type="pt", **SIZE)
    assert_close(ours, theirs, 1e-4, "custom sigmas against diffusers")


def test_given_embeddings_equal_the_prompt(pipeline):
    prompts = ["a fox", "a much longer text about a badger"]
    taps, mask = pipeline.text_encoder.encode(prompts)
    negative, _ = pipeline.text_encoder.encode(["rain"])
    options = {"latents": start(2), "guidance": 2.0, "steps": 2, "output_type": "latent", **SIZE}
    expected = pipeline(prompts, "rain", **options)
    given = pipeline(
        prompt_embeds=taps, prompt_embeds_mask=mask, negative_prompt_embeds=negative, **options
    )
    assert_close(given, expected, 1e-5, "given embeddings against prompts")


def test_no_negative_is_the_empty_prompt(pipeline):
    options = {"latents": start(), "guidance": 2.0, "steps": 1, "output_type": "latent", **SIZE}
    expected = pipeline("a fox", "", **options)
    assert torch.equal(pipeline("a fox", None, **options), expected)


def test_several_images_a_prompt(pipeline):
    options = {"steps": 2, "guidance": 0, "output_type": "latent", **SIZE}
    images = pipeline(["a fox", "a badger"], num_images=2, seed=5, **options)
    assert len(images) == 4
    for index, (prompt, seed) in enumerate([("a fox", 5), ("a fox", 6), ("a badger", 7)]):
        alone = pipeline(prompt, seed=seed, **options)
        assert_close(images[index : index + 1], alone, 1e-5, f"image {index} of a batch")


def test_a_seed_an_image(pipeline):
    options = {"steps": 2, "guidance": 0, "output_type": "latent", **SIZE}
    pair = pipeline("a fox", num_images=2, seed=[9, 3], **options)
    for index, seed in enumerate((9, 3)):
        alone = pipeline("a fox", seed=seed, **options)
        assert_close(pair[index : index + 1], alone, 1e-5, f"seed {seed}")
    assert relative_error(pair[0], pair[1]) > 0.1
    # Behind the last seed comes the first.
    pair = pipeline("a fox", num_images=2, seed=2**64 - 1, **options)
    assert_close(pair[1:], pipeline("a fox", seed=0, **options), 1e-5, "seed 0")


def test_output_types(pipeline):
    options = {"latents": start(), "steps": 1, "guidance": 0, **SIZE}
    (pil,) = pipeline("a fox", **options)
    array = pipeline("a fox", output_type="np", **options)
    tensor = pipeline("a fox", output_type="pt", **options)
    assert pil.size == (96, 64) and array.shape == (1, 64, 96, 3) and tensor.shape == (1, 3, 64, 96)
    assert array.dtype == np.float32 and 0 <= array.min() < array.max() <= 1
    assert np.array_equal(np.asarray(pil), (array[0] * 255).round().astype(np.uint8))
    assert np.array_equal(tensor[0].permute(1, 2, 0).numpy(), array[0])


def test_callback_sees_each_step(pipeline):
    seen = []

    def callback(step, latents, predicted):
        seen.append((step, latents.clone(), predicted.clone()))

    latents = start()
    result = pipeline(
        "a fox",
        latents=latents,
        steps=3,
        guidance=0,
        output_type="latent",
        callback=callback,
        **SIZE,
    )
    assert [step for step, _, _ in seen] == [1, 2, 3]
    assert torch.equal(seen[-1][1], result)
    # The last step ends at sigma 0, where the latents are the prediction.
    assert_close(seen[-1][2], result, 1e-5, "last prediction")
    assert relative_error(seen[0][2], result) > 1e-3


def test_the_official_length_cuts(pipeline):
    long = "fox " * 30
    options = {"latents": start(), "steps": 1, "guidance": 0, "output_type": "latent", **SIZE}
    cut = pipeline(long, max_sequence_length=15, **options)
    assert torch.equal(cut, pipeline("fox " * 9 + "fox", **options))
    assert not torch.equal(cut, pipeline(long, **options))


def test_presets_fill_in_steps_guidance_and_shift(pipeline, monkeypatch):
    seen = {}

    def spy(transformer, noise, positive, negative=None, *, sigmas, guidance, **options):
        seen.update(sigmas=sigmas, guidance=guidance, negative=negative)
        return iter([(1, noise, noise)])

    monkeypatch.setattr("krea2_model.pipeline.stages.denoising_steps", spy)
    for preset, mu in ((RAW, shift_mu(24)), (TURBO, 1.15)):
        monkeypatch.setattr(pipeline.transformer, "preset", preset)
        pipeline("a fox", output_type="latent", **SIZE)
        assert seen["sigmas"] == sigma_schedule(preset.steps, mu)
        assert seen["guidance"] == preset.guidance
        assert (seen["negative"] is None) == (preset is TURBO)


def test_the_folder_says_raw_or_turbo(diffusers_pipeline, pipeline, tmp_path):
    assert pipeline.transformer.variant == "raw" and pipeline.preset == RAW
    save_transformer(pipeline.transformer, tmp_path / "krea2_turbo.safetensors")
    diffusers_pipeline.save_config(tmp_path)
    (tmp_path / "model_index.json").write_text('{"is_distilled": true}')
    diffusers_pipeline.transformer.save_pretrained(tmp_path / "transformer")
    from krea2_model import load_transformer

    assert load_transformer(tmp_path).variant == "turbo"
    assert load_transformer(tmp_path / "transformer").variant == "turbo"


def test_sizes_are_rounded_up_and_said(pipeline, caplog):
    with caplog.at_level(logging.WARNING):
        (image,) = pipeline("a fox", height=33, width=17, steps=1, guidance=0)
    assert image.size == (32, 48)
    assert "height 33 is not a multiple of 16: 48 is used" in caplog.text


def test_latents_give_the_size_by_themselves(pipeline):
    (image,) = pipeline("a fox", latents=start(), steps=1, guidance=0)
    assert image.size == (96, 64)


def test_out_of_memory_decodes_in_tiles(pipeline, monkeypatch):
    def no_memory(latents):
        raise torch.OutOfMemoryError("no memory")

    expected = pipeline.decode(start())
    monkeypatch.setattr(pipeline.vae, "decode", no_memory)
    tiled = []
    original = type(pipeline.vae).decode_tiled

    def decode_tiled(latents):
        tiled.append(latents.shape)
        monkeypatch.undo()
        return original(pipeline.vae, latents)

    monkeypatch.setattr(pipeline.vae, "decode_tiled", decode_tiled)
    assert torch.equal(pipeline.decode(start()), expected)
    assert tiled == [(1, 16, 8, 12)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt": []}, "expected a text or a list of texts"),
        ({"prompt": [3]}, "expected a text or a list of texts"),
        ({"negative_prompt": ["a", "b"], "guidance": 1}, "a list of 1 text,"),
        ({"height": 0}, "height is 0; expected"),
        ({"width": -16}, "width is -16; expected"),
        ({"width": 100_000}, "width is 100000; expected"),
        ({"height": 64.0}, "height is 64.0; expected"),
        ({"steps": 0}, "steps is 0; expected"),
        ({"guidance": float("nan")}, "guidance is nan; expected"),
        ({"guidance": -1}, "guidance is -1; expected"),
        ({"num_images": 0}, "num_images is 0; expected"),
        ({"seed": [1, 2]}, "a list of 1"),
        ({"seed": 1.5}, "expected a whole number"),
        ({"seed": 2**64}, "seed is 18446744073709551616; expected a whole number from 0 to"),
        ({"seed": -1}, "seed is -1; expected"),
        ({"seed": [2**70]}, "seed is 1180591620717411303424; expected"),
        ({"guidance": 1e30}, "guidance is 1e[+]30; expected 0 .off. or more, up to 100"),
        ({"guidance": 100.5}, "guidance is 100.5; expected"),
        ({"latents": torch.zeros(2, 16, 8, 8)}, "latents has shape"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents has shape"),
        ({"latents": torch.zeros(1, 16, 8, 8), "height": 96}, "latents has shape"),
        ({"latents": torch.full((1, 16, 8, 8), torch.nan)}, "latents has NaN or infinite values"),
        ({"sigmas": [1.0, 0.5]}, "end in 0"),
        ({"layer_weights": [1, 2]}, r"taps are \[1.0, 2.0\]; expected 12 numbers"),
        ({"max_sequence_length": 3}, "max_sequence_length is 3"),
        ({"output_type": "jpg"}, "output_type is 'jpg'"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 12, 60)}, "needs .* 12, 64"),
    ],
)
def test_bad_arguments(pipeline, options, message):
    arguments = {"prompt": "a fox", "steps": 1, "guidance": 0, **options}
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_what_costs_time_comes_after_the_checks(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "encode_prompt", None)
    with pytest.raises(ValueError, match="expected 12 numbers, not all of them 0"):
        pipeline("a fox", layer_weights=[0] * 12, **SIZE)


def test_stages_and_grids_name_bad_arguments(pipeline):
    text = pipeline.encode_prompt("a fox")
    with pytest.raises(ValueError, match="guidance is '1'; expected 0 .off. or more"):
        pipeline.denoise(torch.zeros(1, 16, 8, 8), text, sigmas=[1, 0], guidance="1")
    with pytest.raises(ValueError, match="axes is 'seed'; expected arguments and their values"):
        PictureGrid(pipeline, "seed")
    with pytest.raises(ValueError, match="is a folder; expected a .safetensors file in it"):
        pipeline.load_lora(Path(__file__).parent)


def test_mask_of_another_shape(pipeline):
    taps, _ = pipeline.text_encoder.encode(["a fox"])
    with pytest.raises(ValueError, match="The mask has shape"):
        pipeline(prompt_embeds=taps, prompt_embeds_mask=torch.ones(1, 2), **SIZE)


def test_parts_that_do_not_belong_together(pipeline):
    from dataclasses import replace

    from krea2_model import Krea2Transformer

    wider = Krea2Transformer(replace(pipeline.transformer.config, text_hidden_dim=128))
    with pytest.raises(ValueError, match="12 layers of width 64.*needs 12 of width 128"):
        Krea2Pipeline(wider, pipeline.text_encoder, pipeline.vae)


def test_start_image_is_the_flow_from_that_image(pipeline):
    """Noise and image mixed at the first sigma, and the steps from there."""
    image, latents = picture(64, 96), start()
    options = {"steps": 4, "guidance": 0, "output_type": "latent"}
    found = pipeline("a fox", start_image=image, denoise=0.6, latents=latents, **options)
    sigmas = sigma_schedule(4, shift_mu(4 * 6), 0.6)
    mixed = sigmas[0] * latents + (1 - sigmas[0]) * pipeline.encode(image[None])
    expected = pipeline("a fox", latents=mixed, sigmas=sigmas, **options, **SIZE)
    assert_close(found, expected, 1e-5, "image to image by hand")
    # Nothing of the image is left at 1, and nearly all at almost 0.
    whole = pipeline("a fox", start_image=image, latents=latents, **options)
    assert torch.equal(whole, pipeline("a fox", latents=latents, **options, **SIZE))
    kept = pipeline("a fox", start_image=image, denoise=1e-6, latents=latents, **options)
    assert_close(kept, pipeline.encode(image[None]), 1e-4, "denoise of almost 0")


def test_start_image_sizes(pipeline):
    options = {"steps": 1, "guidance": 0, "denoise": 0.5, "output_type": "pt"}
    assert pipeline("a fox", start_image=picture(70, 100), **options).shape[2:] == (64, 96)
    sized = pipeline("a fox", start_image=picture(70, 100), height=48, width=80, **options)
    assert sized.shape[2:] == (48, 80)
    with pytest.raises(ValueError, match="both height and width"):
        pipeline("a fox", start_image=picture(70, 100), height=48, **options)
    with pytest.raises(ValueError, match="give start_image"):
        pipeline("a fox", **options)
    with pytest.raises(ValueError, match="start_image is fox.png, which is not there"):
        pipeline("a fox", start_image="fox.png", **options)


def test_references_are_looked_at(pipeline):
    """As pictures, as latents, and by their settings."""
    options = {"steps": 2, "guidance": 0, "output_type": "latent", "latents": start(), **SIZE}
    image = picture(70, 100)
    found = pipeline("a fox", references=[image], **options)
    shrunk = Reference(pipeline.encode(fit(image, 96, 64)[None]))
    assert_close(found, pipeline("a fox", references=[shrunk], **options), 1e-6, "as latents")
    none = pipeline("a fox", **options)
    assert relative_error(found, none) > 1e-3
    off = Reference(shrunk.latents, ReferenceSettings(strength=0))
    assert torch.equal(pipeline("a fox", references=[off], **options), none)
    apart = pipeline("a fox", references=References([image], cache=True), **options)
    assert relative_error(apart, found) > 1e-4
    shared = pipeline("a fox", references=References([image], "index"), **options)
    assert relative_error(shared, found) > 1e-4
    small = pipeline("a fox", references=References([image], max_megapixels=0.001), **options)
    assert relative_error(small, found) > 1e-4
    with pytest.raises(ValueError, match="an entry of references"):
        pipeline("a fox", references=["fox.png"], **options)


@pytest.mark.parametrize("width, height, known", [
    (128, 128, True), (160, 96, True), (128, 112, True), (256, 256, False), (64, 64, False),
    (192, 96, False),
])  # fmt: skip
def test_sizes_that_a_checkpoint_does_not_know_are_warned_of(caplog, width, height, known):
    """krea2-nano knows one area; the released models up to four times theirs."""
    nano = Krea2Pipeline.nano("turbo")
    nano("a star", width=width, height=height, steps=1, output_type="latent")
    assert ("far from the 128 x 128 this checkpoint" not in caplog.text) == known
    assert not is_far(2048, 2048, 1024) and not is_far(512, 2048, 1024) and is_far(2064, 2048, 1024)


def test_the_stages_are_the_call(pipeline):
    options = {"steps": 2, "guidance": 1.5}
    expected = pipeline("a fox", "rain", seed=3, output_type="pt", **options, **SIZE)
    positive, negative = (pipeline.encode_prompt([text]) for text in ("a fox", "rain"))
    latents = pipeline.prepare_latents(seed=3, **SIZE)
    sigmas, seen = pipeline.schedule(latents, steps=2), []
    latents = pipeline.denoise(
        latents, positive, negative, sigmas=sigmas, guidance=1.5,
        callback=lambda step, latents, predicted: seen.append(step),
    )  # fmt: skip
    assert seen == [1, 2] and torch.equal(pipeline.decode(latents), expected)
    # Half of the way in one call, the rest in another.
    latents = pipeline.prepare_latents(seed=3, **SIZE)
    for part in (sigmas[:2], sigmas[1:]):
        latents = pipeline.denoise(
            latents, positive, negative, sigmas=part, guidance=1.5, partial=True
        )
    assert torch.equal(pipeline.decode(latents), expected)


def test_start_latents_are_image_and_noise(pipeline):
    image = picture(32, 64)
    encoded = pipeline.encode(image[None])
    start = pipeline.prepare_latents(2, start_image=image, sigma=0.25, seed=4)
    noise = pipeline.prepare_latents(2, seed=4, height=start.shape[2] * 8, width=start.shape[3] * 8)
    assert_close(start, 0.75 * encoded + 0.25 * noise, 1e-6, "start at sigma 0.25")
    decoded = pipeline.decode(encoded)
    assert decoded.dtype == torch.float32 and decoded.min() >= 0 and decoded.max() <= 1


def test_embeds_check_their_mask(pipeline):
    positive = pipeline.encode_prompt(["a fox", "a fox in the snow"])
    with pytest.raises(ValueError, match="mask"):
        replace(positive, mask=positive.mask[:1])
