// What decoder/sums.h computes, and engine/rows.h for single rows, in either of two forms: with VECTORS in registers, else
// in tiles.

#ifdef VECTORS
#undef __AMX_BF16__
#endif

#include "../../src/tunesmith/engine/rows.h"

extern "C" {

void tested_product(const bf16 *a, int64_t stride, const bf16 *b, int64_t steps, bool bottom, bool right, float *c) {
    const Products multiplying;
    give_sums(c);
    accumulate_part(bottom, right, a, stride, b, steps);
    take_sums(c);
}

int64_t tested_meanwhile(const bf16 *a, const bf16 *b, int64_t steps, float *c) {
    const Products multiplying;
    int64_t called = 0;
    clear();
    accumulate(a, BLOCK, b, steps, b, 3, [&](int64_t step) { called += step + 1; });
    take_sums<false>(c);
    return called;
}

void tested_eight(const int8_t *a, int64_t stride, const uint8_t *left, const uint8_t *right, int64_t steps, float *c) {
    const Products multiplying;
    clear();
    accumulate_eight(a, stride, left, right, steps, left, 1);
    take_sums(c);
}

// Row 0 of `a`, whose numbers are `x` too: of a block in c[0], by itself in c[1].
void tested_row(const bf16 *a, const float *x, const bf16 *b, int64_t steps, float *c) {
    const Flush flush;
    const Products multiplying;
    alignas(64) float block[BLOCK];
    clear();
    accumulate(a, BLOCK, b, steps);
    take_sums(block);
    std::memcpy(c, block, sizeof(float) * SIDE);
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    add_columns<2, 2>(x, b, BLOCK / 2, BLOCK, steps, sums);
    _mm512_storeu_ps(c + SIDE, sums[0]);
    _mm512_storeu_ps(c + SIDE + 16, sums[1]);
}

}  // extern "C"
