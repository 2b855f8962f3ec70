//! What was measured, as a table.

use std::fmt::Write;

use latentc_codegen::cube::Way;
use latentc_runtime::bench::{Ceiling, Row, Seconds, Shape};

use super::Report;
use crate::table::table;

/// All of it.
pub(super) fn text(report: &Report) -> String {
    let measured = &report.measured;
    let mut at = Vec::new();
    if let Some(shape) = report.shape {
        let Shape { batch, tokens, context } = shape;
        at.push(format!("batch {batch}, {tokens} new, context {context}"));
    }
    at.extend(report.sizes.iter().flatten().map(|(name, n)| format!("{name}={n}")));
    at.extend(report.layers.map(|n| format!("{n} layers")));
    let (model, graph, device, dtype) = (&report.model, report.graph, &measured.device, report.dtype);
    let mut text = format!("{model}, {graph} on {device}, {dtype}: {}\n\n", at.join(", "));
    let ceiling = |what: &str, c: &Ceiling, unit: &str| {
        let spread = format!("± {:.1}%", 50.0 * (c.seconds.high - c.seconds.low) / c.seconds.median);
        vec![what.to_owned(), si(c.rate, unit), spread, format!("  {}", c.by)]
    };
    let c = &measured.ceilings;
    let ceilings = [
        ceiling("copy", &c.copy, "B/s"),
        ceiling("read", &c.read, "B/s"),
        ceiling("product", &c.product, "FLOP/s"),
    ];
    text += &left_last(&ceilings);
    text += "\n";

    let head =
        ["kernel", "way", "launches", "time", "spread", "bytes", "B/s", "FLOP/s", "of bound", "of all"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(measured.kernels.iter().filter(|r| r.time.is_some()).map(cells));
    if rows.len() > 1 {
        text += &table(&rows, 2);
        text += "\n";
    }

    let step = &measured.step;
    let mut line = |what: &str, value: String| {
        let _ = writeln!(text, "{what:18} {value}");
    };
    line("launches", step.launches.to_string());
    let (bytes, flops) = (si(step.traffic.bytes(), "B"), si(step.traffic.flops, "FLOP"));
    line("bound", format!("{} for {bytes} and {flops}", seconds(step.bound_seconds)));
    if let Some(sum) = step.launches_seconds {
        let share = 100.0 * step.bound_seconds / sum;
        line("kernels, summed", format!("{}, {share:.0}% of the bound", seconds(sum)));
    }
    if let (Some(whole), Some(share)) = (step.seconds, step.of_bound) {
        let time = format!("{} {}", seconds(whole.median), spread(whole));
        let rate = step.tokens_per_second.map_or_else(String::new, |r| format!(", {r:.1} tokens/s"));
        line("step", format!("{time}{rate}, {:.0}% of the bound", 100.0 * share));
        let parts = [("enqueued by", step.host_seconds), ("on the device", step.device_seconds)];
        for (what, part) in parts {
            if let Some(part) = part {
                line(what, format!("{} {}", seconds(part.median), spread(part)));
            }
        }
    }
    text
}

fn cells(row: &Row) -> Vec<String> {
    let time = row.time.expect("rows with a time are shown");
    let way = Way { kind: row.way, parts: row.parts }.to_string() + if row.tuned { " (tuning)" } else { "" };
    vec![
        row.name.clone(),
        way,
        row.launches.to_string(),
        seconds(time.seconds.median),
        spread(time.seconds),
        si(row.traffic.bytes(), "B"),
        si(time.bytes_per_second, "B/s"),
        si(time.flops_per_second, "FLOP/s"),
        format!("{:.0}%", 100.0 * time.of_bound),
        format!("{:.1}%", 100.0 * time.of_launches),
    ]
}

/// Half of what lies between the quarters, in percent of the median.
fn spread(s: Seconds) -> String {
    format!("± {:.1}%", 50.0 * (s.high - s.low) / s.median)
}

fn seconds(s: f64) -> String {
    match s {
        s if s < 1e-3 => format!("{:.1} µs", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

/// A number with a prefix of thousands.
fn si(x: f64, unit: &str) -> String {
    let prefixes = ["", "k", "M", "G", "T", "P"];
    let mut scaled = x;
    let mut n = 0;
    while scaled >= 1000.0 && n + 1 < prefixes.len() {
        scaled /= 1000.0;
        n += 1;
    }
    let digits = if scaled >= 100.0 || n == 0 { 0 } else { 2 - usize::from(scaled >= 10.0) };
    format!("{scaled:.digits$} {}{unit}", prefixes[n])
}

/// Rows whose last cell is text.
fn left_last(rows: &[Vec<String>]) -> String {
    let front: Vec<Vec<String>> = rows.iter().map(|r| r[..r.len() - 1].to_vec()).collect();
    let lines = table(&front, 1);
    let ends = rows.iter().filter_map(|r| r.last());
    lines.lines().zip(ends).map(|(line, end)| format!("{line}{end}\n")).collect()
}
