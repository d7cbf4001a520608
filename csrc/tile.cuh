// Geometry of a tile: what one thread block transforms at a time, and where its parts lie in shared memory.
//
// A transform of N = radix * 256 complex points has the points n = 256 n1 + p; a tile is `kRows` rows of 256 points: the `radix` rows of one
// pair of sequences, or of kPairs of them where the radix is below 32. The two sequences of a pair are two batch rows of a channel or, folded, the
// halves of one (csrc/transform.cuh). Of blocked sequences, a tile transforms one block of kPositions positions; the tiles of a pair follow each other.
// Where a cluster of kCluster thread blocks shares a transform, n = 256 (kCluster n1 + b) + p are the points of block b, and the radix is that of all.
#pragma once
#include "fft_conv.h"
#include "primitives.cuh"

constexpr int kColumns = 256;       // points of the inner transform, done by one warp in registers
constexpr int kRowUnits = 64;       // of 16 bytes, each of a row's points a, a + 1, a + 128 and a + 129
constexpr int kSharedLimit = 232448;

template <typename Element_, int kRows_, bool kFolded_, int kPairs_, bool kBlocked_ = false, int kCluster_ = 1>
struct Tile {
    using Element = Element_;
    static constexpr int kRows = kRows_;
    static constexpr int kSlots = kFolded_ ? kRows / 2 : kRows;     // rows of 256 positions of all first sequences, and of all second ones
    static constexpr bool kFolded = kFolded_, kBlocked = kBlocked_;
    static constexpr int kCluster = kCluster_, kOwnRows = kRows / kCluster;     // of each block, as rows pass through the cluster
    static constexpr int kWarps = 8, kThreads = 256;             // a group of eight warps covers the 256 columns
    static constexpr int kPairs = kPairs_, kPairRows = kRows / kPairs, kPairSlots = kSlots / kPairs;     // the lanes of a warp know the sequences of a tile
    static constexpr int kPositions = kPairRows * kColumns * kCluster;  // of a transform
    static constexpr int kSecondStart = kFolded ? kPositions / 2 : 0;   // of second sequences
    static constexpr int kSegment = kColumns * int(sizeof(Element));
    static constexpr int kStageBytes = 2 * kSlots * kSegment;    // one tensor of a tile
    static constexpr int kRowBytes = kRows * kRowUnits * 16;
    static constexpr int kEnergyBytes = 2 * kPairs * 8 * 4;   // partial energies of the sequences
    static_assert(kRows == 16 || kRows == 32, "rows of a tile");
    static_assert(kPairs >= 1 && kPairs <= 16 && kPairSlots * kPairs == kSlots, "pairs of a tile");

    // Of a slot: its pair, and its first position in the pair's sequences. Neighbours belong to different pairs, so that the slots 4 n + q of a lane of the
    // outer stage belong to kLanePairs pairs, in turn: to the i-th those with n = i + m kLanePairs, whose positions are lane_position(m) from the first on.
    static constexpr int kLanePairs = kPairs > 4 ? kPairs / 4 : 1, kLaneSlots = kSlots / 4 / kLanePairs;
    DEVICE static int slot_pair(int slot) { return int(u32(slot) % kPairs); }
    DEVICE static int slot_position(int slot) { return int(u32(slot) / kPairs) * kCluster * kColumns; }
    static constexpr int lane_position(int m) { return m * (4 * kLanePairs / kPairs) * kCluster * kColumns; }
    // From the first sequence of a pair to the second.
    DEVICE static int64_t second_offset(const fft_conv_tensor& tensor) { return kFolded ? kSecondStart : tensor.batch_stride; }
};

// Batch rows of a pair, and pairs of a channel.
HOST_DEVICE int rows_of_pair(const fft_conv_params& params) { return params.folded ? 1 : 2; }
HOST_DEVICE int pairs_of_channel(const fft_conv_params& params) { return (params.batch - 1) / rows_of_pair(params) + 1; }

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
    int whole_units;    // whether all rows of the inputs consist of aligned 16-byte units, and pair_aligned
    Divider pairs;      // pairs of sequences in a channel
    Divider blocks;     // blocks of a sequence
    // Backward: 2^log_sharing pairs of a channel share a tile, and a channel's tiles are dealt to splits blocks, or clusters of blocks.
    int log_sharing;
    Divider tiles_per_split, splits;
    int log_turns;      // of a pair that clusters work on
};

// The first of the four columns a, a + 1, a + 128, a + 129 that a lane of the outer stage holds.
DEVICE int outer_column(int warp, int lane) { return 2 * (warp % 8 * 8 + lane / 4); }

// The tiles of a block, or of a cluster of blocks: neighbours, which share filter spectra.
struct WorkRange {
    int first, last;
};

DEVICE WorkRange work_range(int tiles, int cluster = 1) {
    const int worker = block_index() / cluster, workers = block_count() / cluster;
    return {int(int64_t(tiles) * worker / workers), int(int64_t(tiles) * (worker + 1) / workers)};
}

// Pairs run over the batch first, then over the channels; a tile holds consecutive ones.
template <class T>
HOST_DEVICE int tile_count(const LaunchParams& params) {
    const int pairs = params.pairs.divisor * params.channels;
    return T::kBlocked ? pairs * params.blocks.divisor : (pairs + T::kPairs - 1) / T::kPairs;
}

// The pairs of a worker, which is a thread block or a cluster of them, where sequences are blocked: every so many-th, so that all workers are at few
// channels at a time, whose windows stay in the L2 cache. Of these, all or those in a list.
template <class T>
struct OwnPairs {
    int count;
    const int* list;

    DEVICE static int worker() { return block_index() / T::kCluster; }
    DEVICE static int workers() { return block_count() / T::kCluster; }
    DEVICE explicit OwnPairs(const LaunchParams& params) : list(nullptr) {
        const int pairs = params.pairs.divisor * params.channels;
        count = worker() < pairs ? (pairs - 1 - worker()) / workers() + 1 : 0;
    }
    DEVICE OwnPairs(int count, const int* list) : count(count), list(list) {}
    DEVICE int operator[](int i) const { return worker() + (list ? list[i < count ? i : 0] : i) * workers(); }
};

// Where a tile lies: tile `index` of all, or block `step`, in the order of the work, of pair `index` of the own ones.
struct TilePlace {
    int index, step;

    template <class T>
    DEVICE TilePlace next(const LaunchParams& params) const {
        const bool stays = T::kBlocked && step + 1 < params.blocks.divisor;
        return {stays ? index : index + 1, stays ? step + 1 : 0};
    }
    template <class T>
    DEVICE int first_pair(const OwnPairs<T>& pairs) const {
        return T::kBlocked ? pairs[index] : index * T::kPairs;
    }
    template <class T>
    DEVICE int start(const LaunchParams& params) const {
        return T::kBlocked ? (params.reverse ? params.blocks.divisor - 1 - step : step) * T::kPositions : 0;
    }
};

// The sequences of a tile: lane 2 p + c of every warp knows the batch row and the channel of sequence c of pair p
// (further lanes: of the pairs that follow the tile).
struct TileSequences {
    int row, channel;
    bool valid;
    int start, length;      // the first position of the tile's part, and how many follow in the row: none or less where it lies beyond

    // Consecutive pairs: over the batch first, then over the channels.
    template <class T>
    DEVICE static TileSequences consecutive(const LaunchParams& params, int first_pair, int lane, int start = 0) {
        const int pair = first_pair + lane / 2, channel = params.pairs.divide(pair);
        return of_pair<T>(params, channel, pair - channel * params.pairs.divisor, lane, start);
    }
    // A pair of a channel.
    template <class T>
    DEVICE static TileSequences of_pair(const LaunchParams& params, int channel, int pair, int lane, int start = 0) {
        return T::kFolded ? TileSequences(params, channel, pair, start + lane % 2 * T::kSecondStart) : TileSequences(params, channel, 2 * pair + lane % 2, start);
    }
    // A whole row: folded, that of a pair.
    DEVICE static TileSequences whole(const LaunchParams& params, int pair) {
        const int channel = params.pairs.divide(pair);
        return TileSequences(params, channel, pair - channel * params.pairs.divisor, 0);
    }
    DEVICE TileSequences(const LaunchParams& params, int channel, int row, int start)
        : row(row), channel(channel), start(start), length(params.length - start) {
        valid = channel < params.channels && row < params.batch;
        if (!valid) this->row = this->channel = 0;
    }

    // Of the sequence that lane `owner` knows; none where it is not there.
    DEVICE int length_of(int owner) const { return shuffle(valid ? length : 0, owner); }

    // Where a tensor keeps the tile's part of the sequence that lane `owner` knows.
    template <class Element>
    DEVICE Element* address(const fft_conv_tensor& tensor, int owner, int scale = 1) const {
        const int64_t offset = row * tensor.batch_stride + channel * tensor.channel_stride + start;
        return static_cast<Element*>(tensor.data) + shuffle(offset, owner) * scale;
    }
};

// A tile whose sequences lie at equal distances in every tensor: pair p begins with batch row `row + p row_step` of channel `channel + p channel_step`.
struct RegularSequences {
    int row, channel, row_step, channel_step;
    bool second;    // whether the second sequences of the pairs exist: all or none
    bool regular;   // false: the tile is none of this kind

    // Consecutive pairs, as in TileSequences.
    template <class T>
    DEVICE static RegularSequences consecutive(const LaunchParams& params, int first_pair) {
        const int in_channel = params.pairs.divisor;
        const int channel = params.pairs.divide(first_pair), pair = first_pair - channel * in_channel;
        const bool across = in_channel == 1;
        const int rows = rows_of_pair(params);
        const int last_pair = across ? 0 : pair + T::kPairs - 1, last_channel = across ? channel + T::kPairs - 1 : channel;
        const bool second = rows * (last_pair + 1) <= params.batch;
        return {rows * pair, channel, across ? 0 : rows, across ? 1 : 0, second,
                last_pair < in_channel && last_channel < params.channels && (second || across || T::kPairs == 1)};
    }
};

// The tensors of fft_conv_params in their order.
enum TensorIndex { kU, kPreGate, kPostGate, kGradOutput, kOutput, kGradU, kGradPreGate, kGradPostGate, kSecondGate, kSecondOutput, kTensors };

// Where a tile of regular sequences lies in every tensor, worked out once by the lanes of one warp and read by all from shared memory.
struct TileHeader {
    char* first[kTensors];          // sequence 0 of pair 0
    int64_t pair_stride[kTensors];  // bytes
    int regular, second;
    int length;                     // from the tile's first position on

    // All lanes of one warp.
    template <class Element>
    DEVICE void fill(const LaunchParams& params, const RegularSequences& sequences, int lane, int start = 0) {
        if (lane < kTensors) {
            const fft_conv_tensor& tensor = (&params.u)[lane];
            first[lane] = static_cast<char*>(tensor.data) + (sequences.row * tensor.batch_stride + sequences.channel * tensor.channel_stride + start) * int(sizeof(Element));
            pair_stride[lane] = (sequences.row_step * tensor.batch_stride + sequences.channel_step * tensor.channel_stride) * int(sizeof(Element));
        }
        if (lane == 0) regular = sequences.regular && params.whole_units, second = sequences.second, length = params.length - start;
    }
};
