//! A sum that another one holds already is taken from there: `sum over s of w (sum over k of x u) = sum over k of x (sum over s of w u)`,
//! where the sum in brackets is there.
//!
//! The mean of a softmax's adjoints is such a sum: a product of what the softmax weighs and its adjoint (FlashAttention-2, arXiv
//! 2307.08691, section 3.1.2). It is found while both halves of a function are one body; later the way forward has become a parameter.
//!
//! So is the sum of a logsumexp: `d / s exp(x - m) = d exp(x - l)`, where `s = sum exp(x - m)` and `l = log s + m` is there. What goes
//! back through it then reads one number of each row, and folds none.

use latentc_ir::{Binary, Function, Inst, Op, Reduce, Type, Unary, ValueId};

use crate::stream_sums::{axes, is_product};

/// Makes such sums of what is there. `forward`: where the way back begins. What they were made of may have lost its last reader.
pub(super) fn reuse(f: &mut Function, forward: usize) {
    for n in 0..f.body.len() {
        if let Some(factors) = held(f, n) {
            f.body[n].op = Op::Contract;
            f.body[n].args = factors.to_vec();
        }
    }
    let mut n = forward;
    while n < f.body.len() {
        if let Some(Logged { exp, x, log, row, spread }) = logged(f, n) {
            let mut insert = |op: Op, args: &[ValueId], like: ValueId| {
                let ty = f.ty(like).clone();
                let made = insert(f, n, op, args, ty);
                n += 1;
                made
            };
            let shifted = insert(Op::Binary(Binary::Sub), &[x, log], exp);
            let weight = insert(Op::Unary(Unary::Exp), &[shifted], exp);
            let d = match spread {
                Some((op, like)) => insert(op, &[row], like),
                None => row,
            };
            f.body[n].args = vec![d, weight];
        }
        n += 1;
    }
}

/// `d / s exp(x - m)` where the logarithm of `s` is there.
struct Logged {
    /// `exp(x - m)`.
    exp: ValueId,
    x: ValueId,
    /// `log s + m`.
    log: ValueId,
    /// `d`, and what spreads `d / s` over the row, with its result.
    row: ValueId,
    spread: Option<(Op, ValueId)>,
}

/// What the product of an instruction, the `n`th, is of the kind.
fn logged(f: &Function, n: usize) -> Option<Logged> {
    let before = &f.body[..n];
    let made = |v: ValueId| before.iter().find(|i| i.results.contains(&v));
    let &Inst { op: Op::Binary(Binary::Mul), ref args, .. } = &f.body[n] else { return None };
    [(0, 1), (1, 0)].into_iter().find_map(|(row, exp)| {
        let exp = made(args[exp]).filter(|i| i.op == Op::Unary(Unary::Exp))?;
        let shifted = made(exp.args[0]).filter(|i| i.op == Op::Binary(Binary::Sub))?;
        let [x, m] = shifted.args[..] else { return None };
        let spread = made(args[row]).filter(|i| matches!(i.op, Op::Broadcast { .. }));
        let share =
            made(spread.map_or(args[row], |i| i.args[0])).filter(|i| i.op == Op::Binary(Binary::Div))?;
        let sum = made(share.args[1]).filter(|i| matches!(i.op, Op::Reduce { by: Reduce::Sum, .. }))?;
        let of_sum = |i: &&Inst| i.op == Op::Unary(Unary::Log) && i.args == sum.results;
        let log = before.iter().find(of_sum).filter(|_| sum.args == exp.results)?.result();
        let whole = |i: &&Inst| i.op == Op::Binary(Binary::Add) && (i.args == [log, m] || i.args == [m, log]);
        let log = before.iter().find(whole)?.result();
        let spread = spread.map(|i| (i.op.clone(), i.result()));
        Some(Logged { exp: exp.result(), x, log, row: share.args[0], spread })
    })
}

/// Puts an instruction before the `at`th, of which it is a part, and returns its value.
fn insert(f: &mut Function, at: usize, op: Op, args: &[ValueId], ty: Type) -> ValueId {
    let made = f.push(op, args, &[("", ty)])[0];
    if let Some(mut inst) = f.body.pop() {
        (inst.origins, inst.by) = (f.body[at].origins.clone(), f.body[at].by.clone());
        f.body.insert(at, inst);
    }
    made
}

/// The factors that the sum of an instruction, the `n`th, is the product of.
fn held(f: &Function, n: usize) -> Option<[ValueId; 2]> {
    let Op::Reduce { by: Reduce::Sum, axis } = f.body[n].op else { return None };
    let before = &f.body[..n];
    let made = |v: ValueId| before.iter().find(|i| i.results.contains(&v));
    let mul = made(f.body[n].args[0]).filter(|i| i.op == Op::Binary(Binary::Mul))?;
    let same = |a: ValueId, b: ValueId| axes(f, a) == axes(f, b);
    [(0, 1), (1, 0)].into_iter().find_map(|(w, p)| {
        let (w, p) = (mul.args[w], mul.args[p]);
        let product = made(p).filter(|i| is_product(f, i) && same(w, p) && same(p, mul.result()))?;
        let (x, u) = match product.args[..] {
            [a, b] if !f.ty(a).has(axis) => (a, b),
            [a, b] if !f.ty(b).has(axis) => (b, a),
            _ => return None,
        };
        let weighs = |i: &&Inst| {
            is_product(f, i)
                && (i.args == [w, u] || i.args == [u, w])
                && f.summed(&i.args, f.ty(i.result())) == [axis]
        };
        before.iter().find(weighs).map(|sum| [x, sum.result()])
    })
}
