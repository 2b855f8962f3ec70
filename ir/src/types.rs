//! What a value is: a dtype and an ordered list of named axes.
//!
//! An axis belongs to a function (its *axis table*) and has one size there, fixed or symbolic. Two
//! operands of an op mean the same index when they carry the same axis, so nothing is ever matched
//! by position or by size. The order of axes in a type is the order in memory, slowest first; no op
//! but those that read memory cares.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE binary64; the interpreter's oracle runs everything in it.
    F64,
    /// IEEE binary32.
    F32,
    /// bfloat16: the exponent of f32, 8 bits of significand.
    Bf16,
    /// IEEE binary16.
    F16,
    /// Signed 32-bit integer: token ids, positions, indices.
    I32,
    /// True or false; one byte in memory.
    Bool,
}

impl DType {
    /// Every dtype, in declaration order.
    pub const ALL: [DType; 6] = [DType::F64, DType::F32, DType::Bf16, DType::F16, DType::I32, DType::Bool];

    /// The name in the text format, such as `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F64 => "f64",
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::I32 => "i32",
            DType::Bool => "bool",
        }
    }

    /// The dtype of that name.
    pub fn from_name(name: &str) -> Option<DType> {
        Self::ALL.into_iter().find(|d| d.name() == name)
    }

    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            DType::F64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::Bool => 1,
        }
    }

    /// Whether values are real numbers.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F64 | DType::F32 | DType::Bf16 | DType::F16)
    }

    /// The float that holds every value of both, or `None` if either is no float. bf16 and f16 meet in f32.
    pub fn promote(self, other: DType) -> Option<DType> {
        if !self.is_float() || !other.is_float() {
            return None;
        }
        Some(match (self, other) {
            (a, b) if a == b => a,
            (DType::F64, _) | (_, DType::F64) => DType::F64,
            _ => DType::F32,
        })
    }

    /// The nearest value of this dtype, as f64 (ties to even). Integers truncate towards zero and
    /// saturate; bool is 1 for everything but 0.
    pub fn round(self, x: f64) -> f64 {
        match self {
            DType::F64 => x,
            DType::F32 => f64::from(x as f32),
            DType::Bf16 => half::bf16::from_f64(x).to_f64(),
            DType::F16 => half::f16::from_f64(x).to_f64(),
            DType::I32 => f64::from(x as i32),
            DType::Bool => f64::from(u8::from(x != 0.0)),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The extent of an axis: known when the model is, or a symbol bound at run time.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Size {
    /// Known from the configuration.
    Fixed(u64),
    /// A run-time size such as the batch `b`; equal symbols are equal sizes across the whole module.
    Sym(String),
}

impl Size {
    /// The number, if it is known.
    pub fn fixed(&self) -> Option<u64> {
        match self {
            Size::Fixed(n) => Some(*n),
            Size::Sym(_) => None,
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Size::Fixed(n) => write!(f, "{n}"),
            Size::Sym(s) => f.write_str(s),
        }
    }
}

impl From<u64> for Size {
    fn from(n: u64) -> Self {
        Size::Fixed(n)
    }
}

impl From<&str> for Size {
    fn from(s: &str) -> Self {
        Size::Sym(s.to_owned())
    }
}

/// An axis of one function: an index into [`Function::axes`](crate::Function::axes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AxisId(pub u32);

/// A row of a function's axis table.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Axis {
    /// The letter that the author gave it; unique in the function.
    pub name: String,
    /// Its extent.
    pub size: Size,
    /// `s like t`: this axis runs over the positions of the sequence that `t` runs over. Reading
    /// a value of `t` at `s` is reading the past ([`Op::Past`](crate::Op::Past)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub like: Option<AxisId>,
}

/// The type of a value: `bf16[b, t, n=128]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Type {
    /// The element type.
    pub dtype: DType,
    /// The axes in memory order, slowest first; no axis occurs twice.
    pub axes: Vec<AxisId>,
}

impl Type {
    /// A type from its parts.
    pub fn new(dtype: DType, axes: impl Into<Vec<AxisId>>) -> Type {
        Type { dtype, axes: axes.into() }
    }

    /// A single element.
    pub fn scalar(dtype: DType) -> Type {
        Type { dtype, axes: Vec::new() }
    }

    /// Whether the axis is one of this type's.
    pub fn has(&self, axis: AxisId) -> bool {
        self.axes.contains(&axis)
    }

    /// Where the axis stands in memory order.
    pub fn position(&self, axis: AxisId) -> Option<usize> {
        self.axes.iter().position(|&a| a == axis)
    }

    /// Whether both hold the same elements, in any memory order.
    pub fn same_elements(&self, other: &Type) -> bool {
        self.dtype == other.dtype
            && self.axes.len() == other.axes.len()
            && self.axes.iter().all(|&a| other.has(a))
    }
}
