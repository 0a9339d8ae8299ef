"""What weights, a negative, references and a control cost at full width, beside a plain step.

    PYTHONPATH=ComfyUI python -P benchmarks/features.py     # prints JSON

Operations are counted on the whole model without computing anything; time is the processor's for
one block at 512 px, in turns. Guidance is there to compare: a second pass. A reference has the
image's size, with a boost or not; one that is kept apart is gone through before the first step,
which is not counted. The control is a control LoRA with control channels, and the style a style
picture of the image's size, both counted in operations alone: the style's own pass and the image's
call, at a step without inversion; that is a pass a step and one more. Regions are three, each a
third of the image with a prompt as long as the negative.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT)]

from krea2_model.config import TransformerConfig  # noqa: E402
from krea2_model.features.control_run import RunControl  # noqa: E402
from krea2_model.features.run_features import RunFeatures, StepFeatures  # noqa: E402
from krea2_model.features.style_transfer import StylePictures, StyleRun, StyleSettings  # noqa: E402
from krea2_model.guidance import unshifted  # noqa: E402
from krea2_model.images.region_shapes import RegionShape, RegionShapes  # noqa: E402
from krea2_model.lora.in_run import RunLora  # noqa: E402
from krea2_model.lora.live import LiveLora  # noqa: E402
from krea2_model.lora.updates import Update  # noqa: E402
from krea2_model.nn.attention import attend  # noqa: E402
from krea2_model.transformer.backend import ExtendedBackend  # noqa: E402
from krea2_model.transformer.model import Krea2Transformer  # noqa: E402
from krea2_model.transformer.patches import grid_size, token_count  # noqa: E402
from krea2_model.transformer.references import ReferenceKVCache  # noqa: E402
from krea2_model.transformer.regions import RegionPlan, RegionSettings  # noqa: E402
from krea2_model.transformer.text_attention import NegativeGuidance, TextAttention, TextStates  # noqa: E402
from krea2_model.transformer.token_groups import TokenGroups  # noqa: E402

CONFIG = TransformerConfig()
TEXT, NEGATIVE = 128, 32
SIZES = (1024, 2048)
FEATURES = ("plain", "weights", "negative", "reference", "boost", "apart")
TURNS = 3
RANK = 64  # of the control LoRA
REGIONS = 3
STYLE_TEXT = 5  # tokens of an empty prompt


def boosted(tokens: int, device: str) -> TokenGroups:
    """Image tokens that attend three times as much to a reference of the image's size."""
    factors = [(0, tokens, torch.full((tokens,), 3.0))]
    return TokenGroups(tokens).with_references(factors, torch.device(device))


def hooks_of(name: str, device: str, recorded: ReferenceKVCache, tokens: int) -> dict:
    """Arguments of a call with a feature that works inside attention."""
    if name in ("plain", "reference"):
        return {}
    if name == "boost":
        return {"backend": ExtendedBackend(groups=boosted(tokens, device))}
    if name == "apart":
        return {"backend": ExtendedBackend(None, recorded)}
    weights = torch.ones(1, TEXT, device=device)
    weights[0, 3:6] = 1.3
    if name == "weights":
        return {"backend": ExtendedBackend(TextAttention(weights))}
    states = TextStates(torch.zeros(1, NEGATIVE, CONFIG.hidden_size, device=device))
    attention = TextAttention(negative=states, settings=NegativeGuidance())
    return {"backend": ExtendedBackend(attention)}


def operations(pixels: int) -> dict[str, float]:
    """Floating-point operations of a step by feature, counted on a model without numbers."""
    model = Krea2Transformer(CONFIG, device="meta")
    latents = torch.zeros(1, 16, pixels // 8, pixels // 8, device="meta")
    arguments = (
        latents,
        torch.zeros(1, device="meta"),
        torch.zeros(1, TEXT, CONFIG.hidden_size, device="meta"),
    )
    with torch.no_grad():
        recorded = model.cache_references([latents], torch.float32)
    found = {}
    for name in FEATURES:
        options = hooks_of(name, "meta", recorded, token_count(latents))
        if name in ("reference", "boost"):
            options["references"] = [latents]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*arguments, **options)
        found[name] = float(counter.get_total_flops())
    run = control(model, latents)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        step = run.at(0.5, (pixels // 16, pixels // 16), latents.device)
        with step.live(model, TEXT):
            model(*arguments)
    found["control"] = float(counter.get_total_flops())
    found["style"] = style_operations(model, latents, *arguments[1:])
    found["regions"] = region_operations(model, *arguments)
    found["guidance"] = 2 * found["plain"]
    return found


def region_operations(model: Krea2Transformer, latents, timestep, text) -> float:
    """Operations of a step with regions."""
    step = regions(model, latents)
    joined, mask = step.join(text, None)
    backend = ExtendedBackend(TextAttention(before=step.texts), groups=step.groups)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(latents, timestep, joined, mask, backend=backend)
    return float(counter.get_total_flops())


def regions(model: Krea2Transformer, latents, *, soft=0.05, separate=0.0) -> StepFeatures:
    """A step with three columns as regions."""
    boxes = [(n / REGIONS, 0, 1 / REGIONS, 1) for n in range(REGIONS)]
    shapes = RegionShapes([RegionShape.of(box, soft=soft) for box in boxes])
    states = torch.zeros(1, NEGATIVE, CONFIG.hidden_size, device="meta")
    settings = [RegionSettings()] * REGIONS
    texts = [TextStates(states)] * REGIONS
    plan = RegionPlan(texts, settings, shapes.shares, separate=separate)
    return RunFeatures(plan).at(0.9, grid_size(latents, CONFIG.patch_size), latents.device)


def style_operations(model: Krea2Transformer, latents, timestep, text) -> float:
    """Operations of a step with a style picture that is inverted already."""
    short = TextStates(text[:, :STYLE_TEXT])
    run = StyleRun(StyleSettings(), StylePictures([latents], [1.0]), short, unshifted)

    def evaluate(own, sigma, recorder):
        options = {} if recorder is None else {"backend": ExtendedBackend(None, recorder)}
        return model(own, timestep, short.states, **options)

    grid = grid_size(latents, CONFIG.patch_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        # At sigma 0 the latents are the picture's own.
        run.record(0.0, [latents], len(model.blocks), evaluate)
        keys = run.keys(0.0, model, grid, latents.device)
        model(latents, timestep, text, backend=ExtendedBackend(style=keys))
    return float(counter.get_total_flops())


def control(model: Krea2Transformer, latents: torch.Tensor) -> RunFeatures:
    """A control LoRA with control channels, of all matrices of the blocks."""
    updates = {}
    for name, layer in model.blocks.named_modules():
        if isinstance(layer, torch.nn.Linear):
            rows, columns = layer.weight.shape
            up, down = (
                torch.zeros(rows, RANK, device="meta"),
                torch.zeros(RANK, columns, device="meta"),
            )
            weight = f"blocks.{name}.weight"
            updates[weight] = [Update(weight, "lora", {"up": up, "down": down})]
    projection = torch.zeros(CONFIG.hidden_size, CONFIG.in_channels, device="meta")
    pair = RunControl(projection, latents), RunLora(LiveLora(updates))
    return RunFeatures().with_controls((pair,))


def seconds(pixels: int) -> dict[str, list[float]]:
    """Times of one block by feature; the parts around the blocks are left out."""
    model = Krea2Transformer(CONFIG, device="meta")
    block = model.blocks[0].to_empty(device="cpu")
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    tokens = (pixels // 16) ** 2
    vector = torch.zeros(1, 1, 6 * CONFIG.hidden_size)
    heads = torch.randn(1, CONFIG.num_key_value_heads, tokens, CONFIG.attention_head_dim)
    recorded = ReferenceKVCache()
    recorded.recorder(1.0).attend(attend, 0, heads, heads, heads, None)
    image = (TEXT, TEXT + tokens)

    def run(name: str) -> float:
        options, split, vectors = hooks_of(name, "cpu", recorded, tokens), None, vector
        length = TEXT + tokens
        if name in ("reference", "boost"):
            length, split, vectors = length + tokens, length, vector.expand(-1, 2, -1)
        hidden = torch.randn(1, length, CONFIG.hidden_size)
        rope = torch.eye(2).expand(1, 1, length, CONFIG.attention_head_dim // 2, 2, 2)
        if options:
            prepare = options["backend"].extensions.prepare
            hidden, _, rope, _, _ = prepare(hidden, image, rope, None, None)
        started = time.process_time()
        with torch.no_grad():
            block(hidden, vectors, rope.contiguous(), None, split, **options)
        return time.process_time() - started

    times: dict[str, list[float]] = {name: [] for name in FEATURES}
    for turn in range(TURNS + 1):
        for name, found in times.items():
            taken = run(name)
            if turn:  # the first is for warming up
                found.append(taken)
    return times


if __name__ == "__main__":
    counted = {size: operations(size) for size in SIZES}
    found = {"text": TEXT, "negative": NEGATIVE, "operations": counted, "seconds": seconds(512)}
    print(json.dumps(found))
