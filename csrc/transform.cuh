// The Fourier transform of a tile as matrix products, after FlashFFTConv (arXiv 2311.05908, section 3.1).
//
//   N = radix * 16 * 16,  n = 256 n1 + 16 n2 + n3,  f = k1 + radix (k2 + 16 k3)
//
// The outer stage contracts n1 (all rows, across warps), the inner stages n2 and n3 (one row, one warp, in registers). Values travel as planar
// pairs: one word holds the real parts of two points, the next word their imaginary parts. Accumulators of one product are, once packed, the
// fragment of the next: after a product with the data as B a pair is two columns, and columns are what the following product with the data as
// A contracts; there a pair is two outputs, and these are what the inverse stage with the data as B contracts.
// Index maps of a lane with r = lane / 4, q = lane % 4 (i = half of a pair):
//   n2, k3 = q + 4 s + 8 i  for fragment s;     k2, n3 = 2 row + t  for fragment t (row = r in A and D rows, 2 q + i in D columns)
// All stages are unitary. An inverse transform is the forward one between two conjugations: the first is folded into the product with the
// spectrum, the second is a sign at the output.
#pragma once
#include "tile.cuh"

struct PlanarPair {
    u32 re, im;
};

// (re, im) * (w.re, w.im) for two points.
DEVICE PlanarPair operator*(PlanarPair x, PlanarPair w) {
    return {multiply_add2(x.re, w.re, negate2(multiply2(x.im, w.im))), multiply_add2(x.re, w.im, multiply2(x.im, w.re))};
}

// conj(x * w)
DEVICE PlanarPair conjugate_product(PlanarPair x, PlanarPair w) {
    return {multiply_add2(x.re, w.re, negate2(multiply2(x.im, w.im))), multiply_add2(negate2(x.re), w.im, negate2(multiply2(x.im, w.re)))};
}

// conj(x) * w
DEVICE PlanarPair product_of_conjugate(PlanarPair x, PlanarPair w) {
    return {multiply_add2(x.re, w.re, multiply2(x.im, w.im)), multiply_add2(x.re, w.im, negate2(multiply2(x.im, w.re)))};
}

// The constant operands of the inner stages: DFT-16 matrices as A and as B operand, and the twiddles w256^(k2 n3). Operands of a matrix
// product are whole register groups, so that no move is needed in front of it.
struct InnerConstants {
    u32 a[2][2][4], b_re[2][2][2], b_im[2][2][2];
    PlanarPair twiddle[2][2];

    DEVICE void load(const uint4* table, int lane) {
        for (int m = 0; m < 2; m++)
            for (int s = 0; s < 2; s++) {
                const uint4 v = table[(2 * m + s) * 32 + lane], w = table[(4 + 2 * m + s) * 32 + lane];
                a[m][s][0] = v.x, a[m][s][1] = v.y, a[m][s][2] = v.z, a[m][s][3] = v.w;
                b_re[m][s][0] = w.x, b_re[m][s][1] = w.y, b_im[m][s][0] = w.z, b_im[m][s][1] = w.w;
            }
        for (int m = 0; m < 2; m++) {
            const uint4 t = table[(8 + m) * 32 + lane];
            twiddle[m][0] = {t.x, t.y}, twiddle[m][1] = {t.z, t.w};
        }
    }
};
constexpr int kInnerConstantVectors = 320;

// A row of 256 points in the registers of a warp: value[s][t] with the index maps above.
struct RowFragment {
    PlanarPair value[2][2];

    DEVICE void load(const uint4* words, int lane) {
        for (int s = 0; s < 2; s++) {
            const uint4 v = words[32 * s + lane];
            value[s][0] = {v.x, v.y}, value[s][1] = {v.z, v.w};
        }
    }

    DEVICE void store(uint4* words, int lane) const {
        for (int s = 0; s < 2; s++)
            words[32 * s + lane] = make_uint4(value[s][0].re, value[s][0].im, value[s][1].re, value[s][1].im);
    }

    DEVICE void load_twiddles(const uint4* words, int lane) {
        for (int s = 0; s < 2; s++) {
            const uint4 v = load_table(words + 32 * s + lane);
            value[s][0] = {v.x, v.y}, value[s][1] = {v.z, v.w};
        }
    }

    DEVICE void load_spectrum(const uint4* words, int lane) {
        for (int s = 0; s < 2; s++) {
            const uint4 v = ::load_spectrum(words + 32 * s + lane);
            value[s][0] = {v.x, v.y}, value[s][1] = {v.z, v.w};
        }
    }
};

DEVICE RowFragment operator*(const RowFragment& x, const RowFragment& w) {
    RowFragment z;
    for (int s = 0; s < 2; s++)
        for (int t = 0; t < 2; t++) z.value[s][t] = x.value[s][t] * w.value[s][t];
    return z;
}

DEVICE RowFragment conjugate_product(const RowFragment& x, const RowFragment& w) {
    RowFragment z;
    for (int s = 0; s < 2; s++)
        for (int t = 0; t < 2; t++) z.value[s][t] = conjugate_product(x.value[s][t], w.value[s][t]);
    return z;
}

DEVICE RowFragment product_of_conjugate(const RowFragment& x, const RowFragment& w) {
    RowFragment z;
    for (int s = 0; s < 2; s++)
        for (int t = 0; t < 2; t++) z.value[s][t] = product_of_conjugate(x.value[s][t], w.value[s][t]);
    return z;
}

// DFT-256 of a row: contracts value[s][t] over s and lane % 4 (data as B), multiplies by the twiddles, contracts over t and lane % 4 (data as A).
DEVICE RowFragment inner_transform(const RowFragment& x, const InnerConstants& constants) {
    PlanarPair z[2][2];
    for (int m = 0; m < 2; m++)
        for (int t = 0; t < 2; t++) {
            float d[4] = {};
            for (int s = 0; s < 2; s++) {
                const u32(&a)[4] = constants.a[m][s];
                matrix_multiply_add(d, a[0], a[1], a[2], a[3], x.value[s][t].re, x.value[s][t].im);
            }
            z[m][t] = PlanarPair{pack(d[0], d[1]), pack(d[2], d[3])} * constants.twiddle[m][t];
        }
    RowFragment y;
    for (int h = 0; h < 2; h++) {
        float re[4] = {}, im[4] = {};
        for (int t = 0; t < 2; t++) {
            matrix_multiply_add(re, z[0][t].re, z[1][t].re, z[0][t].im, z[1][t].im, constants.b_re[h][t][0], constants.b_re[h][t][1]);
            matrix_multiply_add(im, z[0][t].re, z[1][t].re, z[0][t].im, z[1][t].im, constants.b_im[h][t][0], constants.b_im[h][t][1]);
        }
        y.value[h][0] = {pack(re[0], re[1]), pack(im[0], im[1])};
        y.value[h][1] = {pack(re[2], re[3]), pack(im[2], im[3])};
    }
    return y;
}

// Where a row keeps the four columns of a lane of the outer stage, in 16-byte units: in the order in which RowFragment's
// lanes read them, so that neither side has bank conflicts.
DEVICE int row_unit(int warp, int lane) { return warp % 8 / 4 * 32 + lane / 4 * 4 + warp % 4; }

// Contracts kSlots values of each of a warp's 32 columns to 4 `tiles` outputs: lane (r, q) holds the columns a, a + 1, a + 128, a + 129 with
// a = 16 warp + 2 r, and x[j][c] is (re, im) of slot 4 j + q at column c. emit(n, d) gets output 4 n + q: (re, im) at columns a + t (first
// two of d[t]) and a + 128 + t (last two).
template <int kSlots, class Emit>
DEVICE void contract(const u32 (&x)[kSlots / 4][4], const uint4* table, int first, int tiles, int lane, Emit emit) {
    constexpr int kSteps = kSlots / 8;
#pragma unroll 4
    for (int n = 0; n < tiles; n += 2) {
        float d[2][2][4] = {};
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            const uint4 b = table[((first + n) / 2 * kSteps + s) * 32 + lane];
#pragma unroll
            for (int t = 0; t < 2; t++) {
                matrix_multiply_add(d[0][t], x[2 * s][t], x[2 * s][2 + t], x[2 * s + 1][t], x[2 * s + 1][2 + t], b.x, b.y);
                matrix_multiply_add(d[1][t], x[2 * s][t], x[2 * s][2 + t], x[2 * s + 1][t], x[2 * s + 1][2 + t], b.z, b.w);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) emit(first + n + i, d[i]);
    }
}

// The same to 4 kTiles outputs that stay in registers, value[n] being what emit(n, .) gets above, from inputs that come in steps of eight:
// load(s, a) brings those of step s as operands, a[t] for the columns a + t and a + 128 + t. `table` holds `pairs_per_step` pairs of tiles a step.
template <int kTiles, class Load>
DEVICE void contract_steps(float (&value)[kTiles][2][4], const uint4* table, int pairs_per_step, int steps, int lane, Load load) {
#pragma unroll
    for (int n = 0; n < kTiles; n++)
        for (int t = 0; t < 2; t++)
            for (int i = 0; i < 4; i++) value[n][t][i] = 0.f;
#pragma unroll 4
    for (int s = 0; s < steps; s++) {
        u32 a[2][4];
        load(s, a);
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
            const uint4 b = table[(s * pairs_per_step + n / 2) * 32 + lane];
#pragma unroll
            for (int t = 0; t < 2; t++) {
                matrix_multiply_add(value[n][t], a[t][0], a[t][1], a[t][2], a[t][3], b.x, b.y);
                matrix_multiply_add(value[n + 1][t], a[t][0], a[t][1], a[t][2], a[t][3], b.z, b.w);
            }
        }
    }
}

// The outer stage: writes the group's share of the rows.
template <class T>
DEVICE void outer_forward(const u32 (&x)[T::kSlots / 4][4], uint4* rows, const uint4* table, int warp, int lane) {
    constexpr int kTilesPerGroup = T::kRows / 4 / T::kGroups;
    const int unit = row_unit(warp, lane);
    contract<T::kSlots>(x, table, warp / 8 * kTilesPerGroup, kTilesPerGroup, lane, [&](int n, const float (&d)[2][4]) {
        rows[(4 * n + lane % 4) * (kRowPitch / 4) + unit] = make_uint4(pack(d[0][0], d[0][2]), pack(d[0][1], d[0][3]), pack(d[1][0], d[1][2]), pack(d[1][1], d[1][3]));
    });
}

// The inverse outer stage: y[n][t] holds (re, im) of the group's slot 4 n + q at columns a + t (first two) and a + 128 + t (last two).
template <class T>
struct OuterResult {
    static constexpr int kTiles = T::kSlots / 4 / T::kGroups;
    float value[kTiles][2][4];

    DEVICE static int slot(int n, int warp, int lane) { return 4 * (warp / 8 * kTiles + n) + lane % 4; }

    DEVICE void transform(const uint4* rows, const uint4* table, int warp, int lane) {
        const int unit = row_unit(warp, lane);
        contract_steps<kTiles>(value, table + warp / 8 * kTiles / 2 * 32, T::kSlots / 8, T::kRows / 8, lane, [&](int s, u32 (&a)[2][4]) {
            const uint4 v = rows[(8 * s + lane % 4) * (kRowPitch / 4) + unit], w = rows[(8 * s + 4 + lane % 4) * (kRowPitch / 4) + unit];
            a[0][0] = join_low(v.x, v.y), a[0][1] = join_high(v.x, v.y), a[0][2] = join_low(w.x, w.y), a[0][3] = join_high(w.x, w.y);
            a[1][0] = join_low(v.z, v.w), a[1][1] = join_high(v.z, v.w), a[1][2] = join_low(w.z, w.w), a[1][3] = join_high(w.z, w.w);
        });
    }
};

// Where the constants of a transform lie. Those that every tile reads from the start are copied to shared memory; the row twiddles, as large as
// the transform, stay in global memory and the L1 cache.
template <class T>
struct Tables {
    static constexpr int kOuterVectors = T::kRows / 8 * (T::kSlots / 8) * 32;
    static constexpr int kSharedVectors = kInnerConstantVectors + 2 * kOuterVectors;
    static constexpr int kSharedBytes = kSharedVectors * 16;
    const uint4 *inner, *outer, *outer_inverse, *twiddle;

    // A block barrier must follow.
    DEVICE Tables(const u32* words, char* memory) {
        const uint4* global = reinterpret_cast<const uint4*>(words);
        uint4* shared = reinterpret_cast<uint4*>(memory);
        for (int i = thread_index(); i < kSharedVectors; i += block_size()) shared[i] = load_table(global + i);
        inner = shared;
        outer = inner + kInnerConstantVectors;
        outer_inverse = outer + kOuterVectors;
        twiddle = global + kSharedVectors;
    }
};
