// From the C interface to a kernel instance: which tile serves a transform, and the parameters that the host derives.
#pragma once
#include <algorithm>

#include "backward.cuh"
#include "filter.cuh"
#include "forward.cuh"

// The tile of a backward pass: one group of warps covers its outer stage.
template <class T>
using BackwardTile = Tile<typename T::Element, T::kRows, (T::kSlots < T::kRows), 1>;

template <class T>
struct Launcher {
    static int forward(const LaunchParams& params, void* stream);
    static int backward(const LaunchParams& params, void* stream);
    static int filter(const FilterParams& params, void* stream);
    static constexpr int kSumBytes = BackwardPlan<BackwardTile<T>>::kSharedSums ? 0 : BackwardPlan<BackwardTile<T>>::kSumBytes;
};

constexpr int kUnsupported = -1;
// Also what the batch is split for where there are few channels; a constant, so that results do not depend on the device.
constexpr int kMaximumBackwardBlocks = 264;

inline int common_alignment(const fft_conv_tensor& t, int element_bytes) {
    if (!t.data) return 16;
    const uint64_t bits = reinterpret_cast<uint64_t>(t.data) | uint64_t(t.batch_stride) * element_bytes | uint64_t(t.channel_stride) * element_bytes;
    return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

// Calls function(Tile<...>{}) with the tile that a filter of this size is transformed in.
template <class Function>
int with_filter_tile(int fft_size, Function function) {
    const int radix = fft_size / kColumns;
    if (radix <= 16) return function(Tile<float, 16, false>{});
    if (radix == 32) return function(Tile<float, 32, false>{});
    if (radix == 64) return function(Tile<float, 64, false>{});
    return kUnsupported;
}

// Calls function(Tile<...>{}) with the tile for params.
template <class Function>
int with_tile(const fft_conv_params& p, Function function) {
    const int radix = p.fft_size / kColumns;
    auto with_element = [&](auto element) {
        using Element = decltype(element);
        if (p.half && radix >= 2) {
            if (radix <= 16) return function(Tile<Element, 16, true>{});
            if (radix == 32) return function(Tile<Element, 32, true>{});
            if (radix == 64) return function(Tile<Element, 64, true>{});
        } else if (!p.half) {
            if (radix <= 16) return function(Tile<Element, 16, false>{});
            if (radix == 32) return function(Tile<Element, 32, false>{});
            if (radix == 64) return function(Tile<Element, 64, false>{});
        }
        return kUnsupported;
    };
    switch (p.element) {
        case FFT_CONV_BFLOAT16: return with_element(bfloat16{});
        case FFT_CONV_FLOAT16: return with_element(float16{});
        case FFT_CONV_FLOAT32: return with_element(float{});
        default: return kUnsupported;
    }
}
