"""Windows, macOS and every kind of device: nothing in the pack that only Linux or CUDA has."""

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_checkpoints
from krea2_model.nn.attention import rope_table
from krea2_model.text.encoder import Qwen3VLTextEncoder
from krea2_model.transformer.model import Krea2Transformer
from krea2_model.vae.model import QwenImageVAE

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "__init__.py",
        *ROOT.glob("nodes/**/*.py"),
        *ROOT.glob("krea2_model/**/*.py"),
    )
)

# What Python has on some systems only.
POSIX_MODULES = {"crypt", "curses", "fcntl", "grp", "posix", "pty", "pwd", "readline", "resource",
                 "spwd", "syslog", "termios", "tty"}  # fmt: skip
# `os.x` and `path.x`; links need a privilege on Windows.
POSIX_CALLS = {"chown", "chroot", "fchmod", "fork", "forkpty", "getegid", "geteuid", "getgid",
               "getloadavg", "getpgid", "getuid", "killpg", "lchown", "link", "mkfifo", "mknod",
               "nice", "openpty", "pread", "pwrite", "sched_getaffinity", "sendfile", "setsid",
               "statvfs", "symlink", "symlink_to", "hardlink_to", "sync", "sysconf", "uname",
               "wait4", "waitpid"}  # fmt: skip
TEXT_CALLS = {"open", "read_text", "write_text"}
# ComfyUI's device functions choose; these name one.
DEVICE_CALLS = {"cuda", "xpu", "mps", "autocast", "empty_cache", "current_device", "set_device"}
DEVICES = {"cuda", "xpu", "mps", "hip", "npu", "mlu", "directml", "privateuseone"}


def calls(tree):
    """Each call with the last part of what is called: `path.open(...)` is "open"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            yield (
                node,
                function.attr
                if isinstance(function, ast.Attribute)
                else getattr(function, "id", ""),
            )


def system_faults(tree):
    """Lines of what Windows or macOS lacks, or does otherwise."""
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [(node.module or "").partition(".")[0]]
        if POSIX_MODULES & set(modules):
            yield node.lineno, f"imports {modules}"
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and text.startswith(("/tmp", "/dev/", "/proc/", "/sys/", "/etc/")):
            yield node.lineno, f"the path {text!r}"
    for call, name in calls(tree):
        if name in POSIX_CALLS:
            yield call.lineno, f"calls {name}"
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        binary = any(
            isinstance(a, ast.Constant) and a.value in ("rb", "wb", "xb") for a in arguments
        )
        encoded = any(keyword.arg == "encoding" for keyword in call.keywords)
        if name in TEXT_CALLS and not (binary or encoded):
            # Windows' default is the code page of its language.
            yield call.lineno, f"calls {name} for text without an encoding"


def device_faults(tree):
    """Lines that choose a device instead of asking ComfyUI for it, or want what not all have."""
    for call, name in calls(tree):
        if name in DEVICE_CALLS:
            yield call.lineno, f"calls {name}"
        chosen = [k.value for k in call.keywords if k.arg == "device"]
        for argument in (*chosen, *(call.args if name in ("to", "device") else ())):
            value = argument.value if isinstance(argument, ast.Constant) else None
            if str(value).partition(":")[0] in DEVICES:
                yield call.lineno, f"chooses {value!r}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("float64", "double", "complex128"):
            yield node.lineno, node.attr


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_only_linux_has(source):
    tree = ast.parse((ROOT / source).read_text(encoding="utf-8"))
    assert not list(system_faults(tree))
    if not source.startswith("krea2_model"):
        assert not list(device_faults(tree))


@pytest.mark.parametrize(
    "line",
    ["import fcntl", "from resource import getrusage", "os.fork()", "a.symlink_to(b)",
     "path.read_text()", "open(path)", "open(path, 'w')", "Path('/tmp/x')"],
)  # fmt: skip
def test_the_walk_finds_what_only_linux_has(line):
    assert list(system_faults(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    ["x.cuda()", "x.to('cuda')", "torch.zeros(2, device='cuda:1')", "torch.device('mps')",
     "torch.cuda.empty_cache()", "torch.autocast('cuda')", "x.double()", "x.to(torch.float64)"],
)  # fmt: skip
def test_the_walk_finds_devices_and_doubles(line):
    assert list(device_faults(ast.parse(line)))


class NoDoubles(TorchDispatchMode):
    """A device like Apple's, played by meta: no float64 and no complex numbers on it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                wide = (torch.float64, torch.complex64, torch.complex128)
                assert tensor.dtype not in wide, f"{function} gives {tensor.dtype} on the device"
        return result


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr("krea2_model.nn.kernels._has_complex_numbers", lambda device: False)
    with NoDoubles(), torch.inference_mode():
        yield torch.device("meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformer_without_float64(device, dtype):
    config = tiny_checkpoints.TRANSFORMER
    model = Krea2Transformer(config, device=device, dtype=dtype)
    taps = torch.empty(
        2, 7, config.num_text_layers, config.text_hidden_dim, device=device, dtype=dtype
    )
    latents = torch.empty(2, 16, 8, 12, device=device, dtype=dtype)
    time = torch.empty(2, device=device)
    velocity = model(latents, time, model.fuse_text(taps), references=[latents])
    assert velocity.shape == latents.shape


def test_text_encoder_without_float64(device):
    config = tiny_checkpoints.TEXT_ENCODER
    encoder = Qwen3VLTextEncoder(config, device=device)
    taps = encoder(torch.zeros(1, 9, dtype=torch.long, device=device))
    assert taps.shape == (1, 9, len(config.tap_layers), config.hidden_size)


def test_vae_without_float64(device):
    vae = QwenImageVAE(tiny_checkpoints.VAE, device=device)
    latents = vae.encode(torch.empty(1, 3, 64, 96, device=device))
    assert latents.shape == (1, 16, 8, 12)
    assert vae.decode(latents).shape == (1, 3, 64, 96)


def test_the_stand_in_device_refuses_float64():
    positions = torch.zeros(1, 3, 3, device="meta")
    with NoDoubles():
        rope_table(torch.zeros(1, 3, 3), (8, 12, 12), 1e3).to("meta")
        with pytest.raises(AssertionError, match="float64 on the device"):
            positions.double()
