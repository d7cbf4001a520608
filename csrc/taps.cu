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

__global__ void __launch_bounds__(kTapThreads, 3) tap_gradient_kernel(const __grid_constant__ TapParams params) { transform_windows(params); }

int launch_taps(const TapParams& params, void* stream) {
    static Prepared prepared;
    const int bytes = FilterPoints::bytes(params.fft_size);
    const int error = params.several() ? launch_sums<true>(params, stream) : launch_sums<false>(params, stream);
    return error || !params.grad_filter ? error : launch(tap_gradient_kernel, prepared, {params.channels, 3, kTapThreads, bytes, bytes}, params, stream);
}
