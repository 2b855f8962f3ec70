//! Products with few rows: what is wide is read once, in accesses of 16 bytes, with several in flight for each unit.
//!
//! A cube has up to 8 rows of one index of the batch, and some columns. Where there is room, all that it wants of the narrow operand is
//! computed into shared memory before anything else, while the first of what is read of the wide one is on its way, and then the
//! wide one is read without a stop: into registers if they hold all that a unit reads, past them if not ([`ring`]). Else it walks the summed
//! axes in chunks, with the same for each. The axes are those of a [`FewPlan`].
//!
//! *Along* the summed axes, a plane of 32 units has up to 4 columns, or shares them with others where there are too few to keep
//! a GPU busy; its units read side by side and fold what they summed in the end. *Across* the columns, each unit has some that lie
//! side by side, and every so-manieth index of the summed axes; the cube adds up what its units summed. The sums meet in shared
//! memory, and each unit makes some elements of the result of them.

mod finish;
mod multiply;
mod ring;
mod stage;
mod tiling;
mod wide;

use latentc_ir::{AxisId, Function, Inst, Op, ValueId};

use super::contract::{Offsets, Side, fold_rows, gather_index};
use super::emit::{Bin, Buf, Elem, Emit, Pack, Shared, Val, Var};
use super::epilogue::Epilogue;
use super::expr::{Exprs, Fold};
use super::target::Target;
use crate::few::FewPlan;

use ring::Ring;
pub(crate) use tiling::Tiling;
use wide::{Part, Wide};

/// Units of a cube.
pub(crate) const UNITS: u32 = 256;
/// Units that fold together.
const PLANE: u32 = 32;
/// Bytes of an access at its widest.
const PACK_BYTES: u64 = 16;
/// Elements of narrow operands that each unit reads at once.
const AT_ONCE: u32 = 16;
/// The same where it reads packs of them.
const PACKS_AT_ONCE: u32 = 4;

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

/// The wide operands that are read before the grids ahead are done (see [`overlap`](super::overlap)): all of them where the first of what is
/// read is on its way before the narrow operand is made, and no index says what that is.
pub(crate) fn early(body: &Function, plan: &FewPlan, rows: u32) -> Vec<ValueId> {
    let t = Tiling::of(body, plan, rows, Target::Cuda);
    if t.whole.is_none() || plan.products.iter().any(|p| p.index.is_some()) {
        return Vec::new();
    }
    plan.products.iter().flat_map(|p| p.table.held()).copied().collect()
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
    /// For each product, what its wide operand is held in.
    wides: Vec<Vec<(Part, Buf)>>,
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
        let staged: Vec<_> = narrow.map(|value| Staged { value, memory: e.common(Elem::F32) }).collect();
        let kept = e.shared(Elem::F32, t.sums(plan) as usize);
        let zero = e.f32(0.0);
        let each = if plan.along { t.each } else { t.pack };
        let row_sums = |e: &mut Emit| (0..t.rows).map(|_| e.var(zero)).collect::<Vec<_>>();
        let sums = plan.products.iter().map(|_| (0..each).map(|_| row_sums(e)).collect()).collect::<Vec<_>>();
        let starts = plan.products.iter().map(|p| Offsets::of(e, x, &plan.columns, &p.elements.axes));
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
        let wides = plan.products.iter().map(|p| {
            let parts = Part::of(body, p, t.pack, target).into_iter();
            parts.map(|part| (part, buffer(part.value).expect("a parameter, by the plan"))).collect()
        });
        let wides = wides.collect();
        let few = Few { plan, t, target, repeat, wides, columns: columns_at, sums, staged };
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
    /// The wide operands at an index of the outer axes. What is known of elements is in scope.
    fn wides(&self, e: &mut Emit, x: &mut Exprs<'_>, outer: Val) -> Vec<Wide> {
        let outer_index = x.split(e, outer, &self.plan.outer);
        let known = [self.repeat, (&self.plan.outer[..], &outer_index[..])];
        let products = self.plan.products.iter();
        products
            .map(|p| {
                let memory = &p.elements.axes;
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
                Wide { base, exists }
            })
            .collect()
    }

    /// Where indices of the inner axes lie in each wide operand.
    fn deep(&self, e: &mut Emit, x: &Exprs<'_>) -> Vec<Offsets> {
        let memory = self.plan.products.iter().map(|p| &p.elements.axes);
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
        // What is known of elements is so in the scope of a round.
        let packs = |e: &mut Emit, x: &mut Exprs<'a>, round: Val| {
            x.scope(|x| {
                let (o, round) = split(e, round);
                let wides = self.wides(e, x, o);
                self.packs(e, (&wides, &deep), &span, round)
            })
        };
        let read = |e: &mut Emit, x: &mut Exprs<'a>, round: Val| {
            let packs = packs(e, x, round);
            self.load_all(e, &packs)
        };
        let work = |e: &mut Emit, x: &mut Exprs<'a>, round: Val, packs: &[Pack]| {
            x.scope(|x| {
                let (o, round) = split(e, round);
                let exist: Vec<_> = self.wides(e, x, o).into_iter().map(|w| w.exists).collect();
                let before = e.mul(o, floats);
                self.work(e, &exist, &span, (round, zero, before), packs);
            });
        };
        let rounds = outer * each;
        let await_grids = |e: &mut Emit, x: &Exprs<'a>| {
            if self.target == Target::Cuda && !early(x.body(), self.plan, self.t.rows).is_empty() {
                e.await_grids();
            }
        };
        let last = e.u32(rounds);
        if self.t.ring > 0 {
            let ring = Ring::new(e, self);
            for n in 0..self.t.ring {
                let n = e.u32(n);
                let packs = packs(e, x, n);
                self.copy(e, (&ring, n), &packs);
                e.group_copies();
            }
            await_grids(e, x);
            fold(e, x, side);
            self.stage(e, x, side, (zero, depth), (zero, outer));
            e.sync();
            if rounds == self.t.ring {
                for n in 0..rounds {
                    e.await_groups_but(rounds - 1 - n);
                    let round = e.u32(n);
                    let found = self.copied(e, (&ring, round));
                    work(e, x, round, &found);
                }
                return;
            }
            let slots = e.u32(self.t.ring);
            e.for_step(zero, last, one, |e, round| {
                e.await_groups_but(self.t.ring - 1);
                let slot = e.rem(round, slots);
                let found = self.copied(e, (&ring, slot));
                work(e, x, round, &found);
                let next = e.add(round, slots);
                let more = e.lt(next, last);
                e.if_(more, |e| {
                    let packs = packs(e, x, next);
                    self.copy(e, (&ring, slot), &packs);
                });
                // A group that may be empty: the last one has as many behind it as any.
                e.group_copies();
            });
            return;
        }
        let first = read(e, x, zero);
        let vars: Vec<_> =
            if rounds > 1 { first.iter().map(|p| e.pack_var(p)).collect() } else { Vec::new() };
        await_grids(e, x);
        fold(e, x, side);
        self.stage(e, x, side, (zero, depth), (zero, outer));
        e.sync();
        if rounds == 1 {
            return work(e, x, zero, &first);
        }
        e.for_step(zero, last, one, |e, round| {
            let packs: Vec<_> = vars.iter().zip(&first).map(|(v, like)| e.get_pack(v, like)).collect();
            let next = e.add(round, one);
            let more = e.lt(next, last);
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
                let wides = self.wides(e, x, o);
                let exist: Vec<_> = wides.iter().map(|w| w.exists).collect();
                let (depth, chunk) = (x.total(e, &self.plan.inner), e.u32(self.t.chunk));
                e.for_step(zero, depth, chunk, |e, k0| {
                    let span = self.span(e, k0, depth);
                    let deep = self.deep(e, x);
                    let read = |e: &mut Emit, round| {
                        let packs = self.packs(e, (&wides, &deep), &span, round);
                        self.load_all(e, &packs)
                    };
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

    /// What a round reads: packs of all products and columns, each by its product and its place.
    fn packs(
        &self,
        e: &mut Emit,
        (wides, deep): (&[Wide], &[Offsets]),
        span: &Span,
        round: Val,
    ) -> Vec<(usize, Val)> {
        if self.plan.along {
            self.packs_along(e, wides, span, round)
        } else {
            self.packs_across(e, (wides, deep), span, round)
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
}
