//! Scatters on the CPU: every thread has columns of its own, and adds the rows to them in order.
//!
//! Sums of outer products, as gradients of experts' weights are, are products of matrices: the rows are sorted by index, and each
//! group of them is one.

use std::borrow::Cow;

use gemm::Parallelism;
use latentc_ir::AxisId;
use rayon::prelude::*;

use super::few::{Dense, Matrix, Rows};
use super::multiply::{product, widen};
use super::spare::Spare;
use super::walk::{Loop, Loops, merge, offset, place, step, take_longest, turns};
use super::{Shared, View, ViewMut};
use crate::device::{DeviceError, Floats};
use crate::map::strides;
use crate::program::Kernel;
use crate::scatter::ScatterPlan;

/// Fewer columns than these are not worth a thread.
const COLUMNS: usize = 64;

/// Rows of a matrix that one task makes.
const BLOCK: usize = 128;

/// Runs a scatter. `extents` are those of the body's axes.
pub(super) fn run(
    kernel: &Kernel,
    inputs: &[Option<View<'_>>],
    output: ViewMut<'_>,
    extents: &[usize],
    spare: &mut Spare,
) -> Result<(), DeviceError> {
    let body = &kernel.body;
    let fail = |why: &str| DeviceError::Kernel { kernel: kernel.name.clone(), why: why.to_owned() };
    let plan = ScatterPlan::of(body).ok_or_else(|| fail("the body is no scatter of parameters"))?;
    let view = |v| body.params.iter().position(|p| *p == v).and_then(|n| inputs[n]);
    let wrong = || fail("a scatter needs floats and an integer index");
    let (Some(View::I(index)), ViewMut::F(y)) = (view(plan.index), output) else { return Err(wrong()) };
    // One factor stands beside a 1 that all rows and columns share.
    let mut copies = Vec::new();
    for &factor in &plan.factors {
        let x = view(factor).and_then(View::floats).ok_or_else(wrong)?;
        copies.push(match x {
            Floats::F32(x) => Cow::Borrowed(x),
            narrow => {
                let mut wide = vec![0.0; narrow.len()];
                widen(narrow, &mut wide);
                Cow::Owned(wide)
            }
        });
    }
    copies.resize(2, Cow::Borrowed(&[1.0]));
    let axes: Vec<&[AxisId]> = plan.factors.iter().map(|&v| &body.ty(v).axes[..]).chain([&[][..]]).collect();
    let (x_axes, y_axes) = ([axes[0], axes[1]], &body.ty(body.results[0]).axes);
    let (x_steps, y_steps) = (x_axes.map(|axes| strides(axes, extents)), strides(y_axes, extents));
    let extent = |a: &AxisId| extents[a.0 as usize];
    let size = extent(&plan.along);
    let total: usize = y_axes.iter().map(extent).product();
    y[..total].fill(0.0);
    if x_axes.iter().any(|axes| axes.iter().any(|a| extent(a) == 0)) {
        return Ok(());
    }
    let row_extents: Vec<_> = plan.rows.iter().map(extent).collect();
    let along = |axes: &[_], steps: &[usize]| -> Vec<usize> {
        plan.rows.iter().map(|&a| step(a, axes, steps)).collect()
    };
    let (x_row, y_row) = ([0, 1].map(|n| along(x_axes[n], &x_steps[n])), along(y_axes, &y_steps));
    let index = &index[..row_extents.iter().product()];
    if let Some(&wrong) = index.iter().find(|&&e| e < 0 || e as usize >= size) {
        return Err(DeviceError::Index { kernel: kernel.name.clone(), index: i64::from(wrong), size });
    }
    let e_step = step(plan.along, y_axes, &y_steps);
    // A product of matrices for each index.
    if let Some(sides) = plan.sides(body) {
        let side = |n: usize| {
            let axes = &sides[n];
            let inner = strides(axes, extents);
            let loops = axes.iter().zip(&inner).map(|(a, &dense)| {
                (extent(a), [step(*a, x_axes[n], &x_steps[n]), dense, step(*a, y_axes, &y_steps)])
            });
            Side { x: &copies[n], row: &x_row[n], loops: merge(loops) }
        };
        let groups = Groups { index, row_extents: &row_extents, size, step: e_step };
        return groups.multiply([side(0), side(1)], y, spare);
    }
    let mut loops: Loops<3> = merge(plan.columns.iter().map(|&a| {
        let [p, q] = [0, 1].map(|n| step(a, x_axes[n], &x_steps[n]));
        (extent(&a), [p, q, step(a, y_axes, &y_steps)])
    }));
    // Neighbours in memory are one sweep, and threads share the longest of the others, or the sweep where it is all there is.
    let sweep = match loops.iter().position(|l| l.1[2] == 1) {
        Some(n) => loops.remove(n),
        None => (1, [0; 3]),
    };
    let part =
        if loops.is_empty() { sweep.0.div_ceil(rayon::current_num_threads()).max(COLUMNS) } else { sweep.0 };
    let shared = if loops.is_empty() { (1, [0; 3]) } else { take_longest(&mut loops) };
    let out = Shared(y.as_mut_ptr());
    let parts = sweep.0.div_ceil(part);
    let chunk = shared.0.div_ceil(rayon::current_num_threads());
    (0..shared.0.div_ceil(chunk) * parts).into_par_iter().for_each(|task| {
        let (from, own) = (task % parts * part, task / parts * chunk);
        let len = part.min(sweep.0 - from);
        for (row, &e) in index.iter().enumerate() {
            let x_at = [0, 1].map(|n| offset(row, &row_extents, &x_row[n]));
            let to = offset(row, &row_extents, &y_row) + e as usize * e_step;
            for turn in 0..turns(&loops) {
                let at = place(&loops, turn);
                for c in own..shared.0.min(own + chunk) {
                    let here = |n: usize| at[n] + c * shared.1[n] + from * sweep.1[n];
                    // SAFETY: `fit` made sure that the output holds all indices of its type, and `e` is one of them. Two
                    // threads have different columns, which have different places whatever the row.
                    let y = unsafe { std::slice::from_raw_parts_mut(out.get().add(to + here(2)), len) };
                    let x = [0, 1].map(|n| (&copies[n][x_at[n] + here(n)..], sweep.1[n]));
                    add(y, x);
                }
            }
        }
    });
    Ok(())
}

/// A factor of outer products.
struct Side<'a> {
    x: &'a [f32],
    /// From one row to the next, along each axis of the index.
    row: &'a [usize],
    /// Its columns, with steps in the factor, in a dense row of them, and in the result.
    loops: Loops<3>,
}

/// Rows that belong together by an index.
struct Groups<'a> {
    index: &'a [i32],
    row_extents: &'a [usize],
    /// How many groups there are.
    size: usize,
    /// From one group's matrix to the next in the result.
    step: usize,
}

impl Groups<'_> {
    /// Makes the matrix of each group that has rows: `y[e, a, b]` is the sum over the rows of `e`, in order, of their outer products.
    fn multiply(&self, sides: [Side<'_>; 2], y: &mut [f32], spare: &mut Spare) -> Result<(), DeviceError> {
        let mut of: Vec<Vec<usize>> = vec![Vec::new(); self.size];
        self.index.iter().enumerate().for_each(|(row, &e)| of[e as usize].push(row));
        let order: Vec<usize> = of.iter().flatten().copied().collect();
        let widths = [0, 1].map(|n| turns(&sides[n].loops));
        let mut packed =
            [spare.take(true, order.len() * widths[0])?, spare.take(true, order.len() * widths[1])?];
        for (n, side) in sides.iter().enumerate() {
            let rows = packed[n].floats().par_chunks_mut(widths[n].max(1));
            rows.zip(&order).for_each(|(to, &row)| {
                let from = &side.x[offset(row, self.row_extents, side.row)..];
                match side.loops[..] {
                    [] => to[0] = from[0],
                    [(len, [1, 1, _])] => to.copy_from_slice(&from[..len]),
                    _ => to.iter_mut().enumerate().for_each(|(i, to)| *to = from[place(&side.loops, i)[0]]),
                }
            });
        }
        // What does not fit into one matrix is several.
        let [(longest_a, outer_a), (longest_b, outer_b)] = sides.map(|side| {
            let mut loops = side.loops;
            (take_longest(&mut loops), loops)
        });
        let mut tasks = Vec::new();
        let mut start = 0;
        for (e, rows) in of.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
            for outer in 0..turns(&outer_a) * turns(&outer_b) {
                tasks.extend(
                    (0..longest_a.0).step_by(BLOCK).map(|first| (e, start, rows.len(), outer, first)),
                );
            }
            start += rows.len();
        }
        let out = Shared(y.as_mut_ptr());
        let [a, b] = packed.each_mut().map(|lane| &*lane.floats());
        // The step along an axis of one element is never taken.
        let step = |(extent, steps): Loop<3>, of: usize| if extent == 1 { 1 } else { steps[of] };
        tasks.par_iter().for_each(|&(e, start, count, outer, first)| {
            let [_, a_at, y_a] = place(&outer_a, outer / turns(&outer_b));
            let [_, b_at, y_b] = place(&outer_b, outer % turns(&outer_b));
            let a = &a[start * widths[0] + a_at + first * longest_a.1[1]..];
            let b = &b[start * widths[1] + b_at..];
            let rows = BLOCK.min(longest_a.0 - first);
            let a = Rows { data: a.as_ptr(), count: rows, row: step(longest_a, 1), step: widths[0] };
            let b = Matrix { data: Dense(b.as_ptr()), column: step(longest_b, 1), along: widths[1] };
            // SAFETY: `fit` made sure that the output holds all indices of its type. Each task has columns of its own, and what
            // is packed holds `count` rows from `start` on.
            unsafe {
                let to = out.get().add(e * self.step + y_a + y_b + first * longest_a.1[2]);
                let to = Rows { data: to, count: rows, row: step(longest_a, 2), step: step(longest_b, 2) };
                product(a, b, to, (longest_b.0, count), false, Parallelism::None);
            }
        });
        packed.into_iter().for_each(|v| spare.give(v));
        Ok(())
    }
}

/// Adds products to a run of the result, of factors with their steps.
fn add(y: &mut [f32], [(a, p), (b, q)]: [(&[f32], usize); 2]) {
    match (p, q) {
        (1, 0) => y.iter_mut().zip(a).for_each(|(y, a)| *y += a * b[0]),
        (0, 1) => y.iter_mut().zip(b).for_each(|(y, b)| *y += a[0] * b),
        _ => y.iter_mut().enumerate().for_each(|(n, y)| *y += a[n * p] * b[n * q]),
    }
}
