// Instructions of PTX for products of groups of four warps, which read their operands from the block's memory (PTX ISA, "Asynchronous
// Warpgroup Level Matrix Multiply-Accumulate Instructions").
//
// Each warp multiplies its 16 of 64 rows by itself. What it reads is read at once or when it is waited for, as the seed says; the
// sums hold NaN till then.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <tuple>
#include <vector>

namespace emulate {

/// A matrix that an operand describes: where it begins, and how far it is to the next 64 numbers and to the next eight runs.
struct Described {
    unsigned start, lead, stride;
    /// Whether numbers of one depth lie behind one another, not those of one row.
    bool across;

    static Described of(unsigned long long bits, int across) {
        auto bytes = [&](int at) { return unsigned(bits >> at & 0x3fff) << 4; };
        Described d{bytes(0), bytes(16), bytes(32), across != 0};
        if (bits >> 62 != 1) fail("wgmma of an operand whose packs are turned in mode %u", unsigned(bits >> 62));
        if (bits >> 49 & 7) fail("wgmma of an operand with a base offset");
        // Packs are turned by the bits of addresses: the first run is one that is not turned.
        if (d.start % 1024 / 128) fail("wgmma of an operand at byte %u of the block's memory, within eight runs", d.start);
        return d;
    }

    /// The number of a row (or column) and a depth.
    uint16_t at(unsigned line, unsigned k) const {
        unsigned place = across ? start + line / 64 * lead + k / 8 * stride + k % 8 * 128 + line % 64 * 2
                                : start + line / 8 * stride + line % 8 * 128 + k * 2;
        place ^= (place >> 7 & 7) << 4;
        return *reinterpret_cast<const uint16_t*>(block_memory + place);
    }
};

/// What a lane brings to a product: sums, and descriptors of its operands. The left one may be in registers, each of which holds two numbers.
struct GroupOperands {
    std::vector<float*> d;
    const unsigned* registers[4];
    bool in_registers;
    unsigned long long a, b;
    int add, across_a, across_b;
};

/// The products that a warp has begun.
struct Products {
    /// The operands of one, in f32, and the sums of each lane.
    struct Product {
        int columns, add;
        bool read;
        bool in_registers;
        Described a, b;
        float (*number)(uint16_t);
        std::vector<float> left, right;
        std::vector<std::vector<float*>> sums;
        std::vector<std::array<const unsigned*, 4>> registers;

        /// Of the left operand, the number of a row of this warp and a depth. In registers it lies as that of `mma.m16n8k16` does.
        uint16_t left_at(unsigned warp, unsigned m, unsigned k) const {
            if (!in_registers) return a.at(warp % 4 * 16 + m, k);
            return uint16_t(*registers[m % 8 * 4 + k % 8 / 2][k / 8 * 2 + m / 8] >> 16 * (k % 2));
        }
    };
    /// What a register will hold, and how many products have yet to be added.
    struct Pending {
        float value;
        unsigned products;
    };
    uint3 block;
    bool fenced = false;
    /// Those of the groups that were not waited for, and behind them those that are in none yet.
    std::vector<std::vector<Product>> groups = std::vector<std::vector<Product>>(1);
    std::map<float*, Pending> pending;

    static void read(Product& p, unsigned warp) {
        p.read = true;
        for (unsigned m = 0; m < 16; ++m)
            for (unsigned k = 0; k < 16; ++k) p.left.push_back(p.number(p.left_at(warp, m, k)));
        for (int n = 0; n < p.columns; ++n)
            for (unsigned k = 0; k < 16; ++k) p.right.push_back(p.number(p.b.at(n, k)));
    }

    void finish(Product& p, unsigned warp) {
        if (!p.read) read(p, warp);
        for (int m = 0; m < 16; ++m)
            for (int n = 0; n < p.columns; ++n) {
                float* to = p.sums[m % 8 * 4 + n % 8 / 2][n / 8 * 4 + m / 8 * 2 + n % 2];
                Pending& sum = pending[to];
                float value = p.add ? sum.value : 0;
                for (int k = 0; k < 16; ++k) value += p.left[m * 16 + k] * p.right[n * 16 + k];
                sum.value = value;
                if (--sum.products == 0) {
                    *to = value;
                    pending.erase(to);
                }
            }
    }

    void wait(size_t left, unsigned warp) {
        while (groups.size() - 1 > left) {
            for (Product& p : groups.front()) finish(p, warp);
            groups.erase(groups.begin());
        }
    }
};

inline unsigned warp() { return thread() / WARP; }

inline Products& products() {
    static std::vector<Products> all;
    if (all.size() <= warp()) all.resize(warp() + 1);
    Products& mine = all[warp()];
    // A warp may end without waiting.
    if (mine.block.x != blockIdx.x || mine.block.y != blockIdx.y || mine.block.z != blockIdx.z) mine = Products();
    mine.block = blockIdx;
    return mine;
}

/// Begins to add a product of 64 rows, so many columns and 16 numbers of depth.
template <class T, int columns>
void multiply_group(int line, GroupOperands mine) {
    meet_warp("wgmma.mma_async", line, &mine, [](void* const* lanes) {
        for (unsigned n = 0; n < WARP; ++n)
            if (!lanes[n]) fail("wgmma by a warp without lane %u", n);
        multiply(2 * 16 * columns * 16);
        auto of = [&](unsigned lane) -> GroupOperands& { return *static_cast<GroupOperands*>(lanes[lane]); };
        for (unsigned n = 1; n < WARP; ++n)
            if (of(n).a != of(0).a || of(n).b != of(0).b) fail("wgmma where lane %u describes other operands", n);
        if (unsigned writer = unseen(); writer != ~0u) fail("wgmma may read what thread %u has copied without a fence of proxies", writer);
        Products& products = emulate::products();
        if (!products.fenced) fail("wgmma in a group without wgmma.fence");
        bool in_registers = of(0).in_registers;
        Described left = in_registers ? Described{} : Described::of(of(0).a, of(0).across_a);
        Products::Product p{columns, of(0).add, false, in_registers, left, Described::of(of(0).b, of(0).across_b)};
        p.number = [](uint16_t bits) {
            T x;
            x.bits = bits;
            return float(x);
        };
        for (unsigned n = 0; n < WARP; ++n) {
            for (float* d : of(n).d) {
                ++products.pending.try_emplace(d, Products::Pending{*d, 0}).first->second.products;
                *d = std::numeric_limits<float>::quiet_NaN();
            }
            p.sums.push_back(of(n).d);
            p.registers.push_back(std::to_array(of(n).registers));
        }
        if (choose(2)) Products::read(p, warp());
        products.groups.back().push_back(std::move(p));
    });
}

/// An instruction on the products of a warp.
template <class F>
void of_products(const char* what, int line, F) {
    meet_warp(what, line, &line, [](void* const*) { F()(products()); });
}

/// The sums, then the descriptors of both operands, or four registers and the descriptor of the right one; whether it adds; and which of
/// the described operands lie across.
template <class T, int columns, class... O>
void product(int line, O&&... operands) {
    constexpr size_t sums = columns / 2;
    constexpr bool in_registers = sizeof...(O) == sums + 7;
    static_assert(in_registers || sizeof...(O) == sums + 5, "a unit has half as many sums as there are columns");
    auto all = std::forward_as_tuple(operands...);
    GroupOperands mine{};
    [&]<size_t... n>(std::index_sequence<n...>) {
        (mine.d.push_back(&std::get<n>(all)), ...);
    }(std::make_index_sequence<sums>());
    mine.in_registers = in_registers;
    if constexpr (in_registers) {
        [&]<size_t... n>(std::index_sequence<n...>) {
            ((mine.registers[n] = &std::get<sums + n>(all)), ...);
        }(std::make_index_sequence<4>());
        std::tie(mine.b, mine.add, mine.across_b) =
            std::make_tuple(std::get<sums + 4>(all), std::get<sums + 5>(all), std::get<sums + 6>(all));
    } else {
        std::tie(mine.a, mine.b, mine.add, mine.across_a, mine.across_b) =
            std::make_tuple(std::get<sums>(all), std::get<sums + 1>(all), std::get<sums + 2>(all),
                            std::get<sums + 3>(all), std::get<sums + 4>(all));
    }
    multiply_group<T, columns>(line, std::move(mine));
}

/// Waits for all groups but so many. The registers are named so that compilers know that they change.
template <class... O>
void wait_products(int line, O&&... operands) {
    int left = int((operands, ...));
    struct Mine {
        int left;
    } mine{left};
    meet_warp("wgmma.wait_group", line, &mine, [](void* const* lanes) {
        for (unsigned n = 0; n < WARP; ++n)
            if (lanes[n]) return products().wait(size_t(static_cast<Mine*>(lanes[n])->left), warp());
    });
}

}  // namespace emulate

inline void ptx_wgmma_fence_sync_aligned(int line = __builtin_LINE()) {
    emulate::of_products("wgmma.fence", line, [](emulate::Products& p) { p.fenced = true; });
}
inline void ptx_wgmma_commit_group_sync_aligned(int line = __builtin_LINE()) {
    emulate::of_products("wgmma.commit_group", line, [](emulate::Products& p) { p.groups.emplace_back(), p.fenced = false; });
}
#define ptx_wgmma_wait_group_sync_aligned(...) emulate::wait_products(__LINE__, __VA_ARGS__)

/// What this thread has copied is seen by products from now on.
inline void ptx_fence_proxy_async_shared_cta() { emulate::copies().seen = true; }

#define ptx_wgmma_mma_async_sync_aligned_m64n64k16_f32_bf16_bf16(...) emulate::product<emulate::Narrow<8>, 64>(__LINE__, __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n80k16_f32_bf16_bf16(...) emulate::product<emulate::Narrow<8>, 80>(__LINE__, __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n96k16_f32_bf16_bf16(...) emulate::product<emulate::Narrow<8>, 96>(__LINE__, __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n128k16_f32_bf16_bf16(...) emulate::product<emulate::Narrow<8>, 128>(__LINE__, __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n160k16_f32_bf16_bf16(...) emulate::product<emulate::Narrow<8>, 160>(__LINE__, __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n192k16_f32_bf16_bf16(...) emulate::product<emulate::Narrow<8>, 192>(__LINE__, __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n256k16_f32_bf16_bf16(...) emulate::product<emulate::Narrow<8>, 256>(__LINE__, __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n64k16_f32_f16_f16(...) emulate::product<emulate::Narrow<5>, 64>(__LINE__, __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n80k16_f32_f16_f16(...) emulate::product<emulate::Narrow<5>, 80>(__LINE__, __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n96k16_f32_f16_f16(...) emulate::product<emulate::Narrow<5>, 96>(__LINE__, __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n128k16_f32_f16_f16(...) emulate::product<emulate::Narrow<5>, 128>(__LINE__, __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n160k16_f32_f16_f16(...) emulate::product<emulate::Narrow<5>, 160>(__LINE__, __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n192k16_f32_f16_f16(...) emulate::product<emulate::Narrow<5>, 192>(__LINE__, __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n256k16_f32_f16_f16(...) emulate::product<emulate::Narrow<5>, 256>(__LINE__, __VA_ARGS__)
