"""The shared library of the CUDA kernels, loaded at its first use by its C interface, csrc/fft_conv.h."""

import ctypes
import struct
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BackendError

PATH = Path(__file__).parent.parent / "lib" / "libhf_flashfftconv.so"
VERSION = 16

ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

# CUDA errors that say that this library cannot run on this machine. They leave nothing behind and hold for every call.
_MISFITS = {
    35: "the driver is older than the CUDA runtime of the library",
    36: "the driver is older than the CUDA runtime of the library",
    98: "the library was not built for this GPU",
    209: "the library was not built for this GPU",
    222: "the driver is older than the library's PTX code",
}


class TensorArgument(ctypes.Structure):
    """`fft_conv_tensor`."""

    _fields_ = (("data", ctypes.c_void_p), ("batch_stride", ctypes.c_int64), ("channel_stride", ctypes.c_int64))


class Parameters(ctypes.Structure):
    """`fft_conv_params`."""

    _fields_ = (
        ("u", TensorArgument),
        ("pre_gate", TensorArgument),
        ("post_gate", TensorArgument),
        ("grad_output", TensorArgument),
        ("output", TensorArgument),
        ("grad_u", TensorArgument),
        ("grad_pre_gate", TensorArgument),
        ("grad_post_gate", TensorArgument),
        ("second_gate", TensorArgument),
        ("second_output", TensorArgument),
        ("tables", ctypes.c_void_p),
        ("spectrum", ctypes.c_void_p),
        ("spectrum_scale", ctypes.c_void_p),
        ("grad_filter", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("energies", ctypes.c_void_p),
        ("batch", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("length", ctypes.c_int32),
        ("fft_size", ctypes.c_int32),
        ("element", ctypes.c_int32),
        ("folded", ctypes.c_int32),
        ("outer_radix", ctypes.c_int32),
        ("group_pairs", ctypes.c_int32),
        ("ring", ctypes.c_int32),
        ("part_count", ctypes.c_int32),
        ("column_items", ctypes.c_int32),
        ("period", ctypes.c_int32),
        ("tickets", ctypes.c_int32),
        ("outer_delay", ctypes.c_int32),
        ("row_delay", ctypes.c_int32),
        ("inverse_delay", ctypes.c_int32),
        ("windows", ctypes.c_int32),
        ("reverse", ctypes.c_int32),
        ("cluster", ctypes.c_int32),
        ("transforms", ctypes.c_void_p),
        ("pair_scales", ctypes.c_void_p),
    )

    # Several fields at once, in a third of the time that assigning them takes.

    def set_tensor(self, name: str, data: int, batch_stride: int, channel_stride: int) -> None:
        """Assigns to a [`TensorArgument`]."""
        _TENSOR.pack_into(self, _OFFSETS[name], data, batch_stride, channel_stride)

    def set_constants(self, tables: int, spectrum: int, spectrum_scale: int) -> None:
        """Assigns to the fields of these names."""
        _CONSTANTS.pack_into(self, _OFFSETS["tables"], tables, spectrum, spectrum_scale)

    def set_sizes(self, batch: int, channels: int, length: int, fft_size: int, element: int, folded: bool) -> None:
        """Assigns to the fields of these names."""
        _SIZES.pack_into(self, _OFFSETS["batch"], batch, channels, length, fft_size, element, folded)


_TENSOR, _CONSTANTS, _SIZES = struct.Struct("@Pqq"), struct.Struct("@PPP"), struct.Struct("@6i")
_OFFSETS = {name: getattr(Parameters, name).offset for name, _ in Parameters._fields_}


_TAP_STRIDES = tuple(
    (name, ctypes.c_int64) for name in ("k_stride", "k_tap_stride", "k_rev_stride", "k_rev_tap_stride")
)


class _TapView(ctypes.Structure):
    """Taps (H, K) and perhaps anticausal ones, of any strides."""

    def pass_taps(self, k: Tensor, k_rev: Tensor | None) -> None:
        (self.k_stride, self.k_tap_stride), self.taps = k.stride(), k.shape[1]
        if k_rev is not None:
            (self.k_rev_stride, self.k_rev_tap_stride), self.taps_rev = k_rev.stride(), k_rev.shape[1]


class FilterParameters(_TapView):
    """`fft_conv_filter_params`."""

    _fields_ = (
        ("k", ctypes.c_void_p),
        ("k_rev", ctypes.c_void_p),
        ("skip", ctypes.c_void_p),
        ("spectrum", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("partial_sums", ctypes.c_void_p),
        ("work", ctypes.c_void_p),
        *_TAP_STRIDES,
        ("channels", ctypes.c_int32),
        ("taps", ctypes.c_int32),
        ("taps_rev", ctypes.c_int32),
        ("fft_size", ctypes.c_int32),
        ("windows", ctypes.c_int32),
        ("work_channels", ctypes.c_int32),
        ("folded", ctypes.c_int32),
    )


class TapParameters(_TapView):
    """`fft_conv_tap_params`."""

    _fields_ = (
        ("transforms", ctypes.c_void_p),
        ("reverse_transforms", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("reverse_scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("grad_k", ctypes.c_void_p),
        ("grad_k_rev", ctypes.c_void_p),
        ("grad_skip", ctypes.c_void_p),
        *_TAP_STRIDES,
        ("factor", ctypes.c_float),
        ("channels", ctypes.c_int32),
        ("pairs", ctypes.c_int32),
        ("blocks", ctypes.c_int32),
        ("windows", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("fft_size", ctypes.c_int32),
        ("taps", ctypes.c_int32),
        ("taps_rev", ctypes.c_int32),
        ("folded", ctypes.c_int32),
        ("in_passes", ctypes.c_int32),
    )


class MisfitError(BackendError):
    """The library cannot run on this device or with this driver, whatever the call."""


@cache
def load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    if not PATH.exists():
        return "the CUDA library is not built (Python-only install)"
    try:
        library = ctypes.CDLL(str(PATH))
        version = library.fft_conv_version()
        library.fft_conv_backward_scratch.restype = library.fft_conv_blocked_scratch.restype = ctypes.c_int64
        library.fft_conv_error_string.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return f"{PATH} cannot be loaded: {error}"
    if version != VERSION:
        return f"{PATH} has version {version} of the interface, this package needs {VERSION}: build it again"
    return library


def call(name: str, *arguments: ctypes.Structure | int) -> int:
    """Calls a function of the library that answers a question.

    Raises:
        BackendError: there is no library.
    """
    library = load()
    if isinstance(library, str):
        raise BackendError(library)
    return getattr(library, name)(*(x if isinstance(x, int) else ctypes.byref(x) for x in arguments))


def launch(name: str, parameters: ctypes.Structure, stream: int) -> None:
    """Calls a function of the library that starts kernels, on a stream of the current device.

    Raises:
        MisfitError: the library does not fit the device or the driver.
        BackendError: there is no library, or CUDA reports any other error.
    """
    library = load()
    if isinstance(library, str):
        raise BackendError(library)
    code = getattr(library, name)(ctypes.byref(parameters), ctypes.c_void_p(stream))
    if code == 0:
        return
    text = library.fft_conv_error_string(code).decode()
    if code in _MISFITS:
        raise MisfitError(f"{_MISFITS[code]} ({text})")
    sizes = [field[0] for field in parameters._fields_ if field[1] is ctypes.c_int32]
    values = ", ".join(f"{field} {getattr(parameters, field)}" for field in sizes)
    raise BackendError(f"{name} failed: {text} (error {code}; {values})")
