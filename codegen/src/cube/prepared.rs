//! What launches come to, found out once.
//!
//! Which way to take, how many cubes, what may share a grid: to answer that takes longer than a short kernel runs, and in a model of
//! equal layers the answers are the same from layer to layer. They depend on kernels and sizes alone, not on buffers. So a launch
//! that says which kernel it has ([`key`](crate::device::Launch::key)) is looked up.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use cubecl_core::server::MetadataBindingInfo;
use latentc_ir::DType;

use super::bulk;
use super::device::{Launches, launch_info};
use super::kernel::CubeIr;
use super::queue::{Function, Queue, When};
use super::shape::Grid;
use super::stages::Operand;
use crate::device::Remembered;
use crate::program::KernelKind;

/// Grids that are remembered. With a past that grows, there are new ones for each token.
const GRIDS: usize = 1024;

/// A grid that is ready to be launched on buffers.
pub(super) struct OneGrid {
    pub(super) ir: CubeIr,
    pub(super) grid: Grid,
    /// As of [`launch_info`].
    info: (Vec<u64>, usize),
    /// How the device sees the buffers that it copies by itself.
    pub(super) maps: Vec<bulk::Seen>,
    /// What a driver has of it.
    function: OnceLock<Arc<Function>>,
}

impl OneGrid {
    /// Of a kernel with these run-time sizes, on buffers of so many elements.
    pub(super) fn new(ir: CubeIr, grid: Grid, sizes: &[usize], lens: &[usize]) -> OneGrid {
        let MetadataBindingInfo { data, dynamic_metadata_offset } = launch_info(sizes, lens);
        let maps = ir.maps(sizes);
        OneGrid { ir, grid, maps, info: (data, dynamic_metadata_offset), function: OnceLock::new() }
    }

    /// What a launch hands over besides its buffers, as words.
    pub(super) fn words(&self) -> &[u64] {
        &self.info.0
    }

    /// The name of its kernel, or of the first of those side by side.
    pub(super) fn name(&self) -> &str {
        &self.ir.first().name
    }

    /// What the driver behind a queue has of it. A grid belongs to one device.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn function(&self, queue: &mut dyn Queue) -> Result<&Arc<Function>, String> {
        match self.function.get() {
            Some(known) => Ok(known),
            None => {
                let function = queue.function(&self.ir)?;
                Ok(self.function.get_or_init(|| function))
            }
        }
    }

    /// What a launch hands over besides its buffers.
    pub(super) fn info(&self) -> MetadataBindingInfo {
        MetadataBindingInfo::new(self.info.0.clone(), self.info.1)
    }
}

/// A kernel at some sizes.
pub(super) struct Prepared {
    pub(super) name: Arc<str>,
    pub(super) sizes: Vec<usize>,
    pub(super) kind: KernelKind,
    pub(super) launches: Arc<Launches>,
    /// Of the first stage; mostly there is no other. No cubes if there is nothing to do.
    pub(super) grid: Grid,
    /// For each parameter, the dtype and the elements that a buffer must have; none for a cache that is written in place.
    pub(super) inputs: Vec<Option<(DType, usize)>>,
    pub(super) output: (DType, usize),
    /// If it comes to several launches, what these are.
    pub(super) several: Option<Several>,
    /// The parameters that may be read before the grids ahead are done; none if that cannot be told.
    pub(super) early: Option<Vec<usize>>,
}

/// The launches of a kernel that comes to more than one.
pub(super) enum Several {
    /// Of a streamed softmax.
    Halves(Box<Halves>),
    /// Of a kernel whose way has stages.
    Staged(Staged),
}

/// A kernel in stages.
pub(super) struct Staged {
    /// What lies between them: the elements of each.
    pub(super) kept: Vec<(DType, usize)>,
    /// Each with what it reads, and in the end what it writes. Stages with nothing to do are not among them.
    pub(super) grids: Vec<(OneGrid, Vec<Operand>)>,
}

/// A streamed softmax as two launches.
pub(super) struct Halves {
    /// Floats that lie between them.
    pub(super) scratch: usize,
    /// Each with the buffers of the kernel that it reads.
    pub(super) grids: [(OneGrid, Vec<usize>); 2],
}

impl Prepared {
    /// When its grids may begin, given the parameters that no launch of a run writes.
    pub(super) fn when(&self, still: Option<u64>) -> When {
        let stays = |still: u64| {
            let stays = |&n: &usize| n < 64 && still >> n & 1 == 1;
            self.early.as_ref().is_some_and(|early| early.iter().all(stays))
        };
        match still {
            None => When::Alone,
            Some(still) if stays(still) => When::Early,
            Some(_) => When::InOrder,
        }
    }

    /// Elements of the buffers that it is given, the output last.
    pub(super) fn lens(&self) -> impl Iterator<Item = usize> + '_ {
        let inputs = self.inputs.iter().flatten();
        inputs.chain([&self.output]).map(|&(_, len)| len)
    }
}

/// What several launches come to.
pub(super) struct Arranged {
    /// What they are of, so that none of these makes room for another at its place in memory.
    of: Vec<Arc<Prepared>>,
    /// Each with the numbers of those that are in it.
    pub(super) grids: Vec<(Vec<usize>, Does)>,
}

/// How a part of several launches is run.
pub(super) enum Does {
    /// As one grid.
    Grid(OneGrid),
    /// As more than one, each of one launch.
    More,
}

impl Arranged {
    pub(super) fn new(of: Vec<Arc<Prepared>>, grids: Vec<(Vec<usize>, Does)>) -> Arranged {
        Arranged { of, grids }
    }
}

/// What is remembered.
#[derive(Default)]
pub(super) struct Memory {
    pub(super) kernels: Remembered<Prepared>,
    grids: HashMap<Vec<usize>, Arc<Arranged>>,
}

impl Memory {
    /// What these come to.
    pub(super) fn arranged(&self, of: &[Arc<Prepared>]) -> Option<Arc<Arranged>> {
        self.grids.get(&places(of)).cloned()
    }

    /// Remembers it.
    pub(super) fn keep_arranged(&mut self, arranged: &Arc<Arranged>) {
        if self.grids.len() >= GRIDS {
            self.grids.clear();
        }
        self.grids.insert(places(&arranged.of), Arc::clone(arranged));
    }
}

/// Where they lie, which tells them apart as long as all of them are there.
fn places(of: &[Arc<Prepared>]) -> Vec<usize> {
    of.iter().map(|p| Arc::as_ptr(p).addr()).collect()
}
