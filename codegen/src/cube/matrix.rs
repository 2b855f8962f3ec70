//! Products with many rows on tensor cores, by tiles, in f32 sums of bf16 or f16.
//!
//! Operands are parameters, read in accesses of 16 bytes. A cube brings some depth of both operands into one of several stages in shared
//! memory at a time ([`feed`](super::feed)), while its planes multiply another ([`tiles`](super::tiles)): each has some rows and columns of the
//! tile, as tiles of 16 by 8 that `mma` adds up in registers, with operands from `ldmatrix`, of which the next ones are loaded while those at
//! hand are multiplied. Where a device has it, four planes multiply together ([`warpgroup`](super::warpgroup)). In the end the sums go
//! through shared memory ([`sums`](super::sums)), 16 rows of each plane at a time, and each unit makes elements of the result of them. The axes are those of a [`FewPlan`]; what lies beyond an edge counts as 0 and is not stored.
//!
//! A *grouped* product has a matrix for each index. Its rows are those of the index, sorted by [`sort`](super::sort): a cube has rows of
//! one group, and finds which in the same order as all others do.
//!
//! Operands in f32 are split into numbers of 16 bits that add up to them, which are multiplied one after the other. Where less will do,
//! they are multiplied as tf32 in one go, just as they are stored; of these operands the depth must lie behind one another.

use latentc_ir::{AxisId, DType, Function, Op, ValueId};

use super::bulk::{self, Brought, Which};
use super::contract::Offsets;
use super::emit::{Bin, Buf, Elem, Emit, Shared, Val};
use super::epilogue::Epilogue;
use super::expr::{Exprs, Fold};
use super::feed::{self, Feed, Layout, Read, SPAN, Staged, TURNED_BYTES};
use super::few::place;
use super::fragment::{Factor, PACK, in_packs};
use super::sort::Group;
use super::split::{HALF, SHARED};
use super::sums::Sums;
use super::tiles::{self, Tiles};
use super::warpgroup::{self, Groups};
use crate::few::FewPlan;
use crate::program::{By, KernelKind};

/// Units of a cube that sorts, and of most that multiply.
pub(crate) const UNITS: u32 = 256;
/// Terms of a sum, each of which may be off by 2^-18: as much as f32 sums of as many are off in any case.
const FORGIVING: u64 = 64;
/// Rows of tiles that cubes share out at a time, all columns of them: what these read is in the cache then.
pub(super) const BAND: u32 = 16;

/// What a cube has of the result, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    /// Rows.
    pub(crate) rows: u32,
    /// Columns, of all products together.
    pub(crate) columns: u32,
    /// Depth of a stage in numbers of 16 bits, an even number of times 16.
    pub(super) depth: u32,
    /// Stages, at most.
    stages: u32,
    /// Planes above one another, and beside one another.
    down: u32,
    pub(super) across: u32,
    /// Who multiplies: each group of planes has all columns, and where the device brings boxes ([`bulk`]), cubes have units that only ask for
    /// that.
    pub(crate) by: By,
    /// Columns that are finished at a time, of all products together; all where it is 0.
    slab: u32,
    /// Cubes that a multiprocessor is to have at the same time.
    pub(crate) cubes: u32,
    /// TFLOP/s that an H200 reaches with as many cubes as it has room for. Only what they are beside one another counts.
    pub(crate) rate: u32,
    /// Whether operands in f32 are multiplied as tf32.
    pub(crate) tf32: bool,
    /// Parts of what is summed, of which a cube adds up one. They lie in memory one behind the other.
    pub(crate) parts: u32,
}

impl Tile {
    /// All of them, by size. The lowest is for few rows: there are more of them, and each has more on its way. Large ones multiply more with
    /// what they read.
    pub(crate) const ALL: [Tile; 10] = [
        Tile { rows: 32, columns: 64, stages: 8, down: 2, across: 4, cubes: 2, rate: 180, ..Tile::PLANES },
        Tile { rows: 64, columns: 128, stages: 3, down: 2, across: 2, cubes: 2, rate: 300, ..Tile::PLANES },
        Tile { rows: 128, columns: 128, depth: 32, stages: 4, down: 2, across: 4, rate: 315, ..Tile::PLANES },
        Tile { rows: 128, columns: 256, depth: 32, stages: 6, down: 2, across: 4, rate: 400, ..Tile::PLANES },
        Tile { rows: 128, columns: 256, stages: 4, rate: 560, ..Tile::GROUPS },
        Tile { rows: 128, columns: 64, stages: 8, rate: 400, ..Tile::BULK },
        Tile { rows: 128, columns: 128, stages: 6, rate: 560, ..Tile::BULK },
        Tile { rows: 128, columns: 160, stages: 5, rate: 620, ..Tile::BULK },
        Tile { rows: 128, columns: 192, stages: 5, rate: 650, ..Tile::BULK },
        Tile { rows: 128, columns: 256, stages: 4, rate: 700, ..Tile::BULK },
    ];

    /// What most have whose planes multiply alone.
    const PLANES: Tile = Tile {
        rows: 0,
        columns: 0,
        depth: 64,
        stages: 0,
        down: 0,
        across: 0,
        by: By::Planes,
        slab: 0,
        cubes: 1,
        rate: 0,
        tf32: false,
        parts: 1,
    };

    /// What those have of which groups of planes multiply together.
    const GROUPS: Tile = Tile { down: 8, across: 1, by: By::Groups, slab: 32, ..Tile::PLANES };

    /// What those have of which the device brings the operands. Widths between share out few rows better.
    const BULK: Tile = Tile { by: By::Boxes, ..Tile::GROUPS };

    /// The tile of a way.
    pub(crate) fn of(kind: KernelKind) -> Option<Tile> {
        let KernelKind::Matrix { wide, parts, .. } = kind else { return None };
        Tile::all().map(|tile| tile.in_parts(parts)).find(|tile| tile.way(wide) == kind)
    }

    /// All of them, those for tf32 last.
    pub(crate) fn all() -> impl Iterator<Item = Tile> {
        Tile::ALL.into_iter().chain(Tile::ALL.map(|tile| Tile { tf32: true, ..tile }))
    }

    /// The same for so many parts.
    pub(crate) fn in_parts(self, parts: u8) -> Tile {
        Tile { parts: parts.into(), ..self }
    }

    /// Whether so many rows are half of it at least; the lowest may have fewer.
    pub(crate) fn filled_by(self, rows: usize) -> bool {
        self.rows == Tile::ALL[0].rows || self.rows as usize <= 2 * rows
    }

    /// Whether operands come to both in the same way, and are multiplied so.
    pub(crate) fn feeds_like(self, other: Tile) -> bool {
        (self.by, self.tf32) == (other.by, other.tf32)
    }

    /// The way that has it.
    pub(crate) fn way(self, wide: u8) -> KernelKind {
        let (rows, columns, parts) = (self.rows as u16, self.columns as u16, self.parts as u8);
        KernelKind::Matrix { wide, rows, columns, by: self.by, parts, tf32: self.tf32 }
    }

    /// Units of a cube.
    pub(crate) fn units(self) -> u32 {
        self.multipliers() + if self.by == By::Boxes { bulk::COPIERS } else { 0 }
    }

    /// Those of them that multiply, which come first.
    pub(crate) fn multipliers(self) -> u32 {
        32 * self.down * self.across
    }

    /// Whether a cube takes one tile after another. Where rows have groups, all units of a cube find out which its tile has.
    pub(super) fn stays(self, plan: &FewPlan) -> bool {
        self.by == By::Boxes && index(plan).is_none()
    }

    /// The most stages.
    pub(super) fn most_stages(self) -> u32 {
        self.stages
    }

    /// Of so much depth, how much a part has: all have as many stages, but the last ones, which may have none.
    pub(super) fn of_part(self, body: &Function, plan: &FewPlan, depth: u64) -> u64 {
        let of_stage = self.filled(body, plan, 1);
        depth.div_ceil(of_stage).div_ceil(self.parts.into()) * of_stage
    }

    /// How the operands come, if it is the device that brings them and it can.
    pub(super) fn brought(self, body: &Function, plan: &FewPlan) -> Option<Brought> {
        Brought::of(body, plan, self.layouts(body, plan), self.factor(body, plan))
            .filter(|_| self.by == By::Boxes)
    }

    /// What operands are multiplied as: what one of them has 16 bits of, or bf16 where none has.
    pub(super) fn factor(self, body: &Function, plan: &FewPlan) -> Factor {
        let f16 = dtypes(body, plan).contains(&DType::F16);
        match (self.tf32, f16) {
            (true, _) => Factor::Tf32,
            (false, true) => Factor::Half(Elem::F16),
            (false, false) => Factor::Half(Elem::Bf16),
        }
    }

    /// How many factors stand for a number of the narrow operand, and of the wide ones.
    fn pieces(self, body: &Function, plan: &FewPlan) -> [u32; 2] {
        if self.tf32 {
            return [1, 1];
        }
        let (wide, terms) = (dtypes(body, plan).map(|dtype| dtype == DType::F32), summed(body, plan));
        // Three have all 24 bits, two have 17.
        let split = if terms.is_some_and(|terms| terms < forgiving(wide)) { 3 } else { 2 };
        wide.map(|wide| if wide { split } else { 1 })
    }

    /// How often what is multiplied is, factor by factor.
    pub(super) fn multiplications(self, body: &Function, plan: &FewPlan) -> usize {
        tiles::multiplications(self.pieces(body, plan).map(|n| n as usize))
    }

    /// The depth that is multiplied where a sum has so many terms.
    pub(super) fn filled(self, body: &Function, plan: &FewPlan, terms: u64) -> u64 {
        terms.next_multiple_of((self.depth / self.factor(body, plan).halves()).into())
    }

    /// Tiles of 16 rows that a plane has.
    pub(super) fn high(self) -> u32 {
        self.rows / self.down / 16
    }

    /// Tiles of 8 columns of each product that a plane has.
    pub(super) fn wide(self, plan: &FewPlan) -> u32 {
        self.columns(plan) / self.across / 8
    }

    /// How many columns of each product a cube has.
    pub(crate) fn columns(self, plan: &FewPlan) -> u32 {
        self.columns / plan.products.len() as u32
    }

    /// Rows that are finished at a time.
    pub(super) fn slab(self) -> u32 {
        16 * self.down
    }

    /// Columns of each product that are finished at a time.
    pub(super) fn slab_columns(self, plan: &FewPlan) -> u32 {
        match self.slab {
            0 => self.columns(plan),
            columns => columns / plan.products.len() as u32,
        }
    }

    /// From one of these rows to the next: units that write two neighbours meet in no bank.
    pub(super) fn slab_pitch(self, plan: &FewPlan) -> u32 {
        self.slab_columns(plan) + 8
    }

    /// Rows that planes multiply together: those of one, or of a group.
    pub(super) fn piece(self) -> u32 {
        if self.by.in_groups() { warpgroup::ROWS } else { 16 }
    }

    /// How the narrow and the wide operands lie in a stage.
    pub(super) fn layouts(self, body: &Function, plan: &FewPlan) -> [Layout; 2] {
        let (depth, cut) = (self.depth, self.by.in_groups());
        let narrow = Layout { lines: self.rows, depth, along: along(body, plan), cut };
        [narrow, Layout { lines: self.columns(plan), along: plan.along, ..narrow }]
    }

    /// Bytes of a stage, and of all else in shared memory.
    fn bytes(self, body: &Function, plan: &FewPlan) -> [usize; 2] {
        let products = plan.products.len() as u32;
        let [narrow, wide] = self.layouts(body, plan).map(Layout::elements);
        let [left, right] = self.pieces(body, plan);
        let slab = 4 * products * self.slab() * self.slab_pitch(plan);
        let lines = if index(plan).is_some() { 4 * self.rows + Group::SHARED_BYTES } else { 0 };
        let barriers = if self.by == By::Boxes { 4 * bulk::BARRIER_WORDS * self.stages } else { 0 };
        [2 * (left * narrow + products * right * wide), slab + lines + barriers].map(|bytes| bytes as usize)
    }

    /// Products of tensor cores that a plane takes part in for a stage.
    pub(super) fn products(self, body: &Function, plan: &FewPlan) -> u32 {
        let times = plan.products.len() * self.multiplications(body, plan);
        let wide = if self.by.in_groups() { 1 } else { self.wide(plan) };
        times as u32 * self.depth / 16 * self.high() * wide
    }

    /// How many stages there are.
    pub(super) fn stages(self, body: &Function, plan: &FewPlan) -> u32 {
        let [stage, rest] = self.bytes(body, plan);
        let most = if self.cubes > 1 { HALF } else { SHARED };
        (3..=self.stages).rev().find(|&n| n as usize * stage + rest <= most).unwrap_or(2)
    }

    /// Whether a cube has room for it: where both operands are split, not for the widest.
    pub(crate) fn fits(self, body: &Function, plan: &FewPlan) -> bool {
        let both = self.pieces(body, plan).iter().all(|n| *n > 1);
        let stored = dtypes(body, plan) == [DType::F32; 2];
        if self.tf32 && !(stored && along(body, plan) && plan.along) {
            return false;
        }
        let (room, multiplied) = if self.by.in_groups() {
            // Between what is laid out where it must be, something may be left empty.
            let whole =
                |l: &Layout| l.shared_out(self.multipliers()) && (l.along || l.lines.is_multiple_of(SPAN));
            let whole = self.layouts(body, plan).iter().all(whole);
            let brought = self.by != By::Boxes || self.brought(body, plan).is_some();
            (2 * TURNED_BYTES, whole && brought && self.stages(body, plan) > 2)
        } else {
            (0, self.columns <= 128 || !both)
        };
        self.shared_bytes(body, plan) + room <= SHARED && multiplied
    }

    /// Bytes of shared memory.
    pub(crate) fn shared_bytes(self, body: &Function, plan: &FewPlan) -> usize {
        let [stage, rest] = self.bytes(body, plan);
        self.stages(body, plan) as usize * stage + rest
    }
}

/// The axis of the wide operands that an index chooses along, and the index.
pub(crate) fn index(plan: &FewPlan) -> Option<(AxisId, ValueId)> {
    plan.products[0].index
}

/// Whether the numbers of a row lie behind one another in the narrow operand; if not, those of eight rows do.
fn along(body: &Function, plan: &FewPlan) -> bool {
    in_packs(body, plan.products[0].narrow, &plan.inner)
}

/// How the narrow operand and the wide ones are stored.
fn dtypes(body: &Function, plan: &FewPlan) -> [DType; 2] {
    [body.ty(plan.products[0].narrow).dtype, plan.products[0].elements.dtype]
}

/// The number of terms, if it is known.
fn summed(body: &Function, plan: &FewPlan) -> Option<u64> {
    let sizes = plan.outer.iter().chain(&plan.inner).map(|a| body.axis(*a).size.fixed());
    sizes.into_iter().try_fold(1u64, |n, size| Some(n.saturating_mul(size?)))
}

/// The fewest terms that may be off as far as operands are that are split in two. Of two such ones, what is least of both is not multiplied.
fn forgiving(split: [bool; 2]) -> u64 {
    match split {
        [false, false] => 0,
        [true, true] => 3 * FORGIVING,
        _ => FORGIVING,
    }
}

/// The fewest terms with which the kernel errs no more than f32 sums do, where their number is known at a launch.
pub(crate) fn least(body: &Function, plan: &FewPlan) -> u64 {
    if summed(body, plan).is_some() {
        0
    } else {
        forgiving(dtypes(body, plan).map(|dtype| dtype == DType::F32))
    }
}

/// The plan of a body that one launch can compute so, with the operands of one side as the wide ones. The rows of a grouped product are
/// those of its index.
pub(crate) fn plan(body: &Function, wide: usize) -> Option<FewPlan> {
    let mut plan = FewPlan::of(body, wide)?;
    let narrow = *plan.narrows().first()?;
    let (dtype, tables) = (body.ty(narrow).dtype, plan.products[0].elements.dtype);
    let multiplies = plan.narrows().len() == 1
        && plan.products.len() <= 2
        && matches!(
            (dtype, tables),
            (DType::Bf16 | DType::F32, DType::Bf16 | DType::F32) | (DType::F16, DType::F16)
        )
        && plan
            .products
            .iter()
            .all(|p| p.index == index(&plan) && p.elements.dtype == tables && p.table.elements().is_some());
    // What an epilogue folds would be folded for each element.
    let folds = body.body.iter().any(|i| i.op != Op::Contract && Fold::of(body, i).is_some());
    let whole = plan.factor(body).is_multiple_of(PACK.into());
    // Rows of groups are anywhere, so none are neighbours.
    let packed = along(body, &plan) || (index(&plan).is_none() && in_packs(body, narrow, &plan.rows));
    if !multiplies || folds || !whole || !packed || !body.params.contains(&narrow) {
        return None;
    }
    if let Some((_, index)) = index(&plan) {
        // Each row of the result has one index.
        let lines = &body.ty(index).axes;
        let chosen = plan.batch.len() == lines.len() && plan.batch.iter().all(|a| lines.contains(a));
        if !chosen || !plan.rows.is_empty() || !body.params.contains(&index) {
            return None;
        }
        plan.rows.clone_from(lines);
        plan.batch.clear();
    }
    Some(plan)
}

/// The rows of a cube.
pub(super) enum Rows {
    /// From one on, of so many.
    Run { first: Val, total: Val },
    /// Of a group, with the number of each in shared memory.
    Group { group: Group, lines: Shared },
}

impl Rows {
    /// The number of a row of the tile among all.
    pub(super) fn number(&self, e: &mut Emit, row: Val) -> Val {
        match self {
            Rows::Run { first, .. } => e.add(*first, row),
            Rows::Group { lines, .. } => e.load(*lines, row),
        }
    }

    /// Whether there is that row of the tile.
    pub(super) fn exists(&self, e: &mut Emit, row: Val) -> Val {
        let (first, end) = match self {
            Rows::Run { first, total } => (*first, *total),
            Rows::Group { group, .. } => (group.first, group.end),
        };
        let at = e.add(first, row);
        e.lt(at, end)
    }
}

/// A part of what is summed.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// Its depth, from one number up to another.
    pub(super) first: Val,
    pub(super) end: Val,
}

impl Part {
    /// One by its number, of so much depth.
    pub(super) fn of(e: &mut Emit, tile: Tile, number: Val, depth: Val) -> Part {
        if tile.parts == 1 {
            return Part { first: e.u32(0), end: depth };
        }
        let stages = e.tiles(depth, tile.depth);
        let (each, of_stage) = (e.tiles(stages, tile.parts), e.u32(tile.depth));
        let size = e.mul(each, of_stage);
        let first = e.mul(number, size);
        let end = e.add(first, size);
        Part { first, end: e.binary(Bin::Min, end, depth) }
    }

    /// The numbers of a part and of a repeat, by the number of both among all: the repeats of a part lie behind one another.
    pub(super) fn find(e: &mut Emit, tile: Tile, number: Val, repeats: Val) -> (Val, Val) {
        match tile.parts {
            1 => (e.u32(0), number),
            _ => (e.div(number, repeats), e.rem(number, repeats)),
        }
    }
}

/// The kernel's instructions, over the buffers of the parameters, of the order that rows of groups have, and of the output.
pub(crate) fn emit(
    e: &mut Emit,
    mut x: Exprs<'_>,
    (plan, tile): (&FewPlan, Tile),
    buffer: impl Fn(ValueId) -> (Buf, Elem),
    order: Option<Buf>,
    output: Buf,
) {
    let x = &mut x;
    let narrow = buffer(plan.products[0].narrow);
    if tile.stays(plan) {
        return bulk::emit(e, x, (plan, tile), Which::Several, (narrow, output));
    }
    // Groups of planes share out registers by themselves.
    if !tile.by.in_groups() {
        e.cubes_at_once(tile.cubes);
    }
    let [rows, columns, repeats] = [&plan.rows, &plan.columns, &plan.batch].map(|axes| x.total(e, axes));
    let width = tile.columns(plan);
    let (of_rows, of_columns) = (e.u32(tile.rows), e.u32(width));
    let cube = e.cube();
    let groups = index(plan).map(|(along, _)| x.extent(along));
    let row_tiles = match groups {
        None => e.tiles(rows, tile.rows),
        Some(groups) => Group::tiles(e, rows, groups, tile.rows),
    };
    let column_tiles = e.tiles(columns, width);
    let (batch, number, block) = find(e, cube, [row_tiles, column_tiles]);
    let column0 = e.mul(block, of_columns);
    let parts = e.u32(tile.parts);
    let all = e.mul(repeats, parts);
    // All units of a cube agree.
    let inside = e.lt(batch, all);
    let at = Part::find(e, tile, batch, repeats);
    e.if_(inside, |e| match (groups, order) {
        (Some(groups), Some(order)) => {
            let group = Group::find(e, order, groups, number, (tile.rows, tile.units()));
            let some = e.lt(group.first, group.end);
            e.if_(some, |e| {
                let lines = group.lines(e, order, groups, tile.rows);
                let rows = Rows::Group { group, lines };
                if tile.by == By::Boxes {
                    let one = Which::One { rows: &rows, column: column0 };
                    return bulk::emit(e, x, (plan, tile), one, (narrow, output));
                }
                multiply(e, x, (plan, tile), &buffer, (at, column0, columns, &rows), output);
            });
        }
        _ => {
            let first = e.mul(number, of_rows);
            let rows = Rows::Run { first, total: rows };
            multiply(e, x, (plan, tile), &buffer, (at, column0, columns, &rows), output);
        }
    });
}

/// Which tile has a number, of so many down and across: its repeat, and how many are above it and to its left. They are numbered along the
/// rows of a band, then the columns, then the bands, then the batch.
pub(super) fn find(e: &mut Emit, number: Val, [down, across]: [Val; 2]) -> (Val, Val, Val) {
    let tiles = e.mul(down, across);
    let (at, batch) = (e.rem(number, tiles), e.div(number, tiles));
    let band = e.u32(BAND);
    let of_band = e.mul(band, across);
    let (before, at) = (e.div(at, of_band), e.rem(at, of_band));
    let before = e.mul(before, band);
    let high = e.sub(down, before);
    let high = e.binary(Bin::Min, high, band);
    let (above, left) = (e.rem(at, high), e.div(at, high));
    (batch, e.add(before, above), left)
}

/// Where a row of a tile begins in the memory of the narrow operand, and whether it exists.
pub(super) fn line(
    e: &mut Emit,
    x: &Exprs<'_>,
    plan: &FewPlan,
    memory: &[AxisId],
    (rows, row): (&Rows, Val),
) -> (Val, Val) {
    let exists = rows.exists(e, row);
    // An operand may lack axes of the index.
    let at = rows.number(e, row);
    let at = x.split(e, at, &plan.rows);
    (place(e, x, memory, &[(&plan.rows[..], &at[..])]), exists)
}

/// All depth of a stage's axes, in numbers of 16 bits.
pub(super) fn depth(e: &mut Emit, x: &Exprs<'_>, plan: &FewPlan, factor: Factor) -> Val {
    let (depth, halves) = (x.total(e, &plan.inner), e.u32(factor.halves()));
    e.mul(depth, halves)
}

/// Multiplies a tile.
fn multiply(
    e: &mut Emit,
    x: &mut Exprs<'_>,
    (plan, tile): (&FewPlan, Tile),
    buffer: &dyn Fn(ValueId) -> (Buf, Elem),
    ((number, batch), column0, columns, rows): ((Val, Val), Val, Val, &Rows),
    output: Buf,
) {
    let body = x.body();
    let batch_index = x.split(e, batch, &plan.batch);
    let repeat = (&plan.batch[..], &batch_index[..]);
    let operands: Vec<ValueId> = [plan.products[0].narrow]
        .into_iter()
        .chain(plan.products.iter().filter_map(|p| p.table.elements()))
        .collect();
    let factor = tile.factor(body, plan);
    let elem = factor.elem();
    let ([narrow, wide], [left, right]) = (tile.layouts(body, plan), tile.pieces(body, plan));
    let stages = tile.stages(body, plan);
    let left = Staged::new(e, elem, narrow, left, stages);
    let right: Vec<_> = plan.products.iter().map(|_| Staged::new(e, elem, wide, right, stages)).collect();
    let slab = plan.products.len() as u32 * tile.slab() * tile.slab_pitch(plan);
    let slab = e.shared(Elem::F32, slab as usize);
    let depth = depth(e, x, plan, factor);
    let epilogue = Epilogue::of(body);
    let unit = e.unit();
    let part = Part::of(e, tile, number, depth);
    let mut feed = Feed::new(factor, (depth, part), unit);
    let memory = &body.ty(operands[0]).axes;
    let steps = Offsets::of(e, x, &plan.inner, memory);
    feed.add(e, tile.units(), buffer(operands[0]), (&left, steps), |e, row| {
        line(e, x, plan, memory, (rows, row))
    });
    // No matrix is read for an index that is none: it counts as 0.
    let (chosen, known) = match (rows, index(plan)) {
        (Rows::Group { group, .. }, Some((along, _))) => {
            (Some(([along], [group.number])), Some(e.lt(group.number, x.extent(along))))
        }
        _ => (None, None),
    };
    for (&table, staged) in operands[1..].iter().zip(&right) {
        let memory = &body.ty(table).axes;
        let steps = Offsets::of(e, x, &plan.inner, memory);
        let starts = Offsets::of(e, x, &plan.columns, memory);
        feed.add(e, tile.units(), buffer(table), (staged, steps), |e, column| {
            let at = e.add(column0, column);
            let mut exists = e.lt(at, columns);
            if let Some(known) = known {
                exists = e.and(exists, known);
            }
            let at = epilogue.in_order(e, x, &plan.columns, at);
            (starts.at(e, at), exists)
        });
    }
    let sums = Sums::new(e, (plan, tile));
    let (zero, one, outer) = (e.u32(0), e.u32(1), x.total(e, &plan.outer));
    let multiplied = if tile.by.in_groups() {
        Multiplied::Groups(Groups::new(e, factor, &sums, (&left, &right), stages))
    } else {
        Multiplied::Planes(Box::new(Tiles::new(e, (plan, tile), (factor, &sums), &left, &right)))
    };
    e.for_step(zero, outer, one, |e, o| {
        let outer_index = x.split(e, o, &plan.outer);
        let mut known = vec![repeat, (&plan.outer[..], &outer_index[..])];
        known.extend(chosen.as_ref().map(|(along, group)| (&along[..], &group[..])));
        let bases: Vec<_> = operands.iter().map(|&v| place(e, x, &body.ty(v).axes, &known)).collect();
        if outer.known() != Some(1) {
            // What the stages held for the index before has been used.
            e.sync();
        }
        match &multiplied {
            Multiplied::Groups(groups) => groups.multiply(e, &feed, &bases, part),
            Multiplied::Planes(tiles) => by_planes(e, tiles, &feed, &bases, (stages, tile.depth, part)),
        }
    });
    sums.finish(e, x, repeat, (number, rows, column0, columns), (slab, output));
}

/// Who multiplies what lies in shared memory.
enum Multiplied<'p> {
    Planes(Box<Tiles<'p>>),
    Groups(Groups<'p>),
}

/// Adds up the depth of a part, with so many stages of some depth. `bases` is where each operand begins.
fn by_planes(
    e: &mut Emit,
    tiles: &Tiles<'_>,
    feed: &Feed<'_>,
    bases: &[Val],
    (stages, of_stage, part): (u32, u32, Part),
) {
    let zero = e.u32(0);
    // All stages are on their way, each as a group of copies; what is read into registers has one less.
    for n in 0..stages {
        let (more, stage) = (e.u32(n * of_stage), e.u32(n));
        let k0 = e.add(part.first, more);
        feed.copy(e, bases, k0, stage);
        if n + 1 < stages {
            let read = feed.read(e, bases, k0);
            feed.keep(e, stage, &read);
        }
    }
    e.await_groups_but(stages - 1);
    e.sync();
    let (here, free) = (e.var(zero), e.u32(stages - 1));
    let free = e.var(free);
    tiles.first(e, zero);
    let [step, ahead, behind] = [1, stages - 1, stages].map(|n| e.u32(n * of_stage));
    e.for_step(part.first, part.end, step, |e, k0| {
        let (stage, before) = (e.get(here), e.get(free));
        let read = |e: &mut Emit| {
            let k = e.add(k0, ahead);
            feed.read(e, bases, k)
        };
        let turn = |e: &mut Emit, read: Read| {
            feed.keep(e, before, &read);
            e.await_groups_but(stages - 2);
            // The next stage is there, and the one at hand is in registers.
            e.sync();
            let next = feed::behind(e, stage, stages);
            e.set(here, next);
            e.set(free, stage);
            next
        };
        tiles.multiply(e, stage, read, turn, |e| {
            let k = e.add(k0, behind);
            feed.copy(e, bases, k, stage);
        });
    });
}
