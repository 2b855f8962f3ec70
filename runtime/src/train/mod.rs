//! Training: one step after another, with all that changes kept in memory.
//!
//! What is minimised is the first result of a definition; the others are watched: see [`Step`].
//!
//! Parameters are f32 whatever the model computes in, and lie in one array with what the optimiser remembers ([`State`]). A step adds up
//! the gradients of its texts, clips the sum, and lets the optimiser's programs move all parameters at once. Nothing depends on
//! time, addresses or the order of threads: the same texts in the same order give the same bits. The state lies where the device computes,
//! this machine's CPU too (`resident.rs`), until somebody asks for it.

pub mod budget;
pub mod data;
pub mod memory;
mod resident;
pub mod save;
pub mod schedule;

use std::sync::Arc;

use latentc_codegen::device::Device;
use latentc_ir::Module;
use rayon::prelude::*;

use self::resident::Memory;
use crate::engine::{Engine, RunError};
use crate::gradient::{Found, Gatherer, Rows};
use crate::load::LoadError;
use crate::optimizer::{AdamW, Clipping, Optimizer, State};
use crate::places::{COLUMNS, Places, zeros};

/// A model in training.
pub struct Trainer<D: Device> {
    engine: Engine<D>,
    gatherer: Gatherer,
    optimizer: Optimizer,
    changes: Changes<D::Buffer>,
}

/// What changes from step to step.
enum Changes<B> {
    /// In the order of stored tensors, with room for a step's gradient: what weights share, or are made of in 16 bits that the host reads.
    Here(State, Arc<Vec<f32>>),
    /// In the order of the weights, in the device's memory.
    There(Memory<B>),
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
    pub fn new(
        mut engine: Engine<D>,
        definition: &Module,
        mut state: State,
    ) -> Result<Trainer<D>, TrainError> {
        let optimizer = Optimizer::new(&mut engine)?;
        let gatherer = Gatherer::new(definition)?;
        let (want, have) = (gatherer.places().len(), state.p.len());
        if want != have {
            let what = format!("a state of {have} elements where the parameters take {want}");
            return Err(LoadError::Layout(what).into());
        }
        let changes = match Memory::new(&mut engine, &gatherer, &mut state)? {
            Some(memory) => Changes::There(memory),
            None => Changes::Here(state, Arc::new(zeros(want))),
        };
        let mut trainer = Trainer { engine, gatherer, optimizer, changes };
        trainer.show_weights()?;
        Ok(trainer)
    }

    /// Parameters, moments, and the number of steps made. Where they lie in the order of weights they are copied.
    ///
    /// # Errors
    /// If the device failed in an earlier launch.
    pub fn state(&mut self) -> Result<State, RunError> {
        match &self.changes {
            Changes::Here(state, _) => Ok(state.clone()),
            Changes::There(memory) => memory.state(&mut self.engine, &self.gatherer),
        }
    }

    /// Whether they lie in the device's memory in the order of weights, so that programs write gradients to their places.
    pub fn is_resident(&self) -> bool {
        matches!(self.changes, Changes::There(_))
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
        let (state, gradient) = match &mut self.changes {
            Changes::Here(state, gradient) => (state, gradient),
            Changes::There(memory) => {
                let programs = (&self.gatherer, &self.optimizer);
                return memory.step(&mut self.engine, programs, parts, with, stop);
            }
        };
        let sums = Arc::make_mut(gradient);
        sums.par_chunks_mut(COLUMNS).for_each(|row| row.fill(0.0));
        let mut told = Told::new(parts);
        for rows in parts {
            if stop() {
                return Ok(None);
            }
            let (share, part) = told.shares(rows);
            let found = self.gatherer.add(&mut self.engine, rows, share as f32, part as f32, sums)?;
            told.add(found, share);
        }
        let clipping = self.optimizer.clipping(&mut self.engine, gradient, with.most)?;
        let step = told.checked(clipping, state.steps + 1)?;
        // The engine reads weights where parameters lie, and they are about to change.
        self.engine.drop_weights();
        let stepped = self.optimizer.step(&mut self.engine, with, state, gradient, clipping.coef);
        self.show_weights()?;
        stepped?;
        Ok(Some(step))
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
        match &self.changes {
            Changes::Here(state, _) => self.engine.set_weights(&state.p, self.gatherer.places()),
            // A step has done so.
            Changes::There(_) => Ok(()),
        }
    }
}

/// What the texts of a step told so far.
struct Told {
    /// Targets and sequences of all texts.
    all: f64,
    sequences: usize,
    results: Vec<Vec<f64>>,
}

impl Told {
    fn new(parts: &[Rows]) -> Told {
        let all = parts.iter().map(Rows::weight).sum();
        Told { all, sequences: parts.iter().map(Rows::sequences).sum(), results: Vec::new() }
    }

    /// A text's share of the step's targets, and its share of the sequences over that.
    fn shares(&self, rows: &Rows) -> (f64, f64) {
        let share = rows.weight() / self.all;
        (share, rows.sequences() as f64 / self.sequences as f64 / share)
    }

    /// What was found of texts with that share.
    fn add(&mut self, found: Vec<Found>, share: f64) {
        self.results.resize(found.len(), Vec::new());
        for (sum, found) in self.results.iter_mut().zip(&found) {
            let counts = if found.shape.is_empty() { share } else { 1.0 };
            sum.resize(found.data.len(), 0.0);
            sum.iter_mut().zip(&found.data).for_each(|(sum, &x)| *sum += counts * f64::from(x));
        }
    }

    /// All of it, if a step can be made: the one of that number.
    fn checked(self, clipping: Clipping, step: u32) -> Result<Step, TrainError> {
        let loss = self.results.first().and_then(|r| r.first().copied()).unwrap_or(f64::NAN);
        if !(loss.is_finite() && clipping.norm.is_finite()) {
            return Err(TrainError::Diverged { step, loss, norm: clipping.norm });
        }
        Ok(Step { results: self.results, clipping })
    }
}
