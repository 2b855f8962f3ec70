//! From a graph to running code.
//!
//! `schedule` turns a module into a [`program::Program`]: launches of kernels over buffers. A [`device::Device`] runs kernels: the
//! [`host`] with threads of this machine, [`cube`] with any CubeCL runtime. Both read the same
//! kernels, and nothing here knows a model.

pub mod contract;
pub mod cube;
pub mod device;
pub mod grouped;
pub mod host;
pub mod map;
pub mod nvrtc;
pub mod program;
pub mod scatter;
pub mod schedule;
