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
mod scatter;
mod simd;
mod stream;
mod vector;
mod walk;

use std::sync::Arc;

use half::{bf16, f16};
use latentc_ir::{DType, Op, ValueId};
use memmap2::{MmapOptions, MmapRaw};

use crate::device::{Data, Device, DeviceError, Floats, Launch, Remembered, SharedFloats};
use crate::memory::{Layout, in_place};
use crate::pieces::pieces;
use crate::program::{Kernel, KernelKind};

/// This machine's CPU.
#[derive(Default)]
pub struct Host {
    /// What launches come to, by their [`key`](Launch::key): to find it out takes longer than some kernels run on one row.
    prepared: Remembered<Prepared>,
    spare: Spare,
}

/// Memory that launches need for themselves, kept from one to the next: pages that the system has to find and to clear cost more
/// than most of what is done with them.
#[derive(Debug, Default)]
struct Spare(Vec<Vec<f32>>);

impl Spare {
    /// So many elements or more, with any content: the shortest piece that is long enough, or a longer one in the place of the
    /// longest.
    fn take(&mut self, len: usize) -> Result<Vec<f32>, DeviceError> {
        let enough = (0..self.0.len()).filter(|&i| self.0[i].len() >= len).min_by_key(|&i| self.0[i].len());
        if let Some(i) = enough {
            return Ok(self.0.swap_remove(i));
        }
        if let Some(longest) = (0..self.0.len()).max_by_key(|&i| self.0[i].len()) {
            self.0.swap_remove(longest);
        }
        zeros(DType::F32, len)
    }

    /// Gives a piece back.
    fn give(&mut self, v: Vec<f32>) {
        self.0.push(v);
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
        let made = Arc::new(Prepared::new(kernel, sizes)?);
        if let Some(key) = key {
            self.prepared.keep(key, sizes, &made);
        }
        Ok(made)
    }

    fn run(
        &mut self,
        kernel: &Kernel,
        prepared: &Prepared,
        inputs: &[Option<&Buffer>],
        output: &mut Buffer,
    ) -> Result<(), DeviceError> {
        let Prepared { extents, plans, early } = prepared;
        // What the result takes the place of is read through the output: no reference may be to what is written.
        let replaced = inputs.iter().position(|b| b.is_some_and(|b| b.is_at(output)));
        let apart = inputs.iter().enumerate().map(|(n, b)| b.filter(|_| Some(n) != replaced));
        let views: Vec<_> = apart.map(|b| b.map(Buffer::view)).collect();
        check(kernel, &views, output, extents)?;
        let spare = &mut self.spare;
        let (last, first) = plans.split_last().expect("a kernel is its own last piece");
        let params = kernel.body.params.iter().copied().zip(views);
        let mut made: Vec<(ValueId, Buffer)> = Vec::with_capacity(first.len());
        for (n, plan) in first.iter().enumerate() {
            if early.is_some_and(|(early, _)| early == n) {
                plain(plan, None, &views_of(&plan.kernel, params.clone(), &made), output, extents, spare)?;
                continue;
            }
            let value = plan.kernel.body.results[0];
            let ty = plan.kernel.body.ty(value);
            let len = ty.axes.iter().map(|a| extents[a.0 as usize]).product();
            let mut buffer = match ty.dtype.is_float() {
                true => Buffer::F32(spare.take(len)?),
                false => Buffer::new(ty.dtype, len)?,
            };
            let views = views_of(&plan.kernel, params.clone(), &made);
            plain(plan, None, &views, &mut buffer, extents, spare)?;
            made.push((value, buffer));
        }
        let replaced = early.map(|(_, param)| param).or(replaced);
        plain(last, replaced, &views_of(&last.kernel, params, &made), output, extents, spare)?;
        for (_, buffer) in made {
            if let Buffer::F32(v) = buffer {
                spare.give(v);
            }
        }
        Ok(())
    }
}

/// A kernel at some sizes.
struct Prepared {
    /// Of the body's axes.
    extents: Vec<usize>,
    /// What the kernel falls into, each after those that it reads.
    plans: Vec<Plan>,
    /// What is made where the result goes, if the last piece may work in place of it: its number, and which parameter of the last it is.
    early: Option<(usize, usize)>,
}

/// A kernel without prologues and epilogues.
struct Plan {
    kernel: Kernel,
    /// The instructions of a map; and those for when its result takes the place of a parameter, for each that allows it.
    machines: Vec<(Option<usize>, map::Machine)>,
}

impl Prepared {
    fn new(kernel: &Kernel, sizes: &[usize]) -> Result<Prepared, DeviceError> {
        let extents = kernel.extents(sizes);
        let parts = match kernel.kind {
            KernelKind::Map
            | KernelKind::Scatter
            | KernelKind::ScatterMatrix { .. }
            | KernelKind::Stream
            | KernelKind::StreamMatrix { .. } => vec![kernel.clone()],
            // What stands around a product goes through memory: the cache holds it, and a launch costs nothing here.
            KernelKind::Contract
            | KernelKind::Grouped
            | KernelKind::Tiles
            | KernelKind::Few { .. }
            | KernelKind::Matrix { .. } => pieces(kernel).into_iter().map(|p| p.kernel).collect(),
        };
        let plan = |kernel: Kernel| {
            let machine = |replaced| Ok((replaced, map::Machine::compile(&kernel, &extents, replaced)?));
            let machines = match kernel.kind {
                KernelKind::Map => {
                    let replaced = in_place(&kernel, &LAYOUT).into_iter().map(Some);
                    [None].into_iter().chain(replaced).map(machine).collect::<Result<_, DeviceError>>()?
                }
                KernelKind::Contract
                | KernelKind::Grouped
                | KernelKind::Scatter
                | KernelKind::ScatterMatrix { .. }
                | KernelKind::Stream
                | KernelKind::StreamMatrix { .. }
                | KernelKind::Tiles
                | KernelKind::Few { .. }
                | KernelKind::Matrix { .. } => Vec::new(),
            };
            Ok(Plan { kernel, machines })
        };
        let plans = parts.into_iter().map(plan).collect::<Result<Vec<_>, DeviceError>>()?;
        let early = early(&plans);
        Ok(Prepared { extents, plans, early })
    }
}

/// A value that the last piece alone reads, and may write over.
fn early(plans: &[Plan]) -> Option<(usize, usize)> {
    let (last, first) = plans.split_last()?;
    let places = in_place(&last.kernel, &LAYOUT).into_iter().map(|n| (n, last.kernel.body.params[n]));
    places.rev().find_map(|(param, value)| {
        let maker = first.iter().position(|plan| plan.kernel.body.results[0] == value)?;
        let read = first.iter().any(|plan| plan.kernel.body.params.contains(&value));
        (!read).then_some((maker, param))
    })
}

/// Elements in this machine's memory.
#[derive(Debug)]
pub enum Buffer {
    /// Floats of its own.
    F32(Vec<f32>),
    /// Integers or truth values.
    I32(Vec<i32>),
    /// Floats that lie elsewhere, such as in a mapped file.
    Shared(Arc<dyn SharedFloats>),
    /// A part of an arena.
    Part(Part),
}

/// Memory that buffers are parts of, which the system finds page by page when it is first written. Elements of all dtypes have four bytes
/// here.
#[derive(Debug)]
pub struct Arena(Arc<MmapRaw>);

/// Elements `start..start + len` of an arena.
#[derive(Debug)]
pub struct Part {
    arena: Arc<MmapRaw>,
    start: usize,
    len: usize,
    float: bool,
}

impl Part {
    /// The first element. It is that of a whole allocation, so that all of them may be reached from it.
    fn first(&self) -> *mut u32 {
        self.arena.as_mut_ptr().cast::<u32>().wrapping_add(self.start)
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

    /// Floats in f32 and in one piece, as all loops can read them.
    fn widened(self) -> Option<Vec<f32>> {
        match self {
            View::Stack(s) => Some((0..s.pieces()).flat_map(|n| multiply::wide(s.piece(n))).collect()),
            view => view.floats().map(multiply::wide),
        }
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

impl Buffer {
    /// So many elements, all of them zero.
    fn new(dtype: DType, len: usize) -> Result<Buffer, DeviceError> {
        Ok(match dtype.is_float() {
            true => Buffer::F32(zeros(dtype, len)?),
            false => Buffer::I32(zeros(dtype, len)?),
        })
    }

    pub(crate) fn view(&self) -> View<'_> {
        match self {
            Buffer::F32(v) => View::F(v),
            Buffer::I32(v) => View::I(v),
            Buffer::Shared(s) if s.pieces() == 1 => s.piece(0).into(),
            Buffer::Shared(s) => View::Stack(&**s),
            // SAFETY: `part` checked that the elements lie in the arena; any four bytes are a number of either kind; and by its
            // contract no one writes to them while a launch reads.
            Buffer::Part(p) if p.float => {
                View::F(unsafe { std::slice::from_raw_parts(p.first().cast(), p.len) })
            }
            // SAFETY: as above.
            Buffer::Part(p) => View::I(unsafe { std::slice::from_raw_parts(p.first().cast(), p.len) }),
        }
    }

    /// Whether both are the same part of one arena.
    fn is_at(&self, other: &Buffer) -> bool {
        match (self, other) {
            (Buffer::Part(a), Buffer::Part(b)) => {
                Arc::ptr_eq(&a.arena, &b.arena) && a.start == b.start && a.len.min(b.len) > 0
            }
            _ => false,
        }
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
            Data::F32(v) if dtype.is_float() => Ok(Buffer::F32(v)),
            Data::I32(v) if !dtype.is_float() => Ok(Buffer::I32(v)),
            data => Err(DeviceError::Memory {
                len: data.len(),
                dtype,
                why: "the elements are of another kind".into(),
            }),
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
        let memory = MmapRaw::from(MmapOptions::new().len(len).map_anon().map_err(fail)?);
        // Large pages are found and looked up faster; a system that has none does without.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        Ok(Arena(Arc::new(memory)))
    }

    unsafe fn part(
        &mut self,
        arena: &Arena,
        offset: u64,
        dtype: DType,
        len: usize,
    ) -> Result<Buffer, DeviceError> {
        let start = offset as usize / 4;
        if !offset.is_multiple_of(4) || start.checked_add(len).is_none_or(|end| end > arena.0.len() / 4) {
            let why = format!("they do not fit at byte {offset} of {}", arena.0.len());
            return Err(DeviceError::Memory { len, dtype, why });
        }
        Ok(Buffer::Part(Part { arena: Arc::clone(&arena.0), start, len, float: dtype.is_float() }))
    }

    fn launch(
        &mut self,
        kernel: &Kernel,
        inputs: &[Option<&Buffer>],
        output: &mut Buffer,
        sizes: &[usize],
    ) -> Result<(), DeviceError> {
        let prepared = self.prepared(kernel, sizes, None)?;
        self.run(kernel, &prepared, inputs, output)
    }

    fn launch_together(&mut self, launches: Vec<Launch<'_, Buffer>>) -> Result<(), DeviceError> {
        awake::stay();
        launches.into_iter().try_for_each(|Launch { kernel, inputs, output, sizes, key, still: _ }| {
            let prepared = self.prepared(kernel, sizes, key)?;
            self.run(kernel, &prepared, inputs, output)
        })
    }
}

/// What a piece of a kernel reads.
fn views_of<'a>(
    piece: &Kernel,
    params: impl Iterator<Item = (ValueId, Option<View<'a>>)> + Clone,
    made: &'a [(ValueId, Buffer)],
) -> Vec<Option<View<'a>>> {
    let made = made.iter().map(|(v, buffer)| (*v, Some(buffer.view())));
    let known: Vec<_> = params.chain(made).collect();
    let of = |p: &ValueId| known.iter().find(|(v, _)| v == p).and_then(|(_, view)| *view);
    piece.body.params.iter().map(of).collect()
}

/// Runs a kernel without prologues and epilogues. The input that the output takes the place of, if there is one, is not among the views.
fn plain(
    Plan { kernel, machines }: &Plan,
    replaced: Option<usize>,
    inputs: &[Option<View<'_>>],
    output: &mut Buffer,
    extents: &[usize],
    spare: &mut Spare,
) -> Result<(), DeviceError> {
    let Some(output) = output.view_mut() else {
        let why = "the output is read-only".to_owned();
        return Err(DeviceError::Kernel { kernel: kernel.name.clone(), why });
    };
    let wide = widened(kernel, inputs, extents);
    let views: Vec<_> =
        inputs.iter().zip(&wide).map(|(&view, wide)| wide.as_deref().map(View::F).or(view)).collect();
    match kernel.kind {
        KernelKind::Map => {
            let machine = machines.iter().find(|(of, _)| *of == replaced);
            let (_, machine) = machine
                .ok_or_else(|| map::fail(kernel, "its result may not take the place of what it is given"))?;
            machine.run(kernel, &views, output)
        }
        KernelKind::Contract => contract::run(kernel, &views, output, extents),
        KernelKind::Grouped => grouped::run(kernel, &views, output, extents, spare),
        KernelKind::Scatter | KernelKind::ScatterMatrix { .. } => {
            scatter::run(kernel, &views, output, extents, spare)
        }
        KernelKind::Stream | KernelKind::StreamMatrix { .. } => stream::run(kernel, &views, output, extents),
        // Ways of GPUs to do one of the others.
        KernelKind::Tiles | KernelKind::Few { .. } | KernelKind::Matrix { .. } => {
            match KernelKind::of(&kernel.body) {
                KernelKind::Grouped => grouped::run(kernel, &views, output, extents, spare),
                _ => contract::run(kernel, &views, output, extents),
            }
        }
    }
}

/// Inputs in f32 and in one piece where the kernel's loops do not read them as they are: those of products read 16 bits, and those that
/// look rows up; those of grouped products read experts one by one. What is left is small, the scales of norms.
fn widened(kernel: &Kernel, inputs: &[Option<View<'_>>], extents: &[usize]) -> Vec<Option<Vec<f32>>> {
    let body = &kernel.body;
    let as_stored = |param: ValueId, view: View<'_>| match kernel.kind {
        _ if matches!(view, View::Stack(_)) => grouped::reads_stack(body, param, view, extents),
        KernelKind::Contract
        | KernelKind::Grouped
        | KernelKind::Tiles
        | KernelKind::Few { .. }
        | KernelKind::Matrix { .. } => true,
        KernelKind::Map => body.body.iter().all(|inst| {
            let reads =
                |(n, &a): (usize, &ValueId)| a != param || n == 0 && matches!(inst.op, Op::Gather { .. });
            inst.args.iter().enumerate().all(reads)
        }),
        KernelKind::Scatter
        | KernelKind::ScatterMatrix { .. }
        | KernelKind::Stream
        | KernelKind::StreamMatrix { .. } => false,
    };
    let widen = |(&param, view): (&ValueId, &Option<View<'_>>)| {
        let view = view.filter(|v| v.is_float() && !matches!(v, View::F(_)))?;
        if as_stored(param, view) { None } else { view.widened() }
    };
    body.params.iter().zip(inputs).map(widen).collect()
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
        let want: usize = v.ty.axes.iter().map(|a| extents[a.0 as usize]).product();
        if view.len() < want {
            return Err(fail(format!("`{}` needs {want} elements, its buffer has {}", v.name, view.len())));
        }
        if v.ty.dtype.is_float() != view.is_float() {
            return Err(fail(format!("`{}` is {}, its buffer is of another kind", v.name, v.ty.dtype)));
        }
    }
    Ok(())
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
