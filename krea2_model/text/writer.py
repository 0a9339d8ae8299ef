"""Text by a loaded text encoder, from a chat that may show images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .. import nano
from .encoder import Qwen3VLTextEncoder
from .generation import STOP_TOKENS, Sampling, generate
from .language_model import LanguageModel
from .prompt_images import expand_image_tokens
from .tokenizer import Krea2Tokenizer
from .vision import ImageTokens

# A chat, a sampling, the most tokens, a seed: the text, and whether it came to its end.
Write = Callable[[str, Sampling, int, int], tuple[str, bool]]

# Called with the text so far.
OnText = Callable[[str], None]


class TextWriter:
    """Writes text with an encoder, whose tail for writing is read from its file.

    Raises ValueError for encoders that cannot write: krea2-nano's, and one without a file or a
    tokenizer.
    """

    def __init__(self, text_encoder: Qwen3VLTextEncoder):
        check_can_write(text_encoder.path)
        assert text_encoder.load_tail is not None, "check_can_write refuses these"
        if text_encoder.tokenizer is None:
            raise ValueError(
                "The text encoder has no tokenizer. Name a folder with `tokenizer=` (--tokenizer "
                "on the command line), or set COMFYUI_PATH to a ComfyUI folder."
            )
        self._tokenizer: Krea2Tokenizer = text_encoder.tokenizer
        self._encoder = text_encoder
        embedding = text_encoder.embed_tokens.weight
        # Public, since a host that moves the encoder moves its tail too.
        self.tail = text_encoder.load_tail(device=embedding.device, dtype=embedding.dtype)

    def writing(self, images: Sequence[ImageTokens] = (), on_text: OnText | None = None) -> Write:
        """A function that writes, with images in the places of `<|image_pad|>` in its chats.

        on_text: called after each token with the text so far; what it raises cancels.
        """
        model = LanguageModel(self._encoder, self.tail, images=images)
        grids = [image.grid for image in images]

        def write(chat: str, sampling: Sampling, max_tokens: int, seed: int) -> tuple[str, bool]:
            tokens = self._tokenizer.tokenize_raw(chat)
            if images:
                tokens = expand_image_tokens(tokens, grids)
            written: list[int] = []
            for token in generate(model, tokens, sampling, max_tokens=max_tokens, seed=seed):
                written.append(token)
                if on_text is not None:
                    on_text(self._tokenizer.decode(written))
            return self._tokenizer.decode(written), written[-1] in STOP_TOKENS

        return write


def check_can_write(path: Path | None) -> None:
    """Raise ValueError for an encoder that cannot write, such as krea2-nano's untrained one."""
    if path is not None and path.name == nano.TEXT_ENCODER_NAME:
        raise ValueError(
            "krea2-nano's text encoder is random and cannot write. Load a real one, for example "
            "qwen3vl_4b_bf16.safetensors in models/text_encoders; what it writes is plain text "
            "that any model takes."
        )
    if path is None:
        raise ValueError(
            "This text encoder was not loaded from a file, and writing takes a layer that it does "
            "not hold. Load it with load_text_encoder."
        )
