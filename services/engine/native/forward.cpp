// A decoder-only transformer of the Llama family over paged KV: one call computes one launch, all layers, on CPU cores.
//
// Residuals, norms, rotary embedding and softmax in float32; matrix products in the weights' own type with float32 sums.
// Called by services/engine/native/forward.py, which has the same structs.
#include <cmath>
#include <cstdlib>
#include <new>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#include "amx_decode.h"
#include "amx_prefill.h"
#include "attention.h"
#include "ceilings.h"

namespace baton {

struct Layer {
    const float *input_norm, *q_norm, *k_norm, *output_norm;  // q_norm and k_norm: of each head, or null
    const float* bias;                                        // of query, key and value, or null
    const uint32_t *qkv, *o, *gate_up, *down;                 // packed, see `baton_pack`
};

struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, inner, vocabulary, bf16;
    float epsilon, scale;
    const Layer* layer;
    const float* final_norm;
    const void* embedding;  // [vocabulary, hidden]
    const uint32_t* head;
    const float *cos, *sin;  // [positions, head_dim / 2]
};

struct Launch {
    int64_t tokens, chunks, draws, threads;
    const int64_t *ids, *positions;  // [tokens]
    const Chunk* chunk;
    const int64_t* table;  // page ids
    const int64_t* keep;   // [draws]: rows whose logits are wanted
    float* logits;         // [draws, vocabulary padded to 32]
    char* pool;
    int64_t page_tokens;
};

struct Workspace {  // grows to the largest launch, then stays; in huge pages
    struct Piece {
        char* at = nullptr;
        size_t size = 0;
    } pieces[7];

    Workspace() = default;
    Workspace(const Workspace&) = delete;
    ~Workspace() {
        for (Piece& piece : pieces) std::free(piece.at);
    }

    template <class T>
    T* take(int which, long count) {
        constexpr size_t huge = 2 << 20;
        Piece& piece = pieces[which];
        if (piece.size < count * sizeof(T)) {
            std::free(piece.at);
            piece.size = (count * sizeof(T) * 5 / 4 + huge - 1) / huge * huge;
            piece.at = static_cast<char*>(std::aligned_alloc(huge, piece.size));
#ifdef MADV_HUGEPAGE
            if (piece.at) madvise(piece.at, piece.size, MADV_HUGEPAGE);
#endif
            if (!piece.at) throw std::bad_alloc();
        }
        return reinterpret_cast<T*>(piece.at);
    }
};

// RMS norm of `count` rows `[n]` of x, as E places them.
template <class E>
INLINE void norm(const float* x, const float* weight, long count, long n, float epsilon, typename E::T* out) {
    F by[E::unit] = {};
    for (long i = 0; i < n; i += W)
        for (long r = 0; r < count; ++r) {
            const F v = load<F>(x + E::place(r, i, n));
            by[r] += v * v;
        }
    for (long r = 0; r < count; ++r) by[r] = splat(1 / std::sqrt(sum(by[r]) / n + epsilon));
    for (long i = 0; i < n; i += W) {
        const F w = load<F>(weight + i);
        for (long r = 0; r < count; ++r) E::narrow(out + E::place(r, i, n), load<F>(x + E::place(r, i, n)) * by[r] * w);
    }
}

// Rotary embedding of one head `[head_dim]` in halves, with its norm before and `scale` behind it; out(column, 16 elements).
template <class Out>
INLINE void rotate(float* x, const float* weight, float epsilon, const float* cos, const float* sin, float scale, long dim, const Out& out) {
    if (weight) norm<Float>(x, weight, 1, dim, epsilon, x);
    for (long i = 0; i < dim / 2; i += W) {
        const F a = load<F>(x + i), b = load<F>(x + dim / 2 + i), c = load<F>(cos + i) * splat(scale), s = load<F>(sin + i) * splat(scale);
        out(i, a * c - b * s);
        out(dim / 2 + i, b * c + a * s);
    }
}

INLINE F silu(F x) { return x * inverse(splat(1.f) + exp2(x * splat(-1.44269504f))); }

template <class E>
void attend(const Model& m, const Launch& l, const Pages& pages, typename E::T* q, Workspace& space) {
    const long dim = m.head_dim, group = m.heads / m.kv_heads, width = m.heads * dim, lanes = dim / E::step;
    std::vector<const Chunk*> singles;
    for (long i = 0; i < l.chunks; ++i) {
        const Chunk& c = l.chunk[i];
        const int64_t* table = l.table + c.pages;
        const long tokens = c.start + c.tokens;
        if (c.tokens == 1) {
            singles.push_back(&c);
            continue;
        }
        const long room = padded(tokens);
        auto* keys = space.take<uint32_t>(5, m.kv_heads * room * lanes);
        auto* values = space.take<uint32_t>(6, m.kv_heads * room * lanes);
        const long blocks = Prefill<E>::blocks(c.tokens, group);
#pragma omp parallel num_threads(l.threads) if (l.threads > 1)
        {
            typename E::Session session;
            Prefill<E> prefill(dim);
#pragma omp for
            for (long t = 0; t < m.kv_heads * (room / W); ++t) {
                const long head = t / (room / W);
                gather<E>(pages, table, tokens, head, t % (room / W), keys + head * room * lanes, values + head * room * lanes);
            }
#pragma omp for schedule(dynamic)
            for (long t = 0; t < m.kv_heads * blocks; ++t) {
                const long head = t % m.kv_heads, more = head * room * lanes;
                prefill.run({keys + more, values + more, c.start, c.tokens, group, dim}, {q, c.first, head * group * dim, width},
                            blocks - 1 - t / m.kv_heads);  // the longest first
            }
        }
    }
    if (singles.empty()) return;
    long longest = 0;
    for (const Chunk* c : singles) longest = std::max(longest, long(c->start) + 1);
    const long size = decode_scratch(longest, dim);
    auto* scratch = space.take<float>(5, size * l.threads);
#pragma omp parallel num_threads(l.threads) if (l.threads > 1)
    {
        typename E::Session session;
#ifdef _OPENMP
        float* mine = scratch + size * omp_get_thread_num();
#else
        float* mine = scratch;
#endif
#pragma omp for schedule(dynamic)
        for (long t = 0; t < long(singles.size()) * m.kv_heads; ++t) {
            const Chunk& c = *singles[t / m.kv_heads];
            const long head = t % m.kv_heads;
            decode<E>(pages, l.table + c.pages, c.start + 1, head, group, {q, c.first, head * group * dim, width}, mine);
        }
    }
}

// Tokens that pass through a layer's products together: each time its weights come from memory once, and activations from a cache.
constexpr long BLOCK_TOKENS = MOST_ROWS;

template <class E>
struct Forward {
    using T = typename E::T;
    const Model& m;
    const Launch& l;
    Workspace& space;
    const long tokens = l.tokens, hidden = m.hidden, dim = m.head_dim, q_width = m.heads * dim, kv_width = m.kv_heads * dim;
    const long width = q_width + 2 * kv_width, room = (width + COLUMNS - 1) / COLUMNS * COLUMNS;
    const long block = std::min(BLOCK_TOKENS, std::max(tokens, long(l.draws)));
    const int threads = l.threads;
    float* x = space.take<float>(0, (tokens + E::unit) * hidden);                // residuals; all of these as E places them
    T* normed = space.take<T>(1, (block + E::unit) * hidden);                  // of a block, as are the next and the last
    float* qkv = space.take<float>(2, (block + E::unit) * room);
    T* q = space.take<T>(3, (tokens + E::unit) * q_width);                     // queries, and then what attention makes of them
    T* inner = space.take<T>(4, (block + E::unit) * m.inner);
    std::vector<const Chunk*> owner = std::vector<const Chunk*>(tokens);

    void run() {
        for (long i = 0; i < l.chunks; ++i) std::fill_n(owner.begin() + l.chunk[i].first, l.chunk[i].tokens, l.chunk + i);
        for (long t = 0; t < tokens; ++t)
            for (long i = 0; i < hidden; i += W) store(x + E::place(t, i, hidden), E::widen(static_cast<const T*>(m.embedding) + l.ids[t] * hidden + i));
        for (long n = 0; n < m.layers; ++n) {
            const Pages pages{l.pool, m.layers, m.kv_heads, l.page_tokens, dim, n};
            for (long t = 0; t < tokens; t += block) before(m.layer[n], pages, t, std::min(block, tokens - t));
            attend<E>(m, l, pages, q, space);
            for (long t = 0; t < tokens; t += block) behind(m.layer[n], t, std::min(block, tokens - t));
        }
        for (long i = 0; i < l.draws; i += block) logits(i, std::min(block, l.draws - i));
    }

    // Queries, keys and values of `count` tokens from `first` on.
    void before(const Layer& layer, const Pages& pages, long first, long count) {
        norms(first, count, layer.input_norm);
        gemm<E>(normed, layer.qkv, count, width, hidden, threads, [&](long row, long column, F a, F b) {
            if (layer.bias) a += load<F>(layer.bias + column), b += load<F>(layer.bias + column + W);
            store(qkv + E::place(row, column, room), a);
            store(qkv + E::place(row, column + W, room), b);
        });
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (long i = 0; i < count; ++i) {
            const long t = first + i, position = l.positions[t], at = position % l.page_tokens;
            const long page = l.table[owner[t]->pages + position / l.page_tokens];
            const float *cos = m.cos + position * (dim / 2), *sin = m.sin + position * (dim / 2);
            float own[MOST_HEAD];
            const auto head = [&](long column) {
                for (long c = 0; c < dim; c += W) store(own + c, load<F>(qkv + E::place(i, column + c, room)));
                return own;
            };
            for (long h = 0; h < m.heads; ++h)
                rotate(head(h * dim), layer.q_norm, m.epsilon, cos, sin, m.scale * 1.44269504f, dim,
                       [&](long c, F v) { E::narrow(q + E::place(t, h * dim + c, q_width), v); });
            for (long h = 0; h < m.kv_heads; ++h) {
                T *key = pages.row<E>(page, 0, h, at), *value = pages.row<E>(page, 1, h, at);
                rotate(head(q_width + h * dim), layer.k_norm, m.epsilon, cos, sin, 1, dim, [&](long c, F v) { E::narrow(key + c, v); });
                for (long c = 0; c < dim; c += W) E::narrow(value + c, load<F>(qkv + E::place(i, q_width + kv_width + h * dim + c, room)));
            }
        }
    }

    void behind(const Layer& layer, long first, long count) {
        const auto add = [&](long row, long column, F a, F b) {
            float *to = x + E::place(first + row, column, hidden), *next = x + E::place(first + row, column + W, hidden);
            store(to, load<F>(to) + a);
            store(next, load<F>(next) + b);
        };
        gemm<E>(q + first * q_width, layer.o, count, hidden, q_width, threads, add);
        norms(first, count, layer.output_norm);
        gemm<E>(normed, layer.gate_up, count, 2 * m.inner, hidden, threads,
                [&](long row, long column, F gate, F up) { E::narrow(inner + E::place(row, column / 2, m.inner), silu(gate) * up); });
        gemm<E>(inner, layer.down, count, hidden, m.inner, threads, add);
    }

    void logits(long first, long count) {
        const long vocabulary = (m.vocabulary + COLUMNS - 1) / COLUMNS * COLUMNS;
        for (long i = 0; i < count; ++i) {
            float* row = qkv;
            for (long c = 0; c < hidden; c += W) store(row + c, load<F>(x + E::place(l.keep[first + i], c, hidden)));
            norm<Float>(row, m.final_norm, 1, hidden, m.epsilon, row);
            for (long c = 0; c < hidden; c += W) E::narrow(normed + E::place(i, c, hidden), load<F>(row + c));
        }
        gemm<E>(normed, m.head, count, m.vocabulary, hidden, threads, [&](long row, long column, F a, F b) {
            float* to = l.logits + (first + row) * vocabulary + column;
            store(to, a);
            store(to + W, b);
        });
    }

    void norms(long first, long count, const float* weight) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (long i = 0; i < count; i += E::unit)
            norm<E>(x + (first + i) * hidden, weight, std::min(long(E::unit), count - i), hidden, m.epsilon, normed + i * hidden);
    }
};

}  // namespace baton

extern "C" {

void* baton_workspace() { return new baton::Workspace; }
void baton_release(void* space) { delete static_cast<baton::Workspace*>(space); }

void baton_forward(const baton::Model* model, const baton::Launch* launch, void* space) {
    auto& own = *static_cast<baton::Workspace*>(space);
#ifdef __AMX_BF16__
    const bool whole = model->hidden % 32 == 0 && model->inner % 32 == 0 && model->head_dim % 32 == 0;
    if (model->bf16 && whole) return baton::Forward<baton::Amx>{*model, *launch, own}.run();
#endif
    model->bf16 ? baton::Forward<baton::Bf16>{*model, *launch, own}.run() : baton::Forward<baton::Float>{*model, *launch, own}.run();
}

// Weights `[rows][lanes]` into panels `[rows / 32][lanes][32]`, zeros behind the last row.
void baton_pack(const uint32_t* from, int64_t rows, int64_t lanes, uint32_t* to) {
    for (int64_t n = 0; n < (rows + 31) / 32 * 32; ++n)
        for (int64_t k = 0; k < lanes; ++k) to[n / 32 * lanes * 32 + k * 32 + n % 32] = n < rows ? from[n * lanes + k] : 0;
}

// For the benchmark: rows to where the kernels want them, or back.
void baton_arrange(int64_t bf16, const void* from, int64_t rows, int64_t width, int64_t back, void* to) {
#ifdef __AMX_BF16__
    if (bf16) return baton::arrange<baton::Amx>(from, rows, width, back, to);
#endif
    bf16 ? baton::arrange<baton::Bf16>(from, rows, width, back, to) : baton::arrange<baton::Float>(from, rows, width, back, to);
}

// For the benchmark, on arranged rows. `inner` is a multiple of 32; behind `rows` there is room for 16 more.
void baton_gemm(int64_t bf16, const void* activations, const uint32_t* weights, int64_t rows, int64_t columns, int64_t inner, int64_t threads,
                void* out) {
#ifdef __AMX_BF16__
    if (bf16) return baton::bare_gemm<baton::Amx>(activations, weights, rows, columns, inner, threads, out);
#endif
    if (bf16) return baton::bare_gemm<baton::Bf16>(activations, weights, rows, columns, inner, threads, out);
    baton::bare_gemm<baton::Float>(activations, weights, rows, columns, inner, threads, out);
}

float baton_read(const float* from, int64_t count, int64_t threads) { return baton::read_all(from, count, threads); }
}
