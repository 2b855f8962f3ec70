//! How a product with few rows is shared out to the units of cubes.

use latentc_ir::{AxisId, Function};

use super::wide::Part;
use super::{PACK_BYTES, PLANE, UNITS, folds, vectors};
use crate::contract::Rotation;
use crate::cube::emit::Elem;
use crate::cube::machine::Machine;
use crate::cube::shape::bytes_of;
use crate::cube::target::Target;
use crate::few::{FewPlan, FewProduct};

/// Cubes that keep a large GPU busy: three for two multiprocessors. Texts are the same for all devices; how many rows a cube has is chosen
/// at a launch.
const BUSY: u64 = Machine::HOPPER.multiprocessors as u64 * 3 / 2;
/// The same where all that a unit reads is on its way at once: one for three multiprocessors. Others stand beside them.
const SPARSE: u64 = Machine::HOPPER.multiprocessors as u64 / 3;
/// Packs that each unit has in flight in registers; twice as many for a single row of a single product, whose sums leave registers for them.
const FLIGHT: u32 = 4;
/// Packs that each unit has in flight past the registers, where not all that it reads has room in them: so many that four cubes fit on a
/// multiprocessor, and grids of that many cubes for each need not run in turns.
const RING: u32 = 10;
/// Those that it multiplies at once.
const ROUND: u32 = 2;
/// Sums that each unit keeps, at most.
const SUMS: u32 = 64;

/// How a plan is shared out to units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiling {
    /// Rows of a cube.
    pub(crate) rows: u32,
    /// Columns of a cube.
    pub(crate) columns: u32,
    /// Elements of a pack.
    pub(super) pack: u32,
    /// Along: columns of a plane.
    pub(super) each: u32,
    /// Along: planes that share their columns. Across: units that do.
    pub(super) splits: u32,
    /// Steps along the summed axes that are read at once.
    pub(super) unroll: u32,
    /// Elements of the inner axes that are done between two meetings of the cube.
    pub(super) chunk: u32,
    /// If all of the narrow operand is there at once, how many indices of the outer axes there are.
    pub(super) whole: Option<u32>,
    /// Rounds whose packs are on their way past the registers; 0 if packs are read into registers, a round ahead.
    pub(in crate::cube) ring: u32,
    pub(super) products: u32,
    pub(super) narrows: u32,
}

impl Tiling {
    /// For so many rows. Only the chunk depends on the target.
    pub(crate) fn of(body: &Function, plan: &FewPlan, rows: u32, target: Target) -> Tiling {
        let known = |axes: &[AxisId]| {
            axes.iter().try_fold(1u64, |n, &a| Some(n.saturating_mul(body.axis(a).size.fixed()?)))
        };
        let fixed = |axes: &[AxisId]| axes.iter().filter_map(|&a| body.axis(a).size.fixed()).product::<u64>();
        let products = plan.products.len() as u32;
        let narrows = plan.narrows().len() as u32;
        let mut pack = plan.products.iter().map(FewProduct::pack).min().unwrap_or(1) as u32;
        while !plan.factor(body).is_multiple_of(pack.into()) {
            pack /= 2;
        }
        let depth = known(&plan.inner);
        // Floats of narrow operands that a cube keeps.
        let (most, room) = match target {
            Target::Cuda => (4096, 12288),
            Target::Wgsl => (4096, 4096),
        };
        let (most, room) = (most / (rows * narrows).min(most), room / (rows * narrows).min(room));
        // Cubes if each had one column.
        let cubes = known(&plan.columns).map(|n| n * fixed(&plan.batch));
        let mut t = Tiling {
            rows,
            columns: 0,
            pack,
            each: 1,
            splits: 1,
            unroll: 1,
            chunk: 0,
            whole: None,
            ring: 0,
            products,
            narrows,
        };
        let flight = if rows == 1 && products == 1 { 2 * FLIGHT } else { FLIGHT };
        let streams = (flight / products).max(1);
        let planes = UNITS / PLANE;
        let block;
        if plan.along {
            let enough = |each: u32| {
                cubes.map_or(each <= 2, |n| n / u64::from(planes * each) >= BUSY)
                    && products * each * rows <= SUMS
            };
            t.each = [4, 2].into_iter().find(|&n| n <= streams && enough(n)).unwrap_or(1);
            let steps = |splits: u32, unroll: u32| u64::from(PLANE * splits * unroll * pack);
            // One step may go beyond the end, several may with their last.
            let fits = |splits: u32, unroll: u32| {
                let least = if unroll == 1 { PLANE.into() } else { steps(splits, 1) };
                steps(splits, unroll) <= u64::from(most)
                    && depth.is_none_or(|d| steps(splits, unroll) <= d.next_multiple_of(least))
            };
            // Whoever has one of two partners has both.
            let least = if Rotation::of(body).is_some() { 2 } else { 1 };
            let wanted = |splits: u32, each: u32| {
                let at_once = depth.is_some_and(|d| d <= steps(splits, (streams / each).max(1)));
                if at_once { SPARSE } else { BUSY }
            };
            while planes / (2 * t.splits) * t.each >= least
                && fits(t.splits * 2, 1)
                && cubes.is_some_and(|n| {
                    n * u64::from(t.splits) / u64::from(planes * t.each) < wanted(t.splits, t.each)
                })
            {
                t.splits *= 2;
            }
            t.unroll = (streams / t.each).max(1);
            while t.unroll > 1 && !fits(t.splits, t.unroll) {
                t.unroll -= 1;
            }
            t.columns = planes / t.splits * t.each;
            block = steps(t.splits, t.unroll) as u32;
        } else {
            while u64::from(t.pack) > plan.least() && t.pack * rows * products > SUMS {
                t.pack /= 2;
            }
            let enough = |lanes: u32| cubes.is_none_or(|n| n / u64::from(lanes * t.pack) >= BUSY);
            let lanes = [32, 16].into_iter().find(|&n| enough(n)).unwrap_or(8);
            t.splits = UNITS / lanes;
            t.unroll = streams;
            while t.unroll > 1 && depth.is_some_and(|d| u64::from(t.splits * t.unroll) > d) {
                t.unroll /= 2;
            }
            t.columns = lanes * t.pack;
            block = t.splits * t.unroll;
        }
        let whole = depth.map_or(u64::from(room), |d| d.next_multiple_of(block.into()));
        t.chunk = whole.min((room / block * block).into()).max(block.into()) as u32;
        if let (Some(depth), Some(outer)) = (depth, known(&plan.outer)) {
            // A step reads no further.
            let step = if plan.along { PLANE * t.pack } else { 1 };
            let chunk = depth.next_multiple_of(step.into());
            if outer > 0 && depth > 0 && chunk.saturating_mul(outer) <= room.into() {
                (t.chunk, t.whole) = (chunk as u32, Some(outer as u32));
                if plan.along {
                    t.unroll = t.least_waste(depth);
                }
                let all_in_registers = outer == 1 && u64::from(t.round(plan.along)) >= depth;
                let parts = t.parts(body, plan, target);
                let wide = parts.iter().flatten().all(|part| part.is_copied(target))
                    && parts.iter().all(|parts| parts[0].bytes() as u64 == PACK_BYTES);
                if !all_in_registers && wide {
                    t.unroll = t.unroll.min((ROUND / t.packs()).max(1));
                    let rounds = depth.div_ceil(t.round(plan.along).into()) * outer;
                    let step: usize = parts.iter().flatten().map(|part| part.bytes()).sum();
                    let round = step as u32 * t.each * t.unroll;
                    t.ring = (RING * PACK_BYTES as u32 / round).max(1).min(rounds as u32);
                }
            }
        }
        t
    }

    /// What each product's wide operand is held in.
    fn parts(&self, body: &Function, plan: &FewPlan, target: Target) -> Vec<Vec<Part>> {
        plan.products.iter().map(|p| Part::of(body, p, self.pack, target)).collect()
    }

    /// Packs that a unit reads in a step.
    pub(in crate::cube) fn packs(&self) -> u32 {
        self.products * self.each
    }

    /// Elements of the inner axes that are read at once.
    pub(super) fn round(&self, along: bool) -> u32 {
        let steps = self.splits * self.unroll;
        if along { PLANE * steps * self.pack } else { steps }
    }

    /// Along: as many steps at once, or up to a quarter less if fewer of them go beyond the end then: those cost little, and what is on its
    /// way at once is what hides how long memory takes.
    fn least_waste(&self, depth: u64) -> u32 {
        let steps = |unroll: u32| {
            let round = Tiling { unroll, ..*self }.round(true);
            depth.div_ceil(round.into()) * u64::from(unroll)
        };
        (self.unroll - self.unroll / 4..=self.unroll).rev().min_by_key(|&n| steps(n)).unwrap_or(self.unroll)
    }

    /// Floats of a narrow operand that are kept.
    pub(super) fn staged(&self) -> u32 {
        self.whole.unwrap_or(1) * self.rows * self.chunk
    }

    /// Elements of the sums in shared memory.
    pub(super) fn sums(&self, plan: &FewPlan) -> u32 {
        let splits = if plan.along { self.splits } else { 1 };
        self.products * splits * self.rows * self.columns
    }

    /// Packs of a product that a unit has on their way past the registers.
    pub(super) fn slots(&self) -> u32 {
        self.ring * self.unroll * self.each
    }

    /// The large arrays of shared memory, which other kernels in the grid can have as well: for each narrow operand what is there of it, then
    /// the packs on their way, of all parts that are stored alike in one.
    pub(crate) fn common(&self, body: &Function, plan: &FewPlan, target: Target) -> Vec<(Elem, usize)> {
        let narrow = (Elem::F32, self.staged() as usize);
        let mut all = vec![narrow; self.narrows as usize];
        if self.ring > 0 {
            let len = UNITS * self.slots();
            let parts = self.parts(body, plan, target).into_iter().flatten();
            all.extend(rings(parts).into_iter().map(|(elem, width)| (elem, (len * width) as usize)));
        }
        all
    }

    /// Bytes of shared memory.
    pub(crate) fn shared_bytes(&self, body: &Function, plan: &FewPlan, target: Target) -> usize {
        let bytes = |elements: u32| bytes_of(&[(Elem::F32, elements as usize)]);
        let folds = folds(body, plan).len();
        let scratch = if folds > 0 { bytes(UNITS) } else { 0 };
        // Where units of a plane, or of a cube, add up what they summed.
        let meet = match plan.along {
            true if vectors(target) => 0,
            true => bytes(UNITS),
            false => bytes(UNITS * self.pack),
        };
        let common = bytes_of(&self.common(body, plan, target));
        common + bytes(self.sums(plan)) + folds * bytes(self.rows) + scratch + meet
    }
}

/// How much a pack has of parts that are stored alike, all together.
pub(super) fn rings(parts: impl Iterator<Item = Part>) -> Vec<(Elem, u32)> {
    let mut rings: Vec<(Elem, u32)> = Vec::new();
    for Part { elem, width, .. } in parts {
        match rings.iter_mut().find(|(of, _)| *of == elem) {
            Some((_, all)) => *all += width,
            None => rings.push((elem, width)),
        }
    }
    rings
}
