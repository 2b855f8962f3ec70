//! What a program means: an interpreter in f64, the oracle for passes and kernels.
//!
//! It evaluates every instruction in order. Choices that an equation leaves open, made here for everybody:
//!
//! - A softmax over nothing but -inf (a row that is masked as a whole) is zero, so that padded rows stay finite.
//! - `top_k` counts NaN as less than every number; of equals, the first wins.
//! - `gather`, `scatter_add` and `append` refuse an index out of range; nothing is clamped.
//! - `past` is a rename: every position is there, and the author's mask hides what lies ahead.
//! - `max` and `min` of a number and NaN are the number; every other function of NaN is NaN.
//! - Axes may be empty: a sum over one is 0, a maximum is -inf.
//!
//! Modules are taken to be verified.

mod contract;
mod ops;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

use thiserror::Error;

use crate::graph::{Function, Inst, Module, ValueId, Weight};
use crate::infer::show_type;
use crate::ops::{Binary, Op, Reduce};
use crate::tensor::Tensor;
use crate::types::{AxisId, DType, Size, Type};
use ops::Arg;

/// How the interpreter treats dtypes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Floats are f64 whatever they are declared to be, so that two ways to compute the same agree to 1e-12 or so.
    /// Integers still truncate and bools are still 0 or 1.
    Exact,
    /// The reference for declared dtypes: every op reads its operands exactly, computes in f64, and rounds once, to
    /// the dtype of its result. Arguments, weights and caches are rounded as they come in.
    Declared,
}

/// Where the interpreter gets the weights of a function.
pub trait WeightSource {
    /// The weight of a function that is called under `scope`, its axes in the order of the weight's type.
    ///
    /// # Errors
    /// Whatever the source has to say; the interpreter adds the function and the weight.
    fn weight(&mut self, scope: &str, function: &Function, weight: &Weight) -> Result<Tensor, String>;
}

impl<F: FnMut(&str, &Function, &Weight) -> Result<Tensor, String>> WeightSource for F {
    fn weight(&mut self, scope: &str, function: &Function, weight: &Weight) -> Result<Tensor, String> {
        self(scope, function, weight)
    }
}

/// What one run leaves for the next: the contents of each cache by its name below its scope, such as
/// `model.layers.0.c_KV`, in the order of its type's axes.
pub type Caches = BTreeMap<String, Tensor>;

/// A name below a scope. Scopes and names join with dots; an empty part is left out.
pub fn scoped(scope: &str, name: &str) -> String {
    match (scope, name) {
        ("", name) => name.to_owned(),
        (scope, "") => scope.to_owned(),
        (scope, name) => format!("{scope}.{name}"),
    }
}

/// Why a program has no result.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("@{function}: {value}{}{message}", if value.is_empty() { "" } else { ": " })]
pub struct InterpError {
    /// The function that was evaluated.
    pub function: String,
    /// The value that could not be had; empty if it is not about one.
    pub value: String,
    /// What is wrong, with both facts that disagree.
    pub message: String,
}

/// An evaluator of a module's functions.
#[derive(Clone, Debug)]
pub struct Interpreter<'m> {
    module: &'m Module,
    precision: Precision,
    sizes: BTreeMap<String, usize>,
    /// Shared by clones, which are one evaluator with other sizes bound.
    infinite: Rc<Cell<bool>>,
}

impl<'m> Interpreter<'m> {
    /// An evaluator with no size bound.
    pub fn new(module: &'m Module, precision: Precision) -> Interpreter<'m> {
        Interpreter { module, precision, sizes: BTreeMap::new(), infinite: Rc::default() }
    }

    /// Whether a product or a sum has met or made a number that is not finite in any run so far. The laws of reals, such as
    /// that a product may be taken in any order, say nothing then.
    pub fn met_infinity(&self) -> bool {
        self.infinite.get()
    }

    /// Binds a size that no argument has, such as the capacity of caches that are still empty.
    pub fn with_size(mut self, symbol: &str, size: usize) -> Interpreter<'m> {
        self.sizes.insert(symbol.to_owned(), size);
        self
    }

    /// The results of the entry function. See [`Interpreter::run_function`].
    ///
    /// # Errors
    /// The same.
    pub fn run(
        &self,
        args: &[Tensor],
        weights: &mut dyn WeightSource,
        caches: &mut Caches,
    ) -> Result<Vec<Tensor>, InterpError> {
        self.run_function(&self.module.entry, args, weights, caches)
    }

    /// The results of a function on these arguments, each with its axes in the order of the parameter's type.
    ///
    /// Symbolic sizes are those of the arguments, of the caches that are already there, and of
    /// [`Interpreter::with_size`]. A cache that is not there starts as zeros. `append` leaves its result in
    /// `caches`, also when a later instruction fails.
    ///
    /// # Errors
    /// Sizes that disagree or are bound by nothing, a missing or misshapen weight, an index out of range.
    pub fn run_function(
        &self,
        name: &str,
        args: &[Tensor],
        weights: &mut dyn WeightSource,
        caches: &mut Caches,
    ) -> Result<Vec<Tensor>, InterpError> {
        let mut run = Run {
            module: self.module,
            precision: self.precision,
            sizes: self.sizes.clone(),
            weights,
            caches,
            kept: None,
            infinite: &self.infinite,
        };
        run.function(name, "", args.to_vec())
    }

    /// Every value of the entry function by name, in order of definition: for finding where two programs part.
    ///
    /// # Errors
    /// Those of [`Interpreter::run_function`].
    pub fn trace(
        &self,
        args: &[Tensor],
        weights: &mut dyn WeightSource,
        caches: &mut Caches,
    ) -> Result<Vec<(String, Tensor)>, InterpError> {
        let mut run = Run {
            module: self.module,
            precision: self.precision,
            sizes: self.sizes.clone(),
            weights,
            caches,
            kept: Some(Vec::new()),
            infinite: &self.infinite,
        };
        run.function(&self.module.entry, "", args.to_vec())?;
        Ok(run.kept.unwrap_or_default())
    }
}

/// One evaluation under way.
struct Run<'r> {
    module: &'r Module,
    precision: Precision,
    sizes: BTreeMap<String, usize>,
    weights: &'r mut dyn WeightSource,
    caches: &'r mut Caches,
    /// The values of the function that returned last, if they are wanted.
    kept: Option<Vec<(String, Tensor)>>,
    infinite: &'r Cell<bool>,
}

/// An error about a value of a function.
fn fail(f: &Function, value: &str, message: impl Into<String>) -> InterpError {
    InterpError { function: f.name.clone(), value: value.to_owned(), message: message.into() }
}

impl Run<'_> {
    fn function(&mut self, name: &str, scope: &str, args: Vec<Tensor>) -> Result<Vec<Tensor>, InterpError> {
        let Some(f) = self.module.function(name) else {
            let message = "there is no such function".to_owned();
            return Err(InterpError { function: name.to_owned(), value: String::new(), message });
        };
        if args.len() != f.params.len() {
            return Err(fail(f, "", format!("{} arguments for {} parameters", args.len(), f.params.len())));
        }
        let mut values: Vec<Option<Tensor>> = vec![None; f.values.len()];
        for (&param, tensor) in f.params.iter().zip(args) {
            values[param.0 as usize] = Some(self.enter(f, param, tensor)?);
        }
        for w in &f.weights {
            let name = &f.value(w.value).name;
            let tensor = self.weights.weight(scope, f, w).map_err(|e| fail(f, name, e))?;
            values[w.value.0 as usize] = Some(self.enter(f, w.value, tensor)?);
        }
        // Sizes first: one cache may bind the capacity of another that is not there yet.
        for &c in &f.caches {
            if let Some(tensor) = self.caches.get(&scoped(scope, &f.value(c).name)) {
                values[c.0 as usize] = Some(self.enter(f, c, tensor.clone())?);
            }
        }
        for &c in &f.caches {
            if values[c.0 as usize].is_none() {
                values[c.0 as usize] = Some(Tensor::zeros(f.ty(c).dtype, self.shape(f, c)?));
            }
        }

        // Which cache a value holds the contents of, so that `append` knows what to leave them in.
        let mut cache_of: Vec<Option<ValueId>> = vec![None; f.values.len()];
        f.caches.iter().for_each(|&c| cache_of[c.0 as usize] = Some(c));
        for inst in &f.body {
            let results = self.instruction(f, scope, inst, &values)?;
            if let (Op::Append { .. }, [tensor]) = (&inst.op, &results[..])
                && let Some(cache) = cache_of[inst.args[0].0 as usize]
            {
                cache_of[inst.result().0 as usize] = Some(cache);
                self.caches.insert(scoped(scope, &f.value(cache).name), tensor.clone());
            }
            for (&r, tensor) in inst.results.iter().zip(results) {
                values[r.0 as usize] = Some(tensor);
            }
        }

        let results: Result<Vec<_>, _> = f.results.iter().map(|&r| held(f, &values, r).cloned()).collect();
        if let Some(kept) = &mut self.kept {
            let named = f.values.iter().zip(values).filter_map(|(v, t)| Some((v.name.clone(), t?)));
            *kept = named.collect();
        }
        results
    }

    fn instruction(
        &mut self,
        f: &Function,
        scope: &str,
        inst: &Inst,
        values: &[Option<Tensor>],
    ) -> Result<Vec<Tensor>, InterpError> {
        let tensors: Vec<&Tensor> =
            inst.args.iter().map(|&a| held(f, values, a)).collect::<Result<_, _>>()?;
        if let Op::Call { callee, scope: below } = &inst.op {
            let args = tensors.into_iter().cloned().collect();
            let results = self.function(callee, &scoped(scope, below), args)?;
            if results.len() != inst.results.len() {
                let message =
                    format!("@{callee} has {} results, {} are taken", results.len(), inst.results.len());
                return Err(fail(f, "", message));
            }
            return results.into_iter().zip(&inst.results).map(|(t, &r)| self.enter(f, r, t)).collect();
        }
        let result = inst.result();
        let ty = f.ty(result);
        let shape = self.shape(f, result)?;
        let args: Vec<_> =
            inst.args.iter().zip(tensors).map(|(&a, tensor)| Arg { ty: f.ty(a), tensor }).collect();
        let data =
            ops::eval(f, &inst.op, &args, ty, &shape).map_err(|e| fail(f, &f.value(result).name, e))?;
        let wild = |data: &[f64]| data.iter().any(|x| !x.is_finite());
        let sums =
            matches!(inst.op, Op::Contract | Op::Binary(Binary::Mul) | Op::Reduce { by: Reduce::Sum, .. });
        if sums && (wild(&data) || args.iter().any(|a| wild(&a.tensor.data))) {
            self.infinite.set(true);
        }
        Ok(vec![self.rounded(Tensor { dtype: ty.dtype, shape, data }, ty)])
    }

    /// The tensor as the value of that type, once its sizes are known to fit.
    fn enter(&mut self, f: &Function, value: ValueId, tensor: Tensor) -> Result<Tensor, InterpError> {
        let ty = f.ty(value);
        let name = &f.value(value).name;
        if tensor.shape.len() != ty.axes.len() || tensor.shape.iter().product::<usize>() != tensor.data.len()
        {
            let message = format!("a tensor of shape {:?} for {}", tensor.shape, show_type(ty, &f.axes));
            return Err(fail(f, name, message));
        }
        for (&axis, &found) in ty.axes.iter().zip(&tensor.shape) {
            self.bind(f, axis, found).map_err(|e| fail(f, name, e))?;
        }
        Ok(self.rounded(tensor, ty))
    }

    fn bind(&mut self, f: &Function, axis: AxisId, found: usize) -> Result<(), String> {
        let axis = f.axis(axis);
        let (size, symbol) = match &axis.size {
            Size::Fixed(n) => (*n, String::new()),
            Size::Sym(s) => (*self.sizes.entry(s.clone()).or_insert(found) as u64, format!("{s} = ")),
        };
        if size == found as u64 {
            return Ok(());
        }
        Err(format!("axis `{}` has size {symbol}{size}, the tensor {found}", axis.name))
    }

    fn shape(&self, f: &Function, value: ValueId) -> Result<Vec<usize>, InterpError> {
        let extent = |axis: &AxisId| match &f.axis(*axis).size {
            Size::Fixed(n) => Ok(*n as usize),
            Size::Sym(s) => self.sizes.get(s).copied().ok_or_else(|| {
                let message =
                    format!("nothing binds the size `{s}` of axis `{}`; see with_size", f.axis(*axis).name);
                fail(f, &f.value(value).name, message)
            }),
        };
        f.ty(value).axes.iter().map(extent).collect()
    }

    fn rounded(&self, mut tensor: Tensor, ty: &Type) -> Tensor {
        tensor.dtype = ty.dtype;
        let to = match (self.precision, ty.dtype) {
            (Precision::Exact, DType::F64 | DType::F32 | DType::Bf16 | DType::F16) => DType::F64,
            (Precision::Exact | Precision::Declared, d) => d,
        };
        if to != DType::F64 {
            tensor.data.iter_mut().for_each(|x| *x = to.round(*x));
        }
        tensor
    }
}

fn held<'v>(f: &Function, values: &'v [Option<Tensor>], id: ValueId) -> Result<&'v Tensor, InterpError> {
    values[id.0 as usize].as_ref().ok_or_else(|| fail(f, &f.value(id).name, "used before it is defined"))
}
