"""The kernels for long sequences without a GPU; see test_kernels_emulated.py. Here one block takes all tickets."""

import math
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import ALL, GATES, check, check_not_finite, check_values, make, oracle
from numerics import FLOAT16, gradient_violations, row_errors
from test_kernels_emulated import emulation, library

from hf_flashfftconv import fft_conv
from hf_flashfftconv.ops import cuda, cuda_gradients, extension, long_plan
from hf_flashfftconv.ops.plan import Plan

__all__ = ["emulation", "library"]
pytestmark = pytest.mark.usefixtures("without_clusters")


def planned(arguments: dict[str, torch.Tensor], causal: bool = True) -> Plan:
    """Of the gradients."""
    return cuda.plan_of(arguments["u"], arguments["k"], arguments.get("k_rev"), causal, backward=True)


def test_folded() -> None:
    arguments = make(16385, 16400, ALL, reverse_taps=16384, batch=2, channels=1)
    assert planned(arguments) == Plan(32768, True)
    check(arguments)


def test_second_half_in_use() -> None:
    arguments = make(12001, 4000, (*GATES, "k_rev"), reverse_taps=300, batch=2, channels=1)
    assert planned(arguments) == Plan(16384, False)
    check(arguments)


@pytest.mark.parametrize("size, dtype", [(16384, torch.float32), (131072, torch.bfloat16)])
def test_circular(size: int, dtype: torch.dtype) -> None:
    arguments = make(size, size, ("skip", "pre_gate"), batch=1, channels=1, dtype=dtype)
    assert planned(arguments, False) == Plan(size, False)
    check(arguments, causal=False)


def test_two_stages_outside_of_the_rows() -> None:
    """In the backward pass, which has all that the forward pass has."""
    arguments = make(1 << 19, 64, batch=1, channels=1, dtype=torch.float16)
    assert long_plan.outer_radix(1 << 19, False) == 8
    u, k = arguments["u"], arguments["k"]
    dy = torch.randn(u.shape).half()
    du, dk, *_ = cuda_gradients.backward(dy, u, k, None, None, None, None, False)
    leaves = {name: x.double().requires_grad_() for name, x in arguments.items()}
    oracle(leaves, causal=False).backward(dy.double())
    assert not gradient_violations("u", du, leaves["u"].grad, FLOAT16)
    assert not gradient_violations("k", dk, leaves["k"].grad, FLOAT16)


def test_sequences_that_share_a_transform_are_off_alike() -> None:
    """Though their root mean squares lie on either side of a power of two."""
    arguments = make(16384, 16384, batch=2, channels=1, dtype=torch.float16)
    arguments["u"] *= torch.tensor([1.05, 0.95])[:, None, None]
    y = fft_conv(**arguments, causal=False, backend="cuda")
    first, second = row_errors(y, oracle(arguments, causal=False)).flatten().tolist()
    assert 0.9 < first / second < 1.1


@pytest.mark.parametrize("folded", [False, True])
def test_small_shared_memory_holds_eight_slots(folded: bool) -> None:
    """The 99 KiB of blocks of consumers' GPUs."""
    for log in range(14, 24):
        parameters = extension.Parameters(element=0, fft_size=1 << log, folded=folded)
        parameters.outer_radix = long_plan.outer_radix(1 << log, folded)
        needed = extension.call("fft_conv_shared_bytes", parameters, False)
        assert needed <= (99 << 10 if parameters.outer_radix <= (16 if folded else 8) else 163 << 10)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two pairs of the smallest long transform a group; passes follow closely upon each other, so that places in memory
    are used again.
    """

    monkeypatch.setattr(long_plan, "GROUP_BYTES", 2 * 4 * 16384)
    monkeypatch.setattr(long_plan, "_DISTANCE", 0)
    long_plan.lay_out.cache_clear()
    yield
    long_plan.lay_out.cache_clear()


@pytest.mark.usefixtures("small_groups")
def test_batches_in_several_groups() -> None:
    options = (*GATES, "skip", "k_rev")
    arguments = make(9000, 100, options, reverse_taps=50, batch=5, channels=3, dtype=torch.float16)
    layout = long_plan.lay_out(*planned(arguments)[:2], 9000, 5, 3)
    assert layout.group_pairs == 2 and layout.ring < 5
    check(arguments)


def test_channels_one_by_one_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make(9000, 60, ALL, reverse_taps=40, batch=1, channels=3)
    u, k, skip, pre, post, k_rev = (arguments[name] for name in ("u", "k", "skip", *GATES, "k_rev"))
    launched = []
    launch = extension.launch

    def noted(name: str, *rest: object) -> None:
        launched.extend([name] if "long" in name else [])
        launch(name, *rest)

    monkeypatch.setattr(extension, "launch", noted)
    operands = (u, k, skip, pre, post, k_rev, True)
    expected = [cuda.forward(*operands), *cuda_gradients.backward(u, *operands)]
    assert launched == ["fft_conv_long_forward"] * 3
    # As if the filters were trained: their spectra are not kept, and together they are larger than the output.
    monkeypatch.setattr(cuda._spectra, "keeps", lambda *_: False)
    monkeypatch.setattr(cuda, "SMALL_SPECTRUM_BYTES", 0)
    actual = [cuda.forward(*operands), *cuda_gradients.backward(u, *operands)]
    assert len(launched) == 3 + 3 * 3
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("reverse_taps", [0, 5])
def test_gradients_that_are_not_needed(reverse_taps: int) -> None:
    arguments = make(9000, 60, (*GATES, "k_rev"), reverse_taps=reverse_taps, batch=1, channels=1)
    u, k, pre, post = (arguments[name] for name in ("u", "k", *GATES))
    operands = (u, u, k, None, pre, post, arguments.get("k_rev"), True)
    du, dk, _, dpre, dpost, _ = cuda_gradients.backward(*operands)
    for needed in (0, 1, 3, 4):
        actual = cuda_gradients.backward(*operands, [n == needed for n in range(6)])
        assert torch.equal(actual[needed], (du, dk, None, dpre, dpost)[needed])
        assert all(actual[n] is None for n in (0, 3, 4) if n != needed)


@pytest.mark.parametrize("scaled", ["u", "pre_gate"])
@pytest.mark.parametrize("dtype, exponent", [(torch.bfloat16, -90), (torch.bfloat16, 90), (torch.float16, -12)])
def test_scales_and_unequal_pairs(scaled: str, dtype: torch.dtype, exponent: int) -> None:
    arguments = make(9000, 200, (*GATES, "k_rev"), reverse_taps=3, batch=4, channels=1, dtype=dtype)
    # The first pair: both scaled; the second: one of them, and a sequence that is all in one spike.
    arguments[scaled][:3] *= 2.0**exponent
    arguments["u"][3] *= torch.where(torch.arange(9000) == 77, 1.0, 2.0**-9)
    check_values(fft_conv(**arguments, backend="cuda"), arguments)


def test_not_finite_rows_keep_to_themselves() -> None:
    arguments = make(8500, 30, (*GATES, "k_rev"), reverse_taps=3, batch=4, channels=3)
    check_not_finite(arguments, "pre_gate", math.inf, shared=True)


def test_zeros() -> None:
    arguments = make(8500, 30, GATES, batch=3, channels=1)
    y = fft_conv(**arguments, backend="cuda")
    arguments["u"][2] = 0
    actual = fft_conv(**arguments, backend="cuda")
    assert (actual[2] == 0).all() and torch.equal(actual[:2], y[:2])


@pytest.mark.parametrize("length", [8500, 8501])
def test_any_layout_gives_the_same_bits(length: int) -> None:
    arguments = make(length, 30, GATES, batch=2, channels=2)
    y = fft_conv(**arguments, backend="cuda")
    for name in ("u", *GATES):
        x = arguments[name]
        memory = torch.full((4 * (length + 3) + 1,), math.nan, dtype=x.dtype)
        arguments[name] = memory[1:].view(2, 2, length + 3)[..., :length].copy_(x)
        assert torch.equal(fft_conv(**arguments, backend="cuda"), y), name
    arguments["u"] = arguments["u"].movedim(2, 0).contiguous().movedim(0, 2)
    assert torch.equal(fft_conv(**arguments, backend="cuda"), y)


def test_scratch_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make(9000, 60, ("k_rev",), reverse_taps=5, batch=1, channels=1)
    buffer = cuda.Call.buffer

    def failing(call: cuda.Call, name: str, *rest: object) -> torch.Tensor:
        if name == "scratch":
            raise torch.OutOfMemoryError("out of memory")
        return buffer(call, name, *rest)

    monkeypatch.setattr(cuda.Call, "buffer", failing)
    with pytest.raises(torch.OutOfMemoryError, match="FFTs of 16384 points needs 65536 bytes of scratch"):
        fft_conv(**arguments, backend="cuda")
