//! The host executor: kernels on the threads of this machine, in plain Rust.
//!
//! Floats of any declared width are held and computed in f32, integers and truth values in i32. Map kernels are run by a small
//! vector machine ([`map`]), contractions by the `gemm` crate ([`contract`]), streamed softmaxes by both ([`stream`]).

mod contract;
mod grouped;
mod map;
mod scatter;
mod stream;
mod vector;
mod walk;

use std::sync::Arc;

use latentc_ir::{DType, ValueId};

use crate::device::{Data, Device, DeviceError, SharedF32};
use crate::pieces::pieces;
use crate::program::{Kernel, KernelKind};

/// This machine's CPU.
#[derive(Debug, Default)]
pub struct Host;

/// Elements in this machine's memory.
#[derive(Debug)]
pub enum Buffer {
    /// Floats of its own.
    F32(Vec<f32>),
    /// Integers or truth values.
    I32(Vec<i32>),
    /// Floats that lie elsewhere, such as in a mapped file.
    Shared(Arc<dyn SharedF32>),
}

/// A buffer's elements.
#[derive(Clone, Copy)]
pub(crate) enum View<'a> {
    F(&'a [f32]),
    I(&'a [i32]),
}

impl View<'_> {
    fn len(self) -> usize {
        match self {
            View::F(x) => x.len(),
            View::I(x) => x.len(),
        }
    }
}

impl Buffer {
    pub(crate) fn view(&self) -> View<'_> {
        match self {
            Buffer::F32(v) => View::F(v),
            Buffer::I32(v) => View::I(v),
            Buffer::Shared(s) => View::F(s.as_slice()),
        }
    }
}

impl Device for Host {
    type Buffer = Buffer;

    fn name(&self) -> String {
        format!("host, {} threads", rayon::current_num_threads())
    }

    fn alloc(&mut self, dtype: DType, len: usize) -> Result<Buffer, DeviceError> {
        let memory =
            |e: std::collections::TryReserveError| DeviceError::Memory { len, dtype, why: e.to_string() };
        if dtype.is_float() {
            let mut v = Vec::new();
            v.try_reserve_exact(len).map_err(memory)?;
            v.resize(len, 0.0);
            Ok(Buffer::F32(v))
        } else {
            let mut v = Vec::new();
            v.try_reserve_exact(len).map_err(memory)?;
            v.resize(len, 0);
            Ok(Buffer::I32(v))
        }
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

    fn share(&mut self, data: Arc<dyn SharedF32>) -> Option<Buffer> {
        Some(Buffer::Shared(data))
    }

    fn read(&mut self, buffer: &Buffer, len: usize) -> Result<Data, DeviceError> {
        Ok(match buffer.view() {
            View::F(x) => Data::F32(x[..len.min(x.len())].to_vec()),
            View::I(x) => Data::I32(x[..len.min(x.len())].to_vec()),
        })
    }

    fn launch(
        &mut self,
        kernel: &Kernel,
        inputs: &[Option<&Buffer>],
        output: &mut Buffer,
        sizes: &[usize],
    ) -> Result<(), DeviceError> {
        let extents = kernel.extents(sizes);
        let views: Vec<_> = inputs.iter().map(|b| b.map(Buffer::view)).collect();
        check(kernel, &views, output, &extents)?;
        let mut pieces = match kernel.kind {
            KernelKind::Map | KernelKind::Scatter | KernelKind::Stream => Vec::new(),
            // What stands around a product goes through memory: the cache holds it, and a launch costs nothing here.
            KernelKind::Contract | KernelKind::Grouped => pieces(kernel),
        };
        if pieces.len() < 2 {
            return plain(kernel, &views, output, &extents);
        }
        let last = pieces.pop().expect("there are two or more");
        let params = kernel.body.params.iter().copied().zip(views);
        let mut made: Vec<(ValueId, Buffer)> = Vec::new();
        for piece in &pieces {
            let ty = kernel.body.ty(piece.value);
            let len = ty.axes.iter().map(|a| extents[a.0 as usize]).product();
            let mut buffer = self.alloc(ty.dtype, len)?;
            plain(&piece.kernel, &views_of(&piece.kernel, params.clone(), &made), &mut buffer, &extents)?;
            made.push((piece.value, buffer));
        }
        plain(&last.kernel, &views_of(&last.kernel, params, &made), output, &extents)
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

/// Runs a kernel without prologues and epilogues.
fn plain(
    kernel: &Kernel,
    inputs: &[Option<View<'_>>],
    output: &mut Buffer,
    extents: &[usize],
) -> Result<(), DeviceError> {
    match kernel.kind {
        KernelKind::Map => map::run(kernel, inputs, output, extents),
        KernelKind::Contract => contract::run(kernel, inputs, output, extents),
        KernelKind::Grouped => grouped::run(kernel, inputs, output, extents),
        KernelKind::Scatter => scatter::run(kernel, inputs, output, extents),
        KernelKind::Stream => stream::run(kernel, inputs, output, extents),
    }
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
        if v.ty.dtype.is_float() != matches!(view, View::F(_)) {
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
