"""Training data: folders, tables, captions, sizes, the order of batches, the cache."""

import io
import json

import pytest
import torch
from PIL import Image

from krea2_training.data.cache import Cache
from krea2_training.data.encoders import Encoders
from krea2_training.data.examples import Order, bucket_size, read_examples, sized, split_captions
from krea2_training.settings.sections import Data, Model


def picture(path, size=(80, 64), colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    picture(tmp_path / "a.png", (128, 128)).with_suffix(".txt").write_text("a red square")
    picture(tmp_path / "b.jpg", (160, 96)).with_suffix(".txt").write_text(
        "a long caption\nin two lines\n---\nshort\n"
    )
    picture(tmp_path / "more" / "c.webp", (96, 160)).with_suffix(".txt").write_text("tall")
    picture(tmp_path / "a.mask.png", (128, 128), "white")
    picture(tmp_path / "more" / "c.ref1.png", (64, 64))
    return tmp_path


def test_a_folder(folder):
    a, b, c = read_examples(Data(folder, trigger="sks"))
    assert (a.name, a.captions) == ("a.png", ("sks, a red square",))
    assert a.mask == folder / "a.mask.png" and not a.references
    assert b.captions == ("sks, a long caption\nin two lines", "sks, short")
    assert c.references == (folder / "more" / "c.ref1.png",)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables(tmp_path, kind):
    picture(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "caption": "one", "crop": "8,0,64,64"},
        {"image": "a.png", "caption": "two", "crop": ""},
    ]
    table = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        table.write_text(
            "image,caption,crop\n"
            + "".join(f'{r["image"]},{r["caption"]},"{r["crop"]}"\n' for r in rows)
        )
    else:
        import pyarrow as pa
        from pyarrow import parquet

        stored = io.BytesIO()
        Image.open(tmp_path / "a.png").save(stored, "PNG")
        rows[1]["image"] = "a.png"
        images = [{"bytes": stored.getvalue(), "path": None}] * 2
        parquet.write_table(
            pa.table({"image": images, "captions": [["one", "uno"], ["two"]],
                      "crop": [[8, 0, 64, 64], None]}),
            table,
        )  # fmt: skip
    first, second = read_examples(Data(table))
    assert first.crop == (8, 0, 64, 64) and second.crop is None
    assert first.captions == (("one", "uno") if kind == "parquet" else ("one",))
    one, two = sized([first, second], Data(table, resolution=(64,)))
    assert (one.width, one.height) == (64, 64) and two.width > two.height


def test_what_cannot_be_used_is_named(tmp_path, folder):
    with pytest.raises(ValueError, match="is no folder and no table"):
        read_examples(Data(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        read_examples(Data(empty))
    (folder / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 pictures without a caption: a.png.*data.caption"):
        read_examples(Data(folder))
    assert read_examples(Data(folder, caption=""))[0].captions == ("",)
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot be read: a.png"):
        sized(read_examples(Data(folder, caption="x")), Data(folder))
    picture(folder / "a.png")
    for name, what in (("b.mask", "its mask"), ("b.ref2", "its reference 1")):
        (folder / f"{name}.png").write_bytes(b"no picture")
        with pytest.raises(ValueError, match=rf"cannot be read: b.jpg \({what}: .*{name}.png"):
            sized(read_examples(Data(folder, caption="x")), Data(folder))
        (folder / f"{name}.png").unlink()
    (folder / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="bad.parquet cannot be read as Parquet"):
        read_examples(Data(folder / "bad.parquet"))
    (folder / "bad.jsonl").write_text('{"image": "a.png", "caption": "x"}\nnot json\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2"):
        read_examples(Data(folder / "bad.jsonl"))
    rows = (
        ({"caption": 7}, "row 1: caption has 7; expected a text"),
        ({"captions": ["x", ["y"]]}, r"row 1: captions has \['y'\]; expected a text"),
        ({"caption": "x", "references": 3}, "row 1: references has 3; expected a picture"),
        ({"caption": "x", "crop": [0, 0, 64, 64], "mask": "b.jpg"},
         "a.png .its mask of 160 x 96 px is cropped with it, and it has 80 x 64 px"),
    )  # fmt: skip
    for row, expected in rows:
        (folder / "row.jsonl").write_text(json.dumps({"image": "a.png", **row}))
        with pytest.raises(ValueError, match=expected):
            sized(read_examples(Data(folder / "row.jsonl")), Data(folder))
    (folder / "row.jsonl").write_text('{"image": "a.png", "captions": ["x", null, " "]}')
    assert read_examples(Data(folder / "row.jsonl"))[0].captions == ("x",), "and no word None"
    (folder / "gone.jsonl").write_text('{"image": "gone.png", "caption": "x"}\n')
    with pytest.raises(ValueError, match=r"row 1: .*gone.png is not there"):
        read_examples(Data(folder / "gone.jsonl"))


def test_captions_are_parted_by_lines_of_dashes():
    assert split_captions("one\n\ntwo paragraphs\n---\nshort\n") == (
        "one\n\ntwo paragraphs",
        "short",
    )
    assert split_captions("a --- b") == ("a --- b",)
    assert split_captions(" \n") == ()


def test_buckets_have_the_area_and_shapes_in_groups():
    assert bucket_size(100, 100, 1024) == (1024, 1024)
    assert bucket_size(1000, 1010, 512) == (512, 512)
    for width, height in ((300, 200), (200, 300), (1000, 10), (16, 900)):
        size = bucket_size(width, height, 512)
        assert all(side % 16 == 0 for side in size)
        assert 0.85 < size[0] * size[1] / 512**2 < 1.15
        assert (size[0] > size[1]) == (width > height)
        assert max(size) <= 4.2 * min(size)


def order_of(folder, batch, ranks=1, seed=0, dropout=0.0, copies=3):
    data = Data(folder, resolution=(128,), repeats=copies)
    return Order(sized(read_examples(data), data), batch, dropout, seed, ranks)


def test_an_epoch_has_every_picture_and_batches_one_size(folder):
    order = order_of(folder, 2)
    seen = []
    for number in range(order.batches_per_epoch):
        draws = order.batch(number)
        assert len(draws) == 2
        sizes = {(order.pictures[d.index].width, order.pictures[d.index].height) for d in draws}
        assert len(sizes) == 1
        seen += [draw.index for draw in draws]
    assert set(seen) == set(range(9))


def test_batches_can_be_computed_from_their_number_alone(folder):
    first = [order_of(folder, 2).batch(number) for number in range(20)]
    order = order_of(folder, 2)
    assert [order.batch(number) for number in reversed(range(20))] == first[::-1]
    assert first != [order_of(folder, 2, seed=1).batch(number) for number in range(20)]
    captions = {draw.caption for batch in first for draw in batch}
    assert "short" in captions and None not in captions
    dropped = [d.caption for n in range(40) for d in order_of(folder, 2, dropout=0.5).batch(n)]
    assert 0.2 < sum(caption is None for caption in dropped) / len(dropped) < 0.8


def test_ranks_share_the_pictures_of_a_step(folder):
    whole = order_of(folder, 4)
    halves = order_of(folder, 2, ranks=2)
    for number in range(6):
        together = [d.index for rank in (0, 1) for d in halves.batch(number, rank)]
        assert sorted(together) == sorted(draw.index for draw in whole.batch(number))


def test_only_what_changed_is_encoded_again(folder, tmp_path):
    encoders = Encoders(Model("nano"), torch.device("cpu"), torch.float32)
    cache = Cache(tmp_path / "cache", encoders)
    data = Data(folder, resolution=(64,))

    def fill():
        return cache.fill(sized(read_examples(data), data))

    # Three pictures, and four captions beside the empty one.
    assert fill() == 3 + 5
    assert fill() == 0
    (folder / "a.txt").write_text("a blue square")
    assert fill() == 1
    file = next((tmp_path / "cache").rglob("*.safetensors"))
    file.write_bytes(b"damaged")
    assert fill() == 1
    order = Order(sized(read_examples(data), data), 1, 0.0, 0)
    batches = [cache.batch(order.batch(n), order, torch.device("cpu")) for n in range(3)]
    assert {len(batch.references) for batch in batches} == {0, 1}
    assert [batch.weights is not None for batch in batches].count(True) == 1
    for batch in batches:
        assert batch.latents.shape[:2] == (1, 16) and batch.taps.shape[2] == 12
    keeping = Cache(tmp_path / "cache", encoders, keep=0.1)
    first = [keeping.batch(order.batch(n), order, torch.device("cpu")) for n in range(3)]
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.unlink()
    for number, (before, plain) in enumerate(zip(first, batches, strict=True)):
        again = keeping.batch(order.batch(number), order, torch.device("cpu"))
        assert torch.equal(again.latents, before.latents)
        assert torch.equal(again.taps, plain.taps)
    with pytest.raises(ValueError, match="gone or damaged"):
        cache.batch(order.batch(0), order, torch.device("cpu"))


def test_hidden_places_of_a_folder_are_left_out_and_its_own_place_may_be_hidden(tmp_path):
    folder = tmp_path / ".datasets" / "photos"
    (folder / ".thumbnails").mkdir(parents=True)
    for name in ("a.png", ".b.png", ".thumbnails/a.png"):
        Image.new("RGB", (64, 64)).save(folder / name)
    (folder / "a.txt").write_text("a photo")
    assert [one.name for one in read_examples(Data(path=folder))] == ["a.png"]
