// A training step of all weights of a Llama on processors that multiply tiles of bf16 (AMX): forward and backward in one
// call, the gradient of every weight in fp32.
//
// Packed weights hold the gains of the norms before them, W' = W gain, so products give G, the gradient of W'. That of W
// is G gain, and that of a gain the sum of W G over the outputs: a norm's gain costs nothing by tokens. Gradients of
// weights are products over as many tokens as stay in the cache: each is read and written once for so many.
//
// Legend: as in layers.h.

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <utility>

#include "layers.h"

extern "C" {

struct WholePass {
    Work work;
    const float *flat;  // the weights, in the order of `Llama.parameters`
    float *gradient;    // laid out as they are; added to
};

}  // extern "C"

namespace {

constexpr int64_t HEAD_CHUNK = 1024;  // positions whose logits are held at once
constexpr int64_t SLICE = 64;         // blocks of the vocabulary whose logits stay in the cache
constexpr int64_t AT_ONCE = 8;        // positions whose logits are walked together: their lines are neighbours

struct Whole : Layers<Whole> {
    static constexpr int64_t SPAN = 1024;

    // Where the weights of a layer stand in `flat`.
    struct Place {
        int64_t weight[4], gain[4], bias;  // by sites; gain of the norm before it
    };

    const WholePass &p;
    const int64_t padded;      // V, in whole blocks
    std::vector<Place> places;  // by layers
    int64_t norm, head;         // where they stand
    bf16 *packed, *turned;      // for learn_matrix
    float *grad_states, *sums, *more;
    Panels states, logits;

    Whole(const Model &model, const WholePass &pass)
        : Layers(model, pass.work), p(pass), padded(rounded_up(model.vocabulary)) {
        const int64_t d = m.width, weighed = rounded_up(work.positions);
        const int64_t head_chunk = weighed < HEAD_CHUNK ? weighed : HEAD_CHUNK;
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
        norm = next(d);
        head = m.head == m.embedding ? 0 : next(m.vocabulary * d);
        const int64_t span = span_of(n) < n ? span_of(n) : n, deepest = span > head_chunk ? span : head_chunk;
        packed = arena.take<bf16>(d * deepest);
        turned = arena.take<bf16>(SIDE * deepest);
        more = arena.take<float>((head_chunk > d ? head_chunk : d) * SIDE);
        grad_states = arena.take<float>(HEAD_CHUNK * d);
        states = arena.panels(uneven(head_chunk), d);
        logits = arena.panels(uneven(head_chunk), padded);
    }

    // -- products of a site, for `tokens` from token `first` on; panels given begin there

    static void nothing(int64_t, int64_t) {}

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
        const int64_t d = m.width, panels = padded / SIDE;
        float factor[HEAD_CHUNK];
        for (int64_t first = 0; first < work.positions; first += HEAD_CHUNK) {
            const int64_t real = work.positions - first < HEAD_CHUNK ? work.positions - first : HEAD_CHUNK;
            const int64_t rows = rounded_up(real);
            take_states(states, first, real, rows);
            by_panels_written(states, m.head_forward, d / SIDE, panels, rows, more, one_by_one, nothing, into(logits));
            for (int64_t i = 0; i < rows; i += AT_ONCE) weigh_tokens(i, first + i, real - i, factor + i);
            for (int64_t at = 0; at < rows; at += CHUNK) leave_logits(at, rows - at < CHUNK ? rows - at : CHUNK);
            learn_head(rows, factor);
            for (int64_t i = 0; i < real; ++i) leave_head(i, first + i, factor[i]);
        }
    }

    // Logits of positions become e^(logit - largest), that of the target less the sum of all; `factor`: the weights of
    // the positions over their sums. `real` of them are there.
    void weigh_tokens(int64_t row, int64_t position, int64_t real, float *factor) {
        const int64_t v = m.vocabulary;
        const __m512 lowest = _mm512_set1_ps(-__builtin_huge_valf());
        __m512 most[AT_ONCE], total[AT_ONCE] = {};
        float wanted[AT_ONCE] = {};
        for (int64_t i = 0; i < AT_ONCE; ++i) most[i] = lowest;
        for (int64_t j = 0; j < padded; j += SIDE) {
            const __mmask16 low = first_of_16(v - j), high = first_of_16(v - j - 16);
            for (int64_t i = 0; i < AT_ONCE; ++i) {
                const bf16 *at = logits.block(j / SIDE, row + i);
                most[i] = _mm512_mask_max_ps(most[i], low, most[i], load_low(at));
                most[i] = _mm512_mask_max_ps(most[i], high, most[i], load_low(at + 16));
            }
        }
        float largest[AT_ONCE];
        for (int64_t i = 0; i < AT_ONCE; ++i) {
            largest[i] = _mm512_reduce_max_ps(most[i]);
            most[i] = _mm512_set1_ps(largest[i]);
            if (i < real) wanted[i] = load(*logit(row + i, position + i));
        }
        for (int64_t j = 0; j < padded; j += SIDE) {
            const __mmask16 low = first_of_16(v - j), high = first_of_16(v - j - 16);
            for (int64_t i = 0; i < AT_ONCE; ++i) {
                bf16 *at = logits.block(j / SIDE, row + i);
                const __m512 left = _mm512_maskz_mov_ps(low, exponential(_mm512_sub_ps(load_low(at), most[i])));
                const __m512 right = _mm512_maskz_mov_ps(high, exponential(_mm512_sub_ps(load_low(at + 16), most[i])));
                total[i] = _mm512_add_ps(total[i], _mm512_add_ps(left, right));
                store_32(at, left, right);
            }
        }
        for (int64_t i = 0; i < AT_ONCE; ++i) {
            factor[i] = 0.0f;
            if (i >= real) continue;
            const float all = sum(total[i]);
            work.nll[position + i] = std::log(all) + largest[i] - wanted[i];
            work.right[position + i] = wanted[i] == largest[i];
            store(logit(row + i, position + i), std::exp(wanted[i] - largest[i]) - all);
            factor[i] = work.weight[position + i] / all;
        }
    }

    bf16 *logit(int64_t row, int64_t position) {
        const int64_t target = work.target[position];
        return logits.block(target / SIDE, row) + target % SIDE;
    }

    // The gradient of states but for the factors, from what logits became: a slice of the vocabulary at a time.
    void leave_logits(int64_t row, int64_t rows) {
        const int64_t d = m.width, panels = padded / SIDE;
        for (int64_t first = 0; first < panels; first += SLICE) {
            const int64_t steps = panels - first < SLICE ? panels - first : SLICE;
            by_panels_written(
                logits.panels(first).from(row), m.head_backward + first * BLOCK, steps, d / SIDE, rows, more, one_by_one,
                nothing,
                [&](int64_t panel, int64_t at, int64_t i, const float *sums) {
                    float *to = grad_states + (row + at + i) * d + panel * SIDE;
                    const __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + 16);
                    if (first) {
                        add(to, low, high);
                    } else {
                        _mm512_storeu_ps(to, low);
                        _mm512_storeu_ps(to + 16, high);
                    }
                },
                panels);
        }
    }

    // `states` are taken times the factors.
    void learn_head(int64_t rows, const float *factor) {
        const int64_t d = m.width;
        for (int64_t panel = 0; panel < d / SIDE; ++panel)
            for (int64_t i = 0; i < rows; ++i) {
                bf16 *at = states.block(panel, i);
                const __m512 by = _mm512_set1_ps(factor[i]);
                store_32(at, _mm512_mul_ps(load_low(at), by), _mm512_mul_ps(load_low(at + 16), by));
            }
        learn_matrix(logits, m.vocabulary, states, d, rows,
                     [to = p.gradient + head, d](int64_t row, int64_t column, const float *sums) {
                         add(to + row * d + column, _mm512_load_ps(sums), _mm512_load_ps(sums + 16));
                     });
    }

    // From what the head gave back for one position through the last norm, into grad.
    void leave_head(int64_t row, int64_t position, float factor) {
        const int64_t d = m.width, token = work.predicting[position];
        const float *y = x + token * d, *from = grad_states + row * d;
        float *to = grad + token * d, *of_gain = p.gradient + norm, dot = 0.0f;
        for (int64_t j = 0; j < d; ++j) {
            const float g = from[j] * factor;
            of_gain[j] += g * y[j];
            to[j] = g * m.norm[j];
            dot += to[j] * y[j];
        }
        const float mean = dot / static_cast<float>(d), over = inverse[token];
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
