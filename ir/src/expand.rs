//! The definitions of composites: each `softmax` and `rms_norm` as a few other ops.
//!
//! ```text
//! softmax   m[i] = max(max over k of x[i,k], least f32);  e[i,k] = exp(x[i,k] - m[i]);  z[i] = sum over k of e[i,k]
//!           y[i,k] = e[i,k] / (z[i] = 0 ? 1 : z[i])
//! rms_norm  q[i] = sum over k of x[i,k] x[i,k];  y[i,k] = x[i,k] * rsqrt(q[i] / |k| + eps)
//! ```
//!
//! The bound on the maximum and the choice of the divisor are for a row of nothing but -inf, which gives zeros. What is
//! in between is f32, or f64 if the operand or the result is.

use std::mem;

use crate::graph::{Function, Inst, Module, ValueId};
use crate::ops::{Binary, Op, Real, Reduce, Unary};
use crate::types::{AxisId, DType, Type};

/// The name of the pass, in the instructions that it makes.
const RULE: &str = "expand";

/// The same module without composites, in canonical numbering. The parts of a value `P` are called `P.max`,
/// `P.exp` and so on, and keep its origins.
#[must_use]
pub fn expand(module: &Module) -> Module {
    let functions = module.functions.iter().map(|f| expand_in(f, |_| true)).collect();
    Module { name: module.name.clone(), functions, entry: module.entry.clone() }
}

/// A function in which the composites that are wanted are their definitions.
#[must_use]
pub fn expand_in(f: &Function, wanted: impl Fn(&Inst) -> bool) -> Function {
    let mut out = f.clone();
    for inst in mem::take(&mut out.body) {
        match inst.op {
            _ if !wanted(&inst) => out.body.push(inst),
            Op::Softmax { axis } => softmax(&mut Parts::of(&mut out, &inst), axis),
            Op::RmsNorm { axis, eps } => rms_norm(&mut Parts::of(&mut out, &inst), axis, eps),
            Op::Const(_)
            | Op::Position { .. }
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Select
            | Op::Cast
            | Op::Contract
            | Op::Reduce { .. }
            | Op::Pack { .. }
            | Op::Unpack { .. }
            | Op::Rename { .. }
            | Op::Broadcast { .. }
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
            | Op::Call { .. } => out.body.push(inst),
        }
    }
    out.canonical()
}

/// The parts of one composite under construction.
struct Parts<'f> {
    f: &'f mut Function,
    inst: &'f Inst,
    /// The composite's operand.
    x: ValueId,
    /// The float that everything in between is computed in.
    dtype: DType,
}

impl<'f> Parts<'f> {
    fn of(f: &'f mut Function, inst: &'f Inst) -> Parts<'f> {
        let x = inst.args[0];
        let wide = f.ty(x).dtype == DType::F64 || f.ty(inst.result()).dtype == DType::F64;
        Parts { f, inst, x, dtype: if wide { DType::F64 } else { DType::F32 } }
    }

    fn push(&mut self, name: &str, op: Op, args: &[ValueId], ty: Type) -> ValueId {
        let name = format!("{}.{name}", self.f.value(self.inst.result()).name);
        let value = self.f.push(op, args, &[(&name, ty)])[0];
        self.sign();
        value
    }

    /// The last part, which is the composite's own result.
    fn finish(&mut self, op: Op, args: &[ValueId]) {
        let mut last = self.inst.clone();
        (last.op, last.args, last.by) = (op, args.to_vec(), Some(RULE.to_owned()));
        self.f.body.push(last);
    }

    fn sign(&mut self) {
        if let Some(last) = self.f.body.last_mut() {
            (last.origins, last.by) = (self.inst.origins.clone(), Some(RULE.to_owned()));
        }
    }

    fn number(&mut self, name: &str, x: f64) -> ValueId {
        self.push(name, Op::Const(vec![Real(x)]), &[], Type::scalar(self.dtype))
    }

    /// The type of the operand, and that of its rows along `axis`.
    fn types(&self, axis: AxisId) -> (Type, Type) {
        let axes = &self.f.ty(self.x).axes;
        let rows: Vec<_> = axes.iter().copied().filter(|&a| a != axis).collect();
        (Type::new(self.dtype, axes.clone()), Type::new(self.dtype, rows))
    }
}

/// Along an axis that a run gives its length, what weighs may be made anew by each kernel that wants it. So that a row is one number to
/// these, and nothing is divided, weights are `exp(x - l)` there, where `l` is the logarithm of the sum of `exp(x)`.
fn softmax(p: &mut Parts<'_>, axis: AxisId) {
    let (all, rows) = p.types(axis);
    let least = p.number("least", f64::from(f32::MIN));
    let one = p.number("one", 1.0);
    let zero = p.number("zero", 0.0);
    let max = p.push("max", Op::Reduce { by: Reduce::Max, axis }, &[p.x], rows.clone());
    let max = p.push("bound", Op::Binary(Binary::Max), &[max, least], rows.clone());
    let shifted = p.push("shifted", Op::Binary(Binary::Sub), &[p.x, max], all.clone());
    let exp = p.push("exp", Op::Unary(Unary::Exp), &[shifted], all.clone());
    let sum = p.push("sum", Op::Reduce { by: Reduce::Sum, axis }, &[exp], rows.clone());
    let empty = Type::new(DType::Bool, rows.axes.clone());
    let empty = p.push("empty", Op::Binary(Binary::Eq), &[sum, zero], empty);
    let divisor = p.push("divisor", Op::Select, &[empty, one, sum], rows.clone());
    if p.f.axis(axis).size.fixed().is_some() {
        return p.finish(Op::Binary(Binary::Div), &[exp, divisor]);
    }
    let log = p.push("log", Op::Unary(Unary::Log), &[divisor], rows.clone());
    let total = p.push("total", Op::Binary(Binary::Add), &[log, max], rows);
    let less = p.push("less", Op::Binary(Binary::Sub), &[p.x, total], all);
    p.finish(Op::Unary(Unary::Exp), &[less]);
}

fn rms_norm(p: &mut Parts<'_>, axis: AxisId, eps: Real) {
    let (whole, rows) = p.types(axis);
    let eps = p.number("eps", eps.0);
    let size = match p.f.axis(axis).size.fixed() {
        Some(n) => p.number("size", n as f64),
        // A run-time size becomes a number by counting.
        None => {
            let one = p.number("one", 1.0);
            let ones = Type::new(p.dtype, [axis]);
            let ones = p.push("ones", Op::Broadcast { axes: vec![axis] }, &[one], ones);
            p.push("size", Op::Reduce { by: Reduce::Sum, axis }, &[ones], Type::scalar(p.dtype))
        }
    };
    // A product and its sum rather than a contraction: it belongs to the row, not to a kernel for matrices.
    let squares = p.push("squares", Op::Binary(Binary::Mul), &[p.x, p.x], whole);
    let sum = p.push("sum", Op::Reduce { by: Reduce::Sum, axis }, &[squares], rows.clone());
    let mean = p.push("mean", Op::Binary(Binary::Div), &[sum, size], rows.clone());
    let shifted = p.push("shifted", Op::Binary(Binary::Add), &[mean, eps], rows.clone());
    let scale = p.push("scale", Op::Unary(Unary::Rsqrt), &[shifted], rows);
    p.finish(Op::Binary(Binary::Mul), &[p.x, scale]);
}
