//! Walking several strided tensors together.

use latentc_ir::AxisId;

/// A nest of loops over tensors that share its dimensions: for each dimension its extent, and for each tensor the step
/// in elements. Neighbouring dimensions that all tensors cross in one stride are one loop.
#[derive(Clone, Debug)]
pub(super) struct Nest<const N: usize> {
    /// Extents and steps, outermost first; never empty.
    dims: Vec<(usize, [usize; N])>,
}

impl<const N: usize> Nest<N> {
    /// The nest over dimensions given outermost first.
    pub(super) fn new(dims: impl IntoIterator<Item = (usize, [usize; N])>) -> Nest<N> {
        let mut merged: Vec<(usize, [usize; N])> = Vec::new();
        for (extent, steps) in dims {
            if extent == 1 {
                continue;
            }
            match merged.last_mut() {
                Some((outer, outer_steps)) if (0..N).all(|n| outer_steps[n] == steps[n] * extent) => {
                    *outer *= extent;
                    *outer_steps = steps;
                }
                _ => merged.push((extent, steps)),
            }
        }
        if merged.is_empty() {
            merged.push((1, [0; N]));
        }
        Nest { dims: merged }
    }

    /// Calls `inner` with the tensors' offsets, the length and the steps of each innermost loop.
    pub(super) fn each(&self, mut inner: impl FnMut([usize; N], usize, [usize; N])) {
        let (last, outer) = self.dims.split_last().expect("a nest has a dimension");
        let count: usize = outer.iter().map(|d| d.0).product();
        if last.0 == 0 {
            return;
        }
        let mut index = vec![0; outer.len()];
        let mut at = [0; N];
        for _ in 0..count {
            inner(at, last.0, last.1);
            for d in (0..outer.len()).rev() {
                let (extent, steps) = outer[d];
                index[d] += 1;
                for n in 0..N {
                    at[n] += steps[n];
                }
                if index[d] < extent {
                    break;
                }
                for n in 0..N {
                    at[n] -= steps[n] * extent;
                }
                index[d] = 0;
            }
        }
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
        assert_eq!(Nest::new([(2, [12]), (3, [4]), (4, [1])]).dims, vec![(24, [1])]);
    }

    #[test]
    fn an_empty_dimension_visits_nothing() {
        Nest::new([(2, [1]), (0, [1])]).each(|_, _, _| panic!("nothing to visit"));
        Nest::new([(0, [1]), (2, [1])]).each(|_, _, _| panic!("nothing to visit"));
    }
}
