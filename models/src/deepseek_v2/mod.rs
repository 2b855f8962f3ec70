//! DeepSeek-V2 and V2-Lite: arXiv 2405.04434, in its naive form, equation for equation.

pub mod attention;
pub mod balance;
pub mod dropping;
pub mod model;
pub mod moe;

pub use attention::mla;
pub use balance::objective;
pub use model::{dense_layer, moe_layer, trunk};
pub use moe::moe;
