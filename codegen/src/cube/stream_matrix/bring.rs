//! How lines of operands come into shared memory.

use latentc_ir::{AxisId, DType, ValueId};
use latentc_passes::page::Slots;

use super::cube::Cube;
use super::{in_pages, packed};
use crate::cube::emit::{Bin, Elem, Emit, Pack, Shared, Val};
use crate::cube::expr::Exprs;
use crate::cube::feed::Staged;
use crate::cube::fragment::{PACK, in_packs};
use crate::cube::stream::{At, Span, index};
use crate::few::gcd;
use crate::stream::{Read, cone};

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

/// A line of an operand: its place along axes of the memory, and whether there is such a line.
struct Line {
    axes: Vec<AxisId>,
    at: Vec<Val>,
    exists: Val,
}

/// Where a position lies in a pool. The last slot stands for what the table says that is beyond.
fn slot(e: &mut Emit, x: &mut Exprs<'_>, read: &Read, known: &[At<'_>]) -> Val {
    let page = e.u32(read.slots.page as u32);
    let position = index(&[read.along], known)[0];
    let (number, within) = (e.div(position, page), e.rem(position, page));
    let (pages, number) = ([read.slots.pages], [number]);
    let known: Vec<At<'_>> = known.iter().copied().chain([(&pages[..], &number[..])]).collect();
    let table = read.slots.table;
    let place = x.element(e, table, &index(&x.body().ty(table).axes, &known));
    let place = e.cast(place, Elem::U32);
    let first = e.mul(place, page);
    let slot = e.add(first, within);
    let one = e.u32(1);
    let last = e.sub(x.extent(read.slot), one);
    e.binary(Bin::Min, slot, last)
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
        let packed = packed(x.body(), leaf, axes, self.plan.dtype);
        // What lies in no packs is read one by one, as any expression.
        let paged = in_pages(x.body(), leaf).filter(|_| packed);
        let source = paged.map_or(leaf, |read| read.pool);
        let memory = &x.body().ty(source).axes;
        let buf = (self.inputs)(source).filter(|_| packed);
        let batch: At<'_> = (&self.stream().batch, &self.batch);
        // Of an expression, the places in pools that depend on the line alone.
        let slots: Vec<_> = match buf {
            Some(_) => Vec::new(),
            None => {
                let (body, defs) = (x.body(), x.body().defs());
                let of_line = |a: &AxisId| self.stream().batch.contains(a) || lines.axes.contains(a);
                let places = cone(body, leaf, |_| true).into_iter();
                places
                    .filter(|&v| Slots::of(body, &defs, v).is_some() && body.ty(v).axes.iter().all(of_line))
                    .collect()
            }
        };
        // What lies in packs of floats is rounded on its way.
        let floats = (self.inputs)(leaf).filter(|_| {
            let body = x.body();
            body.params.contains(&leaf) && body.ty(leaf).dtype == DType::F32 && in_packs(body, leaf, axes)
        });
        let at_once = if floats.is_some() { 2 * at_once } else { at_once };
        let packs = width / PACK;
        let ((unit, units), ahead) = (self.bringing, buf.is_some() && self.plan.ahead);
        if packs == 0 {
            return;
        }
        let whole = ahead && self.whole && width == total;
        // Where a line is in memory, and whether there is such a line.
        let find = |e: &mut Emit, x: &mut Exprs<'_>, line: Val| {
            let (at, exists) = if whole {
                let number = e.add(lines.from, line);
                (x.split(e, number, lines.axes), e.bool(true))
            } else {
                lines.at(e, x, line)
            };
            match paged {
                Some(read) => {
                    let slot = slot(e, x, &read, &[batch, (lines.axes, &at[..])]);
                    Line { axes: vec![read.slot], at: vec![slot], exists }
                }
                None => Line { axes: lines.axes.to_vec(), at, exists },
            }
        };
        // A pack, unless it is on its way to its place already. Where its line is may be known.
        let read = |e: &mut Emit, x: &mut Exprs<'_>, (line, across): (Val, Val), known: Option<&Line>| {
            let (pack, end) = (e.u32(PACK), e.u32(total));
            let across = e.mul(across, pack);
            let column = e.add(first, across);
            let found = match known {
                Some(found) => found,
                None => &find(e, x, line),
            };
            let (of_line, exists) = ((&found.axes[..], &found.at[..]), found.exists);
            if let Some(buf) = buf.filter(|_| whole) {
                let at = x.split(e, column, axes);
                let at = index(memory, &[batch, of_line, (axes, &at[..])]);
                let at = x.join(e, &at, memory);
                let (to, place) = to.of(e, lines.count, (line, across));
                e.copy_whole_ahead(buf, at, to, place, PACK);
                return None;
            }
            let wanted = |e: &mut Emit, x: &mut Exprs<'_>, column: Val| {
                let at = x.split(e, column, axes);
                index(memory, &[batch, of_line, (axes, &at[..])])
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
            Some(match (buf, floats) {
                (Some(buf), _) => {
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
                (None, Some(buf)) => {
                    let inside = e.lt(column, end);
                    let exists = e.and(exists, inside);
                    let nothing = e.zero_pack(Elem::F32, PACK / 2);
                    let halves = [(); 2].map(|()| e.pack_var(&nothing));
                    e.if_(exists, |e| {
                        let at = wanted(e, x, column);
                        let at = x.join(e, &at, memory);
                        let width = e.u32(PACK / 2);
                        let at = e.div(at, width);
                        for (n, vars) in (0..).zip(&halves) {
                            let n = e.u32(n);
                            let at = e.add(at, n);
                            let loaded = e.load_pack(buf, at, PACK / 2, true);
                            e.set_pack(vars, &loaded);
                        }
                    });
                    let halves = halves.map(|vars| e.get_pack(&vars, &nothing));
                    let numbers: Vec<_> = halves
                        .iter()
                        .flat_map(|half| (0..PACK / 2).map(|n| e.element_of(half, n)).collect::<Vec<_>>())
                        .collect();
                    e.pack(self.elem, &numbers)
                }
                (None, None) => {
                    // Where the line is in a pool is asked once for all of the pack: there is such a line, in place of one that is not.
                    for &slots in &slots {
                        let at = index(&x.body().ty(slots).axes, &[batch, of_line]);
                        x.element(e, slots, &at);
                    }
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
        let one = |e: &mut Emit, x: &mut Exprs<'_>, at: (Val, Val), known: Option<&Line>| {
            if let Some(pack) = read(e, x, at, known) {
                keep(e, at, &pack);
            }
        };
        if buf.is_some() {
            // A unit has the same packs of each of its lines, so that one place follows from another by a sum.
            let side = gcd(packs.into(), units.into()) as u32;
            let (wide, down, count) = (e.u32(side), units / side, e.u32(lines.count));
            let (line, pack) = (e.div(unit, wide), e.rem(unit, wide));
            for n in 0..lines.count.div_ceil(down) {
                let all = (n + 1) * down <= lines.count;
                if paged.is_some() {
                    // The table is asked once for all packs of a line.
                    let below = e.u32(n * down);
                    let number = e.add(line, below);
                    let packs = |e: &mut Emit, x: &mut Exprs<'_>| {
                        let known = find(e, x, number);
                        for across in (0..packs).step_by(side as usize) {
                            let right = e.u32(across);
                            let at = (number, e.add(pack, right));
                            x.scope(|x| one(e, x, at, Some(&known)));
                        }
                    };
                    if all {
                        x.scope(|x| packs(e, x));
                    } else {
                        let inside = e.lt(number, count);
                        e.if_(inside, |e| x.scope(|x| packs(e, x)));
                    }
                    continue;
                }
                for across in (0..packs).step_by(side as usize) {
                    let (below, right) = (e.u32(n * down), e.u32(across));
                    let at = (e.add(line, below), e.add(pack, right));
                    if all {
                        x.scope(|x| one(e, x, at, None));
                    } else {
                        let inside = e.lt(at.0, count);
                        e.if_(inside, |e| x.scope(|x| one(e, x, at, None)));
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
                            Some((at, read(e, x, at, None)?))
                        })
                        .collect();
                    found.iter().for_each(|(at, pack)| keep(e, *at, pack));
                });
            });
        }
    }
}
