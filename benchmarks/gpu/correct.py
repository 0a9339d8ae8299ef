"""Sections "correct", "kernels", "training": on this device our parts give what references give.

In float32 to 1e-4; in bf16 no further from float32 than the references are, a twentieth for chance.
Errors are `||value - reference|| / ||reference||`.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import comfy.quant_ops
import torch
import torch.nn.functional as F
from torch import Tensor

import in_process

from . import measure, models, weights

FLOAT32_LIMIT = 1e-4
# Of one operation in bf16: rounded once it is 0.0017 away, rounded three times 0.003.
BF16_LIMIT = 5e-3
CHANCE = 1.05
PROMPT = "a small green star above a purple ring on white, \u96ea"


def run_correct(worker) -> None:
    checks: dict[str, Callable] = {
        "transformer and fusion in float32": small_transformer,
        "transformer and fusion in bf16": full_transformer,
        "VAE": vae,
        "text encoder": text_encoder,
        "text encoder against transformers": small_encoder,
        "fp8": fp8,
    }
    for name, check in checks.items():
        with without_tf32():
            worker.attempt(name, lambda check=check: check(worker))
        gc.collect()


@contextlib.contextmanager
def without_tf32():
    """Convolutions in float32 are rounded to TF32 otherwise, ours and others' alike."""
    cudnn, before = torch.backends.cudnn, torch.backends.cudnn.allow_tf32
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def record(worker, what: str, values: dict[str, Tensor], reference: Tensor, limit=None) -> None:
    """Errors of all; ours has to stay under `limit`, or under the largest of the others'."""
    errors = {name: measure.error_of(value, reference) for name, value in values.items()}
    others = [error for name, error in errors.items() if name != "ours"]
    limit = limit or CHANCE * max(others)
    worker.row(what=what, errors=errors, limit=limit, passed=errors["ours"] <= limit)


def small_transformer(worker) -> None:
    config, device = weights.SMALL, worker.device
    tensors = weights.transformer_tensors(config, device, torch.float32, seed=11)
    inputs = models.Inputs(config, 128, 12, device, torch.float32)
    ours = models.our_model(tensors, device, torch.float32)
    core = models.core_model(tensors, device, dtype=torch.float32)
    expected = models.diffusers_call(models.diffusers_model(config, tensors), inputs)()
    values = {"ours": models.our_call(ours, inputs)(), "core": models.core_call(core, inputs)()}
    record(worker, "transformer, float32, to diffusers", values, expected, FLOAT32_LIMIT)
    load = in_process.pack_module("krea2_model.checkpoints.transformer").load_transformer
    plain = load(models.as_checkpoint(tensors), device=device)
    taps = inputs.context.unflatten(-1, (config.num_text_layers, config.text_hidden_dim))
    text = plain.fuse_text(taps)
    value = {"ours": plain(inputs.latents, inputs.time, text)}
    record(worker, "transformer without ComfyUI, float32", value, expected, FLOAT32_LIMIT)
    fused = {"ours": models.our_fusion(ours, inputs)()}
    expected = models.core_fusion(core, inputs)()
    record(worker, "fusion, float32, to core", fused, expected, FLOAT32_LIMIT)


def small_inputs(worker) -> tuple[models.Inputs, models.Inputs]:
    """Those of the smallest step, and the same numbers in float32."""
    size = (worker.sizes.small_image, worker.sizes.steps[0][1])
    inputs = worker.models.inputs(*size)
    wide = models.Inputs(inputs.config, *size, worker.device, torch.float32)
    wide.latents, wide.context = inputs.latents.float(), inputs.context.float()
    return inputs, wide


def full_transformer(worker) -> None:
    """Core's modules in float32 are the reference, over the same bf16 weights."""
    inputs, wide = small_inputs(worker)
    expected = models.core_call(worker.models.reference, wide)()
    values = {name: call() for name, call in worker.models.calls("bf16", inputs).items()}
    # On a CPU all calculate in float32, and rounding is all the difference there is.
    limit = FLOAT32_LIMIT if inputs.latents.dtype == torch.float32 else None
    record(worker, "transformer, bf16, to float32", values, expected, limit)
    pair = worker.models.in_form("bf16")
    expected = models.core_fusion(worker.models.reference, wide)()
    values = {"ours": models.our_fusion(pair["ours"], inputs)(),
              "core": models.core_fusion(pair["core"], inputs)()}  # fmt: skip
    record(worker, "fusion, bf16, to float32", values, expected, limit)


def fp8(worker) -> None:
    inputs, wide = small_inputs(worker)
    expected = models.core_call(worker.models.reference, wide)()
    values = {name: call() for name, call in worker.models.calls("fp8", inputs).items()}
    record(worker, "transformer, fp8_scaled, to float32", values, expected)


def run_training(worker) -> None:
    """Gradients of adapters beside each frozen base, with activations computed again."""
    from krea2_training.data.cache import Batch
    from krea2_training.flow import flow_loss, generator_of
    from krea2_training.settings.sections import BASES, Adapter, Memory
    from krea2_training.weights.adapters import add_adapters
    from krea2_training.weights.base import TrainingBackend, base_of_tensors, freeze_base

    def gradients(base: str, device: torch.device, offload: bool) -> Tensor:
        model = base_of_tensors(tensors, torch.float32, None)
        freeze_base(model, Memory(base=base, offload=offload), device)
        add_adapters(model, Adapter(rank=4, targets="blocks+text"))
        model.to(device)
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):  # at 0 the other half has no gradient
                torch.nn.init.constant_(parameter, 0.01)
        batch = Batch(latents.to(device), taps.to(device), None)
        loss = flow_loss(
            model, batch, generator_of(0, 0), backend=TrainingBackend(), train_text=True
        )
        loss.backward()
        parts = [p.grad.flatten().cpu() for p in model.parameters() if p.requires_grad]
        return torch.cat(parts)

    with torch.inference_mode(False), torch.enable_grad():
        config = weights.SMALL
        tensors = weights.transformer_tensors(config, torch.device("cpu"), torch.float32, seed=12)
        generator = torch.Generator().manual_seed(7)
        latents = torch.randn(2, 16, 16, 16, generator=generator)
        shape = 2, 9, config.num_text_layers, config.text_hidden_dim
        taps = torch.randn(shape, generator=generator)
        for base in BASES:
            expected = gradients(base, torch.device("cpu"), False)
            for offload in (False, True):
                values = {"ours": gradients(base, worker.device, offload)}
                where = ", in main memory" if offload else ""
                record(worker, f"gradients, base {base}{where}, to a CPU", values, expected,
                       FLOAT32_LIMIT)  # fmt: skip


def vae(worker) -> None:
    config, device, pixels = worker.sizes.vae, worker.device, 64 if worker.tiny else 256
    generator = torch.Generator(device).manual_seed(4)
    latents = torch.randn(1, 16, pixels // 8, pixels // 8, device=device, generator=generator)
    images = torch.rand(1, 3, pixels, pixels, device=device, generator=generator) * 2 - 1
    exact: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        tensors = weights.vae_tensors(config, device, torch.float32)
        tensors["decoder.head.2.weight"] *= 0.3  # diffusers cuts images off at 1
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        ours = models.our_vae(tensors, dtype).first_stage_model.to(device)
        core = models.core_vae(tensors, dtype).first_stage_model.to(device)
        theirs = models.diffusers_vae(config, tensors)
        frames = [part[:, :, None].to(dtype) for part in (latents, images)]
        with torch.inference_mode():
            decoded = {
                "ours": ours.decode_unnormalised(latents),
                "core": core.decode(frames[0])[:, :, 0],
                "diffusers": theirs.decode(frames[0]).sample[:, :, 0],
            }
            encoded = {
                "ours": ours.encode_unnormalised(images),
                "core": core.encode(frames[1])[:, :, 0],
                "diffusers": theirs.encode(frames[1]).latent_dist.mode()[:, :, 0],
            }
        for what, values in (("decode", decoded), ("encode", encoded)):
            if dtype is torch.float32:
                exact[what] = values.pop("diffusers")
            limit = FLOAT32_LIMIT if dtype is torch.float32 else None
            name = "float32, to diffusers" if limit else "bf16, to float32"
            record(worker, f"VAE {what}, {name}", values, exact[what], limit)


def text_encoder(worker) -> None:
    """Ours and core's calculate in float32 from weights in bf16."""
    config, device = worker.sizes.encoder, worker.device
    tensors = weights.encoder_tensors(config, device, torch.bfloat16)
    ours = models.encode(models.our_clip(tensors), PROMPT)
    core = models.encode(models.core_clip(tensors, config, torch.bfloat16), PROMPT)
    record(worker, "text encoder, to core", {"ours": ours}, core, FLOAT32_LIMIT)


def small_encoder(worker) -> None:
    from transformers import Qwen3VLConfig, Qwen3VLModel

    from krea2_model.config import TextEncoderConfig
    from krea2_model.text.encoder import Qwen3VLTextEncoder, text_encoder_keys

    ours = TextEncoderConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4,
                             num_key_value_heads=2, head_dim=16, vocab_size=1000)  # fmt: skip
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": ours.rope_theta, "mrope_section": [4, 2, 2],
            "mrope_interleaved": True}  # fmt: skip
    text = {name: getattr(ours, name) for name in shared} | {"rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
              "out_hidden_size": 64, "num_position_embeddings": 16,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    torch.manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        theirs = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()
        theirs = theirs.to(worker.device)
        state = theirs.state_dict()
        names = text_encoder_keys(state, num_layers=ours.num_tapped_layers)
        encoder = Qwen3VLTextEncoder(ours, device="meta")
        encoder.load_state_dict({m: state[n] for n, m in names.items()}, strict=True, assign=True)
        ids = torch.arange(3, 43, device=worker.device)[None]
        states = theirs.language_model(input_ids=ids, output_hidden_states=True).hidden_states
        expected = torch.stack([states[tap] for tap in ours.tap_layers], dim=2)
        value = encoder(ids)
    record(worker, "text encoder, float32, to transformers", {"ours": value}, expected,
           FLOAT32_LIMIT)  # fmt: skip


def run_kernels(worker) -> None:
    """Each fused kernel of a block against the same in plain float32."""
    config, device = worker.sizes.transformer, worker.device
    dtype = torch.bfloat16
    generator = torch.Generator(device).manual_seed(6)

    def random(*shape, of=dtype):
        return torch.randn(shape, device=device, generator=generator).to(of)

    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, 128
    tokens = 48 if worker.tiny else 1088
    kernels = in_process.pack_module("krea2_model.nn.kernels")
    attention = in_process.pack_module("krea2_model.nn.attention")
    backend = in_process.pack_module("nodes.managed.backend").ComfyBackend({})
    positions = torch.randint(64, (1, tokens, 3))
    rope = attention.rope_table(positions, config.axes_dims_rope, config.rope_theta).to(device)
    query, key = random(1, heads, tokens, dim), random(1, groups, tokens, dim)
    value = random(1, groups, tokens, dim)
    gains = [1 + 0.1 * random(dim, of=torch.float32) for _ in range(2)]
    norm = kernels.HeadNorm(*gains, config.norm_eps)

    with kernels.keeping_inputs():
        exact = kernels.norm_and_rotate(query.float(), key.float(), norm, rope)
        plain = kernels.norm_and_rotate(query, key, norm, rope)
    fused = comfy.quant_ops.ck.rms_rope_(query.clone(), key.clone(), rope, *gains, config.norm_eps)
    for name, at in (("queries", 0), ("keys", 1)):
        values = {"ours": fused[at], "plain torch": plain[at]}
        record(worker, f"norm and rotation of {name}, bf16", values, exact[at],
               BF16_LIMIT)  # fmt: skip

    hidden = random(1, tokens, config.hidden_size)
    scale, shift = (random(1, 1, config.hidden_size) for _ in range(2))
    with kernels.keeping_inputs():
        exact_norm = kernels.modulated_norm(hidden.float(), scale, shift, config.norm_eps)
        plain_norm = kernels.modulated_norm(hidden, scale, shift, config.norm_eps)
    values = {"ours": backend.modulated_norm(hidden.clone(), scale, shift, config.norm_eps),
              "plain torch": plain_norm}  # fmt: skip
    record(worker, "modulated norm, bf16", values, exact_norm, BF16_LIMIT)

    wide = [part.float() for part in (query, *attention.repeat_heads(query, key, value))]
    expected = F.scaled_dot_product_attention(*wide).transpose(1, 2).flatten(2)
    values = {"ours": backend.attention(query, key, value),
              "repeated heads": attention.attend(*(part.to(dtype) for part in wide))}  # fmt: skip
    record(worker, "attention with grouped heads, bf16", values, expected, BF16_LIMIT)
    worker.row(what="grouped heads are taken", passed=attention.takes_grouped_heads(query)
               or device.type != "cuda")  # fmt: skip

    partial_attention(worker, query, key, value)

    wide_heads = [random(1, 1, tokens, 384, of=torch.float32) for _ in range(3)]
    expected = F.scaled_dot_product_attention(*(part.double() for part in wide_heads))
    vae = in_process.pack_module("krea2_model.vae.model")
    halves = [part.to(dtype) for part in wide_heads]
    worker.row(what="fused attention at head width 384", bf16=vae.has_fused_attention(*halves),
               float32=vae.has_fused_attention(*wide_heads))  # fmt: skip
    chunks = vae.attend_in_chunks(*wide_heads, 2**16)
    record(worker, "attention at head width 384 in chunks, float32", {"ours": chunks}, expected,
           FLOAT32_LIMIT)  # fmt: skip
    values = {"ours": F.scaled_dot_product_attention(*halves),
              "chunks": vae.attend_in_chunks(*halves, 2**16)}  # fmt: skip
    record(worker, "attention at head width 384, bf16", values, expected, BF16_LIMIT)


def partial_attention(worker, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Attention to two parts of the keys, merged, against attention to all; with a mask and not."""
    partial = in_process.pack_module("krea2_model.nn.partial_attention")
    attention = in_process.pack_module("krea2_model.nn.attention")
    tokens = key.shape[2]
    cut = tokens // 3
    mask = torch.zeros(1, 1, 1, tokens, device=query.device)
    mask[..., ::5] = -2.0
    for what, bias in (("", None), (" with a mask", mask)):
        wide = [part.float() for part in (query, *attention.repeat_heads(query, key, value))]
        scores = wide[0] @ wide[1].mT / query.shape[-1] ** 0.5
        scores = scores if bias is None else scores + bias
        expected, sums = scores.softmax(-1) @ wide[2], scores.logsumexp(-1)
        for dtype, limit in ((torch.float32, FLOAT32_LIMIT), (query.dtype, BF16_LIMIT)):
            parts = []
            for keys in (slice(0, cut), slice(cut, tokens)):
                own = None if bias is None else bias[..., keys]
                inputs = (query.to(dtype), key[:, :, keys].to(dtype), value[:, :, keys].to(dtype))
                parts.append(partial.attend_partially(*inputs, own))
            merged = partial.merge(*parts)
            name = f"attention in two parts{what}, {str(dtype).partition('.')[2]}"
            record(worker, name, {"ours": merged.out}, expected, limit)
            record(worker, f"{name}, log of sums", {"ours": merged.lse}, sums, limit)
