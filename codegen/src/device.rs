//! What a program runs on.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};
use latentc_ir::DType;

use crate::cube::{Chosen, Machine, Target, Tuning, Way};
use crate::memory::Layout;
use crate::program::Kernel;

/// Elements on their way to or from a device. Floats of any width travel as f32, truth values as 0 and 1.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// Floats.
    F32(Vec<f32>),
    /// Integers and truth values.
    I32(Vec<i32>),
}

impl Data {
    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            Data::F32(v) => v.len(),
            Data::I32(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Floats in the host's memory, as they are stored.
#[derive(Clone, Copy, Debug)]
pub enum Floats<'a> {
    /// Of 32 bits.
    F32(&'a [f32]),
    /// The upper half of those.
    Bf16(&'a [bf16]),
    /// Of 16 bits, five of them exponent.
    F16(&'a [f16]),
}

impl<'a> Floats<'a> {
    /// Those at these places.
    pub fn part(self, range: Range<usize>) -> Floats<'a> {
        match self {
            Floats::F32(x) => Floats::F32(&x[range]),
            Floats::Bf16(x) => Floats::Bf16(&x[range]),
            Floats::F16(x) => Floats::F16(&x[range]),
        }
    }

    /// The number of elements.
    pub fn len(self) -> usize {
        match self {
            Floats::F32(x) => x.len(),
            Floats::Bf16(x) => x.len(),
            Floats::F16(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// Floats that someone else keeps in the host's memory, such as a mapped file: in one piece, or one after another in several that
/// are equally long and of one type.
pub trait SharedFloats: fmt::Debug + Send + Sync {
    /// How many pieces, at least one.
    fn pieces(&self) -> usize {
        1
    }

    /// The elements of a piece.
    fn piece(&self, n: usize) -> Floats<'_>;
}

impl SharedFloats for Vec<f32> {
    fn piece(&self, _: usize) -> Floats<'_> {
        Floats::F32(self)
    }
}

impl SharedFloats for Vec<bf16> {
    fn piece(&self, _: usize) -> Floats<'_> {
        Floats::Bf16(self)
    }
}

impl SharedFloats for Vec<f16> {
    fn piece(&self, _: usize) -> Floats<'_> {
        Floats::F16(self)
    }
}

/// A kernel on buffers: what [`Device::launch`] takes.
#[derive(Debug)]
pub struct Launch<'a, B> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// Its parameters in order.
    pub inputs: &'a [Option<&'a B>],
    /// Where the result goes.
    pub output: &'a mut B,
    /// The run-time sizes.
    pub sizes: &'a [usize],
    /// A number that no other kernel of the process ever has, if it has one: what a device has found out about a kernel, it may find again
    /// by it. See [`keys`].
    pub key: Option<u64>,
    /// Of a launch of a program's run: the inputs that no launch of the run writes, as bits from the first input on. A device may read
    /// them while launches of the run before this one are not done. The first launch of a run says nothing.
    pub still: Option<u64>,
}

/// As many numbers behind one another as are asked for, of which this is the first. None was given before.
pub fn keys(count: usize) -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(count as u64, Ordering::Relaxed)
}

/// Sizes of one kernel that are remembered: layers of a run have the same ones.
const SIZES: usize = 4;

/// Stands for whatever a run-time size is, where nothing of what was found out hangs on it.
pub(crate) const ANY: usize = usize::MAX;

/// What was found out about kernels at some run-time sizes, by the [`key`](Launch::key) of their launches.
#[derive(Debug)]
pub(crate) struct Remembered<T>(HashMap<u64, AtSizes<T>>);

/// What was found out about one kernel, the latest first.
type AtSizes<T> = Vec<(Vec<usize>, Arc<T>)>;

impl<T> Default for Remembered<T> {
    fn default() -> Remembered<T> {
        Remembered(HashMap::new())
    }
}

impl<T> Remembered<T> {
    /// That of the kernel of that key at these sizes.
    pub(crate) fn find(&self, key: u64, sizes: &[usize]) -> Option<Arc<T>> {
        let fits =
            |known: &[usize]| known.iter().zip(sizes).all(|(known, size)| known == size || *known == ANY);
        let (_, found) = self.0.get(&key)?.iter().find(|(known, _)| fits(known))?;
        Some(Arc::clone(found))
    }

    /// Remembers it for these sizes, some of which may be [`ANY`], and forgets what was found out long before.
    pub(crate) fn keep(&mut self, key: u64, sizes: &[usize], found: &Arc<T>) {
        let known = self.0.entry(key).or_default();
        known.truncate(SIZES - 1);
        known.insert(0, (sizes.to_vec(), Arc::clone(found)));
    }
}

/// A machine that holds buffers and runs kernels.
pub trait Device {
    /// A piece of its memory.
    type Buffer;

    /// A piece that several buffers are parts of, wherever each begins.
    type Arena;

    /// What it is, for people.
    fn name(&self) -> String;

    /// Memory for so many elements, with any content.
    ///
    /// # Errors
    /// If there is none left, or the device cannot hold the dtype.
    fn alloc(&mut self, dtype: DType, len: usize) -> Result<Self::Buffer, DeviceError>;

    /// The same for what launches append to and others read, from run to run: held in as few bits as its dtype has, if the device can, though
    /// it may compute with more. Its [layout](Device::layout) says in how many bytes.
    ///
    /// # Errors
    /// As for [`alloc`](Device::alloc).
    fn keep(&mut self, dtype: DType, len: usize) -> Result<Self::Buffer, DeviceError> {
        self.alloc(dtype, len)
    }

    /// Memory with these elements.
    ///
    /// # Errors
    /// As for [`alloc`](Device::alloc).
    fn upload(&mut self, dtype: DType, data: Data) -> Result<Self::Buffer, DeviceError>;

    /// Memory with these elements: that of `old`, of the same dtype, where the device can put them there.
    ///
    /// # Errors
    /// As for [`alloc`](Device::alloc).
    fn refill(
        &mut self,
        old: Option<Self::Buffer>,
        dtype: DType,
        data: &Data,
    ) -> Result<Self::Buffer, DeviceError> {
        drop(old);
        self.upload(dtype, data.clone())
    }

    /// Memory that holds these floats where they are, for a device that can use memory of the host. `None` if it cannot:
    /// the caller uploads them.
    fn share(&mut self, data: Arc<dyn SharedFloats>) -> Option<Self::Buffer> {
        drop(data);
        None
    }

    /// The first `len` elements of a buffer.
    ///
    /// # Errors
    /// If the device failed in an earlier launch.
    fn read(&mut self, buffer: &Self::Buffer, len: usize) -> Result<Data, DeviceError>;

    /// Shows the first `len` elements of a buffer of floats: where they lie, if that is in the host's memory.
    ///
    /// # Errors
    /// If they are no floats, or the device failed in an earlier launch.
    fn show(
        &mut self,
        buffer: &Self::Buffer,
        len: usize,
        see: &mut dyn FnMut(&[f32]),
    ) -> Result<(), DeviceError> {
        match self.read(buffer, len)? {
            Data::F32(floats) => see(&floats),
            Data::I32(_) => return Err(DeviceError::NoFloats),
        }
        Ok(())
    }

    /// Waits until all launches so far are done. A device that runs each at once has nothing to wait for.
    ///
    /// # Errors
    /// If the device failed in one of them.
    fn wait(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// How a kernel is computed for these run-time sizes, where the device has several ways.
    fn way(&self, kernel: &Kernel, sizes: &[usize]) -> Chosen {
        let _ = sizes;
        Chosen::by_rule(kernel.kind)
    }

    /// The ways that are worth trying for these run-time sizes, that of the device's rules first. None where it has no choice.
    fn ways(&self, kernel: &Kernel, sizes: &[usize]) -> Vec<Way> {
        let _ = (kernel, sizes);
        Vec::new()
    }

    /// Whether a kernel can be computed in all ways that the device was told to take of it.
    ///
    /// # Errors
    /// If it has no such way, or other run-time sizes.
    fn admits(&self, kernel: &Kernel) -> Result<(), DeviceError> {
        let _ = kernel;
        Ok(())
    }

    /// Takes these ways in place of what the device's rules say.
    fn take_ways(&mut self, tuning: Arc<Tuning>) {
        drop(tuning);
    }

    /// The language of its kernels, and what its rules ask of it, if it has ways to choose among.
    fn machine(&self) -> Option<(Target, Machine)> {
        None
    }

    /// What a plan of its memory must heed.
    fn layout(&self) -> Layout;

    /// Memory for temporaries that a plan has given places, with any content.
    ///
    /// # Errors
    /// If there is none left.
    fn reserve(&mut self, bytes: u64) -> Result<Self::Arena, DeviceError>;

    /// The part of an arena that begins at that byte, as a buffer of so many elements.
    ///
    /// # Errors
    /// If it does not lie in the arena, or the device cannot hold the dtype.
    ///
    /// # Safety
    /// A launch must not write to a part that shares bytes with one that it reads, unless that is the very same part and the kernel may work
    /// [in place](crate::memory::in_place) of it with the device's [layout](Device::layout).
    unsafe fn part(
        &mut self,
        arena: &Self::Arena,
        offset: u64,
        dtype: DType,
        len: usize,
    ) -> Result<Self::Buffer, DeviceError>;

    /// Some elements of a buffer as a buffer of their own in the same memory: what is written to one is read from the other. `None` if
    /// buffers of this device share no memory, or not from there on: windows begin at multiples of the [layout](Device::layout)'s
    /// alignment.
    fn window(&mut self, buffer: &Self::Buffer, range: Range<usize>) -> Option<Self::Buffer> {
        let _ = (buffer, range);
        None
    }

    /// So many elements of long arrays are best worked on by one launch after the other before the next ones are, since what a launch
    /// makes is near to the next. `None` if all at once is best.
    fn near(&self) -> Option<usize> {
        None
    }

    /// Runs a kernel. `inputs` are its parameters in order, `sizes` its run-time sizes in the order of
    /// [`Kernel::size_symbols`]. A kernel that appends writes into `output` and is given `None` as its first input.
    ///
    /// # Errors
    /// If the kernel does not compile for the device, an index lies outside of its axis, or the device fails.
    fn launch(
        &mut self,
        kernel: &Kernel,
        inputs: &[Option<&Self::Buffer>],
        output: &mut Self::Buffer,
        sizes: &[usize],
    ) -> Result<(), DeviceError>;

    /// Runs kernels of which none reads what another writes: at the same time, where the device can.
    ///
    /// # Errors
    /// As for [`launch`](Device::launch).
    fn launch_together(
        &mut self,
        launches: &mut dyn Iterator<Item = Launch<'_, Self::Buffer>>,
    ) -> Result<(), DeviceError> {
        for launch in launches {
            self.launch(launch.kernel, launch.inputs, launch.output, launch.sizes)?;
        }
        Ok(())
    }
}

/// Why a device could not do as told.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// There is no such device here.
    #[error("no {0} device: {1}")]
    Absent(&'static str, String),
    /// Not enough memory.
    #[error("no memory for {len} elements of {dtype}: {why}")]
    Memory {
        /// How many.
        len: usize,
        /// Of what.
        dtype: DType,
        /// What the device said.
        why: String,
    },
    /// Not enough memory for all temporaries of a run.
    #[error("no memory for {bytes} bytes of temporaries: {why}")]
    Arena {
        /// How many.
        bytes: u64,
        /// What the device said.
        why: String,
    },
    /// Integers where floats were asked for.
    #[error("a buffer of integers was to be read as floats")]
    NoFloats,
    /// An index pointed outside of its axis.
    #[error("kernel {kernel}: index {index} is outside of an axis of size {size}")]
    Index {
        /// The kernel.
        kernel: String,
        /// The index.
        index: i64,
        /// What it should have been below.
        size: usize,
    },
    /// Anything else, with the kernel's name.
    #[error("kernel {kernel}: {why}")]
    Kernel {
        /// The kernel.
        kernel: String,
        /// What is wrong.
        why: String,
    },
}
