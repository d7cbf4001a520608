"""Sequences in blocks on a GPU: the values of test_blocked_emulated.py at sizes that fill the device."""

import pytest
import torch
from kernel_cases import DTYPES, GATES, check, check_values, make
from test_gpu_values import tf32

from hf_flashfftconv import fft_conv
from hf_flashfftconv.ops import cuda

__all__ = ["tf32"]
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("without_clusters")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "length, taps, batch, channels",
    [(16385, 16385, 3, 5), (18001, 2, 17, 40), (32768, 32768, 8, 64), (40003, 10000, 1, 300), (131072, 131072, 2, 8)],
)
def test_output_and_gradients(length: int, taps: int, batch: int, channels: int, dtype: torch.dtype) -> None:
    arguments = make(length, taps, ("skip", *GATES), dtype=dtype, batch=batch, channels=channels, device="cuda")
    assert cuda.plan_of(arguments["u"], arguments["k"], None, True).windows
    check(arguments)


@pytest.mark.parametrize("options", [(), ("pre_gate",), ("post_gate",)], ids="+".join)
def test_options(options: tuple[str, ...]) -> None:
    check(make(65536, 16384, options, batch=4, channels=96, device="cuda"))


def test_a_short_filter_on_a_very_long_sequence() -> None:
    arguments = make(1 << 21, 8192, GATES, batch=2, channels=3, device="cuda")
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


def test_pairs_that_are_done_again_and_the_same_bits_every_time() -> None:
    arguments = make(48000, 48000, GATES, batch=64, channels=40, device="cuda")
    arguments["u"][::5, :, 18000:] *= 2.0**12
    arguments["u"][3] = 0
    y = fft_conv(**arguments, backend="cuda")
    check_values(y, arguments)
    assert (y[3] == 0).all()
    assert all(torch.equal(fft_conv(**arguments, backend="cuda"), y) for _ in range(3))
