//! How elements are held in each language that kernels are written in.
//!
//! | dtype | CUDA C++ | WGSL | in a register |
//! |---|---|---|---|
//! | f32 | f32 | f32 | f32 |
//! | bf16, f16 | as they are | f32: WGSL has no bf16, so nothing is lost, and nothing is saved | f32 |
//! | i32 | i32 | i32 | i32 |
//! | bool | u8, 0 or 1 | u32, 0 or 1: WGSL has no bytes | bool |
//! | f64 | none | none | none |
//!
//! A kernel computes in f32. What it stores is rounded to the dtype once; what it keeps in registers is not, but for an
//! explicit `cast`, which rounds to the dtype on CUDA. In WGSL, floats are f32 throughout.

use std::fmt;

use latentc_ir::DType;

use super::device::{decode, encode};
use super::emit::Elem;
use crate::device::Data;
use crate::memory::Layout;

/// A language that kernels are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// For NVRTC.
    Cuda,
    /// For any graphics driver, through wgpu.
    Wgsl,
}

impl Target {
    /// The type of an element in memory, if there is one.
    pub(crate) fn stored(self, dtype: DType) -> Option<Elem> {
        match (dtype, self) {
            (DType::F32, _) | (DType::Bf16 | DType::F16, Target::Wgsl) => Some(Elem::F32),
            (DType::Bf16, Target::Cuda) => Some(Elem::Bf16),
            (DType::F16, Target::Cuda) => Some(Elem::F16),
            (DType::I32, _) => Some(Elem::I32),
            (DType::Bool, Target::Cuda) => Some(Elem::U8),
            (DType::Bool, Target::Wgsl) => Some(Elem::U32),
            (DType::F64, _) => None,
        }
    }

    /// How temporaries lie in memory, as devices commonly want them: they may tell otherwise.
    pub fn layout(self) -> Layout {
        let (align, bytes): (u64, fn(DType) -> u64) = match self {
            Target::Cuda => (512, |d| Target::Cuda.bytes(d).unwrap_or(8) as u64),
            Target::Wgsl => (256, |d| Target::Wgsl.bytes(d).unwrap_or(8) as u64),
        };
        Layout { align, page: 1 << 62, bytes, kept: bytes, in_place: true }
    }

    /// Bytes of one element in memory, if the dtype can be held.
    pub fn bytes(self, dtype: DType) -> Option<usize> {
        self.stored(dtype).map(Elem::bytes)
    }

    /// Elements as they lie in memory, or `None` if the dtype cannot be held or they come as the wrong kind of numbers.
    pub(crate) fn encode(self, dtype: DType, data: &Data) -> Option<Vec<u8>> {
        encode(self.stored(dtype)?, data)
    }

    /// The first `len` elements in these bytes, or as many as there are; `None` if the dtype cannot be held.
    pub(crate) fn decode(self, dtype: DType, bytes: &[u8], len: usize) -> Option<Data> {
        Some(decode(self.stored(dtype)?, bytes, len))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Target::Cuda => "CUDA C++",
            Target::Wgsl => "WGSL",
        })
    }
}

/// The type of an element in a register.
pub(crate) fn register(dtype: DType) -> Elem {
    match dtype {
        DType::F64 | DType::F32 | DType::Bf16 | DType::F16 => Elem::F32,
        DType::I32 => Elem::I32,
        DType::Bool => Elem::Bool,
    }
}
