//! Products of groups of planes whose operands the device itself brings: `cp.async.bulk.tensor` (PTX ISA, "Tensor copy"; "tensor memory
//! access" in the CUDA Programming Guide), which devices of compute capability 9.0 and later have.
//!
//! A copy is asked for by one unit. It brings a box of an operand, turned round as [`feed`](super::feed) lays it out and with zeros for what
//! lies beyond an edge, and counts its bytes off at a barrier in shared memory (`mbarrier`). What the operand looks like, a *map*, is an
//! argument of the kernel that the driver makes for each launch: see [`map`].
//!
//! So a cube has a group of planes more, of which one unit does nothing but ask for copies, as far ahead as there are stages, and the groups
//! that multiply do nothing else. Each stage has two barriers: one for what has come, and one at which planes say that they are done with it.
//! Registers go from the planes that copy to those that multiply (`setmaxnreg`). There are as many cubes as run at once, and each takes one
//! tile after another: while it finishes one, the operands of the next are on their way.
//!
//! CubeCL 0.10 has names for parts of this only, and includes headers for them that NVRTC takes seconds for: see [`instruction`].

mod map;

use std::fmt::Write;

use latentc_ir::AxisId;

use super::contract::Offsets;
use super::emit::{Buf, Cmp, Elem, Emit, Shared, Val, Var};
use super::expr::Exprs;
use super::feed::{Feed, Staged};
use super::few::place;
use super::fragment::Factor;
use super::matrix::{self, Part, Rows, Tile};
use super::sums::Sums;
use super::warpgroup::{self, Groups};
use crate::few::FewPlan;
use map::Of;
pub(super) use map::{Brought, told};
pub(crate) use map::{Map, Seen, of_launch};
pub(super) use map::{of_kernel, seen};

/// Units that copy: a group of planes, so that registers can be taken from it.
pub(super) const COPIERS: u32 = 128;
/// Registers of a unit that asks for boxes or copies by itself, and of one that multiplies, where two groups do: all that a processor has.
const ASKS: [u32; 2] = [24, 240];
const COPIES: [u32; 2] = [56, 224];
/// Stages that a unit's own copies are on their way to while it begins those of another.
const LAG: usize = 2;
/// Words that the two barriers of a stage take.
pub(super) const BARRIER_WORDS: u32 = 4;
/// What stands before the number of a map in a text.
pub(super) const MAP: &str = "&map_";

/// The barriers of all stages.
#[derive(Clone, Copy)]
struct Barriers {
    memory: Shared,
    stages: u32,
}

/// Where in the round of stages a unit is: the next stage, and whether it goes round for an odd time.
struct Turn {
    stage: Var,
    odd: Var,
}

impl Barriers {
    /// That for what has come to a stage.
    fn full(self, e: &mut Emit, stage: Val) -> (Shared, Val) {
        let two = e.u32(2);
        (self.memory, e.mul(stage, two))
    }

    /// That for planes that are done with a stage.
    fn empty(self, e: &mut Emit, stage: Val) -> (Shared, Val) {
        let (two, behind) = (e.u32(2), e.u32(2 * self.stages));
        let at = e.mul(stage, two);
        (self.memory, e.add(at, behind))
    }

    /// Makes them, by one unit: so many units tell of what has come, and so many planes are done with a stage.
    fn make(self, e: &mut Emit, (units, planes): (u32, u32)) {
        for stage in 0..self.stages {
            let stage = e.u32(stage);
            let (full, empty) = (self.full(e, stage), self.empty(e, stage));
            e.of_groups(&format!("barrier {units}"), &[], &[full]);
            e.of_groups(&format!("barrier {planes}"), &[], &[empty]);
        }
        e.of_groups("barriers-made", &[], &[]);
    }
}

impl Turn {
    fn new(e: &mut Emit) -> Turn {
        let zero = e.u32(0);
        Turn { stage: e.var(zero), odd: e.var(zero) }
    }

    /// Goes on to the next stage, from this one.
    fn go_on(&self, e: &mut Emit, at: (Val, Val), stages: u32) {
        let (next, odd) = behind(e, at, stages);
        e.set(self.stage, next);
        e.set(self.odd, odd);
    }
}

/// The stage behind one of so many, and whether it is gone to for an odd time.
pub(super) fn behind(e: &mut Emit, (stage, odd): (Val, Val), stages: u32) -> (Val, Val) {
    let [zero, one, all] = [0, 1, stages].map(|n| e.u32(n));
    let next = e.add(stage, one);
    let over = e.cmp(Cmp::Eq, next, all);
    let other = e.sub(one, odd);
    (e.select(over, zero, next), e.select(over, other, odd))
}

/// Which tiles a cube has.
#[derive(Clone, Copy)]
pub(super) enum Which<'r> {
    /// One after another.
    Several,
    /// One, of these rows and from a column on.
    One { rows: &'r Rows, column: Val },
}

/// A tile: the numbers of its part and of its repeat, its rows, and the numbers of its first row and column.
struct At<'r> {
    part: Val,
    batch: Val,
    rows: &'r Rows,
    row: Val,
    column: Val,
}

/// A kernel whose operands the device brings.
struct Bulk<'p> {
    plan: &'p FewPlan,
    tile: Tile,
    factor: Factor,
    brought: Brought,
    left: Staged,
    right: Vec<Staged>,
    barriers: Barriers,
    which: Which<'p>,
    /// The number of the group that all rows of a tile have, where there are groups.
    group: Option<(AxisId, Val)>,
    /// All rows, columns and repeats.
    totals: [Val; 3],
    /// The buffer of the narrow operand.
    narrow: (Buf, Elem),
}

/// The kernel's instructions, over the buffers of the narrow operand and of the output.
pub(super) fn emit(
    e: &mut Emit,
    x: &mut Exprs<'_>,
    (plan, tile): (&FewPlan, Tile),
    which: Which<'_>,
    (narrow, output): ((Buf, Elem), Buf),
) {
    let (body, factor) = (x.body(), tile.factor(x.body(), plan));
    let Some(brought) = tile.brought(body, plan) else { return };
    let stages = tile.stages(body, plan);
    let [of_left, of_right] = tile.layouts(body, plan);
    let elem = factor.elem();
    let left = Staged::new(e, elem, of_left, 1, stages);
    let right = plan.products.iter().map(|_| Staged::new(e, elem, of_right, 1, stages)).collect();
    let slab = plan.products.len() as u32 * tile.slab() * tile.slab_pitch(plan);
    let slab = e.shared(Elem::F32, slab as usize);
    let memory = e.shared(Elem::U32, (BARRIER_WORDS * tile.most_stages()) as usize);
    let barriers = Barriers { memory, stages };
    let totals = [&plan.rows, &plan.columns, &plan.batch].map(|axes| x.total(e, axes));
    let group = match (which, matrix::index(plan)) {
        (Which::One { rows: Rows::Group { group, .. }, .. }, Some((along, _))) => Some((along, group.number)),
        _ => None,
    };
    let (tell, registers) = if brought.left.is_some() { (1, ASKS) } else { (1 + COPIERS, COPIES) };
    let bulk = Bulk { plan, tile, factor, brought, left, right, barriers, which, group, totals, narrow };
    let (unit, zero, multipliers) = (e.unit(), e.u32(0), e.u32(tile.multipliers()));
    let first = e.cmp(Cmp::Eq, unit, zero);
    e.if_(first, |e| barriers.make(e, (tell, tile.multipliers() / 32)));
    e.sync();
    // From here on, those that copy and those that multiply meet at the barriers of stages only.
    let multiplies = e.lt(unit, multipliers);
    let copies = e.not(multiplies);
    e.if_(copies, |e| {
        e.of_groups(&format!("registers dec {}", registers[0]), &[], &[]);
        let unit = e.sub(unit, multipliers);
        let one = e.cmp(Cmp::Eq, unit, zero);
        x.scope(|x| match bulk.brought.left {
            Some(_) => e.if_(one, |e| bulk.ask(e, x)),
            None => bulk.copy(e, x, unit, one),
        });
    });
    e.if_(multiplies, |e| {
        e.of_groups(&format!("registers inc {}", registers[1]), &[], &[]);
        x.scope(|x| bulk.multiply(e, x, slab, output));
    });
}

impl Bulk<'_> {
    /// Does something for each tile of this cube.
    fn each<'x>(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'x>,
        body: impl FnOnce(&mut Emit, &mut Exprs<'x>, &At<'_>),
    ) {
        let [total, columns, repeats] = self.totals;
        match self.which {
            Which::One { rows, column } => {
                let zero = e.u32(0);
                x.scope(|x| body(e, x, &At { part: zero, batch: zero, rows, row: zero, column }));
            }
            Which::Several => {
                let [high, wide] = [self.tile.rows, self.tile.columns(self.plan)];
                let tiles = [e.tiles(total, high), e.tiles(columns, wide)];
                let all = e.mul(tiles[0], tiles[1]);
                let all = e.mul(all, repeats);
                let parts = e.u32(self.tile.parts);
                let all = e.mul(all, parts);
                let (cube, cubes) = (e.cube(), e.cubes_in_grid());
                e.for_step(cube, all, cubes, |e, number| {
                    x.scope(|x| {
                        let (batch, row, column) = matrix::find(e, number, tiles);
                        let (part, batch) = Part::find(e, self.tile, batch, repeats);
                        let [high, wide] = [high, wide].map(|n| e.u32(n));
                        let (row, column) = (e.mul(row, high), e.mul(column, wide));
                        let rows = Rows::Run { first: row, total };
                        body(e, x, &At { part, batch, rows: &rows, row, column });
                    });
                });
            }
        }
    }

    /// What a tile adds up of the depth.
    fn part(&self, e: &mut Emit, x: &Exprs<'_>, at: &At<'_>) -> Part {
        let depth = matrix::depth(e, x, self.plan, self.factor);
        Part::of(e, self.tile, at.part, depth)
    }

    /// Does something for each stage of a tile, given the index of the batch and the outer axes, and the depth there.
    fn each_stage<'x>(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'x>,
        at: &At<'_>,
        body: impl FnOnce(&mut Emit, &mut Exprs<'x>, &[(&[AxisId], &[Val])], Val),
    ) {
        let (plan, step) = (self.plan, e.u32(self.tile.depth));
        let (zero, one) = (e.u32(0), e.u32(1));
        let (outer, part) = (x.total(e, &plan.outer), self.part(e, x, at));
        let batch = x.split(e, at.batch, &plan.batch);
        e.for_step(zero, outer, one, |e, o| {
            x.scope(|x| {
                let index = x.split(e, o, &plan.outer);
                let group = self.group.map(|(axis, number)| ([axis], [number]));
                let mut known = vec![(&plan.batch[..], &batch[..]), (&plan.outer[..], &index[..])];
                known.extend(group.as_ref().map(|(axis, number)| (&axis[..], &number[..])));
                e.for_step(part.first, part.end, step, |e, k0| x.scope(|x| body(e, x, &known, k0)));
            });
        });
    }

    /// Waits until all are done with what a stage held before.
    fn await_empty(&self, e: &mut Emit, (stage, odd): (Val, Val)) {
        // In the first round, nobody has anything in the stages.
        let one = e.u32(1);
        let before = e.sub(one, odd);
        let empty = self.barriers.empty(e, stage);
        e.await_barrier(empty, before);
    }

    /// Asks for the boxes of a stage, by one unit, which tells how many bytes they have.
    fn ask_for(&self, e: &mut Emit, (stage, at, k0): (Val, &At<'_>, Val), known: &[(&[AxisId], &[Val])]) {
        let left = self.brought.left.iter().map(|map| (map, &self.left, at.row));
        let right = self.brought.right.iter().zip(&self.right).map(|(map, staged)| (map, staged, at.column));
        let all: Vec<_> = left.chain(right).collect();
        let full = self.barriers.full(e, stage);
        expect(e, full, all.iter().map(|(map, ..)| *map));
        for (n, (map, staged, line)) in all.into_iter().enumerate() {
            ask_for(e, (n, map), (staged, stage), (line, k0), known, full);
        }
    }

    /// Asks for what all tiles of this cube read, by one unit.
    fn ask(&self, e: &mut Emit, x: &mut Exprs<'_>) {
        let turn = Turn::new(e);
        self.each(e, x, |e, x, at| {
            self.each_stage(e, x, at, |e, _, known, k0| {
                let (stage, odd) = (e.get(turn.stage), e.get(turn.odd));
                self.await_empty(e, (stage, odd));
                self.ask_for(e, (stage, at, k0), known);
                turn.go_on(e, (stage, odd), self.barriers.stages);
            });
        });
    }

    /// The same by all units that copy, which bring the narrow operand pack by pack; one of them asks for the others.
    fn copy(&self, e: &mut Emit, x: &mut Exprs<'_>, unit: Val, one: Val) {
        let (plan, body, none) = (self.plan, x.body(), e.u32(self.barriers.stages));
        let memory = &body.ty(plan.products[0].narrow).axes;
        let turn = Turn::new(e);
        // The stages that copies are on their way to, the first one first.
        let behind: Vec<_> = (0..LAG).map(|_| e.var(none)).collect();
        let arrived = |e: &mut Emit, left: usize, next: Val| {
            e.await_groups_but(left as u32);
            warpgroup::show_written(e);
            let stage = e.get(behind[0]);
            let some = e.lt(stage, none);
            e.if_(some, |e| {
                let full = self.barriers.full(e, stage);
                e.of_groups("leave", &[], &[full]);
            });
            for n in 1..LAG {
                let later = e.get(behind[n]);
                e.set(behind[n - 1], later);
            }
            e.set(behind[LAG - 1], next);
        };
        self.each(e, x, |e, x, tile| {
            let (depth, part) = (matrix::depth(e, x, plan, self.factor), self.part(e, x, tile));
            let mut feed = Feed::new(self.factor, (depth, part), unit);
            let steps = Offsets::of(e, x, &plan.inner, memory);
            feed.add(e, COPIERS, self.narrow, (&self.left, steps), |e, row| {
                matrix::line(e, x, plan, memory, (tile.rows, row))
            });
            self.each_stage(e, x, tile, |e, x, known, k0| {
                let (stage, odd) = (e.get(turn.stage), e.get(turn.odd));
                self.await_empty(e, (stage, odd));
                e.if_(one, |e| self.ask_for(e, (stage, tile, k0), known));
                let base = place(e, x, memory, known);
                feed.copy(e, &[base], k0, stage);
                arrived(e, LAG, stage);
                turn.go_on(e, (stage, odd), self.barriers.stages);
            });
            for left in (0..LAG).rev() {
                arrived(e, left, none);
            }
        });
    }

    /// Multiplies all tiles of this cube, by the units that do.
    fn multiply(&self, e: &mut Emit, x: &mut Exprs<'_>, slab: Shared, output: Buf) {
        let (plan, tile, stages) = (self.plan, self.tile, self.barriers.stages);
        let sums = Sums::new(e, (plan, tile));
        let groups = Groups::new(e, self.factor, &sums, (&self.left, &self.right), stages);
        let (turn, none) = (Turn::new(e), e.u32(stages));
        // The stage that was multiplied before, if there is one.
        let before = e.var(none);
        let leave = |e: &mut Emit, next: Val| {
            let (zero, stage) = (e.u32(0), e.get(before));
            let (first, some) = (e.cmp(Cmp::Eq, sums.plane.lane, zero), e.lt(stage, none));
            let tells = e.and(first, some);
            e.if_(tells, |e| {
                let empty = self.barriers.empty(e, stage);
                e.of_groups("leave", &[], &[empty]);
            });
            e.set(before, next);
        };
        self.each(e, x, |e, x, at| {
            sums.clear(e);
            self.each_stage(e, x, at, |e, _, _, _| {
                let (stage, odd) = (e.get(turn.stage), e.get(turn.odd));
                let full = self.barriers.full(e, stage);
                e.await_barrier(full, odd);
                warpgroup::fence(e);
                groups.add(e, stage);
                warpgroup::commit(e);
                warpgroup::await_but(e, 1, &[], &[]);
                leave(e, stage);
                turn.go_on(e, (stage, odd), stages);
            });
            let all: Vec<_> = sums.all.iter().flatten().flatten().copied().collect();
            warpgroup::await_but(e, 0, &all, &[]);
            leave(e, none);
            let batch_index = x.split(e, at.batch, &plan.batch);
            // What is left of the tile before has been read.
            sums.meet(e);
            let repeat = (&plan.batch[..], &batch_index[..]);
            sums.finish(e, x, repeat, (at.part, at.rows, at.column, self.totals[1]), (slab, output));
        });
    }
}

/// Says that the boxes of a stage of these will come, by one unit: a barrier waits for all of their bytes.
pub(super) fn expect<'m>(e: &mut Emit, full: (Shared, Val), maps: impl Iterator<Item = &'m Map>) {
    let bytes: u32 = maps.map(Map::bytes).sum();
    e.of_groups(&format!("expect {bytes}"), &[], &[full]);
}

/// Asks for all boxes of an operand, which is map `n` of the kernel, that a stage has from a line and a depth on. What else is `known` is an
/// index that all of them have.
pub(super) fn ask_for(
    e: &mut Emit,
    (n, map): (usize, &Map),
    (staged, stage): (&Staged, Val),
    (line, depth): (Val, Val),
    known: &[(&[AxisId], &[Val])],
    full: (Shared, Val),
) {
    let first = staged.first(e, stage);
    for [inner, behind] in map.boxes() {
        let [inner, behind] = [inner, behind].map(|n| e.u32(n));
        let to = e.add(first, behind);
        let at = map.dims.iter().enumerate().map(|(n, (of, axes, _))| {
            let at = match of {
                Of::Lines => line,
                Of::Depth => depth,
                Of::Chosen => chosen(e, known, axes[0]),
            };
            if n == 0 { e.add(at, inner) } else { at }
        });
        let at: Vec<_> = at.collect();
        e.bring_box(n, (staged.pieces[0], to), full, &at);
    }
}

/// The index of an axis that all of a tile has.
fn chosen(e: &mut Emit, known: &[(&[AxisId], &[Val])], axis: AxisId) -> Val {
    let found = known.iter().find_map(|(axes, index)| Some(index[axes.iter().position(|a| *a == axis)?]));
    found.unwrap_or_else(|| e.u32(0))
}

/// The instruction in place of a word of ours with numbers, and the arguments that it came with; `None` if the word is none of these.
pub(super) fn instruction(words: &[&str], arguments: &[&str]) -> Option<String> {
    let place = |n: usize| {
        let (memory, at) = (arguments.get(n)?, arguments.get(n + 1)?);
        Some(format!("\"r\"((uint32)__cvta_generic_to_shared({memory} + {at}))"))
    };
    let volatile =
        |code: &str, operands: &str| format!("asm volatile(\"{code}\" :: {operands} : \"memory\");");
    Some(match words {
        ["barrier", count] => {
            volatile("mbarrier.init.shared::cta.b64 [%0], %1;", &format!("{}, \"n\"({count})", place(0)?))
        }
        // Copies see what was made through another proxy.
        ["barriers-made"] => "asm volatile(\"fence.mbarrier_init.release.cluster;\" ::: \"memory\");\n\
             asm volatile(\"fence.proxy.async.shared::cta;\" ::: \"memory\");"
            .to_owned(),
        ["expect", bytes] => volatile(
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;",
            &format!("{}, \"n\"({bytes})", place(0)?),
        ),
        ["leave"] => volatile("mbarrier.arrive.shared::cta.b64 _, [%0];", &place(0)?),
        ["await"] => volatile(
            "{.reg .pred P;\\nAGAIN:\\nmbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1;\\n\
             @P bra DONE;\\nbra AGAIN;\\nDONE:\\n}",
            &format!("{}, \"r\"({})", place(0)?, arguments.get(2)?),
        ),
        ["bring", map] => {
            let at = arguments.get(4..)?;
            let numbers: Vec<_> = (0..at.len()).map(|n| format!("%{}", n + 3)).collect();
            let mut operands = format!("{}, \"l\"({MAP}{map}), {}", place(0)?, place(2)?);
            at.iter().for_each(|at| operands += &format!(", \"r\"({at})"));
            let code = format!(
                "cp.async.bulk.tensor.{}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {{{}}}], [%2];",
                at.len(),
                numbers.join(", "),
            );
            volatile(&code, &operands)
        }
        ["registers", way, count] => {
            format!("asm volatile(\"setmaxnreg.{way}.sync.aligned.u32 %0;\" :: \"n\"({count}));")
        }
        _ => return None,
    })
}

/// Declares the maps that a text names, as the first arguments of its kernel.
pub(super) fn with_maps(text: &str) -> String {
    let number = |rest: &str| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<usize>().ok();
    let Some(last) = text.split(MAP).skip(1).filter_map(number).max() else { return text.to_owned() };
    const HEAD: &str = "extern \"C\" __global__";
    let Some((before, kernel)) = text.split_once(HEAD) else { return text.to_owned() };
    let Some((name, arguments)) = kernel.split_once(" (\n") else { return text.to_owned() };
    let mut maps = String::new();
    for n in 0..=last {
        let _ = write!(maps, "const __grid_constant__ tensor_map map_{n}, ");
    }
    // CUDA's `CUtensorMap`, whose header NVRTC has no need of.
    let ty = "struct alignas(64) tensor_map {\n  unsigned long long words[16];\n};\n";
    format!("{before}{ty}{HEAD}{name} (\n    {maps}{}", arguments.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_the_first_arguments() {
        let text = "struct a {};\nextern \"C\" __global__ void __launch_bounds__(384)f (\n    const float* buffer_0\n) {\n \
                    bring(&map_1); bring(&map_0);\n}";
        let got = with_maps(text);
        let wanted = "f (\n    const __grid_constant__ tensor_map map_0, const __grid_constant__ tensor_map map_1, const float* buffer_0\n)";
        assert!(got.contains(wanted), "{got}");
        assert!(got.starts_with("struct a {};\nstruct alignas(64) tensor_map {"), "{got}");
    }
}
