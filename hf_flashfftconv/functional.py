"""The operations: `fft_conv`, a long convolution with its gates and its skip term, and the short one in front of it."""

from typing import Any

import torch
from torch import Tensor

from .ops import library
from .ops import short_conv as short

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
    channel_major: bool = False,
) -> Tensor:
    """Convolve each channel of a batch of sequences with that channel's own long filter.

    For every batch row b, channel h and position t, with g = pre_gate * u and all sums over s >= 0,

        y[b,h,t] = post_gate[b,h,t] * ( sum k[h,s] g[b,h,t-s] + sum k_rev[h,s] g[b,h,t+1+s] + skip[h] g[b,h,t] )

    where g is zero outside of 0..L-1, or periodic with period L if `causal` is false. A gate that is left out counts as
    one, a term that is left out as zero. All tensors have gradients; second derivatives raise a `RuntimeError`.

    Where filters are short against the sequence, torch.fft goes through it in overlapping blocks (overlap-save), and
    the kernels, forward, in blocks of 8,192 positions: work a position and memory are then those of transforms of a few
    K points, however long the sequence is.

    The backward pass needs nothing but the inputs, which it transforms again; where torch.fft serves a whole sequence
    in float32 or float64, the output before `post_gate` is kept as well.

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
        channel_major (`bool`, *optional*, defaults to `False`):
            Whether y lies in memory as `(H, B, L)`, so that all its positions are one matrix: a linear layer of
            `y.mT.flatten(0, 1)` reads it in place, where a contiguous y would be transposed first.

    Returns:
        `torch.Tensor` of shape `(B, H, L)`: y, contiguous unless `channel_major`, of the dtype and on the device of
        `u`.

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
    return library.fft_conv(u, k, skip, pre_gate, post_gate, k_rev, causal, backend, channel_major)


def short_conv(z: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Convolve each channel causally with a short filter of its own.

    This is `torch.nn.functional.conv1d` with as many groups as channels, padded by K - 1 and cut to L positions:

        y[b,c,t] = bias[c] + sum weight[c,K-1-s] z[b,c,t-s]     over 0 <= s < K, with z zero before position 0

    All tensors have gradients; second derivatives raise a `RuntimeError`. Sums are accumulated in float32 (float64 for
    float64 inputs). Under autocast z is cast to the autocast dtype, the filter is not.

    Args:
        z (`torch.Tensor` of shape `(B, C, L)`):
            The input: bfloat16, float16, float32 or float64, with any strides. The transposed output of a linear layer
            is read as it lies in memory, and the gradient of z has the strides of z.
        weight (`torch.Tensor` of shape `(C, K)` or `(C, 1, K)`):
            The filters as `torch.nn.Conv1d` holds them, the tap of the current position last, of any of these dtypes.
            The kernels serve up to 7 taps, `torch` any number.
        bias (`torch.Tensor` of shape `(C,)`, *optional*):
            Added to the output.
        backend (`str`, *optional*, defaults to `"auto"`):
            As in [`fft_conv`].

    Returns:
        `torch.Tensor` of shape `(B, C, L)`: y, of the dtype of z. Its positions are neighbours in memory, and each row
        starts at a multiple of 8 elements.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not supported.
        ValueError: a shape, a device or the name of the backend is wrong.
        BackendError: the backend `"cuda"` cannot serve the call; the message tells why.
    """
    (y,) = _short_conv(z, weight, bias, short.NO_GATE, backend)
    return y


def gated_short_conv(
    z: Tensor, weight: Tensor, bias: Tensor | None = None, *, gate: int = 0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Convolve three blocks of channels with [`short_conv`], and multiply two of them.

    What Hyena and Monarch Mixer do between the input projection and the long convolution (arXiv:2302.10866, section
    3.1): the results are the `post_gate` and the `u` of [`fft_conv`]. The product is rounded once.

    Args:
        z (`torch.Tensor` of shape `(B, 3 D, L)`):
            The input; see [`short_conv`].
        weight (`torch.Tensor` of shape `(3 D, K)` or `(3 D, 1, K)`):
            The filters.
        bias (`torch.Tensor` of shape `(3 D,)`, *optional*):
            Added to the convolutions.
        gate (`int`, *optional*, defaults to 0):
            Which of the three blocks is returned by itself: 0 in Hyena, 1 in M2-BERT.
        backend (`str`, *optional*, defaults to `"auto"`):
            As in [`fft_conv`].

    Returns:
        `tuple(torch.Tensor, torch.Tensor)`, both of shape `(B, D, L)`: the convolution of block `gate`, and the product
        of those of the two other blocks; both laid out as the output of [`short_conv`].

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not supported.
        ValueError: a shape, a device, `gate` or the name of the backend is wrong.
        BackendError: the backend `"cuda"` cannot serve the call; the message tells why.
    """
    if gate not in (0, 1, 2):
        raise ValueError(f"gate is the number of a block, 0, 1 or 2, got {gate!r}")
    chosen, product = _short_conv(z, weight, bias, gate, backend)
    return chosen, product


def _short_conv(z: Tensor, weight: Tensor, bias: Tensor | None, gate: int, backend: str) -> tuple[Tensor, ...]:
    if backend not in library.BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; supported: {', '.join(map(repr, library.BACKENDS))}")
    _check_tensor("z", z)
    # Read once: each access to a tensor's attributes makes an object.
    shape, device = z.shape, z.device
    if len(shape) != 3 or shape[2] == 0:
        raise ValueError(f"z must have shape (batch, channels, length) with length at least 1, got {tuple(shape)}")
    if gate != short.NO_GATE and shape[1] % 3:
        raise ValueError(f"z must have three blocks of channels, got {shape[1]} channels")
    _check_tensor("weight", weight, device=device, of="z")
    taps = weight.shape
    if len(taps) not in (2, 3) or taps[0] != shape[1] or taps[-1] == 0 or taps[1:-1].numel() != 1:
        raise ValueError(f"weight must have shape ({shape[1]}, taps >= 1) to fit z, got {tuple(taps)}")
    if bias is not None:
        _check_tensor("bias", bias, shape[1:2], device, of="z")
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        z = _autocast(z, torch.get_autocast_dtype(kind))
    return short.short_conv(z, weight, bias, gate, backend)


def _check_tensor(
    name: str, x: Any, shape: tuple[int, ...] | None = None, device: torch.device | None = None, of: str = "u"
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if shape is not None and x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)} to fit {of}, got {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, _DTYPES))}, got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on the device of {of}, {device}, got {x.device}")


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


def _autocast(x: Any, dtype: torch.dtype) -> Any:
    return x if x is None or x.dtype in (dtype, torch.float64) else x.to(dtype)
