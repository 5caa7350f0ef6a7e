/* Activations as fixed-point numbers; part of packed_avx2.h and packed_plain.h. */

/* 64 columns of one row share the unit that is returned: value times unit is x. NaN or Inf: the unit is NaN. */
INLINE float fixed_point(const float *x, const int digits, int32_t *value) {
    const float top = digits == 2 ? 32630.0f : 8355000.0f;  /* below 127 in every signed digit of 8 bits */
    float largest = 0, sum = 0;
    for (int i = 0; i < COLUMNS; i++) {
        float size = fabsf(x[i]);
        largest = size > largest ? size : largest;
        sum += size * 0;  /* NaN if any is NaN or Inf */
    }
    float per_unit = largest > 0 ? top / largest : 0;
    if (!(per_unit < 3e38f)) per_unit = 3e38f;
    for (int i = 0; i < COLUMNS; i++) value[i] = sum == 0 ? (int32_t)rintf(x[i] * per_unit) : 0;
    return (per_unit > 0 ? 1 / per_unit : 0) + sum;
}
