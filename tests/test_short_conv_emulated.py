"""The kernels of the short convolution without a GPU, as in test_kernels_emulated."""

import pytest
import torch
from short_cases import LAYOUTS, check, make, run
from test_kernels_emulated import emulation, library  # noqa: F401

from hf_flashfftconv.ops import short_conv
from hf_flashfftconv.ops.short_conv import NO_GATE

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def served(emulation: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(short_conv, "unsupported", lambda *_: None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [NO_GATE, 0, 1, 2])
@pytest.mark.parametrize("taps", [3, 7])
def test_values_and_gradients(dtype: torch.dtype, gate: int, taps: int) -> None:
    z, weight, bias = make(150, taps, gate, channels=40, dtype=dtype)
    check((LAYOUTS["channels last"](z), weight, bias), gate)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [64, 77])
def test_layouts_give_the_same_bits(layout: object, dtype: torch.dtype, length: int) -> None:
    z, weight, bias = make(length, 3, 0, channels=8, batch=3, dtype=dtype)
    results, gradients = run((layout(z), weight, bias), 0, "cuda")
    expected, expected_gradients = run((z, weight, bias), 0, "cuda")
    assert all(map(torch.equal, results, expected)) and all(map(torch.equal, gradients, expected_gradients))
    if length == 64:
        check((z, weight, bias), 0)


@pytest.mark.parametrize("length, taps", [(1, 1), (1, 7), (2, 3), (3, 2), (63, 5), (65, 4), (129, 6)])
@pytest.mark.parametrize("gate", [NO_GATE, 0])
def test_lengths_and_taps(length: int, taps: int, gate: int) -> None:
    check(make(length, taps, gate, batch=3, channels=5, dtype=torch.bfloat16), gate)


@pytest.mark.parametrize("dtype, channels", [(torch.bfloat16, 67), (torch.float16, 70), (torch.float32, 35)], ids=str)
@pytest.mark.parametrize("layout", ["channels last", "rows two apart"])
def test_channels_of_several_tiles(dtype: torch.dtype, channels: int, layout: str) -> None:
    z, weight, bias = make(70, 3, 1, channels=channels, dtype=dtype)
    check((LAYOUTS[layout](z), weight, bias), 1)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_dtypes_of_the_filter_and_no_bias(weight_dtype: torch.dtype) -> None:
    z, weight, bias = make(100, 3, 1, channels=9, dtype=torch.float16, weight_dtype=weight_dtype)
    check((z, weight, bias), 1)
    zero = torch.zeros_like(bias)
    parameters = short_conv.short_conv(z, weight, None, 1, "cuda"), short_conv.short_conv(z, weight, zero, 1, "cuda")
    assert all(map(torch.equal, *parameters))


def test_many_parts_of_a_batch() -> None:
    """Several tiles a part, so that a block goes from one batch row into the next."""
    z, weight, bias = make(70, 3, NO_GATE, batch=700, channels=4, dtype=torch.float16)
    check((z, weight, bias), NO_GATE)


@pytest.mark.parametrize("taps", [2, 3, 5])
def test_what_is_not_finite_stays_with_its_neighbours(taps: int) -> None:
    z, weight, bias = make(140, taps, NO_GATE, channels=4)
    expected, _ = run((z, weight, bias), NO_GATE, "cuda")
    z[1, 2, 63] = torch.inf
    (actual,), (dz, dweight, _) = run((z, weight, bias), NO_GATE, "cuda")
    assert not actual[1, 2, 63 : 63 + taps].isfinite().any()
    actual[1, 2, 63 : 63 + taps] = expected[0][1, 2, 63 : 63 + taps]
    assert torch.equal(actual, expected[0]) and dz.isfinite().all()
    assert not dweight[2].isfinite().any() and dweight[[0, 1, 3]].isfinite().all()


def test_gradients_of_any_strides() -> None:
    tensors = make(90, 3, 2, channels=6, dtype=torch.bfloat16)
    expected = run(tensors, 2, "cuda", torch.ones_like)[1]
    actual = run(tensors, 2, "cuda", lambda y: torch.ones((), dtype=y.dtype).expand_as(y))[1]
    assert all(map(torch.equal, actual, expected))
