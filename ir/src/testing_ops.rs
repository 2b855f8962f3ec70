//! A random instruction of each op, on what a function already holds.

use std::collections::HashMap;

use crate::graph::{Function, ValueId};
use crate::ops::{Binary, Fields, OPS, Op, Pairs, Real, Reduce, Unary};
use crate::testing::Build;
use crate::types::{AxisId, DType, Size, Type};
use crate::verify::Stage;

/// Products of more axes take too long in an interpreter.
const MOST_AXES: usize = 5;

fn is_fixed(f: &Function, a: AxisId) -> bool {
    f.axis(a).size.fixed().is_some()
}

fn size(f: &Function, a: AxisId) -> u64 {
    f.axis(a).size.fixed().unwrap_or(1)
}

/// The type with these axes replaced by others, which stand where the first of them stood.
fn replace(ty: &Type, from: &[AxisId], to: &[AxisId]) -> Type {
    let at = ty.axes.iter().position(|a| from.contains(a)).unwrap_or(0);
    let mut axes: Vec<_> = ty.axes.iter().copied().filter(|a| !from.contains(a)).collect();
    let before = ty.axes[..at].iter().filter(|a| !from.contains(a)).count();
    axes.splice(before..before, to.iter().copied());
    Type::new(ty.dtype, axes)
}

fn union(types: &[&Type]) -> Vec<AxisId> {
    let mut axes: Vec<AxisId> = Vec::new();
    for a in types.iter().flat_map(|t| &t.axes) {
        if !axes.contains(a) {
            axes.push(*a);
        }
    }
    axes
}

/// Adds an instruction of a random op, and what it needs.
pub(crate) fn add_step(b: &mut Build<'_, '_>, stage: Stage) {
    let row = &OPS[b.tape.below(OPS.len())];
    let fixed = b.axis_of_size("n", &Size::Fixed(3), &[]);
    let mnemonic = row.mnemonic;
    if let Some(u) = Unary::ALL.into_iter().find(|u| Op::Unary(*u).mnemonic() == mnemonic) {
        return add_unary(b, u);
    }
    if let Some(op) = Binary::ALL.into_iter().find(|op| Op::Binary(*op).mnemonic() == mnemonic) {
        return add_binary(b, op);
    }
    match mnemonic {
        "const" => {
            let dtype = b.dtype();
            let axis = b.axis_of_size("j", &Size::Fixed(3), &[]);
            let table = (0..3).map(|_| Real(b.real(dtype))).collect();
            b.add(Op::Const(table), &[], Type::new(dtype, [axis]));
        }
        "position" => {
            let axes = if b.tape.coin() { vec![AxisId(0), b.t] } else { vec![b.t] };
            b.add(Op::Position { axis: b.t }, &[], Type::new(DType::I32, axes));
        }
        "select" => {
            let c = b.truth();
            let x = b.float();
            let y = partner(b, &[c, x], DType::is_float);
            let axes = union(&[b.f.ty(x), b.f.ty(y), b.f.ty(c)]);
            if axes.len() <= MOST_AXES {
                let dtype = b.float_dtype();
                b.add(Op::Select, &[c, x, y], Type::new(dtype, axes));
            }
        }
        "cast" => {
            let x = b.pick(|_, _| true).unwrap_or_else(|| b.number(DType::F32));
            let ty = Type::new(b.dtype(), b.f.ty(x).axes.clone());
            b.add(Op::Cast, &[x], ty);
        }
        "contract" => {
            let mut args = vec![b.float()];
            for _ in 0..b.tape.below(3) {
                let next = partner(b, &args, DType::is_float);
                args.push(next);
            }
            let types: Vec<_> = args.iter().map(|v| b.f.ty(*v)).collect();
            let mut axes = union(&types);
            let keep = b.tape.below(32);
            axes = axes.iter().enumerate().filter(|(n, _)| keep >> n & 1 == 0).map(|(_, a)| *a).collect();
            let turn = b.tape.below(axes.len());
            axes.rotate_left(turn);
            let dtype = b.float_dtype();
            b.add(Op::Contract, &args, Type::new(dtype, axes));
        }
        "reduce_sum" | "reduce_max" => {
            let by = if mnemonic == "reduce_sum" { Reduce::Sum } else { Reduce::Max };
            let (x, axis) = b.pick_with(DType::is_float, |_, _| true, fixed);
            let ty = Type::new(b.float_dtype(), replace(b.f.ty(x), &[axis], &[]).axes);
            b.add(Op::Reduce { by, axis }, &[x], ty);
        }
        "pack" => {
            let fits = |f: &Function, a: &AxisId| {
                f.axis(*a).size.fixed().is_some_and(|n| n > 0 && n <= Fields::MOST)
            };
            let x = b.pick(|f, v| f.ty(v).dtype == DType::I32 && f.ty(v).axes.iter().any(|a| fits(f, a)));
            let x = x.unwrap_or_else(|| b.filled(Type::new(DType::I32, [fixed])));
            let axis = b.f.ty(x).axes.iter().copied().find(|a| fits(&b.f, a)).unwrap_or(fixed);
            let ty = replace(b.f.ty(x), &[axis], &[]);
            b.add(Op::Pack { axis }, &[x], ty);
        }
        "unpack" => {
            let x = b.pick(|f, v| f.ty(v).dtype == DType::I32 && f.ty(v).axes.len() < 3);
            let x = x.unwrap_or_else(|| b.number(DType::I32));
            let mut axes = b.f.ty(x).axes.clone();
            let size = Size::Fixed(1 + b.tape.below(5) as u64);
            axes.push(b.axis_of_size("w", &size, &axes));
            b.add(Op::Unpack { axis: axes[axes.len() - 1] }, &[x], Type::new(DType::I32, axes));
        }
        "rename" => {
            let (x, from) = b.pick_with(|_| true, |_, _| true, fixed);
            let (size, axes) = (b.f.axis(from).size.clone(), b.f.ty(x).axes.clone());
            let to = b.axis_of_size("m", &size, &axes);
            let ty = replace(b.f.ty(x), &[from], &[to]);
            b.add(Op::Rename { from, to }, &[x], ty);
        }
        "broadcast" => {
            let x = b.pick(|f, v| f.ty(v).axes.len() < 3).unwrap_or_else(|| b.number(DType::F32));
            let old = b.f.ty(x).axes.clone();
            let size = Size::Fixed(1 + b.tape.below(3) as u64);
            let new = b.axis_of_size("k", &size, &old);
            let ty = Type::new(
                b.f.ty(x).dtype,
                if b.tape.coin() { [vec![new], old].concat() } else { [old, vec![new]].concat() },
            );
            b.add(Op::Broadcast { axes: vec![new] }, &[x], ty);
        }
        "split" => {
            let (x, axis) = b.pick_with(|_| true, is_fixed, fixed);
            let n = size(&b.f, axis);
            let divisors: Vec<_> = (1..=n).filter(|d| n.is_multiple_of(*d)).collect();
            let outer = divisors[b.tape.below(divisors.len())];
            let mut taken = b.f.ty(x).axes.clone();
            let g = b.axis_of_size("g", &Size::Fixed(outer), &taken);
            taken.push(g);
            let j = b.axis_of_size("j", &Size::Fixed(n / outer), &taken);
            let ty = replace(b.f.ty(x), &[axis], &[g, j]);
            b.add(Op::Split { axis, into: vec![g, j] }, &[x], ty);
        }
        "merge" => {
            let (x, first) = b.pick_with(|_| true, is_fixed, fixed);
            let mut axes = vec![first];
            axes.extend(b.f.ty(x).axes.iter().find(|a| **a != first && is_fixed(&b.f, **a)));
            let product = Size::Fixed(axes.iter().map(|a| size(&b.f, *a)).product());
            let taken = b.f.ty(x).axes.clone();
            let into = b.axis_of_size("m", &product, &taken);
            let ty = replace(b.f.ty(x), &axes, &[into]);
            b.add(Op::Merge { axes, into }, &[x], ty);
        }
        "slice" => {
            let (x, axis) = b.pick_with(|_| true, is_fixed, fixed);
            add_slice(b, x, axis);
        }
        "concat" => {
            let (x, axis) = b.pick_with(|_| true, is_fixed, fixed);
            let (mut args, mut axes) = (vec![x], vec![axis]);
            if b.tape.coin() {
                let (part, into) = add_slice(b, x, axis);
                args.push(part);
                axes.push(into);
            }
            if b.tape.coin() {
                args.push(x);
                axes.push(axis);
            }
            let total = Size::Fixed(axes.iter().map(|a| size(&b.f, *a)).sum());
            let taken = b.f.ty(x).axes.clone();
            let into = b.axis_of_size("cat", &total, &taken);
            let ty = replace(b.f.ty(x), &[axis], &[into]);
            b.add(Op::Concat { axes, into }, &args, ty);
        }
        "gather" => add_gather(b, fixed),
        "top_k" => {
            let (x, axis) = b.pick_with(DType::is_float, is_fixed, fixed);
            let k = 1 + b.tape.below(size(&b.f, axis) as usize) as u64;
            let ty = Type::new(DType::Bool, b.f.ty(x).axes.clone());
            b.add(Op::TopK { axis, k }, &[x], ty);
        }
        "top_indices" => {
            let (x, axis) = b.pick_with(DType::is_float, is_fixed, fixed);
            let k = Size::Fixed(1 + b.tape.below(size(&b.f, axis) as usize) as u64);
            let taken = b.f.ty(x).axes.clone();
            let into = b.axis_of_size("slot", &k, &taken);
            let ty = Type::new(DType::I32, replace(b.f.ty(x), &[axis], &[into]).axes);
            b.add(Op::TopIndices { axis, into }, &[x], ty);
        }
        "scatter_add" => add_scatter(b, fixed),
        "past" | "append" => add_history(b, stage),
        "rope" => add_rope(b),
        "softmax" | "rms_norm" => {
            let (x, axis) = b.pick_with(DType::is_float, |_, _| true, fixed);
            let ty = Type::new(b.float_dtype(), b.f.ty(x).axes.clone());
            let eps = Real([1e-6, 0.1][b.tape.below(2)]);
            let op = if mnemonic == "softmax" { Op::Softmax { axis } } else { Op::RmsNorm { axis, eps } };
            b.add(op, &[x], ty);
        }
        "call" => add_call(b),
        // A test demands that every op occurs.
        _ => {}
    }
}

/// Another operand of that kind with which the others have not too many axes together.
fn partner(b: &mut Build<'_, '_>, others: &[ValueId], dtype: impl Fn(DType) -> bool) -> ValueId {
    let found = b.pick(|f, v| {
        let types: Vec<_> = others.iter().chain([&v]).map(|v| f.ty(*v)).collect();
        dtype(f.ty(v).dtype) && union(&types).len() <= MOST_AXES
    });
    found.unwrap_or_else(|| {
        let dtype = DType::ALL.into_iter().rev().find(|d| dtype(*d)).unwrap_or(DType::F32);
        b.number(dtype)
    })
}

fn add_unary(b: &mut Build<'_, '_>, u: Unary) {
    let x = match u {
        Unary::Not => b.truth(),
        Unary::Neg | Unary::Abs => {
            let number = b.pick(|f, v| f.ty(v).dtype != DType::Bool);
            number.unwrap_or_else(|| b.number(DType::I32))
        }
        Unary::Exp
        | Unary::Log
        | Unary::Sqrt
        | Unary::Rsqrt
        | Unary::Sigmoid
        | Unary::Silu
        | Unary::Tanh
        | Unary::Sin
        | Unary::Cos => b.float(),
    };
    let ty = b.f.ty(x).clone();
    let dtype = if ty.dtype.is_float() { b.float_dtype() } else { ty.dtype };
    b.add(Op::Unary(u), &[x], Type::new(dtype, ty.axes));
}

fn add_binary(b: &mut Build<'_, '_>, op: Binary) {
    let x = if op.is_logical() {
        b.truth()
    } else if b.tape.coin() {
        b.pick(|f, v| f.ty(v).dtype == DType::I32).unwrap_or_else(|| b.number(DType::I32))
    } else {
        b.float()
    };
    let kind = b.f.ty(x).dtype;
    let y = partner(b, &[x], |d| d == kind || (d.is_float() && kind.is_float()));
    let axes = union(&[b.f.ty(x), b.f.ty(y)]);
    let dtype = match kind {
        _ if op.is_comparison() => DType::Bool,
        DType::I32 | DType::Bool => kind,
        DType::F64 | DType::F32 | DType::Bf16 | DType::F16 => b.float_dtype(),
    };
    b.add(Op::Binary(op), &[x, y], Type::new(dtype, axes));
}

fn add_slice(b: &mut Build<'_, '_>, x: ValueId, axis: AxisId) -> (ValueId, AxisId) {
    let n = size(&b.f, axis);
    let length = 1 + b.tape.below(n as usize) as u64;
    let start = b.tape.below((n - length) as usize + 1) as u64;
    let taken = b.f.ty(x).axes.clone();
    let into = b.axis_of_size("part", &Size::Fixed(length), &taken);
    let ty = replace(b.f.ty(x), &[axis], &[into]);
    (b.add(Op::Slice { axis, into, start }, &[x], ty), into)
}

/// Reads an axis at a table of indices, or at one for each index of another axis that both have.
fn add_gather(b: &mut Build<'_, '_>, fallback: AxisId) {
    let (x, axis) = b.pick_with(|_| true, |_, _| true, fallback);
    let n = size(&b.f, axis) as usize;
    let entries = 1 + b.tape.below(3);
    let taken = b.f.ty(x).axes.clone();
    let j = b.axis_of_size("j", &Size::Fixed(entries as u64), &taken);
    let table = (0..entries).map(|_| Real(b.tape.below(n) as f64)).collect();
    let mut index = b.add(Op::Const(table), &[], Type::new(DType::I32, [j]));
    if let Some(&shared) = taken.iter().find(|a| **a != axis)
        && b.tape.coin()
    {
        index = b.add(Op::Broadcast { axes: vec![shared] }, &[index], Type::new(DType::I32, [shared, j]));
    }
    let rest = replace(b.f.ty(x), &[axis], &[]);
    let ty = Type::new(rest.dtype, union(&[b.f.ty(index), &rest]));
    b.add(Op::Gather { axis }, &[x, index], ty);
}

/// Adds rows up at a table of indices, or at one for each index of another axis, which is then summed or not.
fn add_scatter(b: &mut Build<'_, '_>, fallback: AxisId) {
    let (x, along) = b.pick_with(DType::is_float, is_fixed, fallback);
    let taken = b.f.ty(x).axes.clone();
    let n = 1 + b.tape.below(4);
    let axis = b.axis_of_size("row", &Size::Fixed(n as u64), &taken);
    let table = (0..size(&b.f, along)).map(|_| Real(b.tape.below(n) as f64)).collect();
    let mut index = b.add(Op::Const(table), &[], Type::new(DType::I32, [along]));
    let mut ty = Type::new(b.float_dtype(), replace(b.f.ty(x), &[along], &[axis]).axes);
    if let Some(&other) = taken.iter().find(|a| **a != along)
        && b.tape.coin()
    {
        index = b.add(Op::Broadcast { axes: vec![other] }, &[index], Type::new(DType::I32, [along, other]));
        if b.tape.coin() {
            ty.axes.retain(|a| *a != other);
        }
    }
    b.add(Op::ScatterAdd { axis }, &[x, index], ty);
}

/// Reads history: from the text of the model before `derive`, from a cache after it.
fn add_history(b: &mut Build<'_, '_>, stage: Stage) {
    let (t, s) = (b.t, b.s);
    let found = b.pick(|f, v| f.ty(v).has(t) && !f.ty(v).has(s));
    let x = found.unwrap_or_else(|| b.filled(Type::new(DType::F32, [t])));
    let ty = replace(b.f.ty(x), &[t], &[s]);
    match stage {
        Stage::Traced => {
            b.add(Op::Past { from: t, to: s }, &[x], ty);
        }
        Stage::Derived => {
            let pos = b.add(Op::Position { axis: t }, &[], Type::new(DType::I32, [t]));
            let cache = b.f.add_cache("K", ty.clone());
            b.add(Op::Append { from: t, to: s }, &[cache, x, pos], ty);
        }
    }
}

fn add_rope(b: &mut Build<'_, '_>) {
    let fallback = b.axis_of_size("r", &Size::Fixed(4), &[]);
    let (x, axis) =
        b.pick_with(DType::is_float, |f, a| is_fixed(f, a) && size(f, a).is_multiple_of(2), fallback);
    let n = size(&b.f, axis) / 2;
    let j = b.axis_of_size("j", &Size::Fixed(n), &[]);
    let table = (0..n).map(|i| Real(0.5f64.powi(i as i32))).collect();
    let freq = b.add(Op::Const(table), &[], Type::new(DType::F32, [j]));
    let t = b.t;
    let pos = if b.f.ty(x).has(t) {
        b.add(Op::Position { axis: t }, &[], Type::new(DType::I32, [t]))
    } else {
        b.number(DType::I32)
    };
    let pairs = if b.tape.coin() { Pairs::Halves } else { Pairs::Interleaved };
    let ty = Type::new(b.float_dtype(), b.f.ty(x).axes.clone());
    b.add(Op::Rope { axis, pairs }, &[x, pos, freq], ty);
}

/// Calls a function above under a scope of its own, with values that fit if there are some.
pub(crate) fn add_call(b: &mut Build<'_, '_>) {
    let above = b.above;
    let Some(callee) = above.get(b.tape.below(above.len())) else { return };
    let mut to: HashMap<AxisId, AxisId> = HashMap::new();
    let mut args = Vec::new();
    for &p in &callee.params {
        let wanted = callee.ty(p);
        let fits = |f: &Function, v: ValueId| {
            let given = f.ty(v);
            given.dtype == wanted.dtype
                && given.axes.len() == wanted.axes.len()
                && given.axes.iter().zip(&wanted.axes).all(|(mine, theirs)| {
                    f.axis(*mine).size == callee.axis(*theirs).size
                        && to.get(theirs).is_none_or(|a| a == mine)
                        && to.iter().all(|(k, a)| a != mine || k == theirs)
                })
        };
        if let Some(v) = b.pick(fits) {
            to.extend(wanted.axes.iter().copied().zip(b.f.ty(v).axes.iter().copied()));
            args.push(v);
        } else {
            let ty = mapped(b, callee, wanted, &mut to);
            args.push(b.filled(ty));
        }
    }
    let results: Vec<_> = callee.results.iter().map(|r| mapped(b, callee, callee.ty(*r), &mut to)).collect();
    if let ([ty], Some(first)) = (&results[..], args.first())
        && b.f.ty(*first) == ty
    {
        return add_chain(b, callee, args, ty);
    }
    let results: Vec<_> = results.into_iter().map(|ty| ("", ty)).collect();
    let scope = format!("layers.{}", b.scopes);
    b.scopes += 1;
    b.f.push(Op::Call { callee: callee.name.clone(), scope }, &args, &results);
}

/// Calls a function of its own results over and over. Most such chains fold in the text format; the others differ
/// from those that do in one way.
fn add_chain(b: &mut Build<'_, '_>, callee: &Function, mut args: Vec<ValueId>, ty: &Type) {
    let plain = b.tape.name("y");
    for _ in 0..=b.tape.below(8) {
        let (mut name, callee) = (plain.clone(), callee.name.clone());
        let n = b.scopes;
        b.scopes += 1;
        let mut scope = format!("layers.{n}.mlp");
        match b.tape.below(40) {
            1 => name = b.tape.name("z"),
            2 => scope = format!("layers.{n}.{n}"),
            3 => scope = format!("layers.0{n}.mlp"),
            4 => b.scopes += 1,
            5 => args[0] = b.pick(|f, v| f.ty(v) == ty).unwrap_or(args[0]),
            6 => {
                let last = args.len() - 1;
                let wanted = b.f.ty(args[last]).clone();
                args[last] = b.pick(|f, v| *f.ty(v) == wanted).unwrap_or(args[last]);
            }
            _ => {}
        }
        args[0] = b.f.push(Op::Call { callee, scope }, &args, &[(&name, ty.clone())])[0];
    }
}

/// A callee's type in the caller's axes, with an axis for each that is not mapped yet.
fn mapped(b: &mut Build<'_, '_>, callee: &Function, ty: &Type, to: &mut HashMap<AxisId, AxisId>) -> Type {
    let axes: Vec<_> = ty
        .axes
        .iter()
        .map(|theirs| {
            if let Some(mine) = to.get(theirs) {
                return *mine;
            }
            let mut taken: Vec<_> = to.values().copied().collect();
            taken.sort_unstable();
            let axis = callee.axis(*theirs);
            let mine = b.axis_of_size(&axis.name, &axis.size, &taken);
            to.insert(*theirs, mine);
            mine
        })
        .collect();
    Type::new(ty.dtype, axes)
}
