"""Filters as the CUDA kernels want them: spectra in kernel order, in half precision, divided by a power of two per channel."""

import torch
from torch import Tensor

from .tables import spectrum_order, words


def filter_taps(k: Tensor, skip: Tensor | None, k_rev: Tensor | None, length: int, fft_size: int) -> Tensor:
    """All taps of a filter on a circle of ``fft_size`` points: causal taps from the start, anticausal ones from the end.

    The skip connection is one more weight of the tap at lag zero.
    """
    taps = torch.zeros(k.shape[0], fft_size, device=k.device, dtype=torch.float32)
    count = min(k.shape[1], length)
    taps[:, :count] = k[:, :count]
    if k_rev is not None and length > 1:
        count = min(k_rev.shape[1], length - 1)
        taps[:, fft_size - count :] = k_rev[:, :count].flip(-1)
    if skip is not None:
        taps[:, 0] += skip
    return taps


def filter_spectrum(taps: Tensor) -> tuple[Tensor, Tensor]:
    """Spectrum of (H, fft_size) taps for the kernels.

    Returns:
        int32 words ``(H, fft_size)`` of half-precision pairs (two real parts, two imaginary parts) in kernel order, and the float32 powers
        of two ``(H,)`` that the spectrum was divided by; a filter that is not finite has the scale NaN.
    """
    channels, fft_size = taps.shape
    spectrum = torch.view_as_real(torch.fft.fft(taps))
    largest = spectrum.abs().amax((1, 2))
    scale = torch.exp2(torch.frexp(largest).exponent.clamp(-100, 126).float())
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    spectrum = torch.where(largest.isfinite().view(-1, 1, 1), spectrum / scale.view(-1, 1, 1), 0.0)
    order = spectrum_order(fft_size).to(taps.device).flatten()
    # (H, radix, h, lane, t, i, re/im) -> words over i
    ordered = spectrum[:, order].view(channels, -1, 2, 32, 2, 2, 2)
    return words(ordered[..., 0, :], ordered[..., 1, :]).reshape(channels, fft_size), scale
