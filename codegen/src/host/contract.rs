//! Contractions on the CPU: the innermost axis of each group goes to the `gemm` crate, the others are loops around it.

use gemm::Parallelism;
use latentc_ir::AxisId;
use rayon::prelude::*;

use super::walk::{Loop, merge, place, step, take_longest, turns};
use super::{Buffer, Shared, View};
use crate::contract::ContractPlan;
use crate::device::DeviceError;
use crate::map::strides;
use crate::program::Kernel;

/// Below this many multiply-adds a product is not worth a second thread.
const SMALL: usize = 1 << 15;

/// Runs a contraction. `extents` are those of the body's axes.
pub(super) fn run(
    kernel: &Kernel,
    inputs: &[Option<View<'_>>],
    output: &mut Buffer,
    extents: &[usize],
) -> Result<(), DeviceError> {
    let body = &kernel.body;
    let inst = &body.body[0];
    let operand = |n: usize| {
        let param = body.params.iter().position(|p| *p == inst.args[n]);
        match param.and_then(|p| inputs[p]) {
            Some(View::F(x)) => Ok(x),
            _ => Err(DeviceError::Kernel {
                kernel: kernel.name.clone(),
                why: "a contraction needs floats".into(),
            }),
        }
    };
    let (a, b) = (operand(0)?, operand(1)?);
    let Buffer::F32(y) = output else {
        return Err(DeviceError::Kernel {
            kernel: kernel.name.clone(),
            why: "the result must be memory of its own".into(),
        });
    };

    let plan = ContractPlan::of(body);
    let types = [body.ty(inst.args[0]), body.ty(inst.args[1]), body.ty(inst.result())];
    let steps = types.map(|t| strides(&t.axes, extents));
    // Steps in the first operand, the second, and the result.
    let loops = |group: &[AxisId]| -> Vec<Loop<3>> {
        let all = group.iter().map(|&axis| {
            let at = |n: usize| step(axis, &types[n].axes, &steps[n]);
            (extents[axis.0 as usize], [at(0), at(1), at(2)])
        });
        merge(all)
    };
    let (mut batch, mut m, mut n, mut k) =
        (loops(&plan.batch), loops(&plan.m), loops(&plan.n), loops(&plan.k));
    let (gm, gn, gk) = (take_longest(&mut m), take_longest(&mut n), take_longest(&mut k));
    // What does not fit into one matrix is looped over: freely where results differ, in order where they add up.
    batch.append(&mut m);
    batch.append(&mut n);
    let (outer, inner) = (turns(&batch), turns(&k));
    if outer == 0 || gm.0 == 0 || gn.0 == 0 {
        return Ok(());
    }
    let y = Shared(y.as_mut_ptr());
    let product = |index: usize, parallelism: Parallelism| {
        let outer_at = place(&batch, index);
        for j in 0..inner.max(1) {
            // An empty sum is zero: with nothing to add, the first product has k = 0 and clears the result.
            let (depth, add) = if inner == 0 { (0, [0; 3]) } else { (gk.0, place(&k, j)) };
            let at = [0, 1, 2].map(|n| outer_at[n] + add[n]);
            // SAFETY: `check` made sure that each buffer holds all indices of its type; offsets and steps are those of its axes,
            // with indices below the extents. Each outer index writes its own elements of `y`: batch, m and n are all the
            // axes of the result, so distinct points have distinct offsets.
            unsafe {
                gemm::gemm(
                    gm.0,
                    gn.0,
                    depth,
                    y.get().add(at[2]),
                    gn.1[2] as isize,
                    gm.1[2] as isize,
                    j > 0,
                    a.as_ptr().add(at[0]),
                    gk.1[0] as isize,
                    gm.1[0] as isize,
                    b.as_ptr().add(at[1]),
                    gn.1[1] as isize,
                    gk.1[1] as isize,
                    1.0f32,
                    1.0f32,
                    false,
                    false,
                    false,
                    parallelism,
                );
            }
        }
    };
    let each = gm.0 * gn.0 * gk.0 * inner;
    if outer * each < SMALL {
        (0..outer).for_each(|i| product(i, Parallelism::None));
    } else if outer >= rayon::current_num_threads() {
        (0..outer).into_par_iter().for_each(|i| product(i, Parallelism::None));
    } else {
        (0..outer).for_each(|i| product(i, Parallelism::Rayon(0)));
    }
    Ok(())
}
