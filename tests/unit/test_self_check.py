"""The self-check without ComfyUI: what it says is wrong, and that each wrong thing has a remedy."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

import tiny_checkpoints
from formats import gguf_file
from krea2_model.checkpoints.identify import CheckpointError
from krea2_model.cli.main import main
from krea2_model.tools import self_check as checking
from krea2_model.tools.self_check import Report, check


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "models"
    tiny_checkpoints.write_models(folder)
    return folder


@pytest.fixture
def models(written, tmp_path):
    return shutil.copytree(written, tmp_path / "models")


def lines_of(report, title):
    return dict(report.sections)[title]


def test_good_files_are_told_and_nothing_is_wrong(models):
    report = check(models)
    assert report.wrong == []
    files = lines_of(report, "Model files")
    turbo = next(line for line in files if "turbo" in line)
    assert turbo.startswith("diffusion_models/krea2_tiny_turbo.safetensors: a Krea 2 transformer")
    assert "variant: turbo" in turbo and "bfloat16" in turbo
    assert files[-1] == "0 LoRAs, 0 other files"


def test_the_pack_s_version_is_that_of_pyproject():
    import tomllib

    file = Path(__file__).parents[2] / "pyproject.toml"
    version = tomllib.loads(file.read_text())["project"]["version"]
    assert f"Krea 2 Kit: {version}" in lines_of(check(), "Versions")


@pytest.mark.parametrize(
    "part, remedy",
    [
        ("text_encoders", "Download qwen3vl_4b_bf16.safetensors (models/text_encoders)"),
        ("vae", "Download qwen_image_vae.safetensors (models/vae)"),
    ],
)
def test_a_missing_part_is_wrong(models, part, remedy):
    shutil.rmtree(models / part)
    (message,) = check(models).wrong
    assert remedy in message


def test_without_a_transformer_there_is_nano(models):
    shutil.rmtree(models / "diffusion_models")
    report = check(models)
    assert report.wrong == []
    assert any("krea2-nano" in note for note in report.notes)


def test_an_encoder_without_vision_tower_may_be_another_model_s(models):
    assert not any("vision tower" in note for note in check(models).notes)
    path = models / "text_encoders" / "qwen3vl_tiny.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "visual." not in k}, path)
    assert any("Z-Image" in note for note in check(models).notes)


def test_a_cut_off_download_is_wrong(models):
    path = models / "vae" / "qwen_image_vae_tiny.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    wrong = check(models).wrong
    assert any(text.startswith("vae/") and "Download it again" in text for text in wrong)
    assert not any(str(models) in text for text in wrong)


def test_missing_tensors_are_wrong(models):
    path = models / "diffusion_models" / "krea2_tiny_turbo.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != "blocks.1.attn.wq.weight"}, path)
    (message,) = check(models).wrong
    assert "missing: blocks.1.attn.wq.weight" in message


def test_a_file_in_the_wrong_folder_is_wrong(models):
    source = models / "diffusion_models" / "krea2_tiny_turbo.safetensors"
    (models / "loras").mkdir(exist_ok=True)
    source.rename(models / "loras" / source.name)
    (message,) = check(models).wrong
    assert message.endswith("Move it to models/diffusion_models.")


def test_every_part_of_an_all_in_one_file_counts(models):
    """A checkpoint with all three parts needs no other files."""
    tensors = {}
    for folder, prefix in (
        ("diffusion_models", "model.diffusion_model."),
        ("text_encoders", "text_encoders.qwen3vl_4b.transformer."),
        ("vae", "vae."),
    ):
        file = sorted((models / folder).glob("*.safetensors"))[-1]
        tensors |= {f"{prefix}{name}": tensor for name, tensor in load_file(file).items()}
        shutil.rmtree(models / folder)
    (models / "checkpoints").mkdir()
    save_file(tensors, models / "checkpoints" / "krea2_all.safetensors")
    report = check(models)
    assert report.wrong == []
    assert "with a Qwen3-VL text encoder with" in lines_of(report, "Model files")[0]


def test_a_pickle_of_krea_is_refused_and_another_s_ignored(models):
    (models / "diffusion_models" / "krea2_turbo.ckpt").write_bytes(b"\x80")
    (models / "diffusion_models" / "sd15.ckpt").write_bytes(b"\x80")
    report = check(models)
    (message,) = report.wrong
    assert "krea2_turbo.ckpt" in message and "as .safetensors" in message
    assert lines_of(report, "Model files")[-1] == "0 LoRAs, 1 other file"


def test_gguf_without_its_package_is_wrong(models, monkeypatch):
    path = models / "diffusion_models" / "krea2_tiny_turbo.safetensors"
    gguf_file(load_file(path), path.with_name("krea2_q8.gguf"), "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    (message,) = check(models).wrong
    assert "pip install gguf" in message and "krea2_q8.gguf" in message


def test_more_weights_than_memory_is_wrong(models, monkeypatch):
    monkeypatch.setattr(checking, "main_memory", lambda: 1000)
    assert any("in 8 or 4 bits" in text for text in check(models).wrong)


def test_an_accelerator_and_its_attention_are_told(models, monkeypatch):
    class Backend:
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 1)
        get_device_name = staticmethod(lambda index: "RTX 2080")
        get_device_properties = staticmethod(lambda index: SimpleNamespace(total_memory=8_000_000))

    monkeypatch.setattr(checking.torch, "cuda", Backend)
    monkeypatch.setattr(checking.torch.version, "cuda", "13.0")
    monkeypatch.setattr(checking.torch, "empty", lambda *shape, device, dtype: device)
    monkeypatch.setattr(checking, "takes_grouped_heads", lambda device: False)
    monkeypatch.setattr(checking, "main_memory", lambda: 1000)
    report = check(models)
    assert lines_of(report, "Devices")[0] == "cuda:0 RTX 2080: 8.0 MB"
    assert any("flash attention" in note for note in report.notes)
    assert report.wrong == []  # its memory counts


def test_without_psutil_memory_is_unknown_and_nothing_is_too_large(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    report = check(models)
    assert report.wrong == []
    assert lines_of(report, "Devices")[-1].endswith("memory unknown")


def test_a_diffusers_folder(diffusers_folder, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(diffusers_folder, models / "diffusers" / "Krea-2-Tiny")
    report = check(models)
    assert report.wrong == []
    assert lines_of(report, "Model files")[0].startswith(
        "diffusers/Krea-2-Tiny: a diffusers folder"
    )


def test_a_link_that_leads_back_up_ends(models):
    (models / "vae" / "again").symlink_to(models / "vae", target_is_directory=True)
    assert len([x for x in lines_of(check(models), "Model files") if x.startswith("vae/")]) == 1


def test_the_home_directory_is_not_told(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice"))
    assert "alice" not in str(Report(wrong=["/home/alice/models/x is empty"]))


def test_a_section_that_fails_says_so():
    report = Report()
    report.add("Devices", lambda: 1 / 0)
    assert "  could not be read: ZeroDivisionError: division by zero" in str(report)


def test_the_command_line(models, capsys):
    assert main(["check", str(models)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Krea 2 Kit self-check\n\nWhat is wrong\n  nothing was found\n")
    assert main(["check", str(models / "nowhere")]) == 2
    assert "Name ComfyUI's models folder" in capsys.readouterr().err


def test_no_such_folder_is_an_error():
    with pytest.raises(CheckpointError, match="There is no folder"):
        check(Path("nowhere"))
