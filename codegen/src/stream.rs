//! Kernels that weigh values by the softmax of scores and add them up: attention whose scores no memory ever holds.
//!
//! The body is, from its end: an elementwise *epilogue* of a *product*, which is the contraction of the weights and the
//! *values* over the axis of a softmax; the weights are that softmax, perhaps cast; its operand, the *scores*, are elementwise
//! in contractions, masks and whatever else has some of their axes. Operands of contractions, the values, and what
//! meets scores or product on the way are *leaves*: parameters or expressions of them that cost little (axes that move, casts,
//! scales, rotations).
//!
//! Softmax is a monoid: of any part of the axis, keep for each row the maximum, the sum of the exponentials and the sum
//! of the values times these, and two parts merge by rescaling both to the larger maximum. So a kernel walks the axis
//! in pieces of any size, by one worker or several.
//!
//! What the mask hides in all of a piece need not be read: a value there that is no number does not reach the result.
//!
//! The axes fall into those of a batched matrix product of weights and values: *batch* (in weights, values and result), *m*
//! (in weights and result: the rows), *n* (in values and result) and the streamed one.

use latentc_ir::{AxisId, Function, Inst, Op, ValueId};

use latentc_passes::stream_softmax::{Weighed, weighed};

use crate::contract::ContractPlan;

/// The parts of a streamed softmax.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamPlan {
    /// The axis that is streamed: weights sum to one along it, values are added up along it.
    pub along: AxisId,
    /// What the softmax reads.
    pub scores: ValueId,
    /// Where this is false, scores are -inf: the condition of the selection that makes them, if no contraction is in it.
    pub mask: Option<ValueId>,
    /// What is weighed; a leaf.
    pub values: ValueId,
    /// The contraction of weights and values.
    pub product: ValueId,
    /// The axes of weights, values and product, in the product's order.
    pub batch: Vec<AxisId>,
    /// The axes of weights and product.
    pub m: Vec<AxisId>,
    /// The axes of values and product.
    pub n: Vec<AxisId>,
}

impl StreamPlan {
    /// The plan of a kernel's body.
    ///
    /// # Errors
    /// If the body is none of this kind; says what is in the way.
    pub fn of(body: &Function) -> Result<StreamPlan, String> {
        let softmaxes: Vec<_> = body.body.iter().filter(|i| matches!(i.op, Op::Softmax { .. })).collect();
        let [softmax] = softmaxes[..] else {
            return Err(format!("{} instructions are `softmax`; a stream has one", softmaxes.len()));
        };
        let Weighed { along, product, weights, values } = weighed(body, &body.users(), softmax)?;
        let scores = softmax.args[0];
        let (w, v, y) = (body.ty(weights), body.ty(values), body.ty(product.result()));
        let groups = ContractPlan::new(&w.axes, &v.axes, &y.axes);
        let plan = StreamPlan {
            along,
            scores,
            mask: mask(body, scores),
            values,
            product: product.result(),
            batch: groups.batch,
            m: groups.m,
            n: groups.n,
        };
        plan.check(body)?;
        Ok(plan)
    }

    /// Whether scores, values and epilogue are made as they must.
    fn check(&self, body: &Function) -> Result<(), String> {
        for v in cone(body, self.scores, |op| is_elementwise(op) || *op == Op::Contract) {
            match defined(body, v) {
                Some(inst) if is_elementwise(&inst.op) => {}
                Some(inst) if inst.op == Op::Contract => self.check_scores(body, inst)?,
                _ => check_leaf(body, v)?,
            }
        }
        check_leaf(body, self.values)?;
        // Above the product: elements of the same axes.
        let mut above = vec![self.product];
        let y = body.ty(self.product);
        for inst in &body.body {
            if !inst.args.iter().any(|a| above.contains(a)) {
                continue;
            }
            let ty = body.ty(inst.result());
            if !is_elementwise(&inst.op)
                || ty.axes.len() != y.axes.len()
                || ty.axes.iter().any(|&a| !y.has(a))
            {
                let (name, product) = (&body.value(inst.result()).name, &body.value(self.product).name);
                return Err(format!("`{name}` is not elementwise in `{product}`"));
            }
            for &a in inst.args.iter().filter(|a| !above.contains(a)) {
                for leaf in cone(body, a, is_elementwise) {
                    if defined(body, leaf).is_none_or(|i| !is_elementwise(&i.op)) {
                        check_leaf(body, leaf)?;
                    }
                }
            }
            above.push(inst.result());
        }
        match body.results[..] {
            [result] if above.contains(&result) => Ok(()),
            _ => Err("the result is not made of the product".to_owned()),
        }
    }

    /// A contraction that scores are made of.
    fn check_scores(&self, body: &Function, inst: &Inst) -> Result<(), String> {
        let name = &body.value(inst.result()).name;
        let &[a, b] = &inst.args[..] else {
            return Err(format!("`{name}` has {} operands; a product has two", inst.args.len()));
        };
        let (a, b, y) = (body.ty(a), body.ty(b), body.ty(inst.result()));
        if !(a.dtype.is_float() && b.dtype.is_float()) {
            return Err(format!("`{name}` is no product of floats"));
        }
        let summed = body.summed(&inst.args, y);
        match summed.iter().find(|&&s| s == self.along || !a.has(s) || !b.has(s)) {
            Some(&s) => Err(format!(
                "`{name}` sums over `{}`, which is streamed or in one operand only",
                body.axis(s).name
            )),
            None => inst.args.iter().try_for_each(|&a| check_leaf(body, a)),
        }
    }
}

/// Whether an op makes each element of its result from the elements of its operands at the same place.
pub fn is_elementwise(op: &Op) -> bool {
    match op {
        Op::Const(values) => values.len() == 1,
        Op::Position { .. } | Op::Unary(_) | Op::Binary(_) | Op::Select | Op::Cast | Op::Broadcast { .. } => {
            true
        }
        Op::Contract
        | Op::Reduce { .. }
        | Op::Pack { .. }
        | Op::Unpack { .. }
        | Op::Rename { .. }
        | Op::Split { .. }
        | Op::Merge { .. }
        | Op::Slice { .. }
        | Op::Concat { .. }
        | Op::Gather { .. }
        | Op::TopK { .. }
        | Op::TopIndices { .. }
        | Op::ScatterAdd { .. }
        | Op::Past { .. }
        | Op::Append { .. }
        | Op::Rope { .. }
        | Op::Softmax { .. }
        | Op::RmsNorm { .. }
        | Op::Call { .. } => false,
    }
}

/// A value and all below it, through the ops that `through` accepts; those that it does not are the last of their branch. No value
/// twice, and each after those that it is made of.
pub fn cone(body: &Function, root: ValueId, through: impl Fn(&Op) -> bool) -> Vec<ValueId> {
    let mut found = vec![false; body.values.len()];
    found[root.0 as usize] = true;
    for inst in body.body.iter().rev() {
        if found[inst.result().0 as usize] && through(&inst.op) {
            inst.args.iter().for_each(|a| found[a.0 as usize] = true);
        }
    }
    let all = body.params.iter().copied().chain(body.body.iter().map(Inst::result));
    all.filter(|v| found[v.0 as usize]).collect()
}

/// The instruction that makes a value; `None` for a parameter.
pub fn defined(body: &Function, value: ValueId) -> Option<&Inst> {
    body.body.iter().find(|i| i.result() == value)
}

/// Whether an op costs little where its result is read: what a leaf is made of. It folds nothing and compares nothing.
pub fn is_leaf(op: &Op) -> bool {
    match op {
        Op::Const(_)
        | Op::Position { .. }
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Select
        | Op::Cast
        | Op::Rename { .. }
        | Op::Broadcast { .. }
        | Op::Split { .. }
        | Op::Merge { .. }
        | Op::Slice { .. }
        | Op::Concat { .. }
        | Op::Unpack { .. }
        | Op::Gather { .. }
        | Op::Rope { .. } => true,
        Op::Contract
        | Op::Reduce { .. }
        | Op::Pack { .. }
        | Op::TopK { .. }
        | Op::TopIndices { .. }
        | Op::ScatterAdd { .. }
        | Op::Past { .. }
        | Op::Append { .. }
        | Op::Softmax { .. }
        | Op::RmsNorm { .. }
        | Op::Call { .. } => false,
    }
}

fn check_leaf(body: &Function, leaf: ValueId) -> Result<(), String> {
    for v in cone(body, leaf, |_| true) {
        let Some(inst) = defined(body, v) else { continue };
        if !is_leaf(&inst.op) {
            let (name, leaf) = (&body.value(v).name, &body.value(leaf).name);
            return Err(format!(
                "`{name}`, by `{}`, is too much to compute where `{leaf}` is read",
                inst.op.mnemonic()
            ));
        }
    }
    Ok(())
}

/// The condition of a selection between anything and -inf that makes a value, perhaps cast.
fn mask(body: &Function, scores: ValueId) -> Option<ValueId> {
    let inst = defined(body, scores)?;
    if inst.op == Op::Cast {
        return mask(body, inst.args[0]);
    }
    if inst.op != Op::Select || !is_least(body, inst.args[2]) {
        return None;
    }
    let contracts = |v: &ValueId| defined(body, *v).is_some_and(|i| i.op == Op::Contract);
    let below = cone(body, inst.args[0], |_| true);
    (!below.iter().any(contracts)).then_some(inst.args[0])
}

/// Whether a value is -inf everywhere.
fn is_least(body: &Function, value: ValueId) -> bool {
    let Some(inst) = defined(body, value) else { return false };
    if let Op::Const(numbers) = &inst.op {
        return numbers.iter().all(|x| x.0 == f64::NEG_INFINITY);
    }
    matches!(inst.op, Op::Cast | Op::Broadcast { .. }) && is_least(body, inst.args[0])
}
