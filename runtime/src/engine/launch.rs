//! What a run launches, and on what.

use latentc_codegen::device::{self, Device, DeviceError};
use latentc_codegen::memory::Place;
use latentc_codegen::program::Kernel;
use latentc_ir::DType;
use smallvec::SmallVec;

use super::laid::{At, LaidLaunch};
use super::{Engine, Ready};

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
    let mut plain = launches.iter_mut().map(|l| device::Launch {
        kernel: l.kernel,
        inputs: l.inputs,
        output: &mut *l.output,
        sizes: l.sizes,
        key: Some(l.key),
        still: l.still,
    });
    device.launch_together(&mut plain)
}

/// Inputs of a launch, and sizes: few have more, and those have them on the heap.
type Few<T> = SmallVec<[T; 10]>;

/// What a launch makes and brings along for itself.
struct Operands<B> {
    /// The inputs that are temporaries.
    parts: Few<Option<B>>,
    /// An output that is held is out of the heap meanwhile.
    out: B,
    sizes: Few<usize>,
}

impl<D: Device> Engine<D> {
    /// Does all launches of a run.
    pub(super) fn launch_all(&mut self, ready: &Ready, launcher: Launcher<'_, D>) -> Result<(), DeviceError> {
        ready.laid.groups().try_for_each(|group| self.launch(ready, group, launcher))
    }

    fn launch(
        &mut self,
        ready: &Ready,
        group: &[LaidLaunch],
        launcher: Launcher<'_, D>,
    ) -> Result<(), DeviceError> {
        let begins = std::mem::take(&mut self.begins);
        let mut all: SmallVec<[Operands<D::Buffer>; 4]> = SmallVec::new();
        for laid in group {
            let mut parts = Few::new();
            for at in &laid.inputs {
                parts.push(at.as_ref().map(|at| self.temporary(ready, at)).transpose()?.flatten());
            }
            let out = match self.temporary(ready, &laid.output)? {
                Some(part) => part,
                None => self.slot(&laid.output).and_then(Option::take).expect("outputs are held"),
            };
            all.push(Operands {
                parts,
                out,
                sizes: laid.sizes.iter().map(|&s| ready.sizes.get(s)).collect(),
            });
        }
        let Engine { device, heap, .. } = self;
        let bound = group.iter().zip(&mut all).map(|(laid, Operands { parts, out, sizes })| {
            let buffers = laid.inputs.iter().zip(&*parts).map(|(at, part)| match at {
                Some(At::Held(slot)) => heap[*slot].as_ref(),
                Some(At::Planned(..)) | None => part.as_ref(),
            });
            (laid, buffers.collect::<Few<_>>(), out, &sizes[..])
        });
        let mut bound: SmallVec<[_; 4]> = bound.collect();
        let launches = bound.iter_mut().map(|(laid, inputs, output, sizes)| Launch {
            kernel: &ready.program.kernels[laid.kernel],
            number: laid.kernel,
            inputs,
            sources: &laid.sources,
            output,
            in_place: laid.in_place,
            sizes,
            key: ready.keys + laid.kernel as u64,
            still: (!begins).then_some(laid.still),
        });
        let done = launcher(device, &mut launches.collect::<SmallVec<[_; 4]>>());
        drop(bound);
        for (laid, operands) in group.iter().zip(all) {
            if let Some(slot) = self.slot(&laid.output) {
                *slot = Some(operands.out);
            }
        }
        done
    }

    /// The place of the heap where something is held.
    fn slot(&mut self, at: &At) -> Option<&mut Option<D::Buffer>> {
        match at {
            At::Held(slot) => Some(&mut self.heap[*slot]),
            At::Planned(..) => None,
        }
    }

    /// The temporary that lies there; `None` if it is held.
    fn temporary(&mut self, ready: &Ready, at: &At) -> Result<Option<D::Buffer>, DeviceError> {
        match at {
            At::Held(_) => Ok(None),
            At::Planned(place, dtype, dims) => {
                let len = dims.iter().map(|&d| ready.sizes.get(d)).product();
                self.part(*place, *dtype, len).map(Some)
            }
        }
    }

    /// The temporary at a place of the plan.
    pub(super) fn part(&mut self, place: Place, dtype: DType, len: usize) -> Result<D::Buffer, DeviceError> {
        // SAFETY: a plan gives values that live at the same time places that share no byte, but where a result takes the place of
        // an operand of a kernel that may work so, on a device that allows it.
        unsafe { self.device.part(&self.pages[place.page].1, place.offset, dtype, len) }
    }
}
