"""The page of `krea2 pick`: pictures are picked by clicks, and saved as pairs."""

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from krea2_model.cli.settings import as_json
from krea2_training.data.pairs import Pairs, read_pairs
from krea2_training.pick import write_page


@pytest.fixture
def folder(tmp_path):
    for name in "abcde":
        info = PngInfo()
        info.add_text("krea2", as_json({"prompt": "a fox" if name in "abc" else "two owls"}))
        Image.new("RGB", (64, 64), "teal").save(tmp_path / f"{name} 1.png", pnginfo=info)
    return tmp_path


def test_clicks_make_pairs(chromium, folder, errors):
    context = chromium.new_context()
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(write_page(folder).as_uri())
    save = page.locator("#save")
    assert save.is_disabled()
    assert all(page.locator("img").evaluate_all("all => all.map((one) => one.naturalWidth === 64)"))

    def click(name, times):
        for _ in range(times):
            page.locator(f'img[alt="{name} 1.png"]').click()

    click("a", 1)
    click("b", 2)
    click("c", 2)
    click("d", 3)
    click("e", 1)
    assert page.locator("#count").inner_text() == "2 pairs."
    page.reload()
    assert page.locator(".better").count() == 2 and page.locator(".worse").count() == 2
    with page.expect_download() as download:
        save.click()
    download.value.save_as(folder / "picks.jsonl")
    found = read_pairs(Pairs(folder / "picks.jsonl", 64))
    names = [(one.chosen.example.image.name, one.rejected.example.image.name) for one in found]
    assert names == [("a 1.png", "b 1.png"), ("a 1.png", "c 1.png")]
    assert {one.prompt for one in found} == {"a fox"}
    context.close()
