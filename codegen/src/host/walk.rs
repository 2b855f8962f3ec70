//! Walking several strided tensors together.

use latentc_ir::AxisId;
use smallvec::{SmallVec, smallvec};

/// A loop over tensors that share its dimension: the extent, and for each tensor the step in elements.
pub(super) type Loop<const N: usize> = (usize, [usize; N]);

/// Loops, of which few nests have more.
pub(super) type Loops<const N: usize> = SmallVec<[Loop<N>; 4]>;

/// Loops given outermost first, without those of one turn. Neighbours that all tensors cross in one stride are one.
pub(super) fn merge<const N: usize>(loops: impl IntoIterator<Item = Loop<N>>) -> Loops<N> {
    let mut merged: Loops<N> = SmallVec::new();
    for (extent, steps) in loops.into_iter().filter(|l| l.0 != 1) {
        match merged.last_mut() {
            Some((outer, outer_steps)) if (0..N).all(|n| outer_steps[n] == steps[n] * extent) => {
                *outer *= extent;
                *outer_steps = steps;
            }
            _ => merged.push((extent, steps)),
        }
    }
    merged
}

/// Takes the longest of some loops; one of one turn if there is none.
pub(super) fn take_longest<const N: usize>(loops: &mut Loops<N>) -> Loop<N> {
    let longest = (0..loops.len()).max_by_key(|&i| loops[i].0);
    longest.map_or((1, [0; N]), |i| loops.remove(i))
}

/// How many turns nested loops take.
pub(super) fn turns<const N: usize>(loops: &[Loop<N>]) -> usize {
    loops.iter().map(|l| l.0).product()
}

/// Where each tensor is at a turn of nested loops, the last one fastest.
pub(super) fn place<const N: usize>(loops: &[Loop<N>], mut turn: usize) -> [usize; N] {
    let mut at = [0; N];
    for (extent, steps) in loops.iter().rev() {
        for n in 0..N {
            at[n] += turn % extent * steps[n];
        }
        turn /= extent;
    }
    at
}

/// A nest of loops, merged; never empty.
#[derive(Clone, Debug)]
pub(super) struct Nest<const N: usize> {
    dims: Loops<N>,
}

impl<const N: usize> Nest<N> {
    /// The nest over dimensions given outermost first.
    pub(super) fn new(dims: impl IntoIterator<Item = Loop<N>>) -> Nest<N> {
        let mut dims = merge(dims);
        if dims.is_empty() {
            dims.push((1, [0; N]));
        }
        Nest { dims }
    }

    /// The innermost loop.
    #[inline(always)]
    pub(super) fn last(&self) -> Loop<N> {
        *self.dims.last().expect("a nest has a dimension")
    }

    /// The innermost loop, if it is the only one.
    pub(super) fn only(&self) -> Option<Loop<N>> {
        (self.dims.len() == 1).then(|| self.last())
    }

    /// Where the tensors are each time that the innermost loop begins; none if it has no turns.
    #[inline(always)]
    pub(super) fn starts(&self) -> Starts<'_, N> {
        let (last, outer) = self.dims.split_last().expect("a nest has a dimension");
        let left = if last.0 == 0 { 0 } else { turns(outer) };
        Starts { outer, index: smallvec![0; outer.len()], at: [0; N], left }
    }

    /// Calls `inner` with the tensors' offsets, the length and the steps of each innermost loop. What is called so is not compiled for
    /// the vector unit that its surroundings are: hot loops go through [`starts`](Nest::starts).
    pub(super) fn each(&self, mut inner: impl FnMut([usize; N], usize, [usize; N])) {
        let (n, steps) = self.last();
        self.starts().for_each(|at| inner(at, n, steps));
    }
}

/// An iterator over the places where the innermost loop of a nest begins.
pub(super) struct Starts<'a, const N: usize> {
    outer: &'a [Loop<N>],
    index: SmallVec<[usize; 4]>,
    at: [usize; N],
    left: usize,
}

impl<const N: usize> Iterator for Starts<'_, N> {
    type Item = [usize; N];

    #[inline(always)]
    fn next(&mut self) -> Option<[usize; N]> {
        self.left = self.left.checked_sub(1)?;
        let at = self.at;
        for (index, (extent, steps)) in self.index.iter_mut().zip(self.outer).rev() {
            *index += 1;
            for (at, step) in self.at.iter_mut().zip(steps) {
                *at += step;
            }
            if *index < *extent {
                break;
            }
            for (at, step) in self.at.iter_mut().zip(steps) {
                *at -= step * extent;
            }
            *index = 0;
        }
        Some(at)
    }
}

/// The offset of the `index`-th point of axes walked in order, last fastest.
pub(super) fn offset(mut index: usize, extents: &[usize], steps: &[usize]) -> usize {
    let mut at = 0;
    for (extent, step) in extents.iter().zip(steps).rev() {
        at += index % extent * step;
        index /= extent;
    }
    at
}

/// The index of that point along one of these axes.
pub(super) fn index(point: usize, extents: &[usize], axis: usize) -> usize {
    point / extents[axis + 1..].iter().product::<usize>().max(1) % extents[axis]
}

/// The step of an axis in a tensor with these axes and steps; 0 if it lacks the axis.
pub(super) fn step(axis: AxisId, axes: &[AxisId], steps: &[usize]) -> usize {
    axes.iter().position(|&a| a == axis).map_or(0, |n| steps[n])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_what_is_contiguous_and_visits_all() {
        let nest = Nest::new([(2, [12, 1]), (3, [4, 2]), (4, [1, 6])]);
        let mut seen = vec![];
        nest.each(|at, n, steps| seen.extend((0..n).map(|i| [at[0] + i * steps[0], at[1] + i * steps[1]])));
        let want: Vec<_> = (0..24).map(|i| [i, i / 12 + i / 4 % 3 * 2 + i % 4 * 6]).collect();
        assert_eq!(seen, want);
        assert_eq!(Nest::new([(2, [12]), (3, [4]), (4, [1])]).dims[..], [(24, [1])]);
    }

    #[test]
    fn an_empty_dimension_visits_nothing() {
        Nest::new([(2, [1]), (0, [1])]).each(|_, _, _| panic!("nothing to visit"));
        Nest::new([(0, [1]), (2, [1])]).each(|_, _, _| panic!("nothing to visit"));
    }
}
