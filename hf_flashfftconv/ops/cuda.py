"""The `cuda` backend: which calls the kernels serve, and how a call of [`fft_conv`] becomes one launch."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import extension, filters, long_plan, plan, tables

MIN_CAPABILITY = (8, 0)
# The kernels count transforms in 32 bits, and look some tiles ahead.
MAX_TRANSFORMS = 2**31 - 2**20

# u, k, skip, pre_gate, post_gate, k_rev
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# The transform that blocks do on chip in a long one.
ON_CHIP = plan.Plan(long_plan.ROW_POINTS, False)
# Bound on the spectra of one launch for long sequences. Up to the other size they may outweigh the output: launches of
# few channels leave a device idle.
SPECTRUM_BYTES, SMALL_SPECTRUM_BYTES = 256 << 20, 64 << 20
# Bound on the transforms of inputs that are kept for gradients of taps, and sums of their products.
TRANSFORM_BYTES = 1 << 30
ALL_CHANNELS = slice(None)
_LAYOUT_FIELDS = tuple(x for x in long_plan.LongPlan._fields if not x.endswith("_bytes"))

_spectra = filters.SpectrumCache()
# Of each device that was asked for: why the library cannot run there, or None.
_verdicts: dict[int, str | None] = {}


def unsupported(u: Tensor, k: Tensor, k_rev: Tensor | None, causal: bool, backward: bool = False) -> str | None:
    """Why the kernels cannot serve a call or, if `backward`, its gradients; None if they can."""
    if not u.is_cuda:
        return f"u is on the device {u.device}, not on a CUDA device"
    dtype, device = u.dtype, u.device
    if dtype not in extension.ELEMENTS:
        return f"u is {dtype}, and the kernels take {', '.join(map(str, extension.ELEMENTS))}"
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "the kernels compute float32 with TF32 precision, which torch.backends.cuda.matmul does not allow"
    chosen = plan_of(u, k, k_rev, causal, backward)
    if isinstance(chosen, str):
        return chosen
    if (transforms := chosen.pairs(u.shape[0]) * u.shape[1]) > MAX_TRANSFORMS:
        return f"u takes {transforms} transforms, and the kernels do up to {MAX_TRANSFORMS}"
    return _verdict(device) or _lacks_memory(device, chosen, dtype, backward)


def forward(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    k_rev: Tensor | None,
    causal: bool,
    y: Tensor | None = None,
) -> Tensor:
    """[`fft_conv`] for a call that is supported, written to `y` if that is given."""
    with device_guard(u.device):
        y = torch.empty_like(u, memory_format=torch.contiguous_format) if y is None else y
        chosen = plan_of(u, k, k_rev, causal)
        operands = u, k, skip, pre_gate, post_gate, k_rev
        if chosen.on_one_block:
            _launch_forward(chosen, operands, y)
        else:
            for channels, part in channel_blocks(chosen, operands):
                _launch_forward(chosen, part, of_channels(y, channels))
    return y


def _launch_forward(chosen: plan.Plan, operands: Operands, y: Tensor | None) -> None:
    # With the call its spectra go, before the next ones are made.
    call = Call(chosen, *operands)
    call.operand("output", y)
    call.launch("forward")


class Call:
    """The parameters of one launch on the current stream, and the tensors that they point to."""

    def __init__(
        self,
        chosen: plan.Plan,
        u: Tensor,
        k: Tensor,
        skip: Tensor | None,
        pre_gate: Tensor | None,
        post_gate: Tensor | None,
        k_rev: Tensor | None,
    ) -> None:
        self.u, self.plan, device = u, chosen, u.device
        batch, channels, length = u.shape
        self.stream = _current_stream(device)
        # A graph outlives the cache's entries, and its replays are to see what has become of the filter. Calls on the
        # default stream cannot be captured, and it costs a microsecond to ask.
        is_captured = self.stream != filters.DEFAULT_STREAM and _is_capturing()
        spectra = filters.prepare if is_captured else _spectra.get
        spectrum = spectra(k, skip, k_rev, length, chosen, self.stream)
        constants = tables.device_tables(*_tables_key(ON_CHIP if chosen.is_long else chosen), device)
        self.parameters = parameters = extension.Parameters()
        parameters.set_constants(constants.data_ptr(), spectrum.words.data_ptr(), spectrum.scale.data_ptr())
        parameters.set_sizes(batch, channels, length, chosen.fft_size, extension.ELEMENTS[u.dtype], chosen.folded)
        # Memory that is given back before the launch may be given to another stream.
        self._alive: list[Any] = [spectrum, constants]
        self.operand("u", u)
        if pre_gate is not None:
            self.operand("pre_gate", pre_gate)
        if post_gate is not None:
            self.operand("post_gate", post_gate)
        if chosen.on_one_block:
            return
        parameters.windows, parameters.cluster = chosen.windows, chosen.cluster
        if chosen.is_long:
            self._lay_out()
        elif chosen.windows:
            scratch_bytes = extension.call("fft_conv_blocked_scratch", parameters, u.device.index or 0)
            self.buffer("scratch", (scratch_bytes,), torch.uint8)

    def _lay_out(self) -> None:
        """Adds the layout of a long transform and its memory."""
        batch, channels, length = self.u.shape
        layout = long_plan.lay_out(*self.plan[:2], length, batch, channels)
        for name in _LAYOUT_FIELDS:
            setattr(self.parameters, name, getattr(layout, name))
        self.buffer("energies", (layout.energy_bytes,), torch.uint8)
        self.counters = self.buffer("counters", (layout.counter_bytes,), torch.uint8)
        try:
            self.buffer("scratch", (layout.scratch_bytes,), torch.uint8)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"a convolution by FFTs of {self.plan.fft_size} points needs {layout.scratch_bytes} bytes of scratch "
                f"memory beside its output, and {4 * self.plan.fft_size} for a single transform: {error}"
            ) from error

    def operand(self, name: str, x: Tensor | None) -> None:
        """Passes a tensor (B, H, L) of any strides, or none; the kernels want only its positions to be neighbours."""
        if x is None:
            return self.parameters.set_tensor(name, 0, 0, 0)
        batch_stride, channel_stride, stride = x.stride()
        if stride != 1 and x.shape[2] > 1:
            x = x.contiguous()
            batch_stride, channel_stride, _ = x.stride()
            self._alive.append(x)
        self.parameters.set_tensor(name, x.data_ptr(), batch_stride, channel_stride)

    def result(self, name: str) -> Tensor:
        """Adds an output of the shape and dtype of u."""
        x = torch.empty_like(self.u, memory_format=torch.contiguous_format)
        self.operand(name, x)
        return x

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Adds memory of another kind."""
        x = self.memory(shape, dtype)
        setattr(self.parameters, name, x.data_ptr())
        return x

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that is there as long as the call."""
        x = torch.empty(shape, dtype=dtype, device=self.u.device)
        self._alive.append(x)
        return x

    def launch(self, name: str) -> None:
        kind = ""
        if self.plan.is_long:
            kind = "long_"
            self.counters.zero_()
        extension.launch(f"fft_conv_{kind}{name}", self.parameters, self.stream)


def _tables_key(chosen: plan.Plan) -> tuple[int, bool, int]:
    return chosen.fft_size, chosen.folded, max(1, chosen.cluster)


def plan_of(u: Tensor, k: Tensor, k_rev: Tensor | None, causal: bool, backward: bool = False) -> Any:
    """The transform of a call or, if `backward`, of its gradients."""
    # Arguments by name take a cache longer to look up.
    lengths = u.shape[2], k.shape[1], 0 if k_rev is None else k_rev.shape[1], causal, backward
    chosen: Any = plan.choose(*lengths)
    if isinstance(chosen, str) or isinstance(extension.load(), str):
        return chosen
    if chosen.cluster and not _clusters(u.device, chosen, u.dtype):
        chosen = plan.choose(*lengths, in_clusters=False)
    if chosen.windows and u.is_cuda and _lacks_memory(u.device, chosen, u.dtype, False):
        # The kernels for long sequences need less shared memory.
        chosen = plan.choose(*lengths, in_blocks=False, in_clusters=False)
    return chosen


def channel_blocks(chosen: plan.Plan, operands: Operands, backward: bool = False) -> Iterator[tuple[slice, Operands]]:
    """The channels that one launch serves, and the operands with these channels alone.

    The spectra of long filters outweigh everything else where the batch is small. So they are made for some channels at
    a time, unless all of them are small or no larger than the output, or will be kept.
    """
    u, k, skip, pre_gate, post_gate, k_rev = operands
    count = most = u.shape[1]
    pairs = chosen.pairs(u.shape[0])
    if not chosen.on_one_block and not _spectra.keeps(k, skip, k_rev, chosen):
        output_bytes = u.numel() * u.element_size()
        most = min(SPECTRUM_BYTES, max(SMALL_SPECTRUM_BYTES, output_bytes)) // (4 * chosen.points)
    if not chosen.on_one_block and backward:
        kept = 0 if chosen.has_backward else pairs * chosen.blocks(u.shape[2])
        channel_bytes = 4 * chosen.fft_size * 2 * (kept + max(1, chosen.windows))
        most = min(most, TRANSFORM_BYTES // channel_bytes)
    workers = _clusters(u.device, chosen, u.dtype) if chosen.cluster else 1
    block = plan.channel_block(count, most, pairs, max(1, workers))
    if block == count:
        yield ALL_CHANNELS, operands
        return
    for start in range(0, count, block):
        part = slice(start, start + block)
        skip_part, rev_part = (None if x is None else x[part] for x in (skip, k_rev))
        pre_part, post_part = (of_channels(x, part) for x in (pre_gate, post_gate))
        yield part, (u[:, part], k[part], skip_part, pre_part, post_part, rev_part)


def of_channels(x: Tensor | None, channels: slice) -> Tensor | None:
    """The part of a tensor (B, H, L) that has these channels."""
    return x if x is None or channels == ALL_CHANNELS else x[:, channels]


def _verdict(device: torch.device) -> str | None:
    """Why the library cannot run on a device, or None. The first time, outside of a graph capture, it is tried out."""
    index = device.index
    if index in _verdicts:
        return _verdicts[index]
    if isinstance(library := extension.load(), str):
        verdict: str | None = library
    elif (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        needed = "{}.{}".format(*MIN_CAPABILITY)
        verdict = "the device has compute capability {}.{}, and the kernels need {}".format(*capability, needed)
    elif _is_capturing():
        return None
    else:
        verdict = _try_out(device)
    _verdicts[index] = verdict
    return verdict


@lru_cache(maxsize=1024)
def _clusters(device: torch.device, chosen: plan.Plan, dtype: torch.dtype) -> int:
    """Clusters that the device runs at a time, if any."""
    parameters = extension.Parameters(element=extension.ELEMENTS[dtype], windows=chosen.windows, cluster=chosen.cluster)
    with device_guard(device):
        return extension.call("fft_conv_clusters", parameters)


@lru_cache(maxsize=1024)
def _lacks_memory(device: torch.device, chosen: plan.Plan, dtype: torch.dtype, backward: bool) -> str | None:
    """Why a kernel does not fit the device, or None. Only the shared memory of GPUs for data centres holds all."""
    parameters = extension.Parameters(element=extension.ELEMENTS[dtype])
    parameters.fft_size, parameters.folded, parameters.windows, parameters.cluster = chosen
    if chosen.is_long:
        parameters.outer_radix = long_plan.outer_radix(*chosen[:2])
    # Gradients of all others take the forward kernel.
    needed = extension.call("fft_conv_shared_bytes", parameters, backward and chosen.on_one_block)
    available = extension.call("fft_conv_shared_limit", device.index)
    if needed <= available:
        return None
    what = f"the {'backward' if backward else 'forward'} kernel for an FFT of {chosen.fft_size} points"
    return f"{what} needs {needed} bytes of shared memory, and the device has {available}"


def _try_out(device: torch.device) -> str | None:
    u = torch.zeros(1, 1, 1, dtype=torch.float16, device=device)
    try:
        forward(u, u[0], None, None, None, None, True)
    except extension.MisfitError as error:
        return str(error)
    return None


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def _current_stream(device: torch.device) -> int:
    return _raw_stream(device.index)


def _stream_object(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# The number without the object that wraps it, where torch has a function for that, as it has for its own compiler.
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_object)


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()
