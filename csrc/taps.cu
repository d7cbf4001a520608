// Gradients of the taps of blocked sequences.
#include "launch.cuh"

__global__ void __launch_bounds__(kSumThreads, 3) window_sums_kernel(const __grid_constant__ TapParams params) { sum_windows(params); }

__global__ void __launch_bounds__(kTapThreads, 3) tap_gradient_kernel(const __grid_constant__ TapParams params) { transform_windows(params); }

int launch_taps(const TapParams& params, void* stream) {
    static Prepared sums_prepared, prepared;
    const int bytes = FilterPoints::bytes(params.fft_size);
    const int error = launch(window_sums_kernel, sums_prepared, {(params.units() + 3) / 4, 3, kSumThreads, 0, 0}, params, stream);
    return error || !params.grad_filter ? error : launch(tap_gradient_kernel, prepared, {params.channels, 3, kTapThreads, bytes, bytes}, params, stream);
}
