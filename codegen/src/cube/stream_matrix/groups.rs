//! Streams whose products groups of four planes multiply together (`wgmma`, see [`warpgroup`](crate::cube::warpgroup)): those of many
//! rows, as in prompts.
//!
//! A cube has two groups, each with 64 rows. Operands lie in shared memory as these products read them; of keys and values there are two
//! stages, each of a block of positions, or three where they are the same. While a group scores a block and weighs the values of the one
//! before it, the other makes weights: the two walk half a block apart, and wait for one another only where what one needs depends on
//! the other. The one behind brings what both read: all its units copy, or one of them asks the device for boxes of each whole block
//! ([`bulk`](crate::cube::bulk)), and both groups wait for what comes at barriers of its stages. Weights go from the registers where scores are summed to those of a left operand:
//! nothing but what was brought is read from shared memory.
//!
//! Exponentials are powers of two here: the largest score of a row is kept times the logarithm that this takes, and a number that all scores
//! are multiplied by last is made part of it.

use super::bring::Place;
use super::cube::{Cube, OfRows, Seen, Sums, tiles};
use super::{Boxes, End, MatrixPlan, ROWS_AT_ONCE};
use crate::cube::bulk;
use crate::cube::emit::{Array, Bin, Cmp, Elem, Emit, Shared, Un, Val};
use crate::cube::expr::Exprs;
use crate::cube::feed::{SPAN, Staged};
use crate::cube::fragment::{Factor, left, round_to_left};
use crate::cube::stream::{Span, least};
use crate::cube::warpgroup::{Left, Operand, ROWS, add, await_but, commit, fence, show_written};
use crate::stream::Monoid;

/// Sums that do not wait for each other, where a unit adds up a row.
const CHAINS: usize = 4;

/// Where groups meet, by the numbers of barriers: one of them waits there for the other, which goes on. It may be a block ahead, so there
/// are two of each, in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meet {
    /// The second waits for the first to have begun to multiply.
    Turn = 1,
    /// It waits until the first has scored a block, where the keys of that are to be written over.
    Scored = 3,
    /// The same of a block whose values have been weighed.
    Weighed = 5,
    /// The first waits for what the second brings.
    Brought = 7,
    /// All of the second wait for one another.
    Second = 9,
    /// All of a group do.
    Own = 10,
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
    /// The weights of 16 positions each, as a left operand; none where nothing is weighed.
    weights: Vec<Array>,
    sums: Sums,
    max: OfRows,
    sum: OfRows,
    /// What the device brings, if it does, and the barriers of the stages.
    boxes: Option<(&'a Boxes, Shared)>,
}

/// What a stage is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operands {
    Keys,
    Values,
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
    let values = (plan.value_stages() > 0).then(|| Staged::new(e, elem, MatrixPlan::values_layout(t), 1, 2));
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
    let weighed = if plan.values.is_some() { t.positions / 16 } else { 0 };
    let weights = (0..weighed).map(|_| left(e, elem)).collect();
    let sums = tiles(e, 1, t.columns / 8);
    let all = plan.key_stages() + plan.value_stages();
    let boxes = plan.brought(t).map(|boxes| (boxes, e.shared(Elem::U32, 2 * all as usize)));
    let mut groups =
        Groups { cube, rows, keys, values, group, first_row, scores, weights, sums, max, sum, boxes };
    let some = e.lt(seen.from, seen.until);
    e.if_(some, |e| groups.walk(e, x, seen));
    let Groups { cube, sums, max, sum, .. } = groups;
    cube.fold_units(e, [&max, &sum]);
    if cube.stream().by == Monoid::Softmax {
        // As all others keep it.
        let natural = e.f32(std::f32::consts::LN_2);
        for &max in &max {
            let largest = e.get(max);
            let none = e.cmp(Cmp::Eq, largest, least);
            let largest = e.mul(largest, natural);
            let largest = e.select(none, least, largest);
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
        let [of_first, of_second] = [zero, one].map(|n| e.cmp(Cmp::Eq, self.group, n));
        let half = self.cube.t.units() / 2;
        let (unit, before) = (e.unit(), e.u32(half));
        let in_second = (e.sub(unit, before), half);
        let in_group = e.rem(unit, before);
        for (block, turn) in [(from, zero), (second, one)] {
            let part = self.part(e, turn);
            self.cube.read_now(e, x, block, part, in_group);
        }
        if self.boxes.is_some() {
            self.make_barriers(e);
            // The rows.
            e.await_copies();
            show_written(e);
            e.sync();
            self.cube.bringing = in_second;
            e.if_(of_second, |e| {
                self.bring_block(e, x, (from, until), zero, Operands::Keys);
                self.bring_block(e, x, (from, until), zero, Operands::Values);
                self.bring_block(e, x, (second, until), one, Operands::Keys);
            });
            self.await_block(e, (zero, zero), Operands::Keys);
        } else {
            self.bring_keys(e, x, (from, zero));
            e.group_copies();
            self.bring_values(e, x, (from, zero));
            let some = e.lt(second, until);
            e.if_(some, |e| self.bring_keys(e, x, (second, one)));
            e.group_copies();
            e.await_groups_but(1);
            show_written(e);
            e.sync();
        }
        self.score(e, zero);
        let scores: Vec<_> = self.scores.iter().flatten().flatten().copied().collect();
        await_but(e, 0, &scores, &[]);
        self.cube.positions.from = from;
        self.make_weights(e, x, &Seen { free: None, ..seen }, zero);
        self.round(e);
        // From here on, the second group brings what both multiply, and they do not wait for one another but where they must.
        if self.boxes.is_none() {
            e.await_copies();
            show_written(e);
        }
        e.sync();
        self.cube.bringing = in_second;
        let (weighs, shared) = (!self.weights.is_empty(), self.cube.plan.shared.is_some());
        let twice = e.u32(2 * self.cube.t.positions);
        let third = e.add(from, twice);
        e.if_(of_second, |e| {
            let stage = if shared { e.u32(2) } else { zero };
            self.bring_block(e, x, (third, until), stage, Operands::Keys);
            self.bring_block(e, x, (second, until), one, Operands::Values);
            e.group_copies();
        });
        let [stage, odd, parity] = [(); 3].map(|()| e.var(zero));
        let sums = self.sums.concat();
        e.for_step(second, until, step, |e, block| {
            let (here, round) = (e.get(stage), e.get(odd));
            let (next, next_round) = bulk::behind(e, (here, round), self.cube.plan.key_stages());
            // What the second group begins to multiply is multiplied behind what the first has begun, which makes weights meanwhile.
            let turn = e.get(parity);
            e.if_(of_second, |e| self.meet(e, Meet::Turn, turn));
            self.await_block(e, (next, next_round), Operands::Keys);
            self.score(e, next);
            if weighs {
                self.await_block(e, (here, round), Operands::Values);
                self.weigh(e, here);
            }
            e.if_(of_first, |e| self.come_by(e, Meet::Turn, turn));
            let other = e.sub(one, turn);
            let after = e.add(block, step);
            let ahead = self.cube.read_ahead(e, x, after, in_group);
            await_but(e, u32::from(weighs), &scores, &[]);
            let behind = e.add(block, twice);
            e.if_(of_first, |e| self.come_by(e, Meet::Scored, turn));
            e.if_(of_second, |e| {
                // Where these keys lie, others are to lie.
                self.meet(e, Meet::Scored, turn);
                if !shared {
                    self.bring_block(e, x, (behind, until), next, Operands::Keys);
                }
                if self.boxes.is_none() {
                    e.group_copies();
                    // The keys of the next block, and the values of this one.
                    e.await_groups_but(1);
                    show_written(e);
                    self.meet(e, Meet::Second, zero);
                    self.come_by(e, Meet::Brought, turn);
                }
            });
            self.cube.positions.from = block;
            let less = self.make_weights(e, x, &seen, other);
            if weighs {
                await_but(e, 0, &sums, &self.weights);
                e.if_(of_first, |e| self.come_by(e, Meet::Weighed, turn));
                e.if_(of_second, |e| {
                    // The same of the values of the block before.
                    self.meet(e, Meet::Weighed, turn);
                    if shared {
                        self.bring_block(e, x, (behind, until), here, Operands::Keys);
                    } else {
                        self.bring_block(e, x, (after, until), here, Operands::Values);
                    }
                    e.group_copies();
                });
                self.lessen(e, &less);
                self.round(e);
            }
            e.set(stage, next);
            e.set(odd, next_round);
            e.set(parity, other);
            if self.cube.once.is_some() {
                let part = self.part(e, turn);
                self.cube.keep_ahead(e, &ahead, part, in_group);
                self.meet(e, Meet::Own, self.group);
            }
            if self.boxes.is_none() {
                e.if_(of_first, |e| self.meet(e, Meet::Brought, turn));
            }
        });
        if weighs {
            let last = (e.get(stage), e.get(odd));
            self.await_block(e, last, Operands::Values);
            self.weigh(e, last.0);
            await_but(e, 0, &sums, &self.weights);
        }
    }

    /// Makes the barriers of all stages, by one unit. One unit tells of what comes to a stage.
    fn make_barriers(&self, e: &mut Emit) {
        let Some((_, memory)) = self.boxes else { return };
        let (unit, zero) = (e.unit(), e.u32(0));
        let first = e.cmp(Cmp::Eq, unit, zero);
        e.if_(first, |e| {
            for stage in 0..self.cube.plan.key_stages() + self.cube.plan.value_stages() {
                let at = e.u32(2 * stage);
                e.of_groups("barrier 1", &[], &[(memory, at)]);
            }
            e.of_groups("barriers-made", &[], &[]);
        });
    }

    /// The barrier for what comes to a stage.
    fn arrival(&self, e: &mut Emit, memory: Shared, (stage, what): (Val, Operands)) -> (Shared, Val) {
        let before = if what == Operands::Keys { 0 } else { self.cube.plan.key_stages() };
        let (two, before) = (e.u32(2), e.u32(2 * before));
        let at = e.mul(stage, two);
        (memory, e.add(at, before))
    }

    /// Waits for what comes to a stage, in an odd or an even round of all stages, where that is told at a barrier. Values that are keys have
    /// come as these.
    fn await_block(&self, e: &mut Emit, (stage, odd): (Val, Val), what: Operands) {
        let Some((_, memory)) = self.boxes else { return };
        if what == Operands::Keys || self.values.is_some() {
            let arrival = self.arrival(e, memory, (stage, what));
            e.await_barrier(arrival, odd);
        }
    }

    /// Waits at one of two barriers, for the other group or for all of the second.
    fn meet(&self, e: &mut Emit, at: Meet, turn: Val) {
        let (number, units) = self.barrier(e, at, turn);
        e.meet(number, units);
    }

    /// Lets the other group pass one.
    fn come_by(&self, e: &mut Emit, at: Meet, turn: Val) {
        let (number, units) = self.barrier(e, at, turn);
        e.come_by(number, units);
    }

    fn barrier(&self, e: &mut Emit, at: Meet, turn: Val) -> (Val, u32) {
        let (number, units) = (e.u32(at as u32), self.cube.t.units());
        let alone = matches!(at, Meet::Second | Meet::Own);
        (e.add(number, turn), if alone { units / 2 } else { units })
    }

    /// The part of what is kept for positions that this group has for one of two blocks.
    fn part(&self, e: &mut Emit, turn: Val) -> Val {
        let two = e.u32(2);
        let before = e.mul(self.group, two);
        e.add(before, turn)
    }

    /// Begins to bring the keys or the values of a block to a stage, of the positions up to one; nothing where it begins there or behind, or
    /// the values are keys.
    fn bring_block(
        &mut self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        (from, until): (Val, Val),
        stage: Val,
        what: Operands,
    ) {
        if what == Operands::Values && self.values.is_none() {
            return;
        }
        let step = e.u32(self.cube.t.positions);
        let end = e.add(from, step);
        let (some, whole) = (e.lt(from, until), e.cmp(Cmp::Le, end, until));
        let rest = e.not(whole);
        let rest = e.and(some, rest);
        let zero = e.u32(0);
        let one = e.cmp(Cmp::Eq, self.cube.bringing.0, zero);
        match self.boxes {
            None => e.if_(whole, |e| {
                self.cube.whole = true;
                self.copy_block(e, x, (from, stage), what);
                self.cube.whole = false;
            }),
            Some((boxes, memory)) => {
                let asks = e.and(whole, one);
                e.if_(asks, |e| self.ask(e, (boxes, memory), (from, stage), what));
            }
        }
        e.if_(rest, |e| {
            self.copy_block(e, x, (from, stage), what);
            // The device would bring what lies beyond the last position that is seen, where there may be anything.
            if let Some((_, memory)) = self.boxes {
                e.await_copies();
                show_written(e);
                self.meet(e, Meet::Second, zero);
                let arrival = self.arrival(e, memory, (stage, what));
                e.if_(one, |e| e.of_groups("leave", &[], &[arrival]));
            }
        });
    }

    /// Copies the keys or the values of a block, by all units that bring operands.
    fn copy_block(&self, e: &mut Emit, x: &mut Exprs<'_>, block: (Val, Val), what: Operands) {
        match what {
            Operands::Keys => self.bring_keys(e, x, block),
            Operands::Values => self.bring_values(e, x, block),
        }
    }

    /// Asks the device for boxes of the keys or the values of a block, by one unit.
    fn ask(
        &self,
        e: &mut Emit,
        (boxes, memory): (&Boxes, Shared),
        (from, stage): (Val, Val),
        what: Operands,
    ) {
        let (full, zero) = (self.arrival(e, memory, (stage, what)), e.u32(0));
        let known = [(&self.cube.stream().batch[..], &self.cube.batch[..])];
        match (what, &boxes.values, &self.values) {
            (Operands::Keys, ..) => {
                bulk::expect(e, full, boxes.keys.iter());
                for (n, (map, staged)) in boxes.keys.iter().zip(&self.keys).enumerate() {
                    bulk::ask_for(e, (n, map), (staged, stage), (from, zero), &known, full);
                }
            }
            (Operands::Values, Some(map), Some(staged)) => {
                bulk::expect(e, full, std::iter::once(map));
                bulk::ask_for(e, (boxes.keys.len(), map), (staged, stage), (zero, from), &known, full);
            }
            (Operands::Values, ..) => {}
        }
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
                    add(e, Factor::Half(cube.elem), &sums[0], Left::Shared(of_rows), of_positions, adds);
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
            add(e, Factor::Half(self.cube.elem), &self.sums[0], Left::Registers(weights), of_columns, true);
        }
        commit(e);
    }

    /// Makes weights of the block's sums, in the place of the first of these. Gives what earlier sums of each row are to be multiplied by,
    /// where weights are a softmax.
    fn make_weights(&self, e: &mut Emit, x: &mut Exprs<'_>, seen: &Seen, turn: Val) -> Vec<Val> {
        let none = e.u32(0);
        let part = self.part(e, turn);
        x.scope(|x| self.cube.make_scores(e, x, (none, part), (seen.mask, seen.free), &self.scores));
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
