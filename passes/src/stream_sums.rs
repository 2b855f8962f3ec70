//! What is only added up need not be there all at once: where products meet elementwise, and the outcome is only folded along an axis
//! that a run gives its length, no memory need hold it.
//!
//! What   y = sum over t, i of w v, w made of products elementwise  =>  p = sum over t of w v; y = sum over i of p
//!        sum over s of w v, sum over s of w u                      =>  parts of  sum over s of w (v, then u)
//! Why    a kernel that walks `t` makes `w` piece by piece, adds each piece up and forgets it. In gradients, scores and their adjoints
//!        are such values: heads times tokens times tokens of them, and five sums or more that want them (FlashAttention-2, arXiv
//!        2307.08691, section 3.1.2, has the same sums). A maximum is a fold as well as a sum is, and it is one with the sum that it shifts
//! Needs  contractions of two operands, softmaxes that are streamed or defined.  Leaves  few sums, each along one axis, where [`regions`] finds
//!        that pieces are worth it; the scheduler asks the same question of what is left, and gives those values no memory
//! Cost   each fold makes its pieces anew, which takes operations; to store them takes a trip to memory for each that writes one or
//!        reads one. The law holds where the former takes less time. Axes of fixed size are not walked: what a model bounds
//!        may be stored, and products with weights have better kernels
//! Cases  stream_sums.ir

mod meet;
mod shifted;

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::{AxisId, DType, Function, Inst, Module, Op, Reduce, Type, ValueId};

use crate::rewrite::Rebuild;
use crate::stream_softmax::weighed;
use crate::{Context, Kind, Machine, Remark, Sizes};

pub use self::shifted::{Met, Shifted, met, shifted};

const NAME: &str = "stream_sums";

/// Columns that a kernel adds up at once, about. For more, pieces are made again.
const COLUMNS: f64 = 512.0;

/// Splits sums over several axes where the first one can then be walked in pieces, and joins those that want the same pieces.
pub fn stream_sums(module: &Module, cx: &mut Context) -> Module {
    let sizes = Sizes::new(module, cx.graph);
    let functions = module.functions.iter().map(|f| {
        let mut split: BTreeMap<usize, Fold> = BTreeMap::new();
        let machine = cx.machine;
        let wanted = Wanted { sizes: &sizes, machine: &machine, axes: Axes::Several };
        for region in regions(f, &wanted, &|v| f.results.contains(&v)) {
            let several = |fold: &&Fold| match f.body[fold.at].op {
                Op::Contract => f.summed(&f.body[fold.at].args, f.ty(f.body[fold.at].result())).len() > 1,
                _ => false,
            };
            let sums: Vec<_> = region.folds.iter().filter(several).copied().collect();
            let apart = region.streamed < region.stored;
            for sum in &sums {
                let message = format!(
                    "{} over `{}` first: in pieces of `{}` {:.1e} s, with these stored {:.1e} s",
                    if apart { "is summed" } else { "is not summed" },
                    f.axis(sum.along).name,
                    f.value(sum.of).name,
                    region.streamed,
                    region.stored
                );
                let kind = if apart { Kind::Applied } else { Kind::Missed };
                cx.remarks.push(Remark::new(kind, NAME, f, &f.body[sum.at], message));
            }
            if apart {
                split.extend(sums.into_iter().map(|sum| (sum.at, sum)));
            }
        }
        meet::join(&rebuild(f, &split), &wanted)
    });
    let functions = functions.collect();
    Module { name: module.name.clone(), functions, entry: module.entry.clone() }
}

/// The function with some sums over several axes as one over an axis, and then the others.
fn rebuild(f: &Function, split: &BTreeMap<usize, Fold>) -> Function {
    let mut r = Rebuild::new(f, NAME);
    r.header();
    for (n, inst) in f.body.iter().enumerate() {
        let Some(fold) = split.get(&n) else {
            r.copy(inst);
            continue;
        };
        let (name, ty) = (&f.value(inst.result()).name, f.ty(inst.result()));
        let others = f.summed(&inst.args, ty).into_iter().filter(|&a| a != fold.along);
        // What is summed later is not the fastest axis, so that neighbours are summed side by side.
        let mut axes = ty.axes.to_vec();
        let last = axes.pop();
        let mut left: Vec<_> = others.collect();
        axes.extend(&left);
        axes.extend(last);
        let wide = if ty.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let part = |axes: &[AxisId]| Type::new(wide, axes.to_vec());
        let mut sum = r.emit(inst, Op::Contract, &r.args(inst), &format!("{name}.parts"), part(&axes));
        while let Some(axis) = left.pop() {
            axes.retain(|&a| a != axis);
            let op = Op::Reduce { by: Reduce::Sum, axis };
            sum = match left[..] {
                [] => r.emit(inst, op, &[sum], name, ty.clone()),
                [_, ..] => r.emit(inst, op, &[sum], "", part(&axes)),
            };
        }
        r.replace(inst.result(), sum);
    }
    r.finish()
}

/// A sum or a maximum along an axis of what need not be stored.
#[derive(Clone, Copy, Debug)]
pub struct Fold {
    /// The instruction, by index of the body: a contraction, or a reduction.
    pub at: usize,
    /// The axis.
    pub along: AxisId,
    /// What is folded; for a contraction, the operand that weighs the other.
    pub of: ValueId,
    /// For exponentials that a maximum of the same pieces shifts, that: both are one fold.
    pub with: Option<Met>,
}

impl Fold {
    /// What is known of all pieces in the end.
    pub fn into(&self, f: &Function) -> ValueId {
        self.with.map_or(f.body[self.at].result(), |met| met.into)
    }
}

/// Values that only folds want.
#[derive(Clone, Debug)]
pub struct Region {
    /// The folds.
    pub folds: Vec<Fold>,
    /// Products, and what is elementwise in these, in order.
    pub pieces: Vec<ValueId>,
    /// How many folds make each product.
    pub products: BTreeMap<ValueId, usize>,
    /// Seconds that the folds take, each making its pieces anew.
    pub streamed: f64,
    /// Seconds that they take with what they want in memory.
    pub stored: f64,
}

/// Which sums are folds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axes {
    /// Those over one axis.
    One,
    /// Also those that can be split.
    Several,
}

/// What [`regions`] weighs with, and of which folds.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The sizes that the graph is for.
    pub sizes: &'a Sizes,
    /// What runs it.
    pub machine: &'a Machine,
    /// Which sums count.
    pub axes: Axes,
}

/// The values of a function that only folds want, but for those that are `kept` in any case; the largest first. It is for the caller to
/// compare the times. A region is left out where a larger one that is worth it folds pieces to some of its own, or the other way round.
pub fn regions(f: &Function, wanted: &Wanted<'_>, kept: &dyn Fn(ValueId) -> bool) -> Vec<Region> {
    let users = f.users();
    let formed = formed(f);
    // What a softmax weighs has a kernel already.
    let softmaxes = f.body.iter().filter(|i| matches!(i.op, Op::Softmax { .. }));
    let softmaxes = softmaxes.filter_map(|inst| weighed(f, &users, inst).ok());
    let weighed: Vec<_> = softmaxes.map(|sum| sum.product.result()).collect();
    let others = f.body.iter().enumerate().filter(|(_, i)| i.results.iter().all(|r| !weighed.contains(r)));
    let candidates = others.filter_map(|(at, inst)| fold(f, wanted, &formed, at, inst));
    let mut candidates: Vec<_> =
        candidates.map(|fold| Fold { with: met(f, &users, fold.at, kept), ..fold }).collect();
    let ends: Vec<_> = candidates.iter().map(|fold| (fold.at, fold.of)).collect();
    let tops: Vec<_> = candidates.iter().filter_map(|fold| fold.with).map(|met| met.top).collect();
    candidates.retain(|fold| !tops.contains(&fold.at));
    let hidden = only_for(f, &users, &ends, kept, &|inst| is_product(f, inst));
    let all = pieces(f, &hidden);
    // Pieces that are made of each other, or meet, belong together. Products are made of what is there.
    let mut group: BTreeMap<ValueId, usize> = all.iter().copied().zip(0..).collect();
    for inst in f.body.iter().filter(|i| i.op != Op::Contract) {
        let Some(&mine) = inst.results.first().and_then(|r| group.get(r)) else { continue };
        for a in &inst.args {
            if let Some(&theirs) = group.get(a) {
                group.values_mut().filter(|g| **g == theirs).for_each(|g| *g = mine);
            }
        }
    }
    let groups: BTreeSet<usize> = group.values().copied().collect();
    let mut found: Vec<Region> = Vec::new();
    for g in groups {
        let of_group = |v: &ValueId| group.get(v) == Some(&g);
        let pieces: Vec<_> = all.iter().copied().filter(of_group).collect();
        let folds: Vec<_> = candidates.iter().copied().filter(|fold| of_group(&fold.of)).collect();
        found.push(weigh(f, wanted, folds, pieces));
    }
    let elements = |r: &Region| r.pieces.iter().map(|&v| elements(f, wanted, v)).fold(0.0, f64::max);
    found.sort_by(|a, b| elements(b).total_cmp(&elements(a)));
    // What pieces are folded to is none itself.
    let (mut folded, mut taken) = (BTreeSet::new(), BTreeSet::new());
    found.retain(|region| {
        let results = || region.folds.iter().map(|fold| fold.into(f));
        let free =
            !region.pieces.iter().any(|v| folded.contains(v)) && !results().any(|v| taken.contains(&v));
        if free && region.streamed < region.stored {
            folded.extend(results());
            taken.extend(region.pieces.iter().copied());
        }
        free
    });
    found
}

/// Which values are products, or elementwise in a product that has all of their axes.
fn formed(f: &Function) -> Vec<bool> {
    let mut formed = vec![false; f.values.len()];
    for inst in &f.body {
        let &[v] = &inst.results[..] else { continue };
        let like = |a: &ValueId| formed[a.0 as usize] && axes(f, *a) == axes(f, v);
        formed[v.0 as usize] =
            is_product(f, inst) || (inst.op.is_elementwise() && inst.args.iter().any(like));
    }
    formed
}

/// The fold that an instruction is.
fn fold(f: &Function, wanted: &Wanted<'_>, formed: &[bool], at: usize, inst: &Inst) -> Option<Fold> {
    let of = |v: &ValueId| formed[v.0 as usize] && f.ty(*v).dtype.is_float();
    let (weights, along) = match inst.op {
        Op::Reduce { axis, .. } => (inst.args[0], axis),
        Op::Contract if is_product(f, inst) => {
            let ty = f.ty(inst.result());
            let summed = f.summed(&inst.args, ty);
            if summed.len() > 1 && wanted.axes == Axes::One {
                return None;
            }
            let length = |a: &AxisId| wanted.sizes.extent(f.axis(*a));
            let along = summed.into_iter().filter(|&a| f.axis(a).size.fixed().is_none());
            let along = along.max_by_key(length)?;
            let mut weights: Vec<_> = inst.args.iter().copied().filter(of).collect();
            weights.sort_by(|a, b| elements(f, wanted, *b).total_cmp(&elements(f, wanted, *a)));
            (*weights.first()?, along)
        }
        _ => return None,
    };
    let floats = f.ty(inst.result()).dtype.is_float() && of(&weights);
    (floats && f.axis(along).size.fixed().is_none()).then_some(Fold { at, along, of: weights, with: None })
}

/// Whether an instruction is a product of two that a kernel can compute in tiles, for a fold.
pub fn is_product(f: &Function, inst: &Inst) -> bool {
    let &[a, b] = &inst.args[..] else { return false };
    inst.op == Op::Contract
        && a != b
        && [a, b, inst.result()].iter().all(|&v| f.ty(v).dtype.is_float())
        && f.summed(&inst.args, f.ty(inst.result())).iter().all(|&s| f.ty(a).has(s) && f.ty(b).has(s))
}

/// The values that are wanted for nothing but these folds, each with the axes of what is folded: what is elementwise on the way to that,
/// and what `product` accepts if it has these axes. A fold is the index of an instruction and its operand. What is `kept` is wanted
/// for more.
pub fn only_for(
    f: &Function,
    users: &[Vec<usize>],
    folds: &[(usize, ValueId)],
    kept: &dyn Fn(ValueId) -> bool,
    product: &dyn Fn(&Inst) -> bool,
) -> BTreeMap<ValueId, BTreeSet<AxisId>> {
    let mut hidden: BTreeMap<ValueId, BTreeSet<AxisId>> = BTreeMap::new();
    // Readers stand behind what they read.
    for inst in f.body.iter().rev() {
        let &[v] = &inst.results[..] else { continue };
        if f.results.contains(&v) || kept(v) {
            continue;
        }
        let of = |&user: &usize| {
            if folds.contains(&(user, v)) {
                return Some(axes(f, v));
            }
            let user = &f.body[user];
            let through = user.op.is_elementwise();
            user.results.first().filter(|_| through).and_then(|r| hidden.get(r).cloned())
        };
        let mut wanted = users[v.0 as usize].iter().map(of);
        let Some(Some(whole)) = wanted.next() else { continue };
        let alone = wanted.all(|w| w.as_ref() == Some(&whole));
        let fits = inst.op.is_elementwise() || (product(inst) && axes(f, v) == whole);
        if alone && fits {
            hidden.insert(v, whole);
        }
    }
    hidden
}

/// Those of such values that are products, or are made of some, in order.
pub fn pieces(f: &Function, hidden: &BTreeMap<ValueId, BTreeSet<AxisId>>) -> Vec<ValueId> {
    let mut found: Vec<ValueId> = Vec::new();
    for inst in &f.body {
        let &[v] = &inst.results[..] else { continue };
        let made = inst.op == Op::Contract || inst.args.iter().any(|a| found.contains(a));
        if hidden.contains_key(&v) && made {
            found.push(v);
        }
    }
    found
}

/// The axes of a value.
pub(crate) fn axes(f: &Function, v: ValueId) -> BTreeSet<AxisId> {
    f.ty(v).axes.iter().copied().collect()
}

fn elements(f: &Function, wanted: &Wanted<'_>, v: ValueId) -> f64 {
    count(f, wanted, f.ty(v).axes.iter().copied())
}

fn count(f: &Function, wanted: &Wanted<'_>, axes: impl IntoIterator<Item = AxisId>) -> f64 {
    axes.into_iter().map(|a| wanted.sizes.extent(f.axis(a)) as f64).product()
}

/// What a region takes either way. Stored: a launch for each product, each fold and each operand of a product that is made elementwise,
/// which wait for arithmetic or for memory. Streamed: a launch for each fold.
fn weigh(f: &Function, wanted: &Wanted<'_>, folds: Vec<Fold>, pieces: Vec<ValueId>) -> Region {
    let Machine { bandwidth, scalars, launch, .. } = *wanted.machine;
    let defs = f.defs();
    let inst = |v: ValueId| match defs[v.0 as usize] {
        latentc_ir::Def::Inst(_, inst) => Some(inst),
        _ => None,
    };
    let is_product = |v: ValueId| inst(v).is_some_and(|i| i.op == Op::Contract);
    let seconds = |flops: f64, bytes: f64| wanted.machine.seconds(flops, bytes);
    let bytes = |v: ValueId| elements(f, wanted, v) * f.ty(v).dtype.bytes() as f64;
    let flops = |inst: &Inst| {
        let space: BTreeSet<_> = inst.args.iter().flat_map(|&a| axes(f, a)).collect();
        (if inst.op == Op::Contract { 2.0 } else { 1.0 }) * count(f, wanted, space)
    };
    let mut products: BTreeMap<ValueId, usize> =
        pieces.iter().copied().filter(|&v| is_product(v)).map(|v| (v, 0)).collect();
    let (mut streamed, mut written) = (0.0, BTreeSet::new());
    let mut stored = 0.0;
    for fold in &folds {
        let end = &f.body[fold.at];
        let mut below = BTreeSet::from([fold.of]);
        let mut work = vec![fold.of];
        while let Some(v) = work.pop() {
            let args = inst(v).filter(|i| i.op.is_elementwise()).map_or(&[][..], |i| &i.args);
            work.extend(args.iter().copied().filter(|a| pieces.contains(a) && below.insert(*a)));
        }
        // Columns are the axes of the result that the pieces lack.
        let columns = f.ty(end.result()).axes.iter().copied().filter(|&a| !f.ty(fold.of).has(a));
        let again = (count(f, wanted, columns) / COLUMNS).ceil().max(1.0);
        let (mut matrix, mut single) = (flops(end), 0.0);
        for &v in &below {
            match inst(v) {
                Some(product) if product.op == Op::Contract => {
                    matrix += again * flops(product);
                    *products.entry(v).or_default() += 1;
                }
                _ => single += again * elements(f, wanted, v),
            }
        }
        streamed += launch + matrix / wanted.machine.flops + single / scalars;
        stored += launch + seconds(flops(end), bytes(fold.of));
        if end.op == Op::Contract && !is_product(fold.of) {
            written.insert(fold.of);
        }
    }
    stored += products.keys().map(|&v| launch + seconds(inst(v).map_or(0.0, flops), bytes(v))).sum::<f64>();
    // What weighs a sum is written, and read from products.
    stored += written.iter().map(|&v| launch + 2.0 * bytes(v) / bandwidth).sum::<f64>();
    Region { folds, pieces, products, streamed, stored }
}
