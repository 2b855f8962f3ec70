//! What scores are made of, besides products, that each row or each position has once: what other folds came to, as in gradients.
//!
//! Rows have theirs in registers. What positions have is read ahead, by one unit for each of them while the block before is worked on, and
//! kept in shared memory, in two parts by turns.

use latentc_ir::{Function, Op, ValueId};

use super::Tiling;
use super::cube::Cube;
use crate::cube::emit::{Elem, Emit, Shared, Val, Var};
use crate::cube::expr::Exprs;
use crate::cube::stream::{At, index};
use crate::stream::{StreamPlan, cone, defined, is_elementwise};

/// What positions have once, of a plan.
#[derive(Clone, Debug, Default)]
pub(super) struct Once(Vec<ValueId>);

/// What a unit has read of the next block's positions.
pub(super) struct Ahead(Vec<Var>);

impl Once {
    /// Of what scores are made of.
    pub(super) fn of(body: &Function, plan: &StreamPlan) -> Once {
        let below = cone(body, plan.scores, is_elementwise);
        let has = |v: ValueId, rows: bool| {
            let axes = &body.ty(v).axes;
            if rows { plan.m.iter().any(|a| axes.contains(a)) } else { axes.contains(&plan.along) }
        };
        let reads = |v: ValueId| cone(body, v, |_| true).iter().any(|v| body.params.contains(v));
        let multiplied = |v: ValueId| {
            cone(body, v, |_| true).iter().any(|v| defined(body, *v).is_some_and(|i| i.op == Op::Contract))
        };
        let made = below.iter().filter_map(|&v| defined(body, v)).filter(|i| is_elementwise(&i.op));
        let of_position = |v: ValueId| {
            has(v, false) && !has(v, true) && body.ty(v).dtype.is_float() && reads(v) && !multiplied(v)
        };
        // The last of each chain: what meets what rows have.
        let mut of_positions = Vec::new();
        for inst in made.filter(|inst| has(inst.result(), true)) {
            for &v in inst.args.iter().filter(|&&v| of_position(v)) {
                if !of_positions.contains(&v) {
                    of_positions.push(v);
                }
            }
        }
        Once(of_positions)
    }

    /// Numbers that are kept for positions. Groups are not at the same block, so each has its own.
    pub(super) fn elements(&self, t: Tiling) -> u32 {
        2 * self.0.len() as u32 * t.positions * if t.by.in_groups() { 2 } else { 1 }
    }

    /// Room for them.
    pub(super) fn memory(&self, e: &mut Emit, t: Tiling) -> Option<Shared> {
        let elements = self.elements(t) as usize;
        (elements > 0).then(|| e.shared(Elem::F32, elements))
    }
}

impl Cube<'_> {
    /// Where a part of what is kept for positions begins.
    pub(super) fn first_kept(&self, e: &mut Emit, part: Val) -> Val {
        let size = e.u32(self.plan.once.0.len() as u32 * self.t.positions);
        e.mul(part, size)
    }

    /// Begins to read what the positions from one on have once, by as many of these units as there are positions.
    pub(super) fn read_ahead(&self, e: &mut Emit, x: &mut Exprs<'_>, from: Val, unit: Val) -> Ahead {
        let (nothing, count) = (e.f32(0.0), e.u32(self.t.positions));
        let vars: Vec<_> = self.plan.once.0.iter().map(|_| e.var(nothing)).collect();
        if vars.is_empty() {
            return Ahead(vars);
        }
        let mine = e.lt(unit, count);
        e.if_(mine, |e| {
            x.scope(|x| {
                let position = e.add(from, unit);
                let (at, _) = self.positions.clamped(e, position);
                let known: [At<'_>; 2] =
                    [(&self.stream().batch, &self.batch), (self.positions.axes, &[at][..])];
                let axes = |v: ValueId| &x.body().ty(v).axes[..];
                let places: Vec<_> = self.plan.once.0.iter().map(|&v| index(axes(v), &known)).collect();
                for ((&value, place), &var) in self.plan.once.0.iter().zip(places).zip(&vars) {
                    let number = x.element(e, value, &place);
                    e.set(var, number);
                }
            });
        });
        Ahead(vars)
    }

    /// Keeps that in a part of the memory for it.
    pub(super) fn keep_ahead(&self, e: &mut Emit, ahead: &Ahead, part: Val, unit: Val) {
        let Some(memory) = self.once else { return };
        let count = e.u32(self.t.positions);
        let first = self.first_kept(e, part);
        let mine = e.lt(unit, count);
        e.if_(mine, |e| {
            let first = e.add(first, unit);
            for (n, &var) in ahead.0.iter().enumerate() {
                let before = e.u32(n as u32 * self.t.positions);
                let at = e.add(first, before);
                let number = e.get(var);
                e.store(memory, at, number);
            }
        });
    }

    /// Reads and keeps it at once, for a block that nothing is done before.
    pub(super) fn read_now(&self, e: &mut Emit, x: &mut Exprs<'_>, from: Val, part: Val, unit: Val) {
        let now = self.read_ahead(e, x, from, unit);
        self.keep_ahead(e, &now, part, unit);
    }

    /// States what is known once of an index of scores; `kept` is where the first number of its position lies.
    pub(super) fn known_once(&self, e: &mut Emit, x: &mut Exprs<'_>, known: &[At<'_>], kept: Option<Val>) {
        let (Some(memory), Some(kept)) = (self.once, kept) else { return };
        let body = x.body();
        for (n, &value) in (0..).zip(&self.plan.once.0) {
            let before = e.u32(n * self.t.positions);
            let at = e.add(kept, before);
            let number = e.load(memory, at);
            x.define(value, index(&body.ty(value).axes, known), number);
        }
    }
}
