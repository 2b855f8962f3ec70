//! A maximum and the sum of exponentials that it shifts are one fold, of pairs: softmax is a monoid.

use std::collections::BTreeSet;

use latentc_ir::{Binary, Function, Inst, Op, Reduce, Unary, ValueId};

use super::axes;

/// A sum of exponentials that are shifted by the maximum of the same numbers, `sum of exp(x - m)`, where `m` is that or some constant,
/// whichever is larger. Both are one walk along the row: softmax is a monoid.
#[derive(Clone, Copy, Debug)]
pub struct Shifted<'f> {
    /// The maximum.
    pub top: &'f Inst,
    /// The sum.
    pub sum: &'f Inst,
    /// The exponentials.
    pub exp: &'f Inst,
    /// The differences that they are of.
    pub below: &'f Inst,
    /// What shifts at the least.
    pub least: f64,
}

/// What a sum is of the kind. `made` has the instructions that make values in the same kernel.
pub fn shifted<'f>(made: impl Fn(ValueId) -> Option<&'f Inst>, sum: &'f Inst) -> Option<Shifted<'f>> {
    let Op::Reduce { by: Reduce::Sum, axis } = sum.op else { return None };
    let exp = made(sum.args[0]).filter(|i| i.op == Op::Unary(Unary::Exp))?;
    let below = made(exp.args[0]).filter(|i| i.op == Op::Binary(Binary::Sub))?;
    let &[x, shift] = &below.args[..] else { return None };
    let largest =
        |v: ValueId| made(v).filter(|i| i.op == Op::Reduce { by: Reduce::Max, axis } && i.args == [x]);
    let number = |v: ValueId| match &made(v)?.op {
        Op::Const(numbers) => match numbers[..] {
            [one] => Some(one.0).filter(|n| n.is_finite()),
            _ => None,
        },
        _ => None,
    };
    if let Some(top) = largest(shift) {
        return Some(Shifted { top, sum, exp, below, least: f32::MIN.into() });
    }
    let bound = made(shift).filter(|i| i.op == Op::Binary(Binary::Max))?;
    let &[a, b] = &bound.args[..] else { return None };
    [(a, b), (b, a)]
        .into_iter()
        .find_map(|(top, least)| Some(Shifted { top: largest(top)?, sum, exp, below, least: number(least)? }))
}

/// Where a maximum and a sum that it shifts come to one value.
#[derive(Clone, Copy, Debug)]
pub struct Met {
    /// The maximum, by index of the body.
    pub top: usize,
    /// The value.
    pub into: ValueId,
}

/// Where all that is made of a sum, the instruction with that index, and of the maximum that shifts it meets, elementwise and of nothing
/// else: in the logarithm of a sum of exponentials, of which nobody sees either by itself. What is `kept` is seen.
pub fn met(f: &Function, users: &[Vec<usize>], sum: usize, kept: &dyn Fn(ValueId) -> bool) -> Option<Met> {
    let defs = f.defs();
    let made = |v: ValueId| match defs[v.0 as usize] {
        latentc_ir::Def::Inst(_, inst) => Some(inst),
        _ => None,
    };
    let Shifted { top, sum, exp, below, least } = shifted(made, &f.body[sum])?;
    let only = |v: ValueId| match users[v.0 as usize][..] {
        [user] if !kept(v) && !f.results.contains(&v) => Some(&f.body[user]),
        _ => None,
    };
    // A fold begins with the least float, so what is less is not seen.
    let bound = only(top.result())?.op == Op::Binary(Binary::Max) && least >= f32::MIN.into();
    if !bound || only(exp.result()).is_none() || only(below.result()).is_none() {
        return None;
    }
    let rows = axes(f, sum.result());
    let number =
        |v: &ValueId| made(*v).is_some_and(|i| matches!(i.op, Op::Const(_)) && f.ty(*v).axes.is_empty());
    let mut flow = BTreeSet::from([top.result(), sum.result()]);
    let mut ends: BTreeSet<ValueId> =
        flow.iter().copied().filter(|v| kept(*v) || f.results.contains(v)).collect();
    for inst in f.body.iter().filter(|i| i.results != below.results) {
        let mut of: BTreeSet<_> = inst.args.iter().copied().filter(|a| flow.contains(a)).collect();
        match inst.results[..] {
            _ if of.is_empty() => {}
            [v] if inst.op.is_elementwise()
                && axes(f, v) == rows
                && inst.args.iter().all(|a| flow.contains(a) || number(a)) =>
            {
                flow.insert(v);
                ends.extend(Some(v).filter(|v| kept(*v) || f.results.contains(v)));
            }
            _ => ends.append(&mut of),
        }
    }
    let top = f.body.iter().position(|i| i.results == top.results)?;
    let [into] = ends.into_iter().collect::<Vec<_>>()[..] else { return None };
    (into != sum.result()).then_some(Met { top, into })
}
