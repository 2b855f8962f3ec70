//! The model language of latentc.
//!
//! A model is written as the equations of its paper, in index notation:
//!
//! ```
//! use latentc_frontend::{DType, spec, trace};
//!
//! spec! {
//!     /// Attention with one head, as plain as can be.
//!     pub fn attention(width: usize)(h[t,d]) -> u[t,d] {
//!         axes { each b; t; s like t; d = width; k = width / 2 }
//!         weights {
//!             W_Q[k,d] = "q_proj.weight"[k, d];
//!             W_K[k,d] = "k_proj.weight"[k, d];
//!         }
//!         q[t,k] = W_Q[k,d] * h[t,d];
//!         cache k_[t,k] = W_K[k,d] * h[t,d];
//!         P[t,s] = softmax[s <= t](q[t,k] * k_[s,k] / sqrt(k))  @1;
//!         u[t,d] = P[t,s] * h[s,d]                              @2;
//!     }
//! }
//!
//! let traced = trace("toy", DType::Bf16, attention(64)).unwrap();
//! assert_eq!(traced.module.functions[0].name, "attention");
//! ```
//!
//! # What an index means
//! - A letter is an axis of `axes { … }`, with one size in the whole function. `d = rust` is known now, `t` at run
//!   time. `s like t` runs over the positions of the same sequence, so that reading a value of `t` at `s` reads the past.
//! - `each b` is carried by everything that is computed from inputs and is never written.
//! - An index that is not on the left is summed, within the one product whose factors share it; each term
//!   of a sum has its own. If only one factor has it, write `sum[c](…)`: a forgotten index is an error.
//! - An index only on the left is an error: nothing is broadcast in silence.
//! - A use renames by position, and sizes must agree.
//! - `f[p](…)` works along `p`; `softmax[s <= t]` sees what is not in the future; the functions are in [`stdlib`].
//! - `x[t, (g,j)]` reads one axis as two; `y[t, (g,j) as e]` on the left makes one of two.
//! - `W[tok[t], d]` reads at an index that is a value.
//! - An axis without brackets is its size, `{rust}` is a number, `x[t]: f32 = …` chooses a dtype.
//! - Rust's `if`, `for` and `let` may stand around equations. A name may be defined again with the same axes.
//! - `state f(rust);` states the equations of another function here, over the values that have its inputs' names.
//! - `cache` asserts that a value is what later tokens need to keep; it changes nothing.
//!
//! `spec!` only builds the syntax tree of [`expr`] and hands it to a [`Tracer`]; Rust code can do the same.

mod error;
pub mod expr;
mod frame;
mod index;
mod lower;
pub mod stdlib;
mod sum;
mod trace;

pub use error::{Diagnostic, SpecError};
pub use expr::{Name, Spot};
pub use latentc_ir::{DType, Module};
pub use latentc_macro::spec;
pub use trace::{Cached, SpecFn, Traced, Tracer, trace};
