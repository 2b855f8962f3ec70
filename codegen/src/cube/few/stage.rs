//! What a cube wants of the narrow operands, brought into shared memory.

use super::{AT_ONCE, Few, PACKS_AT_ONCE, PLANE, Staged, UNITS};
use crate::cube::contract::{Side, gather_index};
use crate::cube::emit::{Bin, Elem, Emit, Val};
use crate::cube::expr::Exprs;

impl Few<'_> {
    /// A chunk of the narrow operands of this cube's rows, row after row, at so many indices of the outer axes. A unit reads several
    /// elements before it keeps one. What lies beyond the last is the last once more, and nothing comes of it.
    pub(super) fn stage(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        side: &Side<'_>,
        (k0, depth): (Val, Val),
        (outer, count): (Val, u32),
    ) {
        let (plan, t, width) = (self.plan, &self.t, self.width(x));
        let (of_outer, total) = (t.rows * t.chunk, count * t.rows * t.chunk);
        let trips = (total / width).div_ceil(UNITS);
        // As many as are read at once go into equal parts.
        let most = if width > 1 { PACKS_AT_ONCE } else { AT_ONCE };
        let parts = trips.div_ceil((most / t.narrows).max(1));
        let batch = trips.div_ceil(parts);
        let (unit, wide, chunk) = (e.unit(), e.u32(width), e.u32(t.chunk));
        let last_of = |e: &mut Emit, n: Val, end: Val, step: Val| {
            let last = e.sub(end, step);
            e.binary(Bin::Min, n, last)
        };
        let whole = batch * UNITS * parts * width == total;
        let deep_enough = depth.known().is_some_and(|d| d.is_multiple_of(t.chunk.into()));
        let (from, one, end, step) = (e.u32(0), e.u32(1), e.u32(batch * parts), e.u32(batch));
        e.for_step(from, end, step, |e, trip| {
            x.scope(|x| {
                let mut found = Vec::new();
                for n in 0..batch {
                    let n = e.u32(n);
                    let trip = e.add(trip, n);
                    let units = e.u32(UNITS);
                    let before = e.mul(trip, units);
                    let number = e.add(before, unit);
                    let (all, number) = (e.u32(total), e.mul(number, wide));
                    let flat = if whole { number } else { last_of(e, number, all, wide) };
                    let (o, in_outer) = match count {
                        1 => (outer, flat),
                        _ => {
                            let of_outer = e.u32(of_outer);
                            let o = e.div(flat, of_outer);
                            (e.add(outer, o), e.rem(flat, of_outer))
                        }
                    };
                    let (row, k) = match t.rows {
                        1 => (from, in_outer),
                        _ => (e.div(in_outer, chunk), e.rem(in_outer, chunk)),
                    };
                    let row_number = e.add(side.first, row);
                    let row_number =
                        if t.rows == 1 { row_number } else { last_of(e, row_number, side.total, one) };
                    let deep = e.add(k0, k);
                    let deep = if deep_enough { deep } else { last_of(e, deep, depth, wide) };
                    let outer = x.split(e, o, &plan.outer);
                    let at = x.split(e, row_number, side.group);
                    for (value, kept) in &side.folded {
                        let element = e.load(*kept, row);
                        let index = gather_index(x, *value, &[self.repeat, (side.group, &at[..])]);
                        x.define(*value, index, element);
                    }
                    let mut elements = vec![Vec::new(); self.staged.len()];
                    for inner in x.beside(e, &plan.inner, deep, width) {
                        let known = [
                            self.repeat,
                            (&plan.outer[..], &outer[..]),
                            (side.group, &at[..]),
                            (&plan.inner[..], &inner[..]),
                        ];
                        for (staged, elements) in self.staged.iter().zip(&mut elements) {
                            let index = gather_index(x, staged.value, &known);
                            let element = x.element(e, staged.value, &index);
                            elements.push(e.cast(element, Elem::F32));
                        }
                    }
                    let first = e.sub(flat, k);
                    found.push((number, (first, k), elements));
                }
                for (number, place, elements) in found {
                    let keep = |e: &mut Emit| {
                        for (staged, elements) in self.staged.iter().zip(&elements) {
                            self.keep(e, staged, place, elements);
                        }
                    };
                    if whole {
                        keep(e);
                    } else {
                        let all = e.u32(total);
                        let inside = e.lt(number, all);
                        e.if_(inside, keep);
                    }
                }
            });
        });
    }

    /// Neighbours along the inner axes that a unit brings at once: a pack of up to 8, where the last of these is made of such.
    fn width(&self, x: &Exprs<'_>) -> u32 {
        let pack = if self.plan.along { self.t.pack.min(8) } else { 1 };
        let last = self.plan.inner.last().and_then(|&a| x.body().axis(a).size.fixed());
        let packs = |n: u64| n.is_multiple_of(pack.into());
        if self.vectors() && pack >= 4 && last.is_some_and(packs) && packs(self.t.chunk.into()) {
            pack
        } else {
            1
        }
    }

    /// Keeps neighbours of a row, which begins at the first of these places.
    fn keep(&self, e: &mut Emit, staged: &Staged, (row, k): (Val, Val), elements: &[Val]) {
        let mut at = self.place_in_row(e, k);
        for half in elements.chunks(4) {
            let place = e.add(row, at);
            e.store_beside(staged.memory, place, half);
            let plane = e.u32(4 * PLANE);
            at = e.add(at, plane);
        }
    }

    /// Where an element of a row is kept. A plane reads packs of 8 or 16 in parts of 4: all first parts lie side by side, then all second
    /// ones, and so on, so that its units meet in no bank.
    fn place_in_row(&self, e: &mut Emit, k: Val) -> Val {
        let parts = self.t.pack / 4;
        if !self.plan.along || parts < 2 {
            return k;
        }
        let [parts, four, pack, of_part, whole] =
            [parts, 4, self.t.pack, 4 * PLANE, self.t.pack * PLANE].map(|n| e.u32(n));
        let plane = e.u32(PLANE);
        let (block, quarter, number) = (e.div(k, whole), e.div(k, four), e.div(k, pack));
        let (part, lane, rest) = (e.rem(quarter, parts), e.rem(number, plane), e.rem(k, four));
        [(block, whole), (part, of_part), (lane, four)].into_iter().fold(rest, |at, (n, step)| {
            let more = e.mul(n, step);
            e.add(at, more)
        })
    }
}
