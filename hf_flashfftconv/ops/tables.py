"""Constant operands of the CUDA kernels: DFT matrices and twiddles in the order in which the lanes of a warp read them.

The index maps are those of csrc/transform.cuh: a lane has `r = lane // 4` and `q = lane % 4`; half `i` of a fragment
pair `s` stands for the index `q + 4 s + 8 i` of the contracted axis, row or column `j` of fragment `t` for `2 j + t` of
the other one.
"""

from functools import cache

import torch
from torch import Tensor

from ..errors import BackendError
from .pools import outside_of_pools

COLUMNS = 256
_LANE = torch.arange(32, device="cpu")
_R, _Q = _LANE // 4, _LANE % 4


def tile_rows(fft_size: int) -> int:
    """Rows of 256 points that one thread block holds: one pair of sequences, or several pairs of short ones."""
    return 16 if fft_size == COLUMNS else 32


def words(low: Tensor, high: Tensor) -> Tensor:
    """Packs two real tensors as half-precision pairs into int32 words."""
    return torch.stack([low, high], -1).to(torch.float16).contiguous().view(torch.int32).squeeze(-1)


def _root(index: Tensor, order: int) -> Tensor:
    """exp(-2 pi i index / order) in double precision."""
    angle = (index % order).double() * (-2 * torch.pi / order)
    return torch.complex(angle.cos(), angle.sin())


def _pair(index_of: "list[Tensor]", order: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Words of the real and of the imaginary parts of two roots of unity."""
    low, high = (_root(index, order) * scale for index in index_of)
    return words(low.real, high.real), words(low.imag, high.imag)


def _negated(word: Tensor) -> Tensor:
    return word ^ torch.tensor(-0x7FFF8000, dtype=torch.int32)


def _contracted(s: int) -> list[Tensor]:
    return [_Q + 4 * s + 8 * i for i in (0, 1)]


def _inner() -> Tensor:
    """A and B operands of the DFT of 16 points (scaled to be unitary) and the twiddles w256^(k2 n3)."""
    a_operands, b_operands, twiddles = [], [], []
    for m in (0, 1):
        for s in (0, 1):
            cos, sin = _pair([n * (2 * _R + m) for n in _contracted(s)], 16, 0.25)
            a_operands.append([cos, sin, _negated(sin), cos])
    for h in (0, 1):
        for t in (0, 1):
            output = _R // 2 + 4 * h + 8 * (_R % 2)
            cos, sin = _pair([(4 * _Q + 2 * i + t) * output for i in (0, 1)], 16, 0.25)
            b_operands.append([cos, _negated(sin), sin, cos])
    for m in (0, 1):
        pairs = [_pair([(2 * _R + m) * (4 * _Q + 2 * i + t) for i in (0, 1)], 256) for t in (0, 1)]
        twiddles.append([word for pair in pairs for word in pair])
    return torch.stack([torch.stack(operand, -1) for operand in a_operands + b_operands + twiddles])


def outer_scales(radix: int, cluster: int) -> tuple[float, float]:
    """Scales of the outer stage and of its inverse, together 1 / radix.

    In clusters they are powers of two: the rounding error of any other one would be the same in all outputs.
    """
    if cluster == 1:
        return radix**-0.5, radix**-0.5
    forward = 2.0 ** -(radix.bit_length() // 2)
    return forward, 1 / (radix * forward)


def _outer(radix: int, rows: int, folded: bool, cluster: int, rank: int) -> tuple[Tensor, Tensor]:
    """B operands of the outer stage and of its inverse, block diagonal over the pairs of sequences in a tile."""
    in_block = radix // cluster
    pairs = rows // in_block
    slots = pairs * (in_block // 2 if folded else in_block)
    scales = outer_scales(radix, cluster)

    def entries(slot: Tensor, row: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """What the first and the second sequence of a pair are multiplied by."""
        kept = scale * (slot % pairs == row // in_block)
        position = cluster * (slot // pairs) + rank
        first = _root(position * _quarters(row % in_block, folded), 4 * radix)
        second = _root((position + radix // 2) * _quarters(row % in_block, folded), 4 * radix) if folded else 1j * first
        return first * kept, second * kept

    def fragments(contracted_tiles: int, output_tiles: int, forward: bool) -> list[list[Tensor]]:
        table = []
        for s in range(contracted_tiles):
            row_of_tiles = []
            for n in range(output_tiles):
                operands = []
                for x in (8 * s + _Q, 8 * s + 4 + _Q):
                    output = 4 * n + _R // 2
                    if forward:
                        first, second = entries(x, output, scales[0])
                        real, imaginary = words(first.real, second.real), words(first.imag, second.imag)
                    else:
                        # From the conjugate; the second sequence comes out negative.
                        first, second = entries(output, x, scales[1])
                        real, imaginary = words(first.real, -first.imag), words(-second.real, second.imag)
                    operands.append(torch.where(_R % 2 == 0, real, imaginary))
                row_of_tiles.append(torch.stack(operands, -1))
            table.append(row_of_tiles)
        return table

    forward = fragments(slots // 8, rows // 4, True)
    inverse = fragments(rows // 8, slots // 4, False)
    output_pairs, back_pairs = range(0, rows // 4, 2), range(0, slots // 4, 2)
    outer = [torch.cat(forward[s][n : n + 2], -1) for n in output_pairs for s in range(slots // 8)]
    back = [torch.cat(inverse[s][n : n + 2], -1) for s in range(rows // 8) for n in back_pairs]
    return torch.stack(outer), torch.stack(back)


def _quarters(frequency: Tensor, folded: bool) -> Tensor:
    """A frequency in quarters: folded transforms are taken a quarter beyond those of the FFT."""
    return 4 * frequency + folded


def _row_twiddles(fft_size: int, folded: bool, cluster: int) -> Tensor:
    """w_N^(k1 p) for every row k1 of a pair, in a cluster block after block, and every column p."""
    rows = fft_size // COLUMNS // cluster
    # A block has neighbours of the outer stage's frequencies, and of each those that lie `rows` apart.
    own = torch.arange(rows).view(cluster, 1, -1) + rows * torch.arange(cluster).view(1, -1, 1)
    k1 = _quarters(own.view(-1, 1), folded)
    table = []
    for s in (0, 1):
        values: list[Tensor] = []
        for t in (0, 1):
            values += _pair([k1 * (16 * n2 + 2 * _R + t) for n2 in _contracted(s)], 4 * fft_size)
        table.append(torch.stack(values, -1))
    return torch.stack(table, 1)


def transform_tables(fft_size: int, folded: bool, cluster: int = 1) -> Tensor:
    """All constants of one transform as int32 words on the CPU, in the order of `Tables` in csrc/transform.cuh."""
    with torch.device("cpu"):
        rows = tile_rows(fft_size // cluster)
        outer = [_outer(fft_size // COLUMNS, rows, folded, cluster, rank) for rank in range(cluster)]
        stages = [torch.stack(part) for part in zip(*outer, strict=True)]
        return torch.cat([part.flatten() for part in (_inner(), *stages, _row_twiddles(fft_size, folded, cluster))])


def upload(constant: Tensor, device: torch.device) -> Tensor:
    """Copies a constant to a device, where it stays.

    Raises:
        BackendError: a CUDA graph is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise BackendError("the first call of its kind cannot be captured in a CUDA graph: make one before the capture")
    return outside_of_pools(lambda: constant.to(device), device)


# Never dropped: captured graphs keep the addresses.
@cache
def device_tables(fft_size: int, folded: bool, cluster: int, device: torch.device) -> Tensor:
    """The same as `transform_tables` on a device."""
    return upload(transform_tables(fft_size, folded, cluster), device)
