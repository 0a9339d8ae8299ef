"""Writes locales/LANGUAGE/nodeDefs.json, from which ComfyUI's page takes the words of our nodes.

    COMFYUI_PATH=... python scripts/update_locales.py

English is that of the schemas. Other languages come from scripts/translations/LANGUAGE.json, which
holds each English text with its translation: a text that changed is a new one, so no translation
outlives what it translates. This adds what is new there, left empty for a translator (the page
shows English until then), takes out what no schema says any more, and prints both.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCALES = ROOT / "locales"
TRANSLATIONS = ROOT / "scripts" / "translations"
ENGLISH = "en"


def languages() -> list[str]:
    """The languages beside English."""
    return sorted(path.stem for path in TRANSLATIONS.glob("*.json"))


def translations(language: str) -> dict[str, str]:
    """Every English text with its translation, which is empty where there is none yet."""
    return json.loads((TRANSLATIONS / f"{language}.json").read_text(encoding="utf-8"))


def node_definitions(nodes: Mapping, say: Callable[[str], str | None] = str) -> dict:
    """The words of the nodes in the layout of nodeDefs.json; `say` translates, None leaves out."""
    return {
        node_id: _without_empty(
            {
                "display_name": say(schema.display_name),
                "description": say(schema.description),
                "inputs": {
                    entry.id: _words(entry.display_name or entry.id, entry.tooltip, say)
                    for entry in schema.inputs
                },
                "outputs": {
                    # A socket without a name of its own shows its type, which the page translates.
                    str(index): _words(entry.display_name, entry.tooltip, say)
                    for index, entry in enumerate(schema.outputs)
                },
            }
        )
        for node_id, schema in ((name, node.GET_SCHEMA()) for name, node in nodes.items())
    }


def texts(nodes: Mapping) -> list[str]:
    """Every English text of the nodes once, in reading order."""
    return list(dict.fromkeys(_texts_in(node_definitions(nodes))))


def file_text(definitions: dict) -> str:
    return json.dumps(definitions, ensure_ascii=False, indent=2) + "\n"


def definitions_of(language: str, nodes: Mapping) -> dict:
    """What nodeDefs.json of a language holds."""
    if language == ENGLISH:
        return node_definitions(nodes)
    known = translations(language)
    return node_definitions(nodes, lambda text: known.get(text) or None)


def update(nodes: Mapping) -> Iterable[str]:
    """Write all files; yields a line for each translation that is wanted or was taken out."""
    wanted = texts(nodes)
    for language in languages():
        known = translations(language)
        for text in wanted:
            if not known.get(text):
                yield f"{language}: translate {text!r}"
        for text in known.keys() - set(wanted):
            yield f"{language}: taken out {text!r}: {known[text]!r}"
        words = {text: known.get(text, "") for text in wanted}
        (TRANSLATIONS / f"{language}.json").write_text(file_text(words), encoding="utf-8")
    for language in (ENGLISH, *languages()):
        file = LOCALES / language / "nodeDefs.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file_text(definitions_of(language, nodes)), encoding="utf-8")


def _words(name: str | None, tooltip: str | None, say) -> dict:
    return {"name": say(name) if name else None, "tooltip": say(tooltip) if tooltip else None}


def _without_empty(value):
    if not isinstance(value, dict):
        return value
    kept = {key: _without_empty(item) for key, item in value.items()}
    return {key: item for key, item in kept.items() if item}


def _texts_in(value) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    else:
        for item in value.values():
            yield from _texts_in(item)


def main() -> None:
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui:
        sys.exit("error: COMFYUI_PATH is not set; it names a ComfyUI folder.")
    sys.path.insert(0, comfyui)
    import in_process

    with tempfile.TemporaryDirectory() as base:
        in_process.start(Path(base))
        for line in update(in_process.NODES):
            print(line)


if __name__ == "__main__":
    main()
