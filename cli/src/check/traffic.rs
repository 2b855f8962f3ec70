//! `latentc check --traffic`: what kernels move and multiply, counted by the emulator, beside the least that they could.

use std::fmt::Write;
use std::time::Instant;

use anyhow::{anyhow, bail};
use latentc_codegen::check::{Trial, check, trials};
use latentc_codegen::cube::{Bytes, Machine, Moves, Way, chosen, moves};
use latentc_codegen::emulate::{Count, Emulator, Moved};
use latentc_codegen::program::Kernel;
use latentc_codegen::traffic::Traffic;
use serde::Serialize;

use super::Args;
use crate::table::table;
use crate::{print, print_json, progress};

/// All that was counted, as `--json` prints it.
#[derive(Serialize)]
struct Report {
    model: String,
    kernels: Vec<Row>,
}

/// A kernel on axes of these lengths.
#[derive(Serialize)]
struct Row {
    name: String,
    /// The way that is taken at these sizes.
    kind: String,
    /// The run-time sizes.
    sizes: Vec<usize>,
    /// Launches on the device.
    launches: usize,
    /// By formula: each operand once, the result once, each operation once.
    least: Traffic,
    /// Bytes, of all launches together, those between them included.
    moved: Moved,
    /// The same by formula.
    formula: Bytes,
    /// Operations of matrix units, those on padding included.
    multiplied: u64,
}

pub(super) fn count(args: &Args, model: &str, kernels: &[Kernel]) -> anyhow::Result<()> {
    let start = Instant::now();
    let mut emulator = Emulator::open(args.seed)?.counting();
    let spinner = progress::spinner("compiling");
    let subjects = kernels.iter().map(largest).collect::<anyhow::Result<Vec<_>>>()?;
    let ways: Vec<_> = subjects.iter().map(|(trial, _)| chosen(&trial.kernel, &trial.sizes)).collect();
    // What does not compile says so when it is launched.
    let _ = emulator.prepare(&ways);
    let mut rows = Vec::new();
    for ((kernel, way), (trial, least)) in kernels.iter().zip(&ways).zip(subjects) {
        spinner.say(format!("counting {}", kernel.name));
        let outcome = check(&mut emulator, &trial.kernel, &trial.sizes, args.seed)?;
        if !outcome.passes() {
            bail!("{} is wrong, so what it moves says nothing; see it without --traffic", kernel.name);
        }
        let counts = emulator.take_counts();
        let taken = Way { kind: way.kind, parts: None };
        let formula = moves(&trial.kernel, taken, &trial.sizes, &Machine::HOPPER)?;
        rows.push(Row {
            name: kernel.name.clone(),
            kind: way.kind.to_string(),
            sizes: trial.sizes,
            launches: counts.len(),
            least,
            moved: counts.iter().map(Count::moved).sum(),
            formula: formula.iter().map(Moves::bytes).sum(),
            multiplied: counts.iter().map(|c| c.multiplied).sum(),
        });
    }
    drop(spinner);
    let report = Report { model: model.to_owned(), kernels: rows };
    if args.json { print_json(&report) } else { print(&text(&report, start)) }
}

/// The trial that moves most, and the least that it could.
fn largest(kernel: &Kernel) -> anyhow::Result<(Trial, Traffic)> {
    let mut largest: Option<(Trial, Traffic)> = None;
    for trial in trials(kernel) {
        let sizes: Vec<u64> = trial.sizes.iter().map(|&n| n as u64).collect();
        let least = Traffic::of_launch(&trial.kernel, &sizes).map_err(|e| anyhow!("{}: {e}", kernel.name))?;
        if largest.as_ref().is_none_or(|(_, known)| least.bytes() > known.bytes()) {
            largest = Some((trial, least));
        }
    }
    largest.ok_or_else(|| anyhow!("{}: there is nothing to try it on", kernel.name))
}

fn text(report: &Report, start: Instant) -> String {
    let heads = [
        "kernel",
        "kind",
        "launches",
        "least bytes",
        "once",
        "by block",
        "by formula",
        "by thread",
        "operations",
        "multiplied",
    ];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for r in &report.kernels {
        let times = |n: u64| format!("{:.2}", n as f64 / r.least.bytes());
        let multiplied = if r.multiplied == 0 {
            "-".to_owned()
        } else {
            format!("{:.2}", r.multiplied as f64 / r.least.flops)
        };
        rows.push(vec![
            r.name.clone(),
            r.kind.clone(),
            r.launches.to_string(),
            format!("{:.0}", r.least.bytes()),
            times(r.moved.distinct),
            times(r.moved.by_block),
            format!("{:.2}", r.formula.by_block / r.least.bytes()),
            times(r.moved.asked),
            format!("{:.0}", r.least.flops),
            multiplied,
        ]);
    }
    let mut text = table(&rows, 3);
    let (kernels, seconds) = (report.kernels.len(), start.elapsed().as_secs_f64());
    let _ = writeln!(
        text,
        "\n{kernels} kernels, each at the largest sizes that `check` tries, {seconds:.1} s\n\
         least: each operand and the result once, by formula. Of that are moved so many times: bytes that any thread touches; those of \
         each block,\nas counted and by formula (`latentc roofline` says that at real sizes); those of each thread. multiplied: operations of tensor cores, with those on padding, by all operations"
    );
    text
}
