//! The type of a result: one arm per op.
//!
//! Most ops leave the order of the result's axes to the author, contraction even which of them stay.
//! [`infer`] therefore takes what is wanted and answers with a type or says which rule it breaks;
//! the verifier wants what is written and expects it back.

use crate::ops::{Binary, Fields, Op, Unary};
use crate::print::Name;
use crate::types::{Axis, AxisId, DType, Size, Type};

/// What is already decided about a result.
#[derive(Clone, Copy, Debug, Default)]
pub struct Want<'a> {
    /// The dtype, where the op leaves a choice.
    pub dtype: Option<DType>,
    /// The axes in memory order.
    pub axes: Option<&'a [AxisId]>,
}

impl<'a> Want<'a> {
    /// All of it.
    pub fn exactly(ty: &'a Type) -> Want<'a> {
        Want { dtype: Some(ty.dtype), axes: Some(&ty.axes) }
    }

    /// The axes, any dtype.
    pub fn axes(axes: &'a [AxisId]) -> Want<'a> {
        Want { dtype: None, axes: Some(axes) }
    }
}

/// What a rule says of the result's dtype.
enum Elem {
    Is(DType),
    /// Any float, by default this one.
    Float(DType),
    /// Anything; it must be wanted.
    Any,
}

/// What a rule says of the result's axes.
enum Axes {
    /// These, in any order.
    Set(Vec<AxisId>),
    /// Some of these.
    Within(Vec<AxisId>),
    /// These and others.
    Over(Vec<AxisId>),
}

/// The axis table and the names of the types in an error.
struct Cx<'a>(&'a [Axis]);

impl Cx<'_> {
    fn name(&self, a: AxisId) -> &str {
        &self.0[a.0 as usize].name
    }
    fn size(&self, a: AxisId) -> &Size {
        &self.0[a.0 as usize].size
    }
    fn names(&self, axes: &[AxisId]) -> String {
        let names: Vec<_> = axes.iter().map(|&a| self.name(a)).collect();
        format!("[{}]", names.join(", "))
    }
    fn ty(&self, ty: &Type) -> String {
        show_type(ty, self.0)
    }

    fn has(&self, ty: &Type, axis: AxisId) -> Result<(), String> {
        if ty.has(axis) {
            Ok(())
        } else {
            Err(format!("the operand {} has no axis `{}`", self.ty(ty), self.name(axis)))
        }
    }
    fn lacks(&self, ty: &Type, axis: AxisId) -> Result<(), String> {
        if ty.has(axis) {
            Err(format!("the operand {} already has the axis `{}`", self.ty(ty), self.name(axis)))
        } else {
            Ok(())
        }
    }
    fn float(&self, ty: &Type) -> Result<DType, String> {
        if ty.dtype.is_float() {
            Ok(ty.dtype)
        } else {
            Err(format!("the operand {} must be a float", self.ty(ty)))
        }
    }
    fn dtype(&self, ty: &Type, want: DType) -> Result<(), String> {
        if ty.dtype == want { Ok(()) } else { Err(format!("the operand {} must be {want}", self.ty(ty))) }
    }
    /// Floats of any dtypes meet in the wider one; anything else only meets its equal.
    fn meet(&self, x: &Type, y: &Type) -> Result<Elem, String> {
        match x.dtype.promote(y.dtype) {
            Some(d) => Ok(Elem::Float(d)),
            None if x.dtype == y.dtype => Ok(Elem::Is(x.dtype)),
            None => {
                Err(format!("the operands {} and {} differ in dtype; `cast` one", self.ty(x), self.ty(y)))
            }
        }
    }
    fn same_size(&self, a: AxisId, b: AxisId) -> Result<(), String> {
        if self.size(a) == self.size(b) {
            return Ok(());
        }
        Err(format!(
            "axis `{}` has size {}, axis `{}` has size {}",
            self.name(a),
            self.size(a),
            self.name(b),
            self.size(b)
        ))
    }
    fn fixed(&self, a: AxisId) -> Result<u64, String> {
        self.size(a).fixed().ok_or_else(|| {
            format!("axis `{}` has the run-time size {}, a fixed one is needed", self.name(a), self.size(a))
        })
    }
    /// The axes of the type with one replaced by others.
    fn replaced(&self, ty: &Type, from: &[AxisId], to: &[AxisId]) -> Result<Vec<AxisId>, String> {
        for &a in from {
            self.has(ty, a)?;
        }
        let at = ty.position(from[0]).unwrap_or(0);
        let mut axes: Vec<_> = Vec::with_capacity(ty.axes.len() + to.len());
        for (n, &a) in ty.axes.iter().enumerate() {
            if n == at {
                axes.extend_from_slice(to);
            }
            if !from.contains(&a) {
                axes.push(a);
            }
        }
        for &a in to {
            if ty.has(a) && !from.contains(&a) {
                self.lacks(ty, a)?;
            }
        }
        Ok(axes)
    }
}

/// `bf16[b, t, n=128]`: a type as the text format writes it.
pub fn show_type(ty: &Type, axes: &[Axis]) -> String {
    if ty.axes.is_empty() {
        return ty.dtype.name().to_owned();
    }
    let axes: Vec<_> = ty
        .axes
        .iter()
        .map(|a| match axes.get(a.0 as usize) {
            Some(Axis { name, size: Size::Fixed(n), .. }) => format!("{}={n}", Name(name)),
            Some(Axis { name, size: Size::Sym(_), .. }) => Name(name).to_string(),
            None => format!("?{}", a.0),
        })
        .collect();
    format!("{}[{}]", ty.dtype, axes.join(", "))
}

fn union<'a>(types: impl IntoIterator<Item = &'a Type>) -> Vec<AxisId> {
    let mut axes = Vec::new();
    for ty in types {
        for &a in &ty.axes {
            if !axes.contains(&a) {
                axes.push(a);
            }
        }
    }
    axes
}

/// The type of the result of `op` on operands of these types, in a function with this axis table.
///
/// # Errors
/// The rule that the operands or the wanted type break, naming axes and sizes. `call` is not for this function,
/// since its rule needs the callee: see [`verify`](crate::verify()).
pub fn infer(op: &Op, args: &[&Type], want: Want<'_>, table: &[Axis]) -> Result<Type, String> {
    let cx = Cx(table);
    let row = op.row();
    if !row.arity().admits(args.len()) {
        return Err(format!(
            "`{}` takes the operands ({}), {} given",
            row.mnemonic,
            row.operands.join(", "),
            args.len()
        ));
    }
    let (elem, axes) = rule(&cx, op, args, want)?;

    let dtype = match (elem, want.dtype) {
        (Elem::Is(d), None) | (Elem::Float(d), None) => d,
        (Elem::Is(d), Some(w)) if d == w => d,
        (Elem::Float(_), Some(w)) if w.is_float() => w,
        (Elem::Any, Some(w)) => w,
        (Elem::Is(d), Some(w)) => return Err(format!("the result is {d}, not {w}")),
        (Elem::Float(_), Some(w)) => return Err(format!("the result is a float, not {w}")),
        (Elem::Any, None) => return Err(format!("`{}` needs a result dtype", op.mnemonic())),
    };
    if let Some(w) = want.axes
        && let Some(twice) = w.iter().enumerate().find(|(n, a)| w[..*n].contains(a))
    {
        return Err(format!("the result {} has the axis `{}` twice", cx.names(w), cx.name(*twice.1)));
    }
    let axes = match (axes, want.axes) {
        (Axes::Set(s), None) | (Axes::Over(s), None) => s,
        (Axes::Within(_), None) => return Err(format!("`{}` needs the axes of its result", op.mnemonic())),
        (Axes::Set(s), Some(w)) => {
            if s.len() != w.len() || !w.iter().all(|a| s.contains(a)) {
                return Err(format!("the result has the axes {}, not {}", cx.names(&s), cx.names(w)));
            }
            w.to_vec()
        }
        (Axes::Within(s), Some(w)) => {
            if let Some(a) = w.iter().find(|a| !s.contains(a)) {
                return Err(format!("no operand has the axis `{}` of the result", cx.name(*a)));
            }
            w.to_vec()
        }
        (Axes::Over(s), Some(w)) => {
            if let Some(a) = s.iter().find(|a| !w.contains(a)) {
                return Err(format!("the result {} lacks the axis `{}`", cx.names(w), cx.name(*a)));
            }
            w.to_vec()
        }
    };
    Ok(Type { dtype, axes })
}

fn rule(cx: &Cx<'_>, op: &Op, args: &[&Type], want: Want<'_>) -> Result<(Elem, Axes), String> {
    Ok(match op {
        Op::Const(values) => match (want.axes.unwrap_or(&[]), values.len()) {
            ([], 1) => (Elem::Any, Axes::Set(vec![])),
            ([], n) => return Err(format!("a table of {n} numbers needs an axis")),
            (&[a], n) => {
                let size = cx.fixed(a)?;
                if size != n as u64 {
                    return Err(format!("axis `{}` has size {size}, the table {n} numbers", cx.name(a)));
                }
                (Elem::Any, Axes::Set(vec![a]))
            }
            _ => return Err("a constant has one axis at most".to_owned()),
        },
        Op::Position { axis } => (Elem::Is(DType::I32), Axes::Over(vec![*axis])),

        Op::Unary(u) => {
            let elem = match u {
                Unary::Not => {
                    cx.dtype(args[0], DType::Bool)?;
                    Elem::Is(DType::Bool)
                }
                Unary::Neg | Unary::Abs if args[0].dtype == DType::I32 => Elem::Is(DType::I32),
                Unary::Neg
                | Unary::Abs
                | Unary::Exp
                | Unary::Log
                | Unary::Sqrt
                | Unary::Rsqrt
                | Unary::Sigmoid
                | Unary::Silu
                | Unary::Tanh
                | Unary::Sin
                | Unary::Cos => Elem::Float(cx.float(args[0])?),
            };
            (elem, Axes::Set(args[0].axes.clone()))
        }
        Op::Binary(b) => {
            let (x, y) = (args[0], args[1]);
            let meet = cx.meet(x, y)?;
            if b.is_logical() {
                cx.dtype(x, DType::Bool)?;
            } else if x.dtype == DType::Bool && *b != Binary::Eq {
                return Err(format!("the operand {} must be a number", cx.ty(x)));
            }
            let elem = if b.is_comparison() { Elem::Is(DType::Bool) } else { meet };
            (elem, Axes::Set(union(args.iter().copied())))
        }
        Op::Select => {
            cx.dtype(args[0], DType::Bool)?;
            (cx.meet(args[1], args[2])?, Axes::Set(union([args[1], args[2], args[0]])))
        }
        Op::Cast => (Elem::Any, Axes::Set(args[0].axes.clone())),

        Op::Contract => {
            let mut d = cx.float(args[0])?;
            for a in &args[1..] {
                d = d.promote(cx.float(a)?).unwrap_or(d);
            }
            (Elem::Float(d), Axes::Within(union(args.iter().copied())))
        }
        Op::Reduce { axis, .. } => {
            cx.has(args[0], *axis)?;
            (Elem::Float(cx.float(args[0])?), Axes::Set(without(args[0], *axis)))
        }

        Op::Rename { from, to } => {
            cx.same_size(*from, *to)?;
            (Elem::Is(args[0].dtype), Axes::Set(cx.replaced(args[0], &[*from], &[*to])?))
        }
        Op::Broadcast { axes } => {
            for &a in axes {
                cx.lacks(args[0], a)?;
            }
            let all = args[0].axes.iter().chain(axes).copied().collect();
            (Elem::Is(args[0].dtype), Axes::Set(all))
        }
        Op::Split { axis, into } => {
            cx.product(*axis, into)?;
            (Elem::Is(args[0].dtype), Axes::Set(cx.replaced(args[0], &[*axis], into)?))
        }
        Op::Merge { axes, into } => {
            cx.product(*into, axes)?;
            (Elem::Is(args[0].dtype), Axes::Set(cx.replaced(args[0], axes, &[*into])?))
        }
        Op::Slice { axis, into, start } => {
            let (whole, part) = (cx.fixed(*axis)?, cx.fixed(*into)?);
            if start.checked_add(part).is_none_or(|end| end > whole) {
                return Err(format!(
                    "{part} elements from {start} on do not lie within axis `{}` of size {whole}",
                    cx.name(*axis)
                ));
            }
            (Elem::Is(args[0].dtype), Axes::Set(cx.replaced(args[0], &[*axis], &[*into])?))
        }
        Op::Concat { axes, into } => {
            if axes.len() != args.len() {
                return Err(format!("{} operands, but {} axes", args.len(), axes.len()));
            }
            let mut total = 0u64;
            for &a in axes {
                total = total.saturating_add(cx.fixed(a)?);
            }
            if cx.fixed(*into)? != total {
                return Err(format!(
                    "axis `{}` has size {}, its parts have {total}",
                    cx.name(*into),
                    cx.fixed(*into)?
                ));
            }
            let first = cx.replaced(args[0], &axes[..1], &[*into])?;
            for (x, a) in args.iter().zip(axes) {
                let other = cx.replaced(x, &[*a], &[*into])?;
                if x.dtype != args[0].dtype
                    || other.len() != first.len()
                    || !other.iter().all(|o| first.contains(o))
                {
                    return Err(format!(
                        "the operands {} and {} differ in more than the joined axis",
                        cx.ty(args[0]),
                        cx.ty(x)
                    ));
                }
            }
            (Elem::Is(args[0].dtype), Axes::Set(first))
        }

        Op::Pack { axis } | Op::Unpack { axis } => {
            cx.dtype(args[0], DType::I32)?;
            let fields = cx.fixed(*axis)?;
            if fields == 0 || fields > Fields::MOST {
                return Err(format!(
                    "axis `{}` has size {fields}; a word has from 1 to {} fields",
                    cx.name(*axis),
                    Fields::MOST
                ));
            }
            let axes = if matches!(op, Op::Pack { .. }) {
                cx.has(args[0], *axis)?;
                without(args[0], *axis)
            } else {
                cx.lacks(args[0], *axis)?;
                args[0].axes.iter().chain([axis]).copied().collect()
            };
            (Elem::Is(DType::I32), Axes::Set(axes))
        }

        Op::Gather { axis } => {
            cx.has(args[0], *axis)?;
            cx.dtype(args[1], DType::I32)?;
            cx.lacks(args[1], *axis)?;
            let rest = Type::new(args[0].dtype, without(args[0], *axis));
            (Elem::Is(args[0].dtype), Axes::Set(union([args[1], &rest])))
        }
        Op::TopK { axis, k } => {
            cx.has(args[0], *axis)?;
            cx.float(args[0])?;
            let n = cx.fixed(*axis)?;
            if *k == 0 || *k > n {
                return Err(format!(
                    "the {k} largest of axis `{}` with size {n}: k must be from 1 to {n}",
                    cx.name(*axis)
                ));
            }
            (Elem::Is(DType::Bool), Axes::Set(args[0].axes.clone()))
        }
        Op::TopIndices { axis, into } => {
            cx.float(args[0])?;
            let (n, k) = (cx.fixed(*axis)?, cx.fixed(*into)?);
            if k > n {
                return Err(format!(
                    "the largest of axis `{}` with size {n} are not as many as axis `{}` is long, {k}",
                    cx.name(*axis),
                    cx.name(*into)
                ));
            }
            (Elem::Is(DType::I32), Axes::Set(cx.replaced(args[0], &[*axis], &[*into])?))
        }

        Op::ScatterAdd { axis } => {
            let (x, index) = (args[0], args[1]);
            cx.float(x)?;
            cx.dtype(index, DType::I32)?;
            cx.lacks(x, *axis)?;
            if let Some(a) = index.axes.iter().find(|a| !x.has(**a)) {
                return Err(format!(
                    "the index {} has the axis `{}`, the operand {} does not",
                    cx.ty(index),
                    cx.name(*a),
                    cx.ty(x)
                ));
            }
            let wanted = want.axes.unwrap_or(&[]);
            let kept = x.axes.iter().filter(|a| !index.has(**a));
            if let Some(a) = kept.chain([axis]).find(|a| want.axes.is_some() && !wanted.contains(a)) {
                return Err(format!("the result {} lacks the axis `{}`", cx.names(wanted), cx.name(*a)));
            }
            (Elem::Float(x.dtype), Axes::Within(x.axes.iter().chain([axis]).copied().collect()))
        }

        Op::Past { from, to } => {
            cx.same_size(*from, *to)?;
            cx.like(*to, *from)?;
            (Elem::Is(args[0].dtype), Axes::Set(cx.replaced(args[0], &[*from], &[*to])?))
        }
        Op::Append { from, to } => {
            let (cache, x, pos) = (args[0], args[1], args[2]);
            cx.has(cache, *to)?;
            cx.dtype(pos, DType::I32)?;
            cx.has(pos, *from)?;
            // A pool is of all sequences, so its axis is like that of none.
            let spent = |a: &AxisId| a != from && pos.has(*a) && !cache.has(*a);
            if cx.0[to.0 as usize].like.is_some() {
                cx.like(*to, *from)?;
                if let Some(a) = x.axes.iter().find(|a| spent(a)) {
                    return Err(format!(
                        "the cache {} lacks the axis `{}`, but its axis `{}` counts the positions of one sequence",
                        cx.ty(cache),
                        cx.name(*a),
                        cx.name(*to)
                    ));
                }
            }
            let mut rows = cx.replaced(x, &[*from], &[*to])?;
            rows.retain(|a| !spent(a));
            let rows = Type::new(x.dtype, rows);
            if !rows.same_elements(cache) {
                return Err(format!("rows of {} do not fit the cache {}", cx.ty(x), cx.ty(cache)));
            }
            if let Some(a) = pos.axes.iter().find(|a| !x.has(**a)) {
                return Err(format!(
                    "the positions {} have the axis `{}`, the rows {} do not",
                    cx.ty(pos),
                    cx.name(*a),
                    cx.ty(x)
                ));
            }
            (Elem::Is(cache.dtype), Axes::Set(cache.axes.clone()))
        }
        Op::Rope { axis, pairs: _ } => {
            let (x, pos, freq) = (args[0], args[1], args[2]);
            cx.has(x, *axis)?;
            cx.float(x)?;
            cx.dtype(pos, DType::I32)?;
            cx.float(freq)?;
            if let Some(a) = pos.axes.iter().find(|a| !x.has(**a) || **a == *axis) {
                return Err(format!(
                    "the positions {} have the axis `{}`, the operand {} cannot follow",
                    cx.ty(pos),
                    cx.name(*a),
                    cx.ty(x)
                ));
            }
            let n = cx.fixed(*axis)?;
            match freq.axes[..] {
                [j] if n % 2 == 0 && cx.fixed(j)? == n / 2 => {}
                _ => {
                    return Err(format!(
                        "axis `{}` of size {n} needs a table of {n}/2 frequencies, not {}",
                        cx.name(*axis),
                        cx.ty(freq)
                    ));
                }
            }
            (Elem::Float(x.dtype), Axes::Set(x.axes.clone()))
        }

        Op::Softmax { axis } | Op::RmsNorm { axis, .. } => {
            cx.has(args[0], *axis)?;
            (Elem::Float(cx.float(args[0])?), Axes::Set(args[0].axes.clone()))
        }

        Op::Call { callee, .. } => {
            return Err(format!("the type of a call of @{callee} follows from the callee"));
        }
    })
}

impl Cx<'_> {
    fn product(&self, whole: AxisId, parts: &[AxisId]) -> Result<(), String> {
        if parts.is_empty() {
            return Err(format!("axis `{}` needs parts", self.name(whole)));
        }
        if let Some(twice) = parts.iter().enumerate().find(|(n, p)| parts[..*n].contains(p)) {
            return Err(format!("the axis `{}` is twice in {}", self.name(*twice.1), self.names(parts)));
        }
        let n = self.fixed(whole)?;
        let mut product = 1u64;
        for &p in parts {
            product = product.saturating_mul(self.fixed(p)?);
        }
        if product != n {
            return Err(format!(
                "axis `{}` has size {n}, its parts {} multiply to {product}",
                self.name(whole),
                self.names(parts)
            ));
        }
        Ok(())
    }

    fn like(&self, s: AxisId, t: AxisId) -> Result<(), String> {
        if self.0[s.0 as usize].like == Some(t) {
            return Ok(());
        }
        Err(format!("axis `{}` is not declared `like {}`", self.name(s), self.name(t)))
    }
}

fn without(ty: &Type, axis: AxisId) -> Vec<AxisId> {
    ty.axes.iter().copied().filter(|&a| a != axis).collect()
}
