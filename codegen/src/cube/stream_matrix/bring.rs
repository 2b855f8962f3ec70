//! How lines of operands come into shared memory.

use latentc_ir::{AxisId, ValueId};

use super::cube::Cube;
use super::packed;
use crate::cube::emit::{Emit, Pack, Shared, Val};
use crate::cube::expr::Exprs;
use crate::cube::feed::Staged;
use crate::cube::fragment::PACK;
use crate::cube::stream::{At, Span, index};
use crate::few::gcd;

/// Where lines are brought.
#[derive(Clone, Copy)]
pub(super) enum Place<'s> {
    /// From a number of each line on, each so far behind the one before it, in one of several stages.
    Lines { to: Shared, first: u32, pitch: u32, stage: Val },
    /// With their packs turned round, to a stage.
    Turned(&'s Staged, Val),
}

impl Place<'_> {
    /// The memory, and where a pack of a line lies there, which has so many numbers before it.
    fn of(self, e: &mut Emit, lines: u32, (line, across): (Val, Val)) -> (Shared, Val) {
        match self {
            Place::Lines { to, first, pitch, stage } => {
                let pack = e.u32(PACK);
                let pitch = e.u32(pitch / PACK);
                let line = e.mul(line, pitch);
                let (place, across) = (e.u32(first / PACK), e.div(across, pack));
                let at = e.add(line, place);
                let at = e.add(at, across);
                let size = e.u32(lines);
                let before = e.mul(size, pitch);
                let before = e.mul(before, stage);
                let at = e.add(at, before);
                (to, e.mul(at, pack))
            }
            Place::Turned(staged, stage) => {
                let at = staged.layout.place(e, line, across);
                let first = staged.first(e, stage);
                (staged.pieces[0], e.add(first, at))
            }
        }
    }
}

impl Cube<'_> {
    /// Brings `width` numbers of each line of a leaf into shared memory, from the first on. What does not exist is 0. Of an expression a
    /// unit makes up to so many packs at once.
    pub(super) fn bring(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        (leaf, axes, total): (ValueId, &[AxisId], u32),
        lines: Span<'_>,
        (first, width, at_once): (Val, u32, u32),
        to: Place<'_>,
    ) {
        let memory = &x.body().ty(leaf).axes;
        let buf = (self.inputs)(leaf).filter(|_| packed(x.body(), leaf, axes, self.plan.dtype));
        let batch: At<'_> = (&self.stream().batch, &self.batch);
        let packs = width / PACK;
        let ((unit, units), ahead) = (self.bringing, buf.is_some() && self.plan.ahead);
        if packs == 0 {
            return;
        }
        // A pack, unless it is on its way to its place already.
        let read = |e: &mut Emit, x: &mut Exprs<'_>, (line, across): (Val, Val)| {
            let (pack, end) = (e.u32(PACK), e.u32(total));
            let across = e.mul(across, pack);
            let column = e.add(first, across);
            if let Some(buf) = buf.filter(|_| ahead && self.whole && width == total) {
                let number = e.add(lines.from, line);
                let (at_line, at) = (x.split(e, number, lines.axes), x.split(e, column, axes));
                let at = index(memory, &[batch, (lines.axes, &at_line[..]), (axes, &at[..])]);
                let at = x.join(e, &at, memory);
                let (to, place) = to.of(e, lines.count, (line, across));
                e.copy_whole_ahead(buf, at, to, place);
                return None;
            }
            let (at_line, exists) = lines.at(e, x, line);
            let wanted = |e: &mut Emit, x: &mut Exprs<'_>, column: Val| {
                let at = x.split(e, column, axes);
                index(memory, &[batch, (lines.axes, &at_line[..]), (axes, &at[..])])
            };
            if let Some(buf) = buf.filter(|_| ahead) {
                let inside = e.lt(column, end);
                let exists = e.and(exists, inside);
                let at = wanted(e, x, column);
                let at = x.join(e, &at, memory);
                let (to, place) = to.of(e, lines.count, (line, across));
                e.copy_ahead(exists, buf, at, to, place);
                return None;
            }
            Some(match buf {
                Some(buf) => {
                    let inside = e.lt(column, end);
                    let exists = e.and(exists, inside);
                    let nothing = e.zero_pack(self.elem, PACK);
                    let vars = e.pack_var(&nothing);
                    e.if_(exists, |e| {
                        let at = wanted(e, x, column);
                        let at = x.join(e, &at, memory);
                        let at = e.div(at, pack);
                        let loaded = e.load_pack(buf, at, PACK, true);
                        e.set_pack(&vars, &loaded);
                    });
                    e.get_pack(&vars, &nothing)
                }
                None => {
                    let zero = e.f32(0.0);
                    let numbers: Vec<_> = (0..PACK)
                        .map(|n| {
                            let n = e.u32(n);
                            let column = e.add(column, n);
                            let inside = e.lt(column, end);
                            let exists = e.and(exists, inside);
                            let number = e.var(zero);
                            e.if_(exists, |e| {
                                let at = wanted(e, x, column);
                                let element = x.scope(|x| x.element(e, leaf, &at));
                                e.set(number, element);
                            });
                            e.get(number)
                        })
                        .collect();
                    e.pack(self.elem, &numbers)
                }
            })
        };
        let keep = |e: &mut Emit, (line, across): (Val, Val), found: &Pack| {
            let pack = e.u32(PACK);
            let across = e.mul(across, pack);
            let (to, place) = to.of(e, lines.count, (line, across));
            let at = e.div(place, pack);
            e.store_pack(to, at, found);
        };
        let one = |e: &mut Emit, x: &mut Exprs<'_>, at: (Val, Val)| {
            if let Some(pack) = read(e, x, at) {
                keep(e, at, &pack);
            }
        };
        if buf.is_some() {
            // A unit has the same packs of each of its lines, so that one place follows from another by a sum.
            let side = gcd(packs.into(), units.into()) as u32;
            let (wide, down, count) = (e.u32(side), units / side, e.u32(lines.count));
            let (line, pack) = (e.div(unit, wide), e.rem(unit, wide));
            for n in 0..lines.count.div_ceil(down) {
                for across in (0..packs).step_by(side as usize) {
                    let (below, right) = (e.u32(n * down), e.u32(across));
                    let at = (e.add(line, below), e.add(pack, right));
                    if (n + 1) * down <= lines.count {
                        x.scope(|x| one(e, x, at));
                    } else {
                        let inside = e.lt(at.0, count);
                        e.if_(inside, |e| x.scope(|x| one(e, x, at)));
                    }
                }
            }
        } else {
            // As many packs are read before one is kept as all units have.
            let all = lines.count * packs;
            let fits = |n: &u32| all.is_multiple_of(units * n);
            let at_once = (1..=at_once).rev().find(fits).unwrap_or(1);
            let (end, step, of_line) = (e.u32(all), e.u32(units * at_once), e.u32(packs));
            e.for_step(unit, end, step, |e, number| {
                x.scope(|x| {
                    let found: Vec<_> = (0..at_once)
                        .filter_map(|n| {
                            let behind = e.u32(n * units);
                            let number = e.add(number, behind);
                            let at = (e.div(number, of_line), e.rem(number, of_line));
                            Some((at, read(e, x, at)?))
                        })
                        .collect();
                    found.iter().for_each(|(at, pack)| keep(e, *at, pack));
                });
            });
        }
    }
}
