//! What a launch was seen to move and to multiply.

use std::iter::Sum;

use serde::Serialize;

/// What one launch on the device did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Count {
    /// The entry.
    pub kernel: String,
    /// Of each buffer, in order, what was read and what was written.
    pub buffers: Vec<[Moved; 2]>,
    /// Operations of the units that multiply tiles; a multiplication and an addition are two.
    pub multiplied: u64,
}

/// Bytes that were read, or written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Moved {
    /// By all threads together: what the threads of a warp read in one place counts for each of them.
    pub asked: u64,
    /// In each block once: what processors get from the memory that they share, if none of them reads twice.
    pub by_block: u64,
    /// Once: what comes from the device's memory, if the memory that processors share holds all of it.
    pub distinct: u64,
}

impl Count {
    /// What a program has written: words.
    pub(super) fn read(kernel: String, buffers: usize, bytes: &[u8]) -> Count {
        let mut words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        let mut word = || words.next().unwrap_or_default();
        let mut moved = || Moved { asked: word(), by_block: word(), distinct: word() };
        let buffers = (0..buffers).map(|_| [moved(), moved()]).collect();
        Count { kernel, buffers, multiplied: word() }
    }

    /// What was moved of all buffers.
    pub fn moved(&self) -> Moved {
        self.buffers.iter().flatten().copied().sum()
    }
}

impl Sum for Moved {
    fn sum<I: Iterator<Item = Moved>>(items: I) -> Moved {
        items.fold(Moved::default(), |all, one| Moved {
            asked: all.asked + one.asked,
            by_block: all.by_block + one.by_block,
            distinct: all.distinct + one.distinct,
        })
    }
}
