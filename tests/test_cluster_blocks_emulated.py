"""Sequences in blocks of clusters without a GPU; see test_kernels_emulated.py."""

import math

import pytest
import torch
from kernel_cases import DTYPES, GATES, check, check_values, make
from test_cluster_emulated import plan
from test_kernels_emulated import emulation, in_natural_order, library

from hf_flashfftconv import fft_conv
from hf_flashfftconv.ops import cuda, filters
from hf_flashfftconv.ops.plan import Plan

__all__ = ["emulation", "library"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length, windows, cluster", [(66001, 3, 8), (164001, 3, 16)])
def test_dtypes(length: int, windows: int, cluster: int, dtype: torch.dtype) -> None:
    arguments = make(length, length, ("skip", *GATES), dtype=dtype, batch=2, channels=1)
    assert plan(arguments) == Plan(8192 * cluster, True, windows, cluster)
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


@pytest.mark.parametrize(
    "length, taps, windows, cluster, options, channels",
    [
        (65537, 65537, 3, 8, (), 1),
        (98304, 20000, 2, 8, ("post_gate",), 3),
        (100000, 65538, 4, 8, ("pre_gate",), 1),
        (163841, 163841, 3, 16, (), 1),
        (164000, 132000, 3, 16, ("post_gate",), 1),
    ],
)
def test_lengths(length: int, taps: int, windows: int, cluster: int, options: tuple[str, ...], channels: int) -> None:
    arguments = make(length, taps, options, batch=1, channels=channels)
    assert plan(arguments) == Plan(8192 * cluster, True, windows, cluster)
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


@pytest.mark.parametrize(
    "length, taps, windows, cluster, options, dtype, channels",
    [
        (66001, 66001, 3, 8, ("skip", *GATES), torch.bfloat16, 4),
        (66001, 20000, 2, 8, ("post_gate",), torch.float16, 2),
        (70000, 40000, 3, 8, ("skip", "pre_gate"), torch.float32, 2),
        (164001, 164001, 3, 16, GATES, torch.bfloat16, 2),
    ],
)
def test_pairs_of_channels(
    length: int, taps: int, windows: int, cluster: int, options: tuple[str, ...], dtype: torch.dtype, channels: int
) -> None:
    arguments = make(length, taps, options, batch=1, channels=channels, dtype=dtype)
    assert plan(arguments) == Plan(8192 * cluster, True, windows, cluster, True)
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


def test_pairs_of_channels_of_any_size() -> None:
    """A single tap beside many, taps and inputs of other sizes, none, and what samples of a sequence do not show."""
    arguments = make(66001, 66001, batch=1, channels=10)
    u, k = arguments["u"], arguments["k"]
    k[0], k[4] = 0, 0
    k[0, 50000] = 1
    k[2], u[0, 7] = k[2] * 2.0**30, u[0, 7] * 2.0**-40
    u[0, 8, 100:] = 0
    u[0, 6, 5], k[9, 7] = math.nan, math.inf
    y = fft_conv(**arguments, backend="cuda")
    assert y[0, [6, 9]].isnan().all()
    rest = [0, 1, 2, 3, 4, 5, 7, 8]
    check_values(y[:, rest], {"u": u[:, rest], "k": k[rest]})


@pytest.mark.parametrize(
    "length, taps, options, dtype, windows, cluster",
    [
        (131072, 131072, ("skip", *GATES), torch.bfloat16, 4, 8),
        (66000, 20000, ("pre_gate",), torch.float16, 2, 8),
        (164000, 140000, ("post_gate",), torch.float16, 3, 16),
    ],
)
def test_gradients(
    length: int, taps: int, options: tuple[str, ...], dtype: torch.dtype, windows: int, cluster: int
) -> None:
    arguments = make(length, taps, options, batch=2, channels=1, dtype=dtype)
    chosen = cuda.plan_of(arguments["u"], arguments["k"], None, True, backward=True)
    assert chosen == Plan(8192 * cluster, True, windows, cluster)
    check(arguments)


@pytest.mark.parametrize("length, cluster", [(66001, 8), (164001, 16)])
def test_what_samples_do_not_show(length: int, cluster: int) -> None:
    arguments = make(length, length, GATES, batch=4, channels=1)
    assert plan(arguments).cluster == cluster
    u = arguments["u"]
    u[0] = 0
    u[0, 0, 40500] = 0.01
    u[1, 0, length - 11] = math.nan
    y = fft_conv(**arguments, backend="cuda")
    assert y[1].isnan().all()
    rows = [0, 2, 3]
    check_values(y[rows], {name: x[rows] if x.dim() == 3 else x for name, x in arguments.items()})
    # The first pair is done again, and nothing changes for the other.
    alone = {name: x[2:] if x.dim() == 3 else x for name, x in arguments.items()}
    assert torch.equal(fft_conv(**alone, backend="cuda"), y[2:])


# Sequences in blocks of 65,536.
SIZE, BLOCK = 131072, 65536


@pytest.mark.parametrize("channel_pairs", [False, True])
def test_windows_of_a_long_filter(channel_pairs: bool) -> None:
    taps, windows = 140000, 3
    plan = Plan(SIZE, True, windows, 16, channel_pairs)
    k, skip = torch.randn(2, taps), torch.tensor([1.0, 0.0])
    spectrum = filters.prepare(k, skip, None, 200000, plan, 0)
    around = torch.nn.functional.pad(k.double(), (BLOCK, windows * BLOCK - taps))
    around[:, BLOCK] += skip
    # Pairs have the frequencies half-way between, and what lies before a window's first tap changes its sign.
    turn = torch.polar(torch.ones(SIZE).double(), torch.arange(SIZE).double() * (-math.pi / SIZE))
    turn[BLOCK:] *= -1
    for window in range(windows):
        part = around[:, window * BLOCK :][:, :SIZE].roll(-BLOCK, 1)
        part = part * turn if channel_pairs else part
        words = spectrum.words.view(2, windows, SIZE)[:, window].contiguous()
        actual, expected = in_natural_order(filters.Spectrum(words, spectrum.scale)), torch.fft.fft(part)
        assert (actual - expected).norm(dim=1).le(2.5e-4 * expected.norm(dim=1)).all()
    k[1, 139999] = math.nan
    scale = filters.prepare(k, skip, None, 200000, plan, 0).scale
    assert scale.isnan().tolist() == [False, True]
