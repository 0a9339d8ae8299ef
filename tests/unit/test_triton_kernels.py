"""The Triton kernels beside plain torch: in Triton's interpreter, and compiled for a GPU."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F

import krea2_model.checkpoints.gguf as gguf
from benchmarks.interpreter import interpreted
from benchmarks.traffic import Counter
from krea2_model.nn import kernels, switches, triton_kernels
from samples import random

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What one rounding to a dtype changes at most, relatively.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Off until a test turns them on."""
    with interpreted(triton_kernels), switches.switched():
        yield


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that ran."""
    from krea2_model.nn.triton_kernels import gates
    from krea2_model.nn.triton_kernels import gguf as blocks

    names: list[str] = []

    def record(module, function):
        original = getattr(module, function)

        def recorded(*arguments, **options):
            names.append(options.get("silu", arguments[1] if function == "dequantise" else None))
            return original(*arguments, **options)

        monkeypatch.setattr(module, function, recorded)

    record(gates, "gated")
    record(blocks, "dequantise")
    return names


def random_blocks(name: str, count: int, seed: int = 0) -> torch.Tensor:
    """Every bit pattern, but scales (float16) that are infinite or no number."""
    form = gguf.FORMATS[name]
    shape = (count, form.block_bytes)
    data = torch.randint(
        256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    for byte in {"Q2_K": (81, 83), "Q3_K": (109,), "Q6_K": (209,)}.get(name, (1, 3)):
        data[:, byte] &= 0xBF
    return data


@pytest.mark.parametrize("name", gguf.FORMATS)
def test_blocks_are_bit_for_bit_those_of_torch(name, launches):
    """In every dtype, with a last program that is not full, from an address that is not round."""
    form = gguf.FORMATS[name]
    rows = 2048 // form.block_values  # of one program
    for count in (1, rows + 3):
        # Two bytes into a memory of their own.
        data = torch.zeros(2 + count * form.block_bytes, dtype=torch.uint8)[2:].view(
            count, form.block_bytes
        )
        data.copy_(random_blocks(name, count))
        shape = (count * form.block_values // 32, 32)
        for dtype in DTYPES:
            expected = gguf.dequantise(data, name, shape, dtype)
            assert launches == []
            with switches.switched("gguf"):
                values = gguf.dequantise(data, name, shape, dtype)
            assert launches.pop() == name
            assert values.dtype == dtype and values.std() > 0
            assert torch.equal(values, expected), (name, count, dtype)


def test_what_the_kernel_cannot_read_is_read_by_torch(launches):
    """Bytes at an odd address, bytes with gaps, dtypes it does not write, no bytes at all."""
    data = random_blocks("Q8_0", 6)
    odd = torch.cat((data.new_zeros(1), data.flatten()))[1:].view(6, 34)
    gaps = torch.cat((data, data), dim=1)[:, :34]
    expected = gguf.dequantise(data, "Q8_0", (6, 32))
    with switches.switched("gguf"):
        for stored in (odd, gaps):
            assert torch.equal(gguf.dequantise(stored, "Q8_0", (6, 32)), expected)
        eight = gguf.dequantise(data, "Q8_0", (6, 32), torch.float8_e4m3fn)
        assert eight.dtype is torch.float8_e4m3fn and launches == []
        assert gguf.dequantise(data[:0], "Q8_0", (0, 32), torch.bfloat16).shape == (0, 32)


def test_a_compiler_sees_blocks_as_one_operator(launches):
    data = random_blocks("Q4_K", 8)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def weights(blocks):
        return gguf.dequantise(blocks, "Q4_K", (8, 256), torch.bfloat16) * 2

    with switches.switched("gguf"):
        values = torch.compile(weights, backend=backend, fullgraph=True)(data)
        assert torch.equal(values, weights(data))
    assert any("gguf.values" in name for name in seen) and len(seen) <= 4, seen
    assert launches == ["Q4_K", "Q4_K"]


def gated(gate, values, silu):
    function = kernels.silu_gated if silu else kernels.sigmoid_gated
    return function(gate, values) if silu else function(values, gate)


@pytest.mark.parametrize("silu", [True, False], ids=["swiglu", "gate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_products_are_rounded_once(silu, dtype, launches):
    """Half a step from the exact product, where torch's own are up to a step and a half."""
    for shape in ((1, 1, 1), (2, 7, 293), (1, 3, 2048)):
        gate, values = 4 * random(*shape).to(dtype), random(*shape, seed=1).to(dtype)
        wide, factor = gate.double(), values.double()
        exact = (F.silu(wide) if silu else wide.sigmoid()) * factor
        with torch.no_grad():
            plain = gated(gate.clone(), values.clone(), silu)
            with switches.switched("swiglu", "gate"):
                result = gated(gate, values, silu)
        assert launches.pop() is silu and not launches
        assert result is (gate if silu else values), "in place"
        # float32 has no wider one to be computed in: exponential, sum, quotient and products.
        step = ROUNDING[dtype] * (8 if dtype is torch.float32 else 1.01)
        least = torch.finfo(dtype).smallest_normal
        assert ((result.double() - exact).abs() <= step * exact.abs() + least).all()
        apart = (result.double() - plain.double()).abs()
        assert (apart <= 3 * step * exact.abs() + least).all()


def test_gates_far_out():
    gate = torch.tensor([-200.0, -88.0, 0.0, 200.0, float("nan")])
    for silu in (True, False):
        plain = gated(gate.clone(), torch.ones(5), silu)
        with torch.no_grad(), switches.switched("swiglu", "gate"):
            result = gated(gate.clone(), torch.ones(5), silu)
        assert torch.allclose(result, plain, rtol=1e-6, atol=1e-37, equal_nan=True)


def test_when_gated_products_are_left_to_torch(launches):
    gate, values = random(3, 8), random(3, 8, seed=1)
    wide = random(3, 16, seed=2)[:, :8]
    expected = F.silu(gate) * values
    with switches.switched("swiglu"):
        # Gradients, which the kernel has none of.
        slope = gate.clone().requires_grad_()
        kernels.silu_gated(slope, values).sum().backward()
        assert slope.grad.abs().sum() > 0
        with torch.no_grad():
            for tensor, factor in ((gate.clone(), values[:1]), (wide, values)):
                plain = F.silu(tensor) * factor
                assert torch.allclose(kernels.silu_gated(tensor, factor), plain)
            assert kernels.silu_gated(gate.double(), values.double()).dtype is torch.float64
            # Its own switch, which is off.
            kernels.sigmoid_gated(values.clone(), gate.clone())
        assert launches == []
        with torch.no_grad(), kernels.keeping_inputs():
            before = gate.clone()
            result = kernels.silu_gated(gate, values)
        assert launches == [True] and torch.equal(gate, before)
    assert torch.allclose(result, expected)


def test_bytes_that_torch_moves_and_one_launch_instead(launches):
    """For a value of Q4_K over 25 bytes, where 144 / 256 + 2 are enough; for a product five
    times its tensor, where two are read and one is written."""
    data = random_blocks("Q4_K", 64)
    gate, values = random(2, 1, 64, 512).bfloat16()
    with torch.no_grad(), Counter() as blocks:
        gguf.dequantise(data, "Q4_K", (64, 256), torch.bfloat16)
    with torch.no_grad(), Counter() as product:
        kernels.silu_gated(gate, values)
    assert blocks.traffic / (64 * 256) > 25
    assert product.traffic == 5 * 2 * gate.numel()
    with torch.no_grad(), switches.switched("swiglu", "gguf"):
        kernels.silu_gated(gate, values)
        gguf.dequantise(data, "Q4_K", (64, 256), torch.bfloat16)
    assert launches == [True, "Q4_K"]


@pytest.fixture
def card(monkeypatch):
    """Pretend that a compute capability is there, and its device has not been tried yet."""

    def pretend(*capability):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        triton_kernels._works_on.cache_clear()
        return triton_kernels._works_on(torch.device("cpu"))

    yield pretend
    triton_kernels._works_on.cache_clear()


def test_cards_that_have_triton(card, monkeypatch, caplog):
    assert card(8, 0) and card(9, 0) and not card(7, 5)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not triton_kernels._works_on(torch.device("cuda")), "another maker's"
    assert not caplog.messages


def test_where_triton_is_missing_or_broken_torch_runs(card, monkeypatch, caplog):
    """Missing it is no fault; one that fails, as without a C compiler, is told once."""
    from krea2_model.nn.triton_kernels import gates

    def fails(*arguments, **options):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gates, "gated", fails)
    assert not card(9, 0) and "Failed to find C compiler" in caplog.text
    caplog.clear()
    monkeypatch.setitem(sys.modules, gates.__name__, None)
    assert not card(9, 0) and not caplog.messages


GPUS = (80, 90)


@pytest.mark.parametrize("name", [*gguf.FORMATS, "gated"])
def test_kernels_compile_for_a_gpu(name, tmp_path, monkeypatch):
    """The interpreter takes more than the compiler does. Whole sectors are written at once."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assembly = compiled_for(name, GPUS[len(name) % 2])
    assert "st.global.v4.b32" in assembly
    if name in ("Q4_K", "Q5_K"):
        assert "ld.global.v4.b32" in assembly, "packed halves are read 16 bytes at a time"


def compiled_for(name: str, capability: int) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    module = f"krea2_model.nn.triton_kernels.{'gates' if name == 'gated' else 'gguf'}"
    emulated = sys.modules.pop(module)
    try:
        declared = importlib.import_module(module)
    finally:
        sys.modules[module] = emulated
    if name == "gated":
        kernel = declared._gated
        pointers, constants = ("gate", "values", "out"), {"SILU": True, "TILE": declared.TILE}
        types = {pointer: "*bf16" for pointer in pointers}
    else:
        kernel, form = declared._dequantise, gguf.FORMATS[name]
        types = {"data": "*u8", "out": "*bf16"}
        constants = {"FORMAT": name, "SIZE": form.block_bytes, "VALUES": form.block_values,
                     "ROWS": declared.TILE // form.block_values}  # fmt: skip
    signature = types | {"count": "i32"} | dict.fromkeys(constants, "constexpr")
    # As Triton finds them at a launch: pointers, and the number of products, divisible by 16.
    aligned = {
        (index,): [["tt.divisibility", 16]] for index in range(len(types) + (name == "gated"))
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return compile(source, target=target, options={"num_warps": 4}).asm["ptx"]
