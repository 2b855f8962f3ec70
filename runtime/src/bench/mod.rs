//! How fast a program is, launch by launch and as a whole, beside what its device can do.
//!
//! Weights, caches and tokens are random and made where they lie, so a model needs no checkpoint to be measured. The whole step is timed
//! as it runs: from arguments in the host's memory to results in the device's, with no waiting in between. Kernels are timed
//! within a pass over the program, each where it stands, with what the launches before it have made: its launch is
//! repeated there, into a result that nothing reads. What it reads of weights and caches comes from another place each time
//! (see [`memory::Pool`]), as it does in a run of many layers; what a launch before it has just written does not. How launches
//! are timed apart from the host that enqueues them is told at [`clock::Clock`].

mod arguments;
mod ceilings;
mod clock;
mod memory;
mod texts;
mod tune;
mod work;

use std::collections::BTreeMap;
use std::time::Instant;

use latentc_codegen::cube::Chosen;
use latentc_codegen::device::{Device, DeviceError};
use latentc_codegen::program::{KernelKind, Program};
use latentc_codegen::traffic::Traffic;
use latentc_ir::{AxisId, DType};
use latentc_passes::Graph;
use serde::Serialize;

pub use arguments::Arguments;
pub use ceilings::{Ceiling, Ceilings, Probe};
pub use tune::{Trial, Tried, tune};
pub use work::Work;

use self::clock::Clock;
use self::memory::{Maker, Pool};
use crate::compiled::Compiled;
use crate::engine::{Engine, Launch, RunError, Source, at_once};
use crate::load::LoadError;

/// A kernel is measured at so many of its launches at most.
const PLACES: usize = 3;

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// New tokens of each.
    pub tokens: usize,
    /// Positions of each, the new ones included.
    pub context: usize,
}

/// How it is measured.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Samples of each figure.
    pub repeat: usize,
    /// What weights and tokens follow from.
    pub seed: u64,
    /// The standard deviation of weights.
    pub std: f64,
    /// The dtype of weights.
    pub dtype: DType,
    /// The sizes of ceilings.
    pub probe: Probe,
    /// Whether kernels are measured.
    pub kernels: bool,
    /// Only these, unless there are none.
    pub only: Vec<String>,
    /// Whether the whole step is measured.
    pub whole: bool,
}

/// The middle of some measurements, and the half of them around it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Seconds {
    /// In the middle.
    pub median: f64,
    /// A quarter is below.
    pub low: f64,
    /// A quarter is above.
    pub high: f64,
    /// How many there are.
    pub samples: usize,
}

impl Seconds {
    fn of(mut all: Vec<f64>) -> Seconds {
        all.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let place = part * all.len().saturating_sub(1) as f64;
            let (below, above) = (place.floor() as usize, place.ceil() as usize);
            let value = |n: usize| all.get(n).copied().unwrap_or(f64::NAN);
            value(below) + (value(above) - value(below)) * place.fract()
        };
        Seconds { median: at(0.5), low: at(0.25), high: at(0.75), samples: all.len() }
    }
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// The device, as it calls itself.
    pub device: String,
    /// What it can do.
    pub ceilings: Ceilings,
    /// Distinct kernels at their sizes, those that take most of the time first.
    pub kernels: Vec<Row>,
    /// All of it.
    pub step: Step,
}

/// A kernel at the sizes of some launches.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// What kind it is of.
    pub kind: KernelKind,
    /// How the device computes it at these sizes.
    pub way: KernelKind,
    /// Whether a tuning says so.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub tuned: bool,
    /// Of a stream, parts that a tuning cuts its positions into.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parts: Option<usize>,
    /// The run-time sizes by name.
    pub sizes: BTreeMap<String, u64>,
    /// The sizes of its products, if it has any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub work: Option<Work>,
    /// What it computes, as IR.
    pub ir: String,
    /// Launches in a step.
    pub launches: u64,
    /// What one launch computes, reads and writes.
    pub traffic: Traffic,
    /// The least that a launch can take: bytes by the bandwidth or operations by the rate of products.
    pub bound_seconds: f64,
    /// What one launch takes, if it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
}

/// How long a launch takes, and what follows from that.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Time {
    /// Of one launch.
    pub seconds: Seconds,
    /// Read and written.
    pub bytes_per_second: f64,
    /// Computed.
    pub flops_per_second: f64,
    /// The bound over the median.
    pub of_bound: f64,
    /// What all its launches take of the time of all launches.
    pub of_launches: f64,
}

/// A whole step.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// Launches; those that may run at the same time count as one.
    pub launches: u64,
    /// New tokens, if the program reads any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// What all launches compute, read and write.
    pub traffic: Traffic,
    /// The sum of the launches' bounds.
    pub bound_seconds: f64,
    /// The sum of the launches' medians, if they were measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub launches_seconds: Option<f64>,
    /// From arguments on the host to results on the device, if that was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<Seconds>,
    /// How long the host takes to enqueue it all, of the same runs, if the device has a queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_seconds: Option<Seconds>,
    /// What it takes where all of it was enqueued before it began, if the device has a queue: the host's part is not in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_seconds: Option<Seconds>,
    /// New tokens by the median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// The bound over the median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_bound: Option<f64>,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The device failed, or has no room.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The program could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// It could not be run.
    #[error(transparent)]
    Run(#[from] RunError),
    /// It wants arguments that no model has.
    #[error(
        "the program takes `{0}`, which bench has no values for; it knows tok, pos, at, table, target and weight"
    )]
    Argument(String),
    /// A module that remembers.
    #[error("`{0}` is a cache, and of texts bench runs those without: make it a parameter")]
    Cache(String),
    /// A size that was not given.
    #[error("the size `{0}` is not given; --size {0}=N gives it")]
    Size(String),
    /// A formula lacks a size.
    #[error("the traffic of kernel {kernel}: {why}")]
    Traffic {
        /// The kernel.
        kernel: String,
        /// What is missing.
        why: String,
    },
}

/// A program with memory of random content on a device, and what launches are timed with.
struct Ready<D: Device> {
    engine: Engine<D>,
    maker: Maker<D>,
    /// If kernels are measured.
    pool: Option<Pool<D>>,
    clock: Clock<D>,
    ceilings: Ceilings,
}

impl<D: Device> Ready<D> {
    fn new(
        mut device: D,
        compiled: &Compiled,
        given: &Arguments,
        with: &Settings,
        tell: &mut impl FnMut(String),
    ) -> Result<Ready<D>, BenchError> {
        let mut maker = Maker::new(&mut device, with.seed, with.std);
        tell("measuring the device".to_owned());
        let (ceilings, clock) =
            ceilings::measure(&mut device, &mut maker, with.dtype, with.probe, with.repeat)?;
        tell("making weights".to_owned());
        let pool = match with.kernels {
            true => Some(Pool::new(&mut device, &mut maker, with.dtype, with.probe.bytes)?),
            false => None,
        };
        let mut engine = Engine::new(device);
        engine.add_made(compiled, &mut |device, _, function, weight| {
            let ty = function.ty(weight.value);
            let sizes = ty.axes.iter().map(|a| function.axis(*a).size.fixed().unwrap_or(1) as usize);
            let len = sizes.product();
            // Vectors are scales.
            let made = match ty.axes.len() {
                1 => maker.ones(device, ty.dtype, len)?,
                _ => maker.weight(device, ty.dtype, len)?,
            };
            Ok(Some(made))
        })?;
        engine.reset_to(given.batch, given.past, |device, dtype, len| maker.kept(device, dtype, len))?;
        Ok(Ready { engine, maker, pool, clock, ceilings })
    }
}

/// Measures one graph on a device. `tell` is told what is being measured.
///
/// # Errors
/// See [`BenchError`].
pub fn measure<D: Device>(
    device: D,
    compiled: &Compiled,
    given: &Arguments,
    with: &Settings,
    mut tell: impl FnMut(String),
) -> Result<Measured, BenchError> {
    let name = device.name();
    let Ready { mut engine, maker, mut pool, mut clock, ceilings } =
        Ready::new(device, compiled, given, with, &mut tell)?;

    tell("compiling kernels".to_owned());
    let mut groups: Vec<Group> = Vec::new();
    let mut launched = 0;
    engine.run_by(compiled.graph, &given.values, given.past, &mut |device, launches| {
        launched += 1;
        for launch in &*launches {
            let known = groups.iter_mut().find(|g| g.number == launch.number && g.sizes == launch.sizes);
            match known {
                Some(group) => group.launches += 1,
                None => groups.push(Group::new(device, launch)),
            }
        }
        at_once(device, launches)
    })?;
    engine.wait()?;

    let mut whole = Whole::default();
    if with.whole {
        tell("running whole steps".to_owned());
        // One more, so that all that is made once is there.
        for n in 0..=with.repeat {
            let start = Instant::now();
            engine.run_by(compiled.graph, &given.values, given.past, &mut at_once)?;
            let enqueued = start.elapsed();
            engine.wait()?;
            if n > 0 {
                whole.all.push(start.elapsed().as_secs_f64());
                whole.host.extend(clock.queue.is_some().then_some(enqueued.as_secs_f64()));
            }
        }
        let longest = whole.all.iter().copied().fold(0.0, f64::max);
        // One more step behind the same copies: neither they nor starting and waiting are in the difference.
        let mut behind = |clock: &mut Clock<D>, steps: usize| -> Result<f64, BenchError> {
            let start = Instant::now();
            let mut copies = 0..clock.copies(2.0 * longest);
            for _ in 0..steps {
                engine.run_by(compiled.graph, &given.values, given.past, &mut |device, launches| {
                    copies.by_ref().try_for_each(|_| clock.copy(device))?;
                    at_once(device, launches)
                })?;
            }
            engine.wait()?;
            Ok(start.elapsed().as_secs_f64())
        };
        for _ in 0..clock.queue.as_ref().map_or(0, |_| with.repeat) {
            let one = behind(&mut clock, 1)?;
            whole.device.push(behind(&mut clock, 2)? - one);
        }
    }

    if let Some(pool) = &mut pool {
        let samples = |launches: u64| with.repeat.div_ceil(PLACES.min(launches as usize));
        engine.run_by(compiled.graph, &given.values, given.past, &mut |device, launches| {
            // Each by itself, those that may run at the same time too.
            for launch in &mut *launches {
                let group = groups.iter_mut().find(|g| g.number == launch.number && g.sizes == launch.sizes);
                let wanted = with.only.is_empty() || with.only.contains(&launch.kernel.name);
                let Some(group) = group.filter(|_| wanted) else { continue };
                let seen = group.seen;
                group.seen += 1;
                // The first, one in the middle and the last.
                if [0, group.launches / 2, group.launches - 1].contains(&seen) {
                    tell(format!("measuring {}", launch.kernel.name));
                    let many = samples(group.launches);
                    let mut place = Places { maker: &maker, pool, cold: given.cold };
                    let more = dwell(device, &mut place, &mut clock, launch, many)?;
                    group.samples.extend(more);
                }
            }
            at_once(device, launches)
        })?;
        engine.wait()?;
    }

    let kernels = rows(&compiled.program, groups, &ceilings)?;
    let step = step(&kernels, launched, given.tokens, whole);
    Ok(Measured { device: name, ceilings, kernels, step })
}

/// The launches of a kernel at the same sizes.
struct Group {
    number: usize,
    way: Chosen,
    sizes: Vec<usize>,
    launches: u64,
    /// Launches that were passed in the pass that measures.
    seen: u64,
    samples: Vec<f64>,
}

impl Group {
    fn new<D: Device>(device: &D, launch: &Launch<'_, D::Buffer>) -> Group {
        Group {
            number: launch.number,
            way: device.way(launch.kernel, launch.sizes),
            sizes: launch.sizes.to_vec(),
            launches: 1,
            seen: 0,
            samples: Vec::new(),
        }
    }
}

/// Where launches read from.
struct Places<'p, D: Device> {
    maker: &'p Maker<D>,
    pool: &'p mut Pool<D>,
    /// Whether arguments are read from memory.
    cold: bool,
}

impl<D: Device> Places<'_, D> {
    /// Another place for an input, unless it was just written.
    fn other(
        &mut self,
        device: &mut D,
        launch: &Launch<'_, D::Buffer>,
        n: usize,
        touched: u64,
    ) -> Result<Option<D::Buffer>, DeviceError> {
        let ty = launch.kernel.body.ty(launch.kernel.body.params[n]);
        // Of integers, only words of codes may be any.
        let wide = match launch.sources[n] {
            Source::Weight if ty.dtype.is_float() => false,
            Source::Cache => false,
            Source::Argument if self.cold && ty.dtype.is_float() => true,
            Source::Weight | Source::Argument | Source::Run => return Ok(None),
        };
        if launch.inputs[n].is_none() {
            return Ok(None);
        }
        let extents = launch.kernel.extents(launch.sizes);
        let len = ty.axes.iter().map(|a| extents[a.0 as usize]).product();
        self.pool.take(device, self.maker, (ty.dtype, wide), len, touched)
    }
}

/// Repeats a launch where it stands.
fn dwell<D: Device>(
    device: &mut D,
    places: &mut Places<'_, D>,
    clock: &mut Clock<D>,
    launch: &mut Launch<'_, D::Buffer>,
    samples: usize,
) -> Result<Vec<f64>, DeviceError> {
    let (kernel, sizes) = (launch.kernel, launch.sizes);
    let extents = kernel.extents(sizes);
    let elements = |axes: &[AxisId]| axes.iter().map(|a| extents[a.0 as usize]).product::<usize>();
    let numbers: Vec<u64> = sizes.iter().map(|&n| n as u64).collect();
    let touched = Traffic::read_by_launch(kernel, &numbers)
        .map_err(|why| DeviceError::Kernel { kernel: kernel.name.clone(), why })?;
    // What would read what it wrote is given another place to write to. What appends writes the same again.
    let mut other = match launch.in_place {
        true => Some(device.alloc(kernel.output().dtype, elements(&kernel.output().axes))?),
        false => None,
    };
    clock.samples(device, samples, |device| {
        let mut moved: Vec<Option<D::Buffer>> = Vec::with_capacity(launch.inputs.len());
        for (n, &bytes) in touched.iter().enumerate() {
            moved.push(places.other(device, launch, n, bytes as u64)?);
        }
        let inputs: Vec<_> = moved.iter().zip(launch.inputs).map(|(m, &i)| m.as_ref().or(i)).collect();
        let output = other.as_mut().unwrap_or(&mut *launch.output);
        device.launch(kernel, &inputs, output, sizes)
    })
}

fn rows(program: &Program, groups: Vec<Group>, ceilings: &Ceilings) -> Result<Vec<Row>, BenchError> {
    let total: f64 = groups
        .iter()
        .filter(|g| !g.samples.is_empty())
        .map(|g| g.launches as f64 * Seconds::of(g.samples.clone()).median)
        .sum();
    let row = |group: Group| {
        let kernel = &program.kernels[group.number];
        let numbers: Vec<u64> = group.sizes.iter().map(|&n| n as u64).collect();
        let traffic = Traffic::of_launch(kernel, &numbers)
            .map_err(|why| BenchError::Traffic { kernel: kernel.name.clone(), why })?;
        let bound_seconds = ceilings.bound(traffic.bytes(), traffic.flops);
        let time = (!group.samples.is_empty()).then(|| {
            let seconds = Seconds::of(group.samples);
            Time {
                seconds,
                bytes_per_second: traffic.bytes() / seconds.median,
                flops_per_second: traffic.flops / seconds.median,
                of_bound: bound_seconds / seconds.median,
                of_launches: group.launches as f64 * seconds.median / total,
            }
        });
        let symbols = kernel.size_symbols().into_iter().map(str::to_owned);
        Ok(Row {
            name: kernel.name.clone(),
            kind: kernel.kind,
            way: group.way.way.kind,
            tuned: group.way.tuned,
            parts: group.way.way.parts,
            sizes: symbols.zip(numbers).collect(),
            work: Work::of(kernel, &group.sizes),
            ir: kernel.module().to_string(),
            launches: group.launches,
            traffic,
            bound_seconds,
            time,
        })
    };
    let mut rows = groups.into_iter().map(row).collect::<Result<Vec<_>, BenchError>>()?;
    let spent = |r: &Row| r.launches as f64 * r.time.map_or(r.bound_seconds, |t| t.seconds.median);
    rows.sort_by(|a, b| spent(b).total_cmp(&spent(a)));
    Ok(rows)
}

/// What runs of a whole step took, in seconds.
#[derive(Default)]
struct Whole {
    /// From its start to its end.
    all: Vec<f64>,
    /// Until all was enqueued.
    host: Vec<f64>,
    /// Behind copies that last until then, without these.
    device: Vec<f64>,
}

fn step(kernels: &[Row], launches: u64, tokens: Option<u64>, whole: Whole) -> Step {
    let times = |r: &Row| r.launches as f64;
    let scaled = |r: &Row| Traffic {
        flops: r.traffic.flops * times(r),
        read: r.traffic.read * times(r),
        written: r.traffic.written * times(r),
    };
    let bound_seconds = kernels.iter().map(|r| r.bound_seconds * times(r)).sum();
    let of = |samples: Vec<f64>| (!samples.is_empty()).then(|| Seconds::of(samples));
    let seconds = of(whole.all);
    Step {
        launches,
        tokens,
        traffic: kernels.iter().map(scaled).sum(),
        bound_seconds,
        launches_seconds: kernels.iter().map(|r| Some(r.time?.seconds.median * times(r))).sum(),
        seconds,
        host_seconds: of(whole.host),
        device_seconds: of(whole.device),
        tokens_per_second: seconds.zip(tokens).map(|(s, n)| n as f64 / s.median),
        of_bound: seconds.map(|s| bound_seconds / s.median),
    }
}

/// Whether a graph reads whole sequences, without a history.
pub fn is_whole(graph: Graph) -> bool {
    match graph {
        Graph::Train | Graph::Gradient => true,
        Graph::Prefill | Graph::Decode => false,
    }
}
