"""The numerical promise in one place: bounds, metrics, basis inputs, and planted faults that the checks must catch.

Errors are relative L2 norms against the float64 oracle, never absolute tolerances: the outputs of long convolutions are
often so small that an absolute 1e-2 lets an output of zeros pass. Loosening a bound needs a measured reason in the
commit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Relative L2 error of rounding alone, on values with evenly spread mantissas.
ROUNDING = {torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4, torch.float32: 3e-8, torch.float64: 6e-17}

# A row whose norm is below this share of |u| |k| is measured against |u| |k|: what is left of it is cancellation.
WEAK_ROW = 1e-3

# Rows of fewer values are no sample of rounding errors, and their norms are no measure of them: a row may be small by
# cancellation, or next to the one that shares its transform. They are measured against at least a share of `reach`. Of
# 3.6 million random rows of 1 to 15 values that the emulator computed in the three dtypes, 1,578 exceeded the bounds
# relative to their norms, by up to 39 times; with this share none does, the largest error is 0.83 of what is allowed,
# and half of the rows are still measured against their norms. Of 8.8 million rows of 16 to 128 values in batches of 7,
# computed on an H200, 160 exceeded them relative to their norms, by up to 1.3 times, 158 of them in bfloat16.
SHORT_VALUES, SHORT_ROW = 129, 0.4

# So few values do not average out that next to a tie the least error rounds to the other neighbour.
FEW_VALUES = 16

# Against the emulator's own error: the sharp check of a kernel. The kernels also round some sums half-way.
EMULATOR_WHOLE, EMULATOR_ROW = 1.35, 1.5


@dataclass(frozen=True)
class Bounds:
    """Largest errors allowed for one output dtype."""

    dtype: torch.dtype
    whole: float
    row: float
    gradient: float  # of u and the gates
    taps: float  # of k, k_rev and skip, which sum over the batch, in float32


def _in_roundings(dtype: torch.dtype, whole: float, row: float, gradient: float, taps: float) -> Bounds:
    rounding = ROUNDING[dtype]
    return Bounds(dtype, whole * rounding, row * rounding, gradient * rounding, taps)


BFLOAT16 = _in_roundings(torch.bfloat16, 1.3, 1.6, 1.5, 2e-3)
FLOAT16 = _in_roundings(torch.float16, 6, 8, 8, 2e-3)
FLOAT32_TF32 = Bounds(torch.float32, 1.3e-3, 2e-3, 2e-3, 2e-3)
FLOAT32 = Bounds(torch.float32, 2e-6, 4e-6, 4e-6, 4e-6)
FLOAT64 = Bounds(torch.float64, 1e-14, 4e-13, 1e-14, 1e-14)
BOUNDS = {bounds.dtype: bounds for bounds in (BFLOAT16, FLOAT16, FLOAT32, FLOAT64)}


def error(actual: Tensor, reference: Tensor) -> float:
    """Relative L2 error of a whole tensor; NaN, which passes no bound, if it is not finite."""
    difference = (actual.double() - reference).norm()
    norm = reference.norm()
    return (difference / norm if norm > 0 else difference).item()


def row_errors(actual: Tensor, reference: Tensor, reach: Tensor | float = 0.0) -> Tensor:
    """Relative L2 errors along the last axis; `reach` is |u| |k| of each row."""
    norm, reach = reference.norm(dim=-1), torch.as_tensor(reach)
    if reference.shape[-1] < SHORT_VALUES:
        scale = torch.maximum(norm, SHORT_ROW * reach)
    else:
        scale = torch.where(norm < WEAK_ROW * reach, reach, norm)
    difference = (actual.double() - reference).norm(dim=-1)
    return torch.where(scale > 0, difference / scale, difference)


def reach(
    u: Tensor,
    k: Tensor,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    skip: Tensor | None = None,
    k_rev: Tensor | None = None,
) -> Tensor:
    """|g| |k| max|post| of each (b, h) row: the size of the terms that are summed there.

    For short rows |g| is the largest in the batch, as the row that shares their transform may have it.
    """
    g = u.double() if pre_gate is None else u.double() * pre_gate.double()
    size = g.norm(dim=-1)
    if u.shape[-1] < SHORT_VALUES:
        size = size.amax(0, keepdim=True)
    filters = [x for x in (k, k_rev, None if skip is None else skip[:, None]) if x is not None]
    size = size * torch.cat([x.double()[:, : u.shape[-1]] for x in filters], dim=1).norm(dim=-1)
    return size if post_gate is None else size * post_gate.double().abs().amax(-1)


def violations(actual: Tensor, reference: Tensor, bounds: Bounds, reach: Tensor | float = 0.0) -> list[str]:
    """What is wrong with an output, in words; empty if nothing is.

    On a few values the error of rounding them depends on their mantissas: the bounds grow by what rounding the
    reference itself costs beyond the usual.
    """
    if actual.shape != reference.shape or actual.dtype != bounds.dtype:
        return [f"got {actual.dtype} {tuple(actual.shape)}, not {bounds.dtype} {tuple(reference.shape)}"]
    rounded = reference.to(bounds.dtype)
    usual = ROUNDING[bounds.dtype]
    tie = torch.finfo(bounds.dtype).eps
    found = []
    whole, allowed = error(actual, reference), bounds.whole * max(1.0, error(rounded, reference) / usual)
    if actual.numel() < FEW_VALUES:
        allowed = max(allowed, tie)
    if not whole <= allowed:
        found.append(f"whole tensor: {whole:.2e} > {allowed:.2e}")
    rows, row_rounding = row_errors(actual, reference, reach), row_errors(rounded, reference, reach)
    allowed_rows = bounds.row * (row_rounding / usual).clamp(min=1.0)
    if actual.shape[-1] < FEW_VALUES:
        allowed_rows = allowed_rows.clamp(min=tie)
    bad = ~(rows <= allowed_rows)
    if bad.any():
        worst = torch.where(bad, rows.nan_to_num(math.inf), -1.0).argmax()
        found.append(f"{int(bad.sum())} rows: row {int(worst)} {rows.flatten()[worst]:.2e}")
    return found


def gradient_violations(name: str, actual: Tensor, reference: Tensor, bounds: Bounds) -> list[str]:
    """The same for the gradient of the argument called `name`, as a whole."""
    if actual.shape != reference.shape:
        return [f"gradient of {name}: got {tuple(actual.shape)}, not {tuple(reference.shape)}"]
    usual = ROUNDING[actual.dtype]
    # 16-bit taps have their own rounding on top of the sum's.
    bound = bounds.gradient if name in ("u", "pre_gate", "post_gate") else max(bounds.taps, 1.5 * usual)
    allowed = bound * max(1.0, error(reference.to(actual.dtype), reference) / usual)
    found = error(actual, reference)
    return [] if found <= allowed else [f"gradient of {name}: {found:.2e} > {allowed:.2e}"]


def impulses(length: int) -> Tensor:
    """Every unit impulse, (length, 1, length): with `tones`, by linearity, inputs that reach every constant."""
    return torch.eye(length)[:, None]


def tones(length: int) -> Tensor:
    """Every cosine and sine of a whole number of periods, (length + 2 or so, 1, length), zero rows left out."""
    phase = torch.outer(torch.arange(length // 2 + 1), torch.arange(length)) % length * (2 * math.pi / length)
    rows = torch.cat([phase.cos(), phase.sin()])
    return rows[rows.norm(dim=-1) > 1e-3][:, None]


def all_pass_filter(channels: int, length: int) -> Tensor:
    """Random filters (channels, length) without weak frequencies: circular outputs are as large as their inputs.

    Basis inputs need it and need circular convolution: in a row that is small because its tone is at a weak frequency,
    or because the response of a late impulse is cut off, a relative error says nothing.
    """
    spectrum = torch.polar(torch.ones(channels, length // 2 + 1), 2 * math.pi * torch.rand(channels, length // 2 + 1))
    spectrum[:, 0] = spectrum[:, -1] = 1
    return torch.fft.irfft(spectrum, n=length)


def _conv(spectrum: Tensor, length: int, size: int) -> Tensor:
    return torch.fft.ifft(spectrum, n=size).real[..., :length]


def _conjugate_twiddles(x: Tensor, size: int, radix: int = 4) -> Tensor:
    """A two-stage FFT whose twiddles have the wrong sign."""
    inner = size // radix
    x = torch.nn.functional.pad(x, (0, size - x.shape[-1])).unflatten(-1, (radix, inner))
    exponent = torch.outer(torch.arange(radix), torch.arange(inner)).double()
    x = torch.fft.fft(x, dim=-2) * torch.polar(torch.ones_like(exponent), exponent * (2 * math.pi / size))
    return torch.fft.fft(x, dim=-1).transpose(-1, -2).flatten(-2)


def _edit(y: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    y = y.clone()
    change(y)
    return y


def planted_faults(u: Tensor, k: Tensor) -> dict[str, Tensor]:
    """Causal convolutions of float64 inputs, at least two rows and two channels, each wrong in one way."""
    length = u.shape[-1]
    size = 2 * length
    us, ks = torch.fft.fft(u, n=size), torch.fft.fft(k, n=size)
    right = _conv(us * ks, length, size)

    def spectrum_edit(change: Callable[[Tensor], None]) -> Tensor:
        return _conv(_edit(us * ks, change), length, size)

    def zero_nyquist(x: Tensor) -> None:
        x[..., length] = 0

    def swap_bins(x: Tensor) -> None:
        x[..., [1, 2, -1, -2]] = x[..., [2, 1, -2, -1]]

    def stale_tile(y: Tensor) -> None:
        y[1, 0, : length // 8] = y[0, 0, : length // 8]

    def zero_row(y: Tensor) -> None:
        y[-1, -1] = 0

    def copied_channel(y: Tensor) -> None:
        y[:, 1] = y[:, 0]

    def last_element(y: Tensor) -> None:
        y[..., -1] = 0

    return {
        "zero output": torch.zeros_like(right),
        "one percent": right * 1.01,
        "twiddle sign": _conv(_conjugate_twiddles(u, size) * ks, length, size),
        "dropped Nyquist": spectrum_edit(zero_nyquist),
        "swapped bins": spectrum_edit(swap_bins),
        "stale tile": _edit(right, stale_tile),
        "zero row": _edit(right, zero_row),
        "copied channel": _edit(right, copied_channel),
        "last element": _edit(right, last_element),
        "circular wrap": _conv(torch.fft.fft(u) * torch.fft.fft(k), length, length),
        "flipped filter": _conv(us * ks.conj(), length, size),
        "not a number": _edit(right, lambda y: y[0, 0, :1].fill_(math.nan)),
    }
