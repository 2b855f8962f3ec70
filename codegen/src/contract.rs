//! Kernels that multiply two tensors and sum over their common axes.
//!
//! The axes of a contraction fall into four groups, as in any matrix product: *batch* (in both operands and the
//! result), *m* (the first operand and the result), *n* (the second and the result), *k* (both operands, summed).
//! Any group may be empty or have several axes, in any memory order.
//!
//! A body may compute its operands (*prologue*), and the result from the product (*epilogue*). What a prologue or an epilogue folds
//! belongs to one row of an operand: the scale of an RMS norm. Several contractions of one shape may meet in the epilogue.

use std::collections::BTreeSet;

use latentc_ir::{AxisId, Function, Inst, Op, Pairs, Size, Type, ValueId};

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

/// A product of a kernel, with its operands in the order of the plan's groups.
#[derive(Clone, Copy, Debug)]
pub struct Product<'f> {
    /// The contraction.
    pub inst: &'f Inst,
    /// The operand with the axes *m*, then the one with the axes *n*.
    pub operands: [ValueId; 2],
}

impl ContractPlan {
    /// The plan of a kernel's body, by its first contraction. Others have the same groups: see [`products`](ContractPlan::products).
    ///
    /// # Panics
    /// If there is none.
    pub fn of(body: &Function) -> ContractPlan {
        let inst = body.body.iter().find(|i| i.op == Op::Contract).expect("a product has a contraction");
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

    /// The contractions of a body.
    pub fn products<'f>(&self, body: &'f Function) -> Vec<Product<'f>> {
        let products = body.body.iter().filter(|i| i.op == Op::Contract);
        let oriented = products.map(|inst| {
            let (a, b) = (inst.args[0], inst.args[1]);
            let first =
                self.m.iter().all(|&x| body.ty(a).has(x)) && self.n.iter().all(|&x| body.ty(b).has(x));
            Product { inst, operands: if first { [a, b] } else { [b, a] } }
        });
        oriented.collect()
    }
}

/// A rotation of what products make (an *epilogue*): each element of the result wants two sums, its own and its partner's along an axis.
///
/// Whoever computes one has the other at hand if partners are neighbours among the rows or columns that it has, so these are
/// numbered in pairs: of each two numbers, an even one and the next. Halves are [renumbered](Rotation::pairs) to be so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// The axis. Its size is even.
    pub axis: AxisId,
    /// Which of its indices are partners.
    pub pairs: Pairs,
}

impl Rotation {
    /// The rotation behind the products of a body. `None` if there is none, or several that differ: what wants more than two sums
    /// computes them for itself.
    pub fn of(body: &Function) -> Option<Rotation> {
        let mut behind = BTreeSet::new();
        let mut found: Option<Rotation> = None;
        for inst in &body.body {
            let follows = inst.op == Op::Contract || inst.args.iter().any(|a| behind.contains(a));
            if !follows {
                continue;
            }
            behind.extend(inst.results.iter().copied());
            if let Op::Rope { axis, pairs } = inst.op {
                let here = Rotation { axis, pairs };
                if found.is_some_and(|other| other != here) {
                    return None;
                }
                found = Some(here);
            }
        }
        found.filter(|r| body.axis(r.axis).size != Size::Fixed(0))
    }

    /// Whether the axis is the last one of these, but for those of size 1: partners can be neighbours then.
    pub fn ends(&self, body: &Function, axes: &[AxisId]) -> bool {
        axes.iter().rfind(|a| body.axis(**a).size != Size::Fixed(1)) == Some(&self.axis)
    }

    /// The same for the axes that two tensors share, which have to agree on the order.
    pub fn ends_both(&self, body: &Function, operand: &Type, result: &Type) -> bool {
        let shared =
            |of: &Type, with: &Type| of.axes.iter().copied().filter(|a| with.has(*a)).collect::<Vec<_>>();
        self.ends(body, &shared(operand, result)) && self.ends(body, &shared(result, operand))
    }
}
