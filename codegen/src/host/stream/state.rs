//! What a stream knows of rows once it has seen some positions.

use super::super::simd::exp;
use crate::stream::Monoid;

/// What is known of some positions for each row.
pub(super) struct State<'s> {
    pub(super) by: Monoid,
    /// The largest score, but no less than the least float. Of a softmax; else it stays as it is.
    pub(super) max: &'s mut [f32],
    /// The sum of exponentials of scores less the maximum. Of a softmax.
    pub(super) sum: &'s mut [f32],
    /// The values times these exponentials, or weights, added up, without values that sum; or the largest weights. Rows of all of `n`.
    pub(super) acc: &'s mut [f32],
}

impl<'s> State<'s> {
    /// In memory that has so many numbers or more.
    pub(super) fn at(by: Monoid, memory: &'s mut [f32], rows: usize, columns: usize) -> State<'s> {
        let (max, rest) = memory.split_at_mut(rows);
        let (sum, rest) = rest.split_at_mut(rows);
        State { by, max, sum, acc: &mut rest[..rows * columns] }
    }

    /// Of no position.
    pub(super) fn clear(&mut self) {
        self.max.fill(f32::MIN);
        self.sum.fill(0.0);
        self.acc.fill(if self.by == Monoid::Max { f32::NEG_INFINITY } else { 0.0 });
    }

    /// Both together.
    pub(super) fn merge(&mut self, other: &State<'_>) {
        let both = self.acc.iter_mut().zip(&*other.acc);
        match self.by {
            Monoid::Softmax => {}
            Monoid::Sum => return both.for_each(|(a, b)| *a += b),
            Monoid::Max => return both.for_each(|(a, b)| *a = a.max(*b)),
        }
        let columns = self.acc.len() / self.max.len().max(1);
        for r in 0..self.max.len() {
            let max = self.max[r].max(other.max[r]);
            let (mine, theirs) = (exp(self.max[r] - max), exp(other.max[r] - max));
            self.max[r] = max;
            self.sum[r] = self.sum[r] * mine + other.sum[r] * theirs;
            let row = r * columns..(r + 1) * columns;
            for (a, b) in self.acc[row.clone()].iter_mut().zip(&other.acc[row]) {
                *a = *a * mine + b * theirs;
            }
        }
    }
}
