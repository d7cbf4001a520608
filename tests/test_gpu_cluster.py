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
    [
        (9000, 2, 1, 300),
        (16384, 2, 17, 40),
        (18001, 4, 3, 50),
        (32768, 4, 8, 64),
        (65535, 8, 1, 40),
        (131072, 16, 3, 20),
    ],
)
def test_output_and_gradients(length: int, cluster: int, batch: int, channels: int, dtype: torch.dtype) -> None:
    arguments = make(length, length, ("skip", *GATES), dtype=dtype, batch=batch, channels=channels, device="cuda")
    assert cuda.plan_of(arguments["u"], arguments["k"], None, True).cluster == cluster
    check(arguments)


@pytest.mark.parametrize("options", [(), ("pre_gate",), ("post_gate",), ("k_rev", "skip")], ids="+".join)
@pytest.mark.parametrize("length", [14000, 40000])
def test_options(length: int, options: tuple[str, ...]) -> None:
    reverse_taps = 3000 if "k_rev" in options else 0
    check(make(length, length, options, reverse_taps=reverse_taps, batch=5, channels=70, device="cuda"))


@pytest.mark.parametrize("length", [16384, 32768, 65536, 131072])
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
        (131073, 131073, 3, 20, 8),
        (159744, 160002, 1, 30, 8),
        (500001, 180000, 4, 6, 8),
        (700001, 40000, 3, 9, 8),
        (500001, 280000, 4, 6, 16),
        (917504, 917504, 2, 3, 16),
        (1 << 21, 280000, 1, 3, 16),
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
    check(make(262144, 262144, options, batch=5, channels=20, device="cuda"))


def test_gradients_by_as_many_windows_as_there_can_be() -> None:
    arguments = make(1572864, 1572864, GATES, batch=3, channels=2, device="cuda")
    assert cuda.plan_of(arguments["u"], arguments["k"], None, True, backward=True).windows == 12
    check(arguments)


def test_pairs_that_are_done_again_and_the_same_bits_every_time() -> None:
    arguments = make(340000, 340000, GATES, batch=32, channels=20, device="cuda")
    u = arguments["u"]
    u[::5, :, 140000:] *= 2.0**12
    u[1::7, :, :200000] = 0
    u[3] = 0
    u[9, 4, 339999] = math.nan
    y = fft_conv(**arguments, backend="cuda")
    assert all(torch.equal(fft_conv(**arguments, backend="cuda").nan_to_num(), y.nan_to_num()) for _ in range(3))
    assert (y[3] == 0).all() and y[9, 4].isnan().all() and y[8, 4].isfinite().all()
    rows = [row for row in range(32) if row != 9]
    check_values(y[rows], {name: x if name == "k" else x[rows] for name, x in arguments.items()})


def test_any_layout_of_sequences_in_blocks_gives_the_same_bits() -> None:
    check_layouts(make(132001, 132001, GATES, channels=5, device="cuda"))


@pytest.mark.parametrize("batch, share", [(64, 0.5), (1, 2.0)])
@pytest.mark.parametrize("length", [65536, 524288])
def test_memory_beside_the_output(length: int, batch: int, share: float) -> None:
    check_memory(length, batch, 768 if batch * length == 65536 else 128 if batch == 1 else 32, share)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_of_any_size(dtype: torch.dtype) -> None:
    """A single tap beside many, taps of other sizes, none; halves of zeros."""
    arguments = make(200000, 200000, ("skip", *GATES), dtype=dtype, batch=1, channels=12, device="cuda")
    u, k, skip = arguments["u"], arguments["k"], arguments["skip"]
    up, down = (2.0**5, 2.0**-5) if dtype == torch.float16 else (2.0**30, 2.0**-30)
    skip[:7] = 0
    k[0], k[6] = 0, 0
    k[0, 140000] = 1
    k[2], k[5], u[0, 8], u[0, 11] = k[2] * up, k[5] * down, u[0, 8] * up, u[0, 11] * down
    u[0, 4:8, 100000:] = 0
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


@pytest.mark.parametrize(
    "length, taps",
    [(1000, 1000), (8192, 8192), (16384, 16384), (65536, 65536), (100000, 100), (262144, 262144), (1 << 20, 1 << 20)],
)
def test_a_row_has_the_same_bits_in_any_batch(length: int, taps: int) -> None:
    arguments = make(length, taps, (*GATES, "skip"), batch=5, channels=3, device="cuda")
    y = fft_conv(**arguments, backend="cuda")
    assert cuda.plan_of(arguments["u"], arguments["k"], None, True).folded
    for row in range(5):
        alone = {name: x[row : row + 1] if x.dim() == 3 else x for name, x in arguments.items()}
        assert torch.equal(fft_conv(**alone, backend="cuda")[0], y[row]), row
