//! The few vector operations that products are made of, on what this CPU has, chosen at run time.

use half::{bf16, f16};

/// A float as it is stored; it is computed with in f32.
pub(super) trait Element: Copy + Send + Sync {
    /// Its value.
    fn wide(self) -> f32;

    /// Sixteen of them.
    ///
    /// # Safety
    /// They must be readable from `p` on, and the CPU must have AVX-512.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load16(p: *const Self) -> std::arch::x86_64::__m512;

    /// Eight of them.
    ///
    /// # Safety
    /// They must be readable from `p` on, and the CPU must have AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(p: *const Self) -> std::arch::x86_64::__m256;
}

/// Writes the impl of [`Element`] for a type: how many are widened at once.
macro_rules! element {
    ($type:ty, $wide:expr, $load16:expr, $load8:expr) => {
        impl Element for $type {
            #[inline(always)]
            fn wide(self) -> f32 {
                $wide(self)
            }

            #[cfg(target_arch = "x86_64")]
            #[inline(always)]
            unsafe fn load16(p: *const Self) -> std::arch::x86_64::__m512 {
                use std::arch::x86_64::*;
                // SAFETY: by the caller.
                unsafe { $load16(p) }
            }

            #[cfg(target_arch = "x86_64")]
            #[inline(always)]
            unsafe fn load8(p: *const Self) -> std::arch::x86_64::__m256 {
                use std::arch::x86_64::*;
                // SAFETY: by the caller.
                unsafe { $load8(p) }
            }
        }
    };
}

element!(f32, |x| x, |p| _mm512_loadu_ps(p), |p| _mm256_loadu_ps(p));
// The bits of a bf16 are the upper half of the f32's.
element!(
    bf16,
    bf16::to_f32,
    |p: *const half::bf16| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
        _mm256_loadu_si256(p.cast())
    ))),
    |p: *const half::bf16| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
        _mm_loadu_si128(p.cast())
    )))
);
element!(
    f16,
    f16::to_f32,
    |p: *const half::f16| _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())),
    |p: *const f16| { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
);

/// A vector unit.
///
/// # Safety
/// All that an implementor does may only be called where the CPU has the unit.
pub(super) trait Simd {
    /// Numbers in a register.
    const LANES: usize;
    /// A register.
    type V: Copy;

    /// The same number everywhere.
    unsafe fn splat(x: f32) -> Self::V;

    /// As many as fit, from `p` on, where they must be readable.
    unsafe fn load<E: Element>(p: *const E) -> Self::V;

    /// `a * b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;

    /// Writes all numbers from `p` on, which must be writable.
    unsafe fn store(p: *mut f32, v: Self::V);

    /// Their sum.
    unsafe fn sum(v: Self::V) -> f32;
}

/// No vector unit that is known here: arrays, which a compiler may make something of.
pub(super) struct Plain;

impl Simd for Plain {
    const LANES: usize = 8;
    type V = [f32; 8];

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 8] {
        [x; 8]
    }

    #[inline(always)]
    unsafe fn load<E: Element>(p: *const E) -> [f32; 8] {
        // SAFETY: by the caller.
        std::array::from_fn(|i| unsafe { p.add(i).read() }.wide())
    }

    #[inline(always)]
    unsafe fn fma(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        // Without the instruction, a fused product is a slow function.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; 8]) {
        // SAFETY: by the caller.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v) };
    }

    #[inline(always)]
    unsafe fn sum(v: [f32; 8]) -> f32 {
        v.iter().sum()
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Element, Simd};

    /// AVX2, FMA and F16C.
    pub(in crate::host) struct Avx2;

    impl Simd for Avx2 {
        const LANES: usize = 8;
        type V = __m256;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            // SAFETY: by the caller, as in all that follows.
            unsafe { _mm256_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn load<E: Element>(p: *const E) -> __m256 {
            // SAFETY: see above.
            unsafe { E::load8(p) }
        }

        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            // SAFETY: see above.
            unsafe { _mm256_storeu_ps(p, v) };
        }

        #[inline(always)]
        unsafe fn sum(v: __m256) -> f32 {
            let mut lanes = [0.0f32; 8];
            // SAFETY: see above.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), v) };
            lanes.iter().sum()
        }
    }

    /// AVX-512, the part that all CPUs with it have.
    pub(in crate::host) struct Avx512;

    impl Simd for Avx512 {
        const LANES: usize = 16;
        type V = __m512;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn load<E: Element>(p: *const E) -> __m512 {
            // SAFETY: see above.
            unsafe { E::load16(p) }
        }

        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            // SAFETY: see above.
            unsafe { _mm512_storeu_ps(p, v) };
        }

        #[inline(always)]
        unsafe fn sum(v: __m512) -> f32 {
            // SAFETY: see above.
            unsafe { _mm512_reduce_add_ps(v) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

/// The best that this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Unit {
    /// All that can be used here, the best last.
    pub(super) fn all() -> Vec<Unit> {
        #[allow(unused_mut, reason = "elsewhere there is nothing to add")]
        let mut units = vec![Unit::Plain];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                units.push(Unit::Avx2);
            }
            if is_x86_feature_detected!("avx512f") {
                units.push(Unit::Avx512);
            }
        }
        units
    }

    /// The one to use.
    pub(super) fn best() -> Unit {
        static BEST: std::sync::OnceLock<Unit> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Unit::all().pop().unwrap_or(Unit::Plain))
    }
}
