"""short_conv and gated_short_conv: values and gradients in float64, dtypes, layouts, operator checks, refusals."""

from collections.abc import Iterator

import pytest
import torch
from short_cases import LAYOUTS, check, make, run
from torch.utils.checkpoint import checkpoint

from hf_flashfftconv.errors import BackendError
from hf_flashfftconv.functional import fft_conv, gated_short_conv, short_conv
from hf_flashfftconv.ops.short_conv import NO_GATE

GATES = (NO_GATE, 0, 1, 2)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("length", [1, 2, 5, 40])
@pytest.mark.parametrize("taps", [1, 3, 7, 9])
def test_definition(length: int, taps: int) -> None:
    z, weight, bias = make(length, taps, NO_GATE, dtype=torch.float64, weight_dtype=torch.float64)
    expected = bias[:, None].expand_as(z).clone()
    for t in range(length):
        for s in range(min(taps, t + 1)):
            expected[..., t] += weight[:, taps - 1 - s] * z[..., t - s]
    torch.testing.assert_close(short_conv(z, weight, bias), expected)
    torch.testing.assert_close(short_conv(z, weight[:, None]), expected - bias[:, None])


@pytest.mark.parametrize("gate", [0, 1, 2])
def test_gated_is_the_short_convolution_of_three_blocks(gate: int) -> None:
    z, weight, bias = make(21, 3, gate)
    blocks = list(short_conv(z, weight, bias).chunk(3, dim=1))
    chosen, product = gated_short_conv(z, weight, bias, gate=gate)
    assert torch.equal(chosen, blocks.pop(gate)) and torch.equal(product, blocks[0] * blocks[1])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(gate: int, with_bias: bool) -> None:
    tensors = make(5, 3, gate, channels=2, dtype=torch.float64, weight_dtype=torch.float64)[: 2 + with_bias]
    leaves = [x.requires_grad_() for x in tensors]

    def call(*x: torch.Tensor) -> object:
        return short_conv(*x) if gate == NO_GATE else gated_short_conv(*x, gate=gate)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rounds_once(gate: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    tensors = make(50, 3, gate, dtype=dtype, weight_dtype=weight_dtype)
    check(tensors, gate, "torch")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout: object) -> None:
    z, weight, bias = make(19, 3, 0)
    results, gradients = run((layout(z), weight, bias), 0, "torch")
    expected, expected_gradients = run((z, weight, bias), 0, "torch")
    assert all(map(torch.equal, results, expected)) and all(map(torch.equal, gradients, expected_gradients))
    for y in results:
        assert y.stride(2) == 1 and all(stride % 8 == 0 for stride in y.stride()[:2])


def test_the_gradient_lies_as_its_input() -> None:
    z, weight, bias = make(16, 3, 0)
    z = LAYOUTS["channels last"](z)
    _, (dz, *_) = run((z, weight, bias), 0, "torch")
    assert dz.stride() == z.stride()


@pytest.mark.parametrize("gate, length", [(NO_GATE, 8), (1, 5)])
def test_opcheck(gate: int, length: int) -> None:
    z, weight, bias = make(length, 3, gate, channels=2)
    operators = torch.ops.hf_flashfftconv
    torch.library.opcheck(operators.short_conv.default, (z, weight, bias, gate, "torch"))
    gradients = [torch.randn_like(y) for y in operators.short_conv(z, weight, bias, gate, "torch")]
    for needs in ([True] * 3, [False, True, False]):
        torch.library.opcheck(operators.short_conv_backward.default, (gradients, z, weight, bias, gate, "torch", needs))


def mixer(z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    chosen, product = gated_short_conv(z, weight, bias)
    return fft_conv(product, k, post_gate=chosen)


def test_compiles_in_one_graph(fresh_dynamo: None) -> None:
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (16, 19):
        z, weight, bias = (x.requires_grad_() for x in make(length, 3, 0))
        k = torch.randn(z.shape[1] // 3, length, requires_grad=True)
        actual, expected = (f(z, weight, bias, k) for f in (compiled, mixer))
        torch.testing.assert_close(actual, expected)
        found = [torch.autograd.grad(y.square().sum(), (z, weight, bias, k)) for y in (actual, expected)]
        torch.testing.assert_close(*found)
    with torch.no_grad():
        torch.testing.assert_close(compiled(z, weight, bias, k), expected)


def test_autocast_casts_the_input_alone() -> None:
    z, weight, bias = make(20, 3, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chosen, product = gated_short_conv(z, weight, bias)
    expected = gated_short_conv(z.bfloat16(), weight, bias)
    assert chosen.dtype == product.dtype == torch.bfloat16
    assert torch.equal(chosen, expected[0]) and torch.equal(product, expected[1])


def test_checkpointing() -> None:
    tensors = make(20, 3, 1)
    _, expected = run(tensors, 1, "torch", torch.ones_like)
    leaves = [x.detach().requires_grad_() for x in tensors]
    results = checkpoint(lambda *x: gated_short_conv(*x, gate=1), *leaves, use_reentrant=False)
    gradients = torch.autograd.grad(results, leaves, [torch.ones_like(y) for y in results])
    assert all(map(torch.equal, gradients, expected))


def test_one_gradient_of_two_and_inference() -> None:
    z, weight, bias = (x.requires_grad_() for x in make(20, 3, 0))
    chosen, product = gated_short_conv(z, weight, bias)
    (dz,) = torch.autograd.grad(product.sum(), z)
    assert (dz.chunk(3, dim=1)[0] == 0).all() and dz.chunk(3, dim=1)[1].abs().sum() > 0
    with torch.inference_mode():
        assert torch.equal(gated_short_conv(z, weight, bias)[0], chosen)


def test_second_derivatives_are_refused() -> None:
    z, weight, bias = (x.requires_grad_() for x in make(6, 3, NO_GATE))
    (dz,) = torch.autograd.grad(short_conv(z, weight, bias).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="short_conv has no second derivative"):
        (z.sum() + dz.square().sum()).backward()


def test_empty_batches() -> None:
    z, weight, bias = make(6, 3, 0)
    results, gradients = run((z[:0], weight, bias), 0, "torch")
    assert [y.shape for y in results] == [(0, z.shape[1] // 3, 6)] * 2
    assert gradients[0].shape == z[:0].shape and (gradients[1] == 0).all() and (gradients[2] == 0).all()


def test_refusals() -> None:
    z, weight, bias = make(6, 3, 0)
    with pytest.raises(ValueError, match="gate is the number of a block, 0, 1 or 2, got 3"):
        gated_short_conv(z, weight, bias, gate=3)
    with pytest.raises(ValueError, match="three blocks of channels, got 4 channels"):
        gated_short_conv(z[:, :4], weight[:4], bias[:4])
    with pytest.raises(ValueError, match=r"weight must have shape .* to fit z"):
        short_conv(z, weight[1:], bias)
    with pytest.raises(ValueError, match=r"bias must have shape \(\d+,\) to fit z"):
        short_conv(z, weight, bias[1:])
    with pytest.raises(ValueError, match="length at least 1"):
        short_conv(z[..., :0], weight)
    with pytest.raises(TypeError, match=r"z must be one of .*, got torch\.int64"):
        short_conv(z.long(), weight)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        short_conv(z, weight, backend="fast")
    with pytest.raises(BackendError, match="z is on the device cpu, not on a CUDA device"):
        short_conv(z, weight, backend="cuda")
