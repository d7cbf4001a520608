"""Layers for the `kernels` library: stateless stand-ins for the mixers of this package's models.

Such a layer is a `forward` that is bound to the module it replaces, whose sub-modules and attributes it uses. These
compute gates, long convolution and skip term in one `fft_conv`; [`patch_model`] keeps the filters between calls, too.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .functional import fft_conv


class HyenaOperator(nn.Module):
    """`out_proj(x0 * conv(x1 * v))`, for HyenaDNA and Hyena language models."""

    can_torch_compile = True

    def forward(self, u: torch.Tensor, past: Any = None) -> torch.Tensor:
        if past is not None:
            return past.mix(self, u)
        length = u.shape[1]
        mixed = self.short_filter(self.in_proj(u).transpose(1, 2))[..., :length]
        x0, x1, v = mixed.split(self.d_model, dim=1)
        v, gate = (self.dropout(v * x1), None) if self.dropout.training and self.dropout.p > 0 else (v, x1)
        return self.out_proj(_convolve(self.filter_fn, v, gate, x0).transpose(1, 2))


class MonarchMixerSequenceMixing(nn.Module):
    """The mixer of M2-BERT: the same in both directions, and a second long convolution without gates."""

    can_torch_compile = True

    def forward(self, u: torch.Tensor) -> tuple[torch.Tensor, None]:
        if self.hyena_training_additions:
            u = self.layernorm(u)
        length = u.shape[1]
        mixed = self.short_filter(self.in_linear(u).transpose(1, 2))[..., :length]
        x1, x2, v = mixed.split(self.d_model, dim=1)
        active = self.hyena_training_additions and self.drop.training and self.drop.p > 0
        v, gate = (self.drop(v * x1), None) if active else (v, x1)
        y = _convolve(self.filter_fn, v, gate, x2)
        if self.residual_long_conv:
            y = y + _convolve(self.filter_fn2, u.transpose(1, 2))
        y = y.transpose(1, 2)
        if self.hyena_training_additions:
            y = self.drop(self.act(y))
        return self.out_linear(y), None


def _convolve(
    filter_fn: nn.Module, u: Tensor, pre_gate: Tensor | None = None, post_gate: Tensor | None = None
) -> Tensor:
    length = u.shape[-1]
    k = filter_fn.filter(length)[0].transpose(0, 1)
    k_rev = filter_fn.filter_rev(length)[0].transpose(0, 1) if filter_fn.bidirectional else None
    skip = filter_fn.bias if filter_fn.use_bias else None
    return fft_conv(u, k, skip=skip, pre_gate=pre_gate, post_gate=post_gate, k_rev=k_rev)
