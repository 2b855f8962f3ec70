//! What a model runs on.

use std::sync::Arc;

use clap::ValueEnum;
use latentc_codegen::cube::{self, CudaDevice, WgpuDevice};
use latentc_codegen::device::Device;
use latentc_codegen::host::{self, Host};
use latentc_codegen::memory::Layout;
use serde::{Deserialize, Serialize};

use crate::edits::Texts;
use crate::tuning::Tuned;

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

    /// The language of its kernels; the host runs the IR.
    pub(crate) fn language(self) -> Option<cube::Target> {
        match self {
            Target::Host => None,
            Target::Wgpu => Some(cube::Target::Wgsl),
            Target::Cuda => Some(cube::Target::Cuda),
        }
    }

    /// What the names of files with its kernels end with.
    pub(crate) fn ending(self) -> &'static str {
        match self {
            Target::Host => "ir",
            Target::Wgpu => "wgsl",
            Target::Cuda => "cu",
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
    with_texts(target, &Texts::default(), &Tuned::default(), job)
}

/// A job whose device was looked at first.
struct Announced<'t, J> {
    tuned: &'t Tuned,
    job: J,
}

impl<J: Job> Job for Announced<'_, J> {
    fn on<D: Device>(self, mut device: D) -> anyhow::Result<()> {
        self.tuned.announce(&device);
        device.take_ways(Arc::clone(&self.tuned.tuning));
        self.job.on(device)
    }
}

/// The same, where kernels have the texts that were changed, and are computed in the ways that were chosen; says what of that was used.
pub(crate) fn with_texts(target: Target, texts: &Texts, tuned: &Tuned, job: impl Job) -> anyhow::Result<()> {
    texts.announce();
    let job = Announced { tuned, job };
    let edits = Arc::clone(&texts.edits);
    match target {
        Target::Host => job.on(Host::with_this_thread()),
        Target::Wgpu => job.on(WgpuDevice::open()?.with_edits(edits)),
        Target::Cuda => job.on(CudaDevice::open(0)?.with_edits(edits)),
    }?;
    texts.warn_of_unused();
    tuned.say();
    Ok(())
}
