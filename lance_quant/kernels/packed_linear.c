/* Linear layers over packed weights on x86-64 with AVX2; native.py compiles and calls this. 4 bits first, 8 at the end.

   A weight row is read 32 bytes at a time: 64 columns, the even ones in the low nibbles. `groups` of scales per 64
   columns are 1 (group sizes that are multiples of 64), 2 (32) or 4 (16).

   The product keeps weights as the small integers they are: INT4 codes 0..15, or NVFP4 values doubled and moved up by
   12, 0..24. Activations become fixed-point numbers, 64 columns sharing a unit, split into 2 (16 bits: bfloat16 inputs)
   or 3 (24 bits) signed bytes. Integer products and the sums of 8 columns are exact; everything after that is float32.
   NaN and Inf in a row of activations make its outputs NaN. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define COLUMNS 64  /* per step */
#define ROWS_AT_ONCE 16  /* weight rows per task of a thread */

typedef struct {
    const uint8_t *packed;    /* [out, in/2] */
    const uint16_t *scale;    /* bfloat16 [out, in/group_size], or NULL */
    const uint8_t *scale_e4m3;  /* E4M3 [out, in/group_size], where scale is NULL */
    const float *e4m3;        /* values of the 256 E4M3 bytes */
    const uint8_t *zero;      /* [out, in/group_size]; NULL: NVFP4 */
    const float *row_scale;   /* [out] or NULL: multiplies a row's scales */
    int64_t n_out, n_in, group_size, steps_per_group;
} Weight;

INLINE float bf16(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

INLINE float scale_at(const Weight *w, int64_t index) {
    return w->scale ? bf16(w->scale[index]) : w->e4m3[w->scale_e4m3[index]];
}

/* Scales of the 8 lanes of 8 columns each, for 64 columns whose first group is `index`. */
INLINE __m256 lane_scales(const Weight *w, int64_t index, const int groups) {
    if (groups == 2)
        return _mm256_set_m128(_mm_set1_ps(scale_at(w, index + 1)), _mm_set1_ps(scale_at(w, index)));
    float a, b, c, d;
    if (w->scale) {
        __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)(w->scale + index)));
        __m256i twice = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(_mm_slli_epi32(wide, 16)),
                                                    _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
        return _mm256_castsi256_ps(twice);
    }
    a = scale_at(w, index), b = scale_at(w, index + 1), c = scale_at(w, index + 2), d = scale_at(w, index + 3);
    return _mm256_setr_ps(a, a, b, b, c, c, d, d);
}

/* Zero points of the same lanes; 12 for NVFP4, see `unpack`. */
INLINE __m256i lane_zeros(const Weight *w, int64_t index, const int is_int4, const int groups) {
    if (!is_int4) return _mm256_set1_epi32(12);
    const uint8_t *zero = w->zero + index;
    if (groups == 2) return _mm256_set_m128i(_mm_set1_epi32(zero[1]), _mm_set1_epi32(zero[0]));
    int32_t a = zero[0], b = zero[1], c = zero[2], d = zero[3];
    return _mm256_setr_epi32(a, a, b, b, c, c, d, d);
}

/* E2M1 code -> twice its value. */
INLINE __m256i twice_e2m1(void) {
    return _mm256_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12,
                            0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
}

/* 64 columns as bytes that are not negative: even columns, odd columns. */
INLINE void unpack(const uint8_t *packed, const int is_int4, __m256i *even, __m256i *odd) {
    const __m256i low = _mm256_set1_epi8(15), move = _mm256_set1_epi8(12);
    __m256i bytes = _mm256_loadu_si256((const __m256i *)packed);
    *even = _mm256_and_si256(bytes, low);
    *odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
    if (!is_int4) {
        const __m256i table = _mm256_add_epi8(twice_e2m1(), move);
        *even = _mm256_shuffle_epi8(table, *even);
        *odd = _mm256_shuffle_epi8(table, *odd);
    }
}

/* Fixed-point activations of one row and 64 columns: int32 sums of 8 columns, then, most significant digit first, its
   32 even and 32 odd columns. Close together: a row of 11008 inputs just fits the first cache with two digits. */
#define FIXED_BYTES(digits) (32 + COLUMNS * (digits))

/* Returns the unit. */
static float to_fixed(const float *x, const int digits, int8_t *out) {
    const float top = digits == 2 ? 32630.0f : 8355000.0f;  /* below 127 in every digit */
    float largest = 0, sum = 0;
    int32_t value[COLUMNS];
    for (int i = 0; i < COLUMNS; i++) {
        float size = fabsf(x[i]);
        largest = size > largest ? size : largest;
        sum += size * 0;  /* NaN if any is NaN or Inf */
    }
    float per_unit = largest > 0 ? top / largest : 0;
    if (!(per_unit < 3e38f)) per_unit = 3e38f;
    for (int i = 0; i < COLUMNS; i++) value[i] = sum == 0 ? (int32_t)lrintf(x[i] * per_unit) : 0;
    for (int lane = 0; lane < 8; lane++) {
        int32_t total = 0;
        for (int i = 0; i < 8; i++) total += value[8 * lane + i];
        memcpy(out + 4 * lane, &total, 4);
    }
    for (int place = digits - 1; place >= 0; place--)
        for (int i = 0; i < COLUMNS; i++) {
            int8_t digit = (int8_t)value[i];
            out[32 + COLUMNS * place + 32 * (i & 1) + i / 2] = digit;
            value[i] = (value[i] - digit) >> 8;
        }
    return (per_unit > 0 ? 1 / per_unit : 0) + sum;
}

/* Sums of products of 2 columns each, of one digit, times `factor`: int32, 8 columns a lane. */
INLINE __m256i dot8_digit(__m256i even, __m256i odd, const int8_t *digit, int factor) {
    __m256i a = _mm256_maddubs_epi16(even, _mm256_load_si256((const __m256i *)digit));
    __m256i b = _mm256_maddubs_epi16(odd, _mm256_load_si256((const __m256i *)(digit + 32)));
    return _mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16((int16_t)factor));
}

/* Sums of products of 8 columns each, in units of the activations. */
INLINE __m256i dot8(__m256i even, __m256i odd, const int8_t *x, const int digits) {
    const int8_t *first = x + 32, *second = first + COLUMNS, *third = second + COLUMNS;
    __m256i total = _mm256_add_epi32(dot8_digit(even, odd, first, 256), dot8_digit(even, odd, second, 1));
    if (digits == 2) return total;
    return _mm256_add_epi32(_mm256_slli_epi32(total, 8), dot8_digit(even, odd, third, 1));
}

INLINE float lanes_sum(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

/* Scales and zero points of up to STASH steps that have one group each. Side by side they are converted together; in
   the loop over the steps one instruction broadcasts each. */
#define STASH 32
INLINE void fill_stash(const Weight *w, int64_t row, int64_t first, int64_t n, float *scale, int32_t *zero) {
    const int64_t per_row = w->n_in / w->group_size;
    if (w->steps_per_group == 1) {
        const uint16_t *scales = w->scale + row * per_row + first;
        const uint8_t *zeros = w->zero + row * per_row + first;
        for (int64_t i = 0; i < n; i++) scale[i] = bf16(scales[i]);
        for (int64_t i = 0; i < n; i++) zero[i] = zeros[i];
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        const int64_t group = row * per_row + (first + i) / w->steps_per_group;
        scale[i] = bf16(w->scale[group]);
        zero[i] = w->zero[group];
    }
}

/* One weight row times m rows of activations; units: [m, steps]. */
INLINE void row_dot(const Weight *w, int64_t row, const int8_t *x, const float *units, const int m, const int is_int4,
                    const int groups, const int digits, float *result) {
    const int64_t steps = w->n_in / COLUMNS, per_row = w->n_in / w->group_size;
    const uint8_t *packed = w->packed + row * (w->n_in / 2);
    __m256 total[4];
    for (int r = 0; r < m; r++) total[r] = _mm256_setzero_ps();
    for (int64_t first = 0; first < steps; first += STASH) {
        const int64_t n = steps - first < STASH ? steps - first : STASH;
        float scales[STASH], factors[4][STASH];
        int32_t zeros[STASH];
        if (groups == 1) {
            fill_stash(w, row, first, n, scales, zeros);
            for (int r = 0; r < m; r++)
                for (int64_t i = 0; i < n; i++) factors[r][i] = scales[i] * units[r * steps + first + i];
        }
        for (int64_t i = 0; i < n; i++) {
            const int64_t step = first + i, group = row * per_row + step * groups;
            const __m256i zero = groups == 1 ? _mm256_set1_epi32(zeros[i]) : lane_zeros(w, group, is_int4, groups);
            const __m256 scale = groups == 1 ? _mm256_setzero_ps() : lane_scales(w, group, groups);
            __m256i even, odd;
            unpack(packed + step * 32, is_int4, &even, &odd);
            for (int r = 0; r < m; r++) {
                const int8_t *xr = x + (step * m + r) * FIXED_BYTES(digits);
                __m256i moved = _mm256_mullo_epi32(zero, _mm256_load_si256((const __m256i *)xr));
                __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(dot8(even, odd, xr, digits), moved));
                __m256 factor = groups == 1 ? _mm256_set1_ps(factors[r][i])
                                            : _mm256_mul_ps(scale, _mm256_set1_ps(units[r * steps + step]));
                total[r] = _mm256_fmadd_ps(sum, factor, total[r]);
            }
        }
    }
    for (int r = 0; r < m; r++) {
        float value = is_int4 ? lanes_sum(total[r]) : 0.5f * lanes_sum(total[r]);
        result[r] = w->row_scale ? value * w->row_scale[row] : value;
    }
}

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

INLINE void tile(const Weight *w, int64_t begin, int64_t end, const int8_t *fixed, const float *units, int64_t rows,
                 const float *bias, float *y, const int is_int4, const int groups, const int digits) {
    const int64_t steps = w->n_in / COLUMNS;
    for (int64_t r = 0; r < rows; r += 4) {
        const int m = rows - r < 4 ? (int)(rows - r) : 4;
        const int8_t *x = fixed + r * steps * FIXED_BYTES(digits);
        const float *unit = units + r * steps;
        for (int64_t row = begin; row < end; row++) {
            float result[4];
            switch (m) {
            case 1: row_dot(w, row, x, unit, 1, is_int4, groups, digits, result); break;
            case 2: row_dot(w, row, x, unit, 2, is_int4, groups, digits, result); break;
            case 3: row_dot(w, row, x, unit, 3, is_int4, groups, digits, result); break;
            default: row_dot(w, row, x, unit, 4, is_int4, groups, digits, result);
            }
            for (int i = 0; i < m; i++) y[(r + i) * w->n_out + row] = result[i] + (bias ? bias[row] : 0);
        }
    }
}

#define TILE(is_int4, groups, digits) \
    tile(w, begin, end, fixed, units, rows, bias, y, is_int4, groups, digits)
#define BY_DIGITS(is_int4, groups) (digits == 2 ? TILE(is_int4, groups, 2) : TILE(is_int4, groups, 3))

/* y[rows, out] = x[rows, in] . w^T + bias; 0, or 1 where there is no memory. */
int packed_linear(const Weight *w, const float *x, int64_t rows, int digits, const float *bias, float *y, int threads) {
    const int64_t steps = w->n_in / COLUMNS;
    const int groups = w->group_size < COLUMNS ? (int)(COLUMNS / w->group_size) : 1;
    int8_t *fixed = aligned_alloc(32, rows * steps * FIXED_BYTES(digits));
    float *units = malloc(rows * steps * sizeof(float));
    if (!fixed || !units) return free(fixed), free(units), 1;
    prepare(w, x, rows, digits, fixed, units);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t begin = 0; begin < w->n_out; begin += ROWS_AT_ONCE) {
        const int64_t end = begin + ROWS_AT_ONCE < w->n_out ? begin + ROWS_AT_ONCE : w->n_out;
        if (!w->zero) BY_DIGITS(0, 4);
        else if (groups == 1) BY_DIGITS(1, 1);
        else if (groups == 2) BY_DIGITS(1, 2);
        else BY_DIGITS(1, 4);
    }
    return free(fixed), free(units), 0;
}

/* 8 codes, moved and scaled. */
INLINE __m256 eight(const uint8_t *code, __m256 zero, __m256 scale) {
    __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)code));
    return _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(wide), zero), scale);
}

/* The upper halves, rounded to nearest even. */
INLINE __m256i rounded(__m256 value) {
    __m256i bits = _mm256_castps_si256(value), last = _mm256_set1_epi32(1), half = _mm256_set1_epi32(0x7FFF);
    last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), last);
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, half), last), 16);
}

INLINE void dequantize_row(const Weight *w, int64_t row, const int is_int4, const int to_bf16, void *out) {
    const int64_t per_row = w->n_in / w->group_size, steps = w->n_in / COLUMNS;
    const float factor = (w->row_scale ? w->row_scale[row] : 1) * (is_int4 ? 1 : 0.5f);
    const uint8_t *packed = w->packed + row * (w->n_in / 2);
    for (int64_t step = 0; step < steps; step++) {
        uint8_t code[COLUMNS];
        __m256i even, odd;
        unpack(packed + step * 32, is_int4, &even, &odd);
        __m256i a = _mm256_unpacklo_epi8(even, odd), b = _mm256_unpackhi_epi8(even, odd);
        _mm256_storeu_si256((__m256i *)code, _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256((__m256i *)(code + 32), _mm256_permute2x128_si256(a, b, 0x31));
        for (int part = 0; part < COLUMNS; part += 16) {
            const int64_t group = row * per_row + (step * COLUMNS + part) / w->group_size;
            const __m256 scale = _mm256_set1_ps(scale_at(w, group) * factor);
            const __m256 zero = _mm256_set1_ps(is_int4 ? w->zero[group] : 12);
            __m256 low = eight(code + part, zero, scale), high = eight(code + part + 8, zero, scale);
            const int64_t to = step * COLUMNS + part;
            if (to_bf16) {
                __m256i both = _mm256_packus_epi32(rounded(low), rounded(high));
                _mm256_storeu_si256((__m256i *)((uint16_t *)out + to), _mm256_permute4x64_epi64(both, 0xD8));
            } else {
                _mm256_storeu_ps((float *)out + to, low);
                _mm256_storeu_ps((float *)out + to + 8, high);
            }
        }
    }
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
