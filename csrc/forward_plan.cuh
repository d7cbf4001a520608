// Shared memory of the forward kernel, and the order of the products of blocked sequences.
#pragma once
#include "transform.cuh"

// What shared memory holds, if all of it fits: a third buffer of rows, the row twiddles, and the filter's spectrum for all rows of a tile, which
// stays as long as the channel does. Else each warp of the second group has both for its next row only; of blocked sequences, the spectra of
// filter window and block for its next products.
template <class T>
struct ForwardPlan {
    static constexpr int kThreads = 3 * T::kThreads;
    static constexpr int kScaleSlots = 4;       // tiles under way between the first and the third group
    static constexpr int kControlBytes = (T::kEnergyBytes + kScaleSlots * 32 * 4 + 4 * int(sizeof(TileHeader)) + 4 + 127) / 128 * 128;
    static constexpr int kRowsPerWarp = T::kRows / T::kWarps;
    static constexpr bool kNarrowElements = sizeof(typename T::Element) == 2;
    static constexpr int ahead(bool wide) { return T::kBlocked ? (kNarrowElements ? 4 : 1) : wide ? kRowsPerWarp : 1; }     // operands a warp has before it comes to them
    static constexpr int kAtOnce = T::kBlocked && kNarrowElements ? 2 : 1;      // rows of blocked sequences
    static constexpr int operand_vectors(bool wide) { return wide ? 64 : 128; }         // of a row: spectrum, and twiddles or a block's transform
    static constexpr int buffers(bool wide) { return wide ? 3 : 2; }
    template <bool kWide>
    static constexpr int bytes(int stages) {
        return Tables<T, kWide || T::kBlocked>::kSharedBytes + buffers(kWide) * T::kRowBytes + T::kWarps * ahead(kWide) * operand_vectors(kWide) * 16 +
               kControlBytes + stages * T::kStageBytes;
    }
    static constexpr bool kWide = !T::kBlocked && bytes<true>(3) <= kSharedLimit;
    static constexpr bool kStaged = bytes<kWide>(3) <= kSharedLimit;      // else inputs come from global memory
    static constexpr int kBuffers = buffers(kWide), kAhead = ahead(kWide), kOperandVectors = operand_vectors(kWide);
    static constexpr int kOperandBytes = T::kWarps * kAhead * kOperandVectors * 16;
    static constexpr int kSharedBytes = bytes<kWide>(kStaged ? 3 : 0);
    // Registers of a group's threads, where they have their own and not as many as they are launched with.
    static constexpr int kRegisters = 80;
    static constexpr int registers(int group) {
        constexpr int kOwn[] = {72, 88, 80};
        return kNarrowElements && T::kFolded && !T::kBlocked ? kOwn[group] : kRegisters;
    }
    static_assert(kSharedBytes <= kSharedLimit && (kStaged || !T::kBlocked), "shared memory of a block");
};

// The spectrum of a window, or the transform of a block.
template <class T>
constexpr int kBlockVectors = T::kRows * T::kCluster * kColumns / 4;

// The transforms of a pair's blocks: of all, where they are to be kept, else of as many as the filter has windows, in turn.
template <class T>
struct History {
    uint4* blocks;
    int count;

    DEVICE History(const LaunchParams& params, int pair) : count(params.transforms ? params.blocks.divisor : params.windows) {
        blocks = static_cast<uint4*>(params.transforms ? params.transforms : params.scratch) + int64_t(params.transforms ? pair : OwnPairs<T>::worker()) * count * kBlockVectors<T>;
    }
};

// The steps of a warp of the second group, where sequences are blocked: the products of one row or, at once, of two: of a block's transform with
// window 0 of the filter, then of the blocks before it, whose transforms wait in global memory, with the other windows. Here is where the operands
// of a step lie; those of the second row are kRowStep vectors further. row_vector(row) of the pass is where this lane's vectors of a row begin.
template <class T, int kAtOnce>
struct Products {
    static constexpr int kRowStep = T::kWarps * 64, kRowsAtOnce = kAtOnce * T::kWarps;
    int own, step, row, left;       // pair, its block, row, products left in the rows
    int windows, slot;              // of the block: products of a row, and where its transform goes
    const uint4* spectra;           // of the pair's channel
    History<T> history;
    int window, block;              // vectors of this lane: of the window's spectrum, of the block's transform

    template <class Pass>
    DEVICE explicit Products(const Pass& pass) : own(0), history(pass.params, pass.own_pair(0)) { start_pair(pass); }

    template <class Pass>
    DEVICE void start_pair(const Pass& pass) {
        history = History<T>(pass.params, pass.own_pair(own));
        spectra = reinterpret_cast<const uint4*>(pass.params.spectrum) + int64_t(pass.channel_of(pass.own_pair(own))) * pass.params.windows * kBlockVectors<T>;
        step = slot = 0, windows = 1;
        start_row(pass, pass.warp);
    }
    template <class Pass>
    DEVICE void start_row(const Pass& pass, int next) {
        row = next, left = windows;
        window = pass.row_vector(row), block = slot * kBlockVectors<T> + window;
    }
    template <class Pass>
    DEVICE void advance(const Pass& pass) {
        if (--left > 0) {
            window += kBlockVectors<T>, block -= kBlockVectors<T>;
            if (block < 0) block += history.count * kBlockVectors<T>;
        } else if (row + kRowsAtOnce < T::kRows) {
            start_row(pass, row + kRowsAtOnce);
        } else if (++step < pass.params.blocks.divisor) {
            slot = slot + 1 < history.count ? slot + 1 : 0;
            if (windows < pass.params.windows) windows++;
            start_row(pass, pass.warp);
        } else {
            own++;
            start_pair(pass);
        }
    }
};
