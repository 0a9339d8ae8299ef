"""The vision tower beside transformers' Qwen3-VL, in float32 with random weights."""

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from krea2_model.config import VisionConfig
from krea2_model.text.vision import (
    Qwen3VLVisionTower,
    infer_vision_config,
    resize_for_tower,
    vision_keys,
)
from parity import assert_close
from samples import picture

SMALL = VisionConfig(
    depth=4, hidden_size=128, intermediate_size=192, num_heads=2, out_hidden_size=96,
    num_position_embeddings=144, deepstack_visual_indexes=(0, 1, 2),
)  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = Qwen3VLVisionModel(
        Qwen3VLVisionConfig(
            depth=4, hidden_size=128, intermediate_size=192, num_heads=2, out_hidden_size=96,
            num_position_embeddings=144, deepstack_visual_indexes=[0, 1, 2],
        )
    ).eval()  # fmt: skip
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.08)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def ours(theirs):
    state = theirs.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert infer_vision_config(shapes) == SMALL
    tower = Qwen3VLVisionTower(SMALL)
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    tower.load_state_dict(state)
    return tower.requires_grad_(False)


@pytest.mark.parametrize("height, width", [(64, 64), (32, 96), (224, 160), (384, 384)])
def test_tokens_and_deepstack_equal_transformers(ours, theirs, height, width):
    pixels = picture(height, width)
    processor = Qwen2VLImageProcessor(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_rescale=False, do_resize=False
    )
    inputs = processor(images=pixels, return_tensors="pt")
    expected = theirs(inputs["pixel_values"], inputs["image_grid_thw"])
    found = ours(pixels)
    assert found.grid == (height // 32, width // 32)
    assert len(found.tokens) == found.grid[0] * found.grid[1]
    assert_close(found.tokens, expected.pooler_output, 1e-5, f"tokens of {width} x {height}")
    for index, features in enumerate(expected.deepstack_features):
        assert_close(found.deepstack[index], features, 1e-5, f"DeepStack {index}")


def test_the_released_sizes_are_found():
    """On meta: names and shapes of Qwen3-VL-4B's tower."""
    with torch.device("meta"):
        theirs = Qwen3VLVisionModel(
            Qwen3VLVisionConfig(
                depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16,
                out_hidden_size=2560, deepstack_visual_indexes=[5, 11, 17],
            )
        )  # fmt: skip
        ours = Qwen3VLVisionTower(VisionConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert infer_vision_config(shapes) == VisionConfig()
    own = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert set(own) == set(shapes)
    different = [name for name in own if own[name] != shapes[name]]
    assert different == ["patch_embed.proj.weight"]


@pytest.mark.parametrize("prefix", ["model.visual.", "visual.", "text_encoders.x.model.visual."])
def test_names_in_files(ours, prefix):
    names = [prefix + name for name in ours.state_dict()]
    keys = vision_keys([*names, "model.layers.0.mlp.up_proj.weight"])
    assert set(keys) == set(names) and set(keys.values()) == set(ours.state_dict())
    assert vision_keys(["model.layers.0.mlp.up_proj.weight"]) == {}


@pytest.mark.parametrize("size, options, expected", [
    ((100, 100), {}, (96, 96)),
    ((384, 384), {}, (384, 384)),
    ((1024, 1024), {}, (384, 384)),
    ((1080, 1920), {}, (288, 512)),
    ((64, 64), {"enlarge": True}, (384, 384)),
    ((1, 1), {}, (32, 32)),
    ((10, 1000), {}, (32, 992)),
    ((4000, 100), {}, (2304, 64)),
    ((700, 500), {"max_side": 1024}, (704, 512)),
])  # fmt: skip
def test_fitted_sizes(size, options, expected):
    limit = options.get("max_side", 384)
    fitted = resize_for_tower(picture(*size), **options)
    assert tuple(fitted.shape[1:]) == expected
    assert expected[0] * expected[1] <= max(limit**2, 32 * max(size) + 32 * 32)
    assert fitted.min() >= 0 and fitted.max() <= 1


def test_a_fitted_image_is_the_same_picture():
    smooth = torch.linspace(0, 1, 512).expand(3, 512, 512)
    fitted = resize_for_tower(smooth)
    expected = torch.linspace(0, 1, 384).expand(3, 384, 384)
    assert (fitted - expected).abs().max() < 0.01
    exact = picture(64, 96)
    assert resize_for_tower(exact) is exact


@pytest.mark.parametrize("shape, message", [
    ((4, 32, 32), "shape .4, 32, 32.; expected .3"), ((3, 0, 32), "shape .3, 0, 32."),
    ((3, 2, 1000), "1000 x 2 px; expected one side at most 200 times"),
])  # fmt: skip
def test_bad_images_are_named(shape, message):
    with pytest.raises(ValueError, match=message):
        resize_for_tower(torch.zeros(shape))


def test_sizes_the_tower_cannot_take_are_named(ours):
    with pytest.raises(ValueError, match="shape .3, 40, 64.*both sides multiples of 32"):
        ours(torch.zeros(3, 40, 64))
    with pytest.raises(ValueError, match="max_side is 16"):
        resize_for_tower(torch.zeros(3, 64, 64), max_side=16)
