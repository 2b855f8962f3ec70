//! `latentc roofline`: what kernels move and multiply on a GPU at real sizes, by formula, beside the least that they could.

use std::collections::BTreeMap;

use anyhow::anyhow;
use latentc_codegen::cube::{Bytes, Moves, Target as Language, choose, moves};
use latentc_codegen::program::{Kernel, Step};
use latentc_codegen::traffic::Traffic;
use latentc_ir::Size;
use latentc_passes::Graph;
use latentc_runtime::bench::Shape;
use serde::Serialize;

use crate::bench::{bound, fitting};
use crate::held::FormArgs;
use crate::model::{DTypeArg, GoalArgs, GraphArg, Model};
use crate::passes::Choice;
use crate::share::all_there;
use crate::table::{grouped, short, table};
use crate::target::Target;
use crate::tuning::TuningArgs;
use crate::{print, print_json};

/// Tells what kernels of a model move and multiply on a CUDA device at real sizes, by formula, beside the least that they could.
///
/// Nothing is run, and no device is needed. `latentc check --traffic` counts the same on small sizes, where formulas can be compared.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A folder, a config.json, or a bundled name.
    model: String,
    /// Which graphs; may be given several times.
    #[arg(long, value_enum, default_values = ["prefill", "decode"])]
    graph: Vec<GraphArg>,
    #[command(flatten)]
    goal: GoalArgs,
    /// Weights and activations; the configuration's if not given.
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
    /// Sequences at once.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = size())]
    batch: u64,
    /// New tokens of each sequence; decode has one.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = size())]
    tokens: u64,
    /// Positions of each sequence in decode, the new one included.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = size())]
    context: u64,
    /// Only this kernel; may be given several times.
    #[arg(long, value_name = "NAME")]
    kernel: Vec<String>,
    /// JSON instead of a table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    passes: Choice,
    #[command(flatten)]
    form: FormArgs,
    #[command(flatten)]
    tuning: TuningArgs,
}

fn size() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1..=1 << 24)
}

/// All of it, as `--json` prints it.
#[derive(Serialize)]
struct Report {
    model: String,
    batch: u64,
    graphs: Vec<OfGraph>,
}

#[derive(Serialize)]
struct OfGraph {
    graph: &'static str,
    tokens: u64,
    context: u64,
    kernels: Vec<Row>,
}

/// A kernel at the sizes of some launches.
#[derive(Serialize)]
struct Row {
    name: String,
    kind: String,
    /// The way that is taken at these sizes.
    way: String,
    sizes: BTreeMap<String, usize>,
    /// By formula: each operand once, the result once, each operation once.
    least: Traffic,
    /// Of all launches on the device together, those between them included.
    moved: Bytes,
    /// What of that lies between launches.
    between: Bytes,
    /// Operations of matrix units, those on padding included.
    multiplied: f64,
    /// The launches on the device, with what each moves of its buffers.
    launches: Vec<Moves>,
}

pub(crate) fn roofline(args: &Args) -> anyhow::Result<()> {
    let model = Model::find(&args.model)?.to(&args.goal);
    let tuned = args.tuning.read(Target::Cuda)?;
    let mut graphs = Vec::new();
    let mut names = Vec::new();
    for graph in args.graph.iter().map(|&graph| Graph::from(graph)) {
        let decodes = graph == Graph::Decode;
        let (tokens, context) = if decodes { (1, args.context) } else { (args.tokens, args.tokens) };
        let shape = Shape { batch: args.batch as usize, tokens: tokens as usize, context: context as usize };
        let variants =
            model.compile(args.form.of(graph), model.dtype(args.dtype), &args.passes.pipeline())?;
        let compiled = fitting(variants, |symbols| bound(symbols, shape))
            .ok_or_else(|| anyhow!("no {} graph of {} is for these sizes", graph.name(), model.name))?;
        let sizes = bound(&latentc_ir::Symbols::of(compiled.module()), shape);
        let mut seen: Vec<(&Kernel, Vec<usize>)> = Vec::new();
        for step in compiled.program.routines.iter().flat_map(|r| &r.steps) {
            let Step::Launch { kernel, sizes: own, .. } = step else { continue };
            let number = |size: &Size| match size {
                Size::Fixed(n) => Ok(*n as usize),
                Size::Sym(s) => sizes.get(s).map(|&n| n as usize).ok_or_else(|| anyhow!("no size `{s}`")),
            };
            let one = (&compiled.program.kernels[*kernel], own.iter().map(number).collect::<Result<_, _>>()?);
            if !seen.contains(&one) {
                seen.push(one);
            }
        }
        names.extend(seen.iter().map(|(kernel, _)| kernel.name.clone()));
        seen.retain(|(kernel, _)| args.kernel.is_empty() || args.kernel.contains(&kernel.name));
        let rows = seen.iter().map(|(kernel, sizes)| row(kernel, sizes, &tuned.tuning));
        let kernels = rows.collect::<anyhow::Result<_>>()?;
        graphs.push(OfGraph { graph: graph.name(), tokens, context, kernels });
    }
    all_there(&model.name, &args.kernel, &names.iter().map(String::as_str).collect::<Vec<_>>())?;
    let report = Report { model: model.name.clone(), batch: args.batch, graphs };
    if args.json {
        print_json(&report)?;
    } else {
        print(&text(&report))?;
    }
    tuned.say();
    Ok(())
}

fn row(kernel: &Kernel, sizes: &[usize], tuning: &latentc_codegen::cube::Tuning) -> anyhow::Result<Row> {
    let way = choose(kernel, Language::Cuda, sizes, tuning)?.way;
    let launches = moves(kernel, way, sizes, &tuning.machine)?;
    let numbers: Vec<_> = sizes.iter().map(|&n| n as u64).collect();
    let least = Traffic::of_launch(kernel, &numbers).map_err(|e| anyhow!("{}: {e}", kernel.name))?;
    let symbols = kernel.size_symbols().into_iter().map(str::to_owned);
    Ok(Row {
        name: kernel.name.clone(),
        kind: kernel.kind.to_string(),
        way: way.to_string(),
        sizes: symbols.zip(sizes.iter().copied()).collect(),
        least,
        moved: launches.iter().map(Moves::bytes).sum(),
        between: launches.iter().map(|launch| launch.between).sum(),
        multiplied: launches.iter().map(|launch| launch.multiplied).sum(),
        launches,
    })
}

fn text(report: &Report) -> String {
    let heads = [
        "kernel",
        "way",
        "least bytes",
        "memory",
        "between",
        "by cube",
        "operations",
        "a byte",
        "multiplied",
    ];
    let mut text = String::new();
    for OfGraph { graph, tokens, context, kernels } in &report.graphs {
        let (model, batch) = (&report.model, report.batch);
        text += &format!("{model}, {graph}: batch {batch}, {tokens} new, context {context}\n\n");
        let mut rows = vec![heads.map(str::to_owned).to_vec()];
        for r in kernels {
            let times = |bytes: f64| format!("{:.2}", bytes / r.least.bytes());
            let multiplied = match r.multiplied {
                0.0 => "-".to_owned(),
                n => format!("{:.2}", n / r.least.flops),
            };
            rows.push(vec![
                r.name.clone(),
                r.way.clone(),
                grouped(r.least.bytes() as u64),
                times(r.moved.memory - r.between.memory),
                times(r.between.memory),
                times(r.moved.by_block),
                short(r.least.flops as u64),
                format!("{:.1}", r.least.flops / r.least.bytes()),
                multiplied,
            ]);
        }
        text += &table(&rows, 2);
        text += "\n";
    }
    text + "least: each operand and the result once. Of that are moved so many times: from and to the device's memory, whose cache holds what\n\
            is read again soon, operands and results, and what launches of a kernel leave for the next; and by each cube once, all of it.\n\
            multiplied: operations of tensor cores, those on padding included, by all operations\n"
}
