"""Habits from diffusers and Hugging Face: names, repositories, wrong types, repr."""

import numpy as np
import pytest
import torch
from PIL import Image

from krea2_model import (
    GuidanceSchedule,
    Krea2Pipeline,
    NegativeGuidance,
    PromptImage,
    Reference,
    load_transformer,
    nano,
    sigma_schedule,
)
from krea2_model.checkpoints.identify import CheckpointError, CheckpointNotFoundError
from krea2_model.devices import find_dtype

ONE_STEP = {"steps": 1, "guidance": 0, "output_type": "latent"}


@pytest.fixture(scope="module")
def turbo():
    return Krea2Pipeline.nano()


def test_diffusers_names_mean_the_same(turbo):
    ours = turbo("a red circle", steps=2, guidance=0, num_images=2, output_type="latent")
    theirs = turbo(
        "a red circle",
        num_inference_steps=2,
        guidance_scale=0,
        num_images_per_prompt=2,
        output_type="latent",
    )
    assert torch.equal(ours, theirs)


def test_the_result_has_images_as_in_diffusers(turbo):
    pictures = turbo("a red circle", steps=1)
    assert pictures.images[0] is pictures[0]


def test_built_in_loras_go_by_their_names(turbo):
    assert turbo.load_lora(nano.LORA.name).matched
    turbo.unload_lora()


def test_torch_dtype_is_dtype():
    transformer = Krea2Pipeline.nano(torch_dtype="bf16").transformer
    assert transformer.blocks[0].mlp.up.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"generator": torch.Generator()}, "generator: give seed="),
        ({"callback_on_step_end": print}, "give callback="),
        ({"return_dict": False}, "pipeline\\(prompt\\)\\[0\\]"),
        ({"strength": 0.5}, "give denoise="),
        ({"guidence": 1.0}, "did you mean guidance"),
        ({"steps": 1, "num_inference_steps": 1}, "are one argument; give steps"),
    ],
)
def test_other_names_are_answered(turbo, options, message):
    with pytest.raises(TypeError, match=message):
        turbo("a red circle", **options)


@pytest.mark.parametrize(
    "name, message",
    [
        ("enable_model_cpu_offload", "offload='parts'"),
        ("load_lora_weights", "load_lora"),
        ("decod", "did you mean decode"),
    ],
)
def test_methods_of_diffusers_are_answered(turbo, name, message):
    with pytest.raises(AttributeError, match=message):
        getattr(turbo, name)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": "3"},
        {"guidance": True},
        {"latents": "noise"},
        {"latents": np.zeros((1, 16, 16, 16))},
        {"sigmas": 5},
        {"sigmas": [1, "a", 0]},
        {"seed": torch.tensor(4)},
        {"callback": 5},
        {"layer_weights": 5},
        {"layer_weights": "aaaaaaaaaaaa"},
        {"images": 5},
        {"references": 5},
        {"start_image": torch.zeros(3, 128, 128), "denoise": None},
        {"negative_guidance": 5},
        {"guidance_schedule": None},
        {"negative_prompt": 5},
        {"prompt_embeds": 5},
        {"negative_prompt_embeds": "x"},
        {"prompt_embeds_mask": torch.ones(1, 2)},
    ],
    ids=str,
)
def test_wrong_types_name_the_argument(turbo, options):
    name = list(options)[-1]
    prompt = None if name == "prompt_embeds" else "a red circle"
    with pytest.raises(ValueError, match=f"^{name}.*(expected|belongs)"):
        turbo(prompt, **{**ONE_STEP, **options})


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda p: p(5), "prompt"),
        (lambda p: p.encode_prompt(5), "prompt"),
        (lambda p: p.decode(5), "latents"),
        (lambda p: p.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), "images"),
        (lambda p: p.prepare_latents("1"), "batch"),
        (lambda p: p.prepare_latents(0), "batch"),
        (lambda p: p.prepare_latents(1, sigma="a"), "sigma"),
        (lambda p: p.schedule(5), "latents"),
        (lambda p: p.denoise(torch.zeros(1, 16, 8, 8), "a fox", sigmas=[1, 0]), "positive"),
        (lambda p: p.load_lora(5), "A LoRA's path"),
        (lambda p: p.load_lora(nano.LORA, "a"), "The LoRA's scale"),
        (lambda p: p.load_loras([nano.LORA]), "loras"),
        (lambda p: Krea2Pipeline(5, 5, 5), "transformer"),
        (lambda p: Krea2Pipeline.from_pretrained(5), "The path"),
        (lambda p: load_transformer(None), "The path"),
        (lambda p: load_transformer(nano.TRANSFORMERS["raw"], device="gpu"), "device"),
        (lambda p: load_transformer(nano.TRANSFORMERS["raw"], dtype=torch.int8), "dtype"),
        (lambda p: sigma_schedule(8, "a"), "mu"),
        (lambda p: NegativeGuidance(scale="a"), "scale"),
        (lambda p: GuidanceSchedule(start="a"), "Guidance has start"),
        (lambda p: PromptImage(5), "The image"),
        (lambda p: Reference(5), "A reference"),
    ],
)
def test_wrong_types_of_other_calls(turbo, call, name):
    with pytest.raises(ValueError, match=f"^{name} .*expected"):
        call(turbo)


def test_one_picture_may_be_a_path_or_an_array(turbo, tmp_path):
    path = tmp_path / "start.png"
    Image.new("RGB", (64, 64), (200, 30, 30)).save(path)
    options = {"denoise": 0.5, **ONE_STEP}
    expected = turbo("a red circle", start_image=Image.open(path), **options)
    array = np.asarray(Image.open(path))
    for picture in (path, str(path), array, array.astype(np.float32) / 255):
        assert torch.equal(turbo("a red circle", start_image=picture, **options), expected)
    alone = turbo("a red circle", images=str(path), references=path, **ONE_STEP)
    listed = turbo("a red circle", images=[path], references=[path], **ONE_STEP)
    assert torch.equal(alone, listed)


def test_a_single_prompt_can_be_encoded(turbo):
    one, listed = turbo.encode_prompt("a fox"), turbo.encode_prompt(["a fox"])
    assert len(one.taps) == 1 and torch.equal(one.taps, listed.taps)


def test_names_of_dtypes():
    assert find_dtype("bf16") == find_dtype("torch.bfloat16") == torch.bfloat16
    assert find_dtype(None) is None


def test_repr_says_what_is_loaded(turbo):
    turbo.load_lora(nano.LORA, 0.5)
    text = repr(turbo)
    turbo.unload_lora()
    for words in (
        "turbo, ",
        "MB in float32",
        "8 steps, guidance 0",
        "cpu",
        "lora.safetensors at 0.5",
    ):
        assert words in text
    assert "loras: none" in repr(turbo)


def test_progress_is_shown_when_asked(turbo, capsys):
    turbo("a red circle", steps=3, output_type="latent")
    assert capsys.readouterr().err == ""
    turbo("a red circle", steps=3, output_type="latent", progress=True)
    assert "3/3" in capsys.readouterr().err


@pytest.fixture
def hub(tmp_path):
    """A cache of the hub that holds one repository, as huggingface_hub lays it out."""
    repository = tmp_path / "models--krea--Krea-2-Turbo"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    return tmp_path


def test_a_repository_is_taken_from_the_cache(hub, monkeypatch):
    loaded = []
    monkeypatch.setattr(Krea2Pipeline, "from_folder", lambda path, **options: loaded.append(path))
    name = "krea/Krea-2-Turbo"
    Krea2Pipeline.from_pretrained(name, cache_dir=hub, local_files_only=True)
    Krea2Pipeline.from_pretrained(hub)
    assert [path.name for path in loaded] == ["a" * 40, hub.name]
    assert (loaded[0] / "model_index.json").is_file()


def test_a_repository_that_cannot_be_had(hub):
    with pytest.raises(CheckpointError, match="krea/Krea-2-Raw is not on this machine"):
        Krea2Pipeline.from_pretrained("krea/Krea-2-Raw", cache_dir=hub, local_files_only=True)
    with pytest.raises(CheckpointNotFoundError, match="no file or folder nowhere"):
        Krea2Pipeline.from_pretrained("nowhere")
