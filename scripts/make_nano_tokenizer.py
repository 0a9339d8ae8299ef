"""Cut Qwen's tokenizer down to the words that krea2-nano knows, for use without a ComfyUI.

    COMFYUI_PATH=... python scripts/make_nano_tokenizer.py

Writes krea2_model/nano/tokenizer. The prompts that krea2-nano is trained and examined on have the
same token ids as with the whole tokenizer; other words fall into shorter pieces.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from krea2_model.nano import TOKENIZER  # noqa: E402
from krea2_model.text.tokenizer import (  # noqa: E402
    TEMPLATE_PREFIX,
    TEMPLATE_SUFFIX,
    find_tokenizer_folder,
)
from nano_training.landscapes import scene as landscapes  # noqa: E402
from nano_training.landscapes.words import caption as landscape_caption  # noqa: E402
from nano_training.landscapes.words import landscape_prompts  # noqa: E402
from nano_training.scenes import caption, random_scene  # noqa: E402

CAPTIONS = 20_000
OTHERS = (
    "no without nothing empty picture image painting drawing photo of with two three four five six "
    "seven eight nine ten shapes circles squares triangles stars rings colours colors dark light "
    "bright pale notebook paper outlines reference Picture 0 1 2 3 4 5 6 7 8 9 . , : ; ( ) { } | "
    "! ?"
)


def texts() -> list[str]:
    """What the tokenizer has to know whole."""
    random = Random("tokenizer")
    captions = [caption(random_scene(random), random) for _ in range(CAPTIONS)]
    captions += [
        landscape_caption(landscapes.random_landscape(random), random) for _ in range(CAPTIONS)
    ]
    captions += [prompt for prompt, _ in landscape_prompts()]
    words = {word for text in captions for word in text.split()} | set(OTHERS.split())
    words |= {word.capitalize() for word in words}
    around = [f"{before}{word}" for word in words for before in (" ", "(", " (", "{", " {", "|")]
    return [TEMPLATE_PREFIX, TEMPLATE_SUFFIX, *captions, *words, *around]


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(find_tokenizer_folder()), local_files_only=True)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
    pieces = set()
    for text in set(texts()):
        pieces |= {
            piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        }
    used: set[tuple[str, str]] = set()
    for piece in pieces:
        used |= merges_of(piece, ranks)
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    symbols = {symbol for symbol in model["vocab"] if len(symbol) == 1}
    kept = symbols | {first + second for first, second in used}
    model["vocab"] = {t: n for t, n in model["vocab"].items() if t in kept} | special
    model["merges"] = [list(merge) for merge in sorted(used, key=ranks.__getitem__)]
    TOKENIZER.mkdir(exist_ok=True)
    write(TOKENIZER / "tokenizer.json", content)
    write(TOKENIZER / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def merges_of(piece: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges by which byte-pair encoding builds a piece of text."""
    parts, used = list(piece), set()
    while True:
        pairs = [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]
        if not pairs:
            return used
        best = min(pairs, key=ranks.__getitem__)
        used.add(best)
        merged, index = [], 0
        while index < len(parts):
            if tuple(parts[index : index + 2]) == best:
                merged.append(parts[index] + parts[index + 1])
                index += 2
            else:
                merged.append(parts[index])
                index += 1
        parts = merged


def write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, ensure_ascii=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
