//! Programs on a device: their weights, their caches, and one run after another.
//!
//! Routines are functions of a program, *instances* are their calls: sixty equal layers are one routine and sixty instances,
//! each with its own weights and caches. The graphs of one definition share both, so a sequence that one has read another
//! goes on with. Temporaries have places that a [`Plan`] gives them, in memory that is kept from run to run.

mod given;
mod laid;
mod launch;
mod room;
mod sizes;

use std::collections::BTreeMap;
use std::sync::Arc;

use latentc_codegen::device::{self, Data, Device, DeviceError};
use latentc_codegen::memory::PlanError;
use latentc_codegen::program::{Buffer, BufferId, Program, Role, Routine, Step};
use latentc_ir::interp::scoped;
use latentc_ir::{AxisId, DType, Factor, Function, Layout, Size, Weight};
use latentc_passes::{Graph, Guard};
use smallvec::SmallVec;

use crate::checkpoint::Checkpoint;
use crate::compiled::Compiled;
use crate::load::{self, LoadError};
use crate::places::Places;

use laid::{At, Laid};
use sizes::{Extent, Names, Sizes};

pub use given::{Given, Resident, Wanted};
pub use launch::{Launch, Launcher, Source, at_once};

/// A place in [`Engine::heap`].
type Slot = usize;

/// What makes a weight on a device, given the scope of a call, its function and the weight; `None` leaves its place empty, for what will
/// be given.
pub type Make<'m, D> =
    &'m mut dyn FnMut(&mut D, &str, &Function, &Weight) -> Result<Option<<D as Device>::Buffer>, LoadError>;

/// Plans count with a past that is longer by less than so many positions, so that decode does not make one for every token.
const PAST: usize = 256;

/// Programs with their memory on a device.
#[derive(Debug)]
pub struct Engine<D: Device> {
    device: D,
    graphs: Vec<Loaded>,
    heap: Vec<Option<D::Buffer>>,
    /// Where what is in each place of the heap comes from.
    sources: Vec<Source>,
    /// Where temporaries lie: what the plans of all graphs so far have needed, and its length.
    pages: Vec<(u64, D::Arena)>,
    /// Weights by what they hold.
    weights: BTreeMap<String, Held>,
    /// Caches by their names below their scopes.
    caches: BTreeMap<String, Cache>,
    /// Pages of the pools, if they are to be another number than what all sequences may fill.
    pool_pages: Option<usize>,
    /// Tokens of a sequence that one run reads at most, if someone said so.
    chunk: Option<usize>,
    /// Bytes of all caches.
    cached: u64,
    /// Slots of the pools that are there.
    slots: usize,
    /// Whether the next launch is the first of a run.
    begins: bool,
}

/// A program and its instances.
#[derive(Debug)]
struct Loaded {
    /// Which graph of the model it is, if it is one.
    graph: Option<Graph>,
    /// For which sizes it is, unless for all.
    guard: Option<Guard>,
    program: Arc<Program>,
    /// The key of the first of its kernels; those of the others follow.
    keys: u64,
    /// The entry's is the last.
    instances: Vec<Instance>,
    /// The sizes that a run must know.
    names: Names,
    /// Where arguments of a run are, and results that have no places in the plan.
    args: Vec<Slot>,
    results: Vec<Slot>,
    /// The last run, laid out, and the sizes that its plan is right for.
    laid: Option<(Sizes, Arc<Laid>)>,
    /// Whether the caller has memory for its results, so that they need no place in the plan.
    elsewhere: bool,
}

/// A call of a routine: where its own buffers are, and the instances that it calls, by step.
#[derive(Debug)]
struct Instance {
    routine: usize,
    owned: Vec<(BufferId, Slot)>,
    calls: BTreeMap<usize, usize>,
}

/// A weight on the device, and of which stored tensors it is made.
#[derive(Debug)]
struct Held {
    slot: Slot,
    dtype: DType,
    scope: String,
    layout: Layout,
    /// Whether it holds their elements, not what these are coded as.
    elements: bool,
    bytes: u64,
}

/// A buffer that outlives a run. Its first dimension grows with the sequence.
#[derive(Debug)]
struct Cache {
    slot: Slot,
    dtype: DType,
    dims: Vec<Size>,
}

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Temporaries cannot lie in the device's memory.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// What was passed does not fit the program.
    #[error("{0}")]
    Argument(String),
}

/// An argument or a result: elements and extents.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// The elements, the last axis fastest.
    pub data: Data,
    /// The extents.
    pub shape: Vec<usize>,
}

impl Value {
    /// Integers of that shape.
    pub fn i32(data: Vec<i32>, shape: &[usize]) -> Value {
        Value { data: Data::I32(data), shape: shape.to_vec() }
    }

    /// Floats of that shape.
    pub fn f32(data: Vec<f32>, shape: &[usize]) -> Value {
        Value { data: Data::F32(data), shape: shape.to_vec() }
    }

    /// Becomes other integers, in the memory of those that there were.
    pub(crate) fn refill(&mut self, integers: &[i32], shape: [usize; 2]) {
        let mut held = match std::mem::replace(&mut self.data, Data::I32(Vec::new())) {
            Data::I32(held) => held,
            Data::F32(_) => Vec::new(),
        };
        held.clear();
        held.extend_from_slice(integers);
        self.data = Data::I32(held);
        self.shape.clear();
        self.shape.extend(shape);
    }

    fn extent(&self) -> Extent<'_> {
        Extent { shape: &self.shape, len: self.data.len() }
    }
}

impl<D: Device> Engine<D> {
    /// A device without programs.
    pub fn new(device: D) -> Engine<D> {
        Engine {
            device,
            graphs: Vec::new(),
            heap: Vec::new(),
            sources: Vec::new(),
            pages: Vec::new(),
            weights: BTreeMap::new(),
            caches: BTreeMap::new(),
            pool_pages: None,
            chunk: None,
            cached: 0,
            slots: 0,
            begins: true,
        }
    }

    /// Loads a compiled graph and those of its weights that no graph has loaded yet.
    ///
    /// # Errors
    /// If the checkpoint does not fit, the device has no room, or it was told to compute a kernel in a way that there is not.
    pub fn add(&mut self, compiled: &Compiled, checkpoint: &Arc<Checkpoint>) -> Result<(), LoadError> {
        load::check(compiled.definition(), checkpoint)?;
        self.add_made(compiled, &mut |device, scope, function, weight| {
            load::load(device, checkpoint, scope, function, weight).map(Some)
        })
    }

    /// Loads a compiled graph with weights that are made as they are needed: `make` is given the scope of a call, the function and
    /// its weight, and returns as many elements as the weight's type has, or more.
    ///
    /// # Errors
    /// Those of `make`, or the device has no room.
    pub fn add_made(&mut self, compiled: &Compiled, make: Make<'_, D>) -> Result<(), LoadError> {
        self.push(compiled, make, Some(compiled.graph))?;
        Ok(())
    }

    fn push(
        &mut self,
        compiled: &Compiled,
        make: Make<'_, D>,
        graph: Option<Graph>,
    ) -> Result<usize, LoadError> {
        // Whatever would be wrong with a launch in any run is said before anything is loaded.
        compiled.program.kernels.iter().try_for_each(|kernel| self.device.admits(kernel))?;
        let mut instances = Vec::new();
        self.instantiate(compiled, make, &compiled.program.entry, "", &mut instances)?;
        let mut routines = instances.iter().map(|i| &compiled.program.routines[i.routine]);
        let names = Names::of(&compiled.program, routines.clone());
        let entry = routines.next_back().expect("the entry is the last instance");
        let mut empty = |count, source| (0..count).map(|_| self.place(None, source)).collect();
        let (args, results) =
            (empty(entry.params.len(), Source::Argument), empty(entry.results.len(), Source::Run));
        self.graphs.push(Loaded {
            graph,
            guard: compiled.guard.clone(),
            program: Arc::new(compiled.program.clone()),
            keys: device::keys(compiled.program.kernels.len()),
            instances,
            names,
            args,
            results,
            laid: None,
            elsewhere: false,
        });
        Ok(self.graphs.len() - 1)
    }

    /// What the programs run on.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device again, without programs and their memory.
    pub fn into_device(self) -> D {
        self.device
    }

    /// The program of a graph, if it has been added.
    pub fn program(&self, graph: Graph) -> Option<&Program> {
        self.graphs.iter().find(|g| g.graph == Some(graph)).map(|g| &*g.program)
    }

    /// Creates the instance of a routine under a scope, callees first, and returns its number.
    fn instantiate(
        &mut self,
        compiled: &Compiled,
        make: Make<'_, D>,
        name: &str,
        scope: &str,
        instances: &mut Vec<Instance>,
    ) -> Result<usize, LoadError> {
        let missing = || LoadError::Layout(format!("there is no function @{name}"));
        let program = &compiled.program;
        let number = program.routines.iter().position(|r| r.name == name).ok_or_else(missing)?;
        let function = compiled.module().function(name).ok_or_else(missing)?;
        let routine = &program.routines[number];
        let mut owned = Vec::new();
        for (n, buffer) in routine.buffers.iter().enumerate() {
            let slot = match &buffer.role {
                Role::Param | Role::Temp => continue,
                Role::Weight { index } => {
                    let weight = &function.weights[*index];
                    let key = weight_key(scope, function, weight);
                    match self.weights.get(&key) {
                        Some(held) => held.slot,
                        None => {
                            let made = make(&mut self.device, scope, function, weight)?;
                            let slot = self.place(made, Source::Weight);
                            let ty = function.ty(weight.value);
                            let layout = weight.stored.layout(function, ty).map_err(LoadError::Layout)?;
                            let elements = weight.stored.held.is_elements();
                            let sizes = buffer.dims.iter().map(|d| d.fixed().unwrap_or(1));
                            let held = Held {
                                slot,
                                dtype: ty.dtype,
                                scope: scope.to_owned(),
                                layout,
                                elements,
                                bytes: sizes.product::<u64>() * ty.dtype.bytes(),
                            };
                            self.weights.insert(key, held);
                            slot
                        }
                    }
                }
                Role::Constant { values } => {
                    let data = if buffer.dtype.is_float() {
                        Data::F32(values.iter().map(|x| x.0 as f32).collect())
                    } else {
                        Data::I32(values.iter().map(|x| x.0 as i32).collect())
                    };
                    let made = self.device.upload(buffer.dtype, data)?;
                    self.hold(made, Source::Run)
                }
                Role::Cache => {
                    let key = scoped(scope, &buffer.name);
                    match self.caches.get(&key) {
                        Some(cache) if cache.dims != buffer.dims || cache.dtype != buffer.dtype => {
                            return Err(LoadError::Cache(key));
                        }
                        Some(cache) => cache.slot,
                        None => {
                            let empty = self.device.keep(buffer.dtype, 0)?;
                            let slot = self.hold(empty, Source::Cache);
                            self.caches
                                .insert(key, Cache { slot, dtype: buffer.dtype, dims: buffer.dims.clone() });
                            slot
                        }
                    }
                }
            };
            owned.push((BufferId(n as u32), slot));
        }
        let mut calls = BTreeMap::new();
        for (n, step) in routine.steps.iter().enumerate() {
            if let Step::Call { routine: callee, scope: below, .. } = step {
                let scope = scoped(scope, below);
                calls.insert(n, self.instantiate(compiled, make, callee, &scope, instances)?);
            }
        }
        instances.push(Instance { routine: number, owned, calls });
        Ok(instances.len() - 1)
    }

    /// Gives all weights other values: those of `tensors`, where each stored tensor has its place. What need not be moved is read from there
    /// until [`drop_weights`](Engine::drop_weights).
    ///
    /// # Errors
    /// If a tensor is not there or of another length, or the device has no room.
    pub fn set_weights(&mut self, tensors: &Arc<Vec<f32>>, places: &Places) -> Result<(), LoadError> {
        for (key, held) in &self.weights {
            if !held.elements {
                return Err(LoadError::Layout(format!(
                    "the weight {key} is made of a checkpoint when it is loaded, and cannot be given"
                )));
            }
            // What is too old is given back before there is more.
            self.heap[held.slot] = None;
            let made = load::lend(&mut self.device, tensors, places, &held.scope, &held.layout, held.dtype)?;
            self.heap[held.slot] = Some(made);
        }
        Ok(())
    }

    /// Forgets all weights. There must be others before the next run.
    pub fn drop_weights(&mut self) {
        for held in self.weights.values() {
            self.heap[held.slot] = None;
        }
    }

    /// Runs a graph. `args` are the entry's parameters in order; `past` is the number of positions in the caches after
    /// the run.
    ///
    /// # Errors
    /// If the graph was not added, arguments do not fit it or each other, or the device fails.
    pub fn run(&mut self, graph: Graph, args: &[Value], past: usize) -> Result<Vec<Value>, RunError> {
        let mut values = Vec::new();
        self.run_seen(graph, args, past, |device, _, buffer, shape| {
            let data = device.read(buffer, shape.iter().product())?;
            values.push(Value { data, shape: shape.to_vec() });
            Ok(())
        })?;
        Ok(values)
    }

    /// Runs a graph as [`run`](Engine::run) does, but leaves its results on the device, and each launch to `launcher`. It may be done
    /// when the launches are not: see [`wait`](Engine::wait).
    ///
    /// # Errors
    /// As for [`run`](Engine::run).
    pub fn run_by(
        &mut self,
        graph: Graph,
        args: &[Value],
        past: usize,
        launcher: Launcher<'_, D>,
    ) -> Result<(), RunError> {
        let number = self.choose(graph, args.iter().map(Value::extent))?;
        self.run_planned(number, args, past, launcher)?;
        Ok(())
    }

    /// Runs a graph as [`run`](Engine::run) does, but shows each result to `see`, with its number and extents, while it lies on the device. It
    /// is in memory that the next run writes over.
    ///
    /// # Errors
    /// As for [`run`](Engine::run), and those of `see`.
    pub fn run_seen(
        &mut self,
        graph: Graph,
        args: &[Value],
        past: usize,
        mut see: impl FnMut(&mut D, usize, &D::Buffer, &[usize]) -> Result<(), RunError>,
    ) -> Result<(), RunError> {
        let number = self.choose(graph, args.iter().map(Value::extent))?;
        let ready = self.run_planned(number, args, past, &mut at_once)?;
        for (n, at) in ready.laid.results.iter().enumerate() {
            let Some(At::Planned(place, dtype, dims)) = at else {
                let entry = self.graphs[number].entry();
                let name = &entry.buffer(entry.results[n]).name;
                return Err(RunError::Argument(format!("nothing writes the result `{name}`")));
            };
            let shape: SmallVec<[usize; 8]> = dims.iter().map(|&d| ready.sizes.get(d)).collect();
            let buffer = self.part(*place, *dtype, shape.iter().product())?;
            see(&mut self.device, n, &buffer, &shape)?;
        }
        Ok(())
    }

    /// Waits until all launches so far are done.
    ///
    /// # Errors
    /// If the device failed in one of them.
    pub fn wait(&mut self) -> Result<(), DeviceError> {
        self.device.wait()
    }

    /// Runs a program whose results have places in the plan.
    fn run_planned(
        &mut self,
        number: usize,
        args: &[Value],
        past: usize,
        launcher: Launcher<'_, D>,
    ) -> Result<Ready, RunError> {
        self.results_elsewhere(number, false);
        let ready = self.ready(number, args.iter().map(Value::extent), past)?;
        self.set_args(number, args)?;
        self.launch_all(&ready, launcher)?;
        Ok(ready)
    }

    /// Brings arguments to their places, where those of the last run are.
    fn set_args(&mut self, number: usize, args: &[Value]) -> Result<(), DeviceError> {
        let Engine { device, graphs, heap, .. } = self;
        let loaded = &graphs[number];
        for ((param, &slot), value) in loaded.params().zip(&loaded.args).zip(args) {
            heap[slot] = Some(device.refill(heap[slot].take(), param.dtype, &value.data)?);
        }
        Ok(())
    }

    /// Whether a program's results have places in the plan.
    fn results_elsewhere(&mut self, number: usize, elsewhere: bool) {
        let loaded = &mut self.graphs[number];
        if loaded.elsewhere != elsewhere {
            (loaded.elsewhere, loaded.laid) = (elsewhere, None);
        }
    }

    /// What a run of a program needs to know beforehand, and memory for its temporaries.
    fn ready<'v>(
        &mut self,
        number: usize,
        args: impl ExactSizeIterator<Item = Extent<'v>>,
        past: usize,
    ) -> Result<Ready, RunError> {
        let (sizes, planned) = self.sizes(number, args, past)?;
        let laid = self.plan(number, planned)?;
        self.begins = true;
        let loaded = &self.graphs[number];
        Ok(Ready { program: Arc::clone(&loaded.program), keys: loaded.keys, laid, sizes })
    }

    /// The sizes of a run of a program, and those that a plan is made for.
    fn sizes<'v>(
        &self,
        number: usize,
        args: impl ExactSizeIterator<Item = Extent<'v>>,
        past: usize,
    ) -> Result<(Sizes, Sizes), RunError> {
        let loaded = &self.graphs[number];
        let mut sizes = Sizes::of(&loaded.names, loaded.params(), args)?;
        let mut planned = sizes.clone();
        sizes.complete(&loaded.names, self.slots, past)?;
        planned.complete(&loaded.names, self.slots, past.next_multiple_of(PAST))?;
        Ok((sizes, planned))
    }

    /// The program of a graph that is for arguments of these sizes.
    fn choose<'v>(
        &self,
        graph: Graph,
        args: impl ExactSizeIterator<Item = Extent<'v>>,
    ) -> Result<usize, RunError> {
        let loaded = || self.graphs.iter().enumerate().filter(|(_, g)| g.graph == Some(graph));
        let fail = |why| Err(RunError::Argument(format!("the {} graph {why}", graph.name())));
        let Some((_, first)) = loaded().next() else { return fail("was not loaded".to_owned()) };
        // All of them have the same parameters.
        let sizes = Sizes::of(&first.names, first.params(), args)?;
        let admits =
            |guard: &Guard| sizes.find(&first.names, &guard.size).is_some_and(|n| guard.admits(n as u64));
        match loaded().find(|(_, g)| g.guard.as_ref().is_none_or(admits)) {
            Some((number, _)) => Ok(number),
            None => {
                let guards: Vec<_> =
                    loaded().filter_map(|(_, g)| Some(g.guard.as_ref()?.to_string())).collect();
                fail(format!("was loaded for {} only", guards.join(" and ")))
            }
        }
    }

    fn hold(&mut self, buffer: D::Buffer, source: Source) -> Slot {
        self.place(Some(buffer), source)
    }

    fn place(&mut self, buffer: Option<D::Buffer>, source: Source) -> Slot {
        self.heap.push(buffer);
        self.sources.push(source);
        self.heap.len() - 1
    }
}

/// What a weight holds, whichever graph wants it: the same tensors, the same part, in the same order.
fn weight_key(scope: &str, f: &Function, weight: &Weight) -> String {
    let name = |a: &AxisId| f.axis(*a).name.as_str();
    let ty = f.ty(weight.value);
    let order: Vec<_> = ty.axes.iter().map(name).collect();
    // Groups of codes may be of any size.
    let held = match weight.stored.held {
        latentc_ir::Held::Elements => String::new(),
        held => format!(" {held:?} of {:?}", ty.axes.iter().map(|&a| &f.axis(a).size).collect::<Vec<_>>()),
    };
    let dims: Vec<Vec<Vec<&str>>> = weight
        .stored
        .dims
        .iter()
        .map(|dim| {
            dim.iter()
                .map(|factor| match factor {
                    Factor::Axis(a) => vec![name(a)],
                    Factor::Parts(axes) => axes.iter().map(name).collect(),
                })
                .collect()
        })
        .collect();
    format!("{} {dims:?} as {}{order:?}{held}", scoped(scope, &weight.stored.tensor), ty.dtype)
}

impl Loaded {
    /// The entry's instance.
    fn top(&self) -> usize {
        self.instances.len() - 1
    }

    /// The entry.
    fn entry(&self) -> &Routine {
        &self.program.routines[self.instances[self.top()].routine]
    }

    /// The entry's parameters.
    fn params(&self) -> impl ExactSizeIterator<Item = &Buffer> + Clone {
        let entry = self.entry();
        entry.params.iter().map(|&p| entry.buffer(p))
    }
}

/// What a run is made with.
struct Ready {
    program: Arc<Program>,
    /// As of [`Loaded`].
    keys: u64,
    laid: Arc<Laid>,
    sizes: Sizes,
}
