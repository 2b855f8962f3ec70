//! `latentc explain`: what the passes weighed, and why they chose what they chose.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use clap::ValueEnum;
use latentc_codegen::schedule::LAWS;
use latentc_ir::{Module, Origin, Poly, Symbols};
use latentc_passes::{Candidate, Crossing, Graph, Remark, pipeline};
use latentc_runtime::compiled::{Compiled, compile_variants};

use crate::held::FormArgs;
use crate::model::{DTypeArg, GoalArgs, GraphArg, Model};
use crate::passes::Choice;
use crate::{print, print_json};

/// Lengths of sequences at which costs are shown.
const LENGTHS: [u64; 3] = [1024, 16_384, 131_072];

/// Says what the passes and the schedule did with a model and why: places, candidates, their costs.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A folder, a config.json, or a bundled name.
    model: String,
    /// Which graph of the definition.
    #[arg(long, value_enum, default_value = "prefill")]
    graph: GraphArg,
    #[command(flatten)]
    goal: GoalArgs,
    /// How to write it.
    #[arg(long, value_enum, default_value = "text")]
    remarks: Format,
    /// Weights and activations; the configuration's if not given.
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
    #[command(flatten)]
    passes: Choice,
    #[command(flatten)]
    form: FormArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

pub(crate) fn explain(args: &Args) -> anyhow::Result<()> {
    let model = Model::find(&args.model)?.to(&args.goal);
    let graph = args.graph.into();
    let trace = model.trace(graph, model.dtype(args.dtype))?;
    let mut variants = compile_variants(&trace, args.form.of(graph), &args.passes.pipeline())?;
    let guards: Vec<_> = variants.iter().filter_map(|v| Some(v.guard.as_ref()?.to_string())).collect();
    // What is said of the others differs in what is taken where, which the crossings say.
    let Some(Compiled { stages, remarks, .. }) = variants.pop() else { return Ok(()) };
    if args.remarks == Format::Json {
        return print_json(&remarks);
    }
    let sizes = stages.last().map_or_else(Vec::new, |(_, module)| sizes(module, graph));
    let mut text = text(&format!("{}, {}", model.name, graph.name()), &remarks, &sizes);
    if !guards.is_empty() {
        let _ = writeln!(
            text,
            "\ncompiled once for each of {}; a run takes the one for its size",
            guards.join(", ")
        );
    }
    print(&text)
}

/// What the run-time sizes of a module may be: one sequence, and the history as long as each of [`LENGTHS`]. New tokens are
/// as many as that, but one in decode.
fn sizes(module: &Module, graph: Graph) -> Vec<BTreeMap<String, u64>> {
    let symbols = Symbols::of(module);
    let new = |length| if graph == Graph::Decode { 1 } else { length };
    LENGTHS.iter().map(|&length| symbols.bind(1, new(length), length)).collect()
}

/// All remarks, by pass, in the order of the pipeline, those of the schedule last.
fn text(title: &str, remarks: &[Remark], sizes: &[BTreeMap<String, u64>]) -> String {
    let count = remarks.len();
    let mut text = format!("{title}: {count} remark{}\n", if count == 1 { "" } else { "s" });
    let laws = pipeline().into_iter().map(|pass| (pass.name, pass.law)).chain(LAWS);
    for (name, law) in laws {
        let of_pass: Vec<_> = remarks.iter().filter(|r| r.pass == name).collect();
        if !of_pass.is_empty() {
            let _ = writeln!(text, "\n{name}: {law}");
        }
        for r in of_pass {
            let places: String = r.origins.iter().map(place).collect();
            let _ = writeln!(text, "\n  {}: @{} {}{places}\n    {}", r.kind, r.function, r.value, r.message);
            for (n, c) in r.candidates.iter().enumerate() {
                candidate(&mut text, n == 0, c, sizes);
            }
            if let Some(c) = &r.crossing {
                crossing(&mut text, c);
            }
        }
    }
    text
}

fn place(o: &Origin) -> String {
    let tag = o.tag.as_ref().map_or_else(String::new, |t| format!(" ({t})"));
    format!("  {}:{}{tag}", o.file, o.line)
}

/// A candidate with its costs as formulas, and as numbers where they have sizes in them.
fn candidate(text: &mut String, chosen: bool, c: &Candidate, sizes: &[BTreeMap<String, u64>]) {
    let mark = if chosen { '*' } else { ' ' };
    let bytes = &c.cost.bytes_read + &c.cost.bytes_written;
    let _ = writeln!(text, "    {mark} {}: {:.3e} {}", c.what, c.weight, c.unit);
    let _ = writeln!(text, "        flops {}\n        bytes {bytes}", c.cost.flops);
    let symbols: BTreeSet<_> = c.cost.flops.symbols().into_iter().chain(bytes.symbols()).collect();
    let mut shown = BTreeSet::new();
    for sizes in sizes {
        let at: Vec<_> = sizes
            .iter()
            .filter(|(s, _)| symbols.contains(s.as_str()))
            .map(|(s, n)| format!("{s}={n}"))
            .collect();
        // Sizes that are not in the formulas make no difference.
        if at.is_empty() || !shown.insert(at.clone()) {
            continue;
        }
        let number =
            |p: &Poly| p.eval(sizes).map_or_else(|_| "?".to_owned(), |n| format!("{:.2e}", n as f64));
        let (flops, bytes) = (number(&c.cost.flops), number(&bytes));
        let _ = writeln!(text, "        at {}: {flops} flops, {bytes} bytes", at.join(" "));
    }
}

fn crossing(text: &mut String, c: &Crossing) {
    let others: Vec<_> = c.others.iter().map(|(symbol, n)| format!("{symbol}={n}")).collect();
    let others = if others.is_empty() { String::new() } else { format!(" (with {})", others.join(" ")) };
    let _ = writeln!(text, "    up to {}={}{others}: {}; beyond: {}", c.size, c.at, c.below, c.above);
    if let Some(at) = c.by_operations {
        let _ = writeln!(text, "    by operations alone: up to {}={at}", c.size);
    }
}
