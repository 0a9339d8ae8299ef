"""Wildcards: what may stand there, what is drawn, and what is refused."""

import pytest

from krea2_model.text.wildcards import MAX_DEPTH, fill_in
from work import assert_linear


def drawn(prompt, seeds=64):
    return {fill_in(prompt, seed) for seed in range(seeds)}


def test_every_choice_is_drawn_and_a_seed_draws_the_same():
    assert drawn("a {red|dark blue|green} ball") == {
        "a red ball", "a dark blue ball", "a green ball"
    }  # fmt: skip
    assert fill_in("{a|b|c|d}{a|b|c|d}", 7) == fill_in("{a|b|c|d}{a|b|c|d}", 7)


def test_wildcards_nest_and_may_be_empty():
    assert drawn("{{a|b} {c|d}|e}") == {"a c", "a d", "b c", "b d", "e"}
    assert drawn("x{|y}") == {"x", "xy"}
    assert drawn("{one}") == {"one"}


def test_what_is_no_wildcard_stays():
    for text in (
        "",
        "a fox",
        "this|that",
        "(red:1.3)",
        'a sign "50% off\\"',
        "\\(",
        "\u72d0\u3068{\u5c71}",
    ):
        assert drawn(text) == {text.replace("{\u5c71}", "\u5c71")}
    assert drawn("\\{a\\|b\\}") == {"{a|b}"}


@pytest.mark.parametrize("prompt, position", [("a {red", 2), ("red} a", 3), ("{a|{b}", 0),
                                              ("{a}}", 3), ("{\\}", 0)])  # fmt: skip
def test_braces_without_partners_are_named(prompt, position):
    with pytest.raises(ValueError, match=f"brace at position {position} .*no partner"):
        fill_in(prompt, 0)


@pytest.mark.parametrize("prompt", ["{" * 1000 + "a" + "}" * 1000, "{" * 100_000, "{a|" * 50_000])
def test_wildcards_nest_up_to_a_limit(prompt):
    deepest = "x {a}" + "{" * MAX_DEPTH + "a" + "}" * MAX_DEPTH
    assert fill_in(deepest, 0) == "x aa"
    with pytest.raises(ValueError, match=f"is nested {MAX_DEPTH + 1} deep; .*most {MAX_DEPTH}"):
        fill_in(prompt, 0)


@pytest.mark.parametrize("prompt", [
    lambda n: "{a|b}" * n, lambda n: "{" + "a|" * n + "}", lambda n: "\\{" * n,
    lambda n: "|" * n, lambda n: ("{" * MAX_DEPTH + "a" * 1_000 + "}" * MAX_DEPTH) * (n // 100),
])  # fmt: skip
def test_long_prompts_are_filled_in_in_linear_time(prompt):
    assert_linear(lambda n: fill_in(prompt(n), 0), 1_000)


def test_names_stand_for_lines_of_files(tmp_path):
    (tmp_path / "colour.txt").write_text("\ufeffred\n# no colour\n\ndark {blue|green}\n", "utf-8")
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "round.txt").write_text("__colour__ circle\n", "utf-8")
    found = {fill_in("a __shapes/round__!", seed, tmp_path) for seed in range(64)}
    assert found == {"a red circle!", "a dark blue circle!", "a dark green circle!"}
    assert fill_in("__colour__", 7, tmp_path) == fill_in("__colour__", 7, tmp_path)
    # Without a folder they are text, and so is what is no name.
    assert fill_in("a __colour__ _x_ ____", 0) == "a __colour__ _x_ ____"
    assert fill_in("a __../secret__ __ /x__", 0, tmp_path) == "a __../secret__ __ /x__"


def test_files_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n", "utf-8")
    (tmp_path / "circle.txt").write_text("a __circle__\n", "utf-8")
    for prompt, said in (
        ("a __missing__", "__missing__ needs .*missing.txt, which cannot be read"),
        ("a __empty__", "__empty__ needs a choice a line"),
        ("a __circle__", "name each other more than 16 deep"),
    ):
        with pytest.raises(ValueError, match=said):
            fill_in(prompt, 0, tmp_path)
