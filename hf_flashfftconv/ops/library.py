"""The private operators `hf_flashfftconv::fft_conv` and `fft_conv_backward`: schemas, shapes, dispatch, autograd.

Autograd is a `torch.autograd.Function` around the raw operators, which costs a third of `register_autograd` a call and
compiles with fullgraph=True. A raw operator called directly gives no gradient: call [`fft_conv`].
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..errors import BackendError
from . import reference

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "cuda")

_ARGUMENTS = "Tensor u, Tensor k, Tensor? skip, Tensor? pre_gate, Tensor? post_gate, Tensor? k_rev"
_library = torch.library.Library("hf_flashfftconv", "DEF")
_library.define(f"fft_conv({_ARGUMENTS}, bool causal, str backend) -> Tensor")
_library.define(f"fft_conv_backward(Tensor dy, {_ARGUMENTS}, bool causal, str backend, bool[] needs) -> Tensor[]")
_told: set[str] = set()


def use_kernels(u: Tensor, k: Tensor, k_rev: Tensor | None, causal: bool, backend: str) -> bool:
    """Whether the CUDA kernels serve this call.

    Raises:
        BackendError: `backend` is "cuda" and the kernels cannot serve the call; the message tells why.
    """
    if backend == "torch":
        return False
    from . import cuda

    reason = cuda.unsupported(u, k, k_rev, causal)
    if reason is None:
        return True
    if backend == "cuda":
        raise BackendError(f'backend "cuda" cannot serve this call: {reason}')
    if reason not in _told:
        _told.add(reason)
        level = logging.WARNING if u.is_cuda else logging.INFO
        logger.log(level, 'fft_conv uses backend "torch" (torch.fft): %s', reason)
    return False


def _forward(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    k_rev: Tensor | None,
    causal: bool,
    backend: str,
) -> Tensor:
    if u.numel() == 0:
        return torch.empty_like(u, memory_format=torch.contiguous_format)
    if use_kernels(u, k, k_rev, causal, backend):
        from . import cuda

        return cuda.forward(u, k, skip, pre_gate, post_gate, k_rev, causal)
    return reference.forward(u, k, skip, pre_gate, post_gate, k_rev, causal)


def _backward(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    k_rev: Tensor | None,
    causal: bool,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs = (u, k, skip, pre_gate, post_gate, k_rev)
    grads: Sequence[Tensor | None]
    if u.numel() == 0:
        grads = [None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
    elif use_kernels(u, k, k_rev, causal, backend):
        from . import cuda

        grads = cuda.backward(dy, *inputs, causal)
    else:
        grads = reference.backward(dy, *inputs, causal, needs)
    return [grad for grad, need in zip(grads, needs, strict=True) if need and grad is not None]


def _fake_forward(u: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def _fake_backward(dy: Tensor, *arguments: Any) -> list[Tensor]:
    *inputs, _causal, _backend, needs = arguments
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted]


_library.impl("fft_conv", _forward, "CompositeExplicitAutograd")
_library.impl("fft_conv_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("hf_flashfftconv::fft_conv", _fake_forward, lib=_library)
torch.library.register_fake("hf_flashfftconv::fft_conv_backward", _fake_backward, lib=_library)

_fft_conv = torch.ops.hf_flashfftconv.fft_conv.default
_fft_conv_backward = torch.ops.hf_flashfftconv.fft_conv_backward.default


class FFTConvFunction(torch.autograd.Function):
    """`fft_conv` with gradients of all tensors; saves nothing but its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        k: Tensor,
        skip: Tensor | None,
        pre_gate: Tensor | None,
        post_gate: Tensor | None,
        k_rev: Tensor | None,
        causal: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(u, k, skip, pre_gate, post_gate, k_rev)
        ctx.causal, ctx.backend = causal, backend
        return _fft_conv(u, k, skip, pre_gate, post_gate, k_rev, causal, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:6])
        grads = iter(_fft_conv_backward(dy, *ctx.saved_tensors, ctx.causal, ctx.backend, needs))
        return *(next(grads) if need else None for need in needs), None, None
