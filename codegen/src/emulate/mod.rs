//! The CUDA text of kernels, run on this CPU.
//!
//! The very text that NVRTC would be given is compiled by the system's C++ compiler, with headers of ours in CUDA's place
//! (`include/`), and run in a process of its own (`emulator.cpp`, and `units.cpp` for what a device does beside its threads). It is
//! slow, and finds what a GPU may hide:
//!
//! - an access outside of a buffer, which is as long as the launch says and no longer, or of the block's memory;
//! - memory of the block that is read before it is written: it holds NaN, or huge numbers, before each block;
//! - a barrier that is missing: between meetings, threads run one after the other in random order;
//! - a barrier that some threads of the block, or lanes of the warp, do not come to;
//! - memory that the grids ahead may write and that is touched before all threads of the block have waited for these;
//! - accesses of several elements that are not aligned, and what is undefined in C++.
//!
//! Errors name the thread, the buffer, the element and the line of the text. Programs can count instead what kernels move and multiply
//! ([`Emulator::counting`]): compiled as for ThreadSanitizer, whose functions are ours.

mod count;
mod translate;
mod workshop;

pub use count::{Count, Moved};

use std::cell::{Ref, RefCell};
use std::ops::Range;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use latentc_ir::{DType, Value, ValueId};
use rayon::prelude::*;

use crate::cube::{
    self, Choices, Chosen, CubeIr, Edits, Grid, Kept, LaunchShape, Machine, Operand, Role, Split, Stages,
    Target, Tuning, Way,
};
use crate::device::{Data, Device, DeviceError, Launch};
use crate::memory::Layout;
use crate::program::Kernel;
use translate::Part;
use workshop::Workshop;

/// Kernels that are compiled together: most of the time goes to the headers.
const TOGETHER: usize = 8;

/// The most threads that a block of any GPU has.
const THREADS: u32 = 1024;

/// Blocks that run at once, as those see it of which each does the work of several: few, so that they do.
const AT_ONCE: u32 = 2;

/// An NVIDIA GPU, emulated. Launches of a kernel are in random order of threads and blocks, by the seed.
#[derive(Clone, Debug)]
pub struct Emulator {
    workshop: Arc<Workshop>,
    seed: u64,
    programs: Vec<Program>,
    edits: Arc<Edits>,
    tuning: Arc<Tuning>,
    /// Of each launch since it was last asked, where launches are counted.
    counts: Option<Vec<Count>>,
}

/// A text that is compiled.
#[derive(Clone, Debug)]
struct Program {
    /// What it computes: one kernel, or several side by side.
    kernels: Vec<Kernel>,
    role: Role,
    file: PathBuf,
    /// Its number in the file.
    number: u64,
    /// Whether the text is not the kernel's own.
    replaced: bool,
}

/// Memory of an [`Emulator`]: elements as CUDA kernels hold them.
#[derive(Debug)]
pub struct EmulatorBuffer {
    dtype: DType,
    memory: Memory,
    /// Which bytes of the memory.
    range: Range<usize>,
}

/// Memory of an [`Emulator`] that buffers are parts of.
#[derive(Debug)]
pub struct EmulatorArena(Memory);

/// Bytes that several buffers may share. A launch works on a copy of them.
type Memory = Rc<RefCell<Vec<u8>>>;

impl Emulator {
    /// An emulator whose random choices follow from a seed.
    ///
    /// # Errors
    /// If there is no C++ compiler with sanitizers.
    pub fn open(seed: u64) -> Result<Emulator, DeviceError> {
        let (programs, edits, tuning) = (Vec::new(), Arc::default(), Arc::default());
        Ok(Emulator { workshop: Workshop::open()?, seed, programs, edits, tuning, counts: None })
    }

    /// The same, with other texts in place of kernels' own.
    pub fn with_edits(self, edits: Arc<Edits>) -> Emulator {
        Emulator { edits, ..self }
    }

    /// The same, with ways in place of those that the rules say.
    pub fn with_tuning(self, tuning: Arc<Tuning>) -> Emulator {
        Emulator { tuning, ..self }
    }

    /// One that counts what launches move and multiply, and does not look for what they do wrong.
    pub fn counting(self) -> Emulator {
        Emulator { counts: Some(Vec::new()), programs: Vec::new(), ..self }
    }

    /// What was counted since the last call, a launch on the device after another; empty where nothing is counted.
    pub fn take_counts(&mut self) -> Vec<Count> {
        self.counts.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Compiles these kernels, several at once, so that launches need not.
    ///
    /// # Errors
    /// If one of them cannot be expressed or compiled.
    pub fn prepare<'k>(&mut self, kernels: impl IntoIterator<Item = &'k Kernel>) -> Result<(), DeviceError> {
        let mut new: Vec<(Vec<Kernel>, Role)> = Vec::new();
        for kernel in kernels {
            for stage in Stages::of(kernel).all {
                let one = (vec![stage.kernel], stage.role);
                if self.program(&one.0, one.1).is_none() && !new.contains(&one) {
                    new.push(one);
                }
            }
        }
        self.compile(new)
    }

    /// Compiles what is not compiled yet.
    fn compile(&mut self, new: Vec<(Vec<Kernel>, Role)>) -> Result<(), DeviceError> {
        let text = |(kernels, role): (Vec<Kernel>, Role)| {
            let irs = kernels.iter().map(|k| CubeIr::new(k, Target::Cuda)).collect::<Result<Vec<_>, _>>()?;
            let ir = match &irs[..] {
                [one] => one.of_role(role),
                several => CubeIr::together(several),
            };
            let (entry, source) = match self.edits.of(&ir) {
                Some(edit) => {
                    edit.take();
                    (edit.entry.clone(), edit.text.clone())
                }
                None => (format!("{}{}", cube::together_name(&kernels), role.suffix()), cube::written(&ir)?),
            };
            Ok(Text { kernels, role, entry, source })
        };
        let all = new.into_iter().map(text).collect::<Result<Vec<_>, DeviceError>>()?;
        let built: Result<Vec<_>, _> = all.par_chunks(TOGETHER).map(|chunk| self.build(chunk)).collect();
        self.programs.extend(built?.into_iter().flatten());
        Ok(())
    }

    /// Runs this text wherever the kernel is launched, instead of its own.
    ///
    /// # Errors
    /// If it does not compile.
    pub fn replace(&mut self, kernel: &Kernel, source: String) -> Result<(), DeviceError> {
        let (kernels, entry) = (vec![kernel.clone()], kernel.name.clone());
        let text = Text { kernels, role: Role::Whole, entry, source };
        let mut built = self.build(&[text])?;
        built.iter_mut().for_each(|p| p.replaced = true);
        self.programs.retain(|p| p.kernels != std::slice::from_ref(kernel));
        self.programs.extend(built);
        Ok(())
    }

    /// For each of these texts, an emulator that runs it wherever the kernel is launched, instead of its own. They are compiled together,
    /// which takes less time than one by one.
    ///
    /// # Errors
    /// If one of them does not compile.
    pub fn with_each(&self, kernel: &Kernel, sources: Vec<String>) -> Result<Vec<Emulator>, DeviceError> {
        let text = |source| Text {
            kernels: vec![kernel.clone()],
            role: Role::Whole,
            entry: kernel.name.clone(),
            source,
        };
        let built = self.build(&sources.into_iter().map(text).collect::<Vec<_>>())?;
        let alone = |program: Program| {
            let programs = vec![Program { replaced: true, ..program }];
            Emulator { programs, ..self.clone() }
        };
        Ok(built.into_iter().map(alone).collect())
    }

    fn program(&self, kernels: &[Kernel], role: Role) -> Option<&Program> {
        self.programs.iter().find(|p| p.role == role && p.kernels == kernels)
    }

    /// One program of several texts. If it does not compile, the error is about the one that is to blame.
    fn build(&self, texts: &[Text]) -> Result<Vec<Program>, DeviceError> {
        fn part(Text { kernels, role, entry, source }: &Text) -> Result<Part<'_>, DeviceError> {
            let shapes = kernels.iter().map(|k| LaunchShape::of_role(k, *role, Target::Cuda));
            let shape = shapes.reduce(LaunchShape::beside).ok_or_else(|| {
                let why = "no kernel, and a text".to_owned();
                DeviceError::Kernel { kernel: String::new(), why }
            })?;
            if shape.units > THREADS || shape.shared_bytes > cube::SHARED {
                return Err(cube::refuse(&kernels[0], format!("{shape}, which no GPU has")));
            }
            let waits = source.contains(cube::WAIT);
            Ok(Part { name: entry, source, shared_bytes: shape.shared_bytes, waits })
        }
        let parts: Vec<_> = texts.iter().map(part).collect::<Result<_, DeviceError>>()?;
        let name = format!("program_{}", fresh());
        match self.workshop.build(&name, &parts, self.counts.is_some()) {
            Ok(file) => {
                let program = |(n, text): (usize, &Text)| Program {
                    kernels: text.kernels.clone(),
                    role: text.role,
                    file: file.clone(),
                    number: n as u64,
                    replaced: false,
                };
                Ok(texts.iter().enumerate().map(program).collect())
            }
            Err(why) => match texts {
                [text] => Err(cube::refuse(&text.kernels[0], why)),
                _ => {
                    let each: Result<Vec<_>, _> =
                        texts.iter().map(|t| self.build(std::slice::from_ref(t))).collect();
                    Ok(each?.concat())
                }
            },
        }
    }

    /// Runs a program on these buffers, and gives what it leaves of those that are written, one after another.
    fn execute(
        &mut self,
        (kernels, role): (&[Kernel], Role),
        grid: Grid,
        sizes: &[usize],
        buffers: &[Bytes],
    ) -> Result<Vec<u8>, DeviceError> {
        let refuse = |why: String| cube::refuse(&kernels[0], why);
        let lens: Vec<_> = buffers.iter().map(|b| b.bytes.len() / b.element).collect();
        let info: Vec<u8> =
            cube::launch_info(sizes, &lens).data.iter().flat_map(|w| w.to_le_bytes()).collect();
        let program = self.program(kernels, role).ok_or_else(|| refuse("it is not compiled".to_owned()))?;
        let Program { file: program, number, .. } = program.clone();
        let mut words = vec![number, self.seed];
        let units = LaunchShape::of_role(&kernels[0], role, Target::Cuda).units;
        words.extend([grid.0, grid.1, grid.2, units].map(u64::from));
        words.extend([info.len() as u64, buffers.len() as u64]);
        let mut file: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        file.extend(&info);
        for Bytes { bytes, element, written, early } in buffers {
            let words = [bytes.len(), *element, usize::from(*written) | usize::from(*early) << 1];
            file.extend(words.iter().flat_map(|&w| (w as u64).to_le_bytes()));
            file.extend(bytes);
        }
        let maps = match (kernels, role) {
            ([kernel], Role::Whole | Role::Part) => cube::maps_of(kernel, sizes),
            _ => Vec::new(),
        };
        let map = |seen: &cube::Seen| {
            let dims = seen.dims.iter().flat_map(|&(numbers, bytes, width)| [numbers, bytes, width.into()]);
            [seen.buffer as u64, seen.dims.len() as u64].into_iter().chain(dims).collect::<Vec<_>>()
        };
        let words = [maps.len() as u64].into_iter().chain(maps.iter().flat_map(map));
        file.extend(words.flat_map(u64::to_le_bytes));
        let number = fresh();
        let mut names = vec!["launch", "result"];
        names.extend(self.counts.as_ref().map(|_| "counts"));
        let paths: Vec<_> =
            names.iter().map(|name| self.workshop.path(&format!("{name}_{number}"))).collect();
        let read = |path: &PathBuf| std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
        std::fs::write(&paths[0], file).map_err(|e| refuse(format!("{}: {e}", paths[0].display())))?;
        let ran = self.workshop.run(&program, &paths);
        let bytes = ran.and_then(|()| read(&paths[1]));
        let counted = paths.get(2).filter(|_| bytes.is_ok()).map(read);
        for path in &paths {
            // The folder goes in the end; a failed launch leaves no result.
            let _ = std::fs::remove_file(path);
        }
        if let (Some(counts), Some(counted)) = (&mut self.counts, counted) {
            let name = format!("{}{}", cube::together_name(kernels), role.suffix());
            counts.push(Count::read(name, buffers.len(), &counted.map_err(refuse)?));
        }
        bytes.map_err(refuse)
    }
}

/// What is compiled.
struct Text {
    kernels: Vec<Kernel>,
    role: Role,
    /// The name of its entry.
    entry: String,
    source: String,
}

/// A buffer of a launch: as many bytes as the types say, whatever is behind them, where an access is wrong.
#[derive(Clone)]
struct Bytes {
    bytes: Vec<u8>,
    /// Bytes of an element.
    element: usize,
    written: bool,
    /// Whether it may be read before the grids ahead are done.
    early: bool,
}

/// A number that no other file of this process has.
fn fresh() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Device for Emulator {
    type Buffer = EmulatorBuffer;
    type Arena = EmulatorArena;

    fn name(&self) -> String {
        format!("CUDA emulated by {}", self.workshop.compiler().display())
    }

    fn alloc(&mut self, dtype: DType, len: usize) -> Result<EmulatorBuffer, DeviceError> {
        let elem = Target::Cuda.bytes(dtype);
        let Some(bytes) = elem else {
            return Err(DeviceError::Memory {
                len,
                dtype,
                why: "CUDA kernels cannot hold this dtype".to_owned(),
            });
        };
        // As in the block's memory: what was not written shows.
        Ok(EmulatorBuffer::new(dtype, vec![0xff; len * bytes]))
    }

    fn upload(&mut self, dtype: DType, data: Data) -> Result<EmulatorBuffer, DeviceError> {
        let len = data.len();
        let fail = |why: &str| DeviceError::Memory { len, dtype, why: why.to_owned() };
        let bytes = Target::Cuda.encode(dtype, &data);
        let bytes =
            bytes.ok_or_else(|| fail("CUDA kernels hold floats but f64, integers and truth values"))?;
        Ok(EmulatorBuffer::new(dtype, bytes))
    }

    fn read(&mut self, buffer: &EmulatorBuffer, len: usize) -> Result<Data, DeviceError> {
        let dtype = buffer.dtype;
        let held = Target::Cuda.decode(dtype, &buffer.bytes(), len);
        held.filter(|d| d.len() == len).ok_or_else(|| DeviceError::Memory {
            len,
            dtype,
            why: format!("the buffer has {} bytes", buffer.range.len()),
        })
    }

    fn layout(&self) -> Layout {
        Target::Cuda.layout()
    }

    fn reserve(&mut self, bytes: u64) -> Result<EmulatorArena, DeviceError> {
        Ok(EmulatorArena(Rc::new(RefCell::new(vec![0xff; bytes as usize]))))
    }

    unsafe fn part(
        &mut self,
        arena: &EmulatorArena,
        offset: u64,
        dtype: DType,
        len: usize,
    ) -> Result<EmulatorBuffer, DeviceError> {
        let start = offset as usize;
        let range = start..start + len * Target::Cuda.bytes(dtype).unwrap_or(1);
        let all = arena.0.borrow().len();
        if range.end > all {
            let why = format!("they do not fit at byte {offset} of {all}");
            return Err(DeviceError::Memory { len, dtype, why });
        }
        Ok(EmulatorBuffer { dtype, memory: Rc::clone(&arena.0), range })
    }

    fn way(&self, kernel: &Kernel, sizes: &[usize]) -> Chosen {
        // Whoever asks whether it is admitted is told what is wrong with a choice.
        self.chosen(kernel, sizes).unwrap_or(Chosen::by_rule(kernel.kind))
    }

    fn admits(&self, kernel: &Kernel) -> Result<(), DeviceError> {
        Choices::of(kernel, Target::Cuda, &Machine::HOPPER, &self.tuning).map(drop)
    }

    fn take_ways(&mut self, tuning: Arc<Tuning>) {
        self.tuning = tuning;
    }

    fn machine(&self) -> Option<(Target, Machine)> {
        Some((Target::Cuda, Machine::HOPPER))
    }

    fn launch(
        &mut self,
        kernel: &Kernel,
        inputs: &[Option<&EmulatorBuffer>],
        output: &mut EmulatorBuffer,
        sizes: &[usize],
    ) -> Result<(), DeviceError> {
        let launch = Launch { kernel, inputs, output, sizes, key: None, still: None };
        self.launch_together(&mut std::iter::once(launch))
    }

    fn launch_together(
        &mut self,
        launches: &mut dyn Iterator<Item = Launch<'_, EmulatorBuffer>>,
    ) -> Result<(), DeviceError> {
        let mut grids: Vec<Vec<Ready<'_>>> = Vec::new();
        for launch in launches {
            let Some(ready) = self.ready(launch)? else { continue };
            let beside = |r: &Ready<'_>| r.joins && ready.joins && r.shape.units == ready.shape.units;
            match grids.iter_mut().find(|grid| grid.iter().all(beside)) {
                Some(grid) => grid.push(ready),
                None => grids.push(vec![ready]),
            }
        }
        for grid in grids {
            let bytes = match &grid[..] {
                [one] => self.run(one)?,
                several => self.run_together(several)?,
            };
            let mut rest = &bytes[..];
            for Ready { buffers, output, .. } in &grid {
                let written = buffers.last().map_or(0, |b| b.bytes.len());
                let (own, after) = rest.split_at(written);
                let start = output.range.start;
                output.memory.borrow_mut()[start..start + written].copy_from_slice(own);
                rest = after;
            }
        }
        Ok(())
    }
}

/// A checked launch that does something.
struct Ready<'a> {
    /// In the way that is taken.
    kernel: Kernel,
    /// Whether its text is not its own.
    replaced: bool,
    /// Whether it shares grids with others.
    joins: bool,
    shape: LaunchShape,
    grid: Grid,
    /// The parameters that are inputs.
    given: Vec<ValueId>,
    /// Those, and the output.
    buffers: Vec<Bytes>,
    output: &'a EmulatorBuffer,
    sizes: &'a [usize],
    /// Of a stream, as a tuning says.
    parts: Option<usize>,
}

impl Emulator {
    /// The way of a kernel at these sizes.
    fn chosen(&self, kernel: &Kernel, sizes: &[usize]) -> Result<Chosen, DeviceError> {
        let choices = Choices::of(kernel, Target::Cuda, &Machine::HOPPER, &self.tuning)?;
        Ok(choices.at(kernel, sizes, &self.tuning))
    }

    /// Checks a launch. `None` if there is nothing to do.
    fn ready<'a>(&mut self, launch: Launch<'a, EmulatorBuffer>) -> Result<Option<Ready<'a>>, DeviceError> {
        let Launch { kernel, inputs, output, sizes, key: _, still: _ } = launch;
        let extents = kernel.extents(sizes);
        // A text that replaces a kernel's own is what is to be run.
        let program = self.program(std::slice::from_ref(kernel), Role::Whole);
        let replaced = program.is_some_and(|p| p.replaced);
        let Way { kind, parts } = self.chosen(kernel, sizes)?.way;
        let kernel = if replaced { kernel.clone() } else { cube::way(kernel, kind) };
        let refuse = |why: String| cube::refuse(&kernel, why);
        if inputs.len() != kernel.body.params.len() || sizes.len() != kernel.size_symbols().len() {
            return Err(refuse(format!("{} buffers and {} sizes do not fit", inputs.len(), sizes.len())));
        }
        let shape = LaunchShape::of(&kernel);
        let grid = shape.grid(kernel.number(sizes)).map_err(refuse)?;
        let grid = shape.on_device(grid, Some(AT_ONCE));
        if grid.0 == 0 {
            return Ok(None);
        }
        let early = cube::early_of(&kernel);
        let exactly = |value: ValueId, buffer: &EmulatorBuffer, written: bool| {
            let Value { name, ty, .. } = kernel.body.value(value);
            let len: usize = ty.axes.iter().map(|a| extents[a.0 as usize]).product();
            if ty.dtype != buffer.dtype || len > buffer.len() {
                let given = format!("{} of {}", buffer.len(), buffer.dtype);
                return Err(refuse(format!(
                    "`{name}` has {len} elements of {}, the buffer {given}",
                    ty.dtype
                )));
            }
            let element = buffer.element();
            let early = early.contains(&value);
            Ok(Bytes { bytes: buffer.bytes()[..len * element].to_vec(), element, written, early })
        };
        let (mut given, mut buffers) = (Vec::new(), Vec::new());
        for (&param, input) in kernel.body.params.iter().zip(inputs) {
            let Some(buffer) = input else { continue };
            given.push(param);
            buffers.push(exactly(param, buffer, false)?);
        }
        buffers.push(exactly(kernel.body.results[0], output, true)?);
        let edited = || Ok(self.edits.of(&CubeIr::new(&kernel, Target::Cuda)?).is_some());
        let joins = !replaced && cube::joins(kernel.kind) && (self.edits.is_empty() || !edited()?);
        Ok(Some(Ready { kernel, replaced, joins, shape, grid, given, buffers, output, sizes, parts }))
    }

    /// Runs a launch that is several, and gives what it writes.
    fn run_stages(&mut self, launch: &Ready<'_>, stages: &Stages) -> Result<Vec<u8>, DeviceError> {
        let Ready { kernel, sizes, buffers, .. } = launch;
        self.prepare([kernel])?;
        let number = kernel.number(sizes);
        let memory = |kept: &Kept| {
            let (dtype, len) = kept.elements(&number);
            let element = Target::Cuda.bytes(dtype).unwrap_or(1);
            Bytes { bytes: vec![0xff; len * element], element, written: false, early: false }
        };
        let (mut params, mut kept) = (buffers.clone(), stages.kept.iter().map(memory).collect::<Vec<_>>());
        let last = params.len() - 1;
        for stage in &stages.all {
            let kernels = std::slice::from_ref(&stage.kernel);
            let shape = stage.shape(Target::Cuda);
            let grid = shape.grid(&number).map_err(|why| cube::refuse(kernel, why))?;
            let grid = shape.on_device(grid, Some(AT_ONCE));
            if grid.0 == 0 {
                continue;
            }
            let operands = stage.inputs.iter().chain([&stage.output]).map(|operand| match *operand {
                Operand::Param(n) => params[n].clone(),
                Operand::Kept(n) => kept[n].clone(),
                Operand::Output => params[last].clone(),
            });
            let mut used: Vec<_> = operands.collect();
            used.iter_mut().for_each(|b| b.written = false);
            used.last_mut().expect("there is an output").written = true;
            let bytes = self.execute((kernels, stage.role), grid, sizes, &used)?;
            match stage.output {
                Operand::Kept(n) => kept[n].bytes = bytes,
                Operand::Param(_) | Operand::Output => params[last].bytes = bytes,
            }
        }
        Ok(params.swap_remove(last).bytes)
    }

    /// Runs a launch, by parts if a device would, and gives what it writes.
    fn run(&mut self, launch: &Ready<'_>) -> Result<Vec<u8>, DeviceError> {
        let Ready { kernel, shape, grid, sizes, .. } = launch;
        let kernels = std::slice::from_ref(kernel);
        let stages = Stages::of(kernel);
        // A text that replaces that of one of several is run among them.
        let among = stages.all.iter().any(|stage| stage.kernel == *kernel);
        if stages.all.len() > 1 && (among || !launch.replaced) {
            return self.run_stages(launch, &stages);
        }
        let ir = CubeIr::new(kernel, Target::Cuda)?;
        let cubes = grid.0 as usize * grid.1 as usize;
        let split = ir.plan().filter(|_| !launch.replaced);
        let split = split.and_then(|plan| {
            let (cubes, extents) = ((cubes, shape.shared_bytes), kernel.extents(sizes));
            Some((plan, Split::of(plan, cubes, &extents, &Machine::HOPPER, launch.parts)?))
        });
        let Some((plan, split)) = split else {
            self.prepare(kernels)?;
            return self.execute((kernels, Role::Whole), *grid, sizes, &launch.buffers);
        };
        let roles = [Role::Part, Role::Merge];
        let new = roles.into_iter().filter(|&role| self.program(kernels, role).is_none());
        self.compile(new.map(|role| (kernels.to_vec(), role)).collect())?;
        let grids = split.grids(shape, *grid).map_err(|why| cube::refuse(kernel, why))?;
        let sizes = [*sizes, &[split.chunk]].concat();
        let mut kept = vec![0xff; split.scratch * 4];
        for (role, grid) in roles.into_iter().zip(grids) {
            let read = role.reads(&kernel.body, plan);
            let inputs = launch.given.iter().zip(&launch.buffers).filter(|(p, _)| read.contains(p));
            let mut used: Vec<_> = inputs.map(|(_, b)| b.clone()).collect();
            used.push(Bytes { bytes: kept, element: 4, written: role == Role::Part, early: false });
            used.extend(launch.buffers.last().cloned().filter(|_| role == Role::Merge));
            kept = self.execute((kernels, role), grid, &sizes, &used)?;
        }
        Ok(kept)
    }

    /// Runs launches in one grid, and gives what each writes, one after another.
    fn run_together(&mut self, launches: &[Ready<'_>]) -> Result<Vec<u8>, DeviceError> {
        let kernels: Vec<_> = launches.iter().map(|r| r.kernel.clone()).collect();
        if self.program(&kernels, Role::Whole).is_none() {
            self.compile(vec![(kernels.clone(), Role::Whole)])?;
        }
        let grids = launches.iter().map(|r| r.grid);
        let (ends, grid) = cube::in_one_grid(grids, launches[0].shape.units)
            .map_err(|why| cube::refuse(&kernels[0], why))?;
        let sizes: Vec<_> = launches.iter().flat_map(|r| r.sizes).copied().chain(ends).collect();
        let buffers: Vec<_> = launches.iter().flat_map(|r| &r.buffers).cloned().collect();
        self.execute((&kernels, Role::Whole), grid, &sizes, &buffers)
    }
}

impl EmulatorBuffer {
    /// One with memory of its own.
    fn new(dtype: DType, bytes: Vec<u8>) -> EmulatorBuffer {
        let range = 0..bytes.len();
        EmulatorBuffer { dtype, memory: Rc::new(RefCell::new(bytes)), range }
    }

    fn bytes(&self) -> Ref<'_, [u8]> {
        Ref::map(self.memory.borrow(), |all| &all[self.range.clone()])
    }

    /// Bytes of an element.
    fn element(&self) -> usize {
        Target::Cuda.bytes(self.dtype).unwrap_or(1)
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.range.len() / self.element()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}
