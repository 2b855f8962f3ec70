//! Kernels that add the elements of a tensor up where an index says: what a gather reads from, its transpose writes to.
//!
//! The body is one `scatter_add` of two parameters, or of the product of two and a third: gradients of weights that indices chose are
//! sums of outer products, which are never stored. The axes fall into the *rows* (those of the index), the *columns* (the
//! operand's others, which the result has too) and the one that is indexed. A row that the result lacks is summed. Each element
//! of the result is added up in the order of the rows, so that two runs agree to the last bit.

use latentc_ir::{AxisId, Binary, DType, Function, Inst, Op, ValueId};

/// The parts of a scatter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScatterPlan {
    /// What is added up: a parameter, or the product of two.
    pub factors: Vec<ValueId>,
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
    /// The plan of a kernel's body, if it is one `scatter_add` of parameters.
    pub fn of(body: &Function) -> Option<ScatterPlan> {
        let (inst, before) = body.body.split_last()?;
        let (Op::ScatterAdd { axis }, &[x, index]) = (&inst.op, &inst.args[..]) else { return None };
        let factors = match before {
            [] => vec![x],
            [product] if product.result() == x && is_product(body, product) => product.args.clone(),
            _ => return None,
        };
        let params = factors.iter().chain([&index]).all(|v| body.params.contains(v));
        let (result, of) = (body.ty(inst.result()), body.ty(x));
        (params && body.results == inst.results).then(|| ScatterPlan {
            factors,
            index,
            along: *axis,
            rows: body.ty(index).axes.clone(),
            columns: result.axes.iter().copied().filter(|&a| of.has(a) && !body.ty(index).has(a)).collect(),
        })
    }
}

impl ScatterPlan {
    /// What tensor cores multiply of the factors, and how many numbers of that dtype stand for one of each. Two of bf16 hold an
    /// f16, and an f32 up to 2^-17 of it: the first leaves 2^-8 of the power of two below, of which the second leaves 2^-9.
    pub(crate) fn narrow(&self, body: &Function) -> (DType, Vec<u32>) {
        let dtypes: Vec<_> = self.factors.iter().map(|&v| body.ty(v).dtype).collect();
        match dtypes[0] {
            dtype @ (DType::Bf16 | DType::F16) if dtypes.iter().all(|&d| d == dtype) => {
                (dtype, vec![1; dtypes.len()])
            }
            _ => (DType::Bf16, dtypes.iter().map(|&d| if d == DType::Bf16 { 1 } else { 2 }).collect()),
        }
    }

    /// The rows that the result has too, in its order.
    pub fn kept(&self, body: &Function) -> Vec<AxisId> {
        let result = &body.ty(body.results[0]).axes;
        result.iter().copied().filter(|a| self.rows.contains(a)).collect()
    }

    /// Of a sum of outer products, the columns of each factor, in the result's order. Each column belongs to one of the two, and
    /// no row to the result: what the result has at an index is a product of two matrices, summed over the index's rows.
    pub fn sides(&self, body: &Function) -> Option<[Vec<AxisId>; 2]> {
        let &[a, b] = &self.factors[..] else { return None };
        let sides =
            [a, b].map(|v| self.columns.iter().copied().filter(|&c| body.ty(v).has(c)).collect::<Vec<_>>());
        let apart = !sides[0].iter().any(|c| sides[1].contains(c)) && sides.iter().all(|s| !s.is_empty());
        let summed = !self.rows.iter().any(|&r| body.ty(body.results[0]).has(r));
        (apart && summed).then_some(sides)
    }
}

/// Whether a kernel can multiply while it adds up: both factors are floats, and the product is not rounded to less than f32.
pub(crate) fn is_product(f: &Function, inst: &Inst) -> bool {
    inst.op == Op::Binary(Binary::Mul)
        && f.ty(inst.result()).dtype == DType::F32
        && inst.args.iter().all(|&a| f.ty(a).dtype.is_float())
}
