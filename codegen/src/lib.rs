//! From a graph to running code.
//!
//! `schedule` turns a module into a [`program::Program`]: launches of kernels over buffers. A [`device::Device`] runs kernels: the
//! [`host`] with threads of this machine, [`cube`] with any CubeCL runtime, [`emulate`] with CUDA text and a C++ compiler. All
//! read the same kernels, [`check`] compares what they make of them with what they mean, and nothing here knows a model.

pub mod check;
pub mod coded;
pub mod contract;
pub mod cube;
pub mod device;
pub mod digest;
pub mod emulate;
pub mod few;
mod fuse;
pub mod grouped;
pub mod host;
pub mod joined;
pub mod machine_code;
pub mod map;
pub mod memory;
pub mod nvrtc;
pub mod pieces;
pub mod program;
pub mod scatter;
pub mod schedule;
pub mod stream;
pub mod together;
pub mod traffic;
