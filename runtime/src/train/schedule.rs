//! How much is learned from how much, step by step: arXiv 2405.04434, section 3.1.2.
//!
//! All follows from the number of a step, so a run that goes on has the schedule of one that was never cut off.

use serde::{Deserialize, Serialize};

/// Learning rate and batch size of each step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// The number of steps.
    pub steps: u64,
    /// The highest learning rate.
    pub rate: f64,
    /// The rate grows in proportion to the step up to this one.
    pub warmup: u64,
    /// From these parts of all sequences on, the rate is multiplied by [`Schedule::factor`] once more.
    pub decays: Vec<f64>,
    /// See [`Schedule::decays`].
    pub factor: f64,
    /// Sequences of the first step.
    pub first_batch: u64,
    /// Sequences of a step once the batch has grown.
    pub batch: u64,
    /// The steps in which it grows, in equal parts.
    pub ramp: u64,
}

impl Schedule {
    /// The sequences of a step, the first being 0.
    pub fn batch(&self, step: u64) -> u64 {
        if step >= self.ramp {
            return self.batch;
        }
        let (from, to) = (u128::from(self.first_batch), u128::from(self.batch));
        let grown = to.saturating_sub(from) * u128::from(step) / u128::from(self.ramp);
        (from + grown) as u64
    }

    /// The sequences of all steps before this one.
    pub fn seen(&self, step: u64) -> u64 {
        let growing = (0..step.min(self.ramp)).map(|s| self.batch(s)).sum::<u64>();
        growing + step.saturating_sub(self.ramp) * self.batch
    }

    /// The learning rate of a step.
    pub fn rate(&self, step: u64) -> f64 {
        let warm = if step < self.warmup { (step + 1) as f64 / self.warmup as f64 } else { 1.0 };
        let (seen, all) = (self.seen(step) as f64, self.seen(self.steps) as f64);
        let decays = self.decays.iter().filter(|&&part| seen >= part * all).count();
        self.rate * warm * self.factor.powi(decays as i32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_warms_up_and_decays_twice() {
        let s = Schedule {
            steps: 100,
            rate: 1.0,
            warmup: 4,
            decays: vec![0.6, 0.9],
            factor: 0.316,
            first_batch: 8,
            batch: 8,
            ramp: 0,
        };
        assert_eq!([0, 1, 2, 3, 4, 59].map(|n| s.rate(n)), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]);
        assert_eq!([60, 89].map(|n| s.rate(n)), [0.316; 2]);
        assert_eq!([90, 99].map(|n| s.rate(n)), [0.316 * 0.316; 2]);
    }

    #[test]
    fn the_batch_grows() {
        let s = Schedule {
            steps: 10,
            rate: 1.0,
            warmup: 0,
            decays: vec![0.5],
            factor: 0.5,
            first_batch: 2,
            batch: 10,
            ramp: 4,
        };
        assert_eq!([0, 1, 2, 3, 4, 9].map(|n| s.batch(n)), [2, 4, 6, 8, 10, 10]);
        assert_eq!([0, 1, 4, 5, 10].map(|n| s.seen(n)), [0, 2, 20, 30, 80]);
        // Half of all sequences, not of all steps.
        assert_eq!([5, 6].map(|n| s.rate(n)), [1.0, 0.5]);
    }
}
