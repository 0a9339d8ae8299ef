"""GGUF formats beside the gguf package's own dequantiser."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from krea2_model.checkpoints.gguf import FORMATS, dequantise

WRITABLE = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_FORMATS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def test_block_sizes_are_those_of_the_package():
    for name, form in FORMATS.items():
        assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]] == (
            form.block_values,
            form.block_bytes,
        )
    assert set(FORMATS) == {*WRITABLE, *K_FORMATS}


@pytest.mark.parametrize("name", WRITABLE)
def test_formats_that_can_be_written(name):
    values = np.random.default_rng(0).normal(size=(6, 256)).astype(np.float32)
    kind = GGMLQuantizationType[name]
    stored = quants.quantize(values, kind)
    expected = quants.dequantize(stored, kind)
    data = torch.from_numpy(np.ascontiguousarray(stored).view(np.uint8))
    assert torch.equal(dequantise(data, name, (6, 256)), torch.from_numpy(expected))


@pytest.mark.parametrize("name", [*WRITABLE, *K_FORMATS])
def test_random_blocks(name):
    """Every bit pattern but scales that are infinite or no number."""
    random = np.random.default_rng(1)
    data = random.integers(0, 256, size=(4, 3 * FORMATS[name].block_bytes), dtype=np.uint8)
    blocks = data.reshape(-1, FORMATS[name].block_bytes)
    # Where the halves (float16) lie: their exponent must not be all ones.
    halves = {"Q2_K": (81, 83), "Q3_K": (109,), "Q6_K": (209,), "Q8_0": (1,), "Q4_0": (1,),
              "Q5_0": (1,)}.get(name, (1, 3))  # fmt: skip
    for byte in halves:
        blocks[:, byte] &= 0xBF
    kind = GGMLQuantizationType[name]
    expected = quants.dequantize(data, kind)
    found = dequantise(torch.from_numpy(data), name, expected.shape)
    assert np.isfinite(expected).all() and expected.std() > 0
    assert torch.equal(found, torch.from_numpy(expected))
