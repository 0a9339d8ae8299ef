"""The forecast of a training run, against counted runs at full width on tensors without content."""

import pytest
import torch

from krea2_model import Krea2Transformer, TransformerConfig
from krea2_model.nn.kernels import norm_and_rotate
from krea2_model.transformer.backend import Backend
from krea2_training.adapters import add_adapters
from krea2_training.base import TrainingBackend, freeze_base
from krea2_training.forecast import RESERVE, TEXT_TOKENS, training_memory
from krea2_training.sections import Adapter, Memory, Steps
from live_bytes import LiveBytes

LAYERS = 4


class Flash(TrainingBackend):
    """With the attention of a GPU, which holds no scores; a meta tensor's own would."""

    def attend(self, query, key, value, norm, rope, mask, query_slice=None):
        query, key = norm_and_rotate(query, key, norm, rope, query_slice)
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, False, False)[0].transpose(1, 2).flatten(2)


class FlashAllHeld(Flash):
    run_blocks = Backend.run_blocks


@pytest.mark.parametrize(
    "method, base, side, held",
    [("lora", "bf16", 1024, False), ("lora", "4bit", 512, False), ("dora", "fp8", 1024, False),
     ("lokr", "bf16", 512, False), ("lora", "bf16", 512, True)],
)  # fmt: skip
def test_the_forecast_bounds_a_counted_step(method, base, side, held):
    config = TransformerConfig(num_layers=LAYERS)
    adapter = Adapter(method=method)
    memory = Memory(base=base, checkpointing=not held)
    told = training_memory(config, adapter=adapter, memory=memory, training=Steps(), side=side)
    model = Krea2Transformer(config, device="meta", dtype=torch.bfloat16)
    freeze_base(model, memory, torch.device("meta"))
    with torch.device("meta"):
        add_adapters(model, adapter)
        latents = torch.empty(1, 16, side // 8, side // 8)
        text = torch.empty(1, TEXT_TOKENS, config.hidden_size, dtype=torch.bfloat16)
        time = torch.empty(1)
    tensors = [*model.parameters(), *model.buffers()]
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = sum(t.nbytes for t in tensors) - trained
    backend = FlashAllHeld() if held else Flash()
    with LiveBytes("meta") as counted:
        model(latents, time, text, backend=backend).float().square().mean().backward()
    assert trained == told.trained
    assert frozen <= told.frozen * 1.01 and told.frozen < 1.4 * frozen
    peak = counted.peak + frozen + trained
    estimate = told.total - told.optimiser - RESERVE
    assert peak <= estimate < 1.5 * peak, (peak / 1e9, estimate / 1e9)
