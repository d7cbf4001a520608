"""Which transform serves a convolution: pure arithmetic on lengths, without a device."""

from functools import lru_cache
from typing import NamedTuple

from .tables import COLUMNS

# What one thread block transforms in shared memory: whole sequences or, where filters are short against them, their
# blocks. The work on the transforms of earlier blocks grows with the filter's windows.
MAX_TILE_FFT_SIZE = BLOCK_POSITIONS = 8192
MAX_WINDOWS = 16
# The smallest transform that may be folded.
MIN_FOLDED_FFT_SIZE = 2 * COLUMNS
# Or a cluster of thread blocks shares a transform, each holding so many points: its work does not grow with the filter,
# but the larger the cluster, the more passes between the blocks. Forward it is slower, as measured, than so many
# windows; gradients, which would have to keep the transforms of blocks, gain by it always.
CLUSTER_POINTS = 8192
CLUSTERS = {2: 0, 4: 1, 8: 1, 16: 3}
# Blocks of longer sequences are those of one thread block (0) or of a cluster, for filters of up to so many windows:
# the first that fit are the fastest, as measured. More windows leave the L2 cache, and would cost float16 outputs more
# than their bound.
BLOCKED_FORWARD = ((0, 5), (8, 5), (16, 10), (0, MAX_WINDOWS))
BLOCKED_BACKWARD = ((8, 5), (16, 12), (0, MAX_WINDOWS))
# So many windows that reach over a whole FFT are slower, as measured, than that FFT in several passes.
FULL_WINDOWS = 8
# Channels that go at a time, where the spectra of all would need too much memory, are a multiple of this.
CHANNEL_STEP = 4
# All others that are longer go through global memory in several passes.
MAX_FFT_SIZE = 1 << 23


class Plan(NamedTuple):
    """A transform of the kernels.

    Args:
        fft_size (`int`): Points of the FFT, 256 times a power of two.
        folded (`bool`):
            Whether each sequence, of up to so many positions, has a transform of its own; else two of a channel share
            one, and the convolution is that on its circle.
        windows (`int`, *optional*, defaults to 0):
            Of sequences in blocks as long as the FFT, the windows of the filter: its spectra around lags a block apart.
        cluster (`int`, *optional*, defaults to 0):
            Thread blocks that share the transform, of a sequence or of a block of it, if several do.
    """

    fft_size: int
    folded: bool
    windows: int = 0
    cluster: int = 0

    @property
    def points(self) -> int:
        """Points of a filter's spectrum, of all windows."""
        return self.fft_size * max(1, self.windows)

    def blocks(self, length: int) -> int:
        """Transforms of a sequence."""
        return -(-length // self.fft_size) if self.windows else 1

    def pairs(self, batch: int) -> int:
        """What goes through a transform at a time, in a channel: pairs of sequences or, folded, of halves of one."""
        return batch if self.folded else (batch + 1) // 2

    @property
    def on_one_block(self) -> bool:
        """Whether one thread block transforms a whole sequence in one piece."""
        return self.fft_size <= MAX_TILE_FFT_SIZE and not self.windows

    @property
    def has_backward(self) -> bool:
        """Whether gradients have a kernel of their own, in one launch; others are two launches of the forward one."""
        return self.on_one_block or (self.cluster > 0 and not self.windows)

    @property
    def is_long(self) -> bool:
        """Whether it takes the kernels of csrc/long.cuh."""
        return not self.cluster and self.fft_size > MAX_TILE_FFT_SIZE


@lru_cache(maxsize=1024)
def choose(
    length: int,
    taps: int,
    reverse_taps: int,
    causal: bool,
    backward: bool = False,
    in_blocks: bool = True,
    in_clusters: bool = True,
) -> Plan | str:
    """The transform for sequences of `length` and filters of `taps` and `reverse_taps`, or why there is none.

    On a circle of N positions the output at t also receives what belongs at t + N and t - N. The linear convolution
    reaches from -R to L + K - 2, and the outputs are those from 0 to L - 1; none of them is reached if
    N > L + K - 2 and N > L - 1 + R. Taps beyond the sequence (K > L, R > L - 1) meet only zeros and are cut.

    A folded transform has such a circle of twice its points, and outputs on the first half of it.

    Only if `in_blocks` may sequences go in blocks, only if `in_clusters` may a cluster share a transform.
    """
    if causal:
        needed = length + max(reach(length, taps, reverse_taps))
        size = max(COLUMNS, 1 << (needed - 1).bit_length())
        folded = size > COLUMNS and length <= size // 2
        size = max(MIN_FOLDED_FFT_SIZE, size // 2) if folded else size
        blocked = in_blocks and reverse_taps == 0
        windows = windows_of(length, taps) if blocked else MAX_WINDOWS + 1
        cluster = size // CLUSTER_POINTS
        if in_clusters and folded and cluster in CLUSTERS and (backward or windows > CLUSTERS[cluster]):
            return Plan(size, folded, 0, cluster)
        for cluster, most in (BLOCKED_BACKWARD if backward else BLOCKED_FORWARD) if blocked else ():
            block = BLOCK_POSITIONS * max(1, cluster)
            windows = windows_of(length, taps, block)
            full = windows >= FULL_WINDOWS and windows * block >= size and cluster > 0
            wanted = _wants_blocks(cluster, length, size, backward) and windows <= most and not full
            if wanted and (in_clusters or not cluster):
                return Plan(block, True, windows, cluster)
    else:
        size, folded = length, False
        if size % COLUMNS or size & (size - 1):
            return f"the kernels convolve circularly at powers of two from {COLUMNS} on, and the length is {length}"
    if size > MAX_FFT_SIZE:
        return f"sequence and filter need an FFT of {size} points, and the kernels have up to {MAX_FFT_SIZE}"
    return Plan(size, folded)


def _wants_blocks(cluster: int, length: int, size: int, backward: bool) -> bool:
    """Whether a sequence may go in blocks; gradients gain by those of one thread block as soon as there are two."""
    if cluster:
        return length > max(CLUSTERS) * CLUSTER_POINTS
    return length > BLOCK_POSITIONS if backward else size > MAX_TILE_FFT_SIZE


@lru_cache(maxsize=1024)
def channel_block(count: int, most: int, pairs: int, workers: int) -> int:
    """Channels that go at a time if `most` of the `count` may, each with so many `pairs` (see [`Plan`]).

    The last of the `workers` that share the pairs is to have as much as the others: fewest rounds, where each block
    costs half a round more. Of these blocks the largest.
    """
    if most >= count:
        return count
    if most < CHANNEL_STEP:
        return max(1, most)

    def cost(block: int) -> float:
        blocks = [block] * (count // block) + [count % block] * (count % block > 0)
        return sum(-(-channels * pairs // workers) + 0.5 for channels in blocks)

    return min(range(most - most % CHANNEL_STEP, 0, -CHANNEL_STEP), key=cost)


def windows_of(length: int, taps: int, block: int = BLOCK_POSITIONS) -> int:
    """Windows of a causal filter: window d has the taps less than a block away from d blocks."""
    return min(-(-length // block), (min(taps, length) + block - 2) // block + 1)


def reach(length: int, taps: int, reverse_taps: int) -> tuple[int, int]:
    """How many positions before and after its own an output of a causal or bidirectional convolution depends on."""
    return min(taps, length) - 1, min(reverse_taps, length - 1)
