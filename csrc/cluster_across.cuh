// DFTs of R points across the R blocks of a cluster, in shared memory, where csrc/cluster_rows.cuh has no registers for them.
#pragma once
#include "small_transform.cuh"
#include "transform.cuh"

template <class T>
struct AcrossBlocks {
    using Vector = typename Choose<(T::kCluster > 8), uint2, uint4>::type;      // of a row, that a thread transforms
    static constexpr int kVectors = kRowUnits * 16 / int(sizeof(Vector));      // of a row

    // The vector that is number `at` in rows whose number four divides: see row_unit().
    DEVICE static Vector* vector_of(uint4* rows, int row, int at) {
        return reinterpret_cast<Vector*>(rows) + row * kVectors + (at ^ (row & 3) * (32 / int(sizeof(Vector))));
    }

    // All warps of a group. Calls function(b, own, at, vector) for the results that this thread has: vector `at` of row `own` of each block.
    template <class Function>
    DEVICE static void transform(uint4* rows, int warp, int lane, Function function) {
        constexpr int kPairs = int(sizeof(Vector)) / 8;
        const int first = warp * 32 + lane, at = first % kVectors;
#pragma unroll 2
        for (int i = 0; i < T::kOwnRows * kVectors / T::kThreads; i++) {
            const int own = first / kVectors + i * (T::kThreads / kVectors);
            PlanarPair x[kPairs][T::kCluster];
#pragma unroll
            for (int b = 0; b < T::kCluster; b++) unpack(*vector_of(rows, b * T::kOwnRows + own, at), x, b);
#pragma unroll
            for (int j = 0; j < kPairs; j++) small_transform(x[j]);
#pragma unroll
            for (int b = 0; b < T::kCluster; b++) function(b, own, at, vector(x, b));
        }
    }

private:
    DEVICE static void unpack(uint4 v, PlanarPair (&x)[2][T::kCluster], int b) { x[0][b] = {v.x, v.y}, x[1][b] = {v.z, v.w}; }
    DEVICE static void unpack(uint2 v, PlanarPair (&x)[1][T::kCluster], int b) { x[0][b] = {v.x, v.y}; }
    DEVICE static uint4 vector(const PlanarPair (&x)[2][T::kCluster], int b) { return make_uint4(x[0][b].re, x[0][b].im, x[1][b].re, x[1][b].im); }
    DEVICE static uint2 vector(const PlanarPair (&x)[1][T::kCluster], int b) { return make_uint2(x[0][b].re, x[0][b].im); }
};
