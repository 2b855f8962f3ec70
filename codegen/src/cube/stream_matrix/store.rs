//! What a cube of a stream leaves: elements of the result, or what is known of a part of the positions.

use latentc_ir::ValueId;

use super::cube::{Cube, OfRows, Sums};
use crate::cube::emit::{Buf, Cmp, Elem, Emit, Val};
use crate::cube::expr::Exprs;
use crate::cube::fragment::in_packs;
use crate::cube::split::KEPT;
use crate::cube::stream::{divisor, finish, index};
use crate::stream::Monoid;

impl Cube<'_> {
    /// Does something with each two neighbours of the unit's sums: which of its rows they are of, the first one's column in the cube, the sums.
    fn each(&self, e: &mut Emit, sums: &Sums, mut body: impl FnMut(&mut Emit, usize, Val, [Val; 2])) {
        let own = e.u32(self.t.columns / self.t.across);
        let first = e.mul(self.right, own);
        let first = e.add(first, self.plane.column);
        for (high, sums) in sums.iter().enumerate() {
            for (n, &tile) in sums.iter().enumerate() {
                for row in 0..2 {
                    let more = e.u32(8 * n as u32);
                    let column = e.add(first, more);
                    let pair = [0, 1].map(|right| {
                        let at = e.u32(2 * row as u32 + right);
                        e.load(tile, at)
                    });
                    body(e, 2 * high + row, column, pair);
                }
            }
        }
    }

    /// Leaves what is known of a part, as [`split`](super::split) wants it. `first` is the number of the first row there.
    pub(super) fn keep(&self, e: &mut Emit, first: Val, [max, sum]: [&OfRows; 2], sums: &Sums, kept: Buf) {
        let columns = self.columns.total;
        let (more, one) = (e.u32(KEPT), e.u32(1));
        let pitch = e.add(columns, more);
        let lines: Vec<_> = self
            .mine
            .iter()
            .map(|row| {
                let number = e.add(self.rows.from, row.number);
                let line = e.add(first, number);
                e.mul(line, pitch)
            })
            .collect();
        let writes = self.one_of_a_row(e);
        for (half, row) in self.mine.iter().enumerate() {
            let writes = e.and(writes, row.exists);
            e.if_(writes, |e| {
                let at = e.add(lines[half], columns);
                let max = e.get(max[half]);
                e.store(kept, at, max);
                let at = e.add(at, one);
                let sum = e.get(sum[half]);
                e.store(kept, at, sum);
                if self.plan.values.is_none() {
                    e.store(kept, lines[half], sum);
                }
            });
        }
        // Neighbours are stored at once. Of an even number of columns there is none of two without the other.
        let paired = self.plan.columns.is_multiple_of(2);
        self.each(e, sums, |e, half, column, pair| {
            let number = e.add(self.columns.from, column);
            let keep = |e: &mut Emit, number: Val, store: &dyn Fn(&mut Emit, Val)| {
                let column_exists = e.lt(number, columns);
                let exists = e.and(self.mine[half].exists, column_exists);
                e.if_(exists, |e| {
                    let at = e.add(lines[half], number);
                    store(e, at);
                });
            };
            if paired {
                return keep(e, number, &|e, at| {
                    let two = e.u32(2);
                    let (at, pair) = (e.div(at, two), e.pack(Elem::F32, &pair));
                    e.store_pack(kept, at, &pair);
                });
            }
            for (right, sum) in (0..).zip(pair) {
                let right = e.u32(right);
                let number = e.add(number, right);
                keep(e, number, &|e, at| e.store(kept, at, sum));
            }
        });
    }

    /// Whether the unit is the first of the four of a row, in the first of the planes that have it.
    fn one_of_a_row(&self, e: &mut Emit) -> Val {
        let zero = e.u32(0);
        let (no_column, no_plane) =
            (e.cmp(Cmp::Eq, self.plane.column, zero), e.cmp(Cmp::Eq, self.right, zero));
        e.and(no_column, no_plane)
    }

    /// Computes the epilogue of what was folded for each row and stores it.
    fn store_rows(&self, e: &mut Emit, x: &mut Exprs<'_>, of: &[(ValueId, &OfRows)], output: Buf) {
        let writes = self.one_of_a_row(e);
        for (n, row) in self.mine.iter().enumerate() {
            let writes = e.and(writes, row.exists);
            let known = [(&self.stream().batch[..], &self.batch[..]), (self.rows.axes, &row.index[..])];
            e.if_(writes, |e| {
                let folded: Vec<_> = of.iter().map(|(fold, rows)| (*fold, e.get(rows[n]))).collect();
                finish(e, x, &known, folded, output);
            });
        }
    }

    /// Divides by the sums of the weights if these are a softmax, computes the epilogue, stores.
    pub(super) fn store(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        [max, sum]: [&OfRows; 2],
        sums: &Sums,
        output: Buf,
    ) {
        let product = self.stream().product;
        match (self.stream().by, self.plan.values) {
            (Monoid::Max, _) => return self.store_rows(e, x, &[(product, max)], output),
            (Monoid::Sum | Monoid::Softmax, None) => {
                let top = self.stream().top.map(|top| (top, max));
                let folded: Vec<_> = [(product, sum)].into_iter().chain(top).collect();
                return self.store_rows(e, x, &folded, output);
            }
            (Monoid::Softmax | Monoid::Sum, Some(_)) => {}
        }
        let softmax = self.stream().by == Monoid::Softmax;
        let one = e.f32(1.0);
        let parts: Vec<_> = sum
            .iter()
            .map(|&sum| {
                let sum = e.get(sum);
                let divisor = divisor(e, sum);
                e.div(one, divisor)
            })
            .collect();
        let body = x.body();
        let root = body.results[0];
        // Neighbours are stored at once where they are neighbours in memory, too. There is none of two such without the other.
        let packed = body.ty(root).dtype.is_float() && in_packs(body, root, &self.stream().n);
        self.each(e, sums, |e, half, column, pair| {
            let row = &self.mine[half];
            let known = |at_column: &[Val]| {
                let of_row = [(&self.stream().batch[..], &self.batch[..]), (self.rows.axes, &row.index[..])];
                let known = of_row.into_iter().chain([(self.columns.axes, at_column)]);
                [product, root].map(|v| index(&body.ty(v).axes, &known.clone().collect::<Vec<_>>()))
            };
            let element = |e: &mut Emit, x: &mut Exprs<'_>, at: [Vec<Val>; 2], sum: Val| {
                let y = if softmax { e.mul(sum, parts[half]) } else { sum };
                x.scope(|x| {
                    let [of_product, of_root] = at;
                    x.define(product, of_product, y);
                    x.element(e, root, &of_root)
                })
            };
            let columns = [0, 1].map(|right| {
                let right = e.u32(right);
                let column = e.add(column, right);
                let (at, exists) = self.columns.at(e, x, column);
                (known(&at), e.and(row.exists, exists))
            });
            let axes = &body.ty(root).axes;
            if packed {
                e.if_(columns[0].1, |e| {
                    let two = e.u32(2);
                    let address = x.join(e, &columns[0].0[1], axes);
                    let address = e.div(address, two);
                    let numbers: Vec<_> =
                        columns.into_iter().zip(pair).map(|((at, _), sum)| element(e, x, at, sum)).collect();
                    e.store_numbers(output, address, &numbers);
                });
                return;
            }
            for ((at, exists), sum) in columns.into_iter().zip(pair) {
                e.if_(exists, |e| {
                    let address = x.join(e, &at[1], axes);
                    let element = element(e, x, at, sum);
                    e.store(output, address, element);
                });
            }
        });
    }
}
