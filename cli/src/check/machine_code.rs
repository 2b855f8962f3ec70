//! `latentc check --static`: what NVIDIA's compilers make of the kernels.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Instant;

use anyhow::bail;
use latentc_codegen::cube::{
    Edits, Source, Target as Language, Tuning, cuda_sources, cuda_together_source, side_by_side, taken,
    together_name,
};
use latentc_codegen::machine_code::{ARCHS, Arch, Launched, MachineCode, machine_codes};
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

impl Report {
    /// Codes with too few registers.
    fn spilled(&self) -> usize {
        let spills = |row: &&Row| row.code.as_ref().is_some_and(|c| c.resources.spill_bytes > 0);
        self.kernels.iter().filter(spills).count()
    }
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
    /// Products of tensor cores that a plane takes part in for a stage of its tile.
    needed: u32,
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
    let spilled = report.spilled();
    if spilled > 0 {
        bail!("{spilled} of {} codes of {model} spill registers", report.kernels.len());
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
    let spinner = progress::spinner("writing");
    let mut codes: Vec<(Row, &Arch, Source)> = Vec::new();
    for kernel in kernels {
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
            for (part, source) in cuda_sources(way)?.into_iter().enumerate() {
                for (arch, _) in of.iter().filter(|(_, ways)| ways.iter().any(|w| w.kind == way.kind)) {
                    let row = Row::new((&kernel.name, &way.name), way.kind.to_string(), part, arch, &source);
                    codes.push((row, arch, source.clone()));
                }
            }
        }
    }
    for group in together {
        let name = together_name(group);
        let group = side_by_side(group, tuning)?;
        if let Some(source) = cuda_together_source(&group)? {
            for arch in &archs {
                let row = Row::new((&name, &name), format!("{} at once", group.len()), 0, arch, &source);
                codes.push((row, arch, source.clone()));
            }
        }
    }
    spinner.say(format!("compiling {} sources", codes.len()));
    let mut rows: Vec<Row> = codes.iter().map(|(row, ..)| row.clone()).collect();
    for arch in archs {
        let numbers: Vec<_> = (0..codes.len()).filter(|n| codes[*n].1 == arch).collect();
        let launched = numbers.iter().map(|n| {
            let Source { identity, text, launch, .. } = &codes[*n].2;
            let text = edits.text(*identity).unwrap_or(text);
            Launched { text, units: launch.units, shared_bytes: launch.shared_bytes as u32 }
        });
        let made = machine_codes((&nvrtc, &toolkit), &launched.collect::<Vec<_>>(), arch);
        for (n, made) in numbers.into_iter().zip(made) {
            match made {
                Ok(code) => rows[n].code = Some(code),
                Err(e) => rows[n].error = Some(e.to_string()),
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
        "needed",
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
                    r.needed.to_string(),
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
    let (codes, seconds) = (report.kernels.len(), start.elapsed().as_secs_f64());
    let _ = writeln!(
        text,
        "\n{kernels} kernels, {} of {codes} codes spill registers, {seconds:.1} s\n\
         tensor: instructions of tensor cores, each counted once. needed: those that a plane needs for a stage of its tile; code that \
         stands there\nseveral times has several times as many",
        report.spilled()
    );
    text
}

impl Row {
    /// What is known before it is compiled, of a kernel and its way.
    fn new((kernel, way): (&str, &str), kind: String, part: usize, arch: &Arch, source: &Source) -> Row {
        let (kernel, way, needed) = (kernel.to_owned(), way.to_owned(), source.tensor);
        Row { kernel, way, kind, part, arch: arch.name, needed, code: None, error: None }
    }

    fn name(&self) -> String {
        match self.part {
            0 => self.way.clone(),
            part => format!("{}, part {part}", self.way),
        }
    }
}
