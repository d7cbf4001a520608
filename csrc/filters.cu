// Filter spectra: from taps, or from what torch.fft makes of those beyond.
#include "launch.cuh"

__global__ void __launch_bounds__(kFilterThreads, 3) filter_kernel(const __grid_constant__ FilterParams params) { filter_spectra(params); }

int launch_filter(const FilterParams& params, void* stream) {
    static Prepared prepared;
    const Grid grid{int64_t(params.channels) * std::max(params.windows, 1), 3, kFilterThreads, filter_shared_bytes(params.fft_size), filter_shared_bytes(kMaximumFilterPoints)};
    return launch(filter_kernel, prepared, grid, params, stream);
}

__global__ void __launch_bounds__(kRoundingThreads) rounding_kernel(const __grid_constant__ RoundingParams params) { round_spectra(params); }

int launch_rounding(const RoundingParams& params, void* stream) {
    static Prepared prepared;
    const Grid grid{int64_t(params.channels) * params.row_tiles(), 6, kRoundingThreads, kRoundingBytes, kRoundingBytes};
    return launch(rounding_kernel, prepared, grid, params, stream);
}
