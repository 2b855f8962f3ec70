//! Sums of outer products by index on tensor cores: for each index a product of two matrices, summed over the rows that have it.
//!
//! The rows are sorted by their index first ([`sort`](super::sort)), so all that has one index is a run of the order. A cube takes one
//! tile of the result at an index after another, and walks its run: 8 planes bring some rows of both factors into shared memory at a
//! time, as packs of neighbouring columns, so a row of a stage is a depth of the product and both operands lie across it. While
//! one stage is multiplied, the next ones are on their way, and those of the next tile while a tile is stored, which takes as long as
//! to multiply it: factors of 16 bits by asynchronous copies, f32 ones through registers, where they are split into numbers
//! of bf16 that add up to them. What lies beyond an edge, or behind the last row, counts as 0. An index without rows has zeros. Each
//! element is added up by one plane in the order of its rows, without atomics, so two runs agree to the last bit.
//!
//! Planes multiply by themselves (`ldmatrix` turns what lies across), or four of them together where a device can
//! ([`warpgroup`](super::warpgroup)).
//!
//! Two split factors take three products: the lower numbers are not multiplied with each other, which is as much off as a split
//! is.

use latentc_ir::{AxisId, DType, Function, Size, ValueId};

use super::contract::Offsets;
use super::emit::{Array, Buf, Cmp, Elem, Emit, Pack, Val, Var};
use super::expr::Exprs;
use super::feed::{self, Layout, Staged};
use super::fragment::{
    Factor, Lines, PACK, Plane, clear, four_of, in_packs, keep_split, left, load_columns, load_rows_across,
    read_stored, sums,
};
use super::sort::Group;
use super::target::Target;
use super::tiles::{self, steps};
use super::warpgroup::{self, Left, Operand};
use crate::program::{By, KernelKind};
use crate::scatter::ScatterPlan;

/// Units of a cube.
pub(crate) const UNITS: u32 = super::matrix::UNITS;
/// Cubes of a multiprocessor.
pub(crate) const CUBES: u32 = 2;
/// Stages of shared memory: one is multiplied, the others are on their way.
const STAGES: u32 = 3;
/// Planes above one another in a tile, and beside one another.
const DOWN: u32 = 2;
const ACROSS: u32 = UNITS / 32 / DOWN;

/// A tile of the result at an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OuterTile {
    /// Rows and columns.
    pub(crate) side: u8,
    /// Who multiplies.
    pub(crate) by: By,
}

impl OuterTile {
    /// All there are. Groups have 64 rows each.
    pub(crate) const ALL: [OuterTile; 3] = [
        OuterTile { side: 64, by: By::Planes },
        OuterTile { side: 128, by: By::Planes },
        OuterTile { side: 128, by: By::Groups },
    ];

    /// The way that computes these.
    pub(crate) fn way(self) -> KernelKind {
        KernelKind::ScatterMatrix { side: self.side, by: self.by }
    }

    pub(super) fn side(self) -> u32 {
        self.side.into()
    }

    /// How so many rows of a factor lie in a stage.
    fn layout(self, depth: u32) -> Layout {
        Layout { lines: self.side(), depth, along: false, cut: self.by.in_groups() }
    }

    /// From one row of a stage to the next, where planes multiply by themselves: eight of them meet in no bank.
    fn pitch(self) -> u32 {
        self.side() + PACK
    }
}

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

    /// Products of tensor cores that a plane takes part in for a stage of such tiles.
    pub(super) fn products(&self, tile: OuterTile) -> u32 {
        let of_depth = self.depth(tile) / 16 * self.multiplications() as u32;
        let side = tile.side();
        if tile.by.in_groups() { of_depth } else { of_depth * (side / DOWN / 16) * (side / ACROSS / 8) }
    }

    /// Rows that are brought in at a time for such tiles.
    pub(super) fn depth(&self, tile: OuterTile) -> u32 {
        match (self.sides.iter().all(|s| s.pieces == 1), tile) {
            // What is split passes through registers: a pack of each factor a unit.
            (false, _) => UNITS * PACK / tile.side(),
            // Two cubes of as many bytes fit on a multiprocessor of any device.
            (true, OuterTile { side: 128, by: By::Planes }) => 48,
            (true, _) => 64,
        }
    }

    /// Elements of a stage of one piece of a factor.
    fn stage(&self, tile: OuterTile) -> u32 {
        let depth = self.depth(tile);
        if tile.by.in_groups() { tile.layout(depth).elements() } else { depth * tile.pitch() }
    }

    /// Bytes of shared memory for such tiles.
    pub(crate) fn shared_bytes(&self, tile: OuterTile) -> usize {
        let pieces: u32 = self.sides.iter().map(|s| s.pieces).sum();
        (2 * STAGES * pieces * self.stage(tile)) as usize
    }
}

/// A factor on its way.
struct Bring {
    buf: Buf,
    /// How it is stored.
    elem: Elem,
    /// Where rows and columns lie, by their numbers.
    rows: Offsets,
    columns: Offsets,
    /// All of its columns.
    total: Val,
    /// Its stages: an array for each piece.
    to: Staged,
}

impl Bring {
    /// Whether it is copied past the registers.
    fn copied(&self) -> bool {
        self.to.pieces.len() == 1
    }
}

/// A tile at hand.
struct At {
    group: Group,
    /// The first row and column.
    firsts: [Val; 2],
    /// Of the packs that the unit brings of each factor: where they lie in a row, and whether there are any.
    packs: [(Val, Val); 2],
}

/// What was read of a factor, and where it goes.
type Read = Vec<(usize, Vec<Pack>, Val)>;

/// The cubes of a kernel.
struct Cubes<'p, 'x> {
    x: &'p Exprs<'x>,
    plan: &'p OuterPlan,
    tile: OuterTile,
    /// What is multiplied.
    factor: Factor,
    brings: [Bring; 2],
    order: Buf,
    /// How many indices there are, and tiles across, down and in all.
    groups: Val,
    tiles: [Val; 3],
    /// The columns of a tile that a unit brings packs of, and of a stage the rows, and where these packs lie.
    column: Val,
    each: Vec<(Val, Val)>,
}

/// The kernel's instructions, for such tiles, over the buffers of the parameters, of the order of the rows, and of the output.
pub(crate) fn emit(
    e: &mut Emit,
    x: &Exprs<'_>,
    (plan, tile): (&OuterPlan, OuterTile),
    buffer: impl Fn(ValueId) -> (Buf, Elem),
    order: Buf,
    output: Buf,
) {
    e.cubes_at_once(CUBES);
    let cubes = Cubes::new(e, x, (plan, tile), buffer, order);
    let sums = Sums::new(e, &cubes);
    let (zero, step, all) = (e.u32(0), e.u32(plan.depth(tile)), cubes.tiles[2]);
    let stage = e.var(zero);
    let (first, at_once) = (e.cube(), e.cubes_in_grid());
    cubes.ahead(e, first, stage);
    e.for_step(first, all, at_once, |e, number| {
        let at = cubes.at(e, number);
        sums.clear(e);
        e.for_step(at.group.first, at.group.end, step, |e, from| {
            let here = e.get(stage);
            // This stage is there, and all planes are done with the one before it.
            e.await_groups_but(STAGES - 2);
            if tile.by.in_groups() {
                warpgroup::show_written(e);
            }
            e.sync();
            let (free, next) = (before(e, here), feed::behind(e, here, STAGES));
            let ahead = e.u32((STAGES - 1) * plan.depth(tile));
            let from = e.add(from, ahead);
            sums.multiply(e, here, |e| cubes.read(e, &at, from, free));
            e.set(stage, next);
        });
        if tile.by.in_groups() {
            let all: Vec<_> = sums.tiles.iter().flatten().copied().collect();
            warpgroup::await_but(e, 0, &all, &[]);
        }
        // All are done with the stages but the last one, and these are what comes next.
        let next = e.add(number, at_once);
        cubes.ahead(e, next, stage);
        sums.finish(e, &at, output);
    });
}

/// The stage before one.
fn before(e: &mut Emit, stage: Val) -> Val {
    let (zero, one, last) = (e.u32(0), e.u32(1), e.u32(STAGES - 1));
    let (over, next) = (e.cmp(Cmp::Eq, stage, zero), e.sub(stage, one));
    e.select(over, last, next)
}

impl<'p, 'x> Cubes<'p, 'x> {
    fn new(
        e: &mut Emit,
        x: &'p Exprs<'x>,
        (plan, tile): (&'p OuterPlan, OuterTile),
        buffer: impl Fn(ValueId) -> (Buf, Elem),
        order: Buf,
    ) -> Cubes<'p, 'x> {
        let elem = Target::Cuda.stored(plan.dtype).expect("a dtype that tensor cores multiply");
        let (side, depth) = (tile.side(), plan.depth(tile));
        let layout = tile.layout(depth);
        let brings = [0, 1].map(|n| {
            let Side { factor, columns, pieces } = &plan.sides[n];
            let ((buf, stored), memory) = (buffer(*factor), &x.body().ty(*factor).axes);
            let to = if tile.by.in_groups() {
                Staged::new(e, elem, layout, *pieces, STAGES)
            } else {
                let stages = (STAGES * plan.stage(tile)) as usize;
                Staged { layout, pieces: (0..*pieces).map(|_| e.shared(elem, stages)).collect() }
            };
            Bring {
                buf,
                elem: stored,
                rows: Offsets::of(e, x, &plan.scatter.rows, memory),
                columns: Offsets::of(e, x, columns, memory),
                total: x.total(e, columns),
                to,
            }
        });
        let groups = x.extent(plan.scatter.along);
        // Tiles are numbered along the columns, then the rows, then the groups: what a group's rows are read for stands together.
        let [down, across] = [0, 1].map(|n: usize| e.tiles(brings[n].total, side));
        let all = e.mul(across, down);
        let tiles = [across, down, e.mul(all, groups)];
        // A unit has packs of the same columns of several rows.
        let (unit, packs, pack) = (e.unit(), e.u32(side / PACK), e.u32(PACK));
        let (row, number) = (e.div(unit, packs), e.rem(unit, packs));
        let column = e.mul(number, pack);
        let each = (0..depth * side / PACK / UNITS)
            .map(|n| {
                let more = e.u32(n * UNITS / (side / PACK));
                let row = e.add(row, more);
                if tile.by.in_groups() {
                    return (row, layout.place(e, row, column));
                }
                let pitch = e.u32(tile.pitch());
                let start = e.mul(row, pitch);
                (row, e.add(start, column))
            })
            .collect();
        Cubes { x, plan, tile, factor: Factor::Half(elem), brings, order, groups, tiles, column, each }
    }

    /// The tile with a number.
    fn at(&self, e: &mut Emit, number: Val) -> At {
        let [across, down, _] = self.tiles;
        let (column, rest) = (e.rem(number, across), e.div(number, across));
        let (row, group) = (e.rem(rest, down), e.div(rest, down));
        let side = e.u32(self.tile.side());
        let firsts = [row, column].map(|tile| e.mul(tile, side));
        let packs = [0, 1].map(|n: usize| {
            let (bring, at) = (&self.brings[n], e.add(firsts[n], self.column));
            (bring.columns.at(e, at), e.lt(at, bring.total))
        });
        At { group: Group::whole(e, self.order, group), firsts, packs }
    }

    /// Brings the first rows of the tile with a number, if there is one, into the stages from one on, all but the last.
    fn ahead(&self, e: &mut Emit, number: Val, stage: Var) {
        let exists = e.lt(number, self.tiles[2]);
        e.if_(exists, |e| {
            let at = self.at(e, number);
            let mut to = e.get(stage);
            for n in 0..STAGES - 1 {
                let rows = e.u32(n * self.plan.depth(self.tile));
                let from = e.add(at.group.first, rows);
                let read = self.read(e, &at, from, to);
                self.keep(e, read);
                to = feed::behind(e, to, STAGES);
            }
        });
    }

    /// Begins to copy the rows of a tile from one on into a stage, and reads those of factors that are not copied. These want to be
    /// [kept](Cubes::keep).
    fn read(&self, e: &mut Emit, at: &At, from: Val, stage: Val) -> Read {
        let size = e.u32(self.plan.stage(self.tile));
        let start = e.mul(stage, size);
        let lines: Vec<_> = (self.each.iter())
            .map(|&(row, place)| {
                let row = e.add(from, row);
                let line = at.group.line(e, self.order, self.groups, row);
                (line, e.lt(row, at.group.end), e.add(start, place))
            })
            .collect();
        let reach = |e: &mut Emit, n: usize, line: Val| {
            let row = self.brings[n].rows.at(e, line);
            e.add(row, at.packs[n].0)
        };
        let some = e.lt(from, at.group.end);
        e.if_(some, |e| {
            for (n, bring) in self.brings.iter().enumerate().filter(|(_, b)| b.copied()) {
                for &(line, exists, place) in &lines {
                    let (from, inside) = (reach(e, n, line), e.and(exists, at.packs[n].1));
                    e.copy_ahead(inside, bring.buf, from, bring.to.pieces[0], place);
                }
            }
        });
        e.group_copies();
        let mut read = Vec::new();
        for (n, bring) in self.brings.iter().enumerate().filter(|(_, b)| !b.copied()) {
            for &(line, exists, place) in &lines {
                let inside = e.and(exists, at.packs[n].1);
                let packs = read_stored(e, (bring.buf, bring.elem), inside, |e| reach(e, n, line));
                read.push((n, packs, place));
            }
        }
        read
    }

    /// Puts what was read where it belongs.
    fn keep(&self, e: &mut Emit, read: Read) {
        for (n, packs, place) in read {
            keep_split(e, self.factor.elem(), &packs, &self.brings[n].to.pieces, place);
        }
    }
}

/// The sums of a tile that a unit has.
struct Sums<'c> {
    cubes: &'c Cubes<'c, 'c>,
    /// By 16 rows and 8 columns.
    tiles: Vec<Vec<Array>>,
    plane: Plane,
    /// The plane's first row and column in a tile.
    starts: [Val; 2],
    /// Who multiplies.
    by: Multiplied,
}

enum Multiplied {
    /// Planes: what the unit names to `ldmatrix` in the first stage.
    Planes { named: [Val; 2] },
    /// Groups of planes: where the rows of this unit's group begin in a stage.
    Groups { rows: Val },
}

impl<'c> Sums<'c> {
    fn new(e: &mut Emit, cubes: &'c Cubes<'c, 'c>) -> Sums<'c> {
        let (tile, side) = (cubes.tile, cubes.tile.side());
        // A plane of a group has 16 of its rows, and all columns.
        let (high, wide) =
            if tile.by.in_groups() { (1, side / 8) } else { (side / DOWN / 16, side / ACROSS / 8) };
        let tiles = (0..high).map(|_| (0..wide).map(|_| sums(e)).collect()).collect();
        let plane = Plane::new(e);
        if tile.by.in_groups() {
            let (sixteen, planes) = (e.u32(16), e.u32(warpgroup::ROWS / 16));
            let group = e.div(plane.number, planes);
            let size = e.u32(warpgroup::ROWS * cubes.plan.depth(tile));
            let starts = [e.mul(plane.number, sixteen), e.u32(0)];
            return Sums { cubes, tiles, plane, starts, by: Multiplied::Groups { rows: e.mul(group, size) } };
        }
        let across = e.u32(ACROSS);
        let (down, right) = (e.div(plane.number, across), e.rem(plane.number, across));
        let (of_down, of_right) = (e.u32(side / DOWN), e.u32(side / ACROSS));
        let starts = [e.mul(down, of_down), e.mul(right, of_right)];
        let [rows, columns] = starts.map(|start| Lines { start, pitch: tile.pitch() });
        let named = [plane.rows_across(e, rows), plane.columns_across(e, columns)];
        Sums { cubes, tiles, plane, starts, by: Multiplied::Planes { named } }
    }

    fn clear(&self, e: &mut Emit) {
        self.tiles.iter().flatten().for_each(|&tile| clear(e, tile));
    }

    /// Adds up what a stage holds. Meanwhile `read` begins to bring in what comes later.
    fn multiply(&self, e: &mut Emit, stage: Val, read: impl FnOnce(&mut Emit) -> Read) {
        let (plan, tile, brings) = (self.cubes.plan, self.cubes.tile, &self.cubes.brings);
        match self.by {
            Multiplied::Planes { named } => {
                let read = read(e);
                let size = e.u32(plan.stage(tile));
                let start = e.mul(stage, size);
                let named = named.map(|named| e.add(start, named));
                self.by_planes(e, named);
                self.cubes.keep(e, read);
            }
            Multiplied::Groups { rows } => {
                let [left, right] = [0, 1].map(|n: usize| brings[n].to.first(e, stage));
                let left = e.add(left, rows);
                warpgroup::fence(e);
                for step in steps(plan.depth(tile), [0, 1].map(|n: usize| brings[n].to.pieces.len())) {
                    let [left, right] = [(0, left), (1, right)].map(|(n, first): (usize, Val)| {
                        Operand::of(&brings[n].to, step.pieces[n], (first, 0, step.k))
                    });
                    let left = Left::Shared(left);
                    warpgroup::add(e, self.cubes.factor, &self.tiles[0], left, right, true);
                }
                warpgroup::commit(e);
                let read = read(e);
                warpgroup::await_but(e, 0, &[], &[]);
                self.cubes.keep(e, read);
            }
        }
    }

    fn by_planes(&self, e: &mut Emit, named: [Val; 2]) {
        let (plan, tile) = (self.cubes.plan, self.cubes.tile);
        let ([lefts, rights], elem) =
            (self.cubes.brings.each_ref().map(|b| &b.to.pieces), self.cubes.factor.elem());
        let most = lefts.len().max(rights.len());
        let wide = self.tiles[0].len() as u32;
        for k in (0..plan.depth(tile)).step_by(16) {
            let start = k * tile.pitch();
            for (q, &right) in rights.iter().enumerate() {
                // One piece at a time: registers are scarce.
                let columns: Vec<_> = (0..wide / 2)
                    .flat_map(|pair| load_columns(e, elem, right, named[1], start + 16 * pair, true))
                    .collect();
                for &memory in &lefts[..lefts.len().min(most - q)] {
                    for (m, sums) in self.tiles.iter().enumerate() {
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

    /// Stores the tile at hand.
    fn finish(&self, e: &mut Emit, at: &At, output: Buf) {
        let Cubes { x, plan, brings, .. } = self.cubes;
        let body = x.body();
        let memory = &body.ty(body.results[0]).axes;
        let base = Offsets::of(e, x, &[plan.scatter.along], memory).at(e, at.group.number);
        let offsets = [0, 1].map(|n| Offsets::of(e, x, &plan.sides[n].columns, memory));
        // Neighbours are neighbours in memory.
        let packed = in_packs(body, body.results[0], &plan.sides[1].columns);
        let [row0, column0] = [0, 1].map(|n: usize| e.add(at.firsts[n], self.starts[n]));
        let row0 = e.add(row0, self.plane.row);
        let (one, two, four) = (e.u32(1), e.u32(2), e.u32(4));
        let odd = e.rem(self.plane.lane, two);
        let second = e.cmp(Cmp::Eq, odd, one);
        // Of four units with a row, two have the first four of its eight columns.
        let quad = e.div(self.plane.column, four);
        let quad = e.mul(quad, four);
        for (m, sums) in self.tiles.iter().enumerate() {
            for half in 0..2 {
                let more = e.u32(16 * m as u32 + 8 * half);
                let row = e.add(row0, more);
                let exists = e.lt(row, brings[0].total);
                let down = offsets[0].at(e, row);
                let start = e.add(base, down);
                for (n, pair) in sums.chunks_exact(2).enumerate() {
                    let [first, last] = [0, 1].map(|t: usize| {
                        [0, 1].map(|i| {
                            let i = e.u32(2 * half + i);
                            e.load(pair[t], i)
                        })
                    });
                    let before = e.u32(16 * n as u32);
                    let before = e.add(column0, before);
                    if packed {
                        // Units with an odd number have columns of the second eight.
                        let numbers = four_of(e, second, first, last);
                        let more = e.u32(8);
                        let more = e.mul(odd, more);
                        let column = e.add(before, more);
                        let column = e.add(column, quad);
                        // Columns are whole packs, so all four are inside, or none.
                        let inside = e.lt(column, brings[1].total);
                        let inside = e.and(exists, inside);
                        e.if_(inside, |e| {
                            let right = offsets[1].at(e, column);
                            let at = e.add(start, right);
                            let (at, numbers) = (e.div(at, four), e.pack(Elem::F32, &numbers));
                            e.store_pack(output, at, &numbers);
                        });
                        continue;
                    }
                    for (t, numbers) in [first, last].into_iter().enumerate() {
                        let more = e.u32(8 * t as u32);
                        let column = e.add(before, more);
                        let column = e.add(column, self.plane.column);
                        let inside = e.lt(column, brings[1].total);
                        let inside = e.and(exists, inside);
                        e.if_(inside, |e| {
                            for (n, number) in numbers.into_iter().enumerate() {
                                let n = e.u32(n as u32);
                                let column = e.add(column, n);
                                let right = offsets[1].at(e, column);
                                let at = e.add(start, right);
                                e.store(output, at, number);
                            }
                        });
                    }
                }
            }
        }
    }
}
