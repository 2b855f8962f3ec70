//! `latentc check --static`: what NVIDIA's compilers make of the kernels.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Instant;

use anyhow::bail;
use latentc_codegen::cube::{
    Edits, Source, Target as Language, Tuning, cuda_sources, cuda_together_source, side_by_side, taken,
    together_name,
};
use latentc_codegen::machine_code::{ARCHS, Arch, MachineCode, machine_code};
use latentc_codegen::nvrtc::{Nvrtc, Toolkit};
use latentc_codegen::program::Kernel;
use serde::Serialize;
use serde_json::Value;

use super::Args;
use crate::edits::Texts;
use crate::table::table;
use crate::{print, print_json, progress};

/// All that was compiled, as `--json` prints it.
#[derive(Serialize)]
struct Report {
    model: String,
    kernels: Vec<Row>,
}

/// A source for an architecture. A kernel that can be computed in several ways, or is launched in parts, has several sources.
#[derive(Clone, Serialize)]
struct Row {
    kernel: String,
    /// The kernel in one of its ways, as its source calls it.
    way: String,
    kind: String,
    /// Of the parts of a kernel, which it is, counted from 1; 0 is the whole.
    part: usize,
    arch: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<MachineCode>,
    /// What a compiler said against it.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// For each kernel what its machine code takes and is made of, by way, part and architecture.
pub(super) fn figures(
    args: &Args,
    kernels: &[Kernel],
) -> anyhow::Result<BTreeMap<String, BTreeMap<String, Value>>> {
    let mut figures: BTreeMap<String, BTreeMap<String, Value>> = BTreeMap::new();
    for row in rows(args, kernels, &[], &Edits::default(), &Tuning::default())? {
        let key =
            if row.part == 0 { row.arch.to_owned() } else { format!("{}, part {}", row.arch, row.part) };
        let code = serde_json::to_value(row.code)?;
        figures.entry(row.kernel).or_default().insert(key, code);
    }
    Ok(figures)
}

pub(super) fn check(
    args: &Args,
    model: &str,
    kernels: &[Kernel],
    together: &[Vec<Kernel>],
    texts: &Texts,
    tuning: &Tuning,
) -> anyhow::Result<()> {
    let start = Instant::now();
    texts.announce();
    let kernels_of = rows(args, kernels, together, &texts.edits, tuning)?;
    let report = Report { model: model.to_owned(), kernels: kernels_of };
    if args.json {
        print_json(&report)?;
    } else {
        print(&text(&report, kernels.len(), start))?;
    }
    let refused = report.kernels.iter().filter(|r| r.error.is_some()).count();
    if refused > 0 {
        bail!("{refused} of {} sources of {model} are refused", report.kernels.len());
    }
    Ok(())
}

/// Compiles every source for every architecture that is asked for.
fn rows(
    args: &Args,
    kernels: &[Kernel],
    together: &[Vec<Kernel>],
    edits: &Edits,
    tuning: &Tuning,
) -> anyhow::Result<Vec<Row>> {
    let archs: Vec<&Arch> = ARCHS.iter().filter(|a| args.arch.iter().any(|name| name == a.name)).collect();
    let toolkit = Toolkit::find()?;
    let nvrtc = Nvrtc::load(&toolkit)?;
    let spinner = progress::spinner("compiling");
    let mut rows = Vec::new();
    let mut compile = |arch: &Arch, row: Row, source: &Source| {
        let (text, shape) = (edits.text(source.identity).unwrap_or(&source.text), &source.launch);
        let shared = shape.shared_bytes as u32;
        let (code, error) = match machine_code((&nvrtc, &toolkit), text, arch, shape.units, shared) {
            Ok(code) => (Some(code), None),
            Err(e) => (None, Some(e.to_string())),
        };
        rows.push(Row { arch: arch.name, code, error, ..row });
    };
    let row = |kernel: &str, way: &str, kind: String, part: usize| {
        let (kernel, way) = (kernel.to_owned(), way.to_owned());
        Row { kernel, way, kind, part, arch: "", code: None, error: None }
    };
    for (n, kernel) in kernels.iter().enumerate() {
        spinner.say(format!("{} ({} of {})", kernel.name, n + 1, kernels.len()));
        // A launch takes one of these, by its sizes.
        let of = archs.iter().map(|&arch| {
            let ways = taken(kernel, Language::Cuda, &arch.machine(), &[], tuning)?;
            Ok((arch, ways))
        });
        let of = of.collect::<anyhow::Result<Vec<_>>>()?;
        let mut ways: Vec<&Kernel> = Vec::new();
        for way in of.iter().flat_map(|(_, ways)| ways) {
            if ways.iter().all(|w| w.kind != way.kind) {
                ways.push(way);
            }
        }
        for way in ways {
            for (part, source) in cuda_sources(way)?.iter().enumerate() {
                for (arch, _) in of.iter().filter(|(_, ways)| ways.iter().any(|w| w.kind == way.kind)) {
                    let row = row(&kernel.name, &way.name, way.kind.to_string(), part);
                    compile(arch, row, source);
                }
            }
        }
    }
    for group in together {
        let name = together_name(group);
        spinner.say(name.clone());
        let group = side_by_side(group, tuning)?;
        if let Some(source) = cuda_together_source(&group)? {
            for arch in &archs {
                let row = row(&name, &name, format!("{} at once", group.len()), 0);
                compile(arch, row, &source);
            }
        }
    }
    Ok(rows)
}

fn text(report: &Report, kernels: usize, start: Instant) -> String {
    let heads = [
        "kernel",
        "kind",
        "arch",
        "registers",
        "spilled",
        "shared",
        "occupancy",
        "instructions",
        "global",
        "16-byte",
        "tensor",
    ];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for r in &report.kernels {
        let mut row = vec![r.name(), r.kind.clone(), r.arch.to_owned()];
        match &r.code {
            Some(code) => {
                let counts = &code.instructions;
                let percent = |x: f64| format!("{:.0}%", 100.0 * x);
                row.extend([
                    code.resources.registers.to_string(),
                    code.resources.spill_bytes.to_string(),
                    code.shared_bytes.to_string(),
                    percent(code.occupancy),
                    counts.total.to_string(),
                    counts.global.to_string(),
                    counts.wide_share().map_or_else(|| "-".to_owned(), percent),
                    counts.tensor.to_string(),
                ]);
            }
            None => row.push("REFUSED".to_owned()),
        }
        rows.push(row);
    }
    let mut text = table(&rows, 3);
    for r in &report.kernels {
        if let Some(error) = &r.error {
            let _ = writeln!(text, "\n{} for {}: {error}", r.name(), r.arch);
        }
    }
    let spilled =
        report.kernels.iter().filter(|r| r.code.as_ref().is_some_and(|c| c.resources.spill_bytes > 0));
    let _ = writeln!(
        text,
        "\n{kernels} kernels, {} of {} codes spill registers, {:.1} s",
        spilled.count(),
        report.kernels.len(),
        start.elapsed().as_secs_f64()
    );
    text
}

impl Row {
    fn name(&self) -> String {
        match self.part {
            0 => self.way.clone(),
            part => format!("{}, part {part}", self.way),
        }
    }
}
