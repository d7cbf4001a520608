// Geometry of a tile: what one thread block transforms at a time, and where its parts lie in shared memory.
//
// A transform of N = radix * 256 complex points has the points n = 256 n1 + p; a tile is `kRows` rows of 256 points: the `radix` rows of one
// pair of sequences, or of several pairs where the radix is below 32. Two batch rows of a channel form a pair: real and imaginary part.
#pragma once
#include "fft_conv.h"
#include "primitives.cuh"

constexpr int kColumns = 256;       // points of the inner transform, done by one warp in registers
constexpr int kRowPitch = 260;      // words between rows in shared memory: a 16-byte unit beyond the row, against bank conflicts
constexpr int kSharedLimit = 232448;

template <typename Element_, int kRows_, bool kHalf_, int kMaxPairs_, int kGroups_ = (kRows_ > 32 ? 2 : 1)>
struct Tile {
    using Element = Element_;
    static constexpr int kRows = kRows_;
    static constexpr int kSlots = kHalf_ ? kRows / 2 : kRows;    // rows of 256 positions that are read and written
    static constexpr int kGroups = kGroups_;                     // groups of eight warps that share the outer stage; each covers all 256 columns
    static constexpr int kWarps = 8 * kGroups;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kMaxPairs = kMaxPairs_;                 // one, or sixteen: the lanes of a warp know the sequences of a tile
    static constexpr int kSegment = kColumns * int(sizeof(Element)) + 32;
    static constexpr int kStageBytes = 2 * kSlots * kSegment;    // one tensor of a tile
    static constexpr int kRowBytes = kRows * kRowPitch * 4;
    static constexpr int kEnergyBytes = 2 * kMaxPairs * 8 * 4;   // partial energies of the sequences
    static_assert(kRows == 16 || kRows == 32 || kRows == 64, "rows of a tile");
    static_assert(kMaxPairs == 1 || kMaxPairs == 16, "pairs of a tile");
};

// Division by a number that is known at launch, exact for dividends below 2^31.
struct Divider {
    int divisor;
    u32 multiplier, shift;

    DEVICE int divide(int x) const { return divisor == 1 ? x : int(high_product(u32(x), multiplier) >> shift); }
    DEVICE int remainder(int x) const { return x - divide(x) * divisor; }
};

// A call's parameters with what the host derives from them.
struct LaunchParams : fft_conv_params {
    int alignment;      // bytes that every row of every input is aligned to: 16, 4 or 2
    int pair_aligned;   // whether two neighbouring elements of every tensor may be moved as one word
    int log_radix;
    Divider pairs;      // pairs of sequences in a channel
    // Backward: 2^log_sharing pairs of a channel share a tile, and a channel's tiles are dealt to splits blocks.
    int log_sharing, tiles_per_split;
    Divider splits;
};

// The first of the four columns a, a + 1, a + 128, a + 129 that a lane of the outer stage holds.
DEVICE int outer_column(int warp, int lane) { return 2 * (warp % 8 * 8 + lane / 4); }

// Which part of the work a block does: tiles first, first + step, ... below last. Blocks that probably share a multiprocessor
// take turns in one range, so that they read the same filter spectra.
struct WorkRange {
    int first, last, step;
};

DEVICE WorkRange work_range(int tiles, int blocks_per_processor) {
    const int processors = block_count() / blocks_per_processor;
    const int processor = block_index() % processors, turn = block_index() / processors;
    const int64_t begin = int64_t(tiles) * processor / processors, end = int64_t(tiles) * (processor + 1) / processors;
    return {int(begin) + turn, int(end), blocks_per_processor};
}

// Pairs run over the batch first, then over the channels; a tile holds consecutive ones.
template <class T>
HOST_DEVICE int tile_count(const LaunchParams& params) {
    const int pairs = (params.batch + 1) / 2 * params.channels, per_tile = T::kRows >> params.log_radix;
    return (pairs + per_tile - 1) / per_tile;
}

// The sequences of a tile: lane 2 p + c of every warp knows the batch row and the channel of sequence c of pair p
// (further lanes: of the pairs that follow the tile).
struct TileSequences {
    int row, channel;
    bool valid;

    // Consecutive pairs: over the batch first, then over the channels.
    DEVICE static TileSequences consecutive(const LaunchParams& params, int first_pair, int lane) {
        const int pair = first_pair + lane / 2, channel = params.pairs.divide(pair);
        return TileSequences(params, channel, 2 * (pair - channel * params.pairs.divisor) + lane % 2);
    }
    DEVICE TileSequences(const LaunchParams& params, int channel, int row) : row(row), channel(channel) {
        valid = channel < params.channels && row < params.batch;
        if (!valid) this->row = this->channel = 0;
    }

    // Whether all sequences of the tile exist.
    template <class T>
    DEVICE bool complete(int log_slots_per_pair) const {
        return !warp_any(int(thread_index() % 32) < T::kSlots >> log_slots_per_pair << 1 && !valid);
    }

    // Where a tensor keeps the sequence that lane `owner` knows.
    template <class Element>
    DEVICE Element* address(const fft_conv_tensor& tensor, int owner, int scale = 1) const {
        const int64_t offset = row * tensor.batch_stride + channel * tensor.channel_stride;
        return static_cast<Element*>(tensor.data) + shuffle(offset, owner) * scale;
    }
};
