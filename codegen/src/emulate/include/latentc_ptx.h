// Instructions of PTX that generated kernels name: `ldmatrix` and `mma`, for elements of 16 bits, `cp.async`, and barriers with a number.
// What they do is in `units.cpp`, which is compiled once for all programs.
#pragma once

namespace emulate {

/// What a lane brings to `ldmatrix`: the row that it names, its registers, how many matrices there are, and whether they are transposed.
struct Rows {
    unsigned address;
    unsigned* to[4];
    int count;
    bool transposed;
};

/// Loads matrices of 8 by 8 elements. Lane `8 m + r` names row `r` of matrix `m`; each lane gets two neighbours of a row, or of a
/// column where the matrices are transposed.
void load_matrices(int line, Rows mine);

/// Adds the products of what two words hold: of two numbers of 16 bits each, one after the other.
using Multiply = float (*)(float sum, unsigned a, unsigned b);
template <class T>
float halves(float sum, unsigned a, unsigned b) {
    auto number = [](unsigned word, int high) {
        T x;
        x.bits = uint16_t(word >> 16 * high);
        return float(x);
    };
    for (int high = 0; high < 2; ++high) sum += number(a, high) * number(b, high);
    return sum;
}
/// The same of one number each, in f32, whose last 13 bits are not looked at.
inline float tf32(float sum, unsigned a, unsigned b) {
    auto number = [](unsigned word) {
        float x;
        word &= ~0x1fffu;
        std::memcpy(&x, &word, 4);
        return x;
    };
    return sum + number(a) * number(b);
}

/// What a lane brings to `mma.m16n8k16`, or to `mma.m16n8k8` of numbers of 32 bits.
struct Operands {
    float* d[4];
    unsigned a[4], b[2];
    float c[4];
    Multiply multiply;
    /// Numbers of depth.
    int depth;
};

/// `d = a b + c`, one product after the other.
void multiply_matrices(int line, Operands mine);

}  // namespace emulate

/// Begins to copy `size` of `all` bytes into the block's memory, and zeros for the others.
void ptx_cp_async_ca_shared_cta_global(unsigned to, unsigned long long from, int all, int size);
void ptx_cp_async_ca_shared_cta_global(unsigned to, unsigned long long from, int all);
/// The same for 16 bytes, past the nearest cache.
void ptx_cp_async_cg_shared_cta_global(unsigned to, unsigned long long from, int all, int size);
void ptx_cp_async_cg_shared_cta_global(unsigned to, unsigned long long from, int all);
void ptx_cp_async_commit_group();
void ptx_cp_async_wait_group(int left);
void ptx_cp_async_wait_all();

/// The place of a pointer in the block's memory.
inline size_t __cvta_generic_to_shared(const void* pointer) {
    return static_cast<const unsigned char*>(pointer) - emulate::block_memory;
}

#define LATENTC_LDMATRIX(suffix, transposed)                                                                         \
    inline void ptx_ldmatrix_sync_aligned_m8n8_x2##suffix##_shared_cta_b16(unsigned& a, unsigned& b, unsigned row,   \
                                                                           int line = __builtin_LINE()) {            \
        emulate::load_matrices(line, {row, {&a, &b}, 2, transposed});                                                \
    }                                                                                                                \
    inline void ptx_ldmatrix_sync_aligned_m8n8_x4##suffix##_shared_cta_b16(unsigned& a, unsigned& b, unsigned& c,    \
                                                                           unsigned& d, unsigned row,                \
                                                                           int line = __builtin_LINE()) {            \
        emulate::load_matrices(line, {row, {&a, &b, &c, &d}, 4, transposed});                                        \
    }
LATENTC_LDMATRIX(, false)
LATENTC_LDMATRIX(_trans, true)
#undef LATENTC_LDMATRIX

#define LATENTC_MMA(name, k, product)                                                                                \
    inline void ptx_mma_sync_aligned_m16n8k##k##_row_col_f32_##name##_##name##_f32(                                  \
        float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, \
        unsigned b1, float c0, float c1, float c2, float c3, int line = __builtin_LINE()) {                          \
        emulate::multiply_matrices(line, {{&d0, &d1, &d2, &d3},                                                      \
                                          {a0, a1, a2, a3},                                                          \
                                          {b0, b1},                                                                  \
                                          {c0, c1, c2, c3},                                                          \
                                          emulate::product,                                                          \
                                          k});                                                                       \
    }
LATENTC_MMA(bf16, 16, halves<emulate::Narrow<8>>)
LATENTC_MMA(f16, 16, halves<emulate::Narrow<5>>)
LATENTC_MMA(tf32, 8, tf32)
#undef LATENTC_MMA

/// Waits for so many threads, of which some may have gone on.
void ptx_bar_sync(unsigned number, int threads, int line = __builtin_LINE());
void ptx_bar_arrive(unsigned number, int threads);

/// A power of two; as exact as other functions are here.
inline void ptx_ex2_approx_ftz_f32(float& x) { x = std::exp2(x); }

#include "latentc_bulk.h"
#include "latentc_wgmma.h"
