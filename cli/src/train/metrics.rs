//! What each step was like: `metrics.jsonl`, one JSON object a line, and `loss.svg`.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::balance::Balance;
use super::plot;
use super::saved::hidden;

const FILE: &str = "metrics.jsonl";
const PLOT: &str = "loss.svg";

/// A step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Its number, the first being 1.
    pub(super) step: u64,
    /// What it made smaller: the loss, and each balance loss times its weight.
    pub(super) objective: f64,
    /// The mean cross entropy of its targets before it, in nats.
    pub(super) loss: f64,
    /// Of models with experts.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub(super) balance: Option<Balance>,
    /// The norm of the gradient before clipping.
    pub(super) grad_norm: f32,
    /// The learning rate.
    pub(super) rate: f64,
    /// Its sequences.
    pub(super) sequences: usize,
    /// Its targets.
    pub(super) tokens: u64,
    pub(super) tokens_per_s: f64,
    /// The loss of what is kept back for validation after it, where it was computed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) valid_loss: Option<f64>,
}

/// The steps of a training so far.
pub(super) struct Metrics {
    out: PathBuf,
    file: File,
    records: Vec<Record>,
}

impl Metrics {
    /// Opens the file of a folder and forgets what it says of later steps than `made`: they will be made again.
    pub(super) fn open(out: &Path, made: u64) -> anyhow::Result<Metrics> {
        let path = out.join(FILE);
        let cannot = || format!("{}: cannot write", path.display());
        let text = fs::read_to_string(&path).unwrap_or_default();
        let records: Vec<Record> = text
            .lines()
            .map_while(|line| serde_json::from_str(line).ok())
            .filter(|r: &Record| r.step <= made)
            .collect();
        let new = hidden(&path, "tmp");
        let mut file = File::create(&new).with_context(cannot)?;
        for record in &records {
            writeln!(file, "{}", serde_json::to_string(record)?).with_context(cannot)?;
        }
        fs::rename(&new, &path).with_context(cannot)?;
        Ok(Metrics { out: out.to_owned(), file, records })
    }

    /// Appends a step.
    pub(super) fn add(&mut self, record: Record) -> anyhow::Result<()> {
        let line = serde_json::to_string(&record)? + "\n";
        self.file
            .write_all(line.as_bytes())
            .with_context(|| format!("{}: cannot write {FILE}", self.out.display()))?;
        self.records.push(record);
        Ok(())
    }

    /// The last step that has this.
    pub(super) fn last<T>(&self, of: impl Fn(&Record) -> Option<T>) -> Option<T> {
        self.records.iter().rev().find_map(of)
    }

    /// Draws the steps so far.
    pub(super) fn plot(&self) -> anyhow::Result<()> {
        let path = self.out.join(PLOT);
        let (new, cannot) = (hidden(&path, "tmp"), || format!("{}: cannot write", path.display()));
        fs::write(&new, plot::svg(&self.records)).with_context(cannot)?;
        fs::rename(&new, &path).with_context(cannot)
    }
}
