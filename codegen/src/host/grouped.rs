//! Grouped products on the CPU: rows are sorted by index, each group is one product, and rows of one result are added up in order.

use std::ops::Range;

use gemm::Parallelism;
use half::{bf16, f16};
use latentc_ir::{AxisId, Function, ValueId};
use rayon::prelude::*;

use super::coded::Codes;
use super::contract::codes;
use super::few::{Dense, Matrix, Rows};
use super::multiply::{Place, Way, are_halves, multiply, wide};
use super::simd::Element;
use super::walk::{Loop, merge, offset, place, step, take_longest, turns};
use super::{Shared, Spare, View, ViewMut};
use crate::coded::Table;
use crate::device::{DeviceError, Floats};
use crate::grouped::GroupedPlan;
use crate::map::strides;
use crate::program::Kernel;

/// Groups are multiplied together as long as their rows and what is made of them have no more elements than these: what one launch needs for
/// itself stays small, and near.
const TOGETHER: usize = 1 << 23;
/// Fewer elements than these are added up by one thread.
const ALONE: usize = 1 << 16;
/// Columns of the result that a task adds up are a multiple of these: a line of memory.
const COLUMNS: usize = 16;

/// Whether a parameter that lies in pieces is read as it is: the table of a grouped product, one piece for each index.
pub(super) fn reads_stack(body: &Function, param: ValueId, view: View<'_>, extents: &[usize]) -> bool {
    let Some(plan) = GroupedPlan::of(body) else { return false };
    let View::Stack(stack) = view else { return false };
    plan.table == Table::Elements(param)
        && body.ty(param).axes.first() == Some(&plan.along)
        && stack.pieces() == extents[plan.along.0 as usize]
}

/// Runs a grouped product. `extents` are those of the body's axes.
pub(super) fn run(
    kernel: &Kernel,
    inputs: &[Option<View<'_>>],
    output: ViewMut<'_>,
    extents: &[usize],
    spare: &mut Spare,
) -> Result<(), DeviceError> {
    let body = &kernel.body;
    let fail = |why: &str| DeviceError::Kernel { kernel: kernel.name.clone(), why: why.to_owned() };
    let plan = GroupedPlan::of(body).ok_or_else(|| fail("the body is no grouped product"))?;
    let view = |v| body.params.iter().position(|p| *p == v).and_then(|n| inputs[n]);
    let floats = |v| view(v).and_then(View::floats);
    let (Some(View::I(index)), Some(x), ViewMut::F(y)) = (view(plan.index), floats(plan.x), output) else {
        return Err(fail("a grouped product needs floats and an integer index"));
    };
    let copy;
    let x = match x {
        Floats::F32(x) => x,
        narrow => {
            copy = wide(narrow);
            &copy
        }
    };
    let y_axes = &body.ty(body.results[0]).axes;
    let (table_axes, x_axes) = (&plan.axes, &body.ty(plan.x).axes);
    let (table_steps, x_steps) = (strides(table_axes, extents), strides(x_axes, extents));
    let y_steps = strides(y_axes, extents);
    let extent = |a: &AxisId| extents[a.0 as usize];
    let size = |axes: &[AxisId]| axes.iter().map(extent).product::<usize>();
    let (m, k, experts) = (size(&plan.m), size(&plan.k), extent(&plan.along));
    let total: usize = y_axes.iter().map(extent).product();
    y[..total].par_chunks_mut(ALONE).for_each(|part| part.fill(0.0));
    let rows = size(&plan.rows);
    if rows * m * k == 0 {
        return Ok(());
    }

    // Where each row of the index reads and writes, and the rows of each expert, in order.
    let row_extents: Vec<_> = plan.rows.iter().map(extent).collect();
    let along = |axes: &[AxisId], steps: &[usize]| {
        plan.rows.iter().map(|&a| step(a, axes, steps)).collect::<Vec<_>>()
    };
    let (x_row, y_row) = (along(x_axes, &x_steps), along(y_axes, &y_steps));
    let mut of: Vec<Vec<usize>> = vec![Vec::new(); experts];
    for (row, &e) in index[..rows].iter().enumerate() {
        if e < 0 || e as usize >= experts {
            return Err(DeviceError::Index {
                kernel: kernel.name.clone(),
                index: i64::from(e),
                size: experts,
            });
        }
        of[e as usize].push(row);
    }
    let order: Vec<usize> = of.iter().flatten().copied().collect();
    let mut starts = vec![0];
    for group in &of {
        starts.push(starts[starts.len() - 1] + group.len());
    }

    let k_extents: Vec<_> = plan.k.iter().map(extent).collect();
    let x_k: Vec<_> = plan.k.iter().map(|&a| step(a, x_axes, &x_steps)).collect();
    let dense_k = x_k == strides(&plan.k, extents);
    // Steps in the table, and in a dense row of these axes.
    let loops = |axes: &[AxisId]| -> Vec<Loop<2>> {
        let rows = strides(axes, extents);
        merge(axes.iter().zip(rows).map(|(a, row)| (extent(a), [step(*a, table_axes, &table_steps), row])))
    };
    let (mut m_loops, mut k_loops) = (loops(&plan.m), loops(&plan.k));
    let (gm, gk) = (take_longest(&mut m_loops), take_longest(&mut k_loops));
    let groups = Groups {
        sizes: (m, k),
        expert: step(plan.along, table_axes, &table_steps),
        columns: gm,
        along: gk,
        outer: m_loops,
        inner: k_loops,
        halves: body.body.last().is_some_and(|product| are_halves(body, &product.args)),
    };
    let no_table = || fail("a grouped product needs a table of floats");
    let mixed = || fail("the pieces of its table are of several types");
    let matrices = match plan.table {
        Table::Codes(coded, held) => {
            let all = codes(&coded, held.map(view)).ok_or_else(no_table)?;
            // SAFETY: `check` made sure that the table holds all indices of its type.
            Matrices::Codes((0..experts).map(|e| unsafe { all.at(e * groups.expert) }).collect())
        }
        Table::Elements(table) => {
            let table = view(table).ok_or_else(no_table)?;
            let piece = |e: usize| match table {
                View::Stack(stack) => Some(stack.piece(e)),
                table => table.floats().map(|whole| whole.part(e * groups.expert..whole.len())),
            };
            let pieces: Option<Vec<_>> = (0..experts).map(piece).collect();
            let pieces = pieces.ok_or_else(no_table)?;
            match pieces[0] {
                Floats::F32(_) => Matrices::F32(matrices(&pieces).ok_or_else(mixed)?),
                Floats::Bf16(_) => Matrices::Bf16(matrices(&pieces).ok_or_else(mixed)?),
                Floats::F16(_) => Matrices::F16(matrices(&pieces).ok_or_else(mixed)?),
            }
        }
    };

    let m_extents: Vec<_> = plan.m.iter().map(extent).collect();
    let y_m: Vec<_> = plan.m.iter().map(|&a| step(a, y_axes, &y_steps)).collect();
    let dense_m = y_m == strides(&plan.m, extents);
    let width = m.div_ceil(rayon::current_num_threads()).next_multiple_of(COLUMNS);
    let y = Shared(y.as_mut_ptr());
    for block in blocks(&starts, TOGETHER / (m + k)) {
        let order = &order[starts[block.start]..starts[block.end]];
        let rows = order.len();
        // Rows of the operand side by side, the summed axes in the table's order.
        let (mut packed, mut made) = (spare.take(rows * k)?, spare.take(rows * m)?);
        packed[..rows * k].par_chunks_mut(k).zip(order).for_each(|(to, &row)| {
            let from = offset(row, &row_extents, &x_row);
            if dense_k {
                to.copy_from_slice(&x[from..from + k]);
            } else {
                to.iter_mut().enumerate().for_each(|(i, to)| *to = x[from + offset(i, &k_extents, &x_k)]);
            }
        });
        let starts = &starts[block.start..=block.end];
        // SAFETY: `check` made sure that the table holds all indices of its type; `packed` and `made` hold the block's rows of k and m.
        unsafe {
            match &matrices {
                Matrices::F32(all) => groups.run(starts, &packed, &all[block], &mut made),
                Matrices::Bf16(all) => groups.run(starts, &packed, &all[block], &mut made),
                Matrices::F16(all) => groups.run(starts, &packed, &all[block], &mut made),
                Matrices::Codes(all) => groups.run(starts, &packed, &all[block], &mut made),
            }
        }
        // Rows that meet in one result are added in the order of the experts, whichever threads do it: each has columns of its own.
        let to: Vec<_> = order.iter().map(|&row| offset(row, &row_extents, &y_row)).collect();
        let add = |task: usize| {
            let columns = task * width..m.min((task + 1) * width);
            for (from, &to) in made[..rows * m].chunks_exact(m).zip(&to) {
                let from = &from[columns.clone()];
                if dense_m {
                    // SAFETY: `check` made sure that all of the row is there; these columns of it are this task's.
                    let y = unsafe {
                        std::slice::from_raw_parts_mut(y.get().add(to + columns.start), from.len())
                    };
                    y.iter_mut().zip(from).for_each(|(y, x)| *y += x);
                } else {
                    for (i, x) in columns.clone().zip(from) {
                        // SAFETY: as above.
                        unsafe { *y.get().add(to + offset(i, &m_extents, &y_m)) += x };
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

/// The matrices of all groups.
enum Matrices<'a> {
    F32(Vec<Dense<f32>>),
    Bf16(Vec<Dense<bf16>>),
    F16(Vec<Dense<f16>>),
    Codes(Vec<Codes<'a>>),
}

/// Groups that lie side by side and have at most so many rows together, or are one group. `starts` says where the rows of each begin.
fn blocks(starts: &[usize], most: usize) -> Vec<Range<usize>> {
    let mut blocks: Vec<Range<usize>> = Vec::new();
    for e in 0..starts.len() - 1 {
        match blocks.last_mut() {
            Some(block) if starts[e + 1] - starts[block.start] <= most => block.end = e + 1,
            _ => blocks.push(e..e + 1),
        }
    }
    blocks
}

/// Matrices of one type; `None` if one is of another.
fn matrices<E: Element>(pieces: &[Floats<'_>]) -> Option<Vec<Dense<E>>> {
    pieces.iter().map(|&m| Some(Dense(E::of(m)?.as_ptr()))).collect()
}

/// The products of all groups. Loops have steps in the table, and in a dense row of their axes.
struct Groups {
    /// Columns and summands of a row.
    sizes: (usize, usize),
    /// From one group's matrix to the next, where all lie in one piece.
    expert: usize,
    columns: Loop<2>,
    along: Loop<2>,
    /// What does not fit into one matrix: other columns, other summands.
    outer: Vec<Loop<2>>,
    inner: Vec<Loop<2>>,
    /// Whether both operands are of [type](are_halves) bf16.
    halves: bool,
}

impl Groups {
    /// Multiplies the rows of each of these groups with its matrix. `starts` says where they begin, and where the last one ends.
    ///
    /// # Safety
    /// The matrices must be good for all places that the loops lead to.
    unsafe fn run<P: Place>(&self, starts: &[usize], packed: &[f32], matrices: &[P], made: &mut [f32]) {
        let (m, k) = self.sizes;
        let (columns, along) = (self.columns, self.along);
        // The step along an axis of one element is never taken.
        let step = |(extent, steps): Loop<2>, of: usize| if extent == 1 { 1 } else { steps[of] };
        let group = |e: usize| {
            let (start, count) = (starts[e] - starts[0], starts[e + 1] - starts[e]);
            let rows = packed.as_ptr().wrapping_add(start * k);
            let rows = Rows { data: rows, count, row: k, step: step(along, 1) };
            (start, rows, Matrix { data: matrices[e], column: step(columns, 0), along: step(along, 0) })
        };
        let mut tasks: Vec<(usize, Way, usize, usize, usize)> = Vec::new();
        for e in (0..starts.len() - 1).filter(|&e| starts[e] < starts[e + 1]) {
            let (_, rows, matrix) = group(e);
            let way = Way::of(&matrix, &rows, (columns.0, along.0), self.halves);
            let width = way.columns(columns.0, along.0);
            for turn in 0..turns(&self.outer) {
                let firsts = (0..columns.0).step_by(width);
                tasks.extend(firsts.map(|first| (e, way, turn, first, width.min(columns.0 - first))));
            }
        }
        let made = Shared(made.as_mut_ptr());
        let task = |&(e, way, turn, first, width): &(usize, Way, usize, usize, usize), parallelism| {
            let (start, rows, matrix) = group(e);
            let [table_m, made_m] = place(&self.outer, turn);
            for j in 0..turns(&self.inner) {
                let [table_k, packed_k] = place(&self.inner, j);
                // SAFETY: by the caller; groups are below their number. Each task writes its own elements of `made`.
                unsafe {
                    let rows = Rows { data: rows.data.add(packed_k), ..rows };
                    let from = matrix.data.at(table_m + table_k + first * columns.1[0]);
                    let to = made.get().add(start * m + made_m + first * columns.1[1]);
                    let to = Rows { data: to, count: rows.count, row: m, step: columns.1[1] };
                    multiply(
                        way,
                        rows,
                        Matrix { data: from, ..matrix },
                        to,
                        (width, along.0),
                        j > 0,
                        parallelism,
                    );
                }
            }
        };
        if tasks.len() >= rayon::current_num_threads() {
            tasks.par_iter().for_each(|t| task(t, Parallelism::None));
        } else {
            tasks.iter().for_each(|t| task(t, Parallelism::Rayon(0)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_lie_in_blocks_of_few_rows() {
        let starts = [0, 3, 3, 10, 12, 14, 15];
        assert_eq!(blocks(&starts, 5), [0..2, 2..3, 3..6]);
        assert_eq!(blocks(&starts, 12), [0..4, 4..6]);
        assert_eq!(blocks(&starts, 100).len(), 1);
        assert_eq!(blocks(&starts, 0).len(), 6);
    }
}
