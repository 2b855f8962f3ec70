//! Which model is meant, and its definition as IR.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::ValueEnum;
use latentc_codegen::device::Device;
use latentc_ir::{DType, Module};
use latentc_models::Goal;
use latentc_models::config::{self, ModelConfig};
use latentc_passes::{Graph, Pass, Wanted, pipeline};
use latentc_runtime::checkpoint::Checkpoint;
use latentc_runtime::compiled::{Compiled, compile_variants};
use latentc_runtime::engine::Engine;
use serde::{Deserialize, Serialize};

use crate::{Rendered, progress};

/// A function, and its values that are marked with `cache`.
type Marked = (String, Vec<String>);

/// A model of the command line.
pub(crate) struct Model {
    /// The bundled name, or what the configuration calls its kind: a path would say where something was made.
    pub(crate) name: String,
    pub(crate) config: ModelConfig,
    /// What its graphs of whole sequences compute.
    trains: Goal,
}

/// What graphs of whole sequences compute.
#[derive(clap::Args)]
pub(crate) struct GoalArgs {
    /// In train and gradient, what `latentc train` minimises in place of the cross entropy alone: with the balance losses and the
    /// dropping of tokens that config.json asks for.
    #[arg(long)]
    pub(crate) objective: bool,
}

/// The element type of weights and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DTypeArg {
    F32,
    Bf16,
    F16,
}

/// A graph of a definition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum GraphArg {
    /// Many new tokens behind a history.
    Prefill,
    /// One new token behind a history.
    Decode,
    /// Whole sequences and their loss.
    Train,
    /// Whole sequences, their loss and its gradient by every weight.
    Gradient,
}

impl From<GraphArg> for Graph {
    fn from(arg: GraphArg) -> Graph {
        match arg {
            GraphArg::Prefill => Graph::Prefill,
            GraphArg::Decode => Graph::Decode,
            GraphArg::Train => Graph::Train,
            GraphArg::Gradient => Graph::Gradient,
        }
    }
}

impl DTypeArg {
    /// The name in `config.json`.
    pub(crate) fn torch_name(self) -> &'static str {
        match self {
            DTypeArg::F32 => config::DType::F32.torch_name(),
            DTypeArg::Bf16 => config::DType::BF16.torch_name(),
            DTypeArg::F16 => config::DType::F16.torch_name(),
        }
    }
}

impl Model {
    /// The model of that name or path.
    pub(crate) fn find(model: &str) -> anyhow::Result<Model> {
        if Path::new(model).exists() {
            let config = ModelConfig::from_path(model)?;
            return Ok(Model::of(config.model_type().to_owned(), config));
        }
        if !ModelConfig::bundled_names().contains(&model) {
            bail!(
                "unknown model `{model}`: there is no such folder or file, and of that name none is bundled; \
                 bundled: {}",
                ModelConfig::bundled_names().join(", ")
            );
        }
        Ok(Model::of(model.to_owned(), ModelConfig::bundled(model)?))
    }

    fn of(name: String, config: ModelConfig) -> Model {
        Model { name, config, trains: Goal::Loss }
    }

    /// Its graphs are to compute this.
    pub(crate) fn to(mut self, goal: &GoalArgs) -> Model {
        if goal.objective {
            self.trains = Goal::Objective;
        }
        self
    }

    /// What graphs of a kind compute.
    fn goal(&self, graph: Graph) -> Goal {
        match graph {
            Graph::Train | Graph::Gradient => self.trains,
            Graph::Prefill | Graph::Decode => Goal::Logits,
        }
    }

    /// The dtype asked for, or else the configuration's.
    pub(crate) fn dtype(&self, wanted: Option<DTypeArg>) -> DType {
        match wanted {
            Some(DTypeArg::F32) => DType::F32,
            Some(DTypeArg::Bf16) => DType::Bf16,
            Some(DTypeArg::F16) => DType::F16,
            None => self.config.common().dtype.into(),
        }
    }

    /// The verified definition that a graph is made of.
    pub(crate) fn trace(&self, graph: Graph, dtype: DType) -> anyhow::Result<Module> {
        self.trace_to(self.goal(graph), dtype)
    }

    /// The verified definition that computes this.
    pub(crate) fn trace_to(&self, goal: Goal, dtype: DType) -> anyhow::Result<Module> {
        Ok(self.trace_marked(goal, dtype)?.0)
    }

    /// A graph after these passes, once for each range of sizes that wants it otherwise. Where its author marked other
    /// values with `cache` than are kept, a warning says so.
    pub(crate) fn compile(
        &self,
        wanted: impl Into<Wanted>,
        dtype: DType,
        passes: &[Pass],
    ) -> anyhow::Result<Vec<Compiled>> {
        let wanted = wanted.into();
        let graph = wanted.graph;
        let (module, marked) = self.trace_marked(self.goal(graph), dtype)?;
        let mut variants = compile_variants(&module, wanted, passes)
            .with_context(|| format!("the {} graph of {}", graph.name(), self.name))?;
        // What is kept of a token is the same in all of them.
        if let Some(compiled) = variants.last_mut() {
            for remark in compiled.compare_caches(marked.iter().map(|(f, values)| (f.as_str(), &values[..])))
            {
                eprint!("{remark}");
            }
        }
        Ok(variants)
    }

    /// The definition, and what its author marked with `cache`, by function.
    fn trace_marked(&self, goal: Goal, dtype: DType) -> anyhow::Result<(Module, Vec<Marked>)> {
        let traced = latentc_models::trace(&self.config, goal, dtype).map_err(|e| Rendered(e.render()))?;
        if let Err(broken) = latentc_ir::verify(&traced.module) {
            let lines: Vec<_> = broken.iter().map(ToString::to_string).collect();
            bail!("the definition of {} breaks rules of the IR:\n  {}", self.name, lines.join("\n  "));
        }
        let marked = traced.cached.into_iter().map(|c| (c.function, c.values)).collect();
        Ok((traced.module, marked))
    }

    /// These graphs with the weights of the folder, on a device; each computes what graphs of its kind do.
    pub(crate) fn load<D: Device>(
        &self,
        folder: &Path,
        device: D,
        dtype: DType,
        graphs: &[Wanted],
    ) -> anyhow::Result<Engine<D>> {
        let _spinner = progress::spinner("loading weights");
        let checkpoint = Arc::new(Checkpoint::open(folder)?);
        let mut engine = Engine::new(device);
        for &wanted in graphs {
            for compiled in self.compile(wanted, dtype, &pipeline())? {
                engine.add(&compiled, &checkpoint)?;
            }
        }
        Ok(engine)
    }
}

/// A folder with configuration and weights.
pub(crate) fn open(folder: &Path) -> anyhow::Result<Model> {
    if !folder.exists() {
        bail!(
            "{}: there is no such folder; give a model folder with config.json and weights",
            folder.display()
        );
    }
    if !folder.is_dir() {
        bail!("{}: not a folder; give a model folder with config.json and weights", folder.display());
    }
    let config = ModelConfig::from_path(folder)?;
    Ok(Model::of(config.model_type().to_owned(), config))
}
