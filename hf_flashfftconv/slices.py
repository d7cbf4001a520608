"""Work on a long sequence in slices, so that what lies between its inputs and its results never exists as a whole."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Results = tuple[Tensor, ...]


def over_slices(
    fn: Callable[[Tensor, int], Results],
    x: Tensor,
    size: int | None,
    *,
    before: Tensor | None = None,
    halo: int = 0,
    dim: int = 1,
) -> Results:
    """Applies a function to slices of a sequence and joins the results.

    With gradients each slice is checkpointed: nothing but `x` is kept for the backward pass, which computes the slices
    again. Without, the results are written to where they belong as they come.

    Args:
        fn (`Callable`): Gets a slice `(batch, extra + n, channels)` and `extra`, the number of positions at its start
            that are there for the others to look at; returns tensors of n positions.
        x (`torch.Tensor` of shape `(batch, length, channels)`): The sequence.
        size (`int`, *optional*): Positions in a slice; `None` makes one slice of all, which is not checkpointed.
        before (`torch.Tensor` of shape `(batch, halo or 0, channels)`, *optional*): The positions before the sequence.
        halo (`int`, *optional*, defaults to 0): Earlier positions that a result depends on.
        dim (`int`, *optional*, defaults to 1): Dimension of the positions in the results.

    Returns:
        `tuple[torch.Tensor, ...]`: The results of `fn` for all `length` positions.
    """
    length = x.shape[1]
    known = 0 if before is None else before.shape[1]

    def part(start: int, end: int) -> tuple[Tensor, int]:
        extra = min(start + known, halo)
        inside = x[:, max(start - extra, 0) : end]
        # Only the first slices look at what is before the sequence.
        return inside if before is None or start >= halo else torch.cat([before[:, start:], inside], 1), extra

    if size is None or length <= size:
        return fn(*part(0, length))
    starts = range(0, length, size)
    slices = [part(start, start + size) for start in starts]
    if torch.is_grad_enabled():
        parts = [checkpoint(fn, piece, extra, use_reentrant=False) for piece, extra in slices]
        return tuple(torch.cat(pieces, dim) for pieces in zip(*parts, strict=True))
    joined: Results = ()
    for start, (own, extra) in zip(starts, slices, strict=True):
        pieces = fn(own, extra)
        joined = joined or tuple(_room_for(piece, dim, length) for piece in pieces)
        for whole, piece in zip(joined, pieces, strict=True):
            copy_rows(whole.narrow(dim, start, piece.shape[dim]), piece)
    return joined


def over_channels(fn: Callable[..., Tensor], size: int | None, *operands: Tensor | None) -> Tensor:
    """Applies a function to blocks of channels of all operands, `(..., channels, length)`, and joins the results.

    Args:
        fn (`Callable`): Gets as many operands, `None` for one that is `None`; returns `(..., channels, length)`.
        size (`int`, *optional*): Channels in a block; `None` makes one block of all.
        operands (`torch.Tensor` or `None`): At least one tensor, all of as many channels.
    """
    channels = next(x.shape[-2] for x in operands if x is not None)
    if size is None or channels <= size:
        return fn(*operands)
    count = -(-channels // size)
    # One split of the whole instead of many slices: its gradient is one tensor, joined once.
    blocks = zip(*([None] * count if x is None else x.split(size, -2) for x in operands), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([fn(*block) for block in blocks], -2)
    first = fn(*next(blocks))
    joined = _room_for(first, -2, channels)
    joined.narrow(-2, 0, size).copy_(first)
    for start, block in zip(range(size, channels, size), blocks, strict=True):
        piece = fn(*block)
        joined.narrow(-2, start, piece.shape[-2]).copy_(piece)
    return joined


def copy_rows(to: Tensor, x: Tensor) -> Tensor:
    """`to.copy_(x)` for rows that are neighbours in memory only by themselves.

    Where they are of whole units of 16 bytes they are copied in these, in half of the time of single elements.
    """
    unit = 16 // x.element_size()
    sizes = [x.shape[-1], *(n for y in (to, x) for n in (*y.stride()[:-1], y.storage_offset()))]
    if to.dtype == x.dtype and to.stride(-1) == x.stride(-1) == 1 and all(n % unit == 0 for n in sizes):
        to.view(torch.complex128).copy_(x.view(torch.complex128))
    else:
        to.copy_(x)
    return to


def _room_for(piece: Tensor, dim: int, length: int) -> Tensor:
    shape = list(piece.shape)
    shape[dim] = length
    return piece.new_empty(shape)
