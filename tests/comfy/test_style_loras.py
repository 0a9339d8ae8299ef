"""Krea 2 Style LoRA: file and trigger words of a style, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file

NANO_STYLE = "krea2-nano notebook (built in)"


@pytest.fixture
def styles(pack):
    return pack("nodes.style_loras")


@pytest.fixture
def darkbrush(models, turbo):
    """A small LoRA under the name of a style, in a folder of its own."""
    rows, columns = turbo.model.diffusion_model.state_dict()["blocks.0.attn.wq.weight"].shape
    name = "diffusion_model.blocks.0.attn.wq"
    generator = torch.Generator().manual_seed(0)
    folder = models / "loras" / "krea"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "krea2_darkbrush.safetensors"
    save_file(
        {
            f"{name}.lora_A.weight": torch.randn(4, columns, generator=generator),
            f"{name}.lora_B.weight": torch.randn(rows, 4, generator=generator),
        },
        path,
    )
    yield path
    path.unlink()


def test_file_and_words_follow_the_style(run, turbo, darkbrush, velocity):
    prompt = "a lighthouse in a storm."
    model, text = run("K2StyleLora", model=turbo, prompt=prompt, style="krea2_darkbrush")
    assert text == "a lighthouse in a storm, monochrome ink wash style"
    by_loader = run("K2LoraLoader", model=turbo, lora="krea/krea2_darkbrush.safetensors")[0]
    assert torch.equal(velocity(model), velocity(by_loader))
    assert not torch.equal(velocity(model), velocity(turbo))


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("", "rainy window style"),
        ("a cat, ", "a cat, rainy window style"),
        ("a cat in Rainy Window Style", "a cat in Rainy Window Style"),
    ],
)
def test_words_are_added_once(styles, prompt, expected):
    assert styles.with_trigger(prompt, styles.TRIGGERS["krea2_rainywindow"]) == expected


def test_none_changes_nothing(run, turbo):
    assert run("K2StyleLora", model=turbo, prompt="a fox.", style="none") == (turbo, "a fox.")


def test_nano_has_a_style_without_words(run):
    model = run("K2Loader", model="krea2-nano (built in)")[0]
    patched, text = run("K2StyleLora", model=model, prompt="a star", style=NANO_STYLE)
    assert text == "a star" and patched.patches


def test_there_are_nine(styles):
    assert len(styles.TRIGGERS) == len(set(styles.TRIGGERS.values())) == 9


def test_a_missing_file_says_where_to_get_it(styles, models):
    message = styles.K2StyleLora.validate_inputs(style="krea2_vintagetarot")
    assert "There is no krea2_vintagetarot.safetensors in models/loras" in message
    assert "Krea-2/resolve/main/loras/krea2_vintagetarot.safetensors" in message


def test_an_unknown_style_names_the_others(styles):
    message = styles.K2StyleLora.validate_inputs(style="oil")
    assert "style is 'oil'; expected none, krea2_darkbrush" in message
