"""Prompt to token ids: the chat template Krea 2 was trained with, and where the tokenizer is found.

Every prompt stands inside a fixed chat. The 34 tokens before it only steer the text encoder and are
cut from its output; the 5 tokens after it are kept. The official code pads between prompt and
suffix. Positions count real tokens only and padding is masked, so leaving it out gives the same
features at a fraction of the cost, and that is what happens here.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

# The template of krea-ai/krea-2, the same as Qwen-Image's.
TEMPLATE_PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
TEMPLATE_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
PREFIX_TOKENS = 34
SUFFIX_TOKENS = 5

# Kept tokens of the official layout: up to 507 of the prompt, then the suffix.
OFFICIAL_LENGTH = 512
PROMPT_BUDGET = OFFICIAL_LENGTH - SUFFIX_TOKENS
# Tokens of a text that is read at all. Attention grows with their square: a file that was pasted by
# accident would take hours.
MAX_TOKENS = 10_000

# The padding token of the official layout. Nothing is padded here; hosts that batch tokens need it.
PAD_TOKEN = 151643

COMFYUI_TOKENIZER = Path("comfy", "text_encoders", "qwen25_tokenizer")


class TokenizerNotFoundError(FileNotFoundError, ValueError):
    """There is no tokenizer in the places looked at; the message says how to name one."""


def find_tokenizer_folder(explicit: str | Path | None = None) -> Path:
    """The folder with the Qwen tokenizer: `explicit`, or else the one that every ComfyUI carries.

    ComfyUI is found through COMFYUI_PATH, around this package (which lies in
    ComfyUI/custom_nodes/<pack>, perhaps behind a symbolic link) or on the import path. Only paths
    are looked at; nothing of ComfyUI is imported.

    Raises TokenizerNotFoundError, a FileNotFoundError and a ValueError, if there is none.
    """
    if explicit is not None:
        folder = Path(explicit)
        if not _has_tokenizer(folder):
            raise TokenizerNotFoundError(
                f"{folder} is no tokenizer folder; expected one with tokenizer_config.json and "
                "either tokenizer.json or vocab.json and merges.txt, such as tokenizer/ of a "
                "diffusers folder."
            )
        return folder
    for root in _comfyui_roots():
        if _has_tokenizer(root / COMFYUI_TOKENIZER):
            return root / COMFYUI_TOKENIZER
    comfyui = os.environ.get("COMFYUI_PATH")
    raise TokenizerNotFoundError(
        "No Qwen tokenizer was found. Either load a model folder that has its own tokenizer/, or "
        "name a tokenizer folder with `tokenizer=` (--tokenizer on the command line), or set "
        f"COMFYUI_PATH to a ComfyUI folder, where {COMFYUI_TOKENIZER.as_posix()} is used "
        + (f"(it is {comfyui!r}, which has none)." if comfyui else "(it is not set).")
    )


def _has_tokenizer(folder: Path) -> bool:
    vocabulary = (folder / "tokenizer.json", folder / "vocab.json")
    return (folder / "tokenizer_config.json").is_file() and any(f.is_file() for f in vocabulary)


def _comfyui_roots() -> list[Path]:
    """Folders that may be ComfyUI's, the likeliest first."""
    here = Path(__file__).absolute()  # not resolve, which would follow the pack's symbolic link
    named = os.environ.get("COMFYUI_PATH")
    return [
        *([Path(named)] if named else []),
        *here.parents,
        *here.resolve().parents,
        *(Path(entry) for entry in sys.path if entry),
    ]


class Krea2Tokenizer:
    """The Qwen tokenizer of a local folder, with Krea 2's template around each prompt.

    The tokenizers of one folder share what was read of it, until a file there changes.

    folder: as `find_tokenizer_folder` takes it; None looks for ComfyUI's.

    Raises TokenizerNotFoundError if there is no tokenizer, and ValueError if it is another model's.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = find_tokenizer_folder(folder)
        self._tokenizer = _read_tokenizer(self.folder.resolve(), _state_of_files(self.folder))
        self._suffix = self.tokenize_raw(TEMPLATE_SUFFIX)
        counts = (len(self.tokenize_raw(TEMPLATE_PREFIX)), len(self._suffix))
        if counts != (PREFIX_TOKENS, SUFFIX_TOKENS):
            raise ValueError(
                f"The tokenizer in {self.folder} makes {counts[0]} and {counts[1]} tokens of the "
                f"two parts of the chat template; expected {PREFIX_TOKENS} and {SUFFIX_TOKENS}. It "
                "belongs to another model: name the folder of a Qwen tokenizer."
            )

    def tokenize(
        self, prompt: str, max_sequence_length: int | None = None, before: str = ""
    ) -> list[int]:
        """Token ids of prefix, prompt and suffix, without padding.

        The first `PREFIX_TOKENS` belong to the template and are to be cut from what the encoder
        makes of them. They are to be counted, not searched: a prompt that begins with a line break
        merges with the one that ends the prefix.

        max_sequence_length: kept tokens, suffix included, above which the prompt is cut; 512 is
            the official length. None never cuts.
        before: stands in front of the prompt and is neither cut nor counted, such as images
            (`prompt_images.image_text`). Nothing or what ends in a special token.

        Raises ValueError for a prompt that is no text or keeps more than `MAX_TOKENS`, and for a
        length without room for a prompt.
        """
        _check_length(max_sequence_length)
        ids = self._with_prefix(prompt, before)
        first = PREFIX_TOKENS + len(self.front(before))
        used = len(ids) - first
        limit = used if max_sequence_length is None else max_sequence_length - SUFFIX_TOKENS
        if used > limit:
            logger.warning(
                "The prompt uses %d tokens; the last %d were dropped to keep %d.",
                used,
                used - limit,
                limit,
            )
            ids = ids[: first + limit]
        check_tokens(min(used, limit))
        if PROMPT_BUDGET < used <= limit:
            logger.warning(
                "The prompt uses %d tokens; the model was trained on up to %d. Shorten it, or cut "
                "it with max_sequence_length=%d.",
                used,
                PROMPT_BUDGET,
                OFFICIAL_LENGTH,
            )
        return ids + self._suffix

    def front(self, before: str) -> list[int]:
        """The tokens of the text between the template's prefix and a prompt."""
        return self.tokenize_raw(TEMPLATE_PREFIX + before)[PREFIX_TOKENS:] if before else []

    def spans(
        self, prompt: str, max_sequence_length: int | None = None, before: str = ""
    ) -> list[tuple[int, int]]:
        """The span of characters `prompt[first:end]` of each kept token.

        One a token that `tokenize` gives behind the prefix and `before`; (0, 0) for those of the
        suffix. The tokens of a character that takes several all stand for it.
        """
        _check_length(max_sequence_length)
        encoding = self._tokenizer(
            TEMPLATE_PREFIX + before + prompt, return_offsets_mapping=True, verbose=False
        )
        fixed = len(TEMPLATE_PREFIX + before)
        spans = [
            (max(0, first - fixed), end - fixed)
            for first, end in encoding["offset_mapping"][PREFIX_TOKENS + len(self.front(before)) :]
        ]
        if max_sequence_length is not None:
            spans = spans[: max_sequence_length - SUFFIX_TOKENS]
        return spans + [(0, 0)] * SUFFIX_TOKENS

    def count(self, prompt: str) -> int:
        """Tokens of the prompt itself, to compare with `PROMPT_BUDGET`."""
        return len(self._with_prefix(prompt)) - PREFIX_TOKENS

    def tokenize_raw(self, text: str) -> list[int]:
        """Token ids of `text` as it is, for a chat that brings its own template."""
        if not isinstance(text, str):
            raise ValueError(
                f"The prompt is {text!r}, a {type(text).__name__}; expected text. Pass a str."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The prompt has half a character (\\u{ord(text[error.start]):04x}, at position "
                f"{error.start}); expected whole ones. Text cut inside an emoji looks like "
                "this: send it uncut."
            ) from error
        # Not verbose: past 131,072 tokens transformers warns of a limit that is not this model's.
        return self._tokenizer(text, verbose=False)["input_ids"]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, by default without chat and vision markers."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def _with_prefix(self, prompt: str, before: str = "") -> list[int]:
        if not isinstance(prompt, str):
            return self.tokenize_raw(prompt)
        return self.tokenize_raw(TEMPLATE_PREFIX + before + prompt)


def _state_of_files(folder: Path) -> tuple:
    """Names, sizes and times of the files of a folder, to see that one has changed."""
    states = ((file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file())
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


@functools.lru_cache(maxsize=2)
def _read_tokenizer(folder: Path, files: tuple):
    """transformers' tokenizer of a folder, whose 151,000 merges take half a second to read."""
    # Imported on use: it takes a second, which inspecting or converting a file need not wait.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )


def check_tokens(count: int) -> None:
    """Raise ValueError for more tokens of a text than are read at all."""
    if count > MAX_TOKENS:
        raise ValueError(
            f"The prompt uses {count} tokens; expected at most {MAX_TOKENS}, and the model was "
            f"trained on up to {PROMPT_BUDGET}. Shorten it, or cut it with "
            f"max_sequence_length={OFFICIAL_LENGTH} (official_length of Krea 2 Prompt)."
        )


def _check_length(value: int | None) -> None:
    """Raise ValueError unless `value` is None or leaves room for a token of the prompt."""
    if value is None:
        return
    if not isinstance(value, int) or value <= SUFFIX_TOKENS:
        raise ValueError(
            f"max_sequence_length is {value!r}; expected a whole number above {SUFFIX_TOKENS}, "
            f"since the template's last {SUFFIX_TOKENS} tokens count. Use {OFFICIAL_LENGTH} for "
            "the official length or None to keep the whole prompt."
        )
