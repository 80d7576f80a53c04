// Factors of an adapter as the engine reads them: no wider than their rank, for with many adapters a step is as long as what
// it reads.
//
// A part of A [R, I] is ceil(R / 16) columns of 16, each I / 32 tiles. A part of B [O, R] is O / 16 columns, each ceil(R / 2)
// rows of pairs: what tiles read beyond them is multiplied by 0.

#pragma once

#include "../decoder/packed.h"

namespace {

struct Factors {
    const Model &m;
    const int64_t rank, columns = (rank + 15) / 16, pairs = (rank + 1) / 2, deep = rounded_up(rank) / SIDE;
    std::vector<int64_t> sites;  // where each begins, and their end

    Factors(const Model &model, int64_t of_rank) : m(model), rank(of_rank), sites{0} {
        for (int64_t index = 0; index < 4 * m.layers; ++index)
            sites.push_back(sites.back() + a_size(site(index)) + outputs_of(site(index)) * pairs * 2);
    }

    const Site &site(int64_t index) const { return m.layer[index / 4].sites[index % 4]; }
    int64_t a_size(const Site &of) const { return of.parts * columns * 16 * of.inputs; }
    int64_t size() const { return sites.back() + BLOCK / 2; }  // tiles of the last rows of B end there

    void pack(const float *flat, float scale, bf16 *to) const {
        std::memset(to + sites.back(), 0, sizeof(bf16) * BLOCK / 2);
        for (int64_t index = 0; index < 4 * m.layers; ++index) {
            const Site &of = site(index);
            for (int part = 0; part < of.parts; ++part, flat += rank * of.inputs)
                to = pack_columns_of(flat, rank, of.inputs, of.gain, 1.0f, to);
            for (int part = 0; part < of.parts; flat += of.outputs[part++] * rank)
                to = pack_columns_of(flat, of.outputs[part], rank, nullptr, scale, to);
        }
    }

    // A matrix [rows, depth] by columns of 16 rows.
    static bf16 *pack_columns_of(const float *from, int64_t rows, int64_t depth, const float *gain, float scale, bf16 *to) {
        for (int64_t row = 0; row < rows; row += 16)
            for (int64_t i = 0; i < depth; i += SIDE) {
                __m512i words[16];
                for (int64_t j = 0; j < 16; ++j)
                    words[j] = row + j < rows
                                   ? halves(from + (row + j) * depth + i, depth - i, gain ? gain + i : gain, scale)
                                   : _mm512_setzero_si512();
                transpose(words);
                for (int64_t j = 0; j < 16 && 2 * j < depth - i; ++j, to += SIDE) _mm512_storeu_si512(to, words[j]);
            }
        return to;
    }
};

}  // namespace
