"""The tokenizer of our CLIP."""

import functools
from pathlib import Path

import comfy.text_encoders
import comfy.text_encoders.krea2 as core

from ...krea2_model.text.prompt_images import IMAGE_BLOCK, IMAGE_PAD, IMAGE_PAD_TEXT, image_text
from ...krea2_model.text.prompt_tokens import PromptTokens
from ...krea2_model.text.tokenizer import Krea2Tokenizer
from .image_tokens import is_image, split_images, with_images

# The key under which core's Krea 2 encoder keeps its tokens, weights and LoRA aliases.
NAME = "qwen3vl_4b"

# Qwen3-VL's chat template for questions about an image, which Generate Text uses.
_IMAGE_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


class Krea2ClipTokenizer(core.Krea2Tokenizer):
    """ComfyUI's tokenizer interface: texts to rows of (token id, weight).

    A subclass of core's for packs that patch it: their functions may use its templates, and its own
    tokenizer, which is constructed on first use.
    """

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        # Skips core's constructors, which would construct that tokenizer now.
        folder = Path(comfy.text_encoders.__path__[0]) / "qwen25_tokenizer"
        self.tokenizer = Krea2Tokenizer(folder)
        self.clip_name = self.clip = NAME
        self.llama_template = core.KREA2_TEMPLATE
        self.llama_template_images = _IMAGE_CHAT.format(IMAGE_BLOCK + "{}")
        self._directory = embedding_directory

    @functools.cached_property
    def qwen3vl_4b(self):
        return core.Krea2Tokenizer(embedding_directory=self._directory).qwen3vl_4b

    def tokenize_with_weights(
        self,
        text,
        return_word_ids=False,
        max_sequence_length=None,
        always_wrap=False,
        as_trained=False,
        image=None,
        images=None,
        llama_template=None,
        skip_template=False,
        thinking=True,
        labels=False,
        roles=(),
        **kwargs,
    ):
        """One text, or a list of texts for the images of a batch.

        images: batches (B, H, W, C), each image of which is one of the prompt's, or lists of them
        that share one place; a text that holds as many `<|image_pad|>` has them there, any other in
        front, with `labels` and `roles`.
        as_trained: encode them as in training, and not as core does (`image_tokens`).
        `image` is what Generate Text passes: its chat then is Qwen's own, as in core.

        A text that begins with `<|im_start|>` is a chat of its own and is passed as it is, as core
        does, unless `always_wrap` is set, as our own nodes do; `llama_template` replaces Krea's
        template, and `skip_template` does without. `max_sequence_length` 512 is the official cut.
        Without `thinking` an empty thought follows the template, so that a text written on has
        none.
        """
        image_count = len(split_images(images))
        if not image_count and image is not None:
            images, llama_template = image, llama_template or _IMAGE_CHAT
            image_count = len(split_images(images))
        rows, no_thought = [], "" if thinking else "<think>\n\n</think>\n\n"
        for prompt in [text] if isinstance(text, str) else text:
            prefix = ""
            if image_count and IMAGE_PAD_TEXT not in prompt and not skip_template:
                prefix = image_text([*roles, *[""] * (image_count - len(roles))], labels)
            if llama_template is not None:
                chat = llama_template.format(prefix + prompt)
                tokens = self.tokenizer.tokenize_raw(chat + no_thought)
            elif skip_template or (prompt.startswith("<|im_start|>") and not always_wrap):
                tokens = self.tokenizer.tokenize_raw(prompt)
            else:
                tokens = self.tokenizer.tokenize(prompt, max_sequence_length, prefix)
                if no_thought:
                    tokens += self.tokenizer.tokenize_raw(no_thought)
            row: list[tuple] = [(token, 1.0) for token in with_images(tokens, images, as_trained)]
            if return_word_ids:
                row = [(*pair, index) for index, pair in enumerate(row, start=1)]
            rows.append(row)
        return {NAME: rows}

    def rows(self, prompts: list[PromptTokens]) -> dict:
        """Prompts that are laid out already, as `tokenize_with_weights` returns them."""
        rows = []
        for prompt in prompts:
            images = [image.pixels.movedim(0, -1)[None] for image in prompt.images]
            tokens = with_images(prompt.ids, images, as_trained=True)
            rows.append([(token, 1.0) for token in tokens])
        return {NAME: rows}

    def untokenize(self, token_weight_pair):
        return [
            (pair, self.decode([IMAGE_PAD if is_image(pair[0]) else pair[0]]))
            for pair in token_weight_pair
        ]

    def decode(self, token_ids, skip_special_tokens=True):
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def state_dict(self):
        return {}
