//! The optimiser: clipping by the global norm, and AdamW, as programs like any other.
//!
//! Both are IR (`optimizer/*.ir`), compiled and run as models are. They work on stored tensors, whatever their shape: sizes are
//! arguments of a kernel, so one kernel serves all tensors.

use latentc_codegen::device::{Data, Device};
use latentc_passes::{Graph, pipeline};

use crate::compiled::compile;
use crate::engine::{Engine, Plain, RunError, Value};
use crate::gradient::Tensor;
use crate::load::LoadError;

const SQUARE: &str = include_str!("optimizer/square.ir");
const CLIP: &str = include_str!("optimizer/clip.ir");
const ADAMW: &str = include_str!("optimizer/adamw.ir");

/// The numbers of AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// The learning rate.
    pub rate: f64,
    /// How much of the mean of gradients is kept.
    pub beta1: f64,
    /// How much of the mean of their squares is kept.
    pub beta2: f64,
    /// The part of a parameter that decays at a learning rate of 1.
    pub decay: f64,
    /// The largest norm of all gradients together.
    pub most: f64,
}

impl Default for AdamW {
    /// The paper's (arXiv 2405.04434, section 3.1.2), but for the rate, which has a schedule there.
    fn default() -> AdamW {
        AdamW { rate: 1e-3, beta1: 0.9, beta2: 0.95, decay: 0.1, most: 1.0 }
    }
}

/// What AdamW remembers of a tensor's gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// The mean.
    pub m: Vec<f32>,
    /// The mean of squares.
    pub v: Vec<f32>,
}

impl Moments {
    /// Before the first step.
    pub fn new(elements: usize) -> Moments {
        Moments { m: vec![0.0; elements], v: vec![0.0; elements] }
    }
}

/// The programs of the optimiser, in the engine that they run in.
#[derive(Clone, Copy, Debug)]
pub struct Optimizer {
    square: Plain,
    clip: Plain,
    adamw: Plain,
}

/// Gradients as one step uses them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clipping {
    /// The 2-norm of all gradients together.
    pub norm: f32,
    /// What each is multiplied by: 1, or less where the norm is above [`AdamW::most`].
    pub coef: f32,
}

impl Optimizer {
    /// Compiles the programs and adds them to an engine.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn new<D: Device>(engine: &mut Engine<D>) -> Result<Optimizer, LoadError> {
        let mut add = |name: &str, text: &str| {
            let module = latentc_ir::check(name, text).unwrap_or_else(|e| panic!("{}", e.render()));
            let compiled = compile(&module, Graph::Train, &pipeline());
            engine.add_plain(&compiled.unwrap_or_else(|e| panic!("{name}: {e}")))
        };
        Ok(Optimizer {
            square: add("optimizer/square.ir", SQUARE)?,
            clip: add("optimizer/clip.ir", CLIP)?,
            adamw: add("optimizer/adamw.ir", ADAMW)?,
        })
    }

    /// The global norm of gradients, and the factor that brings it down to `most`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn clipping<'t, D: Device>(
        &self,
        engine: &mut Engine<D>,
        gradients: impl IntoIterator<Item = &'t Tensor>,
        most: f64,
    ) -> Result<Clipping, RunError> {
        let mut squares = Vec::new();
        for g in gradients.into_iter().filter(|g| !g.data.is_empty()) {
            let rows = g.shape.first().copied().unwrap_or(1);
            let arg = Value::f32(g.data.clone(), &[rows, g.data.len() / rows]);
            squares.extend(floats(engine.run_plain(self.square, &[arg])?).into_iter().flatten());
        }
        let shape = [squares.len()];
        let args = [Value::f32(squares, &shape), scalar(most)];
        let results: Vec<f32> = floats(engine.run_plain(self.clip, &args)?).into_iter().flatten().collect();
        Ok(Clipping { norm: results[0], coef: results[1] })
    }

    /// What a tensor and its moments become at a step, the first being 1.
    ///
    /// # Errors
    /// If the gradient is not of the tensor's size, or the device fails.
    pub fn step<D: Device>(
        &self,
        engine: &mut Engine<D>,
        with: &AdamW,
        step: u32,
        coef: f32,
        (p, g, moments): (Vec<f32>, Vec<f32>, Moments),
    ) -> Result<(Vec<f32>, Moments), RunError> {
        let shape = [p.len()];
        let mut args: Vec<_> =
            [p, g, moments.m, moments.v].into_iter().map(|x| Value::f32(x, &shape)).collect();
        let whole = |beta: f64| 1.0 - beta.powi(step.min(i32::MAX as u32) as i32);
        args.extend([f64::from(coef), with.rate, 1.0 - with.rate * with.decay].map(scalar));
        args.extend([with.beta1, with.beta2, 1.0 - with.beta1, 1.0 - with.beta2].map(scalar));
        args.extend([whole(with.beta1), whole(with.beta2)].map(scalar));
        let mut results = floats(engine.run_plain(self.adamw, &args)?).into_iter();
        let mut next = || results.next().unwrap_or_default();
        Ok((next(), Moments { m: next(), v: next() }))
    }
}

fn scalar(x: f64) -> Value {
    Value::f32(vec![x as f32], &[])
}

fn floats(values: Vec<Value>) -> Vec<Vec<f32>> {
    values
        .into_iter()
        .map(|v| match v.data {
            Data::F32(data) => data,
            Data::I32(_) => Vec::new(),
        })
        .collect()
}
