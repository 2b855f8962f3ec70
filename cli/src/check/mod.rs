//! `latentc check`: whether the kernels of a model compute what they mean.

mod baseline;
mod machine_code;
mod traffic;

use std::fmt::Write;
use std::iter;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::bail;
use clap::ValueEnum;
use clap::builder::PossibleValuesParser;
use latentc_codegen::check::{Outcome, Trial, cases, check_together, trials, trials_together};
use latentc_codegen::cube::{
    CudaDevice, Machine, Target as Language, Tuning, Way, WgpuDevice, chosen as chosen_way,
    cuda_together_source, identities, is_expressible, side_by_side, taken, together_name, ways,
};
use latentc_codegen::device::{Device, DeviceError};
use latentc_codegen::emulate::Emulator;
use latentc_codegen::host::Host;
use latentc_codegen::machine_code::ARCHS;
use latentc_codegen::program::Kernel;
use latentc_passes::Graph;
use latentc_runtime::compiled::Compiled;
use rayon::prelude::*;
use serde::Serialize;

use crate::edits::{self, Texts};
use crate::held::FormArgs;
use crate::model::{DTypeArg, GoalArgs, GraphArg, Model};
use crate::passes::Choice;
use crate::share::{all_there, share};
use crate::table::table;
use crate::tuning::TuningArgs;
use crate::{print, print_json, progress, target};

/// Runs every kernel of a model on small sizes with odd tails, and compares with a float64 interpreter of what it means.
///
/// The tolerance of each element is a bound on the rounding of f32 arithmetic. Weights are not needed.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A folder, a config.json, or a bundled name.
    model: String,
    /// Only this kernel; may be given several times.
    #[arg(long, value_name = "NAME")]
    kernel: Vec<String>,
    /// Which graphs; may be given several times.
    #[arg(long, value_enum, default_values = ["prefill", "decode", "train"])]
    graph: Vec<GraphArg>,
    #[command(flatten)]
    goal: GoalArgs,
    /// Where the kernels run.
    #[arg(long, value_enum, default_value = "emulate")]
    target: Target,
    /// Run nothing: compile the CUDA text with NVIDIA's compilers, and say what of a GPU each kernel takes.
    #[arg(long = "static", conflicts_with_all = ["target", "seed"])]
    machine_code: bool,
    /// Count what the CUDA text of each kernel moves and multiplies when it is emulated, beside the least by formula.
    #[arg(long, conflicts_with_all = ["target", "machine_code", "bless", "against", "from"])]
    traffic: bool,
    /// For which architectures; may be given several times.
    #[arg(long, value_name = "ARCH", requires = "machine_code", default_values = ["sm_90a"],
          value_parser = PossibleValuesParser::new(ARCHS.map(|a| a.name)))]
    arch: Vec<String>,
    /// Weights and activations; the configuration's if not given.
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
    /// What arguments and the emulator's order of threads follow from.
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Store the kernels as they are in this folder: their CUDA text, what it takes of a GPU if its compilers are here, their results.
    #[arg(long, value_name = "DIR", conflicts_with = "machine_code")]
    bless: Option<PathBuf>,
    /// Say what differs from what is stored in this folder, and fail if anything does.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["machine_code", "bless"])]
    against: Option<PathBuf>,
    /// JSON instead of a table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    passes: Choice,
    #[command(flatten)]
    form: FormArgs,
    #[command(flatten)]
    from: edits::From,
    #[command(flatten)]
    tuning: TuningArgs,
}

/// Where kernels are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Target {
    /// Their CUDA text on this CPU, compiled as C++ with sanitizers.
    Emulate,
    /// Their WGSL text, through any graphics driver.
    Wgpu,
    /// Their CUDA text, on an NVIDIA GPU.
    Cuda,
    /// This CPU, which runs the IR.
    Host,
}

/// All that was checked, as `--json` prints it.
#[derive(Serialize)]
struct Report {
    model: String,
    target: Target,
    device: String,
    seed: u64,
    passes: bool,
    kernels: Vec<Row>,
    /// Files with texts that were changed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    changed: Vec<String>,
    /// What differs from the baseline, a line for each kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    differs: Option<Vec<String>>,
}

/// What came of a kernel.
#[derive(Serialize)]
struct Row {
    name: String,
    kind: String,
    /// The cases that ran to the end. The first that fails is the last.
    cases: Vec<Outcome>,
    /// The ways of the kernel that were run: all that it is computed in at the sizes of the model.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ways: Vec<String>,
    /// Those of them that axes as small as these have no room for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left_out: Vec<String>,
    /// Which of the ways failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    failed: Option<String>,
    /// Why a case did not run to the end, and its sizes.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    passes: bool,
}

pub(crate) fn check(args: &Args) -> anyhow::Result<()> {
    let start = Instant::now();
    let model = Model::find(&args.model)?.to(&args.goal);
    let written_for = match args.target {
        Target::Emulate | Target::Cuda => target::Target::Cuda,
        Target::Wgpu => target::Target::Wgpu,
        Target::Host => target::Target::Host,
    };
    if args.from.folder().is_some() && (args.bless.is_some() || args.against.is_some()) {
        bail!("--from and a baseline do not go together: a baseline holds what the compiler writes");
    }
    let (texts, tuned) = (args.from.read(written_for)?, args.tuning.read(written_for)?);
    let Chosen { kernels, mut together } = chosen(args, &model, &tuned.tuning)?;
    if args.machine_code {
        machine_code::check(args, &model.name, &kernels, &together, &texts, &tuned.tuning)?;
        tuned.say();
        return Ok(());
    }
    if args.traffic {
        return traffic::count(args, &model.name, &kernels);
    }
    if args.target == Target::Host {
        // It runs one after the other.
        together.clear();
    }
    let changed = changed(&texts, written_for, &kernels, &together, &tuned.tuning)?;
    let all = |machine: Option<(Language, Machine)>| {
        let mut subjects = changed;
        for kernel in &kernels {
            let ways = match machine {
                Some((language, machine)) => {
                    taken(kernel, language, &machine, &real_sizes(kernel), &tuned.tuning)?
                }
                None => vec![kernel.clone()],
            };
            subjects.push(Subject::one(kernel, &ways, machine.map(|(language, _)| language)));
        }
        subjects.extend(together.iter().map(|group| Subject::group(group)));
        Ok::<_, DeviceError>(subjects)
    };
    let edits = || Arc::clone(&texts.edits);
    let rows = match args.target {
        Target::Host => one_by_one(args, &all(None)?, Host::new()),
        Target::Wgpu => {
            let device = WgpuDevice::open()?.with_edits(edits());
            one_by_one(args, &all(device.machine())?, device)
        }
        Target::Cuda => {
            let mut device = CudaDevice::open(0)?.with_edits(edits());
            let subjects = all(device.machine())?;
            single(&subjects).for_each(|trial| device.begin(&trial.kernel, &trial.sizes));
            one_by_one(args, &subjects, device)
        }
        Target::Emulate => {
            let mut emulator = Emulator::open(args.seed)?.with_edits(edits());
            let subjects = all(emulator.machine())?;
            let spinner = progress::spinner("compiling");
            let ways: Vec<_> = single(&subjects).map(|one| chosen_way(&one.kernel, &one.sizes)).collect();
            // What does not compile says so when it is launched.
            let _ = emulator.prepare(&ways);
            spinner.say("running kernels".to_owned());
            let name = emulator.name();
            let one = |emulator: &mut Emulator, subject: &Subject| row(emulator, subject, args.seed);
            (name, subjects.par_iter().map_init(|| emulator.clone(), one).collect())
        }
    };
    let mut report = finished(args, &model, &texts, rows);
    if let Some(dir) = &args.against {
        report.differs = Some(baseline::differences(args, dir, &kernels, &report)?);
    }
    if args.json {
        print_json(&report)?;
    } else {
        let said = texts.said().map_or_else(String::new, |said| said + "\n\n");
        print(&(said + &text(args, &report, start)))?;
    }
    tuned.say();
    let failed = report.kernels.iter().filter(|k| !k.passes).count();
    if failed > 0 {
        bail!("{failed} of {} kernels of {} fail on {}", report.kernels.len(), report.model, report.device);
    }
    if let Some(dir) = &args.bless {
        baseline::bless(args, dir, &kernels, &report)?;
    }
    if let (Some(dir), Some(differs)) = (&args.against, &report.differs)
        && !differs.is_empty()
    {
        let (n, dir) = (differs.len(), dir.display());
        bail!(
            "{n} kernels are not as in {dir}; if that is meant, `latentc check … --bless {dir}` takes them over"
        );
    }
    Ok(())
}

/// What is checked.
struct Chosen {
    /// The distinct kernels of the graphs, or those that are asked for.
    kernels: Vec<Kernel>,
    /// Those that decode runs at the same time; known by [`together_name`].
    together: Vec<Vec<Kernel>>,
}

fn chosen(args: &Args, model: &Model, tuning: &Tuning) -> anyhow::Result<Chosen> {
    let _spinner = progress::spinner("scheduling");
    let dtype = model.dtype(args.dtype);
    let mut graphs: Vec<Compiled> = Vec::new();
    for graph in args.graph.iter().map(|&g| Graph::from(g)) {
        if !graphs.iter().any(|c| c.graph == graph) {
            graphs.extend(model.compile(args.form.of(graph), dtype, &args.passes.pipeline())?);
        }
    }
    let mut kernels = share(graphs.iter_mut().map(|c| &mut c.program));
    let mut together: Vec<Vec<Kernel>> = Vec::new();
    for program in graphs.iter().filter(|c| c.graph == Graph::Decode).map(|c| &c.program) {
        for group in program.together() {
            let group: Vec<_> = group.into_iter().cloned().collect();
            if !side_by_side(&group, tuning)?.is_empty() && !together.contains(&group) {
                together.push(group);
            }
        }
    }
    let groups: Vec<_> = together.iter().map(|group| together_name(group)).collect();
    let known = kernels.iter().map(|k| &k.name).chain(&groups).map(String::as_str);
    all_there(&model.name, &args.kernel, &known.collect::<Vec<_>>())?;
    let wanted = |name: &String| args.kernel.is_empty() || args.kernel.contains(name);
    kernels.retain(|k| wanted(&k.name));
    together.retain(|group| wanted(&together_name(group)));
    Ok(Chosen { kernels, together })
}

/// What is run, and compared: one kernel, or several at the same time.
struct Subject {
    name: String,
    kind: String,
    trials: Vec<Vec<Trial>>,
    /// The ways of a kernel that are tried besides those that the sizes of the trials lead to.
    ways: Vec<String>,
    /// Those that small axes leave no room for.
    left_out: Vec<String>,
}

/// Run-time sizes between one token and many.
fn real_sizes(kernel: &Kernel) -> Vec<Vec<usize>> {
    [16, 100].map(|n| vec![n; kernel.size_symbols().len()]).to_vec()
}

impl Subject {
    /// A kernel, with small axes: in the ways that a device takes at such sizes, and in those that it takes at real ones.
    fn one(kernel: &Kernel, ways: &[Kernel], language: Option<Language>) -> Subject {
        let mut subject = Subject::of(kernel.name.clone(), kernel.kind.to_string(), Vec::new());
        for way in ways {
            let text = Way { kind: way.kind, parts: None }.to_string();
            let trials = trials(way).into_iter().filter(|trial| {
                way.kind == kernel.kind || language.is_some_and(|l| is_expressible(&trial.kernel, l))
            });
            let before = subject.trials.len();
            subject.trials.extend(trials.map(|t| vec![t]));
            let found = if subject.trials.len() > before { &mut subject.ways } else { &mut subject.left_out };
            found.push(text);
        }
        subject
    }

    fn of(name: String, kind: String, trials: Vec<Vec<Trial>>) -> Subject {
        Subject { name, kind, trials, ways: Vec::new(), left_out: Vec::new() }
    }

    /// Kernels at the same time, with small axes.
    fn group(kernels: &[Kernel]) -> Subject {
        let kind = format!("{} at once", kernels.len());
        Subject::of(together_name(kernels), kind, trials_together(kernels))
    }

    /// A kernel as it is, whose text in a file was changed: that is for axes of their own lengths.
    fn changed(file: &str, kernel: &Kernel) -> Subject {
        let trial = |sizes| vec![Trial { kernel: kernel.clone(), sizes }];
        let trials = cases(kernel).into_iter().map(trial).collect();
        Subject::of(file.to_owned(), kernel.kind.to_string(), trials)
    }

    /// The same of kernels at the same time, as one new token launches them.
    fn changed_group(file: &str, kernels: &[Kernel]) -> Subject {
        let one = |k: &Kernel| Trial { kernel: k.clone(), sizes: cases(k).swap_remove(0) };
        let trials = vec![kernels.iter().map(one).collect()];
        Subject::of(file.to_owned(), format!("{} at once", kernels.len()), trials)
    }
}

/// The kernels whose texts were changed.
fn changed(
    texts: &Texts,
    target: target::Target,
    kernels: &[Kernel],
    together: &[Vec<Kernel>],
    tuning: &Tuning,
) -> anyhow::Result<Vec<Subject>> {
    let (mut subjects, mut found) = (Vec::new(), Vec::new());
    let file =
        |identity: u64| texts.changed.iter().find(|(_, known)| *known == identity).map(|(file, _)| file);
    let language = target.language().filter(|_| !texts.changed.is_empty());
    let Some(language) = language else { return Ok(subjects) };
    for kernel in kernels {
        for way in iter::once(kernel.clone()).chain(ways(kernel, language)) {
            for file in identities(&way, language)?.into_iter().filter_map(file) {
                if !found.contains(&file) {
                    found.push(file);
                    subjects.push(Subject::changed(file, &way));
                }
            }
        }
    }
    for group in together {
        let own = side_by_side(group, tuning)?;
        let Some(source) = cuda_together_source(&own)? else { continue };
        if let Some(file) = file(source.identity) {
            found.push(file);
            subjects.push(Subject::changed_group(file, &own));
        }
    }
    match texts.changed.iter().find(|(file, _)| !found.contains(&file)) {
        Some((file, _)) => bail!(
            "{file} is the text of no kernel that is checked; give the model, dtype, graphs and passes that the folder was compiled \
             with, and no --kernel that leaves it out"
        ),
        None => Ok(subjects),
    }
}

/// What came of all, and the device's name.
type Rows = (String, Vec<Row>);

/// On a device that cannot be had twice.
fn one_by_one<D: Device>(args: &Args, subjects: &[Subject], mut device: D) -> Rows {
    let name = device.name();
    (name, subjects.iter().map(|s| row(&mut device, s, args.seed)).collect())
}

fn finished(args: &Args, model: &Model, texts: &Texts, (device, kernels): Rows) -> Report {
    let passes = kernels.iter().all(|k| k.passes);
    Report {
        model: model.name.clone(),
        target: args.target,
        device,
        seed: args.seed,
        passes,
        kernels,
        changed: texts.changed.iter().map(|(file, _)| file.clone()).collect(),
        differs: None,
    }
}

/// The trials of kernels that are launched by themselves.
fn single(subjects: &[Subject]) -> impl Iterator<Item = &Trial> {
    let alone = |trial: &'_ Vec<Trial>| trial.len() == 1;
    subjects.iter().flat_map(|s| &s.trials).filter(move |trial| alone(trial)).flatten()
}

/// All cases of a subject, up to the first that fails.
fn row<D: Device>(device: &mut D, subject: &Subject, seed: u64) -> Row {
    let Subject { name, kind, trials, ways, left_out } = subject;
    let mut row = Row {
        name: name.clone(),
        kind: kind.clone(),
        cases: Vec::new(),
        ways: ways.clone(),
        left_out: left_out.clone(),
        failed: None,
        error: None,
        passes: true,
    };
    for together in trials {
        match check_together(device, together, seed) {
            Ok(outcomes) => {
                row.passes = outcomes.iter().all(Outcome::passes);
                row.cases.extend(outcomes);
            }
            Err(e) => {
                row.passes = false;
                let sizes: Vec<_> = together.iter().flat_map(|t| &t.sizes).copied().collect();
                row.error = Some(format!("{}{}", reason(e), shown(&sizes)));
            }
        }
        if !row.passes {
            if let [one] = &together[..] {
                row.failed = Some(device.way(&one.kernel, &one.sizes).way.to_string());
            }
            break;
        }
    }
    row
}

/// The kernel's name stands before it already.
fn reason(e: DeviceError) -> String {
    match e {
        DeviceError::Kernel { why, .. } => why,
        DeviceError::Absent(..)
        | DeviceError::Memory { .. }
        | DeviceError::Arena { .. }
        | DeviceError::NoFloats
        | DeviceError::Index { .. } => e.to_string(),
    }
}

/// Run-time sizes behind a message.
fn shown(sizes: &[usize]) -> String {
    if sizes.is_empty() { String::new() } else { format!(", with sizes {sizes:?}") }
}

/// The table, and for each kernel that fails why, and how to see it again.
fn text(args: &Args, report: &Report, start: Instant) -> String {
    let mut rows = vec![
        ["kernel", "kind", "verdict", "ways", "cases", "worst error", "tolerance"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for k in &report.kernels {
        let worst = k.cases.iter().max_by(|a, b| a.ratio.total_cmp(&b.ratio));
        let number = |of: fn(&Outcome) -> f64| worst.map_or(String::new(), |o| format!("{:.1e}", of(o)));
        let verdict = if k.passes { "ok" } else { "FAILS" };
        let tolerance = number(|o| o.tolerance);
        let (ways, cases) = (k.ways.len().max(1).to_string(), k.cases.len().to_string());
        let cells = [&k.name, &k.kind, verdict, &ways, &cases, &number(|o| o.error), &tolerance];
        rows.push(cells.map(str::to_owned).to_vec());
    }
    let mut text = table(&rows, 3);
    for k in report.kernels.iter().filter(|k| !k.passes) {
        let why =
            k.error.clone().or_else(|| k.cases.iter().find(|o| !o.passes()).map(wrong)).unwrap_or_default();
        // A changed text is known by its file, and is run whatever else is.
        let kernel = (!report.changed.contains(&k.name)).then_some(&k.name);
        let way = k.failed.as_ref().map_or_else(String::new, |way| format!(" (as `{way}`)"));
        let _ = writeln!(text, "\n{}{way}: {why}\n  replay: {}", k.name, replay(args, kernel));
    }
    for k in report.kernels.iter().filter(|k| !k.left_out.is_empty()) {
        let (name, ways) = (&k.name, k.left_out.join("; "));
        let _ = writeln!(
            text,
            "\n{name}: not run, as axes of the sizes that are tried leave no room for it: {ways}"
        );
    }
    for line in report.differs.iter().flatten() {
        let _ = writeln!(text, "\n{line}");
    }
    let cases: usize = report.kernels.iter().map(|k| k.cases.len()).sum();
    let (kernels, seconds) = (report.kernels.len(), start.elapsed().as_secs_f64());
    let ways: usize = report.kernels.iter().map(|k| k.ways.len().max(1)).sum();
    let _ = writeln!(text, "\n{kernels} kernels, {cases} cases, {}, {seconds:.1} s", report.device);
    if ways > kernels {
        let _ = writeln!(
            text,
            "{ways} ways: each kernel in all that it is computed in at the sizes of the model"
        );
    }
    text
}

fn wrong(o: &Outcome) -> String {
    format!(
        "{} of {} elements are off{}, worst at {:?} by {:.1e}, tolerance {:.1e}",
        o.wrong,
        o.elements,
        shown(&o.sizes),
        o.index,
        o.error,
        o.tolerance
    )
}

/// The command that runs this kernel again in the same way.
fn replay(args: &Args, kernel: Option<&String>) -> String {
    let kernel = kernel.map_or_else(String::new, |name| format!(" --kernel {name}"));
    let mut line = format!("latentc check {}{kernel} --target ", args.model);
    let named = |v: &dyn Fn() -> Option<clap::builder::PossibleValue>| {
        v().map_or(String::new(), |v| v.get_name().to_owned())
    };
    line += &named(&|| args.target.to_possible_value());
    for graph in &args.graph {
        line += &format!(" --graph {}", named(&|| graph.to_possible_value()));
    }
    if args.goal.objective {
        line += " --objective";
    }
    if let Some(dtype) = args.dtype {
        line += &format!(" --dtype {}", named(&|| dtype.to_possible_value()));
    }
    line += &(args.passes.words() + &args.form.words());
    if let Some(folder) = args.from.folder() {
        line += &format!(" --from {}", folder.display());
    }
    line += &args.tuning.again();
    line + &format!(" --seed {}", args.seed)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn what_is_to_be_typed_again_is_what_was_asked_for() {
        let of = |line: &str| Line::parse_from(line.split_whitespace().skip(1)).args;
        for line in [
            "latentc check tiny --kernel a_and_2 --target emulate --graph prefill --graph decode --graph train --seed 1",
            "latentc check tiny --kernel a --target host --graph decode --dtype f16 --skip inline,reassociate --seed 3",
            "latentc check tiny --kernel a --target wgpu --graph train --passes expand,inline --seed 1",
            "latentc check tiny --kernel a --target cuda --graph decode --cache int6 --cache-group 32 --cache-rotated-wide --seed 9",
            "latentc check tiny --kernel a --target cuda --graph decode --cache fp8 --from out --tuning t.json --tf32 --seed 9",
            "latentc check tiny --kernel a --target host --graph decode --cache int8 --weights int8 --weight-group 32 --seed 9",
        ] {
            let args = of(line);
            assert_eq!(replay(&args, args.kernel.first()), line);
        }
    }
}
