//! A report as tables for people, with what it leaves out.

use std::fmt::Write;

use latentc_models::published::Published;
use latentc_passes::Machine;
use latentc_passes::quantise::GROUP;

use super::Report;
use super::figures::{Bound, CACHES, Figures, Point};
use crate::table::{grouped, short, table};

pub(super) fn text(report: &Report) -> String {
    let mut out = String::new();
    let sections = [sizes, cache, training, prefill, decode, throughput];
    for (n, section) in sections.iter().enumerate() {
        if n > 0 {
            out.push('\n');
        }
        section(&mut out, report);
    }
    out
}

impl Report {
    /// The model and the one beside it.
    fn pair(&self) -> Option<(&Figures, &Figures)> {
        match &self.models[..] {
            [model, beside] => Some((model, beside)),
            _ => None,
        }
    }

    /// A row of a table with a cell for each model.
    fn row(&self, name: &str, cell: impl Fn(&Figures) -> String) -> Vec<String> {
        std::iter::once(name.to_owned()).chain(self.models.iter().map(cell)).collect()
    }

    /// ` (the paper: …)`, where there is one.
    fn paper(&self, claim: impl Fn(&Published) -> String) -> String {
        self.published.as_ref().map_or_else(String::new, |p| format!(" (the paper: {})", claim(p)))
    }

    /// Whether weights are held as was asked for.
    fn held(&self) -> bool {
        self.models.iter().any(|m| m.weight_bytes.is_some())
    }

    /// `weights and cache in bf16`.
    fn first_formats(&self) -> String {
        match self.served[0] {
            (weights, cache) if weights.name == cache => format!("weights and cache in {cache}"),
            (weights, cache) => format!("weights in {}, cache in {cache}", weights.name),
        }
    }

    fn node(&self) -> String {
        format!("{} x {}", self.devices, self.machine.name)
    }
}

fn percent(x: f64) -> String {
    format!("{:.1}%", 100.0 * x)
}

fn sizes(out: &mut String, r: &Report) {
    let rows = [
        r.row("parameters", |m| m.model.clone()),
        r.row("all", |m| grouped(m.parameters.total)),
        r.row("active for a token", |m| grouped(m.parameters.active)),
    ];
    let held = |m: &Figures| m.weight_bytes.map_or(String::new(), grouped);
    let held = r.row(&format!("bytes of all in {}", r.served[0].0.name), held);
    out.push_str(&table(&rows.into_iter().chain(r.held().then_some(held)).collect::<Vec<_>>(), 1));
}

fn cache(out: &mut String, r: &Report) {
    let mut rows = vec![
        r.row("cache of a token", |m| m.model.clone()),
        r.row("elements", |m| grouped(m.cache.elements)),
    ];
    for (name, _) in CACHES {
        rows.push(r.row(&format!("bytes in {name}"), |m| grouped(m.token_bytes(name))));
    }
    out.push_str(&table(&rows, 1));
    let _ = writeln!(
        out,
        "  of the decode graphs for each; fp8, int8 and int6 have a scale for every {GROUP} elements of a token, or fewer"
    );
    if let Some((model, beside)) = r.pair() {
        let saving = |cache| 1.0 - model.token_bytes(cache) as f64 / beside.token_bytes("bf16") as f64;
        let _ = writeln!(
            out,
            "  {} in int6 keeps {} less than {} in bf16{}; in bf16 as well, {} less",
            model.model,
            percent(saving("int6")),
            beside.model,
            r.paper(|p| percent(p.cache_saving)),
            percent(saving("bf16")),
        );
    }
}

fn training(out: &mut String, r: &Report) {
    let length = r.models.first().map_or(0, |m| m.training.length);
    let rows = [
        r.row("training, operations of a token", |m| m.model.clone()),
        r.row("forward", |m| short(m.training.forward as u64)),
        r.row("forward and backward", |m| short(m.training.all as u64)),
    ];
    out.push_str(&table(&rows, 1));
    let _ = writeln!(
        out,
        "  contractions in sequences of {length}, masked scores included; the backward pass counted as twice the forward"
    );
    let Some((model, beside)) = r.pair() else { return };
    let saving = 1.0 - model.training.all / beside.training.all;
    let _ = write!(out, "  {} takes {} fewer operations than {}", model.model, percent(saving), beside.model);
    out.push_str(&r.paper(|p| format!("{} fewer GPU hours", percent(p.training_saving))));
    out.push('\n');
    let Some(p) = &r.published else { return };
    let Some(machine) = Machine::named(p.machine) else { return };
    let used = |m: &Figures, hours: f64| percent(m.training.all * 1e12 / (hours * 3600.0 * machine.flops));
    let [model, beside] = [used(model, p.gpu_hours[0]), used(beside, p.gpu_hours[1])];
    let _ = writeln!(
        out,
        "  the paper's hours for 10^12 tokens mean that {model} and {beside} of an {}'s arithmetic are used",
        p.machine
    );
    out.push_str(
        "  left out: that difference, which is experts spread over devices and the traffic between them, smaller matrices,\n    \
         bubbles of the pipeline, what is computed again, and all that is no contraction\n",
    );
}

fn prefill(out: &mut String, r: &Report) {
    let title = format!("prefill on {}, whole prompts, {}", r.node(), r.first_formats());
    points(out, r, &title, |m| &m.prefill);
}

fn decode(out: &mut String, r: &Report) {
    let title = format!("decode on {}, a token of each sequence, {}", r.node(), r.first_formats());
    points(out, r, &title, |m| &m.decode);
    out.push_str(
        "  the larger of all arithmetic at the machine's dense bf16 rate and of all weights and caches, each read once, at its\n  \
         bandwidth; experts are those that independent tokens choose on average; left out: activations, traffic between\n  \
         devices, launches, and that no kernel reaches the full rates\n",
    );
    for m in &r.models {
        let longest = m.decode.iter().map(|p| p.context).max().unwrap_or(0);
        if longest > m.positions {
            let _ = writeln!(out, "  {} was made for contexts of up to {}", m.model, grouped(m.positions));
        }
    }
}

/// A row for each batch and context, with a few columns for each model.
fn points(out: &mut String, r: &Report, title: &str, of: impl Fn(&Figures) -> &Vec<Point>) {
    let _ = writeln!(out, "{title}");
    let mut names = vec![String::new(); 2];
    let mut heads = vec!["context".to_owned(), "batch".to_owned()];
    for m in &r.models {
        names.extend([String::new(), String::new(), String::new(), m.model.clone()]);
        heads.extend(["ops/byte", "waits for", "ms", "tokens/s"].map(str::to_owned));
    }
    let mut rows = vec![names, heads];
    let count = r.models.first().map_or(0, |m| of(m).len());
    for n in 0..count {
        let mut row = Vec::new();
        for m in &r.models {
            let p = &of(m)[n];
            if row.is_empty() {
                row.extend([p.context.to_string(), p.batch.to_string()]);
            }
            row.extend(point(p));
        }
        rows.push(row);
    }
    out.push_str(&table(&rows, 0));
}

fn point(p: &Point) -> [String; 4] {
    let intensity = format!("{:.0}", p.flops / p.bytes);
    if !p.fits {
        return [
            intensity,
            format!("needs {} GB", grouped((p.resident / 1e9) as u64)),
            "-".to_owned(),
            "-".to_owned(),
        ];
    }
    let bound = match p.bound {
        Bound::Compute => "arithmetic",
        Bound::Memory => "memory",
    };
    [intensity, bound.to_owned(), format!("{:.1}", p.seconds * 1e3), rate(p)]
}

fn rate(p: &Point) -> String {
    grouped(p.tokens_per_second.round() as u64)
}

fn throughput(out: &mut String, r: &Report) {
    let _ = writeln!(out, "most generation on {}: as many sequences at once as memory holds", r.node());
    let mut names = vec![String::new(); 3];
    let mut heads = ["weights", "cache", "context"].map(str::to_owned).to_vec();
    for m in &r.models {
        names.extend([String::new(), String::new(), m.model.clone()]);
        heads.extend(["sequences", "waits for", "tokens/s"].map(str::to_owned));
    }
    if r.pair().is_some() {
        names.push(String::new());
        heads.push("ratio".to_owned());
    }
    let mut rows = vec![names, heads];
    let contexts: Vec<u64> = contexts(r);
    for formats in r.served {
        for &context in &contexts {
            let mut row = vec![formats.0.name.to_owned(), formats.1.to_owned(), context.to_string()];
            for m in &r.models {
                row.extend(match m.served(formats, context) {
                    Some(p) => {
                        let [_, bound, ..] = point(p);
                        [grouped(p.batch), bound, rate(p)]
                    }
                    None => ["none", "-", "-"].map(str::to_owned),
                });
            }
            if let Some((model, beside)) = r.pair() {
                row.push(ratio(model.served(formats, context), beside.served(formats, context)));
            }
            rows.push(row);
        }
    }
    out.push_str(&table(&rows, 2));
    let Some((model, beside)) = r.pair() else { return };
    let [first, second] = r.served;
    let each = contexts.iter().map(|&context| {
        let quotient = ratio(model.served(second, context), beside.served(first, context));
        format!("{quotient} at {context}")
    });
    let _ = writeln!(
        out,
        "  {} in {} and {} beside {} in {}: {}",
        model.model,
        second.0.name,
        second.1,
        beside.model,
        if first.0.name == first.1 {
            first.1.to_owned()
        } else {
            format!("{} and {}", first.0.name, first.1)
        },
        each.collect::<Vec<_>>().join(", "),
    );
    if let Some(p) = &r.published {
        let _ = writeln!(
            out,
            "  the paper: {}, with more than {} tokens/s, on 8 x {}; {} with {},\n    \
             the other one's formats and the lengths of contexts not told",
            p.throughput_ratio,
            grouped(p.throughput as u64),
            p.machine,
            model.model,
            p.served,
        );
    }
    out.push_str(
        "  left out: as above, and memory for activations, caches that lie on several devices more than once, and prompts that\n    \
         are read between the steps\n",
    );
}

fn contexts(r: &Report) -> Vec<u64> {
    let mut contexts: Vec<u64> = r.models.iter().flat_map(|m| &m.throughput).map(|t| t.context).collect();
    contexts.sort_unstable();
    contexts.dedup();
    contexts
}

fn ratio(model: Option<&Point>, beside: Option<&Point>) -> String {
    match (model, beside) {
        (Some(a), Some(b)) => format!("{:.2}", a.tokens_per_second / b.tokens_per_second),
        _ => "-".to_owned(),
    }
}
