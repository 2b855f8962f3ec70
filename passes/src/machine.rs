//! The machines that costs are weighed for: a rate of arithmetic, a rate of memory, a size.

use serde::Serialize;

/// What a cost model needs to know of a device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// As on the command line.
    pub name: &'static str,
    /// Dense bf16 operations on matrices, a second.
    pub flops: f64,
    /// Operations on single floats, a second.
    pub scalars: f64,
    /// Bytes from memory, a second.
    pub bandwidth: f64,
    /// Bytes of memory.
    pub memory: f64,
    /// From the end of one kernel to the start of the next, in seconds, where launches are recorded ahead.
    pub launch: f64,
    /// Multiprocessors: what one of them computes alone has so small a part of all rates.
    pub processors: f64,
}

/// No data sheet has it; microseconds on all of them.
const LAUNCH: f64 = 2e-6;

/// What the data sheets of these have in common.
const HOPPER: Machine = Machine {
    name: "h800",
    flops: 989e12,
    scalars: 67e12,
    bandwidth: 3.35e12,
    memory: 80e9,
    launch: LAUNCH,
    processors: 132.0,
};

/// Vendors' data sheets: dense rates, no sparsity.
pub const MACHINES: [Machine; 4] = [
    HOPPER,
    Machine { name: "h100", ..HOPPER },
    Machine { name: "h200", bandwidth: 4.8e12, memory: 141e9, ..HOPPER },
    Machine {
        name: "a100",
        flops: 312e12,
        scalars: 19.5e12,
        bandwidth: 2.04e12,
        memory: 80e9,
        launch: LAUNCH,
        processors: 108.0,
    },
];

impl Machine {
    /// The machine of that name.
    pub fn named(name: &str) -> Option<Machine> {
        MACHINES.into_iter().find(|m| m.name == name)
    }

    /// The time in seconds of work that overlaps its arithmetic with its reading (arXiv 0906.4427, the roofline).
    pub fn seconds(&self, flops: f64, bytes: f64) -> f64 {
        (flops / self.flops).max(bytes / self.bandwidth)
    }
}

impl Default for Machine {
    /// The paper's (arXiv 2405.04434, section 3.1.3).
    fn default() -> Machine {
        MACHINES[0]
    }
}
