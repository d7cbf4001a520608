// The short convolutions: one kernel for each element type, alone or gated, for up to four taps or up to seven.
#include "launch.cuh"
#include "short_conv.cuh"

// Blocks of a multiprocessor at a time, by the registers of a thread.
template <int kTaps>
constexpr int kForwardBlocks = kTaps <= 4 ? 5 : 3;
template <int kTaps>
constexpr int kBackwardBlocks = kTaps <= 4 ? 3 : 2;

template <class Element, bool kGated, int kTaps>
__global__ void __launch_bounds__(kShortThreads, kForwardBlocks<kTaps>) short_forward_kernel(const __grid_constant__ ShortParams params) {
    short_forward<Element, kGated, kTaps>(params);
}

template <class Element, bool kGated, int kTaps>
__global__ void __launch_bounds__(kShortThreads, kBackwardBlocks<kTaps>) short_backward_kernel(const __grid_constant__ ShortParams params) {
    short_backward<Element, kGated, kTaps>(params);
}

template <class Element, bool kGated, int kTaps>
int ShortLauncher<Element, kGated, kTaps>::forward(const ShortParams& params, void* stream) {
    static Prepared prepared;
    return launch(short_forward_kernel<Element, kGated, kTaps>, prepared, {params.units, kForwardBlocks<kTaps>, kShortThreads, 0, 0}, params, stream);
}

template <class Element, bool kGated, int kTaps>
int ShortLauncher<Element, kGated, kTaps>::backward(const ShortParams& params, void* stream) {
    static Prepared prepared;
    return launch(short_backward_kernel<Element, kGated, kTaps>, prepared, {params.units, kBackwardBlocks<kTaps>, kShortThreads, 0, 0}, params, stream);
}

#define INSTANTIATE_SHORT(Element)                     \
    template struct ShortLauncher<Element, false, 4>;  \
    template struct ShortLauncher<Element, true, 4>;   \
    template struct ShortLauncher<Element, false, kShortMaxTaps>; \
    template struct ShortLauncher<Element, true, kShortMaxTaps>;

INSTANTIATE_SHORT(bfloat16)
INSTANTIATE_SHORT(float16)
INSTANTIATE_SHORT(float)
