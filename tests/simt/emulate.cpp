// Runs the kernels on the CPU over host memory, block after block: the entry points that tests/test_kernels_emulated.py calls.
#include "../../csrc/api.cu"

template <class T>
int Launcher<T>::forward(const LaunchParams& params, void*) {
    simt::launch(2, ForwardPlan<T>::kThreads, ForwardPlan<T>::kSharedBytes, [&] { forward_pass<T>(params); });
    return 0;
}

template <class T>
int Launcher<T>::backward(const LaunchParams& params, void*) {
    simt::launch(2, BackwardPlan<T>::kThreads, BackwardPlan<T>::kSharedBytes, [&] { Backward<T>(params).run(); });
    return 0;
}

template <class T, bool kGradients>
int emulate_clusters(int most, const ClusterParams<kGradients>& params) {
    simt::launch(std::min(2, most) * T::kCluster, ClusterPlan<T, kGradients>::kThreads, ClusterPlan<T, kGradients>::kSharedBytes, [&] { ClusterPass<T, kGradients>(params.turns).run(); }, T::kCluster);
    return 0;
}

template <class Element, int kBlocks, bool kBlocked>
int ClusterLauncher<Element, kBlocks, kBlocked>::forward(const LaunchParams& params, void*) {
    return emulate_clusters<T, false>(tile_count<T>(params) / params.blocks.divisor, {params});
}

template <class Element, int kBlocks, bool kBlocked>
int ClusterLauncher<Element, kBlocks, kBlocked>::backward(const LaunchParams& params, void*) {
    if constexpr (kBlocked)
        return kUnsupported;
    else
        return emulate_clusters<T, true>(params.channels * params.splits.divisor, turns_of(params));
}

template <class Element, int kBlocks, bool kBlocked>
int ClusterLauncher<Element, kBlocks, kBlocked>::clusters() { return 2; }

int processor_count(int, int*) { return 2; }

int launch_filter(const FilterParams& params, void*) {
    if (!params.in_passes()) {
        simt::launch(2, filter_threads(params.fft_size), filter_shared_bytes(params.fft_size), [&] { filter_spectra(params); });
    } else {
        for_stages(params, [](auto stage, const FilterParams& stage_params) {
            using Stage = decltype(stage);
            simt::launch(2, kFilterThreads, Stage::kBytes, [&] { Stage::run(stage_params); });
            return 0;
        });
        simt::launch(2, kFilterThreads, kLongFilterBytes, [&] { LongFilter(params).row_pass(); });
    }
    return 0;
}

int launch_taps(const TapParams& params, void*) {
    if (params.transforms) simt::launch(2, kSumThreads, 0, [&] { params.several() ? sum_windows<true>(params) : sum_windows<false>(params); });
    if (!params.in_passes) {
        simt::launch(2, filter_threads(params.fft_size), filter_shared_bytes(params.fft_size), [&] { transform_windows(params); });
    } else {
        simt::launch(2, kFilterThreads, kLongFilterBytes, [&] { LongTaps(params).row_pass(); });
        simt::launch(2, kFilterThreads, kLongFilterBytes, [&] { LongTaps(params).column_pass(); });
    }
    return 0;
}

template <class Element, int kSlots, int kTeamThreads>
int LongLauncher<Element, kSlots, kTeamThreads>::forward(const LongParams& params, void*) {
    using Plan = LongPlan<Element, kSlots>;
    simt::launch(1, Plan::kThreads, Plan::shared_bytes(params, Plan::kThreads / kTeamThreads), [&] { LongForward<Element, kSlots, kTeamThreads>(params).run(); });
    return 0;
}

template <class Element, bool kGated, int kTaps>
int ShortLauncher<Element, kGated, kTaps>::forward(const ShortParams& params, void*) {
    simt::launch(2, kShortThreads, 0, [&] { short_forward<Element, kGated, kTaps>(params); });
    return 0;
}

template <class Element, bool kGated, int kTaps>
int ShortLauncher<Element, kGated, kTaps>::backward(const ShortParams& params, void*) {
    simt::launch(2, kShortThreads, 0, [&] { short_backward<Element, kGated, kTaps>(params); });
    return 0;
}

extern "C" const char* fft_conv_error_string(int code) { return code == kUnsupported ? "no kernel for these parameters" : "emulated"; }

extern "C" int fft_conv_shared_limit(int) { return kSharedLimit; }
