"""The layout of long convolutions: no ticket waits for a later one, every item is there once, memory is bounded."""

from collections import Counter

import pytest

from hf_flashfftconv.ops import long_plan
from hf_flashfftconv.ops.long_plan import ROW_POINTS, LongPlan, lay_out

SCALE, OUTER, ROWS, INVERSE = range(4)

# FFT size, folded, length, batch, channels
CASES = [
    (1 << 14, False, 16384, 4, 70),
    (1 << 15, True, 32768, 32, 3),
    (1 << 18, False, 262144, 9, 2),
    (1 << 19, True, 524287, 2, 4),
    (1 << 19, False, 524288, 2, 3),
    (1 << 20, True, 600000, 3, 2),
    (1 << 23, True, 1 << 23, 1, 2),
]


class Launch:
    """The rules of csrc/long.cuh: what a ticket stands for, what an item needs, and what a group has."""

    def __init__(self, fft_size: int, plan: LongPlan) -> None:
        self.plan, self.groups = plan, plan.tickets // plan.period - plan.inverse_delay
        self.passes = [
            (INVERSE, plan.column_items, plan.inverse_delay),
            (ROWS, fft_size // ROW_POINTS, plan.row_delay),
            (OUTER, plan.column_items, plan.outer_delay),
            (SCALE, plan.part_count, 0),
        ]
        self.counts = {kind: plan.group_pairs * parts for kind, parts, _ in self.passes}
        self.done: Counter[tuple[int, int]] = Counter()
        self.items: Counter[tuple[int, int, int, int]] = Counter()

    def item(self, ticket: int) -> tuple[int, int, int, int]:
        """Kind, group, pair and part."""
        step, index = divmod(ticket, self.plan.period)
        part, pair = divmod(index, self.plan.group_pairs)
        for kind, parts, delay in self.passes:
            if part < parts:
                return kind, step - delay, pair, part
            part -= parts
        raise AssertionError(ticket)

    def needs(self, kind: int, group: int) -> list[tuple[int, int]]:
        before = [] if kind == SCALE else [(kind - 1, group)]
        return before + ([(INVERSE, group - self.plan.ring)] if kind == OUTER and group >= self.plan.ring else [])

    def run(self, ticket: int) -> None:
        kind, group, pair, part = self.item(ticket)
        if not 0 <= group < self.groups:
            return
        for of, earlier in self.needs(kind, group):
            found, wanted = self.done[of, earlier], self.counts[of]
            assert found == wanted, (kind, group, of, earlier, found, wanted)
        self.done[kind, group] += 1
        self.items[kind, group, pair, part] += 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_item_comes_once_and_after_what_it_needs(case: tuple[int, bool, int, int, int]) -> None:
    fft_size, folded, _, batch, channels = case
    plan = lay_out(*case)
    launch = Launch(fft_size, plan)
    assert launch.groups * plan.group_pairs >= (batch if folded else (batch + 1) // 2) * channels
    for ticket in range(plan.tickets):
        launch.run(ticket)
    assert len(launch.items) == launch.groups * plan.period and set(launch.items.values()) == {1}
    assert all(
        launch.done[kind, group] == count for kind, count in launch.counts.items() for group in range(launch.groups)
    )


@pytest.mark.parametrize("log", range(14, 24))
def test_memory_is_bounded(log: int) -> None:
    length = fft_size = 1 << log
    output = 2 * 64 * 768 * length
    plan = lay_out(fft_size, True, length, 64, 768)
    assert plan.scratch_bytes <= max(40 << 20, 3 * 4 * fft_size)
    assert plan.scratch_bytes + plan.energy_bytes + plan.counter_bytes <= output // 8
    alone = lay_out(fft_size, True, length, 1, 1)
    assert alone.ring == alone.group_pairs == 1 and alone.scratch_bytes == 4 * fft_size


@pytest.mark.parametrize("folded", [False, True])
def test_stages_fit_the_kernels(folded: bool) -> None:
    """What csrc/api.cu checks: a radix of 512 for eight slots, of 1,024 for 32."""
    for log in range(14, 24):
        radix, outer = (1 << log) // ROW_POINTS, long_plan.outer_radix(1 << log, folded)
        slots = outer // 2 if folded else outer
        assert outer >= 2 and radix // outer in (1, *long_plan.MIDDLE_RADICES)
        assert slots <= 32 and radix <= (512 if slots <= 8 else 1024)
        # Blocks with less shared memory than an H100's hold what eight slots take.
        assert slots <= 8 or radix > (512 if folded else 256)
