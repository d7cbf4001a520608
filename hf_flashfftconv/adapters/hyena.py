"""Hyena operators: HyenaDNA, its derivatives under the same class names, and the Hyena language models of safari.

All compute, with z = in_proj(u), its short causal convolution s = (x0, x1, v), g = x1 v, and the filters k and D,

    out_proj(x0 (conv(g, k) + D g))

safari adds a module `activation` before the output projection, and options that change the maths, which are refused.
"""

from typing import Any

from torch import Tensor, nn

from .base import Adapter, PatchedMixer
from .structure import (
    attribute,
    check_dropout,
    check_forward,
    check_implicit_filter,
    check_projection,
    check_short_filter,
    require,
)

OPERATORS = frozenset({"HyenaOperator", "HyenaDnaOperator"})
FILTERS = frozenset({"HyenaFilter", "HyenaDnaFilter"})


class PatchedHyena(PatchedMixer):
    """The forward of HyenaDNA's operator."""

    channel_major = True

    def forward(self, u: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not self.covered():
            return self.original_forward(u, *args, **kwargs)
        return self.project(self.out_proj, self.mix(u))

    def mix(self, u: Tensor) -> Tensor:
        """All before the output projection: `(batch, length, channels)` to the same shape."""
        self.checked_length(u)
        v, in_gate, out_gate = self.short_filtered(self.project(self.in_proj, u).transpose(1, 2), 0, self.dropout)
        return self.convolve(self.filter_fn, v, in_gate, out_gate).transpose(1, 2)


class PatchedSafariHyena(PatchedHyena):
    """The forward of safari's operator, for one head and one block."""

    def forward(self, u: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.covered():
            return self.original_forward(u, *args, **kwargs)
        y = self.project(self.out_proj, self.activation(self.mix(u)))
        return (y, None) if self.return_state else y


def _check_operator(module: nn.Module) -> None:
    check_forward(module, OPERATORS, "the operator")
    width = attribute(module, "d_model", int)
    order = attribute(module, "order", int)
    attribute(module, "l_max", int)
    require(order == 2, f"order {order}: only order 2 is supported")
    check_projection(module, "in_proj", width, 3 * width)
    check_projection(module, "out_proj", width, width)
    check_short_filter(module, "short_filter", 3 * width)
    check_dropout(module, "dropout")
    filter_fn = check_implicit_filter(module, "filter_fn", FILTERS, width)
    # The training code of HyenaDNA has such a mode, which shifts the input instead of adding anticausal taps.
    require(not getattr(filter_fn, "bidirectional", False), "filter_fn.bidirectional is not supported here")


def _is_safari(module: nn.Module) -> bool:
    return hasattr(module, "num_heads")


def _check_safari(module: nn.Module) -> None:
    for name in ("num_heads", "num_blocks", "inner_factor"):
        value = attribute(module, name, int)
        require(value == 1, f"{name} {value}: only 1 is supported")
    for name in ("outer_mixing", "post_order_ffn"):
        require(not getattr(module, name, False), f"{name} is not supported")
    attribute(module, "activation", nn.Module)
    attribute(module, "return_state", bool)
    _check_operator(module)


HYENADNA = Adapter("hyenadna", OPERATORS, _check_operator, PatchedHyena, lambda module: not _is_safari(module))
SAFARI = Adapter("safari", OPERATORS, _check_safari, PatchedSafariHyena, _is_safari)
