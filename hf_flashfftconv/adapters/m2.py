"""Monarch Mixer's sequence mixing (M2-BERT): a gated bidirectional convolution beside an ungated one of the input.

With s = (x1, x2, v) the short causal convolution of in_linear(u) and g = x1 v,

    out_linear(x2 (conv(g, k, k_rev) + D g)  [+ conv(u, k2, k2_rev) + D2 u])

so the gates are in the opposite order of Hyena's. The second term exists with `residual_long_conv`, the anticausal taps
k_rev with `bidirectional`; `hyena_training_additions` normalise the input and drop some of g and of the sum.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .base import Adapter, PatchedMixer
from .structure import (
    Unsupported,
    attribute,
    check_dropout,
    check_forward,
    check_implicit_filter,
    check_projection,
    check_short_filter,
    require,
)

MIXERS = frozenset({"MonarchMixerSequenceMixing"})
FUSED_MIXERS = frozenset({"FlashMMSequenceMixing"})
FILTERS = frozenset({"HyenaFilter"})


# Known when a graph is traced, into which the question itself cannot go.
@torch.compiler.assume_constant_result
def _detects_anomalies() -> bool:
    return torch.is_anomaly_enabled()


class PatchedMonarchMixer(PatchedMixer):
    """The forward of M2-BERT's sequence mixing."""

    @property
    def channel_major(self) -> bool:
        return not getattr(self, "hyena_training_additions", False)

    def filter_modules(self) -> list[nn.Module]:
        return [self.filter_fn, self.filter_fn2] if self.residual_long_conv else [self.filter_fn]

    def forward(self, u: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        if not self.covered():
            return self.original_forward(u, **kwargs)
        if not _detects_anomalies():
            return self.mix(u), None
        # The published layers switch anomaly detection on around this, which writes down the Python stack for every
        # operation and weight: most of the time of a training step. Nothing else of it reaches the backward pass. When
        # they are compiled, their switch has broken the graph already, and this one breaks it once more.
        with torch.autograd.set_detect_anomaly(False):
            return self.mix(u), None

    def mix(self, u: Tensor) -> Tensor:
        """The mixed sequence `(batch, length, channels)`, of a tensor of that shape."""
        additions = getattr(self, "hyena_training_additions", False)
        self.checked_length(u)
        if additions:
            u = self.layernorm(u)
        dropout = self.drop if additions else None
        v, in_gate, out_gate = self.short_filtered(self.project(self.in_linear, u).transpose(1, 2), 1, dropout)
        y = self.convolve(self.filter_fn, v, in_gate, out_gate, self.bidirectional)
        if self.residual_long_conv:
            # As in the original, the input keeps its precision here whatever autocast makes of the gated path.
            with torch.autocast(u.device.type, enabled=False):
                residual = self.convolve(self.filter_fn2, u.transpose(1, 2), bidirectional=self.bidirectional)
            y = y + residual
        y = y.transpose(1, 2)
        if additions:
            y = self.drop(self.act(y))
        return self.project(self.out_linear, y)


def _check(module: nn.Module) -> None:
    name = type(module).__name__
    if any(cls.__name__ in FUSED_MIXERS for cls in type(module).__mro__):
        raise Unsupported(f"{name} runs M2's own fused kernels (use_flash_mm)")
    check_forward(module, MIXERS, "the mixer")
    width = attribute(module, "d_model", int)
    attribute(module, "l_max", int)
    bidirectional = attribute(module, "bidirectional", bool)
    check_projection(module, "in_linear", width, 3 * width)
    check_projection(module, "out_linear", width, width)
    check_short_filter(module, "short_filter", 3 * width)
    if getattr(module, "hyena_training_additions", False):
        attribute(module, "layernorm", nn.Module)
        attribute(module, "act", nn.Module)
        check_dropout(module, "drop")
    for filter_name in ("filter_fn", "filter_fn2") if attribute(module, "residual_long_conv", bool) else ("filter_fn",):
        filter_fn = check_implicit_filter(module, filter_name, FILTERS, width)
        active = getattr(filter_fn, "flashfft", None)
        require(active is None, f"{filter_name}.flashfft is set (use_flash_fft): another FFT library is active")
        agree = getattr(filter_fn, "bidirectional", bidirectional) == bidirectional
        require(agree, f"bidirectional={bidirectional} disagrees with {filter_name}.bidirectional")
        if bidirectional:
            require(callable(getattr(filter_fn, "filter_rev", None)), f"{filter_name} has no method filter_rev")


M2 = Adapter("m2", MIXERS | FUSED_MIXERS, _check, PatchedMonarchMixer)
