//! Memory of this machine: what elements lie in, and how they are seen and written.
//!
//! Floats that were computed a moment ago have 32 bits. What is read again and again has as many as its type: weights, which lie where they
//! are stored, and [what is kept](Buffer::kept) from run to run.

use std::cell::UnsafeCell;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use latentc_ir::DType;
use memmap2::{MmapOptions, MmapRaw};
use rayon::prelude::*;

use super::{NEAR, multiply};
use crate::device::{DeviceError, Floats, SharedFloats};

/// As many bytes as several large pages have.
const LONG: usize = 1 << 24;
/// As many as one has.
const PAGE: usize = 1 << 21;

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

/// Memory that buffers are parts of, which the system finds page by page when it is first written.
#[derive(Debug)]
pub struct Arena(Arc<Memory>);

/// Some elements of what several buffers lie in.
#[derive(Debug)]
pub struct Part {
    memory: Arc<Memory>,
    /// The byte that they begin at.
    start: usize,
    len: usize,
    form: Form,
}

/// How elements of a part are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    F32,
    Bf16,
    F16,
    /// Integers or truth values.
    I32,
}

impl Form {
    /// Of elements that are computed with.
    fn wide(dtype: DType) -> Form {
        if dtype.is_float() { Form::F32 } else { Form::I32 }
    }

    /// Of elements that are kept.
    fn kept(dtype: DType) -> Form {
        match dtype {
            DType::Bf16 => Form::Bf16,
            DType::F16 => Form::F16,
            DType::F64 | DType::F32 | DType::I32 | DType::Bool => Form::wide(dtype),
        }
    }

    fn bytes(self) -> usize {
        match self {
            Form::F32 | Form::I32 => 4,
            Form::Bf16 | Form::F16 => 2,
        }
    }
}

/// Bytes of an element that is kept.
pub(super) fn kept_bytes(dtype: DType) -> u64 {
    Form::kept(dtype).bytes() as u64
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

    fn first(&self) -> *mut u8 {
        match self {
            Memory::Mapped(map) => map.as_mut_ptr(),
            Memory::Floats(floats) => floats.as_ptr().cast_mut().cast(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Memory::Mapped(map) => map.len(),
            Memory::Floats(floats) => size_of_val(&**floats),
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

impl Arena {
    /// So many bytes.
    pub(super) fn new(bytes: u64) -> std::io::Result<Arena> {
        Ok(Arena(Arc::new(Memory::Mapped(mapped(bytes.next_multiple_of(4).max(4) as usize)?))))
    }

    /// The part that begins at a byte, of elements as they are computed with.
    pub(super) fn part(&self, offset: u64, dtype: DType, len: usize) -> Result<Buffer, DeviceError> {
        let (start, form, room) = (offset as usize, Form::wide(dtype), self.0.bytes());
        let end = len.checked_mul(form.bytes()).and_then(|bytes| start.checked_add(bytes));
        if !start.is_multiple_of(4) || end.is_none_or(|end| end > room) {
            let why = format!("they do not fit at byte {offset} of {room}");
            return Err(DeviceError::Memory { len, dtype, why });
        }
        Ok(Buffer::Part(Part { memory: Arc::clone(&self.0), start, len, form }))
    }
}

impl Part {
    /// All of these floats: many are brought to where pages are large.
    fn of(floats: Vec<f32>) -> Part {
        let (len, bytes) = (floats.len(), size_of_val(&*floats));
        let large = (bytes >= LONG).then(|| mapped(bytes).ok()).flatten();
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
        Part { memory: Arc::new(memory), start: 0, len, form: Form::F32 }
    }

    /// The first element. It is that of a whole allocation, so that all of them may be reached from it.
    fn first(&self) -> *mut u8 {
        self.memory.first().wrapping_add(self.start)
    }

    /// Whether both have an element.
    fn meets(&self, other: &Part) -> bool {
        let end = |part: &Part| part.start + part.len * part.form.bytes();
        Arc::ptr_eq(&self.memory, &other.memory) && self.start.max(other.start) < end(self).min(end(other))
    }

    /// Some of its elements.
    fn window(&self, range: Range<usize>) -> Option<Part> {
        let inside = range.start <= range.end && range.end <= self.len;
        inside.then(|| {
            let (memory, start) = (Arc::clone(&self.memory), self.start + range.start * self.form.bytes());
            Part { memory, start, len: range.len(), form: self.form }
        })
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
    pub(super) fn len(self) -> usize {
        match self {
            View::F(x) => x.len(),
            View::Bf16(x) => x.len(),
            View::F16(x) => x.len(),
            View::Stack(s) => s.pieces() * s.piece(0).len(),
            View::I(x) => x.len(),
        }
    }

    pub(super) fn is_float(self) -> bool {
        !matches!(self, View::I(_))
    }

    /// `None` for integers, and for what lies in pieces.
    pub(super) fn floats(self) -> Option<Floats<'a>> {
        match self {
            View::F(x) => Some(Floats::F32(x)),
            View::Bf16(x) => Some(Floats::Bf16(x)),
            View::F16(x) => Some(Floats::F16(x)),
            View::Stack(_) | View::I(_) => None,
        }
    }

    /// From an element on.
    pub(super) fn tail(self, start: usize) -> View<'a> {
        let from = |len: usize| start.min(len)..;
        match self {
            View::F(x) => View::F(&x[from(x.len())]),
            View::Bf16(x) => View::Bf16(&x[from(x.len())]),
            View::F16(x) => View::F16(&x[from(x.len())]),
            View::I(x) => View::I(&x[from(x.len())]),
            // No loop reads pieces but that of grouped products.
            View::Stack(_) => View::F(&[]),
        }
    }

    /// The first elements, as many as there must be. What lies in pieces stays whole.
    pub(super) fn head(self, len: usize) -> View<'a> {
        match self {
            View::F(x) => View::F(&x[..len]),
            View::Bf16(x) => View::Bf16(&x[..len]),
            View::F16(x) => View::F16(&x[..len]),
            View::I(x) => View::I(&x[..len]),
            View::Stack(_) => self,
        }
    }

    /// Puts floats somewhere in f32 and in one piece, as all loops can read them.
    pub(super) fn widen(self, to: &mut [f32]) {
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
    pub(super) fn widened(self) -> Option<Vec<f32>> {
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
    Bf16(&'a mut [bf16]),
    F16(&'a mut [f16]),
    I(&'a mut [i32]),
}

impl ViewMut<'_> {
    /// Some of them.
    pub(super) fn part(&mut self, range: Range<usize>) -> ViewMut<'_> {
        match self {
            ViewMut::F(x) => ViewMut::F(&mut x[range]),
            ViewMut::Bf16(x) => ViewMut::Bf16(&mut x[range]),
            ViewMut::F16(x) => ViewMut::F16(&mut x[range]),
            ViewMut::I(x) => ViewMut::I(&mut x[range]),
        }
    }

    /// The same, for a while.
    pub(super) fn again(&mut self) -> ViewMut<'_> {
        match self {
            ViewMut::F(x) => ViewMut::F(x),
            ViewMut::Bf16(x) => ViewMut::Bf16(x),
            ViewMut::F16(x) => ViewMut::F16(x),
            ViewMut::I(x) => ViewMut::I(x),
        }
    }
}

impl Buffer {
    /// So many elements to compute with, all of them zero.
    pub(super) fn new(dtype: DType, len: usize) -> Result<Buffer, DeviceError> {
        Ok(match dtype.is_float() {
            true => Buffer::of(zeros(dtype, len)?),
            false => Buffer::I32(zeros(dtype, len)?),
        })
    }

    /// So many elements that are kept from run to run, all of them zero: as wide as their type.
    pub(super) fn kept(dtype: DType, len: usize) -> Result<Buffer, DeviceError> {
        let form = Form::kept(dtype);
        if form == Form::wide(dtype) {
            return Buffer::new(dtype, len);
        }
        let memory = match len * form.bytes() {
            long @ PAGE.. => {
                let fail = |e: std::io::Error| DeviceError::Memory { len, dtype, why: e.to_string() };
                Memory::Mapped(mapped(long).map_err(fail)?)
            }
            bytes => Memory::of(zeros(dtype, bytes.div_ceil(4))?),
        };
        Ok(Buffer::Part(Part { memory: Arc::new(memory), start: 0, len, form }))
    }

    /// These floats.
    pub(super) fn of(floats: Vec<f32>) -> Buffer {
        Buffer::Part(Part::of(floats))
    }

    pub(crate) fn view(&self) -> View<'_> {
        match self {
            Buffer::F32(v) => View::F(v),
            Buffer::I32(v) => View::I(v),
            Buffer::Shared(s) if s.pieces() == 1 => s.piece(0).into(),
            Buffer::Shared(s) => View::Stack(&**s),
            // SAFETY: the elements lie there, as whoever made the part has seen to; any bytes are a number of each kind; and no one
            // writes to them while a launch reads, by the contract of `part` and because `run` refuses it.
            Buffer::Part(p) => unsafe {
                match p.form {
                    Form::F32 => View::F(std::slice::from_raw_parts(p.first().cast(), p.len)),
                    Form::Bf16 => View::Bf16(std::slice::from_raw_parts(p.first().cast(), p.len)),
                    Form::F16 => View::F16(std::slice::from_raw_parts(p.first().cast(), p.len)),
                    Form::I32 => View::I(std::slice::from_raw_parts(p.first().cast(), p.len)),
                }
            },
        }
    }

    /// Whether both begin at the same element.
    pub(super) fn is_at(&self, other: &Buffer) -> bool {
        matches!((self, other), (Buffer::Part(a), Buffer::Part(b)) if a.start == b.start && a.meets(b))
    }

    /// Whether both have an element.
    pub(super) fn meets(&self, other: &Buffer) -> bool {
        matches!((self, other), (Buffer::Part(a), Buffer::Part(b)) if a.meets(b))
    }

    /// Some of its elements, in the same memory; `None` if that is nobody else's, or they are not there.
    pub(super) fn window(&self, range: Range<usize>) -> Option<Buffer> {
        let Buffer::Part(whole) = self else { return None };
        whole.window(range).map(Buffer::Part)
    }

    /// `None` if the elements belong to someone else.
    pub(crate) fn view_mut(&mut self) -> Option<ViewMut<'_>> {
        Some(match self {
            Buffer::F32(v) => ViewMut::F(v),
            Buffer::I32(v) => ViewMut::I(v),
            Buffer::Shared(_) => return None,
            // SAFETY: as for `view`; by the contract of `part` no one reads them while a launch writes.
            Buffer::Part(p) => unsafe {
                match p.form {
                    Form::F32 => ViewMut::F(std::slice::from_raw_parts_mut(p.first().cast(), p.len)),
                    Form::Bf16 => ViewMut::Bf16(std::slice::from_raw_parts_mut(p.first().cast(), p.len)),
                    Form::F16 => ViewMut::F16(std::slice::from_raw_parts_mut(p.first().cast(), p.len)),
                    Form::I32 => ViewMut::I(std::slice::from_raw_parts_mut(p.first().cast(), p.len)),
                }
            },
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

/// The memory of a result, of which each thread writes a part.
#[derive(Clone, Copy)]
pub(super) enum Out {
    F(Shared<f32>),
    Bf16(Shared<bf16>),
    F16(Shared<f16>),
    I(Shared<i32>),
}

impl Out {
    /// Whether elements are held as they are computed, so that they can be made there.
    pub(super) fn is_wide(self) -> bool {
        matches!(self, Out::F(_) | Out::I(_))
    }

    /// Writes `n` elements of a row from its element `from` on to its own from `to` on, both at some steps, in the form in which they are
    /// held here. The row is of the same kind, integers or floats in f32.
    ///
    /// # Safety
    /// All that is written must be there, and no one else may touch it.
    pub(super) unsafe fn put(self, to: usize, row: View<'_>, from: usize, n: usize, steps: [usize; 2]) {
        // SAFETY: by the caller.
        unsafe {
            match (self, row) {
                (Out::F(y), View::F(x)) => scatter(y, to, x, from, n, steps, |x| x),
                (Out::Bf16(y), View::F(x)) => scatter(y, to, x, from, n, steps, bf16::from_f32),
                (Out::F16(y), View::F(x)) => scatter(y, to, x, from, n, steps, f16::from_f32),
                (Out::I(y), View::I(x)) => scatter(y, to, x, from, n, steps, |x| x),
                (
                    Out::F(_) | Out::Bf16(_) | Out::F16(_) | Out::I(_),
                    View::F(_) | View::Bf16(_) | View::F16(_) | View::Stack(_) | View::I(_),
                ) => {}
            }
        }
    }
}

impl From<ViewMut<'_>> for Out {
    fn from(output: ViewMut<'_>) -> Out {
        match output {
            ViewMut::F(v) => Out::F(Shared(v.as_mut_ptr())),
            ViewMut::Bf16(v) => Out::Bf16(Shared(v.as_mut_ptr())),
            ViewMut::F16(v) => Out::F16(Shared(v.as_mut_ptr())),
            ViewMut::I(v) => Out::I(Shared(v.as_mut_ptr())),
        }
    }
}

/// Writes `n` elements that are made of those of `x`, both at some steps.
///
/// # Safety
/// `y` must hold every index that is written, and no one else may touch them.
#[inline(always)]
unsafe fn scatter<T: Copy, Y>(
    y: Shared<Y>,
    to: usize,
    x: &[T],
    from: usize,
    n: usize,
    steps: [usize; 2],
    of: impl Fn(T) -> Y,
) {
    for i in 0..n {
        // SAFETY: by the caller.
        unsafe { y.get().add(to + i * steps[0]).write(of(x[from + i * steps[1]])) };
    }
}

/// A pointer that threads may share, because each writes where no other reads or writes.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub(super) *mut T);

// SAFETY: the users hand disjoint parts to different threads and say why they are disjoint.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(super) fn get(&self) -> *mut T {
        self.0
    }
}
