//! The host executor: kernels on the threads of this machine, in plain Rust.
//!
//! Floats are computed in f32, integers and truth values in i32. Weights stay in the 16 bits that they are stored in, and those of experts in
//! the tensors that each has; caches are written in as many bits as their type has; both are widened in registers. All else is held in four
//! bytes ([`buffer`]). Map kernels are run by a small vector machine ([`map`]), contractions of many rows by the `gemm` crate, or by the CPU's
//! own products of bf16 where it has them, and of few rows by loops that read each weight once ([`multiply`]), streamed softmaxes by all
//! of them ([`stream`]).

mod awake;
mod buffer;
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

use std::ops::Range;
use std::sync::Arc;

use latentc_ir::{DType, Type, ValueId};
use smallvec::SmallVec;

pub use self::buffer::{Arena, Buffer};
use self::buffer::{Out, Shared, View, ViewMut};
use self::prepared::Prepared;
use self::spare::{Spare, Takes};
use crate::device::{Data, Device, DeviceError, Launch, Remembered, SharedFloats};
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
        let mut views: SmallVec<[_; 10]> = apart.map(|b| b.map(Buffer::view)).collect();
        fit(kernel, &mut views, output, &self.extents)?;
        let Some(output) = output.view_mut() else { return fail("the output is read-only") };
        prepared.run(kernel, &views, output, replaced, &mut self.extents, &mut self.spare)
    }
}

/// What a plan of this machine's memory must heed.
pub const LAYOUT: Layout =
    Layout { align: 64, page: 1 << 62, bytes: |_| 4, kept: buffer::kept_bytes, in_place: true };

impl Device for Host {
    type Buffer = Buffer;
    type Arena = Arena;

    fn name(&self) -> String {
        format!("host, {} threads", rayon::current_num_threads())
    }

    fn alloc(&mut self, dtype: DType, len: usize) -> Result<Buffer, DeviceError> {
        Buffer::new(dtype, len)
    }

    fn keep(&mut self, dtype: DType, len: usize) -> Result<Buffer, DeviceError> {
        Buffer::kept(dtype, len)
    }

    fn upload(&mut self, dtype: DType, data: Data) -> Result<Buffer, DeviceError> {
        match data {
            Data::F32(v) if dtype.is_float() => Ok(Buffer::of(v)),
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
        Ok(match view.head(len.min(view.len())) {
            View::I(x) => Data::I32(x.to_vec()),
            floats => {
                let mut floats = floats.widened().unwrap_or_default();
                floats.truncate(len);
                Data::F32(floats)
            }
        })
    }

    fn show(&mut self, buffer: &Buffer, len: usize, see: &mut dyn FnMut(&[f32])) -> Result<(), DeviceError> {
        let view = buffer.view();
        match view.head(len.min(view.len())) {
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
        Arena::new(bytes).map_err(fail)
    }

    unsafe fn part(
        &mut self,
        arena: &Arena,
        offset: u64,
        dtype: DType,
        len: usize,
    ) -> Result<Buffer, DeviceError> {
        arena.part(offset, dtype, len)
    }

    fn window(&mut self, buffer: &Buffer, range: Range<usize>) -> Option<Buffer> {
        buffer.window(range)
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

/// Every buffer must hold what its type says: the loops below rely on it. Inputs have no more, then, whatever room there is behind it.
fn fit(
    kernel: &Kernel,
    inputs: &mut [Option<View<'_>>],
    output: &Buffer,
    extents: &[usize],
) -> Result<(), DeviceError> {
    let body = &kernel.body;
    let fail = |why: String| DeviceError::Kernel { kernel: kernel.name.clone(), why };
    if inputs.len() != body.params.len() {
        return Err(fail(format!("{} inputs for {} parameters", inputs.len(), body.params.len())));
    }
    let held = |value: ValueId, view: View<'_>| {
        let v = body.value(value);
        let want = elements(&v.ty, extents);
        if view.len() < want {
            return Err(fail(format!("`{}` needs {want} elements, its buffer has {}", v.name, view.len())));
        }
        if v.ty.dtype.is_float() != view.is_float() {
            return Err(fail(format!("`{}` is {}, its buffer is of another kind", v.name, v.ty.dtype)));
        }
        Ok(want)
    };
    for (&value, view) in body.params.iter().zip(inputs) {
        if let Some(view) = view {
            *view = view.head(held(value, *view)?);
        }
    }
    body.results.iter().try_for_each(|&value| held(value, output.view()).map(|_| ()))
}
