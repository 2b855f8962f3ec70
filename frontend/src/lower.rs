//! The meaning of an equation: syntax tree to instructions, one function per form.
//!
//! An index is *kept* where the surroundings need it: those on the left side, those that a product around sums, the one
//! that a function works along. A value that meets an index which nobody keeps is a mistake.

use latentc_ir::infer::{Want, infer, show_type};
use latentc_ir::{AxisId, Binary, DType, Op, Origin, Real, Type, Unary, ValueId};

use crate::error::Diagnostic;
use crate::expr::{Equation, Expr, Index, Spot, Target};
use crate::frame::Frame;
use crate::stdlib;

/// Why there is no value.
#[derive(Debug)]
pub(crate) enum Stop {
    /// A mistake, to be told.
    Error(Box<Diagnostic>),
    /// A mistake that was told before.
    Broken,
}

impl From<Diagnostic> for Stop {
    fn from(d: Diagnostic) -> Stop {
        Stop::Error(Box::new(d))
    }
}

/// A value, or why there is none.
pub(crate) type Lowered<T> = Result<T, Stop>;

/// One equation of one function while it becomes instructions.
pub(crate) struct Lower<'a> {
    pub(crate) frame: &'a mut Frame,
    model: DType,
    origin: Origin,
    /// The name on the left; values on the way to it are called after it.
    base: String,
    /// The left side's axes: the order in which values on the way to it lie.
    pub(crate) left: Vec<AxisId>,
    /// Where this equation's instructions begin.
    start: usize,
}

impl<'a> Lower<'a> {
    pub(crate) fn new(
        frame: &'a mut Frame,
        model: DType,
        origin: Origin,
        target: &Target,
    ) -> Lowered<Lower<'a>> {
        let mut left = Vec::new();
        for index in &target.indices {
            match index {
                Index::Axis(name) => left.push(frame.axis(name)?),
                Index::Group { parts, .. } => {
                    for part in parts {
                        left.push(frame.axis(part)?);
                    }
                }
                Index::Value(e) => {
                    return Err(Diagnostic::new(e.at(), "the left side is indexed by axes only").into());
                }
            }
        }
        let start = frame.f.body.len();
        Ok(Lower { frame, model, origin, base: target.name.text.clone(), left, start })
    }

    /// The value of an equation and the axes that a use of it gives.
    pub(crate) fn equation(&mut self, eq: &Equation) -> Lowered<(ValueId, Vec<AxisId>)> {
        let name = &eq.target.name;
        let mut written: Vec<AxisId> = Vec::new();
        for (n, &a) in self.left.clone().iter().enumerate() {
            if self.left[..n].contains(&a) {
                let message = format!("`{}` has the axis `{}` twice", name.text, self.frame.f.axis(a).name);
                return Err(Diagnostic::new(name.at, message).into());
            }
        }
        let free = self.free(&eq.value)?;
        for index in &eq.target.indices {
            let letters = match index {
                Index::Axis(letter) => std::slice::from_ref(letter),
                Index::Group { parts, .. } => parts.as_slice(),
                Index::Value(_) => &[],
            };
            for letter in letters {
                let a = self.frame.axis(letter)?;
                if self.frame.each.contains(&a) {
                    let message = format!("`{}` is carried by each value and is not written", letter.text);
                    return Err(Diagnostic::new(letter.at, message).into());
                }
                if !free.contains(&a) {
                    let message = format!("`{}` is only on the left", letter.text);
                    let note = format!(
                        "nothing on the right depends on `{}`, and nothing is broadcast in silence",
                        letter.text
                    );
                    return Err(Diagnostic::new(letter.at, message).note(note).into());
                }
            }
        }
        let mut value = self.value(&eq.value, &self.left.clone())?;
        for index in &eq.target.indices {
            written.push(match index {
                Index::Axis(letter) => self.frame.axis(letter)?,
                Index::Group { parts, whole, at } => {
                    let (merged, whole) = self.merge(value, parts, whole.as_ref(), *at)?;
                    value = merged;
                    whole
                }
                Index::Value(_) => continue,
            });
        }
        let value = self.name(value, &eq.target, &written)?;
        Ok((value, written))
    }

    /// Gives the value of the whole right side the author's name and dtype.
    fn name(&mut self, value: ValueId, target: &Target, written: &[AxisId]) -> Lowered<ValueId> {
        let have = self.frame.f.ty(value).clone();
        let wanted = self.frame.dtype(target)?;
        let dtype = wanted.unwrap_or(if have.dtype.is_float() { self.model } else { have.dtype });
        if dtype.is_float() != have.dtype.is_float() && !(have.dtype == DType::I32 && dtype.is_float()) {
            let message = format!("`{}` is {}, not {dtype}", target.name.text, have.dtype);
            let at = target.dtype.as_ref().map_or(target.name.at, |d| d.at);
            return Err(Diagnostic::new(at, message).into());
        }
        let each = self.frame.each.iter().filter(|a| have.has(**a));
        let ty = Type::new(dtype, each.chain(written).copied().collect::<Vec<_>>());
        let made = self.frame.f.body[self.start..].iter().find(|i| i.results[..] == [value]);
        let Some(inst) = made else {
            // The right side is another value as it is.
            return Ok(if have == ty { value } else { self.push(Op::Cast, &[value], ty, &target.name.text) });
        };
        if have.dtype != dtype && !rounds(&inst.op) {
            return Ok(self.push(Op::Cast, &[value], ty, &target.name.text));
        }
        let name = self.unique(&target.name.text);
        self.frame.memo.retain(|m| m.3 != value);
        let slot = &mut self.frame.f.values[value.0 as usize];
        slot.name = name;
        slot.ty = ty;
        Ok(value)
    }

    fn unique(&self, name: &str) -> String {
        let free = |n: &String| self.frame.f.value_named(n).is_none();
        let numbered = (1u32..).map(|n| format!("{name}.{n}"));
        std::iter::once(name.to_owned()).chain(numbered).find(free).unwrap_or_default()
    }

    /// An operand of a call: a use of a value, as it is.
    pub(crate) fn operand(&mut self, e: &Expr) -> Lowered<ValueId> {
        if !matches!(e, Expr::Use { .. }) {
            let message = "a call takes values such as `x[t,d]`";
            return Err(Diagnostic::new(e.at(), message)
                .note("name the operand in an equation of its own")
                .into());
        }
        let free = self.free(e)?;
        self.value(e, &free)
    }

    /// The value of an expression, in which `kept` are the indices that the surroundings need.
    pub(crate) fn value(&mut self, e: &Expr, kept: &[AxisId]) -> Lowered<ValueId> {
        if let Some(x) = self.number(e)? {
            return Ok(self.constant(x, DType::F32));
        }
        match e {
            Expr::Number { value, .. } => Ok(self.constant(*value, DType::F32)),
            Expr::Use { name, indices } => self.read(name, indices, kept),
            Expr::Neg { .. } | Expr::Infix { op: Binary::Mul | Binary::Div, .. } => {
                self.product(e, kept, &[])
            }
            Expr::Not { value, at } => {
                let x = self.value(value, kept)?;
                self.emit(*at, Op::Unary(Unary::Not), &[x])
            }
            Expr::Infix { op, left, right, at } => {
                let (x, y) = self.pair(left, right, kept)?;
                self.emit(*at, Op::Binary(*op), &[x, y])
            }
            Expr::Apply { function, along, params, args } => {
                stdlib::apply(self, &stdlib::Use { function, along, params, args }, kept)
            }
        }
    }

    /// Two operands of which a number takes the other's kind: `target[t] == 0` compares integers.
    pub(crate) fn pair(&mut self, left: &Expr, right: &Expr, kept: &[AxisId]) -> Lowered<(ValueId, ValueId)> {
        Ok(match (self.number(left)?, self.number(right)?) {
            (Some(x), None) => {
                let y = self.value(right, kept)?;
                (self.constant_beside(x, y), y)
            }
            (None, Some(y)) => {
                let x = self.value(left, kept)?;
                (x, self.constant_beside(y, x))
            }
            _ => (self.value(left, kept)?, self.value(right, kept)?),
        })
    }

    // --- emission -------------------------------------------------------------------------------------

    /// Axes in the order in which this equation's values lie: those that each value carries, then as on the left.
    fn ordered(&self, axes: &[AxisId]) -> Vec<AxisId> {
        let mut order: Vec<_> = axes.to_vec();
        order.sort_by_key(|a| {
            let each = self.frame.each.iter().position(|e| e == a);
            let left = self.left.iter().position(|l| l == a);
            (each.unwrap_or(usize::MAX), left.unwrap_or(usize::MAX))
        });
        order
    }

    /// A product of all operands, summed over these axes.
    pub(crate) fn contract(&mut self, at: Spot, args: &[ValueId], summed: &[AxisId]) -> Lowered<ValueId> {
        let mut axes = Vec::new();
        for &x in args {
            for &a in &self.frame.f.ty(x).axes {
                if !summed.contains(&a) && !axes.contains(&a) {
                    axes.push(a);
                }
            }
        }
        let axes = self.ordered(&axes);
        self.emit_as(at, Op::Contract, args, Some(&axes))
    }

    /// The result of an op on values; its type follows.
    pub(crate) fn emit(&mut self, at: Spot, op: Op, args: &[ValueId]) -> Lowered<ValueId> {
        self.emit_as(at, op, args, None)
    }

    fn emit_as(&mut self, at: Spot, op: Op, args: &[ValueId], axes: Option<&[AxisId]>) -> Lowered<ValueId> {
        let f = &self.frame.f;
        let types: Vec<_> = args.iter().map(|&a| f.ty(a)).collect();
        let mut ty = infer(&op, &types, Want { dtype: None, axes }, &f.axes).map_err(|message| {
            let shown: Vec<_> = types.iter().map(|t| show_type(t, &f.axes)).collect();
            Diagnostic::new(at, message).note(format!("`{}` of {}", op.mnemonic(), shown.join(" and ")))
        })?;
        if ty.dtype.is_float() && rounds(&op) {
            // On the way, nothing is rounded to less than f32; the result is, once.
            ty.dtype = ty.dtype.promote(DType::F32).unwrap_or(ty.dtype);
        }
        if axes.is_none() {
            ty.axes = self.ordered(&ty.axes);
        }
        let name = format!("{}.{}", self.base, op.mnemonic());
        Ok(self.push(op, args, ty, &name))
    }

    /// An instruction of that type.
    fn push(&mut self, op: Op, args: &[ValueId], ty: Type, name: &str) -> ValueId {
        let value = self.frame.f.push(op, args, &[(name, ty)])[0];
        if let Some(inst) = self.frame.f.body.last_mut() {
            inst.origins.push(self.origin.clone());
        }
        value
    }

    /// The same, but the value is made only once in a function.
    pub(crate) fn once(&mut self, op: Op, args: &[ValueId], ty: Type, name: &str) -> ValueId {
        if let Some(known) = self.frame.memo.iter().find(|m| m.0 == op && m.1 == args && m.2 == ty) {
            return known.3;
        }
        let value = self.push(op.clone(), args, ty.clone(), name);
        self.frame.memo.push((op, args.to_vec(), ty, value));
        value
    }

    /// A number.
    pub(crate) fn constant(&mut self, x: f64, dtype: DType) -> ValueId {
        let name = format!("{}.const", self.base);
        self.once(Op::Const(vec![Real(x)]), &[], Type::scalar(dtype), &name)
    }

    /// A number of a kind that meets that value.
    pub(crate) fn constant_beside(&mut self, x: f64, value: ValueId) -> ValueId {
        let dtype = match self.frame.f.ty(value).dtype {
            DType::I32 if x.fract() == 0.0 => DType::I32,
            DType::F64 => DType::F64,
            DType::I32 | DType::F32 | DType::Bf16 | DType::F16 | DType::Bool => DType::F32,
        };
        self.constant(x, dtype)
    }
}

/// Whether an op computes, and so rounds to whatever float its result is, or only moves elements.
fn rounds(op: &Op) -> bool {
    match op {
        Op::Const(_)
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Select
        | Op::Cast
        | Op::Contract
        | Op::Reduce { .. }
        | Op::ScatterAdd { .. }
        | Op::Rope { .. }
        | Op::Softmax { .. }
        | Op::RmsNorm { .. } => true,
        Op::Position { .. }
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
        | Op::Past { .. }
        | Op::Append { .. }
        | Op::Call { .. } => false,
    }
}
