// From the C interface to a kernel instance: which tile serves a transform, and the parameters that the host derives.
#pragma once
#include <algorithm>

#include "backward.cuh"
#include "cluster.cuh"
#include "filter.cuh"
#include "forward.cuh"
#include "long_forward.cuh"
#include "tap_transform.cuh"

template <class T>
struct Launcher {
    static int forward(const LaunchParams& params, void* stream);
    static int backward(const LaunchParams& params, void* stream);
    static constexpr int kForwardSharedBytes = ForwardPlan<T>::kSharedBytes, kBackwardSharedBytes = BackwardPlan<T>::kSharedBytes;
};

// Transforms that a cluster of blocks shares, of whole sequences or of their blocks.
template <class Element, int kBlocks, bool kBlocked = false>
struct ClusterLauncher {
    using T = Tile<Element, 32, true, 1, kBlocked, kBlocks>;
    static int forward(const LaunchParams& params, void* stream);
    static int backward(const LaunchParams& params, void* stream);
    // That run at a time on the current device; zero or less where it has none.
    static int clusters();
    static constexpr int kForwardSharedBytes = ClusterPlan<T, false>::kSharedBytes;
    static constexpr int kKeptBytes = ClusterPlan<T, true>::kStay ? 0 : T::kCluster * T::kRowBytes;     // of a cluster, between the two turns of a pair
};

int launch_filter(const FilterParams& params, void* stream);
int launch_taps(const TapParams& params, void* stream);
// Of a device, or zero and an error.
int processor_count(int device, int* error);

// Long sequences, by the slots that the outer pass has room for and the threads of a team.
template <class Element, int kSlots, int kTeamThreads>
struct LongLauncher {
    static int forward(const LongParams& params, void* stream);
    static int shared_bytes(const LongParams& params) { return LongPlan<Element, kSlots>::shared_bytes(params, 1); }
};

constexpr int kUnsupported = -1;
// Also what the batch is split for where there are few channels; a constant, so that results do not depend on the device.
constexpr int kMaximumBackwardBlocks = 264;
// Of them in clusters.
constexpr int backward_clusters(int blocks) { return kMaximumBackwardBlocks / blocks; }

inline int common_alignment(const fft_conv_tensor& t, int element_bytes) {
    if (!t.data) return 16;
    const uint64_t bits = reinterpret_cast<uint64_t>(t.data) | uint64_t(t.batch_stride) * element_bytes | uint64_t(t.channel_stride) * element_bytes;
    return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

// Rows of the tile for a transform, those of hf_flashfftconv/ops/tables.py, and how many pairs of sequences have it together.
inline int tile_rows(int radix) { return radix == 1 ? 16 : 32; }
inline int tile_pairs(int radix) { return std::max(1, tile_rows(radix) / radix); }

template <class Element>
using BlockedTile = Tile<Element, 32, true, 1, true>;

// Calls function(Tile<...>{}) with the tile for a transform.
template <class Element, bool kFolded, class Function>
int with_rows(int radix, Function function) {
    if constexpr (!kFolded)
        if (radix == 1) return function(Tile<Element, 16, kFolded, 16>{});
    switch (radix) {
        case 2: return function(Tile<Element, 32, kFolded, 16>{});
        case 4: return function(Tile<Element, 32, kFolded, 8>{});
        case 8: return function(Tile<Element, 32, kFolded, 4>{});
        case 16: return function(Tile<Element, 32, kFolded, 2>{});
        case 32: return function(Tile<Element, 32, kFolded, 1>{});
        default: return kUnsupported;
    }
}

// The same for blocked sequences.
template <class Function>
int with_blocked_tile(const fft_conv_params& p, Function function) {
    switch (p.element) {
        case FFT_CONV_BFLOAT16: return function(BlockedTile<bfloat16>{});
        case FFT_CONV_FLOAT16: return function(BlockedTile<float16>{});
        case FFT_CONV_FLOAT32: return function(BlockedTile<float>{});
        default: return kUnsupported;
    }
}

template <class Function>
int with_tile(const fft_conv_params& p, Function function) {
    const int radix = p.fft_size / kColumns;
    switch (p.element) {
        case FFT_CONV_BFLOAT16: return p.folded ? with_rows<bfloat16, true>(radix, function) : with_rows<bfloat16, false>(radix, function);
        case FFT_CONV_FLOAT16: return p.folded ? with_rows<float16, true>(radix, function) : with_rows<float16, false>(radix, function);
        case FFT_CONV_FLOAT32: return p.folded ? with_rows<float, true>(radix, function) : with_rows<float, false>(radix, function);
        default: return kUnsupported;
    }
}

// Calls function(ClusterLauncher<...>{}).
template <class Function>
int with_cluster(const fft_conv_params& p, Function function) {
    auto with_element = [&](auto element) {
        using Element = decltype(element);
        if (p.windows > 0) return p.cluster == 8 ? function(ClusterLauncher<Element, 8, true>{}) : p.cluster == 16 ? function(ClusterLauncher<Element, 16, true>{}) : kUnsupported;
        switch (p.cluster) {
            case 2: return function(ClusterLauncher<Element, 2>{});
            case 4: return function(ClusterLauncher<Element, 4>{});
            case 8: return function(ClusterLauncher<Element, 8>{});
            case 16: return function(ClusterLauncher<Element, 16>{});
            default: return kUnsupported;
        }
    };
    switch (p.element) {
        case FFT_CONV_BFLOAT16: return with_element(bfloat16{});
        case FFT_CONV_FLOAT16: return with_element(float16{});
        case FFT_CONV_FLOAT32: return with_element(float{});
        default: return kUnsupported;
    }
}

// Of a transform of R rows: an item of the outer passes has 64 points for each, and to have lines of 128 bytes, eight units, of all rows.
inline int team_threads(int radix) { return radix <= 256 ? 128 : 256; }

// Calls function(LongLauncher<...>{}) with the one for an outer pass of so many slots.
template <class Function>
int with_long(const fft_conv_params& p, Function function) {
    const int slots = p.folded ? p.outer_radix / 2 : p.outer_radix;
    auto with_element = [&](auto element) {
        using Element = decltype(element);
        if (slots > 8) return function(LongLauncher<Element, 32, 256>{});
        return team_threads(p.fft_size / kLongPoints) == 128 ? function(LongLauncher<Element, 8, 128>{}) : function(LongLauncher<Element, 8, 256>{});
    };
    switch (p.element) {
        case FFT_CONV_BFLOAT16: return with_element(bfloat16{});
        case FFT_CONV_FLOAT16: return with_element(float16{});
        case FFT_CONV_FLOAT32: return with_element(float{});
        default: return kUnsupported;
    }
}
