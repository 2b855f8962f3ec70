//! A compiled program with its memory: what it runs on, what it reads, what it remembers.

pub mod bench;
pub mod checkpoint;
pub mod chunks;
pub mod compiled;
pub mod engine;
pub mod eval;
pub mod generate;
pub mod gradient;
pub mod init;
pub mod load;
pub mod optimizer;
mod pages;
pub mod places;
pub mod session;
pub mod train;
