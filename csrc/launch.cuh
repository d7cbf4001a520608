// Launches of the kernels for one tile type.
#pragma once
#include <cuda_runtime.h>

#include "launch.h"

template <class T>
__global__ void __launch_bounds__(T::kThreads, ForwardPlan<T>::kBlocks) forward_kernel(const __grid_constant__ LaunchParams params) {
    forward_tiles<T>(params);
}

template <class T>
__global__ void __launch_bounds__(BackwardPlan<T>::kThreads, 1) backward_kernel(const __grid_constant__ LaunchParams params) {
    Backward<T>(params).run();
}

template <class Element, int kSlots>
__global__ void __launch_bounds__(LongForwardPlan<Element, kSlots>::kThreads, 2) long_forward_kernel(const __grid_constant__ LongParams params) {
    LongForward<Element, kSlots>(params).run();
}

template <class Element, int kSlots>
__global__ void __launch_bounds__(LongBackwardPlan<Element, kSlots>::kThreads, 1) long_backward_kernel(const __grid_constant__ LongParams params) {
    LongBackward<Element, kSlots>(params).run();
}

// Blocks for a persistent grid: every multiprocessor full, or one block a tile where there are fewer.
inline int grid_size(int64_t tiles, int blocks_per_processor, int* error) {
    int device = 0, processors = 0;
    *error = cudaGetDevice(&device);
    if (*error == 0) *error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    return int(std::min<int64_t>(processors, (tiles + blocks_per_processor - 1) / blocks_per_processor)) * blocks_per_processor;
}

template <class Params>
int launch(void (*kernel)(Params), int64_t tiles, int blocks_per_processor, int threads, int shared_bytes, const Params& params, void* stream) {
    int error = 0;
    const int grid = grid_size(tiles, blocks_per_processor, &error);
    if (error == 0) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error == 0) kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    const int launch_error = cudaGetLastError();
    return error ? error : launch_error;
}

template <class T>
int Launcher<T>::forward(const LaunchParams& params, void* stream) {
    using Plan = ForwardPlan<T>;
    return launch(forward_kernel<T>, tile_count<T>(params), Plan::kBlocks, T::kThreads, Plan::kSharedBytes, params, stream);
}

template <class T>
int Launcher<T>::backward(const LaunchParams& params, void* stream) {
    using B = BackwardTile<T>;
    using Plan = BackwardPlan<B>;
    return launch(backward_kernel<B>, std::min(BackwardUnits<B>(params).count, kMaximumBackwardBlocks), 1, Plan::kThreads, Plan::kSharedBytes, params, stream);
}

template <class Element, int kSlots>
int LongLauncher<Element, kSlots>::forward(const LongParams& params, void* stream) {
    using Plan = LongForwardPlan<Element, kSlots>;
    return launch(long_forward_kernel<Element, kSlots>, params.tickets, Plan::kBlocks, Plan::kThreads, Plan::kSharedBytes, params, stream);
}

template <class Element, int kSlots>
int LongLauncher<Element, kSlots>::backward(const LongParams& params, void* stream) {
    using Plan = LongBackwardPlan<Element, kSlots>;
    return launch(long_backward_kernel<Element, kSlots>, params.tickets, 1, Plan::kThreads, Plan::kSharedBytes, params, stream);
}

#define INSTANTIATE_LONG(slots)                  \
    template struct LongLauncher<bfloat16, slots>; \
    template struct LongLauncher<float16, slots>;  \
    template struct LongLauncher<float, slots>;

#define INSTANTIATE_TILES(...)                        \
    template struct Launcher<Tile<bfloat16, __VA_ARGS__>>; \
    template struct Launcher<Tile<float16, __VA_ARGS__>>;  \
    template struct Launcher<Tile<float, __VA_ARGS__>>;
