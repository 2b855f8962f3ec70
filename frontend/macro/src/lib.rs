//! The spec! equation block.
