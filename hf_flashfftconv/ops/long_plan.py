"""How the kernels lay out a convolution that one thread block cannot hold: passes, groups of pairs, tickets, memory.

csrc/long.cuh has the mathematics. Nothing here depends on the device, so that results do not either.
"""

from functools import lru_cache
from typing import NamedTuple

# Points that one block transforms on chip, the largest radix of a second outer stage, and the positions of one sum of
# energies.
ROW_POINTS = 8192
MAX_MIDDLE_RADIX = 32
PART_POSITIONS = 16384

# Points of an item of the outer passes.
ITEM_POINTS = 16384

# Intermediates of a group of pairs, to stay in the L2 cache of a data-centre GPU between the passes. A forward pass has
# small groups and many under way; a backward pass larger ones, as its sums over the batch go through memory from group
# to group. From 2^19 or 2^20 points on a group is one pair, which is larger.
FORWARD_GROUP_BYTES = 2 << 20
BACKWARD_GROUP_BYTES = 8 << 20

# Tickets that lie between an item and those that it waits for, as far as there are so many: more than there are blocks
# on the largest GPUs. And the most groups that a pass may be behind the one before to reach it.
_DISTANCE = 400
_MAX_GAP = 4

SCALE, OUTER, ROWS, INVERSE, TAPS = range(5)


class LongPlan(NamedTuple):
    """The layout of one launch: fields of `fft_conv_params`, and bytes of memory.

    Args:
        outer_radix (`int`): Radix of the first stage; the FFT has this times 8192 points, or 8, 16 or 32 times as many.
        group_pairs (`int`): Pairs of sequences that go through the passes together.
        group_channels (`int`): In a backward pass, channels that these pairs are all pairs of, or one; else one.
        channel_splits (`int`): Groups that the pairs of a channel are split into, in a backward pass.
        ring (`int`): Groups whose intermediates have a place in memory.
        part_count (`int`): Partial energies of a sequence.
        column_items (`int`): Items of an outer pass over a pair.
        row_steps (`int`): Rows of an item of the row pass, in a backward pass pairs that share one row's sums.
        tickets (`int`): Items of the launch, with some at its ends that are empty.
        scratch_bytes (`int`):
            Intermediates, 4 bytes a point: of a pair in a forward pass, of each of its two operands and of a channel
            in a backward one. They take up to 48 MiB, in a backward pass 96, or seven pairs if these take more.
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
    row_steps: int
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
    """The radix of the outer pass's first stage: all beyond a row, if its 32 slots can take that.

    Else so much that a second stage, of radix 8, 16 or 32, takes the rest, and the first fills 8 or 32 slots.
    """
    radix, used = fft_size // ROW_POINTS, 2 if half else 1
    if radix <= 32 * used:
        return radix
    return (8 if radix <= 8 * MAX_MIDDLE_RADIX * used else 32) * used


@lru_cache(maxsize=256)
def lay_out(fft_size: int, half: bool, length: int, batch: int, channels: int, backward: bool) -> LongPlan:
    """The layout for sequences (batch, channels, length)."""
    radix, outer = fft_size // ROW_POINTS, outer_radix(fft_size, half)
    operands = 2 if backward else 1
    channel_pairs = (batch + 1) // 2
    pairs = channel_pairs * channels

    room = max(1, (BACKWARD_GROUP_BYTES if backward else FORWARD_GROUP_BYTES) // (4 * fft_size * operands))
    group_channels = channel_splits = 1
    if not backward:
        group_pairs = min(room, pairs)
        row_steps = 2
    elif room >= channel_pairs:
        group_channels = min(room // channel_pairs, channels)
        group_pairs = group_channels * channel_pairs
        row_steps = min(4, channel_pairs)
    else:
        channel_splits = -(-channel_pairs // room)
        group_pairs = row_steps = -(-channel_pairs // channel_splits)
        row_steps = min(4, group_pairs)
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
        column_items=fft_size // ITEM_POINTS,
        row_steps=row_steps,
        tickets=0,
        scratch_bytes=0,
        sums_bytes=0,
        energy_bytes=8 * pairs * operands * 2 * parts,
        counter_bytes=4 * (1 + 5 * groups),
    )
    order, counts, delays = _passes(fft_size, plan, backward)
    period = sum(counts.values())
    # An item of the outer pass waits until its place is free as others wait for the pass before.
    ring = min(groups, delays[INVERSE] - delays[OUTER] + _gap(order, counts, INVERSE, OUTER))
    sums = ring * group_channels * -(-group_pairs // group_channels // row_steps) * radix
    return plan._replace(
        ring=ring,
        tickets=period * (groups + delays[INVERSE]),
        scratch_bytes=4 * fft_size * sheets * ring,
        sums_bytes=sums * (8 * ROW_POINTS + 8) + 8 * channels if backward else 0,
    )


def schedule(fft_size: int, plan: LongPlan, backward: bool) -> list[tuple[int, int, int]]:
    """The items of one period: (kind, delay, index). In period t, an item works on group t - delay.

    Each pass comes before the one that it needs, which has done its group in an earlier period: so an item waits for
    nothing that other blocks have only just begun, if enough tickets lie between.
    """
    order, counts, delays = _passes(fft_size, plan, backward)
    return [(kind, delays[kind], index) for kind in order for index in range(counts[kind])]


def _passes(fft_size: int, plan: LongPlan, backward: bool) -> tuple[list[int], dict[int, int], dict[int, int]]:
    """The order of the passes in a period, the items of each, and how many groups it is behind the first."""
    radix = fft_size // ROW_POINTS
    sheets = plan.group_pairs * (2 if backward else 1)
    taps = plan.group_channels if backward else 0
    splits = -(-plan.group_pairs // plan.group_channels // plan.row_steps)
    counts = {
        TAPS: radix * taps,
        INVERSE: (sheets + taps) * plan.column_items,
        ROWS: radix * plan.group_channels * splits if backward else -(-radix * plan.group_pairs // plan.row_steps),
        OUTER: sheets * plan.column_items,
        SCALE: sheets * plan.part_count,
    }
    order = list(counts)
    delays = {SCALE: 0}
    delays[OUTER] = _gap(order, counts, SCALE, OUTER)
    delays[ROWS] = delays[OUTER] + _gap(order, counts, OUTER, ROWS)
    # The taps' sheets are the last of the inverse pass.
    delays[TAPS] = delays[INVERSE] = delays[ROWS] + _gap(order, counts, ROWS, TAPS)
    return order, counts, delays


def _gap(order: list[int], counts: dict[int, int], first: int, second: int) -> int:
    """Periods from one pass to another, so that `_DISTANCE` tickets lie between the two."""
    start = {kind: sum(counts[x] for x in order[: order.index(kind)]) for kind in order}
    wanted = _DISTANCE + start[first] + counts[first] - start[second]
    return min(max(1, -(-wanted // sum(counts.values()))), _MAX_GAP)
