//! `latentc dump`: the program after any pass, as text or JSON.

use std::fmt::Write;

use clap::ValueEnum;
use clap::builder::PossibleValuesParser;
use latentc_codegen::schedule::schedule;
use latentc_passes::Context;
use serde_json::json;

use crate::held::FormArgs;
use crate::model::{DTypeArg, GoalArgs, GraphArg, Model};
use crate::passes::{self, Choice};
use crate::{print, print_json};

/// The definition itself, before any pass.
const TRACE: &str = "trace";
/// The launch list, after all passes.
const SCHEDULE: &str = "schedule";

/// Prints the program of a model after any pass, or its launch list.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A folder, a config.json, or a bundled name.
    #[arg(required_unless_present = "print_pipeline")]
    model: Option<String>,
    /// Which graph of the definition.
    #[arg(long, value_enum, default_value = "prefill")]
    graph: GraphArg,
    #[command(flatten)]
    goal: GoalArgs,
    /// The stage: `trace` is the definition, `schedule` the launch list. The last pass if not given.
    #[arg(long, value_name = "PASS", value_parser = PossibleValuesParser::new(stages()))]
    after: Option<String>,
    /// How to write it.
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    /// Weights and activations; the configuration's if not given.
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
    #[command(flatten)]
    passes: Choice,
    #[command(flatten)]
    form: FormArgs,
    /// Print the names of all stages and their laws, and nothing else.
    #[arg(long)]
    print_pipeline: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

/// The names that `--after` takes, in order.
fn stages() -> Vec<&'static str> {
    [TRACE].into_iter().chain(passes::names(true)).chain([SCHEDULE]).collect()
}

pub(crate) fn dump(args: &Args) -> anyhow::Result<()> {
    let Some(model) = args.model.as_deref().filter(|_| !args.print_pipeline) else {
        return print_pipeline(args.format);
    };
    let model = Model::find(model)?.to(&args.goal);
    let graph = args.graph.into();
    let passes = match args.after.as_deref() {
        Some(TRACE) => Vec::new(),
        Some(SCHEDULE) | None => args.passes.pipeline(),
        Some(pass) => args.passes.up_to(pass)?,
    };
    let mut cx = Context::new(args.form.of(graph));
    let trace = model.trace(graph, model.dtype(args.dtype))?;
    let mut stages = latentc_passes::run(&trace, &mut cx, &passes)?;
    let module = stages.pop().map_or(trace, |(_, module)| module);
    if args.after.as_deref() == Some(SCHEDULE) {
        let program = schedule(&module, &cx)?;
        return match args.format {
            Format::Text => print(&format!("{}\n", program.to_string().trim_end())),
            Format::Json => print_json(&program),
        };
    }
    match args.format {
        Format::Text => print(&module.to_string()),
        Format::Json => print(&(module.to_json() + "\n")),
    }
}

fn print_pipeline(format: Format) -> anyhow::Result<()> {
    let mut stages = vec![(TRACE, "the definition, as the author wrote it")];
    let passes = latentc_passes::pipeline();
    stages.extend(passes.iter().map(|p| (p.name, p.law)));
    stages.push((SCHEDULE, "the launches of kernels, in order"));
    match format {
        Format::Text => {
            let width = stages.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
            let mut text = String::new();
            for (name, law) in stages {
                let _ = writeln!(text, "{name:width$}  {law}");
            }
            print(&text)
        }
        Format::Json => {
            let stages: Vec<_> = stages.iter().map(|(name, law)| json!({"name": name, "law": law})).collect();
            print_json(&stages)
        }
    }
}
