//! A queue of our own to a device, past CubeCL's.
//!
//! CubeCL hands each launch to a thread of its own, which looks its kernel and its buffers up and calls the driver. Where decode is some
//! hundred launches of a few microseconds each, that takes as long as the device does, and there is no way to say that a grid
//! may begin before the one ahead is done ([`overlap`](super::overlap)). So a device that has a driver to be called is given
//! its launches, and what goes to and from its memory, directly; CubeCL is left to allocate.
//!
//! Memory is used on this queue alone, in order. CubeCL does not know when, so what it has allocated is kept here, given out again
//! when nobody holds it (whoever is next comes behind in the queue), and given back only when the queue is empty.

use std::sync::Arc;

use cubecl_core::server::Handle;

use super::bulk;
use super::kernel::CubeIr;
use super::prepared::OneGrid;
use super::shape::Grid;

/// Bytes that nobody holds and that are kept for what comes next.
const IDLE_BYTES: u64 = 2 << 30;
/// Pieces that nobody holds and that are kept.
const IDLE_PIECES: usize = 512;
/// Pieces up to this long have the length of a power of two, so that more of them are as long as another.
const SMALL: u64 = 1 << 16;

/// A compiled kernel as a driver knows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Function {
    /// The driver's number for it.
    pub(super) handle: usize,
    pub(super) units: u32,
    pub(super) shared_bytes: u32,
    /// Whether its text waits for the grids ahead.
    pub(super) waits: bool,
}

/// A driver's queue. What is put into it is done in order; errors of the device may come with any later call.
pub(super) trait Queue: Send {
    /// A kernel, compiled if it was not before.
    fn function(&mut self, ir: &CubeIr) -> Result<Function, String>;

    /// Launches a kernel on buffers that lie there, and with maps of some of them. Unless it is `early`, it begins when all before it is done.
    ///
    /// # Safety
    /// The buffers must be as long as the kernel's types say, and stay until the queue is empty; `early` grids must read nothing that
    /// the grids ahead write before they wait for these.
    unsafe fn launch(
        &mut self,
        function: &Function,
        grid: Grid,
        buffers: &[u64],
        maps: &[bulk::Seen],
        info: &[u64],
        early: bool,
    ) -> Result<(), String>;

    /// Copies bytes to the device.
    ///
    /// # Safety
    /// There must be memory for them.
    unsafe fn write(&mut self, to: u64, bytes: &[u8]) -> Result<(), String>;

    /// Copies bytes from the device, when all before is done.
    ///
    /// # Safety
    /// There must be as many.
    unsafe fn read(&mut self, from: u64, bytes: &mut [u8]) -> Result<(), String>;

    /// Waits until all is done.
    fn wait(&mut self) -> Result<(), String>;
}

/// Memory of a device and where it lies.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) handle: Handle,
    pub(super) address: u64,
    bytes: u64,
}

/// Where memory lies on a device whose queue is used directly: so many bytes behind the begin of a piece.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) piece: Arc<Piece>,
    pub(super) start: u64,
}

impl Place {
    pub(super) fn address(&self) -> u64 {
        self.piece.address + self.start
    }

    pub(super) fn behind(&self, bytes: u64) -> Place {
        Place { piece: Arc::clone(&self.piece), start: self.start + bytes }
    }
}

/// When a grid may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum When {
    /// When all before it is done. What it writes is not known to be a value of a run.
    Alone,
    /// When all before it is done.
    InOrder,
    /// When the grid before it has begun, if that is of a run too: no launch of a run writes what is read before the wait.
    Early,
}

/// A queue, and the memory that is used on it.
pub(super) struct Own {
    pub(super) queue: Box<dyn Queue>,
    pieces: Vec<Arc<Piece>>,
    /// Whether the launch before was one of a run, of which is known what it does not write.
    pub(super) of_run: bool,
}

impl Own {
    pub(super) fn new(queue: Box<dyn Queue>) -> Own {
        Own { queue, pieces: Vec::new(), of_run: false }
    }

    /// A piece of so many bytes, which `make` allocates if there is none to be had. It says where the piece lies; `free` is told that some
    /// are given back.
    pub(super) fn piece(
        &mut self,
        bytes: u64,
        make: impl Fn(u64) -> Result<(Handle, u64), String>,
        free: impl Fn(),
    ) -> Result<Arc<Piece>, String> {
        let bytes = if bytes <= SMALL { bytes.next_power_of_two() } else { bytes };
        let idle = |piece: &&Arc<Piece>| Arc::strong_count(piece) == 1;
        if let Some(piece) = self.pieces.iter().filter(idle).find(|p| p.bytes == bytes) {
            return Ok(Arc::clone(piece));
        }
        let (count, all) =
            self.pieces.iter().filter(idle).fold((0, bytes), |(n, all), p| (n + 1, all + p.bytes));
        let many = count > IDLE_PIECES || (count > 0 && all > IDLE_BYTES);
        if many {
            self.give_back(&free)?;
        }
        let (handle, address) = match make(bytes) {
            Err(_) if count > 0 && !many => {
                self.give_back(&free)?;
                make(bytes)?
            }
            made => made?,
        };
        let piece = Arc::new(Piece { handle, address, bytes });
        self.pieces.push(Arc::clone(&piece));
        Ok(piece)
    }

    /// Gives back what nobody holds, when nothing in the queue can use it.
    fn give_back(&mut self, free: impl Fn()) -> Result<(), String> {
        self.queue.wait()?;
        self.pieces.retain(|p| Arc::strong_count(p) > 1);
        free();
        Ok(())
    }

    /// Launches a checked kernel on buffers as long as its types say, if all of them have a place.
    pub(super) fn launch(
        &mut self,
        one: &OneGrid,
        buffers: Option<Vec<u64>>,
        when: When,
    ) -> Result<(), String> {
        let buffers = buffers.ok_or("a buffer has no place on the device's own queue")?;
        let function = one.function(&mut *self.queue)?;
        let early = function.waits && self.of_run && when == When::Early;
        self.of_run = when != When::Alone;
        // SAFETY: a checked kernel stays inside of buffers that are as long as its types say, and they are; what is dropped before the
        // queue is empty is kept as a piece. What is read before the wait is written by no launch of the run, and what was launched
        // before the run is done: its first launches begin when all before them are.
        unsafe { self.queue.launch(&function, one.grid, &buffers, &one.maps, one.words(), early) }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // What is still in the queue uses the pieces. There is nobody to tell of errors.
        let _ = self.queue.wait();
    }
}
