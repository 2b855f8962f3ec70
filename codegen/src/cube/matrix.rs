//! Products with many rows on tensor cores, by tiles, in f32 sums of bf16 or f16.
//!
//! Operands are parameters, read in accesses of 16 bytes. A cube's 8 planes bring some depth of both operands into shared
//! memory at a time, in rows that are padded so that eight of them meet in no bank; while they multiply, what comes next is on its
//! way into registers, and then goes to the other of two stages. A plane has half of the rows and a quarter of the columns, as tiles of
//! 16 by 8 that `mma` adds up in registers, with operands from `ldmatrix`. In the end the sums go through shared memory, 32 rows at a
//! time, and each unit makes elements of the result of them. The axes are those of a [`FewPlan`]; what lies beyond an edge counts
//! as 0 and is not stored.
//!
//! A *grouped* product has a matrix for each index. Its rows are those of the index, sorted by [`sort`](super::sort): a cube has rows of
//! one group, and finds which in the same order as all others do.
//!
//! A narrow operand in f32 is split into numbers of 16 bits that add up to it, which are multiplied one after the other.

use latentc_ir::{AxisId, DType, Function, Op, ValueId};

use super::contract::{Offsets, gather_index};
use super::emit::{Array, Buf, Elem, Emit, Pack, Shared, Val};
use super::expr::{Exprs, Fold};
use super::few::place;
use super::fragment::{PACK, clear, in_packs, left as left_operand, sums};
use super::sort::Group;
use crate::few::FewPlan;

/// Units of a cube.
pub(crate) const UNITS: u32 = 256;
/// Rows that are finished at a time.
const SLAB: u32 = 32;
/// Planes above one another in a tile, and beside one another.
const DOWN: u32 = 2;
const ACROSS: u32 = UNITS / 32 / DOWN;
/// Terms of a sum, each of which may be off by 2^-18: as much as f32 sums of as many are off in any case.
const FORGIVING: u64 = 64;

/// What a cube has of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    /// Rows.
    pub(crate) rows: u32,
    /// Columns, of all products together.
    pub(crate) columns: u32,
    /// Depth that is brought in at a time.
    depth: u32,
}

impl Tile {
    /// All of them. Low ones are for few rows: there are more of them, and each has more on its way.
    pub(crate) const ALL: [Tile; 3] = [
        Tile { rows: 32, columns: 64, depth: 64 },
        Tile { rows: 64, columns: 64, depth: 64 },
        Tile { rows: 128, columns: 128, depth: 32 },
    ];

    /// The tile with so many rows.
    pub(crate) fn of(rows: u8) -> Option<Tile> {
        Tile::ALL.into_iter().find(|t| t.rows == u32::from(rows))
    }

    /// From one row of depth to the next.
    fn pitch(self) -> u32 {
        self.depth + PACK
    }

    /// Elements of a stage of the narrow operand.
    fn narrow_stage(self) -> u32 {
        self.rows * self.pitch()
    }

    /// Tiles of 16 rows that a plane has.
    fn high(self) -> u32 {
        self.rows / DOWN / 16
    }

    /// How many columns of each product a cube has.
    pub(crate) fn columns(self, plan: &FewPlan) -> u32 {
        self.columns / plan.products.len() as u32
    }

    /// From one depth to the next where the wide operand lies across its columns.
    fn pitch_across(self, plan: &FewPlan) -> u32 {
        self.columns(plan) + PACK
    }

    /// Elements of a stage of one product's wide operand.
    fn wide_stage(self, plan: &FewPlan) -> u32 {
        if plan.along { self.columns(plan) * self.pitch() } else { self.depth * self.pitch_across(plan) }
    }

    /// Bytes of shared memory.
    pub(crate) fn shared_bytes(self, body: &Function, plan: &FewPlan) -> usize {
        let products = plan.products.len() as u32;
        let stages = 2 * 2 * (pieces(body, plan) * self.narrow_stage() + products * self.wide_stage(plan));
        let sums = 4 * products * SLAB * (self.columns(plan) + 4);
        let lines = if index(plan).is_some() { 4 * self.rows + Group::SHARED_BYTES } else { 0 };
        (stages + sums + lines) as usize
    }
}

/// The axis of the wide operands that an index chooses along, and the index.
pub(crate) fn index(plan: &FewPlan) -> Option<(AxisId, ValueId)> {
    plan.products[0].index
}

/// How many numbers of 16 bits stand for one of the narrow operand.
fn pieces(body: &Function, plan: &FewPlan) -> u32 {
    let product = &plan.products[0];
    if body.ty(product.narrow).dtype == body.ty(product.table).dtype {
        return 1;
    }
    // Three have all 24 bits, two have 17.
    let terms = plan.outer.iter().chain(&plan.inner).map(|a| body.axis(*a).size.fixed().unwrap_or(1));
    if terms.fold(1, u64::saturating_mul) < FORGIVING { 3 } else { 2 }
}

/// The plan of a body that one launch can compute so, with the operands of one side as the wide ones. The rows of a grouped product are
/// those of its index.
pub(crate) fn plan(body: &Function, wide: usize) -> Option<FewPlan> {
    let mut plan = FewPlan::of(body, wide)?;
    let narrow = *plan.narrows().first()?;
    let (dtype, tables) = (body.ty(narrow).dtype, body.ty(plan.products[0].table).dtype);
    let multiplies = plan.narrows().len() == 1
        && plan.products.len() <= 2
        && matches!((dtype, tables), (DType::Bf16 | DType::F32, DType::Bf16) | (DType::F16, DType::F16))
        && plan.products.iter().all(|p| p.index == index(&plan) && body.ty(p.table).dtype == tables);
    // What an epilogue folds would be folded for each element.
    let folds = body.body.iter().any(|i| i.op != Op::Contract && Fold::of(body, i).is_some());
    let whole = plan.factor(body).is_multiple_of(PACK.into());
    if !multiplies
        || folds
        || !whole
        || !body.params.contains(&narrow)
        || !in_packs(body, narrow, &plan.inner)
    {
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
enum Rows {
    /// From one on, of so many.
    Run { first: Val, total: Val },
    /// Of a group, with the number of each in shared memory.
    Group { group: Group, lines: Shared },
}

impl Rows {
    /// The number of a row of the tile among all.
    fn number(&self, e: &mut Emit, row: Val) -> Val {
        match self {
            Rows::Run { first, .. } => e.add(*first, row),
            Rows::Group { lines, .. } => e.load(*lines, row),
        }
    }

    /// Whether there is that row of the tile.
    fn exists(&self, e: &mut Emit, row: Val) -> Val {
        let (first, end) = match self {
            Rows::Run { first, total } => (*first, *total),
            Rows::Group { group, .. } => (group.first, group.end),
        };
        let at = e.add(first, row);
        e.lt(at, end)
    }
}

/// A pack that this unit brings in: where it lies in memory but for the depth, whether its row exists, its depth in the stage, and
/// its place there.
struct Load {
    buf: Buf,
    /// How it is stored, and in how many accesses it is read.
    elem: Elem,
    accesses: u32,
    start: Val,
    exists: Val,
    depth: Val,
    /// Where a depth lies in the operand.
    steps: usize,
    /// One array for each number of 16 bits that an element is split into.
    to: Vec<Shared>,
    place: Val,
    stage: u32,
}

impl Load {
    /// What is there at a depth, as it is stored; 0 beyond an edge.
    fn read(&self, e: &mut Emit, (base, steps): (Val, &Offsets), k0: Val, depth: Val) -> Vec<Pack> {
        let width = PACK / self.accesses;
        let k = e.add(k0, self.depth);
        let deep = e.lt(k, depth);
        let inside = e.and(self.exists, deep);
        let nothing = e.zero_pack(self.elem, width);
        let vars: Vec<_> = (0..self.accesses).map(|_| e.pack_var(&nothing)).collect();
        e.if_(inside, |e| {
            let step = steps.at(e, k);
            let at = e.add(base, self.start);
            let at = e.add(at, step);
            let of_access = e.u32(width);
            let at = e.div(at, of_access);
            for (n, vars) in vars.iter().enumerate() {
                let n = e.u32(n as u32);
                let at = e.add(at, n);
                let loaded = e.load_pack(self.buf, at, width, true);
                e.set_pack(vars, &loaded);
            }
        });
        vars.iter().map(|vars| e.get_pack(vars, &nothing)).collect()
    }

    /// Puts it into a stage.
    fn keep(&self, e: &mut Emit, stage: Val, read: &[Pack], elem: Elem) {
        let size = e.u32(self.stage);
        let first = e.mul(stage, size);
        let at = e.add(first, self.place);
        let width = e.u32(PACK);
        let at = e.div(at, width);
        if let ([to], [pack]) = (&self.to[..], read) {
            e.store_pack(*to, at, pack);
            return;
        }
        let width = PACK / self.accesses;
        let mut rest: Vec<Val> = Vec::new();
        for pack in read {
            rest.extend((0..width).map(|n| e.element_of(pack, n)));
        }
        for (n, to) in self.to.iter().enumerate() {
            let piece: Vec<_> = rest.iter().map(|&x| e.cast(x, elem)).collect();
            let pack = e.pack(elem, &piece);
            e.store_pack(*to, at, &pack);
            if n + 1 < self.to.len() {
                for (rest, piece) in rest.iter_mut().zip(piece) {
                    let piece = e.cast(piece, Elem::F32);
                    *rest = e.sub(*rest, piece);
                }
            }
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
    let [rows, columns, repeats] = [&plan.rows, &plan.columns, &plan.batch].map(|axes| x.total(e, axes));
    let width = tile.columns(plan);
    let (of_rows, of_columns) = (e.u32(tile.rows), e.u32(width));
    // Cubes are numbered along the rows, then the columns, then the batch.
    let cube = e.cube();
    let groups = index(plan).map(|(along, _)| x.extent(along));
    let row_tiles = match groups {
        None => e.tiles(rows, tile.rows),
        Some(groups) => Group::tiles(e, rows, groups, tile.rows),
    };
    let column_tiles = e.tiles(columns, width);
    let (number, across) = (e.rem(cube, row_tiles), e.div(cube, row_tiles));
    let (block, batch) = (e.rem(across, column_tiles), e.div(across, column_tiles));
    let column0 = e.mul(block, of_columns);
    // All units of a cube agree.
    let inside = e.lt(batch, repeats);
    e.if_(inside, |e| match (groups, order) {
        (Some(groups), Some(order)) => {
            let group = Group::find(e, order, groups, number, tile.rows);
            let some = e.lt(group.first, group.end);
            e.if_(some, |e| {
                let lines = group.lines(e, order, groups, tile.rows);
                let rows = Rows::Group { group, lines };
                multiply(e, x, (plan, tile), &buffer, (batch, column0, columns, &rows), output);
            });
        }
        _ => {
            let first = e.mul(number, of_rows);
            let rows = Rows::Run { first, total: rows };
            multiply(e, x, (plan, tile), &buffer, (batch, column0, columns, &rows), output);
        }
    });
}

/// Multiplies a tile.
fn multiply(
    e: &mut Emit,
    x: &mut Exprs<'_>,
    (plan, tile): (&FewPlan, Tile),
    buffer: &dyn Fn(ValueId) -> (Buf, Elem),
    (batch, column0, columns, rows): (Val, Val, Val, &Rows),
    output: Buf,
) {
    let body = x.body();
    let width = tile.columns(plan);
    let batch_index = x.split(e, batch, &plan.batch);
    let repeat = (&plan.batch[..], &batch_index[..]);
    let narrow = plan.products[0].narrow;
    let (narrow_buf, narrow_elem) = buffer(narrow);
    let elem = buffer(plan.products[0].table).1;
    let stage = tile.narrow_stage();
    let left: Vec<_> = (0..pieces(body, plan)).map(|_| e.shared(elem, (2 * stage) as usize)).collect();
    let right: Vec<_> =
        plan.products.iter().map(|_| e.shared(elem, (2 * tile.wide_stage(plan)) as usize)).collect();
    let slab = e.shared(Elem::F32, plan.products.len() * (SLAB * (width + 4)) as usize);
    let tiles = Tiles::new(e, (plan, tile), elem, &left, &right);
    // Where a depth lies, for the narrow operand and then for each wide one.
    let mut steps = vec![Offsets::of(e, x, &plan.inner, &body.ty(narrow).axes)];
    let mut loads = Vec::new();
    let unit = e.unit();
    let (of_depth, pack, pitch) = (e.u32(tile.depth / PACK), e.u32(PACK), e.u32(tile.pitch()));
    for n in 0..tile.rows * tile.depth / PACK / UNITS {
        let first = e.u32(n * UNITS);
        let number = e.add(unit, first);
        let (row, k) = (e.div(number, of_depth), e.rem(number, of_depth));
        let depth = e.mul(k, pack);
        let exists = rows.exists(e, row);
        // An operand may lack axes of the index.
        let at = rows.number(e, row);
        let at = x.split(e, at, &plan.rows);
        let start = place(e, x, &body.ty(narrow).axes, &[(&plan.rows[..], &at[..])]);
        let place = e.mul(row, pitch);
        let place = e.add(place, depth);
        let (buf, elem, to) = (narrow_buf, narrow_elem, left.clone());
        let accesses = (elem.bytes() / 2) as u32;
        loads.push(Load { buf, elem, accesses, start, exists, depth, steps: 0, to, place, stage });
    }
    // No matrix is read for an index that is none: it counts as 0.
    let (chosen, known) = match (rows, index(plan)) {
        (Rows::Group { group, .. }, Some((along, _))) => {
            (Some(([along], [group.number])), Some(e.lt(group.number, x.extent(along))))
        }
        _ => (None, None),
    };
    for (p, product) in plan.products.iter().enumerate() {
        let memory = &body.ty(product.table).axes;
        steps.push(Offsets::of(e, x, &plan.inner, memory));
        let starts = Offsets::of(e, x, &plan.columns, memory);
        for n in 0..width * tile.depth / PACK / UNITS {
            let first = e.u32(n * UNITS);
            let number = e.add(unit, first);
            let (column, depth, place) = if plan.along {
                let (column, k) = (e.div(number, of_depth), e.rem(number, of_depth));
                let depth = e.mul(k, pack);
                let place = e.mul(column, pitch);
                (column, depth, e.add(place, depth))
            } else {
                let (packs, pitch) = (e.u32(width / PACK), e.u32(tile.pitch_across(plan)));
                let (depth, c) = (e.div(number, packs), e.rem(number, packs));
                let column = e.mul(c, pack);
                let place = e.mul(depth, pitch);
                (column, depth, e.add(place, column))
            };
            let at = e.add(column0, column);
            let mut exists = e.lt(at, columns);
            if let Some(known) = known {
                exists = e.and(exists, known);
            }
            let start = starts.at(e, at);
            let (buf, elem) = buffer(product.table);
            let (to, stage) = (vec![right[p]], tile.wide_stage(plan));
            loads.push(Load { buf, elem, accesses: 1, start, exists, depth, steps: p + 1, to, place, stage });
        }
    }

    let (zero, one, outer) = (e.u32(0), e.u32(1), x.total(e, &plan.outer));
    let depth = x.total(e, &plan.inner);
    let all = plan.products.iter().map(|p| p.table);
    let operands: Vec<ValueId> = [narrow].into_iter().chain(all).collect();
    e.for_step(zero, outer, one, |e, o| {
        let outer_index = x.split(e, o, &plan.outer);
        let mut known = vec![repeat, (&plan.outer[..], &outer_index[..])];
        known.extend(chosen.as_ref().map(|(along, group)| (&along[..], &group[..])));
        let bases: Vec<_> = operands.iter().map(|&v| place(e, x, &body.ty(v).axes, &known)).collect();
        let read = |e: &mut Emit, k0: Val| -> Vec<Vec<Pack>> {
            let read = |load: &Load| load.read(e, (bases[load.steps], &steps[load.steps]), k0, depth);
            loads.iter().map(read).collect()
        };
        let keep = |e: &mut Emit, stage: Val, read: &[Vec<Pack>]| {
            loads.iter().zip(read).for_each(|(load, read)| load.keep(e, stage, read, elem));
        };
        let first = read(e, zero);
        // What the other stage held for the index before has been used.
        e.sync();
        keep(e, zero, &first);
        e.sync();
        let step = e.u32(tile.depth);
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
    tiles.finish(e, x, repeat, (rows, column0, columns), (slab, output));
}

/// A plane's tiles.
struct Tiles<'p> {
    plan: &'p FewPlan,
    tile: Tile,
    elem: Elem,
    left: &'p [Shared],
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

impl<'p> Tiles<'p> {
    fn new(
        e: &mut Emit,
        (plan, tile): (&'p FewPlan, Tile),
        elem: Elem,
        left: &'p [Shared],
        right: &'p [Shared],
    ) -> Tiles<'p> {
        let wide = tile.columns(plan) / ACROSS / 8;
        let zeros = |e: &mut Emit| {
            let tile = sums(e);
            clear(e, tile);
            tile
        };
        let row = |e: &mut Emit| (0..wide).map(|_| zeros(e)).collect::<Vec<_>>();
        let sums = plan.products.iter().map(|_| (0..tile.high()).map(|_| row(e)).collect()).collect();
        let a = (0..tile.high()).map(|_| left_operand(e, elem)).collect();
        let b = plan.products.iter().map(|_| (0..wide).map(|_| e.array(elem, 2, 2)).collect()).collect();
        let (unit, plane, across) = (e.unit(), e.u32(32), e.u32(ACROSS));
        let (number, lane) = (e.div(unit, plane), e.rem(unit, plane));
        let (down, right_of) = (e.div(number, across), e.rem(number, across));
        let (high, width) = (e.u32(16 * tile.high()), e.u32(tile.columns(plan) / ACROSS));
        let (row, column) = (e.mul(down, high), e.mul(right_of, width));
        Tiles { plan, tile, elem, left, right, sums, a, b, lane, row, column }
    }

    /// Adds up what a stage holds.
    fn multiply(&self, e: &mut Emit, stage: Val) {
        let (tile, along) = (self.tile, self.plan.along);
        let (eight, sixteen, pitch) = (e.u32(8), e.u32(16), e.u32(tile.pitch()));
        let (low, high) = (e.rem(self.lane, sixteen), e.div(self.lane, sixteen));
        for k in (0..tile.depth).step_by(16) {
            for (p, b) in self.b.iter().enumerate() {
                let size = e.u32(tile.wide_stage(self.plan));
                let first = e.mul(stage, size);
                let start = if along {
                    let (row, half) = (e.rem(self.lane, eight), e.div(low, eight));
                    let row = e.add(self.column, row);
                    let row = e.mul(row, pitch);
                    let half = e.mul(half, eight);
                    e.add(row, half)
                } else {
                    let pitch = e.u32(tile.pitch_across(self.plan));
                    let row = e.mul(low, pitch);
                    e.add(row, self.column)
                };
                let start = e.add(first, start);
                for (n, b) in b.iter().enumerate() {
                    let n = n as u32 * 8;
                    let more =
                        if along { n * tile.pitch() + k } else { k * tile.pitch_across(self.plan) + n };
                    let more = e.u32(more);
                    let at = e.add(start, more);
                    e.load_matrix(*b, self.right[p], at, 2, !along);
                }
            }
            for left in self.left {
                // Each unit names a row of 8 numbers: of 16 rows, first those of the first 8 numbers.
                let size = e.u32(tile.narrow_stage());
                let first = e.mul(stage, size);
                let row = e.add(self.row, low);
                let row = e.mul(row, pitch);
                let start = e.add(first, row);
                let across = e.mul(high, eight);
                let start = e.add(start, across);
                for (m, a) in self.a.iter().enumerate() {
                    let more = e.u32(m as u32 * 16 * tile.pitch() + k);
                    let at = e.add(start, more);
                    e.load_matrix(*a, *left, at, 4, false);
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
    }

    /// Makes the elements of the result.
    fn finish(
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
        let width = tile.columns(plan);
        let pitch = width + 4;
        let (two, four, sixteen) = (e.u32(2), e.u32(4), e.u32(16));
        let (of_row, of_plane) = (e.u32(pitch), e.u32(16 * tile.high()));
        let (down, right) = (e.div(self.lane, four), e.rem(self.lane, four));
        let plane = e.div(self.row, of_plane);
        let plane = e.mul(plane, sixteen);
        let row = e.add(plane, down);
        let row = e.mul(row, of_row);
        let right = e.mul(right, two);
        let start = e.add(row, self.column);
        let start = e.add(start, right);
        for m in 0..tile.high() {
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
                let row = e.add(half, skipped);
                let row = e.add(row, rest);
                let column = e.add(column0, c);
                let (row_exists, column_exists) = (rows.exists(e, row), e.lt(column, columns));
                let inside = e.and(row_exists, column_exists);
                e.if_(inside, |e| {
                    let row = rows.number(e, row);
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
            if m + 1 < tile.high() {
                e.sync();
            }
        }
    }
}
