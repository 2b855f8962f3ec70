//! The few vector operations that products are made of, on what this CPU has, chosen at run time.

use half::{bf16, f16};

use crate::device::Floats;

/// A number as it is stored; it is computed with in f32.
pub(super) trait Element: Copy + Send + Sync {
    /// Its value.
    fn wide(self) -> f32;

    /// Floats that are stored so; `None` if they are not.
    fn of(floats: Floats<'_>) -> Option<&[Self]>;

    /// From one of them on, in a form in which numbers of type bf16 are held; `None` if this is none.
    fn held(_: *const Self) -> Option<Held> {
        None
    }

    /// Whether two registers that are [loaded together](Simd::load_two) hold every other number each, not the first ones and the last ones.
    const ALTERNATE: bool = false;

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

    /// Thirty-two of them, in the order that [`ALTERNATE`](Element::ALTERNATE) says.
    ///
    /// # Safety
    /// As for [`load16`](Element::load16).
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load32(p: *const Self) -> [std::arch::x86_64::__m512; 2] {
        // SAFETY: by the caller.
        unsafe { [Self::load16(p), Self::load16(p.add(16))] }
    }

    /// Sixteen of them, in that order.
    ///
    /// # Safety
    /// As for [`load8`](Element::load8).
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8_twice(p: *const Self) -> [std::arch::x86_64::__m256; 2] {
        // SAFETY: by the caller.
        unsafe { [Self::load8(p), Self::load8(p.add(8))] }
    }
}

/// Numbers as they are held, from one of them on: those of type bf16 as they are computed, or in their 16 bits.
#[derive(Clone, Copy, Debug)]
pub(super) enum Held {
    Wide(*const f32),
    Narrow(*const bf16),
}

// SAFETY: threads read what is there, and no one writes it meanwhile.
unsafe impl Send for Held {}
// SAFETY: as above.
unsafe impl Sync for Held {}

/// Writes the impl of [`Element`] for a type: how many are widened at once.
macro_rules! element {
    ($type:ty, $stored:path, $wide:expr, $load16:expr, $load8:expr $(, $more:item)*) => {
        impl Element for $type {
            #[inline(always)]
            fn wide(self) -> f32 {
                $wide(self)
            }

            fn of(floats: Floats<'_>) -> Option<&[Self]> {
                if let $stored(x) = floats { Some(x) } else { None }
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

            $($more)*
        }
    };
}

element!(
    f32,
    Floats::F32,
    |x| x,
    |p| _mm512_loadu_ps(p),
    |p| _mm256_loadu_ps(p),
    fn held(p: *const f32) -> Option<Held> {
        Some(Held::Wide(p))
    }
);
// The bits of a bf16 are the upper half of the f32's.
element!(
    bf16,
    Floats::Bf16,
    bf16::to_f32,
    |p: *const half::bf16| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
        _mm256_loadu_si256(p.cast())
    ))),
    |p: *const half::bf16| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
        _mm_loadu_si128(p.cast())
    ))),
    fn held(p: *const bf16) -> Option<Held> {
        Some(Held::Narrow(p))
    },
    // In each 32 bits, the number with the odd place has the upper half already: an instruction for each register, and one for the load.
    const ALTERNATE: bool = true;,
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load32(p: *const Self) -> [std::arch::x86_64::__m512; 2] {
        use std::arch::x86_64::*;
        // SAFETY: by the caller.
        unsafe {
            let both = _mm512_loadu_si512(p.cast());
            let odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)), _mm512_castsi512_ps(odd)]
        }
    },
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8_twice(p: *const Self) -> [std::arch::x86_64::__m256; 2] {
        use std::arch::x86_64::*;
        // SAFETY: by the caller.
        unsafe {
            let both = _mm256_loadu_si256(p.cast());
            let odd = _mm256_and_si256(both, _mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(both)), _mm256_castsi256_ps(odd)]
        }
    }
);
element!(
    f16,
    Floats::F16,
    f16::to_f32,
    |p: *const half::f16| _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())),
    |p: *const f16| { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
);

/// Codes, which are no floats until their scale is known.
impl Element for u8 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self.into()
    }

    fn of(_: Floats<'_>) -> Option<&[u8]> {
        None
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load16(p: *const u8) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: by the caller.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(p: *const u8) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: by the caller.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
}

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

    /// Twice as many, in the order that [`Element::ALTERNATE`] says.
    unsafe fn load_two<E: Element>(p: *const E) -> [Self::V; 2];

    /// Asks for the memory at `p`, wherever that is.
    fn prefetch<E>(p: *const E);

    /// `a * b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;

    /// `a + b`.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;

    /// Writes all numbers from `p` on, which must be writable.
    unsafe fn store(p: *mut f32, v: Self::V);

    /// Their sum.
    unsafe fn sum(v: Self::V) -> f32;

    /// The sum of each of four registers, which takes fewer steps together.
    #[inline(always)]
    unsafe fn sums(v: [Self::V; 4]) -> [f32; 4] {
        // SAFETY: by the caller.
        v.map(|v| unsafe { Self::sum(v) })
    }

    /// Tells the sum of each of some registers, with its number.
    #[inline(always)]
    unsafe fn sum_each(v: &[Self::V], mut tell: impl FnMut(usize, f32)) {
        for (n, four) in v.chunks(4).enumerate() {
            // SAFETY: by the caller.
            let sums = unsafe {
                let one = |i: usize| four.get(i).copied().unwrap_or(Self::splat(0.0));
                Self::sums([one(0), one(1), one(2), one(3)])
            };
            for (i, &sum) in sums[..four.len()].iter().enumerate() {
                tell(4 * n + i, sum);
            }
        }
    }
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
    unsafe fn load_two<E: Element>(p: *const E) -> [[f32; 8]; 2] {
        let (register, step) = if E::ALTERNATE { (1, 2) } else { (8, 1) };
        let one = |n: usize| std::array::from_fn(|i| unsafe { p.add(n * register + i * step).read() }.wide());
        // SAFETY: by the caller, in `one`.
        [one(0), one(1)]
    }

    #[inline(always)]
    fn prefetch<E>(_: *const E) {}

    #[inline(always)]
    unsafe fn fma(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        // Without the instruction, a fused product is a slow function.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    unsafe fn add(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] + b[i])
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
        unsafe fn load_two<E: Element>(p: *const E) -> [__m256; 2] {
            // SAFETY: see above.
            unsafe { E::load8_twice(p) }
        }

        #[inline(always)]
        fn prefetch<E>(p: *const E) {
            // SAFETY: every x86-64 CPU has it, and it touches nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) };
        }

        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_add_ps(a, b) }
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
        unsafe fn load_two<E: Element>(p: *const E) -> [__m512; 2] {
            // SAFETY: see above.
            unsafe { E::load32(p) }
        }

        #[inline(always)]
        fn prefetch<E>(p: *const E) {
            // SAFETY: every x86-64 CPU has it, and it touches nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) };
        }

        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_add_ps(a, b) }
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

        #[inline(always)]
        unsafe fn sums([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
            let mut sums = [0.0f32; 4];
            // SAFETY: see above. Quarters are added up, of two registers to the halves of one, of four to the quarters of one; then what
            // each quarter has.
            unsafe {
                let two = |a, b| {
                    _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b))
                };
                let (ab, cd) = (two(a, b), two(c, d));
                let four =
                    _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
                let four = _mm512_add_ps(four, _mm512_permute_ps::<0x4e>(four));
                let four = _mm512_add_ps(four, _mm512_permute_ps::<0xb1>(four));
                let first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
                let four = _mm512_permutexvar_ps(first, four);
                _mm_storeu_ps(sums.as_mut_ptr(), _mm512_castps512_ps128(four));
            }
            sums
        }
    }
}

/// Writes a function of plain loops as one for each unit, of which the best is called: the compiler makes the most of each. What the
/// loops call must be `#[inline(always)]`.
macro_rules! on_best_unit {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            fn plain($($arg: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $type),*) $(-> $result)? {
                plain($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f")]
            fn avx512($($arg: $type),*) $(-> $result)? {
                plain($($arg),*)
            }

            match $crate::host::simd::Unit::best() {
                $crate::host::simd::Unit::Plain => plain($($arg),*),
                // SAFETY: the unit is one that the CPU has.
                #[cfg(target_arch = "x86_64")]
                $crate::host::simd::Unit::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::host::simd::Unit::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    };
}
pub(super) use on_best_unit;

/// `e` to the power of `x`, within two units in the last place, in operations that vector units have.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Of the logarithm of 2, the leading bits, so few that multiples are exact, and the rest.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    /// A float of this size has no bits behind the point: adding it rounds.
    const ROUND: f32 = 12_582_912.0;
    // Beyond these, the result is infinite or zero.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN2[0] - n * LN2[1];
    // |r| is at most ln 2 / 2: the first term of Taylor's series that is left out is below 2^-27.
    let mut sum = 1.0 / 5040.0;
    for term in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum * r + term;
    }
    // Two factors, since 2^n alone may be too large or too small for a float where the result is not.
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let half = n >> 1;
    sum * power(half) * power(n.wrapping_sub(half))
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

    /// Numbers in a register.
    pub(super) fn lanes(self) -> usize {
        match self {
            Unit::Plain => Plain::LANES,
            #[cfg(target_arch = "x86_64")]
            Unit::Avx2 => Avx2::LANES,
            #[cfg(target_arch = "x86_64")]
            Unit::Avx512 => Avx512::LANES,
        }
    }

    /// The one to use.
    pub(super) fn best() -> Unit {
        static BEST: std::sync::OnceLock<Unit> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Unit::all().pop().unwrap_or(Unit::Plain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    on_best_unit! {
        fn all(x: &mut [f32]) {
            x.iter_mut().for_each(|x| *x = exp(*x));
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let steps = 2_000_000;
        let from: Vec<f32> = (0..=steps).map(|i| -110.0 + 200.0 * i as f32 / steps as f32).collect();
        let mut y = from.clone();
        all(&mut y);
        for (&x, &y) in from.iter().zip(&y) {
            assert_eq!(y.to_bits(), exp(x).to_bits(), "{x}");
            let want = f64::from(x).exp();
            let least = f64::from(f32::MIN_POSITIVE) * f64::from(f32::EPSILON);
            let unit = (want * f64::from(f32::EPSILON)).max(least);
            assert!(
                (f64::from(y) - want).abs() <= 2.0 * unit || want > f64::from(f32::MAX) && y.is_infinite(),
                "{x}: {y}"
            );
        }
        assert_eq!([exp(0.0), exp(-0.0), exp(f32::NEG_INFINITY)], [1.0, 1.0, 0.0]);
        assert!(exp(f32::INFINITY).is_infinite() && exp(f32::NAN).is_nan());
    }
}
