//! models

pub mod config;
