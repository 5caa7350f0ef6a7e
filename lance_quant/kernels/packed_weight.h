/* A packed 4-bit weight as the C kernels take it. */
#ifndef PACKED_WEIGHT_H
#define PACKED_WEIGHT_H
#include <string.h>

#include "../cpu/portable.h"

#define COLUMNS 64  /* per step: 32 bytes of codes, the even columns in the low nibbles */

typedef struct {
    const uint8_t *packed;    /* [out, in/2] */
    const uint16_t *scale;    /* bfloat16 [out, in/group_size], or NULL */
    const uint8_t *scale_e4m3;  /* E4M3 [out, in/group_size], where scale is NULL */
    const float *e4m3;        /* values of the 256 E4M3 bytes */
    const uint8_t *zero;      /* [out, in/group_size]; NULL: NVFP4 */
    const float *row_scale;   /* [out] or NULL: multiplies a row's scales */
    int64_t n_out, n_in, group_size, steps_per_group;
} Weight;

INLINE float bf16(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

INLINE float scale_at(const Weight *w, int64_t index) {
    return w->scale ? bf16(w->scale[index]) : w->e4m3[w->scale_e4m3[index]];
}

#endif
