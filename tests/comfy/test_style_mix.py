"""Style mixes through a real ComfyUI, beside what they are made of."""

import pytest
import torch

from parity import assert_close, relative_error
from samples import image

WEIGHTS = "krea2_token_weights"
# Where an image's tokens stand behind `Picture 1: <|vision_start|>`.
FIRST = 6


@pytest.fixture(scope="module")
def clip(models, run):
    return run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")[0]


@pytest.fixture(scope="module")
def vae(models, run):
    return run("K2VAELoader", file="qwen_image_vae_tiny.safetensors")[0]


@pytest.fixture
def mix(run, clip):
    """The node by preset custom, through the prompt alone unless asked otherwise."""

    def call(*images, **inputs):
        given = {f"image_{n}": batch for n, batch in enumerate(images, 1)}
        options = {"prompt": "a fox", "preset": "custom", "through": "prompt"} | given | inputs
        return run("K2StyleMix", clip=clip, **options)[0][0]

    return call


@pytest.fixture
def plain(run, clip):
    return run("K2TextEncode", clip=clip, prompt="a fox")[0][0]


@pytest.fixture
def behind(run, clip):
    """The prompt behind one image, by Krea 2 Prompt with Images."""
    return lambda picture: run("K2TextEncodeImages", clip=clip, prompt="a fox", image_1=picture)[0][
        0
    ]


def test_strength_0_is_the_plain_prompt(mix, plain, vae):
    for options in ({}, {"preset": "style-reference LoRA"}, {"preset": "no LoRA"}):
        states, extra = mix(image(seed=1), image(seed=2), strength=0.0, vae=vae, **options)
        assert torch.equal(states, plain[0])
        assert not {WEIGHTS, "reference_latents"} & extra.keys()


def test_one_style_is_the_prompt_behind_its_image(mix, behind):
    states, extra = mix(image(seed=1))
    assert torch.equal(states, behind(image(seed=1))[0])
    assert WEIGHTS not in extra


def test_a_mix_is_the_average_and_lies_between(mix, behind):
    first, second = (behind(image(seed=seed))[0] for seed in (1, 2))
    even, uneven = (
        mix(image(seed=1), image(seed=2))[0],
        mix(image(seed=1), image(seed=2), shares="3, 1")[0],
    )
    assert_close(even, (first + second) / 2, 1e-6, "two styles at a half")
    assert_close(uneven, 0.75 * first + 0.25 * second, 1e-6, "two styles at 3 to 1")
    apart = relative_error(first, second)
    for one in (first, second):
        assert relative_error(even, one) < 0.7 * apart
    assert torch.equal(mix(image(seed=1), image(seed=2), shares="0, 1")[0], second)


def test_equal_images_are_one(mix):
    assert torch.equal(mix(image(seed=1), image(seed=1))[0], mix(image(seed=1))[0])
    assert_close(
        mix(image(seed=1), image(seed=1), shares="1 2")[0], mix(image(seed=1))[0], 1e-6, "1 to 2"
    )


def test_strength_moves_the_words_and_weighs_the_images(mix, plain, behind):
    words = plain[0].shape[1]
    whole = behind(image(seed=1))[0]
    for strength in (0.25, 1.5):
        states, extra = mix(image(seed=1), strength=strength)
        expected = plain[0] + strength * (whole[:, -words:] - plain[0])
        assert_close(states[:, -words:], expected, 1e-6, f"words at strength {strength}")
        assert torch.equal(states[:, :-words], whole[:, :-words])
        weights = torch.ones(1, states.shape[1])
        weights[:, FIRST : FIRST + 6] = strength
        assert torch.equal(extra[WEIGHTS], weights)


def test_weights_of_words_stay(mix, clip, run):
    expected = run("K2TextEncode", clip=clip, prompt="a (red:1.5) fox")[0][0][1][WEIGHTS]
    _, extra = mix(image(seed=1), prompt="a (red:1.5) fox")
    assert torch.equal(extra[WEIGHTS][:, -expected.shape[1] :], expected)
    assert (extra[WEIGHTS][:, : -expected.shape[1]] == 1).all()


def test_suppression_leaves_the_mean(mix, behind):
    whole = behind(image(seed=1))[0]
    pictured = slice(FIRST, FIRST + 6)
    for suppression in (0.5, 1.0):
        states = mix(image(seed=1), suppression=suppression)[0]
        mean = whole[:, pictured].mean(dim=1, keepdim=True)
        expected = torch.lerp(whole[:, pictured], mean.expand(-1, 6, -1), suppression)
        assert_close(states[:, pictured], expected, 1e-6, f"suppression {suppression}")
        assert torch.equal(states[:, FIRST + 6 :], whole[:, FIRST + 6 :])


def test_a_first_line_break_changes_nothing(mix):
    assert torch.equal(mix(image(seed=1), prompt="\n\n a fox")[0], mix(image(seed=1))[0])


def test_images_of_other_shapes_are_cropped_to_the_first(mix):
    states = mix(image(seed=1), image(96, 64, 2))[0]
    assert states.shape == mix(image(seed=1), image(seed=2))[0].shape
    middle = image(96, 64, 2)[:, :, :, :]
    assert relative_error(states, mix(image(seed=1), middle[:, 24:72])[0]) < 0.5


def test_references_share_the_strength(mix, vae, run, turbo, latent):
    """All at one place: two equal images are one."""

    def sampled(*images, **options):
        text = mix(*images, through="references", vae=vae, **options)
        assert text[0].shape[1] == mix(image(seed=1), strength=0.0)[0].shape[1]
        options = {"preset": "custom", "steps": 1, "guidance": 0.0, "seed": 5}
        return run("K2Sampler", model=turbo, positive=[text], latent=latent, **options)[0][
            "samples"
        ]

    one = sampled(image(seed=1), strength=1.5)
    assert_close(sampled(image(seed=1), image(seed=1), strength=1.5), one, 1e-5, "equal references")
    settings = mix(image(seed=1), image(seed=2), through="references", vae=vae, shares="3 1")[1]
    assert [s.strength for s in settings["krea2_references"]] == [0.75, 0.25]
    assert {s.index for s in settings["krea2_references"]} == {1}


def test_the_negative_gets_the_references(run, clip, vae):
    inputs = {"prompt": "a fox", "image_1": image(seed=1), "image_2": image(seed=2), "vae": vae}
    positive, negative = run("K2StyleMix", clip=clip, **inputs)[:2]
    plain = run("K2TextEncode", clip=clip, prompt="")[0][0][0]
    assert torch.equal(negative[0][0], plain)
    for one, other in zip(
        *(text[0][1]["reference_latents"] for text in (positive, negative)), strict=True
    ):
        assert torch.equal(one, other)


def test_presets(run, clip, vae):
    inputs = {"prompt": "a fox", "image_1": image(seed=1), "vae": vae}
    lora = run("K2StyleMix", clip=clip, **inputs)[0][0]
    custom = run("K2StyleMix", clip=clip, preset="custom", **inputs)[0][0]
    assert torch.equal(lora[0], custom[0]) and "reference_latents" in lora[1]
    without = run("K2StyleMix", clip=clip, preset="no LoRA", **inputs)[0][0]
    assert "reference_latents" not in without[1]
    # Without labels: one token in front of the image's six, all of them alike.
    pictured = without[0][:, 1:7]
    assert_close(pictured, pictured[:, :1].expand_as(pictured), 1e-6, "suppressed")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shares": "0"}, "one of them above 0"),
        ({"shares": "-1"}, "0 or more"),
        ({"shares": "1, 2, 3"}, "at most one each"),
        ({"shares": "many"}, "expected numbers"),
        ({"strength": -0.1}, "strength is -0.1"),
        ({"strength": 4.0}, "expected 0"),
        ({"suppression": 1.5}, "suppression is 1.5"),
        ({"preset": "none"}, "preset is 'none'"),
        ({"through": "none"}, "through is 'none'"),
        ({"through": "references"}, "vae is not connected"),
        ({"preset": "style-reference LoRA"}, "vae is not connected"),
        ({"image_1": torch.zeros(0, 8, 8, 3)}, "1 or more"),
        ({"image_2": torch.rand(8, 32, 32, 3)}, "9 style images"),
        ({"clip": None}, "clip is empty"),
    ],
)
def test_bad_input(run, clip, options, message):
    inputs = {"clip": clip, "prompt": "a fox", "image_1": image(seed=1), "preset": "custom"}
    with pytest.raises(ValueError, match=message):
        run("K2StyleMix", **(inputs | {"through": "prompt"} | options))


def test_a_file_without_a_vision_tower_is_refused_by_name(models, run, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(models / "text_encoders" / "qwen3vl_tiny.safetensors")
    path = models / "text_encoders" / "blind.safetensors"
    save_file({n: t for n, t in tensors.items() if "visual." not in n}, path)
    blind = run("K2TextEncoderLoader", file="blind.safetensors")[0]
    with pytest.raises(ValueError, match="vision"):
        run("K2StyleMix", clip=blind, prompt="a fox", image_1=image(seed=1), preset="no LoRA")
    path.unlink()
