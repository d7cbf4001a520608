"""Device memory that outlives the call that asked for it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch

T = TypeVar("T")


def outside_of_pools(make: Callable[[], T], device: torch.device) -> T:
    """Runs `make` where its allocations do not go to a private memory pool, with the same current stream.

    While a compiled function with CUDA graphs warms up, and under `torch.cuda.use_mem_pool`, what the current thread
    allocates belongs to a pool that takes it back at the end. Only this thread: another one has ordinary memory.
    """
    on_cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device) if on_cuda else None

    def work() -> T:
        with torch.cuda.stream(stream) if on_cuda else nullcontext():
            return make()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(work).result()
