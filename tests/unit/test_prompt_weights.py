r"""Weights in prompts: what counts as a mark, and which tokens it reaches."""

import unicodedata

import pytest

from krea2_model.text.prompt_tokens import stack_weights, tokenize_prompt
from krea2_model.text.prompt_weights import parse_weights, weigh_again
from krea2_model.text.tokenizer import PREFIX_TOKENS, Krea2Tokenizer
from work import assert_linear


def marked(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """The sentence, and its runs of characters whose weight is not 1."""
    parsed = parse_weights(prompt)
    assert len(parsed.text) == len(parsed.weights)
    runs: list[tuple[str, float]] = []
    before = 1.0
    for character, weight in zip(parsed.text, parsed.weights, strict=True):
        if weight != 1 and weight == before:
            runs[-1] = (runs[-1][0] + character, weight)
        elif weight != 1:
            runs.append((character, weight))
        before = weight
    return parsed.text, runs


@pytest.mark.parametrize("prompt, text, runs", [
    ("a (red:1.3) circle", "a red circle", [("red", 1.3)]),
    ("(two words:0.7), (word:-1)", "two words, word", [("two words", 0.7), ("word", -1.0)]),
    ("(a (big:2) dog:1.5)", "a big dog", [("a ", 1.5), ("big", 3.0), (" dog", 1.5)]),
    ("(a:.5) (b : +2 ) (c:1)", "a b c", [("a", 0.5), ("b", 2.0)]),
    ("(\u72d0\u72f8:1.2)\U0001f98a", "\u72d0\u72f8\U0001f98a", [("\u72d0\u72f8", 1.2)]),
    (r"(say \(hi\):1.2)", "say (hi)", [("say (hi)", 1.2)]),
    ("(line\nbreak:0.5)", "line\nbreak", [("line\nbreak", 0.5)]),
])  # fmt: skip
def test_marks(prompt, text, runs):
    assert marked(prompt) == (text, runs)


@pytest.mark.parametrize("prompt", [
    "", "a red circle", "a man (about forty)", "((double))", "(open:1.3", "closed:1.3)", ")(",
    "(word:much)", "(:1.3)", "( :2)", "a wide film (16:9)", "(at 10:30)", "a: b", "(1.2)",
    "back\\slash", "[fox:1.2]", "(a:1.2.3)", "(word:)",
])  # fmt: skip
def test_all_else_stays_as_it_is_written(prompt):
    assert marked(prompt) == (prompt, [])


def test_an_escaped_bracket_is_one_of_the_text():
    assert marked(r"\(word:1.3\)") == ("(word:1.3)", [])
    assert marked(r"a \(very\) red fox") == ("a (very) red fox", [])


def test_numbers_of_a_ratio_may_weigh_where_they_have_a_point():
    assert marked("(in 1999:1.5)") == ("in 1999", [("in 1999", 1.5)])


@pytest.mark.parametrize("number", ["11", "-10.5"])
def test_weights_out_of_range_are_named(number):
    with pytest.raises(ValueError, match=rf"weight {number} in '\(fox:{number}\)'.*-10 to 10"):
        parse_weights(f"a (fox:{number})")


def test_weights_that_multiply_out_of_range_are_named():
    assert marked("(a (b:5):2)")[1] == [("a ", 2.0), ("b", 10.0)]
    with pytest.raises(ValueError, match=r"weights around 'b'"):
        parse_weights("(a (b:5):3)")


def test_a_long_number_is_quoted_in_short():
    with pytest.raises(ValueError, match="weight 9") as error:
        parse_weights("(fox:" + "9" * 10_000 + ")")
    assert len(str(error.value)) < 300


LONG = 60_000


@pytest.mark.parametrize("prompt, weighted", [
    (lambda n: "(a:" + "1" * n + "x)", 0),
    (lambda n: "(a:" + " " * n + "x)", 0),
    (lambda n: "(a" + " " * n + ":x)", 0),
    (lambda n: "(" + "a:" * (n // 2) + ")", 0),
    (lambda n: "(" * n, 0),
    (lambda n: "(" * (n // 2) + ")" * (n // 2), 0),
    (lambda n: "(a" * (n // 7) + ":1.0)" * (n // 7), 0),
    (lambda n: "(" * (n // 6) + "(a:2)" + ":1.0)" * (n // 6), 1),
    (lambda n: "(ab:2) " * (n // 7), LONG // 7 * 2),
])  # fmt: skip
def test_prompts_are_read_in_linear_time(prompt, weighted):
    parsed = parse_weights(prompt(LONG))
    assert sum(weight == 2 for weight in parsed.weights) == weighted
    assert_linear(lambda n: parse_weights(prompt(n)), LONG // 8)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Krea2Tokenizer(tokenizer_folder)


PROMPTS = [
    "a (red:1.5) circle",
    "(\u72d0\u72f8:1.5) in snow",
    "a fox \U0001f98a and (\U0001f468\u200d\U0001f469\u200d\U0001f467:1.5)",
    "th\u00e9 (cafe\u0301:1.5), na\u00efve",
    "\n\n(\u0634\u0645\u0633:1.5) \u0642\u0645\u0631",
    "unbe(liev:1.5)able",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_weights_reach_the_tokens_of_their_words(tokenizer, prompt):
    """The words' tokens as the tokenizer itself decodes them."""
    parsed, tokens = parse_weights(prompt), tokenize_prompt(tokenizer, prompt, weighted=True)
    ids, weights = tokens.ids[PREFIX_TOKENS:], list(tokens.weights)
    assert len(ids) == len(weights) and tokens.ids == tokenizer.tokenize(parsed.text)
    inside = [i for i, w in enumerate(parsed.weights) if w != 1]
    words = parsed.text[inside[0] : inside[-1] + 1]
    heavy = tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if w != 1])
    light = tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if w == 1])
    words, light = (unicodedata.normalize("NFC", text) for text in (words, light))
    assert words in heavy or prompt.startswith("unbe")
    assert words not in light
    assert weights[-5:] == [1.0] * 5, "the template's own tokens"


def test_a_token_of_two_weights_takes_the_mean(tokenizer):
    tokens = tokenize_prompt(tokenizer, "(unb:2)elievable", weighted=True)
    pieces = [tokenizer.decode([i]) for i in tokens.ids[PREFIX_TOKENS:]]
    assert pieces[:2] == ["un", "belie"]
    assert tokens.weights[:3] == pytest.approx([2.0, 1.2, 1.0])


def test_cut_prompts_keep_weights_and_tokens_together(tokenizer):
    prompt = "a (red:1.5) fox in (deep:0.5) snow"
    whole = tokenize_prompt(tokenizer, prompt, weighted=True)
    cut = tokenize_prompt(tokenizer, prompt, weighted=True, max_sequence_length=8)
    assert len(cut.weights) == len(cut.ids) - PREFIX_TOKENS == 8
    assert cut.weights == (*whole.weights[:3], *[1.0] * 5)
    gone = "a fox in (deep:0.5) snow"
    assert tokenize_prompt(tokenizer, gone, weighted=True, max_sequence_length=7).weights is None


def test_a_batch_is_padded_with_1_and_none_where_nothing_weighs(tokenizer):
    long, short, plain = (
        tokenize_prompt(tokenizer, prompt, weighted=True)
        for prompt in ("a fox in the snow", "a (fox:0)", "a (fox:1)")
    )
    weights = stack_weights([long.weight_row, short.weight_row])
    assert weights.shape == (2, 10) and weights[0].eq(1).all()
    assert weights[1].tolist() == [1.0, 0.0] + [1.0] * 8
    assert stack_weights([long.weight_row, plain.weight_row]) is None


def test_parts_are_the_weighted_words():
    marked = parse_weights("a (very (red:2):1.5) star on (white:0)")
    assert marked.parts() == [("very", 1.5), ("red", 3.0), ("white", 0.0)]
    assert parse_weights("a red star").parts() == []


def test_weights_move_to_another_text():
    parts = [("red", 1.5), ("red", 0.5), ("star", -1.0), ("ship", 2.0)]
    text, lost = weigh_again("A starry red sky, a RED star", parts)
    assert text == "A starry (red:1.5) sky, a (RED:0.5) (star:-1)"
    assert lost == ["ship"]
    assert weigh_again("no words", []) == ("no words", [])


def test_words_are_whole_ones_in_any_case():
    assert weigh_again("_red #1 STRASSE Stra\u00dfe \u0130x", [("red", 2.0), ("#1", 0.5)]) == (
        "_red (#1:0.5) STRASSE Stra\u00dfe \u0130x", ["red"]
    )  # fmt: skip
    assert weigh_again("a\u03c2 x a a", [("A\u03a3", 2.0), ("a a", 0.5)]) == (
        "(a\u03c2:2) x (a a:0.5)", []
    )  # fmt: skip
    assert weigh_again("a b c b c", [("a b", 2.0), ("b c", 0.5)])[0] == "(a b:2) c (b c:0.5)"


@pytest.mark.parametrize("text, words", [
    (lambda n: "a " * 4 * n, lambda n: ["a"] * 2 * n),
    (lambda n: "a" * 4 * n, lambda n: ["a" * length for length in range(1, 300)]),
    (lambda n: " ".join(f"w{i}" for i in range(n)), lambda n: [f"w{i}" for i in range(n)]),
])  # fmt: skip
def test_weights_move_in_linear_time(text, words):
    def move(n):
        return weigh_again(text(n), [(word, 2.0) for word in words(n)])

    found, lost = move(5_000)
    assert found.count(":2)") == len(words(5_000)) - len(lost)
    assert len(lost) == (0 if " " in text(1) + text(2) else 299)
    assert_linear(move, 600)
