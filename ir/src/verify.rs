//! What must be true of a module; nothing downstream panics on one that verifies.
//!
//! Module
//! - function names are unique, the entry is one of them
//! - a callee stands before its caller, so nothing recurses
//!
//! Function
//! - every number of a value or an axis is in range
//! - axis names are unique, sizes are not zero, `like` names another axis
//! - every value is defined exactly once and, if used, above its use; value names are unique
//! - no type has an axis twice
//! - something is returned
//!
//! Instruction
//! - one result, but for calls; its type is what [`infer`] says of op, operands and that type
//! - no constant is NaN, since nothing equals it
//! - a call passes what the callee takes: as many values, of equal dtypes, their axes in the same order with equal
//!   sizes; an axis of the callee is the same axis of the caller everywhere, and two of them are never one
//! - a call's results have the callee's types under that mapping, to which axes that only the results have are added
//!
//! Weight
//! - its axes have fixed sizes, and each occurs once, as a factor of a stored dimension or as `{axis}` in
//!   the tensor's name
//! - of the parts that lie one behind the other, two or more and all of fixed size, the weight has one
//! - one that holds codes is i32 and lacks the axis along which they share a word; one that holds scales is f32 and lacks those along
//!   which elements share one
//!
//! Cache
//! - nothing uses it but the first operand of one `append`
//! - its path, the scopes of the calls that lead to it and its own name, is its alone
//!
//! Stage ([`verify_at`])
//! - [`Stage::Traced`]: no caches, no `append`;  [`Stage::Derived`]: no `past`

use std::collections::HashMap;
use std::fmt;

use crate::graph::{Function, Inst, Module, Origin, ValueId};
use crate::infer::{Want, infer, show_type};
use crate::ops::{Attr, Op};
use crate::print::Name;
use crate::types::{AxisId, Size, Type};
use crate::verify_calls::{CachePaths, check_call};
use crate::verify_weights::check_weight;

/// A rule that a module breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyError {
    /// Where in the module.
    pub place: Place,
    /// The function's name, if it is in one.
    pub function: Option<String>,
    /// The name of the value or axis that it is about.
    pub subject: Option<String>,
    /// The first line of the model that this computes a part of.
    pub origin: Option<Origin>,
    /// The rule, with the facts that disagree.
    pub message: String,
}

impl VerifyError {
    /// Subject and rule, for a reader who already sees the function and the line.
    pub fn what(&self) -> String {
        match &self.subject {
            Some(subject) => format!("{}: {}", Name(subject), self.message),
            None => self.message.clone(),
        }
    }
}

impl fmt::Display for VerifyError {
    /// `@mla: x4 (models/src/deepseek_v2/attention.rs:41:9): axis …`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(function) = &self.function {
            write!(f, "@{}: ", Name(function))?;
        }
        if let Some(subject) = &self.subject {
            write!(f, "{}", Name(subject))?;
            if let Some(o) = &self.origin {
                write!(f, " ({}:{}:{})", o.file, o.line, o.col)?;
            }
            write!(f, ": ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for VerifyError {}

/// A part of a module, by numbers that may be out of range: function first, then what in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The module itself.
    Module,
    /// A function's first line.
    Function(usize),
    /// A row of the axis table.
    Axis(usize, usize),
    /// A value's definition.
    Value(usize, usize),
    /// An instruction of the body.
    Inst(usize, usize),
    /// What is returned.
    Return(usize),
}

/// How far a module has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// As the author wrote it: history is read with `past`.
    Traced,
    /// After `derive`: history is read from caches, or from the sequence itself.
    Derived,
}

/// Checks everything but the stage.
///
/// # Errors
/// Every rule that is broken, in order of the module. What could only follow from another error is left out.
pub fn verify(module: &Module) -> Result<(), Vec<VerifyError>> {
    let mut errors = Vec::new();
    let mut above: HashMap<&str, (usize, bool)> = HashMap::new();
    let mut paths = CachePaths::default();
    for (n, f) in module.functions.iter().enumerate() {
        let mut cx = Checker { module, n, f, above: &above, errors: &mut errors };
        if above.contains_key(f.name.as_str()) {
            cx.error(Place::Function(n), None, "a second function of this name");
        }
        let sound = cx.check_ranges();
        if sound {
            cx.check_definitions();
            cx.check_values();
            cx.check_body();
            cx.check_caches();
            paths.check(&mut cx);
        }
        above.entry(&f.name).or_insert((n, sound));
    }
    if !above.contains_key(module.entry.as_str()) {
        let message = format!("the entry @{} is no function", Name(&module.entry));
        errors.push(VerifyError {
            place: Place::Module,
            function: None,
            subject: None,
            origin: None,
            message,
        });
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

/// Checks everything.
///
/// # Errors
/// As [`verify`], and what does not belong into the stage.
pub fn verify_at(module: &Module, stage: Stage) -> Result<(), Vec<VerifyError>> {
    verify(module)?;
    let mut errors = Vec::new();
    let above = HashMap::new();
    for (n, f) in module.functions.iter().enumerate() {
        let mut cx = Checker { module, n, f, above: &above, errors: &mut errors };
        if stage == Stage::Traced {
            for &v in &f.caches {
                cx.value_error(v, "there are no caches before `derive`");
            }
        }
        for (at, inst) in f.body.iter().enumerate() {
            match (&inst.op, stage) {
                (Op::Append { .. }, Stage::Traced) => {
                    cx.inst_error(at, "there is no `append` before `derive`")
                }
                (Op::Past { .. }, Stage::Derived) => cx.inst_error(at, "there is no `past` after `derive`"),
                _ => {}
            }
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

/// One function under inspection.
pub(crate) struct Checker<'m, 'e> {
    module: &'m Module,
    n: usize,
    pub(crate) f: &'m Function,
    /// The functions above this one: number, and whether all numbers in it are in range.
    above: &'e HashMap<&'m str, (usize, bool)>,
    errors: &'e mut Vec<VerifyError>,
}

impl<'m> Checker<'m, '_> {
    // --- errors -------------------------------------------------------------------------------------

    fn error(&mut self, place: Place, subject: Option<String>, message: impl Into<String>) {
        let origin = match place {
            Place::Inst(_, at) => self.f.body.get(at).and_then(|inst| inst.origins.first().cloned()),
            Place::Module | Place::Function(_) | Place::Axis(..) | Place::Value(..) | Place::Return(_) => {
                None
            }
        };
        let function = Some(self.f.name.clone());
        self.errors.push(VerifyError { place, function, subject, origin, message: message.into() });
    }

    /// The function's number.
    pub(crate) fn number(&self) -> usize {
        self.n
    }

    pub(crate) fn function_error(&mut self, message: impl Into<String>) {
        self.error(Place::Function(self.n), None, message);
    }

    fn axis_error(&mut self, axis: usize, message: impl Into<String>) {
        self.error(Place::Axis(self.n, axis), Some(self.f.axes[axis].name.clone()), message);
    }

    pub(crate) fn value_error(&mut self, v: ValueId, message: impl Into<String>) {
        let subject = self.f.values.get(v.0 as usize).map(|value| value.name.clone());
        self.error(Place::Value(self.n, v.0 as usize), subject, message);
    }

    /// An error of an instruction, told about its first result.
    pub(crate) fn inst_error(&mut self, at: usize, message: impl Into<String>) {
        let result = self.f.body.get(at).and_then(|inst| inst.results.first());
        let subject = result.and_then(|v| self.f.values.get(v.0 as usize)).map(|value| value.name.clone());
        self.error(Place::Inst(self.n, at), subject, message);
    }

    /// The function of that name above this one, and whether it can be looked into.
    pub(crate) fn callee(&self, name: &str) -> Option<(usize, &'m Function, bool)> {
        self.above.get(name).map(|&(n, sound)| (n, &self.module.functions[n], sound))
    }

    // --- numbers ------------------------------------------------------------------------------------

    /// Whether all numbers are in range; otherwise nothing else can be asked of this function.
    fn check_ranges(&mut self) -> bool {
        let f = self.f;
        let before = self.errors.len();
        let no_axis = |a: &AxisId| a.0 as usize >= f.axes.len();
        let no_value = |v: &ValueId| v.0 as usize >= f.values.len();

        for (n, axis) in f.axes.iter().enumerate() {
            if let Some(a) = axis.like.filter(|a| no_axis(a)) {
                self.axis_error(n, format!("is like axis {}, there are {}", a.0, f.axes.len()));
            }
        }
        for (n, value) in f.values.iter().enumerate() {
            if let Some(a) = value.ty.axes.iter().find(|a| no_axis(a)) {
                self.value_error(ValueId(n as u32), format!("has axis {}, there are {}", a.0, f.axes.len()));
            }
        }
        let declared = f.params.iter().chain(&f.caches).copied().chain(f.weights.iter().map(|w| w.value));
        for v in declared.filter(no_value) {
            self.function_error(format!("declares value {}, there are {}", v.0, f.values.len()));
        }
        for w in &f.weights {
            let axes = w.stored.axes();
            if let Some(a) = axes.iter().find(|a| no_axis(a)) {
                self.value_error(
                    w.value,
                    format!("is stored along axis {}, there are {}", a.0, f.axes.len()),
                );
            }
        }
        for (at, inst) in f.body.iter().enumerate() {
            if let Some(v) = inst.args.iter().chain(&inst.results).find(|v| no_value(v)) {
                self.inst_error(at, format!("names value {}, there are {}", v.0, f.values.len()));
            }
            if let Some(a) = op_axes(&inst.op).iter().find(|a| no_axis(a)) {
                self.inst_error(at, format!("names axis {}, there are {}", a.0, f.axes.len()));
            }
        }
        if let Some(v) = f.results.iter().find(|v| no_value(v)) {
            self.error(
                Place::Return(self.n),
                None,
                format!("returns value {}, there are {}", v.0, f.values.len()),
            );
        }
        self.errors.len() == before
    }

    // --- declarations -------------------------------------------------------------------------------

    fn check_definitions(&mut self) {
        let f = self.f;
        let mut names = HashMap::new();
        for (n, axis) in f.axes.iter().enumerate() {
            if names.insert(&axis.name, n).is_some() {
                self.axis_error(n, "a second axis of this name");
            }
            if axis.size == Size::Fixed(0) {
                self.axis_error(n, "has size 0");
            }
            if axis.like == Some(AxisId(n as u32)) {
                self.axis_error(n, "is like itself");
            }
        }

        let mut defined = vec![false; f.values.len()];
        let declared = (f.params.iter().copied())
            .chain(f.weights.iter().map(|w| w.value))
            .chain(f.caches.iter().copied());
        for v in declared {
            if std::mem::replace(&mut defined[v.0 as usize], true) {
                self.value_error(v, "is defined twice");
            }
        }
        for (at, inst) in f.body.iter().enumerate() {
            for a in &inst.args {
                if !defined[a.0 as usize] {
                    self.inst_error(
                        at,
                        format!("uses {}, which is not defined above", Name(&f.value(*a).name)),
                    );
                }
            }
            for r in &inst.results {
                if std::mem::replace(&mut defined[r.0 as usize], true) {
                    self.inst_error(at, format!("{} is defined twice", Name(&f.value(*r).name)));
                }
            }
        }
        for (n, _) in defined.iter().enumerate().filter(|(_, defined)| !**defined) {
            self.value_error(ValueId(n as u32), "is not defined");
        }
        if f.results.is_empty() {
            self.error(Place::Return(self.n), None, "nothing is returned");
        }
    }

    fn check_values(&mut self) {
        let f = self.f;
        let mut names = HashMap::new();
        for (n, value) in f.values.iter().enumerate() {
            let v = ValueId(n as u32);
            if names.insert(&value.name, n).is_some() {
                self.value_error(v, "a second value of this name");
            }
            let axes = &value.ty.axes;
            if let Some((_, a)) = axes.iter().enumerate().find(|(n, a)| axes[..*n].contains(a)) {
                let message =
                    format!("{} has the axis `{}` twice", show_type(&value.ty, &f.axes), f.axis(*a).name);
                self.value_error(v, message);
            }
        }
        for w in &f.weights {
            for message in check_weight(f, w) {
                self.value_error(w.value, message);
            }
        }
    }

    // --- instructions -------------------------------------------------------------------------------

    fn check_body(&mut self) {
        for (at, inst) in self.f.body.iter().enumerate() {
            if let Op::Call { callee, .. } = &inst.op {
                match self.callee(callee) {
                    None => {
                        self.inst_error(at, format!("calls @{}, which is not defined above", Name(callee)));
                    }
                    // A callee with numbers out of range has its own errors.
                    Some((_, _, false)) => {}
                    Some((_, callee, true)) => {
                        if let Err(message) = check_call(self.f, inst, callee) {
                            self.inst_error(at, message);
                        }
                    }
                }
            } else if let Err(message) = self.check_inst(inst) {
                self.inst_error(at, message);
            }
        }
    }

    fn check_inst(&self, inst: &Inst) -> Result<(), String> {
        let f = self.f;
        let [result] = inst.results[..] else {
            return Err(format!("`{}` has one result, not {}", inst.op.mnemonic(), inst.results.len()));
        };
        if let Op::Const(numbers) = &inst.op
            && numbers.iter().any(|x| x.0.is_nan())
        {
            return Err("a constant is not a number".to_owned());
        }
        let args: Vec<&Type> = inst.args.iter().map(|v| f.ty(*v)).collect();
        let written = f.ty(result);
        let right = infer(&inst.op, &args, Want::exactly(written), &f.axes)?;
        if right != *written {
            return Err(format!(
                "has the type {}, not {}",
                show_type(&right, &f.axes),
                show_type(written, &f.axes)
            ));
        }
        Ok(())
    }

    fn check_caches(&mut self) {
        let f = self.f;
        let mut appends: HashMap<ValueId, u32> = f.caches.iter().map(|v| (*v, 0)).collect();
        for (at, inst) in f.body.iter().enumerate() {
            let append = matches!(inst.op, Op::Append { .. });
            for (n, a) in inst.args.iter().enumerate() {
                let count = appends.get_mut(a);
                let name = || Name(&f.value(*a).name);
                match count {
                    None if append && n == 0 => {
                        self.inst_error(at, format!("appends to {}, which is no cache", name()));
                    }
                    None => {}
                    Some(count) if append && n == 0 => {
                        *count += 1;
                        if *count == 2 {
                            self.inst_error(at, format!("a second append to the cache {}", name()));
                        }
                    }
                    Some(_) => {
                        self.inst_error(at, format!("uses the cache {} other than by `append`", name()))
                    }
                }
            }
        }
        for v in &f.results {
            if appends.contains_key(v) {
                let message = format!("returns the cache {}", Name(&f.value(*v).name));
                self.error(Place::Return(self.n), None, message);
            }
        }
    }
}

/// All axes that an op names.
fn op_axes(op: &Op) -> Vec<AxisId> {
    let mut axes = Vec::new();
    for attr in op.attrs() {
        match attr {
            Attr::Axis(a) => axes.push(a),
            Attr::Axes(more) => axes.extend(more),
            Attr::Int(_) | Attr::Real(_) | Attr::Word(_) | Attr::Text(_) => {}
        }
    }
    axes
}
