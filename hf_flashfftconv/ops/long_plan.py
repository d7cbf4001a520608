"""How the kernels lay out a convolution that one thread block cannot hold: passes, groups of pairs, tickets, memory.

csrc/long.cuh has the mathematics. Nothing here depends on the device, so that results do not either.
"""

from functools import lru_cache
from typing import NamedTuple

# Points that one block transforms on chip, the radix of the middle pass, and the positions of one sum of energies.
ROW_POINTS = 8192
MIDDLE_RADIX = 32
PART_POSITIONS = 16384

# Intermediates of a group of pairs; two groups are under way, and all that they need at a time is to stay in the L2
# cache of a data-centre GPU. From 2^21 points on a group is one pair, which is larger.
GROUP_BYTES = 8 << 20
RING = 2

# Points of an item of the outer passes, and tickets that lie between an item and those that it waits for, as far as
# there are so many: more than there are blocks on the largest GPUs.
_ITEM_POINTS = 16384
_DISTANCE = 320

SCALE, OUTER, MIDDLE, ROWS, MIDDLE_BACK, INVERSE = range(6)


class LongPlan(NamedTuple):
    """The layout of one launch: fields of `fft_conv_params`, and `schedule`.

    Args:
        outer_radix (`int`): Radix of the first pass; the FFT has this times 8192 points, or 32 times as many.
        group_pairs (`int`): Pairs of sequences that go through the passes together.
        ring (`int`): Groups whose intermediates have a place in memory.
        part_count (`int`): Partial energies of a sequence.
        column_items, middle_items (`int`): Items of an outer pass over a pair, of a middle pass over a part of a pair.
        row_pairs (`int`): Pairs of an item of the row pass.
        tickets (`int`): Items of the launch, with some at its ends that are empty.
        scratch_bytes (`int`): Intermediates: 4 bytes a point of the pairs in the ring, at most 16 MiB or two pairs.
        energy_bytes (`int`): Partial energies: 8 bytes for each 16,384 positions.
        counter_bytes (`int`): Counters of what is done.
    """

    outer_radix: int
    group_pairs: int
    ring: int
    part_count: int
    column_items: int
    middle_items: int
    row_pairs: int
    tickets: int
    scratch_bytes: int
    energy_bytes: int
    counter_bytes: int


def outer_radix(fft_size: int, half: bool) -> int:
    """The radix of the outer pass: all beyond a row, if its 32 slots can take that, or what a middle pass leaves."""
    radix = fft_size // ROW_POINTS
    return radix if radix <= (64 if half else 32) else radix // MIDDLE_RADIX


@lru_cache(maxsize=256)
def lay_out(fft_size: int, half: bool, length: int, pairs: int) -> LongPlan:
    """The layout for `pairs` pairs of sequences of `length` positions."""
    outer = outer_radix(fft_size, half)
    group_pairs = max(1, min(pairs, GROUP_BYTES // (4 * fft_size)))
    groups = -(-pairs // group_pairs)
    ring = min(RING, groups)
    parts = -(-length // PART_POSITIONS)
    chunks = fft_size // outer // 256
    column_items = chunks // max(1, _ITEM_POINTS // 256 // outer)
    subs = outer if fft_size > outer * ROW_POINTS else 1
    row_pairs = 2 if group_pairs >= 8 else 1
    plan = LongPlan(
        outer_radix=outer,
        group_pairs=group_pairs,
        ring=ring,
        part_count=parts,
        column_items=column_items,
        middle_items=16,
        row_pairs=row_pairs,
        tickets=0,
        scratch_bytes=4 * fft_size * group_pairs * ring,
        energy_bytes=8 * pairs * 2 * parts,
        counter_bytes=4 * (1 + groups * (4 + 2 * subs)),
    )
    return plan._replace(tickets=len(schedule(fft_size, plan)) * (groups + _DELAYS))


# Periods from the first item of a group to its last, less one.
_DELAYS = 3


def schedule(fft_size: int, plan: LongPlan) -> list[tuple[int, int, int]]:
    """The items of one period: (kind, delay, index). In period t, an item works on group t - delay.

    Passes follow each other so that what an item waits for was handed out long before: the way back of the last but one
    group, the row pass, with the sums of energies amid it, of the group before, the outer pass of this one. So at most
    two groups have intermediates, and inputs come from memory shortly before their second use.
    """
    rows = _rows_with_middle(fft_size, plan) if fft_size > plan.outer_radix * ROW_POINTS else _rows(fft_size, plan)
    columns = range(plan.group_pairs * plan.column_items)
    middle = len(rows) // 2
    items = [(INVERSE, 3, index) for index in columns]
    items += [(kind, 2, index) for kind, index in rows[:middle]]
    items += [(SCALE, 1, index) for index in range(plan.group_pairs * plan.part_count)]
    items += [(kind, 2, index) for kind, index in rows[middle:]]
    return items + [(OUTER, 1, index) for index in columns]


def _row_items(plan: LongPlan) -> int:
    return -(-plan.group_pairs // plan.row_pairs)


def _rows(fft_size: int, plan: LongPlan) -> list[tuple[int, int]]:
    return [(ROWS, index) for index in range(fft_size // ROW_POINTS * _row_items(plan))]


def _rows_with_middle(fft_size: int, plan: LongPlan) -> list[tuple[int, int]]:
    """Part after part through the three passes, each `behind` parts behind the one before."""
    counts = {
        MIDDLE: plan.group_pairs * plan.middle_items,
        ROWS: MIDDLE_RADIX * _row_items(plan),
        MIDDLE_BACK: plan.group_pairs * plan.middle_items,
    }
    behind = -(-_DISTANCE // sum(counts.values()))
    items = []
    for step in range(plan.outer_radix + 2 * behind):
        for n, (kind, count) in enumerate(counts.items()):
            part = step - n * behind
            if 0 <= part < plan.outer_radix:
                items += [(kind, part * count + index) for index in range(count)]
    return items
