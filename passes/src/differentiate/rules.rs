//! What each op passes back: from the adjoint `dy` of its result, one term for each operand.
//!
//! A term that lacks none of the operand's axes and has others is summed over them; one operand that is used twice gets two terms.

use latentc_ir::{AxisId, Binary, DType, Inst, Op, Reduce, Size, Type, Unary, ValueId};

use super::{Joint, NAME, Term, wide};
use crate::PassError;

impl Joint<'_> {
    /// Adds what an instruction other than a call passes back.
    ///
    /// # Errors
    /// If the op has no derivative.
    pub(super) fn rule(&mut self, inst: &Inst) -> Result<(), PassError> {
        let y = inst.result();
        let Some(dy) = self.adjoint(y) else { return Ok(()) };
        let x = |n: usize| inst.args[n];
        match &inst.op {
            // Nothing here depends on a weight, or what does is a choice.
            Op::Const(_)
            | Op::Position { .. }
            | Op::TopK { .. }
            | Op::TopIndices { .. }
            | Op::Pack { .. }
            | Op::Unpack { .. } => {}
            Op::Unary(u) => self.unary(*u, x(0), y, dy),
            Op::Binary(b) => self.binary(*b, x(0), x(1), y, dy),
            Op::Select => {
                let zero = self.number(0.0, wide(self.f.ty(y).dtype));
                self.summed(x(1), y, Op::Select, &[x(0), dy, zero]);
                self.summed(x(2), y, Op::Select, &[x(0), zero, dy]);
            }
            Op::Cast => self.add(x(0), Term::Value(dy)),
            Op::Contract => {
                for n in 0..inst.args.len() {
                    let others = inst.args.iter().enumerate().filter(|(m, _)| *m != n).map(|(_, &a)| a);
                    let factors: Vec<_> = [dy].into_iter().chain(others).collect();
                    self.product(x(n), &factors);
                }
            }
            Op::Reduce { by: Reduce::Sum, axis } => {
                self.add(x(0), Term::Op(Op::Broadcast { axes: vec![*axis] }, vec![dy]));
            }
            Op::Reduce { by: Reduce::Max, axis } => self.largest(x(0), y, dy, *axis),
            Op::Rename { from, to } | Op::Past { from, to } => {
                self.add(x(0), Term::Op(Op::Rename { from: *to, to: *from }, vec![dy]));
            }
            Op::Broadcast { .. } => self.sum_over(x(0), dy),
            Op::Split { axis, into } => {
                self.add(x(0), Term::Op(Op::Merge { axes: into.clone(), into: *axis }, vec![dy]));
            }
            Op::Merge { axes, into } => {
                self.add(x(0), Term::Op(Op::Split { axis: *into, into: axes.clone() }, vec![dy]));
            }
            Op::Slice { axis, into, start } => self.pad(x(0), dy, *axis, *into, *start),
            Op::Concat { axes, into } => {
                let mut start = 0;
                for (n, &part) in axes.iter().enumerate() {
                    self.add(x(n), Term::Op(Op::Slice { axis: *into, into: part, start }, vec![dy]));
                    start += self.f.axis(part).size.fixed().unwrap_or(0);
                }
            }
            // One element of each row is read, so nothing has to be added up: no memory is needed for zeros.
            Op::Gather { axis } if self.picks(inst, *axis) => {
                let at = self.push("", Op::Position { axis: *axis }, &[], Type::new(DType::I32, [*axis]));
                let met = |a: &AxisId| a == axis || self.f.ty(x(1)).has(*a);
                let axes: Vec<_> = self.f.ty(x(0)).axes.iter().copied().filter(met).collect();
                let is = self.push("", Op::Binary(Binary::Eq), &[at, x(1)], Type::new(DType::Bool, axes));
                let zero = self.number(0.0, wide(self.f.ty(y).dtype));
                self.add(x(0), Term::Op(Op::Select, vec![is, dy, zero]));
            }
            Op::Gather { axis } => self.add(x(0), Term::Op(Op::ScatterAdd { axis: *axis }, vec![dy, x(1)])),
            Op::ScatterAdd { axis } => {
                // The result may lack an axis of the index, but the index has it.
                self.add(x(0), Term::Op(Op::Gather { axis: *axis }, vec![dy, x(1)]));
            }
            Op::Rope { axis, pairs } => {
                if self.active[x(2).0 as usize] {
                    let name = &self.f.value(x(2)).name;
                    let message = format!(
                        "the frequencies `{name}` of a rotation depend on weights, which has no rule"
                    );
                    return Err(PassError::new(NAME, self.old, message));
                }
                let (at, ty) = (x(1), self.f.ty(x(1)).clone());
                let back = self.push("", Op::Unary(Unary::Neg), &[at], ty);
                self.add(x(0), Term::Op(Op::Rope { axis: *axis, pairs: *pairs }, vec![dy, back, x(2)]));
            }
            Op::Softmax { axis } => {
                // dx = y (dy - sum of y dy)
                let (all, row) = self.types(y, *axis);
                let weighed = self.push("", Op::Binary(Binary::Mul), &[y, dy], all.clone());
                let mean = self.push("", Op::Reduce { by: Reduce::Sum, axis: *axis }, &[weighed], row);
                let apart = self.push("", Op::Binary(Binary::Sub), &[dy, mean], all);
                self.add(x(0), Term::Op(Op::Binary(Binary::Mul), vec![y, apart]));
            }
            Op::RmsNorm { axis, eps } => self.rms_norm(x(0), y, dy, *axis, eps.0),
            Op::Append { .. } => {
                let message = format!(
                    "`{}` is appended to a cache; differentiate the definition, before `derive`",
                    self.f.value(y).name
                );
                return Err(PassError::new(NAME, self.old, message));
            }
            Op::Call { .. } => unreachable!("calls have a rule of their own"),
        }
        Ok(())
    }

    /// Whether a gather reads one element of each row along the axis. Positions along axes of run-time sizes are those of tokens, of
    /// which `derive` makes what it needs.
    fn picks(&self, inst: &Inst, axis: AxisId) -> bool {
        let (rows, index) = (self.f.ty(inst.args[0]), self.f.ty(inst.args[1]));
        index.dtype == DType::I32
            && self.f.axis(axis).size.fixed().is_some()
            && index.axes.iter().all(|a| rows.has(*a))
    }

    // --- terms of given shape -------------------------------------------------------------------------------

    /// A term with the axes of `like`, summed over those that the operand lacks.
    fn summed(&mut self, operand: ValueId, like: ValueId, op: Op, args: &[ValueId]) {
        if !self.active[operand.0 as usize] {
            return;
        }
        let (have, want) = (self.f.ty(like).clone(), self.f.ty(operand));
        if want.axes.len() == have.axes.len() {
            return self.add(operand, Term::Op(op, args.to_vec()));
        }
        let term = self.push("", op, args, Type::new(wide(have.dtype), have.axes));
        self.sum_over(operand, term);
    }

    /// A value as a term, summed over the axes that the operand lacks.
    fn sum_over(&mut self, operand: ValueId, term: ValueId) {
        let same = self.f.ty(term).axes.len() == self.f.ty(operand).axes.len();
        self.add(operand, if same { Term::Value(term) } else { Term::Op(Op::Contract, vec![term]) });
    }

    /// A product of values as a term: summed over the axes that the operand lacks, the same at every index of those that
    /// only it has.
    fn product(&mut self, operand: ValueId, factors: &[ValueId]) {
        if !self.active[operand.0 as usize] {
            return;
        }
        let ty = self.f.ty(operand).clone();
        let has = |a: &AxisId| factors.iter().any(|&v| self.f.ty(v).has(*a));
        let (shared, own): (Vec<_>, Vec<_>) = ty.axes.iter().partition(|a| has(a));
        let sums = factors.iter().any(|&v| self.f.ty(v).axes.iter().any(|a| !ty.has(*a)));
        let op = if factors.len() == 2 && !sums { Op::Binary(Binary::Mul) } else { Op::Contract };
        if own.is_empty() {
            return match factors {
                &[one] => self.sum_over(operand, one),
                _ => self.add(operand, Term::Op(op, factors.to_vec())),
            };
        }
        let dtype = wide(ty.dtype);
        let part = match factors {
            &[one] if !sums => one,
            _ => self.push("", op, factors, Type::new(dtype, shared)),
        };
        self.add(operand, Term::Op(Op::Broadcast { axes: own }, vec![part]));
    }

    /// The types of what is computed on the way, for all elements and for each row along an axis.
    fn types(&self, v: ValueId, axis: AxisId) -> (Type, Type) {
        let ty = self.f.ty(v);
        let rows: Vec<_> = ty.axes.iter().copied().filter(|&a| a != axis).collect();
        (Type::new(wide(ty.dtype), ty.axes.clone()), Type::new(wide(ty.dtype), rows))
    }

    // --- functions of elements --------------------------------------------------------------------------------

    fn unary(&mut self, u: Unary, x: ValueId, y: ValueId, dy: ValueId) {
        let ty = Type::new(wide(self.f.ty(y).dtype), self.f.ty(y).axes.clone());
        let dtype = ty.dtype;
        let scalar = |j: &mut Self, n: f64| j.number(n, dtype);
        let one = |j: &mut Self, op: Unary, x: ValueId| j.push("", Op::Unary(op), &[x], ty.clone());
        let two = |j: &mut Self, op: Binary, a: ValueId, b: ValueId| {
            j.push("", Op::Binary(op), &[a, b], ty.clone())
        };
        // The slope; the term is its product with `dy`.
        let slope = match u {
            Unary::Not => return,
            Unary::Neg => return self.add(x, Term::Op(Op::Unary(Unary::Neg), vec![dy])),
            Unary::Log => return self.where_defined(x, Op::Binary(Binary::Div), [dy, x], ty),
            Unary::Abs => {
                let zero = scalar(self, 0.0);
                let below = Type::new(DType::Bool, ty.axes.clone());
                let below = self.push("", Op::Binary(Binary::Lt), &[x, zero], below);
                let minus = one(self, Unary::Neg, dy);
                return self.add(x, Term::Op(Op::Select, vec![below, minus, dy]));
            }
            Unary::Exp => y,
            Unary::Sqrt => {
                let half = scalar(self, 0.5);
                let slope = two(self, Binary::Div, half, y);
                return self.where_defined(x, Op::Binary(Binary::Mul), [dy, slope], ty);
            }
            Unary::Rsqrt => {
                let half = scalar(self, -0.5);
                let square = two(self, Binary::Mul, y, y);
                let cube = two(self, Binary::Mul, square, y);
                let slope = two(self, Binary::Mul, half, cube);
                return self.where_defined(x, Op::Binary(Binary::Mul), [dy, slope], ty);
            }
            Unary::Sigmoid => {
                let unit = scalar(self, 1.0);
                let rest = two(self, Binary::Sub, unit, y);
                two(self, Binary::Mul, y, rest)
            }
            Unary::Silu => {
                // s + y (1 - s)
                let unit = scalar(self, 1.0);
                let s = one(self, Unary::Sigmoid, x);
                let rest = two(self, Binary::Sub, unit, s);
                let more = two(self, Binary::Mul, y, rest);
                two(self, Binary::Add, s, more)
            }
            Unary::Tanh => {
                let unit = scalar(self, 1.0);
                let square = two(self, Binary::Mul, y, y);
                two(self, Binary::Sub, unit, square)
            }
            Unary::Sin => one(self, Unary::Cos, x),
            Unary::Cos => {
                let sin = one(self, Unary::Sin, x);
                one(self, Unary::Neg, sin)
            }
        };
        self.add(x, Term::Op(Op::Binary(Binary::Mul), vec![dy, slope]));
    }

    /// The term of a logarithm or a root, which have a slope above 0 only. Elsewhere it is 0, whatever comes back: what hides their result
    /// on the way forward has hidden no number.
    fn where_defined(&mut self, x: ValueId, op: Op, args: [ValueId; 2], ty: Type) {
        if self.is_positive(x) {
            return self.add(x, Term::Op(op, args.to_vec()));
        }
        let zero = self.number(0.0, ty.dtype);
        let above = Type::new(DType::Bool, ty.axes.clone());
        let above = self.push("", Op::Binary(Binary::Lt), &[zero, x], above);
        let term = self.push("", op, &args, ty);
        self.add(x, Term::Op(Op::Select, vec![above, term, zero]));
    }

    /// Whether a value is an exponential, or a sum of some.
    fn is_positive(&self, x: ValueId) -> bool {
        let makes = |i: &&Inst| i.results.contains(&x);
        match self.f.body[..self.forward].iter().find(makes) {
            Some(Inst { op: Op::Unary(Unary::Exp), .. }) => true,
            Some(Inst { op: Op::Reduce { by: Reduce::Sum, .. }, args, .. }) => self.is_positive(args[0]),
            Some(_) | None => false,
        }
    }

    fn binary(&mut self, b: Binary, a: ValueId, c: ValueId, y: ValueId, dy: ValueId) {
        match b {
            Binary::Add => [a, c].into_iter().for_each(|x| self.sum_over(x, dy)),
            Binary::Sub => {
                self.sum_over(a, dy);
                self.summed(c, y, Op::Unary(Unary::Neg), &[dy]);
            }
            Binary::Mul => {
                self.product(a, &[dy, c]);
                self.product(c, &[dy, a]);
            }
            Binary::Div => {
                self.summed(a, y, Op::Binary(Binary::Div), &[dy, c]);
                if self.active[c.0 as usize] {
                    let ty = Type::new(wide(self.f.ty(y).dtype), self.f.ty(y).axes.clone());
                    let share = self.push("", Op::Binary(Binary::Div), &[y, c], ty.clone());
                    let share = self.push("", Op::Unary(Unary::Neg), &[share], ty);
                    self.product(c, &[dy, share]);
                }
            }
            Binary::Max | Binary::Min => {
                let ty = |v: ValueId, j: &Self| Type::new(DType::Bool, j.f.ty(v).axes.clone());
                let (all, of_c) = (ty(y, self), ty(c, self));
                let order = if b == Binary::Max { [c, a] } else { [a, c] };
                let first = self.push("", Op::Binary(Binary::Le), &order, all.clone());
                // Of a number and what is none, the number.
                let number = self.push("", Op::Binary(Binary::Eq), &[c, c], of_c.clone());
                let none = self.push("", Op::Unary(Unary::Not), &[number], of_c);
                let first = self.push("", Op::Binary(Binary::Or), &[first, none], all);
                let zero = self.number(0.0, wide(self.f.ty(y).dtype));
                self.summed(a, y, Op::Select, &[first, dy, zero]);
                self.summed(c, y, Op::Select, &[first, zero, dy]);
            }
            Binary::Lt | Binary::Le | Binary::Eq | Binary::And | Binary::Or => {}
        }
    }

    // --- rows -----------------------------------------------------------------------------------------------------

    /// The largest of a row get its adjoint, in equal parts.
    fn largest(&mut self, x: ValueId, y: ValueId, dy: ValueId, axis: AxisId) {
        let (all, row) = self.types(x, axis);
        let zero = self.number(0.0, all.dtype);
        let is = Type::new(DType::Bool, all.axes.clone());
        let is = self.push("", Op::Binary(Binary::Eq), &[x, y], is);
        let count = self.push("", Op::Cast, &[is], all);
        let count = self.push("", Op::Reduce { by: Reduce::Sum, axis }, &[count], row.clone());
        let share = self.push("", Op::Binary(Binary::Div), &[dy, count], row);
        self.add(x, Term::Op(Op::Select, vec![is, share, zero]));
    }

    /// `dx = (dy - y mean(y dy)) / sqrt(mean(x^2) + eps)`
    fn rms_norm(&mut self, x: ValueId, y: ValueId, dy: ValueId, axis: AxisId, eps: f64) {
        let (all, row) = self.types(x, axis);
        let size = match self.f.axis(axis).size.fixed() {
            Some(n) => self.number(n as f64, row.dtype),
            // A run-time size becomes a number by counting.
            None => {
                let one = self.number(1.0, row.dtype);
                let ones = Type::new(row.dtype, [axis]);
                let ones = self.push("", Op::Broadcast { axes: vec![axis] }, &[one], ones);
                self.push("", Op::Reduce { by: Reduce::Sum, axis }, &[ones], Type::scalar(row.dtype))
            }
        };
        let mut mean = |a: ValueId, b: ValueId| {
            let product = self.push("", Op::Binary(Binary::Mul), &[a, b], all.clone());
            let sum = self.push("", Op::Reduce { by: Reduce::Sum, axis }, &[product], row.clone());
            self.push("", Op::Binary(Binary::Div), &[sum, size], row.clone())
        };
        let (square, slope) = (mean(x, x), mean(y, dy));
        let eps = self.number(eps, row.dtype);
        let square = self.push("", Op::Binary(Binary::Add), &[square, eps], row.clone());
        let scale = self.push("", Op::Unary(Unary::Rsqrt), &[square], row);
        let along = self.push("", Op::Binary(Binary::Mul), &[y, slope], all.clone());
        let apart = self.push("", Op::Binary(Binary::Sub), &[dy, along], all);
        self.add(x, Term::Op(Op::Binary(Binary::Mul), vec![apart, scale]));
    }

    /// A part's adjoint with zeros around it.
    fn pad(&mut self, x: ValueId, dy: ValueId, axis: AxisId, into: AxisId, start: u64) {
        let size = |j: &Self, a: AxisId| j.f.axis(a).size.fixed().unwrap_or(0);
        let after = size(self, axis) - size(self, into) - start;
        let (mut args, mut axes) = (Vec::new(), Vec::new());
        for (n, zeros) in [start, after].into_iter().enumerate() {
            if n == 1 {
                args.push(dy);
                axes.push(into);
            }
            if zeros > 0 {
                let pad = self.f.add_axis("pad", Size::Fixed(zeros), None);
                let mut ty = self.f.ty(dy).clone();
                ty.axes.iter_mut().filter(|a| **a == into).for_each(|a| *a = pad);
                args.push(self.zeros("", ty));
                axes.push(pad);
            }
        }
        self.add(x, Term::Op(Op::Concat { axes, into: axis }, args));
    }
}
