//! `latentc compile`: graphs of a model as kernels, launch lists and the IR after every pass, in a folder.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{anyhow, bail};
use latentc_codegen::cube::{Source, Tuning, choose, cuda_together_source, side_by_side, sources, taken};
use latentc_codegen::digest::digest;
use latentc_codegen::memory::{Plan, Summary};
use latentc_codegen::program::{Kernel, Step};
use latentc_ir::{Size, Symbols};
use latentc_passes::{Graph, Guard};
use latentc_runtime::compiled::Compiled;

use crate::folder::NewFolder;
use crate::held::FormArgs;
use crate::manifest::{self, Hex, KernelEntry, Manifest, Together};
use crate::model::{DTypeArg, GoalArgs, GraphArg, Model};
use crate::passes::{Choice, Validation};
use crate::share::share;
use crate::table::grouped;
use crate::target::Target;
use crate::tuning::TuningArgs;
use crate::{print, progress, size};

/// Compiles a model to kernels: their sources, a manifest.json for programs that load them, and, for people,
/// the launch list and the IR after every pass.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A folder, a config.json, or a bundled name.
    model: String,
    /// The language of the kernels.
    #[arg(long, value_enum)]
    target: Target,
    /// Which graphs; may be given several times.
    #[arg(long, value_enum, default_values = ["prefill", "decode"])]
    graph: Vec<GraphArg>,
    #[command(flatten)]
    goal: GoalArgs,
    /// Weights and activations; the configuration's if not given.
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
    #[command(flatten)]
    passes: Choice,
    #[command(flatten)]
    form: FormArgs,
    #[command(flatten)]
    tuning: TuningArgs,
    /// Run what each pass was given and what it made on small instances of the model, and fail with the smallest program
    /// that shows it if they differ.
    #[arg(long)]
    validate: bool,
    /// Sequences at once, in the plan of memory and in the choice of ways to compute kernels.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = size())]
    batch: u64,
    /// New tokens of each sequence there; decode has one.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = size())]
    tokens: u64,
    /// Positions of each sequence there, new tokens included.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = size())]
    context: u64,
    /// The folder to write. It is made, or replaced if this command wrote it.
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
}

pub(crate) fn compile(args: &Args) -> anyhow::Result<()> {
    let start = Instant::now();
    let model = Model::find(&args.model)?.to(&args.goal);
    let tuned = args.tuning.read(args.target)?;
    let advice = "does not hold a manifest.json of latentc, so it is not replaced";
    let folder = NewFolder::begin(&args.out, manifest::is_ours, advice)?;
    let spinner = progress::spinner("compiling");
    let dtype = model.dtype(args.dtype);

    let passes = args.passes.pipeline();
    let mut graphs: Vec<Compiled> = Vec::new();
    for graph in args.graph.iter().map(|&g| Graph::from(g)) {
        if !graphs.iter().any(|c| c.graph == graph) {
            graphs.extend(model.compile(args.form.of(graph), dtype, &passes)?);
        }
    }
    let mut validation = args.validate.then(Validation::default);
    if let Some(validation) = &mut validation {
        for compiled in &graphs {
            let cx = Guard::context(compiled.guard.as_ref(), args.form.of(compiled.graph));
            validation.add(&passes, &cx, &compiled.stages, &spinner)?;
        }
        spinner.say("compiling".to_owned());
    }
    let kernels = share(graphs.iter_mut().map(|c| &mut c.program));
    let mut manifest = Manifest {
        latentc: env!("CARGO_PKG_VERSION"),
        target: args.target.name(),
        model: manifest::Model { name: model.name.clone(), dtype, config: model.config.to_json() },
        // All graphs of a model read the same checkpoint.
        parameters: match graphs.first() {
            Some(compiled) => manifest::parameters(&compiled.stages[0].1).map_err(|e| anyhow!(e))?,
            None => Vec::new(),
        },
        kernels: Vec::new(),
        together: Vec::new(),
        graphs: Vec::new(),
        validation,
    };
    let sizes = launched(args, &graphs)?;
    let mut texts = Texts { folder: &folder, tuning: &tuned.tuning, written: BTreeMap::new() };
    for kernel in &kernels {
        let sizes = sizes.get(&kernel.name).map_or(&[][..], Vec::as_slice);
        manifest.kernels.push(texts.kernel(args.target, kernel, sizes)?);
    }
    if args.target == Target::Cuda {
        manifest.together = texts.together(&graphs)?;
    }
    for compiled in &graphs {
        let memory = memory(args, compiled)?;
        manifest.graphs.push(write_graph(&folder, compiled, memory)?);
    }
    folder.write(manifest::FILE, &(serde_json::to_string_pretty(&manifest)? + "\n"))?;
    folder.publish()?;
    drop(spinner);

    let mut text = format!("{} for {} in {}\n", model.name, args.target.name(), args.out.display());
    for (compiled, entry) in graphs.iter().zip(&manifest.graphs) {
        let (kernels, launches) = (compiled.program.kernels.len(), entry.launches);
        let guard = compiled.guard.as_ref().map_or_else(String::new, |g| format!(" where {g}"));
        text += &format!("  {:8} {kernels:>4} kernels, {launches:>6} launches a run{guard}\n", entry.graph);
        let Summary { sizes, bytes, bound } = &entry.memory;
        let sizes: Vec<_> = sizes.iter().map(|(s, n)| format!("{s}={n}")).collect();
        text += &format!(
            "           temporaries of {} bytes at {}, {} of them at one moment\n",
            grouped(*bytes),
            sizes.join(" "),
            grouped(*bound)
        );
    }
    if let Some(validation) = &manifest.validation {
        text += &format!("  {}\n", validation.summary().replace('\n', "\n  "));
    }
    if let Some(said) = tuned.said() {
        text += &format!("  {said}\n");
    }
    text += &format!("  {} distinct kernels, {:.1} s\n", kernels.len(), start.elapsed().as_secs_f64());
    print(&text)
}

/// The texts of kernels in a folder.
struct Texts<'f> {
    folder: &'f NewFolder,
    tuning: &'f Tuning,
    /// By what they are known by.
    written: BTreeMap<u64, manifest::Source>,
}

impl Texts<'_> {
    /// A kernel in the ways that launches take with one new token, with many and at these sizes, and what it computes as IR.
    fn kernel(
        &mut self,
        target: Target,
        kernel: &Kernel,
        sizes: &[Vec<usize>],
    ) -> anyhow::Result<KernelEntry> {
        let name = &kernel.name;
        let spec = format!("kernels/{name}.ir");
        self.folder.write(&spec, &kernel.module().to_string())?;
        let mut all = Vec::new();
        match target.language() {
            Some(language) => {
                for way in taken(kernel, language, &self.tuning.machine, sizes, self.tuning)? {
                    for source in sources(&way, language)? {
                        let name = format!("{}.{}", source.name, target.ending());
                        all.push(manifest::Source { way: Some(way.kind), ..self.text(&name, source)? });
                    }
                }
            }
            // The host runs the IR as it is.
            None => {
                let (file, entry) = (spec.clone(), name.clone());
                let own =
                    manifest::Source { file, entry, way: None, launch: None, identity: None, digest: None };
                all.push(own);
            }
        }
        let ways = target.language().map_or(Ok(Vec::new()), |language| {
            let one = |sizes: &Vec<usize>| -> anyhow::Result<manifest::Taken> {
                let chosen = choose(kernel, language, sizes, self.tuning)?;
                let (way, tuned) = (chosen.way.to_string(), chosen.tuned);
                Ok(manifest::Taken { sizes: sizes.clone(), way, tuned })
            };
            sizes.iter().map(one).collect()
        });
        // What is computed as it came says nothing.
        let mut ways: Vec<_> = ways?;
        ways.retain(|w| w.tuned || w.way != kernel.kind.to_string());
        Ok(KernelEntry::new(kernel, spec, all, ways))
    }

    /// The grids of decode that are several kernels, as one new token of one sequence launches them.
    fn together(&mut self, graphs: &[Compiled]) -> anyhow::Result<Vec<Together>> {
        let mut all: Vec<Together> = Vec::new();
        for program in graphs.iter().filter(|c| c.graph == Graph::Decode).map(|c| &c.program) {
            for group in program.together() {
                let group = side_by_side(group, self.tuning)?;
                let kernels: Vec<_> = group.iter().map(|k| k.name.clone()).collect();
                if all.iter().any(|t| t.kernels == kernels) {
                    continue;
                }
                if let Some(source) = cuda_together_source(&group)? {
                    let name = format!("{:02}_{}.cu", all.len(), source.name);
                    all.push(Together { kernels, source: self.text(&name, source)? });
                }
            }
        }
        Ok(all)
    }

    /// Writes a text, unless it is there.
    fn text(&mut self, name: &str, source: Source) -> anyhow::Result<manifest::Source> {
        let Source { name: entry, text, launch, identity, .. } = source;
        if let Some(known) = self.written.get(&identity) {
            return Ok(known.clone());
        }
        let file = format!("kernels/{name}");
        self.folder.write(&file, &text)?;
        let (launch, digest) = (Some(launch), Some(Hex(digest(text.bytes()))));
        let written =
            manifest::Source { file, entry, way: None, launch, identity: Some(Hex(identity)), digest };
        self.written.insert(identity, written.clone());
        Ok(written)
    }
}

/// The run-time sizes of each kernel's launches, where sequences are as long as is asked for.
fn launched(args: &Args, graphs: &[Compiled]) -> anyhow::Result<BTreeMap<String, Vec<Vec<usize>>>> {
    let mut all: BTreeMap<String, Vec<Vec<usize>>> = BTreeMap::new();
    for compiled in graphs {
        let bound = bound(args, compiled)?;
        let program = &compiled.program;
        for step in program.routines.iter().flat_map(|r| &r.steps) {
            let Step::Launch { kernel, sizes, .. } = step else { continue };
            let number = |size: &Size| match size {
                Size::Fixed(n) => Some(*n as usize),
                Size::Sym(s) => bound.get(s).map(|&n| n as usize),
            };
            let sizes: Option<Vec<_>> = sizes.iter().map(number).collect();
            let known = all.entry(program.kernels[*kernel].name.clone()).or_default();
            known.extend(sizes.filter(|sizes| !known.contains(sizes)));
        }
    }
    Ok(all)
}

/// What the temporaries of a run take on the target.
fn memory(args: &Args, compiled: &Compiled) -> anyhow::Result<Summary> {
    let sizes = bound(args, compiled)?;
    let plan = Plan::new(&compiled.program, &sizes, &args.target.layout())?;
    Ok(Summary { bytes: plan.bytes(), bound: plan.bound, sizes })
}

/// The run-time sizes of a run as long as is asked for.
fn bound(args: &Args, compiled: &Compiled) -> anyhow::Result<BTreeMap<String, u64>> {
    if args.context < args.tokens {
        bail!(
            "--context {} is less than --tokens {}: new tokens are a part of it",
            args.context,
            args.tokens
        );
    }
    let new = match compiled.graph {
        Graph::Decode => 1,
        Graph::Prefill | Graph::Train | Graph::Gradient => args.tokens,
    };
    let symbols = Symbols::of(compiled.module());
    // A program for some numbers of tokens is planned for the nearest of those.
    let new = match &compiled.guard {
        Some(guard) if symbols.new.contains(&guard.size) => {
            new.max(guard.above + 1).min(guard.up_to.unwrap_or(u64::MAX))
        }
        Some(_) | None => new,
    };
    Ok(symbols.bind(args.batch, new, args.context.max(new)))
}

/// The IR after every pass, and the launch list.
fn write_graph(folder: &NewFolder, compiled: &Compiled, memory: Summary) -> anyhow::Result<manifest::Graph> {
    let graph = compiled.graph.name();
    // The folder of the largest sizes has the graph's own name.
    let part = match &compiled.guard {
        Some(Guard { size, up_to: Some(most), .. }) => format!("{graph}.{size}{most}"),
        Some(Guard { up_to: None, .. }) | None => graph.to_owned(),
    };
    let mut stages = Vec::new();
    for (number, (pass, module)) in compiled.stages.iter().enumerate() {
        let file = format!("{part}/{number:02}_{pass}.ir");
        folder.write(&file, &module.to_string())?;
        stages.push(file);
    }
    let schedule = format!("{part}/schedule.txt");
    folder.write(&schedule, &format!("{}\n", compiled.program.to_string().trim_end()))?;
    Ok(manifest::Graph {
        graph,
        guard: compiled.guard.clone(),
        stages,
        schedule,
        launches: compiled.program.launches(),
        memory,
        entry: compiled.program.entry.clone(),
        routines: manifest::routines(compiled.module(), &compiled.program),
    })
}
