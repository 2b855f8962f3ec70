//! Multiplication is associative and commutative: a product of many becomes products of two, the cheapest first.
//!
//! What   contract a, b, c  =>  contract (contract a, b), c         contract a over k  =>  reduce_sum a over k
//! Why    a kernel multiplies two matrices; in which order three are multiplied decides the cost
//! Needs  any graph.  Leaves  contractions of two operands whose summed axes both have
//! Cost   multiply-adds plus elements of what lies between, run-time sizes taken as 256
//! Cases  pair.ir

use latentc_ir::{AxisId, Binary, DType, Function, Inst, Module, Op, Reduce, Type, ValueId};

use crate::rewrite::Rebuild;

const NAME: &str = "pair";

/// What a run-time size counts for when orders are compared.
const NOMINAL: f64 = 256.0;

/// Above this many operands, the cheapest pair is taken each time instead of trying all orders.
const EXHAUSTIVE: usize = 5;

/// Splits every contraction into contractions of two.
pub fn pair(module: &Module) -> Module {
    let functions = module.functions.iter().map(function).collect();
    Module { name: module.name.clone(), functions, entry: module.entry.clone() }
}

fn function(f: &Function) -> Function {
    let mut r = Rebuild::new(f, NAME);
    r.header();
    for inst in &f.body {
        if inst.op == Op::Contract {
            contraction(&mut r, inst);
        } else {
            r.copy(inst);
        }
    }
    r.finish()
}

fn contraction(r: &mut Rebuild<'_>, inst: &Inst) {
    let result = r.old.value(inst.result()).clone();
    let mut operands = r.args(inst);
    let alone = lone_sums(r, &operands, &result.ty);
    if operands.len() == 2 && alone.is_empty() && !r.old.summed(&inst.args, &result.ty).is_empty() {
        return r.copy(inst);
    }
    // A sum over an axis that only one factor has is a sum of that factor: Σ_k a[i,k] b[i] = (Σ_k a[i,k]) b[i].
    for (n, axis) in alone {
        let ty = r.new.ty(operands[n]);
        let axes: Vec<_> = ty.axes.iter().copied().filter(|&a| a != axis).collect();
        let ty = Type::new(wide(ty.dtype), axes);
        operands[n] = r.emit(inst, Op::Reduce { by: Reduce::Sum, axis }, &[operands[n]], "", ty);
    }
    while operands.len() > 2 {
        let (a, b) = best_pair(r, &operands, &result.ty);
        let rest: Vec<_> = (0..operands.len()).filter(|n| *n != a && *n != b).map(|n| operands[n]).collect();
        let axes = kept(r, operands[a], operands[b], &rest, &result.ty);
        let ty = Type::new(wide(result.ty.dtype), axes);
        let made = product(r, inst, operands[a], operands[b], "", ty);
        operands = rest;
        operands.insert(a.min(operands.len()), made);
    }
    let id = match operands[..] {
        [a, b] => product(r, inst, a, b, &result.name, result.ty),
        _ => r.emit(inst, Op::Cast, &operands[..1], &result.name, result.ty),
    };
    r.replace(inst.result(), id);
}

/// The sums over an axis that just one operand has: operand number and axis.
fn lone_sums(r: &Rebuild<'_>, operands: &[ValueId], result: &Type) -> Vec<(usize, AxisId)> {
    let mut alone = Vec::new();
    for axis in r.new.summed(operands, result) {
        let mut having = (0..operands.len()).filter(|&n| r.new.ty(operands[n]).has(axis));
        if let (Some(n), None) = (having.next(), having.next()) {
            alone.push((n, axis));
        }
    }
    alone
}

/// A contraction of two, or a plain product where nothing is summed.
fn product(r: &mut Rebuild<'_>, inst: &Inst, a: ValueId, b: ValueId, name: &str, ty: Type) -> ValueId {
    let op = if r.new.summed(&[a, b], &ty).is_empty() { Op::Binary(Binary::Mul) } else { Op::Contract };
    r.emit(inst, op, &[a, b], name, ty)
}

/// The axes of a product of two that something else still needs.
fn kept(r: &Rebuild<'_>, a: ValueId, b: ValueId, rest: &[ValueId], result: &Type) -> Vec<AxisId> {
    let (x, y) = (r.new.ty(a), r.new.ty(b));
    let mut axes = Vec::new();
    for &axis in x.axes.iter().chain(&y.axes) {
        if !axes.contains(&axis) && (result.has(axis) || rest.iter().any(|&o| r.new.ty(o).has(axis))) {
            axes.push(axis);
        }
    }
    axes
}

/// The pair to multiply first.
fn best_pair(r: &Rebuild<'_>, operands: &[ValueId], result: &Type) -> (usize, usize) {
    let sets: Vec<Vec<AxisId>> = operands.iter().map(|&o| r.new.ty(o).axes.clone()).collect();
    search(&r.new, &sets, result, sets.len() <= EXHAUSTIVE).1
}

/// The cost of the cheapest order, and its first pair. When not `exhaustive`, only one step is looked ahead.
fn search(f: &Function, sets: &[Vec<AxisId>], result: &Type, exhaustive: bool) -> (f64, (usize, usize)) {
    let mut best = (f64::INFINITY, (0, 1));
    for a in 0..sets.len() {
        for b in a + 1..sets.len() {
            let mut all = sets[a].clone();
            all.extend(sets[b].iter().copied().filter(|x| !sets[a].contains(x)));
            let rest: Vec<_> =
                (0..sets.len()).filter(|n| *n != a && *n != b).map(|n| sets[n].clone()).collect();
            let out: Vec<_> = all
                .iter()
                .copied()
                .filter(|x| result.has(*x) || rest.iter().any(|s| s.contains(x)))
                .collect();
            let mut cost = extent(f, &all) + extent(f, &out);
            if exhaustive && !rest.is_empty() {
                let mut next = rest;
                next.push(out);
                cost += if next.len() > 1 { search(f, &next, result, true).0 } else { 0.0 };
            }
            if cost < best.0 {
                best = (cost, (a, b));
            }
        }
    }
    best
}

fn extent(f: &Function, axes: &[AxisId]) -> f64 {
    axes.iter().map(|&a| f.axis(a).size.fixed().map_or(NOMINAL, |n| n as f64)).product()
}

/// What lies between is kept in f32 at least.
fn wide(dtype: DType) -> DType {
    dtype.promote(DType::F32).unwrap_or(dtype)
}
