"""Patched mixers that work on a sequence in slices, on one rank or on several.

Their maths is that of the patched mixers. What is local, the projection, the short convolution and the gate before the
long convolution, runs slice after slice; the filters are generated slice after slice and, over several ranks, each rank
generates those of its own positions; the long convolution runs in blocks of channels.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.base import PatchedMixer, _skip
from ..adapters.hyena import FILTERS, PatchedHyena, PatchedSafariHyena
from ..adapters.m2 import PatchedMonarchMixer
from ..adapters.truncation import cuts_itself
from ..ops.truncation import kept_taps
from ..slices import over_slices
from .convolution import convolve
from .exchange import from_neighbour, split_taps, start_taps_to_channels
from .shards import SequenceShards


@dataclass
class Slicing:
    """How a mixer works on its sequence; the fields are those of `shard_sequence` and `enable_long_sequences`."""

    shards: SequenceShards | None = None
    positions: int | None = None
    channels: int | None = None

    @property
    def active(self) -> bool:
        return self.shards is not None or self.positions is not None


class SlicedFilters(NamedTuple):
    """Filters of the rank's own channels: what waits for causal and anticausal taps, and the skip term's weights."""

    k: Callable[[], Tensor]
    k_rev: Callable[[], Tensor] | None
    skip: Tensor


class SlicedMixer(PatchedMixer):
    """Base of the patched mixers that work on slices."""

    _flashfftconv_slicing: Slicing
    undo_first = "unshard_sequence and disable_long_sequences"

    def whole_length(self, u: Tensor) -> int:
        """Length of the sequence that `u` `(batch, length, channels)` is this rank's slice of, checked."""
        shards = self._flashfftconv_slicing.shards
        # A view without memory: it is the length that is checked.
        return self.checked_length(u[:1, :1].expand(-1, u.shape[1] * (1 if shards is None else shards.size), -1))

    def before(self, u: Tensor) -> Tensor | None:
        """What the short convolution sees of the rank before.

        It is to come before the filters are on their way: what the ranks send each other arrives in this order, and the
        projections are to run meanwhile.
        """
        shards, halo = self._flashfftconv_slicing.shards, _taps(self.short_filter) - 1
        return None if shards is None or halo == 0 else from_neighbour(u, halo, shards)

    def local(
        self, u: Tensor, before: Tensor | None, projection: nn.Module, gate: int, dropout: nn.Module | None
    ) -> tuple[Tensor, ...]:
        """Output gate and gated input of the long convolution, `(batch, channels, length)`, by `short_filtered`."""
        halo = _taps(self.short_filter) - 1

        def part(u: Tensor, extra: int) -> tuple[Tensor, ...]:
            g, in_gate, out_gate = self.short_filtered(projection(u).transpose(1, 2), gate, dropout)
            g = g if in_gate is None else g * in_gate
            return out_gate[..., extra:], g[..., extra:]

        positions = self._flashfftconv_slicing.positions
        return over_slices(part, u, positions, before=before, halo=halo, dim=-1)

    def start_filters(self, filter_fn: nn.Module, u: Tensor, length: int, bidirectional: bool = False) -> SlicedFilters:
        """The filters of the rank's own channels, which may still be on their way, for an input such as `u`."""
        shards = self._flashfftconv_slicing.shards
        with nullcontext() if self._flashfftconv.widened is None else torch.autocast(u.device.type, enabled=False):
            k = self.start_taps(filter_fn, "filter", length)
            k_rev = self.start_taps(filter_fn, "filter_rev", length) if bidirectional else None
        skip = _skip(filter_fn)
        return SlicedFilters(k, k_rev, skip if shards is None else skip.chunk(shards.size)[shards.rank])

    def convolve_slices(self, filters: SlicedFilters, g: Tensor, post_gate: Tensor | None = None) -> Tensor:
        """Long convolution of the gated input `(batch, channels, length / ranks)`."""
        slicing, backend = self._flashfftconv_slicing, self._flashfftconv.backend
        k, k_rev = filters.k(), None if filters.k_rev is None else filters.k_rev()
        shards, channels = slicing.shards, slicing.channels
        return convolve(g, k, k_rev, filters.skip, post_gate, shards=shards, channels=channels, backend=backend)

    def start_taps(self, filter_fn: Any, method: str, length: int) -> Callable[[], Tensor]:
        """The taps of the rank's own channels, `(channels / ranks, length)`, or fewer where filters are cut."""
        slicing, truncation = self._flashfftconv_slicing, self.truncation
        shards = slicing.shards
        # A cut counts from the filter's first tap, which a slice of it does not know.
        if truncation is not None or not _makes_any_positions(filter_fn, method):
            whole = getattr(filter_fn, method)(kept_taps(length, truncation))[0]
            if truncation is not None and not cuts_itself(filter_fn):
                whole = truncation.apply(whole)
            taps = whole.mT if shards is None else whole.mT.chunk(shards.size)[shards.rank]
            return lambda: taps
        share = length if shards is None else length // shards.size
        start = 0 if shards is None else shards.rank * share
        # Numbers of the positions in the place of the positions themselves, which the filter module looks up.
        numbers = torch.arange(start, start + share).view(1, -1, 1)

        def part(numbers: Tensor, _: int) -> tuple[Tensor]:
            first, count = int(numbers[0, 0, 0]), numbers.shape[1]
            taps = getattr(_at_positions(filter_fn, first), method)(count)
            return (taps if shards is None else split_taps(taps, shards),)

        (own,) = over_slices(part, numbers, slicing.positions)
        arrive = (lambda: own[0]) if shards is None else start_taps_to_channels(own, shards)
        return lambda: arrive().mT


class SlicedHyena(SlicedMixer, PatchedHyena):
    """HyenaDNA's operator on slices."""

    def mix(self, u: Tensor) -> Tensor:
        length, before = self.whole_length(u), self.before(u)
        filters = self.start_filters(self.filter_fn, u, length)
        out_gate, g = self.local(u, before, self.in_proj, 0, self.dropout)
        return self.convolve_slices(filters, g, out_gate).transpose(1, 2)

    def forward(self, u: Tensor, *args: Any, **kwargs: Any) -> Any:
        check_call(self, args, kwargs)
        return self.out_proj(self.mix(u))


class SlicedSafariHyena(SlicedHyena, PatchedSafariHyena):
    """safari's operator on slices."""

    def forward(self, u: Tensor, *args: Any, **kwargs: Any) -> Any:
        check_call(self, (), {})
        y = self.out_proj(self.activation(self.mix(u)))
        return (y, None) if self.return_state else y


class SlicedMonarchMixer(SlicedMixer, PatchedMonarchMixer):
    """M2-BERT's sequence mixing on slices."""

    def forward(self, u: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        check_call(self, (), {})
        additions = getattr(self, "hyena_training_additions", False)
        length = self.whole_length(u)
        if additions:
            u = self.layernorm(u)
        before = self.before(u)
        filters = self.start_filters(self.filter_fn, u, length, self.bidirectional)
        out_gate, g = self.local(u, before, self.in_linear, 1, self.drop if additions else None)
        y = self.convolve_slices(filters, g, out_gate)
        if self.residual_long_conv:
            with torch.autocast(u.device.type, enabled=False):
                filters = self.start_filters(self.filter_fn2, u, length, self.bidirectional)
                y = y + self.convolve_slices(filters, u.transpose(1, 2))
        y = y.transpose(1, 2)
        if additions:
            y = self.drop(self.act(y))
        return self.out_linear(y), None


SLICED: dict[Any, Any] = {
    PatchedHyena: SlicedHyena,
    PatchedSafariHyena: SlicedSafariHyena,
    PatchedMonarchMixer: SlicedMonarchMixer,
}


def check_call(mixer: PatchedMixer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises `RuntimeError` for a call that the original code would have to run, which knows nothing of slices."""
    if args or kwargs:
        raise RuntimeError(
            f"a mixer that works on slices takes its input alone, got {len(args)} more and {[*kwargs]}; "
            "a model with a cache needs use_cache=False"
        )
    if not mixer.covered():
        raise RuntimeError("there are hooks on the filters of a mixer that works on slices: they would not run")


class _Positions(nn.Module):
    """A positional embedding whose first position is another one's position `first`."""

    def __init__(self, embedding: nn.Module, first: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.first = first

    def forward(self, length: int) -> tuple[Tensor, ...]:
        return tuple(x[:, self.first :] for x in self.embedding(self.first + length))


def _at_positions(filter_fn: nn.Module, first: int) -> Any:
    """A filter module that shares everything with `filter_fn` but counts its positions from `first`."""
    twin = object.__new__(type(filter_fn))
    vars(twin).update(vars(filter_fn))
    embedding = _Positions(filter_fn.pos_emb, first)
    vars(twin)["_modules"] = {**filter_fn._modules, "pos_emb": embedding}
    return twin


def _makes_any_positions(filter_fn: nn.Module, method: str) -> bool:
    """Whether taps are made one position at a time, as by the published code; those of a masked spectrum are not."""
    owner = next(cls for cls in type(filter_fn).__mro__ if method in vars(cls))
    return owner.__name__ in FILTERS


def _taps(short_filter: Any) -> int:
    """Kernel size of the short convolution, wrapped (LoRA) or not."""
    while isinstance(getattr(short_filter, "base_layer", None), nn.Module):
        short_filter = short_filter.base_layer
    return short_filter.kernel_size[0]
