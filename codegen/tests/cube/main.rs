//! Kernels on a CubeCL device against the interpreter, and their CUDA text through NVIDIA's compilers.
//!
//! Without a graphics driver or the CUDA wheels, the parts that need them are skipped, and say so
//! (`scripts/setup-lavapipe.sh`, `scripts/setup-cuda.sh`).

#![cfg(all(feature = "wgpu", feature = "cuda"))]

mod bench;
mod bulk;
mod codes;
mod contract;
mod count;
mod emulate;
mod epilogue;
mod few;
mod fused;
mod groups;
mod limits;
mod map;
mod matrix;
mod moves;
mod random;
mod resident;
mod rows;
mod scatter;
mod scatter_matrix;
mod stream;
mod stream_groups;
mod stream_matrix;
#[path = "../common/streams.rs"]
mod streams;
mod text;
mod tf32;
mod together;
