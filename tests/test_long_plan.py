"""The layout of long convolutions: no ticket waits for a later one, every item is there once, memory is bounded."""

from collections import Counter

import pytest

from hf_flashfftconv.ops import long_plan
from hf_flashfftconv.ops.long_plan import (
    INVERSE,
    MIDDLE,
    MIDDLE_BACK,
    MIDDLE_RADIX,
    OUTER,
    ROW_POINTS,
    ROWS,
    SCALE,
    TAPS,
    LongPlan,
    lay_out,
    schedule,
)

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
        self.middle = self.radix > plan.outer_radix
        self.subs = plan.outer_radix if self.middle else 1
        self.pair_sheets = plan.group_pairs * (2 if backward else 1)
        self.sheets = self.pair_sheets + (plan.group_channels if backward else 0)
        self.row_items = plan.group_channels * -(-plan.group_pairs // plan.group_channels // plan.row_pairs)
        self.done: Counter[tuple[object, ...]] = Counter()

    def count(self, kind: int) -> int:
        """Items of a group."""
        plan, middle = self.plan, self.plan.middle_items * self.subs if self.middle else 0
        taps = plan.group_channels * self.radix if self.backward else 0
        return {
            SCALE: self.pair_sheets * plan.part_count,
            OUTER: self.pair_sheets * plan.column_items,
            MIDDLE: self.pair_sheets * middle,
            ROWS: self.radix * self.row_items,
            TAPS: taps,
            MIDDLE_BACK: self.sheets * middle,
            INVERSE: self.sheets * plan.column_items,
        }[kind]

    def of_part(self, kind: int, index: int) -> int:
        """The part of a sheet that an item of the middle passes or of the rows works on."""
        return index // (self.count(kind) // self.subs)

    def needs(self, kind: int, group: int, index: int) -> list[tuple[tuple[object, ...], int]]:
        def whole(of: int, group: int = group) -> tuple[tuple[object, ...], int]:
            return (of, group), self.count(of)

        def part(of: int, group: int = group) -> tuple[tuple[object, ...], int]:
            return (of, group, self.of_part(kind, index)), self.count(of) // self.subs

        of_taps = self.backward and index % (self.sheets * self.plan.middle_items) >= (
            self.pair_sheets * self.plan.middle_items
        )
        if kind == OUTER:
            earlier = group - self.plan.ring
            return [whole(SCALE)] + ([whole(INVERSE, earlier)] if earlier >= 0 else [])
        if kind == MIDDLE:
            return [whole(OUTER)]
        if kind == ROWS:
            chained = [part(ROWS, group - 1)] if self.plan.channel_splits > 1 and group > 0 else []
            return [*chained, part(MIDDLE) if self.middle else whole(OUTER)]
        if kind == TAPS:
            return [part(ROWS)]
        if kind == MIDDLE_BACK:
            return [part(TAPS if of_taps else ROWS)]
        if kind == INVERSE:
            taps = self.backward and index // self.plan.column_items >= self.pair_sheets
            return [whole(MIDDLE_BACK) if self.middle else whole(TAPS if taps else ROWS)]
        return []

    def run(self, kind: int, group: int, index: int) -> None:
        for key, count in self.needs(kind, group, index):
            assert self.done[key] == count, (kind, group, index, key, self.done[key], count)
        self.done[kind, group] += 1
        if kind in (MIDDLE, ROWS, TAPS):
            self.done[kind, group, self.of_part(kind, index)] += 1


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
    for kind in range(7):
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
        assert plan.scratch_bytes <= max((72 if backward else 48) << 20, (3 if backward else 1) * 4 * 4 * fft_size)
        assert plan.scratch_bytes + plan.sums_bytes + plan.energy_bytes + plan.counter_bytes <= output // 8
    alone = lay_out(fft_size, True, length, 1, 1, False)
    assert alone.ring == alone.group_pairs == 1 and alone.scratch_bytes == 4 * fft_size


def test_the_longest() -> None:
    assert long_plan.outer_radix(1 << 24, True) * MIDDLE_RADIX * ROW_POINTS == 1 << 24
    assert long_plan.outer_radix(1 << 23, False) == 32
