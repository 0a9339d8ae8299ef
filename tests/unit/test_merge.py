"""`krea2 merge`: averages and task arithmetic of transformers and of one run's LoRAs."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_reference import TINY, random_transformer
from krea2_model import load_transformer, save_transformer
from krea2_model.cli.main import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base and two models that differ from it, all of them Raw."""
    folder = tmp_path_factory.mktemp("merge")
    generator = torch.Generator().manual_seed(4)
    for name in ("base", "a", "b"):
        model = random_transformer(TINY)
        model.variant = "raw"
        if name != "base":
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        save_transformer(model, folder / f"{name}.safetensors")
    return folder


def merged(files, tmp_path, *words):
    output = tmp_path / "merged.safetensors"
    words = [str(files / word) if word.partition(":")[0].endswith(".safetensors") else word
             for word in words]  # fmt: skip
    assert main(["merge", *words, "--output", str(output), "--quiet"]) == 0
    return load_transformer(output)


def test_averages_are_weighted_and_normalised(files, tmp_path):
    result = merged(files, tmp_path, "a.safetensors:3", "b.safetensors")
    a, b = (load_transformer(files / f"{name}.safetensors") for name in "ab")
    assert result.variant == "raw"
    for name, parameter in result.named_parameters():
        expected = 0.75 * a.get_parameter(name) + 0.25 * b.get_parameter(name)
        torch.testing.assert_close(parameter, expected)


def test_differences_are_added_to_a_base(files, tmp_path):
    result = merged(
        files, tmp_path, "a.safetensors:0.5", "b.safetensors:-1", "--base", "base.safetensors"
    )
    base, a, b = (load_transformer(files / f"{name}.safetensors") for name in ("base", "a", "b"))
    for name, parameter in result.named_parameters():
        start = base.get_parameter(name)
        expected = start + 0.5 * (a.get_parameter(name) - start) - (b.get_parameter(name) - start)
        torch.testing.assert_close(parameter, expected)


def test_loras_of_one_run(tmp_path):
    names = ("lora_A.weight", "lora_B.weight")
    for index in (1, 2):
        tensors = {f"diffusion_model.blocks.0.attn.wq.{n}": torch.full((2, 2), float(index))
                   for n in names}  # fmt: skip
        save_file(tensors, tmp_path / f"{index}.safetensors", {"trigger": "sks"})
    words = [str(tmp_path / f"{index}.safetensors") for index in (1, 2)]
    assert main(["merge", *words, "--output", str(tmp_path / "m.safetensors")]) == 0
    assert all((t == 1.5).all() for t in load_file(tmp_path / "m.safetensors").values())


def test_what_does_not_fit_is_refused(files, tmp_path, capsys):
    (tmp_path / "there.safetensors").write_bytes(b"")
    a, out = str(files / "a.safetensors"), str(tmp_path / "out.safetensors")
    small = {"diffusion_model.blocks.0.attn.wq.lora_A.weight": torch.zeros(2, 2)}
    save_file(small, tmp_path / "lora.safetensors")
    for words, expected in (
        ([a, "--output", str(tmp_path / "there.safetensors")], "exists"),
        ([a, "--output", a, "--force"], "is one of the files"),
        ([f"{a}:1", f"{a}:-1", "--output", out], "normalised"),
        ([a, str(tmp_path / "lora.safetensors"), "--output", out], "expected the same model"),
        ([a, "--output", str(tmp_path / "out.pt")], "ends in .safetensors"),
    ):
        assert main(["merge", *words]) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
