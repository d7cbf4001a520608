// Gradients of the taps of blocked sequences.
#include "launch.cuh"

template <bool kSeveral>
__global__ void __launch_bounds__(kSumThreads, sum_blocks(kSeveral)) window_sums_kernel(const __grid_constant__ TapParams params) {
    sum_windows<kSeveral>(params);
}

template <bool kSeveral>
static int launch_sums(const TapParams& params, void* stream) {
    static Prepared prepared;
    return launch(window_sums_kernel<kSeveral>, prepared, {(params.units() + 3) / 4, sum_blocks(kSeveral), kSumThreads, 0, 0}, params, stream);
}

template <bool kLarge>
__global__ void __launch_bounds__(kLarge ? kLargeFilterThreads : kFilterThreads, kLarge ? 1 : kFilterBlocks) tap_gradient_kernel(const __grid_constant__ TapParams params) {
    transform_windows(params);
}

template <bool kLarge>
static int launch_windows(const TapParams& params, void* stream) {
    static Prepared prepared;
    const int size = params.fft_size, bytes = FilterPoints::bytes(size / 2), maximum_bytes = FilterPoints::bytes(kMaximumFilterPoints / (kLarge ? 2 : 4));
    return launch(tap_gradient_kernel<kLarge>, prepared, {int64_t(params.channels) * params.windows, filter_blocks(size), filter_threads(size), bytes, maximum_bytes}, params, stream);
}

__global__ void __launch_bounds__(kFilterThreads, 3) tap_rows_kernel(const __grid_constant__ TapParams params) { LongTaps(params).row_pass(); }

__global__ void __launch_bounds__(kFilterThreads, 3) tap_columns_kernel(const __grid_constant__ TapParams params) { LongTaps(params).column_pass(); }

int launch_taps(const TapParams& params, void* stream) {
    static Prepared rows_prepared, columns_prepared;
    int device = 0, error = cudaGetDevice(&device);
    if (error == 0 && params.transforms) error = params.several() ? launch_sums<true>(params, stream) : launch_sums<false>(params, stream);
    if (error) return error;
    if (!params.in_passes(fft_conv_largest_filter(device))) return is_large_filter(params.fft_size) ? launch_windows<true>(params, stream) : launch_windows<false>(params, stream);
    const int64_t filters = int64_t(params.channels) * params.windows;
    const int second_error = launch(tap_rows_kernel, rows_prepared, {filters * LongTaps::row_pairs(params), 3, kFilterThreads, kLongFilterBytes, kLongFilterBytes}, params, stream);
    return second_error ? second_error : launch(tap_columns_kernel, columns_prepared, {LongTaps::tiles(params), 3, kFilterThreads, kLongFilterBytes, kLongFilterBytes}, params, stream);
}
