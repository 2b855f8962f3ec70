//! Kernels that compute each element, or each row, on its own.
//!
//! Without reductions, a unit computes one element, or, on CUDA, as many as lie side by side in 16 bytes: what it reads and
//! writes of them is one access then. With reductions, the domain falls into rows: the results of the reductions
//! belong to a row, each reduction is one pass along its axis with its operand computed again, and a last pass makes
//! the outputs of the row. How a row is walked is decided by what is known when the kernel is built:
//!
//! - every pass has a fixed length of [`SHORT`] at most: a unit walks the row alone;
//! - on CUDA, every pass has so few packs that each unit of a plane has one: a plane walks the row, and folds by itself;
//! - otherwise a cube walks the row, its units side by side, and folds their parts through shared memory. A maximum and the sum of
//!   exponentials that it shifts are one pass then;
//! - if a row has one element and what it folds lies across rows, whose elements lie side by side, a cube has [`COLUMNS`] of
//!   them: some units read side by side, the others what lies further along.
//!
//! A row with resident values is walked by a cube too, which computes each of them once and keeps it in shared memory:
//! reductions by groups of units side by side, selections by counting for each element who comes before it.
//!
//! A reduction whose result does not belong to a row and does not fit into one (the scheduler makes none) is folded by each unit
//! that wants it. Scalar products are reductions too: the sum of the squares of each row is no matter for tiles.

use latentc_ir::{AxisId, DType, Function, Inst, Op, Size, ValueId};
use latentc_passes::stream_sums::{Shifted, shifted};

use super::emit::{Bin, Buf, Elem, Emit, PLANE, Shared, Un, Val};
use super::expr::{Exprs, Fold, Place};
use super::resident::Row;
use super::target::Target;
use crate::map::{MapPlan, fits};

/// The longest row that a unit walks alone.
const SHORT: u64 = 32;

/// Units of a cube that walks elements or short rows.
const UNITS: u32 = 256;

/// The most elements that a unit has at once.
const MOST: u64 = 8;

/// Rows side by side that a cube folds across.
pub(crate) const COLUMNS: u32 = 16;

/// How the domain is walked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Walk {
    /// One unit per index of all axes.
    Elements,
    /// One unit per so many indices of these axes.
    Units(Vec<AxisId>, u32),
    /// One plane per index of these axes.
    Planes(Vec<AxisId>),
    /// One cube of so many units per index of these axes.
    Cubes(Vec<AxisId>, u32),
    /// One cube per [`COLUMNS`] indices of these axes.
    Columns(Vec<AxisId>),
}

/// A map kernel's plan with all that follows from it.
#[derive(Clone, Debug)]
pub(crate) struct Map {
    pub(crate) domain: Vec<AxisId>,
    pub(crate) walk: Walk,
    /// How many elements side by side are read and written at once.
    pub(crate) pack: u32,
    /// What a cube keeps of its row, in order, with the numbers of elements.
    resident: Vec<(ValueId, usize)>,
}

impl Map {
    /// By the rule above.
    pub(crate) fn of(body: &Function, target: Target) -> Map {
        let mut map = Map::one_by_one(body);
        if target == Target::Cuda && map.resident.is_empty() {
            map.pack = pack(body, &map.domain, &map.walk);
            map.walk = match map.walk {
                Walk::Cubes(rows, _) if map.pack > 1 && across(body, &map.domain, &rows, COLUMNS) => {
                    Walk::Columns(rows)
                }
                // A plane is enough where its units have all packs of a row.
                Walk::Cubes(rows, _) if map.pack > 1 => {
                    match longest(body, &map.domain, &rows, map.pack.into()) {
                        Some(packs) if packs <= PLANE.into() => Walk::Planes(rows),
                        packs => Walk::Cubes(rows, cube(packs.unwrap_or(UNITS.into()))),
                    }
                }
                Walk::Units(rows, _) if across(body, &map.domain, &rows, map.pack) => {
                    Walk::Units(rows, map.pack)
                }
                walk => walk,
            };
        }
        map
    }

    /// Without packs.
    fn one_by_one(body: &Function) -> Map {
        let size = |axes: &[AxisId]| size(body, axes);
        let domain = MapPlan::of(body).domain;
        if let Ok(plan) = fits(body, &body.body.iter().collect::<Vec<_>>())
            && let Some(rows) = &plan.rows
            && !plan.resident.is_empty()
        {
            let length = |v: ValueId| size(&plan.in_row(body, v)).expect("what is resident has a fixed size");
            let resident: Vec<_> = plan.resident.iter().map(|&v| (v, length(v) as usize)).collect();
            // An instruction that folds or selects keeps as many units busy as its operand has elements.
            let wide =
                |inst: &&Inst| matches!(inst.op, Op::Reduce { .. } | Op::TopK { .. } | Op::TopIndices { .. });
            let widths = body.body.iter().filter(wide).map(|inst| length(inst.args[0]));
            let rest = size(&rest(&domain, rows)).expect("rows that fit have fixed sizes");
            let longest = widths.fold(rest, u64::max);
            let walk = Walk::Cubes(rows.clone(), cube(longest).max(SHORT as u32));
            return Map { domain, walk, pack: 1, resident };
        }
        // What is folded for the operands of a product belongs to its rows.
        let product = body.body.iter().find(|inst| inst.op == Op::Contract);
        let folded = product.or_else(|| body.body.iter().find(|inst| Fold::of(body, inst).is_some()));
        let rows = folded.map(|inst| {
            let row = body.ty(inst.result());
            domain.iter().copied().filter(|&a| row.has(a)).collect::<Vec<_>>()
        });
        let walk = match rows {
            Some(rows) if row_folds(body, &rows).next().is_some() => match longest(body, &domain, &rows, 1) {
                Some(n) if n <= SHORT => Walk::Units(rows, 1),
                Some(n) => Walk::Cubes(rows, cube(n)),
                None => Walk::Cubes(rows, UNITS),
            },
            _ => Walk::Elements,
        };
        Map { domain, walk, pack: 1, resident: Vec::new() }
    }

    /// Units of a cube.
    pub(crate) fn units(&self) -> u32 {
        match self.walk {
            Walk::Elements | Walk::Units(..) | Walk::Planes(_) | Walk::Columns(_) => UNITS,
            Walk::Cubes(_, units) => units,
        }
    }

    /// Bytes of shared memory.
    pub(crate) fn shared_bytes(&self) -> usize {
        match self.walk {
            Walk::Elements | Walk::Units(..) | Walk::Planes(_) => 0,
            Walk::Columns(_) => (UNITS * self.pack) as usize * Elem::F32.bytes(),
            Walk::Cubes(_, units) => {
                let kept =
                    self.resident.iter().map(|(_, len)| (len * Elem::F32.bytes()).next_multiple_of(16));
                units as usize * Elem::F32.bytes() + kept.sum::<usize>()
            }
        }
    }

    /// What a launch numbers by units or cubes: these axes, the last of them in so many at a time.
    pub(crate) fn grid(&self, body: &Function) -> Vec<Size> {
        let (axes, together) = match &self.walk {
            Walk::Elements => (&self.domain, self.pack),
            Walk::Units(rows, together) => (rows, *together),
            Walk::Planes(rows) | Walk::Cubes(rows, _) => (rows, 1),
            Walk::Columns(rows) => (rows, COLUMNS),
        };
        let mut sizes: Vec<_> = axes.iter().map(|&a| body.axis(a).size.clone()).collect();
        if let Some(Size::Fixed(last)) = sizes.last_mut() {
            *last /= u64::from(together);
        }
        if let Walk::Planes(_) = self.walk {
            sizes.push(Size::Fixed(PLANE.into()));
        }
        sizes
    }

    /// The kernel's instructions, over the parameters' buffers and the output.
    pub(crate) fn emit(&self, e: &mut Emit, mut x: Exprs<'_>, output: Buf) {
        x.in_packs(self.pack);
        let mut w = Writer { domain: &self.domain, resident: &self.resident, x, output };
        match &self.walk {
            Walk::Elements => {
                let total = w.x.total(e, &self.domain);
                let (flat, of_pack) = (e.unit_in_grid(), e.u32(self.pack));
                let packs = e.div(total, of_pack);
                let inside = e.lt(flat, packs);
                e.if_(inside, |e| {
                    let flat = e.mul(flat, of_pack);
                    let indices = w.x.beside(e, &self.domain, flat, self.pack);
                    w.x.at(Place { axes: self.domain.clone(), index: indices[0].clone(), flat });
                    w.store(e, &indices);
                });
            }
            Walk::Units(rows, together) => {
                let (total, of_unit) = (w.x.total(e, rows), e.u32(*together));
                let (flat, total) = (e.unit_in_grid(), e.div(total, of_unit));
                let inside = e.lt(flat, total);
                e.if_(inside, |e| match together {
                    1 => w.row(e, rows, flat, Team::Unit),
                    _ => w.columns(e, rows, flat, None, *together),
                });
            }
            Walk::Planes(rows) => {
                let (total, of_plane) = (w.x.total(e, rows), e.u32(PLANE));
                let unit = e.unit_in_grid();
                let (flat, lane) = (e.div(unit, of_plane), e.rem(unit, of_plane));
                let inside = e.lt(flat, total);
                e.if_(inside, |e| w.row(e, rows, flat, Team::Plane(lane)));
            }
            Walk::Cubes(rows, units) => {
                let scratch = e.shared(Elem::F32, *units as usize);
                let total = w.x.total(e, rows);
                let flat = e.cube();
                // All units of a cube agree, so those that wait for each other inside all come.
                let inside = e.lt(flat, total);
                e.if_(inside, |e| w.row(e, rows, flat, Team::Cube(scratch, *units)));
            }
            Walk::Columns(rows) => {
                let scratch = e.shared(Elem::F32, (UNITS * self.pack) as usize);
                let total = w.x.total(e, rows);
                let (flat, columns) = (e.cube(), e.u32(COLUMNS));
                let cubes = e.div(total, columns);
                let inside = e.lt(flat, cubes);
                e.if_(inside, |e| w.columns(e, rows, flat, Some(scratch), self.pack));
            }
        }
    }
}

/// How many elements of a domain, or terms of a row, a unit has at once: as many as 16 bytes hold of what is narrowest among what is read
/// and written, if all ops leave neighbours side by side, or make them of neighbours, and axes are whole packs.
fn pack(body: &Function, domain: &[AxisId], walk: &Walk) -> u32 {
    let packs = |a: &AxisId| body.axis(*a).size.fixed().is_some_and(|n| n > 0 && n.is_multiple_of(MOST));
    let in_place = body.body.iter().all(|inst| match inst.op {
        Op::Const(_)
        | Op::Position { .. }
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Select
        | Op::Cast
        | Op::Rename { .. }
        | Op::Broadcast { .. }
        | Op::Unpack { .. }
        | Op::Reduce { .. }
        | Op::Contract => true,
        // Neighbours are so before, too, but for those of two runs.
        Op::Merge { ref axes, .. } => {
            let size = axes.last().and_then(|a| body.axis(*a).size.fixed());
            size.is_some_and(|n| n > 0 && n.is_multiple_of(4))
        }
        // Whole packs lie behind one another, or are left out.
        Op::Slice { ref axis, ref into, start } => {
            [axis, into].into_iter().all(packs) && start.is_multiple_of(MOST)
        }
        Op::Concat { ref axes, .. } => axes.iter().all(packs),
        // One index is of all neighbours.
        Op::Gather { .. } => !domain.last().is_some_and(|last| body.ty(inst.args[1]).has(*last)),
        Op::Split { .. }
        | Op::Pack { .. }
        | Op::ScatterAdd { .. }
        | Op::TopK { .. }
        | Op::TopIndices { .. }
        | Op::Past { .. }
        | Op::Append { .. }
        | Op::Rope { .. }
        | Op::Softmax { .. }
        | Op::RmsNorm { .. }
        | Op::Call { .. } => false,
    });
    let folds: Vec<_> = body.body.iter().filter_map(|inst| Fold::of(body, inst)).collect();
    let (rows, by_row) = match walk {
        Walk::Elements => (&[][..], folds.is_empty()),
        Walk::Units(rows, _) | Walk::Planes(rows) | Walk::Cubes(rows, _) | Walk::Columns(rows) => {
            (&rows[..], row_folds(body, rows).count() == folds.len())
        }
    };
    let root = body.ty(body.results[0]);
    if !in_place || !root.dtype.is_float() || !by_row {
        return 1;
    }
    let is_narrow = |dtype: DType| matches!(dtype, DType::Bf16 | DType::F16);
    let narrow = is_narrow(root.dtype) || body.params.iter().any(|&p| is_narrow(body.ty(p).dtype));
    let rest = rest(domain, rows);
    // What a row is walked along, or what lies across rows.
    let walked = folds.iter().map(|f| &f.axes[..]).chain([&rest[..], rows]).filter_map(<[AxisId]>::last);
    let whole = |pack: &u64| {
        let fits = |a: &AxisId| body.axis(*a).size.fixed().is_some_and(|n| n.is_multiple_of(*pack));
        walked.clone().any(fits)
    };
    // Of what a short row folds, a unit reads more than of all else.
    let folded = |p: &&ValueId| folds.iter().any(|f| f.axes.iter().any(|a| body.ty(**p).has(*a)));
    let short = matches!(walk, Walk::Units(..))
        && !body.params.iter().filter(folded).any(|p| is_narrow(body.ty(*p).dtype));
    let packs = if narrow && !short { &[MOST, 4][..] } else { &[4][..] };
    packs.iter().copied().find(whole).unwrap_or(1) as u32
}

/// Whether rows of one element, which one fold makes of what lies across them, are neighbours in memory, so many at a time.
fn across(body: &Function, domain: &[AxisId], rows: &[AxisId], together: u32) -> bool {
    let mut folds = body.body.iter().filter_map(|inst| Some((inst, Fold::of(body, inst)?)));
    let (Some((inst, fold)), None) = (folds.next(), folds.next()) else { return false };
    let Some(&last) = domain.last() else { return false };
    let wide = |a: &&AxisId| body.axis(**a).size != Size::Fixed(1);
    let lies = |p: &ValueId| {
        let axes = &body.ty(*p).axes;
        !fold.axes.iter().any(|a| axes.contains(a)) || axes.iter().rfind(wide) == Some(&last)
    };
    together > 1
        && rest(domain, rows).is_empty()
        && body.ty(inst.result()).axes.iter().all(|a| rows.contains(a))
        && body.axis(last).size.fixed().is_some_and(|n| n.is_multiple_of(together.into()))
        && body.params.iter().all(lies)
}

/// Who walks a row.
#[derive(Clone, Copy)]
enum Team {
    /// This unit alone.
    Unit,
    /// The units of its plane, of which it is the one with this number.
    Plane(Val),
    /// The units of its cube, so many, which fold over some scratch.
    Cube(Shared, u32),
}

/// Writes the elements of the domain.
struct Writer<'a> {
    domain: &'a [AxisId],
    resident: &'a [(ValueId, usize)],
    x: Exprs<'a>,
    output: Buf,
}

impl<'a> Writer<'a> {
    /// A row, walked by a team.
    fn row(&mut self, e: &mut Emit, rows: &[AxisId], flat: Val, team: Team) {
        let body = self.x.body();
        let row = self.x.split(e, flat, rows);
        let in_row = |a: &AxisId| rows.iter().position(|r| r == a).map(|n| row[n]);
        let (first, step) = match team {
            Team::Unit => (e.u32(0), e.u32(1)),
            Team::Plane(lane) => (lane, e.u32(PLANE)),
            Team::Cube(_, units) => (e.unit(), e.u32(units)),
        };
        let whole = |e: &mut Emit, x: &Exprs<'_>, by: &Fold, part: Val| match team {
            Team::Unit => part,
            Team::Plane(_) => e.fold_plane(by.by(), part),
            Team::Cube(scratch, units) => e.fold_cube(by.by(), part, scratch, (units, x.target())),
        };
        let mut folds = row_folds(body, rows).peekable();
        let mut done = None;
        for inst in &body.body {
            if let Some((_, fold)) = folds.next_if(|(next, _)| next.result() == inst.result()) {
                if done == Some(inst.result()) {
                    continue;
                }
                let index = |inst: &Inst| -> Vec<Val> {
                    body.ty(inst.result()).axes.iter().filter_map(in_row).collect()
                };
                let here = (inst, &index(inst)[..]);
                let part = fold.start(e);
                let Some(Shifted { sum, least, .. }) = self.in_one_walk(inst, &fold, rows) else {
                    self.x.fold(e, here, &fold, part, first, step);
                    let part = e.get(part);
                    let whole = whole(e, &self.x, &fold, part);
                    self.x.define(inst.result(), here.1.to_vec(), whole);
                    continue;
                };
                let (zero, least) = (e.f32(0.0), e.f32(least as f32));
                let parts = [part, e.var(zero)];
                self.x.fold_shifted(e, here, (&fold, least), parts, (first, step));
                let [top, part] = parts.map(|part| e.get(part));
                let all = whole(e, &self.x, &fold, top);
                let [from, to] = [top, all].map(|top| e.binary(Bin::Max, top, least));
                let scale = e.sub(from, to);
                let scale = e.unary(Un::Exp, scale);
                let part = e.mul(part, scale);
                let add = Fold::of(body, sum).expect("it is a sum");
                let total = whole(e, &self.x, &add, part);
                self.x.define(inst.result(), here.1.to_vec(), all);
                self.x.define(sum.result(), index(sum), total);
                done = Some(sum.result());
            } else if let Some(&(_, len)) = self.resident.iter().find(|(v, _)| *v == inst.result())
                && let Team::Cube(scratch, units) = team
            {
                Row { axes: rows, index: &row, scratch, units }.keep(e, &mut self.x, inst, len);
            }
        }
        let rest = rest(self.domain, rows);
        // Neighbours along another axis are none in memory.
        let pack = if rest.last() == self.domain.last() { self.x.pack_of(&rest) } else { 1 };
        let (total, of_pack) = (self.x.total(e, &rest), e.u32(pack));
        let packs = e.div(total, of_pack);
        e.for_step(first, packs, step, |e, flat| {
            let flat = e.mul(flat, of_pack);
            let others = self.x.beside(e, &rest, flat, pack);
            let at = |others: &Vec<Val>| {
                let other = |a: &AxisId| rest.iter().position(|r| r == a).map(|n| others[n]);
                self.domain.iter().filter_map(|a| in_row(a).or_else(|| other(a))).collect()
            };
            let indices: Vec<Vec<Val>> = others.iter().map(at).collect();
            self.store(e, &indices);
        });
    }

    /// The sum of exponentials that a maximum shifts, if both are folded in packs, and so in one walk.
    fn in_one_walk(&self, top: &Inst, fold: &Fold, rows: &[AxisId]) -> Option<Shifted<'a>> {
        let body = self.x.body();
        let made = |v: ValueId| body.body.iter().find(|i| i.result() == v);
        let sums = row_folds(body, rows).filter_map(|(inst, _)| shifted(made, inst));
        let mut own = sums.filter(|s| s.top.result() == top.result());
        own.next().filter(|_| self.x.pack_of(&fold.axes) > 1)
    }

    /// Rows of one element side by side, of which a unit has a pack. With some scratch, the cube has [`COLUMNS`] of them: the units
    /// of a pack share out its terms, and fold what they have.
    fn columns(&mut self, e: &mut Emit, rows: &[AxisId], flat: Val, cube: Option<Shared>, pack: u32) {
        let body = self.x.body();
        let (inst, fold) = row_folds(body, rows).next().expect("one fold makes the rows");
        let packs = COLUMNS / pack;
        let (unit, of_packs, of_pack) = (e.unit(), e.u32(packs), e.u32(pack));
        let (number, from, step) = match cube {
            None => (flat, e.u32(0), e.u32(1)),
            Some(_) => {
                let before = e.mul(flat, of_packs);
                let own = e.rem(unit, of_packs);
                (e.add(before, own), e.div(unit, of_packs), e.u32(UNITS / packs))
            }
        };
        let first = e.mul(number, of_pack);
        let indices = self.x.beside(e, rows, first, pack);
        let along = |axes: &[AxisId], index: &[Val]| -> Vec<Val> {
            axes.iter().filter_map(|a| rows.iter().position(|r| r == a).map(|n| index[n])).collect()
        };
        let results: Vec<_> = indices.iter().map(|at| along(&body.ty(inst.result()).axes, at)).collect();
        let sums: Vec<_> = results.iter().map(|_| fold.start(e)).collect();
        let terms = self.x.total(e, &fold.axes);
        e.for_step(from, terms, step, |e, flat| {
            self.x.scope(|x| {
                let moved = x.split(e, flat, &fold.axes);
                let moved: Vec<_> = fold.axes.iter().copied().zip(moved).collect();
                let terms: Vec<_> = results.iter().map(|at| x.term(e, (inst, at), &moved)).collect();
                for (&sum, term) in sums.iter().zip(terms) {
                    let old = e.get(sum);
                    let new = e.binary(fold.by(), old, term);
                    e.set(sum, new);
                }
            });
        });
        let mut wholes: Vec<_> = sums.iter().map(|&sum| e.get(sum)).collect();
        let mut writes = e.bool(true);
        if let Some(scratch) = cube {
            let place = |e: &mut Emit, n: usize, unit: Val| {
                let before = e.u32(n as u32 * UNITS);
                e.add(before, unit)
            };
            for (n, &sum) in wholes.iter().enumerate() {
                let at = place(e, n, unit);
                e.store(scratch, at, sum);
            }
            e.sync();
            let mut half = UNITS / 2;
            while half >= packs {
                let width = e.u32(half);
                let active = e.lt(unit, width);
                e.if_(active, |e| {
                    let beyond = e.add(unit, width);
                    for n in 0..sums.len() {
                        let (at, other) = (place(e, n, unit), place(e, n, beyond));
                        let (a, b) = (e.load(scratch, at), e.load(scratch, other));
                        let both = e.binary(fold.by(), a, b);
                        e.store(scratch, at, both);
                    }
                });
                e.sync();
                half /= 2;
            }
            for (n, whole) in wholes.iter_mut().enumerate() {
                let at = place(e, n, unit);
                *whole = e.load(scratch, at);
            }
            writes = e.lt(unit, of_packs);
        }
        e.if_(writes, |e| {
            for (at, whole) in results.into_iter().zip(wholes) {
                self.x.define(inst.result(), at, whole);
            }
            let indices: Vec<_> = indices.iter().map(|at| along(self.domain, at)).collect();
            self.store(e, &indices);
        });
    }

    /// Computes the elements at indices of the domain side by side and stores them.
    fn store(&mut self, e: &mut Emit, indices: &[Vec<Val>]) {
        let body = self.x.body();
        let root = body.results[0];
        let output = self.output;
        let index = &indices[0][..];
        let Some(Inst { op: Op::Append { to, .. }, args, .. }) = body.body.last() else {
            let elements: Vec<_> = indices.iter().map(|index| self.x.element(e, root, index)).collect();
            let address = self.x.address(e, index, self.domain);
            return e.store_beside(output, address, &elements);
        };
        let along = |a: &AxisId| self.domain.iter().position(|d| d == a).map(|n| index[n]);
        let at: Vec<_> = body.ty(args[2]).axes.iter().filter_map(along).collect();
        let place = self.x.element(e, args[2], &at);
        // A negative position becomes a large one, so one comparison finds all that lie outside of the cache.
        let place = e.cast(place, Elem::U32);
        let inside = e.lt(place, self.x.extent(*to));
        e.if_(inside, |e| {
            let element = self.x.element(e, args[1], index);
            let cache = &body.ty(root).axes;
            let there = |a: &AxisId| if a == to { Some(place) } else { along(a) };
            let at: Vec<_> = cache.iter().filter_map(there).collect();
            let address = self.x.address(e, &at, cache);
            e.store(output, address, element);
        });
    }
}

/// How many indices there are of these axes, if all are of fixed size.
fn size(body: &Function, axes: &[AxisId]) -> Option<u64> {
    let sizes = axes.iter().map(|&a| body.axis(a).size.fixed());
    sizes.into_iter().try_fold(1u64, |total, n| Some(total.saturating_mul(n?)))
}

/// Units of a cube that has so many terms or elements of a row for them.
fn cube(longest: u64) -> u32 {
    longest.clamp(1, UNITS.into()).next_power_of_two() as u32
}

/// The most terms, or packs of terms, that a walk along a row has, if sizes are fixed.
fn longest(body: &Function, domain: &[AxisId], rows: &[AxisId], pack: u64) -> Option<u64> {
    let rest = rest(domain, rows);
    let packs = |axes: &[AxisId]| {
        let whole =
            axes.last().and_then(|a| body.axis(*a).size.fixed()).is_some_and(|n| n.is_multiple_of(pack));
        size(body, axes).map(|n| if whole { n / pack } else { n })
    };
    let walks = row_folds(body, rows).map(|(_, fold)| packs(&fold.axes));
    walks.chain([packs(&rest)]).try_fold(1, |longest, n| Some(n?.max(longest)))
}

/// The axes of a row.
fn rest(domain: &[AxisId], rows: &[AxisId]) -> Vec<AxisId> {
    domain.iter().copied().filter(|a| !rows.contains(a)).collect()
}

/// The instructions that fold and whose results belong to a row, in order.
fn row_folds<'a>(body: &'a Function, rows: &[AxisId]) -> impl Iterator<Item = (&'a Inst, Fold)> {
    body.body.iter().filter_map(move |inst| {
        let axes = &body.ty(inst.result()).axes;
        let in_row = axes.iter().all(|a| rows.contains(a));
        Fold::of(body, inst).filter(|_| in_row).map(|fold| (inst, fold))
    })
}
