//! On CUDA.

#[path = "suite.rs"]
mod suite;

use burn_cuda::{Cuda, CudaDevice};
use latentc_codegen::device::DeviceError;

type B = Cuda;

fn open() -> Result<CudaDevice, DeviceError> {
    latentc_codegen::cube::CudaDevice::open(0).map(|_| CudaDevice::new(0))
}
