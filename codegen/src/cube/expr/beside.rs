//! Elements side by side: what a unit reads or makes at once, in accesses of several numbers.

use latentc_ir::{AxisId, DType, Inst, ValueId};

use super::{Exprs, zero};
use crate::cube::emit::{Emit, Val, Var};

impl<'a> Exprs<'a> {
    /// From here on, folds read so many terms at once where these lie side by side.
    pub(crate) fn in_packs(&mut self, pack: u32) {
        self.pack = pack;
    }

    /// How many indices of these axes are walked at once.
    pub(crate) fn pack_of(&self, axes: &[AxisId]) -> u32 {
        let last = axes.last().and_then(|a| self.body.axis(*a).size.fixed());
        if last.is_some_and(|n| n.is_multiple_of(self.pack.into())) { self.pack } else { 1 }
    }

    /// So many indices of these axes side by side, from the one with that number on, which is a multiple of how many they are; known as
    /// such to the end of the scope. The size of the last axis is a multiple, too.
    pub(crate) fn beside(&mut self, e: &mut Emit, axes: &[AxisId], first: Val, pack: u32) -> Vec<Vec<Val>> {
        let first = self.split(e, first, axes);
        self.beside_each(e, &first, pack)
    }

    /// As [`split`](Exprs::split), but of an index with others [beside](Exprs::beside) it, what all of them have in common is one value, and
    /// those parts that lie beside one another are known to.
    pub(super) fn split_beside(&mut self, e: &mut Emit, index: Val, axes: &[AxisId]) -> Vec<Val> {
        let lanes = self.lanes.iter().find(|lanes| lanes.contains(&index)).cloned();
        let (Some(lanes), Some((&last, others))) = (lanes, axes.split_last()) else {
            return self.split(e, index, axes);
        };
        let own = lanes.iter().position(|lane| *lane == index).expect("it is one of these");
        if let Some((.., parts)) = self.parts.iter().find(|(of, with, _)| *of == lanes[0] && with == axes) {
            return parts[own].clone();
        }
        let pack = lanes.len() as u64;
        let parts: Vec<Vec<Val>> = match self.body.axis(last).size.fixed() {
            // All within one run of the last axis.
            Some(size) if size > 0 && size.is_multiple_of(pack) => {
                let first = self.split(e, lanes[0], axes);
                self.beside_each(e, &first, pack as u32)
            }
            // Whole runs of it.
            Some(size) if size > 0 && pack.is_multiple_of(size) => {
                let of_run = e.u32(size as u32);
                let first = e.div(lanes[0], of_run);
                let runs = self.beside_each(e, &[first], (pack / size) as u32);
                let within = (0..size as u32).map(|n| e.u32(n)).collect::<Vec<_>>();
                let mut parts = Vec::new();
                for run in runs {
                    let before = self.split_beside(e, run[0], others);
                    parts.extend(within.iter().map(|&n| [&before[..], &[n]].concat()));
                }
                parts
            }
            Some(_) | None => lanes.iter().map(|&lane| self.split(e, lane, axes)).collect(),
        };
        self.parts.push((lanes[0], axes.to_vec(), parts.clone()));
        parts[own].clone()
    }

    /// So many indices that differ in the last place, from a multiple of how many they are on; known to lie side by side.
    fn beside_each(&mut self, e: &mut Emit, first: &[Val], pack: u32) -> Vec<Vec<Val>> {
        let Some((&last, before)) = first.split_last() else { return vec![Vec::new()] };
        let lanes: Vec<_> = (0..pack)
            .map(|n| {
                let n = e.u32(n);
                e.add(last, n)
            })
            .collect();
        let indices = lanes.iter().map(|&lane| [before, &[lane]].concat()).collect();
        if pack > 1 {
            self.lanes.push(lanes);
        }
        indices
    }

    /// The indices side by side that an element of a value is at, with the place of their axis, if others lie beside it in memory.
    pub(super) fn beside_it(&self, value: ValueId, index: &[Val]) -> Option<(usize, Vec<Val>)> {
        let ty = self.body.ty(value);
        let size = |a: &AxisId| self.body.axis(*a).size.fixed();
        let n = ty.axes.iter().rposition(|a| size(a) != Some(1))?;
        let lanes = self.lanes.iter().find(|lanes| lanes.contains(&index[n]))?;
        let whole = size(&ty.axes[n]).is_some_and(|size| size.is_multiple_of(lanes.len() as u64));
        (whole && (ty.dtype.is_float() || ty.dtype == DType::I32)).then(|| (n, lanes.clone()))
    }

    /// Only the part that holds the index along `into` is computed.
    pub(super) fn concat(
        &mut self,
        e: &mut Emit,
        here: (&'a Inst, &[Val]),
        axes: &[AxisId],
        into: AxisId,
    ) -> Val {
        let (inst, index) = here;
        let (none, ty) = (e.u32(0), self.body.ty(inst.result()));
        let place = ty.position(into).expect("inference knows the result's axes");
        let parts: Vec<_> = axes.iter().enumerate().filter(|(_, a)| self.extent(**a) != none).collect();
        if let [(n, axis)] = parts[..] {
            return self.operand(e, here, n, &[(*axis, index[place])]);
        }
        // What lies side by side is of one part if all parts are whole packs.
        let size = |a: &AxisId| self.body.axis(*a).size.fixed();
        let whole = |pack: usize| axes.iter().all(|a| size(a).is_some_and(|n| n.is_multiple_of(pack as u64)));
        let beside = self.beside_it(inst.result(), index);
        let beside = beside.filter(|(n, lanes)| *n == place && whole(lanes.len()));
        let outs = self.start_beside(e, here, beside);
        let mut start = none;
        for (n, &axis) in parts {
            // What lies before the part becomes a large number, so one comparison finds both ends.
            let within: Vec<_> = outs.iter().map(|(at, _)| e.sub(at[place], start)).collect();
            let inside = e.lt(within[0], self.extent(axis));
            e.if_(inside, |e| {
                self.scope(|s| {
                    if within.len() > 1 {
                        s.lanes.push(within.clone());
                    }
                    for ((at, out), &j) in outs.iter().zip(&within) {
                        let x = s.operand(e, (inst, at), n, &[(axis, j)]);
                        e.set(*out, x);
                    }
                });
            });
            start = e.add(start, self.extent(axis));
        }
        self.end_beside(e, here, outs)
    }

    /// For an element of an instruction, and those beside it that are made with it, which has a place and indices: their indices, and registers
    /// for them.
    pub(super) fn start_beside(
        &self,
        e: &mut Emit,
        (inst, index): (&'a Inst, &[Val]),
        beside: Option<(usize, Vec<Val>)>,
    ) -> Vec<(Vec<Val>, Var)> {
        let all = match beside {
            None => vec![index.to_vec()],
            Some((n, lanes)) => {
                lanes.iter().map(|&lane| [&index[..n], &[lane], &index[n + 1..]].concat()).collect()
            }
        };
        let nothing = zero(e, self.body.ty(inst.result()).dtype);
        all.into_iter().map(|at| (at, e.var(nothing))).collect()
    }

    /// What became of the element; those beside it are known from here on.
    pub(super) fn end_beside(
        &mut self,
        e: &mut Emit,
        (inst, index): (&'a Inst, &[Val]),
        outs: Vec<(Vec<Val>, Var)>,
    ) -> Val {
        let mut own = None;
        for (at, out) in outs {
            let x = e.get(out);
            if at == index {
                own = Some(x);
            }
            self.define(inst.result(), at, x);
        }
        own.expect("it is one of these")
    }

    /// What lies side by side still does from another place on, if before it are whole packs.
    pub(super) fn slice(
        &mut self,
        e: &mut Emit,
        here: (&'a Inst, &[Val]),
        (axis, into): (AxisId, AxisId),
        start: u64,
    ) -> Val {
        let (inst, index) = here;
        let (by, ty) = (e.u32(start as u32), self.body.ty(inst.result()));
        let place = ty.position(into).expect("inference knows the result's axes");
        let beside = self.beside_it(inst.result(), index);
        let Some((_, lanes)) =
            beside.filter(|(n, lanes)| *n == place && start.is_multiple_of(lanes.len() as u64))
        else {
            let whole = e.add(index[place], by);
            return self.operand(e, here, 0, &[(axis, whole)]);
        };
        let moved: Vec<_> = lanes.iter().map(|&lane| e.add(lane, by)).collect();
        self.lanes.push(moved.clone());
        let mut own = None;
        for (lane, whole) in lanes.into_iter().zip(moved) {
            let at = [&index[..place], &[lane], &index[place + 1..]].concat();
            let x = self.operand(e, (inst, &at), 0, &[(axis, whole)]);
            if at == index {
                own = Some(x);
            }
            self.define(inst.result(), at, x);
        }
        own.expect("it is one of these")
    }
}
