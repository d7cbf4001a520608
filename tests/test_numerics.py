"""The checks can fail: every planted fault is caught. And the kernels' algorithm, emulated, keeps the promise."""

import math
from collections.abc import Callable

import numerics
import pytest
import torch
from numerics import BFLOAT16, BOUNDS, FLOAT16, FLOAT32_TF32, Bounds
from torch import Tensor

from hf_flashfftconv.ops import emulator
from hf_flashfftconv.ops.emulator import fft_conv_emulated
from hf_flashfftconv.ops.reference import fft_conv_float64

KERNEL_BOUNDS = {"bfloat16": BFLOAT16, "float16": FLOAT16, "float32 with TF32": FLOAT32_TF32}
by_dtype = pytest.mark.parametrize("bounds", KERNEL_BOUNDS.values(), ids=KERNEL_BOUNDS.keys())


def decaying_filter(channels: int, length: int) -> Tensor:
    return torch.randn(channels, length) * torch.exp(-4 * torch.linspace(0, 1, length))


def found_by(y: Tensor, reference: Tensor, bounds: Bounds, u: Tensor, k: Tensor) -> list[str]:
    return numerics.violations(y, reference, bounds, numerics.reach(u, k))


@pytest.mark.parametrize("bounds", [*BOUNDS.values(), FLOAT32_TF32], ids=lambda b: f"{b.dtype}-{b.whole:.0e}")
@pytest.mark.parametrize("length", [64, 1024, 4096])
def test_every_planted_fault_is_caught(length: int, bounds: Bounds) -> None:
    u, k = torch.randn(2, 3, length).double(), decaying_filter(3, length).double()
    reference = fft_conv_float64(u, k)
    assert not found_by(reference.to(bounds.dtype), reference, bounds, u, k)
    for name, faulty in numerics.planted_faults(u, k).items():
        assert found_by(faulty.to(bounds.dtype), reference, bounds, u, k), name


def test_the_checks_catch_shapes_dtypes_and_gradients() -> None:
    y = torch.randn(2, 3, 8).double()
    assert numerics.violations(y.float(), y, BFLOAT16)
    assert numerics.violations(y[..., :7].bfloat16(), y, BFLOAT16)
    assert not numerics.gradient_violations("k", y.float(), y, BFLOAT16)
    for wrong in (y * 1.01, torch.zeros_like(y), y * math.nan, y[:1]):
        assert numerics.gradient_violations("k", wrong.float(), y, BFLOAT16)
        assert numerics.gradient_violations("u", wrong.bfloat16(), y, BFLOAT16)


def test_an_output_of_zeros_must_be_zero() -> None:
    zeros = torch.zeros(1, 1, 4).double()
    assert not numerics.violations(zeros.float(), zeros, numerics.FLOAT32)
    assert numerics.violations(zeros.float() + 1e-3, zeros, numerics.FLOAT32)


@by_dtype
@pytest.mark.parametrize("radices", [(16, 16), (8, 8, 8), (16, 8, 8), (32, 32), (8, 16, 16), (32, 16, 16)])
def test_emulator_keeps_the_promise(radices: tuple[int, ...], bounds: Bounds) -> None:
    length = math.prod(radices) // 2
    # An odd batch, whose last row is packed with zeros.
    u, pre_gate, post_gate = torch.randn(3, 3, 4, length).to(bounds.dtype)
    arguments = {"u": u, "k": decaying_filter(4, length), "skip": torch.randn(4)}
    arguments |= {"pre_gate": pre_gate, "post_gate": post_gate}
    reference = fft_conv_float64(**arguments)
    found = numerics.violations(
        fft_conv_emulated(**arguments, radices=radices),
        reference,
        bounds,
        numerics.reach(**arguments),
    )
    assert not found, found


@by_dtype
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 15])
def test_emulator_keeps_the_promise_on_few_values(length: int, bounds: Bounds) -> None:
    u, pre_gate, post_gate = torch.randn(3, 7, 1000, length).to(bounds.dtype)
    arguments = {"u": u, "k": torch.randn(1000, length), "k_rev": torch.randn(1000, length), "skip": torch.randn(1000)}
    arguments |= {"pre_gate": pre_gate, "post_gate": post_gate}
    y, reference = fft_conv_emulated(**arguments, radices=(16, 16)), fft_conv_float64(**arguments)
    size = numerics.reach(**arguments)
    found = numerics.violations(y, reference, bounds, size)
    assert not found, found
    # A wrong row among thousands is still found by itself.
    row = int((reference.norm(dim=-1) / size).argmax())
    y.flatten(0, 1)[row] *= 1.02
    found = numerics.violations(y, reference, bounds, size)
    assert found[-1:] and found[-1].startswith(f"1 rows: row {row} "), found


@pytest.mark.parametrize("length, taps, reverse", [(9, 4, 7), (7, 9, 9), (5, 1, 1), (1, 1, 1)])
def test_emulator_is_bidirectional(length: int, taps: int, reverse: int) -> None:
    arguments = {"u": torch.randn(2, 3, length), "k": torch.randn(3, taps), "k_rev": torch.randn(3, reverse)}
    y, reference = fft_conv_emulated(**arguments, radices=(4, 4)), fft_conv_float64(**arguments)
    assert not numerics.violations(y, reference, FLOAT32_TF32, numerics.reach(**arguments))


def test_emulator_is_circular() -> None:
    u, k = torch.randn(2, 3, 64), torch.randn(3, 40)
    y, reference = fft_conv_emulated(u, k, causal=False, radices=(8, 8)), fft_conv_float64(u, k, causal=False)
    assert not found_by(y, reference, FLOAT32_TF32, u, k)


@pytest.mark.parametrize("causal, radices", [(True, (4, 4)), (False, (4, 8)), (False, (4, 4))])
def test_emulator_refuses_sizes_that_wrap(causal: bool, radices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"FFT size {math.prod(radices)} does not fit"):
        fft_conv_emulated(torch.randn(1, 1, 20), torch.randn(1, 20), causal=causal, radices=radices)


@pytest.mark.parametrize("rows", [numerics.impulses, numerics.tones])
@pytest.mark.parametrize("radices", [(16, 16), (8, 8, 4)])
def test_emulator_on_every_basis_input(radices: tuple[int, ...], rows: Callable[[int], Tensor]) -> None:
    u, k = rows(256), numerics.all_pass_filter(1, 256)
    y, reference = fft_conv_emulated(u, k, causal=False, radices=radices), fft_conv_float64(u, k, causal=False)
    assert not found_by(y, reference, FLOAT32_TF32, u, k)


@pytest.mark.parametrize("radices", [(16, 16), (8, 8, 4)])
@pytest.mark.parametrize("constants", ["_dft_matrix", "_twiddles"])
def test_basis_inputs_find_a_single_wrong_constant(
    monkeypatch: pytest.MonkeyPatch, constants: str, radices: tuple[int, ...]
) -> None:
    right = getattr(emulator, constants)

    def wrong(*arguments: object) -> Tensor:
        table = right(*arguments).clone()
        table[-1, -1] *= 1.1
        return table

    monkeypatch.setattr(emulator, constants, wrong)
    u, k = torch.cat([numerics.impulses(256), numerics.tones(256)]), numerics.all_pass_filter(1, 256)
    y, reference = fft_conv_emulated(u, k, causal=False, radices=radices), fft_conv_float64(u, k, causal=False)
    assert found_by(y, reference, FLOAT32_TF32, u, k)


@pytest.mark.parametrize("name", ["u", "k", "pre_gate"])
@pytest.mark.parametrize("exponent", [-60, -12, -4, 4, 12, 60])
def test_emulator_is_free_of_scale(exponent: int, name: str) -> None:
    u, pre_gate = torch.randn(2, 2, 3, 512).bfloat16()
    arguments = {"u": u, "k": decaying_filter(3, 512), "pre_gate": pre_gate}
    arguments[name] = arguments[name] * 2.0**exponent
    reference = fft_conv_float64(**arguments)
    assert not numerics.violations(fft_conv_emulated(**arguments, radices=(32, 32)), reference, BFLOAT16)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_emulator_keeps_what_is_not_finite_in_its_row(value: float) -> None:
    u, k = torch.randn(3, 2, 8), torch.randn(2, 8)
    clean = fft_conv_emulated(u, k, radices=(4, 4))
    u[1, 0, 3] = value
    y = fft_conv_emulated(u, k, radices=(4, 4))
    assert y[1, 0].isnan().all()
    y[1, 0] = clean[1, 0]
    # Its partner in the pair has a scale of its own now, hence other roundings.
    torch.testing.assert_close(y, clean, rtol=0, atol=FLOAT32_TF32.row * clean.norm().item())


def test_emulator_on_zeros() -> None:
    u, k = torch.randn(2, 2, 8), torch.randn(2, 8)
    assert not fft_conv_emulated(torch.zeros_like(u), k, radices=(4, 4)).any()
    assert not fft_conv_emulated(u, torch.zeros_like(k), radices=(4, 4)).any()
