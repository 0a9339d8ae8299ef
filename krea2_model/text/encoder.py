"""The language tower of Qwen3-VL, run for the hidden states that Krea 2 reads.

Krea 2 conditions on 12 hidden states a token, tapped every third layer, none of them after the
final norm. The last tap is what layer index 34 puts out, so of the 36 layers 35 are held here, and
neither the final norm, the head nor the vision tower. Module names are the checkpoint's, without
the prefix that differs from file to file (`text_encoder_keys`).

Qwen3-VL rotates with three position axes (time, height, width). For text the three are equal, and
the result is that of ordinary one-dimensional rotary positions.

Images stand in the prompt as tokens that the vision tower made (vision.py). Its DeepStack features
are added to what the first layers put out at those tokens. A tap is taken before that addition, as
transformers records `hidden_states`, with which Krea 2 and the LoRAs that read images were trained.
ComfyUI's own encoder taps after it, so there tap 2 differs at the tokens of images, and only there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import counted
from ..config import TextEncoderConfig
from ..nn.attention import Attend, attend
from ..nn.layers import TorchLayers
from .decoder import CausalMask, DecoderLayer, rotation_of, rotation_table
from .prompt_images import (
    IMAGE_PAD,
    MAX_SIDE,
    PromptImage,
    axis_positions,
    nonzero_images,
)
from .prompt_tokens import PromptTokens, tokenize_prompt
from .tokenizer import PREFIX_TOKENS, Krea2Tokenizer
from .vision import ImageTokens, Qwen3VLVisionTower

RELEASED = TextEncoderConfig()
_EMBEDDING = "embed_tokens.weight"
_FIRST_NORM = "layers.0.input_layernorm.weight"


class Qwen3VLTextEncoder(nn.Module):
    """Prompts, or their tokens, to the hidden states that Krea 2 reads.

    layers: namespace of the layer classes, see `krea2_model.nn.layers`.
    attend: the attention function, see `krea2_model.nn.attention`; it is given a boolean mask.
    tokenizer: for `encode`, or None.
    path: the file or folder of the weights, or None.
    load_tower, load_tail: load the vision tower and the rest of the language model, with options
        `device` and `dtype`; None where the weights are of no file.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        layers=TorchLayers,
        device=None,
        dtype: torch.dtype | None = None,
        attend: Attend = attend,
        *,
        tokenizer: Krea2Tokenizer | None = None,
        path: Path | None = None,
        load_tower: Callable[..., Qwen3VLVisionTower] | None = None,
        load_tail: Callable[..., Any] | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.tokenizer, self.path = tokenizer, path
        self.load_tower, self.load_tail = load_tower, load_tail
        # In a list: a part of its own, neither moved nor saved with the encoder.
        self._tower: list[Qwen3VLVisionTower] = []
        self.embed_tokens = layers.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layers, attend, **factory) for _ in range(config.num_tapped_layers)
        )

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        images: Sequence[ImageTokens] = (),
        *,
        positions: Tensor | None = None,
        tap_with_deepstack: bool = False,
    ) -> Tensor:
        """The tapped hidden states, (B, L, taps, D) in the dtype of the embeddings.

        tokens: (B, L), int64, prefix included, with a pad for every token of an image.
        mask: (B, L), True for real tokens, or None if all are. Padding may lie anywhere; it takes
            no position and no real token sees it. What comes out for it has no meaning.
        images: those of all prompts, in the order of their pads.
        positions: of every token in time, row and column, (3, L), in place of those that the
            images' grids give.
        tap_with_deepstack: tap a layer after the features of images are added to it, as ComfyUI
            does, and not before, as the model was trained.

        Raises ValueError where pads and images do not fit.
        """
        hidden = self.embed_tokens(tokens)
        visible = CausalMask(tokens.shape[1], tokens.device, real=mask)
        deepstack: list[Tensor] = []
        if images:
            if positions is None:
                rotation = self._rotation_with_images(tokens, mask, images)
            else:
                rotation = rotation_of(positions, self.config, tokens.device)[:, None, None]
            hidden, deepstack = place_images(hidden, tokens == IMAGE_PAD, images)
        else:
            rotation = rotation_table(tokens.shape[1], self.config, tokens.device)
            if mask is None:
                rotation = rotation[:, None, None]
            else:
                positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
                rotation = rotation[:, positions].unsqueeze(2)
        slots = {layer: slot for slot, layer in enumerate(self.config.tap_layers)}
        taps = hidden.new_empty(*tokens.shape, len(slots), self.config.hidden_size)
        for index, state in enumerate(self.hidden_states(hidden, rotation, visible, deepstack)):
            if index in slots:
                if tap_with_deepstack and 0 < index <= len(deepstack):
                    state = state + deepstack[index - 1]
                taps[:, :, slots[index]] = state
        return taps

    def hidden_states(
        self, hidden: Tensor, rotation: Tensor, mask: CausalMask, deepstack: Sequence[Tensor] = ()
    ) -> Iterator[Tensor]:
        """Yield the embeddings (B, L, D), then what each layer puts out.

        The index counts as transformers' `hidden_states` does: k is the output of layer k - 1.
        deepstack: what is added to the outputs of the first layers, (B, L, D) each, after they
            have been yielded.
        """
        yield hidden
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, rotation, mask)
            yield hidden
            if index < len(deepstack):
                hidden = hidden + deepstack[index]

    def _rotation_with_images(
        self, tokens: Tensor, mask: Tensor | None, images: Sequence[ImageTokens]
    ) -> Tensor:
        """Rotations (2, B, 1, L, D/2), each prompt's positions counted through its own images."""
        grids = [image.grid for image in images]
        positions = torch.zeros(3, *tokens.shape, dtype=torch.long)
        for item, row in enumerate(tokens.tolist()):
            real = torch.ones(len(row), dtype=torch.bool) if mask is None else mask[item].cpu()
            ids = [token for token, kept in zip(row, real.tolist(), strict=True) if kept]
            own, pads = 0, ids.count(IMAGE_PAD)
            while pads > 0 and own < len(grids):
                pads -= grids[own][0] * grids[own][1]
                own += 1
            last = item == len(tokens) - 1
            positions[:, item, real] = axis_positions(ids, grids if last else grids[:own])
            grids = grids[own:]
        table = rotation_of(positions.flatten(1), self.config, tokens.device)
        return table.unflatten(1, tokens.shape).unsqueeze(2)

    def vision_tower(self) -> Qwen3VLVisionTower:
        """The vision tower of the encoder's file, loaded when it is first asked for.

        Raises CheckpointError where the file has none, and ValueError where there is no file.
        """
        return self.unmoved_vision_tower().to(self.embed_tokens.weight.device)

    def unmoved_vision_tower(self) -> Qwen3VLVisionTower:
        """`vision_tower` wherever it is: in main memory when it is first loaded."""
        if not self._tower:
            if self.load_tower is None:
                raise ValueError(
                    "The text encoder was not loaded from a file, so there is no vision tower for "
                    "images in prompts. Use load_text_encoder."
                )
            dtype = self.embed_tokens.weight.dtype
            self._tower.append(self.load_tower(dtype=dtype))
        return self._tower[0]

    @torch.no_grad()
    def encode(
        self,
        prompts: list[str],
        *,
        max_sequence_length: int | None = None,
        images: Sequence[Sequence[PromptImage]] | None = None,
        labels: bool = True,
        max_side: int = MAX_SIDE,
    ) -> tuple[Tensor, Tensor | None]:
        """Taps of prompts in Krea 2's template, and which of them are real.

        max_sequence_length: kept tokens, 5 of the template included, above which a prompt is cut;
            512 is the official length. None never cuts. Those of images do not count.
        images: for each prompt, what stands in front of its text; None for text alone. Images of
            strength 0 are left out, other strengths are `prompt_weights.token_weights`' business.
        labels: number the images, `Picture 1: `, as LoRAs that read images were trained.
        max_side: images with more pixels than a square of this side are made smaller.

        Returns taps (B, L, taps, D) without the template's prefix, padded with zeros to the longest
        prompt, and a boolean mask (B, L), or None if all prompts have the same length. Every prompt
        runs alone and unpadded, so the others in the list do not change a bit of its result.

        Raises ValueError without a tokenizer, for prompts that are not a list of texts, and for
        images without a vision tower.
        """
        if isinstance(prompts, str) or not isinstance(prompts, (list, tuple)) or not prompts:
            raise ValueError(
                f"prompts is {prompts!r}; expected a list of one or more texts, such as ['a fox']."
            )
        if images is not None and len(images) != len(prompts):
            raise ValueError(
                f"images has {counted(len(images), 'list')}; expected {len(prompts)}, one per "
                "prompt."
            )
        tokenizer = self.get_tokenizer()
        tokens = [
            tokenize_prompt(
                tokenizer,
                prompt,
                images=[image.resized(max_side) for image in nonzero_images(own)],
                labels=labels,
                max_sequence_length=max_sequence_length,
            )
            for prompt, own in zip(prompts, images or [()] * len(prompts), strict=True)
        ]
        return self.encode_tokens(tokens)

    @torch.no_grad()
    def encode_tokens(self, prompts: Sequence[PromptTokens]) -> tuple[Tensor, Tensor | None]:
        """Taps and mask of prompts that are laid out already, as `encode` returns them.

        Raises ValueError for tokens of another model, and for images without a vision tower.
        """
        device = self.embed_tokens.weight.device
        largest = max(max(prompt.ids) for prompt in prompts)
        if largest >= self.config.vocab_size:
            # On a GPU the lookup would fail later, and take the process's CUDA context with it.
            raise ValueError(
                f"The tokenizer{self._tokenizer_folder()} makes token {largest}, but the text "
                f"encoder knows {self.config.vocab_size}. Use the tokenizer of this model."
            )
        images = [self.image_tokens(prompt.images) for prompt in prompts]
        lengths = [len(prompt.expanded_ids) - PREFIX_TOKENS for prompt in prompts]
        taps = None
        for item, prompt in enumerate(prompts):
            ids = torch.tensor([prompt.expanded_ids], device=device)
            states = self(ids, images=images[item])[0, PREFIX_TOKENS:]
            if taps is None:
                taps = states.new_zeros(len(prompts), max(lengths), *states.shape[1:])
            taps[item, : lengths[item]] = states
        assert taps is not None
        if min(lengths) == max(lengths):
            return taps, None
        counts = torch.tensor(lengths, device=device)
        return taps, torch.arange(max(lengths), device=device) < counts[:, None]

    def get_tokenizer(self) -> Krea2Tokenizer:
        """The tokenizer. Raises ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError(
                "The text encoder has no tokenizer. Load a model folder that has its own "
                "tokenizer/, name a folder with `tokenizer=` (--tokenizer on the command line), or "
                "set COMFYUI_PATH to a ComfyUI folder."
            )
        return self.tokenizer

    def _tokenizer_folder(self) -> str:
        return "" if self.tokenizer is None else f" in {self.tokenizer.folder}"

    def image_tokens(self, images: Sequence[PromptImage]) -> list[ImageTokens]:
        """The vision tower's output for images at its sizes; without images it is not loaded."""
        if not images:
            return []
        tower = self.vision_tower()
        weight = tower.merger.linear_fc2.weight
        return [tower(image.pixels.to(weight)) for image in images]


def place_images(
    hidden: Tensor, places: Tensor, images: Sequence[ImageTokens]
) -> tuple[Tensor, list[Tensor]]:
    """Embeddings (B, L, D) with images' tokens at `places` (B, L), and their DeepStack features.

    The features are one (B, L, D) for each of the first layers, 0 at text.
    Raises ValueError where an image is not of the language tower's width.
    """
    if images[0].tokens.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"The vision tower makes tokens of width {images[0].tokens.shape[1]}; this language "
            f"model takes {hidden.shape[2]}. Use the tower of the same file."
        )
    places = places[..., None]
    tokens = torch.cat([image.tokens for image in images]).to(hidden)
    layers = zip(*(image.deepstack for image in images), strict=True)
    deepstack = [
        torch.zeros_like(hidden).masked_scatter(places, torch.cat(features).to(hidden))
        for features in layers
    ]
    return hidden.masked_scatter(places, tokens), deepstack


_LLAMA_CPP = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama_cpp_to_hugging_face(name: str) -> str:
    """`blk.0.attn_q.weight`, as GGUF files call it, to `model.layers.0.self_attn.q_proj.weight`."""
    part = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
    if part and part[2] in _LLAMA_CPP:
        return f"model.layers.{part[1]}.{_LLAMA_CPP[part[2]]}.{part[3]}"
    outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    layer, _, ending = name.rpartition(".")
    return f"{outside[layer]}.{ending}" if layer in outside else name


def text_encoder_keys(
    names: Iterable[str], num_layers: int = RELEASED.num_tapped_layers
) -> dict[str, str]:
    """The tensors of a checkpoint that the encoder needs: their names there to its own.

    The prefix (`model.`, `model.language_model.`, `text_encoders.qwen3vl_4b.transformer.model.`,
    none, ...) is what precedes the token embedding. Vision tower, head, final norm and layers from
    `num_layers` on are left out. Empty if no tensor, or more than one, is a token embedding beside
    decoder layers.
    """
    names = list(names)
    prefix = language_prefix(names)
    if prefix is None:
        return {}
    keys = {}
    for name in names:
        if not name.startswith(prefix):
            continue
        ours = name.removeprefix(prefix)
        layer = re.match(r"layers\.(\d+)\.", ours)
        if ours.startswith("embed_tokens.") or (layer and int(layer[1]) < num_layers):
            keys[name] = ours
    return keys


def language_prefix(names: Iterable[str]) -> str | None:
    """The prefix of a checkpoint's language model; None unless there is exactly one."""
    names = set(names)
    prefixes = {
        name.removesuffix(_EMBEDDING)
        for name in names
        if name == _EMBEDDING or name.endswith("." + _EMBEDDING)
    }
    prefixes = {prefix for prefix in prefixes if prefix + _FIRST_NORM in names}
    return prefixes.pop() if len(prefixes) == 1 else None


def infer_text_encoder_config(
    shapes: Mapping[str, tuple[int, ...]],
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    tap_layers: tuple[int, ...] | None = None,
    mrope_section: tuple[int, ...] | None = None,
) -> TextEncoderConfig:
    """Read the sizes off the encoder's tensors, given by its own names.

    What shapes do not tell takes the released value where it is None. `num_hidden_layers` counts
    the layers that are given. Sizes come from rows and norms alone, since 4-bit formats pack the
    columns. A wrong width is none of this function's business: any Qwen3-VL with enough layers
    passes.

    Raises ValueError, saying what was found, for another architecture or too few layers.
    """
    advice = (
        "Expected the language model of Qwen3-VL-4B (36 layers, width 2560): choose its file, such "
        "as qwen3vl_4b_bf16.safetensors."
    )
    if _EMBEDDING not in shapes or _FIRST_NORM not in shapes:
        raise ValueError(
            "There is no token embedding beside decoder layers, so this is no language model. "
            + advice
        )
    width = shapes[_FIRST_NORM][0]
    indices = {int(name.split(".")[1]) for name in shapes if name.startswith("layers.")}
    summary = f"{len(indices)} layers, width {width}"
    attention = "layers.0.self_attn."
    if attention + "q_norm.weight" not in shapes:
        kind = "Qwen2.5-VL" if attention + "q_proj.bias" in shapes else "another language model"
        raise ValueError(
            f"This is {kind} ({summary}, no q/k norm), whose hidden states mean nothing to Krea 2. "
            + advice
        )
    taps = tap_layers or RELEASED.tap_layers
    missing = sorted(set(range(max(taps))) - indices)
    if missing:
        raise ValueError(
            f"This text encoder has {summary}; the taps need layers 0 to {max(taps) - 1}, and "
            f"layer {missing[0]} is missing. {advice}"
        )
    rows = {}
    for name in ("mlp.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.q_norm"):
        weight = f"layers.0.{name}.weight"
        if weight not in shapes:
            raise ValueError(f"This text encoder ({summary}) has no {weight}. {advice}")
        rows[name] = shapes[weight][0]
    head_dim = rows["self_attn.q_norm"]
    config = replace(
        RELEASED,
        vocab_size=shapes[_EMBEDDING][0],
        hidden_size=width,
        intermediate_size=rows["mlp.gate_proj"],
        num_hidden_layers=len(indices),
        num_attention_heads=rows["self_attn.q_proj"] // head_dim,
        num_key_value_heads=rows["self_attn.k_proj"] // head_dim,
        head_dim=head_dim,
        rms_norm_eps=RELEASED.rms_norm_eps if rms_norm_eps is None else rms_norm_eps,
        rope_theta=RELEASED.rope_theta if rope_theta is None else rope_theta,
        tap_layers=tuple(taps),
    )
    usual = mrope_section in (None, config.rotary_sections)
    return config if usual else replace(config, mrope_section=mrope_section)
