// What decoder/sums.h computes, in either of its two forms: with VECTORS in registers, else in tiles.

#ifdef VECTORS
#undef __AMX_BF16__
#endif

#include "../../src/tunesmith/decoder/sums.h"

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

}  // extern "C"
