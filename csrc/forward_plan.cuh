// Shared memory of the forward kernel.
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
    static_assert(kSharedBytes <= kSharedLimit && (kStaged || !T::kBlocked), "shared memory of a block");
};

// The spectrum of a window, or the transform of a block. A thread block keeps as many of these as the filter has windows.
template <class T>
constexpr int kBlockVectors = T::kRows * kColumns / 4;
