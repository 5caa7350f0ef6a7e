/* Products and unpacking with AVX2; part of packed_linear.c.

   Multiplies unsigned bytes by signed ones: INT4 codes 0..15, or NVFP4 values doubled and moved up by 12, 0..24, by the
   2 or 3 digits of the activations. Zero points times the sum of 8 columns are subtracted from the sums. */
#include "fixed_point.h"

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
    int32_t value[COLUMNS];
    const float unit = fixed_point(x, digits, value);
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
    return unit;
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

/* Weight rows begin..end times m rows of activations x; units: [m, steps]; y: [m, out]. */
INLINE void tile(const Weight *w, int64_t begin, int64_t end, const int8_t *x, const float *units, const int m,
                 const float *bias, float *y, const int is_int4, const int groups, const int digits) {
    for (int64_t row = begin; row < end; row++) {
        float result[4];
        switch (m) {
        case 1: row_dot(w, row, x, units, 1, is_int4, groups, digits, result); break;
        case 2: row_dot(w, row, x, units, 2, is_int4, groups, digits, result); break;
        case 3: row_dot(w, row, x, units, 3, is_int4, groups, digits, result); break;
        default: row_dot(w, row, x, units, 4, is_int4, groups, digits, result);
        }
        for (int i = 0; i < m; i++) y[i * w->n_out + row] = result[i] + (bias ? bias[row] : 0);
    }
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
