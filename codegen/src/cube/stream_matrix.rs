//! Streams on tensor cores: both products of a block are multiplied by `mma`, and the scores between them stay in registers.
//!
//! A cube of 4 or 8 planes has 16, 32, 64 or 128 rows and all columns of the product (as many rows as there are, up to that). Rows are
//! what the plan calls *m*: tokens of a head, or tokens and heads, where these share keys. The operands of the rows lie in shared memory
//! from the start; of each block of positions, keys and values are brought there. Where they lie in memory in packs of 16 bytes, they are
//! copied past the registers, into one of two stages, while the block before is worked on; where they are expressions, they are decoded
//! on the way. Values that are the keys of a product lie there once.
//!
//! Planes that have the same rows share out the block's positions for the scores and the columns for the sums: scores then pass
//! through shared memory, as f32. Each plane turns those of its rows into weights (a unit has two rows, four units a row), rounds them to
//! the dtype of the values, and multiplies. Operands of rows in f32 are rounded to the dtype of the keys. All else is f32; sums of
//! weights are of those that were not rounded. `check/bound.rs` knows of both.
//!
//! A mask that lets each row see the positions up to a number, as causal ones do, is an end for the cube's walk, and a position up to
//! which it need not be asked. Any other is asked for each block, as in [`stream`](super::stream).

use latentc_ir::{AxisId, Binary, DType, Function, Op, ValueId};

use super::emit::{Array, Bin, Buf, Cmp, Elem, Emit, Pack, Shared, Val, Var};
use super::expr::Exprs;
use super::fragment::{
    Lines, PACK, Plane, as_left, clear, in_packs, left, load_columns, load_eight, load_rows, sums,
};
use super::split::{HALF, KEPT, SHARED};
use super::stream::{At, Scores, Span, Walk, divisor, finish, index, least, products, seen, where_seen};
use super::target::Target;
use crate::few::gcd;
use crate::stream::{Monoid, StreamPlan, cone, defined, is_elementwise};

/// Packs of rows that are expressions or in f32 that a unit reads at once: nothing is summed yet.
const ROWS_AT_ONCE: u32 = 4;

/// A stream whose products tensor cores can multiply.
#[derive(Clone, Debug)]
pub(crate) struct MatrixPlan {
    pub(crate) stream: StreamPlan,
    /// What is weighed, if anything is.
    values: Option<ValueId>,
    /// Of keys and values, and what else is multiplied is rounded to.
    pub(crate) dtype: DType,
    scores: Vec<Scores>,
    /// For each value that the scores are made of: which of these products it is the sum of.
    sums: Vec<(ValueId, Vec<usize>)>,
    /// The depth of each product.
    depths: Vec<u32>,
    /// The number of columns.
    columns: u32,
    /// The product whose keys are the values.
    shared: Option<usize>,
    /// Blocks are brought while the one before is worked on: they lie in packs, and none is left out.
    ahead: bool,
}

/// How a cube is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiling {
    /// Rows of a cube.
    pub(crate) rows: u32,
    /// Columns of a cube; none if nothing is weighed.
    pub(crate) columns: u32,
    /// Planes of a cube.
    planes: u32,
    /// Planes that have the same rows.
    across: u32,
    /// Times 16 rows that a plane has.
    high: u32,
    /// Positions of a block.
    positions: u32,
}

impl MatrixPlan {
    /// Of a body that can be computed so.
    pub(crate) fn of(body: &Function) -> Option<MatrixPlan> {
        let stream = StreamPlan::of(body).ok()?;
        let values = stream.values;
        let dtype = stream.narrow(body)?;
        // Weights that no softmax makes may lie beyond what f16 has.
        let elem = dtype == DType::Bf16 || (dtype == DType::F16 && stream.by == Monoid::Softmax);
        // Beyond 65504 there is nothing in f16.
        let fits = |v: ValueId| {
            body.ty(v).dtype == dtype || (dtype == DType::Bf16 && body.ty(v).dtype == DType::F32)
        };
        let scores = products(body, &stream);
        let below = cone(body, stream.scores, is_elementwise);
        let all = body.body.iter().filter(|i| i.op == Op::Contract && below.contains(&i.result())).count();
        let dtypes = scores.iter().all(|p| body.ty(p.keys).dtype == dtype && fits(p.rows));
        if !elem || scores.is_empty() || scores.len() != all || !dtypes {
            return None;
        }
        let number = |axes: &[AxisId]| {
            let sizes = axes.iter().map(|&a| body.axis(a).size.fixed());
            sizes
                .into_iter()
                .try_fold(1u64, |n, size| n.checked_mul(size?))
                .and_then(|n| u32::try_from(n).ok())
        };
        let depths = scores.iter().map(|p| number(&p.depth)).collect::<Option<Vec<_>>>()?;
        let columns = match values {
            Some(_) => number(&stream.n).filter(|&n| n > 0)?,
            None => 0,
        };
        let shared = scores.iter().position(|p| Some(p.keys) == values && p.depth == stream.n);
        let sums = sums_of(body, &stream, &scores);
        let packs = scores.iter().all(|p| packed(body, p.keys, &p.depth, dtype))
            && values.is_none_or(|v| packed(body, v, &stream.n, dtype));
        let ahead = packs && stream.mask.is_none_or(|mask| limit(body, &stream, mask).is_some());
        let plan = MatrixPlan { stream, values, dtype, scores, sums, depths, columns, shared, ahead };
        (!plan.heights().is_empty()).then_some(plan)
    }

    /// The numbers of 16 rows that a cube can have, of 1, 2, 4 and 8.
    pub(crate) fn heights(&self) -> Vec<u8> {
        [1, 2, 4, 8].into_iter().filter(|&tall| self.tiling(tall).is_some()).collect()
    }

    /// The cube with so many times 16 rows, if it has room for all columns.
    pub(crate) fn tiling(&self, tall: u8) -> Option<Tiling> {
        let narrow = self.columns <= 128;
        let (planes, across, high, positions) = match tall {
            1 => (4, 4, 1, [64, 32]),
            2 => (8, 4, 1, [32, 32]),
            4 if narrow => (4, 1, 1, [64, 32]),
            4 => (8, 2, 1, [64, 32]),
            8 if narrow => (4, 1, 2, [32, 32]),
            _ => return None,
        };
        let rows = 16 * u32::from(tall);
        let columns = self.columns.next_multiple_of(16 * across);
        // Sums of 64 tiles are half of a unit's registers.
        if columns > 512 {
            return None;
        }
        let tiling = |positions| Tiling { rows, columns, planes, across, high, positions };
        let fits = |most: usize| {
            let mut sizes = positions.into_iter().map(tiling);
            sizes.find(|t| self.shared_bytes(*t) <= most)
        };
        fits(HALF).or_else(|| fits(SHARED))
    }

    /// Numbers that a line of the keys' tile has for a product.
    fn width(&self, t: Tiling, product: usize) -> u32 {
        let width = self.depths[product].next_multiple_of(16);
        if self.shared == Some(product) { width.max(t.columns) } else { width }
    }

    /// Where the numbers of a product begin in such a line.
    fn first(&self, t: Tiling, product: usize) -> u32 {
        (0..product).map(|p| self.width(t, p)).sum()
    }

    /// From one line of the keys' tile to the next. Eight meet in no bank.
    fn key_pitch(&self, t: Tiling) -> u32 {
        self.first(t, self.scores.len()) + PACK
    }

    /// Where the depth of a product begins in a line of the rows' tile.
    fn row_first(&self, product: usize) -> u32 {
        self.depths[..product].iter().map(|d| d.next_multiple_of(16)).sum()
    }

    fn row_pitch(&self) -> u32 {
        self.row_first(self.scores.len()) + PACK
    }

    fn elements(&self, t: Tiling) -> [u32; 4] {
        let weighed = self.values.is_some() && self.shared.is_none();
        let values = if weighed { t.positions * (t.columns + PACK) } else { 0 };
        let scores = if t.across > 1 { t.rows * t.score_pitch() } else { 0 };
        let stages = if self.ahead { 2 } else { 1 };
        [t.rows * self.row_pitch(), stages * t.positions * self.key_pitch(t), stages * values, scores]
    }

    /// Bytes of shared memory.
    pub(crate) fn shared_bytes(&self, t: Tiling) -> usize {
        let [rows, keys, values, scores] = self.elements(t);
        let fold = if self.stream.mask.is_some() { t.units() } else { 0 };
        (2 * (rows + keys + values) + 4 * (scores + fold)) as usize
    }
}

impl Tiling {
    /// Columns of the grid's tiles.
    pub(crate) fn wide(self) -> u32 {
        self.columns.max(1)
    }

    /// Units of a cube.
    pub(crate) fn units(self) -> u32 {
        32 * self.planes
    }

    /// From one row of scores to the next: units that write two neighbours meet in no bank.
    fn score_pitch(self) -> u32 {
        self.positions + 8
    }

    /// Tiles of columns that a plane sums.
    fn tiles(self) -> u32 {
        self.columns / self.across / 8
    }

    /// Tiles of positions that a plane scores.
    fn scored(self) -> u32 {
        self.positions / self.across / 8
    }
}

/// What the scores are made of: sums of products that are wanted for nothing else are one value.
fn sums_of(body: &Function, plan: &StreamPlan, scores: &[Scores]) -> Vec<(ValueId, Vec<usize>)> {
    let below = cone(body, plan.scores, is_elementwise);
    let users = |v: ValueId| {
        let args = body.body.iter().flat_map(|i| &i.args);
        args.filter(|a| **a == v).count()
    };
    let mut found: Vec<(ValueId, Vec<usize>)> =
        scores.iter().enumerate().map(|(n, p)| (p.product, vec![n])).collect();
    for inst in body.body.iter().filter(|i| below.contains(&i.result())) {
        let (Op::Binary(Binary::Add), &[a, b]) = (&inst.op, &inst.args[..]) else { continue };
        let of = |v: ValueId| found.iter().position(|(sum, _)| *sum == v && users(v) == 1);
        if let (Some(one), Some(other)) = (of(a), of(b)) {
            let (_, more) = found[other].clone();
            found[one].1.extend(more);
            found[one].0 = inst.result();
            found.remove(other);
        }
    }
    found
}

/// A number for each row, up to which positions are seen; `all` says that the mask asks for nothing else.
struct Limit {
    value: ValueId,
    /// That position is seen too.
    inclusive: bool,
    all: bool,
}

/// Of the mask that a value is.
fn limit(body: &Function, plan: &StreamPlan, mask: ValueId) -> Option<Limit> {
    let inst = defined(body, mask)?;
    let position = |v: ValueId| defined(body, v).is_some_and(|i| i.op == Op::Position { axis: plan.along });
    match (&inst.op, &inst.args[..]) {
        (Op::Binary(op @ (Binary::Le | Binary::Lt)), &[at, value])
            if position(at) && body.ty(value).dtype == DType::I32 && !body.ty(value).has(plan.along) =>
        {
            Some(Limit { value, inclusive: *op == Binary::Le, all: true })
        }
        (Op::Binary(Binary::And), args) => {
            let mut found = args.iter().filter_map(|&a| limit(body, plan, a));
            found.next().map(|l| Limit { all: false, ..l })
        }
        _ => None,
    }
}

/// The instructions of the kernel, or of its first part, which gives the number of positions of a part.
pub(crate) fn emit(
    e: &mut Emit,
    mut x: Exprs<'_>,
    (plan, tall): (&MatrixPlan, u8),
    chunk: Option<Val>,
    (inputs, elem): (&dyn Fn(ValueId) -> Option<Buf>, Elem),
    output: Buf,
) {
    let t = plan.tiling(tall).expect("checked");
    let stream = &plan.stream;
    let [repeats, rows, columns] = [&stream.batch, &stream.m, &stream.n].map(|axes| x.total(e, axes));
    // Cubes are numbered along the columns, then the rows, the batch, the parts.
    let cube = e.cube();
    let [row_tiles, column_tiles] =
        [(rows, t.rows), (columns, t.wide())].map(|(size, tile)| e.tiles(size, tile));
    let row_of_tiles = e.div(cube, column_tiles);
    let repeat = e.div(row_of_tiles, row_tiles);
    // The last rows see most: they come first.
    let (one, tile) = (e.u32(1), e.rem(row_of_tiles, row_tiles));
    let last = e.sub(row_tiles, one);
    let (tile, column_tile) = (e.sub(last, tile), e.rem(cube, column_tiles));
    let [row0, column0] = [(tile, t.rows), (column_tile, t.wide())].map(|(number, size)| {
        let size = e.u32(size);
        e.mul(number, size)
    });
    let positions = x.extent(stream.along);
    let walk = Walk::of(e, (repeat, repeats), positions, chunk);
    let (from, to) = (walk.from, walk.to);
    // All units of a cube agree.
    e.if_(walk.inside, |e| {
        let batch = x.split(e, walk.repeat, &stream.batch);
        let along = [stream.along];
        let plane = Plane::new(e);
        let across = e.u32(t.across);
        let (down, right) = (e.div(plane.number, across), e.rem(plane.number, across));
        let [left, keys, values, scores] = plan.elements(t);
        let keys = e.shared(elem, keys as usize);
        let mut cube = Cube {
            plan,
            t,
            elem,
            inputs,
            batch,
            rows: Span { axes: &stream.m, from: row0, count: t.rows, total: rows, pitch: 0 },
            columns: Span { axes: &stream.n, from: column0, count: t.columns, total: columns, pitch: 0 },
            positions: Span { axes: &along, from, count: t.positions, total: to, pitch: 0 },
            left: e.shared(elem, left as usize),
            keys,
            values: if values > 0 { e.shared(elem, values as usize) } else { keys },
            scores: (scores > 0).then(|| e.shared(Elem::F32, scores as usize)),
            plane,
            down,
            right,
            mine: Vec::new(),
            stage: e.u32(0),
        };
        cube.walk(e, &mut x, (from, to), |cube, e, x, [max, sum], sums| match chunk {
            None => cube.store(e, x, [&max, &sum], sums, output),
            Some(_) => {
                let first = walk.first_line(e, repeats, rows);
                cube.keep(e, first, [&max, &sum], sums, output);
            }
        });
    });
}

/// A row of a unit: its number in the cube, its index, and whether there is such a row.
struct Row {
    number: Val,
    index: Vec<Val>,
    exists: Val,
}

/// A cube at work.
struct Cube<'a> {
    plan: &'a MatrixPlan,
    t: Tiling,
    elem: Elem,
    inputs: &'a dyn Fn(ValueId) -> Option<Buf>,
    batch: Vec<Val>,
    rows: Span<'a>,
    columns: Span<'a>,
    /// The block's; there are those only that some row sees.
    positions: Span<'a>,
    /// The rows' operands: rows by depth.
    left: Shared,
    /// Positions by depth.
    keys: Shared,
    /// Positions by columns, if they are not the keys.
    values: Shared,
    /// Rows by positions, if planes share them.
    scores: Option<Shared>,
    plane: Plane,
    /// The plane's rows, and its columns and positions, among those of the cube.
    down: Val,
    right: Val,
    /// The rows of the unit, two of each tile.
    mine: Vec<Row>,
    /// Which stage the block at hand lies in, of as many as there are.
    stage: Val,
}

/// What a unit keeps of its rows.
type OfRows = Vec<Var>;
/// Tiles of sums, for each 16 rows of a plane.
type Sums = Vec<Vec<Array>>;

impl<'a> Cube<'a> {
    fn stream(&self) -> &'a StreamPlan {
        &self.plan.stream
    }

    /// Walks the positions, and ends with what is made of the sums.
    fn walk<'x>(
        &mut self,
        e: &mut Emit,
        x: &mut Exprs<'x>,
        (from, to): (Val, Val),
        end: impl FnOnce(&Self, &mut Emit, &mut Exprs<'x>, [OfRows; 2], &Sums),
    ) {
        let (plan, t, body) = (self.plan, self.t, x.body());
        let of_plane = e.u32(16 * t.high);
        let first = e.mul(self.down, of_plane);
        let first = e.add(first, self.plane.row);
        self.mine = (0..2 * t.high)
            .map(|n| {
                let below = e.u32(8 * n);
                let number = e.add(first, below);
                let (index, exists) = self.rows.at(e, x, number);
                Row { number, index, exists }
            })
            .collect();
        self.once_for_rows(e, x);
        for (n, p) in plan.scores.iter().enumerate() {
            let width = plan.depths[n].next_multiple_of(16);
            let to = (self.left, plan.row_first(n), plan.row_pitch(), e.u32(0));
            let width = (e.u32(0), width, ROWS_AT_ONCE);
            self.stage(e, x, (p.rows, &p.depth, plan.depths[n]), self.rows, width, to);
        }
        let mask = self.stream().mask.map(|mask| (mask, limit(body, self.stream(), mask)));
        let flag = mask.as_ref().map(|_| e.shared(Elem::I32, t.units() as usize));
        // The first position that no row sees, and the first that not all of them do: for those no mask is asked.
        let (until, free) = match (&mask, flag) {
            (Some((_, Some(limit))), Some(scratch)) => {
                let (until, free) = self.limits(e, x, limit, scratch, to);
                (until, limit.all.then_some(free))
            }
            (Some(_), _) => (to, None),
            (None, _) => (to, Some(to)),
        };
        self.positions.total = until;
        let (nothing, least) = (e.f32(0.0), e.f32(least(self.stream().by)));
        let max: OfRows = self.mine.iter().map(|_| e.var(least)).collect();
        let sum: OfRows = self.mine.iter().map(|_| e.var(nothing)).collect();
        let sums = tiles(e, t.high, t.tiles());
        let (step, zero, one) = (e.u32(t.positions), e.u32(0), e.u32(1));
        let stage = e.var(zero);
        self.positions.from = from;
        if plan.ahead {
            let some = e.lt(from, until);
            e.if_(some, |e| x.scope(|x| self.bring(e, x)));
        }
        let marked = mask.as_ref().map(|m| m.0);
        e.for_step(from, until, step, |e, first| {
            x.scope(|x| {
                if plan.ahead {
                    // What was begun in the round before is there, and what that round read is free.
                    e.await_copies();
                    e.sync();
                    let here = e.get(stage);
                    let next = e.add(first, step);
                    let some = e.lt(next, until);
                    (self.stage, self.positions.from) = (e.sub(one, here), next);
                    e.if_(some, |e| x.scope(|x| self.bring(e, x)));
                    e.set(stage, self.stage);
                    (self.stage, self.positions.from) = (here, first);
                    self.add_block(e, x, (marked, free), [&max, &sum], &sums);
                    return;
                }
                self.positions.from = first;
                let asked = match (&mask, flag) {
                    (Some((mask, None)), Some(flag)) => Some(seen(
                        e,
                        x,
                        (self.stream(), *mask, &self.batch),
                        [self.rows, self.positions],
                        (flag, t.units()),
                    )),
                    _ => None,
                };
                where_seen(e, asked, |e| {
                    // The block before has been used.
                    e.sync();
                    self.bring(e, x);
                    e.sync();
                    self.add_block(e, x, (marked, free), [&max, &sum], &sums);
                });
            });
        });
        // What four units have of a row.
        for (all, op) in [(&sum, Bin::Add), (&max, Bin::Max)] {
            for &one in all {
                for bits in [1, 2] {
                    let mine = e.get(one);
                    let other = e.shuffle_xor(mine, bits);
                    let both = e.binary(op, mine, other);
                    e.set(one, both);
                }
            }
        }
        end(self, e, x, [max, sum], &sums);
    }

    /// Adds a block that lies in shared memory.
    fn add_block(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        (mask, free): (Option<ValueId>, Option<Val>),
        [max, sum]: [&OfRows; 2],
        sums: &Sums,
    ) {
        let mut scores = self.score(e, x, mask, free);
        if let Some(shared) = self.scores {
            scores = self.exchange(e, shared, &scores);
        }
        match (self.stream().by, self.plan.values) {
            (Monoid::Softmax, _) => {
                self.weigh(e, &scores, [max, sum], sums);
                self.add_values(e, &scores, sums);
            }
            (Monoid::Sum, Some(_)) => self.add_values(e, &scores, sums),
            (Monoid::Sum, None) => self.fold(e, &scores, Bin::Add, sum),
            (Monoid::Max, _) => self.fold(e, &scores, Bin::Max, max),
        }
    }

    /// Adds the block's scores up, or takes the largest, for each row.
    fn fold(&self, e: &mut Emit, scores: &Sums, op: Bin, to: &OfRows) {
        for (row, &to) in to.iter().enumerate() {
            let mut all = e.get(to);
            for &tile in &scores[row / 2] {
                for right in 0..2 {
                    let at = e.u32(2 * (row as u32 % 2) + right);
                    let score = e.load(tile, at);
                    all = e.binary(op, all, score);
                }
            }
            e.set(to, all);
        }
    }

    /// Computes what the scores have of the rows alone once.
    fn once_for_rows(&self, e: &mut Emit, x: &mut Exprs<'_>) {
        let body = x.body();
        let above = |v: ValueId| {
            cone(body, v, |_| true).iter().any(|v| defined(body, *v).is_some_and(|i| i.op == Op::Contract))
        };
        for value in cone(body, self.stream().scores, is_elementwise) {
            if body.ty(value).has(self.stream().along) || above(value) {
                continue;
            }
            for row in &self.mine {
                let known = [(&self.stream().batch[..], &self.batch[..]), (self.rows.axes, &row.index[..])];
                x.element(e, value, &index(&body.ty(value).axes, &known));
            }
        }
    }

    /// The first position that none of the cube's rows sees, and the first that not all of them see; not beyond `to`.
    fn limits(&self, e: &mut Emit, x: &mut Exprs<'_>, limit: &Limit, scratch: Shared, to: Val) -> (Val, Val) {
        let (unit, count) = (e.unit(), e.u32(self.t.rows));
        let number = e.rem(unit, count);
        // Beyond the last row, it is that once more.
        let (at_row, _) = self.rows.at(e, x, number);
        let known = [(&self.stream().batch[..], &self.batch[..]), (self.rows.axes, &at_row[..])];
        let axes = &x.body().ty(limit.value).axes;
        let last = x.scope(|x| x.element(e, limit.value, &index(axes, &known)));
        let (zero, one) = (e.u32(0), e.u32(1));
        let of = |e: &mut Emit, op: Bin| {
            let last = e.fold_cube(op, last, scratch, (self.t.units(), Target::Cuda));
            let none = e.i32(0);
            let some = e.cmp(if limit.inclusive { Cmp::Le } else { Cmp::Lt }, none, last);
            let last = e.cast(last, Elem::U32);
            let end = if limit.inclusive { e.add(last, one) } else { last };
            let end = e.select(some, end, zero);
            e.binary(Bin::Min, end, to)
        };
        (of(e, Bin::Max), of(e, Bin::Min))
    }

    /// Brings the block's keys and values into shared memory.
    fn bring(&self, e: &mut Emit, x: &mut Exprs<'_>) {
        let (plan, t) = (self.plan, self.t);
        let none = e.u32(0);
        for (n, p) in plan.scores.iter().enumerate() {
            let to = (self.keys, plan.first(t, n), plan.key_pitch(t), self.stage);
            let width = (none, plan.width(t, n), 1);
            self.stage(e, x, (p.keys, &p.depth, plan.depths[n]), self.positions, width, to);
        }
        if let (None, Some(values)) = (plan.shared, plan.values) {
            let of = (values, &self.stream().n[..], plan.columns);
            let to = (self.values, 0, t.columns + PACK, self.stage);
            self.stage(e, x, of, self.positions, (self.columns.from, t.columns, 1), to);
        }
    }

    /// Brings `width` numbers of each line of a leaf into shared memory, from the first on. What does not exist is 0. Of an expression a
    /// unit makes up to so many packs at once.
    fn stage(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        (leaf, axes, total): (ValueId, &[AxisId], u32),
        lines: Span<'_>,
        (first, width, at_once): (Val, u32, u32),
        (to, place, pitch, staged): (Shared, u32, u32, Val),
    ) {
        let memory = &x.body().ty(leaf).axes;
        let buf = (self.inputs)(leaf).filter(|_| packed(x.body(), leaf, axes, self.plan.dtype));
        let batch: At<'_> = (&self.stream().batch, &self.batch);
        let packs = width / PACK;
        let (units, ahead) = (self.t.units(), buf.is_some() && self.plan.ahead);
        if packs == 0 {
            return;
        }
        let place_of = |e: &mut Emit, (line, across): (Val, Val)| {
            let pitch = e.u32(pitch / PACK);
            let line = e.mul(line, pitch);
            let place = e.u32(place / PACK);
            let at = e.add(line, place);
            let at = e.add(at, across);
            let size = e.u32(lines.count);
            let before = e.mul(size, pitch);
            let before = e.mul(before, staged);
            e.add(at, before)
        };
        // A pack, unless it is on its way to its place already.
        let read = |e: &mut Emit, x: &mut Exprs<'_>, (line, across): (Val, Val)| {
            let (pack, end) = (e.u32(PACK), e.u32(total));
            let before = e.mul(across, pack);
            let column = e.add(first, before);
            let (at_line, exists) = lines.at(e, x, line);
            let wanted = |e: &mut Emit, x: &mut Exprs<'_>, column: Val| {
                let at = x.split(e, column, axes);
                index(memory, &[batch, (lines.axes, &at_line[..]), (axes, &at[..])])
            };
            if let Some(buf) = buf.filter(|_| ahead) {
                let inside = e.lt(column, end);
                let exists = e.and(exists, inside);
                let at = wanted(e, x, column);
                let (at, to_pack) = (x.join(e, &at, memory), place_of(e, (line, across)));
                let to_place = e.mul(to_pack, pack);
                e.copy_ahead(exists, buf, at, to, to_place);
                return None;
            }
            Some(match buf {
                Some(buf) => {
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
                None => {
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
        let keep = |e: &mut Emit, at: (Val, Val), pack: &Pack| {
            let at = place_of(e, at);
            e.store_pack(to, at, pack);
        };
        let one = |e: &mut Emit, x: &mut Exprs<'_>, at: (Val, Val)| {
            if let Some(pack) = read(e, x, at) {
                keep(e, at, &pack);
            }
        };
        let unit = e.unit();
        if buf.is_some() {
            // A unit has the same packs of each of its lines, so that one place follows from another by a sum.
            let side = gcd(packs.into(), units.into()) as u32;
            let (wide, down, count) = (e.u32(side), units / side, e.u32(lines.count));
            let (line, pack) = (e.div(unit, wide), e.rem(unit, wide));
            for n in 0..lines.count.div_ceil(down) {
                for across in (0..packs).step_by(side as usize) {
                    let (below, right) = (e.u32(n * down), e.u32(across));
                    let at = (e.add(line, below), e.add(pack, right));
                    if (n + 1) * down <= lines.count {
                        x.scope(|x| one(e, x, at));
                    } else {
                        let inside = e.lt(at.0, count);
                        e.if_(inside, |e| x.scope(|x| one(e, x, at)));
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
                            Some((at, read(e, x, at)?))
                        })
                        .collect();
                    found.iter().for_each(|(at, pack)| keep(e, *at, pack));
                });
            });
        }
    }

    /// The scores of the plane's positions: by tile, as sums of tensor cores lie.
    fn score(&self, e: &mut Emit, x: &mut Exprs<'_>, mask: Option<ValueId>, free: Option<Val>) -> Sums {
        let (plan, t) = (self.plan, self.t);
        let (of_plane, part) = (e.u32(16 * t.high), e.u32(t.positions / t.across));
        let of_rows = e.u32(plan.row_pitch());
        let row = e.mul(self.down, of_plane);
        let start = e.mul(row, of_rows);
        let rows = self.plane.rows(e, Lines { start, pitch: plan.row_pitch() });
        let before = e.mul(self.right, part);
        let start = self.staged(e, before, plan.key_pitch(t));
        let keys = self.plane.columns_along(e, Lines { start, pitch: plan.key_pitch(t) });
        let mut found: Vec<Sums> = Vec::new();
        for (_, of) in &plan.sums {
            let sums = tiles(e, t.high, t.scored());
            for &p in of {
                let deep = plan.depths[p].div_ceil(16);
                // As many at once as are worth their text.
                let at_once = (1..=deep.clamp(1, 12)).rev().find(|n| deep.is_multiple_of(*n)).unwrap_or(1);
                let (none, all, step) = (e.u32(0), e.u32(16 * deep), e.u32(16 * at_once));
                let body = |e: &mut Emit, k: Val| {
                    let (rows, keys) = (e.add(rows, k), e.add(keys, k));
                    for k in 0..at_once {
                        let a: Vec<_> = (0..t.high)
                            .map(|h| {
                                let a = left(e, self.elem);
                                let more = plan.row_first(p) + 16 * k + h * 16 * plan.row_pitch();
                                load_rows(e, a, self.left, rows, more);
                                a
                            })
                            .collect();
                        for n in (0..t.scored()).step_by(2) {
                            let more = plan.first(t, p) + 16 * k + n * 8 * plan.key_pitch(t);
                            let b = if n + 1 == t.scored() {
                                vec![load_eight(e, self.elem, self.keys, keys, more, false)]
                            } else {
                                load_columns(e, self.elem, self.keys, keys, more, false).into()
                            };
                            for (a, sums) in a.iter().zip(&sums) {
                                for (&sum, &b) in sums[n as usize..].iter().zip(&b) {
                                    e.multiply_matrices(*a, b, sum, self.elem);
                                }
                            }
                        }
                    }
                };
                if deep == at_once { body(e, none) } else { e.for_step(none, all, step, body) }
            }
            found.push(sums);
        }
        let first = e.add(self.positions.from, before);
        let first = e.add(first, self.plane.column);
        let made = |e: &mut Emit, x: &mut Exprs<'_>, asked: bool| {
            for tile in 0..t.scored() {
                for right in 0..2 {
                    let more = e.u32(8 * tile + right);
                    let position = e.add(first, more);
                    self.expression(e, x, (position, asked), mask, &found, (tile, right));
                }
            }
        };
        match free {
            None => made(e, x, true),
            Some(free) => {
                let count = e.u32(t.positions);
                let end = e.add(self.positions.from, count);
                let plain = e.cmp(Cmp::Le, end, free);
                e.if_(plain, |e| made(e, x, false));
                let masked = e.not(plain);
                e.if_(masked, |e| made(e, x, true));
            }
        }
        found.swap_remove(0)
    }

    /// Where a line of the block begins in its tile.
    fn staged(&self, e: &mut Emit, line: Val, pitch: u32) -> Val {
        let (size, pitch) = (e.u32(self.t.positions), e.u32(pitch));
        let before = e.mul(self.stage, size);
        let line = e.add(before, line);
        e.mul(line, pitch)
    }

    /// Makes the scores of a position and the unit's rows, in the place of the first sum.
    fn expression(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        (position, asked): (Val, bool),
        mask: Option<ValueId>,
        found: &[Sums],
        (tile, right): (u32, u32),
    ) {
        let (at_position, exists) =
            if asked { self.positions.clamped(e, position) } else { (position, e.bool(true)) };
        let nothing = e.f32(if self.stream().by == Monoid::Sum { 0.0 } else { f32::NEG_INFINITY });
        for (n, row) in self.mine.iter().enumerate() {
            let (high, at) = (n / 2, e.u32(2 * (n as u32 % 2) + right));
            let known = [
                (&self.stream().batch[..], &self.batch[..]),
                (self.rows.axes, &row.index[..]),
                (self.positions.axes, &[at_position][..]),
            ];
            let score = x.scope(|x| {
                let body = x.body();
                for ((value, _), tiles) in self.plan.sums.iter().zip(found) {
                    let sum = e.load(tiles[high][tile as usize], at);
                    x.define(*value, index(&body.ty(*value).axes, &known), sum);
                }
                if let (Some(mask), false) = (mask, asked) {
                    let seen = e.bool(true);
                    x.define(mask, index(&body.ty(mask).axes, &known), seen);
                }
                x.element(e, self.stream().scores, &index(&body.ty(self.stream().scores).axes, &known))
            });
            let score = if asked { e.select(exists, score, nothing) } else { score };
            e.store(found[0][high][tile as usize], at, score);
        }
    }

    /// Scores of all positions of the block for those of the plane's own part.
    fn exchange(&self, e: &mut Emit, shared: Shared, own: &Sums) -> Sums {
        let t = self.t;
        let (of_plane, pitch, part, two) =
            (e.u32(16 * t.high), e.u32(t.score_pitch()), e.u32(t.positions / t.across), e.u32(2));
        let row = e.mul(self.down, of_plane);
        let row = e.add(row, self.plane.row);
        let row = e.mul(row, pitch);
        let row = e.add(row, self.plane.column);
        let before = e.mul(self.right, part);
        let start = e.add(row, before);
        // In pairs.
        let place = |e: &mut Emit, start: Val, high: usize, tile: usize, half: u32| {
            let more = e.u32(8 * tile as u32 + (16 * high as u32 + 8 * half) * t.score_pitch());
            let at = e.add(start, more);
            e.div(at, two)
        };
        for (high, own) in own.iter().enumerate() {
            for (n, &tile) in own.iter().enumerate() {
                for half in 0..2 {
                    let pair = [0, 1].map(|i| {
                        let i = e.u32(2 * half + i);
                        e.load(tile, i)
                    });
                    let pair = e.pack(Elem::F32, &pair);
                    let at = place(e, start, high, n, half);
                    e.store_pack(shared, at, &pair);
                }
            }
        }
        e.sync();
        let mut tile = |high: usize, n: usize| {
            let tile = sums(e);
            for half in 0..2 {
                let at = place(e, row, high, n, half);
                let pair = e.load_pack(shared, at, 2, true);
                for i in 0..2 {
                    let (to, number) = (e.u32(2 * half + i), e.element_of(&pair, i));
                    e.store(tile, to, number);
                }
            }
            tile
        };
        (0..own.len()).map(|high| (0..t.positions as usize / 8).map(|n| tile(high, n)).collect()).collect()
    }

    /// Turns the block's scores into weights. What was summed of earlier blocks counts less by a factor of the row.
    fn weigh(&self, e: &mut Emit, scores: &Sums, [max, sum]: [&OfRows; 2], sums: &Sums) {
        for row in 0..self.mine.len() {
            let (high, half) = (row / 2, row % 2);
            let places = [2 * half as u32, 2 * half as u32 + 1];
            let old = e.get(max[row]);
            let mut new = old;
            for &tile in &scores[high] {
                for at in places {
                    let at = e.u32(at);
                    let score = e.load(tile, at);
                    new = e.binary(Bin::Max, new, score);
                }
            }
            for bits in [1, 2] {
                let other = e.shuffle_xor(new, bits);
                new = e.binary(Bin::Max, new, other);
            }
            e.set(max[row], new);
            let less = e.sub(old, new);
            let factor = e.quick_exp(less);
            let known = e.get(sum[row]);
            let mut total = e.mul(known, factor);
            for &tile in &scores[high] {
                for at in places {
                    let at = e.u32(at);
                    let score = e.load(tile, at);
                    let less = e.sub(score, new);
                    let weight = e.quick_exp(less);
                    e.store(tile, at, weight);
                    total = e.add(total, weight);
                }
            }
            e.set(sum[row], total);
            for &tile in &sums[high] {
                for at in places {
                    let at = e.u32(at);
                    let known = e.load(tile, at);
                    let known = e.mul(known, factor);
                    e.store(tile, at, known);
                }
            }
        }
    }

    /// Adds the block's values times their weights.
    fn add_values(&self, e: &mut Emit, weights: &Sums, sums: &Sums) {
        let (plan, t) = (self.plan, self.t);
        let (first, pitch) = match plan.shared {
            Some(product) => (plan.first(t, product), plan.key_pitch(t)),
            None => (0, t.columns + PACK),
        };
        let (own, none) = (e.u32(t.columns / t.across), e.u32(0));
        let columns = e.mul(self.right, own);
        let start = self.staged(e, none, pitch);
        let start = e.add(start, columns);
        let named = self.plane.columns_across(e, Lines { start, pitch });
        for k in 0..t.positions as usize / 16 {
            let a: Vec<_> = weights.iter().map(|w| as_left(e, self.elem, [w[2 * k], w[2 * k + 1]])).collect();
            for n in (0..t.tiles() as usize).step_by(2) {
                let more = first + 16 * k as u32 * pitch + 8 * n as u32;
                let b = load_columns(e, self.elem, self.values, named, more, true);
                for (a, sums) in a.iter().zip(sums) {
                    for (&sum, b) in sums[n..].iter().zip(b) {
                        e.multiply_matrices(*a, b, sum, self.elem);
                    }
                }
            }
        }
    }

    /// Does something with each of the unit's sums: which of its rows it is of, the column's number in the cube, the sum.
    fn each(&self, e: &mut Emit, sums: &Sums, mut body: impl FnMut(&mut Emit, usize, Val, Val)) {
        let own = e.u32(self.t.columns / self.t.across);
        let first = e.mul(self.right, own);
        let first = e.add(first, self.plane.column);
        for (high, sums) in sums.iter().enumerate() {
            for (n, &tile) in sums.iter().enumerate() {
                for i in 0..4 {
                    let (more, at) = (e.u32(8 * n as u32 + i % 2), e.u32(i));
                    let (column, sum) = (e.add(first, more), e.load(tile, at));
                    body(e, 2 * high + i as usize / 2, column, sum);
                }
            }
        }
    }

    /// Leaves what is known of a part, as [`split`](super::split) wants it. `first` is the number of the first row there.
    fn keep(&self, e: &mut Emit, first: Val, [max, sum]: [&OfRows; 2], sums: &Sums, kept: Buf) {
        let columns = self.columns.total;
        let (more, one) = (e.u32(KEPT), e.u32(1));
        let pitch = e.add(columns, more);
        let lines: Vec<_> = self
            .mine
            .iter()
            .map(|row| {
                let number = e.add(self.rows.from, row.number);
                let line = e.add(first, number);
                e.mul(line, pitch)
            })
            .collect();
        let writes = self.one_of_a_row(e);
        for (half, row) in self.mine.iter().enumerate() {
            let writes = e.and(writes, row.exists);
            e.if_(writes, |e| {
                let at = e.add(lines[half], columns);
                let max = e.get(max[half]);
                e.store(kept, at, max);
                let at = e.add(at, one);
                let sum = e.get(sum[half]);
                e.store(kept, at, sum);
                if self.plan.values.is_none() {
                    e.store(kept, lines[half], sum);
                }
            });
        }
        self.each(e, sums, |e, half, column, sum| {
            let number = e.add(self.columns.from, column);
            let column_exists = e.lt(number, columns);
            let exists = e.and(self.mine[half].exists, column_exists);
            e.if_(exists, |e| {
                let at = e.add(lines[half], number);
                e.store(kept, at, sum);
            });
        });
    }

    /// Whether the unit is the first of the four of a row, in the first of the planes that have it.
    fn one_of_a_row(&self, e: &mut Emit) -> Val {
        let zero = e.u32(0);
        let (no_column, no_plane) =
            (e.cmp(Cmp::Eq, self.plane.column, zero), e.cmp(Cmp::Eq, self.right, zero));
        e.and(no_column, no_plane)
    }

    /// Computes the epilogue of what was folded for each row and stores it.
    fn store_rows(&self, e: &mut Emit, x: &mut Exprs<'_>, of: &OfRows, output: Buf) {
        let writes = self.one_of_a_row(e);
        for (row, &of) in self.mine.iter().zip(of) {
            let writes = e.and(writes, row.exists);
            let known = [(&self.stream().batch[..], &self.batch[..]), (self.rows.axes, &row.index[..])];
            e.if_(writes, |e| {
                let y = e.get(of);
                finish(e, x, self.stream(), &known, y, output);
            });
        }
    }

    /// Divides by the sums of the weights if these are a softmax, computes the epilogue, stores.
    fn store(&self, e: &mut Emit, x: &mut Exprs<'_>, [max, sum]: [&OfRows; 2], sums: &Sums, output: Buf) {
        match (self.stream().by, self.plan.values) {
            (Monoid::Max, _) => return self.store_rows(e, x, max, output),
            (Monoid::Sum, None) => return self.store_rows(e, x, sum, output),
            (Monoid::Softmax, _) | (Monoid::Sum, Some(_)) => {}
        }
        let softmax = self.stream().by == Monoid::Softmax;
        let one = e.f32(1.0);
        let parts: Vec<_> = sum
            .iter()
            .map(|&sum| {
                let sum = e.get(sum);
                let divisor = divisor(e, sum);
                e.div(one, divisor)
            })
            .collect();
        self.each(e, sums, |e, half, column, sum| {
            let row = &self.mine[half];
            let (at_column, column_exists) = self.columns.at(e, x, column);
            let exists = e.and(row.exists, column_exists);
            let known = [
                (&self.stream().batch[..], &self.batch[..]),
                (self.rows.axes, &row.index[..]),
                (self.columns.axes, &at_column[..]),
            ];
            e.if_(exists, |e| {
                let y = if softmax { e.mul(sum, parts[half]) } else { sum };
                finish(e, x, self.stream(), &known, y, output);
            });
        });
    }
}

/// So many times 16 rows of so many tiles of sums, all zero.
fn tiles(e: &mut Emit, high: u32, count: u32) -> Sums {
    let mut tile = || {
        let tile = sums(e);
        clear(e, tile);
        tile
    };
    (0..high).map(|_| (0..count).map(|_| tile()).collect()).collect()
}

/// Whether numbers of these axes that lie in one pack of 8 lie in one of a parameter.
fn packed(body: &Function, leaf: ValueId, axes: &[AxisId], dtype: DType) -> bool {
    body.params.contains(&leaf) && body.ty(leaf).dtype == dtype && in_packs(body, leaf, axes)
}
