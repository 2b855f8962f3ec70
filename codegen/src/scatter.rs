//! Kernels that add the elements of a tensor up where an index says: what a gather reads from, its transpose writes to.
//!
//! The body is one `scatter_add` of two parameters. The axes fall into the *rows* (those of the index), the *columns* (the
//! operand's others, which the result has too) and the one that is indexed. A row that the result lacks is summed. Each element
//! of the result is added up in the order of the rows, so that two runs agree to the last bit.

use latentc_ir::{AxisId, Function, Op, ValueId};

/// The parts of a scatter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScatterPlan {
    /// What is added up; a parameter.
    pub x: ValueId,
    /// Where it goes; a parameter.
    pub index: ValueId,
    /// The axis of the result that is indexed.
    pub along: AxisId,
    /// The axes of the index, in its order.
    pub rows: Vec<AxisId>,
    /// The operand's other axes, in the result's order.
    pub columns: Vec<AxisId>,
}

impl ScatterPlan {
    /// The plan of a kernel's body, if it is one `scatter_add` of two parameters.
    pub fn of(body: &Function) -> Option<ScatterPlan> {
        let [inst] = &body.body[..] else { return None };
        let (Op::ScatterAdd { axis }, &[x, index]) = (&inst.op, &inst.args[..]) else { return None };
        let params = [x, index].iter().all(|v| body.params.contains(v));
        let (result, of) = (body.ty(inst.result()), body.ty(x));
        (params && body.results == inst.results).then(|| ScatterPlan {
            x,
            index,
            along: *axis,
            rows: body.ty(index).axes.clone(),
            columns: result.axes.iter().copied().filter(|&a| of.has(a) && !body.ty(index).has(a)).collect(),
        })
    }
}
