// Instructions of PTX that generated kernels name: `ldmatrix` and `mma`, for elements of 16 bits, and `cp.async`.
#pragma once

#include <vector>

namespace emulate {

/// What a lane brings to `ldmatrix`: the row that it names, and its registers.
struct Rows {
    unsigned address;
    unsigned* to[4];
};

/// Loads matrices of 8 by 8 elements. Lane `8 m + r` names row `r` of matrix `m`; each lane gets two neighbours of a row, or of a
/// column where the matrices are transposed.
template <int count, bool transpose>
void load_matrices(const char* what, int line, Rows mine) {
    meet_warp(what, line, &mine, [](void* const* lanes) {
        for (unsigned n = 0; n < WARP; ++n)
            if (!lanes[n]) fail("ldmatrix by a warp without lane %u", n);
        for (int m = 0; m < count; ++m) {
            uint16_t matrix[8][8];
            for (int r = 0; r < 8; ++r) {
                const unsigned char* row = block_memory + static_cast<Rows*>(lanes[m * 8 + r])->address;
                if (reinterpret_cast<uintptr_t>(row) % 16)
                    fail("ldmatrix of a row at byte %u of the block's memory, no multiple of 16", unsigned(row - block_memory));
                for (int c = 0; c < 8; ++c) matrix[r][c] = reinterpret_cast<const uint16_t*>(row)[c];
            }
            for (unsigned n = 0; n < WARP; ++n) {
                auto at = [&](int r, int c) { return unsigned(transpose ? matrix[c][r] : matrix[r][c]); };
                int r = n / 4, c = n % 4 * 2;
                *static_cast<Rows*>(lanes[n])->to[m] = at(r, c) | at(r, c + 1) << 16;
            }
        }
    });
}

/// What a lane brings to `mma.m16n8k16`.
struct Operands {
    float* d[4];
    unsigned a[4], b[2];
    float c[4];
};

/// `d = a b + c`, one product after the other.
template <class T>
void multiply_matrices(int line, Operands mine) {
    meet_warp("mma.sync", line, &mine, [](void* const* lanes) {
        for (unsigned n = 0; n < WARP; ++n)
            if (!lanes[n]) fail("mma by a warp without lane %u", n);
        multiply(2 * 16 * 8 * 16);
        auto of = [&](int lane) -> Operands& { return *static_cast<Operands*>(lanes[lane]); };
        auto half = [](unsigned word, int high) {
            T x;
            x.bits = uint16_t(word >> 16 * high);
            return float(x);
        };
        float sums[16][8];
        for (int m = 0; m < 16; ++m)
            for (int n = 0; n < 8; ++n) {
                float sum = of(m % 8 * 4 + n / 2).c[m / 8 * 2 + n % 2];
                for (int k = 0; k < 16; ++k) {
                    int lane = k % 8 / 2;
                    float a = half(of(m % 8 * 4 + lane).a[k / 8 * 2 + m / 8], k % 2);
                    sum += a * half(of(n * 4 + lane).b[k / 8], k % 2);
                }
                sums[m][n] = sum;
            }
        for (int m = 0; m < 16; ++m)
            for (int n = 0; n < 8; ++n) *of(m % 8 * 4 + n / 2).d[m / 8 * 2 + n % 2] = sums[m][n];
    });
}

/// Copies that a thread has begun. What they bring is read at once, and there when the thread has waited; till then, the place
/// holds NaN.
struct Copies {
    struct Copy {
        unsigned to;
        int all;
        unsigned char bytes[16];
    };
    uint3 block;
    /// Those of the groups that it has not waited for, in order, and behind them those that are in no group yet.
    std::vector<std::vector<Copy>> groups = std::vector<std::vector<Copy>>(1);
    /// Whether products of groups of warps see what was copied: they read through another proxy.
    bool seen = true;

    /// Waits until so many groups are left.
    void wait(size_t left) {
        while (groups.size() - 1 > left) {
            seen &= groups.front().empty();
            for (const auto& copy : groups.front()) std::memcpy(block_memory + copy.to, copy.bytes, copy.all);
            groups.erase(groups.begin());
        }
    }
};

inline std::vector<Copies>& all_copies() {
    static std::vector<Copies> all;
    return all;
}

/// A thread of this block whose copies products do not see; the largest number if there is none.
inline unsigned unseen() {
    for (const Copies& one : all_copies())
        if (!one.seen && one.block.x == blockIdx.x && one.block.y == blockIdx.y && one.block.z == blockIdx.z) return unsigned(&one - all_copies().data());
    return ~0u;
}

inline Copies& copies() {
    std::vector<Copies>& all = all_copies();
    if (all.size() <= thread()) all.resize(thread() + 1);
    Copies& mine = all[thread()];
    // A thread may end without waiting.
    if (mine.block.x != blockIdx.x || mine.block.y != blockIdx.y || mine.block.z != blockIdx.z) mine.groups.assign(1, {}), mine.seen = true;
    mine.block = blockIdx;
    return mine;
}

}  // namespace emulate

/// Begins to copy `size` of `all` bytes into the block's memory, and zeros for the others.
inline void ptx_cp_async_ca_shared_cta_global(unsigned to, unsigned long long from, int all, int size) {
    auto* source = reinterpret_cast<const unsigned char*>(from);
    if ((all != 4 && all != 8 && all != 16) || size < 0 || size > all) emulate::fail("cp.async of %d of %d bytes", size, all);
    if (from % all || to % all)
        emulate::fail("cp.async from %p to byte %u of the block's memory, no multiples of %d", source, to, all);
    emulate::Copies::Copy copy{to, all, {}};
    for (int n = 0; n < size; ++n) copy.bytes[n] = source[n];
    for (int n = 0; n < all; ++n) emulate::block_memory[to + n] = 0xff;
    emulate::copies().groups.back().push_back(copy);
}
inline void ptx_cp_async_ca_shared_cta_global(unsigned to, unsigned long long from, int all) {
    ptx_cp_async_ca_shared_cta_global(to, from, all, all);
}
/// The same for 16 bytes, past the nearest cache.
inline void ptx_cp_async_cg_shared_cta_global(unsigned to, unsigned long long from, int all, int size) {
    if (all != 16) emulate::fail("cp.async.cg of %d bytes", all);
    ptx_cp_async_ca_shared_cta_global(to, from, all, size);
}
inline void ptx_cp_async_cg_shared_cta_global(unsigned to, unsigned long long from, int all) {
    ptx_cp_async_cg_shared_cta_global(to, from, all, all);
}

inline void ptx_cp_async_commit_group() { emulate::copies().groups.emplace_back(); }
inline void ptx_cp_async_wait_group(int left) { emulate::copies().wait(size_t(left)); }
inline void ptx_cp_async_wait_all() {
    ptx_cp_async_commit_group();
    ptx_cp_async_wait_group(0);
}

/// The place of a pointer in the block's memory.
inline size_t __cvta_generic_to_shared(const void* pointer) {
    return static_cast<const unsigned char*>(pointer) - emulate::block_memory;
}

#define LATENTC_LDMATRIX(suffix, transpose)                                                                          \
    inline void ptx_ldmatrix_sync_aligned_m8n8_x2##suffix##_shared_cta_b16(unsigned& a, unsigned& b, unsigned row,   \
                                                                           int line = __builtin_LINE()) {            \
        emulate::load_matrices<2, transpose>("ldmatrix", line, {row, {&a, &b}});                                     \
    }                                                                                                                \
    inline void ptx_ldmatrix_sync_aligned_m8n8_x4##suffix##_shared_cta_b16(unsigned& a, unsigned& b, unsigned& c,    \
                                                                           unsigned& d, unsigned row,                \
                                                                           int line = __builtin_LINE()) {            \
        emulate::load_matrices<4, transpose>("ldmatrix", line, {row, {&a, &b, &c, &d}});                             \
    }
LATENTC_LDMATRIX(, false)
LATENTC_LDMATRIX(_trans, true)
#undef LATENTC_LDMATRIX

#define LATENTC_MMA(name, exponent)                                                                                  \
    inline void ptx_mma_sync_aligned_m16n8k16_row_col_f32_##name##_##name##_f32(                                     \
        float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, \
        unsigned b1, float c0, float c1, float c2, float c3, int line = __builtin_LINE()) {                          \
        emulate::multiply_matrices<emulate::Narrow<exponent>>(                                                       \
            line, {{&d0, &d1, &d2, &d3}, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}});                             \
    }
LATENTC_MMA(bf16, 8)
LATENTC_MMA(f16, 5)
#undef LATENTC_MMA

namespace emulate {

/// A barrier with a number: how many threads have come since all of them last met, and how often they have.
struct Barrier {
    uint3 block;
    unsigned come, met;
};

inline Barrier& come_to(unsigned number, unsigned threads) {
    static Barrier all[16];
    if (number == 0 || number >= 16 || threads == 0 || threads % WARP) fail("barrier %u of %u threads", number, threads);
    Barrier& barrier = all[number];
    // Nothing is kept of another block.
    if (barrier.block.x != blockIdx.x || barrier.block.y != blockIdx.y || barrier.block.z != blockIdx.z) barrier = Barrier{blockIdx, 0, 0};
    if (++barrier.come == threads) barrier.come = 0, ++barrier.met;
    return barrier;
}

}  // namespace emulate

/// Waits for so many threads, of which some may have gone on.
inline void ptx_bar_sync(unsigned number, int threads, int line = __builtin_LINE()) {
    struct Mine {
        emulate::Barrier* barrier;
        unsigned met;
    };
    emulate::Barrier& barrier = emulate::come_to(number, unsigned(threads));
    Mine mine{&barrier, barrier.met - (barrier.come == 0)};
    emulate::wait_until(
        "bar.sync", line, [](void* mine) { return static_cast<Mine*>(mine)->barrier->met != static_cast<Mine*>(mine)->met; }, &mine);
}
inline void ptx_bar_arrive(unsigned number, int threads) { emulate::come_to(number, unsigned(threads)); }

/// A power of two; as exact as other functions are here.
inline void ptx_ex2_approx_ftz_f32(float& x) { x = std::exp2(x); }

#include "latentc_bulk.h"
#include "latentc_wgmma.h"
