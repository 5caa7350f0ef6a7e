/* Linear layers over packed weights on x86-64 with AVX2; cpu.py compiles and calls this. 4 bits first, 8 at the end.

   A weight row is read 32 bytes at a time: 64 columns, the even ones in the low nibbles. `groups` of scales per 64
   columns are 1 (group sizes that are multiples of 64), 2 (32) or 4 (16).

   The product keeps weights as the small integers they are: INT4 codes less the zero point, or NVFP4 values doubled.
   Activations become fixed-point numbers, 64 columns sharing a unit, of 2 bytes (bfloat16 inputs) or 3. Integer
   products and the sums of 4 or 8 columns are exact; everything after that is float32. NaN and Inf in a row of
   activations make its outputs NaN. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "packed_weight.h"

#define ROWS_AT_ONCE 16  /* weight rows per task of a thread */
#define FIXED_CACHE (1 << 19)  /* bytes of activations */

INLINE float lanes_sum(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "packed_avx512.h"
#else
#include "packed_avx2.h"
#endif

/* Four rows of activations side by side (fewer in the last part); units: [rows, steps]. */
static void prepare(const Weight *w, const float *x, int64_t rows, int digits, int8_t *fixed, float *units) {
    const int64_t steps = w->n_in / COLUMNS;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t first = r / 4 * 4, m = rows - first < 4 ? rows - first : 4;
        for (int64_t step = 0; step < steps; step++)
            units[r * steps + step] = to_fixed(x + r * w->n_in + step * COLUMNS, digits,
                                               fixed + (first * steps + step * m + r - first) * FIXED_BYTES(digits));
    }
}

#define TILE(is_int4, groups, digits) \
    tile(w, begin, end, x, unit, m, bias, y + r * w->n_out, is_int4, groups, digits)
#define BY_DIGITS(is_int4, groups) (digits == 2 ? TILE(is_int4, groups, 2) : TILE(is_int4, groups, 3))

static void linear_of(const Weight *w, const int8_t *fixed, const float *units, int64_t rows, int digits,
                      const float *bias, float *y, int threads) {
    const int64_t steps = w->n_in / COLUMNS;
    const int groups = w->group_size < COLUMNS ? (int)(COLUMNS / w->group_size) : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t begin = 0; begin < w->n_out; begin += ROWS_AT_ONCE) {
        const int64_t end = begin + ROWS_AT_ONCE < w->n_out ? begin + ROWS_AT_ONCE : w->n_out;
        for (int64_t r = 0; r < rows; r += 4) {
            const int m = rows - r < 4 ? (int)(rows - r) : 4;
            const int8_t *x = fixed + r * steps * FIXED_BYTES(digits);
            const float *unit = units + r * steps;
            if (!w->zero) BY_DIGITS(0, 4);
            else if (groups == 1) BY_DIGITS(1, 1);
            else if (groups == 2) BY_DIGITS(1, 2);
            else BY_DIGITS(1, 4);
        }
    }
}

/* y[rows, out] = x[rows, in] . w^T + bias; 0, or 1 where there is no memory. So many rows of activations are taken at a
   time as stay in a core's second cache while weights pass by. */
int packed_linear(const Weight *w, const float *x, int64_t rows, int digits, const float *bias, float *y, int threads) {
    const int64_t steps = w->n_in / COLUMNS, per_row = steps * FIXED_BYTES(digits);
    const int64_t fitting = FIXED_CACHE / per_row / 4 * 4, most = fitting < 4 ? 4 : fitting;
    const int64_t part = rows < most ? rows : most;
    int8_t *fixed = aligned_alloc(64, (part * per_row + 63) / 64 * 64);
    float *units = malloc(part * steps * sizeof(float));
    if (!fixed || !units) return free(fixed), free(units), 1;
    for (int64_t r = 0; r < rows; r += part) {
        const int64_t n = rows - r < part ? rows - r : part;
        prepare(w, x + r * w->n_in, n, digits, fixed, units);
        linear_of(w, fixed, units, n, digits, bias, y + r * w->n_out, threads);
    }
    return free(fixed), free(units), 0;
}

/* Rows begin..end as float32 or bfloat16 [end - begin, in], to the last bit what the definition says. */
void packed_dequantize(const Weight *w, int64_t begin, int64_t end, int to_bf16, void *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = begin; row < end; row++) {
        void *to = (char *)out + (row - begin) * w->n_in * (to_bf16 ? 2 : 4);
        if (w->zero && to_bf16) dequantize_row(w, row, 1, 1, to);
        else if (w->zero) dequantize_row(w, row, 1, 0, to);
        else if (to_bf16) dequantize_row(w, row, 0, 1, to);
        else dequantize_row(w, row, 0, 0, to);
    }
}

/* 8 bits with one scale per row: a code is exact in float32, so there the products are taken. */
#define CHAINS 4  /* sums of 8 lanes each that do not wait for one another */
#define INT8_ROWS 3  /* of activations at a time; with 4 the sums would not fit in the registers */

/* One row of codes times m rows of activations [m, in]. */
INLINE void int8_row_dot(const int8_t *codes, float scale, const float *x, int64_t n_in, const int m, float *result) {
    __m256 total[INT8_ROWS][CHAINS];
    for (int r = 0; r < m; r++)
        for (int c = 0; c < CHAINS; c++) total[r][c] = _mm256_setzero_ps();
    for (int64_t i = 0; i < n_in; i += 8 * CHAINS)
        for (int c = 0; c < CHAINS; c++) {
            const int64_t at = i + 8 * c;
            __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(codes + at))));
            for (int r = 0; r < m; r++)
                total[r][c] = _mm256_fmadd_ps(code, _mm256_loadu_ps(x + r * n_in + at), total[r][c]);
        }
    for (int r = 0; r < m; r++) {
        __m256 left = _mm256_add_ps(total[r][0], total[r][1]), right = _mm256_add_ps(total[r][2], total[r][3]);
        result[r] = scale * lanes_sum(_mm256_add_ps(left, right));
    }
}

/* y[rows, out] = x[rows, in] . (codes[out, in] * scale[out])^T; scales are bfloat16. */
void int8_linear(const int8_t *codes, const uint16_t *scale, int64_t n_out, int64_t n_in, const float *x, int64_t rows,
                 float *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t begin = 0; begin < n_out; begin += ROWS_AT_ONCE) {
        const int64_t end = begin + ROWS_AT_ONCE < n_out ? begin + ROWS_AT_ONCE : n_out;
        for (int64_t r = 0; r < rows; r += INT8_ROWS) {
            const int m = rows - r < INT8_ROWS ? (int)(rows - r) : INT8_ROWS;
            for (int64_t row = begin; row < end; row++) {
                const int8_t *code = codes + row * n_in;
                float result[INT8_ROWS];
                switch (m) {
                case 1: int8_row_dot(code, bf16(scale[row]), x + r * n_in, n_in, 1, result); break;
                case 2: int8_row_dot(code, bf16(scale[row]), x + r * n_in, n_in, 2, result); break;
                default: int8_row_dot(code, bf16(scale[row]), x + r * n_in, n_in, 3, result);
                }
                for (int i = 0; i < m; i++) y[(r + i) * n_out + row] = result[i];
            }
        }
    }
}
