//! What an engine has in memory: caches, places for temporaries, and how much a run would take.

use std::sync::Arc;

use latentc_codegen::device::{Device, DeviceError};
use latentc_codegen::memory::Plan;
use latentc_ir::DType;
use latentc_passes::{Graph, Pool};

use super::laid::Laid;
use super::sizes::{Extent, Sizes};
use super::{Engine, RunError};
use crate::chunks::{self, Holding};

impl<D: Device> Engine<D> {
    /// What caches lie in, if it is pages of a pool.
    pub fn pool(&self) -> Option<&Pool> {
        self.graphs.iter().find_map(|g| g.program.pool.as_ref())
    }

    /// Has pools hold so many pages from the next [`reset`](Engine::reset) on; if none are given, as many as all sequences may fill.
    pub fn set_pool_pages(&mut self, pages: Option<usize>) {
        self.pool_pages = pages;
    }

    /// Pages that pools have room for.
    pub fn pool_pages(&self) -> usize {
        self.pool().map_or(0, |pool| self.slots / pool.page as usize)
    }

    /// Has sessions read so many tokens of each sequence at once at most; if no number is given, as many as
    /// [memory allows](crate::chunks).
    pub fn set_chunk(&mut self, tokens: Option<usize>) {
        self.chunk = tokens;
    }

    /// How many tokens of each sequence sessions read at once at most, if that was said.
    pub fn chunk(&self) -> Option<usize> {
        self.chunk
    }

    /// Makes room in every cache for a batch of sequences of up to `capacity` positions, and forgets what was there: in pools for as many
    /// pages as these fill, unless [`set_pool_pages`](Engine::set_pool_pages) said otherwise. Gives
    /// the memory of temporaries back, since the next runs may have other sizes.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn reset(&mut self, batch: usize, capacity: usize) -> Result<(), DeviceError> {
        self.reset_to(batch, capacity, |device, dtype, len| device.keep(dtype, len))
    }

    /// Makes room as [`reset`](Engine::reset) does, with the memory that `make` gives for a dtype and a number of elements.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn reset_to(
        &mut self,
        batch: usize,
        capacity: usize,
        mut make: impl FnMut(&mut D, DType, usize) -> Result<D::Buffer, DeviceError>,
    ) -> Result<(), DeviceError> {
        self.pages.clear();
        let rows = match self.pool() {
            Some(pool) => {
                let all = || batch * pool.pages_for(capacity as u64) as usize;
                self.pool_pages.unwrap_or_else(all) * pool.page as usize
            }
            None => capacity,
        };
        self.slots = if self.pool().is_some() { rows } else { 0 };
        self.cached = 0;
        let layout = self.device.layout();
        for cache in self.caches.values() {
            let mut len = rows;
            for size in &cache.dims[1..] {
                len *= size.fixed().map_or(batch, |n| n as usize);
            }
            self.cached += len as u64 * (layout.kept)(cache.dtype);
            self.heap[cache.slot] = None;
            let buffer = make(&mut self.device, cache.dtype, len)?;
            self.heap[cache.slot] = Some(buffer);
        }
        Ok(())
    }

    /// A run of a graph for these sizes, laid out, and the memory that it needs.
    pub(super) fn plan(&mut self, graph: usize, sizes: Sizes) -> Result<Arc<Laid>, RunError> {
        let layout = self.device.layout();
        let loaded = &mut self.graphs[graph];
        let laid = match &loaded.laid {
            Some((of, laid)) if *of == sizes => Arc::clone(laid),
            _ => {
                let make = if loaded.elsewhere { Plan::without_results } else { Plan::new };
                let plan = make(&loaded.program, &sizes.by_name(&loaded.names), &layout)?;
                let laid = Arc::new(Laid::new(loaded, &plan, &self.sources));
                loaded.laid = Some((sizes, Arc::clone(&laid)));
                laid
            }
        };
        for (n, &bytes) in laid.pages.iter().enumerate() {
            if self.pages.get(n).is_some_and(|(has, _)| *has >= bytes) {
                continue;
            }
            // Nothing lives here between runs, so what is too small is given back before there is more.
            self.pages.truncate(n);
            self.pages.push((bytes, self.device.reserve(bytes)?));
        }
        Ok(laid)
    }

    /// What is held from run to run.
    pub(crate) fn holding(&self) -> Holding {
        Holding { weights: self.weights.values().map(|held| held.bytes).sum(), caches: self.cached }
    }

    /// Bytes of the temporaries of a run whose arguments have these shapes.
    ///
    /// # Errors
    /// If the graph was not added, or takes no such arguments.
    pub(crate) fn temporaries(
        &self,
        graph: Graph,
        shapes: &[Vec<usize>],
        past: usize,
    ) -> Result<u64, RunError> {
        let number = self.choose(graph, extents(shapes))?;
        let (_, sizes) = self.sizes(number, extents(shapes), past)?;
        let loaded = &self.graphs[number];
        chunks::temporaries(&loaded.program, &sizes.by_name(&loaded.names), &self.device.layout())
    }

    /// Reserves memory for the temporaries of such a run, so that those before it, which need less, lie there too.
    ///
    /// # Errors
    /// As for [`temporaries`](Engine::temporaries), or the device has no room.
    pub(crate) fn reserve(
        &mut self,
        graph: Graph,
        shapes: &[Vec<usize>],
        past: usize,
    ) -> Result<(), RunError> {
        let number = self.choose(graph, extents(shapes))?;
        let (_, sizes) = self.sizes(number, extents(shapes), past)?;
        self.plan(number, sizes)?;
        Ok(())
    }
}

fn extents(shapes: &[Vec<usize>]) -> impl ExactSizeIterator<Item = Extent<'_>> {
    shapes.iter().map(|shape| Extent { shape, len: shape.iter().product() })
}
