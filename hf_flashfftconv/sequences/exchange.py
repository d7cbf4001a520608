"""What the ranks of a sequence send each other, with gradients.

All gradients are those of the sum of what the ranks compute, as autograd has them when the ranks are seen as one
program. Every rank must run the same backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .shards import SequenceShards


def to_channels(x: Tensor, shards: SequenceShards) -> Tensor:
    """From a slice of all channels `(B, H, L / P)` to all positions of the rank's own channels `(B, H / P, L)`."""
    return _Exchange.apply(x, shards, 1, 2)


def to_positions(x: Tensor, shards: SequenceShards) -> Tensor:
    """The inverse of [`to_channels`]."""
    return _Exchange.apply(x, shards, 2, 1)


def start_taps_to_channels(x: Tensor, shards: SequenceShards) -> Callable[[], Tensor]:
    """Sends a slice of all filters `(L / P, H)` on its way; the result waits for the rank's own filters `(L, H / P)`.

    What is queued on the GPU in between does not wait. Taps of a position stay neighbours in memory.
    """
    works: list[Any] = []
    taps = _Exchange.apply(x, shards, 1, 0, works)

    def arrive() -> Tensor:
        while works:
            works.pop().wait()
        return taps

    return arrive


def after_neighbour(u: Tensor, halo: int, shards: SequenceShards) -> Tensor:
    """The slice `(B, L / P, C)` after the last `halo` positions of the rank before; on the first rank the slice alone.

    Raises:
        ValueError: The slices are shorter than the halo.
    """
    if u.shape[1] < halo:
        raise ValueError(f"a rank holds {u.shape[1]} positions, fewer than the {halo} that the next one must see")
    return _AfterNeighbour.apply(u, halo, shards) if halo else u


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
        sent = x.unflatten(split, (shards.size, -1)).movedim(split, 0).contiguous()
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, group=shards.group, async_op=works is not None)
        if works is not None:
            works.append(work)
        # For the first dimension a view, which reads nothing that may not be here yet, as for channels of one sequence.
        return received.movedim(0, join).flatten(join, join + 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _Exchange.apply(dy, ctx.shards, ctx.join, ctx.split), None, None, None, None


class _AfterNeighbour(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, halo: int, shards: SequenceShards) -> Tensor:
        ctx.halo, ctx.shards = halo, shards
        received = _shift(u[:, -halo:], 1, shards)
        return u.clone() if received is None else torch.cat([received, u], 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        halo, shards = ctx.halo, ctx.shards
        # All ranks take part, the first one too, though nobody looks at what it sends.
        received = _shift(dy[:, :halo], -1, shards)
        du = (dy[:, halo:] if shards.rank else dy).clone()
        if received is not None:
            du[:, -halo:] += received
        return du, None, None


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


def _shift(x: Tensor, step: int, shards: SequenceShards) -> Tensor | None:
    """Sends `x` to rank + step, if there is one, and returns what rank - step has sent, if there is one."""
    sizes = {rank: x.numel() for rank in range(shards.size)}
    send = [sizes[rank] if rank == shards.rank + step else 0 for rank in sizes]
    receive = [sizes[rank] if rank == shards.rank - step else 0 for rank in sizes]
    received = x.new_empty(sum(receive))
    dist.all_to_all_single(received, x.contiguous().flatten()[: sum(send)], receive, send, group=shards.group)
    return received.view(x.shape) if sum(receive) else None
