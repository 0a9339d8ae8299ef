"""Prompts to learn from: files, tables, folders, and the order they come in."""

import json

import pytest
from PIL import Image

from krea2_training.prompts import Prompts, digest_of, in_turn, read_prompts

ROWS = [{"prompt": "a red square", "shape": "square"}, {"prompt": "a star", "shape": "star"}]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_a_file(tmp_path, kind):
    file = tmp_path / f"prompts.{kind}"
    if kind == "txt":
        file.write_text("a red square\n\n  a star \n")
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "csv":
        file.write_text("shape,prompt\nsquare,a red square\nstar, a star\n")
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(ROWS), file)
    expected = [{"prompt": row["prompt"]} for row in ROWS] if kind == "txt" else ROWS
    assert read_prompts(file) == expected


def test_a_folder_gives_its_captions_once(tmp_path):
    for name, caption in (("a", "one\n---\nshort"), ("b", "two"), ("c", "two")):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    assert [row["prompt"] for row in read_prompts(tmp_path)] == ["one", "short", "two"]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 pictures have no caption: b.png.*text file"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", "\n \n", r"a.txt holds no prompts"),
        ("a.txt", "one\ntwo\none\n", r"1 prompts more than once: 'one'"),
        ("a.jsonl", '{"text": "one"}', r"row 1 has no column prompt; it has text"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": 3}', r"row 2: prompt is '3'; expected a text"),
        ("a.csv", "prompt,shape\n ,star\n", r"row 1: prompt is ' '; expected a text"),
        ("a.csv", "prompt\na star, blue\n", r"row 1 has more fields than the header.*quotation"),
        ("a.csv", "prompt\n", r"a.csv holds no prompts"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=expected):
        read_prompts(tmp_path / name)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.txt, which is not there"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="prompts.path is not set"):
        Prompts()
    with pytest.raises(ValueError, match="prompts.size is 100; expected a multiple of 16"):
        Prompts(tmp_path, size=100)


def test_batches_go_round_and_can_be_computed_by_themselves():
    batches = [in_turn(5, 2, number, seed=0) for number in range(10)]
    places = [index for batch in batches for index in batch]
    rounds = [places[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1, "another order each time round"
    assert batches != [in_turn(5, 2, number, seed=1) for number in range(10)]


def test_the_digest_has_the_other_columns():
    assert digest_of(ROWS) == digest_of([dict(reversed(row.items())) for row in ROWS])
    assert digest_of(ROWS) != digest_of([ROWS[0], {**ROWS[1], "shape": "ring"}])
