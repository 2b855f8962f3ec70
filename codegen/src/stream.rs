//! Kernels that fold what is made of products, along an axis, piece by piece: attention whose scores no memory ever holds, and its
//! gradient.
//!
//! The body is, from its end: an elementwise *epilogue* of the *fold*. That is the contraction of *weights* and *values* over one axis, or
//! the sum or maximum of weights along it, or a maximum and the sum of exponentials that it shifts, as in the logarithm of such a sum.
//! The weights are elementwise in contractions, masks and whatever else has some of their axes; or they are the softmax of such *scores*
//! along the axis, perhaps cast. Operands of contractions, the values, and what meets weights, scores or the fold on the way are *leaves*:
//! parameters or expressions of them that cost little (axes that move, casts, scales, rotations).
//!
//! A fold is a monoid: sums add up, and of maxima the larger one stays. So is softmax: of any part of the axis, keep for each row the
//! maximum, the sum of the exponentials and the sum of the values times these, and two parts merge by rescaling both to the larger
//! maximum. So a kernel walks the axis in pieces of any size, by one worker or several.
//!
//! What the mask hides in all of a piece need not be read: a value there that is no number does not reach the result.
//!
//! The axes fall into those of a batched matrix product of weights and values: *batch* (in weights and result, and in values or what
//! weights are made of at each position), *m* (the others in weights and result: the rows), *n* (in values and result) and the
//! streamed one.

use latentc_ir::{AxisId, Binary, DType, Function, Inst, Op, Reduce, Unary, ValueId};

use latentc_passes::page::Slots;
use latentc_passes::stream_softmax::weighed;
use latentc_passes::stream_sums::shifted;

/// How pieces come together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monoid {
    /// A sum that the softmax of the scores weighs; without values, what it knows of each row: the largest score, and the sum of exponentials
    /// that this shifts.
    Softmax,
    /// A sum.
    Sum,
    /// A maximum.
    Max,
}

/// The parts of a streamed fold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamPlan {
    /// The axis that is streamed.
    pub along: AxisId,
    /// How pieces come together.
    pub by: Monoid,
    /// What the softmax reads; else what is folded.
    pub scores: ValueId,
    /// Where this is false, scores are nothing to the fold: -inf for a softmax or a maximum, 0 for a sum. No contraction is in it.
    pub mask: Option<ValueId>,
    /// What is weighed; a leaf. Without it the weights are what is folded.
    pub values: Option<ValueId>,
    /// The fold.
    pub product: ValueId,
    /// The maximum that shifts what is summed, where that is wanted as well: of a softmax without values. It is no less than the least float.
    pub top: Option<ValueId>,
    /// The axes of weights and product that values have, or what scores are made of at each position; in the product's order.
    pub batch: Vec<AxisId>,
    /// The other axes of weights and product.
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
        let plan = match softmaxes[..] {
            [softmax] => {
                let sum = weighed(body, &body.users(), softmax)?;
                let parts = (softmax.args[0], Some(sum.values), sum.weights);
                StreamPlan::with(body, Monoid::Softmax, sum.along, sum.product, parts)
            }
            [] => {
                let folds = folds(body);
                if let [top, sum] = folds[..]
                    && let Some(shifted) = shifted(|v| defined(body, v), sum)
                    && let (true, Op::Reduce { axis, .. }) = (shifted.top == top, &top.op)
                {
                    let parts = (top.args[0], None, sum.args[0]);
                    let plan = StreamPlan::with(body, Monoid::Softmax, *axis, sum, parts);
                    let plan = StreamPlan { top: Some(top.result()), ..plan };
                    plan.check(body)?;
                    return Ok(plan);
                }
                let [fold] = folds[..] else {
                    return Err(format!(
                        "{} sums or maxima are of what is made of products; a stream has one, or one `softmax`",
                        folds.len()
                    ));
                };
                let over = over_products(body);
                let parts = fold.args.iter().partition::<Vec<_>, _>(|a| over[a.0 as usize]);
                let (&[weights], values) = (&parts.0[..], parts.1.first().copied()) else {
                    let name = &body.value(fold.result()).name;
                    return Err(format!("both operands of `{name}` are made of products"));
                };
                let (by, along) = match fold.op {
                    Op::Reduce { by: Reduce::Max, axis } => (Monoid::Max, axis),
                    Op::Reduce { by: Reduce::Sum, axis } => (Monoid::Sum, axis),
                    _ => {
                        let summed = body.summed(&fold.args, body.ty(fold.result()));
                        match summed[..] {
                            [along] if fold.args.iter().all(|&a| body.ty(a).has(along)) => {
                                (Monoid::Sum, along)
                            }
                            _ => {
                                let name = &body.value(fold.result()).name;
                                return Err(format!("`{name}` is no sum over one axis of both operands"));
                            }
                        }
                    }
                };
                StreamPlan::with(body, by, along, fold, (weights, values, weights))
            }
            _ => return Err(format!("{} instructions are `softmax`; a stream has one", softmaxes.len())),
        };
        plan.check(body)?;
        Ok(plan)
    }

    /// With scores, values and weights.
    fn with(
        body: &Function,
        by: Monoid,
        along: AxisId,
        fold: &Inst,
        (scores, values, weights): (ValueId, Option<ValueId>, ValueId),
    ) -> StreamPlan {
        let has = |v: Option<ValueId>, a: AxisId| v.is_some_and(|v| body.ty(v).has(a));
        let below = cone(body, scores, is_elementwise);
        let products = body.body.iter().filter(|i| i.op == Op::Contract && below.contains(&i.result()));
        let keys: Vec<_> = products.filter_map(|i| keys(body, along, i)).map(|(keys, _)| keys).collect();
        let axes = &body.ty(fold.result()).axes;
        let (rows, n): (Vec<_>, Vec<_>) = axes.iter().partition(|a| body.ty(weights).has(**a));
        let shared = |a: &AxisId| has(values, *a) || keys.iter().any(|&k| body.ty(k).has(*a));
        let (batch, m) = rows.into_iter().partition(shared);
        let nothing = if by == Monoid::Sum { 0.0 } else { f64::NEG_INFINITY };
        let mask = mask(body, scores, nothing);
        StreamPlan { along, by, scores, mask, values, product: fold.result(), top: None, batch, m, n }
    }

    /// The dtype of the values; if there are none, of what scores are made of at each position.
    pub(crate) fn narrow(&self, body: &Function) -> Option<DType> {
        let below = cone(body, self.scores, is_elementwise);
        let mut products = body.body.iter().filter(|i| i.op == Op::Contract && below.contains(&i.result()));
        let keys = || products.find_map(|i| keys(body, self.along, i)).map(|(keys, _)| keys);
        self.values.or_else(keys).map(|v| body.ty(v).dtype)
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
        if let Some(values) = self.values {
            check_leaf(body, values)?;
        }
        // Above the product: elements of the same axes. What is below a sum is none of it, though a maximum shifts that.
        let mut above = vec![self.product];
        above.extend(self.top);
        let summed = defined(body, self.product).filter(|_| self.top.is_some());
        let below = summed.map_or_else(Vec::new, |sum| cone(body, sum.args[0], is_elementwise));
        let y = body.ty(self.product);
        for inst in &body.body {
            let inside = below.contains(&inst.result()) && body.ty(inst.result()).has(self.along);
            if inside || !inst.args.iter().any(|a| above.contains(a)) {
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

/// Rows of a pool that lie where a table of pages says for each position of an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// What is read.
    pub pool: ValueId,
    /// Its axis that counts slots.
    pub slot: AxisId,
    /// The slots of positions.
    pub slots: Slots,
    /// The axis whose positions these are: all of them, in order.
    pub along: AxisId,
}

impl Read {
    /// What an instruction reads, if it is that.
    pub fn of(body: &Function, inst: &Inst) -> Option<Read> {
        let Op::Gather { axis: slot } = inst.op else { return None };
        let slots = Slots::of(body, &body.defs(), inst.args[1])?;
        let Op::Position { axis: along } = defined(body, slots.positions)?.op else { return None };
        Some(Read { pool: inst.args[0], slot, slots, along })
    }
}

/// For each value, whether a contraction is at it or below.
fn over_products(body: &Function) -> Vec<bool> {
    let mut over = vec![false; body.values.len()];
    for inst in &body.body {
        let here = inst.op == Op::Contract || inst.args.iter().any(|a| over[a.0 as usize]);
        inst.results.iter().for_each(|r| over[r.0 as usize] = here);
    }
    over
}

/// The sums and maxima of what is made of contractions: what makes a body a stream if no softmax does.
pub fn folds(body: &Function) -> Vec<&Inst> {
    let over = over_products(body);
    let folds = |inst: &&Inst| {
        matches!(inst.op, Op::Contract | Op::Reduce { .. }) && inst.args.iter().any(|a| over[a.0 as usize])
    };
    body.body.iter().filter(folds).collect()
}

/// Of a product, the operand that has the streamed axis, and the one that has not.
pub fn keys(body: &Function, along: AxisId, product: &Inst) -> Option<(ValueId, ValueId)> {
    let has = |v: &ValueId| body.ty(*v).has(along);
    match product.args[..] {
        [a, b] if !has(&a) && has(&b) => Some((b, a)),
        [a, b] if has(&a) && !has(&b) => Some((a, b)),
        _ => None,
    }
}

/// A condition without which a value is `nothing`: 0, or -inf.
fn mask(body: &Function, value: ValueId, nothing: f64) -> Option<ValueId> {
    let inst = defined(body, value)?;
    let of = |n: usize| mask(body, inst.args[n], nothing);
    match inst.op {
        Op::Cast => of(0),
        Op::Select if is_all(body, inst.args[2], nothing) => {
            let contracts = |v: &ValueId| defined(body, *v).is_some_and(|i| i.op == Op::Contract);
            let below = cone(body, inst.args[0], |_| true);
            (!below.iter().any(contracts)).then_some(inst.args[0])
        }
        // Where one factor is 0, the product counts as 0, whatever the other is.
        Op::Binary(Binary::Mul) if nothing == 0.0 => of(0).or_else(|| of(1)),
        Op::Binary(Binary::Div) | Op::Unary(Unary::Neg) if nothing == 0.0 => of(0),
        Op::Unary(Unary::Exp) if nothing == 0.0 => mask(body, inst.args[0], f64::NEG_INFINITY),
        Op::Binary(Binary::Sub) if nothing != 0.0 => of(0),
        _ => None,
    }
}

/// Whether a value is this number everywhere.
fn is_all(body: &Function, value: ValueId, number: f64) -> bool {
    let Some(inst) = defined(body, value) else { return false };
    if let Op::Const(numbers) = &inst.op {
        return numbers.iter().all(|x| x.0 == number);
    }
    matches!(inst.op, Op::Cast | Op::Broadcast { .. }) && is_all(body, inst.args[0], number)
}
