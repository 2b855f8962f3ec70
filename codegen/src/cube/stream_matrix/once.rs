//! What scores are made of, besides products, that each row or each position has once: maxima and sums of other folds, as in gradients.
//!
//! Rows have theirs in registers. What positions have is read ahead, by one unit for each of them while the block before is worked on, and
//! kept in shared memory, in two parts by turns. A quotient by what a row or a position has once is a product by its inverse.

use latentc_ir::{Binary, Function, Op, ValueId};

use super::Tiling;
use super::cube::Cube;
use crate::cube::emit::{Bin, Elem, Emit, Shared, Val, Var};
use crate::cube::expr::Exprs;
use crate::cube::stream::{At, index};
use crate::stream::{StreamPlan, cone, defined, is_elementwise};

/// What is known once, of a plan.
#[derive(Clone, Debug, Default)]
pub(super) struct Once {
    /// Quotients: the result, what is divided, and the divisor. Each comes after those that it is made of.
    quotients: Vec<[ValueId; 3]>,
    /// What positions have, and whether its inverse is wanted.
    of_positions: Vec<(ValueId, bool)>,
}

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
        let made = || below.iter().filter_map(|&v| defined(body, v)).filter(|i| is_elementwise(&i.op));
        let quotients = made().filter_map(|inst| {
            let (Op::Binary(Binary::Div), &[x, by]) = (&inst.op, &inst.args[..]) else { return None };
            let once = (!has(by, true) || !has(by, false)) && reads(by) && !multiplied(by);
            let worth = has(inst.result(), true) && has(inst.result(), false);
            (once && worth && body.ty(by).dtype.is_float()).then_some([inst.result(), x, by])
        });
        let quotients: Vec<_> = quotients.collect();
        let of_position = |v: ValueId| {
            has(v, false) && !has(v, true) && body.ty(v).dtype.is_float() && reads(v) && !multiplied(v)
        };
        // The last of each chain: what meets what rows have.
        let mut of_positions = Vec::new();
        for inst in made().filter(|inst| has(inst.result(), true)) {
            for (n, &v) in inst.args.iter().enumerate().filter(|(_, v)| of_position(**v)) {
                let inverse = n == 1 && quotients.iter().any(|q| q[0] == inst.result());
                if !of_positions.contains(&(v, inverse)) {
                    of_positions.push((v, inverse));
                }
            }
        }
        Once { quotients, of_positions }
    }

    /// The divisors that are known once.
    pub(super) fn divisors(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.quotients.iter().map(|[.., by]| *by)
    }

    /// Numbers that are kept for positions. Groups are not at the same block, so each has its own.
    pub(super) fn elements(&self, t: Tiling) -> u32 {
        2 * self.of_positions.len() as u32 * t.positions * if t.by.in_groups() { 2 } else { 1 }
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
        let size = e.u32(self.plan.once.of_positions.len() as u32 * self.t.positions);
        e.mul(part, size)
    }

    /// Begins to read what the positions from one on have once, by as many of these units as there are positions.
    pub(super) fn read_ahead(&self, e: &mut Emit, x: &mut Exprs<'_>, from: Val, unit: Val) -> Ahead {
        let (nothing, one, count) = (e.f32(0.0), e.f32(1.0), e.u32(self.t.positions));
        let vars: Vec<_> = self.plan.once.of_positions.iter().map(|_| e.var(nothing)).collect();
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
                let places: Vec<_> =
                    self.plan.once.of_positions.iter().map(|&(v, _)| index(axes(v), &known)).collect();
                for ((&(value, inverse), place), &var) in
                    self.plan.once.of_positions.iter().zip(places).zip(&vars)
                {
                    let number = x.element(e, value, &place);
                    let number = if inverse { e.binary(Bin::Div, one, number) } else { number };
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

    /// States what is known once of an index of scores, which is of the unit's `n`th row; `kept` is where the first number of its position
    /// lies.
    pub(super) fn known_once(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        (n, known): (usize, &[At<'_>]),
        kept: Option<Val>,
    ) {
        let body = x.body();
        let of_positions = &self.plan.once.of_positions;
        let numbers: Vec<_> = match (self.once, kept) {
            (Some(memory), Some(kept)) => (0..of_positions.len() as u32)
                .map(|n| {
                    let before = e.u32(n * self.t.positions);
                    let at = e.add(kept, before);
                    e.load(memory, at)
                })
                .collect(),
            _ => Vec::new(),
        };
        for (&(value, inverse), &number) in of_positions.iter().zip(&numbers) {
            if !inverse {
                x.define(value, index(&body.ty(value).axes, known), number);
            }
        }
        for &[result, divided, by] in &self.plan.once.quotients {
            let of_row = self.inverses.iter().find(|(v, _)| *v == by).map(|(_, rows)| rows[n]);
            let of_position = of_positions.iter().position(|one| *one == (by, true)).map(|n| numbers[n]);
            if let Some(inverse) = of_row.or(of_position) {
                let divided = x.element(e, divided, &index(&body.ty(divided).axes, known));
                let quotient = e.mul(divided, inverse);
                x.define(result, index(&body.ty(result).axes, known), quotient);
            }
        }
    }
}
