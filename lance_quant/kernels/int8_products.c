/* W4A8 on CPUs: 4-bit weights and activations as int8, products in integers; cpu_w4a8.py calls this, and w4a8.py defines
   the results, which are equal to the bit.

   Compiled with -ffp-contract=off: a fused multiply-add would round once where the definition rounds twice.

   Two ways. With VNNI the library multiplies, and this unpacks blocks of weights (w4a8_unpack) and rescales its sums
   (w4a8_rescale). Without, w4a8_linear does all: AVX2 multiplies pairs of int16 into int32 (vpmaddwd), twice as many
   products an instruction as float32, exact, and its sums never leave the registers before they are rescaled. */
#include <math.h>

#include "packed_weight.h"

#define ROWS 6       /* of activations in a tile: 12 sums, 2 weights and 1 activation fill the 16 registers */
#define OUTPUTS 16   /* in a tile */
#define CHUNK 8      /* tiles whose weights are unpacked at a time */
#define DEPTH 2048   /* inputs at a time; then a tile of both fits the second cache */
#define MANY 1536    /* rows at a time: what they take as int16 stays near the cores at 2048 inputs */

typedef struct {
    const float *row_scale;  /* [rows] of activations */
    const float *out_scale;  /* [out] of weights */
    const float *bias;       /* [out] or NULL */
    void *y;                 /* [rows, n_out], float32 or bfloat16 */
    int64_t n_out;
    int to_bf16;
} Result;

INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* `n` sums of one row, from output `first` on, become results. */
INLINE void rescale(const Result *to, int64_t row, int64_t first, const int64_t n, const int32_t *sums) {
    const float scale = to->row_scale[row], *out_scale = to->out_scale + first;
    float value[OUTPUTS];
    for (int64_t j = 0; j < n; j++) value[j] = (float)sums[j] * (scale * out_scale[j]);
    if (to->bias)
        for (int64_t j = 0; j < n; j++) value[j] += to->bias[first + j];
    if (to->to_bf16) {
        uint16_t *y = (uint16_t *)to->y + row * to->n_out + first;
        for (int64_t j = 0; j < n; j++) y[j] = to_bf16(value[j]);
    } else {
        memcpy((float *)to->y + row * to->n_out + first, value, n * sizeof(float));
    }
}

/* sums: int32 [rows, width], of the outputs from `first` on. */
EXPORT void w4a8_rescale(const Result *to, int64_t rows, int64_t first, int64_t width, const int32_t *sums,
                         int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t whole = width / OUTPUTS * OUTPUTS;
        for (int64_t j = 0; j < whole; j += OUTPUTS) rescale(to, row, first + j, OUTPUTS, sums + row * width + j);
        if (whole < width) rescale(to, row, first + whole, width - whole, sums + row * width + whole);
    }
}

INLINE float activation(const void *x, int is_bf16, int64_t at) {
    return is_bf16 ? bf16(((const uint16_t *)x)[at]) : ((const float *)x)[at];
}

#if defined(LEVEL_avx2) || defined(LEVEL_avx512)
#include "products_avx2.h"
#else
#include "products_plain.h"
#endif

/* Activations */

/* One row: what a code is multiplied by; NaN where the row holds NaN or Inf, and then all factors are 0. */
INLINE float scale_of(const void *x, const int is_bf16, int64_t n_in, float *factor) {
    uint32_t top = 0;  /* sizes of floats, NaN above Inf included, are ordered as integers */
    for (int64_t i = 0; i < n_in; i++) {
        const float value = activation(x, is_bf16, i);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float largest;
    memcpy(&largest, &top, 4);
    if (top >= 0x7f800000) return *factor = 0, NAN;
    largest = largest > 0x1p-100f ? largest : 0x1p-100f;
    *factor = 127 / largest;
    return largest / 127;
}

/* Rows of x, [rows, in], as codes: int8 [rows, in] and their scales. */
EXPORT void w4a8_quantize(const void *x, int is_bf16, int64_t rows, int64_t n_in, int8_t *codes, float *scale,
                          int threads) {
#pragma omp parallel num_threads(threads)
    {
        int16_t *wide = malloc(n_in * sizeof(int16_t));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const void *from = (const char *)x + row * n_in * (is_bf16 ? 2 : 4);
            float factor;
            if (is_bf16) scale[row] = scale_of(from, 1, n_in, &factor), quantize_row(from, 1, n_in, factor, wide);
            else scale[row] = scale_of(from, 0, n_in, &factor), quantize_row(from, 0, n_in, factor, wide);
            for (int64_t i = 0; i < n_in; i++) codes[row * n_in + i] = (int8_t)wide[i];
        }
        free(wide);
    }
}

/* Weights */

static void unpack_any(const Weight *w, int64_t row, float inverse, int8_t *out) {
    if (w->group_size == 16) unpack_row(w, row, inverse, 4, out);
    else if (w->group_size == 32) unpack_row(w, row, inverse, 2, out);
    else unpack_row(w, row, inverse, 1, out);
}

/* Rows begin..end as int8 [end - begin, in]; inverse: [out], 1 over their scales. */
EXPORT void w4a8_unpack(const Weight *w, const float *inverse, int64_t begin, int64_t end, int8_t *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = begin; row < end; row++) unpack_any(w, row, inverse[row], out + (row - begin) * w->n_in);
}

/* Products without VNNI */

/* OUTPUTS weight rows from `first` on as int16 [in/2, OUTPUTS, 2], zeros past the last; codes: [OUTPUTS, in] bytes. */
static void panel_of(const Weight *w, const float *inverse, int64_t first, int8_t *codes, int16_t *panel) {
    for (int64_t i = 0; i < OUTPUTS; i++) {
        if (first + i < w->n_out) unpack_any(w, first + i, inverse[first + i], codes + i * w->n_in);
        else memset(codes + i * w->n_in, 0, w->n_in);
    }
    for (int64_t column = 0; column < w->n_in; column += 16)
        for (int half = 0; half < 2; half++)
            interleave(codes + 8 * half * w->n_in + column, w->n_in, panel + column * OUTPUTS + 16 * half);
}

/* ROWS activations as int16 [in/2, ROWS, 2], zeros past the last. */
static void activations_of(const void *x, int is_bf16, int64_t rows, int64_t first, int64_t n_in, int16_t *codes,
                           float *scale, int16_t *panel) {
    for (int64_t r = 0; r < ROWS; r++) {
        const void *from = (const char *)x + (first + r) * n_in * (is_bf16 ? 2 : 4);
        float factor;
        if (first + r >= rows) memset(codes, 0, n_in * sizeof(int16_t));
        else if (is_bf16) scale[first + r] = scale_of(from, 1, n_in, &factor), quantize_row(from, 1, n_in, factor, codes);
        else scale[first + r] = scale_of(from, 0, n_in, &factor), quantize_row(from, 0, n_in, factor, codes);
        for (int64_t pair = 0; pair < n_in / 2; pair++) memcpy(panel + (pair * ROWS + r) * 2, codes + 2 * pair, 4);
    }
}

/* A chunk of weights, from output `begin` on, times all panels of activations; sums: [rows, tiles, ROWS, OUTPUTS]. */
static void multiply_chunk(const int16_t *x, const int16_t *w, int64_t n_in, int64_t rows, int64_t begin,
                           int64_t outputs, int32_t *sums, const Result *to) {
    const int64_t tiles = (outputs + OUTPUTS - 1) / OUTPUTS, panels = (rows + ROWS - 1) / ROWS;
    memset(sums, 0, panels * tiles * ROWS * OUTPUTS * sizeof(int32_t));
    for (int64_t from = 0; from < n_in; from += DEPTH) {
        const int64_t depth = n_in - from < DEPTH ? n_in - from : DEPTH;
        for (int64_t p = 0; p < panels; p++)
            for (int64_t t = 0; t < tiles; t++)
                tile(x + (p * n_in + from) * ROWS, w + (t * n_in + from) * OUTPUTS, depth / 2,
                     sums + (p * tiles + t) * ROWS * OUTPUTS);
    }
    for (int64_t row = 0; row < rows; row++)
        for (int64_t t = 0; t < tiles; t++) {
            const int32_t *own = sums + ((row / ROWS * tiles + t) * ROWS + row % ROWS) * OUTPUTS;
            const int64_t width = outputs - t * OUTPUTS;
            if (width >= OUTPUTS) rescale(to, row, begin + t * OUTPUTS, OUTPUTS, own);
            else rescale(to, row, begin + t * OUTPUTS, width, own);
        }
}

/* The whole linear: x [rows, in], float32 or bfloat16; `to->row_scale` [rows] is filled. 0, or 1 where there is no
   memory. */
EXPORT int w4a8_linear(const Weight *w, const float *inverse, const void *x, int is_bf16, int64_t rows, const Result *to,
                       int threads) {
    const int64_t n_in = w->n_in, most = (rows < MANY ? rows + ROWS - 1 : MANY) / ROWS * ROWS;
    const int64_t share = w->n_out / (4 * threads * OUTPUTS);  /* four chunks a thread, if they are that many */
    const int64_t chunk = OUTPUTS * (share < 1 ? 1 : share > CHUNK ? CHUNK : share);
    const int64_t codes_size = OUTPUTS * n_in * 2, panels_size = chunk * n_in * sizeof(int16_t);
    const int64_t own_size = codes_size + panels_size + most * chunk * sizeof(int32_t);
    int16_t *inputs = ALIGNED(most * n_in * sizeof(int16_t));
    char *own = ALIGNED(threads * own_size);
    if (!inputs || !own) return FREE_ALIGNED(inputs), FREE_ALIGNED(own), 1;
#pragma omp parallel num_threads(threads)
    for (int64_t begin = 0; begin < rows; begin += most) {
        const int64_t part = rows - begin < most ? rows - begin : most;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < part; row += ROWS) {
            int16_t *codes = (int16_t *)(own + omp_get_thread_num() * own_size);
            activations_of((const char *)x + begin * n_in * (is_bf16 ? 2 : 4), is_bf16, part, row, n_in, codes,
                           (float *)to->row_scale + begin, inputs + row * n_in);
        }
        Result here = *to;
        here.row_scale += begin;
        here.y = (char *)to->y + begin * to->n_out * (to->to_bf16 ? 2 : 4);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < w->n_out; first += chunk) {
            const int64_t left = w->n_out - first, outputs = left < chunk ? left : chunk;
            char *mine = own + omp_get_thread_num() * own_size;
            int16_t *panels = (int16_t *)(mine + codes_size);
            for (int64_t j = 0; j < outputs; j += OUTPUTS)
                panel_of(w, inverse, first + j, (int8_t *)mine, panels + j * n_in);
            multiply_chunk(inputs, panels, n_in, part, first, outputs, (int32_t *)(mine + codes_size + panels_size),
                           &here);
        }
    }
    return FREE_ALIGNED(inputs), FREE_ALIGNED(own), 0;
}
