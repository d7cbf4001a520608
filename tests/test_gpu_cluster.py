"""Clusters of thread blocks on a GPU: the values of test_cluster_emulated.py at sizes that fill the device."""

import math

import pytest
import torch
from kernel_cases import DTYPES, GATES, check, check_layouts, check_memory, check_values, make
from test_gpu_values import tf32

from hf_flashfftconv import fft_conv
from hf_flashfftconv.ops import cuda

__all__ = ["tf32"]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "length, cluster, batch, channels",
    [(4500, 2, 1, 300), (8192, 2, 17, 40), (9001, 4, 3, 50), (16384, 4, 8, 64), (32767, 8, 1, 40), (65536, 16, 3, 20)],
)
def test_output_and_gradients(length: int, cluster: int, batch: int, channels: int, dtype: torch.dtype) -> None:
    arguments = make(length, length, ("skip", *GATES), dtype=dtype, batch=batch, channels=channels, device="cuda")
    assert cuda.plan_of(arguments["u"], arguments["k"], None, True).cluster == cluster
    check(arguments)


@pytest.mark.parametrize("options", [(), ("pre_gate",), ("post_gate",), ("k_rev", "skip")], ids="+".join)
@pytest.mark.parametrize("length", [7000, 20000])
def test_options(length: int, options: tuple[str, ...]) -> None:
    reverse_taps = 3000 if "k_rev" in options else 0
    check(make(length, length, options, reverse_taps=reverse_taps, batch=5, channels=70, device="cuda"))


@pytest.mark.parametrize("length", [8192, 16384, 32768, 65536])
def test_sequences_of_any_size_and_the_same_bits_every_time(length: int) -> None:
    arguments = make(length, length, GATES, batch=64, channels=20, device="cuda")
    u = arguments["u"]
    u[::5, :, 256:] *= 2.0**-12
    u[1::7] *= 2.0**-60
    u[3] = 0
    u[9, 4, length - 1] = math.nan
    y = fft_conv(**arguments, backend="cuda")
    assert all(torch.equal(fft_conv(**arguments, backend="cuda").nan_to_num(), y.nan_to_num()) for _ in range(3))
    assert (y[3] == 0).all() and y[9, 4].isnan().all() and y[8, 4].isfinite().all()
    rows = [row for row in range(64) if row != 9]
    check_values(y[rows], {name: x if name == "k" else x[rows] for name, x in arguments.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "length, taps, batch, channels, cluster",
    [
        (65537, 65537, 3, 20, 8),
        (159744, 160002, 1, 30, 8),
        (300001, 90000, 4, 6, 8),
        (400001, 20000, 3, 9, 8),
        (300001, 140000, 4, 6, 16),
        (655360, 655360, 2, 3, 16),
        (1 << 20, 140000, 1, 3, 16),
    ],
)
def test_sequences_in_blocks(
    length: int, taps: int, batch: int, channels: int, cluster: int, dtype: torch.dtype
) -> None:
    arguments = make(length, taps, ("skip", *GATES), dtype=dtype, batch=batch, channels=channels, device="cuda")
    chosen = cuda.plan_of(arguments["u"], arguments["k"], None, True)
    assert chosen.cluster == cluster and chosen.windows > 1
    check(arguments)


@pytest.mark.parametrize("options", [(), ("pre_gate",), ("post_gate",)], ids="+".join)
def test_options_of_sequences_in_blocks(options: tuple[str, ...]) -> None:
    check(make(131072, 131072, options, batch=5, channels=20, device="cuda"))


def test_gradients_by_as_many_windows_as_there_can_be() -> None:
    arguments = make(786432, 786432, GATES, batch=3, channels=2, device="cuda")
    assert cuda.plan_of(arguments["u"], arguments["k"], None, True, backward=True).windows == 12
    check(arguments)


def test_pairs_that_are_done_again_and_the_same_bits_every_time() -> None:
    arguments = make(170000, 170000, GATES, batch=32, channels=20, device="cuda")
    u = arguments["u"]
    u[::5, :, 70000:] *= 2.0**12
    u[1::7, :, :100000] = 0
    u[3] = 0
    u[9, 4, 169999] = math.nan
    y = fft_conv(**arguments, backend="cuda")
    assert all(torch.equal(fft_conv(**arguments, backend="cuda").nan_to_num(), y.nan_to_num()) for _ in range(3))
    assert (y[3] == 0).all() and y[9, 4].isnan().all() and y[8, 4].isfinite().all()
    rows = [row for row in range(32) if row != 9]
    check_values(y[rows], {name: x if name == "k" else x[rows] for name, x in arguments.items()})


def test_any_layout_of_sequences_in_blocks_gives_the_same_bits() -> None:
    check_layouts(make(66001, 66001, GATES, channels=5, device="cuda"))


@pytest.mark.parametrize("batch, share", [(64, 0.5), (1, 2.0)])
@pytest.mark.parametrize("length", [65536, 524288])
def test_memory_beside_the_output(length: int, batch: int, share: float) -> None:
    check_memory(length, batch, 768 if batch * length == 65536 else 128 if batch == 1 else 32, share)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "length, taps, channels, cluster",
    [
        (65537, 65537, 34, 8),
        (70001, 40000, 2, 8),
        (159744, 159744, 36, 8),
        (300000, 131072, 30, 8),
        (300000, 300000, 18, 16),
        (600001, 600001, 6, 16),
    ],
)
def test_pairs_of_channels(length: int, taps: int, channels: int, cluster: int, dtype: torch.dtype) -> None:
    arguments = make(length, taps, ("skip", *GATES), dtype=dtype, batch=1, channels=channels, device="cuda")
    chosen = cuda.plan_of(arguments["u"], arguments["k"], None, True)
    assert chosen.cluster == cluster and chosen.channel_pairs == (chosen.windows <= cuda.PAIR_WINDOWS[dtype])
    check(arguments)


@pytest.mark.parametrize("options", [(), ("pre_gate",), ("post_gate",)], ids="+".join)
def test_options_of_pairs_of_channels(options: tuple[str, ...]) -> None:
    check(make(100000, 100000, options, batch=1, channels=20, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_of_channels_of_any_size(dtype: torch.dtype) -> None:
    """Neither an input nor a filter drowns in the rounding of its neighbour's."""
    arguments = make(100000, 100000, ("skip", *GATES), dtype=dtype, batch=1, channels=12, device="cuda")
    u, k, skip = arguments["u"], arguments["k"], arguments["skip"]
    up, down = (2.0**5, 2.0**-5) if dtype == torch.float16 else (2.0**30, 2.0**-30)
    # A single tap beside many, taps of other sizes, none.
    skip[:7] = 0
    k[0], k[6] = 0, 0
    k[0, 70000] = 1
    k[2], k[5], u[0, 8], u[0, 11] = k[2] * up, k[5] * down, u[0, 8] * up, u[0, 11] * down
    u[0, 4:8, 50000:] = 0
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


def test_pairs_of_channels_keep_to_themselves() -> None:
    arguments = make(100000, 100000, GATES, batch=1, channels=12, device="cuda")
    u, k = arguments["u"], arguments["k"]
    u[0, 2, 99999], k[5, 7], k[8, 99999] = math.nan, math.inf, math.nan
    y = fft_conv(**arguments, backend="cuda")
    rest = [channel for channel in range(12) if channel not in (2, 5, 8)]
    assert y[0, [2, 5, 8]].isnan().all()
    part = {name: x[rest] if name == "k" else x[:, rest] for name, x in arguments.items()}
    check_values(y[:, rest], part)
    assert all(torch.equal(fft_conv(**arguments, backend="cuda")[:, rest], y[:, rest]) for _ in range(3))


def test_any_layout_of_pairs_of_channels_gives_the_same_bits() -> None:
    check_layouts(make(66001, 66001, GATES, batch=1, channels=6, device="cuda"))
