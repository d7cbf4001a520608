"""Filters as the kernels want them: prepared spectra, kept as long as the filter they were made from, and gradients."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from . import extension
from .plan import Plan
from .pools import outside_of_pools

DEFAULT_STREAM = 0

# Bound on the spectra kept for each device, and the share of its memory that they may take at most.
CACHE_BYTES = 512 << 20
CACHE_SHARE = 1 / 8
# Kept spectra give way to others once so many times the bound was asked for since their last use.
_PATIENCE = 16

# Where taps of neighbouring channels, not neighbouring taps, lie together, as in filters that are generated a position
# at a time, spectra are made faster in passes from this size on, which read taps of so many channels at a time.
MIN_PASSES_FFT_SIZE, CHANNEL_GROUP = 8192, 16

# Bound on what is alive between the passes that make larger ones, unless a group of filters takes more: their points,
# and one partial sum of taps for so many of them.
WORKSPACE_BYTES = 64 << 20
SUMMED_POINTS = 16


class Spectrum(NamedTuple):
    """Filter spectra as operands of the other kernels.

    Args:
        words (`torch.Tensor` of shape `(H, points)`, int32):
            Pairs of half-precision numbers (two real parts, two imaginary parts) in kernel order, window after window.
        scale (`torch.Tensor` of shape `(H,)`, float32):
            What they were divided by; NaN, over zeros, where a filter is not finite.
    """

    words: Tensor
    scale: Tensor

    @property
    def bytes(self) -> int:
        return 4 * (self.words.numel() + self.scale.numel())


def prepare(
    k: Tensor,
    skip: Tensor | None,
    k_rev: Tensor | None,
    length: int,
    plan: Plan,
    stream: int,
) -> Spectrum:
    """The spectra of the filters of [`fft_conv`] for a plan, on the given, current stream.

    The skip connection is one more weight of the tap at lag zero.

    The kernels compute in single precision and round the result. Where one thread block cannot hold a filter they need
    memory between passes, and take a block of channels at a time, which bounds it.
    """
    channels, device = k.shape[0], k.device
    words = torch.empty((channels, plan.points), dtype=torch.int32, device=device)
    scale = torch.empty((channels,), dtype=torch.float32, device=device)
    in_passes = _takes_passes(k, plan.fft_size)
    block = channels
    if in_passes:
        work_words = 2 * plan.points + plan.points // SUMMED_POINTS
        block = max(CHANNEL_GROUP, WORKSPACE_BYTES // (4 * work_words))
        block = channels if block >= channels else block - block % CHANNEL_GROUP
    k = _taps(k, length, in_passes)
    k_rev = None if k_rev is None else _taps(k_rev, length - 1, in_passes)
    skip = None if skip is None else skip.float().contiguous()
    parameters = extension.FilterParameters()
    parameters.pass_taps(k, k_rev)
    parameters.channels, parameters.fft_size, parameters.windows = channels, plan.fft_size, plan.windows
    parameters.folded = plan.folded
    parameters.k = k.data_ptr()
    parameters.k_rev = None if k_rev is None else k_rev.data_ptr()
    parameters.skip = None if skip is None else skip.data_ptr()
    parameters.spectrum, parameters.scale = words.data_ptr(), scale.data_ptr()
    if in_passes:
        work = torch.empty((block, work_words), dtype=torch.float32, device=device)
        parameters.work, parameters.work_channels = work.data_ptr(), block
        parameters.partial_sums = work.data_ptr() + 8 * block * plan.points
    extension.launch("fft_conv_filter_spectrum", parameters, stream)
    return Spectrum(words, scale)


def spectrum_bytes(channels: int, points: int) -> int:
    """The memory of a [`Spectrum`]."""
    return 4 * channels * (points + 1)


class TapGradients:
    """The gradients (dk, dskip, dk_rev) that the kernels write for some channels at a time, laid out as the taps.

    Taps that do not matter at this length get zero.
    """

    def __init__(self, k: Tensor, skip: Tensor | None, k_rev: Tensor | None, length: int) -> None:
        self._operands, self._length = (k, skip, k_rev), length
        self._dk = _memory(k, length)
        self._dskip = None if skip is None else torch.empty_like(skip, dtype=torch.float32)
        self._dk_rev = None if k_rev is None else _memory(k_rev, length - 1)

    def pass_to(self, parameters: extension.TapParameters, channels: slice) -> None:
        dk, dk_rev = self._dk[channels, : self._length], None
        parameters.grad_k = dk.data_ptr()
        if self._dskip is not None:
            parameters.grad_skip = self._dskip[channels].data_ptr()
        if self._dk_rev is not None:
            dk_rev = self._dk_rev[channels, : self._length - 1]
            parameters.grad_k_rev = dk_rev.data_ptr()
        parameters.pass_taps(dk, dk_rev)
        parameters.in_passes = _takes_passes(dk, parameters.fft_size)

    def results(self) -> list[Any]:
        """The gradients, each in its operand's dtype."""
        pairs = zip(self._operands, (self._dk, self._dskip, self._dk_rev), strict=True)
        return [None if x is None or dx is None else dx.to(x.dtype) for x, dx in pairs]


def _takes_passes(k: Tensor, fft_size: int) -> bool:
    """Whether spectra or gradients of taps, laid out as `k`, are made in passes through global memory."""
    if fft_size < MIN_PASSES_FFT_SIZE:
        return False
    return (k.stride(0) == 1 and k.stride(1) > 1) or fft_size > _largest_in_one_block(k.device)


@cache
def _largest_in_one_block(device: torch.device) -> int:
    """The largest FFT size of a spectrum that one thread block has memory for."""
    return extension.call("fft_conv_largest_filter", device.index or 0)


def _memory(taps: Tensor, count: int) -> Tensor:
    make = torch.zeros_like if taps.shape[1] > count else torch.empty_like
    return make(taps, dtype=torch.float32)


def _taps(k: Tensor, count: int, in_place: bool) -> Tensor:
    """The taps that matter, in float32: neighbours in memory, or where they lie if `in_place`."""
    if k.shape[1] > count:
        k = k[:, :count]
    if k.dtype != torch.float32:
        k = k.float()
    return k if k.stride(1) == 1 or (in_place and k.stride(0) == 1) else k.contiguous()


@dataclass
class _Entry:
    spectrum: Spectrum
    stamp: tuple[Hashable, ...]
    # Of the tensors and, so that no other storage takes over their identity, of their storages.
    references: list[Any]
    # What had been asked for, in bytes, when it was used last; and its own bytes.
    used: int
    bytes: int


class SpectrumCache:
    """Bounded store of prepared spectra for filters that are not trained.

    An entry serves as long as its filter's tensors are the same objects in the same memory at the same version, and is
    dropped when one of them dies. Tensors that require a gradient are not served: optimizers, averages of weights and
    sharding write parameters in ways that leave no trace. Each stream has entries of its own, so that a spectrum is
    complete before it is read.

    When the bound is reached, further spectra are not kept, and those that are kept stay until they have not been used
    for long. So a model whose filters need more than the bound finds a part of them in every pass, where throwing out
    what was unused for longest would find none.

    Args:
        max_bytes (`int`, *optional*): Bound on the memory of the entries of one device; by default 512 MiB, on
            small devices an eighth of their memory.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[tuple[Hashable, ...], _Entry] = OrderedDict()
        self._asked_for = 0
        # Re-entrant, as the garbage collector may drop a filter, and so an entry, at any point.
        self._lock = threading.RLock()

    def get(
        self,
        k: Tensor,
        skip: Tensor | None,
        k_rev: Tensor | None,
        length: int,
        plan: Plan,
        stream: int,
    ) -> Spectrum:
        """[`prepare`], or what it returned on this stream as long as the filters have not changed since."""
        reverse_taps = 0 if k_rev is None else min(k_rev.shape[1], length - 1)
        key = (id(k), id(skip), id(k_rev), min(k.shape[1], length), reverse_taps, plan, stream)
        stamp = _stamp(k), skip is not None and _stamp(skip), k_rev is not None and _stamp(k_rev)
        with self._lock:
            entry = self._entries.get(key)
            self._asked_for += spectrum_bytes(k.shape[0], plan.points) if entry is None else entry.bytes
            if entry is not None and entry.stamp == stamp:
                entry.used = self._asked_for
                self._entries.move_to_end(key)
                return entry.spectrum
        self._drop(key)
        tensors = [x for x in (k, skip, k_rev) if x is not None]
        if not all(map(_is_constant, tensors)):
            return prepare(k, skip, k_rev, length, plan, stream)
        make = partial(prepare, k, skip, k_rev, length, plan, stream)
        # Compiled functions warm their CUDA graphs up on another stream, and allocate in a pool of the graph.
        spectrum = make() if stream == DEFAULT_STREAM else outside_of_pools(make, k.device)
        references = [weakref.ref(x, lambda _: self._drop(key)) for x in tensors]
        references += [StorageWeakRef(x.untyped_storage()) for x in tensors]
        with self._lock:
            in_the_way = self._in_the_way(spectrum.bytes, k.device)
            if in_the_way is not None:
                for old in in_the_way:
                    self._drop(old)
                self._entries[key] = _Entry(spectrum, stamp, references, self._asked_for, spectrum.bytes)
        return spectrum

    def keeps(self, k: Tensor, skip: Tensor | None, k_rev: Tensor | None, plan: Plan) -> bool:
        """Whether the spectra of these filters are kept, or would be."""
        filters, identity = [x for x in (k, skip, k_rev) if x is not None], (id(k), id(skip), id(k_rev))
        if not all(map(_is_constant, filters)):
            return False
        with self._lock:
            kept = any(key[:3] == identity and key[5] == plan for key in self._entries)
            return kept or self._in_the_way(spectrum_bytes(k.shape[0], plan.points), k.device) is not None

    def clear(self) -> None:
        """Forgets all spectra."""
        with self._lock:
            self._entries.clear()

    def _drop(self, key: tuple[Hashable, ...]) -> None:
        with self._lock:
            self._entries.pop(key, None)

    def _in_the_way(self, size: int, device: torch.device) -> list[tuple[Hashable, ...]] | None:
        """What is to be dropped so that as many bytes can be kept; None where that is not to be."""
        bound = cache_bytes(device) if self.max_bytes is None else self.max_bytes
        entries = {key: x for key, x in self._entries.items() if x.spectrum.words.device == device}
        excess = sum(x.bytes for x in entries.values()) + size - bound
        dropped = []
        for key, entry in entries.items():
            if excess <= 0 or self._asked_for - entry.used <= _PATIENCE * bound:
                break
            dropped.append(key)
            excess -= entry.bytes
        return dropped if excess <= 0 else None


@cache
def cache_bytes(device: torch.device) -> int:
    """The bound on the spectra that are kept for a device."""
    if device.type != "cuda":
        return CACHE_BYTES
    return min(CACHE_BYTES, int(CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory))


def _stamp(x: Tensor) -> tuple[Hashable, ...]:
    # Inference tensors have no version; they are never kept.
    return x.requires_grad, None if x.is_inference() else x._version, x.data_ptr(), x.untyped_storage()._cdata


def _is_constant(x: Tensor) -> bool:
    # Subclasses may compute their values, inference tensors have no version.
    return not x.requires_grad and type(x) in (Tensor, nn.Parameter) and not x.is_inference()
