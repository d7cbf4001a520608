// The short convolutions: one kernel for each element type, alone or gated, for up to three taps or up to seven.
#include "launch.cuh"
#include "short_conv.cuh"

template <class Element, bool kGated, int kTaps>
__global__ void __launch_bounds__(kShortThreads, ShortLauncher<Element, kGated, kTaps>::kForwardBlocks)
    short_forward_kernel(const __grid_constant__ ShortParams params) {
    short_forward<Element, kGated, kTaps>(params);
}

template <class Element, bool kGated, int kTaps>
__global__ void __launch_bounds__(kShortThreads, ShortLauncher<Element, kGated, kTaps>::kBackwardBlocks)
    short_backward_kernel(const __grid_constant__ ShortParams params) {
    short_backward<Element, kGated, kTaps>(params);
}

template <class Element, bool kGated, int kTaps>
int ShortLauncher<Element, kGated, kTaps>::forward(const ShortParams& params, void* stream) {
    static Prepared prepared;
    return launch(short_forward_kernel<Element, kGated, kTaps>, prepared, {params.units, kForwardBlocks, kShortThreads, 0, 0}, params, stream);
}

template <class Element, bool kGated, int kTaps>
int ShortLauncher<Element, kGated, kTaps>::backward(const ShortParams& params, void* stream) {
    static Prepared prepared;
    return launch(short_backward_kernel<Element, kGated, kTaps>, prepared, {params.units, kBackwardBlocks, kShortThreads, 0, 0}, params, stream);
}

#define INSTANTIATE_SHORT(Element)                                \
    template struct ShortLauncher<Element, false, kShortFewTaps>; \
    template struct ShortLauncher<Element, true, kShortFewTaps>;  \
    template struct ShortLauncher<Element, false, kShortMaxTaps>; \
    template struct ShortLauncher<Element, true, kShortMaxTaps>;

INSTANTIATE_SHORT(bfloat16)
INSTANTIATE_SHORT(float16)
INSTANTIATE_SHORT(float)
