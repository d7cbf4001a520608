"""Sequences in blocks of clusters without a GPU; see test_kernels_emulated.py."""

import math

import pytest
import torch
from kernel_cases import DTYPES, GATES, check, check_values, make
from test_blocked_emulated import check_windows
from test_cluster_emulated import plan
from test_kernels_emulated import emulation, library

from hf_flashfftconv import fft_conv
from hf_flashfftconv.ops import cuda, filters
from hf_flashfftconv.ops.plan import Plan

__all__ = ["emulation", "library"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length, windows, cluster", [(132001, 3, 8), (327681, 3, 16)])
def test_dtypes(length: int, windows: int, cluster: int, dtype: torch.dtype) -> None:
    arguments = make(length, length, ("skip", *GATES), dtype=dtype, batch=1, channels=1)
    assert plan(arguments) == Plan(8192 * cluster, True, windows, cluster)
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


@pytest.mark.parametrize(
    "length, taps, windows, cluster, options, channels",
    [
        (131073, 131073, 3, 8, (), 1),
        (196608, 40000, 2, 8, ("post_gate",), 1),
        (200000, 131074, 4, 8, ("pre_gate",), 1),
        (328000, 264000, 3, 16, ("post_gate",), 1),
    ],
)
def test_lengths(length: int, taps: int, windows: int, cluster: int, options: tuple[str, ...], channels: int) -> None:
    arguments = make(length, taps, options, batch=1, channels=channels)
    assert plan(arguments) == Plan(8192 * cluster, True, windows, cluster)
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


@pytest.mark.parametrize(
    "length, taps, options, dtype, windows, cluster",
    [
        (262144, 262144, ("skip", *GATES), torch.bfloat16, 4, 8),
        (132000, 40000, ("pre_gate",), torch.float16, 2, 8),
        (328000, 280000, ("post_gate",), torch.float16, 3, 16),
    ],
)
def test_gradients(
    length: int, taps: int, options: tuple[str, ...], dtype: torch.dtype, windows: int, cluster: int
) -> None:
    arguments = make(length, taps, options, batch=1, channels=1, dtype=dtype)
    chosen = cuda.plan_of(arguments["u"], arguments["k"], None, True, backward=True)
    assert chosen == Plan(8192 * cluster, True, windows, cluster)
    check(arguments)


@pytest.mark.parametrize("length, taps, cluster", [(132001, 132001, 8), (328001, 263000, 16)])
def test_what_samples_do_not_show(length: int, taps: int, cluster: int) -> None:
    arguments = make(length, taps, GATES, batch=3, channels=1)
    assert plan(arguments).cluster == cluster
    u = arguments["u"]
    u[0] = 0
    u[0, 0, 81000] = 0.01
    u[1, 0, length - 11] = math.nan
    y = fft_conv(**arguments, backend="cuda")
    assert y[1].isnan().all()
    rows = [0, 2]
    check_values(y[rows], {name: x[rows] if x.dim() == 3 else x for name, x in arguments.items()})
    # The first row is done again, and nothing changes for the last.
    alone = {name: x[2:] if x.dim() == 3 else x for name, x in arguments.items()}
    assert torch.equal(fft_conv(**alone, backend="cuda"), y[2:])


def test_windows_of_a_long_filter() -> None:
    chosen = Plan(131072, True, 3, 16)
    k, skip = torch.randn(2, 280000), torch.tensor([1.0, 0.0])
    check_windows(filters.prepare(k, skip, None, 400000, chosen, 0), k, skip, chosen)
    k[1, 279999] = math.nan
    assert filters.prepare(k, skip, None, 400000, chosen, 0).scale.isnan().tolist() == [False, True]
