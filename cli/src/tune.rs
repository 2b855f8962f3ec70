//! `latentc tune`: the best way to compute each kernel of a model on a device, in a file.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{anyhow, bail};
use latentc_codegen::device::Device;
use latentc_passes::Graph;
use latentc_runtime::bench::{self, Arguments, Settings, Shape, Tried};

use crate::bench::{bound, fitting, probe};
use crate::folder::write_file;
use crate::held::FormArgs;
use crate::manifest::Hex;
use crate::model::{DTypeArg, GoalArgs, GraphArg, Model};
use crate::passes::Choice as Passes;
use crate::share::all_there;
use crate::table::table;
use crate::target::{Job, Target, with_device};
use crate::tuning::{Choice, File, Kernel, Trial, describe};
use crate::{print, print_json, progress, size};

/// Times every way to compute each kernel of a model on a device, and writes the best to a file for `--tuning`.
///
/// A way counts only if its result is that of the way which the compiler chooses by itself. Weights
/// are random and made on the device, so there need be none. The choices hold for sizes like those
/// that were asked for: up to the next power of two, and more than half of it. Example:
///
///     latentc tune deepseek-v2-lite --target cuda --layers 1 --context 1024,4096 -o lite.json
///     latentc run DIR --target cuda --tuning lite.json --prompt …
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// A folder, a config.json, or a bundled name.
    model: String,
    /// Where it runs: wgpu or cuda. The host has one way to compute a kernel.
    #[arg(long, value_enum)]
    target: Target,
    /// Which graphs; may be given several times.
    #[arg(long, value_enum, default_values = ["prefill", "decode"])]
    graph: Vec<GraphArg>,
    #[command(flatten)]
    goal: GoalArgs,
    /// Sequences at once; with commas between them, each.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1", value_parser = size())]
    batch: Vec<u64>,
    /// New tokens of each sequence, of graphs that read several; with commas between them, each.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "512", value_parser = size())]
    tokens: Vec<u64>,
    /// Positions of each sequence in decode, the new one included, and with commas between them, each; 4096 or what the model has if not
    /// given.
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = size())]
    context: Vec<u64>,
    /// Of a model with so many layers of each kind.
    #[arg(long, value_name = "N", value_parser = size())]
    layers: Option<u64>,
    /// Of the kernels only this; may be given several times.
    #[arg(long, value_name = "NAME")]
    kernel: Vec<String>,
    /// Weights and activations; the configuration's if not given.
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
    /// How many times each way is measured.
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    repeat: u64,
    /// What weights and tokens follow from.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Fill less memory with what launches read: to try the command, not for choices.
    #[arg(long)]
    quick: bool,
    /// The file as JSON on standard output too, instead of a table.
    #[arg(long)]
    json: bool,
    /// The file to write. It grows with each kernel, so that what was done is there if the command is ended early.
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    passes: Passes,
    #[command(flatten)]
    form: FormArgs,
}

pub(crate) fn tune(args: &Args) -> anyhow::Result<()> {
    if args.target == Target::Host {
        bail!("the host has one way to compute a kernel; give --target wgpu or cuda");
    }
    let parent = args.out.parent().filter(|p| !p.as_os_str().is_empty());
    if let Some(parent) = parent.filter(|p| !p.is_dir()) {
        bail!("{}: cannot write here: {} is no folder", args.out.display(), parent.display());
    }
    let mut model = Model::find(&args.model)?.to(&args.goal);
    if let Some(each) = args.layers {
        model.config = model.config.with_layers(each as usize);
    }
    with_device(args.target, Tune { args, model })
}

/// What is done once there is a device.
struct Tune<'a> {
    args: &'a Args,
    model: Model,
}

impl Tune<'_> {
    /// What is run: graphs, each at all of its sizes.
    fn runs(&self) -> Vec<(Graph, Shape)> {
        let args = self.args;
        let longest = (self.model.config.common().max_position_embeddings as u64).min(4096);
        let contexts = if args.context.is_empty() { vec![longest] } else { args.context.clone() };
        let mut all = Vec::new();
        for graph in args.graph.iter().map(|&g| Graph::from(g)) {
            for &batch in &args.batch {
                let one = |tokens: u64, context: u64| Shape {
                    batch: batch as usize,
                    tokens: tokens as usize,
                    context: context as usize,
                };
                match graph {
                    Graph::Decode => all.extend(contexts.iter().map(|&n| (graph, one(1, n)))),
                    Graph::Prefill | Graph::Train | Graph::Gradient => {
                        all.extend(args.tokens.iter().map(|&n| (graph, one(n, n))));
                    }
                }
            }
        }
        all
    }
}

impl Job for Tune<'_> {
    fn on<D: Device>(self, mut device: D) -> anyhow::Result<()> {
        let (args, model) = (self.args, &self.model);
        let (dtype, passes) = (model.dtype(args.dtype), args.passes.pipeline());
        let description =
            describe(&device).ok_or_else(|| anyhow!("{} has no choice of ways", device.name()))?;
        let common = model.config.common();
        let with = Settings {
            repeat: args.repeat as usize,
            seed: args.seed,
            std: common.initializer_range,
            dtype,
            probe: probe(args.target, args.quick),
            kernels: true,
            only: args.kernel.clone(),
            whole: false,
        };
        let file = |tried: &[Tried]| File {
            latentc: env!("CARGO_PKG_VERSION").to_owned(),
            target: args.target,
            device: description.clone(),
            kernels: kernels(tried),
        };
        let write =
            |tried: &[Tried]| write_file(&args.out, &(serde_json::to_string_pretty(&file(tried))? + "\n"));
        let spinner = progress::spinner("compiling");
        let mut runs = Vec::new();
        for (graph, shape) in self.runs() {
            let variants = model.compile(args.form.of(graph), dtype, &passes)?;
            let compiled = fitting(variants, |symbols| bound(symbols, shape)).ok_or_else(|| {
                anyhow!("no program of the {} graph is for {} tokens", graph.name(), shape.tokens)
            })?;
            let given = Arguments::of_model(&compiled.program, shape, common.vocab_size, args.seed)?;
            runs.push((compiled, given, shape));
        }
        let known: BTreeSet<_> =
            runs.iter().flat_map(|(c, ..)| &c.program.kernels).map(|k| k.name.as_str()).collect();
        all_there(&model.name, &args.kernel, &Vec::from_iter(known))?;
        // Better now than after the work.
        write(&[])?;
        let mut tried: Vec<Tried> = Vec::new();
        for (compiled, given, Shape { batch, tokens, context }) in &runs {
            let at = format!("{} of {batch} x {tokens} in {context}", compiled.graph.name());
            let mut wrong = None;
            let done = |tried: &[Tried]| wrong = wrong.take().or_else(|| write(tried).err());
            let tell = |what| spinner.say(format!("{at}: {what}"));
            device = bench::tune(device, compiled, given, &with, &mut tried, tell, done)?;
            if let Some(wrong) = wrong {
                return Err(wrong);
            }
        }
        drop(spinner);
        let file = file(&tried);
        if args.json { print_json(&file) } else { print(&text(args, &file, &tried)) }
    }
}

/// As they stand in the file: by name, and by sizes.
fn kernels(tried: &[Tried]) -> Vec<Kernel> {
    let mut all: Vec<Kernel> = Vec::new();
    for one in tried {
        let trial = |t: &bench::Trial| Trial {
            way: t.way.to_string(),
            // Less is noise.
            microseconds: t.came.as_ref().ok().map(|s| (s.median * 1e8).round() / 100.0),
            refused: t.came.as_ref().err().cloned(),
        };
        let mut trials: Vec<_> = one.trials.iter().map(trial).collect();
        trials.sort_by(|a, b| {
            let time = |t: &Trial| t.microseconds.unwrap_or(f64::INFINITY);
            time(a).total_cmp(&time(b))
        });
        let choice = Choice {
            up_to: one.up_to.clone(),
            way: one.trials[one.best].way.to_string(),
            by_rule: one.trials[0].way.to_string(),
            tried: trials,
        };
        match all.iter_mut().find(|k| k.identity.0 == one.identity) {
            Some(known) => known.choices.push(choice),
            None => all.push(Kernel {
                name: one.name.clone(),
                identity: Hex(one.identity),
                choices: vec![choice],
            }),
        }
    }
    all.iter_mut().for_each(|k| k.choices.sort_by(|a, b| a.up_to.cmp(&b.up_to)));
    all.sort_by(|a, b| (&a.name, a.identity.0).cmp(&(&b.name, b.identity.0)));
    all
}

/// The table: what the rules take, what is best, and by how much. Where most is won comes first.
fn text(args: &Args, file: &File, tried: &[Tried]) -> String {
    let heads = ["kernel", "sizes", "by rule", "best", "µs by rule", "µs best", "ratio", "ways"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    let mut tried: Vec<&Tried> = tried.iter().collect();
    tried.sort_by(|a, b| {
        b.ratio().total_cmp(&a.ratio()).then_with(|| (&a.name, &a.up_to).cmp(&(&b.name, &b.up_to)))
    });
    let mut refused = Vec::new();
    for one in &tried {
        let sizes: Vec<_> = one.up_to.iter().map(|(name, n)| format!("{name}<={n}")).collect();
        let micros = |n: usize| {
            one.trials[n].came.as_ref().map_or_else(|_| "-".to_owned(), |s| format!("{:.1}", s.median * 1e6))
        };
        let best = if one.best == 0 { "the same".to_owned() } else { one.trials[one.best].way.to_string() };
        rows.push(vec![
            one.name.clone(),
            sizes.join(" "),
            one.trials[0].way.to_string(),
            best,
            micros(0),
            micros(one.best),
            format!("{:.2}", one.ratio()),
            one.trials.len().to_string(),
        ]);
        let failed = one.trials.iter().filter_map(|t| Some((t.way, t.came.as_ref().err()?)));
        refused.extend(failed.map(|(way, why)| format!("{}: `{way}` is not to be taken: {why}\n", one.name)));
    }
    let mut text = table(&rows, 4);
    if !refused.is_empty() {
        text += &format!("\n{}", refused.concat());
    }
    let better = tried.iter().filter(|t| t.best > 0).count();
    let (all, name, out) = (tried.len(), &file.device.name, args.out.display());
    text + &format!("\n{all} choices on {name}, {better} of them other than the rules' own, in {out}\n")
}
