"""Krea 2 Edit through a real ComfyUI, beside core's nodes on core's own Krea 2."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nano_training.judge import judge
from nano_training.references import reference_exam
from nano_training.scenes import draw
from parity import assert_close, relative_error
from samples import image

BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"
IDENTITY, AI_TOOLKIT, ONLY = "identity", "ai-toolkit", "references-only"
METHODS = {IDENTITY: "index", AI_TOOLKIT: "index_timestep_zero"}
PROMPT = "make it blue"


@pytest.fixture(scope="module")
def parts(models, run):
    """CLIP and VAE."""
    clip = run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")[0]
    return {"clip": clip, "vae": run("K2VAELoader", file="qwen_image_vae_tiny.safetensors")[0]}


@pytest.fixture
def edit(run, turbo, parts):
    """All outputs of the node."""

    def call(family=AI_TOOLKIT, **inputs):
        inputs = {"model": turbo, "prompt": PROMPT, **parts, **inputs}
        return run("K2Edit", family=family, **inputs)

    return call


def shown(result):
    """The text on the node."""
    return result.ui.as_dict()["text"][0]


@pytest.fixture
def report(pack, turbo, parts):
    def call(**inputs):
        inputs = {"model": turbo, "prompt": PROMPT, **parts, **inputs}
        return shown(pack("nodes.edits").K2Edit.execute(**inputs))

    return call


def by_core(run, pack, parts, text, images, seen, latents, method):
    """Conditioning of a text with images and references, by core's nodes and our CLIP."""
    tokenizer = pack("krea2_model.text.tokenizer")
    chat = tokenizer.TEMPLATE_PREFIX + seen + text + tokenizer.TEMPLATE_SUFFIX
    clip = parts["clip"]
    tokens = clip.tokenize(chat, images=images, as_trained=True)
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    for one in latents:
        conditioning = run("ReferenceLatent", conditioning=conditioning, latent={"samples": one})[0]
    node = "FluxKontextMultiReferenceLatentMethod"
    return run(node, conditioning=conditioning, reference_latents_method=method)[0]


@pytest.mark.parametrize("family", METHODS)
def test_whole_runs_equal_core(run, pack, edit, parts, core_turbo, family):
    """Eight guided steps: the scene covers the image, the subject lies in its middle.

    core_turbo: core's transformer, moved to the subject's place by its own post_input patch.
    """
    scene, subject = image(64, 96, 1), image(96, 64, 2)
    positive, negative, latent, model = edit(family, image_1=scene, image_2=subject)
    settings = {"seed": 5, "steps": 8, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple",
                "denoise": 1.0, "latent_image": latent}  # fmt: skip
    ours = run("KSampler", model=model, positive=positive, negative=negative, **settings)[0]

    labels = [f"Picture {number}: " if family == AI_TOOLKIT else "" for number in (1, 2)]
    seen = "".join(label + BLOCK for label in labels)
    encode, references = parts["vae"].encode, [scene, subject]
    if family == IDENTITY:  # 42.7 x 64 px, in whole tokens
        small = pack("krea2_model.images.pictures").fit(subject[0].movedim(-1, 0), 32, 64)
        references = [scene, small.movedim(0, -1)[None]]

        def place(args):
            args["img_ids"][:, -8:, 2] += 2.0  # (6 - 2) / 2 columns
            return args

        core_turbo.set_model_patch(place, "post_input")
    latents = [encode(each) for each in references]
    texts = [
        by_core(run, pack, parts, text, [scene, subject], seen, latents, METHODS[family])
        for text in (PROMPT, "")
    ]
    core = run("KSampler", model=core_turbo, positive=texts[0], negative=texts[1], **settings)[0]
    assert_close(ours["samples"], core["samples"], 1e-4, f"an edit by {family}")
    assert ours["samples"].shape[-2:] == (8, 12)


def test_pictures_stand_before_the_negative_too(edit):
    """The same tokens as before the empty prompt, and the same references."""
    positive, negative, *_ = edit(image_1=image(64, 64), negative="")
    empty, _, *_ = edit(image_1=image(64, 64), prompt="")
    assert torch.equal(negative[0][0], empty[0][0])
    assert negative[0][1]["reference_latents"][0].equal(positive[0][1]["reference_latents"][0])
    only, none, *_ = edit(ONLY, image_1=image(64, 64))
    assert only[0][0].shape[1] < positive[0][0].shape[1]
    assert none[0][1]["krea2_references"] == only[0][1]["krea2_references"]


def test_a_boost_within_a_mask(run, edit):
    """Where the mask is black the picture stays nearer to that without a boost."""
    mask = torch.zeros(1, 128, 128)
    mask[:, :64] = 1

    def sampled(**inputs):
        positive, _, latent, model = edit(IDENTITY, image_1=image(128, 128), **inputs)
        options = {"preset": "custom", "steps": 1, "guidance": 0.0}
        return run("K2Sampler", model=model, positive=positive, latent=latent, **options)[0][
            "samples"
        ][0, :, 0]

    plain, whole, upper = sampled(), sampled(boost=20.0), sampled(boost=20.0, mask=mask)
    assert relative_error(whole, plain) > 1e-3
    assert relative_error(upper[:, :8], whole[:, :8]) < relative_error(upper[:, :8], plain[:, :8])
    assert relative_error(upper[:, 8:], plain[:, 8:]) < relative_error(upper[:, 8:], whole[:, 8:])
    assert torch.equal(sampled(boost_2=20.0), plain)


def test_cached_references(edit):
    positive, *_ = edit(image_1=image(64, 64), cache=True)
    assert positive[0][1]["krea2_references_apart"] is True


@pytest.mark.parametrize("name", ["identity_edit_v1.safetensors", "style_reference.safetensors"])
def test_auto_reads_the_lora_s_family(run, turbo, models, report, name):
    """Through our loader, from the name; a LoRA at strength 0 says nothing."""
    weight = turbo.model.diffusion_model.blocks[0].attn.wq.weight
    file = models / "loras" / name
    layer = "diffusion_model.blocks.0.attn.wq"
    file.parent.mkdir(exist_ok=True)
    save_file({f"{layer}.lora_A.weight": torch.ones(1, weight.shape[1]),
               f"{layer}.lora_B.weight": torch.zeros(weight.shape[0], 1) + 1e-4}, file)  # fmt: skip
    family = IDENTITY if "identity" in name else AI_TOOLKIT
    model, _, text = run("K2LoraLoader", model=turbo, lora=name)
    assert f"an edit LoRA, family {family} (by its name)" in text
    assert report(model=model, image_1=image(64, 64)).startswith(f"family {family} (by its name)")
    off = run("K2LoraLoader", model=turbo, lora=name, strength=0.0)[0]
    with pytest.raises(ValueError, match="none of the LoRAs tells"):
        report(model=off, image_1=image(64, 64))
    file.unlink()


def test_a_removal_sets_the_sampler_s_preset(run, raw, turbo, report, edit):
    """On Raw; on Turbo the node says what is missing."""
    removal = {"image_1": image(64, 64), "task": "removal"}
    text = report(model=raw, family=ONLY, **removal)
    assert "removal: 20 steps, guidance 2\n(by preset auto)" in text
    model = edit(ONLY, model=raw, **removal)[3]
    preset = model.model_options["krea2_preset"]
    assert (preset.steps, preset.guidance, preset.mu) == (20, 2.0, None)
    assert "krea2_preset" not in raw.model_options
    assert "removal needs Raw at guidance 2,\n20 steps" in report(family=ONLY, **removal)
    assert "krea2_preset" not in edit(ONLY, **removal)[3].model_options


def test_size_and_notes(run, report, edit, caplog):
    large = run("K2EmptyLatent", aspect="custom", width=1536, height=1536)[0]
    text = report(family=ONLY, image_1=image(64, 64), latent=large, mask=torch.ones(1, 64, 64))
    assert "1536 x 1536 px" in text and "subjects may double" in text
    assert "not used: mask, at boost 1" in text
    assert "above 2 megapixels" in caplog.text
    wide = run("K2EmptyLatent", aspect="custom", width=128, height=64)[0]
    text = report(family=IDENTITY, image_1=image(64, 64), latent=wide, task="outpainting")
    assert "outpainting needs sampler euler" in text
    positive = edit(IDENTITY, image_1=image(64, 64), latent=wide)[0]
    assert positive[0][1]["krea2_references"][0].offset == (0.0, 2.0)
    assert edit(ONLY, image_1=image(64, 96))[2]["samples"].shape == (1, 16, 1, 8, 12)
    sized = edit(ONLY, image_1=image(64, 128), megapixels=0.03125)[2]["samples"]
    assert sized.shape == (1, 16, 1, 16, 32)
    for line in text.split("\n"):
        assert len(line) < 40, line


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"image_1": image(64, 64, batch=3)}, "There are 3 pictures"),
        ({"image_1": torch.zeros(0, 64, 64, 3)}, "The image is"),
        ({"family": IDENTITY, "cache": True}, "need the time 0"),
        ({"family": "kontext"}, "expected auto, identity"),
        ({"family": "auto"}, "none of the LoRAs tells"),
        ({"task": "dance"}, "task is 'dance'"),
        ({"task": "outpainting"}, "nothing to add"),
        ({"mask": torch.ones(1, 64, 200), "boost": 2.0}, "same size"),
        ({"mask": torch.zeros(1, 64, 64), "boost": 2.0}, "is empty"),
        ({"boost": 1000.0}, "boost is 1000"),
        ({"encoder_side": 16}, "encoder_side is 16"),
        ({"clip": None}, "clip is empty"),
        ({"vae": None}, "vae is empty"),
    ],
)
def test_bad_inputs_are_refused_before_anything_is_encoded(
    report, parts, inputs, words, monkeypatch
):
    for part, method in (("vae", "encode"), ("clip", "encode_from_tokens_scheduled")):
        late = lambda *a, **k: pytest.fail("too late")  # noqa: E731
        monkeypatch.setattr(parts[part], method, late)
    with pytest.raises(ValueError, match=words):
        report(**{"family": AI_TOOLKIT, "image_1": image(64, 64), **inputs})


def test_the_page_is_told_of_bad_values(pack):
    check = pack("nodes.edits").K2Edit.validate_inputs
    assert check(family="auto", task="removal", boost=2.0) is True
    assert "expected one of edit" in check(task="dance")
    assert "boost is -1" in check(boost=-1.0)


def test_nano_paints_the_layout_of_the_prompt_in_the_picture_s_colours(run):
    """As tests/unit/test_nano_reference.py asks of the pipeline, in twelve of its cases."""
    model, clip, vae = run("K2Loader", model="krea2-nano (built in)")
    model = run("K2LoraLoader", model=model, lora="krea2-nano reference (built in)")[0]
    cases, verdicts = reference_exam()[:12], []
    for seed, case in enumerate(cases):
        picture = torch.from_numpy(draw(case.reference))[None]
        positive, negative, latent, edited = run(
            "K2Edit", model=model, clip=clip, vae=vae, prompt=case.prompt, image_1=picture
        )
        samples = run("K2Sampler", model=edited, positive=positive, negative=negative,
                      latent=latent, seed=seed)[0]  # fmt: skip
        painted = run("K2VAEDecode", samples=samples, vae=vae)[0][0].numpy()
        verdicts.append(judge(painted, case.scene))
    parts = ("colour", "shape", "place")
    assert np.mean([all(verdict[part] for part in parts) for verdict in verdicts]) >= 0.8
    assert np.mean([verdict["background"] for verdict in verdicts]) >= 0.9
