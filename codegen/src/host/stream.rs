//! Streamed folds on the CPU: tiles of rows by streamed positions, all products of a tile as [`multiply`] does them.
//!
//! What lies in pages of a pool is read there, page by page: a tile has positions of one page.
//!
//! Leaves that are no views of a parameter are computed whole, once a launch. What lies above them, up to the scores, is computed
//! tile by tile and gone with it. Threads share out batch and rows; if there are fewer of these than threads, also the
//! streamed axis, whose parts are merged in order.

mod leaf;
mod state;

use gemm::Parallelism;
use latentc_ir::{AxisId, Function, Inst, Op, Reduce, ValueId};
use rayon::prelude::*;
use smallvec::{SmallVec, smallvec};

use self::leaf::{Form, Leaf};
use self::state::State;
use super::contract::Product;
use super::few::{Dense, Matrix, Rows};
use super::map::{Strided, elementwise, fail, fault, nest};
use super::multiply::{Place, Way, are_halves, copied, multiply};
use super::simd::exp;
use super::spare::{Lane, Own, Spare, Takes};
use super::vector::{What, exponentials, folded};
use super::walk::{Loops, merge, offset, place, step, take_longest, turns};
use super::{Out, Shared, View, ViewMut};
use crate::contract::ContractPlan;
use crate::device::{DeviceError, Floats};
use crate::map::{Steps, strides};
use crate::program::Kernel;
use crate::stream::{Monoid, StreamPlan, cone, defined, is_elementwise};

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

/// A streamed fold at some sizes, whatever the streamed axis is long.
pub(super) struct Fold {
    plan: StreamPlan,
    /// What is computed in each tile, in order: first what the mask needs, then the scores.
    mask: Vec<Made>,
    scores: Vec<Made>,
    /// What is computed of the product.
    epilogue: Vec<Made>,
    leaves: Vec<Form>,
    /// Which of them a value is, if it is one.
    leaf_of: Vec<Option<usize>>,
    /// The axes of rows and columns.
    dense: Vec<AxisId>,
    /// For each axis of `m`, the extent of a tile and the number of tiles.
    rows: Vec<(usize, usize)>,
    /// The extents of a tile, which has so many positions at most.
    tile: Vec<usize>,
    /// Whether weights and values are of [type](are_halves) bf16.
    halves: bool,
}

/// An instruction of a tile.
struct Made {
    inst: Inst,
    /// Of a product: its groups of axes, and whether operands are of [type](are_halves) bf16.
    product: Option<(ContractPlan, bool)>,
}

impl Fold {
    /// Of a kernel. `extents` are those of the body's axes.
    pub(super) fn new(kernel: &Kernel, extents: &[usize]) -> Result<Fold, DeviceError> {
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
        let all = [&mask[..], &scores, &epilogue];
        let folded = |v: ValueId| v == plan.product || plan.top == Some(v);
        let made = |v: ValueId| folded(v) || all.iter().any(|part| part.iter().any(|i| i.result() == v));
        let roots = [plan.values, Some(plan.scores), plan.mask, Some(result)];
        let args = all.iter().flat_map(|part| part.iter()).flat_map(|i| &i.args);
        let used = args.copied().chain(roots.into_iter().flatten());
        let (mut leaves, mut leaf_of) = (Vec::new(), vec![None; body.values.len()]);
        for v in used.filter(|&v| !made(v)) {
            let of = &mut leaf_of[v.0 as usize];
            if of.is_none() {
                *of = Some(leaves.len());
                leaves.push(Form::of((kernel, &plan), extents, v)?);
            }
        }
        let halves = defined(body, plan.product).is_some_and(|fold| are_halves(body, &fold.args));
        let dense = [&plan.m[..], &plan.n].concat();
        let [mask, scores, epilogue] = all.map(|part| part.iter().map(|i| Made::new(body, i)).collect());
        let mut tile = extents.to_vec();
        let (mut rows, mut left) = (Vec::new(), ROWS);
        for &a in plan.m.iter().rev() {
            let extent = extents[a.0 as usize].max(1);
            let tiles = extent.div_ceil(left.max(1));
            let each = extent.div_ceil(tiles);
            rows.insert(0, (each, extent.div_ceil(each)));
            left = if tiles > 1 { 1 } else { left / each };
            tile[a.0 as usize] = each;
        }
        plan.batch.iter().for_each(|a| tile[a.0 as usize] = 1);
        let height: usize = rows.iter().map(|r| r.0).product();
        let columns: usize = plan.n.iter().map(|&a| extents[a.0 as usize]).product();
        tile[plan.along.0 as usize] = (SCORES / height).min(VALUES / columns.max(1)).max(POSITIONS);
        Ok(Fold { plan, mask, scores, epilogue, leaves, leaf_of, dense, rows, tile, halves })
    }

    /// Whether it reads a parameter as it is stored: where it is multiplied, and nothing else is done with it in a tile.
    pub(super) fn reads_as_stored(&self, body: &Function, param: usize) -> bool {
        let made = [&self.mask, &self.scores, &self.epilogue].into_iter().flatten();
        let others = made.filter(|made| made.product.is_none()).flat_map(|made| &made.inst.args);
        let roots = [self.plan.scores, body.results[0]];
        let others = others.copied().chain(roots).chain(self.plan.mask);
        let multiplied = |leaf: usize| others.clone().all(|v| self.leaf_of[v.0 as usize] != Some(leaf));
        let mut leaves = self.leaves.iter().enumerate();
        leaves.all(|(n, leaf)| leaf.reads_as_stored(param).is_none_or(|stored| stored && multiplied(n)))
    }

    /// Whether anything hangs on the extents of some axes.
    pub(super) fn hangs_on(&self, is: &dyn Fn(AxisId) -> bool) -> bool {
        let StreamPlan { batch, m, n, .. } = &self.plan;
        batch.iter().chain(m).chain(n).any(|&a| is(a)) || self.leaves.iter().any(|leaf| leaf.hangs_on(is))
    }

    /// What it takes of each thread's: a lane for each value, for what is known, and for weights.
    pub(super) fn takes(&self, body: &Function, takes: &mut Takes) {
        let len = |v: ValueId| body.ty(v).axes.iter().map(|a| self.tile[a.0 as usize]).product::<usize>();
        let values = body.values.len();
        for made in [&self.mask, &self.scores, &self.epilogue].into_iter().flatten() {
            let result = made.inst.result();
            takes.lane(result.0 as usize, len(result));
            if let Some((product, _)) = &made.product {
                let [m, n, k] = [&product.m, &product.n, &product.k].map(|axes| self.of_tile(axes));
                takes.floats(copied(m.max(n), k));
            }
        }
        for v in [self.plan.product].into_iter().chain(self.plan.top) {
            takes.lane(v.0 as usize, len(v));
        }
        takes.lane(values, self.state());
        takes.lane(values + 1, self.of_tile(&self.plan.m) * self.most());
        takes.floats(copied(self.of_tile(&self.plan.m), self.most()));
    }

    fn of_tile(&self, axes: &[AxisId]) -> usize {
        axes.iter().map(|a| self.tile[a.0 as usize]).product()
    }

    /// Positions of a tile, at most.
    fn most(&self) -> usize {
        self.tile[self.plan.along.0 as usize]
    }

    /// Numbers of what is known of a tile's rows.
    fn state(&self) -> usize {
        self.of_tile(&self.plan.m) * (2 + self.of_tile(&self.plan.n))
    }

    /// Computes the kernel that this is of. `extents` are those of the body's axes.
    pub(super) fn run(
        &self,
        kernel: &Kernel,
        inputs: &[Option<View<'_>>],
        output: ViewMut<'_>,
        extents: &[usize],
        spare: &mut Spare,
    ) -> Result<(), DeviceError> {
        let out = Out::from(output);
        let mut s = Stream::new(self, kernel, inputs, extents, out, spare)?;
        let done = s.run(spare);
        s.leaves.into_iter().filter_map(Leaf::into_lane).for_each(|lane| spare.give(lane));
        done
    }
}

impl Made {
    fn new(body: &Function, inst: &Inst) -> Made {
        let axes = |v: ValueId| &body.ty(v).axes[..];
        let product = (inst.op == Op::Contract).then(|| {
            let plan = ContractPlan::new(axes(inst.args[0]), axes(inst.args[1]), axes(inst.result()));
            (plan, are_halves(body, &inst.args))
        });
        Made { inst: inst.clone(), product }
    }
}

/// A launch.
struct Stream<'a> {
    kernel: &'a Kernel,
    body: &'a Function,
    fold: &'a Fold,
    plan: &'a StreamPlan,
    extents: &'a [usize],
    leaves: SmallVec<[Leaf<'a>; 8]>,
    /// Positions of a tile.
    positions: usize,
    /// Positions of a page, if leaves lie in pages: each tile is in one.
    page: Option<usize>,
    out: Out,
}

/// Parts of all axes, and the values there, by their numbers.
struct Tile<'t> {
    from: Extents,
    extents: Extents,
    lanes: &'t mut [Lane],
    /// Which of them are there.
    made: &'t mut Vec<bool>,
}

/// Elements from the first to the last of a tile, both counted.
fn reach(extents: &[usize], (axes, steps): Strided<'_>) -> usize {
    let last = axes.iter().zip(steps).map(|(a, step)| extents[a.0 as usize].saturating_sub(1) * step);
    last.sum::<usize>() + 1
}

/// Of all axes of a body, of which few have more.
type Extents = SmallVec<[usize; 24]>;

impl<'a> Stream<'a> {
    fn new(
        fold: &'a Fold,
        kernel: &'a Kernel,
        inputs: &[Option<View<'a>>],
        extents: &'a [usize],
        out: Out,
        spare: &mut Spare,
    ) -> Result<Stream<'a>, DeviceError> {
        let (body, plan) = (&kernel.body, &fold.plan);
        let mut leaves = SmallVec::new();
        for form in &fold.leaves {
            leaves.push(form.leaf(kernel, inputs, extents, spare)?);
        }
        let page = leaves.iter().find_map(Leaf::page);
        let mut s = Stream { kernel, body, fold, plan, extents, leaves, positions: usize::MAX, page, out };
        s.positions = s.fit(fold.most());
        Ok(s)
    }

    fn run(&mut self, spare: &mut Spare) -> Result<(), DeviceError> {
        let size = |axes: &[AxisId]| axes.iter().map(|a| self.extents[a.0 as usize]).product::<usize>();
        let (batch, rows, columns) = (size(&self.plan.batch), size(&self.plan.m), size(&self.plan.n));
        if batch * rows * columns == 0 {
            return Ok(());
        }
        let positions = self.extents[self.plan.along.0 as usize];
        let units = batch * self.fold.rows.iter().map(|r| r.1).product::<usize>();
        let threads = rayon::current_num_threads();
        if units < threads {
            // Each thread has a tile at least, as in decode, where few rows would fill one with all positions.
            let most = positions.div_ceil(threads.div_ceil(units));
            self.positions = self.fit(most.max(POSITIONS));
        }
        let s = &*self;
        let tiles = positions.div_ceil(s.positions);
        // Each thread does whole units in its own memory.
        let each = s.fold.state();
        let whole = |unit: usize| {
            s.with(|s, own| {
                let n = s.body.values.len();
                let mut memory = std::mem::take(&mut own.lanes[n]);
                memory.fit(true, each);
                let mut state = s.state(unit, memory.floats());
                let done =
                    s.part(unit, 0..tiles, &mut state, own).and_then(|()| s.finish(unit, &mut state, own));
                own.lanes[n] = memory;
                done
            })
        };
        if batch * rows * positions * columns < SMALL {
            return (0..units).try_for_each(whole);
        }
        if units >= threads || tiles < 2 {
            return (0..units).into_par_iter().try_for_each(whole);
        }
        let parts = tiles.min(threads.div_ceil(units));
        let from = |p: usize| p * tiles / parts;
        let mut states = spare.take(true, units * parts * each)?;
        states.floats().par_chunks_exact_mut(each).enumerate().try_for_each(|(n, memory)| {
            let (unit, tiles) = (n / parts, from(n % parts)..from(n % parts + 1));
            s.with(|s, own| s.part(unit, tiles, &mut s.state(unit, memory), own))
        })?;
        for (unit, memory) in states.floats().chunks_exact_mut(parts * each).enumerate() {
            let (first, others) = memory.split_at_mut(each);
            let mut first = s.state(unit, first);
            others.chunks_exact_mut(each).for_each(|other| first.merge(&s.state(unit, other)));
            s.with(|s, own| s.finish(unit, &mut first, own))?;
        }
        spare.give(states);
        Ok(())
    }

    /// Does something in this thread's memory, which has a lane for each value and two more.
    fn with<T>(&self, work: impl FnOnce(&Self, &mut Own) -> T) -> T {
        Own::with(self.body.values.len() + 2, |own| work(self, own))
    }

    /// Positions of a tile, no more than before: as many as wanted, or as pages have some of each.
    fn fit(&self, wanted: usize) -> usize {
        let wanted = wanted.min(self.positions);
        match self.page {
            Some(page) => page.min(1 << wanted.max(1).ilog2()),
            None => wanted,
        }
    }

    /// Where the rows of a unit begin, and how many they are; with all of the streamed axis.
    fn unit(&self, unit: usize) -> (Extents, Extents) {
        let (mut from, mut extents): (Extents, Extents) =
            (smallvec![0; self.extents.len()], self.extents.into());
        let mut rest = unit;
        for (&a, &(each, tiles)) in self.plan.m.iter().zip(&self.fold.rows).rev() {
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
        (from, extents)
    }

    /// The tile of a unit, of which nothing is there.
    fn tile<'t>(&self, unit: usize, lanes: &'t mut [Lane], made: &'t mut Vec<bool>) -> Tile<'t> {
        let (from, extents) = self.unit(unit);
        made.clear();
        made.resize(self.body.values.len(), false);
        Tile { from, extents, lanes, made }
    }

    /// What is known of a unit, in some memory.
    fn state<'s>(&self, unit: usize, memory: &'s mut [f32]) -> State<'s> {
        let (_, extents) = self.unit(unit);
        let size = |axes: &[AxisId]| axes.iter().map(|a| extents[a.0 as usize]).product::<usize>();
        State::at(self.plan.by, memory, size(&self.plan.m), size(&self.plan.n))
    }

    /// What some tiles of the streamed axis come to for a unit.
    fn part(
        &self,
        unit: usize,
        tiles: std::ops::Range<usize>,
        state: &mut State<'_>,
        Own { lanes, made, .. }: &mut Own,
    ) -> Result<(), DeviceError> {
        let (lanes, others) = lanes.split_at_mut(self.body.values.len());
        let weights = &mut others[1];
        let mut t = self.tile(unit, lanes, made);
        state.clear();
        let along = self.plan.along.0 as usize;
        weights.fit(true, state.max.len() * self.positions);
        let mut first = true;
        for n in tiles {
            t.from[along] = n * self.positions;
            t.extents[along] = self.positions.min(self.extents[along] - t.from[along]);
            self.evaluate(&self.fold.mask, &mut t, first)?;
            let hidden = self.plan.mask.is_some_and(|m| !self.any(m, &t));
            if !hidden {
                self.evaluate(&self.fold.scores, &mut t, first)?;
                self.weigh(&t, state, weights.floats())?;
                first = false;
            }
        }
        Ok(())
    }

    /// Computes instructions of a tile; those that do not depend on the streamed axis only at first.
    fn evaluate(&self, instructions: &[Made], t: &mut Tile<'_>, first: bool) -> Result<(), DeviceError> {
        for made in instructions {
            let result = made.inst.result();
            let n = result.0 as usize;
            if t.made[n] && !first && !self.body.ty(result).has(self.plan.along) {
                continue;
            }
            let mut lane = std::mem::take(&mut t.lanes[n]);
            let done = self.make(made, t, &mut lane);
            (t.lanes[n], t.made[n]) = (lane, true);
            done?;
        }
        Ok(())
    }

    /// Computes an instruction of a tile.
    fn make(&self, Made { inst, product }: &Made, t: &Tile<'_>, lane: &mut Lane) -> Result<(), DeviceError> {
        let ty = self.body.ty(inst.result());
        let steps = strides(&ty.axes, &t.extents);
        lane.fit(ty.dtype.is_float(), ty.axes.iter().map(|a| t.extents[a.0 as usize]).product());
        let args: SmallVec<[_; 3]> = inst.args.iter().map(|&a| self.operand(a, t)).collect();
        let operands: SmallVec<[Strided<'_>; 3]> =
            args.iter().map(|(_, axes, steps)| (*axes, &steps[..])).collect();
        let strided = (&ty.axes[..], &steps[..]);
        // Where both operands are stored in 16 bits, which queries that are weights are, one of them is brought to f32.
        let wide;
        if let Some((plan, halves)) = product {
            let (Some(a), Some(b), ViewMut::F(y)) = (args[0].0.floats(), args[1].0.floats(), lane.view_mut())
            else {
                return Err(fail(self.kernel, "a contraction needs floats"));
            };
            let tensors = [operands[0], operands[1], strided];
            let product = Product::new(plan, &t.extents, tensors, *halves);
            // What is stored in 16 bits is the matrix.
            let (n, x, w) = match (a, b) {
                (Floats::F32(x), w) if product.rows_of() == 0 || !matches!(w, Floats::F32(_)) => (0, x, w),
                (w, Floats::F32(x)) => (1, x, w),
                (x, w) => {
                    let all = reach(&t.extents, operands[0]);
                    wide = View::from(x.part(0..all)).widened().unwrap_or_default();
                    (0, &wide[..], w)
                }
            };
            // SAFETY: leaves hold all indices of their types, and the tile lies within; `y` was made for it.
            unsafe { product.run_stored((n, x), w, Shared(y.as_mut_ptr()), false) };
        } else {
            let what = if let Op::Position { axis } = inst.op {
                let index = (&[axis][..], &[1][..]);
                What::Iota(nest(&t.extents, strided.0, [strided, index]), t.from[axis.0 as usize])
            } else {
                elementwise(self.body, inst, &t.extents, strided, &operands)
                    .map_err(|why| fail(self.kernel, &why))?
            };
            let done = what.run(&|n| args[n].0, lane.view_mut(), &|_| 0, &mut Default::default());
            done.map_err(|e| fault(self.kernel, e))?;
        }
        Ok(())
    }

    /// A value's elements in a tile, from its first one on, with axes and steps.
    fn operand<'t>(&'t self, v: ValueId, t: &'t Tile<'_>) -> (View<'t>, &'t [AxisId], Steps) {
        if let Some(n) = self.fold.leaf_of[v.0 as usize] {
            return self.leaves[n].at(&t.from);
        }
        let axes = &self.body.ty(v).axes;
        debug_assert!(t.made[v.0 as usize], "operands are leaves or come first");
        (t.lanes[v.0 as usize].view(), axes, strides(axes, &t.extents))
    }

    /// Whether a truth value is true anywhere in a tile.
    fn any(&self, v: ValueId, t: &Tile<'_>) -> bool {
        let (View::I(x), axes, steps) = self.operand(v, t) else { return true };
        let mut any = false;
        nest(&t.extents, axes, [(axes, &steps[..])]).each(|[at], n, [step]| {
            any = any || (0..n).any(|i| x[at + i * step] != 0);
        });
        any
    }

    /// Adds a tile of positions to what is known of earlier ones. `weights` is room for its weights.
    fn weigh(&self, t: &Tile<'_>, state: &mut State<'_>, weights: &mut [f32]) -> Result<(), DeviceError> {
        let (View::F(x), axes, steps) = self.operand(self.plan.scores, t) else {
            return Err(fail(self.kernel, "scores are floats"));
        };
        let count = t.extents[self.plan.along.0 as usize];
        let along = step(self.plan.along, axes, &steps);
        let m_extents: Steps = self.plan.m.iter().map(|a| t.extents[a.0 as usize]).collect();
        let m_steps: Steps = self.plan.m.iter().map(|&a| step(a, axes, &steps)).collect();
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
            let known = state.acc.iter_mut().zip(&*state.sum);
            for ((acc, &sum), weights) in known.zip(weights.chunks_exact(count)) {
                *acc = match state.by {
                    Monoid::Max => acc.max(folded(Reduce::Max, weights)),
                    Monoid::Sum => *acc + folded(Reduce::Sum, weights),
                    Monoid::Softmax => sum,
                };
            }
            return Ok(());
        };
        let (v, v_axes, v_steps) = self.operand(values, t);
        let v = v.floats().ok_or_else(|| fail(self.kernel, "values are floats"))?;
        let dense = strides(&self.plan.n, self.extents);
        let one = |(&a, &to): (&AxisId, &usize)| (t.extents[a.0 as usize], [step(a, v_axes, &v_steps), to]);
        let mut outer: Loops<2> = merge(self.plan.n.iter().zip(&dense).map(one));
        let (width, [v_step, acc_step]) = take_longest(&mut outer);
        for turn in 0..turns(&outer) {
            let [v_at, acc_at] = place(&outer, turn);
            // SAFETY: the weights fill `rows` rows of `count`, the accumulators as many of `columns`, which are the indices of
            // `n`; the values are a leaf, which holds all indices of its type.
            unsafe {
                let x = Rows { data: weights.as_ptr(), count: rows, row: count, step: 1 };
                let steps = (v_step, step(self.plan.along, v_axes, &v_steps));
                let acc = state.acc.as_mut_ptr().add(acc_at);
                let to = Rows { data: acc, count: rows, row: columns, step: acc_step };
                match v {
                    Floats::F32(v) => self.add(x, Dense(v.as_ptr().add(v_at)), steps, to, (width, count)),
                    Floats::Bf16(v) => self.add(x, Dense(v.as_ptr().add(v_at)), steps, to, (width, count)),
                    Floats::F16(v) => self.add(x, Dense(v.as_ptr().add(v_at)), steps, to, (width, count)),
                }
            }
        }
        Ok(())
    }

    /// Adds weighed values to what is known of rows.
    ///
    /// # Safety
    /// See [`multiply`].
    unsafe fn add<P: Place>(
        &self,
        weights: Rows<*const f32>,
        data: P,
        (column, along): (usize, usize),
        to: Rows<*mut f32>,
        size: (usize, usize),
    ) {
        let matrix = Matrix { data, column, along };
        let way = Way::of(&matrix, &weights, size, self.fold.halves);
        // SAFETY: by the caller.
        unsafe { multiply(way, weights, matrix, to, size, true, Parallelism::None) };
    }

    /// Divides, computes the epilogue, stores.
    fn finish(
        &self,
        unit: usize,
        state: &mut State<'_>,
        Own { lanes, made, .. }: &mut Own,
    ) -> Result<(), DeviceError> {
        let mut t = self.tile(unit, lanes, made);
        let columns = state.acc.len() / state.max.len();
        let softmax = state.by == Monoid::Softmax && self.plan.values.is_some();
        for (row, &mut sum) in state.acc.chunks_exact_mut(columns).zip(&mut *state.sum).filter(|_| softmax) {
            // A row of nothing but -inf is zeros.
            let divisor = if sum == 0.0 { 1.0 } else { sum };
            row.iter_mut().for_each(|y| *y /= divisor);
        }
        let dense = strides(&self.fold.dense, &t.extents);
        let top = self.plan.top.map(|top| (top, &*state.max));
        for (v, known) in [(self.plan.product, &*state.acc)].into_iter().chain(top) {
            let (n, axes) = (v.0 as usize, &self.body.ty(v).axes);
            let steps = strides(axes, &t.extents);
            t.lanes[n].fit(true, known.len());
            let made = t.lanes[n].floats();
            nest(&t.extents, axes, [(axes, &steps), (&self.fold.dense, &dense)]).each(|[to, from], n, s| {
                (0..n).for_each(|i| made[to + i * s[0]] = known[from + i * s[1]]);
            });
            t.made[n] = true;
        }
        self.evaluate(&self.fold.epilogue, &mut t, true)?;

        let result = self.body.results[0];
        let axes = &self.body.ty(result).axes;
        let to = strides(axes, self.extents);
        let base: usize = axes.iter().zip(&to).map(|(a, s)| t.from[a.0 as usize] * s).sum();
        let (view, from_axes, from) = self.operand(result, &t);
        nest(&t.extents, axes, [(axes, &to), (from_axes, &from[..])]).each(|[to, from], n, steps| {
            // SAFETY: `fit` made sure that the output holds all indices of its type, and units differ in axes of it.
            unsafe { self.out.put(base + to, view, from, n, steps) };
        });
        Ok(())
    }
}
