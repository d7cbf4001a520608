"""The Python side of the kernels without a GPU: the library, which calls are served, and the spectra that are kept."""

import ctypes
import gc
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hf_flashfftconv.errors import BackendError
from hf_flashfftconv.ops import cuda, extension, filters, library, plan, pools, tables

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"fft_conv_params": extension.Parameters, "fft_conv_filter_params": extension.FilterParameters}
NAMES["fft_conv_tensor"] = extension.TensorArgument


@pytest.mark.parametrize("name", NAMES)
def test_structures_are_those_of_the_header(name: str) -> None:
    header = (ROOT / "csrc" / "fft_conv.h").read_text()
    body = re.sub(r"//.*", "", re.search(rf"struct {name} {{(.*?)}};", header, re.DOTALL).group(1))
    types = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "fft_conv_tensor": extension.TensorArgument}
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


def test_importing_the_package_loads_no_library() -> None:
    code = "import hf_flashfftconv.functional; from hf_flashfftconv.ops import extension as x; "
    code += "raise SystemExit(x.load.cache_info().currsize)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


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
    yield fake
    extension.load.cache_clear()
    cuda._lacks_memory.cache_clear()


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
    assert "FFT of 33554432 points" in why_not(on_gpu(1 << 24), 1 << 24)
    assert "pairs of sequences" in why_not(on_gpu(1, batch=1 << 20, channels=1 << 12), 1)
    assert why_not(on_gpu(1, batch=1 << 20, channels=1 << 11), 1) is None


@pytest.mark.parametrize("switch", ["allow_tf32", "set_float32_matmul_precision", "backends", "matmul"])
def test_float32_needs_permission_for_tf32(gpu: SimpleNamespace, switch: str) -> None:
    code = {
        "allow_tf32": "torch.backends.cuda.matmul.allow_tf32 = True",
        "set_float32_matmul_precision": "torch.set_float32_matmul_precision('high')",
        "backends": "torch.backends.fp32_precision = 'tf32'",
        "matmul": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    }[switch]
    # In a process of its own: the settings are global, and the two generations of them do not mix.
    script = f"""
import torch
from types import SimpleNamespace
from hf_flashfftconv.ops import cuda
cuda._verdict = cuda._lacks_memory = lambda *_: None
u = SimpleNamespace(shape=(2, 3, 100), dtype=torch.float32, is_cuda=True, device=torch.device("cuda", 0))
answers = [cuda.unsupported(u, torch.empty(3, 100), None, True)]
{code}
answers.append(cuda.unsupported(u, torch.empty(3, 100), None, True))
raise SystemExit(0 if "TF32" in answers[0] and answers[1] is None else repr(answers))
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
        u = on_gpu(length=9000)
        assert why_not(u, taps=9000) is None
        assert cuda.plan_of(u, torch.empty(3, 9000), None, True).windows == windows


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
        tables.device_tables(256, False, torch.device("cuda", 3))


def test_tables_do_not_follow_the_default_device() -> None:
    expected = tables.transform_tables(512, True)
    with torch.device("meta"):
        assert torch.equal(tables.transform_tables(512, True), expected)


def forward(k: Tensor, skip: Tensor | None = None, k_rev: Tensor | None = None, length: int = 64) -> None:
    cuda.forward(torch.zeros(1, k.shape[0], length, dtype=torch.bfloat16), k, skip, None, None, k_rev, True)


def prepared(fake: FakeLibrary) -> int:
    """Spectra made since this was last asked."""
    count = sum(name == "fft_conv_filter_spectrum" for name, _ in fake.calls)
    fake.calls.clear()
    return count


def test_launches_are_on_the_current_stream(fake: FakeLibrary) -> None:
    forward(torch.randn(2, 8))
    assert fake.calls == [("fft_conv_filter_spectrum", 77), ("fft_conv_forward", 77)]


def test_a_spectrum_is_kept_while_the_filter_stays_the_same(fake: FakeLibrary) -> None:
    k, skip, k_rev = torch.randn(2, 8), torch.randn(2), torch.randn(2, 9)
    for _ in range(3):
        forward(k, skip, k_rev)
    forward(k, skip, k_rev, length=65)
    assert prepared(fake) == 1
    forward(k, skip)
    forward(k, None, k_rev)
    forward(k.clone(), skip, k_rev)
    forward(k, skip, k_rev, length=7)
    forward(k, skip, k_rev, length=300)
    assert prepared(fake) == 5
    forward(k, skip, k_rev)
    assert prepared(fake) == 0


@pytest.mark.parametrize("name", ["k", "skip", "k_rev"])
def test_no_spectrum_is_stale(fake: FakeLibrary, name: str) -> None:
    filter_ = {"k": torch.randn(2, 8), "skip": torch.randn(2), "k_rev": torch.randn(2, 9)}
    x, shape = filter_[name], filter_[name].shape

    def swap(new: Tensor) -> None:
        x.data = new

    def load() -> None:
        torch.nn.ParameterList([torch.nn.Parameter(x, requires_grad=False)])[0].copy_(torch.randn_like(x))

    changes = {
        "in place": lambda: x.mul_(2),
        "through a view": lambda: x[:1].zero_(),
        "detached": lambda: x.detach().add_(1),
        "loaded": load,
        "swapped": lambda: swap(torch.randn_like(x)),
        # The second memory may well be the first again.
        "swapped twice": lambda: (swap(torch.empty(0)), swap(torch.randn(shape))),
        "set": lambda: x.set_(torch.randn_like(x)),
    }
    for change, apply in changes.items():
        forward(**filter_)
        prepared(fake)
        apply()
        forward(**filter_)
        assert prepared(fake) == 1, change


def test_one_entry_for_each_filter(fake: FakeLibrary) -> None:
    k = torch.randn(2, 8)
    for _ in range(3):
        forward(k.mul_(2))
    assert len(cuda._spectra._entries) == 1


@pytest.mark.parametrize("name", ["k", "skip", "k_rev"])
def test_spectra_of_what_is_trained_are_not_kept(fake: FakeLibrary, name: str) -> None:
    filter_ = {"k": torch.randn(2, 8), "skip": torch.randn(2), "k_rev": torch.randn(2, 9)}
    forward(**filter_)
    filter_[name].requires_grad_()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            forward(**filter_)
            forward(**filter_)
    assert prepared(fake) == 5
    assert not cuda._spectra._entries


def test_inference_tensors_have_no_version_and_are_not_kept(fake: FakeLibrary) -> None:
    with torch.inference_mode():
        k = torch.randn(2, 8)
        forward(k)
        forward(k.mul_(2))
        assert prepared(fake) == 2
    assert not cuda._spectra._entries
    k = torch.randn(2, 8)
    with torch.inference_mode():
        forward(k)
        forward(k)
    assert prepared(fake) == 1


def test_subclasses_are_not_kept(fake: FakeLibrary) -> None:
    class Scaled(Tensor):
        pass

    k = torch.randn(2, 8).as_subclass(Scaled)
    forward(k)
    assert not cuda._spectra._entries


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_dead_filter_drops_its_spectrum(fake: FakeLibrary, index: int) -> None:
    tensors = [torch.randn(2, 8), torch.randn(2), torch.randn(2, 9)]
    forward(*tensors)
    assert len(cuda._spectra._entries) == 1
    tensors[index] = None
    gc.collect()
    assert not cuda._spectra._entries


@pytest.mark.parametrize("stream, elsewhere", [(0, False), (77, True)])
def test_what_is_kept_on_a_side_stream_is_allocated_by_another_thread(
    fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch, stream: int, elsewhere: bool
) -> None:
    """Private pools, such as that of a CUDA graph that warms up, take what the current thread allocates."""
    threads = []
    prepare = filters.prepare

    def noted(*arguments: object) -> filters.Spectrum:
        threads.append(threading.get_ident())
        return prepare(*arguments)

    monkeypatch.setattr(filters, "prepare", noted)
    monkeypatch.setattr(cuda, "_current_stream", lambda _: stream)
    forward(torch.randn(2, 8))
    forward(torch.randn(2, 8).requires_grad_())
    here = threading.get_ident()
    assert [x != here for x in threads] == [elsewhere, False]


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


def test_each_stream_has_its_own_spectra(fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    k = torch.randn(2, 8)
    for stream in (77, 78, 77, 78):
        monkeypatch.setattr(cuda, "_current_stream", lambda _, stream=stream: stream)
        forward(k)
    assert prepared(fake) == 2


def test_captures_prepare_and_keep_nothing(fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    k = torch.randn(2, 8)
    forward(k)
    monkeypatch.setattr(cuda, "_is_capturing", lambda: True)
    forward(k)
    forward(torch.randn(2, 8))
    assert prepared(fake) == 3
    assert len(cuda._spectra._entries) == 1


PLAN = plan.choose(64, 8, 0, True)
ENTRY = filters.spectrum_bytes(2, PLAN.points)


def test_filters_of_a_pass_do_not_push_each_other_out(fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda._spectra, "max_bytes", 2 * ENTRY)
    layers = [torch.randn(2, 8) for _ in range(3)]
    for expected in (3, 1, 1, 1):
        for k in layers:
            forward(k)
        assert prepared(fake) == expected
    assert sum(x.spectrum.bytes for x in cuda._spectra._entries.values()) == 2 * ENTRY
    assert [cuda._spectra.keeps(k, None, None, PLAN) for k in layers] == [True, True, False]
    assert not cuda._spectra.keeps(layers[0], None, None, PLAN._replace(half=True))


def test_what_has_not_been_used_for_long_gives_way(fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda._spectra, "max_bytes", 2 * ENTRY)
    used, unused, new = (torch.randn(2, 8) for _ in range(3))
    forward(unused)
    # Two are asked for each time, as many as the bound has room for.
    for _ in range(filters._PATIENCE):
        forward(used)
        forward(new)
    assert prepared(fake) == 2 + filters._PATIENCE
    forward(used)
    assert cuda._spectra.keeps(new, None, None, PLAN)
    for expected in (1, 0):
        forward(new)
        forward(used)
        assert prepared(fake) == expected
    assert not cuda._spectra.keeps(unused, None, None, PLAN)


def test_the_bound_is_that_of_the_device(fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total_memory=4 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    filters.cache_bytes.cache_clear()
    assert filters.cache_bytes(torch.device("cuda", 0)) == 512 << 20
    memory.total_memory = 80 << 30
    assert filters.cache_bytes(torch.device("cuda", 1)) == filters.cache_bytes(torch.device("cpu")) == 1 << 30
    filters.cache_bytes.cache_clear()
    k = torch.randn(2, 8)
    monkeypatch.setattr(cuda._spectra, "max_bytes", ENTRY - 1)
    assert not cuda._spectra.keeps(k, None, None, PLAN)
    forward(k)
    assert not cuda._spectra._entries
    monkeypatch.setattr(cuda._spectra, "max_bytes", ENTRY)
    assert cuda._spectra.keeps(k, None, None, PLAN)
    forward(k)
    assert len(cuda._spectra._entries) == 1
    cuda._spectra.clear()
    assert not cuda._spectra._entries
