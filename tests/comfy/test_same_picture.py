"""A graph and the same call in Python give one picture, for each feature that both have.

The graph runs ComfyUI's sampler on ComfyUI's managed model, Python the pipeline's own loop.
"""

import json

import pytest
import torch

from parity import assert_close
from samples import image

PROMPT, NEGATIVE = "a (red:1.4) circle", "a blue star"
SIZE, SEED, STEPS = 64, 7, 3


@pytest.fixture(scope="module")
def loaded(run, pack):
    """By variant: MODEL, CLIP and VAE, and the pipeline."""
    nano = pack("krea2_model").Krea2Pipeline.nano
    names = {"turbo": "krea2-nano (built in)", "raw": "krea2-nano Raw (built in)"}
    return {
        variant: (run("K2Loader", model=name), nano(variant)) for variant, name in names.items()
    }


class Graph:
    """The nodes of a run, behind the loader and up to the decoder."""

    def __init__(self, run, parts):
        self.run = run
        self.model, self.clip, self.vae = parts
        self.positive, self.negative = run(
            "K2TextEncode", clip=self.clip, prompt=PROMPT, negative=NEGATIVE
        )[:2]
        self.latent = run("K2EmptyLatent", aspect="custom", width=SIZE, height=SIZE)[0]
        self.paste = lambda picture: picture
        self.sampler = {"preset": "custom", "steps": STEPS, "guidance": 0.0, "seed": SEED}

    def encode(self, node, **options):
        options = {"prompt": PROMPT, "negative": NEGATIVE, **options}
        self.positive, self.negative = self.run(node, clip=self.clip, **options)[:2]

    def refer(self, **options):
        self.positive, self.negative = self.run(
            "K2Reference", positive=self.positive, negative=self.negative, vae=self.vae,
            image=image(64, 64, 1), megapixels=1.0, **options,
        )[:2]  # fmt: skip

    def picture(self):
        samples = self.run(
            "K2Sampler", model=self.model, positive=self.positive, negative=self.negative,
            latent=self.latent, **self.sampler,
        )[0]  # fmt: skip
        picture = self.run("K2VAEDecode", samples=samples, vae=self.vae)[0]
        return self.paste(picture).movedim(-1, 1)


def guided(graph, krea2_model):
    graph.sampler["guidance"] = 2.0
    return {"guidance": 2.0}


def layer_mix(graph, krea2_model):
    weights = [1.0] * 11 + [4.0]
    (graph.positive,) = graph.run("K2TapWeights", conditioning=graph.positive, layer_35=4.0)[:1]
    return {"layer_weights": weights}


def prompt_images(graph, krea2_model):
    graph.encode(
        "K2TextEncodeImages", image_1=image(64, 64, 1), image_2=image(64, 64, 2),
        strengths="1, 0.5", roles="the style", max_side=32, labels=False,
    )  # fmt: skip
    images = [
        krea2_model.PromptImage(image(64, 64, 1)[0].movedim(-1, 0), "the style"),
        krea2_model.PromptImage(image(64, 64, 2)[0].movedim(-1, 0), strength=0.5),
    ]
    return {"images": krea2_model.PromptImages(images, labels=False, max_side=32)}


def references(graph, krea2_model):
    graph.refer()
    return {"references": [image(64, 64, 1)[0].movedim(-1, 0)]}


def references_at_the_step_s_time(graph, krea2_model):
    graph.refer(family="identity LoRAs (shared time)")
    images = [image(64, 64, 1)[0].movedim(-1, 0)]
    return {"references": krea2_model.References(images, method="index")}


def weak_references(graph, krea2_model):
    graph.refer(strength=0.3)
    latents = graph.run("K2VAEEncode", pixels=image(64, 64, 1), vae=graph.vae)[0]["samples"]
    latents = graph.model.model.process_latent_in(latents)[:, :, 0]
    settings = krea2_model.ReferenceSettings(strength=0.3)
    return {"references": [krea2_model.Reference(latents, settings)]}


def cached_references(graph, krea2_model):
    graph.refer(apart=True)
    images = [image(64, 64, 1)[0].movedim(-1, 0)]
    return {"references": krea2_model.References(images, cache=True)}


def edit(graph, krea2_model, family="identity", **options):
    pictures = [image(48, 64, 1), image(64, 32, 2)]
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:] = 1.0
    positive, negative, _, graph.model = graph.run(
        "K2Edit", model=graph.model, clip=graph.clip, vae=graph.vae, prompt=PROMPT,
        negative=NEGATIVE, image_1=pictures[0], image_2=pictures[1], family=family, boost=2.0,
        boost_2=0.5, mask=mask, latent=graph.latent, **options,
    )  # fmt: skip
    graph.positive, graph.negative = positive, negative
    images = [picture[0].movedim(-1, 0) for picture in pictures]
    return {
        "edit": krea2_model.Edit(images, family, boost=(2.0, 0.5), boost_mask=mask[0], **options)
    }


def edit_with_cached_references(graph, krea2_model):
    return edit(graph, krea2_model, "ai-toolkit", cache=True)


def guided_edit(graph, krea2_model):
    return guided(graph, krea2_model) | edit(graph, krea2_model)


def nag(graph, krea2_model):
    (graph.model,) = graph.run("K2NegativeGuidance", model=graph.model, negative=graph.negative)[:1]
    return {"negative_guidance": krea2_model.NegativeGuidance()}


def guidance_schedule(graph, krea2_model):
    options = {"start": 0.2, "end": 0.9, "rescale": 0.5}
    (graph.model,) = graph.run("K2GuidanceSchedule", model=graph.model, ramp="falling", **options)[
        :1
    ]
    schedule = krea2_model.GuidanceSchedule(ramp="falling", **options)
    return guided(graph, krea2_model) | {"guidance_schedule": schedule}


def step_skipping(graph, krea2_model):
    (graph.model,) = graph.run("K2Approximate", model=graph.model, evaluate="every 2nd step")[:1]
    graph.sampler["steps"] = 6
    return guided(graph, krea2_model) | {"steps": 6, "evaluate_every": 2}


def start_image(graph, krea2_model):
    (graph.latent,) = graph.run("K2VAEEncode", pixels=image(64, 64, 3), vae=graph.vae)[:1]
    graph.sampler["denoise"] = 0.6
    return {"start_image": image(64, 64, 3)[0].movedim(-1, 0), "denoise": 0.6}


def inpaint(graph, krea2_model, denoise=1.0, **options):
    original, mask = image(70, 100, 3), torch.zeros(1, 70, 100)
    mask[:, 20:50, 30:60], mask[:, 20:50, 60:80] = 1.0, 0.6
    run, inputs = graph.run, {"grow": 4, "feather": 12, **options}
    graph.latent, repaint = run("K2Inpaint", vae=graph.vae, image=original, mask=mask, **inputs)[:2]
    graph.paste = lambda picture: run(
        "K2Composite", original=original, painted=picture, mask=repaint
    )[0]
    graph.sampler["denoise"] = denoise
    return {
        "start_image": original[0].movedim(-1, 0),
        "inpaint": krea2_model.Inpaint(mask[0], **inputs),
        "denoise": denoise,
    }


def inpaint_some(graph, krea2_model):
    return inpaint(graph, krea2_model, denoise=0.7, soft=False, fill="surroundings")


def control(graph, krea2_model, **options):
    mask = options.pop("mask", None)
    graph.positive, graph.negative = graph.run(
        "K2ControlLora", control="krea2-nano outlines (built in)", positive=graph.positive,
        negative=graph.negative, vae=graph.vae, image=image(80, 96, 4),
        mask=None if mask is None else mask[None], **options,
    )[:2]  # fmt: skip
    picture = image(80, 96, 4)[0].movedim(-1, 0)
    file = "krea2_nano_control_lora.safetensors"
    return {"control": krea2_model.Control(file, picture, mask=mask, **options)}


def control_in_a_window(graph, krea2_model):
    mask = torch.zeros(80, 96)
    mask[:, 20:70] = 1
    options = control(graph, krea2_model, strength=0.7, start=0.2, end=0.8, mask=mask)
    return guided(graph, krea2_model) | options


def control_with_other_features(graph, krea2_model):
    """Two controls, a reference, and a negative by attention guidance."""
    first = control(graph, krea2_model, strength=0.6)["control"]
    second = control(graph, krea2_model, strength=0.5, end=0.6)["control"]
    others = references(graph, krea2_model) | nag(graph, krea2_model)
    return {"control": [first, second], **others}


def control_while_inpainting(graph, krea2_model):
    return inpaint(graph, krea2_model, denoise=0.8) | control(graph, krea2_model)


def tiles(graph, krea2_model, **options):
    """An image of two tiles, with a mask of a reference and a control cut to them."""
    settings = {"overlap": 0.3, **options}
    (graph.model,) = graph.run("K2TiledSampling", model=graph.model, tile=64, **settings)[:1]
    size = {"width": 112, "height": 64}
    (graph.latent,) = graph.run("K2EmptyLatent", aspect="custom", **size)[:1]
    return {"tiles": krea2_model.TileSettings(64, 0.3), **size}


def tiles_that_are_seen(graph, krea2_model, **options):
    """A picture changed in four tiles, its parts read by the text encoder."""
    picture, size = image(80, 96, 3), {"width": 96, "height": 80}
    (graph.latent,) = graph.run("K2VAEEncode", pixels=picture, vae=graph.vae)[:1]
    graph.sampler["denoise"] = 0.6
    (graph.model,) = graph.run(
        "K2TiledSampling", model=graph.model, tile=64, overlap=0.3, clip=graph.clip, image=picture,
        tile_prompt="with the tile's picture", prompt=PROMPT, **options,
    )[:1]  # fmt: skip
    tiles = krea2_model.TileSettings(64, 0.3, prompts=krea2_model.TilePrompts())
    return {"tiles": tiles, "start_image": picture[0].movedim(-1, 0), "denoise": 0.6, **size}


def tiles_with_texts(graph, krea2_model):
    """From noise, with guidance: a text for each tile, and no picture."""
    texts = ["a red circle", "a (blue:1.3) star"]
    options = {"clip": graph.clip, "prompt": "\n---\n".join(texts)}
    others = guided(graph, krea2_model) | tiles(graph, krea2_model, **options)
    prompts = krea2_model.TilePrompts(False, texts)
    return others | {"tiles": krea2_model.TileSettings(64, 0.3, prompts=prompts)}


def tiles_with_other_features(graph, krea2_model):
    mask = torch.zeros(80, 96)
    mask[:, 20:50] = 1
    others = control(graph, krea2_model, mask=mask) | references(graph, krea2_model)
    return tiles(graph, krea2_model) | others | nag(graph, krea2_model)


def rotary_scaling(graph, krea2_model):
    (graph.model,) = graph.run("K2RotaryScaling", model=graph.model, size=64)[:1]
    (graph.latent,) = graph.run("K2EmptyLatent", aspect="custom", width=128, height=64)[:1]
    return {"rotary": krea2_model.RotaryScaling(64), "width": 128, "height": 64}


def sparse_attention(graph, krea2_model):
    """With guidance and a region, in a run whose last steps are exact."""
    settings = {"block": 2, "reach": 1, "stride": 4}
    (graph.model,) = graph.run("K2SparseAttention", model=graph.model, above=0.7, **settings)[:1]
    (graph.latent,) = graph.run("K2EmptyLatent", aspect="custom", width=128, height=96)[:1]
    others = regions(graph, krea2_model)
    sparse = krea2_model.SparseAttention(0.7, **settings)
    return {"sparse": sparse, "width": 128, "height": 96, **others}


TWO = [
    {"prompt": "a red circle", "box": [0, 0, 0.5, 1], "soft": 0.1},
    {"prompt": "a (blue:1.2) star", "box": [0.5, 0, 0.5, 1], "strength": 1.5, "end": 0.7},
]


def regions(graph, krea2_model, entries=TWO, **options):
    graph.positive, graph.negative = graph.run(
        "K2Regions", clip=graph.clip, positive=graph.positive, negative=graph.negative,
        model=graph.model, latent=graph.latent, regions=json.dumps(entries), **options,
    )[:2]  # fmt: skip
    given = [krea2_model.Region(**entry) for entry in entries]
    return {"regions": krea2_model.Regions(given, **options)}


def regions_with_other_features(graph, krea2_model):
    """A LoRA in a region, a reference, a control and a negative by attention guidance."""
    files = {
        "graph": "krea2-nano notebook (built in)",
        "python": krea2_model.nano.LORA,
    }
    with_lora = {**TWO[0], "loras": [[files["graph"], 0.8]]}
    options = regions(graph, krea2_model, [with_lora, TWO[1]], separate=0.2, text_factor=0.5)
    region = krea2_model.Region(**{**with_lora, "loras": [(files["python"], 0.8)]})
    others = [region, *options["regions"].regions[1:]]
    merged = krea2_model.Regions(others, text_factor=0.5, separate=0.2)
    extra = control(graph, krea2_model) | references(graph, krea2_model) | nag(graph, krea2_model)
    return {"regions": merged, **extra}


def guided_regions(graph, krea2_model):
    return guided(graph, krea2_model) | regions_with_other_features(graph, krea2_model)


def style(graph, krea2_model, **options):
    """Two pictures, weights, a mask and a text of their own."""
    mask = torch.zeros(64, 64)
    mask[:, 16:40], mask[:, 40:48] = 1.0, 0.4
    (graph.model,) = graph.run(
        "K2StyleTransfer", model=graph.model, vae=graph.vae, clip=graph.clip,
        image=image(64, 64, 1), image_2=image(64, 32, 2), weights="2, 1", mask=mask[None],
        strength=0.8, style_prompt="red", **options,
    )[:1]  # fmt: skip
    pictures = [image(64, 64, 1)[0].movedim(-1, 0), image(64, 32, 2)[0].movedim(-1, 0)]
    weights = {"weights": (2, 1), "mask": mask, "strength": 0.8, "prompt": "red"}
    return {"style": krea2_model.StyleTransfer(pictures, **weights, **options)}


def style_in_a_window(graph, krea2_model):
    options = {"start": 0.2, "end": 0.7, "first_block": 0.4, "last_block": 0.9}
    return guided(graph, krea2_model) | style(graph, krea2_model, **options)


def style_with_other_features(graph, krea2_model):
    others = control(graph, krea2_model) | nag(graph, krea2_model)
    return others | cached_references(graph, krea2_model) | style(graph, krea2_model)


def style_with_regions(graph, krea2_model):
    return regions(graph, krea2_model, separate=0.3) | style(graph, krea2_model)


def style_of_tiles_while_inpainting(graph, krea2_model):
    """With tiles the latent is another; the mask of the style has its shape."""
    (graph.model,) = graph.run("K2TiledSampling", model=graph.model, tile=64, overlap=0.3)[:1]
    options = inpaint(graph, krea2_model, denoise=0.7)
    picture = image(64, 64, 1)
    inputs = {"model": graph.model, "vae": graph.vae, "clip": graph.clip, "image": picture}
    (graph.model,) = graph.run("K2StyleTransfer", **inputs)[:1]
    style = krea2_model.StyleTransfer(picture[0].movedim(-1, 0))
    return {"tiles": krea2_model.TileSettings(64, 0.3), "style": style, **options}


def vary(graph, krea2_model):
    """A neighbour of a neighbour."""
    noise = graph.run("K2Vary", seed=SEED, variation_seed=20, strength=0.4)[0]
    options = {"seed": 0, "variation_seed": 30, "strength": 0.3, "noise": noise}
    graph.sampler["noise"] = graph.run("K2Vary", **options)[0]
    return {"vary": [krea2_model.Variation(20, 0.4), krea2_model.Variation(30, 0.3)]}


def styles(graph, krea2_model):
    """Words, a LoRA and a picture of the styles that come with the pack."""
    chosen = {"nano black ground": 0.5, "nano notebook": 0.8, "nano yellow ring": 0.6}
    graph.model, graph.positive, graph.negative = graph.run(
        "K2Styles", model=graph.model, clip=graph.clip, vae=graph.vae, prompt=PROMPT,
        negative=NEGATIVE, styles="\n".join(f"{name}: {w}" for name, w in chosen.items()),
    )[:3]  # fmt: skip
    return {"styles": chosen}


def walk(graph, krea2_model):
    """The second of four frames, with a picture in front of both prompts' calls."""
    graph.refer()
    start, text = graph.positive, "two (blue:1.3) stars on a yellow background"
    end = graph.run("K2TextEncode", clip=graph.clip, prompt=text, negative="")[0]
    end = graph.run(
        "K2Reference", positive=end, vae=graph.vae, image=image(64, 64, 1), megapixels=1.0
    )[0]  # fmt: skip
    found = graph.run("K2Walk", start=start, end=end, frames=4, seed=SEED, end_seed=9)
    graph.positive, graph.sampler["noise"] = found[0][1], found[1][1]
    return {
        "references": [image(64, 64, 1)[0].movedim(-1, 0)],
        "blend": krea2_model.PromptBlend(text, 1 / 3),
        "vary": krea2_model.Variation(9, 1 / 3),
    }


def guided_walk(graph, krea2_model):
    return guided(graph, krea2_model) | walk(graph, krea2_model)


def walk_with_nag(graph, krea2_model):
    return nag(graph, krea2_model) | walk(graph, krea2_model)


FEATURES = {
    "turbo": [lambda graph, krea2_model: {}, layer_mix, prompt_images, references,
              references_at_the_step_s_time, weak_references, cached_references, edit,
              edit_with_cached_references, nag, start_image,
              inpaint, inpaint_some, control, control_with_other_features,
              control_while_inpainting, tiles, tiles_that_are_seen, tiles_with_other_features,
              rotary_scaling, sparse_attention,
              regions, regions_with_other_features, style, style_with_other_features,
              style_with_regions, vary, walk, walk_with_nag,
              styles,
              style_of_tiles_while_inpainting],
    "raw": [guided, guided_regions, guided_edit, guidance_schedule, step_skipping,
            control_in_a_window, style_in_a_window, guided_walk, tiles_with_texts],
}  # fmt: skip


@pytest.mark.parametrize(
    "variant, feature", [(variant, f) for variant, fs in FEATURES.items() for f in fs],
    ids=lambda value: getattr(value, "__name__", value).strip("<>"),
)  # fmt: skip
def test_graph_and_python_give_one_picture(run, pack, loaded, variant, feature):
    parts, pipeline = loaded[variant]
    krea2_model, graph = pack("krea2_model"), Graph(run, parts)
    graph.sampler |= {"shift": "fixed", "mu": 1.15}
    plain = graph.picture()
    options = {"guidance": 0.0, "steps": STEPS} | feature(graph, krea2_model)
    found = graph.picture()
    sigmas = krea2_model.sigma_schedule(options.pop("steps"), 1.15, options.get("denoise", 1.0))
    size = {} if {"start_image", "width"} & options.keys() else {"height": SIZE, "width": SIZE}
    expected = pipeline(
        PROMPT, NEGATIVE, seed=SEED, prompt_weights=True, output_type="pt", sigmas=sigmas,
        **size, **options,
    )  # fmt: skip
    assert_close(found, expected, 1e-3, "graph and Python")
    if feature.__name__ != "<lambda>":
        is_same = found.shape == plain.shape and torch.allclose(found, plain, atol=1e-3)
        assert not is_same, "the feature changes the picture"


def test_the_detailer_gives_one_picture(run, pack, loaded):
    """Two areas of one size in a batch, and one that overlaps the first, on top of its result."""
    (model, clip, vae), pipeline = loaded["turbo"]
    krea2_model, original = pack("krea2_model"), image(180, 200, 3)
    masks = torch.zeros(3, 180, 200)
    masks[0, 20:60, 20:60] = masks[1, 30:70, 120:160] = masks[2, 50:90, 50:90] = 1
    against, own = "a (red:1.6) (circle:-1)", "a (green:1.3) star"
    positive, negative = run("K2TextEncode", clip=clip, prompt=PROMPT, negative=against)[:2]
    options = {"denoise": 0.7, "seed": SEED, "steps": STEPS, "guidance": 2.0}
    found = run(
        "K2Detailer", model=model, positive=positive, negative=negative, vae=vae, image=original,
        mask=masks, clip=clip, prompts=f"\n{own}", preset="custom", **options,
    )[0]  # fmt: skip
    expected = pipeline.detail(
        original[0].movedim(-1, 0), [PROMPT, own, PROMPT], krea2_model.DetailAreas(masks),
        negative_prompt=against, prompt_weights=True, output_type="pt", **options,
    )  # fmt: skip
    assert_close(found.movedim(-1, 1), expected, 1e-3, "graph and Python")
    assert not torch.allclose(found, original, atol=1e-2)
