//! The functions of equations.
//!
//! | written | is |
//! |---|---|
//! | `exp(x)`, `log`, `sqrt`, `rsqrt`, `abs`, `sigmoid`, `silu`, `tanh`, `sin`, `cos` | of each element |
//! | `max(x, y)`, `min(x, y)`, `select(c, x, y)` | of elements that meet |
//! | `sum[e](x)`, `sum[b,t](x)`, `max[e](x)` | folds an axis, which is gone |
//! | `softmax[e](x)`, `softmax[s <= t](x)` | exponentials that sum to one; over what is not in the future of `t` |
//! | `logsumexp[e](x)` | `log(sum[e](exp(x)))`, from the largest down |
//! | `rms_norm[d; eps](x)` | `x / sqrt(mean of x^2 + eps)` |
//! | `top[e; k](x)` | `x` where it is among the `k` largest, else 0 |
//! | `in_top[e; k](x)` | whether it is |
//! | `table[l; numbers]()` | a number for each index, one after the other |
//! | `rope[r at t; freqs](x)` | pairs `2j, 2j+1` of `r` turned by the position of `t` times `freqs[j]` |
//! | `rope_halves[r at t; freqs](x)` | the same with pairs `j, j + r/2` |

use latentc_ir::{AxisId, Binary, DType, Op, Pairs, Real, Reduce, Size, Type, Unary, ValueId};

use crate::error::Diagnostic;
use crate::expr::{Along, Expr, Name, Param};
use crate::frame::Frame;
use crate::lower::{Lower, Lowered};

/// A use of a function.
pub(crate) struct Use<'e> {
    pub(crate) function: &'e Name,
    pub(crate) along: &'e [Along],
    pub(crate) params: &'e [Param],
    pub(crate) args: &'e [Expr],
}

/// The function of one element that is called so in equations.
pub(crate) fn unary(name: &str) -> Option<Unary> {
    Some(match name {
        "exp" => Unary::Exp,
        "log" => Unary::Log,
        "sqrt" => Unary::Sqrt,
        "rsqrt" => Unary::Rsqrt,
        "abs" => Unary::Abs,
        "sigmoid" => Unary::Sigmoid,
        "silu" => Unary::Silu,
        "tanh" => Unary::Tanh,
        "sin" => Unary::Sin,
        "cos" => Unary::Cos,
        _ => return None,
    })
}

/// How each function is written.
const FORMS: [(&str, &str); 14] = [
    ("max", "max(x, y) or max[e](x)"),
    ("min", "min(x, y)"),
    ("select", "select(c, x, y)"),
    ("sum", "sum[e](x)"),
    ("softmax", "softmax[e](x) or softmax[s <= t](x)"),
    ("logsumexp", "logsumexp[e](x)"),
    ("rms_norm", "rms_norm[d; eps](x)"),
    ("top", "top[e; k](x)"),
    ("in_top", "in_top[e; k](x)"),
    ("table", "table[l; numbers]()"),
    ("rope", "rope[r at t; freqs](x)"),
    ("rope_halves", "rope_halves[r at t; freqs](x)"),
    ("exp", "exp(x)"),
    ("silu", "silu(x)"),
];

/// The axes between a function's brackets that its result depends on, or (true) no longer depends on.
pub(crate) fn along(frame: &Frame, function: &Name, along: &[Along]) -> Lowered<Vec<(AxisId, bool)>> {
    let folds = matches!(function.text.as_str(), "sum" | "max" | "logsumexp");
    let mut axes = Vec::new();
    for a in along {
        match a {
            Along::Axis(a) => axes.push((frame.axis(a)?, folds)),
            Along::UpTo(a, b) | Along::At(a, b) => {
                axes.push((frame.axis(a)?, folds));
                axes.push((frame.axis(b)?, false));
            }
        }
    }
    Ok(axes)
}

/// The value of a use of a function.
pub(crate) fn apply(l: &mut Lower<'_>, u: &Use<'_>, kept: &[AxisId]) -> Lowered<ValueId> {
    let at = u.function.at;
    match (u.function.text.as_str(), u.along, u.params, u.args) {
        (name, [], [], [x]) if unary(name).is_some() => {
            let x = l.value(x, kept)?;
            let op = unary(name).map(Op::Unary).unwrap_or(Op::Cast);
            l.emit(at, op, &[x])
        }
        (name @ ("max" | "min"), [], [], [x, y]) => {
            let (x, y) = l.pair(x, y, kept)?;
            l.emit(at, Op::Binary(if name == "max" { Binary::Max } else { Binary::Min }), &[x, y])
        }
        ("select", [], [], [c, x, y]) => {
            let c = l.value(c, kept)?;
            let (x, y) = l.pair(x, y, kept)?;
            l.emit(at, Op::Select, &[c, x, y])
        }
        ("sum", axes, [], [x]) if !axes.is_empty() => {
            let folded = whole(l, u)?;
            present(l, u, x, &folded)?;
            let inner: Vec<_> = kept.iter().copied().filter(|a| !folded.contains(a)).collect();
            sum(l, u, x, &inner, &folded)
        }
        ("max", [Along::Axis(_)], [], [x]) => {
            let (x, axis) = operand(l, u, x, kept)?;
            l.emit(at, Op::Reduce { by: Reduce::Max, axis }, &[x])
        }
        ("softmax", [Along::Axis(_)], [], [x]) => {
            keeps(l, u, kept)?;
            let (x, axis) = operand(l, u, x, kept)?;
            l.emit(at, Op::Softmax { axis }, &[x])
        }
        ("softmax", [Along::UpTo(s, t)], [], [x]) => {
            keeps(l, u, kept)?;
            masked_softmax(l, u, s, t, x, kept)
        }
        ("logsumexp", [Along::Axis(_)], [], [x]) => {
            let (x, axis) = operand(l, u, x, kept)?;
            let top = l.emit(at, Op::Reduce { by: Reduce::Max, axis }, &[x])?;
            let below = l.emit(at, Op::Binary(Binary::Sub), &[x, top])?;
            let e = l.emit(at, Op::Unary(Unary::Exp), &[below])?;
            let sum = l.emit(at, Op::Reduce { by: Reduce::Sum, axis }, &[e])?;
            let log = l.emit(at, Op::Unary(Unary::Log), &[sum])?;
            l.emit(at, Op::Binary(Binary::Add), &[log, top])
        }
        ("rms_norm", [Along::Axis(_)], [Param::Number(eps)], [x]) => {
            keeps(l, u, kept)?;
            let (x, axis) = operand(l, u, x, kept)?;
            l.emit(at, Op::RmsNorm { axis, eps: Real(*eps) }, &[x])
        }
        (name @ ("top" | "in_top"), [Along::Axis(axis)], [Param::Number(k)], [x]) => {
            keeps(l, u, kept)?;
            let size = l.frame.axis(axis).map(|a| l.frame.f.axis(a).size.clone())?;
            if k.fract() != 0.0 || *k < 1.0 || size.fixed().is_some_and(|n| *k > n as f64) {
                let message = format!("the {k} largest of axis `{}` ({size})", axis.text);
                return Err(Diagnostic::new(at, message).note(format!("k must be from 1 to {size}")).into());
            }
            let (x, axis) = operand(l, u, x, kept)?;
            let best = l.emit(at, Op::TopK { axis, k: *k as u64 }, &[x])?;
            if name == "in_top" {
                return Ok(best);
            }
            let zero = l.constant(0.0, DType::F32);
            l.emit(at, Op::Select, &[best, x, zero])
        }
        ("table", [Along::Axis(axis)], [Param::Table(numbers)], []) => {
            keeps(l, u, kept)?;
            let axis_id = l.frame.axis(axis)?;
            let size = l.frame.f.axis(axis_id).size.clone();
            if size != Size::Fixed(numbers.len() as u64) {
                let message =
                    format!("axis `{}` ({size}) needs {size} numbers, {} given", axis.text, numbers.len());
                return Err(Diagnostic::new(axis.at, message).into());
            }
            let table = Op::Const(numbers.iter().copied().map(Real).collect());
            Ok(l.once(table, &[], Type::new(DType::F32, vec![axis_id]), "table"))
        }
        (name @ ("rope" | "rope_halves"), [Along::At(r, t)], [Param::Table(freqs)], [x]) => {
            keeps(l, u, kept)?;
            let pairs = if name == "rope" { Pairs::Interleaved } else { Pairs::Halves };
            rope(l, u, (r, t), freqs, pairs, x, kept)
        }
        (name, ..) => {
            let forms: Vec<_> = FORMS.iter().filter(|f| f.0 == name).map(|f| format!("`{}`", f.1)).collect();
            if let [form] = &forms[..] {
                let message = format!("`{name}` is not used like this");
                return Err(Diagnostic::new(at, message).note(format!("write {form}")).into());
            }
            if unary(name).is_some() {
                let message = format!("`{name}` takes one operand and works along nothing");
                return Err(Diagnostic::new(at, message).note(format!("write `{name}(x)`")).into());
            }
            let known: Vec<_> = FORMS.iter().map(|f| format!("`{}`", f.0)).collect();
            Err(Diagnostic::new(at, format!("no function is called `{name}`"))
                .note(format!("among the functions are {}", known.join(", ")))
                .into())
        }
    }
}

/// The axes of a function that works along whole ones.
fn whole(l: &Lower<'_>, u: &Use<'_>) -> Lowered<Vec<AxisId>> {
    let mut axes = Vec::new();
    for a in u.along {
        let Along::Axis(a) = a else {
            let message = format!("`{}` works along whole axes", u.function.text);
            return Err(Diagnostic::new(u.function.at, message).into());
        };
        axes.push(l.frame.axis(a)?);
    }
    Ok(axes)
}

/// Checks that an operand depends on the axes that the function works along.
fn present(l: &Lower<'_>, u: &Use<'_>, x: &Expr, axes: &[AxisId]) -> Lowered<()> {
    let free = l.free(x)?;
    for (a, along) in axes.iter().zip(u.along) {
        if !free.contains(a) {
            let (Along::Axis(name) | Along::UpTo(name, _) | Along::At(name, _)) = along;
            let message =
                format!("`{}` works along `{}`, which its operand lacks", u.function.text, name.text);
            return Err(Diagnostic::new(name.at, message).into());
        }
    }
    Ok(())
}

/// The operand, which keeps the axis that the function works along, and that axis.
fn operand(l: &mut Lower<'_>, u: &Use<'_>, x: &Expr, kept: &[AxisId]) -> Lowered<(ValueId, AxisId)> {
    let (Along::Axis(name) | Along::UpTo(name, _) | Along::At(name, _)) = &u.along[0];
    let axis = l.frame.axis(name)?;
    present(l, u, x, &[axis])?;
    let mut inner = kept.to_vec();
    if !inner.contains(&axis) {
        inner.push(axis);
    }
    Ok((l.value(x, &inner)?, axis))
}

/// Checks that somebody wants the axis that a function works along and does not fold.
fn keeps(l: &Lower<'_>, u: &Use<'_>, kept: &[AxisId]) -> Lowered<()> {
    let (Along::Axis(name) | Along::UpTo(name, _) | Along::At(name, _)) = &u.along[0];
    if kept.contains(&l.frame.axis(name)?) {
        return Ok(());
    }
    let message = format!("`{}` is not on the left, and no other factor shares it", name.text);
    let note = format!("`{}` works along `{}` and keeps it", u.function.text, name.text);
    Err(Diagnostic::new(name.at, message).note(note).into())
}

/// The place in its sequence of each entry of an axis. A sequence that each batch entry has its own of starts anywhere;
/// what `s like t` runs over is the same for all.
fn position(l: &mut Lower<'_>, axis: AxisId) -> ValueId {
    let row = l.frame.f.axis(axis);
    let name = format!("pos.{}", row.name);
    let mut axes = if row.like.is_some() { Vec::new() } else { l.frame.each.clone() };
    axes.push(axis);
    l.once(Op::Position { axis }, &[], Type::new(DType::I32, axes), &name)
}

/// `sum[b,t](x)`: of a product one contraction, of all else a reduction.
fn sum(l: &mut Lower<'_>, u: &Use<'_>, x: &Expr, kept: &[AxisId], folded: &[AxisId]) -> Lowered<ValueId> {
    if let Expr::Infix { op: Binary::Div, right, .. } = x
        && l.free(right)?.iter().any(|a| folded.contains(a))
    {
        let inner: Vec<_> = kept.iter().chain(folded).copied().collect();
        let mut y = l.value(x, &inner)?;
        for &axis in folded {
            y = l.emit(u.function.at, Op::Reduce { by: Reduce::Sum, axis }, &[y])?;
        }
        return Ok(y);
    }
    l.product(x, kept, folded)
}

/// `softmax[s <= t](x)`: what lies ahead counts as -inf.
fn masked_softmax(
    l: &mut Lower<'_>,
    u: &Use<'_>,
    s: &Name,
    t: &Name,
    x: &Expr,
    kept: &[AxisId],
) -> Lowered<ValueId> {
    let at = u.function.at;
    let now = l.frame.axis(t)?;
    let (x, axis) = operand(l, u, x, kept)?;
    if l.frame.f.axis(axis).like != Some(now) {
        let message = format!("`{}` and `{}` are not positions of one sequence", s.text, t.text);
        let note = format!("declare `{} like {}`", s.text, t.text);
        return Err(Diagnostic::new(s.at, message).note(note).into());
    }
    let (there, here) = (position(l, axis), position(l, now));
    let seen = l.emit(at, Op::Binary(Binary::Le), &[there, here])?;
    let never = l.constant(f64::NEG_INFINITY, DType::F32);
    let masked = l.emit(at, Op::Select, &[seen, x, never])?;
    l.emit(at, Op::Softmax { axis }, &[masked])
}

fn rope(
    l: &mut Lower<'_>,
    u: &Use<'_>,
    (r, t): (&Name, &Name),
    freqs: &[f64],
    pairs: Pairs,
    x: &Expr,
    kept: &[AxisId],
) -> Lowered<ValueId> {
    let now = l.frame.axis(t)?;
    let (x, axis) = operand(l, u, x, kept)?;
    let size = l.frame.f.axis(axis).size.clone();
    if size != Size::Fixed(2 * freqs.len() as u64) {
        let message = format!("axis `{}` ({size}) needs {size}/2 frequencies, {} given", r.text, freqs.len());
        return Err(Diagnostic::new(r.at, message).into());
    }
    if !l.frame.f.ty(x).has(now) {
        let message =
            format!("`{}` is turned by the position of `{}`, which its operand lacks", r.text, t.text);
        return Err(Diagnostic::new(t.at, message).into());
    }
    let halves = format!("{}.pair", r.text);
    let j = match l.frame.f.axis_named(&halves) {
        Some(j) => j,
        None => {
            l.frame.axis_spots.push(r.at);
            l.frame.f.add_axis(&halves, Size::Fixed(freqs.len() as u64), None)
        }
    };
    let table = Op::Const(freqs.iter().copied().map(Real).collect());
    let freq = l.once(table, &[], Type::new(DType::F32, vec![j]), "freq");
    let pos = position(l, now);
    l.emit(u.function.at, Op::Rope { axis, pairs }, &[x, pos, freq])
}
