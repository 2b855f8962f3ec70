//! What a cube wants of the narrow operands, brought into shared memory.

use super::{AT_ONCE, Few, PLANE, UNITS};
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
        let (plan, t) = (self.plan, &self.t);
        let (of_outer, total) = (t.rows * t.chunk, count * t.rows * t.chunk);
        let trips = total.div_ceil(UNITS);
        let batch = (AT_ONCE / t.narrows).clamp(1, trips);
        let (unit, one, chunk) = (e.unit(), e.u32(1), e.u32(t.chunk));
        let last_of = |e: &mut Emit, n: Val, end: Val| {
            let last = e.sub(end, one);
            e.binary(Bin::Min, n, last)
        };
        let whole = (batch * UNITS * trips.div_ceil(batch)) == total;
        let deep_enough = depth.known().is_some_and(|d| d.is_multiple_of(t.chunk.into()));
        let (from, end, step) = (e.u32(0), e.u32(trips), e.u32(batch));
        e.for_step(from, end, step, |e, trip| {
            x.scope(|x| {
                let mut found = Vec::new();
                for n in 0..batch {
                    let n = e.u32(n);
                    let trip = e.add(trip, n);
                    let units = e.u32(UNITS);
                    let before = e.mul(trip, units);
                    let number = e.add(before, unit);
                    let all = e.u32(total);
                    let flat = if whole { number } else { last_of(e, number, all) };
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
                        if t.rows == 1 { row_number } else { last_of(e, row_number, side.total) };
                    let deep = e.add(k0, k);
                    let deep = if deep_enough { deep } else { last_of(e, deep, depth) };
                    let outer = x.split(e, o, &plan.outer);
                    let at = x.split(e, row_number, side.group);
                    let inner = x.split(e, deep, &plan.inner);
                    let known = [
                        self.repeat,
                        (&plan.outer[..], &outer[..]),
                        (side.group, &at[..]),
                        (&plan.inner[..], &inner[..]),
                    ];
                    for (value, kept) in &side.folded {
                        let element = e.load(*kept, row);
                        x.define(*value, gather_index(x, *value, &known), element);
                    }
                    let elements: Vec<_> = self
                        .staged
                        .iter()
                        .map(|staged| {
                            let index = gather_index(x, staged.value, &known);
                            let element = x.element(e, staged.value, &index);
                            e.cast(element, Elem::F32)
                        })
                        .collect();
                    let place = self.place_in_row(e, k);
                    let first = e.sub(flat, k);
                    found.push((number, e.add(first, place), elements));
                }
                for (number, place, elements) in found {
                    let keep = |e: &mut Emit| {
                        for (staged, &element) in self.staged.iter().zip(&elements) {
                            e.store(staged.memory, place, element);
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

    /// Where an element of a row is kept. A plane reads packs of 8 in two halves: all first halves lie side by side, then all
    /// second ones, so that its units meet in no bank.
    fn place_in_row(&self, e: &mut Emit, k: Val) -> Val {
        if !self.plan.along || self.t.pack < 8 {
            return k;
        }
        let [two, four, eight, half, whole] = [2, 4, 8, 4 * PLANE, 8 * PLANE].map(|n| e.u32(n));
        let plane = e.u32(PLANE);
        let (block, quarter, pack) = (e.div(k, whole), e.div(k, four), e.div(k, eight));
        let (second, lane, rest) = (e.rem(quarter, two), e.rem(pack, plane), e.rem(k, four));
        [(block, whole), (second, half), (lane, four)].into_iter().fold(rest, |at, (n, step)| {
            let more = e.mul(n, step);
            e.add(at, more)
        })
    }
}
