//! One tensor in a mapped file: type, shape, bytes, and its elements as numbers.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use half::{bf16, f16};

use super::error::ReadError;

/// The element types that are read and written. Elements lie little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE double precision.
    F64,
    /// IEEE single precision.
    F32,
    /// The upper half of single precision.
    BF16,
    /// IEEE half precision.
    F16,
    /// Signed, eight bytes.
    I64,
    /// Signed, four bytes.
    I32,
    /// Unsigned, one byte.
    U8,
    /// One byte, 0 or 1.
    Bool,
}

impl DType {
    /// Every element type.
    pub const ALL: [DType; 8] =
        [DType::F64, DType::F32, DType::BF16, DType::F16, DType::I64, DType::I32, DType::U8, DType::Bool];

    /// Size of an element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::U8 | DType::Bool => 1,
        }
    }

    /// The name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            DType::F64 => "F64",
            DType::F32 => "F32",
            DType::BF16 => "BF16",
            DType::F16 => "F16",
            DType::I64 => "I64",
            DType::I32 => "I32",
            DType::U8 => "U8",
            DType::Bool => "BOOL",
        }
    }

    /// The element type of that name in a safetensors header.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|d| d.name() == name)
    }

    pub(super) fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// Bytes of a tensor of this type, `None` where the number does not fit.
    pub(super) fn bytes_of(self, shape: &[usize]) -> Option<usize> {
        shape.iter().try_fold(self.bytes(), |n, size| n.checked_mul(*size))
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name().to_lowercase())
    }
}

/// A tensor as it lies in a file, row by row.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Element type.
    pub dtype: DType,
    /// Sizes of the axes, the last one contiguous; empty for a scalar.
    pub shape: &'a [usize],
    /// The elements, little-endian.
    pub bytes: &'a [u8],
    pub(super) name: &'a str,
    pub(super) file: &'a Path,
}

/// Decodes the elements of `$bytes`, each `$n` bytes, into `$out` one after another.
macro_rules! decode {
    ($out:expr, $bytes:expr, $from:ty, $n:literal, $to:expr) => {
        for (slot, element) in $out.iter_mut().zip($bytes.as_chunks::<$n>().0) {
            *slot = $to(<$from>::from_le_bytes(*element));
        }
    };
}

impl<'a> TensorView<'a> {
    /// The tensor's name.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// The file it lies in.
    pub fn file(&self) -> &'a Path {
        self.file
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.bytes.len() / self.dtype.bytes()
    }

    /// Decodes `out.len()` elements from element `offset` on; f64 is rounded.
    ///
    /// # Errors
    /// A [`ReadError`] if the tensor does not hold floats, or ends before.
    pub fn read_f32(&self, offset: usize, out: &mut [f32]) -> Result<(), ReadError> {
        let bytes = self.part(offset, out.len())?;
        match self.dtype {
            DType::F32 => decode!(out, bytes, f32, 4, |x| x),
            DType::BF16 => decode!(out, bytes, bf16, 2, bf16::to_f32),
            DType::F16 => decode!(out, bytes, f16, 2, f16::to_f32),
            DType::F64 => decode!(out, bytes, f64, 8, |x| x as f32),
            DType::I64 | DType::I32 | DType::U8 | DType::Bool => return Err(self.not("floats")),
        }
        Ok(())
    }

    /// The elements `range` as f32; see [`TensorView::read_f32`].
    ///
    /// # Errors
    /// As there.
    pub fn slice_f32(&self, range: Range<usize>) -> Result<Vec<f32>, ReadError> {
        // The check comes before the allocation: a wrong range must not ask for all memory.
        let len = range.end.saturating_sub(range.start);
        self.part(range.start, len)?;
        let mut out = vec![0.0; len];
        self.read_f32(range.start, &mut out)?;
        Ok(out)
    }

    /// All elements as f32; see [`TensorView::read_f32`].
    ///
    /// # Errors
    /// As there.
    pub fn to_f32(&self) -> Result<Vec<f32>, ReadError> {
        self.slice_f32(0..self.elements())
    }

    /// All elements as f64, exactly.
    ///
    /// # Errors
    /// A [`ReadError`] if the tensor does not hold floats.
    pub fn to_f64(&self) -> Result<Vec<f64>, ReadError> {
        let mut out = vec![0.0; self.elements()];
        match self.dtype {
            DType::F64 => decode!(out, self.bytes, f64, 8, |x| x),
            DType::F32 => decode!(out, self.bytes, f32, 4, f64::from),
            DType::BF16 => decode!(out, self.bytes, bf16, 2, bf16::to_f64),
            DType::F16 => decode!(out, self.bytes, f16, 2, f16::to_f64),
            DType::I64 | DType::I32 | DType::U8 | DType::Bool => return Err(self.not("floats")),
        }
        Ok(out)
    }

    /// All elements as i64; true is 1.
    ///
    /// # Errors
    /// A [`ReadError`] if the tensor does not hold integers or truth values.
    pub fn to_i64(&self) -> Result<Vec<i64>, ReadError> {
        let mut out = vec![0; self.elements()];
        match self.dtype {
            DType::I64 => decode!(out, self.bytes, i64, 8, |x| x),
            DType::I32 => decode!(out, self.bytes, i32, 4, i64::from),
            DType::U8 => decode!(out, self.bytes, u8, 1, i64::from),
            DType::Bool => decode!(out, self.bytes, u8, 1, |x| i64::from(x != 0)),
            DType::F64 | DType::F32 | DType::BF16 | DType::F16 => return Err(self.not("integers")),
        }
        Ok(out)
    }

    /// The bytes of `len` elements from element `offset` on.
    fn part(&self, offset: usize, len: usize) -> Result<&'a [u8], ReadError> {
        let end = offset.checked_add(len).filter(|end| *end <= self.elements());
        let end = end.ok_or_else(|| {
            self.wrong(format!(
                "{len} elements were asked for from element {offset} on, but it has {}",
                self.elements()
            ))
        })?;
        Ok(&self.bytes[offset * self.dtype.bytes()..end * self.dtype.bytes()])
    }

    fn not(&self, wanted: &str) -> ReadError {
        self.wrong(format!("its elements were asked for as {wanted}, which they are not"))
    }

    fn wrong(&self, what: String) -> ReadError {
        ReadError {
            file: self.file.into(),
            tensor: self.name.into(),
            dtype: self.dtype,
            shape: self.shape.into(),
            what,
        }
    }
}
