//! Contractions on the CPU: the innermost axis of each group goes to the `gemm` crate, the others are loops around it.

use gemm::Parallelism;
use latentc_ir::AxisId;
use rayon::prelude::*;

use super::walk::{Loop, merge, place, step, take_longest, turns};
use super::{Shared, View, ViewMut};
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
    output: ViewMut<'_>,
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
    let ViewMut::F(y) = output else {
        return Err(DeviceError::Kernel {
            kernel: kernel.name.clone(),
            why: "the result must be memory of its own".into(),
        });
    };

    let types = [body.ty(inst.args[0]), body.ty(inst.args[1]), body.ty(inst.result())];
    let steps = types.map(|t| strides(&t.axes, extents));
    let product = Product::new(extents, [0, 1, 2].map(|n| (&types[n].axes[..], &steps[n][..])));
    let y = Shared(y.as_mut_ptr());
    let (turns, each) = (product.turns(), product.work());
    let turn = |index: usize, parallelism: Parallelism| {
        // SAFETY: `check` made sure that each buffer holds all indices of its type, and each turn writes its own elements of `y`.
        unsafe { product.turn(index, a.as_ptr(), b.as_ptr(), y.get(), parallelism) };
    };
    if turns * each < SMALL {
        (0..turns).for_each(|i| turn(i, Parallelism::None));
    } else if turns >= rayon::current_num_threads() {
        (0..turns).into_par_iter().for_each(|i| turn(i, Parallelism::None));
    } else {
        (0..turns).for_each(|i| turn(i, Parallelism::Rayon(0)));
    }
    Ok(())
}

/// A product of two strided tensors, summed over their common axes into a third: matrix products in loops.
pub(super) struct Product {
    /// What does not fit into one matrix, where results differ.
    outer: Vec<Loop<3>>,
    m: Loop<3>,
    n: Loop<3>,
    k: Loop<3>,
    /// What does not fit into one matrix, where results add up.
    inner: Vec<Loop<3>>,
}

impl Product {
    /// For two operands and a result, given by their axes and steps.
    pub(super) fn new(extents: &[usize], tensors: [(&[AxisId], &[usize]); 3]) -> Product {
        let plan = ContractPlan::new(tensors[0].0, tensors[1].0, tensors[2].0);
        let loops = |group: &[AxisId]| -> Vec<Loop<3>> {
            let one = |&axis: &AxisId| {
                (extents[axis.0 as usize], tensors.map(|(axes, steps)| step(axis, axes, steps)))
            };
            merge(group.iter().map(one))
        };
        let (mut outer, mut m, mut n, mut inner) =
            (loops(&plan.batch), loops(&plan.m), loops(&plan.n), loops(&plan.k));
        let (gm, gn, gk) = (take_longest(&mut m), take_longest(&mut n), take_longest(&mut inner));
        outer.append(&mut m);
        outer.append(&mut n);
        Product { outer, m: gm, n: gn, k: gk, inner }
    }

    /// The number of matrices of the result.
    pub(super) fn turns(&self) -> usize {
        turns(&self.outer)
    }

    /// Multiply-adds of one turn.
    pub(super) fn work(&self) -> usize {
        self.m.0 * self.n.0 * self.k.0 * turns(&self.inner)
    }

    /// Computes one matrix of the result.
    ///
    /// # Safety
    /// Each pointer must be good for all places that the extents and its tensor's steps lead to, and no one else may touch this
    /// turn's part of `y`. Turns differ in axes of the result, so they write distinct elements if the steps of `y` keep these
    /// apart.
    pub(super) unsafe fn turn(
        &self,
        index: usize,
        a: *const f32,
        b: *const f32,
        y: *mut f32,
        parallelism: Parallelism,
    ) {
        let (gm, gn, gk) = (self.m, self.n, self.k);
        if gm.0 == 0 || gn.0 == 0 {
            return;
        }
        let outer_at = place(&self.outer, index);
        let inner = turns(&self.inner);
        for j in 0..inner.max(1) {
            // An empty sum is zero: with nothing to add, the first product has k = 0 and clears the result.
            let (depth, add) = if inner == 0 { (0, [0; 3]) } else { (gk.0, place(&self.inner, j)) };
            let at = [0, 1, 2].map(|n| outer_at[n] + add[n]);
            // SAFETY: by the caller; indices are below the extents.
            unsafe {
                gemm::gemm(
                    gm.0,
                    gn.0,
                    depth,
                    y.add(at[2]),
                    gn.1[2] as isize,
                    gm.1[2] as isize,
                    j > 0,
                    a.add(at[0]),
                    gk.1[0] as isize,
                    gm.1[0] as isize,
                    b.add(at[1]),
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
    }
}
