// Filter spectra.
#include "launch.cuh"

__global__ void __launch_bounds__(kFilterThreads, 3) filter_kernel(const __grid_constant__ FilterParams params) { filter_spectra(params); }

template <class Stage>
__global__ void __launch_bounds__(kFilterThreads, Stage::kAtOnce) filter_stage_kernel(const __grid_constant__ FilterParams params) { Stage::run(params); }

__global__ void __launch_bounds__(kFilterThreads, 3) filter_rows_kernel(const __grid_constant__ FilterParams params) { LongFilter(params).row_pass(); }

int launch_filter(const FilterParams& params, void* stream) {
    static Prepared prepared, rows_prepared;
    const int64_t filters = int64_t(params.channels) * params.window_count();
    if (params.fft_size <= kMaximumFilterPoints)
        return launch(filter_kernel, prepared, {filters, 3, kFilterThreads, filter_shared_bytes(params.fft_size), filter_shared_bytes(kMaximumFilterPoints)}, params, stream);
    const int error = for_stages(params, [&](auto stage, const FilterParams& stage_params) {
        using Stage = decltype(stage);
        static Prepared stage_prepared;
        return launch(filter_stage_kernel<Stage>, stage_prepared, {Stage::blocks(stage_params), Stage::kAtOnce, kFilterThreads, Stage::kBytes, Stage::kBytes}, stage_params, stream);
    });
    return error ? error : launch(filter_rows_kernel, rows_prepared, {LongFilter::row_pairs(params), 3, kFilterThreads, kLongFilterBytes, kLongFilterBytes}, params, stream);
}
