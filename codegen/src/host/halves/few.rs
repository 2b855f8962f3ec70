//! Products of a few rows with a matrix in bf16: what bounds them is the memory, so the matrix is read in a few streams, as by
//! [those](super::super::few) of other types, and eight rows meet each load of it. Rows are rounded to bf16 first, as their type says.

use std::arch::x86_64::*;

use half::bf16;

use super::super::few::{Matrix, Rows};
use super::{LANES, Lines, PACKED, load_pairs};
use crate::host::simd::{Avx512, Held, Simd};

/// Numbers that an instruction takes of each operand.
const WIDTH: usize = 2 * LANES;
/// Rows that are carried through the matrix together.
const ROWS: usize = 8;

/// `y = x · matrix` for the columns `0..n`, or `y += …`, where both are of type bf16.
///
/// # Safety
/// As for [`product`](super::product); the summands of a column must lie side by side.
pub(in crate::host) unsafe fn product(
    x: Rows<*const f32>,
    matrix: Matrix<*const bf16>,
    y: Rows<*mut f32>,
    (n, k): (usize, usize),
    add: bool,
) {
    // Rows are as long as whole registers.
    let line = k.next_multiple_of(WIDTH);
    let mut packed = PACKED.take();
    if packed.len() < x.count * line / 2 {
        packed.resize(x.count * line / 2, 0);
    }
    let rounded = packed.as_mut_ptr().cast::<bf16>();
    let lines = Lines { data: Held::Wide(x.data), count: x.count, line: x.row, along: x.step };
    // SAFETY: by the caller, and there is so much room.
    unsafe {
        round(lines, k, rounded, line);
        for first in (0..x.count).step_by(ROWS) {
            let x = Rows { data: rounded.cast_const().add(first * line), count: x.count, row: line, step: 1 };
            let y = Rows { data: y.data.add(first * y.row), ..y };
            match x.count - first {
                1 => columns::<1, 4>(x, matrix, y, (n, k), add),
                2 => columns::<2, 4>(x, matrix, y, (n, k), add),
                3 => columns::<3, 2>(x, matrix, y, (n, k), add),
                4 => columns::<4, 2>(x, matrix, y, (n, k), add),
                5 => columns::<5, 2>(x, matrix, y, (n, k), add),
                6 => columns::<6, 2>(x, matrix, y, (n, k), add),
                7 => columns::<7, 2>(x, matrix, y, (n, k), add),
                _ => columns::<ROWS, 2>(x, matrix, y, (n, k), add),
            }
        }
    }
    PACKED.set(packed);
}

/// Brings lines to others of so many numbers each; what is not there is zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn round(lines: Lines, k: usize, to: *mut bf16, line: usize) {
    for i in 0..lines.count {
        for at in (0..k).step_by(WIDTH) {
            // SAFETY: by the caller: lines end with whole registers.
            unsafe {
                let numbers = load_pairs(lines.from(i, at), k - at);
                _mm512_storeu_si512(to.add(i * line + at).cast(), numbers);
            }
        }
    }
}

/// All columns with `R` rows, `C` at a time, far from each other.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn columns<const R: usize, const C: usize>(
    x: Rows<*const bf16>,
    matrix: Matrix<*const bf16>,
    y: Rows<*mut f32>,
    (n, k): (usize, usize),
    add: bool,
) {
    let apart = n / C;
    // SAFETY: by the caller: columns are below `n`.
    unsafe {
        for column in 0..apart {
            dots::<R, C>(x, matrix, y, (column, apart), k, add);
        }
        for column in C * apart..n {
            dots::<R, 1>(x, matrix, y, (column, 1), k, add);
        }
    }
}

/// `C` columns, from one on and so far apart.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn dots<const R: usize, const C: usize>(
    x: Rows<*const bf16>,
    matrix: Matrix<*const bf16>,
    y: Rows<*mut f32>,
    (first, apart): (usize, usize),
    k: usize,
    add: bool,
) {
    let mut sums = [[_mm512_setzero_ps(); C]; R];
    // SAFETY: by the caller: summands are below `k`, and rows end with whole registers. 512 bits are 32 numbers.
    unsafe {
        let w: [_; C] =
            std::array::from_fn(|c| matrix.data.add((first + c * apart) * matrix.column).cast::<i16>());
        let mut meet = |at: usize, w: [__m512i; C]| {
            let w = w.map(|w| std::mem::transmute::<__m512i, __m512bh>(w));
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = _mm512_loadu_si512(x.data.add(r * x.row + at).cast());
                let x = std::mem::transmute::<__m512i, __m512bh>(x);
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = _mm512_dpbf16_ps(*sum, x, w);
                }
            }
        };
        let whole = k - k % WIDTH;
        for at in (0..whole).step_by(WIDTH) {
            meet(at, w.map(|w| _mm512_loadu_si512(w.add(at).cast())));
        }
        if whole < k {
            let mask = (1 << (k - whole)) - 1;
            meet(whole, w.map(|w| _mm512_maskz_loadu_epi16(mask, w.add(whole))));
        }
        Avx512::sum_each(sums.as_flattened(), |n, total| {
            let (r, c) = (n / C, n % C);
            let to = y.data.add(r * y.row + (first + c * apart) * y.step);
            *to = if add { *to + total } else { total };
        });
    }
}
