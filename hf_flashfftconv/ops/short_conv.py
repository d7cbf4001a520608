"""The private operators `hf_flashfftconv::short_conv` and `short_conv_backward`: short causal depthwise convolutions.

One operator has two forms. Without a gate it returns a list of one tensor, the convolution of all channels of z. With
`gate` 0, 1 or 2 the channels of z are three blocks; it returns the convolution of the block called `gate`, and the
product of those of the two others.
"""

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda, extension
from .library import NAMESPACE, choose_backend, directly
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


# All fields at once, which takes a tenth of the time of assigning them one by one.
_PARAMETERS = struct.Struct("@Pqqq Pqqq Pqq Pqq PPP iiiiiiii")


def unsupported(z: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernels cannot serve a call, or None if they can."""
    if not z.is_cuda:
        return f"z is on the device {z.device}, not on a CUDA device"
    for name, x in (("z", z), ("weight", weight), ("bias", bias)):
        if x is not None and x.dtype not in extension.ELEMENTS:
            return f"{name} is {x.dtype}, and the kernels take {', '.join(map(str, extension.ELEMENTS))}"
    if weight.shape[-1] > MAX_TAPS:
        return f"weight has {weight.shape[-1]} taps, and the kernels take up to {MAX_TAPS}"
    _, channels, length = z.shape
    if channels >= 2**31 or length >= 2**31 - 128:
        return f"z has the shape {tuple(z.shape)}, and the kernels count channels and positions in 32 bits"
    return cuda._verdict(z.device)


def _forward(z: Tensor, weight: Tensor, bias: Tensor | None, gate: int, backend: str) -> list[Tensor]:
    results = _outputs(z, gate)
    if z.numel() == 0:
        return results
    if choose_backend("short_conv", backend, z, lambda: unsupported(z, weight, bias)):
        with cuda.device_guard(z.device):
            _Call(z, weight, bias, gate, results).launch("fft_conv_short_forward")
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
    with cuda.device_guard(z.device):
        dz = torch.empty_like(z)
        call = _Call(z, weight, bias, gate, [x if x.stride(2) == 1 else x.contiguous() for x in gradients], dz)
        splits = extension.call("fft_conv_short_splits", call.parameters)
        # One sum for each part of the batch and the positions, added up in a fixed order.
        sums = z.new_empty((splits, z.shape[1], weight.shape[-1] + 1), dtype=torch.float32)
        call.parameters.grad_filter = sums.data_ptr()
        call.launch("fft_conv_short_backward")
        total = sums[0] if splits == 1 else sums.sum(0)
    dbias = None if bias is None else total[:, -1].to(bias.dtype, copy=True)
    return dz, total[:, :-1].to(weight.dtype, copy=True).view(weight.shape), dbias


class _Call:
    """The parameters of one launch on the current stream, and the tensors that they point to.

    `sequences` are the outputs or their gradients, whose positions are neighbours.
    """

    def __init__(
        self,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: int,
        sequences: Sequence[Tensor],
        grad_z: Tensor | None = None,
    ) -> None:
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        self._alive: list[Any] = [z, weight, bias, sequences]
        self.stream = cuda._current_stream(z.device)
        self.parameters = Parameters()
        batch, channels, length = z.shape
        elements = extension.ELEMENTS
        output, product = sequences[0], sequences[-1]
        _PARAMETERS.pack_into(
            self.parameters,
            0,
            *(z.data_ptr(), *z.stride()),
            *((0, 0, 0, 0) if grad_z is None else (grad_z.data_ptr(), *grad_z.stride())),
            *(output.data_ptr(), *output.stride()[:2]),
            *((0, 0, 0) if gate == NO_GATE else (product.data_ptr(), *product.stride()[:2])),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0,
            batch,
            channels if gate == NO_GATE else channels // 3,
            length,
            weight.shape[-1],
            gate,
            elements[z.dtype],
            elements[weight.dtype],
            0 if bias is None else elements[bias.dtype],
        )

    def launch(self, name: str) -> None:
        extension.launch(name, self.parameters, self.stream)


def _convolved(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    channels, _, taps = weight.shape
    # Autocast, which has chosen the dtype of z, would narrow the operands here once more.
    with torch.autocast(z.device.type, enabled=False):
        return F.conv1d(z, weight, bias, padding=taps - 1, groups=channels)[..., : z.shape[2]]


def _widened(z: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype, shape = compute_dtype(z.dtype), (weight.shape[0], 1, weight.shape[-1])
    return z.to(dtype), weight.to(dtype).reshape(shape), None if bias is None else bias.to(dtype)


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
    channels, taps = weight.shape[0], weight.shape[-1]
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
        dy, wide, wide_weight, [channels], [1], [taps - 1], [1], False, [0], channels, [True] * 3
    )
    found = zip((z, weight, bias), (dz, dweight.view(weight.shape), dbias), strict=True)
    return [None if x is None else torch.empty_like(x).copy_(dx) for x, dx in found]


def _outputs(z: Tensor, gate: int) -> list[Tensor]:
    batch, channels, length = z.shape
    channels = channels if gate == NO_GATE else channels // 3
    row = (length + _ROW_ELEMENTS - 1) // _ROW_ELEMENTS * _ROW_ELEMENTS
    shape, strides = (batch, channels, length), (channels * row, row, 1)
    return [z.new_empty_strided(shape, strides) for _ in range(1 if gate == NO_GATE else 2)]


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
        return tuple(directly(_short_conv, _forward, *tensors)(*arguments))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        # Gradients are recorded only where second ones are asked for.
        compute = _ShortConvBackward.apply if torch.is_grad_enabled() else _gradients
        found = iter(compute(*gradients, *ctx.saved_tensors, ctx.gate, ctx.backend, needs))
        return *(next(found) if need else None for need in needs), None, None


def _gradients(*arguments: Any) -> tuple[Tensor, ...]:
    *gradients, z, weight, bias, gate, backend, needs = arguments
    call = directly(_short_conv_backward, _backward, *gradients, z, weight, bias)
    return tuple(call(gradients, z, weight, bias, gate, backend, needs))


class _ShortConvBackward(torch.autograd.Function):
    """A function of its own to refuse second derivatives."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return _gradients(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError("short_conv has no second derivative: its gradients cannot be differentiated again")


def short_conv(z: Tensor, weight: Tensor, bias: Tensor | None, gate: int, backend: str) -> tuple[Tensor, ...]:
    """The differentiable operator; its arguments have been checked in `hf_flashfftconv.functional`."""
    if torch.is_grad_enabled():
        return _ShortConv.apply(z, weight, bias, gate, backend)
    return tuple(directly(_short_conv, _forward, z, weight, bias)(z, weight, bias, gate, backend))
