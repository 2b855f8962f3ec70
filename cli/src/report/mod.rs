//! `latentc report`: what the compiled graphs of a model say of its size, cache, training and serving, beside another's.

mod figures;
mod prompts;
mod step;
mod text;

use anyhow::anyhow;
use clap::ValueEnum;
use clap::builder::PossibleValuesParser;
use latentc_ir::{DType, Symbols, census, work};
use latentc_models::published::{Published, published};
use latentc_passes::machine::MACHINES;
use latentc_passes::quantise::GROUP;
use latentc_passes::{CacheForm, Codes, Graph, Machine, Wanted, pipeline};
use latentc_runtime::train::budget::Budget;
use serde::Serialize;

use crate::held::WeightArgs;
use crate::model::Model;
use crate::table::parse_budget;
use crate::target::Target;
use crate::{print, print_json, size};
use figures::{Figures, Program, Served};

/// Computes from a model's graphs what the paper claims: parameters, cache, training, prefill, decode, throughput.
///
/// Times are rooflines: the larger of what the arithmetic and what the memory traffic of a run takes, on devices among which
/// both divide evenly. No schedule is faster.
///
/// With `--weights` the graphs read weights that are held so, codes and scales.
///
/// With `--graph prefill` it tells what reading prompts has in memory, and in chunks of how many tokens they are read: for so many
/// sequences (`--batch`, 1 if not given) of so many tokens (`--context`).
///
/// With `--graph train` it tells what a step of training has in memory, from the plan of the compiled program, for so many sequences
/// (`--batch`, 1 if not given) of so many tokens (`--train-length`) at once. `--function` is for one layer:
/// `latentc report deepseek-v2 --graph train --function counted_layer`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A folder, a config.json, or a bundled name.
    model: String,
    /// Another model to compare it with.
    #[arg(long, value_name = "MODEL")]
    vs: Option<String>,
    /// What it runs on.
    #[arg(long, default_value = "h800", value_parser = PossibleValuesParser::new(MACHINES.map(|m| m.name)))]
    machine: String,
    /// How many of them.
    #[arg(long, default_value_t = 8, value_parser = size())]
    devices: u64,
    /// Memory of a run instead.
    #[arg(long, value_enum, conflicts_with_all = ["machine", "devices"])]
    graph: Option<GraphArg>,
    /// Of this function alone, as if it were the model.
    #[arg(long, value_name = "NAME", requires = "graph")]
    function: Option<String>,
    /// Keep as much of the way forward for the way back as lets the step fit, such as 20GiB, or `least`; all that is worth it if not given.
    #[arg(long, value_name = "SIZE", requires = "graph", value_parser = parse_budget)]
    memory_budget: Option<Budget>,
    /// Where it runs.
    #[arg(long, value_enum, default_value = "cuda", requires = "graph")]
    target: Target,
    /// Read so many tokens of each prompt at once at most; if not given, as many as memory beside the weights allows.
    #[arg(long, value_name = "N", requires = "graph", value_parser = size())]
    prefill_chunk: Option<u64>,
    #[command(flatten)]
    weights: WeightArgs,
    /// Sequences at once; if not given 1, 32 and 256, and of a run's memory 1.
    #[arg(long, value_delimiter = ',', value_name = "N,…", value_parser = size())]
    batch: Vec<u64>,
    /// Tokens of each sequence: of the prompt in prefill, in the cache in decode; if not given 1024, 4096, 32768 and 131072.
    #[arg(long, value_delimiter = ',', value_name = "N,…", value_parser = size())]
    context: Vec<u64>,
    /// Tokens of a training sequence.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = size())]
    train_length: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Contexts if none are given.
const CONTEXTS: [u64; 4] = [1024, 4096, 32_768, 131_072];

impl Args {
    fn contexts(&self) -> &[u64] {
        if self.context.is_empty() { &CONTEXTS } else { &self.context }
    }

    fn batches(&self, otherwise: &'static [u64]) -> &[u64] {
        if self.batch.is_empty() { otherwise } else { &self.batch }
    }
}

/// The graphs whose memory is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum GraphArg {
    /// Prompts that are read.
    Prefill,
    /// A step: whole sequences, and the gradient of what training minimises.
    Train,
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    devices: u64,
    /// Not for programs: they have it with each figure.
    #[serde(skip)]
    served: Served,
    /// The model and, if asked for, the one beside it.
    models: Vec<Figures>,
    published: Option<Published>,
}

pub(crate) fn report(args: &Args) -> anyhow::Result<()> {
    match args.graph {
        Some(GraphArg::Prefill) => return prompts::report(args),
        Some(GraphArg::Train) => return step::report(args),
        None => {}
    }
    let machine =
        Machine::named(&args.machine).ok_or_else(|| anyhow!("unknown machine `{}`", args.machine))?;
    let models = [Some(&args.model), args.vs.as_ref()].into_iter().flatten().map(|name| Model::find(name));
    let models = models.collect::<anyhow::Result<Vec<_>>>()?;
    let report = Report {
        machine,
        devices: args.devices,
        served: figures::served(args.weights.name()),
        published: match &models[..] {
            [model, beside] => published(&model.name, &beside.name),
            _ => None,
        },
        models: models.iter().map(|model| figures(model, args, machine)).collect::<anyhow::Result<_>>()?,
    };
    if args.json { print_json(&report) } else { print(&text::text(&report)) }
}

/// All graphs of a model, and what follows from them.
fn figures(model: &Model, args: &Args, machine: Machine) -> anyhow::Result<Figures> {
    let weights = args.weights.form();
    let mut weight_bytes = 0;
    let mut compile = |graph: Graph, codes: Option<Codes>| -> anyhow::Result<Program> {
        let cache = codes.map(|codes| CacheForm { codes, group: GROUP, rotated_wide: false });
        // Costs are those of long prompts.
        let compiled =
            model.compile(Wanted { cache, weights, ..graph.into() }, DType::Bf16, &pipeline())?.pop();
        let compiled = compiled.expect("the largest sizes have a program");
        let work = work(compiled.module()).map_err(anyhow::Error::msg)?;
        weight_bytes = compiled.module().weight_bytes().map_err(anyhow::Error::msg)?;
        Ok(Program { work, symbols: Symbols::of(compiled.module()) })
    };
    let definition = model.trace(Graph::Prefill, DType::Bf16)?;
    let (train, prefill) = (compile(Graph::Train, None)?, compile(Graph::Prefill, None)?);
    let decode = figures::CACHES.into_iter().map(|(name, codes)| Ok((name, compile(Graph::Decode, codes)?)));
    let decode = decode.collect::<anyhow::Result<_>>()?;
    let count = census(&definition).map_err(anyhow::Error::msg)?.count;
    let served = figures::served(args.weights.name());
    let programs = figures::Programs { count, weight_bytes, served, train, prefill, decode };
    let (batch, context) = (args.batches(&[1, 32, 256]), args.contexts());
    let node = figures::Node { machine, devices: args.devices };
    Ok(Figures {
        model: model.name.clone(),
        positions: model.config.common().max_position_embeddings as u64,
        parameters: programs.count,
        weight_bytes: weights.map(|_| programs.weight_bytes),
        cache: programs.cache(),
        training: programs.training(args.train_length)?,
        prefill: programs.points(Graph::Prefill, &node, batch, context)?,
        decode: programs.points(Graph::Decode, &node, batch, context)?,
        throughput: programs.throughput(&node, context)?,
    })
}
