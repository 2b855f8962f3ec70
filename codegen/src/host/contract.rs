//! Contractions on the CPU: the longest axis of each group belongs to a matrix product, the others are loops around it.

use gemm::Parallelism;
use latentc_ir::{AxisId, Op, ValueId};
use rayon::prelude::*;

use super::coded::Codes;
use super::few::{Dense, Matrix, Rows};
use super::map::{Strided, fail};
use super::multiply::{Place, Way, are_halves, copied, multiplies_halves, multiply, widen};
use super::simd::on_best_unit;
use super::spare::{Spare, Takes};
use super::walk::{Loop, Loops, merge, place, step, take_longest, turns};
use super::{Shared, View, ViewMut};
use crate::coded::{Coded, made_in};
use crate::contract::ContractPlan;
use crate::device::{DeviceError, Floats};
use crate::map::strides;
use crate::program::Kernel;

/// Below this many multiply-adds a product is not worth a second thread.
const SMALL: usize = 1 << 15;

/// The most columns of a result that are added up at once.
const COLUMNS: usize = 256;

/// Rows that are added up before their sum is added to the others': so that errors grow slower than the number of rows.
const CHUNK: usize = 64;

on_best_unit! {
    /// Adds the products of so many rows of two operands to sums of their columns.
    fn add_products(sums: &mut [f32], x: &[f32], w: &[f32], steps: [usize; 2], rows: usize) {
        let n = sums.len();
        let mut chunk = [0.0; COLUMNS];
        for first in (0..rows).step_by(CHUNK) {
            let chunk = &mut chunk[..n];
            chunk.fill(0.0);
            for row in first..rows.min(first + CHUNK) {
                let (x, w) = (&x[row * steps[0]..][..n], &w[row * steps[1]..][..n]);
                for i in 0..n {
                    chunk[i] += x[i] * w[i];
                }
            }
            for i in 0..n {
                sums[i] += chunk[i];
            }
        }
    }
}

/// A contraction at some sizes.
pub(super) struct Contraction {
    operands: [Operand; 2],
    product: Product,
}

/// What is multiplied: parameters by their numbers.
enum Operand {
    Floats(usize),
    Codes(Coded, [usize; 2]),
}

/// The same where it lies.
#[derive(Clone, Copy)]
enum Elements<'a> {
    Floats(Floats<'a>),
    Codes(Codes<'a>),
}

impl Contraction {
    /// Of a kernel without prologues and epilogues. `extents` are those of the body's axes.
    pub(super) fn new(kernel: &Kernel, extents: &[usize]) -> Result<Contraction, DeviceError> {
        let body = &kernel.body;
        let product = body.body.last().filter(|i| i.op == Op::Contract);
        let inst = product.ok_or_else(|| fail(kernel, "the body is no product"))?;
        let param = |v: ValueId| {
            let found = body.params.iter().position(|p| *p == v);
            found.ok_or_else(|| fail(kernel, "an operand is no parameter"))
        };
        let operand = |n: usize| {
            Ok::<_, DeviceError>(match Coded::of(body, &made_in(body), inst.args[n]) {
                Some(coded) => Operand::Codes(coded, [param(coded.held[0])?, param(coded.held[1])?]),
                None => Operand::Floats(param(inst.args[n])?),
            })
        };
        let types = [inst.args[0], inst.args[1], inst.result()].map(|v| &body.ty(v).axes[..]);
        let plan = ContractPlan::new(types[0], types[1], types[2]);
        let steps = types.map(|axes| strides(axes, extents));
        let tensors = [0, 1, 2].map(|n| (types[n], &steps[n][..]));
        let product = Product::new(&plan, extents, tensors, are_halves(body, &inst.args));
        Ok(Contraction { operands: [operand(0)?, operand(1)?], product })
    }

    /// What it takes of each thread's.
    pub(super) fn takes(&self, takes: &mut Takes) {
        let Product { m, n, k, .. } = &self.product;
        takes.floats(copied(m.0.min(n.0), k.0));
    }

    /// Whether it reads a parameter as it is stored: all but the scales of codes.
    pub(super) fn reads_as_stored(&self, param: usize) -> bool {
        let scales =
            |operand: &Operand| matches!(operand, Operand::Codes(_, [_, scales]) if *scales == param);
        !self.operands.iter().any(scales)
    }

    /// Computes the kernel that this is of.
    pub(super) fn run(
        &self,
        kernel: &Kernel,
        inputs: &[Option<View<'_>>],
        output: ViewMut<'_>,
        spare: &mut Spare,
    ) -> Result<(), DeviceError> {
        let product = &self.product;
        let elements = |n: usize| {
            let found = match &self.operands[n] {
                Operand::Floats(param) => inputs[*param].and_then(View::floats).map(Elements::Floats),
                Operand::Codes(coded, held) => {
                    codes(coded, held.map(|param| inputs[param])).map(Elements::Codes)
                }
            };
            found.ok_or_else(|| fail(kernel, "a contraction needs floats"))
        };
        let operands = [elements(0)?, elements(1)?];
        let ViewMut::F(y) = output else {
            return Err(fail(kernel, "the result must be memory of its own, in f32"));
        };
        if let (Some(along), [Elements::Floats(Floats::F32(a)), Elements::Floats(Floats::F32(b))]) =
            (product.side_by_side(), operands)
        {
            // SAFETY: as below.
            unsafe { product.add_rows([a, b], Shared(y.as_mut_ptr()), along) };
            return Ok(());
        }
        // The operand with fewer rows is multiplied with the other, which is read as it is stored; for products of bf16 it is all the same
        // which of them has fewer, so neither is copied.
        let x = match operands {
            [Elements::Floats(Floats::F32(_)), Elements::Floats(Floats::Bf16(_))] if product.in_halves() => 0,
            [Elements::Floats(Floats::Bf16(_)), Elements::Floats(Floats::F32(_))] if product.in_halves() => 1,
            _ => product.rows_of(),
        };
        let len = match operands[x] {
            Elements::Floats(Floats::F32(_)) => 0,
            Elements::Floats(narrow) => narrow.len(),
            Elements::Codes(codes) => codes.len(),
        };
        let mut copy = spare.take(true, len)?;
        let rows = match operands[x] {
            Elements::Floats(Floats::F32(rows)) => rows,
            Elements::Floats(narrow) => {
                widen(narrow, copy.floats());
                copy.floats()
            }
            Elements::Codes(codes) => {
                codes.all(copy.floats());
                copy.floats()
            }
        };
        let y = Shared(y.as_mut_ptr());
        // SAFETY: `fit` made sure that each buffer holds all indices of its type.
        unsafe {
            match operands[1 - x] {
                Elements::Floats(w) => product.run_stored((x, rows), w, y, true),
                Elements::Codes(w) => product.run((x, rows), w, y, true),
            }
        }
        spare.give(copy);
        Ok(())
    }
}

/// The codes of an operand, in the memory of its words and scales.
pub(super) fn codes<'a>(coded: &Coded, held: [Option<View<'a>>; 2]) -> Option<Codes<'a>> {
    let [Some(View::I(words)), Some(View::F(scales))] = held else { return None };
    Codes::new(words, scales, coded.group as usize, coded.centre)
}

/// A product of two strided tensors, summed over their common axes into a third: matrix products in loops.
pub(super) struct Product {
    /// What does not fit into one matrix, where results differ.
    outer: Loops<3>,
    m: Loop<3>,
    n: Loop<3>,
    k: Loop<3>,
    /// What does not fit into one matrix, where results add up.
    inner: Loops<3>,
    /// Whether both operands are of [type](are_halves) bf16.
    halves: bool,
}

impl Product {
    /// For two operands and a result, given by their axes and steps, and the plan for these axes. Both operands may be of
    /// [type](are_halves) bf16.
    pub(super) fn new(
        plan: &ContractPlan,
        extents: &[usize],
        tensors: [Strided<'_>; 3],
        halves: bool,
    ) -> Product {
        let loops = |group: &[AxisId]| -> Loops<3> {
            let one = |&axis: &AxisId| {
                (extents[axis.0 as usize], tensors.map(|(axes, steps)| step(axis, axes, steps)))
            };
            merge(group.iter().map(one))
        };
        let (mut outer, mut m, mut n, mut inner) =
            (loops(&plan.batch), loops(&plan.m), loops(&plan.n), loops(&plan.k));
        let (gm, gn, gk) = (take_longest(&mut m), take_longest(&mut n), take_longest(&mut inner));
        outer.extend(m);
        outer.extend(n);
        Product { outer, m: gm, n: gn, k: gk, inner, halves }
    }

    /// Where neither operand is a matrix, each element of the result is a sum of its own. The loop along which all three have neighbours side
    /// by side, if there is one: whole rows are added up there, since one element after another would read memory in long steps.
    fn side_by_side(&self) -> Option<usize> {
        let alone = self.m.0 == 1 && self.n.0 == 1;
        self.outer.iter().position(|(_, steps)| *steps == [1; 3]).filter(|_| alone)
    }

    /// Computes the result by rows along one of the loops, by this machine's threads.
    ///
    /// # Safety
    /// As for [`run`](Product::run).
    unsafe fn add_rows(&self, operands: [&[f32]; 2], y: Shared<f32>, along: usize) {
        let mut outer = self.outer.clone();
        let (columns, _) = outer.remove(along);
        let (rows, steps) = self.k;
        if columns == 0 {
            return;
        }
        let width = columns.div_ceil(rayon::current_num_threads()).next_multiple_of(16).min(COLUMNS);
        let (blocks, inner) = (columns.div_ceil(width), turns(&self.inner));
        let task = |task: usize| {
            let at = place(&outer, task / blocks);
            let first = task % blocks * width;
            let mut sums = [0.0; COLUMNS];
            let sums = &mut sums[..width.min(columns - first)];
            // An empty sum is zero.
            for turn in 0..if rows == 0 { 0 } else { inner } {
                let add = place(&self.inner, turn);
                let from = |n: usize| &operands[n][at[n] + add[n] + first..];
                add_products(sums, from(0), from(1), [steps[0], steps[1]], rows);
            }
            // SAFETY: by the caller; each task writes its own elements of `y`.
            unsafe { std::ptr::copy_nonoverlapping(sums.as_ptr(), y.get().add(at[2] + first), sums.len()) };
        };
        let tasks = turns(&outer) * blocks;
        if tasks * width * rows * inner < SMALL {
            (0..tasks).for_each(task);
        } else {
            (0..tasks).into_par_iter().for_each(task);
        }
    }

    /// The operand that has the rows of the result that are fewer: 0 or 1.
    pub(super) fn rows_of(&self) -> usize {
        usize::from(self.m.0 > self.n.0)
    }

    /// Whether it is made in bf16.
    fn in_halves(&self) -> bool {
        multiplies_halves(self.halves, self.m.0, self.n.0)
    }

    /// Computes the result, by this machine's threads or by the caller's alone. `x` is an operand, known by its number, and `w` the other. The
    /// first is that of [`rows_of`](Product::rows_of) if the product is not [made in bf16](Product::in_halves).
    ///
    /// # Safety
    /// `x`, `w` and `y` must be good for all places that the extents and their tensor's steps lead to, and no one else may touch
    /// `y`, whose steps must keep all elements apart.
    pub(super) unsafe fn run<P: Place>(&self, (r, x): (usize, &[f32]), w: P, y: Shared<f32>, threads: bool) {
        let (row, column) = if r == 0 { (self.m, self.n) } else { (self.n, self.m) };
        let (n, depth) = (column.0, self.k.0);
        if row.0 == 0 || n == 0 {
            return;
        }
        // The step along an axis of one element is never taken.
        let step = |(extent, steps): Loop<3>, of: usize| if extent == 1 { 1 } else { steps[of] };
        let rows = Rows { data: x.as_ptr(), count: row.0, row: row.1[r], step: step(self.k, r) };
        let matrix = Matrix { data: w, column: step(column, 1 - r), along: step(self.k, 1 - r) };
        let way = Way::of(&matrix, &rows, (n, depth), self.halves);
        let width = way.columns(n, depth);
        let (outer, inner, blocks) = (turns(&self.outer), turns(&self.inner), n.div_ceil(width));
        let x = Shared(x.as_ptr().cast_mut());
        let task = |task: usize, parallelism: Parallelism| {
            let outer_at = place(&self.outer, task / blocks);
            let first = task % blocks * width;
            for j in 0..inner.max(1) {
                // An empty sum is zero: with nothing to add, the first product has k = 0 and clears the result.
                let (depth, add) = if inner == 0 { (0, [0; 3]) } else { (depth, place(&self.inner, j)) };
                let at = [0, 1, 2].map(|n| outer_at[n] + add[n]);
                // SAFETY: by the caller; indices are below the extents, and each task writes its own elements of `y`.
                unsafe {
                    let rows = Rows { data: x.get().add(at[r]).cast_const(), ..rows };
                    let from = w.at(at[1 - r] + first * column.1[1 - r]);
                    let matrix = Matrix { data: from, ..matrix };
                    let to = y.get().add(at[2] + first * column.1[2]);
                    let to = Rows { data: to, count: row.0, row: row.1[2], step: column.1[2] };
                    multiply(way, rows, matrix, to, (width.min(n - first), depth), j > 0, parallelism);
                }
            }
        };
        let tasks = outer * blocks;
        if !threads || outer * row.0 * n * depth * inner < SMALL {
            (0..tasks).for_each(|i| task(i, Parallelism::None));
        } else if tasks >= rayon::current_num_threads() {
            (0..tasks).into_par_iter().for_each(|i| task(i, Parallelism::None));
        } else {
            (0..tasks).for_each(|i| task(i, Parallelism::Rayon(0)));
        }
    }

    /// The same with a second operand in any form in which floats are stored.
    ///
    /// # Safety
    /// As for [`run`](Product::run).
    pub(super) unsafe fn run_stored(&self, x: (usize, &[f32]), w: Floats<'_>, y: Shared<f32>, threads: bool) {
        // SAFETY: by the caller.
        unsafe {
            match w {
                Floats::F32(w) => self.run(x, Dense(w.as_ptr()), y, threads),
                Floats::Bf16(w) => self.run(x, Dense(w.as_ptr()), y, threads),
                Floats::F16(w) => self.run(x, Dense(w.as_ptr()), y, threads),
            }
        }
    }
}
