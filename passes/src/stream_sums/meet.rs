//! Sums of the same pieces meet, so that these are made once: what weighs several values weighs them side by side.

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::{AxisId, DType, Function, Inst, Op, Size, Type, ValueId};

use super::{Axes, COLUMNS, Fold, NAME, Wanted, regions};
use crate::rewrite::Rebuild;

/// Sums of values that the same pieces weigh as one sum, of these values side by side.
pub(super) fn join(f: &Function, wanted: &Wanted<'_>) -> Function {
    let place: BTreeMap<ValueId, usize> =
        f.body.iter().enumerate().flat_map(|(n, i)| i.results.iter().map(move |&r| (r, n))).collect();
    let mut sums: BTreeMap<(ValueId, AxisId), Vec<Sum>> = BTreeMap::new();
    let wanted = Wanted { axes: Axes::One, ..*wanted };
    let worth = regions(f, &wanted, &|_| false).into_iter().filter(|r| r.streamed < r.stored);
    for fold in worth.flat_map(|r| r.folds) {
        if let Some(sum) = Sum::of(f, fold) {
            sums.entry((fold.of, fold.along)).or_default().push(sum);
        }
    }
    // By the place of the first of them.
    let mut joined: BTreeMap<usize, Vec<Sum>> = BTreeMap::new();
    for mut sums in sums.into_values() {
        sums.sort_by_key(|s| s.at);
        let first = sums[0].clone();
        let mut columns: BTreeMap<AxisId, u64> = BTreeMap::new();
        sums.retain(|s| {
            let there = place.get(&s.values).is_none_or(|&at| at < first.at);
            let width = columns.values().sum::<u64>() + s.size;
            let fits = there && s.like(f, &first) && width as f64 <= COLUMNS;
            fits && columns.insert(s.column, s.size).is_none()
        });
        if sums.len() > 1 {
            joined.insert(first.at, sums);
        }
    }
    let others: BTreeSet<usize> = joined.values().flatten().map(|s| s.at).collect();
    let mut r = Rebuild::new(f, NAME);
    r.header();
    for (n, inst) in f.body.iter().enumerate() {
        match joined.get(&n) {
            Some(sums) => emit(&mut r, inst, sums),
            None if others.contains(&n) => {}
            None => r.copy(inst),
        }
    }
    r.finish()
}

/// A sum of weighed values with one axis of their own.
#[derive(Clone, Debug)]
struct Sum {
    at: usize,
    weights: ValueId,
    values: ValueId,
    /// The values' own axis.
    column: AxisId,
    size: u64,
}

impl Sum {
    fn of(f: &Function, fold: Fold) -> Option<Sum> {
        let inst = &f.body[fold.at];
        let (Op::Contract, &[a, b]) = (&inst.op, &inst.args[..]) else { return None };
        let values = if a == fold.of { b } else { a };
        let own: Vec<_> = f.ty(values).axes.iter().copied().filter(|&x| !f.ty(fold.of).has(x)).collect();
        let &[column] = &own[..] else { return None };
        let size = f.axis(column).size.fixed()?;
        Some(Sum { at: fold.at, weights: fold.of, values, column, size })
    }

    /// Whether both are the same but for the columns, and for what results are rounded to.
    fn like(&self, f: &Function, other: &Sum) -> bool {
        let result = |s: &Sum| {
            let ty = f.ty(f.body[s.at].result());
            ty.axes.iter().map(|&a| (a != s.column).then_some(a)).collect::<Vec<_>>()
        };
        f.ty(self.values).dtype == f.ty(other.values).dtype && result(self) == result(other)
    }
}

/// One sum for several, and these as its parts.
fn emit(r: &mut Rebuild<'_>, inst: &Inst, sums: &[Sum]) {
    let f = r.old;
    let size = sums.iter().map(|s| s.size).sum();
    let into = r.new.add_axis("joined", Size::Fixed(size), None);
    // Values lack axes that others of them have: they are the same along these.
    let all: Vec<AxisId> = {
        let widest =
            sums.iter().max_by_key(|s| f.ty(s.values).axes.len()).map_or(&[][..], |s| &f.ty(s.values).axes);
        let rest = sums.iter().flat_map(|s| f.ty(s.values).axes.iter().filter(|a| **a != s.column));
        let mut all: Vec<_> =
            widest.iter().copied().filter(|a| sums.iter().all(|s| s.column != *a)).collect();
        rest.for_each(|&a| {
            if !all.contains(&a) {
                all.push(a);
            }
        });
        all
    };
    let with = |column: AxisId| all.iter().copied().chain([column]).collect::<Vec<_>>();
    let (mut parts, mut columns) = (Vec::new(), Vec::new());
    for s in sums {
        let ty = f.ty(s.values);
        let axes: Vec<_> = all.iter().copied().filter(|&a| !ty.has(a)).collect();
        let mut values = r.get(s.values);
        if !axes.is_empty() {
            let wide = Type::new(ty.dtype, with(s.column));
            values = r.emit(inst, Op::Broadcast { axes }, &[values], "", wide);
        }
        parts.push(values);
        columns.push(s.column);
    }
    let dtype = f.ty(sums[0].values).dtype;
    let values = r.emit(inst, Op::Concat { axes: columns, into }, &parts, "", Type::new(dtype, with(into)));
    let mut ty = f.ty(inst.result()).clone();
    ty.axes.iter_mut().filter(|a| **a == sums[0].column).for_each(|a| *a = into);
    let dtypes: BTreeSet<DType> = sums.iter().map(|s| f.ty(f.body[s.at].result()).dtype).collect();
    // Rounded once, each to its own.
    if dtypes.len() > 1 {
        ty.dtype = if dtypes.contains(&DType::F64) { DType::F64 } else { DType::F32 };
    }
    let name = format!("{}.joined", f.value(inst.result()).name);
    let weights = r.get(sums[0].weights);
    let sum = r.emit(inst, Op::Contract, &[weights, values], &name, ty);
    let mut start = 0;
    for s in sums {
        let part = &f.body[s.at];
        let op = Op::Slice { axis: into, into: s.column, start };
        let (name, ty) = (&f.value(part.result()).name, f.ty(part.result()).clone());
        let dtype = r.new.ty(sum).dtype;
        let mut slice = r.emit(part, op, &[sum], name, Type::new(dtype, ty.axes.clone()));
        if dtype != ty.dtype {
            slice = r.emit(part, Op::Cast, &[slice], name, ty);
        }
        r.replace(part.result(), slice);
        start += s.size;
    }
}
