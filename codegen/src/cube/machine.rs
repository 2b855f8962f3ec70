//! What the choice among ways depends on of a device.

use serde::{Deserialize, Serialize};

use super::split::SHARED;

/// Shared memory of a multiprocessor that the system keeps for each cube (CUDA C++ Programming Guide, compute capabilities).
const RESERVED: usize = 1 << 10;

/// Bytes of a GPU's cache that cubes which run at the same time can count on, of 50 MiB that an H100 has in two halves.
pub(crate) const CACHED: u32 = 24 << 20;

/// A device, as far as the choice among ways asks. Texts of kernels do not depend on it: a way that a device has no room for is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Multiprocessors: a cube for each keeps the device busy.
    pub multiprocessors: usize,
    /// Bytes of shared memory that a cube has at most.
    pub shared_bytes: usize,
    /// Whether planes multiply in groups of four, as those of sm_90a do.
    pub groups: bool,
    /// Whether the device itself brings boxes of operands, for a driver that is called directly.
    pub boxes: bool,
}

impl Machine {
    /// The one that choices are for where no device is at hand, and whose times the rules were measured by: H100 and H200.
    pub const HOPPER: Machine =
        Machine { multiprocessors: 132, shared_bytes: SHARED, groups: true, boxes: true };

    /// Bytes of shared memory that two cubes have each, side by side on a multiprocessor.
    pub(crate) const fn half(&self) -> usize {
        (self.shared_bytes + RESERVED) / 2 - RESERVED
    }

    /// Cubes that run at once, each with so many bytes of shared memory: two on a multiprocessor, or one where no two fit.
    pub(crate) fn at_once(&self, shared_bytes: usize) -> usize {
        self.multiprocessors * if shared_bytes > self.half() { 1 } else { 2 }
    }
}

impl Default for Machine {
    fn default() -> Machine {
        Machine::HOPPER
    }
}
