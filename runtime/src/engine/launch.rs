//! What a run launches, and on what.

use latentc_codegen::device::{self, Device, DeviceError};
use latentc_codegen::memory::Place;
use latentc_codegen::program::{Kernel, Program};
use latentc_ir::DType;

use super::{Engine, Where};

/// What launches kernels of a run: one, or several that may run at the same time.
pub type Launcher<'l, D> =
    &'l mut dyn FnMut(&mut D, &mut [Launch<'_, <D as Device>::Buffer>]) -> Result<(), DeviceError>;

/// A launch of a run.
#[derive(Debug)]
pub struct Launch<'a, B> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// Its place in [`Program::kernels`].
    pub number: usize,
    /// As [`Device::launch`] takes them.
    pub inputs: &'a [Option<&'a B>],
    /// Where each of them comes from.
    pub sources: &'a [Source],
    /// Where the result goes.
    pub output: &'a mut B,
    /// Whether the result takes the place of an input.
    pub in_place: bool,
    /// The run-time sizes.
    pub sizes: &'a [usize],
    /// As [`device::Launch`] has it.
    pub key: u64,
    /// As [`device::Launch`] has it.
    pub still: Option<u64>,
}

/// Where an input of a launch comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The checkpoint.
    Weight,
    /// Runs before this one.
    Cache,
    /// Whoever asked for this run.
    Argument,
    /// This run, which has made it, or the program's text.
    Run,
}

/// Launches kernels.
///
/// # Errors
/// Those of the device.
pub fn at_once<D: Device>(device: &mut D, launches: &mut [Launch<'_, D::Buffer>]) -> Result<(), DeviceError> {
    let plain = launches.iter_mut().map(|l| device::Launch {
        kernel: l.kernel,
        inputs: l.inputs,
        output: &mut *l.output,
        sizes: l.sizes,
        key: Some(l.key),
        still: l.still,
    });
    device.launch_together(plain.collect())
}

/// What a launch works on.
pub(super) struct Operands<B> {
    /// The kernel's.
    number: usize,
    inputs: Vec<Option<Where>>,
    /// Those of them that are temporaries.
    parts: Vec<Option<B>>,
    output: Where,
    out: B,
    sizes: Vec<usize>,
}

impl<D: Device> Engine<D> {
    /// What a launch works on. An output that is held is taken out of the heap.
    pub(super) fn operands(
        &mut self,
        program: &Program,
        number: usize,
        inputs: Vec<Where>,
        output: Where,
        sizes: Vec<usize>,
    ) -> Result<Operands<D::Buffer>, DeviceError> {
        // Of a kernel that appends, the first input is the output.
        let appends = program.kernels[number].cache().is_some();
        let inputs = inputs.into_iter().enumerate().map(|(n, at)| (n > 0 || !appends).then_some(at));
        let inputs: Vec<_> = inputs.collect();
        let mut parts = Vec::with_capacity(inputs.len());
        for at in &inputs {
            parts.push(match at {
                Some(Where::Planned(place, dtype, len)) => Some(self.part(*place, *dtype, *len)?),
                Some(Where::Held(_)) | None => None,
            });
        }
        let out = match output {
            Where::Held(slot) => self.heap[slot].take().expect("outputs are held"),
            Where::Planned(place, dtype, len) => self.part(place, dtype, len)?,
        };
        Ok(Operands { number, inputs, parts, output, out, sizes })
    }

    pub(super) fn launch(
        &mut self,
        (program, keys): (&Program, u64),
        mut ready: Vec<Operands<D::Buffer>>,
        launcher: Launcher<'_, D>,
    ) -> Result<(), DeviceError> {
        let begins = std::mem::take(&mut self.begins);
        let Engine { device, heap, sources, .. } = self;
        let source = |at: &Option<Where>| match at {
            Some(Where::Held(slot)) => sources[*slot],
            Some(Where::Planned(..)) | None => Source::Run,
        };
        let from: Vec<Vec<_>> = ready.iter().map(|o| o.inputs.iter().map(source).collect()).collect();
        let mut bound = Vec::with_capacity(ready.len());
        for Operands { number, inputs, parts, output, out, sizes } in &mut ready {
            let buffers = inputs.iter().zip(&*parts).map(|(at, part)| match at {
                Some(Where::Held(slot)) => heap[*slot].as_ref(),
                Some(Where::Planned(..)) | None => part.as_ref(),
            });
            let in_place = inputs.iter().flatten().any(|at| at.meets(*output));
            bound.push((*number, buffers.collect::<Vec<_>>(), out, in_place, &sizes[..]));
        }
        let launches =
            bound.iter_mut().zip(&from).map(|((number, inputs, output, in_place, sizes), from)| {
                let (kernel, number, in_place) = (&program.kernels[*number], *number, *in_place);
                let key = keys + number as u64;
                let weights = from.iter().take(64).enumerate().filter(|(_, of)| **of == Source::Weight);
                let still = weights.fold(0, |bits, (n, _)| bits | 1 << n);
                let still = (!begins).then_some(still);
                Launch { kernel, number, inputs, sources: from, output, in_place, sizes, key, still }
            });
        let done = launcher(device, &mut launches.collect::<Vec<_>>());
        for operands in ready {
            if let Where::Held(slot) = operands.output {
                heap[slot] = Some(operands.out);
            }
        }
        done
    }

    /// The temporary at a place of the plan.
    pub(super) fn part(&mut self, place: Place, dtype: DType, len: usize) -> Result<D::Buffer, DeviceError> {
        // SAFETY: a plan gives values that live at the same time places that share no byte, but where a result takes the place of
        // an operand of a kernel that may work so, on a device that allows it.
        unsafe { self.device.part(&self.pages[place.page].1, place.offset, dtype, len) }
    }
}
