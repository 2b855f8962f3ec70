//! What training needs to go on, in files: `model.safetensors` as any reader of the model wants it, and `optimizer.safetensors` beside.
//!
//! The second holds `m.NAME` and `v.NAME` in f32 for each tensor NAME of the first, and `p.NAME`, the parameters themselves, where the
//! first holds them in a narrower type.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::{Checkpoint, CheckpointError, DType, TensorSpec, write_checkpoint, write_each};
use crate::init::{SHARD, encode};
use crate::load::LoadError;
use crate::optimizer::State;
use crate::places::Places;

/// The file beside the model's.
pub const OPTIMIZER: &str = "optimizer.safetensors";

/// Writes both files into a folder, the model's tensors with elements of `dtype`, a float.
///
/// # Errors
/// If they cannot be written.
pub fn write(folder: &Path, places: &Places, state: &State, dtype: DType) -> Result<(), CheckpointError> {
    let spec = |name: String, dtype, shape: &[usize]| TensorSpec { name, dtype, shape: shape.to_vec() };
    let model: Vec<_> = places.tensors().iter().map(|t| spec(t.name.clone(), dtype, &t.shape)).collect();
    let bytes = |data: &[f32], spec: &TensorSpec, name: &str| {
        let place = places.tensor(name).map_or(0..0, |t| t.range.clone());
        let data = &data[place];
        let mut bytes = vec![0; data.len() * spec.dtype.bytes()];
        encode(spec.dtype, &mut bytes, |i| f64::from(data[i]));
        Ok::<_, CheckpointError>(Cow::Owned(bytes))
    };
    write_checkpoint(folder, &model, SHARD, |spec| bytes(&state.p, spec, &spec.name))?;

    let mut parts: Vec<(&str, &[f32])> = vec![("m.", &state.m), ("v.", &state.v)];
    if dtype != DType::F32 {
        parts.push(("p.", &state.p));
    }
    let named = |prefix: &&str| {
        let prefix = (*prefix).to_owned();
        places.tensors().iter().map(move |t| spec(format!("{prefix}{}", t.name), DType::F32, &t.shape))
    };
    let specs: Vec<_> = parts.iter().flat_map(|(prefix, _)| named(prefix)).collect();
    let about = BTreeMap::from([("steps".to_owned(), state.steps.to_string())]);
    write_each(&folder.join(OPTIMIZER), &specs, &about, |spec| {
        let part = parts.iter().find_map(|(prefix, data)| Some((spec.name.strip_prefix(prefix)?, *data)));
        let (name, data) = part.unwrap_or(("", &[]));
        bytes(data, spec, name)
    })
}

/// Reads what [`write`] wrote after so many steps.
///
/// # Errors
/// If a file is not there, is damaged, or belongs to another model.
pub fn read(folder: &Path, places: &Places, steps: u32) -> Result<State, LoadError> {
    let beside = Checkpoint::open(folder.join(OPTIMIZER))?;
    let model = Checkpoint::open(folder)?;
    let wide = beside.names().any(|name| name.starts_with("p."));
    Ok(State {
        p: Arc::new(if wide { places.read(&beside, "p.")? } else { places.read(&model, "")? }),
        m: Arc::new(places.read(&beside, "m.")?),
        v: Arc::new(places.read(&beside, "v.")?),
        steps,
    })
}
