// Filter spectra.
#include "launch.cuh"

template <bool kLarge>
__global__ void __launch_bounds__(kLarge ? kLargeFilterThreads : kFilterThreads, kLarge ? 1 : kFilterBlocks) filter_kernel(const __grid_constant__ FilterParams params) {
    filter_spectra(params);
}

template <class Stage>
__global__ void __launch_bounds__(kFilterThreads, Stage::kAtOnce) filter_stage_kernel(const __grid_constant__ FilterParams params) { Stage::run(params); }

__global__ void __launch_bounds__(kFilterThreads, kFilterBlocks) filter_rows_kernel(const __grid_constant__ FilterParams params) { LongFilter(params).row_pass(); }

int launch_filter(const FilterParams& params, void* stream) {
    static Prepared prepared[2], rows_prepared;
    if (!params.in_passes()) return launch_in_one_block({filter_kernel<false>, filter_kernel<true>}, prepared, int64_t(params.channels) * params.window_count(), params, stream);
    const int error = for_stages(params, [&](auto stage, const FilterParams& stage_params) {
        using Stage = decltype(stage);
        static Prepared stage_prepared;
        return launch(filter_stage_kernel<Stage>, stage_prepared, {Stage::blocks(stage_params), Stage::kAtOnce, kFilterThreads, Stage::kBytes, Stage::kBytes}, stage_params, stream);
    });
    return error ? error : launch(filter_rows_kernel, rows_prepared, {LongFilter::row_pairs(params), kFilterBlocks, kFilterThreads, kLongFilterBytes, kLongFilterBytes}, params, stream);
}
