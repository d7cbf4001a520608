"""The private operators `hf_flashfftconv::short_conv` and `short_conv_backward`: short causal depthwise convolutions.

One operator has two forms. Without a gate it returns a list of one tensor, the convolution of all channels of z. With
`gate` 0, 1 or 2 the channels of z are three blocks; it returns the convolution of the block called `gate`, and the
product of those of the two others.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda, extension
from .library import NAMESPACE, choose_backend
from .reference import compute_dtype

MAX_TAPS = 7
NO_GATE = -1
# Rows start at multiples of so many elements, which is what wide loads of the next kernel need.
_ROW_ELEMENTS = 8


class _StridedTensor(ctypes.Structure):
    """`fft_conv_strided_tensor`."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "channel", "time")))


class Parameters(ctypes.Structure):
    """`fft_conv_short_params`."""

    _fields_ = (
        ("z", _StridedTensor),
        ("grad_z", _StridedTensor),
        ("output", extension.TensorArgument),
        ("product", extension.TensorArgument),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("grad_filter", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("batch", "channels", "length", "taps")),
        *((name, ctypes.c_int32) for name in ("gate", "element", "weight_element", "bias_element")),
    )


def unsupported(z: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernels cannot serve a call, or None if they can."""
    if not z.is_cuda:
        return f"z is on the device {z.device}, not on a CUDA device"
    for name, x in (("z", z), ("weight", weight), ("bias", bias)):
        if x is not None and x.dtype not in extension.ELEMENTS:
            return f"{name} is {x.dtype}, and the kernels take {', '.join(map(str, extension.ELEMENTS))}"
    if weight.shape[1] > MAX_TAPS:
        return f"weight has {weight.shape[1]} taps, and the kernels take up to {MAX_TAPS}"
    if z.shape[1] >= 2**31 or z.shape[2] >= 2**31 - 128:
        return f"z has the shape {tuple(z.shape)}, and the kernels count channels and positions in 32 bits"
    return cuda._verdict(z.device)


def _forward(z: Tensor, weight: Tensor, bias: Tensor | None, gate: int, backend: str) -> list[Tensor]:
    results = _outputs(z, gate)
    if z.numel() == 0:
        return results
    if choose_backend("short_conv", backend, z, lambda: unsupported(z, weight, bias)):
        with cuda._device_guard(z.device):
            call = _Call(z, weight, bias, gate)
            call.sequences(results)
            call.launch("fft_conv_short_forward")
        return results
    for result, value in zip(results, reference(z, weight, bias, gate), strict=True):
        result.copy_(value)
    return results


def _backward(
    gradients: Sequence[Tensor],
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: int,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    results: Sequence[Tensor | None]
    if z.numel() == 0:
        results = [None if x is None else torch.zeros_like(x) for x in (z, weight, bias)]
    elif choose_backend("short_conv", backend, z, lambda: unsupported(z, weight, bias)):
        results = _kernel_backward(gradients, z, weight, bias, gate)
    else:
        results = _reference_backward(gradients, z, weight, bias, gate)
    return [x for x, need in zip(results, needs, strict=True) if need and x is not None]


def _kernel_backward(
    gradients: Sequence[Tensor], z: Tensor, weight: Tensor, bias: Tensor | None, gate: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    with cuda._device_guard(z.device):
        call = _Call(z, weight, bias, gate)
        call.sequences([x if x.stride(2) == 1 else x.contiguous() for x in gradients])
        dz = torch.empty_like(z)
        call.parameters.grad_z = (dz.data_ptr(), *dz.stride())
        splits = extension.call("fft_conv_short_splits", call.parameters)
        # One sum for each part of the batch and the positions, added up in a fixed order.
        sums = z.new_empty((splits, z.shape[1], weight.shape[1] + 1), dtype=torch.float32)
        call.parameters.grad_filter = sums.data_ptr()
        call.launch("fft_conv_short_backward")
        total = sums[0] if splits == 1 else sums.sum(0)
    dbias = None if bias is None else total[:, -1].to(bias.dtype, copy=True)
    return dz, total[:, :-1].to(weight.dtype, copy=True), dbias


class _Call:
    """The parameters of one launch on the current stream, and the tensors that they point to."""

    def __init__(self, z: Tensor, weight: Tensor, bias: Tensor | None, gate: int) -> None:
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        self._alive: list[Any] = [z, weight, bias]
        self.stream = cuda._current_stream(z.device)
        self.parameters = Parameters(
            z=(z.data_ptr(), *z.stride()),
            weight=weight.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            batch=z.shape[0],
            channels=z.shape[1] if gate == NO_GATE else z.shape[1] // 3,
            length=z.shape[2],
            taps=weight.shape[1],
            gate=gate,
            element=extension.ELEMENTS[z.dtype],
            weight_element=extension.ELEMENTS[weight.dtype],
            bias_element=0 if bias is None else extension.ELEMENTS[bias.dtype],
        )

    def sequences(self, tensors: Sequence[Tensor]) -> None:
        """Passes the outputs or their gradients, whose positions are neighbours."""
        self._alive.append(tensors)
        for name, x in zip(("output", "product"), tensors, strict=False):
            setattr(self.parameters, name, (x.data_ptr(), *x.stride()[:2]))

    def launch(self, name: str) -> None:
        extension.launch(name, self.parameters, self.stream)


def _convolved(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    channels, taps = weight.shape
    # Autocast, which has chosen the dtype of z, would narrow the operands here once more.
    with torch.autocast(z.device.type, enabled=False):
        return F.conv1d(z, weight[:, None], bias, padding=taps - 1, groups=channels)[..., : z.shape[2]]


def _widened(z: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = compute_dtype(z.dtype)
    return z.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _thirds(x: Tensor, gate: int) -> tuple[Tensor, Tensor, Tensor]:
    """The block that is returned by itself, and the two others."""
    first, second, third = x.chunk(3, dim=1)
    return ((first, second, third), (second, first, third), (third, first, second))[gate]


def reference(z: Tensor, weight: Tensor, bias: Tensor | None, gate: int) -> list[Tensor]:
    """The operator in plain PyTorch, computed and returned in `compute_dtype`; differentiable."""
    y = _convolved(*_widened(z, weight, bias))
    if gate == NO_GATE:
        return [y]
    chosen, left, right = _thirds(y, gate)
    return [chosen, left * right]


def _reference_backward(
    gradients: Sequence[Tensor], z: Tensor, weight: Tensor, bias: Tensor | None, gate: int
) -> list[Tensor | None]:
    channels, taps = weight.shape
    wide, wide_weight, wide_bias = _widened(z, weight, bias)
    # Positions beyond the sequence, which the padding adds, have no gradient.
    dy = wide.new_zeros((z.shape[0], channels, z.shape[2] + taps - 1))
    inner = dy[..., : z.shape[2]]
    if gate == NO_GATE:
        inner.copy_(gradients[0])
    else:
        _, left, right = _thirds(_convolved(wide, wide_weight, wide_bias), gate)
        targets = _thirds(inner, gate)
        for target, value in zip(targets, (gradients[0], gradients[1] * right, gradients[1] * left), strict=True):
            target.copy_(value)
    dz, dweight, dbias = torch.ops.aten.convolution_backward(
        dy, wide, wide_weight[:, None], [channels], [1], [taps - 1], [1], False, [0], channels, [True] * 3
    )
    found = zip((z, weight, bias), (dz, dweight[:, 0], dbias), strict=True)
    return [None if x is None else torch.empty_like(x).copy_(dx) for x, dx in found]


def _outputs(z: Tensor, gate: int) -> list[Tensor]:
    batch, channels, length = z.shape
    if gate == NO_GATE:
        count = 1
    else:
        count, channels = 2, channels // 3
    row = (length + _ROW_ELEMENTS - 1) // _ROW_ELEMENTS * _ROW_ELEMENTS
    return [z.new_empty((batch, channels, row))[..., :length] for _ in range(count)]


def _fake_forward(z: Tensor, weight: Tensor, bias: Tensor | None, gate: int, backend: str) -> list[Tensor]:
    return _outputs(z, gate)


def _fake_backward(gradients: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    *inputs, _gate, _backend, needs = arguments
    return [torch.empty_like(x) for x, need in zip(inputs, needs, strict=True) if need]


_ARGUMENTS = "Tensor z, Tensor weight, Tensor? bias, int gate, str backend"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(f"short_conv({_ARGUMENTS}) -> Tensor[]")
_library.define(f"short_conv_backward(Tensor[] gradients, {_ARGUMENTS}, bool[] needs) -> Tensor[]")
_library.impl("short_conv", _forward, "CompositeExplicitAutograd")
_library.impl("short_conv_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::short_conv", _fake_forward, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::short_conv_backward", _fake_backward, lib=_library)

_short_conv = getattr(torch.ops, NAMESPACE).short_conv.default
_short_conv_backward = getattr(torch.ops, NAMESPACE).short_conv_backward.default


class _ShortConv(torch.autograd.Function):
    """Saves nothing but its inputs: the backward pass convolves them again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, ctx.gate, ctx.backend = arguments
        ctx.save_for_backward(*tensors)
        return tuple(_short_conv(*arguments))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        found = iter(_ShortConvBackward.apply(*gradients, *ctx.saved_tensors, ctx.gate, ctx.backend, needs))
        return *(next(found) if need else None for need in needs), None, None


class _ShortConvBackward(torch.autograd.Function):
    """A function of its own to refuse second derivatives."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *gradients, z, weight, bias, gate, backend, needs = arguments
        return tuple(_short_conv_backward(gradients, z, weight, bias, gate, backend, needs))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError("short_conv has no second derivative: its gradients cannot be differentiated again")


def short_conv(z: Tensor, weight: Tensor, bias: Tensor | None, gate: int, backend: str) -> tuple[Tensor, ...]:
    """The differentiable operator; its arguments have been checked in `hf_flashfftconv.functional`."""
    if torch.is_grad_enabled():
        return _ShortConv.apply(z, weight, bias, gate, backend)
    return tuple(_short_conv(z, weight, bias, gate, backend))
