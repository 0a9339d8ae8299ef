"""Parts of a pipeline in turn and by blocks: the same pictures, and nothing left on the device.

Here the device is the CPU itself: weights are copied to it as to any other.
"""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from krea2_model import Krea2Pipeline, block_stream, device_weights
from krea2_model.block_stream import BlockStream

SIZE = {"height": 64, "width": 64}
PROMPT = "a red circle on a blue background"
# Bytes of the device for nano in float32: all of its parts, the largest alone, not even that.
LIMITS = {"parts": 0.6, "blocks": 0.43}


class Device:
    """The copies that are alive on what stands for a device, in bytes, and the most there were."""

    def __init__(self):
        self.held = self.most = self.copies = 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        self.held += storage.nbytes()
        self.most, self.copies = max(self.most, self.held), self.copies + 1
        weakref.finalize(storage, self._freed, storage.nbytes())
        return tensor

    def _freed(self, count):
        self.held -= count


@pytest.fixture
def device(monkeypatch):
    found = Device()
    copied, new_bytes = device_weights.copied, block_stream.new_bytes
    monkeypatch.setattr(device_weights, "copied", lambda *a: found.add(copied(*a)))
    monkeypatch.setattr(
        BlockStream,
        "_new_buffer",
        lambda self, size: block_stream._Buffer(found.add(new_bytes(size, self.device))),
    )
    return found


@pytest.fixture(scope="module")
def plain():
    return Krea2Pipeline.nano()


@pytest.fixture
def offloaded(plain):
    """Nano's parts, which lie in main memory, in a pipeline that offloads them."""

    def make(mode, **options):
        parts = (plain.transformer, plain.text_encoder, plain.vae)
        return Krea2Pipeline(*parts, offload=mode, **options)

    return make


def places(pipeline):
    """Where each weight is."""
    return {
        (part, name): tensor.data_ptr()
        for part in ("transformer", "text_encoder", "vae")
        for name, tensor in getattr(pipeline, part).state_dict().items()
    }


@contextmanager
def nothing_left(pipeline, device):
    before = places(pipeline)
    yield
    gc.collect()
    assert places(pipeline) == before
    assert device.copies > 0 and device.held == 0
    assert not any(module._forward_hooks for module in pipeline.transformer.modules())


def picture(seed=3):
    pixels = torch.rand(128, 128, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels * 255).byte().numpy())


RUNS = {
    "text": {},
    "guided": {"guidance": 2.0, "negative_prompt": "a blue square", "num_images": 2},
    "images": {"start_image": picture(1), "denoise": 0.6, "references": [picture(2)]},
    "seen": {"images": [picture(4)], "references_apart": True, "references": [picture(2)]},
}


@pytest.mark.parametrize("mode", ["parts", "blocks"])
@pytest.mark.parametrize("run", RUNS)
def test_pictures_are_the_same_to_the_bit(plain, offloaded, device, mode, run):
    options = {"steps": 2, **SIZE, "output_type": "pt", **RUNS[run]}
    expected = plain(PROMPT, **options)
    pipeline = offloaded(mode)
    with nothing_left(pipeline, device):
        for _ in range(2):
            assert torch.equal(pipeline(PROMPT, **options), expected)
