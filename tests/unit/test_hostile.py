"""Damaged and hostile files: a clear error or a sound model, never another exception."""

import contextlib
import json
import random
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import formats
import tiny_checkpoints as tiny
from krea2_model import CheckpointError, load_transformer
from krea2_model.checkpoints.identify import read_header
from krea2_model.lora.files import read_lora
from krea2_model.tools.describe import describe


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    tensors = tiny.transformer_tensors()
    stored, _, metadata = formats.float8(tensors, "header")
    save_file(stored, folder / "fp8.safetensors", metadata)
    save_file(tensors, folder / "plain.safetensors")
    formats.gguf_file(tensors, folder / "model.gguf", "Q4_0")
    return folder


def header_end(content: bytes) -> int:
    if content[:4] == b"GGUF":
        return content.index(b"txtmlp.3.weight") + 64
    return 8 + struct.unpack("<Q", content[:8])[0]


@pytest.mark.parametrize("name", ["fp8.safetensors", "plain.safetensors", "model.gguf"])
def test_random_damage_to_headers(files, tmp_path, name):
    """Bytes changed, taken out and doubled at random, 60 times."""
    original = (files / name).read_bytes()
    end = header_end(original)
    dice, refused = random.Random(name), 0
    path = tmp_path / name
    for _ in range(60):
        content = bytearray(original)
        for _ in range(dice.choice((1, 1, 3, 10))):
            place = dice.randrange(min(end, len(content)))
            change = dice.randrange(4)
            if change == 0:
                content[place] = dice.randrange(256)
            elif change == 1:
                content[place] ^= 1 << dice.randrange(8)
            elif change == 2:
                del content[place : place + dice.randrange(1, 9)]
            else:
                content[place:place] = content[place : place + dice.randrange(1, 9)]
        path.write_bytes(content)
        try:
            load_transformer(path)
        except CheckpointError as error:
            refused += 1
            assert path.name in str(error)
        with contextlib.suppress(CheckpointError):
            describe(path)
    assert refused > 30


def rewritten(path, source, change):
    """A file with its header changed by a function."""
    content = source.read_bytes()
    end = header_end(content)
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])
    return path


def overlap(header):
    header["blocks.0.attn.wq.weight"]["data_offsets"] = header["blocks.0.attn.wo.weight"][
        "data_offsets"
    ]


def other_shape(header):
    header["blocks.0.attn.wq.weight"]["shape"] = [1 << 40, 1 << 40]


def negative(header):
    header["blocks.0.attn.wq.weight"]["shape"] = [-1, 256]


def unknown_dtype(header):
    header["blocks.0.attn.wq.weight"]["dtype"] = "Q9"


@pytest.mark.parametrize("change", [overlap, other_shape, negative, unknown_dtype])
def test_headers_that_lie(files, tmp_path, change):
    path = rewritten(tmp_path / "lie.safetensors", files / "plain.safetensors", change)
    with pytest.raises(CheckpointError, match="lie.safetensors"):
        load_transformer(path)


CLAIMS = {
    "header of 10 GB": struct.pack("<Q", 10_000_000_000) + b"{" + b" " * 1000,
    "header of 90 MB in a small file": struct.pack("<Q", 90_000_000) + b"{}",
    "header of 90 MB of numbers": struct.pack("<Q", 90_000_000)
    + b'{"a":['
    + b"1," * 44_999_996
    + b"1]}",
    "GGUF with 10^15 tensors": b"GGUF" + struct.pack("<IQQ", 3, 10**15, 0),
    "GGUF with a key of 10^15 bytes": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 10**15),
    "GGUF with 10^15 keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 10**15),
}


def test_claims_of_size_cost_neither_time_nor_memory(tmp_path):
    paths = []
    for number, content in enumerate(CLAIMS.values()):
        paths.append(tmp_path / f"claim {number}.safetensors")
        paths[-1].write_bytes(content + b"\0" * 4096)
    script = (
        "import sys, resource; from krea2_model import load_transformer, CheckpointError\n"
        "limit = 6 * 2**30; resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_transformer(path)\n"
        "    except CheckpointError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    for name, path in zip(CLAIMS, paths, strict=True):
        assert path.name in done.stdout, (name, done.stderr)
    assert int(done.stdout.split()[-1]) < 4_000_000


def test_a_lora_with_damaged_shapes_is_reported_and_not_applied():
    shapes = {"blocks.0.attn.wq.weight": (8, 8), "blocks.0.attn.wk.weight": (8, 8)}
    good = {
        "blocks.0.attn.wk.lora_A.weight": torch.ones(2, 8),
        "blocks.0.attn.wk.lora_B.weight": torch.ones(8, 2),
    }
    for down, up in (((2, 8), (8, 3)), ((0, 8), (8, 0)), ((8,), (8,)), ((2, 8, 1, 1), (8, 2))):
        bad = {
            "blocks.0.attn.wq.lora_A.weight": torch.ones(down),
            "blocks.0.attn.wq.lora_B.weight": torch.ones(up),
        }
        updates, _, report = read_lora({**good, **bad}, shapes)
        assert "blocks.0.attn.wk.weight" in updates
        if "blocks.0.attn.wq.weight" in updates:
            (update,) = updates["blocks.0.attn.wq.weight"]
            assert update.apply(torch.zeros(8, 8), 1.0).isfinite().all()
        else:
            assert set(bad) <= report.unmatched.keys()


def test_symbolic_links_are_followed(files, tmp_path):
    """How people share models between programs."""
    link = tmp_path / "linked.safetensors"
    link.symlink_to(files / "plain.safetensors")
    assert load_transformer(link).config == tiny.TRANSFORMER
    assert load_file(link).keys() == read_header(link).tensors.keys()
