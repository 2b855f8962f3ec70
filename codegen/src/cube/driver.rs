//! CUDA's driver, called directly.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, OnceLock};

use cubecl_core::prelude::{KernelId, KernelMetadata};
use cudarc::driver::{result, sys};
use latentc_ir::DType;

use super::bulk;
use super::codes::Codes;
use super::compiler::Compiler;
use super::kernel::CubeIr;
use super::overlap::WAIT;
use super::queue::{Function, Queue};
use super::shape::Grid;
use super::source;
use crate::nvrtc::Nvrtc;

/// A stream in the context that CubeCL has, and the kernels that were launched on it.
pub(super) struct Driver {
    context: sys::CUcontext,
    stream: sys::CUstream,
    compiler: Arc<Compiler>,
    functions: HashMap<KernelId, Arc<Function>>,
    /// Where the arguments of the launch at hand lie.
    parameters: Vec<*mut c_void>,
}

// SAFETY: contexts and streams may be used from any thread; the context is made current in each call.
unsafe impl Send for Driver {}

fn said(what: &str) -> impl FnOnce(result::DriverError) -> String + '_ {
    move |error| format!("{what}: {error}")
}

impl Driver {
    /// The device of that number, if it is one whose grids may begin early, with a compiler for it. CubeCL's client for it must be there.
    pub(super) fn open(ordinal: usize, nvrtc: Nvrtc) -> Result<Option<Driver>, String> {
        use sys::CUdevice_attribute as Attribute;
        let device = result::device::get(ordinal as i32).map_err(said("the device"))?;
        // SAFETY: it is a device.
        let number = |of| unsafe { result::device::get_attribute(device, of) }.map_err(said("the device"));
        let major = number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 9 {
            return Ok(None);
        }
        // SAFETY: it is a device, and CubeCL keeps its context.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(said("its context"))?;
        // SAFETY: as above.
        unsafe { result::ctx::set_current(context) }.map_err(said("its context"))?;
        let kind = result::stream::StreamKind::NonBlocking;
        let stream = result::stream::create(kind).map_err(said("a stream"))?;
        let compiler = Compiler::new(nvrtc, format!("sm_{major}{minor}a"), Codes::of_user());
        let compiler = Arc::new(compiler.map_err(|e| e.to_string())?);
        let (functions, parameters) = (HashMap::new(), Vec::new());
        Ok(Some(Driver { context, stream, compiler, functions, parameters }))
    }

    fn enter(&self) -> Result<(), String> {
        // SAFETY: the context lives as long as the process.
        unsafe { result::ctx::set_current(self.context) }.map_err(said("the device's context"))
    }

    /// The driver's number for a kernel, whose code it is given. The context is current.
    fn load(&self, function: &Function) -> Result<usize, String> {
        let code = function.code.wait()?;
        let entry = CString::new(function.entry.as_str()).map_err(|e| e.to_string())?;
        // SAFETY: the code is an image for this device, and modules are never unloaded.
        let handle = unsafe {
            let module = result::module::load_data(code.as_ptr().cast()).map_err(said("loading code"))?;
            let handle = result::module::get_function(module, entry).map_err(said("the entry"))?;
            let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            result::function::set_function_attribute(handle, most, function.shared_bytes as i32)
                .map_err(said("shared memory"))?;
            handle
        };
        Ok(*function.handle.get_or_init(|| handle.expose_provenance()))
    }
}

/// What the device is told of memory that lies there, to copy boxes of it.
fn map(address: u64, seen: &bulk::Seen) -> Result<sys::CUtensorMap, String> {
    use sys::{CUtensorMapDataType as Elem, CUtensorMapFloatOOBfill as Beyond};
    use sys::{CUtensorMapInterleave as Interleave, CUtensorMapL2promotion as Promotion};
    let elem = match seen.dtype {
        DType::F16 => Elem::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::Bf16 => Elem::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        other => return Err(format!("boxes of {other} are not copied")),
    };
    let numbers: Vec<_> = seen.dims.iter().map(|dim| dim.0).collect();
    // Those of the innermost lie behind one another.
    let strides: Vec<_> = seen.dims[1..].iter().map(|dim| dim.1).collect();
    let boxes: Vec<_> = seen.dims.iter().map(|dim| dim.2).collect();
    let steps = vec![1; boxes.len()];
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: as many numbers as dimensions, and a stride less.
    let made = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            elem,
            boxes.len() as u32,
            std::ptr::with_exposed_provenance_mut(address as usize),
            numbers.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            steps.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            Beyond::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    made.result().map_err(|error| format!("a map of {seen:?} at {address:#x}: {error}"))?;
    Ok(map)
}

impl Queue for Driver {
    fn function(&mut self, ir: &CubeIr) -> Result<Arc<Function>, String> {
        let id = ir.id();
        if let Some(known) = self.functions.get(&id) {
            return Ok(Arc::clone(known));
        }
        let source::Text { source, entry, units, shared_bytes } = source::cuda_launched(ir)?;
        let (waits, handle) = (source.contains(WAIT), OnceLock::new());
        let code = self.compiler.begin(source);
        let function = Arc::new(Function { entry, units, shared_bytes, waits, code, handle });
        self.functions.insert(id, Arc::clone(&function));
        Ok(function)
    }

    unsafe fn launch(
        &mut self,
        function: &Function,
        (x, y, z): Grid,
        buffers: &[u64],
        maps: &[bulk::Seen],
        info: &[u64],
        early: bool,
    ) -> Result<(), String> {
        self.enter()?;
        let handle = function.handle.get().copied().map_or_else(|| self.load(function), Ok)?;
        let maps = maps.iter().map(|seen| map(buffers[seen.buffer], seen)).collect::<Result<Vec<_>, _>>()?;
        let parameters = &mut self.parameters;
        parameters.clear();
        parameters.extend(maps.iter().map(|map| std::ptr::from_ref(map).cast_mut().cast::<c_void>()));
        parameters
            .extend(buffers.iter().map(|address| std::ptr::from_ref(address).cast_mut().cast::<c_void>()));
        // Sizes are passed by value, as one struct.
        parameters.push(info.as_ptr().cast_mut().cast());
        let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
        value.programmaticStreamSerializationAllowed = 1;
        let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        let mut attribute = sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: function.units,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: function.shared_bytes,
            hStream: self.stream,
            attrs: &raw mut attribute,
            numAttrs: early.into(),
        };
        let handle = std::ptr::with_exposed_provenance_mut(handle);
        // SAFETY: all that is pointed to lives until the driver has copied it; the rest is the caller's.
        unsafe { sys::cuLaunchKernelEx(&raw const config, handle, parameters.as_mut_ptr(), null_mut()) }
            .result()
            .map_err(said("a launch"))
    }

    unsafe fn write(&mut self, to: u64, bytes: &[u8]) -> Result<(), String> {
        self.enter()?;
        // SAFETY: what is not pinned is copied before the call returns; the rest is the caller's.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream) }.map_err(said("a copy to the device"))
    }

    unsafe fn read(&mut self, from: u64, bytes: &mut [u8]) -> Result<(), String> {
        self.enter()?;
        // SAFETY: the bytes stay until the queue is empty; the rest is the caller's.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.stream) }
            .map_err(said("a copy from the device"))?;
        self.wait()
    }

    fn wait(&mut self) -> Result<(), String> {
        self.enter()?;
        // SAFETY: the stream is there until this is dropped.
        unsafe { result::stream::synchronize(self.stream) }.map_err(said("the device"))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // SAFETY: nobody else has the stream.
        let _ = self.enter().map(|()| unsafe { result::stream::destroy(self.stream) });
    }
}
