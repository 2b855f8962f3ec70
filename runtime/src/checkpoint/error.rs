//! What can be wrong with weights on disk.

use std::io;
use std::path::PathBuf;

use super::tensor::DType;

/// Why a checkpoint, or one file of tensors, was not read or not written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The folder holds no weights.
    #[error("{}: no model.safetensors and no model.safetensors.index.json here; give a folder that holds weights", path.display())]
    None {
        /// The folder.
        path: PathBuf,
    },
    /// The system did not let the file be read.
    #[error("{}: cannot read: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file is not what a safetensors file must be.
    #[error("{}: {what}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// The two facts that disagree.
        what: String,
    },
    /// The element type is none of those in [`DType`].
    #[error("{}: tensor `{tensor}` has dtype {dtype}; supported: {}", file.display(), DType::names())]
    UnsupportedDType {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The element type as the file spells it.
        dtype: String,
    },
    /// The index of a sharded checkpoint contradicts itself or its shards.
    #[error("{}: {what}", file.display())]
    Index {
        /// The index.
        file: PathBuf,
        /// The two facts that disagree.
        what: String,
    },
    /// Two shards hold a tensor of the same name.
    #[error("tensor `{tensor}` is in {} and in {}; a checkpoint holds a tensor once", first.display(), second.display())]
    Twice {
        /// The tensor.
        tensor: String,
        /// One of the files.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// There is no tensor of that name.
    #[error("{}: no tensor `{tensor}` here", path.display())]
    NoTensor {
        /// The checkpoint or file.
        path: PathBuf,
        /// The name asked for.
        tensor: String,
    },
    /// The elements of a tensor were asked for as something that they are not.
    #[error(transparent)]
    Elements(#[from] ReadError),
    /// What is to be written contradicts itself.
    #[error("cannot write tensor `{tensor}` to {}: {what}", file.display())]
    Spec {
        /// Where it was to be written.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The two facts that disagree.
        what: String,
    },
    /// The system did not let the file be written.
    #[error("{}: cannot write {what}: {source}", folder.display())]
    Write {
        /// The folder that was written in.
        folder: PathBuf,
        /// The file in it.
        what: String,
        /// What the system says.
        source: io::Error,
    },
}

/// Why the elements of a tensor were not converted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: tensor `{tensor}`, {dtype}{shape:?}: {what}", file.display())]
pub struct ReadError {
    /// The file.
    pub file: PathBuf,
    /// The tensor.
    pub tensor: String,
    /// Its element type.
    pub dtype: DType,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What was asked of it and cannot be had.
    pub what: String,
}
