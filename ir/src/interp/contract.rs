//! Contraction of any number of operands over named axes.
//!
//! The product of all operands, summed over the axes that the result lacks, does not depend on the order in which
//! operands meet. The two whose product has the fewest points meet first, so that a dense sum over
//! experts costs no more than it must; of equal pairs the leftmost wins.

use std::borrow::Cow;

use super::ops::{along, walk};
use crate::types::AxisId;

/// A row-major array with named axes.
#[derive(Clone)]
pub(crate) struct Array<'a> {
    pub(crate) axes: Vec<AxisId>,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Cow<'a, [f64]>,
}

impl Array<'_> {
    fn extent(&self, axis: AxisId) -> Option<usize> {
        self.axes.iter().position(|&a| a == axis).map(|n| self.shape[n])
    }

    /// The sum over all axes that are not among `keep`, which may hold axes that this lacks; in the order of `keep`.
    fn sum_to(&self, keep: &[AxisId]) -> Array<'static> {
        let axes: Vec<_> = keep.iter().copied().filter(|&a| self.axes.contains(&a)).collect();
        let shape: Vec<_> = axes.iter().filter_map(|&a| self.extent(a)).collect();
        let mut data = vec![0.0; shape.iter().product()];
        let to = along(&axes, &shape, &self.axes);
        let from = along(&self.axes, &self.shape, &self.axes);
        walk(&self.shape, [&from, &to], |[i, o]| data[o] += self.data[i]);
        Array { axes, shape, data: Cow::Owned(data) }
    }
}

/// The elements of the contraction of `operands` in the order of `result`, every axis of which some operand has.
pub(crate) fn contract(operands: Vec<Array<'_>>, result: &[AxisId]) -> Vec<f64> {
    let mut left = operands;
    while left.len() > 1 {
        let (i, j) = cheapest_pair(&left);
        let b = left.remove(j);
        let a = left.remove(i);
        let needed = |x: &AxisId| result.contains(x) || left.iter().any(|o| o.axes.contains(x));
        let product = pair(&a, &b, needed);
        left.insert(i, product);
    }
    match left.pop() {
        Some(last) if last.axes == result => last.data.into_owned(),
        Some(last) => last.sum_to(result).data.into_owned(),
        None => Vec::new(),
    }
}

fn cheapest_pair(operands: &[Array<'_>]) -> (usize, usize) {
    let mut best = (0, 1);
    let mut least = f64::INFINITY;
    for (i, a) in operands.iter().enumerate() {
        for (j, b) in operands.iter().enumerate().skip(i + 1) {
            let of_a: f64 = a.shape.iter().map(|&n| n as f64).product();
            let only_b = b.axes.iter().zip(&b.shape).filter(|(x, _)| !a.axes.contains(x));
            let points = of_a * only_b.map(|(_, &n)| n as f64).product::<f64>();
            if points < least {
                (best, least) = ((i, j), points);
            }
        }
    }
    best
}

/// The product of two operands, summed over the axes that nobody needs any more: a batch of matrix products.
fn pair(a: &Array<'_>, b: &Array<'_>, needed: impl Fn(&AxisId) -> bool) -> Array<'static> {
    let in_a = |x: &AxisId| a.axes.contains(x);
    let in_b = |x: &AxisId| b.axes.contains(x);
    let pick = |of: &[AxisId], keep: &dyn Fn(&AxisId) -> bool| -> Vec<AxisId> {
        of.iter().copied().filter(|x| keep(x)).collect()
    };
    let batch = pick(&a.axes, &|x| in_b(x) && needed(x));
    let summed = pick(&a.axes, &|x| in_b(x) && !needed(x));
    let rows = pick(&a.axes, &|x| !in_b(x) && needed(x));
    let columns = pick(&b.axes, &|x| !in_a(x) && needed(x));

    // Axes that one operand alone has and nobody needs are summed away on the way to [batch, rows, summed] and
    // [batch, summed, columns].
    let a = a.sum_to(&[batch.clone(), rows.clone(), summed.clone()].concat());
    let b = b.sum_to(&[batch.clone(), summed.clone(), columns.clone()].concat());
    let size = |of: &Array<'_>, axes: &[AxisId]| axes.iter().filter_map(|&x| of.extent(x)).product::<usize>();
    let (m, k, n) = (size(&a, &rows), size(&a, &summed), size(&b, &columns));
    let batches = size(&a, &batch);

    let axes = [batch, rows, columns].concat();
    let shape: Vec<_> = axes.iter().filter_map(|&x| a.extent(x).or_else(|| b.extent(x))).collect();
    let mut data = vec![0.0; batches * m * n];
    for g in 0..batches {
        for i in 0..m {
            let out = &mut data[(g * m + i) * n..][..n];
            for p in 0..k {
                let x = a.data[(g * m + i) * k + p];
                let row = &b.data[(g * k + p) * n..][..n];
                for (o, &y) in out.iter_mut().zip(row) {
                    *o += x * y;
                }
            }
        }
    }
    Array { axes, shape, data: Cow::Owned(data) }
}
