//! Sums of outer products by index on tensor cores: for each index a product of two matrices, summed over the rows that have it.
//!
//! The rows are sorted by their index first ([`sort`](super::sort)), so all that has one index is a run of the order. A cube has
//! a tile of the result at one index and walks this run: its 8 planes bring some rows of both factors into shared memory at a
//! time, as packs of neighbouring columns, so a row of a stage is a depth of the product and both operands lie across it
//! (`ldmatrix` turns them). While one stage is multiplied, the other is on its way: factors of 16 bits by asynchronous copies,
//! f32 ones through registers, where they are split into numbers of bf16 that add up to them. What lies beyond an edge, or behind
//! the last row, counts as 0. An index without rows has zeros. Each element is added up by one plane in the order of its rows,
//! without atomics, so two runs agree to the last bit.
//!
//! Two split factors take three products: the lower numbers are not multiplied with each other, which is as much off as a split
//! is.

use latentc_ir::{AxisId, DType, Function, Size, ValueId};

use super::contract::Offsets;
use super::emit::{Array, Buf, Elem, Emit, Pack, Shared, Val};
use super::expr::Exprs;
use super::fragment::{
    Lines, PACK, Plane, clear, in_packs, keep_split, left, load_columns, load_rows_across, read_stored, sums,
};
use super::sort::Group;
use super::target::Target;
use super::tiles;
use crate::scatter::ScatterPlan;

/// Units of a cube.
pub(crate) const UNITS: u32 = super::matrix::UNITS;
/// Rows and columns of a tile.
pub(crate) const SIDES: [u8; 2] = [64, 128];
/// Planes above one another in a tile, and beside one another.
const DOWN: u32 = 2;
const ACROSS: u32 = UNITS / 32 / DOWN;

/// A sum of outer products that tensor cores can add up.
#[derive(Clone, Debug)]
pub(crate) struct OuterPlan {
    pub(crate) scatter: ScatterPlan,
    /// The factor that has the rows of the result's matrices, then that of the columns, which lie behind one another.
    pub(crate) sides: [Side; 2],
    /// What is multiplied.
    dtype: DType,
}

/// A factor.
#[derive(Clone, Debug)]
pub(crate) struct Side {
    factor: ValueId,
    /// Its axes that the result has, in the result's order.
    pub(crate) columns: Vec<AxisId>,
    /// Numbers that stand for one of its elements.
    pieces: u32,
}

impl OuterPlan {
    /// The plan of a body, if factors lie in whole packs, and how many indices there are is known.
    pub(crate) fn of(body: &Function) -> Option<OuterPlan> {
        let scatter = ScatterPlan::of(body)?;
        let [a, b] = scatter.sides(body)?;
        let (dtype, pieces) = scatter.narrow(body);
        let side = |n: usize, columns: Vec<AxisId>| {
            let factor = scatter.factors[n];
            in_packs(body, factor, &columns).then_some(Side { factor, columns, pieces: pieces[n] })
        };
        let [a, b] = [side(0, a)?, side(1, b)?];
        body.axis(scatter.along).size.fixed()?;
        let wide = |c: &&AxisId| body.axis(**c).size != Size::Fixed(1);
        let last = body.ty(body.results[0]).axes.iter().rfind(wide);
        let sides = if last.is_some_and(|c| a.columns.contains(c)) { [b, a] } else { [a, b] };
        Some(OuterPlan { scatter, sides, dtype })
    }

    /// How often what is multiplied is, piece by piece.
    pub(super) fn multiplications(&self) -> usize {
        tiles::multiplications(self.sides.each_ref().map(|side| side.pieces as usize))
    }

    /// Products of tensor cores that a plane takes part in for a stage of tiles of so many columns.
    pub(super) fn products(&self, side: u32) -> u32 {
        let of_depth = self.depth(side) / 16 * self.multiplications() as u32;
        of_depth * (side / DOWN / 16) * (side / ACROSS / 8)
    }

    /// Rows that are brought in at a time for tiles of so many columns.
    pub(super) fn depth(&self, side: u32) -> u32 {
        // What is split passes through registers: a pack of each factor a unit.
        if self.sides.iter().all(|s| s.pieces == 1) { 64 } else { UNITS * PACK / side }
    }

    /// Elements of a stage of one piece of a factor.
    fn stage(&self, side: u32) -> u32 {
        self.depth(side) * pitch(side)
    }

    /// Bytes of shared memory for tiles of so many rows and columns.
    pub(crate) fn shared_bytes(&self, side: u32) -> usize {
        let pieces: u32 = self.sides.iter().map(|s| s.pieces).sum();
        (2 * 2 * pieces * self.stage(side)) as usize
    }
}

/// From one depth to the next: eight of them meet in no bank.
fn pitch(side: u32) -> u32 {
    side + PACK
}

/// How a unit brings in packs of a factor. All of them have the same columns.
struct Bring {
    buf: Buf,
    /// How it is stored.
    elem: Elem,
    /// Where rows lie, by their numbers.
    rows: Offsets,
    /// Where the columns lie in a row, and whether there are any.
    column: Val,
    exists: Val,
    /// An array for each piece.
    to: Vec<Shared>,
}

impl Bring {
    /// Where the pack of a row lies.
    fn at(&self, e: &mut Emit, line: Val) -> Val {
        let row = self.rows.at(e, line);
        e.add(row, self.column)
    }

    /// The pack of a row, as it is stored; 0 where there is none.
    fn read(&self, e: &mut Emit, (line, exists): (Val, Val)) -> Vec<Pack> {
        let inside = e.and(exists, self.exists);
        read_stored(e, (self.buf, self.elem), inside, |e| self.at(e, line))
    }
}

/// The kernel's instructions, for tiles of so many rows and columns, over the buffers of the parameters, of the order of the
/// rows, and of the output.
pub(crate) fn emit(
    e: &mut Emit,
    x: &Exprs<'_>,
    (plan, side): (&OuterPlan, u32),
    buffer: impl Fn(ValueId) -> (Buf, Elem),
    order: Buf,
    output: Buf,
) {
    e.cubes_at_once(2);
    let groups = x.extent(plan.scatter.along);
    let totals = plan.sides.each_ref().map(|s| x.total(e, &s.columns));
    let [row_tiles, column_tiles] = totals.map(|n| e.tiles(n, side));
    // Cubes are numbered along the columns, then the rows, then the groups: what a group's rows are read for stands together.
    let (cube, of_side) = (e.cube(), e.u32(side));
    let (across, rest) = (e.rem(cube, column_tiles), e.div(cube, column_tiles));
    let (down, group) = (e.rem(rest, row_tiles), e.div(rest, row_tiles));
    let firsts = [down, across].map(|tile| e.mul(tile, of_side));
    // All units of a cube agree.
    let inside = e.lt(group, groups);
    e.if_(inside, |e| {
        let elem = Target::Cuda.stored(plan.dtype).expect("a dtype that tensor cores multiply");
        let depth = plan.depth(side);
        let (unit, packs) = (e.unit(), e.u32(side / PACK));
        let (pack, number) = (e.u32(PACK), e.rem(unit, packs));
        let column = e.mul(number, pack);
        let stage = plan.stage(side);
        let brings = [0, 1].map(|n| {
            let Side { factor, columns, pieces } = &plan.sides[n];
            let ((buf, stored), memory) = (buffer(*factor), &x.body().ty(*factor).axes);
            let at = e.add(firsts[n], column);
            Bring {
                buf,
                elem: stored,
                rows: Offsets::of(e, x, &plan.scatter.rows, memory),
                column: Offsets::of(e, x, columns, memory).at(e, at),
                exists: e.lt(at, totals[n]),
                to: (0..*pieces).map(|_| e.shared(elem, (2 * stage) as usize)).collect(),
            }
        });
        // The rows of a stage that a unit brings, and where.
        let (first_row, of_pitch) = (e.div(unit, packs), e.u32(pitch(side)));
        let first_place = e.mul(first_row, of_pitch);
        let first_place = e.add(first_place, column);
        let each: Vec<_> = (0..depth * side / PACK / UNITS)
            .map(|n| {
                let down = n * UNITS / (side / PACK);
                let (rows, numbers) = (e.u32(down), e.u32(down * pitch(side)));
                (e.add(first_row, rows), e.add(first_place, numbers))
            })
            .collect();
        let group = Group::whole(e, order, group);
        let lines = |e: &mut Emit, from: Val| {
            let one = |e: &mut Emit, row: Val| {
                let at = e.add(from, row);
                group.line(e, order, groups, at)
            };
            each.iter().map(|(row, _)| one(e, *row)).collect::<Vec<_>>()
        };
        // Rows from one on into a stage.
        let of_stage = e.u32(stage);
        let begin = |e: &mut Emit, from: Val, lines: &[Val], to: Val| {
            let before = e.mul(to, of_stage);
            let one = |e: &mut Emit, ((row, place), line): (&(Val, Val), &Val)| {
                let (at, place) = (e.add(from, *row), e.add(before, *place));
                (*line, e.lt(at, group.end), place)
            };
            let packs: Vec<_> = each.iter().zip(lines).map(|pack| one(e, pack)).collect();
            let some = e.lt(from, group.end);
            e.if_(some, |e| {
                for bring in brings.iter().filter(|b| b.to.len() == 1) {
                    for &(line, exists, place) in &packs {
                        let (at, inside) = (bring.at(e, line), e.and(exists, bring.exists));
                        e.copy_ahead(inside, bring.buf, at, bring.to[0], place);
                    }
                }
            });
            let mut read = Vec::new();
            for bring in brings.iter().filter(|b| b.to.len() > 1) {
                for &(line, exists, place) in &packs {
                    read.push((bring, bring.read(e, (line, exists)), place));
                }
            }
            read
        };
        let keep = |e: &mut Emit, read: Vec<(&Bring, Vec<Pack>, Val)>| {
            read.into_iter().for_each(|(bring, packs, place)| keep_split(e, elem, &packs, &bring.to, place));
        };
        let tiles = Tiles::new(e, plan, side, [&brings[0].to, &brings[1].to]);
        let (zero, one, step) = (e.u32(0), e.u32(1), e.u32(depth));
        let some = e.lt(group.first, group.end);
        e.if_(some, |e| {
            let here = lines(e, group.first);
            let read = begin(e, group.first, &here, zero);
            keep(e, read);
            let second = e.add(group.first, step);
            let next: Vec<_> = lines(e, second).into_iter().map(|line| e.var(line)).collect();
            let stage = e.var(zero);
            e.for_step(group.first, group.end, step, |e, from| {
                // What was begun in the round before is there, and what that round read is free.
                e.await_copies();
                e.sync();
                let here = e.get(stage);
                let (other, behind) = (e.sub(one, here), e.add(from, step));
                let known: Vec<_> = next.iter().map(|&line| e.get(line)).collect();
                let read = begin(e, behind, &known, other);
                let behind = e.add(behind, step);
                for (next, line) in next.iter().zip(lines(e, behind)) {
                    e.set(*next, line);
                }
                tiles.multiply(e, elem, here);
                keep(e, read);
                e.set(stage, other);
            });
        });
        tiles.finish(e, x, group.number, (firsts, totals), output);
    });
}

/// A plane's tiles.
struct Tiles<'p> {
    plan: &'p OuterPlan,
    side: u32,
    /// The pieces of both factors.
    operands: [&'p [Shared]; 2],
    /// By 16 rows and 8 columns.
    sums: Vec<Vec<Array>>,
    plane: Plane,
    /// The plane's row and column in the cube.
    starts: [Val; 2],
    /// What the unit names to `ldmatrix` in the first stage.
    named: [Val; 2],
}

impl<'p> Tiles<'p> {
    fn new(e: &mut Emit, plan: &'p OuterPlan, side: u32, operands: [&'p [Shared]; 2]) -> Tiles<'p> {
        let zeros = |e: &mut Emit| {
            let tile = sums(e);
            clear(e, tile);
            tile
        };
        let (high, wide) = (side / DOWN / 16, side / ACROSS / 8);
        let sums = (0..high).map(|_| (0..wide).map(|_| zeros(e)).collect()).collect();
        let plane = Plane::new(e);
        let across = e.u32(ACROSS);
        let (down, right) = (e.div(plane.number, across), e.rem(plane.number, across));
        let (of_down, of_right) = (e.u32(side / DOWN), e.u32(side / ACROSS));
        let starts = [e.mul(down, of_down), e.mul(right, of_right)];
        let [rows, columns] = starts.map(|start| Lines { start, pitch: pitch(side) });
        let named = [plane.rows_across(e, rows), plane.columns_across(e, columns)];
        Tiles { plan, side, operands, sums, plane, starts, named }
    }

    /// Adds up what a stage holds.
    fn multiply(&self, e: &mut Emit, elem: Elem, stage: Val) {
        let size = e.u32(self.plan.stage(self.side));
        let before = e.mul(stage, size);
        let named = self.named.map(|named| e.add(before, named));
        let most = self.operands.iter().map(|pieces| pieces.len()).max().unwrap_or(1);
        for k in (0..self.plan.depth(self.side)).step_by(16) {
            let start = k * pitch(self.side);
            let wide = self.sums[0].len() as u32;
            for (q, &right) in self.operands[1].iter().enumerate() {
                // One piece at a time: registers are scarce.
                let columns: Vec<_> = (0..wide / 2)
                    .flat_map(|pair| load_columns(e, elem, right, named[1], start + 16 * pair, true))
                    .collect();
                let lefts = &self.operands[0];
                for &memory in &lefts[..lefts.len().min(most - q)] {
                    for (m, sums) in self.sums.iter().enumerate() {
                        let a = left(e, elem);
                        load_rows_across(e, a, memory, named[0], start + 16 * m as u32);
                        for (sum, b) in sums.iter().zip(&columns) {
                            e.multiply_matrices(a, *b, *sum, elem);
                        }
                    }
                }
            }
        }
    }

    /// Stores the result's tile of a group, where there are so many rows and columns in all.
    fn finish(
        &self,
        e: &mut Emit,
        x: &Exprs<'_>,
        group: Val,
        (firsts, totals): ([Val; 2], [Val; 2]),
        output: Buf,
    ) {
        let body = x.body();
        let memory = &body.ty(body.results[0]).axes;
        let base = Offsets::of(e, x, &[self.plan.scatter.along], memory).at(e, group);
        let offsets = [0, 1].map(|n| Offsets::of(e, x, &self.plan.sides[n].columns, memory));
        // Neighbours of a pair are neighbours in memory.
        let paired = in_packs(body, body.results[0], &self.plan.sides[1].columns);
        let [row, column] = [self.plane.row, self.plane.column];
        let [row, column] = [(row, 0), (column, 1)].map(|(own, n): (Val, usize)| {
            let at = e.add(firsts[n], self.starts[n]);
            e.add(at, own)
        });
        for (m, sums) in self.sums.iter().enumerate() {
            for half in 0..2 {
                let more = e.u32(16 * m as u32 + 8 * half);
                let row = e.add(row, more);
                let exists = e.lt(row, totals[0]);
                let down = offsets[0].at(e, row);
                let start = e.add(base, down);
                for (n, sum) in sums.iter().enumerate() {
                    let more = e.u32(8 * n as u32);
                    let column = e.add(column, more);
                    let inside = e.lt(column, totals[1]);
                    let inside = e.and(exists, inside);
                    let pair = [0, 1].map(|i| {
                        let i = e.u32(2 * half + i);
                        e.load(*sum, i)
                    });
                    // Columns are whole packs, so both of a pair are inside, or none.
                    e.if_(inside, |e| {
                        if paired {
                            let right = offsets[1].at(e, column);
                            let (at, two) = (e.add(start, right), e.u32(2));
                            let (at, pair) = (e.div(at, two), e.pack(Elem::F32, &pair));
                            e.store_pack(output, at, &pair);
                            return;
                        }
                        for (n, value) in pair.into_iter().enumerate() {
                            let n = e.u32(n as u32);
                            let column = e.add(column, n);
                            let right = offsets[1].at(e, column);
                            let at = e.add(start, right);
                            e.store(output, at, value);
                        }
                    });
                }
            }
        }
    }
}
