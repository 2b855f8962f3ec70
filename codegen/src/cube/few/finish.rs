//! The sums of units, added up and made into elements of the result.

use latentc_ir::AxisId;

use super::{Few, PLANE, UNITS, place};
use crate::cube::contract::{Offsets, Side, gather_index};
use crate::cube::emit::{Bin, Bits, Buf, Cmp, Elem, Emit, Shared, Val};
use crate::cube::epilogue::Epilogue;
use crate::cube::expr::Exprs;

impl Few<'_> {
    /// Where a sum is kept: by product, split, row, column.
    fn slot(&self, e: &mut Emit, (p, split): (usize, Val), row: u32, column: Val) -> Val {
        let t = &self.t;
        let splits = if self.plan.along { t.splits } else { 1 };
        let (before, of_split) = (e.u32((p as u32 * splits * t.rows + row) * t.columns), t.rows * t.columns);
        let of_split = e.u32(of_split);
        let step = e.mul(split, of_split);
        let at = e.add(before, step);
        e.add(at, column)
    }

    /// The units of a plane fold what they summed.
    pub(super) fn fold_planes(&self, e: &mut Emit, kept: Shared) {
        let t = &self.t;
        let (plane, splits, each, zero) = (e.u32(PLANE), e.u32(t.splits), e.u32(t.each), e.u32(0));
        let unit = e.unit();
        let (number, lane) = (e.div(unit, plane), e.rem(unit, plane));
        let (split, group) = (e.rem(number, splits), e.div(number, splits));
        let first = e.mul(group, each);
        let writes = e.cmp(Cmp::Eq, lane, zero);
        let scratch = (!self.vectors()).then(|| e.shared(Elem::F32, UNITS as usize));
        for (p, columns) in self.sums.iter().enumerate() {
            for (c, rows) in columns.iter().enumerate() {
                let c = e.u32(c as u32);
                let column = e.add(first, c);
                for (r, &sum) in rows.iter().enumerate() {
                    let mut whole = e.get(sum);
                    match scratch {
                        None => whole = e.fold_plane(Bin::Add, whole),
                        // Planes of other targets have other sizes.
                        Some(scratch) => {
                            e.fold_groups(Bin::Add, whole, scratch, lane, PLANE);
                            whole = e.load(scratch, unit);
                            e.sync();
                        }
                    }
                    let slot = self.slot(e, (p, split), r as u32, column);
                    e.if_(writes, |e| e.store(kept, slot, whole));
                }
            }
        }
        e.sync();
    }

    /// The units that have the same columns add up what they summed.
    pub(super) fn fold_units(&self, e: &mut Emit, kept: Shared) {
        let t = &self.t;
        let scratch = e.shared(Elem::F32, (UNITS * t.pack) as usize);
        let (unit, zero, one) = (e.unit(), e.u32(0), e.u32(1));
        let (pack, columns, splits) = (e.u32(t.pack), e.u32(t.columns), e.u32(t.splits));
        for (p, packs) in self.sums.iter().enumerate() {
            for r in 0..t.rows {
                // A unit's columns lie behind one another, and behind those of the units before it.
                let first = e.mul(unit, pack);
                for (n, rows) in packs.iter().enumerate() {
                    let n = e.u32(n as u32);
                    let (at, sum) = (e.add(first, n), e.get(rows[r as usize]));
                    e.store(scratch, at, sum);
                }
                e.sync();
                let units = e.u32(UNITS);
                e.for_step(unit, columns, units, |e, column| {
                    let nothing = e.f32(0.0);
                    let total = e.var(nothing);
                    e.for_step(zero, splits, one, |e, split| {
                        let before = e.mul(split, columns);
                        let at = e.add(before, column);
                        let (more, known) = (e.load(scratch, at), e.get(total));
                        let known = e.add(known, more);
                        e.set(total, known);
                    });
                    let slot = self.slot(e, (p, zero), r, column);
                    let total = e.get(total);
                    e.store(kept, slot, total);
                });
                e.sync();
            }
        }
    }

    /// Each unit makes elements of the result of the sums.
    pub(super) fn finish(
        &self,
        e: &mut Emit,
        (x, epilogue): (&mut Exprs<'_>, &Epilogue),
        side: &Side<'_>,
        repeat: (&[AxisId], &[Val]),
        (row0, column0, columns): (Val, Val, Val),
        (kept, output): (Shared, Buf),
    ) {
        let (plan, t) = (self.plan, &self.t);
        let memory = &epilogue.memory;
        let base = place(e, x, memory, &[repeat]);
        let (in_rows, in_columns) =
            (Offsets::of(e, x, &plan.rows, memory), Offsets::of(e, x, &plan.columns, memory));
        let products: Vec<_> = plan.products.iter().map(|p| p.result).collect();
        let splits = if plan.along { t.splits } else { 1 };
        let (unit, units, all) = (e.unit(), e.u32(UNITS), e.u32(t.rows * t.columns));
        e.for_step(unit, all, units, |e, flat| {
            let of_row = e.u32(t.columns);
            let (r, c) = (e.div(flat, of_row), e.rem(flat, of_row));
            let (row, column) = (e.add(row0, r), e.add(column0, c));
            let (row_exists, column_exists) = (e.lt(row, side.total), e.lt(column, columns));
            let inside = e.and(row_exists, column_exists);
            e.if_(inside, |e| {
                let sum = |e: &mut Emit, p: usize, partner: bool| {
                    let (one, mut total) = (e.u32(1), None);
                    let at = if partner { e.bits(Bits::Xor, flat, one) } else { flat };
                    for split in 0..splits {
                        let before = e.u32((p as u32 * splits + split) * t.rows * t.columns);
                        let at = e.add(before, at);
                        let part = e.load(kept, at);
                        total = Some(total.map_or(part, |sum| e.add(sum, part)));
                    }
                    total.expect("there is at least one split")
                };
                let column = epilogue.in_order(e, x, &plan.columns, column);
                let (down, right) = (in_rows.at(e, row), in_columns.at(e, column));
                let address = e.add(base, down);
                let address = e.add(address, right);
                if epilogue.plain(&products) {
                    let element = sum(e, 0, false);
                    return e.store(output, address, element);
                }
                x.scope(|x| {
                    let at = x.split(e, row, &plan.rows);
                    let across = x.split(e, column, &plan.columns);
                    let known = [repeat, (&plan.rows[..], &at[..]), (&plan.columns[..], &across[..])];
                    for (value, kept) in &side.folded {
                        let element = e.load(*kept, r);
                        x.define(*value, gather_index(x, *value, &known), element);
                    }
                    epilogue.store(e, x, &known, address, |e, x, address| {
                        let element = epilogue.element(e, x, &known, &products, &sum);
                        e.store(output, address, element);
                    });
                });
            });
        });
    }
}
