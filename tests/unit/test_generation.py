"""Writing text, against transformers: greedy tokens, and the distributions that are sampled from.

The model is small and random, with the layers and the vocabulary of the released one.
"""

import functools

import pytest
import torch
from safetensors.torch import save_file
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from krea2_model.checkpoints.identify import CheckpointError
from krea2_model.checkpoints.text_encoder import load_language_tail, load_text_encoder
from krea2_model.text.generation import STOP_TOKENS, Sampling, generate
from krea2_model.text.language_model import KeyValueCache, LanguageModel
from krea2_model.text.tokenizer import Krea2Tokenizer
from parity import assert_close
from qwen3vl_writer import random_model

PROMPTS = ["a fox in the snow", "\u96ea\u4e2d\u306e\u72d0", "three red cats " * 60]


@pytest.fixture(scope="module")
def references():
    """By whether the head is tied to the embedding; each is made once."""
    return functools.cache(random_model)


@pytest.fixture(scope="module")
def folders(references, tmp_path_factory):
    """Their files."""

    def save(tied):
        folder = tmp_path_factory.mktemp("qwen")
        references(tied).save_pretrained(folder)
        return folder

    return functools.cache(save)


@pytest.fixture
def reference(references, request):
    """With its head tied to the embedding, unless a test asks for the other."""
    return references(getattr(request, "param", True))


@pytest.fixture
def folder(folders, reference):
    return folders(reference.config.tie_word_embeddings)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Krea2Tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def models():
    return functools.cache(
        lambda folder: LanguageModel(load_text_encoder(folder), load_language_tail(folder))
    )


@pytest.fixture
def model(models, folder):
    return models(folder)


@torch.no_grad()
def transformers_greedy(reference, tokens, count, **options):
    out = reference.generate(
        input_ids=torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=list(STOP_TOKENS),
        pad_token_id=STOP_TOKENS[1],
        **options,
    )
    return out[0, len(tokens) :].tolist()


@pytest.mark.parametrize(
    "reference, prompt",
    [(True, PROMPTS[0]), (True, PROMPTS[1]), (True, PROMPTS[2]), (False, PROMPTS[0])],
    indirect=["reference"],
    ids=["short", "Japanese", "long", "untied"],
)
def test_greedy_is_transformers_token_for_token(reference, model, tokenizer, prompt):
    tokens = tokenizer.tokenize(prompt)
    expected = transformers_greedy(reference, tokens, 25)
    assert list(generate(model, tokens, max_tokens=25)) == expected
    assert len(set(expected)) > 5, "a loop of one word would show nothing"


def test_penalised_greedy_is_too(reference, model, tokenizer):
    """transformers counts the prompt's tokens as repeated unless it is told how many they are.

    Below 1 the penalty is a reward, which shows sooner.
    """
    from transformers import LogitsProcessorList

    tokens = tokenizer.tokenize("a fox")
    penalty = RepetitionPenaltyLogitsProcessor(0.2, prompt_ignore_length=len(tokens))
    expected = transformers_greedy(
        reference, tokens, 30, logits_processor=LogitsProcessorList([penalty])
    )
    sampling = Sampling(repetition_penalty=0.2)
    assert list(generate(model, tokens, sampling, max_tokens=30)) == expected
    assert expected != transformers_greedy(reference, tokens, 30)


def test_the_stop_token_ends_the_text(model, tokenizer):
    tokens = tokenizer.tokenize("a fox")
    free = list(generate(model, tokens, max_tokens=10))
    stop = next(token for token in free if token != free[0])
    stopped = list(generate(model, tokens, max_tokens=10, stop=[stop]))
    assert stopped == free[: free.index(stop) + 1]


def test_the_cache_changes_nothing(model, tokenizer):
    """Past the point where it grows, and however the tokens are cut."""
    tokens = (tokenizer.tokenize("a fox and a hare") * 12)[:515]
    whole = model(tokens, KeyValueCache())
    cache, start = KeyValueCache(), 0
    for end in (1, 200, 201, 202, 256, 257, 515):
        logits = model(tokens[start:end], cache)
        start = end
    assert cache.length == 515
    assert_close(logits, whole, 1e-5, "in pieces against at once")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.3, "top_k": 20},
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 0.9, "top_p": 0.0},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.5, "repetition_penalty": 1.7},
        {
            "temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05,
            "repetition_penalty": 1.2,
        },
    ],
    ids=lambda options: " ".join(options),
)  # fmt: skip
def test_distributions_are_those_of_transformers(options):
    logits = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    logits[100:110] = logits[90]  # ties, which bfloat16 makes often
    written = [3, 3, 90, 105, int(logits.argmax()), int(logits.argmin())]
    processors = [
        RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0)),
        TemperatureLogitsWarper(options["temperature"]),
    ]
    if "top_k" in options:
        processors.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        processors.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(MinPLogitsWarper(options["min_p"]))
    scores = logits[None]
    for processor in processors:
        scores = processor(torch.tensor([written]), scores)
    expected = scores.softmax(dim=-1)[0]

    tokens, probabilities = Sampling(**options).candidates(logits, written)
    found = torch.zeros(1000).index_copy(0, tokens, probabilities)
    assert torch.equal(found > 0, expected > 0)
    assert_close(found, expected, 1e-5, " ".join(options))


def test_presence_penalty_counts_a_token_once():
    logits = torch.tensor([2.0, 1.0, 0.0])
    once, twice = (
        Sampling(temperature=1.0, presence_penalty=1.5).candidates(logits, written)[1]
        for written in ([0], [0, 0])
    )
    assert torch.equal(once, twice)
    assert_close(once, torch.tensor([0.5, 1.0, 0.0]).softmax(dim=0), 1e-6, "presence penalty")


def test_what_is_chosen_follows_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).clamp(min=-50)
    sampling = Sampling(temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.tensor([sampling.choose(logits, [], generator) for _ in range(4000)])
    counts = torch.bincount(chosen, minlength=4) / 4000
    assert (counts - logits.softmax(dim=0)).abs().max() < 0.03


def test_seeds_make_the_text(model, tokenizer):
    tokens, sampling = tokenizer.tokenize("a fox"), Sampling(temperature=1.0, top_k=50)

    def text(seed):
        return list(generate(model, tokens, sampling, max_tokens=12, seed=seed))

    assert text(1) == text(1) != text(2)
    assert text(2**64 - 1) == text(-1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected more than 0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_nan_is_no_word():
    logits = torch.zeros(5)
    logits[2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        Sampling().choose(logits, [], torch.Generator())


def test_bad_prompts_are_named(model):
    with pytest.raises(ValueError, match="no tokens"):
        next(generate(model, [], max_tokens=1))
    with pytest.raises(ValueError, match="token 151936"):
        next(generate(model, [151936], max_tokens=1))


@pytest.mark.parametrize("reference", [True, False], indirect=True, ids=["tied", "untied"])
def test_layers_are_shared_and_the_rest_is_small(folder, reference):
    """The tail is one layer, the norm, and a head only where the file's differs."""
    encoder, tail = load_text_encoder(folder), load_language_tail(folder)
    tied = reference.config.tie_word_embeddings
    names = set(tail.state_dict())
    assert {name.rpartition(".")[0] for name in names} >= {"norm", "layers.35.mlp.up_proj"}
    assert ("lm_head.weight" in names) == (not tied)
    assert not names & set(encoder.state_dict())
    model = LanguageModel(encoder, tail)
    assert len(model._layers) == 36 and model._layers[:35] == list(encoder.layers)


def test_a_copy_of_the_embedding_is_no_head(reference, tmp_path):
    """Some files hold the tied head a second time."""
    tensors = {n: t.clone().contiguous() for n, t in reference.state_dict().items()}
    assert torch.equal(tensors["lm_head.weight"],
                       tensors["model.language_model.embed_tokens.weight"])  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_language_tail(tmp_path / "model.safetensors").lm_head is None
    tensors["lm_head.weight"][5, 5] += 1
    save_file(tensors, tmp_path / "changed.safetensors")
    assert load_language_tail(tmp_path / "changed.safetensors").lm_head is not None


@pytest.mark.parametrize(
    "left_out, missing",
    [("layers.35.", "layer 35"), ("language_model.norm.", "the final norm")],
)
def test_files_without_the_rest_are_refused(reference, tmp_path, left_out, missing):
    tensors = {
        name: tensor.clone()
        for name, tensor in reference.state_dict().items()
        if left_out not in name and "lm_head" not in name
    }
    save_file(tensors, tmp_path / "cut.safetensors")
    load_text_encoder(tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=f"cannot write text: it lacks {missing}"):
        load_language_tail(tmp_path / "cut.safetensors")


def test_bfloat16_weights_write_in_bfloat16(folder, tokenizer):
    options = {"dtype": torch.bfloat16}
    model = LanguageModel(
        load_text_encoder(folder, **options), load_language_tail(folder, **options)
    )
    tokens = list(generate(model, tokenizer.tokenize("a fox"), max_tokens=3))
    assert len(tokens) == 3
