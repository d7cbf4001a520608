"""The torch backend's overlap-save: values and gradients against the oracle, the choice of the windows, and memory."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ALL, GATES, Arguments, gradients, make, oracle
from numerics import BOUNDS, error, gradient_violations, reach, violations

from hf_flashfftconv import fft_conv
from hf_flashfftconv.ops import blocks, library, reference


def check(arguments: Arguments) -> None:
    """Output and gradients by windows within the bounds of the numerical promise."""
    u = arguments["u"]
    dy = (torch.randn(u.shape, dtype=torch.float64, device=u.device) + u).to(u.dtype)
    y, actual = gradients(arguments, dy, backend="torch")
    leaves = {name: x.double().requires_grad_() for name, x in arguments.items()}
    expected = oracle(leaves)
    expected.backward(dy.double())
    size = reach(**arguments)
    found = violations(y, expected.detach(), BOUNDS[u.dtype], size)
    for name in arguments:
        found += gradient_violations(name, actual[name], leaves[name].grad, BOUNDS[u.dtype])
    assert not found, found


@pytest.fixture(autouse=True)
def windows_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that would go through one transform of the whole sequence fails; the oracle is such a transform."""

    def whole(*_: object) -> None:
        raise AssertionError("not in windows")

    monkeypatch.setattr(library, "reference", type("Whole", (), {"forward": whole, "backward": whole}))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    "length, taps, reverse_taps", [(2048, 1, 0), (2501, 100, 0), (4097, 60, 77), (3333, 1, 200), (9001, 250, 0)]
)
def test_values_and_gradients(dtype: torch.dtype, length: int, taps: int, reverse_taps: int) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    options = ALL if reverse_taps else (*GATES, "skip")
    check(make(length, taps, options, reverse_taps=reverse_taps, dtype=dtype, filter_dtype=wide))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    check(make(70001, 250, ALL, reverse_taps=60, dtype=dtype, filter_dtype=wide, device="cuda"))


def test_kernels_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.cuda, "unsupported", lambda *_: None)
    monkeypatch.setattr(library.cuda, "forward", lambda u, *_: 2 * u)
    monkeypatch.setattr(
        library.cuda_gradients, "backward", lambda dy, u, k, *_: (3 * dy, 4 * k, None, None, None, None)
    )
    arguments = make(5000, 40, dtype=torch.float32)
    dy = torch.randn_like(arguments["u"])
    y, actual = gradients(arguments, dy, backend="auto")
    assert torch.equal(y, 2 * arguments["u"])
    assert torch.equal(actual["u"], 3 * dy) and torch.equal(actual["k"], 4 * arguments["k"])


@pytest.mark.parametrize("options", [x for n in range(5) for x in itertools.combinations(ALL, n)], ids="+".join)
@pytest.mark.parametrize("elements", [1, 3000, 20000])
def test_options_in_parts(options: tuple[str, ...], elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Parts of one window, of some windows of one row, of some rows.
    monkeypatch.setattr(blocks, "_ELEMENTS", elements)
    check(make(5000, 40, options, reverse_taps=30, dtype=torch.float32))


@settings(max_examples=30, deadline=None)
@given(length=st.integers(2048, 7000), taps=st.integers(1, 230), reverse_taps=st.integers(0, 200))
def test_any_lengths(length: int, taps: int, reverse_taps: int) -> None:
    if blocks.choose(length, taps, reverse_taps, True) is None:
        return
    arguments = make(length, taps, ("k_rev",) if reverse_taps else (), reverse_taps=reverse_taps, dtype=torch.float64)
    assert error(fft_conv(**arguments), oracle(arguments)) < 1e-14


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 1 << 22), taps=st.integers(1, 1 << 20), reverse_taps=st.integers(0, 1 << 20))
def test_windows_are_chosen_where_filters_are_short(length: int, taps: int, reverse_taps: int) -> None:
    chosen = blocks.choose(length, taps, reverse_taps, True)
    assert blocks.choose(length, taps, 0, False) is None
    back, ahead = min(taps, length) - 1, min(reverse_taps, length - 1)
    if chosen is None:
        assert length < max(2200, 10 * (back + ahead + 1))
    else:
        assert (chosen.reach_back, chosen.reach_ahead) == (back, ahead)
        assert chosen.step + back + ahead == chosen.fft_size <= length / 2
        assert chosen.step >= 0.75 * chosen.fft_size - 1
        assert chosen.fft_size == reference.good_fft_length(chosen.fft_size)


def test_only_needed_gradients() -> None:
    arguments = make(3000, 50, ALL, reverse_taps=20, dtype=torch.float32)
    dy = torch.randn_like(arguments["u"])
    _, everything = gradients(arguments, dy, backend="torch")
    for name in arguments:
        leaf = arguments[name].clone().requires_grad_()
        fft_conv(**{**arguments, name: leaf}, backend="torch").backward(dy)
        assert torch.equal(leaf.grad, everything[name]), name


def test_infinities_keep_to_their_row() -> None:
    arguments = make(4000, 50, dtype=torch.float32)
    y = fft_conv(**arguments)
    arguments["u"][1, 0, 2000] = torch.inf
    actual = fft_conv(**arguments)
    assert not actual[1, 0].isfinite().all() and actual[1, 0, :900].isfinite().all()
    assert torch.equal(actual[[0, 2]], y[[0, 2]]) and torch.equal(actual[1, 1], y[1, 1])


def test_windows_in_memory_do_not_grow_with_the_length() -> None:
    largest = []
    for length in (1 << 20, 1 << 22):
        u = torch.empty((), dtype=torch.bfloat16).expand(8, 64, length)
        windows = blocks.choose(length, 100, 0, True)
        parts = list(blocks._parts(windows, u))
        # Every position of every row belongs to one part.
        covered = [(part.rows.start, position) for part in parts for position in (part.start, part.end)]
        assert covered == sorted(covered) and {part.rows.stop - part.rows.start for part in parts} == {8}
        assert parts[0].start == 0 and parts[-1].end == length
        assert all(after.start == part.end for part, after in itertools.pairwise(parts))
        largest.append(max(part.windows(u, None, windows.reach_back).numel() for part in parts[:2]))
    assert largest[0] == largest[1] <= blocks._ELEMENTS
