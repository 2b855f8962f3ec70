//! Training: one step after another, with all that changes kept in memory.
//!
//! What is minimised is the first result of a definition; the others are watched: see [`Step`].
//!
//! Parameters are f32 whatever the model computes in, and lie in one array with what the optimiser remembers ([`State`]). A step adds up
//! the gradients of its texts, clips the sum, and lets the optimiser's programs move all parameters at once. Nothing depends on
//! time, addresses or the order of threads: the same texts in the same order give the same bits.

pub mod budget;
pub mod data;
pub mod memory;
pub mod save;
pub mod schedule;

use std::sync::Arc;

use latentc_codegen::device::Device;
use latentc_ir::Module;
use rayon::prelude::*;

use crate::engine::{Engine, RunError};
use crate::gradient::{Gatherer, Rows};
use crate::load::LoadError;
use crate::optimizer::{AdamW, Clipping, Optimizer, State};
use crate::places::{COLUMNS, Places};

/// A model in training.
pub struct Trainer<D: Device> {
    engine: Engine<D>,
    gatherer: Gatherer,
    optimizer: Optimizer,
    state: State,
    /// Room for a step's gradient.
    gradient: Arc<Vec<f32>>,
}

/// What a step was like.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The results of the definition before the step, at all of the step's texts: of what is a number, the mean over targets; of what
    /// is an array of counts, the sum. The first is what the step made smaller.
    pub results: Vec<Vec<f64>>,
    /// The norm of the gradient, and what it was multiplied by.
    pub clipping: Clipping,
}

/// Why training stopped.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The device failed, or texts do not fit the model.
    #[error(transparent)]
    Run(#[from] RunError),
    /// Weights and parameters do not fit each other.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Weights left the numbers.
    #[error(
        "step {step}: the loss is {loss} and the norm of its gradient {norm}, so no step can be made; \
         go on from the last checkpoint with a lower rate or a longer warm-up"
    )]
    Diverged {
        /// Which step, the first being 1.
        step: u32,
        /// Its loss.
        loss: f64,
        /// The norm of its gradient.
        norm: f32,
    },
}

impl<D: Device> Trainer<D> {
    /// Goes on from `state` with an engine that has the train and gradient graphs of `definition`.
    ///
    /// # Errors
    /// If the state is not of this definition, or the device has no room.
    pub fn new(mut engine: Engine<D>, definition: &Module, state: State) -> Result<Trainer<D>, LoadError> {
        let optimizer = Optimizer::new(&mut engine)?;
        let gatherer = Gatherer::new(definition)?;
        let (want, have) = (gatherer.places().len(), state.p.len());
        if want != have {
            let what = format!("a state of {have} elements where the parameters take {want}");
            return Err(LoadError::Layout(what));
        }
        let gradient = Arc::new(vec![0.0; want]);
        let mut trainer = Trainer { engine, gatherer, optimizer, state, gradient };
        trainer.show_weights()?;
        Ok(trainer)
    }

    /// Parameters, moments, and the number of steps made.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Where each stored tensor lies in the arrays of the state.
    pub fn places(&self) -> &Places {
        self.gatherer.places()
    }

    /// What this runs on.
    pub fn device(&self) -> &D {
        self.engine.device()
    }

    /// Makes one step along the gradient of what the definition minimises, at all targets of `parts`, which are run one after the
    /// other. `None` if `stop` said so between two of them: then nothing has changed.
    ///
    /// # Errors
    /// See [`TrainError`]. The state is that before the step, but after an error of the device while the step itself was made.
    pub fn step(
        &mut self,
        parts: &[Rows],
        with: &AdamW,
        stop: impl Fn() -> bool,
    ) -> Result<Option<Step>, TrainError> {
        let all: f64 = parts.iter().map(Rows::weight).sum();
        let sequences: usize = parts.iter().map(Rows::sequences).sum();
        let gradient = Arc::make_mut(&mut self.gradient);
        gradient.par_chunks_mut(COLUMNS).for_each(|row| row.fill(0.0));
        let mut results: Vec<Vec<f64>> = Vec::new();
        for rows in parts {
            if stop() {
                return Ok(None);
            }
            let share = rows.weight() / all;
            let part = rows.sequences() as f64 / sequences as f64 / share;
            let engine = &mut self.engine;
            let found = self.gatherer.add(engine, rows, share as f32, part as f32, gradient)?;
            results.resize(found.len(), Vec::new());
            for (sum, found) in results.iter_mut().zip(&found) {
                let counts = if found.shape.is_empty() { share } else { 1.0 };
                sum.resize(found.data.len(), 0.0);
                sum.iter_mut().zip(&found.data).for_each(|(sum, &x)| *sum += counts * f64::from(x));
            }
        }
        let loss = results.first().and_then(|r| r.first().copied()).unwrap_or(f64::NAN);
        let clipping = self.optimizer.clipping(&mut self.engine, &self.gradient, with.most)?;
        if !(loss.is_finite() && clipping.norm.is_finite()) {
            let step = self.state.steps + 1;
            return Err(TrainError::Diverged { step, loss, norm: clipping.norm });
        }
        // The engine reads weights where parameters lie, and they are about to change.
        self.engine.drop_weights();
        let stepped =
            self.optimizer.step(&mut self.engine, with, &mut self.state, &self.gradient, clipping.coef);
        self.show_weights()?;
        stepped?;
        Ok(Some(Step { results, clipping }))
    }

    /// The mean loss of all targets of `parts`, in nats. `None` if `stop` said so between two of them.
    ///
    /// # Errors
    /// If texts do not fit the model, or the device fails.
    pub fn loss(&mut self, parts: &[Rows], stop: impl Fn() -> bool) -> Result<Option<f64>, RunError> {
        let all: f64 = parts.iter().map(Rows::weight).sum();
        let mut loss = 0.0;
        for part in parts {
            if stop() {
                return Ok(None);
            }
            loss += part.weight() / all * f64::from(part.loss(&mut self.engine)?);
        }
        Ok(Some(loss))
    }

    /// Gives the programs the parameters as they are now.
    fn show_weights(&mut self) -> Result<(), LoadError> {
        self.engine.set_weights(&self.state.p, self.gatherer.places())
    }
}
