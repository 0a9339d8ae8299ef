"""Writing text with a CLIP, for nodes."""

from collections import OrderedDict

import torch
from comfy.utils import ProgressBar

from ..krea2_model.text.expander import strip_thinking
from ..krea2_model.text.generation import STOP_TOKENS, Sampling
from ..krea2_model.text.prompt_images import PromptImage
from ..krea2_model.text.prompt_tokens import PromptTokens
from ..krea2_model.text.writer import Write, check_can_write
from .managed.encode import own_tokenizer
from .managed.image_tokens import cache_key
from .managed.tokenizer import NAME

# Texts remembered for each text encoder, so that earlier settings cost nothing.
MAX_TEXTS = 64


class NodeWriter:
    """Generates text with a CLIP: ours token by token, shown on the node; core's in one call.

    It is a `Write` for text alone; `about` gives one for a picture.
    """

    def __init__(self, clip, node_id):
        self._clip = clip
        self._node_id = node_id
        self._model = clip.cond_stage_model
        if hasattr(clip, "write"):
            check_can_write(self._model.tail.path)

    def __call__(
        self, chat: str, sampling: Sampling, max_tokens: int, seed: int
    ) -> tuple[str, bool]:
        tokens = self._clip.tokenize(chat)
        if NAME not in tokens:
            raise ValueError(
                f"clip makes tokens for {', '.join(tokens)}; expected Krea 2's text encoder. "
                "Connect Load Krea 2 Text Encoder, or CLIPLoader with type krea2."
            )
        if not hasattr(self._clip, "write"):
            return self._by_core(tokens, sampling, max_tokens, seed)
        return self._remembered(tokens, sampling, max_tokens, seed)

    def about(self, pixels: torch.Tensor) -> Write:
        """A function that writes about a picture, (3, H, W) at a size that the tower takes.

        Its chats have a place for the picture. Raises ValueError for a CLIP that is not ours.
        """
        tokenizer = own_tokenizer(self._clip)

        def write(chat: str, sampling: Sampling, max_tokens: int, seed: int) -> tuple[str, bool]:
            ids = tokenizer.tokenizer.tokenize_raw(chat)
            tokens = tokenizer.rows([PromptTokens(ids, (PromptImage(pixels),))])
            return self._remembered(tokens, sampling, max_tokens, seed)

        return write

    def _remembered(self, tokens, sampling, max_tokens, seed):
        patcher = self._clip.patcher
        if patcher.forced_hooks is not None:  # hooks may change with time
            return self._write(tokens, sampling, max_tokens, seed)
        texts: OrderedDict = self._model.texts
        row = cache_key(tokens[NAME][0])
        key = patcher.patches_uuid, row, sampling, max_tokens, seed if sampling.temperature else 0
        if key not in texts:
            texts[key] = self._write(tokens, sampling, max_tokens, seed)
        texts.move_to_end(key)
        while len(texts) > MAX_TEXTS:
            texts.popitem(last=False)
        return texts[key]

    def _write(self, tokens, sampling, max_tokens, seed):
        progress, written = ProgressBar(max_tokens), []
        for token in self._clip.write(tokens, sampling, max_tokens, seed):
            written.append(token)
            progress.update(1)
            self._show(strip_thinking(self._clip.decode(written)))
        if written and written[-1] in STOP_TOKENS:
            progress.update_absolute(max_tokens)
        return self._clip.decode(written), written[-1] in STOP_TOKENS

    def _by_core(self, tokens, sampling, max_tokens, seed):
        written = self._clip.generate(
            tokens,
            do_sample=sampling.temperature > 0,
            max_length=max_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=seed,
        )
        return self._clip.decode(written), written[-1] in STOP_TOKENS

    def _show(self, text: str) -> None:
        """Show the text so far on the node; without a server there is no page."""
        # Imported here: tests and benchmarks run nodes without the server, which is slow to load.
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None and self._node_id is not None:
            server.send_progress_text(text, self._node_id)
