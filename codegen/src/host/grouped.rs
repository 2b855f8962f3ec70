//! Grouped products on the CPU: rows are sorted by index, each group is one product, and rows of one result are added up in order.

use gemm::Parallelism;
use latentc_ir::AxisId;
use rayon::prelude::*;

use super::walk::{Loop, merge, offset, place, step, take_longest, turns};
use super::{Shared, View, ViewMut};
use crate::device::DeviceError;
use crate::grouped::GroupedPlan;
use crate::map::strides;
use crate::program::Kernel;

/// Runs a grouped product. `extents` are those of the body's axes.
pub(super) fn run(
    kernel: &Kernel,
    inputs: &[Option<View<'_>>],
    output: ViewMut<'_>,
    extents: &[usize],
) -> Result<(), DeviceError> {
    let body = &kernel.body;
    let fail = |why: &str| DeviceError::Kernel { kernel: kernel.name.clone(), why: why.to_owned() };
    let plan = GroupedPlan::of(body).ok_or_else(|| fail("the body is no grouped product"))?;
    let view = |v| body.params.iter().position(|p| *p == v).and_then(|n| inputs[n]);
    let (Some(View::F(table)), Some(View::I(index)), Some(View::F(x)), ViewMut::F(y)) =
        (view(plan.table), view(plan.index), view(plan.x), output)
    else {
        return Err(fail("a grouped product needs floats and an integer index"));
    };
    let y_axes = &body.ty(body.results[0]).axes;
    let (table_axes, x_axes) = (&body.ty(plan.table).axes, &body.ty(plan.x).axes);
    let (table_steps, x_steps) = (strides(table_axes, extents), strides(x_axes, extents));
    let y_steps = strides(y_axes, extents);
    let extent = |a: &AxisId| extents[a.0 as usize];
    let size = |axes: &[AxisId]| axes.iter().map(extent).product::<usize>();
    let (m, k, experts) = (size(&plan.m), size(&plan.k), extent(&plan.along));
    let total: usize = y_axes.iter().map(extent).product();
    y[..total].fill(0.0);
    let rows = size(&plan.rows);
    if rows * m * k == 0 {
        return Ok(());
    }

    // Where each row of the index reads and writes, and the rows of each expert, in order.
    let row_extents: Vec<_> = plan.rows.iter().map(extent).collect();
    let along = |axes: &[AxisId], steps: &[usize]| {
        plan.rows.iter().map(|&a| step(a, axes, steps)).collect::<Vec<_>>()
    };
    let (x_row, y_row) = (along(x_axes, &x_steps), along(y_axes, &y_steps));
    let mut of: Vec<Vec<usize>> = vec![Vec::new(); experts];
    for (row, &e) in index[..rows].iter().enumerate() {
        if e < 0 || e as usize >= experts {
            return Err(DeviceError::Index {
                kernel: kernel.name.clone(),
                index: i64::from(e),
                size: experts,
            });
        }
        of[e as usize].push(row);
    }
    let order: Vec<usize> = of.iter().flatten().copied().collect();
    let mut starts = vec![0];
    for group in &of {
        starts.push(starts[starts.len() - 1] + group.len());
    }

    // Rows of the operand side by side, the summed axes in the table's order.
    let k_extents: Vec<_> = plan.k.iter().map(extent).collect();
    let x_k: Vec<_> = plan.k.iter().map(|&a| step(a, x_axes, &x_steps)).collect();
    let dense = x_k == strides(&plan.k, extents);
    let mut packed = vec![0.0f32; rows * k];
    packed.par_chunks_mut(k).zip(&order).for_each(|(to, &row)| {
        let from = offset(row, &row_extents, &x_row);
        if dense {
            to.copy_from_slice(&x[from..from + k]);
        } else {
            to.iter_mut().enumerate().for_each(|(i, to)| *to = x[from + offset(i, &k_extents, &x_k)]);
        }
    });

    // Steps in the table, and in a dense row of these axes.
    let loops = |axes: &[AxisId]| -> Vec<Loop<2>> {
        let rows = strides(axes, extents);
        merge(axes.iter().zip(rows).map(|(a, row)| (extent(a), [step(*a, table_axes, &table_steps), row])))
    };
    let (mut m_loops, mut k_loops) = (loops(&plan.m), loops(&plan.k));
    let (gm, gk) = (take_longest(&mut m_loops), take_longest(&mut k_loops));
    let expert_step = step(plan.along, table_axes, &table_steps);
    let mut made = vec![0.0f32; rows * m];
    let out = Shared(made.as_mut_ptr());
    let group = |e: usize, parallelism: Parallelism| {
        let (start, count) = (starts[e], starts[e + 1] - starts[e]);
        if count == 0 {
            return;
        }
        for i in 0..turns(&m_loops) {
            let [table_m, made_m] = place(&m_loops, i);
            for j in 0..turns(&k_loops) {
                let [table_k, packed_k] = place(&k_loops, j);
                // SAFETY: `check` made sure that the table holds all indices of its type, and `e` is one of them; `packed` and `made`
                // hold `rows` rows of k and m. Each group writes its own rows of `made`.
                unsafe {
                    gemm::gemm(
                        count,
                        gm.0,
                        gk.0,
                        out.get().add(start * m + made_m),
                        gm.1[1] as isize,
                        m as isize,
                        j > 0,
                        packed.as_ptr().add(start * k + packed_k),
                        gk.1[1] as isize,
                        k as isize,
                        table.as_ptr().add(e * expert_step + table_m + table_k),
                        gm.1[0] as isize,
                        gk.1[0] as isize,
                        1.0f32,
                        1.0f32,
                        false,
                        false,
                        false,
                        parallelism,
                    );
                }
            }
        }
    };
    let busy: Vec<usize> = (0..experts).filter(|&e| starts[e] < starts[e + 1]).collect();
    if busy.len() >= rayon::current_num_threads() {
        busy.par_iter().for_each(|&e| group(e, Parallelism::None));
    } else {
        busy.iter().for_each(|&e| group(e, Parallelism::Rayon(0)));
    }

    // Rows that meet in one result are added in the order of the experts, whichever thread made them.
    let m_extents: Vec<_> = plan.m.iter().map(extent).collect();
    let y_m: Vec<_> = plan.m.iter().map(|&a| step(a, y_axes, &y_steps)).collect();
    for (from, &row) in made.chunks_exact(m).zip(&order) {
        let to = offset(row, &row_extents, &y_row);
        if y_m == strides(&plan.m, extents) {
            y[to..to + m].iter_mut().zip(from).for_each(|(y, x)| *y += x);
        } else {
            from.iter().enumerate().for_each(|(i, x)| y[to + offset(i, &m_extents, &y_m)] += x);
        }
    }
    Ok(())
}
