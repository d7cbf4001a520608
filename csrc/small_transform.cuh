// DFT of a few points in registers, for values that have sums, differences and add_turned(sum, difference, x, y, index), which gives x + t and x - t
// with t = y exp(-2 pi i index / 16).
#pragma once
#include "primitives.cuh"

template <class Value, int kPoints>
DEVICE void small_transform(Value (&x)[kPoints]) {
    if constexpr (kPoints > 1) {
        Value even[kPoints / 2], odd[kPoints / 2];
#pragma unroll
        for (int i = 0; i < kPoints / 2; i++) even[i] = x[2 * i], odd[i] = x[2 * i + 1];
        small_transform(even);
        small_transform(odd);
#pragma unroll
        for (int i = 0; i < kPoints / 2; i++) add_turned(x[i], x[i + kPoints / 2], even[i], odd[i], 16 / kPoints * i);
    }
}
