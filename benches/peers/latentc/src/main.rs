//! `latentc-peer MODEL_DIR`: runs a model on the host as `benches/peers/README.md` asks each peer to, one JSON line for each.

use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use latentc_codegen::host::Host;
use latentc_ir::{DType, Module};
use latentc_models::Goal;
use latentc_models::config::ModelConfig;
use latentc_passes::{Graph, pipeline};
use latentc_runtime::checkpoint::Checkpoint;
use latentc_runtime::compiled::compile_variants;
use latentc_runtime::engine::Engine;
use latentc_runtime::generate::Sampler;
use latentc_runtime::gradient::{Gatherer, Rows};
use latentc_runtime::optimizer::{AdamW, State};
use latentc_runtime::session::{Logits, Session, Tokens};
use latentc_runtime::train::Trainer;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
enum Request {
    /// Reads these texts, equally long, then continues each by so many tokens, the likeliest ones.
    Generate { ids: Vec<Vec<i32>>, steps: usize },
    /// Steps of AdamW on the mean cross entropy of all next tokens.
    Train { ids: Vec<Vec<i32>>, steps: usize },
    /// The most memory that the process has had.
    Peak,
}

struct Peer {
    folder: PathBuf,
    config: ModelConfig,
    dtype: DType,
    checkpoint: Arc<Checkpoint>,
    engine: Engine<Host>,
    /// From the definition to the programs, without weights.
    compile_s: f64,
}

impl Peer {
    fn open(folder: &Path) -> anyhow::Result<Peer> {
        let config = ModelConfig::from_path(folder)?;
        let dtype = config.common().dtype.into();
        let checkpoint = Arc::new(Checkpoint::open(folder)?);
        let folder = folder.to_owned();
        let mut peer = Peer {
            folder,
            config,
            dtype,
            checkpoint,
            engine: Engine::new(Host::with_this_thread()),
            compile_s: 0.0,
        };
        let (engine, seconds) = peer.load(Goal::Logits, &[Graph::Prefill, Graph::Decode])?;
        (peer.engine, peer.compile_s) = (engine, seconds);
        Ok(peer)
    }

    fn trace(&self, goal: Goal) -> anyhow::Result<Module> {
        Ok(latentc_models::trace(&self.config, goal, self.dtype).map_err(|e| anyhow!(e.render()))?.module)
    }

    /// An engine with these graphs, and how long compiling them took.
    fn load(&self, goal: Goal, graphs: &[Graph]) -> anyhow::Result<(Engine<Host>, f64)> {
        let start = Instant::now();
        let definition = self.trace(goal)?;
        let mut compiled = Vec::new();
        for &graph in graphs {
            compiled.extend(compile_variants(&definition, graph, &pipeline())?);
        }
        let seconds = start.elapsed().as_secs_f64();
        let mut engine = Engine::new(Host::new());
        for graph in &compiled {
            engine.add(graph, &self.checkpoint)?;
        }
        Ok((engine, seconds))
    }

    fn generate(&mut self, texts: &[Vec<i32>], steps: usize) -> anyhow::Result<Value> {
        let (batch, len) = (texts.len(), texts.first().map_or(0, Vec::len));
        if len == 0 || texts.iter().any(|t| t.len() != len) {
            bail!("texts must be equally long, and not empty");
        }
        let mut session = Session::new(&mut self.engine, batch, len + steps)?;
        let positions = |from: usize, n: usize| {
            (0..batch).flat_map(|_| from as i32..(from + n) as i32).collect::<Vec<_>>()
        };
        let choose = |logits: &Logits| -> Vec<i32> {
            (0..batch).map(|row| Sampler::greedy().choose(logits.row(row, 0))).collect()
        };
        let start = Instant::now();
        let prompt = Tokens { ids: texts.concat(), positions: positions(0, len), len };
        let mut next = choose(&session.read(Graph::Prefill, &prompt, &vec![len as i32 - 1; batch], 1)?);
        let prefill = start.elapsed().as_secs_f64();
        let (mut made, mut decode) = (vec![next.clone()], Vec::new());
        for step in 0..steps {
            let start = Instant::now();
            let tokens = Tokens { ids: next, positions: positions(len + step, 1), len: 1 };
            next = choose(&session.read(Graph::Decode, &tokens, &vec![0; batch], 1)?);
            decode.push(start.elapsed().as_secs_f64());
            made.push(next.clone());
        }
        Ok(json!({ "prefill": prefill, "decode": decode, "tokens": made }))
    }

    fn train(&self, texts: &[Vec<i32>], steps: usize) -> anyhow::Result<Value> {
        let (engine, compile_s) = self.load(Goal::Loss, &[Graph::Gradient])?;
        let definition = self.trace(Goal::Loss)?;
        let places = Gatherer::new(&definition)?.places().clone();
        let state = State::new(places.read(&Checkpoint::open(&self.folder)?, "")?);
        let mut trainer = Trainer::new(engine, &definition, state)?;
        let rows = Rows::of(texts);
        let with = AdamW { rate: 1e-4, ..AdamW::default() };
        let (mut seconds, mut losses) = (Vec::new(), Vec::new());
        for _ in 0..steps {
            let start = Instant::now();
            let step = trainer.step(std::slice::from_ref(&rows), &with, || false)?;
            seconds.push(start.elapsed().as_secs_f64());
            losses.extend(step.and_then(|s| s.results.first()?.first().copied()));
        }
        Ok(json!({ "seconds": seconds, "loss": losses, "compile": compile_s }))
    }

    fn answer(&mut self, request: Request) -> anyhow::Result<Value> {
        match request {
            Request::Generate { ids, steps } => self.generate(&ids, steps),
            Request::Train { ids, steps } => self.train(&ids, steps),
            Request::Peak => {
                let status = std::fs::read_to_string("/proc/self/status")?;
                let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
                let kib = line
                    .and_then(|l| l.split_whitespace().next())
                    .context("no VmHWM in /proc/self/status")?;
                Ok(json!({ "bytes": kib.parse::<u64>()? * 1024 }))
            }
        }
    }
}

fn main() -> anyhow::Result<()> {
    let folder = std::env::args_os().nth(1).context("usage: latentc-peer MODEL_DIR")?;
    let mut peer = Peer::open(Path::new(&folder))?;
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{}",
        json!({ "name": concat!("latentc ", env!("CARGO_PKG_VERSION")), "compile": peer.compile_s })
    )?;
    for line in io::stdin().lock().lines() {
        let answer = peer.answer(serde_json::from_str(&line?)?)?;
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}
