"""Spectral transform units (Flash STU): convolutions with a few fixed filters phi, mixed by learnt weights.

In the approximate form each channel has one filter k = phi M_filters, and the unit computes, for v = u M_inputs,

    conv(v, k) + sign conv(sign v, k),    sign[t] = (-1)^t

The signs cancel but for (-1)^s at lag s, so that both terms are one convolution with twice the even taps of k. With
`use_hankel_L` the first term stands alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .base import Adapter, PatchedMixer
from .cache import Filters
from .structure import attribute, check_floating, check_forward, check_shape, require

MIXERS = frozenset({"STU"})


class PatchedSTU(PatchedMixer):
    """The forward of the approximate unit, `(batch, length, n_embd)` to the same shape in float32."""

    own_filter = frozenset({"M_filters"})

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > len(self.phi):
            return self.bypass(f"the input is longer than the {len(self.phi)} positions of phi", x)
        v = (x @ self.M_inputs).float()
        return self.convolve_uncast(self, v.transpose(1, 2)).transpose(1, 2)

    def generate(self, filter_fn: Any, length: int, bidirectional: bool) -> Filters:
        k = (self.phi[:length].float() @ self.M_filters.float()).transpose(0, 1)
        if not self.use_hankel_L:
            k = k * (2 - 2 * (torch.arange(length, device=k.device) % 2))
        return k, None, None


def _check(module: nn.Module) -> None:
    check_forward(module, MIXERS, "the unit")
    width = attribute(module, "d_in", int)
    require(bool(getattr(module, "use_approx", False)), "use_approx=False: its filters mix channels densely")
    require(getattr(module, "flash_fft", None) is None, "flash_fft is set: another FFT library is active")
    attribute(module, "use_hankel_L", bool)
    phi = attribute(module, "phi", Tensor)
    require(phi.dim() == 2, f"phi has {phi.dim()} dimensions, not 2")
    check_shape(module, "M_inputs", (width, width))
    check_shape(module, "M_filters", (phi.shape[1], width))
    check_floating(module, "the unit")
    size = attribute(module, "n", int)
    require(size >= 2 * len(phi) - 1, f"a transform of {size} points wraps around for {len(phi)} positions")


def _shape(module: Any, length: int) -> tuple[int, ...]:
    return 1, min(length, len(module.phi)), module.d_in


STU = Adapter("stu", MIXERS, _check, PatchedSTU, input_shape=_shape)
