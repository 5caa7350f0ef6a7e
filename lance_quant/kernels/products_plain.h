/* Rounding, unpacking and products in plain C, for ARM64 and any other CPU; part of int8_products.c. All of it is exact
   or defined by w4a8.py, so this gives the bits of products_avx2.h. */

/* One row of activations, [in], times `factor`, rounded to nearest even. */
INLINE void quantize_row(const void *x, const int is_bf16, int64_t n_in, float factor, int16_t *codes) {
    for (int64_t i = 0; i < n_in; i++)
        codes[i] = factor == 0 ? 0 : (int16_t)rintf(activation(x, is_bf16, i) * factor);  /* NaN times 0 is NaN */
}

/* The 16 int8 values that the codes of one group stand for. */
INLINE void table_of(const Weight *w, int64_t row, int64_t index, float inverse, int8_t *table) {
    static const float e2m1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, 0, -0.5f, -1, -1.5f, -2, -3, -4, -6};
    float scale = scale_at(w, index);
    if (w->row_scale) scale *= w->row_scale[row];
    for (int code = 0; code < 16; code++) {
        const float level = w->zero ? (float)(code - w->zero[index]) : e2m1[code];
        const float exact = rintf(level * scale * inverse);
        table[code] = (int8_t)(exact < -128 ? -128 : exact > 127 ? 127 : exact);
    }
}

/* One row as int8 [in]. */
INLINE void unpack_row(const Weight *w, int64_t row, float inverse, const int groups, int8_t *out) {
    const uint8_t *packed = w->packed + row * (w->n_in / 2);
    const int64_t per_row = w->n_in / w->group_size;
    (void)groups;
    for (int64_t group = 0; group < per_row; group++) {
        int8_t table[16];
        table_of(w, row, row * per_row + group, inverse, table);
        for (int64_t i = group * w->group_size / 2; i < (group + 1) * w->group_size / 2; i++) {
            out[2 * i] = table[packed[i] & 15];
            out[2 * i + 1] = table[packed[i] >> 4];
        }
    }
}

/* 8 rows of int8 [8, in] and 16 columns -> int16 [8 pairs of columns, 8 rows, 2], a pair of columns OUTPUTS apart. */
INLINE void interleave(const int8_t *rows, int64_t n_in, int16_t *out) {
    for (int pair = 0; pair < 8; pair++)
        for (int row = 0; row < 8; row++)
            for (int i = 0; i < 2; i++) out[pair * 2 * OUTPUTS + 2 * row + i] = rows[row * n_in + 2 * pair + i];
}

/* Adds the products of so many pairs of inputs to a tile's sums[ROWS, OUTPUTS]. */
INLINE void tile(const int16_t *x, const int16_t *w, int64_t pairs, int32_t *sums) {
    for (int r = 0; r < ROWS; r++) {
        int32_t total[OUTPUTS];
        memcpy(total, sums + r * OUTPUTS, sizeof total);
        for (int64_t pair = 0; pair < pairs; pair++) {
            const int16_t *two = x + (pair * ROWS + r) * 2, *own = w + pair * 2 * OUTPUTS;
            for (int j = 0; j < OUTPUTS; j++)
                total[j] += (int32_t)two[0] * own[2 * j] + (int32_t)two[1] * own[2 * j + 1];
        }
        memcpy(sums + r * OUTPUTS, total, sizeof total);
    }
}
