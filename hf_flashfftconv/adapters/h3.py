"""H3: a shift convolution and a diagonal state-space convolution between three projections.

    k' = conv(k, k_shift) + D_shift k,    y = q (conv(k' v, k_diag) + D k' v)

With heads of d channels, k' v is an outer product within each head, and q sums over its first factor. As in the
original, everything between the projections is in the dtype of the filters, which is float32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Adapter, PatchedMixer
from .cache import Filters
from .structure import attribute, check_forward, check_kernel, check_projection, check_shape, has_hooks, require

MIXERS = frozenset({"H3"})
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class PatchedH3(PatchedMixer):
    """The stateless forward of H3, `(batch, length, d_model)` to the same shape."""

    def filter_modules(self) -> list[nn.Module]:
        return [self.ssm_k_kernel, self.kernel]

    def forward(self, u: Tensor, inference_params: Any = None) -> Tensor:
        if inference_params is not None:
            return self.bypass("inference_params were given, which keep the state of a generation", u, inference_params)
        if not self.covered():
            return self.original_forward(u)
        # The original multiplies by these weights itself, so that hooks of the projections see nothing either.
        projections = [getattr(self, name) for name in PROJECTIONS]
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        biases = [p.bias.to(autocast or p.weight.dtype) for p in projections]
        q, k, v = [
            (F.linear(u, p.weight) + bias).transpose(1, 2).float() for p, bias in zip(projections, biases, strict=True)
        ]
        k = self.convolve_uncast(self.ssm_k_kernel, k)
        y = self.convolve_uncast(self.kernel, v, k, q) if self.head_dim == 1 else self.convolve_heads(q, k, v)
        y = y.transpose(1, 2)
        if not torch.is_autocast_enabled(u.device.type):
            y = y.to(self.output_linear.weight.dtype)
        return self.output_linear(y)

    def convolve_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All pairs of channels within a head as so many sequences of a batch."""
        batch, length, d = q.shape[0], q.shape[-1], self.head_dim
        q, k, v = [x.unflatten(1, (-1, d)).transpose(1, 2) for x in (q, k, v)]

        def paired(x: Tensor, dim: int) -> Tensor:
            return x.unsqueeze(dim).expand(batch, d, d, -1, length).flatten(0, 2)

        y = self.convolve_uncast(self.kernel, paired(v, 1), paired(k, 2), paired(q, 2))
        return y.unflatten(0, (batch, d, d)).sum(1).flatten(1, 2)

    def generate(self, filter_fn: Any, length: int, bidirectional: bool) -> Filters:
        taps = length if self.L is None else min(length, self.L)
        k = filter_fn(L=taps, state=None, rate=1.0)[0][0]
        return k, None, self.ssm_k_D if filter_fn is self.ssm_k_kernel else self.D


def _check(module: nn.Module) -> None:
    check_forward(module, MIXERS, "the layer")
    require(not getattr(module, "use_fast_fftconv", False), "use_fast_fftconv: its own fused kernels are active")
    width, d = attribute(module, "d_model", int), attribute(module, "head_dim", int)
    for name in PROJECTIONS:
        # A wrapped projection has no effect in the original, which reads the weight below.
        projection = attribute(module, name, nn.Linear)
        require(not projection._modules and not has_hooks(projection), f"{name} is wrapped or hooked, but never called")
    for name in (*PROJECTIONS, "output_linear"):
        check_projection(module, name, width, width)
    for name in ("ssm_k_kernel", "kernel"):
        check_kernel(module, name)
    check_shape(module, "ssm_k_D", (width,))
    check_shape(module, "D", (width // d,))


def _shape(module: Any, length: int) -> tuple[int, ...]:
    return 1, length, module.d_model


H3 = Adapter("h3", MIXERS, _check, PatchedH3, input_shape=_shape)
