//! The elements of a body's values, as instructions of a kernel.
//!
//! Everything is computed where it is wanted: an element of a value is asked for at an index, asks for the elements of
//! its operands at the indices that follow, and so on down to loads. Ops on axes cost index arithmetic only.
//! What was computed is remembered per value and index for as long as it is in scope.

mod beside;
mod fold;

use std::collections::HashMap;

use latentc_ir::{AxisId, Binary, DType, Fields, Function, Inst, Op, Pairs, Unary, ValueId};

use super::emit::{Bin, Bits, Buf, Cmp, Elem, Emit, Shared, Un, Val};
use super::target::{Target, register};
pub(crate) use fold::Fold;

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
