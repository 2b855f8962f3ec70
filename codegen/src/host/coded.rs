//! Matrices of codes: a byte for each element, and a scale for each group of them that lie behind one another. Few rows meet the codes in
//! registers, where they become numbers; for many, columns are widened block by block.

use smallvec::SmallVec;

use super::few::{self, LANES, Matrix, Rows, SIDE};
use super::multiply::Place;
use super::simd::{Held, Plain, Simd, Unit, on_best_unit};
use super::spare::with_floats;

/// Codes from one of them on. Groups are counted from the first of the tensor on.
#[derive(Clone, Copy)]
pub(super) struct Codes<'a> {
    codes: &'a [u8],
    scales: &'a [f32],
    /// Elements of a group.
    group: usize,
    /// The code of zero.
    centre: f32,
    /// Where these begin.
    first: usize,
}

impl<'a> Codes<'a> {
    /// All codes of a tensor, which lie in words. `None` if there are not as many scales as groups.
    pub(super) fn new(words: &'a [i32], scales: &'a [f32], group: usize, centre: i32) -> Option<Codes<'a>> {
        // SAFETY: each of the bytes of an integer is one.
        let codes: &[u8] = unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) };
        let whole = group > 0 && scales.len().checked_mul(group)? >= codes.len();
        whole.then_some(Codes { codes, scales, group, centre: centre as f32, first: 0 })
    }

    /// How many there are.
    pub(super) fn len(self) -> usize {
        self.codes.len()
    }

    /// The numbers that all of them stand for.
    pub(super) fn all(self, numbers: &mut [f32]) {
        self.line(0, numbers);
    }

    /// One number.
    fn number(self, at: usize) -> f32 {
        let at = self.first + at;
        (f32::from(self.codes[at]) - self.centre) * self.scales[at / self.group]
    }

    /// Numbers side by side, from one on.
    fn line(self, at: usize, mut numbers: &mut [f32]) {
        let mut at = self.first + at;
        while !numbers.is_empty() {
            let here = numbers.len().min(self.group - at % self.group);
            let (now, later) = numbers.split_at_mut(here);
            widen(&self.codes[at..at + here], self.scales[at / self.group], self.centre, now);
            (at, numbers) = (at + here, later);
        }
    }

    /// From here on, as pointers.
    fn pointers(self) -> (*const u8, *const f32) {
        (
            self.codes.as_ptr().wrapping_add(self.first),
            self.scales.as_ptr().wrapping_add(self.first / self.group),
        )
    }
}

on_best_unit! {
    /// Codes with one scale as numbers.
    fn widen(codes: &[u8], scale: f32, centre: f32, numbers: &mut [f32]) {
        for (number, &code) in numbers.iter_mut().zip(codes) {
            *number = (f32::from(code) - centre) * scale;
        }
    }
}

/// How far ahead codes are asked for, in bytes: two pages, since the CPU's own look-ahead begins anew with each.
const AHEAD: usize = 1 << 13;
/// Bytes that come from memory together.
const LINE: usize = 64;

/// Sums of groups that need no memory of the heap: those of four rows of 4,096 numbers, in groups of 64.
const SUMS: usize = 256;

/// Whether sums are over whole groups. What a loop steps by is then one, and not one because it is never taken.
fn sums_groups(matrix: &Matrix<Codes<'_>>, k: usize) -> bool {
    matrix.along == 1 && k.is_multiple_of(matrix.data.group)
}

impl Place for Codes<'_> {
    unsafe fn at(self, elements: usize) -> Self {
        Codes { first: self.first + elements, ..self }
    }

    fn has_form(matrix: &Matrix<Self>, k: usize) -> bool {
        sums_groups(matrix, k) || (matrix.column == 1 && matrix.data.group.is_multiple_of(LANES))
    }

    fn held(self) -> Option<Held> {
        None
    }

    unsafe fn few(
        x: Rows<*const f32>,
        matrix: Matrix<Self>,
        y: Rows<*mut f32>,
        (n, k): (usize, usize),
        add: bool,
    ) {
        // SAFETY: by the caller, and since the unit is one that the CPU has.
        unsafe { product(Unit::best(), x, matrix, y, (n, k), add) };
    }

    unsafe fn widened(matrix: Matrix<Self>, (n, k): (usize, usize)) -> (Vec<f32>, usize, usize) {
        let dense = matrix.along <= matrix.column;
        let (lines, line, step) = if dense { (n, k, matrix.along) } else { (k, n, matrix.column) };
        let next = if dense { matrix.column } else { matrix.along };
        let mut wide = vec![0.0; n * k];
        for (i, numbers) in wide.chunks_exact_mut(line.max(1)).enumerate().take(lines) {
            if step == 1 {
                matrix.data.line(i * next, numbers);
            } else {
                (0..).zip(numbers).for_each(|(j, x)| *x = matrix.data.number(i * next + j * step));
            }
        }
        if dense { (wide, k, 1) } else { (wide, 1, n) }
    }
}

/// As [`few::product`].
///
/// # Safety
/// As there.
unsafe fn product(
    unit: Unit,
    x: Rows<*const f32>,
    matrix: Matrix<Codes<'_>>,
    y: Rows<*mut f32>,
    size: (usize, usize),
    add: bool,
) {
    with_floats(|dense| {
        let x = if sums_groups(&matrix, size.1) {
            // SAFETY: by the caller.
            unsafe { few::dense::<u8>(unit, x, size.1, dense) }
        } else {
            x
        };
        // SAFETY: by the caller, and since the unit is one that the CPU has.
        unsafe {
            match unit {
                Unit::Plain => rows::<Plain>(x, matrix, y, size, add),
                #[cfg(target_arch = "x86_64")]
                Unit::Avx2 => avx2(x, matrix, y, size, add),
                #[cfg(target_arch = "x86_64")]
                Unit::Avx512 => avx512(x, matrix, y, size, add),
            }
        }
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2(
    x: Rows<*const f32>,
    matrix: Matrix<Codes<'_>>,
    y: Rows<*mut f32>,
    size: (usize, usize),
    add: bool,
) {
    // SAFETY: by the caller.
    unsafe { rows::<super::simd::Avx2>(x, matrix, y, size, add) };
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(
    x: Rows<*const f32>,
    matrix: Matrix<Codes<'_>>,
    y: Rows<*mut f32>,
    size: (usize, usize),
    add: bool,
) {
    // SAFETY: by the caller.
    unsafe { rows::<super::simd::Avx512>(x, matrix, y, size, add) };
}

/// All rows, a few at a time.
#[inline(always)]
unsafe fn rows<S: Simd>(
    x: Rows<*const f32>,
    matrix: Matrix<Codes<'_>>,
    y: Rows<*mut f32>,
    size: (usize, usize),
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
            match (sums_groups(&matrix, size.1), x.count - first) {
                (true, 1) => dot::<S, 1, 4>(x, matrix, y, size, add),
                (true, 2) => dot::<S, 2, 4>(x, matrix, y, size, add),
                (true, 3) => dot::<S, 3, 2>(x, matrix, y, size, add),
                (true, _) => dot::<S, 4, 2>(x, matrix, y, size, add),
                (false, 1) => axpy::<S, 1>(x, matrix, y, size, add),
                (false, 2) => axpy::<S, 2>(x, matrix, y, size, add),
                (false, 3) => axpy::<S, 3>(x, matrix, y, size, add),
                (false, _) => axpy::<S, 4>(x, matrix, y, size, add),
            }
        }
        first += 4;
    }
}

/// Products of vectors, one column after the other: one stream of memory. Of a group, the codes themselves are multiplied, in `U` sums for
/// each row, and added up: the sum of `x (code - centre)` is that of `x code`, less `centre` times that of `x`, which is the same for
/// all columns.
#[inline(always)]
unsafe fn dot<S: Simd, const R: usize, const U: usize>(
    x: Rows<*const f32>,
    matrix: Matrix<Codes<'_>>,
    y: Rows<*mut f32>,
    (n, k): (usize, usize),
    add: bool,
) {
    let Codes { group, centre, .. } = matrix.data;
    let (groups, whole) = (k / group, group - group % S::LANES);
    let starts = (0..R).flat_map(|r| (0..groups).map(move |g| r * x.row + g * group));
    // SAFETY: by the caller: summands are below `k`, rows below `R`, columns below `n`. Each column begins with a group.
    unsafe {
        let sum = |first: usize| std::slice::from_raw_parts(x.data.add(first), whole).iter().sum::<f32>();
        let sums_of_x: SmallVec<[f32; SUMS]> = starts.map(sum).collect();
        for column in 0..n {
            let (codes, scales) = matrix.data.at(column * matrix.column).pointers();
            let mut totals = [S::splat(0.0); R];
            let mut rest = [0.0f32; R];
            for g in 0..groups {
                let (start, scale) = (g * group, *scales.add(g));
                let mut sums = [[S::splat(0.0); U]; R];
                let mut at = start;
                while at + U * S::LANES <= start + whole {
                    for u in 0..U {
                        register::<S, R, U>(
                            x,
                            codes,
                            at + u * S::LANES,
                            at + u * S::LANES - start,
                            &mut sums,
                            u,
                        );
                    }
                    at += U * S::LANES;
                }
                while at < start + whole {
                    register::<S, R, U>(x, codes, at, at - start, &mut sums, 0);
                    at += S::LANES;
                }
                for (r, sums) in sums.into_iter().enumerate() {
                    let sum = sums.into_iter().reduce(|a, b| S::add(a, b)).unwrap_or(S::splat(0.0));
                    totals[r] = S::fma(sum, S::splat(scale), totals[r]);
                    rest[r] -= centre * scale * sums_of_x[r * groups + g];
                }
                for at in at..start + group {
                    let w = (f32::from(*codes.add(at)) - centre) * scale;
                    for (r, rest) in rest.iter_mut().enumerate() {
                        *rest += *x.data.add(r * x.row + at) * w;
                    }
                }
            }
            for (r, (&total, rest)) in totals.iter().zip(rest).enumerate() {
                let total = S::sum(total) + rest;
                let to = y.data.add(r * y.row + column * y.step);
                *to = if add { *to + total } else { total };
            }
        }
    }
}

/// Multiplies a register of codes with all rows.
#[inline(always)]
unsafe fn register<S: Simd, const R: usize, const U: usize>(
    x: Rows<*const f32>,
    codes: *const u8,
    at: usize,
    in_group: usize,
    sums: &mut [[S::V; U]; R],
    number: usize,
) {
    // SAFETY: by the caller.
    unsafe {
        // Once for each line of memory.
        if in_group.is_multiple_of(LINE) {
            S::prefetch(codes.wrapping_add(at + AHEAD));
        }
        let w = S::load(codes.add(at));
        for (r, sums) in sums.iter_mut().enumerate() {
            sums[number] = S::fma(S::load(x.data.add(r * x.row + at)), w, sums[number]);
        }
    }
}

/// Columns side by side, a few registers of them at a time.
#[inline(always)]
unsafe fn axpy<S: Simd, const R: usize>(
    x: Rows<*const f32>,
    matrix: Matrix<Codes<'_>>,
    y: Rows<*mut f32>,
    (n, k): (usize, usize),
    add: bool,
) {
    let Codes { group, centre, .. } = matrix.data;
    let mut column = 0;
    // SAFETY: by the caller: columns are below `n`, summands below `k`, rows below `R`. Lines begin with a group, and no register has
    // columns of two.
    unsafe {
        let (codes, scales) = matrix.data.pointers();
        while column + S::LANES <= n {
            let side = ((n - column) / S::LANES).min(SIDE);
            let mut sums = [[S::splat(0.0); SIDE]; R];
            for at in 0..k {
                let line = codes.wrapping_add(at * matrix.along);
                let of_line = scales.wrapping_add(at * matrix.along / group);
                for s in 0..side {
                    let first = column + s * S::LANES;
                    let scale = *of_line.add(first / group);
                    let w = S::fma(S::load(line.add(first)), S::splat(scale), S::splat(-centre * scale));
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let x = S::splat(*x.data.add(r * x.row + at * x.step));
                        sums[s] = S::fma(x, w, sums[s]);
                    }
                }
            }
            few::put::<S, R>(&sums, side, y, column, add);
            column += side * S::LANES;
        }
        for column in column..n {
            for r in 0..R {
                let term = |at: usize| {
                    *x.data.add(r * x.row + at * x.step)
                        * matrix.data.number(column * matrix.column + at * matrix.along)
                };
                let sum: f32 = (0..k).map(term).sum();
                let to = y.data.add(r * y.row + column * y.step);
                *to = if add { *to + sum } else { sum };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use latentc_ir::SplitMix;
    use proptest::prelude::*;

    use super::*;

    /// Against sums in f64, of numbers that are exact; on every unit of this CPU, and widened.
    fn check((rows, n, groups): (usize, usize, usize), group: usize, dot: bool, seed: u64) {
        let mut rng = SplitMix(seed);
        // Groups along what is summed, or along the columns.
        let (n, k) = if dot { (n, groups * group) } else { (groups * group, n) };
        let words: Vec<i32> = (0..n * k / 4).map(|_| rng.next_u64() as i32).collect();
        let scales: Vec<f32> = (0..n * k / group).map(|_| (rng.next_u64() % 9) as f32 / 8.0 - 0.5).collect();
        let x: Vec<f32> = (0..rows * k).map(|_| (rng.next_u64() % 9) as f32 / 4.0 - 1.0).collect();
        let all = Codes::new(&words, &scales, group, 127).expect("a scale for each group");
        let (column, along) = if dot { (k, 1) } else { (1, n) };
        let matrix = Matrix { data: all, column, along };
        let number = |at: usize| {
            let code = words[at / 4].to_le_bytes()[at % 4];
            (f64::from(code) - 127.0) * f64::from(scales[at / group])
        };
        let from = Rows { data: x.as_ptr(), count: rows, row: k, step: 1 };
        for unit in Unit::all() {
            let mut y = vec![7.0f32; rows * n * 2];
            let to = Rows { data: y.as_mut_ptr(), count: rows, row: 2 * n, step: 2 };
            if Codes::has_form(&matrix, k) {
                // SAFETY: the sizes are those of the vectors.
                unsafe {
                    product(unit, from, matrix, to, (n, k), false);
                    product(unit, from, matrix, to, (n, k), true);
                }
            } else {
                // SAFETY: as above.
                let (wide, column, along) = unsafe { Codes::widened(matrix, (n, k)) };
                for r in 0..rows {
                    for c in 0..n {
                        let term = |at: usize| x[r * k + at] * wide[c * column + at * along];
                        y[(r * n + c) * 2] = 2.0 * (0..k).map(term).sum::<f32>();
                    }
                }
            }
            for r in 0..rows {
                for c in 0..n {
                    let want: f64 =
                        (0..k).map(|at| f64::from(x[r * k + at]) * number(c * column + at * along)).sum();
                    // Eighths and quarters of whole numbers below 2^19 are exact in f32.
                    assert_eq!(f64::from(y[(r * n + c) * 2]), 2.0 * want, "{unit:?}: row {r}, column {c}");
                    assert_eq!(y[(r * n + c) * 2 + 1], 7.0, "{unit:?}: behind row {r}, column {c}");
                }
            }
        }
        let mut numbers = vec![0.0; all.len()];
        all.all(&mut numbers);
        assert!(numbers.iter().enumerate().all(|(at, &x)| f64::from(x) == number(at)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn codes_of_any_size_and_group(
            size in (1usize..10, 1usize..70, 1usize..5),
            group in prop::sample::select(vec![4usize, 8, 12, 16, 24, 32, 48, 64, 128]),
            dot: bool,
            seed: u64,
        ) {
            check(size, group, dot, seed);
        }
    }
}
