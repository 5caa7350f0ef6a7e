/* Products and unpacking with AVX-512 (VNNI: Cascade Lake, Zen 4 and newer); part of packed_linear.c.

   64 columns are two registers of 16-bit numbers, the even columns and the odd ones. One instruction multiplies 32 of
   them by activations of 16 bits and adds neighbours up in 16 sums; with the second register each is a sum over 4
   columns. Activations of 24 bits are two such numbers, the upper 16 bits and what is left, -128..127. */

#define FIXED_BYTES(digits) (2 * COLUMNS * ((digits) - 1))
#define OUT_ROWS 4  /* weight rows at a time: they share the activations' registers */

/* Fixed-point activations of one row and 64 columns, the even ones first; of 24 bits, the upper 16 of them all before
   the rest. Returns the unit. */
static float to_fixed(const float *x, const int digits, int8_t *out) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_or_si512(evens, _mm512_set1_epi32(1));
    const float top = digits == 2 ? 32767.0f : 8355000.0f;  /* at most 32767 in the upper 16 bits, rounded */
    __m512 part[4], largest = _mm512_setzero_ps(), spoilt = _mm512_setzero_ps();
    for (int i = 0; i < 4; i++) {
        part[i] = _mm512_loadu_ps(x + 16 * i);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(part[i]));
        spoilt = _mm512_add_ps(spoilt, _mm512_sub_ps(part[i], part[i]));  /* NaN if any is NaN or Inf */
    }
    const float most = _mm512_reduce_max_ps(largest), sum = _mm512_reduce_add_ps(spoilt);
    float per_unit = most > 0 ? top / most : 0;
    if (!(per_unit < 3e38f)) per_unit = 3e38f;
    const __mmask16 finite = sum == 0 ? 0xFFFF : 0;
    for (int i = 0; i < 4; i++) {
        __m512 columns = _mm512_permutex2var_ps(part[i % 2 * 2], i < 2 ? evens : odds, part[i % 2 * 2 + 1]);
        __m512i value = _mm512_maskz_cvtps_epi32(finite, _mm512_mul_ps(columns, _mm512_set1_ps(per_unit)));
        __m256i *to = (__m256i *)out + i;
        if (digits == 3) {
            __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
            _mm256_store_si256(to + 4, _mm512_cvtepi32_epi16(_mm512_sub_epi32(value, _mm512_slli_epi32(upper, 8))));
            value = upper;
        }
        _mm256_store_si256(to, _mm512_cvtepi32_epi16(value));
    }
    return (per_unit > 0 ? 1 / per_unit : 0) + sum;
}

/* Which of 2 or 4 groups in 64 columns each 16-bit number belongs to. */
INLINE __m512i group_of(const int groups) {
    const int64_t one = 0x0001000100010001;
    return groups == 4 ? _mm512_setr_epi64(0, 0, one, one, 2 * one, 2 * one, 3 * one, 3 * one)
                       : _mm512_setr_epi64(0, 0, 0, 0, one, one, one, one);
}

/* Zero points of 64 columns as 16-bit numbers, and scales (bfloat16) of their 16 sums as float32. */
INLINE __m512i spread_zeros(const uint8_t *zeros, const int groups) {
    uint32_t bytes = 0;
    memcpy(&bytes, zeros, groups);
    __m128i words = _mm_cvtepu8_epi16(_mm_cvtsi32_si128((int32_t)bytes));
    return _mm512_permutexvar_epi16(group_of(groups), _mm512_castsi128_si512(words));
}

INLINE __m512 spread_scales(const uint16_t *scales, const int groups) {
    uint64_t words = 0;
    memcpy(&words, scales, 2 * groups);
    __m512i source = _mm512_castsi128_si512(_mm_cvtsi64_si128((int64_t)words));
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, group_of(groups), source));
}

/* What a part of a weight row needs beside its packed bytes: scales as bfloat16 and zero points, `groups` per step, or
   of groups of 64 columns and more one per step, its scale in float32. */
#define STASH 32  /* steps in a part */
typedef struct {
    const uint8_t *packed, *zero;
    const uint16_t *scale;
    uint16_t made_scale[STASH * 4];  /* of E4M3 bytes */
    uint8_t made_zero[STASH];
    float wide_scale[STASH];
} Part;

/* `n` E4M3 bytes of numbers that are not negative as bfloat16, exactly: the exponent moved, and the 8 below 2^-6. */
INLINE void to_bf16(const uint8_t *bytes, int64_t n, uint16_t *out) {
    const __m512i subnormal = _mm512_castsi128_si512(_mm_setr_epi16(
        0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60));  /* 0, 1, .. 7 times 2^-9 */
    for (int64_t i = 0; i < n; i += 32) {
        const __mmask32 there = n - i < 32 ? (1u << (n - i)) - 1 : ~0u;
        __m512i wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(there, bytes + i));
        __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(wide, 4), _mm512_set1_epi16(120 << 7));
        __mmask32 small = _mm512_cmplt_epu16_mask(wide, _mm512_set1_epi16(8));
        _mm512_mask_storeu_epi16(out + i, there, _mm512_mask_permutexvar_epi16(normal, small, wide, subnormal));
    }
}

/* What the next weight rows will need, into the second cache: the first one holds the activations. */
INLINE void fetch(const void *start, int64_t n_bytes) {
    for (int64_t i = 0; i < n_bytes; i += 64) _mm_prefetch((const char *)start + i, _MM_HINT_T1);
}

INLINE void fill_part(const Weight *w, int64_t row, int64_t first, int64_t n, const int groups, Part *part) {
    const int64_t per_row = w->n_in / w->group_size, group = row * per_row + first * groups / w->steps_per_group;
    const int64_t later = group + OUT_ROWS * per_row, count = n * groups;
    if (w->zero) fetch(w->zero + later, count);
    if (w->scale) fetch(w->scale + later, 2 * count);
    else fetch(w->scale_e4m3 + later, count);
    part->packed = w->packed + row * (w->n_in / 2) + first * 32;
    if (w->steps_per_group > 1) {
        int64_t of_step = group, left = w->steps_per_group - first % w->steps_per_group;
        for (int64_t i = 0; i < n; i++) {
            part->wide_scale[i] = bf16(w->scale[of_step]), part->made_zero[i] = w->zero[of_step];
            if (!--left) of_step++, left = w->steps_per_group;
        }
        part->zero = part->made_zero;
        return;
    }
    part->zero = w->zero ? w->zero + group : NULL;
    part->scale = w->scale ? w->scale + group : part->made_scale;
    if (!w->scale) to_bf16(w->scale_e4m3 + group, n * groups, part->made_scale);
    if (groups == 1)
        for (int64_t i = 0; i < n; i++) part->wide_scale[i] = bf16(part->scale[i]);
}

/* 64 columns: INT4 codes less the zero point, or NVFP4 values times two. */
INLINE void unpack(const Part *part, int64_t step, const int is_int4, const int groups, __m512i *even, __m512i *odd) {
    __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(part->packed + step * 32)));
    __m512i above = _mm512_srli_epi16(bytes, 4);
    if (is_int4) {
        __m512i zero = groups == 1 ? _mm512_set1_epi16(part->zero[step])
                                   : spread_zeros(part->zero + step * groups, groups);
        *even = _mm512_sub_epi16(_mm512_and_si512(bytes, _mm512_set1_epi16(15)), zero);
        *odd = _mm512_sub_epi16(above, zero);
        return;
    }
    const __m128i values = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
    const __m512i table = _mm512_cvtepi8_epi16(_mm256_set_m128i(values, values));  /* 5 bits of an index count */
    *even = _mm512_permutexvar_epi16(bytes, table);
    *odd = _mm512_permutexvar_epi16(above, table);
}

/* Sums of 4 columns each, in units of the activations. */
INLINE __m512i dot4(__m512i even, __m512i odd, const int8_t *x, const int digits) {
    __m512i total = _mm512_dpwssd_epi32(_mm512_setzero_si512(), even, _mm512_load_si512(x));
    total = _mm512_dpwssd_epi32(total, odd, _mm512_load_si512(x + COLUMNS));
    if (digits == 2) return total;
    total = _mm512_dpwssd_epi32(_mm512_slli_epi32(total, 8), even, _mm512_load_si512(x + 2 * COLUMNS));
    return _mm512_dpwssd_epi32(total, odd, _mm512_load_si512(x + 3 * COLUMNS));
}

/* `n` weight rows from `row` on times m rows of activations; units: [m, steps]; result: [m, OUT_ROWS]. */
INLINE void rows_dot(const Weight *w, int64_t row, const int n, const int8_t *x, const float *units, const int m,
                     const int is_int4, const int groups, const int digits, float *result) {
    const int64_t steps = w->n_in / COLUMNS;
    __m512 total[OUT_ROWS][4];
    Part part[OUT_ROWS];
    float factor[OUT_ROWS][4][STASH];
    for (int o = 0; o < n; o++)
        for (int r = 0; r < m; r++) total[o][r] = _mm512_setzero_ps();
    for (int64_t first = 0; first < steps; first += STASH) {
        const int64_t count = steps - first < STASH ? steps - first : STASH;
        for (int o = 0; o < n; o++) {
            fill_part(w, row + o, first, count, groups, part + o);
            if (groups == 1)
                for (int r = 0; r < m; r++)
                    for (int64_t i = 0; i < count; i++)
                        factor[o][r][i] = part[o].wide_scale[i] * units[r * steps + first + i];
        }
        for (int64_t i = 0; i < count; i++) {
            const int8_t *at = x + (first + i) * m * FIXED_BYTES(digits);
            __m512i even[OUT_ROWS], odd[OUT_ROWS];
            __m512 scale[OUT_ROWS];
            for (int o = 0; o < n; o++) {
                fetch(part[o].packed + i * 32 + OUT_ROWS * (w->n_in / 2), 32);
                unpack(part + o, i, is_int4, groups, even + o, odd + o);
                if (groups > 1) scale[o] = spread_scales(part[o].scale + i * groups, groups);
            }
            for (int r = 0; r < m; r++)
                for (int o = 0; o < n; o++) {
                    __m512 sum = _mm512_cvtepi32_ps(dot4(even[o], odd[o], at + r * FIXED_BYTES(digits), digits));
                    __m512 by = groups == 1 ? _mm512_set1_ps(factor[o][r][i])
                                            : _mm512_mul_ps(scale[o], _mm512_set1_ps(units[r * steps + first + i]));
                    total[o][r] = _mm512_fmadd_ps(sum, by, total[o][r]);
                }
        }
    }
    for (int r = 0; r < m; r++)
        for (int o = 0; o < n; o++) {
            float value = _mm512_reduce_add_ps(total[o][r]) * (is_int4 ? 1 : 0.5f);
            result[r * OUT_ROWS + o] = w->row_scale ? value * w->row_scale[row + o] : value;
        }
}

INLINE void rows_of_m(const Weight *w, int64_t row, const int n, const int8_t *x, const float *units, const int m,
                      const int is_int4, const int groups, const int digits, const float *bias, float *y) {
    float result[4 * OUT_ROWS];
    rows_dot(w, row, n, x, units, m, is_int4, groups, digits, result);
    for (int r = 0; r < m; r++)
        for (int o = 0; o < n; o++)
            y[r * w->n_out + row + o] = result[r * OUT_ROWS + o] + (bias ? bias[row + o] : 0);
}

/* Weight rows begin..end times m rows of activations x; units: [m, steps]; y: [m, out]. */
INLINE void tile(const Weight *w, int64_t begin, int64_t end, const int8_t *x, const float *units, const int m,
                 const float *bias, float *y, const int is_int4, const int groups, const int digits) {
    int64_t row = begin;
    for (; row + OUT_ROWS <= end; row += OUT_ROWS)
        switch (m) {
        case 1: rows_of_m(w, row, OUT_ROWS, x, units, 1, is_int4, groups, digits, bias, y); break;
        case 2: rows_of_m(w, row, OUT_ROWS, x, units, 2, is_int4, groups, digits, bias, y); break;
        case 3: rows_of_m(w, row, OUT_ROWS, x, units, 3, is_int4, groups, digits, bias, y); break;
        default: rows_of_m(w, row, OUT_ROWS, x, units, 4, is_int4, groups, digits, bias, y);
        }
    for (; row < end; row++) rows_of_m(w, row, 1, x, units, m, is_int4, groups, digits, bias, y);
}

/* The 16 levels of a group, of a code as the file has it. */
INLINE __m512 levels(const Weight *w, int64_t group, const int is_int4, float factor) {
    const __m512 codes =
        is_int4 ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                : _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
    const float zero = is_int4 ? w->zero[group] : 0;
    return _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zero)), _mm512_set1_ps(scale_at(w, group) * factor));
}

/* bfloat16, rounded to nearest even, in the upper halves. */
INLINE __m512i rounded(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), last);
}

/* 32 columns by tables of 16 levels, one of the first and one of the last 16 columns. */
INLINE void look_up(const uint8_t *packed, __m512 first, __m512 second, const int to_bf16, void *out) {
    const __m512i upper = _mm512_setr_epi32(0x30001, 0x70005, 0xB0009, 0xF000D, 0x130011, 0x170015, 0x1B0019,
                                            0x1F001D, 0x230021, 0x270025, 0x2B0029, 0x2F002D, 0x330031, 0x370035,
                                            0x3B0039, 0x3F003D);
    __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)packed));
    __m512i both = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 12));
    if (to_bf16) {
        const __m512i table_of = _mm512_setr_epi64(0, 0, 0, 0, 0x0010001000100010, 0x0010001000100010,
                                                   0x0010001000100010, 0x0010001000100010);
        __m512i table = _mm512_permutex2var_epi16(rounded(first), upper, rounded(second));
        __m512i index = _mm512_ternarylogic_epi32(both, _mm512_set1_epi16(15), table_of, 0xEA);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
        return;
    }
    __m512i index = _mm512_and_si512(both, _mm512_set1_epi16(15));
    __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(index));
    __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(index, 1));
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(low, first));
    _mm512_storeu_ps((float *)out + 16, _mm512_permutexvar_ps(high, second));
}

INLINE void dequantize_row(const Weight *w, int64_t row, const int is_int4, const int to_bf16, void *out) {
    const int64_t per_row = w->n_in / w->group_size, size = w->group_size < 32 ? 32 : w->group_size;
    const float factor = w->row_scale ? w->row_scale[row] : 1;
    const uint8_t *packed = w->packed + row * (w->n_in / 2);
    char *to = out;
    for (int64_t group = row * per_row; group < (row + 1) * per_row; group += size / w->group_size) {
        __m512 first = levels(w, group, is_int4, factor);
        __m512 second = w->group_size < 32 ? levels(w, group + 1, is_int4, factor) : first;
        for (int64_t column = 0; column < size; column += 32, packed += 16, to += to_bf16 ? 64 : 128)
            look_up(packed, first, second, to_bf16, to);
    }
}
