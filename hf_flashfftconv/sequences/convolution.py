"""One long convolution of sequences whose slices lie on several ranks."""

from typing import Any

import torch
from torch import Tensor

from ..functional import fft_conv
from ..ops.library import use_kernels
from ..slices import over_channels
from .exchange import to_channels, to_positions
from .shards import SequenceShards


def sharded_fft_conv(
    u: Tensor,
    k: Tensor,
    mesh: Any,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    k_rev: Tensor | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> Tensor:
    """[`fft_conv`] of sequences that are sharded over P ranks: each passes its slice and gets its slice of the result.

    The gated input is exchanged from positions to channels by all-to-all, each rank convolves H / P channels of the
    whole sequences, and the result is exchanged back; so the gated input and the ungated result are rounded to the
    dtype of `u`. All ranks call this together, with equal shapes, and run the backward pass together.

    Gradients are those of the sum of what all ranks make of their slices. A rank's gradient of `k`, `k_rev` and `skip`
    is that of its own channels and zero elsewhere; the whole is the sum over the ranks.

    Args:
        u (`torch.Tensor` of shape `(B, H, L / P)`): The rank's slice of the input; H is a multiple of P.
        k (`torch.Tensor` of shape `(H, K)`): The filters, the same on every rank.
        mesh (`DeviceMesh` or `ProcessGroup`): The ranks, in the order of their slices.
        skip (`torch.Tensor` of shape `(H,)`, *optional*): Weight of the input itself, the same on every rank.
        pre_gate (`torch.Tensor` of shape `(B, H, L / P)`, *optional*): The slice of the input's gate.
        post_gate (`torch.Tensor` of shape `(B, H, L / P)`, *optional*): The slice of the output's gate.
        k_rev (`torch.Tensor` of shape `(H, K')`, *optional*): Anticausal filters, the same on every rank.
        causal (`bool`, *optional*, defaults to `True`): As in [`fft_conv`]; a circle is that of the whole sequence.
        backend (`str`, *optional*, defaults to `"auto"`): As in [`fft_conv`].

    Returns:
        `torch.Tensor` of shape `(B, H, L / P)`: The rank's slice of the result, of the dtype of `u`.

    Raises:
        ValueError: The ranks disagree on shapes, H is not a multiple of P, or what [`fft_conv`] refuses; on every rank.
        TypeError: As from [`fft_conv`].
    """
    shards = SequenceShards(mesh)
    operands = {"u": u, "k": k, "skip": skip, "pre_gate": pre_gate, "post_gate": post_gate, "k_rev": k_rev}
    shards.agree(operands, causal=int(causal), gradients=int(torch.is_grad_enabled()))
    # The checks of fft_conv for the whole sequence, without its memory: what one rank refuses all of them refuse.
    sliced = ("u", "pre_gate", "post_gate")
    whole = {name: _without_memory(x, shards.size if name in sliced else 1) for name, x in operands.items()}
    fft_conv(**whole, causal=causal, backend="torch")
    shards.check_channels(u.shape[1])
    if torch.is_autocast_enabled(u.device.type) and u.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(u.device.type)
        u, pre_gate, post_gate = (None if x is None else x.to(dtype) for x in (u, pre_gate, post_gate))
    k, k_rev, skip = (None if x is None else x.chunk(shards.size)[shards.rank] for x in (k, k_rev, skip))
    gated = u if pre_gate is None else u * pre_gate
    y = convolve(gated, k, k_rev, skip, shards=shards, causal=causal, backend=backend)
    return y if post_gate is None else y * post_gate


def _without_memory(x: Any, times: int) -> Any:
    """A tensor on the meta device with so many times the positions."""
    shape = (*x.shape[:-1], x.shape[-1] * times) if isinstance(x, Tensor) and x.dim() else ()
    return torch.empty(shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


def convolve(
    g: Tensor,
    k: Tensor,
    k_rev: Tensor | None,
    skip: Tensor | None,
    post_gate: Tensor | None = None,
    *,
    shards: SequenceShards | None = None,
    channels: int | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The convolution of a slice `(B, H, L / P)` with the filters of the rank's own channels.

    Args:
        g (`torch.Tensor` of shape `(B, H, L / P)`): The gated input.
        k, k_rev (`torch.Tensor` of shape `(H / P, K)`): The filters of the rank's own channels.
        skip (`torch.Tensor` of shape `(H / P,)`, *optional*): Weight of the input itself.
        post_gate (`torch.Tensor` of shape `(B, H, L / P)`, *optional*): The output's gate.
        shards (`SequenceShards`, *optional*): The ranks; without, the slice is the whole sequence.
        channels (`int`, *optional*):
            Channels that `torch.fft` transforms at a time; all if `None`. The kernels bound their memory by themselves.
    """

    def block(g: Tensor, k: Tensor, k_rev: Tensor | None, skip: Tensor | None, gate: Tensor | None) -> Tensor:
        skip = None if skip is None else skip.squeeze(-1)
        return fft_conv(g, k, skip=skip, post_gate=gate, k_rev=k_rev, causal=causal, backend=backend)

    column = None if skip is None else skip.unsqueeze(-1)
    if torch.is_autocast_enabled(g.device.type) and g.dtype != torch.float64:
        g = g.to(torch.get_autocast_dtype(g.device.type))
    whole = g if shards is None else to_channels(g, shards)
    if not torch.compiler.is_compiling() and use_kernels(whole, k, k_rev, causal, backend):
        channels = None
    if shards is None:
        return over_channels(block, channels, whole, k, k_rev, column, post_gate)
    y = to_positions(over_channels(block, channels, whole, k, k_rev, column, None), shards)
    return y if post_gate is None else y * post_gate
