"""`krea2 curate`: what of drawn pictures is kept, with planted duplicates and near misses."""

import json
import os
from collections.abc import Callable
from functools import partial
from random import Random

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from krea2_model.cli.curate_options import _LIMITS
from krea2_model.cli.main import main
from krea2_training.curate import Limits, curate, read_measures
from krea2_training.curate.duplicates import near_duplicates
from krea2_training.curate.measures import COLOUR_SHARES, HASH_BITS, Measures, border_share
from krea2_training.curate.workers import each
from krea2_training.data.examples import read_examples
from krea2_training.settings.sections import Data
from nano_training.scenes import SHAPES, outline, paint, signed_distance

SIZES = ((192, 192), (256, 160), (144, 224), (320, 240))
# Shapes on a plain ground may leave bars of it at the edges.
LIMITS = Limits(resolution=(128,), border=1)
ALONE = partial(each, workers=1)


def drawn(random: Random) -> Image.Image:
    """Shapes in any colours on a slope of two: no two of these are alike."""
    width, height = random.choice(SIZES)
    first, last = np.array([[random.random() for _ in range(3)] for _ in range(2)], np.float32)
    slope = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    picture = np.repeat(first + (last - first) * slope, height, axis=0)
    for _ in range(random.randint(3, 6)):
        place = random.uniform(0.1, 0.9) * width, random.uniform(0.1, 0.9) * height
        radius = random.uniform(0.08, 0.3) * min(width, height)
        distance = signed_distance(random.choice(SHAPES), width, height, *place, radius)
        if random.random() < 0.3:
            distance = outline(distance, 0.04 * min(width, height))
        paint(picture, distance, [random.random() for _ in range(3)])
    return Image.fromarray((255 * picture).round().astype(np.uint8))


def recoloured(image: Image.Image) -> Image.Image:
    """In opposite colours of the same brightness, which a hash of brightness alone cannot tell."""
    luma, blue, red = image.convert("YCbCr").split()
    opposite = (one.point(lambda value: 255 - value) for one in (blue, red))
    return Image.merge("YCbCr", (luma, *opposite)).convert("RGB")


def scaled(factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize((int(image.width * factor), int(image.height * factor)))


COPIES = {
    "q60.jpg": lambda image: image,
    "q50.webp": lambda image: image,
    "half.png": scaled(0.7),
    "double.png": scaled(1.6),
    "cropped.png": lambda image: image.crop((3, 2, image.width - 1, image.height - 3)),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder of 500 pictures, and the originals of the duplicates among them."""
    folder, random = tmp_path_factory.mktemp("pictures"), Random(7)
    originals: dict[str, str] = {}
    images = [drawn(random) for _ in range(320)]
    for index, image in enumerate(images):
        image.save(folder / f"{index:03}.png", compress_level=1)
    for index in range(100):
        kind = list(COPIES)[index % len(COPIES)]
        name = f"{index:03} {kind}"
        quality = {"quality": int(kind[1:3])} if kind[0] == "q" else {}
        COPIES[kind](images[index]).save(folder / name, **quality)
        originals[name] = f"{index:03}.png"
    for index in range(100, 180):
        recoloured(images[index]).save(folder / f"{index:03} recoloured.png", compress_level=1)
    return folder, originals


def test_precision_and_recall_of_near_duplicates(planted):
    """Of each pair either may be the one that is kept."""
    folder, originals = planted
    curated = curate(folder, LIMITS, each=ALONE)
    assert len(curated.rows) == 500
    found = {frozenset((row.file, row.duplicate_of)) for row in curated.rows if row.duplicate_of}
    wanted = {frozenset(pair) for pair in originals.items()}
    right = len(found & wanted)
    assert right / len(found) > 0.95 and right / len(wanted) > 0.95
    assert not [row for row in curated.rows if row.reasons not in ((), ("near duplicate",))]
    kept = {row.file for row in curated.rows if row.kept}
    assert all(row.duplicate_of in kept for row in curated.rows if not row.kept)


def test_recoloured_pictures_are_told_apart_by_their_colours_alone(planted):
    folder, _ = planted
    blind = curate(folder, Limits(resolution=(128,), border=1, colour=4), each=ALONE)
    pairs = [f"{row.file} of {row.duplicate_of}" for row in blind.rows if row.duplicate_of]
    assert sum("recoloured" in pair for pair in pairs) > 70


def noise(size=(160, 160), seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (size[1] // 16, size[0] // 16, 3))
    return Image.fromarray(values.astype(np.uint8)).resize(size, Image.BICUBIC)


def test_reasons(tmp_path):
    """A picture of each kind, and one that is good."""
    noise(seed=1).save(tmp_path / "good.png")
    (tmp_path / "again.png").write_bytes((tmp_path / "good.png").read_bytes())
    noise(seed=2).save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("no picture")
    noise((96, 96), 3).save(tmp_path / "small & tiny.png")
    noise((800, 160), 4).save(tmp_path / "wide.png")
    Image.new("RGB", (160, 160), "teal").save(tmp_path / "flat.png")
    for name, colour in (("black", "black"), ("white", "white")):
        image = Image.new("RGB", (160, 160), colour)
        image.paste(noise((48, 32), 5), (112, 128))
        image.save(tmp_path / f"{name}.png")
    boxed = Image.new("RGB", (160, 200), "navy")
    boxed.paste(noise((160, 160), 6), (0, 20))
    boxed.save(tmp_path / "boxed.png")
    lying = noise((160, 700), 7)
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "turned.jpg", exif=exif)
    curated = curate(tmp_path, Limits(resolution=(128,), entropy=0.5))
    assert {row.file: row.reasons for row in curated.rows} == {
        "again.png": (), "good.png": ("same file",), "cut.jpg": ("broken",),
        "text.png": ("broken",), "small & tiny.png": ("small",), "wide.png": ("aspect",),
        "flat.png": ("flat",), "black.png": ("black",), "white.png": ("white",),
        "boxed.png": ("border",), "turned.jpg": ("aspect",),
    }  # fmt: skip
    by_file = {row.file: row for row in curated.rows}
    assert by_file["good.png"].duplicate_of == "again.png"
    turned = by_file["turned.jpg"].measures
    assert (turned.width, turned.height) == (700, 160)
    assert "truncated" in by_file["cut.jpg"].measures.error
    page = (tmp_path / "curate.html").read_text(encoding="utf-8")
    assert page.count("<figure class='gone'") == 10 and page.count("<figure class='kept'") == 1
    assert page.count("cannot be read") == 2 and "src='http" not in page
    assert "small &amp; tiny.png" in page and "small & tiny" not in page
    # Every limit can be lifted.
    lifted = Limits((64,), enlarge=8, aspect=100, entropy=0, black=1, white=1, border=1)
    left = {row.file: row.reasons for row in curate(tmp_path, lifted).rows if row.reasons}
    assert {name for name, why in left.items() if why == ("broken",)} == {"cut.jpg", "text.png"}
    assert set(left) == {"cut.jpg", "text.png", "good.png"}


def test_pictures_are_compared_as_they_stand_and_on_white(tmp_path):
    """A copy that lies on its side by EXIF, and one with transparency in place of white."""
    upright = noise((160, 240), 8)
    upright.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(tmp_path / "b.jpg", exif=exif)
    shape = Image.new("L", (160, 160), 0)
    shape.paste(255, (30, 50, 120, 140))
    clear = noise(seed=9)
    clear.putalpha(shape)
    clear.save(tmp_path / "c.png")
    white = Image.new("RGB", (160, 160), "white")
    white.paste(noise(seed=9), mask=shape)
    white.save(tmp_path / "d.png")
    rows = curate(tmp_path, LIMITS).rows
    found = {frozenset((row.file, row.duplicate_of)) for row in rows if row.duplicate_of}
    assert found == {frozenset(("a.png", "b.jpg")), frozenset(("c.png", "d.png"))}


def test_borders_are_bars_of_one_colour_at_opposite_edges():
    picture = np.arange(100 * 80).reshape(100, 80) % 251
    assert border_share(picture) == 0
    sky = picture.copy()
    sky[:40] = 200
    assert border_share(sky) == 0, "a sky is at one edge only"
    box = picture.copy()
    box[:10] = box[-30:] = 3
    assert border_share(box) == pytest.approx(0.4)
    box[:, :8] = box[:, -8:] = 3
    assert border_share(box) == pytest.approx(1 - 0.6 * 0.8)
    assert border_share(np.full((10, 10), 7)) == 0


def hashed(bits: np.ndarray, black: int = 0) -> Measures:
    colours = bytes([black, *[0] * (COLOUR_SHARES - 1)])
    return Measures(0, 0, "", phash=np.packbits(bits).tobytes(), colours=colours)


def test_the_nearest_of_those_kept_counts_and_blocks_change_nothing(monkeypatch):
    """A chain of pictures is not all one picture's; blocks of 3 give what one block gives."""
    chain = np.zeros((6, HASH_BITS), bool)
    for index in range(6):
        chain[index, : 8 * index] = True
    pictures = [hashed(bits) for bits in chain]
    expected = {1: 0, 2: 0, 4: 3, 5: 3}
    assert near_duplicates(pictures, 16, 0.5) == expected
    assert near_duplicates([], 16, 0.5) == {}
    # As far from 0 as from 3, and nearer to 3.
    assert near_duplicates([pictures[0], pictures[3], pictures[2]], 16, 0.5) == {2: 1}
    assert near_duplicates([hashed(chain[0], 0), hashed(chain[0], 40)], 16, 0.5) == {}
    random = np.random.default_rng(0)
    centres = random.random((40, HASH_BITS)) < 0.5
    many = [hashed(centres[i % 40] ^ (random.random(HASH_BITS) < 0.05)) for i in range(300)]
    whole = near_duplicates(many, 20, 0.5)
    assert len(whole) > 200
    monkeypatch.setattr("krea2_training.curate.duplicates._BLOCK", 3)
    assert near_duplicates(many, 20, 0.5) == whole
    assert near_duplicates(pictures, 16, 0.5) == expected


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    noise((160, 160), 1).save(folder / "a.png")
    (folder / "a.txt").write_text("long\n---\nshort")
    scaled(2)(noise((160, 160), 1)).save(folder / "a larger.png")
    noise((320, 160), 2).save(folder / "more" / "b.png")
    (folder / "more" / "b.txt").write_text("wide")
    noise((320, 160), 3).save(folder / "more" / "b.ref1.png")
    noise((320, 160), 4).save(folder / "more" / "b.mask.png")
    return folder


def test_the_command(folder, tmp_path, capsys):
    """The list is what training reads; of duplicates the one with a caption is kept."""
    listing = tmp_path / "kept.jsonl"
    words = ["curate", str(folder), "--resolution", "128", "256", "--list", str(listing)]
    assert main(words) == 0
    out, err = capsys.readouterr()
    written = [folder / "curate.parquet", folder / "curate.html", listing]
    assert out.splitlines() == list(map(str, written))
    assert "Kept: 2 of 3 pictures." in err and "near duplicate: 1" in err
    assert "128 px: 2 of them are large enough, by size:\n  128 x 128: 1\n  176 x 96: 1\n" in err
    assert "256 px: 1 of them are large enough, by size:\n  368 x 176: 1\n" in err
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    assert rows == [
        {"image": "photos/a.png", "captions": ["long", "short"]},
        {"image": "photos/more/b.png", "caption": "wide", "mask": "photos/more/b.mask.png",
         "references": ["photos/more/b.ref1.png"]},
    ]  # fmt: skip
    table = parquet.read_table(folder / "curate.parquet").to_pylist()
    found = {row["file"]: (row["buckets"], row["crops"]) for row in table}
    assert found["a.png"] == (["128 x 128"], [[0, 0, 160, 160]])
    # 2 to 1 goes into 1.83 to 1 without its ends, into 2.09 to 1 without two edges.
    buckets = ["176 x 96", "368 x 176"]
    assert found["more/b.png"] == (buckets, [[13, 0, 293, 160], [0, 3, 320, 153]])
    assert found["a larger.png"] == ([], [])
    a, b = read_examples(Data(listing))
    assert a.captions == ("long", "short") and b.references and b.mask


def test_only_new_and_changed_files_are_read_again(folder, monkeypatch):
    seen = []

    def counted(path):
        seen.append(path.name)
        return real(path)

    real = curate.__globals__["measure"]
    monkeypatch.setitem(curate.__globals__, "measure", counted)
    curate(folder, LIMITS)
    assert sorted(seen) == ["a larger.png", "a.png", "b.png"]
    seen.clear()
    first = curate(folder, LIMITS)
    assert not seen
    os.utime(folder / "a.png", ns=(1, 1))
    noise((160, 160), 9).save(folder / "c.png")
    (folder / "a larger.png").unlink()
    curated = curate(folder, LIMITS)
    assert sorted(seen) == ["a.png", "c.png"]
    assert [row.file for row in curated.rows] == ["a.png", "c.png", "more/b.png"]
    assert curated.rows[0].measures.phash == first.rows[1].measures.phash


def test_what_was_read_is_kept_when_the_work_is_stopped(folder):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curate(folder, LIMITS, on_picture=stop)
    known = read_measures(folder / "curate.parquet")
    assert list(known) == ["a larger.png", "a.png"]
    seen = []
    curate(folder, LIMITS, on_picture=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]


def test_what_was_read_is_kept_on_the_way(folder, monkeypatch):
    """A process that is killed writes nothing any more."""
    monkeypatch.setattr("krea2_training.curate._SAVE_EVERY", 2)
    seen = []
    table = folder / "curate.parquet"
    curate(folder, LIMITS, on_picture=lambda done, total: seen.append(len(read_measures(table))))
    assert seen == [0, 2, 2]


def test_processes_give_the_same(folder, monkeypatch):
    alone = curate(folder, LIMITS, each=ALONE)
    (folder / "curate.parquet").unlink()
    monkeypatch.setattr("krea2_training.curate.workers._WORTH_A_PROCESS", 1)
    assert curate(folder, LIMITS, each=partial(each, workers=2)) == alone


def test_what_cannot_be_used_is_refused(folder, tmp_path, capsys):
    from pyarrow import parquet, table

    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    noise().save(other / "z.png")
    curate(other, LIMITS)
    parquet.write_table(table({"file": ["a.png"]}), tmp_path / "alien.parquet")
    (tmp_path / "text.parquet").write_text("text")
    for words, expected in (
        ([str(tmp_path / "nowhere")], "is no folder"),
        ([str(empty)], "holds no pictures; expected at least one of"),
        ([str(folder), "--table", str(other / "curate.parquet")], "it is another folder's"),
        ([str(folder), "--table", str(tmp_path / "alien.parquet")], "is no table of krea2 curate"),
        ([str(folder), "--table", str(tmp_path / "text.parquet")], "is no table of krea2 curate"),
        ([str(folder), "--table", "a.csv"], "--table is a.csv; expected a .parquet file"),
        ([str(folder), "--list", "no/a.jsonl"], "--list is no/a.jsonl, whose folder is not there"),
        ([str(folder), "--resolution", "100"], "--resolution is 100; expected a multiple of 16"),
        ([str(folder), "--black", "2"], "--black is 2; expected a number, 0 to 1"),
    ):
        assert main(["curate", *words]) == 2, words
        assert expected in capsys.readouterr().err.replace(os.sep, "/")
    assert not (folder / "curate.parquet").exists()
    assert (tmp_path / "text.parquet").read_text() == "text"


def test_help_names_the_defaults():
    for name, how in _LIMITS.items():
        value = getattr(Limits(), name)
        value = value[0] if isinstance(value, tuple) else value
        assert how["help"].endswith(f"default: {value:g}"), name
