//! Reading a value at indices.
//!
//! Indices meet the axes of a value by position. The same axis is the value as it is; another one of
//! equal size renames; one declared `like` the value's is the past; a group splits; a value gathers.

use latentc_ir::{AxisId, Op, Size, Type, ValueId};

use crate::error::Diagnostic;
use crate::expr::{Index, Name, Spot};
use crate::frame::Binding;
use crate::lower::{Lower, Lowered, Stop};

impl Lower<'_> {
    /// `name[indices]`
    pub(crate) fn read(&mut self, name: &Name, indices: &[Index], kept: &[AxisId]) -> Lowered<ValueId> {
        let (id, axes, declared) = match self.frame.names.get(&name.text) {
            Some(Binding::Value { id, axes, at }) => (*id, axes.clone(), *at),
            Some(Binding::Broken) => return Err(Stop::Broken),
            None => return Err(self.unknown(name)),
        };
        let shown = format!("declared as {}", self.frame.shown(&name.text, &axes));
        if axes.len() != indices.len() {
            let message =
                format!("`{}` has {}, indexed by {}", name.text, count(axes.len()), count(indices.len()));
            return Err(Diagnostic::new(name.at, message).related(declared, shown).into());
        }
        let mut seen: Vec<AxisId> = Vec::new();
        for index in indices {
            let letters = match index {
                Index::Axis(letter) => std::slice::from_ref(letter),
                Index::Group { parts, .. } => parts.as_slice(),
                Index::Value(_) => &[],
            };
            for letter in letters {
                let a = self.frame.axis(letter)?;
                if seen.contains(&a) {
                    let message = format!("`{}` is read along `{}` twice", name.text, letter.text);
                    return Err(Diagnostic::new(letter.at, message).into());
                }
                seen.push(a);
                if !kept.contains(&a) {
                    let message =
                        format!("`{}` is not on the left, and no other factor shares it", letter.text);
                    let note = format!("if a sum over it is meant, write `sum[{0}](…)`", letter.text);
                    return Err(Diagnostic::new(letter.at, message).note(note).into());
                }
            }
        }
        let wrong = |d: Diagnostic| Stop::from(d.related(declared, shown.clone()));
        let mut x = id;
        for (index, &axis) in indices.iter().zip(&axes) {
            x = match index {
                Index::Axis(letter) => {
                    let a = self.frame.axis(letter)?;
                    if a == axis { x } else { self.rename(x, name, axis, a, letter.at).map_err(wrong)? }
                }
                Index::Group { parts, whole: None, at } => self.split(x, name, axis, parts, *at)?,
                Index::Group { at, .. } => {
                    return Err(Diagnostic::new(*at, "`as` belongs on the left side").into());
                }
                Index::Value(_) => x,
            };
        }
        for (index, &axis) in indices.iter().zip(&axes) {
            if let Index::Value(e) = index {
                let at = self.value(e, kept)?;
                let ty = self.frame.f.ty(at);
                if ty.dtype != latentc_ir::DType::I32 {
                    let message = format!("an index must be i32, this is {}", ty.dtype);
                    return Err(Diagnostic::new(e.at(), message).into());
                }
                x = self.emit(name.at, Op::Gather { axis }, &[x, at])?;
            }
        }
        Ok(x)
    }

    fn unknown(&self, name: &Name) -> Stop {
        let error = Diagnostic::new(name.at, format!("nothing is called `{}` up to here", name.text));
        let near = self.frame.names.keys().find(|k| k.eq_ignore_ascii_case(&name.text));
        match near {
            Some(near) => error.note(format!("there is `{near}`")).into(),
            None => error.into(),
        }
    }

    fn rename(
        &mut self,
        x: ValueId,
        name: &Name,
        from: AxisId,
        to: AxisId,
        at: Spot,
    ) -> Result<ValueId, Diagnostic> {
        let f = &self.frame.f;
        if f.axis(from).size != f.axis(to).size {
            let (have, used) = (self.frame.sized(from), self.frame.sized(to));
            let message = format!("`{}` has axis {have} here, indexed by {used}", name.text);
            return Err(Diagnostic::new(at, message));
        }
        let ty = f.ty(x).clone();
        if ty.has(to) {
            let message = format!("`{}` has an axis `{}` of its own", name.text, f.axis(to).name);
            return Err(
                Diagnostic::new(at, message).note("declare another axis of this size and index by it")
            );
        }
        let axes = ty.axes.iter().map(|&a| if a == from { to } else { a }).collect::<Vec<_>>();
        let past = f.axis(to).like == Some(from);
        let op = if past { Op::Past { from, to } } else { Op::Rename { from, to } };
        let called = format!("{}.{}", f.value(x).name, f.axis(to).name);
        Ok(self.once(op, &[x], Type::new(ty.dtype, axes), &called))
    }

    fn split(&mut self, x: ValueId, name: &Name, axis: AxisId, parts: &[Name], at: Spot) -> Lowered<ValueId> {
        let into = parts.iter().map(|p| self.frame.axis(p)).collect::<Lowered<Vec<_>>>()?;
        self.product_of(&into, axis, at, &name.text)?;
        let ty = self.frame.f.ty(x).clone();
        let axes = ty.axes.iter().flat_map(|&a| if a == axis { into.clone() } else { vec![a] });
        let ty = Type::new(ty.dtype, axes.collect::<Vec<_>>());
        let called = format!("{}.split", self.frame.f.value(x).name);
        Ok(self.once(Op::Split { axis, into }, &[x], ty, &called))
    }

    /// Several axes of a value as one, which is made if the author did not name it.
    pub(crate) fn merge(
        &mut self,
        x: ValueId,
        parts: &[Name],
        whole: Option<&Name>,
        at: Spot,
    ) -> Lowered<(ValueId, AxisId)> {
        let axes = parts.iter().map(|p| self.frame.axis(p)).collect::<Lowered<Vec<_>>>()?;
        let Some(whole) = whole else {
            return Err(Diagnostic::new(at, "the axis that these become has no name")
                .note("write `(g,j) as e`, with `e` declared in `axes`")
                .into());
        };
        let into = self.frame.axis(whole)?;
        self.product_of(&axes, into, at, &whole.text)?;
        if let Some(n) = self.left.iter().position(|a| *a == axes[0]) {
            self.left.insert(n, into);
        }
        Ok((self.emit(at, Op::Merge { axes, into }, &[x])?, into))
    }

    /// Checks that the sizes of the parts multiply to that of the whole.
    fn product_of(&self, parts: &[AxisId], whole: AxisId, at: Spot, name: &str) -> Lowered<()> {
        let size = |a: AxisId| match self.frame.f.axis(a).size {
            Size::Fixed(n) => Some(n),
            Size::Sym(_) => None,
        };
        let product = parts.iter().try_fold(1u64, |p, &a| size(a).and_then(|n| p.checked_mul(n)));
        if product.is_some() && product == size(whole) && !parts.is_empty() {
            return Ok(());
        }
        let parts: Vec<_> = parts.iter().map(|&a| self.frame.sized(a)).collect();
        let whole = self.frame.sized(whole);
        let message = format!("axis {whole} of `{name}` is not the product of {}", parts.join(" and "));
        Err(Diagnostic::new(at, message).into())
    }
}

fn count(n: usize) -> String {
    match n {
        0 => "no axes".to_owned(),
        1 => "1 axis".to_owned(),
        n => format!("{n} axes"),
    }
}
