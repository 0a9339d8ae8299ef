"""What other packs read, call and replace on ComfyUI's own Krea 2 does the same on ours.

Each touch below imitates one kind of node found in public packs. It is applied to core's MODEL and
to ours, from one file, and both have to make the same image.
"""

import copy
import functools
import math
import types

import comfy.conds
import comfy.ldm.krea2.model as core
import comfy.model_base
import comfy.patcher_extension
import comfy.sd1_clip
import comfy.text_encoders.krea2
import comfy.text_encoders.qwen3vl
import pytest
import torch
from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.flux.math import apply_rope
from comfy.ldm.modules.attention import optimized_attention_masked
from einops import rearrange

import samples
from parity import assert_close, relative_error

WRAPPER = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL


@pytest.fixture
def image(run, conditioning, latent):
    """The image of a model, guided or not."""

    def make(model, positive=None, cfg=1.0):
        return run("KSampler", model=model, seed=7, steps=3, cfg=cfg, sampler_name="euler",
                   scheduler="simple", positive=positive or conditioning(6, 1),
                   negative=conditioning(3, 2), latent_image=latent)[0]["samples"]  # fmt: skip

    return make


def wrapped(model, wrapper):
    model = model.clone()
    model.add_wrapper_with_key(WRAPPER, "somebody", wrapper)
    return model


def doubled_text(self, x, freqs=None, mask=None, transformer_options={}):  # noqa: B006
    """Attention written anew, in which the values of the first four tokens count double."""
    q, k, v, gate = self.wq(x), self.wk(x), self.wv(x), self.gate(x)
    q = rearrange(q, "B L (H D) -> B H L D", H=self.heads)
    k = rearrange(k, "B L (H D) -> B H L D", H=self.kvheads)
    v = rearrange(v, "B L (H D) -> B H L D", D=self.headdim)
    v[:, :, :4] *= 2
    q, k = self.qknorm(q, k)
    if freqs is not None:
        q, k = apply_rope(q, k, freqs)
    k, v = (t.repeat_interleave(self.heads // self.kvheads, dim=1) for t in (k, v))
    out = optimized_attention_masked(
        q, k, v, self.heads, mask=mask, skip_reshape=True, transformer_options=transformer_options
    )
    return self.wo(out * torch.sigmoid(gate))


def attention_replaced(model):
    model = model.clone()
    for index, block in enumerate(model.get_model_object("diffusion_model").blocks):
        forward = types.MethodType(doubled_text, block.attn)
        model.add_object_patch(f"diffusion_model.blocks.{index}.attn.forward", forward)
    return model


def attention_wrapped(model):
    """Around the old one, with arguments by name, as nodes for style transfer do it."""
    model = model.clone()
    for index in range(2):
        name = f"diffusion_model.blocks.{index}.attn.forward"
        old = model.get_model_object(name)

        def forward(x, freqs=None, mask=None, transformer_options={}, old=old):  # noqa: B006
            assert transformer_options["block_index"] in (0, 1)
            kept = x.clone()
            out = old(x, freqs=freqs, mask=mask, transformer_options=transformer_options)
            assert torch.equal(x, kept)
            return 1.5 * out

        model.add_object_patch(name, forward)
    return model


def block_wrapped(model):
    """What a cache of residuals does: the difference that a block makes."""
    model, name = model.clone(), "diffusion_model.blocks.0.forward"
    old = model.get_model_object(name)

    def forward(x, vec, freqs, mask=None, timestep_zero_index=None, transformer_options={}):  # noqa: B006
        split = {} if timestep_zero_index is None else {"timestep_zero_index": timestep_zero_index}
        return x + 2 * (
            old(x, vec, freqs, mask, **split, transformer_options=transformer_options) - x
        )

    model.add_object_patch(name, forward)
    return model


def fusion_replaced(model):
    """Only while the model runs: a wrapper sets it and puts the old one back."""

    def wrapper(executor, x, timesteps, context, *rest, **kwargs):
        fusion = executor.class_obj.txtfusion
        assert int(executor.class_obj.txtlayers) * int(executor.class_obj.txtdim) == 1920
        old = fusion.forward

        def forward(x, mask=None, transformer_options=None):
            b, seq, taps, dim = x.shape
            y = (x * torch.linspace(1, 3, taps).view(1, 1, -1, 1).to(x)).reshape(b * seq, taps, dim)
            for block in fusion.layerwise_blocks:
                y = block(y, mask=None, transformer_options=transformer_options or {})
            y = y.reshape(b, seq, taps, dim).permute(0, 1, 3, 2)
            y = fusion.projector(y).squeeze(-1)
            for block in fusion.refiner_blocks:
                y = block(y, mask=mask, transformer_options=transformer_options or {})
            return y

        fusion.forward = forward
        try:
            return executor(x, timesteps, context, *rest, **kwargs)
        finally:
            fusion.forward = old

    return wrapped(model, wrapper)


def rebuilt(model):
    """The forward pass from its parts, with an own block and a source image beside the target."""
    source = torch.randn(1, 16, 16, 24, generator=torch.Generator().manual_seed(3))

    def forward(dit, x, timesteps, context, options):
        if not isinstance(dit, core.SingleStreamDiT):
            raise TypeError(f"this node is for SingleStreamDiT, not for {type(dit)}")
        batch, patch = x.shape[0], dit.patch
        x = x.reshape(batch, *x.shape[1:2], *x.shape[-2:])
        images = [dit.process_img(x, 0), dit.process_img(source.to(x).repeat(batch, 1, 1, 1), 1)]
        tokens = torch.cat([dit.first(img) for img, *_ in images], dim=1)
        t = dit.tmlp(timestep_embedding(timesteps, dit.tdim).unsqueeze(1).to(tokens.dtype))
        text = dit.txtmlp(dit.txtfusion(dit._unpack_context(context), mask=None,
                                        transformer_options=options))  # fmt: skip
        places = [torch.zeros(batch, text.shape[1], 3).to(x), *(ids for _, ids, *_ in images)]
        freqs, vec = dit.pe_embedder(torch.cat(places, dim=1)), dit.tproj(t)
        hidden = torch.cat((text, tokens), dim=1)
        bias = hidden.new_zeros(1, 1, hidden.shape[1], hidden.shape[1])
        first = text.shape[1]
        target = slice(first, first + images[0][0].shape[1])
        bias[..., target, target.stop :] = math.log(3.0)
        for index, block in enumerate(dit.blocks):
            if index:
                before = hidden.clone()
                after = block(hidden, vec, freqs, bias, transformer_options=options)
                assert torch.equal(hidden, before), "blocks keep what they are given"
                hidden = after
                continue
            scale, shift, gate, scale2, shift2, gate2 = block.mod(vec)
            normed = (1 + scale) * block.prenorm(hidden) + shift
            hidden = hidden + gate * block.attn(normed, freqs, bias, transformer_options=options)
            normed = (1 + scale2) * block.postnorm(hidden) + shift2
            hidden = hidden + gate2 * block.mlp(normed)
        rows, columns = images[0][2:]
        out = rearrange(dit.last(hidden, t)[:, target], "b (h w) (c p q) -> b c (h p) (w q)",
                        h=rows, w=columns, p=patch, q=patch, c=dit.channels)  # fmt: skip
        return out.unsqueeze(2)

    def wrapper(executor, x, timesteps, context, *rest, **kwargs):
        options = kwargs.get("transformer_options") or next(o for o in rest if isinstance(o, dict))
        return forward(executor.class_obj, x, timesteps, context, options)

    return wrapped(model, wrapper)


def input_layer_replaced(model):
    """A wider input layer that sees a control image too, only while the model runs."""
    weight = 0.1 * torch.randn(256, 64, generator=torch.Generator().manual_seed(4))

    class Control(torch.nn.Module):
        def __init__(self, first):
            super().__init__()
            self.kept = [first]

        def forward(self, tokens):
            return self.kept[0](tokens) + tokens.flip(1) @ weight.T.to(tokens)

    def wrapper(executor, *args, **kwargs):
        dit = executor.class_obj
        first, dit.first = dit.first, Control(dit.first)
        try:
            return executor(*args, **kwargs)
        finally:
            dit.first = first

    return wrapped(model, wrapper)


def layers_of_another_class(model):
    """LoRA on single tokens: copies of layers whose class is swapped."""
    model = model.clone()
    down, up = (
        torch.randn(*s, generator=torch.Generator().manual_seed(5)) for s in ((4, 256), (256, 4))
    )
    for index in range(2):
        name = f"diffusion_model.blocks.{index}.attn.wq"
        layer = copy.copy(model.get_model_object(name))
        base = type(layer)

        def forward(self, x, base=base):
            delta = x @ down.T.to(x) @ up.T.to(x)
            delta[:, :6] = 0
            return base.forward(self, x) + 0.1 * delta

        layer.__class__ = type("Regional", (base,), {"forward": forward})
        model.add_object_patch(name, layer)
    return model


def masked_by_region(model):
    """Text and image tokens that see each other only in part, by the attention override."""

    def override(function, q, k, v, heads, mask=None, **options):
        length = k.shape[2]
        if length > 96:
            allowed = torch.ones(length, length, dtype=torch.bool)
            allowed[-40:, :3] = False
            mask = torch.zeros(1, 1, length, length).masked_fill(~allowed, float("-inf")).to(q)
        return function(q, k, v, heads, mask=mask, **options)

    def wrapper(executor, x, timesteps, context, *rest, **kwargs):
        rest = list(rest)
        options = kwargs.pop("transformer_options", None) or rest.pop()
        assert executor.class_obj.patch == 2 and context.shape[-1] == 1920
        options = {**options, "optimized_attention_override": override}
        return executor(x, timesteps, context, *rest, transformer_options=options, **kwargs)

    return wrapped(model, wrapper)


def patched_in_place(model):
    """Patches of core's that change queries, values and what attention gives."""
    model = model.clone()
    model.set_model_attn1_patch(lambda q, k, v, **_: {"q": q * 1.5, "k": k, "v": v.flip(2)})
    model.set_model_attn1_output_patch(lambda out, options: out * (1 + options["block_index"]))

    def post_input(args):
        args["txt"] = args["txt"] * 1.5
        args["img_ids"] = args["img_ids"] + 1
        return args

    model.set_model_patch(post_input, "post_input")
    return model


# What ComfyUI's own Krea 2 has only in later versions: patch points, references, parts of its pass.
LATER = pytest.mark.skipif(
    not hasattr(core.SingleStreamDiT, "process_img"),
    reason="core's Krea 2 of this ComfyUI has no patch points, references and process_img",
)
TOUCHES = [
    attention_replaced, pytest.param(attention_wrapped, marks=LATER), block_wrapped,
    fusion_replaced, pytest.param(rebuilt, marks=LATER), input_layer_replaced,
    layers_of_another_class, masked_by_region, pytest.param(patched_in_place, marks=LATER),
]  # fmt: skip


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: touch.__name__)
def test_a_touch_does_what_it_does_to_core(image, turbo, core_turbo, touch, cfg):
    plain, expected = image(core_turbo, cfg=cfg), image(touch(core_turbo), cfg=cfg)
    assert relative_error(expected, plain) > 1e-3, "it changes the image of core"
    assert_close(image(touch(turbo), cfg=cfg), expected, 1e-5, touch.__name__)
    assert torch.equal(image(turbo, cfg=cfg), image(turbo.clone(), cfg=cfg))
    assert_close(image(turbo, cfg=cfg), plain, 1e-5, "and it comes off again")
    assert not turbo.model.diffusion_model.is_touched(), "so the fast way is taken again"


@LATER
@pytest.mark.parametrize("method", ["index_timestep_zero", "index"])
@pytest.mark.parametrize("touch", [attention_replaced, block_wrapped])
def test_touched_blocks_see_references(image, conditioning, turbo, core_turbo, touch, method):
    """Two time vectors at once, in core's layout."""
    reference = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    extra = {"reference_latents": [reference], "reference_latents_method": method}
    positive = conditioning(6, 1, **extra)
    expected = image(touch(core_turbo), positive)
    assert relative_error(expected, image(touch(core_turbo))) > 1e-3
    assert_close(image(touch(turbo), positive), expected, 1e-5, f"references by {method}")


def test_the_attributes_of_core_are_there(turbo, core_turbo):
    ours, theirs = turbo.model.diffusion_model, core_turbo.model.diffusion_model
    assert isinstance(ours, core.SingleStreamDiT)
    names = ("patch", "channels", "tdim", "heads", "txtdim", "txtlayers", "dtype",
             "default_ref_method")  # fmt: skip
    assert {n: getattr(ours, n) for n in names} == {n: getattr(theirs, n, None) for n in names}
    pairs = [(dit.blocks[1], dit.txtfusion.refiner_blocks[0]) for dit in (ours, theirs)]
    for mine, its in zip(*pairs, strict=True):
        for name in ("heads", "kvheads", "headdim"):
            assert getattr(mine.attn, name) == getattr(its.attn, name)
        assert isinstance(mine, type(its)) and isinstance(mine.attn, type(its.attn))
    assert isinstance(ours.txtfusion, type(theirs.txtfusion))
    ids = torch.rand(1, 5, 3) * 9
    assert_close(ours.pe_embedder(ids), theirs.pe_embedder(ids), 1e-6, "positions")
    with pytest.raises(ValueError, match="1920"):
        ours._unpack_context(torch.zeros(1, 2, 7))


@pytest.mark.parametrize("part", ["Attention", "SwiGLU", "TextFusionTransformer"])
def test_a_function_replaced_in_a_class_of_core_s(image, monkeypatch, turbo, core_turbo, part):
    """By an import of another pack, for every model there is."""
    cls = getattr(core, part)
    old, plain = cls.forward, image(turbo)

    @functools.wraps(old)
    def forward(self, x, *args, **kwargs):
        return old(self, x, *args, **kwargs).roll(1, -1)

    monkeypatch.setattr(cls, "forward", forward)
    expected = image(core_turbo)
    assert relative_error(expected, plain) > 1e-3
    assert_close(image(turbo), expected, 1e-5, f"{part}.forward of core")


@pytest.fixture
def own_way_with_references(monkeypatch):
    """A pack that teaches core references with a boost, by an import."""
    extra_conds = comfy.model_base.Krea2.extra_conds

    def with_boosts(self, **kwargs):
        out = extra_conds(self, **kwargs)
        if kwargs.get("reference_boosts") is not None:
            out["ref_boosts"] = comfy.conds.CONDConstant(list(kwargs["reference_boosts"]))
        return out

    def forward(self, x, timesteps, context, attention_mask=None, *rest, **kwargs):
        sources = kwargs.get("ref_latents") or (rest and rest[0]) or []
        boosts = kwargs.get("ref_boosts") or [1.0] * len(sources)
        images = [
            self.process_img(image[:, :, 0], index) for index, image in enumerate([x, *sources])
        ]
        t = self.tmlp(timestep_embedding(timesteps, self.tdim).unsqueeze(1).to(x.dtype))
        text = self.txtmlp(self.txtfusion(self._unpack_context(context), mask=None))
        hidden = torch.cat([text, *(self.first(img) for img, *_ in images)], dim=1)
        places = torch.cat(
            [torch.zeros(1, text.shape[1], 3).to(x), *(ids[:1] for _, ids, *_ in images)], 1
        )
        freqs = self.pe_embedder(places.repeat(len(x), 1, 1))
        bias, end = (
            hidden.new_zeros(1, 1, 1, hidden.shape[1]),
            text.shape[1] + images[0][0].shape[1],
        )
        first = end
        for boost, (tokens, *_) in zip(boosts, images[1:], strict=True):
            bias[..., first : first + tokens.shape[1]] = math.log(boost)
            first += tokens.shape[1]
        for block in self.blocks:
            hidden = block(hidden, self.tproj(t), freqs, bias)
        out = self.last(hidden, t)[:, text.shape[1] : end]
        return rearrange(
            out, "b (h w) (c p q) -> b c 1 (h p) (w q)", h=images[0][2], p=2, q=2, c=16
        )

    monkeypatch.setattr(comfy.model_base.Krea2, "extra_conds", with_boosts)
    monkeypatch.setattr(core.SingleStreamDiT, "_forward", forward)


@LATER
def test_references_with_boosts_of_another_pack(
    image, conditioning, turbo, core_turbo, own_way_with_references
):
    reference = torch.randn(1, 16, 1, 16, 24, generator=torch.Generator().manual_seed(6))
    plain = conditioning(6, 1, reference_latents=[reference])
    boosted = conditioning(6, 1, reference_latents=[reference], reference_boosts=[4.0])
    images = [image(core_turbo, positive) for positive in (plain, boosted)]
    assert relative_error(images[1], images[0]) > 1e-3
    for positive, expected in zip((plain, boosted), images, strict=True):
        assert_close(image(turbo, positive), expected, 1e-5, "as that pack does it on core")


@LATER
def test_references_of_our_node_stay_ours(
    run, models, image, conditioning, turbo, own_way_with_references, monkeypatch
):
    vae = run("K2VAELoader", file="krea2-nano (built in)")[0]
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(7))
    positive = run(
        "K2Reference", positive=conditioning(6, 1), vae=vae, image=picture, strength=2.0
    )[0]
    found = image(turbo, positive)
    monkeypatch.undo()
    assert torch.equal(found, image(turbo, positive))


@pytest.mark.parametrize("kernels", ["plain", "of ComfyUI"])
def test_listeners_may_keep_what_they_see(image, turbo, pack, monkeypatch, kernels):
    """Forward hooks on layers hold tensors; nothing that went past them is overwritten."""
    if kernels == "of ComfyUI":  # which a GPU has, and which write over queries and keys
        monkeypatch.setattr(pack("nodes.managed.backend"), "_has_kernels", lambda tensor: True)
    seen, expected = [], image(turbo)
    dit = turbo.model.diffusion_model
    layers = [dit.blocks[0], dit.blocks[0].attn.gate, dit.blocks[1].attn.wq, dit.blocks[1].mlp.gate]

    def keep(layer, inputs, output):
        seen.extend((t, t.clone()) for t in (*inputs, output) if isinstance(t, torch.Tensor))

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        assert_close(image(turbo), expected, 1e-5, "hooks that keep tensors")
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) >= 24
    assert all(torch.equal(tensor, then) for tensor, then in seen)


def test_what_has_no_effect_beside_foreign_attention_is_refused(run, image, conditioning, turbo):
    touched = attention_replaced(turbo)
    away = run("K2NegativeGuidance", model=touched, negative=conditioning(4, 9), end=1.0)[0]
    with pytest.raises(ValueError, match="another pack .* attention"):
        image(away)
    weights = {"krea2_token_weights": torch.tensor([[1.0, 1, 2, 1, 1, 1]])}
    with pytest.raises(ValueError, match="another pack .* attention"):
        image(touched, conditioning(6, 1, **weights))
    # Around ours, everything counts.
    wrapped = attention_wrapped(turbo)
    plain = image(wrapped)
    away = run("K2NegativeGuidance", model=wrapped, negative=conditioning(4, 9), end=1.0)[0]
    assert relative_error(image(away), plain) > 1e-3
    assert relative_error(image(wrapped, conditioning(6, 1, **weights)), plain) > 1e-4


def test_an_unused_negative_of_another_model_harms_nobody(run, conditioning, turbo, latent):
    """Without guidance ComfyUI never asks for it, so core does not look at it either."""
    other = [[torch.zeros(1, 77, 768), {}]]
    inputs = {"model": turbo, "seed": 1, "steps": 2, "sampler_name": "euler", "scheduler": "simple",
              "positive": conditioning(6, 1), "latent_image": latent}  # fmt: skip
    run("KSampler", cfg=1.0, negative=other, **inputs)
    with pytest.raises(ValueError, match="768 features"):
        run("KSampler", cfg=2.0, negative=other, **inputs)


CHAT = "<|im_start|>system\nLook:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture
def clips(run, models, core_clip):
    """Ours and core's, of one file."""
    return run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")[0], core_clip


def encoded(clip, text, images, **options):
    tokens = clip.tokenize(text, images=images, llama_template=CHAT, **options)
    return clip.encode_from_tokens_scheduled(tokens)[0][0]


# As packs do it that let several images share one span.
@pytest.fixture
def packed_spans(monkeypatch):
    cls = comfy.text_encoders.qwen3vl.Qwen3VL
    old, sizes = cls.preprocess_embed, []

    def packed(self, embed, device):
        data = embed["data"]
        data = data if isinstance(data, list) else [data]
        each = [old(self, {**embed, "data": one}, device) for one in data]
        tokens = torch.cat([tokens for tokens, _ in each])
        layers = zip(*(extra["deepstack"] for _, extra in each), strict=True)
        sizes.append(len(tokens))
        deepstack = [torch.cat(part) for part in layers]
        return tokens, {"grid": each[0][1]["grid"], "deepstack": deepstack}

    monkeypatch.setattr(cls, "preprocess_embed", packed)
    return sizes


NEW_ENOUGH = pytest.mark.skipif(
    "forward" not in vars(comfy.text_encoders.qwen3vl.Qwen3VL),
    reason="this ComfyUI encodes images without their positions and DeepStack features",
)


@NEW_ENOUGH
def test_images_that_share_one_span(clips, packed_spans, monkeypatch):
    ours, core_s = clips
    text = f"{BLOCK}a fox and {BLOCK} in the snow"
    images = [[samples.image(seed=1), samples.image(64, 64, 2)], samples.image(64, 64, 3)]
    expected = encoded(core_s, text, images)
    assert_close(encoded(ours, text, images), expected, 1e-5, "packed by another pack")
    assert packed_spans == [6 + 4, 4] * 2, "and its function was asked"
    monkeypatch.undo()
    ours.cond_stage_model.encodings.clear()
    assert_close(encoded(ours, text, images), expected, 1e-5, "packed without it")


@NEW_ENOUGH
@pytest.mark.parametrize("size", [(50, 90), (97, 130), (600, 333)])
def test_images_of_any_size_are_seen_as_in_core(clips, size):
    ours, core_s = (encoded(clip, f"{BLOCK}a fox", [samples.image(*size)]) for clip in clips)
    assert_close(ours, core_s, 1e-5, f"an image of {size}")


@NEW_ENOUGH
def test_effects_that_a_pack_puts_into_core_s_encoder(clips, packed_spans, monkeypatch):
    """Settings travel as attributes of the model, so nothing is remembered between them."""
    cls = comfy.text_encoders.krea2.Krea2TEModel

    def effects(self, token_weight_pairs, template_end=-1):
        out, pooled, extra = super(cls, self).encode_token_weights(token_weight_pairs)
        assert out.shape[:2] == (1, 12) and extra["attention_mask"].shape == (1, out.shape[2])
        out = out[:, :, 5:] * getattr(self, "somebody_s_strength", 1.0)
        return out.permute(0, 2, 1, 3).flatten(2), pooled, {}

    monkeypatch.setattr(cls, "encode_token_weights", effects)
    text, found = f"{BLOCK}a fox", {}
    for name, clip in zip(("ours", "core"), clips, strict=True):
        for strength in (1.0, 0.5):
            clip.cond_stage_model.somebody_s_strength = strength
            found[name, strength] = encoded(clip, text, [samples.image()])
    for strength in (1.0, 0.5):
        assert_close(found["ours", strength], found["core", strength], 1e-5, f"at {strength}")
    assert relative_error(found["ours", 0.5], found["ours", 1.0]) > 0.1


def test_an_encoding_that_a_pack_brings_on_a_copy(clips):
    """It encodes through core's section, with its own rows, tokenizer and mask."""
    found = []
    for clip in clips:
        own = clip.clone()
        own.tokenizer = copy.copy(clip.tokenizer)
        own.cond_stage_model = copy.copy(clip.cond_stage_model)

        def tokenize(self, text, return_word_ids=False, **kwargs):
            text = self.llama_template.format(text)
            return comfy.sd1_clip.SD1Tokenizer.tokenize_with_weights(self, text, return_word_ids)

        def encode(pairs, template_end=-1, section=own.cond_stage_model.qwen3vl_4b):
            rows = [[pair[0] for pair in row] for row in pairs["qwen3vl_4b"]]
            assert section.special_tokens["pad"] == 151643
            rows += [[*rows[0][:36], *rows[0][36:][::-1]]]
            out, pooled, extra = section.encode(rows)
            out = torch.lerp(out[1:], out[:1], 1.5)[:, :, 34:]
            return out.permute(0, 2, 1, 3).flatten(2).cpu(), pooled, {}

        own.tokenizer.tokenize_with_weights = types.MethodType(tokenize, own.tokenizer)
        own.cond_stage_model.encode_token_weights = encode
        tokens = own.tokenize("a red fox")
        found.append(own.encode_from_tokens_scheduled(tokens)[0][0])
    assert_close(found[0], found[1], 1e-5, "an encoding by another pack")
    plain = clips[0].encode_from_tokens_scheduled(clips[0].tokenize("a red fox"))[0][0]
    assert relative_error(found[0], plain) > 1e-3


@pytest.mark.parametrize("bypass", [False, True])
def test_train_lora_of_comfyui_trains_what_it_trains_of_core(
    turbo, core_turbo, conditioning, bypass
):
    """The same layers by the same first loss; without a change of the model it was given."""
    import comfy_extras.nodes_train as training

    inputs = {each.id: [getattr(each, "default", None)]
              for each in training.TrainLoraNode.define_schema().inputs}  # fmt: skip
    if "bypass_mode" not in inputs and bypass:
        pytest.skip("this ComfyUI trains in one way only")
    inputs |= {"batch_size": [1], "steps": [2], "rank": [2], "training_dtype": ["fp32"],
               "lora_dtype": ["fp32"], "positive": [conditioning(6, 1)]}  # fmt: skip
    if bypass:
        inputs["bypass_mode"] = [True]
    pictures = torch.randn(2, 16, 1, 16, 24, generator=torch.Generator().manual_seed(1))
    keys, losses = {}, {}
    for name, model in (("ours", turbo), ("core", core_turbo)):
        torch.manual_seed(0)
        result = training.TrainLoraNode.execute(
            **inputs | {"model": [model], "latents": [{"samples": pictures}]}
        ).result
        lora, found = (next(r for r in result if isinstance(r, dict) and ("loss" in r) == is_loss)
                       for is_loss in (False, True))  # fmt: skip
        keys[name], losses[name] = set(lora), found["loss"]
    assert keys["ours"] == keys["core"] and len(losses["ours"]) == 2
    assert losses["ours"][0] == pytest.approx(losses["core"][0], rel=1e-5)
    assert not turbo.model.diffusion_model.is_touched()
