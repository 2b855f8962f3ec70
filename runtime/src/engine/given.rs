//! Programs whose weights, arguments and results lie in memory of the caller's: nothing is copied to the device or from it.
//!
//! A weight is given before a run and taken back after it, so that its owner may change it in between. Results get memory of their own
//! instead of places in the plan, which the next run would write over.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use latentc_codegen::device::{Data, Device, DeviceError};
use latentc_codegen::memory::may_replace;
use latentc_codegen::program::Buffer;
use latentc_ir::{DType, Layout};
use latentc_passes::Graph;

use super::{Engine, Extent, Held, Ready, RunError, Value, at_once};
use crate::compiled::Compiled;
use crate::load::{Lent, LoadError};

/// A program whose weights are given: see [`Engine::add_given`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given(usize);

/// A value in a device's memory.
#[derive(Clone, Debug)]
pub struct Resident<B> {
    /// The elements one after another, the last axis fastest.
    pub buffer: B,
    /// The extents.
    pub shape: Vec<usize>,
}

/// A weight that programs wait for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// By what [`Engine::give`] knows it.
    pub key: String,
    /// The element type.
    pub dtype: DType,
    /// The scope of the names in `layout`.
    pub scope: String,
    /// Of which stored tensors it is made, and how.
    pub layout: Layout,
}

impl Held {
    fn wanted(&self, key: &str) -> Wanted {
        let (scope, layout) = (self.scope.clone(), self.layout.clone());
        Wanted { key: key.to_owned(), dtype: self.dtype, scope, layout }
    }
}

impl<D: Device> Engine<D> {
    /// Loads a program without its weights, which [`give`](Engine::give) brings before each run.
    ///
    /// # Errors
    /// If its weights make no sense, or the device has no room.
    pub fn add_given(&mut self, compiled: &Compiled) -> Result<Given, LoadError> {
        let number = self.push(compiled, &mut |_, _, _, _| Ok(None), None)?;
        self.graphs[number].elsewhere = true;
        Ok(Given(number))
    }

    /// The weights of a program, each once. Programs may share them.
    pub fn wanted(&self, program: Given) -> Vec<Wanted> {
        let instances = self.graphs[program.0].instances.iter();
        let slots: BTreeSet<_> = instances.flat_map(|i| &i.owned).map(|&(_, slot)| slot).collect();
        let here = self.weights.iter().filter(|(_, held)| slots.contains(&held.slot));
        here.map(|(key, held)| held.wanted(key)).collect()
    }

    /// The names of a program's arguments, in order, and how many axes each has.
    pub fn params(&self, program: Given) -> Vec<(String, usize)> {
        self.graphs[program.0].params().map(|p| (p.name.clone(), p.dims.len())).collect()
    }

    /// Gives a weight, or takes back what it was.
    ///
    /// # Errors
    /// If no program wants such a weight.
    pub fn give(&mut self, key: &str, buffer: Option<D::Buffer>) -> Result<(), RunError> {
        let none = || RunError::Argument(format!("no program has the weight {key}"));
        let held = self.weights.get(key).ok_or_else(none)?;
        self.heap[held.slot] = buffer;
        Ok(())
    }

    /// Floats of the caller's as an argument: where they are, if the device can use memory of the host.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn lend(
        &mut self,
        floats: &Arc<Vec<f32>>,
        range: Range<usize>,
        shape: Vec<usize>,
    ) -> Result<Resident<D::Buffer>, DeviceError> {
        let lent = Lent { tensors: Arc::clone(floats), pieces: vec![range.clone()] };
        let buffer = match self.device.share(Arc::new(lent)) {
            Some(buffer) => buffer,
            None => self.device.upload(DType::F32, Data::F32(floats[range].to_vec()))?,
        };
        Ok(Resident { buffer, shape })
    }

    /// Some elements of a value in rows, in the same memory; see [`Device::window`].
    pub(crate) fn window(
        &mut self,
        buffer: &D::Buffer,
        range: Range<usize>,
        columns: usize,
    ) -> Option<Resident<D::Buffer>> {
        let shape = vec![range.len() / columns.max(1), columns];
        Some(Resident { buffer: self.device.window(buffer, range)?, shape })
    }

    /// Whether a program may write its results, in order, where these of its arguments are.
    pub(crate) fn may_replace(&self, program: Given, args: &[usize]) -> bool {
        may_replace(&self.graphs[program.0].program, args, &self.device.layout())
    }

    /// What lies on the device.
    pub(crate) fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// All weights, whichever program wants them.
    pub(crate) fn all_wanted(&self) -> Vec<Wanted> {
        self.weights.iter().map(|(key, held)| held.wanted(key)).collect()
    }

    /// Shows the elements of a value, which are floats.
    ///
    /// # Errors
    /// If they are none, or the device failed in an earlier launch.
    pub fn show(
        &mut self,
        value: &Resident<D::Buffer>,
        mut see: impl FnMut(&[f32]),
    ) -> Result<(), DeviceError> {
        self.device.show(&value.buffer, value.shape.iter().product(), &mut see)
    }

    /// Runs a program on arguments that are on the device, and leaves the results there, in memory that nobody else has.
    ///
    /// # Errors
    /// If arguments do not fit the program or each other, a weight was not given, or the device fails.
    pub fn run_given(
        &mut self,
        program: Given,
        args: Vec<Resident<D::Buffer>>,
    ) -> Result<Vec<Resident<D::Buffer>>, RunError> {
        self.run_given_into(program, args, &mut |_| None)
    }

    /// Runs a program as [`run_given`](Engine::run_given) does, and leaves its results where `place` says, as [`run_into`](Engine::run_into)
    /// does.
    ///
    /// # Errors
    /// As for [`run_given`](Engine::run_given), and if a place is too small.
    pub fn run_given_into(
        &mut self,
        program: Given,
        args: Vec<Resident<D::Buffer>>,
        place: &mut dyn FnMut(usize) -> Option<D::Buffer>,
    ) -> Result<Vec<Resident<D::Buffer>>, RunError> {
        let extents = args.iter().map(|a| Extent { shape: &a.shape, len: a.shape.iter().product() });
        let ready = self.ready(program.0, extents, 0)?;
        for instance in &self.graphs[program.0].instances {
            let mut owned = instance.owned.iter();
            if let Some((id, _)) = owned.find(|(_, slot)| self.heap[*slot].is_none()) {
                let name = &ready.program.routines[instance.routine].buffer(*id).name;
                return Err(RunError::Argument(format!("the weight `{name}` was not given")));
            }
        }
        self.run_resident(&ready, program.0, args.into_iter().map(|a| a.buffer).collect(), place)
    }

    /// Runs a graph as [`run`](Engine::run) does, and leaves its results on the device: in the memory that `place` gives for a result by its
    /// number, or else in memory that nobody else has. They have no places in the plan.
    ///
    /// # Errors
    /// As for [`run`](Engine::run), and if a place is too small.
    pub fn run_into(
        &mut self,
        graph: Graph,
        args: &[Value],
        past: usize,
        place: &mut dyn FnMut(usize) -> Option<D::Buffer>,
    ) -> Result<Vec<Resident<D::Buffer>>, RunError> {
        let number = self.choose(graph, args.iter().map(Value::extent))?;
        self.results_elsewhere(number, true);
        let ready = self.ready(number, args.iter().map(Value::extent), past)?;
        let upload = |(param, value): (&Buffer, &Value)| self.device.upload(param.dtype, value.data.clone());
        let args = self.graphs[number].params().zip(args).map(upload).collect::<Result<_, _>>()?;
        self.run_resident(&ready, number, args, place)
    }

    /// Runs a program on arguments on the device. What this run alone needs is forgotten, whatever comes of it.
    fn run_resident(
        &mut self,
        ready: &Ready,
        number: usize,
        args: Vec<D::Buffer>,
        place: &mut dyn FnMut(usize) -> Option<D::Buffer>,
    ) -> Result<Vec<Resident<D::Buffer>>, RunError> {
        let loaded = &self.graphs[number];
        let slots: Vec<_> = loaded.args.iter().chain(&loaded.results).copied().collect();
        let results = self.run_between(ready, number, args, place);
        slots.into_iter().for_each(|slot| self.heap[slot] = None);
        results
    }

    fn run_between(
        &mut self,
        ready: &Ready,
        number: usize,
        args: Vec<D::Buffer>,
        place: &mut dyn FnMut(usize) -> Option<D::Buffer>,
    ) -> Result<Vec<Resident<D::Buffer>>, RunError> {
        let Engine { device, graphs, heap, .. } = self;
        let loaded = &graphs[number];
        for (&slot, arg) in loaded.args.iter().zip(args) {
            heap[slot] = Some(arg);
        }
        let entry = loaded.entry();
        let mut made = Vec::with_capacity(entry.results.len());
        for (n, (&id, &slot)) in entry.results.iter().zip(&loaded.results).enumerate() {
            let buffer = entry.buffer(id);
            let shape: Vec<_> = buffer.dims.iter().map(|d| ready.sizes.get(loaded.names.dim(d))).collect();
            heap[slot] = Some(match place(n) {
                Some(made) => made,
                None => device.alloc(buffer.dtype, shape.iter().product())?,
            });
            made.push((slot, shape));
        }
        self.launch_all(ready, &mut at_once)?;
        let taken = made.into_iter().map(|(slot, shape)| {
            let buffer = self.heap[slot].take().expect("results are held until they are taken");
            Resident { buffer, shape }
        });
        Ok(taken.collect())
    }
}

#[cfg(test)]
mod tests {

    use latentc_codegen::host::Host;
    use latentc_passes::pipeline;

    use super::*;
    use crate::compiled::compile;

    /// `y = W x` in a function that the entry calls with two weights, and the sum of both.
    const TEXT: &str = r#"module m entry @main

func @inner {
  axes t, d=2, e=3
  param x: f32[t, d=2]
  weight W: f32[e=3, d=2] = "w"[e, d]

  y: f32[t, e=3] = contract W, x over d
  return y
}

func @main {
  axes t, d=2, e=3
  param x: f32[t, d=2]

  y: f32[t, e=3] = call @inner(x) under "a"
  y.1: f32[t, e=3] = call @inner(x) under "b"
  z: f32[t, e=3] = add y, y.1
  return y, z
}
"#;

    fn engine() -> (Engine<Host>, Given) {
        let module = latentc_ir::check("m.ir", TEXT).unwrap_or_else(|e| panic!("{}", e.render()));
        let compiled = compile(&module, Graph::Train, &pipeline()).expect("it compiles");
        let mut engine = Engine::new(Host::new());
        let program = engine.add_given(&compiled).expect("it loads");
        (engine, program)
    }

    fn resident(
        engine: &mut Engine<Host>,
        data: &[f32],
        shape: &[usize],
    ) -> Resident<<Host as Device>::Buffer> {
        let made = engine.device.upload(DType::F32, Data::F32(data.to_vec()));
        Resident { buffer: made.expect("there is room"), shape: shape.to_vec() }
    }

    #[test]
    fn results_stay_when_other_runs_follow() {
        let (mut engine, program) = engine();
        let wanted = engine.wanted(program);
        let names: Vec<_> =
            wanted.iter().map(|w| (w.scope.as_str(), w.layout.pieces[0].tensor.as_str())).collect();
        assert_eq!(names, [("a", "w"), ("b", "w")]);
        let mut kept = Vec::new();
        for k in [1.0, 2.0] {
            for (wanted, k) in wanted.iter().zip([k, 2.0 * k]) {
                let w = resident(&mut engine, &[k, 0.0, 0.0, k, k, k], &[3, 2]);
                engine.give(&wanted.key, Some(w.buffer)).expect("it is wanted");
            }
            let x = resident(&mut engine, &[1.0, 2.0], &[1, 2]);
            kept.extend(engine.run_given(program, vec![x]).expect("it runs"));
        }
        let heap = engine.heap.len();
        let read = kept.iter().map(|r| {
            assert_eq!(r.shape, [1, 3]);
            engine.device.read(&r.buffer, 3).expect("it is there")
        });
        let want = [[1.0, 2.0, 3.0], [3.0, 6.0, 9.0], [2.0, 4.0, 6.0], [6.0, 12.0, 18.0]];
        assert_eq!(read.collect::<Vec<_>>(), want.map(|w| Data::F32(w.to_vec())));
        assert_eq!(engine.heap.len(), heap);
    }

    #[test]
    fn a_weight_that_is_not_there_is_named() {
        let (mut engine, program) = engine();
        let x = resident(&mut engine, &[1.0, 2.0], &[1, 2]);
        let why = engine.run_given(program, vec![x]).expect_err("no weight").to_string();
        assert_eq!(why, "the weight `W` was not given");
        let x = resident(&mut engine, &[1.0, 2.0], &[1, 2]);
        assert_eq!(
            engine.give("c", None).expect_err("no such weight").to_string(),
            "no program has the weight c"
        );
        let why =
            engine.run_given(program, vec![Resident { shape: vec![1, 3], ..x }]).expect_err("misshapen");
        assert_eq!(why.to_string(), "`x`: size 3 where 2 is 2");
        fn send<T: Send>() {}
        send::<Engine<Host>>();
    }
}
