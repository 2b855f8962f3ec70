//! `latentc params`: how many parameters a model has, and how many of them a token uses.

use std::fmt::Write;

use latentc_ir::census::{Count, census};
use latentc_passes::Graph;
use serde::Serialize;

use crate::model::Model;
use crate::table::{grouped, short, table};
use crate::{print, print_json};

/// Counts parameters by module, all of them and those active for a token.
///
/// The figures come from the graph of the model, not from a formula. A router activates as many experts as it
/// chooses; an embedding table counts as a whole.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A folder, a config.json, or a bundled name.
    model: String,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Equal modules: the same function called under names that differ in numbers only.
#[derive(Serialize)]
struct Group {
    /// The name, with `*` for the numbers that differ.
    module: String,
    function: String,
    /// How often it is there.
    instances: u64,
    total: u64,
    active: u64,
    #[serde(skip)]
    numbers: Vec<u64>,
}

#[derive(Serialize)]
struct Report {
    model: String,
    total: u64,
    active: u64,
    /// Those of the active ones that are in tables of which a token reads a row.
    looked_up: u64,
    modules: Vec<Group>,
}

pub(crate) fn params(args: &Args) -> anyhow::Result<()> {
    let model = Model::find(&args.model)?;
    let module = model.trace(Graph::Prefill, model.dtype(None))?;
    let census = census(&module).map_err(anyhow::Error::msg)?;
    let mut groups: Vec<Group> = Vec::new();
    for row in &census.rows {
        let (pattern, number) = starred(&row.scope);
        let at = groups.iter().position(|g| g.module == pattern && g.function == row.function);
        let at = at.unwrap_or_else(|| {
            let (function, numbers) = (row.function.clone(), Vec::new());
            groups.push(Group { module: pattern, function, instances: 0, total: 0, active: 0, numbers });
            groups.len() - 1
        });
        let group = &mut groups[at];
        group.instances += 1;
        group.total += row.count.total;
        group.active += row.count.active;
        group.numbers.extend(number);
    }
    let Count { total, active, looked_up } = census.count;
    let report = Report { model: model.name, total, active, looked_up, modules: groups };
    if args.json { print_json(&report) } else { print(&report.table()) }
}

/// A scope with its first number replaced by `*`, and the number.
fn starred(scope: &str) -> (String, Option<u64>) {
    let mut number = None;
    let parts = scope.split('.').map(|part| match part.parse() {
        Ok(n) if number.is_none() => {
            number = Some(n);
            "*"
        }
        _ => part,
    });
    let pattern = parts.collect::<Vec<_>>().join(".");
    (pattern, number)
}

impl Group {
    /// The module's name with the numbers that it stands for: `model.layers.{1-59}.mlp`.
    fn shown(&self) -> String {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for &n in &self.numbers {
            match runs.last_mut() {
                Some((_, last)) if *last + 1 == n => *last = n,
                _ => runs.push((n, n)),
            }
        }
        let run = |&(a, b): &(u64, u64)| if a == b { a.to_string() } else { format!("{a}-{b}") };
        let text = runs.iter().map(run).collect::<Vec<_>>().join(",");
        let text = if self.numbers.len() > 1 { format!("{{{text}}}") } else { text };
        let name = self.module.replacen('*', &text, 1);
        if name.is_empty() { "(model)".to_owned() } else { name }
    }
}

impl Report {
    fn table(&self) -> String {
        let mut rows =
            vec![["module", "function", "instances", "parameters", "active"].map(str::to_owned).into()];
        for g in &self.modules {
            let function = format!("@{}", g.function);
            rows.push(vec![
                g.shown(),
                function,
                g.instances.to_string(),
                grouped(g.total),
                grouped(g.active),
            ]);
        }
        let (total, active) = (grouped(self.total), grouped(self.active));
        rows.push(vec!["all".to_owned(), String::new(), String::new(), total, active]);
        let mut out = table(&rows, 2);
        let (name, total, active) = (&self.model, short(self.total), short(self.active));
        let _ = writeln!(out, "\n{name}: {total} parameters, {active} active per token");
        out
    }
}
