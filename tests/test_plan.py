"""The choice of the transform: no output is reached by what wraps around, and no smaller transform would do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashfftconv.ops.plan import (
    BLOCK_POSITIONS,
    COLUMNS,
    MAX_FFT_SIZE,
    MIN_FOLDED_FFT_SIZE,
    Plan,
    channel_block,
    choose,
    windows_of,
)


def circular_is_right(length: int, taps: int, reverse_taps: int, size: int) -> bool:
    """Whether a circle of `size` points gives the outputs of the linear convolution, tried with powers of two.

    Each lag and each position leaves a mark of its own, so that nothing can cancel.
    """
    taps, reverse_taps = min(taps, length), min(reverse_taps, length - 1)
    if taps + reverse_taps > size or length > size:
        return False
    for lag in (0, taps - 1, -1, -reverse_taps):
        if not -reverse_taps <= lag < taps:
            continue
        for position in (0, length - 1):
            reached = (position + lag) % size
            if reached < length and reached != position + lag:
                return False
    return True


@settings(max_examples=300, deadline=None)
@given(length=st.integers(1, 3000), taps=st.integers(1, 4000), reverse_taps=st.integers(0, 4000))
def test_smallest_transform_without_wrap_around(length: int, taps: int, reverse_taps: int) -> None:
    size, folded, *several = choose(length, taps, reverse_taps, True)
    assert size % COLUMNS == 0 and size & (size - 1) == 0 and size <= MAX_FFT_SIZE and several == [0, 0]
    # A folded transform stands for one of twice its size, whose second half holds no outputs.
    circle = 2 * size if folded else size
    assert length <= size and circular_is_right(length, taps, reverse_taps, circle)
    smallest = {COLUMNS, 2 * MIN_FOLDED_FFT_SIZE}
    assert circle in smallest or not circular_is_right(length, taps, reverse_taps, circle // 2)
    assert folded or size == COLUMNS or length > size // 2


def test_the_check_of_wrap_around_agrees_with_a_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    for length, taps, reverse_taps, size in [
        (5, 4, 0, 8),
        (5, 5, 0, 8),
        (5, 5, 4, 9),
        (5, 5, 4, 8),
        (6, 2, 3, 9),
        (6, 2, 3, 8),
    ]:
        u, k, k_rev = (torch.randint(1, 9, (n,), generator=generator).double() for n in (length, taps, reverse_taps))
        circle = torch.zeros(size).double()
        circle[:taps] += k
        circle[size - reverse_taps :] += k_rev.flip(0)
        y = torch.fft.ifft(torch.fft.fft(u, n=size) * torch.fft.fft(circle)).real[:length]
        full = torch.zeros(length).double()
        for t in range(length):
            full[t] += sum(k[s] * u[t - s] for s in range(min(taps, t + 1)))
            full[t] += sum(k_rev[s] * u[t + 1 + s] for s in range(min(reverse_taps, length - 1 - t)))
        assert torch.allclose(y, full) == circular_is_right(length, taps, reverse_taps, size)


@pytest.mark.parametrize(
    "length, taps, reverse_taps, expected",
    [
        (1, 1, 0, Plan(256, False)),
        (128, 128, 0, Plan(256, False)),
        (129, 129, 0, Plan(512, True)),
        (129, 128, 0, Plan(256, False)),
        (256, 256, 0, Plan(512, True)),
        (257, 257, 0, Plan(512, True)),
        (1024, 1024, 0, Plan(1024, True)),
        (1024, 1024, 1023, Plan(1024, True)),
        (1024, 1 << 20, 1 << 20, Plan(1024, True)),
        (1025, 1025, 0, Plan(2048, True)),
        (1025, 1024, 0, Plan(2048, False)),
        (1025, 3, 1024, Plan(2048, True)),
        (1000, 3, 24, Plan(1024, False)),
        (1000, 3, 25, Plan(1024, True)),
    ],
)
def test_examples(length: int, taps: int, reverse_taps: int, expected: Plan) -> None:
    assert choose(length, taps, reverse_taps, True) == expected


def test_circular_transforms_have_the_length_of_the_sequence() -> None:
    assert choose(1024, 7, 0, False) == Plan(1024, False)
    for length in (1, 128, 255, 768, 1000):
        assert choose(length, 1, 0, False) == (
            f"the kernels convolve circularly at powers of two from 256 on, and the length is {length}"
        )


def test_what_is_too_long() -> None:
    longest = MAX_FFT_SIZE
    assert choose(longest, longest, longest, True) == Plan(longest, True)
    assert choose(longest, 1, 0, False) == Plan(longest, False)
    for causal, length in ((True, longest + 1), (False, 2 * longest)):
        assert choose(length, length, 1, causal) == (
            f"sequence and filter need an FFT of {2 * longest} points, and the kernels have up to {longest}"
        )


def test_what_takes_several_passes() -> None:
    assert choose(8000, 8193, 0, True) == Plan(8192, True)
    assert choose(5000, 3, 0, True) == Plan(8192, False)
    assert choose(12000, 3, 2, True) == choose(12000, 3, 0, True, in_blocks=False) == Plan(16384, False)
    assert choose(16000, 16000, 1, True, in_clusters=False) == Plan(16384, True)
    long = [Plan(16384, False), Plan(16384, True), Plan(32768, True), Plan(MAX_FFT_SIZE, True)]
    assert all(plan.is_long for plan in long)
    assert not any(plan.is_long for plan in (Plan(8192, True), Plan(8192, False), Plan(16384, True, 0, 2)))


def test_rows_that_share_a_transform() -> None:
    for batch in (1, 2, 5):
        assert Plan(1024, True).pairs(batch) == batch and Plan(1024, False).pairs(batch) == (batch + 1) // 2


def test_windows_of_causal_filters_of_longer_sequences() -> None:
    for length, taps, windows in [
        (8193, 8193, 2),
        (16000, 16000, 2),
        (16385, 1, 1),
        (16385, 2, 2),
        (16385, 8193, 2),
        (16385, 8194, 3),
        (16385, 1 << 20, 3),
        (131072, 131072, 16),
        (1 << 22, 122881, 16),
    ]:
        assert choose(length, taps, 0, True, in_clusters=False) == Plan(8192, True, windows)
        assert choose(length, taps, 0, True, in_blocks=False).windows == choose(length, taps, 1, True).windows == 0
    assert choose(131073, 122882, 0, True, in_clusters=False) == Plan(262144, False)
    # Every tap and no other meets an output: window d has the lags from (d - 1) 8192 to (d + 1) 8192, both exclusive.
    for taps in (1, 2, 8192, 8193, 8194, 16385, 16386):
        reached = [d for d in range(20) if (d - 1) * BLOCK_POSITIONS + 1 <= taps - 1]
        assert windows_of(1 << 20, taps) == len(reached)


def test_clusters_of_blocks() -> None:
    for length, taps, reverse_taps, cluster, backward in [
        (8192, 8192, 0, 0, 0),
        (8192, 8192, 8192, 0, 0),
        (8193, 8193, 0, 2, 2),
        (16384, 16384, 16384, 2, 2),
        (16385, 16385, 0, 4, 4),
        (32768, 8193, 0, 4, 4),
        (65536, 1, 0, 0, 0),
        (65536, 2, 0, 8, 8),
        (131072, 16385, 0, 0, 16),
        (131072, 16386, 0, 16, 16),
        (131073, 16386, 0, 0, 8),
    ]:
        plans = [choose(length, taps, reverse_taps, True, backward=backward) for backward in (False, True)]
        assert [plan.cluster for plan in plans] == [cluster, backward]
        for plan in plans:
            whole = plan.cluster and length <= 131072
            assert not whole or (plan.folded and plan.fft_size == plan.cluster * 8192 >= length and not plan.windows)
        assert not choose(length, taps, reverse_taps, True, in_clusters=False).cluster
    assert choose(16384, 1, 0, False).cluster == 0


def test_longer_sequences_in_blocks_of_a_cluster() -> None:
    for length, taps, cluster, windows in [
        (1 << 22, 32769, 0, 5),
        (1 << 22, 32770, 8, 2),
        (131073, 131073, 8, 3),
        (280000, 1 << 30, 8, 5),
        (1 << 22, 262145, 8, 5),
        (1 << 22, 262146, 16, 4),
        (786432, 786432, 16, 6),
    ]:
        block = 8192 * max(1, cluster)
        expected = Plan(block, True, windows, cluster)
        assert choose(length, taps, 0, True) == expected
        assert cluster == 0 or choose(length, taps, 0, True, backward=True) == expected
        assert expected.blocks(length) == -(-length // block) and not expected.is_long
        assert choose(length, taps, 0, True, in_blocks=False).is_long
        assert not choose(length, taps, 0, True, in_clusters=False).cluster
        assert choose(length, taps, 1, True).is_long
    # Windows that fill a transform are that transform.
    for backward in (False, True):
        assert choose(7 << 17, 7 << 17, 0, True, backward=backward).windows == 7
        assert choose((7 << 17) + 1, 7 << 17, 0, True, backward=backward) == Plan(1 << 20, True)
        assert choose((1 << 20) + 1, (1 << 20) + 1, 0, True, backward=backward).windows == 9
    # Many windows pay in a backward pass alone, too many not even there.
    assert choose(1310721, 1310721, 0, True).is_long and choose(1572864, 1572864, 0, True, backward=True).windows == 12
    assert choose(1572865, 1 << 21, 0, True, backward=True).is_long
    assert choose(1 << 22, 122881, 0, True, in_clusters=False).windows == 16
    assert choose(1 << 22, 122882, 0, True, in_clusters=False).is_long


def test_blocks_of_channels() -> None:
    assert channel_block(256, 256, 1, 15) == 256
    # Fifteen clusters do four rounds of sixty channels, three of which are no fewer than the last one needs.
    assert channel_block(256, 62, 1, 15) == 60
    assert channel_block(256, 63, 4, 15) == 60
    # Few pairs, or whole rounds whatever the block: the largest.
    assert channel_block(64, 50, 1, 1) == 48
    assert [channel_block(9, most, 1, 15) for most in (3, 0)] == [3, 1]


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 40), st.integers(1, 20))
def test_blocks_of_channels_are_no_larger_than_they_may_be(count: int, most: int, pairs: int, workers: int) -> None:
    assert 1 <= channel_block(count, most, pairs, workers) <= max(1, min(count, most))
