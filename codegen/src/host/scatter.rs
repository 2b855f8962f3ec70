//! Scatters on the CPU: every thread has columns of its own, and adds the rows to them in order.

use latentc_ir::AxisId;
use rayon::prelude::*;

use super::walk::{Loop, merge, offset, place, step, take_longest, turns};
use super::{Shared, View, ViewMut};
use crate::device::DeviceError;
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
    let plan = ScatterPlan::of(body).ok_or_else(|| fail("the body is no scatter of two parameters"))?;
    let view = |v| body.params.iter().position(|p| *p == v).and_then(|n| inputs[n]);
    let (Some(View::F(x)), Some(View::I(index)), ViewMut::F(y)) = (view(plan.x), view(plan.index), output)
    else {
        return Err(fail("a scatter needs floats and an integer index"));
    };
    let (x_axes, y_axes) = (&body.ty(plan.x).axes, &body.ty(body.results[0]).axes);
    let (x_steps, y_steps) = (strides(x_axes, extents), strides(y_axes, extents));
    let extent = |a: &AxisId| extents[a.0 as usize];
    let size = extent(&plan.along);
    let total: usize = y_axes.iter().map(extent).product();
    y[..total].fill(0.0);
    if x_axes.iter().any(|a| extent(a) == 0) {
        return Ok(());
    }
    let row_extents: Vec<_> = plan.rows.iter().map(extent).collect();
    let along = |axes: &[_], steps: &[usize]| -> Vec<usize> {
        plan.rows.iter().map(|&a| step(a, axes, steps)).collect()
    };
    let (x_row, y_row) = (along(x_axes, &x_steps), along(y_axes, &y_steps));
    let index = &index[..row_extents.iter().product()];
    if let Some(&wrong) = index.iter().find(|&&e| e < 0 || e as usize >= size) {
        return Err(DeviceError::Index { kernel: kernel.name.clone(), index: i64::from(wrong), size });
    }
    let mut others: Vec<Loop<2>> = merge(
        plan.columns.iter().map(|&a| (extent(&a), [step(a, x_axes, &x_steps), step(a, y_axes, &y_steps)])),
    );
    let (columns, [x_step, y_step]) = take_longest(&mut others);
    let e_step = step(plan.along, y_axes, &y_steps);
    let out = Shared(y.as_mut_ptr());
    let part = columns.div_ceil(rayon::current_num_threads()).max(COLUMNS);
    (0..columns.div_ceil(part)).into_par_iter().for_each(|p| {
        for (row, &e) in index.iter().enumerate() {
            let from = offset(row, &row_extents, &x_row);
            let to = offset(row, &row_extents, &y_row) + e as usize * e_step;
            for turn in 0..turns(&others) {
                let [x_at, y_at] = place(&others, turn);
                for c in p * part..columns.min((p + 1) * part) {
                    // SAFETY: `check` made sure that the output holds all indices of its type, and `e` is one of them. Two
                    // threads have different columns, which have different places whatever the row.
                    unsafe { *out.get().add(to + y_at + c * y_step) += x[from + x_at + c * x_step] };
                }
            }
        }
    });
    Ok(())
}
