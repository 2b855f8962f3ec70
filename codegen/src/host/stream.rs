//! Streamed folds on the CPU: tiles of rows by streamed positions, all products of a tile as [`multiply`] does them.
//!
//! What lies in pages of a pool is read there, page by page: a tile has positions of one page.
//!
//! Leaves that are no views of a parameter are computed whole, once a launch. What lies above them, up to the scores, is computed
//! tile by tile and gone with it. Threads share out batch and rows; if there are fewer of these than threads, also the
//! streamed axis, whose parts are merged in order.

use std::borrow::Cow;

use gemm::Parallelism;
use latentc_ir::{AxisId, DType, Function, Inst, Op, Reduce, ValueId};
use rayon::prelude::*;

use super::contract::Product;
use super::few::{Dense, Matrix, Rows};
use super::map::{self, elementwise, fail, fault, nest, scatter, split, tail};
use super::multiply::{Way, are_halves, multiply};
use super::simd::exp;
use super::vector::{Lane, What, exponentials, folded};
use super::walk::{Loop, merge, offset, place, step, take_longest, turns};
use super::{Buffer, Shared, View, ViewMut};
use crate::device::DeviceError;
use crate::map::strides;
use crate::program::{Kernel, KernelKind};
use crate::stream::{Monoid, Read, StreamPlan, cone, defined, is_elementwise};

/// Rows of a tile, at most.
const ROWS: usize = 128;
/// Scores of a tile, about: a few tiles of f32 lie in a core's cache.
const SCORES: usize = 1 << 14;
/// Elements of a tile's values, about: what scores are made of often lies there too, and is read again, by a few rows after the others
/// and for the values, which a core's cache is for.
const VALUES: usize = 1 << 17;
/// Streamed positions of a tile, at least.
const POSITIONS: usize = 128;
/// Below this many multiply-adds a launch is not worth a second thread.
const SMALL: usize = 1 << 15;

/// Runs a streamed fold. `extents` are those of the body's axes.
pub(super) fn run(
    kernel: &Kernel,
    inputs: &[Option<View<'_>>],
    output: ViewMut<'_>,
    extents: &[usize],
) -> Result<(), DeviceError> {
    let out = match output {
        ViewMut::F(v) => Out::F(Shared(v.as_mut_ptr())),
        ViewMut::I(v) => Out::I(Shared(v.as_mut_ptr())),
    };
    let mut s = Stream::new(kernel, inputs, extents, out)?;
    let size = |axes: &[AxisId]| axes.iter().map(|a| extents[a.0 as usize]).product::<usize>();
    let (batch, rows, columns) = (size(&s.plan.batch), size(&s.plan.m), size(&s.plan.n));
    if batch * rows * columns == 0 {
        return Ok(());
    }
    let positions = extents[s.plan.along.0 as usize];
    let units = batch * s.rows.iter().map(|r| r.1).product::<usize>();
    let threads = rayon::current_num_threads();
    if units < threads {
        // Each thread has a tile at least, as in decode, where few rows would fill one with all positions.
        let most = positions.div_ceil(threads.div_ceil(units));
        s.positions = s.fit(most.max(POSITIONS));
    }
    let tiles = positions.div_ceil(s.positions);
    if batch * rows * positions * columns < SMALL {
        return (0..units).try_for_each(|u| s.finish(u, s.part(u, 0..tiles)?));
    }
    if units >= threads || tiles < 2 {
        return (0..units).into_par_iter().try_for_each(|u| s.finish(u, s.part(u, 0..tiles)?));
    }
    let parts = tiles.min(threads.div_ceil(units));
    let from = |p: usize| p * tiles / parts;
    let states: Result<Vec<_>, _> = (0..units * parts)
        .into_par_iter()
        .map(|n| s.part(n / parts, from(n % parts)..from(n % parts + 1)))
        .collect();
    let mut states = states?.into_iter();
    for unit in 0..units {
        let mut of_unit = states.by_ref().take(parts);
        let first = of_unit.next().expect("each unit has a part");
        s.finish(unit, of_unit.fold(first, State::merge))?;
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Out {
    F(Shared<f32>),
    I(Shared<i32>),
}

/// What is known of some positions for each row.
struct State {
    by: Monoid,
    /// The largest score, but no less than the least float. Of a softmax; else it stays as it is.
    max: Vec<f32>,
    /// The sum of exponentials of scores less the maximum. Of a softmax.
    sum: Vec<f32>,
    /// The values times these exponentials, or weights, added up; or the largest weights. Rows of all of `n`.
    acc: Vec<f32>,
}

impl State {
    fn new(by: Monoid, rows: usize, columns: usize) -> State {
        let nothing = if by == Monoid::Max { f32::NEG_INFINITY } else { 0.0 };
        State { by, max: vec![f32::MIN; rows], sum: vec![0.0; rows], acc: vec![nothing; rows * columns] }
    }

    /// Both together.
    fn merge(mut self, other: State) -> State {
        let both = self.acc.iter_mut().zip(&other.acc);
        match self.by {
            Monoid::Softmax => {}
            Monoid::Sum => {
                both.for_each(|(a, b)| *a += b);
                return self;
            }
            Monoid::Max => {
                both.for_each(|(a, b)| *a = a.max(*b));
                return self;
            }
        }
        let columns = self.acc.len() / self.max.len().max(1);
        for r in 0..self.max.len() {
            let max = self.max[r].max(other.max[r]);
            let (mine, theirs) = (exp(self.max[r] - max), exp(other.max[r] - max));
            self.max[r] = max;
            self.sum[r] = self.sum[r] * mine + other.sum[r] * theirs;
            let row = r * columns..(r + 1) * columns;
            for (a, b) in self.acc[row.clone()].iter_mut().zip(&other.acc[row]) {
                *a = *a * mine + b * theirs;
            }
        }
        self
    }
}

/// Where a leaf's elements are.
struct Leaf<'a> {
    data: Held<'a>,
    offset: usize,
    axes: Vec<AxisId>,
    steps: Vec<usize>,
    /// Where positions of the streamed axis lie, if it is not one behind the other.
    pages: Option<Pages<'a>>,
}

/// The table of pages that a leaf lies in.
#[derive(Clone)]
struct Pages<'a> {
    table: &'a [i32],
    axes: Vec<AxisId>,
    steps: Vec<usize>,
    /// The step from one page to the next.
    next: usize,
    /// The streamed axis.
    along: AxisId,
    /// Positions of a page.
    page: usize,
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

enum Held<'a> {
    View(View<'a>),
    Own(Buffer),
}

/// A launch.
struct Stream<'a> {
    kernel: &'a Kernel,
    body: &'a Function,
    plan: StreamPlan,
    extents: &'a [usize],
    leaves: Vec<Option<Leaf<'a>>>,
    /// What is computed in each tile, in order: first what the mask needs, then the scores.
    mask: Vec<&'a Inst>,
    scores: Vec<&'a Inst>,
    /// What is computed of the product.
    epilogue: Vec<&'a Inst>,
    /// For each axis of `m`, the extent of a tile and the number of tiles.
    rows: Vec<(usize, usize)>,
    /// Positions of a tile.
    positions: usize,
    /// Positions of a page, if leaves lie in pages: each tile is in one.
    page: Option<usize>,
    /// Whether weights and values are of [type](are_halves) bf16.
    halves: bool,
    out: Out,
}

/// Parts of all axes, and the values there.
struct Tile {
    from: Vec<usize>,
    extents: Vec<usize>,
    lanes: Vec<Option<Lane>>,
}

impl<'a> Stream<'a> {
    fn new(
        kernel: &'a Kernel,
        inputs: &[Option<View<'a>>],
        extents: &'a [usize],
        out: Out,
    ) -> Result<Stream<'a>, DeviceError> {
        let body = &kernel.body;
        let plan = StreamPlan::of(body).map_err(|why| fail(kernel, &why))?;
        let result = body.results[0];
        // The values above the leaves; the product is made by hand.
        let above = |root: ValueId, through: &dyn Fn(&Op) -> bool| {
            let values = cone(body, root, through);
            let made = values.into_iter().filter_map(|v| defined(body, v));
            made.filter(|i| through(&i.op)).collect::<Vec<_>>()
        };
        let scored = |op: &Op| is_elementwise(op) || *op == Op::Contract;
        let mask = plan.mask.map_or(vec![], |m| above(m, &is_elementwise));
        let mut scores = above(plan.scores, &scored);
        scores.retain(|i| !mask.contains(i));
        let epilogue = above(result, &is_elementwise);
        let halves = defined(body, plan.product).is_some_and(|fold| are_halves(body, &fold.args));
        let mut s = Stream {
            kernel,
            body,
            plan,
            extents,
            leaves: (0..body.values.len()).map(|_| None).collect(),
            mask,
            scores,
            epilogue,
            rows: Vec::new(),
            positions: usize::MAX,
            page: None,
            halves,
            out,
        };
        let used = [&s.mask, &s.scores, &s.epilogue].into_iter().flatten().flat_map(|i| &i.args);
        let made = |v: ValueId| {
            let mut all = [&s.mask, &s.scores, &s.epilogue].into_iter().flatten();
            v == s.plan.product || all.any(|i| i.result() == v)
        };
        let roots = [s.plan.values, Some(s.plan.scores), s.plan.mask, Some(result)];
        let leaves: Vec<_> = used.copied().chain(roots.into_iter().flatten()).filter(|&v| !made(v)).collect();
        for v in leaves {
            if s.leaves[v.0 as usize].is_none() {
                let leaf = leaf((kernel, &s.plan), inputs, extents, v)?;
                s.page = leaf.pages.as_ref().map(|p| p.page).or(s.page);
                s.leaves[v.0 as usize] = Some(leaf);
            }
        }
        let mut left = ROWS;
        for &a in s.plan.m.iter().rev() {
            let extent = extents[a.0 as usize].max(1);
            let tiles = extent.div_ceil(left.max(1));
            let each = extent.div_ceil(tiles);
            s.rows.insert(0, (each, extent.div_ceil(each)));
            left = if tiles > 1 { 1 } else { left / each };
        }
        let rows: usize = s.rows.iter().map(|r| r.0).product();
        let columns: usize = s.plan.n.iter().map(|&a| extents[a.0 as usize]).product();
        s.positions = s.fit((SCORES / rows).min(VALUES / columns.max(1)).max(POSITIONS));
        Ok(s)
    }

    /// Positions of a tile, no more than before: as many as wanted, or as pages have some of each.
    fn fit(&self, wanted: usize) -> usize {
        let wanted = wanted.min(self.positions);
        match self.page {
            Some(page) => page.min(1 << wanted.max(1).ilog2()),
            None => wanted,
        }
    }

    /// The tile of a unit, with all of the streamed axis.
    fn tile(&self, unit: usize) -> Tile {
        let (mut from, mut extents) = (vec![0; self.extents.len()], self.extents.to_vec());
        let mut rest = unit;
        for (&a, &(each, tiles)) in self.plan.m.iter().zip(&self.rows).rev() {
            let a = a.0 as usize;
            from[a] = rest % tiles * each;
            extents[a] = each.min(self.extents[a] - from[a]);
            rest /= tiles;
        }
        for &a in self.plan.batch.iter().rev() {
            let a = a.0 as usize;
            from[a] = rest % self.extents[a];
            extents[a] = 1;
            rest /= self.extents[a];
        }
        Tile { from, extents, lanes: (0..self.body.values.len()).map(|_| None).collect() }
    }

    /// What some tiles of the streamed axis come to for a unit.
    fn part(&self, unit: usize, tiles: std::ops::Range<usize>) -> Result<State, DeviceError> {
        let mut t = self.tile(unit);
        let size = |axes: &[AxisId]| axes.iter().map(|a| t.extents[a.0 as usize]).product::<usize>();
        let mut state = State::new(self.plan.by, size(&self.plan.m), size(&self.plan.n));
        let along = self.plan.along.0 as usize;
        let mut weights = vec![0.0; state.max.len() * self.positions];
        let mut first = true;
        for n in tiles {
            t.from[along] = n * self.positions;
            t.extents[along] = self.positions.min(self.extents[along] - t.from[along]);
            self.evaluate(&self.mask, &mut t, first)?;
            let hidden = self.plan.mask.is_some_and(|m| !self.any(m, &t));
            if !hidden {
                self.evaluate(&self.scores, &mut t, first)?;
                self.weigh(&t, &mut state, &mut weights)?;
                first = false;
            }
        }
        Ok(state)
    }

    /// Computes instructions of a tile; those that do not depend on the streamed axis only at first.
    fn evaluate(&self, instructions: &[&Inst], t: &mut Tile, first: bool) -> Result<(), DeviceError> {
        for inst in instructions {
            let ty = self.body.ty(inst.result());
            let done = t.lanes[inst.result().0 as usize].is_some();
            if done && !first && !ty.has(self.plan.along) {
                continue;
            }
            let steps = strides(&ty.axes, &t.extents);
            let len = ty.axes.iter().map(|a| t.extents[a.0 as usize]).product();
            let mut lane = t.lanes[inst.result().0 as usize].take();
            if lane.as_ref().is_none_or(|l| l.view().len() != len) {
                lane = Some(Lane::new(ty.dtype.is_float(), len));
            }
            let mut lane = lane.expect("just made");
            let args: Vec<_> = inst.args.iter().map(|&a| self.operand(a, t)).collect();
            let operands: Vec<_> = args.iter().map(|(_, axes, steps)| (*axes, &steps[..])).collect();
            let result = (&ty.axes[..], &steps[..]);
            if inst.op == Op::Contract {
                let (View::F(a), View::F(b), Lane::F(y)) = (args[0].0, args[1].0, &mut lane) else {
                    return Err(fail(self.kernel, "a contraction needs floats"));
                };
                let halves = are_halves(self.body, &inst.args);
                let product = Product::new(&t.extents, [operands[0], operands[1], result], halves);
                let (x, w) = if product.rows_of() == 0 { ((0, a), b) } else { ((1, b), a) };
                // SAFETY: leaves hold all indices of their types, and the tile lies within; `y` was made for it.
                unsafe { product.run(x, Dense(w.as_ptr()), Shared(y.as_mut_ptr()), false) };
            } else {
                let what = if let Op::Position { axis } = inst.op {
                    let index = (&[axis][..], &[1][..]);
                    What::Iota(nest(&t.extents, result.0, [result, index]), t.from[axis.0 as usize])
                } else {
                    elementwise(self.body, inst, &t.extents, result, &operands)
                        .map_err(|why| fail(self.kernel, &why))?
                };
                what.run(&|n| args[n].0, lane.view_mut(), &|_| 0).map_err(|e| fault(self.kernel, e))?;
            }
            t.lanes[inst.result().0 as usize] = Some(lane);
        }
        Ok(())
    }

    /// A value's elements in a tile, from its first one on, with axes and steps.
    fn operand<'t>(&'t self, v: ValueId, t: &'t Tile) -> (View<'t>, &'t [AxisId], Cow<'t, [usize]>) {
        if let Some(leaf) = &self.leaves[v.0 as usize] {
            let view = match &leaf.data {
                Held::View(view) => *view,
                Held::Own(buffer) => buffer.view(),
            };
            let along = leaf.pages.as_ref().map(|pages| (pages.along, pages.slot(&t.from)));
            let first = |a: &AxisId| match along {
                Some((along, slot)) if along == *a => slot,
                Some(_) | None => t.from[a.0 as usize],
            };
            let at = leaf.axes.iter().zip(&leaf.steps).map(|(a, s)| first(a) * s).sum::<usize>();
            return (tail(Some(view), leaf.offset + at), &leaf.axes, Cow::Borrowed(&leaf.steps));
        }
        let axes = &self.body.ty(v).axes;
        let lane = t.lanes[v.0 as usize].as_ref().expect("operands are leaves or come first");
        (lane.view(), axes, Cow::Owned(strides(axes, &t.extents)))
    }

    /// Whether a truth value is true anywhere in a tile.
    fn any(&self, v: ValueId, t: &Tile) -> bool {
        let (View::I(x), axes, steps) = self.operand(v, t) else { return true };
        let mut any = false;
        nest(&t.extents, axes, [(axes, &steps[..])]).each(|[at], n, [step]| {
            any = any || (0..n).any(|i| x[at + i * step] != 0);
        });
        any
    }

    /// Adds a tile of positions to what is known of earlier ones. `weights` is room for its weights.
    fn weigh(&self, t: &Tile, state: &mut State, weights: &mut [f32]) -> Result<(), DeviceError> {
        let (View::F(x), axes, steps) = self.operand(self.plan.scores, t) else {
            return Err(fail(self.kernel, "scores are floats"));
        };
        let count = t.extents[self.plan.along.0 as usize];
        let along = step(self.plan.along, axes, &steps);
        let m_extents: Vec<_> = self.plan.m.iter().map(|a| t.extents[a.0 as usize]).collect();
        let m_steps: Vec<_> = self.plan.m.iter().map(|&a| step(a, axes, &steps)).collect();
        let rows = state.max.len();
        let columns = state.acc.len() / rows;
        for (r, weights) in weights.chunks_exact_mut(count).take(rows).enumerate() {
            let from = offset(r, &m_extents, &m_steps);
            if along == 1 {
                weights.copy_from_slice(&x[from..from + count]);
            } else {
                weights.iter_mut().enumerate().for_each(|(j, w)| *w = x[from + j * along]);
            }
            if state.by != Monoid::Softmax {
                continue;
            }
            let old = state.max[r];
            let (max, sum) = exponentials(weights, old);
            let scale = exp(old - max);
            (state.max[r], state.sum[r]) = (max, state.sum[r] * scale + sum);
            if scale != 1.0 {
                state.acc[r * columns..][..columns].iter_mut().for_each(|a| *a *= scale);
            }
        }
        let Some(values) = self.plan.values else {
            for (acc, weights) in state.acc.iter_mut().zip(weights.chunks_exact(count)) {
                *acc = match state.by {
                    Monoid::Max => acc.max(folded(Reduce::Max, weights)),
                    Monoid::Sum | Monoid::Softmax => *acc + folded(Reduce::Sum, weights),
                };
            }
            return Ok(());
        };
        let (View::F(v), v_axes, v_steps) = self.operand(values, t) else {
            return Err(fail(self.kernel, "values are floats"));
        };
        let dense = strides(&self.plan.n, self.extents);
        let one = |(&a, &to): (&AxisId, &usize)| (t.extents[a.0 as usize], [step(a, v_axes, &v_steps), to]);
        let mut outer: Vec<Loop<2>> = merge(self.plan.n.iter().zip(&dense).map(one));
        let (width, [v_step, acc_step]) = take_longest(&mut outer);
        for turn in 0..turns(&outer) {
            let [v_at, acc_at] = place(&outer, turn);
            // SAFETY: the weights fill `rows` rows of `count`, the accumulators as many of `columns`, which are the indices of
            // `n`; the values are a leaf, which holds all indices of its type.
            unsafe {
                let x = Rows { data: weights.as_ptr(), count: rows, row: count, step: 1 };
                let along = step(self.plan.along, v_axes, &v_steps);
                let matrix = Matrix { data: Dense(v.as_ptr().add(v_at)), column: v_step, along };
                let acc = state.acc.as_mut_ptr().add(acc_at);
                let to = Rows { data: acc, count: rows, row: columns, step: acc_step };
                let way = Way::of(&matrix, &x, (width, count), self.halves);
                multiply(way, x, matrix, to, (width, count), true, Parallelism::None);
            }
        }
        Ok(())
    }

    /// Divides, computes the epilogue, stores.
    fn finish(&self, unit: usize, mut state: State) -> Result<(), DeviceError> {
        let mut t = self.tile(unit);
        let columns = state.acc.len() / state.max.len();
        let softmax = state.by == Monoid::Softmax;
        for (row, &sum) in state.acc.chunks_exact_mut(columns).zip(&state.sum).filter(|_| softmax) {
            // A row of nothing but -inf is zeros.
            let divisor = if sum == 0.0 { 1.0 } else { sum };
            row.iter_mut().for_each(|y| *y /= divisor);
        }
        let axes = &self.body.ty(self.plan.product).axes;
        let mut made = vec![0.0; state.acc.len()];
        let steps = strides(axes, &t.extents);
        let dense_axes = [&self.plan.m[..], &self.plan.n].concat();
        let dense = strides(&dense_axes, &t.extents);
        nest(&t.extents, axes, [(axes, &steps), (&dense_axes, &dense)]).each(|[to, from], n, s| {
            (0..n).for_each(|i| made[to + i * s[0]] = state.acc[from + i * s[1]]);
        });
        t.lanes[self.plan.product.0 as usize] = Some(Lane::F(made));
        self.evaluate(&self.epilogue, &mut t, true)?;

        let result = self.body.results[0];
        let axes = &self.body.ty(result).axes;
        let to = strides(axes, self.extents);
        let base: usize = axes.iter().zip(&to).map(|(a, s)| t.from[a.0 as usize] * s).sum();
        let (view, from_axes, from) = self.operand(result, &t);
        nest(&t.extents, axes, [(axes, &to), (from_axes, &from[..])]).each(|[to, from], n, steps| {
            // SAFETY: `check` made sure that the output holds all indices of its type, and units differ in axes of it.
            unsafe {
                match (view, self.out) {
                    (View::F(x), Out::F(y)) => scatter(y, base + to, x, from, n, steps),
                    (View::I(x), Out::I(y)) => scatter(y, base + to, x, from, n, steps),
                    (View::F(_) | View::Bf16(_) | View::F16(_) | View::Stack(_), Out::I(_))
                    | (View::I(_) | View::Bf16(_) | View::F16(_) | View::Stack(_), Out::F(_)) => {}
                }
            }
        });
        Ok(())
    }
}

/// A leaf: a parameter, a view of a leaf, or computed as a map kernel would.
fn leaf<'a>(
    (kernel, plan): (&Kernel, &StreamPlan),
    inputs: &[Option<View<'a>>],
    extents: &[usize],
    v: ValueId,
) -> Result<Leaf<'a>, DeviceError> {
    let body = &kernel.body;
    let axes = body.ty(v).axes.clone();
    let steps = strides(&axes, extents);
    let Some(inst) = defined(body, v) else {
        let input = body.params.iter().position(|p| *p == v).and_then(|n| inputs[n]);
        let view = input.ok_or_else(|| fail(kernel, "an input is missing"))?;
        return Ok(Leaf { data: Held::View(view), offset: 0, axes, steps, pages: None });
    };
    let below = || leaf((kernel, plan), inputs, extents, inst.args[0]);
    if let Some(leaf) = paged((kernel, plan), inputs, extents, inst)? {
        return Ok(leaf);
    }
    let renamed = |mut leaf: Leaf<'a>, from: AxisId, to: AxisId| {
        leaf.axes.iter_mut().filter(|a| **a == from).for_each(|a| *a = to);
        leaf
    };
    if let Op::Rename { from, to } = inst.op {
        return Ok(renamed(below()?, from, to));
    }
    if let Op::Slice { axis, into, start } = inst.op {
        let mut leaf = below()?;
        leaf.offset += start as usize * step(axis, &leaf.axes, &leaf.steps);
        return Ok(renamed(leaf, axis, into));
    }
    if let Op::Split { axis, into } = &inst.op {
        let mut leaf = below()?;
        (leaf.axes, leaf.steps) = split(&leaf.axes, &leaf.steps, *axis, into, extents);
        return Ok(leaf);
    }
    if inst.op == Op::Cast && [v, inst.args[0]].iter().all(|&v| body.ty(v).dtype.is_float()) {
        return below();
    }
    let mut part = Function { results: vec![v], ..body.clone() };
    let needed = cone(body, v, |_| true);
    part.body.retain(|i| needed.contains(&i.result()));
    let dtype = if body.ty(v).dtype.is_float() { DType::F32 } else { DType::I32 };
    let mut data = Buffer::new(dtype, axes.iter().map(|a| extents[a.0 as usize]).product())?;
    let part = Kernel { name: kernel.name.clone(), kind: KernelKind::Map, body: part };
    let output = data.view_mut().ok_or_else(|| fail(kernel, "memory of its own is not its own"))?;
    map::run(&part, inputs, output, extents)?;
    Ok(Leaf { data: Held::Own(data), offset: 0, axes, steps, pages: None })
}

/// Pages of fewer positions are not worth a tile each.
const PAGE: usize = 16;

/// A leaf that lies in pages of a pool that is a parameter: each tile of it is in one.
fn paged<'a>(
    (kernel, plan): (&Kernel, &StreamPlan),
    inputs: &[Option<View<'a>>],
    extents: &[usize],
    inst: &Inst,
) -> Result<Option<Leaf<'a>>, DeviceError> {
    let body = &kernel.body;
    let Some(Read { pool, slot, slots, along }) = Read::of(body, inst) else { return Ok(None) };
    let of_table = &body.ty(slots.table).axes;
    let sequences: Vec<_> = of_table.iter().copied().filter(|a| *a != slots.pages).collect();
    let page = slots.page as usize;
    if along != plan.along || page < PAGE || !sequences.iter().all(|a| plan.batch.contains(a)) {
        return Ok(None);
    }
    let input = |v: ValueId| body.params.iter().position(|p| *p == v).and_then(|n| inputs[n]);
    let (Some(view), Some(View::I(table))) = (input(pool), input(slots.table)) else { return Ok(None) };
    let extent = |a: AxisId| extents[a.0 as usize];
    let (positions, there) = (extent(along), extent(slots.pages) * page);
    if positions > there {
        return Err(fail(
            kernel,
            &format!("{positions} positions are read, the table has pages for {there}"),
        ));
    }
    let count: usize = of_table.iter().map(|&a| extent(a)).product();
    let places = extent(slot) / page;
    if let Some(&place) =
        table[..count].iter().find(|&&place| usize::try_from(place).is_ok_and(|n| n >= places) || place < 0)
    {
        return Err(DeviceError::Index { kernel: kernel.name.clone(), index: place.into(), size: places });
    }
    let axes = body.ty(pool).axes.clone();
    let steps = strides(&axes, extents);
    let axes = axes.into_iter().map(|a| if a == slot { along } else { a }).collect();
    let next = step(slots.pages, of_table, &strides(of_table, extents));
    let of_sequence = sequences.iter().map(|&a| step(a, of_table, &strides(of_table, extents))).collect();
    let pages = Pages { table, axes: sequences, steps: of_sequence, next, along, page };
    Ok(Some(Leaf { data: Held::View(view), offset: 0, axes, steps, pages: Some(pages) }))
}
