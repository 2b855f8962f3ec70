//! What a model runs on.

use clap::ValueEnum;
use latentc_codegen::cube::{self, CudaDevice, WgpuDevice};
use latentc_codegen::device::Device;
use latentc_codegen::host::{self, Host};
use latentc_codegen::memory::Layout;
use serde::{Deserialize, Serialize};

/// A machine, or the language of its kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Target {
    /// The CPU.
    Host,
    /// Any graphics driver, through wgpu.
    Wgpu,
    /// An NVIDIA GPU.
    Cuda,
}

impl Target {
    /// How its memory is laid out.
    pub(crate) fn layout(self) -> Layout {
        match self {
            Target::Host => host::LAYOUT,
            Target::Cuda => cube::Target::Cuda.layout(),
            Target::Wgpu => cube::Target::Wgsl.layout(),
        }
    }

    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Target::Host => "host",
            Target::Wgpu => "wgpu",
            Target::Cuda => "cuda",
        }
    }
}

/// Work that any device can do.
pub(crate) trait Job {
    /// Does it.
    fn on<D: Device>(self, device: D) -> anyhow::Result<()>;
}

/// Opens the target's device and does the work there.
pub(crate) fn with_device(target: Target, job: impl Job) -> anyhow::Result<()> {
    match target {
        Target::Host => job.on(Host::with_this_thread()),
        Target::Wgpu => job.on(WgpuDevice::open()?),
        Target::Cuda => job.on(CudaDevice::open(0)?),
    }
}
