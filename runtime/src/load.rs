//! Weights from a checkpoint into the memory of a device.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use half::{bf16, f16};
use latentc_codegen::device::{Data, Device, DeviceError, Floats, SharedFloats};
use latentc_ir::interp::scoped;
use latentc_ir::{Coding, Function, Layout, Module, Piece, Weight};
use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, CheckpointError, DType, ReadError};
use crate::places::Places;

/// Tensors of old checkpoints that hold no parameters and may be ignored.
const BUFFERS: [&str; 1] = [".rotary_emb.inv_freq"];

/// Why the weights of a model were not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The files are not right.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The files are right, but belong to another model. Every difference is listed.
    #[error("{}: the weights do not fit the configuration:\n{}", path.display(), problems.join("\n"))]
    Mismatch {
        /// The folder.
        path: PathBuf,
        /// One line for each tensor that is missing, too many or of another shape.
        problems: Vec<String>,
    },
    /// A tensor could not be read as floats.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The device has no room, or failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The program asks for something impossible of a checkpoint: a fault of the model's definition.
    #[error("the definition's weights make no sense: {0}")]
    Layout(String),
    /// Graphs that share a cache hold it in two ways.
    #[error(
        "the cache `{0}` has another form in a graph that was loaded before; compile both with the same --cache and --cache-page"
    )]
    Cache(String),
}

/// Compares a checkpoint with what a program reads of it.
///
/// # Errors
/// [`LoadError::Mismatch`] with all missing, superfluous and misshapen tensors, and those that hold no floats.
pub fn check(module: &Module, checkpoint: &Checkpoint) -> Result<(), LoadError> {
    let inventory = module.inventory().map_err(LoadError::Layout)?;
    let mut problems = Vec::new();
    let mut wanted = BTreeMap::new();
    for tensor in &inventory.tensors {
        wanted.insert(tensor.name.as_str(), ());
        match checkpoint.tensor(&tensor.name) {
            None => problems.push(format!("  missing: `{}` {:?}", tensor.name, tensor.shape)),
            Some(view) => {
                if !view.shape.iter().map(|&n| n as u64).eq(tensor.shape.iter().copied()) {
                    let (have, want) = (view.shape, &tensor.shape);
                    problems.push(format!(
                        "  misshapen: `{}` is {have:?}, the configuration wants {want:?}",
                        tensor.name
                    ));
                }
                if !matches!(view.dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
                    problems.push(format!(
                        "  wrong dtype: `{}` is {}, a weight must be a float",
                        tensor.name, view.dtype
                    ));
                }
            }
        }
    }
    for name in checkpoint.names() {
        if !wanted.contains_key(name) && !BUFFERS.iter().any(|b| name.ends_with(b)) {
            problems.push(format!("  superfluous: `{name}` is read by nothing in this configuration"));
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(LoadError::Mismatch { path: checkpoint.path().to_owned(), problems })
}

/// Brings a weight of a function called under `scope` into a device's memory. A weight that lies in files just as the program
/// wants it, tensor by tensor, is used where it is, if the device can. One that holds codes or scales is made of its elements here.
///
/// # Errors
/// If a tensor is missing or cannot be read, or the device has no room; [`check`] first.
pub fn load<D: Device>(
    device: &mut D,
    checkpoint: &Arc<Checkpoint>,
    scope: &str,
    function: &Function,
    weight: &Weight,
) -> Result<D::Buffer, LoadError> {
    let ty = function.ty(weight.value);
    let layout = weight.stored.layout(function, ty).map_err(LoadError::Layout)?;
    if let Some(coding) = weight.stored.coding(function, ty).map_err(LoadError::Layout)? {
        let held = match ty.dtype.is_float() {
            true => Data::F32(coded(checkpoint, scope, &layout, &coding, |x| x as f32)?),
            false => Data::I32(coded(checkpoint, scope, &layout, &coding, |x| x as i32)?),
        };
        return Ok(device.upload(ty.dtype, held)?);
    }
    let names = || layout.pieces.iter().map(|p| scoped(scope, &p.tensor)).collect();
    if layout.is_stack()
        && let Some(mapped) = Mapped::new(checkpoint, names())
        && let Some(buffer) = device.share(Arc::new(mapped))
    {
        return Ok(buffer);
    }
    let data = elements(checkpoint, scope, &layout)?;
    if let Some(narrow) = narrow(ty.dtype, &data)
        && let Some(buffer) = device.share(narrow)
    {
        return Ok(buffer);
    }
    Ok(device.upload(ty.dtype, Data::F32(data))?)
}

/// The elements of a weight.
fn elements(checkpoint: &Checkpoint, scope: &str, layout: &Layout) -> Result<Vec<f32>, LoadError> {
    let mut data = vec![0.0f32; layout.elements as usize];
    for piece in &layout.pieces {
        let view = checkpoint.require(&scoped(scope, &piece.tensor))?;
        if layout.is_identity() {
            view.read_f32(0, &mut data)?;
            continue;
        }
        let stored = view.to_f32()?;
        layout.load(piece, 1, &stored, &mut data).map_err(LoadError::Layout)?;
    }
    Ok(data)
}

/// Elements that a thread codes at once, about. Of a weight that lies in files as the program wants it, no more is ever there in full width.
const CODED: usize = 1 << 16;

/// What a weight holds in place of its elements.
fn coded<T: Copy + Default + Send>(
    checkpoint: &Checkpoint,
    scope: &str,
    layout: &Layout,
    coding: &Coding,
    of: impl Fn(f64) -> T + Sync,
) -> Result<Vec<T>, LoadError> {
    let (group, each) = (coding.group(), coding.each());
    let block = (CODED / group).max(1) * group;
    let mut held = vec![T::default(); layout.elements as usize / each];
    let code = |elements: &[f32], held: &mut [T]| {
        let elements: Vec<f64> = elements.iter().map(|&x| x.into()).collect();
        let made = coding.of(&elements, latentc_ir::DType::F32);
        held.iter_mut().zip(made).for_each(|(to, x)| *to = of(x));
    };
    if layout.is_stack() {
        // Groups do not reach from one tensor into the next.
        let stored = held.chunks_mut(layout.stored_elements() as usize / each);
        for (piece, held) in layout.pieces.iter().zip(stored) {
            let view = checkpoint.require(&scoped(scope, &piece.tensor))?;
            held.par_chunks_mut(block / each).enumerate().try_for_each(|(n, held)| {
                code(&view.slice_f32(n * block..n * block + held.len() * each)?, held);
                Ok::<_, ReadError>(())
            })?;
            checkpoint.forget(&scoped(scope, &piece.tensor));
        }
    } else {
        let elements = elements(checkpoint, scope, layout)?;
        let blocks = elements.par_chunks(block);
        held.par_chunks_mut(block / each).zip(blocks).for_each(|(held, elements)| code(elements, held));
        layout.pieces.iter().for_each(|piece| checkpoint.forget(&scoped(scope, &piece.tensor)));
    }
    Ok(held)
}

/// Brings a weight into a device's memory from stored tensors that lie at their places in `tensors`: it is used where it lies if nothing of it
/// must be moved and the device can.
///
/// # Errors
/// If a tensor is not there or of another length, or the device has no room.
pub(crate) fn lend<D: Device>(
    device: &mut D,
    tensors: &Arc<Vec<f32>>,
    places: &Places,
    scope: &str,
    layout: &Layout,
    dtype: latentc_ir::DType,
) -> Result<D::Buffer, LoadError> {
    let range = |piece: &Piece| {
        let name = scoped(scope, &piece.tensor);
        let placed = places.tensor(&name).filter(|placed| placed.range.end <= tensors.len());
        let placed = placed.ok_or_else(|| LoadError::Layout(format!("`{name}` was not given")))?;
        Ok::<_, LoadError>(placed.range.clone())
    };
    let ranges: Vec<_> = layout.pieces.iter().map(range).collect::<Result<_, _>>()?;
    let each = layout.elements as usize / layout.pieces.len().max(1);
    if layout.is_stack() && ranges.iter().all(|range| range.len() == each) {
        let lent = Lent { tensors: Arc::clone(tensors), pieces: ranges.clone() };
        if let Some(buffer) = device.share(Arc::new(lent)) {
            return Ok(buffer);
        }
    }
    let mut data = vec![0.0f32; layout.elements as usize];
    for (piece, range) in layout.pieces.iter().zip(ranges) {
        layout.load(piece, 1, &tensors[range], &mut data).map_err(LoadError::Layout)?;
    }
    Ok(device.upload(dtype, Data::F32(data))?)
}

/// Parts of an array, equally long.
#[derive(Debug)]
pub(crate) struct Lent {
    pub(crate) tensors: Arc<Vec<f32>>,
    pub(crate) pieces: Vec<Range<usize>>,
}

impl SharedFloats for Lent {
    fn pieces(&self) -> usize {
        self.pieces.len()
    }

    fn piece(&self, n: usize) -> Floats<'_> {
        Floats::F32(&self.tensors[self.pieces[n].clone()])
    }
}

/// Tensors that stay in their mapped files.
struct Mapped {
    checkpoint: Arc<Checkpoint>,
    /// Each is there, and all are of the type of the first.
    names: Vec<String>,
}

impl Mapped {
    /// `None` if a tensor is not there, its bytes are no floats of this machine's as they lie, or two are of different types.
    fn new(checkpoint: &Arc<Checkpoint>, names: Vec<String>) -> Option<Mapped> {
        let mut all = names.iter().map(|name| floats(checkpoint, name));
        let first = std::mem::discriminant(&all.next()??);
        let alike = all.all(|f| f.is_some_and(|f| std::mem::discriminant(&f) == first));
        alike.then(|| Mapped { checkpoint: Arc::clone(checkpoint), names })
    }
}

/// Floats in the 16 bits of their type; `None` if that has more, or some would lose by it: a model may compute in a narrower type
/// than its file has, and this machine need not round.
fn narrow(dtype: latentc_ir::DType, data: &[f32]) -> Option<Arc<dyn SharedFloats>> {
    use latentc_ir::DType;
    let keeps = |back: fn(f32) -> f32| data.iter().all(|&x| x.to_bits() == back(x).to_bits());
    match dtype {
        DType::Bf16 if keeps(|x| bf16::from_f32(x).to_f32()) => {
            Some(Arc::new(data.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()))
        }
        DType::F16 if keeps(|x| f16::from_f32(x).to_f32()) => {
            Some(Arc::new(data.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>()))
        }
        DType::F64 | DType::F32 | DType::Bf16 | DType::F16 | DType::I32 | DType::Bool => None,
    }
}

/// A tensor's elements where they lie.
fn floats<'a>(checkpoint: &'a Checkpoint, name: &str) -> Option<Floats<'a>> {
    let view = checkpoint.tensor(name)?;
    if !cfg!(target_endian = "little") {
        return None;
    }
    Some(match view.dtype {
        DType::F32 => Floats::F32(bytemuck::try_cast_slice(view.bytes).ok()?),
        DType::BF16 => Floats::Bf16(bytemuck::try_cast_slice::<u8, bf16>(view.bytes).ok()?),
        DType::F16 => Floats::F16(bytemuck::try_cast_slice::<u8, f16>(view.bytes).ok()?),
        _ => return None,
    })
}

impl SharedFloats for Mapped {
    fn pieces(&self) -> usize {
        self.names.len()
    }

    fn piece(&self, n: usize) -> Floats<'_> {
        floats(&self.checkpoint, &self.names[n]).unwrap_or(Floats::F32(&[]))
    }
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapped({})", self.names.join(", "))
    }
}
