"""The text encoder against transformers' Qwen3-VL and diffusers' Krea 2 pipeline.

The models are small and random, with the layers, the taps and the vocabulary of the released one.
"""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.krea2 import Krea2Pipeline as DiffusersPipeline
from transformers import AutoTokenizer

from krea2_model.config import TextEncoderConfig
from krea2_model.nn.attention import attend
from krea2_model.text import decoder
from krea2_model.text.encoder import (
    Qwen3VLTextEncoder,
    infer_text_encoder_config,
    text_encoder_keys,
)
from krea2_model.text.tokenizer import PREFIX_TOKENS, Krea2Tokenizer
from parity import assert_close
from qwen3vl_reference import SMALL

logger = logging.getLogger("parity")

PROMPTS = [
    "a fox in the snow",
    "",
    "\n\u96ea\u306e\u4e2d\u306e\u72d0 \\(red\\)<|im_end|> \U0001f98a",
    "fox, " * 180,
]


def encoder_like(qwen3vl, **options) -> Qwen3VLTextEncoder:
    encoder = Qwen3VLTextEncoder(SMALL, **options)
    state = qwen3vl.state_dict()
    keys = text_encoder_keys(state)
    encoder.load_state_dict({ours: state[theirs] for theirs, ours in keys.items()}, strict=True)
    return encoder.eval()


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Krea2Tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def encoder(qwen3vl, tokenizer):
    encoder = encoder_like(qwen3vl)
    encoder.tokenizer = tokenizer
    return encoder


@torch.no_grad()
def reference_taps(model, tokens, mask=None):
    mask = torch.ones_like(tokens) if mask is None else mask.long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0).expand(3, -1, -1)
    out = model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, output_hidden_states=True
    )
    return torch.stack([out.hidden_states[tap] for tap in SMALL.tap_layers], dim=2)


def random_tokens(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 151643, shape, generator=generator)


def assert_taps_close(taps, expected, what):
    for slot, tap in enumerate(SMALL.tap_layers):
        assert_close(taps[..., slot, :], expected[..., slot, :], 1e-5, f"{what}, tap {tap}")


@pytest.mark.parametrize("length, elements", [(1, None), (39, None), (600, None), (600, 0)])
def test_taps_equal_transformers(qwen3vl, encoder, monkeypatch, length, elements):
    """With 0 elements at a time, as prompts of thousands of tokens: in blocks of 64 queries."""
    if elements is not None:
        monkeypatch.setattr(decoder, "MASK_ELEMENTS", elements)
    tokens = random_tokens(2, length)
    with torch.no_grad():
        taps = encoder(tokens)
    assert taps.shape == (2, length, 12, SMALL.hidden_size)
    assert_taps_close(taps, reference_taps(qwen3vl, tokens), f"{length} tokens")


def padded(where: str, length: int = 60, real: int = 25):
    mask = torch.zeros(length, dtype=torch.bool)
    start = {"left": (), "middle": range(real - 5), "right": range(real)}[where]
    mask[list(start)] = True
    mask[length - real + len(start) :] = True
    return mask


@pytest.mark.parametrize("where", ["left", "middle", "right"])
def test_padding_changes_no_real_token(qwen3vl, encoder, where):
    mask = torch.stack((padded(where), torch.ones(60, dtype=torch.bool)))
    tokens = random_tokens(2, 60)
    assert mask[0].sum() == 25
    with torch.no_grad():
        taps = encoder(tokens, mask)
        alone = encoder(tokens[:1, mask[0]])
    assert torch.isfinite(taps).all()
    assert_taps_close(taps[:1, mask[0]], alone, f"{where} against unpadded")
    expected = reference_taps(qwen3vl, tokens, mask)
    assert_taps_close(taps[mask], expected[mask], f"{where} against transformers")


def test_padding_on_the_left_makes_no_nan(qwen3vl):
    """torch's own attention gives zeros where a query sees nothing; a plain softmax gives NaN."""

    def plain(query, key, value, mask):
        key, value = (heads.repeat_interleave(2, dim=1) for heads in (key, value))
        scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)

    mask, tokens = padded("left")[None], random_tokens(1, 60)
    with torch.no_grad():
        taps = encoder_like(qwen3vl, attend=plain)(tokens, mask)
    assert_taps_close(taps[mask], reference_taps(qwen3vl, tokens, mask)[mask], "plain softmax")


@pytest.mark.parametrize("prompt", PROMPTS, ids=["plain", "empty", "odd", "cut"])
def test_encode_equals_the_official_pipeline(qwen3vl, encoder, tokenizer_folder, prompt):
    """diffusers pads to 512 in the middle of the template; only its real tokens count."""
    pipeline = DiffusersPipeline(
        scheduler=None,
        vae=None,
        text_encoder=qwen3vl,
        tokenizer=AutoTokenizer.from_pretrained(tokenizer_folder),
        transformer=None,
    )
    length = 200  # Short of 360 tokens, so one prompt is cut; 512 would only take longer.
    with torch.no_grad():
        expected, mask = pipeline.get_text_hidden_states(prompt, length, torch.device("cpu"))
    taps, our_mask = encoder.encode([prompt], max_sequence_length=length)
    assert our_mask is None
    assert_taps_close(taps[0], expected[mask], repr(prompt[:10]))


def test_encode_cuts_the_template_by_count(encoder, tokenizer):
    """A leading line break merges with the prefix, so there is no prefix to be found."""
    taps, _ = encoder.encode(["\na fox"])
    tokens = torch.tensor([tokenizer.tokenize("\na fox")])
    with torch.no_grad():
        assert torch.equal(taps, encoder(tokens)[:, PREFIX_TOKENS:])


def test_a_batch_is_bit_equal_to_its_items(encoder):
    taps, mask = encoder.encode(PROMPTS)
    assert taps.shape[:2] == mask.shape and mask.dtype is torch.bool
    assert taps.shape[1] == max(len(encoder.encode([prompt])[0][0]) for prompt in PROMPTS)
    for prompt, row, real in zip(PROMPTS, taps, mask, strict=True):
        alone, none = encoder.encode([prompt])
        assert none is None
        assert torch.equal(row[real], alone[0])
        assert real.tolist() == [True] * alone.shape[1] + [False] * (len(real) - alone.shape[1])
        assert (row[~real] == 0).all()


def test_equal_lengths_need_no_mask(encoder):
    taps, mask = encoder.encode(["a red fox", "a blue car"])
    assert mask is None
    assert taps.shape[:2] == (2, 3 + 5)
    assert torch.equal(taps[1:], encoder.encode(["a blue car"])[0])
    assert not torch.equal(taps[0], taps[1])
    assert not taps.requires_grad


def test_bfloat16_is_as_close_as_transformers(qwen3vl):
    """Rounding must not be worse than the reference's, measured from float32 on equal weights."""
    rounded = copy.deepcopy(qwen3vl).bfloat16()
    tokens = random_tokens(1, 120)
    theirs = reference_taps(rounded, tokens)
    encoder = encoder_like(rounded, dtype=torch.bfloat16)
    with torch.no_grad():
        ours = encoder(tokens)
    exact = reference_taps(rounded.float(), tokens)
    assert ours.dtype is torch.bfloat16
    for slot, tap in enumerate(SMALL.tap_layers):
        our_error, their_error = (
            (taps[..., slot, :].double() - exact[..., slot, :].double()).norm()
            for taps in (ours, theirs)
        )
        logger.info("tap %d: our error %.2f of theirs", tap, our_error / their_error)
        assert our_error <= 1.2 * their_error


def test_gradients_reach_the_embeddings(encoder):
    taps = encoder(random_tokens(1, 6))
    taps[:, -1, -1].sum().backward()
    gradient = encoder.embed_tokens.weight.grad
    encoder.zero_grad()
    assert gradient is not None and gradient.abs().sum() > 0


def test_attention_passes_the_seam(qwen3vl):
    calls = []

    def recording(query, key, value, mask):
        calls.append((query.shape, key.shape, mask.dtype))
        return attend(query, key, value, mask)

    encoder = Qwen3VLTextEncoder(replace(SMALL, vocab_size=1), attend=recording)
    with torch.no_grad():
        encoder(torch.zeros(1, 7, dtype=torch.long))
    assert calls == [((1, 4, 7, 32), (1, 2, 7, 32), torch.bool)] * 35


def test_taps_follow_the_config(encoder):
    """Other taps, out of order and with the embeddings, and no layer more than they need."""
    config = replace(SMALL, tap_layers=(5, 0, 2))
    small = Qwen3VLTextEncoder(config)
    assert len(small.layers) == 5
    small.load_state_dict(encoder.state_dict(), strict=False)
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        taps, full = small(tokens), encoder(tokens)
    assert torch.equal(taps[:, :, 0], full[:, :, 1])
    assert torch.equal(taps[:, :, 1], encoder.embed_tokens(tokens))
    assert torch.equal(taps[:, :, 2], full[:, :, 0])


@pytest.mark.parametrize("prompts", ["a fox", [], None, {"a fox": 1}], ids=repr)
def test_encode_refuses_what_is_no_list(encoder, prompts):
    with pytest.raises(ValueError, match=r"expected a list"):
        encoder.encode(prompts)


def test_encode_refuses_what_is_no_text(encoder):
    with pytest.raises(ValueError, match="expected text"):
        encoder.encode(["a fox", None])


def test_encode_refuses_lengths_without_a_prompt(encoder):
    with pytest.raises(ValueError, match="max_sequence_length is 5"):
        encoder.encode(["a fox"], max_sequence_length=5)


def test_encode_needs_a_tokenizer():
    with torch.device("meta"):
        encoder = Qwen3VLTextEncoder(SMALL)
    with pytest.raises(ValueError, match=r"no tokenizer.*`tokenizer=`.*COMFYUI_PATH"):
        encoder.encode(["a fox"])


def test_encode_refuses_a_tokenizer_with_more_tokens(tokenizer):
    encoder = Qwen3VLTextEncoder(replace(SMALL, vocab_size=1000), device="meta")
    encoder.tokenizer = tokenizer
    with pytest.raises(ValueError, match="knows 1000"):
        encoder.encode(["a fox"])


def test_too_long_prompts_are_reported(encoder, caplog):
    encoder.encode([" fox" * 510])
    assert "uses 510 tokens" in caplog.text and "up to 507" in caplog.text


def tensor_shapes(config: TextEncoderConfig, num_layers: int) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of `config` holds, by the encoder's own names."""
    with torch.device("meta"):
        encoder = Qwen3VLTextEncoder(replace(config, tap_layers=(num_layers,)))
    return {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}


@pytest.mark.parametrize(
    ("prefix", "others"),
    [
        ("", ["norm.weight", "lm_head.weight", "visual.blocks.0.attn.qkv.weight"]),
        ("model.", ["model.norm.weight", "lm_head.weight", "visual.merger.norm.weight"]),
        ("model.", ["model.norm.weight", "model.visual.blocks.0.attn.qkv.weight"]),
        ("model.language_model.", ["model.language_model.norm.weight", "model.visual.x.weight"]),
        ("language_model.model.", ["language_model.lm_head.weight", "visual.x.weight"]),
        ("language_model.", ["language_model.norm.weight", "visual.deepstack_merger_list.0.b"]),
        (
            "text_encoders.qwen3vl_4b.transformer.model.",
            [
                "text_encoders.qwen3vl_4b.transformer.visual.blocks.0.norm1.weight",
                "text_encoders.qwen3vl_4b.transformer.scaled_fp8",
                "model.diffusion_model.first.weight",
                "vae.conv1.weight",
            ],
        ),
    ],
)
def test_keys_of_every_prefix(prefix, others):
    shapes = tensor_shapes(SMALL, 36)
    scales = ["layers.3.mlp.up_proj.weight_scale", "layers.3.mlp.up_proj.comfy_quant"]
    names = [prefix + name for name in [*shapes, *scales]]
    keys = text_encoder_keys([*others, *names])
    wanted = [name for name in [*shapes, *scales] if not name.startswith("layers.35.")]
    assert keys == {prefix + name: name for name in wanted}
    assert set(Qwen3VLTextEncoder(SMALL, device="meta").state_dict()) == set(wanted) - set(scales)


def test_keys_of_a_hugging_face_model(qwen3vl):
    """The names of a whole Qwen3VLModel, vision tower included."""
    keys = text_encoder_keys(qwen3vl.state_dict())
    assert set(keys.values()) == set(tensor_shapes(SMALL, 35))
    assert all(name.startswith("language_model.") for name in keys)


def test_keys_up_to_another_layer():
    shapes = tensor_shapes(SMALL, 36)
    keys = text_encoder_keys((f"model.{name}" for name in shapes), num_layers=2)
    assert sorted(keys.values()) == sorted(tensor_shapes(SMALL, 2))
    assert len(text_encoder_keys(shapes, num_layers=36)) == len(shapes)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["blocks.0.attn.wq.weight", "first.weight"],
        ["encoder.embed_tokens.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"],
        [f"{te}.{name}" for te in "ab" for name in tensor_shapes(SMALL, 1)],
    ],
    ids=["nothing", "transformer", "T5", "two encoders"],
)
def test_no_keys_without_one_language_model(names):
    assert text_encoder_keys(names) == {}


@pytest.mark.parametrize("config", [TextEncoderConfig(), SMALL], ids=["released", "tiny"])
def test_config_is_read_off_the_shapes(config):
    assert infer_text_encoder_config(tensor_shapes(config, 36)) == config
    # What `text_encoder_keys` leaves of a file is enough.
    without_last = infer_text_encoder_config(tensor_shapes(config, 35))
    assert without_last == replace(config, num_hidden_layers=35)


def test_config_of_packed_weights():
    """4-bit formats halve the columns."""
    shapes = {
        name: (*shape[:-1], shape[-1] // 2) if "proj" in name else shape
        for name, shape in tensor_shapes(SMALL, 36).items()
    }
    assert infer_text_encoder_config(shapes) == SMALL


def test_config_takes_what_shapes_do_not_tell():
    config = infer_text_encoder_config(
        tensor_shapes(SMALL, 4), rope_theta=1e6, rms_norm_eps=1e-5, tap_layers=(1, 4)
    )
    expected = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "tap_layers": (1, 4)}
    assert config == replace(SMALL, num_hidden_layers=4, **expected)


def test_a_wider_encoder_is_none_of_inferences_business():
    shapes = tensor_shapes(replace(SMALL, hidden_size=4096), 36)
    assert infer_text_encoder_config(shapes).hidden_size == 4096


def test_encoders_that_are_refused():
    shapes = tensor_shapes(SMALL, 36)

    qwen25 = {name: shape for name, shape in shapes.items() if "q_norm" not in name}
    qwen25["layers.0.self_attn.q_proj.bias"] = (64,)
    with pytest.raises(
        ValueError, match=r"Qwen2\.5-VL \(36 layers, width 64, no q/k norm.*Qwen3-VL-4B"
    ):
        infer_text_encoder_config(qwen25)

    llama = {name: shape for name, shape in shapes.items() if "_norm." not in name}
    with pytest.raises(ValueError, match=r"another language model.*no q/k norm"):
        infer_text_encoder_config(llama)

    with pytest.raises(ValueError, match=r"28 layers, width 64.*layer 28 is missing.*Qwen3-VL-4B"):
        infer_text_encoder_config(tensor_shapes(SMALL, 28))

    gap = {name: shape for name, shape in shapes.items() if not name.startswith("layers.7.")}
    with pytest.raises(ValueError, match=r"35 layers.*layer 7 is missing"):
        infer_text_encoder_config(gap)

    with pytest.raises(ValueError, match=r"no language model.*Qwen3-VL-4B"):
        infer_text_encoder_config({"blocks.0.attn.wq.weight": (64, 64)})

    del shapes["layers.0.mlp.gate_proj.weight"]
    with pytest.raises(ValueError, match=r"has no layers\.0\.mlp\.gate_proj\.weight"):
        infer_text_encoder_config(shapes)
