//! `latentc check --bless DIR` and `--against DIR`: a stored state of a model's kernels, and what differs from it.
//!
//! The folder holds each kernel's CUDA text and a `baseline.json` with what NVIDIA's compilers made of it and what it computed in each
//! case. A change that claims to change nothing shows here.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, bail};
use latentc_codegen::cube::cuda_source;
use latentc_codegen::nvrtc::Toolkit;
use latentc_codegen::program::Kernel;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Args, Report, machine_code};
use crate::folder::NewFolder;

const FILE: &str = "baseline.json";

/// What is stored beside the sources.
#[derive(Debug, Serialize, Deserialize)]
struct Baseline {
    latentc: String,
    model: String,
    device: String,
    seed: u64,
    kernels: BTreeMap<String, Entry>,
}

/// A kernel.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    kind: String,
    /// The digest of its result in each case.
    results: Vec<String>,
    /// What its machine code takes and is made of, by way, part and architecture; empty where there are no compilers.
    code: BTreeMap<String, Value>,
    /// The CUDA text, which has a file of its own.
    #[serde(skip)]
    source: String,
}

impl Baseline {
    /// The kernels as they are now.
    fn now(args: &Args, kernels: &[Kernel], report: &Report) -> anyhow::Result<Baseline> {
        let mut code = match Toolkit::find() {
            Ok(_) => machine_code::figures(args, kernels)?,
            Err(_) => BTreeMap::new(),
        };
        let mut entries = BTreeMap::new();
        for (kernel, row) in kernels.iter().zip(&report.kernels) {
            let results = row.cases.iter().map(|c| c.digest.clone()).collect();
            let code = code.remove(&kernel.name).unwrap_or_default();
            let entry = Entry { kind: row.kind.clone(), results, code, source: cuda_source(kernel)? };
            entries.insert(kernel.name.clone(), entry);
        }
        Ok(Baseline {
            latentc: env!("CARGO_PKG_VERSION").to_owned(),
            model: report.model.clone(),
            device: report.device.clone(),
            seed: report.seed,
            kernels: entries,
        })
    }

    fn read(dir: &Path) -> anyhow::Result<Baseline> {
        let file = dir.join(FILE);
        let advice = || format!("{}: no baseline; `latentc check … --bless` writes one", file.display());
        let text = std::fs::read_to_string(&file).with_context(advice)?;
        let mut baseline: Baseline =
            serde_json::from_str(&text).with_context(|| format!("{}: not a baseline", file.display()))?;
        for (name, entry) in &mut baseline.kernels {
            let source = dir.join(source(name));
            entry.source = std::fs::read_to_string(&source)
                .with_context(|| format!("{}: cannot read the text of a kernel", source.display()))?;
        }
        Ok(baseline)
    }
}

fn source(kernel: &str) -> String {
    format!("kernels/{kernel}.cu")
}

/// Whether a folder holds what `--bless` once wrote.
fn is_ours(dir: &Path) -> bool {
    dir.join(FILE).is_file()
}

/// Writes the kernels as they are now.
pub(super) fn bless(args: &Args, dir: &Path, kernels: &[Kernel], report: &Report) -> anyhow::Result<()> {
    let folder =
        NewFolder::begin(dir, is_ours, "does not hold a baseline of latentc, so it is not replaced")?;
    let baseline = Baseline::now(args, kernels, report)?;
    for (name, entry) in &baseline.kernels {
        folder.write(&source(name), &entry.source)?;
    }
    folder.write(FILE, &(serde_json::to_string_pretty(&baseline)? + "\n"))?;
    folder.publish()
}

/// What differs from the stored state, a line for each kernel; empty if nothing does.
pub(super) fn differences(
    args: &Args,
    dir: &Path,
    kernels: &[Kernel],
    report: &Report,
) -> anyhow::Result<Vec<String>> {
    let old = Baseline::read(dir)?;
    if (&old.model, old.seed) != (&report.model, report.seed) {
        bail!(
            "{}: a baseline of {} with seed {}, compared with {} and seed {}",
            dir.display(),
            old.model,
            old.seed,
            report.model,
            report.seed
        );
    }
    let new = Baseline::now(args, kernels, report)?;
    let mut lines = Vec::new();
    for (name, now) in &new.kernels {
        let Some(was) = old.kernels.get(name) else {
            lines.push(format!("{name}: new"));
            continue;
        };
        let parts = changes(was, now, old.device == new.device);
        if !parts.is_empty() {
            lines.push(format!("{name}: {}", parts.join(", ")));
        }
    }
    // Where only some kernels are asked for, the others are not gone.
    if args.kernel.is_empty() {
        let gone = old.kernels.keys().filter(|name| !new.kernels.contains_key(*name));
        lines.extend(gone.map(|name| format!("{name}: gone")));
    }
    Ok(lines)
}

/// What changed of a kernel. Results are compared to the bit, on the same kind of device.
fn changes(was: &Entry, now: &Entry, same_device: bool) -> Vec<String> {
    let mut parts = Vec::new();
    if was.kind != now.kind {
        parts.push(format!("{} -> {}", was.kind, now.kind));
    }
    if was.source != now.source {
        let (added, removed) = (only_in(&now.source, &was.source), only_in(&was.source, &now.source));
        parts.push(format!("source +{added} -{removed} lines"));
    }
    for (which, code) in &now.code {
        let Some(before) = was.code.get(which) else { continue };
        let mut figures = String::new();
        for path in ["/resources/registers", "/resources/spill_bytes", "/shared_bytes", "/occupancy"]
            .into_iter()
            .chain([
                "/instructions/total",
                "/instructions/global",
                "/instructions/wide",
                "/instructions/tensor",
            ])
        {
            let (a, b) = (before.pointer(path), code.pointer(path));
            if let (Some(a), Some(b)) = (a, b)
                && a != b
            {
                let name = path.rsplit('/').next().unwrap_or(path);
                let _ = write!(figures, " {name} {a} -> {b}");
            }
        }
        if !figures.is_empty() {
            parts.push(format!("{which}{figures}"));
        }
    }
    if was.results.len() != now.results.len() {
        parts.push(format!("cases {} -> {}", was.results.len(), now.results.len()));
    } else if same_device {
        let differ = was.results.iter().zip(&now.results).filter(|(a, b)| a != b).count();
        if differ > 0 {
            parts.push(format!("results of {differ} of {} cases", now.results.len()));
        }
    }
    parts
}

/// How many lines of a text are not among another's, each as often as it stands there.
fn only_in(text: &str, other: &str) -> usize {
    let mut known: BTreeMap<&str, usize> = BTreeMap::new();
    other.lines().for_each(|line| *known.entry(line).or_default() += 1);
    let mut new = 0;
    for line in text.lines() {
        match known.get_mut(line) {
            Some(n) if *n > 0 => *n -= 1,
            _ => new += 1,
        }
    }
    new
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entry(source: &str, registers: u32, results: &[&str]) -> Entry {
        Entry {
            kind: "map".to_owned(),
            results: results.iter().map(|&r| r.to_owned()).collect(),
            code: BTreeMap::from([("sm_90a".to_owned(), json!({"resources": {"registers": registers}}))]),
            source: source.to_owned(),
        }
    }

    #[test]
    fn what_changed_of_a_kernel_is_told() {
        let was = entry("a\nb\nb\n", 32, &["1", "2"]);
        assert_eq!(changes(&was, &was, true), [""; 0]);
        let now = entry("a\nb\nc\nd\n", 40, &["1", "3"]);
        assert_eq!(
            changes(&was, &now, true),
            ["source +2 -1 lines", "sm_90a registers 32 -> 40", "results of 1 of 2 cases"]
        );
        assert_eq!(changes(&was, &entry("b\na\nb\n", 32, &["1", "9"]), false), ["source +0 -0 lines"]);
        assert_eq!(changes(&was, &entry("a\nb\nb\n", 32, &["1"]), true), ["cases 2 -> 1"]);
    }
}
