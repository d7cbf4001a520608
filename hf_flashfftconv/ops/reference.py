"""The convolution in plain PyTorch: the `torch` backend on any device, and the float64 oracle of the tests.

Both follow one formula. With g = pre * u and taps k (lags 0, 1, ...) and k_rev (lags -1, -2, ...),

    y = post * (conv(g) + skip * g),      conv(g)[t] = sum_s k[s] g[t-s] + sum_s k_rev[s] g[t+1+s]

and, with c = post * dy, the gradients need no value of the forward pass but its inputs:

    dg = corr(c) + skip * c,    du = pre * dg,    dpre = u * dg,    dpost = dy * (conv(g) + skip * g)
    dk[s] = sum_bt g[t] c[t+s],   dk_rev[s] = sum_bt g[t+1+s] c[t],   dskip = sum_bt g[t] c[t]
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@cache
def good_fft_length(minimum: int) -> int:
    """Smallest 2^a 3^b 5^c 7^d that is at least `minimum`: the lengths that every FFT library does well.

    A causal convolution is right at any length from L + K - 1 on, but at the natural 2L of many checkpoints (L = 1026,
    32770, 1000002, ...) the length has a large prime factor, which FFT libraries serve several times more slowly.
    """
    best = 1 << max(minimum - 1, 0).bit_length()
    seven = 1
    while seven < best:
        five = seven
        while five < best:
            three = five
            while three < best:
                # The power of two that lifts `three` to the minimum.
                twos = max(-(-minimum // three) - 1, 0).bit_length()
                best = min(best, three << twos)
                three *= 3
            five *= 5
        seven *= 7
    return best


def linear_fft_length(length: int, filter_length: int, reverse_length: int = 0) -> int:
    """FFT length at which no tap wraps around: outputs reach from -reverse_length to length + filter_length - 2."""
    return good_fft_length(length + max(filter_length - 1, reverse_length))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, all else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gated(u: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """u, times a gate if there is one, in the dtype of the computation."""
    return u.to(dtype) if gate is None else u.to(dtype) * gate.to(dtype)


def store_gated(y: Tensor, x: Tensor, gate: Tensor | None) -> Tensor:
    """Writes x, times a gate if there is one, to y, rounded once; returns y."""
    return y.copy_(x) if gate is None else torch.mul(x, gate, out=y)


class _Filter:
    """Taps that can matter at this length, their FFT length and their spectrum, and the skip connection."""

    def __init__(
        self, k: Tensor, skip: Tensor | None, k_rev: Tensor | None, length: int, causal: bool, dtype: torch.dtype
    ) -> None:
        self.length = length
        self.skip = None if skip is None else skip.to(dtype)[:, None]
        self.taps = min(k.shape[-1], length)
        self.reverse_taps = 0 if k_rev is None else min(k_rev.shape[-1], length - 1)
        self.size = linear_fft_length(length, self.taps, self.reverse_taps) if causal else length
        # A factor of the inverse transform that is a power of two goes into the spectrum: it costs no pass over the
        # sequences there, and changes no bit.
        self.norm = "forward" if self.size & (self.size - 1) == 0 else "backward"
        kernel = k[:, : self.taps].to(dtype)
        if k_rev is not None:
            gap = kernel.new_zeros(k.shape[0], self.size - self.taps - self.reverse_taps)
            kernel = torch.cat([kernel, gap, k_rev[:, : self.reverse_taps].to(dtype).flip(-1)], dim=-1)
        self.spectrum = torch.fft.rfft(kernel, n=self.size, norm=self.norm)

    def transform(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x, n=self.size)

    def inverse(self, product: Tensor, x: Tensor) -> Tensor:
        """From x's transform, multiplied by the filter's spectrum or its conjugate; with the skip connection."""
        y = torch.fft.irfft(product, n=self.size, norm=self.norm)[..., : self.length]
        # Rounded as in the models that this replaces: their ill-conditioned gradients show every other last bit.
        return y if self.skip is None else y.add_(self.skip * x)

    def tap_gradients(self, spectrum: Tensor, k: Tensor, k_rev: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Split the correlation sum_b conj(G) C into the taps' gradients; taps beyond the sequence get zero."""
        lags = torch.fft.irfft(spectrum, n=self.size)
        dk = torch.zeros_like(k)
        dk[:, : self.taps] = lags[:, : self.taps]
        if k_rev is None:
            return dk, None
        dk_rev = torch.zeros_like(k_rev)
        dk_rev[:, : self.reverse_taps] = lags[:, self.size - self.reverse_taps :].flip(-1)
        return dk, dk_rev


def convolve(
    u: Tensor, k: Tensor, skip: Tensor | None, pre_gate: Tensor | None, k_rev: Tensor | None, causal: bool
) -> Tensor:
    """The convolution before `post_gate` in the dtype of the computation, a part of a larger tensor in memory."""
    dtype = compute_dtype(u.dtype)
    filters = _Filter(k, skip, k_rev, u.shape[-1], causal, dtype)
    g = gated(u, pre_gate, dtype)
    return filters.inverse(filters.transform(g).mul_(filters.spectrum), g)


def forward(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    k_rev: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """The convolution by torch.fft, differentiable by autograd; arguments as in [`fft_conv`], already checked."""
    y = convolve(u, k, skip, pre_gate, k_rev, causal)
    return gated(y, post_gate, y.dtype).to(u.dtype).contiguous()


def backward(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    k_rev: Tensor | None,
    causal: bool,
    needs: Sequence[bool] = (True,) * 6,
) -> Gradients:
    """Gradients (du, dk, dskip, dpre, dpost, dk_rev), each in its input's dtype; None where absent or not needed."""
    dtype = compute_dtype(u.dtype)
    need_u, need_k, need_skip, need_pre, need_post, need_rev = needs
    filters = _Filter(k, skip, k_rev, u.shape[-1], causal, dtype)
    g, c = gated(u, pre_gate, dtype), gated(dy, post_gate, dtype)
    g_spectrum, c_spectrum = filters.transform(g), filters.transform(c)
    du = dk = dskip = dpre = dpost = dk_rev = None

    # Conjugated in memory: compiled code may run an operator where PyTorch's lazy conjugation is switched off.
    if need_u or need_pre:
        dg = filters.inverse(c_spectrum * filters.spectrum.conj_physical(), c)
        du = gated(dg, pre_gate, dtype).to(u.dtype).contiguous()
        if pre_gate is not None:
            dpre = (u * dg).to(pre_gate.dtype).contiguous()
        del dg
    if need_k or need_rev:
        dk, dk_rev = filters.tap_gradients(c_spectrum.mul_(g_spectrum.conj_physical()).sum(0), k, k_rev)
    del c_spectrum
    if skip is not None and need_skip:
        # The skip connection is one more tap at lag zero, whose gradient may be there already.
        total = dk[:, 0] if dk is not None and dk.dtype == dtype else (g * c).sum((0, 2))
        dskip = total.to(skip.dtype, copy=True)
    if post_gate is not None and need_post:
        z = filters.inverse(g_spectrum.mul_(filters.spectrum), g)
        dpost = (dy * z).to(post_gate.dtype).contiguous()
    return du, dk, dskip, dpre, dpost, dk_rev


def fft_conv_float64(
    u: Tensor,
    k: Tensor,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    k_rev: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """The oracle: [`fft_conv`] of the given values in float64 throughout, returned in float64.

    It is made of differentiable operations only, so that autograd gives oracle gradients that do not depend on the
    explicit formulas of `backward`.
    """
    skip, pre_gate, post_gate, k_rev = (None if x is None else x.double() for x in (skip, pre_gate, post_gate, k_rev))
    return forward(u.double(), k.double(), skip, pre_gate, post_gate, k_rev, causal)


def circle_taps(k: Tensor, skip: Tensor | None, k_rev: Tensor | None, length: int, size: int) -> Tensor:
    """All taps (H, size) in float32: causal ones from the start, anticausal ones from the end, skip added at zero."""
    k = k[:, :length].float()
    taps = torch.nn.functional.pad(k, (0, size - k.shape[1]))
    reverse_taps = 0 if k_rev is None else min(k_rev.shape[1], length - 1)
    if k_rev is not None and reverse_taps:
        taps[:, -reverse_taps:] = k_rev[:, :reverse_taps].float().flip(-1)
    if skip is not None:
        taps[:, 0] += skip.float()
    return taps


def unwrap_taps(k: Tensor, length: int, size: int) -> tuple[Tensor, Tensor | None]:
    """Causal and anticausal taps of the linear convolution that a circular one with `k` (H, K) on `size` points is.

    Inputs of `length` <= `size` are followed by zeros, and as many outputs are kept. Taps beyond `size` are left out.
    """
    k = k[:, :size]
    # Tap s reaches position t from t - s or, around the end, from t + (size - s): the latter exists from here on.
    first_wrapped = size - length + 1
    if k.shape[1] <= first_wrapped:
        return k[:, :length], None
    return k[:, :length], torch.nn.functional.pad(k[:, first_wrapped:], (0, size - k.shape[1])).flip(-1)
