// Filter spectra: one small kernel for each tile that a full transform has.
#include "launch.cuh"

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) filter_kernel(const __grid_constant__ FilterParams params) {
    filter_tiles<T>(params);
}

template <class T>
int FilterLauncher<T>::filter(const FilterParams& params, void* stream) {
    const int channels_per_tile = T::kRows >> params.log_radix, tiles = (params.channels + channels_per_tile - 1) / channels_per_tile;
    return launch(filter_kernel<T>, tiles, T::kThreads, FilterPlan<T>::kSharedBytes, params, stream);
}

template struct FilterLauncher<Tile<float, 16, false, 16>>;
template struct FilterLauncher<Tile<float, 32, false, 16>>;
template struct FilterLauncher<Tile<float, 32, false, 1>>;
template struct FilterLauncher<Tile<float, 64, false, 1>>;
