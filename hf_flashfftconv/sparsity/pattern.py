"""Which frequency bins of a filter are kept, and how they are chosen from the energy in each bin."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import SparsityError

# A mask is stored as JSON in `config.json`: bounded, so that a file cannot ask for unbounded work.
MAX_RANGES = 4096


@dataclass(frozen=True)
class FrequencyMask:
    """
    The kept bins of a real filter's spectrum, one mask for all channels of a layer.

    Bins are those of `torch.fft.rfft` at `fft_size`, `0 .. fft_size // 2`; a kept bin stands for itself and its mirror
    image, so a mask is symmetric under `f -> -f` and the masked filter stays real. Masks are immutable and hashable.

    Args:
        fft_size (`int`):
            Even size of the transform.
        ranges (`tuple[tuple[int, int], ...]`):
            Kept bins as half-open ranges `(start, stop)`: in rising order, not touching each other, at least one.

    Raises:
        SparsityError: If the size is not even and positive, or a range is empty, out of bounds or out of order.
    """

    fft_size: int
    ranges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if type(self.fft_size) is not int or self.fft_size < 2 or self.fft_size % 2:
            raise SparsityError(f"fft_size must be an even int of at least 2, got {self.fft_size!r}")
        if not self.ranges:
            raise SparsityError("a frequency mask must keep at least one bin, got no ranges")
        if len(self.ranges) > MAX_RANGES:
            raise SparsityError(f"a frequency mask of {len(self.ranges)} ranges; at most {MAX_RANGES} are supported")
        previous = -1
        for entry in self.ranges:
            if not isinstance(entry, tuple) or len(entry) != 2 or any(type(edge) is not int for edge in entry):
                raise SparsityError(f"a range must be a pair (start, stop) of ints, got {entry!r:.200}")
            if not previous < entry[0] < entry[1] <= self.bins:
                raise SparsityError(
                    f"range {entry} is empty, out of order, or outside bins 0 .. {self.bins - 1} "
                    f"of fft_size {self.fft_size}"
                )
            previous = entry[1]

    @property
    def bins(self) -> int:
        """Number of bins, kept or not: `fft_size // 2 + 1`."""
        return self.fft_size // 2 + 1

    @property
    def kept(self) -> int:
        """Number of kept bins."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def density(self) -> float:
        """Kept bins as a fraction of all bins."""
        return self.kept / self.bins

    @classmethod
    def from_ranges(cls, fft_size: int, ranges: Iterable[tuple[int, int]]) -> FrequencyMask:
        """Builds a mask from half-open ranges in any order; overlapping and touching ranges are merged."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted((int(start), int(stop)) for start, stop in ranges):
            if merged and start <= merged[-1][1] and start < stop:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return cls(fft_size, tuple(merged))

    @classmethod
    def low_pass(cls, fft_size: int, keep: int | float) -> FrequencyMask:
        """Keeps the lowest bins: `keep` of them (`int`), or this fraction of all, rounded up (`float`)."""
        bins = fft_size // 2 + 1
        return cls(fft_size, ((0, _count(keep, bins)),))

    @classmethod
    def comb(cls, fft_size: int, period: int, residues: Iterable[int] = (0,)) -> FrequencyMask:
        """Keeps the bins `f` with `f % period` or `-f % period` in `residues`; `period` must divide `fft_size`."""
        if period < 1 or fft_size % period:
            raise SparsityError(f"the period of a comb must divide fft_size {fft_size}, got {period}")
        wanted = {residue % period for residue in residues}
        offsets = wanted | {-residue % period for residue in wanted}
        bins = fft_size // 2 + 1
        return cls.from_ranges(fft_size, ((f, f + 1) for f in range(bins) if f % period in offsets))

    @classmethod
    def from_energy(
        cls, energy: torch.Tensor, keep: int | float, *, by: str = "bins", block: int | None = None
    ) -> FrequencyMask:
        """Keeps the blocks of bins that hold most of `energy` `(bins,)`; arguments as in [`select_masks`]."""
        return select_masks({"filter": energy}, keep, by=by, block=block)["filter"]

    @classmethod
    def from_dict(cls, entry: Any) -> FrequencyMask:
        """Rebuilds a mask from [`~FrequencyMask.to_dict`], refusing anything that `to_dict` would not have written."""
        if not isinstance(entry, dict) or entry.keys() != {"fft_size", "ranges"}:
            raise SparsityError(f"a frequency mask must have exactly the keys fft_size and ranges, got {entry!r:.200}")
        ranges = entry["ranges"]
        if not isinstance(ranges, list) or not all(isinstance(pair, list) for pair in ranges):
            raise SparsityError(f"ranges must be a list of [start, stop] pairs, got {ranges!r:.200}")
        return cls(entry["fft_size"], tuple(tuple(pair) for pair in ranges))

    def to_dict(self) -> dict[str, Any]:
        """The mask as JSON types."""
        return {"fft_size": self.fft_size, "ranges": [list(pair) for pair in self.ranges]}

    def as_tensor(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The mask as a boolean tensor `(bins,)`."""
        edges = torch.tensor(list(itertools.chain.from_iterable(self.ranges)), device=device)
        # an odd number of edges at or below a bin means that the bin lies inside a range
        return torch.bucketize(torch.arange(self.bins, device=device), edges, right=True) % 2 == 1


def select_masks(
    energies: Mapping[str, torch.Tensor], keep: int | float, *, by: str = "bins", block: int | None = None
) -> dict[str, FrequencyMask]:
    """
    Chooses masks for several filters. Bins are kept or dropped in blocks of neighbours, best first by energy per bin.

    Args:
        energies (`Mapping[str, torch.Tensor]`):
            For each filter, the energy of each rfft bin, `(bins,)`, on a scale that is common to all filters.
        keep (`int` or `float`):
            An `int` is the exact number of blocks that each filter keeps. A `float` in (0, 1] is a fraction: see `by`.
        by (`str`, *optional*, defaults to `"bins"`):
            `"bins"`: `keep` is the fraction of all bins of all filters, one budget that goes to the blocks with the
            most energy wherever they are; every filter keeps at least one block. `"energy"`: every filter keeps the
            blocks that reach this fraction of its own energy.
        block (`int`, *optional*):
            Bins in a block. Defaults to `fft_size // 256` or 1, so that kernels can leave out whole tiles.

    Returns:
        `dict[str, FrequencyMask]`: One mask for each filter.

    Raises:
        SparsityError: If `keep`, `by` or `block` is out of range, or an energy is not finite or zero everywhere.
    """
    if by not in ("bins", "energy"):
        raise SparsityError(f"by must be 'bins' or 'energy', got {by!r}")
    blocks = {name: _Blocks(name, energy, block) for name, energy in energies.items()}
    if type(keep) is int:
        return {name: layer.best(_count(keep, len(layer.sizes))) for name, layer in blocks.items()}
    fraction = _fraction(keep)
    if by == "energy":
        return {name: layer.best(_reach(layer.energy[layer.order], fraction)) for name, layer in blocks.items()}
    return _share_budget(blocks, fraction)


class _Blocks:
    """One filter's bins in blocks, with the energy and the rank of each block."""

    def __init__(self, name: str, energy: torch.Tensor, block: int | None) -> None:
        if energy.ndim != 1 or len(energy) < 2:
            raise SparsityError(f"{name}: the energy must have shape (bins,), got {tuple(energy.shape)}")
        if not bool(energy.isfinite().all()):
            raise SparsityError(f"{name}: the filter's spectrum has NaN or infinite values")
        if not bool(energy.sum() > 0):
            raise SparsityError(f"{name}: the filter is zero everywhere, so no bins can be chosen by energy")
        self.fft_size = 2 * (len(energy) - 1)
        block = max(1, self.fft_size // 256) if block is None else block
        if type(block) is not int or not 1 <= block <= len(energy):
            raise SparsityError(f"block must be an int from 1 to the {len(energy)} bins of {name}, got {block!r}")
        self.starts = list(range(0, len(energy), block))
        self.stops = [*self.starts[1:], len(energy)]
        self.sizes = torch.tensor(self.stops) - torch.tensor(self.starts)
        padding = block * len(self.starts) - len(energy)
        self.energy = torch.nn.functional.pad(energy.detach().double().cpu(), (0, padding)).view(-1, block).sum(1)
        self.per_bin = self.energy / self.sizes
        self.order = torch.sort(self.per_bin, descending=True, stable=True).indices

    def best(self, count: int) -> FrequencyMask:
        kept = self.order[:count].tolist()
        return FrequencyMask.from_ranges(self.fft_size, ((self.starts[i], self.stops[i]) for i in kept))


def _share_budget(blocks: dict[str, _Blocks], fraction: float) -> dict[str, FrequencyMask]:
    """Spends one budget of bins on the blocks of all filters, best first, one block for each filter before all else."""
    layers = blocks.values()
    is_best = torch.cat([layer.order.argsort() for layer in layers]) == 0
    score = torch.cat([layer.per_bin for layer in layers]).masked_fill(is_best, torch.inf)
    sizes = torch.cat([layer.sizes for layer in layers])
    owner = torch.cat([torch.full_like(layer.order, i) for i, layer in enumerate(layers)])
    order = torch.sort(score, descending=True, stable=True).indices
    chosen = order[: max(_reach(sizes[order].double(), fraction), len(blocks))]
    counts = torch.bincount(owner[chosen], minlength=len(blocks)).tolist()
    return {name: layer.best(count) for (name, layer), count in zip(blocks.items(), counts, strict=True)}


def _reach(values: torch.Tensor, fraction: float) -> int:
    """The fewest leading values whose sum reaches `fraction` of the whole."""
    running = values.cumsum(0)
    # a hair below the target, so that rounding in the running sum cannot ask for one value more
    target = running[-1] * (fraction * (1 - 1e-12))
    return min(int(torch.searchsorted(running, target)) + 1, len(values))


def _count(keep: int | float, available: int) -> int:
    if type(keep) is not int:
        return _reach(torch.ones(available, dtype=torch.float64), _fraction(keep))
    if not 1 <= keep <= available:
        raise SparsityError(f"keep as an int must be from 1 to {available}, got {keep}")
    return keep


def _fraction(keep: int | float) -> float:
    if not isinstance(keep, float) or not 0 < keep <= 1:
        raise SparsityError(f"keep must be a fraction in (0, 1] as a float, or a count as an int, got {keep!r}")
    return keep
