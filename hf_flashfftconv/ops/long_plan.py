"""How the kernels lay out a convolution that one thread block cannot hold: passes, groups of pairs, tickets, memory.

csrc/long.cuh has the mathematics. Nothing here depends on the device, so that results do not either.
"""

from functools import lru_cache
from typing import NamedTuple

# Points that one block transforms on chip, the radices of a second outer stage, and the positions of one sum of
# energies.
ROW_POINTS = 8192
MIDDLE_RADICES = (8, 32)
PART_POSITIONS = 16384

# Slots of the first outer stage that most kernels have.
FEW_SLOTS = 8

# Points of an item of the outer passes; twice as many where its columns would be less than a line of 128 bytes. With
# two outer stages its columns are of one chunk.
ITEM_POINTS = 8192
LINE_COLUMNS, CHUNK_COLUMNS = 32, 256

# Intermediates of a group of pairs: small groups, of which many are under way, stay in the L2 cache of a data-centre
# GPU between the passes. From FFTs of 2^20 points on a group is one pair, which may be larger.
GROUP_BYTES = 4 << 20

# Tickets that lie between an item and those that it waits for, as far as there are so many: nearly as many as the teams
# of warps of the largest GPUs hold, or with large groups, of which the L2 cache holds few, so many that the passes
# follow each other as closely as they can. As measured. And the most groups that a pass may be behind the one before to
# reach it.
_DISTANCE, _LARGE_DISTANCE = 900, 300
_MAX_GAP = 5


class LongPlan(NamedTuple):
    """The layout of one launch: fields of `fft_conv_params`, and bytes of memory.

    In period t, the passes work on the groups t - inverse_delay, t - row_delay, t - outer_delay and t, in this order:
    each comes before the one that it needs, which has done its group in an earlier period. So an item waits for nothing
    that other teams have only just begun, if enough tickets lie between.

    Args:
        outer_radix (`int`): Radix of the first stage; the FFT has this times 8192 points, or 8 or 32 times as many.
        group_pairs (`int`): Pairs of sequences, or of halves of one, that go through the passes together.
        ring (`int`): Groups whose intermediates have a place in memory.
        part_count (`int`): Partial energies of a sequence.
        column_items (`int`): Items of an outer pass over a pair.
        period (`int`): Tickets of a period: of the inverse pass, of rows, of the outer pass and of energies.
        tickets (`int`): Tickets of the launch, with some at its ends that are empty.
        outer_delay, row_delay, inverse_delay (`int`): How many groups a pass is behind the energies.
        scratch_bytes (`int`): Intermediates, 4 bytes a point: up to 40 MiB, or three pairs if these take more.
        energy_bytes (`int`): Scales of pairs, and partial energies, 8 bytes for each 16,384 positions.
        counter_bytes (`int`): Counters of what is done.
    """

    outer_radix: int
    group_pairs: int
    ring: int
    part_count: int
    column_items: int
    period: int
    tickets: int
    outer_delay: int
    row_delay: int
    inverse_delay: int
    scratch_bytes: int
    energy_bytes: int
    counter_bytes: int


def outer_radix(fft_size: int, folded: bool) -> int:
    """The radix of the outer pass's first stage: all beyond a row, if eight slots with data can take that.

    Else a second stage takes a radix of 8 or 32. Only the longest fill more slots, whose kernels need more shared
    memory than many GPUs have.
    """
    radix, most = fft_size // ROW_POINTS, FEW_SLOTS * (2 if folded else 1)
    if radix <= most:
        return radix
    small, large = MIDDLE_RADICES
    return radix // (small if radix <= small * most else large)


def transform_scale(fft_size: int, folded: bool) -> float:
    """What the forward transform of the passes is scaled by: each stage by a power of two near 1 / sqrt(radix)."""
    outer = outer_radix(fft_size, folded)
    stages = outer, fft_size // ROW_POINTS // outer, 32, 16, 16
    return 0.5 ** sum(stage.bit_length() // 2 for stage in stages)


@lru_cache(maxsize=256)
def lay_out(fft_size: int, folded: bool, length: int, batch: int, channels: int) -> LongPlan:
    """The layout for sequences (batch, channels, length)."""
    pairs = (batch if folded else (batch + 1) // 2) * channels
    positions = min(length, fft_size // 2) if folded else length
    group_pairs = min(max(1, GROUP_BYTES // (4 * fft_size)), pairs)
    groups = -(-pairs // group_pairs)
    parts, rows = -(-positions // PART_POSITIONS), fft_size // ROW_POINTS
    outer = outer_radix(fft_size, folded)
    item_columns = ITEM_POINTS // rows
    if item_columns < LINE_COLUMNS:
        item_columns *= 2
    if outer < rows:
        item_columns = min(item_columns, CHUNK_COLUMNS)
    columns = ROW_POINTS // item_columns
    counts = [group_pairs * items for items in (columns, rows, columns, parts)]
    distance = _DISTANCE if 4 * fft_size <= 2 * GROUP_BYTES else _LARGE_DISTANCE

    def gap(first: int, second: int) -> int:
        """Periods from one pass to another, so that so many tickets lie between the two."""
        wanted = distance + sum(counts[: first + 1]) - sum(counts[:second])
        return min(max(1, -(-wanted // sum(counts))), _MAX_GAP)

    outer_delay = gap(3, 2)
    row_delay = outer_delay + gap(2, 1)
    inverse_delay = row_delay + gap(1, 0)
    # An item of the outer pass waits until its place is free as others wait for the pass before.
    ring = min(groups, inverse_delay - outer_delay + gap(0, 2))
    return LongPlan(
        outer_radix=outer,
        group_pairs=group_pairs,
        ring=ring,
        part_count=parts,
        column_items=columns,
        period=sum(counts),
        tickets=sum(counts) * (groups + inverse_delay),
        outer_delay=outer_delay,
        row_delay=row_delay,
        inverse_delay=inverse_delay,
        scratch_bytes=4 * fft_size * group_pairs * ring,
        energy_bytes=16 * pairs + 8 * pairs * 2 * parts,
        counter_bytes=4 * (1 + 4 * groups + pairs),
    )
