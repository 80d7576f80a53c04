// What a step with prompts is made of: products with matrices of fp32 or fixed point, and in fp32 what stands between them:
// norms, angles, attention over the paged cache, gates, and what adapters add. engine/prompts.py calls this.
//
// Legend: N = tokens, D = width, F = feed-forward width.

#include "attention.h"
#include "deltas.h"

extern "C" {

// For heads of keys and values `first` to `last`: any part may be done beside the others.
void tunesmith_attend(const Attention *attention, int32_t first, int32_t last) { attend(*attention, first, last); }

// Adds to the product y of site `index` with x, of tokens `first` to `last`: any part may be done beside the others.
void tunesmith_add_deltas(const Groups *groups, const Shape *shape, int64_t index, const float *x, float *y, int64_t first,
                          int64_t last) {
    add_deltas(*groups, *shape, index, x, y, first, last);
}

// x [N, D]
void tunesmith_embed(const Groups *groups, const float *embedding, const int32_t *ids, int64_t tokens, int64_t width,
                     float *x) {
    embed(*groups, embedding, ids, tokens, width, x);
}

// x [N, D] += added, where given; y = x over the root of its mean square, times gain
void tunesmith_norm(float *x, const float *added, const float *gain, float epsilon, int64_t tokens, int32_t width,
                    float *y) {
    for (int64_t t = 0; t < tokens; ++t, x += width, y += width) {
        for (int i = 0; added && i < width; ++i) x[i] += added[t * width + i];
        norm(x, gain, y, width, epsilon);
    }
}

// [N, 2 F] -> [N, F]
void tunesmith_gate(const float *gate_up, int64_t tokens, int32_t width, float *product) {
    for (int64_t t = 0; t < tokens; ++t, gate_up += 2 * width, product += width)
        gated(gate_up, gate_up + width, product, width);
}

}  // extern "C"
