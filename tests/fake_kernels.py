"""A kernel library that does nothing."""

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_flashfftconv.ops import cuda, extension, filters


class FakeLibrary:
    """A library whose launches return a code and are noted."""

    def __init__(self, code: int = 0, version: int = extension.VERSION) -> None:
        self.code, self.calls = code, []
        self.fft_conv_version = lambda: version
        self.fft_conv_backward_splits = lambda _: 1
        # Functions that ctypes would let one declare.
        self.fft_conv_backward_scratch = SimpleNamespace()
        self.fft_conv_error_string = lambda code: b"out of luck"
        self.fft_conv_shared_bytes = lambda parameters, backward: 60_000 + 100_000 * backward
        self.fft_conv_shared_limit = lambda device: 232_448
        self.fft_conv_largest_filter = lambda device: 16_384
        self.fft_conv_clusters = lambda parameters: 0

    def __getattr__(self, name: str) -> object:
        def launch(parameters: object, stream: ctypes.c_void_p) -> int:
            self.calls.append((name, stream.value))
            return self.code

        return launch


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeLibrary]:
    """A fake library, CPU tensors that pass for CUDA ones, and nothing remembered."""
    fake = FakeLibrary()
    path = tmp_path / "library.so"
    path.touch()
    monkeypatch.setattr(extension, "PATH", path)
    monkeypatch.setattr(extension.ctypes, "CDLL", lambda _: fake)
    monkeypatch.setattr(cuda, "_verdicts", {})
    monkeypatch.setattr(cuda, "_spectra", filters.SpectrumCache())
    monkeypatch.setattr(cuda, "device_guard", lambda _: nullcontext())
    monkeypatch.setattr(cuda, "_current_stream", lambda _: 77)
    monkeypatch.setattr(cuda, "_is_capturing", lambda: False)
    extension.load.cache_clear()
    cuda._lacks_memory.cache_clear()
    cuda._clusters.cache_clear()
    filters._largest_in_one_block.cache_clear()
    yield fake
    extension.load.cache_clear()
    cuda._lacks_memory.cache_clear()
    cuda._clusters.cache_clear()
    filters._largest_in_one_block.cache_clear()
