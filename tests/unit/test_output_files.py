"""Image files: names are refused before the work, and an old file stays until the new is whole."""

import errno
import os
import stat
from pathlib import Path

import pytest
from PIL import Image

from krea2_model import replacing
from krea2_model.cli.main import main
from krea2_model.images import output_files
from krea2_model.images.output_files import check_outputs, image_format, numbered, save_image


def red(size=8):
    return Image.new("RGB", (size, size), "red")


@pytest.mark.parametrize("ending, kind", [("png", "PNG"), ("JPG", "JPEG"), ("webp", "WEBP")])
def test_the_ending_is_the_format(tmp_path, ending, kind):
    path = tmp_path / f"fox.{ending}"
    save_image(red(), path)
    assert image_format(path) == Image.open(path).format == kind
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["save", "fsync", "replace"])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch, failure, step, is_new):
    path = tmp_path / "fox.png"
    if not is_new:
        Image.effect_noise((64, 64), 90).save(path)
    old = None if is_new else path.read_bytes()

    def fail(image, file, *_):
        if step == "save":
            file.write(b"half a picture")
            file.flush()
        raise failure

    if step == "save":
        monkeypatch.setattr(Image.Image, "save", fail)
        monkeypatch.setattr(output_files, "image_format", lambda path: "PNG")
    else:
        owner = replacing.Path if step == "replace" else replacing.os
        monkeypatch.setattr(owner, step, lambda *_: fail(None, None))
    with pytest.raises(type(failure)) as raised:
        save_image(red(), path)
    assert Path(getattr(raised.value, "filename", path)).name == path.name
    assert list(tmp_path.iterdir()) == ([] if is_new else [path])
    assert is_new or path.read_bytes() == old
    monkeypatch.undo()
    save_image(red(), path)
    assert Image.open(path).size == (8, 8)


def test_a_new_file_has_the_rights_and_the_link_of_the_old_one(tmp_path):
    (tmp_path / "there").mkdir()
    target, link, new = tmp_path / "there" / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    red().save(target)
    target.chmod(0o640)
    link.symlink_to(target)
    save_image(red(16), link)
    assert link.is_symlink() and Image.open(target).size == (16, 16)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    save_image(red(), new)
    (tmp_path / "plain").touch()
    assert new.stat().st_mode == (tmp_path / "plain").stat().st_mode


def unwritable(tmp_path):
    """Below a file, where nobody can make a folder, root included."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "deeper" / "fox.png"


BAD = [
    (lambda path: path / "fox.xyz", "the ending .xyz"),
    (lambda path: path / "fox", "no ending"),
    (lambda path: path / ".png", "no ending"),
    (lambda path: path / "fox.xbm", "the ending .xbm"),
    (lambda path: path / "fox.h5", "the ending .h5"),
    (lambda path: path / "folder.png", "is a folder"),
    (lambda path: path / "pipe.png", "cannot be written over"),
    (lambda path: path / ("f" * 300 + ".png"), "has 304 bytes; expected at most 255"),
    (unwritable, "Nothing can be written to .*file .Not a directory"),
]


@pytest.fixture
def places(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder-3.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path


@pytest.mark.parametrize("make, message", BAD)
def test_what_cannot_be_written_to_is_refused_before_weights_are_read(
    places, capsys, monkeypatch, make, message
):
    path = make(places)
    before = sorted(places.rglob("*"))
    with pytest.raises(ValueError, match=message):
        check_outputs([path])
    monkeypatch.setattr("krea2_model.pipeline.pipeline.Krea2Pipeline.from_files", None)
    assert main(["a fox", "--model", "nano", "--output", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("krea2: error: ") and error.count("\n") == 1
    assert sorted(places.rglob("*")) == before


def test_places_that_take_no_files_are_refused(tmp_path, monkeypatch):
    """A full or read-only disk, as the system says it."""

    def full(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(output_files.tempfile, "TemporaryFile", full)
    with pytest.raises(ValueError, match=r"written to .* \(Read-only file system\)"):
        check_outputs([tmp_path / "new" / "fox.png"])


def test_names_of_several_images_are_checked(places, capsys, monkeypatch):
    check_outputs(numbered(places / "new" / "deep" / "folder.png", 3))
    assert [p.name for p in numbered(places / "a.b.png", 3)] == [
        "a.b.png",
        "a.b-2.png",
        "a.b-3.png",
    ]
    monkeypatch.setattr("krea2_model.pipeline.pipeline.Krea2Pipeline.from_files", None)
    fox = places / "fox.png"
    (places / "fox-3.png").mkdir()
    assert [p.name for p in numbered(fox, 3, overwrite=False)] == [
        "fox.png",
        "fox-2.png",
        "fox-4.png",
    ]
    assert main(["a fox", "--model", "nano", "--output", str(fox), "--images", "3", "--force"]) == 2
    assert "fox-3.png is a folder" in capsys.readouterr().err
    assert main(["a fox", "--model", "nano", "--output", str(fox), "--images", "0"]) == 2
    assert "--images is 0; expected" in capsys.readouterr().err


def test_a_cancel_is_one_line(monkeypatch, capsys, tmp_path):
    def cancel(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("krea2_model.pipeline.pipeline.Krea2Pipeline.from_files", cancel)
    options = ["--output", str(tmp_path / "fox.png"), "--quiet"]
    assert main(["a fox", "--model", "nano", *options]) == 130
    assert capsys.readouterr().err == "krea2: stopped\n"
