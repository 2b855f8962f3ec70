//! Launches on a device of CubeCL: checked, and run on their buffers.

use std::sync::Arc;

use latentc_ir::{DType, ValueId};

use super::device::{CubeBuffer, CubeDevice, CubeRuntime};
use super::prepared::{Halves, Prepared, Staged};
use super::queue::When;
use super::refuse;
use super::stages::Operand;
use crate::device::{Device, DeviceError, Launch};
use crate::program::Kernel;

/// A checked launch that does something.
pub(super) struct Ready<'a> {
    /// In the order of the kernel's arguments, the output last.
    pub(super) buffers: Vec<&'a CubeBuffer>,
    /// Whether it was not launched in that way before.
    pub(super) first: bool,
    /// As [`Launch`] has it.
    pub(super) still: Option<u64>,
}

impl<R: CubeRuntime> CubeDevice<R> {
    /// Checks a launch, and finds out what it comes to. `None` if there is nothing to do.
    pub(super) fn ready<'a>(
        &mut self,
        launch: Launch<'a, CubeBuffer>,
    ) -> Result<Option<(Ready<'a>, Arc<Prepared>)>, DeviceError> {
        let Launch { kernel, inputs, output, sizes, key, still } = launch;
        let (prepared, first) = self.preparer.prepared(kernel, inputs.len(), sizes, key)?;
        if prepared.grid.0 == 0 {
            return Ok(None);
        }
        let mut buffers = Vec::with_capacity(inputs.len() + 1);
        for ((wanted, input), &param) in prepared.inputs.iter().zip(inputs).zip(&kernel.body.params) {
            match (wanted, input) {
                (Some(wanted), Some(buffer)) => {
                    fits(kernel, (param, *wanted), buffer)?;
                    buffers.push(*buffer);
                }
                (Some(_), None) => return Err(refuse(kernel, "an input is missing")),
                (None, None) => {}
                (None, Some(_)) => {
                    return Err(refuse(kernel, "a cache is given as the output, not as an input"));
                }
            }
        }
        fits(kernel, (kernel.body.results[0], prepared.output), output)?;
        buffers.push(output);
        Ok(Some((Ready { buffers, first, still }, prepared)))
    }

    /// Several launches with memory of the device in between.
    pub(super) fn run_stages(
        &mut self,
        staged: &Staged,
        launch: &Ready<'_>,
        when: When,
    ) -> Result<(), DeviceError> {
        let buffers = &launch.buffers;
        let kept = staged.kept.iter().map(|&(dtype, len)| self.alloc(dtype, len));
        let kept = kept.collect::<Result<Vec<_>, _>>()?;
        for (grid, operands) in &staged.grids {
            let at = |operand: &Operand| match *operand {
                Operand::Param(n) => buffers[n],
                Operand::Kept(n) => &kept[n],
                Operand::Output => buffers[buffers.len() - 1],
            };
            self.enqueue(grid, operands.iter().map(at), when)?;
        }
        Ok(())
    }

    /// A streamed softmax as two launches.
    pub(super) fn run_halves(
        &mut self,
        halves: &Halves,
        launch: &Ready<'_>,
        when: When,
    ) -> Result<(), DeviceError> {
        // Launches of one thread follow one another on the device, so all of them can have the same memory in between.
        let here = std::thread::current().id();
        let kept = match self.between.take() {
            Some((thread, kept)) if thread == here && kept.len() >= halves.scratch => kept,
            _ => self.alloc(DType::F32, halves.scratch)?,
        };
        let [(part, reads), (merge, merges)] = &halves.grids;
        let given = |numbers: &'_ [usize]| numbers.iter().map(|&n| launch.buffers[n]).collect::<Vec<_>>();
        self.enqueue(part, given(reads).into_iter().chain([&kept]), when)?;
        let merged = given(merges).into_iter().chain([&kept]).chain(launch.buffers.last().copied());
        self.enqueue(merge, merged, when)?;
        self.between = Some((here, kept));
        Ok(())
    }
}

/// Whether a buffer can stand for a value of the body, which has so many elements.
fn fits(
    kernel: &Kernel,
    (value, (dtype, len)): (ValueId, (DType, usize)),
    buffer: &CubeBuffer,
) -> Result<(), DeviceError> {
    if dtype != buffer.dtype() || len > buffer.len() {
        let given = format!("{} of {}", buffer.len(), buffer.dtype());
        let name = &kernel.body.value(value).name;
        return Err(refuse(kernel, format!("`{name}` has {len} elements of {dtype}, the buffer {given}")));
    }
    Ok(())
}
