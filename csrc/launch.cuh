// Launches of the kernels for one tile type.
#pragma once
#include <atomic>
#include <cuda_runtime.h>

#include "launch.h"

template <class T>
__global__ void __launch_bounds__(ForwardPlan<T>::kThreads, 1) forward_kernel(const __grid_constant__ LaunchParams params) {
    forward_pass<T>(params);
}

template <class T, bool kGradients>
__global__ void __launch_bounds__(ClusterPlan<T, kGradients>::kThreads, 1) cluster_kernel(const __grid_constant__ ClusterParams<kGradients> params) {
    ClusterPass<T, kGradients>(params.turns).run();
}

template <class T>
__global__ void __launch_bounds__(BackwardPlan<T>::kThreads, 1) backward_kernel(const __grid_constant__ LaunchParams params) {
    Backward<T>(params).run();
}

template <class Element, int kSlots, int kTeamThreads>
__global__ void __launch_bounds__(LongPlan<Element, kSlots>::kThreads, 1) long_forward_kernel(const __grid_constant__ LongParams params) {
    LongForward<Element, kSlots, kTeamThreads>(params).run();
}

// What is asked or set once, for each of the first devices: the calls cost as much as a launch. Threads that race write the same.
constexpr int kKnownDevices = 64;
using Prepared = std::atomic<bool>[kKnownDevices];

// Blocks for a persistent grid: every multiprocessor full, or one block a tile where there are fewer.
inline int grid_size(int device, int64_t tiles, int blocks_per_processor, int* error) {
    const int processors = processor_count(device, error);
    return int(std::min<int64_t>(processors, (tiles + blocks_per_processor - 1) / blocks_per_processor)) * blocks_per_processor;
}

// Allows a kernel the shared memory of its largest launch.
template <class Params>
int prepare(void (*kernel)(Params), Prepared& prepared, int device, int maximum_shared_bytes) {
    if (device < kKnownDevices && prepared[device].load(std::memory_order_relaxed)) return 0;
    const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, maximum_shared_bytes);
    if (device < kKnownDevices && error == 0) prepared[device].store(true, std::memory_order_relaxed);
    return error;
}

struct Grid {
    int64_t tiles;
    int blocks_per_processor, threads, shared_bytes, maximum_shared_bytes;
};

template <class Params>
int launch(void (*kernel)(Params), Prepared& prepared, const Grid& grid, const Params& params, void* stream) {
    int device = 0, error = cudaGetDevice(&device);
    const int blocks = error == 0 ? grid_size(device, grid.tiles, grid.blocks_per_processor, &error) : 0;
    if (error == 0) error = prepare(kernel, prepared, device, grid.maximum_shared_bytes);
    if (error == 0) kernel<<<blocks, grid.threads, grid.shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    const int launch_error = cudaGetLastError();
    return error ? error : launch_error;
}

// Of kernels whose blocks hold a filter each, several a multiprocessor, or one of the most points.
template <class Params>
int launch_in_one_block(void (*const (&kernels)[2])(Params), Prepared (&prepared)[2], int64_t filters, const Params& params, void* stream) {
    const int size = params.fft_size, large = is_large_filter(size);
    const Grid grid{filters, filter_blocks(size), filter_threads(size), filter_shared_bytes(size), filter_shared_bytes(large ? kMaximumFilterPoints : kMaximumFilterPoints / 2)};
    return launch(kernels[large], prepared[large], grid, params, stream);
}

template <class T>
int Launcher<T>::forward(const LaunchParams& params, void* stream) {
    using Plan = ForwardPlan<T>;
    static Prepared prepared;
    const Grid grid{tile_count<T>(params) / params.blocks.divisor, 1, Plan::kThreads, Plan::kSharedBytes, Plan::kSharedBytes};
    return launch(forward_kernel<T>, prepared, grid, params, stream);
}

template <class T>
int Launcher<T>::backward(const LaunchParams& params, void* stream) {
    using Plan = BackwardPlan<T>;
    static Prepared prepared;
    const int64_t units = std::min(BackwardUnits<T>(params).count, kMaximumBackwardBlocks);
    return launch(backward_kernel<T>, prepared, {units, 1, Plan::kThreads, Plan::kSharedBytes, Plan::kSharedBytes}, params, stream);
}

template <class Element, int kSlots, int kTeamThreads>
int LongLauncher<Element, kSlots, kTeamThreads>::forward(const LongParams& params, void* stream) {
    using Plan = LongPlan<Element, kSlots>;
    static Prepared prepared;
    int device = 0;
    const int error = cudaGetDevice(&device), limit = fft_conv_shared_limit(device);
    if (error) return error;
    int teams = Plan::kThreads / kTeamThreads;
    while (teams > 1 && Plan::shared_bytes(params, teams) > limit) teams--;
    // Teams beyond those that fit at a time find no tickets left.
    const Grid grid{(params.tickets + teams - 1) / teams, 1, teams * kTeamThreads, Plan::shared_bytes(params, teams), limit};
    return launch(long_forward_kernel<Element, kSlots, kTeamThreads>, prepared, grid, params, stream);
}

// A launch of clusters, of as many as asked for.
template <class T, bool kGradients>
cudaLaunchConfig_t cluster_launch(int clusters, cudaLaunchAttribute* attribute, void* stream) {
    using Plan = ClusterPlan<T, kGradients>;
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim.x = T::kCluster, attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = clusters * T::kCluster, config.blockDim = Plan::kThreads, config.dynamicSmemBytes = Plan::kSharedBytes;
    config.stream = static_cast<cudaStream_t>(stream), config.attrs = attribute, config.numAttrs = 1;
    return config;
}

// Clusters of a kernel that run at a time on the current device, which is then ready to launch it.
template <class T, bool kGradients>
int cluster_count() {
    static std::atomic<int> known[kKnownDevices];
    int device = 0, count = 0, major = 0;
    if (cudaGetDevice(&device) != 0) return 0;
    if (device < kKnownDevices && (count = known[device].load(std::memory_order_relaxed)) > 0) return count;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != 0 || major < 9) return 0;
    const auto kernel = cluster_kernel<T, kGradients>;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = cluster_launch<T, kGradients>(1, &attribute, nullptr);
    int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ClusterPlan<T, kGradients>::kSharedBytes);
    // More than eight blocks is more than every device promises.
    if (error == 0 && T::kCluster > 8) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == 0) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
    cudaGetLastError();
    if (error != 0) return 0;
    if (device < kKnownDevices) known[device].store(count, std::memory_order_relaxed);
    return count;
}

// Of no more clusters than there is work for.
template <class T, bool kGradients>
int launch_clusters(int most, const ClusterParams<kGradients>& params, void* stream) {
    const int count = std::min(cluster_count<T, kGradients>(), most);
    if (count <= 0) return kUnsupported;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = cluster_launch<T, kGradients>(count, &attribute, stream);
    const int error = cudaLaunchKernelEx(&config, cluster_kernel<T, kGradients>, params);
    const int launch_error = cudaGetLastError();
    return error ? error : launch_error;
}

template <class Element, int kBlocks, bool kBlocked>
int ClusterLauncher<Element, kBlocks, kBlocked>::clusters() { return cluster_count<T, false>(); }

template <class Element, int kBlocks, bool kBlocked>
int ClusterLauncher<Element, kBlocks, kBlocked>::forward(const LaunchParams& params, void* stream) {
    return launch_clusters<T, false>(tile_count<T>(params) / params.blocks.divisor, {params}, stream);
}

template <class Element, int kBlocks, bool kBlocked>
int ClusterLauncher<Element, kBlocks, kBlocked>::backward(const LaunchParams& params, void* stream) {
    if constexpr (kBlocked)
        return kUnsupported;
    else
        return launch_clusters<T, true>(std::min(params.channels * params.splits.divisor, backward_clusters(kBlocks)), turns_of(params), stream);
}

#define INSTANTIATE_CLUSTER(...)                            \
    template struct ClusterLauncher<bfloat16, __VA_ARGS__>; \
    template struct ClusterLauncher<float16, __VA_ARGS__>;  \
    template struct ClusterLauncher<float, __VA_ARGS__>;

#define INSTANTIATE_LONG(...)                            \
    template struct LongLauncher<bfloat16, __VA_ARGS__>; \
    template struct LongLauncher<float16, __VA_ARGS__>;  \
    template struct LongLauncher<float, __VA_ARGS__>;

// Of a tile's kernels, forward or backward; and those for all numbers of pairs that tiles have.
#define INSTANTIATE_TILE(kernel, ...)                                                       \
    template int Launcher<Tile<bfloat16, __VA_ARGS__>>::kernel(const LaunchParams&, void*); \
    template int Launcher<Tile<float16, __VA_ARGS__>>::kernel(const LaunchParams&, void*);  \
    template int Launcher<Tile<float, __VA_ARGS__>>::kernel(const LaunchParams&, void*);

#define INSTANTIATE_TILES(kernel, folded)   \
    INSTANTIATE_TILE(kernel, 32, folded, 1) \
    INSTANTIATE_TILE(kernel, 32, folded, 2) \
    INSTANTIATE_TILE(kernel, 32, folded, 4) \
    INSTANTIATE_TILE(kernel, 32, folded, 8) \
    INSTANTIATE_TILE(kernel, 32, folded, 16)
