//! Products of a few rows with a matrix, as decode has them: each element of the matrix is read once, as it is stored, and meets all
//! rows in registers. What bounds such a product is the bandwidth of the memory.
//!
//! Two forms, by what lies side by side in the matrix: the elements of one sum (*dot*), or one element of the sums of many
//! columns (*axpy*).

use super::simd::{Element, Plain, Simd, Unit};
use super::spare::with_floats;

/// Rows that are carried through the matrix together.
const ROWS: usize = 4;

/// A matrix to multiply with: columns `0..n` of the result, sums over `0..k`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<P> {
    /// Where element (0, 0) is.
    pub(super) data: P,
    /// From one column of the result to the next.
    pub(super) column: usize,
    /// From one summand to the next.
    pub(super) along: usize,
}

/// Rows that it is multiplied with, or those of the result.
#[derive(Clone, Copy)]
pub(super) struct Rows<P> {
    /// Element (0, 0).
    pub(super) data: P,
    /// How many rows.
    pub(super) count: usize,
    /// From one row to the next.
    pub(super) row: usize,
    /// From one element of a row to the next.
    pub(super) step: usize,
}

/// Elements side by side, from the first on.
#[derive(Clone, Copy)]
pub(super) struct Dense<E>(pub(super) *const E);

// SAFETY: threads read what is there, and no one writes it meanwhile.
unsafe impl<E: Element> Send for Dense<E> {}
// SAFETY: as above.
unsafe impl<E: Element> Sync for Dense<E> {}

/// Whether there is a form for a matrix with these steps.
pub(super) fn has_form<P>(matrix: &Matrix<P>) -> bool {
    matrix.along == 1 || matrix.column == 1
}

/// `y = x · matrix` for the columns `0..n`, or `y += …`.
///
/// # Safety
/// All that the steps, `n`, `k` and the counts lead to must be readable, and for `y` writable by no one else. There must be a
/// [form](has_form).
pub(super) unsafe fn product<E: Element>(
    unit: Unit,
    x: Rows<*const f32>,
    matrix: Matrix<Dense<E>>,
    y: Rows<*mut f32>,
    (n, k): (usize, usize),
    add: bool,
) {
    with_floats(|copied| {
        // SAFETY: by the caller.
        let x = if matrix.along == 1 { unsafe { dense::<E>(unit, x, k, copied) } } else { x };
        // SAFETY: by the caller, and since the unit is one that the CPU has.
        unsafe {
            match unit {
                Unit::Plain => rows::<Plain, E>(x, matrix, y, (n, k), add),
                #[cfg(target_arch = "x86_64")]
                Unit::Avx2 => avx2(x, matrix, y, (n, k), add),
                #[cfg(target_arch = "x86_64")]
                Unit::Avx512 => avx512(x, matrix, y, (n, k), add),
            }
        }
    });
}

/// Rows with the `k` numbers of each side by side, in the order in which those of a matrix are loaded; copied if they are not so, in the place
/// of what was copied before.
///
/// # Safety
/// They must be readable.
pub(super) unsafe fn dense<E: Element>(
    unit: Unit,
    x: Rows<*const f32>,
    k: usize,
    copied: &mut Vec<f32>,
) -> Rows<*const f32> {
    if x.step == 1 && !E::ALTERNATE {
        return x;
    }
    copied.clear();
    copied.resize(x.count * k, 0.0);
    for (row, to) in copied.chunks_exact_mut(k.max(1)).enumerate() {
        // SAFETY: by the caller.
        unsafe { arrange::<E>(to, x.data.add(row * x.row), x.step, unit.lanes()) };
    }
    Rows { data: copied.as_ptr(), count: x.count, row: k, step: 1 }
}

/// Copies a row, its numbers in the order in which those of the matrix are loaded.
///
/// # Safety
/// As many numbers must be readable from `x` on, so many steps apart.
unsafe fn arrange<E: Element>(to: &mut [f32], x: *const f32, step: usize, lanes: usize) {
    if step == 1 && E::ALTERNATE {
        // SAFETY: by the caller.
        let x = unsafe { std::slice::from_raw_parts(x, to.len()) };
        return match lanes {
            LANES => alternate::<LANES>(to, x),
            _ => alternate::<8>(to, x),
        };
    }
    let whole = if E::ALTERNATE { to.len() - to.len() % (2 * lanes) } else { 0 };
    for (at, to) in to.iter_mut().enumerate() {
        let (pair, place) = (at - at % (2 * lanes), at % (2 * lanes));
        let from = if at < whole { pair + place % lanes * 2 + place / lanes } else { at };
        // SAFETY: by the caller.
        *to = unsafe { *x.add(from * step) };
    }
}

/// Of each `2 * N` numbers the even ones, then the odd ones; what is left as it is.
fn alternate<const N: usize>(to: &mut [f32], x: &[f32]) {
    let (mut to, mut from) = (to.chunks_exact_mut(2 * N), x.chunks_exact(2 * N));
    for (to, from) in to.by_ref().zip(from.by_ref()) {
        for i in 0..N {
            (to[i], to[N + i]) = (from[2 * i], from[2 * i + 1]);
        }
    }
    to.into_remainder().copy_from_slice(from.remainder());
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<E: Element>(
    x: Rows<*const f32>,
    matrix: Matrix<Dense<E>>,
    y: Rows<*mut f32>,
    size: (usize, usize),
    add: bool,
) {
    // SAFETY: by the caller.
    unsafe { rows::<super::simd::Avx2, E>(x, matrix, y, size, add) };
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512<E: Element>(
    x: Rows<*const f32>,
    matrix: Matrix<Dense<E>>,
    y: Rows<*mut f32>,
    size: (usize, usize),
    add: bool,
) {
    // SAFETY: by the caller.
    unsafe { rows::<super::simd::Avx512, E>(x, matrix, y, size, add) };
}

/// All rows, a few at a time.
#[inline(always)]
unsafe fn rows<S: Simd, E: Element>(
    x: Rows<*const f32>,
    matrix: Matrix<Dense<E>>,
    y: Rows<*mut f32>,
    (n, k): (usize, usize),
    add: bool,
) {
    let mut first = 0;
    while first < x.count {
        // SAFETY: by the caller; the rows are among those that are there.
        unsafe {
            let (x, y) = (
                Rows { data: x.data.add(first * x.row), ..x },
                Rows { data: y.data.add(first * y.row), ..y },
            );
            match x.count - first {
                1 => form::<S, E, 1>(x, matrix, y, (n, k), add),
                2 => form::<S, E, 2>(x, matrix, y, (n, k), add),
                3 => form::<S, E, 3>(x, matrix, y, (n, k), add),
                _ => form::<S, E, ROWS>(x, matrix, y, (n, k), add),
            }
        }
        first += ROWS;
    }
}

#[inline(always)]
unsafe fn form<S: Simd, E: Element, const R: usize>(
    x: Rows<*const f32>,
    matrix: Matrix<Dense<E>>,
    y: Rows<*mut f32>,
    (n, k): (usize, usize),
    add: bool,
) {
    // Each has as many sums in flight as hide the latency of a fused product.
    // SAFETY: by the caller.
    unsafe {
        if matrix.along != 1 {
            axpy::<S, E, R>(x, matrix, y, (n, k), add);
        } else if R > 1 {
            dot::<S, E, R, 2>(x, matrix, y, (n, k), add);
        } else {
            dot::<S, E, R, 4>(x, matrix, y, (n, k), add);
        }
    }
}

/// Products of vectors: `C` columns at a time, far from each other.
///
/// So each is a stream of memory of its own that goes on from one column to the next. Columns side by side would be streams that end
/// with a column, and the CPU's look-ahead, which takes a while to see a stream, would begin anew with each.
#[inline(always)]
unsafe fn dot<S: Simd, E: Element, const R: usize, const C: usize>(
    x: Rows<*const f32>,
    matrix: Matrix<Dense<E>>,
    y: Rows<*mut f32>,
    (n, k): (usize, usize),
    add: bool,
) {
    let apart = n / C;
    // SAFETY: by the caller: columns are below `n`.
    unsafe {
        for column in 0..apart {
            dots::<S, E, R, C, 1>(x, matrix, y, (column, apart), k, add);
        }
        for column in C * apart..n {
            dots::<S, E, R, 1, 2>(x, matrix, y, (column, 1), k, add);
        }
    }
}

/// Adds a pair of registers of each column to its sums of that number.
#[inline(always)]
unsafe fn pairs<S: Simd, E: Element, const R: usize, const C: usize, const U: usize>(
    x: Rows<*const f32>,
    w: [*const E; C],
    at: usize,
    sums: &mut [[[[S::V; 2]; U]; C]; R],
    number: usize,
) {
    // SAFETY: by the caller.
    unsafe {
        let w: [[S::V; 2]; C] = std::array::from_fn(|c| S::load_two(w[c].add(at)));
        for (r, sums) in sums.iter_mut().enumerate() {
            let x = x.data.add(r * x.row + at);
            let x = [S::load(x), S::load(x.add(S::LANES))];
            for (sums, w) in sums.iter_mut().zip(&w) {
                for half in 0..2 {
                    sums[number][half] = S::fma(x[half], w[half], sums[number][half]);
                }
            }
        }
    }
}

/// `C` columns, from one on and so far apart.
#[inline(always)]
unsafe fn dots<S: Simd, E: Element, const R: usize, const C: usize, const U: usize>(
    x: Rows<*const f32>,
    matrix: Matrix<Dense<E>>,
    y: Rows<*mut f32>,
    (first, apart): (usize, usize),
    k: usize,
    add: bool,
) {
    let pair = 2 * S::LANES;
    let whole = k - k % pair;
    // SAFETY: by the caller: summands are below `k`, rows below `R`.
    unsafe {
        let w: [*const E; C] =
            std::array::from_fn(|c| matrix.data.0.add((first + c * apart) * matrix.column));
        let mut sums = [[[[S::splat(0.0); 2]; U]; C]; R];
        let mut at = 0;
        while at + U * pair <= whole {
            for u in 0..U {
                pairs::<S, E, R, C, U>(x, w, at + u * pair, &mut sums, u);
            }
            at += U * pair;
        }
        while at < whole {
            pairs::<S, E, R, C, U>(x, w, at, &mut sums, 0);
            at += pair;
        }
        let mut added = [[S::splat(0.0); C]; R];
        for (added, sums) in added.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
            let all = sums.as_flattened();
            *added = all[0];
            for &sum in &all[1..] {
                *added = S::add(*added, sum);
            }
        }
        S::sum_each(added.as_flattened(), |n, mut total| {
            let (r, c) = (n / C, n % C);
            for at in whole..k {
                total += *x.data.add(r * x.row + at) * (*w[c].add(at)).wide();
            }
            let to = y.data.add(r * y.row + (first + c * apart) * y.step);
            *to = if add { *to + total } else { total };
        });
    }
}

/// Registers side by side, at most, where columns are.
pub(super) const SIDE: usize = 4;
/// Numbers in the widest register.
pub(super) const LANES: usize = 16;

/// Writes, or adds, what so many registers of each row hold of columns side by side, from one on.
///
/// # Safety
/// The columns must be there, and writable by no one else; `side` is at most [`SIDE`].
#[inline(always)]
pub(super) unsafe fn put<S: Simd, const R: usize>(
    sums: &[[S::V; SIDE]; R],
    side: usize,
    y: Rows<*mut f32>,
    column: usize,
    add: bool,
) {
    let mut out = [0.0f32; SIDE * LANES];
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: by the caller; `out` holds `SIDE` of the widest registers.
        unsafe {
            for (s, &sum) in sums[..side].iter().enumerate() {
                S::store(out.as_mut_ptr().add(s * S::LANES), sum);
            }
            for (i, &sum) in out[..side * S::LANES].iter().enumerate() {
                let to = y.data.add(r * y.row + (column + i) * y.step);
                *to = if add { *to + sum } else { sum };
            }
        }
    }
}

/// Columns side by side, a few registers of them at a time.
#[inline(always)]
unsafe fn axpy<S: Simd, E: Element, const R: usize>(
    x: Rows<*const f32>,
    matrix: Matrix<Dense<E>>,
    y: Rows<*mut f32>,
    (n, k): (usize, usize),
    add: bool,
) {
    let mut column = 0;
    // SAFETY: by the caller: columns are below `n`, summands below `k`, rows below `R`.
    unsafe {
        while column + S::LANES <= n {
            // As many registers side by side as there are columns for.
            let side = ((n - column) / S::LANES).min(SIDE);
            let mut sums = [[S::splat(0.0); SIDE]; R];
            if side == SIDE {
                for at in 0..k {
                    let w = matrix.data.0.add(column + at * matrix.along);
                    let w: [S::V; SIDE] = std::array::from_fn(|s| S::load(w.add(s * S::LANES)));
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let x = S::splat(*x.data.add(r * x.row + at * x.step));
                        for (sum, &w) in sums.iter_mut().zip(&w) {
                            *sum = S::fma(x, w, *sum);
                        }
                    }
                }
            } else {
                for at in 0..k {
                    for s in 0..side {
                        let w = S::load(matrix.data.0.add(column + s * S::LANES + at * matrix.along));
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let x = S::splat(*x.data.add(r * x.row + at * x.step));
                            sums[s] = S::fma(x, w, sums[s]);
                        }
                    }
                }
            }
            put::<S, R>(&sums, side, y, column, add);
            column += side * S::LANES;
        }
        for column in column..n {
            for r in 0..R {
                let mut sum = 0.0;
                for at in 0..k {
                    let w = (*matrix.data.0.add(column * matrix.column + at * matrix.along)).wide();
                    sum += *x.data.add(r * x.row + at * x.step) * w;
                }
                let to = y.data.add(r * y.row + column * y.step);
                *to = if add { *to + sum } else { sum };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use latentc_ir::SplitMix;
    use proptest::prelude::*;

    use super::*;

    /// Against sums in f64, of numbers that all types hold exactly; on every unit of this CPU.
    fn check<E: Element>(
        size: (usize, usize, usize),
        (dot, beside): (bool, bool),
        seed: u64,
        of: impl Fn(f32) -> E,
    ) {
        let (rows, n, k) = size;
        let mut rng = SplitMix(seed);
        let mut numbers =
            |len: usize| -> Vec<f32> { (0..len).map(|_| (rng.next_u64() % 33) as f32 / 4.0 - 4.0).collect() };
        let (x, w) = (numbers(rows * k), numbers(n * k));
        let w: Vec<E> = w.into_iter().map(of).collect();
        let (column, along) = if dot { (k, 1) } else { (1, n) };
        for unit in Unit::all() {
            // The result has gaps, which must stay as they are.
            let mut y = vec![7.0f32; rows * n * 2];
            let matrix = Matrix { data: Dense(w.as_ptr()), column, along };
            // Rows one after the other, or side by side.
            let (row, step) = if beside { (1, rows) } else { (k, 1) };
            let from = Rows { data: x.as_ptr(), count: rows, row, step };
            let to = Rows { data: y.as_mut_ptr(), count: rows, row: 2 * n, step: 2 };
            assert!(has_form(&matrix));
            // SAFETY: the sizes are those of the vectors.
            unsafe {
                product(unit, from, matrix, to, (n, k), false);
                product(unit, from, matrix, to, (n, k), true);
            }
            for r in 0..rows {
                for c in 0..n {
                    let term = |at: usize| {
                        f64::from(x[r * row + at * step]) * f64::from(w[c * column + at * along].wide())
                    };
                    // Sixteenths below 2^20 are exact in f32.
                    let want = 2.0 * (0..k).map(term).sum::<f64>();
                    assert_eq!(f64::from(y[(r * n + c) * 2]), want, "{unit:?}: row {r}, column {c}");
                    assert_eq!(y[(r * n + c) * 2 + 1], 7.0, "{unit:?}: behind row {r}, column {c}");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_few_rows_of_any_size(
            size in (1usize..10, 0usize..150, 0usize..150),
            form: (bool, bool),
            seed: u64,
        ) {
            check::<f32>(size, form, seed, |x| x);
            check::<bf16>(size, form, seed, bf16::from_f32);
            check::<f16>(size, form, seed, f16::from_f32);
        }
    }
}
