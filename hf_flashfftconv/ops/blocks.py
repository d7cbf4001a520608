"""The `torch` backend where filters are short against the sequences: overlap-save, at the cost of short transforms.

A sequence goes through transforms of a few filter lengths. Each window overlaps its neighbours by what the filter
reaches, and gives the outputs that the circle's wrap does not touch. The formulas are those of `reference`, with the
skip connection as one more weight of the tap at lag zero. Few windows are alive at a time, however long the sequences.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import plan
from .reference import Gradients, compute_dtype, gated, good_fft_length, store_gated

# Elements of the windows that are transformed at a time, unless one row of the batch has more in one window.
_ELEMENTS = 1 << 23
_MIN_FFT_SIZE = 1024


class Blocks(NamedTuple):
    """Windows of `fft_size` positions, each with `step` outputs, `reach_back` before and `reach_ahead` after them."""

    fft_size: int
    step: int
    reach_back: int
    reach_ahead: int


def choose(length: int, taps: int, reverse_taps: int, causal: bool) -> Blocks | None:
    """The windows for a convolution, or None where one transform of the whole sequence does as well."""
    if not causal:
        return None
    back, ahead = plan.reach(length, taps, reverse_taps)
    size = good_fft_length(max(_MIN_FFT_SIZE, 4 * (back + ahead + 1)))
    return Blocks(size, size - back - ahead, back, ahead) if length >= 2 * size else None


def forward(
    blocks: Blocks,
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    k_rev: Tensor | None,
    y: Tensor,
) -> Tensor:
    """[`fft_conv`] in windows, written to `y`."""
    spectrum = _spectrum(blocks, k, skip, k_rev, compute_dtype(u.dtype))
    for part in _parts(blocks, u):
        g = part.windows(u, pre_gate, blocks.reach_back)
        z = part.outputs(torch.fft.rfft(g) * spectrum, blocks.reach_back)
        store_gated(part.own(y), z, part.own_or_none(post_gate))
    return y


def backward(
    blocks: Blocks,
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    k_rev: Tensor | None,
    needs: Sequence[bool] = (True,) * 6,
) -> Gradients:
    """Gradients (du, dk, dskip, dpre, dpost, dk_rev), each in its input's dtype; None where absent or not needed."""
    dtype = compute_dtype(u.dtype)
    need_u, need_k, need_skip, need_pre, need_post, need_rev = needs
    need_taps = need_k or need_skip or need_rev
    spectrum = _spectrum(blocks, k, skip, k_rev, dtype)
    # Conjugated in memory: compiled code may run an operator where PyTorch's lazy conjugation is switched off.
    transposed = spectrum.conj_physical()
    products = torch.zeros_like(spectrum[:, 0])
    du = torch.empty_like(u, memory_format=torch.contiguous_format) if need_u else None
    dpre = _like(pre_gate, need_pre)
    dpost = _like(post_gate, need_post)
    for part in _parts(blocks, u):
        c = part.windows(dy, post_gate, blocks.reach_ahead)
        if dpost is not None or need_taps:
            g_spectrum = torch.fft.rfft(part.windows(u, pre_gate, blocks.reach_back))
        if need_taps:
            own = c[..., blocks.reach_ahead : blocks.reach_ahead + blocks.step]
            products += (g_spectrum.conj_physical() * torch.fft.rfft(own, n=blocks.fft_size)).sum((0, 2))
        if dpost is not None:
            store_gated(part.own(dpost), part.outputs(g_spectrum * spectrum, blocks.reach_back), part.own(dy))
        if du is not None or dpre is not None:
            dg = part.outputs(torch.fft.rfft(c) * transposed, blocks.reach_ahead)
            if du is not None:
                store_gated(part.own(du), dg, part.own_or_none(pre_gate))
            if dpre is not None:
                store_gated(part.own(dpre), dg, part.own(u))
    dk, dskip, dk_rev = _tap_gradients(blocks, products, k, skip, k_rev) if need_taps else (None, None, None)
    return du, dk, dskip, dpre, dpost, dk_rev


class _Part(NamedTuple):
    """Consecutive windows of some rows of the batch; their outputs are the positions from `start` to `end`."""

    blocks: Blocks
    rows: slice
    start: int
    end: int

    def own(self, x: Tensor) -> Tensor:
        """What a tensor of shape (B, H, L) has at the positions of the outputs."""
        return x[self.rows, :, self.start : self.end]

    def own_or_none(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else self.own(x)

    def windows(self, x: Tensor, gate: Tensor | None, before: int) -> Tensor:
        """x, gated, as (rows, H, windows, fft_size), each window from `before` positions before its outputs on."""
        size, step = self.blocks.fft_size, self.blocks.step
        first = self.start - before
        last = first + -(-(self.end - self.start) // step) * step - step + size
        inside = slice(max(first, 0), min(last, x.shape[2]))
        part = gated(
            x[self.rows, :, inside], None if gate is None else gate[self.rows, :, inside], compute_dtype(x.dtype)
        )
        edges = inside.start - first, last - inside.stop
        return torch.nn.functional.pad(part, edges).unfold(-1, size, step)

    def outputs(self, spectra: Tensor, before: int) -> Tensor:
        """The outputs (rows, H, end - start) of windows that begin `before` positions before theirs."""
        y = torch.fft.irfft(spectra, n=self.blocks.fft_size)[..., before : before + self.blocks.step]
        return y.flatten(-2)[..., : self.end - self.start]


def _parts(blocks: Blocks, u: Tensor) -> Iterator[_Part]:
    batch, channels, length = u.shape
    rows = min(batch, max(1, _ELEMENTS // (channels * blocks.fft_size)))
    positions = max(1, _ELEMENTS // (rows * channels * blocks.fft_size)) * blocks.step
    for row in range(0, batch, rows):
        for start in range(0, length, positions):
            yield _Part(blocks, slice(row, row + rows), start, min(length, start + positions))


def _spectrum(blocks: Blocks, k: Tensor, skip: Tensor | None, k_rev: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The filters' spectra (H, 1, fft_size / 2 + 1): causal taps from the circle's start, the others from its end."""
    taps = torch.zeros(k.shape[0], blocks.fft_size, dtype=dtype, device=k.device)
    taps[:, : blocks.reach_back + 1] = k[:, : blocks.reach_back + 1]
    if k_rev is not None:
        taps[:, blocks.fft_size - blocks.reach_ahead :] = k_rev[:, : blocks.reach_ahead].flip(-1)
    if skip is not None:
        taps[:, 0] += skip
    return torch.fft.rfft(taps)[:, None]


def _tap_gradients(
    blocks: Blocks, products: Tensor, k: Tensor, skip: Tensor | None, k_rev: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the products' sums: the windows of c began `reach_back` after those of g. Unreached taps get zero."""
    lags = torch.fft.irfft(products, n=blocks.fft_size).roll(blocks.reach_back, -1)
    dk = torch.zeros_like(k)
    dk[:, : blocks.reach_back + 1] = lags[:, : blocks.reach_back + 1]
    dskip = None if skip is None else lags[:, 0].to(skip.dtype, copy=True)
    if k_rev is None:
        return dk, dskip, None
    dk_rev = torch.zeros_like(k_rev)
    dk_rev[:, : blocks.reach_ahead] = lags[:, blocks.fft_size - blocks.reach_ahead :].flip(-1)
    return dk, dskip, dk_rev


def _like(x: Tensor | None, needed: bool) -> Tensor | None:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and needed else None
