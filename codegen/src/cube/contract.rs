//! Products of two tensors, summed over their common axes: tiles of 64 by 64 elements, in f32.
//!
//! The axes of each group (see [`ContractPlan`]) are numbered together, so the product is that of matrices, repeated over a batch.
//! A cube computes one tile of one repetition: its 256 units bring 16 numbers of depth of both operands into shared
//! memory at a time, and each keeps 4 by 4 sums in registers. Numbers beyond an edge count as 0 and are not stored.
//!
//! An operand that is an expression is computed on its way to shared memory; what it folds of a row is folded before. The result
//! is computed from the sums of all products.

use std::array;

use latentc_ir::{AxisId, Function, Inst, Op, ValueId};

use super::emit::{Bin, Buf, Cmp, Elem, Emit, Shared, Val, Var};
use super::epilogue::Epilogue;
use super::expr::{Exprs, Fold};
use crate::contract::ContractPlan;

/// Rows and columns of a tile.
pub(crate) const TILE: u32 = 64;
/// Units along a side of a tile.
const SIDE: u32 = 16;
/// Rows and columns of a tile that a unit sums.
const EACH: u32 = TILE / SIDE;
/// Depth that is brought in at a time.
const DEPTH: u32 = 16;
/// Units of a cube.
pub(crate) const UNITS: u32 = SIDE * SIDE;
/// Elements of an operand that a unit brings in.
const LOADS: u32 = TILE * DEPTH / UNITS;
/// From one depth to the next in shared memory. One more than a tile, so that units which write along the depth meet in no bank.
const PITCH: u32 = TILE + 1;

/// Bytes of shared memory.
pub(crate) fn shared_bytes(body: &Function, plan: &ContractPlan) -> usize {
    let bytes = |elements: u32| (elements as usize * Elem::F32.bytes()).next_multiple_of(16);
    let folds: usize = folds(body, plan).map(|f| f.len()).iter().sum();
    let scratch = if folds > 0 { bytes(UNITS) } else { 0 };
    operands(body, plan).len() * bytes(PITCH * DEPTH) + folds * bytes(TILE) + scratch
}

/// The distinct operands, each with the side that it is on: 0 has the axes m, 1 the axes n.
fn operands(body: &Function, plan: &ContractPlan) -> Vec<(ValueId, usize)> {
    let mut distinct = Vec::new();
    for product in plan.products(body) {
        for operand in product.operands.into_iter().zip([0, 1]) {
            if !distinct.contains(&operand) {
                distinct.push(operand);
            }
        }
    }
    distinct
}

/// What is folded for each row of a side, once for a tile. What belongs to no row is folded where it is wanted.
fn folds<'f>(body: &'f Function, plan: &ContractPlan) -> [Vec<(&'f Inst, Fold)>; 2] {
    let mut sides = [Vec::new(), Vec::new()];
    for inst in body.body.iter().filter(|i| i.op != Op::Contract) {
        let Some(fold) = Fold::of(body, inst) else { continue };
        let axes = &body.ty(inst.result()).axes;
        let of = |rows: &[AxisId]| axes.iter().all(|a| plan.batch.contains(a) || rows.contains(a));
        if of(&plan.m) {
            sides[0].push((inst, fold));
        } else if of(&plan.n) {
            sides[1].push((inst, fold));
        }
    }
    sides
}

/// Axes that lie behind one another in a tensor, so that their common number needs no division.
pub(super) struct Run {
    /// The number of indices of what follows in the group.
    after: Val,
    /// The number of indices, but for the first run of a group, which needs none.
    wrap: Option<Val>,
    /// The step in the tensor, in elements.
    stride: Val,
}

/// Where the elements of a group of axes lie in one tensor.
pub(super) struct Offsets(Vec<Run>);

impl Offsets {
    /// For the axes of `group` in a tensor with the axes `memory`, which may lack some: these lead nowhere.
    pub(super) fn of(e: &mut Emit, x: &Exprs<'_>, group: &[AxisId], memory: &[AxisId]) -> Offsets {
        let one = e.u32(1);
        // An axis of extent 1 is always at 0, and lies between others that would be neighbours without it.
        let wide = |a: &AxisId| x.extent(*a) != one;
        let memory_wide: Vec<_> = memory.iter().copied().filter(wide).collect();
        let mut runs: Vec<Vec<AxisId>> = Vec::new();
        for &a in group.iter().filter(|a| wide(a)) {
            let follows = |b: AxisId| memory_wide.windows(2).any(|w| w == [b, a]);
            match runs.last_mut() {
                Some(run) if run.last().is_some_and(|&b| follows(b)) => run.push(a),
                _ => runs.push(vec![a]),
            }
        }
        let mut after = one;
        let mut offsets = Vec::new();
        for (n, run) in runs.iter().enumerate().rev() {
            let size = x.total(e, run);
            let last = *run.last().expect("a run has an axis");
            if let Some(place) = memory.iter().position(|&m| m == last) {
                let stride = x.total(e, &memory[place + 1..]);
                offsets.push(Run { after, wrap: (n > 0).then_some(size), stride });
            }
            after = e.mul(after, size);
        }
        Offsets(offsets)
    }

    /// Where the element with this number lies.
    pub(super) fn at(&self, e: &mut Emit, number: Val) -> Val {
        let mut offset = e.u32(0);
        for run in &self.0 {
            let mut index = e.div(number, run.after);
            if let Some(wrap) = run.wrap {
                index = e.rem(index, wrap);
            }
            let step = e.mul(index, run.stride);
            offset = e.add(offset, step);
        }
        offset
    }
}

/// Where a tile is: a side's group of axes, with the number of its first row and of all.
pub(super) struct Side<'p> {
    pub(super) group: &'p [AxisId],
    pub(super) first: Val,
    pub(super) total: Val,
    /// What was folded for each row, and where it is kept.
    pub(super) folded: Vec<(ValueId, Shared)>,
}

/// The index of a value whose axes are among these groups.
pub(super) fn gather_index(x: &Exprs<'_>, value: ValueId, known: &[(&[AxisId], &[Val])]) -> Vec<Val> {
    let along = |a: &AxisId| {
        let found = known.iter().find_map(|(group, index)| Some(index[group.iter().position(|g| g == a)?]));
        found.expect("the plan's groups are all axes of a product")
    };
    x.body().ty(value).axes.iter().map(along).collect()
}

/// Folds what the rows of a side have, of which there are `tile` at most, all units of the cube on one row at a time.
pub(super) fn fold_rows<'f>(
    e: &mut Emit,
    x: &mut Exprs<'f>,
    side: &mut Side<'_>,
    folds: &[(&'f Inst, Fold)],
    (batch_axes, batch): (&[AxisId], &[Val]),
    (scratch, tile, epilogue): (Shared, u32, &Epilogue),
) {
    let (zero, one, most) = (e.u32(0), e.u32(1), e.u32(tile));
    for (inst, fold) in folds {
        let kept = e.shared(Elem::F32, tile as usize);
        let left = e.sub(side.total, side.first);
        let rows = e.binary(Bin::Min, left, most);
        e.for_step(zero, rows, one, |e, row| {
            x.scope(|x| {
                let number = e.add(side.first, row);
                let number = epilogue.in_order(e, x, side.group, number);
                let at = x.split(e, number, side.group);
                let known = [(batch_axes, batch), (side.group, &at[..])];
                for (value, kept) in &side.folded {
                    let element = e.load(*kept, row);
                    x.define(*value, gather_index(x, *value, &known), element);
                }
                let index = gather_index(x, inst.result(), &known);
                let part = fold.start(e);
                let (from, step) = (e.unit(), e.u32(UNITS));
                x.fold(e, (*inst, &index), fold, part, from, step);
                let part = e.get(part);
                let whole = e.fold_cube(fold.by(), part, scratch, (UNITS, x.target()));
                let unit = e.unit();
                let writes = e.cmp(Cmp::Eq, unit, zero);
                e.if_(writes, |e| e.store(kept, row, whole));
            });
        });
        side.folded.push((inst.result(), kept));
    }
    if !folds.is_empty() {
        e.sync();
    }
}

/// An operand on its way to shared memory: its own axes ("rows", whichever operand it is) by depth.
struct Operand {
    value: ValueId,
    side: usize,
    tile: Shared,
    /// Where it lies, if it is a buffer: the offsets of a depth.
    memory: Option<(Buf, Offsets)>,
    /// For each element that this unit brings in: its row and depth in the tile, and what is known before the loop over
    /// depth, namely where its row starts and whether there is such a row.
    loads: [(Val, Val, Val, Val); LOADS as usize],
}

impl Operand {
    fn new(
        e: &mut Emit,
        x: &Exprs<'_>,
        (value, side, buf): (ValueId, usize, Option<Buf>),
        batch: (&[AxisId], Val),
        (rows, epilogue): (&Side<'_>, &Epilogue),
        depth: &[AxisId],
    ) -> Operand {
        let memory = &x.body().ty(value).axes;
        let tile = e.shared(Elem::F32, (PITCH * DEPTH) as usize);
        let base = Offsets::of(e, x, batch.0, memory).at(e, batch.1);
        let starts = Offsets::of(e, x, rows.group, memory);
        // Neighbouring units read neighbouring elements.
        let along_rows = memory.last().is_some_and(|a| rows.group.contains(a));
        let unit = e.unit();
        let loads = array::from_fn(|n| {
            let first = e.u32(n as u32 * UNITS);
            let at = e.add(unit, first);
            let fast = e.u32(if along_rows { TILE } else { DEPTH });
            let (slow, fast) = (e.div(at, fast), e.rem(at, fast));
            let (row, k) = if along_rows { (fast, slow) } else { (slow, fast) };
            let number = e.add(rows.first, row);
            let exists = e.lt(number, rows.total);
            let number = epilogue.in_order(e, x, rows.group, number);
            let start = starts.at(e, number);
            let start = e.add(base, start);
            (row, k, start, exists)
        });
        let memory = buf.map(|buf| (buf, Offsets::of(e, x, depth, memory)));
        Operand { value, side, tile, memory, loads }
    }

    /// Brings in the tile at a depth.
    fn load(
        &self,
        e: &mut Emit,
        (x, epilogue): (&mut Exprs<'_>, &Epilogue),
        (rows, batch): (&Side<'_>, (&[AxisId], &[Val])),
        (k0, depth, k_axes): (Val, Val, &[AxisId]),
    ) {
        for (row, k, start, exists) in self.loads {
            let number = e.add(k0, k);
            let deep = e.lt(number, depth);
            let inside = e.and(exists, deep);
            let zero = e.f32(0.0);
            let loaded = e.var(zero);
            e.if_(inside, |e| {
                let element = match &self.memory {
                    Some((buf, offsets)) => {
                        let step = offsets.at(e, number);
                        let address = e.add(start, step);
                        e.load(*buf, address)
                    }
                    None => x.scope(|x| {
                        let number_of_row = e.add(rows.first, row);
                        let in_order = epilogue.in_order(e, x, rows.group, number_of_row);
                        let at = x.split(e, in_order, rows.group);
                        let deep = x.split(e, number, k_axes);
                        let known = [batch, (rows.group, &at[..]), (k_axes, &deep[..])];
                        for (value, kept) in &rows.folded {
                            let element = e.load(*kept, row);
                            x.define(*value, gather_index(x, *value, &known), element);
                        }
                        let index = gather_index(x, self.value, &known);
                        x.element(e, self.value, &index)
                    }),
                };
                let element = e.cast(element, Elem::F32);
                e.set(loaded, element);
            });
            let pitch = e.u32(PITCH);
            let place = e.mul(k, pitch);
            let place = e.add(place, row);
            let loaded = e.get(loaded);
            e.store(self.tile, place, loaded);
        }
    }

    /// This unit's elements at a depth of the tile.
    fn read(&self, e: &mut Emit, k: u32, own: &Own) -> [Val; EACH as usize] {
        array::from_fn(|n| {
            let there = e.u32(k * PITCH + own.steps[n]);
            let place = e.add(own.first, there);
            e.load(self.tile, place)
        })
    }
}

/// The rows or columns of a tile that a unit has: every 16th, but partners of a rotation side by side.
struct Own {
    first: Val,
    steps: [u32; EACH as usize],
}

impl Own {
    /// Of the unit with this number along a side of the tile.
    fn of(e: &mut Emit, number: Val, partners: bool) -> Own {
        let together = if partners { 2 } else { 1 };
        let of_unit = e.u32(together);
        let first = e.mul(number, of_unit);
        let steps = array::from_fn(|n| n as u32 / together * together * SIDE + n as u32 % together);
        Own { first, steps }
    }
}

/// The kernel's instructions, over the buffers of the parameters and the output.
pub(crate) fn emit(
    e: &mut Emit,
    mut x: Exprs<'_>,
    plan: &ContractPlan,
    buffer: impl Fn(ValueId) -> Option<Buf>,
    output: Buf,
) {
    let x = &mut x;
    let body: &Function = x.body();
    let epilogue = Epilogue::of(body);
    let [m, n, depth] = [&plan.m, &plan.n, &plan.k].map(|axes| x.total(e, axes));

    // Tiles are numbered along n, then m, then the batch.
    let (cube, tile) = (e.cube(), e.u32(TILE));
    let [m_tiles, n_tiles] = [m, n].map(|size| e.tiles(size, TILE));
    let repeats = x.total(e, &plan.batch);
    let row_of_tiles = e.div(cube, n_tiles);
    let batch = e.div(row_of_tiles, m_tiles);
    let [row0, col0] = [e.rem(row_of_tiles, m_tiles), e.rem(cube, n_tiles)].map(|number| e.mul(number, tile));
    // All units of a cube agree.
    let inside = e.lt(batch, repeats);

    e.if_(inside, |e| {
        let batch_index = x.split(e, batch, &plan.batch);
        let repeat = (&plan.batch[..], &batch_index[..]);
        let mut sides = [
            Side { group: &plan.m, first: row0, total: m, folded: Vec::new() },
            Side { group: &plan.n, first: col0, total: n, folded: Vec::new() },
        ];
        let operands: Vec<_> = operands(body, plan)
            .into_iter()
            .map(|(v, side)| {
                let side_of = (&sides[side], &epilogue);
                Operand::new(e, x, (v, side, buffer(v)), (&plan.batch, batch), side_of, &plan.k)
            })
            .collect();
        let folds = folds(body, plan);
        if folds.iter().any(|f| !f.is_empty()) {
            let scratch = e.shared(Elem::F32, UNITS as usize);
            for (side, folds) in sides.iter_mut().zip(&folds) {
                fold_rows(e, x, side, folds, repeat, (scratch, TILE, &epilogue));
            }
        }
        let (unit, side) = (e.unit(), e.u32(SIDE));
        let (ty, tx) = (e.div(unit, side), e.rem(unit, side));
        let partners = [&plan.m, &plan.n].map(|group| epilogue.along(body, group).is_some());
        let own = [Own::of(e, ty, partners[0]), Own::of(e, tx, partners[1])];
        let zero = e.f32(0.0);
        let products = plan.products(body);
        let sums: Vec<[[Var; EACH as usize]; EACH as usize]> =
            products.iter().map(|_| array::from_fn(|_| array::from_fn(|_| e.var(zero)))).collect();

        let (from, step) = (e.u32(0), e.u32(DEPTH));
        e.for_step(from, depth, step, |e, k0| {
            for operand in &operands {
                let side = (&sides[operand.side], repeat);
                operand.load(e, (&mut *x, &epilogue), side, (k0, depth, &plan.k));
            }
            e.sync();
            for k in 0..DEPTH {
                let brought: Vec<_> = operands.iter().map(|o| o.read(e, k, &own[o.side])).collect();
                for (product, sums) in products.iter().zip(&sums) {
                    let of = |side: usize| {
                        let wanted = |o: &Operand| o.value == product.operands[side] && o.side == side;
                        brought[operands.iter().position(wanted).expect("each operand is brought in")]
                    };
                    let (left, right) = (of(0), of(1));
                    for (row, l) in sums.iter().zip(left) {
                        for (sum, r) in row.iter().zip(right) {
                            let old = e.get(*sum);
                            let new = e.fma(l, r, old);
                            e.set(*sum, new);
                        }
                    }
                }
            }
            e.sync();
        });

        let memory = &epilogue.memory;
        let base = Offsets::of(e, x, &plan.batch, memory).at(e, batch);
        let (in_m, in_n) = (Offsets::of(e, x, &plan.m, memory), Offsets::of(e, x, &plan.n, memory));
        let values: Vec<_> = products.iter().map(|p| p.inst.result()).collect();
        for r in 0..EACH as usize {
            let below = e.u32(own[0].steps[r]);
            let in_tile = e.add(own[0].first, below);
            let i = e.add(row0, in_tile);
            let row_exists = e.lt(i, m);
            let i = epilogue.in_order(e, x, &plan.m, i);
            let start = in_m.at(e, i);
            let start = e.add(base, start);
            for c in 0..EACH as usize {
                let right = e.u32(own[1].steps[c]);
                let across = e.add(own[1].first, right);
                let j = e.add(col0, across);
                let col_exists = e.lt(j, n);
                let inside = e.and(row_exists, col_exists);
                e.if_(inside, |e| {
                    let j = epilogue.in_order(e, x, &plan.n, j);
                    let step = in_n.at(e, j);
                    let address = e.add(start, step);
                    // One of the two sides has partners: there is one rotation.
                    let sum = |e: &mut Emit, p: usize, partner: bool| {
                        let [down, right] = partners.map(|has| usize::from(partner && has));
                        e.get(sums[p][r ^ down][c ^ right])
                    };
                    if epilogue.plain(&values) {
                        let element = sum(e, 0, false);
                        return e.store(output, address, element);
                    }
                    x.scope(|x| {
                        let (at_m, at_n) = (x.split(e, i, &plan.m), x.split(e, j, &plan.n));
                        let known = [repeat, (&plan.m[..], &at_m[..]), (&plan.n[..], &at_n[..])];
                        for (side, row) in sides.iter().zip([in_tile, across]) {
                            for (value, kept) in &side.folded {
                                let element = e.load(*kept, row);
                                x.define(*value, gather_index(x, *value, &known), element);
                            }
                        }
                        epilogue.store(e, x, &known, address, |e, x, address| {
                            let element = epilogue.element(e, x, &known, &values, &sum);
                            e.store(output, address, element);
                        });
                    });
                });
            }
        }
    });
}
