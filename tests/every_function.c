/* Calls every C function of the package on made-up numbers and prints a hash of what comes out, one line for each; the
   same lines everywhere, or the functions do not give the same bits. test_cross.py compiles and runs it. */
#include <math.h>
#include <stdio.h>

#include "../lance_quant/kernels/packed_weight.h"

/* As in rounding.c, int8_products.c and packed_linear.c */
typedef struct {
    const float *values;
    int64_t n_out, n_in, out_stride, in_stride, group_size;
} FloatWeight;
typedef struct {
    uint8_t *packed;
    float *sums;
} Wanted;
typedef struct {
    const float *scales, *zeros;
    const int64_t *groups;
    int64_t n_out;
} Grids;
typedef struct {
    const float *row_scale, *out_scale, *bias;
    void *y;
    int64_t n_out;
    int to_bf16;
} Result;

int int4_quantize(const FloatWeight *, const float *, const float *, const uint8_t *, int, uint16_t *, uint8_t *,
                  const Wanted *);
int nvfp4_quantize(const FloatWeight *, const float *, float, const int32_t *, int, uint8_t *, const Wanted *);
int int4_errors(const FloatWeight *, const float *, const float *, int64_t, float *);
int nvfp4_errors(const FloatWeight *, const float *, const float *, const float *, int64_t, float *);
int gptq_revisit(float *, float *, const float *, const Grids *, int64_t, int64_t, int64_t);
int gptq_propagate(float *, float *, const float *, const Grids *, int64_t, int64_t, int64_t);
int packed_linear(const Weight *, const float *, int64_t, int, const float *, float *, int);
void packed_dequantize(const Weight *, int64_t, int64_t, int, void *, int);
void int8_linear(const int8_t *, const uint16_t *, int64_t, int64_t, const float *, int64_t, float *, int);
void w4a8_quantize(const void *, int, int64_t, int64_t, int8_t *, float *, int);
void w4a8_unpack(const Weight *, const float *, int64_t, int64_t, int8_t *, int);
int w4a8_linear(const Weight *, const float *, const void *, int, int64_t, const Result *, int);

enum { OUT = 37, IN = 2304, MANY_ROWS = 13, THREADS = 2, CANDIDATES = 3, BLOCK = 24 };

static uint32_t state = 1;
static uint32_t next(void) {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}
/* -1..1, exact in float32 */
static float uniform(void) { return (float)((int32_t)(next() & 0xffff) - 0x8000) * 0x1p-15f; }

static void fill(float *x, int64_t n, float size) {
    for (int64_t i = 0; i < n; i++) x[i] = uniform() * uniform() * size;
}

static void to_bf16(const float *x, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        out[i] = (uint16_t)(bits >> 16);
    }
}

static void say(const char *what, const char *of, const void *data, int64_t size) {
    uint64_t hash = 14695981039346656037u;
    for (int64_t i = 0; i < size; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 1099511628211u;
    printf("%s %s %08x%08x\n", what, of, (unsigned)(hash >> 32), (unsigned)hash);
}

static float x[MANY_ROWS * IN], y[MANY_ROWS * OUT], floats[OUT * IN], bias[OUT], row_scale[OUT], e4m3[256], inverse[OUT];
static uint16_t short_x[MANY_ROWS * IN], scales[OUT * IN / 16], shorts[OUT * IN];
static uint8_t packed[OUT * IN / 2], zeros[OUT * IN / 16], byte_scales[OUT * IN / 16];
static int8_t codes[OUT * IN], few_codes[MANY_ROWS * IN];
static float importance[(1 + CANDIDATES) * IN], factors[CANDIDATES * IN], sums[(1 + CANDIDATES) * OUT * IN / 16];

static void packed_functions(const char *name, const Weight *w) {
    for (int digits = 2; digits <= 3; digits++) {
        if (packed_linear(w, x, MANY_ROWS, digits, bias, y, THREADS)) return;
        say(digits == 2 ? "linear of 16 bits" : "linear of 24 bits", name, y, sizeof y);
    }
    packed_dequantize(w, 0, OUT, 0, floats, THREADS);
    say("dequantize to float32", name, floats, sizeof floats);
    packed_dequantize(w, 1, OUT, 1, shorts, THREADS);
    say("dequantize to bfloat16", name, shorts, (OUT - 1) * IN * 2);
    w4a8_unpack(w, inverse, 0, OUT, codes, THREADS);
    say("w4a8 unpack", name, codes, sizeof codes);
    for (int to = 0; to < 2; to++) {
        float of_rows[MANY_ROWS];
        Result result = {of_rows, row_scale, bias, to ? (void *)shorts : (void *)y, OUT, to};
        if (w4a8_linear(w, inverse, to ? (void *)short_x : (void *)x, to, MANY_ROWS, &result, THREADS)) return;
        say(to ? "w4a8 linear in bfloat16" : "w4a8 linear in float32", name, result.y, MANY_ROWS * OUT * (to ? 2 : 4));
    }
}

static void all_packed(void) {
    static const struct {
        const char *name;
        int group, int4, bytes;
    } kinds[] = {{"int4 64", 64, 1, 0}, {"int4 32", 32, 1, 0}, {"int4 16", 16, 1, 0}, {"int4 192", 192, 1, 0},
                 {"nvfp4", 16, 0, 0}, {"nvfp4 slim", 16, 0, 1}};
    for (int i = 0; i < (int)(sizeof kinds / sizeof *kinds); i++) {
        const int group = kinds[i].group;
        Weight w = {packed, kinds[i].bytes ? NULL : scales, byte_scales, e4m3, kinds[i].int4 ? zeros : NULL,
                    kinds[i].bytes ? row_scale : NULL, OUT, IN, group, group < 64 ? 1 : group / 64};
        packed_functions(kinds[i].name, &w);
    }
    for (int64_t i = 0; i < OUT * IN; i++) codes[i] = (int8_t)((int)(next() % 255) - 127);
    int8_linear(codes, scales, OUT, IN, x, MANY_ROWS, y, THREADS);
    say("int8 linear", "", y, sizeof y);
    w4a8_quantize(x, 0, MANY_ROWS, IN, few_codes, row_scale, THREADS);
    say("w4a8 quantize", "codes", few_codes, sizeof few_codes);
    say("w4a8 quantize", "scales", row_scale, MANY_ROWS * 4);
}

static void rounding(void) {
    static float weight[OUT * IN];
    static const float moves[] = {0, 0, -0.1f, 0, 0, -0.1f, 0.05f, 0.05f, 0, 0, 0.02f, -0.02f};
    static const uint8_t starts[] = {1, 0, 0, 0, 1, 0};
    static const int32_t steps[] = {0, -1, 1, 2, -3};
    const float global_scales[CANDIDATES] = {0x1p-9f, 0x1p-8f, 0x1p-10f};
    fill(weight, OUT * IN, 0.05f);
    for (int64_t i = 0; i < IN; i++) weight[3 * IN + i] = 0, weight[5 * IN + i] = 0.25f, weight[6 * IN + i] = 1e-30f;
    for (int64_t i = 0; i < (1 + CANDIDATES) * IN; i++) importance[i] = 1.25f + uniform();
    for (int64_t i = 0; i < CANDIDATES * IN; i++) factors[i] = 1.5f + uniform();
    const FloatWeight int4 = {weight, OUT, IN, IN, 1, 64}, nvfp4 = {weight, OUT, IN, IN, 1, 16};
    const Wanted wanted = {packed, sums};
    if (int4_quantize(&int4, importance, moves, starts, 6, scales, zeros, &wanted)) return;
    say("int4 quantize", "codes", packed, sizeof packed);
    say("int4 quantize", "scales", scales, OUT * IN / 64 * 2);
    say("int4 quantize", "zeros", zeros, OUT * IN / 64);
    say("int4 quantize", "sums", sums, 2 * OUT * IN / 64 * 4);
    if (nvfp4_quantize(&nvfp4, importance, 0x1p-9f, steps, 5, byte_scales, &wanted)) return;
    say("nvfp4 quantize", "codes", packed, sizeof packed);
    say("nvfp4 quantize", "scales", byte_scales, OUT * IN / 16);
    say("nvfp4 quantize", "sums", sums, 2 * OUT * IN / 16 * 4);
    if (int4_errors(&int4, factors, importance, CANDIDATES, sums)) return;
    say("int4 errors", "", sums, (1 + CANDIDATES) * OUT * IN / 64 * 4);
    if (nvfp4_errors(&nvfp4, factors, importance, global_scales, CANDIDATES, sums)) return;
    say("nvfp4 errors", "", sums, sizeof sums);
}

static void gptq(int has_zero) {
    static float values[BLOCK * OUT], other[BLOCK * OUT], local[BLOCK * BLOCK], scale[2 * OUT], zero[2 * OUT];
    int64_t groups[BLOCK];
    for (int row = 0; row < BLOCK; row++) groups[row] = row / 16;
    for (int i = 0; i < 2 * OUT; i++) scale[i] = 0.01f + (float)(next() & 255) * 0x1p-13f, zero[i] = (float)(next() & 15);
    fill(values, BLOCK * OUT, 0.2f), fill(other, BLOCK * OUT, 0.1f), fill(local, BLOCK * BLOCK, 0.3f);
    for (int row = 0; row < BLOCK; row++) local[row * BLOCK + row] = 1.5f;
    const Grids grids = {scale, has_zero ? zero : NULL, groups, OUT};
    if (gptq_revisit(values, other, local, &grids, BLOCK, 0, OUT)) return;
    say("gptq revisit", has_zero ? "int4 values" : "nvfp4 values", values, sizeof values);
    say("gptq revisit", has_zero ? "int4 gradient" : "nvfp4 gradient", other, sizeof other);
    fill(values, BLOCK * OUT, 0.2f);
    if (gptq_propagate(values, other, local, &grids, BLOCK, 0, OUT)) return;
    say("gptq propagate", has_zero ? "int4 levels" : "nvfp4 levels", values, sizeof values);
    say("gptq propagate", has_zero ? "int4 errors" : "nvfp4 errors", other, sizeof other);
}

int main(void) {
    for (int i = 0; i < 128; i++) {
        e4m3[i] = i < 8 ? (float)i * 0x1p-9f : ldexpf((float)(8 + i % 8), i / 8 - 10);
        e4m3[128 + i] = -e4m3[i];
    }
    fill(x, MANY_ROWS * IN, 4), fill(bias, OUT, 1);
    for (int i = 0; i < IN; i++) x[2 * IN + i] = 0, x[3 * IN + i] *= 0x1p-60f, x[4 * IN + i] *= i < 64 ? 0x1p60f : 1;
    to_bf16(x, MANY_ROWS * IN, short_x);
    for (int i = 0; i < OUT * IN / 2; i++) packed[i] = (uint8_t)next();
    for (int i = 0; i < OUT * IN / 16; i++) {
        const float scale = 0.001f + (float)(next() & 1023) * 0x1p-16f;
        to_bf16(&scale, 1, scales + i);
        zeros[i] = next() & 15, byte_scales[i] = (uint8_t)(next() % 127);
    }
    for (int i = 0; i < OUT; i++) row_scale[i] = 0.002f + (float)(next() & 255) * 0x1p-17f, inverse[i] = 400;
    all_packed();
    rounding();
    gptq(1);
    gptq(0);
    return 0;
}
