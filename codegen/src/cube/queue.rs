//! A queue of our own to a device, past CubeCL's.
//!
//! CubeCL hands each launch to a thread of its own, which looks its kernel and its buffers up and calls the driver. Where decode is some
//! hundred launches of a few microseconds each, that takes as long as the device does, and there is no way to say that a grid
//! may begin before the one ahead is done ([`overlap`](super::overlap)). So a device that has a driver to be called is given
//! its launches, and what goes to and from its memory, directly; CubeCL is left to allocate.
//!
//! Memory is used on this queue alone, in order. CubeCL does not know when, so what it has allocated is kept here, given out again
//! when nobody holds it (whoever is next comes behind in the queue), and given back only when the queue is empty.
//!
//! A launch whose kernel is still being compiled waits here, and all behind it do, so that nobody waits for a compiler before something is
//! to be read.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

use cubecl_core::server::Handle;

use super::bulk;
use super::compiler::Code;
use super::kernel::CubeIr;
use super::prepared::{Entry, OneGrid};
use super::shape::Grid;
use crate::device::DeviceError;

/// Bytes that nobody holds and that are kept for what comes next.
const IDLE_BYTES: u64 = 2 << 30;
/// Pieces that nobody holds and that are kept.
const IDLE_PIECES: usize = 512;
/// Pieces up to this long have the length of a power of two, so that more of them are as long as another.
const SMALL: u64 = 1 << 16;

/// A kernel for a driver.
#[derive(Debug)]
pub(super) struct Function {
    pub(super) entry: String,
    pub(super) units: u32,
    pub(super) shared_bytes: u32,
    /// Whether its text waits for the grids ahead.
    pub(super) waits: bool,
    pub(super) code: Arc<Code>,
    /// The driver's number for it, once the driver has the code.
    pub(super) handle: OnceLock<usize>,
}

/// A driver's queue. What is put into it is done in order; errors of the device may come with any later call.
pub(super) trait Queue: Send {
    /// A kernel, which begins to be compiled if it was not before.
    fn function(&mut self, ir: &CubeIr) -> Result<Arc<Function>, String>;

    /// Launches a kernel on buffers that lie there, and with maps of some of them, when its code is there. Unless it is `early`, it begins
    /// when all before it is done.
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
    queue: Box<dyn Queue>,
    pieces: Vec<Arc<Piece>>,
    /// Whether the launch before was one of a run, of which is known what it does not write.
    of_run: bool,
    /// What begins with a launch whose kernel is still being compiled.
    waiting: VecDeque<Waiting>,
    /// Where the buffers of the launch at hand lie.
    buffers: Vec<u64>,
}

/// A launch that waits.
struct Waiting {
    kernel: String,
    function: Arc<Function>,
    grid: Grid,
    buffers: Vec<u64>,
    maps: Vec<bulk::Seen>,
    info: Vec<u64>,
    early: bool,
}

impl Own {
    pub(super) fn new(queue: Box<dyn Queue>) -> Own {
        Own { queue, pieces: Vec::new(), of_run: false, waiting: VecDeque::new(), buffers: Vec::new() }
    }

    /// Begins to compile what a launch wants. What cannot be written says so there.
    pub(super) fn begin(&mut self, entry: &Entry) {
        let _ = entry.function(&mut *self.queue);
    }

    /// The queue, when all launches so far are in it.
    ///
    /// # Errors
    /// If the kernel of one of them does not compile, or cannot be launched.
    pub(super) fn settled(&mut self) -> Result<&mut dyn Queue, DeviceError> {
        self.go_on(|_| true)?;
        Ok(&mut *self.queue)
    }

    /// Notes that what comes next may depend on something else than launches of a run.
    pub(super) fn leave_run(&mut self) {
        self.of_run = false;
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
        self.settled().map_err(|e| e.to_string())?.wait()?;
        self.pieces.retain(|p| Arc::strong_count(p) > 1);
        free();
        Ok(())
    }

    /// Launches a checked kernel on buffers as long as its types say.
    ///
    /// # Errors
    /// If one of them has no place; and those of the driver, also of a launch before, which has waited.
    pub(super) fn launch(
        &mut self,
        one: &OneGrid,
        buffers: impl Iterator<Item = Option<u64>>,
        when: When,
    ) -> Result<(), DeviceError> {
        let name = &one.kernel().name;
        self.buffers.clear();
        for place in buffers {
            let none = || failed(name, "a buffer has no place on the device's own queue".to_owned());
            self.buffers.push(place.ok_or_else(none)?);
        }
        let function = one.entry.function(&mut *self.queue).map_err(|why| failed(name, why))?;
        let early = function.waits && self.of_run && when == When::Early;
        self.of_run = when != When::Alone;
        if self.waiting.is_empty() && function.code.is_there() {
            // SAFETY: a checked kernel stays inside of buffers that are as long as its types say, and they are; what is dropped before the
            // queue is empty is kept as a piece. What is read before the wait is written by no launch of the run, and what was launched
            // before the run is done: its first launches begin when all before them are.
            let (buffers, info) = (&self.buffers, one.words());
            let done = unsafe { self.queue.launch(function, one.grid, buffers, &one.maps, info, early) };
            return done.map_err(|why| failed(name, why));
        }
        let (kernel, function, grid) = (name.to_owned(), Arc::clone(function), one.grid);
        let (buffers, maps, info) = (self.buffers.clone(), one.maps.clone(), one.words().to_vec());
        self.waiting.push_back(Waiting { kernel, function, grid, buffers, maps, info, early });
        self.go_on(|next| next.code.is_there())
    }

    /// Launches what waits, as long as the next kernel may be launched, or waited for. Nothing is launched behind one that fails.
    fn go_on(&mut self, may: impl Fn(&Function) -> bool) -> Result<(), DeviceError> {
        while let Some(next) = self.waiting.pop_front_if(|next| may(&next.function)) {
            let Waiting { kernel, function, grid, buffers, maps, info, early } = next;
            // SAFETY: as for a launch that need not wait. Nothing else was done with the queue meanwhile.
            let done = unsafe { self.queue.launch(&function, grid, &buffers, &maps, &info, early) };
            if let Err(why) = done {
                self.waiting.clear();
                return Err(failed(&kernel, why));
            }
        }
        Ok(())
    }
}

fn failed(kernel: &str, why: String) -> DeviceError {
    DeviceError::Kernel { kernel: kernel.to_owned(), why }
}

impl Drop for Own {
    fn drop(&mut self) {
        // What is still in the queue uses the pieces. There is nobody to tell of errors, nor to read what waiting launches would make.
        let _ = self.queue.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::cube::Target;
    use crate::program::{Kernel, KernelKind};

    /// What was put into a queue.
    type Log = Arc<Mutex<Vec<String>>>;

    /// A queue that notes what is put into it; kernels and their codes are given.
    struct Noted {
        functions: Vec<Arc<Function>>,
        all: Log,
    }

    impl Noted {
        fn note(&self, what: String) {
            self.all.lock().unwrap().push(what);
        }
    }

    impl Queue for Noted {
        fn function(&mut self, ir: &CubeIr) -> Result<Arc<Function>, String> {
            let known = self.functions.iter().find(|f| f.entry == ir.first().name);
            known.cloned().ok_or_else(|| "it cannot be written".to_owned())
        }

        unsafe fn launch(
            &mut self,
            function: &Function,
            _: Grid,
            buffers: &[u64],
            _: &[bulk::Seen],
            _: &[u64],
            early: bool,
        ) -> Result<(), String> {
            function.code.wait()?;
            self.note(format!("{} {buffers:?}{}", function.entry, if early { " early" } else { "" }));
            Ok(())
        }

        unsafe fn write(&mut self, to: u64, _: &[u8]) -> Result<(), String> {
            self.note(format!("write {to}"));
            Ok(())
        }

        unsafe fn read(&mut self, _: u64, _: &mut [u8]) -> Result<(), String> {
            Ok(())
        }

        fn wait(&mut self) -> Result<(), String> {
            Ok(())
        }
    }

    /// A queue of our own, what was put into it, and kernels of these names with their codes on their way.
    fn own<const N: usize>(names: [&str; N]) -> (Own, Log, [(OneGrid, Arc<Code>); N]) {
        let functions = names.map(|name| {
            let (entry, code, handle) = (name.to_owned(), Arc::<Code>::default(), OnceLock::new());
            Arc::new(Function { entry, units: 32, shared_bytes: 0, waits: true, code, handle })
        });
        let grids = names.map(|name| {
            let text = "module m entry @f\n\nfunc @f {\n  axes a0=n0\n  param x: f32[a0]\n\n  y: f32[a0] = exp x\n  return y\n}\n";
            let body = latentc_ir::parse("m.ir", text).unwrap().functions.remove(0);
            let kernel = Kernel { name: name.to_owned(), kind: KernelKind::Map, body };
            let entry = Entry::new(CubeIr::new(&kernel, Target::Cuda).unwrap());
            OneGrid::new(&entry, (1, 1, 1), &[8], &[8, 8])
        });
        let codes = functions.each_ref().map(|f| Arc::clone(&f.code));
        let all = Log::default();
        let queue = Noted { functions: functions.to_vec(), all: Arc::clone(&all) };
        let mut codes = codes.into_iter();
        let kernels = grids.map(|grid| (grid, codes.next().unwrap()));
        (Own::new(Box::new(queue)), all, kernels)
    }

    /// The only buffer of a launch.
    fn at(address: u64) -> impl Iterator<Item = Option<u64>> {
        [Some(address)].into_iter()
    }

    #[test]
    fn launches_wait_for_their_kernels_in_order() {
        let (mut own, all, [(a, a_code), (b, b_code), (c, c_code)]) = own(["a", "b", "c"]);
        let seen = || all.lock().unwrap().join(", ");
        b_code.arrive(Ok(Vec::new()));
        own.launch(&a, at(1), When::InOrder).unwrap();
        own.launch(&b, at(2), When::Early).unwrap();
        own.launch(&a, at(3), When::InOrder).unwrap();
        assert_eq!(seen(), "");
        a_code.arrive(Ok(Vec::new()));
        own.launch(&c, at(4), When::Alone).unwrap();
        assert_eq!(seen(), "a [1], b [2] early, a [3]");
        std::thread::scope(|scope| {
            scope.spawn(|| c_code.arrive(Ok(Vec::new())));
            // SAFETY: it is only noted.
            unsafe { own.settled().unwrap().write(5, &[]) }.unwrap();
        });
        own.launch(&b, at(6), When::Early).unwrap();
        assert_eq!(seen(), "a [1], b [2] early, a [3], c [4], write 5, b [6]");
    }

    #[test]
    fn nothing_is_launched_behind_what_does_not_compile() {
        let (mut own, all, [(a, a_code), (b, b_code)]) = own(["a", "b"]);
        own.launch(&a, at(1), When::InOrder).unwrap();
        own.launch(&b, at(2), When::InOrder).unwrap();
        b_code.arrive(Ok(Vec::new()));
        a_code.arrive(Err("line 3: what is this?".to_owned()));
        let error = own.settled().map(drop).unwrap_err();
        assert_eq!(error.to_string(), "kernel a: line 3: what is this?");
        own.settled().unwrap();
        assert!(all.lock().unwrap().is_empty());
        own.launch(&b, at(3), When::InOrder).unwrap();
        let again = own.launch(&a, at(4), When::InOrder).unwrap_err();
        assert_eq!(again.to_string(), "kernel a: line 3: what is this?");
        assert_eq!(*all.lock().unwrap(), ["b [3]"]);
    }

    #[test]
    fn a_kernel_that_cannot_be_written_is_named() {
        let (mut own, ..) = own(["a"]);
        let (.., [(b, _)]) = self::own(["b"]);
        let error = own.launch(&b, at(1), When::InOrder).unwrap_err();
        assert_eq!(error.to_string(), "kernel b: it cannot be written");
        let error = own.launch(&b, [Some(1), None].into_iter(), When::InOrder).unwrap_err();
        assert_eq!(error.to_string(), "kernel b: a buffer has no place on the device's own queue");
    }
}
