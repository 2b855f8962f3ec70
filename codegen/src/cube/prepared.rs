//! What launches come to, found out once.
//!
//! Which way to take, how many cubes, what may share a grid: to answer that takes longer than a short kernel runs, and in a model of
//! equal layers the answers are the same from layer to layer. They depend on kernels and sizes alone, not on buffers. So a launch
//! that says which kernel it has ([`key`](crate::device::Launch::key)) is looked up.
//!
//! Most of the answers do not even depend on sizes, but on the way alone: [`Launches`], and the text of kernels side by side. In decode the
//! past is longer with each token; what is found out anew then is how many cubes and elements there are.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use cubecl_core::server::MetadataBindingInfo;
use latentc_ir::DType;

use super::bulk;
use super::device::launch_info;
use super::kernel::CubeIr;
use super::queue::{Function, Queue, When};
use super::shape::{Grid, LaunchShape};
use super::stages::{Kept, Operand, Stage};
use crate::device::Remembered;
use crate::program::{Kernel, KernelKind};

/// Grids that are remembered. With a past that grows, there are new ones for each token.
const GRIDS: usize = 1024;

/// A kernel as a device is given it, at any sizes.
pub(super) struct Entry {
    pub(super) ir: CubeIr,
    /// Operands that the device copies by itself.
    maps: Vec<bulk::Map>,
    /// What a driver has of it.
    function: OnceLock<Arc<Function>>,
}

impl Entry {
    pub(super) fn new(ir: CubeIr) -> Arc<Entry> {
        Arc::new(Entry { maps: ir.maps(), ir, function: OnceLock::new() })
    }

    /// What the driver behind a queue has of it. It belongs to one device.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn function(&self, queue: &mut dyn Queue) -> Result<&Arc<Function>, String> {
        let Entry { ir, function, .. } = self;
        match function.get() {
            Some(known) => Ok(known),
            None => {
                let new = queue.function(ir)?;
                Ok(function.get_or_init(|| new))
            }
        }
    }
}

/// What a kernel in one of its ways comes to at any sizes.
pub(super) struct Launches {
    pub(super) name: Arc<str>,
    pub(super) kind: KernelKind,
    /// What lies between its stages.
    pub(super) kept: Vec<Kept>,
    /// Each with its kernel for the device and how that is launched; mostly one.
    pub(super) stages: Vec<(Stage, Arc<Entry>, LaunchShape)>,
    /// Of a stream, the two that it can be split into.
    pub(super) halves: Option<[Half; 2]>,
    /// The parameters that may be read before the grids ahead are done; none if that cannot be told.
    pub(super) early: Option<Vec<usize>>,
}

impl Launches {
    /// All that they may launch.
    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        let halves = self.halves.iter().flatten().map(|half| &*half.entry);
        self.stages.iter().map(|(_, entry, _)| &**entry).chain(halves)
    }
}

/// One of the two that a stream can be split into, at any sizes.
pub(super) struct Half {
    pub(super) entry: Arc<Entry>,
    /// The numbers of the parameters that it reads.
    pub(super) reads: Arc<[usize]>,
}

/// A grid that is ready to be launched on buffers.
pub(super) struct OneGrid {
    pub(super) entry: Arc<Entry>,
    pub(super) grid: Grid,
    /// As of [`launch_info`].
    info: (Vec<u64>, usize),
    /// How the device sees the buffers that it copies by itself.
    pub(super) maps: Vec<bulk::Seen>,
}

impl OneGrid {
    /// Of a kernel with these run-time sizes, on buffers of so many elements.
    pub(super) fn new(entry: &Arc<Entry>, grid: Grid, sizes: &[usize], lens: &[usize]) -> OneGrid {
        let MetadataBindingInfo { data, dynamic_metadata_offset } = launch_info(sizes, lens);
        let maps = bulk::seen(&entry.maps, entry.ir.first(), sizes);
        OneGrid { entry: Arc::clone(entry), grid, maps, info: (data, dynamic_metadata_offset) }
    }

    /// What a launch hands over besides its buffers, as words.
    pub(super) fn words(&self) -> &[u64] {
        &self.info.0
    }

    /// Its kernel, or the first of those side by side.
    pub(super) fn kernel(&self) -> &Kernel {
        self.entry.ir.first()
    }

    /// What a launch hands over besides its buffers.
    pub(super) fn info(&self) -> MetadataBindingInfo {
        MetadataBindingInfo::new(self.info.0.clone(), self.info.1)
    }
}

/// A kernel at some sizes.
pub(super) struct Prepared {
    pub(super) sizes: Vec<usize>,
    pub(super) launches: Arc<Launches>,
    /// Of the first stage; mostly there is no other. No cubes if there is nothing to do.
    pub(super) grid: Grid,
    /// For each parameter, the dtype and the elements that a buffer must have; none for a cache that is written in place.
    pub(super) inputs: Vec<Option<(DType, usize)>>,
    pub(super) output: (DType, usize),
    /// If it comes to several launches, what these are.
    pub(super) several: Option<Several>,
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
    pub(super) grids: [(OneGrid, Arc<[usize]>); 2],
}

impl Prepared {
    /// When its grids may begin, given the parameters that no launch of a run writes.
    pub(super) fn when(&self, still: Option<u64>) -> When {
        let stays = |still: u64| {
            let stays = |&n: &usize| n < 64 && still >> n & 1 == 1;
            self.launches.early.as_ref().is_some_and(|early| early.iter().all(stays))
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
    /// Kernels side by side, by where what they come to lies. That is kept as long as this is.
    together: HashMap<Vec<usize>, Arc<Entry>>,
}

impl Memory {
    /// What these come to.
    pub(super) fn arranged(&self, of: &[Arc<Prepared>]) -> Option<Arc<Arranged>> {
        self.grids.get(&places(of.iter())).cloned()
    }

    /// Remembers it.
    pub(super) fn keep_arranged(&mut self, arranged: &Arc<Arranged>) {
        if self.grids.len() >= GRIDS {
            self.grids.clear();
        }
        self.grids.insert(places(arranged.of.iter()), Arc::clone(arranged));
    }

    /// These side by side, as `make` makes it of their first stages.
    pub(super) fn together(
        &mut self,
        of: &[&Arc<Launches>],
        make: impl FnOnce() -> Arc<Entry>,
    ) -> Arc<Entry> {
        Arc::clone(self.together.entry(places(of.iter().copied())).or_insert_with(make))
    }
}

/// Where they lie, which tells them apart as long as all of them are there.
fn places<'a, T: 'a>(of: impl Iterator<Item = &'a Arc<T>>) -> Vec<usize> {
    of.map(|p| Arc::as_ptr(p).addr()).collect()
}
