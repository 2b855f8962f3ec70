//! `latentc train`: a model learns from texts.

mod balance;
mod metrics;
mod plot;
mod read;
mod saved;
mod settings;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use latentc_codegen::device::Device;
use latentc_models::Goal;
use latentc_passes::Graph;
use latentc_runtime::checkpoint::Checkpoint;
use latentc_runtime::gradient::{Gatherer, Rows};
use latentc_runtime::optimizer::{AdamW, State};
use latentc_runtime::train::budget;
use latentc_runtime::train::data::{Data, Order};
use latentc_runtime::train::schedule::Schedule;
use latentc_runtime::train::{Trainer, save};
use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGTERM};

use self::balance::Balance;
use self::metrics::{Metrics, Record};
use self::saved::{Saved, Saves};
use self::settings::Settings;
use crate::edits::Texts;
use crate::model::{self, Model};
use crate::target::{Job, with_texts};
use crate::tuning::TuningArgs;
use crate::{print, print_json, progress};

/// Trains a model on texts, from the weights that it has: random ones of `latentc init`, or others that are to be tuned.
///
/// FILES are, by their names: `.jsonl`, one JSON value a line, which is {"text": …}, a document; {"prompt": …, "completion": …}, of
/// which only the completion is learned; or an array of token ids, a document. `.safetensors` with `input_ids` of i64 or i32, each row
/// a document. `.bin`, token ids in little endian, of 2 bytes where the vocabulary has at most 65,536 tokens, else of 4. All
/// else is text in UTF-8, each file a document. Texts need a tokenizer.json in the model's folder.
///
/// Of models with experts it minimises the balance losses of the paper as well, where config.json or a flag gives them a weight, drops
/// tokens where that is asked for, and tells in any case how evenly experts are used.
///
/// Documents end with the configuration's eos_token_id if it has one, and are packed: one behind the other, cut into sequences.
/// A prompt and its completion are a sequence of their own.
///
/// OUT becomes a model folder. `checkpoints` in it holds the last two checkpoints, each a model folder with the optimiser's state;
/// metrics.jsonl tells of every step and loss.svg draws them. An interrupt writes a checkpoint, and `--resume OUT` goes on from
/// the last one exactly as if nothing had happened.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A folder with config.json and weights.
    #[arg(required_unless_present = "resume")]
    model: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    /// The folder to make; there must be nothing in it.
    #[arg(short, long, value_name = "OUT", required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Go on with a training that ended early; model, data and numbers are as they were.
    #[arg(long, value_name = "OUT", conflicts_with_all = ["model", "out", "data", "steps"])]
    resume: Option<PathBuf>,
    /// End after this step, with a checkpoint; the schedule remains that of all steps.
    #[arg(long, value_name = "STEP")]
    until: Option<u64>,
    #[command(flatten)]
    tuning: TuningArgs,
    /// Print the summary as one JSON object, and nothing on the way.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    out: PathBuf,
    /// Steps made in all.
    step: u64,
    steps: u64,
    /// The loss of the last step, if this run made one.
    loss: Option<f64>,
    /// The last validation loss.
    valid_loss: Option<f64>,
    /// How evenly experts were used in the last step.
    #[serde(flatten)]
    balance: Option<Balance>,
    /// Targets learned by this run.
    tokens: u64,
    seconds: f64,
    tokens_per_s: f64,
    interrupted: bool,
    target: &'static str,
    device: String,
}

/// A training whose arguments were checked.
struct Train {
    model: Model,
    /// What to begin or go on with.
    from: PathBuf,
    /// Steps made before.
    made: u64,
    settings: Settings,
    schedule: Schedule,
    data: Data,
    saves: Saves,
    until: u64,
    json: bool,
}

pub(crate) fn train(args: &Args) -> anyhow::Result<()> {
    let (model, from, saved, saves) = match (&args.resume, &args.model, &args.out) {
        (Some(out), _, _) => {
            let mut saves = Saves::open(out)?;
            let (from, saved) = saves.last()?;
            // What it is to minimise stands in its configuration.
            (model::open(&from)?, from, saved, saves)
        }
        (None, Some(folder), Some(out)) => {
            let mut model = model::open(folder)?;
            let settings = args.settings.checked(&model)?;
            balance::configure(&mut model, &settings)?;
            let saves = Saves::begin(out)?;
            (model, folder.clone(), Saved { settings, step: 0, fingerprint: String::new() }, saves)
        }
        (None, _, _) => bail!("give a model folder and --out, or --resume"),
    };
    let Saved { settings, step: made, fingerprint } = saved;
    let schedule = settings.schedule();
    let until = args.until.unwrap_or(schedule.steps).min(schedule.steps);
    let data = read::read(&from, &model, &settings)?.exempt(settings.exempt, settings.seed);
    let now = format!("{:016x}", data.fingerprint());
    if args.resume.is_some() && now != fingerprint {
        bail!(
            "the data are not those that {} was trained on: {} tokens in {} sequences of {}; \
             training cannot go on as it began",
            saves.folder().display(),
            data.tokens(),
            data.len(),
            list(&settings.data)
        );
    }
    let target = settings.target;
    let job = Train { model, from, made, settings, schedule, data, saves, until, json: args.json };
    with_texts(target, &Texts::default(), &args.tuning.read(target)?, job)
}

fn list(files: &[PathBuf]) -> String {
    files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl Job for Train {
    fn on<D: Device>(self, device: D) -> anyhow::Result<()> {
        let Train { model, from, made, settings, schedule, data, mut saves, until, json } = self;
        let stop = interrupts()?;
        let stopped = || stop.load(Ordering::Relaxed);
        let dtype = model.dtype(settings.dtype);
        let definition = model.trace_to(Goal::Objective, dtype)?;
        let sequences = (settings.micro() as u64).min(settings.batch);
        let sizes = (sequences, settings.context as u64);
        let step = budget::within(&definition, settings.memory_budget, sizes, &settings.target.layout())
            .context("--memory-budget")?;
        // What is validated is how well texts are told, whatever else is minimised.
        let mut engine = model.load(&from, device, dtype, &[Graph::Train.into()])?;
        engine.add(&step.compiled, &Arc::new(Checkpoint::open(&from)?))?;
        let places = Gatherer::new(&definition)?.places().clone();
        let state = match made {
            0 if !saves.any() => State::new(places.read(&Checkpoint::open(&from)?, "")?),
            _ => save::read(&from, &places, u32::try_from(made)?)?,
        };
        let mut trainer = Trainer::new(engine, &definition, state)?;
        let saved = |step| Saved {
            settings: settings.clone(),
            step,
            fingerprint: format!("{:016x}", data.fingerprint()),
        };
        if !saves.any() {
            saves.describe(&from, &model, settings.dtype)?;
            saves.write(&saved(0), &mut trainer)?;
        }

        let (train, valid) = Order::split(data.len(), settings.validation(data.len()), settings.seed);
        let valid: Vec<Rows> = valid.chunks(settings.micro()).map(|part| data.rows(part)).collect();
        let mut order = Order::new(train, settings.seed);
        let mut metrics = Metrics::open(saves.folder(), made)?;
        let mut shown = Shown::new(made, schedule.steps, json);
        let (begun, mut tokens, mut last_saved, mut step) = (Instant::now(), 0u64, made, made);
        while step < until && !stopped() {
            let positions = schedule.seen(step)..schedule.seen(step + 1);
            let batch: Vec<usize> = positions.filter_map(|n| order.at(n)).collect();
            let parts: Vec<Rows> = batch.chunks(settings.micro()).map(|part| data.rows(part)).collect();
            let with = AdamW {
                rate: schedule.rate(step),
                decay: settings.weight_decay,
                most: settings.clip,
                ..AdamW::default()
            };
            let start = Instant::now();
            let Some(done) = trainer.step(&parts, &with, stopped)? else { break };
            let learned: u64 = batch.iter().map(|&n| data.targets(n) as u64).sum();
            tokens += learned;
            step += 1;
            let due = |every: u64, end: u64| every > 0 && step.is_multiple_of(every) || step == end;
            let valid_loss = if due(settings.valid_every, schedule.steps) && !valid.is_empty() {
                trainer.loss(&valid, stopped)?
            } else {
                None
            };
            let record = Record {
                step,
                objective: balance::number(&done.results, 0)?,
                loss: balance::number(&done.results, 1)?,
                balance: Balance::of(&model.config, &done.results)?,
                grad_norm: done.clipping.norm,
                rate: with.rate,
                sequences: batch.len(),
                tokens: learned,
                tokens_per_s: learned as f64 / start.elapsed().as_secs_f64(),
                valid_loss,
            };
            shown.step(&record, tokens as f64 / begun.elapsed().as_secs_f64());
            metrics.add(record)?;
            if due(settings.save_every, until) {
                saves.write(&saved(step), &mut trainer)?;
                metrics.plot()?;
                last_saved = step;
            }
        }
        if step != last_saved {
            saves.write(&saved(step), &mut trainer)?;
        }
        metrics.plot()?;
        drop(shown);

        let seconds = begun.elapsed().as_secs_f64();
        let report = Report {
            out: saves.folder().to_owned(),
            step,
            steps: schedule.steps,
            loss: (step > made).then(|| metrics.last(|r| Some(r.loss))).flatten(),
            valid_loss: metrics.last(|r| r.valid_loss),
            balance: metrics.last(|r| Some(r.balance.clone())).flatten(),
            tokens,
            seconds,
            tokens_per_s: tokens as f64 / seconds,
            interrupted: stopped(),
            target: settings.target.name(),
            device: trainer.device().name(),
        };
        if json { print_json(&report) } else { print(&summary(&report)) }
    }
}

fn summary(r: &Report) -> String {
    let loss = r.loss.map_or(String::new(), |x| format!(", loss {x:.4}"));
    let valid = r.valid_loss.map_or(String::new(), |x| format!(", validation {x:.4}"));
    let load = r.balance.as_ref().map_or(String::new(), Balance::text);
    let how = if r.interrupted { "interrupted, " } else { "" };
    let out = r.out.display();
    let mut text = format!(
        "{out}: {how}step {} of {}{loss}{valid}{load}, {} tokens, {:.1} s on {}\n",
        r.step, r.steps, r.tokens, r.seconds, r.device
    );
    if r.step < r.steps {
        text += &format!("to go on: latentc train --resume {out}\n");
    }
    text
}

/// A flag that an interrupt sets; a second one ends the process at once.
fn interrupts() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first one finds the flag down.
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&flag))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&flag)))
            .context("cannot wait for interrupts")?;
    }
    Ok(flag)
}

/// Progress: a bar on a terminal, else a line now and then.
struct Shown {
    bar: Option<progress::Shown>,
    lines: bool,
    last: Instant,
}

impl Shown {
    fn new(made: u64, steps: u64, json: bool) -> Shown {
        let terminal = progress::is_drawn();
        let bar = (terminal && !json).then(|| progress::steps(made, steps));
        Shown { bar, lines: !terminal && !json, last: Instant::now() }
    }

    fn step(&mut self, r: &Record, tokens_per_s: f64) {
        let added = r.objective - r.loss;
        let added = if added > 0.0 { format!(", balance {added:.4}") } else { String::new() };
        let load = r.balance.as_ref().map_or(String::new(), Balance::text);
        let text =
            format!("loss {:.4}{added}{load}, rate {:.2e}, {tokens_per_s:.0} tokens/s", r.loss, r.rate);
        if let Some(bar) = &self.bar {
            bar.say(text.clone());
            bar.advance(1);
        }
        if self.lines && (self.last.elapsed() > Duration::from_secs(10) || r.valid_loss.is_some()) {
            let valid = r.valid_loss.map_or(String::new(), |x| format!(", validation {x:.4}"));
            eprintln!("step {}: {text}{valid}", r.step);
            self.last = Instant::now();
        }
    }
}

/// The file of this name in a folder, for messages.
fn file(folder: &Path, name: &str) -> String {
    folder.join(name).display().to_string()
}
