// Shared memory of the kernel for clusters of thread blocks, and what its blocks tell each other.
#pragma once
#include "block_scale.cuh"
#include "forward_plan.cuh"

// A word from each block of a cluster to all blocks, again and again.
template <int kBlocks>
struct BlockWords {
    static constexpr u32 kPlaces = 2;   // a block may be one exchange ahead
    u32 words[kPlaces][kBlocks];
    TransactionBarrier came[kPlaces];

    DEVICE void start() {
        for (u32 i = 0; i < kPlaces; i++) barrier_start(came + i, 1);
    }
    // All lanes of a warp know this block's word.
    DEVICE void send(int number, u32 own, int lane) {
        TransactionBarrier* const barrier = came + number % kPlaces;
        if (lane == 0) barrier_expect(barrier, kBlocks * int(sizeof(u32)));
        if (lane < kBlocks) store_to_block(lane, words[number % kPlaces] + cluster_rank(), own, barrier);
    }
    // Of floats near the root mean square of a row in each block, the one near that in all of them. They are powers of two; one that is not a number makes
    // that one too.
    DEVICE float root_mean_square(int number, int lane) {
        constexpr int kUnit = 24, kLogLanes = 5;    // of what a lane adds
        const u32 own = received(number, lane), largest = warp_maximum(own);
        const int below = int(largest >> 23) - int(own >> 23);
        const u32 sum = warp_sum(2 * below > kUnit ? 0 : 1u << (kUnit - 2 * below));
        return float_from_bits(largest) * power_of_two((int(bits_from_float(float(sum)) >> 23) - 127 - kUnit - kLogLanes) >> 1);
    }

    // The largest of numbers that are not negative, or of NaN, in all blocks.
    DEVICE float largest(int number, int lane) { return float_from_bits(warp_maximum(received(number, lane))); }

private:
    // As many lanes have the word of each block.
    DEVICE u32 received(int number, int lane) {
        barrier_wait(came + number % kPlaces, number / kPlaces % 2);
        return words[number % kPlaces][lane % kBlocks];
    }
};

template <bool kGradients>
struct ClusterParams {
    LaunchParams turns[kGradients ? 2 : 1];
};

// The two passes of gradients: of pre_gate * u with grad_output for a gate, and in reverse of post_gate * grad_output with two others.
inline ClusterParams<true> turns_of(const LaunchParams& params) {
    ClusterParams<true> both{{params, params}};
    auto& [first, second] = both.turns;
    first.post_gate = params.grad_output, first.output = params.grad_post_gate;
    second.u = params.grad_output, second.pre_gate = params.post_gate, second.post_gate = params.pre_gate, second.output = params.grad_u;
    second.second_gate = params.u, second.second_output = params.grad_pre_gate;
    // Nobody may want the first.
    first.log_turns = second.log_turns = params.grad_filter || params.grad_post_gate.data;
    return both;
}

template <class T, bool kGradients>
struct ClusterPlan {
    static constexpr int kThreads = 3 * T::kThreads;
    // Where a warp of the second group has all rows of a DFT across blocks, it does them in registers, of which it gets more than the others: the first group
    // can spare some where inputs come through shared memory. Rows then come in parts, one row of each block for every warp.
    static constexpr bool kInRegisters = T::kOwnRows >= T::kWarps && sizeof(typename T::Element) == 2;
    static constexpr int kParts = kInRegisters ? T::kOwnRows / T::kWarps : 1;
    static constexpr u32 kBuffers = kInRegisters && !kGradients ? 1 : 2, kReturnBuffers = 3 - kBuffers;      // of rows that come, and of rows that return
    // Which buffer the rows of a tile come to, and how often it has been used before. The rows of a pair's first turn may stay there until the second has
    // come to the other; the first turn of the next pair follows in that one.
    static constexpr bool kStay = kInRegisters && kGradients;
    DEVICE static u32 buffer(int number) { return u32(kStay ? (number + 1) / 2 : number) % kBuffers; }
    DEVICE static u32 round(int number) { return u32(number) / kBuffers; }
    // Of an outer stage on the way back. Those in single precision take registers from the second group.
    using Sums = typename Choose<kStay, typename NeededInnerTables<typename T::Element>::type::Sums, SingleSums>::type;
    // Registers of a group's threads, where they have their own and not as many as they are launched with.
    static constexpr int kRegisters = 80;
    static constexpr int registers(int group) {
        constexpr int kForward[] = {64, 104, 72}, kSingle[] = {56, 112, 72}, kHalf[] = {56, 120, 64};
        return !kInRegisters ? kRegisters : !kGradients ? kForward[group] : sizeof(Sums) > sizeof(HalfSums) ? kSingle[group] : kHalf[group];
    }
    static constexpr u32 kScaleSlots = 6;       // tiles under way between the first and the third group
    static constexpr int kRowsPerWarp = T::kRows / T::kWarps;
    // What a warp of the second group has before it comes to it: the spectra of its rows or, of blocked sequences, the operands of its next products.
    static constexpr int kAhead = T::kBlocked ? 2 : kRowsPerWarp, kOperandVectors = T::kBlocked ? 128 : 64;
    static constexpr int kOperandBytes = T::kWarps * kAhead * kOperandVectors * 16;
    // Of blocked sequences: the scale of a row and its largest mean square; the pairs of this round, its first tile, and pairs for another round,
    // which their scales did not fit.
    struct Blocked {
        BlockScale scale;
        float largest;
        OwnPairs<T> pairs;
        int first, misfits;
    };
    // Of a turn of a pair: what undoes its scale, and the number of the sums that its products are added to, or are the first of.
    struct TurnSums {
        float scale;
        int number;
        bool first;
    };
    struct Control {
        alignas(16) float energies[2 * 8];
        BlockWords<T::kCluster> scale_words;
        float scales[kScaleSlots][32];
        TurnSums sums[kScaleSlots];
        WorkRange range;                // of tiles
        Blocked blocked;
        int done[3][T::kThreads];       // of them, by each group, for each thread
        TileHeader headers[2][2];       // of a tile and the next in turn, for the first and for the third group
        TransactionBarrier rows_came[kBuffers][kParts], rows_free[kBuffers][kParts], returned[kReturnBuffers], return_free[kReturnBuffers];
    };
    static constexpr int kControlBytes = (int(sizeof(Control)) + 127) / 128 * 128;
    static constexpr int kFixedBytes = Tables<T, true>::kSharedBytes + int(kBuffers + kReturnBuffers) * T::kRowBytes + kOperandBytes + kControlBytes;
    static constexpr bool kStaged = kFixedBytes + 3 * T::kStageBytes <= kSharedLimit;   // else inputs come from global memory
    static constexpr int kSharedBytes = kFixedBytes + (kStaged ? 3 * T::kStageBytes : 0);
    static_assert(kSharedBytes <= kSharedLimit && (kStaged || !kInRegisters), "shared memory of a block");
};
