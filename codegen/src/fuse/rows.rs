//! Kernels that compute rows take in what they read: a softmax, what selects of it and what is gathered by the selection.
//!
//! A value need not be stored if every kernel that reads it is a map which [`fits`] says can make it, and if making it there takes
//! less time than the launch and the trip through memory. Where a product or a stream wants something that is made of it,
//! that is stored instead, if it is the smaller: the gates of the experts that work for a token, not the scores of all.
//!
//! What a product is chosen by has to be stored. A kernel that gathers by it, and reads nothing else than what the choice was made of,
//! chooses once more, if that takes less than a launch: it need not wait then, and may stand beside the one that stores the choice. The two may
//! round differently; so that this swaps equals at most, it has to gather what was compared, and there may be no other choice below.

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::{Def, Inst, Op, ValueId};
use latentc_passes::Kind;
use latentc_passes::stream_sums::shifted;

use super::limits::BUFFERS;
use super::{Storage, TURN, is_view};
use crate::map::{RESIDENT_BYTES, fits};

/// Instructions of a kernel, at most: expressions are written out one in another.
const LONGEST: usize = 256;

impl<'a> Storage<'a> {
    /// Takes values into the kernels that read them, from the last on, for as long as that gains time.
    pub(super) fn rows(&mut self) {
        let f = self.f;
        // Each gain is one of time, so this ends.
        while f.body.iter().rev().flat_map(|inst| inst.results.first()).any(|&v| self.take_in(v)) {}
    }

    /// Stores a value no longer, if it can be done without and that is faster. Changes nothing otherwise.
    fn take_in(&mut self, v: ValueId) -> bool {
        let f = self.f;
        let is_base = |i: &Inst| !(is_view(f, i) && self.is_stored(i.args[0]));
        if !self.is_stored(v) || !self.inst(v).is_some_and(is_base) {
            return false;
        }
        // With it go the views of it.
        let mut group = BTreeSet::from([v]);
        for inst in f.body.iter().filter(|i| is_view(f, i)) {
            if group.contains(&inst.args[0]) && self.is_stored(inst.result()) {
                group.insert(inst.result());
            }
        }
        if group.iter().any(|g| self.fixed[g.0 as usize]) {
            return false;
        }
        let over = self.over_products();
        if over[v.0 as usize] {
            return false;
        }
        // The kernels that would make it, and what of it products would read.
        let (mut kernels, mut instead) = (BTreeSet::new(), BTreeSet::new());
        let mut seen = group.clone();
        let mut work: Vec<_> = group.iter().copied().collect();
        while let Some(x) = work.pop() {
            for &u in &self.users[x.0 as usize] {
                let Some(&y) = f.body[u].results.first() else { return false };
                if over[y.0 as usize] {
                    if group.contains(&x) {
                        return false;
                    }
                    instead.insert(x);
                } else if self.is_stored(y) && !group.contains(&y) {
                    kernels.insert(y);
                } else if seen.insert(y) {
                    work.push(y);
                }
            }
        }
        let read = |s: &Storage<'_>, values: &BTreeSet<ValueId>| {
            s.seconds(0.0, values.iter().map(|&x| s.bytes(x)).sum::<f64>())
        };
        let launches =
            |s: &Storage<'_>, roots: &BTreeSet<ValueId>| roots.iter().map(|&r| s.launch(r)).sum::<f64>();
        let mut before = launches(self, &kernels) + self.launch(v);
        before += if instead.is_empty() { 0.0 } else { read(self, &BTreeSet::from([v])) };
        group.iter().for_each(|g| self.stored[g.0 as usize] = false);
        instead.iter().for_each(|&x| self.store(x));
        kernels.extend(&instead);
        let after = launches(self, &kernels) + read(self, &instead);
        if after < before && kernels.iter().all(|&r| self.is_map(r)) {
            let kernels = self.names(&kernels);
            let message =
                format!("is made by rows in the kernels of {kernels}: {after:.1e} s, stored {before:.1e} s");
            self.say(Kind::Applied, v, message);
            return true;
        }
        group.iter().for_each(|&g| self.store(g));
        instead.iter().for_each(|x| self.stored[x.0 as usize] = false);
        false
    }

    /// The kernels that make something again that is stored, by what they make, each with that.
    pub(super) fn chosen_again(&mut self) -> Vec<(ValueId, ValueId)> {
        let f = self.f;
        let selects = |inst: &&Inst| matches!(inst.op, Op::TopK { .. } | Op::TopIndices { .. });
        let made = f.body.iter().filter(|i| !is_view(f, i)).flat_map(|i| i.results.first().copied());
        let stored: Vec<_> = made.filter(|&v| self.is_stored(v)).collect();
        let mut again = Vec::new();
        for choice in f.body.iter().filter(selects).filter(|i| stored.contains(&i.result())) {
            let (v, compared) = (choice.result(), choice.args[0]);
            let (choosing, chosen_of) = self.part(v);
            if choosing.iter().copied().filter(|i| selects(i)).count() > 1 {
                continue;
            }
            for &root in stored.iter().filter(|&&r| r != v) {
                let (making, read) = self.part(root);
                let alike = |inst: &&Inst| {
                    !inst.args.contains(&v)
                        || matches!(inst.op, Op::Gather { .. }) && inst.args == [compared, v]
                };
                let same = read.iter().all(|x| *x == v || chosen_of.contains(x));
                if !read.contains(&v) || !same || !making.iter().all(alike) {
                    continue;
                }
                let waits = self.machine.launch + self.launch(root);
                self.stored[v.0 as usize] = false;
                let (map, chooses) = (self.is_map(root), self.launch(root));
                self.stored[v.0 as usize] = true;
                if map && chooses < waits {
                    again.push((root, v));
                    let message = format!(
                        "chooses by {} once more: so it takes {chooses:.1e} s, behind another launch {waits:.1e} s",
                        self.names([&v])
                    );
                    self.say(Kind::Applied, root, message);
                }
            }
        }
        again
    }

    /// Stores what the kernel of a value folds, if it takes longer to walk all of the kernel in the few rows of the folds than to have
    /// them in memory. Changes nothing otherwise.
    pub(super) fn spread(&mut self, root: ValueId) -> bool {
        let folds = self.part(root).0.into_iter().filter(|i| matches!(i.op, Op::Reduce { .. }));
        let folds: Vec<_> = folds.map(Inst::result).filter(|&v| v != root).collect();
        let together = self.launch(root);
        folds.iter().for_each(|&v| self.store(v));
        let apart = folds.iter().chain([&root]).map(|&v| self.launch(v)).sum::<f64>();
        if apart < together {
            return true;
        }
        folds.iter().for_each(|v| self.stored[v.0 as usize] = false);
        false
    }

    /// For each value, whether a product or a stream is computed in the kernel that computes it.
    fn over_products(&self) -> Vec<bool> {
        let mut over = vec![false; self.f.values.len()];
        for inst in &self.f.body {
            let below = inst.args.iter().any(|&a| over[a.0 as usize] && !self.is_stored(a));
            let product = matches!(inst.op, Op::Contract | Op::Softmax { .. });
            inst.results.iter().for_each(|r| over[r.0 as usize] = product || below);
        }
        over
    }

    /// The instructions of the kernel that makes a value, in order, and what they read.
    pub(super) fn part(&self, root: ValueId) -> (Vec<&'a Inst>, BTreeSet<ValueId>) {
        let (mut insts, mut leaves) = (BTreeSet::new(), BTreeSet::new());
        let mut work = vec![root];
        while let Some(v) = work.pop() {
            match self.defs[v.0 as usize] {
                Def::Inst(n, inst) if v == root || !self.is_stored(v) => {
                    if insts.insert(n) {
                        work.extend(&inst.args);
                    }
                }
                Def::Inst(..) | Def::Param(_) | Def::Weight(_) | Def::Cache(_) => {
                    leaves.insert(v);
                }
            }
        }
        (insts.into_iter().map(|n| &self.f.body[n]).collect(), leaves)
    }

    fn is_map(&self, root: ValueId) -> bool {
        let (part, leaves) = self.part(root);
        leaves.len() + 2 <= BUFFERS && part.len() <= LONGEST && fits(self.f, &part).is_ok()
    }

    /// The time of the launch that makes a value.
    fn launch(&self, root: ValueId) -> f64 {
        let (part, leaves) = self.part(root);
        let f = self.f;
        let elements = |v: ValueId| self.elements(f.ty(v).axes.iter().copied());
        // Of a cache that is appended to, only what is new is touched.
        let (made, cache) = match part.last() {
            Some(Inst { op: Op::Append { .. }, args, .. }) => (args[1], Some(args[0])),
            Some(_) | None => (root, None),
        };
        let read = leaves.iter().filter(|v| Some(**v) != cache).map(|&v| self.bytes(v));
        let bytes = self.bytes(made) + read.sum::<f64>() + self.again((&part, &leaves), root);
        let flops = part.iter().map(|inst| match inst.op {
            Op::Reduce { .. } | Op::Pack { .. } => elements(inst.args[0]),
            Op::TopK { axis, .. } | Op::TopIndices { axis, .. } => {
                elements(inst.args[0]) * self.elements([axis])
            }
            Op::Rope { .. } => TURN * elements(inst.result()),
            Op::Append { .. } => elements(inst.args[1]),
            Op::Const(_)
            | Op::Position { .. }
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Select
            | Op::Cast
            | Op::Contract
            | Op::Rename { .. }
            | Op::Broadcast { .. }
            | Op::Split { .. }
            | Op::Merge { .. }
            | Op::Slice { .. }
            | Op::Concat { .. }
            | Op::Unpack { .. }
            | Op::Gather { .. }
            | Op::ScatterAdd { .. }
            | Op::Past { .. }
            | Op::Softmax { .. }
            | Op::RmsNorm { .. }
            | Op::Call { .. } => elements(inst.result()),
        });
        // A row is walked by one processor, and others wait where there are fewer rows than processors.
        let rows = fits(f, &part).ok().and_then(|plan| plan.rows);
        let rows = rows.map_or(f64::INFINITY, |rows| self.elements(rows));
        let idle = (self.machine.processors / rows).max(1.0);
        self.machine.launch + idle * self.seconds(flops.sum(), bytes)
    }
    /// The bytes that a kernel reads again because it walks its rows several times, where these are so long that no cache has them still;
    /// less those of rows of which it only gathers a few numbers.
    fn again(&self, (part, leaves): (&[&'a Inst], &BTreeSet<ValueId>), root: ValueId) -> f64 {
        let f = self.f;
        let made = |v: ValueId| part.iter().copied().find(|i| i.results.contains(&v));
        let folds: Vec<_> = part.iter().copied().filter(|i| matches!(i.op, Op::Reduce { .. })).collect();
        let rows = folds.first().map_or(root, |fold| fold.result());
        let rows = self.elements(f.ty(rows).axes.iter().copied());
        let long = |v: &&ValueId| self.bytes(**v) > rows * RESIDENT_BYTES as f64;
        if !leaves.iter().any(|v| long(&v)) {
            return 0.0;
        }
        // A maximum is folded with the sum that it shifts.
        let joined: Vec<_> =
            folds.iter().filter_map(|sum| shifted(made, sum)).map(|s| s.top.result()).collect();
        let mut walks: BTreeSet<_> = folds.iter().map(|fold| fold.result()).chain([root]).collect();
        walks.retain(|v| !joined.contains(v));
        let mut often: BTreeMap<ValueId, f64> = BTreeMap::new();
        for inst in walks.into_iter().filter_map(made) {
            let (mut work, mut seen) = (inst.args.clone(), BTreeSet::new());
            if matches!(inst.op, Op::Gather { .. }) {
                work.remove(0);
            }
            while let Some(v) = work.pop() {
                if !seen.insert(v) {
                    continue;
                }
                match made(v).map(|i| (&i.op, &i.args[..])) {
                    None => *often.entry(v).or_default() += 1.0,
                    Some((Op::Reduce { .. }, _)) => {}
                    Some((Op::Gather { .. }, args)) => work.extend(&args[1..]),
                    Some((_, args)) => work.extend(args),
                }
            }
        }
        let again = |v: &ValueId| (often.get(v).copied().unwrap_or(0.0) - 1.0) * self.bytes(*v);
        leaves.iter().filter(long).map(again).sum()
    }
}
