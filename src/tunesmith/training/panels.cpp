// The products of one site of a training step, forward and backward, adapters' factors with them: what training/sites.py
// does with products of torch. Frozen weights lie in panels from the start, of fp32 or in fixed point, factors from the
// start of a step, in fp32; a token's products with weights and with its job's factors add up in the same registers.
//
// Legend: N = tokens, I, O = inputs and outputs of a site, P = linear layers stacked in it, R = rank, S = P R rounded up
// to whole panels.

#include "../decoder/fixed.h"
#include "causal.h"

extern "C" {

struct Site {
    const void *forward[3], *backward;  // matrices: [I -> O] of each part, and [O -> I], times the gain of the norm before
    const float *gain;                  // [I], of that norm; null where there is none
    int64_t bits, inputs, parts, outputs[3];
};

// Tokens of one job, and its factors. Rank 0: the base's weights alone.
struct Piece {
    int64_t start, tokens, rank;
    const float *packed;  // what tunesmith_pack_site_factors made of them
    float *low;           // [tokens, S]: what A gave; `forward` writes it, `backward` reads it
    float *of_a, *of_b;   // gradients [P R, I] and [O, R]; added to
    float scale;
};

}  // extern "C"

namespace {

constexpr int64_t TOKENS_AHEAD = 16;  // before it is read, a token is asked for
constexpr int64_t LEARNED = 256;      // tokens whose part of a gradient is added up at once: they stay in the cache

int64_t outputs_of(const Site &site) {
    int64_t total = 0;
    for (int64_t part = 0; part < site.parts; ++part) total += site.outputs[part];
    return total;
}

// Where packed factors stand: A for [I -> P R] and [P R -> I], B part by part for [R -> O] and [O -> R].
struct Places {
    int64_t a_forward, a_backward, b_forward[3], b_backward[3], size;

    Places(const Site &site, int64_t rank) {
        const int64_t ranks = site.parts * rank;
        a_forward = 0;
        a_backward = panels_size(ranks, site.inputs);
        size = a_backward + panels_size(site.inputs, ranks);
        for (int64_t part = 0; part < site.parts; ++part) {
            b_forward[part] = size;
            b_backward[part] = size + panels_size(site.outputs[part], rank);
            size = b_backward[part] + panels_size(rank, site.outputs[part]);
        }
    }
};

int64_t low_width(const Site &site, int64_t rank) { return whole_panels(site.parts * rank); }

// left^T right, of `left` [tokens, left_columns] and `right` [tokens, right_columns], whose rows lie `.._row` apart. put(i, j,
// sum) is called for each LEARNED tokens or fewer, with their sum of column i of `left` times column j of `right`.
template <typename Put>
void learn(const float *left, int64_t left_row, int64_t left_columns, const float *right, int64_t right_row,
           int64_t right_columns, int64_t tokens, Put put) {
    alignas(64) float panel[LEARNED * WIDE] = {};  // a column of `right` in one piece
    by_depth(tokens, LEARNED, 1, [&](int64_t first, int64_t deep) {
        for (int64_t column = 0; column < right_columns; column += WIDE) {
            const int64_t real = right_columns - column < WIDE ? right_columns - column : WIDE;
            const float *from = right + first * right_row + column;
            for (int64_t token = 0; token < deep; ++token, from += right_row) {
                __builtin_prefetch(from + TOKENS_AHEAD * right_row);
                float *to = panel + token * WIDE;
                for (int64_t j = 0; real < WIDE && j < real; ++j) to[j] = from[j];
                if (real == WIDE) write(to, read(from)), write(to + LANES, read(from + LANES));
            }
            by_blocks(left_columns, 0, [&](auto &block, int64_t i) {
                block.clear();
                block.add(left + first * left_row + i, 1, left_row, panel, WIDE, deep);
                block.each_row(real, [&](int of, int64_t j, float sum) { put(i + of, column + j, sum); });
            });
        }
    });
}

// For `multiply`.
auto tokens_of(const Piece *piece) {
    return [piece](int64_t i) { return Stretch{piece[i].start, piece[i].tokens}; };
}

int64_t end_of(const Piece *piece, int64_t pieces) { return piece[pieces - 1].start + piece[pieces - 1].tokens; }

// Adds to the gradients of the factors of one piece; returns that of what A gave.
std::vector<float> learn_factors(const Site &site, const Piece &p, const float *gy, const float *x) {
    const Places at(site, p.rank);
    const int64_t low_row = low_width(site, p.rank), outputs = outputs_of(site);
    std::vector<float> grad_low(p.tokens * low_row);
    gy += p.start * outputs;
    float *of_b = p.of_b;
    for (int64_t part = 0; part < site.parts && p.rank; ++part) {
        const int64_t size = site.outputs[part], first = part * p.rank;
        multiply(gy, outputs, p.packed + at.b_backward[part], size, p.rank, grad_low.data() + first, low_row, p.tokens);
        learn(p.low + first, low_row, p.rank, gy, outputs, size, p.tokens, [&](int64_t r, int64_t output, float sum) {
            of_b[output * p.rank + r] += sum * p.scale;
        });
        gy += size;
        of_b += size * p.rank;
    }
    learn(grad_low.data(), low_row, site.parts * p.rank, x + p.start * site.inputs, site.inputs, site.inputs, p.tokens,
          [&](int64_t r, int64_t input, float sum) {
              p.of_a[r * site.inputs + input] += sum * (site.gain ? site.gain[input] : 1.0f);
          });
    return grad_low;
}

}  // namespace

extern "C" {

int64_t tunesmith_low_width(const Site *site, int64_t rank) { return low_width(*site, rank); }

int64_t tunesmith_site_factors_size(const Site *site, int64_t rank) { return Places(*site, rank).size; }

// A [P R, I] and B [O, R], stacked; B times `scale`.
void tunesmith_pack_site_factors(const Site *site, const float *a, const float *b, int64_t rank, float scale,
                                 float *to) {
    const Places at(*site, rank);
    const int64_t ranks = site->parts * rank, inputs = site->inputs;
    pack({a, 1, inputs, site->gain}, ranks, inputs, to + at.a_forward);
    pack({a, inputs, 1, nullptr, site->gain}, inputs, ranks, to + at.a_backward);
    for (int64_t part = 0; part < site->parts; b += site->outputs[part++] * rank) {
        pack({b, 1, rank, nullptr, nullptr, scale}, site->outputs[part], rank, to + at.b_forward[part]);
        pack({b, rank, 1, nullptr, nullptr, scale}, rank, site->outputs[part], to + at.b_backward[part]);
    }
}

// y [N, O] = x W^T + (x A^T) B^T, for the tokens of all pieces.
void tunesmith_site_forward(const Site *given, const Piece *piece, int64_t pieces, const float *x, float *y) {
    const Site &site = *given;
    const int64_t inputs = site.inputs, outputs = outputs_of(site);
    for (int64_t i = 0; i < pieces; ++i)
        if (const Piece &p = piece[i]; p.rank)
            multiply(x + p.start * inputs, inputs, p.packed, inputs, site.parts * p.rank, p.low,
                     low_width(site, p.rank), p.tokens);
    static thread_local Rows rows;
    rows.take(x, inputs, end_of(piece, pieces), inputs, site.bits);
    for (int64_t part = 0; part < site.parts; ++part) {
        const auto factors = [&](auto &block, int64_t i, int64_t token, int64_t column) {
            const Piece &p = piece[i];
            const int64_t low_row = low_width(site, p.rank);
            if (p.rank)
                block.add(p.low + token * low_row + part * p.rank, low_row, 1,
                          p.packed + Places(site, p.rank).b_forward[part] + column * p.rank, WIDE, p.rank);
        };
        const Matrix matrix{site.forward[part], site.bits, inputs, site.outputs[part]};
        multiply(rows, matrix, y, outputs, end_of(piece, pieces), pieces, tokens_of(piece), factors);
        y += site.outputs[part];
    }
}

// gx [N, I] from gy [N, O]; adds to the gradients of the factors. x and `low` as `forward` had and left them.
void tunesmith_site_backward(const Site *given, const Piece *piece, int64_t pieces, const float *gy, const float *x,
                             float *gx) {
    const Site &site = *given;
    const int64_t inputs = site.inputs, outputs = outputs_of(site);
    std::vector<std::vector<float>> grad_low;  // [tokens, S] of each piece
    for (int64_t i = 0; i < pieces; ++i) grad_low.push_back(learn_factors(site, piece[i], gy, x));
    const auto factors = [&](auto &block, int64_t i, int64_t token, int64_t column) {
        const int64_t rank = piece[i].rank, low_row = low_width(site, rank);
        if (rank)
            block.add(grad_low[i].data() + token * low_row, low_row, 1,
                      piece[i].packed + Places(site, rank).a_backward + column * site.parts * rank, WIDE,
                      site.parts * rank);
    };
    static thread_local Rows rows;
    rows.take(gy, outputs, end_of(piece, pieces), outputs, site.bits);
    const Matrix matrix{site.backward, site.bits, outputs, inputs};
    multiply(rows, matrix, gx, inputs, end_of(piece, pieces), pieces, tokens_of(piece), factors);
}

}  // extern "C"
