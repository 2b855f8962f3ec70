// The parts of CUDA C++ that generated kernels use, for a C++ compiler of the host.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
// Threads of a block share one process, and blocks run one after the other.
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// --- vectors -------------------------------------------------------------------------------------------

#define LATENTC_VECTORS(T, name)                                  \
    struct __attribute__((aligned(2 * sizeof(T)))) name##2 {      \
        T x, y;                                                   \
    };                                                            \
    struct name##3 {                                              \
        T x, y, z;                                                \
    };                                                            \
    struct __attribute__((aligned(4 * sizeof(T)))) name##4 {      \
        T x, y, z, w;                                             \
    };                                                            \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }    \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
LATENTC_VECTORS(unsigned, uint)
LATENTC_VECTORS(int, int)
LATENTC_VECTORS(float, float)
#undef LATENTC_VECTORS

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// Set for each thread before it runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = emulate::WARP;

// --- meeting -------------------------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) { emulate::meet_block(line); }
inline void __syncwarp(unsigned = ~0u, int line = __builtin_LINE()) {
    emulate::meet_warp("__syncwarp", line, &line, [](void* const*) {});
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emulate {

/// What a lane brings to an exchange of values, and takes from it.
template <class T>
struct Exchange {
    T in;
    unsigned from;
    T out;
};

/// The value of lane `from` of this warp. That of a lane which is not there is noise, as on a GPU.
template <class T>
T shuffle(const char* what, int line, T value, unsigned from) {
    Exchange<T> mine{value, from, value};
    meet_warp(what, line, &mine, [](void* const* lanes) {
        for (unsigned n = 0; n < WARP; ++n) {
            if (!lanes[n]) continue;
            auto& to = *static_cast<Exchange<T>*>(lanes[n]);
            if (auto* source = static_cast<const Exchange<T>*>(lanes[to.from % WARP]))
                std::memcpy(&to.out, &source->in, sizeof(T));
            else
                std::memset(static_cast<void*>(&to.out), 0xff, sizeof(T));
        }
    });
    return mine.out;
}

/// For each lane that is there, whether its predicate holds, as bits.
struct Vote {
    bool in;
    unsigned yes, there;
};
inline Vote vote(const char* what, int line, bool predicate) {
    Vote mine{predicate, 0, 0};
    meet_warp(what, line, &mine, [](void* const* lanes) {
        unsigned yes = 0, there = 0;
        for (unsigned n = 0; n < WARP; ++n) {
            if (!lanes[n]) continue;
            there |= 1u << n;
            if (static_cast<Vote*>(lanes[n])->in) yes |= 1u << n;
        }
        for (unsigned n = 0; n < WARP; ++n) {
            if (lanes[n]) static_cast<Vote*>(lanes[n])->yes = yes, static_cast<Vote*>(lanes[n])->there = there;
        }
    });
    return mine;
}

/// The lane that a shuffle reads: `to` if it lies in this lane's group of `width`, or else this lane.
inline unsigned in_group(int to, int width) {
    int first = int(lane()) / width * width;
    return to < first || to >= first + width ? lane() : unsigned(to);
}

}  // namespace emulate

// Shuffles and votes are always those of whole warps here: a mask of fewer lanes is refused.
#define LATENTC_WHOLE_WARP(mask) \
    if (mask != ~0u) emulate::fail("%s with a mask of some lanes is not emulated", __func__)

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = warpSize, int line = __builtin_LINE()) {
    LATENTC_WHOLE_WARP(mask);
    unsigned first = emulate::lane() / width * width;
    return emulate::shuffle(__func__, line, value, first + unsigned(from) % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, int line = __builtin_LINE()) {
    LATENTC_WHOLE_WARP(mask);
    return emulate::shuffle(__func__, line, value, emulate::in_group(emulate::lane() ^ bits, width));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize, int line = __builtin_LINE()) {
    LATENTC_WHOLE_WARP(mask);
    return emulate::shuffle(__func__, line, value, emulate::in_group(int(emulate::lane()) - int(by), width));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize, int line = __builtin_LINE()) {
    LATENTC_WHOLE_WARP(mask);
    return emulate::shuffle(__func__, line, value, emulate::in_group(emulate::lane() + by, width));
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    LATENTC_WHOLE_WARP(mask);
    auto vote = emulate::vote(__func__, line, predicate);
    return vote.yes == vote.there;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    LATENTC_WHOLE_WARP(mask);
    return emulate::vote(__func__, line, predicate).yes != 0;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    LATENTC_WHOLE_WARP(mask);
    return emulate::vote(__func__, line, predicate).yes;
}
#undef LATENTC_WHOLE_WARP

// --- functions of numbers ------------------------------------------------------------------------------

// The fast forms are as exact as the others here: how far off they are is the hardware's business.
using std::abs, std::acos, std::acosh, std::asin, std::asinh, std::atan, std::atan2, std::atanh, std::ceil,
    std::cos, std::cosh, std::erf, std::exp, std::floor, std::fma, std::hypot, std::isinf, std::isnan,
    std::log, std::log1p, std::pow, std::rint, std::sin, std::sinh, std::sqrt, std::tan, std::tanh, std::trunc;

inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return rsqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __tanhf(float x) { return std::tanh(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float rhypot(float x, float y) { return 1.0f / std::hypot(x, y); }

// Of a number and NaN, the number.
template <class A, class B>
auto max(A a, B b) -> std::common_type_t<A, B> {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
    else return T(a) < T(b) ? T(b) : T(a);
}
template <class A, class B>
auto min(A a, B b) -> std::common_type_t<A, B> {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
    else return T(b) < T(a) ? T(b) : T(a);
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int n = 0; n < 32; ++n) y |= (x >> n & 1) << (31 - n);
    return y;
}
inline int __mulhi(int x, int y) { return int((long long)x * y >> 32); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((unsigned long long)x * y >> 32); }

template <class To, class From>
To latentc_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
inline int __float_as_int(float x) { return latentc_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return latentc_bits<unsigned>(x); }
inline float __int_as_float(int x) { return latentc_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return latentc_bits<float>(x); }

// --- atomics -------------------------------------------------------------------------------------------

// One thread runs at a time, and never stops inside of these.
#define LATENTC_ATOMIC(name, expression)                      \
    template <class T, class U>                               \
    T name(T* place, U with) {                                \
        T old = *place, operand = T(with);                    \
        *place = T(expression);                               \
        return old;                                           \
    }
LATENTC_ATOMIC(atomicAdd, old + operand)
LATENTC_ATOMIC(atomicSub, old - operand)
LATENTC_ATOMIC(atomicExch, operand)
LATENTC_ATOMIC(atomicMax, old < operand ? operand : old)
LATENTC_ATOMIC(atomicMin, operand < old ? operand : old)
LATENTC_ATOMIC(atomicAnd, old & operand)
LATENTC_ATOMIC(atomicOr, old | operand)
LATENTC_ATOMIC(atomicXor, old ^ operand)
#undef LATENTC_ATOMIC
template <class T>
T atomicCAS(T* place, T expected, T value) {
    T old = *place;
    if (std::memcmp(&old, &expected, sizeof(T)) == 0) *place = value;
    return old;
}

// --- memory --------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* place) {
    return *place;
}

/// 16 bytes that are read here and not where they are wanted.
inline void ptx_ld_global_L1_no_allocate_L2_256B_v4_u32(unsigned& x, unsigned& y, unsigned& z, unsigned& w, const void* from) {
    uint4 words = *static_cast<const uint4*>(from);
    x = words.x, y = words.y, z = words.z, w = words.w;
}

// --- grids that begin early ----------------------------------------------------------------------------

/// Whether the grid behind this one begins early shows in nothing that this one does.
inline void ptx_griddepcontrol_launch_dependents() {}
inline void ptx_griddepcontrol_wait(int line = __builtin_LINE()) { emulate::meet_grids(line); }
