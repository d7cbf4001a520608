"""fft_conv: the long convolution with its gates and skip term, on any device."""

import torch
from torch import Tensor

from .ops.library import BACKENDS, FFTConvFunction


def fft_conv(
    u: Tensor,
    k: Tensor,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    k_rev: Tensor | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> Tensor:
    device_type = u.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        u = u.to(dtype)
        pre_gate = None if pre_gate is None else pre_gate.to(dtype)
        post_gate = None if post_gate is None else post_gate.to(dtype)
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}")
    return FFTConvFunction.apply(u, k, skip, pre_gate, post_gate, k_rev, causal, backend)
