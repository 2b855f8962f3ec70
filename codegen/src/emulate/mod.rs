//! The CUDA text of kernels, run on this CPU.
//!
//! The very text that NVRTC would be given is compiled by the system's C++ compiler, with headers of ours in CUDA's place
//! (`include/`), and run in a process of its own (`emulator.cpp`). It is slow, and finds what a GPU may hide:
//!
//! - an access outside of a buffer, which is as long as the launch says and no longer, or of the block's memory;
//! - memory of the block that is read before it is written: it holds NaN, or huge numbers, before each block;
//! - a barrier that is missing: between meetings, threads run one after the other in random order;
//! - a barrier that some threads of the block, or lanes of the warp, do not come to;
//! - accesses of several elements that are not aligned, and what is undefined in C++.
//!
//! Errors name the thread, the buffer, the element and the line of the text.

mod translate;
mod workshop;

use std::cell::{Ref, RefCell};
use std::ops::Range;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use latentc_ir::{DType, Value, ValueId};
use rayon::prelude::*;

use crate::cube::{self, CubeIr, LaunchShape, Role, Split, Target, cuda_role};
use crate::device::{Data, Device, DeviceError};
use crate::memory::Layout;
use crate::program::{Kernel, KernelKind};
use translate::Part;
use workshop::Workshop;

/// Kernels that are compiled together: most of the time goes to the headers.
const TOGETHER: usize = 8;

/// The most shared memory that a block of any GPU has.
const SHARED_BYTES: usize = 227 << 10;
/// The most threads that a block of any GPU has.
const THREADS: u32 = 1024;

/// An NVIDIA GPU, emulated. Launches of a kernel are in random order of threads and blocks, by the seed.
#[derive(Clone, Debug)]
pub struct Emulator {
    workshop: Arc<Workshop>,
    seed: u64,
    programs: Vec<Program>,
}

/// A kernel that is compiled.
#[derive(Clone, Debug)]
struct Program {
    kernel: Kernel,
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
        Ok(Emulator { workshop: Workshop::open()?, seed, programs: Vec::new() })
    }

    /// Compiles these kernels, several at once, so that launches need not.
    ///
    /// # Errors
    /// If one of them cannot be expressed or compiled.
    pub fn prepare<'k>(&mut self, kernels: impl IntoIterator<Item = &'k Kernel>) -> Result<(), DeviceError> {
        let mut new: Vec<&Kernel> = Vec::new();
        for kernel in kernels {
            if self.program(kernel, Role::Whole).is_none() && !new.contains(&kernel) {
                new.push(kernel);
            }
        }
        self.compile(new.into_iter().map(|k| (k, Role::Whole)).collect())
    }

    /// Compiles what is not compiled yet.
    fn compile(&mut self, new: Vec<(&Kernel, Role)>) -> Result<(), DeviceError> {
        let all = new.into_iter().map(|(k, role)| Ok((k, role, cuda_role(k, role)?)));
        let all: Vec<_> = all.collect::<Result<_, DeviceError>>()?;
        let built: Result<Vec<_>, _> = all.par_chunks(TOGETHER).map(|chunk| self.build(chunk)).collect();
        self.programs.extend(built?.into_iter().flatten());
        Ok(())
    }

    /// Runs this text wherever the kernel is launched, instead of its own.
    ///
    /// # Errors
    /// If it does not compile.
    pub fn replace(&mut self, kernel: &Kernel, source: String) -> Result<(), DeviceError> {
        let mut built = self.build(&[(kernel, Role::Whole, source)])?;
        built.iter_mut().for_each(|p| p.replaced = true);
        self.programs.retain(|p| p.kernel != *kernel);
        self.programs.extend(built);
        Ok(())
    }

    fn program(&self, kernel: &Kernel, role: Role) -> Option<&Program> {
        self.programs.iter().find(|p| p.role == role && p.kernel == *kernel)
    }

    /// One program of several kernels. If it does not compile, the error is about the one that is to blame.
    fn build(&self, kernels: &[(&Kernel, Role, String)]) -> Result<Vec<Program>, DeviceError> {
        let part = |(kernel, role, _): &'_ (&Kernel, Role, String)| -> Result<(String, usize), DeviceError> {
            let shape = LaunchShape::of(kernel);
            if shape.units > THREADS || shape.shared_bytes > SHARED_BYTES {
                return Err(cube::refuse(kernel, format!("{shape}, which no GPU has")));
            }
            Ok((format!("{}{}", kernel.name, role.suffix()), shape.shared_bytes))
        };
        let texts: Vec<_> = kernels.iter().map(part).collect::<Result<_, _>>()?;
        let parts: Vec<_> = kernels
            .iter()
            .zip(&texts)
            .map(|((_, _, source), (name, shared_bytes))| Part { name, source, shared_bytes: *shared_bytes })
            .collect();
        let name = format!("program_{}", fresh());
        match self.workshop.build(&name, &parts) {
            Ok(file) => {
                let program = |(n, (kernel, role, _)): (usize, &(&Kernel, Role, String))| Program {
                    kernel: (*kernel).clone(),
                    role: *role,
                    file: file.clone(),
                    number: n as u64,
                    replaced: false,
                };
                Ok(kernels.iter().enumerate().map(program).collect())
            }
            Err(why) => match kernels {
                [(kernel, ..)] => Err(cube::refuse(kernel, why)),
                _ => {
                    let each: Result<Vec<_>, _> =
                        kernels.iter().map(|k| self.build(std::slice::from_ref(k))).collect();
                    Ok(each?.concat())
                }
            },
        }
    }

    /// Runs a program on these buffers, each with the bytes of an element, and gives what it leaves of the last.
    fn run(
        &self,
        (kernel, role): (&Kernel, Role),
        grid: (u32, u32, u32),
        sizes: &[usize],
        buffers: &[(Vec<u8>, usize)],
    ) -> Result<Vec<u8>, DeviceError> {
        let refuse = |why: String| cube::refuse(kernel, why);
        let lens: Vec<_> = buffers.iter().map(|(bytes, element)| bytes.len() / element).collect();
        let info: Vec<u8> =
            cube::launch_info(sizes, &lens).data.iter().flat_map(|w| w.to_le_bytes()).collect();
        let program = self.program(kernel, role).ok_or_else(|| refuse("it is not compiled".to_owned()))?;
        let mut words = vec![program.number, self.seed];
        words.extend([grid.0, grid.1, grid.2, LaunchShape::of(kernel).units].map(u64::from));
        words.extend([info.len() as u64, buffers.len() as u64]);
        let mut file: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        file.extend(&info);
        for (n, (bytes, element)) in buffers.iter().enumerate() {
            let last = n + 1 == buffers.len();
            let words = [bytes.len(), *element, usize::from(last)];
            file.extend(words.iter().flat_map(|&w| (w as u64).to_le_bytes()));
            file.extend(bytes);
        }
        let number = fresh();
        let launch = self.workshop.path(&format!("launch_{number}"));
        let result = self.workshop.path(&format!("result_{number}"));
        std::fs::write(&launch, file).map_err(|e| refuse(format!("{}: {e}", launch.display())))?;
        let ran = self.workshop.run(&program.file, &launch, &result);
        let bytes =
            ran.and_then(|()| std::fs::read(&result).map_err(|e| format!("{}: {e}", result.display())));
        for path in [launch, result] {
            // The folder goes in the end; a failed launch leaves no result.
            let _ = std::fs::remove_file(path);
        }
        bytes.map_err(refuse)
    }
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

    fn way(&self, kernel: &Kernel, sizes: &[usize]) -> KernelKind {
        cube::chosen(kernel, sizes).kind
    }

    fn launch(
        &mut self,
        kernel: &Kernel,
        inputs: &[Option<&EmulatorBuffer>],
        output: &mut EmulatorBuffer,
        sizes: &[usize],
    ) -> Result<(), DeviceError> {
        let extents = kernel.extents(sizes);
        // A text that replaces a kernel's own is what is to be run.
        let replaced = self.program(kernel, Role::Whole).is_some_and(|p| p.replaced);
        let kernel = &if replaced { kernel.clone() } else { cube::chosen(kernel, sizes) };
        let refuse = |why: String| cube::refuse(kernel, why);
        let symbols = kernel.size_symbols();
        if inputs.len() != kernel.body.params.len() || sizes.len() != symbols.len() {
            return Err(refuse(format!("{} buffers and {} sizes do not fit", inputs.len(), sizes.len())));
        }
        let shape = LaunchShape::of(kernel);
        let number = |s: &str| symbols.iter().position(|x| *x == s).map_or(0, |n| sizes[n]);
        let grid = shape.grid(number).map_err(refuse)?;
        if grid.0 == 0 {
            return Ok(());
        }
        // As many bytes as the types say, whatever is behind them: an access there is wrong.
        let exactly = |value: ValueId, buffer: &EmulatorBuffer| {
            let Value { name, ty, .. } = kernel.body.value(value);
            let len: usize = ty.axes.iter().map(|a| extents[a.0 as usize]).product();
            if ty.dtype != buffer.dtype || len > buffer.len() {
                let given = format!("{} of {}", buffer.len(), buffer.dtype);
                return Err(refuse(format!(
                    "`{name}` has {len} elements of {}, the buffer {given}",
                    ty.dtype
                )));
            }
            Ok(len)
        };
        let mut buffers: Vec<(Vec<u8>, usize)> = Vec::new();
        let mut given = Vec::new();
        for (&param, input) in kernel.body.params.iter().zip(inputs) {
            let Some(buffer) = input else { continue };
            let len = exactly(param, buffer)?;
            given.push(param);
            buffers.push((buffer.bytes()[..len * buffer.element()].to_vec(), buffer.element()));
        }
        let len = exactly(kernel.body.results[0], output)?;
        let written = len * output.element();
        buffers.push((output.bytes()[..written].to_vec(), output.element()));
        let ir = CubeIr::new(kernel, Target::Cuda)?;
        let cubes = grid.0 as usize * grid.1 as usize;
        let split = ir.plan().filter(|_| !replaced);
        let split = split.and_then(|plan| Some((plan, Split::of(plan, cubes, &extents)?)));
        let bytes = match split {
            None => {
                self.prepare([kernel])?;
                self.run((kernel, Role::Whole), grid, sizes, &buffers)?
            }
            Some((plan, split)) => {
                let roles = [Role::Part, Role::Merge];
                let new = roles.into_iter().filter(|&role| self.program(kernel, role).is_none());
                self.compile(new.map(|role| (kernel, role)).collect())?;
                let arranged = |cubes: usize| shape.arranged(cubes as u64).map_err(refuse);
                let grids = [
                    arranged(split.parts * cubes)?,
                    arranged(split.elements.div_ceil(shape.units as usize))?,
                ];
                let sizes = [sizes, &[split.chunk]].concat();
                let output = buffers.pop();
                let mut kept = (vec![0xff; split.scratch * 4], 4);
                for (role, grid) in roles.into_iter().zip(grids) {
                    let read = role.reads(&kernel.body, plan);
                    let inputs = given.iter().zip(&buffers).filter(|(p, _)| read.contains(p));
                    let mut used: Vec<_> = inputs.map(|(_, b)| b.clone()).collect();
                    used.push(kept);
                    used.extend(output.clone().filter(|_| role == Role::Merge));
                    kept = (self.run((kernel, role), grid, &sizes, &used)?, 4);
                }
                kept.0
            }
        };
        let start = output.range.start;
        output.memory.borrow_mut()[start..start + written].copy_from_slice(&bytes);
        Ok(())
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
