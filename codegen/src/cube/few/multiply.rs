//! What a round reads of the wide operands, multiplied with the narrow ones and added up: by planes along the summed axes, or by units
//! across the columns.

use super::wide::{Read, Wide};
use super::{Few, PLANE, Span};
use crate::cube::contract::Offsets;
use crate::cube::emit::{Bin, Emit, Pack, Shared, Val, Var};

impl Few<'_> {
    /// Where a round's packs of all products and columns lie: for each, its product and how many packs lie before it.
    pub(super) fn packs_along(
        &self,
        e: &mut Emit,
        wides: &[Wide],
        span: &Span,
        round: Val,
    ) -> Vec<(usize, Val)> {
        let t = &self.t;
        let (of_round, pack) = (e.u32(span.stride * t.unroll), e.u32(t.pack));
        let skipped = e.mul(round, of_round);
        let start = e.add(span.first, skipped);
        let (one, mut packs) = (e.u32(1), Vec::new());
        let last = e.sub(span.end, one);
        for u in 0..t.unroll {
            let step = e.u32(u * span.stride);
            let v = e.add(start, step);
            // Beyond the end, the last is read again.
            let v = e.binary(Bin::Min, v, last);
            for (p, (wide, columns)) in wides.iter().zip(&self.columns).enumerate() {
                for &column in columns {
                    let at = e.add(wide.base, column);
                    let at = e.div(at, pack);
                    packs.push((p, e.add(at, v)));
                }
            }
        }
        packs
    }

    /// Multiplies and adds up what a round has read, a plane along the summed axes.
    pub(super) fn along(
        &self,
        e: &mut Emit,
        exist: &[Option<Val>],
        span: &Span,
        (round, before): (Val, Val),
        packs: &[Pack],
    ) {
        let (t, reads) = (&self.t, self.reads(packs));
        let per_step = t.products * t.each;
        for u in 0..t.unroll {
            // The pack's number in the chunk; its last part is the place in the plane.
            let (of_round, step) = (e.u32(span.stride * t.unroll), e.u32(u * span.stride));
            let skipped = e.mul(round, of_round);
            let skipped = e.add(skipped, step);
            let v = e.add(span.first, skipped);
            let packs = &reads[(u * per_step) as usize..((u + 1) * per_step) as usize];
            let local = self.local(e, skipped);
            for (p, &exists) in exist.iter().enumerate() {
                let of = &packs[p * t.each as usize..(p + 1) * t.each as usize];
                guarded(e, exists, (!span.exact).then_some((v, span.end)), |e| {
                    self.multiply_along(e, p, (local, before), of);
                });
            }
        }
    }

    /// The number in the chunk of the pack that lies so many behind this unit's first.
    fn local(&self, e: &mut Emit, skipped: Val) -> Val {
        let (plane, splits, unit) = (e.u32(PLANE), e.u32(self.t.splits), e.unit());
        let (number, lane) = (e.div(unit, plane), e.rem(unit, plane));
        let split = e.rem(number, splits);
        let before = e.mul(split, plane);
        let before = e.add(before, lane);
        e.add(before, skipped)
    }

    fn staged_of(&self, product: usize) -> Shared {
        let narrow = self.plan.products[product].narrow;
        self.staged.iter().find(|s| s.value == narrow).expect("every narrow operand is staged").memory
    }

    fn multiply_along(&self, e: &mut Emit, p: usize, (local, before): (Val, Val), reads: &[Read<'_>]) {
        let t = &self.t;
        let memory = self.staged_of(p);
        let width = t.pack.min(4);
        let of_width = e.u32(width);
        let before = e.div(before, of_width);
        // What is multiplied by a scale is added up by itself first.
        let zero = e.f32(0.0);
        let scales: Vec<_> = reads.iter().map(|read| read.scale(e)).collect();
        let sums: Vec<Vec<Var>> = scales
            .iter()
            .zip(&self.sums[p])
            .map(|(scale, sums)| match scale {
                None => sums.clone(),
                Some(_) => sums.iter().map(|_| e.var(zero)).collect(),
            })
            .collect();
        for part in 0..t.pack / width {
            // In units of `width` elements.
            let at = if t.pack < 8 {
                local
            } else {
                let (plane, whole) = (e.u32(PLANE), e.u32(t.pack / width * PLANE));
                let (block, lane) = (e.div(local, plane), e.rem(local, plane));
                let block = e.mul(block, whole);
                let at = e.add(block, lane);
                let part = e.u32(part * PLANE);
                e.add(at, part)
            };
            let at = e.add(at, before);
            let narrow: Vec<_> = (0..t.rows)
                .map(|r| {
                    let row = e.u32(r * t.chunk / width);
                    let at = e.add(at, row);
                    e.load_pack(memory, at, width, self.vectors())
                })
                .collect();
            for n in 0..width {
                let row: Vec<_> = narrow.iter().map(|pack| e.element_of(pack, n)).collect();
                for (read, sums) in reads.iter().zip(&sums) {
                    let w = read.number(e, part * width + n);
                    for (&x, &sum) in row.iter().zip(sums) {
                        add_product(e, sum, w, x);
                    }
                }
            }
        }
        for ((scale, parts), sums) in scales.into_iter().zip(&sums).zip(&self.sums[p]) {
            let Some(scale) = scale else { continue };
            for (&part, &sum) in parts.iter().zip(sums) {
                let part = e.get(part);
                add_product(e, sum, scale, part);
            }
        }
    }

    /// The index of the inner axes that this unit has in a step of a round.
    fn index_across(&self, e: &mut Emit, span: &Span, round: Val, u: u32) -> Val {
        let (of_round, step) = (e.u32(span.stride * self.t.unroll), e.u32(u * span.stride));
        let skipped = e.mul(round, of_round);
        let skipped = e.add(skipped, step);
        e.add(span.first, skipped)
    }

    /// Where a round's packs of all products lie, as [`packs_along`](Few::packs_along) has it.
    pub(super) fn packs_across(
        &self,
        e: &mut Emit,
        (wides, deep): (&[Wide], &[Offsets]),
        span: &Span,
        round: Val,
    ) -> Vec<(usize, Val)> {
        let (one, pack, mut packs) = (e.u32(1), e.u32(self.t.pack), Vec::new());
        let last = e.sub(span.end, one);
        for u in 0..self.t.unroll {
            let k = self.index_across(e, span, round, u);
            let k = e.binary(Bin::Min, k, last);
            for (p, ((wide, deep), columns)) in wides.iter().zip(deep).zip(&self.columns).enumerate() {
                let step = deep.at(e, k);
                let at = e.add(wide.base, columns[0]);
                let at = e.add(at, step);
                packs.push((p, e.div(at, pack)));
            }
        }
        packs
    }

    /// Multiplies and adds up what a round has read, a unit's columns across the summed axes.
    pub(super) fn across(
        &self,
        e: &mut Emit,
        exist: &[Option<Val>],
        span: &Span,
        (round, k0, before): (Val, Val, Val),
        packs: &[Pack],
    ) {
        let (t, reads) = (&self.t, self.reads(packs));
        for u in 0..t.unroll {
            let k = self.index_across(e, span, round, u);
            let local = e.sub(k, k0);
            let local = e.add(local, before);
            for (p, &exists) in exist.iter().enumerate() {
                let read = &reads[(u * t.products) as usize + p];
                let memory = self.staged_of(p);
                guarded(e, exists, (!span.exact).then_some((k, span.end)), |e| {
                    let scale = read.scale(e);
                    let w: Vec<_> = (0..t.pack).map(|n| read.number(e, n)).collect();
                    for r in 0..t.rows {
                        let row = e.u32(r * t.chunk);
                        let at = e.add(row, local);
                        let x = e.load(memory, at);
                        let x = scale.map_or(x, |scale| e.mul(scale, x));
                        for (&w, sums) in w.iter().zip(&self.sums[p]) {
                            add_product(e, sums[r as usize], w, x);
                        }
                    }
                });
            }
        }
    }
}

fn add_product(e: &mut Emit, sum: Var, a: Val, b: Val) {
    let old = e.get(sum);
    let new = e.fma(a, b, old);
    e.set(sum, new);
}

/// Runs `body` where there is a matrix and the first number is below the second.
fn guarded(e: &mut Emit, exists: Option<Val>, inside: Option<(Val, Val)>, body: impl FnOnce(&mut Emit)) {
    let inside = inside.map(|(n, end)| e.lt(n, end));
    let both = match (exists, inside) {
        (Some(a), Some(b)) => Some(e.and(a, b)),
        (a, b) => a.or(b),
    };
    match both {
        Some(c) => e.if_(c, body),
        None => body(e),
    }
}
