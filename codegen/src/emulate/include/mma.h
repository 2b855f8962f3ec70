// Products of matrix tiles by a warp: nvcuda::wmma.
//
// Which lane holds which element is nobody's business on a GPU. Here a fragment is dealt out to the lanes one element after the other,
// which is like no hardware.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda::wmma {

struct row_major;
struct col_major;
struct matrix_a;
struct matrix_b;
struct accumulator;
enum layout_t { mem_row_major, mem_col_major };

namespace precision {
struct tf32;
}

/// The nearest number of 11 significant bits.
inline float __float_to_tf32(float x) {
    return latentc_bits<float>((latentc_bits<uint32_t>(x) + 0x1000) & ~0x1fffu);
}

/// How an element is held, and what the multipliers see of it.
template <class T>
struct Element {
    using Held = T;
    static T seen(T x) { return x; }
};
template <>
struct Element<precision::tf32> {
    using Held = float;
    static float seen(float x) { return latentc_bits<float>(latentc_bits<uint32_t>(x) & ~0x1fffu); }
};

/// A lane's part of a tile: of `A` (m by k), `B` (k by n) or the sums (m by n). Its elements are NaN until they are set.
template <class Use, int m, int n, int k, class T, class Layout = void>
struct fragment {
    static constexpr int rows = std::is_same_v<Use, matrix_b> ? k : m;
    static constexpr int columns = std::is_same_v<Use, matrix_a> ? k : n;
    static constexpr int num_elements = rows * columns / emulate::WARP;
    using element_type = typename Element<T>::Held;

    element_type x[num_elements];

    fragment() { std::memset(static_cast<void*>(x), 0xff, sizeof x); }
};

/// A tile's element among the parts of all lanes.
template <class F>
auto& at(void* const* lanes, int row, int column) {
    int number = row * F::columns + column;
    return static_cast<F*>(lanes[number % emulate::WARP])->x[number / emulate::WARP];
}

inline void whole(const char* what, void* const* lanes) {
    for (unsigned n = 0; n < emulate::WARP; ++n)
        if (!lanes[n]) emulate::fail("%s by a warp without lane %u", what, n);
}

/// What a lane brings to a load or a store.
template <class F, class P>
struct Transfer {
    F* part;
    P* memory;
    unsigned stride;
    bool by_rows;
};

/// Checks that the lanes agree and the hardware's demands, and visits each element with its place in memory.
template <class F, class P, class Visit>
void transfer(const char* what, void* const* lanes, Visit visit) {
    whole(what, lanes);
    auto& one = *static_cast<Transfer<F, P>*>(lanes[0]);
    void* parts[emulate::WARP];
    for (unsigned n = 0; n < emulate::WARP; ++n) {
        auto& other = *static_cast<Transfer<F, P>*>(lanes[n]);
        if (other.memory != one.memory || other.stride != one.stride)
            emulate::fail("%s with other addresses in lane %u than in lane 0", what, n);
        parts[n] = (void*)other.part;
    }
    if (reinterpret_cast<uintptr_t>(one.memory) % 32)
        emulate::fail("%s at %p, which is no multiple of 32 bytes", what, (void*)one.memory);
    if (one.stride * sizeof(P) % 16)
        emulate::fail("%s with rows %zu bytes apart, no multiple of 16", what, one.stride * sizeof(P));
    for (int row = 0; row < F::rows; ++row)
        for (int column = 0; column < F::columns; ++column) {
            size_t place = one.by_rows ? row * one.stride + column : column * one.stride + row;
            visit(at<F>(parts, row, column), one.memory[place]);
        }
}

template <class F, class P>
void load(F& part, const P* memory, unsigned stride, bool by_rows, int line) {
    static_assert(sizeof(P) == sizeof(typename F::element_type));
    Transfer<F, const P> mine{&part, memory, stride, by_rows};
    emulate::meet_warp("wmma::load_matrix_sync", line, &mine, [](void* const* lanes) {
        transfer<F, const P>("wmma::load_matrix_sync", lanes, [](auto& element, const P& place) {
            std::memcpy(static_cast<void*>(&element), &place, sizeof place);
        });
    });
}

template <class Use, int m, int n, int k, class T, class Layout, class P>
void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& part, const P* memory, unsigned stride,
                      int line = __builtin_LINE()) {
    load(part, memory, stride, std::is_same_v<Layout, row_major>, line);
}
template <int m, int n, int k, class T, class P>
void load_matrix_sync(fragment<accumulator, m, n, k, T>& part, const P* memory, unsigned stride, layout_t layout,
                      int line = __builtin_LINE()) {
    load(part, memory, stride, layout == mem_row_major, line);
}

template <int m, int n, int k, class T, class P>
void store_matrix_sync(P* memory, const fragment<accumulator, m, n, k, T>& part, unsigned stride, layout_t layout,
                       int line = __builtin_LINE()) {
    using F = const fragment<accumulator, m, n, k, T>;
    static_assert(sizeof(P) == sizeof(T));
    Transfer<F, P> mine{&part, memory, stride, layout == mem_row_major};
    emulate::meet_warp("wmma::store_matrix_sync", line, &mine, [](void* const* lanes) {
        transfer<F, P>("wmma::store_matrix_sync", lanes, [](auto& element, P& place) {
            std::memcpy(static_cast<void*>(&place), &element, sizeof place);
        });
    });
}

template <class Use, int m, int n, int k, class T, class Layout, class V>
void fill_fragment(fragment<Use, m, n, k, T, Layout>& part, V value) {
    for (auto& element : part.x) element = typename Element<T>::Held(value);
}

/// What a lane brings to a product.
struct Product {
    void *d, *a, *b, *c;
};

/// `d = a b + c`, summed one product after the other in f32 (or i32) and rounded to the dtype of `d` once.
template <int m, int n, int k, class D, class A, class LA, class B, class LB, class C>
void mma_sync(fragment<accumulator, m, n, k, D>& d, const fragment<matrix_a, m, n, k, A, LA>& a,
              const fragment<matrix_b, m, n, k, B, LB>& b, const fragment<accumulator, m, n, k, C>& c,
              int line = __builtin_LINE()) {
    Product mine{&d, (void*)&a, (void*)&b, (void*)&c};
    emulate::meet_warp("wmma::mma_sync", line, &mine, [](void* const* lanes) {
        whole("wmma::mma_sync", lanes);
        emulate::multiply(2 * m * n * k);
        void *to[emulate::WARP], *left[emulate::WARP], *right[emulate::WARP], *old[emulate::WARP];
        for (unsigned lane = 0; lane < emulate::WARP; ++lane) {
            auto& product = *static_cast<Product*>(lanes[lane]);
            to[lane] = product.d, left[lane] = product.a, right[lane] = product.b, old[lane] = product.c;
        }
        using Sum = std::conditional_t<std::is_integral_v<C>, int, float>;
        Sum rows[m][k], columns[n][k];
        for (int i = 0; i < m; ++i)
            for (int l = 0; l < k; ++l)
                rows[i][l] = Element<A>::seen(at<fragment<matrix_a, m, n, k, A, LA>>(left, i, l));
        for (int j = 0; j < n; ++j)
            for (int l = 0; l < k; ++l)
                columns[j][l] = Element<B>::seen(at<fragment<matrix_b, m, n, k, B, LB>>(right, l, j));
        for (int i = 0; i < m; ++i)
            for (int j = 0; j < n; ++j) {
                Sum sum = at<fragment<accumulator, m, n, k, C>>(old, i, j);
                for (int l = 0; l < k; ++l) sum += rows[i][l] * columns[j][l];
                at<fragment<accumulator, m, n, k, D>>(to, i, j) = D(sum);
            }
    });
}

}  // namespace nvcuda::wmma
