//! What the planes of a cube make of a tile that lies in shared memory: sums in registers.

use super::emit::{Array, Emit, Val};
use super::feed::{Layout, Staged};
use super::fragment::{Factor, left};
use super::matrix::Tile;
use super::sums::Sums;
use crate::few::FewPlan;

/// A plane's tiles.
pub(super) struct Tiles<'p> {
    plan: &'p FewPlan,
    tile: Tile,
    factor: Factor,
    left: &'p Staged,
    right: &'p [Staged],
    sums: &'p Sums<'p>,
    /// Operands of the tiles at hand and of those that come next: 16 rows, and for each product 16 columns.
    a: [Vec<Array>; 2],
    b: [Vec<Vec<Array>>; 2],
    /// What the unit names to `ldmatrix` of the first rows and columns.
    rows: Named,
    columns: Named,
}

/// The run of numbers of a tile that a unit names to `ldmatrix`, and the place there, for four matrices of 8 by 8.
#[derive(Clone, Copy)]
struct Named {
    run: Val,
    at: Val,
}

impl Named {
    /// For lines of a tile from one on. The bits 3 and 4 of a unit's number choose among the matrices: of rows, the first goes to other rows
    /// and the second to another depth, of columns the other way round.
    fn new(e: &mut Emit, lane: Val, layout: Layout, line: Val, rows: bool) -> Named {
        let [eight, sixteen] = [8, 16].map(|n| e.u32(n));
        let (low, high) = (e.rem(lane, eight), e.div(lane, sixteen));
        let middle = e.rem(lane, sixteen);
        let middle = e.div(middle, eight);
        let (to_lines, to_depth) = if rows { (middle, high) } else { (high, middle) };
        let [to_lines, to_depth] = [to_lines, to_depth].map(|bit| e.mul(bit, eight));
        let (run, at) = if layout.along {
            let run = e.add(to_lines, low);
            (e.add(line, run), to_depth)
        } else {
            (e.add(to_depth, low), e.add(line, to_lines))
        };
        Named { run, at }
    }

    /// Where that lies in a stage that begins somewhere, for so many lines and so much depth behind the first ones; both are numbers of times
    /// 8, so that the run is turned as the named one is.
    fn place(self, e: &mut Emit, layout: Layout, first: Val, (lines, depth): (u32, u32)) -> Val {
        let (runs, more) = if layout.along { (lines, depth) } else { (depth, lines) };
        let (pitch, more, runs) = (e.u32(layout.pitch()), e.u32(more), e.u32(runs * layout.pitch()));
        let start = e.mul(self.run, pitch);
        let start = e.add(first, start);
        let at = e.add(self.at, more);
        let at = layout.turn(e, self.run, at);
        let at = e.add(start, at);
        e.add(at, runs)
    }
}

/// What is multiplied at a time: 16 numbers of depth of one piece of each operand, and which registers they are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) k: u32,
    pub(super) pieces: [usize; 2],
    sets: [usize; 2],
}

/// How often numbers that come in so many pieces are multiplied.
pub(super) fn multiplications(pieces: [usize; 2]) -> usize {
    steps(16, pieces).len()
}

/// All that is multiplied in a stage. Pieces of both operands are multiplied where their product is not lost beside the others: those
/// that are small come first.
pub(super) fn steps(depth: u32, pieces: [usize; 2]) -> Vec<Step> {
    let most = pieces.into_iter().max().unwrap_or(1);
    let mut all: Vec<Step> = Vec::new();
    for k in (0..depth).step_by(16) {
        for left in 0..pieces[0] {
            for right in (0..pieces[1]).rev().filter(|right| left + right < most) {
                let now = [left, right];
                let sets = match all.last() {
                    None => [0, 0],
                    Some(before) => [0, 1].map(|side| {
                        let same = before.k == k && before.pieces[side] == now[side];
                        if same { before.sets[side] } else { 1 - before.sets[side] }
                    }),
                };
                all.push(Step { k, pieces: now, sets });
            }
        }
    }
    all
}

impl<'p> Tiles<'p> {
    pub(super) fn new(
        e: &mut Emit,
        (plan, tile): (&'p FewPlan, Tile),
        (factor, sums): (Factor, &'p Sums<'p>),
        left_operand: &'p Staged,
        right: &'p [Staged],
    ) -> Tiles<'p> {
        let (high, wide, elem) = (tile.high(), tile.wide(plan), factor.elem());
        let a = [0, 1].map(|_| (0..high).map(|_| left(e, elem)).collect());
        let b = [0, 1].map(|_| {
            let pairs = |e: &mut Emit| (0..wide.div_ceil(2)).map(|_| left(e, elem)).collect();
            plan.products.iter().map(|_| pairs(e)).collect()
        });
        let lane = sums.plane.lane;
        let rows = Named::new(e, lane, left_operand.layout, sums.row, true);
        let columns = Named::new(e, lane, right[0].layout, sums.column, false);
        Tiles { plan, tile, factor, left: left_operand, right, sums, a, b, rows, columns }
    }

    /// How many numbers each operand is made of.
    fn pieces(&self) -> [usize; 2] {
        [self.left.pieces.len(), self.right[0].pieces.len()]
    }

    /// Loads the first operands of a stage.
    pub(super) fn first(&self, e: &mut Emit, stage: Val) {
        let step = steps(self.tile.depth, self.pieces())[0];
        self.load(e, stage, None, step);
    }

    /// Adds up what a stage holds, whose first operands are loaded. `meanwhile` is done in the beginning. `turn` is done when all of the
    /// stage is in registers, and says which one comes next; `refill` when the first operands of that are on their way.
    pub(super) fn multiply<R>(
        &self,
        e: &mut Emit,
        stage: Val,
        meanwhile: impl FnOnce(&mut Emit) -> R,
        turn: impl FnOnce(&mut Emit, R) -> Val,
        refill: impl FnOnce(&mut Emit),
    ) {
        let all = steps(self.tile.depth, self.pieces());
        let (&last, before) = all.split_last().expect("a stage has some depth");
        debug_assert_eq!(last.sets, [1, 1], "what comes next goes to the registers that are not at hand");
        self.load(e, stage, Some(all[0]), all[1]);
        let done = meanwhile(e);
        self.add(e, all[0]);
        for (n, &step) in before.iter().enumerate().skip(1) {
            self.load(e, stage, Some(step), all[n + 1]);
            self.add(e, step);
        }
        let next = turn(e, done);
        self.load(e, next, None, all[0]);
        refill(e);
        self.add(e, last);
    }

    /// Loads what a step has that the one before has not.
    fn load(&self, e: &mut Emit, stage: Val, before: Option<Step>, step: Step) {
        let fresh = |side: usize| before.is_none_or(|b| b.sets[side] != step.sets[side]);
        let load = |e: &mut Emit,
                    staged: &Staged,
                    named: Named,
                    side: usize,
                    (n, to): (usize, Array),
                    rows: bool| {
            let (memory, layout) = (staged.pieces[step.pieces[side]], staged.layout);
            let first = staged.first(e, stage);
            let at = named.place(e, layout, first, (16 * n as u32, step.k));
            // The last of an odd number of columns is alone.
            let alone = !rows && 2 * n as u32 + 1 == self.tile.wide(self.plan);
            e.load_matrix(to, memory, at, if alone { 2 } else { 4 }, !layout.along);
        };
        if fresh(1) {
            for (staged, to) in self.right.iter().zip(&self.b[step.sets[1]]) {
                for to in to.iter().copied().enumerate() {
                    load(e, staged, self.columns, 1, to, false);
                }
            }
        }
        if fresh(0) {
            for to in self.a[step.sets[0]].iter().copied().enumerate() {
                load(e, self.left, self.rows, 0, to, true);
            }
        }
    }

    /// Adds the products of what is loaded.
    fn add(&self, e: &mut Emit, step: Step) {
        for (sums, pairs) in self.sums.all.iter().zip(&self.b[step.sets[1]]) {
            for (n, &pair) in pairs.iter().enumerate() {
                for half in 0..(self.tile.wide(self.plan) as usize - 2 * n).min(2) {
                    let b = e.array(self.factor.elem(), 2, 2);
                    for i in 0..2 {
                        let (from, to) = (e.u32(2 * half as u32 + i), e.u32(i));
                        let register = e.load(pair, from);
                        e.store(b, to, register);
                    }
                    for (row, &a) in sums.iter().zip(&self.a[step.sets[0]]) {
                        self.factor.multiply(e, a, b, row[2 * n + half]);
                    }
                }
            }
        }
    }
}
