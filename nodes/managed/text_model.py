"""The module of our CLIP: our Qwen3-VL text encoder behind the interface of core's Krea 2."""

from collections import OrderedDict

import comfy.model_management
import comfy.ops
import comfy.text_encoders.krea2 as core
import torch
from comfy.sd1_clip import ClipTokenWeightEncoder

from ...krea2_model.text.decoder import mask_size
from ...krea2_model.text.encoder import Qwen3VLTextEncoder
from ...krea2_model.text.generation import Sampling, generate
from ...krea2_model.text.tokenizer import PAD_TOKEN
from .backend import encoder_attention
from .contract import is_replaced
from .gguf import is_gguf
from .image_tokens import cache_key, image_pixel_counts, look, row_length
from .language_tail import LazyTail, language_model
from .layers import comfy_layers
from .tokenizer import NAME
from .vision import LazyVision

_IM_START, _USER = 151644, 872

# Memory of the vision tower a pixel: for a patch of 256 pixels about eight float32 states of width
# 1024 and two of 4096.
_BYTES_A_PIXEL = 256

# Memory of attention for each element of a mask: the mask, in float32 while it becomes additive;
# and for each head, in functions that materialise them, the scores and their softmax.
_BYTES_A_MASK, _BYTES_A_SCORE = 16, 8


class _Transformer(torch.nn.Module):
    """The encoder under the name that core has for it."""

    def __init__(self, encoder: Qwen3VLTextEncoder):
        super().__init__()
        self.model = encoder


class Krea2Section(torch.nn.Module, ClipTokenWeightEncoder):
    """The encoder in the place of core's, with its names and interface.

    So LoRA keys and saved files have the same names, and packs can call it as core's.
    """

    special_tokens = {"pad": PAD_TOKEN}

    def __init__(self, encoder: Qwen3VLTextEncoder):
        super().__init__()
        self.transformer = _Transformer(encoder)
        self.execution_device = None
        self.vision: LazyVision | None = None

    def set_clip_options(self, options):
        """Only the device: a layer choice ("clip skip") has no meaning for twelve taps."""
        self.execution_device = options.get("execution_device", self.execution_device)

    def reset_clip_options(self):
        self.execution_device = None

    @property
    def device(self):
        encoder = self.transformer.model
        return self.execution_device or encoder.embed_tokens.weight.device

    def look(self, row: list):
        """A row of tokens as the language tower takes it (`image_tokens.look`)."""
        patcher = self.vision.patcher if self.vision is not None else None
        return look(row, None if patcher is None else patcher.model, self.device)

    def encode_row(self, row: list) -> tuple[torch.Tensor, list[int]]:
        """Taps (L, taps, D) of a row of tokens, in float32, and the L token ids."""
        look = self.look(row)
        tokens = torch.tensor([look.ids], device=self.device)
        images = {}
        if look.images:
            images = {
                "images": look.images,
                "positions": look.positions,
                "tap_with_deepstack": look.tap_with_deepstack,
            }
        return self.transformer.model(tokens, **images)[0].float(), look.ids

    def encode(self, rows: list[list]):
        """As core's: rows of tokens to (B, taps, L, D), nothing pooled, and the mask (B, L)."""
        encoded = [self.encode_row(row)[0] for row in rows]
        taps = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)
        lengths = torch.tensor([len(states) for states in encoded])
        mask = torch.arange(taps.shape[1]) < lengths[:, None]
        return taps.transpose(1, 2), None, {"attention_mask": mask.long().to(taps.device)}


class Krea2TextModel(core.Krea2TEModel):
    """The encoder's entry points; a subclass of core's for packs that put functions on that."""

    def __init__(self, config, device="cpu", dtype=None, model_options=None):
        # Skips core's constructors, which would build core's encoder.
        torch.nn.Module.__init__(self)
        self.clip_name = self.clip = NAME
        layers = encoder_layers(model_options or {}, dtype)
        encoder = Qwen3VLTextEncoder(
            config, layers, device=device, dtype=dtype, attend=encoder_attention()
        )
        self.add_module(NAME, Krea2Section(encoder))
        self.requires_grad_(False).eval()
        self.config, self.dtypes = config, {dtype}
        self.encodings: OrderedDict = OrderedDict()
        # Texts of the prompt expander, by everything that determines them.
        self.texts: OrderedDict = OrderedDict()
        self.tail: LazyTail | None = None

    @property
    def section(self) -> Krea2Section:
        return getattr(self, NAME)

    @property
    def encoder(self) -> Qwen3VLTextEncoder:
        return self.section.transformer.model

    @property
    def vision(self) -> LazyVision | None:
        return self.section.vision

    @property
    def is_changed(self) -> bool:
        """True if a pack has replaced the encoding, on this object or on core's class."""
        return "encode_token_weights" in vars(self) or is_replaced(
            core.Krea2TEModel, "encode_token_weights"
        )

    def encode_token_weights(self, token_weight_pairs, template_end=-1):
        """Rows of tokens to conditioning (B, L, taps * width) in core's format.

        Rows of different length are encoded alone and padded with zeros at the end; then, and
        only then, the third result holds their `attention_mask` (B, L).
        """
        rows = token_weight_pairs[NAME]
        if len(rows) == 1 and is_replaced(core.Krea2TEModel, "encode_token_weights"):
            return super().encode_token_weights(token_weight_pairs, template_end)
        # Prompts of a batch are often equal.
        encoded: dict[tuple, torch.Tensor] = {}
        keys = [cache_key(row) for row in rows]
        for key, row in zip(keys, rows, strict=True):
            if key not in encoded:
                taps, ids = self.section.encode_row([pair[0] for pair in row])
                states = taps[_conditioning_start(ids) :].flatten(1)
                encoded[key] = states.to(comfy.model_management.intermediate_device())
        conditioning, mask = joined_rows([encoded[key] for key in keys])
        return conditioning, None, {} if mask is None else {"attention_mask": mask}

    def write(self, row: list, sampling: Sampling, max_tokens: int, seed: int):
        """Yield the tokens that follow; the parts have to be loaded (`Krea2CLIP.write`)."""
        look = self.section.look(row)
        assert self.tail is not None and self.tail.patcher is not None
        tail = self.tail.patcher.model
        model = language_model(self.encoder, tail, self.section.device, look.images)
        yield from generate(model, look.ids, sampling, max_tokens=max_tokens, seed=seed)

    def load_sd(self, sd):
        # A GGUF weight cannot be copied into a plain one, only replace it.
        assign = getattr(self, "can_assign_sd", False) or any(map(is_gguf, sd.values()))
        return self.encoder.load_state_dict(sd, strict=False, assign=assign)

    def memory_estimation_function(self, token_weight_pairs, device=None):
        """Bytes of activations: the taps, a layer's MLP and its scores, and the images' own."""
        rows = [[pair[0] for pair in row] for row in token_weight_pairs.get(NAME, ())]
        length = max(map(row_length, rows), default=0)
        width = self.config.hidden_size * (len(self.config.tap_layers) + 6)
        pixels = max((max(image_pixel_counts(row), default=0) for row in rows), default=0)
        states = length * (width + 3 * self.config.intermediate_size) * 4
        scoring = _BYTES_A_MASK + self.config.num_attention_heads * _BYTES_A_SCORE
        return states + mask_size(length) * scoring + pixels * _BYTES_A_PIXEL

    def writing_memory(self, tokens: int) -> int:
        """Bytes for generating: the KV cache of so many tokens, and the dequantised head."""
        config = self.config
        layers = config.num_tapped_layers + 1
        cache = tokens * layers * 2 * config.num_key_value_heads * config.head_dim
        return 4 * (cache + config.vocab_size * config.hidden_size)


def joined_rows(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows (L, D) as a new tensor (B, longest, D), padded with zeros at the end.

    Also the mask (B, longest), or None where all have one length.
    """
    lengths = [len(row) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if len(set(lengths)) == 1:
        return padded, None
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return padded, mask.long().to(padded.device)


def rows_of(padded: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The rows without the padding of `joined_rows`."""
    if mask is None:
        return list(padded)
    return [row[:length] for row, length in zip(padded, mask.sum(dim=1).tolist(), strict=True)]


def encoder_layers(options: dict, dtype: torch.dtype | None):
    """The layer namespace for a CLIP's model options.

    Activations start in float32 whatever the dtype of weights, as in core.
    """
    operations = options.get("custom_operations")
    if operations is None and options.get("quantization_metadata") is not None:
        operations = comfy.ops.mixed_precision_ops(
            options["quantization_metadata"], dtype, full_precision_mm=True
        )
    operations = operations or comfy.ops.manual_cast

    class Layers(comfy_layers(operations)):  # type: ignore[misc]
        class Embedding(operations.Embedding):  # type: ignore[name-defined]
            def forward(self, tokens):
                return super().forward(tokens, out_dtype=torch.float32)

    return Layers


def _conditioning_start(row: list[int]) -> int:
    """The first token of conditioning: after the second turn's opening, `<|im_start|>user\\n`.

    For a wrapped prompt this is the 34th token. The line break is not looked for, since it merges
    with one that begins the prompt.
    """
    starts = [index for index, token in enumerate(row) if token == _IM_START][:2]
    if len(starts) < 2:
        return 0
    user = starts[1]
    return user + 3 if row[user + 1 : user + 2] == [_USER] else user
