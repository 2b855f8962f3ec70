//! Kernels through CubeCL: CUDA C++ and WGSL from one description, and the devices that run them.
//!
//! A kernel's body is lowered to CubeCL's representation, not to text: `map`, `contract` and their like say which unit computes what,
//! `expr` how an element follows from the parameters, `emit` writes the instructions. [`cuda_source`] prints a kernel with
//! no device at hand; a [`CubeDevice`] runs it. A kernel may be several launches: see `stages`.
//!
//! What a kernel cannot see for itself is left to the host: an index of a `gather` outside of its axis reads 0 here, and one of a
//! `scatter_add` or a position of an `append` that lies outside writes nothing. The runtime checks token ids before it uploads them.

mod bulk;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "without CUDA nothing is compiled here"))]
mod codes;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "without CUDA nothing is compiled here"))]
mod compiler;
mod contract;
mod device;
#[cfg(feature = "cuda")]
mod driver;
mod edits;
mod emit;
mod epilogue;
mod expr;
mod feed;
mod few;
mod fragment;
mod kernel;
mod launching;
mod machine;
mod map;
mod matrix;
mod moves;
mod overlap;
mod prepared;
mod preparer;
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "without CUDA no driver is called directly"))]
mod queue;
mod resident;
mod scatter;
mod scatter_matrix;
mod shape;
mod sort;
mod source;
mod split;
mod stages;
mod stream;
mod stream_matrix;
mod sums;
mod target;
mod tiles;
mod tuning;
mod warpgroup;
mod ways;

pub(crate) use bulk::{Seen, of_launch as maps_of};
pub use codes::{CACHE, OFF};
#[cfg(feature = "cuda")]
pub use device::CudaDevice;
#[cfg(feature = "wgpu")]
pub use device::WgpuDevice;
pub(crate) use device::launch_info;
pub use device::{CubeArena, CubeBuffer, CubeDevice, CubeRuntime};
pub use edits::Edits;
pub(crate) use kernel::CubeIr;
pub use machine::Machine;
pub use moves::{Bytes, Moves, moves};
pub(crate) use overlap::{WAIT, early_of};
pub use shape::{Cubes, LaunchShape};
pub(crate) use shape::{Grid, in_one_grid};
#[cfg(feature = "wgpu")]
pub use source::wgsl_source;
pub(crate) use source::written;
pub use source::{
    Source, cuda_source, cuda_sources, cuda_together_source, identities, identity, is_expressible, sources,
    together_name,
};
pub(crate) use split::{Role, SHARED, Split};
pub(crate) use stages::{Kept, Operand, Stages};
pub use target::Target;
pub(crate) use tuning::Choices;
pub use tuning::{Chosen, Tuning, Way, choose, class};
pub use ways::{chosen, side_by_side, taken, typical, ways};
pub(crate) use ways::{joins, way};

use crate::device::DeviceError;
use crate::program::Kernel;

pub(crate) fn refuse(kernel: &Kernel, why: impl Into<String>) -> DeviceError {
    DeviceError::Kernel { kernel: kernel.name.clone(), why: why.into() }
}
