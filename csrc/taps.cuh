// Gradients of the taps of blocked sequences. With the transforms G of the blocks of pre_gate u and E of those of post_gate grad_output, window d of a
// filter has S(d), the sum of conj(G(j - d)) E(j) over blocks j and pairs; its inverse transform holds, folded, the gradients at lags less than a block
// away from d blocks, as far as block pairs d apart contribute. So a tap gets its gradient from two windows.
#pragma once
#include "filter.cuh"
#include "transform.cuh"

constexpr int kSumThreads = 128;
// Windows whose sums a warp makes at once, and the blocks of such warps that a multiprocessor has registers for.
constexpr int windows_at_once(bool several) { return several ? 4 : 1; }
constexpr int sum_blocks(bool several) { return several ? 3 : 8; }

struct TapParams : fft_conv_tap_params {
    int log_points;     // of fft_size
    int log_group;      // of the channels whose gradients are written together

    HOST_DEVICE int rows() const { return fft_size / kColumns; }
    HOST_DEVICE bool several() const { return windows > 1; }
    HOST_DEVICE int window_groups() const { return (windows - 1) / windows_at_once(several()) + 1; }
    HOST_DEVICE int64_t units() const { return int64_t(channels) * rows() * window_groups(); }
    DEVICE float4* window_sums(int64_t channel, int window) const { return reinterpret_cast<float4*>(sums) + (channel * windows + window) * splits * (fft_size / 2); }
    // A point n of a window, from what the transform of the conjugate sums gives there: folded, the gradient of its own tap is the real part, and that of the
    // tap N before it the imaginary one, of the inverse transform.
    DEVICE void store(int channel, int window, int n, Complex transformed) const {
        if (folded) transformed = transformed * unit_root(n, log_points + 2);
        const int tap = window * fft_size + n, before = fft_size - 1 - n;
        const float gradient = transformed.re * factor, gradient_before = folded ? -transformed.im * factor : gradient;
        if (tap < taps) grad_k[channel * k_stride + tap * k_tap_stride] = gradient;
        if (tap == 0 && grad_skip) grad_skip[channel] = gradient;
        if (before < taps_rev) grad_k_rev[channel * k_rev_stride + before * k_rev_tap_stride] = gradient_before;
    }
};

// The sums of neighbouring windows, of one row of one channel: the work of a warp, each lane of which reads what it has written as a lane of
// the forward kernel. The groups of windows of a row are neighbours, which share reads.
template <bool kSeveral>
DEVICE void sum_windows(const TapParams& params, int64_t unit) {
    constexpr int kWindowsAtOnce = windows_at_once(kSeveral);
    const int lane = thread_index() % 32, first_window = int(unit % params.window_groups()) * kWindowsAtOnce;
    const int row = int(unit / params.window_groups() % params.rows()), channel = int(unit / params.window_groups() / params.rows());
    const int64_t block = params.fft_size / 4, at = row * 64 + lane;
    float4 sums[kWindowsAtOnce][4];
    for (auto& window : sums)
        for (float4& sum : window) sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int i = 0; i < params.pairs; i++) {
        const int64_t pair = int64_t(channel) * params.pairs + i, first = pair * params.blocks * block + at;
        const uint4* const inputs = static_cast<const uint4*>(params.transforms) + first;
        const uint4* const gradients = static_cast<const uint4*>(params.reverse_transforms) + first + (params.blocks - 1) * block;
        const float weight = params.scales[pair] * params.reverse_scales[pair];
        // The latest blocks of inputs, in turn.
        RowFragment recent[kWindowsAtOnce] = {}, gradient;
#pragma unroll 1
        for (int start = first_window; start < params.blocks; start += kWindowsAtOnce) {
#pragma unroll
            for (int turn = 0; turn < kWindowsAtOnce; turn++) {
                const int j = start + turn;
                if (j >= params.blocks) break;
                recent[turn].load_spectrum(inputs + (j - first_window) * block);
                gradient.load_spectrum(gradients - j * block);
#pragma unroll
                for (int n = 0; n < 4; n++)
#pragma unroll
                    for (int d = 0; d < kWindowsAtOnce; d++)
                        accumulate(sums[d][n], weighted_product_of_conjugate(recent[(turn - d + kWindowsAtOnce) % kWindowsAtOnce].value[n / 2][n % 2], gradient.value[n / 2][n % 2], weight));
            }
        }
    }
#pragma unroll
    for (int d = 0; d < kWindowsAtOnce; d++) {
        if (first_window + d >= params.windows) break;
        float4* const to = params.window_sums(channel, first_window + d);
        for (int n = 0; n < 4; n++) to[row * 128 + 32 * n + lane] = sums[d][n];
    }
}

template <bool kSeveral>
DEVICE void sum_windows(const TapParams& params) {
    constexpr int kWarps = kSumThreads / 32;
    for (int64_t unit = int64_t(block_index()) * kWarps + thread_index() / 32; unit < params.units(); unit += int64_t(block_count()) * kWarps) sum_windows<kSeveral>(params, unit);
}
