"""Process groups of the test's own processes."""

import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def process_group(rank: int, ranks: int, port: int, timeout: timedelta | None = None) -> Iterator[None]:
    """The default process group, by gloo on one thread."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timeout)
    try:
        yield
    finally:
        gc.collect()  # data parallelism that outlives the process group may wait for it for ever
        dist.destroy_process_group()
