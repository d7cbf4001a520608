// Filter spectra.
#include "launch.cuh"

__global__ void __launch_bounds__(kFilterThreads, 3) filter_kernel(const __grid_constant__ FilterParams params) { filter_spectra(params); }

__global__ void __launch_bounds__(kFilterThreads) filter_scales_kernel(const __grid_constant__ FilterParams params) { filter_scales(params); }

__global__ void __launch_bounds__(kFilterThreads, 3) filter_columns_kernel(const __grid_constant__ FilterParams params) { LongFilter(params).column_pass(); }

__global__ void __launch_bounds__(kFilterThreads, 3) filter_rows_kernel(const __grid_constant__ FilterParams params) { LongFilter(params).row_pass(); }

static int launch_passes(const FilterParams& params, void* stream) {
    static Prepared scales, columns, rows;
    const int64_t tiles = (int64_t(params.channels) * params.window_count() * params.fft_size) >> 1 >> kLogFilterTile;
    int error = launch(filter_scales_kernel, scales, {params.channels, 4, kFilterThreads, kFilterControlBytes, kFilterControlBytes}, params, stream);
    if (!error) error = launch(filter_columns_kernel, columns, {tiles, 3, kFilterThreads, kLongFilterBytes, kLongFilterBytes}, params, stream);
    return error ? error : launch(filter_rows_kernel, rows, {tiles, 3, kFilterThreads, kLongFilterBytes, kLongFilterBytes}, params, stream);
}

int launch_filter(const FilterParams& params, void* stream) {
    static Prepared prepared;
    if (params.fft_size > kMaximumFilterPoints) return launch_passes(params, stream);
    const Grid grid{int64_t(params.channels) * params.window_count(), 3, kFilterThreads, filter_shared_bytes(params.fft_size), filter_shared_bytes(kMaximumFilterPoints)};
    return launch(filter_kernel, prepared, grid, params, stream);
}
