"""The CUDA kernels without a GPU: csrc compiled by g++, every thread a fiber, behind the package's own Python side.

It checks index maps, synchronisation and rounding, not what only hardware shows. See tests/simt.
"""

import itertools
import math
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from emulation import build
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
from numerics import all_pass_filter, error, impulses, tones

from hf_flashfftconv import fft_conv
from hf_flashfftconv.errors import BackendError
from hf_flashfftconv.ops import cuda, extension, filters
from hf_flashfftconv.ops.plan import Plan

SIZES = [256, 512, 1024, 2048, 4096, 8192]
PLANS = [Plan(size, folded) for size in SIZES for folded in (True, False) if size > 256 or not folded]


@pytest.fixture(scope="module")
def library(pytestconfig: pytest.Config) -> Path:
    if not shutil.which("g++"):
        pytest.skip("the emulation needs g++")
    return build(pytestconfig.cache.mkdir("kernels"))


@pytest.fixture(autouse=True)
def emulation(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cuda backend serves CPU tensors."""
    monkeypatch.setattr(extension, "PATH", library)
    monkeypatch.setattr(cuda, "unsupported", lambda *_: None)
    monkeypatch.setattr(cuda, "device_guard", lambda _: nullcontext())
    monkeypatch.setattr(cuda, "_current_stream", lambda _: 0)
    monkeypatch.setattr(cuda, "_is_capturing", lambda: False)
    extension.load.cache_clear()
    yield
    extension.load.cache_clear()
    cuda._spectra.clear()


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_transform(plan: Plan) -> None:
    lengths = case(plan)
    large = plan.fft_size >= 4096
    arguments = make(**lengths, options=ALL, channels=1 if large else 3, batch=2 if large else 3)
    assert cuda.plan_of(arguments["u"], arguments["k"], arguments["k_rev"], True) == plan
    check(arguments)


@pytest.mark.parametrize("size", SIZES)
def test_circular(size: int) -> None:
    check(make(size, size, (*GATES, "skip"), batch=2, channels=1), causal=False)


def test_longest() -> None:
    arguments = make(8192, 8192, GATES, batch=2, channels=1)
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


@pytest.mark.parametrize("plan", [Plan(512, True), Plan(1024, False)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filter_dtype", [*DTYPES, torch.float64], ids=str)
def test_dtypes(plan: Plan, dtype: torch.dtype, filter_dtype: torch.dtype) -> None:
    check(make(**case(plan), options=ALL, dtype=dtype, filter_dtype=filter_dtype, channels=8))


@pytest.mark.parametrize("options", [x for n in range(5) for x in itertools.combinations(ALL, n)], ids="+".join)
def test_options(options: tuple[str, ...]) -> None:
    check(make(300, 200, options, reverse_taps=150, channels=2))


@pytest.mark.parametrize("batch, channels", [(1, 1), (1, 2), (2, 17), (5, 3), (9, 1)])
@pytest.mark.parametrize("length", [100, 400, 1500])
def test_batches_and_channels(batch: int, channels: int, length: int) -> None:
    check(make(length, length, GATES, batch=batch, channels=channels))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 127, 128, 129, 255, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(length: int, dtype: torch.dtype) -> None:
    check(make(length, length + 1, (*GATES, "k_rev"), reverse_taps=length + 2, dtype=dtype, channels=1))


@pytest.mark.parametrize("length", [256, 203])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_layout_gives_the_same_bits(length: int, dtype: torch.dtype) -> None:
    check_layouts(make(length, length, GATES, dtype=dtype))


@pytest.mark.parametrize("dtype, offset", [(torch.bfloat16, 1), (torch.float32, 2)], ids=str)
def test_addresses_inside_an_element_are_refused(dtype: torch.dtype, offset: int) -> None:
    u = torch.frombuffer(bytearray(1000), dtype=dtype, offset=offset, count=200).view(1, 1, 200)
    assert u.data_ptr() % u.element_size()
    with pytest.raises(BackendError, match="no kernel for these parameters"):
        fft_conv(u, torch.randn(1, 200), backend="cuda")


def test_expanded_inputs_and_gradients() -> None:
    arguments = make(200, 200, GATES)
    expanded = {name: x[:1, :1].expand_as(x) if x.dim() == 3 else x for name, x in arguments.items()}
    dense = {name: x.contiguous() for name, x in expanded.items()}
    one = torch.ones(())
    results = [gradients(x, dy) for x, dy in ((expanded, one.expand(3, 2, 200)), (dense, torch.ones(3, 2, 200)))]
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in arguments)


@pytest.mark.parametrize("scaled", ["u", "k", *GATES])
@pytest.mark.parametrize(
    "dtype, exponent",
    [(torch.float16, -12), (torch.float16, 11), *((torch.bfloat16, e) for e in (-60, -12, 12, 60))],
    ids=str,
)
def test_scales(scaled: str, dtype: torch.dtype, exponent: int) -> None:
    arguments = make(250, 250, (*GATES, "skip"), dtype=dtype, channels=2)
    for name in (scaled, "skip") if scaled == "k" else (scaled,):
        arguments[name] = arguments[name] * 2.0**exponent
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["u", *GATES, "dy"])
def test_not_finite_rows_keep_to_themselves(name: str, value: float) -> None:
    check_not_finite(make(120, 120, GATES, batch=5, channels=3), name, value, shared=True)


@pytest.mark.parametrize("name", ["u", "pre_gate", "dy"])
def test_not_finite_rows_of_folded_transforms_keep_to_themselves(name: str) -> None:
    check_not_finite(make(300, 300, GATES, batch=5, channels=3), name, math.inf, shared=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_filters_that_are_not_finite_keep_to_themselves(value: float) -> None:
    arguments = make(120, 120)
    y = fft_conv(**arguments, backend="cuda")
    arguments["k"][1, 5] = value
    actual = fft_conv(**arguments, backend="cuda")
    assert actual[:, 1].isnan().all() and torch.equal(actual[:, 0], y[:, 0])


def test_zeros() -> None:
    arguments = make(120, 120, GATES)
    y = fft_conv(**arguments, backend="cuda")
    arguments["u"][0, 1] = 0
    actual = fft_conv(**arguments, backend="cuda")
    assert (actual[0, 1] == 0).all()
    others = [0, 1, 2], [0, 0, 0]
    assert torch.equal(actual[others], y[others]) and torch.equal(actual[2], y[2])
    arguments["k"][0] = 0
    assert (fft_conv(**arguments, backend="cuda")[:, 0] == 0).all()


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_against_the_emulator(plan: Plan, dtype: torch.dtype) -> None:
    check_against_emulator(make(**case(plan), options=ALL, dtype=dtype), plan)


def in_natural_order(spectrum: filters.Spectrum) -> torch.Tensor:
    """The complex spectrum (H, fft_size) from the words that the lanes of a warp read."""
    radix = spectrum.words.shape[1] // 256
    # Row, fragment h, lane, fragment t, real or imaginary, half of the pair.
    parts = spectrum.words.view(torch.float16).view(-1, radix, 2, 32, 2, 2, 2).double()
    values = torch.complex(parts[..., 0, :], parts[..., 1, :]).flatten(1) * spectrum.scale[:, None].double()
    k1, h, t, i = (torch.arange(n).view(-1, *[1] * dims) for n, dims in ((radix, 4), (2, 3), (2, 1), (2, 0)))
    lane = torch.arange(32).view(-1, 1, 1)
    frequency = k1 + radix * (2 * (lane // 4) + t + 16 * (lane % 4 + 4 * h + 8 * i))
    return torch.empty_like(values).index_copy_(1, frequency.flatten(), values)


def spectrum_of_taps(taps: torch.Tensor, first_lag: int, size: int, folded: bool) -> torch.Tensor:
    """Of real taps (H, up to size) at neighbouring lags, in float64."""
    turns = torch.arange(taps.shape[1]).double() * (folded / 4 / size)
    shifted = torch.fft.fft(torch.polar(taps.double(), -2 * math.pi * turns), n=size)
    # By the shift theorem, to the first lag.
    frequency = torch.arange(size).double() + folded / 4
    return shifted * torch.polar(torch.ones(size).double(), -2 * math.pi * frequency * first_lag / size)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("size", [*SIZES, 16384, 32768, 1 << 18])
def test_filter_spectra(size: int, folded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(size, folded)
    lengths = case(plan)
    arguments = make(**lengths, options=("k_rev", "skip"), channels=3)
    k, skip, k_rev = (arguments[name] for name in ("k", "skip", "k_rev"))
    monkeypatch.setattr(filters, "WORKSPACE_BYTES", 8 * size)
    spectrum = filters.prepare(k, skip, k_rev, lengths["length"], plan, 0)
    # At the frequencies f or f + 1/4, of taps at the lags 0, 1, ... and -1, -2, ...
    expected = spectrum_of_taps(k[:, : lengths["length"]], 0, size, folded) + skip[:, None]
    expected += spectrum_of_taps(k_rev.flip(1), -k_rev.shape[1], size, folded)
    # No more than rounding to half precision.
    assert error(torch.view_as_real(in_natural_order(spectrum)), torch.view_as_real(expected)) < 2.5e-4


@pytest.mark.parametrize("basis", [impulses, tones])
def test_basis(basis: object) -> None:
    rows = basis(256).to(torch.float16)
    arguments = {"u": rows, "k": all_pass_filter(1, 256)}
    check_values(fft_conv(**arguments, causal=False, backend="cuda"), arguments, causal=False)


def test_same_bits_every_time() -> None:
    arguments = make(700, 700, ALL, reverse_taps=300, batch=5)
    dy = torch.randn(arguments["u"].shape).bfloat16()
    y, expected = gradients(arguments, dy)
    actual, grads = gradients(arguments, dy)
    assert torch.equal(actual, y) and all(torch.equal(grads[name], expected[name]) for name in arguments)


@pytest.mark.parametrize("length", [300, 1500])
def test_a_row_has_the_same_bits_in_any_batch(length: int) -> None:
    arguments = make(length, length, ALL, reverse_taps=200, batch=5)
    y = fft_conv(**arguments, backend="cuda")
    for row in range(5):
        alone = {name: x[row : row + 1] if x.dim() == 3 else x for name, x in arguments.items()}
        assert torch.equal(fft_conv(**alone, backend="cuda")[0], y[row])
