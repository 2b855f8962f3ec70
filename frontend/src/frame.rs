//! A function while it is being traced: its axes, its names, and what is declared rather than computed.

use std::collections::BTreeMap;

use latentc_ir::infer::show_type;
use latentc_ir::{AxisId, DType, Factor, Function, Held, Op, Origin, Stored, Type, ValueId};

use crate::error::Diagnostic;
use crate::expr::{Call, Index, Name, Spot, Target, WeightDecl};
use crate::lower::{Lowered, Stop};

/// What a name stands for.
#[derive(Clone, Debug)]
pub(crate) enum Binding {
    /// A value; `axes` are the written ones, in the order in which a use gives its indices.
    Value { id: ValueId, axes: Vec<AxisId>, at: Spot },
    /// A value whose equation is wrong.
    Broken,
}

/// A function while it is being traced.
pub(crate) struct Frame {
    pub(crate) f: Function,
    pub(crate) name: Name,
    pub(crate) names: BTreeMap<String, Binding>,
    /// Where each axis was declared, by axis number.
    pub(crate) axis_spots: Vec<Spot>,
    pub(crate) each: Vec<AxisId>,
    /// Results of operations that are the same wherever they are asked for: positions, constants, renamings.
    pub(crate) memo: Vec<(Op, Vec<ValueId>, Type, ValueId)>,
    pub(crate) inputs: Vec<Target>,
    pub(crate) outputs: Vec<Target>,
    pub(crate) inputs_bound: bool,
    pub(crate) cached: Vec<String>,
}

impl Frame {
    /// The axis of that letter.
    pub(crate) fn axis(&self, name: &Name) -> Lowered<AxisId> {
        self.f.axis_named(&name.text).ok_or_else(|| {
            let known: Vec<_> = self.f.axes.iter().map(|a| format!("`{}`", a.name)).collect();
            let error = Diagnostic::new(name.at, format!("no axis is called `{}`", name.text));
            let note = format!("`axes` declares {}", known.join(", "));
            if known.is_empty() { error.into() } else { error.note(note).into() }
        })
    }

    /// Lets a name be defined again with the same axes, as in a loop over layers.
    pub(crate) fn again(
        &self,
        name: &Name,
        id: ValueId,
        axes: Vec<AxisId>,
    ) -> Lowered<(ValueId, Vec<AxisId>)> {
        match self.names.get(&name.text) {
            Some(Binding::Value { axes: before, at, .. }) if *before != axes => {
                let shown = self.shown(&name.text, &axes);
                let message = format!("`{}` is defined again with other axes: {shown}", name.text);
                let before = format!("defined as {}", self.shown(&name.text, before));
                Err(Diagnostic::new(name.at, message).related(*at, before).into())
            }
            _ => Ok((id, axes)),
        }
    }

    /// `name` (size), for messages.
    pub(crate) fn sized(&self, a: AxisId) -> String {
        let axis = self.f.axis(a);
        format!("`{}` ({})", axis.name, axis.size)
    }

    /// `x[t,d]`, for messages.
    pub(crate) fn shown(&self, name: &str, axes: &[AxisId]) -> String {
        let axes: Vec<_> = axes.iter().map(|&a| self.f.axis(a).name.as_str()).collect();
        if axes.is_empty() { name.to_owned() } else { format!("{name}[{}]", axes.join(",")) }
    }

    pub(crate) fn dtype(&self, target: &Target) -> Lowered<Option<DType>> {
        let Some(name) = &target.dtype else { return Ok(None) };
        match DType::from_name(&name.text) {
            Some(d) => Ok(Some(d)),
            None => {
                let known: Vec<_> = DType::ALL.iter().map(|d| d.name()).collect();
                Err(Diagnostic::new(name.at, format!("no dtype is called `{}`", name.text))
                    .note(format!("there are {}", known.join(", ")))
                    .into())
            }
        }
    }

    /// The dtype and written axes of a target whose indices are plain axes.
    pub(crate) fn declared(&self, target: &Target, model: DType) -> Lowered<(DType, Vec<AxisId>)> {
        let mut axes = Vec::new();
        for index in &target.indices {
            let Index::Axis(name) = index else {
                let message = format!("`{}` is declared with plain axes", target.name.text);
                return Err(Diagnostic::new(target.name.at, message).into());
            };
            let a = self.axis(name)?;
            if axes.contains(&a) {
                let message = format!("`{}` has the axis `{}` twice", target.name.text, name.text);
                return Err(Diagnostic::new(name.at, message).into());
            }
            if self.each.contains(&a) {
                let message = format!("`{}` is carried by each value and is not written", name.text);
                return Err(Diagnostic::new(name.at, message).into());
            }
            axes.push(a);
        }
        Ok((self.dtype(target)?.unwrap_or(model), axes))
    }

    /// The value that the head promises under a name.
    pub(crate) fn result(&self, output: &Target, model: DType) -> Lowered<ValueId> {
        let (dtype, want) = self.declared(output, model)?;
        let name = &output.name;
        match self.names.get(&name.text) {
            None => {
                let message =
                    format!("no equation defines `{}`, which `{}` gives", name.text, self.name.text);
                Err(Diagnostic::new(name.at, message).into())
            }
            Some(Binding::Broken) => Err(Stop::Broken),
            Some(Binding::Value { id, axes, at }) => {
                let ty = self.f.ty(*id);
                if *axes != want {
                    let message = format!(
                        "`{}` gives {}, its equation defines {}",
                        self.name.text,
                        self.shown(&name.text, &want),
                        self.shown(&name.text, axes)
                    );
                    return Err(Diagnostic::new(name.at, message).related(*at, "defined here").into());
                }
                if ty.dtype != dtype && (output.dtype.is_some() || ty.dtype.is_float()) {
                    let message = format!(
                        "`{}` gives `{}` as {dtype}, its equation defines it as {}",
                        self.name.text, name.text, ty.dtype
                    );
                    return Err(Diagnostic::new(name.at, message).related(*at, "defined here").into());
                }
                Ok(*id)
            }
        }
    }

    pub(crate) fn weight(&mut self, decl: &WeightDecl, model: DType) -> Lowered<(ValueId, Vec<AxisId>)> {
        let name = &decl.target.name;
        let (dtype, axes) = self.declared(&decl.target, model)?;
        if self.names.contains_key(&name.text) {
            return Err(Diagnostic::new(name.at, format!("`{}` is already defined", name.text)).into());
        }
        // Each axis of the weight must be found once: as a factor, as one of the parts, or in the tensor's name.
        let mut found = Vec::new();
        let mut dims = Vec::new();
        for dim in &decl.dims {
            let mut factors = Vec::new();
            for parts in dim {
                let ids = parts.iter().map(|p| self.axis(p)).collect::<Lowered<Vec<_>>>()?;
                let mut mine = ids.iter().zip(parts).filter(|(a, _)| axes.contains(a));
                let Some((&a, _)) = mine.next() else {
                    let shown: Vec<_> = parts.iter().map(|p| format!("`{}`", p.text)).collect();
                    let message = format!("`{}` has no axis {}", name.text, shown.join(" or "));
                    return Err(
                        Diagnostic::new(parts.first().map_or(decl.tensor.at, |p| p.at), message).into()
                    );
                };
                if let Some((_, second)) = mine.next() {
                    let message = format!("`{}` has more than one of these parts", name.text);
                    return Err(Diagnostic::new(second.at, message).into());
                }
                found.push(a);
                factors.push(if ids.len() == 1 { Factor::Axis(a) } else { Factor::Parts(ids) });
            }
            dims.push(factors);
        }
        for (n, piece) in decl.tensor.text.split('{').enumerate() {
            let Some(letter) = (n > 0).then(|| piece.split_once('}').map(|p| p.0)).flatten() else {
                continue;
            };
            found.push(self.axis(&Name::at(letter, decl.tensor.at))?);
        }
        for &a in &axes {
            let times = found.iter().filter(|&&f| f == a).count();
            if times != 1 {
                let axis = &self.f.axis(a).name;
                let how = if times == 0 { "nowhere".to_owned() } else { format!("{times} times") };
                let message = format!("axis `{axis}` of `{}` occurs {how} in its tensor", name.text);
                return Err(Diagnostic::new(decl.tensor.at, message).into());
            }
            if self.f.axis(a).size.fixed().is_none() {
                let message = format!("a weight cannot have axis {}, known at run time only", self.sized(a));
                return Err(Diagnostic::new(name.at, message).into());
            }
        }
        if let Some(&a) = found.iter().find(|a| !axes.contains(a)) {
            let message = format!("`{}` has no axis `{}`", name.text, self.f.axis(a).name);
            return Err(Diagnostic::new(decl.tensor.at, message).into());
        }
        let stored = Stored { tensor: decl.tensor.text.clone(), dims, held: Held::Elements };
        Ok((self.f.add_weight(&name.text, Type::new(dtype, axes.clone()), stored), axes))
    }

    /// A call whose callee is traced. Axes meet by position, like those of a use.
    pub(crate) fn call(
        &mut self,
        call: &Call,
        callee: &Function,
        args: &[ValueId],
        shown: &Name,
        origin: Origin,
    ) -> Lowered<Vec<(ValueId, Vec<AxisId>)>> {
        let at = call.targets.first().map_or(shown.at, |t| t.name.at);
        for (what, want, given) in [
            ("operands", callee.params.len(), args.len()),
            ("results", callee.results.len(), call.targets.len()),
        ] {
            if want != given {
                let message = format!("`{}` {what} {want}, here there are {given}", shown.text);
                return Err(Diagnostic::new(at, message).related(shown.at, "declared here").into());
            }
        }
        for ((&arg, &param), expr) in args.iter().zip(&callee.params).zip(&call.args) {
            let (a, p) = (self.f.ty(arg), callee.ty(param));
            let fits = a.axes.len() == p.axes.len()
                && a.axes.iter().zip(&p.axes).all(|(&x, &y)| self.f.axis(x).size == callee.axis(y).size);
            if !fits || a.dtype != p.dtype {
                let message = format!(
                    "`{}` takes {} for `{}`, here it is given {}",
                    shown.text,
                    show_type(p, &callee.axes),
                    callee.value(param).name,
                    show_type(a, &self.f.axes),
                );
                return Err(Diagnostic::new(expr.at(), message).related(shown.at, "declared here").into());
            }
        }
        let mut types = Vec::new();
        let mut written = Vec::new();
        for (target, &result) in call.targets.iter().zip(&callee.results) {
            let ty = callee.ty(result);
            let (_, axes) = self.declared(target, ty.dtype)?;
            let mut all = axes.clone();
            if axes.len() != ty.axes.len() {
                all.splice(0..0, self.each.iter().copied());
            }
            let fits = all.len() == ty.axes.len()
                && all.iter().zip(&ty.axes).all(|(&x, &y)| self.f.axis(x).size == callee.axis(y).size);
            if !fits {
                let message = format!(
                    "`{}` gives {}, here called {}",
                    shown.text,
                    show_type(ty, &callee.axes),
                    self.shown(&target.name.text, &axes)
                );
                return Err(Diagnostic::new(target.name.at, message)
                    .related(shown.at, "declared here")
                    .into());
            }
            types.push((target.name.text.as_str(), Type::new(ty.dtype, all)));
            written.push(axes);
        }
        let op = Op::Call { callee: callee.name.clone(), scope: call.scope.clone() };
        let results = self.f.push(op, args, &types);
        if let Some(inst) = self.f.body.last_mut() {
            inst.origins.push(origin);
        }
        Ok(results.into_iter().zip(written).collect())
    }
}
