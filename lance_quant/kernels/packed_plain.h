/* Products and unpacking in plain C, for ARM64 and any other CPU; part of packed_linear.c.

   To the bit what packed_avx2.h gives: the same exact integer sums of 8 columns, 8 lanes of them, and the same float32
   operations after that. Loops are such as compilers vectorise (NEON: smlal, fmla). */
#include "fixed_point.h"

#define LANES 8
#define EACH_LANE for (int lane = 0; lane < LANES; lane++)

/* Fixed-point activations of one row and 64 columns: int32 sums of 8 columns; then int16, the even columns before the odd
   ones; of 24 bits, the upper 16 of them all before the rest, -128..127. */
#define FIXED_BYTES(digits) (32 + 2 * COLUMNS * ((digits) - 1))

/* Returns the unit. */
static float to_fixed(const float *x, const int digits, int8_t *out) {
    int32_t value[COLUMNS], *sum = (int32_t *)out;
    const float unit = fixed_point(x, digits, value);
    int16_t *to = (int16_t *)(sum + LANES);
    EACH_LANE sum[lane] = 0;
    for (int i = 0; i < COLUMNS; i++) {
        const int32_t upper = digits == 2 ? value[i] : (value[i] + 128) >> 8;
        const int at = i % 2 * COLUMNS / 2 + i / 2;
        sum[i / 8] += value[i];
        to[at] = (int16_t)upper;
        if (digits == 3) to[COLUMNS + at] = (int16_t)(value[i] - upper * 256);
    }
    return unit;
}

/* E2M1 code -> twice its value: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives. No table: this is vectorised. */
INLINE int16_t twice_e2m1(int16_t code) {
    const int16_t size = code & 7, twice = size + (size > 4 ? size - 4 : 0) + (size > 6 ? 2 : 0);
    return code & 8 ? -twice : twice;
}

/* 64 columns, the even and the odd ones: INT4 codes, or NVFP4 values times two. */
INLINE void unpack(const uint8_t *packed, const int is_int4, int16_t *even, int16_t *odd) {
    for (int i = 0; i < COLUMNS / 2; i++) even[i] = packed[i] & 15, odd[i] = packed[i] >> 4;
    if (!is_int4)
        for (int i = 0; i < COLUMNS / 2; i++) even[i] = twice_e2m1(even[i]), odd[i] = twice_e2m1(odd[i]);
}

/* Sums of products of 8 columns each, in units of the activations. */
INLINE void dot8(const int16_t *even, const int16_t *odd, const int16_t *x, const int digits, int32_t *sum) {
    const int half = COLUMNS / 2;
    int32_t product[COLUMNS / 2];
    for (int i = 0; i < half; i++) product[i] = (int32_t)even[i] * x[i] + (int32_t)odd[i] * x[half + i];
    if (digits == 3)
        for (int i = 0; i < half; i++)
            product[i] = product[i] * 256 + (int32_t)even[i] * x[2 * half + i] + (int32_t)odd[i] * x[3 * half + i];
    EACH_LANE {
        const int32_t *own = product + 4 * lane;
        sum[lane] = (own[0] + own[1]) + (own[2] + own[3]);
    }
}

/* In the order of packed_avx2.h. */
INLINE float lanes_sum(const float *v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

/* One weight row times m rows of activations; units: [m, steps]. */
INLINE void row_dot(const Weight *w, int64_t row, const int8_t *x, const float *units, const int m, const int is_int4,
                    const int groups, const int digits, float *result) {
    const int64_t steps = w->n_in / COLUMNS, per_row = w->n_in / w->group_size;
    const uint8_t *packed = w->packed + row * (w->n_in / 2);
    float total[4][LANES] = {{0}};
    for (int64_t step = 0; step < steps; step++) {
        const int64_t first = row * per_row + (groups == 1 ? step / w->steps_per_group : step * groups);
        int16_t even[COLUMNS / 2], odd[COLUMNS / 2];
        int32_t zero[LANES];
        float scale[LANES];
        EACH_LANE {
            const int64_t index = first + lane * groups / LANES;
            scale[lane] = scale_at(w, index);
            zero[lane] = is_int4 ? w->zero[index] : 0;
        }
        unpack(packed + step * 32, is_int4, even, odd);
        for (int r = 0; r < m; r++) {
            const float unit = units[r * steps + step];
            const int32_t *moved = (const int32_t *)(x + (step * m + r) * FIXED_BYTES(digits));
            int32_t sum[LANES];
            dot8(even, odd, (const int16_t *)(moved + LANES), digits, sum);
            EACH_LANE sum[lane] -= zero[lane] * moved[lane];
            EACH_LANE total[r][lane] = fmaf((float)sum[lane], scale[lane] * unit, total[r][lane]);
        }
    }
    for (int r = 0; r < m; r++) {
        const float value = lanes_sum(total[r]) * (is_int4 ? 1 : 0.5f);
        result[r] = w->row_scale ? value * w->row_scale[row] : value;
    }
}

/* Weight rows begin..end times m rows of activations x; units: [m, steps]; y: [m, out]. */
INLINE void tile(const Weight *w, int64_t begin, int64_t end, const int8_t *x, const float *units, const int m,
                 const float *bias, float *y, const int is_int4, const int groups, const int digits) {
    for (int64_t row = begin; row < end; row++) {
        float result[4];
        row_dot(w, row, x, units, m, is_int4, groups, digits, result);
        for (int i = 0; i < m; i++) y[i * w->n_out + row] = result[i] + (bias ? bias[row] : 0);
    }
}

INLINE void dequantize_row(const Weight *w, int64_t row, const int is_int4, const int to_bf16, void *out) {
    const int64_t per_row = w->n_in / w->group_size;
    const float factor = (w->row_scale ? w->row_scale[row] : 1) * (is_int4 ? 1 : 0.5f);
    const uint8_t *packed = w->packed + row * (w->n_in / 2);
    for (int64_t group = 0; group < per_row; group++) {
        const int64_t index = row * per_row + group, first = group * w->group_size;
        const float scale = scale_at(w, index) * factor;
        float level[16];
        uint16_t rounded[16];
        for (int code = 0; code < 16; code++) {
            uint32_t bits;
            level[code] = (float)(is_int4 ? code - w->zero[index] : twice_e2m1((int16_t)code)) * scale;
            memcpy(&bits, level + code, 4);
            rounded[code] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        }
        const uint8_t *from = packed + first / 2;
        if (to_bf16)
            for (int64_t i = 0; i < w->group_size; i++)
                ((uint16_t *)out)[first + i] = rounded[i & 1 ? from[i / 2] >> 4 : from[i / 2] & 15];
        else
            for (int64_t i = 0; i < w->group_size; i++)
                ((float *)out)[first + i] = level[i & 1 ? from[i / 2] >> 4 : from[i / 2] & 15];
    }
}

/* One row of 8-bit codes times m rows of activations [m, in]; 4 sums of 8 lanes each, added as int8_avx2.h does. */
INLINE void int8_row_dot(const int8_t *codes, float scale, const float *x, int64_t n_in, const int m, float *result) {
    for (int r = 0; r < m; r++) {
        float total[4][LANES] = {{0}};
        for (int64_t i = 0; i < n_in; i += 4 * LANES)
            for (int c = 0; c < 4; c++) EACH_LANE {
                const int64_t at = i + c * LANES + lane;
                total[c][lane] = fmaf((float)codes[at], x[r * n_in + at], total[c][lane]);
            }
        EACH_LANE total[0][lane] = (total[0][lane] + total[1][lane]) + (total[2][lane] + total[3][lane]);
        result[r] = scale * lanes_sum(total[0]);
    }
}
