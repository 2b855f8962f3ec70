//! The graphs of a model, and the engines that run them: one for each device that they were run on.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::StreamId;
use burn_cubecl::cubecl::future::block_on;
use burn_cubecl::tensor::CubeTensor;
use latentc_codegen::cube::{CubeBuffer, CubeDevice};
use latentc_codegen::device::DeviceError;
use latentc_ir::{DType, Module};
use latentc_models::config::{ConfigError, ModelConfig};
use latentc_models::{Goal, trace};
use latentc_passes::{Gradients, Graph, Wanted as Form, differentiate, pipeline};
use latentc_runtime::checkpoint::CheckpointError;
use latentc_runtime::compiled::{CompileError, Compiled, compile};
use latentc_runtime::engine::{Engine, Given, Resident, RunError, Wanted};
use latentc_runtime::load::LoadError;

use crate::backend::{CubeclBackend, CubeclRuntime, buffer, burn_dtype, tensor};
use crate::parts::Parts;

/// What a [`CompiledModule`](crate::CompiledModule) computes, as the author wrote it. All three have the same stored tensors.
#[derive(Clone, Debug)]
pub struct Definition {
    /// `(tok: i32[b, t], at: i32[b, q])` to the logits `[b, q, v]` behind the positions `at`.
    pub logits: Module,
    /// `(tok: i32[b, t], target: i32[b, t], weight: f32[b, t])` to a loss.
    pub loss: Module,
    /// `(tok: i32[b, t], target: i32[b, t], weight: f32[b, t], here: f32[b, t], part: f32, bound: f32[b])` to what training minimises, and
    /// what else it tells.
    pub objective: Module,
}

impl Definition {
    /// Of a configuration, with weights and activations of this dtype.
    ///
    /// # Errors
    /// If the equations do not fit the configuration.
    pub fn of(config: &ModelConfig, dtype: DType) -> Result<Definition, ModuleError> {
        let module = |goal| match trace(config, goal, dtype) {
            Ok(traced) => Ok(traced.module),
            Err(e) => Err(ModuleError::Definition(e.to_string())),
        };
        let [logits, loss, objective] = [Goal::Logits, Goal::Loss, Goal::Objective].map(module);
        Ok(Definition { logits: logits?, loss: loss?, objective: objective? })
    }
}

/// Why there is no module, or it did not run.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// The configuration was not read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The equations do not fit the configuration.
    #[error("{0}")]
    Definition(String),
    /// The graphs were not compiled.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// The files are not right.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The weights do not fit the definition.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Arguments do not fit the graph or each other, or the device failed.
    #[error(transparent)]
    Run(#[from] RunError),
    /// There is no such device, or it cannot hold what it is to hold.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A tensor of a record, or one that a module was given, is not what the module has of that name.
    #[error("{0}")]
    Mismatch(String),
    /// The backend's floats are of a kind that the kernels do not hold as it does.
    #[error("{backend} tensors of {dtype} are not what kernels for {target} hold; use f32")]
    Floats {
        /// The backend.
        backend: String,
        /// Its floats.
        dtype: String,
        /// The language.
        target: String,
    },
}

/// Which graph of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// Logits of whole sequences.
    Logits,
    /// The loss.
    Loss,
    /// The loss, and its gradient by every weight.
    Gradient,
    /// What training minimises, what else it tells, and the gradient of the former.
    Objective,
}

impl Which {
    const ALL: [Which; 4] = [Which::Logits, Which::Loss, Which::Gradient, Which::Objective];

    fn graph(self) -> Graph {
        match self {
            Which::Logits | Which::Loss => Graph::Train,
            Which::Gradient | Which::Objective => Graph::Gradient,
        }
    }

    fn of(self, definition: &Definition) -> &Module {
        match self {
            Which::Logits => &definition.logits,
            Which::Loss | Which::Gradient => &definition.loss,
            Which::Objective => &definition.objective,
        }
    }
}

/// Weights that were put together of several stored tensors, or of parts, by what the engine calls them.
pub(crate) type Gathered = BTreeMap<String, CubeBuffer>;

/// A tensor for a run, and the dtype that its elements have.
pub(crate) type Argument<R> = (CubeTensor<R>, DType);

/// What finds a parameter by its name: in the dtype that is wanted, if it has another.
pub(crate) type Stored<'s, R> = &'s dyn Fn(&str, DType) -> Result<CubeTensor<R>, ModuleError>;

/// The graphs of one model on the devices of one runtime.
pub(crate) struct Programs<R: CubeclRuntime> {
    compiled: Vec<Compiled>,
    /// Of each graph, where the gradients that it returns belong, in their order, and how many results are before them.
    gradients: Vec<(Vec<Parts>, usize)>,
    running: Mutex<Vec<Running<R>>>,
}

struct Running<R: CubeclRuntime> {
    on: R::Place,
    engine: Engine<CubeDevice<R>>,
    programs: Vec<(Given, Vec<(Wanted, Parts)>)>,
    /// The thread's stream that ran last.
    stream: StreamId,
}

impl<R: CubeclRuntime> fmt::Debug for Programs<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.compiled.iter().map(|c| &c.program.name).collect();
        f.debug_struct("Programs").field("compiled", &names).finish_non_exhaustive()
    }
}

impl<R: CubeclRuntime> Programs<R> {
    /// Compiles a definition.
    pub(crate) fn new(definition: &Definition) -> Result<Programs<R>, ModuleError> {
        // burn's gradients have the dtype of their parameter.
        let wanted = |which: Which| Form { gradients: Gradients::Weights, ..which.graph().into() };
        let compiled = |which: Which| compile(which.of(definition), wanted(which), &pipeline());
        let part = |(scope, f, n): (String, &latentc_ir::Function, usize)| {
            let weight = &f.weights[n];
            let layout = weight.stored.layout(f, f.ty(weight.value)).map_err(LoadError::Layout)?;
            Ok(Parts::of(&scope, &layout))
        };
        let gradients = |which: Which| {
            let module = which.of(definition);
            let weights = match which.graph() {
                Graph::Gradient => differentiate::weights(module),
                Graph::Train | Graph::Prefill | Graph::Decode => Vec::new(),
            };
            let parts = weights.into_iter().map(part).collect::<Result<_, LoadError>>()?;
            Ok((parts, module.entry().map_or(0, |f| f.results.len())))
        };
        Ok(Programs {
            compiled: Which::ALL.into_iter().map(compiled).collect::<Result<_, _>>()?,
            gradients: Which::ALL.into_iter().map(gradients).collect::<Result<_, LoadError>>()?,
            running: Mutex::new(Vec::new()),
        })
    }

    /// Runs a graph. `args` are by the names of its parameters, and `stored` are the parameters of the module. What is gathered of
    /// them is taken from `gathered` and left there, if that is to be kept.
    pub(crate) fn run<B: CubeclBackend<Runtime = R>>(
        &self,
        which: Which,
        stored: Stored<'_, R>,
        args: Vec<(&str, Argument<R>)>,
        gathered: Option<&mut Gathered>,
    ) -> Result<Vec<CubeTensor<R>>, ModuleError> {
        let Some((_, (like, _))) = args.first() else { return Ok(Vec::new()) };
        let like = like.clone();
        let mut running = self.on(&like)?;
        let Some(running) = running.iter_mut().find(|r| r.on == like.device) else { return Ok(Vec::new()) };
        running.wait(&like)?;
        let mut own = Gathered::new();
        let results = running.run::<B>(which, stored, args, gathered.unwrap_or(&mut own));
        // Parameters are their owner's again, who may change them in place.
        running.take_back(which)?;
        let results = results?;
        let dtype = |r: &Resident<CubeBuffer>| {
            let dtype = r.buffer.dtype();
            let none = || RunError::Argument(format!("burn has no tensors for a result of {dtype}"));
            burn_dtype(dtype).ok_or_else(none)
        };
        Ok(results.iter().map(|r| Ok(tensor(&like, r, dtype(r)?))).collect::<Result<_, RunError>>()?)
    }

    /// From the results of a graph: those of the definition, and the gradient of the first by stored tensor, in f32 or what the graph returns.
    pub(crate) fn gradients<B: CubeclBackend<Runtime = R>>(
        &self,
        which: Which,
        mut results: Vec<CubeTensor<R>>,
    ) -> (Vec<CubeTensor<R>>, BTreeMap<String, CubeTensor<R>>) {
        let (parts, before) = &self.gradients[which as usize];
        let gradients = results.split_off((*before).min(results.len()));
        let mut sums = BTreeMap::new();
        for (parts, gradient) in parts.iter().zip(gradients) {
            parts.scatter::<B>(gradient, &mut sums);
        }
        (results, sums)
    }

    /// The engines, one for the device of `like` among them.
    fn on(&self, like: &CubeTensor<R>) -> Result<MutexGuard<'_, Vec<Running<R>>>, ModuleError> {
        // What a panic left half done is done anew at the next run.
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if !running.iter().any(|r| r.on == like.device) {
            let device = CubeDevice::new(R::client(&like.device), format!("{:?}", like.device));
            let mut engine = Engine::new(device);
            let mut programs = Vec::new();
            for compiled in &self.compiled {
                let program = engine.add_given(compiled)?;
                let wanted = engine.wanted(program).into_iter();
                let wanted = wanted.map(|w| {
                    let parts = Parts::of(&w.scope, &w.layout);
                    (w, parts)
                });
                programs.push((program, wanted.collect()));
            }
            running.push(Running { on: like.device.clone(), engine, programs, stream: StreamId::current() });
        }
        Ok(running)
    }
}

impl<R: CubeclRuntime> Running<R> {
    /// Waits for what another thread launched: temporaries are shared, and each thread has a stream of its own.
    fn wait(&mut self, like: &CubeTensor<R>) -> Result<(), ModuleError> {
        let stream = StreamId::current();
        if self.stream != stream {
            let fail = |e: &dyn fmt::Display| RunError::Argument(format!("waiting for the device: {e}"));
            block_on(like.client.sync()).map_err(|e| fail(&e))?;
            self.stream = stream;
        }
        Ok(())
    }

    fn run<B: CubeclBackend<Runtime = R>>(
        &mut self,
        which: Which,
        stored: Stored<'_, R>,
        args: Vec<(&str, Argument<R>)>,
        gathered: &mut Gathered,
    ) -> Result<Vec<Resident<CubeBuffer>>, ModuleError> {
        let (program, wanted) = &self.programs[which as usize];
        for (weight, parts) in wanted {
            let given = match gathered.get(&weight.key) {
                Some(known) => known.clone(),
                None => {
                    let tensors = parts.names().iter().map(|name| stored(name, weight.dtype));
                    let mut tensors = tensors.collect::<Result<Vec<_>, _>>()?;
                    let whole = weight.layout.is_identity();
                    let made = if whole { tensors.remove(0) } else { parts.gather::<B>(tensors) };
                    let made = buffer(self.engine.device(), made, weight.dtype)?.buffer;
                    if !whole {
                        gathered.insert(weight.key.clone(), made.clone());
                    }
                    made
                }
            };
            self.engine.give(&weight.key, Some(given))?;
        }
        let params = self.engine.params(*program);
        let mut passed = Vec::with_capacity(params.len());
        for (name, axes) in &params {
            let arg = args.iter().find(|(n, _)| n == name);
            let missing =
                || RunError::Argument(format!("the graph wants `{name}`, which a module does not have"));
            let (_, (tensor, dtype)) = arg.ok_or_else(missing)?;
            let mut arg = buffer(self.engine.device(), tensor.clone(), *dtype)?;
            // A scalar has an axis in burn.
            if *axes == 0 && arg.shape == [1] {
                arg.shape.clear();
            }
            passed.push(arg);
        }
        let results = self.engine.run_given(*program, passed)?;
        Ok(results)
    }

    fn take_back(&mut self, which: Which) -> Result<(), ModuleError> {
        for (weight, _) in &self.programs[which as usize].1 {
            self.engine.give(&weight.key, None)?;
        }
        Ok(())
    }
}

/// The names that a definition's stored tensors have, and their extents, in the order of their names.
pub(crate) fn inventory(definition: &Definition) -> Result<Vec<(String, Vec<usize>)>, ModuleError> {
    let list = |module: &Module| {
        let inventory = module.inventory().map_err(LoadError::Layout)?;
        let extents = |shape: &[u64]| shape.iter().map(|&n| n as usize).collect::<Vec<_>>();
        let mut list: Vec<_> =
            inventory.tensors.iter().map(|t| (t.name.clone(), extents(&t.shape))).collect();
        list.sort();
        Ok::<_, LoadError>(list)
    };
    let loss = list(&definition.loss)?;
    for (what, other) in [("logits", &definition.logits), ("objective", &definition.objective)] {
        if list(other)? != loss {
            let what = format!("the {what} and the loss of a definition do not read the same tensors");
            return Err(ModuleError::Definition(what));
        }
    }
    Ok(loss)
}
