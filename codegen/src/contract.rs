//! Kernels that multiply two tensors and sum over their common axes.
//!
//! The axes of a contraction fall into four groups, as in any matrix product: *batch* (in both operands and the
//! result), *m* (the first operand and the result), *n* (the second and the result), *k* (both operands, summed).
//! Any group may be empty or have several axes, in any memory order.

use latentc_ir::{AxisId, Function, ValueId};

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
        let axes = |v: ValueId| &body.ty(v).axes[..];
        ContractPlan::new(axes(inst.args[0]), axes(inst.args[1]), axes(inst.result()))
    }

    /// The plan for two operands and a result with these axes.
    pub fn new(a: &[AxisId], b: &[AxisId], y: &[AxisId]) -> ContractPlan {
        let pick = |in_a: bool, in_b: bool| {
            y.iter().copied().filter(|x| a.contains(x) == in_a && b.contains(x) == in_b).collect()
        };
        ContractPlan {
            batch: pick(true, true),
            m: pick(true, false),
            n: pick(false, true),
            k: a.iter().copied().filter(|x| !y.contains(x)).collect(),
        }
    }
}
