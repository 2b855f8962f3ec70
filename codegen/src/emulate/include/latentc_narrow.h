// Floats of 16 bits: held as bits, computed with as f32, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

namespace emulate {

/// `EXPONENT` bits of exponent and 15 - `EXPONENT` of fraction.
template <int EXPONENT>
struct Narrow {
    static constexpr int FRACTION = 15 - EXPONENT;
    static constexpr int BIAS = (1 << (EXPONENT - 1)) - 1;

    uint16_t bits;

    Narrow() = default;
    template <class T>
        requires std::is_arithmetic_v<T>
    explicit(false) Narrow(T x) : bits(round(double(x))) {}
    template <int OTHER>
        requires(OTHER != EXPONENT)
    explicit Narrow(Narrow<OTHER> x) : bits(round(double(float(x)))) {}

    operator float() const {
        if constexpr (EXPONENT == 8) return latentc_bits<float>(uint32_t(bits) << 16);
        int exponent = bits >> FRACTION & ((1 << EXPONENT) - 1);
        int fraction = bits & ((1 << FRACTION) - 1);
        float magnitude;
        if (exponent == (1 << EXPONENT) - 1)
            magnitude = fraction ? NAN : INFINITY;
        else if (exponent == 0)
            magnitude = std::ldexp(float(fraction), 1 - BIAS - FRACTION);
        else
            magnitude = std::ldexp(float(fraction + (1 << FRACTION)), exponent - BIAS - FRACTION);
        return bits >> 15 ? -magnitude : magnitude;
    }

    static uint16_t round(double x) {
        if constexpr (EXPONENT == 8) {
            // The same as below, for numbers that came from an f32: the upper half of its bits.
            if (auto wide = latentc_bits<uint32_t>(float(x)); double(float(x)) == x)
                return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
        }
        uint16_t sign = std::signbit(x) ? 0x8000 : 0;
        x = std::fabs(x);
        constexpr uint16_t infinity = ((1 << EXPONENT) - 1) << FRACTION;
        if (std::isnan(x)) return sign | infinity | 1 << (FRACTION - 1);
        if (x == 0) return sign;
        int exponent = std::max(std::ilogb(x), 1 - BIAS);
        if (exponent > BIAS) return sign | infinity;
        // In units of the last place; ties go to even. A carry out of the fraction is one more in the exponent, as it should be.
        auto units = uint32_t(std::nearbyint(std::ldexp(x, FRACTION - exponent)));
        uint32_t made = (uint32_t(exponent + BIAS - 1) << FRACTION) + units;
        return sign | uint16_t(made < infinity ? made : infinity);
    }
};

template <class T>
inline constexpr bool is_narrow = false;
template <int E>
inline constexpr bool is_narrow<Narrow<E>> = true;

/// Two of them.
template <class T>
struct __attribute__((aligned(4))) Pair {
    T x, y;
};

}  // namespace emulate

#define LATENTC_OPERATOR(op)                                                                          \
    template <int E>                                                                                  \
    emulate::Narrow<E> operator op(emulate::Narrow<E> a, emulate::Narrow<E> b) {                      \
        return emulate::Narrow<E>(float(a) op float(b));                                              \
    }                                                                                                 \
    template <int E>                                                                                  \
    emulate::Narrow<E>& operator op##=(emulate::Narrow<E>& a, emulate::Narrow<E> b) {                 \
        return a = a op b;                                                                            \
    }                                                                                                 \
    template <class T>                                                                                \
    emulate::Pair<T> operator op(emulate::Pair<T> a, emulate::Pair<T> b) {                            \
        return {a.x op b.x, a.y op b.y};                                                              \
    }
LATENTC_OPERATOR(+)
LATENTC_OPERATOR(-)
LATENTC_OPERATOR(*)
LATENTC_OPERATOR(/)
#undef LATENTC_OPERATOR

#define LATENTC_COMPARE(op)                                       \
    template <int E>                                              \
    bool operator op(emulate::Narrow<E> a, emulate::Narrow<E> b) { \
        return float(a) op float(b);                              \
    }
LATENTC_COMPARE(<)
LATENTC_COMPARE(<=)
LATENTC_COMPARE(>)
LATENTC_COMPARE(>=)
LATENTC_COMPARE(==)
LATENTC_COMPARE(!=)
#undef LATENTC_COMPARE

template <int E>
emulate::Narrow<E> operator-(emulate::Narrow<E> x) {
    return emulate::Narrow<E>(-float(x));
}
template <class T>
emulate::Pair<T> operator-(emulate::Pair<T> x) {
    return {-x.x, -x.y};
}

#define LATENTC_UNARY(name, function)               \
    template <int E>                                \
    emulate::Narrow<E> h##name(emulate::Narrow<E> x) { \
        return emulate::Narrow<E>(function(float(x))); \
    }                                               \
    template <class T>                              \
    emulate::Pair<T> h2##name(emulate::Pair<T> x) { \
        return {h##name(x.x), h##name(x.y)};        \
    }
LATENTC_UNARY(exp, std::exp)
LATENTC_UNARY(log, std::log)
LATENTC_UNARY(sin, std::sin)
LATENTC_UNARY(cos, std::cos)
LATENTC_UNARY(sqrt, std::sqrt)
LATENTC_UNARY(rsqrt, rsqrt)
LATENTC_UNARY(ceil, std::ceil)
LATENTC_UNARY(floor, std::floor)
LATENTC_UNARY(trunc, std::trunc)
LATENTC_UNARY(rint, std::rint)
#undef LATENTC_UNARY

template <int E>
emulate::Narrow<E> __hmax(emulate::Narrow<E> a, emulate::Narrow<E> b) {
    return emulate::Narrow<E>(std::fmax(float(a), float(b)));
}
template <int E>
emulate::Narrow<E> __hmin(emulate::Narrow<E> a, emulate::Narrow<E> b) {
    return emulate::Narrow<E>(std::fmin(float(a), float(b)));
}
template <int E>
emulate::Narrow<E> fma(emulate::Narrow<E> a, emulate::Narrow<E> b, emulate::Narrow<E> c) {
    return emulate::Narrow<E>(double(float(a)) * float(b) + float(c));
}
template <int E>
bool __hisnan(emulate::Narrow<E> x) {
    return std::isnan(float(x));
}
template <int E>
bool __hisinf(emulate::Narrow<E> x) {
    return std::isinf(float(x));
}

#include "latentc_ptx.h"
