//! What stands behind products: in which order their rows and columns are numbered, what an element of the result wants of their
//! sums, and where it goes.

use latentc_ir::{AxisId, Function, Op, Pairs, ValueId};

use super::contract::gather_index;
use super::emit::{Elem, Emit, Val};
use super::expr::Exprs;
use crate::contract::Rotation;
use crate::map::{append, made};

/// The end of a kernel of products.
#[derive(Clone, Debug)]
pub(super) struct Epilogue {
    /// The value whose elements are computed.
    pub(super) made: ValueId,
    /// The axes of the memory that these go to, in order.
    pub(super) memory: Vec<AxisId>,
    rotation: Option<Rotation>,
    /// The axis of a cache that is appended to, and the positions.
    append: Option<(AxisId, ValueId)>,
}

impl Epilogue {
    /// Of a body.
    pub(super) fn of(body: &Function) -> Epilogue {
        let append = append(body).and_then(|inst| match inst.op {
            Op::Append { to, .. } => Some((to, inst.args[2])),
            _ => None,
        });
        let memory = body.ty(body.results[0]).axes.clone();
        Epilogue { made: made(body), memory, rotation: Rotation::of(body), append }
    }

    /// The rotation, if its partners are neighbours among the numbers of these axes.
    pub(super) fn along(&self, body: &Function, group: &[AxisId]) -> Option<Rotation> {
        self.rotation.filter(|r| r.ends(body, group))
    }

    /// Whether what is made goes to a cache.
    pub(super) fn appends(&self) -> bool {
        self.append.is_some()
    }

    /// Whether what belongs to columns with numbers side by side goes to places side by side, as far as their axes do.
    pub(super) fn keeps_neighbours(&self, body: &Function, columns: &[AxisId]) -> bool {
        let halves = self.along(body, columns).is_some_and(|r| r.pairs == Pairs::Halves);
        let anywhere = |(_, at): (AxisId, ValueId)| body.ty(at).axes.iter().any(|a| columns.contains(a));
        !halves && !self.append.is_some_and(anywhere)
    }

    /// Whether the sums of one product are the result as they are.
    pub(super) fn plain(&self, products: &[ValueId]) -> bool {
        self.append.is_none() && products == [self.made]
    }

    /// The number that a row or column would have if all were numbered in order: partners stand side by side.
    pub(super) fn in_order(&self, e: &mut Emit, x: &Exprs<'_>, group: &[AxisId], number: Val) -> Val {
        match self.along(x.body(), group) {
            Some(Rotation { axis, pairs: Pairs::Halves }) => {
                let (two, n) = (e.u32(2), x.extent(axis));
                let (half, r) = (e.div(n, two), e.rem(number, n));
                let (pair, second) = (e.div(r, two), e.rem(r, two));
                let before = e.sub(number, r);
                let behind = e.mul(second, half);
                let first = e.add(before, pair);
                e.add(first, behind)
            }
            Some(Rotation { pairs: Pairs::Interleaved, .. }) | None => number,
        }
    }

    /// The element that is made at an index. `sum` has those of the products, by their number and whether the partner's is wanted.
    pub(super) fn element(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        known: &[(&[AxisId], &[Val])],
        products: &[ValueId],
        sum: &dyn Fn(&mut Emit, usize, bool) -> Val,
    ) -> Val {
        for (n, &product) in products.iter().enumerate() {
            let own = sum(e, n, false);
            x.define(product, gather_index(x, product, known), own);
        }
        let axis = self.rotation.and_then(|r| {
            let group = known.iter().find(|(group, _)| r.ends(x.body(), group))?;
            Some((r, group.1[group.0.iter().position(|a| *a == r.axis)?]))
        });
        if let Some((Rotation { axis, pairs }, at)) = axis {
            let partner = [x.turn(e, axis, pairs, at).partner];
            let axis = [axis];
            let moved: Vec<_> =
                [(&axis[..], &partner[..])].into_iter().chain(known.iter().copied()).collect();
            for (n, &product) in products.iter().enumerate() {
                let other = sum(e, n, true);
                x.define(product, gather_index(x, product, &moved), other);
            }
        }
        let index = gather_index(x, self.made, known);
        x.element(e, self.made, &index)
    }

    /// Stores what belongs at an index. `address` leads to the place in memory, but for the position in a cache.
    pub(super) fn store(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'_>,
        known: &[(&[AxisId], &[Val])],
        address: Val,
        store: impl FnOnce(&mut Emit, &mut Exprs<'_>, Val),
    ) {
        let Some((to, position)) = self.append else { return store(e, x, address) };
        x.scope(|x| {
            let at = gather_index(x, position, known);
            let place = x.element(e, position, &at);
            // A negative position becomes a large one, so one comparison finds all that lie outside of the cache.
            let place = e.cast(place, Elem::U32);
            let inside = e.lt(place, x.extent(to));
            e.if_(inside, |e| {
                x.scope(|x| {
                    let behind = self.memory.iter().position(|a| *a == to).map_or(0, |n| n + 1);
                    let stride = x.total(e, &self.memory[behind..]);
                    let step = e.mul(place, stride);
                    let address = e.add(address, step);
                    store(e, x, address);
                });
            });
        });
    }
}
