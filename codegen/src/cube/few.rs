//! Products with few rows: what is wide is read once, in accesses of 16 bytes, with several in flight for each unit.
//!
//! A cube has up to 8 rows of one index of the batch, and some columns. Where there is room, all that it wants of the narrow operand is
//! computed into shared memory before anything else, while the first of what is read of the wide one is on its way, and then the
//! wide one is read without a stop. Else it walks the summed axes in chunks, with the same for each. The axes are those of a [`FewPlan`].
//!
//! *Along* the summed axes, a plane of 32 units has up to 4 columns, or shares them with others where there are too few to keep
//! a GPU busy; its units read side by side and fold what they summed in the end. *Across* the columns, each unit has some that lie
//! side by side, and every so-manieth index of the summed axes; the cube adds up what its units summed. The sums meet in shared
//! memory, and each unit makes some elements of the result of them.

use latentc_ir::{AxisId, Function, Inst, Op, ValueId};

use super::contract::{Offsets, Side, fold_rows, gather_index};
use super::emit::{Bin, Bits, Buf, Elem, Emit, Pack, Shared, Val, Var};
use super::epilogue::Epilogue;
use super::expr::{Exprs, Fold};
use super::target::Target;
use crate::contract::Rotation;
use crate::few::FewPlan;

/// Units of a cube.
pub(crate) const UNITS: u32 = 256;
/// Units that fold together.
const PLANE: u32 = 32;
/// Cubes that keep a GPU busy.
const BUSY: u64 = 200;
/// Packs that each unit has in flight; twice as many for a single row of a single product, whose sums leave registers for them.
const FLIGHT: u32 = 4;
/// Elements of narrow operands that each unit reads at once.
const AT_ONCE: u32 = 8;
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
    pack: u32,
    /// Along: columns of a plane.
    each: u32,
    /// Along: planes that share their columns. Across: units that do.
    splits: u32,
    /// Steps along the summed axes that are read at once.
    unroll: u32,
    /// Elements of the inner axes that are done between two meetings of the cube.
    chunk: u32,
    /// If all of the narrow operand is there at once, how many indices of the outer axes there are.
    whole: Option<u32>,
    products: u32,
    narrows: u32,
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
        let widest = plan.products.iter().map(|p| body.ty(p.table).dtype.bytes()).max().unwrap_or(4);
        let mut pack = (16 / widest as u32).max(1);
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
            let fits = |splits: u32, unroll: u32| {
                steps(splits, unroll) <= u64::from(most)
                    && depth.is_none_or(|d| steps(splits, unroll) <= d.next_multiple_of(PLANE.into()))
            };
            // Whoever has one of two partners has both.
            let least = if Rotation::of(body).is_some() { 2 } else { 1 };
            while planes / (2 * t.splits) * t.each >= least
                && fits(t.splits * 2, 1)
                && cubes.is_some_and(|n| n * u64::from(t.splits) / u64::from(planes * t.each) < BUSY)
            {
                t.splits *= 2;
            }
            t.unroll = (streams / t.each).max(1);
            while t.unroll > 1 && !fits(t.splits, t.unroll) {
                t.unroll /= 2;
            }
            t.columns = planes / t.splits * t.each;
            block = steps(t.splits, t.unroll) as u32;
        } else {
            while t.pack > 1 && t.pack * rows * products > SUMS {
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
            }
        }
        t
    }

    /// Along: as many steps at once, or a few less if fewer of them go beyond the end then.
    fn least_waste(&self, depth: u64) -> u32 {
        let steps = |unroll: u32| {
            let round = u64::from(PLANE * self.splits * unroll * self.pack);
            depth.div_ceil(round) * u64::from(unroll)
        };
        (self.unroll.div_ceil(2)..=self.unroll).rev().min_by_key(|&n| steps(n)).unwrap_or(self.unroll)
    }

    /// Floats of a narrow operand that are kept.
    fn staged(&self) -> u32 {
        self.whole.unwrap_or(1) * self.rows * self.chunk
    }

    /// Elements of the sums in shared memory.
    fn sums(&self, plan: &FewPlan) -> u32 {
        let splits = if plan.along { self.splits } else { 1 };
        self.products * splits * self.rows * self.columns
    }

    /// Bytes of shared memory.
    pub(crate) fn shared_bytes(&self, body: &Function, plan: &FewPlan, target: Target) -> usize {
        let bytes = |elements: u32| (elements as usize * Elem::F32.bytes()).next_multiple_of(16);
        let folds = folds(body, plan).len();
        let scratch = if folds > 0 { bytes(UNITS) } else { 0 };
        // Where units of a plane, or of a cube, add up what they summed.
        let meet = match plan.along {
            true if vectors(target) => 0,
            true => bytes(UNITS),
            false => bytes(UNITS * self.pack),
        };
        let narrow = self.narrows as usize * bytes(self.staged());
        narrow + bytes(self.sums(plan)) + folds * bytes(self.rows) + scratch + meet
    }
}

/// Whether there are vectors, and planes of known size.
fn vectors(target: Target) -> bool {
    target == Target::Cuda
}

/// What is folded for each row.
fn folds<'f>(body: &'f Function, plan: &FewPlan) -> Vec<(&'f Inst, Fold)> {
    let row = |a: &AxisId| plan.batch.contains(a) || plan.rows.contains(a);
    let rows = body.body.iter().filter(|i| i.op != Op::Contract && body.ty(i.result()).axes.iter().all(row));
    rows.filter_map(|inst| Some((inst, Fold::of(body, inst)?))).collect()
}

/// Where the part of an index that a tensor has lies in it.
pub(super) fn place(e: &mut Emit, x: &Exprs<'_>, memory: &[AxisId], known: &[(&[AxisId], &[Val])]) -> Val {
    let mut at = e.u32(0);
    for (n, axis) in memory.iter().enumerate() {
        let found = known.iter().find_map(|(axes, index)| Some(index[axes.iter().position(|a| a == axis)?]));
        if let Some(i) = found {
            let stride = x.total(e, &memory[n + 1..]);
            let step = e.mul(i, stride);
            at = e.add(at, step);
        }
    }
    at
}

/// A wide operand at one index of the batch and the outer axes.
struct Table {
    buf: Buf,
    /// Where it begins, in elements.
    base: Val,
    /// Whether the index that chooses it is one of the axis.
    exists: Option<Val>,
}

/// A narrow operand's chunk in shared memory.
struct Staged {
    value: ValueId,
    memory: Shared,
}

/// What the parts of the kernel have in common.
struct Few<'p> {
    plan: &'p FewPlan,
    t: Tiling,
    target: Target,
    /// The index in the batch.
    repeat: (&'p [AxisId], &'p [Val]),
    /// For each product, its table.
    buffers: Vec<Buf>,
    /// For each product, what its operand starts at for the columns of this unit.
    columns: Vec<Vec<Val>>,
    /// For each product, column and row.
    sums: Vec<Vec<Vec<Var>>>,
    staged: Vec<Staged>,
}

/// The kernel's instructions, over the buffers of the parameters and the output.
pub(crate) fn emit<'a>(
    e: &mut Emit,
    mut x: Exprs<'a>,
    plan: &FewPlan,
    (rows_of_cube, target): (u32, Target),
    buffer: impl Fn(ValueId) -> Option<Buf>,
    output: Buf,
) {
    let x = &mut x;
    let body = x.body();
    let t = Tiling::of(body, plan, rows_of_cube, target);
    let [rows, columns, repeats] = [&plan.rows, &plan.columns, &plan.batch].map(|axes| x.total(e, axes));
    // Cubes are numbered along the rows, so that those which read the same run together, then the columns, then the batch.
    let cube = e.cube();
    let [row_tiles, column_tiles] =
        [(rows, t.rows), (columns, t.columns)].map(|(total, tile)| e.tiles(total, tile));
    let (tile, across) = (e.rem(cube, row_tiles), e.div(cube, row_tiles));
    let (block, batch) = (e.rem(across, column_tiles), e.div(across, column_tiles));
    let (of_rows, of_columns) = (e.u32(t.rows), e.u32(t.columns));
    let (row0, column0) = (e.mul(tile, of_rows), e.mul(block, of_columns));
    // All units of a cube agree.
    let inside = e.lt(batch, repeats);
    e.if_(inside, |e| {
        let batch_index = x.split(e, batch, &plan.batch);
        let repeat = (&plan.batch[..], &batch_index[..]);
        let epilogue = Epilogue::of(body);
        let mut side = Side { group: &plan.rows, first: row0, total: rows, folded: Vec::new() };
        let folds = folds(body, plan);
        let scratch = (!folds.is_empty()).then(|| e.shared(Elem::F32, UNITS as usize));
        let fold = |e: &mut Emit, x: &mut Exprs<'a>, side: &mut Side<'_>| {
            if let Some(scratch) = scratch {
                fold_rows(e, x, side, &folds, repeat, (scratch, t.rows, &epilogue));
            }
        };
        let narrow = plan.narrows().into_iter();
        let staged: Vec<_> =
            narrow.map(|value| Staged { value, memory: e.shared(Elem::F32, t.staged() as usize) }).collect();
        let kept = e.shared(Elem::F32, t.sums(plan) as usize);
        let zero = e.f32(0.0);
        let each = if plan.along { t.each } else { t.pack };
        let row_sums = |e: &mut Emit| (0..t.rows).map(|_| e.var(zero)).collect::<Vec<_>>();
        let sums = plan.products.iter().map(|_| (0..each).map(|_| row_sums(e)).collect()).collect::<Vec<_>>();
        let starts = plan.products.iter().map(|p| Offsets::of(e, x, &plan.columns, &body.ty(p.table).axes));
        let starts: Vec<_> = starts.collect();
        // Beyond the last column, the last is read again.
        let first = first_column(e, plan, &t, column0);
        let pack = e.u32(if plan.along { 1 } else { t.pack });
        let last = e.sub(columns, pack);
        let numbers: Vec<_> = (0..if plan.along { t.each } else { 1 })
            .map(|n| {
                let n = e.u32(n);
                let number = e.add(first, n);
                let number = e.binary(Bin::Min, number, last);
                epilogue.in_order(e, x, &plan.columns, number)
            })
            .collect();
        let columns_at = starts.iter().map(|s| numbers.iter().map(|&n| s.at(e, n)).collect()).collect();
        let buffers =
            plan.products.iter().map(|p| buffer(p.table).expect("a table is a parameter, by the plan"));
        let buffers = buffers.collect();
        let few = Few { plan, t, target, repeat, buffers, columns: columns_at, sums, staged };
        match t.whole {
            Some(outer) => few.at_once(e, x, &mut side, outer, fold),
            None => {
                fold(e, x, &mut side);
                few.in_chunks(e, x, &side);
            }
        }
        if plan.along {
            few.fold_planes(e, kept);
        } else {
            few.fold_units(e, kept);
        }
        few.finish(e, (x, &epilogue), &side, repeat, (row0, column0, columns), (kept, output));
    });
}

/// The first column of this unit.
fn first_column(e: &mut Emit, plan: &FewPlan, t: &Tiling, column0: Val) -> Val {
    let unit = e.unit();
    let (group, each) = if plan.along {
        let (plane, splits) = (e.u32(PLANE), e.u32(t.splits));
        let plane = e.div(unit, plane);
        (e.div(plane, splits), t.each)
    } else {
        let lanes = e.u32(t.columns / t.pack);
        (e.rem(unit, lanes), t.pack)
    };
    let each = e.u32(each);
    let step = e.mul(group, each);
    e.add(column0, step)
}

/// A part of the inner axes that is walked in steps.
struct Span {
    /// The number of this unit's first step, and of the one after the chunk's last.
    first: Val,
    end: Val,
    /// From one step of a unit to the next.
    stride: u32,
    /// Rounds of so many steps as are read at once.
    rounds: Val,
    /// Whether all steps of all rounds are inside.
    exact: bool,
}

impl Few<'_> {
    /// Where the wide operands begin at an index of the outer axes. What is known of elements is in scope.
    fn tables(&self, e: &mut Emit, x: &mut Exprs<'_>, outer: Val) -> Vec<Table> {
        let outer_index = x.split(e, outer, &self.plan.outer);
        let known = [self.repeat, (&self.plan.outer[..], &outer_index[..])];
        let products = self.plan.products.iter().zip(&self.buffers);
        products
            .map(|(p, &buf)| {
                let memory = &x.body().ty(p.table).axes;
                let mut base = place(e, x, memory, &known);
                let mut exists = None;
                if let Some((along, index)) = p.index {
                    let at = gather_index(x, index, &known);
                    let i = x.element(e, index, &at);
                    let (i, none) = (e.cast(i, Elem::U32), e.u32(0));
                    let ok = e.lt(i, x.extent(along));
                    let i = e.select(ok, i, none);
                    let matrix = place(e, x, memory, &[(&[along], &[i])]);
                    base = e.add(base, matrix);
                    exists = Some(ok);
                }
                Table { buf, base, exists }
            })
            .collect()
    }

    /// Where indices of the inner axes lie in each table.
    fn deep(&self, e: &mut Emit, x: &Exprs<'_>) -> Vec<Offsets> {
        let memory = self.plan.products.iter().map(|p| &x.body().ty(p.table).axes);
        memory.map(|m| Offsets::of(e, x, &self.plan.inner, m)).collect()
    }

    /// All of the narrow operand at once, and then the wide one without a stop. The first of it is on its way before rows are folded.
    fn at_once<'a>(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'a>,
        side: &mut Side<'_>,
        outer: u32,
        fold: impl FnOnce(&mut Emit, &mut Exprs<'a>, &mut Side<'_>),
    ) {
        let (zero, one) = (e.u32(0), e.u32(1));
        let depth = x.total(e, &self.plan.inner);
        let span = self.span(e, zero, depth);
        let deep = self.deep(e, x);
        let each = span.rounds.known().expect("the depth is known") as u32;
        let (of_outer, floats) = (e.u32(each), e.u32(self.t.rows * self.t.chunk));
        // A round's index of the outer axes, and its number among those of that.
        let split = |e: &mut Emit, round: Val| match outer {
            1 => (zero, round),
            _ => (e.div(round, of_outer), e.rem(round, of_outer)),
        };
        let read = |e: &mut Emit, x: &mut Exprs<'a>, round: Val| {
            x.scope(|x| {
                let (o, round) = split(e, round);
                let tables = self.tables(e, x, o);
                self.read(e, (&tables, &deep), &span, round)
            })
        };
        let work = |e: &mut Emit, x: &mut Exprs<'a>, round: Val, packs: &[Pack]| {
            x.scope(|x| {
                let (o, round) = split(e, round);
                let exist: Vec<_> = self.tables(e, x, o).into_iter().map(|t| t.exists).collect();
                let before = e.mul(o, floats);
                self.work(e, &exist, &span, (round, zero, before), packs);
            });
        };
        let first = read(e, x, zero);
        let rounds = outer * each;
        let vars: Vec<_> =
            if rounds > 1 { first.iter().map(|p| e.pack_var(p)).collect() } else { Vec::new() };
        fold(e, x, side);
        self.stage(e, x, side, (zero, depth), (zero, outer));
        e.sync();
        if rounds == 1 {
            return work(e, x, zero, &first);
        }
        let rounds = e.u32(rounds);
        e.for_step(zero, rounds, one, |e, round| {
            let packs: Vec<_> = vars.iter().zip(&first).map(|(v, like)| e.get_pack(v, like)).collect();
            let next = e.add(round, one);
            let more = e.lt(next, rounds);
            e.if_(more, |e| {
                let ahead = read(e, x, next);
                vars.iter().zip(&ahead).for_each(|(v, p)| e.set_pack(v, p));
            });
            work(e, x, round, &packs);
        });
    }

    /// The summed axes in chunks, as much of the narrow operand at once as there is room for.
    fn in_chunks(&self, e: &mut Emit, x: &mut Exprs<'_>, side: &Side<'_>) {
        let (zero, one) = (e.u32(0), e.u32(1));
        let outer = x.total(e, &self.plan.outer);
        e.for_step(zero, outer, one, |e, o| {
            x.scope(|x| {
                let tables = self.tables(e, x, o);
                let exist: Vec<_> = tables.iter().map(|t| t.exists).collect();
                let (depth, chunk) = (x.total(e, &self.plan.inner), e.u32(self.t.chunk));
                e.for_step(zero, depth, chunk, |e, k0| {
                    let span = self.span(e, k0, depth);
                    let deep = self.deep(e, x);
                    let read = |e: &mut Emit, round| self.read(e, (&tables, &deep), &span, round);
                    let work = |e: &mut Emit, round, packs: &[Pack]| {
                        self.work(e, &exist, &span, (round, k0, zero), packs)
                    };
                    let mut stage = |e: &mut Emit| {
                        // What was there before has been used.
                        e.sync();
                        self.stage(e, x, side, (k0, depth), (o, 1));
                        e.sync();
                    };
                    self.rounds(e, &span, &mut stage, read, work);
                });
            });
        });
    }

    /// What a round reads: packs of all products and columns.
    fn read(
        &self,
        e: &mut Emit,
        (tables, deep): (&[Table], &[Offsets]),
        span: &Span,
        round: Val,
    ) -> Vec<Pack> {
        if self.plan.along {
            self.read_along(e, tables, span, round)
        } else {
            self.read_across(e, (tables, deep), span, round)
        }
    }

    /// Multiplies and adds up what a round has read. Its chunk begins at `k0`, and its part of the narrow operand so many floats on.
    fn work(
        &self,
        e: &mut Emit,
        exist: &[Option<Val>],
        span: &Span,
        (round, k0, before): (Val, Val, Val),
        packs: &[Pack],
    ) {
        if self.plan.along {
            self.along(e, exist, span, (round, before), packs);
        } else {
            self.across(e, exist, span, (round, k0, before), packs);
        }
    }

    /// The steps of a chunk: packs along the summed axes, single indices of them across.
    fn span(&self, e: &mut Emit, k0: Val, depth: Val) -> Span {
        let t = &self.t;
        let pack = if self.plan.along { t.pack } else { 1 };
        let stride = if self.plan.along { PLANE * t.splits } else { t.splits };
        let (width, chunk) = (e.u32(pack), e.u32(t.chunk));
        let unit = e.unit();
        let place = if self.plan.along {
            let (plane, splits) = (e.u32(PLANE), e.u32(t.splits));
            let (number, lane) = (e.div(unit, plane), e.rem(unit, plane));
            let split = e.rem(number, splits);
            let before = e.mul(split, plane);
            e.add(before, lane)
        } else {
            let lanes = e.u32(t.columns / t.pack);
            e.div(unit, lanes)
        };
        let start = e.div(k0, width);
        let first = e.add(start, place);
        let end = e.add(k0, chunk);
        let end = e.binary(Bin::Min, end, depth);
        let end = e.div(end, width);
        let round = stride * t.unroll;
        let exact = match (t.whole, depth.known()) {
            (Some(_), Some(d)) => d.is_multiple_of((round * pack).into()),
            (_, d) => d.is_some_and(|d| d.is_multiple_of(t.chunk.into())),
        };
        let rounds = if let (Some(_), Some(d)) = (t.whole, depth.known()) {
            e.u32(d.div_ceil((round * pack).into()) as u32)
        } else if exact {
            e.u32(t.chunk / pack / round)
        } else {
            let (up, round) = (e.u32(round - 1), e.u32(round));
            let steps = e.sub(end, start);
            let steps = e.add(steps, up);
            e.div(steps, round)
        };
        Span { first, end, stride, rounds, exact }
    }

    /// A chunk of the narrow operands of this cube's rows, row after row, at so many indices of the outer axes. A unit reads several
    /// elements before it keeps one. What lies beyond the last is the last once more, and nothing comes of it.
    fn stage(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        side: &Side<'_>,
        (k0, depth): (Val, Val),
        (outer, count): (Val, u32),
    ) {
        let (plan, t) = (self.plan, &self.t);
        let (of_outer, total) = (t.rows * t.chunk, count * t.rows * t.chunk);
        let trips = total.div_ceil(UNITS);
        let batch = (AT_ONCE / t.narrows).clamp(1, trips);
        let (unit, one, chunk) = (e.unit(), e.u32(1), e.u32(t.chunk));
        let last_of = |e: &mut Emit, n: Val, end: Val| {
            let last = e.sub(end, one);
            e.binary(Bin::Min, n, last)
        };
        let whole = (batch * UNITS * trips.div_ceil(batch)) == total;
        let deep_enough = depth.known().is_some_and(|d| d.is_multiple_of(t.chunk.into()));
        let (from, end, step) = (e.u32(0), e.u32(trips), e.u32(batch));
        e.for_step(from, end, step, |e, trip| {
            x.scope(|x| {
                let mut found = Vec::new();
                for n in 0..batch {
                    let n = e.u32(n);
                    let trip = e.add(trip, n);
                    let units = e.u32(UNITS);
                    let before = e.mul(trip, units);
                    let number = e.add(before, unit);
                    let all = e.u32(total);
                    let flat = if whole { number } else { last_of(e, number, all) };
                    let (o, in_outer) = match count {
                        1 => (outer, flat),
                        _ => {
                            let of_outer = e.u32(of_outer);
                            let o = e.div(flat, of_outer);
                            (e.add(outer, o), e.rem(flat, of_outer))
                        }
                    };
                    let (row, k) = match t.rows {
                        1 => (from, in_outer),
                        _ => (e.div(in_outer, chunk), e.rem(in_outer, chunk)),
                    };
                    let row_number = e.add(side.first, row);
                    let row_number =
                        if t.rows == 1 { row_number } else { last_of(e, row_number, side.total) };
                    let deep = e.add(k0, k);
                    let deep = if deep_enough { deep } else { last_of(e, deep, depth) };
                    let outer = x.split(e, o, &plan.outer);
                    let at = x.split(e, row_number, side.group);
                    let inner = x.split(e, deep, &plan.inner);
                    let known = [
                        self.repeat,
                        (&plan.outer[..], &outer[..]),
                        (side.group, &at[..]),
                        (&plan.inner[..], &inner[..]),
                    ];
                    for (value, kept) in &side.folded {
                        let element = e.load(*kept, row);
                        x.define(*value, gather_index(x, *value, &known), element);
                    }
                    let elements: Vec<_> = self
                        .staged
                        .iter()
                        .map(|staged| {
                            let index = gather_index(x, staged.value, &known);
                            let element = x.element(e, staged.value, &index);
                            e.cast(element, Elem::F32)
                        })
                        .collect();
                    let place = self.place_in_row(e, k);
                    let first = e.sub(flat, k);
                    found.push((number, e.add(first, place), elements));
                }
                for (number, place, elements) in found {
                    let keep = |e: &mut Emit| {
                        for (staged, &element) in self.staged.iter().zip(&elements) {
                            e.store(staged.memory, place, element);
                        }
                    };
                    if whole {
                        keep(e);
                    } else {
                        let all = e.u32(total);
                        let inside = e.lt(number, all);
                        e.if_(inside, keep);
                    }
                }
            });
        });
    }

    /// Where an element of a row is kept. A plane reads packs of 8 in two halves: all first halves lie side by side, then all
    /// second ones, so that its units meet in no bank.
    fn place_in_row(&self, e: &mut Emit, k: Val) -> Val {
        if !self.plan.along || self.t.pack < 8 {
            return k;
        }
        let [two, four, eight, half, whole] = [2, 4, 8, 4 * PLANE, 8 * PLANE].map(|n| e.u32(n));
        let plane = e.u32(PLANE);
        let (block, quarter, pack) = (e.div(k, whole), e.div(k, four), e.div(k, eight));
        let (second, lane, rest) = (e.rem(quarter, two), e.rem(pack, plane), e.rem(k, four));
        [(block, whole), (second, half), (lane, four)].into_iter().fold(rest, |at, (n, step)| {
            let more = e.mul(n, step);
            e.add(at, more)
        })
    }

    /// A round's packs of all products and columns.
    fn read_along(&self, e: &mut Emit, tables: &[Table], span: &Span, round: Val) -> Vec<Pack> {
        let t = &self.t;
        let (of_round, pack) = (e.u32(span.stride * t.unroll), e.u32(t.pack));
        let skipped = e.mul(round, of_round);
        let start = e.add(span.first, skipped);
        let (one, mut packs) = (e.u32(1), Vec::new());
        let last = e.sub(span.end, one);
        for u in 0..t.unroll {
            let step = e.u32(u * span.stride);
            let v = e.add(start, step);
            // Beyond the end, the last is read again.
            let v = e.binary(Bin::Min, v, last);
            for (table, columns) in tables.iter().zip(&self.columns) {
                for &column in columns {
                    let at = e.add(table.base, column);
                    let at = e.div(at, pack);
                    let at = e.add(at, v);
                    packs.push(e.load_pack(table.buf, at, t.pack, self.vectors()));
                }
            }
        }
        packs
    }

    fn vectors(&self) -> bool {
        vectors(self.target)
    }

    /// Runs rounds. What is read for the next is on its way while one is worked on; the first while the narrow operand is brought.
    fn rounds(
        &self,
        e: &mut Emit,
        span: &Span,
        stage: &mut dyn FnMut(&mut Emit),
        read: impl Fn(&mut Emit, Val) -> Vec<Pack>,
        work: impl Fn(&mut Emit, Val, &[Pack]),
    ) {
        let (zero, one) = (e.u32(0), e.u32(1));
        let first = read(e, zero);
        if span.rounds.known() == Some(1) {
            stage(e);
            return work(e, zero, &first);
        }
        let vars: Vec<_> = first.iter().map(|p| e.pack_var(p)).collect();
        stage(e);
        e.for_step(zero, span.rounds, one, |e, round| {
            let packs: Vec<_> = vars.iter().zip(&first).map(|(v, like)| e.get_pack(v, like)).collect();
            let next = e.add(round, one);
            let ahead = read(e, next);
            vars.iter().zip(&ahead).for_each(|(v, p)| e.set_pack(v, p));
            work(e, round, &packs);
        });
    }

    /// Multiplies and adds up what a round has read, a plane along the summed axes.
    fn along(
        &self,
        e: &mut Emit,
        exist: &[Option<Val>],
        span: &Span,
        (round, before): (Val, Val),
        packs: &[Pack],
    ) {
        let t = &self.t;
        let per_step = t.products * t.each;
        for u in 0..t.unroll {
            // The pack's number in the chunk; its last part is the place in the plane.
            let (of_round, step) = (e.u32(span.stride * t.unroll), e.u32(u * span.stride));
            let skipped = e.mul(round, of_round);
            let skipped = e.add(skipped, step);
            let v = e.add(span.first, skipped);
            let packs = &packs[(u * per_step) as usize..((u + 1) * per_step) as usize];
            let local = self.local(e, skipped);
            for (p, &exists) in exist.iter().enumerate() {
                let of = &packs[p * t.each as usize..(p + 1) * t.each as usize];
                guarded(e, exists, (!span.exact).then_some((v, span.end)), |e| {
                    self.multiply_along(e, p, (local, before), of);
                });
            }
        }
    }

    /// The number in the chunk of the pack that lies so many behind this unit's first.
    fn local(&self, e: &mut Emit, skipped: Val) -> Val {
        let (plane, splits, unit) = (e.u32(PLANE), e.u32(self.t.splits), e.unit());
        let (number, lane) = (e.div(unit, plane), e.rem(unit, plane));
        let split = e.rem(number, splits);
        let before = e.mul(split, plane);
        let before = e.add(before, lane);
        e.add(before, skipped)
    }

    fn staged_of(&self, product: usize) -> Shared {
        let narrow = self.plan.products[product].narrow;
        self.staged.iter().find(|s| s.value == narrow).expect("every narrow operand is staged").memory
    }

    fn multiply_along(&self, e: &mut Emit, p: usize, (local, before): (Val, Val), packs: &[Pack]) {
        let t = &self.t;
        let memory = self.staged_of(p);
        let width = t.pack.min(4);
        let of_width = e.u32(width);
        let before = e.div(before, of_width);
        for part in 0..t.pack / width {
            // In units of `width` elements.
            let at = if t.pack < 8 {
                local
            } else {
                let (plane, whole) = (e.u32(PLANE), e.u32(2 * PLANE));
                let (block, lane) = (e.div(local, plane), e.rem(local, plane));
                let block = e.mul(block, whole);
                let at = e.add(block, lane);
                let half = e.u32(part * PLANE);
                e.add(at, half)
            };
            let at = e.add(at, before);
            let narrow: Vec<_> = (0..t.rows)
                .map(|r| {
                    let row = e.u32(r * t.chunk / width);
                    let at = e.add(at, row);
                    e.load_pack(memory, at, width, self.vectors())
                })
                .collect();
            for n in 0..width {
                let row: Vec<_> = narrow.iter().map(|pack| e.element_of(pack, n)).collect();
                for (pack, sums) in packs.iter().zip(&self.sums[p]) {
                    let w = e.element_of(pack, part * width + n);
                    let w = e.cast(w, Elem::F32);
                    for (&x, &sum) in row.iter().zip(sums) {
                        let old = e.get(sum);
                        let new = e.fma(w, x, old);
                        e.set(sum, new);
                    }
                }
            }
        }
    }

    /// The index of the inner axes that this unit has in a step of a round.
    fn index_across(&self, e: &mut Emit, span: &Span, round: Val, u: u32) -> Val {
        let (of_round, step) = (e.u32(span.stride * self.t.unroll), e.u32(u * span.stride));
        let skipped = e.mul(round, of_round);
        let skipped = e.add(skipped, step);
        e.add(span.first, skipped)
    }

    /// A round's packs of all products.
    fn read_across(
        &self,
        e: &mut Emit,
        (tables, deep): (&[Table], &[Offsets]),
        span: &Span,
        round: Val,
    ) -> Vec<Pack> {
        let (one, pack, mut packs) = (e.u32(1), e.u32(self.t.pack), Vec::new());
        let last = e.sub(span.end, one);
        for u in 0..self.t.unroll {
            let k = self.index_across(e, span, round, u);
            let k = e.binary(Bin::Min, k, last);
            for ((table, deep), columns) in tables.iter().zip(deep).zip(&self.columns) {
                let step = deep.at(e, k);
                let at = e.add(table.base, columns[0]);
                let at = e.add(at, step);
                let at = e.div(at, pack);
                packs.push(e.load_pack(table.buf, at, self.t.pack, self.vectors()));
            }
        }
        packs
    }

    /// Multiplies and adds up what a round has read, a unit's columns across the summed axes.
    fn across(
        &self,
        e: &mut Emit,
        exist: &[Option<Val>],
        span: &Span,
        (round, k0, before): (Val, Val, Val),
        packs: &[Pack],
    ) {
        let t = &self.t;
        for u in 0..t.unroll {
            let k = self.index_across(e, span, round, u);
            let local = e.sub(k, k0);
            let local = e.add(local, before);
            for (p, &exists) in exist.iter().enumerate() {
                let pack = &packs[(u * t.products) as usize + p];
                let memory = self.staged_of(p);
                guarded(e, exists, (!span.exact).then_some((k, span.end)), |e| {
                    let w: Vec<_> = (0..t.pack)
                        .map(|n| {
                            let w = e.element_of(pack, n);
                            e.cast(w, Elem::F32)
                        })
                        .collect();
                    for r in 0..t.rows {
                        let row = e.u32(r * t.chunk);
                        let at = e.add(row, local);
                        let x = e.load(memory, at);
                        for (&w, sums) in w.iter().zip(&self.sums[p]) {
                            let sum = sums[r as usize];
                            let old = e.get(sum);
                            let new = e.fma(w, x, old);
                            e.set(sum, new);
                        }
                    }
                });
            }
        }
    }

    /// Where a sum is kept: by product, split, row, column.
    fn slot(&self, e: &mut Emit, (p, split): (usize, Val), row: u32, column: Val) -> Val {
        let t = &self.t;
        let splits = if self.plan.along { t.splits } else { 1 };
        let (before, of_split) = (e.u32((p as u32 * splits * t.rows + row) * t.columns), t.rows * t.columns);
        let of_split = e.u32(of_split);
        let step = e.mul(split, of_split);
        let at = e.add(before, step);
        e.add(at, column)
    }

    /// The units of a plane fold what they summed.
    fn fold_planes(&self, e: &mut Emit, kept: Shared) {
        let t = &self.t;
        let (plane, splits, each, zero) = (e.u32(PLANE), e.u32(t.splits), e.u32(t.each), e.u32(0));
        let unit = e.unit();
        let (number, lane) = (e.div(unit, plane), e.rem(unit, plane));
        let (split, group) = (e.rem(number, splits), e.div(number, splits));
        let first = e.mul(group, each);
        let writes = e.cmp(super::emit::Cmp::Eq, lane, zero);
        let scratch = (!self.vectors()).then(|| e.shared(Elem::F32, UNITS as usize));
        for (p, columns) in self.sums.iter().enumerate() {
            for (c, rows) in columns.iter().enumerate() {
                let c = e.u32(c as u32);
                let column = e.add(first, c);
                for (r, &sum) in rows.iter().enumerate() {
                    let mut whole = e.get(sum);
                    match scratch {
                        None => whole = e.fold_plane(Bin::Add, whole),
                        // Planes of other targets have other sizes.
                        Some(scratch) => {
                            e.fold_groups(Bin::Add, whole, scratch, lane, PLANE);
                            whole = e.load(scratch, unit);
                            e.sync();
                        }
                    }
                    let slot = self.slot(e, (p, split), r as u32, column);
                    e.if_(writes, |e| e.store(kept, slot, whole));
                }
            }
        }
        e.sync();
    }

    /// The units that have the same columns add up what they summed.
    fn fold_units(&self, e: &mut Emit, kept: Shared) {
        let t = &self.t;
        let scratch = e.shared(Elem::F32, (UNITS * t.pack) as usize);
        let (unit, zero, one) = (e.unit(), e.u32(0), e.u32(1));
        let (pack, columns, splits) = (e.u32(t.pack), e.u32(t.columns), e.u32(t.splits));
        for (p, packs) in self.sums.iter().enumerate() {
            for r in 0..t.rows {
                // A unit's columns lie behind one another, and behind those of the units before it.
                let first = e.mul(unit, pack);
                for (n, rows) in packs.iter().enumerate() {
                    let n = e.u32(n as u32);
                    let (at, sum) = (e.add(first, n), e.get(rows[r as usize]));
                    e.store(scratch, at, sum);
                }
                e.sync();
                let units = e.u32(UNITS);
                e.for_step(unit, columns, units, |e, column| {
                    let nothing = e.f32(0.0);
                    let total = e.var(nothing);
                    e.for_step(zero, splits, one, |e, split| {
                        let before = e.mul(split, columns);
                        let at = e.add(before, column);
                        let (more, known) = (e.load(scratch, at), e.get(total));
                        let known = e.add(known, more);
                        e.set(total, known);
                    });
                    let slot = self.slot(e, (p, zero), r, column);
                    let total = e.get(total);
                    e.store(kept, slot, total);
                });
                e.sync();
            }
        }
    }

    /// Each unit makes elements of the result of the sums.
    fn finish(
        &self,
        e: &mut Emit,
        (x, epilogue): (&mut Exprs<'_>, &Epilogue),
        side: &Side<'_>,
        repeat: (&[AxisId], &[Val]),
        (row0, column0, columns): (Val, Val, Val),
        (kept, output): (Shared, Buf),
    ) {
        let (plan, t) = (self.plan, &self.t);
        let memory = &epilogue.memory;
        let base = place(e, x, memory, &[repeat]);
        let (in_rows, in_columns) =
            (Offsets::of(e, x, &plan.rows, memory), Offsets::of(e, x, &plan.columns, memory));
        let products: Vec<_> = plan.products.iter().map(|p| p.result).collect();
        let splits = if plan.along { t.splits } else { 1 };
        let (unit, units, all) = (e.unit(), e.u32(UNITS), e.u32(t.rows * t.columns));
        e.for_step(unit, all, units, |e, flat| {
            let of_row = e.u32(t.columns);
            let (r, c) = (e.div(flat, of_row), e.rem(flat, of_row));
            let (row, column) = (e.add(row0, r), e.add(column0, c));
            let (row_exists, column_exists) = (e.lt(row, side.total), e.lt(column, columns));
            let inside = e.and(row_exists, column_exists);
            e.if_(inside, |e| {
                let sum = |e: &mut Emit, p: usize, partner: bool| {
                    let (one, mut total) = (e.u32(1), None);
                    let at = if partner { e.bits(Bits::Xor, flat, one) } else { flat };
                    for split in 0..splits {
                        let before = e.u32((p as u32 * splits + split) * t.rows * t.columns);
                        let at = e.add(before, at);
                        let part = e.load(kept, at);
                        total = Some(total.map_or(part, |sum| e.add(sum, part)));
                    }
                    total.expect("there is at least one split")
                };
                let column = epilogue.in_order(e, x, &plan.columns, column);
                let (down, right) = (in_rows.at(e, row), in_columns.at(e, column));
                let address = e.add(base, down);
                let address = e.add(address, right);
                if epilogue.plain(&products) {
                    let element = sum(e, 0, false);
                    return e.store(output, address, element);
                }
                x.scope(|x| {
                    let at = x.split(e, row, &plan.rows);
                    let across = x.split(e, column, &plan.columns);
                    let known = [repeat, (&plan.rows[..], &at[..]), (&plan.columns[..], &across[..])];
                    for (value, kept) in &side.folded {
                        let element = e.load(*kept, r);
                        x.define(*value, gather_index(x, *value, &known), element);
                    }
                    epilogue.store(e, x, &known, address, |e, x, address| {
                        let element = epilogue.element(e, x, &known, &products, &sum);
                        e.store(output, address, element);
                    });
                });
            });
        });
    }
}

/// Runs `body` where there is a matrix and the first number is below the second.
fn guarded(e: &mut Emit, exists: Option<Val>, inside: Option<(Val, Val)>, body: impl FnOnce(&mut Emit)) {
    let inside = inside.map(|(n, end)| e.lt(n, end));
    let both = match (exists, inside) {
        (Some(a), Some(b)) => Some(e.and(a, b)),
        (a, b) => a.or(b),
    };
    match both {
        Some(c) => e.if_(c, body),
        None => body(e),
    }
}
