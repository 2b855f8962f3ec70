//! What streams compute in their kernels, and what they read.

use std::collections::BTreeSet;

use latentc_ir::{Inst, Op, ValueId};
use latentc_passes::Kind;
use latentc_passes::stream_softmax::weighed;
use latentc_passes::stream_sums::{Axes, Wanted, is_product, only_for, pieces, regions};

use super::Storage;
use crate::stream::is_leaf;

impl Storage<'_> {
    /// Finds the softmaxes that weigh sums, and what their scores are made of: products of two that nothing else wants, and
    /// elementwise ops on these. A product that has not all axes of the scores would be computed again along the others, so
    /// it is stored. Then the other folds whose pieces are worth making.
    pub(super) fn streams(&mut self) {
        let f = self.f;
        for (at, inst) in f.body.iter().enumerate() {
            let Ok(sum) = weighed(f, &self.users, inst) else { continue };
            let product = self.users[sum.weights.0 as usize][0];
            self.streams.insert(product, sum.along);
            // Above the scores, the weights and what they are cast to.
            let mut weights = inst.result();
            self.stream(weights, 1);
            while weights != sum.weights {
                weights = f.body[self.users[weights.0 as usize][0]].result();
                self.stream(weights, 1);
            }
            // Below, what nothing but this softmax sees.
            let scores = [(at, inst.args[0])];
            let product = |i: &Inst| is_product(f, i);
            let hidden = only_for(f, &self.users, &scores, &|v| self.is_stored(v), &product);
            pieces(f, &hidden).into_iter().for_each(|v| self.stream(v, 1));
        }
        let wanted = Wanted { sizes: self.sizes, machine: self.machine, axes: Axes::One };
        let kept = |v: ValueId| self.is_stored(v) || self.streamed[v.0 as usize] > 0;
        for region in regions(f, &wanted, &kept) {
            let worth = region.streamed < region.stored;
            let folds: Vec<_> = region.folds.iter().map(|fold| fold.into(f)).collect();
            let message = format!(
                "{} in the kernels of {}: {:.1e} s, with memory {:.1e} s",
                if worth { "is made piece by piece" } else { "is stored, not made piece by piece" },
                self.names(&folds),
                region.streamed,
                region.stored
            );
            let kind = if worth { Kind::Applied } else { Kind::Missed };
            region.products.keys().for_each(|&v| self.say(kind, v, message.clone()));
            if !worth {
                continue;
            }
            for &v in &region.pieces {
                self.stream(v, region.products.get(&v).copied().unwrap_or(1));
            }
            for fold in &region.folds {
                self.streams.insert(fold.at, fold.along);
                if let Some(met) = fold.with {
                    self.stream(f.body[met.top].result(), 1);
                }
                if f.body[fold.at].op != Op::Contract {
                    self.store(fold.into(f));
                }
            }
        }
    }

    /// Has a value made piece by piece, by so many kernels.
    fn stream(&mut self, v: ValueId, kernels: usize) {
        self.streamed[v.0 as usize] = kernels;
    }

    /// Stores what a stream reads and cannot compute where it reads it.
    pub(super) fn stream_leaves(&mut self) {
        let f = self.f;
        let products: Vec<_> = self.streams.keys().copied().collect();
        for product in products {
            // What is made of the product meets in one value.
            let mut root = f.body[product].result();
            while !self.is_stored(root) {
                root = f.body[self.users[root.0 as usize][0]].result();
            }
            let mut seen = BTreeSet::from([root]);
            let mut work = vec![root];
            while let Some(v) = work.pop() {
                let Some(inst) = self.inst(v) else { continue };
                let inside = v == root || v == f.body[product].result() || self.streamed[v.0 as usize] > 0;
                if !inside && (self.is_stored(v) || !is_leaf(&inst.op)) {
                    self.store(v);
                    continue;
                }
                work.extend(inst.args.iter().copied().filter(|a| seen.insert(*a)));
            }
        }
    }
}
