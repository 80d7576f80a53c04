// Factors of an adapter as the engine reads them: in 8 bits, a scale for each row, and no wider than their rank, for with
// many adapters a step is as long as what it reads. States are multiplied with them by two digits of 8 bits (int8.h).
//
// A part of A [R, I] is ceil(R / 16) columns of 16 by rows of four, a part of B [O, R] O / 16 such columns; before those of
// a site stand their scales, of A in fp32 and of B in bf16. What tiles read beyond a column is multiplied by 0.

#pragma once

#include "../decoder/packed.h"
#include "int8.h"

namespace {

struct Factors {
    const Model &m;
    const int64_t rank, columns = (rank + 15) / 16, fours = (rank + 3) / 4;
    const int64_t deep = rounded_deep(rank) / DEEP;  // of what B reads, in tiles
    std::vector<int64_t> sites;                      // where each begins, and their end, in bytes

    Factors(const Model &model, int64_t of_rank) : m(model), rank(of_rank), sites{0} {
        for (int64_t index = 0; index < 4 * m.layers; ++index) {
            const Site &of = site(index);
            sites.push_back(sites.back() + scales_size(of) + of.parts * columns * a_column(of) +
                            outputs_of(of) / 16 * b_column());
        }
    }

    const Site &site(int64_t index) const { return m.layer[index / 4].sites[index % 4]; }
    int64_t a_column(const Site &of) const { return 16 * rounded_deep(of.inputs); }  // bytes
    int64_t b_column() const { return fours * DEEP; }
    int64_t scales_size(const Site &of) const {
        return of.parts * columns * 16 * sizeof(float) + outputs_of(of) * sizeof(bf16);
    }
    int64_t size() const { return sites.back() + TILE_BYTES; }  // tiles of the last rows of B end there

    // Where factors of a site are.
    const float *a_scales(const uint8_t *packed, int64_t index) const {
        return reinterpret_cast<const float *>(packed + sites[index]);
    }
    const bf16 *b_scales(const uint8_t *packed, int64_t index) const {
        return reinterpret_cast<const bf16 *>(a_scales(packed, index) + site(index).parts * columns * 16);
    }
    const uint8_t *a(const uint8_t *packed, int64_t index) const { return packed + sites[index] + scales_size(site(index)); }
    const uint8_t *b(const uint8_t *packed, int64_t index) const {
        return a(packed, index) + site(index).parts * columns * a_column(site(index));
    }

    void pack(const float *flat, float scale, uint8_t *packed) const {
        std::memset(packed + sites.back(), 0, TILE_BYTES);
        for (int64_t index = 0; index < 4 * m.layers; ++index) {
            const Site &of = site(index);
            float *a_scale = const_cast<float *>(a_scales(packed, index)), b_scale[16];
            bf16 *b_rounded = const_cast<bf16 *>(b_scales(packed, index));
            uint8_t *to = const_cast<uint8_t *>(a(packed, index));
            for (int part = 0; part < of.parts; ++part, flat += rank * of.inputs)
                for (int64_t row = 0; row < rank; row += 16, to += a_column(of), a_scale += 16)
                    pack_eight(flat + row * of.inputs, rank - row, of.inputs, rounded_deep(of.inputs) / 4, to, a_scale);
            for (int64_t o = 0; o < outputs_of(of); o += 16, to += b_column(), flat += 16 * rank) {
                pack_eight(flat, 16, rank, fours, to, b_scale);
                for (int64_t j = 0; j < 16; ++j) store(b_rounded + o + j, b_scale[j] * scale);
            }
        }
    }
};

}  // namespace
