"""Controls on quantised weights and in tiles: what plain weights and the whole give."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import formats
from krea2_model import Control, Krea2Pipeline, TileSettings, nano
from krea2_model.checkpoints.quantised_layers import QuantisedLinear
from krea2_model.features.tiles import tiles_at
from parity import assert_close, relative_error

LORA = nano.CONTROL_LORA.name
FORMS = {
    "fp8": formats.float8,
    "int8 convrot": lambda tensors: formats.int8(tensors, group=256),
    "Q8_0": "Q8_0",
    "Q4_K": "Q4_K",
}
RUN = {"steps": 1, "width": 96, "height": 64, "output_type": "latent"}


@pytest.fixture(scope="module")
def lines():
    image = torch.zeros(3, 64, 96)
    image[:, 16:48, 30:32] = image[:, 16:48, 60:62] = image[:, 16:18, 30:62] = 1
    return image


@pytest.fixture(scope="module")
def mask():
    mask = torch.zeros(64, 96)
    mask[:, 40:] = 1
    return mask


@pytest.fixture(scope="module")
def controls(lines, mask):
    """Two: everywhere, and weakly in a part of the picture from the middle of the run on."""
    return [Control(LORA, lines), Control(LORA, lines.flip(2), -0.4, mask=mask)]


@pytest.fixture(scope="module")
def turbo():
    return Krea2Pipeline.nano()


def with_transformer(file, **options):
    return Krea2Pipeline.from_files(file, nano.text_encoder_file(), nano.VAE, **options)


@pytest.mark.parametrize("form", FORMS)
def test_quantised_weights_give_what_their_numbers_give(controls, tmp_path, form):
    tensors, write = load_file(nano.TRANSFORMERS["turbo"]), FORMS[form]
    file = tmp_path / "krea2_turbo.gguf"
    if isinstance(write, str):
        formats.gguf_file(tensors, file, write)
    else:
        stored, _, metadata = write(tensors)
        file = tmp_path / "krea2_turbo.safetensors"
        save_file({name: part.contiguous() for name, part in stored.items()}, file, metadata)
    pipelines = [
        with_transformer(file, dtype=torch.float32, keep_quantised=kept) for kept in (True, False)
    ]
    assert any(isinstance(part, QuantisedLinear) for part in pipelines[0].transformer.modules())
    found, expected = (each("a red star", control=controls, **RUN) for each in pipelines)
    assert_close(found, expected, 1e-5, form)
    assert relative_error(found, pipelines[0]("a red star", **RUN)) > 0.05


@pytest.mark.parametrize("sides", [(96, 64), (112, 80)])
def test_a_tile_gets_what_the_whole_gets_at_its_place(controls, turbo, sides):
    """The embedded tokens of a tile are those of the whole, image, controls and masks alike."""
    seen = []
    size = {"width": sides[0], "height": sides[1]}
    settings = TileSettings(64)
    grid = sides[1] // 16, sides[0] // 16

    def embedded(**options):
        seen.clear()
        blocks = turbo.transformer.blocks
        hook = blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        try:
            turbo("a red star", **RUN | size | {"control": controls} | options)
        finally:
            hook.remove()
        return list(seen)

    (whole,) = embedded()
    tiles = tiles_at(grid, settings, 1.0)
    parts = embedded(tiles=settings)
    assert len(parts) == len(tiles) > 1
    image = whole[:, -grid[0] * grid[1] :].movedim(1, 2)
    for (tile, _), part in zip(tiles, parts, strict=True):
        expected = tile.cut_tokens(image, grid).movedim(2, 1)
        assert_close(part[:, -expected.shape[1] :], expected, 1e-5, str(tile))
    plain = embedded(control=None)[0][:, -grid[0] * grid[1] :].movedim(1, 2)
    assert relative_error(image, plain) > 0.05
