//! The optimiser: clipping by the global norm, and AdamW, as programs like any other.
//!
//! Both are IR (`optimizer/*.ir`), compiled and run as models are. They work on parameters as they lie in one array
//! ([`Places`](crate::places::Places)), a large part of it at a time: a few launches, however many tensors there are.

use std::ops::Range;
use std::sync::Arc;

use latentc_codegen::device::Device;
use latentc_passes::{Graph, pipeline};
use rayon::prelude::*;

use crate::compiled::compile;
use crate::engine::{Engine, Given, Resident, RunError};
use crate::load::LoadError;
use crate::places::{COLUMNS, zeros};

/// Elements that the programs work on at once: whole rows, and few enough that what a CPU makes of them is still in its cache when it is
/// brought back.
pub const PART: usize = 1 << 16;

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

/// Parameters, and what AdamW remembers of their gradients: arrays of one length, in f32 whatever a model computes in. Programs on the
/// host read them where they are; a step copies what somebody else still holds then.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// The parameters.
    pub p: Arc<Vec<f32>>,
    /// The means of their gradients.
    pub m: Arc<Vec<f32>>,
    /// The means of their squares.
    pub v: Arc<Vec<f32>>,
    /// How many steps were made.
    pub steps: u32,
}

impl State {
    /// Before the first step.
    pub fn new(p: Vec<f32>) -> State {
        let moments = || Arc::new(zeros(p.len()));
        State { m: moments(), v: moments(), p: Arc::new(p), steps: 0 }
    }
}

/// The programs of the optimiser, in the engine that they run in.
#[derive(Clone, Copy, Debug)]
pub struct Optimizer {
    norm: Given,
    adamw: Given,
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
        let norm = program(engine, "optimizer/norm.ir", NORM)?;
        Ok(Optimizer { norm, adamw: program(engine, "optimizer/adamw.ir", ADAMW)? })
    }

    /// The global norm of gradients, an array of whole rows of [`COLUMNS`], and the factor that brings it down to `most`.
    ///
    /// # Errors
    /// If there are no whole rows, or the device fails.
    pub fn clipping<D: Device>(
        &self,
        engine: &mut Engine<D>,
        gradient: &Arc<Vec<f32>>,
        most: f64,
    ) -> Result<Clipping, RunError> {
        let norms = parts(gradient.len()).map(|part| {
            let part = rows(engine, gradient, part)?;
            Ok(self.of_part(engine, part, most)?.norm)
        });
        let norms = norms.collect::<Result<Vec<_>, RunError>>()?;
        self.of_norms(engine, norms, most)
    }

    /// The same of one part, on the device in rows.
    pub(crate) fn of_part<D: Device>(
        &self,
        engine: &mut Engine<D>,
        gradient: Resident<D::Buffer>,
        most: f64,
    ) -> Result<Clipping, RunError> {
        let args = vec![gradient, scalar(engine, most)?];
        let mut numbers = [0.0; 2];
        for (number, result) in numbers.iter_mut().zip(engine.run_given(self.norm, args)?) {
            engine.show(&result, |floats| *number = floats[0])?;
        }
        Ok(Clipping { norm: numbers[0], coef: numbers[1] })
    }

    /// That of all parts: the norm of all is the norm of the parts' norms.
    pub(crate) fn of_norms<D: Device>(
        &self,
        engine: &mut Engine<D>,
        mut norms: Vec<f32>,
        most: f64,
    ) -> Result<Clipping, RunError> {
        norms.resize(norms.len().next_multiple_of(COLUMNS), 0.0);
        let all = 0..norms.len();
        let norms = rows(engine, &Arc::new(norms), all)?;
        self.of_part(engine, norms, most)
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
        gradient: &Arc<Vec<f32>>,
        coef: f32,
    ) -> Result<(), RunError> {
        if [&state.m, &state.v, gradient].iter().any(|x| x.len() != state.p.len()) {
            let lens = [state.p.len(), state.m.len(), state.v.len(), gradient.len()];
            return Err(RunError::Argument(format!(
                "arrays of {lens:?} elements are not of the same parameters"
            )));
        }
        state.steps += 1;
        let numbers = numbers(with, state.steps, coef);
        // All parts have one memory for their results.
        let mut spare: Vec<Option<D::Buffer>> = Vec::new();
        for part in parts(state.p.len()) {
            let mut args = Vec::with_capacity(4 + numbers.len());
            for array in [&state.p, gradient, &state.m, &state.v] {
                args.push(rows(engine, array, part.clone())?);
            }
            for &x in &numbers {
                args.push(scalar(engine, x)?);
            }
            let mut place = |n: usize| spare.get_mut(n).and_then(Option::take);
            let results = engine.run_given_into(self.adamw, args, &mut place)?;
            for (array, result) in [&mut state.p, &mut state.m, &mut state.v].into_iter().zip(&results) {
                let to = &mut Arc::make_mut(array)[part.clone()];
                engine.show(result, |from| {
                    let rows = to.par_chunks_mut(COLUMNS).zip(from.par_chunks(COLUMNS));
                    rows.for_each(|(to, from)| to.copy_from_slice(from));
                })?;
            }
            spare = results.into_iter().map(|result| Some(result.buffer)).collect();
        }
        Ok(())
    }

    /// What makes a step of arrays in rows: of the parameters, their gradient, both moments, then the [`numbers`]. It returns the parameters
    /// and the moments.
    pub(crate) fn adamw(&self) -> Given {
        self.adamw
    }
}

/// Compiles a program whose text is part of this one, and adds it to an engine.
pub(crate) fn program<D: Device>(engine: &mut Engine<D>, name: &str, text: &str) -> Result<Given, LoadError> {
    let module = latentc_ir::check(name, text).unwrap_or_else(|e| panic!("{}", e.render()));
    let compiled = compile(&module, Graph::Train, &pipeline());
    engine.add_given(&compiled.unwrap_or_else(|e| panic!("{name}: {e}")))
}

/// The numbers of a step, the first being 1, in the order in which the program takes them.
pub(crate) fn numbers(with: &AdamW, step: u32, coef: f32) -> [f64; 9] {
    let whole = |beta: f64| 1.0 - beta.powi(step.min(i32::MAX as u32) as i32);
    let AdamW { rate, beta1, beta2, decay, .. } = *with;
    let keep = 1.0 - rate * decay;
    [f64::from(coef), rate, keep, beta1, beta2, 1.0 - beta1, 1.0 - beta2, whole(beta1), whole(beta2)]
}

/// What the programs work on, one part after another.
fn parts(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(PART).map(move |start| start..(start + PART).min(len))
}

/// A part of an array, in rows.
fn rows<D: Device>(
    engine: &mut Engine<D>,
    array: &Arc<Vec<f32>>,
    part: Range<usize>,
) -> Result<Resident<D::Buffer>, RunError> {
    let shape = vec![part.len() / COLUMNS, COLUMNS];
    Ok(engine.lend(array, part, shape)?)
}

/// A number on the device.
pub(crate) fn scalar<D: Device>(engine: &mut Engine<D>, x: f64) -> Result<Resident<D::Buffer>, RunError> {
    Ok(engine.lend(&Arc::new(vec![x as f32]), 0..1, Vec::new())?)
}
