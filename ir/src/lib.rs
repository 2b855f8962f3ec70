//! The intermediate representation of latentc.
//!
//! A program is a [`Module`] of [`Function`]s in SSA form over tensors with named axes. Ops are pure functions with
//! the one exception of [`Op::Append`], which leaves its result in a cache for the next run. An
//! instruction may run at any time after its operands, or not at all if nothing uses it.
//!
//! The crate knows no model, no device and no pass; it says what a program *is* ([`types`], [`ops`], [`graph`]), when it
//! is well formed ([`mod@infer`], [`mod@verify`]), what it means ([`interp`]), what it costs ([`mod@cost`]), and how
//! it is written down ([`mod@print`], [`mod@parse`], and JSON through serde).

mod canonical;
pub mod census;
mod chain;
pub mod coded;
pub mod cost;
mod cursor;
pub mod diag;
pub mod expand;
pub mod graph;
pub mod infer;
pub mod interp;
pub mod inventory;
pub mod json;
mod lex;
pub mod ops;
pub mod parse;
mod parse_inst;
pub mod poly;
pub mod print;
pub mod shrink;
pub mod sizes;
pub mod sparsity;
pub mod stored;
pub mod tensor;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(feature = "testing")]
mod testing_ops;
pub mod types;
pub mod verify;
mod verify_calls;
mod verify_weights;
pub mod work;

pub use census::{Census, census};
pub use coded::Coding;
pub use cost::{Cost, FunctionCost, cost};
pub use diag::ParseError;
pub use expand::expand;
pub use graph::{Def, Factor, Function, Held, Inst, Module, Origin, Stored, Value, ValueId, Weight};
pub use infer::{Want, infer};
pub use interp::{Caches, InterpError, Interpreter, Precision, WeightSource, scoped};
pub use inventory::{Inventory, StoredTensor, Use};
pub use ops::{Binary, Fields, Op, Pairs, Real, Reduce, Unary};
pub use parse::{check, parse};
pub use poly::Poly;
pub use shrink::Scale;
pub use sizes::Symbols;
pub use stored::{Layout, Part, Piece, Span, Tensors};
pub use tensor::{Mismatch, SplitMix, Tensor};
pub use types::{Axis, AxisId, DType, Size, Type};
pub use verify::{Stage, VerifyError, verify, verify_at};
pub use work::{Work, work};
