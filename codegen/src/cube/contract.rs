//! Products of two tensors, summed over their common axes: tiles of 64 by 64 elements, in f32.
//!
//! The axes of each group (see [`ContractPlan`]) are numbered together, so the product is that of matrices, repeated over a batch.
//! A cube computes one tile of one repetition: its 256 units bring 16 numbers of depth of both operands into shared
//! memory at a time, and each keeps 4 by 4 sums in registers. Numbers beyond an edge count as 0 and are not stored.

use std::array;

use latentc_ir::{AxisId, Function, ValueId};

use super::emit::{Buf, Elem, Emit, Shared, Val, Var};
use super::expr::Exprs;
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
pub(crate) fn shared_bytes() -> usize {
    let one = (PITCH * DEPTH) as usize * Elem::F32.bytes();
    2 * one.next_multiple_of(16)
}

/// Axes that lie behind one another in a tensor, so that their common number needs no division.
struct Run {
    /// The number of indices of what follows in the group.
    after: Val,
    /// The number of indices, but for the first run of a group, which needs none.
    wrap: Option<Val>,
    /// The step in the tensor, in elements.
    stride: Val,
}

/// Where the elements of a group of axes lie in one tensor.
struct Offsets(Vec<Run>);

impl Offsets {
    /// For the axes of `group` in a tensor with the axes `memory`.
    fn of(e: &mut Emit, x: &Exprs<'_>, group: &[AxisId], memory: &[AxisId]) -> Offsets {
        let one = e.u32(1);
        let place =
            |a: AxisId| memory.iter().position(|&m| m == a).expect("groups are made from the operands");
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
            let stride = x.total(e, &memory[place(last) + 1..]);
            offsets.push(Run { after, wrap: (n > 0).then_some(size), stride });
            after = e.mul(after, size);
        }
        Offsets(offsets)
    }

    /// Where the element with this number lies.
    fn at(&self, e: &mut Emit, number: Val) -> Val {
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

/// An operand on its way to shared memory: its own axes ("rows", whichever operand it is) by depth.
struct Operand {
    buf: Buf,
    tile: Shared,
    depth: Offsets,
    /// For each element that this unit brings in: its row and depth in the tile, and what is known before the loop over
    /// depth, namely where its row starts and whether there is such a row.
    loads: [(Val, Val, Val, Val); LOADS as usize],
}

impl Operand {
    fn new(
        e: &mut Emit,
        x: &Exprs<'_>,
        (buf, value): (Buf, ValueId),
        batch: (&[AxisId], Val),
        rows: (&[AxisId], Val),
        depth: &[AxisId],
        row0: Val,
    ) -> Operand {
        let memory = &x.body().ty(value).axes;
        let tile = e.shared(Elem::F32, (PITCH * DEPTH) as usize);
        let base = Offsets::of(e, x, batch.0, memory).at(e, batch.1);
        let starts = Offsets::of(e, x, rows.0, memory);
        // Neighbouring units read neighbouring elements.
        let along_rows = memory.last().is_some_and(|a| rows.0.contains(a));
        let unit = e.unit();
        let loads = array::from_fn(|n| {
            let first = e.u32(n as u32 * UNITS);
            let at = e.add(unit, first);
            let fast = e.u32(if along_rows { TILE } else { DEPTH });
            let (slow, fast) = (e.div(at, fast), e.rem(at, fast));
            let (row, k) = if along_rows { (fast, slow) } else { (slow, fast) };
            let number = e.add(row0, row);
            let start = starts.at(e, number);
            let start = e.add(base, start);
            (row, k, start, e.lt(number, rows.1))
        });
        Operand { buf, tile, depth: Offsets::of(e, x, depth, memory), loads }
    }

    /// Brings in the tile at a depth.
    fn load(&self, e: &mut Emit, k0: Val, depth: Val) {
        for (row, k, start, exists) in self.loads {
            let number = e.add(k0, k);
            let deep = e.lt(number, depth);
            let inside = e.and(exists, deep);
            let zero = e.f32(0.0);
            let x = e.var(zero);
            e.if_(inside, |e| {
                let step = self.depth.at(e, number);
                let address = e.add(start, step);
                let element = e.load(self.buf, address);
                let element = e.cast(element, Elem::F32);
                e.set(x, element);
            });
            let pitch = e.u32(PITCH);
            let place = e.mul(k, pitch);
            let place = e.add(place, row);
            let x = e.get(x);
            e.store(self.tile, place, x);
        }
    }

    /// This unit's elements at a depth of the tile.
    fn read(&self, e: &mut Emit, k: u32, first: Val) -> [Val; EACH as usize] {
        array::from_fn(|n| {
            let there = e.u32(k * PITCH + n as u32 * SIDE);
            let place = e.add(first, there);
            e.load(self.tile, place)
        })
    }
}

/// The kernel's instructions, over the buffers of the two operands and the output.
pub(crate) fn emit(e: &mut Emit, x: &Exprs<'_>, plan: &ContractPlan, operands: [Buf; 2], output: Buf) {
    let body: &Function = x.body();
    let (args, root) = (&body.body[0].args, body.results[0]);
    let [m, n, depth] = [&plan.m, &plan.n, &plan.k].map(|axes| x.total(e, axes));

    // Tiles are numbered along n, then m, then the batch.
    let (cube, tile, rounding) = (e.cube(), e.u32(TILE), e.u32(TILE - 1));
    let [m_tiles, n_tiles] = [m, n].map(|size| {
        let up = e.add(size, rounding);
        e.div(up, tile)
    });
    let repeats = x.total(e, &plan.batch);
    let row_of_tiles = e.div(cube, n_tiles);
    let batch = e.div(row_of_tiles, m_tiles);
    let [row0, col0] = [e.rem(row_of_tiles, m_tiles), e.rem(cube, n_tiles)].map(|number| e.mul(number, tile));
    // All units of a cube agree.
    let inside = e.lt(batch, repeats);

    e.if_(inside, |e| {
        let repeat = (&plan.batch[..], batch);
        let a = Operand::new(e, x, (operands[0], args[0]), repeat, (&plan.m, m), &plan.k, row0);
        let b = Operand::new(e, x, (operands[1], args[1]), repeat, (&plan.n, n), &plan.k, col0);
        let (unit, side) = (e.unit(), e.u32(SIDE));
        let (ty, tx) = (e.div(unit, side), e.rem(unit, side));
        let zero = e.f32(0.0);
        let sums: [[Var; EACH as usize]; EACH as usize] = array::from_fn(|_| array::from_fn(|_| e.var(zero)));

        let (from, step) = (e.u32(0), e.u32(DEPTH));
        e.for_step(from, depth, step, |e, k0| {
            a.load(e, k0, depth);
            b.load(e, k0, depth);
            e.sync();
            for k in 0..DEPTH {
                let (left, right) = (a.read(e, k, ty), b.read(e, k, tx));
                for (row, l) in sums.iter().zip(left) {
                    for (sum, r) in row.iter().zip(right) {
                        let old = e.get(*sum);
                        let new = e.fma(l, r, old);
                        e.set(*sum, new);
                    }
                }
            }
            e.sync();
        });

        let memory = &body.ty(root).axes;
        let base = Offsets::of(e, x, &plan.batch, memory).at(e, batch);
        let (in_m, in_n) = (Offsets::of(e, x, &plan.m, memory), Offsets::of(e, x, &plan.n, memory));
        for (r, row) in sums.iter().enumerate() {
            let below = e.u32(r as u32 * SIDE);
            let i = e.add(row0, ty);
            let i = e.add(i, below);
            let row_exists = e.lt(i, m);
            let start = in_m.at(e, i);
            let start = e.add(base, start);
            for (c, sum) in row.iter().enumerate() {
                let right = e.u32(c as u32 * SIDE);
                let j = e.add(col0, tx);
                let j = e.add(j, right);
                let col_exists = e.lt(j, n);
                let inside = e.and(row_exists, col_exists);
                e.if_(inside, |e| {
                    let step = in_n.at(e, j);
                    let address = e.add(start, step);
                    let sum = e.get(*sum);
                    e.store(output, address, sum);
                });
            }
        }
    });
}
