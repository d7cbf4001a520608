"""What is measured: a causal convolution with long filters, with or without gates."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops.reference import fft_conv_float64


@dataclass(frozen=True)
class Problem:
    """One size to measure.

    Args:
        batch, channels, length (`int`): Shape of the sequences.
        dtype (`torch.dtype`): Of the sequences; filters are float32.
        gated (`bool`): Whether the convolution stands between two gates, as in Hyena.
        filter_length (`int`, *optional*): Taps of the filters; by default they are as long as the sequences.
    """

    batch: int
    channels: int
    length: int
    dtype: torch.dtype
    gated: bool
    filter_length: int | None = None

    @property
    def taps(self) -> int:
        return min(self.length, self.filter_length or self.length)

    def floor_bytes(self, backward: bool) -> int:
        """Bytes that must move: inputs read and y written; in backward inputs and dy read, gradients written."""
        inputs = 3 if self.gated else 1
        tensors = inputs + 1 + (2 * inputs + 1 if backward else 0)
        return tensors * self.batch * self.channels * self.length * self.dtype.itemsize

    @property
    def sequences(self) -> int:
        return self.batch * self.channels

    def smaller(self) -> "Problem | None":
        """Half the channels or, where there is one, half the batch, which filters and pairs of sequences share."""
        if self.channels > 1:
            return replace(self, channels=self.channels // 2)
        return replace(self, batch=self.batch // 2) if self.batch > 1 else None

    def operands(self) -> dict[str, Tensor]:
        """Arguments of [`fft_conv`] on the current device: normal sequences, filters that decay."""
        shape = (self.batch, self.channels, self.length)
        names = ("u", "pre_gate", "post_gate") if self.gated else ("u",)
        operands = {name: torch.randn(shape, dtype=self.dtype, device="cuda") for name in names}
        decay = torch.exp(-4 * torch.linspace(0, 1, self.taps, device="cuda"))
        operands["k"] = torch.randn(self.channels, self.taps, device="cuda") * decay / self.taps**0.5
        return operands

    def error(self, y: Tensor, operands: dict[str, Tensor]) -> float:
        """Relative L2 error of an output against float64, of a few rows and channels."""
        part, choose = self._part(operands)
        return _relative_error(choose(y), fft_conv_float64(**part))

    def gradient_error(self, du: Tensor, dy: Tensor, operands: dict[str, Tensor]) -> float:
        """The same for the gradient of u."""
        part, choose = self._part(operands)
        u = part["u"].detach().double().requires_grad_()
        y = fft_conv_float64(**{**part, "u": u})
        (reference,) = torch.autograd.grad(y, u, choose(dy).double())
        return _relative_error(choose(du), reference)

    def _part(self, operands: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
        rows = torch.tensor(sorted({0, self.batch - 1}))[:, None]
        channels = torch.tensor(sorted({0, 1 % self.channels, self.channels // 2, self.channels - 1}))

        def choose(x: Tensor) -> Tensor:
            return x.detach()[rows, channels]

        return {name: choose(x) if x.dim() == 3 else x.detach()[channels] for name, x in operands.items()}, choose


def _relative_error(actual: Tensor, reference: Tensor) -> float:
    return ((actual.double() - reference).norm() / reference.norm()).item()
