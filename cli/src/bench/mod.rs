//! `latentc bench`: how fast a model and its kernels are on a device, beside what that device can do.

mod text;

use std::path::PathBuf;

use anyhow::{anyhow, bail};
use latentc_codegen::device::Device;
use latentc_ir::{DType, Symbols};
use latentc_passes::{Graph, Guard};
use latentc_runtime::bench::{Measured, Probe, Settings, Shape, is_whole, measure};
use latentc_runtime::compiled::Compiled;
use serde::Serialize;

use crate::cache::CacheArgs;
use crate::folder::write_file;
use crate::model::{DTypeArg, GraphArg, Model};
use crate::passes::Choice;
use crate::target::{Job, Target, with_device};
use crate::{print, print_json, progress};

/// Measures a model on a device: what the device can do, then each kernel and the whole step beside that.
///
/// Weights are random and made on the device, so there need be none. Example: one layer of each kind of a large model,
/// reading its 4096th token:
///
///     latentc bench deepseek-v2 --target cuda --graph decode --layers 1 --context 4096
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// A folder, a config.json, or a bundled name.
    model: String,
    /// Where it runs.
    #[arg(long, value_enum, default_value = "host")]
    target: Target,
    /// Which graph.
    #[arg(long, value_enum, default_value = "decode")]
    graph: GraphArg,
    /// Sequences at once.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = size())]
    batch: u64,
    /// New tokens of each sequence: 512 if not given, and always one in decode.
    #[arg(long, value_name = "N", value_parser = size())]
    tokens: Option<u64>,
    /// Positions of each sequence, new tokens included: in decode 4096, or what the model has; else those of the new tokens.
    #[arg(long, value_name = "N", value_parser = size())]
    context: Option<u64>,
    /// Measure a model with so many layers of each kind.
    #[arg(long, value_name = "N", value_parser = size())]
    layers: Option<u64>,
    /// Weights and activations; the configuration's if not given.
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
    /// Only the kernels.
    #[arg(long, conflicts_with = "whole")]
    kernels: bool,
    /// Only the whole step.
    #[arg(long)]
    whole: bool,
    /// How many times each figure is measured.
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    repeat: u64,
    /// What weights and tokens follow from.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Measure the device with small operands: to try a command, not for figures.
    #[arg(long)]
    quick: bool,
    /// JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// A file to write the JSON to.
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    passes: Choice,
    #[command(flatten)]
    cache: CacheArgs,
}

fn size() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1..=1 << 30)
}

/// All that was measured, as `--json` prints it.
#[derive(Serialize)]
struct Report {
    model: String,
    latentc: &'static str,
    graph: &'static str,
    /// For which sizes the program is, unless for all.
    #[serde(skip_serializing_if = "Option::is_none")]
    guard: Option<Guard>,
    target: &'static str,
    dtype: DType,
    #[serde(flatten)]
    shape: Shape,
    /// How many of each kind were left of the stack.
    #[serde(skip_serializing_if = "Option::is_none")]
    layers_of_each_kind: Option<u64>,
    /// The stack.
    layers: usize,
    seed: u64,
    repeat: usize,
    quick: bool,
    #[serde(flatten)]
    measured: Measured,
}

pub(crate) fn bench(args: &Args) -> anyhow::Result<()> {
    let mut model = Model::find(&args.model)?;
    if let Some(each) = args.layers {
        model.config = model.config.with_layers(each as usize);
    }
    let shape = shape(args, &model)?;
    let spinner = progress::spinner("compiling");
    let graph = Graph::from(args.graph);
    let dtype = model.dtype(args.dtype);
    let variants = model.compile(args.cache.of(graph), dtype, &args.passes.pipeline())?;
    let compiled = fitting(variants, shape)
        .ok_or_else(|| anyhow!("no program of the {} graph is for {} tokens", graph.name(), shape.tokens))?;
    drop(spinner);
    with_device(args.target, Bench { args, model, compiled, shape, dtype })
}

/// The sizes asked for.
fn shape(args: &Args, model: &Model) -> anyhow::Result<Shape> {
    let graph = Graph::from(args.graph);
    let decodes = graph == Graph::Decode;
    if let (true, Some(n @ 2..)) = (decodes, args.tokens) {
        bail!("--tokens {n}: decode has one new token for each sequence; --graph prefill takes more");
    }
    let tokens = if decodes { 1 } else { args.tokens.unwrap_or(512) };
    let longest = (model.config.common().max_position_embeddings as u64).min(4096);
    let context = args.context.unwrap_or(if decodes { longest } else { tokens });
    if context < tokens {
        bail!("--context {context} is less than {tokens} tokens: new tokens are a part of it");
    }
    if is_whole(graph) && context > tokens {
        bail!("--context {context}: the {} graph reads whole sequences; give --tokens", graph.name());
    }
    Ok(Shape { batch: args.batch as usize, tokens: tokens as usize, context: context as usize })
}

/// The program for these sizes.
fn fitting(variants: Vec<Compiled>, shape: Shape) -> Option<Compiled> {
    variants.into_iter().find(|compiled| {
        let Some(guard) = &compiled.guard else { return true };
        let symbols = Symbols::of(compiled.module());
        let sizes = symbols.bind(shape.batch as u64, shape.tokens as u64, shape.context as u64);
        sizes.get(&guard.size).is_some_and(|&n| guard.admits(n))
    })
}

/// The sizes of what the device is measured with.
fn probe(target: Target, quick: bool) -> Probe {
    let (bytes, side) = match (target, quick) {
        (Target::Host | Target::Wgpu, true) => (4 << 20, 128),
        (Target::Cuda, true) => (64 << 20, 1024),
        (Target::Host, false) => (256 << 20, 2048),
        (Target::Wgpu, false) => (128 << 20, 1024),
        (Target::Cuda, false) => (1 << 30, 8192),
    };
    Probe { bytes, side, queues: target != Target::Host }
}

/// What is measured, once there is a device.
struct Bench<'a> {
    args: &'a Args,
    model: Model,
    compiled: Compiled,
    shape: Shape,
    dtype: DType,
}

impl Job for Bench<'_> {
    fn on<D: Device>(self, device: D) -> anyhow::Result<()> {
        let Bench { args, model, compiled, shape, dtype } = self;
        let common = model.config.common();
        let with = Settings {
            repeat: args.repeat as usize,
            seed: args.seed,
            std: common.initializer_range,
            dtype,
            vocab: common.vocab_size,
            probe: probe(args.target, args.quick),
            kernels: !args.whole,
            whole: !args.kernels,
        };
        let spinner = progress::spinner("measuring");
        let measured = measure(device, &compiled, shape, &with, |what| spinner.say(what))?;
        drop(spinner);
        let report = Report {
            model: model.name.clone(),
            latentc: env!("CARGO_PKG_VERSION"),
            graph: compiled.graph.name(),
            guard: compiled.guard.clone(),
            target: args.target.name(),
            dtype,
            shape,
            layers_of_each_kind: args.layers,
            layers: common.num_hidden_layers,
            seed: args.seed,
            repeat: with.repeat,
            quick: args.quick,
            measured,
        };
        if let Some(out) = &args.out {
            write_file(out, &(serde_json::to_string_pretty(&report)? + "\n"))?;
        }
        if args.json { print_json(&report) } else { print(&text::text(&report)) }
    }
}
