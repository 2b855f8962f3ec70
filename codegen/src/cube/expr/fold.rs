//! What is folded where it is wanted: sums, maxima, and the largest of an axis.

use latentc_ir::{AxisId, Function, Inst, Op, Reduce, ValueId};

use super::Exprs;
use crate::cube::emit::{Bin, Cmp, Elem, Emit, Un, Val, Var};

/// Terms of a fold that a unit reads at once, at most, one by one and in packs.
const AT_ONCE: u64 = 8;
const PACKED_AT_ONCE: u64 = 16;

/// A reduction or contraction: the product of the operands, folded along some axes.
pub(crate) struct Fold {
    by: Reduce,
    pub(crate) axes: Vec<AxisId>,
}

impl Fold {
    /// What an instruction folds, if it does.
    pub(crate) fn of(body: &Function, inst: &Inst) -> Option<Fold> {
        match inst.op {
            Op::Reduce { by, axis } => Some(Fold { by, axes: vec![axis] }),
            Op::Contract => {
                Some(Fold { by: Reduce::Sum, axes: body.summed(&inst.args, body.ty(inst.result())) })
            }
            Op::Const(_)
            | Op::Position { .. }
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Select
            | Op::Cast
            | Op::Rename { .. }
            | Op::Broadcast { .. }
            | Op::Split { .. }
            | Op::Merge { .. }
            | Op::Slice { .. }
            | Op::Concat { .. }
            | Op::Pack { .. }
            | Op::Unpack { .. }
            | Op::Gather { .. }
            | Op::TopK { .. }
            | Op::TopIndices { .. }
            | Op::ScatterAdd { .. }
            | Op::Past { .. }
            | Op::Append { .. }
            | Op::Rope { .. }
            | Op::Softmax { .. }
            | Op::RmsNorm { .. }
            | Op::Call { .. } => None,
        }
    }

    /// A register with what the fold starts from.
    pub(crate) fn start(&self, e: &mut Emit) -> Var {
        let identity = e.f32(self.by.identity() as f32);
        e.var(identity)
    }

    /// The instruction that folds.
    pub(crate) fn by(&self) -> Bin {
        match self.by {
            Reduce::Sum => Bin::Add,
            Reduce::Max => Bin::Max,
        }
    }
}

impl<'a> Exprs<'a> {
    /// Folds every `step`-th term, or pack of terms side by side, from `from` on, which is less than `step`, into a register. A few are all
    /// read at once.
    pub(crate) fn fold(
        &mut self,
        e: &mut Emit,
        here: (&'a Inst, &[Val]),
        fold: &Fold,
        total: Var,
        from: Val,
        step: Val,
    ) {
        self.walk(e, here, fold, (from, step), |e, terms| {
            for &term in terms {
                let sum = e.get(total);
                let sum = e.binary(fold.by(), sum, term);
                e.set(total, sum);
            }
        });
    }

    /// A maximum, and the sum of exponentials that are shifted by what it is so far, in one walk over the terms: where a larger
    /// one comes, the sum is scaled.
    pub(crate) fn fold_shifted(
        &mut self,
        e: &mut Emit,
        here: (&'a Inst, &[Val]),
        (fold, least): (&Fold, Val),
        [top, sum]: [Var; 2],
        (from, step): (Val, Val),
    ) {
        self.walk(e, here, fold, (from, step), |e, terms| {
            let before = e.get(top);
            let now = terms.iter().fold(before, |top, &x| e.binary(Bin::Max, top, x));
            e.set(top, now);
            let [shift, above] = [before, now].map(|top| e.binary(Bin::Max, top, least));
            let scale = e.sub(shift, above);
            let scale = e.unary(Un::Exp, scale);
            let old = e.get(sum);
            let mut total = e.mul(old, scale);
            for &x in terms {
                let x = e.sub(x, above);
                let x = e.unary(Un::Exp, x);
                total = e.add(total, x);
            }
            e.set(sum, total);
        });
    }

    /// Every `step`-th term, or pack of terms, from `from` on, as many at a time as are read at once.
    fn walk(
        &mut self,
        e: &mut Emit,
        here: (&'a Inst, &[Val]),
        fold: &Fold,
        (from, step): (Val, Val),
        take: impl Fn(&mut Emit, &[Val]),
    ) {
        let (pack, terms) = (self.pack_of(&fold.axes), self.total(e, &fold.axes));
        let of_pack = e.u32(pack);
        let packs = e.div(terms, of_pack);
        let each = match (packs.known(), step.known()) {
            (Some(packs), Some(step)) if packs.is_multiple_of(step) => Some(packs / step),
            _ => None,
        };
        let at_once = match each {
            Some(each) if pack == 1 && each <= AT_ONCE => each,
            Some(each) if pack > 1 => {
                let few = |n: &u64| n * u64::from(pack) <= PACKED_AT_ONCE && each.is_multiple_of(*n);
                [4, 2].into_iter().find(few).unwrap_or(1)
            }
            _ => 1,
        };
        let turn = |s: &mut Self, e: &mut Emit, first: Val| {
            s.scope(|s| {
                let mut terms = Vec::new();
                for n in 0..at_once {
                    let before = e.u32((n * step.known().unwrap_or(0)) as u32);
                    let number = e.add(first, before);
                    let number = e.mul(number, of_pack);
                    for index in s.beside(e, &fold.axes, number, pack) {
                        let moved: Vec<_> = fold.axes.iter().copied().zip(index).collect();
                        terms.push(s.term(e, here, &moved));
                    }
                }
                if !terms.is_empty() {
                    take(e, &terms);
                }
            });
        };
        if each == Some(at_once) {
            return turn(self, e, from);
        }
        let of_turn = e.u32(at_once as u32);
        let step = e.mul(step, of_turn);
        e.for_step(from, packs, step, |e, first| turn(self, e, first));
    }

    /// The term of a fold at these numbers along its axes.
    pub(crate) fn term(&mut self, e: &mut Emit, here: (&'a Inst, &[Val]), moved: &[(AxisId, Val)]) -> Val {
        let mut term = self.operand(e, here, 0, moved);
        for n in 1..here.0.args.len() {
            let factor = self.operand(e, here, n, moved);
            term = e.mul(term, factor);
        }
        term
    }

    /// The index of the element that has `slot` others before it: the largest is found and set aside `slot` times.
    pub(super) fn top_index(
        &mut self,
        e: &mut Emit,
        here: (&'a Inst, &[Val]),
        axis: AxisId,
        slot: Val,
    ) -> Val {
        let (zero, one, extent) = (e.u32(0), e.u32(1), self.extent(axis));
        let least = e.f32(f32::NEG_INFINITY);
        let (found, found_at) = (e.var(least), e.var(zero));
        let rounds = e.add(slot, one);
        e.for_step(zero, rounds, one, |e, round| {
            self.scope(|s| {
                let first = e.cmp(Cmp::Eq, round, zero);
                let (last, last_at) = (e.get(found), e.get(found_at));
                let (best, best_at) = (e.var(least), e.var(extent));
                e.for_step(zero, extent, one, |e, j| {
                    s.scope(|s| {
                        let x = s.operand(e, here, 0, &[(axis, j)]);
                        // NaN comes after every number.
                        let number = e.cmp(Cmp::Eq, x, x);
                        let x = e.select(number, x, least);
                        let smaller = e.cmp(Cmp::Lt, x, last);
                        let equal = e.cmp(Cmp::Eq, x, last);
                        let later = e.lt(last_at, j);
                        let next = e.and(equal, later);
                        let left = e.or(smaller, next);
                        let left = e.or(first, left);
                        let (top, top_at) = (e.get(best), e.get(best_at));
                        let greater = e.cmp(Cmp::Gt, x, top);
                        let none = e.cmp(Cmp::Eq, top_at, extent);
                        let better = e.or(greater, none);
                        let takes = e.and(left, better);
                        let (top, top_at) = (e.select(takes, x, top), e.select(takes, j, top_at));
                        e.set(best, top);
                        e.set(best_at, top_at);
                    });
                });
                let (best, best_at) = (e.get(best), e.get(best_at));
                e.set(found, best);
                e.set(found_at, best_at);
            });
        });
        let at = e.get(found_at);
        e.cast(at, Elem::I32)
    }

    /// Whether fewer than `k` come before this element.
    pub(super) fn top_k(&mut self, e: &mut Emit, here: (&'a Inst, &[Val]), axis: AxisId, k: u64) -> Val {
        let (inst, index) = here;
        let (result, x) = (self.body.ty(inst.result()), inst.args[0]);
        let along = |a: &AxisId| index[result.position(*a).expect("inference knows the result's axes")];
        let at: Vec<_> = self.body.ty(x).axes.iter().map(along).collect();
        let (before, k) = (self.rank(e, x, &at, axis), e.u32(k as u32));
        e.lt(before, k)
    }

    /// How many come before an element along an axis: the larger ones, and of equals the first.
    pub(crate) fn rank(&mut self, e: &mut Emit, x: ValueId, index: &[Val], axis: AxisId) -> Val {
        let along = self.body.ty(x).position(axis).expect("what is ranked has the axis");
        // NaN comes after every number.
        let least = e.f32(f32::NEG_INFINITY);
        let ordered = |e: &mut Emit, x: Val| {
            let number = e.cmp(Cmp::Eq, x, x);
            e.select(number, x, least)
        };
        let mine = self.element(e, x, index);
        let mine = ordered(e, mine);
        let none = e.u32(0);
        let before = e.var(none);
        let step = e.u32(1);
        e.for_step(none, self.extent(axis), step, |e, j| {
            self.scope(|s| {
                let mut at = index.to_vec();
                at[along] = j;
                let other = s.element(e, x, &at);
                let other = ordered(e, other);
                let greater = e.cmp(Cmp::Gt, other, mine);
                let equal = e.cmp(Cmp::Eq, other, mine);
                let earlier = e.lt(j, index[along]);
                let first = e.and(equal, earlier);
                let wins = e.or(greater, first);
                let wins = e.cast(wins, Elem::U32);
                let count = e.get(before);
                let count = e.add(count, wins);
                e.set(before, count);
            });
        });
        e.get(before)
    }
}
