// Launches of the kernels for one tile type.
#pragma once
#include <cuda_runtime.h>

#include "launch.h"

template <class T>
__global__ void __launch_bounds__(ForwardPlan<T>::kThreads, 1) forward_kernel(const __grid_constant__ LaunchParams params) {
    Forward<T>(params).run();
}

template <class T>
__global__ void __launch_bounds__(BackwardPlan<T>::kThreads, 1) backward_kernel(const __grid_constant__ LaunchParams params) {
    Backward<T>(params).run();
}

// Blocks for a persistent grid: one on every multiprocessor, or as many as there is work for.
inline int grid_size(int64_t work, int* error) {
    int device = 0, processors = 0;
    *error = cudaGetDevice(&device);
    if (*error == 0) *error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    return int(std::min<int64_t>(processors, work));
}

template <class Params>
int launch(void (*kernel)(Params), int64_t work, int threads, int shared_bytes, const Params& params, void* stream) {
    int error = 0;
    const int grid = grid_size(work, &error);
    if (error == 0) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error == 0) kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    const int launch_error = cudaGetLastError();
    return error ? error : launch_error;
}

template <class T>
int Launcher<T>::forward(const LaunchParams& params, void* stream) {
    using Plan = ForwardPlan<T>;
    return launch(forward_kernel<T>, tile_count<T>(params), Plan::kThreads, Plan::kSharedBytes, params, stream);
}

template <class T>
int Launcher<T>::backward(const LaunchParams& params, void* stream) {
    using B = BackwardTile<T>;
    using Plan = BackwardPlan<B>;
    return launch(backward_kernel<B>, std::min(BackwardUnits<B>(params).count, kMaximumBackwardBlocks), Plan::kThreads, Plan::kSharedBytes, params, stream);
}

#define INSTANTIATE_TILES(...)                        \
    template struct Launcher<Tile<bfloat16, __VA_ARGS__>>; \
    template struct Launcher<Tile<float16, __VA_ARGS__>>;  \
    template struct Launcher<Tile<float, __VA_ARGS__>>;
