"""Parts of a pipeline in turn and by blocks: the same pictures, and nothing left on the device.

Here the device is the CPU itself: weights are copied to it as to any other.
"""

import gc
import logging
import weakref
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from krea2_model import Control, Krea2Pipeline, Region, load_transformer, nano
from krea2_model.checkpoints.quantised_layers import QuantisedLinear
from krea2_model.features.arguments import References
from krea2_model.memory import block_stream, device_weights
from krea2_model.memory import plan as memory_plan
from krea2_model.memory.activations import activations
from krea2_model.memory.block_stream import PLACES, BlockStream, pack_bytes
from krea2_model.tools.convert import convert
from parity import assert_close
from samples import random, saved

SIZE = {"height": 64, "width": 64}
PROMPT = "a red circle on a blue background"


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
    copy_to, new_bytes = device_weights.copy_to, block_stream.new_bytes
    monkeypatch.setattr(device_weights, "copy_to", lambda *a: found.add(copy_to(*a)))
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
    "guided": {"guidance": 2.0, "negative_prompt": "a blue square", "num_images": 2},
    "seen": {"images": [picture(4)], "references": References([picture(2)], cache=True)},
    "image": {"start_image": picture(1), "denoise": 0.6, "references": [picture(2)]},
    "regions": {
        "regions": [
            Region("a blue star", (0, 0, 0.5, 1), loras=[(nano.LORA, 0.8)]),
            Region(box=(0.5, 0, 0.5, 1), loras=[(nano.REFERENCE_LORA, 1.0)]),
        ]
    },
    "controlled": {"control": Control(nano.CONTROL_LORA, picture(5), 0.7)},
}


@pytest.mark.parametrize(
    "mode, run",
    [("parts", "guided"), *(("blocks", run) for run in ("seen", "image", "regions", "controlled"))],
)
def test_pictures_are_the_same_to_the_bit(plain, offloaded, device, mode, run):
    options = {"steps": 1, "output_type": "pt", **SIZE, **RUNS[run]}
    expected = plain(PROMPT, **options)
    pipeline = offloaded(mode)
    with nothing_left(pipeline, device), torch.inference_mode(run == "image"):
        for _ in range(1 + (run == "image")):
            assert torch.equal(pipeline(PROMPT, **options), expected)


def test_a_lora_in_a_region_that_reads_weights_finds_them_by_blocks(
    plain, offloaded, device, tmp_path
):
    """DoRA needs the norms of a weight, which is on the device only while its block calculates."""
    layer = "blocks.3.mlp.up"
    rows, columns = plain.transformer.get_submodule(layer).weight.shape
    parts = {"lora_A.weight": (4, columns), "lora_B.weight": (rows, 4), "dora_scale": (rows, 1)}
    tensors = {f"{layer}.{name}": random(*shape) for name, shape in parts.items()}
    file = saved(tmp_path / "dora.safetensors", tensors)
    options = {"steps": 1, "output_type": "pt", **SIZE}
    options["regions"] = [Region("a blue star", (0, 0, 0.5, 1), loras=[(file, 0.6)])]
    expected, pipeline = plain(PROMPT, **options), offloaded("blocks")
    with nothing_left(pipeline, device):
        assert torch.equal(pipeline(PROMPT, **options), expected)
    other = options | {"regions": [Region("a blue star", (0, 0, 0.5, 1))]}
    assert not torch.equal(plain(PROMPT, **other), expected)


@pytest.fixture(scope="module")
def given(plain):
    """Options of a run that needs no text encoder."""
    taps, _ = plain.text_encoder.encode([PROMPT])
    return {"prompt_embeds": taps, "steps": 1, "output_type": "latent", **SIZE}


@pytest.mark.parametrize(
    "mode, error", [("parts", KeyboardInterrupt), ("blocks", torch.OutOfMemoryError)]
)
def test_a_run_that_breaks_off_leaves_nothing(plain, offloaded, device, given, mode, error):
    pipeline, expected = offloaded(mode), plain(**given)

    def stop(*_):
        raise error("enough")

    with nothing_left(pipeline, device):
        with pytest.raises(error, match="enough"):
            pipeline(**given, callback=stop)
        # In the middle of a block, and while weights come.
        handle = pipeline.transformer.blocks[2].mlp.register_forward_hook(stop)
        with pytest.raises(error, match="enough"):
            pipeline(**given)
        handle.remove()
        assert torch.equal(pipeline(**given), expected)


def test_memory_that_runs_out_while_weights_come(plain, offloaded, device, given, monkeypatch):
    pipeline, expected, copy_to = offloaded("parts"), plain(**given), device_weights.copy_to

    def run_out(tensor, where):
        if tensor.shape == plain.transformer.last.linear.weight.shape:
            raise torch.OutOfMemoryError("no room")
        return copy_to(tensor, where)

    with nothing_left(pipeline, device):
        with monkeypatch.context() as patch:
            patch.setattr(device_weights, "copy_to", run_out)
            with pytest.raises(torch.OutOfMemoryError):
                pipeline(**given)
        assert torch.equal(pipeline(**given), expected)


def test_loras_come_and_go(plain, offloaded, device, given):
    pipeline, before = offloaded("blocks"), plain(**given)
    with nothing_left(pipeline, device):
        assert torch.equal(pipeline(**given), before)
        plain.load_lora(nano.LORA, 0.7)
        expected = plain(**given)
        plain.unload_lora()
        pipeline.load_lora(nano.LORA, 0.7)
        assert torch.equal(pipeline(**given), expected) and not torch.equal(expected, before)
        pipeline.unload_lora()
        assert torch.equal(pipeline(**given), before)
        with pytest.raises(ValueError, match="load_lora was"):
            pipeline(**given, callback=lambda *_: pipeline.load_lora(nano.LORA))
    assert torch.equal(plain(**given), before)


def test_guidance_is_one_call_where_there_is_room(plain, offloaded, given, monkeypatch):
    taps = given["prompt_embeds"]
    pipeline = offloaded("auto")
    options = {**given, "negative_prompt_embeds": taps[:, :4], "guidance": 2.0}
    calls = []
    handle = plain.transformer.blocks[0].register_forward_pre_hook(
        lambda block, arguments: calls.append(len(arguments[0]))
    )
    found = pipeline(**options)
    assert calls == [2]
    monkeypatch.setattr(type(pipeline._offload), "has_room", lambda *a, **k: False)
    expected = pipeline(**options)
    handle.remove()
    assert calls == [2, 1, 1]
    assert_close(found, expected, 1e-5, "a pipeline's guidance in one call")


def test_a_preview_may_be_decoded_during_a_run(plain, offloaded, device, given):
    pipeline, seen = offloaded("parts"), []
    with nothing_left(pipeline, device):
        pipeline(**given, callback=lambda step, latents, x0: seen.append(pipeline.decode(x0)))
    assert len(seen) == 1 and seen[0].shape == (1, 3, 64, 64)


def test_a_cpu_holds_everything_once(offloaded, device, given, caplog):
    with caplog.at_level(logging.INFO):
        offloaded("auto")(**given)
    assert device.copies == 0
    assert [r.message for r in caplog.records if "offload" in r.message] == [
        "device cpu: offload none (encoder 0.1 GB, transformer 0.0 GB, VAE 0.0 GB, all at once)"
    ]


def test_what_is_on_the_device_keeps_to_the_limit(plain, offloaded, device, given, monkeypatch):
    """With max_memory blocks stay as far as they fit; what there is never exceeds it."""
    monkeypatch.setattr(memory_plan, "RESERVE", 0)
    parts = (plain.transformer, plain.text_encoder, plain.vae)
    tokens = given["prompt_embeds"].shape[1]
    estimates = activations(*parts, batch=1, image=16, text=tokens)
    size = offloaded("auto")._offload._parts["transformer"].size(estimates["transformer"])
    for count in (3, 0):
        limit = (size.streaming(count) + 1000) / 1e9
        pipeline, device.most = offloaded("auto", max_memory=limit), 0
        pipeline(**given)
        assert pipeline._offload.plan.resident["transformer"] == count
        held = size.streaming(count) - size.activations
        assert 0.9 * held < device.most <= held


class Layer(torch.nn.Linear):
    """A block of a made-up model that tells when it runs."""

    def forward(self, hidden, log):
        log.append(self)
        return super().forward(hidden)


def stream_of(count=6, **options):
    torch.manual_seed(0)
    blocks = [Layer(4, 4).requires_grad_(False) for _ in range(count)]
    return blocks, BlockStream(blocks, torch.device("cpu"), **options)


def test_the_next_block_comes_while_one_calculates(monkeypatch):
    blocks, stream = stream_of(resident=2, host_bytes=10**6)
    order, log = [], []
    bring = BlockStream._bring
    monkeypatch.setattr(BlockStream, "_bring", lambda self, at: order.append(at) or bring(self, at))
    hidden = torch.ones(1, 4)
    expected = [block(hidden, []) for block in blocks]
    stream.start()
    for _ in range(2):
        for block, value in zip(blocks, expected, strict=True):
            assert torch.equal(block(hidden, log), value)
    assert stream.streamed == [0, 2, 3, 5] and len(stream._places) == PLACES
    # Each once a pass, the following one behind the call that frees a place for it.
    assert order == [0, 2, 3, 5, 0, 2, 3, 5, 0]
    assert stream._staying.keys() == {1, 4}
    assert len(stream._packs) == 4 and not stream._staging[2:]
    stream.stop()
    assert [torch.equal(block(hidden, log), e) for block, e in zip(blocks, expected, strict=True)]


def test_packs_are_kept_until_weights_change():
    blocks, stream = stream_of(host_bytes=3 * pack_bytes(Layer(4, 4)))
    hidden, log = torch.ones(1, 4), []

    def run():
        stream.start()
        values = [block(hidden, log) for block in blocks]
        stream.stop()
        return values

    first = run()
    # As many as there is room for; the others go through two buffers.
    packs = {index: pack for index, (_, pack) in stream._packs.items()}
    assert len(packs) == 3
    run()
    assert all(stream._packs[index][1] is pack for index, pack in packs.items())
    blocks[1].weight.data = 2 * blocks[1].weight.data
    blocks[2].bias += 1
    second = run()
    assert not torch.equal(second[1], first[1]) and not torch.equal(second[2], first[2])
    assert [torch.equal(block(hidden, log), v) for block, v in zip(blocks, second, strict=True)]
    assert stream._packs[0][1] is packs[0] and stream._packs[1][1] is not packs[1]


def test_blocks_run_in_any_order_and_few_ones_stay():
    blocks, stream = stream_of()
    hidden, log = torch.ones(1, 4), []
    expected = [block(hidden, log) for block in blocks]
    stream.start()
    for index in (3, 3, 0, 5, 1):
        assert torch.equal(blocks[index](hidden, log), expected[index])
    stream.stop()
    stream.resident = 4  # two would stream, and there are two places
    assert stream.streamed == [] and stream.resident == 6


@pytest.mark.parametrize(
    "options, words",
    [
        ({"offload": "some"}, "offload is 'some'; expected one of auto, none, parts, blocks"),
        ({"max_memory": 0}, "max_memory is 0; expected GB above 0, such as 12"),
        ({"max_memory": True}, "max_memory is True"),
        ({"max_memory": 8, "offload": "none"}, "offload 'none' keeps every part on the device"),
        ({"device": "gpu"}, "device is 'gpu'; expected 'auto', 'cpu', 'cuda'"),
        ({"device": "cuda:9"}, "torch finds 0 CUDA devices here"),
    ],
)
def test_bad_arguments_are_refused_before_any_file_is_read(options, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=words):
        Krea2Pipeline.from_files("none", "none", "none", **options)


def test_quantised_files_stay_quantised(plain, device, given, tmp_path):
    path = tmp_path / "turbo.safetensors"
    convert(nano.TRANSFORMERS["turbo"], path, "int8")
    made_plain = load_transformer(path, dtype=torch.float32)
    expected = Krea2Pipeline(made_plain, plain.text_encoder, plain.vae)(**given)
    pipeline = Krea2Pipeline.from_files(
        path, nano.text_encoder_file(), nano.VAE, dtype=torch.float32, offload="blocks"
    )
    assert isinstance(pipeline.transformer.blocks[0].mlp.up, QuantisedLinear)
    with nothing_left(pipeline, device):
        assert torch.equal(pipeline(**given), expected)
    pipeline.load_lora(nano.LORA)
    changed = pipeline(**given)
    pipeline.unload_lora()
    assert torch.equal(pipeline(**given), expected) and not torch.equal(changed, expected)


class LateLane(block_stream.Lane):
    """Copies as late as a device may: when somebody waits for them."""

    def __init__(self):
        self.jobs = []
        # Buffers that the device may still read, as far as the host knows.
        self.read = {}

    def copy(self, target, source, after):
        self.jobs.append((target, source))
        self.read[source.data_ptr()] = len(self.jobs)
        return len(self.jobs)

    def wait(self, done):
        """The device waits; the host goes on."""
        for index, job in enumerate(self.jobs[:done]):
            if job is not None:
                job[0].copy_(job[1])
                self.jobs[index] = None

    def finish(self, done=None):
        self.wait(done)
        self.read = {at: job for at, job in self.read.items() if done is not None and job > done}


@pytest.mark.parametrize("host_bytes", [0, 10**6])
@pytest.mark.parametrize("resident", [0, 3])
def test_nothing_is_used_before_it_came_or_overwritten_before_it_left(
    monkeypatch, host_bytes, resident
):
    lane = LateLane()
    monkeypatch.setattr(block_stream, "lane_for", lambda device: lane)
    pack = BlockStream._pack

    def checked(self, index, memory):
        assert memory.data_ptr() not in lane.read
        pack(self, index, memory)

    monkeypatch.setattr(BlockStream, "_pack", checked)
    blocks, stream = stream_of(7, host_bytes=host_bytes, resident=resident)
    hidden, log = torch.ones(1, 4), []
    expected = [block(hidden, log) for block in blocks]
    stream.start()
    for _ in range(3):
        for block, value in zip(blocks, expected, strict=True):
            assert torch.equal(block(hidden, log), value)
    # The next one is on its way, and stopping waits for it.
    assert lane.jobs[-1] is not None
    stream.stop()
    assert lane.jobs[-1] is None and len(lane.jobs) == resident + 3 * (7 - resident) + 1
