// The head of a Llama in training: the losses of weighed positions, and the way back from them to the states.
//
// No logit is ever in memory. Each becomes e^(logit - reference) between the tile instructions of the next product, and
// the sums that divide by all of them are left to the states. The reference of a position is the logit of its target: what
// is learned is seldom so improbable that this overflows, and where it is, the largest logit takes its place.
//
// Legend: as in layers.h; C = positions that go through the head together, a multiple of 32.

#pragma once

#include "layers.h"

namespace {

struct Head {
    static constexpr float BEYOND = 60.0f;  // by how much a logit may exceed the reference
    static constexpr int64_t SLICE = 64;    // panels of the vocabulary whose weights stay in the cache, forth and back

    const Model &m;
    const Work &work;
    const int64_t *late_of;  // by tokens: the row of x that has its state
    const int64_t most_rows, panels;  // panels: of the vocabulary
    Panels states;                    // [C, D]
    float *grad_states;               // [C, D], but for the factors that `score` returns
    float *reference, *wanted;        // [C]
    float *largest, *total;           // [C, 16]: of every sixteenth logit
    int64_t *target;                  // [C]
    float *partial;

    Head(const Model &model, const Work &given, const int64_t *row_of, int64_t at_once, Arena &arena)
        : m(model), work(given), late_of(row_of),
          most_rows(rounded_up(given.positions) < at_once ? rounded_up(given.positions) : at_once),
          panels(rounded_up(model.vocabulary) / SIDE) {
        states = arena.panels(uneven(most_rows), m.width);
        grad_states = arena.take<float>(most_rows * m.width);
        reference = arena.take<float>(most_rows);
        wanted = arena.take<float>(most_rows);
        largest = arena.take<float>(most_rows * 16);
        total = arena.take<float>(most_rows * 16);
        target = arena.take<int64_t>(most_rows);
        partial = arena.take<float>(most_rows * SIDE);
    }

    // The states of `rows` positions from `first` on, of which `real` are there, from x [L, D] behind the last norm.
    void take(const float *x, int64_t first, int64_t real, int64_t rows) {
        for (int64_t i = 0; i < rows; ++i) {
            target[i] = i < real ? work.target[first + i] : -1;
            __m512 along = _mm512_setzero_ps();
            for (int64_t j = 0; j < m.width; j += 16) {
                __m512 value = _mm512_setzero_ps();
                if (i < real) {
                    value = _mm512_mul_ps(_mm512_loadu_ps(x + late_of[work.predicting[first + i]] * m.width + j),
                                          _mm512_loadu_ps(m.norm + j));
                    along = _mm512_fmadd_ps(value, _mm512_loadu_ps(m.head + target[i] * m.width + j), along);
                }
                store_16(states.block(j / SIDE, i) + j % SIDE, value);
            }
            reference[i] = sum(along);
        }
        begin(rows);
    }

    // Nothing has been weighed yet.
    void begin(int64_t rows) {
        const __m512 lowest = _mm512_set1_ps(-__builtin_huge_valf());
        for (int64_t i = 0; i < rows; ++i) {
            _mm512_storeu_ps(largest + i * 16, lowest);
            _mm512_storeu_ps(total + i * 16, _mm512_setzero_ps());
        }
    }

    // e^(logit - reference) of `count` panels of the vocabulary from `first` on; nothing beyond its end.
    void weigh(int64_t first, int64_t count, int64_t rows, Panels to) {
        const int64_t depth = m.width / SIDE, in_last = m.vocabulary - (panels - 1) * SIDE;
        by_panels_written(
            states, m.head_forward + first * depth * BLOCK, depth, count, rows, partial, one_by_one, nothing,
            [=](int64_t panel, int64_t at, int64_t i, const float *sums) {
                const int64_t row = at + i, column = target[row] - (first + panel) * SIDE;
                if (0 <= column && column < SIDE) wanted[row] = sums[column];
                const __m512 by = _mm512_set1_ps(reference[row]), low = _mm512_load_ps(sums);
                __m512 high = _mm512_load_ps(sums + 16), highest = _mm512_max_ps(low, high);
                __m512 left = exponential(_mm512_sub_ps(low, by)), right = exponential(_mm512_sub_ps(high, by));
                if (first + panel == panels - 1 && in_last < SIDE) {
                    const __mmask16 of_low = first_of_16(in_last), of_high = first_of_16(in_last - 16);
                    highest = _mm512_mask_max_ps(_mm512_mask_mov_ps(_mm512_loadu_ps(largest + row * 16), of_low, low),
                                                 of_high, low, high);
                    left = _mm512_maskz_mov_ps(of_low, left);
                    right = _mm512_maskz_mov_ps(of_high, right);
                }
                float *most = largest + row * 16, *all = total + row * 16;
                _mm512_storeu_ps(most, _mm512_max_ps(_mm512_loadu_ps(most), highest));
                _mm512_storeu_ps(all, _mm512_add_ps(_mm512_loadu_ps(all), _mm512_add_ps(left, right)));
                store_32(to.block(panel, row), left, right);
            });
    }

    // Whether a logit was so far above its reference that all panels have to be weighed again, from a better one.
    bool again(int64_t rows) {
        bool beyond = false;
        for (int64_t i = 0; i < rows; ++i) {
            const float most = _mm512_reduce_max_ps(_mm512_loadu_ps(largest + i * 16));
            if (!(most - reference[i] > BEYOND)) continue;
            reference[i] = most;
            beyond = true;
        }
        if (beyond) begin(rows);
        return beyond;
    }

    float sum_of(int64_t row) const { return sum(_mm512_loadu_ps(total + row * 16)); }

    // Gives out what was found for one position; returns its weight over the sum.
    float score(int64_t row, int64_t position) {
        const float all = sum_of(row);
        work.nll[position] = std::log(all) + reference[row] - wanted[row];
        work.right[position] = wanted[row] == _mm512_reduce_max_ps(_mm512_loadu_ps(largest + row * 16));
        return work.weight[position] / all;
    }

    // Adds to grad_states of `rows` positions from `row` on what `count` panels from `first` on give back, which begin
    // at `weights`.
    void leave(Panels weights, int64_t first, int64_t count, int64_t row, int64_t rows) {
        by_panels_written(
            weights.from(row), m.head_backward + first * BLOCK, count, m.width / SIDE, rows, partial, one_by_one, nothing,
            [=](int64_t panel, int64_t at, int64_t i, const float *sums) {
                float *to = grad_states + (row + at + i) * m.width + panel * SIDE;
                __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + 16);
                if (first) {
                    low = _mm512_add_ps(low, _mm512_loadu_ps(to));
                    high = _mm512_add_ps(high, _mm512_loadu_ps(to + 16));
                }
                _mm512_storeu_ps(to, low);
                _mm512_storeu_ps(to + 16, high);
            },
            panels);
    }

    // work(first panel, panels) of each slice of the vocabulary.
    template <typename Do>
    void by_slices(Do work) const {
        for (int64_t first = 0; first < panels; first += SLICE)
            work(first, panels - first < SLICE ? panels - first : SLICE);
    }
};

}  // namespace
