"""The kernel for sequences in blocks without a GPU; see test_kernels_emulated.py."""

import math

import pytest
import torch
from kernel_cases import BOUNDS, DTYPES, GATES, check, check_gradients, check_values, make
from test_kernels_emulated import emulation, in_natural_order, library, spectrum_of_taps

from hf_flashfftconv import fft_conv
from hf_flashfftconv.ops import cuda, cuda_gradients, filters
from hf_flashfftconv.ops.plan import BLOCK_POSITIONS, Plan

__all__ = ["emulation", "library"]
pytestmark = pytest.mark.usefixtures("without_clusters")


def windows(arguments: dict[str, torch.Tensor]) -> int:
    plan = cuda.plan_of(arguments["u"], arguments["k"], None, True)
    assert plan[:2] == (BLOCK_POSITIONS, True)
    return plan.windows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    arguments = make(16385, 17000, ("skip", *GATES), dtype=dtype, batch=2, channels=1)
    assert windows(arguments) == 3
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


@pytest.mark.parametrize("length, taps, count", [(20001, 1, 1), (16500, 2, 2), (17000, 8193, 2), (32767, 9000, 3)])
def test_lengths(length: int, taps: int, count: int) -> None:
    arguments = make(length, taps, ("skip", *GATES), batch=2, channels=1)
    assert windows(arguments) == count
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


@pytest.mark.parametrize("options", [(), ("pre_gate",), ("post_gate",), ("skip",)], ids="+".join)
def test_options(options: tuple[str, ...]) -> None:
    arguments = make(24576, 24576, options, batch=1, channels=3)
    assert windows(arguments) == 3
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


def test_the_longest_filter() -> None:
    arguments = make(132000, 122881, ("pre_gate",), batch=1, channels=1)
    assert windows(arguments) == 16
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


@pytest.mark.parametrize(
    "length, taps, count, options, dtype, channels",
    [
        (17000, 9000, 3, ("skip", *GATES), torch.bfloat16, 1),
        (16400, 3000, 2, ("skip", "pre_gate"), torch.bfloat16, 2),
        (17000, 17000, 3, ("post_gate",), torch.float32, 1),
        (8193, 8193, 2, (), torch.float16, 2),
        (40000, 50000, 5, (), torch.bfloat16, 1),
    ],
)
def test_gradients(
    length: int, taps: int, count: int, options: tuple[str, ...], dtype: torch.dtype, channels: int
) -> None:
    arguments = make(length, taps, options, batch=3 if length < 10000 else 2, channels=channels, dtype=dtype)
    assert cuda.plan_of(arguments["u"], arguments["k"], None, True, backward=True).windows == count
    check(arguments)


@pytest.mark.parametrize("wanted", ["u", "k", "skip", "pre_gate", "post_gate"])
def test_a_gradient_alone(wanted: str) -> None:
    arguments = make(17000, 9000, ("skip", *GATES), batch=2, channels=2)
    inputs = [arguments.get(name) for name in ("u", "k", "skip", *GATES, "k_rev")]
    dy = torch.randn_like(arguments["u"])
    every = cuda_gradients.backward(dy, *inputs, True)
    names = ("u", "k", "skip", *GATES)
    alone = cuda_gradients.backward(dy, *inputs, True, [name == wanted for name in (*names, "k_rev")])
    taps = ("k", "skip")
    for name, x, y in zip(names, alone, every, strict=False):
        assert (x is None) == (name != wanted and not (name in taps and wanted in taps)), name
        if name == wanted:
            bound = 0 if name in ("k", "skip") else 2 * BOUNDS[torch.bfloat16].gradient
            assert (x.float() - y.float()).norm() <= bound * y.float().norm()


def test_sequences_that_samples_do_not_show() -> None:
    arguments = make(17001, 17001, GATES, batch=7, channels=1)
    u = arguments["u"]
    u[0] = 0
    u[0, 0, 8500] = 0.01
    u[1] = 0
    u[2, :, :8192] *= 1e-3
    u[3] *= 1e-30
    u[4] *= 2.0**50
    u[5, :, 10000:] *= 2.0**-60
    y = fft_conv(**arguments, backend="cuda")
    check_values(y, arguments)
    assert (y[1] == 0).all()
    # Every row but the last is done again, and nothing changes for that.
    alone = {name: x[6:] if x.dim() == 3 else x for name, x in arguments.items()}
    assert torch.equal(fft_conv(**alone, backend="cuda"), y[6:])


@pytest.mark.parametrize("exponent", [-60, 60])
def test_scales(exponent: int) -> None:
    arguments = make(16385, 17000, GATES, batch=2, channels=1)
    arguments["u"] *= 2.0**exponent
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


@pytest.mark.parametrize("length, options", [(17001, ()), (17008, GATES)])
def test_gradients_of_a_last_position(length: int, options: tuple[str, ...]) -> None:
    arguments = make(length, length, options, batch=2, channels=1)
    dy = torch.zeros_like(arguments["u"])
    dy[..., -1] = 1e-3
    check_gradients(arguments, dy)


@pytest.mark.parametrize(
    "name, value, position", [("u", math.nan, 16500), ("pre_gate", math.inf, 17), ("post_gate", -math.inf, 17)]
)
def test_rows_that_are_not_finite_keep_to_themselves(name: str, value: float, position: int) -> None:
    arguments = make(16600, 16600, GATES, batch=2, channels=2)
    y = fft_conv(**arguments, backend="cuda")
    arguments[name][1, 1, position] = value
    actual = fft_conv(**arguments, backend="cuda")
    others = torch.ones(y.shape[:2], dtype=torch.bool)
    others[1, 1] = False
    assert torch.equal(actual[others], y[others])
    assert not actual[1, 1, position].isfinite() and (name == "post_gate" or actual[1, 1].isnan().all())


def test_any_layout_gives_the_same_bits() -> None:
    arguments = make(16520, 100, GATES, batch=2)
    y = fft_conv(**arguments, backend="cuda")
    for offset, gap in ((0, 8), (1, 0), (2, 2), (4, 3)):
        strange = dict(arguments)
        for name in ("u", *GATES):
            x = arguments[name]
            rows = torch.full((x.shape[0] * x.shape[1] * (x.shape[2] + gap) + offset,), math.nan, dtype=x.dtype)
            strange[name] = rows[offset:].view(*x.shape[:2], -1)[..., : x.shape[2]].copy_(x)
        assert torch.equal(fft_conv(**strange, backend="cuda"), y)


def test_windows_of_a_filter() -> None:
    plan = Plan(BLOCK_POSITIONS, True, 4)
    k, skip = torch.randn(3, 18000) * torch.tensor([[1.0], [2.0**-90], [0.0]]), torch.tensor([1.0, 0.0, 0.0])
    spectrum = filters.prepare(k, skip, None, 40000, plan, 0)
    check_windows(spectrum, k, skip, plan)
    k[1, 16000] = math.nan
    assert filters.prepare(k, skip, None, 40000, plan, 0).scale.isnan().tolist() == [False, True, False]


def check_windows(spectrum: filters.Spectrum, k: torch.Tensor, skip: torch.Tensor, plan: Plan) -> None:
    """Of each window the spectrum of its taps, from a block before its lag to a block after it."""
    size = plan.fft_size
    around = torch.nn.functional.pad(k.double(), (size, (plan.windows + 1) * size - k.shape[1]))
    around[:, size] += skip
    for window in range(plan.windows):
        before, own = around[:, window * size :][:, : 2 * size].split(size, 1)
        words = spectrum.words.view(k.shape[0], plan.windows, size)[:, window].contiguous()
        actual = in_natural_order(filters.Spectrum(words, spectrum.scale))
        expected = spectrum_of_taps(before, -size, size, True) + spectrum_of_taps(own, 0, size, True)
        assert (actual - expected).norm(dim=1).le(2.5e-4 * expected.norm(dim=1)).all()


def test_same_bits_every_time() -> None:
    arguments = make(16500, 16500, GATES, batch=3)
    assert torch.equal(fft_conv(**arguments, backend="cuda"), fft_conv(**arguments, backend="cuda"))
