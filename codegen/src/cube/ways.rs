//! The ways to compute a kernel, and which of them is taken at a launch.
//!
//! A way is a kernel with the same body and another kind, so that whatever runs, prints or checks kernels does so with ways.

use latentc_ir::{AxisId, Function, Size};

use super::machine::Machine;
use super::matrix::{self, Tile};
use super::scatter_matrix::{OuterPlan, OuterTile, Side as OuterSide};
use super::shape::LaunchShape;
use super::stages::{Stage, Stages};
use super::stream_matrix::{HEIGHTS, MatrixPlan};
use super::target::Target;
use super::tuning::{Choices, Tuning};
use super::warpgroup;
use crate::device::DeviceError;
use crate::few::FewPlan;
use crate::program::{By, Kernel, KernelKind};

/// Rows that a product with few rows has at most where there are no tensor cores for it: with as many, and eight at once, its matrix
/// has been read four times. Plain tiles take as long for fewer as for 64.
const FEW: usize = 32;
/// The same where there are: with as many rows, tiles of 32 take less time (measured on an H200).
const FEWER: usize = 8;
/// The same where its matrix must be decoded for them, and the rows for each group with which that takes less time than to read it as often
/// (both measured on an H200).
const FEW_CODES: usize = 16;
const DECODED: usize = 5;
/// The most rows that are multiplied with what was read once.
const ROWS: usize = 8;
/// What ways of a product take on an H200, in picoseconds. What a cube takes to begin and to end, in numbers of depth that it walks meanwhile:
/// more where it waits for a device to bring boxes.
const BEGUN: usize = 256;
const BEGUN_BOXES: usize = 384;
/// Bytes of operands that come from memory meanwhile, and bytes that parts leave, written and read again.
const MEMORY: usize = 3;
const LEFT: usize = 5;
/// A launch that adds parts up, and what each part adds to that.
const LAUNCH: usize = 2_500_000;
const PART: usize = 150_000;

/// Parts that what is summed may be cut into.
const PARTS: [u8; 5] = [2, 3, 4, 6, 8];

/// The ways to compute one kernel.
#[derive(Clone, Debug)]
pub(crate) struct Ways {
    /// As it came.
    plain: KernelKind,
    /// For each side that can be the wide one of a product with few rows, and of one for tensor cores.
    few: Vec<Side>,
    matrix: Vec<Side>,
    /// For a sum of outer products on tensor cores.
    outer: Option<(OuterPlan, Vec<OuterTile>)>,
    /// For a stream on tensor cores.
    stream: Option<Tall>,
    /// Large tiles that keep the device busy.
    busy: usize,
    /// Whether products of f32 are taken as tf32 where they can be.
    tf32: bool,
    /// Whether there are codes to be decoded before tensor cores multiply.
    codes: bool,
}

/// Who multiplies, and times 16 rows that a cube can have so, in order, each with its bytes of shared memory; and the axes of the rows.
#[derive(Clone, Debug)]
struct Tall {
    cubes: Vec<(By, u8, usize)>,
    rows: Vec<AxisId>,
}

impl Tall {
    fn of(plan: &MatrixPlan) -> Tall {
        let all = [By::Planes, By::Groups, By::Boxes].into_iter();
        let all = all.flat_map(|by| HEIGHTS.map(|tall| (by, tall)));
        let cube = |(by, tall)| Some((by, tall, plan.shared_bytes(plan.tiling(tall, by)?)));
        Tall { cubes: all.filter_map(cube).collect(), rows: plan.stream.m.clone() }
    }

    /// All of them.
    fn ways(&self) -> impl Iterator<Item = KernelKind> + '_ {
        self.cubes.iter().map(|&(by, tall, _)| KernelKind::StreamMatrix { tall, by })
    }

    /// The one for so many rows: as tall as these, or as it can be. Groups want more than the rows of one of them, and boxes where there are
    /// some.
    fn choose(&self, rows: usize) -> Option<KernelKind> {
        let grouped = self.cubes.last().filter(|(by, ..)| by.in_groups() && rows > warpgroup::ROWS as usize);
        let planes = || self.cubes.iter().filter(|(by, ..)| *by == By::Planes);
        let fits = |(_, tall, _): &&(By, u8, usize)| 16 * usize::from(*tall) >= rows;
        let cube = grouped.or_else(|| planes().find(fits)).or_else(|| planes().next_back());
        cube.map(|&(by, tall, _)| KernelKind::StreamMatrix { tall, by })
    }
}

/// A side of a product, with the axes of the rows and of the columns if its operands are the wide ones.
#[derive(Clone, Debug)]
struct Side {
    wide: u8,
    rows: Vec<AxisId>,
    columns: Vec<AxisId>,
    batch: Vec<AxisId>,
    products: usize,
    /// Of a grouped product, the axes of the index, and the groups.
    lines: Option<(Vec<AxisId>, usize)>,
    /// Whether its matrices are held as codes.
    codes: bool,
    /// Whether neighbours of the result are in one row of it: what tiles make is stored in whole lines of memory then.
    lines_up: bool,
    /// What is summed, and the fewest terms with which tensor cores err no more than f32 sums do.
    summed: Vec<AxisId>,
    least: usize,
    /// The tiles of tensor cores that there are, in order, each with its bytes of shared memory.
    tiles: Vec<(Tile, usize)>,
}

impl Side {
    fn of(body: &Function, wide: u8) -> Option<Side> {
        let plan = FewPlan::of(body, wide.into())?;
        let least = matrix::least(body, &plan) as usize;
        let FewPlan { batch, rows, columns, outer, inner, products, .. } = plan;
        let summed = [outer, inner].concat();
        let wide_axis = |a: &&AxisId| body.axis(**a).size != Size::Fixed(1);
        let last = body.ty(body.results[0]).axes.iter().rfind(wide_axis);
        let lines_up = last.is_none_or(|a| columns.contains(a));
        let lines = products[0].index.and_then(|(along, index)| {
            Some((body.ty(index).axes.clone(), body.axis(along).size.fixed()? as usize))
        });
        let codes = products.iter().any(|p| p.table.elements().is_none());
        let (products, tiles) = (products.len(), Vec::new());
        Some(Side { wide, rows, columns, batch, products, lines, codes, lines_up, summed, least, tiles })
    }

    /// The same with the tiles of tensor cores for a kernel, and the number of launches that it comes to, if there are any.
    fn on_tensor_cores(mut self, kernel: &Kernel) -> Option<(usize, Side)> {
        let launches = Stages::of_matrix(kernel, self.wide.into(), 1)?.all.len();
        for tile in Tile::all() {
            let stages = Stages::of(&way(kernel, tile.way(self.wide))).all;
            let fits = |stage: &Stage| {
                let body = &stage.kernel.body;
                matrix::plan(body, self.wide.into()).is_none_or(|plan| tile.fits(body, &plan))
            };
            let bytes = stages.iter().map(|stage| stage.shape(Target::Cuda).shared_bytes).max();
            self.tiles.extend(bytes.filter(|_| stages.iter().all(fits)).map(|bytes| (tile, bytes)));
        }
        (!self.tiles.is_empty()).then_some((launches, self))
    }

    /// With the tiles that sums of so many terms may be made by: those for tf32, if these are asked for and there are some; else the others,
    /// if they err no more than f32 does.
    fn rounding(&self, tf32: bool, terms: usize) -> Option<Side> {
        let tf32 = tf32 && self.tiles.iter().any(|(tile, _)| tile.tf32);
        let tiles: Vec<_> = self.tiles.iter().copied().filter(|(tile, _)| tile.tf32 == tf32).collect();
        let admitted = !tiles.is_empty() && (tf32 || terms >= self.least);
        admitted.then(|| Side { tiles, ..self.clone() })
    }

    /// All tiles, for each of so many parts of what is summed. Of a grouped product there are none: each group has tiles of its own.
    fn in_parts<'s>(&'s self, parts: &'s [u8]) -> impl Iterator<Item = Tile> + 's {
        let parts = if self.lines.is_some() { &[] } else { parts };
        parts.iter().flat_map(|&n| self.tiles.iter().map(move |(tile, _)| tile.in_parts(n)))
    }

    /// The tile with so many rows, or the next one below where a device has none so large.
    fn tile(&self, rows: u32) -> Tile {
        let fits = self.tiles.iter().rev().find(|(tile, _)| tile.rows <= rows);
        fits.unwrap_or(&self.tiles[0]).0
    }

    /// The tile, and the parts of what is summed, that take least time on a device of so many multiprocessors: cubes walk their depth in turns,
    /// or as fast as operands come from memory, and what parts leave is written, and added up by another launch.
    fn quickest(&self, multiprocessors: usize, total: impl Fn(&[AxisId]) -> usize) -> Tile {
        let [rows, columns, batch, depth] =
            [&self.rows, &self.columns, &self.batch, &self.summed].map(|axes| total(axes));
        let read = 2 * (rows + self.products * columns) * batch * depth;
        let time = |tile: &Tile| {
            let parts = tile.parts as usize;
            // Products whose sums are in parts are launches of their own.
            let (launches, together) = if parts > 1 { (self.products, 1) } else { (1, self.products) };
            let across = (together * columns).div_ceil(tile.columns as usize);
            let cubes = parts * rows.div_ceil(tile.rows as usize) * across * batch;
            let at_once = multiprocessors * tile.cubes as usize;
            // Few of them come to their operands faster, but no more than that.
            let busy = cubes.clamp(at_once - at_once / 4, at_once);
            let begun = if tile.by == By::Boxes { BEGUN_BOXES } else { BEGUN };
            let walked = depth.div_ceil(parts).next_multiple_of(tile.depth as usize) + begun;
            let of_turn = 2 * busy * (tile.rows * tile.columns) as usize * walked / tile.rate as usize;
            let multiplied = launches * cubes.div_ceil(at_once) * of_turn;
            let left = LAUNCH + parts * (PART + 8 * rows * columns * batch / LEFT);
            let left = if parts > 1 { left } else { 0 };
            // Of those that wait for memory alike, that is the quickest which multiplies most quickly.
            (multiplied.max(read / MEMORY) + launches * left, multiplied)
        };
        let all = self.tiles.iter().map(|(tile, _)| *tile).chain(self.in_parts(&PARTS));
        all.filter(|tile| tile.filled_by(rows)).min_by_key(time).unwrap_or(self.tiles[0].0)
    }
}

impl Ways {
    /// Those of a kernel on a device. A kernel that is one of the ways has no others.
    pub(crate) fn of(kernel: &Kernel, target: Target, machine: &Machine) -> Ways {
        let ways = Ways::anywhere(kernel, target, machine.multiprocessors).within(machine.shared_bytes);
        ways.by(|by| match by {
            By::Planes => true,
            By::Groups => machine.groups,
            By::Boxes => machine.groups && machine.boxes,
        })
    }

    /// Those that any device of a target has.
    pub(crate) fn anywhere(kernel: &Kernel, target: Target, busy: usize) -> Ways {
        let sides = || [0, 1].into_iter().filter_map(|wide| Side::of(&kernel.body, wide));
        let (few, matrix) = match kernel.kind {
            KernelKind::Contract | KernelKind::Grouped => {
                let cuda = sides().filter(|_| target == Target::Cuda);
                let all: Vec<_> = cuda.filter_map(|side| side.on_tensor_cores(kernel)).collect();
                // A side that takes more launches than the other is not worth them.
                let fewest = all.iter().map(|(launches, _)| *launches).min();
                let matrix = all.into_iter().filter(|(launches, _)| Some(*launches) == fewest);
                (sides().collect(), matrix.map(|(_, side)| side).collect())
            }
            KernelKind::Map
            | KernelKind::Scatter
            | KernelKind::ScatterMatrix { .. }
            | KernelKind::Stream
            | KernelKind::Tiles
            | KernelKind::StreamMatrix { .. }
            | KernelKind::Few { .. }
            | KernelKind::Matrix { .. } => (Vec::new(), Vec::new()),
        };
        let streams = kernel.kind == KernelKind::Stream && target == Target::Cuda;
        let stream = if streams { MatrixPlan::of(&kernel.body) } else { None };
        let stream = stream.as_ref().map(Tall::of);
        let outer = (kernel.kind == KernelKind::Scatter && target == Target::Cuda)
            .then(|| OuterPlan::of(&kernel.body))
            .flatten();
        let outer = outer.map(|plan| (plan, OuterTile::ALL.to_vec()));
        let codes = few.iter().any(|side| side.codes);
        Ways { plain: kernel.kind, few, matrix, outer, stream, busy, tf32: false, codes }
    }

    /// With or without products of f32 as tf32 where they can be: these err more than f32 does, so somebody must have asked for them.
    pub(crate) fn with_tf32(self, tf32: bool) -> Ways {
        Ways { tf32, ..self }
    }

    /// Those that need no more shared memory than this.
    fn within(mut self, shared_bytes: usize) -> Ways {
        if let Some(tall) = &mut self.stream {
            tall.cubes.retain(|(.., bytes)| *bytes <= shared_bytes);
        }
        for side in &mut self.matrix {
            side.tiles.retain(|(_, bytes)| *bytes <= shared_bytes);
        }
        self.matrix.retain(|side| !side.tiles.is_empty());
        if let Some((plan, tiles)) = &mut self.outer {
            tiles.retain(|tile| plan.shared_bytes(*tile) <= shared_bytes);
        }
        self
    }

    /// Those by some of who may multiply.
    fn by(mut self, may: impl Fn(By) -> bool) -> Ways {
        for side in &mut self.matrix {
            side.tiles.retain(|(tile, _)| may(tile.by));
        }
        if let Some(tall) = &mut self.stream {
            tall.cubes.retain(|(by, ..)| may(*by));
        }
        if let Some((_, tiles)) = &mut self.outer {
            tiles.retain(|tile| may(tile.by));
        }
        self
    }

    /// The way for these extents: what has more columns is wide.
    pub(crate) fn choose(&self, extents: &[usize]) -> KernelKind {
        let total = |axes: &[AxisId]| axes.iter().map(|a| extents[a.0 as usize]).product::<usize>();
        if let Some(tall) = &self.stream {
            return tall.choose(total(&tall.rows)).unwrap_or(self.plain);
        }
        if let Some((OuterPlan { scatter, sides, .. }, known)) = &self.outer {
            let tiles = |side: &OuterSide| total(&side.columns).div_ceil(128);
            let large = extents[scatter.along.0 as usize] * tiles(&sides[0]) * tiles(&sides[1]) >= self.busy;
            let side = if large { 128 } else { 64 };
            // Where planes can multiply together, they are the last.
            return known.iter().rfind(|t| t.side == side).map_or(self.plain, |t| t.way());
        }
        let widest = |sides: &'_ [Side], most: usize| {
            let sides = sides.iter().filter(|s| total(&s.rows) <= most);
            sides.max_by_key(|s| (total(&s.columns), s.wide)).cloned()
        };
        let admitted = self.matrix.iter().filter_map(|s| s.rounding(self.tf32, total(&s.summed)));
        let matrix = admitted.max_by_key(|s| (s.lines_up, total(&s.columns), s.wide));
        let grouped = matrix.as_ref().and_then(|s| {
            let (lines, groups) = s.lines.as_ref()?;
            Some((total(lines), *groups))
        });
        // A row of a group reads its matrix alone, but where there are tiles.
        let each = if self.codes { DECODED } else { 1 };
        let many = grouped.is_some_and(|(lines, groups)| lines >= each * groups);
        let few = match (matrix.is_some(), self.codes) {
            (false, _) => FEW,
            (true, false) => FEWER,
            (true, true) => FEW_CODES,
        };
        if !many && let Some(side) = widest(&self.few, few) {
            let rows = total(&side.rows).clamp(1, ROWS).next_power_of_two() as u8;
            return KernelKind::Few { wide: side.wide, rows };
        }
        let Some(side) = matrix else { return self.plain };
        let tile = match grouped {
            // Of the last tile of a group, half is idle.
            Some((lines, groups)) if lines < 24 * groups => side.tile(32),
            Some((lines, groups)) if lines < 96 * groups => side.tile(64),
            Some(_) => side.tile(128),
            None => side.quickest(self.busy, total),
        };
        tile.way(side.wide)
    }

    /// All of them, the plain one first.
    pub(crate) fn all(&self) -> Vec<KernelKind> {
        let cut = |s: &Side| s.in_parts(&PARTS).map(|tile| tile.way(s.wide)).collect::<Vec<_>>();
        let mut all = vec![self.plain];
        for kind in self.others().into_iter().chain(self.matrix.iter().flat_map(cut)) {
            if !all.contains(&kind) {
                all.push(kind);
            }
        }
        all
    }

    /// Whether one of them may be taken at these extents: tensor cores err no more than f32 does where sums are long enough.
    pub(crate) fn admits(&self, kind: KernelKind, extents: &[usize]) -> bool {
        // Whoever names a way for tf32 asks for it.
        let KernelKind::Matrix { wide, tf32: false, .. } = kind else { return true };
        let total = |axes: &[AxisId]| axes.iter().map(|a| extents[a.0 as usize]).product::<usize>();
        self.matrix.iter().any(|s| s.wide == wide && total(&s.summed) >= s.least)
    }

    /// Whether one of them may be the best at these extents: nothing is read again and again by cubes with few rows, tensor cores have a
    /// quarter of a tile's rows at least, and no cube has more than twice the rows that there are, but for the lowest.
    pub(crate) fn worth(&self, kind: KernelKind, extents: &[usize]) -> bool {
        let total = |axes: &[AxisId]| axes.iter().map(|a| extents[a.0 as usize]).product::<usize>();
        let rows_of =
            |sides: &[Side], wide: u8| sides.iter().find(|s| s.wide == wide).map(|s| total(&s.rows));
        match kind {
            KernelKind::Few { wide, rows } => rows_of(&self.few, wide)
                .is_some_and(|n| n <= 2 * FEW && usize::from(rows) <= n.max(1).next_power_of_two()),
            KernelKind::Matrix { tf32: true, .. } if !self.tf32 => false,
            KernelKind::Matrix { wide, .. } => {
                let fills = |n: usize| n >= FEWER / 2 && Tile::of(kind).is_some_and(|tile| tile.filled_by(n));
                self.admits(kind, extents) && rows_of(&self.matrix, wide).is_some_and(fills)
            }
            KernelKind::StreamMatrix { tall, .. } => {
                let rows = self.stream.as_ref().map_or(0, |tall| total(&tall.rows));
                tall == 1 || 16 * usize::from(tall) <= 2 * rows
            }
            KernelKind::Map
            | KernelKind::Contract
            | KernelKind::Grouped
            | KernelKind::Scatter
            | KernelKind::Stream
            | KernelKind::Tiles
            | KernelKind::ScatterMatrix { .. } => true,
        }
    }

    /// All of them but the plain one.
    pub(crate) fn others(&self) -> Vec<KernelKind> {
        let few = |s: &Side| {
            let wide = s.wide;
            [1, 2, 4, 8].map(|rows| KernelKind::Few { wide, rows })
        };
        let matrix = |s: &Side| {
            let mut all: Vec<_> = s.tiles.iter().map(|(tile, _)| *tile).collect();
            // What parts add to the lowest tiles, they add to the others in the same way.
            for tile in s.in_parts(&PARTS[..1]) {
                if all.iter().all(|known| known.parts == 1 || !known.feeds_like(tile)) {
                    all.push(tile);
                }
            }
            all.into_iter().map(|tile| tile.way(s.wide)).collect::<Vec<_>>()
        };
        let stream = self.stream.iter().flat_map(Tall::ways);
        let outer = self.outer.iter().flat_map(|(_, tiles)| tiles).map(|tile| tile.way());
        let products = self.few.iter().flat_map(few).chain(self.matrix.iter().flat_map(matrix));
        products.chain(outer).chain(stream).collect()
    }
}

/// Whether kernels of a kind share grids with others. Those for tensor cores take as many registers as there are, and fill the device;
/// streams are shared out over it already.
pub(crate) fn joins(kind: KernelKind) -> bool {
    match kind {
        KernelKind::Map
        | KernelKind::Contract
        | KernelKind::Grouped
        | KernelKind::Scatter
        | KernelKind::Tiles
        | KernelKind::Few { .. } => true,
        KernelKind::Stream
        | KernelKind::StreamMatrix { .. }
        | KernelKind::Matrix { .. }
        | KernelKind::ScatterMatrix { .. } => false,
    }
}

/// Who multiplies, or brings what, as a part of a name.
fn stem(by: By) -> &'static str {
    match by {
        By::Planes => "matrix",
        By::Groups => "groups",
        By::Boxes => "bulk",
    }
}

/// A kernel computed that way.
pub(crate) fn way(kernel: &Kernel, kind: KernelKind) -> Kernel {
    let name = match kind {
        KernelKind::Few { wide, rows } if kernel.kind != kind => format!("{}_few{wide}{rows}", kernel.name),
        KernelKind::Matrix { wide, rows, columns, by, parts, tf32 } if kernel.kind != kind => {
            let tf32 = if tf32 { "tf32_" } else { "" };
            format!("{}_{tf32}{}{wide}{rows}x{columns}_{parts}", kernel.name, stem(by))
        }
        KernelKind::ScatterMatrix { side, by } if kernel.kind != kind => {
            format!("{}_{}{side}", kernel.name, stem(by))
        }
        KernelKind::StreamMatrix { tall, by } if kernel.kind != kind => {
            format!("{}_{}{tall}", kernel.name, stem(by))
        }
        _ => kernel.name.clone(),
    };
    Kernel { name, kind, body: kernel.body.clone() }
}

/// The kernel in the way that CUDA devices take for these run-time sizes. To have another, launch that one of [`ways`], or the kernel
/// as one of [`KernelKind::Tiles`].
pub fn chosen(kernel: &Kernel, sizes: &[usize]) -> Kernel {
    way(kernel, Ways::of(kernel, Target::Cuda, &Machine::HOPPER).choose(&kernel.extents(sizes)))
}

/// The kernel, and the ways that a CUDA device takes of it where all run-time sizes are one, and where all are large: what decode and long
/// prompts launch. None twice.
pub fn typical(kernel: &Kernel, machine: &Machine) -> Vec<Kernel> {
    let ways = Ways::of(kernel, Target::Cuda, machine);
    of_sizes(kernel, &[], |sizes| ways.choose(&kernel.extents(sizes)))
}

/// As [`typical`] says for CUDA devices, the kernel and its ways on any device, those that are taken at any of these run-time sizes, and those
/// that a tuning names.
///
/// # Errors
/// If the tuning names sizes or a way that the kernel does not have.
pub fn taken(
    kernel: &Kernel,
    target: Target,
    machine: &Machine,
    sizes: &[Vec<usize>],
    tuning: &Tuning,
) -> Result<Vec<Kernel>, DeviceError> {
    let choices = Choices::of(kernel, target, machine, tuning)?;
    let mut all = of_sizes(kernel, sizes, |sizes| choices.at(kernel, sizes, tuning).way.kind);
    for kind in choices.told(tuning) {
        if all.iter().all(|k| k.kind != kind) {
            all.push(way(kernel, kind));
        }
    }
    Ok(all)
}

/// The kernel, and those of its ways that are taken where all run-time sizes are one, where all are large, and at any of these.
fn of_sizes(kernel: &Kernel, sizes: &[Vec<usize>], choose: impl Fn(&[usize]) -> KernelKind) -> Vec<Kernel> {
    let ends = [1, 1000].map(|size| vec![size; kernel.size_symbols().len()]);
    let mut all = vec![kernel.clone()];
    for sizes in ends.iter().chain(sizes) {
        let kind = choose(sizes);
        if all.iter().all(|k| k.kind != kind) {
            all.push(way(kernel, kind));
        }
    }
    all
}

/// Of kernels that may run at the same time, those that share a grid on CUDA devices where all run-time sizes are one, as in decode, in
/// the ways that are taken there. Empty if there are no two.
///
/// # Errors
/// If the tuning names sizes or a way that a kernel does not have.
pub fn side_by_side<'k>(
    kernels: impl IntoIterator<Item = &'k Kernel>,
    tuning: &Tuning,
) -> Result<Vec<Kernel>, DeviceError> {
    let one = |k: &Kernel| {
        let choices = Choices::of(k, Target::Cuda, &tuning.machine, tuning)?;
        Ok(way(k, choices.at(k, &vec![1; k.size_symbols().len()], tuning).way.kind))
    };
    let mut all: Vec<_> = kernels.into_iter().map(one).collect::<Result<_, DeviceError>>()?;
    all.retain(|k| joins(k.kind));
    let units = |k: &Kernel| LaunchShape::of(k).units;
    let first = all.first().map(units);
    all.retain(|k| Some(units(k)) == first);
    Ok(if all.len() < 2 { Vec::new() } else { all })
}

/// The ways to compute a kernel on a target besides the plain one, each a kernel. Devices choose among them by the sizes of a launch.
pub fn ways(kernel: &Kernel, target: Target) -> Vec<Kernel> {
    Ways::of(kernel, target, &Machine::HOPPER).others().into_iter().map(|kind| way(kernel, kind)).collect()
}
