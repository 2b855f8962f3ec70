//! A stream as two launches: parts of the positions, each by cubes of its own, and what merges them.

use latentc_ir::{AxisId, Function, Op, ValueId};

use super::emit::{Bin, Buf, Emit, Un, Val};
use super::expr::Exprs;
use super::machine::Machine;
use super::shape::{Grid, LaunchShape};
use super::stream::{POSITIONS, divisor, finish, least};
use crate::stream::{Monoid, StreamPlan, cone};

/// Shared memory that a cube has at most on GPUs of data centres, from compute capability 9.0 on (CUDA C++ Programming Guide). A device
/// that has less takes other ways.
pub(crate) const SHARED: usize = 227 << 10;
/// Bytes of shared memory that two cubes have each there.
pub(super) const HALF: usize = Machine::HOPPER.half();
/// The fewest positions that are worth a part of their own.
const PART: usize = 64;

/// Positions that are worth a second cube for each multiprocessor.
const LONG: usize = 3072;

/// Parts that a unit reads at once, where they are merged.
const AT_ONCE: u32 = 16;

/// Which of the kernels with one body this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    /// All of it.
    Whole,
    /// The first of two: what is known of each part of the positions.
    Part,
    /// The second: parts are merged.
    Merge,
    /// The first of a grouped product: its rows in the order of their groups.
    Sort,
}

impl Role {
    /// What it adds to the kernel's name.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Role::Whole => "",
            Role::Part => "_part",
            Role::Merge => "_merge",
            Role::Sort => "_sort",
        }
    }

    /// The parameters that it reads.
    pub(crate) fn reads(self, body: &Function, plan: &StreamPlan) -> Vec<ValueId> {
        match self {
            Role::Whole | Role::Sort => body.params.clone(),
            Role::Part => cone(body, plan.product, |_| true),
            Role::Merge => cone(body, body.results[0], |op| !matches!(op, Op::Contract | Op::Reduce { .. })),
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
    /// Into as many parts as are `told`, or as keep a device busy (two cubes for each multiprocessor, or one where no two fit into its
    /// shared memory, or where positions are few), for a launch that would have so many cubes, each with so many bytes of shared memory. `None` if these are enough, or
    /// the positions too few.
    pub(crate) fn of(
        plan: &StreamPlan,
        (cubes, shared_bytes): (usize, usize),
        extents: &[usize],
        machine: &Machine,
        told: Option<usize>,
    ) -> Option<Split> {
        let busy = machine.at_once(shared_bytes);
        let size = |axes: &[AxisId]| axes.iter().map(|a| extents[a.0 as usize]).product::<usize>();
        let positions = extents[plan.along.0 as usize];
        // Who has a cube for most multiprocessors gains less by two for each than it takes to merge so few positions (measured on an H200).
        let enough = 4 * cubes >= 3 * machine.multiprocessors && positions < LONG;
        let parts = told.unwrap_or(if enough { 1 } else { busy / cubes.max(1) }).min(positions / PART);
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

impl Split {
    /// The grids of both launches, where that of the whole would be this.
    ///
    /// # Errors
    /// As for [`LaunchShape::grid`].
    pub(crate) fn grids(&self, shape: &LaunchShape, (x, y, _): Grid) -> Result<[Grid; 2], String> {
        let arranged = |cubes: usize| shape.arranged(cubes as u64);
        let parts = self.parts * x as usize * y as usize;
        Ok([arranged(parts)?, arranged(self.elements.div_ceil(shape.units as usize))?])
    }
}

/// Behind the sums of a row, a part keeps its maximum and the sum of its weights.
pub(super) const KEPT: u32 = 2;

/// The instructions of the second part: a unit has an element of the product. `kept` is what the first left of parts of `chunk`
/// positions.
pub(crate) fn emit(e: &mut Emit, mut x: Exprs<'_>, plan: &StreamPlan, kept: Buf, chunk: Val, output: Buf) {
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
        let (nothing, least) = (e.f32(0.0), e.f32(least(plan.by)));
        let (max, sum, y) = (e.var(least), e.var(nothing), e.var(nothing));
        // Several parts are read at once, and what was found of those before is weighed again. Beyond the last, it is that once more, and
        // counts for nothing.
        let (step, last) = (e.u32(AT_ONCE), e.sub(parts, one));
        e.for_step(zero, parts, step, |e, first| {
            let read = |e: &mut Emit, n: u32| {
                let n = e.u32(n);
                let part = e.add(first, n);
                let exists = e.lt(part, parts);
                let part = e.binary(Bin::Min, part, last);
                let start = start(e, part);
                let at = e.add(start, columns);
                let at_sum = e.add(at, one);
                let at_y = e.add(start, column);
                let [max, sum, y] = [at, at_sum, at_y].map(|at| e.load(kept, at));
                (exists, max, sum, y)
            };
            let found: Vec<_> = (0..AT_ONCE).map(|n| read(e, n)).collect();
            let before = e.get(max);
            let largest = found.iter().fold(before, |most, (_, max, ..)| e.binary(Bin::Max, most, *max));
            let factor = |e: &mut Emit, max: Val| {
                let less = e.sub(max, largest);
                e.unary(Un::Exp, less)
            };
            let again = factor(e, before);
            let [mut sums, mut ys] = [sum, y].map(|var| {
                let known = e.get(var);
                e.mul(known, again)
            });
            for (exists, max, sum, y) in found {
                let weight = factor(e, max);
                let weight = e.select(exists, weight, nothing);
                (sums, ys) = (e.fma(sum, weight, sums), e.fma(y, weight, ys));
            }
            [(max, largest), (sum, sums), (y, ys)].into_iter().for_each(|(var, new)| e.set(var, new));
        });
        let largest = e.get(max);
        let (repeat, row) = (e.div(line, rows), e.rem(line, rows));
        let (batch, row) = (x.split(e, repeat, &plan.batch), x.split(e, row, &plan.m));
        let column = x.split(e, column, &plan.n);
        let known = [(&plan.batch[..], &batch[..]), (&plan.m[..], &row[..]), (&plan.n[..], &column[..])];
        let (sum, y) = (e.get(sum), e.get(y));
        let y = match plan.by {
            Monoid::Softmax if plan.values.is_none() => sum,
            Monoid::Softmax => {
                let divisor = divisor(e, sum);
                e.div(y, divisor)
            }
            // Maxima that no part has raised differ in no part: each counts as it is.
            Monoid::Sum => y,
            Monoid::Max => largest,
        };
        let top = plan.top.map(|top| (top, largest));
        finish(e, &mut x, &known, [(plan.product, y)].into_iter().chain(top), output);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_shared_out_where_that_keeps_more_of_a_device_busy_than_it_costs() {
        let text = "module m entry @f\n\nfunc @f {\naxes b=n0, h=16, k=64, s=n1\nparam q: bf16[b, h, k]\nparam c: bf16[b, s, k]\n\
                    score: f32[b, h, s] = contract q, c over k\nP: bf16[b, h, s] = softmax score over s\n\
                    o: f32[b, h, k] = contract P, c over s\nreturn o\n}\n";
        let module = latentc_ir::check("m.ir", text).unwrap_or_else(|e| panic!("{}", e.render()));
        let plan = StreamPlan::of(&module.functions[0]).expect("it streams");
        let parts = |cubes: usize, positions: usize| {
            let extents = [cubes, 16, 64, positions];
            Split::of(&plan, (cubes, 64 << 10), &extents, &Machine::HOPPER, None)
                .map_or(1, |split| split.parts)
        };
        assert_eq!([parts(1, 1024), parts(64, 1024)], [16, 4], "few cubes");
        assert_eq!(
            [parts(104, 2048), parts(128, 1024)],
            [1, 1],
            "a cube for most multiprocessors, and few positions"
        );
        assert_eq!([parts(104, 4096), parts(128, 4096)], [2, 2]);
        assert_eq!(parts(200, 4096), 1);
    }
}
