//! Kernels that compute each element, or each row, on its own.
//!
//! Without reductions, a unit computes one element. With reductions, the domain falls into rows: the results of the reductions
//! belong to a row, each reduction is one pass along its axis with its operand computed again, and a last pass makes
//! the outputs of the row. How a row is walked is decided by what is known when the kernel is built:
//!
//! - every pass has a fixed length of [`SHORT`] at most: a unit walks the row alone;
//! - otherwise a cube walks the row, its units side by side, and folds their parts through shared memory.
//!
//! A row with resident values is walked by a cube too, which computes each of them once and keeps it in shared memory:
//! reductions by groups of units side by side, selections by counting for each element who comes before it.
//!
//! A reduction whose result does not belong to a row and does not fit into one (the scheduler makes none) is folded by each unit
//! that wants it. Scalar products are reductions too: the sum of the squares of each row is no matter for tiles.

use latentc_ir::{AxisId, Function, Inst, Op, ValueId};

use super::emit::{Buf, Elem, Emit, Shared, Val};
use super::expr::{Exprs, Fold, Place};
use super::resident::Row;
use crate::map::{MapPlan, fits};

/// The longest row that a unit walks alone.
const SHORT: u64 = 32;

/// Units of a cube that walks elements or short rows.
const UNITS: u32 = 256;

/// How the domain is walked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Walk {
    /// One unit per index of all axes.
    Elements,
    /// One unit per index of these axes.
    Units(Vec<AxisId>),
    /// One cube of so many units per index of these axes.
    Cubes(Vec<AxisId>, u32),
}

/// A map kernel's plan with all that follows from it.
#[derive(Clone, Debug)]
pub(crate) struct Map {
    pub(crate) domain: Vec<AxisId>,
    pub(crate) walk: Walk,
    /// What a cube keeps of its row, in order, with the numbers of elements.
    resident: Vec<(ValueId, usize)>,
}

impl Map {
    /// By the rule above.
    pub(crate) fn of(body: &Function) -> Map {
        let size = |axes: &[AxisId]| {
            let sizes = axes.iter().map(|&a| body.axis(a).size.fixed());
            sizes.into_iter().try_fold(1u64, |total, n| Some(total.saturating_mul(n?)))
        };
        let cube = |longest: u64| longest.clamp(1, UNITS.into()).next_power_of_two() as u32;
        let domain = MapPlan::of(body).domain;
        if let Ok(plan) = fits(body, &body.body.iter().collect::<Vec<_>>())
            && let Some(rows) = &plan.rows
            && !plan.resident.is_empty()
        {
            let length = |v: ValueId| size(&plan.in_row(body, v)).expect("what is resident has a fixed size");
            let resident: Vec<_> = plan.resident.iter().map(|&v| (v, length(v) as usize)).collect();
            // An instruction that folds or selects keeps as many units busy as its operand has elements.
            let wide =
                |inst: &&Inst| matches!(inst.op, Op::Reduce { .. } | Op::TopK { .. } | Op::TopIndices { .. });
            let widths = body.body.iter().filter(wide).map(|inst| length(inst.args[0]));
            let rest = size(&rest(&domain, rows)).expect("rows that fit have fixed sizes");
            let longest = widths.fold(rest, u64::max);
            let walk = Walk::Cubes(rows.clone(), cube(longest).max(SHORT as u32));
            return Map { domain, walk, resident };
        }
        // What is folded for the operands of a product belongs to its rows.
        let product = body.body.iter().find(|inst| inst.op == Op::Contract);
        let folded = product.or_else(|| body.body.iter().find(|inst| Fold::of(body, inst).is_some()));
        let rows = folded.map(|inst| {
            let row = body.ty(inst.result());
            domain.iter().copied().filter(|&a| row.has(a)).collect::<Vec<_>>()
        });
        let walk = match rows {
            Some(rows) if row_folds(body, &rows).next().is_some() => {
                let passes = row_folds(body, &rows).map(|(_, fold)| size(&fold.axes));
                let longest = passes
                    .chain([size(&rest(&domain, &rows))])
                    .try_fold(1, |longest, n| Some(n?.max(longest)));
                match longest {
                    Some(n) if n <= SHORT => Walk::Units(rows),
                    Some(n) => Walk::Cubes(rows, cube(n)),
                    None => Walk::Cubes(rows, UNITS),
                }
            }
            _ => Walk::Elements,
        };
        Map { domain, walk, resident: Vec::new() }
    }

    /// Units of a cube.
    pub(crate) fn units(&self) -> u32 {
        match self.walk {
            Walk::Elements | Walk::Units(_) => UNITS,
            Walk::Cubes(_, units) => units,
        }
    }

    /// Bytes of shared memory.
    pub(crate) fn shared_bytes(&self) -> usize {
        match self.walk {
            Walk::Elements | Walk::Units(_) => 0,
            Walk::Cubes(_, units) => {
                let kept =
                    self.resident.iter().map(|(_, len)| (len * Elem::F32.bytes()).next_multiple_of(16));
                units as usize * Elem::F32.bytes() + kept.sum::<usize>()
            }
        }
    }

    /// The kernel's instructions, over the parameters' buffers and the output.
    pub(crate) fn emit(&self, e: &mut Emit, x: Exprs<'_>, output: Buf) {
        let mut w = Writer { domain: &self.domain, resident: &self.resident, x, output };
        match &self.walk {
            Walk::Elements => {
                let total = w.x.total(e, &self.domain);
                let flat = e.unit_in_grid();
                let inside = e.lt(flat, total);
                e.if_(inside, |e| {
                    let index = w.x.split(e, flat, &self.domain);
                    w.x.at(Place { axes: self.domain.clone(), index: index.clone(), flat });
                    w.store(e, &index);
                });
            }
            Walk::Units(rows) => {
                let total = w.x.total(e, rows);
                let flat = e.unit_in_grid();
                let inside = e.lt(flat, total);
                e.if_(inside, |e| w.row(e, rows, flat, None));
            }
            Walk::Cubes(rows, units) => {
                let scratch = e.shared(Elem::F32, *units as usize);
                let total = w.x.total(e, rows);
                let flat = e.cube();
                // All units of a cube agree, so those that wait for each other inside all come.
                let inside = e.lt(flat, total);
                e.if_(inside, |e| w.row(e, rows, flat, Some((scratch, *units))));
            }
        }
    }
}

/// Writes the elements of the domain.
struct Writer<'a> {
    domain: &'a [AxisId],
    resident: &'a [(ValueId, usize)],
    x: Exprs<'a>,
    output: Buf,
}

impl<'a> Writer<'a> {
    /// A row, walked by this unit alone or by the units of its cube, which fold over some scratch.
    fn row(&mut self, e: &mut Emit, rows: &[AxisId], flat: Val, cube: Option<(Shared, u32)>) {
        let body = self.x.body();
        let row = self.x.split(e, flat, rows);
        let in_row = |a: &AxisId| rows.iter().position(|r| r == a).map(|n| row[n]);
        let (first, step) = match cube {
            None => (e.u32(0), e.u32(1)),
            Some((_, units)) => (e.unit(), e.u32(units)),
        };
        let mut folds = row_folds(body, rows).peekable();
        for inst in &body.body {
            if let Some((_, fold)) = folds.next_if(|(next, _)| next.result() == inst.result()) {
                let index: Vec<_> = body.ty(inst.result()).axes.iter().filter_map(in_row).collect();
                let part = fold.start(e);
                self.x.fold(e, (inst, &index), &fold, part, first, step);
                let mut whole = e.get(part);
                if let Some((scratch, units)) = cube {
                    whole = e.fold_cube(fold.by(), whole, scratch, (units, self.x.target()));
                }
                self.x.define(inst.result(), index, whole);
            } else if let Some(&(_, len)) = self.resident.iter().find(|(v, _)| *v == inst.result())
                && let Some((scratch, units)) = cube
            {
                Row { axes: rows, index: &row, scratch, units }.keep(e, &mut self.x, inst, len);
            }
        }
        let rest = rest(self.domain, rows);
        let total = self.x.total(e, &rest);
        e.for_step(first, total, step, |e, flat| {
            let others = self.x.split(e, flat, &rest);
            let other = |a: &AxisId| rest.iter().position(|r| r == a).map(|n| others[n]);
            let index: Vec<_> = self.domain.iter().filter_map(|a| in_row(a).or_else(|| other(a))).collect();
            self.store(e, &index);
        });
    }

    /// Computes the element at an index of the domain and stores it.
    fn store(&mut self, e: &mut Emit, index: &[Val]) {
        let body = self.x.body();
        let root = body.results[0];
        let output = self.output;
        let Some(Inst { op: Op::Append { to, .. }, args, .. }) = body.body.last() else {
            let element = self.x.element(e, root, index);
            let address = self.x.address(e, index, self.domain);
            return e.store(output, address, element);
        };
        let along = |a: &AxisId| self.domain.iter().position(|d| d == a).map(|n| index[n]);
        let at: Vec<_> = body.ty(args[2]).axes.iter().filter_map(along).collect();
        let place = self.x.element(e, args[2], &at);
        // A negative position becomes a large one, so one comparison finds all that lie outside of the cache.
        let place = e.cast(place, Elem::U32);
        let inside = e.lt(place, self.x.extent(*to));
        e.if_(inside, |e| {
            let element = self.x.element(e, args[1], index);
            let cache = &body.ty(root).axes;
            let there = |a: &AxisId| if a == to { Some(place) } else { along(a) };
            let at: Vec<_> = cache.iter().filter_map(there).collect();
            let address = self.x.address(e, &at, cache);
            e.store(output, address, element);
        });
    }
}

/// The axes of a row.
fn rest(domain: &[AxisId], rows: &[AxisId]) -> Vec<AxisId> {
    domain.iter().copied().filter(|a| !rows.contains(a)).collect()
}

/// The instructions that fold and whose results belong to a row, in order.
fn row_folds<'a>(body: &'a Function, rows: &[AxisId]) -> impl Iterator<Item = (&'a Inst, Fold)> {
    body.body.iter().filter_map(move |inst| {
        let axes = &body.ty(inst.result()).axes;
        let in_row = axes.iter().all(|a| rows.contains(a));
        Fold::of(body, inst).filter(|_| in_row).map(|fold| (inst, fold))
    })
}
