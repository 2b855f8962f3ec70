//! The devices that CubeCL reaches.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::ThreadId;

use cubecl_core::InfoBuilder;
use cubecl_core::client::ComputeClient;
use cubecl_core::future::block_on;
use cubecl_core::ir::AddressType;
use cubecl_core::ir::features::Tma;
use cubecl_core::prelude::{CubeCount, Runtime};
use cubecl_core::server::{Handle, KernelArguments, MetadataBindingInfo};
use half::{bf16, f16};
use latentc_ir::DType;

use super::edits::Edits;
use super::emit::Elem;
use super::machine::Machine;
use super::prepared::{Does, OneGrid, Several};
use super::preparer::Preparer;
use super::queue::{Own, Place, When};
use super::source::Task;
use super::target::Target;
use super::tuning::{Chosen, Tuning, Way};
use crate::device::{Data, Device, DeviceError, Launch};
use crate::memory::Layout;
use crate::program::Kernel;

/// A CubeCL runtime that kernels can be written for.
pub trait CubeRuntime: Runtime {
    /// Its language.
    const TARGET: Target;

    /// Where memory of a client lies on the device.
    ///
    /// # Errors
    /// If it is not there, or only the driver knows.
    fn address(client: &ComputeClient<Self>, handle: Handle) -> Result<u64, String> {
        let _ = (client, handle);
        Err("only the driver knows where memory lies".to_owned())
    }
}

/// A device of a CubeCL runtime. Launches run in order, without waiting (one may be several on the device, several that may run at the same time one); errors of the device come out at the next
/// [`read`](Device::read) or [`wait`](Device::wait) at the latest, those of kernels that do not compile too.
pub struct CubeDevice<R: CubeRuntime> {
    pub(super) client: ComputeClient<R>,
    name: String,
    /// What launches come to.
    pub(super) preparer: Preparer,
    /// Memory between the two launches of a streamed softmax, and the thread that had it made.
    pub(super) between: Option<(ThreadId, CubeBuffer)>,
    /// The kernels launched since the device was last asked for errors.
    pending: Vec<Arc<str>>,
    /// The driver's queue, where it is used in place of CubeCL's.
    own: Option<Own>,
}

/// Memory of a [`CubeDevice`].
#[derive(Clone, Debug)]
pub struct CubeBuffer {
    handle: Handle,
    dtype: DType,
    len: usize,
    place: Option<Place>,
}

impl CubeBuffer {
    /// The memory, which whoever else uses this device's client can be given: `len` elements one after another.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Memory of a [`CubeDevice`] that buffers are parts of.
#[derive(Debug)]
pub struct CubeArena {
    handle: Handle,
    bytes: u64,
    place: Option<Place>,
}

#[cfg(feature = "wgpu")]
pub use wgpu::WgpuDevice;

#[cfg(feature = "wgpu")]
mod wgpu {
    use std::sync::OnceLock;

    use cubecl_core::device::{Device as _, DeviceId};
    use cubecl_core::prelude::Runtime;
    use cubecl_wgpu::{AutoGraphicsApi, GraphicsApi, WgpuDevice as Adapter, WgpuRuntime};

    use super::{CubeDevice, CubeRuntime, DeviceError, Target};

    /// A graphics driver: Vulkan, Metal or DirectX, or the CPU through Mesa's lavapipe.
    pub type WgpuDevice = CubeDevice<WgpuRuntime>;

    impl CubeRuntime for WgpuRuntime {
        const TARGET: Target = Target::Wgsl;
    }

    impl WgpuDevice {
        /// The first adapter.
        ///
        /// # Errors
        /// If there is none.
        pub fn open() -> Result<WgpuDevice, DeviceError> {
            let adapter = WgpuDevice::first()?;
            let client = WgpuRuntime::client(&adapter);
            Ok(CubeDevice::new(client, format!("wgpu {adapter:?} ({:?})", AutoGraphicsApi::backend())))
        }

        /// The first adapter, as CubeCL names it.
        ///
        /// # Errors
        /// If there is none.
        pub fn first() -> Result<Adapter, DeviceError> {
            // Looking for adapters starts all drivers there are, so it is done once.
            static FIRST: OnceLock<Option<DeviceId>> = OnceLock::new();
            let backend = AutoGraphicsApi::backend();
            let find = || WgpuRuntime::enumerate_all_devices(&backend).first().copied();
            let Some(first) = *FIRST.get_or_init(find) else {
                return Err(DeviceError::Absent("wgpu", format!("there is no {backend:?} adapter")));
            };
            // The default device would leave out CPU adapters, and panic if there is no other.
            Ok(Adapter::from_id(first))
        }
    }
}

#[cfg(feature = "cuda")]
pub use cuda::CudaDevice;

#[cfg(feature = "cuda")]
mod cuda {
    use cubecl_core::client::ComputeClient;
    use cubecl_core::prelude::Runtime;
    use cubecl_core::server::Handle;
    use cubecl_cuda::{CudaDevice as Ordinal, CudaRuntime, install};
    use cudarc::driver::result;

    use super::super::driver::Driver;
    use super::super::queue::Own;
    use super::{CubeDevice, CubeRuntime, DeviceError, Target};
    use crate::nvrtc::{Nvrtc, NvrtcError};

    /// An NVIDIA GPU. Kernels are compiled by NVRTC, found by its name, with the headers under `CUDA_PATH`. What is compiled for devices of
    /// compute capability 9.0 and later is kept in files: see [`CACHE`](crate::cube::CACHE).
    pub type CudaDevice = CubeDevice<CudaRuntime>;

    impl CubeRuntime for CudaRuntime {
        const TARGET: Target = Target::Cuda;

        fn address(client: &ComputeClient<Self>, handle: Handle) -> Result<u64, String> {
            let resource = client.get_resource(handle).map_err(|e| e.to_string())?;
            Ok(resource.resource().ptr)
        }
    }

    impl CudaDevice {
        /// The GPU of that number, from 0.
        ///
        /// # Errors
        /// If there is no driver or no such GPU.
        pub fn open(ordinal: usize) -> Result<CudaDevice, DeviceError> {
            let absent = |why: String| Err(DeviceError::Absent("CUDA", why));
            // The bindings panic where a library is missing, so look first.
            // SAFETY: the library does nothing when it is loaded.
            let loads = |name: &&str| unsafe { libloading::Library::new(name) }.is_ok();
            if !["libcuda.so.1", "libcuda.so", "nvcuda.dll"].iter().any(loads) {
                return absent("the driver's library libcuda.so.1 is not installed".to_owned());
            }
            if !install::cuda_path().is_some_and(|path| path.join("include/cuda_runtime.h").is_file()) {
                return absent("CUDA_PATH is not a folder with include/cuda_runtime.h".to_owned());
            }
            let headers = [install::include_path(), install::cccl_include_path()];
            let headers: Vec<_> = headers.into_iter().filter(|path| path.exists()).collect();
            let nvrtc = match Nvrtc::installed(&headers) {
                Ok(nvrtc) => nvrtc,
                Err(NvrtcError::Absent(why)) => return absent(format!("the compiler's library {why}")),
                Err(e) => return absent(e.to_string()),
            };
            let count = CudaRuntime::enumerate_all_devices(&()).len();
            if ordinal >= count {
                return absent(format!("the driver lists {count} devices, number {ordinal} is asked for"));
            }
            let client = CudaRuntime::client(&Ordinal::new(ordinal));
            let driver = Driver::open(ordinal, nvrtc).map_err(|why| DeviceError::Absent("CUDA", why))?;
            let own = driver.map(|driver| Own::new(Box::new(driver)));
            let number = result::device::get(ordinal as i32);
            let name = number.and_then(result::device::get_name).unwrap_or_else(|_| "CUDA".to_owned());
            let mut device = CubeDevice::new(client, format!("{name}, device {ordinal}"));
            // Maps of operands are made for a driver that is called directly.
            device.preparer.machine.boxes = own.is_some();
            Ok(CubeDevice { own, ..device })
        }
    }
}

impl<R: CubeRuntime> CubeDevice<R> {
    /// What a client reaches. Others may use it too: what they launch and what is launched here is done in order.
    pub fn new(client: ComputeClient<R>, name: String) -> CubeDevice<R> {
        let properties = client.properties();
        // CubeCL does not say which architecture a device is of: tensor maps came with 9.0, these modes of theirs with 10.0.
        let tma = &properties.features.tma;
        let machine = Machine {
            // Drivers of graphics do not say.
            multiprocessors: (properties.hardware.num_streaming_multiprocessors)
                .map_or(Machine::HOPPER.multiprocessors, |n| n as usize),
            shared_bytes: properties.hardware.max_shared_memory_size,
            groups: tma.contains(Tma::Base) && !tma.contains(Tma::Im2colWide),
            boxes: false,
        };
        let preparer = Preparer::new(R::TARGET, properties.hardware.clone(), machine);
        CubeDevice { client, name, preparer, between: None, pending: Vec::new(), own: None }
    }

    /// The same, with other texts in place of kernels' own.
    pub fn with_edits(mut self, edits: Arc<Edits>) -> CubeDevice<R> {
        self.preparer.take_edits(edits);
        self
    }

    /// The same, with ways in place of those that the rules say.
    pub fn with_tuning(mut self, tuning: Arc<Tuning>) -> CubeDevice<R> {
        self.take_ways(tuning);
        self
    }

    /// Memory of the same client as a buffer of so many elements, which lie one after another.
    ///
    /// # Errors
    /// If it is too small, or the device cannot hold the dtype.
    pub fn adopt(&self, handle: Handle, dtype: DType, len: usize) -> Result<CubeBuffer, DeviceError> {
        let elem = self.admit(dtype, len)?;
        let has = handle.size_in_used();
        if has < (len * elem.bytes()) as u64 {
            return Err(DeviceError::Memory { len, dtype, why: format!("they are to lie in {has} bytes") });
        }
        Ok(CubeBuffer { handle, dtype, len, place: None })
    }

    /// Memory of so many bytes.
    fn room(&mut self, bytes: usize) -> Result<(Handle, Option<Place>), String> {
        let Some(own) = &mut self.own else { return Ok((self.client.empty(bytes), None)) };
        let client = &self.client;
        let make = |bytes: u64| {
            let handle = client.empty(bytes as usize);
            let address = R::address(client, handle.clone())?;
            // The driver allocates in the order of CubeCL's queue.
            caught(|| block_on(client.sync()))?;
            Ok((handle, address))
        };
        let piece = own.piece(bytes as u64, make, || {
            // CubeCL gives memory back then. If that fails, so does what comes next.
            let _ = caught(|| client.flush());
        })?;
        let beyond = piece.handle.size_in_used() - bytes as u64;
        Ok((piece.handle.clone().offset_end(beyond), Some(Place { piece, start: 0 })))
    }

    /// The element type of a buffer, if that much memory can be one.
    fn admit(&self, dtype: DType, len: usize) -> Result<Elem, DeviceError> {
        let no = |why: String| Err(DeviceError::Memory { len, dtype, why });
        let properties = self.client.properties();
        let Some(elem) = R::TARGET.stored(dtype) else {
            return no(format!("{} kernels cannot hold this dtype", R::TARGET));
        };
        if !properties.features.types.storage.contains_key(&elem.storage()) {
            return no("the device cannot hold this dtype".to_owned());
        }
        let (bytes, most) = (len.saturating_mul(elem.bytes()) as u64, properties.memory.max_page_size);
        if bytes > most {
            return no(format!("{bytes} bytes, where a buffer has {most} at most"));
        }
        if len as u64 > u32::MAX.into() {
            return no("indices have 32 bits".to_owned());
        }
        Ok(elem)
    }

    /// Waits until the device has taken all launches, and gives its errors.
    fn flush(&mut self) -> Result<(), DeviceError> {
        if let Some(own) = &mut self.own {
            return own.settled().map(drop);
        }
        let kernels = std::mem::take(&mut self.pending);
        caught(|| self.client.flush()).map_err(|why| DeviceError::Kernel { kernel: kernels.join(", "), why })
    }

    /// Begins to compile what a launch of a kernel at these run-time sizes wants, on other threads, where the driver is called directly. The
    /// launch waits for it, and says what is wrong with it.
    pub fn begin(&mut self, kernel: &Kernel, sizes: &[usize]) {
        let Some(own) = &mut self.own else { return };
        if let Ok((prepared, _)) = self.preparer.prepared(kernel, kernel.body.params.len(), sizes, None) {
            prepared.launches.entries().for_each(|entry| own.begin(entry));
        }
    }

    /// Launches a checked kernel on buffers as long as its types say.
    pub(super) fn enqueue<'b>(
        &mut self,
        one: &OneGrid,
        buffers: impl IntoIterator<Item = &'b CubeBuffer>,
        when: When,
    ) -> Result<(), DeviceError> {
        if let Some(own) = &mut self.own {
            let places = buffers.into_iter().map(|b| b.place.as_ref().map(Place::address));
            return own.launch(one, places, when);
        }
        let bindings = buffers.into_iter().map(|b| b.handle.clone().binding()).collect();
        let args = KernelArguments::new().with_buffers(bindings).with_info(one.info());
        let task = Box::new(Task::<R::Compiler>::new(one.entry.ir.clone()));
        let (x, y, z) = one.grid;
        // SAFETY: a checked kernel stays inside of buffers that are as long as its types say, and they are.
        unsafe { self.client.launch_unchecked(task, CubeCount::Static(x, y, z), args) };
        Ok(())
    }
}

/// The bytes of memory that so many take: a buffer of none cannot be bound, and drivers count in words.
fn room(bytes: usize) -> usize {
    bytes.next_multiple_of(4).max(4)
}

/// What a call of CubeCL came to. Where its own thread has panicked, it panics in turn.
fn caught<E: ToString>(call: impl FnOnce() -> Result<(), E>) -> Result<(), String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("the driver's thread panicked".to_owned()),
    }
}

impl<R: CubeRuntime> Device for CubeDevice<R> {
    type Buffer = CubeBuffer;
    type Arena = CubeArena;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn alloc(&mut self, dtype: DType, len: usize) -> Result<CubeBuffer, DeviceError> {
        let elem = self.admit(dtype, len)?;
        let (handle, place) =
            self.room(room(len * elem.bytes())).map_err(|why| DeviceError::Memory { len, dtype, why })?;
        Ok(CubeBuffer { handle, dtype, len, place })
    }

    fn upload(&mut self, dtype: DType, data: Data) -> Result<CubeBuffer, DeviceError> {
        let len = data.len();
        let elem = self.admit(dtype, len)?;
        let Some(mut bytes) = encode(elem, &data) else {
            let why = "floats are uploaded as F32, integers and truth values as I32".to_owned();
            return Err(DeviceError::Memory { len, dtype, why });
        };
        bytes.resize(room(bytes.len()), 0);
        if self.own.is_none() {
            let handle = self.client.create_from_slice(&bytes);
            return Ok(CubeBuffer { handle, dtype, len, place: None });
        }
        let fail = |why: String| DeviceError::Memory { len, dtype, why };
        let (handle, place) = self.room(bytes.len()).map_err(fail)?;
        if let (Some(own), Some(place)) = (&mut self.own, &place) {
            own.leave_run();
            // SAFETY: the piece has room for them.
            unsafe { own.settled()?.write(place.address(), &bytes) }.map_err(fail)?;
        }
        Ok(CubeBuffer { handle, dtype, len, place })
    }

    fn read(&mut self, buffer: &CubeBuffer, len: usize) -> Result<Data, DeviceError> {
        let fail = |why: String| DeviceError::Memory { len, dtype: buffer.dtype, why };
        if len > buffer.len {
            return Err(fail(format!("the buffer has {} elements", buffer.len)));
        }
        let elem = self.admit(buffer.dtype, len)?;
        // A read does not tell of launches that failed.
        self.flush()?;
        let bytes = room(len * elem.bytes()) as u64;
        if let (Some(own), Some(place)) = (&mut self.own, &buffer.place) {
            self.pending.clear();
            let mut held = vec![0; bytes as usize];
            // SAFETY: the buffer has as many elements.
            unsafe { own.settled()?.read(place.address(), &mut held) }.map_err(fail)?;
            return Ok(decode(elem, &held, len));
        }
        let handle = buffer.handle.clone();
        let beyond = handle.size_in_used().saturating_sub(bytes);
        let bytes = self.client.read_one(handle.offset_end(beyond)).map_err(|e| fail(e.to_string()))?;
        Ok(decode(elem, &bytes, len))
    }

    fn wait(&mut self) -> Result<(), DeviceError> {
        // Waiting does not tell of kernels that did not compile.
        self.flush()?;
        let before = |why| DeviceError::Kernel { kernel: "launched before".to_owned(), why };
        if let Some(own) = &mut self.own {
            let kernels = std::mem::take(&mut self.pending);
            return own
                .settled()?
                .wait()
                .map_err(|why| DeviceError::Kernel { kernel: kernels.join(", "), why });
        }
        caught(|| block_on(self.client.sync())).map_err(before)
    }

    fn way(&self, kernel: &Kernel, sizes: &[usize]) -> Chosen {
        self.preparer.way(kernel, sizes)
    }

    fn ways(&self, kernel: &Kernel, sizes: &[usize]) -> Vec<Way> {
        self.preparer.ways(kernel, sizes)
    }

    fn admits(&self, kernel: &Kernel) -> Result<(), DeviceError> {
        self.preparer.admits(kernel)
    }

    fn take_ways(&mut self, tuning: Arc<Tuning>) {
        self.preparer.take_ways(tuning);
    }

    fn machine(&self) -> Option<(Target, Machine)> {
        Some((R::TARGET, self.preparer.machine))
    }

    fn layout(&self) -> Layout {
        let memory = &self.client.properties().memory;
        // A driver may want offsets at such multiples.
        Layout { align: memory.alignment.max(4), page: memory.max_page_size, ..R::TARGET.layout() }
    }

    fn reserve(&mut self, bytes: u64) -> Result<CubeArena, DeviceError> {
        let most = self.client.properties().memory.max_page_size;
        if bytes > most {
            let why = format!("a buffer has {most} bytes at most");
            return Err(DeviceError::Arena { bytes, why });
        }
        let room = room(bytes as usize);
        let (handle, place) = self.room(room).map_err(|why| DeviceError::Arena { bytes, why })?;
        Ok(CubeArena { handle, bytes: room as u64, place })
    }

    unsafe fn part(
        &mut self,
        arena: &CubeArena,
        offset: u64,
        dtype: DType,
        len: usize,
    ) -> Result<CubeBuffer, DeviceError> {
        let elem = self.admit(dtype, len)?;
        let bytes = room(len * elem.bytes()) as u64;
        let Some(beyond) = arena.bytes.checked_sub(offset.saturating_add(bytes)) else {
            let why = format!("they do not fit at byte {offset} of {}", arena.bytes);
            return Err(DeviceError::Memory { len, dtype, why });
        };
        let handle = arena.handle.clone().offset_start(offset).offset_end(beyond);
        let place = arena.place.as_ref().map(|place| place.behind(offset));
        Ok(CubeBuffer { handle, dtype, len, place })
    }

    fn window(&mut self, buffer: &CubeBuffer, range: Range<usize>) -> Option<CubeBuffer> {
        let (dtype, len) = (buffer.dtype, range.len());
        let elem = self.admit(dtype, len).ok()?;
        let [start, bytes] = [range.start * elem.bytes(), room(len * elem.bytes())].map(|n| n as u64);
        if range.end > buffer.len || !start.is_multiple_of(self.layout().align) {
            return None;
        }
        let beyond = buffer.handle.size_in_used().checked_sub(start + bytes)?;
        let handle = buffer.handle.clone().offset_start(start).offset_end(beyond);
        let place = buffer.place.as_ref().map(|place| place.behind(start));
        Some(CubeBuffer { handle, dtype, len, place })
    }

    fn launch(
        &mut self,
        kernel: &Kernel,
        inputs: &[Option<&CubeBuffer>],
        output: &mut CubeBuffer,
        sizes: &[usize],
    ) -> Result<(), DeviceError> {
        let launch = Launch { kernel, inputs, output, sizes, key: None, still: None };
        self.launch_together(&mut std::iter::once(launch))
    }

    fn launch_together(
        &mut self,
        launches: &mut dyn Iterator<Item = Launch<'_, CubeBuffer>>,
    ) -> Result<(), DeviceError> {
        let launches: Vec<_> = launches.collect();
        // What is not known by a key is not looked up.
        let keyed = launches.iter().all(|l| l.key.is_some());
        let mut ready = Vec::with_capacity(launches.len());
        let mut prepared = Vec::with_capacity(launches.len());
        for launch in launches {
            if let Some((one, of)) = self.ready(launch)? {
                ready.push(one);
                prepared.push(of);
            }
        }
        let arranged = self.preparer.arranged(&prepared, keyed)?;
        for (members, does) in &arranged.grids {
            let when = members.iter().map(|&n| prepared[n].when(ready[n].still)).min().unwrap_or(When::Alone);
            match does {
                Does::Grid(grid) => {
                    let buffers = members.iter().flat_map(|&n| ready[n].buffers.iter().copied());
                    self.enqueue(grid, buffers, when)?;
                }
                Does::More => {
                    for &n in members {
                        match prepared[n].several.as_ref().expect("what is one launch is a grid") {
                            Several::Halves(halves) => self.run_halves(halves, &ready[n], when)?,
                            Several::Staged(staged) => self.run_stages(staged, &ready[n], when)?,
                        }
                    }
                }
            }
            for &n in members {
                if self.pending.last() != Some(&prepared[n].launches.name) {
                    self.pending.push(Arc::clone(&prepared[n].launches.name));
                }
            }
            // To CubeCL, a kernel that does not compile is known by its name only as long as no other was launched.
            if self.own.is_none() && members.iter().any(|&n| ready[n].first) {
                self.flush()?;
            }
        }
        Ok(())
    }
}

/// What a launch hands over besides its buffers: the run-time sizes, and how many elements each buffer has.
pub(crate) fn launch_info(sizes: &[usize], lens: &[usize]) -> MetadataBindingInfo {
    let address = AddressType::U32;
    let mut info = InfoBuilder::default();
    for &n in sizes {
        info.scalars.push(n as u32);
    }
    for &len in lens {
        info.metadata.register_array(len as u64, len as u64, address);
    }
    info.finish(address)
}

/// The bytes of elements, or `None` if they come as the wrong kind of numbers.
pub(super) fn encode(elem: Elem, data: &Data) -> Option<Vec<u8>> {
    Some(match (elem, data) {
        (Elem::F32, Data::F32(v)) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
        (Elem::Bf16, Data::F32(v)) => v.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        (Elem::F16, Data::F32(v)) => v.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        (Elem::I32, Data::I32(v)) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
        (Elem::U32, Data::I32(v)) => v.iter().flat_map(|&x| u32::from(x != 0).to_le_bytes()).collect(),
        (Elem::U8, Data::I32(v)) => v.iter().map(|&x| u8::from(x != 0)).collect(),
        (Elem::F32 | Elem::F16 | Elem::Bf16, Data::I32(_))
        | (Elem::I32 | Elem::U32 | Elem::U8, Data::F32(_)) => {
            return None;
        }
        (Elem::Bool, _) => return None,
    })
}

/// The first `len` elements in these bytes.
pub(super) fn decode(elem: Elem, bytes: &[u8], len: usize) -> Data {
    fn each<const N: usize, T>(bytes: &[u8], len: usize, one: impl Fn([u8; N]) -> T) -> Vec<T> {
        let all = bytes.as_chunks::<N>().0;
        all[..len.min(all.len())].iter().map(|c| one(*c)).collect()
    }
    match elem {
        Elem::F32 => Data::F32(each(bytes, len, f32::from_le_bytes)),
        Elem::Bf16 => Data::F32(each(bytes, len, |b| bf16::from_le_bytes(b).to_f32())),
        Elem::F16 => Data::F32(each(bytes, len, |b| f16::from_le_bytes(b).to_f32())),
        Elem::I32 | Elem::U32 => Data::I32(each(bytes, len, i32::from_le_bytes)),
        Elem::U8 | Elem::Bool => Data::I32(each(bytes, len, |[b]: [u8; 1]| b.into())),
    }
}
