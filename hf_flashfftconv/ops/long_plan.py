"""How the kernels lay out a convolution that one thread block cannot hold: passes, groups of pairs, tickets, memory.

csrc/long.cuh has the mathematics. Nothing here depends on the device, so that results do not either.
"""

from functools import lru_cache
from typing import NamedTuple

# Points that one block transforms on chip, the radix of the middle pass, and the positions of one sum of energies.
ROW_POINTS = 8192
MIDDLE_RADIX = 32
PART_POSITIONS = 16384

# Intermediates of a group of pairs: those under way at a time are to stay in the L2 cache of a data-centre GPU, as far
# as they can. From 2^21 points on a group is one pair, which is larger.
GROUP_BYTES = 8 << 20

# Points of an item of the outer passes, and tickets that lie between an item and those that it waits for, as far as
# there are so many: more than there are blocks on the largest GPUs.
_ITEM_POINTS = 16384
_DISTANCE = 320

SCALE, OUTER, MIDDLE, ROWS, MIDDLE_BACK, INVERSE, TAPS = range(7)


class LongPlan(NamedTuple):
    """The layout of one launch: fields of `fft_conv_params`, and bytes of memory.

    Args:
        outer_radix (`int`): Radix of the first pass; the FFT has this times 8192 points, or 32 times as many.
        group_pairs (`int`): Pairs of sequences that go through the passes together.
        group_channels (`int`): In a backward pass, channels that these pairs are all pairs of, or one; else one.
        channel_splits (`int`): Groups that the pairs of a channel are split into, in a backward pass.
        ring (`int`): Groups whose intermediates have a place in memory.
        part_count (`int`): Partial energies of a sequence.
        column_items, middle_items (`int`): Items of an outer pass over a pair, of a middle pass over a part of a pair.
        row_pairs (`int`): Pairs of an item of the row pass.
        tickets (`int`): Items of the launch, with some at its ends that are empty.
        scratch_bytes (`int`):
            Intermediates, 4 bytes a point: of a pair in a forward pass, of each of its two operands and of a channel
            in a backward one. They take up to 48 MiB, in a backward pass a half more, or four pairs if these take more.
        sums_bytes (`int`): Sums over the batch, 8 bytes a point of the channels in the ring and of their splits.
        energy_bytes (`int`): Partial energies, 8 bytes for each 16,384 positions of an operand.
        counter_bytes (`int`): Counters of what is done.
    """

    outer_radix: int
    group_pairs: int
    group_channels: int
    channel_splits: int
    ring: int
    part_count: int
    column_items: int
    middle_items: int
    row_pairs: int
    tickets: int
    scratch_bytes: int
    sums_bytes: int
    energy_bytes: int
    counter_bytes: int

    def period_key(self) -> "LongPlan":
        """The layout without what its schedule does not depend on."""
        rest = {"channel_splits": 0, "ring": 0, "tickets": 0}
        return self._replace(**rest, scratch_bytes=0, sums_bytes=0, energy_bytes=0, counter_bytes=0)


def outer_radix(fft_size: int, half: bool) -> int:
    """The radix of the outer pass: all beyond a row, if its 32 slots can take that, or what a middle pass leaves."""
    radix = fft_size // ROW_POINTS
    return radix if radix <= (64 if half else 32) else radix // MIDDLE_RADIX


@lru_cache(maxsize=256)
def lay_out(fft_size: int, half: bool, length: int, batch: int, channels: int, backward: bool) -> LongPlan:
    """The layout for sequences (batch, channels, length)."""
    radix, outer = fft_size // ROW_POINTS, outer_radix(fft_size, half)
    subs = outer if radix > outer else 1
    operands = 2 if backward else 1
    channel_pairs = (batch + 1) // 2
    pairs = channel_pairs * channels

    room = max(1, GROUP_BYTES // (4 * fft_size * operands))
    group_channels = channel_splits = 1
    if not backward:
        group_pairs = min(room, pairs)
        row_pairs = 2 if group_pairs >= 8 else 1
    elif room >= channel_pairs:
        group_channels = min(room // channel_pairs, channels)
        group_pairs = group_channels * channel_pairs
        row_pairs = min(4, channel_pairs)
    else:
        channel_splits = -(-channel_pairs // room)
        group_pairs = row_pairs = -(-channel_pairs // channel_splits)
        row_pairs = min(4, group_pairs)
    groups = channels * channel_splits if channel_splits > 1 else -(-pairs // group_pairs)

    parts = -(-length // PART_POSITIONS)
    sheets = group_pairs * operands + (group_channels if backward else 0)
    plan = LongPlan(
        outer_radix=outer,
        group_pairs=group_pairs,
        group_channels=group_channels,
        channel_splits=channel_splits,
        ring=0,
        part_count=parts,
        column_items=fft_size // outer // 256 // max(1, _ITEM_POINTS // 256 // outer),
        middle_items=16,
        row_pairs=row_pairs,
        tickets=0,
        scratch_bytes=0,
        sums_bytes=0,
        energy_bytes=8 * pairs * operands * 2 * parts,
        counter_bytes=4 * (1 + groups * (4 + 3 * subs)),
    )
    period = schedule(fft_size, plan, backward)
    # Periods from the first item of a group to its last, less one: as many groups have intermediates.
    depth = max(delay for _, delay, _ in period)
    ring = min(depth, groups)
    sums = ring * group_channels * -(-group_pairs // group_channels // row_pairs) * radix
    return plan._replace(
        ring=ring,
        tickets=len(period) * (groups + depth),
        scratch_bytes=4 * fft_size * sheets * ring,
        sums_bytes=sums * (8 * ROW_POINTS + 8) + 8 * channels if backward else 0,
    )


def schedule(fft_size: int, plan: LongPlan, backward: bool) -> list[tuple[int, int, int]]:
    """The items of one period: (kind, delay, index). In period t, an item works on group t - delay.

    Each pass comes before the one that it needs, which has done its group in an earlier period: so an item waits for
    nothing that other blocks have only just begun, if enough tickets lie between. Where a period has few, passes skip
    one. Measured on an H100, that and this order made a forward pass twice as fast as passes that follow closely.
    """
    operands = 2 if backward else 1
    taps = plan.group_channels if backward else 0
    sheets = plan.group_pairs * operands
    radix = fft_size // ROW_POINTS
    items = []
    if radix > plan.outer_radix:
        rows = _rows_with_middle(plan, sheets, taps)
    else:
        rows = [(ROWS, index) for index in range(radix * _row_items(plan))]
        items += [(TAPS, index) for index in range(radix * taps)]
    items += [(INVERSE, index) for index in range((sheets + taps) * plan.column_items)] + rows
    items += [(OUTER, index) for index in range(sheets * plan.column_items)]
    items += [(SCALE, index) for index in range(sheets * plan.part_count)]
    skip = 2 if len(items) < 4 * _DISTANCE else 1
    delays = {SCALE: 1, OUTER: 2, INVERSE: 2 + 2 * skip}
    if radix == plan.outer_radix:
        delays[TAPS] = delays[INVERSE]
    return [(kind, delays.get(kind, 2 + skip), index) for kind, index in items]


def _row_items(plan: LongPlan) -> int:
    return plan.group_channels * -(-plan.group_pairs // plan.group_channels // plan.row_pairs)


def _rows_with_middle(plan: LongPlan, sheets: int, taps: int) -> list[tuple[int, int]]:
    """Part after part through the passes, each `behind` parts behind the one before."""
    back = (sheets + taps) * plan.middle_items
    # Of each pass: how many passes come before, items of a part, which of them.
    passes = [
        (MIDDLE, 0, sheets * plan.middle_items, range(sheets * plan.middle_items)),
        (ROWS, 1, MIDDLE_RADIX * _row_items(plan), range(MIDDLE_RADIX * _row_items(plan))),
        (TAPS, 2, MIDDLE_RADIX * taps, range(MIDDLE_RADIX * taps)),
        (MIDDLE_BACK, 2, back, range(sheets * plan.middle_items)),
        (MIDDLE_BACK, 3, back, range(sheets * plan.middle_items, back)),
    ]
    behind = -(-_DISTANCE // sum(len(which) for *_, which in passes))
    items = []
    for step in range(plan.outer_radix + 3 * behind):
        for kind, before, count, which in passes:
            part = step - before * behind
            if 0 <= part < plan.outer_radix:
                items += [(kind, part * count + index) for index in which]
    return items
