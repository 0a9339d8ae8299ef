"""The contact sheet: every picture is there, whole, in order, with its words below it."""

import numpy as np
import pytest

from krea2_model.images.contact_sheet import MAX_CAPTION, contact_sheet
from work import count_events

COLOURS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1]], dtype=np.float32)


def flat(colour, height=64, width=64):
    return np.broadcast_to(np.array(colour, np.float32), (height, width, 3))


def places(sheet):
    """Top, left and area of each colour."""
    found = []
    for colour in COLOURS:
        rows, columns = np.nonzero((np.abs(sheet - colour) < 0.01).all(-1))
        found.append((rows.min(), columns.min(), len(rows)) if len(rows) else None)
    return found


def test_pictures_lie_in_rows_and_keep_their_pixels():
    sheet = contact_sheet([flat(colour) for colour in COLOURS], columns=2)
    found = places(sheet)
    assert all(area == 64 * 64 for _, _, area in found)
    tops, lefts = [top for top, _, _ in found], [left for _, left, _ in found]
    assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4]
    assert lefts[0] == lefts[2] == lefts[4] < lefts[1] == lefts[3]


def test_zero_columns_make_it_about_square():
    for count, columns in ((1, 1), (4, 2), (5, 3), (9, 3)):
        sheet = contact_sheet([flat(COLOURS[0])] * count)
        assert round(sheet.shape[1] / 72) == columns


def test_captions_stand_below_and_take_room():
    pictures = [flat(colour) for colour in COLOURS[:2]]
    plain = contact_sheet(pictures)
    sheet = contact_sheet(pictures, ["red", "a caption that is much too long for one line"])
    assert sheet.shape[0] > plain.shape[0] + 2 * 16 and sheet.shape[1] == plain.shape[1]
    assert places(sheet) == places(plain)
    dark = (sheet < 0.4).all(-1)
    below = dark[places(sheet)[0][0] + 64 :]
    assert below.sum() > 50 and not dark[: places(sheet)[0][0] + 64].any()
    # Words stay in the column of their picture.
    assert below[:, :68].any() and below[:, 72:].any()


def test_words_longer_than_a_line_are_broken():
    sheet = contact_sheet([flat(COLOURS[0], 32, 32)], ["W" * 60])
    dark = np.nonzero((sheet < 0.4).all(-1))
    assert dark[1].max() < sheet.shape[1] - 2


def ink(sheet):
    """Rows and columns of what is written."""
    return np.nonzero((sheet < 0.4).all(-1))


@pytest.mark.parametrize("text_size, side", [(32, 16), (256, 16), (16, 1)])
@pytest.mark.parametrize("caption", ["W", "WWW", "\u72d0\u72f8", "W W"])
def test_cells_are_as_wide_as_a_character(caption, text_size, side):
    sheet = contact_sheet([flat(COLOURS[0], side, side)], [caption], cell=16, text_size=text_size)
    words = caption.split()
    lines = (sheet.shape[0] - 4 - side - 4) / (text_size * 1.25)
    assert lines == pytest.approx(sum(map(len, words)), abs=0.2)  # a character a line
    rows, columns = ink(sheet)
    assert len(rows) and columns.max() < sheet.shape[1] - 2


@pytest.mark.parametrize("caption", [
    "\u72d0" * 500, "\u72d0" * MAX_CAPTION, "W" * 50_000, "a " * 50_000, "\u0301" * 50_000,
    "\U0001f98a" * 900,
])  # fmt: skip
def test_long_captions_are_cut_before_they_are_laid_out(caption):
    short = count_events(lambda: contact_sheet([flat(COLOURS[0])], [caption[: MAX_CAPTION + 1]]))
    assert count_events(lambda: contact_sheet([flat(COLOURS[0])], [caption])) < 1.1 * short + 100
    sheet = contact_sheet([flat(COLOURS[0])], [caption])
    assert 400 < sheet.shape[0] < 30 * MAX_CAPTION
    assert ink(sheet)[1].max() < sheet.shape[1] - 2


def test_no_character_of_a_caption_is_lost_up_to_the_limit(monkeypatch):
    lines = []
    monkeypatch.setattr(
        "krea2_model.images.contact_sheet.ImageDraw.ImageDraw.text",
        lambda self, place, text, *rest: lines.append(text),
    )
    words = ["\u72d0" * 500, "fox", "W" * 99, "x"]
    contact_sheet([flat(COLOURS[0])], [" ".join(words)])
    assert "".join(lines).replace(" ", "") == "".join(words) and max(map(len, lines)) < 20
    lines.clear()
    contact_sheet([flat(COLOURS[0])], ["W" * (MAX_CAPTION + 1)])
    assert "".join(lines) == "W" * (MAX_CAPTION - 3) + "..."


def test_large_pictures_shrink_and_small_ones_do_not_grow():
    found = places(contact_sheet([flat(COLOURS[0], 300, 600), flat(COLOURS[1], 8, 8)], cell=100))
    assert found[0][2] == 100 * 50 and found[1][2] == 64


@pytest.mark.parametrize("images, options, message", [
    ([], {}, "no picture"),
    ([flat(COLOURS[0])], {"captions": ["a", "b"]}, "2 captions for 1 picture;"),
    ([flat(COLOURS[0])], {"cell": 2}, "cell 2"),
    ([flat(COLOURS[0])], {"columns": -1}, "columns is -1"),
])  # fmt: skip
def test_bad_input_is_named(images, options, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(images, **options)
