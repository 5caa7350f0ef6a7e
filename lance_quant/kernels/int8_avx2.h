/* Eight lanes of float32, and the products of 8-bit rows, with AVX2; part of packed_linear.c. */
#include <immintrin.h>

#define CHAINS 4  /* sums of 8 lanes each that do not wait for one another */

INLINE float lanes_sum(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

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
