// A training step of all weights of a Llama on processors that multiply bf16 (AMX, AVX-512): forward and backward in one
// call, the gradient of every weight in fp32.
//
// Packed weights hold the gains of the norms before them, W' = W gain, so products give G, the gradient of W'. That of W
// is G gain, and that of a gain the sum of W G over the outputs: a norm's gain costs nothing by tokens. Gradients of
// weights are products over as many tokens as stay in the cache: each is read and written once for so many.
//
// Legend: as in layers.h.

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__linux__)

#include <utility>

#include "head.h"

extern "C" {

struct WholePass {
    Work work;
    const float *flat;  // the weights, in the order of `Llama.parameters`
    float *gradient;    // laid out as they are; added to
};

}  // extern "C"

namespace {

constexpr int64_t HEAD_CHUNK = 1024;  // positions that go through the head together

struct Whole : Layers<Whole> {
    static constexpr int64_t SPAN = 1024;

    // Where the weights of a layer stand in `flat`.
    struct Place {
        int64_t weight[4], gain[4], bias;  // by sites; gain of the norm before it
    };

    const WholePass &p;
    std::vector<Place> places;  // by layers
    int64_t norm_at, head_at;   // where they stand
    bf16 *packed, *turned;      // for learn_matrix
    float *more;
    std::optional<Head> head;
    Panels weights;  // of the vocabulary

    Whole(const Model &model, const WholePass &pass)
        : Layers(model, pass.work, {}), p(pass) {
        const int64_t d = m.width;
        int64_t at = m.vocabulary * d;
        const auto next = [&at](int64_t size) { return std::exchange(at, at + size); };
        for (int64_t i = 0; i < m.layers; ++i) {
            Place place{};
            place.gain[0] = next(d);
            place.weight[0] = next(wide * d);
            place.bias = next(m.layer[i].bias ? wide : 0);
            place.weight[1] = next(d * mixed);
            place.gain[2] = next(d);
            place.weight[2] = next(2 * m.feed_width * d);
            place.weight[3] = next(d * m.feed_width);
            places.push_back(place);
        }
        norm_at = next(d);
        head_at = m.head == m.embedding ? 0 : next(m.vocabulary * d);
        head.emplace(m, work, late_of.data(), HEAD_CHUNK, arena);
        const int64_t span = SPAN < n ? SPAN : n, deepest = span > head->most_rows ? span : head->most_rows;
        packed = arena.take<bf16>(d * deepest);
        turned = arena.take<bf16>(SIDE * deepest);
        more = arena.take<float>(d * SIDE);
        weights = arena.panels(uneven(head->most_rows), head->panels * SIDE);
    }

    // -- products of a site, for `tokens` from token `first` on; panels given begin there

    template <typename Place, typename Write>
    void forward(int64_t index, Panels in, int64_t, int64_t tokens, Place place, Write write) {
        const Site &site = site_at(index);
        by_panels_written(in, site.forward, site.inputs / SIDE, outputs_of(site) / SIDE, tokens, partial, place, nothing,
                          write);
    }

    template <typename Write>
    void backward(int64_t index, Panels gy, Panels, int64_t, int64_t tokens, Write write) {
        const Site &site = site_at(index);
        by_panels_written(gy, site.backward, outputs_of(site) / SIDE, site.inputs / SIDE, tokens, partial, one_by_one,
                          nothing, write);
    }

    void learn(int64_t index, Panels gy, Panels in, int64_t tokens) {
        const Site &site = site_at(index);
        const Place &place = places[index / 4];
        const int64_t outputs = outputs_of(site), weight = place.weight[index % 4];
        if (index % 4 == 0 && m.layer[index / 4].bias) add_rows(gy, outputs, tokens, p.gradient + place.bias);
        float *to = p.gradient + weight;
        if (!site.gain)
            learn_matrix(gy, outputs, in, site.inputs, tokens, [=](int64_t row, int64_t column, const float *sums) {
                add(to + row * site.inputs + column, _mm512_load_ps(sums), _mm512_load_ps(sums + 16));
            });
        else
            learn_matrix(gy, outputs, in, site.inputs, tokens,
                         [=, from = p.flat + weight, of_gain = p.gradient + place.gain[index % 4]](
                             int64_t row, int64_t column, const float *sums) {
                             const __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + 16);
                             const float *gain = site.gain + column, *was = from + row * site.inputs + column;
                             add(to + row * site.inputs + column, _mm512_mul_ps(low, _mm512_loadu_ps(gain)),
                                 _mm512_mul_ps(high, _mm512_loadu_ps(gain + 16)));
                             add(of_gain + column, _mm512_mul_ps(low, _mm512_loadu_ps(was)),
                                 _mm512_mul_ps(high, _mm512_loadu_ps(was + 16)));
                         });
    }

    static void add(float *to, __m512 low, __m512 high) {
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), low));
        _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), high));
    }

    // Adds up the rows of a matrix.
    static void add_rows(Panels from, int64_t columns, int64_t rows, float *to) {
        for (int64_t panel = 0; panel < columns / SIDE; ++panel)
            for (int64_t i = 0; i < rows; ++i)
                add(to + panel * SIDE, load_low(from.block(panel, i)), load_low(from.block(panel, i) + 16));
    }

    // The product of `gy` [tokens, outputs], exchanged, and `in` [tokens, inputs], whole blocks of tokens: write(output,
    // input, sums) is given 32 numbers of a row, from `input` on. The narrower of them is packed at once and stays in the
    // cache, the other passes by 32 columns at a time: where that is `in`, what comes out is exchanged.
    template <typename Write>
    void learn_matrix(Panels gy, int64_t outputs, Panels in, int64_t inputs, int64_t tokens, Write write) {
        const bool exchanged = outputs < inputs;
        const Panels narrow = exchanged ? gy : in, passing = exchanged ? in : gy;
        const int64_t panels = (exchanged ? outputs : inputs) / SIDE, columns = exchanged ? inputs : outputs;
        const int64_t steps = tokens / SIDE, parts = (steps + DEEPEST - 1) / DEEPEST, size = (steps + parts - 1) / parts;
        const int64_t lines = (SIDE + panels - 1) / panels;
        alignas(64) float sums[2][BLOCK];
        int64_t now = 0, row = 0, column = 0, written = SIDE;
        const auto write_row = [&](int64_t i) {
            if (row + i < outputs) write(row + i, column, sums[now] + i * SIDE);
        };
        for (int64_t panel = 0; panel < panels; ++panel)
            for (int64_t s = 0; s < steps; ++s)
                pack_rows(narrow.block(panel, s * SIDE), SIDE, packed + (panel * steps + s) * BLOCK);
        for (int64_t from = 0; from < columns; from += SIDE) {
            for (int64_t s = 0; s < steps; ++s) turn_block(passing.block(from / SIDE, s * SIDE), turned + s * BLOCK);
            for (int64_t first = 0; first < steps; first += size) {
                const int64_t deep = steps - first < size ? steps - first : size, a_step = (SIDE + deep - 1) / deep;
                const bf16 *next = passing.block(from / SIDE + 1, first * panels * lines);
                for (int64_t panel = 0; panel < panels; ++panel, next += deep * lines * SIDE) {
                    float *under_way = more + panel * BLOCK;
                    if (first)
                        give_sums(under_way);
                    else
                        clear();
                    accumulate(turned + first * BLOCK, BLOCK, packed + (panel * steps + first) * BLOCK, deep, next,
                               from + SIDE < columns ? lines : 0, [&](int64_t) {
                                   for (int64_t i = 0; i < a_step && written < SIDE; ++i) write_row(written++);
                               });
                    if (first + deep < steps) {
                        take_sums(under_way);
                        continue;
                    }
                    now ^= 1;
                    take_sums(sums[now]);
                    row = from, column = panel * SIDE, written = 0;
                    if (exchanged) {
                        Attention::exchange_sums(sums[now]);
                        std::swap(row, column);
                    }
                }
            }
        }
        while (written < SIDE) write_row(written++);
    }

    static void turn_block(const bf16 *from, bf16 *to) {
        pack_rows(from, SIDE, to);
        Attention::settle_pairs(to);
        Attention::settle_pairs(to + BLOCK / 2);
    }

    // -- both ends

    void embed() {
        for (int64_t at = 0; at < n; ++at)
            std::memcpy(x + at * m.width, m.embedding + work.token_ids[at] * m.width, sizeof(float) * m.width);
    }

    void embed_backward() {
        for (int64_t at = 0; at < n; ++at) {
            if (turn_of[at] < 0) continue;
            float *to = p.gradient + work.token_ids[at] * m.width;
            const float *from = grad + at * m.width;
            for (int64_t j = 0; j < m.width; j += 16)
                _mm512_storeu_ps(to + j, _mm512_add_ps(_mm512_loadu_ps(to + j), _mm512_loadu_ps(from + j)));
        }
    }

    // The loss of all positions, its gradient up to the input of the last norm, and those of head and norm.
    void score() {
        float factor[HEAD_CHUNK];
        for (int64_t first = 0; first < work.positions; first += HEAD_CHUNK) {
            const int64_t real = work.positions - first < HEAD_CHUNK ? work.positions - first : HEAD_CHUNK;
            const int64_t rows = rounded_up(real);
            head->take(x, first, real, rows);
            do
                head->weigh(0, head->panels, rows, weights);
            while (head->again(rows));
            for (int64_t i = 0; i < rows; ++i) factor[i] = i < real ? score_one(i, first + i) : 0.0f;
            for (int64_t at = 0; at < rows; at += CHUNK)
                head->by_slices([&](int64_t panel, int64_t count) {
                    head->leave(weights.panels(panel), panel, count, at, rows - at < CHUNK ? rows - at : CHUNK);
                });
            learn_head(rows, factor);
            for (int64_t i = 0; i < real; ++i) leave_head(i, first + i, factor[i]);
        }
    }

    // As the head scores; the target's weight becomes less the sum of all: the gradient but for the factor.
    float score_one(int64_t row, int64_t position) {
        const int64_t target = work.target[position];
        store(weights.block(target / SIDE, row) + target % SIDE,
              std::exp(head->wanted[row] - head->reference[row]) - head->sum_of(row));
        return head->score(row, position);
    }

    // `states` are taken times the factors.
    void learn_head(int64_t rows, const float *factor) {
        const int64_t d = m.width;
        for (int64_t panel = 0; panel < d / SIDE; ++panel)
            for (int64_t i = 0; i < rows; ++i) {
                bf16 *at = head->states.block(panel, i);
                const __m512 by = _mm512_set1_ps(factor[i]);
                store_32(at, _mm512_mul_ps(load_low(at), by), _mm512_mul_ps(load_low(at + 16), by));
            }
        learn_matrix(weights, m.vocabulary, head->states, d, rows,
                     [to = p.gradient + head_at, d](int64_t row, int64_t column, const float *sums) {
                         add(to + row * d + column, _mm512_load_ps(sums), _mm512_load_ps(sums + 16));
                     });
    }

    // From what the head gave back for one position through the last norm, into grad.
    void leave_head(int64_t row, int64_t position, float factor) {
        const int64_t d = m.width, at = late_of[work.predicting[position]];
        const float *y = x + at * d, *from = head->grad_states + row * d;
        float *to = grad + at * d, *of_gain = p.gradient + norm_at, dot = 0.0f;
        for (int64_t j = 0; j < d; ++j) {
            const float g = from[j] * factor;
            of_gain[j] += g * y[j];
            to[j] = g * m.norm[j];
            dot += to[j] * y[j];
        }
        const float mean = dot / static_cast<float>(d), over = inverse[at];
        for (int64_t j = 0; j < d; ++j) to[j] = (to[j] - y[j] * mean) * over;
    }
};

}  // namespace

extern "C" {

// How many bytes of memory a pass needs; its `memory` is null.
int64_t tunesmith_whole_memory(const Model *model, const WholePass *pass) { return Whole(*model, *pass).arena.used; }

void tunesmith_whole(const Model *model, const WholePass *pass) { Whole(*model, *pass).run(); }

}  // extern "C"

#else

extern "C" bool tunesmith_tiles() { return false; }

#endif
