// From spectra of real filters in single precision, of which torch.fft gives the half that is not redundant, to operands of the kernels: scaled by a
// power of two, rounded to half precision, in kernel order. For transforms beyond those of filter.cuh.
#pragma once
#include "filter.cuh"

constexpr int kRoundingThreads = 256, kRoundingRows = 32, kRoundingPitch = kColumns / 2 + 1;
constexpr int kRoundingBytes = kRoundingRows * kRoundingPitch * 8;

struct RoundingParams : fft_conv_rounding_params {
    HOST_DEVICE int rows() const { return fft_size / kColumns; }
    HOST_DEVICE int row_tiles() const { return (rows() + kRoundingRows - 1) / kRoundingRows; }
};

// A tile is some rows e of 256 frequencies e + fft_size / 256 k: read along e, written along k.
DEVICE void round_tile(const RoundingParams& params, int channel, int first_row) {
    const int half = params.fft_size / 2, warp = thread_index() / 32, lane = thread_index() % 32, row = first_row + lane;
    const float scale = scale_of_largest(bits_from_float(params.largest[channel]) & 0x7fffffffu);
    const Complex* const spectrum = reinterpret_cast<const Complex*>(params.half_spectrum) + int64_t(channel) * (half + 1);
    uint2* const tile = reinterpret_cast<uint2*>(shared_memory());
    if (row < params.rows()) {
#pragma unroll 4
        for (int k = warp; k < kColumns / 2; k += kRoundingThreads / 32) {
            // A word holds the frequencies f and f + N / 2, whose conjugate is that at N / 2 - f. Fragment, lane and point of a row as in filter.cuh.
            const int frequency = row + params.rows() * k, k2 = k % 16, k3 = k / 16;
            const Complex x = spectrum[frequency], y = conjugate(spectrum[half - frequency]);
            const int place = (k3 / 4 * 32 + k2 / 2 * 4 + k3 % 4) * 2 + k2 % 2;
            tile[lane * kRoundingPitch + place] = scaled_pair(x, y, scale);
        }
    }
    block_barrier();
    uint2* const words = reinterpret_cast<uint2*>(params.spectrum + int64_t(channel) * params.fft_size) + int64_t(first_row) * (kColumns / 2);
    const int rows = params.rows() - first_row < kRoundingRows ? params.rows() - first_row : kRoundingRows;
    for (int i = thread_index(); i < rows * (kColumns / 2); i += kRoundingThreads) words[i] = tile[i / (kColumns / 2) * kRoundingPitch + i % (kColumns / 2)];
    if (first_row == 0 && thread_index() == 0) params.scale[channel] = scale;
    block_barrier();
}

DEVICE void round_spectra(const RoundingParams& params) {
    const int64_t tiles = int64_t(params.channels) * params.row_tiles();
    for (int64_t tile = block_index(); tile < tiles; tile += block_count()) round_tile(params, int(tile / params.row_tiles()), int(tile % params.row_tiles()) * kRoundingRows);
}
