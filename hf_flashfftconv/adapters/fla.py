"""The long convolutions of flash-linear-attention: conv(x, k) + x, with taps that are weights or made by a network.

The weights are laid on a circle of twice the input's length as they are. On inputs shorter than half of the filter, its
last taps therefore wrap around and act on later positions; a patched module does the same.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.reference import unwrap_taps
from .base import Adapter, PatchedMixer
from .cache import Filters
from .structure import attribute, check_floating, check_forward, require

EXPLICIT = frozenset({"LongConvolution"})
IMPLICIT = frozenset({"ImplicitLongConvolution"})


class PatchedLongConvolution(PatchedMixer):
    """The forward of `LongConvolution`, whose taps are a parameter `(hidden_size, max_len)`."""

    own_filter = frozenset({"filter"})

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.convolve_uncast(self, x.transpose(1, 2)).transpose(1, 2)

    def generate(self, filter_fn: Any, length: int, bidirectional: bool) -> Filters:
        k, k_rev = unwrap_taps(self.filter, length, 2 * length)
        return k, k_rev, torch.ones(self.hidden_size, device=k.device)


class PatchedImplicitLongConvolution(PatchedLongConvolution):
    """The forward of `ImplicitLongConvolution`, whose network makes as many taps as the input is long."""

    own_filter = frozenset()

    def filter_modules(self) -> list[nn.Module]:
        return [self]

    def generate(self, filter_fn: Any, length: int, bidirectional: bool) -> Filters:
        k = self.filter(length)[0]
        return k, None, torch.ones(self.hidden_size, device=k.device)


def _check_explicit(module: nn.Module) -> None:
    check_forward(module, EXPLICIT, "the convolution")
    width = attribute(module, "hidden_size", int)
    shape = attribute(module, "filter", Tensor).shape
    require(len(shape) == 2 and shape[0] == width, f"filter has shape {tuple(shape)}, not ({width}, taps)")
    require(not module._modules, f"it has sub-modules: {', '.join(module._modules)}")
    check_floating(module, "the filter")


def _check_implicit(module: nn.Module) -> None:
    check_forward(module, IMPLICIT, "the convolution")
    attribute(module, "hidden_size", int)
    attribute(module, "pos_emb", nn.Module)
    check_floating(attribute(module, "mlp", nn.Sequential), "mlp")
    require(callable(getattr(module, "filter", None)), "it has no method filter")


def _shape(module: Any, length: int) -> tuple[int, ...]:
    return 1, length, module.hidden_size


LONG_CONVOLUTION = Adapter("fla", EXPLICIT, _check_explicit, PatchedLongConvolution, input_shape=_shape)
IMPLICIT_LONG_CONVOLUTION = Adapter(
    "fla", IMPLICIT, _check_implicit, PatchedImplicitLongConvolution, input_shape=_shape
)
