"""This package and its rivals, each as a function of the operands of [`fft_conv`]."""

import ctypes
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..functional import fft_conv
from .problem import Problem

Forward = Callable[..., Tensor]

CUDNN_VARIABLE = "HF_FLASHFFTCONV_CUDNN"


class Unavailable(Exception):
    """A rival is not installed, or does not serve a problem."""


def package(problem: Problem) -> Forward:
    """The kernels of this package, asked for by name so that nothing else is measured."""
    return lambda **operands: fft_conv(**operands, backend="cuda")


def torch_fft(problem: Problem) -> Forward:
    """torch.fft in float32 at lengths without large prime factors: this package's own fallback."""
    return lambda **operands: fft_conv(**operands, backend="torch")


def flashfftconv(problem: Problem) -> Forward:
    """The published CUDA code of FlashFFTConv, where the user has built it."""
    _check_whole_filters(problem)
    try:
        from flashfftconv import FlashFFTConv
    except ImportError:
        raise Unavailable("flashfftconv is not installed") from None
    if problem.dtype == torch.float32:
        raise Unavailable("flashfftconv has no float32")
    module = FlashFFTConv(2 * problem.length, dtype=problem.dtype).cuda()
    return lambda u, k, pre_gate=None, post_gate=None: module(u, k, pregate=pre_gate, postgate=post_gate)


def cudnn(problem: Problem) -> Forward:
    """The causal FFT convolution of cuDNN 9.26 and later; the gates, which it lacks, are kernels of their own."""
    _check_whole_filters(problem)
    library = _cudnn_library()
    length = problem.length
    if length & (length - 1) or not 128 <= length <= 1 << 24:
        raise Unavailable(f"cuDNN convolves causally at powers of two from 128 to 2^24, not at {length}")
    element = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 9}[problem.dtype]
    sizes = [ctypes.c_int(x) for x in (problem.batch, problem.channels, length, length, element)]
    workspaces = _cudnn_workspaces(library, sizes) if length > 16384 else []
    name = "cudnnLongFFTCausalConv1dForward" if workspaces else "cudnnFFTCausalConv1dForward"

    def convolve(u: Tensor, k: Tensor) -> Tensor:
        y = torch.empty_like(u)
        stream = torch.cuda.current_stream().cuda_stream
        pointers = [ctypes.c_void_p(x) for x in (stream, u.data_ptr(), k.data_ptr(), y.data_ptr())]
        extra = [x for space in workspaces for x in (ctypes.c_void_p(space.data_ptr()), ctypes.c_size_t(space.numel()))]
        _check(getattr(library, name)(*pointers, *sizes, *extra))
        return y

    filters: dict[int, Tensor] = {}

    def forward(u: Tensor, k: Tensor, pre_gate: Tensor | None = None, post_gate: Tensor | None = None) -> Tensor:
        # It wants filters of the dtype of the sequences; converting them is not part of what is measured.
        if id(k) not in filters:
            filters[id(k)] = k.to(u.dtype)
        y = convolve(u if pre_gate is None else u * pre_gate, filters[id(k)])
        return y if post_gate is None else y * post_gate

    return forward


# Whether they have gradients is part of the entry.
CONTENDERS: dict[str, tuple[Callable[[Problem], Forward], bool]] = {
    "hf_flashfftconv": (package, True),
    "torch.fft": (torch_fft, True),
    "flashfftconv": (flashfftconv, True),
    "cuDNN": (cudnn, False),
}


@cache
def _cudnn_library() -> ctypes.CDLL:
    path = os.environ.get(CUDNN_VARIABLE, "libcudnn.so.9")
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise Unavailable(f"{error}; {CUDNN_VARIABLE} can name another libcudnn.so.9") from None
    library.cudnnGetVersion.restype = ctypes.c_size_t
    if not hasattr(library, "cudnnFFTCausalConv1dForward"):
        version = library.cudnnGetVersion()
        raise Unavailable(f"cuDNN {version} has no FFT convolution; {CUDNN_VARIABLE} can name a libcudnn.so.9 of 9.26")
    _check(library.cudnnSubquadraticOpsVersionCheck())
    return library


def _cudnn_workspaces(library: ctypes.CDLL, sizes: list[ctypes.c_int]) -> list[Tensor]:
    bytes_needed = [ctypes.c_size_t(), ctypes.c_size_t()]
    _check(library.cudnnLongFFTCausalConv1dGetBufferSizes(*sizes, *map(ctypes.byref, bytes_needed)))
    return [torch.empty(x.value, dtype=torch.uint8, device="cuda") for x in bytes_needed]


def _check_whole_filters(problem: Problem) -> None:
    if problem.taps < problem.length:
        raise Unavailable("measured only with filters as long as the sequences")


def _check(status: int) -> None:
    if status != 0:
        raise Unavailable(f"cuDNN returned status {status}")
