//! One safetensors file, mapped into memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;

use super::error::CheckpointError;
use super::header::{Header, Refusal};
use super::tensor::TensorView;

/// A safetensors file whose header was checked.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    header: Header,
}

impl TensorFile {
    /// Maps the file and checks its header against its length.
    ///
    /// # Errors
    /// [`CheckpointError::Read`], [`CheckpointError::Malformed`] and [`CheckpointError::UnsupportedDType`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, CheckpointError> {
        let path = path.into();
        let map = Self::map(&path).map_err(|source| CheckpointError::Read { file: path.clone(), source })?;
        match Header::parse(&map) {
            Ok(header) => Ok(TensorFile { path, map, header }),
            Err(Refusal::Malformed(what)) => Err(CheckpointError::Malformed { file: path, what }),
            Err(Refusal::UnsupportedDType { tensor, dtype }) => {
                Err(CheckpointError::UnsupportedDType { file: path, tensor, dtype })
            }
        }
    }

    fn map(path: &Path) -> std::io::Result<Mmap> {
        let file = File::open(path)?;
        // SAFETY: the map is read-only, and its bytes are only ever decoded, so that another program that
        // writes the file meanwhile can change numbers but not break a type. Our own writer never changes
        // a file in place: it renames a new one over it, and this map keeps the old one.
        unsafe { Mmap::map(&file) }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says of itself (`__metadata__`).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// A tensor, `None` if there is none of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, entry) = self.header.tensors.get_key_value(name)?;
        Some(TensorView {
            dtype: entry.dtype,
            shape: &entry.shape,
            // The header was checked against the length of the map.
            bytes: &self.map[entry.bytes.clone()],
            name,
            file: &self.path,
        })
    }

    /// Lets the system have the memory of a tensor again, which has been read. Who reads it once more has it read from the file.
    pub fn forget(&self, name: &str) {
        #[cfg(unix)]
        if let Some(entry) = self.header.tensors.get(name) {
            let bytes = &entry.bytes;
            // A system that keeps it loses room, no more.
            // SAFETY: nobody writes to the map, so that what is read again is what the file has.
            let _ = unsafe {
                self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, bytes.start, bytes.len())
            };
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
}
