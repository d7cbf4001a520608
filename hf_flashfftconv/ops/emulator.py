"""The fused kernels' arithmetic in plain PyTorch: the sharp yardstick of the numerical tests.

It rounds where the kernels round and nowhere else: float16 operands, unitary DFT stages with float32 sums, two batch
rows packed as one complex sequence or, folded, one row alone at frequencies a quarter beyond those of the FFT
(csrc/transform.cuh), power-of-two scales undone in float32 at the output, and filters, with the skip weight added at
lag zero, whose spectra are computed in float32 and then rounded.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import circle_taps


def fft_conv_emulated(
    u: Tensor,
    k: Tensor,
    *,
    radices: Sequence[int],
    folded: bool = False,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    k_rev: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """[`fft_conv`] as a kernel of the given radices computes it.

    Args:
        radices (`Sequence[int]`):
            Factors of the FFT size N, outermost first: n = n1 N/r1 + n2 N/(r1 r2) + ..., f = k1 + r1 k2 + r1 r2 k3
            + ... N is at least L + max(K - 1, K') if `causal`, else equal to L.
        folded (`bool`): Whether each row has a transform of its own; then N is at least L, and 2 N the circle.

    Returns:
        `torch.Tensor` of the shape and dtype of `u`; a row with a NaN or an infinity in it is NaN throughout.

    Raises:
        ValueError: the FFT size does not fit the lengths.
    """
    batch, channels, length = u.shape
    size = math.prod(radices)
    taps = _circle(k, skip, k_rev, length, 2 * size if folded else size, causal)
    if folded:
        taps = torch.complex(taps[:, :size], taps[:, size:])
    spectrum, filter_scale = _filter_spectrum(taps, radices, folded)

    g = u.float() if pre_gate is None else u.float() * pre_gate.float()
    finite = g.isfinite().all(-1, keepdim=True)
    # A row that is not finite must not reach its partner: it goes in as zeros and comes out as NaN.
    rows = torch.where(finite, g, 0.0)
    together = 1 if folded else 2
    rows = torch.cat([rows, rows.new_zeros(-batch % together, channels, length)])
    scale = _power_of_two(rows.unflatten(0, (-1, together)).abs().amax((1, 3)))[..., None]
    parts = [_half(rows[i::together] / scale) for i in range(together)]
    x = torch.complex(parts[0], parts[1] if len(parts) > 1 else torch.zeros_like(parts[0]))
    x = torch.nn.functional.pad(x, (0, size - length))

    product = _half(_transform(x, radices, folded) * spectrum)
    x = _transform_back(product.conj(), radices, folded).conj()[..., :length] * (scale * filter_scale)
    y = torch.stack([x.real, x.imag][:together], dim=1).flatten(0, 1)[:batch]

    if post_gate is not None:
        y = y * post_gate.float()
    return torch.where(finite, y, torch.nan).to(u.dtype)


def _circle(k: Tensor, skip: Tensor | None, k_rev: Tensor | None, length: int, size: int, causal: bool) -> Tensor:
    """[`circle_taps`], where they do not wrap around into the outputs."""
    reverse_taps = 0 if k_rev is None else min(k_rev.shape[1], length - 1)
    needed = length + max(min(k.shape[1], length) - 1, reverse_taps) if causal else length
    if size < needed or (not causal and size != length):
        raise ValueError(f"FFT size {size} does not fit: {'at least ' if causal else ''}{needed} is needed")
    return circle_taps(k, skip, k_rev, length, size)


def _filter_spectrum(taps: Tensor, radices: Sequence[int], folded: bool) -> tuple[Tensor, Tensor]:
    """The spectrum in the order of the stages, with values below two, and the scales (H, 1) to undo that."""
    order = torch.arange(taps.shape[1], device=taps.device).view(*reversed(radices))
    if folded:
        taps = taps * _unit_root(order.flatten(), 4 * taps.shape[1]).to(taps.dtype)
    spectrum = torch.fft.fft(taps)[:, order.permute(*reversed(range(len(radices)))).flatten()]
    scale = _power_of_two(torch.view_as_real(spectrum).abs().amax((1, 2)))[:, None]
    return _half(spectrum / scale), scale


def _transform(x: Tensor, radices: Sequence[int], folded: bool) -> Tensor:
    """Unitary DFT over the last axis, to the order of the stages: f = k1 + r1 k2 + r1 r2 k3 + ..., k1 slowest."""
    radix, inner = radices[0], radices[1:]
    x = _half(_dft_matrix(radix, folded, x.device) @ x.unflatten(-1, (radix, -1)))
    if inner:
        x = _transform(_half(x * _twiddles(radix, x.shape[-1], folded, x.device)), inner, False)
    return x.flatten(-2)


def _transform_back(x: Tensor, radices: Sequence[int], folded: bool, outermost: bool = True) -> Tensor:
    """The same DFT from that to natural order; the last sums stay in float32, as only the output follows."""
    radix, inner = radices[0], radices[1:]
    x = x.unflatten(-1, (radix, -1))
    if inner:
        x = _transform_back(x, inner, False, outermost=False)
        x = _half(x * _twiddles(radix, x.shape[-1], folded, x.device))
    x = _dft_matrix(radix, folded, x.device).mT @ x
    return (x if outermost else _half(x)).flatten(-2)


def _dft_matrix(radix: int, folded: bool, device: torch.device) -> Tensor:
    """From positions (columns) to frequencies (rows), a quarter beyond those of the FFT if `folded`."""
    n = torch.arange(radix, device=device)
    return _half(_unit_root((4 * n[:, None] + folded) * n, 4 * radix) / math.sqrt(radix))


def _twiddles(radix: int, inner_size: int, folded: bool, device: torch.device) -> Tensor:
    exponent = (4 * torch.arange(radix, device=device)[:, None] + folded) * torch.arange(inner_size, device=device)
    return _half(_unit_root(exponent, 4 * radix * inner_size))


def _unit_root(exponent: Tensor, size: int) -> Tensor:
    """exp(-2 pi i exponent / size), with the angle reduced in integers and taken in float64."""
    angle = (exponent % size).double() * (-2 * math.pi / size)
    return torch.polar(torch.ones_like(angle), angle)


def _half(x: Tensor) -> Tensor:
    """Round to float16 values, kept in float32 so that the next stage's sums are in float32."""
    if x.is_complex():
        return torch.view_as_complex(torch.view_as_real(x).half().float())
    return x.half().float()


def _power_of_two(maximum: Tensor) -> Tensor:
    """The power of two s with maximum / s in [1, 2); one where the maximum is zero or not finite."""
    exponent = torch.frexp(maximum).exponent - 1
    usable = maximum.isfinite() & (maximum > 0)
    return torch.where(usable, torch.ldexp(torch.ones_like(maximum), exponent), 1.0)
