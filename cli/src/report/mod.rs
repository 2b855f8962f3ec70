//! `latentc report`: what the compiled graphs of a model say of its size, cache, training and serving, beside another's.

mod figures;
mod step;
mod text;

use anyhow::anyhow;
use clap::builder::PossibleValuesParser;
use latentc_ir::{DType, Symbols, census, work};
use latentc_models::published::{Published, published};
use latentc_passes::machine::MACHINES;
use latentc_passes::quantise::GROUP;
use latentc_passes::{CacheForm, Codes, Graph, Machine, Wanted, pipeline};
use latentc_runtime::train::budget::Budget;
use serde::Serialize;

use crate::model::Model;
use crate::table::parse_budget;
use crate::target::Target;
use crate::{print, print_json, size};
use figures::{Figures, Program};

/// Computes from a model's graphs what the paper claims: parameters, cache, training, prefill, decode, throughput.
///
/// Times are rooflines: the larger of what the arithmetic and what the memory traffic of a run takes, on devices among which
/// both divide evenly. No schedule is faster.
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
    /// Memory of a step of training instead.
    #[arg(long, value_enum, conflicts_with_all = ["machine", "devices", "context"])]
    graph: Option<step::GraphArg>,
    /// Of this function alone, as if it were the model.
    #[arg(long, value_name = "NAME", requires = "graph")]
    function: Option<String>,
    /// Keep as much of the way forward for the way back as lets the step fit, such as 20GiB, or `least`; all that is worth it if not given.
    #[arg(long, value_name = "SIZE", requires = "graph", value_parser = parse_budget)]
    memory_budget: Option<Budget>,
    /// Where the step runs.
    #[arg(long, value_enum, default_value = "cuda", requires = "graph")]
    target: Target,
    /// Sequences at once; 1, 32 and 256 if not given.
    #[arg(long, value_delimiter = ',', value_name = "N,…", value_parser = size())]
    batch: Vec<u64>,
    /// Tokens of each sequence: of the prompt in prefill, in the cache in decode.
    #[arg(long, value_delimiter = ',', value_name = "N,…", default_values_t = [1024, 4096, 32_768, 131_072], value_parser = size())]
    context: Vec<u64>,
    /// Tokens of a training sequence.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = size())]
    train_length: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    devices: u64,
    /// The model and, if asked for, the one beside it.
    models: Vec<Figures>,
    published: Option<Published>,
}

pub(crate) fn report(args: &Args) -> anyhow::Result<()> {
    if args.graph.is_some() {
        return step::report(args);
    }
    let machine =
        Machine::named(&args.machine).ok_or_else(|| anyhow!("unknown machine `{}`", args.machine))?;
    let models = [Some(&args.model), args.vs.as_ref()].into_iter().flatten().map(|name| Model::find(name));
    let models = models.collect::<anyhow::Result<Vec<_>>>()?;
    let report = Report {
        machine,
        devices: args.devices,
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
    let compile = |graph, codes: Option<Codes>| -> anyhow::Result<Program> {
        let cache = codes.map(|codes| CacheForm { codes, group: GROUP, rotated_wide: false });
        // Costs are those of long prompts.
        let compiled = model
            .compile(Wanted { graph, cache, page: None, weights: None }, DType::Bf16, &pipeline())?
            .pop();
        let compiled = compiled.expect("the largest sizes have a program");
        let work = work(compiled.module()).map_err(anyhow::Error::msg)?;
        Ok(Program { work, symbols: Symbols::of(compiled.module()) })
    };
    let definition = model.trace(Graph::Prefill, DType::Bf16)?;
    let programs = figures::Programs {
        count: census(&definition).map_err(anyhow::Error::msg)?.count,
        train: compile(Graph::Train, None)?,
        prefill: compile(Graph::Prefill, None)?,
        decode: figures::CACHES
            .into_iter()
            .map(|(name, codes)| Ok((name, compile(Graph::Decode, codes)?)))
            .collect::<anyhow::Result<_>>()?,
    };
    let batch = if args.batch.is_empty() { &[1, 32, 256][..] } else { &args.batch };
    let node = figures::Node { machine, devices: args.devices };
    Ok(Figures {
        model: model.name.clone(),
        positions: model.config.common().max_position_embeddings as u64,
        parameters: programs.count,
        cache: programs.cache(),
        training: programs.training(args.train_length)?,
        prefill: programs.points(Graph::Prefill, &node, batch, &args.context)?,
        decode: programs.points(Graph::Decode, &node, batch, &args.context)?,
        throughput: programs.throughput(&node, &args.context)?,
    })
}
