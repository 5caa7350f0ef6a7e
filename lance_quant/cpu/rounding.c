/* Searching and rounding of 4-bit weights; rounding.py compiles and calls this. The definitions are in int4.py, nvfp4.py,
   weighted_sums.py and gptq.py, and what is computed here is equal to them in every bit: the same float32 operations in
   the same order, none contracted. Plain C for compilers that vectorize `omp simd` loops.

   A tile is one group of inputs of OUTS outputs, transposed into x[input * OUTS + output], so that every output is a
   lane: nothing is summed across lanes, and all passes over a tile find it in the first cache. */
#include <math.h>
#include <string.h>

#include "portable.h"

#define OUTS 16
#define EACH_OUT _Pragma("omp simd") for (int o = 0; o < OUTS; o++)

typedef struct {
    const float *values;  /* [out, in], any strides */
    int64_t n_out, n_in, out_stride, in_stride, group_size;
} Weight;

/* What may be wanted of a quantized weight; NULL: not. */
typedef struct {
    uint8_t *packed;  /* [out, in/2] */
    float *sums;      /* [2, out, groups]: of weighted squares, and of weighted squared errors */
} Wanted;

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE float at_least(float x, float bound) { return x < bound ? bound : x; }
INLINE float at_most(float x, float bound) { return x > bound ? bound : x; }
INLINE float power_of_two(float x) { return of_bits(bits_of(x) & 0x7F800000u); }
INLINE float inverse_power(float power) { return of_bits(0x7F000000u - bits_of(power)); }

/* weighted_sums.weighted_squares, `off` being an expression of input i and output o: eight sums beside one another, folded in
   halves. */
#define SUM_SQUARES(totals, size, weight, off)                                                        \
    float sums[8][OUTS] = {0};                                                                        \
    for (int64_t first = 0; first < (size); first += 8)                                               \
        for (int lane = 0; lane < 8; lane++) {                                                        \
            int64_t i = first + lane;                                                                 \
            float factor = (weight)[i];                                                               \
            EACH_OUT {                                                                                \
                float v = off;                                                                        \
                sums[lane][o] += v * v * factor;                                                      \
            }                                                                                         \
        }                                                                                             \
    EACH_OUT (totals)[o] = ((sums[0][o] + sums[4][o]) + (sums[2][o] + sums[6][o]))                    \
        + ((sums[1][o] + sums[5][o]) + (sums[3][o] + sums[7][o]));

/* Outputs behind the last one are zeros. */
static void load(const Weight *w, int64_t row, int64_t column, float *restrict x) {
    int count = w->n_out - row < OUTS ? (int)(w->n_out - row) : OUTS;
    if (count < OUTS) memset(x, 0, w->group_size * OUTS * sizeof(float));
    const float *from = w->values + row * w->out_stride + column * w->in_stride;
    for (int o = 0; o < count; o++)
        for (int64_t i = 0; i < w->group_size; i++) x[i * OUTS + o] = from[o * w->out_stride + i * w->in_stride];
}

static void scale_columns(const float *restrict x, const float *restrict factor, int64_t size, float *restrict y) {
    for (int64_t i = 0; i < size; i++) EACH_OUT y[i * OUTS + o] = x[i * OUTS + o] * factor[i];
}

static void weighted_squares(const float *restrict x, const float *restrict weight, int64_t size,
                             float *restrict totals) {
    SUM_SQUARES(totals, size, weight, x[i * OUTS + o])
}

/* float [OUTS] -> one column of [out, groups] */
static void store(const Weight *w, int64_t row, int64_t group, const float *from, float *to) {
    int64_t groups = w->n_in / w->group_size;
    for (int o = 0; o < OUTS && row + o < w->n_out; o++) to[(row + o) * groups + group] = from[o];
}

/* codes 0..15 of a tile, as bytes [input * OUTS + output] -> rows of [out, in/2] */
static void pack(const Weight *w, int64_t row, int64_t column, const uint8_t *restrict code, uint8_t *restrict packed) {
    for (int o = 0; o < OUTS && row + o < w->n_out; o++) {
        uint8_t *to = packed + ((row + o) * w->n_in + column) / 2;
        for (int64_t i = 0; i < w->group_size; i += 2)
            to[i / 2] = code[i * OUTS + o] | code[(i + 1) * OUTS + o] << 4;
    }
}

/* Whether a tile holds NaN or Inf. */
static int has_non_finite(const float *restrict x, int64_t size) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < size * OUTS; i++) {
        uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest >= 0x7F800000;
}

/* ------------------------------------------------------------------------------------------------ INT4 */

/* int4._grid_between */
INLINE float int4_scale(float low, float high) {
    uint32_t bits = bits_of(at_least(high / 15 - low / 15, 1e-8f));
    return of_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u);
}

INLINE float int4_zero(float low, float scale) { return at_most(at_least(rintf(-low / scale), 0), 15); }

/* int4._codes */
INLINE float int4_code(float x, float scale, float zero) {
    return at_most(at_least(rintf(x / scale + zero), 0), 15);
}

INLINE float clamped_off(float exact, float lowest, float highest) {
    return at_most(at_least(rintf(exact), lowest), highest) - exact;
}

static void int4_range(const float *restrict x, int64_t size, float *restrict low, float *restrict high) {
    EACH_OUT low[o] = high[o] = 0;
    for (int64_t i = 0; i < size; i++) EACH_OUT {
        low[o] = at_most(low[o], x[i * OUTS + o]);
        high[o] = at_least(high[o], x[i * OUTS + o]);
    }
}

/* Errors of one grid, by the product with 1 / scale: int4._weighted_errors. */
static void int4_tried(const float *restrict x, const float *restrict weight, int64_t size,
                       const float *restrict inverse, const float *restrict zero, float *restrict errors) {
    float lowest[OUTS], highest[OUTS];
    EACH_OUT lowest[o] = -zero[o], highest[o] = 15 - zero[o];
    SUM_SQUARES(errors, size, weight, clamped_off(x[i * OUTS + o] * inverse[o], lowest[o], highest[o]))
}

/* The body of int4.search_grid_io. moves: one pair per grid; starts: 1 where a round of them begins. */
static void int4_search(const float *restrict x, const float *restrict weight, int64_t size, const float *moves,
                        const uint8_t *starts, int n_moves, const float *restrict low, const float *restrict high,
                        float *restrict scale, float *restrict zero) {
    float below[OUTS], above[OUTS], from_below[OUTS], from_above[OUTS], least[OUTS], inverse[OUTS], errors[OUTS];
    EACH_OUT below[o] = above[o] = 1, least[o] = 0;
    for (int move = 0; move < n_moves; move++) {
        if (starts[move]) EACH_OUT from_below[o] = below[o], from_above[o] = above[o];
        float down = moves[2 * move], up = moves[2 * move + 1];
        EACH_OUT {
            float new_low = low[o] * (from_below[o] + down), new_high = high[o] * (from_above[o] + up);
            scale[o] = int4_scale(new_low, new_high);
            zero[o] = int4_zero(new_low, scale[o]);
            inverse[o] = 1 / scale[o];
        }
        int4_tried(x, weight, size, inverse, zero, errors);
        EACH_OUT {
            float error = errors[o] * (scale[o] * scale[o]);
            int better = move == 0 || error < least[o];
            least[o] = better ? error : least[o];
            below[o] = better ? from_below[o] + down : below[o];
            above[o] = better ? from_above[o] + up : above[o];
        }
    }
    EACH_OUT scale[o] = int4_scale(low[o] * below[o], high[o] * above[o]);
    EACH_OUT zero[o] = int4_zero(low[o] * below[o], scale[o]);
}

static void int4_codes(const float *restrict x, const float *restrict scale, const float *restrict zero, int64_t size,
                       uint8_t *restrict code) {
    for (int64_t i = 0; i < size; i++)
        EACH_OUT code[i * OUTS + o] = (uint8_t)(int32_t)int4_code(x[i * OUTS + o], scale[o], zero[o]);
}

static void int4_error(const float *restrict x, const float *restrict weight, const float *restrict scale,
                       const float *restrict zero, int64_t size, float *restrict errors) {
    SUM_SQUARES(errors, size, weight,
                (int4_code(x[i * OUTS + o], scale[o], zero[o]) - zero[o]) * scale[o] - x[i * OUTS + o])
}

static void int4_store_grid(const Weight *w, int64_t row, int64_t group, const float *scale, const float *zero,
                            uint16_t *scales, uint8_t *zeros) {
    int64_t groups = w->n_in / w->group_size;
    for (int o = 0; o < OUTS && row + o < w->n_out; o++) {
        scales[(row + o) * groups + group] = (uint16_t)(bits_of(scale[o]) >> 16);
        zeros[(row + o) * groups + group] = (uint8_t)zero[o];
    }
}

/* Grids of all groups, searched where there are moves, else min-max, and what is wanted of the nearest levels.
   Returns -1: no memory; 1: the weight holds NaN or Inf; else 0. */
EXPORT int int4_quantize(const Weight *w, const float *weight, const float *moves, const uint8_t *starts, int n_moves,
                  uint16_t *scales, uint8_t *zeros, const Wanted *wanted) {
    int64_t size = w->group_size, groups = w->n_in / size;
    float *x = malloc(size * OUTS * (sizeof(float) + 1)), low[OUTS], high[OUTS], scale[OUTS], zero[OUTS], sums[OUTS];
    if (!x) return -1;
    uint8_t *code = (uint8_t *)(x + size * OUTS);
    int odd = 0;
    for (int64_t row = 0; row < w->n_out; row += OUTS)
        for (int64_t group = 0; group < groups; group++) {
            const float *own = weight ? weight + group * size : NULL;
            load(w, row, group * size, x);
            odd |= has_non_finite(x, size);
            int4_range(x, size, low, high);
            if (n_moves)
                int4_search(x, own, size, moves, starts, n_moves, low, high, scale, zero);
            else
                EACH_OUT scale[o] = int4_scale(low[o], high[o]), zero[o] = int4_zero(low[o], scale[o]);
            int4_store_grid(w, row, group, scale, zero, scales, zeros);
            if (wanted->packed) {
                int4_codes(x, scale, zero, size, code);
                pack(w, row, group * size, code, wanted->packed);
            }
            if (wanted->sums) {
                weighted_squares(x, own, size, sums);
                store(w, row, group, sums, wanted->sums);
                int4_error(x, own, scale, zero, size, sums);
                store(w, row, group, sums, wanted->sums + w->n_out * groups);
            }
        }
    free(x);
    return odd;
}

/* Sums [1 + n, out, groups]: of squares of the weight, weighted by weights[0], and of squared errors of min-max rounding
   with its columns multiplied by factors[k], weighted by weights[1 + k]; factors [n, in], weights [1 + n, in].
   Returns -1: no memory; else 0. */
EXPORT int int4_errors(const Weight *w, const float *factors, const float *weights, int64_t n, float *errors) {
    int64_t size = w->group_size, groups = w->n_in / size;
    float *x = malloc(2 * size * OUTS * sizeof(float)), low[OUTS], high[OUTS], scale[OUTS], zero[OUTS], sums[OUTS];
    if (!x) return -1;
    float *scaled = x + size * OUTS;
    for (int64_t row = 0; row < w->n_out; row += OUTS)
        for (int64_t group = 0; group < groups; group++) {
            load(w, row, group * size, x);
            weighted_squares(x, weights + group * size, size, sums);
            store(w, row, group, sums, errors);
            for (int64_t which = 0; which < n; which++) {
                int64_t first = which * w->n_in + group * size;
                scale_columns(x, factors + first, size, scaled);
                int4_range(scaled, size, low, high);
                EACH_OUT scale[o] = int4_scale(low[o], high[o]), zero[o] = int4_zero(low[o], scale[o]);
                int4_error(scaled, weights + w->n_in + first, scale, zero, size, sums);
                store(w, row, group, sums, errors + (1 + which) * w->n_out * groups);
            }
        }
    free(x);
    return 0;
}

/* ------------------------------------------------------------------------------------------------ NVFP4 */

#define LARGEST_E4M3 126  /* 448 */

/* nvfp4.round_e4m3 and nvfp4._bits_of */
INLINE int32_t e4m3_bits(float x) {
    float step = at_least(power_of_two(x), 0x1p-6f) * 0x1p-3f;
    float value = rintf(x * inverse_power(step)) * step;
    int32_t normal = (int32_t)(bits_of(value) >> 20) - (120 << 3), subnormal = (int32_t)(value * 512);
    return value < 0x1p-6f ? subnormal : normal;
}

/* nvfp4._from_bits */
INLINE float e4m3_value(int32_t bits) {
    float normal = of_bits(((uint32_t)bits << 20) + (120u << 23));
    return at_most(normal, 2 * normal - 0x1p-6f);
}

/* nvfp4._magnitudes */
INLINE float e2m1_magnitude(float size, float scale) {
    float ratio = at_most(size / scale, 6);
    float octave = at_most(at_least(power_of_two(ratio), 1), 4);
    return ceilf(ratio * 2 * inverse_power(octave) - 0.5f) * octave * 0.5f;
}

static void nvfp4_largest(const float *restrict x, int64_t size, float *restrict largest) {
    EACH_OUT largest[o] = 0;
    for (int64_t i = 0; i < size; i++) EACH_OUT largest[o] = at_least(largest[o], fabsf(x[i * OUTS + o]));
}

static void nvfp4_plain(const float *restrict largest, float six_g, int32_t *restrict bits) {
    EACH_OUT bits[o] = e4m3_bits(at_most(at_least(largest[o] / six_g, 0x1p-9f), 448));
}

/* By how much the nearest magnitude is off, by the trick of nvfp4._weighted_errors. */
INLINE float nvfp4_off(float exact) {
    float held = at_most(exact, 6), octave = at_least(power_of_two(held), 1) * 0x1.8p22f;
    return ((held + octave) - octave) - exact;
}

static void nvfp4_tried(const float *restrict x, const float *restrict weight, int64_t size,
                        const float *restrict inverse, float *restrict errors) {
    SUM_SQUARES(errors, size, weight, nvfp4_off(fabsf(x[i * OUTS + o]) * inverse[o]))
}

/* The body of nvfp4.search_scales_io; `bits` is the plain scale and becomes the best. */
static void nvfp4_search(const float *restrict x, const float *restrict weight, int64_t size, const int32_t *steps,
                         int n_steps, float global_scale, int32_t *restrict bits) {
    float least[OUTS] = {0}, scale[OUTS], inverse[OUTS], errors[OUTS];
    int32_t tried[OUTS], best[OUTS] = {0};
    for (int step = 0; step < n_steps; step++) {
        EACH_OUT {
            int32_t next = bits[o] + steps[step];
            next = next < 1 ? 1 : next;
            tried[o] = next > LARGEST_E4M3 ? LARGEST_E4M3 : next;
            scale[o] = e4m3_value(tried[o]) * global_scale;
            inverse[o] = 1 / scale[o];
        }
        nvfp4_tried(x, weight, size, inverse, errors);
        EACH_OUT {
            float error = errors[o] * (scale[o] * scale[o]);
            int better = step == 0 || error < least[o];
            least[o] = better ? error : least[o];
            best[o] = better ? tried[o] : best[o];
        }
    }
    EACH_OUT bits[o] = best[o];
}

/* nvfp4._indices and the sign */
static void nvfp4_codes(const float *restrict x, const float *restrict scale, int64_t size, uint8_t *restrict code) {
    for (int64_t i = 0; i < size; i++) EACH_OUT {
        float m = e2m1_magnitude(fabsf(x[i * OUTS + o]), scale[o]);
        float index = at_most(at_most(m * 2, m + 2), m * 0.5f + 4);
        code[i * OUTS + o] = (uint8_t)((int32_t)index + (x[i * OUTS + o] < 0 ? 8 : 0));
    }
}

INLINE float nvfp4_written_off(float size, float scale) { return e2m1_magnitude(size, scale) * scale - size; }

static void nvfp4_error(const float *restrict x, const float *restrict weight, const float *restrict scale,
                        int64_t size, float *restrict errors) {
    SUM_SQUARES(errors, size, weight, nvfp4_written_off(fabsf(x[i * OUTS + o]), scale[o]))
}

/* As int4_quantize; scales: E4M3 bytes. */
EXPORT int nvfp4_quantize(const Weight *w, const float *weight, float global_scale, const int32_t *steps, int n_steps,
                   uint8_t *scales, const Wanted *wanted) {
    int64_t size = w->group_size, groups = w->n_in / size;
    float *x = malloc(size * OUTS * (sizeof(float) + 1)), largest[OUTS], scale[OUTS], sums[OUTS];
    if (!x) return -1;
    uint8_t *code = (uint8_t *)(x + size * OUTS);
    int32_t bits[OUTS], odd = 0;
    for (int64_t row = 0; row < w->n_out; row += OUTS)
        for (int64_t group = 0; group < groups; group++) {
            const float *own = weight ? weight + group * size : NULL;
            load(w, row, group * size, x);
            odd |= has_non_finite(x, size);
            nvfp4_largest(x, size, largest);
            nvfp4_plain(largest, 6 * global_scale, bits);
            if (n_steps) nvfp4_search(x, own, size, steps, n_steps, global_scale, bits);
            EACH_OUT scale[o] = e4m3_value(bits[o]) * global_scale;
            for (int o = 0; o < OUTS && row + o < w->n_out; o++) scales[(row + o) * groups + group] = (uint8_t)bits[o];
            if (wanted->packed) {
                nvfp4_codes(x, scale, size, code);
                pack(w, row, group * size, code, wanted->packed);
            }
            if (wanted->sums) {
                weighted_squares(x, own, size, sums);
                store(w, row, group, sums, wanted->sums);
                nvfp4_error(x, own, scale, size, sums);
                store(w, row, group, sums, wanted->sums + w->n_out * groups);
            }
        }
    free(x);
    return odd;
}

/* As int4_errors; global_scales: [n]. */
EXPORT int nvfp4_errors(const Weight *w, const float *factors, const float *weights, const float *global_scales, int64_t n,
                 float *errors) {
    int64_t size = w->group_size, groups = w->n_in / size;
    float *x = malloc(2 * size * OUTS * sizeof(float)), largest[OUTS], scale[OUTS], sums[OUTS];
    if (!x) return -1;
    float *scaled = x + size * OUTS;
    int32_t bits[OUTS];
    for (int64_t row = 0; row < w->n_out; row += OUTS)
        for (int64_t group = 0; group < groups; group++) {
            load(w, row, group * size, x);
            weighted_squares(x, weights + group * size, size, sums);
            store(w, row, group, sums, errors);
            for (int64_t which = 0; which < n; which++) {
                int64_t first = which * w->n_in + group * size;
                scale_columns(x, factors + first, size, scaled);
                nvfp4_largest(scaled, size, largest);
                nvfp4_plain(largest, 6 * global_scales[which], bits);
                EACH_OUT scale[o] = e4m3_value(bits[o]) * global_scales[which];
                nvfp4_error(scaled, weights + w->n_in + first, scale, size, sums);
                store(w, row, group, sums, errors + (1 + which) * w->n_out * groups);
            }
        }
    free(x);
    return 0;
}

/* ------------------------------------------------------------------------------------------------ GPTQ */

/* int4.nearest, and where `zero` is NULL nvfp4.nearest, of OUTS values. */
INLINE void nearest(const float *restrict x, const float *restrict scale, const float *restrict zero,
                    float *restrict level) {
    if (zero)
        EACH_OUT level[o] = (int4_code(x[o], scale[o], zero[o]) - zero[o]) * scale[o];
    else
        EACH_OUT level[o] = copysignf(e2m1_magnitude(fabsf(x[o]), scale[o]) * scale[o], x[o]);
}

/* Columns from `first` on of a matrix [rows, n_out], to a tile and back. Behind the last output the tile holds ones. */
static void read_tile(const float *from, int64_t rows, int64_t n_out, int64_t first, float *restrict tile) {
    int64_t count = n_out - first < OUTS ? n_out - first : OUTS;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t o = 0; o < OUTS; o++) tile[row * OUTS + o] = o < count ? from[row * n_out + first + o] : 1;
}

static void write_tile(const float *restrict tile, int64_t rows, int64_t n_out, int64_t first, float *to) {
    int64_t count = n_out - first < OUTS ? n_out - first : OUTS;
    for (int64_t row = 0; row < rows; row++) memcpy(to + row * n_out + first, tile + row * OUTS, count * sizeof(float));
}

/* Grids of the groups of some rows. */
typedef struct {
    const float *scales, *zeros;  /* [groups, n_out]; no zeros: NVFP4 */
    const int64_t *groups;        /* of each row */
    int64_t n_out;
} Grids;

INLINE void nearest_in(const Grids *grids, int64_t row, int64_t first, const float *restrict x, float *restrict level) {
    float scale[OUTS], zero[OUTS];
    int64_t start = grids->groups[row] * grids->n_out;
    read_tile(grids->scales + start, 1, grids->n_out, first, scale);
    if (grids->zeros) read_tile(grids->zeros + start, 1, grids->n_out, first, zero);
    nearest(x, scale, grids->zeros ? zero : NULL, level);
}

/* gptq._revisit for outputs [begin, end) of values and gradient [n, n_out]; local [n, n].
   Returns -1: no memory; else 0. */
EXPORT int gptq_revisit(float *values, float *gradient, const float *local, const Grids *grids, int64_t n, int64_t begin,
                 int64_t end) {
    int64_t n_out = grids->n_out;
    float *value = malloc(2 * n * OUTS * sizeof(float)), aim[OUTS], best[OUTS];
    if (!value) return -1;
    float *slope = value + n * OUTS;
    for (int64_t first = begin; first < end; first += OUTS) {
        read_tile(values, n, n_out, first, value);
        read_tile(gradient, n, n_out, first, slope);
        for (int64_t row = 0; row < n; row++) {
            float *own = value + row * OUTS, curvature = local[row * n + row], moved[OUTS];
            EACH_OUT aim[o] = own[o] - slope[row * OUTS + o] / curvature;
            nearest_in(grids, row, first, aim, best);
            EACH_OUT moved[o] = best[o] - own[o];
            EACH_OUT own[o] = best[o];
            for (int64_t other = 0; other < n; other++) {
                float factor = local[row * n + other];
                EACH_OUT slope[other * OUTS + o] += factor * moved[o];
            }
        }
        write_tile(value, n, n_out, first, values);
        write_tile(slope, n, n_out, first, gradient);
    }
    free(value);
    return 0;
}

/* gptq._propagate_block for outputs [begin, end) of block [n, n_out], which becomes its nearest levels, and of errors
   [n, n_out]; factor [n, n]. Returns -1: no memory; else 0. */
EXPORT int gptq_propagate(float *block, float *errors, const float *factor, const Grids *grids, int64_t n, int64_t begin,
                   int64_t end) {
    int64_t n_out = grids->n_out;
    float *left = malloc(2 * n * OUTS * sizeof(float)), level[OUTS];
    if (!left) return -1;
    float *error = left + n * OUTS;
    for (int64_t first = begin; first < end; first += OUTS) {
        read_tile(block, n, n_out, first, left);
        for (int64_t row = 0; row < n; row++) {
            float *own = left + row * OUTS, *off = error + row * OUTS, diagonal = factor[row * n + row];
            nearest_in(grids, row, first, own, level);
            EACH_OUT off[o] = (own[o] - level[o]) / diagonal;
            EACH_OUT own[o] = level[o];
            for (int64_t other = row + 1; other < n; other++) {
                float weight = factor[row * n + other];
                EACH_OUT left[other * OUTS + o] -= weight * off[o];
            }
        }
        write_tile(left, n, n_out, first, block);
        write_tile(error, n, n_out, first, errors);
    }
    free(left);
    return 0;
}
