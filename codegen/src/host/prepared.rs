//! What a launch comes to at some sizes: the pieces of a kernel, and the blocks of rows that go through them. It is found out once, and a
//! launch that finds it here asks for no memory.

use std::sync::Arc;

use latentc_ir::{AxisId, Function, Inst, Op, Size, ValueId};
use smallvec::SmallVec;

use super::contract::Contraction;
use super::grouped::GroupedProduct;
use super::map::{self, Machine, fail};
use super::spare::{Lane, Spare, Takes};
use super::stream::Fold;
use super::walk::step;
use super::{LAYOUT, View, ViewMut, elements, scatter};
use crate::device::{ANY, DeviceError};
use crate::map::{append, moved_axes, strides};
use crate::memory::in_place;
use crate::pieces::pieces;
use crate::program::{Kernel, KernelKind};

/// A kernel at some sizes.
pub(super) struct Prepared {
    /// The run-time sizes, or [`ANY`] for one that nothing here hangs on.
    pub(super) sizes: Vec<usize>,
    /// Of the body's axes: a number, or which run-time size it is.
    axes: Vec<Extent>,
    /// All of it, in blocks of rows.
    pub(super) blocks: Vec<Block>,
}

/// An axis of a kernel.
#[derive(Clone, Copy)]
enum Extent {
    Fixed(usize),
    Size(usize),
}

/// Rows of a kernel that are carried through all of its pieces before others are.
pub(super) struct Block {
    pieces: Arc<Pieces>,
    /// The axis of the rows, and how many they are, if they are not all.
    rows: Option<(AxisId, usize)>,
    /// Where the rows of each parameter begin, and those of the result.
    starts: Vec<usize>,
    first: usize,
}

/// What a kernel falls into, for some of its rows.
struct Pieces {
    /// Each after those that it reads.
    plans: Vec<Plan>,
    /// What is made where the result goes, if the last piece may work in place of it: its number, and which parameter of the last it is.
    early: Option<(usize, usize)>,
}

/// A kernel without prologues and epilogues.
struct Plan {
    kernel: Kernel,
    work: Work,
    /// Where it finds each of its parameters.
    reads: Vec<Read>,
    /// Whether its loops read a parameter as it is stored.
    as_stored: Vec<bool>,
}

/// Where a piece finds what it reads.
#[derive(Clone, Copy)]
enum Read {
    /// A parameter of the whole kernel.
    Param(usize),
    /// The result of a piece before it.
    Piece(usize),
}

/// How a piece is computed.
enum Work {
    /// The instructions: as they are, and for when the result takes the place of a parameter, for each that allows it.
    Map(Vec<(Option<usize>, Machine)>),
    Contract(Box<Contraction>),
    Grouped(Box<GroupedProduct>),
    Scatter,
    Stream(Box<Fold>),
}

/// What a piece reads; few read more.
type Views<'a> = SmallVec<[Option<View<'a>>; 10]>;

impl Prepared {
    /// Rows go one after the other where their pieces would leave more than `most` elements for each other.
    pub(super) fn new(kernel: &Kernel, sizes: &[usize], most: usize) -> Result<Prepared, DeviceError> {
        let symbols = kernel.size_symbols();
        let number = |name: &str| symbols.iter().position(|s| *s == name);
        let axes = kernel.body.axes.iter().map(|axis| match &axis.size {
            Size::Fixed(n) => Extent::Fixed(*n as usize),
            Size::Sym(name) => Extent::Size(number(name).expect("collected from these axes")),
        });
        let axes: Vec<_> = axes.collect();
        let extents = kernel.extents(sizes);
        let whole = Arc::new(Pieces::new(kernel, &extents)?);
        let hangs =
            |n: usize| whole.hangs_on(&|a: AxisId| matches!(axes[a.0 as usize], Extent::Size(s) if s == n));
        let known = sizes.iter().enumerate().map(|(n, &size)| if hangs(n) { size } else { ANY });
        let known = known.collect();
        let body = &kernel.body;
        let block = |pieces: &Arc<Pieces>, rows: Option<(AxisId, usize)>, first: usize| {
            let start = |v: ValueId| {
                let axes = &body.ty(v).axes;
                rows.map_or(0, |(a, _)| first * step(a, axes, &strides(axes, &extents)))
            };
            let starts = body.params.iter().map(|&v| start(v)).collect();
            Block { pieces: Arc::clone(pieces), rows, starts, first: start(body.results[0]) }
        };
        let left = whole.left(&extents);
        let Some(axis) = (left > most).then(|| whole.rows(body, &extents)).flatten() else {
            let blocks = vec![block(&whole, None, 0)];
            return Ok(Prepared { sizes: known, axes, blocks });
        };
        let rows = extents[axis.0 as usize];
        let each = rows.div_ceil(rows.min(left.div_ceil(most.max(1))));
        // Of few rows, so many at a time may be all of them in fewer blocks.
        let count = rows.div_ceil(each);
        let of = |rows: usize| {
            let mut extents = extents.clone();
            extents[axis.0 as usize] = rows;
            Pieces::new(kernel, &extents).map(Arc::new)
        };
        let behind = rows - (count - 1) * each;
        let (full, last) = (of(each)?, of(behind)?);
        let blocks = (0..count).map(|n| {
            let (pieces, rows) = if n + 1 < count { (&full, each) } else { (&last, behind) };
            block(pieces, Some((axis, rows)), n * each)
        });
        let blocks = blocks.collect();
        Ok(Prepared { sizes: known, axes, blocks })
    }

    /// What its launches take of each thread's.
    pub(super) fn takes(&self) -> Takes {
        let mut takes = Takes::default();
        for plan in self.blocks.iter().flat_map(|block| &block.pieces.plans) {
            match &plan.work {
                Work::Map(machines) => machines.iter().for_each(|(_, machine)| machine.takes(&mut takes)),
                Work::Contract(product) => product.takes(&mut takes),
                Work::Grouped(product) => product.takes(&mut takes),
                Work::Stream(fold) => fold.takes(&plan.kernel.body, &mut takes),
                Work::Scatter => {}
            }
        }
        takes
    }

    /// The extents of the body's axes.
    pub(super) fn extents(&self, sizes: &[usize], extents: &mut Vec<usize>) {
        extents.clear();
        extents.extend(self.axes.iter().map(|axis| match *axis {
            Extent::Fixed(n) => n,
            Extent::Size(n) => sizes[n],
        }));
    }

    /// Computes all of it. What the result takes the place of, if it does, is not among the inputs; `extents` are those of the body's axes.
    pub(super) fn run(
        &self,
        kernel: &Kernel,
        inputs: &[Option<View<'_>>],
        mut output: ViewMut<'_>,
        replaced: Option<usize>,
        extents: &mut [usize],
        spare: &mut Spare,
    ) -> Result<(), DeviceError> {
        for Block { pieces, rows, starts, first } in &self.blocks {
            if let Some((axis, rows)) = *rows {
                extents[axis.0 as usize] = rows;
            }
            let views = inputs.iter().zip(starts);
            let views: Views<'_> = views.map(|(&view, &start)| behind(view, start)).collect();
            let len = elements(kernel.output(), extents);
            pieces.run(&views, output.part(*first..first + len), replaced, extents, spare)?;
        }
        Ok(())
    }
}

/// A view from an element on.
fn behind(view: Option<View<'_>>, start: usize) -> Option<View<'_>> {
    if start == 0 { view } else { view.map(|view| view.tail(start)) }
}

impl Pieces {
    fn new(kernel: &Kernel, extents: &[usize]) -> Result<Pieces, DeviceError> {
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
        let made: Vec<_> = parts.iter().map(|part| part.body.results[0]).collect();
        let read = |v: &ValueId| {
            let param = kernel.body.params.iter().position(|p| p == v).map(Read::Param);
            let piece = || made.iter().position(|p| p == v).map(Read::Piece);
            param.or_else(piece).ok_or_else(|| fail(kernel, "a piece of it reads what none makes"))
        };
        let plan = |kernel: Kernel| {
            let reads = kernel.body.params.iter().map(read).collect::<Result<Vec<_>, _>>()?;
            let work = Work::new(&kernel, extents)?;
            let as_stored = (0..reads.len()).map(|n| work.reads_as_stored(&kernel.body, n)).collect();
            Ok(Plan { kernel, work, reads, as_stored })
        };
        let plans = parts.into_iter().map(plan).collect::<Result<Vec<_>, DeviceError>>()?;
        let early = early(&plans);
        Ok(Pieces { plans, early })
    }

    /// The last piece, and those before it.
    fn split(&self) -> (&Plan, &[Plan]) {
        self.plans.split_last().expect("a kernel is its own last piece")
    }

    /// Whether anything that was found out hangs on the extent of some axes: not where that only says how long a cache is, and streams come to
    /// the same at any sizes.
    fn hangs_on(&self, is: &dyn Fn(AxisId) -> bool) -> bool {
        self.plans.iter().any(|plan| {
            if let Work::Stream(fold) = &plan.work {
                return fold.hangs_on(is);
            }
            let body = &plan.kernel.body;
            let cache = append(body).filter(|inst| {
                matches!(inst.op, Op::Append { to, .. } if body.ty(inst.result()).axes.first() == Some(&to))
            });
            let cache = cache.map(|inst| [inst.args[0], inst.result()]);
            let leads = |v: ValueId| usize::from(cache.is_some_and(|cache| cache.contains(&v)));
            let mut values = body.params.iter().copied().chain(body.body.iter().map(Inst::result));
            values.any(|v| body.ty(v).axes.iter().skip(leads(v)).any(|&a| is(a)))
        })
    }

    /// Elements that pieces leave in memory of the launch.
    fn left(&self, extents: &[usize]) -> usize {
        let kept = |(n, plan): (usize, &Plan)| {
            let early = self.early.is_some_and(|(early, _)| early == n);
            (!early).then(|| elements(plan.kernel.output(), extents))
        };
        self.split().1.iter().enumerate().filter_map(kept).sum()
    }

    /// An axis whose indices all pieces can be computed for a few after the others: each is about the same ones of what it reads and
    /// makes, and these lie side by side.
    fn rows(&self, body: &Function, extents: &[usize]) -> Option<AxisId> {
        let (last, first) = self.split();
        let of = |v: ValueId| &body.ty(v).axes;
        let outermost = |v: ValueId| of(v).iter().copied().find(|a| extents[a.0 as usize] != 1);
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

    /// Computes the rows that these inputs are of.
    fn run(
        &self,
        inputs: &[Option<View<'_>>],
        mut output: ViewMut<'_>,
        replaced: Option<usize>,
        extents: &[usize],
        spare: &mut Spare,
    ) -> Result<(), DeviceError> {
        let (last, first) = self.split();
        // What is made early lies where the result goes, and its lane has nothing.
        let mut made: SmallVec<[Lane; 4]> = SmallVec::new();
        for (n, plan) in first.iter().enumerate() {
            if self.early.is_some_and(|(early, _)| early == n) {
                plan.run(inputs, &made, output.again(), None, extents, spare)?;
                made.push(Lane::default());
                continue;
            }
            let ty = plan.kernel.output();
            let mut lane = spare.take(ty.dtype.is_float(), elements(ty, extents))?;
            plan.run(inputs, &made, lane.view_mut(), None, extents, spare)?;
            made.push(lane);
        }
        let replaced = self.early.map(|(_, param)| param).or(replaced);
        last.run(inputs, &made, output, replaced, extents, spare)?;
        made.into_iter().for_each(|lane| spare.give(lane));
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

impl Work {
    fn new(kernel: &Kernel, extents: &[usize]) -> Result<Work, DeviceError> {
        Ok(match kernel.kind {
            KernelKind::Map => {
                let machine = |replaced| Ok((replaced, Machine::compile(kernel, extents, replaced)?));
                let replaced = in_place(kernel, &LAYOUT).into_iter().map(Some);
                let all = [None].into_iter().chain(replaced).map(machine);
                Work::Map(all.collect::<Result<_, DeviceError>>()?)
            }
            KernelKind::Contract => Work::Contract(Box::new(Contraction::new(kernel, extents)?)),
            KernelKind::Grouped => Work::Grouped(Box::new(GroupedProduct::new(kernel, extents)?)),
            KernelKind::Scatter | KernelKind::ScatterMatrix { .. } => Work::Scatter,
            KernelKind::Stream | KernelKind::StreamMatrix { .. } => {
                Work::Stream(Box::new(Fold::new(kernel, extents)?))
            }
            // Ways of GPUs to do one of the others.
            KernelKind::Tiles | KernelKind::Few { .. } | KernelKind::Matrix { .. } => {
                match KernelKind::of(&kernel.body) {
                    KernelKind::Grouped => Work::Grouped(Box::new(GroupedProduct::new(kernel, extents)?)),
                    _ => Work::Contract(Box::new(Contraction::new(kernel, extents)?)),
                }
            }
        })
    }

    /// Whether the loops read a parameter as it is stored, in one piece. Those of products read 16 bits, and those that look rows up.
    fn reads_as_stored(&self, body: &Function, param: usize) -> bool {
        match self {
            Work::Contract(product) => product.reads_as_stored(param),
            Work::Grouped(product) => product.reads_as_stored(param),
            Work::Map(_) => map::reads_as_stored(body, body.params[param]),
            Work::Stream(fold) => fold.reads_as_stored(body, param),
            Work::Scatter => false,
        }
    }
}

impl Plan {
    /// Runs a kernel without prologues and epilogues, on what the whole kernel is given and what pieces before it have made. The input that the
    /// output takes the place of, if there is one, is not among them.
    fn run(
        &self,
        inputs: &[Option<View<'_>>],
        made: &[Lane],
        output: ViewMut<'_>,
        replaced: Option<usize>,
        extents: &[usize],
        spare: &mut Spare,
    ) -> Result<(), DeviceError> {
        let Plan { kernel, work, reads, .. } = self;
        // Floats that the loops do not read as they are are brought to f32 and into one piece. They are small, such as the scales of norms.
        let mut wide: SmallVec<[(usize, Lane); 2]> = SmallVec::new();
        let mut views: Views<'_> = SmallVec::new();
        for (n, read) in reads.iter().enumerate() {
            let view = match *read {
                Read::Param(p) => inputs[p],
                Read::Piece(p) => Some(made[p].view()),
            };
            let view = match replaced {
                Some(replaced) if replaced == n => None,
                _ => view,
            };
            if let Some(view) = view.filter(|&view| !self.reads(n, view)) {
                let mut lane = spare.take(true, view.len())?;
                view.widen(lane.floats());
                wide.push((n, lane));
            }
            views.push(view);
        }
        for (n, lane) in &wide {
            views[*n] = Some(lane.view());
        }
        match work {
            Work::Map(machines) => {
                let machine = machines.iter().find(|(of, _)| *of == replaced);
                let (_, machine) = machine
                    .ok_or_else(|| fail(kernel, "its result may not take the place of what it is given"))?;
                machine.run(kernel, &views, output, extents)?;
            }
            Work::Contract(product) => product.run(kernel, &views, output, spare)?,
            Work::Grouped(product) => product.run(kernel, &views, output, spare)?,
            Work::Scatter => scatter::run(kernel, &views, output, extents, spare)?,
            Work::Stream(fold) => fold.run(kernel, &views, output, extents, spare)?,
        }
        drop(views);
        wide.into_iter().for_each(|(_, lane)| spare.give(lane));
        Ok(())
    }

    /// Whether the loops read a parameter as it lies there: those of grouped products also one matrix after the other.
    fn reads(&self, param: usize, view: View<'_>) -> bool {
        match (view, &self.work) {
            (View::F(_) | View::I(_), _) => true,
            (View::Stack(_), Work::Grouped(product)) => product.reads_stack(param, view),
            (View::Stack(_), Work::Map(_) | Work::Contract(_) | Work::Scatter | Work::Stream(_)) => false,
            (View::Bf16(_) | View::F16(_), _) => self.as_stored[param],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::parsed;

    /// How many rows of its blocks a kernel has that leaves so many elements at most.
    fn blocks(text: &str, sizes: &[usize], most: usize) -> Vec<usize> {
        let kernel = parsed(KernelKind::Contract, text);
        let prepared = Prepared::new(&kernel, sizes, most).expect("it is a kernel");
        prepared.blocks.iter().map(|block| block.rows.map_or(sizes[0], |(_, rows)| rows)).collect()
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
        assert_eq!(blocks(text, &[8], 12), [2; 4]);
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
