// Products of fp32 on any processor: the sums of a few rows and of two vectors of columns stay in registers while what
// is multiplied from the right passes by. It lies in panels of WIDE columns, each [depth, WIDE], with zeros for columns
// that there are not. A row's sums are added up in one order, whatever rows lie beside it.

#pragma once

#include <type_traits>
#include <vector>

#include "lanes.h"

namespace {

constexpr int WIDE = 2 * LANES;
constexpr int TALL = MANY_REGISTERS ? 12 : 6;  // rows of a block: two sums for each, beside what is multiplied
constexpr int64_t DEEPEST = 24 * 1024 / (sizeof(float) * WIDE);  // of a panel: what stays in the cache next to the core
constexpr int64_t CHUNK_ROWS = 16 * 12;  // that go past all panels before the next do: they stay in the second cache

inline int64_t whole_panels(int64_t columns) { return (columns + WIDE - 1) / WIDE * WIDE; }
inline int64_t panels_size(int64_t columns, int64_t depth) { return whole_panels(columns) * depth; }

// A matrix whose element (d, c) is from[d * deep + c * wide], times gain[d] or gain[c], where given, and `scale`.
struct Unpacked {
    const float *from;
    int64_t deep, wide;
    const float *gain_deep = nullptr, *gain_wide = nullptr;
    float scale = 1.0f;

    float factor(int64_t c) const { return scale * (gain_wide ? gain_wide[c] : 1.0f); }
    float at(int64_t d, int64_t c) const {
        return from[d * deep + c * wide] * factor(c) * (gain_deep ? gain_deep[d] : 1.0f);
    }
};

void pack(Unpacked m, int64_t columns, int64_t depth, float *to) {
    for (int64_t first = 0; first < columns; first += WIDE, to += depth * WIDE) {
        const int64_t real = columns - first < WIDE ? columns - first : WIDE;
        for (int64_t j = 0; j < real; ++j)
            for (int64_t d = 0; d < depth; ++d) to[d * WIDE + j] = m.at(d, first + j);
        for (int64_t d = 0; d < depth; ++d)
            for (int64_t j = real; j < WIDE; ++j) to[d * WIDE + j] = 0.0f;
    }
}

// work(rows as a constant), of the numbers that a block may have: for all others up to TALL there is none.
template <int ROWS = TALL, typename Work>
inline void as_constant(int rows, Work work) {
    if (rows == ROWS) return work(std::integral_constant<int, ROWS>());
    if constexpr (ROWS > 1) as_constant<(ROWS > 6 ? 6 : ROWS - 1)>(rows, work);
}

// Adds ROWS rows of `a`, whose elements lie `a_row` and `a_deep` apart, times `depth` rows of `b`. A function of its own:
// where it is used there are more things at hand than registers, and here there are to be none but these.
template <int ROWS>
__attribute__((noinline)) void add_rows(Lanes (*sums)[2], const float *a, int64_t a_row, int64_t a_deep, const float *b,
                                        int64_t b_deep, int64_t depth) {
    Lanes now[ROWS][2];
#pragma GCC unroll 12  // else sums would be written to memory all the while
    for (int i = 0; i < ROWS; ++i) now[i][0] = sums[i][0], now[i][1] = sums[i][1];
    for (int64_t d = 0; d < depth; ++d, a += a_deep, b += b_deep) {
        const Lanes left = read(b), right = read(b + LANES);
        for (int i = 0; i < ROWS; ++i) {
            const float x = a[i * a_row];
            now[i][0] += x * left;
            now[i][1] += x * right;
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) sums[i][0] = now[i][0], sums[i][1] = now[i][1];
}

// Sums of ROWS rows and one panel, or of a number that is known when it is made (ROWS = 0): most blocks are TALL, and to
// compile all kinds of whatever uses them takes its time.
template <int ROWS>
struct Block {
    Lanes sums[TALL][2];
    const int given;

    explicit Block(int of_rows) : given(of_rows) {}

    int rows() const { return ROWS ? ROWS : given; }

    // work(rows as a constant)
    template <typename Work>
    void of_rows(Work work) const {
        if constexpr (ROWS)
            work(std::integral_constant<int, ROWS>());
        else
            as_constant(given, work);
    }

    void clear() {
        for (int i = 0; i < rows(); ++i) sums[i][0] = sums[i][1] = Lanes{};
    }

    // As `add_rows`.
    void add(const float *a, int64_t a_row, int64_t a_deep, const float *b, int64_t b_deep, int64_t depth) {
        of_rows([&](auto n) { add_rows<decltype(n)::value>(sums, a, a_row, a_deep, b, b_deep, depth); });
    }

    // Row i in memory, as a whole panel; of its columns `real` are there.
    template <typename Put>
    void each_row(int64_t real, Put put) const {
        for (int i = 0; i < rows(); ++i) {
            float row[WIDE];
            write(row, sums[i][0]);
            write(row + LANES, sums[i][1]);
            for (int64_t j = 0; j < real; ++j) put(i, j, row[j]);
        }
    }

    // The sums from memory, and to it: row(i) is where row i of them lies, `real` columns of which are there.
    template <typename Row>
    void take(Row row, int64_t real) {
        for (int i = 0; i < rows(); ++i) {
            float some[WIDE] = {};
            if (real < WIDE) std::memcpy(some, row(i), sizeof(float) * real);
            const float *from = real < WIDE ? some : row(i);
            sums[i][0] = read(from);
            sums[i][1] = read(from + LANES);
        }
    }

    template <typename Row>
    void give(Row row, int64_t real) const {
        if (real < WIDE) return each_row(real, [&](int i, int64_t j, float sum) { row(i)[j] = sum; });
        for (int i = 0; i < rows(); ++i) {
            write(row(i), sums[i][0]);
            write(row(i) + LANES, sums[i][1]);
        }
    }
};

// work(block, its first row) for rows `first` to `end`, TALL at a time.
template <typename Work>
inline void by_blocks(int64_t end, int64_t first, Work work) {
    for (; first + TALL <= end; first += TALL) {
        Block<TALL> block(TALL);
        work(block, first);
    }
    for (int rows; first < end; first += rows) {
        rows = int(end - first >= 6 ? 6 : end - first);
        Block<0> block(rows);
        work(block, first);
    }
}

// Part by part of `depth`, multiples of `grain` as deep as stays in the nearest cache: work(first, deep).
template <typename Work>
inline void by_depth(int64_t depth, int64_t deepest, int64_t grain, Work work) {
    const int64_t parts = (depth + deepest - 1) / deepest;
    const int64_t size = parts ? ((depth + parts - 1) / parts + grain - 1) / grain * grain : 0;
    for (int64_t first = 0; first < depth; first += size) work(first, depth - first < size ? depth - first : size);
}

// Rows of a product.
struct Stretch {
    int64_t start, rows;
};

// Rows of fp32 times panels of fp32, for `multiply`.
struct FloatProduct {
    const float *x;
    const int64_t x_row;
    const float *panels;
    const int64_t depth;
    static constexpr int64_t deepest = DEEPEST, grain = 1;

    void begin(int64_t, int64_t, int64_t) const {}  // rows are about to pass a part of a panel

    template <int ROWS>
    void add(Block<ROWS> &block, int64_t row, int64_t column, int64_t from, int64_t deep) const {
        block.add(x + row * x_row + from, x_row, 1, panels + column * depth + from * WIDE, WIDE, deep);
    }
};

// y [.., columns] = a product of some depth, for the rows of `stretches` stretches: stretch(0), stretch(1), ..., one
// behind the other, the last of which ends at `rows`. then(block, i, row, column) adds what else belongs to the sums,
// `row` being counted from the start of stretch i. What is read again and again stays in the caches: a part of a panel
// in the nearest, the rows of a chunk in the second.
template <typename Product, typename Which, typename Then>
inline void multiply(Product product, int64_t columns, float *y, int64_t y_row, int64_t rows, int64_t stretches,
                     Which stretch, Then then) {
    const int64_t deepest = rows > TALL ? Product::deepest : product.depth;
    by_depth(product.depth, deepest, Product::grain, [&](int64_t from, int64_t deep) {
        for (int64_t chunk = 0; chunk < rows; chunk += CHUNK_ROWS)
            for (int64_t column = 0; column < columns; column += WIDE) {
                const int64_t real = columns - column < WIDE ? columns - column : WIDE;
                product.begin(column, from, deep);
                for (int64_t i = 0; i < stretches; ++i) {
                    const Stretch here = stretch(i);
                    const int64_t first = chunk - here.start > 0 ? chunk - here.start : 0;
                    const int64_t end = chunk + CHUNK_ROWS - here.start;
                    by_blocks(end < here.rows ? end : here.rows, first, [&](auto &block, int64_t row) {
                        const int64_t at = here.start + row;
                        const auto to = [&](int i) { return y + (at + i) * y_row + column; };
                        for (int i = 0; i < block.rows(); ++i) __builtin_prefetch(to(i), 1);  // until sums are there
                        from ? block.take(to, real) : block.clear();
                        product.add(block, at, column, from, deep);
                        if (from + deep == product.depth) then(block, i, row, column);
                        block.give(to, real);
                    });
                }
            }
    });
}

// The same for rows 0 to `rows`.
template <typename Product>
inline void multiply(Product product, int64_t columns, float *y, int64_t y_row, int64_t rows) {
    multiply(product, columns, y, y_row, rows, 1, [&](int64_t) { return Stretch{0, rows}; },
             [](auto &, int64_t, int64_t, int64_t) {});
}

inline void multiply(const float *x, int64_t x_row, const float *panels, int64_t depth, int64_t columns, float *y,
                     int64_t y_row, int64_t rows) {
    multiply(FloatProduct{x, x_row, panels, depth}, columns, y, y_row, rows);
}

// One row times panels, to the same bits as `multiply`: four panels at once, or sums would wait for each other.
template <int TOGETHER = 4>
inline void multiply_row(const float *x, const float *panels, int64_t depth, int64_t columns, float *y) {
    for (; columns >= TOGETHER * WIDE; columns -= TOGETHER * WIDE, y += TOGETHER * WIDE) {
        Lanes sums[TOGETHER][2] = {};
        for (int64_t d = 0; d < depth; ++d)
            for (int i = 0; i < TOGETHER; ++i) {
                const float *at = panels + (i * depth + d) * WIDE;
                sums[i][0] += x[d] * read(at);
                sums[i][1] += x[d] * read(at + LANES);
            }
        for (int i = 0; i < TOGETHER; ++i) {
            write(y + i * WIDE, sums[i][0]);
            write(y + i * WIDE + LANES, sums[i][1]);
        }
        panels += TOGETHER * depth * WIDE;
    }
    if constexpr (TOGETHER > 1)
        multiply_row<TOGETHER - 1>(x, panels, depth, columns, y);
    else
        multiply(x, depth, panels, depth, columns, y, columns, 1);
}

}  // namespace
