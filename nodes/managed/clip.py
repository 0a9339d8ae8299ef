"""CLIP: our Qwen3-VL text encoder under ComfyUI's model management."""

from collections import OrderedDict
from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders
import comfy.utils
import torch

from ...krea2_model.checkpoint import read_text_encoder
from ...krea2_model.generation import Sampling, generate
from ...krea2_model.gguf import GGUFTensor
from ...krea2_model.identify import TEXT_ENCODER
from ...krea2_model.prompt_images import (
    IMAGE_PAD,
    IMAGE_PAD_TEXT,
    TOKEN_SIDE,
    PromptImage,
    check_no_pads,
    grid_of,
    image_text,
    image_weights,
    with_image_tokens,
)
from ...krea2_model.prompt_weights import parse_weights, plain_prompt, token_weights
from ...krea2_model.text_encoder import Qwen3VLTextEncoder
from ...krea2_model.tokenizer import Krea2Tokenizer
from ...krea2_model.vision import ImageTokens
from .gguf import GGUFOperations, KeepsBlocks, is_blocks, wrap
from .hooks import PatchHooks
from .language import LazyTail, language_model
from .layers import comfy_layers
from .texts import TOKEN_WEIGHTS
from .vision import (
    LazyVision,
    content_of,
    has_images,
    image_sizes,
    image_token,
    images_of,
    is_image,
    pictures,
    spell_images,
)
from .weights import check_weights, open_part

# The key under which core's Krea 2 encoder keeps its tokens, weights and LoRA aliases.
NAME = "qwen3vl_4b"

_IM_START, _USER = 151644, 872

# What Qwen3-VL is asked with about an image; Generate Text means this one.
_IMAGE_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

# What the vision tower holds of each pixel: of a patch of 256 in float32 about eight states of
# width 1024 and two of 4096.
_BYTES_A_PIXEL = 256

# Encodings that are remembered, in main memory: 100 tokens take 12 MB, eight images of 384 px 140.
KEPT_ENCODINGS, KEPT_BYTES = 12, 512 * 1024**2


class Krea2ClipTokenizer:
    """ComfyUI's tokenizer interface: texts to rows of (token id, weight)."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        folder = Path(comfy.text_encoders.__path__[0]) / "qwen25_tokenizer"
        self.tokenizer = Krea2Tokenizer(folder)

    def tokenize_with_weights(
        self,
        text,
        return_word_ids=False,
        max_sequence_length=None,
        always_wrap=False,
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

        images: batches (B, H, W, C), each image of which is one of the prompt's; a text that holds
        as many `<|image_pad|>` has them there, any other in front, with `labels` and `roles`.
        `image` is what Generate Text passes: its chat then is Qwen's own, as in core.

        A text that begins with `<|im_start|>` is a chat of its own and is passed as it is, as
        core does, unless `always_wrap` is set; `llama_template` replaces Krea's template, and
        `skip_template` does without. `max_sequence_length` 512 is the official cut. Without
        `thinking` an empty thought follows the template, so that a text written on has none.
        """
        placed = pictures(images)
        if not placed and image is not None:
            placed, llama_template = pictures(image), llama_template or _IMAGE_CHAT
        rows, no_thought = [], "" if thinking else "<think>\n\n</think>\n\n"
        for prompt in [text] if isinstance(text, str) else text:
            before = ""
            if placed and IMAGE_PAD_TEXT not in prompt and not skip_template:
                before = image_text([*roles, *[""] * (len(placed) - len(roles))], labels)
            if llama_template is not None:
                whole = llama_template.format(before + prompt)
                tokens = self.tokenizer.tokenize_raw(whole + no_thought)
            elif skip_template or (prompt.startswith("<|im_start|>") and not always_wrap):
                tokens = self.tokenizer.tokenize_raw(prompt)
            else:
                tokens = self.tokenizer.tokenize(prompt, max_sequence_length, before)
                if no_thought:
                    tokens += self.tokenizer.tokenize_raw(no_thought)
            row = [(token, 1.0) for token in _with_images(tokens, placed)]
            if return_word_ids:
                row = [(*pair, index) for index, pair in enumerate(row, start=1)]
            rows.append(row)
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


class Krea2TextModel(torch.nn.Module):
    """What ComfyUI's CLIP holds: the encoder under core's names, and its entry points."""

    def __init__(self, config, device="cpu", dtype=None, model_options=None):
        super().__init__()
        layers = encoder_layers(model_options or {}, dtype)
        # Nested as core nests it, so that LoRA keys and saved files use the same names.
        transformer = torch.nn.Module()
        transformer.model = Qwen3VLTextEncoder(
            config, layers, device=device, dtype=dtype, attend=PatchHooks({}).attention
        )
        section = torch.nn.Module()
        section.transformer = transformer
        self.add_module(NAME, section)
        self.requires_grad_(False).eval()
        self.config, self.dtypes, self.execution_device = config, {dtype}, None
        self.encodings: OrderedDict = OrderedDict()
        # Texts that the prompt expander wrote, by all they depend on.
        self.texts: OrderedDict = OrderedDict()
        self.tail: LazyTail | None = None
        self.vision: LazyVision | None = None

    @property
    def encoder(self) -> Qwen3VLTextEncoder:
        return getattr(self, NAME).transformer.model

    def set_clip_options(self, options):
        """Only the device: a layer choice ("clip skip") has no meaning for twelve taps."""
        self.execution_device = options.get("execution_device", self.execution_device)

    def reset_clip_options(self):
        self.execution_device = None

    def encode_token_weights(self, token_weight_pairs):
        """Rows of tokens to conditioning (B, L, taps * width) in core's format.

        Rows of different length are encoded alone and padded with zeros at the end; then, and
        only then, the third result holds their `attention_mask` (B, L).
        """
        rows = [[pair[0] for pair in row] for row in token_weight_pairs[NAME]]
        device = self.execution_device or self.encoder.embed_tokens.weight.device
        encoded = []
        for row in rows:
            ids, seen = self._look(row, device)
            tokens = torch.tensor([ids], device=device)
            images = {"images": seen} if seen else {}
            taps = self.encoder(tokens, **images)[:, _kept_from(ids) :]
            encoded.append(taps.flatten(2)[0].float())
        lengths = [len(states) for states in encoded]
        conditioning = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)
        conditioning = conditioning.to(comfy.model_management.intermediate_device())
        if len(set(lengths)) == 1:
            return conditioning, None, {}
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return conditioning, None, {"attention_mask": mask.long().to(conditioning.device)}

    def _look(self, row, device) -> tuple[list[int], list[ImageTokens]]:
        """The ids of a row of tokens, and what the vision tower makes of its images."""
        images = images_of(row)
        if not images:
            return row, []
        tower = self.vision.patcher.model
        seen = [tower(image.to(device, torch.float32)) for image in images]
        return spell_images(row, seen), seen

    def write(self, row: list, sampling: Sampling, max_tokens: int, seed: int):
        """Yield the tokens that follow; what is needed has to be loaded (`Krea2CLIP.write`)."""
        device = self.execution_device or self.encoder.embed_tokens.weight.device
        tokens, seen = self._look(row, device)
        model = language_model(self.encoder, self.tail.patcher.model, device, seen)
        yield from generate(model, tokens, sampling, max_tokens=max_tokens, seed=seed)

    def load_sd(self, sd):
        # Blocks of a GGUF file cannot be copied into a weight of numbers, only take its place.
        assign = getattr(self, "can_assign_sd", False) or any(map(is_blocks, sd.values()))
        return self.encoder.load_state_dict(sd, strict=False, assign=assign)

    def memory_estimation_function(self, token_weight_pairs, device=None):
        """Bytes of activations: the taps and a layer's MLP, in float32, and the images' own."""
        rows = [[pair[0] for pair in row] for row in token_weight_pairs.get(NAME, ())]
        length = max(map(row_length, rows), default=0)
        width = self.config.hidden_size * (len(self.config.tap_layers) + 6)
        seeing = max((max(image_sizes(row), default=0) for row in rows), default=0)
        return length * (width + 3 * self.config.intermediate_size) * 4 + seeing * _BYTES_A_PIXEL

    def writing_memory(self, tokens: int) -> int:
        """Bytes that writing takes: keys and values of so many tokens, and the head as numbers."""
        config = self.config
        layers = config.num_tapped_layers + 1
        kept = tokens * layers * 2 * config.num_key_value_heads * config.head_dim
        return 4 * (kept + config.vocab_size * config.hidden_size)


class Krea2CLIP(comfy.sd.CLIP):
    """A CLIP that remembers its last encodings, by tokens and patches.

    The negative of a prompt that is being worked on is asked for again and again, and without the
    encoder there is nothing to load for it.
    """

    def clone(self, *args, **kwargs):
        clone = super().clone(*args, **kwargs)
        clone.__class__ = Krea2CLIP
        return clone

    def load_model(self, tokens={}):  # noqa: B006 - core's own signature
        if not has_images(tokens.get(NAME, ())):
            return super().load_model(tokens)
        model, device = self.cond_stage_model, self.patcher.load_device
        needed = model.memory_estimation_function(tokens, device)
        # Together: what is loaded alone may push out the other.
        parts = [self.patcher, model.vision.load(self.patcher)]
        comfy.model_management.load_models_gpu(parts, memory_required=needed)
        return self.patcher

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False):
        key = self._key(tokens)
        if key is None:
            return super().encode_from_tokens(tokens, return_pooled, return_dict)
        encodings = self.cond_stage_model.encodings
        if key not in encodings:
            encodings[key] = super().encode_from_tokens(tokens, return_pooled, return_dict=True)
        encodings.move_to_end(key)
        while len(encodings) > KEPT_ENCODINGS or (
            len(encodings) > 1 and sum(map(_size, encodings.values())) > KEPT_BYTES
        ):
            encodings.popitem(last=False)
        result = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in encodings[key].items()
        }
        if return_dict:
            return result
        return (result["cond"], result["pooled_output"]) if return_pooled else result["cond"]

    def write(self, tokens, sampling: Sampling, max_tokens: int, seed: int = 0):
        """Yield the token ids that follow a text's; the cue for progress is each of them.

        Raises CheckpointError where the file lacks what only writing needs, and ComfyUI's
        exception where the run was interrupted.
        """
        rows = tokens.get(NAME, ())
        if len(rows) != 1:
            raise ValueError(f"There are {len(rows)} texts to write on from; expected one.")
        row = [pair[0] for pair in rows[0]]
        model, device = self.cond_stage_model, self.patcher.load_device
        parts = [self.patcher, model.tail.load(self.patcher)]
        if has_images(rows):
            parts.append(model.vision.load(self.patcher))
        # Together: what is loaded alone may push out the other.
        needed = model.memory_estimation_function(tokens, device)
        needed += model.writing_memory(row_length(row) + min(max_tokens, 1024))
        comfy.model_management.load_models_gpu(parts, memory_required=needed)
        model.reset_clip_options()
        model.set_clip_options({"execution_device": device})
        written = model.write(row, sampling, max_tokens, seed)
        while True:
            comfy.model_management.throw_exception_if_processing_interrupted()
            with comfy.model_management.cuda_device_context(device):
                token = next(written, None)
            if token is None:
                return
            yield token

    def generate(
        self,
        tokens,
        do_sample=True,
        max_length=256,
        temperature=1.0,
        top_k=50,
        top_p=0.95,
        min_p=0.0,
        repetition_penalty=1.0,
        seed=None,
        presence_penalty=0.0,
    ):
        """Core's entry point for writing text (Generate Text), with its arguments and defaults."""
        sampling = Sampling()
        if do_sample:
            sampling = Sampling(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty or 0.0,
            )
        progress, written = comfy.utils.ProgressBar(max_length), []
        for token in self.write(tokens, sampling, max_length, seed or 0):
            written.append(token)
            progress.update(1)
        return written

    def state_dict_for_saving(self):
        """With what only writing and seeing need where the file has it: what is saved is whole."""
        state, model = super().state_dict_for_saving(), self.cond_stage_model
        for part, prefix in ((model.tail, "model."), (model.vision, "visual.")):
            try:
                tensors = part.file_tensors(self.patcher)
            except (ValueError, OSError):
                continue
            state |= {f"{NAME}.transformer.{prefix}{n}": tensor for n, tensor in tensors.items()}
        return state

    def _key(self, tokens):
        """What an encoding depends on; None where it may change with time (hooks)."""
        if self.patcher.forced_hooks is not None or self.apply_hooks_to_conds is not None:
            return None
        rows = tuple(tuple(content_of(pair[0]) for pair in row) for row in tokens.get(NAME, ()))
        if not all(isinstance(token, (int, tuple)) for row in rows for token in row):
            return None
        return self.patcher.patches_uuid, rows


def encode_prompts(clip, prompts: list[str], *, weighted: bool, **options):
    """Prompts to CONDITIONING, one for each image of a batch, by our CLIP or core's.

    weighted: read `(word:1.3)`; the sentence is encoded without the marks, once, and the weights of
    its tokens travel beside it. options: `max_sequence_length`, for our CLIP.
    """
    marked = [parse_weights(prompt) for prompt in prompts] if weighted else []
    texts = [prompt.text for prompt in marked] or list(prompts)
    tokens = clip.tokenize(texts[0] if len(texts) == 1 else texts, always_wrap=True, **options)
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    if not any(prompt.is_weighted for prompt in marked):
        return conditioning
    ours = clip.tokenizer if isinstance(clip.tokenizer, Krea2ClipTokenizer) else None
    limit = options.get("max_sequence_length") if ours is not None else None
    weights = token_weights(marked, (ours or Krea2ClipTokenizer()).tokenizer, limit)
    if weights is None:  # what has a weight was cut
        return conditioning
    return [[states, extra | {TOKEN_WEIGHTS: weights}] for states, extra in conditioning]


def encode_with_images(
    clip, prompt: str, images: list[PromptImage], *, labels: bool, weighted: bool, **options
):
    """A prompt with images in front of it to CONDITIONING, by a CLIP of ours.

    images: in sizes that the tower takes (`vision.fitted`), with strengths other than 0; strengths
        other than 1 travel as weights of the images' tokens, like those of words.
    labels, weighted, options: see `prompt_images.image_text` and `encode_prompts`.

    Raises ValueError for another CLIP, and CheckpointError where its file has no vision tower.
    """
    if not isinstance(clip.tokenizer, Krea2ClipTokenizer):
        raise ValueError(
            "clip is not from a Krea 2 loader of this pack; images in prompts need one. Connect "
            "Load Krea 2 or Load Krea 2 Text Encoder."
        )
    marked = parse_weights(prompt) if weighted else plain_prompt(prompt)
    check_no_pads(marked.text)
    roles = [image.role for image in images]
    pixels = [image.pixels.movedim(0, -1)[None] for image in images]
    tokens = clip.tokenize(
        marked.text, always_wrap=True, images=pixels, roles=roles, labels=labels, **options
    )
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    tokenizer, before = clip.tokenizer.tokenizer, image_text(roles, labels)
    grids = [grid_of(image.pixels) for image in images]
    front = image_weights(tokenizer.front(before), grids, images)
    limit = options.get("max_sequence_length")
    weights = token_weights([marked], tokenizer, limit, before, front)
    if weights is None:
        return conditioning
    return [[states, extra | {TOKEN_WEIGHTS: weights}] for states, extra in conditioning]


def load_clip(path: str | Path, dtype: torch.dtype | None = None, *, disable_dynamic=False):
    """Load a Qwen3-VL text encoder file or folder as a CLIP.

    dtype: of the stored weights; None keeps the file's. Activations are float32.
    Raises CheckpointError that says what the file is and what was expected.
    """
    checkpoint = open_part(path, "text_encoder")
    state = read_text_encoder(checkpoint)
    bare = Qwen3VLTextEncoder(state.config, device="meta")
    quantisation = check_weights(bare, state.tensors, checkpoint.path, TEXT_ENCODER)
    # Of a norm: embeddings and matrices may be in 8 bits, which is no dtype for the rest.
    options = {"dtype": dtype or state.tensors["layers.0.input_layernorm.weight"].dtype}
    if quantisation is not None:
        options["quantization_metadata"] = quantisation
    blocks = any(isinstance(tensor, GGUFTensor) for tensor in state.tensors.values())
    if blocks:
        options["custom_operations"] = GGUFOperations
    target = comfy.supported_models_base.ClipTarget(Krea2ClipTokenizer, Krea2TextModel)
    target.params["config"] = state.config
    clip = Krea2CLIP(
        target,
        parameters=sum(weight.numel() for weight in bare.parameters()),
        state_dict=[{name: wrap(t, torch.float32) for name, t in state.tensors.items()}],
        model_options=options,
        disable_dynamic=disable_dynamic or blocks,
    )
    if blocks:
        clip.patcher.__class__ = type("BlockPatcher", (KeepsBlocks, type(clip.patcher)), {})
    clip.patcher.cached_patcher_init = (_load_patcher, (path, dtype))
    clip.cond_stage_model.tail = LazyTail(path, dtype, encoder_layers)
    clip.cond_stage_model.vision = LazyVision(path, dtype, encoder_layers)
    return clip


def _load_patcher(path, dtype, disable_dynamic=False):
    return load_clip(path, dtype, disable_dynamic=disable_dynamic).patcher


def encoder_layers(options: dict, dtype: torch.dtype | None):
    """The layer namespace for a CLIP's model options.

    Activations begin in float32, whatever weights are stored in, as in core.
    """
    operations = options.get("custom_operations")
    if operations is None and options.get("quantization_metadata") is not None:
        operations = comfy.ops.mixed_precision_ops(
            options["quantization_metadata"], dtype, full_precision_mm=True
        )
    operations = operations or comfy.ops.manual_cast

    class Layers(comfy_layers(operations)):
        class Embedding(operations.Embedding):
            def forward(self, tokens):
                return super().forward(tokens, out_dtype=torch.float32)

    return Layers


def _size(encoding: dict) -> int:
    """Bytes of an encoding's tensors."""
    return sum(value.nbytes for value in encoding.values() if isinstance(value, torch.Tensor))


def row_length(row: list) -> int:
    """Tokens of a row, those of its images included."""
    return len(row) + sum(image_sizes(row)) // TOKEN_SIDE**2


def _with_images(tokens: list[int], images: list[torch.Tensor]) -> list:
    """Tokens with the images in the place of their pads.

    Raises ValueError unless there are as many of each.
    """
    if not images:
        return tokens
    with_image_tokens(tokens, [(1, 1)] * len(images))
    left = iter(images)
    return [image_token(next(left)) if token == IMAGE_PAD else token for token in tokens]


def _kept_from(row: list[int]) -> int:
    """Where conditioning begins: after the second turn's opening, `<|im_start|>user\\n`.

    For a wrapped prompt this is the 34th token. The line break is not looked for, since it merges
    with one that begins the prompt.
    """
    starts = [index for index, token in enumerate(row) if token == _IM_START][:2]
    if len(starts) < 2:
        return 0
    user = starts[1]
    return user + 3 if row[user + 1 : user + 2] == [_USER] else user
