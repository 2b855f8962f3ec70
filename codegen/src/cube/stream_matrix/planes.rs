//! Streams that planes multiply by themselves (`mma`), with operands from shared memory by `ldmatrix`.

use super::bring::Place;
use super::cube::{Cube, OfRows, Seen, Sums, tiles};
use super::{End, ROWS_AT_ONCE};
use crate::cube::emit::{Bin, Elem, Emit, Shared, Val};
use crate::cube::expr::Exprs;
use crate::cube::fragment::{Lines, PACK, as_left, left, load_columns, load_eight, load_rows, sums};
use crate::cube::stream::{least, seen, where_seen};
use crate::stream::Monoid;

/// A cube whose planes multiply by themselves.
struct Planes<'a> {
    cube: Cube<'a>,
    /// The rows' operands: rows by depth.
    left: Shared,
    /// Positions by depth.
    keys: Shared,
    /// Positions by columns, if they are not the keys.
    values: Shared,
    /// Rows by positions, if planes share them.
    scores: Option<Shared>,
    /// Which stage the block at hand lies in, of as many as there are.
    stage: Val,
    /// Which part of what is kept for positions is that of the block at hand.
    turn: Val,
}

/// Walks the positions, and ends with what is made of the sums.
pub(super) fn walk(e: &mut Emit, x: &mut Exprs<'_>, cube: Cube<'_>, (from, to): (Val, Val), end: End<'_>) {
    let [left, keys, values, scores] = cube.plan.elements(cube.t);
    let (elem, keys) = (cube.elem, e.shared(cube.elem, keys as usize));
    let mut planes = Planes {
        cube,
        left: e.shared(elem, left as usize),
        keys,
        values: if values > 0 { e.shared(elem, values as usize) } else { keys },
        scores: (scores > 0).then(|| e.shared(Elem::F32, scores as usize)),
        stage: e.u32(0),
        turn: e.u32(0),
    };
    let (max, sum, sums) = planes.walk(e, x, (from, to));
    end(&planes.cube, e, x, [&max, &sum], &sums);
}

impl Planes<'_> {
    fn walk(&mut self, e: &mut Emit, x: &mut Exprs<'_>, (from, to): (Val, Val)) -> (OfRows, OfRows, Sums) {
        let (plan, t) = (self.cube.plan, self.cube.t);
        self.cube.find_rows(e, x);
        let sight = self.cube.seen(e, x, (from, to));
        let (from, until) = (sight.from, sight.until);
        self.cube.positions.total = until;
        let stream = self.cube.stream();
        let (nothing, least) = (e.f32(0.0), e.f32(least(stream.by)));
        let max: OfRows = self.cube.mine.iter().map(|_| e.var(least)).collect();
        let sum: OfRows = self.cube.mine.iter().map(|_| e.var(nothing)).collect();
        let sums = tiles(e, t.high, t.tiles());
        let (step, zero, one) = (e.u32(t.positions), e.u32(0), e.u32(1));
        let stage = e.var(zero);
        self.cube.positions.from = from;
        if plan.ahead {
            let some = e.lt(from, until);
            e.if_(some, |e| {
                x.scope(|x| self.bring(e, x));
                let unit = e.unit();
                self.cube.read_now(e, x, from, zero, unit);
            });
        }
        // The first block is on its way while the rows are brought.
        self.bring_rows(e, x);
        e.for_step(from, until, step, |e, first| {
            x.scope(|x| {
                if plan.ahead {
                    // What was begun in the round before is there, and what that round read is free.
                    e.await_copies();
                    e.sync();
                    let here = e.get(stage);
                    let next = e.add(first, step);
                    let some = e.lt(next, until);
                    (self.stage, self.cube.positions.from) = (e.sub(one, here), next);
                    e.if_(some, |e| x.scope(|x| self.bring(e, x)));
                    e.set(stage, self.stage);
                    (self.stage, self.cube.positions.from) = (here, first);
                    self.turn = here;
                    let unit = e.unit();
                    let ahead = self.cube.read_ahead(e, x, next, unit);
                    self.add_block(e, x, &sight, [&max, &sum], &sums);
                    let other = e.sub(one, here);
                    self.cube.keep_ahead(e, &ahead, other, unit);
                    return;
                }
                self.cube.positions.from = first;
                let asked = match (sight.mask, sight.asked) {
                    (Some(mask), Some(flag)) => Some(seen(
                        e,
                        x,
                        (stream, mask, &self.cube.batch),
                        [self.cube.rows, self.cube.positions],
                        (flag, t.units()),
                    )),
                    _ => None,
                };
                where_seen(e, asked, |e| {
                    // The block before has been used.
                    e.sync();
                    self.bring(e, x);
                    let unit = e.unit();
                    self.cube.read_now(e, x, first, zero, unit);
                    e.sync();
                    self.add_block(e, x, &sight, [&max, &sum], &sums);
                });
            });
        });
        self.cube.fold_units(e, [&max, &sum]);
        (max, sum, sums)
    }

    /// Brings the rows' operands into shared memory, where they stay.
    fn bring_rows(&self, e: &mut Emit, x: &mut Exprs<'_>) {
        let plan = self.cube.plan;
        for (n, p) in plan.scores.iter().enumerate() {
            let (first, pitch) = (plan.row_first(n), plan.row_pitch());
            let to = Place::Lines { to: self.left, first, pitch, stage: e.u32(0) };
            let width = plan.depths[n].next_multiple_of(16);
            let of = (p.rows, &p.depth[..], plan.depths[n]);
            self.cube.bring(e, x, of, self.cube.rows, (e.u32(0), width, ROWS_AT_ONCE), to);
        }
    }

    /// Adds a block that lies in shared memory.
    fn add_block(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        sight: &Seen,
        [max, sum]: [&OfRows; 2],
        sums: &Sums,
    ) {
        let mut scores = self.score(e, x, sight);
        if let Some(shared) = self.scores {
            scores = self.exchange(e, shared, &scores);
        }
        match (self.cube.stream().by, self.cube.plan.values) {
            (Monoid::Softmax, values) => {
                self.weigh(e, &scores, [max, sum], sums);
                if values.is_some() {
                    self.add_values(e, &scores, sums);
                }
            }
            (Monoid::Sum, Some(_)) => self.add_values(e, &scores, sums),
            (Monoid::Sum, None) => self.fold(e, &scores, Bin::Add, sum),
            (Monoid::Max, _) => self.fold(e, &scores, Bin::Max, max),
        }
    }

    /// Adds the block's scores up, or takes the largest, for each row.
    fn fold(&self, e: &mut Emit, scores: &Sums, op: Bin, to: &OfRows) {
        for (row, &to) in to.iter().enumerate() {
            let mut all = e.get(to);
            for &tile in &scores[row / 2] {
                for right in 0..2 {
                    let at = e.u32(2 * (row as u32 % 2) + right);
                    let score = e.load(tile, at);
                    all = e.binary(op, all, score);
                }
            }
            e.set(to, all);
        }
    }

    /// Brings the block's keys and values into shared memory.
    fn bring(&self, e: &mut Emit, x: &mut Exprs<'_>) {
        let (cube, plan, t) = (&self.cube, self.cube.plan, self.cube.t);
        let none = e.u32(0);
        for (n, p) in plan.scores.iter().enumerate() {
            let (first, pitch) = (plan.first(t, n), plan.key_pitch(t));
            let to = Place::Lines { to: self.keys, first, pitch, stage: self.stage };
            let of = (p.keys, &p.depth[..], plan.depths[n]);
            cube.bring(e, x, of, cube.positions, (none, plan.width(t, n), 1), to);
        }
        if let (None, Some(values)) = (plan.shared, plan.values) {
            let of = (values, &cube.stream().n[..], plan.columns);
            let to = Place::Lines { to: self.values, first: 0, pitch: t.columns + PACK, stage: self.stage };
            cube.bring(e, x, of, cube.positions, (cube.columns.from, t.columns, 1), to);
        }
    }

    /// The scores of the plane's positions: by tile, as sums of tensor cores lie.
    fn score(&self, e: &mut Emit, x: &mut Exprs<'_>, sight: &Seen) -> Sums {
        let (plan, t) = (self.cube.plan, self.cube.t);
        let (of_plane, part) = (e.u32(16 * t.high), e.u32(t.positions / t.across));
        let of_rows = e.u32(plan.row_pitch());
        let row = e.mul(self.cube.down, of_plane);
        let start = e.mul(row, of_rows);
        let rows = self.cube.plane.rows(e, Lines { start, pitch: plan.row_pitch() });
        let before = e.mul(self.cube.right, part);
        let start = self.staged(e, before, plan.key_pitch(t));
        let keys = self.cube.plane.columns_along(e, Lines { start, pitch: plan.key_pitch(t) });
        let mut found: Vec<Sums> = Vec::new();
        for (_, of) in &plan.sums {
            let sums = tiles(e, t.high, t.scored());
            for &p in of {
                let deep = plan.depths[p].div_ceil(16);
                // As many at once as are worth their text.
                let at_once = (1..=deep.clamp(1, 12)).rev().find(|n| deep.is_multiple_of(*n)).unwrap_or(1);
                let (none, all, step) = (e.u32(0), e.u32(16 * deep), e.u32(16 * at_once));
                let body = |e: &mut Emit, k: Val| {
                    let (rows, keys) = (e.add(rows, k), e.add(keys, k));
                    for k in 0..at_once {
                        let a: Vec<_> = (0..t.high)
                            .map(|h| {
                                let a = left(e, self.cube.elem);
                                let more = plan.row_first(p) + 16 * k + h * 16 * plan.row_pitch();
                                load_rows(e, a, self.left, rows, more);
                                a
                            })
                            .collect();
                        for n in (0..t.scored()).step_by(2) {
                            let more = plan.first(t, p) + 16 * k + n * 8 * plan.key_pitch(t);
                            let b = if n + 1 == t.scored() {
                                vec![load_eight(e, self.cube.elem, self.keys, keys, more, false)]
                            } else {
                                load_columns(e, self.cube.elem, self.keys, keys, more, false).into()
                            };
                            for (a, sums) in a.iter().zip(&sums) {
                                for (&sum, &b) in sums[n as usize..].iter().zip(&b) {
                                    e.multiply_matrices(*a, b, sum, self.cube.elem);
                                }
                            }
                        }
                    }
                };
                if deep == at_once { body(e, none) } else { e.for_step(none, all, step, body) }
            }
            found.push(sums);
        }
        self.cube.make_scores(e, x, (before, self.turn), (sight.mask, sight.free), &found);
        found.swap_remove(0)
    }

    /// Where a line of the block begins in its tile.
    fn staged(&self, e: &mut Emit, line: Val, pitch: u32) -> Val {
        let (size, pitch) = (e.u32(self.cube.t.positions), e.u32(pitch));
        let before = e.mul(self.stage, size);
        let line = e.add(before, line);
        e.mul(line, pitch)
    }

    /// Scores of all positions of the block for those of the plane's own part.
    fn exchange(&self, e: &mut Emit, shared: Shared, own: &Sums) -> Sums {
        let t = self.cube.t;
        let (of_plane, pitch, part, two) =
            (e.u32(16 * t.high), e.u32(t.score_pitch()), e.u32(t.positions / t.across), e.u32(2));
        let row = e.mul(self.cube.down, of_plane);
        let row = e.add(row, self.cube.plane.row);
        let row = e.mul(row, pitch);
        let row = e.add(row, self.cube.plane.column);
        let before = e.mul(self.cube.right, part);
        let start = e.add(row, before);
        // In pairs.
        let place = |e: &mut Emit, start: Val, high: usize, tile: usize, half: u32| {
            let more = e.u32(8 * tile as u32 + (16 * high as u32 + 8 * half) * t.score_pitch());
            let at = e.add(start, more);
            e.div(at, two)
        };
        for (high, own) in own.iter().enumerate() {
            for (n, &tile) in own.iter().enumerate() {
                for half in 0..2 {
                    let pair = [0, 1].map(|i| {
                        let i = e.u32(2 * half + i);
                        e.load(tile, i)
                    });
                    let pair = e.pack(Elem::F32, &pair);
                    let at = place(e, start, high, n, half);
                    e.store_pack(shared, at, &pair);
                }
            }
        }
        e.sync();
        let mut tile = |high: usize, n: usize| {
            let tile = sums(e);
            for half in 0..2 {
                let at = place(e, row, high, n, half);
                let pair = e.load_pack(shared, at, 2, true);
                for i in 0..2 {
                    let (to, number) = (e.u32(2 * half + i), e.element_of(&pair, i));
                    e.store(tile, to, number);
                }
            }
            tile
        };
        (0..own.len()).map(|high| (0..t.positions as usize / 8).map(|n| tile(high, n)).collect()).collect()
    }

    /// Turns the block's scores into weights. What was summed of earlier blocks counts less by a factor of the row.
    fn weigh(&self, e: &mut Emit, scores: &Sums, [max, sum]: [&OfRows; 2], sums: &Sums) {
        for row in 0..self.cube.mine.len() {
            let (high, half) = (row / 2, row % 2);
            let places = [2 * half as u32, 2 * half as u32 + 1];
            let old = e.get(max[row]);
            let mut new = old;
            for &tile in &scores[high] {
                for at in places {
                    let at = e.u32(at);
                    let score = e.load(tile, at);
                    new = e.binary(Bin::Max, new, score);
                }
            }
            for bits in [1, 2] {
                let other = e.shuffle_xor(new, bits);
                new = e.binary(Bin::Max, new, other);
            }
            e.set(max[row], new);
            let less = e.sub(old, new);
            let factor = e.quick_exp(less);
            let known = e.get(sum[row]);
            let mut total = e.mul(known, factor);
            for &tile in &scores[high] {
                for at in places {
                    let at = e.u32(at);
                    let score = e.load(tile, at);
                    let less = e.sub(score, new);
                    let weight = e.quick_exp(less);
                    e.store(tile, at, weight);
                    total = e.add(total, weight);
                }
            }
            e.set(sum[row], total);
            for &tile in &sums[high] {
                for at in places {
                    let at = e.u32(at);
                    let known = e.load(tile, at);
                    let known = e.mul(known, factor);
                    e.store(tile, at, known);
                }
            }
        }
    }

    /// Adds the block's values times their weights.
    fn add_values(&self, e: &mut Emit, weights: &Sums, sums: &Sums) {
        let (plan, t) = (self.cube.plan, self.cube.t);
        let (first, pitch) = match plan.shared {
            Some(product) => (plan.first(t, product), plan.key_pitch(t)),
            None => (0, t.columns + PACK),
        };
        let (own, none) = (e.u32(t.columns / t.across), e.u32(0));
        let columns = e.mul(self.cube.right, own);
        let start = self.staged(e, none, pitch);
        let start = e.add(start, columns);
        let named = self.cube.plane.columns_across(e, Lines { start, pitch });
        for k in 0..t.positions as usize / 16 {
            let a: Vec<_> =
                weights.iter().map(|w| as_left(e, self.cube.elem, [w[2 * k], w[2 * k + 1]])).collect();
            for n in (0..t.tiles() as usize).step_by(2) {
                let more = first + 16 * k as u32 * pitch + 8 * n as u32;
                let b = load_columns(e, self.cube.elem, self.values, named, more, true);
                for (a, sums) in a.iter().zip(sums) {
                    for (&sum, b) in sums[n..].iter().zip(b) {
                        e.multiply_matrices(*a, b, sum, self.cube.elem);
                    }
                }
            }
        }
    }
}
