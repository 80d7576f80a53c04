// A step of the engine on processors that multiply tiles of bf16 (AMX): the next tokens of any sequences, whole prompts and
// single tokens alike, through a model of the Llama family and each its own adapter, in one call. Keys and values lie in the
// cache as tiles. What comes of a token depends on its own sequence alone, whatever lies beside it in the step.
//
// Legend: N = tokens, rounded up, D = model width, F = feed-forward width, H, K = query and key/value heads, G = H / K,
// d = head width, W = (H + 2K) d, S = rank rounded up to a block, P = linear layers stacked in a site, V = vocabulary.

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <vector>

#include "../decoder/packed.h"

extern "C" {

struct Adapter {
    const bf16 *packed;                           // factors of all sites
    const float *embedding_a, *embedding_b;       // [V, R] and [D, R], or null
    int32_t rank;
    float scale;
};

struct Span {  // tokens of one sequence
    int64_t start, tokens;  // which of the step, and how many
    int64_t position;       // of the first in its sequence
    const int32_t *blocks;  // where the sequence keeps keys and values
    const Adapter *adapter;  // null for the base itself
};

struct Work {
    int64_t tokens, spans;  // tokens: a multiple of 32
    const int64_t *token_ids;
    const Span *span;
    bf16 *const *keys, *const *values;  // by layers: [blocks, K, 32 d], each a packed block of 32 positions
    float *hidden;                      // out: [N, D], after the last norm
};

}  // extern "C"

namespace {

constexpr int64_t CHUNK = 256;  // tokens that go through products together: their states stay in the cache

// The tokens of one adapter within a block of 32.
struct Share {
    const Adapter *adapter;
    const Places *places;
    int64_t first, end;
};

struct Step {
    const Model &m;
    const Work &w;
    const int64_t n, wide, mixed, head_panels, group;
    int64_t deep = 0, context = 0;
    std::vector<Places> places;               // of each rank there is
    std::vector<std::vector<Share>> shares;   // by blocks of tokens
    std::vector<int32_t> place_of;            // by tokens: position in the sequence, or -1
    float *x, *partial, *scores;
    Panels normed, qkv, attention, out, gate_up, product;
    bf16 *low, *queries, *weights;
    int64_t low_block;                        // elements of what A gives one share
    alignas(64) float c[BLOCK];

    Step(const Model &model, const Work &work)
        : m(model), w(work), n(work.tokens), wide((m.heads + 2 * m.kv_heads) * m.head_width),
          mixed(m.heads * m.head_width), head_panels(m.head_width / SIDE), group(m.heads / m.kv_heads),
          shares(n / SIDE), place_of(n, -1) {
        std::vector<int32_t> ranks;
        places.reserve(w.spans);
        for (int64_t i = 0; i < w.spans; ++i) {
            const Span &span = w.span[i];
            const int64_t end = span.position + span.tokens;
            context = end > context ? end : context;
            for (int64_t t = 0; t < span.tokens; ++t) place_of[span.start + t] = span.position + t;
            if (!span.adapter) continue;
            const int32_t rank = span.adapter->rank;
            size_t known = 0;
            while (known < ranks.size() && ranks[known] != rank) ++known;
            if (known == ranks.size()) ranks.push_back(rank), places.emplace_back(m, rank, false);
            deep = rounded_up(rank) > deep ? rounded_up(rank) : deep;
            for (int64_t at = span.start, to; at < span.start + span.tokens; at = to) {
                to = (at / SIDE + 1) * SIDE < span.start + span.tokens ? (at / SIDE + 1) * SIDE : span.start + span.tokens;
                add_share({span.adapter, &places[known], at % SIDE, (to - 1) % SIDE + 1}, shares[at / SIDE]);
            }
        }
        low_block = 3 * deep * SIDE;
        static thread_local std::vector<uint8_t> memory;  // kept: new memory has to be cleared by the system
        const size_t size = lay_out(nullptr) + 64;
        if (memory.size() < size) memory.resize(size);
        lay_out(reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64));
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
        size_t most = 0;
        for (const auto &each : shares) most = each.size() > most ? each.size() : most;
        x = arena.take<float>(n * m.width);
        partial = arena.take<float>(CHUNK * SIDE);
        scores = arena.take<float>(blocks * BLOCK);
        normed = arena.panels(CHUNK, m.width);
        qkv = arena.panels(n, wide);
        attention = arena.panels(n, mixed);
        out = arena.panels(n, m.width);
        gate_up = arena.panels(CHUNK, 2 * m.feed_width);
        product = arena.panels(CHUNK, m.feed_width);
        low = arena.take<bf16>(CHUNK / SIDE * most * low_block);
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

    // y = x W^T + (x A^T) B^T for `tokens` from token `first` on; panels given begin there. In a block of several
    // adapters, each multiplies all 32 tokens, and what it gives of those that are not its own becomes 0.
    void forward(int64_t index, Panels in, Panels y, int64_t first, int64_t tokens) {
        const Site &site = m.layer[index / 4].sites[index % 4];
        bf16 *to = low;
        for (int64_t at = 0; at < tokens; at += SIDE)
            for (const Share &share : shares[(first + at) / SIDE]) {
                const int64_t own = rounded_up(share.adapter->rank);
                const bf16 *a = share.adapter->packed + share.places->sites[index].a_forward;
                for (int64_t r = 0; r < site.parts * own; r += SIDE) {
                    clear();
                    accumulate(in.block(0, at), in.step(), a + r * site.inputs, site.inputs / SIDE);
                    take_sums(c);
                    std::memset(c, 0, sizeof(float) * share.first * SIDE);
                    std::memset(c + share.end * SIDE, 0, sizeof(float) * (SIDE - share.end) * SIDE);
                    round_block(c, to + r * SIDE);
                }
                to += low_block;
            }
        int64_t panel = 0;
        for (int part = 0; part < site.parts; panel += site.outputs[part++] / SIDE) {
            const bf16 *given = low;
            by_panels(in, site.forward + panel * SIDE * site.inputs, site.inputs / SIDE, site.outputs[part] / SIDE,
                      tokens, partial, [&](int64_t within, int64_t at) {
                          if (at == 0) given = low;
                          for (const Share &share : shares[(first + at) / SIDE]) {
                              const int64_t own = rounded_up(share.adapter->rank);
                              const bf16 *b = share.adapter->packed + share.places->sites[index].b_forward[part];
                              accumulate(given + part * own * SIDE, BLOCK, b + within * SIDE * own, own / SIDE);
                              given += low_block;
                          }
                          take_sums(c);
                          round_block(c, y.block(panel + within, at));
                      });
        }
    }

    // -- keys and values, by tiles: a block holds 32 positions of one head

    bf16 *block_of(bf16 *cache, const Span &span, int64_t position, int64_t head) const {
        return cache + (static_cast<int64_t>(span.blocks[position / SIDE]) * m.kv_heads + head) * SIDE * m.head_width;
    }

    // Keys as packed columns (d -> positions), values as packed rows (positions -> d).
    void remember(int64_t layer, const Span &span) {
        for (int64_t t = 0; t < span.tokens; ++t) {
            const int64_t position = span.position + t, place = position % SIDE;
            for (int64_t head = 0; head < m.kv_heads; ++head) {
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

    // What the tokens of a span attend to. The queries that share a head of keys go together, 32 at a time.
    void attend(int64_t layer, const Span &span) {
        const int64_t rows = span.tokens * group;
        for (int64_t head = 0; head < m.kv_heads; ++head)
            for (int64_t first = 0; first < rows; first += SIDE) {
                const int64_t real = rows - first < SIDE ? rows - first : SIDE;
                const int64_t blocks = (span.position + (first + real - 1) / group) / SIDE + 1;
                float factor[SIDE], unused;
                for (int64_t i = 0; i < real; ++i)
                    for (int64_t j = 0; j < head_panels; ++j)
                        std::memcpy(queries + j * BLOCK + i * SIDE, row(qkv, span, head, first + i, j), SIDE * 2);
                for (int64_t at = 0; at < blocks; ++at) {
                    clear();
                    accumulate(queries, BLOCK, block_of(w.keys[layer], span, at * SIDE, head), head_panels);
                    take_sums(scores + at * BLOCK);
                }
                std::memset(weights, 0, sizeof(bf16) * blocks * BLOCK);  // early queries see fewer blocks than late ones
                for (int64_t i = 0; i < real; ++i)
                    factor[i] = weigh(scores + i * SIDE, weights + i * SIDE, span.position + (first + i) / group + 1,
                                      &unused);
                for (int64_t j = 0; j < head_panels; ++j) {
                    clear();
                    for (int64_t at = 0; at < blocks; ++at)
                        accumulate(weights + at * BLOCK, 0,
                                   block_of(w.values[layer], span, at * SIDE, head) + j * BLOCK, 1);
                    take_sums(c);
                    for (int64_t i = 0; i < real; ++i) {
                        const __m512 f = _mm512_set1_ps(factor[i]);
                        store_32(row(attention, span, head, first + i, j),
                                 _mm512_mul_ps(_mm512_load_ps(c + i * SIDE), f),
                                 _mm512_mul_ps(_mm512_load_ps(c + i * SIDE + 16), f));
                    }
                }
            }
    }

    // Panel j of query `index` of those that share a head of keys: token by token, head by head.
    bf16 *row(Panels of, const Span &span, int64_t key_head, int64_t index, int64_t j) const {
        const int64_t head = key_head * group + index % group;
        return of.block(head * head_panels + j, span.start + index / group);
    }

    template <typename Do>
    void by_chunks(Do work) {
        for (int64_t first = 0; first < n; first += CHUNK) work(first, first + CHUNK < n ? CHUNK : n - first);
    }

    void run() {
        configure_tiles();
        embed();
        std::memset(attention.data, 0, sizeof(bf16) * n * mixed);
        for (int64_t layer = 0; layer < m.layers; ++layer) {
            by_chunks([&](int64_t first, int64_t tokens) {
                const Panels added = out.from(first);
                normalise(m, x + first * m.width, layer ? &added : nullptr, normed, nullptr, tokens);
                forward(4 * layer, normed, qkv.from(first), first, tokens);
                turn(m, qkv.from(first), m.layer[layer].bias, place_of.data() + first, tokens);
            });
            for (int64_t i = 0; i < w.spans; ++i) {
                remember(layer, w.span[i]);
                attend(layer, w.span[i]);
            }
            by_chunks([&](int64_t first, int64_t tokens) {
                const Panels added = out.from(first);
                forward(4 * layer + 1, attention.from(first), added, first, tokens);
                normalise(m, x + first * m.width, &added, normed, nullptr, tokens);
                forward(4 * layer + 2, normed, gate_up, first, tokens);
                gate(m, gate_up, product, tokens);
                forward(4 * layer + 3, product, added, first, tokens);
            });
        }
        for (int64_t i = 0; i < n; ++i) finish(i);
        _tile_release();
    }

    void finish(int64_t token) {
        const float *from = x + token * m.width;
        float *to = w.hidden + token * m.width, squares = 0.0f;
        for (int64_t j = 0; j < m.width; ++j) {
            to[j] = from[j] + load(out.block(j / SIDE, token)[j % SIDE]);
            squares += to[j] * to[j];
        }
        const float factor = root_of_inverse(squares / static_cast<float>(m.width) + m.epsilon);
        for (int64_t j = 0; j < m.width; ++j) to[j] *= factor * m.norm[j];
    }
};

}  // namespace

extern "C" {

void tunesmith_engine_step(const Model *model, const Work *work) { Step(*model, *work).run(); }

// logits [rows, V] of states [rows, D] after the last norm.
void tunesmith_logits(const Model *model, const float *hidden, int64_t rows, float *logits) {
    const int64_t d = model->width, v = model->vocabulary, panels = rounded_up(v) / SIDE;
    alignas(64) float c[BLOCK];
    std::vector<bf16> states(CHUNK * d);
    std::vector<float> partial(CHUNK * SIDE);
    configure_tiles();
    for (int64_t first = 0; first < rows; first += CHUNK) {
        const int64_t real = rows - first < CHUNK ? rows - first : CHUNK, whole = rounded_up(real);
        const Panels in{states.data(), whole};
        for (int64_t i = 0; i < whole; ++i)
            for (int64_t j = 0; j < d; ++j)
                store(in.block(j / SIDE, i) + j % SIDE, i < real ? hidden[(first + i) * d + j] : 0.0f);
        by_panels(in, model->head_forward, d / SIDE, panels, whole, partial.data(), [&](int64_t panel, int64_t at) {
            take_sums(c);
            const int64_t width = v - panel * SIDE < SIDE ? v - panel * SIDE : SIDE;
            for (int64_t i = at; i < at + SIDE && i < real; ++i)
                std::memcpy(logits + (first + i) * v + panel * SIDE, c + (i - at) * SIDE, sizeof(float) * width);
        });
    }
    _tile_release();
}

}  // extern "C"

#else

extern "C" bool tunesmith_tiles() { return false; }

#endif
