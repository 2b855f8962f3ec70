//! Streams on tensor cores: both products of a block are multiplied by `mma`, and the scores between them stay in registers.
//!
//! A cube of 4 or 8 planes has 16, 32, 64 or 128 rows and all columns of the product (as many rows as there are, up to that). Rows are
//! what the plan calls *m*: tokens of a head, or tokens and heads, where these share keys. The operands of the rows lie in shared memory
//! from the start; of each block of positions, keys and values are brought there. Where they lie in memory in packs of 16 bytes, they are
//! copied past the registers, into one of two stages, while the block before is worked on; where they are expressions, they are decoded
//! on the way. Values that are the keys of a product lie there once. Of a line that lies in a page of a pool, a table is asked where that is.
//!
//! Planes that have the same rows share out the block's positions for the scores and the columns for the sums: scores then pass
//! through shared memory, as f32. Each plane turns those of its rows into weights (a unit has two rows, four units a row), rounds them to
//! the dtype of the values, and multiplies. Operands of rows in f32 are rounded to the dtype of the keys. All else is f32; sums of
//! weights are of those that were not rounded. `check/bound.rs` knows of both.
//!
//! Where a device has it and rows are many, planes multiply in groups of four ([`groups`]), which read both operands of the scores from shared
//! memory, and weigh values by what they have in registers.
//!
//! A mask that lets each row see the positions up to a number, as causal ones do, or from one on, as those of their gradients do, is an end or
//! a start for the cube's walk, and a position up to which, or from which on, it need not be asked. Any other is asked for each block, as in [`stream`](super::stream).

mod bring;
mod cube;
mod groups;
mod once;
mod planes;
mod store;

use latentc_ir::{AxisId, Binary, DType, Function, Op, ValueId};

use self::cube::{Cube, OfRows, Sums};
use self::once::Once;
use super::bulk::Map;
use super::emit::{Bin, Buf, Elem, Emit, Val};
use super::expr::Exprs;
use super::feed::{Layout, SPAN};
use super::fragment::{PACK, Plane, in_packs};
use super::machine::CACHED;
use super::split::{HALF, SHARED};
use super::stream::{Scores, Span, Walk, products};
use super::warpgroup;
use crate::program::By;
use crate::stream::{Monoid, Read, StreamPlan, cone, defined, is_elementwise};

/// Sums and weights that a unit has in registers, at most, where planes multiply in groups.
const REGISTERS: u32 = 176;
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
    /// What scores are but for the mask, if that is such a sum times a positive number, and the number. Exponentials take it along.
    scaled: Option<(ValueId, f32)>,
    /// What scores are made of that each row or each position has once.
    once: Once,
    /// The depth of each product.
    depths: Vec<u32>,
    /// The number of columns.
    columns: u32,
    /// The product whose keys are the values.
    shared: Option<usize>,
    /// Blocks are brought while the one before is worked on: they lie in packs, and none is left out.
    ahead: bool,
    /// For groups of planes, keys of each product and values as copies by the device see them, if it can bring them.
    boxes: Option<Boxes>,
}

/// The heights of cubes, in times 16 rows.
pub(crate) const HEIGHTS: [u8; 4] = [1, 2, 4, 8];

/// What the device brings of a block: the keys of each product, and the values that are no keys.
#[derive(Clone, Debug)]
pub(crate) struct Boxes {
    keys: Vec<Map>,
    values: Option<Map>,
}

impl Boxes {
    /// All maps, in the order of a kernel's arguments.
    pub(crate) fn maps(&self) -> impl Iterator<Item = &Map> {
        self.keys.iter().chain(&self.values)
    }
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
    pub(super) positions: u32,
    /// Who multiplies.
    by: By,
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
        let scaled = scaled(body, &stream, &sums);
        let once = Once::of(body, &stream);
        let packs = scores.iter().all(|p| packed(body, p.keys, &p.depth, dtype))
            && values.is_none_or(|v| packed(body, v, &stream.n, dtype));
        let ahead = packs && stream.mask.is_none_or(|mask| limit(body, &stream, mask).is_some());
        let boxes = None;
        let mut plan = MatrixPlan {
            stream,
            values,
            dtype,
            scores,
            sums,
            scaled,
            once,
            depths,
            columns,
            shared,
            ahead,
            boxes,
        };
        plan.boxes = plan.grouped().and_then(|t| plan.boxes(body, t));
        HEIGHTS.into_iter().any(|tall| plan.tiling(tall, By::Planes).is_some()).then_some(plan)
    }

    /// The keys and the values in boxes, if boxes of them are boxes in memory.
    fn boxes(&self, body: &Function, t: Tiling) -> Option<Boxes> {
        let along = [self.stream.along];
        let keys = self
            .scores
            .iter()
            .enumerate()
            .map(|(n, p)| Map::of(body, p.keys, (&along, &p.depth), self.deep_layout(t.positions, n)));
        let values = self.values.filter(|_| self.shared.is_none());
        let of_values =
            |values| Map::of(body, values, (&self.stream.n, &along), MatrixPlan::values_layout(t));
        Some(Boxes {
            keys: keys.collect::<Option<_>>()?,
            values: match values {
                Some(values) => Some(of_values(values)?),
                None => None,
            },
        })
    }

    /// What the device brings for a cube, if it brings anything.
    pub(crate) fn brought(&self, t: Tiling) -> Option<&Boxes> {
        self.boxes.as_ref().filter(|_| t.by == By::Boxes)
    }

    /// The cube with so many times 16 rows, if it has room for all columns.
    pub(crate) fn tiling(&self, tall: u8, by: By) -> Option<Tiling> {
        if by.in_groups() {
            let tiling = self.grouped().filter(|_| tall == 8 && (by != By::Boxes || self.boxes.is_some()))?;
            return Some(Tiling { by, ..tiling });
        }
        let narrow = self.columns <= 128;
        // Twice 16 rows of two scores and of 128 columns are more than a unit has registers for.
        let twice = self.columns <= if self.sums.len() > 1 { 64 } else { 128 };
        let (planes, across, high, positions) = match tall {
            1 => (4, 4, 1, [64, 32]),
            2 => (8, 4, 1, [32, 32]),
            4 if narrow => (4, 1, 1, [64, 32]),
            4 => (8, 2, 1, [64, 32]),
            8 if twice => (4, 1, 2, [32, 32]),
            _ => return None,
        };
        let rows = 16 * u32::from(tall);
        let columns = self.columns.next_multiple_of(16 * across);
        // Sums of 64 tiles are half of a unit's registers.
        if columns > 512 {
            return None;
        }
        let tiling = |positions| Tiling { rows, columns, planes, across, high, positions, by };
        let fits = |most: usize| {
            let mut sizes = positions.into_iter().map(tiling);
            sizes.find(|t| self.shared_bytes(*t) <= most)
        };
        fits(HALF).or_else(|| fits(SHARED))
    }

    /// The cube whose planes multiply in groups: two of these, each with 64 rows and all columns, of which a softmax need not have any. What they
    /// weigh is brought ahead, and their scores have some depth.
    fn grouped(&self) -> Option<Tiling> {
        let columns = self.columns.next_multiple_of(SPAN);
        let fits = match (self.stream.by, self.values) {
            (Monoid::Softmax | Monoid::Sum, Some(_)) => [64, 128, 192, 256].contains(&columns),
            (by, None) => by == Monoid::Softmax,
            (Monoid::Max, Some(_)) => false,
        };
        let deep = self.depths.iter().all(|d| (1..=512).contains(d));
        if !self.ahead || !fits || !deep {
            return None;
        }
        let tiling = |positions| Tiling {
            rows: 2 * warpgroup::ROWS,
            columns,
            planes: 8,
            across: 1,
            high: 1,
            positions,
            by: By::Groups,
        };
        let registers = |t: &Tiling| {
            let scores = self.sums.len() as u32 * t.positions / 2;
            scores + t.positions / 4 + columns / 2
        };
        let mut all = [128, 64].into_iter().map(tiling);
        all.find(|t| registers(t) <= REGISTERS && self.shared_bytes(*t) <= SHARED)
    }

    /// How a block of positions, or the rows, lie in shared memory for groups of planes: what is multiplied by a product.
    fn deep_layout(&self, lines: u32, product: usize) -> Layout {
        Layout { lines, depth: self.depths[product].next_multiple_of(SPAN), along: true, cut: true }
    }

    /// The same of values that are not keys.
    fn values_layout(t: Tiling) -> Layout {
        Layout { lines: t.columns, depth: t.positions, along: false, cut: true }
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

    /// Stages of keys for groups of planes: those that weigh, as values, are still read while the ones behind the next are brought.
    fn key_stages(&self) -> u32 {
        if self.shared.is_some() { 3 } else { 2 }
    }

    /// Stages of values that are no keys.
    fn value_stages(&self) -> u32 {
        if self.values.is_none() || self.shared.is_some() { 0 } else { 2 }
    }

    /// Numbers of the rows' operands, the keys, the values, and the scores, of all stages.
    fn elements(&self, t: Tiling) -> [u32; 4] {
        let weighed = self.values.is_some() && self.shared.is_none();
        let stages = if t.by.in_groups() { self.key_stages() } else { 1 + u32::from(self.ahead) };
        if t.by.in_groups() {
            let all = |lines: u32| {
                (0..self.scores.len()).map(|p| self.deep_layout(lines, p).elements()).sum::<u32>()
            };
            let values = if weighed { MatrixPlan::values_layout(t).elements() } else { 0 };
            return [all(t.rows), stages * all(t.positions), 2 * values, 0];
        }
        let values = if weighed { t.positions * (t.columns + PACK) } else { 0 };
        let scores = if t.across > 1 { t.rows * t.score_pitch() } else { 0 };
        [t.rows * self.row_pitch(), stages * t.positions * self.key_pitch(t), stages * values, scores]
    }

    /// What is multiplied for each row and position: the depths of scores, and the columns that are weighed.
    pub(super) fn depth_of_position(&self, t: Tiling) -> u32 {
        self.depths.iter().map(|d| d.next_multiple_of(16)).sum::<u32>() + t.columns
    }

    /// Products of tensor cores that a plane takes part in for a block of positions.
    pub(super) fn products(&self, t: Tiling) -> u32 {
        let deep = self.depths.iter().map(|d| d.div_ceil(16)).sum::<u32>();
        let weighed = if self.values.is_some() { t.positions / 16 } else { 0 };
        if t.by.in_groups() { deep + weighed } else { t.high * (deep * t.scored() + weighed * t.tiles()) }
    }

    /// Bytes of shared memory.
    pub(crate) fn shared_bytes(&self, t: Tiling) -> usize {
        let [rows, keys, values, scores] = self.elements(t);
        let fold = if self.stream.mask.is_some() { t.units() } else { 0 };
        // Room for a barrier of each stage, whoever brings what it holds: all cubes of groups are as large.
        let barriers = if t.by.in_groups() { 2 * (self.key_stages() + self.value_stages()) } else { 0 };
        let once = self.once.elements(t);
        (2 * (rows + keys + values) + 4 * (scores + fold + barriers + once)) as usize
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

/// The value that scores of a softmax are where no mask hides them, if it is a sum times a positive number, and that number.
fn scaled(body: &Function, plan: &StreamPlan, sums: &[(ValueId, Vec<usize>)]) -> Option<(ValueId, f32)> {
    let (Monoid::Softmax, &[(sum, _)]) = (plan.by, sums) else { return None };
    let scores = defined(body, plan.scores)?;
    let product = match (&scores.op, &scores.args[..]) {
        (Op::Select, &[mask, shown, _]) if Some(mask) == plan.mask => defined(body, shown)?,
        _ => scores,
    };
    let (Op::Binary(Binary::Mul), &[a, b]) = (&product.op, &product.args[..]) else { return None };
    let factor = defined(body, if a == sum { b } else { a })?;
    let users = |v: ValueId| body.body.iter().flat_map(|i| &i.args).filter(|a| **a == v).count();
    let alone = [a, b].contains(&sum) && users(sum) == 1 && users(product.result()) <= 1;
    match &factor.op {
        // Far from 1, what a mask puts in place of a score might be no least number any more.
        Op::Const(table) if alone && table.len() == 1 => Some(table[0].0 as f32)
            .filter(|factor| (1e-6..1e6).contains(factor))
            .map(|factor| (product.result(), factor)),
        _ => None,
    }
}

/// A number for each row, up to which positions are seen, or from which on; `all` says that the mask asks for nothing else.
struct Limit {
    value: ValueId,
    /// Positions from it on are seen, not up to it.
    lower: bool,
    /// That position is seen too.
    inclusive: bool,
    all: bool,
}

/// Of the mask that a value is.
fn limit(body: &Function, plan: &StreamPlan, mask: ValueId) -> Option<Limit> {
    let inst = defined(body, mask)?;
    let position = |v: ValueId| defined(body, v).is_some_and(|i| i.op == Op::Position { axis: plan.along });
    let of_row = |v: ValueId| body.ty(v).dtype == DType::I32 && !body.ty(v).has(plan.along);
    match (&inst.op, &inst.args[..]) {
        (Op::Binary(op @ (Binary::Le | Binary::Lt)), &[one, other]) => {
            let (at, value, lower) = if position(one) { (one, other, false) } else { (other, one, true) };
            let inclusive = *op == Binary::Le;
            (position(at) && of_row(value)).then_some(Limit { value, lower, inclusive, all: true })
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
    (plan, t): (&MatrixPlan, Tiling),
    chunk: Option<Val>,
    (inputs, elem): (&dyn Fn(ValueId) -> Option<Buf>, Elem),
    output: Buf,
) {
    // Shared memory has room for one or two in any case.
    e.cubes_at_once(1);
    // Registers are scarce, and scores are many.
    x.quick();
    let stream = &plan.stream;
    let [repeats, rows, columns] = [&stream.batch, &stream.m, &stream.n].map(|axes| x.total(e, axes));
    let positions = x.extent(stream.along);
    // Cubes are numbered along the columns, then the rows, the batch, the parts.
    let cube = e.cube();
    let [row_tiles, column_tiles] =
        [(rows, t.rows), (columns, t.wide())].map(|(size, tile)| e.tiles(size, tile));
    let row_of_tiles = e.div(cube, column_tiles);
    let (repeat, tile) = if t.by.in_groups() && chunk.is_none() {
        in_sections(e, (row_of_tiles, row_tiles), (repeats, positions), plan)
    } else {
        (e.div(row_of_tiles, row_tiles), e.rem(row_of_tiles, row_tiles))
    };
    // The last rows see most: they come first.
    let one = e.u32(1);
    let last = e.sub(row_tiles, one);
    let (tile, column_tile) = (e.sub(last, tile), e.rem(cube, column_tiles));
    let [row0, column0] = [(tile, t.rows), (column_tile, t.wide())].map(|(number, size)| {
        let size = e.u32(size);
        e.mul(number, size)
    });
    let walk = Walk::of(e, (repeat, repeats), positions, chunk);
    let (from, to) = (walk.from, walk.to);
    // All units of a cube agree.
    e.if_(walk.inside, |e| {
        let batch = x.split(e, walk.repeat, &stream.batch);
        let along = [stream.along];
        let plane = Plane::new(e);
        let across = e.u32(t.across);
        let (down, right) = (e.div(plane.number, across), e.rem(plane.number, across));
        let cube = Cube {
            plan,
            t,
            elem,
            inputs,
            batch,
            rows: Span { axes: &stream.m, from: row0, count: t.rows, total: rows, pitch: 0 },
            columns: Span { axes: &stream.n, from: column0, count: t.columns, total: columns, pitch: 0 },
            positions: Span { axes: &along, from, count: t.positions, total: to, pitch: 0 },
            plane,
            down,
            right,
            mine: Vec::new(),
            once: plan.once.memory(e, t),
            bringing: (e.unit(), t.units()),
            whole: false,
        };
        let by = if t.by.in_groups() { groups::walk } else { planes::walk };
        by(e, &mut x, cube, (from, to), &mut |cube, e, x, of_rows, sums| match chunk {
            None => cube.store(e, x, of_rows, sums, output),
            Some(_) => {
                let first = walk.first_line(e, repeats, rows);
                cube.keep(e, first, of_rows, sums, output);
            }
        });
    });
}

/// What is made of the sums in the end.
type End<'e> = &'e mut dyn FnMut(&Cube<'_>, &mut Emit, &mut Exprs<'_>, [&OfRows; 2], &Sums);

/// Numbers cubes along the batch before they number them along the rows: those that last longest come first. As many indices of the batch are
/// numbered together as leave what they read in the cache. Gives the index and the number of the tile.
fn in_sections(
    e: &mut Emit,
    (number, row_tiles): (Val, Val),
    (repeats, positions): (Val, Val),
    plan: &MatrixPlan,
) -> (Val, Val) {
    let (one, cached) = (e.u32(1), e.u32(CACHED));
    let bytes = e.u32(2 * (plan.depths.iter().sum::<u32>() + plan.columns));
    let most = |e: &mut Emit, x: Val| e.binary(Bin::Max, x, one);
    let of_index = e.mul(positions, bytes);
    let of_index = most(e, of_index);
    let section = e.div(cached, of_index);
    let section = e.binary(Bin::Min, section, repeats);
    let section = most(e, section);
    let cubes = e.mul(section, row_tiles);
    let (before, number) = (e.div(number, cubes), e.rem(number, cubes));
    let first = e.mul(before, section);
    // The last section may have less. Beyond it there is none: what becomes of the number is no matter, but that it is beyond.
    let left = e.sub(repeats, first);
    let count = e.binary(Bin::Min, section, left);
    let count = most(e, count);
    let (tile, index) = (e.div(number, count), e.rem(number, count));
    (e.add(first, index), tile)
}

/// Whether numbers of these axes that lie in one pack of 8 lie in one of a parameter, or of a pool that is one.
fn packed(body: &Function, leaf: ValueId, axes: &[AxisId], dtype: DType) -> bool {
    let memory = in_pages(body, leaf).map_or(leaf, |read| read.pool);
    body.params.contains(&memory) && body.ty(leaf).dtype == dtype && in_packs(body, memory, axes)
}

/// What a leaf reads, if that lies in pages of a pool.
fn in_pages(body: &Function, leaf: ValueId) -> Option<Read> {
    defined(body, leaf).and_then(|inst| Read::of(body, inst)).filter(|read| body.params.contains(&read.pool))
}
