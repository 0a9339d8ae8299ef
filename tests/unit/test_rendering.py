"""Tables to jobs, jobs to pictures, pictures to files and the ledger: all of it but Ray."""

import errno
import io
import json
import sys
import tarfile
from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from krea2_model import nano
from krea2_model.cli.errors import UsageError
from krea2_model.cli.main import main, parse
from krea2_model.pipeline.pipeline import Krea2Pipeline
from krea2_rendering import render as many
from krea2_rendering.encoding import JobEncoder
from krea2_rendering.ledger import (
    Ledger,
    finished,
    number_of,
    read_entries,
    write_table,
)
from krea2_rendering.painting import JobPainter
from krea2_rendering.places import Place
from krea2_rendering.plan import make_plan
from krea2_rendering.writing import (
    ENCODED,
    FolderWriter,
    ShardWriter,
    encode,
    records_of,
    shard_names,
)

NONE = np.empty(0, np.uint64)
LATER = "2999-01-01T00:00:00Z"
MODEL = ["--model", "nano", "--steps", "1", "--width", "32", "--height", "32", "--quiet"]


def options(*words) -> Namespace:
    return parse(["render", "table", "--engine", "ray", *MODEL, *words])


@pytest.fixture
def plan(tmp_path):
    """The plan of rows as JSONL."""

    def make(*rows, words=(), done=NONE, batch=1, tokens_of=None):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return make_plan(path, options(*words), done, batch, tokens_of)

    return make


def jobs(plan):
    return [job for chunk in plan.chunks for job in chunk.to_pylist()]


def test_a_key_is_made_of_the_content(plan):
    star, circle = {"prompt": "a star", "seed": 3}, {"prompt": "a circle"}
    one, other = plan(star, circle), plan(circle, {"seed": 3, "prompt": "a star"}, {"prompt": "x"})
    assert [j["key"] for j in jobs(one)] == [jobs(other)[at]["key"] for at in (1, 0)]
    assert one.keys.tolist() == sorted(number_of(j["key"]) for j in jobs(one))
    assert len({j["key"] for j in jobs(plan(star, {**star, "seed": 4}, {**star, "steps": 2}))}) == 3
    # Pictures of one name in two folders are two pictures.
    starts = [{**star, "start_image": f"{folder}/1.png", "denoise": 0.5} for folder in "ab"]
    assert len({j["key"] for j in jobs(plan(*starts))}) == 2


def test_a_plan_leaves_out_what_is_made_and_what_is_asked_for_twice(plan):
    rows = [{"prompt": "a star", "seeds": "1-3"}, {"prompt": "a star", "seed": 2}, {"prompt": "b"}]
    first = plan(*rows)
    assert (first.rows, first.jobs, first.repeated, first.made) == (3, 4, 1, 0)
    assert [job["seed"] for job in jobs(first)] == [1, 2, 3, 0]
    rest = plan(*rows, done=first.keys[:3])
    assert (rest.jobs, rest.made, rest.repeated) == (1, 3, 1)
    assert rest.keys.tolist() == first.keys[3:].tolist()
    # The file that the plain command gives a second picture of a row with a name.
    named = plan({"prompt": "a star", "seeds": "1-2", "output": "s/star.webp"})
    assert [job["file"] for job in jobs(named)] == ["s/star.webp", "s/star-2.webp"]


def test_bad_rows_stop_nobody(plan):
    bad = [{"prompt": "a", "stpes": 2}, {"prompt": "a", "steps": 0}, {"seed": 2}, ["a"]]
    bad += [{"prompt": "a", "seed": -1}, {"prompt": "a", "output": "../a.png"}]
    found = plan({"prompt": "a star"}, *bad)
    said = ["Did you mean steps?", "--steps is 0", "The prompt is empty", "It is list"]
    said += ["--seed is -1", "expected a name in the folder"]
    assert found.jobs == 1 and [error["row"] for error in found.errors] == [2, 3, 4, 5, 6, 7]
    for error, words in zip(found.errors, said, strict=True):
        assert words in error["error"]
    with pytest.raises(UsageError, match="All 4 rows of .* row 1: stpes"):
        plan(*bad[:4])


def test_names_of_rows_are_each_for_one_content(plan):
    same = {"prompt": "a star", "id": 7}
    assert jobs(plan(same, same))[0]["id"] == "7"
    with pytest.raises(UsageError, match="Rows 1 and 2 have the same id, 7, and different content"):
        plan(same, {"prompt": "a circle", "id": "7"})
    with pytest.raises(UsageError, match="Rows 1 and 3 have the same output, a.png"):
        plan(
            *(
                {"prompt": p, "output": o}
                for p, o in (("a", "a.png"), ("b", "b.png"), ("c", "a.png"))
            )
        )


def test_tables_of_every_form_are_the_same_jobs(tmp_path):
    rows = [{"prompt": f"a star {n}", "seed": n, "steps": 2} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    text = "".join(f'"{row["prompt"]}",{row["seed"]},2\n' for row in rows)
    (tmp_path / "a.csv").write_text("prompt,seed,steps\n" + text, encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, part in (("1.jsonl", rows[:2]), ("2.jsonl", rows[2:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / name).write_text(lines, encoding="utf-8")
    plans = [
        make_plan(place, options(), NONE)
        for place in (tmp_path / "a.parquet", f"file://{tmp_path}/a.csv", folder)
    ]
    assert len({tuple(plan.keys.tolist()) for plan in plans}) == 1 and plans[0].jobs == 5


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "promt\na star\n", "the column 'promt': .* Did you mean prompt?"),
        ("a.csv", "seed\n1\n", "has no column prompt; it has seed"),
        ("a.csv", "prompt,vae\na,b\n", "weights are loaded once; give --vae"),
        ("a.jsonl", "", "has no rows"),
        ("a.json", "[]", "ends in .json; expected .txt, .csv, .jsonl, .parquet"),
        ("a.parquet", "PAR0", "a.parquet cannot be read"),
        ("folder/a.md", "", "The folder .* has no table"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        make_plan(path.parent if name.startswith("folder") else path, options(), NONE)


def test_addresses_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(UsageError, match="There is no table"):
        make_plan(tmp_path / "a.csv", options(), NONE)
    with pytest.raises(UsageError, match="nofs://bucket cannot be reached"):
        Place("nofs://bucket")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Nothing can be written to .*file"):
        Place(tmp_path / "file").check_writable()
    Place(tmp_path / "new").check_writable()
    assert not list((tmp_path / "new").iterdir())


def test_rows_of_one_setting_and_length_are_brought_together(plan):
    rows = [{"prompt": f"{'a ' * (n % 2 + 1)}star {n}", "seed": n} for n in range(6)]
    rows.append({"prompt": "a star 7", "steps": 2})
    found = jobs(plan(*rows, batch=4, tokens_of=lambda text, weighted: len(text.split())))
    assert [job["seed"] % 2 for job in found if job["values"] == "{}"] in (
        [0] * 3 + [1] * 3,
        [1] * 3 + [0] * 3,
    )
    assert len({job["group"] for job in found}) == 3


# The ledger.


def entry(key, **more):
    return {"row": 1, "key": f"{key:016x}", "prompt": "a", "seed": 2**64 - 1, **more}


@pytest.mark.parametrize("address", ["{tmp}", "memory://{tmp}"])
def test_a_ledger_goes_on_after_a_crash(tmp_path, address):
    place = Place(address.format(tmp=tmp_path))
    for name in ("a.png", "b.png", "shards/1.tar"):
        place.write(name, b"x")
    with Ledger(place) as ledger:
        ledger.add([entry(1, file="a.png"), entry(2, error="no"), {"row": 9, "error": "old"}])
    if place.is_local:
        with (tmp_path / "results.jsonl").open("a") as file:
            file.write('{"row": 2, "fi')
    with Ledger(place) as ledger:
        ledger.run = LATER
        ledger.add([entry(3, file="gone.png"), entry(4, file="shards/1.tar", member="4.png")])
        ledger.add([entry(1, error="worse"), entry(5, error="no"), entry(1, file="b.png")])
    assert finished(place).tolist() == [1, 4]
    assert len(list(read_entries(place))) == 8
    write_table(place, LATER)
    with place.open("table.parquet") as file:
        table = pq.read_table(file).to_pylist()
    found = [(int(row["key"], 16), row["file"], row["error"]) for row in table]
    expected = [(1, "b.png", None), (3, "gone.png", None), (4, "shards/1.tar", None)]
    assert sorted(found) == [*expected, (5, None, "no")]
    assert table[0]["seed"] == 2**64 - 1


# Painting.


@pytest.fixture
def painter(nano_once):
    def make(batch=1, words=()):
        return JobPainter(options(*words), batch)

    return make


def pixels(table):
    return {json.loads(row["entry"])["key"]: row["pixels"] for row in table.to_pylist()}


def test_a_picture_is_the_file_of_the_plain_command(plan, painter, krea2, tmp_path):
    rows = [{"prompt": "a star", "seed": 4, "lora": f"{nano.LORA}:0.5"}, {"prompt": "a circle"}]
    found = encode(painter()(plan(*rows).chunks[0])).to_pylist()
    words = ["--seed", "4", "--lora", f"{nano.LORA}:0.5", "--output", str(tmp_path / "a.png")]
    (plain,) = krea2("a star", *MODEL[:-1], *words)
    assert found[0]["data"] == plain.read_bytes() != found[1]["data"]
    kept = json.loads(found[0]["entry"])
    assert (kept["width"], kept["seed"], kept["settings"]["steps"]) == (32, 4, 1)


def test_a_picture_depends_on_no_other_of_its_call(plan, painter, monkeypatch):
    """To the bit, in any company and at any place: a call always has as many."""
    prompts = ("star", "ring", "circle", "square", "triangle")
    rows = [{"prompt": f"a red {p}", "seed": n, "steps": 2} for n, p in enumerate(prompts)]
    tokens = {"batch": 4, "tokens_of": lambda text, weighted: 1}
    paint, sizes = painter(4), []
    call = paint._painter.paint_together

    def note(rows, *words, **options):
        sizes.append(len(rows))
        return call(rows, *words, **options)

    monkeypatch.setattr(paint._painter, "paint_together", note)
    together = pixels(paint(plan(*rows, **tokens).chunks[0]))
    assert len(set(together.values())) == 5
    turned = pixels(paint(plan(*rows[::-1], **tokens).chunks[0]))
    alone = pixels(paint(plan(rows[2], **tokens).chunks[0]))
    assert turned == together and together.items() >= alone.items()
    assert set(sizes) == {4}


def test_prompts_may_be_encoded_by_others(plan, painter, monkeypatch):
    """And the pictures are the same, to the bit; with weights the painter encodes them itself."""
    rows = [{"prompt": "a red star", "seed": 3}, {"prompt": "a (blue:1.4) ring"}]
    rows.append({"prompt": "a ring", "guidance": 2, "negative": "blue"})
    chunk = plan(*rows).chunks[0]
    encoded = JobEncoder(options())(chunk)
    assert [data is None for data in encoded["encoded"].to_pylist()] == [False, True, False]
    expected, read = pixels(painter()(chunk)), []
    encode = Krea2Pipeline.encode_prompt
    monkeypatch.setattr(
        Krea2Pipeline, "encode_prompt", lambda *a, **o: (read.append(a[1]), encode(*a, **o))[1]
    )
    assert pixels(painter()(encoded)) == expected and read == [["a (blue:1.4) ring"]]


def test_errors_of_rows_are_entries(plan, painter, monkeypatch):
    rows = [{"prompt": f"a {n} star", "seed": n} for n in range(4)]
    rows[1]["lora"] = "nowhere.safetensors"
    paint, kept = painter(4), JobPainter.__call__
    together = paint._painter.paint_together

    def fail(args, title, **options):
        if any(one.seed == 2 for one in args):
            raise MemoryError
        return together(args, title, **options)

    monkeypatch.setattr(paint._painter, "paint_together", fail)
    tokens = {"batch": 4, "tokens_of": lambda text, weighted: 1}
    painted = kept(paint, plan(*rows, **tokens).chunks[0]).to_pylist()
    found = {json.loads(row["entry"])["row"]: json.loads(row["entry"]) for row in painted}
    assert "nowhere.safetensors (--lora)" in found[2]["error"]
    assert "Memory ran out" in found[3]["error"]
    # The others of that call are made one by one.
    assert "error" not in found[1] and "error" not in found[4]


# Writing.


@pytest.fixture
def encoded(plan):
    """Encoded pictures of three jobs, the last of which has an error."""
    image = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(image, "PNG")
    rows = []
    for job in jobs(plan(*({"prompt": p} for p in "abc"))):
        one = {"key": job["key"], "prompt": job["prompt"], "row": job["row"], "seed": 0}
        one |= {"error": "no"} if job["prompt"] == "c" else {"settings": {"steps": 1}, "bytes": 1}
        data = None if job["prompt"] == "c" else image.getvalue()
        rows.append({"entry": json.dumps(one), "file": job["file"], "data": data})
    return pa.Table.from_pylist(rows, ENCODED)


def entries(table):
    return [json.loads(text) for text in table["entry"].to_pylist()]


def test_a_folder_of_pictures(encoded, tmp_path):
    written = entries(FolderWriter(Place(tmp_path))(encoded))
    assert [entry.get("file") for entry in written] == [*encoded["file"].to_pylist()[:2], None]
    assert (tmp_path / written[0]["file"]).read_bytes() == encoded["data"][0].as_py()
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
@pytest.mark.parametrize("address", ["{tmp}", "memory://{tmp}"])
def test_shards(encoded, tmp_path, layout, address):
    place = Place(address.format(tmp=tmp_path))
    written = entries(ShardWriter(place, layout)(encoded))
    assert [entry.get("error") for entry in written] == ["no", None, None]
    (name,) = shard_names(place)
    assert {entry.get("file") for entry in written} == {None, name}
    # Written again it is the same file: nothing is there twice.
    ShardWriter(place, layout)(encoded)
    assert shard_names(place) == {name}
    assert list(records_of(place, name)) == written[1:]
    with place.open(name) as file:
        if layout == "webdataset":
            with tarfile.open(fileobj=file) as tar:
                names = [member.name for member in tar]
                keys = [entry["key"] for entry in written[1:]]
                assert names == [f"{key}.{end}" for key in keys for end in ("png", "json", "txt")]
                assert tar.extractfile(names[0]).read() == encoded["data"][0].as_py()
                assert tar.extractfile(names[2]).read() == b"a"
        else:
            images = pq.read_table(file)["image"].to_pylist()
            assert Image.open(io.BytesIO(images[1]["bytes"])).size == (4, 4)


@pytest.mark.parametrize("writer", [FolderWriter, lambda place: ShardWriter(place, "parquet")])
def test_a_full_disk_ends_the_run(encoded, tmp_path, monkeypatch, writer):
    def fail(self, name, data):
        raise OSError(errno.ENOSPC, "No space left", name)

    monkeypatch.setattr(Place, "write", fail)
    written = entries(writer(Place(tmp_path))(encoded))
    failed = [entry for entry in written if entry.get("stop")]
    assert len(failed) == 2 and all("The disk is full" in entry["error"] for entry in failed)
    assert not any("file" in entry for entry in written)


# The run, with Ray's part played.


@pytest.fixture
def render(tmp_path, monkeypatch, krea2):
    """Run the command with entries made here; the prompts that it made."""
    made = []

    def play(plan, args, output, workers):
        found = jobs(plan)
        for job in found + found[:1]:  # a block that was made twice
            if job["prompt"] == "killed":
                continue
            if job["prompt"] == "stop":
                raise KeyboardInterrupt
            made.append(job["prompt"])
            one = {"row": job["row"], "key": job["key"], "prompt": job["prompt"]}
            if job["prompt"] == "full":
                yield [{**one, "error": "The disk is full.", "stop": True}]
            output.write(job["file"], b"x")
            yield [{**one, "file": job["file"]}]

    monkeypatch.setattr(many, "ray_entries", play)
    monkeypatch.setattr(many, "ray_session", lambda *words, **options: nullcontext())
    monkeypatch.setattr(many, "resources", lambda *words: None)

    def run(prompts, *words, code=0):
        made.clear()
        (tmp_path / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
        words = [tmp_path / "p.txt", "--engine", "ray", *MODEL[:-1], *words]
        result = krea2("render", *words, "--output", tmp_path / "out", code=code)
        return result, list(made)

    return run


def test_a_run_makes_what_is_missing(render, tmp_path):
    result, made = render(["a", "b", "{a|a}"])
    assert made == ["a", "b", "a"] and result == [tmp_path / "out" / "table.parquet"]
    assert len(list(read_entries(Place(tmp_path / "out")))) == 2
    error, made = render(["a", "c"], code=2)
    assert "add --resume" in error and not made
    assert render(["a", "c"], "--resume")[1][:1] == ["c"]
    assert render(["a", "c"], "--resume")[1] == []
    assert render(["a"], "--force")[1][:1] == ["a"]
    assert len(pq.read_table(tmp_path / "out" / "table.parquet")) == 3


def test_jobs_without_a_result_are_errors(render, tmp_path):
    error, _ = render(["a", "killed"], code=1)
    assert "1 of 2 pictures not made" in error
    table = pq.read_table(tmp_path / "out" / "table.parquet").to_pylist()
    assert ["Its worker was killed" in (row["error"] or "") for row in table] == [False, True]
    assert [row["row"] for row in table] == [1, 2]


def test_a_stopped_run_goes_on(render, tmp_path):
    assert render(["a", "stop", "b"], code=130)[0] == "krea2: stopped\n"
    assert len(list(read_entries(Place(tmp_path / "out")))) == 1
    assert render(["a", "b"], "--resume")[1][0] == "b"


def test_a_full_disk_stops_and_loses_nothing(render, tmp_path):
    error, made = render(["a", "full", "b"], code=1)
    assert "The disk is full. 2 of 3 pictures tried" in error and made == ["a", "full"]
    (tmp_path / "p.txt").write_text("a\nb\n")
    assert render(["a", "b"], "--resume")[1][:1] == ["b"]


def test_shards_of_a_killed_run_are_adopted(render, encoded, tmp_path):
    place = Place(tmp_path / "out")
    ShardWriter(place, "parquet")(encoded)
    with Ledger(place) as ledger:
        ledger.add([{"row": 1, "error": "old"}])
    _, made = render(["a", "b", "c"], "--resume", "--layout", "parquet")
    assert made[0] == "c" and set(made) == {"c"}
    assert (
        "would leave pictures twice" in render(["a"], "--force", "--layout", "parquet", code=2)[0]
    )


def test_options_go_with_their_engines(krea2, tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    base = ["render", tmp_path / "p.txt", *MODEL[:-1], "--output", tmp_path / "out"]
    assert "--workers goes with --engine ray" in krea2(*base, "--workers", "2", code=2)
    words = ["render", "s3://a/b.jsonl", *MODEL[:-1]]
    assert "addresses go with --engine ray" in krea2(*words, code=2)
    assert "--grid goes with the plain" in krea2(
        *base, "--engine", "ray", "--grid", "a.png", code=2
    )


@pytest.mark.parametrize("package", ["pyarrow", "ray"])
def test_a_missing_package_names_the_line_that_installs_it(krea2, tmp_path, monkeypatch, package):
    (tmp_path / "p.txt").write_text("a\n")
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith("krea2_rendering")]:
        monkeypatch.delitem(sys.modules, name)
    words = ["--engine", "ray", *MODEL[:-1], "--output", tmp_path / "out"]
    error = krea2("render", tmp_path / "p.txt", *words, code=1)
    assert f'{package} is missing: pip install "ray[data,serve]"' in error
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_and_keeps_nothing(nano_once, krea2, capsys, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"stpes": 1}\n')
    words = ["render", tmp_path / "p.jsonl", "--engine", "ray", *MODEL, "--dry-run", "--workers", 2]
    assert main([*map(str, words), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "3 rows: 2 pictures to make" in out and "1 row with errors" in out
    assert (
        "2 of 32 x 32 px, 1 step" in out
        and "2 calls of the model" in out
        and "hours with 2 workers" in out
    )
    assert not (tmp_path / "out").exists()
