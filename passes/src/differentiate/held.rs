//! A sum that another one holds already is taken from there: `sum over s of w (sum over k of x u) = sum over k of x (sum over s of w u)`,
//! where the sum in brackets is there.
//!
//! The mean of a softmax's adjoints is such a sum: a product of what the softmax weighs and its adjoint (FlashAttention-2, arXiv
//! 2307.08691, section 3.1.2). It is found while both halves of a function are one body; later the way forward has become a parameter.

use latentc_ir::{Binary, Function, Inst, Op, Reduce, ValueId};

use crate::stream_sums::{axes, is_product};

/// Makes such sums of what is there. What they were made of may have lost its last reader.
pub(super) fn reuse(f: &mut Function) {
    for n in 0..f.body.len() {
        if let Some(factors) = held(f, n) {
            f.body[n].op = Op::Contract;
            f.body[n].args = factors.to_vec();
        }
    }
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
