//! Writing tensors: whole or not at all, one tensor in memory at a time.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, json};

use super::error::CheckpointError;
use super::header::Header;
use super::tensor::DType;
use super::{INDEX, SINGLE};

/// A tensor that is to be written: all but its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name, once in a checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Sizes of the axes, the last one contiguous; empty for a scalar.
    pub shape: Vec<usize>,
}

/// Writes one safetensors file of the `tensors` (name, element type, shape, little-endian bytes).
///
/// The file appears under its name when it is complete and on disk. One that was there before stays as it
/// was until then.
///
/// # Errors
/// [`CheckpointError::Spec`] if a name occurs twice or bytes do not fit their shape, [`CheckpointError::Write`].
pub fn write_tensors<'a>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (&'a str, DType, &'a [usize], &'a [u8])>,
    metadata: &BTreeMap<String, String>,
) -> Result<(), CheckpointError> {
    let path = path.as_ref();
    let (specs, bytes): (Vec<_>, Vec<_>) = tensors
        .into_iter()
        .map(|(name, dtype, shape, bytes)| {
            (TensorSpec { name: name.into(), dtype, shape: shape.into() }, (name, bytes))
        })
        .unzip();
    let bytes: BTreeMap<&str, &[u8]> = bytes.into_iter().collect();
    write_each(path, &specs, metadata, |spec| Ok(Cow::Borrowed(bytes[spec.name.as_str()])))
}

/// As [`write_tensors`], with `bytes_of` asked for the little-endian bytes of each tensor once, so that no more than one need be in
/// memory.
///
/// # Errors
/// Those of `bytes_of`, and those of [`write_tensors`].
pub fn write_each<'a, E: From<CheckpointError>>(
    path: &Path,
    tensors: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
    mut bytes_of: impl FnMut(&TensorSpec) -> Result<Cow<'a, [u8]>, E>,
) -> Result<(), E> {
    let sizes = check_specs(path, tensors)?;
    let all: Vec<_> = tensors.iter().zip(sizes).collect();
    Ok(write_file(path, &all, metadata, &mut bytes_of)?.publish()?)
}

/// Writes a checkpoint into `folder`, which is made if need be: `model.safetensors`, or shards of at most
/// `max_shard_bytes` (a larger tensor has a shard of its own) with their index.
///
/// `bytes_of` is asked for the little-endian bytes of each tensor once, so that no more than one need be in
/// memory. The files appear under their names when all are complete and on disk, the index last.
///
/// # Errors
/// Those of `bytes_of`, and those of [`write_tensors`].
pub fn write_checkpoint<'a, E: From<CheckpointError>>(
    folder: impl AsRef<Path>,
    tensors: &[TensorSpec],
    max_shard_bytes: usize,
    mut bytes_of: impl FnMut(&TensorSpec) -> Result<Cow<'a, [u8]>, E>,
) -> Result<(), E> {
    let folder = folder.as_ref();
    fs::create_dir_all(folder).map_err(|e| write_error(folder, "the folder itself", e))?;
    let sizes = check_specs(&folder.join(SINGLE), tensors)?;
    let shards = split(tensors, &sizes, max_shard_bytes);
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);

    let (mut files, mut weight_map) = (Vec::new(), Map::new());
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => SINGLE.to_string(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        files.push(write_file(&folder.join(&name), shard, &metadata, &mut bytes_of)?);
        weight_map.extend(shard.iter().map(|(spec, _)| (spec.name.clone(), json!(name))));
    }
    if shards.len() > 1 {
        let index =
            json!({"metadata": {"total_size": sizes.iter().sum::<usize>()}, "weight_map": weight_map});
        let mut file = NewFile::create(&folder.join(INDEX))?;
        file.put(format!("{index:#}\n").as_bytes())?;
        files.push(file);
    }
    let sharded = files.len() > 1;
    for file in files {
        file.publish()?;
    }
    if sharded {
        // An older checkpoint in one file would be read instead of the index.
        match fs::remove_file(folder.join(SINGLE)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(write_error(folder, SINGLE, e).into());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Bytes of each tensor, if they can be counted and every name is there once.
fn check_specs(file: &Path, tensors: &[TensorSpec]) -> Result<Vec<usize>, CheckpointError> {
    let mut seen = BTreeSet::from(["__metadata__"]);
    let mut total = 0usize;
    let sizes = tensors.iter().map(|spec| {
        let bad = |what| CheckpointError::Spec { file: file.into(), tensor: spec.name.clone(), what };
        if !seen.insert(&spec.name) {
            return Err(bad("a tensor of this name is written already, or the format reserves it".into()));
        }
        let size = spec.dtype.bytes_of(&spec.shape);
        total = size.and_then(|n| total.checked_add(n)).ok_or_else(|| {
            bad(format!("{}{:?} takes more bytes than can be counted", spec.dtype, spec.shape))
        })?;
        Ok(size.unwrap_or(0))
    });
    sizes.collect()
}

type Shard<'s> = Vec<(&'s TensorSpec, usize)>;

/// Fills one shard after the other, in the order given. There is at least one shard.
fn split<'s>(tensors: &'s [TensorSpec], sizes: &[usize], max_bytes: usize) -> Vec<Shard<'s>> {
    let (mut shards, mut filled) = (vec![Vec::new()], 0);
    for (spec, &size) in tensors.iter().zip(sizes) {
        if filled > 0 && filled + size > max_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += size;
        let last = shards.len() - 1;
        shards[last].push((spec, size));
    }
    shards
}

/// Writes a file under a temporary name.
fn write_file<'a, E: From<CheckpointError>>(
    path: &Path,
    tensors: &[(&TensorSpec, usize)],
    metadata: &BTreeMap<String, String>,
    bytes_of: &mut impl FnMut(&TensorSpec) -> Result<Cow<'a, [u8]>, E>,
) -> Result<NewFile, E> {
    // Wide elements first: then each lies at a multiple of its size.
    let mut order = tensors.to_vec();
    order.sort_by_key(|(spec, _)| std::cmp::Reverse(spec.dtype.bytes()));

    let mut file = NewFile::create(path)?;
    let entries = order.iter().map(|(spec, _)| (spec.name.as_str(), spec.dtype, &spec.shape[..]));
    file.put(&Header::write(entries, metadata))?;
    for (spec, size) in order {
        let bytes = bytes_of(spec)?;
        if bytes.len() != size {
            let what =
                format!("{}{:?} takes {size} bytes, but {} were given", spec.dtype, spec.shape, bytes.len());
            return Err(CheckpointError::Spec { file: path.into(), tensor: spec.name.clone(), what }.into());
        }
        file.put(&bytes)?;
    }
    file.finish()?;
    Ok(file)
}

/// A file under a temporary name beside its place. Dropped before it is published, it is removed.
struct NewFile {
    /// `None` once the file is complete.
    out: Option<BufWriter<File>>,
    temporary: PathBuf,
    path: PathBuf,
}

impl NewFile {
    fn create(path: &Path) -> Result<Self, CheckpointError> {
        // Two writers, in one process or in two, never meet in a temporary file.
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = path.with_file_name(format!(".{name}.{}-{number}.tmp", std::process::id()));
        let file = File::create(&temporary).map_err(|e| write_error_at(path, e))?;
        Ok(NewFile { out: Some(BufWriter::new(file)), temporary, path: path.into() })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        let Some(out) = &mut self.out else { return Ok(()) };
        out.write_all(bytes).map_err(|e| write_error_at(&self.path, e))
    }

    /// Waits until the bytes are on disk. A checkpoint of many shards then holds none of them open.
    fn finish(&mut self) -> Result<(), CheckpointError> {
        let Some(out) = self.out.take() else { return Ok(()) };
        let done = out.into_inner().map_err(io::IntoInnerError::into_error).and_then(|file| file.sync_all());
        done.map_err(|e| write_error_at(&self.path, e))
    }

    /// Gives the file its name.
    fn publish(mut self) -> Result<(), CheckpointError> {
        self.finish()?;
        fs::rename(&self.temporary, &self.path).map_err(|e| write_error_at(&self.path, e))?;
        // The name is on disk once the folder is. Not every file system can be asked for that.
        let _ = File::open(folder_of(&self.path)).and_then(|folder| folder.sync_all());
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // After a rename there is nothing of this name, and that is as well.
        let _ = fs::remove_file(&self.temporary);
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

fn write_error_at(path: &Path, source: io::Error) -> CheckpointError {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    write_error(folder_of(path), &name, source)
}

fn write_error(folder: &Path, what: &str, source: io::Error) -> CheckpointError {
    CheckpointError::Write { folder: folder.into(), what: what.into(), source }
}
