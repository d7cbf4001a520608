"""State-space and other convolutions without gates: S4D, S4's FFTConv and safari's LongConv.

conv(u, k) + D u is followed by the module's own activation, dropout and output projection. The taps are made by the
sub-module `kernel`. Inputs are `(batch, channels, length)`, or `(batch, length, channels)` if `transposed` is false.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.reference import unwrap_taps
from .base import Adapter, PatchedMixer
from .cache import Filters
from .structure import attribute, check_forward, check_kernel, check_shape, require

S4D_MIXERS = frozenset({"S4D"})
FFT_CONVS = frozenset({"FFTConv"})
LONG_CONVS = frozenset({"LongConv"})


class _KernelMixer(PatchedMixer):
    def filter_modules(self) -> list[nn.Module]:
        return [self.kernel]

    def turned(self, u: Tensor) -> Tensor:
        """From the layout of the module to `(batch, channels, length)`, and back."""
        return u if self.transposed else u.transpose(-1, -2)

    def convolved(self, u: Tensor) -> Tensor:
        """Convolution and skip term `(batch, channels, length)` of an input in the layout of the module."""
        u = self.turned(u)
        # On a CPU, autocast has torch.fft work in float32, and with it all that follows up to a linear layer.
        if u.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            u = u.to(torch.promote_types(u.dtype, torch.float32))
        return self.convolve_uncast(self.kernel, u)


class PatchedS4D(_KernelMixer):
    """The forward of the minimal S4D."""

    def forward(self, u: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        if not self.covered():
            return self.original_forward(u, **kwargs)
        return self.turned(self.output_linear(self.dropout(self.activation(self.convolved(u))))), None

    def generate(self, filter_fn: Any, length: int, bidirectional: bool) -> Filters:
        return filter_fn(L=length), None, self.D


class _CircleMixer(_KernelMixer):
    """Filters that are laid on a circle of their length and the input's, longer ones too."""

    def generate(self, filter_fn: Any, length: int, bidirectional: bool) -> Filters:
        taps = length if self.L is None else min(length, self.L)
        k = filter_fn(L=taps, rate=1.0, state=None)[0]
        if self.bidirectional:
            # The second half of the channels runs backwards from lag -1, at the end of the circle.
            k = F.pad(k[:1], (0, length)) + F.pad(k[1:].flip(-1), (length, 0))
        return *unwrap_taps(k[0], length, taps + length), self.D[0]


class PatchedFFTConv(_CircleMixer):
    """The forward of S4's convolution layer for one channel of filters."""

    def forward(self, x: Tensor, state: Any = None, rate: float = 1.0, **kwargs: Any) -> tuple[Tensor, Any]:
        if state is not None or rate != 1.0:
            return self.bypass("a state or a rate was given", x, state, rate, **kwargs)
        if self.drop_kernel.training and getattr(self.drop_kernel, "p", 0.0) > 0:
            return self.bypass("drop_kernel drops taps while training", x, **kwargs)
        if not self.covered():
            return self.original_forward(x, **kwargs)
        return self.activation(self.turned(self.drop(self.convolved(x)))), None


class PatchedLongConv(_CircleMixer):
    """The forward of safari's long convolution for one channel of filters."""

    def forward(self, u: Tensor, state: Any = None, rate: float = 1.0, lengths: Any = None, **kwargs: Any) -> Any:
        if rate != 1.0 or lengths is not None:
            return self.bypass("a rate or lengths were given", u, state, rate, lengths, **kwargs)
        if not self.covered():
            return self.original_forward(u, **kwargs)
        return self.output_linear(self.dropout(self.activation(self.turned(self.convolved(u))))), None


def _check_s4d(module: nn.Module) -> None:
    check_forward(module, S4D_MIXERS, "the layer")
    _check_parts(module, attribute(module, "h", int), ("activation", "dropout", "output_linear"))
    check_shape(module, "D", (module.h,))


def _check_fft_conv(module: nn.Module) -> None:
    check_forward(module, FFT_CONVS, "the layer")
    _check_channels(module)
    _check_parts(module, module.d_model, ("activation", "drop", "drop_kernel"))


def _check_long_conv(module: nn.Module) -> None:
    check_forward(module, LONG_CONVS, "the layer")
    _check_channels(module)
    _check_parts(module, module.d_model, ("activation", "dropout", "output_linear"))
    require(not getattr(module, "block_fft_conv", False), "block_fft_conv learns its transform")


def _check_channels(module: nn.Module) -> None:
    width = attribute(module, "d_model", int)
    attribute(module, "bidirectional", bool)
    shape = tuple(attribute(module, "D", Tensor).shape)
    require(shape == (1, width), f"D has shape {shape}: only one filter a channel is supported, ({1}, {width})")


def _check_parts(module: nn.Module, width: int, names: tuple[str, ...]) -> None:
    attribute(module, "transposed", bool)
    for name in names:
        attribute(module, name, nn.Module)
    check_kernel(module, "kernel")


def _s4d_shape(module: Any, length: int) -> tuple[int, ...]:
    return (1, module.h, length) if module.transposed else (1, length, module.h)


def _shape(module: Any, length: int) -> tuple[int, ...]:
    return (1, module.d_model, length) if module.transposed else (1, length, module.d_model)


S4D = Adapter("s4d", S4D_MIXERS, _check_s4d, PatchedS4D, input_shape=_s4d_shape)
FFT_CONV = Adapter("s4", FFT_CONVS, _check_fft_conv, PatchedFFTConv, input_shape=_shape)
LONG_CONV = Adapter("long-conv", LONG_CONVS, _check_long_conv, PatchedLongConv, input_shape=_shape)
