// A step of the engine on processors that multiply bf16 (AMX, AVX-512): the next tokens of any sequences, whole prompts and
// single tokens alike, through a model of the Llama family and each its own adapter, in one call. Keys and values lie in the
// cache as tiles. What comes of a token depends on its own sequence alone, whatever lies beside it in the step. The weights
// of the model are bf16, or 8 bits (int8.h); adapters have 8 bits (factors.h), all else is bf16 either way.
//
// Behind its attention the last layer is computed for the tokens whose states are wanted: others are of no use from there on.
//
// Legend: N = tokens, rounded up, L = those wanted, D = model width, F = feed-forward width, H, K = query and key/value heads, G = H / K,
// d = head width, W = (H + 2K) d, R = rank, S = rank rounded up to a block, P = linear layers stacked in a site,
// V = vocabulary.

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__linux__)

#include <vector>

#include "factors.h"
#include "products.h"

extern "C" {

struct Adapter {
    const uint8_t *packed;                        // see factors.h
    const float *embedding_a, *embedding_b;       // [V, R] and [D, R], or null
    int32_t rank;
    float scale;
};

struct Span {  // tokens of one sequence
    int64_t start, tokens;  // which of the step, and how many
    int64_t position;       // of the first in its sequence
    int64_t wanted;         // of the last so many the states are
    const int32_t *blocks;  // where the sequence keeps keys and values
    const Adapter *adapter;  // null for the base itself
};

struct Work {
    int64_t tokens, spans;  // tokens: a multiple of 32
    bool eight;             // the weights of the model are of 8 bits
    const int64_t *token_ids;
    const Span *span;
    bf16 *const *keys, *const *values;  // by layers: [blocks, K, 32 d], each a packed block of 32 positions
    float *hidden;                      // out: [L, D], after the last norm
};

}  // extern "C"

namespace {

// The tokens of one adapter within a block of 32.
struct Share {
    const Adapter *adapter;
    const Factors *factors;
    int64_t first, end;
    int64_t ahead = 8 * TILE_BYTES;  // from these factors to those that are read next
};

using Shares = std::vector<std::vector<Share>>;  // by blocks of tokens

struct Step {
    const Model &m;
    const Work &w;
    const int64_t n, wide, mixed, head_panels, group;
    int64_t live = 0, late = 0, deep = 0, context = 0;
    std::vector<Factors> factors;             // of each rank there is
    Shares all_shares, late_shares;           // of all tokens, and of those wanted
    std::vector<int32_t> place_of;            // by tokens: position in the sequence, or -1
    float *x, *scores, *sums;                 // sums: what adapters add to those of single tokens
    bool alone_at[CHUNK];                     // which tokens those are
    Scratch scratch;
    Panels normed, qkv, attention, out, gate_up, product;
    uint8_t *low;
    bf16 *queries, *weights;
    int64_t low_block;                        // bytes of what A gives one share
    float *lowered;                           // what A gives, as floats
    Fine rounded;                             // and a single token in 8 bits
    alignas(64) float c[BLOCK];

    Step(const Model &model, const Work &work)
        : m(model), w(work), n(work.tokens), wide((m.heads + 2 * m.kv_heads) * m.head_width),
          mixed(m.heads * m.head_width), head_panels(m.head_width / SIDE), group(m.heads / m.kv_heads),
          all_shares(n / SIDE), place_of(n, -1) {
        factors.reserve(w.spans);
        for (int64_t i = 0; i < w.spans; ++i) late += w.span[i].wanted;
        late_shares.resize(rounded_up(late) / SIDE);
        int64_t late_start = 0;
        for (int64_t i = 0; i < w.spans; ++i) {
            const Span &span = w.span[i];
            const int64_t end = span.position + span.tokens;
            live = span.start + span.tokens;
            context = end > context ? end : context;
            for (int64_t t = 0; t < span.tokens; ++t) place_of[span.start + t] = span.position + t;
            late_start += span.wanted;
            if (!span.adapter) continue;
            const int32_t rank = span.adapter->rank;
            size_t known = 0;
            while (known < factors.size() && factors[known].rank != rank) ++known;
            if (known == factors.size()) factors.emplace_back(m, rank);
            deep = rounded_up(rank) > deep ? rounded_up(rank) : deep;
            add_shares(span.adapter, &factors[known], span.start, span.start + span.tokens, all_shares);
            add_shares(span.adapter, &factors[known], late_start - span.wanted, late_start, late_shares);
        }
        for (Shares *shares : {&all_shares, &late_shares}) {
            Share *before = nullptr;
            for (auto &block : *shares)
                for (Share &share : block) {
                    if (before) before->ahead = share.adapter->packed - before->adapter->packed;
                    before = &share;
                }
        }
        low_block = 3 * 2 * (SIDE * rounded_deep(deep) + 2 * SIDE * 4);
        static thread_local std::vector<uint8_t> memory;  // kept: new memory has to be cleared by the system
        const size_t size = lay_out(nullptr) + 64;
        if (memory.size() < size) memory.resize(size);
        lay_out(reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64));
    }

    static void add_shares(const Adapter *adapter, const Factors *factors, int64_t start, int64_t stop, Shares &to) {
        for (int64_t at = start, end; at < stop; at = end) {
            end = (at / SIDE + 1) * SIDE < stop ? (at / SIDE + 1) * SIDE : stop;
            add_share({adapter, factors, at % SIDE, (end - 1) % SIDE + 1}, to[at / SIDE]);
        }
    }

    // Neighbours of one adapter go together.
    static void add_share(Share share, std::vector<Share> &to) {
        if (!to.empty() && to.back().adapter == share.adapter && to.back().end == share.first)
            to.back().end = share.end;
        else
            to.push_back(share);
    }

    int64_t lay_out(uint8_t *base) {
        Arena arena{base};
        const int64_t blocks = rounded_up(context) / SIDE;
        const int64_t inner = wide > 2 * m.feed_width ? wide : 2 * m.feed_width, widest = inner > m.width ? inner : m.width;
        size_t most = 0;
        for (const Shares *shares : {&all_shares, &late_shares})
            for (const auto &each : *shares) most = each.size() > most ? each.size() : most;
        x = arena.take<float>(n * m.width);
        scores = arena.take<float>(blocks * BLOCK);
        sums = arena.take<float>((n < CHUNK ? n : CHUNK) * widest);
        scratch = take_scratch(arena, widest);
        lowered = arena.take<float>(SIDE * 3 * deep);
        rounded = take_fine(arena, 1, deep);
        normed = arena.panels(CHUNK, m.width);
        qkv = arena.panels(n, wide);
        attention = arena.panels(n, mixed);
        out = arena.panels(n, m.width);
        gate_up = arena.panels(CHUNK, 2 * m.feed_width);
        product = arena.panels(CHUNK, m.feed_width);
        low = arena.take<uint8_t>(CHUNK / SIDE * most * low_block);
        queries = arena.take<bf16>(head_panels * BLOCK);
        weights = arena.take<bf16>(blocks * BLOCK);
        return arena.used;
    }

    void embed() {
        std::memset(x, 0, sizeof(float) * n * m.width);
        for (int64_t i = 0; i < w.spans; ++i) {
            const Span &span = w.span[i];
            const Adapter *adapter = span.adapter;
            for (int64_t at = span.start; at < span.start + span.tokens; ++at) {
                const int64_t id = w.token_ids[at];
                float *to = x + at * m.width;
                std::memcpy(to, m.embedding + id * m.width, sizeof(float) * m.width);
                if (!adapter || !adapter->embedding_a) continue;
                const float *a = adapter->embedding_a + id * adapter->rank;
                for (int64_t j = 0; j < m.width; ++j) {
                    const float *b = adapter->embedding_b + j * adapter->rank;
                    float sum = 0.0f;
                    for (int64_t r = 0; r < adapter->rank; ++r) sum += a[r] * b[r];
                    to[j] += adapter->scale * sum;
                }
            }
        }
    }

    // Whether site `index` is given the tokens wanted alone.
    bool is_late(int64_t index) const { return index > 4 * (m.layers - 1); }

    // -- products: y = x W^T + (x A^T) B^T for `tokens` from token `first` on; panels given begin there
    //
    // Several tokens of an adapter go through tiles, as a block of 32 in which those of others become 0. For single ones
    // each adapter is read from its beginning to its end, before the base's weights, to whose sums its part is added.

    static bool alone(const Share &share, int64_t tokens) { return tokens <= FEW || share.end - share.first == 1; }

    void forward(int64_t index, Panels in, Panels y, int64_t first, int64_t tokens) {
        const Site &site = m.layer[index / 4].sites[index % 4];
        const Shares &shares = is_late(index) ? late_shares : all_shares;
        const int64_t outputs = outputs_of(site);
        bool adapted = false;
        for (int64_t at = 0; at < tokens; at += SIDE) adapted |= !shares[(first + at) / SIDE].empty();
        if (w.eight || adapted) round_states(in, site.inputs, site.gain, tokens, scratch.eight, adapted);
        uint8_t *to = low;
        for (int64_t i = 0; i < tokens; ++i) alone_at[i] = false;
        for (int64_t at = 0; at < tokens; at += SIDE)
            for (const Share &share : shares[(first + at) / SIDE]) {
                if (!alone(share, tokens)) {
                    lower(index, share, at, to);
                    to += low_block;
                    continue;
                }
                for (int64_t i = at + share.first; i < at + share.end; ++i) {
                    alone_at[i] = true;
                    adapt(index, share, i, sums + i * outputs);
                }
            }
        const auto add = [&](int64_t token, int64_t panel, float *row) {
            if (!alone_at[token]) return;
            const float *more = sums + token * outputs + panel * SIDE;
            for (int64_t half = 0; half < SIDE; half += 16)
                _mm512_storeu_ps(row + half, plus(_mm512_loadu_ps(row + half), _mm512_loadu_ps(more + half)));
        };
        const uint8_t *given = low;
        int64_t part = 0, ends = site.outputs[0] / SIDE;  // of the panel under way; panels of the parts so far
        multiply(
            site.forward, w.eight, site.inputs, outputs, in, tokens, scratch, c,
            [&](int64_t panel, int64_t token, float *row) {
                add(token, panel, row);
                store_32(y.block(panel, token), _mm512_loadu_ps(row), _mm512_loadu_ps(row + 16));
            },
            [&](int64_t panel, int64_t at) {
                if (at == 0) given = low;
                if (at == 0 && panel == ends) ends += site.outputs[++part] / SIDE;
                if (!w.eight) take_sums(c);
                for (const Share &share : shares[(first + at) / SIDE]) {
                    if (alone(share, tokens)) {
                        add(at + share.first, panel, c + share.first * SIDE);
                        continue;
                    }
                    raise(index, share, part, panel, given);
                    given += low_block;
                }
                round_block(c, y.block(panel, at));
            });
    }

    // -- adapters: states of the product are in `scratch`, in two digits of 8 bits

    Fine low_of(const Share &share, int64_t part, const uint8_t *room) const {
        Arena arena{const_cast<uint8_t *>(room) + part * (low_block / 3)};
        return take_fine(arena, SIDE, share.factors->rank);
    }

    // What A gives the tokens of a share, in 8 bits, part by part; what comes of other tokens is 0.
    void lower(int64_t index, const Share &share, int64_t at, uint8_t *room) {
        const Factors &f = *share.factors;
        const Site &site = f.site(index);
        const int64_t column = f.a_column(site), columns = site.parts * f.columns, wide = 16 * columns;
        const uint8_t *a = f.a(share.adapter->packed, index);
        const float *scales = f.a_scales(share.adapter->packed, index);
        alignas(64) int32_t high[BLOCK], low[BLOCK];
        for (int64_t j = 0; j < columns; j += 2, a += 2 * column) {
            const uint8_t *right = j + 1 < columns ? a + column : a;
            multiply_eight(scratch.eight.high, at, a, right, column / TILE_BYTES, high);
            multiply_eight(scratch.eight.low, at, a, right, column / TILE_BYTES, low);
            for (int64_t half = 0; half < 2 && j + half < columns; ++half)
                for (int64_t i = share.first; i < share.end; ++i) {
                    const int64_t from = i * SIDE + 16 * half;
                    _mm512_storeu_ps(lowered + i * wide + 16 * (j + half),
                                     scaled(_mm512_load_si512(high + from), _mm512_load_si512(low + from), scratch.eight,
                                            at + i, _mm512_loadu_ps(scales + 16 * (j + half))));
                }
        }
        for (int64_t part = 0; part < site.parts; ++part) {
            const Fine to = low_of(share, part, room);
            for (Bytes each : {to.high, to.low}) std::memset(each.data, 0, SIDE * f.deep * DEEP);
            for (int64_t i = share.first; i < share.end; ++i)
                round_low(f, lowered + i * wide + 16 * part * f.columns, to, i);
        }
    }

    static void round_low(const Factors &f, const float *from, Fine to, int64_t row) {
        round_to_eight([&](int64_t j) { return _mm512_loadu_ps(from + j); }, 16 * f.columns, to, row, true);
    }

    // Adds what B makes of that to the sums of a panel.
    void raise(int64_t index, const Share &share, int64_t part, int64_t panel, const uint8_t *given) {
        const Factors &f = *share.factors;
        const uint8_t *b = f.b(share.adapter->packed, index) + 2 * panel * f.b_column();
        const bf16 *scales = f.b_scales(share.adapter->packed, index) + panel * SIDE;
        const Fine from = low_of(share, part, given);
        alignas(64) int32_t high[BLOCK], low[BLOCK];
        multiply_eight(from.high, 0, b, b + f.b_column(), f.deep, high);
        multiply_eight(from.low, 0, b, b + f.b_column(), f.deep, low);
        for (int64_t i = share.first; i < share.end; ++i)
            for (int64_t at = i * SIDE, half = 0; half < SIDE; half += 16, at += 16)
                _mm512_storeu_ps(c + at, plus(_mm512_loadu_ps(c + at),
                                              scaled(_mm512_load_si512(high + at), _mm512_load_si512(low + at), from, i,
                                                     load_low(scales + half))));
    }

    // Both for a single token: what is to be added to its sums, `row` [O].
    void adapt(int64_t index, const Share &share, int64_t token, float *row) {
        const Factors &f = *share.factors;
        const Site &site = f.site(index);
        const uint8_t *a = f.a(share.adapter->packed, index), *b = f.b(share.adapter->packed, index);
        const float *a_scales = f.a_scales(share.adapter->packed, index);
        const bf16 *b_scales = f.b_scales(share.adapter->packed, index);
        for (int64_t part = 0; part < site.parts; ++part) {
            for (int64_t j = 0; j < f.columns; ++j, a += f.a_column(site), a_scales += 16) {
                const Sums sums = multiply_eight_row(scratch.eight, token, a, f.a_column(site) / DEEP, share.ahead);
                _mm512_storeu_ps(lowered + 16 * j,
                                 scaled(sums.high, sums.low, scratch.eight, token, _mm512_loadu_ps(a_scales)));
            }
            round_low(f, lowered, rounded, 0);
            const int64_t outputs = site.outputs[part] / 16;
            const auto put = [&](Sums sums) {
                _mm512_storeu_ps(row, scaled(sums.high, sums.low, rounded, 0, load_low(b_scales)));
                row += 16, b_scales += 16;
            };
            switch (f.fours) {  // of ranks 8, 16 and 32 what A gives stays in registers
                case 2: multiply_eight_columns<2>(rounded, b, outputs, share.ahead, put); break;
                case 4: multiply_eight_columns<4>(rounded, b, outputs, share.ahead, put); break;
                case 8: multiply_eight_columns<8>(rounded, b, outputs, share.ahead, put); break;
                default:
                    for (int64_t o = 0; o < outputs; ++o)
                        put(multiply_eight_row(rounded, 0, b + o * f.b_column(), f.fours, share.ahead));
            }
            b += outputs * f.b_column();
        }
    }

    // -- keys and values, by tiles: a block holds 32 positions of one head

    bf16 *block_of(bf16 *cache, const Span &span, int64_t position, int64_t head) const {
        return cache + (static_cast<int64_t>(span.blocks[position / SIDE]) * m.kv_heads + head) * SIDE * m.head_width;
    }

    // Keys as packed columns (d -> positions), values as packed rows (positions -> d). Whole blocks of values are multiplied,
    // with weights of 0 behind the last: what a sequence before left there may be no numbers.
    void remember(int64_t layer, const Span &span) {
        for (int64_t t = 0; t < span.tokens; ++t) {
            const int64_t position = span.position + t, place = position % SIDE;
            for (int64_t head = 0; head < m.kv_heads; ++head) {
                if (place == 0)
                    std::memset(block_of(w.values[layer], span, position, head), 0, sizeof(bf16) * SIDE * m.head_width);
                bf16 *keys = block_of(w.keys[layer], span, position, head) + place / 16 * (BLOCK / 2) + place % 16 * 2;
                bf16 *values = block_of(w.values[layer], span, position, head) + place / 2 * SIDE + place % 2;
                for (int64_t j = 0; j < head_panels; ++j, keys += BLOCK, values += BLOCK) {
                    const bf16 *k = qkv.block((m.heads + head) * head_panels + j, span.start + t);
                    const bf16 *v = qkv.block((m.heads + m.kv_heads + head) * head_panels + j, span.start + t);
                    for (int64_t i = 0; i < 16; ++i) std::memcpy(keys + i * SIDE, k + 2 * i, 4);
                    for (int64_t i = 0; i < SIDE; ++i) values[i / 16 * (BLOCK / 2) + i % 16 * 2] = v[i];
                }
            }
        }
    }

    // What the last `asking` tokens of a span attend to, into rows from `to` on. The queries that share a head of keys go
    // together, 32 at a time. `next`, where given, is asked for meanwhile.
    void attend(int64_t layer, const Span &span, int64_t asking, int64_t to, const Span *next) {
        const int64_t rows = asking * group, before = span.tokens - asking, position = span.position + before;
        for (int64_t head = 0; head < m.kv_heads; ++head) {
            if (next) ask_for(layer, *next, head);
            for (int64_t first = 0; first < rows; first += SIDE) {
                const int64_t real = rows - first < SIDE ? rows - first : SIDE;
                const int64_t blocks = (position + (first + real - 1) / group) / SIDE + 1;
                const bool top = real <= SIDE / 2;  // half of the tiles do
                float factor[SIDE];
                for (int64_t i = 0; i < real; ++i)
                    for (int64_t j = 0; j < head_panels; ++j)
                        std::memcpy(queries + j * BLOCK + i * SIDE, row(qkv, span.start + before, head, first + i, j), SIDE * 2);
                for (int64_t at = 0; at < blocks; ++at) {
                    clear();
                    accumulate_rows(top, queries, block_of(w.keys[layer], span, at * SIDE, head), head_panels);
                    take_rows(top, scores + at * BLOCK);
                }
                for (int64_t i = 0; i < real; ++i) {
                    const int64_t seen = position + (first + i) / group + 1;
                    factor[i] = weigh(scores + i * SIDE, weights + i * SIDE, seen);
                    for (int64_t at = rounded_up(seen) / SIDE; at < blocks; ++at)  // which later queries see
                        std::memset(weights + at * BLOCK + i * SIDE, 0, sizeof(bf16) * SIDE);
                }
                for (int64_t j = 0; j < head_panels; ++j) {
                    clear();
                    for (int64_t at = 0; at < blocks; ++at)
                        accumulate_rows(top, weights + at * BLOCK,
                                        block_of(w.values[layer], span, at * SIDE, head) + j * BLOCK, 1);
                    take_rows(top, c);
                    for (int64_t i = 0; i < real; ++i) {
                        const __m512 f = _mm512_set1_ps(factor[i]);
                        store_32(row(attention, to, head, first + i, j),
                                 _mm512_mul_ps(_mm512_load_ps(c + i * SIDE), f),
                                 _mm512_mul_ps(_mm512_load_ps(c + i * SIDE + 16), f));
                    }
                }
            }
        }
    }

    void ask_for(int64_t layer, const Span &span, int64_t head) const {
        for (int64_t position = 0; position < span.position + span.tokens; position += SIDE) {
            const bf16 *keys = block_of(w.keys[layer], span, position, head);
            const bf16 *values = block_of(w.values[layer], span, position, head);
            for (int64_t i = 0; i < SIDE * m.head_width; i += SIDE) {
                _mm_prefetch(keys + i, _MM_HINT_T1);
                _mm_prefetch(values + i, _MM_HINT_T1);
            }
        }
    }

    // Panel j of query `index` of those that share a head of keys, from `token` on: token by token, head by head.
    bf16 *row(Panels of, int64_t token, int64_t key_head, int64_t index, int64_t j) const {
        const int64_t head = key_head * group + index % group;
        return of.block(head * head_panels + j, token + index / group);
    }

    // x of the tokens wanted alone.
    void leave_others() {
        float *to = x;
        for (int64_t i = 0; i < w.spans; ++i) {
            const Span &span = w.span[i];
            const int64_t size = span.wanted * m.width, end = (span.start + span.tokens) * m.width;
            std::memmove(to, x + end - size, sizeof(float) * size);
            to += size;
        }
    }

    template <typename Do>
    void by_chunks(int64_t tokens, Do work) {
        for (int64_t first = 0; first < tokens; first += CHUNK) work(first, first + CHUNK < tokens ? CHUNK : tokens - first);
    }

    void run() {
        const Flush flush;
        const Products multiplying;
        embed();
        for (int64_t layer = 0; layer < m.layers; ++layer) {
            by_chunks(live, [&](int64_t first, int64_t tokens) {
                const Panels more = out.from(first);
                normalise(m, x + first * m.width, layer ? &more : nullptr, normed, nullptr, tokens);
                forward(4 * layer, normed, qkv.from(first), first, tokens);
                turn(m, qkv.from(first), m.layer[layer].bias, place_of.data() + first, tokens);
            });
            const bool last = layer + 1 == m.layers;
            int64_t to = 0;
            for (int64_t i = 0; i < w.spans; ++i) {
                const Span &span = w.span[i];
                const int64_t asking = last ? span.wanted : span.tokens;
                remember(layer, span);
                attend(layer, span, asking, to, i + 1 < w.spans ? w.span + i + 1 : nullptr);
                to += asking;
            }
            if (last) leave_others();
            by_chunks(to, [&](int64_t first, int64_t tokens) {
                const Panels more = out.from(first);
                forward(4 * layer + 1, attention.from(first), more, first, tokens);
                normalise(m, x + first * m.width, &more, normed, nullptr, tokens);
                forward(4 * layer + 2, normed, gate_up, first, tokens);
                gate(m, gate_up, product, tokens);
                forward(4 * layer + 3, product, more, first, tokens);
            });
        }
        for (int64_t i = 0; i < late; ++i) finish(i);
    }

    void finish(int64_t token) {
        const float *from = x + token * m.width;
        float *to = w.hidden + token * m.width;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t j = 0; j < m.width; j += 16) {
            const __m512 value =
                _mm512_add_ps(_mm512_loadu_ps(from + j), load_low(out.block(j / SIDE, token) + j % SIDE));
            squares = _mm512_fmadd_ps(value, value, squares);
            _mm512_storeu_ps(to + j, value);
        }
        const __m512 factor =
            _mm512_set1_ps(root_of_inverse(sum(squares) / static_cast<float>(m.width) + m.epsilon));
        for (int64_t j = 0; j < m.width; j += 16)
            _mm512_storeu_ps(to + j, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(to + j), factor),
                                                   _mm512_loadu_ps(m.norm + j)));
    }
};

// logits [rows, V] of states [rows, D] after the last norm.
void logits_of(const Model &m, bool eight, const float *hidden, int64_t rows, float *logits) {
    const Flush flush;
    const int64_t d = m.width, v = m.vocabulary;
    static thread_local std::vector<uint8_t> memory;
    alignas(64) float c[BLOCK];
    Panels in{};
    Scratch scratch{};
    const auto lay_out = [&](uint8_t *base) {
        Arena arena{base};
        in = arena.panels(CHUNK, d);
        scratch = take_scratch(arena, d);
        return arena.used;
    };
    const size_t size = lay_out(nullptr) + 64;
    if (memory.size() < size) memory.resize(size);
    lay_out(reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64));
    const Products multiplying;
    for (int64_t first = 0; first < rows; first += CHUNK) {
        const int64_t live = rows - first < CHUNK ? rows - first : CHUNK;
        for (int64_t i = 0; i < live; ++i) narrow(hidden + (first + i) * d, d, in, i);
        const auto put = [&](int64_t panel, int64_t token, const float *row) {
            const int64_t width = v - panel * SIDE < SIDE ? v - panel * SIDE : SIDE;
            std::memcpy(logits + (first + token) * v + panel * SIDE, row, sizeof(float) * width);
        };
        if (eight) round_states(in, d, nullptr, live, scratch.eight, false);
        multiply(m.head_forward, eight, d, v, in, live, scratch, c, put, [&](int64_t panel, int64_t at) {
            if (!eight) take_sums(c);
            for (int64_t i = at; i < at + SIDE && i < live; ++i) put(panel, i, c + (i - at) * SIDE);
        });
    }
}

}  // namespace

extern "C" {

void tunesmith_engine_step(const Model *model, const Work *work) { Step(*model, *work).run(); }

void tunesmith_logits(const Model *model, bool eight, const float *hidden, int64_t rows, float *logits) {
    logits_of(*model, eight, hidden, rows, logits);
}

int64_t tunesmith_factors_size(const Model *model, int64_t rank) { return Factors(*model, rank).size(); }

void tunesmith_factors(const Model *model, const float *flat, int64_t rank, float scale, uint8_t *packed) {
    Factors(*model, rank).pack(flat, scale, packed);
}

int64_t tunesmith_eight_size(int64_t outputs, int64_t inputs) { return Eight::size(outputs, inputs); }

void tunesmith_eight(const float *from, int64_t outputs, int64_t inputs, uint8_t *packed) {
    Eight::pack(from, outputs, inputs, packed);
}

}  // extern "C"

#else

extern "C" bool tunesmith_tiles() { return false; }

#endif
