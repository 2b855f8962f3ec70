//! Finds out what launches come to on a device.

use std::collections::HashMap;
use std::sync::Arc;

use cubecl_core::ir::HardwareProperties;
use latentc_ir::{Type, ValueId};

use super::edits::Edits;
use super::kernel::CubeIr;
use super::machine::Machine;
use super::overlap::early_of;
use super::prepared::{
    Arranged, Does, Entry, Half, Halves, Launches, Memory, OneGrid, Prepared, Several, Staged,
};
use super::refuse;
use super::shape::{Grid, LaunchShape, in_one_grid};
use super::split::{Role, Split};
use super::stages::{Operand, Stage, Stages};
use super::target::Target;
use super::tuning::{Choices, Chosen, Tuning, Way};
use super::ways::{joins, way};
use crate::device::DeviceError;
use crate::program::{Kernel, KernelKind};
use crate::stream::StreamPlan;

/// What is known of a device and of the kernels that were launched there.
pub(super) struct Preparer {
    target: Target,
    hardware: HardwareProperties,
    /// What rules ask of the device.
    pub(super) machine: Machine,
    /// Texts that are compiled in place of kernels' own.
    edits: Arc<Edits>,
    /// Ways that are taken in place of those of the rules.
    tuning: Arc<Tuning>,
    /// What was launched before.
    known: Vec<Known>,
    /// Its places by kernel name. Two programs may use one name for different kernels.
    named: HashMap<String, Vec<usize>>,
    /// The same by key.
    keyed: HashMap<u64, usize>,
    memory: Memory,
}

/// A kernel that was launched before.
struct Known {
    kernel: Kernel,
    choices: Choices,
    /// By the ways that were taken.
    taken: Vec<Arc<Launches>>,
}

impl Preparer {
    pub(super) fn new(target: Target, hardware: HardwareProperties, machine: Machine) -> Preparer {
        Preparer {
            target,
            hardware,
            machine,
            edits: Arc::default(),
            tuning: Arc::default(),
            known: Vec::new(),
            named: HashMap::new(),
            keyed: HashMap::new(),
            memory: Memory::default(),
        }
    }

    /// Has kernels compiled from other texts than their own.
    pub(super) fn take_edits(&mut self, edits: Arc<Edits>) {
        self.edits = edits;
        self.forget();
    }

    /// Has other ways than those of the rules be taken.
    pub(super) fn take_ways(&mut self, tuning: Arc<Tuning>) {
        self.tuning = tuning;
        self.forget();
    }

    /// What was found out before is by other choices.
    fn forget(&mut self) {
        self.memory = Memory::default();
        self.keyed.clear();
        self.named.clear();
        self.known.clear();
    }

    /// As [`Device::way`](crate::device::Device::way).
    pub(super) fn way(&self, kernel: &Kernel, sizes: &[usize]) -> Chosen {
        match Choices::of(kernel, self.target, &self.machine, &self.tuning) {
            Ok(choices) => choices.at(kernel, sizes, &self.tuning),
            // Whoever asks whether it is admitted is told.
            Err(_) => Chosen::by_rule(kernel.kind),
        }
    }

    /// As [`Device::ways`](crate::device::Device::ways).
    pub(super) fn ways(&self, kernel: &Kernel, sizes: &[usize]) -> Vec<Way> {
        let Ok(choices) = Choices::of(kernel, self.target, &self.machine, &Tuning::default()) else {
            return Vec::new();
        };
        let of = |kind: KernelKind| match self.parts(kernel, kind, sizes) {
            none if none.is_empty() => vec![Way { kind, parts: None }],
            all => all.into_iter().map(|n| Way { kind, parts: Some(n) }).collect(),
        };
        choices.candidates(&kernel.extents(sizes)).into_iter().flat_map(of).collect()
    }

    /// As [`Device::admits`](crate::device::Device::admits).
    pub(super) fn admits(&self, kernel: &Kernel) -> Result<(), DeviceError> {
        Choices::of(kernel, self.target, &self.machine, &self.tuning).map(drop)
    }

    /// The numbers of parts that are worth trying for a stream in one of its ways, that of the rules first; none for what is none.
    fn parts(&self, kernel: &Kernel, kind: KernelKind, sizes: &[usize]) -> Vec<usize> {
        let kernel = way(kernel, kind);
        let plan = if kind.streams() { StreamPlan::of(&kernel.body).ok() } else { None };
        let shape = LaunchShape::on(&kernel, self.target);
        let (Some(plan), Ok((x, y, _))) = (plan, shape.grid(kernel.number(sizes))) else { return Vec::new() };
        let (cubes, extents) = ((x as usize * y as usize, shape.shared_bytes), kernel.extents(sizes));
        let of = |told| Split::of(&plan, cubes, &extents, &self.machine, told).map_or(1, |split| split.parts);
        let own = of(None);
        let mut all = vec![own];
        for more in [1, own / 2, 2 * own, 4 * own] {
            let parts = of(Some(more));
            if more > 0 && !all.contains(&parts) {
                all.push(parts);
            }
        }
        all
    }

    /// What a kernel on so many buffers comes to at these sizes, and whether that is its first launch in that way.
    pub(super) fn prepared(
        &mut self,
        kernel: &Kernel,
        inputs: usize,
        sizes: &[usize],
        key: Option<u64>,
    ) -> Result<(Arc<Prepared>, bool), DeviceError> {
        let known = key.and_then(|key| self.memory.kernels.find(key, sizes));
        let symbols = known.as_ref().map_or_else(|| kernel.size_symbols().len(), |known| known.sizes.len());
        let params = kernel.body.params.len();
        if inputs != params || sizes.len() != symbols {
            let given = format!("{inputs} buffers and {} sizes", sizes.len());
            return Err(refuse(kernel, format!("{given}, not {params} and {symbols}")));
        }
        if let Some(known) = known {
            return Ok((known, false));
        }
        let (prepared, first) = self.prepare(kernel, sizes, key)?;
        let prepared = Arc::new(prepared);
        if let Some(key) = key {
            self.memory.kernels.keep(key, sizes, &prepared);
        }
        Ok((prepared, first))
    }

    /// Where what is known of a kernel is.
    fn place(&mut self, kernel: &Kernel, key: Option<u64>) -> Result<usize, DeviceError> {
        if let Some(&place) = key.and_then(|key| self.keyed.get(&key)) {
            return Ok(place);
        }
        let named = self.named.entry(kernel.name.clone()).or_default();
        let place = match named.iter().find(|&&n| self.known[n].kernel == *kernel) {
            Some(&place) => place,
            None => {
                let choices = Choices::of(kernel, self.target, &self.machine, &self.tuning)?;
                self.known.push(Known { kernel: kernel.clone(), choices, taken: Vec::new() });
                named.push(self.known.len() - 1);
                self.known.len() - 1
            }
        };
        self.keyed.extend(key.map(|key| (key, place)));
        Ok(place)
    }

    /// The way that a kernel takes at these sizes, what it comes to in that, and whether this is its first launch so.
    fn launches(
        &mut self,
        kernel: &Kernel,
        sizes: &[usize],
        key: Option<u64>,
    ) -> Result<(Way, Arc<Launches>, bool), DeviceError> {
        let place = self.place(kernel, key)?;
        let Known { choices, taken, .. } = &self.known[place];
        let chosen = choices.at(kernel, sizes, &self.tuning).way;
        if let Some(launches) = taken.iter().find(|l| l.kind == chosen.kind) {
            return Ok((chosen, Arc::clone(launches), false));
        }
        let launches = Arc::new(self.stages(kernel, chosen.kind)?);
        self.known[place].taken.push(Arc::clone(&launches));
        Ok((chosen, launches, true))
    }

    /// What a kernel comes to in one of its ways.
    fn stages(&self, kernel: &Kernel, kind: KernelKind) -> Result<Launches, DeviceError> {
        let Stages { kept, all } = Stages::of(&way(kernel, kind));
        let body = &kernel.body;
        let early = all.iter().flat_map(|stage| early_of(&stage.kernel));
        let early: Option<Vec<_>> = early.map(|v| body.params.iter().position(|p| *p == v)).collect();
        // What is several reads other buffers, too.
        let early = early.filter(|early| all.len() == 1 || early.is_empty());
        let mut stages = Vec::with_capacity(all.len());
        let mut halves = None;
        for stage in all {
            let (ir, shape) = (stage.ir(self.target)?, stage.shape(self.target));
            self.check(&stage, &shape)?;
            if let (Some(plan), true) = (ir.plan(), stages.is_empty()) {
                halves = Some([Role::Part, Role::Merge].map(|role| {
                    let read = role.reads(body, plan);
                    let numbers = body.params.iter().enumerate().filter(|(_, p)| read.contains(p));
                    let reads = numbers.map(|(n, _)| n).collect();
                    Half { entry: Entry::new(self.edits.apply(ir.of_role(role))), reads }
                }));
            }
            stages.push((stage, Entry::new(self.edits.apply(ir)), shape));
        }
        Ok(Launches { name: Arc::from(kernel.name.as_str()), kind, kept, stages, halves, early })
    }

    /// Whether the device can run a kernel.
    fn check(&self, Stage { kernel, inputs, .. }: &Stage, shape: &LaunchShape) -> Result<(), DeviceError> {
        let hardware = &self.hardware;
        let buffers = inputs.len() + 1;
        if buffers > hardware.max_bindings as usize {
            let most = hardware.max_bindings;
            return Err(refuse(kernel, format!("{buffers} buffers, where the device takes {most}")));
        }
        if shape.units > hardware.max_units_per_cube.min(hardware.max_cube_dim.0) {
            let most = hardware.max_units_per_cube;
            return Err(refuse(
                kernel,
                format!("{} units a cube, where the device takes {most}", shape.units),
            ));
        }
        if shape.shared_bytes > hardware.max_shared_memory_size {
            let (need, most) = (shape.shared_bytes, hardware.max_shared_memory_size);
            let why = format!("{need} bytes of shared memory, where the device has {most}");
            return Err(refuse(kernel, why));
        }
        Ok(())
    }

    /// The grid of a launch, all zeros if there is nothing to do.
    fn grid(
        &self,
        kernel: &Kernel,
        shape: &LaunchShape,
        number: impl Fn(&str) -> usize,
    ) -> Result<Grid, DeviceError> {
        let grid = shape.grid(number).map_err(|why| refuse(kernel, why))?;
        let grid = shape.on_device(grid, self.hardware.num_streaming_multiprocessors);
        let most = self.hardware.max_cube_count;
        if grid.0 > most.0 || grid.1 > most.1 {
            let (x, y, _) = grid;
            let cubes = format!("{x} x {y} cubes, where the device takes {} x {}", most.0, most.1);
            return Err(refuse(kernel, cubes));
        }
        Ok(grid)
    }

    /// What a kernel comes to at these sizes, and whether that is its first launch in that way.
    fn prepare(
        &mut self,
        kernel: &Kernel,
        sizes: &[usize],
        key: Option<u64>,
    ) -> Result<(Prepared, bool), DeviceError> {
        let extents = kernel.extents(sizes);
        let (taken, launches, first) = self.launches(kernel, sizes, key)?;
        let (_, entry, shape) = &launches.stages[0];
        let grid = self.grid(kernel, shape, kernel.number(sizes))?;
        let body = &kernel.body;
        let needs = |value: ValueId| {
            let Type { dtype, axes } = body.ty(value);
            (*dtype, axes.iter().map(|a| extents[a.0 as usize]).fold(1usize, usize::saturating_mul))
        };
        let inputs: Vec<_> = body.params.iter().map(|&p| CubeIr::reads(body, p).then(|| needs(p))).collect();
        let output = needs(body.results[0]);
        let cubes = grid.0 as usize * grid.1 as usize;
        let plan = entry.ir.plan().filter(|_| cubes > 0);
        let split = plan.and_then(|plan| {
            let cubes = (cubes, shape.shared_bytes);
            Split::of(plan, cubes, &extents, &self.machine, taken.parts)
        });
        let several = match (split, &launches.halves) {
            (Some(split), Some(halves)) => {
                let [part, merge] = split.grids(shape, grid).map_err(|why| refuse(kernel, why))?;
                let sizes = [sizes, &[split.chunk]].concat();
                let half = |Half { entry, reads }: &Half, grid, output: Option<usize>| {
                    let lens = reads.iter().map(|&n| inputs[n].map_or(0, |(_, len)| len));
                    let lens: Vec<_> = lens.chain([split.scratch]).chain(output).collect();
                    (OneGrid::new(entry, grid, &sizes, &lens), Arc::clone(reads))
                };
                let grids = [half(&halves[0], part, None), half(&halves[1], merge, Some(output.1))];
                Some(Several::Halves(Box::new(Halves { scratch: split.scratch, grids })))
            }
            _ if launches.stages.len() > 1 => {
                let lens: Vec<_> = inputs.iter().flatten().map(|&(_, len)| len).collect();
                Some(Several::Staged(self.staged(kernel, &launches, sizes, (&lens, output.1))?))
            }
            _ => None,
        };
        Ok((Prepared { sizes: sizes.to_vec(), launches, grid, inputs, output, several }, first))
    }

    /// The stages of a kernel whose parameters and output have so many elements.
    fn staged(
        &self,
        kernel: &Kernel,
        launches: &Launches,
        sizes: &[usize],
        (params, output): (&[usize], usize),
    ) -> Result<Staged, DeviceError> {
        let number = kernel.number(sizes);
        let kept: Vec<_> = launches.kept.iter().map(|kept| kept.elements(&number)).collect();
        let mut grids = Vec::new();
        for (stage, entry, shape) in &launches.stages {
            let grid = self.grid(kernel, shape, &number)?;
            let operands: Vec<_> = stage.inputs.iter().chain([&stage.output]).copied().collect();
            // All parameters of a kernel that comes to several are read, so they are numbered as its buffers are.
            let len = |operand: &Operand| match *operand {
                Operand::Param(n) => params[n],
                Operand::Kept(n) => kept[n].1,
                Operand::Output => output,
            };
            let lens: Vec<_> = operands.iter().map(len).collect();
            if grid.0 > 0 {
                grids.push((OneGrid::new(entry, grid, sizes, &lens), operands));
            }
        }
        Ok(Staged { kept, grids })
    }

    /// What launches come to that may run at the same time. Those that are known by keys are remembered.
    pub(super) fn arranged(
        &mut self,
        of: &[Arc<Prepared>],
        keyed: bool,
    ) -> Result<Arc<Arranged>, DeviceError> {
        if let Some(arranged) = keyed.then(|| self.memory.arranged(of)).flatten() {
            return Ok(arranged);
        }
        let arranged = Arc::new(self.arrange(of)?);
        if keyed {
            self.memory.keep_arranged(&arranged);
        }
        Ok(arranged)
    }

    /// Shares launches out to grids: as many in one as fit.
    fn arrange(&mut self, of: &[Arc<Prepared>]) -> Result<Arranged, DeviceError> {
        // Half of the memory of a cube at most, so that two of them fit on a processor.
        let bindings = self.hardware.max_bindings as usize;
        let shared = self.hardware.max_shared_memory_size / 2;
        let shape = |n: usize| &of[n].launches.stages[0].2;
        let entry = |n: usize| &of[n].launches.stages[0].1;
        let own =
            |n: usize| joins(of[n].launches.kind) && of[n].several.is_none() && entry(n).ir.edit().is_none();
        let room = |grid: &[usize], next: usize| {
            let all = || grid.iter().copied().chain([next]);
            all().all(|n| own(n) && shape(n).units == shape(next).units)
                && all().map(|n| of[n].lens().count()).sum::<usize>() <= bindings
                && all()
                    .map(|n| shape(n).clone())
                    .reduce(LaunchShape::beside)
                    .is_some_and(|s| s.shared_bytes <= shared)
                && in_one_grid(all().map(|n| of[n].grid), shape(next).units).is_ok()
        };
        let mut grids: Vec<Vec<usize>> = Vec::new();
        for n in 0..of.len() {
            match grids.iter_mut().find(|grid| room(grid, n)) {
                Some(grid) => grid.push(n),
                None => grids.push(vec![n]),
            }
        }
        let (memory, edits) = (&mut self.memory, &self.edits);
        let mut does = |members: &[usize]| {
            let first = members[0];
            let one = &of[first];
            if members.len() == 1 {
                if one.several.is_some() {
                    return Ok(Does::More);
                }
                let lens: Vec<_> = one.lens().collect();
                return Ok(Does::Grid(OneGrid::new(entry(first), one.grid, &one.sizes, &lens)));
            }
            let grids = members.iter().map(|&n| of[n].grid);
            let (ends, grid) =
                in_one_grid(grids, shape(first).units).map_err(|why| refuse(entry(first).ir.first(), why))?;
            let lens: Vec<_> = members.iter().flat_map(|&n| of[n].lens()).collect();
            let sizes: Vec<_> =
                members.iter().flat_map(|&n| of[n].sizes.iter().copied()).chain(ends).collect();
            let launches: Vec<_> = members.iter().map(|&n| &of[n].launches).collect();
            let together = memory.together(&launches, || {
                let irs = members.iter().map(|&n| &entry(n).ir);
                Entry::new(edits.apply(CubeIr::together(irs)))
            });
            Ok(Does::Grid(OneGrid::new(&together, grid, &sizes, &lens)))
        };
        let grids = grids.into_iter().map(|members| {
            let does = does(&members)?;
            Ok((members, does))
        });
        let grids = grids.collect::<Result<_, DeviceError>>()?;
        Ok(Arranged::new(of.to_vec(), grids))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn hopper() -> Preparer {
        let machine = Machine::HOPPER;
        let hardware = HardwareProperties {
            load_width: 128,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 64,
            max_shared_memory_size: machine.shared_bytes,
            max_cube_count: (i32::MAX as u32, 65535, 65535),
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: Some(machine.multiprocessors as u32),
            num_cpu_cores: None,
            num_tensor_cores: Some(4),
            min_tensor_cores_dim: Some(8),
            max_vector_size: 16,
        };
        Preparer::new(Target::Cuda, hardware, machine)
    }

    fn kernel(name: &str, kind: KernelKind, body: &str) -> Kernel {
        let text = format!("module m entry @{name}\n\nfunc @{name} {{\n{body}\nreturn y\n}}\n");
        let module = latentc_ir::parse("m.ir", &text).unwrap_or_else(|e| panic!("{e}"));
        Kernel { name: name.to_owned(), kind, body: module.functions[0].clone() }
    }

    /// Launches that may run at the same time, each with its key. Their only run-time size is the length of the past.
    fn launches() -> Vec<Vec<(u64, Kernel)>> {
        let attention = "axes b=1, t=1, i=16, c=512, s=n0\nparam q: bf16[b, t, i, c]\nparam kv: bf16[s, b, c]\nparam pos: i32[b, t]\n\
                         at: i32[s] = position of s\nseen: bool[s, b, t] = le at, pos\n\
                         z: f32[b, t, i, s] = contract q, kv over c\nleast: f32 = const -inf\n\
                         m: f32[b, t, i, s] = select seen, z, least\np: bf16[b, t, i, s] = softmax m over s\n\
                         y: bf16[b, t, i, c] = contract p, kv over s";
        let map = "axes s=n0, c=70\nparam x: f32[s, c]\ny: f32[s, c] = exp x";
        let sums = "axes s=n0, c=70\nparam x: f32[s, c]\ny: f32[s] = reduce_sum x over c";
        let product = "axes s=n0, c=64, d=96\nparam x: bf16[s, c]\nparam w: bf16[c, d]\ny: bf16[s, d] = contract x, w over c";
        let kernels = [
            vec![kernel("attention", KernelKind::Stream, attention)],
            vec![kernel("map", KernelKind::Map, map), kernel("sums", KernelKind::Map, sums)],
            vec![kernel("product", KernelKind::Contract, product)],
        ];
        let mut keys = 0..;
        kernels.map(|group| keys.by_ref().zip(group).collect()).into()
    }

    /// All that a device is given of launches with a past of that length: each grid's kernel with its cubes, words and maps.
    fn told(preparer: &mut Preparer, past: usize, keyed: bool, entries: &mut BTreeSet<usize>) -> Vec<String> {
        let mut all = Vec::new();
        for group in launches() {
            let prepared = group.iter().map(|(key, kernel)| {
                let (inputs, key) = (kernel.body.params.len(), keyed.then_some(*key));
                preparer.prepared(kernel, inputs, &[past], key).unwrap().0
            });
            let prepared: Vec<_> = prepared.collect();
            let mut grid = |what: String, one: &OneGrid| {
                entries.insert(Arc::as_ptr(&one.entry).addr());
                let kernels: Vec<_> =
                    one.entry.ir.kernels().iter().map(|(k, role)| format!("{} {role:?}", k.name)).collect();
                let (identity, words) = (one.entry.ir.identity(), one.words().to_vec());
                all.push(format!("{what} {kernels:?} {identity} {:?} {words:?} {:?}", one.grid, one.maps));
            };
            for (members, does) in &preparer.arranged(&prepared, keyed).unwrap().grids {
                let when: Vec<_> = members
                    .iter()
                    .flat_map(|&n| [None, Some(0), Some(2)].map(|s| prepared[n].when(s)))
                    .collect();
                match does {
                    Does::Grid(one) => grid(format!("{members:?} {when:?}"), one),
                    Does::More => match prepared[members[0]].several.as_ref().unwrap() {
                        Several::Halves(halves) => {
                            let scratch = halves.scratch;
                            halves.grids.iter().for_each(|(one, reads)| {
                                grid(format!("{scratch} {reads:?} {when:?}"), one);
                            });
                        }
                        Several::Staged(Staged { kept, grids }) => {
                            grids.iter().for_each(|(one, operands)| {
                                grid(format!("{kept:?} {operands:?} {when:?}"), one);
                            })
                        }
                    },
                }
            }
        }
        all
    }

    #[test]
    fn what_is_remembered_of_other_lengths_changes_nothing() {
        let mut remembers = hopper();
        let (mut entries, mut seen) = (BTreeSet::new(), BTreeSet::new());
        // Lengths at which a stream is split or not, ways change, and some come again.
        for past in (1..20).chain([64, 127, 128, 129, 500, 501, 1000, 4096, 4097, 128, 3, 0, 501]) {
            let now = told(&mut remembers, past, true, &mut entries);
            assert_eq!(now, told(&mut hopper(), past, false, &mut BTreeSet::new()), "{past}");
            seen.extend(now);
        }
        // It was no other device's answers that were compared: each length has its own.
        assert!(seen.len() > 80, "{}", seen.len());
    }

    #[test]
    fn kernels_are_found_out_once_for_all_lengths_of_the_past() {
        let (mut preparer, mut entries) = (hopper(), BTreeSet::new());
        for past in 300..340 {
            told(&mut preparer, past, true, &mut entries);
        }
        // Parts of attention and what merges them, two kernels side by side, and a product with what comes before and behind it.
        assert!(entries.len() < 8, "{}", entries.len());
        let known: Vec<_> = preparer.known.iter().map(|k| (k.kernel.name.as_str(), k.taken.len())).collect();
        assert_eq!(known, [("attention", 1), ("map", 1), ("sums", 1), ("product", 1)]);
    }
}
