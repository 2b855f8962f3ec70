//! Weights on disk: safetensors files, one by one or as the shards of a checkpoint.
//!
//! Files are mapped into memory, so a tensor's bytes are read when they are looked at and a model larger than
//! memory can be opened. Nothing in a file is believed before it is checked: a header that lies is an error
//! that names the tensor, never a panic. What is written appears under its name complete or not at all.

mod error;
mod file;
mod header;
mod tensor;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

pub use error::{CheckpointError, ReadError};
pub use file::TensorFile;
pub use tensor::{DType, TensorView};
pub use write::{TensorSpec, write_checkpoint, write_each, write_tensors};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The weights of a model: `model.safetensors`, or shards and their index.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<TensorFile>,
    /// Which file has the tensor.
    place: BTreeMap<String, usize>,
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `path`, or a single safetensors file.
    ///
    /// A folder that has both forms is read as transformers reads it: `model.safetensors` wins.
    ///
    /// # Errors
    /// A [`CheckpointError`] if there is no checkpoint, if a file of it is missing, cut short or contradicts
    /// itself, or if index and shards disagree.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        let (single, index) = (path.join(SINGLE), path.join(INDEX));
        let kind =
            std::fs::metadata(path).map_err(|source| CheckpointError::Read { file: path.into(), source })?;
        if kind.is_file() {
            Self::from_files(path, vec![TensorFile::open(path)?])
        } else if single.exists() {
            Self::from_files(path, vec![TensorFile::open(single)?])
        } else if index.exists() {
            Self::from_index(path, &index)
        } else {
            Err(CheckpointError::None { path: path.into() })
        }
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.place.keys().map(String::as_str)
    }

    /// A tensor, `None` if there is none of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.files[*self.place.get(name)?].tensor(name)
    }

    /// Lets the system have the memory of a tensor again: see [`TensorFile::forget`].
    pub fn forget(&self, name: &str) {
        if let Some(&file) = self.place.get(name) {
            self.files[file].forget(name);
        }
    }

    /// A tensor.
    ///
    /// # Errors
    /// [`CheckpointError::NoTensor`] if there is none of this name.
    pub fn require(&self, name: &str) -> Result<TensorView<'_>, CheckpointError> {
        self.tensor(name)
            .ok_or_else(|| CheckpointError::NoTensor { path: self.path.clone(), tensor: name.into() })
    }

    fn from_files(path: &Path, files: Vec<TensorFile>) -> Result<Self, CheckpointError> {
        let mut place = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for name in file.names() {
                if let Some(first) = place.insert(name.to_string(), number) {
                    return Err(CheckpointError::Twice {
                        tensor: name.into(),
                        first: files[first].path().into(),
                        second: file.path().into(),
                    });
                }
            }
        }
        Ok(Checkpoint { path: path.into(), files, place })
    }

    fn from_index(folder: &Path, index: &Path) -> Result<Self, CheckpointError> {
        let bad = |what: String| CheckpointError::Index { file: index.into(), what };
        let text = std::fs::read_to_string(index)
            .map_err(|source| CheckpointError::Read { file: index.into(), source })?;
        let json: Value = serde_json::from_str(&text).map_err(|e| bad(format!("not JSON: {e}")))?;
        let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
            return Err(bad("has no object `weight_map` from tensor names to files".into()));
        };

        let mut shard_of = BTreeMap::new();
        for (tensor, shard) in map {
            // An index comes from elsewhere; it may only speak of the files beside it.
            let name = shard.as_str().filter(|s| Path::new(s).file_name().is_some_and(|f| f == *s));
            let name = name.ok_or_else(|| {
                bad(format!("`{tensor}` is said to be in {shard}, which is not the name of a file beside it"))
            })?;
            shard_of.insert(tensor.as_str(), name);
        }
        let shards: BTreeSet<&str> = shard_of.values().copied().collect();
        let missing: Vec<&str> = shards.iter().copied().filter(|s| !folder.join(s).exists()).collect();
        if !missing.is_empty() {
            let (there, all) = (shards.len() - missing.len(), shards.len());
            let text = missing.join(", ");
            return Err(bad(format!("only {there} of {all} shards are in its folder; missing: {text}")));
        }
        let files: Result<Vec<_>, _> = shards.iter().map(|s| TensorFile::open(folder.join(s))).collect();
        let checkpoint = Self::from_files(folder, files?)?;
        for (tensor, shard) in shard_of {
            match checkpoint.tensor(tensor) {
                Some(view) if view.file() == folder.join(shard) => {}
                Some(view) => {
                    let found = view.file().display();
                    return Err(bad(format!("`{tensor}` is said to be in {shard}, but is in {found}")));
                }
                None => return Err(bad(format!("`{tensor}` is said to be in {shard}, but is not there"))),
            }
        }
        Ok(checkpoint)
    }
}

#[cfg(test)]
mod tests;
