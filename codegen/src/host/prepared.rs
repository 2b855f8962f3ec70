//! What a launch comes to at some sizes: the pieces of a kernel, and the blocks of rows that go through them.

use std::ops::Range;
use std::sync::Arc;

use latentc_ir::{AxisId, Function, Inst, Op, ValueId};

use super::map::{self, Machine};
use super::walk::step;
use super::{Buffer, LAYOUT, Spare, View, ViewMut, contract, elements, grouped, scatter, stream};
use crate::device::DeviceError;
use crate::map::{moved_axes, strides};
use crate::memory::in_place;
use crate::pieces::pieces;
use crate::program::{Kernel, KernelKind};

/// A kernel at some sizes.
pub(super) struct Prepared {
    /// Of the body's axes.
    pub(super) extents: Vec<usize>,
    /// All of it, in blocks of rows.
    pub(super) blocks: Vec<Block>,
}

/// Rows of a kernel that are carried through all of its pieces before others are.
pub(super) struct Block {
    pub(super) pieces: Arc<Pieces>,
    /// Where the rows of each parameter begin.
    pub(super) starts: Vec<usize>,
    /// Where those of the result are.
    pub(super) result: Range<usize>,
}

/// What a kernel falls into, for some of its rows.
pub(super) struct Pieces {
    /// Of the body's axes.
    extents: Vec<usize>,
    /// Each after those that it reads.
    plans: Vec<Plan>,
    /// What is made where the result goes, if the last piece may work in place of it: its number, and which parameter of the last it is.
    early: Option<(usize, usize)>,
}

/// A kernel without prologues and epilogues.
struct Plan {
    kernel: Kernel,
    /// The instructions of a map; and those for when its result takes the place of a parameter, for each that allows it.
    machines: Vec<(Option<usize>, Machine)>,
}

impl Prepared {
    /// Rows go one after the other where their pieces would leave more than `most` elements for each other.
    pub(super) fn new(kernel: &Kernel, sizes: &[usize], most: usize) -> Result<Prepared, DeviceError> {
        let extents = kernel.extents(sizes);
        let whole = Arc::new(Pieces::new(kernel, extents.clone())?);
        let body = &kernel.body;
        let block = |pieces: &Arc<Pieces>, axis: Option<AxisId>, first: usize| {
            let start = |v: ValueId| {
                let axes = &body.ty(v).axes;
                axis.map_or(0, |a| first * step(a, axes, &strides(axes, &extents)))
            };
            let result = start(body.results[0]);
            let len = elements(body.ty(body.results[0]), &pieces.extents);
            let starts = body.params.iter().map(|&v| start(v)).collect();
            Block { pieces: Arc::clone(pieces), starts, result: result..result + len }
        };
        let left = whole.left();
        let Some(axis) = (left > most).then(|| whole.rows(body)).flatten() else {
            let blocks = vec![block(&whole, None, 0)];
            return Ok(Prepared { extents, blocks });
        };
        let rows = extents[axis.0 as usize];
        let count = rows.min(left.div_ceil(most.max(1)));
        let each = rows.div_ceil(count);
        let of = |rows: usize| {
            let mut extents = extents.clone();
            extents[axis.0 as usize] = rows;
            Pieces::new(kernel, extents).map(Arc::new)
        };
        let (full, last) = (of(each)?, of(rows - (count - 1) * each)?);
        let blocks = (0..count).map(|n| {
            let pieces = if n + 1 < count { &full } else { &last };
            block(pieces, Some(axis), n * each)
        });
        let blocks = blocks.collect();
        Ok(Prepared { extents, blocks })
    }
}

impl Pieces {
    fn new(kernel: &Kernel, extents: Vec<usize>) -> Result<Pieces, DeviceError> {
        let parts = match kernel.kind {
            KernelKind::Map
            | KernelKind::Scatter
            | KernelKind::ScatterMatrix { .. }
            | KernelKind::Stream
            | KernelKind::StreamMatrix { .. } => vec![kernel.clone()],
            // What stands around a product goes through memory: the cache holds it, and a launch costs nothing here.
            KernelKind::Contract
            | KernelKind::Grouped
            | KernelKind::Tiles
            | KernelKind::Few { .. }
            | KernelKind::Matrix { .. } => pieces(kernel).into_iter().map(|p| p.kernel).collect(),
        };
        let plan = |kernel: Kernel| {
            let machine = |replaced| Ok((replaced, Machine::compile(&kernel, &extents, replaced)?));
            let machines = match kernel.kind {
                KernelKind::Map => {
                    let replaced = in_place(&kernel, &LAYOUT).into_iter().map(Some);
                    [None].into_iter().chain(replaced).map(machine).collect::<Result<_, DeviceError>>()?
                }
                KernelKind::Contract
                | KernelKind::Grouped
                | KernelKind::Scatter
                | KernelKind::ScatterMatrix { .. }
                | KernelKind::Stream
                | KernelKind::StreamMatrix { .. }
                | KernelKind::Tiles
                | KernelKind::Few { .. }
                | KernelKind::Matrix { .. } => Vec::new(),
            };
            Ok(Plan { kernel, machines })
        };
        let plans = parts.into_iter().map(plan).collect::<Result<Vec<_>, DeviceError>>()?;
        let early = early(&plans);
        Ok(Pieces { extents, plans, early })
    }

    /// The last piece, and those before it.
    fn split(&self) -> (&Plan, &[Plan]) {
        self.plans.split_last().expect("a kernel is its own last piece")
    }

    /// Elements that pieces leave in memory of the launch.
    fn left(&self) -> usize {
        let kept = |(n, plan): (usize, &Plan)| {
            let early = self.early.is_some_and(|(early, _)| early == n);
            (!early).then(|| elements(plan.kernel.body.ty(plan.kernel.body.results[0]), &self.extents))
        };
        self.split().1.iter().enumerate().filter_map(kept).sum()
    }

    /// An axis whose indices all pieces can be computed for a few after the others: each is about the same ones of what it reads and
    /// makes, and these lie side by side.
    fn rows(&self, body: &Function) -> Option<AxisId> {
        let (last, first) = self.split();
        let of = |v: ValueId| &body.ty(v).axes;
        let outermost = |v: ValueId| of(v).iter().copied().find(|a| self.extents[a.0 as usize] != 1);
        let axis = outermost(last.kernel.body.results[0])?;
        let made = first.iter().map(|plan| plan.kernel.body.results[0]);
        let apart = |inst: &Inst| {
            let of_all = matches!(inst.op, Op::Append { .. }) || inst.op == Op::Position { axis };
            !of_all && !moved_axes(body, inst).contains(&axis)
        };
        let right = made.map(outermost).all(|found| found == Some(axis))
            && body.params.iter().all(|&v| !of(v).contains(&axis) || outermost(v) == Some(axis))
            && body.body.iter().all(apart);
        right.then_some(axis)
    }

    /// Computes the rows. What the result takes the place of, if it does, is not among the parameters.
    pub(super) fn run<'a>(
        &self,
        params: impl Iterator<Item = (ValueId, Option<View<'a>>)> + Clone,
        mut output: ViewMut<'_>,
        replaced: Option<usize>,
        spare: &mut Spare,
    ) -> Result<(), DeviceError> {
        let (last, first) = self.split();
        let mut made: Vec<(ValueId, Buffer)> = Vec::with_capacity(first.len());
        for (n, plan) in first.iter().enumerate() {
            let views = views_of(&plan.kernel, params.clone(), &made);
            if self.early.is_some_and(|(early, _)| early == n) {
                plain(plan, None, &views, output.again(), &self.extents, spare)?;
                continue;
            }
            let value = plan.kernel.body.results[0];
            let ty = plan.kernel.body.ty(value);
            let len = elements(ty, &self.extents);
            let mut buffer = match ty.dtype.is_float() {
                true => Buffer::F32(spare.take(len)?),
                false => Buffer::new(ty.dtype, len)?,
            };
            let result = buffer.view_mut().expect("it is its own");
            plain(plan, None, &views, result, &self.extents, spare)?;
            made.push((value, buffer));
        }
        let replaced = self.early.map(|(_, param)| param).or(replaced);
        plain(last, replaced, &views_of(&last.kernel, params, &made), output, &self.extents, spare)?;
        for (_, buffer) in made {
            if let Buffer::F32(v) = buffer {
                spare.give(v);
            }
        }
        Ok(())
    }
}

/// A value that the last piece alone reads, and may write over.
fn early(plans: &[Plan]) -> Option<(usize, usize)> {
    let (last, first) = plans.split_last()?;
    let places = in_place(&last.kernel, &LAYOUT).into_iter().map(|n| (n, last.kernel.body.params[n]));
    places.rev().find_map(|(param, value)| {
        let maker = first.iter().position(|plan| plan.kernel.body.results[0] == value)?;
        let read = first.iter().any(|plan| plan.kernel.body.params.contains(&value));
        (!read).then_some((maker, param))
    })
}

/// What a piece of a kernel reads.
fn views_of<'m, 'a: 'm>(
    piece: &Kernel,
    params: impl Iterator<Item = (ValueId, Option<View<'a>>)>,
    made: &'m [(ValueId, Buffer)],
) -> Vec<Option<View<'m>>> {
    let mut known: Vec<(ValueId, Option<View<'m>>)> = Vec::new();
    for (v, view) in params {
        known.push((v, view));
    }
    known.extend(made.iter().map(|(v, buffer)| (*v, Some(buffer.view()))));
    let of = |p: &ValueId| known.iter().find(|(v, _)| v == p).and_then(|(_, view)| *view);
    piece.body.params.iter().map(of).collect()
}

/// Runs a kernel without prologues and epilogues. The input that the output takes the place of, if there is one, is not among the views.
fn plain(
    Plan { kernel, machines }: &Plan,
    replaced: Option<usize>,
    inputs: &[Option<View<'_>>],
    output: ViewMut<'_>,
    extents: &[usize],
    spare: &mut Spare,
) -> Result<(), DeviceError> {
    let wide = widened(kernel, inputs, extents);
    let views: Vec<_> =
        inputs.iter().zip(&wide).map(|(&view, wide)| wide.as_deref().map(View::F).or(view)).collect();
    match kernel.kind {
        KernelKind::Map => {
            let machine = machines.iter().find(|(of, _)| *of == replaced);
            let (_, machine) = machine
                .ok_or_else(|| map::fail(kernel, "its result may not take the place of what it is given"))?;
            machine.run(kernel, &views, output)
        }
        KernelKind::Contract => contract::run(kernel, &views, output, extents),
        KernelKind::Grouped => grouped::run(kernel, &views, output, extents, spare),
        KernelKind::Scatter | KernelKind::ScatterMatrix { .. } => {
            scatter::run(kernel, &views, output, extents, spare)
        }
        KernelKind::Stream | KernelKind::StreamMatrix { .. } => stream::run(kernel, &views, output, extents),
        // Ways of GPUs to do one of the others.
        KernelKind::Tiles | KernelKind::Few { .. } | KernelKind::Matrix { .. } => {
            match KernelKind::of(&kernel.body) {
                KernelKind::Grouped => grouped::run(kernel, &views, output, extents, spare),
                _ => contract::run(kernel, &views, output, extents),
            }
        }
    }
}

/// Inputs in f32 and in one piece where the kernel's loops do not read them as they are: those of products read 16 bits, and those that
/// look rows up; those of grouped products read experts one by one. What is left is small, the scales of norms.
fn widened(kernel: &Kernel, inputs: &[Option<View<'_>>], extents: &[usize]) -> Vec<Option<Vec<f32>>> {
    let body = &kernel.body;
    let as_stored = |param: ValueId, view: View<'_>| match kernel.kind {
        _ if matches!(view, View::Stack(_)) => grouped::reads_stack(body, param, view, extents),
        KernelKind::Contract
        | KernelKind::Grouped
        | KernelKind::Tiles
        | KernelKind::Few { .. }
        | KernelKind::Matrix { .. } => true,
        KernelKind::Map => body.body.iter().all(|inst| {
            let reads =
                |(n, &a): (usize, &ValueId)| a != param || n == 0 && matches!(inst.op, Op::Gather { .. });
            inst.args.iter().enumerate().all(reads)
        }),
        KernelKind::Scatter
        | KernelKind::ScatterMatrix { .. }
        | KernelKind::Stream
        | KernelKind::StreamMatrix { .. } => false,
    };
    let widen = |(&param, view): (&ValueId, &Option<View<'_>>)| {
        let view = view.filter(|v| v.is_float() && !matches!(v, View::F(_)))?;
        if as_stored(param, view) { None } else { view.widened() }
    };
    body.params.iter().zip(inputs).map(widen).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::parsed;

    /// How many rows of its blocks a kernel has that leaves so many elements at most.
    fn blocks(text: &str, sizes: &[usize], most: usize) -> Vec<usize> {
        let kernel = parsed(KernelKind::Contract, text);
        let prepared = Prepared::new(&kernel, sizes, most).expect("it is a kernel");
        let width = elements(kernel.output(), &kernel.extents(sizes)) / sizes[0];
        prepared.blocks.iter().map(|block| block.result.len() / width).collect()
    }

    #[test]
    fn rows_go_one_after_the_other_if_pieces_leave_much() {
        // A prologue of 8 numbers a row and an epilogue, each of which leaves its own.
        let text = "  axes t, d=8, e=4\n  param x: f32[t, d=8]\n  param w: f32[e=4, d=8]\n\n  \
                    h: f32[t, d=8] = neg x\n  p: f32[t, e=4] = contract h, w over d\n  \
                    y: f32[t, e=4] = neg p\n";
        assert_eq!(blocks(text, &[10], 80), [10]);
        assert_eq!(blocks(text, &[10], 79), [5, 5]);
        assert_eq!(blocks(text, &[10], 24), [3, 3, 3, 1]);
        assert_eq!(blocks(text, &[10], 1), [1; 10]);
    }

    #[test]
    fn rows_that_depend_on_others_stay_together() {
        let sum = "  axes t, d=8, e=4\n  param x: f32[t, d=8]\n  param w: f32[t, e=4]\n\n  \
                   h: f32[t, d=8] = neg x\n  y: f32[d=8, e=4] = contract h, w over t\n";
        assert_eq!(blocks(sum, &[8], 1).len(), 1);
        let place = "  axes t, d=8, e=4\n  param x: f32[t, d=8]\n  param w: f32[e=4, d=8]\n\n  \
                     n: i32[t] = position of t\n  f: f32[t] = cast n\n  h: f32[t, d=8] = mul x, f\n  \
                     y: f32[t, e=4] = contract h, w over d\n";
        assert_eq!(blocks(place, &[8], 1).len(), 1);
    }
}
