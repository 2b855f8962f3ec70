//! Products of a few rows with a matrix in bf16: what bounds them is the memory, so the matrix is read in a few streams, as by
//! [those](super::super::few) of other types, and eight rows meet each load of it. Rows are rounded to bf16 first, as their type says.
//!
//! An instruction adds products of two summands. If these lie side by side, so do the pairs. If columns do, two lines of them are
//! interleaved first.

use std::arch::x86_64::*;

use half::bf16;

use super::super::few::{Matrix, Rows};
use super::{LANES, Lines, PACKED, Shared, To, halves, load_pairs, put_lines, put_numbers};
use crate::host::simd::{Avx512, Held, Simd};

/// Numbers that an instruction takes of each operand.
const WIDTH: usize = 2 * LANES;
/// Rows that are carried through the matrix together.
const ROWS: usize = 8;

/// `y = x · matrix` for the columns `0..n`, or `y += …`, where both are of type bf16.
///
/// # Safety
/// As for [`product`](super::product); the summands of a column must lie side by side, or the columns.
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
            if matrix.along != 1 {
                match x.count - first {
                    1 => beside::<1, 4>(x, matrix, y, (n, k), add),
                    2 => beside::<2, 4>(x, matrix, y, (n, k), add),
                    3 => beside::<3, 2>(x, matrix, y, (n, k), add),
                    4 => beside::<4, 2>(x, matrix, y, (n, k), add),
                    5 => beside::<5, 1>(x, matrix, y, (n, k), add),
                    6 => beside::<6, 1>(x, matrix, y, (n, k), add),
                    7 => beside::<7, 1>(x, matrix, y, (n, k), add),
                    _ => beside::<ROWS, 1>(x, matrix, y, (n, k), add),
                }
                continue;
            }
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

/// All columns with `R` rows, `S` times as many side by side as an instruction takes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn beside<const R: usize, const S: usize>(
    x: Rows<*const bf16>,
    matrix: Matrix<*const bf16>,
    y: Rows<*mut f32>,
    (n, k): (usize, usize),
    add: bool,
) {
    let to = To { data: Shared(y.data), across: y.step, down: y.row, add };
    let whole = n - n % (S * WIDTH);
    // SAFETY: by the caller: columns are below `n`.
    unsafe {
        for column in (0..whole).step_by(S * WIDTH) {
            weighed::<R, S>(x, matrix, to, (column, S * WIDTH), k);
        }
        for column in (whole..n).step_by(WIDTH) {
            weighed::<R, 1>(x, matrix, to, (column, WIDTH.min(n - column)), k);
        }
    }
}

/// So many columns, from one on: the last of `S` instructions' may not be there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn weighed<const R: usize, const S: usize>(
    x: Rows<*const bf16>,
    matrix: Matrix<*const bf16>,
    to: To,
    (first, lanes): (usize, usize),
    k: usize,
) {
    let mut sums = [[[_mm512_setzero_ps(); 2]; S]; R];
    let mask = u32::MAX >> (S * WIDTH - lanes);
    let load = |at: usize, s: usize| {
        let mask = if s + 1 == S { mask } else { u32::MAX };
        // SAFETY: by the caller: `at` is below `k`, and the columns of the mask are there.
        unsafe {
            let w = matrix.data.add(at * matrix.along + first + s * WIDTH);
            _mm512_maskz_loadu_epi16(mask, w.cast())
        }
    };
    for at in (0..k).step_by(2) {
        for s in 0..S {
            // Of the last pair there may be one summand only; the row has a zero there.
            let (even, odd) =
                (load(at, s), if at + 1 < k { load(at + 1, s) } else { _mm512_setzero_si512() });
            let pairs = [halves(_mm512_unpacklo_epi16(even, odd)), halves(_mm512_unpackhi_epi16(even, odd))];
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: by the caller: rows end with whole registers.
                let x = unsafe { x.data.add(r * x.row + at).cast::<i32>().read_unaligned() };
                let x = halves(_mm512_set1_epi32(x));
                for (sum, pairs) in sums[s].iter_mut().zip(pairs) {
                    *sum = _mm512_dpbf16_ps(*sum, x, pairs);
                }
            }
        }
    }
    for s in 0..S {
        let sums: [_; R] = std::array::from_fn(|r| ordered(sums[r][s]));
        let (to, lanes) = (to.from(first + s * WIDTH, 0), WIDTH.min(lanes - s * WIDTH));
        // SAFETY: by the caller.
        unsafe {
            match to.across {
                1 => put_lines(&sums, lanes, to),
                _ => put_numbers(&sums, lanes, to),
            }
        }
    }
}

/// Of lines that were interleaved, in each quarter the first four of eight columns and the others: all of them in order.
#[inline]
#[target_feature(enable = "avx512f")]
fn ordered([low, high]: [__m512; 2]) -> [__m512; 2] {
    let first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    let eight = _mm512_set1_epi32(8);
    [
        _mm512_permutex2var_ps(low, first, high),
        _mm512_permutex2var_ps(low, _mm512_add_epi32(first, eight), high),
    ]
}
