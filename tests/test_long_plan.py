"""The layout of long convolutions: no ticket waits for a later one, every item is there once, memory is bounded."""

from collections import Counter

import pytest

from hf_flashfftconv.ops import long_plan
from hf_flashfftconv.ops.long_plan import INVERSE, OUTER, ROW_POINTS, ROWS, SCALE, TAPS, LongPlan, lay_out, schedule

# FFT size, half, length, batch, channels
CASES = [
    (1 << 14, False, 16384, 4, 70),
    (1 << 15, True, 16384, 64, 3),
    (1 << 18, False, 262144, 9, 2),
    (1 << 19, True, 262143, 3, 4),
    (1 << 19, False, 524288, 2, 3),
    (1 << 20, True, 524288, 5, 2),
    (1 << 24, True, 1 << 23, 1, 2),
]


class Launch:
    """The rules of csrc/long.cuh: what an item needs, and what it counts for."""

    def __init__(self, fft_size: int, plan: LongPlan, backward: bool) -> None:
        self.plan, self.backward = plan, backward
        self.radix = fft_size // ROW_POINTS
        self.pair_sheets = plan.group_pairs * (2 if backward else 1)
        self.sheets = self.pair_sheets + (plan.group_channels if backward else 0)
        self.done: Counter[tuple[int, int]] = Counter()

    def count(self, kind: int) -> int:
        """Items of a group."""
        plan = self.plan
        splits = plan.group_channels * -(-plan.group_pairs // plan.group_channels // plan.row_steps)
        return {
            SCALE: self.pair_sheets * plan.part_count,
            OUTER: self.pair_sheets * plan.column_items,
            ROWS: self.radix * splits if self.backward else -(-self.radix * plan.group_pairs // plan.row_steps),
            INVERSE: self.sheets * plan.column_items,
            TAPS: plan.group_channels * self.radix if self.backward else 0,
        }[kind]

    def needs(self, kind: int, group: int, index: int) -> list[tuple[int, int]]:
        if kind == OUTER:
            earlier = group - self.plan.ring
            return [(SCALE, group)] + ([(INVERSE, earlier)] if earlier >= 0 else [])
        if kind == ROWS:
            chained = self.plan.channel_splits > 1 and group > 0
            return [(OUTER, group)] + ([(ROWS, group - 1)] if chained and self.backward else [])
        if kind == TAPS:
            return [(ROWS, group)]
        if kind == INVERSE:
            return [(TAPS if index // self.plan.column_items >= self.pair_sheets else ROWS, group)]
        return []

    def run(self, kind: int, group: int, index: int) -> None:
        for of, earlier in self.needs(kind, group, index):
            found, wanted = self.done[of, earlier], self.count(of)
            assert found == wanted, (kind, group, index, of, earlier, found, wanted)
        self.done[kind, group] += 1


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_item_comes_once_and_after_what_it_needs(case: tuple[int, bool, int, int, int], backward: bool) -> None:
    fft_size, _, _, batch, channels = case
    plan = lay_out(*case, backward)
    period = schedule(fft_size, plan, backward)
    depth = max(delay for _, delay, _ in period)
    assert len(set(period)) == len(period) and depth < 16
    launch = Launch(fft_size, plan, backward)
    groups = plan.tickets // len(period) - depth
    assert groups * plan.group_pairs >= (batch + 1) // 2 * channels
    for step in range(groups + depth):
        for kind, delay, index in period:
            if 0 <= step - delay < groups:
                launch.run(kind, step - delay, index)
    for kind in range(5):
        items = [index for of, _, index in period if of == kind]
        assert sorted(items) == list(range(launch.count(kind))), kind
        assert all(launch.done[kind, group] == launch.count(kind) for group in range(groups) if items)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_groups_are_those_of_channels(case: tuple[int, bool, int, int, int]) -> None:
    plan, pairs = lay_out(*case, True), (case[3] + 1) // 2
    if plan.channel_splits == 1:
        assert plan.group_pairs == plan.group_channels * pairs
    else:
        assert plan.group_channels == 1 and plan.group_pairs * plan.channel_splits >= pairs
        assert plan.group_pairs * (plan.channel_splits - 1) < pairs


@pytest.mark.parametrize("log", range(14, 24))
def test_memory_is_bounded(log: int) -> None:
    length, fft_size = 1 << log - 1, 1 << log
    output = 2 * 64 * 768 * length
    for backward in (False, True):
        plan = lay_out(fft_size, True, length, 64, 768, backward)
        assert plan.scratch_bytes <= max((96 if backward else 48) << 20, (3 if backward else 1) * 7 * 4 * fft_size)
        assert plan.scratch_bytes + plan.sums_bytes + plan.energy_bytes + plan.counter_bytes <= output // 8
    alone = lay_out(fft_size, True, length, 1, 1, False)
    assert alone.ring == alone.group_pairs == 1 and alone.scratch_bytes == 4 * fft_size


def test_the_longest() -> None:
    assert long_plan.outer_radix(1 << 24, True) * long_plan.MAX_MIDDLE_RADIX * ROW_POINTS == 1 << 24
    assert long_plan.outer_radix(1 << 23, False) == 32
