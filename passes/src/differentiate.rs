//! Reverse-mode differentiation: from a program that computes a loss, one that also computes its gradient by every weight.
//!
//! What   func f(x…) -> y…      =>  func f(x…) -> y…, kept…   and   func f.grad(x…, kept…, dy…) -> dx…, dW…
//!        func loss(x…) -> l, m… =>  func loss(x…) -> l, m…, dW…    (the entry's both halves are one function)
//! Law    dl/dx = sum over the uses y of x of (dl/dy)(dy/dx); each op's dy/dx is in `differentiate/rules.rs`
//! Why    the model is written once; training it is another graph of the same definition
//! Needs  a traced graph whose entry returns first a float without axes, the loss.  Leaves  a graph for all other passes
//! Cases  differentiate.ir
//!
//! **Which gradient is where.** A gradient function returns the gradients of its own weights in their order, then those of each call in
//! the order of the body; the entry returns them behind its own results. So equal layers stay one function and one gradient, the
//! gradient of a weight is found under the scope of the call, and [`weights`] says which weight of which scope each result of
//! the entry belongs to. A gradient has the axes of its weight, in their order.
//!
//! **What is kept.** The results of calls, so that no function runs forward twice, and products, which take time to make again
//! ([`candidates`]); fewer of these where a [`Keep`] names fewer, where time is less dear than memory. All else that a gradient reads is
//! computed again in the gradient function, where the passes see both halves together.
//!
//! **Precision.** The adjoint of a value has the value's dtype; where several uses add up, the sum is made in f32 (f64 for f64) and
//! rounded once. That of a product of bf16 operands is bf16, whatever the product is kept in: it is multiplied with one operand
//! for the adjoint of the other, and more bits than these have would buy nothing but a second product on matrix units. Gradients of
//! weights are f32, or f64, unless [`Gradients::Weights`] are wanted; so are products that are added up where an index says, which no memory
//! holds. No loss is scaled, so f16 may lose small adjoints.
//!
//! **Where there is no derivative.** What `top_k` and `top_indices` select is a constant. Of equals, `max` and `min` give to the
//! first operand, `reduce_max` to all in equal parts; `abs` at 0 has the slope 1. Logarithms and roots have the slope 0 where their operand is not
//! above 0, so that a selection, a maximum or a minimum that hides what has no value hides it on the way back as well. It does not hide it from
//! what it was multiplied with, nor a quotient by 0, since 0 times an infinity is no number: there operands are to be chosen, not results.
//!
//! **What the way forward has summed up already** is not summed again: see `differentiate/held.rs`.
//!
//! **What nothing depends on.** `log(sum exp(x - m)) + m` is the same for all `m`, so that no gradient goes into the shift of a logsumexp.

mod held;
mod keep;
mod rules;
mod single;

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::{AxisId, Binary, DType, Function, Inst, Module, Op, Origin, Type, Unary, ValueId, scoped};

use crate::PassError;

pub use keep::{Candidate, Keep, candidates};
pub use single::single;

const NAME: &str = "differentiate";

/// What gradients of weights are returned in. Either way they are summed in f32, or f64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gradients {
    /// As they are summed: for whoever adds up those of several runs, and for optimisers that keep weights in f32.
    #[default]
    Sums,
    /// Rounded once to the dtype of their weight, which for weights in 16 bits are half the bytes: what PyTorch and burn have. What is
    /// added up where an index says stays as it is summed, since its sums grow in memory.
    Weights,
}

/// The module that returns what the entry returns and the gradient of each weight. Functions that the entry does not reach
/// are gone.
///
/// # Errors
/// If the entry's first result is no float without axes, or something has no derivative: a cache, or frequencies of a rotation
/// that depend on weights.
pub fn differentiate(module: &Module, form: Gradients) -> Result<Module, PassError> {
    let fail = |message| PassError { pass: NAME, function: module.entry.clone(), message };
    let all = candidates(module).map_err(fail)?;
    keeping(module, &all.iter().map(|c| (c.function.as_str(), c.value.as_str())).collect(), form)
}

/// The same, with none but these values kept between the halves of functions, beside the results of calls. The entry's halves are one
/// function.
///
/// # Errors
/// As [`differentiate`].
pub fn keeping(module: &Module, keep: &Keep, form: Gradients) -> Result<Module, PassError> {
    let mut out = Module { name: module.name.clone(), functions: Vec::new(), entry: module.entry.clone() };
    let reached = reached(module);
    let mut known: BTreeMap<&str, Split> = BTreeMap::new();
    for f in module.functions.iter().filter(|f| reached.contains(f.name.as_str())) {
        let joint = Joint::new(f, f.name == module.entry, form, &known)?;
        if f.name == module.entry {
            out.functions.push(joint.whole());
            break;
        }
        let mut name = format!("{}.grad", f.name);
        while module.function(&name).is_some() {
            name.push('\'');
        }
        let split = joint.split(name, keep);
        out.functions.push(split.forward.clone());
        // What has neither weights nor floats among its parameters has no gradient.
        if !split.gradient.results.is_empty() {
            out.functions.push(split.gradient.clone());
        }
        known.insert(&f.name, split);
    }
    Ok(out.canonical())
}

/// The weight that each gradient of [`differentiate`]'s entry belongs to, in the order of its results behind the definition's: scope,
/// function, and the weight's number there. `module` is the definition.
pub fn weights(module: &Module) -> Vec<(String, &Function, usize)> {
    fn walk<'m>(
        module: &'m Module,
        f: &'m Function,
        scope: &str,
        found: &mut Vec<(String, &'m Function, usize)>,
    ) {
        found.extend(float_weights(f).map(|n| (scope.to_owned(), f, n)));
        for inst in &f.body {
            if let Op::Call { callee, scope: below } = &inst.op
                && let Some(callee) = module.function(callee)
            {
                walk(module, callee, &scoped(scope, below), found);
            }
        }
    }
    let mut found = Vec::new();
    if let Some(entry) = module.entry() {
        walk(module, entry, "", &mut found);
    }
    found
}

/// The weights that have a gradient, by number.
fn float_weights(f: &Function) -> impl Iterator<Item = usize> {
    (0..f.weights.len()).filter(|&n| f.ty(f.weights[n].value).dtype.is_float())
}

/// The names of the functions that the entry calls, itself among them.
fn reached(module: &Module) -> BTreeSet<&str> {
    let mut reached = BTreeSet::from([module.entry.as_str()]);
    // Callers stand behind what they call.
    for f in module.functions.iter().rev() {
        if reached.contains(f.name.as_str()) {
            reached.extend(f.body.iter().filter_map(|inst| match &inst.op {
                Op::Call { callee, .. } => Some(callee.as_str()),
                _ => None,
            }));
        }
    }
    reached
}

/// A function as two, and what a caller passes from one to the other.
struct Split {
    /// The function with more results: those that its gradient reads and callers do not have otherwise.
    forward: Function,
    gradient: Function,
    /// The parameters of `forward` that `gradient` takes, by number; its first parameters.
    takes: Vec<usize>,
    /// The results of `forward` that `gradient` takes next, by number.
    kept: Vec<usize>,
    /// The results of `forward` whose adjoints it takes last, by number.
    of: Vec<usize>,
    /// The parameters of `forward` whose adjoints are the first results of `gradient`; the gradients of weights follow.
    gives: Vec<usize>,
}

/// What an adjoint is a sum of.
enum Term {
    Value(ValueId),
    Op(Op, Vec<ValueId>),
}

/// A function and its gradient in one body: the instructions of the function, then those that go back.
struct Joint<'m> {
    /// What is differentiated.
    old: &'m Function,
    /// The function so far. Its values begin with those of `old`, under the same numbers.
    f: Function,
    known: &'m BTreeMap<&'m str, Split>,
    /// What gradients of weights are returned in.
    form: Gradients,
    /// Instructions of the first half.
    forward: usize,
    /// Which values depend on a weight, or on a parameter whose adjoint a caller may want.
    active: Vec<bool>,
    /// What is known of each value's adjoint, and of which lines each use is.
    terms: Vec<Vec<(Term, Vec<Origin>)>>,
    /// The gradients of the weights below each call, by index of the body.
    below: BTreeMap<usize, Vec<ValueId>>,
    /// Axes of this function that stand for a callee's.
    axes: BTreeMap<(String, AxisId), AxisId>,
    /// The lines of the instruction at hand.
    origins: Vec<Origin>,
    /// Adjoints that come as parameters, and the results that they are of, by number.
    of: Vec<(usize, ValueId)>,
    /// Adjoints of parameters, by number.
    gives: Vec<(usize, ValueId)>,
    /// The gradients of all weights, in order.
    gradients: Vec<ValueId>,
}

impl<'m> Joint<'m> {
    fn new(
        old: &'m Function,
        entry: bool,
        form: Gradients,
        known: &'m BTreeMap<&'m str, Split>,
    ) -> Result<Joint<'m>, PassError> {
        let mut j = Joint {
            old,
            f: old.clone(),
            known,
            form,
            forward: old.body.len(),
            active: Vec::new(),
            terms: Vec::new(),
            below: BTreeMap::new(),
            axes: BTreeMap::new(),
            origins: Vec::new(),
            of: Vec::new(),
            gives: Vec::new(),
            gradients: Vec::new(),
        };
        j.keep_results_of_calls();
        j.find_active(entry);
        j.terms.resize_with(j.f.values.len(), Vec::new);
        if entry {
            j.start_from_loss()?;
        } else {
            j.start_from_results();
        }
        for n in (0..j.forward).rev() {
            let inst = j.f.body[n].clone();
            j.origins.clone_from(&inst.origins);
            match &inst.op {
                Op::Call { callee, scope } => j.call(n, &inst, callee, scope),
                _ => j.rule(&inst)?,
            }
        }
        j.origins.clear();
        for n in float_weights(old) {
            let w = old.weights[n].value;
            let gradient = match j.adjoint(w) {
                Some(gradient) => gradient,
                None => j.zeros(&format!("{}.grad", old.value(w).name), j.adjoint_type(w)),
            };
            j.gradients.push(gradient);
        }
        for n in 0..j.forward {
            j.gradients.extend(j.below.remove(&n).unwrap_or_default());
        }
        for (n, &p) in old.params.iter().enumerate() {
            if let Some(adjoint) = j.adjoint(p).filter(|_| !entry) {
                j.gives.push((n, adjoint));
            }
        }
        held::reuse(&mut j.f, j.forward);
        Ok(j)
    }

    // --- the way forward --------------------------------------------------------------------------------

    /// Every call returns what its gradient will read.
    fn keep_results_of_calls(&mut self) {
        let known = self.known;
        for n in 0..self.forward {
            let Op::Call { callee, scope } = &self.f.body[n].op else { continue };
            let Some(split) = known.get(callee.as_str()) else { continue };
            let (callee, scope) = (callee.clone(), scope.clone());
            let old = self.f.body[n].results.len();
            for &r in &split.forward.results[old..] {
                let value = split.forward.value(r);
                let ty = self.mapped(n, &callee, &split.forward, &value.ty);
                let name = scoped(&scope, &value.name);
                let id = self.add_value(&name, ty);
                self.f.body[n].results.push(id);
            }
        }
    }

    /// A value that an instruction is about to define.
    fn add_value(&mut self, name: &str, ty: Type) -> ValueId {
        let id = self.f.push(Op::Cast, &[], &[(name, ty)])[0];
        self.f.body.pop();
        id
    }

    /// A callee's type in the axes of the call at `n`. What arguments and results of the old call do not settle becomes an axis of
    /// this function, one for all calls of the callee.
    fn mapped(&mut self, n: usize, callee: &str, g: &Function, ty: &Type) -> Type {
        let inst = &self.f.body[n];
        let mine = inst.args.iter().chain(&inst.results);
        let theirs = g.params.iter().chain(&g.results);
        let settled: BTreeMap<AxisId, AxisId> = mine
            .zip(theirs)
            .flat_map(|(m, t)| g.ty(*t).axes.iter().copied().zip(self.f.ty(*m).axes.iter().copied()))
            .collect();
        let axes = ty.axes.iter().map(|a| match settled.get(a) {
            Some(&mine) => mine,
            None => {
                let axis = g.axis(*a);
                let f = &mut self.f;
                *self
                    .axes
                    .entry((callee.to_owned(), *a))
                    .or_insert_with(|| f.add_axis(&axis.name, axis.size.clone(), None))
            }
        });
        Type::new(ty.dtype, axes.collect::<Vec<_>>())
    }

    fn find_active(&mut self, entry: bool) {
        let f = &self.f;
        self.active = vec![false; f.values.len()];
        let weights = f.weights.iter().map(|w| w.value);
        let params = f.params.iter().copied().filter(|_| !entry);
        for v in weights.chain(params).filter(|&v| f.ty(v).dtype.is_float()) {
            self.active[v.0 as usize] = true;
        }
        for inst in &f.body {
            let below = match &inst.op {
                Op::Call { callee, .. } => {
                    self.known.get(callee.as_str()).is_some_and(|s| s.gradient.results.len() > s.gives.len())
                }
                _ => false,
            };
            if below || inst.args.iter().any(|a| self.active[a.0 as usize]) {
                for &r in inst.results.iter().filter(|&&r| f.ty(r).dtype.is_float()) {
                    self.active[r.0 as usize] = true;
                }
            }
        }
        for shift in shifts(f) {
            self.active[shift.0 as usize] = false;
        }
    }

    // --- where adjoints come from ---------------------------------------------------------------------------

    fn start_from_loss(&mut self) -> Result<(), PassError> {
        let Some(&loss) = self.old.results.first() else {
            return Err(PassError::new(NAME, self.old, "the entry returns nothing, so no loss".to_owned()));
        };
        let ty = self.f.ty(loss).clone();
        if !ty.dtype.is_float() || !ty.axes.is_empty() {
            let message = format!(
                "the entry returns {}, which is no loss; a loss is one float without axes",
                latentc_ir::infer::show_type(&ty, &self.f.axes)
            );
            return Err(PassError::new(NAME, self.old, message));
        }
        let one = self.number(1.0, ty.dtype);
        self.add(loss, Term::Value(one));
        Ok(())
    }

    fn start_from_results(&mut self) {
        for (n, &r) in self.old.results.iter().enumerate() {
            if self.active[r.0 as usize] {
                let (name, ty) = (format!("{}.grad", self.f.value(r).name), self.f.ty(r).clone());
                let adjoint = self.f.add_param(&name, ty);
                self.of.push((n, adjoint));
                self.add(r, Term::Value(adjoint));
            }
        }
    }

    /// A call going back: the gradient function makes adjoints of the arguments from those of the results.
    fn call(&mut self, n: usize, inst: &Inst, callee: &str, scope: &str) {
        let known = self.known;
        let Some(split) = known.get(callee) else { return };
        let g = &split.gradient;
        let mut adjoints = Vec::new();
        for &r in &split.of {
            adjoints.push(self.adjoint(inst.results[r]));
        }
        let types: Vec<Type> =
            g.results.iter().map(|&r| self.mapped(n, callee, &split.forward, g.ty(r))).collect();
        let names: Vec<String> = g.results.iter().map(|&r| scoped(scope, &g.value(r).name)).collect();
        if g.results.is_empty() {
            return;
        }
        if adjoints.iter().all(Option::is_none) {
            let zeros: Vec<_> = names.iter().zip(types).skip(split.gives.len()).collect();
            let zeros = zeros.into_iter().map(|(name, ty)| self.zeros(name, ty)).collect();
            self.below.insert(n, zeros);
            return;
        }
        let mut args: Vec<_> = split.takes.iter().map(|&p| inst.args[p]).collect();
        args.extend(split.kept.iter().map(|&r| inst.results[r]));
        for (&r, adjoint) in split.of.iter().zip(adjoints) {
            let r = inst.results[r];
            let ty = self.f.ty(r).clone();
            args.push(match adjoint {
                Some(adjoint) => adjoint,
                None => self.zeros(&format!("{}.grad", self.f.value(r).name), ty),
            });
        }
        let results: Vec<_> = names.iter().map(String::as_str).zip(types).collect();
        let op = Op::Call { callee: g.name.clone(), scope: scope.to_owned() };
        let made = self.f.push(op, &args, &results);
        self.sign();
        for (&p, &adjoint) in split.gives.iter().zip(&made) {
            self.add(inst.args[p], Term::Value(adjoint));
        }
        self.below.insert(n, made[split.gives.len()..].to_vec());
    }

    /// One more use of a value.
    fn add(&mut self, v: ValueId, term: Term) {
        if self.active[v.0 as usize] {
            self.terms[v.0 as usize].push((term, self.origins.clone()));
        }
    }

    fn adjoint_type(&self, v: ValueId) -> Type {
        let ty = self.f.ty(v);
        let narrow = |i: &Inst| i.args.iter().all(|&a| self.f.ty(a).dtype == DType::Bf16);
        let product = |i: &&Inst| i.op == Op::Contract && i.args.len() > 1 && i.result() == v;
        let dtype = match self.f.body[..self.forward].iter().find(product) {
            _ if self.is_weight(v) => match self.form {
                Gradients::Sums => wide(ty.dtype),
                Gradients::Weights => ty.dtype,
            },
            Some(product) if narrow(product) => DType::Bf16,
            _ => ty.dtype,
        };
        Type::new(dtype, ty.axes.clone())
    }

    fn is_weight(&self, v: ValueId) -> bool {
        self.old.weights.iter().any(|w| w.value == v)
    }

    /// Whether a value was read where an index says.
    fn gathered(&self, v: ValueId) -> bool {
        let makes = |i: &&Inst| i.results.contains(&v);
        self.f.body[..self.forward].iter().find(makes).is_some_and(|i| matches!(i.op, Op::Gather { .. }))
    }

    /// The sum of all that the uses of a value contribute; `None` if nothing that uses it leads to the loss.
    fn adjoint(&mut self, v: ValueId) -> Option<ValueId> {
        let mut ty = self.adjoint_type(v);
        let name = format!("{}.grad", self.f.value(v).name);
        let terms = std::mem::take(&mut self.terms[v.0 as usize]);
        // A product that is added up where an index says is no value that memory holds, so it is not rounded.
        if matches!(&terms[..], [(Term::Op(Op::Contract | Op::Binary(Binary::Mul), _), _)])
            && self.gathered(v)
        {
            ty.dtype = wide(ty.dtype);
        }
        // Nor is a gradient that nothing else is added to.
        if matches!(&terms[..], [(Term::Op(Op::ScatterAdd { .. }, _), _)]) && self.is_weight(v) {
            ty.dtype = wide(ty.dtype);
        }
        let here = self.origins.clone();
        let single = terms.len() == 1;
        let wide = Type::new(wide(ty.dtype), ty.axes.clone());
        let mut parts = Vec::new();
        for (term, origins) in terms {
            self.origins = origins;
            parts.push(match term {
                Term::Value(v) if !single => v,
                term => self.settle(&name, term, if single { &ty } else { &wide }),
            });
        }
        self.origins = here;
        let (&first, others) = parts.split_first()?;
        let mut sum = first;
        for (n, &part) in others.iter().enumerate() {
            let to = if n + 1 == others.len() { &ty } else { &wide };
            let op = Op::Binary(latentc_ir::Binary::Add);
            sum = self.push(&name, op, &[sum, part], to.clone());
        }
        Some(sum)
    }

    /// A term as a value of a type.
    fn settle(&mut self, name: &str, term: Term, ty: &Type) -> ValueId {
        let (op, args) = match term {
            Term::Value(v) if self.f.ty(v) == ty => return v,
            Term::Value(v) => (Op::Cast, vec![v]),
            Term::Op(op, args) => (op, args),
        };
        // What only moves elements does not round them, and what adds rows up keeps its sums in f32.
        let own = match op {
            Op::Rename { .. }
            | Op::Broadcast { .. }
            | Op::Split { .. }
            | Op::Merge { .. }
            | Op::Slice { .. }
            | Op::Concat { .. }
            | Op::Gather { .. } => self.f.ty(args[0]).dtype,
            Op::ScatterAdd { .. } => wide(ty.dtype),
            _ => ty.dtype,
        };
        let made = self.push(name, op, &args, Type::new(own, ty.axes.clone()));
        if own == ty.dtype { made } else { self.push(name, Op::Cast, &[made], ty.clone()) }
    }

    // --- instructions -----------------------------------------------------------------------------------------

    fn push(&mut self, name: &str, op: Op, args: &[ValueId], ty: Type) -> ValueId {
        let id = self.f.push(op, args, &[(name, ty)])[0];
        self.sign();
        id
    }

    fn sign(&mut self) {
        let last = self.f.body.last_mut().expect("one was just pushed");
        last.origins.clone_from(&self.origins);
        last.by = Some(NAME.to_owned());
    }

    fn number(&mut self, x: f64, dtype: DType) -> ValueId {
        let id = self.f.constant("", x, dtype);
        self.sign();
        id
    }

    fn zeros(&mut self, name: &str, ty: Type) -> ValueId {
        let zero = self.number(0.0, ty.dtype);
        if ty.axes.is_empty() {
            return zero;
        }
        self.push(name, Op::Broadcast { axes: ty.axes.clone() }, &[zero], ty)
    }

    // --- the two halves -----------------------------------------------------------------------------------------

    /// Both halves as one function.
    fn whole(mut self) -> Function {
        self.f.results.extend(&self.gradients);
        self.f
    }

    /// The halves as two functions.
    fn split(self, name: String, keep: &Keep) -> Split {
        let f = &self.f;
        let stays = |n: usize, inst: &Inst| {
            let named = || inst.results.iter().any(|&r| keep.has(&f.name, &f.value(r).name));
            n < self.forward && (matches!(inst.op, Op::Call { .. }) || named())
        };
        let back: Vec<ValueId> =
            self.gives.iter().map(|g| g.1).chain(self.gradients.iter().copied()).collect();
        // From the results of the gradient up to what its caller has: parameters, weights, results of calls, and what is kept beside.
        let mut needed: BTreeSet<ValueId> = back.iter().copied().collect();
        let mut again = Vec::new();
        for (n, inst) in f.body.iter().enumerate().rev() {
            if !stays(n, inst) && inst.results.iter().any(|r| needed.contains(r)) {
                needed.extend(&inst.args);
                again.push(inst);
            }
        }
        again.reverse();
        let stay = f.body[..self.forward].iter().enumerate().filter(|(n, inst)| stays(*n, inst));
        let kept: Vec<_> =
            stay.flat_map(|(_, inst)| &inst.results).copied().filter(|r| needed.contains(r)).collect();

        let params = &self.old.params;
        let mut results = self.old.results.clone();
        results.extend(kept.iter().filter(|k| !self.old.results.contains(k)));
        let place = |v: &ValueId| results.iter().position(|r| r == v).expect("what is kept is returned");
        let takes: Vec<_> = (0..params.len()).filter(|&n| needed.contains(&params[n])).collect();
        let given = takes.iter().map(|&n| params[n]).chain(kept.iter().copied());
        let given: Vec<_> = given.chain(self.of.iter().map(|o| o.1)).collect();
        Split {
            gradient: extract(f, name, &given, &again, &back),
            forward: extract(
                f,
                f.name.clone(),
                params,
                &f.body[..self.forward].iter().collect::<Vec<_>>(),
                &results,
            ),
            takes,
            kept: kept.iter().map(place).collect(),
            of: self.of.iter().map(|o| o.0).collect(),
            gives: self.gives.iter().map(|g| g.0).collect(),
        }
    }
}

/// Some instructions of a function as one of its own, over these parameters and all weights.
fn extract(f: &Function, name: String, params: &[ValueId], body: &[&Inst], results: &[ValueId]) -> Function {
    let mut new = Function::new(name);
    new.source.clone_from(&f.source);
    new.axes.clone_from(&f.axes);
    let mut map: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for &p in params {
        map.insert(p, new.add_param(&f.value(p).name, f.ty(p).clone()));
    }
    for w in &f.weights {
        let value = f.value(w.value);
        map.insert(w.value, new.add_weight(&value.name, value.ty.clone(), w.stored.clone()));
    }
    for inst in body {
        let args: Vec<_> = inst.args.iter().map(|a| map[a]).collect();
        let types: Vec<_> =
            inst.results.iter().map(|&r| (f.value(r).name.as_str(), f.ty(r).clone())).collect();
        let made = new.push(inst.op.clone(), &args, &types);
        let last = new.body.last_mut().expect("one was just pushed");
        last.origins.clone_from(&inst.origins);
        last.by.clone_from(&inst.by);
        map.extend(inst.results.iter().copied().zip(made));
    }
    new.results = results.iter().map(|r| map[r]).collect();
    new
}

/// Values of which nothing depends: an `m` that is read by `log(sum exp(x - m)) + m` and nothing else.
fn shifts(f: &Function) -> Vec<ValueId> {
    let users = f.users();
    // The one instruction that reads a value.
    let user = |v: ValueId| match users[v.0 as usize][..] {
        [one] if !f.results.contains(&v) => Some(&f.body[one]),
        _ => None,
    };
    let shift = |log: &Inst| {
        let sum = f.body.iter().find(|i| i.results.contains(&log.args[0]))?;
        let Op::Reduce { by: latentc_ir::Reduce::Sum, axis } = sum.op else { return None };
        let exp = f.body.iter().find(|i| i.results.contains(&sum.args[0]))?;
        let difference = exp.args.first()?;
        let sub = f.body.iter().find(|i| i.results.contains(difference))?;
        let &[_, m] = &sub.args[..] else { return None };
        let add = user(log.result())?;
        let shifted = exp.op == Op::Unary(Unary::Exp)
            && sub.op == Op::Binary(Binary::Sub)
            && add.op == Op::Binary(Binary::Add)
            && !f.ty(m).has(axis)
            && [log.result(), m] == add.args[..];
        let alone = [sub.result(), exp.result(), sum.result()].into_iter().all(|v| user(v).is_some());
        let twice = users[m.0 as usize].len() == 2 && !f.results.contains(&m);
        (shifted && alone && twice).then_some(m)
    };
    f.body.iter().filter(|i| i.op == Op::Unary(Unary::Log)).filter_map(shift).collect()
}

/// What a sum of numbers of a dtype is made in.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}
