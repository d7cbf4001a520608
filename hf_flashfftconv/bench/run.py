"""The run: every contender on every length, forward and forward with backward."""

import gc
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .contenders import CONTENDERS, Forward, Unavailable
from .problem import Problem
from .report import Report, Result
from .timing import Stopwatch, copy_bandwidth, device_memory, host_seconds, peak_extra_bytes

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
LONG_LENGTHS = (65536, 131072, 262144, 524288, 1048576, 2097152, 4194304)
QUICK_LENGTHS = (1024, 8192)


def bench(
    lengths: Sequence[int] | None = None,
    *,
    batch: int = 64,
    channels: int = 768,
    dtype: torch.dtype = torch.bfloat16,
    gated: bool = True,
    filter_length: int | None = None,
    long: bool = False,
    quick: bool = False,
) -> Report:
    """Measures this package and all rivals that are installed on the current GPU.

    The forward pass is that of inference: no gradients, and filters that stay the same from call to call.

    Args:
        lengths (`Sequence[int]`, *optional*): Lengths of the sequences; by default 256 to 32768.
        batch (`int`, *optional*, defaults to 64): Sequences of a channel.
        channels (`int`, *optional*, defaults to 768): Channels, each with its own filter. Where the memory does not
            suffice, a contender is measured with fewer sequences, and time and memory are scaled up by their number;
            the table says so.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Of the sequences.
        gated (`bool`, *optional*, defaults to `True`): Whether to multiply input and output by gates.
        filter_length (`int`, *optional*): Longest filters; by default they are as long as the sequences.
        long (`bool`, *optional*, defaults to `False`): Measure lengths from 65536 to 4194304, unless given.
        quick (`bool`, *optional*, defaults to `False`): Measure two lengths only, and shorter.

    Returns:
        `Report`: Prints as a table; saves itself as JSON and as a plot.

    Raises:
        ValueError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ValueError("the benchmark needs a CUDA device, and torch finds none")
    stopwatch = Stopwatch(0.05, (3, 20)) if quick else Stopwatch()
    bandwidth = copy_bandwidth(stopwatch)
    lengths = lengths or (LONG_LENGTHS if long else QUICK_LENGTHS if quick else LENGTHS)
    results: list[Result] = []
    progress = tqdm([(length, name) for length in lengths for name in CONTENDERS], leave=False)
    for length, name in progress:
        progress.set_description(f"{name} at {length}")
        problem = Problem(batch, channels, length, dtype, gated, filter_length)
        for backward in (False, True):
            results.append(_measure(name, problem, backward, stopwatch, bandwidth))
    results.sort(key=lambda result: (result.backward, result.length))
    common = {"batch": batch, "channels": channels, "dtype": str(dtype).removeprefix("torch."), "gated": gated}
    if filter_length is not None:
        common["filter_length"] = filter_length
    return Report(_environment(bandwidth), common, results)


def _measure(name: str, problem: Problem, backward: bool, stopwatch: Stopwatch, bandwidth: float) -> Result:
    make, has_gradients = CONTENDERS[name]
    result = Result(name, problem.length, backward, problem.floor_bytes(backward) / bandwidth * 1e3)
    if backward and not has_gradients:
        return replace(result, note="forward only")
    measured: Problem | None = problem
    while measured is not None:
        # What must be there at the same time is known beforehand; what a contender takes beyond it is not.
        if measured.floor_bytes(backward) > device_memory() // 2:
            measured = measured.smaller()
            continue
        try:
            seconds, extra_bytes, error = _numbers(make(measured), measured, backward, stopwatch)
            break
        except torch.OutOfMemoryError:
            measured = measured.smaller()
        except (Unavailable, RuntimeError, ValueError, AssertionError, NotImplementedError) as reason:
            # Rivals refuse what they cannot do in their own ways; the first line says enough.
            return replace(result, note=str(reason).partition("\n")[0][:80])
        finally:
            gc.collect()
            torch.cuda.empty_cache()
    if measured is None:
        return replace(result, note="out of memory")
    scale = problem.sequences / measured.sequences
    note = "" if scale == 1 else f"measured with {measured.batch} x {measured.channels} sequences"
    return replace(result, ms=seconds * scale * 1e3, extra_bytes=int(extra_bytes * scale), error=error, note=note)


def _numbers(forward: Forward, problem: Problem, backward: bool, stopwatch: Stopwatch) -> tuple[float, int, float]:
    operands = problem.operands()
    if not backward:
        with torch.no_grad():
            error = problem.error(forward(**operands), operands)
            extra_bytes = peak_extra_bytes(lambda: forward(**operands))
            return stopwatch.seconds(lambda: forward(**operands)), extra_bytes, error
    leaves = [x.requires_grad_() for x in operands.values()]
    dy = torch.randn_like(operands["u"])

    def step() -> Any:
        return torch.autograd.grad(forward(**operands), leaves, dy)

    error = problem.gradient_error(step()[0], dy, operands)
    return stopwatch.seconds(step), peak_extra_bytes(step), error


def _environment(bandwidth: float) -> dict[str, Any]:
    from .. import __version__

    small = Problem(2, 16, 128, torch.bfloat16, True)
    host = {name: _host_microseconds(name, small) for name in ("hf_flashfftconv", "torch.fft")}
    facts = {
        "device": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "CUDA": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hf_flashfftconv": __version__,
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "command": " ".join(sys.argv),
        "copy bandwidth, TB/s": round(bandwidth / 1e12, 3),
        "host time of a forward call, us": ", ".join(f"{name} {us}" for name, us in host.items()),
    }
    return {name: value for name, value in facts.items() if value}


def _host_microseconds(name: str, problem: Problem) -> str:
    operands = problem.operands()
    try:
        forward: Callable[..., Any] = CONTENDERS[name][0](problem)
        with torch.no_grad():
            return f"{host_seconds(lambda: forward(**operands)) * 1e6:.1f}"
    except RuntimeError as reason:
        return f"- ({reason})"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
