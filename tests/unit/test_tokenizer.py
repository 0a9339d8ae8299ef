"""The tokenizer against diffusers' own Krea 2 pipeline, and where it is found."""

import logging
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.pipelines.krea2 import Krea2Pipeline as DiffusersPipeline
from transformers import AutoTokenizer, Qwen2Tokenizer

from krea2_model import nano
from krea2_model.checkpoints.text_encoder import find_tokenizer
from krea2_model.text import tokenizer as module
from krea2_model.text.tokenizer import (
    MAX_TOKENS,
    OFFICIAL_LENGTH,
    PAD_TOKEN,
    PREFIX_TOKENS,
    PROMPT_BUDGET,
    SUFFIX_TOKENS,
    TEMPLATE_PREFIX,
    TEMPLATE_SUFFIX,
    Krea2Tokenizer,
    TokenizerNotFoundError,
    find_tokenizer_folder,
)
from nano_training.landscapes.words import landscape_prompts
from nano_training.scenes import held_out_prompts

PROMPTS = {
    "empty": "",
    "plain": "a fox in the snow",
    "one letter": "a",
    "space": " ",
    "leading spaces": "   a fox",
    "trailing spaces": "a fox   ",
    "trailing line break": "a fox\n",
    "leading line break": "\na fox",
    "leading line breaks": "\n\n\na fox",
    "leading space and line break": " \n a fox",
    "leading carriage return": "\r\na fox",
    "only a line break": "\n",
    "tabs": "a\tfox\t\tin\tsnow",
    "leading tab": "\ta fox",
    "escaped brackets": r"a \(very\) red fox \\ [a|b] (weight:1.3)",
    "comma and points": "fox, snow... , ,, !?",
    "CJK": (
        "\u96ea\u306e\u4e2d\u306e\u72d0\u3001\u5317\u6d77\u9053\u3002\u96ea\u4e2d\u7684\u72d0\u72f8"
    ),
    "Korean": "\ub208 \uc18d\uc758 \uc5ec\uc6b0",
    "Thai": (
        "\u0e2a\u0e38\u0e19\u0e31\u0e02\u0e08\u0e34\u0e49\u0e07\u0e08\u0e2d\u0e01\u0e43"
        "\u0e19\u0e2b\u0e34\u0e21\u0e30"
    ),
    "right to left": "\u062b\u0639\u0644\u0628 in the \u05e9\u05dc\u05d2, 12 units",
    "emoji": (
        "\U0001f98a\u2744\ufe0f \U0001f469\u200d\U0001f469\u200d\U0001f467\u200d"
        "\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d\U0001f3fd"
    ),
    "combining marks": "e\u0301toile, n\u0303, a\u0308\u0323",
    "Hangul jamo": "\u1112\u1161\u11ab",
    "zero-width": "fo\u200dx\u200b and\ufeff snow\u00ad",
    "no-break space": "a\u00a0fox\u2003in\u3000snow",
    "ligature and full width": "\ufb01ne \uff26\uff4f\uff58 \u2460 ½",
    "chat markers": "a fox<|im_end|>\n<|im_start|>assistant\nno<|endoftext|>",
    "chat marker first": "<|im_start|>user\na fox",
    "vision and tool markers": "<|vision_start|><|image_pad|><|vision_end|><tool_call><think>x",
    "broken marker": "<|im_end| > <|im_endx|> <| im_end |>",
    "contractions": "it's the fox's DON'T we'LL I'd they've",
    "numbers": "1234567890 3.14159 1e-5 12,000 \uff12\uff10\uff12\uff16",
    "code": "def f(x):\n    return x ** 2  # comment\n\n\n",
    "URL": "https://example.com/a_b?c=d&e=%20f#g",
    "long word": "fox" * 900,
    "mixed case": "FoX SNOW sNoW_snow-Snow",
    "control characters": "a\x00b\x07c\x1bd",
    "2,000 words": " ".join(f"fox{i % 7} jumps" for i in range(1000)),
    "exactly the budget": " fox" * PROMPT_BUDGET,
    "one over the budget": " fox" * (PROMPT_BUDGET + 1),
    "line break over the budget": "\n" + " fox" * (PROMPT_BUDGET + 1),
    "marker at the cut": " fox" * (PROMPT_BUDGET - 1) + "<|im_end|><|im_end|>",
    "character in pieces at the cut": "\U00013080" * 400,
}


class RecordingEncoder:
    """Stands in for the text encoder of diffusers' pipeline and keeps what it was given."""

    def __call__(self, input_ids, attention_mask, **_):
        self.ids, self.mask = input_ids, attention_mask
        return SimpleNamespace(hidden_states=[torch.zeros(*input_ids.shape, 1)] * 36)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Krea2Tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def official(tokenizer_folder):
    """prompt, length -> the official ids, found by running diffusers' code, less the padding."""
    encoder = RecordingEncoder()
    pipeline = DiffusersPipeline(
        scheduler=None,
        vae=None,
        text_encoder=encoder,
        tokenizer=AutoTokenizer.from_pretrained(tokenizer_folder),
        transformer=None,
    )

    def ids(prompt: str, length: int = OFFICIAL_LENGTH) -> list[int]:
        pipeline.get_text_hidden_states(prompt, length, torch.device("cpu"))
        assert encoder.ids.shape == (1, PREFIX_TOKENS + length)
        assert (encoder.ids[~encoder.mask] == PAD_TOKEN).all()
        return encoder.ids[encoder.mask].tolist()

    ids.prefix = pipeline.prompt_template_encode_prefix
    ids.suffix = pipeline.prompt_template_encode_suffix
    return ids


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_ids_are_the_official_ones(tokenizer, official, prompt):
    assert tokenizer.tokenize(prompt, max_sequence_length=OFFICIAL_LENGTH) == official(prompt)


@pytest.mark.parametrize("length", [6, 7, 77, 256, 513, 2048])
def test_ids_are_the_official_ones_at_other_lengths(tokenizer, official, length):
    for name in ("2,000 words", "character in pieces at the cut", "leading line breaks", "empty"):
        ours = tokenizer.tokenize(PROMPTS[name], max_sequence_length=length)
        assert ours == official(PROMPTS[name], length), name


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_without_a_length_nothing_is_cut(tokenizer, official, prompt):
    assert tokenizer.tokenize(prompt) == official(prompt, 8192)


def test_ids_are_those_of_the_class_that_comfyui_uses(tokenizer, tokenizer_folder):
    core = Qwen2Tokenizer.from_pretrained(tokenizer_folder)
    for name, prompt in PROMPTS.items():
        text = TEMPLATE_PREFIX + prompt + TEMPLATE_SUFFIX
        assert tokenizer.tokenize_raw(text) == core(text)["input_ids"], name


def test_template(tokenizer, official):
    assert (official.prefix, official.suffix) == (TEMPLATE_PREFIX, TEMPLATE_SUFFIX)
    ids = tokenizer.tokenize("")
    assert len(ids) == PREFIX_TOKENS + SUFFIX_TOKENS
    assert ids[PREFIX_TOKENS:] == [151645, 198, 151644, 77091, 198]


def test_a_leading_line_break_merges_with_the_prefix(tokenizer):
    """The reason why the prefix is cut by count: it is not there to be found."""
    prefix = tokenizer.tokenize("")[:PREFIX_TOKENS]
    ids = tokenizer.tokenize("\na fox")
    assert ids[:PREFIX_TOKENS] != prefix
    assert len(ids) == len(tokenizer.tokenize("a fox"))


def test_raw_text_is_not_wrapped(tokenizer):
    assert tokenizer.tokenize_raw("<|im_start|>user\n") == [151644, 872, 198]
    assert tokenizer.tokenize_raw("") == []


def test_count(tokenizer):
    assert tokenizer.count("") == 0
    assert tokenizer.count(" fox" * 21) == 21
    assert tokenizer.count("<|im_end|>") == 1


def test_too_long_prompts_are_reported(tokenizer, caplog):
    caplog.set_level(logging.WARNING)
    tokenizer.tokenize(" fox" * 507)
    tokenizer.tokenize(" fox" * 507, max_sequence_length=512)
    assert not caplog.records

    tokenizer.tokenize(" fox" * 510)
    assert "uses 510 tokens" in caplog.text
    assert "up to 507" in caplog.text
    assert "max_sequence_length=512" in caplog.text

    caplog.clear()
    tokenizer.tokenize(" fox" * 510, max_sequence_length=512)
    assert "uses 510 tokens; the last 3 were dropped to keep 507" in caplog.text

    caplog.clear()
    tokenizer.tokenize(" fox" * 510, max_sequence_length=1024)
    assert "up to 507" in caplog.text and "dropped" not in caplog.text


def test_texts_that_would_take_hours_are_refused(tokenizer):
    """Attention grows with the square of their length."""
    assert len(tokenizer.tokenize(" fox" * MAX_TOKENS)) > MAX_TOKENS
    for prompt in (" fox" * (MAX_TOKENS + 1), "abcdefghij" * 20_000, "(" * 200_000):
        with pytest.raises(ValueError, match=f"tokens; expected at most {MAX_TOKENS}.* cut it"):
            tokenizer.tokenize(prompt)
        assert len(tokenizer.tokenize(prompt, max_sequence_length=512)) == 34 + 512


@pytest.mark.parametrize("length", [5, 0, -1, 512.0, "512", True])
def test_lengths_that_are_refused(tokenizer, length):
    with pytest.raises(ValueError, match=r"max_sequence_length is .*expected.*512"):
        tokenizer.tokenize("a fox", max_sequence_length=length)


@pytest.mark.parametrize("prompt", [None, 3, ["a fox"], b"a fox"])
def test_prompts_that_are_refused(tokenizer, prompt):
    for method in (tokenizer.tokenize, tokenizer.tokenize_raw, tokenizer.count):
        with pytest.raises(ValueError, match="expected text"):
            method(prompt)


def test_half_characters_are_refused(tokenizer):
    """JSON can carry them; the Rust tokenizer answers with a TypeError about its input."""
    with pytest.raises(ValueError, match=r"half a character \(\\ud83e, at position 6\)"):
        tokenizer.tokenize_raw("a fox \ud83e")
    with pytest.raises(ValueError, match="half a character"):
        tokenizer.tokenize("a fox \ud83e")


def test_decode(tokenizer):
    ids = tokenizer.tokenize_raw("<|im_start|>user\na \U0001f98a")
    assert tokenizer.decode(ids) == "user\na \U0001f98a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user\na \U0001f98a"


def test_loading_is_local(tokenizer_folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    module._read_tokenizer.cache_clear()
    assert Krea2Tokenizer(tokenizer_folder).count("a fox") == 2


def test_another_models_tokenizer_is_refused(tokenizer_folder, tmp_path):
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"expected 34 and 5\. It belongs to another model"):
        Krea2Tokenizer(tmp_path)


def test_a_folder_is_read_once_until_a_file_changes(tokenizer, tokenizer_folder, tmp_path):
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, tmp_path)
    first, again = Krea2Tokenizer(tmp_path), Krea2Tokenizer(str(tmp_path))
    assert again._tokenizer is first._tokenizer is not tokenizer._tokenizer
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<|im_end|>", "<|im_ends|>"))
    with pytest.raises(ValueError, match="belongs to another model"):
        Krea2Tokenizer(tmp_path)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A package that lies alone, without COMFYUI_PATH."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(module, "__file__", str(tmp_path / "pack" / "krea2_model" / "tokenizer.py"))
    (tmp_path / "pack" / "krea2_model").mkdir(parents=True)
    return tmp_path


def make_comfyui(root):
    folder = root / "comfy" / "text_encoders" / "qwen25_tokenizer"
    folder.mkdir(parents=True)
    for name in ("tokenizer_config.json", "vocab.json", "merges.txt"):
        (folder / name).touch()
    return folder


def test_found_through_the_environment(nowhere, monkeypatch):
    folder = make_comfyui(nowhere / "elsewhere")
    monkeypatch.setenv("COMFYUI_PATH", str(nowhere / "elsewhere"))
    assert find_tokenizer_folder() == folder


def test_found_around_the_pack(nowhere, monkeypatch):
    folder = make_comfyui(nowhere / "ComfyUI")
    pack = nowhere / "ComfyUI" / "custom_nodes" / "krea2-kit"
    monkeypatch.setattr(module, "__file__", str(pack / "krea2_model" / "tokenizer.py"))
    assert find_tokenizer_folder() == folder


@pytest.mark.parametrize("comfyui_is_around", ["link", "target"])
def test_found_around_a_linked_pack(nowhere, monkeypatch, comfyui_is_around):
    link, target = nowhere / "a" / "custom_nodes" / "kit", nowhere / "b" / "custom_nodes" / "kit"
    (target / "krea2_model").mkdir(parents=True)
    (target / "krea2_model" / "tokenizer.py").touch()
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    folder = make_comfyui(nowhere / ("a" if comfyui_is_around == "link" else "b"))
    monkeypatch.setattr(module, "__file__", str(link / "krea2_model" / "tokenizer.py"))
    assert find_tokenizer_folder() == folder


def test_found_on_the_import_path(nowhere, monkeypatch):
    folder = make_comfyui(nowhere / "elsewhere")
    monkeypatch.setattr(sys, "path", ["", str(nowhere / "elsewhere")])
    assert find_tokenizer_folder() == folder


def test_not_found(nowhere, monkeypatch):
    for kind in (TokenizerNotFoundError, FileNotFoundError, ValueError):
        with pytest.raises(kind, match=r"own tokenizer/.*`tokenizer=`.*--tokenizer.*COMFYUI_PATH"):
            find_tokenizer_folder()
    monkeypatch.setenv("COMFYUI_PATH", str(nowhere / "gone"))
    with pytest.raises(FileNotFoundError, match=r"gone.*which has none"):
        find_tokenizer_folder()


def test_an_explicit_folder_is_final(nowhere, tokenizer_folder, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(make_comfyui(nowhere / "ComfyUI").parents[2]))
    assert find_tokenizer_folder(str(tokenizer_folder)) == tokenizer_folder
    with pytest.raises(FileNotFoundError, match="no tokenizer folder"):
        find_tokenizer_folder(nowhere / "pack")


def test_nano_has_one_where_there_is_none(nowhere):
    encoder = Path(nano.TEXT_ENCODER_NAME)
    assert find_tokenizer(encoder) == nano.TOKENIZER
    with pytest.raises(TokenizerNotFoundError):
        find_tokenizer(Path("qwen3vl_4b.safetensors"))


def test_nano_s_makes_the_same_tokens(tokenizer):
    small = Krea2Tokenizer(nano.TOKENIZER)
    prompts = [prompt for prompt, _ in held_out_prompts()]
    prompts += [prompt for prompt, _ in landscape_prompts()]
    for prompt in [*prompts, "A Yellow Circle.", "(no star) {two|three} rings"]:
        assert small.tokenize(prompt) == tokenizer.tokenize(prompt), prompt
    other = "über den Wolken \U0001f325"
    assert small.decode(small.tokenize_raw(other)) == other
