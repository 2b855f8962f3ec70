//! The optimiser: clipping by the global norm, and AdamW, as programs like any other.
//!
//! Both are IR (`optimizer/*.ir`), compiled and run as models are. They work on parameters as they lie in one array
//! ([`Places`](crate::places::Places)), a large part of it at a time: a few launches, however many tensors there are.

use latentc_codegen::device::{Data, Device};
use latentc_passes::{Graph, pipeline};

use crate::compiled::compile;
use crate::engine::{Engine, Plain, RunError, Value};
use crate::load::LoadError;
use crate::places::COLUMNS;

/// Elements that the programs work on at once: whole rows, and few enough that memory for them is found again rather than asked for.
pub const PART: usize = 1 << 22;

const NORM: &str = include_str!("optimizer/norm.ir");
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

/// Parameters, and what AdamW remembers of their gradients: arrays of one length, in f32 whatever a model computes in.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// The parameters.
    pub p: Vec<f32>,
    /// The means of their gradients.
    pub m: Vec<f32>,
    /// The means of their squares.
    pub v: Vec<f32>,
    /// How many steps were made.
    pub steps: u32,
}

impl State {
    /// Before the first step.
    pub fn new(p: Vec<f32>) -> State {
        let zeros = vec![0.0; p.len()];
        State { p, m: zeros.clone(), v: zeros, steps: 0 }
    }
}

/// The programs of the optimiser, in the engine that they run in.
#[derive(Clone, Copy, Debug)]
pub struct Optimizer {
    norm: Plain,
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
        Ok(Optimizer { norm: add("optimizer/norm.ir", NORM)?, adamw: add("optimizer/adamw.ir", ADAMW)? })
    }

    /// The global norm of gradients, an array of whole rows of [`COLUMNS`], and the factor that brings it down to `most`.
    ///
    /// # Errors
    /// If there are no whole rows, or the device fails.
    pub fn clipping<D: Device>(
        &self,
        engine: &mut Engine<D>,
        gradient: &[f32],
        most: f64,
    ) -> Result<Clipping, RunError> {
        let mut of = |g: Vec<f32>| -> Result<Clipping, RunError> {
            let shape = [g.len() / COLUMNS, COLUMNS];
            let [norm, coef] = floats(engine.run_plain(self.norm, &[Value::f32(g, &shape), scalar(most)])?);
            Ok(Clipping { norm: norm[0], coef: coef[0] })
        };
        if gradient.len() <= PART {
            return of(gradient.to_vec());
        }
        // The norm of all is the norm of the parts' norms.
        let mut norms =
            gradient.chunks(PART).map(|g| Ok(of(g.to_vec())?.norm)).collect::<Result<Vec<_>, RunError>>()?;
        norms.resize(norms.len().next_multiple_of(COLUMNS), 0.0);
        of(norms)
    }

    /// Makes one step of all parameters, in whole rows of [`COLUMNS`], along their gradients, which are multiplied by `coef`.
    ///
    /// # Errors
    /// If the arrays are not of one length or have no whole rows, or the device fails.
    pub fn step<D: Device>(
        &self,
        engine: &mut Engine<D>,
        with: &AdamW,
        state: &mut State,
        gradient: &[f32],
        coef: f32,
    ) -> Result<(), RunError> {
        if [&state.m, &state.v, gradient].iter().any(|x| x.len() != state.p.len()) {
            let lens = [state.p.len(), state.m.len(), state.v.len(), gradient.len()];
            return Err(RunError::Argument(format!(
                "arrays of {lens:?} elements are not of the same parameters"
            )));
        }
        state.steps += 1;
        let whole = |beta: f64| 1.0 - beta.powi(state.steps.min(i32::MAX as u32) as i32);
        let numbers = [f64::from(coef), with.rate, 1.0 - with.rate * with.decay]
            .into_iter()
            .chain([with.beta1, with.beta2, 1.0 - with.beta1, 1.0 - with.beta2])
            .chain([whole(with.beta1), whole(with.beta2)]);
        let numbers: Vec<Value> = numbers.map(scalar).collect();
        for start in (0..state.p.len()).step_by(PART) {
            let part = start..(start + PART).min(state.p.len());
            let of = |x: &[f32]| Value::f32(x[part.clone()].to_vec(), &[part.len() / COLUMNS, COLUMNS]);
            let mut args = vec![of(&state.p), of(gradient), of(&state.m), of(&state.v)];
            args.extend(numbers.iter().cloned());
            let [p, m, v] = floats(engine.run_plain(self.adamw, &args)?);
            state.p[part.clone()].copy_from_slice(&p);
            state.m[part.clone()].copy_from_slice(&m);
            state.v[part].copy_from_slice(&v);
        }
        Ok(())
    }
}

fn scalar(x: f64) -> Value {
    Value::f32(vec![x as f32], &[])
}

/// The results of a program that returns so many arrays of floats.
fn floats<const N: usize>(values: Vec<Value>) -> [Vec<f32>; N] {
    let mut floats = values.into_iter().map(|v| match v.data {
        Data::F32(data) => data,
        Data::I32(_) => panic!("the optimiser's programs return floats"),
    });
    [(); N].map(|()| floats.next().expect("the optimiser's programs return as many"))
}
