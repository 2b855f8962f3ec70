//! What a cube keeps of its row: each value is computed once, by all units side by side, and read by all of them from then on.

use latentc_ir::{AxisId, DType, Inst, Op, ValueId};

use super::emit::{Cmp, Elem, Emit, Shared, Val};
use super::expr::{Exprs, Fold};

/// The row that a cube walks.
pub(super) struct Row<'r> {
    /// The axes that number the rows.
    pub(super) axes: &'r [AxisId],
    /// The row's index.
    pub(super) index: &'r [Val],
    /// Memory for one number per unit.
    pub(super) scratch: Shared,
    /// Units of the cube.
    pub(super) units: u32,
}

impl Row<'_> {
    /// The axes within the row among these.
    fn local(&self, axes: &[AxisId]) -> Vec<AxisId> {
        axes.iter().copied().filter(|a| !self.axes.contains(a)).collect()
    }

    /// The index of a tensor with these axes whose part within the row has this number.
    fn at(&self, e: &mut Emit, x: &Exprs<'_>, axes: &[AxisId], number: Val) -> Vec<Val> {
        let local = self.local(axes);
        let parts = x.split(e, number, &local);
        let at = |a: &AxisId| match self.axes.iter().position(|r| r == a) {
            Some(n) => self.index[n],
            None => parts[local.iter().position(|l| l == a).expect("one of the two")],
        };
        axes.iter().map(at).collect()
    }

    /// Computes the `len` elements that a value has within the row, and keeps them.
    pub(super) fn keep<'a>(&self, e: &mut Emit, x: &mut Exprs<'a>, inst: &'a Inst, len: usize) {
        let value = inst.result();
        let elem = match x.body().ty(value).dtype {
            DType::F64 | DType::F32 | DType::Bf16 | DType::F16 => Elem::F32,
            DType::I32 => Elem::I32,
            DType::Bool => Elem::U32,
        };
        let memory = e.shared(elem, len.max(1));
        if let Op::Reduce { axis, .. } = inst.op {
            self.fold(e, x, inst, axis, len as u32, memory);
        } else if let Op::TopIndices { axis, into } = inst.op {
            self.select(e, x, inst, axis, into, memory);
        } else {
            self.each(e, x, value, |e, x, number, index| {
                let element = x.element(e, value, index);
                e.store(memory, number, element);
            });
        }
        e.sync();
        x.keep(value, self.axes, memory);
    }

    /// Does something for each element of a value within the row, given its number there and its index.
    fn each<'a>(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'a>,
        value: ValueId,
        mut body: impl FnMut(&mut Emit, &mut Exprs<'a>, Val, &[Val]),
    ) {
        let axes = &x.body().ty(value).axes;
        let (unit, total, step) = (e.unit(), x.total(e, &self.local(axes)), e.u32(self.units));
        e.for_step(unit, total, step, |e, number| {
            x.scope(|x| {
                let index = self.at(e, x, axes, number);
                body(e, x, number, &index);
            });
        });
    }

    /// Reductions: a group of units for each, as many groups at a time as there are.
    fn fold<'a>(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'a>,
        inst: &'a Inst,
        axis: AxisId,
        len: u32,
        memory: Shared,
    ) {
        let fold = Fold::of(x.body(), inst).expect("a reduction folds");
        let axes = &x.body().ty(inst.result()).axes;
        let terms = x.body().axis(axis).size.fixed().expect("rows that fit have fixed sizes");
        // As many units for each result as there are, but not more than terms.
        let most = u64::from(self.units / len.max(1)).min(terms).max(1);
        let width = 1 << most.ilog2();
        let (wide, groups, unit) = (e.u32(width), e.u32(self.units / width), e.unit());
        let (group, lane) = (e.div(unit, wide), e.rem(unit, wide));
        let (none, total) = (e.u32(0), e.u32(len));
        // The loop's ends are constants, so all units wait in it together.
        e.for_step(none, total, groups, |e, start| {
            let number = e.add(group, start);
            let inside = e.lt(number, total);
            let part = fold.start(e);
            e.if_(inside, |e| {
                x.scope(|x| {
                    let index = self.at(e, x, axes, number);
                    x.fold(e, (inst, &index), &fold, part, lane, wide);
                });
            });
            let part = e.get(part);
            e.fold_groups(fold.by(), part, self.scratch, lane, width);
            let first = e.cmp(Cmp::Eq, lane, none);
            let stores = e.and(first, inside);
            e.if_(stores, |e| {
                let whole = e.load(self.scratch, unit);
                e.store(memory, number, whole);
            });
            e.sync();
        });
    }

    /// Indices of the largest: each element that has few enough before it tells where it is.
    fn select<'a>(
        &self,
        e: &mut Emit,
        x: &mut Exprs<'a>,
        inst: &'a Inst,
        axis: AxisId,
        into: AxisId,
        memory: Shared,
    ) {
        let operand = inst.args[0];
        let of = &x.body().ty(operand).axes;
        let to = self.local(&x.body().ty(inst.result()).axes);
        let slots = x.extent(into);
        self.each(e, x, operand, |e, x, _, index| {
            let rank = x.rank(e, operand, index, axis);
            let kept = e.lt(rank, slots);
            e.if_(kept, |e| {
                let place = |a: &AxisId| of.iter().position(|o| o == a).map(|n| index[n]);
                let slot: Vec<_> = to.iter().map(|a| place(a).unwrap_or(rank)).collect();
                let slot = x.join(e, &slot, &to);
                let which = place(&axis).expect("the operand has the axis");
                let which = e.cast(which, Elem::I32);
                e.store(memory, slot, which);
            });
        });
    }
}
