"""Long filters cut to their first taps, so that sequences may be longer than the filters of a trained model."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Truncation:
    """What is kept of the filters of a model, in each direction.

    Args:
        length (`int`): Number of taps.
        taper (`float`, *optional*, defaults to 0.0): Share of these taps, from 0 to 1, over which they fall to zero at
            the end, along half a cosine: a filter that ends at once has ripples in its spectrum.

    Raises:
        ValueError: a value is out of range.
    """

    length: int
    taper: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"filter_length must be a whole number of taps from 1 on, got {self.length!r}")
        if not 0 <= self.taper <= 1:
            raise ValueError(f"the taper is a share of the filter's taps from 0 to 1, got {self.taper!r}")

    def apply(self, taps: Tensor) -> Tensor:
        """Of taps `(..., length, channels)`, lag 0 first, those that are kept, tapered."""
        taps = taps[..., : self.length, :]
        falling = round(self.taper * self.length)
        if falling == 0:
            return taps
        lag = torch.arange(taps.shape[-2], device=taps.device)
        phase = (lag - (self.length - 1 - falling)).clamp(min=0) / (falling + 1)
        window = 0.5 + 0.5 * torch.cos(torch.pi * phase)
        return taps * window[:, None].to(taps.dtype)


def kept_taps(length: int, truncation: Truncation | None) -> int:
    """Taps that a sequence of `length` needs."""
    return length if truncation is None else min(length, truncation.length)
