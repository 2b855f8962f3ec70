//! runtime

pub mod checkpoint;
