"""What the ranks of a sequence send each other, with gradients.

All gradients are those of the sum of what the ranks compute, as autograd has them when the ranks are seen as one
program. Every rank must run the same backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..slices import copy_rows
from .shards import SequenceShards


def to_channels(x: Tensor, shards: SequenceShards) -> Tensor:
    """From a slice of all channels `(B, H, L / P)` to all positions of the rank's own channels `(B, H / P, L)`."""
    return _Exchange.apply(x, shards, 1, 2)


def to_positions(x: Tensor, shards: SequenceShards) -> Tensor:
    """The inverse of [`to_channels`]."""
    return _Exchange.apply(x, shards, 2, 1)


def split_taps(x: Tensor, shards: SequenceShards) -> Tensor:
    """Taps `(1, n, H)` by the ranks that they are for, `(P, n, H / P)`."""
    return x[0].unflatten(1, (shards.size, -1)).movedim(1, 0)


def start_taps_to_channels(x: Tensor, shards: SequenceShards) -> Callable[[], Tensor]:
    """Sends a slice of all filters on its way, split by [`split_taps`]; the result waits for the rank's own ones.

    These have the shape `(L, H / P)`: taps of a position stay neighbours in memory. What is queued on the GPU in
    between does not wait.
    """
    works: list[Any] = []
    taps = _Exchange.apply(x.flatten(0, 1), shards, 0, 0, works)

    def arrive() -> Tensor:
        while works:
            works.pop().wait()
        return taps

    return arrive


def from_neighbour(u: Tensor, halo: int, shards: SequenceShards) -> Tensor:
    """The last `halo` positions of the slice `(B, L / P, C)` of the rank before; on the first rank none.

    Raises:
        ValueError: The slices are shorter than the halo.
    """
    if u.shape[1] < halo:
        raise ValueError(f"a rank holds {u.shape[1]} positions, fewer than the {halo} that the next one must see")
    return _FromNeighbour.apply(u[:, u.shape[1] - halo :], shards)


def from_next(x: Tensor, shards: SequenceShards, last: float) -> Tensor:
    """What the next rank passes as `x`, and `last` on the last rank; without gradient."""
    received = _shift(x.detach(), -1, shards)
    return torch.full_like(x, last) if received is None else received


def sum_over_ranks(x: Tensor, shards: SequenceShards) -> Tensor:
    """The sum of the `x` of all ranks, on every rank."""
    return _Sum.apply(x, shards)


class _Exchange(torch.autograd.Function):
    """Splits a dimension into a part for each rank, and joins what comes from the ranks along another one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shards: SequenceShards, split: int, join: int, works: list[Any] | None = None
    ) -> Tensor:
        ctx.shards, ctx.split, ctx.join = shards, split, join
        sent = _contiguous(x.unflatten(split, (shards.size, -1)).movedim(split, 0))
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, group=shards.group, async_op=works is not None)
        if works is not None:
            works.append(work)
        # For the first dimension a view, which reads nothing that may not be here yet, as for channels of one sequence.
        return _contiguous(received.movedim(0, join)).flatten(join, join + 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _Exchange.apply(dy, ctx.shards, ctx.join, ctx.split), None, None, None, None


class _FromNeighbour(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: SequenceShards) -> Tensor:
        ctx.shape, ctx.shards = x.shape, shards
        received = _shift(x, 1, shards)
        return x.new_empty(x.shape[0], 0, x.shape[2]) if received is None else received

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        # All ranks take part, the first one too, though nobody looks at what it sends.
        received = _shift(dy if ctx.shards.rank else dy.new_zeros(ctx.shape), -1, ctx.shards)
        return dy.new_zeros(ctx.shape) if received is None else received, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: SequenceShards) -> Tensor:
        ctx.shards = shards
        y = x.clone()
        dist.all_reduce(y, group=shards.group)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(dy, ctx.shards), None


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else copy_rows(torch.empty_like(x, memory_format=torch.contiguous_format), x)


def _shift(x: Tensor, step: int, shards: SequenceShards) -> Tensor | None:
    """Sends `x` to rank + step, if there is one, and returns what rank - step has sent, if there is one."""
    sizes = {rank: x.numel() for rank in range(shards.size)}
    send = [sizes[rank] if rank == shards.rank + step else 0 for rank in sizes]
    receive = [sizes[rank] if rank == shards.rank - step else 0 for rank in sizes]
    received = x.new_empty(sum(receive))
    dist.all_to_all_single(received, x.contiguous().flatten()[: sum(send)], receive, send, group=shards.group)
    return received.view(x.shape) if sum(receive) else None
