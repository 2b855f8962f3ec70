//! Kernels that compute each element, or each row, on its own.
//!
//! The body of a map kernel is an expression of its parameters. Without reductions, every element of the domain is
//! independent. With reductions, the domain falls into rows: the reductions of one kernel have results with the
//! same axes (the scheduler sees to it), and each index of these is a row that is computed together.

use latentc_ir::{AxisId, Function, Inst, Op};

/// How the domain of a map kernel is walked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapPlan {
    /// The axes of the values that are stored: the output's, or of what is appended to it; in memory order.
    pub domain: Vec<AxisId>,
    /// With reductions, the axes that number the rows; some of the domain's.
    pub rows: Option<Vec<AxisId>>,
}

impl MapPlan {
    /// The plan of a kernel's body.
    pub fn of(body: &Function) -> MapPlan {
        let root = body.results[0];
        let mut domain = body.ty(root).axes.clone();
        if let Some(append) = append(body) {
            domain.clone_from(&body.ty(append.args[1]).axes);
        }
        let rows = body.body.iter().find(|i| matches!(i.op, Op::Reduce { .. })).map(|i| {
            let row = body.ty(i.result());
            domain.iter().copied().filter(|&a| row.has(a)).collect()
        });
        MapPlan { domain, rows }
    }
}

/// The last instruction of a body, if it appends: such a kernel writes into its cache in place.
pub fn append(body: &Function) -> Option<&Inst> {
    body.body.last().filter(|i| matches!(i.op, Op::Append { .. }))
}

/// The steps between neighbours along each axis of a dense tensor, in elements.
pub fn strides(axes: &[AxisId], extents: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; axes.len()];
    for n in (1..axes.len()).rev() {
        strides[n - 1] = strides[n] * extents[axes[n].0 as usize];
    }
    strides
}
