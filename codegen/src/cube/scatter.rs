//! Scatters through CubeCL, without atomics: a cube has some indices of the result and some of its columns, and adds the rows
//! that reach them in order.
//!
//! All units look for these rows, a run of neighbours each, and number them, so that the cube has them as a list in their order.
//! Then a unit adds up its own columns. It has the sums of one index in registers, and goes to memory where the list goes on to
//! another one. An index outside of the axis adds nothing.

use latentc_ir::{AxisId, ValueId};

use super::contract::Offsets;
use super::emit::{Bin, Buf, Cmp, Elem, Emit, Val};
use super::expr::Exprs;
use super::few::place;
use super::matrix;
use super::sort::sums;
use crate::scatter::ScatterPlan;

/// Units of a cube.
pub(crate) const UNITS: u32 = matrix::UNITS;
/// Indices of a cube.
pub(crate) const BLOCK: u32 = 64;
/// Columns of a unit, and of a cube.
const EACH: u32 = 4;
pub(crate) const COLUMNS: u32 = EACH * UNITS;
/// Rows of a unit that are looked at before those of a cube are added.
const RUN: u32 = 4;
/// Rows that a unit reads before it adds them.
const AHEAD: u32 = 4;
/// Rows that a cube looks at before it adds.
const ROWS: u32 = RUN * UNITS;
/// Bytes of shared memory: what counts are added up in, the list, and its length.
pub(crate) const SHARED_BYTES: usize = 4 * (UNITS + 2 * ROWS + 4) as usize;

/// Where the elements of a tensor lie that has no place beyond `base`, by row, and by column for each of the unit's.
struct Reach {
    base: Val,
    rows: Offsets,
    columns: Vec<Val>,
}

/// The kernel's instructions, over the buffers of factors and index, and the output.
pub(crate) fn emit(e: &mut Emit, x: &Exprs<'_>, plan: &ScatterPlan, values: &[Buf], index: Buf, output: Buf) {
    let body = x.body();
    let kept = plan.kept(body);
    let summed: Vec<_> = plan.rows.iter().copied().filter(|a| !kept.contains(a)).collect();
    let [repeats, rows, columns] = [&kept, &summed, &plan.columns].map(|axes| x.total(e, axes));
    let size = x.extent(plan.along);
    // Cubes are numbered along the columns, then the indices, then the rows that stay.
    let (cube, of_block, of_columns) = (e.cube(), e.u32(BLOCK), e.u32(COLUMNS));
    let (blocks, column_blocks) = (e.tiles(size, BLOCK), e.tiles(columns, COLUMNS));
    let (across, rest) = (e.rem(cube, column_blocks), e.div(cube, column_blocks));
    let (block, repeat) = (e.rem(rest, blocks), e.div(rest, blocks));
    let [first, column0] = [(block, of_block), (across, of_columns)].map(|(n, size)| e.mul(n, size));
    // All units of a cube agree.
    let inside = e.lt(repeat, repeats);
    e.if_(inside, |e| {
        let repeat = x.split(e, repeat, &kept);
        let (unit, zero, one) = (e.unit(), e.u32(0), e.u32(1));
        // What a unit does not have, it reads at the first column.
        let own: Vec<_> = (0..EACH)
            .map(|n| {
                let more = e.u32(n * UNITS);
                let column = e.add(column0, more);
                let column = e.add(column, unit);
                let exists = e.lt(column, columns);
                (e.select(exists, column, zero), exists)
            })
            .collect();
        let reach = |e: &mut Emit, axes: &[AxisId]| {
            let base = place(e, x, axes, &[(&kept, &repeat)]);
            let across = Offsets::of(e, x, &plan.columns, axes);
            let columns = own.iter().map(|(column, _)| across.at(e, *column)).collect();
            Reach { base, rows: Offsets::of(e, x, &summed, axes), columns }
        };
        let of = |v: ValueId| -> &[AxisId] { &body.ty(v).axes };
        let factors: Vec<_> = plan.factors.iter().map(|&v| reach(e, of(v))).collect();
        let result = of(body.results[0]);
        let (to, along) = (reach(e, result), Offsets::of(e, x, &[plan.along], result));
        let chosen = reach(e, of(plan.index));
        let places = |e: &mut Emit, at: Val| {
            let row = along.at(e, at);
            let row = e.add(to.base, row);
            to.columns.iter().map(|&column| e.add(row, column)).collect::<Vec<_>>()
        };
        let store = |e: &mut Emit, at: Val, sums: &[Val]| {
            let places = places(e, at);
            for ((place, sum), (_, exists)) in places.into_iter().zip(sums).zip(&own) {
                e.if_(*exists, |e| e.store(output, place, *sum));
            }
        };
        let end = e.add(first, of_block);
        let end = e.binary(Bin::Min, end, size);
        let nothing = e.f32(0.0);
        e.for_step(first, end, one, |e, at| store(e, at, &[nothing; EACH as usize]));
        let scratch = e.shared(Elem::U32, UNITS as usize);
        let [list, goals] = [0, 1].map(|_| e.shared(Elem::U32, ROWS as usize));
        let length = e.shared(Elem::U32, 1);
        let step = e.u32(ROWS);
        e.for_step(zero, rows, step, |e, row0| {
            // The rows of this unit that go to indices of this cube.
            let of_run = e.u32(RUN);
            let start = e.mul(unit, of_run);
            let start = e.add(row0, start);
            let count = e.var(zero);
            let seen: Vec<_> = (0..RUN)
                .map(|n| {
                    let n = e.u32(n);
                    let row = e.add(start, n);
                    let exists = e.lt(row, rows);
                    let at = e.var(size);
                    e.if_(exists, |e| {
                        let place = chosen.rows.at(e, row);
                        let place = e.add(chosen.base, place);
                        // A negative index becomes a large one.
                        let known = e.load(index, place);
                        let known = e.cast(known, Elem::U32);
                        e.set(at, known);
                    });
                    let at = e.get(at);
                    let (before, below) = (e.lt(at, first), e.lt(at, end));
                    let behind = e.not(before);
                    let mine = e.and(behind, below);
                    let (known, more) = (e.get(count), e.cast(mine, Elem::U32));
                    let sum = e.add(known, more);
                    e.set(count, sum);
                    (row, at, mine)
                })
                .collect();
            let count = e.get(count);
            let upto = sums(e, count, scratch);
            let next = e.sub(upto, count);
            let next = e.var(next);
            for (row, at, mine) in seen {
                e.if_(mine, |e| {
                    let place = e.get(next);
                    e.store(list, place, row);
                    e.store(goals, place, at);
                    let behind = e.add(place, one);
                    e.set(next, behind);
                });
            }
            let last = e.u32(UNITS - 1);
            let last = e.cmp(Cmp::Eq, unit, last);
            e.if_(last, |e| e.store(length, zero, upto));
            e.sync();
            let all = e.load(length, zero);
            let sum: Vec<_> = own.iter().map(|_| e.var(nothing)).collect();
            let current = e.var(size);
            let leave = |e: &mut Emit| {
                let at = e.get(current);
                let some = e.lt(at, size);
                e.if_(some, |e| {
                    let sums: Vec<_> = sum.iter().map(|&sum| e.get(sum)).collect();
                    store(e, at, &sums);
                });
            };
            let last = e.sub(all, one);
            let ahead = e.u32(AHEAD);
            e.for_step(zero, all, ahead, |e, n0| {
                // Rows are on their way together; behind the last one it is read again.
                let read: Vec<_> = (0..AHEAD)
                    .map(|n| {
                        let n = e.u32(n);
                        let n = e.add(n0, n);
                        let exists = e.lt(n, all);
                        let n = e.binary(Bin::Min, n, last);
                        let (row, at) = (e.load(list, n), e.load(goals, n));
                        let factors: Vec<Vec<Val>> = factors
                            .iter()
                            .zip(values)
                            .map(|(reach, buffer)| {
                                let row = reach.rows.at(e, row);
                                let start = e.add(reach.base, row);
                                let places = reach.columns.iter().map(|&column| {
                                    let place = e.add(start, column);
                                    e.load(*buffer, place)
                                });
                                places.collect()
                            })
                            .collect();
                        (exists, at, factors)
                    })
                    .collect();
                for (exists, at, factors) in read {
                    e.if_(exists, |e| {
                        let before = e.get(current);
                        let other = e.cmp(Cmp::Ne, before, at);
                        e.if_(other, |e| {
                            leave(e);
                            e.set(current, at);
                            for (sum, place) in sum.iter().zip(places(e, at)) {
                                let known = e.load(output, place);
                                e.set(*sum, known);
                            }
                        });
                        for (c, sum) in sum.iter().enumerate() {
                            let factors: Vec<_> = factors.iter().map(|f| e.cast(f[c], Elem::F32)).collect();
                            let term = factors[1..].iter().fold(factors[0], |product, &x| e.mul(product, x));
                            let known = e.get(*sum);
                            let more = e.add(known, term);
                            e.set(*sum, more);
                        }
                    });
                }
            });
            leave(e);
            // The list is written again.
            e.sync();
        });
    });
}
