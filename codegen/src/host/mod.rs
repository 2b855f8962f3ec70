//! The host executor: kernels on the threads of this machine, in plain Rust.
//!
//! Floats are computed in f32, integers and truth values in i32. Weights stay in the 16 bits that they are stored in and are widened
//! in registers, and those of experts in the tensors that each has; all else is held in four bytes. Map kernels are run by a small vector
//! machine ([`map`]), contractions of many rows by the `gemm` crate, or by the CPU's own products of bf16 where it has them, and of few rows
//! by loops that read each weight once ([`multiply`]), streamed softmaxes by all of them ([`stream`]).

mod awake;
mod coded;
mod contract;
mod few;
mod grouped;
#[cfg(target_arch = "x86_64")]
mod halves;
mod map;
mod multiply;
mod prepared;
mod scatter;
mod simd;
mod spare;
mod stream;
mod vector;
mod walk;

use std::cell::UnsafeCell;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use latentc_ir::{DType, Type};
use memmap2::{MmapOptions, MmapRaw};
use rayon::prelude::*;
use smallvec::SmallVec;

use self::prepared::Prepared;
use self::spare::{Spare, Takes};
use crate::device::{Data, Device, DeviceError, Floats, Launch, Remembered, SharedFloats};
use crate::memory::Layout;
use crate::program::Kernel;

/// This machine's CPU.
pub struct Host {
    /// What launches come to, by their [`key`](Launch::key): to find it out takes longer than some kernels run on one row.
    prepared: Remembered<Prepared>,
    spare: Spare,
    /// What all threads have.
    takes: Takes,
    /// Those of the axes of a launch, while it runs.
    extents: Vec<usize>,
    most: usize,
}

/// Elements that pieces of a kernel leave for each other at most, if no other number is given: a launch has them in memory for itself,
/// and the next piece finds some of them in a cache.
const MOST: usize = 1 << 22;

/// Elements of each of a few arrays that are in a cache all together.
const NEAR: usize = 1 << 16;

/// As many elements as several large pages have.
const LONG: usize = 1 << 22;

impl Default for Host {
    fn default() -> Host {
        Host {
            prepared: Remembered::default(),
            spare: Spare::default(),
            takes: Takes::default(),
            extents: Vec::new(),
            most: MOST,
        }
    }
}

impl Host {
    /// All that is here.
    pub fn new() -> Host {
        Host::default()
    }

    /// All that is here, the calling thread included: for the main thread of a program, whose launches then neither wake another
    /// thread to begin nor wait for it to end. A thread that ends before the process does must not be the one.
    pub fn with_this_thread() -> Host {
        // There may be threads already, if someone asked for them; they do as well.
        let _ = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
        Host::default()
    }

    /// The same, but pieces of a kernel leave no more than so many elements for each other, where rows may go one after the other.
    pub fn leaving(self, most: usize) -> Host {
        Host { most, ..self }
    }

    /// What a kernel comes to at these sizes. It is remembered by the key, if there is one.
    fn prepared(
        &mut self,
        kernel: &Kernel,
        sizes: &[usize],
        key: Option<u64>,
    ) -> Result<Arc<Prepared>, DeviceError> {
        if let Some(found) = key.and_then(|key| self.prepared.find(key, sizes)) {
            return Ok(found);
        }
        let made = Arc::new(Prepared::new(kernel, sizes, self.most)?);
        self.takes.bring(&made.takes());
        if let Some(key) = key {
            self.prepared.keep(key, &made.sizes, &made);
        }
        Ok(made)
    }

    fn run(
        &mut self,
        kernel: &Kernel,
        inputs: &[Option<&Buffer>],
        output: &mut Buffer,
        sizes: &[usize],
        key: Option<u64>,
    ) -> Result<(), DeviceError> {
        let prepared = self.prepared(kernel, sizes, key)?;
        prepared.extents(sizes, &mut self.extents);
        let fail = |why: &str| Err(map::fail(kernel, why));
        // What the result takes the place of is read through the output: no reference may be to what is written.
        let replaced = inputs.iter().position(|b| b.is_some_and(|b| b.is_at(output)));
        let apart =
            |(n, b): (usize, &Option<&Buffer>)| Some(n) == replaced || b.is_none_or(|b| !b.meets(output));
        if !inputs.iter().enumerate().all(apart) {
            return fail("the output has elements of an input");
        }
        let apart = inputs.iter().enumerate().map(|(n, b)| b.filter(|_| Some(n) != replaced));
        let views: SmallVec<[_; 10]> = apart.map(|b| b.map(Buffer::view)).collect();
        check(kernel, &views, output, &self.extents)?;
        let Some(output) = output.view_mut() else { return fail("the output is read-only") };
        prepared.run(kernel, &views, output, replaced, &mut self.extents, &mut self.spare)
    }
}

/// Elements in this machine's memory.
#[derive(Debug)]
pub enum Buffer {
    /// Floats that nobody else has a part of.
    F32(Vec<f32>),
    /// Integers or truth values.
    I32(Vec<i32>),
    /// Floats that lie elsewhere, such as in a mapped file.
    Shared(Arc<dyn SharedFloats>),
    /// Some of what others may have a part of, too.
    Part(Part),
}

/// Memory that buffers are parts of, which the system finds page by page when it is first written. Elements of all dtypes have four bytes
/// here.
#[derive(Debug)]
pub struct Arena(Arc<Memory>);

/// Elements `start..start + len` of what several buffers lie in.
#[derive(Debug)]
pub struct Part {
    memory: Arc<Memory>,
    start: usize,
    len: usize,
    float: bool,
}

/// Memory that several buffers lie in.
#[derive(Debug)]
enum Memory {
    Mapped(MmapRaw),
    Floats(Vec<UnsafeCell<f32>>),
}

// SAFETY: who writes to a part and who reads it is up to launches, which come one after the other.
unsafe impl Sync for Memory {}

impl Memory {
    fn of(floats: Vec<f32>) -> Memory {
        let mut floats = ManuallyDrop::new(floats);
        let (first, len, room) = (floats.as_mut_ptr(), floats.len(), floats.capacity());
        // SAFETY: a cell lies in memory as what it holds does, and nobody else has this vector.
        Memory::Floats(unsafe { Vec::from_raw_parts(first.cast(), len, room) })
    }

    fn first(&self) -> *mut u32 {
        match self {
            Memory::Mapped(map) => map.as_mut_ptr().cast(),
            Memory::Floats(floats) => floats.as_ptr().cast_mut().cast(),
        }
    }
}

/// Memory that the system finds in large pages, if it has any: they are found and looked up faster.
fn mapped(bytes: usize) -> std::io::Result<MmapRaw> {
    let memory = MmapRaw::from(MmapOptions::new().len(bytes).map_anon()?);
    #[cfg(target_os = "linux")]
    let _ = memory.advise(memmap2::Advice::HugePage);
    Ok(memory)
}

impl Part {
    /// All of these floats: many are brought to where pages are large.
    fn of(floats: Vec<f32>) -> Part {
        let len = floats.len();
        let large = (len >= LONG).then(|| mapped(size_of_val(&*floats)).ok()).flatten();
        let memory = match large {
            Some(map) => {
                // SAFETY: the memory is as long, begins a page, is zero, and nobody else has it.
                let to = unsafe { std::slice::from_raw_parts_mut(map.as_mut_ptr().cast::<f32>(), len) };
                let copied = to.par_chunks_mut(NEAR).zip(floats.par_chunks(NEAR));
                copied.for_each(|(to, from)| to.copy_from_slice(from));
                Memory::Mapped(map)
            }
            None => Memory::of(floats),
        };
        Part { memory: Arc::new(memory), start: 0, len, float: true }
    }

    /// The first element. It is that of a whole allocation, so that all of them may be reached from it.
    fn first(&self) -> *mut u32 {
        self.memory.first().wrapping_add(self.start)
    }

    /// Whether both have an element.
    fn meets(&self, other: &Part) -> bool {
        let end = |part: &Part| part.start + part.len;
        Arc::ptr_eq(&self.memory, &other.memory) && self.start.max(other.start) < end(self).min(end(other))
    }
}

/// A buffer's elements.
#[derive(Clone, Copy)]
pub(crate) enum View<'a> {
    F(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
    /// Floats in several pieces.
    Stack(&'a dyn SharedFloats),
    I(&'a [i32]),
}

impl<'a> View<'a> {
    fn len(self) -> usize {
        match self {
            View::F(x) => x.len(),
            View::Bf16(x) => x.len(),
            View::F16(x) => x.len(),
            View::Stack(s) => s.pieces() * s.piece(0).len(),
            View::I(x) => x.len(),
        }
    }

    fn is_float(self) -> bool {
        !matches!(self, View::I(_))
    }

    /// `None` for integers, and for what lies in pieces.
    fn floats(self) -> Option<Floats<'a>> {
        match self {
            View::F(x) => Some(Floats::F32(x)),
            View::Bf16(x) => Some(Floats::Bf16(x)),
            View::F16(x) => Some(Floats::F16(x)),
            View::Stack(_) | View::I(_) => None,
        }
    }

    /// Puts floats somewhere in f32 and in one piece, as all loops can read them.
    fn widen(self, to: &mut [f32]) {
        match self {
            View::Stack(s) => {
                let each = s.piece(0).len().max(1);
                to.chunks_mut(each).enumerate().for_each(|(n, to)| multiply::widen(s.piece(n), to));
            }
            view => {
                if let Some(floats) = view.floats() {
                    multiply::widen(floats, to);
                }
            }
        }
    }

    /// The same in memory of their own; `None` if they are integers.
    fn widened(self) -> Option<Vec<f32>> {
        self.is_float().then(|| {
            let mut wide = vec![0.0; self.len()];
            self.widen(&mut wide);
            wide
        })
    }
}

impl<'a> From<Floats<'a>> for View<'a> {
    fn from(floats: Floats<'a>) -> View<'a> {
        match floats {
            Floats::F32(x) => View::F(x),
            Floats::Bf16(x) => View::Bf16(x),
            Floats::F16(x) => View::F16(x),
        }
    }
}

/// A buffer's elements, to be written.
pub(crate) enum ViewMut<'a> {
    F(&'a mut [f32]),
    I(&'a mut [i32]),
}

impl ViewMut<'_> {
    /// Some of them.
    fn part(&mut self, range: Range<usize>) -> ViewMut<'_> {
        match self {
            ViewMut::F(x) => ViewMut::F(&mut x[range]),
            ViewMut::I(x) => ViewMut::I(&mut x[range]),
        }
    }

    /// The same, for a while.
    fn again(&mut self) -> ViewMut<'_> {
        match self {
            ViewMut::F(x) => ViewMut::F(x),
            ViewMut::I(x) => ViewMut::I(x),
        }
    }
}

impl Buffer {
    /// So many elements, all of them zero.
    fn new(dtype: DType, len: usize) -> Result<Buffer, DeviceError> {
        Ok(match dtype.is_float() {
            true => Buffer::Part(Part::of(zeros(dtype, len)?)),
            false => Buffer::I32(zeros(dtype, len)?),
        })
    }

    pub(crate) fn view(&self) -> View<'_> {
        match self {
            Buffer::F32(v) => View::F(v),
            Buffer::I32(v) => View::I(v),
            Buffer::Shared(s) if s.pieces() == 1 => s.piece(0).into(),
            Buffer::Shared(s) => View::Stack(&**s),
            // SAFETY: `part` and `window` checked that the elements lie there; any four bytes are a number of either kind; and no
            // one writes to them while a launch reads, by the contract of `part` and because `run` refuses it.
            Buffer::Part(p) if p.float => {
                View::F(unsafe { std::slice::from_raw_parts(p.first().cast(), p.len) })
            }
            // SAFETY: as above.
            Buffer::Part(p) => View::I(unsafe { std::slice::from_raw_parts(p.first().cast(), p.len) }),
        }
    }

    /// Whether both begin at the same element.
    fn is_at(&self, other: &Buffer) -> bool {
        matches!((self, other), (Buffer::Part(a), Buffer::Part(b)) if a.start == b.start && a.meets(b))
    }

    /// Whether both have an element.
    fn meets(&self, other: &Buffer) -> bool {
        matches!((self, other), (Buffer::Part(a), Buffer::Part(b)) if a.meets(b))
    }

    /// `None` if the elements belong to someone else.
    pub(crate) fn view_mut(&mut self) -> Option<ViewMut<'_>> {
        Some(match self {
            Buffer::F32(v) => ViewMut::F(v),
            Buffer::I32(v) => ViewMut::I(v),
            Buffer::Shared(_) => return None,
            // SAFETY: as for `view`; by the contract of `part` no one reads them while a launch writes.
            Buffer::Part(p) if p.float => {
                ViewMut::F(unsafe { std::slice::from_raw_parts_mut(p.first().cast(), p.len) })
            }
            // SAFETY: as above.
            Buffer::Part(p) => ViewMut::I(unsafe { std::slice::from_raw_parts_mut(p.first().cast(), p.len) }),
        })
    }
}

/// So many zeros, in memory that may not be there. The dtype is told in that case.
fn zeros<T: Clone + Default>(dtype: DType, len: usize) -> Result<Vec<T>, DeviceError> {
    let mut v = Vec::new();
    v.try_reserve_exact(len).map_err(|e| DeviceError::Memory { len, dtype, why: e.to_string() })?;
    v.resize(len, T::default());
    Ok(v)
}

/// What a plan of this machine's memory must heed.
pub const LAYOUT: Layout = Layout { align: 64, page: 1 << 62, bytes: |_| 4, in_place: true };

impl Device for Host {
    type Buffer = Buffer;
    type Arena = Arena;

    fn name(&self) -> String {
        format!("host, {} threads", rayon::current_num_threads())
    }

    fn alloc(&mut self, dtype: DType, len: usize) -> Result<Buffer, DeviceError> {
        Buffer::new(dtype, len)
    }

    fn upload(&mut self, dtype: DType, data: Data) -> Result<Buffer, DeviceError> {
        match data {
            Data::F32(v) if dtype.is_float() => Ok(Buffer::Part(Part::of(v))),
            Data::I32(v) if !dtype.is_float() => Ok(Buffer::I32(v)),
            data => Err(DeviceError::Memory {
                len: data.len(),
                dtype,
                why: "the elements are of another kind".into(),
            }),
        }
    }

    fn refill(&mut self, old: Option<Buffer>, dtype: DType, data: &Data) -> Result<Buffer, DeviceError> {
        match (old, data) {
            (Some(Buffer::I32(mut held)), Data::I32(data)) if !dtype.is_float() => {
                held.clear();
                held.extend_from_slice(data);
                Ok(Buffer::I32(held))
            }
            (_, data) => self.upload(dtype, data.clone()),
        }
    }

    fn share(&mut self, data: Arc<dyn SharedFloats>) -> Option<Buffer> {
        Some(Buffer::Shared(data))
    }

    fn read(&mut self, buffer: &Buffer, len: usize) -> Result<Data, DeviceError> {
        let view = buffer.view();
        Ok(match map::head(view, len.min(view.len())) {
            View::I(x) => Data::I32(x.to_vec()),
            floats => {
                let mut floats = floats.widened().unwrap_or_default();
                floats.truncate(len);
                Data::F32(floats)
            }
        })
    }

    fn show(&mut self, buffer: &Buffer, len: usize, see: &mut dyn FnMut(&[f32])) -> Result<(), DeviceError> {
        match map::head(buffer.view(), len.min(buffer.view().len())) {
            View::F(floats) => see(floats),
            view => see(&view.widened().ok_or(DeviceError::NoFloats)?),
        }
        Ok(())
    }

    fn layout(&self) -> Layout {
        LAYOUT
    }

    fn reserve(&mut self, bytes: u64) -> Result<Arena, DeviceError> {
        let fail = |e: std::io::Error| DeviceError::Arena { bytes, why: e.to_string() };
        let len = bytes.next_multiple_of(4).max(4) as usize;
        Ok(Arena(Arc::new(Memory::Mapped(mapped(len).map_err(fail)?))))
    }

    unsafe fn part(
        &mut self,
        arena: &Arena,
        offset: u64,
        dtype: DType,
        len: usize,
    ) -> Result<Buffer, DeviceError> {
        let start = offset as usize / 4;
        let room = match &*arena.0 {
            Memory::Mapped(map) => map.len(),
            Memory::Floats(floats) => 4 * floats.len(),
        };
        if !offset.is_multiple_of(4) || start.checked_add(len).is_none_or(|end| end > room / 4) {
            let why = format!("they do not fit at byte {offset} of {room}");
            return Err(DeviceError::Memory { len, dtype, why });
        }
        Ok(Buffer::Part(Part { memory: Arc::clone(&arena.0), start, len, float: dtype.is_float() }))
    }

    fn window(&mut self, buffer: &Buffer, range: Range<usize>) -> Option<Buffer> {
        let Buffer::Part(whole) = buffer else { return None };
        let inside = range.start <= range.end && range.end <= whole.len;
        inside.then(|| {
            let (memory, start) = (Arc::clone(&whole.memory), whole.start + range.start);
            Buffer::Part(Part { memory, start, len: range.len(), float: whole.float })
        })
    }

    fn near(&self) -> Option<usize> {
        Some(NEAR)
    }

    fn launch(
        &mut self,
        kernel: &Kernel,
        inputs: &[Option<&Buffer>],
        output: &mut Buffer,
        sizes: &[usize],
    ) -> Result<(), DeviceError> {
        self.run(kernel, inputs, output, sizes, None)
    }

    fn launch_together(
        &mut self,
        launches: &mut dyn Iterator<Item = Launch<'_, Buffer>>,
    ) -> Result<(), DeviceError> {
        awake::stay();
        for Launch { kernel, inputs, output, sizes, key, still: _ } in launches {
            self.run(kernel, inputs, output, sizes, key)?;
        }
        Ok(())
    }
}

/// How many elements a value of that type has.
fn elements(ty: &Type, extents: &[usize]) -> usize {
    ty.axes.iter().map(|a| extents[a.0 as usize]).product()
}

/// Every buffer must hold what its type says: the loops below rely on it.
fn check(
    kernel: &Kernel,
    inputs: &[Option<View<'_>>],
    output: &Buffer,
    extents: &[usize],
) -> Result<(), DeviceError> {
    let body = &kernel.body;
    let fail = |why: String| DeviceError::Kernel { kernel: kernel.name.clone(), why };
    if inputs.len() != body.params.len() {
        return Err(fail(format!("{} inputs for {} parameters", inputs.len(), body.params.len())));
    }
    let whole = [Some(output.view())];
    let all = body.params.iter().zip(inputs).chain(body.results.iter().zip(&whole));
    for (&value, view) in all {
        let Some(view) = view else { continue };
        let v = body.value(value);
        let want = elements(&v.ty, extents);
        if view.len() < want {
            return Err(fail(format!("`{}` needs {want} elements, its buffer has {}", v.name, view.len())));
        }
        if v.ty.dtype.is_float() != view.is_float() {
            return Err(fail(format!("`{}` is {}, its buffer is of another kind", v.name, v.ty.dtype)));
        }
    }
    Ok(())
}

/// The memory of a result, of which each thread writes a part.
#[derive(Clone, Copy)]
enum Out {
    F(Shared<f32>),
    I(Shared<i32>),
}

impl From<ViewMut<'_>> for Out {
    fn from(output: ViewMut<'_>) -> Out {
        match output {
            ViewMut::F(v) => Out::F(Shared(v.as_mut_ptr())),
            ViewMut::I(v) => Out::I(Shared(v.as_mut_ptr())),
        }
    }
}

/// A pointer that threads may share, because each writes where no other reads or writes.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

// SAFETY: the users below hand disjoint parts to different threads and say why they are disjoint.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}
