//! Streams whose products groups of four planes multiply together (`wgmma`, see [`warpgroup`](crate::cube::warpgroup)): those of many
//! rows, as in prompts.
//!
//! A cube has two groups, each with 64 rows. Operands lie in shared memory as these products read them; of keys and values there are two
//! stages, each of a block of positions, or three where they are the same. While a group scores a block and weighs the values of the one
//! before it, the other makes weights: the two walk half a block apart, and wait for one another only where what one needs depends on
//! the other. The one behind brings what both read. Weights go from the registers where scores are summed to those of a left operand:
//! nothing but what was brought is read from shared memory.
//!
//! Exponentials are powers of two here: the largest score of a row is kept times the logarithm that this takes, and a number that all scores
//! are multiplied by last is made part of it.

use super::bring::Place;
use super::cube::{Cube, OfRows, Seen, Sums, tiles};
use super::{End, MatrixPlan, ROWS_AT_ONCE};
use crate::cube::emit::{Array, Bin, Cmp, Emit, Un, Val};
use crate::cube::expr::Exprs;
use crate::cube::feed::{SPAN, Staged};
use crate::cube::fragment::{left, round_to_left};
use crate::cube::stream::{Span, least};
use crate::cube::warpgroup::{Left, Operand, ROWS, add, await_but, commit, fence, show_written};
use crate::stream::Monoid;

/// Sums that do not wait for each other, where a unit adds up a row.
const CHAINS: usize = 4;

/// Where groups meet, by the numbers of barriers: one of them waits there for the other, which goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meet {
    /// The second waits for the first to have begun to multiply.
    Turn = 1,
    /// It waits until the first has scored a block, where the keys of that are to be written over.
    Scored,
    /// The first waits for what the second brings.
    Brought,
    /// All of the second wait for one another.
    Second,
    /// The second waits until the first has weighed a block. That may be one ahead, so there are two of these, in turn.
    Weighed,
}

/// A cube whose planes multiply in groups.
struct Groups<'a> {
    cube: Cube<'a>,
    /// Of each product, what the rows have, and what positions have.
    rows: Vec<Staged>,
    keys: Vec<Staged>,
    /// Columns by positions, if they are not the keys.
    values: Option<Staged>,
    /// The number of the group, and how many numbers its rows have before them, for each 64 of the depth.
    group: Val,
    first_row: Val,
    /// The block's sums that scores are made of.
    scores: Vec<Sums>,
    /// The weights of 16 positions each, as a left operand.
    weights: Vec<Array>,
    sums: Sums,
    max: OfRows,
    sum: OfRows,
}

/// Walks the positions, and ends with what is made of the sums.
pub(super) fn walk(
    e: &mut Emit,
    x: &mut Exprs<'_>,
    mut cube: Cube<'_>,
    (from, to): (Val, Val),
    end: End<'_>,
) {
    let (plan, t, elem) = (cube.plan, cube.t, cube.elem);
    let number = 0..plan.scores.len();
    let rows: Vec<_> =
        number.clone().map(|p| Staged::new(e, elem, plan.deep_layout(t.rows, p), 1, 1)).collect();
    let stages = plan.key_stages();
    let keys: Vec<_> =
        number.map(|p| Staged::new(e, elem, plan.deep_layout(t.positions, p), 1, stages)).collect();
    let values = plan.shared.is_none().then(|| Staged::new(e, elem, MatrixPlan::values_layout(t), 1, 2));
    cube.find_rows(e, x);
    let zero = e.u32(0);
    for (n, p) in plan.scores.iter().enumerate() {
        let of = (p.rows, &p.depth[..], plan.depths[n]);
        let width = plan.depths[n].next_multiple_of(16);
        cube.bring(e, x, of, cube.rows, (zero, width, ROWS_AT_ONCE), Place::Turned(&rows[n], zero));
    }
    let seen = cube.seen(e, x, (from, to));
    cube.positions.total = seen.until;
    let (nothing, least) = (e.f32(0.0), e.f32(least(cube.stream().by)));
    let of_rows = |e: &mut Emit, first: Val| cube.mine.iter().map(|_| e.var(first)).collect::<Vec<_>>();
    let (max, sum) = (of_rows(e, least), of_rows(e, nothing));
    let (four, of_group) = (e.u32(4), e.u32(ROWS * SPAN));
    let group = e.div(cube.plane.number, four);
    let first_row = e.mul(group, of_group);
    let scores = plan.sums.iter().map(|_| tiles(e, 1, t.positions / 8)).collect();
    let weights = (0..t.positions / 16).map(|_| left(e, elem)).collect();
    let sums = tiles(e, 1, t.columns / 8);
    let mut groups = Groups { cube, rows, keys, values, group, first_row, scores, weights, sums, max, sum };
    let some = e.lt(seen.from, seen.until);
    e.if_(some, |e| groups.walk(e, x, seen));
    let Groups { cube, sums, max, sum, .. } = groups;
    cube.fold_units(e, [&max, &sum]);
    if cube.stream().by == Monoid::Softmax {
        // As all others keep it.
        let natural = e.f32(std::f32::consts::LN_2);
        for &max in &max {
            let largest = e.get(max);
            let largest = e.mul(largest, natural);
            e.set(max, largest);
        }
    }
    end(&cube, e, x, [&max, &sum], &sums);
}

impl Groups<'_> {
    /// Walks at least one block.
    fn walk(&mut self, e: &mut Emit, x: &mut Exprs<'_>, seen: Seen) {
        let (from, until) = (seen.from, seen.until);
        let [zero, one, step] = [0, 1, self.cube.t.positions].map(|n| e.u32(n));
        let second = e.add(from, step);
        self.bring_keys(e, x, (from, zero));
        e.group_copies();
        self.bring_values(e, x, (from, zero));
        let some = e.lt(second, until);
        e.if_(some, |e| self.bring_keys(e, x, (second, one)));
        e.group_copies();
        e.await_groups_but(1);
        show_written(e);
        e.sync();
        self.score(e, zero);
        let scores: Vec<_> = self.scores.iter().flatten().flatten().copied().collect();
        await_but(e, 0, &scores, &[]);
        self.cube.positions.from = from;
        self.make_weights(e, x, &Seen { free: None, ..seen });
        self.round(e);
        // From here on, the second group brings what both multiply, and they do not wait for one another but where they must.
        e.await_copies();
        show_written(e);
        e.sync();
        let [of_first, of_second] = [zero, one].map(|n| e.cmp(Cmp::Eq, self.group, n));
        let half = self.cube.t.units() / 2;
        let (unit, before) = (e.unit(), e.u32(half));
        self.cube.bringing = (e.sub(unit, before), half);
        let shared = self.values.is_none();
        let twice = e.u32(2 * self.cube.t.positions);
        let third = e.add(from, twice);
        e.if_(of_second, |e| {
            let stage = if shared { e.u32(2) } else { zero };
            self.bring_block(e, x, (third, until), stage, true);
            self.bring_block(e, x, (second, until), one, false);
            e.group_copies();
        });
        let (stage, parity) = (e.var(zero), e.var(zero));
        let sums = self.sums.concat();
        e.for_step(second, until, step, |e, block| {
            let here = e.get(stage);
            let next = self.behind(e, here);
            // What the second group begins to multiply is multiplied behind what the first has begun, which makes weights meanwhile.
            e.if_(of_second, |e| self.meet(e, Meet::Turn));
            self.score(e, next);
            self.weigh(e, here);
            e.if_(of_first, |e| self.come_by(e, Meet::Turn));
            await_but(e, 1, &scores, &[]);
            let behind = e.add(block, twice);
            e.if_(of_first, |e| self.come_by(e, Meet::Scored));
            e.if_(of_second, |e| {
                // Where these keys lie, others are to lie.
                self.meet(e, Meet::Scored);
                if !shared {
                    self.bring_block(e, x, (behind, until), next, true);
                }
                e.group_copies();
                // The keys of the next block, and the values of this one.
                e.await_groups_but(1);
                show_written(e);
                self.meet(e, Meet::Second);
                self.come_by(e, Meet::Brought);
            });
            self.cube.positions.from = block;
            let less = self.make_weights(e, x, &seen);
            await_but(e, 0, &sums, &self.weights);
            let weighed = e.get(parity);
            let number = e.u32(Meet::Weighed as u32);
            let (number, units) = (e.add(number, weighed), self.cube.t.units());
            e.if_(of_first, |e| e.come_by(number, units));
            e.if_(of_second, |e| {
                // The same of the values of the block before.
                e.meet(number, units);
                if shared {
                    self.bring_block(e, x, (behind, until), here, true);
                } else {
                    let behind = e.add(block, step);
                    self.bring_block(e, x, (behind, until), here, false);
                }
                e.group_copies();
            });
            self.lessen(e, &less);
            self.round(e);
            e.set(stage, next);
            let weighed = e.sub(one, weighed);
            e.set(parity, weighed);
            e.if_(of_first, |e| self.meet(e, Meet::Brought));
        });
        let here = e.get(stage);
        self.weigh(e, here);
        await_but(e, 0, &sums, &self.weights);
    }

    /// Waits at a barrier, for the other group or for all of the second.
    fn meet(&self, e: &mut Emit, at: Meet) {
        let (number, units) = self.barrier(e, at);
        e.meet(number, units);
    }

    /// Lets the other group pass a barrier.
    fn come_by(&self, e: &mut Emit, at: Meet) {
        let (number, units) = self.barrier(e, at);
        e.come_by(number, units);
    }

    fn barrier(&self, e: &Emit, at: Meet) -> (Val, u32) {
        let units = self.cube.t.units();
        (e.u32(at as u32), if at == Meet::Second { units / 2 } else { units })
    }

    /// Begins to copy the keys or the values of a block to a stage, of the positions up to one; nothing where it begins there or behind.
    fn bring_block(
        &mut self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        (from, until): (Val, Val),
        stage: Val,
        keys: bool,
    ) {
        let step = e.u32(self.cube.t.positions);
        let end = e.add(from, step);
        let (some, whole) = (e.lt(from, until), e.cmp(Cmp::Le, end, until));
        let rest = e.not(whole);
        let rest = e.and(some, rest);
        for (asked, whole) in [(whole, true), (rest, false)] {
            self.cube.whole = whole;
            e.if_(asked, |e| match keys {
                true => self.bring_keys(e, x, (from, stage)),
                false => self.bring_values(e, x, (from, stage)),
            });
        }
        self.cube.whole = false;
    }

    /// The stage of keys behind one.
    fn behind(&self, e: &mut Emit, stage: Val) -> Val {
        let [zero, one, all] = [0, 1, self.cube.plan.key_stages()].map(|n| e.u32(n));
        let next = e.add(stage, one);
        let over = e.cmp(Cmp::Eq, next, all);
        e.select(over, zero, next)
    }

    /// Begins to copy the keys from a position on to a stage.
    fn bring_keys(&self, e: &mut Emit, x: &mut Exprs<'_>, (from, stage): (Val, Val)) {
        let (cube, plan) = (&self.cube, self.cube.plan);
        let none = e.u32(0);
        let lines = Span { from, ..cube.positions };
        for (n, p) in plan.scores.iter().enumerate() {
            // What is behind the depth, up to a product's, is 0. What is behind the columns is not stored.
            let of = (p.keys, &p.depth[..], plan.depths[n]);
            let width = plan.depths[n].next_multiple_of(16);
            x.scope(|x| cube.bring(e, x, of, lines, (none, width, 1), Place::Turned(&self.keys[n], stage)));
        }
    }

    /// The same of the values, if they are not the keys.
    fn bring_values(&self, e: &mut Emit, x: &mut Exprs<'_>, (from, stage): (Val, Val)) {
        let (cube, plan) = (&self.cube, self.cube.plan);
        if let (Some(staged), Some(values)) = (&self.values, plan.values) {
            let lines = Span { from, ..cube.positions };
            let of = (values, &cube.stream().n[..], plan.columns);
            let width = (cube.columns.from, cube.t.columns, 1);
            x.scope(|x| cube.bring(e, x, of, lines, width, Place::Turned(staged, stage)));
        }
    }

    /// Begins to score the positions of a stage.
    fn score(&self, e: &mut Emit, stage: Val) {
        let (cube, plan) = (&self.cube, self.cube.plan);
        fence(e);
        for ((_, products), sums) in plan.sums.iter().zip(&self.scores) {
            let mut adds = false;
            for &p in products {
                let keys = self.keys[p].first(e, stage);
                for k in (0..plan.depths[p]).step_by(16) {
                    let of_rows = Operand::of(&self.rows[p], 0, (self.first_row, 0, k));
                    let of_positions = Operand::of(&self.keys[p], 0, (keys, 0, k));
                    add(e, cube.elem, &sums[0], Left::Shared(of_rows), of_positions, adds);
                    adds = true;
                }
            }
        }
        commit(e);
    }

    /// Begins to add the values of a stage times their weights.
    fn weigh(&self, e: &mut Emit, stage: Val) {
        fence(e);
        for (n, &weights) in self.weights.iter().enumerate() {
            let k = 16 * n as u32;
            let of_columns = match (&self.values, self.cube.plan.shared) {
                (None, Some(product)) => {
                    let first = self.keys[product].first(e, stage);
                    Operand::turned(&self.keys[product], (first, k))
                }
                (Some(values), _) => {
                    let first = values.first(e, stage);
                    Operand::of(values, 0, (first, 0, k))
                }
                (None, None) => unreachable!("values that are no keys have memory of their own"),
            };
            add(e, self.cube.elem, &self.sums[0], Left::Registers(weights), of_columns, true);
        }
        commit(e);
    }

    /// Makes weights of the block's sums, in the place of the first of these. Gives what earlier sums of each row are to be multiplied by,
    /// where weights are a softmax.
    fn make_weights(&self, e: &mut Emit, x: &mut Exprs<'_>, seen: &Seen) -> Vec<Val> {
        let none = e.u32(0);
        x.scope(|x| self.cube.make_scores(e, x, none, (seen.mask, seen.free), &self.scores));
        if self.cube.stream().by == Monoid::Sum {
            return Vec::new();
        }
        let factor = self.cube.factor().map_or(1.0, |(_, factor)| factor);
        let to_two = e.f32(factor * std::f32::consts::LOG2_E);
        let scores = &self.scores[0][0];
        let of_row = |e: &mut Emit, row: usize| {
            let places = [0, 1].map(|right| 2 * row as u32 + right);
            let places = scores.iter().flat_map(|&tile| places.map(|at| (tile, at)));
            places.map(|(tile, at)| (tile, e.u32(at))).collect::<Vec<_>>()
        };
        (0..self.cube.mine.len())
            .map(|row| {
                let of_row = of_row(e, row);
                let numbers: Vec<_> = of_row.iter().map(|&(tile, at)| e.load(tile, at)).collect();
                let mut largest = chained(e, Bin::Max, &numbers);
                for bits in [1, 2] {
                    let other = e.shuffle_xor(largest, bits);
                    largest = e.binary(Bin::Max, largest, other);
                }
                let largest = e.mul(largest, to_two);
                let old = e.get(self.max[row]);
                let new = e.binary(Bin::Max, old, largest);
                e.set(self.max[row], new);
                let less = e.sub(old, new);
                let factor = e.quick_exp2(less);
                let below = e.unary(Un::Neg, new);
                let weights: Vec<_> = numbers
                    .iter()
                    .zip(of_row)
                    .map(|(&score, (tile, at))| {
                        let power = e.fma(score, to_two, below);
                        let weight = e.quick_exp2(power);
                        e.store(tile, at, weight);
                        weight
                    })
                    .collect();
                let more = chained(e, Bin::Add, &weights);
                let known = e.get(self.sum[row]);
                let total = e.fma(known, factor, more);
                e.set(self.sum[row], total);
                factor
            })
            .collect()
    }

    /// Multiplies what was summed of each row by its factor.
    fn lessen(&self, e: &mut Emit, factors: &[Val]) {
        for &tile in &self.sums[0] {
            for (row, &factor) in factors.iter().enumerate() {
                for right in 0..2 {
                    let at = e.u32(2 * row as u32 + right);
                    let known = e.load(tile, at);
                    let known = e.mul(known, factor);
                    e.store(tile, at, known);
                }
            }
        }
    }

    /// Rounds the block's weights to a left operand.
    fn round(&self, e: &mut Emit) {
        for (pair, &to) in self.scores[0][0].chunks_exact(2).zip(&self.weights) {
            round_to_left(e, self.cube.elem, to, [pair[0], pair[1]]);
        }
    }
}

/// Folds numbers by a few folds that do not wait for one another.
fn chained(e: &mut Emit, op: Bin, numbers: &[Val]) -> Val {
    let (first, rest) = numbers.split_at(CHAINS.min(numbers.len()));
    let mut chains = first.to_vec();
    for (n, &x) in rest.iter().enumerate() {
        chains[n % CHAINS] = e.binary(op, chains[n % CHAINS], x);
    }
    chains.into_iter().reduce(|a, b| e.binary(op, a, b)).expect("there are some numbers")
}
