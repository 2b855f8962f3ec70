//! Streamed softmaxes through CubeCL: a cube has some rows and columns of the product and walks the streamed axis in blocks.
//!
//! For each block of 32 positions the cube computes the scores of its rows, from tiles of both operands in shared memory, 32
//! numbers of depth at a time; turns them into weights with what it knows of the rows so far; and adds the block's values, tile
//! by tile, to the sums that each unit keeps in registers. All of it is f32; weights are not rounded, whatever dtype
//! the body gives them. A score product whose operands both have the streamed axis, or one of them that and rows, is
//! computed element by element instead.
//!
//! With few rows and many positions, as in decode, the cubes of one launch would be few. A device then shares the positions out: the
//! cubes of a first launch leave what they know of theirs in memory of the device, and a second launch merges it. To the program
//! both are one launch.
//!
//! Beyond an edge, the last element is read in place of one that does not exist, and counts as nothing.

use latentc_ir::{AxisId, Function, Op, ValueId};

use super::emit::{Bin, Buf, Cmp, Elem, Emit, Shared, Un, Val, Var};
use super::expr::Exprs;
use crate::contract::ContractPlan;
use crate::stream::{StreamPlan, cone, is_elementwise};

/// Units of a cube.
pub(crate) const UNITS: u32 = 256;
/// Positions of a block.
const POSITIONS: u32 = 32;
/// Depth of a score product that is brought in at a time.
const DEPTH: u32 = 32;
/// Rows of the product that a unit sums.
const EACH: u32 = 4;
/// The most columns of a cube. Scores are computed again for more.
const COLUMNS: u64 = 512;
/// Elements of a tile of values, at most: so that all of a cube fits into 32 KiB.
const VALUES: u32 = 4096;
/// From one line of a tile to the next, so that units side by side meet in no bank.
const PITCH: u32 = 33;

/// Cubes that keep a large GPU busy: two for each of 132 multiprocessors.
const BUSY: usize = 264;
/// The fewest positions that are worth a part of their own.
const PART: usize = 128;

/// Which of the kernels of a streamed softmax this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    /// All of it.
    Whole,
    /// The first of two: what is known of each part of the positions.
    Part,
    /// The second: parts are merged.
    Merge,
}

impl Role {
    /// What it adds to the kernel's name.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Role::Whole => "",
            Role::Part => "_part",
            Role::Merge => "_merge",
        }
    }

    /// The parameters that it reads.
    pub(crate) fn reads(self, body: &Function, plan: &StreamPlan) -> Vec<ValueId> {
        match self {
            Role::Whole => body.params.clone(),
            Role::Part => cone(body, plan.product, |_| true),
            Role::Merge => cone(body, body.results[0], |op| *op != Op::Contract),
        }
    }
}

/// How a launch shares out the positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Split {
    /// Positions of a part.
    pub(crate) chunk: usize,
    /// The number of parts.
    pub(crate) parts: usize,
    /// Floats that are kept in between.
    pub(crate) scratch: usize,
    /// Elements of the product.
    pub(crate) elements: usize,
}

impl Split {
    /// For a launch that would have so many cubes; `None` if these are enough, or the positions too few.
    pub(crate) fn of(plan: &StreamPlan, cubes: usize, extents: &[usize]) -> Option<Split> {
        let size = |axes: &[AxisId]| axes.iter().map(|a| extents[a.0 as usize]).product::<usize>();
        let positions = extents[plan.along.0 as usize];
        let parts = (BUSY / cubes.max(1)).min(positions / PART);
        if parts < 2 {
            return None;
        }
        let chunk = positions.div_ceil(parts).next_multiple_of(POSITIONS as usize);
        let parts = positions.div_ceil(chunk);
        let (lines, columns) = (size(&plan.batch) * size(&plan.m), size(&plan.n));
        let scratch = parts * lines * (columns + KEPT as usize);
        Some(Split { chunk, parts, scratch, elements: lines * columns })
    }
}

/// Behind the sums of a row, a part keeps its maximum and the sum of its weights.
const KEPT: u32 = 2;

/// How the units of a cube share its rows and columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    /// Rows of a cube.
    pub(crate) rows: u32,
    /// Columns of a cube.
    pub(crate) columns: u32,
    /// Units side by side along the columns.
    across: u32,
    /// Positions of a tile of values.
    values: u32,
}

impl Tiles {
    /// For the columns that a plan has.
    pub(crate) fn of(body: &Function, plan: &StreamPlan) -> Tiles {
        let sizes = plan.n.iter().map(|&a| body.axis(a).size.fixed());
        let columns = sizes.into_iter().try_fold(1u64, |total, n| Some(total.saturating_mul(n?)));
        let columns = columns.unwrap_or(128).clamp(1, COLUMNS) as u32;
        let across = (columns / EACH).next_power_of_two().clamp(16, 64);
        let columns = columns.next_multiple_of(across);
        let values = (VALUES / columns + 1).next_power_of_two() / 2;
        Tiles { rows: UNITS / across * EACH, columns, across, values: values.min(POSITIONS) }
    }

    /// Bytes of shared memory: both operands' tiles, weights, values, one number a row.
    pub(crate) fn shared_bytes(self) -> usize {
        let sizes =
            [self.rows * PITCH, POSITIONS * PITCH, self.rows * PITCH, self.values * self.columns, self.rows];
        sizes.iter().map(|&n| (n as usize * Elem::F32.bytes()).next_multiple_of(16)).sum()
    }
}

/// Where one is along some axes.
type At<'a> = (&'a [AxisId], &'a [Val]);

/// The index of a tensor with these axes.
fn index(axes: &[AxisId], known: &[At<'_>]) -> Vec<Val> {
    let along = |a: &AxisId| known.iter().find_map(|(of, at)| of.iter().position(|k| k == a).map(|n| at[n]));
    axes.iter().map(|a| along(a).expect("the plan knows every axis")).collect()
}

/// Consecutive numbers of some axes together.
#[derive(Clone, Copy)]
struct Span<'a> {
    axes: &'a [AxisId],
    /// The first number.
    from: Val,
    /// How many.
    count: u32,
    /// The number of all indices of the axes, at least 1.
    total: Val,
    /// From one number to the next in a tile.
    pitch: u32,
}

impl Span<'_> {
    /// A number of the span as an index, and whether there is such a number.
    fn at(&self, e: &mut Emit, x: &Exprs<'_>, n: Val) -> (Vec<Val>, Val) {
        let number = e.add(self.from, n);
        let exists = e.lt(number, self.total);
        let one = e.u32(1);
        let last = e.sub(self.total, one);
        let number = e.binary(Bin::Min, number, last);
        (x.split(e, number, self.axes), exists)
    }
}

/// Brings a tile of a leaf into shared memory. What does not exist is 0.
fn stage(
    e: &mut Emit,
    x: &mut Exprs<'_>,
    leaf: ValueId,
    tile: Shared,
    spans: [Span<'_>; 2],
    known: &[At<'_>],
) {
    let axes = &x.body().ty(leaf).axes;
    // Neighbouring units read neighbouring elements.
    let fast = usize::from(!axes.last().is_some_and(|a| spans[0].axes.contains(a)));
    let unit = e.unit();
    for n in 0..spans[0].count * spans[1].count / UNITS {
        let first = e.u32(n * UNITS);
        let at = e.add(unit, first);
        let width = e.u32(spans[fast].count);
        let (slow, quick) = (e.div(at, width), e.rem(at, width));
        let numbers = if fast == 1 { [slow, quick] } else { [quick, slow] };
        let (line, there) = spans[0].at(e, x, numbers[0]);
        let (across, here) = spans[1].at(e, x, numbers[1]);
        let exists = e.and(there, here);
        let place: Vec<At<'_>> =
            known.iter().copied().chain([(spans[0].axes, &line[..]), (spans[1].axes, &across[..])]).collect();
        let element = x.scope(|x| x.element(e, leaf, &index(axes, &place)));
        let zero = e.f32(0.0);
        let element = e.select(exists, element, zero);
        let to = [0, 1].map(|n| {
            let pitch = e.u32(spans[n].pitch);
            e.mul(numbers[n], pitch)
        });
        let to = e.add(to[0], to[1]);
        e.store(tile, to, element);
    }
}

/// A product in the scores that is computed by tiles.
struct Scores {
    product: ValueId,
    /// The operand that the rows have.
    rows: ValueId,
    /// The operand that the positions have.
    keys: ValueId,
    depth: Vec<AxisId>,
}

/// The products of the scores that tiles can compute.
fn products(body: &Function, plan: &StreamPlan) -> Vec<Scores> {
    let below = cone(body, plan.scores, is_elementwise);
    let products = body.body.iter().filter(|i| i.op == Op::Contract && below.contains(&i.result()));
    let tiled = products.filter_map(|i| {
        let along = |v: &ValueId| body.ty(*v).has(plan.along);
        let (rows, keys) = match i.args[..] {
            [a, b] if !along(&a) && along(&b) => (a, b),
            [a, b] if along(&a) && !along(&b) => (b, a),
            _ => return None,
        };
        let groups = ContractPlan::new(&body.ty(keys).axes, &body.ty(rows).axes, &body.ty(i.result()).axes);
        let shared_by_rows = !body.ty(keys).axes.iter().any(|a| plan.m.contains(a));
        shared_by_rows.then_some(Scores { product: i.result(), rows, keys, depth: groups.k })
    });
    tiled.collect()
}

/// The instructions of the kernel, or of its first part, which gives the number of positions of a part.
pub(crate) fn emit(e: &mut Emit, mut x: Exprs<'_>, plan: &StreamPlan, chunk: Option<Val>, output: Buf) {
    let tiles = Tiles::of(x.body(), plan);
    let [repeats, rows, columns] = [&plan.batch, &plan.m, &plan.n].map(|axes| x.total(e, axes));

    // Cubes are numbered along the columns, then the rows, the batch, the parts.
    let cube = e.cube();
    let [row_tiles, column_tiles] =
        [(rows, tiles.rows), (columns, tiles.columns)].map(|(size, tile)| up(e, size, tile));
    let row_of_tiles = e.div(cube, column_tiles);
    let repeat = e.div(row_of_tiles, row_tiles);
    let [row0, column0] = [(row_of_tiles, row_tiles, tiles.rows), (cube, column_tiles, tiles.columns)].map(
        |(number, count, tile)| {
            let (number, tile) = (e.rem(number, count), e.u32(tile));
            e.mul(number, tile)
        },
    );
    let positions = x.extent(plan.along);
    let (repeat, part, from, to, inside) = match chunk {
        None => (repeat, e.u32(0), e.u32(0), positions, e.lt(repeat, repeats)),
        Some(chunk) => {
            let (part, repeat) = (e.div(repeat, repeats), e.rem(repeat, repeats));
            let from = e.mul(part, chunk);
            let end = e.add(from, chunk);
            let to = e.binary(Bin::Min, end, positions);
            (repeat, part, from, to, e.lt(from, positions))
        }
    };
    // All units of a cube agree.
    e.if_(inside, |e| {
        let batch = x.split(e, repeat, &plan.batch);
        let along = [plan.along];
        let mut cube = Cube {
            plan,
            tiles,
            batch,
            rows: Span { axes: &plan.m, from: row0, count: tiles.rows, total: rows, pitch: PITCH },
            columns: Span { axes: &plan.n, from: column0, count: tiles.columns, total: columns, pitch: 1 },
            positions: Span { axes: &along, from, count: POSITIONS, total: positions, pitch: PITCH },
            left: e.shared(Elem::F32, (tiles.rows * PITCH) as usize),
            right: e.shared(Elem::F32, (POSITIONS * PITCH) as usize),
            weights: e.shared(Elem::F32, (tiles.rows * PITCH) as usize),
            values: e.shared(Elem::F32, (tiles.values * tiles.columns) as usize),
            of_rows: e.shared(Elem::F32, tiles.rows as usize),
        };
        let (nothing, least) = (e.f32(0.0), e.f32(f32::MIN));
        let (max, sum) = (e.var(least), e.var(nothing));
        let width = tiles.columns / tiles.across;
        let sums: Vec<Vec<Var>> = (0..EACH).map(|_| (0..width).map(|_| e.var(nothing)).collect()).collect();
        let products = products(x.body(), plan);
        let step = e.u32(POSITIONS);
        e.for_step(from, to, step, |e, first| {
            cube.positions.from = first;
            x.scope(|x| {
                cube.scores(e, x, &products);
                e.sync();
                cube.weigh(e, max, sum);
                e.sync();
                cube.add_values(e, x, &sums);
            });
        });
        if chunk.is_none() {
            cube.store(e, &mut x, sum, &sums, output);
        } else {
            let lines = e.mul(repeats, rows);
            let first = e.mul(part, lines);
            let before = e.mul(repeat, rows);
            let first = e.add(first, before);
            cube.keep(e, first, [max, sum], &sums, output);
        }
    });
}

/// How many tiles hold so many.
fn up(e: &mut Emit, size: Val, tile: u32) -> Val {
    let (rounding, tile) = (e.u32(tile - 1), e.u32(tile));
    let sum = e.add(size, rounding);
    e.div(sum, tile)
}

/// The instructions of the second part: a unit has an element of the product. `kept` is what the first left of parts of `chunk`
/// positions.
pub(crate) fn emit_merge(
    e: &mut Emit,
    mut x: Exprs<'_>,
    plan: &StreamPlan,
    kept: Buf,
    chunk: Val,
    output: Buf,
) {
    let [repeats, rows, columns] = [&plan.batch, &plan.m, &plan.n].map(|axes| x.total(e, axes));
    let lines = e.mul(repeats, rows);
    let total = e.mul(lines, columns);
    let flat = e.unit_in_grid();
    let inside = e.lt(flat, total);
    e.if_(inside, |e| {
        let (line, column) = (e.div(flat, columns), e.rem(flat, columns));
        let (zero, one, two) = (e.u32(0), e.u32(1), e.u32(KEPT));
        let pitch = e.add(columns, two);
        let positions = x.extent(plan.along);
        let rounding = e.sub(chunk, one);
        let parts = e.add(positions, rounding);
        let parts = e.div(parts, chunk);
        let start = |e: &mut Emit, part: Val| {
            let before = e.mul(part, lines);
            let number = e.add(before, line);
            e.mul(number, pitch)
        };
        let (nothing, least) = (e.f32(0.0), e.f32(f32::MIN));
        let (max, sum, y) = (e.var(least), e.var(nothing), e.var(nothing));
        e.for_step(zero, parts, one, |e, part| {
            let at = start(e, part);
            let at = e.add(at, columns);
            let (more, known) = (e.load(kept, at), e.get(max));
            let larger = e.binary(Bin::Max, known, more);
            e.set(max, larger);
        });
        let largest = e.get(max);
        e.for_step(zero, parts, one, |e, part| {
            let start = start(e, part);
            let at = e.add(start, columns);
            let max = e.load(kept, at);
            let less = e.sub(max, largest);
            let factor = e.unary(Un::Exp, less);
            let at_sum = e.add(at, one);
            let at_y = e.add(start, column);
            for (var, at) in [(sum, at_sum), (y, at_y)] {
                let (more, known) = (e.load(kept, at), e.get(var));
                let known = e.fma(more, factor, known);
                e.set(var, known);
            }
        });
        let (repeat, row) = (e.div(line, rows), e.rem(line, rows));
        let (batch, row) = (x.split(e, repeat, &plan.batch), x.split(e, row, &plan.m));
        let column = x.split(e, column, &plan.n);
        let known = [(&plan.batch[..], &batch[..]), (&plan.m[..], &row[..]), (&plan.n[..], &column[..])];
        let sum = e.get(sum);
        let (divisor, y) = (divisor(e, sum), e.get(y));
        let y = e.div(y, divisor);
        finish(e, &mut x, plan, &known, y, output);
    });
}

/// What a row is divided by. A row of nothing but -inf is zeros.
fn divisor(e: &mut Emit, sum: Val) -> Val {
    let (zero, one) = (e.f32(0.0), e.f32(1.0));
    let empty = e.cmp(Cmp::Eq, sum, zero);
    e.select(empty, one, sum)
}

/// Computes the epilogue of an element of the product and stores it.
fn finish(e: &mut Emit, x: &mut Exprs<'_>, plan: &StreamPlan, known: &[At<'_>], y: Val, output: Buf) {
    x.scope(|x| {
        let body = x.body();
        x.define(plan.product, index(&body.ty(plan.product).axes, known), y);
        let axes = &body.ty(body.results[0]).axes;
        let at = index(axes, known);
        let element = x.element(e, body.results[0], &at);
        let address = x.join(e, &at, axes);
        e.store(output, address, element);
    });
}

/// A cube at work.
struct Cube<'a> {
    plan: &'a StreamPlan,
    tiles: Tiles,
    batch: Vec<Val>,
    rows: Span<'a>,
    columns: Span<'a>,
    /// The block's.
    positions: Span<'a>,
    /// Tiles of the operands of a score product.
    left: Shared,
    right: Shared,
    /// Scores, then weights: rows by positions.
    weights: Shared,
    /// Positions by columns.
    values: Shared,
    /// One number a row.
    of_rows: Shared,
}

impl<'a> Cube<'a> {
    /// Computes the block's scores.
    fn scores(&self, e: &mut Emit, x: &mut Exprs<'_>, products: &[Scores]) {
        // A unit has one position and every eighth row.
        let (unit, width, pitch) = (e.unit(), e.u32(POSITIONS), e.u32(PITCH));
        let (first, position) = (e.div(unit, width), e.rem(unit, width));
        let each = self.tiles.rows * POSITIONS / UNITS;
        let rows: Vec<_> = (0..each)
            .map(|n| {
                let below = e.u32(n * UNITS / POSITIONS);
                e.add(first, below)
            })
            .collect();
        let batch: At<'_> = (&self.plan.batch, &self.batch);
        let mut found: Vec<Vec<Var>> = Vec::new();
        for p in products {
            let nothing = e.f32(0.0);
            let sums: Vec<_> = rows.iter().map(|_| e.var(nothing)).collect();
            let total = x.total(e, &p.depth);
            let (from, step) = (e.u32(0), e.u32(DEPTH));
            e.for_step(from, total, step, |e, from| {
                let depth = Span { axes: &p.depth, from, count: DEPTH, total, pitch: 1 };
                x.scope(|x| {
                    stage(e, x, p.rows, self.left, [self.rows, depth], &[batch]);
                    stage(e, x, p.keys, self.right, [self.positions, depth], &[batch]);
                });
                e.sync();
                let (zero, one, end) = (e.u32(0), e.u32(1), e.u32(DEPTH));
                let key = e.mul(position, pitch);
                let starts: Vec<_> = rows.iter().map(|&row| e.mul(row, pitch)).collect();
                e.for_step(zero, end, one, |e, d| {
                    let at = e.add(key, d);
                    let key = e.load(self.right, at);
                    for (&sum, &start) in sums.iter().zip(&starts) {
                        let at = e.add(start, d);
                        let row = e.load(self.left, at);
                        let old = e.get(sum);
                        let new = e.fma(row, key, old);
                        e.set(sum, new);
                    }
                });
                e.sync();
            });
            found.push(sums);
        }
        let (at_position, exists) = self.positions.at(e, x, position);
        let least = e.f32(f32::NEG_INFINITY);
        for (n, &row) in rows.iter().enumerate() {
            let (at_row, _) = self.rows.at(e, x, row);
            let known = [batch, (self.rows.axes, &at_row[..]), (self.positions.axes, &at_position[..])];
            let score = x.scope(|x| {
                let body = x.body();
                for (p, sums) in products.iter().zip(&found) {
                    let sum = e.get(sums[n]);
                    x.define(p.product, index(&body.ty(p.product).axes, &known), sum);
                }
                x.element(e, self.plan.scores, &index(&body.ty(self.plan.scores).axes, &known))
            });
            let score = e.select(exists, score, least);
            let to = e.mul(row, pitch);
            let to = e.add(to, position);
            e.store(self.weights, to, score);
        }
    }

    /// Turns the block's scores into weights: a unit a row. What it kept of earlier blocks counts less by a factor of the row.
    fn weigh(&self, e: &mut Emit, max: Var, sum: Var) {
        let (unit, rows) = (e.unit(), e.u32(self.tiles.rows));
        let mine = e.lt(unit, rows);
        e.if_(mine, |e| {
            let (zero, one, end, pitch) = (e.u32(0), e.u32(1), e.u32(POSITIONS), e.u32(PITCH));
            let start = e.mul(unit, pitch);
            let old = e.get(max);
            e.for_step(zero, end, one, |e, j| {
                let at = e.add(start, j);
                let x = e.load(self.weights, at);
                let known = e.get(max);
                let larger = e.binary(Bin::Max, known, x);
                e.set(max, larger);
            });
            let new = e.get(max);
            let less = e.sub(old, new);
            let factor = e.unary(Un::Exp, less);
            e.store(self.of_rows, unit, factor);
            let known = e.get(sum);
            let known = e.mul(known, factor);
            e.set(sum, known);
            e.for_step(zero, end, one, |e, j| {
                let at = e.add(start, j);
                let x = e.load(self.weights, at);
                let x = e.sub(x, new);
                let weight = e.unary(Un::Exp, x);
                e.store(self.weights, at, weight);
                let known = e.get(sum);
                let more = e.add(known, weight);
                e.set(sum, more);
            });
        });
    }

    /// The rows of the cube that a unit sums, and its first column.
    fn share(&self, e: &mut Emit) -> (Vec<Val>, Val) {
        let (unit, across) = (e.unit(), e.u32(self.tiles.across));
        let (first, column) = (e.div(unit, across), e.rem(unit, across));
        let rows = (0..EACH).map(|n| {
            let below = e.u32(n * UNITS / self.tiles.across);
            e.add(first, below)
        });
        (rows.collect(), column)
    }

    /// Adds the block's values times their weights to the sums of rows and columns.
    fn add_values(&self, e: &mut Emit, x: &mut Exprs<'_>, sums: &[Vec<Var>]) {
        let (rows, column) = self.share(e);
        let pitch = e.u32(PITCH);
        let mut starts = Vec::new();
        for (&row, sums) in rows.iter().zip(sums) {
            let factor = e.load(self.of_rows, row);
            for &sum in sums {
                let old = e.get(sum);
                let less = e.mul(old, factor);
                e.set(sum, less);
            }
            starts.push(e.mul(row, pitch));
        }
        let (zero, one) = (e.u32(0), e.u32(1));
        let (end, step) = (e.u32(POSITIONS), e.u32(self.tiles.values));
        e.for_step(zero, end, step, |e, skip| {
            let from = e.add(self.positions.from, skip);
            let lines = Span { from, count: self.tiles.values, pitch: self.tiles.columns, ..self.positions };
            let batch: At<'_> = (&self.plan.batch, &self.batch);
            x.scope(|x| stage(e, x, self.plan.values, self.values, [lines, self.columns], &[batch]));
            e.sync();
            let count = e.u32(self.tiles.values);
            e.for_step(zero, count, one, |e, j| {
                let width = e.u32(self.tiles.columns);
                let line = e.mul(j, width);
                let line = e.add(line, column);
                let values: Vec<_> = (0..sums[0].len())
                    .map(|n| {
                        let right = e.u32(n as u32 * self.tiles.across);
                        let at = e.add(line, right);
                        e.load(self.values, at)
                    })
                    .collect();
                let position = e.add(skip, j);
                for (&start, sums) in starts.iter().zip(sums) {
                    let at = e.add(start, position);
                    let weight = e.load(self.weights, at);
                    for (&sum, &value) in sums.iter().zip(&values) {
                        let old = e.get(sum);
                        let new = e.fma(weight, value, old);
                        e.set(sum, new);
                    }
                }
            });
            e.sync();
        });
    }

    /// Leaves what is known of a part: for each row the sums, the maximum and the sum of its weights. `first` is the number of the
    /// first row there.
    fn keep(&self, e: &mut Emit, first: Val, [max, sum]: [Var; 2], sums: &[Vec<Var>], kept: Buf) {
        let columns = self.columns.total;
        let more = e.u32(KEPT);
        let pitch = e.add(columns, more);
        let line = |e: &mut Emit, row: Val| {
            let row = e.add(self.rows.from, row);
            let exists = e.lt(row, self.rows.total);
            let line = e.add(first, row);
            (e.mul(line, pitch), exists)
        };
        let (unit, rows) = (e.unit(), e.u32(self.tiles.rows));
        let (start, exists) = line(e, unit);
        let mine = e.lt(unit, rows);
        let mine = e.and(mine, exists);
        e.if_(mine, |e| {
            let one = e.u32(1);
            let at = e.add(start, columns);
            let max = e.get(max);
            e.store(kept, at, max);
            let at = e.add(at, one);
            let sum = e.get(sum);
            e.store(kept, at, sum);
        });
        let (rows, column) = self.share(e);
        for (&row, sums) in rows.iter().zip(sums) {
            let (start, row_exists) = line(e, row);
            for (n, &sum) in sums.iter().enumerate() {
                let right = e.u32(n as u32 * self.tiles.across);
                let number = e.add(column, right);
                let number = e.add(self.columns.from, number);
                let column_exists = e.lt(number, columns);
                let exists = e.and(row_exists, column_exists);
                e.if_(exists, |e| {
                    let at = e.add(start, number);
                    let sum = e.get(sum);
                    e.store(kept, at, sum);
                });
            }
        }
    }

    /// Divides by the sums of the weights, computes the epilogue, stores.
    fn store(&self, e: &mut Emit, x: &mut Exprs<'_>, sum: Var, sums: &[Vec<Var>], output: Buf) {
        let (unit, rows) = (e.unit(), e.u32(self.tiles.rows));
        let mine = e.lt(unit, rows);
        e.if_(mine, |e| {
            let sum = e.get(sum);
            let divisor = divisor(e, sum);
            e.store(self.of_rows, unit, divisor);
        });
        e.sync();
        let (rows, column) = self.share(e);
        for (&row, sums) in rows.iter().zip(sums) {
            let (at_row, row_exists) = self.rows.at(e, x, row);
            let divisor = e.load(self.of_rows, row);
            for (n, &sum) in sums.iter().enumerate() {
                let right = e.u32(n as u32 * self.tiles.across);
                let number = e.add(column, right);
                let (at_column, column_exists) = self.columns.at(e, x, number);
                let exists = e.and(row_exists, column_exists);
                let known = [
                    (&self.plan.batch[..], &self.batch[..]),
                    (self.rows.axes, &at_row[..]),
                    (self.columns.axes, &at_column[..]),
                ];
                e.if_(exists, |e| {
                    let sum = e.get(sum);
                    let y = e.div(sum, divisor);
                    finish(e, x, self.plan, &known, y, output);
                });
            }
        }
    }
}
