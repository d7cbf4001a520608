"""The private operators `hf_flashfftconv::fft_conv` and `fft_conv_backward`: schemas, shapes, dispatch, autograd.

Autograd is a `torch.autograd.Function` around the raw operators, which costs a third of `register_autograd` a call and
compiles with fullgraph=True. A raw operator called by itself gives no gradient: go through `fft_conv` below.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import BackendError
from . import blocks, cuda, cuda_gradients, reference
from .reference import compute_dtype

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "cuda")

_ARGUMENTS = "Tensor u, Tensor k, Tensor? skip, Tensor? pre_gate, Tensor? post_gate, Tensor? k_rev, bool causal"
# Of the gradients of these. What generates taps a position at a time also reads their gradients that way.
_SEQUENCE, _TAPS = torch.contiguous_format, torch.preserve_format
_FORMATS = _SEQUENCE, _TAPS, _SEQUENCE, _SEQUENCE, _SEQUENCE, _TAPS
# The rows of a matrix in memory start at multiples of so many elements, which is what fast matrix products need.
_ROW_ELEMENTS = 8
# Subclasses may have an implementation of their own.
_PLAIN = frozenset((Tensor, nn.Parameter))
_reasons_told: set[str] = set()


def use_kernels(u: Tensor, k: Tensor, k_rev: Tensor | None, causal: bool, backend: str, backward: bool = False) -> bool:
    """Whether the CUDA kernels serve this call or, if `backward`, its gradients.

    A fallback of "auto" is logged once for each reason.

    Raises:
        BackendError: `backend` is "cuda" and the kernels cannot serve the call; the message tells why.
    """
    return choose_backend("fft_conv", backend, u, lambda: cuda.unsupported(u, k, k_rev, causal, backward))


def choose_backend(operation: str, backend: str, x: Tensor, unsupported: Callable[[], str | None]) -> bool:
    """[`use_kernels`] for any operation on `x`, of which `unsupported` tells why the kernels cannot serve it."""
    if backend == "torch":
        return False
    reason = unsupported()
    if reason is None:
        return True
    if backend == "cuda":
        raise BackendError(f'backend "cuda" cannot serve this call: {reason}; backends "auto" and "torch" can')
    if reason not in _reasons_told:
        _reasons_told.add(reason)
        # On a CPU torch.fft is what one expects; on a GPU it is slower than what one came for.
        logger.log(logging.WARNING if x.is_cuda else logging.INFO, '%s uses backend "torch": %s', operation, reason)
    return False


def directly(operator: Any, implementation: Callable[..., Any], *tensors: Tensor | None) -> Callable[..., Any]:
    """An operator's implementation, where nobody would see the operator: its dispatch costs 4 of 35 microseconds."""
    if torch.compiler.is_compiling() or not _nobody_watches():
        return operator
    for x in tensors:
        if x is not None and not (type(x) in _PLAIN and x.is_cuda):
            return operator
    return implementation


def _nobody_watches() -> bool:
    try:
        return (
            torch._C._len_torch_dispatch_stack() == 0
            and torch._C._get_tracing_state() is None
            and torch._C._functorch.peek_interpreter_stack() is None
            and not torch._C._autograd._profiler_enabled()
        )
    except AttributeError:  # Functions without a promise.
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
    channel_major: bool = False,
) -> Tensor:
    if u.numel() == 0:
        return _output(u, channel_major)
    if use_kernels(u, k, k_rev, causal, backend):
        return cuda.forward(u, k, skip, pre_gate, post_gate, k_rev, causal, _output(u, channel_major))
    if (windows := _windows(u, k, k_rev, causal)) is not None:
        return blocks.forward(windows, u, k, skip, pre_gate, post_gate, k_rev, _output(u, channel_major))
    # The output last: the transforms take most memory.
    x = reference.convolve(u, k, skip, pre_gate, k_rev, causal)
    return reference.store_gated(_output(u, channel_major), x, post_gate)


def _output(u: Tensor, channel_major: bool) -> Tensor:
    """Memory for the result."""
    if not channel_major:
        return torch.empty_like(u, memory_format=torch.contiguous_format)
    batch, channels, length = u.shape
    row = (batch * length + _ROW_ELEMENTS - 1) // _ROW_ELEMENTS * _ROW_ELEMENTS
    return u.new_empty_strided((batch, channels, length), (length, row, 1))


def _windows(u: Tensor, k: Tensor, k_rev: Tensor | None, causal: bool) -> blocks.Blocks | None:
    return blocks.choose(u.shape[2], k.shape[1], 0 if k_rev is None else k_rev.shape[1], causal)


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
    gradients: Sequence[Tensor | None]
    if u.numel() == 0:
        gradients = [
            None if x is None else torch.zeros_like(x, memory_format=y) for x, y in zip(inputs, _FORMATS, strict=True)
        ]
    elif use_kernels(u, k, k_rev, causal, backend, backward=True):
        gradients = cuda_gradients.backward(dy, *inputs, causal, needs)
    elif (windows := _windows(u, k, k_rev, causal)) is not None:
        gradients = blocks.backward(windows, dy, *inputs, needs)
    else:
        gradients = reference.backward(dy, *inputs, causal, needs)
    return [gradient for gradient, need in zip(gradients, needs, strict=True) if need and gradient is not None]


def _fake_forward(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    k_rev: Tensor | None,
    causal: bool,
    backend: str,
    channel_major: bool = False,
) -> Tensor:
    return _output(u, channel_major)


def _fake_backward(dy: Tensor, *arguments: Any) -> list[Tensor]:
    *inputs, _causal, _backend, needs = arguments
    wanted = zip(inputs, _FORMATS, needs, strict=True)
    return [torch.empty_like(x, memory_format=memory_format) for x, memory_format, need in wanted if need]


# Builds for the kernel Hub live beside the package, under names of their own.
NAMESPACE = __name__.partition(".")[0]
_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(f"fft_conv({_ARGUMENTS}, str backend, bool channel_major=False) -> Tensor")
_library.define(f"fft_conv_backward(Tensor dy, {_ARGUMENTS}, str backend, bool[] needs) -> Tensor[]")
_library.impl("fft_conv", _forward, "CompositeExplicitAutograd")
_library.impl("fft_conv_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::fft_conv", _fake_forward, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::fft_conv_backward", _fake_backward, lib=_library)

_operators = getattr(torch.ops, NAMESPACE)
_fft_conv = _operators.fft_conv.default
_fft_conv_backward = _operators.fft_conv_backward.default


class _FFTConv(torch.autograd.Function):
    """Saves nothing but its inputs: the backward pass transforms them again. See also `_keeps_ungated`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.causal, ctx.backend, _channel_major = arguments
        ctx.save_for_backward(*tensors)
        return directly(_fft_conv, _forward, *tensors)(*arguments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs, tensors = list(ctx.needs_input_grad[:6]), (dy, *ctx.saved_tensors)
        # Gradients are recorded only where second ones are asked for.
        recorded = torch.is_grad_enabled()
        compute = _FFTConvBackward.apply if recorded else directly(_fft_conv_backward, _backward, *tensors)
        gradients = iter(compute(*tensors, ctx.causal, ctx.backend, needs))
        return *(next(gradients) if need else None for need in needs), None, None, None


class _FFTConvBackward(torch.autograd.Function):
    """A function of its own to refuse second derivatives: `once_differentiable` misses those where dy is constant."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_fft_conv_backward(*arguments))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError("fft_conv has no second derivative: its gradients cannot be differentiated again")


def fft_conv(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    k_rev: Tensor | None,
    causal: bool,
    backend: str,
    channel_major: bool = False,
) -> Tensor:
    """The differentiable operator; its arguments have been checked by `hf_flashfftconv.functional.fft_conv`."""
    # The autograd machinery costs as much as the rest of the call: without gradients, go straight to the operator.
    if torch.is_grad_enabled() and _is_differentiated(u, k, skip, pre_gate, post_gate, k_rev):
        if post_gate is not None and _keeps_ungated(u, k, k_rev, causal, backend):
            return _FFTConv.apply(u, k, skip, pre_gate, None, k_rev, causal, backend, channel_major) * post_gate
        return _FFTConv.apply(u, k, skip, pre_gate, post_gate, k_rev, causal, backend, channel_major)
    call = directly(_fft_conv, _forward, u, k, skip, pre_gate, post_gate, k_rev)
    return call(u, k, skip, pre_gate, post_gate, k_rev, causal, backend, channel_major)


def _keeps_ungated(u: Tensor, k: Tensor, k_rev: Tensor | None, causal: bool, backend: str) -> bool:
    """Whether the output before its gate is kept for the gate's gradient, for which torch.fft would compute it again.

    Not where it would be rounded once more, nor where memory is to be bounded, in blocks of a sequence.
    """
    if torch.compiler.is_compiling() or u.dtype != compute_dtype(u.dtype) or u.numel() == 0:
        return False
    return not use_kernels(u, k, k_rev, causal, backend) and _windows(u, k, k_rev, causal) is None


def _is_differentiated(*tensors: Tensor | None) -> bool:
    # Forward-mode differentiation leaves no mark on the tensors that is cheap to find.
    return forward_ad._current_level >= 0 or any(x is not None and x.requires_grad for x in tensors)
