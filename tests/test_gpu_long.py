"""The kernels for long sequences on a GPU, over the whole range of lengths."""

import math

import pytest
import torch
from kernel_cases import (
    ALL,
    DTYPES,
    GATES,
    case,
    check,
    check_layouts,
    check_memory,
    check_not_finite,
    check_values,
    gradients,
    make,
)
from test_gpu_values import tf32

from hf_flashfftconv import fft_conv
from hf_flashfftconv.ops import cuda
from hf_flashfftconv.ops.plan import MAX_FFT_SIZE, Plan, choose

__all__ = ["tf32"]
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("without_clusters")]

SIZES = [1 << n for n in range(14, MAX_FFT_SIZE.bit_length())]
PLANS = [Plan(size, folded) for folded in (False, True) for size in SIZES]


def shape(points: int) -> dict[str, int]:
    """An odd batch, and as many channels as the float64 reference leaves room for."""
    return {"batch": 3 if points > 1 << 20 else 5, "channels": max(1, min(13, (1 << 24) // points))}


@pytest.mark.parametrize("options", [(), ALL], ids="+".join)
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_transform(plan: Plan, dtype: torch.dtype, options: tuple[str, ...]) -> None:
    lengths = case(plan)
    assert choose(lengths["length"], lengths["taps"], lengths["reverse_taps"], True, in_clusters=False) == plan
    assert plan.is_long
    check(make(**lengths, options=options, dtype=dtype, **shape(plan.fft_size), device="cuda"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_circular(size: int, dtype: torch.dtype) -> None:
    check(make(size, size, (*GATES, "skip"), dtype=dtype, **shape(size), device="cuda"), causal=False)


@pytest.mark.parametrize("length", [8193, 10001, 16384, 16385, 30000, 65536, 99999, 524288, 1000002])
@pytest.mark.parametrize("batch, channels", [(1, 1), (1, 30), (64, 2), (7, 9)])
def test_lengths_and_batches(length: int, batch: int, channels: int) -> None:
    if batch * channels * length > 1 << 26:
        channels = 1
    check(make(length, length, (*GATES, "skip"), batch=batch, channels=channels, device="cuda"))


@pytest.mark.parametrize("length", [8193, 12288, 65537, 1 << 20])
@pytest.mark.parametrize("taps, reverse_taps", [(1, 0), (300, 0), (4097, 0), (100, 8000)])
def test_short_filters(length: int, taps: int, reverse_taps: int) -> None:
    options = ALL if reverse_taps else (*GATES, "skip")
    check(make(length, taps, options, reverse_taps=reverse_taps, channels=3, device="cuda"))


@pytest.mark.parametrize("length", [16384, 65536, 600000])
@pytest.mark.parametrize("scaled", ["u", "k", *GATES])
@pytest.mark.parametrize(
    "dtype, exponents", [(torch.float16, (-12, 6)), (torch.bfloat16, (-60, 60)), (torch.float32, (-60, 60))], ids=str
)
def test_scales(length: int, scaled: str, dtype: torch.dtype, exponents: tuple[int, ...]) -> None:
    arguments = make(length, length, (*GATES, "skip"), dtype=dtype, channels=3, device="cuda")
    for exponent in exponents:
        both = (scaled, "skip") if scaled == "k" else (scaled,)
        check(arguments | {name: arguments[name] * 2.0**exponent for name in both})


@pytest.mark.parametrize("length", [9000, 9001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_gives_the_same_bits(length: int, dtype: torch.dtype) -> None:
    check_layouts(make(length, length, GATES, dtype=dtype, channels=5, device="cuda"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["u", *GATES, "dy"])
@pytest.mark.parametrize("length", [20000, 600000])
def test_not_finite_rows_keep_to_themselves(name: str, value: float, length: int) -> None:
    check_not_finite(make(length, length, GATES, batch=5, channels=3, device="cuda"), name, value, shared=False)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_same_bits_every_time(plan: Plan) -> None:
    channels = max(2, min(100, (1 << 24) // plan.fft_size))
    arguments = make(**case(plan), options=ALL, batch=9, channels=channels, device="cuda")
    dy = torch.randn_like(arguments["u"])
    y, expected = gradients(arguments, dy)
    for _ in range(5):
        actual, grads = gradients(arguments, dy)
        assert torch.equal(actual, y) and all(torch.equal(grads[name], expected[name]) for name in arguments)


def test_unwritten_memory_is_never_read() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for size in (1 << 14, 1 << 19):
            check(make(size, size, ALL[:3], batch=3, channels=2, device="cuda"), causal=False)
    finally:
        torch.use_deterministic_algorithms(False)


def test_channels_in_blocks_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make(30000, 30000, ALL, reverse_taps=300, batch=3, channels=7, device="cuda")
    dy = torch.randn_like(arguments["u"])
    y, expected = gradients(arguments, dy)
    monkeypatch.setattr(cuda, "SPECTRUM_BYTES", 2 * 4 * 32768)
    monkeypatch.setattr(cuda._spectra, "max_bytes", 0)
    actual, grads = gradients(arguments, dy)
    assert torch.equal(actual, y) and all(torch.equal(grads[name], expected[name]) for name in arguments)


def test_a_captured_graph_gives_the_same_bits() -> None:
    arguments = make(30000, 30000, (*GATES, "skip"), batch=3, channels=7, device="cuda")
    y = fft_conv(**arguments, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fft_conv(**arguments, backend="cuda")
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, y)


@pytest.mark.parametrize("batch, share", [(64, 0.5), (1, 2.0)])
@pytest.mark.parametrize("length", [65536, 1 << 20])
def test_memory_beside_the_output(length: int, batch: int, share: float) -> None:
    check_memory(length, batch, 768 if batch * length == 65536 else 128 if batch == 1 else 32, share)


def test_more_elements_than_32_bits_count() -> None:
    batch, channels, length = 34, 1024, 65536
    u = torch.randn(1, channels, length, device="cuda", dtype=torch.bfloat16).repeat(batch, 1, 1)
    assert u.numel() > 2**31
    k = torch.randn(channels, length, device="cuda") / length**0.5
    y = fft_conv(u, k, backend="cuda")
    for channel in (0, channels - 1):
        part = {"u": u[:2, channel : channel + 1], "k": k[channel : channel + 1]}
        check_values(y[:2, channel : channel + 1], part)
        assert torch.equal(y[-2:, channel], y[:2, channel])
