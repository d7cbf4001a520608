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

__global__ void __launch_bounds__(kFilterThreads, kFilterBlocks) tap_rows_kernel(const __grid_constant__ TapParams params) { LongTaps(params).row_pass(); }

__global__ void __launch_bounds__(kFilterThreads, kFilterBlocks) tap_columns_kernel(const __grid_constant__ TapParams params) { LongTaps(params).column_pass(); }

int launch_taps(const TapParams& params, void* stream) {
    static Prepared prepared[2], rows_prepared, columns_prepared;
    const int error = !params.transforms ? 0 : params.several() ? launch_sums<true>(params, stream) : launch_sums<false>(params, stream);
    if (error) return error;
    const int64_t filters = int64_t(params.channels) * params.windows;
    if (!params.in_passes) return launch_in_one_block({tap_gradient_kernel<false>, tap_gradient_kernel<true>}, prepared, filters, params, stream);
    const int second_error = launch(tap_rows_kernel, rows_prepared, {filters * LongTaps::row_pairs(params), kFilterBlocks, kFilterThreads, kLongFilterBytes, kLongFilterBytes}, params, stream);
    return second_error ? second_error : launch(tap_columns_kernel, columns_prepared, {LongTaps::tiles(params), kFilterBlocks, kFilterThreads, kLongFilterBytes, kLongFilterBytes}, params, stream);
}
