//! Map kernels on the CPU: a vector machine.
//!
//! A launch is compiled to a list of vector instructions (microseconds), then run for each point of some *outer* axes, many
//! points side by side. What remains of a value when the outer axes are fixed is its *row*: a dense
//! vector in a lane of the thread. An instruction makes one row from others by walking strided loops.

use std::ops::Range;

use latentc_ir::{AxisId, DType, Fields, Function, Inst, Op, ValueId};
use rayon::prelude::*;
use smallvec::SmallVec;

use super::spare::{Own, Takes};
use super::vector::{Fault, What};
use super::walk::{Nest, index, offset, step};
use super::{Out, Shared, View, ViewMut};
use crate::device::DeviceError;
use crate::map::{MapPlan, Steps, moved_axes, strides};
use crate::program::Kernel;

/// Rows of about this many elements keep lanes in the cache and the cost of an instruction's start small.
const ROW: usize = 1024;

/// Below this many elements a launch is not worth a second thread.
const SMALL: usize = 1 << 14;

/// What a lane must hold.
struct LaneType {
    float: bool,
    len: usize,
}

/// Where an operand's row begins: in a lane, or in an input at an offset that the outer point decides.
struct Source {
    place: Place,
    /// The step along each outer axis.
    outer: Vec<usize>,
}

#[derive(Clone, Copy)]
enum Place {
    Lane(usize),
    Input(usize),
}

/// One vector instruction: what to do, from where, into which lane.
struct Instr {
    what: What,
    args: Vec<Source>,
    lane: usize,
}

/// A map kernel at some sizes, as instructions.
pub(super) struct Machine {
    /// The extents of the outer axes.
    outer: Vec<usize>,
    /// How many points they have; none if there is nothing to write.
    points: usize,
    /// What the result takes the place of.
    replaced: Option<Replaced>,
    instrs: Vec<Instr>,
    lanes: Vec<LaneType>,
    /// Elements per outer point, over all instructions.
    work: usize,
    store: Store,
}

/// A parameter that lies where the output does: each row of it goes to a lane before anything is written in its place.
struct Replaced {
    lane: usize,
    /// The step along each outer axis.
    outer: Vec<usize>,
    /// The loops of lane and output.
    nest: Nest<2>,
}

/// How the last row goes to the output.
struct Store {
    source: Source,
    outer: Vec<usize>,
    nest: Nest<2>,
    /// The lane of the result and its length, if its row lies in the output as it does in the lane: it is made there, unless the output holds
    /// elements of fewer bits.
    direct: Option<(usize, usize)>,
    /// Of an append.
    positions: Option<Positions>,
}

/// Where an append puts rows.
struct Positions {
    source: Source,
    /// The loops over positions, rows and output.
    rows: Nest<3>,
    /// The cache's axis of positions and the step along it. Its extent may be another in each run.
    axis: AxisId,
    step: usize,
}

impl Machine {
    /// The instructions of a kernel. `extents` are those of the body's axes, and `replaced` the number of the parameter whose place the
    /// result takes: one that may be [in place](crate::memory::in_place).
    pub(super) fn compile(
        kernel: &Kernel,
        extents: &[usize],
        replaced: Option<usize>,
    ) -> Result<Self, DeviceError> {
        let body = &kernel.body;
        let outer = outer_axes(body, extents);
        let mut m = Compiler {
            body,
            extents,
            outer: &outer,
            lanes: Vec::new(),
            lane_of: vec![None; body.values.len()],
            work: 0,
        };
        let replaced = replaced.map(|n| m.replaced(body.params[n]));
        let mut instrs = Vec::new();
        let (last, rest) = body.body.split_last().ok_or_else(|| fail(kernel, "the body is empty"))?;
        for inst in rest {
            m.instruction(inst, &mut instrs).map_err(|why| fail(kernel, &why))?;
        }
        let store = if let Op::Append { from, to } = last.op {
            m.append(last, from, to)
        } else {
            m.instruction(last, &mut instrs).map_err(|why| fail(kernel, &why))?;
            m.store(last.result())
        };
        let (lanes, work) = (m.lanes, m.work.max(1));
        let empty = MapPlan::of(body).domain.iter().any(|a| extents[a.0 as usize] == 0);
        let outer: Vec<_> = outer.iter().map(|a| extents[a.0 as usize]).collect();
        let points = if empty { 0 } else { outer.iter().product() };
        Ok(Machine { outer, points, replaced, instrs, lanes, work, store })
    }

    /// What it takes of each thread's.
    pub(super) fn takes(&self, takes: &mut Takes) {
        self.lanes.iter().enumerate().for_each(|(n, lane)| takes.lane(n, lane.len));
        self.instrs.iter().for_each(|instr| takes.row(instr.what.row()));
    }

    /// Computes the kernel that these are the instructions of. `extents` are those of the body's axes: as before, but that of an axis that is
    /// appended to.
    pub(super) fn run(
        &self,
        kernel: &Kernel,
        inputs: &[Option<View<'_>>],
        output: ViewMut<'_>,
        extents: &[usize],
    ) -> Result<(), DeviceError> {
        let out = Out::from(output);
        let direct = self.store.direct.filter(|_| out.is_wide());
        let from = (kernel, inputs, extents);
        let rows = |points: Range<usize>| {
            Own::with(self.lanes.len(), |own| {
                for (n, lane) in self.lanes.iter().enumerate() {
                    let in_place = direct.is_some_and(|(direct, _)| direct == n);
                    own.lanes[n].fit(lane.float, if in_place { 0 } else { lane.len });
                }
                points.into_iter().try_for_each(|p| self.point(from, p, own, (out, direct)))
            })
        };
        if self.points * self.work < SMALL {
            return rows(0..self.points);
        }
        let chunk = (SMALL / self.work).clamp(1, 1 << 16);
        let chunks = (0..self.points.div_ceil(chunk)).into_par_iter();
        chunks.try_for_each(|c| rows(c * chunk..self.points.min((c + 1) * chunk)))
    }

    /// Computes the rows of one outer point.
    fn point(
        &self,
        (kernel, inputs, extents): (&Kernel, &[Option<View<'_>>], &[usize]),
        point: usize,
        Own { lanes, room, .. }: &mut Own,
        (out, direct): (Out, Option<(usize, usize)>),
    ) -> Result<(), DeviceError> {
        let at = |steps: &[usize]| offset(point, &self.outer, steps);
        let s = &self.store;
        let base = at(&s.outer);
        if let Some(Replaced { lane, outer, nest }) = &self.replaced {
            let base = at(outer);
            // SAFETY: `fit` made sure that the output holds all indices of its type, which the parameter's are. Those of this point's
            // row are written by this point alone, and later.
            nest.each(|[to, from], n, steps| unsafe {
                match (lanes[*lane].view_mut(), out) {
                    (ViewMut::F(x), Out::F(y)) => gather(x, to, y, base + from, n, steps),
                    (ViewMut::I(x), Out::I(y)) => gather(x, to, y, base + from, n, steps),
                    // An operand and what takes its place are held alike, as they are computed with.
                    (_, Out::F(_) | Out::Bf16(_) | Out::F16(_) | Out::I(_)) => {}
                }
            });
        }
        for instr in &self.instrs {
            // The result's lane is taken out, so that the others can be read meanwhile; no instruction reads what it writes.
            let mut lane = std::mem::take(&mut lanes[instr.lane]);
            let done = {
                let result = match (out, direct) {
                    // SAFETY: `fit` made sure that the output holds all indices of its type, and this point's row is a block of
                    // it that no other point's has anything of.
                    (Out::F(y), Some((lane, len))) if lane == instr.lane => {
                        ViewMut::F(unsafe { std::slice::from_raw_parts_mut(y.get().add(base), len) })
                    }
                    // SAFETY: as above.
                    (Out::I(y), Some((lane, len))) if lane == instr.lane => {
                        ViewMut::I(unsafe { std::slice::from_raw_parts_mut(y.get().add(base), len) })
                    }
                    _ => lane.view_mut(),
                };
                let arg = |n: usize| -> View<'_> {
                    let source = &instr.args[n];
                    let start = at(&source.outer);
                    match source.place {
                        Place::Lane(l) => lanes[l].view(),
                        Place::Input(i) => tail(inputs[i], start),
                    }
                };
                instr.what.run(&arg, result, &|axis| index(point, &self.outer, axis), room)
            };
            lanes[instr.lane] = lane;
            done.map_err(|e| fault(kernel, e))?;
        }
        if direct.is_some() {
            return Ok(());
        }
        let view = |source: &Source| match source.place {
            Place::Lane(l) => lanes[l].view(),
            Place::Input(i) => tail(inputs[i], at(&source.outer)),
        };
        let row = view(&s.source);
        // SAFETY for the writes below: `fit` made sure that the output holds all indices of its type; distinct outer points and
        // row indices have distinct offsets there, since each axis of the output is either outer or in the row. For an append,
        // two tokens with equal positions in one row of the batch would meet; the runtime gives each its own.
        let write = |to: usize, from: usize, n: usize, steps: [usize; 2]| unsafe {
            out.put(base + to, row, from, n, steps);
        };
        match &s.positions {
            None => s.nest.each(|[to, from], n, steps| write(to, from, n, steps)),
            Some(Positions { source, rows, axis, step }) => {
                let extent = extents[axis.0 as usize];
                let View::I(pos) = view(source) else {
                    return Err(fail(kernel, "positions are integers"));
                };
                let mut fault = None;
                rows.each(|[p, from, to], n, steps| {
                    for i in 0..n {
                        let position = pos[p + i * steps[0]];
                        if position < 0 || position as usize >= extent {
                            fault = Some(i64::from(position));
                            continue;
                        }
                        let (from, to) = (from + i * steps[1], to + i * steps[2] + position as usize * step);
                        s.nest.each(|[t, f], n, steps| write(to + t, from + f, n, steps));
                    }
                });
                if let Some(index) = fault {
                    return Err(DeviceError::Index { kernel: kernel.name.clone(), index, size: extent });
                }
            }
        }
        Ok(())
    }
}

/// Whether the instructions of a map read a parameter as it is stored: those that look rows up.
pub(super) fn reads_as_stored(body: &Function, param: ValueId) -> bool {
    body.body.iter().all(|inst| {
        let reads = |(n, &a): (usize, &ValueId)| a != param || n == 0 && matches!(inst.op, Op::Gather { .. });
        inst.args.iter().enumerate().all(reads)
    })
}

/// What a fault is to the caller of a kernel.
pub(super) fn fault(kernel: &Kernel, fault: Fault) -> DeviceError {
    match fault {
        Fault::Index(index, size) => DeviceError::Index { kernel: kernel.name.clone(), index, size },
        Fault::Kind => fail(kernel, "an operand is of another kind than its type says"),
    }
}

/// An input from an element on; empty if there is none.
fn tail(view: Option<View<'_>>, start: usize) -> View<'_> {
    view.map_or(View::F(&[]), |view| view.tail(start))
}

/// An error about a kernel.
pub(super) fn fail(kernel: &Kernel, why: &str) -> DeviceError {
    DeviceError::Kernel { kernel: kernel.name.clone(), why: why.to_owned() }
}

/// Reads `n` elements of `y`, both at some steps.
///
/// # Safety
/// `y` must hold every index that is read, and no one else may write to them meanwhile.
unsafe fn gather<T: Copy>(x: &mut [T], to: usize, y: Shared<T>, from: usize, n: usize, steps: [usize; 2]) {
    if steps == [1, 1] {
        // SAFETY: by the caller. A lane is a thread's own.
        return x[to..to + n].copy_from_slice(unsafe { std::slice::from_raw_parts(y.get().add(from), n) });
    }
    for i in 0..n {
        // SAFETY: by the caller.
        x[to + i * steps[0]] = unsafe { y.get().add(from + i * steps[1]).read() };
    }
}

/// The axes to walk one by one. With reductions they number the rows; without, they are the leading axes of the domain, as many as
/// leave rows of a good length. An axis that some op reads at another place than the one it writes stays in the row.
fn outer_axes(body: &Function, extents: &[usize]) -> Vec<AxisId> {
    let plan = MapPlan::of(body);
    if let Some(rows) = plan.rows
        && body.body.iter().any(|inst| matches!(inst.op, Op::Reduce { .. }))
    {
        return rows;
    }
    let moved: Vec<_> = body.body.iter().flat_map(|inst| moved_axes(body, inst)).collect();
    let mut row = 1;
    let mut outer: Vec<_> = Vec::new();
    for a in plan.domain.iter().rev() {
        if row < ROW || moved.contains(a) {
            row *= extents[a.0 as usize].max(1);
        } else {
            outer.insert(0, *a);
        }
    }
    outer
}

struct Compiler<'a> {
    body: &'a Function,
    extents: &'a [usize],
    outer: &'a [AxisId],
    lanes: Vec<LaneType>,
    lane_of: Vec<Option<usize>>,
    work: usize,
}

impl Compiler<'_> {
    fn extent(&self, a: AxisId) -> usize {
        self.extents[a.0 as usize]
    }

    /// The axes of a value's row, in the order of its type.
    fn row(&self, v: ValueId) -> Vec<AxisId> {
        self.body.ty(v).axes.iter().copied().filter(|a| !self.outer.contains(a)).collect()
    }

    /// Where a value's row is, its axes, and the steps along them.
    fn source(&self, v: ValueId) -> (Source, Vec<AxisId>, Steps) {
        let axes = &self.body.ty(v).axes;
        match self.lane_of[v.0 as usize] {
            Some(lane) => {
                let row = self.row(v);
                let steps = strides(&row, self.extents);
                (Source { place: Place::Lane(lane), outer: vec![0; self.outer.len()] }, row, steps)
            }
            None => {
                let n = self
                    .body
                    .params
                    .iter()
                    .position(|p| *p == v)
                    .expect("a value has a lane or is a parameter");
                let steps = strides(axes, self.extents);
                let outer = self.outer.iter().map(|&a| step(a, axes, &steps)).collect();
                (Source { place: Place::Input(n), outer }, axes.clone(), steps)
            }
        }
    }

    /// A lane for a parameter that lies where the output does.
    fn replaced(&mut self, v: ValueId) -> Replaced {
        let (Source { outer, .. }, axes, steps) = self.source(v);
        let (lane, row, row_steps) = self.new_lane(v);
        Replaced { lane, outer, nest: self.nest(&row, [(&row, &row_steps), (&axes, &steps)]) }
    }

    fn new_lane(&mut self, v: ValueId) -> (usize, Vec<AxisId>, Steps) {
        let row = self.row(v);
        let len = row.iter().map(|&a| self.extent(a)).product();
        self.work += len;
        self.lanes.push(LaneType { float: self.body.ty(v).dtype.is_float(), len });
        let lane = self.lanes.len() - 1;
        self.lane_of[v.0 as usize] = Some(lane);
        let steps = strides(&row, self.extents);
        (lane, row, steps)
    }

    fn nest<const N: usize>(&self, axes: &[AxisId], tensors: [Strided<'_>; N]) -> Nest<N> {
        nest(self.extents, axes, tensors)
    }

    fn instruction(&mut self, inst: &Inst, instrs: &mut Vec<Instr>) -> Result<(), String> {
        let sources: Vec<_> = inst.args.iter().map(|&a| self.source(a)).collect();
        let (lane, row, steps) = self.new_lane(inst.result());
        let tensor = |n: usize| (&sources[n].1[..], &sources[n].2[..]);
        let result = (&row[..], &steps[..]);
        let mut many = Vec::new();
        let what = match &inst.op {
            Op::Const(_) | Op::Unary(_) | Op::Binary(_) | Op::Select | Op::Cast | Op::Broadcast { .. } => {
                let tensors: Vec<_> = (0..sources.len()).map(tensor).collect();
                elementwise(self.body, inst, self.extents, result, &tensors)?
            }
            Op::Position { axis } => match self.outer.iter().position(|a| a == axis) {
                Some(n) => What::OuterIndex(n),
                None => What::Iota(self.nest(&row, [result, (&[*axis], &[1])]), 0),
            },
            Op::Reduce { by, .. } => {
                self.work += sources[0]
                    .1
                    .iter()
                    .filter(|a| !self.outer.contains(a))
                    .map(|&a| self.extent(a))
                    .product::<usize>();
                let operand = self.row(inst.args[0]);
                What::Reduce(*by, self.nest(&operand, [result, tensor(0)]))
            }
            Op::Pack { axis } => {
                let operand = self.row(inst.args[0]);
                self.work += operand.iter().map(|&a| self.extent(a)).product::<usize>();
                let fields = Fields(self.extent(*axis) as u32);
                What::Pack(fields, self.nest(&operand, [result, tensor(0), (&[*axis], &[1])]))
            }
            Op::Unpack { axis } => {
                let fields = Fields(self.extent(*axis) as u32);
                What::Unpack(fields, self.nest(&row, [result, tensor(0), (&[*axis], &[1])]))
            }
            Op::Rename { from, to } => {
                let axes: Vec<_> = sources[0].1.iter().map(|a| if a == from { *to } else { *a }).collect();
                What::Copy { nest: self.nest(&row, [result, (&axes, &sources[0].2)]), into: 0, from: 0 }
            }
            Op::Split { axis, into } => {
                let (axes, steps) = split(&sources[0].1, &sources[0].2, *axis, into, self.extents);
                What::Copy { nest: self.nest(&row, [result, (&axes, &steps)]), into: 0, from: 0 }
            }
            Op::Merge { axes, into } => {
                let (to, to_steps) = split(&row, &steps, *into, axes, self.extents);
                What::Copy { nest: self.nest(&to, [(&to, &to_steps), tensor(0)]), into: 0, from: 0 }
            }
            Op::Slice { axis, into, start } => {
                let axes: Vec<_> = sources[0].1.iter().map(|a| if a == axis { *into } else { *a }).collect();
                let from = *start as usize * step(*axis, &sources[0].1, &sources[0].2);
                What::Copy { nest: self.nest(&row, [result, (&axes, &sources[0].2)]), into: 0, from }
            }
            Op::Concat { axes, into } => {
                let along = step(*into, &row, &steps);
                let mut start = 0;
                for (n, part) in axes.iter().enumerate() {
                    let to: Vec<_> = row.iter().map(|a| if a == into { *part } else { *a }).collect();
                    let nest = self.nest(&to, [(&to, &steps), tensor(n)]);
                    many.push((n, What::Copy { nest, into: start * along, from: 0 }));
                    start += self.extent(*part);
                }
                let mut sources: Vec<_> = sources.into_iter().map(|s| Some(s.0)).collect();
                for (n, what) in many {
                    let args = vec![sources[n].take().expect("each part is copied once")];
                    instrs.push(Instr { what, args, lane });
                }
                return Ok(());
            }
            Op::Gather { axis } => {
                // Axes that index and data share run together; the rest of the data is copied for each index.
                let indices = self.row(inst.args[1]);
                let rest: Vec<_> = row.iter().copied().filter(|a| !indices.contains(a)).collect();
                What::Gather {
                    indices: self.nest(&indices, [result, tensor(1), tensor(0)]),
                    rest: self.nest(&rest, [result, tensor(0)]),
                    step: step(*axis, &sources[0].1, &sources[0].2),
                    size: self.extent(*axis),
                }
            }
            Op::TopK { axis, k } => {
                let others: Vec<_> = row.iter().copied().filter(|a| a != axis).collect();
                What::TopK {
                    rows: self.nest(&others, [result, tensor(0)]),
                    n: self.extent(*axis),
                    steps: [step(*axis, &row, &steps), step(*axis, &sources[0].1, &sources[0].2)],
                    k: *k as usize,
                }
            }
            Op::TopIndices { axis, into } => {
                let others: Vec<_> = row.iter().copied().filter(|a| a != into).collect();
                What::TopIndices {
                    rows: self.nest(&others, [result, tensor(0)]),
                    n: self.extent(*axis),
                    steps: [step(*into, &row, &steps), step(*axis, &sources[0].1, &sources[0].2)],
                    k: self.extent(*into),
                }
            }
            Op::Rope { axis, pairs } => {
                let others: Vec<_> = row.iter().copied().filter(|a| a != axis).collect();
                What::Rope {
                    rows: self.nest(&others, [result, tensor(0), tensor(1)]),
                    n: self.extent(*axis),
                    steps: [step(*axis, &row, &steps), step(*axis, &sources[0].1, &sources[0].2)],
                    pairs: *pairs,
                }
            }
            Op::Contract
            | Op::ScatterAdd { .. }
            | Op::Past { .. }
            | Op::Append { .. }
            | Op::Softmax { .. }
            | Op::RmsNorm { .. }
            | Op::Call { .. } => {
                return Err(format!("`{}` has no place in a map", inst.op.mnemonic()));
            }
        };
        let args = sources.into_iter().map(|s| s.0).collect();
        instrs.push(Instr { what, args, lane });
        Ok(())
    }

    fn store(&mut self, v: ValueId) -> Store {
        let (source, axes, steps) = self.source(v);
        let out = &self.body.ty(v).axes;
        let out_steps = strides(out, self.extents);
        let row = self.row(v);
        let nest = self.nest(&row, [(out, &out_steps), (&axes, &steps)]);
        let direct = match (source.place, nest.only()) {
            (Place::Lane(lane), Some((len, [1, 1]))) if len == self.lanes[lane].len => Some((lane, len)),
            (Place::Lane(_) | Place::Input(_), _) => None,
        };
        let outer = self.outer.iter().map(|&a| step(a, out, &out_steps)).collect();
        Store { source, outer, nest, direct, positions: None }
    }

    fn append(&mut self, inst: &Inst, from: AxisId, to: AxisId) -> Store {
        let (source, axes, steps) = self.source(inst.args[1]);
        let (pos, pos_axes, pos_steps) = self.source(inst.args[2]);
        let out = &self.body.ty(inst.result()).axes;
        let out_steps = strides(out, self.extents);
        let row = self.row(inst.args[1]);
        // The token's own axis has no step in the cache: its position does.
        let place: Vec<_> = out_steps.iter().zip(out).map(|(&s, a)| if *a == to { 0 } else { s }).collect();
        let mut indices = self.row(inst.args[2]);
        if row.contains(&from) && !indices.contains(&from) {
            indices.push(from);
        }
        let rest: Vec<_> = row.iter().copied().filter(|a| !indices.contains(a)).collect();
        let rows = self.nest(&indices, [(&pos_axes, &pos_steps), (&axes, &steps), (out, &place)]);
        self.work += row.iter().map(|&a| self.extent(a)).product::<usize>();
        Store {
            source,
            outer: self.outer.iter().map(|&a| step(a, out, &place)).collect(),
            nest: self.nest(&rest, [(out, &place), (&axes, &steps)]),
            direct: None,
            positions: Some(Positions { source: pos, rows, axis: to, step: step(to, out, &out_steps) }),
        }
    }
}

/// Axes of a tensor, of which few have more.
pub(super) type Axes = SmallVec<[AxisId; 6]>;

/// A tensor's axes and the steps along them.
pub(super) type Strided<'a> = (&'a [AxisId], &'a [usize]);

/// The loops over `axes` for some tensors.
pub(super) fn nest<const N: usize>(extents: &[usize], axes: &[AxisId], tensors: [Strided<'_>; N]) -> Nest<N> {
    Nest::new(
        axes.iter().map(|&a| (extents[a.0 as usize], tensors.map(|(axes, steps)| step(a, axes, steps)))),
    )
}

/// What makes a result from operands at the same place. Positions are not among it: they depend on where one is.
///
/// # Errors
/// If the op is another.
pub(super) fn elementwise(
    body: &Function,
    inst: &Inst,
    extents: &[usize],
    result: Strided<'_>,
    operands: &[Strided<'_>],
) -> Result<What, String> {
    let row = result.0;
    Ok(match (&inst.op, operands) {
        (Op::Const(values), []) => match values[..] {
            [x] => What::Fill(x.0),
            _ => return Err("a table must be stored".to_owned()),
        },
        (Op::Unary(u), [x]) => What::Unary(*u, nest(extents, row, [result, *x])),
        (Op::Binary(b), [x, y]) => What::Binary(*b, nest(extents, row, [result, *x, *y])),
        (Op::Select, [c, x, y]) => What::Select(nest(extents, row, [result, *c, *x, *y])),
        (Op::Cast, [x]) if body.ty(inst.result()).dtype == DType::Bool => {
            What::Truth(nest(extents, row, [result, *x]))
        }
        (Op::Cast | Op::Broadcast { .. }, [x]) => {
            What::Copy { nest: nest(extents, row, [result, *x]), into: 0, from: 0 }
        }
        (op, _) => return Err(format!("`{}` is not elementwise", op.mnemonic())),
    })
}

/// The axes and steps of a tensor when one of its axes is seen as several.
pub(super) fn split(
    axes: &[AxisId],
    steps: &[usize],
    axis: AxisId,
    into: &[AxisId],
    extents: &[usize],
) -> (Axes, Steps) {
    let (mut new_axes, mut new_steps) = (Axes::new(), Steps::new());
    for (&a, &s) in axes.iter().zip(steps) {
        if a == axis {
            for (&part, inner) in into.iter().zip(strides(into, extents)) {
                new_axes.push(part);
                new_steps.push(s * inner);
            }
        } else {
            new_axes.push(a);
            new_steps.push(s);
        }
    }
    (new_axes, new_steps)
}
