// A training step of a Llama on processors that multiply bf16 (AMX, AVX-512): forward and backward in one call.
//
// What training/folded.py does with products of torch, for one or more pieces of one or more jobs. Frozen weights lie in
// memory as tiles from the start, factors of adapters from the start of a step; products of a token's state with weights
// and with its job's factors add up in the same tiles; layers are walked in chunks of tokens that stay in the cache. What
// comes of a token depends on its own row alone, and the gradient of a piece on its own rows, whatever lies beside it.
//
// Legend: N = tokens, D = model width, F = feed-forward width, H, K = query and key/value heads, d = head width,
// W = (H + 2K) d, R = rank, S = rank rounded up to a block, P = linear layers stacked in a site, I, O = inputs and
// outputs of a site, M = weighed positions, V = vocabulary, T = tokens of a row.

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__linux__)

#include "kernels.cpp"
#include "head.h"

extern "C" {

struct Piece {
    int64_t start, tokens;  // multiples of 32
    const float *flat;      // factors as TrainableLora.flat has them
    float *gradient;        // laid out as they are; added to
    const bf16 *packed;     // what tunesmith_pack_factors made of them
    int32_t rank, embedding_rank;
    float scale;
};

struct Pass {
    Work work;
    int64_t pieces;
    const Piece *piece;
};

}  // extern "C"

namespace {

constexpr int64_t HEAD_CHUNK = 256;  // positions that go through the head together

struct Step : Layers<Step> {
    static constexpr int64_t SPAN = CHUNK;

    const Pass &p;
    int64_t deep = 0, embedded = 0;  // of all pieces the most
    std::vector<Places> places;      // by pieces
    std::vector<int32_t> piece_of;   // by blocks of 32 tokens
    std::vector<int32_t> late_piece_of;  // by those of late ones
    std::vector<Panels> kept;            // by sites [P S, N or L]: what A gave
    float *low_in;
    std::optional<Head> head;
    Panels weights;                        // of a slice of the vocabulary
    Panels low, grad_low, grad_low_turned;  // of a chunk

    Step(const Model &model, const Pass &pass)
        : Layers(model, pass.work, starts_of(pass)), p(pass), piece_of(n / SIDE, 0) {
        for (int64_t i = 0; i < p.pieces; ++i) {
            const Piece &piece = p.piece[i];
            places.emplace_back(m, piece.rank, true);
            deep = rounded_up(piece.rank) > deep ? rounded_up(piece.rank) : deep;
            embedded = piece.embedding_rank > embedded ? piece.embedding_rank : embedded;
            for (int64_t at = piece.start; at < piece.start + piece.tokens; at += SIDE) piece_of[at / SIDE] = i;
        }
        for (int64_t at = 0; at < late; at += SIDE) late_piece_of.push_back(piece_of[token_of[at] / SIDE]);
        const int64_t chunk = n < CHUNK ? n : CHUNK;
        for (int64_t index = 0; index < 4 * m.layers; ++index)
            kept.push_back(arena.panels(site_at(index).parts * deep, tokens_of(index)));
        low_in = arena.take<float>(n * embedded);
        head.emplace(m, work, late_of.data(), HEAD_CHUNK, arena);
        weights = arena.panels(uneven(head->most_rows), Head::SLICE * SIDE);
        low = arena.panels(uneven(chunk), 3 * deep);
        grad_low = arena.panels(uneven(chunk), 3 * deep);
        grad_low_turned = arena.panels(3 * deep, chunk);
    }

    static std::vector<int64_t> starts_of(const Pass &pass) {
        std::vector<int64_t> starts;
        for (int64_t i = 0; i < pass.pieces; ++i) starts.push_back(pass.piece[i].start);
        return starts;
    }

    int32_t piece_at(int64_t index, int64_t token) const {
        return is_late(index) ? late_piece_of[token / SIDE] : piece_of[token / SIDE];
    }

    // -- products of a site, for `tokens` from token `first` on; panels given begin there

    // y = x W^T + (x A^T) B^T, its panels in the order of place(0), place(1), ...: write(panel, token, i, sums) is given
    // row i of each block. Keeps x A^T.
    template <typename Place, typename Write>
    void forward(int64_t index, Panels in, int64_t first, int64_t tokens, Place place, Write write) {
        const Site &site = site_at(index);
        for (int part = 0; part < site.parts; ++part)
            for (int64_t at = 0; at < tokens; at += SIDE) {
                const int32_t which = piece_at(index, first + at);
                const int64_t own = rounded_up(p.piece[which].rank);
                const bf16 *a = p.piece[which].packed + places[which].sites[index].a_forward + part * own * site.inputs;
                for (int64_t r = 0; r < own; r += SIDE) {
                    clear();
                    accumulate_part(true, p.piece[which].rank > r + SIDE / 2, in.block(0, at), in.step(),
                                    a + r * site.inputs, site.inputs / SIDE);
                    take_sums(c);
                    round_block(c, low.block((part * deep + r) / SIDE, at));
                    round_turned(c, p.piece[which].rank - r, kept[index].block((first + at) / SIDE, part * deep + r));
                }
            }
        const auto factors = [&](int64_t panel, int64_t at) {
            const int32_t which = piece_at(index, first + at);
            const int64_t own = rounded_up(p.piece[which].rank);
            int part = 0;
            for (; panel >= site.outputs[part] / SIDE; ++part) panel -= site.outputs[part] / SIDE;
            const bf16 *b = p.piece[which].packed + places[which].sites[index].b_forward[part];
            accumulate(low.block(part * deep / SIDE, at), low.step(), b + panel * SIDE * own, own / SIDE);
        };
        by_panels_written(in, site.forward, site.inputs / SIDE, outputs_of(site) / SIDE, tokens, partial, place, factors,
                          write);
    }

    // The gradient of the inputs, from that of the outputs, as `forward` gives what it finds; adds to those of
    // the factors.
    template <typename Write>
    void backward(int64_t index, Panels gy, Panels in, int64_t first, int64_t tokens, Write write) {
        const Site &site = site_at(index);
        const int64_t outputs = outputs_of(site);
        Panels of_part = gy;
        for (int part = 0; part < site.parts; of_part = of_part.panels(site.outputs[part++] / SIDE))
            for (int64_t at = 0; at < tokens; at += SIDE) {
                const int32_t which = piece_at(index, first + at);
                const int64_t own = rounded_up(p.piece[which].rank);
                const bf16 *b = p.piece[which].packed + places[which].sites[index].b_backward[part];
                for (int64_t r = 0; r < own; r += SIDE) {
                    clear();
                    accumulate_part(true, p.piece[which].rank > r + SIDE / 2, of_part.block(0, at), gy.step(),
                                    b + r * site.outputs[part], site.outputs[part] / SIDE);
                    take_sums(c);
                    round_block(c, grad_low.block((part * own + r) / SIDE, at));  // as deep as the piece has them
                    round_turned(c, p.piece[which].rank - r, grad_low_turned.block(at / SIDE, part * deep + r));
                }
            }
        const auto factors = [&](int64_t panel, int64_t at) {
            const int32_t which = piece_at(index, first + at);
            const int64_t all = site.parts * rounded_up(p.piece[which].rank);
            const bf16 *a = p.piece[which].packed + places[which].sites[index].a_backward;
            accumulate(grad_low.block(0, at), grad_low.step(), a + panel * SIDE * all, all / SIDE);
        };
        by_panels_written(gy, site.backward, outputs / SIDE, site.inputs / SIDE, tokens, partial, one_by_one, factors,
                          write);
        learn_factors(index, gy, in, first, tokens);
    }

    void learn(int64_t, Panels, Panels, int64_t) {}  // backward did

    // With the last piece that ends by `end`: numbers are added up in the order in which a piece is cut, so none is cut for
    // lying where it does. One that is longer than a span is, from its start on.
    int64_t end_of_span(int64_t index, int64_t first, int64_t end) const {
        for (int64_t at = end; at > first; at -= SIDE)
            if (at == tokens_of(index) || piece_at(index, at) != piece_at(index, at - SIDE)) return at;
        return end;
    }

    // Adds to the gradients of the factors, from that of the outputs and what `forward` and `backward` left.
    void learn_factors(int64_t index, Panels gy, Panels in, int64_t first, int64_t tokens) {
        for (int64_t from = 0, to; from < tokens; from = to) {
            const int32_t which = piece_at(index, first + from);
            for (to = from; to < tokens && piece_at(index, first + to) == which;) to += SIDE;
            learn_piece(index, which, gy.from(from), in.from(from), kept[index].panels((first + from) / SIDE),
                        grad_low_turned.panels(from / SIDE), (to - from) / SIDE);
        }
    }

    void learn_piece(int64_t index, int32_t which, Panels gy, Panels in, Panels forth, Panels back, int64_t steps) {
        const Site &site = site_at(index);
        const Piece &piece = p.piece[which];
        const Place &place = places[which].sites[index];
        const int64_t rank = piece.rank;
        alignas(64) bf16 panel[CHUNK * SIDE];
        float *of_a = piece.gradient + place.a, *of_b = piece.gradient + place.b;
        int64_t column = 0;
        for (int part = 0; part < site.parts; ++part)
            for (int64_t end = column + site.outputs[part]; column < end; column += SIDE) {
                for (int64_t s = 0; s < steps; ++s) pack_rows_mixed(gy.block(column / SIDE, s * SIDE), panel + s * BLOCK);
                for (int64_t r = 0; r < rank; r += SIDE) {
                    clear();
                    accumulate_part(rank > r + SIDE / 2, true, forth.block(0, part * deep + r), forth.step(), panel, steps);
                    take_sums(c);
                    add_turned(of_b + column * rank + r, rank, rank - r, piece.scale);
                }
            }
        for (int64_t i = 0; i < site.inputs; i += SIDE) {
            for (int64_t s = 0; s < steps; ++s) pack_rows_mixed(in.block(i / SIDE, s * SIDE), panel + s * BLOCK);
            for (int part = 0; part < site.parts; ++part)
                for (int64_t r = 0; r < rank; r += SIDE) {
                    clear();
                    accumulate_part(rank > r + SIDE / 2, true, back.block(0, part * deep + r), back.step(), panel, steps);
                    take_sums(c);
                    const int64_t real = rank - r < SIDE ? rank - r : SIDE;
                    for (int64_t k = 0; k < real; ++k)
                        add_row(of_a + (part * rank + r + k) * site.inputs + i, c + k * SIDE,
                                site.gain ? site.gain + i : nullptr);
                }
        }
    }

    static void add_row(float *to, const float *mixed, const float *gain) {
        for (int64_t half = 0; half < SIDE; half += 16) {
            const __m512 factor = gain ? _mm512_loadu_ps(gain + half) : _mm512_set1_ps(1.0f);
            _mm512_storeu_ps(to + half, _mm512_fmadd_ps(ordered(mixed, half), factor, _mm512_loadu_ps(to + half)));
        }
    }

    // Adds the sums, their columns mixed, to 32 rows of `to`, rows and columns exchanged, in the first `real` columns.
    void add_turned(float *to, int64_t stride, int64_t real, float scale) {
        for (int64_t top = 0; top < SIDE && top < real; top += 16)
            for (int64_t left = 0; left < SIDE; left += 16) {
                __m512i words[16];
                turned_quarter(c, top, left, words);
                const __mmask16 there = first_of_16(real - top);
                for (int64_t i = 0; i < 16; ++i) {
                    float *at = to + column_of(left + i) * stride + top;
                    const __m512 before = _mm512_maskz_loadu_ps(there, at);
                    _mm512_mask_storeu_ps(
                        at, there, _mm512_fmadd_ps(_mm512_castsi512_ps(words[i]), _mm512_set1_ps(scale), before));
                }
            }
    }

    // -- both ends

    void embed() {
        for (int64_t which = 0; which < p.pieces; ++which) {
            const Piece &piece = p.piece[which];
            const int64_t rank = piece.embedding_rank;
            const float *a = piece.flat + places[which].flat, *b = a + m.vocabulary * rank;
            for (int64_t at = piece.start; at < piece.start + piece.tokens; ++at) {
                const int64_t id = work.token_ids[at];
                float *to = x + at * m.width, *in = low_in + at * embedded;
                std::memcpy(to, m.embedding + id * m.width, sizeof(float) * m.width);
                for (int64_t r = 0; r < rank; ++r) in[r] = a[id * rank + r] * piece.scale;
                for (int64_t j = 0; j < m.width && rank; ++j) {
                    float sum = 0.0f;
                    for (int64_t r = 0; r < rank; ++r) sum += in[r] * b[j * rank + r];
                    to[j] += sum;
                }
            }
        }
    }

    void embed_backward() {
        for (int64_t which = 0; which < p.pieces; ++which) {
            const Piece &piece = p.piece[which];
            const int64_t rank = piece.embedding_rank;
            const float *b = piece.flat + places[which].flat + m.vocabulary * rank;
            float *of_a = piece.gradient + places[which].flat, *of_b = of_a + m.vocabulary * rank;
            for (int64_t at = piece.start; at < piece.start + piece.tokens && rank; ++at) {
                const float *g = grad + at * m.width, *in = low_in + at * embedded;
                float *to = of_a + work.token_ids[at] * rank;
                for (int64_t j = 0; j < m.width; ++j) {
                    const float value = g[j], scaled = value * piece.scale;
                    for (int64_t r = 0; r < rank; ++r) of_b[j * rank + r] += value * in[r];
                    for (int64_t r = 0; r < rank; ++r) to[r] += scaled * b[j * rank + r];
                }
            }
        }
    }

    // The loss of all positions, and its gradient up to the input of the last norm.
    void score() {
        for (int64_t first = 0; first < work.positions; first += HEAD_CHUNK) {
            const int64_t real = work.positions - first < HEAD_CHUNK ? work.positions - first : HEAD_CHUNK;
            const int64_t rows = rounded_up(real);
            head->take(x, first, real, rows);
            do
                head->by_slices([&](int64_t panel, int64_t count) {
                    head->weigh(panel, count, rows, weights);
                    head->leave(weights, panel, count, 0, rows);
                });
            while (head->again(rows));
            for (int64_t i = 0; i < real; ++i) leave_head(i, first + i, head->score(i, first + i));
        }
    }

    // From what the head gave back for one position, weight (p W - W_target) through the last norm, into grad.
    void leave_head(int64_t row, int64_t position, float factor) {
        const int64_t d = m.width, at = late_of[work.predicting[position]];
        const float *wanted = m.head + work.target[position] * d, *y = x + at * d, weight = work.weight[position];
        const float *given = head->grad_states + row * d;
        float *to = grad + at * d, dot = 0.0f;
        for (int64_t j = 0; j < d; ++j) {
            to[j] = (given[j] * factor - wanted[j] * weight) * m.norm[j];
            dot += to[j] * y[j];
        }
        const float mean = dot / static_cast<float>(d), over = inverse[at];
        for (int64_t j = 0; j < d; ++j) to[j] = (to[j] - y[j] * mean) * over;
    }
};

}  // namespace

extern "C" {

// How many bytes of memory a pass needs; its `memory` is null.
int64_t tunesmith_step_memory(const Model *model, const Pass *pass) { return Step(*model, *pass).arena.used; }

void tunesmith_step(const Model *model, const Pass *pass) { Step(*model, *pass).run(); }

}  // extern "C"

#else

#include "kernels.cpp"

extern "C" bool tunesmith_tiles() { return false; }

#endif
