"""The page's words in each language: those of the schemas, whole, and fit for the page."""

import re

import pytest

import update_locales
from in_process import NODES

LANGUAGES = ("es", "ja", "zh")
REMEDY = "run scripts/update_locales.py, translate what it names, and run it again"


def test_the_languages():
    assert tuple(update_locales.languages()) == LANGUAGES
    folders = sorted(path.name for path in update_locales.LOCALES.iterdir())
    assert folders == sorted((*LANGUAGES, "en"))


@pytest.mark.parametrize("language", ("en", *LANGUAGES))
def test_files_are_those_of_the_schemas(language):
    file = update_locales.LOCALES / language / "nodeDefs.json"
    wanted = update_locales.file_text(update_locales.definitions_of(language, NODES))
    assert file.read_text(encoding="utf-8") == wanted, REMEDY


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_whole_and_none_is_stale(language):
    known = update_locales.translations(language)
    assert list(known) == update_locales.texts(NODES), REMEDY
    assert [text for text, translation in known.items() if not translation] == [], REMEDY


@pytest.mark.parametrize("language", LANGUAGES)
def test_values_stay_as_they_are(language):
    """Numbers, paths and words in quotes are the same in every language."""
    for text, translation in update_locales.translations(language).items():
        for value in re.findall(r'\d+(?:\.\d+)?|models/\w+|"\w+"|torch\.compile', text):
            assert value in translation, f"{text!r}: {value} is not in {translation!r}"


@pytest.mark.parametrize("language", ("en", *LANGUAGES))
def test_no_text_has_signs_that_the_page_would_interpret(language):
    """To vue-i18n `|` separates plurals, `@` links and braces are values to fill in."""
    text = (update_locales.LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")
    words = re.findall(r'": "(.*)"', text)
    assert len(words) > 100
    assert [word for word in words if re.search(r"[{}|@]", word)] == []


def test_a_changed_text_is_a_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr(update_locales, "LOCALES", tmp_path / "locales")
    monkeypatch.setattr(update_locales, "TRANSLATIONS", tmp_path)
    known = dict.fromkeys(update_locales.texts(NODES), "x")
    known["Load Crea 2"] = known.pop("Load Krea 2")
    (tmp_path / "zh.json").write_text(update_locales.file_text(known), encoding="utf-8")
    said = list(update_locales.update(NODES))
    assert said == ["zh: translate 'Load Krea 2'", "zh: taken out 'Load Crea 2': 'x'"]
    assert update_locales.translations("zh")["Load Krea 2"] == ""
    loader = update_locales.definitions_of("zh", NODES)["K2Loader"]
    assert "display_name" not in loader and loader["description"] == "x"
    assert list(update_locales.update(NODES)) == ["zh: translate 'Load Krea 2'"]
