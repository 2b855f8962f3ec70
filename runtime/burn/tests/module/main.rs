//! Compiled models as modules of burn, on each backend that this machine has.
//!
//! For wgpu a graphics driver for the CPU is enough; `scripts/setup-lavapipe.sh` installs one. Tolerances are those of the reference
//! cases (`tests/tests/reference.rs`, `tests/tests/gradients.rs`).

#![allow(clippy::duplicate_mod, reason = "the same tests on each backend")]

mod example;

mod wgpu;

#[cfg(feature = "cuda")]
mod cuda;
