// One token of each of a few sequences through a model of the Llama family: what decoder/llama.py computes, in one call.
//
// A step of a small model in torch is some two hundred operators, and most of its time lies between them. Here it is
// one pass over the weights, which all sequences share. fp32 throughout, one thread. engine/native.py calls this.
//
// Legend: rows = sequences, D = width, H, K = query and key/value heads, d = head width, F = feed-forward width,
// V = vocabulary, I, O = inputs and outputs of a product, R = rank, P = linear layers stacked in a product.

#include <utility>

#include "../decoder/panels.h"

extern "C" {

struct Layer {  // weights as panels
    const float *attention_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *feed_norm, *gate_up, *down;
};

struct Model {
    int32_t width, layers, heads, kv_heads, head_width, feed_width, vocabulary, block_tokens;
    float epsilon;
    const float *embedding, *norm, *head;  // the head as panels
    const float *cosines, *sines;  // [positions, d / 2]
    const Layer *layer;
};

struct Factors {
    const float *a, *b;  // [I, P R] and [P R, O], scale included
};

struct Adapter {
    int32_t rank, embedding_rank;  // 0: the embedding is as it is
    const Factors *sites;          // qkv, o, gate_up and down of each layer
    Factors embedding;             // [V, R] and [R, D]
};

struct Step {
    int32_t rows, table_width;
    const int32_t *token_ids, *positions;
    const int32_t *tables;            // [rows, table_width]: blocks of each sequence
    const Adapter *const *adapters;   // one a row; null for the base itself
    float *const *keys, *const *values;  // a layer each: [(block K + head) block_tokens + place, d]
    float *hidden;                    // out: [rows, D]
    float *logits;                    // out: [rows, V]
};

}  // extern "C"

namespace {

float total(Lanes x) {
    float lanes[LANES];
    write(lanes, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[half + i];
    return lanes[0];
}

void add_scaled(float *__restrict y, const float *__restrict x, float factor, int n) {
    for (int i = 0; i < n; ++i) y[i] += factor * x[i];
}

// y = x weight^T + bias
void product(const float *weight, const float *bias, const float *x, float *y, int rows, int inputs, int outputs) {
    if (rows == 1)
        multiply_row(x, weight, inputs, outputs, y);
    else
        multiply(x, inputs, weight, inputs, outputs, y, outputs, rows);
    if (bias)
        for (int row = 0; row < rows; ++row) add_scaled(y + int64_t(row) * outputs, bias, 1.0f, outputs);
}

// What adapters add: y += x A B, for the rows of each, B being block-diagonal: `parts` linear layers with `sizes` outputs
// side by side. What a row gets is the same to the bit, however many others have its adapter.
struct Deltas {
    std::vector<float> gathered, low, room;

    void add(const Factors &factors, int rank, const std::vector<int> &rows, const float *x, float *y, int inputs,
             int outputs, const int *sizes, int parts) {
        const int all = rank * parts, n = int(rows.size());
        low.assign(int64_t(n) * all, 0.0f);
        if (n == 1)
            return add_alone(factors, rank, x + int64_t(rows[0]) * inputs, y + int64_t(rows[0]) * outputs, inputs, outputs,
                             sizes, parts);
        gathered.resize(int64_t(n) * inputs);
        for (int i = 0; i < n; ++i)
            std::memcpy(gathered.data() + int64_t(i) * inputs, x + int64_t(rows[i]) * inputs, sizeof(float) * inputs);
        add_product(gathered.data(), inputs, factors.a, all, inputs, all, n,
                    [&](int64_t i) { return low.data() + i * all; }, room);
        for (int part = 0, first = 0; part < parts; first += sizes[part++])
            add_product(low.data() + part * rank, all, factors.b + int64_t(part) * rank * outputs + first, outputs, rank,
                        sizes[part], n, [&](int64_t i) { return y + int64_t(rows[i]) * outputs + first; }, room);
    }

    // A row alone reads each factor from its beginning to its end.
    void add_alone(const Factors &factors, int rank, const float *x, float *y, int inputs, int outputs, const int *sizes,
                   int parts) {
        const int all = rank * parts;
        for (int i = 0; i < inputs; ++i) add_scaled(low.data(), factors.a + int64_t(i) * all, x[i], all);
        for (int part = 0, first = 0; part < parts; first += sizes[part++])
            for (int r = part * rank; r < (part + 1) * rank; ++r)
                add_scaled(y + first, factors.b + int64_t(r) * outputs + first, low[r], sizes[part]);
    }
};

// scores[i] = scale q . keys[i], for n keys [n, d], four at a time.
void score(const float *q, const float *keys, int n, int d, float scale, float *scores) {
    const int whole = d / LANES * LANES;
    int i = 0;
    for (; i + 4 <= n; i += 4, keys += 4 * d) {
        Lanes sums[4] = {};
        for (int j = 0; j < whole; j += LANES)
            for (int k = 0; k < 4; ++k) sums[k] += read(q + j) * read(keys + k * d + j);
        for (int k = 0; k < 4; ++k)
            scores[i + k] = scale * (total(sums[k]) + dot(q + whole, keys + k * d + whole, d - whole));
    }
    for (; i < n; ++i, keys += d) {
        Lanes sum{};
        for (int j = 0; j < whole; j += LANES) sum += read(q + j) * read(keys + j);
        scores[i] = scale * (total(sum) + dot(q + whole, keys + whole, d - whole));
    }
}

// Adds weights [n] times values [n, d] to mixed [d], VECTORS vectors of which stay in registers.
template <int VECTORS>
void mix(const float *weights, const float *values, int n, int d, float *mixed) {
    Lanes sums[VECTORS];
    for (int v = 0; v < VECTORS; ++v) sums[v] = read(mixed + v * LANES);
    for (int i = 0; i < n; ++i, values += d)
        for (int v = 0; v < VECTORS; ++v) sums[v] += weights[i] * read(values + v * LANES);
    for (int v = 0; v < VECTORS; ++v) write(mixed + v * LANES, sums[v]);
}

void add_mixed(const float *weights, const float *values, int n, int d, float *mixed) {
    int at = 0;
    for (; at + 4 * LANES <= d; at += 4 * LANES) mix<4>(weights, values + at, n, d, mixed + at);
    for (; at + LANES <= d; at += LANES) mix<1>(weights, values + at, n, d, mixed + at);
    for (int i = 0; i < n; ++i)
        for (int j = at; j < d; ++j) mixed[j] += weights[i] * values[i * d + j];
}

void softmax(float *x, int n) {
    const float inverse = 1.0f / exponentials(x, n);
    for (int i = 0; i < n; ++i) x[i] *= inverse;
}

struct Work {
    const Model &m;
    const Step &s;
    std::vector<float> x, y, wide, out, scores;
    std::vector<std::pair<const Adapter *, std::vector<int>>> tuned;  // each adapter, and its rows
    Deltas deltas;

    Work(const Model &model, const Step &step)
        : m(model), s(step), x(step.rows * model.width), y(step.rows * widest()), wide(step.rows * widest()),
          out(step.rows * model.width) {
        for (int row = 0; row < s.rows; ++row) {
            if (!s.adapters[row]) continue;
            auto known = tuned.begin();
            while (known != tuned.end() && known->first != s.adapters[row]) ++known;
            if (known == tuned.end()) known = tuned.insert(known, {s.adapters[row], {}});
            known->second.push_back(row);
        }
    }

    int widest() const {
        const int stacked = (m.heads + 2 * m.kv_heads) * m.head_width, fed = 2 * m.feed_width;
        const int inner = stacked > fed ? stacked : fed;
        return inner > m.width ? inner : m.width;
    }

    void embed() {
        for (int row = 0; row < s.rows; ++row) {
            const int64_t id = s.token_ids[row];
            float *to = x.data() + int64_t(row) * m.width;
            for (int i = 0; i < m.width; ++i) to[i] = m.embedding[id * m.width + i];
            const Adapter *adapter = s.adapters[row];
            if (!adapter) continue;
            for (int r = 0; r < adapter->embedding_rank; ++r)
                add_scaled(to, adapter->embedding.b + int64_t(r) * m.width,
                           adapter->embedding.a[id * adapter->embedding_rank + r], m.width);
        }
    }

    // The product of a site, from `from` to `to`, with what adapters add.
    void site(int layer, int place, const float *weight, const float *bias, const float *from, float *to, int inputs,
              const int *sizes, int parts) {
        int outputs = 0;
        for (int part = 0; part < parts; ++part) outputs += sizes[part];
        product(weight, bias, from, to, s.rows, inputs, outputs);
        for (const auto &[adapter, rows] : tuned)
            deltas.add(adapter->sites[4 * layer + place], adapter->rank, rows, from, to, inputs, outputs, sizes, parts);
    }

    void normed(const float *gain) {
        for (int row = 0; row < s.rows; ++row)
            norm(x.data() + int64_t(row) * m.width, gain, y.data() + int64_t(row) * m.width, m.width, m.epsilon);
    }

    void add_out() { add_scaled(x.data(), out.data(), 1.0f, s.rows * m.width); }

    // q, k, v of one row -> what its heads attend to, in `to`; stores k and v.
    void attend(int layer, int row, float *qkv, float *to) {
        const Layer &l = m.layer[layer];
        const int d = m.head_width, place = s.positions[row], shared = m.heads / m.kv_heads, size = m.block_tokens;
        const float *cosines = m.cosines + int64_t(place) * (d / 2), *sines = m.sines + int64_t(place) * (d / 2);
        const int32_t *blocks = s.tables + int64_t(row) * s.table_width;
        float *k = qkv + m.heads * d, *v = k + m.kv_heads * d;
        for (int head = 0; head < m.heads; ++head) {
            if (l.q_norm) norm(qkv + head * d, l.q_norm, qkv + head * d, d, m.epsilon);
            rotate(qkv + head * d, cosines, sines, d / 2);
        }
        for (int head = 0; head < m.kv_heads; ++head) {
            if (l.k_norm) norm(k + head * d, l.k_norm, k + head * d, d, m.epsilon);
            rotate(k + head * d, cosines, sines, d / 2);
            const int64_t at = ((int64_t(blocks[place / size]) * m.kv_heads + head) * size + place % size) * d;
            for (int i = 0; i < d; ++i) s.keys[layer][at + i] = k[head * d + i];
            for (int i = 0; i < d; ++i) s.values[layer][at + i] = v[head * d + i];
        }
        scores.resize(place + 1);
        const float scale = 1.0f / std::sqrt(float(d));
        for (int head = 0; head < m.heads; ++head) {
            float *q = qkv + head * d, *mixed = to + head * d;
            const auto start = [&](int first) {
                return (int64_t(blocks[first / size]) * m.kv_heads + head / shared) * size * d;
            };
            for (int first = 0; first <= place; first += size) {
                const float *keys = s.keys[layer] + start(first);
                const int last = place + 1 - first < size ? place + 1 - first : size;
                score(q, keys, last, d, scale, scores.data() + first);
            }
            softmax(scores.data(), place + 1);
            for (int i = 0; i < d; ++i) mixed[i] = 0.0f;
            for (int first = 0; first <= place; first += size) {
                const float *values = s.values[layer] + start(first);
                const int last = place + 1 - first < size ? place + 1 - first : size;
                add_mixed(scores.data() + first, values, last, d, mixed);
            }
        }
    }

    void run() {
        const int heads = m.heads * m.head_width, keys = m.kv_heads * m.head_width, stacked = heads + 2 * keys;
        const int of_qkv[] = {heads, keys, keys}, of_fed[] = {m.feed_width, m.feed_width}, of_width[] = {m.width};
        embed();
        for (int layer = 0; layer < m.layers; ++layer) {
            const Layer &l = m.layer[layer];
            normed(l.attention_norm);
            site(layer, 0, l.qkv, l.qkv_bias, y.data(), wide.data(), m.width, of_qkv, 3);
            for (int row = 0; row < s.rows; ++row)
                attend(layer, row, wide.data() + int64_t(row) * stacked, y.data() + int64_t(row) * heads);
            site(layer, 1, l.o, nullptr, y.data(), out.data(), heads, of_width, 1);
            add_out();
            normed(l.feed_norm);
            site(layer, 2, l.gate_up, nullptr, y.data(), wide.data(), m.width, of_fed, 2);
            for (int row = 0; row < s.rows; ++row) {
                const float *gate = wide.data() + int64_t(row) * 2 * m.feed_width, *up = gate + m.feed_width;
                float *to = y.data() + int64_t(row) * m.feed_width;
                gated(gate, up, to, m.feed_width);
            }
            site(layer, 3, l.down, nullptr, y.data(), out.data(), m.feed_width, of_width, 1);
            add_out();
        }
        for (int row = 0; row < s.rows; ++row)
            norm(x.data() + int64_t(row) * m.width, m.norm, s.hidden + int64_t(row) * m.width, m.width, m.epsilon);
        product(m.head, nullptr, s.hidden, s.logits, s.rows, m.width, m.vocabulary);
    }
};

}  // namespace

extern "C" void tunesmith_decode(const Model *model, const Step *step) { Work(*model, *step).run(); }
