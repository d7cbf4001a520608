"""Clusters of thread blocks on a GPU: the values of test_cluster_emulated.py at sizes that fill the device."""

import math

import pytest
import torch
from kernel_cases import DTYPES, GATES, check, check_values, make
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
