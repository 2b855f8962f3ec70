//! `latentc bench`: how fast a model and its kernels are on a device, beside what that device can do.

mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail};
use latentc_codegen::device::Device;
use latentc_ir::{DType, Symbols};
use latentc_passes::{Graph, Guard};
use latentc_runtime::bench::{Arguments, Measured, Probe, Settings, Shape, is_whole, measure};
use latentc_runtime::compiled::{Compiled, compile_variants};
use serde::Serialize;

use crate::folder::write_file;
use crate::held::FormArgs;
use crate::model::{DTypeArg, GoalArgs, GraphArg, Model};
use crate::passes::Choice;
use crate::share::all_there;
use crate::target::{Job, Target, with_texts};
use crate::tuning::TuningArgs;
use crate::{edits, opt, print, print_json, progress, size};

/// Measures a model on a device: what the device can do, then each kernel and the whole step beside that.
///
/// Weights are random and made on the device, so there need be none. Examples: one layer of each
/// kind of a large model, reading its 4096th token; a single operation, as a text of the IR:
///
///     latentc bench deepseek-v2 --target cuda --graph decode --layers 1 --context 4096
///     latentc bench scripts/ops/product.ir --target cuda --size t=16
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// A folder, a config.json, or a bundled name; or a file of IR text, ending with .ir.
    model: String,
    /// Where it runs.
    #[arg(long, value_enum, default_value = "host")]
    target: Target,
    /// Which graph: decode if not given, and of a text the one that runs it as it stands.
    #[arg(long, value_enum)]
    graph: Option<GraphArg>,
    #[command(flatten)]
    goal: GoalArgs,
    /// Sequences at once; 1 if not given.
    #[arg(long, value_name = "N", value_parser = size())]
    batch: Option<u64>,
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
    /// A size of a text; may be given several times.
    #[arg(long = "size", value_name = "NAME=N", value_parser = named_size)]
    sizes: Vec<(String, u64)>,
    /// Of a text: draw what indexes an axis with probabilities that fall as this power of the index, so that some groups have
    /// more rows than others.
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    skew: f64,
    /// Of the kernels only this; may be given several times.
    #[arg(long, value_name = "NAME", conflicts_with = "whole")]
    kernel: Vec<String>,
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
    form: FormArgs,
    #[command(flatten)]
    from: edits::From,
    #[command(flatten)]
    tuning: TuningArgs,
}

fn named_size(text: &str) -> Result<(String, u64), String> {
    let pair = text.split_once('=').and_then(|(name, n)| Some((name.to_owned(), n.parse().ok()?)));
    pair.filter(|(_, n)| (1..=1 << 30).contains(n)).ok_or_else(|| format!("`{text}` is not like t=512"))
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
    shape: Option<Shape>,
    /// The run-time sizes of a text.
    #[serde(rename = "text_sizes", skip_serializing_if = "Option::is_none")]
    sizes: Option<BTreeMap<String, u64>>,
    /// How many of each kind were left of the stack.
    #[serde(skip_serializing_if = "Option::is_none")]
    layers_of_each_kind: Option<u64>,
    /// The stack.
    #[serde(skip_serializing_if = "Option::is_none")]
    layers: Option<usize>,
    seed: u64,
    repeat: usize,
    quick: bool,
    #[serde(flatten)]
    measured: Measured,
}

pub(crate) fn bench(args: &Args) -> anyhow::Result<()> {
    if !(args.skew >= 0.0 && args.skew.is_finite()) {
        bail!("--skew {}: give a number from 0 on", args.skew);
    }
    let spinner = progress::spinner("compiling");
    let subject = match Path::new(&args.model).extension().is_some_and(|e| e == "ir") {
        true => operation(args)?,
        false => whole_model(args)?,
    };
    let known = subject.compiled.program.kernels.iter().map(|k| k.name.as_str());
    all_there(&subject.name, &args.kernel, &known.collect::<Vec<_>>())?;
    drop(spinner);
    let (texts, tuned) = (args.from.read(args.target)?, args.tuning.read(args.target)?);
    with_texts(args.target, &texts, &tuned, Bench { args, subject })
}

/// What is measured.
struct Subject {
    name: String,
    compiled: Compiled,
    given: Arguments,
    dtype: DType,
    /// The standard deviation of weights.
    std: f64,
    /// Of a model.
    shape: Option<Shape>,
    layers: Option<usize>,
    /// Of a text.
    sizes: Option<BTreeMap<String, u64>>,
}

fn whole_model(args: &Args) -> anyhow::Result<Subject> {
    let mut model = Model::find(&args.model)?.to(&args.goal);
    if let Some((name, n)) = args.sizes.first() {
        bail!(
            "--size {name}={n} is for texts of the IR; sizes of a model are --batch, --tokens and --context"
        );
    }
    if let Some(each) = args.layers {
        model.config = model.config.with_layers(each as usize);
    }
    let shape = shape(args, &model)?;
    let graph = graph(args, Graph::Decode);
    let dtype = model.dtype(args.dtype);
    let variants = model.compile(args.form.of(graph), dtype, &args.passes.pipeline())?;
    let compiled = fitting(variants, |symbols| bound(symbols, shape))
        .ok_or_else(|| anyhow!("no program of the {} graph is for {} tokens", graph.name(), shape.tokens))?;
    let common = model.config.common();
    Ok(Subject {
        given: Arguments::of_model(&compiled.program, shape, common.vocab_size, args.seed)?,
        name: model.name.clone(),
        compiled,
        dtype,
        std: common.initializer_range,
        shape: Some(shape),
        layers: Some(common.num_hidden_layers),
        sizes: None,
    })
}

fn operation(args: &Args) -> anyhow::Result<Subject> {
    for (flag, given) in [
        ("--batch", args.batch.is_some()),
        ("--tokens", args.tokens.is_some()),
        ("--context", args.context.is_some()),
        ("--layers", args.layers.is_some()),
        ("--dtype", args.dtype.is_some()),
    ] {
        if given {
            bail!("{flag} is for models; a text says its dtypes, and its sizes are given by --size NAME=N");
        }
    }
    let (file, text) = opt::read(Path::new(&args.model))?;
    let module = opt::check(&file, &text)?;
    let sizes: BTreeMap<_, _> = args.sizes.iter().cloned().collect();
    let known: BTreeSet<_> =
        module.functions.iter().flat_map(|f| &f.axes).map(|a| a.size.to_string()).collect();
    if let Some(name) = sizes.keys().find(|name| !known.contains(*name)) {
        bail!("{file}: no axis has the size `{name}`");
    }
    let given = Arguments::of_module(&module, &sizes, args.skew, args.seed)?;
    // A text is run as it stands, not derived for serving.
    let graph = graph(args, Graph::Train);
    let variants = compile_variants(&module, args.form.of(graph), &args.passes.pipeline())?;
    let compiled = fitting(variants, |_| sizes.clone())
        .ok_or_else(|| anyhow!("{file}: no program of the {} graph is for these sizes", graph.name()))?;
    let entry = module.function(&module.entry);
    let floats = entry.iter().flat_map(|f| {
        let weights = f.weights.iter().map(|w| w.value);
        weights.chain(f.params.iter().copied()).map(|v| f.ty(v).dtype).filter(|d| d.is_float())
    });
    let dtype = floats.into_iter().next().unwrap_or(DType::F32);
    Ok(Subject {
        name: module.name,
        compiled,
        given,
        dtype,
        std: STD,
        shape: None,
        layers: None,
        sizes: Some(sizes),
    })
}

/// The standard deviation of a text's weights: that of models that say nothing else.
const STD: f64 = 0.02;

fn graph(args: &Args, otherwise: Graph) -> Graph {
    args.graph.map_or(otherwise, Graph::from)
}

/// The sizes asked for.
fn shape(args: &Args, model: &Model) -> anyhow::Result<Shape> {
    let graph = graph(args, Graph::Decode);
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
    Ok(Shape { batch: args.batch.unwrap_or(1) as usize, tokens: tokens as usize, context: context as usize })
}

/// What the sizes of a model are then.
pub(crate) fn bound(symbols: &Symbols, shape: Shape) -> BTreeMap<String, u64> {
    symbols.bind(shape.batch as u64, shape.tokens as u64, shape.context as u64)
}

/// The program for the sizes that `bind` gives.
pub(crate) fn fitting(
    variants: Vec<Compiled>,
    bind: impl Fn(&Symbols) -> BTreeMap<String, u64>,
) -> Option<Compiled> {
    variants.into_iter().find(|compiled| compiled.admits(&bind(&Symbols::of(compiled.module()))))
}

/// The sizes of what the device is measured with.
pub(crate) fn probe(target: Target, quick: bool) -> Probe {
    let (bytes, side) = match (target, quick) {
        (Target::Host | Target::Wgpu, true) => (4 << 20, 128),
        (Target::Cuda, true) => (64 << 20, 1024),
        (Target::Host, false) => (256 << 20, 2048),
        (Target::Wgpu, false) => (128 << 20, 1024),
        (Target::Cuda, false) => (1 << 30, 8192),
    };
    Probe { bytes, side, queues: target != Target::Host }
}

/// What is done once there is a device.
struct Bench<'a> {
    args: &'a Args,
    subject: Subject,
}

impl Job for Bench<'_> {
    fn on<D: Device>(self, device: D) -> anyhow::Result<()> {
        let Bench { args, subject } = self;
        let Subject { name, compiled, given, dtype, std, shape, layers, sizes } = subject;
        let with = Settings {
            repeat: args.repeat as usize,
            seed: args.seed,
            std,
            dtype,
            probe: probe(args.target, args.quick),
            kernels: !args.whole,
            only: args.kernel.clone(),
            whole: !args.kernels && args.kernel.is_empty(),
        };
        let spinner = progress::spinner("measuring");
        let measured = measure(device, &compiled, &given, &with, |what| spinner.say(what))?;
        drop(spinner);
        let report = Report {
            model: name,
            latentc: env!("CARGO_PKG_VERSION"),
            graph: compiled.graph.name(),
            guard: compiled.guard.clone(),
            target: args.target.name(),
            dtype,
            shape,
            sizes,
            layers_of_each_kind: args.layers,
            layers,
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
