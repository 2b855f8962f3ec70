//! What a streamed softmax computes in its kernel, and what it reads.

use std::collections::BTreeSet;

use latentc_ir::{Inst, Op, ValueId};
use latentc_passes::stream_softmax::weighed;

use super::Storage;
use crate::stream::is_leaf;

impl Storage<'_> {
    /// Finds the softmaxes that weigh sums, and what their scores are made of: products of two that nothing else wants, and
    /// elementwise ops on these. A product that has not all axes of the scores would be computed again along the others, so
    /// it is stored.
    pub(super) fn streams(&mut self) {
        let f = self.f;
        for (at, inst) in f.body.iter().enumerate() {
            let Ok(sum) = weighed(f, &self.users, inst) else { continue };
            let product = self.users[sum.weights.0 as usize][0];
            self.streams.insert(product, sum.along);
            // Above the scores, the weights and what they are cast to.
            let mut weights = inst.result();
            self.streamed[weights.0 as usize] = true;
            while weights != sum.weights {
                weights = f.body[self.users[weights.0 as usize][0]].result();
                self.streamed[weights.0 as usize] = true;
            }
            // Below, from the last to the first: what nothing but this softmax sees.
            let mut hidden: BTreeSet<ValueId> = BTreeSet::new();
            let mut products = Vec::new();
            for below in f.body[..at].iter().rev() {
                let Some(&v) = below.results.first() else { continue };
                let inside = |&u: &usize| u == at || hidden.contains(&f.body[u].results[0]);
                let users = &self.users[v.0 as usize];
                if users.is_empty() || self.is_stored(v) || !users.iter().all(inside) {
                    continue;
                }
                if below.op.is_elementwise() {
                    hidden.insert(v);
                } else if self.is_score(below, inst.args[0]) {
                    products.push(v);
                }
            }
            // In order: a value is made piece by piece if something that it is made of is.
            products.iter().for_each(|v| self.streamed[v.0 as usize] = true);
            for below in f.body[..at].iter().filter(|i| i.results.iter().any(|r| hidden.contains(r))) {
                self.streamed[below.result().0 as usize] =
                    below.args.iter().any(|a| self.streamed[a.0 as usize]);
            }
        }
    }

    /// Whether a stream over the axes of `scores` can compute this product in tiles.
    fn is_score(&self, inst: &Inst, scores: ValueId) -> bool {
        let f = self.f;
        let &[a, b] = &inst.args[..] else { return false };
        let summed = f.summed(&inst.args, f.ty(inst.result()));
        inst.op == Op::Contract
            && a != b
            && [a, b, inst.result()].iter().all(|&v| f.ty(v).dtype.is_float())
            && self.axes(inst.result()) == self.axes(scores)
            && summed.iter().all(|&s| f.ty(a).has(s) && f.ty(b).has(s))
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
                let inside = v == root || v == f.body[product].result() || self.streamed[v.0 as usize];
                if !inside && (self.is_stored(v) || !is_leaf(&inst.op)) {
                    self.store(v);
                    continue;
                }
                work.extend(inst.args.iter().copied().filter(|a| seen.insert(*a)));
            }
        }
    }
}
