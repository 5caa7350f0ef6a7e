/* Rounding, unpacking and products with AVX2; part of int8_products.c. */
#include <immintrin.h>

/* One row of activations, [in], times `factor`, rounded to nearest even. */
INLINE void quantize_row(const void *x, const int is_bf16, int64_t n_in, float factor, int16_t *codes) {
    const __m256 by = _mm256_set1_ps(factor);
    for (int64_t i = 0; i < n_in; i += 16) {  /* a multiple of 64 */
        __m256i part[2];
        for (int half = 0; half < 2; half++) {
            __m256 value;
            if (is_bf16)
                value = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(
                    (const __m128i *)((const uint16_t *)x + i + 8 * half))), 16));
            else
                value = _mm256_loadu_ps((const float *)x + i + 8 * half);
            part[half] = _mm256_cvtps_epi32(_mm256_mul_ps(value, by));
        }
        __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(part[0], part[1]), 0xd8);
        if (factor == 0) both = _mm256_setzero_si256();  /* NaN times 0 is NaN */
        _mm256_storeu_si256((__m256i *)(codes + i), both);
    }
}

/* The 16 int8 values that the codes of one group stand for, in both lanes. */
INLINE __m256i table_of(const Weight *w, int64_t row, int64_t index, float inverse) {
    __m256 low, high;
    if (w->zero) {
        const __m256 zero = _mm256_set1_ps((float)w->zero[index]);
        low = _mm256_sub_ps(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), zero);
        high = _mm256_sub_ps(_mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15), zero);
    } else {
        low = _mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6);
        high = _mm256_sub_ps(_mm256_setzero_ps(), low);
    }
    float scale = scale_at(w, index);
    if (w->row_scale) scale *= w->row_scale[row];
    const __m256 by = _mm256_set1_ps(scale), over = _mm256_set1_ps(inverse);
    __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_mul_ps(low, by), over));
    __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_mul_ps(high, by), over));
    __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    return _mm256_permute4x64_epi64(_mm256_packs_epi16(both, both), 0x88);
}

/* 32 codes, one a byte, by the tables of their groups; a lane holds the codes of 32 columns, even or odd ones. */
INLINE __m256i look_up(const __m256i *table, const int groups, __m256i code) {
    if (groups == 1) return _mm256_shuffle_epi8(table[0], code);
    if (groups == 2) return _mm256_shuffle_epi8(_mm256_permute2x128_si256(table[0], table[1], 0x20), code);
    const __m256i second = _mm256_setr_epi64x(0, -1, 0, -1);  /* 16 columns are 8 bytes */
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(_mm256_permute2x128_si256(table[0], table[2], 0x20), code),
                              _mm256_shuffle_epi8(_mm256_permute2x128_si256(table[1], table[3], 0x20), code), second);
}

/* One row as int8 [in]. */
INLINE void unpack_row(const Weight *w, int64_t row, float inverse, const int groups, int8_t *out) {
    const uint8_t *packed = w->packed + row * (w->n_in / 2);
    const int64_t per_row = w->n_in / w->group_size, steps = w->n_in / COLUMNS;
    const __m256i low = _mm256_set1_epi8(15);
    __m256i table[4] = {_mm256_setzero_si256()};
    for (int64_t step = 0; step < steps; step++) {
        if (groups > 1)
            for (int g = 0; g < groups; g++) table[g] = table_of(w, row, row * per_row + step * groups + g, inverse);
        else if (step % w->steps_per_group == 0)
            table[0] = table_of(w, row, row * per_row + step / w->steps_per_group, inverse);
        __m256i bytes = _mm256_loadu_si256((const __m256i *)(packed + 32 * step));
        __m256i even = look_up(table, groups, _mm256_and_si256(bytes, low));
        __m256i odd = look_up(table, groups, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
        __m256i a = _mm256_unpacklo_epi8(even, odd), b = _mm256_unpackhi_epi8(even, odd);
        __m256i *to = (__m256i *)(out + COLUMNS * step);
        _mm256_storeu_si256(to, _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(a, b, 0x31));
    }
}

/* 8 rows of int8 [8, in] and 16 columns -> int16 [8 pairs of columns, 8 rows, 2], a pair of columns OUTPUTS apart. */
INLINE void interleave(const int8_t *rows, int64_t n_in, int16_t *out) {
    __m256i r[8], s[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(rows + i * n_in)));
    for (int i = 0; i < 4; i++) {
        s[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            t[4 * i + 2 * j] = _mm256_unpacklo_epi64(s[4 * i + j], s[4 * i + 2 + j]);
            t[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(s[4 * i + j], s[4 * i + 2 + j]);
        }
    for (int p = 0; p < 4; p++) {
        _mm256_store_si256((__m256i *)(out + p * 2 * OUTPUTS), _mm256_permute2x128_si256(t[p], t[4 + p], 0x20));
        _mm256_store_si256((__m256i *)(out + (4 + p) * 2 * OUTPUTS), _mm256_permute2x128_si256(t[p], t[4 + p], 0x31));
    }
}

/* Adds the products of so many pairs of inputs to a tile's sums[ROWS, OUTPUTS]. */
INLINE void tile(const int16_t *x, const int16_t *w, int64_t pairs, int32_t *sums) {
    __m256i total[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int half = 0; half < 2; half++)
            total[r][half] = _mm256_loadu_si256((const __m256i *)(sums + r * OUTPUTS + 8 * half));
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m256i a = _mm256_load_si256((const __m256i *)(w + pair * 2 * OUTPUTS));
        __m256i b = _mm256_load_si256((const __m256i *)(w + pair * 2 * OUTPUTS + OUTPUTS));
        for (int r = 0; r < ROWS; r++) {
            int32_t two;
            memcpy(&two, x + (pair * ROWS + r) * 2, 4);
            __m256i both = _mm256_set1_epi32(two);
            total[r][0] = _mm256_add_epi32(total[r][0], _mm256_madd_epi16(both, a));
            total[r][1] = _mm256_add_epi32(total[r][1], _mm256_madd_epi16(both, b));
        }
    }
    for (int r = 0; r < ROWS; r++) {
        _mm256_storeu_si256((__m256i *)(sums + r * OUTPUTS), total[r][0]);
        _mm256_storeu_si256((__m256i *)(sums + r * OUTPUTS + 8), total[r][1]);
    }
}
