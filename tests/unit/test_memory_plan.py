"""Plans for the memory of a device, by counting: released sizes on tensors without content."""

import logging
from dataclasses import replace

import pytest
import torch

from krea2_model import (
    Krea2Transformer,
    Qwen3VLTextEncoder,
    QwenImageVAE,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
)
from krea2_model.checkpoints.quantised_layers import QuantisedLinear
from krea2_model.checkpoints.quantised_weight import QuantisedWeight
from krea2_model.features.style_transfer import StylePictures, StyleRun, StyleSettings
from krea2_model.guidance import unshifted
from krea2_model.memory.activations import activations
from krea2_model.memory.block_stream import PLACES, BlockStream
from krea2_model.memory.machine import GB
from krea2_model.memory.offload import offload_parts
from krea2_model.memory.plan import (
    BLOCKS,
    ENCODER,
    NONE,
    PARTS,
    RESERVE,
    TRANSFORMER,
    VAE,
    PartSize,
    plan_for,
)
from krea2_model.nn.partial_attention import Partial
from krea2_model.transformer.backend import ExtendedBackend
from krea2_model.transformer.text_attention import TextStates
from live_bytes import LiveBytes

META, BF16 = torch.device("meta"), torch.bfloat16
# Bytes a value of what is stored.
STORED = {"float8_e4m3fn": (torch.float8_e4m3fn, 1.0), "Q4_K": (torch.uint8, 144 / 256)}


def quantise(model, form, part):
    """Let the matrices of blocks be stored in a form."""
    dtype, size = STORED[form]
    for path, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and part in path:
            rows, columns = layer.weight.shape
            data = torch.empty(rows, round(columns * size), dtype=dtype, device=META)
            stored = {"weight": data, "weight_scale": torch.empty((), device=META)}
            if form == "Q4_K":
                del stored["weight_scale"]
            above, _, own = path.rpartition(".")
            made = QuantisedLinear(QuantisedWeight(form, (rows, columns), stored), None, BF16)
            model.get_submodule(above)._modules[own] = made
    return model


def attend(query, key, value, mask=None):
    """As a fused kernel does it, which holds no scores."""
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1] * query.shape[3])


def partially(query, key, value, mask=None):
    """Likewise, for a part of the keys."""
    return Partial(torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32))


@pytest.fixture(scope="module")
def released():
    """Makes the parts at their released sizes, blocks stored in a form or None for bf16."""
    options = {"device": META, "dtype": BF16}

    def make(form, encoder_form=None, layers=None):
        config, encoder_config = TransformerConfig(), TextEncoderConfig()
        if layers is not None:  # the others take no more activations
            config = replace(config, num_layers=layers)
            encoder_config = replace(encoder_config, tap_layers=tuple(range(12)))
        parts = (
            Krea2Transformer(config, **options),
            Qwen3VLTextEncoder(encoder_config, attend=attend, **options),
            QwenImageVAE(VAEConfig(), **options),
        )
        for part, stored, where in zip(
            parts, (form, encoder_form), ("blocks.", "layers."), strict=False
        ):
            part.requires_grad_(False)
            if stored is not None:
                quantise(part, stored, where)
        return parts

    return make


@pytest.fixture
def host(monkeypatch):
    """Main memory without content, to pack blocks into."""
    memory = [torch.empty(GB, dtype=torch.uint8, device=META) for _ in range(PLACES)]
    monkeypatch.setattr(
        BlockStream, "_host_memory", lambda self, size: memory[len(self._staging)][:size]
    )
    monkeypatch.setattr("krea2_model.memory.offload.free_host_bytes", lambda: 0)
    monkeypatch.setattr("krea2_model.transformer.backend.attend", attend)


def peak_of(function):
    with LiveBytes("meta") as counted:
        result = function()
    return counted.peak, result


def paint(transformer, offload, taps, pixels, batch=1):
    """A step of the transformer behind the fusion of its text."""
    side = pixels // 8
    with torch.no_grad(), offload.use(TRANSFORMER):
        states = transformer.fuse_text(taps.expand(batch, -1, -1, -1))
        latents = torch.empty(batch, 16, side, side, device=META)
        return transformer(latents, torch.empty(batch, device=META), states)


def encode(encoder, offload, text):
    with torch.no_grad(), offload.use(ENCODER):
        return encoder(torch.empty(1, text, device=META, dtype=torch.long))


def decode(vae, offload, pixels):
    side = pixels // 8
    with torch.no_grad(), offload.use(VAE):
        return vae.decode(torch.empty(1, 16, side, side, device=META))


FP8 = "float8_e4m3fn"
CASES = {
    "fp8, 12 GB": (FP8, None, 12, 1024, BLOCKS, {TRANSFORMER}),
    "fp8, 6 GB": (FP8, None, 6, 1024, BLOCKS, {ENCODER, TRANSFORMER}),
    "Q4_K, 12 GB": ("Q4_K", None, 12, 1024, PARTS, set()),
    "bf16, 12 GB": (None, None, 12, 1024, BLOCKS, {TRANSFORMER}),
    "bf16, 48 GB": (None, None, 48, 1024, NONE, set()),
    "fp8, 24 GB, 2048 px": (FP8, FP8, 24, 2048, PARTS, set()),
}


@pytest.mark.parametrize("case", CASES)
def test_plans_of_released_sizes(released, case):
    form, encoder_form, gigabytes, pixels, mode, streaming = CASES[case]
    parts = released(form, encoder_form)
    offload = offload_parts(*parts, META, "auto", gigabytes)
    offload.prepare(activations(*parts, batch=1, image=(pixels // 16) ** 2))
    assert offload.plan.mode == mode and offload.plan.lacking == 0
    assert offload.plan.resident.keys() == streaming


def test_fp8_turbo_at_1024_px_runs_within_12_gb(released, host):
    parts = released(FP8)
    offload = offload_parts(*parts, META, "auto", 12)
    offload.prepare(activations(*parts, batch=1, image=4096))
    taps = torch.empty(1, 512, 12, 2560, dtype=BF16, device=META)
    peak, _ = peak_of(lambda: paint(parts[0], offload, taps, 1024))
    # As many blocks are resident as there is room for.
    assert 11 * GB < peak <= 12 * GB - RESERVE
    assert 0 < offload.plan.resident[TRANSFORMER] < 28


def test_activations_are_bounds(released, host):
    """As parts come as a whole, so what is beyond their weights are activations."""
    parts = transformer, encoder, vae = released(FP8, FP8, layers=2)
    weights = [sum(tensor.nbytes for tensor in part.state_dict().values()) for part in parts]
    offload, batch, pixels, text = offload_parts(*parts, META, "parts", None), 2, 1024, 512
    estimates = activations(*parts, batch=batch, image=(pixels // 16) ** 2, text=text)
    offload.prepare(estimates)
    encoding, taps = peak_of(lambda: encode(encoder, offload, text))
    painting, _ = peak_of(lambda: paint(transformer, offload, taps, pixels, batch))
    decoding, _ = peak_of(lambda: decode(vae, offload, pixels))
    assert 0.7 * estimates[TRANSFORMER] < painting - weights[0] <= estimates[TRANSFORMER]
    assert encoding - weights[1] <= estimates[ENCODER]
    assert decoding - weights[2] <= estimates[VAE]


def test_style_pictures_are_within_the_bounds(released, host, monkeypatch):
    """Keys and values of one step for two pictures, the passes that give them, and the image's."""
    transformer, encoder, vae = released(FP8, FP8, layers=12)
    pictures = [torch.empty(1, 16, side, 128, device=META, dtype=BF16) for side in (128, 64)]
    latents = torch.empty(2, 16, 128, 128, device=META, dtype=BF16)
    states = torch.empty(1, 512, transformer.config.hidden_size, device=META, dtype=BF16)
    style = StyleRun(StyleSettings(), StylePictures(pictures, (0.5, 0.5)),
                     TextStates(states[:, :5]), unshifted)  # fmt: skip

    def evaluate(own, sigma, recorder):
        time = torch.empty(1, device=META)
        backend = ExtendedBackend(None, recorder)
        return transformer(own, time, style.text.states, backend=backend)

    def step():
        with torch.no_grad():
            style.record(0.0, pictures, 12, evaluate)
            keys = style.keys(0.0, transformer, (64, 64), META)
            time, text = torch.empty(2, device=META), states.expand(2, -1, -1)
            return transformer(latents, time, text, backend=ExtendedBackend(style=keys))

    bounds = [
        activations(transformer, encoder, vae, batch=2, image=4096, styles=tokens)[TRANSFORMER]
        for tokens in ((), (4096, 2048))
    ]
    monkeypatch.setattr("krea2_model.transformer.backend.attend_partially", partially)
    peak, _ = peak_of(step)
    assert bounds[0] < peak <= bounds[1] < 1.5 * peak


def size(name, weights, blocks=0):
    each = (round(0.9 * weights * GB / blocks),) * blocks if blocks else ()
    return PartSize(name, round(weights * GB), GB // 10, each, kind="fp8" if blocks else "")


PARTS_OF_12_GB = (size(ENCODER, 8.0, 35), size(TRANSFORMER, 12.9, 28), size(VAE, 0.3))


@pytest.mark.parametrize(
    "gigabytes, mode, words",
    [
        (None, NONE, "offload none (encoder 8.0 GB fp8, transformer 12.9 GB fp8, VAE 0.3 GB, all"),
        (24, NONE, "all at once)"),
        (16, PARTS, "offload parts (encoder 8.0 GB fp8, transformer 12.9 GB fp8, VAE 0.3 GB in"),
        (11, BLOCKS, "transformer 12.9 GB fp8 with 20 of 28 blocks resident, VAE 0.3 GB in turn)"),
        (6, BLOCKS, "encoder 8.0 GB fp8 with 20 of 35 blocks resident"),
    ],
)
def test_the_first_plan_that_fits_is_chosen(gigabytes, mode, words):
    budget = None if gigabytes is None else gigabytes * GB
    plan = plan_for("auto", PARTS_OF_12_GB, budget)
    assert plan.mode == mode and words in plan.text and plan.lacking == 0


def test_asked_plans_are_followed_and_say_what_they_lack():
    assert plan_for("parts", PARTS_OF_12_GB, None).mode == PARTS
    assert plan_for("blocks", PARTS_OF_12_GB, None).resident == {ENCODER: 0, TRANSFORMER: 0}
    assert plan_for("blocks", PARTS_OF_12_GB, 40 * GB).resident == {}
    assert (
        plan_for("parts", PARTS_OF_12_GB, 11 * GB).lacking == 12.9 * GB + GB // 10 + RESERVE - 11e9
    )
    assert plan_for("auto", PARTS_OF_12_GB, GB).lacking > GB


def test_after_memory_ran_out_less_is_on_the_device(released, monkeypatch):
    parts = released(FP8)
    monkeypatch.setattr("krea2_model.memory.offload.free_device_bytes", lambda device: 24 * GB)
    offload = offload_parts(*parts, META, "auto", None)
    estimates = activations(*parts, batch=1, image=4096)
    offload.prepare(estimates)
    assert offload.plan.mode == NONE
    for name in (ENCODER, VAE):
        with offload.use(name):
            pass
        assert offload._copies[name].bytes > 0
    with pytest.raises(torch.OutOfMemoryError), offload.use(VAE):
        raise torch.OutOfMemoryError("no room")
    assert all(copies.bytes == 0 for copies in offload._copies.values())
    offload.prepare(estimates)
    assert offload.plan.mode == PARTS


def test_the_plan_is_said_once(released, caplog):
    parts = released("float8_e4m3fn")
    offload = offload_parts(*parts, META, "auto", 12)
    with caplog.at_level(logging.INFO):
        for pixels in (1024, 1024, 8192):
            offload.prepare(activations(*parts, batch=1, image=(pixels // 16) ** 2))
    said = [record.message for record in caplog.records]
    assert said[0].startswith("device meta, 12.0 GB free: offload blocks (encoder 7.")
    assert "transformer 13.1 GB fp8 with 21 of 28 blocks" in said[0] and len(said) == 3
    assert "GB of device memory more than there is" in said[2]
