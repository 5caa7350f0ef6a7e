/* Linear layers over packed weights on CPUs; cpu.py calls this. 4 bits first, 8 at the end.

   A weight row is read 32 bytes at a time: 64 columns, the even ones in the low nibbles. `groups` of scales per 64
   columns are 1 (group sizes that are multiples of 64), 2 (32) or 4 (16).

   The product keeps weights as the small integers they are: INT4 codes less the zero point, or NVFP4 values doubled.
   Activations become fixed-point numbers, 64 columns sharing a unit, of 2 bytes (bfloat16 inputs) or 3. Integer
   products and the sums of 4 or 8 columns are exact; everything after that is float32. NaN and Inf in a row of
   activations make its outputs NaN. */
#include <math.h>

#include "packed_weight.h"

#define ROWS_AT_ONCE 16  /* weight rows per task of a thread */
#define FIXED_CACHE (1 << 19)  /* bytes of activations */
#define INT8_ROWS 3  /* of activations at a time; with 4 the sums would not fit in the registers */

/* LEVEL_... is what the compiler was told to compile for; compile_c.py has the list. */
#if defined(LEVEL_avx512)
#include "int8_avx2.h"
#include "packed_avx512.h"
#elif defined(LEVEL_avx2)
#include "int8_avx2.h"
#include "packed_avx2.h"
#else
#include "packed_plain.h"
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
EXPORT int packed_linear(const Weight *w, const float *x, int64_t rows, int digits, const float *bias, float *y,
                         int threads) {
    const int64_t steps = w->n_in / COLUMNS, per_row = steps * FIXED_BYTES(digits);
    const int64_t fitting = FIXED_CACHE / per_row / 4 * 4, most = fitting < 4 ? 4 : fitting;
    const int64_t part = rows < most ? rows : most;
    int8_t *fixed = ALIGNED(part * per_row);
    float *units = malloc(part * steps * sizeof(float));
    if (!fixed || !units) return FREE_ALIGNED(fixed), free(units), 1;
    for (int64_t r = 0; r < rows; r += part) {
        const int64_t n = rows - r < part ? rows - r : part;
        prepare(w, x + r * w->n_in, n, digits, fixed, units);
        linear_of(w, fixed, units, n, digits, bias, y + r * w->n_out, threads);
    }
    return FREE_ALIGNED(fixed), free(units), 0;
}

/* Rows begin..end as float32 or bfloat16 [end - begin, in], to the last bit what the definition says. */
EXPORT void packed_dequantize(const Weight *w, int64_t begin, int64_t end, int to_bf16, void *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = begin; row < end; row++) {
        void *to = (char *)out + (row - begin) * w->n_in * (to_bf16 ? 2 : 4);
        if (w->zero && to_bf16) dequantize_row(w, row, 1, 1, to);
        else if (w->zero) dequantize_row(w, row, 1, 0, to);
        else if (to_bf16) dequantize_row(w, row, 0, 1, to);
        else dequantize_row(w, row, 0, 0, to);
    }
}

/* 8 bits: y[rows, out] = x[rows, in] . (codes[out, in] * scale[out])^T; scales are bfloat16. A code is exact in float32,
   so there the products are taken. */
EXPORT void int8_linear(const int8_t *codes, const uint16_t *scale, int64_t n_out, int64_t n_in, const float *x,
                        int64_t rows, float *y, int threads) {
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
