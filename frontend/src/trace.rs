//! The tracer: runs a spec and writes down the functions that it describes.

use std::collections::BTreeMap;

use latentc_ir::{AxisId, DType, Function, Module, Origin, Size, Type, ValueId};

use crate::error::{Diagnostic, SpecError};
use crate::expr::{AxisDecl, Call, Equation, Extent, Name, Spot, Target, WeightDecl};
use crate::frame::{Binding, Frame};
use crate::lower::{Lower, Lowered, Stop};

/// A model function: its head, and the Rust closure that states its equations.
pub struct SpecFn<F> {
    name: Name,
    inputs: Vec<Target>,
    outputs: Vec<Target>,
    body: F,
}

impl<F: FnOnce(&mut Tracer)> SpecFn<F> {
    /// What `spec!` expands to.
    pub fn new(name: Name, inputs: Vec<Target>, outputs: Vec<Target>, body: F) -> SpecFn<F> {
        SpecFn { name, inputs, outputs, body }
    }
}

/// What an author asserted with `cache`: these values are all that later tokens read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cached {
    /// The function.
    pub function: String,
    /// The values, in order of definition.
    pub values: Vec<String>,
}

/// A traced spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traced {
    /// The program, not yet verified.
    pub module: Module,
    /// The author's assertions on caches; a pass compares them with what it finds.
    pub cached: Vec<Cached>,
}

/// Runs a spec. Values have this dtype where the spec names no other.
///
/// # Errors
/// All mistakes in the spec; an equation that uses a value whose own equation is wrong is not blamed for that.
pub fn trace<F: FnOnce(&mut Tracer)>(name: &str, dtype: DType, spec: SpecFn<F>) -> Result<Traced, SpecError> {
    let mut tracer =
        Tracer { dtype, frames: Vec::new(), done: Vec::new(), cached: Vec::new(), errors: Vec::new() };
    if !dtype.is_float() {
        tracer
            .errors
            .push(Diagnostic::new(spec.name.at, format!("a model of {dtype}: its dtype must be a float")));
    }
    let entry = tracer.function(spec);
    if !tracer.errors.is_empty() {
        return Err(SpecError { diagnostics: tracer.errors });
    }
    let functions = tracer.done.into_iter().map(|d| d.function).collect();
    let module = Module { name: name.to_owned(), functions, entry: entry.unwrap_or_default() };
    // Weights may be declared anywhere; text has them in front.
    Ok(Traced { module: module.canonical(), cached: tracer.cached })
}

/// A finished function and the name it was written under.
struct Done {
    base: String,
    function: Function,
}

/// Takes down equations. `spec!` calls its methods in the order of the text; Rust code may too.
pub struct Tracer {
    dtype: DType,
    frames: Vec<Frame>,
    done: Vec<Done>,
    cached: Vec<Cached>,
    errors: Vec<Diagnostic>,
}

/// Deeper than any model; a spec that calls itself ends here and not in a stack overflow.
const DEPTH: usize = 32;

impl Tracer {
    /// Traces a function to its end. `None` if it has mistakes; otherwise its name, which it shares with an
    /// equal function traced before.
    fn function<F: FnOnce(&mut Tracer)>(&mut self, spec: SpecFn<F>) -> Option<String> {
        let SpecFn { name, inputs, outputs, body } = spec;
        if self.frames.len() >= DEPTH {
            let message = format!("`{}` is called {DEPTH} functions deep: does it call itself?", name.text);
            self.report(Stop::from(Diagnostic::new(name.at, message)));
            return None;
        }
        let errors = self.errors.len();
        let mut f = Function::new(name.text.clone());
        f.source = name.at.file.to_owned();
        self.frames.push(Frame {
            f,
            name,
            names: BTreeMap::new(),
            axis_spots: Vec::new(),
            each: Vec::new(),
            memo: Vec::new(),
            inputs,
            outputs,
            inputs_bound: false,
            cached: Vec::new(),
        });
        body(self);
        self.bind_inputs();
        let results = self.bind_outputs();
        let mut frame = self.frames.pop()?;
        frame.f.results = results?;
        (self.errors.len() == errors).then(|| self.finish(frame))
    }

    fn finish(&mut self, frame: Frame) -> String {
        let base = frame.name.text;
        let mut f = frame.f;
        let equal = self.done.iter().filter(|d| d.base == base).find(|d| {
            f.name.clone_from(&d.function.name);
            d.function == f
        });
        if let Some(equal) = equal {
            return equal.function.name.clone();
        }
        let n = self.done.iter().filter(|d| d.base == base).count();
        f.name = if n == 0 { base.clone() } else { format!("{base}.{n}") };
        let name = f.name.clone();
        if !frame.cached.is_empty() {
            self.cached.push(Cached { function: name.clone(), values: frame.cached });
        }
        self.done.push(Done { base, function: f });
        name
    }

    fn frame(&mut self) -> &mut Frame {
        self.frames.last_mut().expect("a tracer is only reachable from the body of a function")
    }

    fn report(&mut self, stop: impl Into<Stop>) {
        // A layer is traced once per call; its mistakes are told once.
        if let Stop::Error(d) = stop.into()
            && !self.errors.contains(&d)
        {
            self.errors.push(*d);
        }
    }

    /// Declares an axis. Again is allowed, with the same size.
    pub fn axis(&mut self, decl: AxisDecl) {
        if let Err(stop) = self.declare_axis(decl) {
            self.report(stop);
        }
    }

    fn declare_axis(&mut self, decl: AxisDecl) -> Lowered<()> {
        let frame = self.frame();
        let AxisDecl { name, extent, each } = decl;
        let (size, like) = match extent {
            Extent::Runtime => (Size::Sym(name.text.clone()), None),
            Extent::Fixed(n) => (Size::Fixed(n), None),
            Extent::Like(t) => {
                let t = frame.axis(&t)?;
                (frame.f.axis(t).size.clone(), Some(t))
            }
            Extent::Bad(n) => {
                return Err(
                    Diagnostic::new(name.at, format!("axis `{}` cannot have size {n}", name.text)).into()
                );
            }
        };
        if let Some(known) = frame.f.axis_named(&name.text) {
            let axis = frame.f.axis(known);
            if axis.size == size && axis.like == like {
                return Ok(());
            }
            let message = format!(
                "axis `{}` has size {size} here, but was declared with size {}",
                name.text, axis.size
            );
            return Err(Diagnostic::new(name.at, message)
                .related(frame.axis_spots[known.0 as usize], "declared here")
                .into());
        }
        let id = frame.f.add_axis(&name.text, size, like);
        frame.axis_spots.push(name.at);
        if each {
            frame.each.push(id);
        }
        Ok(())
    }

    /// Inputs stand in the head, above the axes that they use; they become values once the first axes are known.
    fn bind_inputs(&mut self) {
        let model = self.dtype;
        let frame = self.frame();
        if std::mem::replace(&mut frame.inputs_bound, true) {
            return;
        }
        for input in std::mem::take(&mut frame.inputs) {
            let frame = self.frame();
            let bound = frame.declared(&input, model).map(|(dtype, axes)| {
                let all: Vec<_> = frame.each.iter().chain(&axes).copied().collect();
                (frame.f.add_param(&input.name.text, Type::new(dtype, all)), axes)
            });
            self.bind(&input.name, bound);
        }
    }

    /// The values of the results; `None` if one of them has a mistake.
    fn bind_outputs(&mut self) -> Option<Vec<ValueId>> {
        let model = self.dtype;
        let outputs = std::mem::take(&mut self.frame().outputs);
        let mut results = Some(Vec::new());
        for output in outputs {
            match self.frame().result(&output, model) {
                Ok(id) => {
                    if let Some(results) = &mut results {
                        results.push(id);
                    }
                }
                Err(stop) => {
                    results = None;
                    self.report(stop);
                }
            }
        }
        results
    }

    /// Names a value, or the place where there would be one.
    fn bind(&mut self, name: &Name, value: Lowered<(ValueId, Vec<AxisId>)>) {
        let binding = match value.and_then(|(id, axes)| self.frame().again(name, id, axes)) {
            Ok((id, axes)) => Binding::Value { id, axes, at: name.at },
            Err(stop) => {
                self.report(stop);
                Binding::Broken
            }
        };
        self.frame().names.insert(name.text.clone(), binding);
    }

    /// Declares a weight.
    pub fn weight(&mut self, decl: WeightDecl) {
        self.bind_inputs();
        let model = self.dtype;
        let bound = self.frame().weight(&decl, model);
        self.bind(&decl.target.name, bound);
    }

    /// States an equation.
    pub fn equation(&mut self, eq: Equation) {
        self.bind_inputs();
        let model = self.dtype;
        let origin = origin(eq.target.name.at, eq.tag.clone());
        let bound = Lower::new(self.frame(), model, origin, &eq.target).and_then(|mut l| l.equation(&eq));
        if eq.cached
            && let Ok((id, _)) = &bound
        {
            let frame = self.frame();
            let name = frame.f.value(*id).name.clone();
            frame.cached.push(name);
        }
        self.bind(&eq.target.name, bound);
    }

    /// States a call of another function.
    pub fn call<F: FnOnce(&mut Tracer)>(&mut self, call: Call, callee: SpecFn<F>) {
        self.bind_inputs();
        let at = call.targets.first().map_or(callee.name.at, |t| t.name.at);
        let results = self.traced_call(&call, callee, at);
        match results {
            Ok(results) => {
                for (target, result) in call.targets.iter().zip(results) {
                    self.bind(&target.name, Ok(result));
                }
            }
            Err(stop) => {
                self.report(stop);
                for target in &call.targets {
                    self.bind(&target.name, Err(Stop::Broken));
                }
            }
        }
    }

    /// States the equations of another function here, over the values of this one that have its inputs' names.
    pub fn state<F: FnOnce(&mut Tracer)>(&mut self, spec: SpecFn<F>) {
        for input in &spec.inputs {
            let frame = self.frame();
            let comes = !frame.inputs_bound && frame.inputs.iter().any(|i| i.name.text == input.name.text);
            if !comes && !frame.names.contains_key(&input.name.text) {
                let here = &self.frame().name;
                let message = format!(
                    "`{}` is stated of `{}`, which nothing defines in `{}`",
                    spec.name.text, input.name.text, here.text
                );
                let error = Diagnostic::new(here.at, message).related(input.name.at, "declared here");
                return self.report(error);
            }
        }
        (spec.body)(self);
    }

    fn traced_call<F: FnOnce(&mut Tracer)>(
        &mut self,
        call: &Call,
        callee: SpecFn<F>,
        at: Spot,
    ) -> Lowered<Vec<(ValueId, Vec<AxisId>)>> {
        let model = self.dtype;
        let origin = origin(at, call.tag.clone());
        let first = call.targets.first().ok_or_else(|| Diagnostic::new(at, "a call needs a result"))?.clone();
        let mut args = Vec::new();
        for arg in &call.args {
            args.push(Lower::new(self.frame(), model, origin.clone(), &first)?.operand(arg)?);
        }
        let shown = callee.name.clone();
        let name = self.function(callee).ok_or(Stop::Broken)?;
        let callee = self.done.iter().find(|d| d.function.name == name).ok_or(Stop::Broken)?.function.clone();
        self.frame().call(call, &callee, &args, &shown, origin)
    }
}

fn origin(at: Spot, tag: Option<String>) -> Origin {
    Origin { file: at.file.to_owned(), line: at.line, col: at.col, tag }
}
