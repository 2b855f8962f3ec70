//! How many cubes a launch needs, as a rule over its run-time sizes.

use std::fmt;

use latentc_ir::{AxisId, Function, Size};
use serde::{Deserialize, Serialize};

use super::contract::{self, TILE};
use super::emit::Elem;
use super::kernel::Form;
use super::machine::Machine;
use super::map::Walk;
use super::split::Role;
use super::target::Target;
use super::{few, matrix, scatter, scatter_matrix, sort, stream};
use crate::few::FewPlan;
use crate::program::Kernel;

/// Cubes along one side of a grid; what is more goes into a second dimension. Every runtime takes as many.
const GRID_SIDE: u64 = 65535;

/// The launch of a kernel: the units of a cube, and the cubes as a rule over the run-time sizes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchShape {
    /// Units (CUDA: threads) of a cube, along one dimension.
    pub units: u32,
    /// The number of cubes.
    pub cubes: Cubes,
    /// Bytes of shared memory that a cube has.
    pub shared_bytes: usize,
    /// Those of them that kernels side by side in a grid have in common: arrays of so many elements.
    #[serde(skip)]
    pub(crate) common: Vec<(Elem, usize)>,
    /// Where a cube takes one tile after another: how many of them run on a multiprocessor at once, and a device has no more. Else 0.
    #[serde(default)]
    pub stay: u32,
}

/// What the cubes of a launch are for. The sizes are those of the kernel's axes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cubes {
    /// One unit per element of a tensor with these extents.
    Elements(Vec<Size>),
    /// One cube per index of these extents.
    Rows(Vec<Size>),
    /// One cube per tile of a matrix product, of so many rows and columns, repeated over a batch.
    #[expect(missing_docs, reason = "the groups of a contraction")]
    Tiles { batch: Vec<Size>, m: Vec<Size>, n: Vec<Size>, tile: (u32, u32) },
    /// One cube per tile of a matrix product whose rows fall into so many groups, each of which begins another tile.
    #[expect(missing_docs, reason = "the groups of a contraction")]
    Groups { m: Vec<Size>, groups: u64, n: Vec<Size>, tile: (u32, u32) },
}

/// How many groups the rows of a product for tensor cores fall into, if an index chooses.
fn groups(body: &Function, plan: &FewPlan) -> Option<u64> {
    matrix::index(plan).and_then(|(along, _)| body.axis(along).size.fixed())
}

impl LaunchShape {
    fn new(units: u32, cubes: Cubes, shared_bytes: usize) -> LaunchShape {
        LaunchShape { units, cubes, shared_bytes, common: Vec::new(), stay: 0 }
    }

    /// The launch of a kernel on CUDA. Other targets have as many units a cube.
    pub fn of(kernel: &Kernel) -> LaunchShape {
        LaunchShape::on(kernel, Target::Cuda)
    }

    /// The launch of a kernel on a target.
    pub(crate) fn on(kernel: &Kernel, target: Target) -> LaunchShape {
        let body = &kernel.body;
        let sizes = |axes: &[AxisId]| axes.iter().map(|&a| body.axis(a).size.clone()).collect::<Vec<_>>();
        match Form::of(kernel, target) {
            Form::Map(map) => {
                let grid = map.grid(body);
                let cubes = match &map.walk {
                    Walk::Elements | Walk::Units(..) | Walk::Planes(_) => Cubes::Elements(grid),
                    Walk::Cubes(..) | Walk::Columns(_) => Cubes::Rows(grid),
                };
                LaunchShape::new(map.units(), cubes, map.shared_bytes())
            }
            Form::Scatter(plan) => {
                let (batch, m, n) = (plan.kept(body), [plan.along], &plan.columns);
                let tile = (scatter::BLOCK, scatter::COLUMNS);
                let cubes = Cubes::Tiles { batch: sizes(&batch), m: sizes(&m), n: sizes(n), tile };
                LaunchShape::new(scatter::UNITS, cubes, scatter::SHARED_BYTES)
            }
            Form::ScatterMatrix(plan, tile) => {
                let [m, n] = [0, 1].map(|n| sizes(&plan.sides[n].columns));
                let batch = sizes(&[plan.scatter.along]);
                let (side, shared_bytes) = (tile.side(), plan.shared_bytes(tile));
                let cubes = Cubes::Tiles { batch, m, n, tile: (side, side) };
                let stay = scatter_matrix::CUBES;
                LaunchShape { stay, ..LaunchShape::new(scatter_matrix::UNITS, cubes, shared_bytes) }
            }
            Form::Tiles(plan) => {
                let (batch, m, n) = (sizes(&plan.batch), sizes(&plan.m), sizes(&plan.n));
                let cubes = Cubes::Tiles { batch, m, n, tile: (TILE, TILE) };
                LaunchShape::new(contract::UNITS, cubes, contract::shared_bytes(body, &plan))
            }
            Form::Few(plan, rows) => {
                let tiling = few::Tiling::of(body, &plan, rows, target);
                let (batch, m, n) = (sizes(&plan.batch), sizes(&plan.rows), sizes(&plan.columns));
                let cubes = Cubes::Tiles { batch, m, n, tile: (tiling.rows, tiling.columns) };
                let shared_bytes = tiling.shared_bytes(body, &plan, target);
                let common = tiling.common(body, &plan, target);
                LaunchShape { common, ..LaunchShape::new(few::UNITS, cubes, shared_bytes) }
            }
            Form::Matrix(plan, tile) => {
                let parts = (tile.parts > 1).then(|| Size::Fixed(tile.parts.into()));
                let batch = parts.into_iter().chain(sizes(&plan.batch)).collect();
                let (m, n) = (sizes(&plan.rows), sizes(&plan.columns));
                let (units, shared_bytes) = (tile.units(), tile.shared_bytes(body, &plan));
                let stay = tile.stays(&plan).into();
                let tile = (tile.rows, tile.columns(&plan));
                let cubes = match groups(body, &plan) {
                    None => Cubes::Tiles { batch, m, n, tile },
                    Some(groups) => Cubes::Groups { m, groups, n, tile },
                };
                LaunchShape { stay, ..LaunchShape::new(units, cubes, shared_bytes) }
            }
            Form::StreamMatrix(plan, t) => {
                let stream = &plan.stream;
                let (batch, m, n) = (sizes(&stream.batch), sizes(&stream.m), sizes(&stream.n));
                let cubes = Cubes::Tiles { batch, m, n, tile: (t.rows, t.wide()) };
                LaunchShape::new(t.units(), cubes, plan.shared_bytes(t))
            }
            Form::Stream(plan) => {
                let tiles = stream::Tiles::of(body, &plan);
                let (batch, m, n) = (sizes(&plan.batch), sizes(&plan.m), sizes(&plan.n));
                let cubes = Cubes::Tiles { batch, m, n, tile: (tiles.rows, tiles.columns) };
                LaunchShape::new(stream::UNITS, cubes, tiles.shared_bytes())
            }
        }
    }

    /// What cubes have that are for another launch as well: the memory of both, but what they have in common once.
    pub fn beside(self, other: LaunchShape) -> LaunchShape {
        let common = in_common(&self.common, &other.common);
        let own = |shape: &LaunchShape| shape.shared_bytes - bytes_of(&shape.common);
        let shared_bytes = own(&self) + own(&other) + bytes_of(&common);
        LaunchShape { shared_bytes, common, ..self }
    }

    /// The launch of one of the kernels with a body.
    pub(crate) fn of_role(kernel: &Kernel, role: Role, target: Target) -> LaunchShape {
        let sorted = match (role, Form::of(kernel, target)) {
            (Role::Sort, Form::Matrix(plan, _)) => groups(&kernel.body, &plan),
            (Role::Sort, Form::ScatterMatrix(plan, _)) => kernel.body.axis(plan.scatter.along).size.fixed(),
            (Role::Whole | Role::Part | Role::Merge | Role::Sort, _) => None,
        };
        match sorted {
            None => LaunchShape::on(kernel, target),
            Some(groups) => {
                // A cube for each group, and one for indices that are none.
                let cubes = Cubes::Rows(vec![Size::Fixed(groups + 1)]);
                LaunchShape::new(matrix::UNITS, cubes, sort::SHARED_BYTES)
            }
        }
    }

    /// The grid of a launch, given the number behind each run-time size; all zeros if there is nothing to do.
    ///
    /// # Errors
    /// If the units of the grid cannot be numbered in 32 bits.
    pub fn grid(&self, number: impl Fn(&str) -> usize) -> Result<Grid, String> {
        let total = |sizes: &[Size]| {
            let sizes = sizes.iter().map(|s| match s {
                Size::Fixed(n) => *n,
                Size::Sym(s) => number(s) as u64,
            });
            sizes.fold(1u64, u64::saturating_mul)
        };
        let tiles = |sizes: &[Size], tile: u32| total(sizes).div_ceil(tile.into());
        let cubes = match &self.cubes {
            Cubes::Elements(sizes) => total(sizes).div_ceil(self.units.into()),
            Cubes::Rows(sizes) => total(sizes),
            Cubes::Tiles { batch, m, n, tile: (rows, columns) } => {
                total(batch).saturating_mul(tiles(m, *rows)).saturating_mul(tiles(n, *columns))
            }
            Cubes::Groups { m, groups, n, tile: (rows, columns) } => match total(m) {
                0 => 0,
                lines => (lines / u64::from(*rows) + groups + 1).saturating_mul(tiles(n, *columns)),
            },
        };
        self.arranged(cubes)
    }

    /// The grid of a launch on a device with so many multiprocessors, if that is known, or as many as most have.
    pub(crate) fn on_device(&self, grid: Grid, multiprocessors: Option<u32>) -> Grid {
        match multiprocessors.unwrap_or(Machine::HOPPER.multiprocessors as u32) {
            n if self.stay * n > 0 && grid.1 * grid.0 > self.stay * n => (self.stay * n, 1, 1),
            _ => grid,
        }
    }

    /// So many cubes as a grid.
    ///
    /// # Errors
    /// As for [`grid`](LaunchShape::grid).
    pub(crate) fn arranged(&self, cubes: u64) -> Result<Grid, String> {
        arranged(cubes, self.units)
    }
}

/// What serves kernels that have these arrays in common: the nth with some elements is as long as the longer nth of theirs.
fn in_common(one: &[(Elem, usize)], other: &[(Elem, usize)]) -> Vec<(Elem, usize)> {
    let mut all = one.to_vec();
    let mut paired = vec![false; one.len()];
    for &(elem, len) in other {
        match (0..one.len()).find(|&n| all[n].0 == elem && !paired[n]) {
            Some(n) => {
                all[n].1 = all[n].1.max(len);
                paired[n] = true;
            }
            None => all.push((elem, len)),
        }
    }
    all
}

/// Bytes of shared arrays.
pub(super) fn bytes_of(arrays: &[(Elem, usize)]) -> usize {
    arrays.iter().map(|&(elem, len)| (len * elem.bytes()).next_multiple_of(16)).sum()
}

/// Cubes along each dimension.
pub(crate) type Grid = (u32, u32, u32);

/// So many cubes of so many units as a grid; all zeros if there are none.
fn arranged(cubes: u64, units: u32) -> Result<Grid, String> {
    if cubes == 0 {
        return Ok((0, 0, 0));
    }
    let x = cubes.min(GRID_SIDE);
    let y = cubes.div_ceil(x);
    if x.saturating_mul(y).saturating_mul(units.into()) > u32::MAX.into() {
        return Err(format!("{cubes} cubes of {units} units are more than 32 bits can number"));
    }
    Ok((x as u32, y as u32, 1))
}

/// The cubes of several launches as one grid, and for each launch where its cubes end. All have so many units.
///
/// # Errors
/// As for [`LaunchShape::grid`].
pub(crate) fn in_one_grid(
    grids: impl Iterator<Item = Grid>,
    units: u32,
) -> Result<(Vec<usize>, Grid), String> {
    let ends = grids.scan(0, |end, (x, y, _)| {
        *end += x as usize * y as usize;
        Some(*end)
    });
    let ends: Vec<_> = ends.collect();
    let grid = arranged(ends.last().map_or(0, |&n| n as u64), units)?;
    Ok((ends, grid))
}

impl fmt::Display for LaunchShape {
    /// One line, such as `256 units a cube, one cube per 256 elements of [n0, 128], 0 B shared`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |sizes: &[Size]| sizes.iter().map(Size::to_string).collect::<Vec<_>>().join(", ");
        let units = self.units;
        write!(f, "{units} units a cube, one cube per ")?;
        match &self.cubes {
            Cubes::Elements(sizes) => write!(f, "{units} indices of [{}]", list(sizes))?,
            Cubes::Rows(sizes) => write!(f, "index of [{}]", list(sizes))?,
            Cubes::Tiles { batch, m, n, tile: (rows, columns) } => {
                write!(f, "tile of {rows} x {columns} in [{}] x [{}]", list(m), list(n))?;
                if !batch.is_empty() {
                    write!(f, " for each of [{}]", list(batch))?;
                }
            }
            Cubes::Groups { m, groups, n, tile: (rows, columns) } => {
                let (m, n) = (list(m), list(n));
                write!(f, "tile of {rows} x {columns} in [{m}] x [{n}] by {groups} groups")?;
            }
        }
        let stays = if self.stay > 0 { "; as many cubes as run at once take one after another" } else { "" };
        write!(f, ", {} B shared{stays}", self.shared_bytes)
    }
}

#[cfg(all(test, feature = "wgpu"))]
mod tests {
    use super::super::{ways, wgsl_source};
    use super::*;
    use crate::program::KernelKind;

    /// Bytes of the shared arrays that a text declares, such as `var<workgroup> shared_memory_1: array<f32, 64>;`.
    fn declared(wgsl: &str) -> usize {
        let arrays = wgsl.lines().filter(|l| l.contains("var<workgroup>"));
        let lengths =
            arrays.map(|l| l.rsplit(',').next().unwrap_or("").trim_matches([' ', '>', ';']).to_owned());
        lengths
            .map(|n| {
                n.trim_end_matches('u').parse::<usize>().unwrap_or_else(|_| panic!("{n} in\n{wgsl}")) * 4
            })
            .sum()
    }

    #[test]
    fn products_of_few_rows_have_as_much_shared_memory_as_they_say() {
        for order in ["a1, a2", "a2, a1"] {
            let text = format!(
                "module m entry @f\n\nfunc @f {{\n  axes a0=n0, a1=70, a2=72\n  param p0: f32[{order}]\n  \
                 param p1: f32[a0, a2]\n\n  sum: f32[a0] = reduce_sum p1 over a2\n  h: f32[a0, a2] = mul p1, sum\n  \
                 y: f32[a0, a1] = contract p0, h over a2\n  return y\n}}\n"
            );
            let body = latentc_ir::parse("m.ir", &text).expect("it parses").functions.remove(0);
            let kernel = Kernel { name: "f".to_owned(), kind: KernelKind::Contract, body };
            let all = ways(&kernel, Target::Wgsl);
            assert!(!all.is_empty());
            for way in all {
                let shape = LaunchShape::on(&way, Target::Wgsl);
                let text = wgsl_source(&way).expect("it can be written");
                assert_eq!(shape.shared_bytes, declared(&text), "{order}, {}:\n{text}", way.name);
            }
        }
    }
}
