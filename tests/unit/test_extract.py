"""`krea2 extract`: the difference of two transformers as a LoRA, by the best of each rank."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_reference import TINY, diffusers_transformer, random_transformer
from exam_cases import some
from formats import gguf_file
from krea2_model import Krea2Pipeline, Krea2Transformer, extract_lora, load_transformer, nano
from krea2_model import save_transformer as save
from krea2_model.cli.main import main
from krea2_model.lora.files import read_lora, read_lora_file
from krea2_model.lora.names import is_target
from krea2_model.lora.updates import LoraStack
from krea2_model.tools.convert import convert
from krea2_model.tools.extract import EXTRACTED, largest_singular
from nano_training.judge import judge
from nano_training.scenes import held_out_prompts

RAW, TURBO = nano.TRANSFORMERS["raw"], nano.TRANSFORMERS["turbo"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base and a model that differs from it in everything."""
    folder, generator = tmp_path_factory.mktemp("extract"), torch.Generator().manual_seed(4)
    model = random_transformer(TINY)
    model.variant = "raw"
    save(model, folder / "base.safetensors")
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    save(model, folder / "tuned.safetensors")
    return folder


def extracted(files, output, **settings):
    tuned, base = files / "tuned.safetensors", files / "base.safetensors"
    return extract_lora(tuned, base, output, **{"rank": 4096, "dtype": "fp32"} | settings)


def changed(base, file, strength=1.0):
    """A model with a LoRA's file merged in, and the report of reading it."""
    model = load_transformer(base, dtype=torch.float32)
    stack = LoraStack(model)
    tensors, metadata = read_lora_file(file)
    updates, _, report = read_lora(tensors, stack.shapes, file.name, None, metadata)
    stack.add((updates, strength))
    return model, report


def squares(model, base):
    """The squared difference of each weight."""
    weights = dict(base.named_parameters())
    return {n: float((p - weights[n]).double().square().sum()) for n, p in model.named_parameters()}


@pytest.mark.parametrize("style", ["ai-toolkit", "kohya"])
def test_a_full_rank_with_differences_is_the_fine_tune(files, tmp_path, style):
    found = extracted(files, tmp_path / "x.safetensors", key_style=style, differences=True)
    model, report = changed(files / "base.safetensors", found.path)
    assert report.is_complete, str(report)
    tuned = load_transformer(files / "tuned.safetensors", dtype=torch.float32)
    base = load_transformer(files / "base.safetensors", dtype=torch.float32)
    left, whole = squares(model, tuned), squares(tuned, base)
    for name, size in whole.items():
        assert left[name] < 1e-10 * size, name
    assert found.held + found.vectors == pytest.approx(1)


@pytest.mark.parametrize("targets", EXTRACTED)
def test_shares_are_of_what_the_file_holds(files, tmp_path, targets):
    found = extracted(files, tmp_path / "x.safetensors", rank=5, targets=targets, keep=0.8)
    base = load_transformer(files / "base.safetensors", dtype=torch.float32)
    tuned = load_transformer(files / "tuned.safetensors", dtype=torch.float32)
    model, report = changed(files / "base.safetensors", found.path)
    assert report.is_complete and max(report.ranks) <= 5
    layers = {name.removesuffix(".weight") for name, size in squares(model, base).items() if size}
    assert layers == found.ranks.keys()
    assert targets == "all" or all(is_target(layer, targets) for layer in layers)
    whole, left = squares(tuned, base), squares(model, tuned)
    total = sum(whole.values())
    vectors = sum(s for n, s in whole.items() if model.get_parameter(n).ndim == 1 or ".lin." in n)
    assert found.vectors == pytest.approx(vectors / total)
    beyond = sum(left[f"{layer}.weight"] for layer in layers)
    assert found.beyond_rank == pytest.approx(beyond / total, rel=1e-4)
    held = sum(whole[f"{layer}.weight"] for layer in layers) - beyond
    assert found.held == pytest.approx(held / total, rel=1e-4)
    assert found.held + found.beyond_rank + found.other_layers + found.vectors == pytest.approx(1)
    assert (found.other_layers == pytest.approx(0)) == (targets == "all")


def test_a_layer_is_the_best_of_its_rank(files, tmp_path):
    found = extracted(files, tmp_path / "x.safetensors", rank=3, targets="mlp")
    base, tuned = (load_transformer(files / f"{n}.safetensors") for n in ("base", "tuned"))
    model, _ = changed(files / "base.safetensors", found.path)
    for layer in found.ranks:
        own, start, end = (m.get_submodule(layer).weight for m in (model, base, tuned))
        values = torch.linalg.svdvals(end - start)
        assert (end - own).norm() == pytest.approx(float(values[3:].norm()), rel=1e-4)


def test_keep_takes_the_lowest_rank_that_holds_it(files, tmp_path):
    found = extracted(files, tmp_path / "x.safetensors", keep=0.5)
    base, tuned = (load_transformer(files / f"{n}.safetensors") for n in ("base", "tuned"))
    for layer, rank in found.ranks.items():
        change = tuned.get_submodule(layer).weight - base.get_submodule(layer).weight
        squared = torch.linalg.svdvals(change).square()
        shares = squared.cumsum(0) / squared.sum()
        assert shares[rank - 1] >= 0.5 - 1e-5
        assert rank == 1 or shares[rank - 2] < 0.5


def test_a_merged_lora_comes_back_at_its_rank(files, tmp_path):
    first = extracted(files, tmp_path / "first.safetensors", rank=3, targets="blocks")
    merged, _ = changed(files / "base.safetensors", first.path)
    save(merged, tmp_path / "merged.safetensors")
    again = extract_lora(tmp_path / "merged.safetensors", files / "base.safetensors",
                         tmp_path / "again.safetensors", dtype="fp32")  # fmt: skip
    # The sum with a weight of float32 is rounded, which has little of any other rank.
    model, _ = changed(files / "base.safetensors", again.path)
    assert again.held > 1 - 1e-6 and again.ranks.keys() == first.ranks.keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, merged.get_parameter(name), atol=1e-6, rtol=1e-5)


def test_diffusers_loads_the_file(files, tmp_path):
    found = extracted(files, tmp_path / "x.safetensors", key_style="diffusers")
    theirs = diffusers_transformer()
    theirs.load_lora_adapter(load_file(found.path), prefix="transformer", adapter_name="ours")
    layers = [m for m in theirs.modules() if hasattr(m, "get_delta_weight")]
    assert len(layers) == len(found.ranks)
    base, tuned = (load_transformer(files / f"{n}.safetensors") for n in ("base", "tuned"))
    change = tuned.blocks[1].mlp.down.weight - base.blocks[1].mlp.down.weight
    delta = theirs.get_submodule("transformer_blocks.1.ff.down").get_delta_weight("ours")
    torch.testing.assert_close(delta, change, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("spectrum", [0.0, 0.7])
def test_large_matrices_have_nearly_the_best(spectrum):
    generator = torch.Generator().manual_seed(1)
    sides = torch.linalg.qr(torch.randn(1100, 1100, generator=generator))[0]
    values = torch.arange(1, 1101.0) ** -spectrum
    matrix = sides * values @ torch.randn(1100, 1200, generator=generator) / 1200**0.5
    left, found, right = largest_singular(matrix, 16)
    best = torch.linalg.svdvals(matrix)[:16].square().sum()
    assert found.square().sum() > (0.96 if spectrum == 0 else 0.999) * best
    error = (matrix - left * found @ right).square().sum()
    assert error == pytest.approx(float(matrix.square().sum() - found.square().sum()), rel=1e-4)


@pytest.mark.parametrize("layout", ["fp8", "gguf", "folder"])
def test_every_layout_counts_by_its_values(files, tmp_path, layout):
    tuned = tmp_path / {"gguf": "tuned.gguf", "fp8": "fp8.safetensors"}.get(layout, "folder")
    if layout == "gguf":
        gguf_file(load_file(files / "tuned.safetensors"), tuned, "Q8_0")
    else:
        convert(files / "tuned.safetensors", tuned, "fp8" if layout == "fp8" else None)
    found = extract_lora(tuned, files / "base.safetensors", tmp_path / "x.safetensors", rank=4096,
                         dtype="fp32", differences=True)  # fmt: skip
    model, _ = changed(files / "base.safetensors", found.path)
    stored = load_transformer(tuned, dtype=torch.float32)
    plain = load_transformer(files / "tuned.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, stored.get_parameter(name), atol=1e-5, rtol=1e-4)
    error = (model.blocks[0].mlp.up.weight - plain.blocks[0].mlp.up.weight).abs().max()
    assert (error > 1e-4) == (layout != "folder")


def test_nano_s_turbo_is_a_few_step_lora_of_raw(tmp_path, capsys, tokenizer_folder):
    file = tmp_path / "turbo.safetensors"
    words = ["extract", "nano", "--base", "nano-raw", "--targets", "blocks", "--output", str(file)]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(file) and "--with-differences" in shown.err
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        assert opened.get_tensor(next(iter(opened.keys()))).dtype == torch.bfloat16
    assert metadata["krea2.steps"] == "8" and str(tmp_path) not in str(metadata)
    assert json.loads(metadata["krea2.extract"])["base"] == RAW.name
    raw = Krea2Pipeline.nano("raw")
    assert raw.load_lora(file).is_complete
    assert (raw.preset.steps, raw.preset.guidance) == (8, 0)
    prompts, scenes = zip(*some(held_out_prompts()[::8]), strict=True)
    right = [all(judge(picture, scene).values()) for picture, scene in
             zip(raw(list(prompts), output_type="np", seed=1), scenes, strict=True)]  # fmt: skip
    assert sum(right) >= 0.75 * len(right)


def test_the_whole_difference_paints_the_picture(tmp_path, tokenizer_folder):
    found = extract_lora(TURBO, RAW, tmp_path / "whole.safetensors", rank=512, dtype="fp32",
                         differences=True)  # fmt: skip
    raw, turbo = Krea2Pipeline.nano("raw"), Krea2Pipeline.nano()
    raw.load_lora(found.path)
    pictures = [p("a blue star", output_type="np", seed=7) for p in (raw, turbo)]
    assert abs(pictures[0] - pictures[1]).max() < 2e-3


def test_files_that_do_not_belong_together_are_refused(files, tmp_path, capsys):
    tuned, base = str(files / "tuned.safetensors"), str(files / "base.safetensors")
    save(Krea2Transformer(replace(TINY, num_layers=1)), tmp_path / "small.safetensors")
    model = load_transformer(base)
    model.last.norm.scale.weight.data += 1
    save(model, tmp_path / "norm.safetensors")
    model.blocks[0].attn.wq.weight.data[0, 0] = math.nan
    save(model, tmp_path / "nan.safetensors")
    (tmp_path / "copy.safetensors").write_bytes((files / "base.safetensors").read_bytes())
    save_file({"diffusion_model.blocks.0.attn.wq.lora_A.weight": torch.zeros(2, 2)},
              tmp_path / "lora.safetensors")  # fmt: skip
    out = str(tmp_path / "out.safetensors")
    assert main(["convert", base, str(tmp_path / "folder"), "--quiet"]) == 0
    inside = "folder/transformer/diffusion_pytorch_model.safetensors"
    (tmp_path / "taken.safetensors").mkdir()

    def beside(name):
        return str(tmp_path / name)

    for words, expected in (
        ([tuned, "--base", tuned, "--output", out], "both the fine-tune and the base"),
        ([tuned, "--base", beside("small.safetensors"), "--output", out], "num_layers is 3 and 1"),
        ([beside("copy.safetensors"), "--base", base, "--output", out], "the same values"),
        ([beside("norm.safetensors"), "--base", base, "--output", out], "in no layer"),
        ([beside("nan.safetensors"), "--base", base, "--output", out], "NaN or infinity"),
        ([beside("lora.safetensors"), "--base", base, "--output", out], "is a LoRA; expected"),
        ([beside("none.safetensors"), "--base", base, "--output", out], "There is no file"),
        ([tuned, "--base", base, "--output", beside("copy.safetensors")], "exists"),
        ([tuned, "--base", base, "--output", base, "--force"], "one of the two files"),
        ([tuned, "--base", beside("folder"), "--output", beside(inside), "--force"], "lies in"),
        ([tuned, "--base", base, "--output", beside("out.pt")], "ends in .safetensors"),
        ([tuned, "--base", base, "--output", beside("taken.safetensors"), "--force"], "a folder"),
        ([tuned, "--base", base, "--output", out, "--keep", "1.5"], "--keep is 1.5"),
        ([tuned, "--base", base, "--output", out, "--with-differences", "--key-style",
          "diffusers"], "diffusers reads none"),
    ):  # fmt: skip
        assert main(["extract", *words]) == 2, words
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
    for settings, expected in (
        ({"rank": 0}, "rank is 0"), ({"rank": 2.5}, "rank is 2.5"), ({"keep": "all"}, "keep is"),
        ({"targets": "text"}, "targets is"), ({"key_style": "comfy"}, "key_style is"),
        ({"device": "gpu"}, "device is"), ({"dtype": "int8"}, "dtype is"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=expected):
            extracted(files, tmp_path / "out.safetensors", **settings)
