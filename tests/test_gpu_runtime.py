"""The kernels among everything else on a device: streams, graphs, threads, compilation, autocast, memory, devices."""

import gc
import threading

import pytest
import torch
from kernel_cases import ALL, GATES, Arguments, check, check_values, gradients, make
from torch import Tensor

from hf_flashfftconv import FlashFFTConv, fft_conv
from hf_flashfftconv.errors import BackendError
from hf_flashfftconv.ops import cuda, extension, tables

pytestmark = pytest.mark.gpu

NAMES = ("u", "k", "skip", "pre_gate", "post_gate", "k_rev")


def gated(length: int = 1000, **options: int) -> Arguments:
    return make(length, length, (*GATES, "skip"), device="cuda", **{"channels": 16, **options})


def run(arguments: Arguments) -> Tensor:
    return fft_conv(**arguments, backend="cuda")


def test_auto_uses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    launch = extension.launch
    monkeypatch.setattr(extension, "launch", lambda name, *rest: launched.append(name) or launch(name, *rest))
    arguments = gated()
    y, _ = gradients(arguments, arguments["u"], backend="auto")
    names = "filter_spectrum", "forward", "backward", "tap_gradient"
    assert {f"fft_conv_{name}" for name in names} == set(launched)
    assert torch.equal(y, run(arguments))


def test_one_launch_for_a_kept_filter() -> None:
    arguments = gated()
    run(arguments)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(arguments)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels


@pytest.mark.parametrize("length", [100, 1000, 8192])
def test_side_streams(length: int) -> None:
    """Inputs that a delayed stream writes, filters that change on it, and spectra kept on another stream."""
    arguments = gated(length)
    y = run(arguments)
    stream = torch.cuda.Stream()
    for _ in range(20):
        late = {name: torch.zeros_like(x) for name, x in arguments.items()}
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            for name, x in late.items():
                x.copy_(arguments[name])
            actual = run(late)
            again = run(late)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(actual, y) and torch.equal(again, y)
        assert torch.equal(run(late), y)


@pytest.mark.parametrize("length", [200, 4096])
def test_graphs_follow_inputs_and_filters(length: int) -> None:
    arguments = gated(length)
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items()}
    dy = torch.randn_like(arguments["u"])

    def step() -> tuple[Tensor, ...]:
        y = run(leaves)
        return y, *torch.autograd.grad(y, list(leaves.values()), dy)

    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        step()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(10):
        with torch.no_grad():
            for x in (*leaves.values(), dy):
                x.copy_(torch.randn_like(x))
        graph.replay()
        expected = step()
        assert all(torch.equal(actual, x) for actual, x in zip(results, expected, strict=True))


def test_graphs_of_kept_filters_outlive_them() -> None:
    arguments = gated()
    y = run(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(arguments)
    cuda._spectra.clear()
    rubbish = [torch.full((1 << 20,), -1, dtype=torch.int32, device="cuda") for _ in range(64)]
    graph.replay()
    assert torch.equal(captured, y)
    arguments["k"].mul_(2)
    graph.replay()
    assert torch.equal(captured, run(arguments))
    del rubbish


def test_a_first_call_in_a_capture_is_refused_and_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = gated()
    run(arguments)
    tables.device_tables.cache_clear()
    with pytest.raises(BackendError, match="make one before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run(arguments)
    check(arguments)


def test_first_calls_from_many_threads() -> None:
    arguments = gated()
    expected = run(arguments)
    tables.device_tables.cache_clear()
    cuda._verdicts.clear()
    cuda._spectra.clear()
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.extend(run(arguments) for _ in range(50))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 400 and all(torch.equal(y, expected) for y in results)


def test_other_devices() -> None:
    arguments = gated()
    y, grads = gradients(arguments, arguments["u"])
    for index in range(1, torch.cuda.device_count()):
        there = {name: x.to(f"cuda:{index}") for name, x in arguments.items()}
        # The current device stays the first one.
        actual, found = gradients(there, there["u"])
        assert actual.device.index == index and torch.cuda.current_device() == 0
        assert torch.equal(actual.to(y.device), y)
        assert all(torch.equal(found[name].to(y.device), grads[name]) for name in arguments)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: run(x) * 2, fullgraph=True, mode=mode)
    arguments = gated()
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(compiled(arguments).clone(), run(arguments) * 2)
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items()}
    expected = torch.autograd.grad((run(leaves) * 2).float().sum(), list(leaves.values()))
    for _ in range(4):
        actual = torch.autograd.grad(compiled(leaves).float().sum(), list(leaves.values()))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    torch._dynamo.reset()


def test_nothing_stays_in_a_private_pool() -> None:
    """First calls, whose constants and spectra are kept, on a side stream as when a compiled function warms up."""
    arguments = gated(3000)
    tables.device_tables.cache_clear()
    cuda._spectra.clear()
    pool, stream = torch.cuda.MemPool(), torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool):
        y = run(arguments)
        stream.synchronize()
        del y
        blocks = [block for segment in pool.snapshot() for block in segment["blocks"]]
    assert blocks and not [block for block in blocks if block["state"] == "active_allocated"]
    assert len(cuda._spectra._entries) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    arguments = make(1000, 1000, (*GATES, "skip"), dtype=torch.float32, channels=16, device="cuda")
    leaves = {name: x.requires_grad_() for name, x in arguments.items()}
    with torch.autocast("cuda", dtype=dtype):
        y = run(leaves)
    assert y.dtype == dtype
    sequences = {name: x.detach().to(dtype) if x.dim() == 3 else x.detach() for name, x in leaves.items()}
    assert torch.equal(y, run(sequences))
    y.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves.values())


def test_float32_without_tf32_takes_torch_fft() -> None:
    arguments = make(1000, 1000, GATES, dtype=torch.float32, device="cuda")
    with pytest.raises(BackendError, match="TF32"):
        run(arguments)
    assert torch.equal(fft_conv(**arguments), fft_conv(**arguments, backend="torch"))


@pytest.mark.parametrize("names", [NAMES, ("u", "k")], ids=len)
def test_opcheck(names: tuple[str, ...]) -> None:
    arguments = make(300, 200, ALL, reverse_taps=100, device="cuda")
    tensors = [arguments[name] if name in names else None for name in NAMES]
    torch.library.opcheck(torch.ops.hf_flashfftconv.fft_conv.default, (*tensors, True, "cuda"))
    needs = [name in names for name in NAMES]
    backward = (torch.randn_like(arguments["u"]), *tensors, True, "cuda", needs)
    torch.library.opcheck(torch.ops.hf_flashfftconv.fft_conv_backward.default, backward)


def test_the_module() -> None:
    u, k = torch.randn(4, 16, 1024, device="cuda", dtype=torch.bfloat16), torch.randn(16, 1024, device="cuda") / 32
    check_values(FlashFFTConv(2048, dtype=torch.bfloat16).cuda()(u, k), {"u": u, "k": k})


def test_running_out_of_memory_leaves_nothing_behind() -> None:
    arguments = gated(8192, batch=64, channels=256)
    leaves = {name: x.requires_grad_() for name, x in arguments.items()}
    y = run(leaves).detach()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            fft_conv(**leaves, backend="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(run(leaves), y)


def test_memory_does_not_grow() -> None:
    arguments = gated(2000)
    leaves = {name: x.requires_grad_() for name, x in arguments.items()}

    def step() -> int:
        run(leaves).sum().backward()
        for x in leaves.values():
            x.grad = None
        return torch.cuda.memory_allocated()

    before = step()
    assert all(step() == before for _ in range(100))


def test_extra_memory_is_the_output_and_the_spectrum() -> None:
    arguments = gated(4096, batch=32, channels=128)
    run(arguments)
    cuda._spectra.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = run(arguments)
    spectrum = 4 * 128 * 8192
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + spectrum + (1 << 20)


def test_a_failing_launch_raises_and_leaves_nothing_behind() -> None:
    arguments = gated()
    y = run(arguments)
    parameters = extension.Parameters(batch=1, channels=1, length=1, fft_size=384)
    with pytest.raises(BackendError, match="fft_conv_forward failed: no kernel for these parameters"):
        extension.launch("fft_conv_forward", parameters, 0)
    torch.cuda.synchronize()
    assert torch.equal(run(arguments), y)
