//! What the cubes of a stream have in common, whoever multiplies: the rows of a unit, what these see of the positions, and the scores that
//! are made of sums.

use latentc_ir::{Op, ValueId};

use super::{Limit, MatrixPlan, Tiling, limit};
use crate::cube::emit::{Array, Bin, Buf, Cmp, Elem, Emit, Shared, Val, Var};
use crate::cube::expr::Exprs;
use crate::cube::fragment::{Plane, clear, sums};
use crate::cube::stream::{Span, index};
use crate::cube::target::Target;
use crate::stream::{Monoid, StreamPlan, cone, defined, is_elementwise};

/// A row of a unit: its number in the cube, its index, and whether there is such a row.
pub(super) struct Row {
    pub(super) number: Val,
    pub(super) index: Vec<Val>,
    pub(super) exists: Val,
}

/// A cube at work.
pub(super) struct Cube<'a> {
    pub(super) plan: &'a MatrixPlan,
    pub(super) t: Tiling,
    pub(super) elem: Elem,
    pub(super) inputs: &'a dyn Fn(ValueId) -> Option<Buf>,
    pub(super) batch: Vec<Val>,
    pub(super) rows: Span<'a>,
    pub(super) columns: Span<'a>,
    /// The block's; there are those only that some row sees.
    pub(super) positions: Span<'a>,
    pub(super) plane: Plane,
    /// The plane's rows, and its columns and positions, among those of the cube.
    pub(super) down: Val,
    pub(super) right: Val,
    /// The rows of the unit, two of each tile.
    pub(super) mine: Vec<Row>,
    /// Where what positions have once lies, if they have any.
    pub(super) once: Option<Shared>,
    /// The unit's number among those that bring operands, and how many these are.
    pub(super) bringing: (Val, u32),
    /// Whether all lines that are brought exist.
    pub(super) whole: bool,
}

/// What the mask lets the rows of a cube see.
pub(super) struct Seen {
    /// What is asked for each score, if anything is.
    pub(super) mask: Option<ValueId>,
    /// Whether it is asked for each block as well, and the memory for that.
    pub(super) asked: Option<Shared>,
    /// The first position that any of the rows sees, and the first behind it that none sees.
    pub(super) from: Val,
    pub(super) until: Val,
    /// The first position that all of them see, and the first behind it that not all see, if in between no mask need be asked.
    pub(super) free: Option<[Val; 2]>,
}

/// What a unit keeps of its rows.
pub(super) type OfRows = Vec<Var>;
/// Tiles of sums, for each 16 rows of a plane.
pub(super) type Sums = Vec<Vec<Array>>;

impl<'a> Cube<'a> {
    pub(super) fn stream(&self) -> &'a StreamPlan {
        &self.plan.stream
    }

    /// What scores are but for the mask, and what they are yet to be multiplied by to be that: whoever makes weights of them does so.
    pub(super) fn factor(&self) -> Option<(ValueId, f32)> {
        self.plan.scaled.filter(|_| self.t.by.in_groups())
    }

    /// Finds the rows of the unit, and what the scores have of these alone.
    pub(super) fn find_rows(&mut self, e: &mut Emit, x: &mut Exprs<'_>) {
        let t = self.t;
        let of_plane = e.u32(16 * t.high);
        let first = e.mul(self.down, of_plane);
        let first = e.add(first, self.plane.row);
        self.mine = (0..2 * t.high)
            .map(|n| {
                let below = e.u32(8 * n);
                let number = e.add(first, below);
                let (index, exists) = self.rows.at(e, x, number);
                Row { number, index, exists }
            })
            .collect();
        self.once_for_rows(e, x);
    }

    /// What the mask lets the rows see of the positions from one up to another.
    pub(super) fn seen(&self, e: &mut Emit, x: &mut Exprs<'_>, (from, to): (Val, Val)) -> Seen {
        let (body, t) = (x.body(), self.t);
        let mask = self.stream().mask.map(|mask| (mask, limit(body, self.stream(), mask)));
        let flag = mask.as_ref().map(|_| e.shared(Elem::I32, t.units() as usize));
        let mut seen =
            Seen { mask: mask.as_ref().map(|(mask, _)| *mask), asked: None, from, until: to, free: None };
        match (mask, flag) {
            (Some((_, Some(limit))), Some(scratch)) => {
                // Where all rows are at or behind it, and where the first of them is.
                let [most, least] =
                    [Bin::Max, Bin::Min].map(|op| self.limit_of_rows(e, x, &limit, scratch, op));
                if limit.lower {
                    seen.from = e.binary(Bin::Max, least, from);
                    seen.free = limit.all.then_some([most, to]);
                } else {
                    seen.until = e.binary(Bin::Min, most, to);
                    let end = e.binary(Bin::Min, least, to);
                    seen.free = limit.all.then_some([e.u32(0), end]);
                }
            }
            (Some(_), _) => seen.asked = flag,
            (None, _) => seen.free = Some([e.u32(0), to]),
        }
        seen
    }

    /// Brings together what the four units of a row have of it.
    pub(super) fn fold_units(&self, e: &mut Emit, [max, sum]: [&OfRows; 2]) {
        for (all, op) in [(sum, Bin::Add), (max, Bin::Max)] {
            for &one in all {
                for bits in [1, 2] {
                    let mine = e.get(one);
                    let other = e.shuffle_xor(mine, bits);
                    let both = e.binary(op, mine, other);
                    e.set(one, both);
                }
            }
        }
    }

    /// Computes what the scores have of the rows alone once.
    fn once_for_rows(&self, e: &mut Emit, x: &mut Exprs<'_>) {
        let body = x.body();
        let above = |v: ValueId| {
            cone(body, v, |_| true).iter().any(|v| defined(body, *v).is_some_and(|i| i.op == Op::Contract))
        };
        for value in cone(body, self.stream().scores, is_elementwise) {
            if body.ty(value).has(self.stream().along) || above(value) {
                continue;
            }
            for row in &self.mine {
                let known = [(&self.stream().batch[..], &self.batch[..]), (self.rows.axes, &row.index[..])];
                x.element(e, value, &index(&body.ty(value).axes, &known));
            }
        }
    }

    /// The largest or the least limit of the cube's rows: the first position of those that are seen from it on, or of those that are not.
    fn limit_of_rows(&self, e: &mut Emit, x: &mut Exprs<'_>, limit: &Limit, scratch: Shared, op: Bin) -> Val {
        let (unit, count) = (e.unit(), e.u32(self.t.rows));
        let number = e.rem(unit, count);
        // Beyond the last row, it is that once more.
        let (at_row, _) = self.rows.at(e, x, number);
        let known = [(&self.stream().batch[..], &self.batch[..]), (self.rows.axes, &at_row[..])];
        let axes = &x.body().ty(limit.value).axes;
        let value = x.scope(|x| x.element(e, limit.value, &index(axes, &known)));
        let value = e.fold_cube(op, value, scratch, (self.t.units(), Target::Cuda));
        let (zero, one, none) = (e.u32(0), e.u32(1), e.i32(0));
        // Positions are from 0 on.
        let behind = limit.lower != limit.inclusive;
        let some = e.cmp(if behind { Cmp::Le } else { Cmp::Lt }, none, value);
        let value = e.cast(value, Elem::U32);
        let end = if behind { e.add(value, one) } else { value };
        e.select(some, end, zero)
    }

    /// Makes the block's scores of their sums, in the place of the first of these, from so many positions on. Between what is `free`, no mask
    /// is asked.
    /// What positions have once lies in a `part` of its memory.
    pub(super) fn make_scores(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        (before, part): (Val, Val),
        (mask, free): (Option<ValueId>, Option<[Val; 2]>),
        found: &[Sums],
    ) {
        let t = self.t;
        let within = e.add(before, self.plane.column);
        let first = e.add(self.positions.from, within);
        let kept = self.once.map(|_| self.first_kept(e, part)).map(|kept| e.add(kept, within));
        let made = |e: &mut Emit, x: &mut Exprs<'_>, asked: bool| {
            for tile in 0..t.scored() {
                for right in 0..2 {
                    let more = e.u32(8 * tile + right);
                    let position = e.add(first, more);
                    let kept = kept.map(|kept| e.add(kept, more));
                    self.expression(e, x, (position, kept), (mask, asked), found, (tile, right));
                }
            }
        };
        match free {
            None => made(e, x, true),
            Some([start, end]) => {
                let count = e.u32(t.positions);
                let last = e.add(self.positions.from, count);
                let mut plain = e.cmp(Cmp::Le, last, end);
                if start.known() != Some(0) {
                    let begun = e.cmp(Cmp::Le, start, self.positions.from);
                    plain = e.and(plain, begun);
                }
                e.if_(plain, |e| made(e, x, false));
                let masked = e.not(plain);
                e.if_(masked, |e| made(e, x, true));
            }
        }
    }

    /// Makes the scores of a position and the unit's rows, in the place of the first sum. `kept` is where what it has once lies, and a mask
    /// counts as true unless it is `asked`.
    fn expression(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        (position, kept): (Val, Option<Val>),
        (mask, asked): (Option<ValueId>, bool),
        found: &[Sums],
        (tile, right): (u32, u32),
    ) {
        let (at_position, exists) =
            if asked { self.positions.clamped(e, position) } else { (position, e.bool(true)) };
        let nothing = e.f32(if self.stream().by == Monoid::Sum { 0.0 } else { f32::NEG_INFINITY });
        for (n, row) in self.mine.iter().enumerate() {
            let (high, at) = (n / 2, e.u32(2 * (n as u32 % 2) + right));
            let known = [
                (&self.stream().batch[..], &self.batch[..]),
                (self.rows.axes, &row.index[..]),
                (self.positions.axes, &[at_position][..]),
            ];
            let score = x.scope(|x| {
                let body = x.body();
                for ((value, _), tiles) in self.plan.sums.iter().zip(found) {
                    let sum = e.load(tiles[high][tile as usize], at);
                    let value = self.factor().map_or(*value, |(scaled, _)| scaled);
                    x.define(value, index(&body.ty(value).axes, &known), sum);
                }
                if let (Some(mask), false) = (mask, asked) {
                    let seen = e.bool(true);
                    x.define(mask, index(&body.ty(mask).axes, &known), seen);
                }
                self.known_once(e, x, &known, kept);
                x.element(e, self.stream().scores, &index(&body.ty(self.stream().scores).axes, &known))
            });
            let score = if asked { e.select(exists, score, nothing) } else { score };
            e.store(found[0][high][tile as usize], at, score);
        }
    }
}

/// So many times 16 rows of so many tiles of sums, all zero.
pub(super) fn tiles(e: &mut Emit, high: u32, count: u32) -> Sums {
    let mut tile = || {
        let tile = sums(e);
        clear(e, tile);
        tile
    };
    (0..high).map(|_| (0..count).map(|_| tile()).collect()).collect()
}
