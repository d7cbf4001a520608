// C interface of the kernel library. Pointers are device memory, strides count elements, every launch goes to the given stream.
// Functions return 0 or a CUDA error code, which fft_conv_error_string names.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// A (batch, channels, length) tensor whose time stride is 1; data is null where an optional operand is absent.
struct fft_conv_tensor {
    void* data;
    int64_t batch_stride, channel_stride;
};

enum fft_conv_element { FFT_CONV_BFLOAT16 = 0, FFT_CONV_FLOAT16 = 1, FFT_CONV_FLOAT32 = 2 };

// y = post_gate * conv(pre_gate * u, k) with the filter k given by its spectrum of fft_size points (hf_flashfftconv/ops/filters.py).
// folded: causal or bidirectional convolution of sequences of up to fft_size positions, each with a transform of its own (csrc/transform.cuh); else
// convolution on a circle of fft_size points, two sequences a transform.
// cluster > 1: so many blocks share a transform, of 8,192 points for each; folded is set.
// windows > 0: causal convolution of sequences of any length in blocks of fft_size, folded, of one thread block or in a cluster of 8 or 16; k is given by the
// spectra of so many windows (fft_conv_filter_params), enough for its taps or for all blocks.
// Of sequences in blocks, and of fft_conv_long_forward: output may be absent; reverse: the convolution is transposed.
struct fft_conv_params {
    fft_conv_tensor u, pre_gate, post_gate, grad_output;
    fft_conv_tensor output, grad_u, grad_pre_gate, grad_post_gate;
    fft_conv_tensor second_gate, second_output;     // of the same: another gate of the convolution, and its product
    const uint32_t* tables;         // hf_flashfftconv/ops/tables.py
    const uint32_t* spectrum;       // (channels, fft_size) complex half precision in kernel order, conjugated where stated
    const float* spectrum_scale;    // (channels,) what the spectrum was divided by
    float* grad_filter;             // backward: what fft_conv_tap_gradient is given for sums, in fft_conv_backward_splits, or null
    void* scratch;                  // of clusters, backward: fft_conv_backward_scratch bytes; of blocked sequences: fft_conv_blocked_scratch
    // Of fft_conv_long_forward (hf_flashfftconv/ops/long_plan.py): how the work is laid out, and memory that it needs besides `scratch`.
    uint32_t* counters;             // all zero
    void* energies;                 // (pairs,) of sixteen bytes, and (pairs, 2, part_count) of eight
    int32_t batch, channels, length, fft_size, element, folded;
    int32_t outer_radix, group_pairs, ring, part_count, column_items, period, tickets;
    int32_t outer_delay, row_delay, inverse_delay;      // periods from the energies of a group to these passes
    int32_t windows, reverse, cluster;
    // Where fft_conv_tap_gradient is to follow, else null: what it asks for. Both sequences of a pair then have one scale. A pair is what a transform takes.
    void* transforms;               // (channels, pairs, blocks, fft_size) of all blocks in the order in which they are worked on
    float* pair_scales;             // (channels, pairs) what undoes their scales
};

// Gradients of the taps, from the sums of fft_conv_backward, or from the transforms that two calls of fft_conv_forward or fft_conv_long_forward have kept: of pre_gate * u, and in reverse of post_gate * grad_output. Taps as in fft_conv_filter_params; no sequence of windows
// has taps_rev.
struct fft_conv_tap_params {
    const void *transforms, *reverse_transforms;    // null if there are sums
    const float *scales, *reverse_scales;
    float* sums;                    // (channels, windows, splits, fft_size, 2), of one window or made here in one split; overwritten
    float *grad_k, *grad_k_rev, *grad_skip;     // (channels, taps), (channels, taps_rev) and (channels,); null where there are none
    int64_t k_stride, k_tap_stride, k_rev_stride, k_rev_tap_stride;
    float factor;                   // of all of them
    int32_t channels, pairs, blocks, windows, splits, fft_size, taps, taps_rev;
    int32_t folded;                 // as in fft_conv_params; windows are
    int32_t in_passes;              // as those have to go that are larger than fft_conv_largest_filter, and others may from fft_size 8,192 on
};

// Spectra of real filters: k[n] is the tap at lag n < taps, k_rev[n] that at lag -1 - n, n < taps_rev. With N = fft_size points and w = exp(-2 pi i / N)
// the spectrum has at f the sum of tap(lag) w^(lag f) over all lags or, folded, that of tap(lag) w^(lag (f + 1/4)).
// windows > 0: so many spectra for each filter, folded, with one scale. Of window d, lag n is tap d N + n, from -N on and up to N - 1; there are no taps_rev.
struct fft_conv_filter_params {
    const float *k, *k_rev, *skip;  // (channels, taps), (channels, taps_rev) or null, (channels,) or null
    uint32_t* spectrum;             // (channels, windows, fft_size)
    float* scale;                   // (channels,)
    // Null or, for spectra in passes, from fft_size 8,192 on, as those have to be that are larger than fft_conv_largest_filter: memory between the passes,
    // and so many channels that it has room for: more are worked on one group after the other.
    float* partial_sums;            // (work_channels, windows, fft_size / 16)
    void* work;                     // (work_channels, windows, fft_size) of eight bytes
    // Where the taps of neighbouring channels are neighbours in memory instead, passes read those of 16 channels together.
    int64_t k_stride, k_tap_stride, k_rev_stride, k_rev_tap_stride;
    int32_t channels, taps, taps_rev, fft_size, windows, work_channels, folded;
};

// A (batch, channels, length) tensor of any strides.
struct fft_conv_strided_tensor {
    void* data;
    int64_t batch_stride, channel_stride, time_stride;
};

// Short causal convolutions of every channel, y[t] = bias + sum over n < taps of weight[taps - 1 - n] z[t - n]; at most seven taps.
// gate < 0: z has the channels of outputs[0]. Otherwise z has three times as many: outputs[0] comes from the third called gate,
// outputs[1] is the product of the other two. In the backward pass outputs are the gradients; the time stride of all outputs is 1.
struct fft_conv_short_params {
    fft_conv_strided_tensor z, grad_z;
    fft_conv_tensor output, product;
    const void *weight, *bias;      // (channels of z, taps), (channels of z,) or null
    float* grad_filter;             // (fft_conv_short_splits, channels of z, taps + 1) partial sums of the gradients of weight and bias
    int32_t batch, channels, length, taps, gate, element, weight_element, bias_element;
};

int fft_conv_short_forward(const struct fft_conv_short_params* params, void* stream);
int fft_conv_short_backward(const struct fft_conv_short_params* params, void* stream);
int fft_conv_short_splits(const struct fft_conv_short_params* params);
int fft_conv_filter_spectrum(const struct fft_conv_filter_params* params, void* stream);
int fft_conv_forward(const struct fft_conv_params* params, void* stream);
int fft_conv_long_forward(const struct fft_conv_params* params, void* stream);
int fft_conv_backward(const struct fft_conv_params* params, void* stream);
int fft_conv_tap_gradient(const struct fft_conv_tap_params* params, void* stream);
int fft_conv_backward_splits(const struct fft_conv_params* params);
// Clusters of the forward kernel that a device runs at a time; zero where it has none.
int fft_conv_clusters(const struct fft_conv_params* params);
int64_t fft_conv_backward_scratch(const struct fft_conv_params* params);
// Of blocked sequences, on a device; negative if it cannot be asked.
int64_t fft_conv_blocked_scratch(const struct fft_conv_params* params, int device);
// The most shared memory that a block takes in a call of forward or backward, its filter spectra included; negative where there is no kernel.
int fft_conv_shared_bytes(const struct fft_conv_params* params, int backward);
// What a block may take on a device; negative if it cannot be asked.
int fft_conv_shared_limit(int device);
// The largest fft_size whose spectra and gradients of taps need no passes on a device.
int fft_conv_largest_filter(int device);
const char* fft_conv_error_string(int code);
int fft_conv_version(void);

#ifdef __cplusplus
}
#endif
