"""The kernels of the short convolution on a device: values, layouts, determinism, graphs, many elements, speed."""

import pytest
import torch
from short_cases import LAYOUTS, check, make, run

from hf_flashfftconv.bench.timing import Stopwatch, copy_bandwidth
from hf_flashfftconv.functional import gated_short_conv
from hf_flashfftconv.ops.short_conv import NO_GATE

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [NO_GATE, 0, 1, 2])
@pytest.mark.parametrize("taps", range(1, 8))
@pytest.mark.parametrize("length", [1, 63, 1026, 4096])
def test_values_and_gradients(dtype: torch.dtype, gate: int, taps: int, length: int) -> None:
    z, weight, bias = make(length, taps, gate, batch=3, channels=67, dtype=dtype, device="cuda")
    check((LAYOUTS["channels last"](z), weight, bias), gate)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1024, 1027])
def test_layouts_give_the_same_bits(layout: object, dtype: torch.dtype, length: int) -> None:
    z, weight, bias = make(length, 3, 0, batch=5, channels=128, dtype=dtype, device="cuda")
    results, gradients = run((layout(z), weight, bias), 0, "cuda")
    expected, expected_gradients = run((z, weight, bias), 0, "cuda")
    assert all(map(torch.equal, results, expected)) and all(map(torch.equal, gradients, expected_gradients))


def test_same_bits_every_time() -> None:
    tensors = make(5000, 3, 0, batch=8, channels=256, dtype=torch.bfloat16, device="cuda")
    results, gradients = run(tensors, 0, "cuda")
    for _ in range(3):
        again, again_gradients = run(tensors, 0, "cuda")
        assert all(map(torch.equal, results, again)) and all(map(torch.equal, gradients, again_gradients))


def test_graphs() -> None:
    z, weight, bias = make(512, 3, 0, channels=64, dtype=torch.bfloat16, device="cuda")
    gated_short_conv(z, weight, bias, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen, product = gated_short_conv(z, weight, bias, backend="cuda")
    z.copy_(torch.randn_like(z))
    graph.replay()
    expected = gated_short_conv(z, weight, bias, backend="cuda")
    assert torch.equal(chosen, expected[0]) and torch.equal(product, expected[1])


def test_more_than_two_to_the_31_elements() -> None:
    z = torch.zeros(2, 3 * 384, 1 << 20, dtype=torch.bfloat16, device="cuda")
    z[:, :, -5:] = torch.randn(3 * 384, 5, device="cuda")
    weight, bias = torch.randn(3 * 384, 3, device="cuda"), torch.randn(3 * 384, device="cuda")
    chosen, product = gated_short_conv(z, weight, bias, backend="cuda")
    expected = gated_short_conv(z[..., -8:].contiguous(), weight, bias, backend="cuda")
    assert torch.equal(chosen[..., -6:], expected[0][..., -6:])
    assert torch.equal(product[..., -6:], expected[1][..., -6:])


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_bound_by_memory(layout: str) -> None:
    """Far above what plain PyTorch reaches; the aim is 0.85 of a copy's bandwidth."""
    stopwatch = Stopwatch()
    bandwidth = copy_bandwidth(stopwatch)
    z, weight, bias = make(32768, 3, 0, batch=4, channels=256, dtype=torch.bfloat16, device="cuda")
    z = LAYOUTS[layout](z)
    with torch.no_grad():
        seconds = stopwatch.seconds(lambda: gated_short_conv(z, weight, bias, backend="cuda"))
    share = 5 / 3 * z.numel() * 2 / seconds / bandwidth
    assert share > 0.5, f"{share:.2f} of the copy bandwidth"
