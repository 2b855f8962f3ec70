//! Which backends of burn share memory with compiled graphs.

use burn::tensor::backend::Backend;
use burn::tensor::{DType as BurnDType, Shape};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, FloatElement, IntElement};
use latentc_codegen::cube::{CubeBuffer, CubeDevice, CubeRuntime};
use latentc_codegen::device::DeviceError;
use latentc_ir::DType;
use latentc_runtime::engine::Resident;

/// A backend of burn whose tensors are memory of a CubeCL runtime that latentc writes kernels for: wgpu and CUDA, without burn's
/// fusion, which does not say where a tensor lies before it is needed.
pub trait CubeclBackend:
    Backend<
        Device = <<Self as CubeclBackend>::Runtime as CubeclRuntime>::Place,
        FloatTensorPrimitive = CubeTensor<<Self as CubeclBackend>::Runtime>,
        IntTensorPrimitive = CubeTensor<<Self as CubeclBackend>::Runtime>,
    >
{
    /// The runtime.
    type Runtime: CubeclRuntime;
}

/// A CubeCL runtime that both burn and latentc know.
pub trait CubeclRuntime: CubeRuntime + burn_cubecl::CubeRuntime<CubeDevice = Self::Place> {
    /// Its devices.
    type Place: burn::tensor::backend::DeviceOps;
}

impl<R: CubeRuntime + burn_cubecl::CubeRuntime> CubeclRuntime for R {
    type Place = R::CubeDevice;
}

impl<R, F, I, T> CubeclBackend for CubeBackend<R, F, I, T>
where
    R: CubeclRuntime,
    F: FloatElement,
    I: IntElement,
    T: BoolElement,
{
    type Runtime = R;
}

/// The first adapter that wgpu finds, one of the CPU if there is no other, which burn's default device leaves out.
///
/// # Errors
/// If there is none.
#[cfg(feature = "wgpu")]
pub fn wgpu_device() -> Result<burn::backend::wgpu::WgpuDevice, DeviceError> {
    latentc_codegen::cube::WgpuDevice::first()
}

/// What burn calls a dtype.
pub(crate) fn burn_dtype(dtype: DType) -> Option<BurnDType> {
    match dtype {
        DType::F64 => Some(BurnDType::F64),
        DType::F32 => Some(BurnDType::F32),
        DType::Bf16 => Some(BurnDType::BF16),
        DType::F16 => Some(BurnDType::F16),
        DType::I32 => Some(BurnDType::I32),
        DType::Bool => None,
    }
}

/// What latentc calls a float of burn's.
pub(crate) fn float_dtype(dtype: BurnDType) -> Option<DType> {
    [DType::F32, DType::Bf16, DType::F16].into_iter().find(|&d| burn_dtype(d) == Some(dtype))
}

/// A tensor whose elements lie one after another as a buffer of the device, without a copy.
pub(crate) fn buffer<R: CubeclRuntime>(
    device: &CubeDevice<R>,
    tensor: CubeTensor<R>,
    dtype: DType,
) -> Result<Resident<CubeBuffer>, DeviceError> {
    let tensor = burn_cubecl::kernel::into_contiguous(tensor);
    let shape: Vec<usize> = tensor.meta.shape().to_vec();
    let buffer = device.adopt(tensor.handle, dtype, shape.iter().product())?;
    Ok(Resident { buffer, shape })
}

/// A buffer as a tensor, without a copy. A scalar has one axis, since burn's tensors have at least one.
pub(crate) fn tensor<R: CubeclRuntime>(
    like: &CubeTensor<R>,
    resident: &Resident<CubeBuffer>,
    dtype: BurnDType,
) -> CubeTensor<R> {
    let shape = if resident.shape.is_empty() { vec![1] } else { resident.shape.clone() };
    let handle = resident.buffer.handle().clone();
    CubeTensor::new_contiguous(like.client.clone(), like.device.clone(), Shape::from(shape), handle, dtype)
}
