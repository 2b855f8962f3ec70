//! What the launches of a way move and multiply, by formula from its tiling.
//!
//! The cubes of a launch share out some axes in tiles and walk the others whole. So a tensor that lacks the axes of a share is read again for
//! each of its tiles, and all that a formula needs to know is how cubes are numbered: [`Share`] by [`Share`], the fastest first. That says
//! what each cube reads once. The emulator counts the same on small sizes, and tests hold one against the other.
//!
//! What of that comes from the device's memory is an estimate, and errs on the side of more: what is read again is in the cache if all that
//! the tensor has in between fits into half of it, or if those who read it run at the same time. Caches keep what was used last, so the
//! tensors that are read once pass through the other half.
//!
//! What data decide is taken as follows: what a mask hides is read, rows are shared out evenly among groups, and no two rows go to one
//! index of a gather.

use std::collections::BTreeSet;
use std::iter::Sum;

use latentc_ir::{AxisId, Function, Inst, Op, ValueId};
use serde::Serialize;

use super::emit::PLANE;
use super::kernel::{CubeIr, Form};
use super::machine::{CACHED, Machine};
use super::map::{COLUMNS, Map, Walk};
use super::matrix::{self, BAND, Tile};
use super::scatter_matrix::{OuterPlan, OuterTile};
use super::shape::LaunchShape;
use super::split::{KEPT, Role, Split};
use super::stages::{Operand, Stage, Stages};
use super::stream_matrix::{MatrixPlan, Tiling};
use super::target::Target;
use super::tuning;
use super::ways::way;
use super::{contract, few, refuse, scatter, stream};
use crate::device::DeviceError;
use crate::few::FewPlan;
use crate::map::made;
use crate::program::Kernel;
use crate::scatter::ScatterPlan;
use crate::stream::StreamPlan;

/// What a launch on a device moves and multiplies.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Moves {
    /// The entry.
    pub kernel: String,
    /// Of each buffer, in order, what is read and what is written.
    pub buffers: Vec<[Bytes; 2]>,
    /// Of all of that, what lies between launches of the kernel.
    pub between: Bytes,
    /// Operations of the units that multiply tiles, those on padding included.
    pub multiplied: f64,
}

/// Bytes that are read, or written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Bytes {
    /// By each cube once.
    pub by_block: f64,
    /// Once.
    pub distinct: f64,
    /// What comes from the device's memory, or goes there.
    pub memory: f64,
}

impl Bytes {
    fn once(bytes: f64) -> Bytes {
        Bytes { by_block: bytes, distinct: bytes, memory: bytes }
    }

    fn times(self, n: f64) -> Bytes {
        Bytes { by_block: n * self.by_block, distinct: n * self.distinct, memory: n * self.memory }
    }

    fn plus(self, other: Bytes) -> Bytes {
        Bytes {
            by_block: self.by_block + other.by_block,
            distinct: self.distinct + other.distinct,
            memory: self.memory + other.memory,
        }
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Bytes>>(items: I) -> Bytes {
        items.fold(Bytes::default(), Bytes::plus)
    }
}

impl Moves {
    /// Bytes of all buffers.
    pub fn bytes(&self) -> Bytes {
        self.buffers.iter().flatten().copied().sum()
    }
}

/// What a kernel moves in a way at these run-time sizes, a launch on the device after another.
///
/// # Errors
/// If it is no way of the kernel, or there are more cubes than can be numbered.
pub fn moves(
    kernel: &Kernel,
    way_of: tuning::Way,
    sizes: &[usize],
    machine: &Machine,
) -> Result<Vec<Moves>, DeviceError> {
    let kernel = way(kernel, way_of.kind);
    let mut all = Vec::new();
    for stage in Stages::of(&kernel).all {
        // What cannot be written is not counted.
        stage.ir(Target::Cuda)?;
        let shape = stage.shape(Target::Cuda);
        let grid = shape.grid(kernel.number(sizes)).map_err(|why| refuse(&kernel, why))?;
        let cubes = grid.0 as usize * grid.1 as usize;
        if cubes > 0 {
            let extents = stage.kernel.extents(sizes);
            let at_once = machine.at_once(shape.shared_bytes);
            let launch = Launch { stage: &stage, shape, cubes, extents, at_once, machine };
            all.extend(launch.moves(way_of.parts).into_iter().map(|moves| launch.between(moves)));
        }
    }
    Ok(all)
}

/// Axes that cubes share out: they are numbered together, and each cube has so many numbers.
struct Share {
    axes: Vec<AxisId>,
    tile: u64,
}

fn share(axes: &[AxisId], tile: impl Into<u64>) -> Share {
    Share { axes: axes.to_vec(), tile: tile.into() }
}

/// A launch on the device.
struct Launch<'s> {
    stage: &'s Stage,
    shape: LaunchShape,
    cubes: usize,
    extents: Vec<usize>,
    /// Cubes that run at the same time.
    at_once: usize,
    machine: &'s Machine,
}

/// How cubes are numbered.
struct Order {
    /// The fastest first.
    shares: Vec<Share>,
    /// Of the first, so many tiles come before the next share does, and the others behind all of that.
    band: Option<u64>,
}

/// A part of the number of a cube.
struct Level {
    tiles: u64,
    /// How often a tensor is read because of it.
    times: f64,
    /// Whether other tiles read other parts of the tensor.
    reads: bool,
}

impl From<Vec<Share>> for Order {
    fn from(shares: Vec<Share>) -> Order {
        Order { shares, band: None }
    }
}

impl Launch<'_> {
    fn body(&self) -> &Function {
        &self.stage.kernel.body
    }

    fn total<'a>(&self, axes: impl IntoIterator<Item = &'a AxisId>) -> u64 {
        axes.into_iter().map(|a| self.extents[a.0 as usize] as u64).product()
    }

    /// The launches that it comes to: a stream may be two.
    fn moves(&self, parts: Option<usize>) -> Vec<Moves> {
        let body = self.body();
        match (Form::of(&self.stage.kernel, Target::Cuda), self.stage.role) {
            (Form::Map(map), _) => vec![self.whole(&of_map(&map), Vec::new(), 0.0)],
            (Form::Tiles(plan), _) => {
                let tile = contract::TILE;
                let order = vec![share(&plan.n, tile), share(&plan.m, tile), share(&plan.batch, 1u32)];
                vec![self.whole(&order.into(), Vec::new(), 0.0)]
            }
            (Form::Few(plan, rows), _) => {
                let t = few::Tiling::of(body, &plan, rows, Target::Cuda);
                let order = vec![
                    share(&plan.rows, t.rows),
                    share(&plan.columns, t.columns),
                    share(&plan.batch, 1u32),
                ];
                vec![self.whole(&order.into(), Vec::new(), 0.0)]
            }
            (Form::Matrix(plan, _), Role::Sort) => self.sort(matrix::index(&plan).map(|(_, index)| index)),
            (Form::ScatterMatrix(plan, _), Role::Sort) => self.sort(Some(plan.scatter.index)),
            (Form::Matrix(plan, tile), _) => vec![self.matrix(&plan, tile)],
            (Form::ScatterMatrix(plan, tile), _) => vec![self.outer(&plan, tile)],
            (Form::Scatter(plan), _) => vec![self.scatter(&plan)],
            (Form::Stream(plan), _) => {
                let tiles = stream::Tiles::of(body, &plan);
                self.stream(&plan, [tiles.columns, tiles.rows], parts, |_| 0.0)
            }
            (Form::StreamMatrix(plan, t), _) => {
                self.stream(&plan.stream, [t.wide(), t.rows], parts, |positions| {
                    self.multiplied_by_stream(&plan, t, positions)
                })
            }
        }
    }

    /// A launch with one order of cubes: what it reads of parameters and of `more`, and what it writes once.
    fn whole(&self, order: &Order, more: Vec<Bytes>, multiplied: f64) -> Moves {
        let params = self.body().params.iter().filter(|p| CubeIr::reads(self.body(), **p));
        let reads = params.map(|&p| self.read(order, p)).chain(more).collect();
        self.launch(Role::Whole, reads, Bytes::once(self.bytes(made(self.body()))), multiplied)
    }

    fn launch(&self, role: Role, reads: Vec<Bytes>, written: Bytes, multiplied: f64) -> Moves {
        let reads = reads.into_iter().map(|read| [read, Bytes::default()]);
        let kernel = format!("{}{}", self.stage.kernel.name, role.suffix());
        let buffers = reads.chain([[Bytes::default(), written]]).collect();
        Moves { kernel, buffers, between: Bytes::default(), multiplied }
    }

    /// With what of it lies between launches: what parts of a stream leave comes last, and is known.
    fn between(&self, moves: Moves) -> Moves {
        let operands = self.stage.inputs.iter().chain([&self.stage.output]);
        let kept = operands.zip(&moves.buffers).filter(|(operand, _)| matches!(operand, Operand::Kept(_)));
        let kept: Bytes = kept.flat_map(|(_, bytes)| bytes).copied().sum();
        Moves { between: moves.between.plus(kept), ..moves }
    }

    /// All bytes of a value.
    fn bytes(&self, value: ValueId) -> f64 {
        let ty = self.body().ty(value);
        self.total(&ty.axes) as f64 * Target::Cuda.bytes(ty.dtype).unwrap_or(8) as f64
    }

    /// What cubes in an order read of a parameter.
    fn read(&self, order: &Order, param: ValueId) -> Bytes {
        let (element, whole) = (self.element(param), self.bytes(param));
        let paths = along(self.body(), param);
        let all: Bytes = paths
            .iter()
            .map(|(axes, each)| self.read_along(order, axes, element / *each as f64, whole))
            .sum();
        // Read in two places, it is still the same tensor; and where cubes share out axes of its own, each has a part of it.
        let tiles = order.shares.iter().map(|share| self.total(&share.axes).div_ceil(share.tile) as f64);
        let mut most = whole * tiles.product::<f64>();
        let own: BTreeSet<_> = self.body().ty(param).axes.iter().copied().collect();
        let mut shared = order.shares.iter().flat_map(|share| &share.axes).filter(|a| own.contains(a));
        if shared.all(|a| paths.iter().all(|(axes, _)| axes.contains(a))) {
            most = most.min(self.read_along(order, &own, element, whole).by_block);
        }
        let by_block = all.by_block.min(most);
        Bytes { by_block, distinct: all.distinct.min(whole), memory: all.memory.min(by_block) }
    }

    fn element(&self, value: ValueId) -> f64 {
        Target::Cuda.bytes(self.body().ty(value).dtype).unwrap_or(8) as f64
    }

    /// The same of a tensor that has so many bytes, one element for each index of these axes, or fewer.
    fn read_along(&self, order: &Order, axes: &BTreeSet<AxisId>, element: f64, whole: f64) -> Bytes {
        let distinct = whole.min(self.total(axes) as f64 * element);
        let (mut levels, mut bands) = (Vec::new(), None);
        let mut again = 1.0;
        for (n, share) in order.shares.iter().enumerate() {
            let sizes: Vec<_> = share.axes.iter().map(|a| self.extents[a.0 as usize] as u64).collect();
            let kept: Vec<_> = share.axes.iter().map(|a| axes.contains(a)).collect();
            let all = sizes.iter().product::<u64>();
            let has = sizes.iter().zip(&kept).filter(|(_, kept)| **kept).map(|(n, _)| *n).product::<u64>();
            let (tiles, times) =
                (all.div_ceil(share.tile), met(&sizes, &kept, share.tile) as f64 / has as f64);
            again *= times;
            let reads = kept.contains(&true);
            match order.band.filter(|&band| n == 0 && band < tiles) {
                None => levels.push(Level { tiles, times, reads }),
                Some(band) => {
                    // Who reads nothing of an axis reads the same in each tile.
                    let split = |tiles: u64, times: f64| if reads { times } else { tiles as f64 };
                    levels.push(Level { tiles: band, times: split(band, times), reads });
                    let tiles = tiles.div_ceil(band);
                    bands = Some(Level { tiles, times: split(tiles, 1.0), reads });
                }
            }
            if n == 1 {
                levels.extend(bands.take());
            }
        }
        Bytes { by_block: distinct * again, distinct, memory: distinct * self.often(&levels, distinct) }
    }

    /// How often a tensor of so many bytes comes from memory, where cubes are numbered by these levels.
    fn often(&self, levels: &[Level], bytes: f64) -> f64 {
        let (mut apart, mut often) = (1.0, 1.0);
        for (n, level) in levels.iter().enumerate() {
            let span = apart * level.tiles as f64;
            let behind = levels[n..].iter().filter(|level| level.reads).map(|level| level.tiles as f64);
            let between = bytes / behind.product::<f64>();
            if level.times > 1.0 && span > self.at_once as f64 && between > f64::from(CACHED) / 2.0 {
                often *= level.times.min((span / self.at_once as f64).ceil());
            }
            apart = span;
        }
        often
    }

    /// A product on tensor cores, of rows that may fall into groups.
    fn matrix(&self, plan: &FewPlan, tile: Tile) -> Moves {
        let body = self.body();
        let (rows, columns) = (self.total(&plan.rows), self.total(&plan.columns));
        let across = columns.div_ceil(tile.columns(plan).into());
        let depth = tile.filled(body, plan, self.total(&plan.inner)) * self.total(&plan.outer);
        let width = f64::from(tile.columns) * across as f64;
        let multiplied = |down: u64| {
            let elements = (down * u64::from(tile.rows)) as f64 * width * self.total(&plan.batch) as f64;
            2.0 * elements * depth as f64 * tile.multiplications(body, plan) as f64
        };
        let shares = |of_rows: u32| {
            vec![
                share(&plan.rows, of_rows),
                share(&plan.columns, tile.columns(plan)),
                share(&plan.batch, 1u32),
            ]
        };
        let Some((chosen, index)) = matrix::index(plan) else {
            let mut order = Order { shares: shares(tile.rows), band: Some(BAND.into()) };
            if tile.parts > 1 {
                let of_part = tile.of_part(body, plan, self.total(&plan.inner));
                order.shares.push(share(&plan.inner, of_part));
            }
            let mut moves = self.whole(&order, Vec::new(), multiplied(rows.div_ceil(tile.rows.into())));
            // Each part leaves all of the sums.
            for [_, written] in &mut moves.buffers {
                *written = written.times(tile.parts.into());
            }
            return moves;
        };
        // Rows of a group are anywhere.
        let order = Order::from(shares(1));
        let groups = self.total(&[chosen]);
        let (filled, down) = shared_out(rows, groups, tile.rows.into());
        let found = 4.0 * (self.cubes as f64 * (groups + 2) as f64 + (rows * across) as f64);
        let known = 4.0 * (groups + 2 + rows) as f64;
        let sorted = Bytes { by_block: found, distinct: known, memory: known };
        let mut moves = self.whole(&order, vec![sorted], multiplied(down));
        for (n, p) in self
            .inputs()
            .filter(|(_, p)| plan.products.iter().any(|product| product.table.held().contains(p)))
        {
            let matrix = self.bytes(p) / groups as f64;
            let distinct = matrix * filled as f64;
            moves.buffers[n][0] = Bytes { by_block: matrix * down as f64, distinct, memory: distinct };
        }
        self.without(index, moves)
    }

    /// An index that was asked by whoever sorted the rows.
    fn without(&self, index: ValueId, mut moves: Moves) -> Moves {
        for (n, _) in self.inputs().filter(|(_, p)| *p == index) {
            moves.buffers[n][0] = Bytes::default();
        }
        moves
    }

    /// The parameters that are buffers, by their places among these.
    fn inputs(&self) -> impl Iterator<Item = (usize, ValueId)> + '_ {
        let body = self.body();
        body.params.iter().copied().filter(|p| CubeIr::reads(body, *p)).enumerate()
    }

    /// The rows of a grouped product in order: each cube reads all indices.
    fn sort(&self, index: Option<ValueId>) -> Vec<Moves> {
        let Some(index) = index else { return Vec::new() };
        let bytes = self.bytes(index);
        let read = Bytes { by_block: bytes * self.cubes as f64, ..Bytes::once(bytes) };
        let order = bytes + 4.0 * (self.cubes + 1) as f64;
        vec![self.launch(Role::Sort, vec![read], Bytes::once(order), 0.0)]
    }

    /// Sums of outer products by index.
    fn outer(&self, plan: &OuterPlan, tile: OuterTile) -> Moves {
        let side = tile.side();
        let (rows, groups) = (self.total(&plan.scatter.rows), self.total(&[plan.scatter.along]));
        let tiles = plan.sides.each_ref().map(|s| self.total(&s.columns).div_ceil(side.into()));
        let order: Order = vec![
            share(&plan.sides[1].columns, side),
            share(&plan.sides[0].columns, side),
            share(&plan.scatter.rows, 1u32),
        ]
        .into();
        let of_all = (tiles[0] * tiles[1]) as f64;
        let found = 4.0 * (2.0 * self.cubes as f64 + rows as f64 * of_all);
        let known = 4.0 * (groups + 2 + rows) as f64;
        let sorted = Bytes { by_block: found, distinct: known, memory: known };
        let (filled, _) = shared_out(rows, groups, 1);
        let depth = rows.div_ceil(filled.max(1)).next_multiple_of(plan.depth(tile).into()) * filled;
        let elements = of_all * f64::from(side * side) * depth as f64;
        let multiplied = 2.0 * elements * plan.multiplications() as f64;
        self.without(plan.scatter.index, self.whole(&order, vec![sorted], multiplied))
    }

    /// Sums by index: each cube looks at all rows for those that go to its indices.
    fn scatter(&self, plan: &ScatterPlan) -> Moves {
        let kept = plan.kept(self.body());
        let order: Order = vec![
            share(&plan.columns, scatter::COLUMNS),
            share(&[plan.along], scatter::BLOCK),
            share(&kept, 1u32),
        ]
        .into();
        let mut moves = self.whole(&order, Vec::new(), 0.0);
        let column_tiles = self.total(&plan.columns).div_ceil(scatter::COLUMNS.into()) as f64;
        for (n, p) in self.inputs().filter(|(_, p)| *p != plan.index) {
            // A row is read where it goes.
            let bytes = self.bytes(p);
            let has = plan.columns.iter().any(|a| self.body().ty(p).has(*a));
            let by_block = if has { bytes } else { bytes * column_tiles };
            moves.buffers[n][0] = Bytes { by_block, ..Bytes::once(bytes) };
        }
        // Zeros are written first, and read where a row comes.
        let added =
            self.total(plan.rows.iter().chain(&plan.columns)) as f64 * self.element(self.body().results[0]);
        let output = moves.buffers.len() - 1;
        let read = added.min(self.bytes(self.body().results[0]));
        moves.buffers[output][0] = Bytes::once(read);
        moves
    }

    /// A stream with tiles of so many columns and rows, whole or in parts; `multiplied` says what is multiplied for so many positions that
    /// each cube walks, in all cubes.
    fn stream(
        &self,
        plan: &StreamPlan,
        [columns, rows]: [u32; 2],
        parts: Option<usize>,
        multiplied: impl Fn(&[u64]) -> f64,
    ) -> Vec<Moves> {
        let body = self.body();
        let mut shares = vec![share(&plan.n, columns), share(&plan.m, rows), share(&plan.batch, 1u32)];
        if self.total(&plan.n) <= columns.into() {
            // Columns of values are the depth of keys, and no share of it.
            shares.remove(0);
        }
        let positions = self.total(&[plan.along]);
        let cubes = (self.cubes, self.shape.shared_bytes);
        let Some(split) = Split::of(plan, cubes, &self.extents, self.machine, parts) else {
            return vec![self.whole(&shares.into(), Vec::new(), multiplied(&[positions]))];
        };
        shares.push(share(&[plan.along], split.chunk as u64));
        let (chunk, last) = (split.chunk as u64, positions % split.chunk as u64);
        let walked: Vec<_> = (0..split.parts as u64)
            .map(|part| if part + 1 == split.parts as u64 && last > 0 { last } else { chunk })
            .collect();
        let order = shares.into();
        let reads = Role::Part.reads(body, plan);
        let reads = body.params.iter().filter(|p| reads.contains(p)).map(|&p| self.read(&order, p));
        let reads: Vec<_> = reads.collect();
        // What the first launch leaves is in the cache for the second, if all of both has room there.
        let kept = 4.0 * split.scratch as f64;
        let all = kept + reads.iter().map(|read| read.distinct).sum::<f64>();
        let memory = if all <= f64::from(CACHED) { 0.0 } else { kept };
        let left = Bytes { memory, ..Bytes::once(kept) };
        let part = self.launch(Role::Part, reads, left, multiplied(&walked));
        // A unit for each element; those of a row read what is known of it together.
        let all = [&plan.batch[..], &plan.m, &plan.n].concat();
        let order: Order = vec![share(&all, self.shape.units)].into();
        let lines: BTreeSet<_> = plan.batch.iter().chain(&plan.m).copied().collect();
        let bytes = 4.0 * f64::from(KEPT) * split.parts as f64;
        let of_lines = self.read_along(&order, &lines, bytes, f64::INFINITY).by_block;
        let sums = 4.0 * (split.parts * split.elements) as f64;
        let found = Bytes { by_block: sums + of_lines, ..left };
        let merges = Role::Merge.reads(body, plan);
        let merges = body.params.iter().filter(|p| merges.contains(p)).map(|&p| self.read(&order, p));
        let result = Bytes::once(self.bytes(body.results[0]));
        let merge = self.launch(Role::Merge, merges.chain([found]).collect(), result, 0.0);
        vec![Moves { between: left, ..part }, Moves { between: found, ..merge }]
    }

    /// What tensor cores multiply in a stream whose cubes walk so many positions, part by part.
    fn multiplied_by_stream(&self, plan: &MatrixPlan, t: Tiling, positions: &[u64]) -> f64 {
        let walked: u64 = positions.iter().map(|n| n.next_multiple_of(t.positions.into())).sum();
        let stream = &plan.stream;
        let rows = self.total(&stream.m).next_multiple_of(t.rows.into()) * self.total(&stream.batch);
        let columns = self.total(&stream.n).div_ceil(t.wide().into());
        2.0 * (rows * columns * walked) as f64 * f64::from(plan.depth_of_position(t))
    }
}

fn of_map(map: &Map) -> Order {
    let units = u64::from(map.units());
    let of = match &map.walk {
        Walk::Elements => share(&map.domain, units * u64::from(map.pack)),
        Walk::Units(rows, together) => share(rows, units * u64::from(*together)),
        Walk::Planes(rows) => share(rows, units / u64::from(PLANE)),
        Walk::Cubes(rows, _) => share(rows, 1u32),
        Walk::Columns(rows) => share(rows, COLUMNS),
    };
    vec![of].into()
}

/// Of so many rows that fall evenly into so many groups: the groups that have any, and their tiles of so many rows.
fn shared_out(rows: u64, groups: u64, tile: u64) -> (u64, u64) {
    let (filled, each, more) = (rows.min(groups), rows / groups, rows % groups);
    (filled, more * (each + 1).div_ceil(tile) + (groups - more) * each.div_ceil(tile))
}

/// The indices that tiles of so many numbers meet, all tiles together, along those of these axes that are kept. The axes are numbered together,
/// the slowest first. Where it is hard to say it says more.
fn met(sizes: &[u64], kept: &[bool], tile: u64) -> u64 {
    let total = sizes.iter().product::<u64>();
    if !kept.contains(&true) {
        return total.div_ceil(tile);
    }
    if !kept.contains(&false) {
        return total;
    }
    (0..total.div_ceil(tile)).map(|n| met_by_run(sizes, kept, n * tile, total.min((n + 1) * tile))).sum()
}

/// The same of the numbers from one on, up to another.
fn met_by_run(sizes: &[u64], kept: &[bool], from: u64, to: u64) -> u64 {
    let ([_, sizes @ ..], [own, kept @ ..]) = (sizes, kept) else { return 1 };
    let of_one = sizes.iter().product::<u64>();
    let whole = || sizes.iter().zip(kept).filter(|(_, kept)| **kept).map(|(n, _)| *n).product::<u64>();
    let (first, last) = (from / of_one, (to - 1) / of_one);
    if first == last {
        return met_by_run(sizes, kept, from % of_one, (to - 1) % of_one + 1);
    }
    let head = met_by_run(sizes, kept, from % of_one, of_one);
    let tail = met_by_run(sizes, kept, 0, (to - 1) % of_one + 1);
    let between = last - first - 1;
    match own {
        true => head + between * whole() + tail,
        false if between > 0 => whole(),
        false => whole().min(head + tail),
    }
}

/// Axes along which a parameter is read: those of a value that is made of it, and those that were folded or summed on the way.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Path {
    own: BTreeSet<AxisId>,
    folded: BTreeSet<AxisId>,
    /// For so many indices of these side by side there is one element: a word of codes, or their scale.
    each: u64,
}

/// The axes along which elements of a parameter reach the result, for each way that they take there: one element, or fewer, for each index.
///
/// Beside the axes, for how many indices side by side there is one element.
fn along(body: &Function, param: ValueId) -> BTreeSet<(BTreeSet<AxisId>, u64)> {
    let mut of: Vec<BTreeSet<Path>> = vec![BTreeSet::new(); body.values.len()];
    let own = body.ty(param).axes.iter().copied().collect();
    of[param.0 as usize].insert(Path { own, folded: BTreeSet::new(), each: 1 });
    for inst in &body.body {
        for (n, arg) in inst.args.iter().enumerate() {
            for Path { own, mut folded, mut each } in of[arg.0 as usize].clone() {
                if let Op::Merge { axes, .. } = &inst.op
                    && axes.iter().any(|a| own.contains(a))
                {
                    let lacks = axes.iter().filter(|a| !own.contains(a));
                    each *= lacks.filter_map(|a| body.axis(*a).size.fixed()).product::<u64>().max(1);
                }
                let Some(own) = through(body, inst, n, own) else { continue };
                let (own, gone) = own.into_iter().partition(|&a| body.ty(inst.result()).has(a));
                folded.extend::<BTreeSet<_>>(gone);
                of[inst.result().0 as usize].insert(Path { own, folded, each });
            }
        }
    }
    let ways = of.swap_remove(body.results[0].0 as usize).into_iter();
    ways.map(|Path { own, folded, each }| (own.union(&folded).copied().collect(), each)).collect()
}

/// What axes of an operand become in the result, if it is read. What the result lacks is walked whole.
fn through(
    body: &Function,
    inst: &Inst,
    operand: usize,
    mut axes: BTreeSet<AxisId>,
) -> Option<BTreeSet<AxisId>> {
    let mut replace = |from: &[AxisId], to: &[AxisId]| {
        let before = axes.len();
        axes.retain(|a| !from.contains(a));
        if axes.len() < before {
            axes.extend(to);
        }
    };
    match &inst.op {
        Op::Rename { from, to } => replace(&[*from], &[*to]),
        Op::Split { axis, into } => replace(&[*axis], into),
        Op::Merge { axes: from, into } => replace(from, &[*into]),
        Op::Slice { axis, into, .. } => replace(&[*axis], &[*into]),
        Op::Concat { axes: from, into } => replace(&[from[operand]], &[*into]),
        Op::Gather { axis } if operand == 0 => replace(&[*axis], &body.ty(inst.args[1]).axes),
        Op::Rope { axis, .. } if operand == 2 => replace(&body.ty(inst.args[2]).axes, &[*axis]),
        Op::Append { .. } if operand == 0 => return None,
        Op::Gather { .. }
        | Op::Rope { .. }
        | Op::Append { .. }
        | Op::Const(_)
        | Op::Position { .. }
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Select
        | Op::Cast
        | Op::Contract
        | Op::Reduce { .. }
        | Op::Broadcast { .. }
        | Op::Pack { .. }
        | Op::Unpack { .. }
        | Op::TopK { .. }
        | Op::TopIndices { .. }
        | Op::ScatterAdd { .. }
        | Op::Past { .. }
        | Op::Softmax { .. }
        | Op::RmsNorm { .. }
        | Op::Call { .. } => {}
    }
    Some(axes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_meet_what_enumeration_says() {
        let sizes = [3, 4, 5];
        for tile in 1..=61 {
            for bits in 0..8u32 {
                let kept: Vec<_> = (0..3).map(|n| bits >> n & 1 == 1).collect();
                let total = sizes.iter().product::<u64>();
                let index = |n: u64| {
                    let at = [n / 20, n / 5 % 4, n % 5];
                    at.into_iter().zip(&kept).map(|(at, kept)| if *kept { at } else { 0 }).collect::<Vec<_>>()
                };
                let of_tile = |t: u64| {
                    let all = t * tile..total.min((t + 1) * tile);
                    all.map(index).collect::<BTreeSet<_>>().len() as u64
                };
                let counted: u64 = (0..total.div_ceil(tile)).map(of_tile).sum();
                let said = met(&sizes, &kept, tile);
                // Where neither end of a tile has all of an axis that both lack, they may meet the same.
                assert!(
                    said >= counted && said <= counted + counted / 2,
                    "{tile} {kept:?}: {said}, {counted}"
                );
            }
        }
    }

    #[test]
    fn rows_are_shared_out_evenly() {
        assert_eq!(shared_out(10, 4, 2), (4, 6));
        assert_eq!(shared_out(3, 8, 32), (3, 3));
        assert_eq!(shared_out(0, 8, 32), (0, 0));
    }
}
