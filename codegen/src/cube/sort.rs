//! The rows of a grouped product in the order of their groups.
//!
//! A cube for each group reads all indices. Its units share them out, so that each has a run of neighbours: how many are of the group
//! and how many of an earlier one says where the group begins and where each unit's rows go, and a second walk puts them there. So
//! rows of a group stay in their order, and no cube waits for another. Indices that are none make one group more, behind all others.
//!
//! Indices are read some packs at a time, lest a unit wait for each.
//!
//! What is kept is, in one buffer, where each group begins, the number of rows, and then the rows.

use super::emit::{Bin, Buf, Cmp, Elem, Emit, Shared, Val, Var};
use super::matrix::UNITS;
use super::target::Target;

/// Bytes of shared memory.
pub(crate) const SHARED_BYTES: usize = 4 * UNITS as usize;

/// Indices of a pack, and packs that are read at once.
const PACK: u32 = 4;
const AT_ONCE: u32 = 2;

/// How many numbers are kept of so many rows in so many groups.
pub(crate) fn kept(lines: usize, groups: usize) -> usize {
    groups + 2 + lines
}

/// The instructions of the kernel that sorts.
pub(crate) fn emit(e: &mut Emit, (lines, groups): (Val, Val), index: Buf, order: Buf) {
    let (group, unit) = (e.cube(), e.unit());
    let (zero, one, units, rounding) = (e.u32(0), e.u32(1), e.u32(UNITS), e.u32(UNITS - 1));
    let all = e.add(groups, one);
    let inside = e.lt(group, all);
    e.if_(inside, |e| {
        // Whole packs for each unit.
        let run = e.add(lines, rounding);
        let run = e.div(run, units);
        let (packs, of_pack) = (e.tiles(run, PACK), e.u32(PACK));
        let run = e.mul(packs, of_pack);
        let from = e.mul(unit, run);
        let to = e.add(from, run);
        let to = e.binary(Bin::Min, to, lines);
        let (own, earlier) = (e.var(zero), e.var(zero));
        walk(e, index, (from, to), groups, |e, _, of| {
            let (same, less) = (e.cmp(Cmp::Eq, of, group), e.lt(of, group));
            for (count, counts) in [(own, same), (earlier, less)] {
                let (known, more) = (e.get(count), e.cast(counts, Elem::U32));
                let sum = e.add(known, more);
                e.set(count, sum);
            }
        });
        let scratch = e.shared(Elem::U32, UNITS as usize);
        let (own, earlier) = (e.get(own), e.get(earlier));
        let start = e.fold_cube(Bin::Add, earlier, scratch, (UNITS, Target::Cuda));
        let upto = sums(e, own, scratch);
        let before = e.sub(upto, own);
        let behind = e.u32(2);
        let head = e.add(groups, behind);
        let first = e.add(head, start);
        let first = e.add(first, before);
        let next = e.var(first);
        walk(e, index, (from, to), groups, |e, line, of| {
            let same = e.cmp(Cmp::Eq, of, group);
            e.if_(same, |e| {
                let place = e.get(next);
                e.store(order, place, line);
                let behind = e.add(place, one);
                e.set(next, behind);
            });
        });
        let writes = e.cmp(Cmp::Eq, unit, zero);
        e.if_(writes, |e| {
            e.store(order, group, start);
            let last = e.cmp(Cmp::Eq, group, groups);
            e.if_(last, |e| e.store(order, all, lines));
        });
    });
}

/// Does something for each row from one on to another, given the group that its index is of: that of indices that are none, or the
/// one behind it for rows that belong to another unit.
fn walk(
    e: &mut Emit,
    index: Buf,
    (from, to): (Val, Val),
    groups: Val,
    mut each: impl FnMut(&mut Emit, Val, Val),
) {
    let (one, step) = (e.u32(1), e.u32(PACK * AT_ONCE));
    let nobody = e.add(groups, one);
    e.for_step(from, to, step, |e, first| {
        let mut read = Vec::new();
        for pack in 0..AT_ONCE {
            let of: Vec<_> = (0..PACK).map(|_| e.var(nobody)).collect();
            let set = |e: &mut Emit, of: Var, index: Val| {
                // A negative index becomes a large one.
                let index = e.cast(index, Elem::U32);
                let group = e.binary(Bin::Min, index, groups);
                e.set(of, group);
            };
            let (before, all) = (e.u32(pack * PACK), e.u32(PACK));
            let line = e.add(first, before);
            let end = e.add(line, all);
            let whole = e.cmp(Cmp::Le, end, to);
            e.if_(whole, |e| {
                let numbers = e.load_beside(index, line, PACK);
                of.iter().zip(numbers).for_each(|(&of, index)| set(e, of, index));
            });
            let part = e.not(whole);
            e.if_(part, |e| {
                for (n, &of) in (0..).zip(&of) {
                    let n = e.u32(n);
                    let line = e.add(line, n);
                    let inside = e.lt(line, to);
                    e.if_(inside, |e| {
                        let index = e.load(index, line);
                        set(e, of, index);
                    });
                }
            });
            read.push((line, of));
        }
        for (line, of) in read {
            for (n, of) in (0..).zip(of) {
                let n = e.u32(n);
                let (line, of) = (e.add(line, n), e.get(of));
                each(e, line, of);
            }
        }
    });
}

/// For each unit of so many as [`UNITS`], the sum of what it and those before it bring. All units of the cube must come here.
pub(super) fn sums(e: &mut Emit, value: Val, scratch: Shared) -> Val {
    let (unit, zero) = (e.unit(), e.u32(0));
    let sum = e.var(value);
    let mut apart = 1;
    while apart < UNITS {
        let known = e.get(sum);
        e.store(scratch, unit, known);
        e.sync();
        let apart_ = e.u32(apart);
        let first = e.lt(unit, apart_);
        let other = e.sub(unit, apart_);
        let other = e.select(first, zero, other);
        let more = e.load(scratch, other);
        let more = e.select(first, zero, more);
        let known = e.add(known, more);
        e.set(sum, known);
        e.sync();
        apart *= 2;
    }
    e.get(sum)
}

/// The rows of one tile of a group.
pub(super) struct Group {
    /// Which group; the number of groups is that of indices that are none.
    pub(super) number: Val,
    /// The first of the tile's rows in the order, and the end of the group. There are none if the first is not before it.
    pub(super) first: Val,
    pub(super) end: Val,
}

impl Group {
    /// Bytes of shared memory that finding one takes.
    pub(super) const SHARED_BYTES: u32 = 16;

    /// As many tiles as there may be of so many rows. The tiles of a group are numbered from where its first row would be if each
    /// group before it had a tile more than fills: these numbers follow from where groups begin, and none has too few.
    pub(super) fn tiles(e: &mut Emit, lines: Val, groups: Val, rows: u32) -> Val {
        let (rows, one) = (e.u32(rows), e.u32(1));
        let full = e.div(lines, rows);
        let more = e.add(groups, one);
        e.add(full, more)
    }

    /// All rows of a group, as one tile.
    pub(super) fn whole(e: &mut Emit, order: Buf, number: Val) -> Group {
        let one = e.u32(1);
        let next = e.add(number, one);
        let (first, end) = (e.load(order, number), e.load(order, next));
        Group { number, first, end }
    }

    /// The row at a place in the order, by its number among all; 0 behind the group's end.
    pub(super) fn line(&self, e: &mut Emit, order: Buf, groups: Val, at: Val) -> Val {
        let (zero, behind) = (e.u32(0), e.u32(2));
        let line = e.var(zero);
        let exists = e.lt(at, self.end);
        e.if_(exists, |e| {
            let head = e.add(groups, behind);
            let at = e.add(head, at);
            let known = e.load(order, at);
            e.set(line, known);
        });
        e.get(line)
    }

    /// Finds the group of a tile of so many rows, all of so many units of a cube together.
    pub(super) fn find(e: &mut Emit, order: Buf, groups: Val, tile: Val, (rows, units): (u32, u32)) -> Group {
        let found = e.shared(Elem::U32, 3);
        let (zero, one, two, units, of_rows) = (e.u32(0), e.u32(1), e.u32(2), e.u32(units), e.u32(rows));
        let (unit, all) = (e.unit(), e.add(groups, one));
        e.for_step(unit, all, units, |e, group| {
            let next = e.add(group, one);
            let (start, end) = (e.load(order, group), e.load(order, next));
            let [low, high] = [(start, group), (end, next)].map(|(at, before)| {
                let full = e.div(at, of_rows);
                e.add(full, before)
            });
            let (above, below) = (e.cmp(Cmp::Le, low, tile), e.lt(tile, high));
            let own = e.and(above, below);
            e.if_(own, |e| {
                let skipped = e.sub(tile, low);
                let skipped = e.mul(skipped, of_rows);
                let first = e.add(start, skipped);
                for (at, value) in [(zero, group), (one, first), (two, end)] {
                    e.store(found, at, value);
                }
            });
        });
        e.sync();
        let [number, first, end] = [zero, one, two].map(|at| e.load(found, at));
        Group { number, first, end }
    }

    /// The numbers of the tile's rows, in shared memory; 0 where there is none.
    pub(super) fn lines(&self, e: &mut Emit, order: Buf, groups: Val, rows: u32) -> Shared {
        let lines = e.shared(Elem::U32, rows as usize);
        let (unit, zero, of_rows, behind) = (e.unit(), e.u32(0), e.u32(rows), e.u32(2));
        let own = e.lt(unit, of_rows);
        e.if_(own, |e| {
            e.store(lines, unit, zero);
            let at = e.add(self.first, unit);
            let exists = e.lt(at, self.end);
            e.if_(exists, |e| {
                let head = e.add(groups, behind);
                let at = e.add(head, at);
                let line = e.load(order, at);
                e.store(lines, unit, line);
            });
        });
        e.sync();
        lines
    }
}
