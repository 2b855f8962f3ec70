//! Streamed folds through CubeCL: a cube has some rows and columns of the product and walks the streamed axis in blocks.
//!
//! For each block of 32 positions the cube computes the scores of its rows, from tiles of both operands in shared memory, 32
//! numbers of depth at a time; turns them into weights with what it knows of the rows so far; and adds the block's values, tile
//! by tile, to the sums that each unit keeps in registers. All of it is f32; weights are not rounded, whatever dtype
//! the body gives them. A sum without a softmax takes the scores as they are; one that weighs nothing, or a maximum, folds them alone.
//! A score product whose operands both have the streamed axis, or one of them that and rows, is
//! computed element by element instead.
//!
//! With few rows and many positions, as in decode, the cubes of one launch would be few. A device then shares the positions out: the
//! cubes of a first launch leave what they know of theirs in memory of the device, and a second launch merges it. To the program
//! both are one launch.
//!
//! Of a block that the mask hides from all rows of the cube, nothing is read. The units still wait for each other as often, since they
//! must do so together.
//!
//! Beyond an edge, the last element is read in place of one that does not exist, and counts as nothing.

use latentc_ir::{AxisId, Function, Op, ValueId};

use super::emit::{Bin, Buf, Cmp, Elem, Emit, Shared, Un, Val, Var};
use super::expr::Exprs;
use super::split::KEPT;
use crate::contract::ContractPlan;
use crate::stream::{Monoid, StreamPlan, cone, is_elementwise, keys};

/// Units of a cube.
pub(crate) const UNITS: u32 = 256;
/// Positions of a block.
pub(super) const POSITIONS: u32 = 32;
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
        let sizes = [
            self.rows * PITCH,
            POSITIONS * PITCH,
            self.rows * PITCH,
            self.values * self.columns,
            self.rows,
            1,
        ];
        sizes.iter().map(|&n| (n as usize * Elem::F32.bytes()).next_multiple_of(16)).sum()
    }
}

/// Where one is along some axes.
pub(super) type At<'a> = (&'a [AxisId], &'a [Val]);

/// The index of a tensor with these axes.
pub(super) fn index(axes: &[AxisId], known: &[At<'_>]) -> Vec<Val> {
    let along = |a: &AxisId| known.iter().find_map(|(of, at)| of.iter().position(|k| k == a).map(|n| at[n]));
    axes.iter().map(|a| along(a).expect("the plan knows every axis")).collect()
}

/// Consecutive numbers of some axes together.
#[derive(Clone, Copy)]
pub(super) struct Span<'a> {
    pub(super) axes: &'a [AxisId],
    /// The first number.
    pub(super) from: Val,
    /// How many.
    pub(super) count: u32,
    /// The number of all indices of the axes, or of those that there are to the kernel, at least 1.
    pub(super) total: Val,
    /// From one number to the next in a tile.
    pub(super) pitch: u32,
}

impl Span<'_> {
    /// A number of the span as an index, and whether there is such a number.
    pub(super) fn at(&self, e: &mut Emit, x: &Exprs<'_>, n: Val) -> (Vec<Val>, Val) {
        let number = e.add(self.from, n);
        let (number, exists) = self.clamped(e, number);
        (x.split(e, number, self.axes), exists)
    }

    /// A number of the axes that there is in place of one, and whether it is the same.
    pub(super) fn clamped(&self, e: &mut Emit, number: Val) -> (Val, Val) {
        let exists = e.lt(number, self.total);
        let one = e.u32(1);
        let last = e.sub(self.total, one);
        (e.binary(Bin::Min, number, last), exists)
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
#[derive(Clone, Debug)]
pub(super) struct Scores {
    pub(super) product: ValueId,
    /// The operand that the rows have.
    pub(super) rows: ValueId,
    /// The operand that the positions have.
    pub(super) keys: ValueId,
    pub(super) depth: Vec<AxisId>,
}

/// The products of the scores that tiles can compute.
pub(super) fn products(body: &Function, plan: &StreamPlan) -> Vec<Scores> {
    let below = cone(body, plan.scores, is_elementwise);
    let products = body.body.iter().filter(|i| i.op == Op::Contract && below.contains(&i.result()));
    let tiled = products.filter_map(|i| {
        let (keys, rows) = keys(body, plan.along, i)?;
        let groups = ContractPlan::new(&body.ty(keys).axes, &body.ty(rows).axes, &body.ty(i.result()).axes);
        let shared_by_rows = !body.ty(keys).axes.iter().any(|a| plan.m.contains(a));
        shared_by_rows.then_some(Scores { product: i.result(), rows, keys, depth: groups.k })
    });
    tiled.collect()
}

/// What a cube walks: the positions of an index of the batch, or a part of them.
pub(super) struct Walk {
    pub(super) repeat: Val,
    part: Val,
    /// The first position, and the first beyond.
    pub(super) from: Val,
    pub(super) to: Val,
    /// Whether there is such an index, and such a part.
    pub(super) inside: Val,
}

impl Walk {
    /// For a number that counts the indices of the batch, and then the parts, each of so many positions if there are several.
    pub(super) fn of(
        e: &mut Emit,
        (number, repeats): (Val, Val),
        positions: Val,
        chunk: Option<Val>,
    ) -> Walk {
        let Some(chunk) = chunk else {
            let (zero, inside) = (e.u32(0), e.lt(number, repeats));
            return Walk { repeat: number, part: zero, from: zero, to: positions, inside };
        };
        let (part, repeat) = (e.div(number, repeats), e.rem(number, repeats));
        let from = e.mul(part, chunk);
        let end = e.add(from, chunk);
        let to = e.binary(Bin::Min, end, positions);
        Walk { repeat, part, from, to, inside: e.lt(from, positions) }
    }

    /// The number of the first row of the index, of so many for each, among what all parts keep.
    pub(super) fn first_line(&self, e: &mut Emit, repeats: Val, rows: Val) -> Val {
        let lines = e.mul(repeats, rows);
        let first = e.mul(self.part, lines);
        let before = e.mul(self.repeat, rows);
        e.add(first, before)
    }
}

/// The instructions of the kernel, or of its first part, which gives the number of positions of a part.
pub(crate) fn emit(e: &mut Emit, mut x: Exprs<'_>, plan: &StreamPlan, chunk: Option<Val>, output: Buf) {
    let tiles = Tiles::of(x.body(), plan);
    let [repeats, rows, columns] = [&plan.batch, &plan.m, &plan.n].map(|axes| x.total(e, axes));

    // Cubes are numbered along the columns, then the rows, the batch, the parts.
    let cube = e.cube();
    let [row_tiles, column_tiles] =
        [(rows, tiles.rows), (columns, tiles.columns)].map(|(size, tile)| e.tiles(size, tile));
    let row_of_tiles = e.div(cube, column_tiles);
    let repeat = e.div(row_of_tiles, row_tiles);
    let [row0, column0] = [(row_of_tiles, row_tiles, tiles.rows), (cube, column_tiles, tiles.columns)].map(
        |(number, count, tile)| {
            let (number, tile) = (e.rem(number, count), e.u32(tile));
            e.mul(number, tile)
        },
    );
    let positions = x.extent(plan.along);
    let walk = Walk::of(e, (repeat, repeats), positions, chunk);
    let (from, to) = (walk.from, walk.to);
    // All units of a cube agree.
    e.if_(walk.inside, |e| {
        let batch = x.split(e, walk.repeat, &plan.batch);
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
            seen: e.shared(Elem::U32, 1),
        };
        let (nothing, least) = (e.f32(0.0), e.f32(least(plan.by)));
        let (max, sum) = (e.var(least), e.var(nothing));
        let width = tiles.columns / tiles.across;
        let sums: Vec<Vec<Var>> = (0..EACH).map(|_| (0..width).map(|_| e.var(nothing)).collect()).collect();
        let products = products(x.body(), plan);
        let step = e.u32(POSITIONS);
        e.for_step(from, to, step, |e, first| {
            cube.positions.from = first;
            x.scope(|x| {
                let seen = cube.seen(e, x);
                cube.scores(e, x, seen, &products);
                e.sync();
                match plan.by {
                    Monoid::Softmax => {
                        where_seen(e, seen, |e| cube.weigh(e, max, sum));
                        e.sync();
                        if plan.values.is_some() {
                            cube.add_values(e, x, seen, &sums);
                        }
                    }
                    Monoid::Sum => cube.add_values(e, x, seen, &sums),
                    Monoid::Max => {
                        where_seen(e, seen, |e| cube.raise(e, max));
                        e.sync();
                    }
                }
            });
        });
        if chunk.is_none() {
            match (plan.by, plan.top) {
                (Monoid::Softmax, Some(top)) => {
                    cube.store_rows(e, &mut x, &[(plan.product, sum), (top, max)], output);
                }
                (Monoid::Softmax, None) | (Monoid::Sum, _) => cube.store(e, &mut x, sum, &sums, output),
                (Monoid::Max, _) => cube.store_rows(e, &mut x, &[(plan.product, max)], output),
            }
        } else {
            let first = walk.first_line(e, repeats, rows);
            cube.keep(e, first, [max, sum], &sums, output);
        }
    });
}

/// What a maximum begins with.
pub(super) fn least(by: Monoid) -> f32 {
    match by {
        Monoid::Softmax | Monoid::Sum => f32::MIN,
        Monoid::Max => f32::NEG_INFINITY,
    }
}

/// What is left out in a block that no row sees.
pub(super) fn where_seen(e: &mut Emit, seen: Option<Val>, body: impl FnOnce(&mut Emit)) {
    match seen {
        Some(seen) => e.if_(seen, body),
        None => body(e),
    }
}

/// Whether any of these rows sees any of these positions, for all units alike. The flag is not free before units have met again.
pub(super) fn seen(
    e: &mut Emit,
    x: &mut Exprs<'_>,
    (plan, mask, batch): (&StreamPlan, ValueId, &[Val]),
    [rows, positions]: [Span<'_>; 2],
    (flag, units): (Shared, u32),
) -> Val {
    let (zero, one, unit, width) = (e.u32(0), e.u32(1), e.unit(), e.u32(positions.count));
    let first = e.cmp(Cmp::Eq, unit, zero);
    e.if_(first, |e| e.store(flag, zero, zero));
    e.sync();
    let (line, number) = (e.div(unit, width), e.rem(unit, width));
    let (at_position, exists) = positions.at(e, x, number);
    let mut any = e.bool(false);
    for n in 0..rows.count * positions.count / units {
        let below = e.u32(n * units / positions.count);
        let row = e.add(line, below);
        let (at_row, _) = rows.at(e, x, row);
        let known = [(&plan.batch[..], batch), (rows.axes, &at_row[..]), (positions.axes, &at_position[..])];
        let one = x.scope(|x| {
            let axes = &x.body().ty(mask).axes;
            x.element(e, mask, &index(axes, &known))
        });
        any = e.or(any, one);
    }
    let any = e.and(any, exists);
    e.if_(any, |e| e.store(flag, zero, one));
    e.sync();
    let seen = e.load(flag, zero);
    let seen = e.cast(seen, Elem::U32);
    e.cmp(Cmp::Eq, seen, one)
}

/// What a row is divided by. A row of nothing but -inf is zeros.
pub(super) fn divisor(e: &mut Emit, sum: Val) -> Val {
    let (zero, one) = (e.f32(0.0), e.f32(1.0));
    let empty = e.cmp(Cmp::Eq, sum, zero);
    e.select(empty, one, sum)
}

/// Computes the epilogue of what folds came to at an index and stores it.
pub(super) fn finish(
    e: &mut Emit,
    x: &mut Exprs<'_>,
    known: &[At<'_>],
    folded: impl IntoIterator<Item = (ValueId, Val)>,
    output: Buf,
) {
    x.scope(|x| {
        let body = x.body();
        for (fold, y) in folded {
            x.define(fold, index(&body.ty(fold).axes, known), y);
        }
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
    /// Whether the mask lets any row see the block.
    seen: Shared,
}

impl<'a> Cube<'a> {
    /// The scores that a unit computes: one position, and every eighth row.
    fn scored(&self, e: &mut Emit) -> (Vec<Val>, Val) {
        let (unit, width) = (e.unit(), e.u32(POSITIONS));
        let (first, position) = (e.div(unit, width), e.rem(unit, width));
        let rows = (0..self.tiles.rows * POSITIONS / UNITS).map(|n| {
            let below = e.u32(n * UNITS / POSITIONS);
            e.add(first, below)
        });
        (rows.collect(), position)
    }

    /// Whether any row of the cube sees the block, for all units alike; `None` if there is no mask to tell.
    fn seen(&self, e: &mut Emit, x: &mut Exprs<'_>) -> Option<Val> {
        let mask = self.plan.mask?;
        let of = (self.plan, mask, &self.batch[..]);
        Some(seen(e, x, of, [self.rows, self.positions], (self.seen, UNITS)))
    }

    /// Computes the block's scores.
    fn scores(&self, e: &mut Emit, x: &mut Exprs<'_>, seen: Option<Val>, products: &[Scores]) {
        let (rows, position) = self.scored(e);
        let pitch = e.u32(PITCH);
        let batch: At<'_> = (&self.plan.batch, &self.batch);
        let mut found: Vec<Vec<Var>> = Vec::new();
        for p in products {
            let nothing = e.f32(0.0);
            let sums: Vec<_> = rows.iter().map(|_| e.var(nothing)).collect();
            let total = x.total(e, &p.depth);
            let (from, step) = (e.u32(0), e.u32(DEPTH));
            e.for_step(from, total, step, |e, from| {
                let depth = Span { axes: &p.depth, from, count: DEPTH, total, pitch: 1 };
                where_seen(e, seen, |e| {
                    x.scope(|x| {
                        stage(e, x, p.rows, self.left, [self.rows, depth], &[batch]);
                        stage(e, x, p.keys, self.right, [self.positions, depth], &[batch]);
                    });
                });
                e.sync();
                where_seen(e, seen, |e| {
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
                });
                e.sync();
            });
            found.push(sums);
        }
        where_seen(e, seen, |e| {
            let (at_position, exists) = self.positions.at(e, x, position);
            let nothing = e.f32(if self.plan.by == Monoid::Sum { 0.0 } else { f32::NEG_INFINITY });
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
                let score = e.select(exists, score, nothing);
                let to = e.mul(row, pitch);
                let to = e.add(to, position);
                e.store(self.weights, to, score);
            }
        });
    }

    /// Turns the block's scores into weights: a unit a row. What it kept of earlier blocks counts less by a factor of the row.
    fn weigh(&self, e: &mut Emit, max: Var, sum: Var) {
        let (unit, rows) = (e.unit(), e.u32(self.tiles.rows));
        let mine = e.lt(unit, rows);
        e.if_(mine, |e| {
            let (zero, one, end, pitch) = (e.u32(0), e.u32(1), e.u32(POSITIONS), e.u32(PITCH));
            let start = e.mul(unit, pitch);
            let old = e.get(max);
            self.raise_row(e, start, max);
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

    /// Takes the block's scores into the maximum of a row, which begin there.
    fn raise_row(&self, e: &mut Emit, start: Val, max: Var) {
        let (zero, one, end) = (e.u32(0), e.u32(1), e.u32(POSITIONS));
        e.for_step(zero, end, one, |e, j| {
            let at = e.add(start, j);
            let x = e.load(self.weights, at);
            let known = e.get(max);
            let larger = e.binary(Bin::Max, known, x);
            e.set(max, larger);
        });
    }

    /// Takes the block's scores into the maxima: a unit a row.
    fn raise(&self, e: &mut Emit, max: Var) {
        let (unit, rows) = (e.unit(), e.u32(self.tiles.rows));
        let mine = e.lt(unit, rows);
        e.if_(mine, |e| {
            let pitch = e.u32(PITCH);
            let start = e.mul(unit, pitch);
            self.raise_row(e, start, max);
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
    fn add_values(&self, e: &mut Emit, x: &mut Exprs<'_>, seen: Option<Val>, sums: &[Vec<Var>]) {
        let (rows, column) = self.share(e);
        let pitch = e.u32(PITCH);
        let starts: Vec<_> = rows.iter().map(|&row| e.mul(row, pitch)).collect();
        let softmax = self.plan.by == Monoid::Softmax;
        where_seen(e, seen.filter(|_| softmax), |e| {
            for (&row, sums) in rows.iter().zip(sums).filter(|_| softmax) {
                let factor = e.load(self.of_rows, row);
                for &sum in sums {
                    let old = e.get(sum);
                    let less = e.mul(old, factor);
                    e.set(sum, less);
                }
            }
        });
        let (zero, one) = (e.u32(0), e.u32(1));
        let (end, step) = (e.u32(POSITIONS), e.u32(self.tiles.values));
        e.for_step(zero, end, step, |e, skip| {
            let from = e.add(self.positions.from, skip);
            let lines = Span { from, count: self.tiles.values, pitch: self.tiles.columns, ..self.positions };
            let batch: At<'_> = (&self.plan.batch, &self.batch);
            if let Some(values) = self.plan.values {
                where_seen(e, seen, |e| {
                    x.scope(|x| stage(e, x, values, self.values, [lines, self.columns], &[batch]));
                });
                e.sync();
            }
            let count = e.u32(self.tiles.values);
            where_seen(e, seen, |e| {
                e.for_step(zero, count, one, |e, j| {
                    let width = e.u32(self.tiles.columns);
                    let line = e.mul(j, width);
                    let line = e.add(line, column);
                    let values: Vec<_> = (0..sums[0].len())
                        .map(|n| {
                            let right = e.u32(n as u32 * self.tiles.across);
                            let at = e.add(line, right);
                            // What weighs nothing counts once.
                            if self.plan.values.is_some() { e.load(self.values, at) } else { e.f32(1.0) }
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
                })
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

    /// Computes the epilogue of what was folded of each row and stores it: a unit has a row.
    fn store_rows(&self, e: &mut Emit, x: &mut Exprs<'_>, of: &[(ValueId, Var)], output: Buf) {
        let (unit, rows) = (e.unit(), e.u32(self.tiles.rows));
        let (at_row, exists) = self.rows.at(e, x, unit);
        let mine = e.lt(unit, rows);
        let mine = e.and(mine, exists);
        let known = [(&self.plan.batch[..], &self.batch[..]), (self.rows.axes, &at_row[..])];
        e.if_(mine, |e| {
            let folded: Vec<_> = of.iter().map(|&(fold, y)| (fold, e.get(y))).collect();
            finish(e, x, &known, folded, output);
        });
    }

    /// Divides by the sums of the weights if these are a softmax, computes the epilogue, stores.
    fn store(&self, e: &mut Emit, x: &mut Exprs<'_>, sum: Var, sums: &[Vec<Var>], output: Buf) {
        let softmax = self.plan.by == Monoid::Softmax;
        if softmax {
            let (unit, rows) = (e.unit(), e.u32(self.tiles.rows));
            let mine = e.lt(unit, rows);
            e.if_(mine, |e| {
                let sum = e.get(sum);
                let divisor = divisor(e, sum);
                e.store(self.of_rows, unit, divisor);
            });
            e.sync();
        }
        let (rows, column) = self.share(e);
        for (&row, sums) in rows.iter().zip(sums) {
            let (at_row, row_exists) = self.rows.at(e, x, row);
            let divisor = softmax.then(|| e.load(self.of_rows, row));
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
                    let y = divisor.map_or(sum, |divisor| e.div(sum, divisor));
                    finish(e, x, &known, [(self.plan.product, y)], output);
                });
            }
        }
    }
}
