//! The elements of a body's values, as instructions of a kernel.
//!
//! Everything is computed where it is wanted: an element of a value is asked for at an index, asks for the elements of
//! its operands at the indices that follow, and so on down to loads. Ops on axes cost index arithmetic only.
//! What was computed is remembered per value and index for as long as it is in scope.

use std::collections::HashMap;

use latentc_ir::{AxisId, Binary, DType, Fields, Function, Inst, Op, Pairs, Reduce, Unary, ValueId};

use super::emit::{Bin, Bits, Buf, Cmp, Elem, Emit, Shared, Un, Val, Var};
use super::target::{Target, register};

/// Terms of a fold that a unit reads at once, at most, one by one and in packs.
const AT_ONCE: u64 = 8;
const PACKED_AT_ONCE: u64 = 16;

/// Where a value comes from.
#[derive(Clone, Copy)]
enum Source<'a> {
    Param(Buf),
    Inst(&'a Inst),
    /// All of its row that is walked, computed before.
    Row(Shared),
    /// The cache that an `append` writes: nothing reads it.
    Nowhere,
}

/// The index of the elements that a kernel stores, and the same as one number.
pub(crate) struct Place {
    pub(crate) axes: Vec<AxisId>,
    pub(crate) index: Vec<Val>,
    pub(crate) flat: Val,
}

/// The elements of a body's values.
pub(crate) struct Exprs<'a> {
    body: &'a Function,
    target: Target,
    /// The extent of each axis.
    extents: Vec<Val>,
    sources: Vec<Source<'a>>,
    /// An index that is known as one number as well, so that what lies in memory like the output is read without a division.
    place: Option<Place>,
    /// The axes that number the rows, where rows are kept.
    rows: Vec<AxisId>,
    known: HashMap<(ValueId, Vec<Val>), Val>,
    /// The keys of `known`, in order of insertion.
    order: Vec<(ValueId, Vec<Val>)>,
    /// What is known of indices along rotated axes, in order of insertion.
    turns: Vec<(AxisId, Pairs, Val, Turn)>,
    /// How many terms of a fold side by side a unit reads in one access, if they lie so.
    pack: u32,
    /// Whether exponentials are made by the fastest instruction there is: see [`quick`](Exprs::quick).
    quick: bool,
    /// Indices side by side, the first of them a multiple of how many they are: what is read at one is read at all, in one access.
    lanes: Vec<Vec<Val>>,
    /// What these are as indices of other axes: for the first of them and the axes, all of them. In order of insertion.
    parts: Vec<(Val, Vec<AxisId>, Vec<Vec<Val>>)>,
}

/// An index along a rotated axis.
#[derive(Clone, Copy)]
pub(crate) struct Turn {
    /// The number of its pair.
    pair: Val,
    /// The index of its partner.
    pub(crate) partner: Val,
    /// Whether it is the second of the two.
    second: Val,
}

impl<'a> Exprs<'a> {
    /// Over these buffers, one for each parameter that is read.
    pub(crate) fn new(body: &'a Function, target: Target, extents: Vec<Val>, inputs: &[Option<Buf>]) -> Self {
        let mut sources = vec![Source::Nowhere; body.values.len()];
        for (p, buf) in body.params.iter().zip(inputs) {
            if let Some(buf) = buf {
                sources[p.0 as usize] = Source::Param(*buf);
            }
        }
        for inst in &body.body {
            sources[inst.result().0 as usize] = Source::Inst(inst);
        }
        let (known, order, turns) = (HashMap::new(), Vec::new(), Vec::new());
        let (rows, lanes, parts) = (Vec::new(), Vec::new(), Vec::new());
        Exprs {
            body,
            target,
            extents,
            sources,
            place: None,
            rows,
            known,
            order,
            turns,
            pack: 1,
            quick: false,
            lanes,
            parts,
        }
    }

    /// The body whose values these are.
    pub(crate) fn body(&self) -> &'a Function {
        self.body
    }

    /// Has exponentials made in one instruction, for what is folded behind them: numbers that are too small for their dtype become 0, and
    /// the others are as far off as [`quick_exp`](Emit::quick_exp) says, which `check` allows for.
    pub(crate) fn quick(&mut self) {
        self.quick = true;
    }

    /// What it is emitted for.
    pub(crate) fn target(&self) -> Target {
        self.target
    }

    /// The extent of an axis.
    pub(crate) fn extent(&self, axis: AxisId) -> Val {
        self.extents[axis.0 as usize]
    }

    /// The number of indices of these axes together.
    pub(crate) fn total(&self, e: &mut Emit, axes: &[AxisId]) -> Val {
        axes.iter().fold(e.u32(1), |n, &a| e.mul(n, self.extent(a)))
    }

    /// One number as an index of these axes.
    pub(crate) fn split(&self, e: &mut Emit, flat: Val, axes: &[AxisId]) -> Vec<Val> {
        let mut rest = flat;
        let mut index = Vec::with_capacity(axes.len());
        for (n, &a) in axes.iter().enumerate().rev() {
            let extent = self.extent(a);
            if extent == e.u32(1) {
                index.push(e.u32(0));
            } else if n == 0 {
                index.push(rest);
            } else {
                index.push(e.rem(rest, extent));
                rest = e.div(rest, extent);
            }
        }
        index.reverse();
        index
    }

    /// An index of these axes as one number.
    pub(crate) fn join(&self, e: &mut Emit, index: &[Val], axes: &[AxisId]) -> Val {
        let mut flat = e.u32(0);
        for (&i, &a) in index.iter().zip(axes) {
            flat = e.mul(flat, self.extent(a));
            flat = e.add(flat, i);
        }
        flat
    }

    /// From here on, elements are wanted at this place.
    pub(crate) fn at(&mut self, place: Place) {
        self.place = Some(place);
    }

    /// Where an element of a tensor with these axes lies.
    pub(crate) fn address(&self, e: &mut Emit, index: &[Val], axes: &[AxisId]) -> Val {
        if let Some(place) = &self.place {
            let size = |a: &AxisId| &self.body.axis(*a).size;
            if place.index == index && place.axes.iter().map(size).eq(axes.iter().map(size)) {
                return place.flat;
            }
        }
        self.join(e, index, axes)
    }

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
    fn split_beside(&mut self, e: &mut Emit, index: Val, axes: &[AxisId]) -> Vec<Val> {
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
    fn beside_it(&self, value: ValueId, index: &[Val]) -> Option<(usize, Vec<Val>)> {
        let ty = self.body.ty(value);
        let size = |a: &AxisId| self.body.axis(*a).size.fixed();
        let n = ty.axes.iter().rposition(|a| size(a) != Some(1))?;
        let lanes = self.lanes.iter().find(|lanes| lanes.contains(&index[n]))?;
        let whole = size(&ty.axes[n]).is_some_and(|size| size.is_multiple_of(lanes.len() as u64));
        (whole && (ty.dtype.is_float() || ty.dtype == DType::I32)).then(|| (n, lanes.clone()))
    }

    /// States what an element is, and forgets it at the end of the scope.
    pub(crate) fn define(&mut self, value: ValueId, index: Vec<Val>, element: Val) {
        self.order.push((value, index.clone()));
        self.known.insert((value, index), element);
    }

    /// From here on, a value is read where it is kept for the row of these axes that is walked.
    pub(crate) fn keep(&mut self, value: ValueId, rows: &[AxisId], memory: Shared) {
        self.rows = rows.to_vec();
        self.sources[value.0 as usize] = Source::Row(memory);
    }

    /// The place in its row of the element at an index.
    pub(crate) fn place_in_row(&self, e: &mut Emit, value: ValueId, index: &[Val]) -> Val {
        let axes = &self.body.ty(value).axes;
        let (axes, index): (Vec<_>, Vec<_>) =
            axes.iter().copied().zip(index.iter().copied()).filter(|(a, _)| !self.rows.contains(a)).unzip();
        self.join(e, &index, &axes)
    }

    /// Runs `body` in a scope of the kernel: what is computed there is known there only.
    pub(crate) fn scope<R>(&mut self, body: impl FnOnce(&mut Self) -> R) -> R {
        let (outside, turns, lanes) = (self.order.len(), self.turns.len(), self.lanes.len());
        let parts = self.parts.len();
        let result = body(self);
        self.turns.truncate(turns);
        self.lanes.truncate(lanes);
        self.parts.truncate(parts);
        for key in self.order.drain(outside..) {
            self.known.remove(&key);
        }
        result
    }

    /// What an index along a rotated axis is to the others; the same for as long as it is in scope.
    pub(crate) fn turn(&mut self, e: &mut Emit, axis: AxisId, pairs: Pairs, r: Val) -> Turn {
        let known = self.turns.iter().find(|(a, p, at, _)| (*a, *p, *at) == (axis, pairs, r));
        if let Some((.., turn)) = known {
            return *turn;
        }
        let (pair, partner, second) = rotate(e, pairs, r, self.extent(axis));
        let turn = Turn { pair, partner, second };
        self.turns.push((axis, pairs, r, turn));
        turn
    }

    /// The element of a value at an index, given in the order of its type's axes.
    pub(crate) fn element(&mut self, e: &mut Emit, value: ValueId, index: &[Val]) -> Val {
        if let Some(&x) = self.known.get(&(value, index.to_vec())) {
            return x;
        }
        let x = match self.sources[value.0 as usize] {
            Source::Param(buf) => self.load(e, buf, value, index),
            Source::Inst(inst) => self.compute(e, inst, index),
            Source::Row(memory) => {
                let place = self.place_in_row(e, value, index);
                let x = e.load(memory, place);
                e.cast(x, register(self.body.ty(value).dtype))
            }
            Source::Nowhere => zero(e, self.body.ty(value).dtype),
        };
        self.define(value, index.to_vec(), x);
        x
    }

    fn load(&mut self, e: &mut Emit, buf: Buf, value: ValueId, index: &[Val]) -> Val {
        let ty = self.body.ty(value);
        let Some((n, lanes)) = self.beside_it(value, index) else {
            let address = self.address(e, index, &ty.axes);
            let x = e.load(buf, address);
            return e.cast(x, register(ty.dtype));
        };
        let at = |lane: Val| [&index[..n], &[lane], &index[n + 1..]].concat();
        let address = self.address(e, &at(lanes[0]), &ty.axes);
        let numbers = e.load_beside(buf, address, lanes.len() as u32);
        let numbers: Vec<_> = numbers.into_iter().map(|x| e.cast(x, register(ty.dtype))).collect();
        for (&lane, &x) in lanes.iter().zip(&numbers) {
            self.define(value, at(lane), x);
        }
        let own = lanes.iter().position(|lane| *lane == index[n]);
        numbers[own.expect("it is one of these")]
    }

    /// The n-th operand of an instruction where its result has this index, but at other numbers along some axes.
    pub(crate) fn operand(
        &mut self,
        e: &mut Emit,
        (inst, index): (&'a Inst, &[Val]),
        n: usize,
        moved: &[(AxisId, Val)],
    ) -> Val {
        let result = self.body.ty(inst.result());
        let along = |a: &AxisId| {
            let moved = moved.iter().find(|(m, _)| m == a).map(|(_, i)| *i);
            moved
                .or_else(|| result.position(*a).map(|n| index[n]))
                .expect("inference knows every operand's axes")
        };
        let at: Vec<_> = self.body.ty(inst.args[n]).axes.iter().map(along).collect();
        self.element(e, inst.args[n], &at)
    }

    fn compute(&mut self, e: &mut Emit, inst: &'a Inst, index: &[Val]) -> Val {
        let ty = self.body.ty(inst.result());
        let along = |a: AxisId| index[ty.position(a).expect("inference knows the result's axes")];
        let here = (inst, index);
        match &inst.op {
            Op::Const(table) => {
                let mut x = literal(e, ty.dtype, table[0].0);
                for (n, entry) in table.iter().enumerate().skip(1) {
                    let (n, entry) = (e.u32(n as u32), literal(e, ty.dtype, entry.0));
                    let found = e.cmp(Cmp::Eq, index[0], n);
                    x = e.select(found, entry, x);
                }
                x
            }
            Op::Position { axis } => e.cast(along(*axis), Elem::I32),
            Op::Unary(op) => {
                let x = self.operand(e, here, 0, &[]);
                if *op == Unary::Exp && self.quick { e.quick_exp(x) } else { unary(e, *op, x) }
            }
            Op::Binary(op) => {
                let x = self.operand(e, here, 0, &[]);
                let y = self.operand(e, here, 1, &[]);
                binary(e, *op, x, y)
            }
            Op::Select => {
                let c = self.operand(e, here, 0, &[]);
                let x = self.operand(e, here, 1, &[]);
                let y = self.operand(e, here, 2, &[]);
                e.select(c, x, y)
            }
            Op::Cast => {
                let mut x = self.operand(e, here, 0, &[]);
                if ty.dtype.is_float()
                    && let Some(narrow) = self.target.stored(ty.dtype)
                {
                    x = e.cast(x, narrow);
                }
                e.cast(x, register(ty.dtype))
            }
            Op::Reduce { .. } | Op::Contract => {
                let fold = Fold::of(self.body, inst).expect("one of the two");
                let total = fold.start(e);
                let (from, step) = (e.u32(0), e.u32(1));
                self.fold(e, here, &fold, total, from, step);
                e.get(total)
            }
            Op::Rename { from, to } => self.operand(e, here, 0, &[(*from, along(*to))]),
            Op::Broadcast { .. } => self.operand(e, here, 0, &[]),
            Op::Split { axis, into } => {
                let parts: Vec<_> = into.iter().map(|&a| along(a)).collect();
                let whole = self.join(e, &parts, into);
                self.operand(e, here, 0, &[(*axis, whole)])
            }
            Op::Merge { axes, into } => {
                let parts = self.split_beside(e, along(*into), axes);
                let parts: Vec<_> = axes.iter().copied().zip(parts).collect();
                self.operand(e, here, 0, &parts)
            }
            Op::Slice { axis, into, start } => self.slice(e, here, (*axis, *into), *start),
            Op::Pack { axis } => {
                let count = self.fields(*axis);
                let mut word = e.u32(0);
                for p in 0..count.0 {
                    let at = e.u32(p);
                    let x = self.operand(e, here, 0, &[(*axis, at)]);
                    let (x, mask, by) = (e.cast(x, Elem::U32), e.u32(count.mask()), e.u32(p * count.width()));
                    let x = e.bits(Bits::And, x, mask);
                    let x = e.bits(Bits::Left, x, by);
                    word = e.bits(Bits::Or, word, x);
                }
                e.cast(word, Elem::I32)
            }
            Op::Unpack { axis } => {
                let count = self.fields(*axis);
                let x = self.operand(e, here, 0, &[]);
                let (x, mask, width) = (e.cast(x, Elem::U32), e.u32(count.mask()), e.u32(count.width()));
                let by = e.mul(along(*axis), width);
                let x = e.bits(Bits::Right, x, by);
                let x = e.bits(Bits::And, x, mask);
                e.cast(x, Elem::I32)
            }
            Op::Concat { axes, into } => self.concat(e, here, axes, *into),
            Op::Gather { axis } => {
                let i = self.operand(e, here, 1, &[]);
                // A negative index becomes a large one, so one comparison finds all that lie outside. These read 0.
                let i = e.cast(i, Elem::U32);
                let inside = e.lt(i, self.extent(*axis));
                let own = self.body.ty(inst.args[1]);
                let beside = self.beside_it(inst.result(), index).filter(|(n, _)| !own.has(ty.axes[*n]));
                let outs = self.start_beside(e, here, beside);
                e.if_(inside, |e| {
                    self.scope(|s| {
                        for (at, out) in &outs {
                            let x = s.operand(e, (inst, at), 0, &[(*axis, i)]);
                            e.set(*out, x);
                        }
                    });
                });
                self.end_beside(e, here, outs)
            }
            Op::TopK { axis, k } => self.top_k(e, here, *axis, *k),
            Op::TopIndices { axis, into } => self.top_index(e, here, *axis, along(*into)),
            Op::Rope { axis, pairs } => {
                let Turn { pair, partner, second } = self.turn(e, *axis, *pairs, along(*axis));
                let x = self.operand(e, here, 0, &[]);
                let other = self.operand(e, here, 0, &[(*axis, partner)]);
                let position = self.operand(e, here, 1, &[]);
                let position = e.cast(position, Elem::F32);
                let freq = self.element(e, inst.args[2], &[pair]);
                let angle = e.mul(position, freq);
                let (cos, sin) = (e.unary(Un::Cos, angle), e.unary(Un::Sin, angle));
                let minus = e.unary(Un::Neg, sin);
                let sin = e.select(second, sin, minus);
                let x = e.mul(x, cos);
                e.fma(other, sin, x)
            }
            Op::ScatterAdd { .. }
            | Op::Past { .. }
            | Op::Append { .. }
            | Op::Softmax { .. }
            | Op::RmsNorm { .. }
            | Op::Call { .. } => unreachable!("a checked kernel has none of these inside of a map"),
        }
    }

    /// The fields of a word along an axis, whose size is fixed.
    fn fields(&self, axis: AxisId) -> Fields {
        Fields(self.body.axis(axis).size.fixed().map_or(1, |n| n as u32))
    }

    /// Folds every `step`-th term, or pack of terms side by side, from `from` on, which is less than `step`, into a register. A few are all
    /// read at once.
    pub(crate) fn fold(
        &mut self,
        e: &mut Emit,
        here: (&'a Inst, &[Val]),
        fold: &Fold,
        total: Var,
        from: Val,
        step: Val,
    ) {
        self.walk(e, here, fold, (from, step), |e, terms| {
            for &term in terms {
                let sum = e.get(total);
                let sum = e.binary(fold.by(), sum, term);
                e.set(total, sum);
            }
        });
    }

    /// A maximum, and the sum of exponentials that are shifted by what it is so far, in one walk over the terms: where a larger
    /// one comes, the sum is scaled.
    pub(crate) fn fold_shifted(
        &mut self,
        e: &mut Emit,
        here: (&'a Inst, &[Val]),
        (fold, least): (&Fold, Val),
        [top, sum]: [Var; 2],
        (from, step): (Val, Val),
    ) {
        self.walk(e, here, fold, (from, step), |e, terms| {
            let before = e.get(top);
            let now = terms.iter().fold(before, |top, &x| e.binary(Bin::Max, top, x));
            e.set(top, now);
            let [shift, above] = [before, now].map(|top| e.binary(Bin::Max, top, least));
            let scale = e.sub(shift, above);
            let scale = e.unary(Un::Exp, scale);
            let old = e.get(sum);
            let mut total = e.mul(old, scale);
            for &x in terms {
                let x = e.sub(x, above);
                let x = e.unary(Un::Exp, x);
                total = e.add(total, x);
            }
            e.set(sum, total);
        });
    }

    /// Every `step`-th term, or pack of terms, from `from` on, as many at a time as are read at once.
    fn walk(
        &mut self,
        e: &mut Emit,
        here: (&'a Inst, &[Val]),
        fold: &Fold,
        (from, step): (Val, Val),
        take: impl Fn(&mut Emit, &[Val]),
    ) {
        let (pack, terms) = (self.pack_of(&fold.axes), self.total(e, &fold.axes));
        let of_pack = e.u32(pack);
        let packs = e.div(terms, of_pack);
        let each = match (packs.known(), step.known()) {
            (Some(packs), Some(step)) if packs.is_multiple_of(step) => Some(packs / step),
            _ => None,
        };
        let at_once = match each {
            Some(each) if pack == 1 && each <= AT_ONCE => each,
            Some(each) if pack > 1 => {
                let few = |n: &u64| n * u64::from(pack) <= PACKED_AT_ONCE && each.is_multiple_of(*n);
                [4, 2].into_iter().find(few).unwrap_or(1)
            }
            _ => 1,
        };
        let turn = |s: &mut Self, e: &mut Emit, first: Val| {
            s.scope(|s| {
                let mut terms = Vec::new();
                for n in 0..at_once {
                    let before = e.u32((n * step.known().unwrap_or(0)) as u32);
                    let number = e.add(first, before);
                    let number = e.mul(number, of_pack);
                    for index in s.beside(e, &fold.axes, number, pack) {
                        let moved: Vec<_> = fold.axes.iter().copied().zip(index).collect();
                        terms.push(s.term(e, here, &moved));
                    }
                }
                if !terms.is_empty() {
                    take(e, &terms);
                }
            });
        };
        if each == Some(at_once) {
            return turn(self, e, from);
        }
        let of_turn = e.u32(at_once as u32);
        let step = e.mul(step, of_turn);
        e.for_step(from, packs, step, |e, first| turn(self, e, first));
    }

    /// The term of a fold at these numbers along its axes.
    pub(crate) fn term(&mut self, e: &mut Emit, here: (&'a Inst, &[Val]), moved: &[(AxisId, Val)]) -> Val {
        let mut term = self.operand(e, here, 0, moved);
        for n in 1..here.0.args.len() {
            let factor = self.operand(e, here, n, moved);
            term = e.mul(term, factor);
        }
        term
    }

    /// Only the part that holds the index along `into` is computed.
    fn concat(&mut self, e: &mut Emit, here: (&'a Inst, &[Val]), axes: &[AxisId], into: AxisId) -> Val {
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
    fn start_beside(
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
    fn end_beside(
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
    fn slice(
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

    /// The index of the element that has `slot` others before it: the largest is found and set aside `slot` times.
    fn top_index(&mut self, e: &mut Emit, here: (&'a Inst, &[Val]), axis: AxisId, slot: Val) -> Val {
        let (zero, one, extent) = (e.u32(0), e.u32(1), self.extent(axis));
        let least = e.f32(f32::NEG_INFINITY);
        let (found, found_at) = (e.var(least), e.var(zero));
        let rounds = e.add(slot, one);
        e.for_step(zero, rounds, one, |e, round| {
            self.scope(|s| {
                let first = e.cmp(Cmp::Eq, round, zero);
                let (last, last_at) = (e.get(found), e.get(found_at));
                let (best, best_at) = (e.var(least), e.var(extent));
                e.for_step(zero, extent, one, |e, j| {
                    s.scope(|s| {
                        let x = s.operand(e, here, 0, &[(axis, j)]);
                        // NaN comes after every number.
                        let number = e.cmp(Cmp::Eq, x, x);
                        let x = e.select(number, x, least);
                        let smaller = e.cmp(Cmp::Lt, x, last);
                        let equal = e.cmp(Cmp::Eq, x, last);
                        let later = e.lt(last_at, j);
                        let next = e.and(equal, later);
                        let left = e.or(smaller, next);
                        let left = e.or(first, left);
                        let (top, top_at) = (e.get(best), e.get(best_at));
                        let greater = e.cmp(Cmp::Gt, x, top);
                        let none = e.cmp(Cmp::Eq, top_at, extent);
                        let better = e.or(greater, none);
                        let takes = e.and(left, better);
                        let (top, top_at) = (e.select(takes, x, top), e.select(takes, j, top_at));
                        e.set(best, top);
                        e.set(best_at, top_at);
                    });
                });
                let (best, best_at) = (e.get(best), e.get(best_at));
                e.set(found, best);
                e.set(found_at, best_at);
            });
        });
        let at = e.get(found_at);
        e.cast(at, Elem::I32)
    }

    /// Whether fewer than `k` come before this element.
    fn top_k(&mut self, e: &mut Emit, here: (&'a Inst, &[Val]), axis: AxisId, k: u64) -> Val {
        let (inst, index) = here;
        let (result, x) = (self.body.ty(inst.result()), inst.args[0]);
        let along = |a: &AxisId| index[result.position(*a).expect("inference knows the result's axes")];
        let at: Vec<_> = self.body.ty(x).axes.iter().map(along).collect();
        let (before, k) = (self.rank(e, x, &at, axis), e.u32(k as u32));
        e.lt(before, k)
    }

    /// How many come before an element along an axis: the larger ones, and of equals the first.
    pub(crate) fn rank(&mut self, e: &mut Emit, x: ValueId, index: &[Val], axis: AxisId) -> Val {
        let along = self.body.ty(x).position(axis).expect("what is ranked has the axis");
        // NaN comes after every number.
        let least = e.f32(f32::NEG_INFINITY);
        let ordered = |e: &mut Emit, x: Val| {
            let number = e.cmp(Cmp::Eq, x, x);
            e.select(number, x, least)
        };
        let mine = self.element(e, x, index);
        let mine = ordered(e, mine);
        let none = e.u32(0);
        let before = e.var(none);
        let step = e.u32(1);
        e.for_step(none, self.extent(axis), step, |e, j| {
            self.scope(|s| {
                let mut at = index.to_vec();
                at[along] = j;
                let other = s.element(e, x, &at);
                let other = ordered(e, other);
                let greater = e.cmp(Cmp::Gt, other, mine);
                let equal = e.cmp(Cmp::Eq, other, mine);
                let earlier = e.lt(j, index[along]);
                let first = e.and(equal, earlier);
                let wins = e.or(greater, first);
                let wins = e.cast(wins, Elem::U32);
                let count = e.get(before);
                let count = e.add(count, wins);
                e.set(before, count);
            });
        });
        e.get(before)
    }
}

/// A reduction or contraction: the product of the operands, folded along some axes.
pub(crate) struct Fold {
    by: Reduce,
    pub(crate) axes: Vec<AxisId>,
}

impl Fold {
    /// What an instruction folds, if it does.
    pub(crate) fn of(body: &Function, inst: &Inst) -> Option<Fold> {
        match inst.op {
            Op::Reduce { by, axis } => Some(Fold { by, axes: vec![axis] }),
            Op::Contract => {
                Some(Fold { by: Reduce::Sum, axes: body.summed(&inst.args, body.ty(inst.result())) })
            }
            Op::Const(_)
            | Op::Position { .. }
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Select
            | Op::Cast
            | Op::Rename { .. }
            | Op::Broadcast { .. }
            | Op::Split { .. }
            | Op::Merge { .. }
            | Op::Slice { .. }
            | Op::Concat { .. }
            | Op::Pack { .. }
            | Op::Unpack { .. }
            | Op::Gather { .. }
            | Op::TopK { .. }
            | Op::TopIndices { .. }
            | Op::ScatterAdd { .. }
            | Op::Past { .. }
            | Op::Append { .. }
            | Op::Rope { .. }
            | Op::Softmax { .. }
            | Op::RmsNorm { .. }
            | Op::Call { .. } => None,
        }
    }

    /// A register with what the fold starts from.
    pub(crate) fn start(&self, e: &mut Emit) -> Var {
        let identity = e.f32(self.by.identity() as f32);
        e.var(identity)
    }

    /// The instruction that folds.
    pub(crate) fn by(&self) -> Bin {
        match self.by {
            Reduce::Sum => Bin::Add,
            Reduce::Max => Bin::Max,
        }
    }
}

/// For index `r` along an axis of even extent `n`: the pair, the partner, and whether `r` is the second of the two.
fn rotate(e: &mut Emit, pairs: Pairs, r: Val, n: Val) -> (Val, Val, Val) {
    let (zero, one, two) = (e.u32(0), e.u32(1), e.u32(2));
    match pairs {
        Pairs::Interleaved => {
            let (pair, odd) = (e.div(r, two), e.rem(r, two));
            let second = e.cmp(Cmp::Ne, odd, zero);
            let next = e.add(r, one);
            let twice = e.mul(odd, two);
            (pair, e.sub(next, twice), second)
        }
        Pairs::Halves => {
            let half = e.div(n, two);
            let (before, after) = (e.sub(r, half), e.add(r, half));
            let first = e.lt(r, half);
            (e.select(first, r, before), e.select(first, after, before), e.not(first))
        }
    }
}

fn zero(e: &mut Emit, dtype: DType) -> Val {
    literal(e, dtype, 0.0)
}

fn literal(e: &mut Emit, dtype: DType, x: f64) -> Val {
    let x = dtype.round(x);
    match register(dtype) {
        Elem::I32 => e.i32(x as i32),
        Elem::Bool => e.bool(x != 0.0),
        Elem::F32 | Elem::F16 | Elem::Bf16 | Elem::U32 | Elem::U8 => e.f32(x as f32),
    }
}

fn unary(e: &mut Emit, op: Unary, x: Val) -> Val {
    let op = match op {
        Unary::Neg => Un::Neg,
        Unary::Abs => Un::Abs,
        Unary::Exp => Un::Exp,
        Unary::Log => Un::Ln,
        Unary::Sqrt => Un::Sqrt,
        Unary::Rsqrt => Un::Rsqrt,
        Unary::Tanh => Un::Tanh,
        Unary::Sin => Un::Sin,
        Unary::Cos => Un::Cos,
        Unary::Not => return e.not(x),
        Unary::Sigmoid | Unary::Silu => {
            let one = e.f32(1.0);
            let minus = e.unary(Un::Neg, x);
            let exp = e.unary(Un::Exp, minus);
            let below = e.add(one, exp);
            return e.div(if op == Unary::Silu { x } else { one }, below);
        }
    };
    e.unary(op, x)
}

fn binary(e: &mut Emit, op: Binary, x: Val, y: Val) -> Val {
    match op {
        Binary::Add => e.add(x, y),
        Binary::Sub => e.sub(x, y),
        Binary::Mul => e.mul(x, y),
        Binary::Div => e.div(x, y),
        Binary::Max => e.binary(Bin::Max, x, y),
        Binary::Min => e.binary(Bin::Min, x, y),
        Binary::Lt => e.lt(x, y),
        Binary::Le => e.cmp(Cmp::Le, x, y),
        Binary::Eq => e.cmp(Cmp::Eq, x, y),
        Binary::And => e.and(x, y),
        Binary::Or => e.or(x, y),
    }
}
