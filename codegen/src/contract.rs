//! Kernels that multiply two tensors and sum over their common axes.
//!
//! The axes of a contraction fall into four groups, as in any matrix product: *batch* (in both operands and the
//! result), *m* (the first operand and the result), *n* (the second and the result), *k* (both operands, summed).
//! Any group may be empty or have several axes, in any memory order.

use latentc_ir::{AxisId, Function};

/// The groups of axes of a contraction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContractPlan {
    /// In both operands and the result, in the result's order.
    pub batch: Vec<AxisId>,
    /// In the first operand and the result, in the result's order.
    pub m: Vec<AxisId>,
    /// In the second operand and the result, in the result's order.
    pub n: Vec<AxisId>,
    /// In both operands, summed; in the first operand's order.
    pub k: Vec<AxisId>,
}

impl ContractPlan {
    /// The plan of a kernel's body, which is one contraction of its two parameters (or of one with itself).
    pub fn of(body: &Function) -> ContractPlan {
        let inst = &body.body[0];
        let (a, b, y) = (body.ty(inst.args[0]), body.ty(inst.args[1]), body.ty(inst.result()));
        let pick = |in_a: bool, in_b: bool| {
            y.axes.iter().copied().filter(|&x| a.has(x) == in_a && b.has(x) == in_b).collect()
        };
        ContractPlan {
            batch: pick(true, true),
            m: pick(true, false),
            n: pick(false, true),
            k: a.axes.iter().copied().filter(|&x| !y.has(x)).collect(),
        }
    }
}
