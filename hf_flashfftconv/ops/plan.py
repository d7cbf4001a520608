"""Which transform serves a convolution: pure arithmetic on lengths, without a device."""

from functools import lru_cache
from typing import NamedTuple

from .tables import COLUMNS

# What one thread block transforms in shared memory.
MAX_TILE_FFT_SIZE = 8192
# Causal sequences that are longer may go block by block through transforms of two blocks: the work on the transforms of
# earlier blocks grows with the filter's windows.
BLOCK_POSITIONS = 4096
MAX_WINDOWS = 16
# Or a cluster of thread blocks shares a transform, each holding so many points: its work does not grow with the filter,
# but the larger the cluster, the more passes between the blocks. It is slower, as measured, than so many windows.
CLUSTER_POINTS = 8192
CLUSTERS = {2: 0, 4: 1, 8: 2, 16: 4}
# Blocks of longer sequences are those of one thread block (0) or of a cluster, for filters of up to so many windows,
# forward and backward; the first that fit are the fastest, as measured. More windows leave the L2 cache, and would cost
# float16 outputs more than their bound.
BLOCKED = ((0, 5, 5), (8, 5, 5), (16, 10, 12), (0, MAX_WINDOWS, MAX_WINDOWS))
# So many windows that reach over a whole FFT are slower, as measured, than that FFT in several passes.
FULL_WINDOWS = 8
# Before these come, forward, pairs of channels.
PAIRED = ((8, 5), (16, MAX_WINDOWS))
# Channels that go at a time, where the spectra of all would need too much memory, are a multiple of this.
CHANNEL_STEP = 4
# All others that are longer go through global memory in several passes.
MAX_FFT_SIZE = 1 << 24
MAX_FULL_FFT_SIZE = 1 << 23


class Plan(NamedTuple):
    """A transform of the kernels.

    Args:
        fft_size (`int`): Points of the FFT, 256 times a power of two.
        half (`bool`): Whether inputs and outputs lie in its first half, so that the work on the other half is left out.
        windows (`int`, *optional*, defaults to 0):
            Of sequences in blocks of half the FFT, the windows of the filter: its spectra around lags a block apart.
        cluster (`int`, *optional*, defaults to 0):
            Thread blocks that share the transform, of a sequence or of a block of it, if several do.
        channel_pairs (`bool`, *optional*, defaults to `False`):
            Whether two neighbouring channels share a transform, which two sequences of a channel do otherwise: blocks
            of clusters in a batch of one, where else half of the work would be in vain.
    """

    fft_size: int
    half: bool
    windows: int = 0
    cluster: int = 0
    channel_pairs: bool = False

    @property
    def points(self) -> int:
        """Points of a filter's spectrum, of all windows."""
        return self.fft_size * max(1, self.windows)

    def blocks(self, length: int) -> int:
        """Transforms of a sequence."""
        return -(-length // (self.fft_size // 2)) if self.windows else 1

    @property
    def on_one_block(self) -> bool:
        """Whether one thread block transforms a whole sequence in one piece."""
        return self.fft_size <= MAX_TILE_FFT_SIZE and not self.windows

    @property
    def has_turns(self) -> bool:
        """Whether gradients are one launch in which every pair has two turns, of those that one block cannot hold."""
        return self.cluster > 0 and not self.windows

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
    pair_windows: int = 0,
) -> Plan | str:
    """The transform for sequences of `length` and filters of `taps` and `reverse_taps`, or why there is none.

    On a circle of N points the output at t also receives what belongs at t + N and t - N. The linear convolution
    reaches from -R to L + K - 2, and the outputs are those from 0 to L - 1; none of them is reached if
    N > L + K - 2 and N > L - 1 + R. Taps beyond the sequence (K > L, R > L - 1) meet only zeros and are cut.

    Only if `in_blocks` may sequences go in blocks, only if `in_clusters` may a cluster share a transform. Neighbouring
    channels may for filters of up to `pair_windows` windows.
    """
    if causal:
        needed = length + max(reach(length, taps, reverse_taps))
        size = max(COLUMNS, 1 << (needed - 1).bit_length())
        half = size > COLUMNS and length <= size // 2
        blocked = in_blocks and reverse_taps == 0
        windows = windows_of(length, taps) if blocked else MAX_WINDOWS + 1
        cluster = size // CLUSTER_POINTS
        if in_clusters and half and windows > CLUSTERS.get(cluster, windows):
            return Plan(size, half, 0, cluster)
        kinds = [(cluster, min(most, pair_windows), True) for cluster, most in PAIRED]
        kinds += [(cluster, most[backward], False) for cluster, *most in BLOCKED]
        for cluster, most, pairs in kinds if blocked else ():
            block = BLOCK_POSITIONS * max(1, cluster)
            windows = windows_of(length, taps, block)
            full = windows >= FULL_WINDOWS and 2 * windows * block >= size and cluster > 0 and not pairs
            wanted = _wants_blocks(cluster, length, size, backward) and windows <= most and not full
            if wanted and (in_clusters or not cluster):
                return Plan(2 * block, True, windows, cluster, pairs)
    else:
        size, half = length, False
        if size % COLUMNS or size & (size - 1):
            return f"the kernels convolve circularly at powers of two from {COLUMNS} on, and the length is {length}"
    if size > MAX_FFT_SIZE:
        return f"sequence and filter need an FFT of {size} points, and the kernels have up to {MAX_FFT_SIZE}"
    if not half and size > MAX_FULL_FFT_SIZE:
        return f"there is no kernel for an FFT of {size} points whose second half is in use"
    return Plan(size, half)


def _wants_blocks(cluster: int, length: int, size: int, backward: bool) -> bool:
    """Whether a sequence may go in blocks; gradients gain by those of one thread block as soon as there are two."""
    if cluster:
        return length > max(CLUSTERS) * CLUSTER_POINTS // 2
    return length > BLOCK_POSITIONS if backward else size > MAX_TILE_FFT_SIZE


@lru_cache(maxsize=1024)
def channel_block(count: int, most: int, pairs: int, workers: int, channel_pairs: bool) -> int:
    """Channels that go at a time if `most` of the `count` may, each with so many `pairs` of sequences.

    The last of the `workers` that share the pairs is to have as much as the others: fewest rounds, where each block
    costs half a round more. Of these blocks the largest.
    """
    if most >= count:
        return count
    unit = 2 if channel_pairs else 1
    if most < CHANNEL_STEP:
        return max(unit, most - most % unit)

    def cost(block: int) -> float:
        blocks = [block] * (count // block) + [count % block] * (count % block > 0)
        return sum(-(-channels // unit * pairs // workers) + 0.5 for channels in blocks)

    return min(range(most - most % CHANNEL_STEP, 0, -CHANNEL_STEP), key=cost)


def windows_of(length: int, taps: int, block: int = BLOCK_POSITIONS) -> int:
    """Windows of a causal filter: window d has the taps less than a block away from d blocks."""
    return min(-(-length // block), (min(taps, length) + block - 2) // block + 1)


def reach(length: int, taps: int, reverse_taps: int) -> tuple[int, int]:
    """How many positions before and after its own an output of a causal or bidirectional convolution depends on."""
    return min(taps, length) - 1, min(reverse_taps, length - 1)
