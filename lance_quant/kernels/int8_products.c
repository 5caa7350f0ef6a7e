/* W4A8 on x86-64 with AVX2: 4-bit weights and activations as int8, products in integers; cpu_w4a8.py calls this, and
   w4a8.py defines the results, which are equal to the bit.

   Compiled with -ffp-contract=off: a fused multiply-add would round once where the definition rounds twice.

   Two ways. With VNNI the library multiplies, and this unpacks blocks of weights (w4a8_unpack) and rescales its sums
   (w4a8_rescale). Without, w4a8_linear does all: AVX2 multiplies pairs of int16 into int32 (vpmaddwd), twice as many
   products an instruction as float32, exact, and its sums never leave the registers before they are rescaled. */
#include <immintrin.h>
#include <omp.h>
#include <stdlib.h>

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
void w4a8_rescale(const Result *to, int64_t rows, int64_t first, int64_t width, const int32_t *sums, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t whole = width / OUTPUTS * OUTPUTS;
        for (int64_t j = 0; j < whole; j += OUTPUTS) rescale(to, row, first + j, OUTPUTS, sums + row * width + j);
        if (whole < width) rescale(to, row, first + whole, width - whole, sums + row * width + whole);
    }
}

/* Activations */

INLINE float activation(const void *x, int is_bf16, int64_t at) {
    return is_bf16 ? bf16(((const uint16_t *)x)[at]) : ((const float *)x)[at];
}

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
    if (top >= 0x7f800000) return *factor = 0, __builtin_nanf("");
    largest = largest > 0x1p-100f ? largest : 0x1p-100f;
    *factor = 127 / largest;
    return largest / 127;
}

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

/* Rows of x, [rows, in], as codes: int8 [rows, in] and their scales. */
void w4a8_quantize(const void *x, int is_bf16, int64_t rows, int64_t n_in, int8_t *codes, float *scale, int threads) {
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

static void unpack_any(const Weight *w, int64_t row, float inverse, int8_t *out) {
    if (w->group_size == 16) unpack_row(w, row, inverse, 4, out);
    else if (w->group_size == 32) unpack_row(w, row, inverse, 2, out);
    else unpack_row(w, row, inverse, 1, out);
}

/* Rows begin..end as int8 [end - begin, in]; inverse: [out], 1 over their scales. */
void w4a8_unpack(const Weight *w, const float *inverse, int64_t begin, int64_t end, int8_t *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = begin; row < end; row++) unpack_any(w, row, inverse[row], out + (row - begin) * w->n_in);
}

/* Products without VNNI */

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
int w4a8_linear(const Weight *w, const float *inverse, const void *x, int is_bf16, int64_t rows, const Result *to,
                int threads) {
    const int64_t n_in = w->n_in, most = (rows < MANY ? rows + ROWS - 1 : MANY) / ROWS * ROWS;
    const int64_t share = w->n_out / (4 * threads * OUTPUTS);  /* four chunks a thread, if they are that many */
    const int64_t chunk = OUTPUTS * (share < 1 ? 1 : share > CHUNK ? CHUNK : share);
    const int64_t codes_size = OUTPUTS * n_in * 2, panels_size = chunk * n_in * sizeof(int16_t);
    const int64_t own_size = codes_size + panels_size + most * chunk * sizeof(int32_t);
    int16_t *inputs = aligned_alloc(64, (most * n_in * sizeof(int16_t) + 63) / 64 * 64);
    char *own = aligned_alloc(64, threads * own_size);
    if (!inputs || !own) return free(inputs), free(own), 1;
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
    return free(inputs), free(own), 0;
}
