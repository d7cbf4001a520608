"""The Python side of the kernels without a GPU: the library and which calls are served."""

import ctypes
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_kernels import FakeLibrary, fake

from hf_flashfftconv.errors import BackendError
from hf_flashfftconv.ops import cuda, extension, library, pools, tables

__all__ = ["fake"]

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"fft_conv_params": extension.Parameters, "fft_conv_filter_params": extension.FilterParameters}
NAMES |= {"fft_conv_tap_params": extension.TapParameters, "fft_conv_tensor": extension.TensorArgument}


@pytest.mark.parametrize("name", NAMES)
def test_structures_are_those_of_the_header(name: str) -> None:
    header = (ROOT / "csrc" / "fft_conv.h").read_text()
    body = re.sub(r"//.*", "", re.search(rf"struct {name} {{(.*?)}};", header, re.DOTALL).group(1))
    types = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
    types["fft_conv_tensor"] = extension.TensorArgument
    declared = []
    for statement in filter(None, map(str.strip, body.split(";"))):
        kind, fields = re.fullmatch(r"(?:const )?(\w+)(.*)", statement).groups()
        for field in fields.split(","):
            declared.append((field.strip(" *"), ctypes.c_void_p if "*" in fields else types[kind]))
    assert declared == list(NAMES[name]._fields_)


def test_tensors_are_written_where_the_structure_has_them() -> None:
    written, assigned = extension.Parameters(batch=7), extension.Parameters(batch=7)
    for number, (name, kind) in enumerate(extension.Parameters._fields_):
        if kind is extension.TensorArgument:
            values = (1 << 63) + number, -number, 3 << 40
            written.set_tensor(name, *values)
            setattr(assigned, name, values)
    assert bytes(written) == bytes(assigned)


def test_elements_are_those_of_the_header() -> None:
    header = (ROOT / "csrc" / "fft_conv.h").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"FFT_CONV_(\w+) = (\d)", header)}
    assert {str(dtype).split(".")[1].upper(): number for dtype, number in extension.ELEMENTS.items()} == numbers


def test_the_version_is_that_of_the_library() -> None:
    assert f"fft_conv_version() {{ return {extension.VERSION}; }}" in (ROOT / "csrc" / "api.cu").read_text()


def test_a_library_that_is_missing_broken_or_old_is_a_reason(
    fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extension.load() is fake
    fake.fft_conv_version = lambda: 999
    extension.load.cache_clear()
    assert "has version 999 of the interface, this package needs" in extension.load()
    monkeypatch.undo()
    monkeypatch.setattr(extension, "PATH", Path(__file__))
    extension.load.cache_clear()
    assert "cannot be loaded: " in extension.load()
    monkeypatch.setattr(extension, "PATH", Path(__file__).with_name("nowhere.so"))
    extension.load.cache_clear()
    assert extension.load() == "the CUDA library is not built (Python-only install)"
    with pytest.raises(BackendError, match="not built"):
        extension.launch("fft_conv_forward", extension.Parameters(), 0)


def test_errors_of_launches(fake: FakeLibrary) -> None:
    parameters = extension.Parameters(batch=2, channels=3, length=4, fft_size=256)
    extension.launch("fft_conv_forward", parameters, 5)
    assert fake.calls == [("fft_conv_forward", 5)]
    fake.code = 700
    with pytest.raises(
        BackendError, match=r"fft_conv_forward failed: out of luck \(error 700; batch 2, channels 3, len"
    ):
        extension.launch("fft_conv_forward", parameters, 5)
    for code, reason in ((209, "not built for this GPU"), (35, "driver is older")):
        fake.code = code
        with pytest.raises(extension.MisfitError, match=rf"{reason}.*\(out of luck\)"):
            extension.launch("fft_conv_forward", parameters, 5)


def on_gpu(
    length: int = 100, dtype: torch.dtype = torch.bfloat16, batch: int = 2, channels: int = 3
) -> SimpleNamespace:
    """What the dispatch looks at of a tensor."""
    return SimpleNamespace(shape=(batch, channels, length), dtype=dtype, is_cuda=True, device=torch.device("cuda", 1))


@pytest.fixture
def gpu(fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU as far as the dispatch asks for one."""
    gpu = SimpleNamespace(capability=(9, 0), tried=0, misfit=None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: gpu.capability)

    def forward(*_: object) -> None:
        gpu.tried += 1
        if gpu.misfit:
            raise extension.MisfitError(gpu.misfit)

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))
    monkeypatch.setattr(cuda, "forward", forward)
    return gpu


def why_not(u: object, taps: int = 100, causal: bool = True) -> str | None:
    return cuda.unsupported(u, torch.empty(3, taps), None, causal)


def test_what_is_served_and_why_the_rest_is_not(gpu: SimpleNamespace) -> None:
    assert why_not(on_gpu()) is None
    assert why_not(on_gpu(dtype=torch.float16)) is None
    assert why_not(torch.empty(2, 3, 100)) == "u is on the device cpu, not on a CUDA device"
    assert why_not(on_gpu(dtype=torch.float64)).startswith("u is torch.float64, and the kernels take torch.bfloat16, ")
    assert "the length is 100" in why_not(on_gpu(), causal=False)
    assert "FFT of 16777216 points" in why_not(on_gpu(1 << 24), 1 << 24)
    assert "takes 2147483648 transforms" in why_not(on_gpu(1, batch=1 << 20, channels=1 << 12), 1)
    assert why_not(on_gpu(1, batch=1 << 20, channels=1 << 11), 1) is None


def test_float32_needs_permission_for_tf32() -> None:
    # In processes of their own: the settings are global, and the two generations of them do not mix.
    script = """
import os, torch
from types import SimpleNamespace
from hf_flashfftconv.ops import cuda
cuda._verdict = cuda._lacks_memory = lambda *_: None
u = SimpleNamespace(shape=(2, 3, 100), dtype=torch.float32, is_cuda=True, device=torch.device("cuda", 0))
reason = lambda: cuda.unsupported(u, torch.empty(3, 100), None, True)
for switch in (
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
):
    if (child := os.fork()) == 0:
        assert "TF32" in reason()
        exec(switch)
        assert reason() is None, reason()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, switch
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_device_is_tried_out_once(gpu: SimpleNamespace) -> None:
    assert [why_not(on_gpu()) for _ in range(3)] == [None] * 3
    assert gpu.tried == 1


def test_a_device_that_the_library_does_not_fit_is_a_reason_once(
    gpu: SimpleNamespace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_reasons_told", set())
    gpu.misfit = "the library was not built for this GPU (no kernel image)"
    for length in (100, 100, 50):
        assert not library.use_kernels(on_gpu(length), torch.empty(3, 10), None, True, "auto")
    assert gpu.tried == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"] and gpu.misfit in caplog.text
    with pytest.raises(BackendError, match="not built for this GPU"):
        library.use_kernels(on_gpu(), torch.empty(3, 10), None, True, "cuda")


def test_an_old_device_is_a_reason(gpu: SimpleNamespace) -> None:
    gpu.capability = (7, 5)
    assert why_not(on_gpu()) == "the device has compute capability 7.5, and the kernels need 8.0"
    assert gpu.tried == 0


def test_a_device_with_less_shared_memory_is_a_reason(
    fake: FakeLibrary, gpu: SimpleNamespace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_reasons_told", set())
    fake.fft_conv_shared_limit = lambda device: 101_376 if device == 1 else 0
    u, k = on_gpu(), torch.empty(3, 10)
    reason = "backward kernel for an FFT of 256 points needs 160000 bytes of shared memory, and the device has 101376"
    for _ in range(2):
        assert library.use_kernels(u, k, None, True, "auto")
        assert not library.use_kernels(u, k, None, True, "auto", backward=True)
    assert len(caplog.records) == 1 and reason in caplog.text
    with pytest.raises(BackendError, match=reason):
        library.use_kernels(u, k, None, True, "cuda", backward=True)


def test_what_does_not_fit_in_blocks_goes_in_several_passes(fake: FakeLibrary, gpu: SimpleNamespace) -> None:
    fake.fft_conv_shared_bytes = lambda parameters, backward: 200_000 if parameters._obj.windows else 90_000
    for limit, windows in ((232_448, 3), (101_376, 0)):
        cuda._lacks_memory.cache_clear()
        fake.fft_conv_shared_limit = lambda device, limit=limit: limit
        u = on_gpu(length=18000)
        assert why_not(u, taps=18000) is None
        assert cuda.plan_of(u, torch.empty(3, 18000), None, True).windows == windows


def test_a_missing_library_is_a_reason(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "PATH", Path("nowhere.so"))
    extension.load.cache_clear()
    assert why_not(on_gpu()) == "the CUDA library is not built (Python-only install)"


def test_a_device_is_not_tried_out_in_a_capture(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_is_capturing", lambda: True)
    assert why_not(on_gpu()) is None
    assert gpu.tried == 0
    monkeypatch.setattr(cuda, "_is_capturing", lambda: False)
    assert why_not(on_gpu()) is None
    assert gpu.tried == 1


def test_other_errors_of_the_trial_are_not_remembered(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            why_not(on_gpu())
    assert why_not(on_gpu()) is None


def test_constants_cannot_be_made_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BackendError, match="make one before the capture"):
        tables.device_tables(256, False, 1, torch.device("cuda", 3))


def test_tables_do_not_follow_the_default_device() -> None:
    expected = tables.transform_tables(512, True)
    with torch.device("meta"):
        assert torch.equal(tables.transform_tables(512, True), expected)


def test_constants_are_allocated_by_another_thread() -> None:
    threads = []

    class Constant:
        def to(self, device: torch.device) -> None:
            threads.append(threading.get_ident())

    tables.upload(Constant(), torch.device("cpu"))
    assert threads != [threading.get_ident()]

    def fail() -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        pools.outside_of_pools(fail, torch.device("cpu"))
