// One token of each of a few sequences through a model of the Llama family: what decoder/llama.py computes, in one call.
//
// A step of a small model in torch is some two hundred operators, and most of its time lies between them. Here it is
// one pass over the weights, which all sequences share; they are fp32 or fixed point, all else is fp32. One thread.
// engine/native.py calls this.
//
// Legend: rows = sequences, D = width, V = vocabulary, I, O = inputs and outputs of a product.

#include "attention.h"
#include "deltas.h"

extern "C" {

struct Layer {
    const float *attention_norm, *qkv_bias, *q_norm, *k_norm, *feed_norm;
    const void *qkv, *o, *gate_up, *down;  // matrices
};

struct Model {
    Shape shape;
    int32_t vocabulary, bits;  // the latter: of matrices
    float epsilon;
    const float *embedding, *norm;
    const void *head;              // a matrix
    const float *cosines, *sines;  // [positions, d / 2]
    const Layer *layer;
};

struct Step {
    int64_t rows;
    const int32_t *token_ids;
    const Span *span;               // of each row
    Groups groups;                  // rows by adapter
    float *const *keys, *const *values;  // a layer each: see Attention
    float *hidden;                  // out: [rows, D]
    float *logits;                  // out: [rows, V]
};

}  // extern "C"

namespace {

void add(float *__restrict y, const float *__restrict x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] += x[i];
}

struct Work {
    const Model &m;
    const Step &s;
    const Shape &shape;
    std::vector<float> x, y, wide, out;

    Work(const Model &model, const Step &step)
        : m(model), s(step), shape(model.shape), x(step.rows * shape.width), y(step.rows * widest()),
          wide(step.rows * widest()), out(step.rows * shape.width) {}

    int64_t widest() const {
        int64_t most = shape.width;
        for (int site = 0; site < 4; ++site) {
            const SiteShape of = site_shape(shape, site);
            const int64_t here = of.all_outputs() > of.inputs ? of.all_outputs() : of.inputs;
            most = here > most ? here : most;
        }
        return most;
    }

    // The product of a site, with what adapters add.
    void site(int64_t layer, int place, const void *weight, const float *bias, const float *from, float *to) {
        const SiteShape of = site_shape(shape, place);
        const int64_t outputs = of.all_outputs();
        multiply(from, Matrix{weight, m.bits, of.inputs, outputs}, to, s.rows);
        for (int64_t row = 0; bias && row < s.rows; ++row) add(to + row * outputs, bias, outputs);
        add_deltas(s.groups, shape, 4 * layer + place, from, to, 0, s.rows);
    }

    void normed(const float *gain) {
        for (int64_t row = 0; row < s.rows; ++row)
            norm(x.data() + row * shape.width, gain, y.data() + row * shape.width, shape.width, m.epsilon);
    }

    void run() {
        embed(s.groups, m.embedding, s.token_ids, s.rows, shape.width, x.data());
        for (int64_t layer = 0; layer < shape.layers; ++layer) {
            const Layer &l = m.layer[layer];
            normed(l.attention_norm);
            site(layer, 0, l.qkv, l.qkv_bias, y.data(), wide.data());
            attend({shape.heads, shape.kv_heads, shape.head_width, m.epsilon, l.q_norm, l.k_norm, m.cosines, m.sines,
                    s.rows, s.span, wide.data(), s.keys[layer], s.values[layer], y.data()},
                   0, shape.kv_heads);
            site(layer, 1, l.o, nullptr, y.data(), out.data());
            add(x.data(), out.data(), s.rows * shape.width);
            normed(l.feed_norm);
            site(layer, 2, l.gate_up, nullptr, y.data(), wide.data());
            for (int64_t row = 0; row < s.rows; ++row) {
                const float *gate = wide.data() + row * 2 * shape.feed_width;
                gated(gate, gate + shape.feed_width, y.data() + row * shape.feed_width, shape.feed_width);
            }
            site(layer, 3, l.down, nullptr, y.data(), out.data());
            add(x.data(), out.data(), s.rows * shape.width);
        }
        for (int64_t row = 0; row < s.rows; ++row)
            norm(x.data() + row * shape.width, m.norm, s.hidden + row * shape.width, shape.width, m.epsilon);
        multiply(s.hidden, Matrix{m.head, m.bits, shape.width, m.vocabulary}, s.logits, s.rows);
    }
};

}  // namespace

extern "C" void tunesmith_decode(const Model *model, const Step *step) { Work(*model, *step).run(); }
