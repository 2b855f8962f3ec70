//! What the planes of a cube make of a tile that lies in shared memory: sums in registers, and elements of the result.

use latentc_ir::AxisId;

use super::contract::{Offsets, gather_index};
use super::emit::{Array, Buf, Elem, Emit, Shared, Val};
use super::expr::Exprs;
use super::feed::{Layout, Staged};
use super::few::place;
use super::fragment::{Plane, clear, in_packs, left, sums};
use super::matrix::{Rows, Tile};
use crate::few::FewPlan;

/// Columns that a unit finishes together.
const TOGETHER: u32 = 4;

/// A plane's tiles.
pub(super) struct Tiles<'p> {
    plan: &'p FewPlan,
    tile: Tile,
    elem: Elem,
    left: &'p Staged,
    right: &'p [Staged],
    /// Sums by product, 16 rows and 8 columns.
    sums: Vec<Vec<Vec<Array>>>,
    /// Operands of the tiles at hand and of those that come next: 16 rows, and for each product 16 columns.
    a: [Vec<Array>; 2],
    b: [Vec<Vec<Array>>; 2],
    plane: Plane,
    /// The plane's row and column in the cube.
    row: Val,
    column: Val,
    /// What the unit names to `ldmatrix` of the first rows and columns.
    rows: Named,
    columns: Named,
}

/// The run of numbers of a tile that a unit names to `ldmatrix`, and the place there, for four matrices of 8 by 8.
#[derive(Clone, Copy)]
struct Named {
    run: Val,
    at: Val,
}

impl Named {
    /// For lines of a tile from one on. The bits 3 and 4 of a unit's number choose among the matrices: of rows, the first goes to other rows
    /// and the second to another depth, of columns the other way round.
    fn new(e: &mut Emit, lane: Val, layout: Layout, line: Val, rows: bool) -> Named {
        let [eight, sixteen] = [8, 16].map(|n| e.u32(n));
        let (low, high) = (e.rem(lane, eight), e.div(lane, sixteen));
        let middle = e.rem(lane, sixteen);
        let middle = e.div(middle, eight);
        let (to_lines, to_depth) = if rows { (middle, high) } else { (high, middle) };
        let [to_lines, to_depth] = [to_lines, to_depth].map(|bit| e.mul(bit, eight));
        let (run, at) = if layout.along {
            let run = e.add(to_lines, low);
            (e.add(line, run), to_depth)
        } else {
            (e.add(to_depth, low), e.add(line, to_lines))
        };
        Named { run, at }
    }

    /// Where that lies in a stage that begins somewhere, for so many lines and so much depth behind the first ones; both are numbers of times
    /// 8, so that the run is turned as the named one is.
    fn place(self, e: &mut Emit, layout: Layout, first: Val, (lines, depth): (u32, u32)) -> Val {
        let (runs, more) = if layout.along { (lines, depth) } else { (depth, lines) };
        let (pitch, more, runs) = (e.u32(layout.pitch()), e.u32(more), e.u32(runs * layout.pitch()));
        let start = e.mul(self.run, pitch);
        let start = e.add(first, start);
        let at = e.add(self.at, more);
        let at = layout.turn(e, self.run, at);
        let at = e.add(start, at);
        e.add(at, runs)
    }
}

/// What is multiplied at a time: 16 numbers of depth of one piece of each operand, and which registers they are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    k: u32,
    pieces: [usize; 2],
    sets: [usize; 2],
}

/// All that is multiplied in a stage. Pieces of both operands are multiplied where their product is not lost beside the others: those
/// that are small come first.
fn steps(depth: u32, pieces: [usize; 2]) -> Vec<Step> {
    let most = pieces.into_iter().max().unwrap_or(1);
    let mut all: Vec<Step> = Vec::new();
    for k in (0..depth).step_by(16) {
        for left in 0..pieces[0] {
            for right in (0..pieces[1]).rev().filter(|right| left + right < most) {
                let now = [left, right];
                let sets = match all.last() {
                    None => [0, 0],
                    Some(before) => [0, 1].map(|side| {
                        let same = before.k == k && before.pieces[side] == now[side];
                        if same { before.sets[side] } else { 1 - before.sets[side] }
                    }),
                };
                all.push(Step { k, pieces: now, sets });
            }
        }
    }
    all
}

impl<'p> Tiles<'p> {
    pub(super) fn new(
        e: &mut Emit,
        (plan, tile): (&'p FewPlan, Tile),
        elem: Elem,
        left_operand: &'p Staged,
        right: &'p [Staged],
    ) -> Tiles<'p> {
        let (high, wide) = (tile.high(), tile.wide(plan));
        let zeros = |e: &mut Emit| {
            let tile = sums(e);
            clear(e, tile);
            tile
        };
        let row = |e: &mut Emit| (0..wide).map(|_| zeros(e)).collect::<Vec<_>>();
        let sums = plan.products.iter().map(|_| (0..high).map(|_| row(e)).collect()).collect();
        let a = [0, 1].map(|_| (0..high).map(|_| left(e, elem)).collect());
        let b = [0, 1].map(|_| {
            let pairs = |e: &mut Emit| (0..wide.div_ceil(2)).map(|_| left(e, elem)).collect();
            plan.products.iter().map(|_| pairs(e)).collect()
        });
        let plane = Plane::new(e);
        let across = e.u32(tile.across);
        let (down, right_of) = (e.div(plane.number, across), e.rem(plane.number, across));
        let (of_rows, of_columns) = (e.u32(16 * high), e.u32(8 * wide));
        let (row, column) = (e.mul(down, of_rows), e.mul(right_of, of_columns));
        let rows = Named::new(e, plane.lane, left_operand.layout, row, true);
        let columns = Named::new(e, plane.lane, right[0].layout, column, false);
        Tiles { plan, tile, elem, left: left_operand, right, sums, a, b, plane, row, column, rows, columns }
    }

    /// How many numbers each operand is made of.
    fn pieces(&self) -> [usize; 2] {
        [self.left.pieces.len(), self.right[0].pieces.len()]
    }

    /// Loads the first operands of a stage.
    pub(super) fn first(&self, e: &mut Emit, stage: Val) {
        let step = steps(self.tile.depth, self.pieces())[0];
        self.load(e, stage, None, step);
    }

    /// Adds up what a stage holds, whose first operands are loaded. `meanwhile` is done in the beginning. `turn` is done when all of the
    /// stage is in registers, and says which one comes next; `refill` when the first operands of that are on their way.
    pub(super) fn multiply<R>(
        &self,
        e: &mut Emit,
        stage: Val,
        meanwhile: impl FnOnce(&mut Emit) -> R,
        turn: impl FnOnce(&mut Emit, R) -> Val,
        refill: impl FnOnce(&mut Emit),
    ) {
        let all = steps(self.tile.depth, self.pieces());
        let (&last, before) = all.split_last().expect("a stage has some depth");
        debug_assert_eq!(last.sets, [1, 1], "what comes next goes to the registers that are not at hand");
        self.load(e, stage, Some(all[0]), all[1]);
        let done = meanwhile(e);
        self.add(e, all[0]);
        for (n, &step) in before.iter().enumerate().skip(1) {
            self.load(e, stage, Some(step), all[n + 1]);
            self.add(e, step);
        }
        let next = turn(e, done);
        self.load(e, next, None, all[0]);
        refill(e);
        self.add(e, last);
    }

    /// Loads what a step has that the one before has not.
    fn load(&self, e: &mut Emit, stage: Val, before: Option<Step>, step: Step) {
        let fresh = |side: usize| before.is_none_or(|b| b.sets[side] != step.sets[side]);
        let load = |e: &mut Emit,
                    staged: &Staged,
                    named: Named,
                    side: usize,
                    (n, to): (usize, Array),
                    rows: bool| {
            let (memory, layout) = (staged.pieces[step.pieces[side]], staged.layout);
            let first = staged.first(e, stage);
            let at = named.place(e, layout, first, (16 * n as u32, step.k));
            // The last of an odd number of columns is alone.
            let alone = !rows && 2 * n as u32 + 1 == self.tile.wide(self.plan);
            e.load_matrix(to, memory, at, if alone { 2 } else { 4 }, !layout.along);
        };
        if fresh(1) {
            for (staged, to) in self.right.iter().zip(&self.b[step.sets[1]]) {
                for to in to.iter().copied().enumerate() {
                    load(e, staged, self.columns, 1, to, false);
                }
            }
        }
        if fresh(0) {
            for to in self.a[step.sets[0]].iter().copied().enumerate() {
                load(e, self.left, self.rows, 0, to, true);
            }
        }
    }

    /// Adds the products of what is loaded.
    fn add(&self, e: &mut Emit, step: Step) {
        for (sums, pairs) in self.sums.iter().zip(&self.b[step.sets[1]]) {
            for (n, &pair) in pairs.iter().enumerate() {
                for half in 0..(self.tile.wide(self.plan) as usize - 2 * n).min(2) {
                    let b = e.array(self.elem, 2, 2);
                    for i in 0..2 {
                        let (from, to) = (e.u32(2 * half as u32 + i), e.u32(i));
                        let register = e.load(pair, from);
                        e.store(b, to, register);
                    }
                    for (row, &a) in sums.iter().zip(&self.a[step.sets[0]]) {
                        e.multiply_matrices(a, b, row[2 * n + half], self.elem);
                    }
                }
            }
        }
    }

    /// Makes the elements of the result. They go through shared memory, so that a unit has neighbours of a row.
    pub(super) fn finish(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        repeat: (&[AxisId], &[Val]),
        (rows, column0, columns): (&Rows, Val, Val),
        (slab, output): (Shared, Buf),
    ) {
        let (plan, tile, body) = (self.plan, self.tile, x.body());
        let root = body.results[0];
        let memory = &body.ty(root).axes;
        let base = place(e, x, memory, &[repeat]);
        let (in_rows, in_columns) =
            (Offsets::of(e, x, &plan.rows, memory), Offsets::of(e, x, &plan.columns, memory));
        let plain = plan.products.len() == 1 && plan.products[0].result == root;
        // Neighbours are stored at once where they are neighbours in memory, too.
        let packed = body.ty(root).dtype.is_float() && in_packs(body, root, &plan.columns);
        let (width, height) = (tile.columns(plan), tile.slab());
        let pitch = tile.slab_pitch(plan);
        let (two, sixteen, of_pack) = (e.u32(2), e.u32(16), e.u32(TOGETHER));
        let (of_row, of_plane) = (e.u32(pitch), e.u32(16 * tile.high()));
        let plane = e.div(self.row, of_plane);
        let plane = e.mul(plane, sixteen);
        let row = e.add(plane, self.plane.row);
        let row = e.mul(row, of_row);
        let start = e.add(row, self.column);
        let start = e.add(start, self.plane.column);
        for m in 0..tile.high() {
            for (p, sums) in self.sums.iter().enumerate() {
                for (n, &sum) in sums[m as usize].iter().enumerate() {
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
            e.sync();
            let (unit, units, all) = (e.unit(), e.u32(tile.units()), e.u32(height * width / TOGETHER));
            e.for_step(unit, all, units, |e, number| {
                let packs = e.u32(width / TOGETHER);
                let (r, c) = (e.div(number, packs), e.rem(number, packs));
                let c = e.mul(c, of_pack);
                let (half, rest) = (e.div(r, sixteen), e.rem(r, sixteen));
                let half = e.mul(half, of_plane);
                let skipped = e.u32(m * 16);
                let row = e.add(half, skipped);
                let row = e.add(row, rest);
                let column = e.add(column0, c);
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
                    let element = |e: &mut Emit, x: &mut Exprs<'_>, n: u32, column: Val| {
                        if plain {
                            return e.element_of(&sums[0], n);
                        }
                        x.scope(|x| {
                            let across = x.split(e, column, &plan.columns);
                            let known = [repeat, (&plan.rows[..], &at[..]), (&plan.columns[..], &across[..])];
                            for (product, sums) in plan.products.iter().zip(&sums) {
                                let sum = e.element_of(sums, n);
                                x.define(product.result, gather_index(x, product.result, &known), sum);
                            }
                            let index = gather_index(x, root, &known);
                            x.element(e, root, &index)
                        })
                    };
                    if packed {
                        let elements: Vec<_> = (0..TOGETHER)
                            .map(|n| {
                                let n_ = e.u32(n);
                                let column = e.add(column, n_);
                                element(e, x, n, column)
                            })
                            .collect();
                        let right = in_columns.at(e, column);
                        let address = e.add(address, right);
                        let address = e.div(address, of_pack);
                        e.store_numbers(output, address, &elements);
                        return;
                    }
                    for n in 0..TOGETHER {
                        let more = e.u32(n);
                        let column = e.add(column, more);
                        let exists = e.lt(column, columns);
                        e.if_(exists, |e| {
                            let made = element(e, x, n, column);
                            let right = in_columns.at(e, column);
                            let address = e.add(address, right);
                            e.store(output, address, made);
                        });
                    }
                });
            });
            if m + 1 < tile.high() {
                e.sync();
            }
        }
    }
}
