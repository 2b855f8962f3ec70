//! Products with many rows on tensor cores: tiles of 128 rows and 128 columns, in f32 sums of bf16 or f16.
//!
//! Operands are parameters, read in accesses of 16 bytes. A cube's 8 planes bring 32 numbers of depth of both operands into shared
//! memory at a time, in rows that are padded so that eight of them meet in no bank; while they multiply, what comes next is on its
//! way into registers, and then goes to the other of two stages. A plane has 64 rows and a quarter of the columns, as tiles of 16
//! by 8 that `mma` adds up in registers, with operands from `ldmatrix`. In the end the sums go through shared memory, 32 rows at a
//! time, and each unit makes elements of the result of them. The axes are those of a [`FewPlan`]; what lies beyond an edge counts
//! as 0 and is not stored.

use latentc_ir::{AxisId, DType, Function, Op, Size, ValueId};

use super::contract::{Offsets, gather_index};
use super::emit::{Array, Buf, Elem, Emit, Pack, Shared, Val};
use super::expr::{Exprs, Fold};
use super::few::place;
use crate::few::FewPlan;

/// Units of a cube.
pub(crate) const UNITS: u32 = 256;
/// Rows of a cube.
pub(crate) const ROWS: u32 = 128;
/// Columns of a cube, of all products together.
const COLUMNS: u32 = 128;
/// Depth that is brought in at a time.
const DEPTH: u32 = 32;
/// Elements of a pack.
const PACK: u32 = 8;
/// From one row of 32 numbers of depth to the next.
const PITCH: u32 = DEPTH + PACK;
/// Packs that a unit brings in, of each operand.
const PACKS: u32 = ROWS * DEPTH / PACK / UNITS;
/// Rows that are finished at a time.
const SLAB: u32 = 32;

/// How many columns of each product a cube has.
pub(crate) fn columns(plan: &FewPlan) -> u32 {
    COLUMNS / plan.products.len() as u32
}

/// From one depth to the next where the wide operand lies across its columns.
fn pitch_across(plan: &FewPlan) -> u32 {
    columns(plan) + PACK
}

/// Elements of a stage of one product's wide operand.
fn wide_stage(plan: &FewPlan) -> u32 {
    if plan.along { columns(plan) * PITCH } else { DEPTH * pitch_across(plan) }
}

/// Bytes of shared memory.
pub(crate) fn shared_bytes(plan: &FewPlan) -> usize {
    let products = plan.products.len() as u32;
    let stages = 2 * 2 * (ROWS * PITCH + products * wide_stage(plan));
    (stages + 4 * products * SLAB * (columns(plan) + 4)) as usize
}

/// The plan of a body that can be computed so, with the operands of one side as the wide ones.
pub(crate) fn plan(body: &Function, wide: usize) -> Option<FewPlan> {
    let plan = FewPlan::of(body, wide)?;
    let narrow = *plan.narrows().first()?;
    let dtype = body.ty(narrow).dtype;
    let multiplies = plan.narrows().len() == 1
        && plan.products.len() <= 2
        && matches!(dtype, DType::Bf16 | DType::F16)
        && plan.products.iter().all(|p| p.index.is_none() && body.ty(p.table).dtype == dtype);
    // What an epilogue folds would be folded for each element.
    let folds = body.body.iter().any(|i| i.op != Op::Contract && Fold::of(body, i).is_some());
    let tables = plan.factor(body).is_multiple_of(PACK.into());
    (multiplies && !folds && tables && body.params.contains(&narrow) && packed(body, &plan, narrow))
        .then_some(plan)
}

/// Whether numbers of depth that lie in one pack of 8 lie in one of the narrow operand, too.
fn packed(body: &Function, plan: &FewPlan, narrow: ValueId) -> bool {
    let wide = |a: &&AxisId| body.axis(**a).size != Size::Fixed(1);
    let (own, deep) = (body.ty(narrow).axes.iter().rev(), plan.inner.iter().rev());
    let same = own.filter(wide).zip(deep.filter(wide)).take_while(|(a, b)| a == b);
    let length = same.map(|(a, _)| body.axis(*a).size.fixed().unwrap_or(1)).fold(1, u64::saturating_mul);
    length.is_multiple_of(PACK.into())
}

/// A pack that this unit brings in: where it lies in memory but for the depth, whether its row exists, its depth in the stage, and
/// its place there.
struct Load {
    buf: Buf,
    start: Val,
    exists: Val,
    depth: Val,
    /// Where a depth lies in the operand.
    steps: usize,
    to: Shared,
    place: Val,
    stage: u32,
}

/// The kernel's instructions, over the buffers of the parameters and the output.
pub(crate) fn emit(
    e: &mut Emit,
    mut x: Exprs<'_>,
    plan: &FewPlan,
    buffer: impl Fn(ValueId) -> Option<Buf>,
    output: Buf,
    elem: Elem,
) {
    let x = &mut x;
    let body = x.body();
    let buffer = |v: ValueId| buffer(v).expect("operands are parameters, by the plan");
    let [rows, columns_all, repeats] = [&plan.rows, &plan.columns, &plan.batch].map(|axes| x.total(e, axes));
    let width = columns(plan);
    // Cubes are numbered along the rows, then the columns, then the batch.
    let cube = e.cube();
    let [row_tiles, column_tiles] = [(rows, ROWS), (columns_all, width)].map(|(total, tile)| {
        let (rounding, tile) = (e.u32(tile - 1), e.u32(tile));
        let up = e.add(total, rounding);
        e.div(up, tile)
    });
    let (tile, across) = (e.rem(cube, row_tiles), e.div(cube, row_tiles));
    let (block, batch) = (e.rem(across, column_tiles), e.div(across, column_tiles));
    let (of_rows, of_columns) = (e.u32(ROWS), e.u32(width));
    let (row0, column0) = (e.mul(tile, of_rows), e.mul(block, of_columns));
    // All units of a cube agree.
    let inside = e.lt(batch, repeats);
    e.if_(inside, |e| {
        let batch_index = x.split(e, batch, &plan.batch);
        let repeat = (&plan.batch[..], &batch_index[..]);
        let narrow = plan.products[0].narrow;
        let left = e.shared(elem, (2 * ROWS * PITCH) as usize);
        let right: Vec<_> =
            plan.products.iter().map(|_| e.shared(elem, (2 * wide_stage(plan)) as usize)).collect();
        let slab = e.shared(Elem::F32, plan.products.len() * (SLAB * (width + 4)) as usize);
        let tiles = Tiles::new(e, plan, elem, left, &right);
        // Where a depth lies, for the narrow operand and then for each wide one.
        let mut steps = vec![Offsets::of(e, x, &plan.inner, &body.ty(narrow).axes)];
        let mut loads = Vec::new();
        let starts = Offsets::of(e, x, &plan.rows, &body.ty(narrow).axes);
        let unit = e.unit();
        for n in 0..PACKS {
            let (first, packs, pack, pitch) =
                (e.u32(n * UNITS), e.u32(DEPTH / PACK), e.u32(PACK), e.u32(PITCH));
            let number = e.add(unit, first);
            let (row, k) = (e.div(number, packs), e.rem(number, packs));
            let depth = e.mul(k, pack);
            let at = e.add(row0, row);
            let exists = e.lt(at, rows);
            let start = starts.at(e, at);
            let place = e.mul(row, pitch);
            let place = e.add(place, depth);
            let (buf, stage) = (buffer(narrow), ROWS * PITCH);
            loads.push(Load { buf, start, exists, depth, steps: 0, to: left, place, stage });
        }
        for (p, product) in plan.products.iter().enumerate() {
            let memory = &body.ty(product.table).axes;
            steps.push(Offsets::of(e, x, &plan.inner, memory));
            let starts = Offsets::of(e, x, &plan.columns, memory);
            for n in 0..width * DEPTH / PACK / UNITS {
                let (first, pack) = (e.u32(n * UNITS), e.u32(PACK));
                let number = e.add(unit, first);
                let (column, depth, place) = if plan.along {
                    let (packs, pitch) = (e.u32(DEPTH / PACK), e.u32(PITCH));
                    let (column, k) = (e.div(number, packs), e.rem(number, packs));
                    let depth = e.mul(k, pack);
                    let place = e.mul(column, pitch);
                    (column, depth, e.add(place, depth))
                } else {
                    let (packs, pitch) = (e.u32(width / PACK), e.u32(pitch_across(plan)));
                    let (depth, c) = (e.div(number, packs), e.rem(number, packs));
                    let column = e.mul(c, pack);
                    let place = e.mul(depth, pitch);
                    (column, depth, e.add(place, column))
                };
                let at = e.add(column0, column);
                let exists = e.lt(at, columns_all);
                let start = starts.at(e, at);
                let (buf, stage) = (buffer(product.table), wide_stage(plan));
                loads.push(Load { buf, start, exists, depth, steps: p + 1, to: right[p], place, stage });
            }
        }

        let (zero, one, outer) = (e.u32(0), e.u32(1), x.total(e, &plan.outer));
        let depth = x.total(e, &plan.inner);
        let all = plan.products.iter().map(|p| p.table);
        let operands: Vec<ValueId> = [narrow].into_iter().chain(all).collect();
        e.for_step(zero, outer, one, |e, o| {
            let outer_index = x.split(e, o, &plan.outer);
            let known = [repeat, (&plan.outer[..], &outer_index[..])];
            let bases: Vec<_> = operands.iter().map(|&v| place(e, x, &body.ty(v).axes, &known)).collect();
            let read = |e: &mut Emit, k0: Val| -> Vec<Pack> {
                let packs = loads.iter().map(|load| {
                    let k = e.add(k0, load.depth);
                    let deep = e.lt(k, depth);
                    let inside = e.and(load.exists, deep);
                    let nothing = e.zero_pack(elem, PACK);
                    let vars = e.pack_var(&nothing);
                    e.if_(inside, |e| {
                        let step = steps[load.steps].at(e, k);
                        let at = e.add(bases[load.steps], load.start);
                        let at = e.add(at, step);
                        let pack = e.u32(PACK);
                        let at = e.div(at, pack);
                        let loaded = e.load_pack(load.buf, at, PACK, true);
                        e.set_pack(&vars, &loaded);
                    });
                    e.get_pack(&vars, &nothing)
                });
                packs.collect()
            };
            let keep = |e: &mut Emit, stage: Val, packs: &[Pack]| {
                for (load, pack) in loads.iter().zip(packs) {
                    let size = e.u32(load.stage);
                    let first = e.mul(stage, size);
                    let at = e.add(first, load.place);
                    let width = e.u32(PACK);
                    let at = e.div(at, width);
                    e.store_pack(load.to, at, pack);
                }
            };
            let first = read(e, zero);
            // What the other stage held for the index before has been used.
            e.sync();
            keep(e, zero, &first);
            e.sync();
            let step = e.u32(DEPTH);
            e.for_step(zero, depth, step, |e, k0| {
                let next = e.add(k0, step);
                let ahead = read(e, next);
                let number = e.div(k0, step);
                let two = e.u32(2);
                let stage = e.rem(number, two);
                tiles.multiply(e, stage);
                let other = e.sub(one, stage);
                keep(e, other, &ahead);
                e.sync();
            });
        });
        tiles.finish(e, x, repeat, (row0, column0), (rows, columns_all), (slab, output));
    });
}

/// A plane's tiles.
struct Tiles<'p> {
    plan: &'p FewPlan,
    elem: Elem,
    left: Shared,
    right: &'p [Shared],
    /// Sums by product, 16 rows and 8 columns.
    sums: Vec<Vec<Vec<Array>>>,
    /// Operands of the tiles at hand.
    a: Vec<Array>,
    b: Vec<Vec<Array>>,
    /// The unit's number in its plane; the plane's row and column in the cube.
    lane: Val,
    row: Val,
    column: Val,
}

/// Tiles of 16 rows that a plane has.
const HIGH: u32 = 4;

impl<'p> Tiles<'p> {
    fn new(e: &mut Emit, plan: &'p FewPlan, elem: Elem, left: Shared, right: &'p [Shared]) -> Tiles<'p> {
        let wide = columns(plan) / 4 / 8;
        let zero = e.f32(0.0);
        let sum = |e: &mut Emit| {
            let sum = e.array(Elem::F32, 1, 4);
            for n in 0..4 {
                let n = e.u32(n);
                e.store(sum, n, zero);
            }
            sum
        };
        let row = |e: &mut Emit| (0..wide).map(|_| sum(e)).collect::<Vec<_>>();
        let sums = plan.products.iter().map(|_| (0..HIGH).map(|_| row(e)).collect()).collect();
        let a = (0..HIGH).map(|_| e.array(elem, 2, 4)).collect();
        let b = plan.products.iter().map(|_| (0..wide).map(|_| e.array(elem, 2, 2)).collect()).collect();
        let (unit, plane, four) = (e.unit(), e.u32(32), e.u32(4));
        let (number, lane) = (e.div(unit, plane), e.rem(unit, plane));
        let (down, right_of) = (e.div(number, four), e.rem(number, four));
        let (high, width) = (e.u32(16 * HIGH), e.u32(columns(plan) / 4));
        let (row, column) = (e.mul(down, high), e.mul(right_of, width));
        Tiles { plan, elem, left, right, sums, a, b, lane, row, column }
    }

    /// Adds up what a stage holds.
    fn multiply(&self, e: &mut Emit, stage: Val) {
        let (eight, sixteen) = (e.u32(8), e.u32(16));
        let (low, high) = (e.rem(self.lane, sixteen), e.div(self.lane, sixteen));
        for k in (0..DEPTH).step_by(16) {
            // Each unit names a row of 8 numbers: of 16 rows, first those of the first 8 numbers.
            let (size, pitch) = (e.u32(ROWS * PITCH), e.u32(PITCH));
            let first = e.mul(stage, size);
            let row = e.add(self.row, low);
            let row = e.mul(row, pitch);
            let start = e.add(first, row);
            let across = e.mul(high, eight);
            let start = e.add(start, across);
            for (m, a) in self.a.iter().enumerate() {
                let more = e.u32(m as u32 * 16 * PITCH + k);
                let at = e.add(start, more);
                e.load_matrix(*a, self.left, at, 4, false);
            }
            for (p, b) in self.b.iter().enumerate() {
                let size = e.u32(wide_stage(self.plan));
                let first = e.mul(stage, size);
                let start = if self.plan.along {
                    let (row, half) = (e.rem(self.lane, eight), e.div(low, eight));
                    let row = e.add(self.column, row);
                    let row = e.mul(row, pitch);
                    let half = e.mul(half, eight);
                    e.add(row, half)
                } else {
                    let pitch = e.u32(pitch_across(self.plan));
                    let row = e.mul(low, pitch);
                    e.add(row, self.column)
                };
                let start = e.add(first, start);
                for (n, b) in b.iter().enumerate() {
                    let n = n as u32 * 8;
                    let more = if self.plan.along { n * PITCH + k } else { k * pitch_across(self.plan) + n };
                    let more = e.u32(more);
                    let at = e.add(start, more);
                    e.load_matrix(*b, self.right[p], at, 2, !self.plan.along);
                }
            }
            for (sums, b) in self.sums.iter().zip(&self.b) {
                for (row, a) in sums.iter().zip(&self.a) {
                    for (sum, b) in row.iter().zip(b) {
                        e.multiply_matrices(*a, *b, *sum, self.elem);
                    }
                }
            }
        }
    }

    /// Makes the elements of the result.
    fn finish(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        repeat: (&[AxisId], &[Val]),
        (row0, column0): (Val, Val),
        (rows, columns_all): (Val, Val),
        (slab, output): (Shared, Buf),
    ) {
        let (plan, body) = (self.plan, x.body());
        let root = body.results[0];
        let memory = &body.ty(root).axes;
        let base = place(e, x, memory, &[repeat]);
        let (in_rows, in_columns) =
            (Offsets::of(e, x, &plan.rows, memory), Offsets::of(e, x, &plan.columns, memory));
        let plain = plan.products.len() == 1 && plan.products[0].result == root;
        let width = columns(plan);
        let pitch = width + 4;
        let (two, four, sixteen) = (e.u32(2), e.u32(4), e.u32(16));
        let (of_row, of_plane) = (e.u32(pitch), e.u32(16 * HIGH));
        let (down, right) = (e.div(self.lane, four), e.rem(self.lane, four));
        let plane = e.div(self.row, of_plane);
        let plane = e.mul(plane, sixteen);
        let row = e.add(plane, down);
        let row = e.mul(row, of_row);
        let right = e.mul(right, two);
        let start = e.add(row, self.column);
        let start = e.add(start, right);
        for m in 0..HIGH {
            for (p, sums) in self.sums.iter().enumerate() {
                for (n, sum) in sums[m as usize].iter().enumerate() {
                    for i in 0..4 {
                        let more = p as u32 * SLAB * pitch + n as u32 * 8 + i / 2 * 8 * pitch + i % 2;
                        let (more, i) = (e.u32(more), e.u32(i));
                        let (at, value) = (e.add(start, more), e.load(*sum, i));
                        e.store(slab, at, value);
                    }
                }
            }
            e.sync();
            let (unit, units, all) = (e.unit(), e.u32(UNITS), e.u32(SLAB * width));
            e.for_step(unit, all, units, |e, flat| {
                let wide = e.u32(width);
                let (r, c) = (e.div(flat, wide), e.rem(flat, wide));
                let (half, rest) = (e.div(r, sixteen), e.rem(r, sixteen));
                let half = e.mul(half, of_plane);
                let skipped = e.u32(m * 16);
                let (row, column) = (e.add(row0, half), e.add(column0, c));
                let row = e.add(row, skipped);
                let row = e.add(row, rest);
                let (row_exists, column_exists) = (e.lt(row, rows), e.lt(column, columns_all));
                let inside = e.and(row_exists, column_exists);
                e.if_(inside, |e| {
                    let kept = e.mul(r, of_row);
                    let kept = e.add(kept, c);
                    let sum = |e: &mut Emit, p: usize| {
                        let before = e.u32(p as u32 * SLAB * pitch);
                        let at = e.add(before, kept);
                        e.load(slab, at)
                    };
                    let (down, right) = (in_rows.at(e, row), in_columns.at(e, column));
                    let address = e.add(base, down);
                    let address = e.add(address, right);
                    let element = if plain {
                        sum(e, 0)
                    } else {
                        x.scope(|x| {
                            let at = x.split(e, row, &plan.rows);
                            let across = x.split(e, column, &plan.columns);
                            let known = [repeat, (&plan.rows[..], &at[..]), (&plan.columns[..], &across[..])];
                            for (p, product) in plan.products.iter().enumerate() {
                                let element = sum(e, p);
                                x.define(product.result, gather_index(x, product.result, &known), element);
                            }
                            let index = gather_index(x, root, &known);
                            x.element(e, root, &index)
                        })
                    };
                    e.store(output, address, element);
                });
            });
            if m + 1 < HIGH {
                e.sync();
            }
        }
    }
}
