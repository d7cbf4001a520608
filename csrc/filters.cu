// Filter spectra.
#include "launch.cuh"

__global__ void __launch_bounds__(kFilterThreads, 3) filter_kernel(const __grid_constant__ FilterParams params) { filter_spectra(params); }

__global__ void __launch_bounds__(kFilterThreads, 3) filter_columns_kernel(const __grid_constant__ FilterParams params) { LongFilter(params).column_pass(); }

__global__ void __launch_bounds__(kFilterThreads, 3) filter_rows_kernel(const __grid_constant__ FilterParams params) { LongFilter(params).row_pass(); }

int launch_filter(const FilterParams& params, void* stream) {
    static Prepared prepared, columns_prepared, rows_prepared;
    const int64_t filters = int64_t(params.channels) * params.window_count();
    if (params.fft_size <= kMaximumFilterPoints)
        return launch(filter_kernel, prepared, {filters, 3, kFilterThreads, filter_shared_bytes(params.fft_size), filter_shared_bytes(kMaximumFilterPoints)}, params, stream);
    const int64_t tiles = filters * (params.fft_size >> 1 >> kLogFilterTile);
    const int error = launch(filter_columns_kernel, columns_prepared, {LongFilter::tiles(params), 3, kFilterThreads, kLongFilterBytes, kLongFilterBytes}, params, stream);
    return error ? error : launch(filter_rows_kernel, rows_prepared, {tiles, 3, kFilterThreads, kLongFilterBytes, kLongFilterBytes}, params, stream);
}
