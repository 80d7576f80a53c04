// What adapters add to products of a model, y += x A B, in bits of their own: A [I, P R], and B [R, O] of each of P
// linear layers that are stacked in a product. What a token gets is the same, however many others have its adapter.

#pragma once

#include <vector>

#include "../decoder/fixed.h"

extern "C" {

struct Shape {  // of a model
    int32_t width, layers, heads, kv_heads, head_width, feed_width;
};

struct Adapter {
    const uint8_t *packed;  // what tunesmith_pack_adapter wrote
    int64_t rank, bits, embedding_rank;  // the last is 0 where the embedding is as it is
    const float *embedding_a, *embedding_b;  // [V, R] and [R, D], scale included
};

struct Group {  // tokens of one adapter, in their order
    const Adapter *adapter;
    int64_t tokens;
    const int64_t *token;
};

struct Groups {
    int64_t groups;
    const Group *group;
};

}  // extern "C"

namespace {

struct SiteShape {
    int64_t inputs, parts, outputs[3];

    int64_t all_outputs() const { return outputs[0] + outputs[1] + outputs[2]; }
};

// qkv, o, gate_up and down.
inline SiteShape site_shape(const Shape &s, int site) {
    const int64_t heads = int64_t(s.heads) * s.head_width, keys = int64_t(s.kv_heads) * s.head_width;
    switch (site) {
        case 0: return {s.width, 3, {heads, keys, keys}};
        case 1: return {heads, 1, {s.width, 0, 0}};
        case 2: return {s.width, 2, {s.feed_width, s.feed_width, 0}};
        default: return {s.feed_width, 1, {s.width, 0, 0}};
    }
}

constexpr int MATRICES = 4;  // of a site: A, and B of up to three layers

// each(matrix of all, its columns, its depth), in the order in which they lie.
template <typename Each>
inline void each_matrix(const Shape &shape, int64_t rank, Each each) {
    for (int64_t index = 0; index < 4 * shape.layers; ++index) {
        const SiteShape site = site_shape(shape, index % 4);
        each(index * MATRICES, site.parts * rank, site.inputs);
        for (int64_t part = 0; part < site.parts; ++part) each(index * MATRICES + 1 + part, site.outputs[part], rank);
    }
}

inline int64_t rounded_64(int64_t size) { return (size + 63) / 64 * 64; }
inline int64_t table_size(const Shape &shape) { return rounded_64(4 * shape.layers * MATRICES * int64_t(sizeof(int64_t))); }

inline const void *matrix_of(const Adapter &adapter, int64_t index) {
    return adapter.packed + reinterpret_cast<const int64_t *>(adapter.packed)[index];
}

struct Deltas {
    std::vector<float> gathered, low;
    Rows of_a, of_b;

    // For those tokens of a group that are between `first` and `last`, in site `index` of a model.
    void add(const Group &group, const SiteShape &site, int64_t index, const float *x, float *y, int64_t first,
             int64_t last) {
        const Adapter &adapter = *group.adapter;
        const int64_t *token = group.token, *end = token + group.tokens;
        while (token < end && *token < first) ++token;
        while (token < end && end[-1] >= last) --end;
        const int64_t n = end - token, all = site.parts * adapter.rank, outputs = site.all_outputs();
        if (!n) return;
        const float *from = x + token[0] * site.inputs;
        if (end[-1] - token[0] != n - 1) {
            gathered.resize(n * site.inputs);
            for (int64_t i = 0; i < n; ++i)
                std::memcpy(gathered.data() + i * site.inputs, x + token[i] * site.inputs, sizeof(float) * site.inputs);
            from = gathered.data();
        }
        low.resize(n * all);
        of_a.take(from, site.inputs, n, site.inputs, adapter.bits);
        const Matrix a{matrix_of(adapter, index * MATRICES), adapter.bits, site.inputs, all};
        multiply(of_a, a, low.data(), all, n);
        for (int64_t part = 0, column = 0; part < site.parts; column += site.outputs[part++]) {
            of_b.take(low.data() + part * adapter.rank, all, n, adapter.rank, adapter.bits);
            const Matrix b{matrix_of(adapter, index * MATRICES + 1 + part), adapter.bits, adapter.rank, site.outputs[part]};
            add_multiplied(of_b, b, n, [&](int64_t i) { return y + token[i] * outputs + column; });
        }
    }
};

inline void add_deltas(const Groups &groups, const Shape &shape, int64_t index, const float *x, float *y, int64_t first,
                       int64_t last) {
    static thread_local Deltas deltas;
    const SiteShape site = site_shape(shape, index % 4);
    for (int64_t i = 0; i < groups.groups; ++i) deltas.add(groups.group[i], site, index, x, y, first, last);
}

// x [N, D] of token ids, with what adapters add.
inline void embed(const Groups &groups, const float *embedding, const int32_t *ids, int64_t tokens, int64_t width,
                  float *x) {
    for (int64_t i = 0; i < tokens; ++i) std::memcpy(x + i * width, embedding + ids[i] * width, sizeof(float) * width);
    for (int64_t i = 0; i < groups.groups; ++i) {
        const Group &group = groups.group[i];
        const Adapter &of = *group.adapter;
        for (int64_t t = 0; t < group.tokens; ++t)
            for (int64_t r = 0; r < of.embedding_rank; ++r) {
                const float factor = of.embedding_a[ids[group.token[t]] * of.embedding_rank + r];
                const float *row = of.embedding_b + r * width;
                float *to = x + group.token[t] * width;
                for (int64_t j = 0; j < width; ++j) to[j] += factor * row[j];
            }
    }
}

}  // namespace

extern "C" {

int64_t tunesmith_adapter_size(const Shape *shape, int64_t rank, int64_t bits) {
    int64_t size = table_size(*shape);
    each_matrix(*shape, rank, [&](int64_t, int64_t columns, int64_t depth) {
        size += rounded_64(matrix_size(columns, depth, bits));
    });
    return size;
}

// Factors as they stand in a checkpoint, of each layer's sites A [P R, I] and B [O, R], one behind the other; B is packed
// times `scale`.
void tunesmith_pack_adapter(const Shape *shape, const float *flat, int64_t rank, float scale, int64_t bits, uint8_t *to) {
    int64_t at = table_size(*shape);
    each_matrix(*shape, rank, [&](int64_t index, int64_t columns, int64_t depth) {
        reinterpret_cast<int64_t *>(to)[index] = at;
        pack_matrix({flat, 1, depth, nullptr, nullptr, index % MATRICES ? scale : 1.0f}, columns, depth, bits, to + at);
        flat += columns * depth;
        at += rounded_64(matrix_size(columns, depth, bits));
    });
}

}  // extern "C"
