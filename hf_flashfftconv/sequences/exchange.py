"""What the ranks of a sequence send each other, with gradients.

All gradients are those of the sum of what the ranks compute, as autograd has them when the ranks are seen as one
program. Every rank must run the same backward pass.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .shards import SequenceShards


def to_channels(x: Tensor, shards: SequenceShards) -> Tensor:
    """From a slice of all channels `(B, H, L / P)` to all positions of the rank's own channels `(B, H / P, L)`."""
    return _Exchange.apply(x, shards, True)


def to_positions(x: Tensor, shards: SequenceShards) -> Tensor:
    """The inverse of [`to_channels`]."""
    return _Exchange.apply(x, shards, False)


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
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: SequenceShards, forth: bool) -> Tensor:
        ctx.shards, ctx.forth = shards, forth
        ranks = shards.size
        sent = x.unflatten(1, (ranks, -1)).transpose(0, 1) if forth else x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3)
        sent = sent.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=shards.group)
        # The first dimension is the rank that it came from: its positions, or its channels.
        y = received.permute(1, 2, 0, 3).flatten(2) if forth else received.transpose(0, 1).flatten(1, 2)
        return y.contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _Exchange.apply(dy, ctx.shards, not ctx.forth), None, None


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
