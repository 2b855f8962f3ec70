//! What a training is told. All of it is kept with its checkpoints.

use std::path::PathBuf;

use anyhow::{Context, bail};
use latentc_runtime::train::budget::Budget;
use latentc_runtime::train::schedule::Schedule;
use serde::{Deserialize, Serialize};

use crate::model::{DTypeArg, Model};
use crate::table::parse_budget;
use crate::target::Target;

/// At most so many sequences are split off for validation.
const VALIDATION: usize = 64;

/// The numbers of a training; the defaults are those of the paper (arXiv 2405.04434, section 3.1.2) where it names some that
/// do not follow from its size.
#[derive(clap::Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// What to learn from.
    #[arg(long, value_name = "FILES", num_args = 1.., required_unless_present = "resume")]
    pub(crate) data: Vec<PathBuf>,
    /// How many steps to make in all.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        required_unless_present = "resume",
        hide_default_value = true
    )]
    pub(crate) steps: u64,
    /// The most tokens of a sequence; 0 stands for 512, or what the model can read if that is less.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub(crate) context: usize,
    /// Sequences of a step.
    #[arg(long, value_name = "SEQUENCES", default_value_t = 8)]
    pub(crate) batch: u64,
    /// Sequences of the first step, if they are to grow to --batch.
    #[arg(long, value_name = "SEQUENCES", requires = "batch_ramp")]
    pub(crate) first_batch: Option<u64>,
    /// The steps in which they grow.
    #[arg(long, value_name = "STEPS", requires = "first_batch", default_value_t = 0)]
    pub(crate) batch_ramp: u64,
    /// Sequences that are run at once, the gradients of which add up to a step's; the batch if not given.
    #[arg(long, value_name = "SEQUENCES")]
    pub(crate) micro_batch: Option<usize>,
    /// Keep as much of the way forward for the way back as lets a step fit into this memory, such as 20GiB, and compute the rest again;
    /// or `least`. All that is worth it is kept if not given. `latentc report --graph train` tells what a step takes.
    #[arg(long, value_name = "SIZE", value_parser = parse_budget)]
    #[serde(default)]
    pub(crate) memory_budget: Option<Budget>,
    /// The highest learning rate. The paper's are 2.4e-4 for 236B parameters and 4.2e-4 for 16B; small models bear more.
    #[arg(long, default_value_t = 1e-3)]
    pub(crate) rate: f64,
    /// The steps in which the learning rate grows to its highest; 2000, or a tenth of all if that is less.
    #[arg(long, value_name = "STEPS")]
    pub(crate) warmup: Option<u64>,
    /// The parts of training after which the rate is multiplied by --decay-factor.
    #[arg(long, value_name = "PARTS", value_delimiter = ',', default_value = "0.6,0.9")]
    pub(crate) decay_at: Vec<f64>,
    /// What the rate is multiplied by then.
    #[arg(long, value_name = "FACTOR", default_value_t = 0.316)]
    pub(crate) decay_factor: f64,
    /// The part of a parameter that decays in a step at a learning rate of 1.
    #[arg(long, value_name = "PART", default_value_t = 0.1)]
    pub(crate) weight_decay: f64,
    /// The largest norm of a gradient; a longer one is made shorter.
    #[arg(long, value_name = "NORM", default_value_t = 1.0)]
    pub(crate) clip: f64,
    /// Weight of the expert-level balance loss (equation 23 of the paper), 0 for none; `aux_loss_alpha` of config.json if not given.
    #[arg(long, value_name = "WEIGHT")]
    #[serde(default)]
    pub(crate) expert_balance: Option<f64>,
    /// Weight of the device-level balance loss (equation 26); `device_loss_alpha` if not given.
    #[arg(long, value_name = "WEIGHT")]
    #[serde(default)]
    pub(crate) device_balance: Option<f64>,
    /// Weight of the communication balance loss (equation 29); `communication_loss_alpha` if not given.
    #[arg(long, value_name = "WEIGHT")]
    #[serde(default)]
    pub(crate) communication_balance: Option<f64>,
    /// Drop tokens where a device would have more than FACTOR times its share of the work, those of the lowest affinity first
    /// (section 2.2.4), never in validation; 1 if no FACTOR is given, 0 is never, and `device_capacity_factor` if the flag is not given.
    #[arg(long, value_name = "FACTOR", num_args = 0..=1, require_equals = true, default_missing_value = "1")]
    #[serde(default)]
    pub(crate) drop_tokens: Option<f64>,
    /// The part of sequences of which no token is dropped.
    #[arg(long, value_name = "PART", default_value_t = 0.1)]
    #[serde(default)]
    pub(crate) exempt: f64,
    /// The devices that the experts lie on, for balance and dropping; `n_devices` if not given, or else the groups of experts.
    #[arg(long, value_name = "N")]
    #[serde(default)]
    pub(crate) devices: Option<usize>,
    /// The same seed gives the same order of sequences.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// The part of all sequences that is kept back for validation, 64 sequences at most.
    #[arg(long, value_name = "PART", default_value_t = 0.05)]
    pub(crate) valid: f64,
    /// Validate after every so many steps, and at the end; 0 is only then.
    #[arg(long, value_name = "STEPS", default_value_t = 100)]
    pub(crate) valid_every: u64,
    /// Write a checkpoint after every so many steps, and at the end; 0 is only then.
    #[arg(long, value_name = "STEPS", default_value_t = 100)]
    pub(crate) save_every: u64,
    /// What to run on.
    #[arg(long, value_enum, default_value = "host")]
    pub(crate) target: Target,
    /// Weights and activations; the configuration's if not given. Parameters are updated in f32 in any case.
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<DTypeArg>,
}

impl Settings {
    /// The settings with nothing left open, if they make sense for a model.
    pub(crate) fn checked(&self, model: &Model) -> anyhow::Result<Settings> {
        let most = model.config.common().max_position_embeddings;
        let mut settings = self.clone();
        if settings.context == 0 {
            settings.context = most.min(512);
        }
        if settings.context > most {
            bail!(
                "--context is {}, but the model reads {most} positions (max_position_embeddings)",
                settings.context
            );
        }
        let positive = [
            ("--steps", self.steps),
            ("--batch", self.batch),
            ("--first-batch", self.first_batch.unwrap_or(1)),
            ("--micro-batch", self.micro_batch.unwrap_or(1) as u64),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, n)| *n == 0) {
            bail!("{name} is 0, but must be at least 1");
        }
        if u32::try_from(self.steps).is_err() || self.batch > 1 << 24 {
            bail!("--steps {} and --batch {}: more than can be counted", self.steps, self.batch);
        }
        if self.first_batch.is_some_and(|first| first > self.batch) {
            bail!("--first-batch is larger than --batch; a batch grows");
        }
        let parts = self.decay_at.iter().map(|&x| ("--decay-at", x, 1.0));
        let numbers = [
            ("--rate", self.rate, f64::MAX),
            ("--decay-factor", self.decay_factor, f64::MAX),
            ("--weight-decay", self.weight_decay, f64::MAX),
            ("--clip", self.clip, f64::MAX),
            ("--valid", self.valid, 0.5),
            ("--exempt", self.exempt, 1.0),
        ];
        for (name, x, most) in numbers.into_iter().chain(parts) {
            if !(x.is_finite() && x >= 0.0 && x <= most) {
                let most = if most < f64::MAX { format!(" and at most {most}") } else { String::new() };
                bail!("{name} is {x}, but must be a finite number, at least 0{most}");
            }
        }
        for file in &mut settings.data {
            // A run may go on from another folder.
            *file = std::path::absolute(&*file)
                .with_context(|| format!("{}: no path of a file", file.display()))?;
        }
        Ok(settings)
    }

    /// What follows for each step.
    pub(crate) fn schedule(&self) -> Schedule {
        Schedule {
            steps: self.steps,
            rate: self.rate,
            warmup: self.warmup.unwrap_or_else(|| (self.steps / 10).min(2000)),
            decays: self.decay_at.clone(),
            factor: self.decay_factor,
            first_batch: self.first_batch.unwrap_or(self.batch),
            batch: self.batch,
            ramp: self.batch_ramp,
        }
    }

    /// The sequences that run at once.
    pub(crate) fn micro(&self) -> usize {
        self.micro_batch.unwrap_or(usize::try_from(self.batch).unwrap_or(usize::MAX)).max(1)
    }

    /// How many of so many sequences are for validation. One is always left to learn from.
    pub(crate) fn validation(&self, sequences: usize) -> usize {
        ((sequences as f64 * self.valid) as usize).min(VALIDATION).min(sequences.saturating_sub(1))
    }
}
