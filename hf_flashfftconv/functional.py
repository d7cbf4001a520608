"""`fft_conv`, the one operation of this package: a long convolution with its gates and its skip term."""

from typing import Any

import torch
from torch import Tensor

from .ops import library

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def fft_conv(
    u: Tensor,
    k: Tensor,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    k_rev: Tensor | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel of a batch of sequences with that channel's own long filter.

    For every batch row b, channel h and position t, with g = pre_gate * u and all sums over s >= 0,

        y[b,h,t] = post_gate[b,h,t] * ( sum k[h,s] g[b,h,t-s] + sum k_rev[h,s] g[b,h,t+1+s] + skip[h] g[b,h,t] )

    where g is zero outside of 0..L-1, or periodic with period L if `causal` is false. A gate that is left out counts as
    one, a term that is left out as zero. All tensors have gradients; second derivatives raise a `RuntimeError`.

    Where filters are short against the sequence, torch.fft goes through it in overlapping blocks (overlap-save): work a
    position and memory are then those of transforms of a few K points, however long the sequence is.

    Sums are accumulated in float32 (float64 for float64 inputs) whatever the dtype of `u`. A NaN or an infinity
    spreads over its own (b, h) row or the blocks of it that it reaches, and to no other row. Under autocast `u` and the
    gates are cast to the autocast dtype, as `torch.nn.functional.conv1d` casts its inputs; `k`, `k_rev` and `skip` are
    not.

    Args:
        u (`torch.Tensor` of shape `(B, H, L)`):
            The input: bfloat16, float16, float32 or float64, with any strides. B and H may be 0, L is at least 1.
        k (`torch.Tensor` of shape `(H, K)`):
            The filters, lag 0 first, of any of these dtypes (float32 is usual beside 16-bit inputs too). K is at least
            1. If `causal`, it may exceed L: later taps never matter. If not, it is at most L.
        skip (`torch.Tensor` of shape `(H,)`, *optional*):
            Weight of the input itself, added to the convolution before `post_gate` (D in the Hyena and S4 papers).
        pre_gate (`torch.Tensor` of shape `(B, H, L)`, *optional*):
            Multiplies the input; has the dtype of `u`.
        post_gate (`torch.Tensor` of shape `(B, H, L)`, *optional*):
            Multiplies the output; has the dtype of `u`.
        k_rev (`torch.Tensor` of shape `(H, K')`, *optional*):
            Anticausal filters, lag -1 first, which make the convolution bidirectional. Needs `causal=True`.
        causal (`bool`, *optional*, defaults to `True`):
            Whether positions outside of the sequence count as zero (true) or the convolution is circular (false).
        backend (`str`, *optional*, defaults to `"auto"`):
            `"torch"` computes with torch.fft on any device, `"cuda"` with this package's kernels, and `"auto"` with the
            kernels wherever they can serve the call, else with torch.fft.

    Returns:
        `torch.Tensor` of shape `(B, H, L)`: y, contiguous, of the dtype and on the device of `u`.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not supported.
        ValueError: a shape, a device, a combination of arguments or the name of the backend is wrong.
        BackendError: the backend `"cuda"` cannot serve the call; the message tells why.
    """
    if backend not in library.BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; supported: {', '.join(map(repr, library.BACKENDS))}")
    _check_tensor("u", u)
    # Read once: each access to a tensor's attributes makes an object.
    shape, device = u.shape, u.device
    if len(shape) != 3 or shape[2] == 0:
        raise ValueError(f"u must have shape (batch, channels, length) with length at least 1, got {tuple(shape)}")
    _check_filter("k", k, shape, device)
    if k_rev is not None:
        _check_filter("k_rev", k_rev, shape, device)
    if skip is not None:
        _check_tensor("skip", skip, shape[1:2], device)
    if not causal:
        _check_circular(k, k_rev, shape[2])
    if pre_gate is not None:
        _check_tensor("pre_gate", pre_gate, shape, device)
    if post_gate is not None:
        _check_tensor("post_gate", post_gate, shape, device)

    kind = device.type
    # The meta device knows no autocast, and asking is an error.
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        u, pre_gate, post_gate = _autocast(u, dtype), _autocast(pre_gate, dtype), _autocast(post_gate, dtype)
    if pre_gate is not None and pre_gate.dtype != u.dtype:
        raise TypeError(f"pre_gate must have the dtype of u, {u.dtype}, got {pre_gate.dtype}")
    if post_gate is not None and post_gate.dtype != u.dtype:
        raise TypeError(f"post_gate must have the dtype of u, {u.dtype}, got {post_gate.dtype}")
    return library.fft_conv(u, k, skip, pre_gate, post_gate, k_rev, causal, backend)


def _check_tensor(name: str, x: Any, shape: tuple[int, ...] | None = None, device: torch.device | None = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if shape is not None and x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)} to fit u, got {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, _DTYPES))}, got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on the device of u, {device}, got {x.device}")


def _check_filter(name: str, x: Any, shape: torch.Size, device: torch.device) -> None:
    _check_tensor(name, x, device=device)
    taps = x.shape
    if len(taps) != 2 or taps[0] != shape[1] or taps[1] == 0:
        raise ValueError(f"{name} must have shape ({shape[1]}, taps >= 1) to fit u, got {tuple(taps)}")


def _check_circular(k: Tensor, k_rev: Tensor | None, length: int) -> None:
    if k_rev is not None:
        raise ValueError("k_rev needs causal=True; a circular filter has its negative lags at its end")
    if k.shape[1] > length:
        raise ValueError(f"a circular filter cannot be longer than u: got {k.shape[1]} taps for length {length}")


def _autocast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or x.dtype == torch.float64 else x.to(dtype)
