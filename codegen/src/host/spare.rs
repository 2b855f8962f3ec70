//! Memory that launches and threads need for themselves, kept from one to the next: pages that the system has to find and to clear cost more
//! than most of what is done with them, and a token is some hundred launches of a few microseconds, of which none asks for any.

use std::cell::Cell;

use latentc_ir::DType;

use super::grouped::Rows;
use super::{View, ViewMut};
use crate::device::DeviceError;

/// Elements of four bytes: floats or integers.
#[derive(Debug, Default)]
pub(super) struct Lane {
    words: Vec<u32>,
    len: usize,
    integers: bool,
}

impl Lane {
    /// Becomes so many elements, with any content.
    pub(super) fn fit(&mut self, float: bool, len: usize) {
        self.reserve(len);
        (self.len, self.integers) = (len, !float);
    }

    /// Has memory for so many.
    fn reserve(&mut self, len: usize) {
        if self.words.len() < len {
            self.words.resize(len, 0);
        }
    }

    pub(super) fn view(&self) -> View<'_> {
        let words = &self.words[..self.len];
        // SAFETY: both are as long as a word, and any word is a number of either kind.
        unsafe {
            match self.integers {
                true => View::I(std::slice::from_raw_parts(words.as_ptr().cast(), words.len())),
                false => View::F(std::slice::from_raw_parts(words.as_ptr().cast(), words.len())),
            }
        }
    }

    pub(super) fn view_mut(&mut self) -> ViewMut<'_> {
        match self.integers {
            true => {
                let words = &mut self.words[..self.len];
                // SAFETY: as for `view`.
                ViewMut::I(unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) })
            }
            false => ViewMut::F(self.floats()),
        }
    }

    /// The elements as floats.
    pub(super) fn floats(&mut self) -> &mut [f32] {
        let words = &mut self.words[..self.len];
        // SAFETY: as for `view`.
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) }
    }
}

/// What launches have for themselves.
#[derive(Debug, Default)]
pub(super) struct Spare {
    lanes: Vec<Lane>,
    /// How a grouped product puts rows in order.
    pub(super) rows: Rows,
}

impl Spare {
    /// So many floats, or integers, with any content: in the shortest piece that is long enough, or a longer one in the place of the longest.
    pub(super) fn take(&mut self, float: bool, len: usize) -> Result<Lane, DeviceError> {
        if len == 0 {
            return Ok(Lane::default());
        }
        let all = 0..self.lanes.len();
        let has = |i: &usize| self.lanes[*i].words.len();
        let found = all.clone().filter(|i| has(i) >= len).min_by_key(has).or_else(|| all.max_by_key(has));
        let mut lane = found.map_or_else(Lane::default, |i| self.lanes.swap_remove(i));
        if lane.words.len() < len {
            // What is too short is given back before there is more.
            lane.words = Vec::new();
            let dtype = if float { DType::F32 } else { DType::I32 };
            let reserved = lane.words.try_reserve_exact(len);
            reserved.map_err(|e| DeviceError::Memory { len, dtype, why: e.to_string() })?;
        }
        lane.fit(float, len);
        Ok(lane)
    }

    /// Gives a piece back.
    pub(super) fn give(&mut self, lane: Lane) {
        if !lane.words.is_empty() {
            self.lanes.push(lane);
        }
    }
}

/// How much launches take of what each thread has for itself, at most. Threads are [brought](Takes::bring) as much before the first of them:
/// which thread does what is another matter in each run.
#[derive(Clone, Debug, Default)]
pub(super) struct Takes {
    /// Words of each lane.
    lanes: Vec<usize>,
    /// Elements of a row that are looked at as a whole.
    row: usize,
    /// Rows of a product that are few, as they are copied.
    floats: usize,
}

impl Takes {
    /// So many words in a lane.
    pub(super) fn lane(&mut self, n: usize, words: usize) {
        if self.lanes.len() <= n {
            self.lanes.resize(n + 1, 0);
        }
        self.lanes[n] = self.lanes[n].max(words.min(KEPT));
    }

    /// So many elements of a row that are looked at as a whole.
    pub(super) fn row(&mut self, elements: usize) {
        self.row = self.row.max(elements.min(KEPT));
    }

    /// So many floats of rows of a product.
    pub(super) fn floats(&mut self, floats: usize) {
        self.floats = self.floats.max(floats.min(KEPT));
    }

    /// Takes as much as another does, too, and brings it to all threads if it was less.
    pub(super) fn bring(&mut self, other: &Takes) {
        let enough = other.row <= self.row && other.floats <= self.floats;
        let lanes = other.lanes.iter().enumerate();
        if enough && lanes.clone().all(|(n, &words)| self.lanes.get(n).is_some_and(|&has| has >= words)) {
            return;
        }
        lanes.for_each(|(n, &words)| self.lane(n, words));
        self.row(other.row);
        self.floats(other.floats);
        self.reserve();
        rayon::broadcast(|_| self.reserve());
    }

    /// Has this thread have as much.
    fn reserve(&self) {
        Own::with(self.lanes.len(), |own| {
            own.lanes.iter_mut().zip(&self.lanes).for_each(|(lane, &words)| lane.reserve(words));
            own.made.clear();
            own.made.reserve(self.lanes.len());
            own.room.order.clear();
            own.room.order.reserve(self.row);
            own.room.angles.clear();
            own.room.angles.reserve(self.row / 2);
        });
        with_floats(|floats| {
            floats.clear();
            floats.reserve(self.floats);
        });
        #[cfg(target_arch = "x86_64")]
        super::halves::reserve(self.floats);
    }
}

/// What a thread makes rows in.
#[derive(Default)]
pub(super) struct Own {
    /// Rows of a map, or the values of a stream's tile.
    pub(super) lanes: Vec<Lane>,
    /// Which of them are there.
    pub(super) made: Vec<bool>,
    pub(super) room: Room,
}

/// What instructions need that look at a row as a whole.
#[derive(Default)]
pub(super) struct Room {
    /// Elements by size.
    pub(super) order: Vec<usize>,
    /// Sines and cosines of a token's angles.
    pub(super) angles: Vec<(f32, f32)>,
}

/// Words of a lane that a thread keeps at most: those of decode are short, and a thread has dozens.
const KEPT: usize = 1 << 16;

impl Own {
    /// Works in what this thread has, of which at least so many lanes.
    pub(super) fn with<T>(lanes: usize, work: impl FnOnce(&mut Own) -> T) -> T {
        thread_local! {
            static OWN: Cell<Own> = Cell::default();
        }
        let mut own = OWN.take();
        if own.lanes.len() < lanes {
            own.lanes.resize_with(lanes, Lane::default);
        }
        let done = work(&mut own);
        own.lanes.iter_mut().filter(|lane| lane.words.len() > KEPT).for_each(|lane| *lane = Lane::default());
        OWN.set(own);
        done
    }
}

/// Works with floats of this thread's, of which there may be none yet. A thread that waits for others may begin another product meanwhile, and
/// then finds nothing here.
pub(super) fn with_floats<T>(work: impl FnOnce(&mut Vec<f32>) -> T) -> T {
    thread_local! {
        static FLOATS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    }
    let mut floats = FLOATS.take();
    let done = work(&mut floats);
    FLOATS.set(floats);
    done
}
