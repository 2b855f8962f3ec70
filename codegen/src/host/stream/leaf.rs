//! What a stream reads of memory: parameters, views of them, and what is computed whole before it begins.

use latentc_ir::{AxisId, Function, Inst, Op, ValueId};

use super::super::map::{Axes, Machine, fail, reads_as_stored, split};
use super::super::spare::{Lane, Spare};
use super::super::walk::step;
use super::super::{View, elements};
use crate::device::DeviceError;
use crate::map::{Steps, strides};
use crate::program::{Kernel, KernelKind};
use crate::stream::{Read, StreamPlan, cone, defined};

/// What a leaf is.
pub(super) enum Form {
    /// A parameter, by its number.
    Param { number: usize, axes: Axes },
    /// A pool whose pages lie as a table says: the numbers of both parameters.
    Pages { pool: usize, table: usize, read: Box<Paged> },
    /// A leaf of which an axis is another one.
    Renamed { leaf: Box<Form>, from: AxisId, to: AxisId },
    /// Some of a leaf along an axis.
    Sliced { leaf: Box<Form>, axis: AxisId, into: AxisId, start: usize },
    /// A leaf of which an axis is several.
    Split { leaf: Box<Form>, axis: AxisId, into: Vec<AxisId> },
    /// What a map makes of parameters.
    Computed(Box<(Kernel, Machine)>),
}

/// How a leaf lies in pages.
pub(super) struct Paged {
    read: Read,
    /// The axes of the pool, and of the table.
    axes: Axes,
    of_table: Axes,
    /// Those of the table that number sequences.
    sequences: Axes,
    /// Positions of a page.
    page: usize,
}

/// Where a leaf's elements are.
pub(super) struct Leaf<'a> {
    data: Held<'a>,
    offset: usize,
    axes: Axes,
    steps: Steps,
    /// Where positions of the streamed axis lie, if it is not one behind the other.
    pages: Option<Pages<'a>>,
}

/// The table of pages that a leaf lies in.
struct Pages<'a> {
    table: &'a [i32],
    axes: Axes,
    steps: Steps,
    /// The step from one page to the next.
    next: usize,
    /// The streamed axis.
    along: AxisId,
    /// Positions of a page.
    page: usize,
}

enum Held<'a> {
    View(View<'a>),
    Own(Lane),
}

impl Pages<'_> {
    /// The slot of the first position of a tile.
    fn slot(&self, from: &[usize]) -> usize {
        let position = from[self.along.0 as usize];
        let of_sequence = self.axes.iter().zip(&self.steps).map(|(a, step)| from[a.0 as usize] * step);
        let place = self.table[of_sequence.sum::<usize>() + position / self.page * self.next];
        place as usize * self.page + position % self.page
    }
}

impl Leaf<'_> {
    /// Positions of a page, if it lies in pages.
    pub(super) fn page(&self) -> Option<usize> {
        self.pages.as_ref().map(|pages| pages.page)
    }

    /// What was computed, which is of no use any more.
    pub(super) fn into_lane(self) -> Option<Lane> {
        match self.data {
            Held::Own(lane) => Some(lane),
            Held::View(_) => None,
        }
    }

    /// The elements from those of a tile on, with axes and steps. The tile begins at these places along all axes.
    pub(super) fn at(&self, from: &[usize]) -> (View<'_>, &[AxisId], Steps) {
        let view = match &self.data {
            Held::View(view) => *view,
            Held::Own(lane) => lane.view(),
        };
        let along = self.pages.as_ref().map(|pages| (pages.along, pages.slot(from)));
        let first = |a: &AxisId| match along {
            Some((along, slot)) if along == *a => slot,
            Some(_) | None => from[a.0 as usize],
        };
        let at = self.axes.iter().zip(&self.steps).map(|(a, s)| first(a) * s).sum::<usize>();
        (view.tail(self.offset + at), &self.axes, self.steps.clone())
    }
}

impl Form {
    /// A leaf of a kernel: a parameter, a view of a leaf, or computed as a map kernel would, at these extents of the body's axes.
    pub(super) fn of(
        (kernel, plan): (&Kernel, &StreamPlan),
        extents: &[usize],
        v: ValueId,
    ) -> Result<Form, DeviceError> {
        let body = &kernel.body;
        let Some(inst) = defined(body, v) else {
            let number = number(kernel, v)?;
            return Ok(Form::Param { number, axes: body.ty(v).axes[..].into() });
        };
        let below = || Form::of((kernel, plan), extents, inst.args[0]).map(Box::new);
        if let Some(form) = paged((kernel, plan), inst)? {
            return Ok(form);
        }
        match &inst.op {
            &Op::Rename { from, to } => return Ok(Form::Renamed { leaf: below()?, from, to }),
            &Op::Slice { axis, into, start } => {
                return Ok(Form::Sliced { leaf: below()?, axis, into, start: start as usize });
            }
            Op::Split { axis, into } => {
                return Ok(Form::Split { leaf: below()?, axis: *axis, into: into.clone() });
            }
            Op::Cast if [v, inst.args[0]].iter().all(|&v| body.ty(v).dtype.is_float()) => {
                return Ok(*below()?);
            }
            _ => {}
        }
        let mut part = Function { results: vec![v], ..body.clone() };
        let needed = cone(body, v, |_| true);
        part.body.retain(|i| needed.contains(&i.result()));
        let part = Kernel { name: kernel.name.clone(), kind: KernelKind::Map, body: part };
        let machine = Machine::compile(&part, extents, None)?;
        Ok(Form::Computed(Box::new((part, machine))))
    }

    /// Whether it is a view of a parameter, and may read it as it is stored; `None` if it has nothing of it.
    pub(super) fn reads_as_stored(&self, param: usize) -> Option<bool> {
        match self {
            Form::Param { number, .. } => (*number == param).then_some(true),
            Form::Pages { pool, .. } => (*pool == param).then_some(true),
            Form::Renamed { leaf, .. } | Form::Sliced { leaf, .. } | Form::Split { leaf, .. } => {
                leaf.reads_as_stored(param)
            }
            Form::Computed(computed) => {
                let body = &computed.0.body;
                let value = body.params[param];
                let read = body.body.iter().any(|inst| inst.args.contains(&value));
                read.then(|| reads_as_stored(body, value))
            }
        }
    }

    /// Whether something is computed at extents of some axes.
    pub(super) fn hangs_on(&self, is: &dyn Fn(AxisId) -> bool) -> bool {
        match self {
            Form::Param { .. } | Form::Pages { .. } => false,
            Form::Renamed { leaf, .. } | Form::Sliced { leaf, .. } | Form::Split { leaf, .. } => {
                leaf.hangs_on(is)
            }
            Form::Computed(computed) => {
                let body = &computed.0.body;
                let values = body.body.iter().flat_map(|inst| inst.args.iter().chain(&inst.results));
                values.flat_map(|&v| &body.ty(v).axes).any(|&a| is(a))
            }
        }
    }

    /// The leaf in a launch.
    pub(super) fn leaf<'a>(
        &self,
        kernel: &Kernel,
        inputs: &[Option<View<'a>>],
        extents: &[usize],
        spare: &mut Spare,
    ) -> Result<Leaf<'a>, DeviceError> {
        let missing = || fail(kernel, "an input is missing");
        match self {
            Form::Param { number, axes } => {
                let data = Held::View(inputs[*number].ok_or_else(missing)?);
                let steps = strides(axes, extents);
                Ok(Leaf { data, offset: 0, axes: axes.clone(), steps, pages: None })
            }
            Form::Pages { pool, table, read } => {
                let pool = inputs[*pool].ok_or_else(missing)?;
                let Some(View::I(table)) = inputs[*table] else { return Err(missing()) };
                read.leaf(kernel, pool, table, extents)
            }
            Form::Renamed { leaf, from, to } => {
                Ok(renamed(leaf.leaf(kernel, inputs, extents, spare)?, *from, *to))
            }
            Form::Sliced { leaf, axis, into, start } => {
                let mut leaf = leaf.leaf(kernel, inputs, extents, spare)?;
                leaf.offset += start * step(*axis, &leaf.axes, &leaf.steps);
                Ok(renamed(leaf, *axis, *into))
            }
            Form::Split { leaf, axis, into } => {
                let mut leaf = leaf.leaf(kernel, inputs, extents, spare)?;
                (leaf.axes, leaf.steps) = split(&leaf.axes, &leaf.steps, *axis, into, extents);
                Ok(leaf)
            }
            Form::Computed(computed) => {
                let (part, machine) = &**computed;
                let ty = part.output();
                let mut lane = spare.take(ty.dtype.is_float(), elements(ty, extents))?;
                machine.run(part, inputs, lane.view_mut(), extents)?;
                let (axes, steps) = (ty.axes[..].into(), strides(&ty.axes, extents));
                Ok(Leaf { data: Held::Own(lane), offset: 0, axes, steps, pages: None })
            }
        }
    }
}

/// A leaf of which an axis is another one.
fn renamed(mut leaf: Leaf<'_>, from: AxisId, to: AxisId) -> Leaf<'_> {
    leaf.axes.iter_mut().filter(|a| **a == from).for_each(|a| *a = to);
    leaf
}

/// The number of a parameter.
fn number(kernel: &Kernel, v: ValueId) -> Result<usize, DeviceError> {
    let found = kernel.body.params.iter().position(|p| *p == v);
    found.ok_or_else(|| fail(kernel, "an input is missing"))
}

/// Pages of fewer positions are not worth a tile each.
const PAGE: usize = 16;

/// A leaf that lies in pages of a pool that is a parameter: each tile of it is in one.
fn paged((kernel, plan): (&Kernel, &StreamPlan), inst: &Inst) -> Result<Option<Form>, DeviceError> {
    let body = &kernel.body;
    let Some(read) = Read::of(body, inst) else { return Ok(None) };
    let of_table: Axes = body.ty(read.slots.table).axes[..].into();
    let sequences: Axes = of_table.iter().copied().filter(|a| *a != read.slots.pages).collect();
    let page = read.slots.page as usize;
    let is_param = |v: ValueId| body.params.contains(&v);
    if read.along != plan.along
        || page < PAGE
        || !sequences.iter().all(|a| plan.batch.contains(a))
        || !is_param(read.pool)
        || !is_param(read.slots.table)
    {
        return Ok(None);
    }
    let (pool, table) = (number(kernel, read.pool)?, number(kernel, read.slots.table)?);
    let axes = body.ty(read.pool).axes[..].into();
    let read = Box::new(Paged { read, axes, of_table, sequences, page });
    Ok(Some(Form::Pages { pool, table, read }))
}

impl Paged {
    /// The leaf in a launch. The table must name pages that there are, and enough of them.
    fn leaf<'a>(
        &self,
        kernel: &Kernel,
        pool: View<'a>,
        table: &'a [i32],
        extents: &[usize],
    ) -> Result<Leaf<'a>, DeviceError> {
        let Paged { read: Read { slot, slots, along, .. }, axes, of_table, sequences, page } = self;
        let extent = |a: AxisId| extents[a.0 as usize];
        let (positions, there) = (extent(*along), extent(slots.pages) * page);
        if positions > there {
            let why = format!("{positions} positions are read, the table has pages for {there}");
            return Err(fail(kernel, &why));
        }
        let count: usize = of_table.iter().map(|&a| extent(a)).product();
        let places = extent(*slot) / page;
        let there = |place: &i32| usize::try_from(*place).is_ok_and(|n| n < places);
        if let Some(&place) = table[..count].iter().find(|place| !there(place)) {
            return Err(DeviceError::Index {
                kernel: kernel.name.clone(),
                index: place.into(),
                size: places,
            });
        }
        let steps = strides(axes, extents);
        let axes = axes.iter().map(|a| if a == slot { *along } else { *a }).collect();
        let table_steps = strides(of_table, extents);
        let step_of = |a: AxisId| step(a, of_table, &table_steps);
        let pages = Pages {
            table,
            axes: sequences.clone(),
            steps: sequences.iter().map(|&a| step_of(a)).collect(),
            next: step_of(slots.pages),
            along: *along,
            page: *page,
        };
        Ok(Leaf { data: Held::View(pool), offset: 0, axes, steps, pages: Some(pages) })
    }
}
