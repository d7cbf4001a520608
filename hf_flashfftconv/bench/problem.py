"""What is measured: a causal convolution with filters as long as the sequences, with or without gates."""

from dataclasses import dataclass

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
    """

    batch: int
    channels: int
    length: int
    dtype: torch.dtype
    gated: bool

    def floor_bytes(self, backward: bool) -> int:
        """Bytes that must move: inputs read and y written; in backward inputs and dy read, gradients written."""
        inputs = 3 if self.gated else 1
        tensors = inputs + 1 + (2 * inputs + 1 if backward else 0)
        return tensors * self.batch * self.channels * self.length * self.dtype.itemsize

    def operands(self) -> dict[str, Tensor]:
        """Arguments of [`fft_conv`] on the current device: normal sequences, filters that decay."""
        shape = (self.batch, self.channels, self.length)
        names = ("u", "pre_gate", "post_gate") if self.gated else ("u",)
        operands = {name: torch.randn(shape, dtype=self.dtype, device="cuda") for name in names}
        decay = torch.exp(-4 * torch.linspace(0, 1, self.length, device="cuda"))
        operands["k"] = torch.randn(self.channels, self.length, device="cuda") * decay / self.length**0.5
        return operands

    def error(self, y: Tensor, operands: dict[str, Tensor]) -> float:
        """Relative L2 error against float64, of a few rows and channels."""
        rows = torch.tensor(sorted({0, y.shape[0] - 1}))[:, None]
        channels = torch.tensor(sorted({0, 1 % y.shape[1], y.shape[1] // 2, y.shape[1] - 1}))
        part = {name: x[rows, channels] if x.dim() == 3 else x[channels] for name, x in operands.items()}
        reference = fft_conv_float64(**part)
        return ((y[rows, channels].double() - reference).norm() / reference.norm()).item()
