"""The headless API of a real server: pictures, refusals, cancelling."""

import copy
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny_checkpoints
from headless import ROOT, JobError

WORKFLOWS = sorted((ROOT / "tests" / "workflows").glob("*.json"))
# Of Raw before sigma 0.84, at 128 x 96 px, and the last five of Turbo.
TWO_STAGE_STEPS = 7 + 5
OFFICIAL_NAMES = {
    "diffusion_models/krea2_turbo_bf16": "diffusion_models/krea2_tiny_turbo",
    "diffusion_models/krea2_raw_bf16": "diffusion_models/krea2_tiny_raw",
    "text_encoders/qwen3vl_4b_bf16": "text_encoders/qwen3vl_tiny",
    # The workflows name these.
    "diffusion_models/krea2_turbo_fp8_scaled": "diffusion_models/krea2_tiny_turbo",
    "diffusion_models/krea2_raw_fp8_scaled": "diffusion_models/krea2_tiny_raw",
    "text_encoders/qwen3vl_4b_fp8_scaled": "text_encoders/qwen3vl_tiny",
    "vae/qwen_image_vae": "vae/qwen_image_vae_tiny",
}


@pytest.fixture(scope="module")
def server(server):
    """The server, with small checkpoints under the official names, by symbolic links."""
    models = server.base / "models"
    tiny_checkpoints.write_models(models)
    make_brief(models / "text_encoders" / "qwen3vl_tiny.safetensors")
    for name, target in OFFICIAL_NAMES.items():
        (models / f"{name}.safetensors").symlink_to(models / f"{target}.safetensors")
    make_bad_files(models)
    make_lora(models)
    return server


def make_brief(encoder):
    """Have random weights end their texts: the token that does is written more often."""
    tensors = load_file(encoder)
    tensors["model.embed_tokens.weight"][151645] *= 3
    save_file(tensors, encoder)


def make_lora(models):
    """A small LoRA under the names of those that the workflows load."""
    weights = load_file(models / "diffusion_models" / "krea2_tiny_turbo.safetensors")
    rows, columns = weights["blocks.0.attn.wq.weight"].shape
    name = "diffusion_model.blocks.0.attn.wq.lora"
    (models / "loras").mkdir(exist_ok=True)
    for file in (
        "krea2_style_reference",
        "krea2_darkbrush",
        "krea2_identity_edit_v1_2",
        "NK2E-canny-v0.1",
    ):
        save_file(
            {f"{name}_A.weight": torch.full((4, columns), 0.01),
             f"{name}_B.weight": torch.full((rows, 4), 0.01)},
            models / "loras" / f"{file}.safetensors",
        )  # fmt: skip


def make_bad_files(models):
    folder = models / "diffusion_models"
    whole = (folder / "krea2_tiny_turbo.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    torch.save({"weight": torch.zeros(2)}, folder / "pickle.safetensors")
    torch.save({"weight": torch.zeros(2)}, folder / "pickle.pt")
    (folder / "page.safetensors").write_bytes(b"<!DOCTYPE html><html></html>")
    tensors = load_file(folder / "krea2_tiny_turbo.safetensors")
    save_file({k: v for k, v in tensors.items() if "blocks.1." not in k or "wq" in k},
              folder / "incomplete.safetensors")  # fmt: skip
    broken = dict(tensors, **{"last.norm.scale": torch.full((256,), float("nan"))})
    save_file(broken, folder / "nan.safetensors")
    encoder = load_file(models / "text_encoders" / "qwen3vl_tiny.safetensors")
    few = {k: v for k, v in encoder.items() if ".layers." not in k or int(k.split(".")[2]) < 20}
    save_file(few, models / "text_encoders" / "few_layers.safetensors")
    wide = replace(tiny_checkpoints.TEXT_ENCODER, hidden_size=320)
    tensors = tiny_checkpoints.text_encoder_tensors(wide)
    save_file(tensors, models / "text_encoders" / "too_wide.safetensors")


@pytest.fixture
def graph():
    """The Turbo workflow at a small size, by class: nodes["K2Sampler"]["steps"] = 3."""
    whole = json.loads((ROOT / "tests/workflows/krea2_turbo_text_to_image.json").read_text())
    nodes = {node["class_type"]: node["inputs"] for node in whole.values()}
    nodes["K2EmptyLatent"].update(aspect="custom", width=128, height=96)
    # Without the expander, which is a switch there.
    nodes["K2TextEncode"]["prompt"] = nodes["K2PromptExpander"]["prompt"]
    nodes["graph"] = whole
    return nodes


def picture(server, whole, on_progress=None):
    # The limit only ends a run that hangs: a busy machine may take minutes for a long prompt.
    (png,) = server.images(server.run(whole, on_progress, timeout=600))
    return np.asarray(Image.open(io.BytesIO(png)))


def example_image():
    """Something to change, its middle masked."""
    image = Image.linear_gradient("L").resize((256, 192)).convert("RGB")
    opaque = Image.new("L", image.size, 255)
    opaque.paste(0, (100, 60, 160, 120))
    image.putalpha(opaque)
    return image


def test_the_expander_of_text_to_image_is_a_switch(server):
    """Off, as in the workflow, the prompt is encoded as it is; on, a caption of it."""
    whole, of_raw = (
        json.loads((ROOT / f"tests/workflows/krea2_{variant}_text_to_image.json").read_text())
        for variant in ("turbo", "raw")
    )
    # Raw's is wired alike, so one of them has to be run.
    for kind, text in (("K2PromptExpander", "prompt"), ("K2TextEncode", "negative")):
        nodes = [
            (number, node["inputs"] | {text: ""})
            for each in (whole, of_raw)
            for number, node in each.items()
            if node["class_type"] == kind
        ]
        assert len(nodes) == 2 and nodes[0] == nodes[1]
    inputs = {node["class_type"]: node["inputs"] for node in whole.values()}
    number = {node["class_type"]: number for number, node in whole.items()}["K2PromptExpander"]
    inputs["K2EmptyLatent"].update(aspect="custom", width=64, height=64)
    inputs["K2PromptExpander"].update(length="short", prompt="a fox")
    shown = []
    for enabled in (False, True):
        inputs["K2PromptExpander"]["enabled"] = enabled
        inputs["K2Sampler"]["seed"] = int(enabled)
        outputs = server.wait(server.post(whole), timeout=120)
        assert len(server.images(outputs)) == 1
        shown.append(outputs[number]["text"][0])
    assert shown[0] == "off: the prompt goes on as it is" and shown[1] not in ("", shown[0])


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_give_pictures(server, file):
    whole = json.loads(file.read_text())
    for node in whole.values():
        if node["class_type"] == "K2EmptyLatent":
            node["inputs"].update(aspect="custom", width=128, height=96)
        if node["class_type"] in ("K2FitImage", "K2CropForInpaint", "K2Detailer"):
            node["inputs"]["megapixels"] = 128 * 96 / 1024**2
        if node["class_type"] == "K2Outpaint":
            node["inputs"]["right"] = 64
        if node["class_type"] == "K2PromptExpander":
            node["inputs"]["length"] = "short"
        if node["class_type"] == "K2TrainLora":
            node["inputs"].update(steps=2, batch=1, resolution=64)
    example_image().save(server.base / "input" / "example.png")
    steps = []
    # Not post and wait, between which a small model may be done on a busy machine.
    outputs = server.run(whole, lambda node, step, total: steps.append((step, total)), 120)
    kinds = {node["class_type"]: node["inputs"] for node in whole.values()}
    shown = {"PreviewImage", "K2TrainLora"}
    saved = {n: o for n, o in outputs.items() if whole[n]["class_type"] not in shown}
    assert (len(saved) < len(outputs)) == bool(shown & kinds.keys())
    images = [np.asarray(Image.open(io.BytesIO(png))) for png in server.images(saved)]
    if "K2ContactSheet" in kinds:
        sheet = images.pop()
        assert sheet.shape[0] > 2 * 96 and sheet.shape[1] > 2 * 128
    is_sheet_alone = "K2ContactSheet" in kinds and not images
    cells = [cell for o in outputs.values() for s in o.get("k2_grid", ()) for cell in s["cells"]]
    if cells:
        sheet = images.pop()
        assert sheet.shape[0] > 3 * 96 and sheet.shape[1] > 4 * 128 and len(cells) == 3 * 4
        (png,) = server.images({"3": {"images": [cells[-1]["file"]]}})
        images = [np.asarray(Image.open(io.BytesIO(png)))]
    prompts = kinds.get("K2PromptBatch", {"prompts": "one"})["prompts"].splitlines()
    assert len(images) == (0 if is_sheet_alone else len(prompts))
    shape = (96, 128)
    if "K2Outpaint" in kinds:
        shape = (96, 128 + 64)
    if "K2Upscale" in kinds or "K2TiledSampling" in kinds:
        shape = (2 * 96, 2 * 128)
    if {"K2Stitch", "K2Edit", "K2Detailer"} & kinds.keys():
        shape = example_image().size[::-1]
    for image in images:
        assert image.shape == (*shape, 3) and image.std() > 10
    one = 28 if "krea2_raw" in file.read_text() else 8
    total = TWO_STAGE_STEPS if "K2TwoStage" in kinds else one
    total *= len(cells) or 1
    assert (total, total) in steps


def test_the_same_picture_without_comfyui(server, graph, pack):
    """A seed gives the same pixels through the API and through Python."""
    models = server.base / "models"
    pipeline = pack("krea2_model").Krea2Pipeline.from_files(
        models / "diffusion_models" / "krea2_turbo_bf16.safetensors",
        models / "text_encoders" / "qwen3vl_4b_bf16.safetensors",
        models / "vae" / "qwen_image_vae.safetensors",
        dtype=torch.float32,
    )
    graph["K2Sampler"]["seed"] = 77
    prompt = graph["K2TextEncode"]["prompt"]
    (native,) = pipeline(prompt, height=96, width=128, seed=77)
    difference = np.abs(
        picture(server, graph["graph"]).astype(int) - np.asarray(native).astype(int)
    )
    assert difference.max() <= 1, difference.max()


def test_nano_paints_the_same_everywhere(server, pack):
    """Its first workflow: the same pixels in Python, and in a server with the published files."""
    whole = json.loads((ROOT / "tests/workflows/krea2_nano_first_image.json").read_text())
    nodes = {node["class_type"]: node["inputs"] for node in whole.values()}
    nodes["K2Sampler"]["seed"] = 12
    first = picture(server, whole)
    (native,) = pack("krea2_model").Krea2Pipeline.nano()(nodes["K2TextEncode"]["prompt"], seed=12)
    assert np.abs(first.astype(int) - np.asarray(native).astype(int)).max() <= 1


def test_translations_are_served(server):
    words = server.request("/i18n")
    assert {"en", "es", "ja", "zh"} <= words.keys()
    assert words["zh"]["nodeDefs"]["K2Sampler"]["inputs"]["steps"]["name"] == "\u6b65\u6570"


def test_inpainting_changes_no_byte_outside_of_the_mask(server):
    """From a picture with a painted mask to a PNG, whole and by a part that is cut out."""
    random = np.random.default_rng(5)
    before = random.integers(0, 256, (150, 210, 4), dtype=np.uint8)
    before[..., 3] = 255
    before[40:90, 120:180, 3] = 0
    Image.fromarray(before).save(server.base / "input" / "masked.png")

    def graph(part, result, used, **others):
        """`part`: image and mask to work on; `used`: what the painted image is laid over."""
        text_to_image = ROOT / "tests/workflows/krea2_nano_first_image.json"
        found = {
            entry["class_type"]: entry for entry in json.loads(text_to_image.read_text()).values()
        }
        found["K2TextEncode"]["inputs"].update(clip=["1", 1], prompt="a red star")
        found["K2Sampler"]["inputs"].update(
            model=["1", 0], positive=["2", 0], negative=["2", 1], latent=["4", 0]
        )
        return {
            "1": found["K2Loader"],
            "2": found["K2TextEncode"],
            "3": node("LoadImage", image="masked.png"),
            "4": node("K2Inpaint", vae=["1", 2], image=[part, 0], mask=[part, 1], grow=0,
                      feather=8, soft=True, fill="surroundings"),
            "5": found["K2Sampler"],
            "6": node("K2VAEDecode", samples=["5", 0], vae=["1", 2]),
            "7": node(result, painted=["6", 0], feather=4, **used),
            "8": node("SaveImage", images=["7", 0], filename_prefix="inpainted"),
            **others,
        }  # fmt: skip

    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    whole = graph("3", "K2Composite", {"original": ["3", 0], "mask": ["4", 1]})
    cut = node("K2CropForInpaint", image=["3", 0], mask=["3", 1], context=1.5, megapixels=0.0156)
    by_part = graph("9", "K2Stitch", {"stitch": ["9", 2]}, **{"9": cut})
    for posted, margin in ((whole, 8), (by_part, 0)):
        after = picture(server, posted)
        change = np.abs(after.astype(int) - before[..., :3]).max(axis=2)
        inside = change[40:90, 120:180].copy()
        change[40 - margin : 90 + margin, 120 - margin : 180 + margin] = 0
        assert change.max() == 0 and inside.mean() > 20


def test_a_size_is_rounded_up_and_says_so(server, graph):
    graph["K2EmptyLatent"].update(width=17, height=33)
    prompt_id = server.post(graph["graph"])
    outputs = server.wait(prompt_id, timeout=60)
    (image,) = server.images(outputs)
    assert Image.open(io.BytesIO(image)).size == (32, 48)
    texts = [text for output in outputs.values() for text in output.get("text", ())]
    assert "32 x 48 px, 0.00 megapixels,\nrounded up from 17 x 33" in texts


def test_a_lora_reports_and_changes_the_picture(server):
    whole = json.loads((ROOT / "tests/workflows/krea2_nano_first_image.json").read_text())
    plain = picture(server, whole)
    whole["lora"] = {
        "class_type": "K2LoraLoader",
        "inputs": {"model": ["1", 0], "lora": "krea2-nano notebook (built in)", "strength": 1.0,
                   "clip_strength": 1.0},
    }  # fmt: skip
    (sampler,) = [node for node in whole.values() if node["class_type"] == "K2Sampler"]
    sampler["inputs"]["model"] = ["lora", 0]
    outputs = server.wait(server.post(whole), timeout=120)
    (png,) = server.images(outputs)
    assert np.abs(np.asarray(Image.open(io.BytesIO(png))).astype(int) - plain).mean() > 5
    (report,) = outputs["lora"]["text"]
    assert report.startswith("krea2_nano_notebook_lora.safetensors: LoRA of ")
    assert "48 weights of the transformer matched" in report and "left out" not in report

    whole["lora"]["inputs"]["lora"] = "../vae/qwen_image_vae.safetensors"
    with pytest.raises(JobError, match="There is no '../vae/qwen_image_vae.safetensors'"):
        server.post(whole)


def test_inspect_describes_files(server):
    (server.base / "models" / "loras").mkdir(exist_ok=True)
    for file, words in (
        ("diffusion_models/krea2_turbo_bf16.safetensors", ("a Krea 2 transformer", "turbo")),
        ("text_encoders/few_layers.safetensors", ("broken",)),
        ("vae/qwen_image_vae.safetensors", ("a Qwen-Image VAE",)),
    ):
        graph = {"1": {"class_type": "K2Inspect", "inputs": {"file": file}}}
        (text,) = server.wait(server.post(graph), timeout=60)["1"]["text"]
        assert all(word in text for word in words), text
    graph["1"]["inputs"]["file"] = "diffusion_models/../../../etc/passwd"
    with pytest.raises(JobError, match="There is no"):
        server.post(graph)


LOADER_REFUSALS = {
    "missing": (
        "model",
        "nowhere.safetensors",
        "no 'nowhere.safetensors' in models/diffusion_models",
    ),
    "vae as model": ("model", "../vae/qwen_image_vae.safetensors", "There is no"),
    "truncated": ("model", "truncated.safetensors", "is incomplete or damaged"),
    "empty": ("model", "empty.safetensors", "is empty; expected a safetensors file"),
    "pickle": ("model", "pickle.safetensors", "a PyTorch pickle, which can run code"),
    "pickle by name": ("model", "pickle.pt", "is a .pt file; expected a Krea 2 transformer"),
    "web page": ("model", "page.safetensors", "a web page"),
    "incomplete": ("model", "incomplete.safetensors", "missing (such as blocks.1."),
    "nan": ("model", "nan.safetensors", "last.norm.scale.weight holds NaN or infinity"),
    "few layers": ("text_encoder", "few_layers.safetensors", "20 layers"),
    "wide encoder": (
        "text_encoder",
        "too_wide.safetensors",
        "gives text of width 320",
    ),
}


@pytest.mark.parametrize("name", LOADER_REFUSALS)
def test_bad_files_are_refused(server, graph, name):
    field, value, message = LOADER_REFUSALS[name]
    graph["K2Loader"][field] = value
    with pytest.raises(JobError) as refused:
        server.wait(server.post(graph["graph"]), timeout=60)
    assert message in str(refused.value)
    assert value in str(refused.value)


WRONG_KINDS = [
    (
        "K2ModelLoader",
        "qwen_image_vae.safetensors",
        "vae",
        "is a Qwen-Image VAE; expected a Krea 2",
    ),
    ("K2ModelLoader", "qwen3vl_4b_bf16.safetensors", "text_encoders", "is a Qwen3-VL text encoder"),
    (
        "K2TextEncoderLoader",
        "qwen_image_vae.safetensors",
        "vae",
        "expected a Qwen3-VL text encoder",
    ),
    ("K2VAELoader", "krea2_raw_bf16.safetensors", "diffusion_models", "is a Krea 2 transformer"),
]
FOLDERS = {"K2ModelLoader": "diffusion_models", "K2TextEncoderLoader": "text_encoders",
           "K2VAELoader": "vae"}  # fmt: skip


@pytest.mark.parametrize("node, file, source, message", WRONG_KINDS)
def test_files_of_another_kind_are_hidden_and_refused(server, node, file, source, message):
    models = server.base / "models"
    misplaced = models / FOLDERS[node] / f"misplaced_{source}.safetensors"
    if not misplaced.exists():
        misplaced.symlink_to(models / source / file)
    assert misplaced.name not in server.options(node, "file")
    graph = {
        "1": {"class_type": node, "inputs": {"file": misplaced.name, "dtype": "auto"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    with pytest.raises(JobError, match=f"{misplaced.name} .*{message}.*for example"):
        server.post(graph)


@pytest.fixture
def subfolders(server):
    """Model files, a LoRA and a diffusers folder, all one and two folders down."""
    models, made = server.base / "models", []
    for name, target in (
        ("diffusion_models/krea2/v1/turbo.safetensors", "diffusion_models/krea2_turbo_bf16"),
        ("text_encoders/krea2/qwen.safetensors", "text_encoders/qwen3vl_4b_bf16"),
        ("vae/krea2/vae.safetensors", "vae/qwen_image_vae"),
    ):
        path = models / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(models / f"{target}.safetensors")
        made.append(path)
    lora = models / "loras" / "krea2" / "styles" / "notebook.safetensors"
    lora.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "krea2_model" / "nano" / "krea2_nano_notebook_lora.safetensors", lora)
    folder = models / "diffusers" / "krea2" / "turbo"
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text('{"_class_name": "Krea2Pipeline"}')
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.symlink_to(models / "diffusion_models" / "krea2_turbo_bf16.safetensors")
    yield
    for path in (*made, lora, folder / "model_index.json", weights):
        path.unlink()


@pytest.mark.parametrize("slash", ["/", "\\"], ids=["of Linux", "of Windows"])
def test_shared_workflows_name_files_with_either_slash(server, subfolders, graph, slash):
    """What a page on another system saved passes ComfyUI's validation, and runs."""
    expected = picture(server, graph["graph"])
    names = {
        "model": "krea2/v1/turbo.safetensors",
        "text_encoder": "krea2/qwen.safetensors",
        "vae": "krea2/vae.safetensors",
    }
    graph["K2Loader"].update({key: name.replace("/", slash) for key, name in names.items()})
    assert np.array_equal(picture(server, graph["graph"]), expected)
    one_by_one = {
        "K2ModelLoader": names["model"],
        "K2TextEncoderLoader": names["text_encoder"],
        "K2VAELoader": names["vae"],
        "K2Inspect": "loras/krea2/styles/notebook.safetensors",
    }
    nodes = {
        node: {"class_type": node, "inputs": {"file": name.replace("/", slash), "dtype": "auto"}}
        for node, name in one_by_one.items()
    }
    del nodes["K2Inspect"]["inputs"]["dtype"]
    nodes["folder"] = copy.deepcopy(nodes["K2ModelLoader"])
    nodes["folder"]["inputs"]["file"] = f"krea2{slash}turbo"
    nodes["K2LoraLoader"] = {
        "class_type": "K2LoraLoader",
        "inputs": {"model": ["built in", 0], "strength": 1.0, "clip_strength": 1.0,
                   "lora": f"krea2{slash}styles{slash}notebook.safetensors"},
    }  # fmt: skip
    nodes["built in"] = {
        "class_type": "K2ModelLoader",
        "inputs": {"file": "krea2-nano (built in)", "dtype": "auto"},
    }
    for node in ("K2ModelLoader", "K2TextEncoderLoader", "K2VAELoader", "folder", "K2LoraLoader"):
        nodes[f"show {node}"] = {"class_type": "PreviewAny", "inputs": {"source": [node, 0]}}
    outputs = server.wait(server.post(nodes), timeout=120)
    assert "a LoRA" in outputs["K2Inspect"]["text"][0]
    assert len([name for name in outputs if name.startswith("show ")]) == 5


VALUE_REFUSALS = [
    ("K2EmptyLatent", "width", 0, "width is 0; expected a whole number of pixels from 1 to 16384"),
    ("K2EmptyLatent", "height", -16, "height is -16; expected"),
    ("K2EmptyLatent", "width", 100_000, "width is 100000; expected"),
    ("K2EmptyLatent", "aspect", "7:5", "aspect is '7:5'; expected one of 1:1"),
    ("K2Sampler", "steps", 0, "steps is 0; expected a whole number from 1 to 10000"),
    ("K2Sampler", "guidance", float("nan"), "guidance is nan; expected 0 (off) or more"),
    ("K2Sampler", "denoise", 0.0, "denoise is 0.0; expected more than 0"),
    ("K2Sampler", "mu", 800.0, "mu is 800.0; expected a number from -100 to 100"),
    ("K2Sampler", "mu", float("nan"), "mu is nan; expected a number"),
    ("K2Sampler", "steps", 10**9, "steps is 1000000000; expected"),
]


@pytest.mark.parametrize("node, name, value, message", VALUE_REFUSALS)
def test_bad_values_are_refused(server, graph, node, name, value, message):
    graph[node][name] = value
    with pytest.raises(JobError) as refused:
        server.post(graph["graph"])
    assert message in str(refused.value)


def test_raw_without_a_negative_says_what_to_connect(server, graph):
    graph["K2Loader"]["model"] = "krea2_raw_bf16.safetensors"
    del graph["K2Sampler"]["negative"]
    with pytest.raises(JobError, match="Connect the negative output of Krea 2"):
        server.wait(server.post(graph["graph"]), timeout=60)


def test_the_server_goes_on_after_refusals(server, graph):
    assert picture(server, graph["graph"]).shape == (96, 128, 3)


def test_empty_and_very_long_prompts(server, graph):
    graph["K2TextEncode"]["prompt"] = ""
    empty = picture(server, graph["graph"])
    graph["K2TextEncode"]["prompt"] = "fox " * 600
    graph["K2Sampler"].update(preset="custom", steps=1, guidance=0.0)
    long = picture(server, graph["graph"])
    assert empty.shape == long.shape
    assert "trained on up to 507" in server.log.read_text()


def test_cancelling_stops_within_a_step_and_the_next_job_runs(server, graph):
    slow = copy.deepcopy(graph)
    slow["K2Sampler"].update(preset="custom", steps=500, guidance=0.0)
    steps, cancelled_at = [], []

    def cancel_at_three(node, step, total):
        if total == 500:
            steps.append(step)
            if step >= 3 and not cancelled_at:
                cancelled_at.append(step)
                assert server.cancel(prompt_id)

    prompt_id = server.post(slow["graph"])
    with pytest.raises(JobError, match="interrupted"):
        server.wait(prompt_id, cancel_at_three, timeout=600)
    # The message takes its way, during which a small model makes steps.
    assert steps[-1] < 100
    assert picture(server, graph["graph"]).shape == (96, 128, 3)


def test_seeds(server, graph):
    images = []
    for seed in (1, 1, 2):
        graph["K2Sampler"]["seed"] = seed
        # Something else that changes nothing, so that the result is not taken from the cache.
        graph["K2Sampler"]["guidance"] = 1.0 + len(images)
        images.append(picture(server, graph["graph"]))
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


def test_a_table_is_rendered_by_a_server(server, tmp_path):
    """`krea2 render --engine comfyui`: the pictures that the API gives for the same graphs."""
    graph = ROOT / "tests" / "workflows" / "krea2_nano_first_image.json"
    rows = [{"prompt": f"a red {shape}", "seed": 3} for shape in ("star", "ring")]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["render", table, "--engine", "comfyui", "--workflow", graph, "--quiet"]
    words += ["--server", server.address, "--output", tmp_path / "out"]
    subprocess.run(
        [sys.executable, "-m", "krea2_model", *map(str, words)], check=True, cwd=ROOT, timeout=300
    )
    lines = (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    found = {entry["row"]: tmp_path / "out" / entry["file"] for entry in map(json.loads, lines)}
    filled = json.loads(graph.read_text(encoding="utf-8"))
    filled["2"]["inputs"]["prompt"], filled["4"]["inputs"]["seed"] = rows[1]["prompt"], 3
    [png] = server.images(server.run(filled))
    assert np.array_equal(pixels(found[2].read_bytes()), pixels(png))
    assert not np.array_equal(pixels(found[1].read_bytes()), pixels(png))


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))
