"""Prompts to learn from: files, tables, folders, and the order they come in."""

import json

import pytest
from PIL import Image

from krea2_training.data.prompts import Prompts, digest_of, in_turn, read_prompts
from krea2_training.data.shapes import check_shapes, shape_of

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
    with pytest.raises(ValueError, match=r"1 of 3 pictures without a caption: b.png.*text file"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", "\n \n", r"a.txt holds no prompts"),
        ("a.txt", "one\ntwo\none\n", r"1 prompt more than once: 'one'"),
        ("a.jsonl", '{"text": "one"}', r"row 1 has no column prompt; it has text"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": 3}', r"prompt is '3'; expected a text"),
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


@pytest.mark.parametrize(
    "row, expected",
    [
        ({}, (112, 144)),
        ({"aspect": ""}, (112, 144)),
        ({"aspect": "16:9"}, (176, 96)),
        ({"width": "96", "height": "160"}, (96, 160)),
        ({"width": 512, "height": 64, "aspect": None}, (512, 64)),
    ],
)
def test_a_row_s_picture_has_its_own_shape_or_another(tmp_path, row, expected):
    check_shapes([row], tmp_path)
    assert shape_of(row, 128, (3, 4)) == expected


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"width": 96}, "height is not set; expected pixels: a row has both"),
        ({"width": "wide", "height": 96}, "width is wide; expected pixels"),
        ({"width": 100, "height": 96}, "width is 100; expected a multiple of 16"),
        ({"aspect": "tall"}, "aspect is tall; expected width to height, such as 3:4"),
        (
            {"aspect": "9:1"},
            "aspect is 9:1; expected width to height, such as 3:4, from 1:4",
        ),
        (
            {"aspect": "1:1", "width": 96, "height": 96},
            "aspect is 1:1; expected none beside",
        ),
    ],
)
def test_rows_of_no_shape_are_named(tmp_path, row, expected):
    with pytest.raises(ValueError, match=f"prompts.csv, row 2: {expected}"):
        check_shapes([{}, row], tmp_path / "prompts.csv")


def test_aspects_are_ratios(tmp_path):
    assert Prompts(tmp_path, aspects=("2:3", "1.5:1")).ratios == [(2, 3), (1.5, 1)]
    for wrong in ("3", "0:1", "1:0", "nan:1", "1:9"):
        with pytest.raises(ValueError, match=r"prompts.aspects is .*; expected width to height"):
            Prompts(tmp_path, aspects=("1:1", wrong))
