// Filter spectra.
#include "launch.cuh"

template <bool kLarge>
__global__ void __launch_bounds__(kLarge ? kLargeFilterThreads : kFilterThreads, kLarge ? 1 : kFilterBlocks) filter_kernel(const __grid_constant__ FilterParams params) {
    filter_spectra(params);
}

template <bool kLarge>
static int launch_filter_kernel(const FilterParams& params, void* stream) {
    static Prepared prepared;
    const int size = params.fft_size, bytes = filter_shared_bytes(size), maximum_bytes = filter_shared_bytes(kLarge ? kMaximumFilterPoints : kMaximumFilterPoints / 2);
    return launch(filter_kernel<kLarge>, prepared, {int64_t(params.channels) * params.window_count(), filter_blocks(size), filter_threads(size), bytes, maximum_bytes}, params, stream);
}

template <class Stage>
__global__ void __launch_bounds__(kFilterThreads, Stage::kAtOnce) filter_stage_kernel(const __grid_constant__ FilterParams params) { Stage::run(params); }

__global__ void __launch_bounds__(kFilterThreads, 3) filter_rows_kernel(const __grid_constant__ FilterParams params) { LongFilter(params).row_pass(); }

int launch_filter(const FilterParams& params, void* stream) {
    static Prepared rows_prepared;
    if (!params.in_passes()) return is_large_filter(params.fft_size) ? launch_filter_kernel<true>(params, stream) : launch_filter_kernel<false>(params, stream);
    const int error = for_stages(params, [&](auto stage, const FilterParams& stage_params) {
        using Stage = decltype(stage);
        static Prepared stage_prepared;
        return launch(filter_stage_kernel<Stage>, stage_prepared, {Stage::blocks(stage_params), Stage::kAtOnce, kFilterThreads, Stage::kBytes, Stage::kBytes}, stage_params, stream);
    });
    return error ? error : launch(filter_rows_kernel, rows_prepared, {LongFilter::row_pairs(params), 3, kFilterThreads, kLongFilterBytes, kLongFilterBytes}, params, stream);
}
