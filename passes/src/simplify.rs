//! Equal things are computed once, and what does nothing is not computed.
//!
//! What   an instruction that an equation below makes simpler  =>  the simpler one
//!        two instructions with one op on one set of operands  =>  the first, which takes over the origins of the second
//!        an instruction without uses and without effect       =>  nothing; weights that nothing reads go too
//! Why    equations repeat themselves, and passes leave crumbs behind
//! Needs  any graph.  Keeps  results, parameters, caches, and every bit of every value
//! Cases  simplify.ir
//!
//! A rule holds for NaN, infinities and both zeros, and for dtypes as they are declared as well as for floats that are all f64.
//! These do not, and are left out:
//!
//! - `x + 0 = x` and `x - -0 = x`: wrong for -0. What holds is `x + -0 = x` and `x - 0 = x`.
//! - `0 - x = -x`: wrong for 0.  `x * 0 = 0`, `x - x = 0`, `x / x = 1`, `x = x`: wrong for NaN and infinities.
//! - `max(x, -inf) = x`, `min(x, inf) = x`: wrong for NaN, since `max` and `min` prefer the number.
//! - `--x = x` of integers: the smallest has no opposite.
//! - `x / c = x * (1/c)` and other orders of a sum or a product: they round otherwise.
//! - Functions like `exp` of a constant: their last bit is the machine's, and dumps are the same on all.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use latentc_ir::{AxisId, Binary, DType, Function, Inst, Module, Op, Real, Type, Unary, ValueId};

use crate::rewrite::{Rebuild, sweep};

const NAME: &str = "simplify";

/// Simplifies every function. What comes out is not simplified any further by doing it again.
pub fn simplify(module: &Module) -> Module {
    let functions = module.functions.iter().map(|f| sweep(&rewrite(f))).collect();
    Module { name: module.name.clone(), functions, entry: module.entry.clone() }
}

// --- the walk -------------------------------------------------------------------------------------------

/// What an instruction computes. Rules see it on operands that are simple already.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Term {
    op: Op,
    args: Vec<ValueId>,
    ty: Type,
}

/// What a rule puts in the place of a term, with the term's type.
enum To {
    /// The elements of a value, rounded to the dtype of the term, and broadcast over the axes that it lacks.
    Value(ValueId),
    /// Another op.
    Op(Op, Vec<ValueId>),
}

type Rule = fn(&Known<'_>, &Term) -> Option<To>;

/// The rules, in the order in which they are tried.
const RULES: &[Rule] = &[
    fold,
    neutral_element,
    absorbing_element,
    same_twice,
    undone,
    cast_of_cast,
    constant_choice,
    choice_without_difference,
    choice_by_negation,
    broadcast_of_nothing,
    rename_of_rename,
    one_part,
    merge_of_split,
    split_of_merge,
    slice_of_slice,
    slice_of_concat,
];

/// The function with every instruction replaced by what the rules make of it, or by an equal one above it.
fn rewrite(f: &Function) -> Function {
    let mut r = Rebuild::new(f, NAME);
    r.header();
    // The instruction that makes each value of the new function.
    let mut made: Vec<Option<usize>> = vec![None; r.new.values.len()];
    let mut seen: HashMap<Term, usize> = HashMap::new();
    for inst in &f.body {
        step(&mut r, inst, &made, &mut seen);
        made.resize(r.new.values.len(), r.new.body.len().checked_sub(1));
    }
    r.finish()
}

/// Appends what stands for an instruction, if nothing above does.
fn step(r: &mut Rebuild<'_>, inst: &Inst, made: &[Option<usize>], seen: &mut HashMap<Term, usize>) {
    // These may have an effect, so each of them is there for itself.
    if matches!(inst.op, Op::Append { .. } | Op::Call { .. }) {
        return r.copy(inst);
    }
    let old = r.old.value(inst.result());
    let was = Term { op: inst.op.clone(), args: r.args(inst), ty: old.ty.clone() };
    let term = match simplest(&Known { f: &r.new, made }, was.clone()) {
        Ok(term) => term,
        Err(value) => return r.replace(inst.result(), value),
    };
    match seen.entry(unordered(&term)) {
        Entry::Occupied(first) => {
            let first = &mut r.new.body[*first.get()];
            let value = first.result();
            for o in &inst.origins {
                if !first.origins.contains(o) {
                    first.origins.push(o.clone());
                }
            }
            r.replace(inst.result(), value);
        }
        Entry::Vacant(place) => {
            place.insert(r.new.body.len());
            if term == was {
                r.copy(inst);
            } else {
                let id = r.emit(inst, term.op, &term.args, &old.name, term.ty);
                r.replace(inst.result(), id);
            }
        }
    }
}

/// The term after all rules, or the value of its type that it is equal to.
fn simplest(known: &Known<'_>, mut term: Term) -> Result<Term, ValueId> {
    loop {
        let next = RULES.iter().find_map(|rule| match rule(known, &term)? {
            To::Op(op, args) => Some(Ok(Term { op, args, ty: term.ty.clone() })),
            To::Value(v) => known.as_type(v, &term.ty),
        });
        match next {
            Some(Ok(next)) => term = next,
            Some(Err(value)) => return Err(value),
            None => return Ok(term),
        }
    }
}

/// The term by which equal ones are found: `a, b` and `b, a` are one where their order makes no difference. The sign of
/// `max(0, -0)` is nobody's; more than two factors are not equal in any order, since products round.
fn unordered(term: &Term) -> Term {
    let mut term = term.clone();
    let commutes = match term.op {
        Op::Binary(b) => match b {
            Binary::Add | Binary::Mul | Binary::Max | Binary::Min | Binary::Eq | Binary::And | Binary::Or => {
                true
            }
            Binary::Sub | Binary::Div | Binary::Lt | Binary::Le => false,
        },
        ref op => *op == Op::Contract && term.args.len() == 2,
    };
    if commutes {
        term.args.sort_unstable();
    }
    term
}

// --- what rules ask ---------------------------------------------------------------------------------------

/// The new function as far as it has come.
struct Known<'f> {
    f: &'f Function,
    made: &'f [Option<usize>],
}

impl Known<'_> {
    /// The instruction that makes a value.
    fn def(&self, v: ValueId) -> Option<&Inst> {
        self.made[v.0 as usize].map(|n| &self.f.body[n])
    }

    fn ty(&self, v: ValueId) -> &Type {
        self.f.ty(v)
    }

    fn fixed(&self, a: AxisId) -> Option<u64> {
        self.f.axis(a).size.fixed()
    }

    /// The number that every element of a value is.
    fn number(&self, v: ValueId) -> Option<f64> {
        let inst = self.def(v)?;
        if let Op::Broadcast { .. } = inst.op {
            return self.number(inst.args[0]);
        }
        let Op::Const(numbers) = &inst.op else { return None };
        let (first, rest) = numbers.split_first()?;
        let dtype = self.ty(v).dtype;
        let number = if dtype.is_float() { first.0 } else { dtype.round(first.0) };
        rest.iter().all(|n| n == first).then_some(number)
    }

    /// The elements of a value with another type: the value itself, or an op that makes it so.
    fn as_type(&self, v: ValueId, ty: &Type) -> Option<Result<Term, ValueId>> {
        let have = self.ty(v);
        if have == ty {
            return Some(Err(v));
        }
        let axes: Vec<_> = ty.axes.iter().copied().filter(|&a| !have.has(a)).collect();
        let op = match (axes.is_empty(), have.dtype == ty.dtype) {
            (true, _) => Op::Cast,
            (false, true) => Op::Broadcast { axes },
            // Two ops are no simpler than one.
            (false, false) => return None,
        };
        Some(Ok(Term { op, args: vec![v], ty: ty.clone() }))
    }
}

/// Whether every value of `narrow` is one of `wide`.
fn holds(wide: DType, narrow: DType) -> bool {
    match narrow {
        DType::Bool => true,
        DType::I32 => matches!(wide, DType::I32 | DType::F64),
        DType::F64 | DType::F32 | DType::Bf16 | DType::F16 => wide.promote(narrow) == Some(wide),
    }
}

// --- numbers ------------------------------------------------------------------------------------------------

/// `f(1, 2) = 3`, where rounding the operands and the result changes nothing, or where the result alone is rounded.
fn fold(known: &Known<'_>, term: &Term) -> Option<To> {
    if !term.ty.axes.is_empty() || term.args.is_empty() {
        return None;
    }
    let numbers: Option<Vec<f64>> = term.args.iter().map(|&a| known.number(a)).collect();
    let numbers = numbers?;
    let rounded: Vec<f64> =
        numbers.iter().zip(&term.args).map(|(x, &a)| known.ty(a).dtype.round(*x)).collect();
    let dtype = term.ty.dtype;
    let y = evaluate(&term.op, &numbers)?;
    let y = if dtype.is_float() { y } else { dtype.round(y) };
    let declared = evaluate(&term.op, &rounded)?;
    // An integer that is out of range wraps on one device and saturates on the next.
    let in_range = dtype != DType::I32 || declared.trunc() == dtype.round(declared);
    let equal = dtype.round(y).to_bits() == dtype.round(declared).to_bits();
    (equal && in_range && dtype.round(y).is_finite()).then(|| To::Op(Op::Const(vec![Real(y)]), vec![]))
}

/// The functions whose result IEEE 754 gives to the last bit, or in which nothing rounds.
fn evaluate(op: &Op, x: &[f64]) -> Option<f64> {
    if let Op::Unary(u @ (Unary::Neg | Unary::Abs | Unary::Sqrt | Unary::Not)) = op {
        return Some(u.apply(x[0]));
    }
    if let Op::Binary(b) = op {
        let either_zero = x[0] == x[1] && x[0].to_bits() != x[1].to_bits();
        let undecided = either_zero && matches!(b, Binary::Max | Binary::Min);
        return (!undecided).then(|| b.apply(x[0], x[1]));
    }
    (*op == Op::Cast).then(|| x[0])
}

/// `x * 1 = 1 * x = x`, `x / 1 = x`, `x + -0 = -0 + x = x`, `x - 0 = x`, `x and true = x`, `x or false = x`.
fn neutral_element(known: &Known<'_>, term: &Term) -> Option<To> {
    let Op::Binary(op) = term.op else { return None };
    let (x, y) = (term.args[0], term.args[1]);
    let is = |v, number: f64| known.number(v).is_some_and(|n| n.to_bits() == number.to_bits());
    // Integers have one zero.
    let zero = if term.ty.dtype == DType::I32 { 0.0 } else { -0.0 };
    let (neutral, either_side) = match op {
        Binary::Mul | Binary::And => (1.0, true),
        Binary::Div => (1.0, false),
        Binary::Add => (zero, true),
        Binary::Sub | Binary::Or => (0.0, op == Binary::Or),
        Binary::Max | Binary::Min | Binary::Lt | Binary::Le | Binary::Eq => return None,
    };
    if is(y, neutral) {
        return Some(To::Value(x));
    }
    (either_side && is(x, neutral)).then_some(To::Value(y))
}

/// `x and false = false`, `x or true = true`.
fn absorbing_element(known: &Known<'_>, term: &Term) -> Option<To> {
    let Op::Binary(op @ (Binary::And | Binary::Or)) = term.op else { return None };
    let absorbing = f64::from(u8::from(op == Binary::Or));
    term.args.iter().find(|&&a| known.number(a) == Some(absorbing)).map(|&a| To::Value(a))
}

/// `max(x, x) = min(x, x) = x`, `x and x = x or x = x`.
fn same_twice(_: &Known<'_>, term: &Term) -> Option<To> {
    let Op::Binary(Binary::Max | Binary::Min | Binary::And | Binary::Or) = term.op else { return None };
    (term.args[0] == term.args[1]).then_some(To::Value(term.args[0]))
}

/// `--x = x` of floats, `not not x = x`.
fn undone(known: &Known<'_>, term: &Term) -> Option<To> {
    let Op::Unary(Unary::Neg | Unary::Not) = term.op else { return None };
    let inner = known.def(term.args[0])?;
    let x = *inner.args.first()?;
    let (between, dtype) = (known.ty(term.args[0]).dtype, known.ty(x).dtype);
    (inner.op == term.op && dtype != DType::I32 && holds(between, dtype)).then_some(To::Value(x))
}

/// `cast x = x` to the same type, `cast cast x = cast x` if the first one rounds nothing.
fn cast_of_cast(known: &Known<'_>, term: &Term) -> Option<To> {
    if term.op != Op::Cast {
        return None;
    }
    let inner = term.args[0];
    if *known.ty(inner) == term.ty {
        return Some(To::Value(inner));
    }
    let cast = known.def(inner).filter(|i| i.op == Op::Cast)?;
    let x = cast.args[0];
    holds(known.ty(inner).dtype, known.ty(x).dtype).then_some(To::Value(x))
}

/// `select true, a, b = a`, `select false, a, b = b`.
fn constant_choice(known: &Known<'_>, term: &Term) -> Option<To> {
    if term.op != Op::Select {
        return None;
    }
    let chosen = if known.number(term.args[0])? != 0.0 { term.args[1] } else { term.args[2] };
    Some(To::Value(chosen))
}

/// `select c, a, a = a`.
fn choice_without_difference(_: &Known<'_>, term: &Term) -> Option<To> {
    (term.op == Op::Select && term.args[1] == term.args[2]).then(|| To::Value(term.args[1]))
}

/// `select (not c), a, b = select c, b, a`.
fn choice_by_negation(known: &Known<'_>, term: &Term) -> Option<To> {
    if term.op != Op::Select {
        return None;
    }
    let not = known.def(term.args[0]).filter(|i| i.op == Op::Unary(Unary::Not))?;
    Some(To::Op(Op::Select, vec![not.args[0], term.args[2], term.args[1]]))
}

// --- axes ---------------------------------------------------------------------------------------------------

/// `broadcast x over nothing = x`, `broadcast (broadcast x over a) over b = broadcast x over a, b`.
fn broadcast_of_nothing(known: &Known<'_>, term: &Term) -> Option<To> {
    let Op::Broadcast { axes } = &term.op else { return None };
    if axes.is_empty() {
        return Some(To::Value(term.args[0]));
    }
    let inner = known.def(term.args[0]).filter(|i| matches!(i.op, Op::Broadcast { .. }))?;
    Some(To::Value(inner.args[0]))
}

/// `rename x from a to a = x`, `rename (rename x from a to b) from b to c = rename x from a to c`.
fn rename_of_rename(known: &Known<'_>, term: &Term) -> Option<To> {
    let Op::Rename { from, to } = term.op else { return None };
    if from == to {
        return Some(To::Value(term.args[0]));
    }
    let inner = known.def(term.args[0])?;
    let Op::Rename { from: first, to: between } = inner.op else { return None };
    (between == from).then(|| To::Op(Op::Rename { from: first, to }, inner.args.clone()))
}

/// `split x axis a into b = merge x axes a into b = concat x axes a into b = slice x axis a into b start 0 = rename x from a to b`.
fn one_part(known: &Known<'_>, term: &Term) -> Option<To> {
    let (from, to) = if let Op::Split { axis, into } = &term.op {
        (*axis, alone(into)?)
    } else if let Op::Merge { axes, into } | Op::Concat { axes, into } = &term.op {
        (alone(axes)?, *into)
    } else {
        let Op::Slice { axis, into, start: 0 } = term.op else { return None };
        (known.fixed(axis) == known.fixed(into)).then_some((axis, into))?
    };
    Some(To::Op(Op::Rename { from, to }, term.args.clone()))
}

fn alone(axes: &[AxisId]) -> Option<AxisId> {
    <[AxisId; 1]>::try_from(axes).ok().map(|[a]| a)
}

/// `merge (split x axis a into g, j) axes g, j into b = rename x from a to b`.
fn merge_of_split(known: &Known<'_>, term: &Term) -> Option<To> {
    let Op::Merge { axes, into: to } = &term.op else { return None };
    let inner = known.def(term.args[0])?;
    let Op::Split { axis, into } = &inner.op else { return None };
    (axes == into).then(|| To::Op(Op::Rename { from: *axis, to: *to }, inner.args.clone()))
}

/// `split (merge x axes g, j into a) axis a into g, j = x`.
fn split_of_merge(known: &Known<'_>, term: &Term) -> Option<To> {
    let Op::Split { axis, into } = &term.op else { return None };
    let inner = known.def(term.args[0])?;
    let Op::Merge { axes, into: merged } = &inner.op else { return None };
    (axes == into && axis == merged).then(|| To::Value(inner.args[0]))
}

/// `slice (slice x axis a into b start m) axis b into c start n = slice x axis a into c start m + n`.
fn slice_of_slice(known: &Known<'_>, term: &Term) -> Option<To> {
    let Op::Slice { axis, into, start } = term.op else { return None };
    let inner = known.def(term.args[0])?;
    let Op::Slice { axis: whole, into: part, start: first } = inner.op else { return None };
    let start = first.checked_add(start)?;
    (part == axis).then(|| To::Op(Op::Slice { axis: whole, into, start }, inner.args.clone()))
}

/// `slice (concat x, y axes a, b into c) axis c into d start 0 = rename x from a to d`, where `d` is as large as `a`; so with `y`.
fn slice_of_concat(known: &Known<'_>, term: &Term) -> Option<To> {
    let Op::Slice { axis, into: to, start } = term.op else { return None };
    let inner = known.def(term.args[0])?;
    let Op::Concat { axes, into } = &inner.op else { return None };
    let mut at = 0u64;
    for (&x, &from) in inner.args.iter().zip(axes) {
        let size = known.fixed(from)?;
        if at == start && *into == axis && known.fixed(to) == Some(size) {
            return Some(To::Op(Op::Rename { from, to }, vec![x]));
        }
        at = at.saturating_add(size);
    }
    None
}
