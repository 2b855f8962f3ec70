//! Grouped products on the CPU: rows are sorted by index, each group is one product, and rows of one result are added up in order.

use std::ops::Range;

use gemm::Parallelism;
use half::{bf16, f16};
use latentc_ir::{AxisId, ValueId};
use rayon::prelude::*;

use super::contract::codes;
use super::few::{self, Dense, Matrix};
use super::map::fail;
use super::multiply::{Place, Way, are_halves, copied, multiply, widen};
use super::simd::Element;
use super::spare::{Spare, Takes};
use super::walk::{Loop, Loops, merge, offset, place, step, take_longest, turns};
use super::{Shared, View, ViewMut};
use crate::coded::{Coded, Table};
use crate::device::{DeviceError, Floats};
use crate::grouped::GroupedPlan;
use crate::map::{Steps, strides};
use crate::program::Kernel;

/// Groups are multiplied together as long as their rows and what is made of them have no more elements than these: what one launch needs for
/// itself stays small, and near.
const TOGETHER: usize = 1 << 21;
/// Fewer elements than these are added up by one thread.
const ALONE: usize = 1 << 16;
/// Columns of the result that a task adds up are a multiple of these: a line of memory.
const COLUMNS: usize = 16;

/// A grouped product at some sizes. Parameters are known by their numbers.
pub(super) struct GroupedProduct {
    index: usize,
    x: usize,
    table: Held,
    /// Elements of the result.
    total: usize,
    /// Axes of the index: extents, and steps in the operand and the result.
    rows: [Steps; 3],
    /// Summed axes: extents, and steps in the operand; none if a row of these lies there as it does in the table.
    k: Option<[Steps; 2]>,
    /// Axes of the columns: extents, and steps in the result; none if these lie there side by side.
    m: Option<[Steps; 2]>,
    groups: Groups,
}

/// What matrices are chosen of.
enum Held {
    /// Elements. They may lie in pieces, one for each matrix, if the axis that is indexed is the first.
    Elements { param: usize, in_pieces: bool },
    /// Words and scales.
    Codes(Coded, [usize; 2]),
}

/// How rows are put in order, kept from launch to launch.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// Where the rows of each group begin, and where those of the last end.
    starts: Vec<usize>,
    /// Rows of the index, group by group.
    order: Vec<usize>,
    /// Where each of them goes in the result.
    to: Vec<usize>,
    tasks: Vec<Task>,
}

/// Columns of a group's product that are computed at once.
#[derive(Clone, Copy, Debug)]
struct Task {
    group: usize,
    way: Way,
    /// A turn of what does not fit into one matrix.
    turn: usize,
    first: usize,
    width: usize,
}

impl Rows {
    /// Sorts the rows of an index by the group that each names.
    ///
    /// # Errors
    /// The first that is none of so many.
    fn sort(&mut self, index: &[i32], groups: usize) -> Result<(), i32> {
        let Rows { starts, order, .. } = self;
        starts.clear();
        starts.resize(groups + 1, 0);
        for &group in index {
            let group = usize::try_from(group).ok().filter(|&n| n < groups).ok_or(group)?;
            starts[group + 1] += 1;
        }
        for group in 0..groups {
            starts[group + 1] += starts[group];
        }
        order.clear();
        order.resize(index.len(), 0);
        // Each start moves on to the next one.
        for (row, &group) in index.iter().enumerate() {
            let at = &mut starts[group as usize];
            order[*at] = row;
            *at += 1;
        }
        starts.copy_within(..groups, 1);
        starts[0] = 0;
        Ok(())
    }
}

impl GroupedProduct {
    /// Of a kernel. `extents` are those of the body's axes.
    pub(super) fn new(kernel: &Kernel, extents: &[usize]) -> Result<GroupedProduct, DeviceError> {
        let body = &kernel.body;
        let plan = GroupedPlan::of(body).ok_or_else(|| fail(kernel, "the body is no grouped product"))?;
        let param = |v: ValueId| {
            let found = body.params.iter().position(|p| *p == v);
            found.ok_or_else(|| fail(kernel, "an operand is no parameter"))
        };
        let (y_axes, x_axes) = (&body.ty(body.results[0]).axes, &body.ty(plan.x).axes);
        let [table_steps, x_steps, y_steps] = [&plan.axes, x_axes, y_axes].map(|axes| strides(axes, extents));
        let extent = |a: &AxisId| extents[a.0 as usize];
        let size = |axes: &[AxisId]| axes.iter().map(extent).product::<usize>();
        let of = |axes: &[AxisId]| axes.iter().map(extent).collect::<Steps>();
        let along = |group: &[AxisId], axes: &[AxisId], steps: &[usize]| {
            group.iter().map(|&a| step(a, axes, steps)).collect::<Steps>()
        };
        let spread =
            |group: &[AxisId], steps: Steps| (steps != strides(group, extents)).then(|| [of(group), steps]);
        // Steps in the table, and in a dense row of these axes.
        let loops = |axes: &[AxisId]| -> Loops<2> {
            let rows = strides(axes, extents);
            let steps = |a: &AxisId| step(*a, &plan.axes, &table_steps);
            merge(axes.iter().zip(rows).map(|(a, row)| (extent(a), [steps(a), row])))
        };
        let (mut outer, mut inner) = (loops(&plan.m), loops(&plan.k));
        let (columns, summed) = (take_longest(&mut outer), take_longest(&mut inner));
        let groups = Groups {
            count: extent(&plan.along),
            sizes: (size(&plan.m), size(&plan.k)),
            next: step(plan.along, &plan.axes, &table_steps),
            columns,
            along: summed,
            outer,
            inner,
            halves: body.body.last().is_some_and(|product| are_halves(body, &product.args)),
        };
        let table = match plan.table {
            Table::Codes(coded, [words, scales]) => Held::Codes(coded, [param(words)?, param(scales)?]),
            Table::Elements(table) => {
                let in_pieces = body.ty(table).axes.first() == Some(&plan.along);
                Held::Elements { param: param(table)?, in_pieces }
            }
        };
        Ok(GroupedProduct {
            index: param(plan.index)?,
            x: param(plan.x)?,
            table,
            total: size(y_axes),
            rows: [of(&plan.rows), along(&plan.rows, x_axes, &x_steps), along(&plan.rows, y_axes, &y_steps)],
            k: spread(&plan.k, along(&plan.k, x_axes, &x_steps)),
            m: spread(&plan.m, along(&plan.m, y_axes, &y_steps)),
            groups,
        })
    }

    /// What it takes of each thread's.
    pub(super) fn takes(&self, takes: &mut Takes) {
        takes.floats(copied(self.rows[0].iter().product(), self.groups.along.0));
    }

    /// Whether a parameter that lies in pieces is read as it is: one for each index.
    pub(super) fn reads_stack(&self, param: usize, view: View<'_>) -> bool {
        let View::Stack(stack) = view else { return false };
        let here = matches!(self.table, Held::Elements { param: table, in_pieces: true } if table == param);
        here && stack.pieces() == self.groups.count
    }

    /// Whether it reads a parameter as it is stored: all but the scales of codes.
    pub(super) fn reads_as_stored(&self, param: usize) -> bool {
        !matches!(self.table, Held::Codes(_, [_, scales]) if scales == param)
    }

    /// Computes the kernel that this is of.
    pub(super) fn run(
        &self,
        kernel: &Kernel,
        inputs: &[Option<View<'_>>],
        output: ViewMut<'_>,
        spare: &mut Spare,
    ) -> Result<(), DeviceError> {
        let floats = inputs[self.x].and_then(View::floats);
        let (Some(View::I(index)), Some(x), ViewMut::F(y)) = (inputs[self.index], floats, output) else {
            return Err(fail(kernel, "a grouped product needs floats and an integer index"));
        };
        y[..self.total].par_chunks_mut(ALONE).for_each(|part| part.fill(0.0));
        let ((m, k), count) = (self.groups.sizes, self.rows[0].iter().product::<usize>());
        if count * m * k == 0 {
            return Ok(());
        }
        let mut copy = spare.take(true, if let Floats::F32(_) = x { 0 } else { x.len() })?;
        let x = match x {
            Floats::F32(x) => x,
            narrow => {
                widen(narrow, copy.floats());
                copy.floats()
            }
        };
        let mut rows = std::mem::take(&mut spare.rows);
        rows.sort(&index[..count], self.groups.count).map_err(|wrong| DeviceError::Index {
            kernel: kernel.name.clone(),
            index: wrong.into(),
            size: self.groups.count,
        })?;
        let no_table = || fail(kernel, "a grouped product needs a table of floats");
        let next = self.groups.next;
        let y = Shared(y.as_mut_ptr());
        match self.table {
            Held::Codes(coded, held) => {
                let all = codes(&coded, held.map(|param| inputs[param])).ok_or_else(no_table)?;
                // SAFETY: `fit` made sure that the table holds all indices of its type.
                let matrix = |group: usize| Some(unsafe { all.at(group * next) });
                self.blocks(kernel, &mut rows, x, matrix, y, spare)?;
            }
            Held::Elements { param, .. } => {
                let table = inputs[param].ok_or_else(no_table)?;
                let piece = |group: usize| match table {
                    View::Stack(stack) => Some(stack.piece(group)),
                    table => table.floats().map(|whole| whole.part(group * next..whole.len())),
                };
                match piece(0).ok_or_else(no_table)? {
                    Floats::F32(_) => {
                        let matrix = |group| dense::<f32>(piece(group)?);
                        self.blocks(kernel, &mut rows, x, matrix, y, spare)?;
                    }
                    Floats::Bf16(_) => {
                        let matrix = |group| dense::<bf16>(piece(group)?);
                        self.blocks(kernel, &mut rows, x, matrix, y, spare)?;
                    }
                    Floats::F16(_) => {
                        let matrix = |group| dense::<f16>(piece(group)?);
                        self.blocks(kernel, &mut rows, x, matrix, y, spare)?;
                    }
                }
            }
        }
        spare.rows = rows;
        spare.give(copy);
        Ok(())
    }

    /// The products of all groups, a few after the others, and their sum. `matrix` gives that of a group, if all are of one type.
    fn blocks<P: Place>(
        &self,
        kernel: &Kernel,
        Rows { starts, order, to, tasks }: &mut Rows,
        x: &[f32],
        matrix: impl Fn(usize) -> Option<P> + Sync,
        y: Shared<f32>,
        spare: &mut Spare,
    ) -> Result<(), DeviceError> {
        let (m, k) = self.groups.sizes;
        let [extents, x_row, y_row] = &self.rows;
        let width = m.div_ceil(rayon::current_num_threads()).next_multiple_of(COLUMNS);
        let mut first = 0;
        while let Some(block) = block(starts, first, TOGETHER / (m + k)) {
            first = block.end;
            let order = &order[starts[block.start]..starts[block.end]];
            let rows = order.len();
            // Rows of the operand side by side, the summed axes in the table's order.
            let (mut packed, mut made) = (spare.take(true, rows * k)?, spare.take(true, rows * m)?);
            packed.floats().par_chunks_mut(k).zip(order).for_each(|(to, &row)| {
                let from = offset(row, extents, x_row);
                match &self.k {
                    None => to.copy_from_slice(&x[from..from + k]),
                    Some([extents, steps]) => {
                        let at = |i| from + offset(i, extents, steps);
                        to.iter_mut().enumerate().for_each(|(i, to)| *to = x[at(i)]);
                    }
                }
            });
            // SAFETY: `fit` made sure that the table holds all indices of its type; `packed` and `made` hold the block's rows of k and m.
            let all =
                unsafe { self.groups.run(starts, block, packed.floats(), &matrix, made.floats(), tasks) };
            all.ok_or_else(|| fail(kernel, "the pieces of its table are of several types"))?;
            // Rows that meet in one result are added in the order of the groups, whichever threads do it: each has columns of its own.
            to.clear();
            to.extend(order.iter().map(|&row| offset(row, extents, y_row)));
            let sums = &*made.floats();
            let add = |task: usize| {
                let columns = task * width..m.min((task + 1) * width);
                for (from, &to) in sums.chunks_exact(m).zip(&*to) {
                    let from = &from[columns.clone()];
                    match &self.m {
                        None => {
                            // SAFETY: `fit` made sure that all of the row is there; these columns of it are this task's.
                            let y = unsafe {
                                std::slice::from_raw_parts_mut(y.get().add(to + columns.start), from.len())
                            };
                            y.iter_mut().zip(from).for_each(|(y, x)| *y += x);
                        }
                        Some([extents, steps]) => {
                            for (i, x) in columns.clone().zip(from) {
                                // SAFETY: as above.
                                unsafe { *y.get().add(to + offset(i, extents, steps)) += x };
                            }
                        }
                    }
                }
            };
            let tasks = m.div_ceil(width);
            if rows * m < ALONE {
                (0..tasks).for_each(add);
            } else {
                (0..tasks).into_par_iter().for_each(add);
            }
            spare.give(packed);
            spare.give(made);
        }
        Ok(())
    }
}

/// Groups from one on that lie side by side and have at most so many rows together, or one group; none behind the last. `starts` says where the
/// rows of each begin.
fn block(starts: &[usize], first: usize, most: usize) -> Option<Range<usize>> {
    let ends = starts.get(first + 1..).filter(|ends| !ends.is_empty())?;
    let fit = ends.iter().take_while(|&&end| end - starts[first] <= most).count();
    Some(first..first + fit.max(1))
}

/// A matrix; `None` if it is of another type.
fn dense<E: Element>(piece: Floats<'_>) -> Option<Dense<E>> {
    Some(Dense(E::of(piece)?.as_ptr()))
}

/// The products of all groups. Loops have steps in the table, and in a dense row of their axes.
struct Groups {
    /// How many there are.
    count: usize,
    /// Columns and summands of a row.
    sizes: (usize, usize),
    /// From one group's matrix to the next, where all lie in one piece.
    next: usize,
    columns: Loop<2>,
    along: Loop<2>,
    /// What does not fit into one matrix: other columns, other summands.
    outer: Loops<2>,
    inner: Loops<2>,
    /// Whether both operands are of [type](are_halves) bf16.
    halves: bool,
}

impl Groups {
    /// Multiplies the rows of each of these groups with its matrix. `starts` says where those of all groups begin, `packed` and `made` have
    /// those of these. `None` if there is no matrix of that type for one of them.
    ///
    /// # Safety
    /// The matrices must be good for all places that the loops lead to.
    unsafe fn run<P: Place>(
        &self,
        starts: &[usize],
        block: Range<usize>,
        packed: &[f32],
        matrix: &(impl Fn(usize) -> Option<P> + Sync),
        made: &mut [f32],
        tasks: &mut Vec<Task>,
    ) -> Option<()> {
        let (m, k) = self.sizes;
        let (columns, along) = (self.columns, self.along);
        // The step along an axis of one element is never taken.
        let step = |(extent, steps): Loop<2>, of: usize| if extent == 1 { 1 } else { steps[of] };
        let before = starts[block.start];
        let group = |e: usize| {
            let (start, count) = (starts[e] - before, starts[e + 1] - starts[e]);
            let rows = packed.as_ptr().wrapping_add(start * k);
            let rows = few::Rows { data: rows, count, row: k, step: step(along, 1) };
            let matrix = Matrix { data: matrix(e)?, column: step(columns, 0), along: step(along, 0) };
            Some((start, rows, matrix))
        };
        tasks.clear();
        for e in block.filter(|&e| starts[e] < starts[e + 1]) {
            let (_, rows, matrix) = group(e)?;
            let way = Way::of(&matrix, &rows, (columns.0, along.0), self.halves);
            let width = way.columns(columns.0, along.0);
            for turn in 0..turns(&self.outer) {
                let firsts = (0..columns.0).step_by(width);
                let width = |first: usize| width.min(columns.0 - first);
                tasks.extend(firsts.map(|first| Task { group: e, way, turn, first, width: width(first) }));
            }
        }
        let made = Shared(made.as_mut_ptr());
        let task = |&Task { group: e, way, turn, first, width }: &Task, parallelism| {
            let (start, rows, matrix) = group(e).expect("each was looked at above");
            let [table_m, made_m] = place(&self.outer, turn);
            for j in 0..turns(&self.inner) {
                let [table_k, packed_k] = place(&self.inner, j);
                // SAFETY: by the caller; groups are below their number. Each task writes its own elements of `made`.
                unsafe {
                    let rows = few::Rows { data: rows.data.add(packed_k), ..rows };
                    let from = matrix.data.at(table_m + table_k + first * columns.1[0]);
                    let to = made.get().add(start * m + made_m + first * columns.1[1]);
                    let to = few::Rows { data: to, count: rows.count, row: m, step: columns.1[1] };
                    let matrix = Matrix { data: from, ..matrix };
                    multiply(way, rows, matrix, to, (width, along.0), j > 0, parallelism);
                }
            }
        };
        if tasks.len() >= rayon::current_num_threads() {
            tasks.par_iter().for_each(|t| task(t, Parallelism::None));
        } else {
            tasks.iter().for_each(|t| task(t, Parallelism::Rayon(0)));
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_lie_in_blocks_of_few_rows() {
        let starts = [0, 3, 3, 10, 12, 14, 15];
        let blocks = |most: usize| {
            let mut first = 0;
            let next = || block(&starts, first, most).inspect(|block| first = block.end);
            std::iter::from_fn(next).collect::<Vec<_>>()
        };
        assert_eq!(blocks(5), [0..2, 2..3, 3..6]);
        assert_eq!(blocks(12), [0..4, 4..6]);
        assert_eq!(blocks(100).len(), 1);
        assert_eq!(blocks(0).len(), 6);
    }

    #[test]
    fn rows_are_sorted_by_group_and_keep_their_order() {
        let mut rows = Rows::default();
        rows.sort(&[2, 0, 2, 3, 0], 5).expect("all are groups");
        assert_eq!((&rows.starts[..], &rows.order[..]), (&[0, 2, 2, 4, 5, 5][..], &[1, 4, 0, 2, 3][..]));
        assert_eq!(rows.sort(&[1, -1, 7], 5), Err(-1));
        assert_eq!(rows.sort(&[], 2), Ok(()));
        assert_eq!(rows.starts, [0, 0, 0]);
    }
}
