//! Scatters on the CPU: every thread has columns of its own, and adds the rows to them in order.

use std::borrow::Cow;

use latentc_ir::AxisId;
use rayon::prelude::*;

use super::multiply::wide;
use super::walk::{Loop, merge, offset, place, step, take_longest, turns};
use super::{Shared, View, ViewMut};
use crate::device::{DeviceError, Floats};
use crate::map::strides;
use crate::program::Kernel;
use crate::scatter::ScatterPlan;

/// Fewer columns than these are not worth a thread.
const COLUMNS: usize = 64;

/// Runs a scatter. `extents` are those of the body's axes.
pub(super) fn run(
    kernel: &Kernel,
    inputs: &[Option<View<'_>>],
    output: ViewMut<'_>,
    extents: &[usize],
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
            narrow => Cow::Owned(wide(narrow)),
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
    let mut loops: Vec<Loop<3>> = merge(plan.columns.iter().map(|&a| {
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
    let e_step = step(plan.along, y_axes, &y_steps);
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
                    // SAFETY: `check` made sure that the output holds all indices of its type, and `e` is one of them. Two
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

/// Adds products to a run of the result, of factors with their steps.
fn add(y: &mut [f32], [(a, p), (b, q)]: [(&[f32], usize); 2]) {
    match (p, q) {
        (1, 0) => y.iter_mut().zip(a).for_each(|(y, a)| *y += a * b[0]),
        (0, 1) => y.iter_mut().zip(b).for_each(|(y, b)| *y += a[0] * b),
        _ => y.iter_mut().enumerate().for_each(|(n, y)| *y += a[n * p] * b[n * q]),
    }
}
