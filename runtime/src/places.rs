//! All tensors of a checkpoint in one array, one behind the other: parameters, their gradients and moments as an optimiser works on
//! them, in a few launches whatever their number.

use std::ops::Range;

use latentc_ir::Module;
use rayon::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::load::LoadError;

/// The array is cut into rows of so many elements: sums of squares go row by row, so that a long sum in f32 loses little.
pub const COLUMNS: usize = 1024;

/// Where each stored tensor lies in the array.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Sorted by name.
    tensors: Vec<Placed>,
    len: usize,
}

/// A stored tensor and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its extents, slowest first.
    pub shape: Vec<usize>,
    /// Its elements in the array.
    pub range: Range<usize>,
}

impl Places {
    /// Of all tensors that a definition reads, in the order of their names.
    ///
    /// # Errors
    /// [`LoadError::Layout`] if its weights contradict each other.
    pub fn of(definition: &Module) -> Result<Places, LoadError> {
        let inventory = definition.inventory().map_err(LoadError::Layout)?;
        let mut tensors: Vec<_> = inventory.tensors.iter().map(|t| (t.name.clone(), &t.shape)).collect();
        tensors.sort();
        let mut end = 0;
        let place = |(name, shape): (String, &Vec<u64>)| {
            let shape: Vec<usize> = shape.iter().map(|&n| n as usize).collect();
            let start = end;
            end += shape.iter().product::<usize>();
            Placed { name, shape, range: start..end }
        };
        let tensors = tensors.into_iter().map(place).collect();
        Ok(Places { tensors, len: end.next_multiple_of(COLUMNS) })
    }

    /// The length of the array: whole rows, the last of which ends with zeros.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The tensors in the order of their names.
    pub fn tensors(&self) -> &[Placed] {
        &self.tensors
    }

    /// A tensor, `None` if there is none of this name.
    pub fn tensor(&self, name: &str) -> Option<&Placed> {
        let n = self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok()?;
        Some(&self.tensors[n])
    }

    /// The array with each tensor's elements from a checkpoint, where its name follows `prefix`.
    ///
    /// # Errors
    /// If a tensor is not there, has another shape or cannot be read as floats.
    pub fn read(&self, checkpoint: &Checkpoint, prefix: &str) -> Result<Vec<f32>, LoadError> {
        let mut data = zeros(self.len);
        for t in &self.tensors {
            let view = checkpoint.require(&format!("{prefix}{}", t.name))?;
            if view.shape != t.shape {
                let problems =
                    vec![format!("  misshapen: `{}` is {:?}, not {:?}", view.name(), view.shape, t.shape)];
                return Err(LoadError::Mismatch { path: checkpoint.path().to_owned(), problems });
            }
            view.read_f32(0, &mut data[t.range.clone()])?;
        }
        Ok(data)
    }
}

/// So many zeros, written by all threads. The system finds memory page by page when it is touched: where zeros were only promised, the first
/// step of a training would touch each page twice, to read it and to write it, and one thread would wait for all of that.
pub(crate) fn zeros(len: usize) -> Vec<f32> {
    rayon::iter::repeat_n(0.0, len).collect()
}
