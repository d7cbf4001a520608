"""The kernels on a device: values and gradients at real sizes, every basis input, scales, layouts, determinism."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    ALL,
    DTYPES,
    GATES,
    case,
    check,
    check_against_emulator,
    check_layouts,
    check_not_finite,
    check_values,
    gradients,
    make,
)
from numerics import all_pass_filter, impulses, tones
from torch import Tensor

from hf_flashfftconv import fft_conv
from hf_flashfftconv.ops.plan import MAX_TILE_FFT_SIZE, Plan, choose

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("without_clusters")]

SIZES = [256 << n for n in range((MAX_TILE_FFT_SIZE // 256).bit_length())]
PLANS = [Plan(size, False) for size in SIZES] + [Plan(size, True) for size in SIZES[1:]]


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    """float32 may be computed with the precision of TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("options", [(), (*GATES, "skip"), ALL], ids="+".join)
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_transform(plan: Plan, dtype: torch.dtype, options: tuple[str, ...]) -> None:
    lengths = case(plan)
    assert choose(lengths["length"], lengths["taps"], lengths["reverse_taps"], True, in_clusters=False) == plan
    check(make(**lengths, options=options, dtype=dtype, batch=5, channels=67, device="cuda"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_circular(size: int, dtype: torch.dtype) -> None:
    check(make(size, size, (*GATES, "skip"), dtype=dtype, batch=4, channels=33, device="cuda"), causal=False)


@pytest.mark.parametrize("length", [1, 2, 3, 127, 128, 129, 1000, 1023, 1024, 1025, 3001, 4096, 8191, 8192])
@pytest.mark.parametrize("batch, channels", [(1, 1), (1, 300), (64, 8), (7, 129)])
def test_lengths_and_batches(length: int, batch: int, channels: int) -> None:
    check(make(length, length, (*GATES, "skip"), batch=batch, channels=channels, device="cuda"))


@pytest.mark.parametrize("length", [1024, 8192])
def test_the_size_of_a_model(length: int) -> None:
    check(make(length, length, (*GATES, "skip"), batch=8, channels=768, device="cuda"))


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(1, 8192),
    taps=st.integers(1, 9000),
    reverse_taps=st.integers(0, 9000),
    batch=st.integers(1, 9),
    channels=st.integers(1, 40),
    options=st.sets(st.sampled_from(["skip", *GATES])),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    length: int, taps: int, reverse_taps: int, batch: int, channels: int, options: set[str], dtype: torch.dtype
) -> None:
    if isinstance(choose(length, taps, reverse_taps, True), str):
        return
    names = (*options, "k_rev") if reverse_taps else tuple(options)
    shape = {"reverse_taps": reverse_taps, "batch": batch, "channels": channels}
    arguments = make(length, taps, names, **shape, dtype=dtype, device="cuda")
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


@pytest.mark.parametrize("filter_dtype", [*DTYPES, torch.float64], ids=str)
def test_filter_dtypes(filter_dtype: torch.dtype) -> None:
    check(make(1000, 1000, ALL, reverse_taps=900, channels=64, filter_dtype=filter_dtype, device="cuda"))


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_against_the_emulator(plan: Plan, dtype: torch.dtype) -> None:
    # The emulator's own products are to be exact.
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    check_against_emulator(make(**case(plan), options=ALL, dtype=dtype, batch=4, channels=16, device="cuda"), plan)


@pytest.mark.parametrize("basis", [impulses, tones])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_basis_input(basis: Callable[[int], Tensor], size: int, dtype: torch.dtype) -> None:
    with torch.device("cuda"):
        rows, k = basis(size).to(dtype), all_pass_filter(1, size)
    for part in rows.split(2048):
        arguments = {"u": part, "k": k}
        check_values(fft_conv(**arguments, causal=False, backend="cuda"), arguments, causal=False)


@pytest.mark.parametrize("length", [100, 1024, 4000, 8192])
@pytest.mark.parametrize("scaled", ["u", "k", *GATES])
@pytest.mark.parametrize(
    "dtype, exponents",
    [(torch.float16, (-12, -6, 6, 11)), (torch.bfloat16, (-60, -24, -12, 12, 24, 60)), (torch.float32, (-60, 60))],
    ids=str,
)
def test_scales(length: int, scaled: str, dtype: torch.dtype, exponents: tuple[int, ...]) -> None:
    arguments = make(length, length, (*GATES, "skip"), dtype=dtype, channels=16, device="cuda")
    for exponent in exponents:
        both = (scaled, "skip") if scaled == "k" else (scaled,)
        changed = arguments | {name: arguments[name] * 2.0**exponent for name in both}
        check_values(fft_conv(**changed, backend="cuda"), changed)
        if dtype != torch.float16 or exponent <= 6:
            check(changed)


@pytest.mark.parametrize("length", [256, 203, 1999, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_gives_the_same_bits(length: int, dtype: torch.dtype) -> None:
    check_layouts(make(length, length, GATES, dtype=dtype, channels=5, device="cuda"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["u", *GATES, "dy"])
@pytest.mark.parametrize("length", [120, 1000, 8192])
def test_not_finite_rows_keep_to_themselves(name: str, value: float, length: int) -> None:
    check_not_finite(make(length, length, GATES, batch=5, channels=3, device="cuda"), name, value, shared=length < 129)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("length", [120, 1000, 8192])
def test_filters_that_are_not_finite_keep_to_themselves(value: float, length: int) -> None:
    arguments = make(length, length, channels=9, device="cuda")
    y = fft_conv(**arguments, backend="cuda")
    arguments["k"][4, 5] = value
    actual = fft_conv(**arguments, backend="cuda")
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert actual[:, 4].isnan().all() and torch.equal(actual[:, others], y[:, others])


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_same_bits_every_time(plan: Plan) -> None:
    arguments = make(**case(plan), options=ALL, batch=9, channels=200, device="cuda")
    dy = torch.randn_like(arguments["u"])
    y, expected = gradients(arguments, dy)
    for _ in range(20):
        actual, grads = gradients(arguments, dy)
        assert torch.equal(actual, y) and all(torch.equal(grads[name], expected[name]) for name in arguments)


def test_unwritten_memory_is_never_read() -> None:
    # With deterministic algorithms PyTorch fills new tensors with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for plan in PLANS:
            check(make(**case(plan), options=ALL, batch=3, channels=5, device="cuda"))
    finally:
        torch.use_deterministic_algorithms(False)


def test_more_elements_than_32_bits_count() -> None:
    batch, channels, length = 1026, 512, 4096
    u = torch.randn(batch, channels, length, device="cuda", dtype=torch.bfloat16).requires_grad_()
    assert u.numel() > 2**31
    k = (torch.randn(channels, length, device="cuda") / length**0.5).requires_grad_()
    y = fft_conv(u, k, backend="cuda")
    y.backward(y.detach())
    for rows in (slice(0, 2), slice(batch // 2 - 1, batch // 2 + 1), slice(batch - 2, batch)):
        part = {"u": u.detach()[rows], "k": k.detach()}
        check_values(y.detach()[rows], part)
        expected, grads = gradients(part, y.detach()[rows])
        assert torch.equal(expected, y.detach()[rows]) and torch.equal(grads["u"], u.grad[rows])


def test_strides_beyond_32_bits() -> None:
    arguments = make(1000, 1000, batch=2, channels=2, device="cuda")
    gap = 2**31 + 9
    memory = torch.empty(gap + 4000, dtype=torch.bfloat16, device="cuda")
    for strides in ((gap, 1000, 1), (1000, gap, 1)):
        far = memory.as_strided((2, 2, 1000), strides).copy_(arguments["u"])
        assert torch.equal(fft_conv(far, arguments["k"], backend="cuda"), fft_conv(**arguments, backend="cuda"))
