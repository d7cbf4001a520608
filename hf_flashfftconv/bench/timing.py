"""Times and memory of work on the current GPU."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# Larger than the L2 cache of any GPU, so that every repetition starts with a cold one, and written so many times that
# the GPU is busy with it for longer than the host with the work to be timed: a millisecond on an H100.
_FLUSH_BYTES = 1 << 30
_FLUSHES = 3
_COPY_BYTES = 1 << 30


class Stopwatch:
    """Medians of CUDA-event timings, each repetition with a cold cache.

    Args:
        budget (`float`): Seconds of GPU time to spend on one measurement.
        repetitions (`int`): At least and at most so many times are taken.
    """

    def __init__(self, budget: float = 0.2, repetitions: tuple[int, int] = (5, 100)) -> None:
        self.budget = budget
        self.repetitions = repetitions
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def seconds(self, work: Callable[[], Any]) -> float:
        """Median time of `work` after it has run twice to warm up."""
        work()
        estimate = self._once(work)
        least, most = self.repetitions
        count = min(max(int(self.budget / max(estimate, 1e-6)), least), most)
        return statistics.median(self._once(work) for _ in range(count))

    def _once(self, work: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # While this runs, the host comes to the end of launching the work: its own time is not measured.
        for _ in range(_FLUSHES):
            self._flush.zero_()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def copy_bandwidth(stopwatch: Stopwatch) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(_COPY_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / stopwatch.seconds(lambda: target.copy_(source))


def device_memory() -> int:
    """Bytes of memory of the current GPU."""
    return torch.cuda.mem_get_info()[1]


def peak_extra_bytes(work: Callable[[], Any]) -> int:
    """Device memory that `work` takes at its peak beyond what is there before, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def host_seconds(work: Callable[[], Any], repetitions: int = 1000) -> float:
    """Time of the host for one call of `work`, which must be too small to keep the GPU busy."""
    for _ in range(10):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repetitions):
        work()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / repetitions
