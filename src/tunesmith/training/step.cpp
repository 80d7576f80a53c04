// A training step of a Llama on processors that multiply tiles of bf16 (AMX): forward and backward in one call.
//
// What training/folded.py does with products of torch, for one or more pieces of one or more jobs. Frozen weights lie in
// memory as tiles from the start, factors of adapters from the start of a step; products of a token's state with weights
// and with its job's factors add up in the same tiles; layers are walked in chunks of tokens that stay in the cache. What
// comes of a token depends on its own row alone, and the gradient of a piece on its own rows, whatever lies beside it.
//
// Legend: N = tokens, D = model width, F = feed-forward width, H, K = query and key/value heads, d = head width,
// W = (H + 2K) d, R = rank, S = rank rounded up to a block, P = linear layers stacked in a site, I, O = inputs and
// outputs of a site, M = weighed positions, V = vocabulary, T = tokens of a row.

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <optional>
#include <vector>

#include "attention.h"
#include "kernels.cpp"

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
    int64_t tokens, rows, positions, pieces;
    const int64_t *token_ids;                  // [N]
    const int64_t *row_start, *row_length;     // [rows]
    const int64_t *predicting, *target;        // [M]
    const float *weight;                       // [M]
    const Piece *piece;
    float *nll;   // out: [M]
    bool *right;  // out: [M]
    uint8_t *memory;
};

}  // extern "C"

namespace {

constexpr int64_t CHUNK = 256;       // tokens that go through products together: their states stay in the cache
constexpr int64_t HEAD_CHUNK = 128;  // positions whose logits are held at once

// What the way back of a layer needs.
struct Saved {
    Panels normed, qkv, attention, feed_normed, gate_up;  // [N, D], [N, W] turned, [N, H d], [N, D], [N, 2F]
    Panels low[4];                                        // [P S, N]: what A gave, by sites
    float *inverse, *feed_inverse;                        // [N]
    Softmax softmax;
};

struct Step {
    const Model &m;
    const Pass &p;
    const int64_t n, wide, mixed;
    int64_t longest = 0, deep = 0, embedded = 0, used = 0;  // deep, embedded: of all pieces the most
    std::vector<Places> places;     // by pieces
    std::vector<int32_t> piece_of;  // by blocks of 32 tokens
    std::vector<int32_t> turn_of;   // by tokens: its place in its row, or -1
    std::vector<Saved> saved;
    std::optional<Attention> attention;
    float *x, *grad, *inverse, *grad_states, *low_in, *partial;  // x: [N, D], grad: of x
    Panels out, states, logits;                              // out: grad in bf16
    Panels low, grad_low, grad_low_turned, product, grad_wide, grad_normed;  // of a chunk
    Panels grad_mixed;
    alignas(64) float c[BLOCK];

    Step(const Model &model, const Pass &pass)
        : m(model), p(pass), n(pass.tokens), wide((m.heads + 2 * m.kv_heads) * m.head_width),
          mixed(m.heads * m.head_width), piece_of(n / SIDE, 0), turn_of(n, -1) {
        for (int64_t row = 0; row < p.rows; ++row) {
            longest = p.row_length[row] > longest ? p.row_length[row] : longest;
            for (int64_t t = 0; t < p.row_length[row]; ++t) turn_of[p.row_start[row] + t] = t;
        }
        for (int64_t i = 0; i < p.pieces; ++i) {
            const Piece &piece = p.piece[i];
            places.emplace_back(m, piece.rank, true);
            deep = rounded_up(piece.rank) > deep ? rounded_up(piece.rank) : deep;
            embedded = piece.embedding_rank > embedded ? piece.embedding_rank : embedded;
            for (int64_t at = piece.start; at < piece.start + piece.tokens; at += SIDE) piece_of[at / SIDE] = i;
        }
        lay_out();
    }

    // Rows of panels that are read side by side: an odd number of blocks, so that their lines do not all compete for the
    // same half of the places of the cache.
    static int64_t uneven(int64_t rows) { return rows | SIDE; }

    void lay_out() {
        Arena arena{p.memory};
        const int64_t slack = n + SIDE;  // attention reads beyond a row
        const int64_t chunk = n < CHUNK ? n : CHUNK, weighed = rounded_up(p.positions);
        const int64_t head_chunk = weighed < HEAD_CHUNK ? weighed : HEAD_CHUNK;
        for (int64_t i = 0; i < m.layers; ++i) {
            Saved s{};
            s.normed = arena.panels(uneven(n), m.width);
            s.qkv = arena.panels(uneven(slack), wide);
            s.attention = arena.panels(uneven(n), mixed);
            s.feed_normed = arena.panels(uneven(n), m.width);
            s.gate_up = arena.panels(uneven(n), 2 * m.feed_width);
            for (int site = 0; site < 4; ++site) s.low[site] = arena.panels(m.layer[i].sites[site].parts * deep, n);
            s.inverse = arena.take<float>(n);
            s.feed_inverse = arena.take<float>(n);
            s.softmax = {arena.take<float>(n * m.heads), arena.take<float>(n * m.heads), n};
            saved.push_back(s);
        }
        x = arena.take<float>(n * m.width);
        grad = arena.take<float>(n * m.width);
        inverse = arena.take<float>(n);
        grad_states = arena.take<float>(HEAD_CHUNK * m.width);
        low_in = arena.take<float>(n * embedded);
        partial = arena.take<float>(CHUNK * SIDE);
        out = arena.panels(uneven(n), m.width);
        states = arena.panels(uneven(head_chunk), m.width);
        logits = arena.panels(uneven(head_chunk), rounded_up(m.vocabulary));
        low = arena.panels(uneven(chunk), 3 * deep);
        grad_low = arena.panels(uneven(chunk), 3 * deep);
        grad_low_turned = arena.panels(3 * deep, chunk);
        product = arena.panels(uneven(chunk), m.feed_width);
        grad_wide = arena.panels(uneven(chunk), 2 * m.feed_width);
        grad_normed = arena.panels(uneven(chunk), m.width);
        grad_mixed = arena.panels(uneven(slack), mixed);
        attention.emplace(m, longest, arena);
        used = arena.used;
    }

    // -- products of a site, for `tokens` from token `first` on; panels given begin there

    const Site &site_at(int64_t index) const { return m.layer[index / 4].sites[index % 4]; }

    // y = x W^T + (x A^T) B^T, its panels in the order of place(0), place(1), ...: write(panel, token, i, sums) is given
    // row i of each block. Keeps x A^T in `kept`.
    template <typename Place, typename Write>
    void forward(int64_t index, Panels in, Panels kept, int64_t first, int64_t tokens, Place place, Write write) {
        const Site &site = site_at(index);
        for (int part = 0; part < site.parts; ++part)
            for (int64_t at = 0; at < tokens; at += SIDE) {
                const int32_t which = piece_of[(first + at) / SIDE];
                const int64_t own = rounded_up(p.piece[which].rank);
                const bf16 *a = p.piece[which].packed + places[which].sites[index].a_forward + part * own * site.inputs;
                for (int64_t r = 0; r < own; r += SIDE) {
                    clear();
                    accumulate_part(true, p.piece[which].rank > r + SIDE / 2, in.block(0, at), in.step(),
                                    a + r * site.inputs, site.inputs / SIDE);
                    take_sums(c);
                    round_block(c, low.block((part * deep + r) / SIDE, at));
                    round_turned(c, kept.block((first + at) / SIDE, part * deep + r));
                }
            }
        const auto factors = [&](int64_t panel, int64_t at) {
            const int32_t which = piece_of[(first + at) / SIDE];
            const int64_t own = rounded_up(p.piece[which].rank);
            int part = 0;
            for (; panel >= site.outputs[part] / SIDE; ++part) panel -= site.outputs[part] / SIDE;
            const bf16 *b = p.piece[which].packed + places[which].sites[index].b_forward[part];
            accumulate(low.block(part * deep / SIDE, at), low.step(), b + panel * SIDE * own, own / SIDE);
        };
        by_panels_written(in, site.forward, site.inputs / SIDE, outputs_of(site) / SIDE, tokens, partial, place, factors,
                          write);
    }

    // The gradient of the inputs, from that of the outputs, as `forward` gives what it finds; leaves that of x A^T in
    // grad_low_turned, for `learn`.
    template <typename Write>
    void backward(int64_t index, Panels gy, int64_t first, int64_t tokens, Write write) {
        const Site &site = site_at(index);
        const int64_t outputs = outputs_of(site);
        Panels of_part = gy;
        for (int part = 0; part < site.parts; of_part = of_part.panels(site.outputs[part++] / SIDE))
            for (int64_t at = 0; at < tokens; at += SIDE) {
                const int32_t which = piece_of[(first + at) / SIDE];
                const int64_t own = rounded_up(p.piece[which].rank);
                const bf16 *b = p.piece[which].packed + places[which].sites[index].b_backward[part];
                for (int64_t r = 0; r < own; r += SIDE) {
                    clear();
                    accumulate_part(true, p.piece[which].rank > r + SIDE / 2, of_part.block(0, at), gy.step(),
                                    b + r * site.outputs[part], site.outputs[part] / SIDE);
                    take_sums(c);
                    round_block(c, grad_low.block((part * own + r) / SIDE, at));  // as deep as the piece has them
                    round_turned(c, grad_low_turned.block(at / SIDE, part * deep + r));
                }
            }
        const auto factors = [&](int64_t panel, int64_t at) {
            const int32_t which = piece_of[(first + at) / SIDE];
            const int64_t all = site.parts * rounded_up(p.piece[which].rank);
            const bf16 *a = p.piece[which].packed + places[which].sites[index].a_backward;
            accumulate(grad_low.block(0, at), grad_low.step(), a + panel * SIDE * all, all / SIDE);
        };
        by_panels_written(gy, site.backward, outputs / SIDE, site.inputs / SIDE, tokens, partial, one_by_one, factors,
                          write);
    }

    static int64_t one_by_one(int64_t panel) { return panel; }

    // What puts blocks into panels.
    static auto into(Panels to) {
        return [to](int64_t panel, int64_t at, int64_t i, const float *sums) {
            store_32(to.block(panel, at + i), _mm512_load_ps(sums), _mm512_load_ps(sums + 16));
        };
    }

    // Adds to the gradients of the factors, from that of the outputs and what `forward` and `backward` left.
    void learn(int64_t index, Panels gy, Panels in, Panels kept, int64_t first, int64_t tokens) {
        for (int64_t from = 0, to; from < tokens; from = to) {
            const int32_t which = piece_of[(first + from) / SIDE];
            for (to = from; to < tokens && piece_of[(first + to) / SIDE] == which;) to += SIDE;
            learn_piece(index, which, gy.from(from), in.from(from), kept.panels((first + from) / SIDE),
                        grad_low_turned.panels(from / SIDE), (to - from) / SIDE);
        }
    }

    void learn_piece(int64_t index, int32_t which, Panels gy, Panels in, Panels kept, Panels back, int64_t steps) {
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
                    accumulate_part(rank > r + SIDE / 2, true, kept.block(0, part * deep + r), kept.step(), panel, steps);
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

    // -- what stands between products

    // Through `normalise`, grad += (dy - y mean(dy y)) * inverse; the sum in bf16 comes into `out`.
    void leave_norm(Panels dy, Panels y, const float *inverses, int64_t first, int64_t tokens) {
        const int64_t d = m.width;
        for (int64_t i = 0; i < tokens; ++i) {
            float *row = grad + (first + i) * d;
            __m512 along[2] = {};
            for (int64_t j = 0; j < d; j += SIDE) {
                const bf16 *g = dy.block(j / SIDE, i), *v = y.block(j / SIDE, i);
                along[0] = _mm512_fmadd_ps(load_low(g), load_low(v), along[0]);
                along[1] = _mm512_fmadd_ps(load_low(g + 16), load_low(v + 16), along[1]);
            }
            const __m512 mean = _mm512_set1_ps(sum(_mm512_add_ps(along[0], along[1])) / static_cast<float>(d));
            const __m512 factor = _mm512_set1_ps(inverses[first + i]);
            for (int64_t j = 0; j < d; j += SIDE) {
                __m512 value[2];
                for (int64_t half = 0; half < 2; ++half) {
                    float *to = row + j + 16 * half;
                    const __m512 g = load_low(dy.block(j / SIDE, i) + 16 * half);
                    const __m512 v = load_low(y.block(j / SIDE, i) + 16 * half);
                    value[half] = _mm512_fmadd_ps(_mm512_fnmadd_ps(v, mean, g), factor, _mm512_loadu_ps(to));
                    _mm512_storeu_ps(to, value[half]);
                }
                store_32(out.block(j / SIDE, first + i), value[0], value[1]);
            }
        }
    }

    // What takes the gradient of gate's product: gives that of gate and up, and the product again.
    auto into_gate(Panels gate_up) {
        return [this, gate_up, one = _mm512_set1_ps(1.0f)](int64_t panel, int64_t at, int64_t i, const float *sums) {
            const int64_t up_panel = panel + m.feed_width / SIDE;
            __m512 again[2], of_gate[2], of_up[2];
            for (int64_t half = 0; half < 2; ++half) {
                const __m512 value = load_low(gate_up.block(panel, at + i) + 16 * half);
                const __m512 other = load_low(gate_up.block(up_panel, at + i) + 16 * half);
                const __m512 given = _mm512_load_ps(sums + 16 * half), share = sigmoid(value);
                const __m512 swish = _mm512_mul_ps(value, share);
                const __m512 slope = _mm512_fmadd_ps(swish, _mm512_sub_ps(one, share), share);
                again[half] = _mm512_mul_ps(swish, other);
                of_up[half] = _mm512_mul_ps(given, swish);
                of_gate[half] = _mm512_mul_ps(_mm512_mul_ps(given, other), slope);
            }
            store_32(product.block(panel, at + i), again[0], again[1]);
            store_32(grad_wide.block(panel, at + i), of_gate[0], of_gate[1]);
            store_32(grad_wide.block(up_panel, at + i), of_up[0], of_up[1]);
        };
    }

    // What adds blocks to rows of x from token `first` on.
    auto onto_x(int64_t first) {
        return [this, first](int64_t panel, int64_t at, int64_t i, const float *sums) {
            float *to = x + (first + at + i) * m.width + panel * SIDE;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(sums)));
            _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), _mm512_load_ps(sums + 16)));
        };
    }

    // gate and up side by side, so that their product can be written with them.
    void feed(int64_t layer, Panels in, Panels gate_up, Panels kept, int64_t first, int64_t tokens) {
        const int64_t half = m.feed_width / SIDE;
        const auto place = [half](int64_t walked) { return walked / 2 + walked % 2 * half; };
        forward(4 * layer + 2, in, kept, first, tokens, place,
                [&, write = into(gate_up)](int64_t panel, int64_t at, int64_t i, const float *sums) {
                    write(panel, at, i, sums);
                    if (panel < half) return;
                    const bf16 *g = gate_up.block(panel - half, at + i), *up = gate_up.block(panel, at + i);
                    store_32(product.block(panel - half, at + i), gated(load_low(g), load_low(up)),
                             gated(load_low(g + 16), load_low(up + 16)));
                });
    }

    // -- layers

    template <typename Work>
    void by_chunks(Work work) {
        for (int64_t first = 0; first < n; first += CHUNK) work(first, first + CHUNK < n ? CHUNK : n - first);
    }

    void forward_layer(int64_t layer) {
        Saved &s = saved[layer];
        by_chunks([&](int64_t first, int64_t tokens) {
            const Panels normed = s.normed.from(first);
            normalise(m, x + first * m.width, nullptr, normed, s.inverse + first, tokens);
            forward(4 * layer, normed, s.low[0], first, tokens, one_by_one, into(s.qkv.from(first)));
            turn(m, s.qkv.from(first), m.layer[layer].bias, turn_of.data() + first, tokens);
        });
        std::memset(s.attention.data, 0, sizeof(bf16) * s.attention.rows * mixed);
        for (int64_t row = 0; row < p.rows; ++row) {
            const int64_t start = p.row_start[row];
            attention->forward(s.qkv.from(start), s.attention.from(start), s.softmax.from(start), p.row_length[row]);
        }
        by_chunks([&](int64_t first, int64_t tokens) {
            const Panels normed = s.feed_normed.from(first);
            forward(4 * layer + 1, s.attention.from(first), s.low[1], first, tokens, one_by_one, onto_x(first));
            normalise(m, x + first * m.width, nullptr, normed, s.feed_inverse + first, tokens);
            feed(layer, normed, s.gate_up.from(first), s.low[2], first, tokens);
            forward(4 * layer + 3, product, s.low[3], first, tokens, one_by_one, onto_x(first));
        });
    }

    // grad, and `out`, the same in bf16: the gradient of the layer's output becomes that of its input.
    void backward_layer(int64_t layer) {
        Saved &s = saved[layer];
        by_chunks([&](int64_t first, int64_t tokens) {
            const Panels of_out = out.from(first), normed = s.feed_normed.from(first);
            backward(4 * layer + 3, of_out, first, tokens, into_gate(s.gate_up.from(first)));
            learn(4 * layer + 3, of_out, product, s.low[3], first, tokens);
            backward(4 * layer + 2, grad_wide, first, tokens, into(grad_normed));
            learn(4 * layer + 2, grad_wide, normed, s.low[2], first, tokens);
            leave_norm(grad_normed, normed, s.feed_inverse, first, tokens);
            backward(4 * layer + 1, of_out, first, tokens, into(grad_mixed.from(first)));
            learn(4 * layer + 1, of_out, s.attention.from(first), s.low[1], first, tokens);
        });
        const Panels grad_qkv = s.gate_up;  // no longer needed, and large enough: see covers() in step.py
        std::memset(grad_qkv.data, 0, sizeof(bf16) * grad_qkv.rows * wide);
        for (int64_t row = 0; row < p.rows; ++row) {
            const int64_t start = p.row_start[row];
            attention->backward(s.qkv.from(start), s.attention.from(start), grad_mixed.from(start), s.softmax.from(start),
                                p.row_length[row], grad_qkv.from(start));
        }
        by_chunks([&](int64_t first, int64_t tokens) {
            const Panels of_qkv = grad_qkv.from(first), normed = s.normed.from(first);
            backward(4 * layer, of_qkv, first, tokens, into(grad_normed));
            learn(4 * layer, of_qkv, normed, s.low[0], first, tokens);
            leave_norm(grad_normed, normed, s.inverse, first, tokens);
        });
    }

    // -- both ends

    void embed() {
        for (int64_t which = 0; which < p.pieces; ++which) {
            const Piece &piece = p.piece[which];
            const int64_t rank = piece.embedding_rank;
            const float *a = piece.flat + places[which].flat, *b = a + m.vocabulary * rank;
            for (int64_t at = piece.start; at < piece.start + piece.tokens; ++at) {
                const int64_t id = p.token_ids[at];
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
                float *to = of_a + p.token_ids[at] * rank;
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
        const int64_t d = m.width, panels = rounded_up(m.vocabulary) / SIDE;
        for (int64_t i = 0; i < n; ++i) finish(i);
        std::memset(grad, 0, sizeof(float) * n * d);
        for (int64_t first = 0; first < p.positions; first += HEAD_CHUNK) {
            const int64_t real = p.positions - first < HEAD_CHUNK ? p.positions - first : HEAD_CHUNK;
            const int64_t rows = rounded_up(real);
            float factor[HEAD_CHUNK];
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < d; j += 16) {
                    __m512 value = _mm512_setzero_ps();
                    if (i < real)
                        value = _mm512_mul_ps(_mm512_loadu_ps(x + p.predicting[first + i] * d + j),
                                              _mm512_loadu_ps(m.norm + j));
                    store_16(states.block(j / SIDE, i) + j % SIDE, value);
                }
            by_panels(states, m.head_forward, d / SIDE, panels, rows, partial, [&](int64_t panel, int64_t at) {
                take_sums(c);
                round_block(c, logits.block(panel, at));
            });
            for (int64_t i = 0; i < real; ++i) factor[i] = weigh_tokens(i, first + i);
            by_panels(logits, m.head_backward, panels, d / SIDE, rows, partial, [&](int64_t panel, int64_t at) {
                take_sums(grad_states + (panel * HEAD_CHUNK + at) * SIDE);
            });
            for (int64_t i = 0; i < real; ++i) leave_head(i, first + i, factor[i]);
        }
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < d; j += 16)
                store_16(out.block(j / SIDE, i) + j % SIDE, _mm512_loadu_ps(grad + i * d + j));
    }

    // x of a token after the last norm, but for its gain.
    void finish(int64_t token) {
        float *row = x + token * m.width;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t j = 0; j < m.width; j += 16) {
            const __m512 value = _mm512_loadu_ps(row + j);
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        inverse[token] = root_of_inverse(sum(squares) / static_cast<float>(m.width) + m.epsilon);
        for (int64_t j = 0; j < m.width; ++j) row[j] *= inverse[token];
    }

    // Logits of a position become e^(logit - largest); returns the weight of the position over their sum.
    float weigh_tokens(int64_t row, int64_t position) {
        const int64_t v = m.vocabulary, target = p.target[position];
        const __m512 lowest = _mm512_set1_ps(-__builtin_huge_valf());
        __m512 most = lowest, total = _mm512_setzero_ps();
        for (int64_t j = 0; j < v; j += 16)
            most = _mm512_max_ps(most, _mm512_mask_mov_ps(lowest, first_of_16(v - j),
                                                          load_low(logits.block(j / SIDE, row) + j % SIDE)));
        const float largest = _mm512_reduce_max_ps(most), wanted = load(logits.block(target / SIDE, row)[target % SIDE]);
        for (int64_t j = 0; j < rounded_up(v); j += 16) {
            bf16 *at = logits.block(j / SIDE, row) + j % SIDE;
            const __m512 value = exponential(_mm512_sub_ps(load_low(at), _mm512_set1_ps(largest)));
            const __m512 there = _mm512_maskz_mov_ps(first_of_16(v - j), value);
            total = _mm512_add_ps(total, there);
            store_16(at, there);
        }
        const float all = sum(total);
        p.nll[position] = std::log(all) + largest - wanted;
        p.right[position] = wanted == largest;
        return p.weight[position] / all;
    }

    // From what the head gave back for one position, weight (p W - W_target) through the last norm, into grad.
    void leave_head(int64_t row, int64_t position, float factor) {
        const int64_t d = m.width, token = p.predicting[position];
        const float *head = m.head + p.target[position] * d, *y = x + token * d, weight = p.weight[position];
        float *to = grad + token * d, dot = 0.0f;
        for (int64_t j = 0; j < d; ++j) {
            const float g = grad_states[(j / SIDE * HEAD_CHUNK + row) * SIDE + j % SIDE];
            to[j] = (g * factor - head[j] * weight) * m.norm[j];
            dot += to[j] * y[j];
        }
        const float mean = dot / static_cast<float>(d), over = inverse[token];
        for (int64_t j = 0; j < d; ++j) to[j] = (to[j] - y[j] * mean) * over;
    }

    void run() {
        configure_tiles();
        embed();
        for (int64_t layer = 0; layer < m.layers; ++layer) forward_layer(layer);
        score();
        for (int64_t layer = m.layers; layer-- > 0;) backward_layer(layer);
        embed_backward();
        _tile_release();
    }
};

}  // namespace

extern "C" {

// How many bytes of memory a pass needs; its `memory` is null.
int64_t tunesmith_step_memory(const Model *model, const Pass *pass) { return Step(*model, *pass).used; }

void tunesmith_step(const Model *model, const Pass *pass) { Step(*model, *pass).run(); }

}  // extern "C"

#else

#include "kernels.cpp"

extern "C" bool tunesmith_tiles() { return false; }

#endif
