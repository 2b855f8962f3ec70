//! The same program at smaller sizes, so that the interpreter can run what no machine at hand could hold.
//!
//! A size is a number, and equal numbers shrink to equal numbers, in all functions and in every module that a [`Scale`] is
//! made for: two stages of one compilation stay comparable, whatever axes a pass has added. What the ops say of sizes
//! holds for the small ones too:
//!
//! ```text
//! split, merge    |a| = |g| |j|          concat     |c| = |a| + |b|          rope    |r| = 2 |j|
//! slice           start + |part| <= |whole|, and starts add up as they did   top_k   k <= |e|, less where it was less
//! ```
//!
//! Run-time sizes stay. Tables are cut to their axis. A sum over an axis that is divided by the axis's size is a mean, and
//! stays one; so is what has its name in another of the modules, where a pass may have made the sum into something else. All
//! other numbers stay as they are: a scale of `1/sqrt(128)` is as good as any.

use std::collections::{BTreeMap, BTreeSet};

use crate::graph::{Def, Function, Inst, Module, ValueId};
use crate::ops::{Binary, Op, Real, Reduce};
use crate::types::{AxisId, Size, Type};

/// What each size becomes. One of these always exists, if only with every size as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scale {
    sizes: BTreeMap<u64, u64>,
    /// How many elements a mean is of, by the names of its function and its own.
    means: BTreeMap<(String, String), u64>,
}

/// What must be true of sizes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rule {
    Product(u64, Vec<u64>),
    Sum(u64, Vec<u64>),
    /// The first is no larger than the second, and smaller if it was.
    AtMost(u64, u64),
}

/// Sizes that are tried before any others. One alone is last, since much is trivial along an axis of one.
const SMALL: [u64; 4] = [2, 3, 4, 5];

/// Sizes that are tried if no small ones do.
const LARGER: std::ops::RangeInclusive<u64> = 6..=24;

/// So many sizes are tried at most.
const PATIENCE: usize = 50_000;

impl Scale {
    /// Small sizes for modules that must stay comparable.
    pub fn of(modules: &[&Module]) -> Scale {
        Scale::preferring(modules, &SMALL)
    }

    /// The smallest sizes, most of them one: what is wrong at these needs no larger ones to be seen.
    pub fn least(modules: &[&Module]) -> Scale {
        Scale::preferring(modules, &[1, 2])
    }

    fn preferring(modules: &[&Module], preferred: &[u64]) -> Scale {
        let mut sizes = BTreeSet::new();
        let (mut rules, mut means) = (BTreeSet::new(), BTreeMap::new());
        for f in modules.iter().flat_map(|m| &m.functions) {
            sizes.extend(f.axes.iter().filter_map(|a| a.size.fixed()));
            f.body.iter().for_each(|inst| demand(f, inst, &mut rules));
            let defs = f.defs();
            means.extend(f.body.iter().filter_map(|inst| Some((names(f, inst)?, mean(f, &defs, inst)?))));
        }
        for rule in &rules {
            match rule {
                Rule::Product(whole, parts) | Rule::Sum(whole, parts) => {
                    sizes.extend(parts.iter().chain([whole]));
                }
                Rule::AtMost(a, b) => sizes.extend([a, b]),
            }
        }
        let rules: Vec<_> = rules.into_iter().collect();
        let mut search = Search { sizes: &sizes, rules: &rules, preferred, tried: 0 };
        let given = BTreeMap::from_iter([0, 1].into_iter().filter(|n| sizes.contains(n)).map(|n| (n, n)));
        let found = search.assign(given);
        Scale { sizes: found.unwrap_or_else(|| sizes.iter().map(|&n| (n, n)).collect()), means }
    }

    /// What a size becomes.
    pub fn size(&self, n: u64) -> u64 {
        self.sizes.get(&n).copied().unwrap_or(n)
    }

    /// A module at these sizes. It verifies if the scale was made for it and it verified.
    #[must_use]
    pub fn apply(&self, module: &Module) -> Module {
        let functions = module.functions.iter().map(|f| self.function(f)).collect();
        Module { name: module.name.clone(), functions, entry: module.entry.clone() }
    }

    fn function(&self, f: &Function) -> Function {
        let defs = f.defs();
        let mut out = f.clone();
        for axis in &mut out.axes {
            if let Size::Fixed(n) = axis.size {
                axis.size = Size::Fixed(self.size(n));
            }
        }
        for inst in std::mem::take(&mut out.body) {
            let mut small = Inst { op: self.op(&inst.op), ..inst };
            if let (Op::Const(table), [result]) = (&mut small.op, &small.results[..])
                && let [axis] = f.ty(*result).axes[..]
            {
                table.truncate(out.axis(axis).size.fixed().unwrap_or(u64::MAX) as usize);
            }
            if let Some(count) = names(f, &small).and_then(|names| self.means.get(&names)).copied()
                && divisor(&defs, &small) == Some(count as f64)
            {
                let ty = Type::scalar(f.ty(small.args[1]).dtype);
                let name = format!("{}.count", f.value(small.result()).name);
                let number = Op::Const(vec![Real(self.size(count) as f64)]);
                small.args[1] = out.push(number, &[], &[(&name, ty)])[0];
            }
            out.body.push(small);
        }
        out.canonical()
    }

    fn op(&self, op: &Op) -> Op {
        match op {
            Op::Slice { axis, into, start } => {
                Op::Slice { axis: *axis, into: *into, start: self.size(*start) }
            }
            Op::TopK { axis, k } => Op::TopK { axis: *axis, k: self.size(*k) },
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
            | Op::Concat { .. }
            | Op::Gather { .. }
            | Op::ScatterAdd { .. }
            | Op::TopIndices { .. }
            | Op::Past { .. }
            | Op::Append { .. }
            | Op::Rope { .. }
            | Op::Softmax { .. }
            | Op::RmsNorm { .. }
            | Op::Call { .. } => op.clone(),
        }
    }
}

/// What an instruction demands of the sizes.
fn demand(f: &Function, inst: &Inst, rules: &mut BTreeSet<Rule>) {
    let fixed = |a: &AxisId| f.axis(*a).size.fixed();
    let all = |axes: &[AxisId]| axes.iter().map(fixed).collect::<Option<Vec<_>>>();
    match &inst.op {
        Op::Split { axis: whole, into: parts } | Op::Merge { axes: parts, into: whole } => {
            let product = fixed(whole).zip(all(parts)).map(|(whole, parts)| Rule::Product(whole, parts));
            rules.extend(product);
        }
        Op::Concat { axes, into } => {
            let Some(parts) = all(axes) else { return };
            // A slice may begin where any of the parts does.
            let mut before = 0u64;
            for &part in &parts {
                rules.insert(Rule::Sum(before.saturating_add(part), vec![before, part]));
                before = before.saturating_add(part);
            }
            rules.extend(fixed(into).map(|whole| Rule::Sum(whole, parts)));
        }
        Op::Slice { axis, into, start } => {
            let (Some(whole), Some(part)) = (fixed(axis), fixed(into)) else { return };
            let end = start.saturating_add(part);
            rules.insert(Rule::Sum(end, vec![*start, part]));
            rules.insert(Rule::AtMost(end, whole));
            // A slice of a slice begins where the sum of both starts is.
            let made = f.body.iter().find(|i| i.results == inst.args);
            if let Some(Inst { op: Op::Slice { start: outer, .. }, .. }) = made {
                rules.insert(Rule::Sum(outer.saturating_add(*start), vec![*outer, *start]));
            }
        }
        Op::TopK { axis, k } => rules.extend(fixed(axis).map(|n| Rule::AtMost(*k, n))),
        Op::TopIndices { axis, into } => {
            rules.extend(fixed(axis).zip(fixed(into)).map(|(n, k)| Rule::AtMost(k, n)));
        }
        Op::Rope { axis, .. } => {
            rules.extend(fixed(axis).map(|n| Rule::Sum(n, vec![n / 2, n / 2])));
        }
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
        | Op::Gather { .. }
        | Op::ScatterAdd { .. }
        | Op::Past { .. }
        | Op::Append { .. }
        | Op::Softmax { .. }
        | Op::RmsNorm { .. }
        | Op::Call { .. } => {}
    }
}

/// The names of an instruction's function and of its result, if it has one.
fn names(f: &Function, inst: &Inst) -> Option<(String, String)> {
    let &[result] = &inst.results[..] else { return None };
    Some((f.name.clone(), f.value(result).name.clone()))
}

/// The number that an instruction divides by.
fn divisor(defs: &[Def<'_>], inst: &Inst) -> Option<f64> {
    if inst.op != Op::Binary(Binary::Div) {
        return None;
    }
    let Def::Inst(_, Inst { op: Op::Const(number), .. }) = defs[inst.args[1].0 as usize] else { return None };
    let &[Real(number)] = &number[..] else { return None };
    Some(number)
}

/// How many elements a sum has that an instruction divides by just that number.
fn mean(f: &Function, defs: &[Def<'_>], inst: &Inst) -> Option<u64> {
    let by = divisor(defs, inst)?;
    let count = summed(f, defs, inst.args[0])?;
    (by == count as f64).then_some(count)
}

/// How many elements were summed for each of a value's.
fn summed(f: &Function, defs: &[Def<'_>], value: ValueId) -> Option<u64> {
    let Def::Inst(_, inst) = defs[value.0 as usize] else { return None };
    if matches!(inst.op, Op::Cast | Op::Rename { .. } | Op::Broadcast { .. }) {
        return summed(f, defs, inst.args[0]);
    }
    // `reassociate` makes the one of the other.
    let sums = matches!(inst.op, Op::Reduce { by: Reduce::Sum, .. });
    if !sums && (inst.op != Op::Contract || inst.args.len() > 1) {
        return None;
    }
    let axes = f.summed(&inst.args, f.ty(value));
    axes.iter().map(|&a| f.axis(a).size.fixed()).try_fold(1u64, |n, size| n.checked_mul(size?))
}

// --- small sizes that satisfy all rules ----------------------------------------------------------------------

struct Search<'a> {
    sizes: &'a BTreeSet<u64>,
    rules: &'a [Rule],
    preferred: &'a [u64],
    tried: usize,
}

impl Search<'_> {
    /// Sizes for all that have none yet, the smallest first, since the larger ones are mostly made of them.
    fn assign(&mut self, given: BTreeMap<u64, u64>) -> Option<BTreeMap<u64, u64>> {
        let known = self.follow(given)?;
        let Some(&next) = self.sizes.iter().find(|n| !known.contains_key(n)) else { return Some(known) };
        // Those that few others have, so that axes that are mistaken for each other are seen to be.
        let used = |n: u64| known.values().filter(|k| **k == n).count();
        let mut preferred = self.preferred.to_vec();
        preferred.sort_by_key(|&n| used(n));
        let candidates = preferred.into_iter().chain(LARGER).filter(|&n| n < next).chain([1, next]);
        for candidate in candidates {
            self.tried += 1;
            if self.tried > PATIENCE {
                return None;
            }
            let mut with = known.clone();
            with.insert(next, candidate);
            if let Some(found) = self.assign(with) {
                return Some(found);
            }
        }
        None
    }

    /// The same with all that follows from it; `None` if a rule is broken.
    fn follow(&self, mut known: BTreeMap<u64, u64>) -> Option<BTreeMap<u64, u64>> {
        loop {
            let before = known.len();
            for rule in self.rules {
                match rule {
                    Rule::AtMost(a, b) => {
                        if let (Some(x), Some(y)) = (known.get(a), known.get(b))
                            && (x > y || (a < b && x == y))
                        {
                            return None;
                        }
                    }
                    Rule::Product(whole, parts) => {
                        let rest = |w: u64, p: u64| (p > 0 && w.is_multiple_of(p)).then(|| w / p);
                        equation(&mut known, *whole, parts, 1, u64::checked_mul, rest)?;
                    }
                    Rule::Sum(whole, parts) => {
                        equation(&mut known, *whole, parts, 0, u64::checked_add, u64::checked_sub)?;
                    }
                }
            }
            if known.len() == before {
                return Some(known);
            }
        }
    }
}

/// Solves `whole = part ∘ part ∘ …` for the one size that is not known, if there is just one. `None` if it cannot hold.
fn equation(
    known: &mut BTreeMap<u64, u64>,
    whole: u64,
    parts: &[u64],
    neutral: u64,
    join: impl Fn(u64, u64) -> Option<u64>,
    rest: impl Fn(u64, u64) -> Option<u64>,
) -> Option<()> {
    let open: Vec<u64> = parts.iter().copied().filter(|p| !known.contains_key(p)).collect();
    let joined = parts.iter().filter_map(|p| known.get(p)).try_fold(neutral, |n, &p| join(n, p))?;
    match (known.get(&whole).copied(), &open[..]) {
        (Some(w), []) => (w == joined).then_some(()),
        (None, []) => (joined <= whole).then(|| {
            known.insert(whole, joined);
        }),
        (Some(w), &[part]) => {
            let found = rest(w, joined)?;
            (found <= part && (found > 0 || part == 0)).then(|| {
                known.insert(part, found);
            })
        }
        _ => Some(()),
    }
}
