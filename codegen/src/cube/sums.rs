//! The sums of a tile, in registers of the planes of a cube, and the elements of the result that come of them.

use latentc_ir::AxisId;

use super::contract::Offsets;
use super::emit::{Array, Buf, Elem, Emit, Shared, Val};
use super::epilogue::Epilogue;
use super::expr::Exprs;
use super::few::place;
use super::fragment::{Plane, clear, in_packs, sums};
use super::matrix::{Rows, Tile};
use crate::few::FewPlan;
use crate::program::By;

/// Columns that a unit finishes together.
const TOGETHER: u32 = 4;

/// A plane's sums.
pub(super) struct Sums<'p> {
    pub(super) plan: &'p FewPlan,
    pub(super) tile: Tile,
    /// By product, 16 rows and 8 columns.
    pub(super) all: Vec<Vec<Vec<Array>>>,
    pub(super) plane: Plane,
    /// How many planes there are above this one, and its first row and column in the cube.
    down: Val,
    pub(super) row: Val,
    pub(super) column: Val,
}

impl<'p> Sums<'p> {
    /// All of them zero.
    pub(super) fn new(e: &mut Emit, (plan, tile): (&'p FewPlan, Tile)) -> Sums<'p> {
        let (high, wide) = (tile.high(), tile.wide(plan));
        let zeros = |e: &mut Emit| {
            let tile = sums(e);
            clear(e, tile);
            tile
        };
        let row = |e: &mut Emit| (0..wide).map(|_| zeros(e)).collect::<Vec<_>>();
        let all = plan.products.iter().map(|_| (0..high).map(|_| row(e)).collect()).collect();
        let plane = Plane::new(e);
        let across = e.u32(tile.across);
        let (down, right_of) = (e.div(plane.number, across), e.rem(plane.number, across));
        let (of_rows, of_columns) = (e.u32(16 * high), e.u32(8 * wide));
        let (row, column) = (e.mul(down, of_rows), e.mul(right_of, of_columns));
        Sums { plan, tile, all, plane, down, row, column }
    }

    /// Makes all of them zero again.
    pub(super) fn clear(&self, e: &mut Emit) {
        self.all.iter().flatten().flatten().for_each(|&tile| clear(e, tile));
    }

    /// Waits for all units that have sums.
    pub(super) fn meet(&self, e: &mut Emit) {
        if self.tile.by == By::Boxes {
            let barrier = e.u32(1);
            e.meet(barrier, self.tile.multipliers());
        } else {
            e.sync();
        }
    }

    /// Makes the elements of the result. They go through shared memory, so that a unit has neighbours of a row.
    pub(super) fn finish(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        repeat: (&[AxisId], &[Val]),
        (part, rows, column0, columns): (Val, &Rows, Val, Val),
        (slab, output): (Shared, Buf),
    ) {
        let (plan, tile, body) = (self.plan, self.tile, x.body());
        let epilogue = Epilogue::of(body);
        let (root, memory) = (body.results[0], &epilogue.memory);
        let mut base = place(e, x, memory, &[repeat]);
        if tile.parts > 1 {
            let of_part = x.total(e, memory);
            let before = e.mul(part, of_part);
            base = e.add(before, base);
        }
        let (in_rows, in_columns) =
            (Offsets::of(e, x, &plan.rows, memory), Offsets::of(e, x, &plan.columns, memory));
        let values: Vec<_> = plan.products.iter().map(|p| p.result).collect();
        // Neighbours are stored at once where they are neighbours in memory, too.
        let packed = body.ty(root).dtype.is_float()
            && in_packs(body, root, &plan.columns)
            && epilogue.keeps_neighbours(body, &plan.columns);
        let (width, height, piece) = (tile.slab_columns(plan), tile.slab(), tile.piece());
        let pitch = tile.slab_pitch(plan);
        let (two, sixteen, of_pack, of_piece) = (e.u32(2), e.u32(16), e.u32(TOGETHER), e.u32(piece));
        let (of_row, of_pieces) = (e.u32(pitch), e.u32(piece * tile.high()));
        let above = e.mul(self.down, sixteen);
        let row = e.add(above, self.plane.row);
        let row = e.mul(row, of_row);
        let start = e.add(row, self.column);
        let start = e.add(start, self.plane.column);
        // A plane has all columns of a slab, or its own of all.
        let own = width.min(8 * tile.wide(plan)) / 8;
        let slabs = tile.wide(plan) / own;
        for (m, slab_number) in (0..tile.high()).flat_map(|m| (0..slabs).map(move |s| (m, s))) {
            for (p, sums) in self.all.iter().enumerate() {
                let sums = sums[m as usize].iter().skip((slab_number * own) as usize).take(own as usize);
                for (n, &sum) in sums.enumerate() {
                    for half in 0..2 {
                        let pair = [0, 1].map(|i| {
                            let i = e.u32(2 * half + i);
                            e.load(sum, i)
                        });
                        let pair = e.pack(Elem::F32, &pair);
                        let more = e.u32((p as u32 * height + 8 * half) * pitch + 8 * n as u32);
                        let at = e.add(start, more);
                        let at = e.div(at, two);
                        e.store_pack(slab, at, &pair);
                    }
                }
            }
            self.meet(e);
            let (unit, units, all) = (e.unit(), e.u32(tile.multipliers()), e.u32(height * width / TOGETHER));
            e.for_step(unit, all, units, |e, number| {
                let packs = e.u32(width / TOGETHER);
                let (r, c) = (e.div(number, packs), e.rem(number, packs));
                let c = e.mul(c, of_pack);
                let (above, rest) = (e.div(r, of_piece), e.rem(r, of_piece));
                let above = e.mul(above, of_pieces);
                let skipped = e.u32(m * piece);
                let row = e.add(above, skipped);
                let row = e.add(row, rest);
                let before = e.u32(slab_number * width);
                let column = e.add(column0, before);
                let column = e.add(column, c);
                let (row_exists, column_exists) = (rows.exists(e, row), e.lt(column, columns));
                let inside = e.and(row_exists, column_exists);
                e.if_(inside, |e| {
                    let row = rows.number(e, row);
                    let kept = e.mul(r, of_row);
                    let kept = e.add(kept, c);
                    let sums: Vec<_> = (0..plan.products.len())
                        .map(|p| {
                            let before = e.u32(p as u32 * height * pitch);
                            let at = e.add(before, kept);
                            let at = e.div(at, of_pack);
                            e.load_pack(slab, at, TOGETHER, true)
                        })
                        .collect();
                    let down = in_rows.at(e, row);
                    let address = e.add(base, down);
                    let at = x.split(e, row, &plan.rows);
                    let across = |e: &mut Emit, x: &mut Exprs<'_>, n: u32| {
                        let n = e.u32(n);
                        let column = e.add(column, n);
                        epilogue.in_order(e, x, &plan.columns, column)
                    };
                    let element = |e: &mut Emit, x: &mut Exprs<'_>, n: u32| {
                        // A partner is the other of two neighbours.
                        let sum = |e: &mut Emit, p: usize, partner: bool| {
                            e.element_of(&sums[p], n ^ u32::from(partner))
                        };
                        if epilogue.plain(&values) {
                            return sum(e, 0, false);
                        }
                        x.scope(|x| {
                            let column = across(e, x, n);
                            let index = x.split(e, column, &plan.columns);
                            let known = [repeat, (&plan.rows[..], &at[..]), (&plan.columns[..], &index[..])];
                            epilogue.element(e, x, &known, &values, &sum)
                        })
                    };
                    // From column `n` on, where there is one.
                    let store = |e: &mut Emit, x: &mut Exprs<'_>, n: u32, count: u32| {
                        let column = across(e, x, n);
                        let right = in_columns.at(e, column);
                        let address = e.add(address, right);
                        let index =
                            if epilogue.appends() { x.split(e, column, &plan.columns) } else { Vec::new() };
                        let known = [repeat, (&plan.rows[..], &at[..]), (&plan.columns[..], &index[..])];
                        epilogue.store(e, x, &known, address, |e, x, address| {
                            let elements: Vec<_> = (n..n + count).map(|n| element(e, x, n)).collect();
                            if count == 1 {
                                return e.store(output, address, elements[0]);
                            }
                            let address = e.div(address, of_pack);
                            e.store_numbers(output, address, &elements);
                        });
                    };
                    if packed {
                        return store(e, x, 0, TOGETHER);
                    }
                    for n in 0..TOGETHER {
                        let more = e.u32(n);
                        let column = e.add(column, more);
                        let exists = e.lt(column, columns);
                        e.if_(exists, |e| store(e, x, n, 1));
                    }
                });
            });
            if (m + 1, slab_number + 1) != (tile.high(), slabs) {
                self.meet(e);
            }
        }
    }
}
