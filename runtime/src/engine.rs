//! A program on a device: its weights, its caches, and one run after another.
//!
//! Routines are functions of the program, *instances* are their calls: sixty equal layers are one routine and sixty
//! instances, each with its own weights and caches. Temporaries are reused from run to run.

use std::collections::BTreeMap;
use std::sync::Arc;

use latentc_codegen::device::{Data, Device, DeviceError};
use latentc_codegen::program::{Buffer, BufferId, Program, Role, Routine, Step};
use latentc_ir::interp::scoped;
use latentc_ir::{DType, Module, Op, Size};

use crate::checkpoint::Checkpoint;
use crate::compiled::Compiled;
use crate::load::{self, LoadError};

/// A place in [`Engine::heap`].
type Slot = usize;

/// A program with its memory on a device.
#[derive(Debug)]
pub struct Engine<D: Device> {
    device: D,
    program: Program,
    heap: Vec<Option<Held<D::Buffer>>>,
    /// Temporaries that no one uses now, by kind and length.
    free: BTreeMap<(bool, usize), Vec<Slot>>,
    instances: Vec<Instance>,
    caches: Vec<Cache>,
    /// For each routine, what each step is the last to use.
    last_uses: Vec<Vec<Vec<BufferId>>>,
}

#[derive(Debug)]
struct Held<B> {
    buffer: B,
    float: bool,
    len: usize,
}

/// A call of a routine: where its own buffers are, and the instances that it calls, by step.
#[derive(Debug)]
struct Instance {
    routine: usize,
    owned: Vec<(BufferId, Slot)>,
    calls: BTreeMap<usize, usize>,
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
}

impl<D: Device> Engine<D> {
    /// Loads a compiled graph and its weights.
    ///
    /// # Errors
    /// If the checkpoint does not fit, or the device has no room.
    pub fn new(device: D, compiled: &Compiled, checkpoint: &Arc<Checkpoint>) -> Result<Engine<D>, LoadError> {
        load::check(compiled.module(), checkpoint)?;
        let program = compiled.program.clone();
        let last_uses = program.routines.iter().map(Routine::last_uses).collect();
        let mut engine = Engine {
            device,
            program,
            heap: Vec::new(),
            free: BTreeMap::new(),
            instances: Vec::new(),
            caches: Vec::new(),
            last_uses,
        };
        let mut loaded = BTreeMap::new();
        let entry = engine.program.entry.clone();
        engine.instantiate(compiled.module(), checkpoint, &entry, "", &mut loaded)?;
        Ok(engine)
    }

    /// What the program runs on.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Creates the instance of a routine under a scope, callees first, and returns its number. The entry is the last.
    fn instantiate(
        &mut self,
        module: &Module,
        checkpoint: &Arc<Checkpoint>,
        name: &str,
        scope: &str,
        loaded: &mut BTreeMap<(String, String, usize), Slot>,
    ) -> Result<usize, LoadError> {
        let missing = || LoadError::Layout(format!("there is no function @{name}"));
        let number = self.program.routines.iter().position(|r| r.name == name).ok_or_else(missing)?;
        let function = module.function(name).ok_or_else(missing)?;
        let routine = self.program.routines[number].clone();
        let mut owned = Vec::new();
        for (n, buffer) in routine.buffers.iter().enumerate() {
            let id = BufferId(n as u32);
            match &buffer.role {
                Role::Param | Role::Temp => {}
                Role::Weight { index } => {
                    // A function that is called twice under one scope has its weights once.
                    let key = (scope.to_owned(), name.to_owned(), *index);
                    let slot = match loaded.get(&key) {
                        Some(&slot) => slot,
                        None => {
                            let weight = &function.weights[*index];
                            let made = load::load(&mut self.device, checkpoint, scope, function, weight)?;
                            let len = fixed_len(buffer);
                            self.hold(made, true, len)
                        }
                    };
                    loaded.insert(key, slot);
                    owned.push((id, slot));
                }
                Role::Constant { values } => {
                    let float = buffer.dtype.is_float();
                    let data = if float {
                        Data::F32(values.iter().map(|x| x.0 as f32).collect())
                    } else {
                        Data::I32(values.iter().map(|x| x.0 as i32).collect())
                    };
                    let made = self.device.upload(buffer.dtype, data)?;
                    owned.push((id, self.hold(made, float, values.len())));
                }
                Role::Cache => {
                    let empty = self.device.alloc(buffer.dtype, 0)?;
                    let slot = self.hold(empty, buffer.dtype.is_float(), 0);
                    self.caches.push(Cache { slot, dtype: buffer.dtype, dims: buffer.dims.clone() });
                    owned.push((id, slot));
                }
            }
        }
        let mut calls = BTreeMap::new();
        for (n, step) in routine.steps.iter().enumerate() {
            if let Step::Call { routine: callee, scope: below, .. } = step {
                let scope = scoped(scope, below);
                calls.insert(n, self.instantiate(module, checkpoint, callee, &scope, loaded)?);
            }
        }
        self.instances.push(Instance { routine: number, owned, calls });
        Ok(self.instances.len() - 1)
    }

    /// Makes room in every cache for a batch of sequences of up to `capacity` positions, and forgets what was there.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn reset(&mut self, batch: usize, capacity: usize) -> Result<(), DeviceError> {
        self.trim();
        for n in 0..self.caches.len() {
            let cache = &self.caches[n];
            let mut len = capacity;
            for size in &cache.dims[1..] {
                len *= size.fixed().map_or(batch, |n| n as usize);
            }
            let (slot, dtype) = (cache.slot, cache.dtype);
            self.heap[slot] = None;
            let buffer = self.device.alloc(dtype, len)?;
            self.heap[slot] = Some(Held { buffer, float: dtype.is_float(), len });
        }
        Ok(())
    }

    /// Gives the memory of unused temporaries back. Worth it when the sizes of the next run are others.
    pub fn trim(&mut self) {
        for slot in std::mem::take(&mut self.free).into_values().flatten() {
            self.heap[slot] = None;
        }
    }

    /// Runs the program. `args` are the entry's parameters in order; `past` is the number of positions in the caches after the
    /// run: the size that no argument has.
    ///
    /// # Errors
    /// If arguments do not fit the program or each other, or the device fails.
    pub fn run(&mut self, args: &[Value], past: usize) -> Result<Vec<Value>, RunError> {
        let top = self.instances.len() - 1;
        let routine = &self.program.routines[self.instances[top].routine];
        let described: Vec<Buffer> = routine.params.iter().map(|&p| routine.buffer(p).clone()).collect();
        let results: Vec<Buffer> = routine.results.iter().map(|&r| routine.buffer(r).clone()).collect();
        let sizes = Sizes::of(&described, args, past)?;
        let mut params = Vec::new();
        for (buffer, value) in described.iter().zip(args) {
            let made = self.device.upload(buffer.dtype, value.data.clone())?;
            params.push(self.hold(made, buffer.dtype.is_float(), value.data.len()));
        }
        let mut outputs = Vec::new();
        for buffer in &results {
            outputs.push(self.temp(buffer, &sizes)?);
        }
        self.instance(top, &params, &outputs, &sizes)?;
        let mut values = Vec::new();
        for (buffer, slot) in results.iter().zip(&outputs) {
            let shape: Vec<_> = buffer.dims.iter().map(|d| sizes.get(d)).collect::<Result<_, _>>()?;
            let held = self.heap[*slot].as_ref().expect("results are held until they are read");
            let data = self.device.read(&held.buffer, shape.iter().product())?;
            values.push(Value { data, shape });
        }
        for slot in params {
            self.heap[slot] = None;
        }
        for slot in outputs {
            self.release(slot);
        }
        Ok(values)
    }

    fn instance(&mut self, n: usize, params: &[Slot], outputs: &[Slot], sizes: &Sizes) -> Result<(), RunError> {
        // The program is not changed by a run; taking it out lets the heap be changed meanwhile.
        let number = self.instances[n].routine;
        let routine = std::mem::replace(&mut self.program.routines[number], EMPTY);
        let done = self.steps(n, &routine, params, outputs, sizes);
        self.program.routines[number] = routine;
        done
    }

    fn steps(
        &mut self,
        n: usize,
        routine: &Routine,
        params: &[Slot],
        outputs: &[Slot],
        sizes: &Sizes,
    ) -> Result<(), RunError> {
        let mut slots: Vec<Option<Slot>> = vec![None; routine.buffers.len()];
        let given = routine.params.iter().zip(params).chain(routine.results.iter().zip(outputs));
        for (id, slot) in given {
            slots[id.0 as usize] = Some(*slot);
        }
        for (id, slot) in &self.instances[n].owned {
            slots[id.0 as usize] = Some(*slot);
        }
        let number = self.instances[n].routine;
        for (at, step) in routine.steps.iter().enumerate() {
            for &id in step.outputs() {
                if slots[id.0 as usize].is_none() {
                    slots[id.0 as usize] = Some(self.temp(routine.buffer(id), sizes)?);
                }
            }
            let slot = |id: &BufferId| slots[id.0 as usize].expect("verified: a buffer is written before it is read");
            match step {
                Step::Launch { kernel, inputs, output, sizes: named, .. } => {
                    let inputs: Vec<_> = inputs.iter().map(slot).collect();
                    let sizes: Vec<_> = named.iter().map(|s| sizes.get(s)).collect::<Result<_, _>>()?;
                    self.launch(*kernel, &inputs, slot(output), &sizes)?;
                }
                Step::Call { inputs, outputs, .. } => {
                    let inputs: Vec<_> = inputs.iter().map(slot).collect();
                    let outputs: Vec<_> = outputs.iter().map(slot).collect();
                    let callee = self.instances[n].calls[&at];
                    self.instance(callee, &inputs, &outputs, sizes)?;
                }
            }
            for n in 0..self.last_uses[number][at].len() {
                let id = self.last_uses[number][at][n];
                if let Some(slot) = slots[id.0 as usize].take() {
                    self.release(slot);
                }
            }
        }
        Ok(())
    }

    fn launch(&mut self, kernel: usize, inputs: &[Slot], output: Slot, sizes: &[usize]) -> Result<(), DeviceError> {
        let kernel = &self.program.kernels[kernel];
        let mut out = self.heap[output].take().expect("outputs are held");
        let appends = kernel.body.body.last().is_some_and(|i| matches!(i.op, Op::Append { .. }));
        let inputs: Vec<_> = inputs
            .iter()
            .enumerate()
            .map(|(n, &slot)| {
                let held = self.heap[slot].as_ref().map(|h| &h.buffer);
                if appends && n == 0 { None } else { held }
            })
            .collect();
        let done = self.device.launch(kernel, &inputs, &mut out.buffer, sizes);
        self.heap[output] = Some(out);
        done
    }

    fn hold(&mut self, buffer: D::Buffer, float: bool, len: usize) -> Slot {
        self.heap.push(Some(Held { buffer, float, len }));
        self.heap.len() - 1
    }

    fn temp(&mut self, buffer: &Buffer, sizes: &Sizes) -> Result<Slot, RunError> {
        let mut len = 1;
        for d in &buffer.dims {
            len *= sizes.get(d)?;
        }
        let float = buffer.dtype.is_float();
        if let Some(slot) = self.free.get_mut(&(float, len)).and_then(Vec::pop) {
            return Ok(slot);
        }
        let made = self.device.alloc(buffer.dtype, len)?;
        Ok(self.hold(made, float, len))
    }

    fn release(&mut self, slot: Slot) {
        if let Some(held) = &self.heap[slot] {
            self.free.entry((held.float, held.len)).or_default().push(slot);
        }
    }
}

const EMPTY: Routine = Routine {
    name: String::new(),
    buffers: Vec::new(),
    params: Vec::new(),
    results: Vec::new(),
    steps: Vec::new(),
};

fn fixed_len(buffer: &Buffer) -> usize {
    buffer.dims.iter().map(|d| d.fixed().unwrap_or(0) as usize).product()
}

/// The run-time sizes of one run.
struct Sizes {
    bound: BTreeMap<String, usize>,
    past: usize,
}

impl Sizes {
    fn of(params: &[Buffer], args: &[Value], past: usize) -> Result<Sizes, RunError> {
        if params.len() != args.len() {
            let names: Vec<_> = params.iter().map(|p| p.name.as_str()).collect();
            return Err(RunError::Argument(format!("the program takes ({}), {} given", names.join(", "), args.len())));
        }
        let mut bound: BTreeMap<String, usize> = BTreeMap::new();
        for (p, v) in params.iter().zip(args) {
            let fail = |why: String| Err(RunError::Argument(format!("`{}`: {why}", p.name)));
            if p.dims.len() != v.shape.len() || v.shape.iter().product::<usize>() != v.data.len() {
                return fail(format!("the shape {:?} of {} elements does not fit {} axes", v.shape, v.data.len(), p.dims.len()));
            }
            for (d, &n) in p.dims.iter().zip(&v.shape) {
                let want = match d {
                    Size::Fixed(k) => *k as usize,
                    Size::Sym(s) => *bound.entry(s.clone()).or_insert(n),
                };
                if want != n {
                    return fail(format!("size {n} where {d} is {want}"));
                }
            }
        }
        Ok(Sizes { bound, past })
    }

    /// Sizes that no argument has are those of the past.
    fn get(&self, size: &Size) -> Result<usize, RunError> {
        Ok(match size {
            Size::Fixed(n) => *n as usize,
            Size::Sym(s) => self.bound.get(s).copied().unwrap_or(self.past),
        })
    }
}
