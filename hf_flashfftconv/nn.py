"""Modules that stand in for those of the published `flashfftconv` package, on any device and without its limits."""

import torch
from torch import Tensor, nn

from .functional import fft_conv
from .ops.reference import unwrap_taps


class FlashFFTConv(nn.Module):
    """Long convolution of a fixed FFT size N, call-compatible with `flashfftconv.FlashFFTConv` (arXiv:2311.05908).

    With input and filter padded by zeros to N, the output is the first L entries of their circular convolution:

        y = postgate * ifft_N( fft_N(pregate * u) fft_N(k) )[..., :L]

    It is the causal convolution as long as no tap wraps around, K <= N - L + 1, as with L and K of at most N / 2.
    Longer filters wrap: their last taps act as negative lags, which is how M2-BERT makes one filter of 2L taps
    bidirectional.

    Any N, L <= N, H and B will do, as will one gate without the other, inputs of any floating dtype, strides and
    device, and gradients in training and evaluation mode alike. There are no parameters and no buffers: one module can
    serve any number of layers and adds nothing to their state dict.

    Args:
        seqlen (`int`):
            The FFT size N, usually twice the longest sequence.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            The dtype of inputs that the published module wants to know in advance; here each call follows its inputs.
        use_32_butterfly (`bool`, *optional*, defaults to `True`):
            A choice among the published module's kernels; accepted and not used.
    """

    def __init__(self, seqlen: int, dtype: torch.dtype = torch.bfloat16, use_32_butterfly: bool = True) -> None:
        super().__init__()
        if seqlen < 1:
            raise ValueError(f"seqlen is the FFT size and must be at least 1, got {seqlen}")
        self.seqlen = seqlen
        self.dtype = dtype
        self.use_32_butterfly = use_32_butterfly

    def forward(self, u: Tensor, k: Tensor, pregate: Tensor | None = None, postgate: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            u (`torch.Tensor` of shape `(B, H, L)`):
                The input, L at most `seqlen`.
            k (`torch.Tensor` of shape `(H, K)`):
                The filters, usually float32, K at most `seqlen`.
            pregate, postgate (`torch.Tensor` of shape `(B, H, L)`, *optional*):
                Multiply the input and the output; of the dtype of `u`.

        Returns:
            `torch.Tensor` of shape `(B, H, L)` and of the dtype of `u`.

        Raises:
            ValueError: the input or the filter is longer than `seqlen`, or what [`fft_conv`] refuses.
        """
        size, length, taps = self.seqlen, u.shape[-1], k.shape[-1]
        if length > size or taps > size:
            raise ValueError(f"u of length {length} and k of {taps} taps must not be longer than seqlen, {size}")
        if length == size:
            return fft_conv(u, k, pre_gate=pregate, post_gate=postgate, causal=False)
        k, k_rev = unwrap_taps(k, length, size)
        return fft_conv(u, k, pre_gate=pregate, post_gate=postgate, k_rev=k_rev)

    def extra_repr(self) -> str:
        return f"seqlen={self.seqlen}, dtype={self.dtype}"


class DepthwiseConv1d(nn.Conv1d):
    """Short depthwise convolution, one filter a channel: the maths of `flashfftconv.FlashDepthWiseConv1d` on (B, H, L).

    Parameters have the names and shapes of `torch.nn.Conv1d`, `weight` (H, 1, K) and `bias` (H,), and every padding can
    be trained. For a causal convolution, pad by K - 1 and cut the output to its first L positions.

    Args:
        channels (`int`):
            The number of channels H.
        kernel_size (`int`):
            The number of taps K.
        padding (`int`, *optional*, defaults to 0):
            Zeros added at either end; the output has L + 2 padding - K + 1 positions.
        bias (`bool`, *optional*, defaults to `True`):
            Whether each channel has an offset.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        padding: int = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            channels, channels, kernel_size, padding=padding, groups=channels, bias=bias, device=device, dtype=dtype
        )
