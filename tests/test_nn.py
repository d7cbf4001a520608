"""FlashFFTConv against the formula of the published module, and the short depthwise convolution against its sum."""

import pytest
import torch
from numerics import BOUNDS, FLOAT64, reach, violations
from torch import Tensor
from torch.nn import functional as F

from hf_flashfftconv import FlashFFTConv, fft_conv
from hf_flashfftconv.nn import DepthwiseConv1d


def published(u: Tensor, k: Tensor, size: int, pregate: Tensor | None = None, postgate: Tensor | None = None) -> Tensor:
    """What the published module computes: a circular convolution of FFT size `size`, cut to the input's length."""
    g = u if pregate is None else u * pregate
    y = torch.fft.ifft(torch.fft.fft(g, n=size) * torch.fft.fft(k, n=size)).real[..., : u.shape[-1]]
    return y if postgate is None else y * postgate


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_length_and_filter_length(size: int) -> None:
    module = FlashFFTConv(size)
    for length in range(1, size + 1):
        for taps in range(1, size + 1):
            u = torch.randn(2, 3, length, dtype=torch.float64, requires_grad=True)
            k = torch.randn(3, taps, dtype=torch.float64, requires_grad=True)
            y, expected = module(u, k), published(u, k, size)
            assert not violations(y.detach(), expected.detach(), FLOAT64, reach(u, k).detach()), (length, taps)
            dy = torch.randn_like(y)
            gradients, references = (torch.autograd.grad(x, (u, k), dy) for x in (y, expected))
            for gradient, reference in zip(gradients, references, strict=True):
                torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("length, taps", [(256, 256), (255, 100), (512, 300), (300, 512), (512, 512)])
def test_gates_and_dtypes(length: int, taps: int, dtype: torch.dtype) -> None:
    u, pregate, postgate = torch.randn(3, 3, 4, length).to(dtype)
    k = torch.randn(4, taps)
    for gates in ((None, None), (pregate, postgate), (pregate, None), (None, postgate)):
        doubles = (None if gate is None else gate.double() for gate in gates)
        reference = published(u.double(), k.double(), 512, *doubles)
        y = FlashFFTConv(512, dtype=dtype, use_32_butterfly=False)(u, k, *gates)
        assert not violations(y, reference, BOUNDS[dtype])


def test_half_the_size_is_causal() -> None:
    u, k = torch.randn(2, 3, 32), torch.randn(3, 32)
    assert torch.equal(FlashFFTConv(64)(u, k), fft_conv(u, k))


def test_m2_bert_makes_one_filter_of_two() -> None:
    u, k, k_rev = torch.randn(2, 3, 32), torch.randn(3, 32), torch.randn(3, 32)
    both = F.pad(k, (0, 32)) + F.pad(k_rev.flip(-1), (32, 0))
    torch.testing.assert_close(FlashFFTConv(64)(u, both), fft_conv(u, k, k_rev=k_rev))


def test_one_module_serves_all_and_stores_nothing() -> None:
    module = FlashFFTConv(64, torch.float16)
    assert repr(module) == "FlashFFTConv(seqlen=64, dtype=torch.float16)"
    before = module(torch.ones(1, 1, 8), torch.ones(1, 8))
    # The published module's tables are buffers, which a change of dtype spoils.
    after = module.bfloat16().eval()(torch.ones(1, 1, 8), torch.ones(1, 8))
    assert torch.equal(before, after)
    assert len(module.state_dict()) == 0
    assert not [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize(
    "length, taps, message",
    [(9, 4, "u of length 9 and k of 4 taps .* seqlen, 8"), (4, 9, "u of length 4 and k of 9 taps .* seqlen, 8")],
)
def test_inputs_longer_than_the_size_are_refused(length: int, taps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlashFFTConv(8)(torch.zeros(1, 2, length), torch.zeros(2, taps))


def test_a_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        FlashFFTConv(0)


@pytest.mark.parametrize("kernel_size, padding, bias", [(3, 2, True), (3, 1, False), (4, 3, True), (1, 0, True)])
def test_depthwise_convolution(kernel_size: int, padding: int, bias: bool) -> None:
    module = DepthwiseConv1d(5, kernel_size, padding, bias=bias, dtype=torch.float64)
    x = F.pad(torch.randn(2, 5, 9, dtype=torch.float64), (padding, padding))
    outputs = x.shape[-1] - kernel_size + 1
    expected = sum(module.weight[:, 0, s, None] * x[..., s : s + outputs] for s in range(kernel_size))
    expected = expected + module.bias[:, None] if bias else expected
    torch.testing.assert_close(module(x[..., padding : padding + 9]), expected)


def test_depthwise_convolution_shares_checkpoints_with_conv1d() -> None:
    ours, theirs = DepthwiseConv1d(5, 3, padding=2), torch.nn.Conv1d(5, 5, 3, padding=2, groups=5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 9)
    assert torch.equal(ours(x), theirs(x))
