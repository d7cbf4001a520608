"""Inputs, oracle and checks of the short convolutions, for every place that their code runs."""

import math
from collections.abc import Callable, Sequence

import torch
from numerics import ROUNDING, error
from torch import Tensor

from hf_flashfftconv.functional import gated_short_conv, short_conv
from hf_flashfftconv.ops.short_conv import NO_GATE, reference

Tensors = tuple[Tensor, Tensor, Tensor]


def _in_gaps(x: Tensor, gap: int) -> Tensor:
    padded = torch.full((*x.shape[:2], x.shape[2] + gap), math.nan, dtype=x.dtype, device=x.device)
    return padded[..., :-gap].copy_(x)


# Views equal to a tensor (B, C, L) that lie differently in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.mT.contiguous().mT,
    "channels last, unaligned": lambda x: _in_gaps(x.mT, 3).mT,
    "rows two apart": lambda x: _in_gaps(x, 2),
    "rows eight apart": lambda x: _in_gaps(x, 8 + -x.shape[2] % 8),
    "batch inside": lambda x: x.movedim(0, 2).contiguous().movedim(2, 0),
}


def make(
    length: int,
    taps: int,
    gate: int,
    *,
    batch: int = 2,
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Tensors:
    """z, weight and bias; `channels` is the number of each output."""
    channels = channels if gate == NO_GATE else 3 * channels
    z, weight = torch.randn(batch, channels, length), torch.randn(channels, taps)
    bias = torch.randn(channels)
    return z.to(device, dtype), weight.to(device, weight_dtype), bias.to(device, weight_dtype)


def run(
    tensors: Sequence[Tensor], gate: int, backend: str, make_gradient: Callable[[Tensor], Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients; those of the outputs are the same for all backends."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    if gate == NO_GATE:
        results = [short_conv(*leaves, backend=backend)]
    else:
        results = [*gated_short_conv(*leaves, gate=gate, backend=backend)]
    gradients = [make_gradient(y) if make_gradient else _gradient(y) for y in results]
    return [y.detach() for y in results], [*torch.autograd.grad(results, leaves, gradients)]


def oracle(tensors: Sequence[Tensor], gate: int) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients in float64 by autograd."""
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    results = reference(*leaves, gate)
    gradients = [_gradient(y.to(tensors[0].dtype)).double() for y in results]
    return [y.detach() for y in results], [*torch.autograd.grad(results, leaves, gradients)]


def check(tensors: Tensors, gate: int, backend: str = "cuda") -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a backend are the oracle's, rounded once."""
    results, gradients = run(tensors, gate, backend)
    expected, expected_gradients = oracle(tensors, gate)
    # Few values may all lie near ties.
    slack = 1.3 if expected[0].numel() >= 500 else 2.5
    for actual, reference_value in zip(results, expected, strict=True):
        assert actual.dtype == tensors[0].dtype
        assert error(actual, reference_value) <= max(slack * ROUNDING[actual.dtype], 2e-7)
    for actual, reference_value, x in zip(gradients, expected_gradients, tensors, strict=True):
        assert actual.dtype == x.dtype
        assert error(actual, reference_value) <= max(1.2 * slack * ROUNDING[x.dtype], 1e-6)
    return results, gradients


def _gradient(y: Tensor) -> Tensor:
    """Numbers that are evenly spread, not centred, and the same whatever `y` holds."""
    steps = torch.arange(y.numel(), dtype=torch.float64, device=y.device).view(y.shape)
    return ((steps * 0.6180339887498949).frac() * 2 - 0.8).to(y.dtype)
