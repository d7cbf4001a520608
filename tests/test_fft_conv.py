"""fft_conv by torch.fft: values and gradients against the float64 oracle, the oracle against the defining sum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import BOUNDS, FLOAT64, gradient_violations, reach, violations
from torch import Tensor

from hf_flashfftconv import fft_conv
from hf_flashfftconv.ops.reference import fft_conv_float64, good_fft_length, linear_fft_length

LENGTHS = [1, 2, 3, 5, 17, 64, 100, 127, 128, 1000, 1026]
DTYPES = list(BOUNDS)

# Each optional argument alone, the whole of Hyena, the whole of M2-BERT, and everything.
OPTIONS = {
    "plain": (),
    "skip": ("skip",),
    "pre_gate": ("pre_gate",),
    "post_gate": ("post_gate",),
    "k_rev": ("k_rev",),
    "hyena": ("skip", "pre_gate", "post_gate"),
    "m2": ("skip", "pre_gate", "post_gate", "k_rev"),
}

Arguments = dict[str, Tensor]


def make(
    length: int,
    taps: int,
    options: tuple[str, ...] = (),
    *,
    batch: int = 2,
    channels: int = 3,
    dtype: torch.dtype = torch.float64,
    filter_dtype: torch.dtype | None = None,
) -> Arguments:
    """Random arguments of fft_conv; k_rev has two taps more than k, so that both orders of lengths occur."""
    wide = filter_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    sequence, dtypes = (batch, channels, length), {"skip": wide, "k": wide, "k_rev": wide}
    shapes = {
        "u": sequence,
        "k": (channels, taps),
        "skip": (channels,),
        "pre_gate": sequence,
        "post_gate": sequence,
        "k_rev": (channels, taps + 2),
    }
    return {name: torch.randn(shapes[name]).to(dtypes.get(name, dtype)) for name in ("u", "k", *options)}


def direct_sum(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    k_rev: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """The definition, term by term."""
    g = u if pre_gate is None else u * pre_gate
    length = u.shape[-1]
    y = torch.zeros_like(u)
    for t in range(length):
        for s in range(k.shape[1]):
            if causal and s > t:
                break
            y[..., t] += k[:, s] * g[..., (t - s) % length]
        for s in range(0 if k_rev is None else min(k_rev.shape[1], length - 1 - t)):
            y[..., t] += k_rev[:, s] * g[..., t + 1 + s]
    y = y if skip is None else y + skip[:, None] * g
    return y if post_gate is None else y * post_gate


def require_gradients(arguments: Arguments) -> Arguments:
    return {name: x.detach().clone().requires_grad_() for name, x in arguments.items()}


def check(arguments: Arguments, causal: bool = True) -> None:
    """Value and all gradients of fft_conv within the bounds of the dtype of u."""
    bounds = BOUNDS[arguments["u"].dtype]
    tested = require_gradients(arguments)
    oracle = require_gradients({name: x.double() for name, x in arguments.items()})
    y, reference = fft_conv(**tested, causal=causal), fft_conv_float64(**oracle, causal=causal)
    size = reach(**arguments)
    found = violations(y.detach(), reference.detach(), bounds, size)
    dy = torch.randn_like(y)
    y.backward(dy)
    reference.backward(dy.double())
    for name, x in tested.items():
        if x.grad.dtype != x.dtype:
            found.append(f"gradient of {name} has dtype {x.grad.dtype}")
        found += gradient_violations(name, x.grad, oracle[name].grad, bounds)
    assert not found, found


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length, taps", [(1, 1), (1, 3), (2, 2), (3, 1), (5, 4), (6, 9), (17, 17)])
def test_the_oracle_is_the_defining_sum(length: int, taps: int, options: str) -> None:
    arguments = make(length, taps, OPTIONS[options])
    assert not violations(fft_conv_float64(**arguments), direct_sum(**arguments), FLOAT64)


@pytest.mark.parametrize("length, taps", [(1, 1), (2, 1), (5, 5), (12, 7)])
def test_the_circular_oracle_is_the_defining_sum(length: int, taps: int) -> None:
    arguments = make(length, taps, ("skip", "pre_gate", "post_gate"))
    assert not violations(fft_conv_float64(**arguments, causal=False), direct_sum(**arguments, causal=False), FLOAT64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filter_length", ["one", "shorter", "equal", "longer"])
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length: int, filter_length: str, dtype: torch.dtype) -> None:
    taps = {"one": 1, "shorter": -(-length // 2), "equal": length, "longer": 2 * length + 1}[filter_length]
    # Odd and even batches, since kernels pair the rows.
    check(make(length, taps, OPTIONS["m2"], batch=1 + length % 4, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_options(batch: int, options: str, dtype: torch.dtype) -> None:
    check(make(100, 100, OPTIONS[options], batch=batch, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length, taps", [(1, 1), (5, 3), (64, 64), (127, 127), (1026, 1000)])
def test_circular(length: int, taps: int, dtype: torch.dtype) -> None:
    check(make(length, taps, ("skip", "pre_gate", "post_gate"), dtype=dtype), causal=False)


@pytest.mark.parametrize("filter_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filters_have_a_dtype_of_their_own(dtype: torch.dtype, filter_dtype: torch.dtype) -> None:
    check(make(64, 64, OPTIONS["m2"], dtype=dtype, filter_dtype=filter_dtype))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "offset": lambda x: torch.cat([x[..., :1], x], dim=-1)[..., 1:],
    "every other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, dtype: torch.dtype) -> None:
    arguments = {name: LAYOUTS[layout](x) for name, x in make(33, 33, OPTIONS["m2"], dtype=dtype).items()}
    assert not arguments["u"].is_contiguous()
    compact = require_gradients({name: x.contiguous() for name, x in arguments.items()})
    strided = {name: x.detach().requires_grad_() for name, x in arguments.items()}
    y, expected = fft_conv(**strided), fft_conv(**compact)
    assert y.is_contiguous()
    assert torch.equal(y, expected)
    dy = LAYOUTS[layout](torch.randn_like(y))
    gradients = torch.autograd.grad(y, list(strided.values()), dy)
    for actual, reference in zip(gradients, torch.autograd.grad(expected, list(compact.values()), dy), strict=True):
        torch.testing.assert_close(actual, reference)


def test_a_summed_output_has_gradients() -> None:
    # The gradient of a sum is a single element, expanded.
    arguments = require_gradients(make(9, 9))
    fft_conv(**arguments).sum().backward()
    expected = arguments["k"].detach().cumsum(-1).flip(-1).expand(2, 3, 9)
    torch.testing.assert_close(arguments["u"].grad, expected)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (0, 0, 1)])
def test_empty_batch_or_channels(shape: tuple[int, int, int]) -> None:
    batch, channels, length = shape
    arguments = require_gradients(make(length, 4, OPTIONS["m2"], batch=batch, channels=channels))
    y = fft_conv(**arguments)
    assert y.shape == shape
    y.sum().backward()
    for name, x in arguments.items():
        assert torch.equal(x.grad, torch.zeros_like(x)), name


def test_only_wanted_gradients_are_computed() -> None:
    arguments = make(9, 9, OPTIONS["m2"])
    everything = require_gradients(arguments)
    fft_conv(**everything).square().sum().backward()
    for wanted in arguments:
        tested = {name: x.clone().requires_grad_(name == wanted) for name, x in arguments.items()}
        fft_conv(**tested).square().sum().backward()
        assert [name for name, x in tested.items() if x.grad is not None] == [wanted]
        torch.testing.assert_close(tested[wanted].grad, everything[wanted].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    arguments = require_gradients(make(1000, 1000, OPTIONS["m2"], dtype=dtype))

    def run() -> list[Tensor]:
        y = fft_conv(**arguments)
        return [y, *torch.autograd.grad(y.float().square().sum(), list(arguments.values()))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def is_smooth(n: int) -> bool:
    for prime in (2, 3, 5, 7):
        while n % prime == 0:
            n //= prime
    return n == 1


@pytest.mark.parametrize(("dtype", "again"), [(torch.float32, 0), (torch.float64, 0), (torch.bfloat16, 1)])
def test_outputs_before_their_gate_are_kept_in_full_precision(
    dtype: torch.dtype, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    u, k, gate = torch.randn(2, 3, 40), torch.randn(3, 40), torch.randn(2, 3, 40)
    u, k, gate = (x.to(dtype).requires_grad_() for x in (u, k, gate))
    y = fft_conv(u, k, post_gate=gate)
    assert y.dtype == dtype
    inverse, calls = torch.fft.irfft, []
    monkeypatch.setattr(torch.fft, "irfft", lambda *args, **kwargs: calls.append(args) or inverse(*args, **kwargs))
    y.backward(torch.randn(y.shape).to(dtype))
    # One for the gradient of u, one for that of k.
    assert len(calls) == 2 + again


def test_good_fft_lengths_are_the_smallest_smooth_ones() -> None:
    smooth = [n for n in range(1, 2200) if is_smooth(n)]
    for minimum in range(1, 2100):
        assert good_fft_length(minimum) == next(n for n in smooth if n >= minimum)


@pytest.mark.parametrize("length", [1026, 16386, 32770, 65538, 160002, 450002, 1000002])
def test_good_fft_lengths_of_the_hub(length: int) -> None:
    # Twice these lengths, which the models' own code uses, has a prime factor from 19 to 166,667.
    assert not is_smooth(2 * length)
    size = linear_fft_length(length, length)
    assert is_smooth(size)
    assert 2 * length - 1 <= size < 2.02 * length


def test_partial_convolution_needs_little_more_than_the_sequence() -> None:
    assert linear_fft_length(1000, 1) == 1000
    assert linear_fft_length(1000, 1, 8) == 1008


shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40))
property_test = settings(max_examples=40, deadline=None, derandomize=True)


@property_test
@given(shapes, st.integers(1, 50), st.floats(-3, 3), st.booleans())
def test_linear_in_input_and_filter(shape: tuple[int, int, int], taps: int, factor: float, causal: bool) -> None:
    batch, channels, length = shape
    taps = taps if causal else min(taps, length)
    a, b = (make(length, taps, batch=batch, channels=channels) for _ in range(2))

    def conv(u: Tensor, k: Tensor) -> Tensor:
        return fft_conv(u, k, causal=causal)

    u, k = a["u"] + factor * b["u"], a["k"] + factor * b["k"]
    torch.testing.assert_close(conv(u, a["k"]), conv(a["u"], a["k"]) + factor * conv(b["u"], a["k"]))
    torch.testing.assert_close(conv(a["u"], k), conv(a["u"], a["k"]) + factor * conv(a["u"], b["k"]))


@property_test
@given(shapes, st.integers(1, 50), st.integers(0, 40))
def test_shifted_input_shifts_the_output(shape: tuple[int, int, int], taps: int, shift: int) -> None:
    batch, channels, length = shape
    shift = min(shift, length)
    u, k = make(length, taps, batch=batch, channels=channels).values()
    late = torch.nn.functional.pad(u, (shift, 0))[..., :length]
    expected = torch.nn.functional.pad(fft_conv(u, k), (shift, 0))[..., :length]
    torch.testing.assert_close(fft_conv(late, k), expected)
    rolled_k = k[:, :length]
    expected = fft_conv(u, rolled_k, causal=False).roll(shift, -1)
    torch.testing.assert_close(fft_conv(u.roll(shift, -1), rolled_k, causal=False), expected)


@property_test
@given(st.integers(1, 4), st.integers(2, 40), st.data())
def test_the_future_does_not_matter(batch: int, length: int, data: st.DataObject) -> None:
    now = data.draw(st.integers(1, length - 1))
    arguments = make(length, length, OPTIONS["hyena"], batch=batch)
    changed = {**arguments, "u": arguments["u"].clone()}
    changed["u"][..., now:] = 7.0
    torch.testing.assert_close(fft_conv(**changed)[..., :now], fft_conv(**arguments)[..., :now])
    assert not torch.allclose(fft_conv(**changed)[..., now:], fft_conv(**arguments)[..., now:])


@property_test
@given(st.integers(2, 5), st.integers(1, 40), st.data())
def test_rows_of_the_batch_do_not_meet(batch: int, length: int, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, batch - 1))
    arguments = make(length, length, OPTIONS["m2"], batch=batch)
    alone = {name: x[row : row + 1] if x.dim() == 3 else x for name, x in arguments.items()}
    torch.testing.assert_close(fft_conv(**alone), fft_conv(**arguments)[row : row + 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["u", "pre_gate", "post_gate"])
def test_what_is_not_finite_stays_in_its_row(name: str, value: float) -> None:
    arguments = make(64, 64, OPTIONS["m2"], batch=3, dtype=torch.float32)
    clean = fft_conv(**arguments)
    arguments[name][1, 2, 5] = value
    y = fft_conv(**arguments)
    other = torch.ones(3, 3, dtype=torch.bool)
    other[1, 2] = False
    assert torch.equal(y[other], clean[other])
    assert not y[1, 2].isfinite().all()
